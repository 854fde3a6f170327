"""Archive against index: what is there without a row, what has a row and is not there.

Nothing is ever deleted. A file without a row (its sender never had an answer, or the index was lost) is checked as if
it had just come in and, with `rebuild`, indexed, unless it is a result of a run that came to nothing; a row without a
good file is marked missing, so that it is neither served nor counted nor committed. An index that was lost is rebuilt
from the files alone.

Rebuilt instances are RECEIVED, from the AE in their file meta, at the time their file was written (without an AE there:
PRODUCED). Their series are routed 'none': nothing that was analysed before is analysed again; an image that is sent,
new or again, or `dicom-node route`, opens them. Of several files under one UID the oldest is the one served, the others
are variants.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from dicom_node.digests import is_digest_of
from dicom_node.errors import InvalidInstance, NotFound, StorageError
from dicom_node.headers import scan
from dicom_node.interfaces import ArchivedObject, CheckedArchive, CheckedIndex, Clock, KnownFile
from dicom_node.model import (
    ArchivedFile,
    InstanceRecord,
    Origin,
    Source,
    StoreOutcome,
)

__all__ = ["Checked", "FsckReport", "fsck"]

log = logging.getLogger(__name__)

_BATCH = 500


class Checked(Protocol):
    """What fsck needs of a catalog; `store.catalog.Catalog` is one."""

    @property
    def archive(self) -> CheckedArchive:
        """The bytes."""
        ...

    @property
    def index(self) -> CheckedIndex:
        """The rows."""
        ...

    @property
    def quarantine(self) -> CheckedQuarantine:
        """What engines returned and does not fit."""
        ...


class Kept(Protocol):
    """A file in the quarantine."""

    @property
    def name(self) -> str:
        """In its folder."""
        ...

    @property
    def reason(self) -> str:
        """Why it is there; no patient data."""
        ...


class CheckedQuarantine(Protocol):
    """The quarantine as fsck sees it."""

    def listed(self) -> Sequence[Kept]:
        """Every file, oldest first."""
        ...


@dataclass(slots=True)
class FsckReport:
    """What was found; SOP Instance UIDs and locations, never values. `clean` is what an exit status follows.

    missing: rows whose file is gone; damaged: rows whose file has another size or (if hashed) other bytes;
    missing_variants: the same of variants. found_again: rows once marked missing whose file is good.
    unindexed: good files without a row that were left so (no rebuild); indexed: those that were given one.
    superseded: files of results that were made again under the same UID; the first one is kept and served.
    deleted: files older than the deletion of their study, brought back by a copy maybe; left, and not indexed.
    unfinished: files of results whose job ended without them after they were written: it was cancelled or given up, or
    another attempt made others. Nobody ever saw them; left, and not indexed.
    unusable: files without a row that are no valid object, left where they are.
    quarantined: files engines returned that do not fit, with the reason; a matter for a person, no disagreement.
    """

    rows: int = 0
    files: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing_variants: list[str] = field(default_factory=list)
    found_again: list[str] = field(default_factory=list)
    indexed: list[str] = field(default_factory=list)
    unindexed: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether archive and index agree now."""
        return not (self.missing or self.damaged or self.missing_variants or self.unindexed or self.unusable)


def fsck(
    catalog: Checked,
    *,
    rebuild: bool,
    verify_hashes: bool,
    clock: Clock,
    max_inflated_header_bytes: int = 16 * 1024**2,
) -> FsckReport:
    """Compare both sides, mark rows, and with `rebuild` index what has no row. Idempotent.

    Only while nothing is being received (`store.lock.data_lock`): an object between its name and its row would look
    like one without a row. `verify_hashes` reads every byte. Raises StorageError when the catalog cannot be used.
    """
    report = FsckReport()
    for known in catalog.index.files():
        _check_row(catalog, known, verify_hashes, report)
    orphans = sorted(_orphans(catalog, report))
    for _, location in orphans:
        _check_orphan(catalog, location, rebuild, clock, max_inflated_header_bytes, report)
    report.quarantined = [f"{kept.name}: {kept.reason}" for kept in catalog.quarantine.listed()]
    log.info(
        "archive checked",
        extra={
            "action": "fsck",
            "rows": report.rows,
            "files": report.files,
            "missing": len(report.missing),
            "damaged": len(report.damaged),
            "indexed": len(report.indexed),
            "unindexed": len(report.unindexed),
            "unfinished": len(report.unfinished),
            "unusable": len(report.unusable),
            "quarantined": len(report.quarantined),
        },
    )
    return report


def _check_row(catalog: Checked, known: KnownFile, verify_hashes: bool, report: FsckReport) -> None:
    report.rows += 1
    fault = _fault(catalog.archive, known.file, verify_hashes)
    if known.is_variant:
        if fault is not None:
            report.missing_variants.append(known.sop_instance_uid)
        return
    if fault is not None:
        getattr(report, fault).append(known.sop_instance_uid)
        if known.present:
            catalog.index.mark_file(known, present=False)
    elif not known.present and (verify_hashes or _fault(catalog.archive, known.file, True) is None):
        catalog.index.mark_file(known, present=True)
        report.found_again.append(known.sop_instance_uid)
    elif not known.present:
        report.damaged.append(known.sop_instance_uid)


def _fault(archive: CheckedArchive, file: ArchivedFile, verify_hash: bool) -> str | None:
    """None for a good file, else the list of the report it belongs in."""
    status = archive.status(file.location)
    if status is None:
        return "missing"
    if status[0] != file.data_set_offset + file.data_set_length:
        return "damaged"
    if verify_hash:
        try:
            with archive.examine(file.location) as found:
                if replace(found.file, sha256=file.sha256) != file:
                    return "damaged"
                if not is_digest_of(file.sha256, found.data_set, found.file.sha256):
                    return "damaged"
        except NotFound:
            return "missing"
        except (InvalidInstance, StorageError):
            return "damaged"
    return None


def _orphans(catalog: Checked, report: FsckReport) -> Iterator[tuple[float, str]]:
    """Files without a row, with the time they were written: the first received is the one to keep."""
    locations = catalog.archive.locations()
    while batch := list(islice(locations, _BATCH)):
        report.files += len(batch)
        for location in catalog.index.unknown_locations(batch):
            status = catalog.archive.status(location)
            if status is not None:
                yield status[1], location


def _check_orphan(
    catalog: Checked, location: str, rebuild: bool, clock: Clock, max_inflated: int, report: FsckReport
) -> None:
    try:
        with catalog.archive.examine(location) as found:
            record, made_for = _record(found, clock, max_inflated), found.made_for
    except (InvalidInstance, NotFound, StorageError) as exc:
        log.warning("file unusable", extra={"action": "fsck_unusable", "location": location, "reason": str(exc)})
        report.unusable.append(location)
        return
    if catalog.index.is_deleted(record.header.study_instance_uid, record.received_at, is_result=bool(made_for)):
        report.deleted.append(location)
        return
    if made_for and catalog.index.is_unfinished(made_for, record.header.sop_instance_uid, record.received_at):
        report.unfinished.append(location)
        return
    if not rebuild:
        report.unindexed.append(location)
        return
    outcome = catalog.index.restore(record)
    (report.superseded if outcome is StoreOutcome.DUPLICATE else report.indexed).append(location)


def _record(found: ArchivedObject, clock: Clock, max_inflated: int) -> InstanceRecord:
    """The record of a file as if it had just come in. Raises InvalidInstance."""
    if not found.named_rightly:
        raise InvalidInstance("the bytes are not those the name calls for")
    header = scan(found.data_set, found.transfer_syntax_uid, max_inflated_header_bytes=max_inflated)
    if (header.sop_class_uid, header.sop_instance_uid) != (found.sop_class_uid, found.sop_instance_uid):
        raise InvalidInstance("file meta and data set name different objects")
    return InstanceRecord(
        header=header,
        file=found.file,
        source=Source(calling_ae_title=found.source_ae, called_ae_title="", address=""),
        origin=Origin.RECEIVED if found.source_ae else Origin.PRODUCED,
        received_at=found.written_at,
        received_boot=clock.boot(),
    )
