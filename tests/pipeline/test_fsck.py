"""Archive against index: nothing is deleted, nothing is run again, what can be rebuilt is."""

import io
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.model import (
    ConflictPolicy,
    Level,
    Origin,
    Query,
    Source,
    StoreOutcome,
)
from dicom_node.pipeline.fsck import FsckReport, fsck
from dicom_node.pipeline.ingest import Ingest
from dicom_node.store.catalog import Catalog, open_catalog

EXPLICIT = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
SENDER = Source(calling_ae_title="SCANNER", called_ae_title="NODE", address="127.0.0.1", association_id="assoc-1")


class Node:
    """A catalog that can be closed, hurt and opened again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open()

    def open(self) -> None:
        clock = SystemClock()
        self.catalog: Catalog = open_catalog(self.folder, clock, StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
        self.ingest = Ingest(
            self.catalog.archive,
            self.catalog.index,
            conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST,
            origin_for=lambda source: Origin.RECEIVED,
            max_object_bytes=1 << 30,
            max_inflated_header_bytes=1 << 20,
            clock=clock,
        )

    def send(self, **attributes: Any) -> str:
        uid, body = image(**attributes)
        result = self.ingest.accept(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=[body], source=SENDER
        )
        assert result.status == 0x0000
        return uid

    def path(self, uid: str) -> Path:
        instance = self.catalog.index.instance(uid)
        assert instance is not None
        return Path(instance.path)

    def check(self, *, rebuild: bool = False, verify_hashes: bool = False) -> FsckReport:
        return fsck(self.catalog, rebuild=rebuild, verify_hashes=verify_hashes, clock=SystemClock())

    def lose_index(self) -> None:
        self.catalog.close()
        for path in self.folder.glob("catalog.db*"):
            path.unlink()
        self.open()

    def rows(self, sql: str) -> list[sqlite3.Row]:
        with self.catalog.database.read() as connection:
            return connection.execute(sql).fetchall()


def image(**attributes: Any) -> tuple[str, bytes]:
    ds = pydicom.Dataset()
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": "1.1",
        "SeriesInstanceUID": "1.1.1",
        "PatientID": "P1",
        "PatientName": "Doe^Jane",
        "Modality": "CT",
        "PixelData": b"\x01\x02" * 100,
    } | attributes
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    ds["PixelData"].VR = "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=True)
    return str(values["SOPInstanceUID"]), out.getvalue()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    opened = Node(tmp_path / "data")
    yield opened
    opened.catalog.close()


def find(catalog: Catalog, level: Level) -> list[dict[str, str]]:
    returns = tuple(sorted(catalog.index.supported(level)))
    return [dict(match.attributes) for match in catalog.index.find(Query(level=level, keys=(), returns=returns))]


def test_a_whole_archive_is_clean(node: Node) -> None:
    for _ in range(3):
        node.send()
    report = node.check(verify_hashes=True)
    assert report.clean
    assert (report.rows, report.files) == (3, 3)


def test_a_lost_index_is_rebuilt_from_the_files_alone(node: Node) -> None:
    uid = node.send(PatientName="Doe^Jane", SeriesDescription="axial")
    node.send(SOPInstanceUID=uid, PatientName="Other^Name")  # a variant
    node.send(StudyInstanceUID="2.2", SeriesInstanceUID="2.2.1", PatientID="P2")
    first = node.path(uid)
    os.utime(first, (1_000_000_000, 1_000_000_000))  # received before its variant
    before = {level: find(node.catalog, level) for level in Level}
    node.lose_index()
    assert node.catalog.index.instance(uid) is None
    report = node.check()
    assert (len(report.unindexed), report.indexed, report.clean) == (3, [], False)
    report = node.check(rebuild=True)
    assert (len(report.indexed), report.clean) == (3, True)
    assert node.path(uid) == first
    assert [variant.kind for variant in node.catalog.index.variants(uid)] == [StoreOutcome.VARIANT]
    assert {level: find(node.catalog, level) for level in Level} == before
    assert node.check(rebuild=True).indexed == []
    sources = {row["source"] for row in node.rows("SELECT source FROM instance")}
    assert all('"calling_ae_title":"SCANNER"' in source for source in sources)


def test_nothing_is_run_again_for_what_was_rebuilt_and_a_new_image_is(node: Node) -> None:
    node.send()
    node.lose_index()
    node.check(rebuild=True)
    series = node.rows("SELECT routing, image_count FROM series")[0]
    assert (series["routing"], series["image_count"]) == ("none", 1)
    node.send()
    series = node.rows("SELECT routing, image_count FROM series")[0]
    assert (series["routing"], series["image_count"]) == ("open", 2)


@pytest.mark.parametrize(
    ("change", "known_as"),
    [({}, StoreOutcome.DUPLICATE), ({"PatientName": "Other^Name"}, StoreOutcome.HEADER_CHANGED)],
)
def test_an_image_that_fsck_indexed_is_run_once_its_sender_sends_it_again(
    node: Node, change: dict[str, str], known_as: StoreOutcome
) -> None:
    uid = node.send()
    node.lose_index()  # as a crash between the name and the row leaves it
    node.check(rebuild=True)
    assert list(node.catalog.queue.open_studies()) == []
    node.send(SOPInstanceUID=uid, **change)
    assert [variant.kind for variant in node.catalog.index.variants(uid)] == [known_as] * bool(change)
    (study,) = node.catalog.queue.open_studies()
    assert (study.pending_series, study.instance_count, study.revision) == (("1.1.1",), 1, 1)
    node.send(SOPInstanceUID=uid)
    assert node.rows("SELECT received_seq FROM series")[0]["received_seq"] == 1


def test_a_rebuilt_result_that_comes_back_is_not_run(node: Node) -> None:
    uid, body = image()
    record = node.ingest.stage(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=[body])
    node.catalog.index.add_instance(record, ConflictPolicy.KEEP_FIRST, lambda first: False)
    node.lose_index()
    node.check(rebuild=True)
    node.send(SOPInstanceUID=uid)
    assert list(node.catalog.queue.open_studies()) == []


def test_a_rebuilt_result_is_known_as_produced(node: Node) -> None:
    uid, body = image()
    record = node.ingest.stage(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=[body])
    node.catalog.index.add_instance(record, ConflictPolicy.KEEP_FIRST, lambda first: False)
    node.lose_index()
    node.check(rebuild=True)
    instance = node.catalog.index.instance(uid)
    assert instance is not None and instance.origin is Origin.PRODUCED


def test_a_row_without_a_file_is_missing_until_the_object_comes_again(node: Node) -> None:
    uid, body = image()
    send = {"sop_class_uid": CT, "sop_instance_uid": uid, "transfer_syntax_uid": EXPLICIT, "source": SENDER}
    node.ingest.accept(fragments=[body], **send)  # type: ignore[arg-type]
    other = node.send()
    node.path(uid).unlink()
    report = node.check()
    assert report.missing == [uid]
    assert not report.clean
    assert node.catalog.index.instance(uid) is None
    assert node.catalog.index.instance(other) is not None
    assert find(node.catalog, Level.STUDY)[0]["NumberOfStudyRelatedInstances"] == "1"
    assert [i.sop_instance_uid for i in node.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.1"]})] == [
        other
    ]
    assert node.ingest.accept(fragments=[body], **send).status == 0x0000  # type: ignore[arg-type]
    assert node.path(uid).read_bytes().endswith(body)
    assert node.check().clean


def test_other_content_takes_the_place_of_a_missing_object(node: Node) -> None:
    uid = node.send()
    node.path(uid).unlink()
    node.check()
    node.send(SOPInstanceUID=uid, PatientName="Other^Name")
    assert b"Other^Name" in node.path(uid).read_bytes()
    assert node.catalog.index.variants(uid) == ()


def test_a_shorter_file_is_damaged_and_a_changed_one_when_hashed(node: Node) -> None:
    cut, changed = node.send(), node.send()
    cut_path, changed_path = node.path(cut), node.path(changed)
    cut_path.write_bytes(cut_path.read_bytes()[:-1])
    raw = bytearray(changed_path.read_bytes())
    raw[-1] ^= 1
    changed_path.write_bytes(raw)
    assert node.check().damaged == [cut]
    assert sorted(node.check(verify_hashes=True).damaged) == sorted([cut, changed])
    assert node.catalog.index.instance(changed) is None
    assert cut_path.exists() and changed_path.exists()


def test_a_file_put_back_is_found_again(node: Node) -> None:
    uid = node.send()
    path = node.path(uid)
    kept = path.read_bytes()
    path.unlink()
    node.check()
    path.write_bytes(kept)
    report = node.check()
    assert report.found_again == [uid]
    assert node.catalog.index.instance(uid) is not None
    assert node.check().clean


def test_a_series_lost_before_it_was_routed_waits_again_when_its_file_is_put_back(node: Node) -> None:
    path = node.path(node.send())
    kept = path.read_bytes()
    path.unlink()
    node.check()
    assert list(node.catalog.queue.open_studies()) == []
    path.write_bytes(kept)
    node.check()
    assert [study.pending_series for study in node.catalog.queue.open_studies()] == [("1.1.1",)]


def test_a_missing_variant_is_told(node: Node) -> None:
    uid = node.send()
    node.send(SOPInstanceUID=uid, PatientName="Other^Name")
    Path(node.catalog.index.variants(uid)[0].path).unlink()
    report = node.check()
    assert report.missing_variants == [uid]
    assert node.catalog.index.instance(uid) is not None


def test_files_that_are_no_objects_are_told_and_left(node: Node) -> None:
    uid = node.send()
    good = node.path(uid)
    strangers = {}
    for name, content in {
        "0" * 64: b"",
        "1" * 64: b"no Part-10 file",
        "2" * 64: good.read_bytes(),  # right inside, under another name
    }.items():
        path = node.folder / "archive" / name[:2] / f"{name}.dcm"
        path.write_bytes(content)
        strangers[f"{name[:2]}/{name}.dcm"] = path
    report = node.check(rebuild=True)
    assert sorted(report.unusable) == sorted(strangers)
    assert all(path.exists() for path in strangers.values())
    assert report.indexed == []
