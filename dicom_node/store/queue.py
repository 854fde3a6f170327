"""The catalog's side of the work: ledger, jobs, outbox and status in one object, on one database."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

from dicom_node.model import StudyActivity, TimelineEvent
from dicom_node.store import status
from dicom_node.store.commitments import CommitmentRequests
from dicom_node.store.committed import Committed
from dicom_node.store.deletions import Deletions
from dicom_node.store.deliveries import Deliveries
from dicom_node.store.external import External
from dicom_node.store.jobs import Jobs
from dicom_node.store.ledger import Ledger
from dicom_node.store.receipts import LedgerLine, Unaccounted, by_source_and_hour, unaccounted
from dicom_node.store.returned import Returned
from dicom_node.store.rows import QueueOptions
from dicom_node.store.standing import audit, stand
from dicom_node.store.status import Stuck
from dicom_node.store.tally import audit_tallies, recount
from dicom_node.store.timeline import timeline

__all__ = ["LedgerReport", "QueueOptions", "SqliteQueue", "Stuck"]

T = TypeVar("T")
PACE = 20.0
CHEAP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """`SqliteQueue.ledger`. `totals` (of series) and `studies` are those of `store.status.snapshot`: of all time that
    is here still. `deleted`: rule to studies and series that were taken out of all this since then.
    """

    lines: Sequence[LedgerLine]
    totals: Mapping[str, Any]
    studies: Mapping[str, int]
    unaccounted: Sequence[Unaccounted]
    deleted: Mapping[str, tuple[int, int]]


class _Paced(Generic[T]):
    """What may be costly to compute: then again only after PACE times as long as it took, a twentieth of the time."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._guard = threading.Lock()
        self._due = 0.0

    def __call__(self) -> T:
        with self._guard:
            began = time.monotonic()
            if began >= self._due:
                self._value = self._compute()
                now = time.monotonic()
                self._due = now + PACE * (now - began) if now - began > CHEAP_S else now
            return self._value


class SqliteQueue(Ledger, Jobs, Deliveries, External, Returned, CommitmentRequests, Committed, Deletions):
    """`StudyLedger`, `JobQueue`, `Outbox`, `EngineLedger`, `Returns`, `CommitmentBook`, `ReportBook` and `Status`."""

    def snapshot(self) -> Mapping[str, Any]:
        """Counts for metrics and readiness; the keys are those of `store.status.snapshot`.

        The ledger in it is of now while that is cheap; with a million studies it may be a minute old.
        """
        return status.snapshot(self, self._totals())

    @cached_property
    def _totals(self) -> _Paced[Mapping[str, Any]]:
        def compute() -> Mapping[str, Any]:
            with self.database.read() as connection:
                return status.ledger_totals(connection)

        return _Paced(compute)

    def ledger(self, since: datetime | None = None) -> LedgerReport:
        """What was received and where it stands: by source and hour since then (None: ever), in all, and what breaks
        the balance; see `store.receipts`. Not for every scrape: it looks at each series of that time.
        """
        deleted = self.deleted_by_rule(since)
        with self.database.read() as connection:
            totals = status.ledger_totals(connection)
            broken = totals["ledger"]["imbalance"] or totals["ledger_studies"]["imbalance"]
            return LedgerReport(
                lines=by_source_and_hour(connection, since),
                totals=totals["ledger"],
                studies=totals["ledger_studies"],
                unaccounted=unaccounted(connection) if broken else (),
                deleted=deleted,
            )

    def audit_counts(self, *, repair: bool) -> Sequence[str]:
        """For fsck: which of the counts and standings that are kept differ from what the rows say; `repair`: no more.

        Looks at every row there is.
        """
        with self.database.read() as connection:
            connection.execute("BEGIN")  # all of one moment
            try:
                stands, counts = audit(connection), audit_tallies(connection)
            finally:
                connection.execute("ROLLBACK")

        def write(connection: sqlite3.Connection) -> None:
            for study, series in audit(connection):
                stand(connection, study, series)
            if audit_tallies(connection):
                recount(connection)

        if repair and (stands or counts):
            self.database.write(write)
        return [*(f"standing of series {series} of study {study}" for study, series in stands), *counts]

    def stuck(
        self,
        *,
        destinations: Collection[str] | None = None,
        waits_for: Callable[[StudyActivity], tuple[str, float | None]] | None = None,
    ) -> Sequence[Stuck]:
        """What waits or failed and why, for `dicom-node status`; see `store.status.stuck`."""
        return status.stuck(self, destinations=destinations, waits_for=waits_for)

    def timeline(self, study_instance_uid: str) -> Sequence[TimelineEvent]:
        """Everything that happened to a study, oldest first; see `store.timeline`."""
        return timeline(self, study_instance_uid)
