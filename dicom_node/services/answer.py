"""The identifier of a response, from the index's texts straight to bytes (PS3.5 7.1; PS3.4 C.4.1.1.3.2).

Values were kept as text and go out as they were, valid or not; what cannot be said in its VR goes out empty. A data set
of pydicom's for each row would cost more than finding it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword

__all__ = ["Answer"]

_INTEGERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q"}
_FLOATS = {"FL": "f", "FD": "d"}
_BINARY = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "AT", "SQ"})
_LONG = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "SQ", "UC", "UR", "UT", "SV", "UV"})  # PS3.5 table 7.1-1
_LONGEST = 0xFFFE


class Answer:
    """Elements of one identifier: `put` them in any order, then `encoded`.

    `character_set` is (0008,0005) of the answer, '' for the default repertoire; it must hold every text.
    """

    __slots__ = ("_codec", "_elements", "character_set")

    def __init__(self, character_set: str = "") -> None:
        self.character_set = character_set
        self._codec = str(python_encoding.get(character_set, "utf-8")) if character_set else "ascii"
        self._elements: dict[int, tuple[str, str]] = {}
        if character_set:
            self.put("SpecificCharacterSet", character_set)

    def put(self, keyword: str, text: str) -> None:
        """An attribute of the Standard with its value as text, values parted by backslashes; '' for none."""
        tag, vr = _described(keyword)
        self._elements[tag] = (vr, text)

    def put_empty(self, tag: int, vr: str) -> None:
        """An attribute without a value, of any kind."""
        self._elements[tag] = (vr, "")

    @property
    def elements(self) -> Mapping[int, tuple[str, str]]:
        """VR and text by tag."""
        return self._elements

    def encoded(self, *, implicit_vr: bool, little_endian: bool) -> bytes:
        """The data set. Texts that are too long for their length field are cut, as nothing in the index is."""
        order = "<" if little_endian else ">"
        parts: list[bytes] = []
        for tag, (vr, text) in sorted(self._elements.items()):
            value = self._value(vr, text, order)
            group_element = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
            if implicit_vr:
                head = struct.pack(order + "I", len(value))
            elif vr in _LONG:
                head = vr.encode() + struct.pack(order + "xxI", len(value))
            else:
                head = vr.encode() + struct.pack(order + "H", len(value))
            parts += (group_element, head, value)
        return b"".join(parts)

    def _value(self, vr: str, text: str, order: str) -> bytes:
        if not text or vr in _BINARY:
            return b""
        form = _INTEGERS.get(vr) or _FLOATS.get(vr)
        if form is not None:
            convert = float if vr in _FLOATS else int
            try:
                return b"".join(struct.pack(order + form, convert(value)) for value in text.split("\\"))
            except (ValueError, OverflowError, struct.error):
                return b""
        value = text.encode(self._codec, "replace")
        if len(value) > _LONGEST and vr not in _LONG:
            value = value[:_LONGEST]
        if len(value) % 2:
            value += b"\0" if vr == "UI" else b" "
        return value


@lru_cache(maxsize=1024)
def _described(keyword: str) -> tuple[int, str]:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag, dictionary_VR(tag)[:2]
