"""What lies on the disk after a crash or a failing one: file meta information, the intake journal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from blake3 import blake3

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import InvalidInstance
from dicom_node.model import BootTime, ConflictPolicy, Origin, Receipt, Source
from dicom_node.store.buffers import BLOCK, blocks
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.journal import Journal
from dicom_node.store.part10 import FileMeta, build_file_meta, parse_file_meta
from dicom_node.store.segments import Head, pack_head, pack_segment

from ._target import Input, Target

__all__ = ["TARGETS"]

EXPLICIT = "1.2.840.10008.1.2.1"
NAME = b"sixteen bytes ok"


def part10(data: bytes) -> None:
    """InvalidInstance, or a file meta that lies within the file and is the same when it is written again."""
    try:
        found = parse_file_meta(memoryview(data))
    except InvalidInstance:
        return
    assert 132 < found.data_set_offset <= len(data)
    texts = (found.sop_class_uid, found.sop_instance_uid, found.transfer_syntax_uid, found.source_ae, found.made_for)
    if max(map(len, texts)) > 64 or not all(text.isascii() and text.isprintable() for text in texts):
        return
    again = parse_file_meta(memoryview(_meta(*texts)))
    assert isinstance(again, FileMeta)
    assert (again.sop_class_uid, again.sop_instance_uid, again.transfer_syntax_uid) == texts[:3]
    assert again.made_for == found.made_for


def _meta(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae: str, made_for: str = ""
) -> bytes:
    return build_file_meta(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=sop_instance_uid,
        transfer_syntax_uid=transfer_syntax_uid,
        source_ae=source_ae,
        made_for=made_for,
    )


def _metas(_: Path | None) -> Iterator[bytes]:
    yield _meta("1.2.840.10008.5.1.4.1.1.2", "1.2.3", EXPLICIT, "CT1") + b"\x08\0\x16\0UI\0\0"
    yield _meta("1.2.840.10008.5.1.4.1.1.2", "1.2.3.4.5.6", EXPLICIT, "")
    yield _meta("1.2.840.10008.5.1.4.1.1.2", "1.2.3.4.5.6", EXPLICIT, "", "7 2026-01-02T03:04:05.000006+00:00")


# --- the intake journal ----------------------------------------------------------------------------------------------


@cache
def _segment() -> tuple[bytes, dict[bytes, bytes]]:
    """A segment of three objects as a crash leaves it, and what it holds: data sets by their digests."""
    receipt = Receipt(
        source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="10.0.0.1", association_id="a"),
        origin=Origin.RECEIVED,
        conflict_policy=ConflictPolicy.KEEP_FIRST,
        received_at=datetime(2026, 3, 2, 12, 0, tzinfo=UTC),
        received_boot=BootTime(boot_id="b", seconds=1.0),
    )
    body, held = bytearray(), {}
    for number, size in enumerate((10, BLOCK, 2 * BLOCK + 1), start=1):
        data = bytes((number * at) & 0xFF for at in range(size))
        digest = blake3(data).digest()
        meta = _meta("1.2.840.10008.5.1.4.1.1.2", f"1.2.{number}", EXPLICIT, "CT1")
        head = pack_head(
            NAME,
            Head(
                sequence=number,
                length=len(meta) + size,
                meta_length=len(meta),
                digest=digest,
                transfer_syntax_uid=EXPLICIT,
                receipt=receipt,
            ),
        )
        assert head is not None
        body += head.ljust(BLOCK, b"\0") + (meta + data).ljust(blocks(len(meta) + size), b"\0")
        held[digest] = data
    size = BLOCK + len(body)
    return pack_segment(NAME, size) + bytes(body), held


@cache
def _opened() -> tuple[Catalog, Journal, Path]:
    """A catalog of this process's own, its first journal, and the folder of that."""
    data_dir = Path(tempfile.mkdtemp(prefix="fuzz-journal-"))
    catalog = open_catalog(data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0))
    opened = catalog.open_journal(0)
    (lock,) = data_dir.glob("journal/**/lock")
    return catalog, opened, lock.parent


def journal(data: bytes) -> None:
    """A segment torn, cut, changed or moved within itself: the start goes on, and only whole records come up.

    The input is a list of damages: (kind, where, what).
    """
    whole, held = _segment()
    found = bytearray(whole)
    source = Input(data)
    for _ in range(8):
        if not source:
            break
        kind, at = source.byte(), source.number(2) % (len(whole) + 1)
        if kind % 4 == 0:
            piece = source.taken(source.byte())
            found[at : at + len(piece)] = piece
        elif kind % 4 == 1:
            del found[at:]
        elif kind % 4 == 2:
            start = source.number(2) % len(whole)
            found[at : at + BLOCK] = found[start : start + BLOCK]
        else:
            block = at // BLOCK * BLOCK
            found[block : block + BLOCK] = bytes(BLOCK)
    catalog, opened, folder = _opened()
    (folder / "segment-0").write_bytes(found)
    for record in opened.left_behind():
        file = catalog.archive.put_back(record)
        if file is None:
            continue
        path = Path(catalog.archive.path(file.location))
        data_set = path.read_bytes()[file.data_set_offset :]
        path.unlink()
        assert held.get(record.digest) == data_set, "a record came up that nobody wrote"
        assert record.receipt.source.calling_ae_title == "CT1"


def _damages(_: Path | None) -> Iterator[bytes]:
    yield b""
    yield b"\1\x20\0"
    yield b"\0\x10\x20\x04torn"
    yield b"\2\x20\0\x10\0"
    yield b"\3\x10\0\2\x10\0\x30\0"


TARGETS = (
    Target(name="part10", run=part10, seeds=_metas),
    Target(name="journal", run=journal, seeds=_damages, longest=512, cost=4),
)
