"""The archive and its index: bytes, rows, the intake journal, and checking one against the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dicom_node.model import (
    ArchivedFile,
    AssociationEnd,
    ConflictPolicy,
    InstanceRecord,
    JournalPlace,
    Level,
    Match,
    Query,
    Receipt,
    Source,
    StoredInstance,
    StoreOutcome,
    StoreResult,
)

__all__ = [
    "Archive",
    "ArchivedObject",
    "AssociationLog",
    "CheckedArchive",
    "CheckedIndex",
    "InstanceIndex",
    "InstanceSink",
    "JournaledObject",
    "KnownFile",
    "Spool",
]


class Spool(Protocol):
    """A data set being received. Without `commit` nothing of it survives, not even a crash."""

    def write(self, fragment: bytes | memoryview) -> None:
        """Append. Raises StorageError (out of space ...); the spool is then dead and must be discarded."""
        ...

    @property
    def length(self) -> int:
        """Data set bytes so far."""
        ...

    @property
    def sha256(self) -> str:
        """Of the data set bytes so far."""
        ...

    def view(self) -> memoryview:
        """The data set's bytes, readable until `commit` or `discard`, for validation without a copy.

        Nothing may be written after it.
        """
        ...

    def commit(self, receipt: Receipt | None = None) -> ArchivedFile:
        """Make bytes and name durable (fsync file, link, fsync folder; the order of reliability section 3).

        With a `receipt` an archive that has an intake journal may instead make bytes and receipt durable there, and
        the file later: `ArchivedFile.journal` then tells where. Whoever commits that way must hand the file to
        `Archive.settled` once it is indexed, or is not going to be.

        Raises StorageError; nothing is then visible under a final name that was not there before.
        """
        ...

    @property
    def created(self) -> bool:
        """After `commit`: whether the file is new under its name; false when the same object was there already."""
        ...

    def discard(self) -> None:
        """Forget it. Idempotent; a no-op after `commit`."""
        ...


class Archive(Protocol):
    """Durable bytes. Names derive from digests, never from a peer's text."""

    def begin(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        source_ae: str,
        made_for: str = "",
        for_results: bool = False,
    ) -> Spool:
        """Start receiving one data set; the arguments are for the file meta information (PS3.10 7.1).

        `made_for`: of a result, `model.Job.mark` of its job.

        Raises StorageError when free space is below the reserve; `for_results`: when that is used up too.
        """
        ...

    def path(self, location: str) -> str:
        """Absolute path of an archived file. Raises NotFound for a location that is not the archive's form."""
        ...

    def free_bytes(self) -> int:
        """Free space above the reserve; <= 0 means: refuse."""
        ...

    def locations(self) -> Iterator[str]:
        """Every file, for fsck; temporaries are not listed."""
        ...

    def remove(self, location: str) -> None:
        """Remove a file (of a transaction that failed, or a released variant). Missing is fine."""
        ...

    def settled(self, file: ArchivedFile, *, kept: bool = True) -> None:
        """The index holds this file as durably as the journal needs, or never will. A no-op without a journal.

        Not `kept`: it was refused or its store failed, and no replay may bring it back.
        """
        ...


class InstanceIndex(Protocol):
    """Which instances exist. Every write is durable (power-cut safe) when the call returns."""

    def add_instance(
        self,
        record: InstanceRecord,
        policy: ConflictPolicy,
        same_pixels: Callable[[StoredInstance], bool],
    ) -> StoreOutcome:
        """Index one archived instance, in one transaction with everything that must follow from it.

        Where `record.file.journal` is set the transaction notes that place, and is durable only together with the
        journal: its record is replayed at start unless the note is there.

        The same UID with the same sha256 and transfer syntax (as main row or kept variant) is DUPLICATE: no change.
        The same UID in another transfer syntax is OTHER_SYNTAX: kept as a listed variant. Other content follows
        `policy`: VARIANT or HEADER_CHANGED (decided by `same_pixels(first)`, called outside the transaction) when the
        first is kept, REPLACED, or REFUSED (nothing written). A NEW or REPLACED image of origin RECEIVED updates the
        study's and series' activity and, if the series was routed before, opens the study's next revision; SR, SEG,
        KO, PR, documents and instances of other origins never do.
        A study seen under a second (Patient ID, Issuer) is flagged, and stays one study.
        """
        ...

    def if_unreferenced(self, location: str, action: Callable[[], None]) -> bool:
        """Call `action` (which removes the file at `location`) if no row refers to the file, while none can come to.

        Returns whether it was called. `add_instance` refuses a file that is gone, so no row ever points at nothing.
        """
        ...

    def instance(self, sop_instance_uid: str) -> StoredInstance | None:
        """The visible instance of that UID, or None."""
        ...

    def instances(self, level: Level, uids: Mapping[str, Sequence[str]]) -> Iterator[StoredInstance]:
        """Visible instances under the given unique keys, ordered by series, instance number, UID; paged, no read
        transaction stays open between items. Keys: PatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID.
        """
        ...

    def find(self, query: Query) -> Iterator[Match]:
        """Matches in a stable order, keyset-paged; no read transaction stays open between items.

        Attributes the index keeps at or above `query.level`: `supported(level)`. Computed ones included:
        ModalitiesInStudy, SOPClassesInStudy, NumberOf{Patient,Study,Series}Related{Studies,Series,Instances}.
        """
        ...

    def find_pages(self, query: Query) -> Iterator[Sequence[tuple[str, ...]]]:
        """As `find`, page by page and without names: each match is the texts of `query.returns`, in that order."""
        ...

    def supported(self, level: Level) -> frozenset[str]:
        """Keywords that can be matched or returned at `level` (those of higher levels included)."""
        ...


class AssociationLog(Protocol):
    """Associations as completion sees them; rows carry the epoch of the process that holds them."""

    def open_association(self, association_id: str, source: Source) -> None:
        """A new association of this process."""
        ...

    def touch_associations(self, association_ids: Iterable[str]) -> None:
        """These had traffic since the last call (batched: every few seconds)."""
        ...

    def end_association(self, association_id: str, end: AssociationEnd) -> None:
        """It ended. Idempotent; the first end counts."""
        ...

    def mark_store_failed(self, association_id: str) -> None:
        """A C-STORE on it failed: its studies wait longer, the sender may retry."""
        ...


class InstanceSink(Protocol):
    """The one door for every instance."""

    def accept(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Iterable[bytes | memoryview],
        source: Source,
    ) -> StoreResult:
        """Validate, archive, index. Returns only when what was accepted would survive a power cut.

        Never raises for what a peer sent: the result's status says it (0x0000, 0xB000, 0xA700, 0xA900, 0xC000, 0xC409,
        0x0110).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledObject:
    """One object the intake journal holds: `length` bytes of a Part-10 file, of which `meta_length` precede its data.

    `digest` is of the data set; `read(offset, count)` gives bytes of the file, fewer at its end (OSError). `doubtful`:
    a sync of its file has failed, so that the file may be other on disk than in the system's memory.
    """

    place: JournalPlace
    receipt: Receipt
    transfer_syntax_uid: str
    length: int
    meta_length: int
    digest: bytes
    doubtful: bool
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """What the index says of one file; `present` false: it was missing or damaged when last looked for."""

    sop_instance_uid: str
    file: ArchivedFile
    present: bool
    is_variant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedObject:
    """One archived file read back and hashed; `data_set` is readable until the `examine` block ends.

    The UIDs, `source_ae` ('' for what the node itself produced) and `made_for` (`model.Job.mark`, '' for what came in)
    are those of its file meta. `named_rightly` is false when the bytes are not those the name calls for: they changed
    on disk.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    source_ae: str
    made_for: str
    file: ArchivedFile
    named_rightly: bool
    written_at: datetime
    data_set: memoryview


class CheckedArchive(Protocol):
    """The archive as fsck sees it."""

    def locations(self) -> Iterator[str]:
        """Every file; see `Archive.locations`."""
        ...

    def status(self, location: str) -> tuple[int, float] | None:
        """Size in bytes and modification time (seconds since 1970), None when it is not there."""
        ...

    def examine(self, location: str) -> AbstractContextManager[ArchivedObject]:
        """Read it back. Raises NotFound, InvalidInstance (it has not the archive's form), StorageError (unreadable)."""
        ...

    def is_whole(self, instance: StoredInstance) -> bool:
        """Whether its file is there, exactly as long as it should be, and still has the bytes that were stored."""
        ...


class CheckedIndex(Protocol):
    """The index as fsck sees it."""

    def files(self) -> Iterator[KnownFile]:
        """Every file the index knows: main ones by SOP Instance UID, then variants; paged."""
        ...

    def is_deleted(self, study_instance_uid: str, written_at: datetime, *, is_result: bool = False) -> bool:
        """Whether the study was deleted after that moment: a file of it that is as old is not to come back.

        One written shortly before may be of an image that came meanwhile; not so where `is_result`.
        """
        ...

    def is_unfinished(self, made_for: str, sop_instance_uid: str, written_at: datetime) -> bool:
        """Whether the job of that mark (`model.Job.mark`) ended after this was written, and without it: cancelled,
        given up, rejected, or done by another attempt. Of a job that the index knows as it was before that moment (it
        may have been put back from a copy) nobody can tell.
        """
        ...

    def unknown_locations(self, locations: Sequence[str]) -> Sequence[str]:
        """Those of `locations` no row refers to, in their order."""
        ...

    def mark_file(self, known: KnownFile, *, present: bool) -> None:
        """Say whether a main file is there. A missing one is served and counted nowhere; variants have no state."""
        ...

    def restore(self, record: InstanceRecord) -> StoreOutcome:
        """Index a file found in the archive, keeping the first of a UID; its series stays unrouted, nothing is run."""
        ...
