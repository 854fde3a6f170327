"""The catalog's schema is sqlite-utils migrations, applied in order under the catalog lock.

`index_schema`, `queue_schema`, `timeline_schema` and this file register them. One that has landed is never changed,
only followed. A catalog that has something in it is copied before it is brought forward, and one that a newer version
wrote is refused: that version may keep things where this one would not look.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import sqlite_utils
from sqlite_utils import Migrations

from dicom_node.errors import ConfigError, StorageError
from dicom_node.store.copying import copy_database, forget_cut_off
from dicom_node.store.damage import damage_told
from dicom_node.store.index_schema import index_migrations
from dicom_node.store.queue_schema import queue_migrations
from dicom_node.store.timeline_schema import timeline_migrations

__all__ = ["check_version", "is_current", "migrate"]

version_migrations = Migrations("version")


@version_migrations()
def written_by(db: sqlite_utils.Database) -> None:
    """The version of dicom-node that last brought the catalog forward: one row."""
    db.execute("CREATE TABLE written_by (version TEXT NOT NULL)")


_SETS = (index_migrations, queue_migrations, timeline_migrations, version_migrations)
_KNOWN = frozenset((one.name, step.name) for one in _SETS for step in one._migrations)


@damage_told()
def migrate(path: Path) -> None:
    """Bring the catalog at `path` to the current schema, creating it if need be. One process at a time.

    Before the first step that is missing the catalog is copied to `catalog.before-<version>.db` beside it. Raises
    ConfigError for a catalog of a newer version, StorageError when it is damaged, or cannot be copied or written.
    """
    lock = os.open(path.with_name("catalog.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_version(connection)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        database = sqlite_utils.Database(connection)
        if not any(one.pending(database) for one in _SETS):
            return
        if any(one.applied(database) for one in _SETS):
            _keep_copy(connection, path)
        for one in _SETS:
            one.apply(database)
        connection.execute("DELETE FROM written_by")
        connection.execute("INSERT INTO written_by VALUES (?)", (version("dicom-node"),))
    except sqlite3.OperationalError as exc:
        raise StorageError(f"the catalog cannot be brought forward: {exc}; free space, then start again") from exc
    finally:
        connection.close()
        os.close(lock)


@damage_told()
def is_current(path: Path) -> bool:
    """Whether `migrate` has nothing to do. Changes nothing.

    Raises ConfigError for a catalog of a newer version, StorageError for one that is damaged.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        check_version(connection)
        database = sqlite_utils.Database(connection)
        return not any(one.pending(database) for one in _SETS)


def check_version(connection: sqlite3.Connection) -> None:
    """Raises ConfigError, naming both versions, when a step was applied to the catalog that is not known here."""
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if Migrations.migrations_table not in tables:
        return
    applied = connection.execute(f"SELECT migration_set, name FROM {Migrations.migrations_table}").fetchall()
    unknown = sorted({(row[0], row[1]) for row in applied} - _KNOWN)
    if not unknown:
        return
    writer = connection.execute("SELECT version FROM written_by").fetchone() if "written_by" in tables else None
    raise ConfigError(
        f"the catalog was written by dicom-node {writer[0] if writer else 'of a newer version'} (it knows "
        f"{unknown[0][0]}.{unknown[0][1]}), this is {version('dicom-node')}: install that version, or go back to a "
        "copy of the catalog from before it (catalog.before-*.db in the data folder, or a backup)"
    )


def _keep_copy(connection: sqlite3.Connection, path: Path) -> None:
    """A copy under the version that is about to change it; one that is there from an earlier try stays."""
    for number in range(1, 100):
        again = f"-{number}" if number > 1 else ""
        target = path.with_name(f"{path.stem}.before-{version('dicom-node')}{again}.db")
        if not target.exists():
            break
    forget_cut_off(target)  # nobody else copies under the catalog lock: a crash left it
    with closing(sqlite3.connect(path, isolation_level=None)) as source:
        copy_database(source, target)
