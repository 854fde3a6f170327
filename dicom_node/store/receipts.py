"""What was received, written down apart from what became of it: the side of the ledger that nothing else can change.

One row for each series, made in the transaction of its first RECEIVED instance and never touched again: in which hour
(UTC) it came, and from which calling AE. Routing, jobs, deliveries and repairs do not know the table, so a series that
drops out of theirs is still missed here. Only who deletes a study on purpose deletes its receipts, in one transaction.

    received = routed + filtered + waiting + failed          for each source, each hour, and in all

A scrape compares the totals; `by_source_and_hour` looks at each series of the time asked for, and `unaccounted` names
those that break the balance. What each class means is said in `store.standing`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from dicom_node.model import InstanceRecord
from dicom_node.store.rows import utc_text
from dicom_node.store.tally import tallied

__all__ = ["HOUR", "LedgerLine", "Unaccounted", "by_source_and_hour", "note_receipt", "received_totals", "unaccounted"]

CLASSES = ("routed", "filtered", "waiting", "failed")
UNACCOUNTED_MAX = 100
HOUR = 13  # characters of an ISO 8601 time up to its hour

# Where one received series stands, each looked up by key; what is in none of the four classes is 'lost'.
_STANDS = """
SELECT receipt.*,
  CASE
    WHEN series.study_instance_uid IS NULL THEN 'lost'
    WHEN series.routing = 'open' THEN 'waiting'
    WHEN standing.class IS NOT NULL THEN standing.class
    WHEN series.image_count > 0 AND series.routing = 'none' THEN 'filtered'
    WHEN series.image_count > 0 THEN 'lost'
    WHEN EXISTS (SELECT 1 FROM instance WHERE instance.study_instance_uid = receipt.study_instance_uid
      AND instance.series_instance_uid = receipt.series_instance_uid AND origin = 'received' AND is_image = 0)
      THEN 'filtered'
    WHEN EXISTS (SELECT 1 FROM instance WHERE instance.study_instance_uid = receipt.study_instance_uid
      AND instance.series_instance_uid = receipt.series_instance_uid AND origin = 'received' AND is_image = 1
      AND state = 'missing') THEN 'failed'
    ELSE 'lost'
  END AS class
FROM receipt
LEFT JOIN series USING (study_instance_uid, series_instance_uid)
LEFT JOIN standing USING (study_instance_uid, series_instance_uid)
"""
# The other way about: a series the ledger counts and nobody remembers to have received.
_WITHOUT_RECEIPT = """
SELECT study_instance_uid, series_instance_uid FROM series
WHERE (image_count > 0 OR routing <> 'none') AND NOT EXISTS (SELECT 1 FROM receipt
  WHERE receipt.study_instance_uid = series.study_instance_uid
    AND receipt.series_instance_uid = series.series_instance_uid)
ORDER BY study_instance_uid, series_instance_uid LIMIT ?
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLine:
    """The series of one source and hour, by where they stand now. `hour`: ISO 8601 UTC up to the hour."""

    hour: str
    calling_ae_title: str
    received: int
    routed: int
    filtered: int
    waiting: int
    failed: int

    @property
    def imbalance(self) -> int:
        """Series in no class; must be 0."""
        return self.received - self.routed - self.filtered - self.waiting - self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Unaccounted:
    """A series that breaks the balance, and how."""

    study_instance_uid: str
    series_instance_uid: str
    why: str


def note_receipt(connection: sqlite3.Connection, record: InstanceRecord) -> None:
    """A RECEIVED instance is indexed: its series was received, unless that is known."""
    header = record.header
    connection.execute(
        "INSERT OR IGNORE INTO receipt (study_instance_uid, series_instance_uid, hour, calling_ae) VALUES (?, ?, ?, ?)",
        (
            *(header.study_instance_uid, header.series_instance_uid),
            *(utc_text(record.received_at)[:HOUR], record.source.calling_ae_title),
        ),
    )


def received_totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many series, and how many studies, were received."""
    series, studies = tallied(connection, "received_series"), tallied(connection, "received_studies")
    return sum(series.values()), sum(studies.values())


def by_source_and_hour(connection: sqlite3.Connection, since: datetime | None) -> Sequence[LedgerLine]:
    """The ledger of what was received since the hour `since` is in (None: ever), oldest first."""
    lines: dict[tuple[str, str], dict[str, int]] = {}
    for hour, source, name, count in connection.execute(
        f"SELECT hour, calling_ae, class, count(*) FROM ({_STANDS} WHERE hour >= ?) GROUP BY hour, calling_ae, class",
        ("" if since is None else utc_text(since)[:HOUR],),
    ):
        lines.setdefault((hour, source), {})[name] = count
    return [_line(hour, source, counts) for (hour, source), counts in sorted(lines.items())]


def _line(hour: str, source: str, counts: Mapping[str, int]) -> LedgerLine:
    known = {name: counts.get(name, 0) for name in CLASSES}
    return LedgerLine(hour=hour, calling_ae_title=source, received=sum(counts.values()), **known)


def unaccounted(connection: sqlite3.Connection) -> Sequence[Unaccounted]:
    """Series that break the balance, at most UNACCOUNTED_MAX of each kind; looks at every series there is."""
    lost = connection.execute(
        f"SELECT study_instance_uid, series_instance_uid FROM ({_STANDS}) WHERE class NOT IN {CLASSES} LIMIT ?",
        (UNACCOUNTED_MAX,),
    ).fetchall()
    more = connection.execute(_WITHOUT_RECEIPT, (UNACCOUNTED_MAX,)).fetchall()
    return [
        Unaccounted(study_instance_uid=row[0], series_instance_uid=row[1], why=why)
        for rows, why in ((lost, "received, and in no class"), (more, "in the index, and never received"))
        for row in rows
    ]
