"""One transport connection of an association, on the upper layer of the node's own: events come, bytes go, it ends.

Used from one thread. No association holds more than its one buffer, and one of a MiB while it sends. Every wait has an
end:

* the first PDU must be whole `first_pdu_s` after the connection was made, any other `pdu_s` after it began;
* a peer that reads nothing for `send_s` is gone (`link.Patience`).
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from dicom_node.dimse.link import (
    MAX_PDU_SENT,
    PATIENT,
    SMALLEST_PDU,
    AgreedContext,
    AssociationLost,
    Patience,
)
from dicom_node.dimse.messages import BadMessage, MessageReader
from dicom_node.dimse.sending import send_all, send_timeout
from dicom_node.dimse.tls_stream import TlsStream
from dicom_node.dimse.upper_layer.connection import (
    Aborted,
    Connection,
    ConnectionLost,
    Data,
    ProtocolError,
    ReleaseAsked,
    Released,
    UpperEvent,
    UpperLayerMisuse,
)

__all__ = ["Buffers", "Transport", "prepare"]

log = logging.getLogger(__name__)

BUFFER = 256 * 1024
SHORT_READ = 16 * 1024
LITTLE = 16 * 1024
TICK_S = 0.4  # a wait for the peer is cut into such pieces
LINGER_S = 1.0
MAX_DISCARDED = 512 * 1024
_NOWHERE = memoryview(bytearray(64 * 1024))  # for what is read and not looked at, of all associations
RELEASE_S = 5.0


class Buffers:
    """Receive buffers that are used again: a new one for each association costs more than the association."""

    def __init__(self, kept: int = 64) -> None:
        self._free: list[bytearray] = []
        self._kept = kept
        self._guard = threading.Lock()

    def take(self) -> bytearray:
        """A buffer; whatever was in it is there still."""
        with self._guard:
            return self._free.pop() if self._free else bytearray(BUFFER)

    def give_back(self, buffer: bytearray) -> None:
        """It may be used again."""
        with self._guard:
            if len(self._free) < self._kept:
                self._free.append(buffer)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def prepare(sock: socket.socket | TlsStream, send_s: float) -> None:
    """Set what an association needs of its socket; those that a listener accepts have it from the listener (Linux)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, send_timeout(send_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(TICK_S))


class Transport:
    """A connected socket and its upper layer. `connection` may already have something to send.

    `opened_at` (monotonic; None: now) is when the connection was made. `traffic` is set whenever data came; the owner
    clears it. `released`: it ended in order, or, `was_idle`, because nothing was under way for the idle time.

    `hosted`: its socket is blocking and prepared (`prepare`), and it has an owner who waits for the peer's close
    (`gone`) when it is `over`. Otherwise it waits for that itself, for a moment.
    """

    def __init__(
        self,
        sock: socket.socket | TlsStream,
        connection: Connection,
        buffers: Buffers,
        *,
        opened_at: float | None = None,
        hosted: bool = False,
        patience: Patience = PATIENT,
    ) -> None:
        self.log_fields: Mapping[str, str] = {}
        self.violation = ""  # what the peer did for which it was aborted, in constant words
        self._acknowledge = False  # the next wait is to begin with an acknowledgement of what came
        self.traffic = self.released = self.was_idle = False
        self._sock, self._connection, self._buffers = sock, connection, buffers
        self._hosted = hosted
        self._buffer: bytearray | None = None
        self._reads_little = False
        self._view = memoryview(b"")
        self._events: Iterator[UpperEvent] = iter(())
        self._messages = MessageReader()  # says whether a message is under way
        self._contexts: Mapping[int, AgreedContext] = {}
        self._pdu_bytes = MAX_PDU_SENT
        self._corked: list[bytes | memoryview] = []  # messages that wait for the next one
        self._over = self._finished = False
        self._interrupted = False
        self._deadline = (time.monotonic() if opened_at is None else opened_at) + patience.first_pdu_s
        """Of the PDU under way."""
        self._pdu_s, self._send_s = patience.pdu_s, patience.send_s
        self._filled_at = 0.0
        self._pdus = 1 if connection.artim_running else 0  # PDUs whose deadline is set: an acceptor's first one is
        self._discarded = 0
        self._poll: Callable[[float], object] | None = sock.ready if isinstance(sock, TlsStream) else None
        if not hosted:
            sock.setblocking(True)
            prepare(sock, patience.send_s)
        self.wake()

    # --- life

    @property
    def contexts(self) -> Mapping[int, AgreedContext]:
        """The accepted contexts by their ids."""
        return self._contexts

    @property
    def pdu_bytes(self) -> int:
        """See `link.Link`."""
        return self._pdu_bytes

    @property
    def established(self) -> bool:
        """Whether messages may still be sent."""
        return not self._over and self._connection.established

    @property
    def over(self) -> bool:
        """Whether it has ended; its connection may be open still."""
        return self._over

    @property
    def connection(self) -> Connection:
        """The upper layer itself, for negotiation."""
        return self._connection

    def agreed(self, contexts: Mapping[int, AgreedContext], maximum_length: int) -> None:
        """What was negotiated; `maximum_length` as the peer told it, 0 = any. Raises AssociationLost."""
        self._contexts = contexts
        if 0 < maximum_length < SMALLEST_PDU:
            self.abort()
            raise AssociationLost(f"the peer takes only {maximum_length} bytes at once, {SMALLEST_PDU} are needed")
        self._pdu_bytes = min(maximum_length or MAX_PDU_SENT, MAX_PDU_SENT)

    def interrupt(self) -> None:
        """From another thread: end it at its next breath."""
        self._interrupted = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """See `link.Link`."""
        if not self._over:
            self._connection.abort()
            self._finish()

    def release(self) -> None:
        """See `link.Link`."""
        if self._over:
            return
        deadline = time.monotonic() + RELEASE_S
        with suppress(AssociationLost, UpperLayerMisuse, BadMessage):
            self._connection.release()
            while not self._over and time.monotonic() < deadline:
                event = self._next_event(deadline - time.monotonic())
                if isinstance(event, ReleaseAsked):
                    self._connection.answer_release()
                elif isinstance(event, Released):
                    self.released = True
                    break
        if not self._over and not self.released:
            self._connection.abort()
        self._finish()

    def finish(self) -> None:
        """Close it whatever its state, telling the peer where it has not been told. Idempotent."""
        if not self._over:
            self._connection.abort()
        self._finish()

    def _finish(self) -> None:
        """Send what is left to say; unless its owner does, give the peer a moment to read it, and close."""
        if self._finished:
            return
        self._over = self._finished = True
        left = self._connection.to_send()
        with suppress(OSError):
            if self._hosted:
                if left:
                    self._sock.send(left, socket.MSG_DONTWAIT)  # a peer that leaves no room for it does not read it
            else:
                self._sock.settimeout(LINGER_S)
                self._sock.sendall(left)
                if not self._connection.closing:  # closing over unread bytes would cost the peer our last PDU
                    self._sock.shutdown(socket.SHUT_WR)
                    self._discard()
        if not self._hosted or self._connection.closing:
            self._sock.close()
        self._events = iter(())
        self.rest()

    def rest(self) -> None:
        """Give the buffer back: nothing is under way, and nothing will be until `wake`."""
        buffer, self._buffer = self._buffer, None
        self._view = memoryview(b"")
        if buffer is not None:
            self._buffers.give_back(buffer)

    def wake(self) -> None:
        """Be ready to receive."""
        if self._buffer is None:
            self._buffer = self._buffers.take()
            self._view = memoryview(self._buffer)[: LITTLE if self._reads_little else BUFFER]

    def read_little(self) -> None:
        """Take in small pieces, and little ahead: whoever is to be slowed down sees how far it is."""
        self._reads_little = True
        self._view = self._view[:LITTLE]
        with suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * LITTLE)

    def gone(self) -> bool:
        """When it is over and has an owner: whether the peer has closed, and so have we. Waits for nothing.

        As long as it has not, the peer is told that nothing more will come.
        """
        try:
            while self._discarded < MAX_DISCARDED:
                received = self._sock.recv_into(_NOWHERE, 0, socket.MSG_DONTWAIT)
                if not received:
                    break
                self.was_idle = False  # what it sent had crossed our A-ABORT
                self._discarded += received
        except BlockingIOError:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
                return False
        except OSError:  # reset, or closed already
            pass
        self._sock.close()
        return True

    def _discard(self) -> None:
        deadline, room = time.monotonic() + LINGER_S, MAX_DISCARDED
        while room > 0 and (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            received = self._sock.recv_into(_NOWHERE)
            if not received:
                return
            room -= received

    def _lost(self, reason: str) -> AssociationLost:
        self._finish()
        return AssociationLost(reason)

    # --- what comes

    def next_event(self, timeout_s: float) -> UpperEvent | None:
        """The next event, before there are messages; None after `timeout_s`. Raises AssociationLost.

        A PDU that has begun may come to its end in a later call, before its own deadline.
        """
        return self._next_event(timeout_s, patient=False)

    def _next_event(self, timeout_s: float, *, patient: bool = True) -> UpperEvent | None:
        """As `next_event`; if `patient`, a PDU that has begun is waited for until its own deadline."""
        until = time.monotonic() + timeout_s
        while True:
            event = next(self._events, None)
            if self._corked or self._connection.has_to_send:
                self.flush()
            if event is not None:
                return event if type(event) is Data else self._looked_at(event)
            if self._over or self._interrupted:
                self._connection.abort()
                raise self._lost("the association ended")
            if self._connection.closing:  # an A-ABORT before there was an association is no event of its own
                raise self._lost("the association ended")
            if not self._fill(until, patient):
                return None

    def _looked_at(self, event: UpperEvent) -> UpperEvent:
        if isinstance(event, ProtocolError):
            log.warning("the peer broke the protocol", extra={"error": event.message, **self.log_fields})
            self.violation = "the peer broke the protocol"
            raise self._lost(self.violation)
        if isinstance(event, Aborted):
            raise self._lost("the peer aborted the association")
        if isinstance(event, ConnectionLost):
            raise self._lost("the connection broke")
        return event

    def _fill(self, until: float, patient: bool) -> bool:
        """Take in what the socket has; False when nothing came until then, and, if `patient`, nothing had begun."""
        connection = self._connection
        began = connection.in_pdu
        if began and connection.pdus != self._pdus:
            self._pdus, self._deadline = connection.pdus, time.monotonic() + self._pdu_s
        elif began and self._contexts:  # what we were busy with meanwhile, a slow disk, is not the peer's fault
            self._deadline += time.monotonic() - self._filled_at
        if began:
            until = self._deadline if patient else min(until, self._deadline)
        if self._acknowledge and (began or self._messages.under_way):
            # a peer that leaves Nagle on sends 12 bytes and waits for our ACK; a whole message is acknowledged by
            # our answer
            with suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        try:
            received = self._take(until)
        except TimeoutError:
            if not began or (not patient and time.monotonic() < self._deadline):
                return False
            log.warning("a PDU did not come to its end", extra=dict(self.log_fields))
            connection.abort()
            self.violation = "a PDU did not come to its end"
            raise self._lost(self.violation) from None
        except OSError:
            received = 0
        if received:
            self.traffic = True
            self._acknowledge = received < SHORT_READ
            self._events = connection.receive(self._view[:received])
            self._filled_at = time.monotonic()
        elif self._interrupted:  # it was not the peer who closed
            connection.abort()
            raise self._lost("the association ended")
        else:
            broke = list(connection.receive_end())
            raise self._lost("the connection broke" if broke else "the association ended")
        return True

    def _take(self, until: float) -> int:
        """Bytes that came into the buffer, 0 at the end of the stream. Raises TimeoutError, OSError.

        The kernel keeps the time (SO_RCVTIMEO): asking first whether there is something would double the calls.
        """
        while True:
            left = until - time.monotonic()
            if 0.0 < left < TICK_S and not self._readable(left):
                raise TimeoutError
            try:
                return self._sock.recv_into(self._view, 0, 0 if left > 0.0 else socket.MSG_DONTWAIT)
            except BlockingIOError:  # a tick went by
                if left <= 0.0:
                    raise TimeoutError from None

    def _readable(self, timeout_s: float) -> bool:
        if self._poll is None:
            poll = select.poll()
            poll.register(self._sock.fileno(), select.POLLIN)
            self._poll = poll.poll
        return bool(self._poll(max(timeout_s, 0.0) * 1000))

    # --- what goes

    def flush(self) -> None:
        """Write what was held back, and what the upper layer has to say. Raises AssociationLost."""
        if self._corked and not self._over:
            corked, self._corked = self._corked, []
            self._write(corked)
        waiting = self._connection.to_send()
        if waiting and not self._over:
            self._write([waiting])

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        """All of `parts`, in as few writes as the system takes."""
        try:
            if isinstance(self._sock, TlsStream):
                self._sock.sendmsg(parts)
            else:
                send_all(self._sock, parts, self._send_s)
        except OSError as exc:
            with suppress(OSError):  # what is queued would keep the connection open as long as the peer reads nothing
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._sock.close()
            raise self._lost("the peer does not read, or the connection broke") from exc
