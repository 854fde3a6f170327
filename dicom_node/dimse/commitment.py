"""Storage commitment on associations that peers opened: N-ACTION as SCP, N-EVENT-REPORT as SCU (PS3.4 annex J).

A request is kept before it is answered; who checks it, and reports where the peer's association is gone, is
`pipeline.commit`. Here its report is waited for a moment, and sent on the same association if that is still silent: a
peer that is about to release it would have to tell our message from the answer it waits for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dicom_node.config import NodeConfig
from dicom_node.dimse.commands import WITH_DATA_SET, CommandField, CommandValue, element, encode_command, error_comment
from dicom_node.dimse.contexts import EXPLICIT_BE, IMPLICIT_LE, STORAGE_COMMITMENT
from dicom_node.dimse.link import AssociationLost, Link
from dicom_node.dimse.request import Peer, Request, read_information
from dicom_node.errors import CommitmentRefused, NotFound
from dicom_node.interfaces import Commitments
from dicom_node.model import CommitmentReport, CommitmentRequest
from dicom_node.services.commitment import (
    REQUEST_COMMITMENT,
    WELL_KNOWN_INSTANCE,
    BadInformation,
    encode_information,
    event_of,
    read_action,
    read_event,
)
from dicom_node.services.identifier import BadIdentifier

__all__ = ["HERE_S", "CommitmentService", "encode_report", "event_command"]

log = logging.getLogger(__name__)

HERE_S = 3.0  # how long an association is kept for the report
LOOK_S = 0.05
ANSWER_S = 30.0  # then the report goes out on an association of the node's own
MAX_AWAITED = 64  # reports on one association that the peer has not answered
MAX_INFORMATION_BYTES = 8 * 1024 * 1024

# PS3.7 Annex C
NO_SUCH_INSTANCE, NO_SUCH_CLASS, CLASS_INSTANCE_CONFLICT = 0x0112, 0x0118, 0x0119
INVALID_ARGUMENT, NO_SUCH_EVENT, NO_SUCH_ACTION, NOT_AUTHORIZED = 0x0115, 0x0113, 0x0123, 0x0124


class CommitmentService:
    """Serves both; each method returns the status it answered. Raises AssociationLost, StorageError."""

    def __init__(self, config: NodeConfig, book: Commitments | None) -> None:
        self._book = book
        self._askers = frozenset(config.committed_to()) if book is not None else frozenset()
        self._asked: Mapping[str, frozenset[str]] = config.asked_to_commit() if book is not None else {}

    def may_ask(self, calling_ae_title: str) -> bool:
        """Whether this AE may ask the node to commit to objects."""
        return calling_ae_title in self._askers

    def may_report(self, calling_ae_title: str) -> bool:
        """Whether it is a destination that the node asks."""
        return calling_ae_title in self._asked

    # --- N-ACTION

    def action(self, request: Request) -> int:
        """Keep what is asked, answer, and remember with the peer what `follow` is to do."""
        fields: dict[str, CommandValue] = {"AffectedSOPClassUID": STORAGE_COMMITMENT}
        try:
            kept = self._asked_for(request)
        except (BadInformation, BadIdentifier, CommitmentRefused) as exc:
            status = INVALID_ARGUMENT if isinstance(exc, BadIdentifier) else exc.dimse_status
            log.warning(
                "storage commitment refused", extra={"status": f"{status:04X}H", "why": str(exc), **_fields(request)}
            )
            request.respond({"Status": status, "ErrorComment": error_comment(str(exc)), **fields})
            return status
        log.info(
            "storage commitment asked for",
            extra={"transaction": kept.transaction_uid, "references": len(kept.references), **_fields(request)},
        )
        fields |= {"AffectedSOPInstanceUID": WELL_KNOWN_INSTANCE, "ActionTypeID": REQUEST_COMMITMENT}
        try:
            request.respond({"Status": 0, **fields})
        except AssociationLost:
            self._let_go(kept)
            raise
        request.peer.asked = (kept, request.message.context_id)
        return 0

    def _asked_for(self, request: Request) -> CommitmentRequest:
        """The request, kept. Raises BadInformation, BadIdentifier, CommitmentRefused, StorageError."""
        command, source = request.message.command, request.peer.source
        if self._book is None or not self.may_ask(source.calling_ae_title):
            raise BadInformation("this AE may not ask for storage commitment", NOT_AUTHORIZED)
        _check_names(request, "RequestedSOPClassUID", "RequestedSOPInstanceUID")
        if command.number(element("ActionTypeID")) != REQUEST_COMMITMENT:
            raise BadInformation("unknown Action Type ID", NO_SUCH_ACTION)
        transaction_uid, references = read_action(read_information(request, MAX_INFORMATION_BYTES))
        called = source.called_ae_title
        return self._book.ask_commitment(source.calling_ae_title, called, transaction_uid, references, HERE_S + LOOK_S)

    def follow(self, link: Link, peer: Peer) -> None:
        """After an N-ACTION was answered: report here if that can be done soon, while the peer is silent.

        The peer's answer comes as a message of its own, to `Peer.awaited`. Raises nothing but NodeError.
        """
        if peer.asked is None or self._book is None:
            return
        (kept, context_id), peer.asked = peer.asked, None
        deadline = time.monotonic() + HERE_S
        try:
            while link.stays_quiet(LOOK_S):
                judged = self._book.judged_commitment(kept)
                if judged is not None:
                    if self._book.claim_commitment(judged, ANSWER_S, here=True):
                        self._report_here(link, peer, judged, context_id)
                    return
                if time.monotonic() >= deadline:
                    break
            self._let_go(kept)
        except AssociationLost:
            self._let_go(kept)

    def _let_go(self, kept: CommitmentRequest) -> None:
        if self._book is not None:
            self._book.let_go_of_commitment(kept)

    def _report_here(self, link: Link, peer: Peer, judged: CommitmentRequest, context_id: int) -> None:
        message_id, report = peer.next_message_id(), judged.report()
        while len(peer.awaited) >= MAX_AWAITED:  # those are reported on associations of the node's own
            del peer.awaited[next(iter(peer.awaited))]
        peer.awaited[message_id] = partial(self._answered, replace(judged, references=(), reasons=()))
        syntax = link.contexts[context_id].transfer_syntax
        information = encode_report(report, syntax)
        try:
            link.send_message(context_id, event_command(message_id, event_of(report)), [information])
        except AssociationLost as exc:
            assert self._book is not None
            self._book.retry_commitment_later(judged, str(exc), 0.0)
            raise

    def _answered(self, judged: CommitmentRequest, status: int) -> None:
        """The peer's answer to a report on its own association."""
        assert self._book is not None
        if status == 0:
            self._book.end_commitment(judged)
            log.info("storage commitment reported", extra={"transaction": judged.transaction_uid, "where": "here"})
        else:
            self._book.retry_commitment_later(judged, f"the peer answered {status:04X}H", 0.0)

    # --- N-EVENT-REPORT

    def event(self, request: Request) -> int:
        """Keep what a destination reports, then say so; what was reported before is taken again."""
        try:
            self._note(request)
            status, comment = 0, ""
        except NotFound as exc:
            status, comment = INVALID_ARGUMENT, str(exc)
        except (BadInformation, BadIdentifier) as exc:
            status = INVALID_ARGUMENT if isinstance(exc, BadIdentifier) else exc.dimse_status
            comment = str(exc)
        event_type = request.message.command.number(element("EventTypeID"))
        fields: dict[str, CommandValue] = {
            "AffectedSOPClassUID": STORAGE_COMMITMENT,
            "AffectedSOPInstanceUID": WELL_KNOWN_INSTANCE,
            **({"EventTypeID": event_type} if event_type is not None else {}),
        }
        if status:
            log.warning(
                "report of storage commitment refused",
                extra={"status": f"{status:04X}H", "why": comment, **_fields(request)},
            )
            fields["ErrorComment"] = error_comment(comment)
        request.respond({"Status": status, **fields})
        return status

    def _note(self, request: Request) -> None:
        destinations = self._asked.get(request.peer.source.calling_ae_title)
        if self._book is None or not destinations:
            raise BadInformation("this AE is not asked for storage commitment", NOT_AUTHORIZED)
        _check_names(request, "AffectedSOPClassUID", "AffectedSOPInstanceUID")
        if request.message.command.number(element("EventTypeID")) not in (1, 2):
            raise BadInformation("unknown Event Type ID", NO_SUCH_EVENT)
        report = read_event(read_information(request, MAX_INFORMATION_BYTES))
        self._book.note_report(report, destinations)
        log.info(
            "storage commitment was reported",
            extra={
                "transaction": report.transaction_uid,
                **{"committed": len(report.committed), "failed": len(report.failed)},
                **_fields(request),
            },
        )


def _check_names(request: Request, class_keyword: str, instance_keyword: str) -> None:
    """Raises BadInformation for another SOP class or instance than the well-known one (PS3.4 J.3.5)."""
    if request.uid(class_keyword) != STORAGE_COMMITMENT:
        raise BadInformation("not the SOP class of this context", NO_SUCH_CLASS)
    if request.uid(instance_keyword) != WELL_KNOWN_INSTANCE:
        raise BadInformation("not the well-known SOP instance", NO_SUCH_INSTANCE)


def _fields(request: Request) -> Mapping[str, str]:
    return request.link.log_fields


def encode_report(report: CommitmentReport, syntax: str) -> bytes:
    """See `services.commitment.encode_information`."""
    return encode_information(report, implicit_vr=syntax == IMPLICIT_LE, little_endian=syntax != EXPLICIT_BE)


def event_command(message_id: int, event_type: int) -> bytes:
    """The command set of an N-EVENT-REPORT-RQ (PS3.7 table 10.3-1)."""
    return encode_command(
        {
            "AffectedSOPClassUID": STORAGE_COMMITMENT,
            "CommandField": CommandField.N_EVENT_REPORT,
            "MessageID": message_id,
            "CommandDataSetType": WITH_DATA_SET,
            "AffectedSOPInstanceUID": WELL_KNOWN_INSTANCE,
            "EventTypeID": event_type,
        }
    )
