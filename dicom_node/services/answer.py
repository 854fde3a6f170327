"""The identifiers of responses, from the index's texts straight to bytes (PS3.5 7.1; PS3.4 C.4.1.1.3.2).

Values were kept as text and go out as they were, valid or not; what cannot be said in its VR goes out empty. A data set
of pydicom's for each row would cost more than finding it, and so would describing its elements: all answers to a query
have the same ones, which an `AnswerForm` knows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword

__all__ = ["AnswerForm"]

_INTEGERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q"}
_FLOATS = {"FL": "f", "FD": "d"}
_BINARY = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "AT", "SQ"})
_LONG = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "SQ", "UC", "UR", "UT", "SV", "UV"})  # PS3.5 table 7.1-1
_LONGEST = 0xFFFE


class _Field(NamedTuple):
    """An element whose value is in a row's column; `before`: what stands before its length in every answer."""

    column: int
    vr: str
    is_text: bool
    before: bytes
    length: Callable[[int], bytes]
    without_value: bytes  # `before` and a length of 0
    pad: bytes


class AnswerForm:
    """What all answers to a query in one transfer syntax and one character set have in common.

    `returned`: the keywords whose texts make a row, values parted by backslashes, '' for none. `empty`: tags and VRs of
    what goes out without a value; `fixed`: keywords and texts of what every answer carries, each at most 64 characters
    of ASCII. What is named twice is what the last one says. `character_set`: (0008,0005) of the answers, '' for the
    default repertoire; it must hold every text. Raises KeyError for a keyword that is none of the Standard's.
    """

    def __init__(
        self,
        returned: Sequence[str],
        empty: Sequence[tuple[int, str]] = (),
        fixed: Sequence[tuple[str, str]] = (),
        *,
        implicit_vr: bool,
        little_endian: bool,
        character_set: str = "",
    ) -> None:
        self._codec = str(python_encoding.get(character_set, "utf-8")) if character_set else "ascii"
        self._order, self._implicit_vr = "<" if little_endian else ">", implicit_vr
        if character_set:
            fixed = (*fixed, ("SpecificCharacterSet", character_set))
        elements: dict[int, tuple[str, int | str]] = {}  # its VR, and its column or what it always is
        for column, keyword in enumerate(returned):
            tag, vr = _described(keyword)
            elements[tag] = (vr, column)
        elements.update((tag, (vr, "")) for tag, vr in empty)
        for keyword, text in fixed:
            tag, vr = _described(keyword)
            elements[tag] = (vr, text)
        self._fields: list[_Field] = []
        self._end = bytearray()  # what is to stand before the next of them
        for tag, (vr, value) in sorted(elements.items()):
            self._add(tag, vr, value)
        self._last = bytes(self._end)  # what stands after the last of them

    def _add(self, tag: int, vr: str, value: int | str) -> None:
        before, length = struct.pack(self._order + "HH", tag >> 16, tag & 0xFFFF), struct.Struct(self._order + "I").pack
        if not self._implicit_vr:
            before += vr.encode() + (b"\0\0" if vr in _LONG else b"")
            if vr not in _LONG:
                length = struct.Struct(self._order + "H").pack
        if isinstance(value, str):
            content = self._value(vr, value)
            self._end += before + length(len(content)) + content
            return
        before = bytes(self._end) + before
        is_text = vr not in _BINARY and vr not in _INTEGERS and vr not in _FLOATS
        pad = b"\0" if vr == "UI" else b" "
        self._fields.append(_Field(value, vr, is_text, before, length, before + length(0), pad))
        self._end.clear()

    def encoded(self, row: Sequence[str]) -> bytes:
        """The answer of one row. Texts that are too long for their length field are cut, as nothing in the index is."""
        parts: list[bytes] = []
        add, codec = parts.append, self._codec
        for column, vr, is_text, before, length, without_value, pad in self._fields:
            text = row[column]
            if not text:
                add(without_value)
                continue
            value = text.encode(codec, "replace") if is_text else self._value(vr, text)
            size = len(value)
            if size > _LONGEST and vr not in _LONG:
                value, size = value[:_LONGEST], _LONGEST
            add(before)
            if size & 1:
                add(length(size + 1))
                add(value)
                add(pad)
            else:
                add(length(size))
                add(value)
        add(self._last)
        return b"".join(parts)

    def _value(self, vr: str, text: str) -> bytes:
        """The value of any VR, of even length."""
        if not text or vr in _BINARY:
            return b""
        form = _INTEGERS.get(vr) or _FLOATS.get(vr)
        if form is not None:
            convert = float if vr in _FLOATS else int
            try:
                return b"".join(struct.pack(self._order + form, convert(value)) for value in text.split("\\"))
            except (ValueError, OverflowError, struct.error):
                return b""
        value = text.encode(self._codec, "replace")
        return value + (b"\0" if vr == "UI" else b" ") if len(value) % 2 else value


@lru_cache(maxsize=1024)
def _described(keyword: str) -> tuple[int, str]:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag, dictionary_VR(tag)[:2]
