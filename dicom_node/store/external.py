"""What engines outside the node hold: notes of jobs, what was sent to them, what they are still to be told to stop.

A note belongs to the lease: only its holder writes it. The end of a sending does not, for what has left has left. A
cancellation is written in the transaction that ends the job, and outlives the process that made it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from dicom_node.errors import EngineError
from dicom_node.model import (
    NOTE_MAX,
    Cancellation,
    Job,
    JobState,
    Sending,
    SendingRecord,
    SendingState,
)
from dicom_node.store.rows import CatalogPart, check_lease, insert, update, utc, utc_text

__all__ = ["External", "ask_to_stop", "untold"]

_NOW = "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')"
_DUE = """
SELECT * FROM cancellation INDEXED BY cancellation_due
WHERE state = 'pending' AND (not_before_boot_id IS NOT :boot OR not_before_s <= :now) ORDER BY id LIMIT 1
"""
_UNENDED = """
SELECT id, note, handle FROM job WHERE state IN ('pending', 'leased', 'waiting')
UNION ALL SELECT job, note, handle FROM cancellation WHERE state = 'pending'
"""


class External(CatalogPart):
    """`interfaces.EngineLedger` on SQLite."""

    def remember(self, job: Job, note: str) -> None:
        """See `interfaces.EngineLedger.remember`. Raises EngineError for a note that is too long."""
        if len(note) > NOTE_MAX:
            raise EngineError(f"a note of {len(note)} characters is too long; {NOTE_MAX} are kept")

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "job", job.id, job.token)
            update(connection, "job", job.id, {"note": note})

        self.database.write(write)

    def still_wanted(self) -> tuple[frozenset[int], str]:
        """The jobs that have not ended or are still to be cancelled, and all that their engines remember of them."""
        with self.database.read() as connection:
            rows = connection.execute(_UNENDED).fetchall()
        texts = [text for row in rows for text in (row["note"], row["handle"]) if text]
        return frozenset(int(row["id"]) for row in rows), "\n".join(texts)

    # --- sendings

    def begin_sending(
        self, sending: Sending, *, engine: str, study_instance_uid: str, series_instance_uid: str, job: Job | None
    ) -> int:
        """See `interfaces.EngineLedger.begin_sending`."""
        columns: dict[str, Any] = {
            "study_instance_uid": study_instance_uid,
            "series_instance_uid": series_instance_uid,
            "job": job.id if job else None,
            "engine": engine,
            "state": SendingState.ABOUT_TO_SEND.value,
            "begun_at": utc_text(self.clock.wall()),
            **_columns(sending),
        }

        def write(connection: sqlite3.Connection) -> int:
            if job is not None:
                check_lease(connection, "job", job.id, job.token)
            return insert(connection, "sending", columns)

        return self.database.write(write)

    def end_sending(self, sending_id: int, sending: Sending, state: SendingState, error: str = "") -> None:
        """See `interfaces.EngineLedger.end_sending`."""
        ended = {"state": state.value, "error": error, "ended_at": utc_text(self.clock.wall()), **_columns(sending)}

        def write(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT ended_at FROM sending WHERE id = ?", (sending_id,)).fetchone()
            if row is not None and row["ended_at"] is None:
                update(connection, "sending", sending_id, ended)

        self.database.write(write)

    def sendings(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[SendingRecord]:
        """Newest first."""
        condition = "" if study_instance_uid is None else "WHERE study_instance_uid = :study"
        with self.database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM sending {condition} ORDER BY id DESC LIMIT :limit",
                {"study": study_instance_uid, "limit": limit},
            ).fetchall()
        return [_record(row) for row in rows]

    # --- what is to be stopped

    def stop_engine(self, job: Job, handle: str) -> None:
        """See `interfaces.EngineLedger.stop_engine`."""

        def write(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT state FROM job WHERE id = ?", (job.id,)).fetchone()
            if row is not None and row["state"] in (JobState.CANCELLED.value, JobState.FAILED.value):
                _ask(connection, job.id, job.study_instance_uid, job.engine, handle, "")

        self.database.write(write)

    def next_cancellation(self, delays_s: Sequence[float]) -> Cancellation | None:
        """See `interfaces.EngineLedger.next_cancellation`."""

        def write(connection: sqlite3.Connection) -> Cancellation | None:
            while (row := connection.execute(_DUE, self._due_now()).fetchone()) is not None:
                if row["attempts"] >= len(delays_s):
                    _end(connection, row["id"], "failed", row["error"] or "no try came to an end")
                    continue
                not_before_s, boot_id = self._in(delays_s[row["attempts"]])
                tried = {"attempts": row["attempts"] + 1, "not_before_s": not_before_s, "not_before_boot_id": boot_id}
                update(connection, "cancellation", row["id"], tried)
                return _cancellation({**dict(row), **tried})
            return None

        with self.database.read() as connection:  # mostly there is none: leave the writers' lock alone
            if connection.execute(_DUE, self._due_now()).fetchone() is None:
                return None
        return self.database.write(write)

    def _due_now(self) -> dict[str, Any]:
        now = self.clock.boot()
        return {"boot": now.boot_id, "now": now.seconds}

    def end_cancellation(self, cancellation: Cancellation, error: str = "", *, final: bool = True) -> None:
        """See `interfaces.EngineLedger.end_cancellation`."""

        def write(connection: sqlite3.Connection) -> None:
            if final:
                _end(connection, cancellation.id, "failed" if error else "told", error)
            else:
                update(connection, "cancellation", cancellation.id, {"error": error})

        self.database.write(write)


def ask_to_stop(connection: sqlite3.Connection, job_id: int, newest_handle: str | None) -> None:
    """Note that the job's engine is to be told that nobody waits; nothing when it was given nothing."""
    row = connection.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()
    handle = newest_handle or row["handle"] or ""
    if handle or row["note"]:
        _ask(connection, job_id, row["study_instance_uid"], row["engine"], handle, row["note"])


def untold(connection: sqlite3.Connection, job_id: int) -> dict[str, str | None]:
    """Take back what the job's engine was still to be told: the handle (None: it has none) and the note it is about.

    What is given again is known to the engine and running there: to forget it would have it run beside the next try.
    """
    rows = connection.execute(
        "DELETE FROM cancellation WHERE job = ? AND state = 'pending' RETURNING id, handle, note", (job_id,)
    ).fetchall()
    rows.sort(key=lambda row: int(row["id"]))
    handles, notes = ([str(row[key]) for row in rows if row[key]] for key in ("handle", "note"))
    return {"handle": handles[-1] if handles else None, "note": notes[-1] if notes else ""}


def _ask(connection: sqlite3.Connection, job_id: int, study: str, engine: str, handle: str, note: str) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO cancellation (job, study_instance_uid, engine, handle, note, asked_at) "
        f"VALUES (?, ?, ?, ?, ?, {_NOW})",
        (job_id, study, engine, handle, note),
    )


def _end(connection: sqlite3.Connection, row_id: int, state: str, error: str) -> None:
    connection.execute(
        f"UPDATE cancellation SET state = ?, error = ?, note = '', ended_at = {_NOW} "
        "WHERE id = ? AND state = 'pending'",
        (state, error, row_id),
    )


def _cancellation(row: dict[str, Any]) -> Cancellation:
    return Cancellation(
        id=row["id"],
        job_id=row["job"],
        engine=row["engine"],
        handle=row["handle"],
        note=row["note"],
        attempts=row["attempts"],
    )


def _columns(sending: Sending) -> dict[str, Any]:
    return {
        "host": sending.host,
        "what": sending.what,
        "objects": sending.objects,
        "bytes": sending.bytes,
        "sha256": sending.sha256,
        "identifiable": sending.identifiable,
        "remote_id": sending.remote_id,
    }


def _record(row: sqlite3.Row) -> SendingRecord:
    return SendingRecord(
        id=row["id"],
        study_instance_uid=row["study_instance_uid"],
        series_instance_uid=row["series_instance_uid"],
        job_id=row["job"],
        engine=row["engine"],
        sending=Sending(
            what=row["what"],
            host=row["host"],
            objects=row["objects"],
            identifiable=bool(row["identifiable"]),
            bytes=row["bytes"],
            sha256=row["sha256"],
            remote_id=row["remote_id"],
        ),
        state=SendingState(row["state"]),
        error=row["error"],
        begun_at=utc(row["begun_at"]),
        ended_at=utc(row["ended_at"]) if row["ended_at"] else None,
    )
