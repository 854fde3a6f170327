"""A catalog that SQLite finds damaged: how to tell, and what to tell."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from dicom_node.errors import StorageError

__all__ = ["damage_told", "damaged", "faults_of", "is_damage"]

_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def is_damage(error: BaseException) -> bool:
    """Whether SQLite says that the file itself is wrong, and not what was asked of it."""
    return isinstance(error, sqlite3.DatabaseError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _CODES


def damaged(found: object) -> StorageError:
    """`found`: what SQLite says of it, which names pages and tables and no content."""
    return StorageError(
        f"the catalog is damaged: {found}; stop the node, move catalog.db, catalog.db-wal and catalog.db-shm away and "
        "bring a backup back (dicom-node restore); without one, index the archive anew (dicom-node fsck --repair)"
    )


@contextmanager
def damage_told() -> Iterator[None]:
    """Inside, what SQLite raises for a damaged file becomes StorageError; everything else stays what it is."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        if is_damage(exc):
            raise damaged(exc) from exc
        raise


def faults_of(connection: sqlite3.Connection, *, thoroughly: bool = True) -> list[str]:
    """What is wrong with its pages, the first three; `thoroughly`: and with each entry of its indexes."""
    check = "integrity_check" if thoroughly else "quick_check"
    found = [row[0] for row in connection.execute(f"PRAGMA {check}(3)").fetchall()]
    return [] if found == ["ok"] else [" ".join(line.split()) for line in found]
