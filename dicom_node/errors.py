"""Every error the node raises on purpose, in one tree.

    NodeError
     ├─ ConfigError                 a setting is wrong; the message names it, the expectation and the remedy
     │   └─ RuleError               ... in a rule file, with file and line
     ├─ NotFound                    the named study, job, engine ... does not exist
     ├─ InvalidInstance             a received object cannot be understood          0xC000
     │   ├─ IdentityMismatch        command set and data set disagree               0xA900
     │   └─ ContentConflict         same SOP Instance UID, other content, refused   0xC409
     ├─ InvalidIdentifier           a query or retrieve identifier is wrong         0xA900
     ├─ StorageError                bytes or index row could not be made durable    0xA700, retryable
     │   └─ CatalogBusy             the catalog lock was not had in time
     ├─ TranscodeError              an object cannot be re-encoded for this peer
     ├─ PackageError                a model package is unusable                     retryable
     ├─ EngineError                 an engine did not answer as promised
     │   ├─ EngineUnavailable       ... but may later                               retryable
     │   ├─ EngineTimeout           ... in time                                     retryable
     │   └─ EngineRejected          ... and will not: this input is not for it
     │       └─ SeriesRejected      the series' geometry or content is unfit; `reason` is for people
     ├─ EncodingError               a result cannot be written as DICOM
     ├─ DeliveryError               a destination did not take an object
     │   ├─ DeliveryUnavailable     ... but may later                               retryable
     │   ├─ DeliveryRefused         ... and will not
     │   └─ CommitmentNotTaken      ... will not be asked for storage commitment    retryable
     ├─ CommitmentRefused           a request for storage commitment is not taken
     │   ├─ TransactionUidTaken     ... its Transaction UID stands for others       0x0131
     │   └─ TooManyCommitments      ... at the moment                               0x0213, retryable
     ├─ IllegalTransition           a state machine was asked for a move it does not have
     └─ LeaseLost                   another worker owns this job or delivery now

`retryable` says whether doing the same again may help; `dimse_status` is what a peer is told (PS3.7 Annex C,
PS3.4 tables B.2-1, C.4-1 to C.4-3). Messages carry UIDs and settings, never patient data.
"""

from __future__ import annotations

from pathlib import Path


class NodeError(Exception):
    """Anything the node raises on purpose."""

    retryable: bool = False
    dimse_status: int = 0x0110


class ConfigError(NodeError):
    """A setting is wrong. The message names the setting, the value, what is expected and the remedy."""


class RuleError(ConfigError):
    """A rule file is wrong, at `file`:`line`; `remedy` says what to write instead."""

    def __init__(self, message: str, *, file: Path, line: int, remedy: str) -> None:
        super().__init__(f"{file}:{line}: {message}. {remedy}")
        self.message = message
        self.file = file
        self.line = line
        self.remedy = remedy


class NotFound(NodeError):
    """The named thing does not exist here."""


class InvalidInstance(NodeError):
    """A received object cannot be understood (PS3.4 table B.2-1, Cxxx)."""

    dimse_status = 0xC000


class IdentityMismatch(InvalidInstance):
    """The data set's SOP Class or Instance UID is not the one of the request (PS3.4 table B.2-1)."""

    dimse_status = 0xA900


class ContentConflict(InvalidInstance):
    """The SOP Instance UID is already taken by other content and the policy is to refuse."""

    dimse_status = 0xC409


class InvalidIdentifier(NodeError):
    """A query or retrieve identifier does not fit its SOP class (PS3.4 C.4.1.1.4, 0xA900)."""

    dimse_status = 0xA900


class StorageError(NodeError):
    """Bytes, name or index row could not be made durable. Nothing was acknowledged."""

    retryable = True
    dimse_status = 0xA700


class CatalogBusy(StorageError):
    """The catalog's write lock was not had within its bound."""


class TranscodeError(NodeError):
    """An object cannot be re-encoded in a transfer syntax the peer accepts."""


class PackageError(NodeError):
    """A model package is unusable; the message says which key or file and why. Work for it waits for its mending."""

    retryable = True


class EngineError(NodeError):
    """An engine did not answer as promised.

    Of one that is asked over HTTP, `http_status` is what it answered, if it did; `maybe_taken` is true when what it was
    asked may have been begun although nothing good was answered, so that asking again may do it twice.
    """

    http_status: int | None = None
    maybe_taken: bool = False


class EngineUnavailable(EngineError):
    """The engine cannot be reached or has no capacity now."""

    retryable = True


class EngineCrashed(EngineUnavailable):
    """What ran the engine died or hung while it worked on this very input; another try may do the same."""


class EngineTimeout(EngineError):
    """The engine did not answer in time."""

    retryable = True


class EngineRejected(EngineError):
    """The engine will never take this input."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SeriesRejected(EngineRejected):
    """The series is unfit for the model; `reason` is a sentence a physicist understands."""


class EncodingError(NodeError):
    """A result cannot be written as a DICOM object."""


class DeliveryError(NodeError):
    """A destination did not take an object."""


class DeliveryUnavailable(DeliveryError):
    """The destination cannot be reached or is out of resources now (TCP, RJ(2,*,*), A7xx, 0x0110)."""

    retryable = True


class DeliveryRefused(DeliveryError):
    """The destination said no for good (RJ(1,*,*), A9xx, Cxxx, 0x0122, context refused)."""


class CommitmentNotTaken(DeliveryError):
    """The destination can be reached, and does not take the request for storage commitment."""

    retryable = True


class CommitmentRefused(NodeError):
    """A peer's request for storage commitment is not taken; nothing of it was kept."""


class TransactionUidTaken(CommitmentRefused):
    """The same peer gave the same Transaction UID to other references (PS3.3 C.14.1.1, 0131H)."""

    dimse_status = 0x0131


class TooManyCommitments(CommitmentRefused):
    """The peer asks for more than is kept for one peer at a time (PS3.7 Annex C, resource limitation)."""

    retryable = True
    dimse_status = 0x0213


class IllegalTransition(NodeError):
    """A state machine was asked for a move it does not have; nothing changed."""


class LeaseLost(NodeError):
    """The lease ran out and its fencing token is no longer the current one; the work must be dropped."""
