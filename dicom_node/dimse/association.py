"""One association over a blocking socket, on the upper layer of the node's own: the wire that is used by default.

Used from one thread. Messages come and go here; a data set is read from the socket while it is written to its place,
and sent straight from its file. What every wait for bytes ends with is in `transport`; a peer that says nothing for the
idle time is gone.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

from dicom_node.dimse.commands import CommandField
from dicom_node.dimse.link import (
    MAX_WAITING_MESSAGES,
    PATIENT,
    AssociationLost,
    Fragments,
    Message,
    Patience,
    answers,
    cut,
)
from dicom_node.dimse.messages import BadMessage, CommandReceived, DataSetPiece
from dicom_node.dimse.outgoing import StoredDataSet
from dicom_node.dimse.tls_stream import TlsStream
from dicom_node.dimse.transport import TICK_S, Buffers, Transport
from dicom_node.dimse.upper_layer.connection import (
    Connection,
    Data,
    ReleaseAsked,
    UpperEvent,
    UpperLayerMisuse,
    data_header,
)

__all__ = ["Association"]

log = logging.getLogger(__name__)

BATCH = 64  # values in one write: 128 pieces, below IOV_MAX of every system
CORK_S = 0.02  # how long a message may wait for the next one to go out with it


class Association(Transport):
    """An association whose socket is connected; see `link.Link`, and `Transport` for how it lives."""

    def __init__(
        self,
        sock: socket.socket | TlsStream,
        connection: Connection,
        buffers: Buffers,
        *,
        max_data_set_bytes: int,
        idle_timeout_s: float,
        opened_at: float | None = None,
        hosted: bool = False,
        patience: Patience = PATIENT,
    ) -> None:
        super().__init__(sock, connection, buffers, opened_at=opened_at, hosted=hosted, patience=patience)
        self.serving, self.not_before = False, 0.0
        self.idle_timeout_s = idle_timeout_s
        self._max_data_set_bytes = max_data_set_bytes
        self._held: Message | None = None  # came while another was being answered
        self._unread = False  # the data set of the last message is not read to its end
        self._cancelled: dict[int, None] = {}  # in the order in which they came
        self._release_asked = False
        self._corked_at = 0.0
        self._quiet_since = time.monotonic()

    @property
    def idle_until(self) -> float:
        """When (monotonic) it will have been silent for the idle time, should nothing come."""
        return self._quiet_since + self.idle_timeout_s

    # --- receiving

    def check_alive(self) -> None:
        """See `link.Link`. What has come meanwhile is looked at: a C-CANCEL is noted, another message is kept."""
        self._drain()
        while self._held is None and not self._release_asked and not self._over:
            event = self._waiting_event()
            if event is None:
                break
            if isinstance(event, ReleaseAsked):
                self._note_release()
            elif isinstance(event, Data):
                self._held = self._message_of(event)
        if self._over or self._interrupted:
            raise AssociationLost("the association ended")

    @property
    def is_leaving(self) -> bool:
        """See `link.Link`."""
        return self._release_asked

    def stays_quiet(self, timeout_s: float) -> bool:
        """See `link.Link`."""
        self.check_alive()
        if self._held is not None or self._release_asked:
            return False
        if not self._readable(timeout_s):
            return True
        self.check_alive()
        return False

    def release(self) -> None:
        """See `link.Link`. Where the peer has asked for it already, this is the answer."""
        if self._release_asked and not self._over:
            with suppress(UpperLayerMisuse):
                self._connection.answer_release()
                self.released = True
            self._finish()
        else:
            super().release()

    def next_message(self, timeout_s: float) -> Message | None:
        """See `link.Link`."""
        self._drain()
        if self._held is not None:
            message, self._held = self._held, None
            return message
        return self._read_message(timeout_s)

    def _read_message(self, timeout_s: float) -> Message | None:
        """The next message but a C-CANCEL, which is only noted; None after `timeout_s` or when the peer released."""
        until = time.monotonic() + timeout_s
        while not self._release_asked:
            patience_s = self.idle_timeout_s if self._messages.under_way else until - time.monotonic()
            event = self._next_event(max(patience_s, 0.0))
            if event is None:
                if self._messages.under_way:
                    raise self._silent()
                return None
            if isinstance(event, ReleaseAsked):
                self._note_release()
            elif isinstance(event, Data):
                message = self._message_of(event)
                if message is not None:
                    return message
        return None

    def _note_release(self) -> None:
        if self._messages.under_way:
            raise self._cut_short()
        self._release_asked = True

    def _cut_short(self) -> AssociationLost:
        """A release in the middle of a message: to agree would be to say that all was well."""
        log.warning("a message did not come to its end", extra=dict(self.log_fields))
        self._connection.abort()
        self.violation = "the peer released the association in the middle of a message"
        return self._lost(self.violation)

    def _silent(self) -> AssociationLost:
        log.warning("a message did not come to its end", extra=dict(self.log_fields))
        self._connection.abort()
        return self._lost("a message did not come to its end")

    def _message_of(self, data: Data) -> Message | None:
        for item in self._fed(data):
            if not isinstance(item, CommandReceived):
                continue
            command = item.command
            try:
                has_data_set, field = command.has_data_set, command.field
                identity = command.responded_to if field == CommandField.C_CANCEL else command.message_id
            except BadMessage as exc:
                raise self._nonsense(exc) from exc
            if field == CommandField.C_CANCEL and not has_data_set:
                if identity is not None:
                    self._cancelled[identity] = None
                if len(self._cancelled) > MAX_WAITING_MESSAGES:  # of operations that are over long since
                    del self._cancelled[next(iter(self._cancelled))]
                return None
            # a cancel that came after its operation was over must not hit the next one of the same id
            self._cancelled.pop(identity if identity is not None else -1, None)
            self._unread = has_data_set
            return Message(item.context_id, command, self._data_set() if has_data_set else None)
        return None

    def _fed(self, data: Data) -> tuple[()] | tuple[CommandReceived | DataSetPiece]:
        try:
            return self._messages.feed(data)
        except BadMessage as exc:
            raise self._nonsense(exc) from exc

    def _nonsense(self, exc: BadMessage) -> AssociationLost:
        log.warning("message cannot be read", extra={"error": str(exc), **self.log_fields})
        self._connection.abort()
        self.violation = "the peer sent what is no message"
        return self._lost(self.violation)

    def _data_set(self) -> Iterator[memoryview]:
        """The pieces of the data set under way, as they come."""
        length = 0
        while self._unread:
            event = self._next_event(self.idle_timeout_s)
            if event is None:
                raise self._silent()
            if not isinstance(event, Data):
                raise self._cut_short()
            for item in self._fed(event):
                if isinstance(item, CommandReceived):
                    continue
                length += len(item.content)
                if length > self._max_data_set_bytes:
                    raise self._nonsense(BadMessage("a message is larger than allowed"))
                self._unread = not item.last
                if item.content:
                    yield item.content

    def _drain(self) -> None:
        """Read what nobody wanted of the last data set: the next message begins after it."""
        if self._unread and self._held is None:
            for _ in self._data_set():
                pass

    def is_cancelled(self, message_id: int) -> bool:
        """See `link.Link`."""
        self.check_alive()
        return message_id in self._cancelled

    def _waiting_event(self) -> UpperEvent | None:
        event = next(self._events, None)
        if event is not None:
            return self._looked_at(event)
        return self._next_event(0.0) if self._readable(0.0) else None

    # --- sending

    def send_message(
        self, context_id: int, command: bytes, data_set: Fragments | None = None, *, more: bool = False
    ) -> None:
        """See `link.Link`."""
        self._begin_sending()
        size = self._pdu_bytes - 6
        parts, self._corked = self._corked, []
        if more and not parts:
            self._corked_at = time.monotonic()
        for piece, last in cut([command], size) if len(command) > size else ((command, True),):
            parts += (data_header(context_id, is_command=True, last=last, length=len(piece)), piece)
        if isinstance(data_set, StoredDataSet):
            for pdus in data_set.pdus(context_id):
                self._write([*parts, pdus])
                parts = []
        elif data_set is not None:
            for piece, last in cut(data_set, size):
                parts += (data_header(context_id, is_command=False, last=last, length=len(piece)), piece)
                if len(parts) >= 2 * BATCH:
                    self._write(parts)
                    parts = []
        if more and len(parts) < 2 * BATCH and time.monotonic() - self._corked_at < CORK_S:
            self._corked = parts
        elif parts:
            self._write(parts)

    def send_messages(self, context_id: int, command: bytes, data_sets: Sequence[bytes], *, more: bool = False) -> None:
        """See `link.Link`. Where each fits into a PDU of its own they are one piece of bytes."""
        size = self._pdu_bytes - 6
        if len(command) > size or max(map(len, data_sets), default=0) > size:
            for number, data_set in enumerate(data_sets, 1):
                self.send_message(context_id, command, [data_set], more=more or number < len(data_sets))
            return
        self._begin_sending()
        before = data_header(context_id, is_command=True, last=True, length=len(command)) + command
        parts: list[bytes] = []
        for data_set in data_sets:
            head = data_header(context_id, is_command=False, last=True, length=len(data_set))
            parts += (before, head, data_set)
        held, self._corked = self._corked, []
        if not held:
            self._corked_at = time.monotonic()
        held.append(b"".join(parts))
        if more and len(held) < 2 * BATCH and time.monotonic() - self._corked_at < CORK_S:
            self._corked = held
        else:
            self._write(held)

    def _begin_sending(self) -> None:
        """Raises AssociationLost where nothing can be sent any more."""
        self._drain()
        if self._over or self._interrupted:
            raise AssociationLost("the association ended")
        try:
            self._connection.sends_data()
        except UpperLayerMisuse as exc:
            raise self._lost("the association ended") from exc

    def await_response(self, message_id: int, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Message:
        """See `link.Link`."""
        deadline = time.monotonic() + timeout_s
        while True:
            received = self.next_message(min(1.0, max(deadline - time.monotonic(), 0.01)))
            if received is not None:
                if answers(received, message_id):
                    return received
                raise self._given_up("the peer sent an unexpected message")
            if self._release_asked or self._over:
                raise AssociationLost("the peer released the association")
            if time.monotonic() >= deadline:
                raise self._given_up("no response in time")
            if on_wait is not None:
                on_wait()

    def _given_up(self, reason: str) -> AssociationLost:
        """No response can be told from another any more, and whoever waits for one of ours would wait in vain."""
        self._connection.abort()
        return self._lost(reason)

    # --- serving

    def serve(self, answer: Callable[[Message], None], patience_s: Callable[[], float]) -> bool:
        """Answer messages as they come; True when none has begun for `patience_s`: it may rest until there is one.

        False when it is to be ended: it was released, was silent for the idle time, or is lost.
        """
        self.not_before = 0.0
        try:
            while not self._over:
                left = self.idle_until - time.monotonic()
                message = self.next_message(min(patience_s(), left) if left > 0 else 0.0)
                if message is not None:
                    self.serving = True
                    answer(message)
                    self.serving = False
                    self._quiet_since = time.monotonic()
                    if self.not_before and self._pauses():
                        return True
                elif self._release_asked:
                    self._connection.answer_release()
                    self.released = True
                    return False
                elif time.monotonic() >= self.idle_until:
                    self.was_idle = True
                    return False
                else:
                    return True
        except AssociationLost:
            pass
        finally:
            self.serving = False
        return False

    def _pauses(self) -> bool:
        """Whether it is to rest until `not_before`. Where the peer has sent ahead it is waited for here and now."""
        event = next(self._events, None)
        if event is None:
            self._quiet_since = max(self._quiet_since, self.not_before)
            return True
        self._events = chain((event,), self._events)
        while (left := self.not_before - time.monotonic()) > 0.0 and not self._interrupted:
            time.sleep(min(left, TICK_S))
        self._quiet_since, self.not_before = time.monotonic(), 0.0
        return False
