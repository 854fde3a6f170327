"""The catalog saved while the node runs, and brought back.

A backup is the catalog alone: the archive's files never change, so any copying of folders saves them, and what is
copied *after* the backup was made has every file that the backup knows. Before a backup gets its name, all archived
files are synced and each file it refers to is looked for, with its size: so a backup never knows more than the archive
holds. The intake journals are no part of it: what they hold is either in a file that is named, and then synced by the
backup itself, or was not acknowledged when the backup was made.

Brought back, the catalog is that of its moment. Objects that came later are in the archive without a row (`fsck
--repair` indexes them, and runs nothing for them); work that was finished later is done once more, with the same UIDs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import ConfigError, StorageError
from dicom_node.store.catalog import Catalog
from dicom_node.store.copying import copy_database, forget_cut_off
from dicom_node.store.deletions import forget_study
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import FileSystem, RealFileSystem
from dicom_node.store.migrations import check_version

__all__ = ["Saved", "back_up", "bring_back"]

_SHOWN = 20
_FILES = (
    "SELECT location, data_set_offset + data_set_length FROM instance WHERE state = 'present' "
    "UNION ALL SELECT location, data_set_offset + data_set_length FROM variant"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a backup has. `missing`: SOP locations of files that are not in the archive, at most a few; `files`: all."""

    files: int
    studies: int
    missing: tuple[str, ...]
    missing_count: int


def back_up(catalog: Catalog, target: Path) -> Saved:
    """Save the catalog of a node that may run to `target`, which must not be there; mode 0600, synced, checked.

    Files that fsck knows to be missing are no fault of the backup. Raises ConfigError for the target, StorageError when
    the disk fails, the copy is not sound, or a file it refers to is not in the archive: nothing is left then.
    """
    found: list[Saved] = []

    def prepare(copy: sqlite3.Connection) -> None:
        copy.execute("DELETE FROM journaled")  # the journals are not part of it
        # Brought back, it would remove what came again since; files that are left by then are listed by fsck
        copy.execute("DELETE FROM doomed")
        try:
            catalog.archive.watch_writes()
            catalog.archive.sync()
        except OSError as exc:
            raise StorageError("the archive's files cannot be synced") from exc
        saved = _look(copy, catalog.archive.status)
        if saved.missing_count and _forget_deleted(catalog, copy):
            saved = _look(copy, catalog.archive.status)
        if saved.missing_count:
            raise StorageError(
                f"{saved.missing_count} files the catalog refers to are not in the archive, the first is "
                f"{saved.missing[0]}: stop the node and run `dicom-node fsck`"
            )
        found.append(saved)

    with closing(sqlite3.connect(catalog.database.path, isolation_level=None)) as source:
        source.execute("PRAGMA query_only=ON")
        copy_database(source, target, prepare, fs=catalog.files)
    return found[0]


def _forget_deleted(catalog: Catalog, copy: sqlite3.Connection) -> bool:
    """Take out of the copy what the node deleted since it was begun, and note it there; whether there was any."""
    last = copy.execute("SELECT coalesce(max(id), 0) FROM deletion").fetchone()[0]
    deleted = catalog.database.rows("SELECT * FROM deletion WHERE id > ? ORDER BY id", (last,))
    columns = [row[1] for row in copy.execute("PRAGMA table_info(deletion)")]
    for row in deleted:
        forget_study(copy, row[columns.index("study_instance_uid")])
        copy.execute(f"INSERT INTO deletion VALUES ({', '.join('?' * len(row))})", row)
    return bool(deleted)


def bring_back(data_dir: Path, saved: Path, fs: FileSystem | None = None) -> Saved:
    """Put a backup in the place of a catalog that is gone. Under `data_lock`, with the node stopped.

    Raises ConfigError when there is a catalog (it is never overwritten), when `saved` is no backup of a catalog or one
    of a newer version; StorageError when it is damaged. Files it refers to and the archive has not are counted: `fsck`
    marks them.
    """
    target = data_dir / "catalog.db"
    in_the_way = [path.name for path in (target, *(Path(f"{target}-{end}") for end in ("wal", "shm"))) if path.exists()]
    if in_the_way:
        raise ConfigError(f"{data_dir}: {', '.join(in_the_way)} would be overwritten; move it away first")
    found: list[Saved] = []
    fs = fs or RealFileSystem()
    archive = FolderArchive(data_dir / "archive", fs=fs)
    try:
        with closing(sqlite3.connect(f"file:{_quoted(saved)}?mode=ro", uri=True, isolation_level=None)) as source:
            _check_is_catalog(source, saved)
            forget_cut_off(target)  # nobody else restores under the data folder's lock
            copy_database(source, target, lambda copy: found.append(_look(copy, archive.status)), fs=fs)
    except sqlite3.DatabaseError as exc:
        raise ConfigError(f"{saved}: no backup of a catalog: {exc}") from exc
    finally:
        archive.close()
    return found[0]


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _check_is_catalog(source: sqlite3.Connection, saved: Path) -> None:
    if not saved.is_file():
        raise ConfigError(f"{saved}: there is no such file")
    tables = {row[0] for row in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"instance", "variant", "study", "journaled"} <= tables:
        raise ConfigError(f"{saved}: no backup of a catalog")
    check_version(source)


def _look(copy: sqlite3.Connection, status: Callable[[str], tuple[int, float] | None]) -> Saved:
    """Whether each file that the copy refers to is there and as long as it must be."""
    files = missing_count = 0
    missing: list[str] = []
    for location, length in _rows(copy):
        files += 1
        info = status(location)
        if info is None or info[0] != length:
            missing_count += 1
            if len(missing) < _SHOWN:
                missing.append(location)
    studies = copy.execute("SELECT count(*) FROM study").fetchone()[0]
    return Saved(files=files, studies=studies, missing=tuple(missing), missing_count=missing_count)


def _rows(copy: sqlite3.Connection) -> Iterator[tuple[str, int]]:
    cursor = copy.execute(_FILES)
    while rows := cursor.fetchmany(1000):
        yield from rows
