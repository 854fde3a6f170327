"""An association that the node asks for, on the wire of its own."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from dicom_node.config import DeliverySettings
from dicom_node.dimse.association import Association
from dicom_node.dimse.contexts import ProposedContext
from dicom_node.dimse.credentials import identity_of
from dicom_node.dimse.link import AgreedContext, AssociationLost
from dicom_node.dimse.tls import client_context, failure
from dicom_node.dimse.tls_stream import TlsStream
from dicom_node.dimse.transport import Buffers
from dicom_node.dimse.upper_layer import pdus
from dicom_node.dimse.upper_layer.connection import Associated, AssociationRefused, Connection, Limits, Side
from dicom_node.errors import ConfigError, DeliveryRefused, DeliveryUnavailable
from dicom_node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.model import Destination, TlsClient

__all__ = ["open_link"]

MAX_PDU = 131_072
_BUFFERS = Buffers(kept=8)


def open_link(
    destination: Destination,
    contexts: Sequence[ProposedContext],
    *,
    calling_ae_title: str,
    settings: DeliverySettings,
    max_data_set_bytes: int,
) -> Association:
    """See `session.OpenLink`. The system's address family decides between IPv4 and IPv6."""
    request = _request(destination, contexts, calling_ae_title, identity_of(destination))
    connection = Connection(Side.REQUESTOR, Limits(pdu_bytes=MAX_PDU))
    connection.request(request)
    sock = _connected(destination, settings.connect_timeout_s)
    association = Association(
        sock,
        connection,
        _BUFFERS,
        max_data_set_bytes=max_data_set_bytes,
        idle_timeout_s=settings.response_timeout_s,
    )
    association.log_fields = {"destination": destination.name, "called_ae_title": destination.ae_title}
    try:
        event = association.next_event(settings.response_timeout_s)
    except AssociationLost as exc:
        # with TLS 1.3 an acceptor says only now that it does not take our certificate
        why = f"TLS: {sock.trouble}" if isinstance(sock, TlsStream) and sock.trouble else str(exc)
        raise DeliveryUnavailable(f"destination {destination.name}: no association ({why})") from exc
    if isinstance(event, Associated):
        try:
            association.agreed(_agreed(request, event.answer), event.answer.user.maximum_length)
        except AssociationLost as exc:
            raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
        return association
    association.finish()
    if isinstance(event, AssociationRefused):
        answer = event.answer
        kind = DeliveryRefused if answer.result == 1 else DeliveryUnavailable
        raise kind(
            f"destination {destination.name}: association rejected ({answer.result},{answer.source},{answer.reason})"
        )
    raise DeliveryUnavailable(f"destination {destination.name}: no association")


def _connected(destination: Destination, timeout_s: float) -> socket.socket | TlsStream:
    try:
        sock = socket.create_connection((destination.host, destination.port), timeout=timeout_s)
    except socket.gaierror as exc:
        raise DeliveryUnavailable(f"destination {destination.name}: the host name is not known") from exc
    except (OSError, ValueError, OverflowError) as exc:
        raise DeliveryUnavailable(f"destination {destination.name}: no association (no connection)") from exc
    return sock if destination.tls is None else _encrypted(sock, destination, destination.tls, timeout_s)


def _encrypted(sock: socket.socket, destination: Destination, tls: TlsClient, timeout_s: float) -> TlsStream:
    """TLS over `sock`, the handshake done; it may take as long as the connection. Nothing is sent before that."""
    name = destination.name
    try:
        context = client_context(tls, f"destinations.{name}.tls")
        stream = TlsStream(sock, context, server_name=tls.server_name or destination.host)
        stream.shake_hands(timeout_s)
    except ConfigError as exc:  # files that are mended are found by the next try
        sock.close()
        raise DeliveryUnavailable(f"destination {name}: {exc}") from exc
    except (OSError, ValueError) as exc:
        sock.close()
        reason = failure(exc) if isinstance(exc, OSError) else "no name that a certificate can have"
        raise DeliveryUnavailable(f"destination {name}: no association (TLS: {reason})") from exc
    return stream


def _request(
    destination: Destination,
    contexts: Sequence[ProposedContext],
    calling_ae_title: str,
    identity: pdus.UserIdentity | None,
) -> pdus.AssociateRQ:
    proposed = tuple(
        pdus.ProposedContext(
            context_id=2 * number + 1,
            abstract_syntax=item.abstract_syntax,
            transfer_syntaxes=item.transfer_syntaxes,
        )
        for number, item in enumerate(contexts)
    )
    scp = dict.fromkeys(item.abstract_syntax for item in contexts if item.as_scp)
    return pdus.AssociateRQ(
        called_ae_title=destination.ae_title,
        calling_ae_title=calling_ae_title,
        contexts=proposed,
        user=pdus.UserInformation(
            maximum_length=MAX_PDU,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            roles=tuple(pdus.RoleSelection(sop_class_uid=uid, scu=False, scp=True) for uid in scp),
            identity=identity,
        ),
    )


def _agreed(request: pdus.AssociateRQ, answer: pdus.AssociateAC) -> dict[int, AgreedContext]:
    """What holds now: a context of ours, accepted, in a syntax we proposed (PS3.8 9.3.3.2); roles as in PS3.7 D.3.3.4.

    Without a role item of ours, or of the peer's, we ask and the peer answers.
    """
    asked = {item.context_id: item for item in request.contexts}
    ours = {role.sop_class_uid: role for role in request.user.roles}
    theirs = {role.sop_class_uid: role for role in answer.user.roles}
    agreed: dict[int, AgreedContext] = {}
    for context in answer.contexts:
        proposal = asked.get(context.context_id)
        if context.result or proposal is None or context.transfer_syntax not in proposal.transfer_syntaxes:
            continue
        mine, reply = ours.get(proposal.abstract_syntax), theirs.get(proposal.abstract_syntax)
        roles = (True, False)
        if mine is not None and reply is not None:
            roles = (mine.scu and reply.scu, mine.scp and reply.scp)
        if any(roles):
            agreed[context.context_id] = AgreedContext(
                context_id=context.context_id,
                abstract_syntax=proposal.abstract_syntax,
                transfer_syntax=context.transfer_syntax,
                we_ask=roles[0],
                peer_asks=roles[1],
            )
    return agreed
