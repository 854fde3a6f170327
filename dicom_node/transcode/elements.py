"""A data set rewritten in another native transfer syntax, element by element, values untouched.

Knows no files and decodes no pixels. Sequences and items go out with undefined length, so nothing is held in memory;
values pass in pieces. PS3.5 sections 6.2, 7.1, 7.3, 7.5, A.1 to A.5.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from pydicom.datadict import dictionary_VR, private_dictionary_VR

from dicom_node.errors import TranscodeError

__all__ = ["DEFLATED_LE", "EXPLICIT_BE", "EXPLICIT_LE", "IMPLICIT_LE", "Changes", "Readable", "rewrite"]

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"

MAX_INFLATED_BYTES = 8 * 1024**3
PIECE = 256 * 1024
_IN_MEMORY = 8 * 1024**2
_MAX_DEPTH = 64
UNDEFINED = 0xFFFFFFFF

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
_PIXEL_REPRESENTATION = 0x00280103
_WAVEFORM_BITS = 0x54001004
_OFFSET_TABLES = frozenset({0x7FE00001, 0x7FE00002})  # extended offset table: only of encapsulated pixel data
# PS3.5 table 7.1-1: VRs with a 32-bit length
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
# Bytes of one number, for the change of byte order (PS3.5 7.3)
_WORD = {b"US": 2, b"SS": 2, b"OW": 2, b"AT": 2, b"UL": 4, b"SL": 4, b"FL": 4, b"OF": 4, b"OL": 4}
_WORD |= {b"FD": 8, b"OD": 8, b"OV": 8, b"SV": 8, b"UV": 8}


class Readable(Protocol):
    """Bytes from somewhere."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, b'' at the end."""
        ...


@dataclass
class Changes:
    """What decoding changes: pixel data (its bytes, VR) and values of top-level elements, as (VR, value)."""

    pixel_data: Any | None = None
    pixel_length: int = 0
    pixel_vr: bytes = b"OW"
    values: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)


def rewrite(source: Readable, from_syntax: str, to_syntax: str, changes: Changes) -> BinaryIO:
    """The data set read from `source`, in `to_syntax`, at its start; the caller closes it.

    `from_syntax` and `to_syntax` are native or deflated, `changes` replace top-level elements on the way.
    Raises TranscodeError for bytes that are no data set in `from_syntax`.
    """
    if from_syntax == DEFLATED_LE:
        source = _Inflated(source)
    out = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - handed to the caller
    try:
        sink = _Deflating(out) if to_syntax == DEFLATED_LE else out
        _Rewriter(_Input(source), sink, from_syntax, to_syntax, changes).data_set()
        if isinstance(sink, _Deflating):
            sink.finish()
    except BaseException:
        out.close()
        raise
    out.seek(0)
    return cast(BinaryIO, out)


class _Deflating:
    def __init__(self, out: Any) -> None:
        self._out = out
        self._deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        self._length = 0

    def write(self, data: bytes) -> None:
        self._put(self._deflate.compress(data))

    def finish(self) -> None:
        self._put(self._deflate.flush())
        if self._length % 2:
            self._out.write(b"\0")  # PS3.5 A.5: padded to even length

    def _put(self, data: bytes) -> None:
        self._length += len(data)
        self._out.write(data)


@dataclass(frozen=True)
class _Coding:
    explicit: bool
    little: bool

    @property
    def order(self) -> str:
        return "<" if self.little else ">"


@dataclass
class _Scope:
    """What the elements of one data set or item need to know of each other."""

    signed: bool = False
    waveform_bytes: bool = False
    creators: dict[tuple[int, int], str] = field(default_factory=dict)


_IMPLICIT = _Coding(explicit=False, little=True)


class _Rewriter:
    def __init__(self, source: _Input, out: Any, from_syntax: str, to_syntax: str, changes: Changes) -> None:
        self._in, self._out = source, out
        self._from = _Coding(from_syntax != IMPLICIT_LE, from_syntax != EXPLICIT_BE)
        self._to = _Coding(to_syntax != IMPLICIT_LE, to_syntax != EXPLICIT_BE)
        self._changes = dict(changes.values)
        self._pixels = changes

    def data_set(self) -> None:
        """The whole data set."""
        scope = _Scope()
        while raw := self._in.at_end():
            tag = self._tag(raw, self._from)
            self._changed_before(tag)
            if self._pixels.pixel_data is not None and tag in _OFFSET_TABLES | {_PIXEL_DATA}:
                self._new_pixel_data(tag)
            elif tag in self._changes:
                self._skip()
                self._changed_before(tag + 1)
            else:
                self._element(tag, self._from, scope, 0)
        self._changed_before(UNDEFINED)

    # --- changed elements

    def _changed_before(self, tag: int) -> None:
        """Elements that decoding set and the source lacks, in their place."""
        for changed in sorted(number for number in self._changes if number < tag):
            vr, value = self._changes.pop(changed)
            self._header(changed, vr, len(value))
            self._out.write(self._swapped(vr, value, not self._to.little))

    def _new_pixel_data(self, tag: int) -> None:
        self._skip()
        if tag != _PIXEL_DATA:
            return
        vr, pixels = self._pixels.pixel_vr, self._pixels.pixel_data
        self._header(_PIXEL_DATA, vr, self._pixels.pixel_length)
        while pixels is not None and (piece := pixels.read(PIECE)):
            self._out.write(self._swapped(vr, piece, not self._to.little))

    def _skip(self) -> None:
        vr, length = self._read_header(self._from)
        if length != UNDEFINED:
            for _ in self._in.pieces(length):
                pass
            return
        if vr == b"SQ":
            raise TranscodeError("a sequence stands where a value is expected")
        while True:  # fragments of encapsulated pixel data (PS3.5 A.4)
            tag = self._tag(self._in.take(4), self._from)
            size = self._number(self._in.take(4), self._from)
            for _ in self._in.pieces(size):
                pass
            if tag == _SEQUENCE_END:
                return

    # --- reading

    def _tag(self, raw: bytes, coding: _Coding) -> int:
        group, element = struct.unpack(coding.order + "HH", raw)
        return int(group) << 16 | int(element)

    def _number(self, raw: bytes, coding: _Coding) -> int:
        return int(struct.unpack(coding.order + ("I" if len(raw) == 4 else "H"), raw)[0])

    def _read_header(self, coding: _Coding) -> tuple[bytes, int]:
        """VR (b'' in an implicit one) and length of the element whose tag was read."""
        if not coding.explicit:
            return b"", self._number(self._in.take(4), coding)
        vr = self._in.take(2)
        if not (vr.isalpha() and vr.isupper()):
            raise TranscodeError("the stored data set is not in the transfer syntax it came with")
        if vr in _LONG_VRS:
            self._in.take(2)
            return vr, self._number(self._in.take(4), coding)
        return vr, self._number(self._in.take(2), coding)

    def _element(self, tag: int, coding: _Coding, scope: _Scope, depth: int) -> None:
        vr, length = self._read_header(coding)
        if tag & 0xFFFF == 0 and tag >> 16 > 2:
            # group lengths (retired) would be wrong after the rewrite
            for _ in self._in.pieces(length if length != UNDEFINED else 0):
                pass
            return
        if not vr:
            vr = b"SQ" if length == UNDEFINED else _vr_of(tag, scope)
        if vr == b"SQ" or (vr == b"UN" and length == UNDEFINED):
            # PS3.5 6.2.2 note 4: UN of undefined length is a sequence in Implicit VR Little Endian
            self._sequence(tag, length, _IMPLICIT if vr == b"UN" else coding, scope, depth + 1)
            return
        if length == UNDEFINED:
            raise TranscodeError("encapsulated pixel data in a native transfer syntax")
        if length and not self._to.explicit and vr != b"UN" and _vr_of(tag, scope) == b"SQ":
            # without its VR every reader would take it for a sequence
            raise TranscodeError("a value stands where the Standard has a sequence")
        self._value(tag, vr, length, coding, scope)

    def _sequence(self, tag: int, length: int, coding: _Coding, scope: _Scope, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise TranscodeError(f"sequences are nested more than {_MAX_DEPTH} deep")
        self._header(tag, b"SQ", UNDEFINED)
        end = self._in.position + length if length != UNDEFINED else None
        while end is None or self._in.position < end:
            item = self._tag(self._in.take(4), coding)
            size = self._number(self._in.take(4), coding)
            if item == _SEQUENCE_END and end is None:
                break
            if item != _ITEM:
                raise TranscodeError("a sequence holds something that is no item")
            self._item(size, coding, scope, depth)
        if end is not None and self._in.position != end:
            raise TranscodeError("an item is longer than its sequence")
        self._delimiter(_SEQUENCE_END, 0)

    def _item(self, size: int, coding: _Coding, outer: _Scope, depth: int) -> None:
        self._delimiter(_ITEM, UNDEFINED)
        scope = _Scope(signed=outer.signed, waveform_bytes=outer.waveform_bytes)
        end = self._in.position + size if size != UNDEFINED else None
        while end is None or self._in.position < end:
            tag = self._tag(self._in.take(4), coding)
            if tag == _ITEM_END and end is None:
                self._in.take(4)
                break
            self._element(tag, coding, scope, depth)
        if end is not None and self._in.position != end:
            raise TranscodeError("an element is longer than its item")
        self._delimiter(_ITEM_END, 0)

    # --- writing

    def _delimiter(self, tag: int, length: int) -> None:
        self._out.write(struct.pack(self._to.order + "HHI", tag >> 16, tag & 0xFFFF, length))

    def _header(self, tag: int, vr: bytes, length: int) -> None:
        order = self._to.order
        start = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
        if not self._to.explicit:
            self._out.write(start + struct.pack(order + "I", length))
        elif vr in _LONG_VRS:
            self._out.write(start + vr + b"\0\0" + struct.pack(order + "I", length))
        elif length > 0xFFFF:
            # PS3.5 6.2.2: a value too long for its VR's length field goes out as UN
            self._out.write(start + b"UN\0\0" + struct.pack(order + "I", length))
        else:
            self._out.write(start + vr + struct.pack(order + "H", length))

    def _value(self, tag: int, vr: bytes, length: int, coding: _Coding, scope: _Scope) -> None:
        self._header(tag, vr, length)
        swap = coding.little != self._to.little
        remembered = length <= 64 and (
            tag in (_PIXEL_REPRESENTATION, _WAVEFORM_BITS) or (tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF)
        )
        if remembered:
            value = self._in.take(length)
            self._remember(tag, value, coding, scope)
            self._out.write(self._swapped(vr, value, swap))
            return
        for piece in self._in.pieces(length):
            self._out.write(self._swapped(vr, piece, swap))

    def _remember(self, tag: int, value: bytes, coding: _Coding, scope: _Scope) -> None:
        if tag == _PIXEL_REPRESENTATION:
            scope.signed = len(value) == 2 and self._number(value, coding) == 1
        elif tag == _WAVEFORM_BITS:
            scope.waveform_bytes = len(value) == 2 and self._number(value, coding) == 8
        else:
            scope.creators[tag >> 16, tag & 0xFF] = value.decode("ascii", "replace").strip(" \0")

    @staticmethod
    def _swapped(vr: bytes, value: bytes, swap: bool) -> bytes:
        word = _WORD.get(vr)
        if not swap or word is None or len(value) % word:
            return value
        return np.frombuffer(value, dtype=f"V{word}").view(f"<u{word}").byteswap().tobytes()


def _vr_of(tag: int, scope: _Scope) -> bytes:
    """The VR of an element from an implicit data set; UN when nobody knows it (PS3.5 6.2.2)."""
    group, element = tag >> 16, tag & 0xFFFF
    if group & 1:
        if 0x10 <= element <= 0xFF:
            return b"LO"
        creator = scope.creators.get((group, element >> 8))
        try:
            vr = private_dictionary_VR(tag, creator) if creator else "UN"
        except KeyError:
            vr = "UN"
    else:
        try:
            vr = dictionary_VR(tag)
        except KeyError:
            vr = "UL" if element == 0 else "UN"
    if vr in ("US or SS", "US or SS or OW"):
        return b"SS" if scope.signed else b"US"
    if vr == "US or OW":
        return b"OW"
    if vr == "OB or OW":
        # PS3.5 A.1: in Implicit VR Little Endian pixel and overlay data are OW; of 8-bit waveforms C.10.9 says OB
        return b"OB" if scope.waveform_bytes and group == 0x5400 else b"OW"
    return vr.encode("ascii") if len(vr) == 2 else b"UN"


class _Input:
    """Reads exactly, and knows how far it is."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self.position = 0

    def take(self, size: int) -> bytes:
        """`size` bytes. Raises TranscodeError when there are fewer."""
        data = bytes(self._source.read(size))
        if len(data) != size:
            raise TranscodeError("the stored data set ends inside an element")
        self.position += size
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """`size` bytes in bounded pieces, each a multiple of 8 but the last."""
        while size:
            piece = self.take(min(size, PIECE))
            size -= len(piece)
            yield piece

    def at_end(self) -> bytes:
        """b'' at the end, else the next four bytes: a tag."""
        data = bytes(self._source.read(4))
        self.position += len(data)
        if len(data) not in (0, 4):
            raise TranscodeError("the stored data set ends inside an element")
        return data


class _Inflated:
    """Inflates as it is read, up to a bound (PS3.5 A.5: a raw deflate stream)."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._waiting = b""
        self._total = 0

    def read(self, size: int, /) -> bytes:
        data = bytearray()
        while len(data) < size and not self._inflate.eof:
            raw = self._inflate.unconsumed_tail or self._source.read(PIECE)
            try:
                data += self._inflate.decompress(raw, size - len(data))
            except zlib.error as exc:
                raise TranscodeError("the stored data set cannot be inflated") from exc
            if not raw:
                break
        self._total += len(data)
        if self._total > MAX_INFLATED_BYTES:
            raise TranscodeError(f"the data set inflates to more than {MAX_INFLATED_BYTES} bytes")
        return bytes(data)
