"""The DICOM server of the node on the upper layer of its own: connections in, associations negotiated, requests served.

Whoever has nothing to say waits in the lobby without a thread: a connection that has not asked for an association,
an association between two messages, one that is over and not closed by its peer. A thread serves what speaks.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial

from dicom_node.audited import ReceivedStudies
from dicom_node.auditing import AuditTrail
from dicom_node.config import NodeConfig
from dicom_node.dimse.admission import Rejection
from dicom_node.dimse.association import Association
from dicom_node.dimse.link import AssociationLost, Patience
from dicom_node.dimse.lobby import Lobby, Visit
from dicom_node.dimse.negotiation import Agreement, answer_request
from dicom_node.dimse.observer import WireObserver
from dicom_node.dimse.policy import Policy
from dicom_node.dimse.request import Peer
from dicom_node.dimse.requestor import open_link
from dicom_node.dimse.serving import TOUCH_S, Alone, Neighbours, Serving, listening, most_read
from dicom_node.dimse.tls import failure, fingerprint, for_listener
from dicom_node.dimse.tls_stream import TlsStream
from dicom_node.dimse.transport import Buffers, prepare
from dicom_node.dimse.upper_layer.connection import AssociationRequested, Connection, Limits, Side
from dicom_node.dimse.upper_layer.pdus import AssociateRJ, AssociateRQ, encode_pdu
from dicom_node.interfaces import AssociationLog, Commitments, InstanceIndex, InstanceSink

__all__ = ["DicomServer"]

log = logging.getLogger(__name__)

BACKLOG = 512
MOST_BUSY = 256  # associations that are served at the same moment; others wait for their turn, or come again
SPARE_THREADS = 16  # beyond those: for requests that are rejected
PATIENCE_S = 0.5  # how long a thread waits with its association for the next message ...
HURRIED_S = 0.005  # ... and how long when many are at work
LINGER_S = 1.0  # how long a peer may take to close what is over
MAX_REQUEST = 256 * 1024
MAX_AGREEMENTS = 128


class DicomServer:
    """A DICOM SCP: C-ECHO, C-STORE, C-FIND, C-GET, C-MOVE, storage commitment.

    `sock` is a bound socket to listen on (from a supervisor); without it `start` binds `config.host` and
    `config.dicom_port`. `neighbours` are other processes that listen on it too: `max_associations` holds for all of
    them together. `tls_sock` is such a socket for `config.tls.port`, where TLS has a port of its own. Without
    `commitments` there is no storage commitment. Raises ConfigError for peers that cannot be understood, and for
    certificates and keys that cannot be used.
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
        self._config = config
        self._tls = for_listener(config.tls) if config.tls is not None else None
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
        self._patience = Patience(config.bounds.first_pdu_s, config.bounds.pdu_s, config.bounds.send_s)
        if self._tls is not None:
            self._tls.told = self._serving.recertified
        self._listener, self._tls_listener = sock, tls_sock
        self._buffers = Buffers()
        self._links: dict[Association, Peer | None] = {}
        self._admitted: dict[Association, Policy] = {}
        self._of_peers: Counter[int] = Counter()  # of those with a limit of their own
        self._agreements: dict[tuple[int, AssociateRQ], Agreement] = {}
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._touching = threading.Thread(target=self._touch_loop, name="dicom-touch", daemon=True)
        self._lobby = Lobby(
            serve=self._serve,
            turn_away=self._turn_away,
            drop=self._drop,
            is_busier=self._neighbours.is_busier,
            most=min(config.max_associations, MOST_BUSY) + SPARE_THREADS,
            most_silent=config.bounds.silent_connections,
            first_pdu_s=self._patience.first_pdu_s,
        )

    # --- life

    def start(self) -> int:
        """Listen; the port that is really bound. Raises OSError when it cannot be bound."""
        self._listener = listening(self._listener, self._config, BACKLOG)
        if self._config.tls is not None and (port := self._config.tls.port) is not None:
            self._tls_listener = listening(self._tls_listener, self._config, BACKLOG, port=port)
        for listener in (self._listener, self._tls_listener):
            if listener is not None:
                listener.setblocking(False)
                prepare(listener, self._patience.send_s)
        if self._tls is not None and self._tls_listener is None:
            self._lobby.open(None, self._listener)
        else:
            self._lobby.open(self._listener, self._tls_listener)
        self._touching.start()
        return int(self._listener.getsockname()[1])

    def stop(self, timeout: float = 10.0) -> None:
        """Take no more connections, let requests under way finish within `timeout` seconds, abort what is left."""
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._lobby.close_door()
        for listener in (self._listener, self._tls_listener):
            if listener is not None:
                listener.close()
        if self._touching.is_alive():
            self._touching.join(timeout=TOUCH_S + 1.0)
        while (living := self._living()) and time.monotonic() < deadline:
            for association in living:
                if not association.serving:
                    association.interrupt()
            time.sleep(0.02)
        for association in self._living():
            association.interrupt()
        while self._lobby.silent and time.monotonic() < deadline:  # they may still read how it ended
            time.sleep(0.02)
        self._lobby.stop()

    @property
    def active_associations(self) -> int:
        """Associations established now."""
        return len(self._admitted)

    @property
    def tls_port(self) -> int:
        """Where TLS is spoken, once started; 0: nowhere."""
        if self._tls is None:
            return 0
        listener = self._tls_listener or self._listener
        return int(listener.getsockname()[1]) if listener is not None else 0

    @property
    def certificate_ends(self) -> float:
        """When the certificate in force ends, seconds since the epoch; 0: there is none."""
        return self._tls.not_after if self._tls is not None else 0.0

    def _living(self) -> list[Association]:
        with self._guard:
            return list(self._links)

    def _touch_loop(self) -> None:
        while not self._stopping.wait(TOUCH_S):
            active: list[Peer] = []
            with self._guard:
                for association, peer in self._links.items():
                    if peer is not None and association.traffic:
                        association.traffic = False
                        active.append(peer)
            self._serving.touched(active)
            if self._tls is not None:
                self._tls.look()

    # --- one connection, on a thread of the lobby

    def _serve(self, visit: Visit) -> None:
        """What there is to do for it now. Then it goes back to the lobby, or is closed."""
        if visit.association is None:
            if self._stopping.is_set() or not visit.deadline:
                if visit.stream is not None and not visit.deadline:
                    self._untrusted(visit, "the handshake, or the first request, did not come to its end")
                with visit.sock, suppress(OSError):
                    visit.sock.recv(MAX_REQUEST, socket.MSG_DONTWAIT)  # closing over unread bytes would be a reset
                return
            if visit.over_tls and not self._is_shaken(visit):
                return
            visit.association = self._meet(visit)
        association = visit.association
        if association.over:
            self._see_off(visit, association)
            return
        stays = False
        try:
            stays = self._go_on(visit, association)
        except AssociationLost:
            pass
        finally:
            if not stays:
                self._leave(visit, association)
        if stays:
            association.rest()
            if association.not_before and not self._stopping.is_set():  # it is faster than it may be
                self._lobby.keep(visit, association.not_before, heard=False)
                return
            asked_until = visit.since + self._patience.first_pdu_s
            self._lobby.keep(visit, asked_until if visit.peer is None else association.idle_until)

    def _is_shaken(self, visit: Visit) -> bool:
        """Go on with its handshake as far as the peer has; no thread waits for it. When it fails it is closed."""
        assert self._tls is not None
        stream = visit.stream = visit.stream or TlsStream(visit.sock, self._tls.context, send_s=self._patience.send_s)
        try:
            if stream.shake():
                return True
        except OSError as exc:
            if stream.has_begun:  # who only looks whether the port is open is not worth a line
                self._untrusted(visit, failure(exc))
            with visit.sock, suppress(OSError):
                visit.sock.shutdown(socket.SHUT_WR)
            return False
        self._lobby.keep(visit, visit.since + self._patience.first_pdu_s)
        return False

    def _untrusted(self, visit: Visit, reason: str) -> None:
        log.warning("TLS failed", extra={"reason": reason, "address": visit.address})
        self._serving.observe.association_rejected("tls")
        self._serving.alert(f"TLS failed: {reason}", address=visit.address)

    def _go_on(self, visit: Visit, association: Association) -> bool:
        """Serve it as long as it has something to say; False when it is to be ended. Raises AssociationLost."""
        association.wake()
        if visit.peer is None and not self._greet(visit, association):
            return bool(visit.deadline) and not self._stopping.is_set()
        if visit.peer is None or self._stopping.is_set():  # `stop` may have looked before it was there
            return False
        return association.serve(partial(self._serving.serve, association, visit.peer), self._patience_s)

    def _patience_s(self) -> float:
        return HURRIED_S if self._lobby.is_crowded else PATIENCE_S

    def _meet(self, visit: Visit) -> Association:
        config = self._config
        association = Association(
            visit.stream or visit.sock,
            Connection(Side.ACCEPTOR, Limits(pdu_bytes=config.max_pdu_bytes)),
            self._buffers,
            max_data_set_bytes=most_read(config),
            idle_timeout_s=config.association_idle_timeout_s,
            opened_at=visit.since,
            hosted=True,
            patience=self._patience,
        )
        association.log_fields = {"address": visit.address}
        with self._guard:
            self._links[association] = None
        return association

    def _greet(self, visit: Visit, association: Association) -> bool:
        """Take up its request; False when that is not there whole yet. Raises AssociationLost."""
        event = association.next_event(0.0)
        if isinstance(event, AssociationRequested):
            self._negotiate(visit, association, event.request)
        return event is not None

    def _leave(self, visit: Visit, association: Association) -> None:
        """It is over, and counts no more: not even for a peer that comes again as soon as it is told."""
        with self._guard:
            self._dismiss(association)
        association.finish()
        if not association.was_idle:  # or a request of the peer's may yet have crossed our A-ABORT
            self._end(visit, association)
        visit.deadline = time.monotonic() + LINGER_S
        self._see_off(visit, association)

    def _see_off(self, visit: Visit, association: Association) -> None:
        """Close it when the peer has, or has not for too long."""
        if not association.gone() and visit.deadline:
            self._lobby.keep(visit, visit.deadline)
            return
        visit.sock.close()
        self._end(visit, association)

    def _end(self, visit: Visit, association: Association) -> None:
        """Record how it ended, once."""
        with self._guard:
            is_first = self._links.pop(association, self) is not self
        if is_first and association.violation:
            self._serving.violated(visit.peer, visit.address, association.violation)
        if is_first and visit.peer is not None:
            self._serving.ended(visit.peer, over=association.released or association.was_idle)

    def _drop(self, visit: Visit) -> None:
        """Close it at once, there is no time for more."""
        association = visit.association
        if association is not None:
            association.finish()
            with self._guard:
                self._dismiss(association)
            self._end(visit, association)
        visit.sock.close()

    def _turn_away(self, visit: Visit) -> None:
        log.warning("too many connections", extra={"address": visit.address})
        self._serving.observe.association_rejected("limit")
        self._serving.alert("association rejected: limit", address=visit.address)
        if visit.over_tls:
            visit.sock.close()
        else:
            _turn_away(visit.sock)

    def _negotiate(self, visit: Visit, association: Association, request: AssociateRQ) -> None:
        """Accept, reject or abort; it has a peer from then on when it was accepted. Raises AssociationLost."""
        address = visit.address
        calling, called = request.calling_ae_title, request.called_ae_title
        fields = {"calling_ae_title": repr(calling), "called_ae_title": repr(called), "address": address}
        association.log_fields = fields
        judged = partial(
            self._serving.judge,
            fields,
            calling=calling,
            called=called,
            address=address,
            application_context=request.application_context,
            certificate=fingerprint(visit.stream.peer_certificate()) if visit.stream is not None else "",
        )
        policy = self._serving.policy(calling, address)
        with self._guard:
            # told before it is judged: of two receivers that both take the last place at once neither gets it
            elsewhere = self._neighbours.established(len(self._admitted) + 1)
            rejection = judged(established=len(self._admitted) + elsewhere, of_peer=self._of_peer)
            if rejection is None:
                self._admitted[association] = policy
                self._of_peers[policy.number] += 1
            else:
                self._tell(policy)
        if rejection is not None:
            self._reject(association, rejection)
            return
        identified = self._serving.identify(
            fields,
            request.user.identity,
            policy,
            calling=calling,
            address=address,
            encrypted=visit.stream is not None,
        )
        if isinstance(identified, Rejection):
            with self._guard:
                self._dismiss(association)
            self._reject(association, identified)
            return
        agreement = self._agreement(request, policy, identified.response)
        if agreement is None:
            with self._guard:
                self._dismiss(association)
            self._serving.unanswerable(fields)
            association.connection.refuse()
            return
        peer = self._serving.accepted(
            fields,
            calling=calling,
            called=called,
            address=address,
            refused=agreement.refused,
            find_options=agreement.find_options,
            policy=policy,
            user=identified.user,
        )
        association.idle_timeout_s = policy.idle_timeout_s
        if policy.rates is not None and policy.rates.data is not None:
            association.read_little()
        with self._guard:
            self._links[association] = visit.peer = peer
        association.connection.accept(agreement.answer)
        try:
            association.agreed(agreement.contexts, request.user.maximum_length)
            association.flush()
        finally:
            self._serving.begun(fields, peer)  # while the answer is on its way

    @staticmethod
    def _reject(association: Association, rejection: Rejection) -> None:
        association.connection.reject(
            AssociateRJ(result=rejection.result, source=rejection.source, reason=rejection.diagnostic)
        )

    def _of_peer(self, policy: Policy) -> int:
        """How many associations a peer has, here and elsewhere; told as in `_negotiate`. `_guard` held."""
        mine = self._of_peers[policy.number]
        return mine + self._neighbours.of_peer(policy.number, mine + 1)

    def _tell(self, policy: Policy) -> None:
        """Tell the others how many are here; `_guard` held."""
        self._neighbours.established(len(self._admitted))
        if policy.max_associations is not None:
            self._neighbours.of_peer(policy.number, self._of_peers[policy.number])

    def _dismiss(self, association: Association) -> None:
        """It counts no more; `_guard` held."""
        policy = self._admitted.pop(association, None)
        if policy is not None:
            self._of_peers[policy.number] -= 1
            self._tell(policy)

    def _agreement(self, request: AssociateRQ, policy: Policy, identity_response: bytes | None) -> Agreement | None:
        """See `answer_request`. Peers ask for the same again and again: the last answers are remembered."""
        known = self._agreements.get((policy.number, request)) if request.user.identity is None else None
        if known is not None:
            return known
        acceptance = self._serving.acceptance_for(request.calling_ae_title, policy)
        agreement = answer_request(
            request, acceptance, max_pdu_bytes=self._config.max_pdu_bytes, identity_response=identity_response
        )
        if agreement is not None and request.user.identity is None:
            if len(self._agreements) >= MAX_AGREEMENTS:
                self._agreements.clear()
            self._agreements[policy.number, request] = agreement
        return agreement


def _turn_away(client: socket.socket) -> None:
    """Reject for the moment whatever is asked, without waiting for anything: there is no thread to wait."""
    with suppress(OSError):
        client.setblocking(False)
        client.recv(MAX_REQUEST)  # closing over unread bytes would cost the peer the answer
        client.send(encode_pdu(AssociateRJ(result=2, source=3, reason=2)))
        client.shutdown(socket.SHUT_WR)
    client.close()
