"""The intake journal: received objects become durable by one write into a file that is there already.

A file of its own, its name and its index row cost three syncs an object. Here an object is appended to a preallocated
segment (O_DIRECT, then durable), and acknowledged; its file and its row are written as well, at once, but left to the
system to bring to disk. When a segment is full one `syncfs` does that for all of its objects; then the segment is used
again. What a crash leaves in the segments is replayed at the next start, before anything is received.

    <data>/journal/<number>/   one folder for each receiver process, locked by it
        lock
        segment-<n>
        doubt                  a sync has failed: what memory shows of files is not to be believed

Bounds: `max_segments` of `segment_bytes`; where there is no room in time, `append` says so, and the caller makes the
object durable by itself. Every failure of the disk ends in that path too, and never in an acknowledgement.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dicom_node.errors import InvalidInstance, NodeError, StorageError
from dicom_node.interfaces import JournaledObject
from dicom_node.model import JournalPlace, Receipt
from dicom_node.store.buffers import BLOCK, BUFFER, RecordBuffer, RecordBuffers, blocks
from dicom_node.store.fs import FileSystem, sync_folder
from dicom_node.store.segments import NAME_BYTES, Head, pack_head, pack_segment, read_heads, read_segment

__all__ = ["Journal"]

log = logging.getLogger(__name__)

WAIT_S = 2.0  # for a segment to become free: the disk is busy, and syncing each object would not help it
IDLE_S = 5.0  # records of a segment that nobody appends to are brought to disk after this long
CLOSE_S = 30.0
RETRY_S = 30.0  # after a failure
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class _State(Enum):
    FREE = "free"
    ACTIVE = "active"  # appended to
    FULL = "full"  # waits until all of its records are settled, then to be synced


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int  # O_DIRECT
    name: bytes
    size: int
    state: _State = _State.FREE
    end: int = BLOCK
    unsettled: int = 0
    doubtful: bool = False  # a sync failed while it was in use: its files are not known to be on disk
    touched: float = 0.0  # monotonic


class Journal:
    """One process's journal. Threads append at the same time; one thread of its own brings segments to disk.

    Not in use, every `append` is refused, until `begin`.
    """

    def __init__(
        self,
        folder: Path,
        fs: FileSystem,
        buffers: RecordBuffers,
        *,
        segment_bytes: int,
        max_segments: int,
        sync: Callable[[], None],
        mend: Callable[[Iterable[JournaledObject]], None],
        forget: Callable[[bytes], None],
        has_room: Callable[[int], bool],
    ) -> None:
        """Lock `folder`, made if need be. Raises StorageError, also when another process holds it.

        `sync` makes durable whatever files and rows were written before it was called (OSError, NodeError when it
        cannot); `mend` writes files and rows of records anew, each durable by itself, after a sync has failed;
        `forget` drops the index's notes of a segment's life; `has_room(bytes)`: whether the disk may be used for one
        more segment.
        """
        self._folder, self._fs = folder, fs
        self._size, self._max = blocks(segment_bytes), max_segments
        self._sync, self._mend, self._forget, self._has_room = sync, mend, forget, has_room
        self._buffers = buffers
        self._segments: list[_Segment] = []
        self._active: _Segment | None = None
        self._sequence = 0
        self._guard = threading.Lock()
        self._changed = threading.Condition(self._guard)
        self._wants = threading.Event()  # something for the thread to do
        self._closing = False
        self._thread: threading.Thread | None = None
        self._failed_at = float("-inf")
        self._writing = 0  # threads that use a segment's descriptor
        self.refused = 0  # appends that found no room or a failing disk
        self.faults = 0  # syncs that failed; of a write that failed the system tells only once
        self._lock_fd = -1
        self._doubt = folder / "doubt"
        try:
            fs.mkdir(folder.parent)
            fs.mkdir(folder)
            self._lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise StorageError("the intake journal is in use by another process") from None
        except OSError as exc:
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
            raise StorageError(f"the intake journal cannot be opened: {exc.strerror}") from exc

    # --- after a crash

    def left_behind(self) -> Iterator[JournaledObject]:
        """Every record of the segments as they were found, in the order in which they were made. Before `begin`.

        Raises StorageError when a segment cannot be read.
        """
        found: list[tuple[int, JournaledObject]] = []
        fds: list[int] = []
        doubtful = self._doubt.exists()
        try:
            for path in sorted(self._folder.glob("segment-*")):
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                found += _records(fds[-1], doubtful=doubtful)
            found.sort(key=lambda one: one[0])
            self._sequence = max((sequence for sequence, _ in found), default=0)
            for _, record in found:
                yield record
        except OSError as exc:
            raise StorageError(f"the intake journal cannot be read: {exc.strerror}; mend the disk first") from exc
        except InvalidInstance as exc:
            raise StorageError("the intake journal is of another version of the node; start that one once") from exc
        finally:
            for fd in fds:
                os.close(fd)

    def clear(self) -> None:
        """What was left behind is in its place and indexed: make that durable, and remove the segments.

        Raises StorageError, NodeError when that cannot be done; the journal then stays as it was found.
        """
        paths = sorted(self._folder.glob("segment-*"))
        if not paths:
            return
        try:
            names = [known[0] for path in paths if (known := _segment_of(path)) is not None]
            self._sync_or_doubt()
            for path in paths:
                self._fs.unlink(path)
            self._doubt.unlink(missing_ok=True)
            _sync_folders(self._fs, self._folder)
        except OSError as exc:
            raise StorageError(f"the intake journal cannot be cleared: {exc.strerror}; mend the disk first") from exc
        for name in names:
            self._forget(name)

    def begin(self) -> None:
        """Take it into use; after `clear`. The first objects find no segment yet, and are synced by themselves."""
        self._thread = threading.Thread(target=self._run, name="intake-journal", daemon=True)
        self._thread.start()
        self._wants.set()

    # --- receiving

    def append(
        self,
        receipt: Receipt,
        buffer: RecordBuffer,
        *,
        length: int,
        meta_length: int,
        transfer_syntax_uid: str,
        digest: bytes,
        faults: int,
    ) -> JournalPlace | None:
        """Make one Part-10 file of `length` bytes, in `buffer.file`, durable. None: not here, and nothing was promised.

        `faults`: this journal's before the file was begun; it is refused when a sync failed since, which may have been
        over its own bytes.
        """
        need = BLOCK + blocks(length)
        reserved = self._reserve(need, faults) if need <= self._size - BLOCK else None
        if reserved is None:
            self.refused += 1
            return None
        segment, offset, sequence = reserved
        place = JournalPlace(segment=segment.name, offset=offset)
        head = pack_head(
            segment.name,
            Head(
                sequence=sequence,
                length=length,
                meta_length=meta_length,
                digest=digest,
                transfer_syntax_uid=transfer_syntax_uid,
                receipt=receipt,
            ),
        )
        try:
            if head is None:
                raise OSError("the facts of a received object do not fit into the head of its record")
            buffer.memory[: len(head)] = head
            buffer.memory[BLOCK + length : need] = bytes(need - BLOCK - length)
            self._put(segment.fd, buffer.memory[:need], offset)
            self._fs.fdatasync(segment.fd)
        except OSError as exc:
            self._failed("an object could not be written to the intake journal", exc)
            self.refused += 1
            with self._guard:
                if segment is self._active:
                    segment.state, self._active = _State.FULL, None
                self._settle(segment)
            return None
        finally:
            self._written()
        return place

    def _reserve(self, need: int, faults: int) -> tuple[_Segment, int, int] | None:
        """A place of its own in the active segment, or in the next one; None when none gets free in time."""
        deadline = None
        with self._guard:
            while self._thread is not None and not self._closing and faults == self.faults:
                active = self._active
                if active is not None and active.end + need <= active.size:
                    offset, active.end = active.end, active.end + need
                    active.unsettled += 1
                    active.touched = time.monotonic()
                    self._sequence += 1
                    self._writing += 1
                    return active, offset, self._sequence
                if active is not None:
                    active.state, self._active = _State.FULL, None
                    self._wants.set()
                free = next((one for one in self._segments if one.state is _State.FREE), None)
                if free is not None:
                    free.state, self._active = _State.ACTIVE, free
                    self._wants.set()  # it is time to make the next one
                    continue
                now = time.monotonic()
                deadline = now + WAIT_S if deadline is None else deadline
                if not self._segments or now >= deadline or now < self._failed_at + RETRY_S:
                    return None
                self._changed.wait(deadline - now)
        return None

    def _put(self, fd: int, data: memoryview, offset: int) -> None:
        written = 0
        while written < len(data):
            written += self._fs.pwrite(fd, data[written:], offset + written)

    def _written(self) -> None:
        with self._guard:
            self._writing -= 1
            if self._closing:
                self._changed.notify_all()

    def settled(self, place: JournalPlace, *, kept: bool = True) -> None:
        """The index has noted this record, or it will never be indexed: its segment need not wait for it.

        Not `kept`: nor shall it be found after a crash, as far as the disk allows.
        """
        with self._guard:
            for segment in self._segments:
                if segment.name == place.segment:
                    break
            else:
                return
            if kept or self._closing:
                self._settle(segment)
                return
            self._writing += 1
        try:
            self._put_block(segment.fd, bytes(BLOCK), place.offset)
        except OSError as exc:
            self._failed("a record of the intake journal could not be withdrawn", exc)
        finally:
            self._written()
            with self._guard:
                self._settle(segment)

    def _settle(self, segment: _Segment) -> None:
        """`_guard` held."""
        segment.unsettled -= 1
        if not segment.unsettled and segment.state is _State.FULL:
            self._wants.set()

    # --- bringing it to disk

    def _run(self) -> None:
        try:
            while not self._closing:
                # without a segment nobody asks for one: there may be room for it by now
                self._wants.wait(IDLE_S if self._active or (self._max and not self._segments) else None)
                self._wants.clear()
                self._pause_after_failure()
                try:
                    self._retire_idle()
                    self._mend_doubtful()
                    self._recycle()
                    self._make_ready()
                except (OSError, NodeError) as exc:
                    self._failed("the intake journal could not be brought to disk", exc)
                    self._wants.set()
        finally:
            with self._changed:  # by what nobody foresaw, maybe: then nobody shall wait for a segment
                self._closing = True
                self._changed.notify_all()

    def _pause_after_failure(self) -> None:
        until = self._failed_at + RETRY_S
        with self._changed:
            while not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _retire_idle(self) -> None:
        with self._changed:
            active = self._active
            if active is not None and active.end > BLOCK and time.monotonic() - active.touched >= IDLE_S:
                active.state, self._active = _State.FULL, None

    def _recycle(self) -> None:
        """Every full segment whose records are settled: files and rows to disk, then the segment is free again."""
        done = self._settled_segments(doubtful=False)
        if not done:
            return
        try:
            self._sync_or_doubt()
        except (OSError, NodeError):
            with self._changed:
                # what the system could not write it forgets, whichever segment it is of, and objects on their way too:
                # a second sync would say that all is well
                self.faults += 1
                for segment in self._segments:
                    segment.doubtful = segment.state is not _State.FREE
            raise
        for segment in done:
            self._reset(segment)

    def _sync_or_doubt(self) -> None:
        """Sync; where that fails leave a sign for the next process, for the system tells of it only once.

        Until the machine starts anew its memory shows bytes that are not on disk; the sign need not live longer.
        """
        try:
            self._sync()
        except (OSError, NodeError):
            with suppress(OSError):
                self._doubt.touch(mode=0o600)
            raise

    def _mend_doubtful(self) -> None:
        for segment in self._settled_segments(doubtful=True):
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._mend(record for _, record in _records(fd, doubtful=True))
            finally:
                os.close(fd)
            segment.doubtful = False
            self._reset(segment)

    def _settled_segments(self, *, doubtful: bool) -> list[_Segment]:
        with self._changed:
            return [
                one
                for one in self._segments
                if one.state is _State.FULL and not one.unsettled and one.doubtful is doubtful
            ]

    def _reset(self, segment: _Segment) -> None:
        """A new life under a new name, durable before anything is appended; only then the old notes may go."""
        old, name = segment.name, secrets.token_bytes(NAME_BYTES)
        self._put_block(segment.fd, pack_segment(name, segment.size), 0)
        self._forget(old)
        with self._changed:
            segment.name, segment.end, segment.state = name, BLOCK, _State.FREE
            self._changed.notify_all()

    def _put_block(self, fd: int, block: bytes, offset: int) -> None:
        buffer = self._buffers.take()
        try:
            buffer.memory[:BLOCK] = block
            self._put(fd, buffer.memory[:BLOCK], offset)
            self._fs.fdatasync(fd)
        finally:
            self._buffers.give_back(buffer)

    def _make_ready(self) -> None:
        """One more segment where none is free and the bound allows it, so that nobody has to wait for one."""
        with self._changed:
            ready = any(one.state is _State.FREE for one in self._segments)
            number = len(self._segments)
        if ready or number >= self._max or self._closing or not self._has_room(self._size):
            return
        path = self._folder / f"segment-{number}"
        segment = _Segment(path, -1, secrets.token_bytes(NAME_BYTES), self._size)
        try:
            segment.fd = self._fs.open_direct(path, create=True)
            self._prepare(segment)
        except OSError as exc:
            if segment.fd >= 0:
                self._fs.close(segment.fd)
            with suppress(OSError):
                self._fs.unlink(path)
            if exc.errno not in _NO_DIRECT:  # the latter also where it wants larger blocks than ours
                raise
            self._max = 0
            log.warning("no O_DIRECT here: every received object is synced by itself", extra={"action": "journal_off"})
            return
        with self._changed:
            self._segments.append(segment)
            self._changed.notify_all()

    def _prepare(self, segment: _Segment) -> None:
        """Every block written once: an append must change nothing but data, or it is no cheaper than a new file."""
        zeros = memoryview(mmap.mmap(-1, BUFFER))
        for offset in range(0, segment.size, BUFFER):
            self._put(segment.fd, zeros[: min(BUFFER, segment.size - offset)], offset)
        self._put_block(segment.fd, pack_segment(segment.name, segment.size), 0)
        self._fs.fsync(segment.fd)
        _sync_folders(self._fs, self._folder)

    def _failed(self, what: str, exc: Exception) -> None:
        now = time.monotonic()
        if now > self._failed_at + RETRY_S:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            log.error(what, extra={"action": "journal_failed", "error": reason or type(exc).__name__})
        with self._changed:
            self._failed_at = now
            self._changed.notify_all()

    # --- end

    @property
    def bytes_waiting(self) -> int:
        """Bytes of records that are not yet elsewhere on disk."""
        with self._changed:
            return sum(one.end - BLOCK for one in self._segments if one.state is not _State.FREE)

    def close(self) -> bool:
        """Bring everything to disk, as far as it goes; the rest is replayed at the next start. Idempotent.

        False: something hangs at the disk. Its descriptors must stay as they are until the process ends, for what is
        written to a number that was given away ends in another file.
        """
        if self._lock_fd < 0:
            return True
        deadline = time.monotonic() + CLOSE_S
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._writing, CLOSE_S)
        self._wants.set()
        if self._thread is not None:
            self._thread.join(max(deadline - time.monotonic(), 0.0))
            ended = ended and not self._thread.is_alive()
        if not ended:
            log.error("the intake journal is left as it is: the disk hangs", extra={"action": "journal_left"})
            return False
        self._finish()
        for segment in self._segments:
            with suppress(OSError):
                self._fs.close(segment.fd)
        os.close(self._lock_fd)
        self._lock_fd = -1
        return True

    def _finish(self) -> None:
        with self._changed:
            if self._active is not None:
                self._active.state, self._active = _State.FULL, None
            for segment in self._segments:
                if segment.state is _State.FULL and segment.end == BLOCK:
                    segment.state = _State.FREE
        try:
            self._recycle()
        except (OSError, NodeError) as exc:
            self._failed("the intake journal could not be brought to disk", exc)


def _sync_folders(fs: FileSystem, folder: Path) -> None:
    for one in (folder, folder.parent, folder.parent.parent):
        sync_folder(fs, one)


def _segment_of(path: Path) -> tuple[bytes, int] | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_segment(fd)
    finally:
        os.close(fd)


def _records(fd: int, *, doubtful: bool) -> list[tuple[int, JournaledObject]]:
    known = read_segment(fd)
    if known is None:
        return []
    name, size = known
    return [
        (
            head.sequence,
            JournaledObject(
                place=JournalPlace(segment=name, offset=offset),
                receipt=head.receipt,
                transfer_syntax_uid=head.transfer_syntax_uid,
                length=head.length,
                meta_length=head.meta_length,
                digest=head.digest,
                doubtful=doubtful,
                read=_reader(fd, offset, head),
            ),
        )
        for offset, head in read_heads(fd, name, size)
    ]


def _reader(fd: int, offset: int, head: Head) -> Callable[[int, int], bytes]:
    start, length = offset + BLOCK, head.length
    return lambda at, count: os.pread(fd, max(min(count, length - at), 0), start + at)
