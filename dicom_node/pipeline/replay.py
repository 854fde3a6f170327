"""The intake journal after a crash: every object it holds is put in its place and indexed, as if it came just now.

An object whose row tells that it was indexed only has its file written anew. One without a row is indexed with what its
record tells (source, time, policy). One that was taken out of the index since stays out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dicom_node.errors import InvalidInstance, StorageError
from dicom_node.headers import scan
from dicom_node.interfaces import Archive, CheckedArchive, CheckedIndex, InstanceIndex, JournaledObject
from dicom_node.model import ArchivedFile, ConflictPolicy, InstanceRecord
from dicom_node.pipeline.ingest import same_pixels

__all__ = ["Replay", "ReplayedArchive", "ReplayedIndex", "replay"]

log = logging.getLogger(__name__)


class ReplayedArchive(Archive, CheckedArchive, Protocol):
    """The archive as replay sees it."""

    def location_of(self, record: JournaledObject) -> str:
        """Where the object's file belongs."""
        ...

    def put_back(self, record: JournaledObject) -> ArchivedFile | None:
        """Write it anew; None for a record that was never whole. Raises StorageError."""
        ...


class ReplayedIndex(InstanceIndex, CheckedIndex, Protocol):
    """The index as replay sees it."""

    def journaled(self, segment: bytes) -> Set[int]:
        """Offsets of the records of this segment that were indexed, or refused."""
        ...

    def data_set_offset(self, location: str) -> int | None:
        """Where its row says that the data set of this file begins, None when no row refers to it."""
        ...

    def moved(self, file: ArchivedFile) -> None:
        """The file was written anew and its data set begins elsewhere now."""
        ...

    def received_at(self, sop_instance_uid: str) -> datetime | None:
        """When the instance came that is kept under this UID, None for none."""
        ...


@dataclass(slots=True)
class Replay:
    """What was found: objects looked after, of them indexed only now, and records that were never whole."""

    objects: int = 0
    indexed: int = 0
    torn: int = 0


def replay(
    records: Iterable[JournaledObject],
    archive: ReplayedArchive,
    index: ReplayedIndex,
    *,
    max_inflated_header_bytes: int,
) -> Replay:
    """Bring archive and index to where the journal says they were. Idempotent; before anything is received.

    Nothing of it is durable yet: the caller syncs both, and only then clears the journal. Raises StorageError.
    """
    found = Replay()
    noted: dict[bytes, Set[int]] = {}
    for record in records:
        segment = record.place.segment
        if segment not in noted:
            noted[segment] = index.journaled(segment)
        was_indexed = record.place.offset in noted[segment]
        known = index.data_set_offset(archive.location_of(record)) if was_indexed else None
        if was_indexed and known is None:
            continue  # refused or deleted
        file = archive.put_back(record)
        if file is None:
            found.torn += 1
            continue
        found.objects += 1
        if was_indexed:
            if file.data_set_offset != known:  # the file was gone, and had come with another sender's file meta
                index.moved(file)
        else:
            found.indexed += _index(record, file, archive, index, max_inflated_header_bytes)
    if found.objects or found.torn:
        log.warning(
            "the intake journal was replayed",
            extra={
                "action": "journal_replayed",
                "objects": found.objects,
                "indexed": found.indexed,
                "never_acknowledged": found.torn,
            },
        )
    return found


def _index(
    record: JournaledObject, file: ArchivedFile, archive: ReplayedArchive, index: ReplayedIndex, max_inflated: int
) -> bool:
    receipt, policy = record.receipt, record.receipt.conflict_policy
    try:
        data_set = memoryview(record.read(record.meta_length, file.data_set_length))
        header = scan(data_set, record.transfer_syntax_uid, max_inflated_header_bytes=max_inflated)
    except OSError as exc:
        raise StorageError(f"the intake journal cannot be read: {exc.strerror}") from exc
    except InvalidInstance as exc:  # it was read before it was journaled: this version of the node is stricter
        log.error("file unusable", extra={"action": "journal_unusable", "location": file.location, "reason": str(exc)})
        return False
    instance = InstanceRecord(
        header=header,
        file=file,
        source=receipt.source,
        origin=receipt.origin,
        received_at=receipt.received_at,
        received_boot=receipt.received_boot,
    )
    kept_at = index.received_at(header.sop_instance_uid)
    if policy is ConflictPolicy.REFUSE or (kept_at is not None and kept_at > receipt.received_at):
        # Its store may have failed at the time, and what came since must not give way to it. Or that of the one kept:
        # then this is the one that was acknowledged, whatever its policy
        policy = ConflictPolicy.KEEP_FIRST
    index.add_instance(instance, policy, lambda first: same_pixels(archive, first, instance))
    return True
