"""What happens with a request: from the message to its service, and never to nothing.

Whatever goes wrong in the node itself is answered 0x0110; what cannot be answered ends in an A-ABORT.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dicom_node.audited import peer_of
from dicom_node.auditing import AlertType, AuditEvent, AuditKind, AuditOutcome, AuditTrail
from dicom_node.dimse.commands import (
    NO_DATA_SET,
    CommandField,
    CommandValue,
    encode_command,
    error_comment,
    store_response,
)
from dicom_node.dimse.commitment import CommitmentService
from dicom_node.dimse.contexts import (
    FIND_SOP_CLASSES,
    GET_SOP_CLASSES,
    MOVE_SOP_CLASSES,
    STORAGE_COMMITMENT,
    VERIFICATION,
)
from dicom_node.dimse.link import AssociationLost, Link, Message
from dicom_node.dimse.messages import BadMessage
from dicom_node.dimse.observer import WireObserver
from dicom_node.dimse.pacing import paced
from dicom_node.dimse.policy import EVERYDAY_SERVICES, Policy
from dicom_node.dimse.request import Peer, Request, encode_answers, identifier_bytes, read_query, respond_bad
from dicom_node.dimse.retrieval import Retrievals, move_destination
from dicom_node.dimse.session import is_stored
from dicom_node.errors import NodeError
from dicom_node.interfaces import AssociationLog
from dicom_node.model import Source
from dicom_node.services.find import SOME, FindService
from dicom_node.services.identifier import BadIdentifier, Identifier
from dicom_node.services.store import StoreRequest, StoreService

__all__ = ["Requests"]

log = logging.getLogger(__name__)

PROCESSING_FAILURE = 0x0110
SOP_CLASS_NOT_SUPPORTED = 0x0122
NOT_AUTHORIZED = 0x0124
UNRECOGNIZED_OPERATION = 0x0211
OUT_OF_RESOURCES = 0xA700  # PS3.4 tables B.2-1, C.4-1
CANNOT_SUB_OPERATE = 0xA702  # tables C.4-2, C.4-3: C-MOVE and C-GET have no A700
_KNOWN = frozenset(
    {CommandField.C_ECHO, CommandField.C_STORE, CommandField.C_FIND, CommandField.C_GET, CommandField.C_MOVE}
)
_SERVICES = FIND_SOP_CLASSES | GET_SOP_CLASSES | MOVE_SOP_CLASSES | {VERIFICATION, STORAGE_COMMITMENT}
# a C-ECHO-RSP before and after its Message ID Being Responded To: it is asked for more often than anything else
_ECHOED = encode_command(
    {
        "AffectedSOPClassUID": VERIFICATION,
        "CommandField": CommandField.C_ECHO | CommandField.RESPONSE,
        "MessageIDBeingRespondedTo": 0xFEDC,
        "CommandDataSetType": NO_DATA_SET,
        "Status": 0,
    }
).split(b"\xdc\xfe")
_REQUESTS = _KNOWN | {
    *(CommandField.N_EVENT_REPORT, CommandField.N_GET, CommandField.N_SET),
    *(CommandField.N_ACTION, CommandField.N_CREATE, CommandField.N_DELETE),
}


class Requests:
    """Serves every request of every association; no state of its own. Called on the association's thread."""

    def __init__(
        self,
        *,
        store: StoreService,
        find: FindService,
        retrievals: Retrievals,
        commitment: CommitmentService,
        associations: AssociationLog,
        observe: WireObserver,
        max_objects: int,
        audit: AuditTrail,
        refused: Callable[[Source], None],
    ) -> None:
        """`refused` is told whose object was answered with a failure."""
        self._max_objects, self._audit, self._refused = max_objects, audit, refused
        self._store, self._find, self._retrievals = store, find, retrievals
        self._commitment = commitment
        self._associations, self._observe = associations, observe

    def serve(self, link: Link, peer: Peer, message: Message) -> None:
        """Answer one request, or abort the association when that is the only answer there is."""
        if peer.awaited and self._is_awaited(link, peer, message):
            return
        request = self._request(link, peer, message)
        if request is None:
            log.warning("message that cannot be answered", extra=dict(link.log_fields))
            self._audit.record(
                AuditEvent(
                    kind=AuditKind.SECURITY_ALERT,
                    outcome=AuditOutcome.MINOR_FAILURE,
                    participants=peer_of(peer.source, peer.user),
                    detail="association aborted: a message that cannot be answered",
                )
            )
            link.abort()
            return
        handler, name = self._handler(request)
        if peer.policy is not None and name:
            handler = self._refusal(request, peer.policy, name) or handler
        started = time.monotonic()
        try:
            status = handler(request)
        except AssociationLost:
            log.info("association ended during a request", extra={"service": name, **link.log_fields})
            return
        except Exception:  # the SCP edge: a fault of ours is answered, and ends neither association nor process
            log.exception("request failed", extra={"service": name, **link.log_fields})
            status = PROCESSING_FAILURE
            self._last_words(request, status)
        if name:
            self._observe.request_answered(name, status, time.monotonic() - started)
        if peer.asked is not None:
            self._follow(link, peer)

    def _follow(self, link: Link, peer: Peer) -> None:
        try:
            self._commitment.follow(link, peer)
        except NodeError:  # what was kept is checked and reported all the same
            log.exception("storage commitment could not be followed", extra=dict(link.log_fields))

    @staticmethod
    def _is_awaited(link: Link, peer: Peer, message: Message) -> bool:
        """Whether it is the response to a request of ours that nobody waits for."""
        try:
            answered = message.command.responded_to
            status = message.command.status
            is_response = message.command.field & CommandField.RESPONSE
        except BadMessage:
            return False
        take = peer.awaited.pop(answered, None) if answered is not None and is_response else None
        if take is None:
            return False
        try:
            take(PROCESSING_FAILURE if status is None else status)
        except NodeError:  # the request is made again
            log.exception("a response could not be kept", extra=dict(link.log_fields))
        return True

    @staticmethod
    def _request(link: Link, peer: Peer, message: Message) -> Request | None:
        """The message as a request, None for what is none."""
        context, command = link.contexts.get(message.context_id), message.command
        try:
            message_id, kind = command.message_id, command.field
            if context is None or message_id is None or command.responded_to or kind not in _REQUESTS:
                return None
        except BadMessage:
            return None
        return Request(link, peer, message, kind, message_id, context.abstract_syntax, context.transfer_syntax)

    def _handler(self, request: Request) -> tuple[Callable[[Request], int], str]:
        """The service for this kind of message in this kind of context."""
        kind, context = request.kind, request.sop_class_uid
        if kind == CommandField.C_ECHO and context == VERIFICATION:
            return self._echo, "echo"
        if kind == CommandField.C_STORE and context not in _SERVICES:
            return self._receive, "store"
        if kind == CommandField.C_FIND and context in FIND_SOP_CLASSES:
            return self._query, "find"
        if kind == CommandField.C_GET and context in GET_SOP_CLASSES:
            return self._retrievals.get, "get"
        if kind == CommandField.C_MOVE and context in MOVE_SOP_CLASSES:
            return self._retrievals.move, "move"
        if kind == CommandField.N_ACTION and context == STORAGE_COMMITMENT:  # judges by itself who may ask
            return self._commitment.action, "commit"
        if kind == CommandField.N_EVENT_REPORT and context == STORAGE_COMMITMENT:
            return self._commitment.event, "commit_report"
        known = kind in _KNOWN
        return (self._wrong_class if known else self._unknown_operation), ""

    def _refusal(self, request: Request, policy: Policy, name: str) -> Callable[[Request], int] | None:
        """What answers a request that this peer may not make, or not yet; None for all others."""
        context = request.link.contexts[request.message.context_id]
        if name in EVERYDAY_SERVICES and not (name in policy.services and (name != "store" or context.peer_asks)):
            return self._not_authorized
        if name == "move" and policy.move_destinations is not None:
            destination = move_destination(request)
            if destination not in policy.move_destinations:
                return self._not_authorized
        if name in ("find", "get", "move") and policy.rates is not None:
            queries = policy.rates.queries
            if queries is not None and not queries.takes():
                return self._too_many_queries
        return None

    def _not_authorized(self, request: Request) -> int:
        log.warning("request is not allowed to this peer", extra=dict(request.link.log_fields))
        self._audit.record(
            AuditEvent(
                AuditKind.SECURITY_ALERT,
                AuditOutcome.SERIOUS_FAILURE,
                participants=peer_of(request.peer.source, request.peer.user),
                detail=f"a request that is not allowed to this peer: {request.sop_class_uid}",
                alert_type=AlertType.USE_OF_RESTRICTED_FUNCTION,
            )
        )
        request.respond({"Status": NOT_AUTHORIZED, "ErrorComment": "not allowed to this AE"})
        return NOT_AUTHORIZED

    @staticmethod
    def _too_many_queries(request: Request) -> int:
        status = OUT_OF_RESOURCES if request.kind == CommandField.C_FIND else CANNOT_SUB_OPERATE
        request.respond({"Status": status, "ErrorComment": "more requests in a minute than are allowed"})
        return status

    @staticmethod
    def _last_words(request: Request, status: int) -> None:
        try:
            request.respond({"Status": status})
        except AssociationLost:
            log.info("association ended during a request", extra=dict(request.link.log_fields))

    @staticmethod
    def _wrong_class(request: Request) -> int:
        request.respond({"Status": SOP_CLASS_NOT_SUPPORTED})
        return SOP_CLASS_NOT_SUPPORTED

    @staticmethod
    def _unknown_operation(request: Request) -> int:
        request.respond({"Status": UNRECOGNIZED_OPERATION})
        return UNRECOGNIZED_OPERATION

    @staticmethod
    def _echo(request: Request) -> int:
        request.link.send_message(
            request.message.context_id, _ECHOED[0] + request.message_id.to_bytes(2, "little") + _ECHOED[1]
        )
        return 0

    # --- C-STORE

    def _receive(self, request: Request) -> int:
        peer, sop_instance_uid = request.peer, request.uid("AffectedSOPInstanceUID")
        sop_class_uid = request.uid("AffectedSOPClassUID")
        fields: dict[str, CommandValue] = {}
        if sop_instance_uid:
            fields["AffectedSOPInstanceUID"] = sop_instance_uid
        peer.objects += 1
        if peer.objects > self._max_objects:
            return self._too_many_objects(request)
        data_set = request.message.data_set
        rates = peer.policy.rates if peer.policy is not None else None
        if rates is not None:
            data_set = paced(request.link, rates, data_set)
        try:
            if not peer.recorded:
                self._associations.open_association(str(peer.source.association_id), peer.source)
                peer.recorded = True
            result = self._store.store(
                StoreRequest(
                    context_sop_class_uid=request.sop_class_uid,
                    transfer_syntax_uid=request.transfer_syntax,
                    sop_class_uid=sop_class_uid,
                    sop_instance_uid=sop_instance_uid,
                ),
                data_set,
                peer.source,
            )
            status, comment = result.status, result.comment
        except AssociationLost:
            raise  # there is nobody to answer
        except NodeError as exc:
            log.exception("instance could not be kept", extra=dict(request.link.log_fields))
            status, comment = exc.dimse_status, type(exc).__name__
        except Exception:  # the SCP edge: never acknowledged, always answered
            log.exception("request failed", extra={"service": "store", **request.link.log_fields})
            status, comment = PROCESSING_FAILURE, ""
        if not is_stored(status):
            self._note_failure(peer)
        if comment and status:
            fields["ErrorComment"] = error_comment(comment)
        elif sop_class_uid and sop_instance_uid:  # as nearly all are
            answer = store_response(sop_class_uid, request.message_id, status, sop_instance_uid)
            request.link.send_message(request.message.context_id, answer)
            return status
        request.respond({"Status": status, **fields})
        return status

    def _too_many_objects(self, request: Request) -> int:
        """Later, not never: its sender tries again, on an association that begins anew."""
        log.warning("more objects on one association than are allowed", extra=dict(request.link.log_fields))
        self._note_failure(request.peer)
        comment = f"more than {self._max_objects} objects on one association; go on with another"
        request.respond({"Status": OUT_OF_RESOURCES, "ErrorComment": error_comment(comment)})
        return OUT_OF_RESOURCES

    def _note_failure(self, peer: Peer) -> None:
        self._refused(peer.source)
        if not peer.recorded:
            return
        try:
            self._associations.mark_store_failed(str(peer.source.association_id))
        except NodeError:
            log.exception("failed store could not be noted", extra={"association": peer.source.association_id})

    # --- C-FIND

    def _query(self, request: Request) -> int:
        encoded, status = b"", PROCESSING_FAILURE
        try:
            encoded = identifier_bytes(request)
            status = self._answer_query(request, read_query(encoded, request.transfer_syntax))
        except BadIdentifier as exc:
            status = respond_bad(request, exc)
        finally:  # also of one whose peer went away: it may have had answers by then
            self._tell_query(request, encoded, status)
        return status

    def _tell_query(self, request: Request, encoded: bytes, status: int) -> None:
        is_answered = status in (0x0000, 0xFE00)
        self._audit.record(
            AuditEvent(
                kind=AuditKind.QUERY,
                outcome=AuditOutcome.SUCCESS if is_answered else AuditOutcome.MINOR_FAILURE,
                participants=peer_of(request.peer.source, request.peer.user),
                query=encoded,
                sop_class_uid=request.sop_class_uid,
                transfer_syntax_uid=request.transfer_syntax,
                detail="" if is_answered else f"status {status:04X}H",
            )
        )

    def _answer_query(self, request: Request, identifier: Identifier) -> int:
        status = PROCESSING_FAILURE
        for response in self._find.find(request.model, identifier, request.options, request.cancelled):
            status, answers = response.status, response.answers
            if answers is not None:
                encoded = encode_answers(answers, request.transfer_syntax)
                request.respond_each({"Status": status}, encoded, more=len(answers) < SOME)
                continue
            fields: dict[str, CommandValue] = {"Status": status}
            if response.comment:
                fields["ErrorComment"] = error_comment(response.comment)
            if response.offending:
                fields["OffendingElement"] = response.offending
            request.respond(fields)
        return status
