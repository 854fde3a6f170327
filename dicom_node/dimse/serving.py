"""What both wires share of serving: policy, services, and the record of associations."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from dicom_node.audited import ReceivedStudies
from dicom_node.auditing import AlertType, AuditEvent, AuditKind, AuditOutcome, AuditTrail, NoAuditTrail, Participant
from dicom_node.config import NodeConfig
from dicom_node.dimse.admission import Admission, Rejection
from dicom_node.dimse.commitment import CommitmentService
from dicom_node.dimse.contexts import Acceptance, Answer
from dicom_node.dimse.identification import Identification, Identified
from dicom_node.dimse.link import Link, Message
from dicom_node.dimse.negotiation import refusal_kind
from dicom_node.dimse.observer import SilentObserver, WireObserver
from dicom_node.dimse.policy import EVERYDAY_SERVICES, Policy
from dicom_node.dimse.rates import Moment, moments
from dicom_node.dimse.request import Peer
from dicom_node.dimse.requests import Requests
from dicom_node.dimse.retrieval import Retrievals
from dicom_node.dimse.session import OpenLink
from dicom_node.dimse.upper_layer.pdus import UserIdentity
from dicom_node.interfaces import AssociationLog, Commitments, InstanceIndex, InstanceSink
from dicom_node.model import AssociationEnd, Source
from dicom_node.services.find import FindOptions, FindService
from dicom_node.services.retrieve import RetrieveService
from dicom_node.services.store import StoreService

__all__ = ["TOUCH_S", "Alone", "Neighbours", "Serving", "listening", "most_read"]

log = logging.getLogger(__name__)

TOUCH_S = 2.0


def listening(
    sock: socket.socket | None, config: NodeConfig, backlog: int, *, port: int | None = None
) -> socket.socket:
    """`sock`, already bound, or a new one on the configured address and `port` (None: the DICOM port), listening.

    Raises OSError when it cannot be.
    """
    if sock is not None:
        sock.listen(backlog)
        return sock
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server(
        (config.host, config.dicom_port if port is None else port), family=family, backlog=backlog
    )


def most_read(config: NodeConfig) -> int:
    """Bytes of one data set that are read at all: what is larger than it may be is read on and forgotten.

    Else its sender would lose the association, with objects that are well on it, and never hear why.
    """
    return 2 * config.storage.max_object_bytes


class Neighbours(Protocol):
    """Other receiver processes at the same listening socket. Nothing here waits for them: they may be stuck."""

    def established(self, mine: int) -> int:
        """Tell them how many associations this process has, or is about to have; how many they have together."""
        ...

    def of_peer(self, number: int, mine: int) -> int:
        """As `established`, of the peer with that number (`policy.Policy.number`) alone."""
        ...

    def paid(self, number: int) -> Sequence[Moment]:
        """What that peer's `rates.Rates` are kept in, the same for all of them."""
        ...

    def is_busier(self, connections: int) -> bool:
        """Tell them how many connections this process has in hand; whether one of them has fewer."""
        ...


class Alone:
    """No other process takes connections from this socket (`Neighbours`)."""

    def established(self, mine: int) -> int:
        """None."""
        return 0

    def of_peer(self, number: int, mine: int) -> int:
        """None."""
        return 0

    def paid(self, number: int) -> Sequence[Moment]:
        """Nobody else's."""
        return moments()

    def is_busier(self, connections: int) -> bool:
        """No."""
        return False


class Serving:
    """Policy, services and record of one node. Raises ConfigError for peers that cannot be understood."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        sink: InstanceSink,
        index: InstanceIndex,
        associations: AssociationLog,
        observe: WireObserver | None,
        open_link: OpenLink,
        neighbours: Neighbours,
        commitments: Commitments | None = None,
        audit: AuditTrail | None = None,
        received: ReceivedStudies | None = None,
    ) -> None:
        """`received` is told of associations that end; whoever keeps objects tells it of those."""
        self.config = config
        self.observe = observe or SilentObserver()
        self._audit = audit or NoAuditTrail()
        self._received = received
        self.acceptance = Acceptance(
            extra_sop_classes=frozenset(config.extra_sop_classes), unknown_sop_classes=config.unknown_sop_classes
        )
        self._commitment = CommitmentService(config, commitments)
        self._admission = Admission(config, neighbours.paid)
        self._identification = Identification(config.user_identity, self._audit)
        self._associations = associations
        destinations = {item.ae_title: config.destination(name) for name, item in config.destinations.items()}
        retrieve = RetrieveService(index, destinations, strict=config.find.strict)
        self._requests = Requests(
            store=StoreService(sink),
            find=FindService(index, config.ae_titles[0], config.find),
            retrievals=Retrievals(retrieve, config.delivery, config.ae_titles[0], open_link, self._audit),
            commitment=self._commitment,
            associations=associations,
            observe=self.observe,
            max_objects=config.bounds.objects_per_association,
            audit=self._audit,
            refused=received.refused if received is not None else lambda source: None,
        )

    # --- negotiation

    def policy(self, calling: str, address: str) -> Policy:
        """What that peer may do."""
        return self._admission.policy(calling, address)

    def acceptance_for(self, calling: str, policy: Policy) -> Acceptance:
        """What is accepted of that peer."""
        return replace(
            self.acceptance,
            commits=self._commitment.may_ask(calling),
            is_told=self._commitment.may_report(calling),
            services=None if policy.services >= EVERYDAY_SERVICES else policy.services,
            sop_classes=policy.sop_classes,
        )

    def judge(
        self,
        fields: Mapping[str, str],
        *,
        calling: str,
        called: str,
        address: str,
        application_context: str,
        established: int,
        certificate: str = "",
        of_peer: Callable[[Policy], int] = lambda policy: 0,
    ) -> Rejection | None:
        """None when the association may be had; `fields` for the log. The others: see `Admission.judge`."""
        rejection = self._admission.judge(
            calling=calling,
            called=called,
            address=address,
            application_context=application_context,
            established=established,
            certificate=certificate,
            of_peer=of_peer,
        )
        if rejection is not None:
            log.warning("association rejected", extra={"reason": rejection.reason, **fields})
            self.observe.association_rejected(rejection.reason)
            self.alert(f"association rejected: {rejection.reason}", address=address, calling=calling, called=called)
        return rejection

    def identify(
        self,
        fields: Mapping[str, str],
        identity: UserIdentity | None,
        policy: Policy,
        *,
        calling: str,
        address: str,
        encrypted: bool,
    ) -> Identified | Rejection:
        """For whom an association that was admitted is; may take as long as a passcode takes to check."""
        found = self._identification.judge(identity, policy, calling=calling, address=address, encrypted=encrypted)
        if isinstance(found, Identified):
            return found
        reason = found.rejection.reason
        log.warning("association rejected", extra={"reason": reason, "why": found.why, **fields})
        self.observe.association_rejected(reason)
        return found.rejection

    def unanswerable(self, fields: Mapping[str, str]) -> None:
        """Presentation contexts that cannot be told apart (PS3.8 9.3.1.3: an invalid PDU parameter value)."""
        log.warning("association aborted", extra={"reason": "presentation contexts", **fields})
        self.observe.association_rejected("protocol")
        self.alert("association aborted: presentation contexts", address=fields.get("address", ""))

    def alert(self, why: str, *, address: str, calling: str = "", called: str = "", user: str = "") -> None:
        """Tell the audit trail of somebody who was not let in, or was thrown out; `why` in constant words."""
        self._audit.record(
            AuditEvent(
                kind=AuditKind.SECURITY_ALERT,
                outcome=AuditOutcome.MINOR_FAILURE,
                participants=(
                    Participant(ae_title=calling, host=address, user=user, is_requestor=True),
                    Participant(ae_title=called or self.config.ae_titles[0], is_this_node=True),
                ),
                detail=why,
            )
        )

    def recertified(self, where: str) -> None:
        """Changed TLS files are in force."""
        self._audit.record(
            AuditEvent(
                kind=AuditKind.CONFIGURATION_CHANGED,
                detail=f"changed TLS files are in force: {where}",
                alert_type=AlertType.SECURITY_CONFIGURATION,
            )
        )

    def violated(self, peer: Peer | None, address: str, why: str) -> None:
        """An association was aborted for what its peer did."""
        who: dict[str, str] = {}
        if peer is not None:
            source = peer.source
            who = {"calling": source.calling_ae_title, "called": source.called_ae_title, "user": peer.user}
        self.alert(f"association aborted: {why}", address=address, **who)

    def accepted(
        self,
        fields: Mapping[str, str],
        *,
        calling: str,
        called: str,
        address: str,
        refused: Sequence[Answer],
        find_options: Mapping[str, FindOptions],
        policy: Policy,
        user: str = "",
    ) -> Peer:
        """An association begins, as `begun` says once the peer knows; `user` is whom it was proved to be for."""
        for answer in refused:
            kind = refusal_kind(answer)
            self.observe.context_refused(kind)
            log.warning(
                "presentation context refused",
                extra={
                    "kind": kind,
                    "sop_class": answer.proposal.abstract_syntax,
                    "transfer_syntaxes": list(answer.proposal.transfer_syntaxes),
                    **fields,
                },
            )
        source = Source(
            calling_ae_title=calling, called_ae_title=called, address=address, association_id=os.urandom(16).hex()
        )
        if user and self._received is not None:
            self._received.identified(source, user)
        return Peer(source=source, find_options=find_options, policy=None if policy.is_open else policy, user=user)

    def begun(self, fields: Mapping[str, str], peer: Peer) -> None:
        """The peer was told, or is about to be: its next step and the line about this one may cross."""
        log.info("association accepted", extra={"association": peer.source.association_id, **fields})

    # --- requests and the record of associations

    def serve(self, link: Link, peer: Peer, message: Message) -> None:
        """Answer one request."""
        self._requests.serve(link, peer, message)

    def ended(self, peer: Peer, *, over: bool) -> None:
        """An association ended; `over`: its sender was through.

        An association that the node closed because nothing was under way on it is no fault: its sender only forgot to
        release it, and a study must not wait for the sender to try again.
        """
        end = AssociationEnd.RELEASED if over else AssociationEnd.ABORTED
        if peer.recorded:
            _record(lambda: self._associations.end_association(str(peer.source.association_id), end))
        if self._received is not None:
            self._received.ended(peer.source, over=over)
        log.info("association ended", extra={"association": peer.source.association_id, "result": end.value})
        self.observe.association_ended(peer.source.calling_ae_title, end.value)

    def touched(self, peers: Sequence[Peer]) -> None:
        """These had traffic, also in the middle of an object: told every `TOUCH_S` to whoever waits for quiet."""
        active = [str(peer.source.association_id) for peer in peers if peer.recorded]
        if active:
            _record(lambda: self._associations.touch_associations(active))


def _record(write: Callable[[], object]) -> None:
    try:
        write()
    except Exception:  # the SCP edge: completion waits longer than it had to, and the next one is recorded again
        log.exception("association could not be recorded")
