"""Connections that strangers cannot exhaust: one thread waits for all heads, and what is slow to answer gets another.

A connection costs no thread until its request is whole. Of those that wait there are at most so many, in all and for
each address; one more takes the place of the one that has waited longest, of its own address first. So whoever sends a
request at once is served, however many others say nothing.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

from dicom_node.addresses import whose
from dicom_node.http.requests import BODY_BYTES_MAX, BadRequest, Request, judge
from dicom_node.http.responses import Response, encoded, refusal

__all__ = ["Connections", "Slow"]

log = logging.getLogger(__name__)

FIRST_BYTE_S = 5.0
HEAD_S = 10.0  # from the connection to the end of the head: a byte now and then does not extend it
LINGER_S = 0.5
WAITING_MAX = 512  # connections without a whole request
WAITING_PER_ADDRESS_MAX = 128
THREADS_MAX = 16  # requests answered at once, /ping and refusals not counted
LOOK_S = 0.1
PIECE = 16 * 1024

Slow = Callable[[socket.socket], None]
"""Answers on the connection, which blocks; runs in a thread of its own. Raises nothing but OSError."""


@dataclass(slots=True)
class _Waiting:
    """A connection whose request is not whole, or (`lingers`) whose answer is on its way."""

    connection: socket.socket
    address: str
    since: float
    received: bytearray = field(default_factory=bytearray)
    lingers: bool = False
    discarded: int = 0

    def ends(self) -> float:
        """When it is given up."""
        return self.since + (LINGER_S if self.lingers else HEAD_S if self.received else FIRST_BYTE_S)


class Connections:
    """Accepts on `listener`, and has each request answered by what `answer` returns for it and its address.

    `answer` runs in the one thread that reads, so it must not block: a `Response` is sent at once, and `Slow` gets a
    thread. `refused` is told why a request was not passed on: malformed, timeout, busy.
    """

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Request, str], Response | Slow],
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._listener, self._answer, self._refused = listener, answer, refused
        self._waiting: dict[socket.socket, _Waiting] = {}  # in the order they came
        self._by_address: dict[str, int] = {}
        self._done: deque[tuple[socket.socket, str]] = deque()  # answered in threads, to linger
        self._free = threading.BoundedSemaphore(THREADS_MAX)
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting; requests in threads end within their own bounds. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._listener.close()
        self._drop_done()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(LOOK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            while self._done:
                self._let_linger(*self._done.popleft())
            self._give_up()
        for waiting in list(self._waiting.values()):
            self._close(waiting)
        self._selector.close()

    # --- accepting

    def _accept(self) -> None:
        for _ in range(64):  # then those that are here get their turn
            try:
                connection, told = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors, mostly: whoever waited longest gives one back
                if self._waiting:
                    self._close(next(iter(self._waiting.values())))
                else:
                    self._stopping.wait(LOOK_S)
                return
            self._keep(connection, str(told[0]))

    def _keep(self, connection: socket.socket, address: str) -> None:
        if self._by_address.get(whose(address), 0) >= WAITING_PER_ADDRESS_MAX:
            self._close(next(one for one in self._waiting.values() if whose(one.address) == whose(address)))
        elif len(self._waiting) >= WAITING_MAX:
            self._close(next(iter(self._waiting.values())))
        connection.setblocking(False)
        waiting = _Waiting(connection, address, time.monotonic())
        self._add(waiting)
        self._read(waiting)  # mostly the request is there already

    def _add(self, waiting: _Waiting) -> None:
        self._waiting[waiting.connection] = waiting
        self._by_address[whose(waiting.address)] = self._by_address.get(whose(waiting.address), 0) + 1
        self._selector.register(waiting.connection, selectors.EVENT_READ, waiting)

    def _forget(self, waiting: _Waiting) -> None:
        del self._waiting[waiting.connection]
        self._selector.unregister(waiting.connection)
        left = self._by_address.pop(whose(waiting.address)) - 1
        if left:
            self._by_address[whose(waiting.address)] = left

    def _close(self, waiting: _Waiting) -> None:
        self._forget(waiting)
        waiting.connection.close()

    def _give_up(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for waiting in [one for one in self._waiting.values() if one.ends() <= now]:
            if waiting.received and not waiting.lingers:
                self._refused("timeout")
                self._send(waiting, refusal(HTTPStatus.REQUEST_TIMEOUT, "the request did not come whole in time"))
            else:
                self._close(waiting)

    # --- reading

    def _read(self, waiting: _Waiting) -> None:
        if self._waiting.get(waiting.connection) is not waiting:
            return  # closed for another one in this very round
        try:
            fragment = waiting.connection.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            fragment = b""
        if not fragment:
            self._close(waiting)
        elif waiting.lingers:
            waiting.discarded += len(fragment)
            if waiting.discarded > BODY_BYTES_MAX:
                self._close(waiting)
        else:
            waiting.received += fragment
            self._look_at(waiting)

    def _look_at(self, waiting: _Waiting) -> None:
        try:
            request = judge(bytes(waiting.received))
        except BadRequest as exc:
            self._refused("malformed")
            self._send(waiting, refusal(exc.status, exc.reason))
            return
        if request is None:
            return
        answer = self._answer(request, waiting.address)
        if isinstance(answer, Response):
            self._send(waiting, answer, with_body=request.method != "HEAD")
        elif self._free.acquire(blocking=False):
            self._forget(waiting)
            waiting.connection.setblocking(True)
            arguments = (waiting.connection, waiting.address, answer)
            threading.Thread(target=self._serve, args=arguments, name="http-request", daemon=True).start()
        else:
            self._refused("busy")
            self._send(waiting, refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once", Retry_After="2"))

    # --- answering

    def _send(self, waiting: _Waiting, response: Response, *, with_body: bool = True) -> None:
        """A short answer, which a fresh connection takes whole: whoever lets it wait does not get it."""
        content = encoded(response, with_body=with_body)
        try:
            if waiting.connection.send(content) < len(content):
                raise BlockingIOError
            waiting.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(waiting)
            return
        waiting.lingers, waiting.since = True, time.monotonic()

    def _serve(self, connection: socket.socket, address: str, answer: Slow) -> None:
        try:
            answer(connection)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()  # the client went away; there is nobody to tell
        else:
            self._done.append((connection, address))
            if self._stopping.is_set() and not self._thread.is_alive():  # nobody lets it linger any more
                self._drop_done()
        finally:
            self._free.release()

    def _drop_done(self) -> None:
        with suppress(IndexError):  # two threads may be here
            while True:
                self._done.popleft()[0].close()

    def _let_linger(self, connection: socket.socket, address: str) -> None:
        """Let the answer arrive: closing with unread bytes (a body nobody asked for) would reset the connection."""
        connection.setblocking(False)
        self._add(_Waiting(connection, address, time.monotonic(), lingers=True))
