"""The DICOM server of the node on pynetdicom's upper layer: connections in, associations negotiated, requests served.

Owns the accept loop, the negotiation (our own: policy, choice of transfer syntax, roles, extended negotiation) and
the record of associations. What is answered lies in `services`; how one request is carried in `pynetdicom_requests`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pynetdicom.ae import ApplicationEntity
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation, SOPClassExtendedNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicom_node.config import NodeConfig
from dicom_node.dimse.admission import Admission
from dicom_node.dimse.contexts import (
    ACCEPTED,
    FIND_SOP_CLASSES,
    GET_SOP_CLASSES,
    MOVE_SOP_CLASSES,
    TRANSFER_SYNTAXES_NOT_SUPPORTED,
    USER_REJECTION,
    Acceptance,
    Answer,
    Proposal,
    answer_contexts,
)
from dicom_node.dimse.observer import SilentObserver, WireObserver
from dicom_node.dimse.pynetdicom_link import FIRST_PDU_S, Link, quiet_libraries
from dicom_node.dimse.pynetdicom_request import Peer
from dicom_node.dimse.pynetdicom_requests import Requests
from dicom_node.dimse.pynetdicom_retrieval import Retrievals
from dicom_node.errors import NodeError
from dicom_node.interfaces import AssociationLog, InstanceIndex, InstanceSink
from dicom_node.model import AssociationEnd, Source
from dicom_node.services.find import FindOptions, FindService
from dicom_node.services.retrieve import RetrieveService
from dicom_node.services.store import StoreService

__all__ = ["PynetdicomServer"]

log = logging.getLogger(__name__)

BACKLOG = 128
TOUCH_S = 2.0
SPARE_CONNECTIONS = 64  # beyond `max_associations`: TCP connections that have not (yet) an association


class PynetdicomServer:
    """A DICOM SCP: C-ECHO, C-STORE, C-FIND, C-GET, C-MOVE.

    `sock` is a bound socket to listen on (from a supervisor); without it `start` binds `config.host` and
    `config.dicom_port`. Raises ConfigError for peers that cannot be understood.
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
    ) -> None:
        quiet_libraries()
        self._config = config
        self._admission = Admission(config)
        self._acceptance = Acceptance(
            extra_sop_classes=frozenset(config.extra_sop_classes), unknown_sop_classes=config.unknown_sop_classes
        )
        self._associations = associations
        self._observe = observe or SilentObserver()
        destinations = {item.ae_title: config.destination(name) for name, item in config.destinations.items()}
        self._requests = Requests(
            store=StoreService(sink),
            find=FindService(index, config.ae_titles[0], config.find),
            retrievals=Retrievals(
                RetrieveService(index, destinations, strict=config.find.strict), config.delivery, config.ae_titles[0]
            ),
            associations=associations,
            observe=self._observe,
        )
        self._entity = ApplicationEntity(ae_title=config.ae_titles[0])
        self._entity.acse_timeout = FIRST_PDU_S
        self._entity.network_timeout = config.association_idle_timeout_s
        self._listener = sock
        self._links: dict[Link, Peer | None] = {}
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- life

    def start(self) -> int:
        """Listen; the port that is really bound. Raises OSError when it cannot be bound."""
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
            self._listener = socket.create_server(
                (self._config.host, self._config.dicom_port), family=family, backlog=BACKLOG
            )
        else:
            self._listener.listen(BACKLOG)
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

    def _living(self) -> list[Link]:
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
            log.warning("too many connections")
            self._observe.association_rejected("limit")
            client.close()
            return
        config = self._config
        link = Link(
            self._entity,
            "acceptor",
            max_pdu=config.max_pdu_bytes,
            max_data_set_bytes=config.storage.max_object_bytes,
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
        link.on_associate, link.on_request, link.on_end = self._negotiate, self._serve, self._ended
        with self._guard:
            self._links[link] = None
        link.start()

    # --- negotiation

    def _negotiate(self, link: Link) -> None:
        """Accept or reject the A-ASSOCIATE-RQ that came."""
        request: Any = link.requestor.primitive
        calling, called = str(request.calling_ae_title).strip(), str(request.called_ae_title).strip()
        address = str(link.requestor.address)
        link.requestor.ae_title = calling
        link.log_fields = {
            "calling_ae_title": repr(calling),
            "called_ae_title": repr(called),
            "address": address,
        }
        rejection = self._admission.judge(
            calling=calling,
            called=called,
            address=address,
            application_context=str(request.application_context_name),
            established=self.active_associations,
        )
        if rejection is not None:
            log.warning("association rejected", extra={"reason": rejection.reason, **link.log_fields})
            self._observe.association_rejected(rejection.reason)
            link.acse.send_reject(rejection.result, rejection.source, rejection.diagnostic)
            link.is_rejected = True
            link.kill()
            return
        source = Source(
            calling_ae_title=calling, called_ae_title=called, address=address, association_id=uuid.uuid4().hex
        )
        proposals = _proposals(link, request)
        if not proposals or len({item.context_id for item in proposals}) != len(proposals):
            # PS3.8 9.3.1.3: an invalid PDU parameter value; which of two equal ids was accepted nobody could tell
            log.warning("association aborted", extra={"reason": "presentation contexts", **link.log_fields})
            self._observe.association_rejected("protocol")
            link.acse.send_ap_abort(0x06)
            link.kill()
            return
        self._accept(link, proposals, source)

    def _accept(self, link: Link, proposals: Sequence[Proposal], source: Source) -> None:
        answers = answer_contexts(proposals, self._acceptance)
        link._accepted_cx = {item.proposal.context_id: _context(item) for item in answers if item.result == ACCEPTED}
        link._rejected_cx = [_context(item) for item in answers if item.result != ACCEPTED]
        for answer in answers:
            if answer.result != ACCEPTED:
                self._refused(link, answer)
        roles = {a.proposal.abstract_syntax: a.role_reply for a in answers if a.role_reply is not None}
        for sop_class_uid, (scu, scp) in roles.items():
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid, role.scu_role, role.scp_role = sop_class_uid, scu, scp
            link.acceptor.add_negotiation_item(role)
        options = _extended_negotiation(link)
        link.network_timeout = self._admission.idle_timeout_s(source.calling_ae_title)
        with self._guard:
            self._links[link] = Peer(source=source, find_options=options)
        link.acse.send_accept()
        link.is_established = True
        log.info("association accepted", extra={"association": source.association_id, **link.log_fields})

    def _refused(self, link: Link, answer: Answer) -> None:
        kind = {TRANSFER_SYNTAXES_NOT_SUPPORTED: "transfer_syntax", USER_REJECTION: "role"}.get(
            answer.result, "abstract_syntax"
        )
        self._observe.context_refused(kind)
        log.warning(
            "presentation context refused",
            extra={
                "kind": kind,
                "sop_class": answer.proposal.abstract_syntax,
                "transfer_syntaxes": list(answer.proposal.transfer_syntaxes),
                **link.log_fields,
            },
        )

    # --- requests and the record of associations

    def _serve(self, link: Link, message: Any, context_id: int) -> None:
        with self._guard:
            peer = self._links.get(link)
        if peer is not None:
            self._requests.serve(link, peer, message, context_id)

    def _ended(self, link: Link) -> None:
        with self._guard:
            peer = self._links.pop(link, None)
        if peer is None:
            return
        # an association that the node closed because nothing was under way on it is no fault: its sender was through,
        # and only forgot to release it; a study must not wait for the sender to try again
        over = link.is_released or link.was_idle
        end = AssociationEnd.RELEASED if over else AssociationEnd.ABORTED
        if peer.recorded:
            self._record(lambda: self._associations.end_association(str(peer.source.association_id), end))
        log.info("association ended", extra={"association": peer.source.association_id, "result": end.value})
        self._observe.association_ended(peer.source.calling_ae_title, end.value)

    def _touch_loop(self) -> None:
        """Tell completion every two seconds which feeding associations had traffic, also in the middle of an object."""
        while not self._stopping.wait(TOUCH_S):
            with self._guard:
                links = [(link, peer) for link, peer in self._links.items() if peer is not None and peer.recorded]
            active: list[str] = []
            for link, peer in links:
                if link.traffic:
                    link.traffic = False
                    active.append(str(peer.source.association_id))
            if active:
                self._record(lambda ids=tuple(active): self._associations.touch_associations(ids))

    @staticmethod
    def _record(write: Any) -> None:
        try:
            write()
        except NodeError:
            # completion then waits longer than it had to: no instance depends on it
            log.exception("association could not be recorded")


def _proposals(link: Link, request: Any) -> Sequence[Proposal]:
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


def _extended_negotiation(link: Link) -> dict[str, FindOptions]:
    """Answer SOP class extended negotiation of queries and retrievals: what is asked for and there, nothing else.

    PS3.4 C.5.1.1.1 (find: relational, combined date-time, fuzzy names, time zone ...) and C.5.2.1.1, C.5.3.1.1
    (relational retrieval ...). Fuzzy semantic matching and time zone adjustment are not there.
    """
    options: dict[str, FindOptions] = {}
    for uid, asked in link.requestor.sop_class_extended.items():
        sop_class_uid = str(uid)
        if sop_class_uid not in FIND_SOP_CLASSES | MOVE_SOP_CLASSES | GET_SOP_CLASSES or not asked:
            continue
        relational = asked[0] == 1
        combined = sop_class_uid in FIND_SOP_CLASSES and len(asked) > 1 and asked[1] == 1
        reply = bytearray(len(asked))
        reply[0] = relational
        if combined:
            reply[1] = 1
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid, item.service_class_application_information = uid, bytes(reply)
        link.acceptor.add_negotiation_item(item)
        options[sop_class_uid] = FindOptions(relational=relational, datetime=combined)
    return options
