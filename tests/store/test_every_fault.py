"""Every call to the disk fails once, each by itself and with each errno, on every way by which something is kept.

After each: what was acknowledged is there, byte for byte; of what was refused nothing is to be seen; the next works.
"""

import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import ConfigError, NodeError, StorageError
from dicom_node.model import ConflictPolicy, Level, Origin, Source, StoreResult
from dicom_node.pipeline.fsck import fsck
from dicom_node.pipeline.ingest import Ingest
from dicom_node.pipeline.replay import replay
from dicom_node.store import pressure as pressure_module
from dicom_node.store.backup import back_up, bring_back
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.writers import Writers, Writing

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
SENDER = Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1")
CALLS = (
    *("mkdir", "open_folder", "open_tmpfile", "create", "write", "fsync", "fsync_dir", "link", "link_path"),
    *("open_direct", "open_direct_tmpfile", "truncate", "pwrite", "fdatasync", "syncfs", "rename", "unlink", "statvfs"),
)
CODES = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS)
SMALL, LARGE, HUGE = 3000, 500_000, 2_200_000  # in one buffer; past the cache; in several buffers, and not journaled
MOST = 400  # calls of one way; an archive that is opened makes its 256 folders


class FailingDisk(RealFileSystem):
    """Fails call number `fail_at`, once. `close` is not among them: Linux gives the descriptor back whatever it says.

    The journal's own thread is left alone, for it comes at any moment; its work is done here by hand.
    """

    def __init__(self, *, tmpfile: bool = True) -> None:
        self.count, self.fail_at, self.code, self.failed = 0, -1, errno.EIO, ""
        self._tmpfile = tmpfile

    def arm(self, nth: int, code: int) -> None:
        """The `nth` call from now fails; -1: none does."""
        self.count, self.fail_at, self.code, self.failed = 0, nth, code, ""

    def syncfs(self, fd: int) -> None:
        """What it is for, a power cut, does not come here, and the whole machine would wait for it."""

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name not in CALLS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == "intake-journal":
                return real(*args, **options)
            if name in ("open_tmpfile", "open_direct_tmpfile") and not self._tmpfile:
                raise OSError(errno.EOPNOTSUPP, "")
            self.count += 1
            if self.count - 1 == self.fail_at:
                self.failed = name
                raise OSError(self.code, os.strerror(self.code), "/secret/path")
            return real(*args, **options)

        return call


@dataclass
class Node:
    """A receiver on a disk that fails."""

    catalog: Catalog
    disk: FailingDisk
    policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST

    def __post_init__(self) -> None:
        self.ingest = Ingest(
            self.catalog.archive,
            self.catalog.index,
            conflict_policy_for=lambda source: self.policy,
            origin_for=lambda source: Origin.RECEIVED,
            max_object_bytes=2**30,
            max_inflated_header_bytes=2**20,
            clock=SystemClock(),
        )

    def use_journal(self) -> None:
        journal = self.catalog.open_journal(0)
        journal.begin()
        self.catalog.archive.journal = journal
        until(lambda: journal._segments)

    def send(self, uid: str, body: bytes) -> StoreResult:
        return self.ingest.accept(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=pieces(body), source=SENDER
        )

    def kept(self, uid: str) -> bytes | None:
        found = self.catalog.index.instance(uid)
        return None if found is None else Path(found.path).read_bytes()[found.data_set_offset :]

    def check(self) -> None:
        """Index and archive agree to the byte, no file is without a row, no temporary is left."""
        report = fsck(self.catalog, rebuild=False, verify_hashes=True, clock=SystemClock())
        assert report.clean, (report, self.disk.failed)


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread writes is over before the next call: the n-th call is the same one each time."""
    begin = Writers.begin

    def begun(self: Writers, act: Callable[[], None]) -> Writing | None:
        writing = begin(self, act)
        if writing is not None:
            writing.over()
        return writing

    monkeypatch.setattr(Writers, "begin", begun)


def pieces(body: bytes) -> Iterator[bytes]:
    return (body[start : start + 100_000] for start in range(0, len(body), 100_000))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def image(size: int = SMALL, uid: str = "") -> tuple[str, bytes]:
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CT, uid or generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.1", "1.2.826.1.1"
    ds.PatientID, ds.Modality = "P1", "CT"
    ds.add_new("PixelData", "OW", os.urandom(size))
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=True)
    return str(ds.SOPInstanceUID), out.getvalue()


@pytest.fixture(autouse=True)
def space_is_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure_module, "MEASURE_S", 0.0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    made: list[Catalog] = []

    def opened(name: str = "data", *, tmpfile: bool = True) -> Node:
        disk = FailingDisk(tmpfile=tmpfile)
        storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, journal_bytes=8 * 2 * 1024**2)
        made.append(open_catalog(tmp_path / name, SystemClock(), storage, fs=disk))
        return Node(made[-1], disk)

    yield opened
    for catalog in made:
        catalog.close()


def each_call(disk: FailingDisk, code: int, attempt: Callable[[], None]) -> int:
    """`attempt` with its first call failing, with its second ..., until it makes none more; how many there were."""
    for nth in range(MOST):
        disk.arm(nth, code)
        attempt()
        if not disk.failed:
            return nth
        disk.arm(-1, code)
    raise AssertionError(f"more than {MOST} calls")


def stores(node: Node, code: int, size: int, *, uid: str = "") -> int:
    """Objects of that size are stored, each call failing once."""

    def attempt() -> None:
        before = node.kept(uid) if uid else None
        name, body = image(size, uid)
        result = node.send(name, body)
        failed = node.disk.failed
        node.disk.arm(-1, code)
        if result.status == 0x0000:
            assert node.kept(name) == body, failed
        else:
            assert result.status == 0xA700 and "secret" not in result.comment, failed
            assert node.kept(name) == before, failed
            assert node.send(name, body).status == 0x0000, failed  # at once, without a restart
            assert node.kept(name) == body
        if not uid:
            assert list(node.catalog.archive.locations()) == visible(node), failed
        node.disk.failed = failed

    calls = each_call(node.disk, code, attempt)
    node.check()
    return calls


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("tmpfile", [True, False])
def test_an_object_stored_as_a_file(node: Callable[..., Node], code: int, tmpfile: bool) -> None:
    one = node(tmpfile=tmpfile)
    assert stores(one, code, SMALL) >= 6
    assert list((one.catalog.data_dir / "archive" / "tmp").iterdir()) == []


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("size", [SMALL, *(pytest.param(size, marks=pytest.mark.crash) for size in (LARGE, HUGE))])
def test_an_object_stored_by_the_journal(
    node: Callable[..., Node], code: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.store.journal.RETRY_S", 0.0)  # the journal is tried again with the next object
    one = node()
    one.use_journal()
    assert stores(one, code, size) >= 5


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_an_object_that_takes_the_place_of_another(node: Callable[..., Node], code: int) -> None:
    one = node()
    one.policy = ConflictPolicy.REPLACE
    uid, body = image()
    assert one.send(uid, body).status == 0x0000
    assert stores(one, code, SMALL, uid=uid) >= 6


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_an_object_that_comes_again_after_its_file_was_damaged(node: Callable[..., Node], code: int) -> None:
    one = node()
    uid, body = image()
    one.send(uid, body)
    path = Path(one.catalog.index.instance(uid).path)  # type: ignore[union-attr]
    good = path.read_bytes()

    def attempt() -> None:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        result = one.send(uid, body)
        assert result.status in (0x0000, 0xA700)
        # answered Success: mended. Refused: as it was, or mended and only its folder not known to be synced
        assert path.read_bytes() == good if result.status == 0x0000 else path.stat().st_size == len(good)

    assert each_call(one.disk, code, attempt) >= 8
    one.check()
    assert list((one.catalog.data_dir / "archive" / "tmp").iterdir()) == []


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_result(node: Callable[..., Node], code: int) -> None:
    one = node()
    one.use_journal()  # results are synced by themselves all the same

    def attempt() -> None:
        uid, body = image()

        def stage() -> Any:
            return one.ingest.stage(
                sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=pieces(body)
            )

        try:
            record = stage()
        except StorageError as exc:
            assert exc.retryable
            one.disk.fail_at = -1
            assert list(one.catalog.archive.locations()) == visible(one), one.disk.failed
            record = stage()
        assert record.file.journal is None
        one.disk.fail_at = -1
        one.catalog.index.add_instance(record, ConflictPolicy.KEEP_FIRST, lambda first: False)
        assert one.kept(uid) == body

    assert each_call(one.disk, code, attempt) >= 5
    one.check()


def visible(node: Node) -> list[str]:
    found = node.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.826.1"]})
    return sorted(instance.path[-71:] for instance in found)


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.crash) for code in CODES[1:])],
    ids=errno.errorcode.get,
)
def test_the_journal_replayed_at_the_next_start(node: Callable[..., Node], code: int, tmp_path: Path) -> None:
    first = node("first")
    first.use_journal()
    sent = dict(image(size) for size in (SMALL, SMALL))
    for uid, body in sent.items():
        assert first.send(uid, body).status == 0x0000
    assert list((first.catalog.data_dir / "journal" / "0").glob("segment-*"))
    crashed = tmp_path / "crashed"
    shutil.copytree(first.catalog.data_dir, crashed)
    shutil.rmtree(crashed / "archive")  # nothing of the files had come to disk

    def start(one: Node) -> None:
        journal = one.catalog.open_journal(0)
        try:
            replay(journal.left_behind(), one.catalog.archive, one.catalog.index, max_inflated_header_bytes=2**20)
            journal.clear()
        finally:
            journal.close()

    number = 0

    def attempt_on(name: str, nth: int) -> bool:
        shutil.copytree(crashed, tmp_path / name)
        one = node(name)
        one.disk.arm(nth, code)
        try:
            start(one)
        except NodeError:
            assert one.disk.failed
            one.disk.arm(-1, code)
            start(one)  # the segments are as they were
            one.disk.failed = "yes"
        for uid, body in sent.items():
            assert one.kept(uid) == body
        assert list((tmp_path / name / "journal" / "0").glob("segment-*")) == []
        one.check()
        more, body = image()
        failed, one.disk.fail_at = one.disk.failed, -1
        assert one.send(more, body).status == 0x0000
        one.catalog.close()
        shutil.rmtree(tmp_path / name)
        return bool(failed)

    while attempt_on(f"start-{number}", number):
        number += 1
        assert number < MOST
    assert number >= 10


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_what_fsck_finds_and_gives_a_row(node: Callable[..., Node], code: int) -> None:
    one = node()

    def attempt() -> None:
        uid, body = image()
        record = None
        with suppress(StorageError):
            record = one.ingest.stage(
                sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=pieces(body)
            )
        one.disk.fail_at = -1
        found = fsck(one.catalog, rebuild=True, verify_hashes=True, clock=SystemClock())
        assert found.indexed == ([] if record is None else [record.file.location])
        assert one.kept(uid) == (None if record is None else body), one.disk.failed
        one.check()

    assert each_call(one.disk, code, attempt) >= 5


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_file_kept_in_the_quarantine(node: Callable[..., Node], code: int, tmp_path: Path) -> None:
    one = node()
    folder = one.catalog.data_dir / "quarantine"

    def attempt() -> None:
        source = tmp_path / "returned.nii"
        source.write_bytes(content := os.urandom(100))
        name = one.catalog.quarantine.keep(
            source, "r", engine="e", job_id=1, study_instance_uid="1.2", series_instance_uid="1.2.3"
        )
        one.disk.fail_at = -1
        if name:
            assert (folder / name).read_bytes() == content
        names = {kept.name for kept in one.catalog.quarantine.listed()}
        assert (name in names) is bool(name)
        if folder.exists():  # each file with its description, and nothing else
            there = {path.name for path in folder.iterdir()}
            assert there == names | {kept.removesuffix(".bin") + ".json" for kept in names}, one.disk.failed

    assert each_call(one.disk, code, attempt) >= 6


@pytest.mark.parametrize(
    "code",
    [*CODES[:2], *(pytest.param(code, marks=pytest.mark.crash) for code in CODES[2:])],
    ids=errno.errorcode.get,
)
def test_a_backup_and_its_restore(node: Callable[..., Node], code: int, tmp_path: Path) -> None:
    one = node()
    uid, body = image()
    one.send(uid, body)
    target = tmp_path / "saved.db"

    def save() -> None:
        try:
            back_up(one.catalog, target)
        except (StorageError, ConfigError):
            assert one.disk.failed and list(tmp_path.glob("saved*")) == []
        else:
            assert target.exists()
            if one.disk.failed:
                target.unlink()

    assert each_call(one.disk, code, save) >= 5
    disk, fresh = FailingDisk(), tmp_path / "fresh"
    fresh.mkdir()

    def restore() -> None:
        for path in fresh.glob("catalog.db*"):
            path.unlink()
        try:
            assert bring_back(fresh, target, disk).files == 1
        except (StorageError, ConfigError):
            assert disk.failed and not (fresh / "catalog.db").exists(), disk.failed

    assert each_call(disk, code, restore) >= 5
