"""The catalog's schema is sqlite-utils migrations, applied in order under the catalog lock.

`index_schema`, `queue_schema` and `timeline` register them. One that has landed is never changed, only followed.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

import sqlite_utils

from dicom_node.store.index_schema import index_migrations
from dicom_node.store.queue_schema import queue_migrations
from dicom_node.store.timeline import timeline_migrations


def migrate(path: Path) -> None:
    """Bring the catalog at `path` to the current schema, creating it if need be. One process at a time."""
    lock = os.open(path.with_name("catalog.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        database = sqlite_utils.Database(connection)
        index_migrations.apply(database)
        queue_migrations.apply(database)
        timeline_migrations.apply(database)
    finally:
        connection.close()
        os.close(lock)
