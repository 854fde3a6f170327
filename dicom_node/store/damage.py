"""A catalog that SQLite finds damaged: how to tell, and what to tell."""

from __future__ import annotations

import sqlite3

from dicom_node.errors import StorageError

__all__ = ["damaged", "is_damage"]

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
