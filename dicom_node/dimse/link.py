"""What services and senders need of an association, whichever wire carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dicom_node.dimse.messages import BadMessage, Command
from dicom_node.errors import NodeError

__all__ = [
    "FIRST_PDU_S",
    "MAX_COMMAND_SET",
    "MAX_PDU_SENT",
    "MAX_WAITING_MESSAGES",
    "PATIENT",
    "PDU_S",
    "SEND_S",
    "SMALLEST_PDU",
    "AgreedContext",
    "AssociationLost",
    "Fragments",
    "Link",
    "Message",
    "Patience",
    "answers",
    "cut",
    "gathered",
]

Fragments = Iterable[bytes | memoryview]

FIRST_PDU_S = 10.0  # a whole A-ASSOCIATE-RQ must be there this long after TCP connected
PDU_S = 20.0  # a PDU that has begun must be complete after this
SEND_S = 20.0  # a peer that reads nothing for this long is gone
MAX_COMMAND_SET = 64 * 1024
MAX_WAITING_MESSAGES = 64
MAX_PDU_SENT = 128 * 1024
SMALLEST_PDU = 128  # a peer that takes less at once would keep the node at its headers


class Patience(NamedTuple):
    """How long a peer is waited for: its first PDU, any other that has begun, and that it reads."""

    first_pdu_s: float = FIRST_PDU_S
    pdu_s: float = PDU_S
    send_s: float = SEND_S


PATIENT = Patience()


class AssociationLost(NodeError):
    """The association was aborted, its connection broke, or the peer did not answer in time."""

    retryable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedContext:
    """An accepted presentation context. `we_ask`, `peer_asks`: who may send requests in it (PS3.7 D.3.3.4)."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    we_ask: bool
    peer_asks: bool


class Message(NamedTuple):
    """A DIMSE message. `data_set`, None when it has none, can be read once: each piece is good until the next one."""

    context_id: int
    command: Command
    data_set: Fragments | None = None


class Link(Protocol):
    """One association, used from one thread at a time. Every method but `abort` raises AssociationLost."""

    log_fields: Mapping[str, str]
    not_before: float
    """When (monotonic) the next request may be read; 0.0: as soon as it comes."""

    @property
    def contexts(self) -> Mapping[int, AgreedContext]:
        """The accepted contexts by their ids."""
        ...

    @property
    def pdu_bytes(self) -> int:
        """The longest P-DATA-TF of a `StoredDataSet` that is sent; 0: this wire reads it and makes PDUs by itself."""
        ...

    def check_alive(self) -> None:
        """Nothing, while the association is there."""
        ...

    @property
    def is_leaving(self) -> bool:
        """Whether the peer has asked to release it, as far as that was looked at. Raises nothing."""
        ...

    def stays_quiet(self, timeout_s: float) -> bool:
        """Whether the peer says nothing for so long: neither a message nor that it leaves."""
        ...

    def is_cancelled(self, message_id: int) -> bool:
        """Whether a C-CANCEL for this request of the peer came."""
        ...

    def send_message(
        self, context_id: int, command: bytes, data_set: Fragments | None = None, *, more: bool = False
    ) -> None:
        """Send one message; returns when its last byte is on its way. OSError of `data_set` passes through.

        `more`: another one follows at once, and this one may go out with it.
        """
        ...

    def send_messages(self, context_id: int, command: bytes, data_sets: Sequence[bytes], *, more: bool = False) -> None:
        """Send one message for each data set, all with this command set, as `send_message` would one after the other.

        `more` is that of the last one.
        """
        ...

    def next_message(self, timeout_s: float) -> Message | None:
        """The next request or response, None when none has begun after `timeout_s`."""
        ...

    def await_response(self, message_id: int, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Message:
        """The response to a request of ours; `on_wait` is called about once a second meanwhile.

        Anything else that arrives breaks the protocol: the node never has two operations under way.
        """
        ...

    def abort(self) -> None:
        """End it at once."""
        ...

    def release(self) -> None:
        """End it in order, where that is still possible. Raises nothing."""
        ...


def answers(message: Message, message_id: int) -> bool:
    """Whether it is a response to that request; one that cannot be read is none."""
    try:
        return message.command.responded_to == message_id and message.command.status is not None
    except BadMessage:
        return False


def cut(parts: Fragments, size: int) -> Iterator[tuple[bytes | memoryview, bool]]:
    """`parts` in pieces of at most `size`, each with whether it is the last one; at least one, maybe empty."""
    held: bytes | memoryview = b""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), size):
            if len(held):
                yield held, False
            held = view[start : start + size]
    yield held, True


def gathered(fragments: Fragments | None, longest: int) -> bytes | None:
    """All of a data set, None when it has no byte. Raises ValueError beyond `longest`; reads it to the end anyway."""
    found, length = bytearray(), 0
    for fragment in fragments or ():
        length += len(fragment)
        if length <= longest:
            found += fragment
    if length > longest:
        raise ValueError(f"{length} bytes, {longest} is the most")
    return bytes(found) or None
