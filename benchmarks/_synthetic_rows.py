"""Catalog rows of studies that were never sent: one that was is copied, in every table, under other UIDs.

There are no files behind them. Each has what a study leaves that was analysed and whose result was sent: verdict, job
with its inputs, delivery, and the association it came by.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from dicom_node.store.database import Database

__all__ = ["grow", "instance_rows", "wait_routed"]

STUDIES_PER_WRITE = 100
_NAMED = "study_instance_uid = :study"
_JOB = """
INSERT INTO job (id, study_instance_uid, revision, series_instance_uid, rule, engine, priority, rank, results,
  destinations, send_what, late_instances, state, attempts, run_number, input_digest, created_at, since_s,
  since_boot_id, since_at)
SELECT :id, study_instance_uid, 1, series_instance_uid, 'bench', 'bench', 'routine', 1, '[]', '[]', 'results',
  'ignore', 'done', 1, 1, lower(hex(randomblob(32))), routed_at, 1.0, 'an earlier boot', routed_at
FROM routed_series WHERE study_instance_uid = :new
"""
_DELIVERY = """
INSERT INTO delivery (id, study_instance_uid, series_instance_uid, rule, destination, job, input_digest, rank, state,
  attempts, created_at, since_s, since_boot_id, since_at)
SELECT :id, study_instance_uid, series_instance_uid, rule, 'PACS', id, '', rank, 'done', 1, created_at, since_s,
  since_boot_id, since_at FROM job WHERE id = :id
"""
_MORE = (
    "INSERT INTO verdict SELECT id, 0, 'bench', 1, '', '[]' FROM routed_series WHERE study_instance_uid = :new",
    _JOB,
    "INSERT INTO job_input SELECT :id, sop_instance_uid, sha256 FROM instance WHERE study_instance_uid = :new",
    _DELIVERY,
    "INSERT INTO delivery_item (delivery, position, sop_instance_uid, sha256, state, dimse_status) "
    "SELECT :id, 0, sop_instance_uid, sha256, 'sent', 0 FROM instance WHERE study_instance_uid = :new LIMIT 1",
    "INSERT INTO association SELECT :new, 'bench', 'BENCH', 'DICOM_NODE', '127.0.0.1', 'released', 0, last_boot_s, "
    "last_boot_id, last_received_at FROM study WHERE study_instance_uid = :new",
)


def instance_rows(data_dir: Path) -> int:
    """How many instances the catalog has."""
    database = Database(data_dir / "catalog.db")
    try:
        with database.read() as connection:
            return int(connection.execute("SELECT coalesce(sum(instance_count), 0) FROM study").fetchone()[0])
    finally:
        database.close()


def wait_routed(data_dir: Path, study_uid: str, patience_s: float = 60.0) -> None:
    """Until that study is closed and routed."""
    deadline = time.monotonic() + patience_s
    database = Database(data_dir / "catalog.db")
    try:
        while time.monotonic() < deadline:
            with database.read() as connection:
                if connection.execute("SELECT 1 FROM standing WHERE " + _NAMED, {"study": study_uid}).fetchone():
                    return
            time.sleep(0.05)
    finally:
        database.close()
    raise SystemExit(f"the study was not routed within {patience_s:g} s")


def grow(data_dir: Path, study_uid: str, rows: int) -> None:
    """Copy `study_uid`, which must be routed, until there are at least so many instance rows; the node may run."""
    database = Database(data_dir / "catalog.db")
    try:
        with database.read() as connection:
            (each,) = connection.execute(
                "SELECT count(*) FROM instance WHERE " + _NAMED, {"study": study_uid}
            ).fetchone()
            have, studies = connection.execute("SELECT sum(instance_count), count(*) FROM study").fetchone()
        missing = -(-(rows - have) // each)
        for first in range(0, missing, STUDIES_PER_WRITE):
            numbers = range(first + studies, studies + min(first + STUDIES_PER_WRITE, missing))
            database.write(lambda connection, numbers=numbers: _copies(connection, study_uid, numbers))  # type: ignore[misc]
            time.sleep(0.02)  # for the node to get at its catalog in between
    finally:
        database.close()


def _copies(connection: sqlite3.Connection, study: str, numbers: range) -> None:
    for number in numbers:
        root, _, last = study.rpartition(".")
        new = f"{root}.{int(last) + 1_000_000 + number}"
        patient = connection.execute("SELECT max(id) + 1 FROM patient").fetchone()[0]
        names = {"study": study, "new": new, "patient": patient}
        _copy(connection, "patient", "id = (SELECT patient FROM study WHERE study_instance_uid = :study)", names)
        for table in ("study", "series", "instance", "routed_series", "standing", "series_header", "receipt"):
            _copy(connection, table, _NAMED, names)
        names["id"] = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM job").fetchone()[0]
        for statement in _MORE:
            connection.execute(statement, names)


def _copy(connection: sqlite3.Connection, table: str, where: str, names: dict[str, object]) -> None:
    columns = [row["name"] for row in connection.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(_value(table, name) for name in columns)
    connection.execute(f"INSERT INTO {table} SELECT {values} FROM {table} WHERE {where}", names)


def _value(table: str, column: str) -> str:
    if (table, column) in (("patient", "id"), ("study", "patient")):
        return ":patient"
    if column == "patient_id":
        return "patient_id || :patient"
    if (table, column) == ("routed_series", "id"):
        return "(SELECT max(id) + 1 FROM routed_series)"
    if (table, column) == ("standing", "routed"):
        return "(SELECT max(id) FROM routed_series)"
    if column in ("location", "sha256"):
        digits = "lower(hex(randomblob(32)))"
        return digits if column == "sha256" else f"'00/00' || substr({digits}, 3) || '.dcm'"
    if column.endswith("_uid") or column == "attributes":
        return f"replace({column}, :study, :new)"
    return column
