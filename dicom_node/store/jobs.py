"""Jobs: leased with fencing tokens, finished in the transaction that makes their results visible.

Every move goes through `model.next_job_state`. A lease is a boot time: past, or of another boot, it is expired, and
the next `lease_job` takes the work over. The token counts up with each lease and is checked in every transaction that
ends one, so a worker that was given up on writes nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dicom_node.errors import NotFound, StorageError
from dicom_node.model import (
    JOB_ENDED,
    ConflictPolicy,
    InstanceRecord,
    Job,
    JobState,
    Priority,
    SendWhat,
    SeriesHeader,
    StoredInstance,
    next_job_state,
)
from dicom_node.store.deliveries import queue_results
from dicom_node.store.external import ask_to_stop, untold
from dicom_node.store.instances import insert_instance
from dicom_node.store.returned import take_returned
from dicom_node.store.rows import (
    CatalogPart,
    check_lease,
    insert,
    unpacked_header,
    update,
    utc,
)
from dicom_node.store.standing import stand
from dicom_node.values import Pending

__all__ = ["Jobs", "move_job"]

# Held back: a study under two patient identities until a person releases it (unless the node is told not to mind).
_RUNNABLE = """
SELECT job.*, study.identity_conflict AND NOT study.released AS held
FROM job INDEXED BY job_runnable LEFT JOIN study USING (study_instance_uid)
WHERE job.state IN ('pending', 'leased', 'waiting')
  AND CASE job.state
        WHEN 'leased' THEN job.lease_boot_id IS NOT :boot OR job.lease_until_s <= :now
        ELSE job.not_before_boot_id IS NOT :boot OR job.not_before_s <= :now END
  AND (:conflicts OR held IS NOT 1) AND job.rank <= :rank AND (job.rank <= :begin_rank OR job.handle IS NOT NULL)
  AND (:engine IS NULL OR job.engine = :engine) AND job.engine NOT IN (SELECT value FROM json_each(:without))
ORDER BY job.rank, job.id LIMIT 1
"""
# Whether there may be one, by a few looks into an index for each engine: most of the time there is none, and then every
# idle worker would go through all that wait for an engine that is down.
_DUE = " OR ".join(  # apart, for SQLite makes no ranges of one index out of an OR
    "EXISTS (SELECT 1 FROM job INDEXED BY job_due WHERE state IN ('pending', 'waiting') "
    f"AND job.engine = known.engine AND job.rank = urgency.rank AND {due})"
    for due in (
        "not_before_boot_id IS NULL",
        "not_before_boot_id < :boot",
        "not_before_boot_id > :boot",
        "not_before_boot_id = :boot AND not_before_s <= :now",
    )
)
_MAY_BE_RUNNABLE = f"""
WITH RECURSIVE known (engine) AS (
  SELECT min(engine) FROM job INDEXED BY job_due WHERE state IN ('pending', 'waiting')
  UNION ALL
  SELECT (SELECT min(job.engine) FROM job INDEXED BY job_due
          WHERE state IN ('pending', 'waiting') AND job.engine > known.engine)
  FROM known WHERE known.engine IS NOT NULL),
urgency (rank) AS (SELECT 0 UNION ALL SELECT rank + 1 FROM urgency WHERE rank < :rank)
SELECT 1 FROM known CROSS JOIN urgency
WHERE (:engine IS NULL OR engine = :engine) AND engine NOT IN (SELECT value FROM json_each(:without)) AND ({_DUE})
UNION ALL
SELECT 1 FROM job INDEXED BY job_state WHERE state = 'leased' AND (lease_boot_id IS NOT :boot OR lease_until_s <= :now)
LIMIT 1
"""
_LATER = "not_before_boot_id IS :boot AND not_before_s > :now"


class Jobs(CatalogPart):
    """`interfaces.JobQueue` on SQLite."""

    # --- the worker's side

    def lease_job(
        self,
        worker: str,
        lease_s: float,
        *,
        at_least: Priority = Priority.BACKGROUND,
        engine: str | None = None,
        without: Collection[str] = (),
        begin_at_least: Priority = Priority.BACKGROUND,
    ) -> Job | None:
        """The first runnable job (priority, age), leased, or None. A lease not extended in time is given to another.
        `at_least`: none that is less urgent. `engine`: of this one only; `without`: of none of these.
        `begin_at_least`: of those no engine works on yet, none that is less urgent.

        A lease counts as an attempt, except one that only polls an external engine. A worker that dies each time thus
        still runs out of attempts.
        """
        wanted: dict[str, Any] = {"rank": at_least.rank, "engine": engine, "without": json.dumps(list(without))}
        wanted["begin_rank"] = begin_at_least.rank

        def write(connection: sqlite3.Connection) -> Job | None:
            row = connection.execute(_RUNNABLE, wanted | self._runnable_now()).fetchone()
            if row is None:
                return None
            state, attempts = JobState(row["state"]), row["attempts"]
            if state is JobState.LEASED:
                state = next_job_state(state, "expire")
            if state is JobState.PENDING:
                attempts += 1
            until_s, boot_id = self._in(lease_s)
            changes = {
                "state": next_job_state(state, "lease").value,
                "attempts": attempts,
                "token": row["token"] + 1,
                "worker": worker,
                "lease_until_s": until_s,
                "lease_boot_id": boot_id,
            }
            update(connection, "job", row["id"], changes)
            return self._job({**dict(row), **changes})

        with self.database.read() as connection:  # an idle worker must not take the writers' lock
            when = self._runnable_now()
            if connection.execute(_MAY_BE_RUNNABLE, wanted | when).fetchone() is None:
                return None
            if connection.execute(_RUNNABLE, wanted | when).fetchone() is None:
                return None
        return self.database.write(write)

    def _runnable_now(self) -> dict[str, Any]:
        now = self.clock.boot()
        return {"boot": now.boot_id, "now": now.seconds, "conflicts": self.options.analyse_conflicts}

    def extend_job(self, job: Job, lease_s: float) -> None:
        """Heartbeat. Raises LeaseLost (also when the job was cancelled: the work must be dropped)."""

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "job", job.id, job.token)
            until_s, boot_id = self._in(lease_s)
            update(connection, "job", job.id, {"lease_until_s": until_s, "lease_boot_id": boot_id})

        self.database.write(write)

    def finish_job(
        self,
        job: Job,
        produced: Sequence[InstanceRecord],
        sending_order: Sequence[str],
        stage_seconds: Mapping[str, float] | None = None,
        *,
        taken: Sequence[str] = (),
    ) -> None:
        """One transaction: results become visible, deliveries are queued (`sending_order`: SOP Instance UIDs), the job
        is DONE. Raises LeaseLost and writes nothing when the token is stale. A produced instance whose UID is known
        is adopted: the one that is there stays, whatever its digest. `stage_seconds` are kept for the timeline.
        `taken`: what an engine stored here that is this job's now.
        """
        stages = json.dumps({stage: round(seconds, 3) for stage, seconds in (stage_seconds or {}).items()})

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "job", job.id, job.token)
            for record in produced:
                insert_instance(connection, record, ConflictPolicy.KEEP_FIRST)
            take_returned(connection, job.id, taken)
            for position, uid in enumerate(sending_order):
                insert(connection, "job_result", {"job": job.id, "position": position, "sop_instance_uid": uid})
            if job.send_what is not SendWhat.SOURCE:
                queue_results(connection, job, sending_order, self.options, self._new_delivery_columns())
            self._move(connection, job.id, "finish", error="", handle=None, stages=stages)

        self.database.write(write)

    def _new_delivery_columns(self) -> dict[str, Any]:
        now = self._now_columns()
        return {"created_at": now["since_at"], **now}

    def reject_job(self, job: Job, reason: str) -> None:
        """The engine refuses this input for good: filtered, with the reason. Raises LeaseLost."""
        self._end_job_lease(job, "reject", error=reason, handle=None)

    def retry_job_later(
        self, job: Job, error: str, delay_s: float, *, outage: bool = False, strike: bool = False
    ) -> None:
        """Back to PENDING after `delay_s`; what an external engine works on (`handle`) is kept. Raises LeaseLost.

        `outage`: the node was at fault, not the job; the attempt counts among `Job.outages`. `strike`: it killed or
        hung what runs the engine; it counts among `Job.strikes`.
        """
        not_before_s, boot_id = self._in(delay_s)
        changes: dict[str, Any] = {"not_before_s": not_before_s, "not_before_boot_id": boot_id}
        changes |= {"outages": job.outages + outage, "strikes": job.strikes + strike}
        self._end_job_lease(job, "retry_later", error=error, **changes)

    def park_job(self, job: Job, pending: Pending, *, renew: bool = False) -> None:
        """WAITING for an external engine; `renew`: its age counts from now. Raises LeaseLost."""
        not_before_s, boot_id = self._in(pending.poll_after_s)
        changes: dict[str, Any] = {"not_before_s": not_before_s, "not_before_boot_id": boot_id}
        changes |= self._now_columns() if renew else {}
        self._end_job_lease(job, "park", error="", handle=pending.handle, **changes)

    def wake_job(self, job_id: int) -> bool:
        """A WAITING job becomes due now: its engine says that something happened. Whether it was waiting for later.

        A job in any other state, or none of that number, is left as it is: whoever calls this knows nothing for sure.
        """
        waiting = "SELECT 1 FROM job WHERE id = :job AND state = 'waiting' AND " + _LATER
        now = self.clock.boot()
        wanted = {"job": job_id, "boot": now.boot_id, "now": now.seconds}

        def write(connection: sqlite3.Connection) -> bool:
            found = connection.execute(waiting, wanted).fetchone() is not None
            if found:
                update(connection, "job", job_id, {"not_before_s": now.seconds, "not_before_boot_id": now.boot_id})
            return found

        with self.database.read() as connection:  # strangers' hints must not take the writers' lock
            if connection.execute(waiting, wanted).fetchone() is None:
                return False
        return self.database.write(write)

    def give_up_job(self, job: Job, error: str) -> None:
        """FAILED: dead letter; what its engine works on for it (`job.handle`) is to be stopped. Raises LeaseLost."""
        self._end_job_lease(job, "give_up", error=error, handle=job.handle)

    def _end_job_lease(self, job: Job, move: str, **columns: Any) -> None:
        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "job", job.id, job.token)
            self._move(connection, job.id, move, **columns)

        self.database.write(write)

    def _move(self, connection: sqlite3.Connection, job_id: int, move: str, **columns: Any) -> None:
        move_job(connection, job_id, move, **columns)

    # --- by a person

    def retry_job(self, job_id: int) -> None:
        """FAILED, REJECTED or CANCELLED back to PENDING, attempts 0, at once. Raises NotFound, IllegalTransition.

        An engine that was still to be told to stop is not told any more: the job has its handle and its note again, and
        goes on with what the engine has. Once it was told, the job begins anew.
        """
        changes = {"attempts": 0, "outages": 0, "strikes": 0, "error": "", "not_before_boot_id": None}
        changes |= self._now_columns()

        def write(connection: sqlite3.Connection) -> None:
            move_job(connection, job_id, "retry", **changes, **untold(connection, job_id))

        self.database.write(write)

    def cancel_job(self, job_id: int) -> None:
        """What its engine works on for it is to be stopped. Raises NotFound, IllegalTransition."""
        changes = {"error": "cancelled by a person"}
        self.database.write(lambda connection: move_job(connection, job_id, "cancel", **changes))

    # --- reading

    def job(self, job_id: int) -> Job:
        """Raises NotFound."""
        with self.database.read() as connection:
            row = connection.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise NotFound(f"there is no job {job_id}")
        return self._job(row)

    def jobs(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[Job]:
        """Newest first."""
        condition = "" if study_instance_uid is None else "WHERE study_instance_uid = :study"
        with self.database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM job {condition} ORDER BY id DESC LIMIT :limit",
                {"study": study_instance_uid, "limit": limit},
            ).fetchall()
        return [self._job(row) for row in rows]

    def job_input(self, job: Job) -> tuple[Sequence[StoredInstance], SeriesHeader]:
        """Exactly the instances of `job.input_digest`, and the series' header as kept at its latest closing.

        Images that came after the job was made are left out. Raises NotFound when one of the instances was replaced
        by other content (for good), StorageError when one is missing now (fsck may bring it back).
        """
        names = {"study": job.study_instance_uid, "series": job.series_instance_uid}
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT instance.*, wanted.sha256 AS wanted_sha256 FROM job_input AS wanted "
                "LEFT JOIN instance USING (sop_instance_uid) WHERE wanted.job = ? "
                "ORDER BY instance_order, sop_instance_uid",
                (job.id,),
            ).fetchall()
            header = connection.execute(
                "SELECT header FROM series_header WHERE study_instance_uid = :study AND series_instance_uid = :series",
                names,
            ).fetchone()
        if any(row["sha256"] not in (None, row["wanted_sha256"]) for row in rows):
            raise NotFound("images this job was made for were replaced by others since; route the study again")
        if header is None or any(row["state"] != "present" for row in rows):
            raise StorageError("images this job was made for are missing; fsck tells which")
        return [self.stored(row) for row in rows], unpacked_header(job.series_instance_uid, header["header"])

    def job_results(self, job_id: int) -> Sequence[StoredInstance]:
        """The instances a DONE job produced, in sending order."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT instance.* FROM job_result JOIN instance USING (sop_instance_uid) "
                "WHERE job = ? ORDER BY position",
                (job_id,),
            ).fetchall()
        return [self.stored(row) for row in rows]

    def _job(self, row: sqlite3.Row | dict[str, Any]) -> Job:
        return Job(
            id=row["id"],
            study_instance_uid=row["study_instance_uid"],
            revision=row["revision"],
            series_instance_uid=row["series_instance_uid"],
            rule=row["rule"],
            engine=row["engine"],
            priority=Priority(row["priority"]),
            results=tuple(json.loads(row["results"])),
            destinations=tuple(json.loads(row["destinations"])),
            send_what=SendWhat(row["send_what"]),
            state=JobState(row["state"]),
            attempts=row["attempts"],
            run_number=row["run_number"],
            input_digest=row["input_digest"],
            created_at=utc(row["created_at"]),
            token=row["token"],
            handle=row["handle"],
            error=row["error"],
            superseded_job=row["superseded_job"],
            age_s=self.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
            outages=row["outages"],
            strikes=row["strikes"],
            note=row["note"],
        )


def move_job(connection: sqlite3.Connection, job_id: int, move: str, **columns: Any) -> None:
    """Make a legal move, setting `columns` with it. Raises NotFound, IllegalTransition; nothing changed then.

    With the job's end its note is cleared; of one that ends without the engine's answer, the engine is to be told.
    """
    row = connection.execute(
        "SELECT state, study_instance_uid, series_instance_uid FROM job WHERE id = ?", (job_id,)
    ).fetchone()
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    state = next_job_state(JobState(row["state"]), move)
    if state in (JobState.CANCELLED, JobState.FAILED):
        ask_to_stop(connection, job_id, columns.get("handle"))
    if state in JOB_ENDED:
        columns["note"] = ""
    update(connection, "job", job_id, {"state": state.value, "lease_until_s": None, "lease_boot_id": None, **columns})
    stand(connection, row["study_instance_uid"], row["series_instance_uid"])
