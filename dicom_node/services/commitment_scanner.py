"""The information of a commitment message read in one pass (PS3.4 tables J.3-1 to 3; PS3.5 7.1, 7.5).

A request names up to ten thousand objects, and pydicom takes a second of CPU for so many. `scan_information` says None
to all that is not plain, so that pydicom reads it; where it gives an answer, it is what pydicom's data set would give.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["Information", "scan_information"]

Item = tuple[str, str, int]  # Referenced SOP Class UID, Referenced SOP Instance UID, Failure Reason or 0: as they came

_TRANSACTION, _FAILED, _REFERENCED = 0x00081195, 0x00081198, 0x00081199
_CLASS, _INSTANCE, _REASON = 0x00081150, 0x00081155, 0x00081197
_VRS = {_TRANSACTION: b"UI", _CLASS: b"UI", _INSTANCE: b"UI", _REASON: b"US", _FAILED: b"SQ", _REFERENCED: b"SQ"}
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN", b"SQ", b"UC", b"UR", b"UT", b"SV", b"UV"})
_SHORT = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)


class Information(NamedTuple):
    """What a message says, unchecked: its texts may be no UIDs."""

    transaction_uid: str
    committed: list[Item]
    failed: list[Item]


class _Unusual(Exception):
    """Left to pydicom."""


def scan_information(encoded: bytes, *, implicit_vr: bool, little_endian: bool, most: int) -> Information | None:
    """The information, None when pydicom is to read it. Of more than `most` items one more is read and no others."""
    try:
        return _Scanner(encoded, implicit_vr, little_endian, most).read()
    except (_Unusual, struct.error, UnicodeDecodeError):
        return None


class _Scanner:
    def __init__(self, encoded: bytes, implicit_vr: bool, little_endian: bool, most: int) -> None:
        order = "<" if little_endian else ">"
        self._bytes, self._implicit, self._most = encoded, implicit_vr, most
        self._plain = struct.Struct(f"{order}HHI").unpack_from
        self._explicit = struct.Struct(f"{order}HH2sH").unpack_from
        self._u32 = struct.Struct(f"{order}I").unpack_from
        self._u16 = struct.Struct(f"{order}H").unpack_from

    def read(self) -> Information:
        """Raises _Unusual, struct.error, UnicodeDecodeError."""
        position, last, end = 0, -1, len(self._bytes)
        transaction_uid = ""
        found: dict[int, list[Item]] = {_REFERENCED: [], _FAILED: []}
        while position < end:
            tag, start, length = self._element(position)
            if tag <= last:
                raise _Unusual
            last = tag
            if tag in found:
                found[tag], position = self._sequence(start, length)
                if len(found[tag]) > self._most:
                    break
                continue
            position = self._stop(start, length, end)
            if tag == _TRANSACTION:
                transaction_uid = self._text(start, position)
        return Information(transaction_uid, found[_REFERENCED], found[_FAILED])

    def _element(self, position: int) -> tuple[int, int, int]:
        """Tag, where the value begins, its length."""
        if self._implicit:
            group, number, length = self._plain(self._bytes, position)
            return group << 16 | number, position + 8, length
        group, number, vr, length = self._explicit(self._bytes, position)
        tag = group << 16 | number
        if tag in _VRS and _VRS[tag] != vr:
            raise _Unusual
        if vr in _SHORT:
            return tag, position + 8, length
        if vr not in _LONG or length:  # the reserved bytes
            raise _Unusual
        return tag, position + 12, self._u32(self._bytes, position + 8)[0]

    def _stop(self, start: int, length: int, end: int) -> int:
        """Where a value ends."""
        if length == _UNDEFINED or start + length > end:
            raise _Unusual
        return start + length

    def _text(self, start: int, stop: int) -> str:
        return self._bytes[start:stop].decode("ascii").strip(" \0")

    def _sequence(self, start: int, length: int) -> tuple[list[Item], int]:
        """Its items, and where what follows begins."""
        items: list[Item] = []
        end = len(self._bytes) if length == _UNDEFINED else self._stop(start, length, len(self._bytes))
        position = start
        while position < end or length == _UNDEFINED:
            group, number, size = self._plain(self._bytes, position)
            tag = group << 16 | number
            if tag == _SEQUENCE_END and length == _UNDEFINED and not size:
                return items, position + 8
            if tag != _ITEM:
                raise _Unusual
            item, position = self._item(position + 8, size, end)
            items.append(item)
            if len(items) > self._most:
                break
        return items, position

    def _item(self, position: int, size: int, limit: int) -> tuple[Item, int]:
        end = limit if size == _UNDEFINED else self._stop(position, size, limit)
        sop_class = instance = ""
        reason, last = 0, -1
        while position < end:
            if size == _UNDEFINED and self._plain(self._bytes, position) == (0xFFFE, 0xE00D, 0):
                return (sop_class, instance, reason), position + 8
            tag, start, length = self._element(position)
            if tag <= last or tag >= _ITEM:
                raise _Unusual
            last, position = tag, self._stop(start, length, end)
            if tag == _INSTANCE:
                instance = self._text(start, position)
            elif tag == _CLASS:
                sop_class = self._text(start, position)
            elif tag == _REASON:
                if length != 2:
                    raise _Unusual
                (reason,) = self._u16(self._bytes, start)
        if size == _UNDEFINED:
            raise _Unusual
        return (sop_class, instance, reason), position
