"""The structure of a data set, walked to its last byte (PS3.5 chapter 7), without decoding it.

Every length must end inside what encloses it, every sequence and encapsulated value at its delimiter. The walk is
iterative, never recursive, and holds nothing but positions and the few values that are asked for. A beginning that lies
as one did before is compared instead of walked (`shapes`).

Tolerated, because real systems send it: odd lengths, elements out of order, unknown VRs, VR UN for anything, implicit
elements inside the sequences of an explicit data set, delimiters after a defined length. Refused: anything cut short,
another transfer syntax than the one promised, groups that belong to commands and file headers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from pydicom._dicom_dict import DicomDictionary

from dicom_node.errors import InvalidInstance
from dicom_node.shapes import Shapes, shape_of

__all__ = ["Walk", "Wanted", "walk_deflated"]

MAX_DEPTH = 64  # sequences inside sequences
MAX_ELEMENTS = 10_000_000  # bounds the time one object may take; a 100 000-frame slide has three million
MAX_VALUE_BYTES = 32 * 1024  # a longer value is left to the file
HEAD_BYTES = 8 * 1024  # most headers are shorter
SHORT_VALUE = 64  # bytes that are copied from the head
MAX_INFLATED_BYTES = 4 * 1024**3  # a deflated data set that unpacks to more is a bomb

_UNDEFINED = 0xFFFFFFFF
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# PS3.5 tables 7.1-1 and 7.1-2: which VRs have a 32-bit length
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)
_ENCAPSULATED_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW"})
_LE_TAG, _BE_TAG = struct.Struct("<HHI"), struct.Struct(">HHI")
_LE_EXPLICIT, _BE_EXPLICIT = struct.Struct("<HH2sH"), struct.Struct(">HH2sH")
_LE_LONG, _BE_LONG = struct.Struct("<I"), struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a walk is asked for: `kept`, the top-level tags whose values it keeps; of those, `once`, by name, the ones
    that may not come twice. `shapes`: what walks for the same have seen.
    """

    kept: frozenset[int]
    once: Mapping[int, str]
    shapes: Shapes


class _BeyondPrefix(Exception):
    """Not an error: the walk goes on at `position`, past the inflated prefix."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass(slots=True)
class _Frame:
    """Something that encloses: a data set (top level or item) or the items of a sequence."""

    of_items: bool
    end: int  # nothing inside may reach past this
    undefined: bool  # ends at a delimiter, not at `end`
    implicit: bool
    lenient: bool  # VRs may be missing


@dataclass(slots=True)
class Walk:
    """One pass over a data set; `found` has VR and bytes of wanted top-level values, in their order."""

    data: memoryview
    wanted: Wanted
    implicit: bool
    little: bool
    partial: bool = False  # `data` is a prefix; the end is not known
    found: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    pixel_data_offset: int | None = None
    head: bytes = b""  # a copy of the beginning
    _top: list[int] | None = None  # where elements begin, while their shape is learned
    _nested: list[int] = field(default_factory=list)
    _count: int = 0  # of elements and items

    def run(self) -> None:
        """Walk to the end. Raises InvalidInstance, and _BeyondPrefix when `partial`."""
        self.head = bytes(self.data[:HEAD_BYTES])
        position = 0 if self.implicit or self.partial else self._known_beginning()
        end = 2**62 if self.partial else len(self.data)
        stack = [_Frame(of_items=False, end=end, undefined=False, implicit=self.implicit, lenient=False)]
        while stack:
            frame = stack[-1]
            if position == frame.end and not frame.undefined:
                stack.pop()
                continue
            if position > len(self.data):  # lengths were checked: this is a prefix
                raise _BeyondPrefix(position)
            if frame.of_items:
                position = self._item(stack, position)
            else:
                if not frame.implicit:
                    position = self._plain_elements(frame, position, top=len(stack) == 1)
                    if position == frame.end and not frame.undefined:
                        continue
                position = self._element(stack, position)
            self._count += 1
            if self._count > MAX_ELEMENTS:
                raise InvalidInstance(f"the data set has more than {MAX_ELEMENTS} elements")
            if len(stack) > 2 * MAX_DEPTH:
                raise InvalidInstance(f"sequences are nested deeper than {MAX_DEPTH}")
        if self._top is not None:
            self._learn(position)

    def _known_beginning(self) -> int:
        """Step over a beginning that was walked before in another data set; where that ends."""
        shape, learn = self.wanted.shapes.find(len(self.data), self.little, self.head)
        if shape is None:
            self._top = [] if learn else None
            return 0
        values = zip(shape.vrs, shape.values(self.head), strict=True)
        self.found = dict(zip(shape.tags, values, strict=True))
        self._count = shape.count
        return shape.end

    def _learn(self, end: int) -> None:
        """Remember how what was walked lies. All that a walk depends on must have been noted; else nothing is."""
        top, self._top = self._top, None
        if top is None:
            return
        if not top or top[-1] != end:
            top.append(end)
        shape = shape_of(self.head, top, self._nested, little=self.little, kept=self.wanted.kept, short=_SHORT_VRS)
        self.wanted.shapes.keep(len(self.data), self.little, shape)

    def _plain_elements(self, frame: _Frame, position: int, *, top: bool) -> int:
        """Step over explicit elements with a short VR, which nearly all are; `_element` takes what this stops at."""
        data, end, count = self.data, frame.end, 0
        last = min(end, len(data)) - 8
        unpack = (_LE_EXPLICIT if self.little else _BE_EXPLICIT).unpack_from
        short, found, interesting = _SHORT_VRS, self.found, self.wanted.kept if top else frozenset()
        head = self.head  # slices of bytes cost a third of those of a view
        learned = (self._top if top else self._nested) if self._top is not None else None
        while position <= last and count <= MAX_ELEMENTS:
            group, element, vr, length = unpack(data, position)
            start = position + 8
            stop = start + length
            if vr not in short or stop > end or group == 0xFFFE:
                break
            if top and group < 8 and group in (0x0000, 0x0002):
                break
            if learned is not None and position < HEAD_BYTES:
                learned.append(position)
            tag = group << 16 | element
            if tag in interesting:
                if length <= SHORT_VALUE and stop <= len(head) and tag not in found:
                    found[tag] = vr, head[start:stop]
                else:
                    self._keep(tag, vr, start, length)
            position = stop
            count += 1
        self._count += count
        return position

    def _need(self, position: int, end: int) -> None:
        if position > end:
            raise InvalidInstance("the data set is cut short or a length reaches past its end")
        if position > len(self.data):
            raise _BeyondPrefix(position)

    def _item(self, stack: list[_Frame], position: int) -> int:
        frame = stack[-1]
        start = position + 8
        self._need(start, frame.end)
        if self._top is not None and position < HEAD_BYTES:
            self._nested.append(position)
        group, element, length = (_LE_TAG if self.little else _BE_TAG).unpack_from(self.data, position)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            if frame.undefined:
                stack.pop()
            return start
        if tag != _ITEM:
            raise InvalidInstance("a sequence holds something that is no item")
        if length == _UNDEFINED:
            stack.append(_Frame(False, frame.end, True, frame.implicit, True))
        else:
            if start + length > frame.end:
                raise InvalidInstance("an item reaches past its sequence")
            stack.append(_Frame(False, start + length, False, frame.implicit, True))
        return start

    def _element(self, stack: list[_Frame], position: int) -> int:
        frame = stack[-1]
        self._need(position + 8, frame.end)
        data = self.data
        group: int
        element: int
        vr: bytes
        length: int
        if frame.implicit:
            vr = b""
            group, element, length = (_LE_TAG if self.little else _BE_TAG).unpack_from(data, position)
            start = position + 8
        else:
            group, element, vr, length = (_LE_EXPLICIT if self.little else _BE_EXPLICIT).unpack_from(data, position)
            start = position + 8
            if vr in _SHORT_VRS:
                pass
            elif vr in _LONG_VRS:
                start += 4
                self._need(start, frame.end)
                (length,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(data, position + 8)
            else:
                vr, length, start = self._odd_vr(frame, position, group, vr, length)
        tag = group << 16 | element
        if self._top is not None and position < HEAD_BYTES:
            (self._top if len(stack) == 1 else self._nested).append(position)
        if group == 0xFFFE:
            return self._delimiter(stack, tag, start)
        if len(stack) == 1:
            if group in (0x0000, 0x0002):  # group 0004 of a directory is seen in real images
                raise InvalidInstance("the data set holds an element of a command or of a file header")
            if tag in self.wanted.kept:
                self._keep(tag, vr, start, length)
            elif tag in _PIXEL_TAGS and self.pixel_data_offset is None:
                self.pixel_data_offset = position
                self._learn(position)
        if length == _UNDEFINED:
            if vr in _ENCAPSULATED_VRS or tag in _PIXEL_TAGS:
                self._top = None  # what is within is not noted
                return self._fragments(start, frame.end)
            # PS3.5 6.2.2 note 2: UN of undefined length holds an implicit little endian sequence (and not all obey)
            stack.append(_Frame(True, frame.end, True, frame.implicit, True))
            return start
        end = start + length
        if end > frame.end:
            raise InvalidInstance("the data set is cut short or a length reaches past its end")
        if length and (vr == b"SQ" or (not vr and tag in _sequence_tags())):
            stack.append(_Frame(True, end, False, frame.implicit, True))
            return start
        return end

    def _odd_vr(self, frame: _Frame, position: int, group: int, vr: bytes, length: int) -> tuple[bytes, int, int]:
        """An element whose VR is none we know, in an explicit data set."""
        (implicit_length,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(self.data, position + 4)
        if group == 0xFFFE:  # delimiters never have a VR
            return b"", implicit_length, position + 8
        self._top = None  # a guess is made anew for each data set
        if vr.isalpha() and vr.isupper():
            # PS3.5 7.1.2: VRs to come have reserved bytes and a 32-bit length; what was never in the Standard may not
            if length == 0 and position + 12 <= min(frame.end, len(self.data)):
                (long,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(self.data, position + 8)
                if long == _UNDEFINED or position + 12 + long <= frame.end:
                    return b"UN", long, position + 12
            return b"UN", length, position + 8
        if frame.lenient:
            return b"", implicit_length, position + 8
        raise InvalidInstance("an element has no value representation: this is another transfer syntax")

    def _delimiter(self, stack: list[_Frame], tag: int, start: int) -> int:
        if tag != _ITEM_END or len(stack) == 1:
            raise InvalidInstance("a delimiter stands where an element should")
        if stack[-1].undefined:
            stack.pop()
        return start

    def _keep(self, tag: int, vr: bytes, start: int, length: int) -> None:
        if tag in self.wanted.once and tag in self.found:
            raise InvalidInstance(f"{self.wanted.once[tag]} appears twice")
        if length <= MAX_VALUE_BYTES and start + length <= len(self.data):
            self.found[tag] = vr, bytes(self.data[start : start + length])

    def _fragments(self, position: int, end: int) -> int:
        """Skip an encapsulated value (PS3.5 A.4): items of defined length up to the sequence delimiter."""
        unpack = (_LE_TAG if self.little else _BE_TAG).unpack_from
        for _ in range(MAX_ELEMENTS):
            self._need(position + 8, end)
            group, element, length = unpack(self.data, position)
            position += 8
            tag = group << 16 | element
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM or length == _UNDEFINED:
                raise InvalidInstance("encapsulated pixel data is cut short or holds something that is no fragment")
            position += length
        raise InvalidInstance(f"encapsulated pixel data has more than {MAX_ELEMENTS} fragments")


@lru_cache(maxsize=1)
def _sequence_tags() -> frozenset[int]:
    return frozenset(tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ")


# --- deflated ------------------------------------------------------------------------------------------------------

_INFLATE_PIECE = 256 * 1024


def walk_deflated(view: memoryview, wanted: Wanted, max_held: int) -> Walk:
    """Inflate (PS3.5 A.5: a bare RFC 1951 stream), holding `max_held` bytes, and walk what is held."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    held = bytearray()
    total = 0
    fed: bytes | memoryview = b""
    position = 0
    try:
        while not inflater.eof:
            if not fed and position < len(view):
                fed = view[position : position + _INFLATE_PIECE]
                position += len(fed)
            piece = inflater.decompress(fed, _INFLATE_PIECE)
            fed = inflater.unconsumed_tail
            if not piece and not fed and position >= len(view) and not inflater.eof:
                raise InvalidInstance("the deflated data set is cut short")
            held += piece[: max_held - len(held)]
            total += len(piece)
            if total > MAX_INFLATED_BYTES:
                raise InvalidInstance(f"the deflated data set unpacks to more than {MAX_INFLATED_BYTES} bytes")
    except zlib.error:
        raise InvalidInstance("the deflated data set is no deflate stream") from None
    if len(inflater.unused_data) + len(view) - position > 8:  # a pad byte, or the trailer of a zlib stream
        raise InvalidInstance("something follows the deflated data set")
    walk = Walk(memoryview(bytes(held)), wanted, implicit=False, little=True, partial=total > len(held))
    try:
        walk.run()
    except _BeyondPrefix as beyond:
        if beyond.position > total:
            raise InvalidInstance("the data set is cut short or a length reaches past its end") from None
    return walk
