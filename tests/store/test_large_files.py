"""Parts of a large file are written by other threads while it is received: in order, in bounds, and never in part."""

import errno
import os
import threading
from pathlib import Path

import pytest

from dicom_node.digests import digest_text, new_digest
from dicom_node.errors import StorageError
from dicom_node.store.buffers import BLOCK, BUFFER, RecordBuffer
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.spool import FolderSpool
from dicom_node.store.writers import MOST_WRITERS, Writers

MANY = 6 * BUFFER


class Short(RealFileSystem):
    """Takes at most `most` bytes at once."""

    most = 3 * BLOCK

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        return super().write(fd, memoryview(data)[: self.most])


class Cached(Short):
    """Nor is there a way past the cache."""

    most = 70_001

    def open_direct_tmpfile(self, folder: Path) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT")


class Slow(RealFileSystem):
    """Writes of whole buffers wait until they may; one of them fails, where that is wanted."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.begun = threading.Semaphore(0)
        self.closed: list[int] = []
        self.fails_at = -1
        self.large = 0

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        if len(data) == BUFFER:
            self.large += 1
            number = self.large
            self.begun.release()
            assert self.may.wait(10)
            if number == self.fails_at:
                raise OSError(errno.EIO, "no")
        return super().write(fd, data)

    def close(self, fd: int) -> None:
        self.closed.append(fd)
        super().close(fd)


def _begin(archive: FolderArchive) -> FolderSpool:
    return archive.begin(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
        sop_instance_uid="1.2.3.4",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        source_ae="CR1",
    )


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def archive(tmp_path: Path, slow: Slow) -> FolderArchive:
    return FolderArchive(tmp_path / "archive", fs=slow)


def _files(archive: FolderArchive) -> list[str]:
    return list(archive.locations())


def test_receiving_goes_on_while_a_part_is_written_and_no_more_than_one(archive: FolderArchive, slow: Slow) -> None:
    content = os.urandom(MANY)
    spool = _begin(archive)
    spool.write(content[: 2 * BUFFER - 1000])  # the first buffer is being written, the second not yet full
    assert slow.begun.acquire(timeout=10)
    going_on = threading.Thread(target=spool.write, args=(content[2 * BUFFER - 1000 :],), daemon=True)
    going_on.start()
    going_on.join(0.3)
    assert going_on.is_alive() and slow.large == 1, "a third buffer was taken, or two parts were written at once"
    slow.may.set()
    going_on.join(10)
    file = spool.commit()
    whole = Path(archive.path(file.location)).read_bytes()
    assert whole[file.data_set_offset :] == content and slow.large >= MANY // BUFFER - 1


@pytest.mark.parametrize("disk", [RealFileSystem, Short, Cached])
@pytest.mark.parametrize("piece", [65_536, 3 * BUFFER])
@pytest.mark.parametrize("size", [BUFFER, 2 * BUFFER, 2 * BUFFER + 1, 3 * BUFFER - 2 * BLOCK, 3 * BUFFER + 70_001])
def test_bytes_and_digest_are_right_whatever_the_disk_takes_at_once(
    tmp_path: Path, disk: type[RealFileSystem], piece: int, size: int
) -> None:
    content, digest = os.urandom(size), new_digest()
    digest.update(content)
    archive = FolderArchive(tmp_path / "archive", fs=disk())
    spool = _begin(archive)
    for start in range(0, size, piece):
        spool.write(content[start : start + piece])
    assert bytes(spool.view()) == content
    file = spool.commit()
    assert Path(archive.path(file.location)).read_bytes()[file.data_set_offset :] == content
    assert file.sha256 == digest_text(digest.digest()) and file.data_set_length == size


def test_what_was_looked_at_takes_no_more(archive: FolderArchive, slow: Slow) -> None:
    slow.may.set()
    spool = _begin(archive)
    spool.write(bytes(BUFFER + 5))
    spool.view()
    with pytest.raises(ValueError, match="takes no more"):
        spool.write(b"1")
    spool.discard()


def test_a_sender_that_pauses_holds_one_buffer(archive: FolderArchive, slow: Slow) -> None:
    slow.may.set()
    taken: list[RecordBuffer] = []
    take, give_back = archive.buffers.take, archive.buffers.give_back
    archive.buffers.take = lambda: taken.append(take()) or taken[-1]  # type: ignore[method-assign,func-returns-value]
    archive.buffers.give_back = lambda one: (taken.remove(one), give_back(one))[1]  # type: ignore[method-assign,func-returns-value]
    spools = [_begin(archive) for _ in range(20)]
    for spool in spools:
        spool.write(bytes(2 * BUFFER - 1000))
        assert spool._writing is not None
        spool._writing.over()
    assert len(taken) == len(spools)
    for spool in spools:
        spool.discard()
    assert taken == []


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_a_part_that_cannot_be_written_leaves_no_object(archive: FolderArchive, slow: Slow, number: int) -> None:
    slow.may.set()
    slow.fails_at = number
    spool = _begin(archive)
    with pytest.raises(StorageError, match="EIO"):
        spool.write(bytes(MANY + 5))
        spool.commit()
    with pytest.raises(StorageError, match="EIO"):  # whoever goes on all the same gets no file with a hole
        spool.commit()
    assert _files(archive) == []


def test_what_failed_unseen_is_told_when_the_object_is_looked_at(archive: FolderArchive, slow: Slow) -> None:
    slow.may.set()
    slow.fails_at = 1
    spool = _begin(archive)
    spool.write(bytes(BUFFER + 1000))
    with pytest.raises(StorageError, match="EIO"):
        spool.view()
    spool.discard()


def test_an_object_given_up_keeps_file_and_buffer_until_its_part_is_written(archive: FolderArchive, slow: Slow) -> None:
    spool = _begin(archive)
    spool.write(bytes(BUFFER + 1000))
    assert slow.begun.acquire(timeout=10)
    closed = list(slow.closed)
    free = len(archive.buffers._free)
    discarding = threading.Thread(target=spool.discard, daemon=True)
    discarding.start()
    discarding.join(0.3)
    assert discarding.is_alive() and slow.closed == closed and len(archive.buffers._free) == free
    slow.may.set()
    discarding.join(10)
    assert not discarding.is_alive() and len(slow.closed) == len(closed) + 1
    assert len(archive.buffers._free) == free + 2 and _files(archive) == []


def test_where_no_writer_is_free_the_receiver_writes_itself(archive: FolderArchive, slow: Slow) -> None:
    let_go = threading.Event()
    busy = [archive.writers.begin(lambda: let_go.wait(10) and None) for _ in range(MOST_WRITERS)]
    assert None not in busy and archive.writers.begin(lambda: None) is None
    slow.may.set()
    content = os.urandom(3 * BUFFER + 77)
    spool = _begin(archive)
    spool.write(content)
    file = spool.commit()
    assert Path(archive.path(file.location)).read_bytes()[file.data_set_offset :] == content
    let_go.set()


def test_writers_are_used_again_and_no_more_than_they_may_be() -> None:
    before = threading.active_count()
    writers = Writers(2)
    done: list[int] = []
    for number in range(50):
        while (writing := writers.begin(lambda number=number: done.append(number))) is None:
            pass
        assert writing.error() is None
    assert done == list(range(50)) and threading.active_count() - before <= 2


def test_what_a_writer_meets_is_raised_where_it_is_waited_for() -> None:
    writers = Writers(1)
    writing = writers.begin(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert writing is not None and isinstance(writing.error(), ZeroDivisionError)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_system_without_threads_to_spare_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    writers = Writers(1)

    def none(thread: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        assert writers.begin(lambda: None) is None and writers.begin(lambda: None) is None
    writing = writers.begin(lambda: None)
    assert writing is not None and writing.error() is None
