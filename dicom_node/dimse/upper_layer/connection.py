"""One upper layer connection (PS3.8 9): what is received becomes events, what is to be sent becomes bytes.

No socket, no thread, no clock. Whoever drives it reads from the transport and calls `receive`, writes what
`to_send` gives, closes when `closing` says so, and calls `artim_expired` when the ARTIM timer that `artim_running`
asks for has run out. Data is never gathered: a `Data` event is a view of the very bytes that were received, good until
they are overwritten, so a PDU of any length costs no memory. Nothing is ever raised for what a *peer* does: what
breaks the protocol is answered with an A-ABORT and told as `ProtocolError`. UpperLayerMisuse is for the driver.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from dicom_node.dimse.upper_layer.pdus import (
    P_DATA,
    PDU_TYPES,
    Abort,
    AbortReason,
    AssociateAC,
    AssociateRJ,
    AssociateRQ,
    InvalidPdu,
    Pdu,
    ReleaseRP,
    ReleaseRQ,
    decode_pdu,
    encode_pdu,
)
from dicom_node.dimse.upper_layer.states import TRANSITIONS, Action, Event, State
from dicom_node.errors import NodeError

__all__ = [
    "Aborted",
    "Associated",
    "AssociationRefused",
    "AssociationRequested",
    "Connection",
    "ConnectionLost",
    "Data",
    "Limits",
    "ProtocolError",
    "ReleaseAsked",
    "Released",
    "Side",
    "UpperEvent",
    "UpperLayerMisuse",
    "data_header",
]

_DATA_HEAD = struct.Struct(">BxIIBB")  # of a P-DATA-TF and of its first value
HEAD = 6  # bytes before the content of a PDU, and before that of a PDV
_COMMAND, _LAST = 0x01, 0x02  # message control header, PS3.8 annex E.2


class UpperLayerMisuse(NodeError):
    """The driver asked for something that this state does not allow: a fault of ours, never of the peer."""


class Side(Enum):
    """Who opened the transport connection."""

    REQUESTOR = auto()
    ACCEPTOR = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer may send. `pdu_bytes`: of one P-DATA-TF, as it was told; `association_bytes`: of any other PDU."""

    pdu_bytes: int = 131_072
    association_bytes: int = 262_144
    slack_bytes: int = 1024  # some count the header into the maximum length (PS3.8 D.1 says not to)


# --- what happened ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AssociationRequested:
    """Answer with `accept` or `reject`."""

    request: AssociateRQ


@dataclass(frozen=True, slots=True)
class Associated:
    """The peer accepted."""

    answer: AssociateAC


@dataclass(frozen=True, slots=True)
class AssociationRefused:
    """The peer rejected; the connection is to be closed."""

    answer: AssociateRJ


class Data(NamedTuple):  # there is one for every read: the cheapest kind of value
    """A piece of one presentation data value. `last`: the command set or data set ends with it."""

    context_id: int
    is_command: bool
    content: memoryview
    last: bool


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """The peer wants to release; answer with `answer_release` when nothing is left to be sent."""


@dataclass(frozen=True, slots=True)
class Released:
    """The peer agreed to the release. `closing` says whether the connection is to be closed now."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The peer aborted: source 0 its service user, 2 its upper layer."""

    source: int
    reason: int


@dataclass(frozen=True, slots=True)
class ProtocolError:
    """The peer broke the protocol and was sent an A-ABORT. `message` carries none of its values."""

    message: str
    reason: int


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The transport closed under an association, or before one."""


UpperEvent = (
    AssociationRequested
    | Associated
    | AssociationRefused
    | Data
    | ReleaseAsked
    | Released
    | Aborted
    | ProtocolError
    | ConnectionLost
)

_EVENT_OF: dict[type[Pdu], Event] = {
    AssociateRQ: Event.ASSOCIATE_RQ,
    AssociateAC: Event.ASSOCIATE_AC,
    AssociateRJ: Event.ASSOCIATE_RJ,
    ReleaseRQ: Event.RELEASE_RQ,
    ReleaseRP: Event.RELEASE_RP,
    Abort: Event.ABORT,
}
_ARTIM_STARTS = frozenset({Action.AE_5, Action.AE_8, Action.AR_4, Action.AA_1, Action.AA_8})
_ARTIM_STOPS = frozenset({Action.AE_6, Action.AR_5, Action.AA_2, Action.AA_5})
_CLOSES = frozenset({Action.AE_4, Action.AR_3, Action.AA_2, Action.AA_3})
_NEXT: dict[Action, State] = {
    **{Action.AE_1: State.STA4, Action.AE_2: State.STA5, Action.AE_3: State.STA6, Action.AE_4: State.STA1},
    **{Action.AE_5: State.STA2, Action.AE_6: State.STA3, Action.AE_7: State.STA6, Action.AE_8: State.STA13},
    **{Action.DT_1: State.STA6, Action.DT_2: State.STA6},
    **{Action.AR_1: State.STA7, Action.AR_2: State.STA8, Action.AR_3: State.STA1, Action.AR_4: State.STA13},
    **{Action.AR_5: State.STA1, Action.AR_6: State.STA7, Action.AR_7: State.STA8},
    **{Action.AR_9: State.STA11, Action.AR_10: State.STA12},
    **{Action.AA_1: State.STA13, Action.AA_2: State.STA1, Action.AA_3: State.STA1, Action.AA_4: State.STA1},
    **{Action.AA_5: State.STA1, Action.AA_6: State.STA13, Action.AA_7: State.STA13, Action.AA_8: State.STA13},
}


# looking up a member of an enumeration costs more than most of what is done with it
_STA1, _STA6, _STA7, _STA8, _STA9, _STA10 = State.STA1, State.STA6, State.STA7, State.STA8, State.STA9, State.STA10


class Connection:
    """The upper layer of one transport connection that is open."""

    def __init__(self, side: Side, limits: Limits = Limits()) -> None:
        self._side = side
        self._limits = limits
        self._out = bytearray()
        self.artim_running = False
        self.closing = False
        self._state = _STA1
        self._reader = _Reader(limits)
        self._ids: frozenset[int] = frozenset()  # of contexts that were accepted
        self._answers_release = False
        if side is Side.ACCEPTOR:
            self._do(Event.TRANSPORT_ACCEPTED)

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    @property
    def in_pdu(self) -> bool:
        """Whether a PDU has begun to come and has not ended."""
        return self._reader.in_pdu

    @property
    def pdus(self) -> int:
        """How many PDUs have begun to come."""
        return self._reader.pdus

    @property
    def established(self) -> bool:
        """Whether data may be sent: it may until a release was asked for by us, or answered."""
        return self._state in (_STA6, _STA8)

    @property
    def has_to_send(self) -> bool:
        """Whether `to_send` would give something."""
        return bool(self._out)

    def to_send(self) -> bytes:
        """What is to be written to the transport now, before anything else; gives it once."""
        if not self._out:
            return b""
        out = bytes(self._out)
        self._out.clear()
        return out

    # --- what the driver wants

    def request(self, request: AssociateRQ) -> None:
        """Ask for an association, as the one who opened the transport."""
        if self._side is Side.ACCEPTOR:
            raise UpperLayerMisuse("an acceptor does not request an association")
        self._do(Event.ASSOCIATE_REQUEST)
        self._out += encode_pdu(request)
        self._do(Event.TRANSPORT_OPENED)

    def accept(self, answer: AssociateAC) -> None:
        """Accept what was asked for."""
        encoded = encode_pdu(answer)
        self._do(Event.ACCEPT_RESPONSE)
        self._ids = _accepted(answer)
        self._out += encoded

    def reject(self, answer: AssociateRJ) -> None:
        """Reject what was asked for; the peer closes."""
        self._do(Event.REJECT_RESPONSE)
        self._out += encode_pdu(answer)

    def sends_data(self) -> None:
        """Say that P-DATA is about to be written, head (`data_header`) and content, by the driver itself."""
        if self._state not in (_STA6, _STA8):
            raise UpperLayerMisuse(f"no data can be sent: {self._state.value}")

    def release(self) -> None:
        """Ask for the release; events go on until `Released`."""
        self._do(Event.RELEASE_REQUEST)
        self._out += encode_pdu(ReleaseRQ())

    def answer_release(self) -> None:
        """Agree to the release that the peer asked for; where both asked, at the moment the Standard gives."""
        if self._state is _STA10:  # the acceptor's answer comes after the requestor's
            self._answers_release = True
            return
        self._do(Event.RELEASE_RESPONSE)
        self._out += encode_pdu(ReleaseRP())

    def abort(self) -> None:
        """End it at once, as the service user. Nothing happens where it has ended already."""
        if (Event.ABORT_REQUEST, self._state) in TRANSITIONS:
            self._do(Event.ABORT_REQUEST)
            self._out += encode_pdu(Abort(source=0))

    def refuse(self) -> None:
        """End it at once, as the upper layer: a parameter of the peer's request has no valid value (PS3.8 9.3.8)."""
        self._do(Event.INVALID_PDU)
        self._out += encode_pdu(Abort(source=2, reason=AbortReason.INVALID_PARAMETER))

    def artim_expired(self) -> None:
        """The time to wait for the peer's first PDU, or for its close, is over."""
        if (Event.ARTIM_EXPIRED, self._state) in TRANSITIONS:
            self._do(Event.ARTIM_EXPIRED)

    # --- what the transport brings

    def receive(self, received: memoryview) -> Iterator[UpperEvent]:
        """The events in `received`, one by one: the views in them are good until `received` is overwritten.

        Iterate to the end, or what is left of `received` is lost. What comes after the end of an association is
        passed over.
        """
        position, end = 0, len(received)
        reader = self._reader
        while position < end and self._state is not _STA1 and not reader.deaf:
            try:
                position, found = reader.step(received, position)
            except InvalidPdu as exc:
                yield from self._invalid(str(exc), exc.abort_reason)
                return
            if found is None:
                continue
            if isinstance(found, Data):
                if self._state is _STA6 and found.context_id in self._ids:
                    yield found
                else:
                    yield from self._data(found)
            else:
                yield from self._pdu(found)

    def receive_end(self) -> Iterator[UpperEvent]:
        """The events of a transport that was closed or broke."""
        if self._state is _STA1:
            return
        action = self._do(Event.TRANSPORT_CLOSED)
        self.closing = True
        if action is Action.AA_4:
            yield ConnectionLost()

    def _data(self, data: Data) -> Iterator[UpperEvent]:
        if self._state in (_STA6, _STA7):
            if data.context_id in self._ids:
                yield data
            else:
                yield from self._invalid("data in a presentation context that was not accepted", 6)
            return
        action = self._do(Event.P_DATA_TF)
        yield from self._consequences(action, "data when none may come", AbortReason.UNEXPECTED_PDU)

    def _pdu(self, pdu: Pdu) -> Iterator[UpperEvent]:
        action = self._do(_EVENT_OF[type(pdu)])
        if action is Action.AE_6 and isinstance(pdu, AssociateRQ):
            if not pdu.protocol_version & 1:  # PS3.8 9.3.2: bit 0; nothing else is looked at
                self.reject(AssociateRJ(result=1, source=2, reason=2))
                yield ProtocolError("a protocol version that is not known", AbortReason.NOT_SPECIFIED)
                return
            yield AssociationRequested(pdu)
        elif action is Action.AE_3 and isinstance(pdu, AssociateAC):
            self._ids = _accepted(pdu)
            yield Associated(pdu)
        elif action is Action.AE_4 and isinstance(pdu, AssociateRJ):
            yield AssociationRefused(pdu)
        elif action in (Action.AR_2, Action.AR_8):
            yield ReleaseAsked()
        elif action in (Action.AR_3, Action.AR_10):
            if self._answers_release:
                self.answer_release()
            yield Released()
        elif action is Action.AA_3 and isinstance(pdu, Abort):
            yield Aborted(pdu.source, pdu.reason)
        else:
            yield from self._consequences(action, "a PDU that has no place here", AbortReason.UNEXPECTED_PDU)

    def _invalid(self, message: str, reason: int) -> Iterator[UpperEvent]:
        self._reader.deaf = True  # where the next PDU would begin nobody knows
        yield from self._consequences(self._do(Event.INVALID_PDU), message, reason)

    def _consequences(self, action: Action, message: str, reason: int) -> Iterator[UpperEvent]:
        if action not in (Action.AA_1, Action.AA_7, Action.AA_8):
            return
        # before there is an association the Standard lets the service user abort it (PS3.8 table 9-9, AA-1)
        self._out += encode_pdu(Abort(source=0) if action is Action.AA_1 else Abort(source=2, reason=reason))
        self._reader.deaf = True
        if action is not Action.AA_7:  # that the association had ended is known
            yield ProtocolError(message, reason)

    # --- the machine

    def _do(self, event: Event) -> Action:
        action = TRANSITIONS.get((event, self._state))
        if action is None:
            raise UpperLayerMisuse(f"{event.name} has no meaning: {self._state.value}")
        if action in _ARTIM_STARTS:
            self.artim_running = True
        elif action in _ARTIM_STOPS:
            self.artim_running = False
        if action is Action.AR_8:  # the only one whose outcome depends on the side (PS3.8 table 9-8)
            self._state = _STA9 if self._side is Side.REQUESTOR else _STA10
        else:
            self._state = _NEXT[action]
        if action in _CLOSES:
            self.closing = True
        return action


def data_header(context_id: int, *, is_command: bool, last: bool, length: int) -> bytes:
    """The 12 bytes before a presentation data value of `length` bytes that is alone in its PDU (PS3.8 9.3.5, E.2)."""
    control = (_COMMAND if is_command else 0) | (_LAST if last else 0)
    return _DATA_HEAD.pack(P_DATA, length + 6, length + 2, context_id, control)


def _accepted(answer: AssociateAC) -> frozenset[int]:
    return frozenset(context.context_id for context in answer.contexts if context.result == 0)


class _Reader:
    """Cuts the stream into PDUs, and P-DATA-TF into pieces of values; keeps at most one other PDU."""

    def __init__(self, limits: Limits) -> None:
        self.deaf = False
        self.pdus = 0
        self._limits = limits
        self._head = bytearray()  # of a PDU or a value, as far as it has come
        self._kind = 0  # of the PDU under way; 0 = its head is awaited
        self._left = 0  # bytes of the PDU that are still to come
        self._body = bytearray()  # of a PDU other than P-DATA-TF
        self._value_left = -1  # bytes of the value that are still to come; -1 = its head is awaited
        self._context_id = 0
        self._control = 0

    @property
    def in_pdu(self) -> bool:
        return bool(self._kind or self._head)

    def step(self, received: memoryview, position: int) -> tuple[int, Pdu | Data | None]:
        """Go on from `position`; the new position, and what was completed by it, if anything. Raises InvalidPdu."""
        if self._kind == 0:
            return self._read_whole(received, position) or self._read_head(received, position)
        if self._kind == P_DATA:
            return self._read_data(received, position)
        taken = min(self._left, len(received) - position)
        self._body += received[position : position + taken]
        self._left -= taken
        return position + taken, None if self._left else self._whole()

    def _read_whole(self, received: memoryview, position: int) -> tuple[int, Data] | None:
        """A whole P-DATA-TF with a single value, as most commands come; None for all else, which is looked at twice."""
        if self._head or len(received) - position < _DATA_HEAD.size:
            return None
        kind, length, value_length, context_id, control = _DATA_HEAD.unpack_from(received, position)
        end = position + HEAD + length
        if kind != P_DATA or value_length != length - 4 or value_length < 2 or end > len(received):
            return None
        if length > self._limits.pdu_bytes:
            return None
        self.pdus += 1
        content = received[position + _DATA_HEAD.size : end]
        return end, Data(context_id, bool(control & _COMMAND), content, bool(control & _LAST))

    def _gather(self, received: memoryview, position: int) -> tuple[int, bytes | None]:
        """Six bytes of a head, wherever they were cut."""
        if not self._head and len(received) - position >= HEAD:
            return position + HEAD, bytes(received[position : position + HEAD])
        taken = min(HEAD - len(self._head), len(received) - position)
        self._head += received[position : position + taken]
        if len(self._head) < HEAD:
            return position + taken, None
        head = bytes(self._head)
        self._head.clear()
        return position + taken, head

    def _read_head(self, received: memoryview, position: int) -> tuple[int, Pdu | Data | None]:
        if not self._head:
            self.pdus += 1
        position, head = self._gather(received, position)
        if head is None:
            return position, None
        kind, length = struct.unpack(">BxI", head)
        if kind not in PDU_TYPES:
            raise InvalidPdu("a PDU of a type that does not exist", AbortReason.UNRECOGNIZED_PDU)
        limits = self._limits
        longest = limits.pdu_bytes + limits.slack_bytes if kind == P_DATA else limits.association_bytes
        if length > longest:
            raise InvalidPdu(f"a PDU of {length} bytes, {longest} is the most")
        if kind == P_DATA and length < HEAD:
            raise InvalidPdu("a P-DATA-TF PDU without a value")
        self._kind, self._left = kind, length
        if length == 0:
            return position, self._whole()
        return position, None

    def _whole(self) -> Pdu:
        kind, body = self._kind, bytes(self._body)
        self._kind = 0
        self._body = bytearray()
        return decode_pdu(kind, body)

    def _read_data(self, received: memoryview, position: int) -> tuple[int, Data | None]:
        if self._value_left < 0:
            position, head = self._gather(received, position)
            if head is None:
                return position, None
            length, self._context_id, self._control = struct.unpack(">IBB", head)
            self._left -= HEAD
            if length < 2 or length - 2 > self._left:
                raise InvalidPdu("a value that is not as long as it says")
            if 0 < self._left - (length - 2) < HEAD:
                raise InvalidPdu("bytes are left over after the last value of a PDU")
            self._value_left = length - 2
        taken = min(self._value_left, len(received) - position)
        if taken == 0 and self._value_left:
            return position, None
        self._value_left -= taken
        self._left -= taken
        content = received[position : position + taken]
        ends = self._value_left == 0
        if ends:
            self._value_left = -1
            if self._left == 0:
                self._kind = 0
        last = ends and bool(self._control & _LAST)
        return position + taken, Data(self._context_id, bool(self._control & _COMMAND), content, last)
