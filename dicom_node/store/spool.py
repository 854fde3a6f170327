"""One data set on its way into the archive's folder: gathered, hashed, made durable, named.

Order per object: sync the file, name it, sync the folder; or, with an intake journal, append it there, then name the
file and leave it to the journal to sync it.

Files of some size are written past the system's cache: where that is full, as it is on a node that has run for an hour,
making room in it costs five times the processor time of the write itself. What does not fit into a buffer is not given
to the journal: writing it twice takes longer than the syncs that are spared.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from dicom_node.digests import digest_text, new_digest
from dicom_node.errors import InvalidInstance, StorageError
from dicom_node.model import ArchivedFile, JournalPlace, Receipt
from dicom_node.store.buffers import RecordBuffer, RecordBuffers, blocks
from dicom_node.store.fs import FileSystem
from dicom_node.store.journal import Journal
from dicom_node.store.part10 import parse_file_meta
from dicom_node.store.writers import Writers, Writing

__all__ = ["PIECE", "FolderSpool", "SpoolFolder", "location_of", "storage_error", "temporary_in"]

PIECE = 64 * 1024  # bytes read at once to compare
HASHED = 256 * 1024  # bytes hashed at once while more come: each call hands the interpreter's lock to another thread


class SpoolFolder(Protocol):
    """What a spool needs of the archive it is for."""

    buffers: RecordBuffers
    writers: Writers
    journal: Journal | None

    def new_file(self, length: int = 0) -> tuple[int, Path | None, bool]:
        """See `folder.FolderArchive.new_file`."""
        ...

    def path(self, location: str) -> str:
        """See `interfaces.Archive.path`."""
        ...


class FolderSpool:
    """`interfaces.Spool`: one data set on its way in. Not for two threads at a time."""

    def __init__(
        self,
        archive: SpoolFolder,
        fs: FileSystem,
        root: Path,
        meta: bytes,
        transfer_syntax_uid: str,
        admit: Callable[[], None],
    ) -> None:
        self._fs = fs
        self._admit = admit
        self._root = root
        self._fd = -1  # there is none before something is written
        self._temporary: Path | None = None
        self._is_direct = False
        self._meta_length = len(meta)
        self._transfer_syntax_uid = transfer_syntax_uid
        self._archive = archive
        self._faults = archive.journal.faults if archive.journal is not None else 0
        self._buffer: RecordBuffer | None = archive.buffers.take()
        self._bytes = self._buffer.file  # of the file: all of it while it fits, then the last part
        self._bytes[: len(meta)] = meta
        self._filled = len(meta)
        self._written = 0  # of what is filled
        self._before = 0  # bytes of the file that are no longer in the buffer
        self._writing: Writing | None = None  # of the part before the buffer's
        self._broken = False  # a part of the file is missing, or not there yet
        self._digest = new_digest()
        self._hashed = len(meta)  # of what is filled; the meta information is not of the data set
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._created = False
        self._offset = len(meta)  # of the data set in the file that keeps it; another's envelope may be longer

    @property
    def length(self) -> int:
        """Data set bytes so far."""
        return self._before + self._filled - self._meta_length

    @property
    def sha256(self) -> str:
        """Of the data set bytes so far."""
        self._hash(self._filled)
        return digest_text(self._digest.digest())

    @property
    def created(self) -> bool:
        """After `commit`: whether the name is new, that is whether removing the file takes it from nobody else."""
        return self._created

    def write(self, fragment: bytes | memoryview) -> None:
        """See `interfaces.Spool.write`: memory stays within a buffer, and those of the writers, whatever its size."""
        if self._view is not None:
            raise ValueError("a spool that was looked at takes no more")  # its file has its length
        view = memoryview(fragment)
        while len(view):
            room = len(self._bytes) - self._filled
            if not room:
                self._admit()  # one large object must not use up what is kept for others
                self._hand_over()
                continue
            part, view = view[:room], view[room:]
            self._bytes[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled - self._hashed >= HASHED:
                self._hash(self._filled)

    def _hash(self, end: int) -> None:
        if end > self._hashed:
            self._digest.update(self._bytes[self._hashed : end])
            self._hashed = end

    def _hand_over(self) -> None:
        """Have the full buffer written, by another thread if one is free, and go on with an empty one.

        One part is under way at a time. Raises StorageError.
        """
        self._hash(self._filled)
        full = self._buffer
        assert full is not None
        try:
            self._settle()
            self._open()
            empty = self._archive.buffers.take()
            writing = self._archive.writers.begin(partial(self._put_away, full, self._filled))
            if writing is None:
                self._archive.buffers.give_back(empty)
                self._write()
            else:
                self._writing, self._buffer, self._bytes = writing, empty, empty.file
        except OSError as exc:
            raise storage_error("a received object cannot be written", exc) from exc
        self._before += self._filled
        self._filled = self._written = self._hashed = 0

    def _settle(self) -> None:
        """Wait for the part that is under way. Raises OSError, also when an earlier one could not be written."""
        if self._writing is not None:
            error = self._writing.error()  # interrupted, it is under way still: `discard` will wait again
            self._writing = None
            if error is not None:
                raise error
        if self._broken:
            raise OSError(errno.EIO, "a part of the file is missing")

    def _flush(self) -> None:
        """Hash and write what is in the buffer: all of it full, or the last part of the file. Raises StorageError."""
        self._hash(self._filled)
        try:
            self._write()
        except OSError as exc:
            raise storage_error("a received object cannot be written", exc) from exc

    def _open(self) -> None:
        if self._fd < 0:
            self._fd, self._temporary, self._is_direct = self._archive.new_file(self._filled)

    def _put(self, part: memoryview) -> None:
        """Append it. Raises OSError, and nothing may be appended after it then."""
        self._broken = True
        done = 0
        while done < len(part):
            done += self._fs.write(self._fd, part[done:])
        self._broken = False

    def _put_away(self, buffer: RecordBuffer, end: int) -> None:
        """On a writer's thread: append a part. The buffer is free then, however long the peer takes for the next."""
        try:
            self._put(buffer.file[:end])
        finally:
            self._archive.buffers.give_back(buffer)

    def _write(self) -> None:
        self._settle()
        self._open()
        end = blocks(self._filled) if self._is_direct else self._filled
        if self._written >= end:
            return
        if end > self._filled:
            self._bytes[self._filled : end] = bytes(end - self._filled)
        self._put(self._bytes[self._written : end])
        self._written = end
        if end > self._filled:
            self._fs.truncate(self._fd, self._before + self._filled)

    def view(self) -> memoryview:
        """See `interfaces.Spool.view`. Raises StorageError."""
        if not self._before:
            return self._bytes[self._meta_length : self._filled].toreadonly()
        if self._view is None:
            self._flush()
            try:
                self._map = mmap.mmap(self._fd, self._meta_length + self.length, prot=mmap.PROT_READ)
            except OSError as exc:
                raise storage_error("a received object cannot be read back", exc) from exc
            self._view = memoryview(self._map)[self._meta_length :]
        return self._view

    def commit(self, receipt: Receipt | None = None) -> ArchivedFile:
        """See `interfaces.Spool.commit`. The spool is closed afterwards, whatever happens."""
        try:
            if self._before:
                self._flush()
            self._hash(self._filled)
            digest = self._digest.digest()
            location = location_of(self._transfer_syntax_uid, digest_text(digest))
            place = None if receipt is None else self._journal(receipt, digest)
            try:
                self._write()
                if place is None:
                    self._fs.fsync(self._fd)
                    self._name(location)
                else:
                    self._name_for_now(location)
            except OSError as exc:
                if place is not None and self._archive.journal is not None:
                    self._archive.journal.settled(place, kept=False)
                raise storage_error("a received object cannot be made durable", exc) from exc
            return self._archived(location, digest_text(digest), place)
        finally:
            self.discard()

    def _archived(self, location: str, digest: str, place: JournalPlace | None) -> ArchivedFile:
        return ArchivedFile(
            location=location,
            data_set_offset=self._offset,
            data_set_length=self.length,
            sha256=digest,
            journal=place,
        )

    def _journal(self, receipt: Receipt, digest: bytes) -> JournalPlace | None:
        journal = self._archive.journal
        if journal is None or self._buffer is None or self._before:
            return None
        return journal.append(
            receipt,
            self._buffer,
            length=self._filled,
            meta_length=self._meta_length,
            transfer_syntax_uid=self._transfer_syntax_uid,
            digest=digest,
            faults=self._faults,
        )

    def _name_for_now(self, location: str, *, anew: bool = False) -> None:
        """Give the file its name; the journal makes file and name durable, and holds all of it until then."""
        if self._temporary is None:
            try:
                self._fs.link_path(self._fd, self._archive.path(location))
                self._created = True
                return
            except FileExistsError:
                if not anew and self._same_bytes(self._root / location, durable=False):
                    return
        self._name(location, durable=False, anew=anew)

    def put_back(self, place: JournalPlace, *, durable: bool) -> ArchivedFile:
        """See `FolderArchive.put_back`; the journal holds all of it already. The spool is closed afterwards."""
        try:
            self._flush()
            digest = digest_text(self._digest.digest())
            location = location_of(self._transfer_syntax_uid, digest)
            try:
                if durable:
                    self._fs.fsync(self._fd)
                    self._name(location, anew=True)
                else:
                    self._name_for_now(location, anew=True)
            except OSError as exc:
                raise storage_error("an object of the intake journal cannot be put in its place", exc) from exc
            return self._archived(location, digest, place)
        finally:
            self.discard()

    def _name(self, location: str, *, durable: bool = True, anew: bool = False) -> None:
        shard, name = location.split("/")
        folder_fd = self._fs.open_folder(self._root / shard)
        try:
            self._place(name, folder_fd, self._root / location, durable=durable, anew=anew)
            try:
                if durable:
                    self._fs.fsync_dir(folder_fd)
            except OSError:
                if self._created:
                    with suppress(OSError):
                        self._fs.unlink(self._root / location)
                    self._created = False
                raise
        finally:
            self._fs.close(folder_fd)

    def _place(self, name: str, folder_fd: int, target: Path, *, durable: bool, anew: bool = False) -> None:
        """Name the file, unless it is there already with these very bytes; `durable`: then sync that one."""
        if self._temporary is None:
            try:
                self._fs.link(self._fd, name, folder_fd)
            except FileExistsError:
                if anew or not self._same_bytes(target, durable=durable):
                    self._replace(name, folder_fd)
            else:
                self._created = True
        elif not target.exists():
            self._fs.rename(self._temporary, name, folder_fd)
            self._temporary, self._created = None, True
        elif anew or not self._same_bytes(target, durable=durable):
            self._fs.rename(self._temporary, name, folder_fd)
            self._temporary = None

    def _replace(self, name: str, folder_fd: int) -> None:
        # What lies under this name was damaged on disk since; put the good bytes in its place in one step.
        temporary = temporary_in(self._root / "tmp")
        tmp_fd = self._fs.open_folder(temporary.parent)
        try:
            self._fs.link(self._fd, temporary.name, tmp_fd)
        finally:
            self._fs.close(tmp_fd)
        try:
            self._fs.rename(temporary, name, folder_fd)
        except OSError:
            with suppress(OSError):
                self._fs.unlink(temporary)
            raise

    def _same_bytes(self, target: Path, *, durable: bool) -> bool:
        """Whether `target` still holds our data set: an acknowledgement must not rest on a file that rotted.

        `durable`: nor on one that only the system's memory holds, because the journal it came by keeps it so far.
        """
        try:
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        own = -1
        try:
            own = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)  # ours may be past the cache
            start = parse_file_meta(memoryview(os.pread(fd, PIECE, 0))).data_set_offset
            if os.fstat(fd).st_size - start != self.length:
                return False
            for offset in range(0, self.length, PIECE):
                if os.pread(fd, PIECE, start + offset) != os.pread(own, PIECE, self._meta_length + offset):
                    return False
            if durable:
                self._fs.fsync(fd)
            self._offset = start
            return True
        except (InvalidInstance, OSError):
            return False
        finally:
            os.close(fd)
            if own >= 0:
                os.close(own)

    def discard(self) -> None:
        """See `interfaces.Spool.discard`."""
        with suppress(Exception):  # its descriptor and its buffer must not be given to others before
            self._settle()
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._map is not None:
            with suppress(BufferError):  # a caller still holds a slice: the mapping ends with it
                self._map.close()
            self._map = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(OSError):
                self._fs.close(fd)
        if self._temporary is not None:
            with suppress(OSError):  # `sweep` finds it
                self._fs.unlink(self._temporary)
            self._temporary = None
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            self._archive.buffers.give_back(buffer)


def location_of(transfer_syntax_uid: str, digest: str) -> str:
    """Where content belongs in the archive: its name says what it is."""
    # hashing the digest instead of the bytes a second time; the transfer syntax is part of what the bytes mean
    name = hashlib.sha256(f"{transfer_syntax_uid} {digest}".encode()).hexdigest()
    return f"{name[:2]}/{name}.dcm"


def temporary_in(folder: Path) -> Path:
    """A name nobody has."""
    return folder / f"{secrets.token_hex(16)}.part"


def storage_error(what: str, exc: OSError) -> StorageError:
    """What an error of the disk becomes: never its text, for it may name paths; the symbol says all."""
    return StorageError(f"{what}: {errno.errorcode.get(exc.errno or 0, 'I/O error')}")
