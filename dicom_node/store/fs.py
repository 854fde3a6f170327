"""The file system behind every durable step, so that tests can make any one of them fail.

`FileSystem` has exactly the calls the archive's promise depends on: file synced, then named, then the folder synced.
Calls raise OSError and nothing else; what it means is decided by the caller.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Protocol

__all__ = ["FileSystem", "RealFileSystem", "sync_folder"]

_libc = ctypes.CDLL(None, use_errno=True)

FOLDER_MODE = 0o700
FILE_MODE = 0o600


class FileSystem(Protocol):
    """Calls on one file system. Descriptors are the caller's to close."""

    def mkdir(self, path: Path) -> None:
        """Create a folder only its owner may enter; one that exists is fine."""
        ...

    def open_folder(self, path: Path) -> int:
        """A descriptor of a folder, for `link`, `rename`, `unlink` and `fsync_dir`."""
        ...

    def open_tmpfile(self, folder: Path) -> int:
        """A new file without a name in `folder`'s file system: a crash leaves nothing of it."""
        ...

    def open_direct_tmpfile(self, folder: Path) -> int:
        """As `open_tmpfile`, past the system's cache (O_DIRECT): whole blocks of aligned memory only."""
        ...

    def create(self, path: Path) -> int:
        """A new file with a name. Raises FileExistsError."""
        ...

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        """Append some of `data`; returns how much."""
        ...

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file to its length."""
        ...

    def fsync(self, fd: int) -> None:
        """Make a file's bytes survive a power cut. After a failure the file must not be used."""
        ...

    def fsync_dir(self, fd: int) -> None:
        """Make a folder's names survive a power cut."""
        ...

    def link(self, fd: int, name: str, folder_fd: int) -> None:
        """Give the open file a name. Raises FileExistsError, never replaces."""
        ...

    def link_path(self, fd: int, path: str) -> None:
        """As `link`, without a descriptor of the folder: for names that are made durable later, all at once."""
        ...

    def open_direct(self, path: Path, *, create: bool) -> int:
        """A file past the system's cache (O_DIRECT), new or there already. EINVAL where there is no such thing."""
        ...

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write some of `data` at a place; returns how much."""
        ...

    def fdatasync(self, fd: int) -> None:
        """Make the bytes of a file whose size does not change survive a power cut."""
        ...

    def syncfs(self, fd: int) -> None:
        """Make all that was written to the file system of an open folder survive a power cut, names too.

        A descriptor tells of every write that failed since it was opened: keep one for as long as that matters.
        """
        ...

    def rename(self, source: Path, name: str, folder_fd: int) -> None:
        """Move a file to its name, replacing what is there, in one step."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a name. Raises FileNotFoundError."""
        ...

    def statvfs(self, path: Path) -> os.statvfs_result:
        """Space on the file system."""
        ...

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        ...


class RealFileSystem:
    """Linux."""

    def mkdir(self, path: Path) -> None:
        """Create a folder, mode 0700."""
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)

    def open_folder(self, path: Path) -> int:
        """Open a folder."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_tmpfile(self, folder: Path) -> int:
        """Open a nameless file (O_TMPFILE). Where there is no such thing: EOPNOTSUPP, EISDIR or EINVAL."""
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, FILE_MODE)

    def open_direct_tmpfile(self, folder: Path) -> int:
        """Open a nameless file past the cache. Where there is no such thing: as `open_tmpfile`."""
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT | os.O_CLOEXEC, FILE_MODE)

    def create(self, path: Path) -> int:
        """Create a named file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        """Append."""
        return os.write(fd, data)

    def truncate(self, fd: int, length: int) -> None:
        """Cut."""
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        """Sync a file."""
        os.fsync(fd)

    def fsync_dir(self, fd: int) -> None:
        """Sync a folder."""
        os.fsync(fd)

    def link(self, fd: int, name: str, folder_fd: int) -> None:
        """Name an open file through /proc: no CAP_DAC_READ_SEARCH needed, unlike AT_EMPTY_PATH.

        `dst_dir_fd` makes Python call linkat with AT_SYMLINK_FOLLOW; plain link() would try to link the symlink.
        """
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)

    def link_path(self, fd: int, path: str) -> None:
        """Name an open file through /proc; `path` is absolute, so the folder given is looked at by Python only."""
        os.link(f"/proc/self/fd/{fd}", path, dst_dir_fd=fd, follow_symlinks=True)

    def open_direct(self, path: Path, *, create: bool) -> int:
        """Open past the cache."""
        flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        return os.open(path, flags, FILE_MODE)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at a place."""
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        """Sync a file's bytes."""
        os.fdatasync(fd)

    def syncfs(self, fd: int) -> None:
        """Sync a file system; by the C library, for Python has no name for it."""
        if _libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def rename(self, source: Path, name: str, folder_fd: int) -> None:
        """Move into a folder."""
        os.rename(source, name, dst_dir_fd=folder_fd)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        os.unlink(path)

    def statvfs(self, path: Path) -> os.statvfs_result:
        """Space."""
        return os.statvfs(path)

    def close(self, fd: int) -> None:
        """Close."""
        os.close(fd)


def sync_folder(fs: FileSystem, folder: Path) -> None:
    """Make the names in a folder survive a power cut. Raises OSError."""
    fd = fs.open_folder(folder)
    try:
        fs.fsync_dir(fd)
    finally:
        fs.close(fd)
