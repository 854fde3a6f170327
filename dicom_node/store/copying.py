"""A SQLite file copied while it is written to: of one moment, checked, and under its name only when it is whole."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from dicom_node.errors import ConfigError, StorageError
from dicom_node.store.damage import faults_of
from dicom_node.store.fs import FileSystem, RealFileSystem

__all__ = ["copy_database", "forget_cut_off"]

_PAGES = 8192  # between two looks at whether to go on: 32 MiB


def copy_database(
    source: sqlite3.Connection,
    target: Path,
    prepare: Callable[[sqlite3.Connection], None] = lambda copy: None,
    *,
    fs: FileSystem | None = None,
) -> None:
    """Copy what `source` sees at one moment to `target`, mode 0600, in one file without a WAL; others go on writing.

    `prepare` may change the copy before it is checked and named; what it raises is raised, and nothing is left. The
    copy is synced, and so is its name. Raises ConfigError when `target` is there already or its folder is not,
    StorageError when the disk fails or the copy is not sound.
    """
    fs, partial = fs or RealFileSystem(), _partial(target)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already; name a file that is not")
    try:
        fs.close(fs.create(partial))
    except FileExistsError:
        raise ConfigError(f"{partial} is there: another copy is being made, or was cut off; then remove it") from None
    except OSError as exc:
        raise ConfigError(f"{target.parent}: {exc.strerror}; name a folder that can be written") from exc
    try:
        _fill(source, partial, prepare)
        _name(fs, partial, target)
    except FileExistsError:
        raise ConfigError(f"{target} is there already; name a file that is not") from None
    except OSError as exc:
        raise StorageError(f"the copy of the catalog cannot be written: {exc.strerror}") from exc
    except sqlite3.Error as exc:
        raise StorageError(f"the catalog cannot be copied: {exc}") from exc
    finally:
        forget_cut_off(target)


def forget_cut_off(target: Path) -> None:
    """Remove what is left of a copy that was cut off. Only where nobody else can be making it."""
    for end in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            Path(f"{_partial(target)}{end}").unlink()


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _fill(source: sqlite3.Connection, partial: Path, prepare: Callable[[sqlite3.Connection], None]) -> None:
    with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
        source.execute("BEGIN")  # a reader keeps one moment: without it every change by others begins the copy anew
        try:
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
            source.backup(copy, pages=_PAGES)
        finally:
            source.execute("ROLLBACK")
        copy.execute("PRAGMA journal_mode=DELETE")
        copy.execute("PRAGMA synchronous=FULL")
        prepare(copy)
    with closing(sqlite3.connect(f"file:{partial}?mode=ro", uri=True)) as copy:
        if faults_of(copy):
            raise StorageError("the copy of the catalog is not sound: the disk it is on, or the catalog, is damaged")


def _name(fs: FileSystem, partial: Path, target: Path) -> None:
    """Sync the file, give it its name, sync the folder: unlike a rename it never takes the place of anything."""
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        folder_fd = fs.open_folder(target.parent)
        try:
            fs.fsync(fd)
            fs.link(fd, target.name, folder_fd)
            try:
                fs.fsync_dir(folder_fd)
            except OSError:
                with suppress(OSError):
                    fs.unlink(target)
                raise
        finally:
            fs.close(folder_fd)
    finally:
        os.close(fd)
