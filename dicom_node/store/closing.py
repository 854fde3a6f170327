"""Closing one series, inside the ledger's transaction: header, verdicts, jobs, deliveries of the source, standing.

Here the once-only rules live: which job is made, which is not, and which earlier one is out of date.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicom_node.interfaces import RoutedSeries
from dicom_node.model import (
    CloseTrigger,
    JobState,
    LatePolicy,
    PlannedJob,
    SendWhat,
    StudyActivity,
    Verdict,
)
from dicom_node.store.deliveries import queue_source
from dicom_node.store.jobs import move_job
from dicom_node.store.rows import input_digest, insert, json_text, packed_header
from dicom_node.store.standing import stand

__all__ = ["Closing", "close", "close_study", "received", "unchanged"]

_UNDER_WAY = (JobState.PENDING.value, JobState.LEASED.value, JobState.WAITING.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What one call of `route_series` knows for every series."""

    activity: StudyActivity
    revision: int
    trigger: CloseTrigger
    rule_set_digest: str
    held: bool
    times: Mapping[str, Any]


def received(connection: sqlite3.Connection, study_instance_uid: str, series_instance_uid: str) -> list[sqlite3.Row]:
    """Rows of the visible RECEIVED instances of a series, by instance number."""
    return connection.execute(
        "SELECT * FROM instance WHERE study_instance_uid = ? AND series_instance_uid = ? "
        "AND origin = 'received' AND state = 'present' ORDER BY instance_order, sop_instance_uid",
        (study_instance_uid, series_instance_uid),
    ).fetchall()


def unchanged(connection: sqlite3.Connection, closing: Closing, series_instance_uid: str) -> bool:
    """Whether the series is as the activity saw it; only a person closes one that is not open."""
    row = connection.execute(
        "SELECT routing, received_seq FROM series WHERE study_instance_uid = ? AND series_instance_uid = ?",
        (closing.activity.study_instance_uid, series_instance_uid),
    ).fetchone()
    if row is None or row["received_seq"] != closing.activity.received_seq.get(series_instance_uid):
        return False
    return bool(row["routing"] == "open" or closing.trigger is CloseTrigger.OPERATOR)


def close(connection: sqlite3.Connection, closing: Closing, series: RoutedSeries) -> list[int]:
    """Close one series by what was decided; returns the ids of its new jobs."""
    planned = [plan for plan in series.jobs if plan.engine or plan.destinations]
    outcome, reason = _outcome(closing, series, planned)
    study, uid = closing.activity.study_instance_uid, series.series_instance_uid
    routed = insert(
        connection,
        "routed_series",
        {
            "study_instance_uid": study,
            "series_instance_uid": uid,
            "revision": closing.revision,
            "close_trigger": closing.trigger.value,
            "rule_set_digest": closing.rule_set_digest,
            "outcome": outcome,
            "reason": reason,
            "planned": json_text([plan.rule for plan in planned]),
            "routed_at": closing.times["created_at"],
        },
    )
    connection.execute(
        "INSERT INTO series_header (study_instance_uid, series_instance_uid, header) VALUES (?, ?, ?) "
        "ON CONFLICT DO UPDATE SET header = excluded.header",
        (study, uid, packed_header(series.header)),
    )
    _insert_verdicts(connection, routed, series.verdicts)
    connection.execute(
        "UPDATE series SET routing = 'routed' WHERE study_instance_uid = ? AND series_instance_uid = ?", (study, uid)
    )
    made: list[int] = []
    if outcome == "routed":
        instances = received(connection, study, uid)
        digest = input_digest((row["sop_instance_uid"], row["sha256"]) for row in instances)
        for plan in planned:
            if plan.engine:
                made += _make_job(connection, closing, plan, digest, instances)
            if not plan.engine or plan.send_what is not SendWhat.RESULTS:
                _send_source(connection, closing, plan, digest, instances)
    stand(connection, study, uid, routed)
    return made


def _outcome(closing: Closing, series: RoutedSeries, planned: Sequence[PlannedJob]) -> tuple[str, str]:
    if series.failure:
        return "failed", series.failure
    if planned:
        return ("held", "identity conflict") if closing.held else ("routed", "")
    if not series.verdicts:
        return "filtered", "no rules"
    matched = any(verdict.matched for verdict in series.verdicts)
    return "filtered", "the rule asks for nothing" if matched else "no rule matched"


def _insert_verdicts(connection: sqlite3.Connection, routed: int, verdicts: Sequence[Verdict]) -> None:
    for position, verdict in enumerate(verdicts):
        conditions = [
            {
                "expression": condition.expression,
                "outcome": condition.outcome.value,
                "values": dict(condition.values),
                "explanation": condition.explanation,
            }
            for condition in verdict.conditions
        ]
        columns = {
            "routed": routed,
            "position": position,
            "rule": verdict.rule,
            "matched": verdict.matched,
            "reason": verdict.reason,
            "conditions": json_text(conditions),
        }
        insert(connection, "verdict", columns)


def _make_job(
    connection: sqlite3.Connection,
    closing: Closing,
    plan: PlannedJob,
    digest: str,
    instances: Sequence[sqlite3.Row],
) -> list[int]:
    """Zero or one new job, by the once-only rules of `route_series`."""
    runs = connection.execute(
        "SELECT id, state, run_number, input_digest FROM job "
        "WHERE study_instance_uid = ? AND series_instance_uid = ? AND rule = ? ORDER BY run_number",
        (closing.activity.study_instance_uid, plan.series_instance_uid, plan.rule),
    ).fetchall()
    same = [run for run in runs if run["input_digest"] == digest]
    if closing.activity.again:
        if any(run["state"] in _UNDER_WAY for run in same):
            return []
    elif same or (runs and plan.late_instances is LatePolicy.IGNORE):
        return []
    last = runs[-1] if runs else None
    made = insert(
        connection,
        "job",
        {
            "study_instance_uid": closing.activity.study_instance_uid,
            "revision": closing.revision,
            "series_instance_uid": plan.series_instance_uid,
            "rule": plan.rule,
            "engine": plan.engine,
            "priority": plan.priority.value,
            "rank": plan.priority.rank,
            "results": json_text(plan.results),
            "destinations": json_text(plan.destinations),
            "send_what": plan.send_what.value,
            "late_instances": plan.late_instances.value,
            "run_number": last["run_number"] + 1 if last else 1,
            "input_digest": digest,
            "superseded_job": last["id"] if last else None,
            **closing.times,
        },
    )
    connection.executemany(
        "INSERT INTO job_input (job, sop_instance_uid, sha256) VALUES (?, ?, ?)",
        [(made, row["sop_instance_uid"], row["sha256"]) for row in instances],
    )
    for run in runs:
        if run["state"] in _UNDER_WAY:
            move_job(connection, run["id"], "cancel", error=f"superseded by job {made}: the images changed")
    return [made]


def _send_source(
    connection: sqlite3.Connection,
    closing: Closing,
    plan: PlannedJob,
    digest: str,
    instances: Sequence[sqlite3.Row],
) -> None:
    for destination in dict.fromkeys(plan.destinations):
        columns = {
            "study_instance_uid": closing.activity.study_instance_uid,
            "series_instance_uid": plan.series_instance_uid,
            "rule": plan.rule,
            "destination": destination,
            "input_digest": digest,
            "rank": plan.priority.rank,
            **closing.times,
        }
        later_too = plan.late_instances is LatePolicy.RERUN
        queue_source(connection, columns, instances, later_too=later_too, again=closing.activity.again)


def close_study(connection: sqlite3.Connection, study_instance_uid: str) -> None:
    """With its last open series closed a revision ends; what feeds the next one is noted anew."""
    still_open = connection.execute(
        "SELECT 1 FROM series WHERE study_instance_uid = ? AND routing = 'open' LIMIT 1", (study_instance_uid,)
    ).fetchone()
    if still_open is None:
        connection.execute(
            "UPDATE study SET opened_boot_s = NULL, opened_boot_id = NULL WHERE study_instance_uid = ?",
            (study_instance_uid,),
        )
        connection.execute("DELETE FROM study_association WHERE study_instance_uid = ?", (study_instance_uid,))
