"""C-GET and C-MOVE on the wire: sub-operations that send the stored bytes, and the responses between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from pydicom.dataset import Dataset

from dicom_node.audited import SentStudies
from dicom_node.auditing import AuditTrail, Participant, Role
from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import CommandValue, element, error_comment
from dicom_node.dimse.contexts import ProposedContext
from dicom_node.dimse.link import AssociationLost
from dicom_node.dimse.request import Request, encode_identifier, read_identifier, respond_bad
from dicom_node.dimse.session import MoveOriginator, OpenLink, Session, StoreSender, batches, is_stored, with_following
from dicom_node.errors import DeliveryError, NodeError
from dicom_node.model import Destination, StoredInstance
from dicom_node.services.identifier import BadIdentifier
from dicom_node.services.retrieve import (
    UNKNOWN_DESTINATION,
    Progress,
    RetrievePlan,
    RetrieveService,
    SubOperation,
    SubOperationResult,
)

__all__ = ["Retrievals", "move_destination"]

_COMPLETED = SubOperationResult(outcome=SubOperation.COMPLETED)

log = logging.getLogger(__name__)

PROCESSING_FAILURE = 0x0110
PENDING_S = 0.02  # between two pending responses


class Retrievals:
    """Serves C-GET and C-MOVE; each method returns the final status it answered. Raises AssociationLost."""

    def __init__(
        self,
        retrieve: RetrieveService,
        delivery: DeliverySettings,
        ae_title: str,
        open_link: OpenLink,
        audit: AuditTrail,
    ) -> None:
        self._retrieve, self._delivery, self._ae_title = retrieve, delivery, ae_title
        self._open_link, self._audit = open_link, audit

    def get(self, request: Request) -> int:
        """C-GET: the sub-operations go over the requester's own association, where it is SCP (PS3.4 C.4.3)."""
        plan = self._planned(request)
        if isinstance(plan, int):
            return plan
        contexts: dict[tuple[str, str], int] = {}
        for context in request.link.contexts.values():
            if context.we_ask:
                contexts.setdefault((context.abstract_syntax, context.transfer_syntax), context.context_id)
        if not contexts:
            log.warning(
                "C-GET cannot send: the requester proposed no SCP role for any storage SOP class",
                extra=dict(request.link.log_fields),
            )
        message_ids, following = _MessageIds(request.message_id), iter(plan.instances[1:])

        def send(instance: StoredInstance) -> SubOperationResult:
            if not contexts:
                return SubOperationResult(
                    outcome=SubOperation.FAILED, reason="no SCP role proposed for storage", fatal=True
                )
            status, error = sender.store(instance, message_ids.next(), following=next(following, None))
            return _sub_operation(request, instance, status, error)

        with StoreSender(request.link, contexts, self._delivery.response_timeout_s) as sender:
            return self._report(request, plan.instances, send, None)

    def move(self, request: Request) -> int:
        """C-MOVE: the sub-operations go over associations of the node's own (PS3.4 C.4.2)."""
        destination = self._retrieve.destination(move_destination(request))
        if destination is None:
            log.warning("C-MOVE to a destination that is not configured", extra=dict(request.link.log_fields))
            request.respond({"Status": UNKNOWN_DESTINATION, "ErrorComment": "the move destination is not configured"})
            return UNKNOWN_DESTINATION
        plan = self._planned(request)
        if isinstance(plan, int):
            return plan
        with ExitStack() as stack:
            session = partial(
                Session,
                self._delivery,
                destination,
                calling_ae_title=self._ae_title,
                open_link=self._open_link,
                originator=MoveOriginator(ae_title=request.peer.source.calling_ae_title, message_id=request.message_id),
            )
            mover = _Mover(session, destination, request, plan.instances, stack)
            return self._report(request, plan.instances, mover.send, destination)

    def _planned(self, request: Request) -> RetrievePlan | int:
        """What to send, or the status that was answered instead."""
        try:
            plan = self._retrieve.plan(request.model, read_identifier(request), relational=request.options.relational)
        except BadIdentifier as exc:
            return respond_bad(request, exc)
        if not plan.status:
            return plan
        fields: dict[str, CommandValue] = {"Status": plan.status, "ErrorComment": error_comment(plan.comment)}
        if plan.offending:
            fields["OffendingElement"] = plan.offending
        request.respond(fields)
        return plan.status

    def _report(
        self,
        request: Request,
        instances: Sequence[StoredInstance],
        send: Callable[[StoredInstance], SubOperationResult],
        destination: Destination | None,
    ) -> int:
        """Answer with what was done so far, at most every `PENDING_S`: pending responses are the SCP's to choose
        (PS3.4 C.4.2.3.1, C.4.3.3.1), and of a thousand small objects nobody wants to hear one by one.
        """
        status, next_at = PROCESSING_FAILURE, 0.0
        told = SentStudies(self._audit, _participants(request, destination))
        told.begun(dict.fromkeys(instance.study_instance_uid for instance in instances))

        def sent(instance: StoredInstance) -> SubOperationResult:
            result = send(instance)
            told.sent(instance, ok=result.outcome is not SubOperation.FAILED)
            return result

        def is_time() -> bool:
            return time.monotonic() >= next_at

        try:
            for progress in self._retrieve.retrieve(instances, sent, request.cancelled, is_time):
                status, next_at = progress.status, time.monotonic() + PENDING_S
                request.respond(_counts(progress), _failures(progress, request.transfer_syntax))
        except AssociationLost:
            told.ended("the requester's association ended before the retrieval did")
            raise
        finally:
            told.ended("" if status == 0 else f"status {status:04X}H")
        return status


def _participants(request: Request, destination: Destination | None) -> list[Participant]:
    """The node, whoever receives, and, of a C-MOVE, whoever asked."""
    source = request.peer.source
    asked = Participant(
        source.calling_ae_title, source.address, request.peer.user, is_requestor=True, role=Role.DESTINATION
    )
    here = Participant(ae_title=source.called_ae_title, is_this_node=True, role=Role.SOURCE)
    if destination is None:
        return [here, asked]
    there = Participant(ae_title=destination.ae_title, host=destination.host, role=Role.DESTINATION)
    return [here, there, replace(asked, role=Role.APPLICATION)]


def move_destination(request: Request) -> str:
    """The AE title of the request; '' for one that no AE can have (PS3.5 table 6.2-1)."""
    title = request.message.command.text(element("MoveDestination")) or ""
    return title if len(title) <= 16 else ""


class _MessageIds:
    """Ids for requests of ours on an association where the peer's own request is under way."""

    def __init__(self, taken: int) -> None:
        self._taken, self._last = taken, taken

    def next(self) -> int:
        self._last = self._last % 0xFFFF + 1
        if self._last == self._taken:
            return self.next()
        return self._last


class _Mover:
    """The C-STORE sub-operations of one C-MOVE: one association after the other, each with the contexts it needs."""

    def __init__(
        self,
        session: Callable[[Sequence[ProposedContext]], Session],
        destination: Destination,
        request: Request,
        instances: Sequence[StoredInstance],
        stack: ExitStack,
    ) -> None:
        self._new_session, self._destination = session, destination
        self._request, self._stack = request, stack
        self._batches = batches(instances)
        self._batch: Iterator[tuple[StoredInstance, StoredInstance | None]] = iter(())
        self._session: Session | None = None

    def send(self, instance: StoredInstance) -> SubOperationResult:
        """Send the next instance; a destination that cannot be had is fatal for the rest."""
        try:
            session, following = self._next()
            status, error = session.store(instance, following=following, on_wait=self._request.link.check_alive)
        except DeliveryError as exc:
            return self._gone(exc)
        except AssociationLost as exc:
            self._request.link.check_alive()  # whose association? ours to the destination, unless this raises
            return self._gone(exc)
        return _sub_operation(self._request, instance, status, error)

    def _next(self) -> tuple[Session, StoredInstance | None]:
        """The association for the next instance, and the one after it on the same."""
        here = next(self._batch, None)
        if here is None or self._session is None:
            if self._session is not None:
                self._session.close()
            batch, contexts = next(self._batches)
            self._session = self._stack.enter_context(self._new_session(contexts))
            self._batch = with_following(batch)
            here = next(self._batch)
        return self._session, here[1]

    def _gone(self, error: NodeError) -> SubOperationResult:
        log.warning(
            "C-MOVE destination is gone",
            extra={"destination": self._destination.name, "error": str(error), **self._request.link.log_fields},
        )
        return SubOperationResult(outcome=SubOperation.FAILED, reason="the destination cannot be reached", fatal=True)


def _sub_operation(request: Request, instance: StoredInstance, status: int | None, error: str) -> SubOperationResult:
    if status == 0:
        return _COMPLETED
    if status is not None and is_stored(status):
        return SubOperationResult(outcome=SubOperation.WARNING)
    log.warning(
        "sub-operation failed",
        extra={
            "sop_instance": instance.sop_instance_uid,
            "sop_class": instance.sop_class_uid,
            "transfer_syntax": instance.transfer_syntax_uid,
            "reason": error,
            **request.link.log_fields,
        },
    )
    return SubOperationResult(outcome=SubOperation.FAILED, reason=error)


def _counts(progress: Progress) -> dict[str, CommandValue]:
    fields: dict[str, CommandValue] = {
        "Status": progress.status,
        "NumberOfCompletedSuboperations": progress.completed,
        "NumberOfFailedSuboperations": progress.failed,
        "NumberOfWarningSuboperations": progress.warning,
    }
    if not progress.final or progress.remaining:
        # PS3.4 C.4.2.1.6: in pending and cancel responses only
        fields["NumberOfRemainingSuboperations"] = progress.remaining
    if progress.final and progress.comment:
        fields["ErrorComment"] = error_comment(progress.comment)
    return fields


def _failures(progress: Progress, syntax: str) -> bytes | None:
    if not progress.final or not progress.failed_uids:
        return None
    data_set = Dataset()
    data_set.FailedSOPInstanceUIDList = list(progress.failed_uids)
    return encode_identifier(data_set, syntax)
