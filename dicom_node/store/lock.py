"""The data folder itself: made if need be, and held by one node. Light: the supervisor loads this and no catalog."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dicom_node.errors import ConfigError, StorageError
from dicom_node.store.fs import FileSystem, RealFileSystem, sync_folder

__all__ = ["data_lock", "make_data_dir", "sync_data_folder"]


@contextmanager
def data_lock(data_dir: Path) -> Iterator[None]:
    """Keep a second node out of `data_dir` for as long as the block, or this process, lives.

    The folder is made if need be. Raises ConfigError, StorageError when the disk fails.
    """
    make_data_dir(RealFileSystem(), data_dir)
    try:
        fd = os.open(data_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"data_dir: {data_dir} cannot be used: {exc.strerror}; name a folder that can") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"data_dir: another node is using {data_dir}; stop it, or give this one its own with --data-dir"
            ) from None
        yield
    finally:
        os.close(fd)


def make_data_dir(fs: FileSystem, data_dir: Path) -> None:
    """Create the folder if need be; a folder that is new is only durable with its parent's entry.

    Raises ConfigError, StorageError.
    """
    try:
        made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir: {data_dir} cannot be used: {exc.strerror}; name a folder that can") from exc
    for folder in made:
        sync_data_folder(fs, folder.parent)


def sync_data_folder(fs: FileSystem, folder: Path) -> None:
    """Make the names in it durable. Raises StorageError."""
    try:
        sync_folder(fs, folder)
    except OSError as exc:
        raise StorageError("the data folder cannot be synced") from exc
