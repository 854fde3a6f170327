"""DIMSE messages out of presentation data values (PS3.7 6.3, PS3.8 annex E), without I/O.

A message is a command set and, if that says so, a data set. The command set is gathered within a bound and read; the
data set is passed on piece by piece as it comes. What breaks the order of things raises BadMessage: the association is
then to be aborted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dicom_node.dimse.commands import NO_DATA_SET
from dicom_node.dimse.upper_layer.connection import Data
from dicom_node.errors import NodeError

__all__ = ["BadMessage", "Command", "CommandReceived", "DataSetPiece", "MessageReader", "read_command"]

_ELEMENT = struct.Struct("<HHI")
MAX_COMMAND_BYTES = 64 * 1024
MAX_EMPTY_PIECES = 64

_COMMAND_FIELD, _MESSAGE_ID, _RESPONDED_TO = 0x0100, 0x0110, 0x0120
_DATA_SET_TYPE, _STATUS = 0x0800, 0x0900


class BadMessage(NodeError):
    """The peer's values make no DIMSE message. The text carries none of them."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command set: `elements` by element number of group 0000, as they came (PS3.7 E.1). Values are read on demand.

    A value of a wrong length raises BadMessage when it is asked for.
    """

    elements: Mapping[int, bytes]

    def number(self, element: int) -> int | None:
        """An element of VR US, None when it is not there or empty."""
        raw = self.elements.get(element)
        if not raw:
            return None
        if len(raw) != 2:
            raise BadMessage(f"(0000,{element:04X}) has {len(raw)} bytes, 2 are needed")
        return raw[0] | raw[1] << 8

    def text(self, element: int) -> str | None:
        """An element of VR UI, AE or LO without its padding, None when it is not there or empty."""
        raw = self.elements.get(element)
        return (raw.decode("latin-1").strip(" \0") or None) if raw else None

    @property
    def field(self) -> int:
        """Command Field (0000,0100)."""
        found = self.number(_COMMAND_FIELD)
        if found is None:
            raise BadMessage("a command set without Command Field")
        return found

    @property
    def message_id(self) -> int | None:
        """Message ID (0000,0110) of a request."""
        return self.number(_MESSAGE_ID)

    @property
    def responded_to(self) -> int | None:
        """Message ID Being Responded To (0000,0120) of a response or a C-CANCEL."""
        return self.number(_RESPONDED_TO)

    @property
    def status(self) -> int | None:
        """Status (0000,0900) of a response."""
        return self.number(_STATUS)

    @property
    def has_data_set(self) -> bool:
        """Whether a data set follows (PS3.7 E.1: any Command Data Set Type but 0x0101)."""
        found = self.number(_DATA_SET_TYPE)
        if found is None:
            raise BadMessage("a command set without Command Data Set Type")
        return found != NO_DATA_SET


def read_command(encoded: bytes) -> Command:
    """A command set, Implicit VR Little Endian (PS3.7 6.3.1).

    The group length is not trusted, elements of group 0000 in any order are taken. Raises BadMessage where lengths do
    not add up, for another group, and for an element that is there twice.
    """
    elements: dict[int, bytes] = {}
    position, end = 0, len(encoded)
    while position < end:
        if end - position < 8:
            raise BadMessage("bytes are left over after the last element of a command set")
        group, element, length = _ELEMENT.unpack_from(encoded, position)
        start, position = position + 8, position + 8 + length
        if group != 0:
            raise BadMessage(f"an element of group {group:04X} in a command set")
        if position > end:
            raise BadMessage(f"(0000,{element:04X}) says it has {length} bytes, {end - start} are left")
        if element in elements:
            raise BadMessage(f"(0000,{element:04X}) is there twice")
        elements[element] = encoded[start:position]
    return Command(elements)


class CommandReceived(NamedTuple):
    """A whole command set; when it says so, `DataSetPiece`s follow before anything else."""

    context_id: int
    command: Command


class DataSetPiece(NamedTuple):
    """A piece of the data set of the last command; `last` ends the message. The view is good until the next receive."""

    context_id: int
    content: memoryview
    last: bool


class MessageReader:
    """Makes messages of one association's values."""

    def __init__(self, *, max_command_bytes: int = MAX_COMMAND_BYTES) -> None:
        self._max_command_bytes = max_command_bytes
        self._command = bytearray()
        self._context_id: int | None = None  # of the message under way
        self._in_data_set = False
        self._empty = 0

    @property
    def under_way(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._context_id is not None

    def feed(self, data: Data) -> tuple[()] | tuple[CommandReceived | DataSetPiece]:
        """What this piece completes. Raises BadMessage."""
        if self._context_id is not None and self._context_id != data.context_id:
            raise BadMessage("two messages are mixed")
        if not data.content and not data.last:
            self._empty += 1
            if self._empty > MAX_EMPTY_PIECES:
                raise BadMessage("too many empty values")
            return ()
        if data.is_command:
            return self._feed_command(data)
        if not self._in_data_set:
            raise BadMessage("a data set without its command set")
        if data.last:
            self._end()
        return (DataSetPiece(data.context_id, data.content, data.last),)

    def _feed_command(self, data: Data) -> tuple[()] | tuple[CommandReceived]:
        if self._in_data_set:
            raise BadMessage("a command set where a data set was to come")
        if len(self._command) + len(data.content) > self._max_command_bytes:
            raise BadMessage(f"a command set of more than {self._max_command_bytes} bytes")
        self._context_id = data.context_id
        if not data.last:
            self._command += data.content
            return ()
        command = read_command(b"".join((self._command, data.content)))
        self._command.clear()
        self._in_data_set = command.has_data_set
        if not self._in_data_set:
            self._end()
        return (CommandReceived(data.context_id, command),)

    def _end(self) -> None:
        self._context_id, self._in_data_set, self._empty = None, False, 0
