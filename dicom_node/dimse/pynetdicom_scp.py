"""The DICOM server of the node on pynetdicom's upper layer: connections in, associations negotiated, requests served.

Owns the accept loop and the negotiation (our own: policy, choice of transfer syntax, roles, extended negotiation);
everything else is shared with the node's own wire, see `serving` and `requests`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from pynetdicom.ae import ApplicationEntity
from pynetdicom.pdu_primitives import (
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.audited import ReceivedStudies
from dicom_node.auditing import AuditTrail
from dicom_node.config import NodeConfig
from dicom_node.dimse.admission import Rejection
from dicom_node.dimse.contexts import ACCEPTED, Answer, Proposal, answer_contexts
from dicom_node.dimse.link import Message, Patience
from dicom_node.dimse.negotiation import extended_answer
from dicom_node.dimse.observer import WireObserver
from dicom_node.dimse.policy import Policy
from dicom_node.dimse.pynetdicom_link import PynetdicomLink, name_implementation, quiet_libraries
from dicom_node.dimse.pynetdicom_requestor import open_link
from dicom_node.dimse.request import Peer
from dicom_node.dimse.serving import TOUCH_S, Alone, Neighbours, Serving, listening, most_read
from dicom_node.dimse.upper_layer.pdus import UserIdentity
from dicom_node.errors import ConfigError
from dicom_node.interfaces import AssociationLog, Commitments, InstanceIndex, InstanceSink
from dicom_node.services.find import FindOptions

__all__ = ["PynetdicomServer"]

log = logging.getLogger(__name__)

BACKLOG = 128
MOST_ASSOCIATIONS = 100  # each has two threads that look around every millisecond
SPARE_CONNECTIONS = 64  # beyond `max_associations`: TCP connections that have not (yet) an association


class PynetdicomServer:
    """A DICOM SCP: C-ECHO, C-STORE, C-FIND, C-GET, C-MOVE, storage commitment.

    `sock` is a bound socket to listen on (from a supervisor); without it `start` binds `config.host` and
    `config.dicom_port`. `neighbours` are other processes that listen on it too: `max_associations` holds for all of
    them together. Without `commitments` there is no storage commitment. Raises ConfigError for peers that cannot be
    understood, and for TLS, which is not spoken here.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        sink: InstanceSink,
        index: InstanceIndex,
        associations: AssociationLog,
        observe: WireObserver | None = None,
        sock: socket.socket | None = None,
        neighbours: Neighbours | None = None,
        tls_sock: socket.socket | None = None,
        commitments: Commitments | None = None,
        audit: AuditTrail | None = None,
        received: ReceivedStudies | None = None,
    ) -> None:
        if config.tls is not None or tls_sock is not None:
            raise ConfigError("tls: pynetdicom's wire carries no TLS; set `wire: own`")
        quiet_libraries()
        most = min(config.max_associations, MOST_ASSOCIATIONS)
        config = config.model_copy(update={"max_associations": most})
        self._config = config
        self._neighbours = neighbours or Alone()
        self._serving = Serving(
            config,
            sink=sink,
            index=index,
            associations=associations,
            observe=observe,
            open_link=open_link,
            neighbours=self._neighbours,
            commitments=commitments,
            audit=audit,
            received=received,
        )
        self._entity = ApplicationEntity(ae_title=config.ae_titles[0])
        name_implementation(self._entity)
        self._entity.acse_timeout = config.bounds.first_pdu_s
        self._entity.network_timeout = config.association_idle_timeout_s
        self._listener = sock
        self._links: dict[PynetdicomLink, Peer | None] = {}
        self._policies: dict[PynetdicomLink, Policy] = {}  # of those that were admitted
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- life

    def start(self) -> int:
        """Listen; the port that is really bound. Raises OSError when it cannot be bound."""
        self._listener = listening(self._listener, self._config, BACKLOG)
        self._listener.settimeout(0.2)
        for target, name in ((self._accept_loop, "dicom-accept"), (self._touch_loop, "dicom-touch")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return int(self._listener.getsockname()[1])

    def stop(self, timeout: float = 10.0) -> None:
        """Take no more connections, let requests under way finish within `timeout` seconds, abort what is left."""
        deadline = time.monotonic() + timeout
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=TOUCH_S + 1.0)
        if self._listener is not None:
            self._listener.close()
        while (links := self._living()) and time.monotonic() < deadline:
            for link in links:
                if link.is_established and not link.serving:
                    link.abort(block=False)
            time.sleep(0.02)
        for link in self._living():
            link._kill = True
            link.close_socket()
        for link in self._living():
            link.join(timeout=2.0)

    @property
    def active_associations(self) -> int:
        """Associations established now."""
        return sum(link.is_established for link in self._living())

    @property
    def certificate_ends(self) -> float:
        """0: there is no TLS here."""
        return 0.0

    def _living(self) -> list[PynetdicomLink]:
        with self._guard:
            return list(self._links)

    def _accept_loop(self) -> None:
        assert self._listener is not None
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if not self._stopping.is_set():
                    log.exception("connection could not be accepted")
                    time.sleep(0.2)  # out of descriptors: give the others time to close
                continue
            try:
                self._admit_connection(client)
            except (OSError, RuntimeError):
                log.exception("connection could not be served")
                client.close()

    def _admit_connection(self, client: socket.socket) -> None:
        if len(self._living()) >= self._config.max_associations + SPARE_CONNECTIONS:
            address = str(client.getpeername()[0])
            log.warning("too many connections", extra={"address": address})
            self._serving.observe.association_rejected("limit")
            self._serving.alert("association rejected: limit", address=address)
            client.close()
            return
        config = self._config
        link = PynetdicomLink(
            self._entity,
            "acceptor",
            max_pdu=config.max_pdu_bytes,
            max_data_set_bytes=most_read(config),
            max_kept_bytes=config.storage.max_object_bytes,
            patience=Patience(config.bounds.first_pdu_s, config.bounds.pdu_s, config.bounds.send_s),
        )
        link.name = "dicom-association"
        link.spool_folder = config.data_dir if config.data_dir.is_dir() else None
        link.use_socket(client=client)
        link.acceptor.ae_title = config.ae_titles[0]
        link.acceptor.maximum_length = config.max_pdu_bytes
        link.acceptor.address_info = AddressInformation.from_tuple(client.getsockname())
        link.acceptor.implementation_class_uid = self._entity.implementation_class_uid
        link.acceptor.implementation_version_name = self._entity.implementation_version_name
        link.requestor.address_info = AddressInformation.from_tuple(client.getpeername())
        link.log_fields = {"address": str(link.requestor.address)}
        link.on_associate, link.on_request, link.on_end = self._negotiate, self._serve, self._ended
        with self._guard:
            self._links[link] = None
        link.start()

    # --- negotiation

    def _negotiate(self, link: PynetdicomLink) -> None:
        """Accept or reject the A-ASSOCIATE-RQ that came."""
        request: Any = link.requestor.primitive
        calling, called = str(request.calling_ae_title).strip(), str(request.called_ae_title).strip()
        address = str(link.requestor.address)
        link.requestor.ae_title = calling
        fields = {"calling_ae_title": repr(calling), "called_ae_title": repr(called), "address": address}
        link.log_fields = fields
        mine = self.active_associations
        established = mine + self._neighbours.established(mine + 1)
        rejection = self._serving.judge(
            fields,
            calling=calling,
            called=called,
            address=address,
            application_context=str(request.application_context_name),
            established=established,
            of_peer=self._of_peer,
        )
        if rejection is not None:
            self._reject(link, rejection)
            return
        policy = self._serving.policy(calling, address)
        with self._guard:
            self._policies[link] = policy
        identified = self._serving.identify(
            fields, _identity(link), policy, calling=calling, address=address, encrypted=False
        )
        if isinstance(identified, Rejection):
            self._reject(link, identified)
            return
        if identified.response is not None:
            item = UserIdentityNegotiation()
            item.server_response = identified.response
            link.acceptor.add_negotiation_item(item)
        proposals = _proposals(link, request)
        if not proposals or len({item.context_id for item in proposals}) != len(proposals):
            self._serving.unanswerable(fields)
            link.acse.send_ap_abort(0x06)
            link.kill()
            return
        answers = answer_contexts(proposals, self._serving.acceptance_for(calling, policy))
        peer = self._serving.accepted(
            fields,
            calling=calling,
            called=called,
            address=address,
            refused=[item for item in answers if item.result != ACCEPTED],
            find_options=_extended_negotiation(link),
            policy=policy,
            user=identified.user,
        )
        link.network_timeout = policy.idle_timeout_s
        self._serving.begun(fields, peer)
        self._accept(link, answers, peer)

    def _reject(self, link: PynetdicomLink, rejection: Rejection) -> None:
        self._forget(link)
        link.acse.send_reject(rejection.result, rejection.source, rejection.diagnostic)
        link.is_rejected = True
        link.kill()

    def _of_peer(self, policy: Policy) -> int:
        """How many associations a peer has, here and elsewhere, told as if there were one more."""
        mine = self._mine(policy)
        return mine + self._neighbours.of_peer(policy.number, mine + 1)

    def _mine(self, policy: Policy) -> int:
        with self._guard:
            return sum(other.number == policy.number for other in self._policies.values())

    def _forget(self, link: PynetdicomLink) -> None:
        """It counts no more."""
        with self._guard:
            policy = self._policies.pop(link, None)
        self._neighbours.established(self.active_associations)
        if policy is not None and policy.max_associations is not None:
            self._neighbours.of_peer(policy.number, self._mine(policy))

    def _accept(self, link: PynetdicomLink, answers: list[Answer], peer: Peer) -> None:
        link._accepted_cx = {item.proposal.context_id: _context(item) for item in answers if item.result == ACCEPTED}
        link._rejected_cx = [_context(item) for item in answers if item.result != ACCEPTED]
        # pynetdicom cannot encode the reply "neither role"; the context is refused, which says the same
        roles = {a.proposal.abstract_syntax: a.role_reply for a in answers if a.role_reply and any(a.role_reply)}
        for sop_class_uid, (scu, scp) in roles.items():
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid, role.scu_role, role.scp_role = sop_class_uid, scu, scp
            link.acceptor.add_negotiation_item(role)
        with self._guard:
            self._links[link] = peer
        link.acse.send_accept()
        link.is_established = True

    # --- requests and the record of associations

    def _serve(self, link: PynetdicomLink, message: Message) -> None:
        with self._guard:
            peer = self._links.get(link)
        if peer is None:
            return
        self._serving.serve(link, peer, message)
        while not self._stopping.is_set() and (left := link.not_before - time.monotonic()) > 0.0:
            time.sleep(min(left, 0.25))  # it is faster than it may be

    def _ended(self, link: PynetdicomLink) -> None:
        with self._guard:
            peer = self._links.pop(link, None)
        self._forget(link)
        if link.violation:
            self._serving.violated(peer, str(link.requestor.address), link.violation)
        if peer is not None:
            # a release over a message that is not whole, or not answered, leaves its sender something to do
            self._serving.ended(peer, over=link.was_idle or (link.is_released and link.messages.idle))

    def _touch_loop(self) -> None:
        while not self._stopping.wait(TOUCH_S):
            active: list[Peer] = []
            with self._guard:
                for link, peer in self._links.items():
                    if peer is not None and link.traffic:
                        link.traffic = False
                        active.append(peer)
            self._serving.touched(active)


def _identity(link: PynetdicomLink) -> UserIdentity | None:
    found: Any = link.requestor.user_identity
    if found is None:
        return None
    return UserIdentity(
        kind=found.user_identity_type or 0,
        primary=found.primary_field or b"",
        secondary=found.secondary_field or b"",
        response_requested=bool(found.positive_response_requested),
    )


def _proposals(link: PynetdicomLink, request: Any) -> list[Proposal]:
    roles = {str(uid): item for uid, item in link.requestor.role_selection.items()}
    proposals = []
    for context in request.presentation_context_definition_list:
        role = roles.get(str(context.abstract_syntax))
        proposals.append(
            Proposal(
                context_id=context.context_id,
                abstract_syntax=str(context.abstract_syntax),
                transfer_syntaxes=tuple(str(syntax) for syntax in context.transfer_syntax),
                scu=bool(role.scu_role) if role is not None else None,
                scp=bool(role.scp_role) if role is not None else None,
            )
        )
    return proposals


def _context(answer: Answer) -> PresentationContext:
    context = PresentationContext()
    context.context_id = answer.proposal.context_id
    context.abstract_syntax = answer.proposal.abstract_syntax
    context.result = answer.result
    with suppress(ValueError):  # the syntax of a refused context is not significant (PS3.8 9.3.3.2)
        context.transfer_syntax = [answer.transfer_syntax]
    # in pynetdicom these say what the acceptor may be
    context._as_scp, context._as_scu = answer.requestor_scu, answer.requestor_scp
    return context


def _extended_negotiation(link: PynetdicomLink) -> dict[str, FindOptions]:
    """Answer SOP class extended negotiation; what was agreed by SOP class."""
    options: dict[str, FindOptions] = {}
    for uid, asked in link.requestor.sop_class_extended.items():
        answered = extended_answer(str(uid), asked)
        if answered is None:
            continue
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid, item.service_class_application_information = uid, answered[0]
        link.acceptor.add_negotiation_item(item)
        options[str(uid)] = answered[1]
    return options
