"""The one door: every instance, received or produced, becomes durable here or is refused here.

    reserve · spool · scan · identity · archive (bytes and name) · index (row)          then Success

What was acknowledged survives a power cut, because each step is durable before the next, or the archive's journal
holds bytes and facts and is replayed (`pipeline.replay`). What is refused leaves nothing. Only UIDs and constant words
are logged: texts of unforeseen exceptions may hold values of the data set.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from dicom_node.errors import CatalogBusy, IdentityMismatch, InvalidInstance, NodeError, StorageError
from dicom_node.headers import DEFLATED_SYNTAXES, normalise_uid, scan
from dicom_node.interfaces import Archive, Clock, InstanceIndex, Spool
from dicom_node.model import (
    ArchivedFile,
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    Origin,
    Receipt,
    Source,
    StoredInstance,
    StoreOutcome,
    StoreResult,
)

__all__ = ["Ingest", "same_pixels"]

log = logging.getLogger(__name__)

SUCCESS = 0x0000
COERCED = 0xB000  # PS3.4 table B.2-1: a warning; here, the same instance is kept in two transfer syntaxes
CONFLICT = 0xC409
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.1

_STORED = StoreResult(status=SUCCESS, outcome=StoreOutcome.NEW)
_NODE = Source(calling_ae_title="", called_ae_title="", address="")
_PIECE = 1024 * 1024

Fragments = Iterable[bytes | memoryview]


class Ingest:
    """`interfaces.InstanceSink`, and `stage` for results. Safe for many threads at once."""

    def __init__(
        self,
        archive: Archive,
        index: InstanceIndex,
        *,
        conflict_policy_for: Callable[[Source], ConflictPolicy],
        origin_for: Callable[[Source], Origin],
        max_object_bytes: int,
        max_inflated_header_bytes: int,
        clock: Clock,
        on_stored: Callable[[InstanceRecord, StoreOutcome], None] | None = None,
    ) -> None:
        """`on_stored` is called after the index transaction, also for outcomes that changed nothing."""
        self._archive = archive
        self._index = index
        self._conflict_policy_for = conflict_policy_for
        self._origin_for = origin_for
        self._max_object_bytes = max_object_bytes
        self._max_inflated_header_bytes = max_inflated_header_bytes
        self._clock = clock
        self._on_stored = on_stored

    def accept(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Fragments,
        source: Source,
    ) -> StoreResult:
        """See `interfaces.InstanceSink.accept`. Fragments are always read to their end, also of what is refused.

        What `fragments` itself raises (the association broke) passes through; nothing of the object is kept then.
        """
        incoming = _Fragments(fragments)
        try:
            return self._accept(sop_class_uid, sop_instance_uid, transfer_syntax_uid, incoming, source)
        except NodeError as exc:
            if exc is incoming.broken:
                raise
            incoming.drain()
            log.warning(
                "instance refused",
                extra={
                    "action": "instance_refused",
                    "status": f"{exc.dimse_status:04X}",
                    "reason": str(exc),
                    "association": source.association_id,
                },
            )
            return StoreResult(status=exc.dimse_status, comment=_comment(str(exc)))
        except Exception as exc:
            if exc is incoming.broken:
                raise
            incoming.drain()
            log.error("instance failed", extra={"action": "instance_failed", **_where(exc)})
            return StoreResult(status=PROCESSING_FAILURE, comment="the node failed; the reason is in its log")

    def stage(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Fragments,
        origin: Origin = Origin.PRODUCED,
        source: Source = _NODE,
        made_for: str = "",
    ) -> InstanceRecord:
        """Make the bytes of a result durable; it becomes visible when the job's last transaction indexes the record.

        Staging the same bytes again gives an equal file. A staged file that is never indexed is found by fsck, which
        knows by `made_for` (`model.Job.mark`) whose it was.
        Raises StorageError, InvalidInstance, IdentityMismatch.
        """
        incoming = _Fragments(fragments)
        requested = (sop_class_uid, sop_instance_uid)
        record, _ = self._archive_one(requested, transfer_syntax_uid, incoming, source, origin, made_for=made_for)
        return record

    # --- the steps

    def _accept(
        self, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, incoming: _Fragments, source: Source
    ) -> StoreResult:
        requested = (normalise_uid(sop_class_uid)[0], normalise_uid(sop_instance_uid)[0])
        policy, origin = self._conflict_policy_for(source), self._origin_for(source)
        record, created = self._archive_one(requested, transfer_syntax_uid, incoming, source, origin, policy)
        kept = False
        try:
            outcome = self._index.add_instance(record, policy, lambda first: same_pixels(self._archive, first, record))
            kept = outcome is not StoreOutcome.REFUSED
        except CatalogBusy:
            kept = True
            raise  # the row may yet be written; a file without one is harmless
        except BaseException:
            self._remove(record.file, created)
            raise
        finally:
            self._archive.settled(record.file, kept=kept)
        if outcome is StoreOutcome.REFUSED:
            self._remove(record.file, created)
        return self._answer(record, outcome)

    def _archive_one(
        self,
        requested: tuple[str, str],
        transfer_syntax_uid: str,
        incoming: _Fragments,
        source: Source,
        origin: Origin,
        policy: ConflictPolicy | None = None,
        made_for: str = "",
    ) -> tuple[InstanceRecord, bool]:
        """The bytes, durable. With a `policy`, the one they will be indexed by, the intake journal may hold them."""
        sop_class_uid, sop_instance_uid = requested
        spool = self._archive.begin(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            source_ae=source.calling_ae_title,
            made_for=made_for,
            for_results=origin is not Origin.RECEIVED,
        )
        try:
            for fragment in incoming:
                if spool.length + len(fragment) > self._max_object_bytes:
                    raise StorageError(f"the object is larger than {self._max_object_bytes} bytes")
                spool.write(fragment)
            header = self._scan(spool, transfer_syntax_uid)
            _check_identity(header, requested)
            received_at, received_boot = self._clock.wall(), self._clock.boot()
            receipt = policy and Receipt(
                source=source,
                origin=origin,
                conflict_policy=policy,
                received_at=received_at,
                received_boot=received_boot,
            )
            file = spool.commit(receipt)
        finally:
            spool.discard()
        record = InstanceRecord(
            header=header,
            file=file,
            source=source,
            origin=origin,
            received_at=received_at,
            received_boot=received_boot,
        )
        return record, spool.created

    def _scan(self, spool: Spool, transfer_syntax_uid: str) -> InstanceHeader:
        if spool.length == 0:
            raise InvalidInstance("the data set is empty")
        return scan(spool.view(), transfer_syntax_uid, max_inflated_header_bytes=self._max_inflated_header_bytes)

    def _remove(self, file: ArchivedFile, created: bool) -> None:
        """Take back a file that no row refers to; one that was there before is not ours to remove."""
        if created:
            with suppress(NodeError):  # it stays an orphan, which fsck finds
                self._index.if_unreferenced(file.location, lambda: self._archive.remove(file.location))

    def _answer(self, record: InstanceRecord, outcome: StoreOutcome) -> StoreResult:
        if self._on_stored is not None:
            self._on_stored(record, outcome)
        if outcome is StoreOutcome.NEW and not log.isEnabledFor(logging.DEBUG):
            return _STORED
        extra = {
            "action": "instance_stored",
            "outcome": outcome.value,
            "instance": record.header.sop_instance_uid,
            "association": record.source.association_id,
        }
        if outcome in (StoreOutcome.NEW, StoreOutcome.DUPLICATE, StoreOutcome.SET_ASIDE):
            log.debug("instance stored", extra=extra)
            return StoreResult(status=SUCCESS, outcome=outcome)
        log.warning("instance differs from the one kept under its UID", extra=extra)
        if outcome is StoreOutcome.REFUSED:
            return StoreResult(
                status=CONFLICT, outcome=outcome, comment="the SOP Instance UID is taken by other content"
            )
        if outcome is StoreOutcome.OTHER_SYNTAX:
            return StoreResult(status=COERCED, outcome=outcome, comment="kept beside its other transfer syntax")
        return StoreResult(status=SUCCESS, outcome=outcome)


def same_pixels(archive: Archive, first: StoredInstance, record: InstanceRecord) -> bool:
    """Whether only the header changed: both end in the same bytes from the pixel data element on.

    The transfer syntax is the same. False without pixel data, for deflated data sets, and when the first cannot be
    read: it is then told as other content.
    """
    offset = record.header.pixel_data_offset
    if offset is None or record.header.transfer_syntax_uid in DEFLATED_SYNTAXES:
        return False
    length = record.file.data_set_length - offset
    if length > first.data_set_length:
        return False
    try:
        with open(first.path, "rb") as one, open(archive.path(record.file.location), "rb") as other:
            one.seek(first.data_set_offset + first.data_set_length - length)
            other.seek(record.file.data_set_offset + offset)
            return all(one.read(_PIECE) == other.read(_PIECE) for _ in range(0, length, _PIECE))
    except OSError:
        return False


class _Fragments:
    """A peer's fragments, read once and to their end; `broken` is what reading them raised."""

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = iter(fragments)
        self.broken: BaseException | None = None

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return self

    def __next__(self) -> bytes | memoryview:
        try:
            return next(self._fragments)
        except StopIteration:
            raise
        except BaseException as exc:
            self.broken = exc
            raise

    def drain(self) -> None:
        """Read what is left and forget it, so that the peer gets to reading its answer."""
        for _ in self:
            pass


def _check_identity(header: InstanceHeader, requested: tuple[str, str]) -> None:
    sop_class_uid, sop_instance_uid = requested
    if header.sop_instance_uid != sop_instance_uid:
        raise IdentityMismatch("the data set's SOP Instance UID is not the request's")
    if header.sop_class_uid != sop_class_uid:
        raise IdentityMismatch("the data set's SOP Class UID is not the request's")


def _comment(reason: str) -> str:
    return reason[:64]  # PS3.7 annex C: Error Comment (0000,0902) is LO


def _where(exc: BaseException) -> dict[str, object]:
    """An unforeseen exception without its text: types and places only, innermost last."""
    frames = traceback.extract_tb(exc.__traceback__)[-8:]
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
    chain: list[str] = []
    link: BaseException | None = exc
    while link is not None and len(chain) < 4:
        chain.append(type(link).__name__)
        link = link.__cause__ or link.__context__
    return {"error": chain[0], "caused_by": chain[1:], "at": places}
