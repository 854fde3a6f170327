"""What the node is doing, computed from the catalog when asked: counts for metrics, and what is stuck and why.

The ledger accounts for every series that was received (`store.receipts`), by where it stands now (`store.standing` says
what each class means): received = routed + filtered + waiting + failed. `imbalance` counts what is in none of these,
and what differs between the receipts and the rest of the catalog; it must be 0.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dicom_node.interfaces import seconds_since
from dicom_node.model import (
    BootTime,
    DeliveryState,
    JobState,
    StudyActivity,
)
from dicom_node.store.ledger import Ledger
from dicom_node.store.receipts import CLASSES, received_totals
from dicom_node.store.rows import CatalogPart, utc
from dicom_node.store.standing import count_series, count_studies, moving_studies
from dicom_node.store.tally import tallied

__all__ = ["Stuck", "ledger_totals", "snapshot", "stuck"]

STUCK_MAX = 100  # of each kind

_JOB_STATES = tuple(state.value for state in JobState)
_DELIVERY_STATES = tuple(state.value for state in DeliveryState)
_UNDELIVERED_BYTES = """
SELECT coalesce(sum(instance.data_set_length), 0)
FROM delivery JOIN delivery_item AS item ON item.delivery = delivery.id JOIN instance USING (sop_instance_uid)
WHERE delivery.state IN ('pending', 'leased', 'failed') AND item.state <> 'sent'
"""
# From rule to rule by the index: a GROUP BY would walk through every verdict there ever was
_LAST_MATCH = """
WITH RECURSIVE matched (rule) AS (
  SELECT min(rule) FROM verdict WHERE matched = 1
  UNION ALL SELECT (SELECT min(rule) FROM verdict WHERE matched = 1 AND rule > matched.rule) FROM matched
  WHERE rule IS NOT NULL
)
SELECT matched.rule, routed_at FROM matched JOIN routed_series
  ON id = (SELECT max(routed) FROM verdict WHERE matched = 1 AND verdict.rule = matched.rule)
"""
UNFINISHED = ("pending", "leased", "waiting", "failed")
_UNFINISHED = str((*UNFINISHED, DeliveryState.COMMITTING.value))
COMMITMENT_STATES = ("asked", "judged", "reported", "failed")  # failed: the peer never took the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """One thing that waits or failed. `why` and `name` carry no patient data.

    `kind`: study, conflict, series, job, delivery or commitment (a report its peer did not take). `next_s`: seconds
    until something happens by itself, None if a person is needed.
    """

    kind: str
    id: int | None
    study_instance_uid: str
    name: str
    state: str
    why: str
    age_s: float
    next_s: float | None


def snapshot(part: CatalogPart, ledger: Mapping[str, Any]) -> Mapping[str, Any]:
    """Everything countable, JSON-ready, with what `ledger_totals` said. Keys:

    * `studies`: total, open, oldest_open_age_s, identity_conflicts; `instances`: total.
    * `ledger` (series) and `ledger_studies`: received, routed, filtered, waiting, failed, imbalance, and of series
      `reasons` (why filtered -> count).
    * `jobs`: state -> count, oldest_age_s (0 when none; of finished ones always 0).
    * `engines`: engine -> state -> count of its unfinished jobs (pending, leased, waiting, failed).
    * `cancellations`: engine -> state (pending, failed) -> work there that is still to be stopped, or cannot be.
    * `deliveries`: destination -> state -> the same.
    * `dead_letters`: jobs, deliveries. `variants`: kind -> count. `associations`: open, by_calling_ae.
    * `returned`: what engines stored here: taken (results of a job), untaken (kept; of no job so far).
    * `commitments`: state -> count of peers' requests for storage commitment that are kept.
    * `undelivered_bytes`: of data sets not yet at a destination. `last_match`: rule -> Unix time it last matched.
    """
    with part.database.read() as connection:
        return {
            "studies": _studies(part, connection),
            "instances": sum(tallied(connection, "instances").values()),
            **ledger,
            "jobs": _jobs(part, connection),
            "engines": _by_engine(connection, "job", UNFINISHED),
            "cancellations": _by_engine(connection, "cancellation", ("pending", "failed")),
            "deliveries": _deliveries(part, connection),
            "dead_letters": {
                "jobs": _count(connection, "job WHERE state = 'failed'"),
                "deliveries": _count(connection, "delivery WHERE state = 'failed'"),
            },
            "variants": dict(connection.execute("SELECT kind, count(*) FROM variant GROUP BY kind").fetchall()),
            "associations": _associations(connection),
            "returned": _returned(connection),
            "commitments": _commitments(connection),
            "undelivered_bytes": connection.execute(_UNDELIVERED_BYTES).fetchone()[0],
            "last_match": {
                row["rule"]: utc(row["routed_at"]).timestamp() for row in connection.execute(_LAST_MATCH).fetchall()
            },
        }


def _returned(connection: sqlite3.Connection) -> dict[str, int]:
    row = connection.execute("SELECT count(job) AS taken, count(*) - count(job) AS untaken FROM returned").fetchone()
    return {"taken": row["taken"], "untaken": row["untaken"]}


def _commitments(connection: sqlite3.Connection) -> dict[str, int]:
    rows = connection.execute("SELECT state, count(*) FROM commitment_request GROUP BY state").fetchall()
    return dict.fromkeys(COMMITMENT_STATES, 0) | dict(rows)


def _count(connection: sqlite3.Connection, table_where: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {table_where}").fetchone()[0])


def _studies(part: CatalogPart, connection: sqlite3.Connection) -> dict[str, Any]:
    opened = connection.execute(
        "SELECT coalesce(opened_boot_s, last_boot_s) AS since_s, coalesce(opened_boot_id, last_boot_id) AS boot_id, "
        "last_received_at FROM (SELECT DISTINCT study_instance_uid FROM series WHERE routing = 'open') "
        "CROSS JOIN study USING (study_instance_uid)"
    ).fetchall()
    ages = [part.age_s(row["since_s"] or 0.0, row["boot_id"] or "", row["last_received_at"]) for row in opened]
    return {
        "total": sum(tallied(connection, "studies").values()),
        "open": len(opened),
        "oldest_open_age_s": max(ages, default=0.0),
        "identity_conflicts": _count(connection, "study WHERE identity_conflict AND NOT released"),
    }


def ledger_totals(connection: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    """`ledger` and `ledger_studies` of the snapshot, all of one moment."""
    connection.execute("BEGIN")  # a study that moves between two counts would be in both, or in neither
    try:
        series, studies = received_totals(connection)
        moving = moving_studies(connection)
        standing, by_study = count_series(connection, moving), count_studies(connection, moving)
    finally:
        connection.execute("ROLLBACK")
    counts: dict[str, int] = {}
    for (name, _), count in standing.items():
        counts[name] = counts.get(name, 0) + count
    reasons = {reason: count for (name, reason), count in standing.items() if name == "filtered"}
    return {"ledger": {**_balanced(series, counts), "reasons": reasons}, "ledger_studies": _balanced(studies, by_study)}


def _balanced(received: int, counts: Mapping[str, int]) -> dict[str, int]:
    known = {name: counts.get(name, 0) for name in CLASSES}
    everywhere = sum(counts.values())
    lost = everywhere - sum(known.values())
    return {"received": received, **known, "imbalance": lost + abs(received - everywhere)}


# `min` makes SQLite take the other columns of its group from the row with the smallest one
_OLDEST = "min(since_at) AS at, since_s, since_boot_id"


def _jobs(part: CatalogPart, connection: sqlite3.Connection) -> dict[str, Any]:
    states: dict[str, Any] = {state: {"count": 0, "oldest_age_s": 0.0} for state in _JOB_STATES}
    for (state, _), count in tallied(connection, "job").items():
        states[state]["count"] = count
    rows = connection.execute(f"SELECT state, {_OLDEST} FROM job WHERE state IN {_UNFINISHED} GROUP BY state")
    for row in rows.fetchall():
        states[row["state"]]["oldest_age_s"] = part.age_s(row["since_s"], row["since_boot_id"], row["at"])
    return states


def _by_engine(connection: sqlite3.Connection, table: str, states: tuple[str, ...]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    rows = connection.execute(
        f"SELECT engine, state, count(*) AS n FROM {table} WHERE state IN {states} GROUP BY engine, state"
    )
    for row in rows.fetchall():
        found.setdefault(row["engine"], dict.fromkeys(states, 0))[row["state"]] = row["n"]
    return found


def _deliveries(part: CatalogPart, connection: sqlite3.Connection) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for (destination, state), count in tallied(connection, "delivery").items():
        none = {state: {"count": 0, "oldest_age_s": 0.0} for state in _DELIVERY_STATES}
        found.setdefault(destination, none)[state]["count"] = count
    rows = connection.execute(
        f"SELECT destination, state, {_OLDEST} FROM delivery WHERE state IN {_UNFINISHED} GROUP BY state, destination"
    )
    for row in rows.fetchall():
        age = part.age_s(row["since_s"], row["since_boot_id"], row["at"])
        found[row["destination"]][row["state"]]["oldest_age_s"] = age
    return found


def _associations(connection: sqlite3.Connection) -> dict[str, Any]:
    by_calling_ae = dict(
        connection.execute(
            "SELECT calling_ae_title, count(*) FROM association WHERE ended = 'open' GROUP BY calling_ae_title"
        ).fetchall()
    )
    return {"open": sum(by_calling_ae.values()), "by_calling_ae": by_calling_ae}


# --- what is stuck and why -------------------------------------------------------------------------------------------


def stuck(
    ledger: Ledger,
    *,
    destinations: Collection[str] | None = None,
    waits_for: Callable[[StudyActivity], tuple[str, float | None]] | None = None,
) -> list[Stuck]:
    """What waits or failed, with the reason, at most STUCK_MAX of each kind, oldest first.

    `destinations`: names in the configuration; a delivery to any other is reported as such. `waits_for` tells what
    an open study waits for and in how many seconds it will be routed.
    """
    studies = [_open_study(ledger, activity, waits_for) for activity in ledger.open_studies()[:STUCK_MAX]]
    with ledger.database.read() as connection:
        return [
            *studies,
            *_conflicts(ledger, connection),
            *_failed_series(ledger, connection),
            *_stuck_jobs(ledger, connection),
            *_stuck_deliveries(ledger, connection, destinations),
            *_stuck_reports(ledger, connection),
        ]


def _open_study(
    part: CatalogPart,
    activity: StudyActivity,
    waits_for: Callable[[StudyActivity], tuple[str, float | None]] | None,
) -> Stuck:
    why, next_s = waits_for(activity) if waits_for else ("not yet complete", None)
    return Stuck(
        kind="study",
        id=None,
        study_instance_uid=activity.study_instance_uid,
        name=f"revision {activity.revision}",
        state="open",
        why=f"{len(activity.pending_series)} series, {activity.instance_count} images: {why}",
        age_s=_boot_age(part, activity.first_received),
        next_s=next_s,
    )


def _boot_age(part: CatalogPart, moment: BootTime) -> float:
    age = seconds_since(moment, part.clock.boot())
    return 0.0 if age == float("inf") else max(age, 0.0)


def _conflicts(part: CatalogPart, connection: sqlite3.Connection) -> list[Stuck]:
    rows = connection.execute(
        "SELECT * FROM study WHERE identity_conflict AND NOT released ORDER BY last_received_at LIMIT ?", (STUCK_MAX,)
    ).fetchall()
    return [
        Stuck(
            kind="conflict",
            id=None,
            study_instance_uid=row["study_instance_uid"],
            name="identity conflict",
            state="held",
            why="the study came under two patient identities and is not analysed until it is released",
            age_s=part.age_s(row["last_boot_s"] or 0.0, row["last_boot_id"] or "", row["last_received_at"]),
            next_s=None,
        )
        for row in rows
    ]


def _failed_series(part: CatalogPart, connection: sqlite3.Connection) -> list[Stuck]:
    rows = connection.execute(
        "SELECT closed.* FROM standing JOIN routed_series AS closed ON closed.id = standing.routed "
        "WHERE standing.class = 'failed' AND closed.outcome = 'failed' ORDER BY closed.id LIMIT ?",
        (STUCK_MAX,),
    ).fetchall()
    return [
        Stuck(
            kind="series",
            id=None,
            study_instance_uid=row["study_instance_uid"],
            name=row["series_instance_uid"],
            state="failed",
            why=row["reason"],
            age_s=part.age_s(0.0, "", row["routed_at"]),
            next_s=None,
        )
        for row in rows
    ]


_JOB_WAITS = {"pending": "in the queue", "waiting": "its engine works on it and is asked again"}


def _stuck_jobs(part: CatalogPart, connection: sqlite3.Connection) -> list[Stuck]:
    rows = connection.execute(
        "SELECT job.*, study.identity_conflict AND NOT study.released AS held FROM job "
        "LEFT JOIN study USING (study_instance_uid) WHERE state IN ('pending', 'waiting', 'failed') "
        "ORDER BY id LIMIT ?",
        (STUCK_MAX,),
    ).fetchall()
    return [
        Stuck(
            kind="job",
            id=row["id"],
            study_instance_uid=row["study_instance_uid"],
            name=f"{row['rule']} on {row['engine']}",
            state=row["state"],
            why=row["error"] or ("held: identity conflict" if row["held"] else _JOB_WAITS.get(row["state"], "")),
            age_s=part.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
            next_s=None if row["state"] == "failed" or row["held"] else _wait_s(part, row),
        )
        for row in rows
    ]


_DELIVERY_WAITS = {
    "pending": "in the queue",
    "committing": "sent; the destination has not yet committed to keeping it",
    "failed": "given up",
}


def _stuck_deliveries(
    part: CatalogPart, connection: sqlite3.Connection, destinations: Collection[str] | None
) -> list[Stuck]:
    rows = connection.execute(
        "SELECT *, (SELECT error FROM delivery_item WHERE delivery = delivery.id AND error <> '' LIMIT 1) "
        "AS item_error FROM delivery WHERE state IN ('pending', 'committing', 'failed') ORDER BY id LIMIT ?",
        (STUCK_MAX,),
    ).fetchall()
    found = []
    for row in rows:
        gone = destinations is not None and row["destination"] not in destinations
        error = ": ".join(text for text in (row["error"], row["item_error"]) if text) or _DELIVERY_WAITS[row["state"]]
        found.append(
            Stuck(
                kind="delivery",
                id=row["id"],
                study_instance_uid=row["study_instance_uid"],
                name=row["destination"],
                state=row["state"],
                why="the destination is not in the configuration any more" if gone else error,
                age_s=part.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
                next_s=None if gone or row["state"] == "failed" else _wait_s(part, row),
            )
        )
    return found


def _stuck_reports(part: CatalogPart, connection: sqlite3.Connection) -> list[Stuck]:
    """Reports of storage commitment that their peers have not taken."""
    rows = connection.execute(
        "SELECT *, (SELECT study_instance_uid FROM commitment_reference JOIN instance USING (sop_instance_uid) "
        "WHERE request = commitment_request.id LIMIT 1) AS study FROM commitment_request "
        "WHERE state = 'failed' OR (state = 'judged' AND error <> '') ORDER BY id LIMIT ?",
        (STUCK_MAX,),
    ).fetchall()
    return [
        Stuck(
            kind="commitment",
            id=row["id"],
            study_instance_uid=row["study"] or "",
            name=f"report to {row['calling_ae_title']}",
            state=row["state"],
            why=row["error"],
            age_s=part.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
            next_s=None if row["state"] == "failed" else _wait_s(part, row),
        )
        for row in rows
    ]


def _wait_s(part: CatalogPart, row: sqlite3.Row) -> float:
    now = part.clock.boot()
    return max(row["not_before_s"] - now.seconds, 0.0) if row["not_before_boot_id"] == now.boot_id else 0.0
