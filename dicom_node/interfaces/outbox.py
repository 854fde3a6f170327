"""Deliveries and storage commitment as the catalog keeps them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from dicom_node.model import (
    CommitmentReport,
    CommitmentRequest,
    Delivery,
    DeliveryState,
    ObjectReference,
    StoredInstance,
)

__all__ = ["CommitmentBook", "Commitments", "Outbox", "ReportBook"]


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
