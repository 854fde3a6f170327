"""The node's values: frozen, named in the Standard's words, free of behaviour that needs a clock, a disk or a wire.

Everything here may be imported by everything else. Times that leases and quiet periods compare are *boot times*
(seconds of the boot clock together with the boot id, see `interfaces.Clock`); wall-clock times are aware UTC and are
only for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from dicom_node.errors import IllegalTransition

# --- what arrives ------------------------------------------------------------------------------------------------


class Origin(Enum):
    """Where an instance came from; rules see only RECEIVED ones unless they say `origin: any`."""

    RECEIVED = "received"
    PRODUCED = "produced"
    RETURNED = "returned"  # from an AE configured as an engine, or our own result coming back


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Who sent an instance. `association_id` is None for what the node itself produced."""

    calling_ae_title: str
    called_ae_title: str
    address: str
    association_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BootTime:
    """A moment on the boot clock. Moments of another boot cannot be compared: they count as long past."""

    boot_id: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceHeader:
    """What the index knows of one instance, scanned from its data set without decoding pixels.

    `attributes` maps DICOM keywords to decoded text (multi-valued elements joined by a backslash, surrounding padding
    stripped). `pixel_data_offset` counts from the start of the *data set*, None when there is no pixel data.
    `irregular_uids` is true when a UID had padding or leading zeros that were tolerated.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    attributes: Mapping[str, str]
    specific_character_set: str = ""
    pixel_data_offset: int | None = None
    irregular_uids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedFile:
    """Bytes that are durable in the archive: a Part-10 file at `location` (archive-relative, opaque).

    The data set occupies `data_set_length` bytes from `data_set_offset`; `sha256` is of those bytes only
    (`dicom_node.digests`: the name is older than the kind). `journal`:
    where the intake journal holds all of it until the file itself is durable, None when the file is so already.
    """

    location: str
    data_set_offset: int
    data_set_length: int
    sha256: str
    journal: JournalPlace | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPlace:
    """A record of the intake journal: the name of that life of its segment (16 random bytes), and where it begins."""

    segment: bytes
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What is known of a received instance beside its bytes: what a file alone could not tell after a crash."""

    source: Source
    origin: Origin
    conflict_policy: ConflictPolicy
    received_at: datetime
    received_boot: BootTime


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """One instance on its way into the index."""

    header: InstanceHeader
    file: ArchivedFile
    source: Source
    origin: Origin
    received_at: datetime
    received_boot: BootTime


class ConflictPolicy(Enum):
    """What happens when a known SOP Instance UID arrives with other content."""

    KEEP_FIRST = "keep-first"
    REPLACE = "replace"
    REFUSE = "refuse"


class StoreOutcome(Enum):
    """What became of one received instance."""

    NEW = "new"
    DUPLICATE = "duplicate"  # same bytes: nothing new
    VARIANT = "variant"  # other content kept durably beside the first
    HEADER_CHANGED = "header-changed"  # a variant whose pixel data is the same
    REPLACED = "replaced"
    OTHER_SYNTAX = "other-syntax"  # the same instance in another transfer syntax, both kept
    SET_ASIDE = "set-aside"  # from an engine, under UIDs of one job: kept, but no study of its own
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreResult:
    """The answer to a C-STORE: `status` goes on the wire, `comment` is an Error Comment without patient data."""

    status: int
    outcome: StoreOutcome | None = None
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredInstance:
    """One instance as retrieval, engines and encoders see it; `path` is absolute and ready to open."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    path: str
    data_set_offset: int
    data_set_length: int
    sha256: str
    origin: Origin
    modality: str = ""


# --- query ---------------------------------------------------------------------------------------------------------


class Level(Enum):
    """Query/Retrieve Level (0008,0052)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class MatchKind(Enum):
    """How one key matches (PS3.4 C.2.2.2)."""

    UNIVERSAL = "universal"
    SINGLE = "single"
    UID_LIST = "uid-list"
    WILDCARD = "wildcard"
    RANGE = "range"  # dates, times; `values` = (from, to), "" for an open end
    DATETIME_RANGE = "datetime-range"  # combined date-time matching on a DA key, values as YYYYMMDDHHMMSS.ffffff
    PERSON_NAME = "person-name"  # wildcards allowed, case- and accent-insensitive
    MODALITIES = "modalities"  # Modalities in Study: any of `values`, wildcards allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One matching key of a query: a DICOM keyword, how it matches and with what."""

    keyword: str
    kind: MatchKind
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query on the index: matches of `level` that satisfy every key, with the attributes in `returns`."""

    level: Level
    keys: tuple[Key, ...]
    returns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One answer: keyword to decoded text; an attribute the index keeps but this entity lacks is ''.

    `specific_character_sets` are those of the matched entity's instances as received (for information only; text is
    already decoded).
    """

    attributes: Mapping[str, str]


# --- studies, rules, verdicts -------------------------------------------------------------------------------------


class AssociationEnd(Enum):
    """How an association ended; only RELEASED lets a study become quiet quickly (DESIGN section 5)."""

    OPEN = "open"
    RELEASED = "released"  # or closed by the node when it was idle, which is no fault
    ABORTED = "aborted"  # A-ABORT, lost connection, time-out inside a message
    DEAD = "dead"  # its process died; closed at the next start


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedingAssociation:
    """An association that fed a study, as completion sees it."""

    association_id: str
    calling_ae_title: str
    end: AssociationEnd
    last_activity: BootTime
    store_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyActivity:
    """What completion needs of one open study revision."""

    study_instance_uid: str
    revision: int
    first_received: BootTime
    last_received: BootTime
    associations: tuple[FeedingAssociation, ...]
    modalities: frozenset[str]
    pending_series: tuple[str, ...]  # series with images not yet routed, of this revision
    instance_count: int
    immediate_series: tuple[str, ...] = ()  # single-image CR / DX / MG series among the pending ones
    received_seq: Mapping[str, int] = field(default_factory=dict)  # per pending series: tells a later image apart
    again: bool = False  # by a person: run again what was already run


class CloseTrigger(Enum):
    """Why a study revision was closed."""

    IDLE = "idle"
    FORCED = "forced"
    IMMEDIATE = "immediate"
    OPERATOR = "operator"  # `dicom-node route`


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesHeader:
    """The headers of one series, read from its files at completion and kept in the catalog.

    `values`: DICOM keyword to the distinct values seen in the series' instances, in order of first appearance; values
    are JSON-ready (text, numbers, lists for multi-valued elements, dictionaries by keyword for sequence items).
    `missing_in`: keyword to the number of instances lacking it (only for keywords some instance has).
    `geometry`: one dictionary per instance with SOPInstanceUID, SOPClassUID, InstanceNumber, ImagePositionPatient,
    ImageOrientationPatient, PixelSpacing, Rows, Columns, NumberOfFrames, ImageType, FrameOfReferenceUID where present.
    `distinct_counts`: only for keywords with more distinct values than `values` keeps, how many there are.
    """

    series_instance_uid: str
    instance_count: int
    values: Mapping[str, tuple[Any, ...]]
    missing_in: Mapping[str, int] = field(default_factory=dict)
    geometry: tuple[Mapping[str, Any], ...] = ()
    distinct_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesView:
    """One series with its study at hand: what a rule is evaluated on."""

    study_instance_uid: str
    revision: int
    header: SeriesHeader
    source: Source
    origins: frozenset[Origin]
    study_series_count: int
    study_instance_count: int
    study_modalities: tuple[str, ...]
    received_at: datetime
    identity_conflict: bool = False


class Condition(Enum):
    """How one condition of a rule ended; there is no silent non-match."""

    TRUE = "true"
    FALSE = "false"
    MISSING = "missing"
    MIXED = "mixed"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionResult:
    """One condition, how it ended, the values it saw and what would change it."""

    expression: str
    outcome: Condition
    values: Mapping[str, Any]
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one rule said about one series. `matched` false always has a `reason`."""

    rule: str
    series_instance_uid: str
    matched: bool
    reason: str
    conditions: tuple[ConditionResult, ...]


class Priority(Enum):
    """Order of work; smaller rank first."""

    URGENT = "urgent"
    ROUTINE = "routine"
    BACKGROUND = "background"

    @property
    def rank(self) -> int:
        """0 is served first."""
        return {"urgent": 0, "routine": 1, "background": 2}[self.value]


class LatePolicy(Enum):
    """What a rule does when images arrive after it ran: IGNORE, or RERUN if the engine's input changed."""

    IGNORE = "ignore"
    RERUN = "rerun"


class SendWhat(Enum):
    """What is sent to a rule's destinations."""

    RESULTS = "results"
    SOURCE = "source"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job as routing plans it: one rule on one series. `engine` '' means: only send, run nothing."""

    rule: str
    series_instance_uid: str
    engine: str
    priority: Priority
    results: tuple[str, ...]
    destinations: tuple[str, ...]
    send_what: SendWhat
    late_instances: LatePolicy


# --- jobs and deliveries -------------------------------------------------------------------------------------------


class JobState(Enum):
    """States of a job; `next_job_state` is the only way between them."""

    PENDING = "pending"
    LEASED = "leased"
    WAITING = "waiting"  # an external engine works on it; polled at `not_before`
    DONE = "done"
    REJECTED = "rejected"  # the engine refuses this input, with a reason: filtered, not failed
    FAILED = "failed"  # dead letter: needs a person
    CANCELLED = "cancelled"


_JOB_MOVES: Mapping[tuple[JobState, str], JobState] = {
    (JobState.PENDING, "lease"): JobState.LEASED,
    (JobState.WAITING, "lease"): JobState.LEASED,
    (JobState.LEASED, "expire"): JobState.PENDING,
    (JobState.LEASED, "finish"): JobState.DONE,
    (JobState.LEASED, "reject"): JobState.REJECTED,
    (JobState.LEASED, "retry_later"): JobState.PENDING,
    (JobState.LEASED, "park"): JobState.WAITING,
    (JobState.LEASED, "give_up"): JobState.FAILED,
    (JobState.LEASED, "cancel"): JobState.CANCELLED,
    (JobState.PENDING, "cancel"): JobState.CANCELLED,
    (JobState.WAITING, "cancel"): JobState.CANCELLED,
    (JobState.PENDING, "give_up"): JobState.FAILED,
    (JobState.WAITING, "give_up"): JobState.FAILED,
    (JobState.FAILED, "retry"): JobState.PENDING,
    (JobState.CANCELLED, "retry"): JobState.PENDING,
    (JobState.REJECTED, "retry"): JobState.PENDING,
}


def next_job_state(state: JobState, move: str) -> JobState:
    """The state after `move`. Raises IllegalTransition, and changes nothing, for a move the table does not have."""
    try:
        return _JOB_MOVES[(state, move)]
    except KeyError:
        raise IllegalTransition(f"a job that is {state.value!r} cannot {move!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One rule's work on one series. `run_number` and `created_at` are fixed when the row is made, never by an attempt.

    `token` is the fencing token of the current lease; a finish with an older one raises LeaseLost.
    `input_digest` identifies the instances (UID and content) the engine receives.
    """

    id: int
    study_instance_uid: str
    revision: int
    series_instance_uid: str
    rule: str
    engine: str
    priority: Priority
    results: tuple[str, ...]
    destinations: tuple[str, ...]
    send_what: SendWhat
    state: JobState
    attempts: int
    run_number: int
    input_digest: str
    created_at: datetime
    token: int = 0
    handle: str | None = None  # of a WAITING job: the engine's own id
    error: str = ""
    superseded_job: int | None = None  # the earlier run on the same series this one follows
    age_s: float = 0.0  # when it was read: since it was made, or since a person retried it
    outages: int = 0  # of `attempts`, those that came to nothing for the node's sake: no fault of the job
    strikes: int = 0  # of `attempts`, those that killed or hung what runs the engine
    # what its engine remembered, until the job ends; see `EngineTask.remember`
    note: str = field(default="", repr=False)

    @property
    def mark(self) -> str:
        """Names it for good: a number alone is given again when a catalog is put back from a copy."""
        return f"{self.id} {self.created_at.isoformat(timespec='microseconds')}"


class DeliveryState(Enum):
    """States of a delivery of some instances of one study to one destination."""

    PENDING = "pending"
    LEASED = "leased"
    COMMITTING = "committing"  # all is sent; the destination was asked to commit to it and has not answered yet
    DONE = "done"  # ... and committed to, where the destination offers storage commitment
    FAILED = "failed"  # dead letter; the instances stay in the archive
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryItem:
    """One instance of a delivery with its last DIMSE status (None = not tried).

    `committed`: its destination committed to keeping it.
    """

    instance: StoredInstance
    sent: bool
    dimse_status: int | None = None
    error: str = ""
    committed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Instances of one study for one destination, in sending order (SEG before SR)."""

    id: int
    study_instance_uid: str
    destination: str
    job_id: int | None
    state: DeliveryState
    attempts: int
    created_at: datetime
    items: tuple[DeliveryItem, ...]
    token: int = 0
    error: str = ""
    age_s: float = 0.0  # when it was read: since it was queued, or since a person retried it


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsClient:
    """How an AE is called over TLS: paths of PEM files; '' is the system's authorities, and no certificate of ours."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    key_passphrase_env: str = ""
    key_passphrase_file: str = ""
    server_name: str = ""  # in its certificate; '' = the host
    profile: str = "bcp195"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCredentials:
    """As which user the node comes to an AE, and where the secret lies; '' for what is not set."""

    name: str = field(default="", repr=False)
    passcode_env: str = ""
    passcode_file: str = ""
    jwt_file: str = ""
    allow_plain: bool = False  # also to another machine without TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitmentTimes:
    """How a destination is asked for storage commitment: how long its report is waited for on the association of the
    question, and how long in all before it is asked again.
    """

    wait_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A DICOM AE results and images are sent to, by its name in the configuration."""

    name: str
    ae_title: str
    host: str
    port: int
    calling_ae_title: str = ""  # '' = the node's first AE title
    tls: TlsClient | None = None  # None: not encrypted
    commitment: CommitmentTimes | None = None  # None: it is not asked for storage commitment
    user: UserCredentials | None = None  # None: the node comes as no user


class ObjectReference(NamedTuple):
    """One object as storage commitment names it (PS3.4 table J.3-1)."""

    sop_class_uid: str
    sop_instance_uid: str


class FailureReason(IntEnum):
    """Why an object is not committed to (PS3.3 C.14.1.1)."""

    COMMITTED = 0x0000  # it is
    PROCESSING_FAILURE = 0x0110
    NO_SUCH_OBJECT_INSTANCE = 0x0112
    CLASS_INSTANCE_CONFLICT = 0x0119
    REFERENCED_SOP_CLASS_NOT_SUPPORTED = 0x0122
    DUPLICATE_TRANSACTION_UID = 0x0131
    RESOURCE_LIMITATION = 0x0213


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitmentRequest:
    """A peer's request for storage commitment as the catalog keeps it.

    `round` counts how often the peer asked anew; `reasons`, one for each reference (0: committed), is None before they
    were checked. `attempts`: reports tried.
    """

    id: int
    round: int
    calling_ae_title: str
    called_ae_title: str
    transaction_uid: str
    references: tuple[ObjectReference, ...]
    reasons: tuple[int, ...] | None
    attempts: int = 0
    error: str = ""
    age_s: float = 0.0

    def report(self) -> CommitmentReport:
        """What the peer is to be told; every reference is in exactly one of its parts. Only once they were checked."""
        judged = list(zip(self.references, self.reasons or (), strict=True))
        return CommitmentReport(
            transaction_uid=self.transaction_uid,
            committed=tuple(reference for reference, reason in judged if not reason),
            failed=tuple((reference, reason) for reference, reason in judged if reason),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitmentReport:
    """What an N-EVENT-REPORT of storage commitment says (PS3.4 tables J.3-2, J.3-3)."""

    transaction_uid: str
    committed: tuple[ObjectReference, ...]
    failed: tuple[tuple[ObjectReference, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One thing that happened to a study, for people: `text` carries names of the configuration and counts only."""

    at: datetime
    text: str


# --- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What leaves the node for an engine: enough to tell a patient, years later, what went where.

    `what` is a word of the adapter ("volume", "DICOM instances", "request"), `host` where it goes: no path, no query.
    `identifiable`: anything in it names the patient (PS3.15 E.1). `bytes`, `sha256` (of the bytes as sent) and
    `remote_id` (the engine's own) are often only known when it is through. No patient data in any of them.
    """

    what: str
    host: str
    objects: int
    identifiable: bool
    bytes: int | None = None
    sha256: str = ""
    remote_id: str = ""


class SendingState(Enum):
    """How far a sending got. One that a crash interrupted stays at ABOUT_TO_SEND: it may have left, or not."""

    ABOUT_TO_SEND = "about to send"
    SENT = "sent"
    FAILED = "failed"  # what had left by then has left


@dataclass(frozen=True, slots=True, kw_only=True)
class SendingRecord:
    """One sending as the catalog keeps it. `job_id` None: an engine that was run by hand."""

    id: int
    study_instance_uid: str
    series_instance_uid: str
    job_id: int | None
    engine: str
    sending: Sending
    state: SendingState
    error: str
    begun_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancellation:
    """Work at an engine that nobody waits for any more and that the engine is still to be told to stop.

    `handle` '': the job ended before the engine gave it one, and `note` is all that is known.
    """

    id: int
    job_id: int
    engine: str
    handle: str
    note: str = field(repr=False)
    attempts: int  # this one included


Tell = Callable[[Sending], None]
NOTE_MAX = 16_384


def _not_remembered(note: str) -> None:
    """Nothing is kept."""


def _not_recorded(sending: Sending) -> AbstractContextManager[Tell]:
    return nullcontext(lambda sent: None)


def _not_kept(path: Path, reason: str) -> str:
    return ""


def _nothing_else() -> Iterable[StoredInstance]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTask:
    """What an engine gets: the instances of one series (received ones, any order), and how long it may take.

    `strikes`: earlier tries that ended with what ran the engine dead or hung.

    What an engine outside this process needs so that no crash makes it submit twice or forget what it submitted:

    * `remember(text)` keeps a note with the job. It is durable when it returns, replaces the one before, and is given
      again as `note` to every later `run` and `poll` of this job, whatever happened in between, until the job has
      ended. Raises LeaseLost (another worker does the job, or nobody is to: submit nothing), StorageError (submit
      nothing). At most NOTE_MAX characters. People see the first line of each note in the study's timeline: ids and
      names of steps, no patient data and no secret. What only the adapter needs, such as a presigned URL, goes into the
      lines after it: they are shown nowhere and gone when the job ends.
    * `record(sending)` is a context that every transmission is made in: durable as "about to send" on entering (raises
      LeaseLost, StorageError: send nothing), as "sent" on leaving, as "failed" when it is left by an exception. It
      gives a function to call with the sending completed, when bytes, digest or remote id are known.
    * `quarantine(path, reason)` keeps a copy of a file that came back and does not fit, for a person to look at;
      returns its name there, '' when there was no room. `reason` carries no patient data. Never raises.

    `study_instances()` yields every visible instance of the study, of all series and origins, as they are now: for an
    engine that is guided by what people said of the images (a structured report with points). Raises StorageError.

    Their defaults keep nothing; the node always gives real ones.
    """

    job_id: int
    study_instance_uid: str
    series_instance_uid: str
    instances: tuple[StoredInstance, ...]
    header: SeriesHeader
    timeout_s: float
    priority: Priority = Priority.ROUTINE
    strikes: int = 0
    note: str = field(default="", repr=False)
    remember: Callable[[str], None] = field(default=_not_remembered, repr=False, compare=False)
    record: Callable[[Sending], AbstractContextManager[Tell]] = field(default=_not_recorded, repr=False, compare=False)
    quarantine: Callable[[Path, str], str] = field(default=_not_kept, repr=False, compare=False)
    study_instances: Callable[[], Iterable[StoredInstance]] = field(default=_nothing_else, repr=False, compare=False)
