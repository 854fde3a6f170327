"""Bytes in a folder: Part-10 files under names derived from digests, never from a peer's text.

    <root>/aa/<64 hex digits>.dcm     256 shard folders, made and synced at install
    <root>/tmp/                       only where the file system has no nameless files (O_TMPFILE)

The digits are SHA-256 over the transfer syntax UID and the data set's own digest (BLAKE3), so one name means one
content: a name that is taken is the same object, already there. Order per object: sync the file, name it, sync the
folder; or, with an intake journal, append it there, then name the file and leave it to the journal to sync it.

Files of some size are written past the system's cache: where that is full, as it is on a node that has run for an hour,
making room in it costs five times the processor time of the write itself. What does not fit into a buffer is not given
to the journal: writing it twice takes longer than the syncs that are spared.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from dicom_node.digests import digest_of_file, digest_text, is_old, new_digest, old_digest_of
from dicom_node.errors import InvalidInstance, NotFound, StorageError
from dicom_node.interfaces import ArchivedObject, JournaledObject
from dicom_node.model import ArchivedFile, JournalPlace, Receipt, StoredInstance
from dicom_node.store.buffers import BLOCK, RecordBuffer, RecordBuffers, blocks
from dicom_node.store.fs import FileSystem, RealFileSystem, sync_folder
from dicom_node.store.journal import Journal
from dicom_node.store.part10 import build_file_meta, parse_file_meta
from dicom_node.store.pressure import Pressure, Volume

__all__ = ["FolderArchive", "FolderSpool"]

PIECE = 64 * 1024  # bytes read at once to compare
HASHED = 256 * 1024  # bytes hashed at once while more come: each call hands the interpreter's lock to another thread
DIRECT = 256 * 1024  # bytes of a file from which on it is written past the cache; smaller ones are no dearer in it
PROBE = 4096  # bytes
_LOCATION = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}\.dcm")
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


class FolderArchive:
    """`interfaces.Archive` on one file system. Many processes may use one root at a time."""

    def __init__(
        self,
        root: Path,
        *,
        fs: FileSystem | None = None,
        reserve_bytes: int = 0,
        reserve_ratio: float = 0.0,
        pressure: Pressure | None = None,
    ) -> None:
        """`root` is made if need be (StorageError if it cannot be); free space below the larger reserve is not used but
        for results. `pressure` decides what is begun; without it the reserve alone does.
        """
        self._root = root.absolute()
        self._root_text = str(self._root)
        self._fs: FileSystem = fs or RealFileSystem()
        self._volume = Volume(path=self._root, reserve_bytes=reserve_bytes, reserve_ratio=reserve_ratio)
        self.pressure = pressure or Pressure(self._fs, (self._volume,))
        self._tmp = root / "tmp"
        self._syncing_fd = -1
        self.buffers = RecordBuffers()
        self.journal: Journal | None = None
        try:
            self._install()
        except OSError as exc:
            raise _storage_error("the archive's folders cannot be made", exc) from exc
        self._takes_direct = self._try_direct()

    def _install(self) -> None:
        self._fs.mkdir(self._root)
        for number in range(256):
            self._fs.mkdir(self._root / f"{number:02x}")
        self._fs.mkdir(self._tmp)
        # a new folder is only durable with its parent's entry
        for folder in (self._root, self._root.parent):
            sync_folder(self._fs, folder)

    def _try_direct(self) -> bool:
        """Whether nameless files can be written past the cache here, in blocks of ours."""
        buffer = self.buffers.take()
        try:
            fd = self._fs.open_direct_tmpfile(self._root)
            try:
                return self._fs.write(fd, buffer.memory[:BLOCK]) == BLOCK
            finally:
                self._fs.close(fd)
        except OSError:
            return False
        finally:
            self.buffers.give_back(buffer)

    def begin(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        source_ae: str,
        for_results: bool = False,
    ) -> FolderSpool:
        """See `interfaces.Archive.begin`."""
        self.pressure.admit(results=for_results)
        meta = build_file_meta(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            source_ae=source_ae,
        )
        admit = partial(self.pressure.admit, results=for_results)
        return FolderSpool(self, self._fs, self._root, meta, transfer_syntax_uid, admit)

    def new_file(self, length: int = 0) -> tuple[int, Path | None, bool]:
        """A file of at least `length` bytes to be, its name where it must have one, and whether it is past the cache.

        Raises OSError.
        """
        if self._takes_direct and length >= DIRECT:
            return self._fs.open_direct_tmpfile(self._root), None, True
        fd, temporary = self._open()
        return fd, temporary, False

    def _open(self) -> tuple[int, Path | None]:
        try:
            return self._fs.open_tmpfile(self._root), None
        except OSError as exc:
            if exc.errno not in _NO_TMPFILE:
                raise
        temporary = _temporary(self._tmp)
        return self._fs.create(temporary), temporary

    def probe(self) -> None:
        """Write and sync a little, so that `pressure` knows how the disk does also while nothing is received."""
        try:
            fd, temporary = self._open()
        except OSError:
            return  # the pressure was told
        try:
            with suppress(OSError):
                self._fs.write(fd, bytes(PROBE))
                self._fs.fsync(fd)
        finally:
            self._fs.close(fd)
            if temporary is not None:
                with suppress(OSError):
                    self._fs.unlink(temporary)

    def path(self, location: str) -> str:
        """See `interfaces.Archive.path`."""
        if not _LOCATION.fullmatch(location):
            raise NotFound("this is no location in the archive")
        return f"{self._root_text}/{location}"  # a tenth of what joining paths costs, for every image that is sent

    def free_bytes(self) -> int:
        """See `interfaces.Archive.free_bytes`. Raises StorageError when the file system does not say."""
        try:
            space = self._fs.statvfs(self._root)
        except OSError as exc:
            raise _storage_error("free space is unknown", exc) from exc
        total = space.f_blocks * space.f_frsize
        return space.f_bavail * space.f_frsize - self._volume.reserve(total)

    def locations(self) -> Iterator[str]:
        """See `interfaces.Archive.locations`; in the order of their names."""
        for number in range(256):
            shard = f"{number:02x}"
            try:
                names = sorted(os.listdir(self._root / shard))
            except FileNotFoundError:
                continue
            for name in names:
                location = f"{shard}/{name}"
                if _LOCATION.fullmatch(location):
                    yield location

    def remove(self, location: str) -> None:
        """See `interfaces.Archive.remove`. Raises StorageError."""
        try:
            self._fs.unlink(Path(self.path(location)))
        except FileNotFoundError:
            return
        except OSError as exc:
            raise _storage_error("a file cannot be removed", exc) from exc

    def sync_names(self, shards: Iterable[str]) -> None:
        """Make removals in these shards durable, each the first two digits of locations. Raises StorageError."""
        for shard in shards:
            try:
                sync_folder(self._fs, self._root / shard)
            except OSError as exc:
                raise _storage_error("a folder of the archive cannot be synced", exc) from exc

    # --- the intake journal

    def settled(self, file: ArchivedFile, *, kept: bool = True) -> None:
        """See `interfaces.Archive.settled`."""
        if self.journal is not None and file.journal is not None:
            self.journal.settled(file.journal, kept=kept)

    def watch_writes(self) -> None:
        """From now on `sync` tells of every write that failed. Raises StorageError."""
        if self._syncing_fd >= 0:
            return
        try:
            self._syncing_fd = self._fs.open_folder(self._root)
        except OSError as exc:
            raise _storage_error("the archive cannot be opened", exc) from exc

    def sync(self) -> None:
        """Make every file durable that was named before. Raises OSError. After `watch_writes`."""
        self._fs.syncfs(self._syncing_fd)

    def location_of(self, record: JournaledObject) -> str:
        """Where the file of a journal record belongs."""
        return _location(record.transfer_syntax_uid, digest_text(record.digest))

    def put_back(self, record: JournaledObject, *, durable: bool = False) -> ArchivedFile | None:
        """See that the file of a journal record is in its place with its bytes.

        One that is `doubtful` is written anew, even where it seems to be: after a failed sync the system's memory may
        show bytes that are not on disk, also to the next process. `sync` makes it durable, or `durable` does by itself.
        None for a record that was never whole. A file meta that is there already stays, for rows say how long it is.
        Raises StorageError.
        """
        try:
            piece = record.read(0, PIECE)  # the file meta, and of a small object all
        except OSError as exc:
            raise _storage_error("the intake journal cannot be read", exc) from exc
        if not record.doubtful and not durable and (there := self._as_it_was(record, piece)) is not None:
            return there
        meta = self._meta_to_keep(record, piece[: record.meta_length])
        spool = FolderSpool(self, self._fs, self._root, meta, record.transfer_syntax_uid, lambda: None)
        try:
            spool.write(memoryview(piece)[record.meta_length :])
            offset = len(piece)
            while offset < record.length and (piece := record.read(offset, PIECE)):
                spool.write(piece)
                offset += len(piece)
            if spool.sha256 != digest_text(record.digest):
                return None
            return spool.put_back(record.place, durable=durable)
        except OSError as exc:
            raise _storage_error("the intake journal cannot be read", exc) from exc
        finally:
            spool.discard()

    def _as_it_was(self, record: JournaledObject, beginning: bytes) -> ArchivedFile | None:
        """The file that is there, if it ends in the very bytes of the record's data set; None otherwise."""
        location, length = self.location_of(record), record.length - record.meta_length
        try:
            with open(self.path(location), "rb", buffering=0) as file:
                start = os.fstat(file.fileno()).st_size - length
                head = file.read(min(start, PIECE)) if start > 0 else b""
                if parse_file_meta(memoryview(head)).data_set_offset != start:
                    return None
                wanted, offset = beginning[record.meta_length :], record.meta_length
                while wanted:
                    if file.read(len(wanted)) != wanted:
                        return None
                    offset += len(wanted)
                    wanted = record.read(offset, PIECE)
        except (OSError, InvalidInstance):
            return None
        return ArchivedFile(
            location=location,
            data_set_offset=start,
            data_set_length=length,
            sha256=digest_text(record.digest),
            journal=record.place,
        )

    def _meta_to_keep(self, record: JournaledObject, own: bytes) -> bytes:
        """File meta of the same object as it stands in the archive, of another sender maybe, or else the record's."""
        try:
            with open(self.path(self.location_of(record)), "rb", buffering=0) as file:
                start = file.read(PIECE)
            there, ours = parse_file_meta(memoryview(start)), parse_file_meta(memoryview(own))
        except (OSError, InvalidInstance):
            return own
        same = (there.sop_instance_uid, there.transfer_syntax_uid) == (ours.sop_instance_uid, ours.transfer_syntax_uid)
        return start[: there.data_set_offset] if same else own

    def close(self) -> None:
        """Give descriptors back. Idempotent."""
        if self._syncing_fd >= 0:
            fd, self._syncing_fd = self._syncing_fd, -1
            self._fs.close(fd)

    def sweep(self) -> int:
        """Remove what a crash left in `tmp`; returns how many. Only while no other process receives."""
        removed = 0
        for leftover in list(self._tmp.iterdir()) if self._tmp.is_dir() else []:
            leftover.unlink(missing_ok=True)
            removed += 1
        return removed

    def status(self, location: str) -> tuple[int, float] | None:
        """See `interfaces.CheckedArchive.status`."""
        try:
            info = os.stat(self.path(location))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _storage_error("an archived file cannot be looked at", exc) from exc
        return info.st_size, info.st_mtime

    @contextmanager
    def examine(self, location: str) -> Iterator[ArchivedObject]:
        """See `interfaces.CheckedArchive.examine`."""
        try:
            with open(self.path(location), "rb") as file:
                info = os.fstat(file.fileno())
                meta = parse_file_meta(memoryview(os.pread(file.fileno(), PIECE, 0)))
                # read before it is mapped: a bad block is an error here and would be a SIGBUS there
                sha256 = digest_of_file(file.fileno(), meta.data_set_offset)
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except FileNotFoundError:
            raise NotFound("the archive has no such file") from None
        except OSError as exc:
            raise _storage_error("an archived file cannot be read", exc) from exc
        with mapped, memoryview(mapped) as view, view[meta.data_set_offset :] as data_set:
            yield ArchivedObject(
                sop_class_uid=meta.sop_class_uid,
                sop_instance_uid=meta.sop_instance_uid,
                transfer_syntax_uid=meta.transfer_syntax_uid,
                source_ae=meta.source_ae,
                file=ArchivedFile(
                    location=location,
                    data_set_offset=meta.data_set_offset,
                    data_set_length=len(data_set),
                    sha256=sha256,
                ),
                named_rightly=_is_named_rightly(location, meta.transfer_syntax_uid, sha256, data_set),
                written_at=datetime.fromtimestamp(info.st_mtime, UTC),
                data_set=data_set,
            )

    def is_whole(self, instance: StoredInstance) -> bool:
        """See `interfaces.CheckedArchive.is_whole`."""
        offset, length = instance.data_set_offset, instance.data_set_length
        try:
            with open(instance.path, "rb") as file:
                is_as_long = os.fstat(file.fileno()).st_size == offset + length
                return (
                    is_as_long and digest_of_file(file.fileno(), offset, old=is_old(instance.sha256)) == instance.sha256
                )
        except OSError:
            return False


class FolderSpool:
    """`interfaces.Spool`: one data set on its way in. Not for two threads at a time."""

    def __init__(
        self,
        archive: FolderArchive,
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
        """See `interfaces.Spool.write`: memory stays within one buffer whatever the fragment's size."""
        view = memoryview(fragment)
        while len(view):
            room = len(self._bytes) - self._filled
            if not room:
                self._admit()  # one large object must not use up what is kept for others
                self._flush()
                self._before += self._filled
                self._filled = self._written = self._hashed = 0
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

    def _flush(self) -> None:
        """Hash and write what is in the buffer: all of it full, or the last part of the file. Raises StorageError."""
        self._hash(self._filled)
        try:
            self._write()
        except OSError as exc:
            raise _storage_error("a received object cannot be written", exc) from exc

    def _write(self) -> None:
        if self._fd < 0:
            self._fd, self._temporary, self._is_direct = self._archive.new_file(self._filled)
        end = blocks(self._filled) if self._is_direct else self._filled
        if self._written >= end:
            return
        if end > self._filled:
            self._bytes[self._filled : end] = bytes(end - self._filled)
        while self._written < end:
            self._written += self._fs.write(self._fd, self._bytes[self._written : end])
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
                raise _storage_error("a received object cannot be read back", exc) from exc
            self._view = memoryview(self._map)[self._meta_length :]
        return self._view

    def commit(self, receipt: Receipt | None = None) -> ArchivedFile:
        """See `interfaces.Spool.commit`. The spool is closed afterwards, whatever happens."""
        try:
            if self._before:
                self._flush()
            self._hash(self._filled)
            digest = self._digest.digest()
            location = _location(self._transfer_syntax_uid, digest_text(digest))
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
                raise _storage_error("a received object cannot be made durable", exc) from exc
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
            location = _location(self._transfer_syntax_uid, digest)
            try:
                if durable:
                    self._fs.fsync(self._fd)
                    self._name(location, anew=True)
                else:
                    self._name_for_now(location, anew=True)
            except OSError as exc:
                raise _storage_error("an object of the intake journal cannot be put in its place", exc) from exc
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
        temporary = _temporary(self._root / "tmp")
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


def _is_named_rightly(location: str, transfer_syntax_uid: str, digest: str, data_set: memoryview) -> bool:
    """Whether these bytes belong under that name; files of before BLAKE3 keep theirs."""
    if location == _location(transfer_syntax_uid, digest):
        return True
    return location == _location(transfer_syntax_uid, old_digest_of(data_set))


def _location(transfer_syntax_uid: str, digest: str) -> str:
    # hashing the digest instead of the bytes a second time; the transfer syntax is part of what the bytes mean
    name = hashlib.sha256(f"{transfer_syntax_uid} {digest}".encode()).hexdigest()
    return f"{name[:2]}/{name}.dcm"


def _temporary(folder: Path) -> Path:
    return folder / f"{secrets.token_hex(16)}.part"


def _storage_error(what: str, exc: OSError) -> StorageError:
    # never str(exc): it may name paths; the symbol says all
    return StorageError(f"{what}: {errno.errorcode.get(exc.errno or 0, 'I/O error')}")
