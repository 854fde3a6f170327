"""The catalog's side of the work: ledger, jobs, outbox and status in one object, on one database."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dicom_node.model import StudyActivity, TimelineEvent
from dicom_node.store import status
from dicom_node.store.commitments import CommitmentRequests
from dicom_node.store.committed import Committed
from dicom_node.store.deliveries import Deliveries
from dicom_node.store.external import External
from dicom_node.store.jobs import Jobs
from dicom_node.store.ledger import Ledger
from dicom_node.store.returned import Returned
from dicom_node.store.rows import QueueOptions
from dicom_node.store.status import Stuck
from dicom_node.store.timeline import timeline

__all__ = ["QueueOptions", "SqliteQueue", "Stuck"]


class SqliteQueue(Ledger, Jobs, Deliveries, External, Returned, CommitmentRequests, Committed):
    """`StudyLedger`, `JobQueue`, `Outbox`, `EngineLedger`, `Returns`, `CommitmentBook`, `ReportBook` and `Status`."""

    def snapshot(self) -> Mapping[str, Any]:
        """Counts for metrics and readiness; the keys are those of `store.status.snapshot`."""
        return status.snapshot(self)

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
