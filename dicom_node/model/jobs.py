"""Jobs, deliveries and storage commitment: their states, and the moves between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import NamedTuple

from dicom_node.errors import IllegalTransition
from dicom_node.model.instances import StoredInstance
from dicom_node.model.studies import Priority, SendWhat

__all__ = [
    "JOB_ENDED",
    "CommitmentReport",
    "CommitmentRequest",
    "CommitmentTimes",
    "Delivery",
    "DeliveryItem",
    "DeliveryState",
    "Destination",
    "FailureReason",
    "Job",
    "JobState",
    "ObjectReference",
    "TimelineEvent",
    "TlsClient",
    "UserCredentials",
    "marked_job",
    "next_job_state",
]


class JobState(Enum):
    """States of a job; `next_job_state` is the only way between them."""

    PENDING = "pending"
    LEASED = "leased"
    WAITING = "waiting"  # an external engine works on it; polled at `not_before`
    DONE = "done"
    REJECTED = "rejected"  # the engine refuses this input, with a reason: filtered, not failed
    FAILED = "failed"  # dead letter: needs a person
    CANCELLED = "cancelled"


JOB_ENDED = frozenset({JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED})

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


def marked_job(mark: str) -> tuple[str, str]:
    """Number and time of creation as a `Job.mark` says them; of any other text, what is no job's."""
    number, _, created_at = mark.partition(" ")
    return number, created_at


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
