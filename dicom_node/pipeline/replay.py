"""The intake journal after a crash: every object it holds is put in its place and indexed, as if it came just now.

An object whose row tells that it was indexed is only looked after: its file must be there with its bytes. One without
a row is indexed with what its record tells (source, time, policy). One that was taken out of the index since stays out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dicom_node.errors import InvalidInstance
from dicom_node.headers import scan
from dicom_node.interfaces import Archive, CheckedArchive, CheckedIndex, InstanceIndex, JournaledObject
from dicom_node.model import ArchivedFile, ConflictPolicy, InstanceRecord, StoreOutcome
from dicom_node.pipeline.ingest import same_pixels

__all__ = ["Replay", "ReplayedArchive", "ReplayedIndex", "replay"]

log = logging.getLogger(__name__)


class ReplayedArchive(Archive, CheckedArchive, Protocol):
    """The archive as replay sees it."""

    def location_of(self, record: JournaledObject) -> str:
        """Where the object's file belongs."""
        ...

    def put_back(self, record: JournaledObject) -> ArchivedFile | None:
        """See that it is there with its bytes; None for a record that was never whole. Raises StorageError."""
        ...


class ReplayedIndex(InstanceIndex, CheckedIndex, Protocol):
    """The index as replay sees it."""

    def journaled(self, segment: bytes) -> Set[int]:
        """Offsets of the records of this segment that were indexed, or refused."""
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
        if was_indexed and index.unknown_locations([archive.location_of(record)]):
            continue  # refused or deleted
        file = archive.put_back(record)
        if file is None:
            found.torn += 1
            continue
        found.objects += 1
        if not was_indexed:
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
        with archive.examine(file.location) as found:
            header = scan(found.data_set, record.transfer_syntax_uid, max_inflated_header_bytes=max_inflated)
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
    if kept_at is not None and kept_at > receipt.received_at:
        policy = ConflictPolicy.KEEP_FIRST  # its store failed at the time, and what came since must not give way to it
    outcome = index.add_instance(instance, policy, lambda first: same_pixels(archive, first, instance))
    if outcome is StoreOutcome.REFUSED:
        index.if_unreferenced(file.location, lambda: archive.remove(file.location))
    return outcome is not StoreOutcome.REFUSED
