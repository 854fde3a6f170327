"""The DICOM server of the node on the upper layer of its own: connections in, associations negotiated, requests served.

One thread takes connections and keeps those that have said nothing yet, however many, without a thread for each; as
soon as one speaks, a thread of a pool that is kept serves it to its end.
"""

from __future__ import annotations

import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from dicom_node.config import NodeConfig
from dicom_node.dimse.association import Association, Buffers
from dicom_node.dimse.link import FIRST_PDU_S, AssociationLost
from dicom_node.dimse.negotiation import answer_request
from dicom_node.dimse.observer import WireObserver
from dicom_node.dimse.request import Peer
from dicom_node.dimse.requestor import open_link
from dicom_node.dimse.serving import TOUCH_S, Alone, Neighbours, Serving, listening
from dicom_node.dimse.upper_layer.connection import AssociationRequested, Connection, Limits, Side
from dicom_node.dimse.upper_layer.pdus import AssociateRJ, AssociateRQ, encode_pdu
from dicom_node.interfaces import AssociationLog, InstanceIndex, InstanceSink

__all__ = ["DicomServer"]

log = logging.getLogger(__name__)

BACKLOG = 512
SPARE_THREADS = 16  # beyond `max_associations`: for requests that are rejected
KEPT_THREADS = 8  # that wait for work at any time, at most
MAX_SILENT = 1024  # connections that have said nothing yet
MAX_REQUEST = 256 * 1024
GIVE_WAY_S = 0.001  # how long a receiver that has more than another leaves a new connection to it


class DicomServer:
    """A DICOM SCP: C-ECHO, C-STORE, C-FIND, C-GET, C-MOVE.

    `sock` is a bound socket to listen on (from a supervisor); without it `start` binds `config.host` and
    `config.dicom_port`. `neighbours` are other processes that listen on it too: `max_associations` holds for all of
    them together. Raises ConfigError for peers that cannot be understood.
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
    ) -> None:
        self._config = config
        self._serving = Serving(
            config, sink=sink, index=index, associations=associations, observe=observe, open_link=open_link
        )
        self._listener = sock
        self._neighbours = neighbours or Alone()
        self._buffers = Buffers()
        self._links: dict[Association, Peer | None] = {}
        self._admitted: set[Association] = set()
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pool = _Pool(self._converse, most=config.max_associations + SPARE_THREADS)

    # --- life

    def start(self) -> int:
        """Listen; the port that is really bound. Raises OSError when it cannot be bound."""
        self._listener = listening(self._listener, self._config, BACKLOG)
        self._listener.setblocking(False)
        self._pool.spawn(KEPT_THREADS)
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
        while (living := self._living()) and time.monotonic() < deadline:
            for association in living:
                if not association.serving:
                    association.interrupt()
            time.sleep(0.02)
        for association in self._living():
            association.interrupt()
        self._pool.stop()

    @property
    def active_associations(self) -> int:
        """Associations established now."""
        return len(self._admitted)

    def _living(self) -> list[Association]:
        with self._guard:
            return list(self._links)

    # --- connections

    def _accept_loop(self) -> None:
        assert self._listener is not None
        lobby = _Lobby(self._listener, self._spoken, self._is_busier)
        try:
            while not self._stopping.is_set():
                lobby.look(0.2)
        finally:
            lobby.close()

    def _is_busier(self, silent: int) -> bool:
        return self._neighbours.is_busier(silent + self._pool.busy)

    def _spoken(self, client: socket.socket, accepted_at: float) -> None:
        if not self._pool.give((client, accepted_at)):
            log.warning("too many connections")
            self._serving.observe.association_rejected("limit")
            _turn_away(client)

    def _touch_loop(self) -> None:
        while not self._stopping.wait(TOUCH_S):
            active: list[Peer] = []
            with self._guard:
                for association, peer in self._links.items():
                    if peer is not None and association.traffic:
                        association.traffic = False
                        active.append(peer)
            self._serving.touched(active)

    # --- one connection, on a thread of the pool

    def _converse(self, client: socket.socket, accepted_at: float) -> None:
        config = self._config
        try:
            address = str(client.getpeername()[0])
            association = Association(
                client,
                Connection(Side.ACCEPTOR, Limits(pdu_bytes=config.max_pdu_bytes)),
                self._buffers,
                max_data_set_bytes=config.storage.max_object_bytes,
                idle_timeout_s=config.association_idle_timeout_s,
                opened_at=accepted_at,
            )
        except OSError:  # it went away while it waited
            client.close()
            return
        with self._guard:
            self._links[association] = None
        try:
            if self._stopping.is_set():  # `stop` may have looked before it was there
                return
            event = association.next_event(max(accepted_at + FIRST_PDU_S - time.monotonic(), 0.1))
            if isinstance(event, AssociationRequested):
                self._negotiate(association, event.request, address)
            peer = self._links[association]
            if peer is not None:
                association.serve(partial(self._serving.serve, association, peer))
        except AssociationLost:
            pass
        finally:
            association.finish()
            with self._guard:
                peer = self._links.pop(association)
                self._dismiss(association)
            if peer is not None:
                self._serving.ended(peer, over=association.released or association.was_idle)

    def _negotiate(self, association: Association, request: AssociateRQ, address: str) -> None:
        """Accept, reject or abort; it has a peer from then on when it was accepted. Raises AssociationLost."""
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
        )
        with self._guard:
            # told before it is judged: of two receivers that both take the last place at once neither gets it
            elsewhere = self._neighbours.established(len(self._admitted) + 1)
            rejection = judged(established=len(self._admitted) + elsewhere)
            if rejection is None:
                self._admitted.add(association)
            else:
                self._neighbours.established(len(self._admitted))
        if rejection is not None:
            association.connection.reject(
                AssociateRJ(result=rejection.result, source=rejection.source, reason=rejection.diagnostic)
            )
            return
        agreement = answer_request(request, self._serving.acceptance, max_pdu_bytes=self._config.max_pdu_bytes)
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
        )
        association.idle_timeout_s = self._serving.idle_timeout_s(calling)
        with self._guard:
            self._links[association] = peer
        association.connection.accept(agreement.answer)
        association.agreed(agreement.contexts, request.user.maximum_length)
        association.flush()

    def _dismiss(self, association: Association) -> None:
        """It counts no more; `_guard` held."""
        self._admitted.discard(association)
        self._neighbours.established(len(self._admitted))


def _turn_away(client: socket.socket) -> None:
    """Reject for the moment whatever is asked, without waiting for anything: there is no thread to wait."""
    with suppress(OSError):
        client.setblocking(False)
        client.recv(MAX_REQUEST)  # closing over unread bytes would cost the peer the answer
        client.send(encode_pdu(AssociateRJ(result=2, source=3, reason=2)))
        client.shutdown(socket.SHUT_WR)
    client.close()


class _Lobby:
    """Takes connections from a listener and calls `spoken(socket, since)` with each that has something to read.

    One that says nothing within `FIRST_PDU_S` is closed; when `MAX_SILENT` wait, the one that has waited longest is.

    Other processes may take connections from the same listener. Each new one wakes all of them, so one that is stuck
    keeps nothing from the others; who has more in hand (`is_busier(silent)`) gives way for a moment.
    """

    def __init__(
        self,
        listener: socket.socket,
        spoken: Callable[[socket.socket, float], None],
        is_busier: Callable[[int], bool] = lambda silent: False,
    ) -> None:
        self._listener = listener
        self._on_spoken = spoken
        self._is_busier = is_busier
        self._poll = select.epoll()
        self._poll.register(listener.fileno(), select.EPOLLIN)
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # by descriptor, in the order of arrival
        is_busier(0)

    def look(self, timeout_s: float) -> None:
        """Wait for something to happen, at most so long, and see to it."""
        ready = [fd for fd, _ in self._poll.poll(timeout_s)]
        for fd in ready:
            if fd in self._silent:
                client, since = self._leave(fd)
                self._on_spoken(client, since)
        # last: making room may close one of the ready, and whom it lets in may get the descriptor of another
        if self._listener.fileno() in ready:
            if self._is_busier(len(self._silent)):
                time.sleep(GIVE_WAY_S)
            self._accept()
        self._is_busier(len(self._silent))  # for the others to know
        now = time.monotonic()
        while self._silent:
            fd, (_, since) = next(iter(self._silent.items()))
            if now - since < FIRST_PDU_S:
                return
            self._leave(fd)[0].close()

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                log.exception("connection could not be accepted")
                time.sleep(0.2)  # out of descriptors: give the others time to close
                return
            if len(self._silent) >= MAX_SILENT:
                self._leave(next(iter(self._silent)))[0].close()
            self._silent[client.fileno()] = (client, time.monotonic())
            self._poll.register(client.fileno(), select.EPOLLIN)
            if self._is_busier(len(self._silent)):
                return

    def _leave(self, fd: int) -> tuple[socket.socket, float]:
        self._poll.unregister(fd)
        return self._silent.pop(fd)

    def close(self) -> None:
        """Close those that wait."""
        for fd in list(self._silent):
            with suppress(OSError):
                self._leave(fd)[0].close()
        self._poll.close()


class _Pool:
    """Threads that are used again: made when all are busy, at most `most`; one that is done ends when enough wait."""

    def __init__(self, work: Callable[[socket.socket, float], None], *, most: int) -> None:
        self._work, self._most = work, most
        self._waiting: queue.SimpleQueue[tuple[socket.socket, float] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._given = 0  # and not yet taken up
        self._numbers = iter(range(1 << 62))

    @property
    def busy(self) -> int:
        """Threads that work or are about to."""
        return len(self._threads) - self._idle + self._given

    def spawn(self, count: int) -> None:
        """Have so many more, within the bound and what the system gives."""
        with self._guard:
            while count > 0 and self._start_one():
                count -= 1

    def _start_one(self) -> bool:
        """One more thread, `_guard` held; False when there may be no more."""
        if len(self._threads) >= self._most:
            return False
        thread = threading.Thread(target=self._run, name=f"dicom-{next(self._numbers)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit of the system's: one connection is turned away, the node goes on
            log.exception("thread could not be started")
            return False
        self._threads.add(thread)
        self._idle += 1
        return True

    def give(self, item: tuple[socket.socket, float]) -> bool:
        """Have it done by a thread of the pool; False when all that there may be are busy."""
        with self._guard:
            if self._idle - self._given <= 0 and not self._start_one():
                return False
            self._given += 1
        self._waiting.put(item)
        return True

    def stop(self, timeout_s: float = 2.0) -> None:
        """End them; returns when they are gone, or after a while."""
        with self._guard:
            threads = list(self._threads)
        for _ in threads:
            self._waiting.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _run(self) -> None:
        while True:
            item = self._waiting.get()
            with self._guard:
                self._idle -= 1
                if item is None:
                    self._threads.discard(threading.current_thread())
                    return
                self._given -= 1
            try:
                self._work(*item)
            except Exception:  # the SCP edge: whatever happened, the thread serves the next connection
                log.exception("association failed")
            with self._guard:
                if self._idle - self._given >= KEPT_THREADS:
                    self._threads.discard(threading.current_thread())
                    return
                self._idle += 1
