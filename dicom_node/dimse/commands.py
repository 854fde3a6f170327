"""Command sets as bytes (PS3.7 6.3, E.1): Implicit VR Little Endian, elements in order, group length first.

Pure: what goes on any wire of the node is built here. Values are not validated: a UID goes out as it was kept.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

__all__ = [
    "NO_DATA_SET",
    "WITH_DATA_SET",
    "CommandField",
    "CommandValue",
    "StoreRequests",
    "element",
    "encode_command",
    "error_comment",
    "store_response",
]

CommandValue = str | int | Sequence[int] | Sequence[str]

_HEAD, _US, _GROUP_LENGTH = struct.Struct("<HHI"), struct.Struct("<HHIH"), struct.Struct("<HHII")

NO_DATA_SET = 0x0101
WITH_DATA_SET = 0x0000


class CommandField:
    """Command Field (0000,0100) of requests (PS3.7 table E.1-1); a response has 0x8000 more."""

    C_STORE = 0x0001
    C_GET = 0x0010
    C_FIND = 0x0020
    C_MOVE = 0x0021
    C_ECHO = 0x0030
    N_EVENT_REPORT = 0x0100
    N_GET = 0x0110
    N_SET = 0x0120
    N_ACTION = 0x0130
    N_CREATE = 0x0140
    N_DELETE = 0x0150
    C_CANCEL = 0x0FFF
    RESPONSE = 0x8000


# PS3.7 table E.1-1: keyword to element number of group 0000 and VR
_ELEMENTS: Mapping[str, tuple[int, str]] = {
    "AffectedSOPClassUID": (0x0002, "UI"),
    "RequestedSOPClassUID": (0x0003, "UI"),
    "CommandField": (0x0100, "US"),
    "MessageID": (0x0110, "US"),
    "MessageIDBeingRespondedTo": (0x0120, "US"),
    "MoveDestination": (0x0600, "AE"),
    "Priority": (0x0700, "US"),
    "CommandDataSetType": (0x0800, "US"),
    "Status": (0x0900, "US"),
    "OffendingElement": (0x0901, "AT"),
    "ErrorComment": (0x0902, "LO"),
    "AffectedSOPInstanceUID": (0x1000, "UI"),
    "RequestedSOPInstanceUID": (0x1001, "UI"),
    "EventTypeID": (0x1002, "US"),
    "ActionTypeID": (0x1008, "US"),
    "NumberOfRemainingSuboperations": (0x1020, "US"),
    "NumberOfCompletedSuboperations": (0x1021, "US"),
    "NumberOfFailedSuboperations": (0x1022, "US"),
    "NumberOfWarningSuboperations": (0x1023, "US"),
    "MoveOriginatorApplicationEntityTitle": (0x1030, "AE"),
    "MoveOriginatorMessageID": (0x1031, "US"),
}
_MESSAGE_ID, _RESPONDED_TO, _INSTANCE = 0x0110, 0x0120, 0x1000


def encode_command(fields: Mapping[str, CommandValue]) -> bytes:
    """The command set with these elements, (0000,0000) included. Raises KeyError for a keyword it does not know."""
    body = _elements(fields)
    return _GROUP_LENGTH.pack(0, 0, 4, len(body)) + body


def _elements(fields: Mapping[str, CommandValue]) -> bytes:
    return b"".join([_encode(number, vr, fields[keyword]) for keyword, number, vr in _in_order(tuple(fields))])


@lru_cache(maxsize=128)
def _in_order(keywords: tuple[str, ...]) -> tuple[tuple[str, int, str], ...]:
    """Keyword, element number and VR of each, as they are to be written: few sets of keywords are ever used."""
    return tuple(sorted(((keyword, *_ELEMENTS[keyword]) for keyword in keywords), key=lambda item: item[1]))


class StoreRequests:
    """C-STORE requests of one SOP class, where the same is asked thousands of times (PS3.7 table 9.3-1).

    `originator`: AE title and message id of the C-MOVE that they are sub-operations of.
    """

    def __init__(self, sop_class_uid: str, originator: tuple[str, int] | None = None) -> None:
        self._before = _elements({"AffectedSOPClassUID": sop_class_uid, "CommandField": CommandField.C_STORE})
        self._between = _elements({"Priority": 0, "CommandDataSetType": WITH_DATA_SET})
        self._after = b""
        if originator is not None:
            title, message_id = originator
            self._after = _elements(
                {"MoveOriginatorApplicationEntityTitle": title, "MoveOriginatorMessageID": message_id}
            )

    def encode(self, message_id: int, sop_instance_uid: str) -> bytes:
        """As `encode_command`."""
        message, instance = _US.pack(0, _MESSAGE_ID, 2, message_id), _encode(_INSTANCE, "UI", sop_instance_uid)
        length = len(self._before) + len(message) + len(self._between) + len(instance) + len(self._after)
        return b"".join(
            (_GROUP_LENGTH.pack(0, 0, 4, length), self._before, message, self._between, instance, self._after)
        )


def store_response(sop_class_uid: str, message_id: int, status: int, sop_instance_uid: str) -> bytes:
    """A C-STORE-RSP that says no more than its status (PS3.7 table 9.3-2), as `encode_command` makes it."""
    before, after = _around_message_id(sop_class_uid, status)
    message, instance = _US.pack(0, _RESPONDED_TO, 2, message_id), _encode(_INSTANCE, "UI", sop_instance_uid)
    length = len(before) + len(message) + len(after) + len(instance)
    return b"".join((_GROUP_LENGTH.pack(0, 0, 4, length), before, message, after, instance))


@lru_cache(maxsize=256)
def _around_message_id(sop_class_uid: str, status: int) -> tuple[bytes, bytes]:
    before = _elements(
        {"AffectedSOPClassUID": sop_class_uid, "CommandField": CommandField.C_STORE | CommandField.RESPONSE}
    )
    return before, _elements({"CommandDataSetType": NO_DATA_SET, "Status": status})


def element(keyword: str) -> int:
    """The element number, in group 0000, of a keyword. Raises KeyError for one it does not know."""
    return _ELEMENTS[keyword][0]


def error_comment(text: str) -> str:
    """`text` as Error Comment (0000,0902) allows it: LO in the default repertoire, at most 64 characters."""
    return "".join(char if " " <= char <= "~" and char != "\\" else "?" for char in text)[:64]


def _encode(element: int, vr: str, value: CommandValue) -> bytes:
    if vr == "US":
        return _US.pack(0, element, 2, value)
    if vr == "AT":
        tags = [value] if isinstance(value, int) else value
        content = b"".join(struct.pack("<HH", int(tag) >> 16, int(tag) & 0xFFFF) for tag in tags)
    else:
        content = str(value).encode("ascii", "replace")
        if len(content) % 2:
            content += b"\0" if vr == "UI" else b" "
    return _HEAD.pack(0, element, len(content)) + content
