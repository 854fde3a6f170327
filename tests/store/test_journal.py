"""The intake journal: what was appended outlives a crash, whatever was brought to disk of it and whatever was not."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from blake3 import blake3

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import StorageError
from dicom_node.interfaces import JournaledObject
from dicom_node.model import (
    ArchivedFile,
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    JournalPlace,
    Origin,
    Receipt,
    Source,
)
from dicom_node.store import journal as journal_module
from dicom_node.store.buffers import BLOCK, BUFFER, RecordBuffers
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.database import Database
from dicom_node.store.folder import DIRECT, FolderArchive
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.index import SqliteIndex
from dicom_node.store.journal import Journal
from dicom_node.store.spool import FolderSpool

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
SEGMENT = 2 * 1024**2
RECEIPT = Receipt(
    source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="10.0.0.1", association_id="a"),
    origin=Origin.RECEIVED,
    conflict_policy=ConflictPolicy.REPLACE,
    received_at=SystemClock().wall(),
    received_boot=SystemClock().boot(),
)


@dataclass
class Disk(RealFileSystem):
    """A file system that can be told to fail one kind of call, and that counts what was synced."""

    fails: dict[str, int] = field(default_factory=dict)  # call -> how often still
    synced: int = 0
    steps: list[str] = field(default_factory=list)
    fail_at: int = -1  # of the steps from now

    def _may(self, call: str) -> None:
        if threading.current_thread().name == "intake-journal" and call != "syncfs":
            return  # it makes the next segment ready, at any moment
        self.steps.append(call)
        if len(self.steps) - 1 == self.fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fails.get(call, 0) > 0:
            self.fails[call] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._may("pwrite")
        return super().pwrite(fd, data[: max(BLOCK, len(data) // 2 // BLOCK * BLOCK)], offset)  # as a kernel may

    def fdatasync(self, fd: int) -> None:
        self._may("fdatasync")
        super().fdatasync(fd)

    def syncfs(self, fd: int) -> None:
        self._may("syncfs")
        super().syncfs(fd)
        self.synced += 1

    def open_direct(self, path: Path, *, create: bool) -> int:
        self._may("open_direct")
        return super().open_direct(path, create=create)

    def open_tmpfile(self, folder: Path) -> int:
        self._may("open_tmpfile")
        return super().open_tmpfile(folder)

    def open_direct_tmpfile(self, folder: Path) -> int:
        self._may("open_direct_tmpfile")
        return super().open_direct_tmpfile(folder)

    def truncate(self, fd: int, length: int) -> None:
        self._may("truncate")
        super().truncate(fd, length)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        self._may("write")
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._may("fsync")
        super().fsync(fd)

    def link_path(self, fd: int, path: str) -> None:
        self._may("link_path")
        super().link_path(fd, path)

    def link(self, fd: int, name: str, folder_fd: int) -> None:
        self._may("link")
        super().link(fd, name, folder_fd)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def opened(tmp_path: Path, disk: Disk) -> Iterator[Callable[[], Catalog]]:
    made: list[Catalog] = []

    def open_one() -> Catalog:
        storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, journal_bytes=8 * SEGMENT)
        made.append(open_catalog(tmp_path / "data", SystemClock(), storage, fs=disk))
        return made[-1]

    yield open_one
    for catalog in made:
        catalog.close()


def in_use(catalog: Catalog) -> Journal:
    """The catalog's journal in use; it may have no segment yet, and may never have."""
    journal = catalog.open_journal(0)
    journal.begin()
    catalog.archive.journal = journal
    return journal


def begun(catalog: Catalog) -> Journal:
    """The catalog's journal in use, with a segment to append to."""
    journal = in_use(catalog)
    until(lambda: any(one.state.value == "free" for one in journal._segments))
    return journal


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def spooled(catalog: Catalog, body: bytes, uid: str = "1.2.3", source_ae: str = "CT1") -> FolderSpool:
    spool = catalog.archive.begin(
        sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, source_ae=source_ae
    )
    spool.write(body)
    return spool


def kept(catalog: Catalog, body: bytes, uid: str = "1.2.3") -> ArchivedFile:
    return spooled(catalog, body, uid).commit(RECEIPT)


def received(catalog: Catalog, uid: str, body: bytes, source_ae: str = "CT1") -> ArchivedFile:
    """Kept and indexed; its record is not settled yet."""
    file = spooled(catalog, body, uid, source_ae).commit(RECEIPT)
    header = InstanceHeader(
        sop_class_uid=CT,
        sop_instance_uid=uid,
        study_instance_uid="1.2",
        series_instance_uid="1.2.0",
        transfer_syntax_uid=EXPLICIT,
        attributes={},
        pixel_data_offset=None,
    )
    record = InstanceRecord(
        header=header,
        file=file,
        source=RECEIPT.source,
        origin=RECEIPT.origin,
        received_at=RECEIPT.received_at,
        received_boot=RECEIPT.received_boot,
    )
    catalog.index.add_instance(record, ConflictPolicy.KEEP_FIRST, lambda first: False)
    return file


def crash(catalog: Catalog) -> None:
    """What a killed process leaves: nothing is finished, locks are gone."""
    journal = catalog.archive.journal
    assert journal is not None
    journal._closing = True
    journal._wants.set()
    assert journal._thread is not None
    with journal._changed:
        journal._changed.notify_all()
    journal._thread.join(10)
    for segment in journal._segments:
        os.close(segment.fd)
    journal._segments.clear()
    os.close(journal._lock_fd)
    journal._lock_fd = -1
    catalog.archive.journal = None


@contextmanager
def found(catalog: Catalog) -> Iterator[list[JournaledObject]]:
    journal = catalog.open_journal(0)
    try:
        yield list(_read_all(journal.left_behind()))
    finally:
        journal.close()


def _read_all(records: Iterator[JournaledObject]) -> Iterator[JournaledObject]:
    for record in records:
        whole = record.read(0, record.length)
        yield JournaledObject(
            place=record.place,
            receipt=record.receipt,
            transfer_syntax_uid=record.transfer_syntax_uid,
            length=record.length,
            meta_length=record.meta_length,
            digest=record.digest,
            doubtful=record.doubtful,
            read=lambda at, count, whole=whole: whole[at : at + count],  # type: ignore[misc]
        )


@pytest.mark.parametrize("size", [1, 300, BLOCK, 65_536, 70_001, DIRECT - 1, DIRECT, BUFFER - 2 * BLOCK, BUFFER - 400])
def test_what_was_appended_is_found_after_a_crash_byte_for_byte(size: int, opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    begun(catalog)
    body = os.urandom(size)
    file = kept(catalog, body)
    assert file.journal is not None
    crash(catalog)
    with found(opened()) as records:
        (record,) = records
    raw = Path(catalog.archive.path(file.location)).read_bytes()
    assert record.read(0, record.length + 10) == raw
    assert raw[file.data_set_offset :] == body
    assert record.digest == blake3(body).digest()
    assert (record.receipt, record.transfer_syntax_uid, record.place) == (RECEIPT, EXPLICIT, file.journal)


@pytest.mark.parametrize("size", [BUFFER, BUFFER + 5, 3 * BUFFER + BLOCK])
def test_what_no_buffer_holds_is_synced_by_itself_and_written_once(
    size: int, opened: Callable[[], Catalog], disk: Disk
) -> None:
    catalog = opened()
    journal = begun(catalog)
    body = os.urandom(size)
    disk.steps.clear()
    file = kept(catalog, body)
    assert file.journal is None and journal.refused == 0
    steps = [step for step in disk.steps if step not in ("write", "truncate")]
    assert steps == ["open_direct_tmpfile", "fsync", "link"]
    crash(catalog)
    assert Path(catalog.archive.path(file.location)).read_bytes()[file.data_set_offset :] == body


def test_records_come_back_in_the_order_in_which_they_were_made(opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    begun(catalog)
    bodies = [os.urandom(150_000) for _ in range(30)]  # two segments and more
    for number, body in enumerate(bodies):
        kept(catalog, body, f"1.2.{number}")
    crash(catalog)
    with found(opened()) as records:
        assert [record.digest for record in records] == [blake3(body).digest() for body in bodies]


def test_a_record_that_a_power_cut_tore_is_passed_over_and_those_after_it_are_found(
    opened: Callable[[], Catalog], tmp_path: Path
) -> None:
    catalog = opened()
    begun(catalog)
    files = [kept(catalog, os.urandom(10_000), f"1.2.{number}") for number in range(5)]
    crash(catalog)
    path = tmp_path / "data/journal/0/segment-0"
    place = files[1].journal
    head = files[2].journal
    assert place is not None and head is not None
    with path.open("r+b") as segment:
        segment.seek(place.offset + BLOCK + 5_000)
        segment.write(b"\x00" * 100)  # in its data
        segment.seek(head.offset + 60)
        segment.write(b"\xff" * 10)  # in its head
    again = opened()
    with found(again) as records:
        assert len(records) == 4
        whole = [record for record in records if again.archive.put_back(record) is not None]
    assert [record.place for record in whole] == [file.journal for file in files if file not in files[1:3]]


def test_a_received_object_that_looks_like_a_record_is_not_taken_for_one(opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    begun(catalog)
    first = kept(catalog, os.urandom(3 * BLOCK))
    assert first.journal is not None
    segment = next(one for one in catalog.archive.journal._segments if one.name == first.journal.segment)  # type: ignore[union-attr]
    with segment.path.open("rb") as file:
        file.seek(first.journal.offset)
        forged = bytearray(file.read(BLOCK))
    forged[8:24] = bytes(16)  # a peer knows the form, but not the segment's name
    kept(catalog, bytes(forged) * 40, "1.2.4")
    crash(catalog)
    with found(opened()) as records:
        assert len(records) == 2


def test_full_segments_are_synced_and_used_again_and_forgotten(opened: Callable[[], Catalog], disk: Disk) -> None:
    catalog = opened()
    journal = begun(catalog)
    for number in range(200):  # 60 MB through 16 MB
        file = kept(catalog, os.urandom(300_000), f"1.2.{number}")
        if file.journal is not None:
            catalog.archive.settled(file)
    assert disk.synced >= 3
    assert journal.refused < 100, "the journal hardly ever had room"
    assert len(journal._segments) <= 8
    journal.close()
    catalog.archive.journal = None
    with found(opened()) as records:
        assert records == []


def test_a_segment_is_not_used_again_before_its_records_are_settled(
    opened: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WAIT_S", 0.05)
    catalog = opened()
    journal = begun(catalog)
    places = []
    for number in range(90):
        file = kept(catalog, os.urandom(300_000), f"1.2.{number}")
        places.append(file.journal)
    full = [place for place in places if place is not None]
    assert 30 < len(full) < 70 and places[-1] is None, "there is room for about 48 of them"
    crash(catalog)
    with found(opened()) as records:
        assert [record.place for record in records] == full
    assert journal.refused == len(places) - len(full)


def test_an_object_is_in_the_journal_before_it_has_a_name_and_a_segment_synced_before_it_is_used_again(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "sync", lambda self: disk.steps.append("sync rows"))
    monkeypatch.setattr(SqliteIndex, "forget_journaled", lambda self, name: disk.steps.append("forget"))
    catalog = opened()
    journal = begun(catalog)
    spool = spooled(catalog, b"g" * 3000)
    disk.steps.clear()
    file = spool.commit(RECEIPT)
    steps = [step for step, before in zip(disk.steps, ["", *disk.steps], strict=False) if step != before]
    assert steps[:5] == ["pwrite", "fdatasync", "open_tmpfile", "write", "link_path"]
    assert "fsync" not in disk.steps[:6], "that is what the journal spares"
    until(lambda: len(journal._segments) == 2)  # the next one is made ready meanwhile
    disk.steps.clear()
    catalog.archive.settled(file)
    catalog.close()
    assert disk.steps == ["syncfs", "sync rows", "pwrite", "fdatasync", "forget"]


def test_a_journal_for_which_there_was_no_room_is_there_when_there_is(
    opened: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "IDLE_S", 0.02)
    room = [0]
    monkeypatch.setattr(FolderArchive, "free_bytes", lambda self: room[0])
    catalog = opened()
    journal = in_use(catalog)
    assert spooled(catalog, b"f" * 3000).commit(RECEIPT).journal is None
    room[0] = 1 << 30
    until(lambda: any(one.state.value == "free" for one in journal._segments))
    file = spooled(catalog, b"j" * 3000).commit(RECEIPT)
    assert file.journal is not None
    catalog.archive.settled(file)


@pytest.mark.parametrize("size", [3000, DIRECT + 1])
def test_after_any_failing_call_the_object_is_refused_or_fully_there_also_after_a_crash(
    size: int, opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.0)
    catalog = opened()
    begun(catalog)
    promised: dict[str, bytes] = {}
    for nth in range(60):
        body = os.urandom(size)
        disk.steps.clear()
        disk.fail_at = nth
        try:
            promised[kept(catalog, body, f"1.2.{nth}").location] = body
        except StorageError:
            continue
        finally:
            reached = len(disk.steps) > nth
            disk.fail_at = -1
        if not reached:
            break
    else:
        pytest.fail("the object was never received without a fault")
    assert len(promised) >= 3
    crash(catalog)
    for location in promised:
        if catalog.archive.status(location) is not None:
            os.unlink(catalog.archive.path(location))  # the journal alone must do, where it was asked to
    again = opened()
    with found(again) as records:
        held = {again.archive.location_of(record) for record in records if again.archive.put_back(record)}
    assert held, "none was journaled"
    for location in held & set(promised):
        assert Path(again.archive.path(location)).read_bytes().endswith(promised[location])


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_an_object_the_journal_cannot_take_is_made_durable_by_itself(
    call: str, opened: Callable[[], Catalog], disk: Disk
) -> None:
    catalog = opened()
    begun(catalog)
    first = kept(catalog, b"a" * 5000)
    disk.fails[call] = 1
    second = kept(catalog, b"b" * 5000)
    assert first.journal is not None and second.journal is None
    assert Path(catalog.archive.path(second.location)).read_bytes().endswith(b"b" * 5000)
    crash(catalog)
    with found(opened()) as records:
        assert records[0].place == first.journal  # of the second there may be one: replay finds it indexed already


def test_after_a_failed_sync_every_file_is_written_anew_before_its_record_goes(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    file = received(catalog, "1.2.3", b"c" * 5000)
    path = Path(catalog.archive.path(file.location))
    before = path.stat().st_ino
    disk.fails["syncfs"] = 1
    catalog.archive.settled(file)
    until(lambda: journal.bytes_waiting == 0)
    assert path.stat().st_ino != before, "the system had forgotten these bytes"
    assert path.read_bytes().endswith(b"c" * 5000)


def test_where_there_is_no_direct_io_every_object_is_synced_by_itself(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, create: bool) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT")

    monkeypatch.setattr(disk, "open_direct", refuse)
    catalog = opened()
    journal = in_use(catalog)
    until(lambda: journal._max == 0)
    assert kept(catalog, b"d" * 100).journal is None


def test_one_journal_has_one_owner(opened: Callable[[], Catalog]) -> None:
    begun(opened())
    with pytest.raises(StorageError, match="in use"):
        opened().open_journal(0)


def test_a_journal_of_another_version_is_not_passed_over(
    opened: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dicom_node.store import segments

    catalog = opened()
    begun(catalog)
    monkeypatch.setattr(segments, "_pack_facts", lambda head: b'{"other":1}')
    kept(catalog, b"e" * 100)
    crash(catalog)
    with pytest.raises(StorageError, match="another version"), found(opened()):
        pass


def test_threads_append_side_by_side(opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    begun(catalog)
    bodies = {f"1.2.{number}.{turn}": os.urandom(20_000) for number in range(8) for turn in range(10)}
    places: list[JournalPlace | None] = []

    def send(number: int) -> None:
        for turn in range(10):
            file = kept(catalog, bodies[f"1.2.{number}.{turn}"], f"1.2.{number}.{turn}")
            places.append(file.journal)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    crash(catalog)
    with found(opened()) as records:
        assert {record.digest for record in records} >= {
            blake3(body).digest() for body in bodies.values()
        } or None in places
        assert len({(record.place.segment, record.place.offset) for record in records}) == len(records)


def test_buffers_are_given_back(opened: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = opened()
    taken = []
    take = RecordBuffers.take
    monkeypatch.setattr(RecordBuffers, "take", lambda self: taken.append(1) or take(self))
    for number in range(20):
        kept(catalog, b"x", f"1.2.{number}")
        spooled(catalog, b"y", f"1.3.{number}").discard()
    assert len(taken) == 40
    assert len(catalog.archive.buffers._free) == 1


def test_segments_left_behind_are_gone_once_they_are_cleared(opened: Callable[[], Catalog], tmp_path: Path) -> None:
    catalog = opened()
    begun(catalog)
    kept(catalog, b"f" * 100)
    crash(catalog)
    again = opened()
    journal = again.open_journal(0)
    assert len(list(_read_all(journal.left_behind()))) == 1
    journal.clear()
    assert list((tmp_path / "data/journal/0").glob("segment-*")) == []
    journal.close()
    shutil.rmtree(tmp_path / "data/journal")


def test_after_a_failed_sync_segments_still_in_use_are_not_trusted_either(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    waits = received(catalog, "1.2.1", b"w" * 5000)  # its row is still being written
    fills = [received(catalog, f"1.3.{number}", os.urandom(300_000)) for number in range(7)]
    assert fills[-1].journal is not None and waits.journal is not None
    assert fills[-1].journal.segment != waits.journal.segment
    disk.fails["syncfs"] = 1  # of which the system tells once, whosever file it was
    for file in fills:
        catalog.archive.settled(file)
    until(lambda: disk.fails["syncfs"] == 0)
    path = Path(catalog.archive.path(waits.location))
    before = path.stat().st_ino
    catalog.archive.settled(waits)
    until(lambda: journal.bytes_waiting == 0)
    assert path.stat().st_ino != before, "its bytes may be those that could not be written"


def test_an_object_that_was_under_way_when_a_sync_failed_is_not_left_to_the_journal(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    under_way = spooled(catalog, os.urandom(200_000))
    disk.fails["syncfs"] = 1
    catalog.archive.settled(kept(catalog, b"x" * 100, "1.2.4"))
    until(lambda: journal.bytes_waiting == 0)
    disk.steps.clear()
    assert under_way.commit(RECEIPT).journal is None
    assert "fsync" in disk.steps, "only a sync of the file itself tells whether its bytes were among the lost"


def test_what_was_refused_is_not_written_anew(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    file = kept(catalog, b"r" * 5000)
    catalog.archive.settled(file)  # without a row
    catalog.archive.remove(file.location)
    disk.fails["syncfs"] = 1
    until(lambda: journal.bytes_waiting == 0)
    assert list(catalog.archive.locations()) == []


def test_a_file_that_is_written_anew_keeps_the_envelope_its_row_counts_on(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    body = os.urandom(5000)
    catalog.archive.settled(received(catalog, "1.2.3", body))
    until(lambda: journal.bytes_waiting == 0)
    again = received(catalog, "1.2.3", body, source_ae="ANOTHER_SENDER")  # the same object, of another file meta
    disk.fails["syncfs"] = 1
    catalog.archive.settled(again)
    until(lambda: journal.bytes_waiting == 0)
    row = catalog.index.instance("1.2.3")
    assert row is not None
    assert Path(row.path).read_bytes()[row.data_set_offset :] == body


def test_an_end_while_an_object_is_appended_leaves_it_its_descriptor(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = opened()
    journal = begun(catalog)
    at_the_disk, go_on, outcome = threading.Event(), threading.Event(), []
    pwrite = Disk.pwrite

    def slow(self: Disk, fd: int, data: memoryview, offset: int) -> int:
        if threading.current_thread().name == "sender":
            at_the_disk.set()
            assert go_on.wait(10)
            outcome.append(os.readlink(f"/proc/self/fd/{fd}"))
        return pwrite(self, fd, data, offset)

    monkeypatch.setattr(Disk, "pwrite", slow)
    sender = threading.Thread(target=lambda: kept(catalog, b"s" * 100), name="sender")
    sender.start()
    assert at_the_disk.wait(10)
    ending = threading.Thread(target=journal.close)
    ending.start()
    ending.join(0.3)
    go_on.set()
    sender.join(10)
    ending.join(10)
    assert outcome and all("/journal/0/segment-" in name for name in outcome), "it wrote into another file"
    with found(opened()) as records:
        assert len(records) == 1


def test_what_hangs_at_the_end_keeps_its_descriptors(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "CLOSE_S", 0.1)
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    catalog = opened()
    journal = begun(catalog)
    hangs, go_on = threading.Event(), threading.Event()

    def stuck(fd: int) -> None:
        hangs.set()
        assert go_on.wait(10)

    monkeypatch.setattr(disk, "syncfs", stuck)
    catalog.archive.settled(kept(catalog, b"h" * 100))
    assert hangs.wait(10)
    fds = [segment.fd for segment in journal._segments]
    catalog.close()
    assert all("/journal/0/segment-" in os.readlink(f"/proc/self/fd/{fd}") for fd in fds)
    go_on.set()
    assert journal._thread is not None
    journal._thread.join(10)
    assert journal.close(), "it can end now"


def test_without_its_thread_the_journal_refuses_at_once(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "IDLE_S", 0.1)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    catalog = opened()

    def unforeseen(self: SqliteIndex, segment: bytes | None = None) -> None:
        raise RuntimeError("no such thing was thought of")

    with monkeypatch.context() as patched:
        patched.setattr(SqliteIndex, "forget_journaled", unforeseen)
        journal = begun(catalog)
    catalog.archive.settled(kept(catalog, b"u" * 100))
    assert journal._thread is not None
    journal._thread.join(10)
    assert not journal._thread.is_alive()
    journal._forget = catalog.index.forget_journaled
    began = time.monotonic()
    assert all(kept(catalog, os.urandom(300_000), f"1.2.{number}").journal is None for number in range(60))
    assert time.monotonic() - began < 10


def test_where_direct_io_wants_larger_blocks_every_object_is_synced_by_itself(
    opened: Callable[[], Catalog], disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EINVAL, "not aligned")

    monkeypatch.setattr(disk, "pwrite", refuse)
    catalog = opened()
    journal = in_use(catalog)
    until(lambda: journal._max == 0)
    assert kept(catalog, b"d" * 100).journal is None
    assert list((tmp_path / "data/journal/0").glob("segment-*")) == []


def test_a_record_that_cannot_be_read_is_told_as_such(opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    begun(catalog)
    kept(catalog, b"i" * 100)
    crash(catalog)

    def unreadable(at: int, count: int) -> bytes:
        raise OSError(errno.EIO, "a bad sector")

    with found(opened()) as records, pytest.raises(StorageError, match="EIO"):
        catalog.archive.put_back(replace(records[0], read=unreadable))


def test_opening_journals_one_after_the_other_takes_no_more_descriptors(opened: Callable[[], Catalog]) -> None:
    catalog = opened()
    catalog.open_journal(0).close()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        catalog.open_journal(number).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_relative_data_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, journal_bytes=8 * SEGMENT)
    catalog = open_catalog(Path("data"), SystemClock(), storage)
    try:
        begun(catalog)
        assert kept(catalog, b"k" * 100).journal is not None
    finally:
        catalog.close()
