"""Storage commitment on associations of the node's own: asking destinations, and reporting to peers (PS3.4 annex J)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET, CommandField, element, encode_command
from dicom_node.dimse.commitment import MAX_INFORMATION_BYTES, encode_report, event_command
from dicom_node.dimse.contexts import EXPLICIT_LE, IMPLICIT_LE, STORAGE_COMMITMENT, ProposedContext
from dicom_node.dimse.link import AssociationLost, Message, answers
from dicom_node.dimse.messages import BadMessage
from dicom_node.dimse.request import read_encoded
from dicom_node.dimse.requestor import open_link as open_own_link
from dicom_node.dimse.session import OpenLink, Session, status_of
from dicom_node.errors import CommitmentNotTaken, DeliveryRefused, DeliveryUnavailable, NotFound
from dicom_node.interfaces import Heartbeat
from dicom_node.model import CommitmentReport, CommitmentRequest, Destination, ObjectReference
from dicom_node.services.commitment import (
    REQUEST_COMMITMENT,
    WELL_KNOWN_INSTANCE,
    BadInformation,
    event_of,
    read_event,
)
from dicom_node.services.identifier import BadIdentifier

__all__ = ["DimseCommitment"]

log = logging.getLogger(__name__)

LOOK_S = 0.25


class DimseCommitment:
    """`interfaces.CommitmentAsker` and `interfaces.CommitmentReporter`. Keeps no connection between calls.

    May be used by several threads.
    """

    def __init__(
        self, settings: DeliverySettings, default_calling_ae_title: str, open_link: OpenLink = open_own_link
    ) -> None:
        self._settings = settings
        self._calling = default_calling_ae_title
        self._open_link = open_link
        self._reports_here: dict[str, bool] = {}  # of destinations: whether the last one asked did so in time

    def _session(self, destination: Destination, *, as_scp: bool) -> Session:
        context = ProposedContext(
            abstract_syntax=STORAGE_COMMITMENT, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE), as_scp=as_scp
        )
        return Session(
            self._settings, destination, [context], calling_ae_title=self._calling, open_link=self._open_link
        )

    # --- as SCP

    def report(self, peer: Destination, request: CommitmentRequest) -> None:
        """See `interfaces.CommitmentReporter.report`. The SCP role is proposed (PS3.4 J.3.3.1.3)."""
        report = request.report()
        with self._session(peer, as_scp=True) as session:
            context_id, syntax = _context(session, peer)
            message_id = session.next_message_id()
            information = encode_report(report, syntax)
            try:
                session.link.send_message(context_id, event_command(message_id, event_of(report)), [information])
                status = status_of(session.link.await_response(message_id, self._settings.response_timeout_s))
            except AssociationLost as exc:
                raise DeliveryUnavailable(f"peer {peer.name}: {exc}") from exc
        if status:
            raise DeliveryUnavailable(f"peer {peer.name}: it answered {status:04X}H to the report")

    # --- as SCU

    def ask(
        self,
        destination: Destination,
        questions: Mapping[str, Sequence[ObjectReference]],
        on_report: Callable[[CommitmentReport], None],
        is_open: Callable[[], bool],
        heartbeat: Heartbeat,
    ) -> None:
        """See `interfaces.CommitmentAsker.ask`."""
        with self._session(destination, as_scp=False) as session:
            try:
                context_id, syntax = _context(session, destination)
            except DeliveryRefused as exc:
                raise CommitmentNotTaken(str(exc)) from exc
            conversation = _Conversation(session, context_id, syntax, on_report)
            try:
                for transaction_uid, references in questions.items():
                    heartbeat()
                    status = conversation.ask(transaction_uid, references, self._settings.response_timeout_s, heartbeat)
                    if status:
                        raise CommitmentNotTaken(
                            f"destination {destination.name}: it answered {status:04X}H to the request for storage "
                            "commitment"
                        )
            except AssociationLost as exc:
                raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
            try:
                conversation.wait(self._wait_s(destination), is_open, heartbeat)
            except AssociationLost:  # it has taken the questions, and may report on an association of its own
                log.info("association ended before the report", extra={"destination": destination.name})
            self._reports_here[destination.name] = conversation.reports > 0

    def _wait_s(self, destination: Destination) -> float:
        """One that did not report here the last time is not waited for: thousands of deliveries may be queued."""
        wait_s = destination.commitment.wait_s if destination.commitment else 0.0
        return wait_s if self._reports_here.get(destination.name, True) else min(wait_s, LOOK_S)


def _context(session: Session, destination: Destination) -> tuple[int, str]:
    for context_id, (abstract_syntax, transfer_syntax) in session.context_ids.items():
        if abstract_syntax == STORAGE_COMMITMENT:
            return context_id, transfer_syntax
    raise DeliveryRefused(f"{destination.name}: storage commitment is not accepted there in the role it is needed in")


class _Conversation:
    """N-ACTIONs on one association, and the reports that come between and after them."""

    def __init__(
        self, session: Session, context_id: int, syntax: str, on_report: Callable[[CommitmentReport], None]
    ) -> None:
        self._session, self._link = session, session.link
        self._context_id, self._syntax, self._on_report = context_id, syntax, on_report
        self.reports = 0

    def ask(
        self, transaction_uid: str, references: Sequence[ObjectReference], timeout_s: float, heartbeat: Heartbeat
    ) -> int:
        """One N-ACTION; its status. A report of an earlier one may come first. Raises AssociationLost."""
        message_id = self._session.next_message_id()
        command = encode_command(
            {
                "RequestedSOPClassUID": STORAGE_COMMITMENT,
                "CommandField": CommandField.N_ACTION,
                "MessageID": message_id,
                "CommandDataSetType": WITH_DATA_SET,
                "RequestedSOPInstanceUID": WELL_KNOWN_INSTANCE,
                "ActionTypeID": REQUEST_COMMITMENT,
            }
        )
        asked = CommitmentReport(transaction_uid=transaction_uid, committed=tuple(references))
        information = encode_report(asked, self._syntax)
        self._link.send_message(self._context_id, command, [information])
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self._link.next_message(LOOK_S)
            if message is None:
                self._check(heartbeat)
            elif answers(message, message_id):
                return status_of(message)
            else:
                self._take(message)
        self._link.abort()
        raise AssociationLost("no response in time")

    def wait(self, seconds: float, is_open: Callable[[], bool], heartbeat: Heartbeat) -> None:
        """For reports, while there are questions open. Raises AssociationLost."""
        deadline = time.monotonic() + seconds
        while is_open() and (left := deadline - time.monotonic()) > 0:
            message = self._link.next_message(min(LOOK_S, left))
            if message is not None:
                self._take(message)
            else:
                self._check(heartbeat)

    def _check(self, heartbeat: Heartbeat) -> None:
        heartbeat()
        if not self._link.stays_quiet(0.0):
            self._link.check_alive()
            if self._link.is_leaving:
                raise AssociationLost("the peer released the association")

    def _take(self, message: Message) -> None:
        """A report. Raises AssociationLost for anything else: the node has asked for nothing that it could be."""
        try:
            command = message.command
            is_report = command.field == CommandField.N_EVENT_REPORT and message.context_id == self._context_id
            message_id, event_type = command.message_id, command.number(element("EventTypeID"))
        except BadMessage:
            is_report, message_id, event_type = False, None, None
        if not is_report or message_id is None:
            self._link.abort()
            raise AssociationLost("the peer sent an unexpected message")
        self.reports += 1
        self._link.send_message(self._context_id, _taken(message_id, event_type, self._noted(message)))

    def _noted(self, message: Message) -> int:
        try:
            self._on_report(read_event(read_encoded(message.data_set, self._syntax, MAX_INFORMATION_BYTES)))
        except BadInformation as exc:
            return exc.dimse_status
        except (BadIdentifier, NotFound):
            return 0x0115
        return 0


def _taken(message_id: int, event_type: int | None, status: int) -> bytes:
    return encode_command(
        {
            "AffectedSOPClassUID": STORAGE_COMMITMENT,
            "CommandField": CommandField.N_EVENT_REPORT | CommandField.RESPONSE,
            "MessageIDBeingRespondedTo": message_id,
            "CommandDataSetType": NO_DATA_SET,
            "Status": status,
            "AffectedSOPInstanceUID": WELL_KNOWN_INSTANCE,
            **({"EventTypeID": event_type} if event_type is not None else {}),
        }
    )
