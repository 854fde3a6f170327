"""pynetdicom with its gaps closed: one association, as acceptor or as requestor, that moves bytes and nothing else.

What is replaced, and why (each is a fault seen on a stock pynetdicom SCP):

* Reading has a deadline per PDU and a bound on its length; the socket is polled, so descriptors above 1023 work.
* Sending goes past the state machine's copies through a bounded queue, so a slow reader costs no memory.
* Every message is bounded: command set, data set, queue of messages, empty fragments. What breaks a bound or cannot
  be parsed ends in an A-ABORT, never in silence.
* Requests reach `on_request` as they came, incomplete ones too; pynetdicom's own services are not used.
* Nothing of an identifier is ever logged.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydicom import config as pydicom_config
from pynetdicom import _config as pynetdicom_config
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, A_RELEASE, P_DATA
from pynetdicom.transport import AssociationSocket

from dicom_node.dimse.commands import CommandField
from dicom_node.dimse.link import (
    MAX_COMMAND_SET,
    MAX_PDU_SENT,
    MAX_WAITING_MESSAGES,
    PATIENT,
    SMALLEST_PDU,
    AgreedContext,
    AssociationLost,
    Fragments,
    Message,
    Patience,
    answers,
    cut,
)
from dicom_node.dimse.messages import BadMessage, Command, CommandReceived, MessageReader
from dicom_node.dimse.upper_layer.connection import Data
from dicom_node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

__all__ = ["PynetdicomLink", "name_implementation", "quiet_libraries"]

log = logging.getLogger(__name__)

MAX_FIRST_PDU = 256 * 1024
IN_MEMORY = 16 * 1024 * 1024  # of one data set; what is longer waits in an unnamed file
MAX_DISCARDED = 4 * 1024 * 1024
QUEUED_PDUS = 16
QUIET_S = 0.5  # an association without traffic for this long ...
IDLE_WAIT_S = 0.025  # ... is waited for in pieces of this; what arrives wakes it at once
_POLL_S = 0.0005
_LOOK_S = 0.01


def quiet_libraries() -> None:
    """Keep patient data out of the logs: pynetdicom must not print identifiers, pydicom must not warn with values."""
    pynetdicom_config.LOG_HANDLER_LEVEL = "none"
    pynetdicom_config.LOG_REQUEST_IDENTIFIERS = False
    pynetdicom_config.LOG_RESPONSE_IDENTIFIERS = False
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE


def name_implementation(entity: ApplicationEntity) -> None:
    """Say who the node is, not on what it runs: peers key what they know of its quirks on these (PS3.7 D.3.3.2)."""
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME


class _Socket(AssociationSocket):
    """A connection with deadlines and bounds."""

    def __init__(self, link: PynetdicomLink, client: socket.socket | None, address: Any | None) -> None:
        super().__init__(link, client_socket=client, address=address)
        self._link = link
        self._poll: select.poll | None = None
        if client is not None:
            _tune(client, link.patience)

    def connect(self, primitive: Any) -> None:
        """As the base class; a connection that was made gets the deadlines of this one."""
        super().connect(primitive)
        if self.socket is not None:
            _tune(self.socket, self._link.patience)

    @property
    def ready(self) -> bool:
        """Whether there is something to read; a broken connection counts, reading finds out."""
        if self.socket is None or not self._is_connected:
            return False
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.socket, select.POLLIN)
        return bool(self._poll.poll(IDLE_WAIT_S * 1000 if self._link.is_quiet() else 0))

    def recv(self, nr_bytes: int) -> bytearray:
        """Exactly `nr_bytes`, fewer when the peer closed. Raises OSError past the deadline or the bound."""
        connection, link = self.socket, self._link
        if connection is None:
            return bytearray()
        negotiated = link.requestor.primitive is not None
        if nr_bytes > (max(MAX_FIRST_PDU, link.max_pdu + 1024) if negotiated else MAX_FIRST_PDU):
            self.event_queue.put("Evt19")  # A-ABORT, then closed
            raise OSError("a PDU is longer than was agreed")
        deadline = time.monotonic() + (link.patience.pdu_s if negotiated else link.patience.first_pdu_s)
        data = bytearray(nr_bytes)
        view, done = memoryview(data), 0
        while done < nr_bytes:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            received = connection.recv_into(view[done:])
            if not received:
                break
            done += received
        view.release()
        del data[done:]
        connection.settimeout(link.patience.send_s)
        # Peers that leave Nagle on (dcmtk) send 12 bytes and wait for our ACK: do not delay it
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def discard(self) -> None:
        """Take what has arrived and forget it: closing over unread bytes would cost the peer our last PDU."""
        if self.socket is not None:
            self.socket.settimeout(0.0)
            with contextlib.suppress(OSError):
                for _ in range(MAX_DISCARDED // MAX_COMMAND_SET):
                    if not self.socket.recv(MAX_COMMAND_SET):
                        break

    def _shutdown_socket(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()

    def send(self, bytestream: bytes) -> None:
        """Send everything or report the connection as closed."""
        try:
            if self.socket is None:
                raise OSError("not connected")
            self.socket.sendall(bytestream)
        except OSError:
            self.event_queue.put("Evt17")


def _tune(connection: socket.socket, patience: Patience) -> None:
    connection.settimeout(patience.send_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class _EncodedPdu(P_DATA):
    """A P-DATA-TF PDU that is ready to go out."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


class _Dul(DULServiceProvider):
    """Sends ready-made PDUs, and answers what it cannot decode with an A-ABORT."""

    def __init__(self, link: PynetdicomLink) -> None:
        super().__init__(link)
        self.daemon = True
        self._link = link

    def idle_timer_expired(self) -> bool:
        """As the base class, whose caller then aborts; the link keeps whether something was under way."""
        expired = bool(super().idle_timer_expired())
        if expired:
            self._link.was_idle = self._link.messages.idle
        return expired

    def _process_recv_primitive(self) -> bool:
        waiting = self.to_provider_queue
        if self.state_machine.current_state == "Sta13":
            # what was to be answered when the association was aborted: no event of the user's has a meaning there
            # (PS3.8 table 9-10), and pynetdicom's thread would end of it, with the connection open
            while waiting.queue:
                waiting.get_nowait()
        while waiting.queue and isinstance(pdu := waiting.queue[0], _EncodedPdu):
            waiting.get_nowait()
            # PS3.8 table 9-10: P-DATA may go out in Sta6 only; after an abort what is queued is void
            if self.state_machine.current_state == "Sta6" and self.socket is not None:
                self.socket.send(pdu.data)
                self._idle_timer.restart()
        return bool(super()._process_recv_primitive())

    def _is_transport_event(self) -> bool:
        if not self.event_queue.empty():
            return False  # an event may end the connection: reading on before it was seen would block
        if self.state_machine.current_state == "Sta13" and isinstance(self.socket, _Socket):
            self.socket.discard()
            self.socket.close()
            return True
        return bool(super()._is_transport_event())

    def _decode_pdu(self, bytestream: bytearray) -> Any:
        pdu, event = super()._decode_pdu(bytestream)
        if isinstance(pdu, A_ASSOCIATE_RQ):
            pdu.to_primitive()  # raises here, where it becomes Evt19, what would end this thread later
        return pdu, event


class _DataSet:
    """A data set that is gathered: in memory, and what is too long for it in an unnamed file.

    Of one that is longer than `most` so much is kept that this can be seen.
    """

    def __init__(self, folder: Path | None, most: int | None = None) -> None:
        self._folder, self._most = folder, most
        self._memory = bytearray()
        self._file: Any = None
        self.length = 0

    def write(self, data: memoryview) -> None:
        """Append. Raises OSError."""
        is_too_long = self._most is not None and self.length > self._most
        self.length += len(data)
        if is_too_long:
            return
        if self._file is None and self.length > IN_MEMORY:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed when read
        if self._file is None:
            self._memory += data
        else:
            self._file.write(data)

    def read_back(self) -> Fragments:
        """Everything written, once."""
        return chain([memoryview(self._memory)] if self.length else (), self._rest())

    def _rest(self) -> Iterator[bytes]:
        if self._file is not None:
            with self._file as file:
                file.seek(0)
                while piece := file.read(IN_MEMORY // 16):
                    yield piece


class _Dimse(DIMSEServiceProvider):
    """Puts messages together within bounds, by the reader of the node's own wire."""

    def __init__(self, link: PynetdicomLink) -> None:
        super().__init__(link)
        self._link = link
        self._reader = MessageReader()
        self._command: CommandReceived | None = None
        self._data_set = _DataSet(None)
        self.cancelled: dict[int, None] = {}  # in the order in which they came

    @property
    def idle(self) -> bool:
        """Whether no message has begun to come, and none waits."""
        return not self._reader.under_way and self.msg_queue.empty()

    def get_msg(self, block: bool = False) -> Any:
        """The next message; (None, None) when there is none. A quiet association is looked at less often."""
        try:
            return self.msg_queue.get(timeout=IDLE_WAIT_S) if self._link.is_quiet() else self.msg_queue.get_nowait()
        except queue.Empty:
            return None, None

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take in the PDVs of one PDU; they may belong to several messages (PS3.8 annex E)."""
        self._link.traffic = True
        self._link.active_at = time.monotonic()
        try:
            for context_id, value in primitive.presentation_data_value_list:
                control = value[0]
                self._receive(Data(context_id, bool(control & 1), memoryview(value)[1:], bool(control & 2)))
        except Exception as exc:  # noqa: BLE001 - the SCP edge: whatever a peer's bytes do ends in an A-ABORT
            log.warning("message cannot be read", extra={"error": type(exc).__name__, **self._link.log_fields})
            self._link.violation = "the peer sent what is no message"
            self._reader = MessageReader()
            self.dul.event_queue.put("Evt19")

    def _receive(self, data: Data) -> None:
        if data.context_id not in self._link._accepted_cx:
            raise BadMessage("data in a presentation context that was not accepted")
        for item in self._reader.feed(data):
            if isinstance(item, CommandReceived):
                if item.command.has_data_set:
                    self._command = item
                    self._data_set = _DataSet(self._link.spool_folder, self._link.max_kept_bytes)
                else:
                    self._deliver(item.context_id, item.command, None)
                continue
            self._data_set.write(item.content)
            if self._data_set.length > self._link.max_data_set_bytes:
                raise BadMessage("a message is larger than allowed")
            if item.last and self._command is not None:
                self._deliver(item.context_id, self._command.command, self._data_set.read_back())
                self._command, self._data_set = None, _DataSet(None)

    def _deliver(self, context_id: int, command: Command, data_set: Fragments | None) -> None:
        if command.field == CommandField.C_CANCEL and data_set is None:
            self.cancelled[command.responded_to or 0] = None
            if len(self.cancelled) > MAX_WAITING_MESSAGES:  # of operations that are over long since
                del self.cancelled[next(iter(self.cancelled))]
            return
        if self.msg_queue.qsize() >= MAX_WAITING_MESSAGES:
            raise BadMessage("too many messages wait")
        if command.message_id is not None:
            # a cancel that came after its operation was over must not hit the next one of the same id
            self.cancelled.pop(command.message_id, None)
        waiting: Any = self.msg_queue  # of pynetdicom's primitives; ours take their place
        waiting.put((context_id, Message(context_id, command, data_set)))


class PynetdicomLink(Association):
    """One association. As acceptor it runs its own thread and calls `on_request` with each request; as requestor it
    is driven by the caller's thread.

    A data set of more than `max_data_set_bytes` ends it; what one has beyond `max_kept_bytes` is not kept.
    `traffic` is set by every P-DATA PDU received; the owner clears it. What of a data set does not fit memory waits in
    `spool_folder` (None: the system's temporary folder). `was_idle`: it was closed from here because of the idle limit,
    and not inside a message.
    """

    def __init__(
        self,
        entity: ApplicationEntity,
        mode: str,
        *,
        max_pdu: int,
        max_data_set_bytes: int,
        max_kept_bytes: int | None = None,
        patience: Patience = PATIENT,
    ) -> None:
        super().__init__(entity, mode)
        self.patience = patience
        self.max_pdu = max_pdu
        self.max_data_set_bytes, self.max_kept_bytes = max_data_set_bytes, max_kept_bytes
        self.spool_folder: Path | None = None
        self.active_at = time.monotonic()
        self.messages = _Dimse(self)
        self.dimse = self.messages
        timeout = self.dul.artim_timer.timeout
        self.dul = _Dul(self)
        self.dul.artim_timer.timeout = timeout
        self.network_timeout = entity.network_timeout
        self.traffic = False
        self.serving, self.not_before = False, 0.0
        self.was_idle = False
        self.log_fields: Mapping[str, str] = {}
        self.violation = ""  # see `transport.Transport`
        self.on_associate: Callable[[PynetdicomLink], None] | None = None
        self.on_request: Callable[[PynetdicomLink, Message], None] | None = None
        self.on_end: Callable[[PynetdicomLink], None] | None = None

    def is_quiet(self) -> bool:
        """Whether nothing has happened for a while: pynetdicom's two threads, which poll every ms, may then wait."""
        return self.is_established and self.is_acceptor and time.monotonic() - self.active_at > QUIET_S

    def _bind_defaults(self) -> None:
        """No handlers: pynetdicom's own log what must not be logged."""

    def use_socket(self, client: socket.socket | None = None, address: Any | None = None) -> None:
        """Set the connection to use: an accepted one, or a new one bound to `address`."""
        self.set_socket(_Socket(self, client, address))

    # --- as acceptor

    def run_reactor(self) -> None:
        """The thread of an acceptor: wait for the request, negotiate, serve until the association ends."""
        try:
            self.dul.start()
            self._started_dul = True
            self._dul_ready.wait(self.patience.first_pdu_s)
            primitive = self._first_primitive()
            if isinstance(primitive, A_ASSOCIATE) and self.on_associate is not None:
                self.requestor.primitive = primitive
                self.on_associate(self)
                if self.is_established:
                    self._run_reactor()
        except Exception:
            log.exception("association failed", extra=self.log_fields)
        finally:
            self.is_established = False
            self.dul.kill_dul()
            self.close_socket()
            if self.on_end is not None:
                self.on_end(self)

    def _first_primitive(self) -> Any:
        deadline, opened = time.monotonic() + self.patience.first_pdu_s + 1.0, False
        while time.monotonic() < deadline and self.dul.is_alive():
            primitive = self.dul.receive_pdu(wait=True, timeout=0.02)
            state = self.dul.state_machine.current_state
            opened = opened or state != "Sta1"  # the other thread may not have come to it yet
            # Sta1 after the start: the peer closed or aborted, or the ARTIM timer ran out
            if primitive is not None or state == "Sta13" or (opened and state == "Sta1"):
                return primitive
        return None

    @property
    def contexts(self) -> Mapping[int, AgreedContext]:
        """See `link.Link`."""
        return {
            int(item.context_id or 0): AgreedContext(
                context_id=int(item.context_id or 0),
                abstract_syntax=str(item.abstract_syntax),
                transfer_syntax=str(item.transfer_syntax[0]),
                we_ask=bool(item.as_scu),
                peer_asks=bool(item.as_scp),
            )
            for item in self.accepted_contexts
        }

    @property
    def pdu_bytes(self) -> int:
        """See `link.Link`."""
        return 0

    def _serve_request(self, msg: Any, context_id: int) -> None:
        if self.on_request is None or self._sent_release:
            return
        self.serving = True
        self._is_paused = True
        try:
            self.on_request(self, msg)
        finally:
            self._is_paused = False
            self.serving = False
            self.active_at = time.monotonic()
            self.dul._idle_timer.restart()

    def is_cancelled(self, message_id: int) -> bool:
        """Whether a C-CANCEL for this request came. Raises AssociationLost when the association is gone."""
        self.check_alive()
        return message_id in self.messages.cancelled

    # --- both

    def check_alive(self) -> None:
        """Raises AssociationLost when the peer or the connection is gone."""
        if not self.is_established or not self.dul.is_alive() or self.acse.is_aborted() or self._kill:
            raise AssociationLost("the association ended")

    @property
    def is_leaving(self) -> bool:
        """See `link.Link`."""
        return isinstance(self.dul.peek_next_pdu(), A_RELEASE)

    def stays_quiet(self, timeout_s: float) -> bool:
        """See `link.Link`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.check_alive()
            if not self.dimse.msg_queue.empty() or self.dul.peek_next_pdu() is not None:
                return False
            if time.monotonic() >= deadline:
                return True
            time.sleep(_LOOK_S)

    def send_message(
        self, context_id: int, command: bytes, data_set: Fragments | None = None, *, more: bool = False
    ) -> None:
        """Queue one message. Returns when its last byte is queued, which is bounded by the peer's reading.

        Raises AssociationLost.
        """
        largest = self.dimse.maximum_pdu_size or MAX_PDU_SENT
        if largest < SMALLEST_PDU:
            self.abort(block=False)
            raise AssociationLost(f"the peer takes only {largest} bytes at once, {SMALLEST_PDU} are needed")
        size = min(largest, MAX_PDU_SENT) - 6
        for chunk, last in cut([command], size):
            self._send_pdu(context_id, 0x01 | (0x02 if last else 0), chunk)
        if data_set is not None:
            for chunk, last in cut(data_set, size):
                self._send_pdu(context_id, 0x02 if last else 0, chunk)

    def send_messages(self, context_id: int, command: bytes, data_sets: Sequence[bytes], *, more: bool = False) -> None:
        """See `link.Link`."""
        for data_set in data_sets:
            self.send_message(context_id, command, [data_set], more=more)

    def _send_pdu(self, context_id: int, control: int, chunk: bytes | memoryview) -> None:
        header = struct.pack(">BBIIBB", 4, 0, len(chunk) + 6, len(chunk) + 2, context_id, control)
        deadline = time.monotonic() + self.patience.send_s + self.patience.pdu_s
        while self.dul.to_provider_queue.qsize() >= QUEUED_PDUS:
            self.check_alive()
            if time.monotonic() > deadline:
                raise AssociationLost("the peer does not read")
            time.sleep(_POLL_S)
        self.check_alive()
        self.active_at = time.monotonic()
        self.dul.to_provider_queue.put(_EncodedPdu(header + bytes(chunk)))

    def next_message(self, timeout_s: float) -> Message | None:
        """The next request or response, None after `timeout_s`. Raises AssociationLost."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(queue.Empty):
                message: Any = self.dimse.msg_queue.get(timeout=min(0.2, timeout_s))[1]
                if isinstance(message, Message):
                    return message
            self.check_alive()
            if time.monotonic() >= deadline:
                return None

    def await_response(self, message_id: int, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Message:
        """See `link.Link`."""
        deadline = time.monotonic() + timeout_s
        while True:
            received = self.next_message(min(1.0, max(deadline - time.monotonic(), 0.01)))
            if received is not None:
                if answers(received, message_id):
                    return received
                self.abort()  # whoever waits for a response of ours would wait in vain
                raise AssociationLost("the peer sent an unexpected message")
            if isinstance(self.dul.peek_next_pdu(), A_RELEASE):
                raise AssociationLost("the peer released the association")
            if time.monotonic() >= deadline:
                self.abort()
                raise AssociationLost("no response in time")
            if on_wait is not None:
                on_wait()

    def abort(self, block: bool = True) -> None:
        """As the base class; as requestor nothing of it is left then."""
        if self.is_established or self.is_acceptor:
            super().abort(block)
        if self.is_requestor:
            self._end()

    def release(self) -> None:
        """As the base class, where there is an association; nothing of it is left then."""
        if self.is_established:
            super().release()
        self._end()

    def _end(self) -> None:
        self.dul.kill_dul()
        self.close_socket()

    def close_socket(self) -> None:
        """Make sure that the connection is closed. Idempotent."""
        holder = self.dul.socket
        if holder is not None and holder.socket is not None:
            holder._shutdown_socket()
