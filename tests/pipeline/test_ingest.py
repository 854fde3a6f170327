"""The door: what is acknowledged, what is refused and how, and what is left behind."""

import errno
import io
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest
from blake3 import blake3
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import generate_uid

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import IdentityMismatch, InvalidInstance, StorageError
from dicom_node.headers import scan
from dicom_node.model import (
    ConflictPolicy,
    InstanceRecord,
    Level,
    Origin,
    Source,
    StoredInstance,
    StoreOutcome,
    StoreResult,
)
from dicom_node.pipeline.ingest import Ingest
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.fs import RealFileSystem

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
CT = "1.2.840.10008.5.1.4.1.1.2"
CANARY = "Canary^Patient"
SENDER = Source(calling_ae_title="SCANNER", called_ae_title="NODE", address="127.0.0.1", association_id="assoc-1")


class WatchedFileSystem(RealFileSystem):
    """Records the steps; fails the n-th call of those named in `countdown`."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.fail_in = -1
        self.code = errno.ENOSPC

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name not in ("open_folder", "open_tmpfile", "write", "fsync", "fsync_dir", "link", "unlink", "statvfs"):
            return real

        def call(*args: Any) -> Any:
            self.steps.append(name)
            if self.fail_in == 0:
                self.fail_in = -1
                raise OSError(self.code, os.strerror(self.code))
            self.fail_in -= 1
            return real(*args)

        return call


@dataclass
class Door:
    """An ingest over a real catalog."""

    catalog: Catalog
    ingest: Ingest
    fs: WatchedFileSystem
    stored: list[tuple[InstanceRecord, StoreOutcome]] = field(default_factory=list)
    policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST

    def send(
        self, body: bytes, uid: str, *, sop_class: str = CT, syntax: str = EXPLICIT, piece: int = 1000
    ) -> StoreResult:
        pieces = [body[start : start + piece] for start in range(0, len(body), piece)]
        return self.ingest.accept(
            sop_class_uid=sop_class,
            sop_instance_uid=uid,
            transfer_syntax_uid=syntax,
            fragments=iter(pieces),
            source=SENDER,
        )

    def files(self) -> list[str]:
        return list(self.catalog.archive.locations())

    def kept(self, uid: str) -> bytes:
        instance = self.catalog.index.instance(uid)
        assert instance is not None
        return data_set_bytes(instance)


def data_set_bytes(instance: StoredInstance) -> bytes:
    raw = Path(instance.path).read_bytes()
    body = raw[instance.data_set_offset :]
    assert len(body) == instance.data_set_length
    assert "blake3:" + blake3(body).hexdigest() == instance.sha256
    return body


def image(*, implicit: bool = False, **attributes: Any) -> tuple[str, bytes]:
    """(SOP Instance UID, data set bytes) of a small CT image."""
    ds = pydicom.Dataset()
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": "1.2.826.1",
        "SeriesInstanceUID": "1.2.826.1.1",
        "PatientID": "P1",
        "PatientName": CANARY,
        "Modality": "CT",
        "PixelData": b"\x01\x02" * 2000,
    } | attributes
    for keyword, value in values.items():
        if value is not None:
            setattr(ds, keyword, value)
    if "PixelData" in ds:
        ds["PixelData"].VR = "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, implicit_vr=implicit, little_endian=True, force_encoding=True)
    return str(values["SOPInstanceUID"]), out.getvalue()


def open_door(folder: Path, **changes: Any) -> Door:
    steps: list[str] = []
    fs = WatchedFileSystem(steps)
    storage = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)
    catalog = open_catalog(folder, SystemClock(), changes.pop("storage", storage), fs=fs)
    door: Door
    options: dict[str, Any] = {
        "conflict_policy_for": lambda source: door.policy,
        "origin_for": lambda source: Origin.RECEIVED,
        "max_object_bytes": 1 << 30,
        "max_inflated_header_bytes": 1 << 20,
        "clock": SystemClock(),
        "on_stored": lambda record, outcome: door.stored.append((record, outcome)),
    }
    ingest = Ingest(catalog.archive, catalog.index, **(options | changes))
    door = Door(catalog=catalog, ingest=ingest, fs=fs)
    return door


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    opened = open_door(tmp_path / "data")
    yield opened
    opened.catalog.close()


# --- what is acknowledged ------------------------------------------------------------------------------------------


def test_an_accepted_object_is_kept_byte_for_byte_and_found(door: Door) -> None:
    uid, body = image()
    result = door.send(body, uid)
    assert (result.status, result.outcome) == (0x0000, StoreOutcome.NEW)
    assert door.kept(uid) == body
    assert [outcome for _, outcome in door.stored] == [StoreOutcome.NEW]


def test_file_then_name_then_folder_then_row(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    real = door.catalog.index.add_instance

    def add(*args: Any) -> StoreOutcome:
        door.fs.steps.append("row begins")
        outcome = real(*args)
        door.fs.steps.append("row committed")
        return outcome

    monkeypatch.setattr(door.catalog.index, "add_instance", add)
    door.fs.steps.clear()
    uid, body = image()
    assert door.send(body, uid).status == 0x0000
    steps = [step for step in door.fs.steps if step not in ("open_folder", "open_tmpfile", "statvfs")]
    assert steps == ["write", "fsync", "link", "fsync_dir", "row begins", "row committed"]


@pytest.mark.filterwarnings("ignore")
def test_every_storable_corpus_file_is_kept_byte_for_byte(door: Door, corpus: Path) -> None:
    accepted = 0
    for path in sorted(corpus.rglob("*")):
        if not path.is_file() or path.suffix in (".csv", ".md", ".txt", ".py", ".raw", ".pcap"):
            continue
        with open(path, "rb") as file:
            try:
                read_preamble(file, False)
            except InvalidDicomError:
                continue
            meta = _read_file_meta_info(file)
            body = file.read()
        syntax = str(meta.get("TransferSyntaxUID", EXPLICIT))
        try:
            header = scan(memoryview(body), syntax, max_inflated_header_bytes=1 << 20)
            sop_class, uid = header.sop_class_uid, header.sop_instance_uid
        except InvalidInstance:  # not storable: the door must say so too
            sop_class, uid = CT, "1.2.3"
        result = door.send(body, uid, sop_class=sop_class, syntax=syntax, piece=16_384)
        assert result.status in ((0xC000,) if uid == "1.2.3" else (0x0000, 0xB000)), path.name
        accepted += result.status != 0xC000
        if result.outcome is StoreOutcome.NEW:
            assert door.kept(uid) == body, path.name
        elif result.status in (0x0000, 0xB000):
            kept = [door.kept(uid)]
            for variant in door.catalog.index.variants(uid):
                kept.append(Path(variant.path).read_bytes()[variant.data_set_offset :])
            assert body in kept, path.name
    assert accepted > 440


@pytest.mark.parametrize(
    ("policy", "change", "status", "outcome", "served", "files"),
    [
        (ConflictPolicy.KEEP_FIRST, "none", 0x0000, StoreOutcome.DUPLICATE, "first", 1),
        (ConflictPolicy.KEEP_FIRST, "pixels", 0x0000, StoreOutcome.VARIANT, "first", 2),
        (ConflictPolicy.KEEP_FIRST, "header", 0x0000, StoreOutcome.HEADER_CHANGED, "first", 2),
        (ConflictPolicy.KEEP_FIRST, "syntax", 0xB000, StoreOutcome.OTHER_SYNTAX, "first", 2),
        (ConflictPolicy.REPLACE, "pixels", 0x0000, StoreOutcome.REPLACED, "second", 2),
        (ConflictPolicy.REFUSE, "pixels", 0xC409, StoreOutcome.REFUSED, "first", 1),
        (ConflictPolicy.REFUSE, "none", 0x0000, StoreOutcome.DUPLICATE, "first", 1),
        (ConflictPolicy.REFUSE, "syntax", 0xB000, StoreOutcome.OTHER_SYNTAX, "first", 2),
    ],
)
def test_a_known_uid_again(
    door: Door,
    policy: ConflictPolicy,
    change: str,
    status: int,
    outcome: StoreOutcome,
    served: str,
    files: int,
) -> None:
    uid, first = image()
    changes: dict[str, dict[str, Any]] = {
        "none": {},
        "pixels": {"PixelData": b"\x09\x02" * 2000},
        "header": {"PatientName": "Corrected^Name^Longer"},
        "syntax": {"implicit": True},
    }
    _, second = image(SOPInstanceUID=uid, **changes[change])
    door.policy = policy
    assert door.send(first, uid).status == 0x0000
    result = door.send(second, uid, syntax=IMPLICIT if change == "syntax" else EXPLICIT)
    assert (result.status, result.outcome) == (status, outcome)
    assert door.kept(uid) == {"first": first, "second": second}[served]
    assert len(door.files()) == files
    if files == 2:  # nothing that was acknowledged is gone
        kept = [Path(door.catalog.archive.path(location)).read_bytes() for location in door.files()]
        assert any(raw.endswith(first) for raw in kept) and any(raw.endswith(second) for raw in kept)


def test_a_deflated_object_is_kept_as_it_came(door: Door) -> None:
    uid, body = image()
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(body) + packer.flush()
    assert door.send(packed, uid, syntax=DEFLATED).status == 0x0000
    assert door.kept(uid) == packed


def test_many_senders_at_once_store_everything_once(door: Door) -> None:
    images = [image() for _ in range(40)]
    answers: list[StoreResult] = []

    def sender(seed: int) -> None:
        mine = images[:]
        random.Random(seed).shuffle(mine)
        answers.extend(door.send(body, uid) for uid, body in mine)

    threads = [threading.Thread(target=sender, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(answers) == 160
    assert {answer.status for answer in answers} == {0x0000}
    assert sum(answer.outcome is StoreOutcome.NEW for answer in answers) == 40
    assert len(door.files()) == 40
    for uid, body in images:
        assert door.kept(uid) == body


# --- what is refused -----------------------------------------------------------------------------------------------


def bad_objects() -> dict[str, tuple[int, str, dict[str, Any], Callable[[bytes], bytes]]]:
    same = lambda body: body  # noqa: E731
    return {
        "another instance": (0xA900, "1.2.3", {}, same),
        "another class": (0xA900, "", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, same),
        "no study": (0xC000, "", {"StudyInstanceUID": None}, same),
        "no series": (0xC000, "", {"SeriesInstanceUID": None}, same),
        "a study UID that is a path": (0xC000, "", {"StudyInstanceUID": "../../etc"}, same),
        "cut short": (0xC000, "", {}, lambda body: body[:-3]),
        "noise": (0xC000, "", {}, lambda body: random.Random(1).randbytes(5000)),
        "nothing": (0xC000, "", {}, lambda body: b""),
        "a request UID that is a path": (0xC000, "../../../tmp/x", {}, same),
        "an empty request UID": (0xC000, " ", {}, same),
    }


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("name", sorted(bad_objects()))
def test_what_is_wrong_is_refused_read_to_its_end_and_leaves_nothing(door: Door, name: str) -> None:
    status, requested, attributes, change = bad_objects()[name]
    uid, body = image(**attributes)
    body = change(body)
    read = 0

    def fragments() -> Iterator[bytes]:
        nonlocal read
        for start in range(0, len(body), 512):
            read += len(body[start : start + 512])
            yield body[start : start + 512]

    result = door.ingest.accept(
        sop_class_uid=CT,
        sop_instance_uid=requested or uid,
        transfer_syntax_uid=EXPLICIT,
        fragments=fragments(),
        source=SENDER,
    )
    assert result.status == status
    assert result.outcome is None
    assert 0 < len(result.comment) <= 64
    assert read == len(body)
    assert door.files() == []
    assert door.catalog.index.instance(uid) is None
    good_uid, good = image()
    assert door.send(good, good_uid).status == 0x0000


def test_an_object_above_the_cap_is_refused_without_filling_the_disk(tmp_path: Path) -> None:
    door = open_door(tmp_path / "data", max_object_bytes=100_000)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"\0" * 10_000

    door.fs.steps.clear()
    result = door.ingest.accept(
        sop_class_uid=CT, sop_instance_uid="1.2", transfer_syntax_uid=EXPLICIT, fragments=endless(), source=SENDER
    )
    assert result.status == 0xA700
    assert sent == 1000
    assert door.fs.steps.count("write") <= 2
    door.catalog.close()


def test_below_the_reserve_everything_is_refused_and_read(tmp_path: Path) -> None:
    door = open_door(tmp_path / "data", storage=StorageSettings(reserve_bytes=2**60))
    uid, body = image()
    assert door.send(body, uid).status == 0xA700
    door.catalog.close()


def test_padded_and_zero_led_uids_are_tolerated_and_told(door: Door) -> None:
    uid, body = image(SOPInstanceUID="1.2.3")
    body = body.replace(b"1.2.826.1.1\0", b"1.2.826.1.07")
    assert door.send(body, uid + " ").status == 0x0000
    record, _ = door.stored[0]
    assert record.header.irregular_uids
    assert record.header.series_instance_uid == "1.2.826.1.07"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_whatever_call_fails_the_object_is_refused_or_fully_there(door: Door, code: int) -> None:
    for nth in range(60):
        uid, body = image()
        door.fs.code = code
        door.fs.fail_in = nth
        result = door.send(body, uid)
        failed = door.fs.fail_in == -1
        door.fs.fail_in = -1
        if result.status == 0x0000:
            assert door.kept(uid) == body
        else:
            assert result.status == 0xA700
            assert door.catalog.index.instance(uid) is None
            assert door.files() == [instance.path[-71:] for instance in stored(door)]
            assert door.send(body, uid).status == 0x0000  # recovered, without a restart
        if not failed or result.status == 0x0000:
            break
    assert nth >= 5


def stored(door: Door) -> list[StoredInstance]:
    found = door.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.826.1"]})
    return sorted(found, key=lambda instance: instance.path)


def test_when_the_row_cannot_be_written_the_new_file_is_taken_back(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> StoreOutcome:
        raise StorageError("the catalog cannot be written or read: database or disk is full")

    uid, body = image()
    with monkeypatch.context() as patch:
        patch.setattr(door.catalog.index, "add_instance", full)
        assert door.send(body, uid).status == 0xA700
    assert door.files() == []
    assert door.send(body, uid).status == 0x0000
    with monkeypatch.context() as patch:  # the same object again: the file was there before, and stays
        patch.setattr(door.catalog.index, "add_instance", full)
        assert door.send(body, uid).status == 0xA700
    assert door.kept(uid) == body


def test_an_unforeseen_failure_is_0110_and_tells_the_log_no_value(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> StoreOutcome:
        raise ValueError(f"cannot handle {CANARY}")

    uid, body = image()
    monkeypatch.setattr(door.catalog.index, "add_instance", broken)
    with caplog.at_level(logging.DEBUG):
        result = door.send(body, uid)
    assert result.status == 0x0110
    assert door.files() == []
    entry = next(record for record in caplog.records if record.message == "instance failed")
    assert entry.__dict__["error"] == "ValueError"
    assert any("broken" in place for place in entry.__dict__["at"])
    assert not any("Canary" in str(record.__dict__) for record in caplog.records)


@pytest.mark.filterwarnings("ignore")
def test_no_refusal_says_a_patient_value(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for status, requested, attributes, change in bad_objects().values():
            uid, body = image(**attributes)
            result = door.send(change(body), requested or uid)
            assert result.status == status
            assert "Canary" not in result.comment
    assert not any("Canary" in str(record.__dict__) for record in caplog.records)


def test_an_association_that_breaks_passes_through_and_leaves_nothing(door: Door) -> None:
    class Broken(Exception):
        pass

    def fragments() -> Iterator[bytes]:
        yield b"half"
        raise Broken

    with pytest.raises(Broken):
        door.ingest.accept(
            sop_class_uid=CT, sop_instance_uid="1.2", transfer_syntax_uid=EXPLICIT, fragments=fragments(), source=SENDER
        )
    assert door.files() == []


# --- results -------------------------------------------------------------------------------------------------------


def test_a_staged_result_is_durable_but_not_visible_until_it_is_indexed(door: Door) -> None:
    uid, body = image()
    arguments: dict[str, Any] = {"sop_class_uid": CT, "sop_instance_uid": uid, "transfer_syntax_uid": EXPLICIT}
    record = door.ingest.stage(fragments=[body], **arguments)
    assert record.origin is Origin.PRODUCED
    assert door.catalog.index.instance(uid) is None
    assert Path(door.catalog.archive.path(record.file.location)).read_bytes().endswith(body)
    assert door.ingest.stage(fragments=[body], **arguments).file == record.file
    door.catalog.index.add_instance(record, ConflictPolicy.KEEP_FIRST, lambda first: False)
    assert door.kept(uid) == body
    with pytest.raises(IdentityMismatch):
        door.ingest.stage(fragments=[body], **(arguments | {"sop_instance_uid": "1.2.3"}))


# --- kill -9 -------------------------------------------------------------------------------------------------------

CHILD = """
import io, sys, threading
import pydicom
from pathlib import Path
from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.model import ConflictPolicy, Origin, Source
from dicom_node.pipeline.ingest import Ingest
from dicom_node.store.catalog import open_catalog

clock = SystemClock()
catalog = open_catalog(Path(sys.argv[1]), clock, StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
ingest = Ingest(
    catalog.archive, catalog.index, clock=clock, max_object_bytes=1 << 30, max_inflated_header_bytes=1 << 20,
    conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST, origin_for=lambda source: Origin.RECEIVED,
)
source = Source(calling_ae_title="SCANNER", called_ae_title="NODE", address="127.0.0.1", association_id="a")
CT = "1.2.840.10008.5.1.4.1.1.2"

def send(thread):
    for number in range(100000):
        uid = f"1.2.{sys.argv[2]}.{thread}.{number}"
        ds = pydicom.Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CT, uid
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.1", f"1.1.{thread}"
        ds.PatientID, ds.Modality = "P", "CT"
        ds.PixelData = uid.encode().ljust(64) * 300
        ds["PixelData"].VR = "OW"
        out = io.BytesIO()
        pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=True)
        body = out.getvalue()
        result = ingest.accept(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid="1.2.840.10008.1.2.1",
                               fragments=[body], source=source)
        assert result.status == 0, result
        sys.stdout.write(uid + "\\n")
        sys.stdout.flush()

for thread in range(3):
    threading.Thread(target=send, args=(thread,), daemon=True).start()
threading.Event().wait(60)
"""


def test_after_kill_9_every_acknowledged_object_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    acknowledged: list[str] = []
    for turn in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(turn)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(20 + 17 * turn):
            acknowledged.append(child.stdout.readline().strip())
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += [line.strip() for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        child.wait(timeout=30)
        child.stdout.close()
    door = open_door(folder)
    door.catalog.recover()
    for uid in acknowledged:
        assert uid.encode() in door.kept(uid), uid
    with door.catalog.database.read() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = connection.execute("SELECT count(*) FROM instance").fetchone()[0]
        study = connection.execute("SELECT instance_count FROM study").fetchone()[0]
    assert rows == study >= len(acknowledged) >= 20 + 37 + 54
    assert len(door.files()) >= rows
    door.catalog.close()
