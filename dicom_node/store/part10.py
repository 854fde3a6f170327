"""The node's own Part-10 envelope: preamble, prefix and File Meta Information (PS3.10 7.1).

Written by us around the data set as it was received, and read back only from files the archive wrote, so the reader
accepts this one form and nothing else. A result says in its private information (0002,0102) which job it is of: its
row comes later, and until then nothing else tells whether anybody still wants it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from dicom_node.errors import InvalidInstance
from dicom_node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

__all__ = ["FileMeta", "build_file_meta", "parse_file_meta"]

_PREFIX = b"\x00" * 128 + b"DICM"
_GROUP_LENGTH = struct.Struct("<HH2sHI")  # (0002,0000) UL, length 4, value


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMeta:
    """What the File Meta Information says; `source_ae` is '' for what the node itself produced, `made_for` for what
    came in.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    source_ae: str
    made_for: str
    data_set_offset: int


def build_file_meta(
    *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae: str, made_for: str = ""
) -> bytes:
    """Preamble, DICM and group 0002 in Explicit VR Little Endian, group length right.

    An empty `source_ae` leaves (0002,0016) out, an empty `made_for` (0002,0100) and (0002,0102). The length depends on
    the arguments only.
    """
    before, after = _around(sop_class_uid, transfer_syntax_uid, source_ae.strip()[:16])
    group = b"".join((before, _text(0x0003, b"UI", sop_instance_uid), after, _private(made_for)))
    return _PREFIX + _GROUP_LENGTH.pack(0x0002, 0x0000, b"UL", 4, len(group)) + group


@lru_cache(maxsize=256)
def _around(sop_class_uid: str, transfer_syntax_uid: str, source_ae: str) -> tuple[bytes, bytes]:
    """The elements before and after the SOP Instance UID: the same for all that one sender sends of a kind."""
    before = (
        _bytes(0x0001, b"\x00\x01"),
        _text(0x0002, b"UI", sop_class_uid),
    )
    after = [
        _text(0x0010, b"UI", transfer_syntax_uid),
        _text(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
        _text(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
    ]
    if source_ae:
        after.append(_text(0x0016, b"AE", source_ae))
    return b"".join(before), b"".join(after)


def _text(element: int, vr: bytes, text: str) -> bytes:
    value = text.encode("ascii", "replace")
    if len(value) % 2:
        value += b"\x00" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr, len(value)) + value


def _private(made_for: str) -> bytes:
    if not made_for:
        return b""
    return _text(0x0100, b"UI", IMPLEMENTATION_CLASS_UID) + _bytes(0x0102, made_for.encode("ascii", "replace"))


def _bytes(element: int, value: bytes) -> bytes:
    value += b"\x00" * (len(value) % 2)
    return struct.pack("<HH2sHI", 0x0002, element, b"OB", 0, len(value)) + value


def parse_file_meta(view: memoryview) -> FileMeta:
    """Read what `build_file_meta` wrote. Raises InvalidInstance for anything else."""
    head = len(_PREFIX) + _GROUP_LENGTH.size
    if len(view) < head or bytes(view[: len(_PREFIX)]) != _PREFIX:
        raise InvalidInstance("no Part-10 prefix")
    group, element, vr, _, length = _GROUP_LENGTH.unpack_from(view, len(_PREFIX))
    if (group, element, vr) != (0x0002, 0x0000, b"UL") or head + length > len(view):
        raise InvalidInstance("no file meta group length")
    values: dict[int, str] = {}
    position, end = head, head + length
    while position < end:
        if position + 8 > end:
            raise InvalidInstance("file meta is cut short")
        group, element, vr, size = struct.unpack_from("<HH2sH", view, position)
        start = position + 8
        if vr == b"OB":
            if start + 4 > end:
                raise InvalidInstance("file meta is cut short")
            (size,) = struct.unpack_from("<I", view, start)
            start += 4
        if group != 0x0002 or start + size > end:
            raise InvalidInstance("file meta is not ours")
        values[element] = bytes(view[start : start + size]).decode("ascii", "replace").rstrip("\x00 ")
        position = start + size
    try:
        return FileMeta(
            sop_class_uid=values[0x0002],
            sop_instance_uid=values[0x0003],
            transfer_syntax_uid=values[0x0010],
            source_ae=values.get(0x0016, ""),
            made_for=values.get(0x0102, "") if values.get(0x0100) == IMPLEMENTATION_CLASS_UID else "",
            data_set_offset=end,
        )
    except KeyError as exc:
        raise InvalidInstance(f"file meta lacks (0002,{exc.args[0]:04X})") from None
