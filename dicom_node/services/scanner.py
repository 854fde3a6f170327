"""An identifier read in one pass where nothing about it is out of the ordinary (PS3.5 7.1; PS3.4 C.2.2.1).

What a query asks for is the same plain text from nearly every client, and reading it with pydicom takes longer than
answering it. `scan_identifier` says None to all that is not that plain, so that pydicom reads it; where it gives an
answer, it is what `identifier.identifier_of` would give.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from pydicom.datadict import dictionary_has_tag, dictionary_keyword, dictionary_VR

from dicom_node.services.identifier import Element, Identifier

__all__ = ["scan_identifier"]

LONGEST = 16 * 1024  # beyond it a length could be taken for a VR
_UNDEFINED = 0xFFFFFFFF
_CHARACTER_SET, _LEVEL = 0x00080005, 0x00080052
# VRs whose values are text; of numbers pydicom knows better what is one
_SEVERAL_VALUES = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "PN", "SH", "TM", "UC", "UI"})
_ONE_VALUE = frozenset({"LT", "ST", "UR", "UT"})
_LONG = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "SQ", "UC", "UR", "UT", "SV", "UV"})  # PS3.5 7.1.2
# in these the bytes of ASCII mean ASCII; anything beyond them is pydicom's (PS3.3 C.12.1.1.2)
_PLAIN_SETS = frozenset(
    {"", "ISO_IR 6", "ISO_IR 192", "GB18030", "GBK"}
    | {f"ISO_IR {number}" for number in (100, 101, 109, 110, 126, 127, 138, 144, 148, 166)}
)
_LE, _BE = struct.Struct("<HHI"), struct.Struct(">HHI")
_LE_EXPLICIT, _BE_EXPLICIT = struct.Struct("<HH2sH"), struct.Struct(">HH2sH")
_LE_LENGTH, _BE_LENGTH = struct.Struct("<I"), struct.Struct(">I")


def scan_identifier(encoded: bytes, *, implicit_vr: bool, little_endian: bool) -> Identifier | None:
    """The identifier, or None when pydicom is to read it: anything but standard elements in order, of ASCII text."""
    end = len(encoded)
    if end > LONGEST:
        return None
    implicit, explicit = (_LE, _LE_EXPLICIT) if little_endian else (_BE, _BE_EXPLICIT)
    elements: list[Element] = []
    position, last = 0, -1
    level = character_set = ""
    while position + 8 <= end:
        if implicit_vr:
            group, number, length = implicit.unpack_from(encoded, position)
        else:
            group, number, named, length = explicit.unpack_from(encoded, position)
        position += 8
        tag = group << 16 | number
        known = _described(tag)
        if known is None or tag <= last:
            return None
        keyword, vr = known
        if not implicit_vr:
            if named != vr.encode():
                return None
            if vr in _LONG:
                if position + 4 > end:
                    return None
                (length,) = (_LE_LENGTH if little_endian else _BE_LENGTH).unpack_from(encoded, position)
                position += 4
        stop = position + length
        if stop > end:  # an undefined length too
            return None
        text = _text(encoded[position:stop], vr) if length else ""
        if text is None:
            return None
        if tag == _LEVEL:
            level = text
        elif tag == _CHARACTER_SET:
            character_set = text
            if text not in _PLAIN_SETS:
                return None
        elements.append((tag, keyword, vr, text))
        position, last = stop, tag
    return Identifier(level, character_set, elements) if position == end else None


def _text(raw: bytes, vr: str) -> str | None:
    """The value without its padding, None for what is no plain text."""
    if not raw.isascii():
        return None
    text = raw.decode("ascii").strip(" \0")
    if not text.isprintable():
        return None
    if vr in _SEVERAL_VALUES:
        if vr == "PN" and "=" in text:
            return None
        return "\\".join([value.strip(" ") for value in text.split("\\")]) if "\\" in text else text
    return text if vr in _ONE_VALUE else None


@lru_cache(maxsize=1024)
def _described(tag: int) -> tuple[str, str] | None:
    """Keyword and VR of an attribute of the Standard, None for any other and for those of several VRs."""
    if tag & 0xFFFF == 0 or not dictionary_has_tag(tag):
        return None
    keyword, vr = dictionary_keyword(tag), dictionary_VR(tag)
    return (keyword, vr) if keyword and len(vr) == 2 else None
