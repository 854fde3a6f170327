"""Where each series stands: the ledger's classes, written down whenever a closing or a job changes them.

* *waiting*: it has images not yet routed, or its study is held for an identity conflict.
* *failed*: it could not be read or evaluated, or a job on it is a dead letter (of each rule its latest run counts), or
  its files were gone before it was routed.
* *routed*: a job on it waits, runs or is done, or its images were queued for a destination.
* *filtered*: no rule matched, its engine refused it, its job was cancelled, or it has no images, or fsck brought it
  back. The reason says which.
* *lost*: closed without a decision, or a matched rule without the job or sending it asked for. There must be none.

The class is kept per series because a scrape must not walk through every job ever made; `audit` does, and compares.
Whether a series is open, and which series hold documents only, is read from the index's tables at the time of asking.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter

from dicom_node.store.tally import RANK, tallied

__all__ = ["audit", "count_series", "count_studies", "moving_studies", "stand"]

# The definition. Jobs outweigh the latest closing: what an earlier rule set began is still accounted for.
_DERIVED = """
SELECT study_instance_uid, series_instance_uid, routed,
  CASE
    WHEN outcome = 'held' THEN 'waiting'
    WHEN outcome = 'failed' OR instr(states, 'failed') THEN 'failed'
    WHEN outcome = 'routed' AND unmet THEN 'lost'
    WHEN sent OR instr(states, 'done') OR instr(states, 'pending') OR instr(states, 'leased')
      OR instr(states, 'waiting') THEN 'routed'
    ELSE 'filtered'
  END AS class,
  CASE
    WHEN instr(states, 'rejected') THEN 'rejected by the engine'
    WHEN states <> '' THEN 'job cancelled'
    ELSE reason
  END AS reason
FROM (
  SELECT closed.*, closed.id AS routed,
    coalesce((SELECT group_concat(run.state) FROM job AS run
      WHERE run.study_instance_uid = closed.study_instance_uid
        AND run.series_instance_uid = closed.series_instance_uid
        AND run.run_number = (SELECT max(other.run_number) FROM job AS other
          WHERE other.study_instance_uid = closed.study_instance_uid
            AND other.series_instance_uid = closed.series_instance_uid AND other.rule = run.rule)), '') AS states,
    EXISTS (SELECT 1 FROM delivery WHERE delivery.study_instance_uid = closed.study_instance_uid
      AND delivery.series_instance_uid = closed.series_instance_uid AND delivery.job IS NULL) AS sent,
    EXISTS (SELECT 1 FROM json_each(closed.planned) AS plan
      WHERE NOT EXISTS (SELECT 1 FROM job WHERE job.study_instance_uid = closed.study_instance_uid
          AND job.series_instance_uid = closed.series_instance_uid AND job.rule = plan.value)
        AND NOT EXISTS (SELECT 1 FROM delivery WHERE delivery.study_instance_uid = closed.study_instance_uid
          AND delivery.series_instance_uid = closed.series_instance_uid AND delivery.rule = plan.value)) AS unmet
  FROM routed_series AS closed
)
"""

# The standing of every series of the studies in `:moving`; then of the documents `{where}` leaves.
_IMAGES = """
SELECT series.study_instance_uid AS study,
  CASE
    WHEN series.routing = 'open' THEN 'waiting'
    WHEN standing.class IS NOT NULL THEN standing.class
    WHEN series.routing = 'none' THEN 'filtered'
    ELSE 'lost'
  END AS class,
  coalesce(standing.reason, 'restored by fsck') AS reason
FROM series LEFT JOIN standing USING (study_instance_uid, series_instance_uid)
WHERE (series.image_count > 0 OR standing.class IS NOT NULL)
  AND series.study_instance_uid IN (SELECT value FROM json_each(:moving))
"""
_DOCUMENTS = """
SELECT study_instance_uid AS study, 'filtered' AS class, 'no images' AS reason FROM (
  SELECT DISTINCT study_instance_uid, series_instance_uid FROM instance WHERE origin = 'received' AND is_image = 0
) AS document WHERE NOT EXISTS (
  SELECT 1 FROM series LEFT JOIN standing USING (study_instance_uid, series_instance_uid)
  WHERE series.study_instance_uid = document.study_instance_uid
    AND series.series_instance_uid = document.series_instance_uid
    AND (series.image_count > 0 OR standing.class IS NOT NULL))
"""
# Received, and every image found missing or damaged by fsck before it was routed: few.
_GONE = """
SELECT DISTINCT study_instance_uid AS study, 'failed' AS class, 'its files are missing' AS reason, series_instance_uid
FROM instance WHERE state = 'missing' AND origin = 'received' AND is_image = 1 AND NOT EXISTS (
  SELECT 1 FROM series LEFT JOIN standing USING (study_instance_uid, series_instance_uid)
  WHERE series.study_instance_uid = instance.study_instance_uid
    AND series.series_instance_uid = instance.series_instance_uid
    AND (series.image_count > 0 OR standing.class IS NOT NULL))
  AND NOT EXISTS (SELECT 1 FROM instance AS document WHERE document.study_instance_uid = instance.study_instance_uid
    AND document.series_instance_uid = instance.series_instance_uid
    AND document.origin = 'received' AND document.is_image = 0)
"""
# Studies with series whose kept standing is not the whole truth, or that have none: few.
_MOVING = f"""
SELECT study_instance_uid FROM series WHERE routing = 'open'
UNION SELECT study_instance_uid FROM series WHERE routing = 'none' AND image_count > 0
UNION SELECT study_instance_uid FROM unsettled
UNION SELECT study FROM ({_GONE})
"""
_IN_MOVING = "study_instance_uid IN (SELECT value FROM json_each(:moving))"


def stand(connection: sqlite3.Connection, study_instance_uid: str, series_instance_uid: str, routed: int = 0) -> None:
    """Write down where a series stands now, after its closing `routed` or (0) after a job of it moved."""
    key = (study_instance_uid, series_instance_uid)
    if not routed:
        row = connection.execute(
            "SELECT routed FROM standing WHERE study_instance_uid = ? AND series_instance_uid = ?", key
        ).fetchone()
        if row is None:
            return
        routed = row["routed"]
    # no REPLACE: it would take the old row away past the triggers of `store.tally`
    connection.execute(
        f"INSERT INTO standing {_DERIVED} WHERE routed = ? ON CONFLICT (study_instance_uid, series_instance_uid) "
        "DO UPDATE SET routed = excluded.routed, class = excluded.class, reason = excluded.reason",
        (routed,),
    )


def audit(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """(study, series) whose kept standing is not what its rows say; slow, for fsck and tests."""
    rows = connection.execute(
        f"SELECT kept.study_instance_uid, kept.series_instance_uid FROM standing AS kept JOIN ({_DERIVED}) AS derived "
        "USING (routed) WHERE (kept.class, kept.reason) <> (derived.class, derived.reason)"
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def moving_studies(connection: sqlite3.Connection) -> str:
    """The studies that must be looked at closely, as a JSON list, for the two counts."""
    return json.dumps([row[0] for row in connection.execute(_MOVING)])


def count_series(connection: sqlite3.Connection, moving: str) -> dict[tuple[str, str], int]:
    """(class, reason) to the number of received series that stand there.

    Studies in which nothing moves are counted by what is kept; only the others, documents, and series whose files are
    gone are looked at closely.
    """
    group = "GROUP BY class, reason"
    counts = Counter(tallied(connection, "standing"))
    for sign, table in (
        (-1, f"standing WHERE {_IN_MOVING}"),
        (1, f"({_IMAGES})"),
        (1, f"({_DOCUMENTS})"),
        (1, f"({_GONE})"),
    ):
        for name, reason, count in connection.execute(
            f"SELECT class, reason, count(*) FROM {table} {group}", {"moving": moving}
        ):
            counts[name, reason] += sign * count
    return {key: count for key, count in counts.items() if count}


def count_studies(connection: sqlite3.Connection, moving: str) -> dict[str, int]:
    """Class to the number of received studies that stand there; a study stands where the worst of its series does."""
    rank = "CASE class " + " ".join(f"WHEN '{name}' THEN {number}" for number, name in enumerate(RANK)) + " END"
    counts: Counter[str] = Counter()
    for (kept, _), count in tallied(connection, "study_standing").items():
        counts[RANK[int(kept)]] += count
    for sign, studies in (
        (-1, f"SELECT rank AS worst FROM study_rank WHERE {_IN_MOVING}"),
        (
            1,
            f"SELECT min({rank}) AS worst FROM (SELECT study, class FROM ({_IMAGES}) "
            f"UNION ALL SELECT study, class FROM ({_GONE})) GROUP BY study",
        ),
        # a study of documents only; any other stands by its images
        (
            1,
            f"SELECT {RANK.index('filtered')} AS worst FROM ({_DOCUMENTS}) AS document WHERE NOT EXISTS "
            "(SELECT 1 FROM series LEFT JOIN standing USING (study_instance_uid, series_instance_uid) "
            "WHERE series.study_instance_uid = document.study "
            "AND (series.image_count > 0 OR standing.class IS NOT NULL)) "
            f"AND document.study NOT IN (SELECT study FROM ({_GONE})) GROUP BY study",
        ),
    ):
        for worst, count in connection.execute(
            f"SELECT worst, count(*) FROM ({studies}) GROUP BY worst", {"moving": moving}
        ):
            counts[RANK[worst]] += sign * count
    return {name: count for name, count in counts.items() if count}
