"""Bytes in a folder: Part-10 files under names derived from digests, never from a peer's text.

    <root>/aa/<64 hex digits>.dcm     256 shard folders, made and synced at install
    <root>/tmp/                       only where the file system has no nameless files (O_TMPFILE)

The digits are SHA-256 over the transfer syntax UID and the data set's own digest (BLAKE3), so one name means one
content: a name that is taken is the same object, already there. How a file comes into its place: `spool`.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from dicom_node.digests import digest_of_file, digest_text, is_old, old_digest_of
from dicom_node.errors import InvalidInstance, NotFound
from dicom_node.interfaces import ArchivedObject, JournaledObject
from dicom_node.model import ArchivedFile, StoredInstance
from dicom_node.store.buffers import BLOCK, RecordBuffers
from dicom_node.store.fs import FileSystem, RealFileSystem, sync_folder
from dicom_node.store.journal import Journal
from dicom_node.store.part10 import build_file_meta, parse_file_meta
from dicom_node.store.pressure import Pressure, Volume
from dicom_node.store.spool import PIECE, FolderSpool, location_of, storage_error, temporary_in
from dicom_node.store.writers import Writers

__all__ = ["FolderArchive"]

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
        self.writers = Writers()
        self.journal: Journal | None = None
        try:
            self._install()
        except OSError as exc:
            raise storage_error("the archive's folders cannot be made", exc) from exc
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
        made_for: str = "",
        for_results: bool = False,
    ) -> FolderSpool:
        """See `interfaces.Archive.begin`."""
        self.pressure.admit(results=for_results)
        meta = build_file_meta(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            source_ae=source_ae,
            made_for=made_for,
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
        temporary = temporary_in(self._tmp)
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
            raise storage_error("free space is unknown", exc) from exc
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
            raise storage_error("a file cannot be removed", exc) from exc

    def sync_names(self, shards: Iterable[str]) -> None:
        """Make removals in these shards durable, each the first two digits of locations. Raises StorageError."""
        for shard in shards:
            try:
                sync_folder(self._fs, self._root / shard)
            except OSError as exc:
                raise storage_error("a folder of the archive cannot be synced", exc) from exc

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
            raise storage_error("the archive cannot be opened", exc) from exc

    def sync(self) -> None:
        """Make every file durable that was named before. Raises OSError. After `watch_writes`."""
        self._fs.syncfs(self._syncing_fd)

    def location_of(self, record: JournaledObject) -> str:
        """Where the file of a journal record belongs."""
        return location_of(record.transfer_syntax_uid, digest_text(record.digest))

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
            raise storage_error("the intake journal cannot be read", exc) from exc
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
            raise storage_error("the intake journal cannot be read", exc) from exc
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
            raise storage_error("an archived file cannot be looked at", exc) from exc
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
            raise storage_error("an archived file cannot be read", exc) from exc
        with mapped, memoryview(mapped) as view, view[meta.data_set_offset :] as data_set:
            yield ArchivedObject(
                sop_class_uid=meta.sop_class_uid,
                sop_instance_uid=meta.sop_instance_uid,
                transfer_syntax_uid=meta.transfer_syntax_uid,
                source_ae=meta.source_ae,
                made_for=meta.made_for,
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


def _is_named_rightly(location: str, transfer_syntax_uid: str, digest: str, data_set: memoryview) -> bool:
    """Whether these bytes belong under that name; files of before BLAKE3 keep theirs."""
    if location == location_of(transfer_syntax_uid, digest):
        return True
    return location == location_of(transfer_syntax_uid, old_digest_of(data_set))
