"""The form of the intake journal on disk: what a record looks like, and how records are found again.

    segment   one block of header, then records; every block is 4096 bytes, as O_DIRECT wants them
    record    one block of head, then the Part-10 file as it stands in the archive, filled up to a whole block

A record is told by the segment's random name in its head, which no peer knows, so nothing inside a received object can
be taken for one. It counts when its head's CRC and its data set's digest are right; whatever else lies between records
was never acknowledged (a write that a power cut tore).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from dicom_node.errors import InvalidInstance
from dicom_node.model import BootTime, ConflictPolicy, Origin, Receipt, Source
from dicom_node.store.buffers import BLOCK, blocks

__all__ = ["NAME_BYTES", "Head", "pack_head", "pack_segment", "read_heads", "read_segment"]

NAME_BYTES = 16
_SEGMENT = struct.Struct("<8s16sQ")  # magic, name of this life of the segment, bytes
_SEGMENT_MAGIC = b"DCMNSEG1"
# magic, name, sequence, bytes of the file, bytes of its meta information, bytes of the facts, digest
_HEAD = struct.Struct("<8s16sQQII32s")
_MAGIC = b"DCMNREC1"
_CRC = struct.Struct("<I")
_quoted = json.encoder.encode_basestring
_encode = json.JSONEncoder(separators=(",", ":")).encode
_LOOK = 256 * BLOCK  # bytes looked through at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a record says of its object. `length`: bytes of the whole file, of which `meta_length` precede the data."""

    sequence: int
    length: int
    meta_length: int
    digest: bytes
    transfer_syntax_uid: str
    receipt: Receipt


def pack_segment(name: bytes, size: int) -> bytes:
    """The header block of a segment that begins a new life under `name`: every record of before is forgotten."""
    head = _SEGMENT.pack(_SEGMENT_MAGIC, name, size)
    return (head + _CRC.pack(zlib.crc32(head))).ljust(BLOCK, b"\x00")


def read_segment(fd: int) -> tuple[bytes, int] | None:
    """Name and size of an open segment, None for one that was never finished. Raises OSError."""
    block = os.pread(fd, BLOCK, 0)
    if len(block) < BLOCK:
        return None
    magic, name, size = _SEGMENT.unpack_from(block)
    (crc,) = _CRC.unpack_from(block, _SEGMENT.size)
    if magic != _SEGMENT_MAGIC or crc != zlib.crc32(block[: _SEGMENT.size]) or os.fstat(fd).st_size < size:
        return None
    return name, size


def pack_head(name: bytes, head: Head) -> bytes | None:
    """The head block without its filling; None where the facts do not fit into a block."""
    facts = _pack_facts(head)
    fixed = _HEAD.pack(_MAGIC, name, head.sequence, head.length, head.meta_length, len(facts), head.digest)
    if len(fixed) + len(facts) + _CRC.size > BLOCK:
        return None
    return b"".join((fixed, facts, _CRC.pack(zlib.crc32(facts, zlib.crc32(fixed)))))


def read_heads(fd: int, name: bytes, size: int) -> Iterator[tuple[int, Head]]:
    """Every record of that life of the segment, as (offset of its head, head). Raises OSError.

    Its data are not looked at: the caller compares them with the digest.
    """
    mark = _MAGIC + name
    offset = BLOCK
    while offset < size:
        part = os.pread(fd, min(_LOOK, size - offset), offset)
        if not part:
            return
        step = _first(part, mark)
        if step is None:
            offset += blocks(len(part))
            continue
        head = _unpack_head(part[step : step + BLOCK])
        if head is not None and offset + step + BLOCK + head.length <= size:
            yield offset + step, head
            offset += step + BLOCK + blocks(head.length)
        else:
            offset += step + BLOCK


def _first(part: bytes, mark: bytes) -> int | None:
    """Where the first block that begins with `mark` is."""
    found = part.find(mark)
    while found >= 0:
        if found % BLOCK == 0:
            return found
        found = part.find(mark, found + 1)
    return None


def _unpack_head(block: bytes) -> Head | None:
    _, _, sequence, length, meta_length, facts_length, digest = _HEAD.unpack_from(block)
    end = _HEAD.size + facts_length
    if end + _CRC.size > len(block) or meta_length > length:
        return None
    if _CRC.unpack_from(block, end)[0] != zlib.crc32(block[:end]):
        return None
    try:
        transfer_syntax_uid, receipt = _unpack_facts(block[_HEAD.size : end])
    except (ValueError, KeyError, TypeError) as exc:
        raise InvalidInstance("a journal record of another version of the node") from exc
    return Head(
        sequence=sequence,
        length=length,
        meta_length=meta_length,
        digest=digest,
        transfer_syntax_uid=transfer_syntax_uid,
        receipt=receipt,
    )


def _pack_facts(head: Head) -> bytes:
    receipt = head.receipt
    boot = receipt.received_boot
    common = _common_facts(head.transfer_syntax_uid, receipt.source, receipt.origin, receipt.conflict_policy)
    return f'{common},"{receipt.received_at.isoformat()}",[{_quoted(boot.boot_id)},{boot.seconds!r}]]'.encode()


@lru_cache(maxsize=256)
def _common_facts(transfer_syntax_uid: str, source: Source, origin: Origin, policy: ConflictPolicy) -> str:
    """The facts but their end: the same for all that an association sends."""
    who = (source.calling_ae_title, source.called_ae_title, source.address, source.association_id)
    return _encode((transfer_syntax_uid, who, origin.value, policy.value)).removesuffix("]")


def _unpack_facts(text: bytes) -> tuple[str, Receipt]:
    syntax, (calling, called, address, association), origin, policy, received_at, (boot_id, seconds) = json.loads(text)
    return syntax, Receipt(
        source=Source(calling_ae_title=calling, called_ae_title=called, address=address, association_id=association),
        origin=Origin(origin),
        conflict_policy=ConflictPolicy(policy),
        received_at=datetime.fromisoformat(received_at),
        received_boot=BootTime(boot_id=boot_id, seconds=seconds),
    )
