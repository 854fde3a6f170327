"""An association that the node asks for, on pynetdicom's upper layer."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from pynetdicom.ae import ApplicationEntity
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation, UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.config import DeliverySettings
from dicom_node.dimse.contexts import ProposedContext
from dicom_node.dimse.credentials import NAME_AND_PASSCODE, identity_of
from dicom_node.dimse.pynetdicom_link import PynetdicomLink, name_implementation, quiet_libraries
from dicom_node.errors import DeliveryRefused, DeliveryUnavailable
from dicom_node.model import Destination

__all__ = ["open_link"]

MAX_PDU = 131_072


def open_link(
    destination: Destination,
    contexts: Sequence[ProposedContext],
    *,
    calling_ae_title: str,
    settings: DeliverySettings,
    max_data_set_bytes: int,
) -> PynetdicomLink:
    """See `session.OpenLink`. TLS is not spoken here."""
    if destination.tls is not None:
        raise DeliveryRefused(f"destination {destination.name}: pynetdicom's wire carries no TLS; set `wire: own`")
    identity = identity_of(destination)
    quiet_libraries()
    entity = ApplicationEntity(ae_title=calling_ae_title)
    name_implementation(entity)
    entity.connection_timeout = settings.connect_timeout_s
    entity.acse_timeout = settings.response_timeout_s
    entity.dimse_timeout = settings.response_timeout_s
    entity.network_timeout = None
    link = PynetdicomLink(entity, "requestor", max_pdu=MAX_PDU, max_data_set_bytes=max_data_set_bytes)
    _prepare(link, entity, destination, contexts)
    if identity is not None:
        item = UserIdentityNegotiation()
        item.user_identity_type, item.positive_response_requested = identity.kind, False
        item.primary_field = identity.primary
        if identity.kind == NAME_AND_PASSCODE:
            item.secondary_field = identity.secondary
        link.requestor.add_negotiation_item(item)
    link.request()
    link._is_paused = True  # no reactor thread: this thread reads the answers itself
    if link.is_established:
        return link
    reply = link.acceptor.primitive
    link.close_socket()
    if link.is_rejected and reply is not None:
        reason = f"rejected ({reply.result},{reply.result_source},{reply.diagnostic})"
        kind = DeliveryRefused if reply.result == 0x01 else DeliveryUnavailable
        raise kind(f"destination {destination.name}: association {reason}")
    if reply is not None and reply.result == 0x00:
        return link  # accepted without one context: `contexts` is empty, each object fails by itself
    raise DeliveryUnavailable(f"destination {destination.name}: no association")


def _prepare(
    link: PynetdicomLink, entity: ApplicationEntity, destination: Destination, contexts: Sequence[ProposedContext]
) -> None:
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


def _context(number: int, item: ProposedContext) -> PresentationContext:
    context = PresentationContext()
    context.context_id = 2 * number + 1
    context.abstract_syntax = item.abstract_syntax
    context.transfer_syntax = list(item.transfer_syntaxes)
    return context
