"""What every index promises (`interfaces.InstanceIndex`, `interfaces.AssociationLog`)."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicom_node.config import StorageSettings
from dicom_node.errors import InvalidIdentifier, StorageError
from dicom_node.headers import scan
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    ConflictPolicy,
    InstanceRecord,
    Key,
    Level,
    MatchKind,
    Origin,
    Query,
    Source,
    StoredInstance,
    StoreOutcome,
)
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.instances import insert_instance

EXPLICIT, JPEG_LS, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2"
CT, SEG, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"
KEEP, REPLACE, REFUSE = ConflictPolicy.KEEP_FIRST, ConflictPolicy.REPLACE, ConflictPolicy.REFUSE


@dataclass
class HandClock:
    seconds: float = 1000.0

    def boot(self) -> BootTime:
        return BootTime(boot_id="boot-1", seconds=self.seconds)

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Bench:
    """An index with its archive, and short ways to fill and ask it."""

    catalog: Catalog
    clock: HandClock

    def record(
        self,
        *,
        origin: Origin = Origin.RECEIVED,
        association_id: str | None = "assoc-1",
        syntax: str = EXPLICIT,
        **attributes: Any,
    ) -> InstanceRecord:
        ds = pydicom.Dataset()
        values: dict[str, Any] = {
            "SOPClassUID": CT,
            "SOPInstanceUID": generate_uid(),
            "StudyInstanceUID": "1.1",
            "SeriesInstanceUID": "1.1.1",
            "PatientID": "P1",
            "Modality": "CT",
            "PixelData": b"\x00" * 8,
        } | attributes
        for keyword, value in values.items():
            if value is not None:
                setattr(ds, keyword, value)
        if "PixelData" in ds:
            ds["PixelData"].VR = "OW"
        ds.SpecificCharacterSet = "ISO_IR 192"
        out = io.BytesIO()
        implicit = syntax == IMPLICIT
        pydicom.dcmwrite(out, ds, implicit_vr=implicit, little_endian=True, force_encoding=True)
        body = out.getvalue()
        header = scan(memoryview(body), syntax, max_inflated_header_bytes=1 << 20)
        spool = self.catalog.archive.begin(
            sop_class_uid=header.sop_class_uid,
            sop_instance_uid=header.sop_instance_uid,
            transfer_syntax_uid=syntax,
            source_ae="SCANNER",
        )
        spool.write(body)
        return InstanceRecord(
            header=header,
            file=spool.commit(),
            source=Source(
                calling_ae_title="SCANNER", called_ae_title="NODE", address="127.0.0.1", association_id=association_id
            ),
            origin=origin,
            received_at=self.clock.wall(),
            received_boot=self.clock.boot(),
        )

    def add(self, policy: ConflictPolicy = KEEP, same: bool = False, **attributes: Any) -> StoreOutcome:
        return self.catalog.index.add_instance(self.record(**attributes), policy, lambda first: same)

    def row(self, sql: str, *parameters: object) -> dict[str, Any]:
        with self.catalog.database.read() as connection:
            found = connection.execute(sql, parameters).fetchone()
        assert found is not None
        return dict(found)

    def study(self, uid: str = "1.1") -> dict[str, Any]:
        return self.row("SELECT * FROM study WHERE study_instance_uid = ?", uid)

    def series(self, uid: str = "1.1.1") -> dict[str, Any]:
        return self.row("SELECT * FROM series WHERE series_instance_uid = ?", uid)

    def routed(self) -> None:
        """What routing does when it closes every open series."""
        self.catalog.database.write(
            lambda connection: connection.execute("UPDATE series SET routing = 'routed' WHERE routing = 'open'")
        )

    def find(self, level: Level, *keys: Key, returns: tuple[str, ...] | None = None) -> list[tuple[str, ...]]:
        wanted = returns or (
            {
                Level.PATIENT: "PatientID",
                Level.STUDY: "StudyInstanceUID",
                Level.SERIES: "SeriesInstanceUID",
                Level.IMAGE: "SOPInstanceUID",
            }[level],
        )
        matches = self.catalog.index.find(Query(level=level, keys=keys, returns=wanted))
        return [tuple(match.attributes[keyword] for keyword in wanted) for match in matches]

    def found(self, level: Level, *keys: Key) -> set[str]:
        return {values[0] for values in self.find(level, *keys)}


def open_sqlite(folder: Path, clock: HandClock) -> Catalog:
    return open_catalog(folder, clock, StorageSettings(reserve_bytes=0, reserve_ratio=0.0))


BACK_ENDS: dict[str, Callable[[Path, HandClock], Catalog]] = {"sqlite": open_sqlite}


@pytest.fixture(params=sorted(BACK_ENDS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    clock = HandClock()
    catalog = BACK_ENDS[request.param](tmp_path / "data", clock)
    yield Bench(catalog=catalog, clock=clock)
    catalog.close()


def key(keyword: str, kind: MatchKind, *values: str) -> Key:
    return Key(keyword=keyword, kind=kind, values=values)


# --- one UID, several objects --------------------------------------------------------------------------------------


def test_the_same_bytes_again_change_nothing_but_when_they_came(bench: Bench) -> None:
    record = bench.record(SOPInstanceUID="1.5")
    assert bench.catalog.index.add_instance(record, KEEP, lambda first: False) is StoreOutcome.NEW
    before = (bench.study(), bench.series())
    bench.clock.seconds += 50
    for policy in ConflictPolicy:
        assert bench.catalog.index.add_instance(record, policy, lambda first: False) is StoreOutcome.DUPLICATE
    noted = {"again_s": 1000.0, "again_boot_id": "boot-1", "again_at": before[0]["last_received_at"]}
    assert (bench.study(), bench.series()) == (before[0] | noted, before[1])
    assert bench.catalog.index.variants("1.5") == ()


@pytest.mark.parametrize(
    ("policy", "same_pixels", "outcome", "served", "kinds"),
    [
        (KEEP, False, StoreOutcome.VARIANT, "first", ["variant"]),
        (KEEP, True, StoreOutcome.HEADER_CHANGED, "first", ["header-changed"]),
        (REPLACE, False, StoreOutcome.REPLACED, "second", ["replaced"]),
        (REFUSE, False, StoreOutcome.REFUSED, "first", []),
    ],
)
def test_other_content_under_a_known_uid_follows_the_policy(
    bench: Bench,
    policy: ConflictPolicy,
    same_pixels: bool,
    outcome: StoreOutcome,
    served: str,
    kinds: list[str],
) -> None:
    first = bench.record(SOPInstanceUID="1.5", ImageComments="first")
    second = bench.record(SOPInstanceUID="1.5", ImageComments="second")
    seen: list[StoredInstance] = []

    def same(known: StoredInstance) -> bool:
        seen.append(known)
        return same_pixels

    assert bench.catalog.index.add_instance(first, policy, same) is StoreOutcome.NEW
    assert bench.catalog.index.add_instance(second, policy, same) is outcome
    known = bench.catalog.index.instance("1.5")
    assert known is not None
    assert known.sha256 == {"first": first, "second": second}[served].file.sha256
    assert [variant.kind.value for variant in bench.catalog.index.variants("1.5")] == kinds
    for variant in bench.catalog.index.variants("1.5"):
        assert Path(variant.path).is_file()
    assert [instance.sha256 for instance in seen] == ([first.file.sha256] if policy is KEEP else [])
    assert bench.study()["instance_count"] == 1


def test_a_kept_variant_sent_again_is_a_duplicate(bench: Bench) -> None:
    bench.add(SOPInstanceUID="1.5", ImageComments="first")
    assert bench.add(SOPInstanceUID="1.5", ImageComments="second") is StoreOutcome.VARIANT
    assert bench.add(SOPInstanceUID="1.5", ImageComments="second") is StoreOutcome.DUPLICATE
    assert len(bench.catalog.index.variants("1.5")) == 1


def test_with_replace_the_last_one_sent_is_served_even_if_it_was_there_before(bench: Bench) -> None:
    first = bench.record(SOPInstanceUID="1.5", ImageComments="first")
    for record in (first, bench.record(SOPInstanceUID="1.5", ImageComments="second"), first):
        bench.catalog.index.add_instance(record, REPLACE, lambda known: False)
    known = bench.catalog.index.instance("1.5")
    assert known is not None and known.sha256 == first.file.sha256
    assert [variant.kind.value for variant in bench.catalog.index.variants("1.5")] == ["replaced"]


@pytest.mark.parametrize("policy", list(ConflictPolicy))
def test_another_transfer_syntax_is_kept_beside_the_first_whatever_the_policy(
    bench: Bench, policy: ConflictPolicy
) -> None:
    bench.add(policy, SOPInstanceUID="1.5")
    assert bench.add(policy, SOPInstanceUID="1.5", syntax=IMPLICIT) is StoreOutcome.OTHER_SYNTAX
    known = bench.catalog.index.instance("1.5")
    assert known is not None and known.transfer_syntax_uid == EXPLICIT
    assert [v.transfer_syntax_uid for v in bench.catalog.index.variants("1.5")] == [IMPLICIT]


def test_a_replaced_object_may_move_to_another_series_and_study(bench: Bench) -> None:
    bench.add(SOPInstanceUID="1.5")
    bench.add(REPLACE, SOPInstanceUID="1.5", StudyInstanceUID="2.2", SeriesInstanceUID="2.2.1", Modality="MR")
    assert bench.found(Level.STUDY) == {"2.2"}
    assert bench.find(Level.STUDY, returns=("ModalitiesInStudy", "NumberOfStudyRelatedInstances")) == [("MR", "1")]
    assert bench.study("1.1")["instance_count"] == 0
    assert bench.series("1.1.1")["routing"] == "none"


def test_a_row_never_points_at_a_file_that_is_gone(bench: Bench) -> None:
    record = bench.record()
    index = bench.catalog.index
    assert index.if_unreferenced(record.file.location, lambda: bench.catalog.archive.remove(record.file.location))
    with pytest.raises(StorageError):
        index.add_instance(record, KEEP, lambda first: False)
    kept = bench.record()
    index.add_instance(kept, KEEP, lambda first: False)
    called: list[str] = []
    assert not index.if_unreferenced(kept.file.location, lambda: called.append("removed"))
    assert called == []


def test_a_produced_instance_whose_uid_is_known_is_adopted_whatever_its_bytes(bench: Bench) -> None:
    first = bench.record(SOPInstanceUID="1.5", ImageComments="a", origin=Origin.PRODUCED)
    other = bench.record(SOPInstanceUID="1.5", ImageComments="b", origin=Origin.PRODUCED)
    index = bench.catalog.index
    assert index.add_instance(first, KEEP, lambda known: False) is StoreOutcome.NEW
    for policy in ConflictPolicy:
        assert index.add_instance(other, policy, lambda known: False) is StoreOutcome.DUPLICATE
    known = index.instance("1.5")
    assert known is not None and known.sha256 == first.file.sha256
    assert index.variants("1.5") == ()


# --- studies, revisions --------------------------------------------------------------------------------------------


def test_images_of_one_study_stay_in_one_revision_until_it_is_routed(bench: Bench) -> None:
    for number, series in enumerate(("1.1.1", "1.1.1", "1.1.2")):
        bench.clock.seconds += 1
        bench.add(SeriesInstanceUID=series, InstanceNumber=number)
    study = bench.study()
    assert (study["revision"], study["opened_boot_s"], study["last_boot_s"]) == (1, 1001.0, 1003.0)
    assert (study["series_count"], study["instance_count"]) == (2, 3)
    assert (bench.series()["routing"], bench.series()["received_seq"], bench.series()["image_count"]) == ("open", 2, 2)


def test_a_late_image_opens_the_next_revision_of_its_series(bench: Bench) -> None:
    bench.add(SeriesInstanceUID="1.1.1", association_id="assoc-1")
    bench.add(SeriesInstanceUID="1.1.2", association_id="assoc-1")
    bench.routed()
    bench.clock.seconds = 2000
    bench.add(SeriesInstanceUID="1.1.1", association_id="assoc-2")
    assert (bench.study()["revision"], bench.study()["opened_boot_s"]) == (2, 2000.0)
    assert bench.series("1.1.1")["routing"] == "open"
    assert bench.series("1.1.2")["routing"] == "routed"
    fed = bench.row("SELECT group_concat(association_id) AS ids FROM study_association")
    assert fed["ids"] == "assoc-2"
    bench.clock.seconds = 2001
    bench.add(SeriesInstanceUID="1.1.2", association_id="assoc-3")  # while another series is open: the same revision
    assert (bench.study()["revision"], bench.study()["opened_boot_s"]) == (2, 2000.0)


@pytest.mark.parametrize(
    ("attributes", "origin"),
    [
        ({"SOPClassUID": SR, "Modality": "SR", "PixelData": None}, Origin.RECEIVED),
        ({"SOPClassUID": SEG, "Modality": "SEG"}, Origin.RECEIVED),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1", "Modality": "DOC", "PixelData": None}, Origin.RECEIVED),
        ({}, Origin.PRODUCED),
        ({}, Origin.RETURNED),
    ],
)
def test_what_is_no_received_image_opens_nothing(bench: Bench, attributes: dict[str, Any], origin: Origin) -> None:
    bench.add()
    bench.routed()
    bench.clock.seconds = 2000
    assert bench.add(origin=origin, SeriesInstanceUID="1.1.9", **attributes) is StoreOutcome.NEW
    assert bench.study()["revision"] == 1
    assert bench.series("1.1.9")["routing"] == "none"
    assert bench.series("1.1.9")["image_count"] == 0
    assert bench.study()["last_boot_s"] == (2000.0 if origin is Origin.RECEIVED else 1000.0)


@pytest.mark.parametrize("policy", [KEEP, REPLACE])
def test_our_own_result_coming_back_altered_opens_nothing(bench: Bench, policy: ConflictPolicy) -> None:
    bench.add()
    bench.add(SOPInstanceUID="1.7", SeriesInstanceUID="1.1.7", origin=Origin.PRODUCED)
    bench.routed()
    bench.add(policy, SOPInstanceUID="1.7", SeriesInstanceUID="1.1.7", PatientName="Altered")
    assert bench.study()["revision"] == 1
    assert bench.series("1.1.7")["routing"] == "none"
    known = bench.catalog.index.instance("1.7")
    assert known is not None
    assert known.origin is (Origin.PRODUCED if policy is KEEP else Origin.RETURNED)


def test_a_replaced_image_of_a_routed_series_opens_the_next_revision(bench: Bench) -> None:
    bench.add(REPLACE, SOPInstanceUID="1.5", ImageComments="a")
    bench.routed()
    bench.add(REPLACE, SOPInstanceUID="1.5", ImageComments="b")
    assert bench.study()["revision"] == 2
    assert (bench.series()["routing"], bench.series()["received_seq"], bench.series()["image_count"]) == ("open", 2, 1)


def test_an_image_lost_before_its_series_was_routed_opens_it_when_it_comes_again(bench: Bench) -> None:
    record = bench.record()
    bench.catalog.index.add_instance(record, KEEP, lambda first: True)
    (known,) = bench.catalog.index.files()
    bench.catalog.index.mark_file(known, present=False)
    assert bench.series()["routing"] == "none"
    bench.clock.seconds = 2000
    again = replace(record, received_boot=bench.clock.boot())
    assert bench.catalog.index.add_instance(again, KEEP, lambda first: True) is StoreOutcome.DUPLICATE
    assert bench.series()["routing"] == "open"
    assert (bench.study()["opened_boot_s"], bench.study()["last_boot_s"]) == (2000.0, 2000.0)


def test_one_series_uid_in_two_studies_stays_two_series(bench: Bench) -> None:
    bench.add(StudyInstanceUID="1.1", SeriesInstanceUID="9.9")
    bench.add(StudyInstanceUID="2.2", SeriesInstanceUID="9.9")
    returns = ("StudyInstanceUID", "SeriesInstanceUID", "NumberOfSeriesRelatedInstances")
    assert bench.find(Level.SERIES, returns=returns) == [("1.1", "9.9", "1"), ("2.2", "9.9", "1")]


# --- patients ------------------------------------------------------------------------------------------------------


def test_a_patient_is_id_and_issuer(bench: Bench) -> None:
    bench.add(StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1", PatientID="7", IssuerOfPatientID="A")
    bench.add(StudyInstanceUID="2.2", SeriesInstanceUID="2.2.1", PatientID="7", IssuerOfPatientID="A")
    bench.add(StudyInstanceUID="3.3", SeriesInstanceUID="3.3.1", PatientID="7", IssuerOfPatientID="B")
    returns = ("PatientID", "IssuerOfPatientID", "NumberOfPatientRelatedStudies")
    assert bench.find(Level.PATIENT, returns=returns) == [("7", "A", "2"), ("7", "B", "1")]


def test_an_empty_patient_id_never_joins_two_studies(bench: Bench) -> None:
    bench.add(StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1", PatientID="", PatientName="A")
    bench.add(StudyInstanceUID="2.2", SeriesInstanceUID="2.2.1", PatientID=None, PatientName="A")
    bench.add(StudyInstanceUID="2.2", SeriesInstanceUID="2.2.1", PatientID=None, PatientName="A")
    returns = ("PatientID", "NumberOfPatientRelatedInstances")
    assert sorted(bench.find(Level.PATIENT, returns=returns)) == [("", "1"), ("", "2")]


@pytest.mark.parametrize(
    ("second", "conflict"),
    [
        ({"PatientID": "P1"}, 0),
        ({"PatientID": "P1", "IssuerOfPatientID": "HOSPITAL"}, 0),  # the first left it out
        ({"PatientID": "P2"}, 1),
        ({"PatientID": ""}, 1),
    ],
)
def test_a_study_under_two_identities_is_flagged_and_stays_one_under_the_first(
    bench: Bench, second: dict[str, str], conflict: int
) -> None:
    bench.add(PatientSex="F")
    bench.add(SeriesInstanceUID="1.1.2", PatientAge="050Y", PatientBirthDate="19700101", **second)
    assert bench.study()["identity_conflict"] == conflict
    assert bench.find(Level.STUDY, returns=("PatientID", "NumberOfStudyRelatedInstances")) == [("P1", "2")]
    assert len(bench.find(Level.PATIENT)) == 1
    if conflict:  # nothing of the second person is told of the first
        assert bench.find(Level.STUDY, returns=("PatientBirthDate",)) == [("",)]


def test_two_issuers_in_one_study_are_two_identities(bench: Bench) -> None:
    bench.add(IssuerOfPatientID="A")
    bench.add(IssuerOfPatientID="B")
    assert bench.study()["identity_conflict"] == 1


def test_a_variant_under_another_identity_flags_its_study(bench: Bench) -> None:
    bench.add(SOPInstanceUID="1.5")
    assert bench.add(SOPInstanceUID="1.5", PatientID="OTHER") is StoreOutcome.VARIANT
    assert bench.study()["identity_conflict"] == 1


def test_a_release_does_not_hold_for_an_identity_that_comes_later(bench: Bench) -> None:
    bench.add(SOPInstanceUID="1.5")
    bench.add(PatientID="P2")
    bench.catalog.queue.release_study("1.1")
    bench.add(PatientID="P2")
    bench.add(PatientID="P2", IssuerOfPatientID="HOSPITAL")  # the first left it out
    bench.add()
    assert bench.study()["released"] == 1
    bench.add(PatientID="P3")
    assert (bench.study()["identity_conflict"], bench.study()["released"]) == (1, 0)
    bench.catalog.queue.release_study("1.1")
    assert bench.add(SOPInstanceUID="1.5", PatientID="P4") is StoreOutcome.VARIANT
    assert bench.study()["released"] == 0


def test_gaps_are_filled_by_later_instances_and_first_values_stay(bench: Bench) -> None:
    bench.add(StudyDescription=None, StudyDate="20240101")
    bench.add(StudyDescription="Abdomen", StudyDate="20250101", PatientSex="F", SeriesDescription="axial")
    returns = ("StudyDescription", "StudyDate", "PatientSex")
    assert bench.find(Level.STUDY, returns=returns) == [("Abdomen", "20240101", "F")]
    assert bench.find(Level.PATIENT, returns=("PatientSex",)) == [("F",)]
    assert bench.find(Level.SERIES, returns=("SeriesDescription",)) == [("axial",)]


# --- find ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(BACK_ENDS))
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Three studies of two patients, to be read only."""
    clock = HandClock()
    catalog = BACK_ENDS[request.param](tmp_path_factory.mktemp("full") / "data", clock)
    bench = Bench(catalog=catalog, clock=clock)
    smith = {"PatientID": "A*1", "PatientName": "Smith^John", "PatientBirthDate": "19500102", "PatientSex": "M"}
    yamada = {"PatientID": "B_2", "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう", "PatientSex": "O"}
    one = {"StudyInstanceUID": "1.1", "StudyDate": "20240101", "StudyTime": "1015", "AccessionNumber": "ACC[1]"} | smith
    two = {"StudyInstanceUID": "2.2", "StudyDate": "20240102", "StudyTime": "235959.5", "AccessionNumber": "acc1"}
    three = {"StudyInstanceUID": "3.3", "StudyDate": "20250101", "StudyTime": "08", "StudyDescription": "50% off_x"}
    bench.add(**one, SeriesInstanceUID="1.1.1", SOPInstanceUID="1.1.1.1", InstanceNumber=2, SeriesNumber=1)
    bench.add(**one, SeriesInstanceUID="1.1.1", SOPInstanceUID="1.1.1.2", InstanceNumber=1, ImageType=["ORIGINAL", "M"])
    bench.add(
        **one, SeriesInstanceUID="1.1.2", SOPInstanceUID="1.1.2.1", Modality="SR", SOPClassUID=SR, PixelData=None,
        OperatorsName=["Müller^Uwe", "Öz^Ali"], SeriesNumber=12,
    )  # fmt: skip
    two |= {"Modality": "MR", "BodyPartExamined": "HEAD"} | smith
    three |= {"ReferringPhysicianName": "Größe^Éva"} | yamada
    bench.add(**two, SeriesInstanceUID="2.2.1", SOPInstanceUID="2.2.1.1")
    bench.add(**three, SeriesInstanceUID="3.3.1", SOPInstanceUID="3.3.1.1")
    yield bench
    catalog.close()


STUDY_MATRIX: list[tuple[str, MatchKind, tuple[str, ...], set[str]]] = [
    ("StudyInstanceUID", MatchKind.SINGLE, ("2.2",), {"2.2"}),
    ("StudyInstanceUID", MatchKind.UID_LIST, ("1.1", "3.3", "9.9"), {"1.1", "3.3"}),
    ("StudyInstanceUID", MatchKind.UNIVERSAL, (), {"1.1", "2.2", "3.3"}),
    ("PatientID", MatchKind.SINGLE, ("A*1",), {"1.1", "2.2"}),
    ("PatientID", MatchKind.WILDCARD, ("A?1",), {"1.1", "2.2"}),
    ("PatientID", MatchKind.WILDCARD, ("a*",), set()),  # case counts outside names
    ("PatientID", MatchKind.WILDCARD, ("*_2",), {"3.3"}),
    ("PatientID", MatchKind.SINGLE, ("' OR 1=1 --",), set()),
    ("AccessionNumber", MatchKind.SINGLE, ("ACC[1]",), {"1.1"}),
    ("AccessionNumber", MatchKind.WILDCARD, ("ACC[1*",), {"1.1"}),  # [ is no wildcard
    ("AccessionNumber", MatchKind.WILDCARD, ("?CC[?]",), {"1.1"}),
    ("AccessionNumber", MatchKind.WILDCARD, ("acc*",), {"2.2"}),
    ("AccessionNumber", MatchKind.WILDCARD, ("*",), {"1.1", "2.2", "3.3"}),  # universal: also where it is empty
    ("StudyDescription", MatchKind.WILDCARD, ("50% off_*",), {"3.3"}),
    ("StudyDescription", MatchKind.WILDCARD, ("50_*",), set()),  # nor are % and _
    ("StudyDescription", MatchKind.SINGLE, ("50% off_x",), {"3.3"}),
    ("StudyDate", MatchKind.SINGLE, ("20240101",), {"1.1"}),
    ("StudyDate", MatchKind.RANGE, ("20240102", "20250101"), {"2.2", "3.3"}),
    ("StudyDate", MatchKind.RANGE, ("20240102", ""), {"2.2", "3.3"}),
    ("StudyDate", MatchKind.RANGE, ("", "20240101"), {"1.1"}),
    ("StudyTime", MatchKind.SINGLE, ("101500",), {"1.1"}),
    ("StudyTime", MatchKind.RANGE, ("101500", "101500"), {"1.1"}),
    ("StudyTime", MatchKind.RANGE, ("1016", ""), {"2.2"}),
    ("StudyTime", MatchKind.RANGE, ("", "10"), {"1.1", "3.3"}),  # up to 10:59:59.999999
    ("StudyTime", MatchKind.RANGE, ("", "1014"), {"3.3"}),
    ("StudyDate", MatchKind.DATETIME_RANGE, ("20240101101600.000000", "20250101080000.000000"), {"2.2", "3.3"}),
    ("StudyDate", MatchKind.DATETIME_RANGE, ("20240101101500.000000", "20240102235959.400000"), {"1.1"}),
    ("StudyDate", MatchKind.DATETIME_RANGE, ("", "20240101235959.999999"), {"1.1"}),
    ("PatientName", MatchKind.PERSON_NAME, ("SMITH^JOHN",), {"1.1", "2.2"}),
    ("PatientName", MatchKind.PERSON_NAME, ("smith",), set()),  # single value matching is of the whole name
    ("PatientName", MatchKind.PERSON_NAME, ("smi*",), {"1.1", "2.2"}),
    ("PatientName", MatchKind.PERSON_NAME, ("*^j?hn^^^",), {"1.1", "2.2"}),
    ("PatientName", MatchKind.PERSON_NAME, ("yamada*",), {"3.3"}),
    ("PatientName", MatchKind.PERSON_NAME, ("山田^太郎",), {"3.3"}),
    ("PatientName", MatchKind.PERSON_NAME, ("山田*",), {"3.3"}),
    ("PatientName", MatchKind.PERSON_NAME, ("やまだ*",), {"3.3"}),
    ("PatientName", MatchKind.PERSON_NAME, ("やまた*",), set()),  # た is not だ
    ("PatientName", MatchKind.PERSON_NAME, ("Yamada*=山田*",), {"3.3"}),
    ("PatientName", MatchKind.PERSON_NAME, ("Yamada*=鈴木*",), set()),
    ("PatientName", MatchKind.PERSON_NAME, ("*",), {"1.1", "2.2", "3.3"}),
    ("ReferringPhysicianName", MatchKind.PERSON_NAME, ("GROSSE^eva",), {"3.3"}),
    ("ReferringPhysicianName", MatchKind.PERSON_NAME, ("große*",), {"3.3"}),
    ("PatientSex", MatchKind.SINGLE, ("O",), {"3.3"}),
    ("ModalitiesInStudy", MatchKind.MODALITIES, ("SR",), {"1.1"}),
    ("ModalitiesInStudy", MatchKind.MODALITIES, ("SR", "MR"), {"1.1", "2.2"}),
    ("ModalitiesInStudy", MatchKind.MODALITIES, ("?R",), {"1.1", "2.2"}),
    ("ModalitiesInStudy", MatchKind.MODALITIES, ("T",), set()),
    ("ModalitiesInStudy", MatchKind.SINGLE, ("CT",), {"1.1", "3.3"}),
    ("SOPClassesInStudy", MatchKind.UID_LIST, (SR, SEG), {"1.1"}),
    ("NumberOfStudyRelatedInstances", MatchKind.SINGLE, ("3",), {"1.1"}),
    ("NumberOfPatientRelatedStudies", MatchKind.SINGLE, ("2",), {"1.1", "2.2"}),
]


@pytest.mark.parametrize(("keyword", "kind", "values", "expected"), STUDY_MATRIX)
def test_studies_are_matched(
    full: Bench, keyword: str, kind: MatchKind, values: tuple[str, ...], expected: set[str]
) -> None:
    assert full.found(Level.STUDY, key(keyword, kind, *values)) == expected


LEVEL_MATRIX: list[tuple[Level, str, MatchKind, tuple[str, ...], set[str]]] = [
    (Level.PATIENT, "PatientName", MatchKind.PERSON_NAME, ("*JOHN",), {"A*1"}),
    (Level.PATIENT, "PatientName", MatchKind.PERSON_NAME, ("山田*",), {"B_2"}),
    (Level.PATIENT, "PatientBirthDate", MatchKind.RANGE, ("", "19501231"), {"A*1"}),
    (Level.PATIENT, "PatientSex", MatchKind.SINGLE, ("M",), {"A*1"}),
    (Level.PATIENT, "NumberOfPatientRelatedStudies", MatchKind.SINGLE, ("1",), {"B_2"}),
    (Level.SERIES, "Modality", MatchKind.SINGLE, ("CT",), {"1.1.1", "3.3.1"}),
    (Level.SERIES, "StudyInstanceUID", MatchKind.SINGLE, ("1.1",), {"1.1.1", "1.1.2"}),
    (Level.SERIES, "SeriesInstanceUID", MatchKind.UID_LIST, ("1.1.2", "3.3.1"), {"1.1.2", "3.3.1"}),
    (Level.SERIES, "BodyPartExamined", MatchKind.WILDCARD, ("H*",), {"2.2.1"}),
    (Level.SERIES, "SeriesNumber", MatchKind.SINGLE, ("01",), {"1.1.1"}),
    (Level.SERIES, "OperatorsName", MatchKind.PERSON_NAME, ("muller*",), {"1.1.2"}),
    (Level.SERIES, "OperatorsName", MatchKind.PERSON_NAME, ("oz^ali",), {"1.1.2"}),  # any of the values
    (Level.SERIES, "PatientName", MatchKind.PERSON_NAME, ("smith*",), {"1.1.1", "1.1.2", "2.2.1"}),  # relational
    (Level.SERIES, "StudyDate", MatchKind.RANGE, ("20240102", ""), {"2.2.1", "3.3.1"}),
    (Level.IMAGE, "SOPInstanceUID", MatchKind.SINGLE, ("1.1.1.2",), {"1.1.1.2"}),
    (Level.IMAGE, "SeriesInstanceUID", MatchKind.SINGLE, ("1.1.1",), {"1.1.1.1", "1.1.1.2"}),
    (Level.IMAGE, "InstanceNumber", MatchKind.SINGLE, ("2",), {"1.1.1.1"}),
    (Level.IMAGE, "ImageType", MatchKind.SINGLE, ("M",), {"1.1.1.2"}),
    (Level.IMAGE, "ImageType", MatchKind.WILDCARD, ("ORIG*",), {"1.1.1.2"}),
    (Level.IMAGE, "ImageType", MatchKind.WILDCARD, ("O*M",), set()),  # no match across values
    (Level.IMAGE, "SOPClassUID", MatchKind.SINGLE, (SR,), {"1.1.2.1"}),
    (Level.IMAGE, "Modality", MatchKind.SINGLE, ("MR",), {"2.2.1.1"}),
    (Level.IMAGE, "PatientID", MatchKind.SINGLE, ("B_2",), {"3.3.1.1"}),
]


@pytest.mark.parametrize(("level", "keyword", "kind", "values", "expected"), LEVEL_MATRIX)
def test_every_level_is_matched(
    full: Bench, level: Level, keyword: str, kind: MatchKind, values: tuple[str, ...], expected: set[str]
) -> None:
    assert full.found(level, key(keyword, kind, *values)) == expected


def test_all_keys_must_match(full: Bench) -> None:
    smith = key("PatientName", MatchKind.PERSON_NAME, "smith*")
    assert full.found(Level.STUDY, smith, key("ModalitiesInStudy", MatchKind.MODALITIES, "MR")) == {"2.2"}


@pytest.mark.parametrize("level", list(Level))
def test_every_supported_attribute_can_be_matched_and_returned(full: Bench, level: Level) -> None:
    supported = full.catalog.index.supported(level)
    rows = full.find(level, returns=tuple(sorted(supported)))
    assert rows and all(isinstance(value, str) for row in rows for value in row)
    for keyword in sorted(supported):
        for kind in (MatchKind.SINGLE, MatchKind.WILDCARD, MatchKind.UID_LIST):
            full.find(level, key(keyword, kind, "no-such-value"))


def test_images_carry_the_attributes_of_their_study_and_patient(full: Bench) -> None:
    returns = ("PatientName", "StudyDate", "Modality", "InstanceNumber", "NumberOfStudyRelatedSeries")
    found = full.find(Level.IMAGE, key("SOPInstanceUID", MatchKind.SINGLE, "1.1.1.1"), returns=returns)
    assert found == [("Smith^John", "20240101", "CT", "2", "2")]


@pytest.mark.parametrize("level", list(Level))
def test_an_attribute_the_index_does_not_keep_is_refused(full: Bench, level: Level) -> None:
    with pytest.raises(InvalidIdentifier):
        full.find(level, key("ReferencedSOPInstanceUID", MatchKind.SINGLE, "1"))
    with pytest.raises(InvalidIdentifier):
        full.find(level, key("PatientID; DROP TABLE study", MatchKind.SINGLE, "1"))
    with pytest.raises(InvalidIdentifier):
        full.find(Level.PATIENT, returns=("Modality",))


def test_a_pattern_longer_than_any_value_is_refused(full: Bench) -> None:
    with pytest.raises(InvalidIdentifier):
        full.find(Level.STUDY, key("StudyDescription", MatchKind.WILDCARD, "*a" * 5000))


def test_old_forms_of_dates_and_times_are_matched_as_todays(bench: Bench) -> None:
    bench.add(StudyDate="2024.01.05", StudyTime="10:15:00")
    assert bench.found(Level.STUDY, key("StudyDate", MatchKind.RANGE, "20240101", "20240131")) == {"1.1"}
    assert bench.found(Level.STUDY, key("StudyTime", MatchKind.SINGLE, "1015")) == {"1.1"}


def test_paging_sees_every_row_once_while_others_write(bench: Bench) -> None:
    record = bench.record()
    header = record.header

    def copies(numbers: range) -> None:
        def write(connection: Any) -> None:
            for number in numbers:
                one = replace(header, sop_instance_uid=f"5.{number}", series_instance_uid=f"6.{number % 7}")
                insert_instance(connection, replace(record, header=one), KEEP)

        bench.catalog.database.write(write)

    copies(range(1300))
    seen: list[str] = []
    for match in bench.catalog.index.find(Query(level=Level.IMAGE, keys=(), returns=("SOPInstanceUID",))):
        seen.append(match.attributes["SOPInstanceUID"])
        if len(seen) in (100, 600, 1100):
            copies(range(2000 + len(seen), 2050 + len(seen)))
    assert len(seen) == len(set(seen))
    assert {f"5.{number}" for number in range(1300)} <= set(seen)
    retrieved = [i.sop_instance_uid for i in bench.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.1"]})]
    assert len(retrieved) == len(set(retrieved)) == 1450
    with bench.catalog.database.read() as connection:
        assert not connection.in_transaction


# --- retrieve ------------------------------------------------------------------------------------------------------


def test_instances_come_by_series_and_instance_number(full: Bench) -> None:
    found = [i.sop_instance_uid for i in full.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.1"]})]
    assert found == ["1.1.1.2", "1.1.1.1", "1.1.2.1"]


@pytest.mark.parametrize(
    ("uids", "count"),
    [
        ({"PatientID": ["A*1"]}, 4),
        ({"PatientID": ["A*1"], "StudyInstanceUID": ["2.2"]}, 1),
        ({"StudyInstanceUID": ["1.1", "2.2"]}, 4),
        ({"StudyInstanceUID": ["1.1"], "SeriesInstanceUID": ["1.1.1", "1.1.2"]}, 3),
        ({"SOPInstanceUID": ["1.1.1.1", "3.3.1.1", "0"]}, 2),
        ({"StudyInstanceUID": ["1.1"], "SeriesInstanceUID": ["3.3.1"]}, 0),
    ],
)
def test_instances_are_found_by_unique_keys(full: Bench, uids: dict[str, list[str]], count: int) -> None:
    found = list(full.catalog.index.instances(Level.STUDY, uids))
    assert len(found) == count
    for instance in found:
        raw = Path(instance.path).read_bytes()
        assert len(raw) == instance.data_set_offset + instance.data_set_length


@pytest.mark.parametrize("uids", [{}, {"StudyInstanceUID": []}, {"StudyInstanceUID": [""]}, {"PatientName": ["x"]}])
def test_a_retrieve_without_a_unique_key_is_refused(full: Bench, uids: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidIdentifier):
        list(full.catalog.index.instances(Level.STUDY, uids))


# --- associations --------------------------------------------------------------------------------------------------


def source(association_id: str) -> Source:
    return Source(calling_ae_title="A", called_ae_title="B", address="127.0.0.1", association_id=association_id)


def test_the_first_end_of_an_association_counts(bench: Bench) -> None:
    index = bench.catalog.index
    index.open_association("x", source("x"))
    bench.clock.seconds = 1010
    index.touch_associations(["x", "unknown"])
    row = bench.row("SELECT * FROM association")
    assert (row["ended"], row["last_boot_s"], row["store_failed"]) == ("open", 1010.0, 0)
    index.mark_store_failed("x")
    bench.clock.seconds = 1020
    index.end_association("x", AssociationEnd.ABORTED)
    bench.clock.seconds = 1030
    index.end_association("x", AssociationEnd.RELEASED)
    index.touch_associations(["x"])
    row = bench.row("SELECT * FROM association")
    assert (row["ended"], row["last_boot_s"], row["store_failed"]) == ("aborted", 1020.0, 1)


def test_associations_of_dead_processes_are_closed_and_living_ones_left(bench: Bench, tmp_path: Path) -> None:
    bench.catalog.index.open_association("mine", source("mine"))
    other = open_sqlite(tmp_path / "data", bench.clock)
    other.index.open_association("theirs", source("theirs"))
    other.close()
    assert bench.catalog.index.close_dead_epochs({bench.catalog.epoch}) == 1
    assert bench.row("SELECT ended FROM association WHERE association_id = 'theirs'") == {"ended": "dead"}
    assert bench.row("SELECT ended FROM association WHERE association_id = 'mine'") == {"ended": "open"}


def test_old_associations_that_feed_nothing_are_forgotten(bench: Bench) -> None:
    index = bench.catalog.index
    for association_id in ("echo", "assoc-1"):
        index.open_association(association_id, source(association_id))
        index.end_association(association_id, AssociationEnd.RELEASED)
    bench.add(association_id="assoc-1")
    bench.clock.seconds += 25 * 3600
    index.close_dead_epochs(set())
    assert bench.row("SELECT group_concat(association_id) AS ids FROM association") == {"ids": "assoc-1"}
