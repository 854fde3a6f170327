"""Strikes came with a later schema: a catalog from before gets them, and its jobs begin without any."""

import sqlite3
from pathlib import Path

from dicom_node.store.migrations import migrate


def test_a_catalog_from_before_strikes_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    migrate(path)
    connection = sqlite3.connect(path, isolation_level=None)
    # as it was: without the column and the note that it was added
    connection.execute("ALTER TABLE job DROP COLUMN strikes")
    connection.execute("DELETE FROM _sqlite_migrations WHERE name = 'job_strikes'")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(job)") if row[3] and row[4] is None]
    names = ", ".join(columns)
    connection.execute(f"INSERT INTO job ({names}) VALUES ({', '.join('?' for _ in columns)})", ["1"] * len(columns))
    connection.close()
    migrate(path)
    migrate(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT strikes FROM job").fetchall() == [(0,)]
    connection.close()
