"""The node as SCU: sends stored bytes, asks whether a peer is there, fetches a study. Only bytes go out and come in.

`Session` is one association to one AE; C-MOVE sub-operations use it too. Contexts: for each SOP class that is sent, the
stored transfer syntax, Explicit and Implicit VR Little Endian, each in a context of its own, so that the peer's answer
says all it takes. What was accepted as stored goes out byte for byte; the rest is re-encoded on the way.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

from pynetdicom.ae import ApplicationEntity
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET, CommandValue, encode_command
from dicom_node.dimse.contexts import EXPLICIT_LE, IMPLICIT_LE, VERIFICATION
from dicom_node.dimse.pynetdicom_link import AssociationLost, Fragments, Link, quiet_libraries
from dicom_node.errors import DeliveryRefused, DeliveryUnavailable, TranscodeError
from dicom_node.interfaces import Heartbeat
from dicom_node.model import Destination, StoredInstance
from dicom_node.transcode import transcode

__all__ = ["MAX_CONTEXTS", "DimseSender", "MoveOriginator", "ProposedContext", "Session", "batches", "is_stored"]

log = logging.getLogger(__name__)

MAX_CONTEXTS = 128  # PS3.8 table 9-13: odd ids 1 .. 255
MAX_PDU = 131072
_CHUNK = 1024 * 1024
_C_STORE_RQ = 0x0001
_C_ECHO_RQ = 0x0030
_LATER = range(0xA700, 0xA800)  # PS3.4 table B.2-1: out of resources


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedContext:
    """One context to propose; `as_scp`: the node wants to be SCP in it (C-GET)."""

    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]
    as_scp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOriginator:
    """Who asked for a C-MOVE, for the sub-operations' requests (PS3.7 9.1.1.1)."""

    ae_title: str
    message_id: int


def is_stored(status: int) -> bool:
    """Whether this status of a C-STORE means that the peer has the object: Success, Warning, Duplicate SOP Instance
    (PS3.7 Annex C).
    """
    return status in (0x0000, 0x0001, 0x0107, 0x0111, 0x0116) or status >> 12 == 0xB


def batches(instances: Sequence[StoredInstance]) -> Iterator[tuple[list[StoredInstance], list[ProposedContext]]]:
    """The instances in order, cut where the contexts they need no longer fit one association."""
    batch: list[StoredInstance] = []
    contexts: dict[tuple[str, str], ProposedContext] = {}
    for instance in instances:
        needed = {
            (instance.sop_class_uid, syntax): ProposedContext(
                abstract_syntax=instance.sop_class_uid, transfer_syntaxes=(syntax,)
            )
            for syntax in dict.fromkeys((instance.transfer_syntax_uid, EXPLICIT_LE, IMPLICIT_LE))
        }
        if batch and len(contexts | needed) > MAX_CONTEXTS:
            yield batch, list(contexts.values())
            batch, contexts = [], {}
        batch.append(instance)
        contexts |= needed
    if batch:
        yield batch, list(contexts.values())


class Session:
    """One association as requestor, used from one thread. A context manager: released at the end, aborted on errors.

    Raises DeliveryRefused for a permanent rejection, DeliveryUnavailable for everything else that keeps the
    association from being had: no TCP connection, transient rejection, abort, no answer.
    """

    def __init__(
        self,
        settings: DeliverySettings,
        destination: Destination,
        contexts: Sequence[ProposedContext],
        *,
        calling_ae_title: str,
        max_data_set_bytes: int = 8 * 1024**3,
    ) -> None:
        quiet_libraries()
        self._settings = settings
        self._message_id = 0
        entity = ApplicationEntity(ae_title=destination.calling_ae_title or calling_ae_title)
        entity.connection_timeout = settings.connect_timeout_s
        entity.acse_timeout = settings.response_timeout_s
        entity.dimse_timeout = settings.response_timeout_s
        entity.network_timeout = None
        self._link = Link(entity, "requestor", max_pdu=MAX_PDU, max_data_set_bytes=max_data_set_bytes)
        self._associate(entity, destination, contexts)
        accepted = self._link.accepted_contexts
        self.contexts: Mapping[tuple[str, str], int] = {
            (str(context.abstract_syntax), str(context.transfer_syntax[0])): int(context.context_id or 0)
            for context in accepted
            if context.as_scu
        }
        self.context_ids: Mapping[int, tuple[str, str]] = {
            int(context.context_id or 0): (str(context.abstract_syntax), str(context.transfer_syntax[0]))
            for context in accepted
        }

    def _associate(
        self, entity: ApplicationEntity, destination: Destination, contexts: Sequence[ProposedContext]
    ) -> None:
        link = self._link
        try:
            remote = AddressInformation.from_addr_port(destination.host, destination.port)
        except (OSError, ValueError) as exc:
            raise DeliveryUnavailable(f"destination {destination.name}: the host name is not known") from exc
        local = AddressInformation.from_tuple(("" if remote.address_family == socket.AF_INET else "::0", 0))
        link.use_socket(address=local)
        link.acceptor.ae_title = destination.ae_title
        link.acceptor.address_info = remote
        link.requestor.address_info = local
        link.requestor.ae_title = entity.ae_title
        link.requestor.maximum_length = MAX_PDU
        link.requestor.implementation_class_uid = entity.implementation_class_uid
        link.requestor.implementation_version_name = entity.implementation_version_name
        link.requestor.requested_contexts = [_context(number, item) for number, item in enumerate(contexts)]
        for sop_class_uid in dict.fromkeys(item.abstract_syntax for item in contexts if item.as_scp):
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid, role.scu_role, role.scp_role = sop_class_uid, False, True
            link.requestor.add_negotiation_item(role)
        link.log_fields = {"destination": destination.name, "called_ae_title": destination.ae_title}
        link.request()
        link._is_paused = True  # no reactor thread: this thread reads the answers itself
        if link.is_established:
            return
        reply = link.acceptor.primitive
        link.close_socket()
        if link.is_rejected and reply is not None:
            reason = f"rejected ({reply.result},{reply.result_source},{reply.diagnostic})"
            kind = DeliveryRefused if reply.result == 0x01 else DeliveryUnavailable
            raise kind(f"destination {destination.name}: association {reason}")
        if reply is not None and reply.result == 0x00:
            return  # accepted without one context: `contexts` is empty, each object fails by itself
        raise DeliveryUnavailable(f"destination {destination.name}: no association")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(abort=kind is not None)

    @property
    def link(self) -> Link:
        """The association itself."""
        return self._link

    def close(self, *, abort: bool = False) -> None:
        """Release (or abort) the association. Idempotent."""
        if self._link.is_established:
            if abort:
                self._link.abort()
            else:
                self._link.release()
        self._link.dul.kill_dul()
        self._link.close_socket()

    def next_message_id(self) -> int:
        """A fresh Message ID."""
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def echo(self) -> int:
        """C-ECHO; the status. Raises AssociationLost."""
        message_id = self.next_message_id()
        context_id = next((cx for (uid, _), cx in self.contexts.items() if uid == VERIFICATION), None)
        if context_id is None:
            raise DeliveryRefused("the peer does not accept Verification")
        command = encode_command(
            {
                "AffectedSOPClassUID": VERIFICATION,
                "CommandField": _C_ECHO_RQ,
                "MessageID": message_id,
                "CommandDataSetType": NO_DATA_SET,
            }
        )
        self._link.send_message(context_id, command)
        return int(self._link.await_response(message_id, self._settings.response_timeout_s).Status)

    def store(
        self,
        instance: StoredInstance,
        *,
        originator: MoveOriginator | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> tuple[int | None, str]:
        """C-STORE one instance; status and error. Status None: no context for it, unreadable, or not re-encodable.

        Raises AssociationLost.
        """
        accepted = {syntax: cx for (uid, syntax), cx in self.contexts.items() if uid == instance.sop_class_uid}
        return send_store(
            self._link,
            instance,
            accepted,
            self.next_message_id(),
            timeout_s=self._settings.response_timeout_s,
            originator=originator,
            on_wait=on_wait,
        )


def send_store(
    link: Link,
    instance: StoredInstance,
    accepted: Mapping[str, int],
    message_id: int,
    *,
    timeout_s: float,
    originator: MoveOriginator | None = None,
    on_wait: Callable[[], None] | None = None,
) -> tuple[int | None, str]:
    """Send one instance on `link`, as stored when `accepted` (transfer syntax to context id) has its syntax.

    As `Session.store`; also used by the C-GET SCP on the requester's own association.
    """
    if not accepted:
        return None, "no presentation context was accepted for its SOP class"
    try:
        syntax, content = transcode(
            instance.path,
            instance.data_set_offset,
            instance.transfer_syntax_uid,
            tuple(accepted),
            data_set_length=instance.data_set_length,
        )
    except TranscodeError as exc:
        return None, str(exc)
    except OSError:
        log.error("stored file cannot be read", extra={"sop_instance": instance.sop_instance_uid})
        return None, "the stored file cannot be read"
    fields: dict[str, CommandValue] = {
        "AffectedSOPClassUID": instance.sop_class_uid,
        "CommandField": _C_STORE_RQ,
        "MessageID": message_id,
        "Priority": 0,
        "CommandDataSetType": WITH_DATA_SET,
        "AffectedSOPInstanceUID": instance.sop_instance_uid,
    }
    if originator is not None:
        fields["MoveOriginatorApplicationEntityTitle"] = originator.ae_title
        fields["MoveOriginatorMessageID"] = originator.message_id
    with content:
        try:
            link.send_message(accepted[syntax], encode_command(fields), _fragments(content))
        except OSError as exc:
            # half a data set is out: only an abort keeps the peer from taking it for a whole one
            link.abort()
            raise AssociationLost("the stored file could not be read to its end") from exc
    status = int(link.await_response(message_id, timeout_s, on_wait).Status)
    return status, "" if is_stored(status) else f"the peer answered 0x{status:04X}"


def _fragments(content: BinaryIO) -> Fragments:
    while chunk := content.read(_CHUNK):
        yield chunk


def _context(number: int, item: ProposedContext) -> PresentationContext:
    context = PresentationContext()
    context.context_id = 2 * number + 1
    context.abstract_syntax = item.abstract_syntax
    context.transfer_syntax = list(item.transfer_syntaxes)
    return context


class DimseSender:
    """Sends instances to configured destinations (`interfaces.Sender`). Keeps no connection between calls."""

    def __init__(self, settings: DeliverySettings, default_calling_ae_title: str) -> None:
        self._settings = settings
        self._calling = default_calling_ae_title

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        """See `interfaces.Sender.send`. 0xA7xx and 0x0110 from the peer end the call as DeliveryUnavailable: the rest
        would meet the same, and nothing was lost by waiting.
        """
        for batch, contexts in batches(instances):
            heartbeat()
            with Session(self._settings, destination, contexts, calling_ae_title=self._calling) as session:
                for instance in batch:
                    heartbeat()
                    self._send_one(session, destination, instance, on_result, heartbeat)

    def _send_one(
        self,
        session: Session,
        destination: Destination,
        instance: StoredInstance,
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        try:
            status, error = session.store(instance, on_wait=heartbeat)
        except AssociationLost as exc:
            raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
        if status is not None and (status in _LATER or status == 0x0110):
            with suppress(AssociationLost):
                session.close()
            raise DeliveryUnavailable(f"destination {destination.name}: the peer answered 0x{status:04X}")
        on_result(instance, status, error)

    def echo(self, destination: Destination) -> int:
        """C-ECHO; the status answered. Raises DeliveryUnavailable, DeliveryRefused."""
        contexts = [ProposedContext(abstract_syntax=VERIFICATION, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE))]
        with Session(self._settings, destination, contexts, calling_ae_title=self._calling) as session:
            try:
                return session.echo()
            except AssociationLost as exc:
                raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
