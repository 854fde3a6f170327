"""Every contract between the parts; the semantics are in the docstrings and in `tests/contract/`.

Implementations never import each other, only this file, `model` and `errors`; `node` wires them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from dicom_node.model import (
    ArchivedFile,
    AssociationEnd,
    BootTime,
    Cancellation,
    CloseTrigger,
    CommitmentReport,
    CommitmentRequest,
    ConflictPolicy,
    Delivery,
    DeliveryState,
    Destination,
    EngineTask,
    InstanceRecord,
    Job,
    JournalPlace,
    Level,
    Match,
    ObjectReference,
    Origin,
    PlannedJob,
    Priority,
    Query,
    Receipt,
    Sending,
    SendingRecord,
    SendingState,
    SeriesHeader,
    SeriesView,
    Source,
    StoredInstance,
    StoreOutcome,
    StoreResult,
    StudyActivity,
    Verdict,
)

if TYPE_CHECKING:  # pydicom and numpy are slow to load, and the first process needs neither
    from pydicom.dataset import Dataset

    from dicom_node.values import EngineResult, Pending, ResultContext, ResultValue


class Clock(Protocol):
    """Time, injected. Leases, back-off and quiet time run on `boot`; `wall` is for people and results."""

    def boot(self) -> BootTime:
        """Now on the boot clock (counts through suspend, never jumps)."""
        ...

    def wall(self) -> datetime:
        """Now, aware, UTC."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; a test clock returns at once and moves time."""
        ...


def seconds_since(then: BootTime, now: BootTime) -> float:
    """Seconds from `then` to `now`; infinity when `then` belongs to another boot (it is long past)."""
    return now.seconds - then.seconds if then.boot_id == now.boot_id else float("inf")


# --- bytes ---------------------------------------------------------------------------------------------------------


class Spool(Protocol):
    """A data set being received. Without `commit` nothing of it survives, not even a crash."""

    def write(self, fragment: bytes | memoryview) -> None:
        """Append. Raises StorageError (out of space ...); the spool is then dead and must be discarded."""
        ...

    @property
    def length(self) -> int:
        """Data set bytes so far."""
        ...

    @property
    def sha256(self) -> str:
        """Of the data set bytes so far."""
        ...

    def view(self) -> memoryview:
        """The data set's bytes, readable until `commit` or `discard`, for validation without a copy.

        Nothing may be written after it.
        """
        ...

    def commit(self, receipt: Receipt | None = None) -> ArchivedFile:
        """Make bytes and name durable (fsync file, link, fsync folder; the order of reliability section 3).

        With a `receipt` an archive that has an intake journal may instead make bytes and receipt durable there, and
        the file later: `ArchivedFile.journal` then tells where. Whoever commits that way must hand the file to
        `Archive.settled` once it is indexed, or is not going to be.

        Raises StorageError; nothing is then visible under a final name that was not there before.
        """
        ...

    @property
    def created(self) -> bool:
        """After `commit`: whether the file is new under its name; false when the same object was there already."""
        ...

    def discard(self) -> None:
        """Forget it. Idempotent; a no-op after `commit`."""
        ...


class Archive(Protocol):
    """Durable bytes. Names derive from digests, never from a peer's text."""

    def begin(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        source_ae: str,
        made_for: str = "",
        for_results: bool = False,
    ) -> Spool:
        """Start receiving one data set; the arguments are for the file meta information (PS3.10 7.1).

        `made_for`: of a result, `model.Job.mark` of its job.

        Raises StorageError when free space is below the reserve; `for_results`: when that is used up too.
        """
        ...

    def path(self, location: str) -> str:
        """Absolute path of an archived file. Raises NotFound for a location that is not the archive's form."""
        ...

    def free_bytes(self) -> int:
        """Free space above the reserve; <= 0 means: refuse."""
        ...

    def locations(self) -> Iterator[str]:
        """Every file, for fsck; temporaries are not listed."""
        ...

    def remove(self, location: str) -> None:
        """Remove a file (of a transaction that failed, or a released variant). Missing is fine."""
        ...

    def settled(self, file: ArchivedFile, *, kept: bool = True) -> None:
        """The index holds this file as durably as the journal needs, or never will. A no-op without a journal.

        Not `kept`: it was refused or its store failed, and no replay may bring it back.
        """
        ...


# --- index ---------------------------------------------------------------------------------------------------------


class InstanceIndex(Protocol):
    """Which instances exist. Every write is durable (power-cut safe) when the call returns."""

    def add_instance(
        self,
        record: InstanceRecord,
        policy: ConflictPolicy,
        same_pixels: Callable[[StoredInstance], bool],
    ) -> StoreOutcome:
        """Index one archived instance, in one transaction with everything that must follow from it.

        Where `record.file.journal` is set the transaction notes that place, and is durable only together with the
        journal: its record is replayed at start unless the note is there.

        The same UID with the same sha256 and transfer syntax (as main row or kept variant) is DUPLICATE: no change.
        The same UID in another transfer syntax is OTHER_SYNTAX: kept as a listed variant. Other content follows
        `policy`: VARIANT or HEADER_CHANGED (decided by `same_pixels(first)`, called outside the transaction) when the
        first is kept, REPLACED, or REFUSED (nothing written). A NEW or REPLACED image of origin RECEIVED updates the
        study's and series' activity and, if the series was routed before, opens the study's next revision; SR, SEG,
        KO, PR, documents and instances of other origins never do.
        A study seen under a second (Patient ID, Issuer) is flagged, and stays one study.
        """
        ...

    def if_unreferenced(self, location: str, action: Callable[[], None]) -> bool:
        """Call `action` (which removes the file at `location`) if no row refers to the file, while none can come to.

        Returns whether it was called. `add_instance` refuses a file that is gone, so no row ever points at nothing.
        """
        ...

    def instance(self, sop_instance_uid: str) -> StoredInstance | None:
        """The visible instance of that UID, or None."""
        ...

    def instances(self, level: Level, uids: Mapping[str, Sequence[str]]) -> Iterator[StoredInstance]:
        """Visible instances under the given unique keys, ordered by series, instance number, UID; paged, no read
        transaction stays open between items. Keys: PatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID.
        """
        ...

    def find(self, query: Query) -> Iterator[Match]:
        """Matches in a stable order, keyset-paged; no read transaction stays open between items.

        Attributes the index keeps at or above `query.level`: `supported(level)`. Computed ones included:
        ModalitiesInStudy, SOPClassesInStudy, NumberOf{Patient,Study,Series}Related{Studies,Series,Instances}.
        """
        ...

    def find_pages(self, query: Query) -> Iterator[Sequence[tuple[str, ...]]]:
        """As `find`, page by page and without names: each match is the texts of `query.returns`, in that order."""
        ...

    def supported(self, level: Level) -> frozenset[str]:
        """Keywords that can be matched or returned at `level` (those of higher levels included)."""
        ...


class AssociationLog(Protocol):
    """Associations as completion sees them; rows carry the epoch of the process that holds them."""

    def open_association(self, association_id: str, source: Source) -> None:
        """A new association of this process."""
        ...

    def touch_associations(self, association_ids: Iterable[str]) -> None:
        """These had traffic since the last call (batched: every few seconds)."""
        ...

    def end_association(self, association_id: str, end: AssociationEnd) -> None:
        """It ended. Idempotent; the first end counts."""
        ...

    def mark_store_failed(self, association_id: str) -> None:
        """A C-STORE on it failed: its studies wait longer, the sender may retry."""
        ...


class InstanceSink(Protocol):
    """The one door for every instance."""

    def accept(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Iterable[bytes | memoryview],
        source: Source,
    ) -> StoreResult:
        """Validate, archive, index. Returns only when what was accepted would survive a power cut.

        Never raises for what a peer sent: the result's status says it (0x0000, 0xB000, 0xA700, 0xA900, 0xC000, 0xC409,
        0x0110).
        """
        ...


# --- the intake journal --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledObject:
    """One object the intake journal holds: `length` bytes of a Part-10 file, of which `meta_length` precede its data.

    `digest` is of the data set; `read(offset, count)` gives bytes of the file, fewer at its end (OSError). `doubtful`:
    a sync of its file has failed, so that the file may be other on disk than in the system's memory.
    """

    place: JournalPlace
    receipt: Receipt
    transfer_syntax_uid: str
    length: int
    meta_length: int
    digest: bytes
    doubtful: bool
    read: Callable[[int, int], bytes]


# --- checking archive against index --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """What the index says of one file; `present` false: it was missing or damaged when last looked for."""

    sop_instance_uid: str
    file: ArchivedFile
    present: bool
    is_variant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedObject:
    """One archived file read back and hashed; `data_set` is readable until the `examine` block ends.

    The UIDs, `source_ae` ('' for what the node itself produced) and `made_for` (`model.Job.mark`, '' for what came in)
    are those of its file meta. `named_rightly` is false when the bytes are not those the name calls for: they changed
    on disk.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    source_ae: str
    made_for: str
    file: ArchivedFile
    named_rightly: bool
    written_at: datetime
    data_set: memoryview


class CheckedArchive(Protocol):
    """The archive as fsck sees it."""

    def locations(self) -> Iterator[str]:
        """Every file; see `Archive.locations`."""
        ...

    def status(self, location: str) -> tuple[int, float] | None:
        """Size in bytes and modification time (seconds since 1970), None when it is not there."""
        ...

    def examine(self, location: str) -> AbstractContextManager[ArchivedObject]:
        """Read it back. Raises NotFound, InvalidInstance (it has not the archive's form), StorageError (unreadable)."""
        ...

    def is_whole(self, instance: StoredInstance) -> bool:
        """Whether its file is there, exactly as long as it should be, and still has the bytes that were stored."""
        ...


class CheckedIndex(Protocol):
    """The index as fsck sees it."""

    def files(self) -> Iterator[KnownFile]:
        """Every file the index knows: main ones by SOP Instance UID, then variants; paged."""
        ...

    def is_deleted(self, study_instance_uid: str, written_at: datetime) -> bool:
        """Whether the study was deleted after that moment: a file of it that is as old is not to come back."""
        ...

    def is_unfinished(self, made_for: str, sop_instance_uid: str) -> bool:
        """Whether the index knows the job of that mark (`model.Job.mark`), and that this is no result of it: the job
        was cancelled or given up, another attempt of it made others, or it is still to be done.
        """
        ...

    def unknown_locations(self, locations: Sequence[str]) -> Sequence[str]:
        """Those of `locations` no row refers to, in their order."""
        ...

    def mark_file(self, known: KnownFile, *, present: bool) -> None:
        """Say whether a main file is there. A missing one is served and counted nowhere; variants have no state."""
        ...

    def restore(self, record: InstanceRecord) -> StoreOutcome:
        """Index a file found in the archive, keeping the first of a UID; its series stays unrouted, nothing is run."""
        ...


# --- studies, jobs, deliveries ---------------------------------------------------------------------------------------


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


class StudyLedger(Protocol):
    """Studies from first instance to verdict. received = routed + filtered + waiting + failed, always."""

    def open_studies(self) -> Sequence[StudyActivity]:
        """Every study revision with series not yet routed."""
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


class ReportBook(Protocol):
    """What destinations say of objects they were asked to commit to."""

    def note_report(self, report: CommitmentReport, destinations: Collection[str]) -> None:
        """Durable when it returns; once more changes nothing. Raises NotFound when none of these destinations was asked
        under that Transaction UID.
        """
        ...


class Outbox(ReportBook, Protocol):
    """Deliveries, leased with fencing tokens; at most one delivery per destination is leased at a time."""

    def lease_delivery(self, worker: str, lease_s: float, destination: str) -> Delivery | None:
        """The destination's first runnable delivery, or None."""
        ...

    def extend_delivery(self, delivery: Delivery, lease_s: float) -> None:
        """Heartbeat. Raises LeaseLost."""
        ...

    def item_sent(self, delivery: Delivery, sop_instance_uid: str, dimse_status: int, sha256: str = "") -> None:
        """Durable: this one, of that digest, need not be sent again. Raises LeaseLost."""
        ...

    def item_failed(self, delivery: Delivery, sop_instance_uid: str, dimse_status: int | None, error: str) -> None:
        """This object was refused for good; others go on. Raises LeaseLost."""
        ...

    def finish_delivery(self, delivery: Delivery) -> None:
        """DONE when every item was sent, FAILED when some were refused. Raises LeaseLost."""
        ...

    def uncommitted(self, delivery: Delivery) -> Sequence[StoredInstance]:
        """What of it was sent and its destination did not commit to, in sending order."""
        ...

    def begin_commitment(self, delivery: Delivery, transaction_uid: str, sop_instance_uids: Sequence[str]) -> None:
        """Durable: the destination is about to be asked to commit to these. Raises LeaseLost."""
        ...

    def commitment_is_open(self, delivery: Delivery) -> bool:
        """Whether the destination was asked about any object of it and has not answered."""
        ...

    def settle_delivery(self, delivery: Delivery, *, await_s: float, resend_s: float) -> DeliveryState:
        """As `finish_delivery`, of a destination that is asked for storage commitment; the state it has now.

        DONE when every item is committed to; COMMITTING, runnable again when the report came or after `await_s` (longer
        with each question), when some are not yet; PENDING, after `resend_s`, when some are to be sent again; else
        FAILED. Raises LeaseLost.
        """
        ...

    def retry_delivery_later(self, delivery: Delivery, error: str, delay_s: float) -> None:
        """Back to PENDING. Raises LeaseLost."""
        ...

    def give_up_delivery(self, delivery: Delivery, error: str) -> None:
        """FAILED: dead letter; the objects stay in the archive. Raises LeaseLost."""
        ...

    def retry_delivery(self, delivery_id: int) -> None:
        """By a person: FAILED or CANCELLED back to PENDING, refused items again. Raises NotFound, IllegalTransition."""
        ...

    def cancel_delivery(self, delivery_id: int) -> None:
        """By a person. Raises NotFound, IllegalTransition."""
        ...

    def deliveries(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[Delivery]:
        """Newest first."""
        ...


class CommitmentBook(Protocol):
    """What peers ask the node to commit to. Every write is durable when the call returns."""

    def ask_commitment(
        self,
        calling_ae_title: str,
        called_ae_title: str,
        transaction_uid: str,
        references: Sequence[ObjectReference],
        hold_s: float,
    ) -> CommitmentRequest:
        """Keep a request, to be checked and reported; its report is not sent elsewhere for `hold_s`.

        The same Transaction UID of the same peer with the same references is the same request: reported again when it
        was. Raises TransactionUidTaken for other references, TooManyCommitments, StorageError.
        """
        ...

    def judged_commitment(self, request: CommitmentRequest) -> CommitmentRequest | None:
        """The request with its reasons, None before it is checked and after it ended."""
        ...

    def claim_commitment(self, request: CommitmentRequest, for_s: float, *, here: bool) -> bool:
        """Whether the caller may report it now; nobody else does so for `for_s`. `here`: on the peer's own association,
        which is for the first report only.
        """
        ...

    def let_go_of_commitment(self, request: CommitmentRequest) -> None:
        """It will not be reported on the peer's own association, unless it was already."""
        ...

    def end_commitment(self, request: CommitmentRequest, error: str = "") -> None:
        """The peer took the report; or, with `error`, it is not tried any more."""
        ...

    def retry_commitment_later(self, request: CommitmentRequest, error: str, delay_s: float) -> None:
        """The report failed."""
        ...

    def next_commitment(self, calling_ae_title: str) -> CommitmentRequest | None:
        """The peer's first request that is to be checked, else the first whose report is due, or None."""
        ...

    def judge_commitment(self, request: CommitmentRequest, reasons: Sequence[int]) -> None:
        """Keep the outcome of the check: one FailureReason for each reference, 0 for what is committed to."""
        ...

    def forget_commitments(self, older_than_s: float) -> int:
        """Remove requests that ended so long ago, a bounded number at a time; how many."""
        ...


class Commitments(CommitmentBook, ReportBook, Protocol):
    """Both sides of storage commitment, as the receiver needs them."""


class Status(Protocol):
    """Counts for `/metrics`, `/ready` and `dicom-node status`, computed from the catalog at the time of asking."""

    def snapshot(self) -> Mapping[str, Any]:
        """See `store.status.snapshot` for the keys: studies, ledger, jobs, deliveries, associations, variants."""
        ...


# --- engines, results, sending ---------------------------------------------------------------------------------------


class Heartbeat(Protocol):
    """Handed to long work: call it often. Raises LeaseLost when the work must be dropped."""

    def __call__(self) -> None: ...


class Engine(Protocol):
    """Something that turns a series into findings. A local model is just another engine.

    Construction is cheap and validates configuration (ConfigError); heavy things load on first `run`.

    An engine may also have any of these, all of them thread-safe and quick but for the first two:

    * `warm_up(heartbeat)`: load what can be loaded before the first study comes. Raises as `run` does.
    * `report() -> Sequence[tuple[str, str]]`: what `dicom-node engines check` prints as heading and text, having looked
      now: reachability, credentials, versions, models offered, expiry of tokens. No secret, no patient data. Raises
      NodeError for what keeps it from running.
    * `trouble -> str`: why it cannot be used at the moment, '' when it can.
    * `observe(observer)`: called once, before anything else; `observer(engine, outcome, seconds)` is then to be told of
      every request made on the wire, with one of `metrics.REQUEST_OUTCOMES`.
    * `gauges() -> Mapping[str, float]`: `breaker_state` (0 closed, 1 open, 2 half-open) and `token_expires_seconds`
      (from now, negative when over), as far as there are such; without asking anybody. Neither it nor `trouble` raises.

    One that breaks these promises is told in the log, in `engine_misbehaved_total` and in /ready; it neither ends nor
    holds up the process that asks (`watching`, `worker`).
    """

    name: str

    def check(self) -> None:
        """Raise ConfigError or PackageError if this engine could not run anything."""
        ...

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        """Do it. Raises EngineRejected (never for this input), EngineUnavailable, EngineTimeout, EngineError."""
        ...

    def close(self) -> None:
        """Stop what was started. Idempotent."""
        ...


class PollingEngine(Engine, Protocol):
    """An engine whose answers come later."""

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """Ask for the answer of an earlier `run`."""
        ...

    def cancel(self, handle: str) -> None:
        """Stop it there: nobody waits any more (a deadline, a person, other images). What is over or unknown there is
        no error. Raises NodeError when it could not be told; it is called again, with growing delays, also after a
        restart, a bounded number of times. An answer that comes all the same is dropped.

        An engine that remembers (`EngineTask.remember`) before it has a handle may also have `cancel_noted(note)`: the
        same for a job that ended before.
        """
        ...


class ResultEncoder(Protocol):
    """Turns an engine's values into DICOM data sets."""

    kind: str  # the word used in a rule's `results:`

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """Encode what of `values` is this encoder's; nothing to say gives an empty sequence.

        `sources` are headers (no pixel data) of the images the engine saw; `already` are the data sets encoded
        before for this job (an SR refers to the SEG in it). Encoders run in the order of `plugins.encoder_kinds`.
        Deterministic: equal arguments give equal bytes. Raises EncodingError.
        """
        ...


class CommitmentAsker(Protocol):
    """Asks destinations to commit to keeping objects (PS3.4 annex J, as SCU)."""

    def ask(
        self,
        destination: Destination,
        questions: Mapping[str, Sequence[ObjectReference]],
        on_report: Callable[[CommitmentReport], None],
        is_open: Callable[[], bool],
        heartbeat: Heartbeat,
    ) -> None:
        """Ask about the references of each Transaction UID; then wait, for the destination's `wait_s` at most and while
        `is_open`, for its reports. `on_report` must have kept one when it returns, and raises NotFound for one that
        was not asked for. Raises CommitmentNotTaken when it would not be asked, DeliveryUnavailable or DeliveryRefused
        when the association could not be had.
        """
        ...


class CommitmentReporter(Protocol):
    """Tells peers what the node committed to (PS3.4 annex J, as SCP)."""

    def report(self, peer: Destination, request: CommitmentRequest) -> None:
        """Over an association of the node's own; returns when the peer took it. Raises DeliveryUnavailable or
        DeliveryRefused.
        """
        ...


class Sender(Protocol):
    """Sends stored instances to one destination over one association."""

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        """C-STORE each instance in order; `on_result(instance, dimse_status, error)` after each. A status of None means
        that no context was accepted for it or it could not be re-encoded (`error` says which): only this object fails.

        Raises DeliveryUnavailable or DeliveryRefused when the association cannot be had or breaks.
        """
        ...
