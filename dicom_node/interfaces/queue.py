"""Studies and jobs as the catalog keeps them, and what is going on."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from dicom_node.model import (
    Cancellation,
    CloseTrigger,
    InstanceRecord,
    Job,
    Origin,
    PlannedJob,
    Priority,
    Sending,
    SendingRecord,
    SendingState,
    SeriesHeader,
    SeriesView,
    StoredInstance,
    StudyActivity,
    Verdict,
)

if TYPE_CHECKING:  # pydicom and numpy are slow to load, and the first process needs neither
    from dicom_node.values import Pending

__all__ = [
    "EngineLedger",
    "JobQueue",
    "OpenJob",
    "OpenStudies",
    "ReturnedObject",
    "Returns",
    "RoutedSeries",
    "Status",
    "StudyLedger",
    "WorkQueue",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedSeries:
    """What routing decided for one series: its header, every rule's verdict and the jobs that follow.

    With `failure` set nothing could be decided: the series is closed as failed, for that reason, until a person routes
    it.
    """

    series_instance_uid: str
    header: SeriesHeader
    verdicts: tuple[Verdict, ...]
    jobs: tuple[PlannedJob, ...]
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStudies:
    """What can be seen of all open studies at a glance, however many they are.

    `marks`: of each, by Study Instance UID, something that changes when an instance of it is received or a series of it
    opened. `associations`: the ids of all that are open, whatever they feed.
    """

    marks: Mapping[str, Hashable]
    associations: frozenset[str]


class StudyLedger(Protocol):
    """Studies from first instance to verdict. received = routed + filtered + waiting + failed, always."""

    def open_at_a_glance(self) -> OpenStudies:
        """Every study revision with series not yet routed; much cheaper than `open_studies`."""
        ...

    def open_studies(self, only: Collection[str] | None = None) -> Sequence[StudyActivity]:
        """Every study revision with series not yet routed, oldest first; of these Study Instance UIDs `only`."""
        ...

    def series_instances(self, study_instance_uid: str, series_instance_uid: str) -> Sequence[StoredInstance]:
        """The visible RECEIVED instances of one series."""
        ...

    def series_view(self, study_instance_uid: str, series_instance_uid: str, header: SeriesHeader) -> SeriesView:
        """The study-side facts of a series, joined with its header."""
        ...

    def route_series(
        self,
        activity: StudyActivity,
        routed: Sequence[RoutedSeries],
        trigger: CloseTrigger,
        rule_set_digest: str,
    ) -> Sequence[int]:
        """Close these series of this revision: headers, verdicts and jobs in one transaction; returns new job ids.

        A series that got an instance since `activity` was read is left open (its transaction part is skipped).
        A job whose (rule, series, input digest) was already run or is under way is not created again (once-only);
        with LatePolicy.IGNORE no second job for (rule, series) is created at all; otherwise the new job's
        run_number follows the last one's and `superseded_job` names it. A job for a rule with engine '' creates
        deliveries of the source instead. Studies with an unreleased identity conflict get verdicts but no jobs.
        """
        ...

    def reopen_study(self, study_instance_uid: str, *, again: bool) -> StudyActivity:
        """For `dicom-node route`: the study with all its series pending. `again` lets jobs be made whose input did
        not change, under a new run number. Raises NotFound.
        """
        ...

    def release_study(self, study_instance_uid: str) -> None:
        """Let a study with an identity conflict be analysed. Raises NotFound."""
        ...

    def verdicts(self, study_instance_uid: str) -> Sequence[Verdict]:
        """The latest verdicts on every series of the study."""
        ...

    def series_history(self, since: datetime) -> Iterator[SeriesView]:
        """Series closed since then with their kept headers, for `rules replay`."""
        ...


class JobQueue(Protocol):
    """Work, leased with fencing tokens."""

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
        """
        ...

    def extend_job(self, job: Job, lease_s: float) -> None:
        """Heartbeat. Raises LeaseLost (also when the job was cancelled: the work must be dropped)."""
        ...

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
        with the same digest is adopted; with another digest the existing one is adopted and kept. `taken`: SOP Instance
        UIDs of what an engine stored here that is this job's now (`Returns`).
        """
        ...

    def reject_job(self, job: Job, reason: str) -> None:
        """The engine refuses this input for good: filtered, with the reason."""
        ...

    def retry_job_later(
        self, job: Job, error: str, delay_s: float, *, outage: bool = False, strike: bool = False
    ) -> None:
        """Back to PENDING after `delay_s`; `outage`: the attempt counts among `Job.outages`, `strike`: among
        `Job.strikes`. Raises LeaseLost.
        """
        ...

    def park_job(self, job: Job, pending: Pending, *, renew: bool = False) -> None:
        """WAITING for an external engine; `renew`: its age counts from now. Raises LeaseLost."""
        ...

    def give_up_job(self, job: Job, error: str) -> None:
        """FAILED: dead letter; what its engine works on for it (`job.handle`) is to be stopped. Raises LeaseLost."""
        ...

    def retry_job(self, job_id: int) -> None:
        """By a person: FAILED, REJECTED or CANCELLED back to PENDING. Raises NotFound, IllegalTransition."""
        ...

    def cancel_job(self, job_id: int) -> None:
        """By a person; what its engine works on for it is to be stopped. Raises NotFound, IllegalTransition."""
        ...

    def job(self, job_id: int) -> Job:
        """Raises NotFound."""
        ...

    def jobs(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[Job]:
        """Newest first."""
        ...

    def job_input(self, job: Job) -> tuple[Sequence[StoredInstance], SeriesHeader]:
        """Exactly the instances of `job.input_digest`, and the series' header as kept at its latest closing.

        Images that came after the job was made are left out. Raises NotFound when one of the instances was replaced
        by other content, StorageError when one is missing now.
        """
        ...

    def job_results(self, job_id: int) -> Sequence[StoredInstance]:
        """The instances a DONE job produced, in sending order."""
        ...


class EngineLedger(Protocol):
    """What is known of work outside the node: notes, sendings, and what is still to be stopped there."""

    def remember(self, job: Job, note: str) -> None:
        """Keep `note` with the job until it ends; durable. Raises as `EngineTask.remember` does."""
        ...

    def begin_sending(
        self, sending: Sending, *, engine: str, study_instance_uid: str, series_instance_uid: str, job: Job | None
    ) -> int:
        """Durable as "about to send"; its id. Raises LeaseLost when `job` (None: by hand) is another worker's now."""
        ...

    def end_sending(self, sending_id: int, sending: Sending, state: SendingState, error: str = "") -> None:
        """Durable; asks for no lease, for what has left has left. Once ended it stays as it is."""
        ...

    def sendings(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[SendingRecord]:
        """Newest first."""
        ...

    def stop_engine(self, job: Job, handle: str) -> None:
        """`handle` came when the job had been cancelled or given up meanwhile: have it stopped. Of one that goes on,
        nothing.
        """
        ...

    def next_cancellation(self, delays_s: Sequence[float]) -> Cancellation | None:
        """The first that is due, its try counted; due again after the delay of that try unless `end_cancellation` came.

        A process that dies over it thus uses one try. With all `delays_s` used it ends as failed.
        """
        ...

    def end_cancellation(self, cancellation: Cancellation, error: str = "", *, final: bool = True) -> None:
        """It is told (or with `error` and `final`: it will never be). Not `final`: only the reason is kept."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnedObject:
    """One object an engine sent here by C-STORE. `position` counts arrivals up, whatever the clocks say.

    `known_as`: the origin of what the index has under its SOP Instance UID; RETURNED when that is this object itself,
    RECEIVED when an engine sent one of the node's own images. None for what came under UIDs of one job: it is kept
    beside the index. `instance.path` is '' when nothing was kept, because the conflict policy refused it.
    """

    position: int
    instance: StoredInstance
    calling_ae_title: str
    age_s: float
    known_as: Origin | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """A job that waits for objects to come back: what it analyses, and the note of its engine."""

    job_id: int
    engine: str
    series_instance_uid: str
    sop_instance_uids: frozenset[str]
    note: str = field(repr=False)


class Returns(Protocol):
    """What came back from engines that answer by C-STORE. Reads only; a job takes objects by `JobQueue.finish_job`."""

    def latest_return(self) -> int:
        """The position of the latest arrival, 0 when there never was one: later ones have greater positions."""
        ...

    def returns(
        self, study_instance_uid: str, calling_ae_titles: Collection[str], after: int
    ) -> Sequence[ReturnedObject]:
        """What came in that study from these AEs after position `after` and is no job's yet, in order of arrival.

        What was sent again is listed once, as of its latest arrival. At most a few thousand.
        """
        ...

    def is_sending(self, calling_ae_titles: Collection[str], within_s: float) -> bool:
        """Whether any of these AEs has an association open that had traffic in the last seconds."""
        ...

    def open_jobs(self, study_instance_uid: str, engines: Collection[str]) -> Sequence[OpenJob]:
        """Jobs on that study, of these engines, that have not ended and whose engine remembered something."""
        ...


class WorkQueue(JobQueue, EngineLedger, Protocol):
    """What a worker needs of the catalog."""


class Status(Protocol):
    """Counts for `/metrics`, `/ready` and `dicom-node status`, computed from the catalog at the time of asking."""

    def snapshot(self) -> Mapping[str, Any]:
        """See `store.status.snapshot` for the keys: studies, ledger, jobs, deliveries, associations, variants."""
        ...
