"""The tables of external engines came with a later schema: a catalog from before gets them and keeps its jobs."""

import sqlite3
from pathlib import Path

from dicom_node.store.migrations import migrate


def test_a_catalog_from_before_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    migrate(path)
    connection = sqlite3.connect(path, isolation_level=None)
    # as it was: without the column, the tables, the trigger and the notes that they were added
    for statement in (
        "DROP TRIGGER job_noted",
        "ALTER TABLE job DROP COLUMN note",
        "DROP TABLE sending",
        "DROP TABLE cancellation",
        "DELETE FROM _sqlite_migrations WHERE name IN ('engine_ledger', 'noted')",
    ):
        connection.execute(statement)
    columns = [row[1] for row in connection.execute("PRAGMA table_info(job)") if row[3] and row[4] is None]
    names = ", ".join(columns)
    connection.execute(f"INSERT INTO job ({names}) VALUES ({', '.join('?' for _ in columns)})", ["1"] * len(columns))
    connection.close()
    migrate(path)
    migrate(path)
    connection = sqlite3.connect(path, isolation_level=None)
    assert connection.execute("SELECT note FROM job").fetchall() == [("",)]
    connection.execute("UPDATE job SET note = 'first' || char(10) || 'second'")
    connection.execute("UPDATE job SET note = 'only'")
    connection.execute("UPDATE job SET note = ''")
    rows = connection.execute("SELECT detail FROM history WHERE kind = 'note'").fetchall()
    assert rows == [("first",), ("only",)]
    assert connection.execute("SELECT count(*) FROM sending").fetchone() == (0,)
    connection.close()
