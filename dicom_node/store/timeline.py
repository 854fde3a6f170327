"""What happened to a study and when, for people: `dicom-node timeline STUDY` and the demonstration's report.

Triggers note every move of a job or a delivery in `history`, in the transaction that makes it, so the timeline is as
complete as the states themselves and no verb has to remember it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence

from dicom_node.model import TimelineEvent
from dicom_node.store.rows import CatalogPart, utc

__all__ = ["timeline"]

_CLOSED_BY = {
    "idle": "complete (quiet)",
    "forced": "taken as complete (waited long enough)",
    "immediate": "complete (single image)",
    "operator": "routed by a person",
}


def timeline(part: CatalogPart, study_instance_uid: str) -> Sequence[TimelineEvent]:
    """Everything that happened to a study, oldest first; empty for an unknown study."""
    with part.database.read() as connection:
        events = [
            *_received(connection, study_instance_uid),
            *_closed(connection, study_instance_uid),
            *_jobs(connection, study_instance_uid),
            *_deliveries(connection, study_instance_uid),
            *_notes(connection, study_instance_uid),
            *_sendings(connection, study_instance_uid),
            *_cancellations(connection, study_instance_uid),
            *_returned(connection, study_instance_uid),
            *_commitments(connection, study_instance_uid),
            *_deletions(connection, study_instance_uid),
        ]
    return sorted(events, key=lambda event: event.at)


def _received(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    row = connection.execute(
        "SELECT min(received_at) AS first, max(received_at) AS last, count(*) AS instances, "
        "count(DISTINCT series_instance_uid) AS series, max(source) AS source "
        "FROM instance WHERE study_instance_uid = ? AND origin = 'received'",
        (study,),
    ).fetchone()
    if not row["instances"]:
        return
    sender = json.loads(row["source"]).get("calling_ae_title", "")
    yield TimelineEvent(at=utc(row["first"]), text=f"first instance received from {sender}")
    if row["instances"] > 1:
        text = f"last instance received: {row['instances']} in {row['series']} series"
        yield TimelineEvent(at=utc(row["last"]), text=text)


def _closed(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute(
        "SELECT closed.*, series.modality, series.image_count FROM routed_series AS closed "
        "JOIN series USING (study_instance_uid, series_instance_uid) "
        "WHERE closed.study_instance_uid = ? ORDER BY closed.id",
        (study,),
    ).fetchall()
    for row in rows:
        what = f"{row['modality'] or '?'} series of {row['image_count']}"
        rules = ", ".join(json.loads(row["planned"]))
        outcome = f"routed by {rules}" if rules else f"{row['outcome']}: {row['reason']}"
        text = f"{what} {_CLOSED_BY.get(row['close_trigger'], row['close_trigger'])}, {outcome}"
        yield TimelineEvent(at=utc(row["routed_at"]), text=text)


def _jobs(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute(
        "SELECT history.*, job.engine, job.stages FROM history JOIN job ON job.id = ref "
        "WHERE kind = 'job' AND history.study_instance_uid = ? ORDER BY history.id",
        (study,),
    ).fetchall()
    for row in _without_looks(rows):
        if isinstance(row, TimelineEvent):
            yield row
            continue
        name = f"job {row['ref']} ({row['engine']})"
        if row["state"] == "done":
            text = f"{name} done: {_stages(row['stages'])}"
        elif row["state"] == "leased":
            text = f"{name} begun"
        else:
            text = _state(name, row)
        yield TimelineEvent(at=utc(row["at"]), text=text)


def _without_looks(rows: Sequence[sqlite3.Row]) -> Iterator[sqlite3.Row | TimelineEvent]:
    """Moves of jobs; of the looks at an engine that still worked, one line instead of two for each look."""
    waiting: set[int] = set()
    begun: dict[int, sqlite3.Row] = {}
    looks: dict[int, list[sqlite3.Row]] = {}
    for row in rows:
        job, state = row["ref"], row["state"]
        if state == "leased" and job in waiting:
            begun[job] = row
        elif state == "waiting" and job in begun:
            del begun[job]
            looks.setdefault(job, []).append(row)
        else:
            if seen := looks.pop(job, None):
                yield _looked(seen)
            if job in begun:
                yield begun.pop(job)
            waiting.discard(job)
            if state == "waiting":
                waiting.add(job)
            yield row
    for seen in looks.values():
        yield _looked(seen)
    yield from begun.values()


def _looked(rows: Sequence[sqlite3.Row]) -> TimelineEvent:
    last = rows[-1]
    times = f"{len(rows)} times" if len(rows) > 1 else "once"
    return TimelineEvent(at=utc(last["at"]), text=f"job {last['ref']} ({last['engine']}) asked {times}: not done yet")


def _stages(text: str) -> str:
    stages = json.loads(text)
    return ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()) or "no times kept"


def _deliveries(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute(
        "SELECT history.*, delivery.destination, (SELECT count(*) FROM delivery_item WHERE delivery = ref "
        "AND state = 'sent') AS sent, (SELECT count(*) FROM delivery_item WHERE delivery = ref "
        "AND commitment = 'committed') AS committed FROM history JOIN delivery ON delivery.id = ref "
        "WHERE kind = 'delivery' AND history.study_instance_uid = ? ORDER BY history.id",
        (study,),
    ).fetchall()
    before: dict[int, str] = {}
    for row in rows:
        earlier, before[row["ref"]] = before.get(row["ref"]), row["state"]
        if row["state"] == "done":
            text = f"delivered to {row['destination']}: {row['sent']} objects"
            if row["committed"]:
                text += f", it committed to {row['committed']}"
        elif row["state"] == "committing":
            text = f"sent to {row['destination']}, asked to commit to keeping it"
        elif row["state"] == "leased" and earlier == "committing":
            continue  # a look at the report, or another question: what follows says it
        elif row["state"] == "leased":
            text = f"sending to {row['destination']}"
        else:
            text = _state(f"delivery to {row['destination']}", row)
        yield TimelineEvent(at=utc(row["at"]), text=text)


_COMMITMENTS = """
SELECT asked.*, count(*) AS objects, count(*) FILTER (WHERE reason = 0) AS kept
FROM commitment_request AS asked JOIN commitment_reference ON request = asked.id JOIN instance USING (sop_instance_uid)
WHERE study_instance_uid = ? GROUP BY asked.id ORDER BY asked.id
"""


def _commitments(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    for row in connection.execute(_COMMITMENTS, (study,)).fetchall():
        peer = row["calling_ae_title"]
        asked = f"{peer} asked the node to commit to {row['objects']} objects"
        yield TimelineEvent(at=utc(row["asked_at"]), text=asked)
        if row["state"] == "reported":
            yield TimelineEvent(at=utc(row["ended_at"]), text=f"{peer} was told: committed to {row['kept']}")
        elif row["state"] == "failed":
            text = f"{peer} could not be told what was committed to: {row['error']}"
            yield TimelineEvent(at=utc(row["ended_at"]), text=text)


def _deletions(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute("SELECT * FROM deletion WHERE study_instance_uid = ? ORDER BY id", (study,)).fetchall()
    for row in rows:
        objects = sum(json.loads(row["instances"]).values())
        by = f"by {row['who']}" if row["rule"] == "person" else f"by retention rule {row['rule']}"
        safe = ", ".join(f"{how} at {where}" for where, how in json.loads(row["safe"]).items())
        text = f"deleted {by}: {objects} objects in {row['series']} series, {row['bytes']} bytes; {row['why']}"
        yield TimelineEvent(at=utc(row["at"]), text=text + (f"; {safe}" if safe else ""))
        if row["ended_at"] is None:
            yield TimelineEvent(at=utc(row["at"]), text="its files are still being removed")


def _state(name: str, row: sqlite3.Row) -> str:
    return f"{name} {row['state']}" + (f": {row['detail']}" if row["detail"] else "")


def _notes(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute(
        "SELECT history.*, job.engine FROM history JOIN job ON job.id = ref "
        "WHERE kind = 'note' AND history.study_instance_uid = ? ORDER BY history.id",
        (study,),
    ).fetchall()
    for row in rows:
        yield TimelineEvent(at=utc(row["at"]), text=f"job {row['ref']} ({row['engine']}) notes: {row['detail']}")


def _sendings(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    for row in connection.execute(
        "SELECT * FROM sending WHERE study_instance_uid = ? ORDER BY id", (study,)
    ).fetchall():
        job = row["job"] if row["job"] is not None else row["former_job"]
        by = f"job {job}" if job is not None else "by hand"
        who = "identifiable" if row["identifiable"] else "not identifiable"
        what = f"{row['objects']} objects ({row['what']}, {who}) to {row['engine']} at {row['host']}, {by}"
        unknown = "" if row["ended_at"] else "; nothing is known of how it ended"
        yield TimelineEvent(at=utc(row["begun_at"]), text=f"about to send {what}{unknown}")
        if row["ended_at"]:
            text = f"{row['state']}: {what}{_measured(row)}" + (f": {row['error']}" if row["error"] else "")
            yield TimelineEvent(at=utc(row["ended_at"]), text=text)


def _measured(row: sqlite3.Row) -> str:
    size = f", {row['bytes']} bytes" if row["bytes"] is not None else ""
    digest = f", sha256 {row['sha256']}" if row["sha256"] else ""
    return size + digest + (f", there {row['remote_id']}" if row["remote_id"] else "")


_RETURNED = """
SELECT calling_ae_title, job, outcome IN ('duplicate', 'variant', 'header-changed', 'other-syntax', 'refused')
  AND EXISTS (SELECT 1 FROM instance WHERE instance.sop_instance_uid = returned.sop_instance_uid
              AND origin = 'received') AS own,
  EXISTS (SELECT 1 FROM returned AS taken WHERE taken.sop_instance_uid = returned.sop_instance_uid
          AND taken.job IS NOT NULL) AS again,
  count(*) AS objects, max(at) AS last, group_concat(DISTINCT modality) AS modalities
FROM returned WHERE about_study = :study OR study_instance_uid = :study
GROUP BY calling_ae_title, job, own, again
"""


def _returned(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    for row in connection.execute(_RETURNED, {"study": study}).fetchall():
        what = f"{row['objects']} objects ({row['modalities'].replace(',', ', ')}) came back from"
        if row["job"] is not None:
            became = f"results of job {row['job']}"
        elif row["own"]:
            became = "they are images the node has, and no result"
        else:
            became = "of a job that has them already" if row["again"] else "of no job so far; they are kept"
        yield TimelineEvent(at=utc(row["last"]), text=f"{what} {row['calling_ae_title']}: {became}")


def _cancellations(connection: sqlite3.Connection, study: str) -> Iterator[TimelineEvent]:
    rows = connection.execute(
        "SELECT * FROM cancellation WHERE study_instance_uid = ? ORDER BY id", (study,)
    ).fetchall()
    for row in rows:
        name = f"engine {row['engine']} is to stop job {row['job']}" + (f" ({row['handle']})" if row["handle"] else "")
        yield TimelineEvent(at=utc(row["asked_at"]), text=name)
        if row["state"] == "told":
            yield TimelineEvent(at=utc(row["ended_at"]), text=f"{name}: told")
        elif row["state"] == "failed":
            why = f"given up after {row['attempts']} tries: {row['error']}"
            yield TimelineEvent(at=utc(row["ended_at"]), text=f"{name}: {why}")
