"""Connections that no thread serves now, and the threads that wait for any of them to speak.

All threads wait in one epoll, and whichever wakes serves what woke it: nothing is handed from thread to thread. What
waits without a thread: connections that have not asked for an association yet, associations between two messages
(parked), and those that are over and whose peer has yet to close. Each has a deadline, kept here.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress

from dicom_node.addresses import whose
from dicom_node.dimse.association import Association
from dicom_node.dimse.link import FIRST_PDU_S
from dicom_node.dimse.request import Peer
from dicom_node.dimse.tls_stream import TlsStream

__all__ = ["Lobby", "Visit"]

log = logging.getLogger(__name__)

KEPT_THREADS = 8  # that are not ended for want of work
SPARE_S = 5.0  # what a thread beyond these waits for work before it ends
MAX_SILENT = 1024  # connections without an association, and those that are over
GIVE_WAY_S = 0.001  # how long a receiver that has more than another leaves a new connection to it
SWEEP_S = 0.2  # how often deadlines are looked at
ONCE = select.EPOLLIN | select.EPOLLONESHOT


class Visit:
    """One connection from its accept to its close. In the lobby, or with exactly one thread.

    `association` is there as soon as it has spoken, `peer` as soon as it was accepted. `deadline` (monotonic) is when
    it is to be served though it has said nothing. `over_tls`: it came to a door for TLS; `stream` is there as soon as
    its handshake has begun.
    """

    __slots__ = ("address", "association", "deadline", "number", "over_tls", "peer", "since", "sock", "stream")

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        since: float,
        *,
        over_tls: bool = False,
        first_pdu_s: float = FIRST_PDU_S,
    ) -> None:
        self.sock, self.address, self.since, self.over_tls = sock, address, since, over_tls
        self.stream: TlsStream | None = None
        self.number = sock.fileno()
        self.association: Association | None = None
        self.peer: Peer | None = None
        self.deadline = since + first_pdu_s

    @property
    def is_parked(self) -> bool:
        """Whether it is an association that goes on."""
        return self.peer is not None and self.association is not None and not self.association.over


class Lobby:
    """Takes connections; `serve(visit)` is called with each that speaks or is late.

    Whoever is called may give the visit back (`keep`), or has closed it. `turn_away(visit)` is called instead with one
    that asks for the first time while all threads there may be, `most`, are busy; others wait for a thread. When
    `most_silent` connections wait that are no associations, the one that has waited longest of the address that has
    most is given to `drop`. Each is late when it has said nothing for `first_pdu_s`.

    Other processes may take connections from the same listener. Each new one wakes all of them, so one that is stuck
    keeps nothing from the others; who has more in hand (`is_busier(connections)`) gives way for a moment.
    """

    def __init__(
        self,
        *,
        serve: Callable[[Visit], None],
        turn_away: Callable[[Visit], None],
        drop: Callable[[Visit], None],
        is_busier: Callable[[int], bool],
        most: int,
        most_silent: int = MAX_SILENT,
        first_pdu_s: float = FIRST_PDU_S,
    ) -> None:
        self._doors: dict[int, tuple[socket.socket, bool]] = {}  # by descriptor, with whether it is for TLS
        self._serve, self._turn_away, self._drop, self._most = serve, turn_away, drop, most
        self._is_busier, self._most_silent, self._first_pdu_s = is_busier, most_silent, first_pdu_s
        self._poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self._guard = threading.Lock()
        self._silent: dict[int, Visit] = {}  # by descriptor, in the order of arrival
        self._parked: dict[int, Visit] = {}
        self._called: deque[Visit] = deque()  # are late, or have spoken when no thread was there
        self._threads: set[threading.Thread] = set()
        self._waiting = 0  # threads that would take up something new at once
        self._is_open, self._ended = True, threading.Event()
        self._numbers = iter(range(1 << 62))
        self._keeper = threading.Thread(target=self._keep_time, name="dicom-accept", daemon=True)

    # --- life

    def open(self, listener: socket.socket | None, for_tls: socket.socket | None = None) -> None:
        """Let in whom these, which do not block, have."""
        both = ((listener, False), (for_tls, True))
        self._doors = {one.fileno(): (one, over_tls) for one, over_tls in both if one is not None}
        with self._guard:
            while len(self._threads) < min(KEPT_THREADS, self._most) and self._start_one():
                pass
        self._is_busier(0)
        self._keeper.start()
        self._poll.register(self._bell, select.EPOLLIN)
        for door in self._doors:
            self._poll.register(door, ONCE)

    def close_door(self) -> None:
        """Let nobody in any more; those that are here are served as if they were late. Idempotent, as `stop` is."""
        if self._ended.is_set():
            return
        self._is_open = False
        for door in self._doors:
            with suppress(OSError):
                self._poll.unregister(door)
        self._call(math.inf)

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the threads, close what waits; returns when they are gone, or after a while."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._guard:
            threads = [*self._threads, self._keeper]
        os.eventfd_write(self._bell, 1 << 30)  # more than anybody reads: every thread that waits hears it
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        with self._guard:
            left = [*self._silent.values(), *self._parked.values(), *self._called]
            self._silent.clear()
            self._parked.clear()
            self._called.clear()
        for visit in left:
            self._work(self._drop, visit)
        if not any(thread.is_alive() for thread in threads):  # or a descriptor of another's would be waited for
            self._poll.close()
            os.close(self._bell)

    @property
    def threads(self) -> int:
        """How many there are."""
        return len(self._threads)

    @property
    def is_crowded(self) -> bool:
        """Whether more threads are at work than are kept: who waits for its peer should wait here."""
        return len(self._threads) - self._waiting > KEPT_THREADS

    @property
    def connections(self) -> int:
        """How many are in hand."""
        with self._guard:  # of numbers of two moments the sum could be less than none
            return len(self._silent) + len(self._parked) + len(self._threads) - self._waiting

    @property
    def silent(self) -> int:
        """How many wait here that are no associations."""
        return len(self._silent)

    # --- visits

    def keep(self, visit: Visit, deadline: float, *, heard: bool = True) -> None:
        """Have it served when it speaks, or at `deadline`. From here on it may be with another thread.

        If it is not `heard` it is served at `deadline` and no sooner, whatever it says until then.
        """
        visit.deadline = deadline
        with self._guard:  # whoever is in the lobby is waited for: both, or neither
            (self._parked if visit.is_parked else self._silent)[visit.number] = visit
            if heard:  # once it was served nothing is reported of it until then
                self._poll.modify(visit.number, ONCE)

    def _taken(self, number: int) -> Visit | None:
        """Who waits at this descriptor; if the one that was heard was closed meanwhile, another: no harm is done."""
        with self._guard:
            return self._silent.pop(number, None) or self._parked.pop(number, None)

    def _call(self, now: float) -> None:
        """Have those whose deadline is over by then served by whichever thread is free."""
        late: list[Visit] = []
        with self._guard:
            for waiting in (self._silent, self._parked):
                found = [visit for visit in waiting.values() if visit.deadline <= now]
                for visit in found:
                    visit.deadline = 0.0
                    del waiting[visit.number]
                late += found
            self._called.extend(late)
        if late:
            os.eventfd_write(self._bell, len(late))

    def _keep_time(self) -> None:
        while self._threads and not self._ended.wait(SWEEP_S):  # alive: connections are taken
            self._call(time.monotonic())
            self._is_busier(self.connections)  # for the others to know

    def _let_in(self, door: int) -> None:
        """One connection, and see to the next. Whoever finds none was not the first."""
        client = None
        listener, over_tls = self._doors[door]
        if self._is_busier(self.connections):
            time.sleep(GIVE_WAY_S)
        try:
            client, address = listener.accept()
        except BlockingIOError:
            pass
        except OSError:
            if self._is_open:
                log.exception("connection could not be accepted")
                time.sleep(0.2)  # out of descriptors: give the others time to close
        if self._is_open:
            with suppress(OSError):  # the door was closed meanwhile
                self._poll.modify(door, ONCE)
        if client is None:
            return
        visit, oldest = self._visit(client, str(address[0]), over_tls), None
        with self._guard:
            self._poll.register(visit.number, ONCE)
            if len(self._silent) >= self._most_silent:
                oldest = self._silent.pop(self._who_gives_way())
            self._silent[visit.number] = visit
        self._is_busier(self.connections)  # for the others to know
        if not self._is_open:  # it was closed before this one was there
            self._call(math.inf)
        if oldest is not None:
            self._drop(oldest)

    def _who_gives_way(self) -> int:
        """The one that has waited longest of those whose machine has most of them; `_guard` held."""
        many = Counter(whose(visit.address) for visit in self._silent.values()).most_common(1)[0][0]
        return next(number for number, visit in self._silent.items() if whose(visit.address) == many)

    def _visit(self, client: socket.socket, address: str, over_tls: bool) -> Visit:
        return Visit(client, address, time.monotonic(), over_tls=over_tls, first_pdu_s=self._first_pdu_s)

    # --- threads

    def _start_one(self) -> bool:
        """One more thread, `_guard` held; False when there may be no more."""
        if len(self._threads) >= self._most or self._ended.is_set():
            return False
        try:
            thread = threading.Thread(target=self._run, name=f"dicom-{next(self._numbers)}", daemon=True)
            thread.start()
        except (RuntimeError, MemoryError):  # a limit of the system's: one connection is turned away, the node goes on
            log.exception("thread could not be started")
            return False
        self._threads.add(thread)
        self._waiting += 1
        return True

    def _run(self) -> None:
        while True:
            happened = self._poll.poll(SPARE_S, 1)
            if self._ends(spare=not happened):
                return
            if not happened:
                continue
            try:
                self._see_to(happened[0][0])
            except Exception:  # the SCP edge: whatever happened, the thread serves the next connection
                log.exception("connection could not be served")

    def _see_to(self, number: int) -> None:
        if number in self._doors:
            self._let_in(number)
            return
        visit = self._next_called() if number == self._bell else self._taken(number)
        if visit is not None:
            self._take_up(visit)

    def _ends(self, *, spare: bool) -> bool:
        """Whether this thread, which waits, is to end: all do, or it found nothing to do and enough others wait."""
        if not spare and not self._ended.is_set():
            return False
        with self._guard:
            ends = self._ended.is_set() or (self._waiting > 1 and len(self._threads) > KEPT_THREADS)
            if ends:
                self._waiting -= 1
                self._threads.discard(threading.current_thread())
        return ends

    def _next_called(self) -> Visit | None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        with self._guard:
            return self._called.popleft() if self._called else None

    def _take_up(self, visit: Visit) -> None:
        """Serve it, unless nobody would be left to see who else comes; then those that spoke meanwhile."""
        with self._guard:
            self._waiting -= 1
            is_last = self._waiting == 0 and not self._start_one()
        if not is_last:
            current: Visit | None = visit
            while current is not None:
                self._work(self._serve, current)
                with self._guard:
                    current = self._called.popleft() if self._called and not self._ended.is_set() else None
                    if current is None:
                        self._waiting += 1
            return
        if visit.association is None:  # when the others are gone because all end, it is not for too many
            self._work(self._drop if self._ended.is_set() else self._turn_away, visit)
        with self._guard:
            if visit.association is not None:
                self._called.append(visit)
                if self._waiting:  # somebody was done meanwhile, and found nothing
                    os.eventfd_write(self._bell, 1)
            self._waiting += 1

    @staticmethod
    def _work(act: Callable[[Visit], None], visit: Visit) -> None:
        try:
            act(visit)
        except Exception:  # the SCP edge: whatever happened, the thread serves the next connection
            log.exception("association failed")
