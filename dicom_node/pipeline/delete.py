"""The deletion of one study: told to the audit trail, taken out of the catalog, its files removed, told again.

The order is `store.deletions`'; whatever interrupts it, `finish_all` goes on with what is left. A deletion begins once
the audit trail has it on disk. Where that cannot be had it begins all the same, or a full disk would never be emptied;
but the catalog does not forget whom it was about, nor that it goes on, before the trail has told that it is done. Only
UIDs, counts and names of the configuration are logged; the audit trail is told the patient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, AuditTrail, NoAuditTrail, Participant
from dicom_node.errors import NodeError, StorageError
from dicom_node.retention import PERSON, Deletion, DeletionOrder, Held, Hold, StudyHeld

__all__ = ["Deleter", "DeletionBook", "FileRemover"]

log = logging.getLogger(__name__)

FILES_AT_ONCE = 16  # removed while nobody else may write to the catalog


class DeletionBook(Protocol):
    """The catalog as a deletion needs it (`store.deletions.Deletions`)."""

    def study_held(self, study_instance_uid: str, holds: frozenset[Hold]) -> Sequence[Held]:
        """Which of `holds` keep the study. Raises NotFound."""
        ...

    def study_contents(self, study_instance_uid: str) -> tuple[Sequence[str], Mapping[str, int], int]:
        """Patient IDs, SOP class to number of objects, bytes. Raises NotFound."""
        ...

    def begin_deletion(self, order: DeletionOrder) -> Deletion:
        """Take its rows out, durably. Raises NotFound, StudyHeld."""
        ...

    def doomed(self, deletion: Deletion) -> Sequence[str]:
        """Locations of its files that may still be there."""
        ...

    def remove_doomed(self, locations: Sequence[str], remove: Callable[[str], None]) -> None:
        """`remove` those that no row speaks of."""
        ...

    def end_deletion(self, deletion: Deletion) -> bool:
        """Nothing is left of it; False: somebody else has ended it."""
        ...

    def unfinished_deletions(self) -> Sequence[Deletion]:
        """Those whose files may not all be gone."""
        ...


class FileRemover(Protocol):
    """The archive as a deletion needs it."""

    def remove(self, location: str) -> None:
        """Remove a file; one that is gone is no error. Raises StorageError."""
        ...

    def sync_names(self, shards: Iterable[str]) -> None:
        """Make removals in these shards durable. Raises StorageError."""
        ...


class Deleter:
    """Deletes whole studies, and ends what an earlier process began. Any number may be at work at a time."""

    def __init__(
        self,
        book: DeletionBook,
        archive: FileRemover,
        *,
        ae_title: str,
        audit: AuditTrail | None = None,
        quarantined: Callable[[], frozenset[str]] = frozenset,
        on_deleted: Callable[[Deletion], None] = lambda deletion: None,
    ) -> None:
        """`quarantined`: studies of which files are in the quarantine. `on_deleted` is called once a deletion ended."""
        self._book, self._archive = book, archive
        self._node = Participant(ae_title=ae_title, is_this_node=True)
        self._audit = audit or NoAuditTrail()
        self._quarantined, self._on_deleted = quarantined, on_deleted
        self._told: set[int] = set()  # deletions of which the trail was told, but may not have kept it

    def held(self, study_instance_uid: str, holds: frozenset[Hold]) -> Sequence[Held]:
        """Which of `holds` keep the study. Raises NotFound."""
        found = list(self._book.study_held(study_instance_uid, holds))
        if Hold.QUARANTINE in holds and study_instance_uid in self._quarantined():
            text = "files that engines returned for it are in the quarantine; look at them and remove them there"
            found.append(Held(Hold.QUARANTINE, text))
        return found

    def delete(self, order: DeletionOrder) -> Deletion:
        """Delete the study. Raises NotFound, StudyHeld: nothing was changed then.

        Any other error after the rows are gone leaves files to `finish_all`, and the study is deleted all the same:
        `Deletion.ended_at` is not asked for here.
        """
        patients, instances, _ = self._book.study_contents(order.study_instance_uid)
        self._tell(order, patients, instances, AuditOutcome.SUCCESS, f"begins: {order.why}")
        if not self._audit.settled():
            log.error("a study is deleted before the audit trail has it on disk", extra={"rule": order.rule})
        try:
            if found := self.held(order.study_instance_uid, order.holds):
                raise StudyHeld(found)
            deletion = self._book.begin_deletion(order)
        except NodeError as exc:
            self._tell(order, patients, instances, AuditOutcome.MINOR_FAILURE, f"not done: {exc}")
            raise
        log.info(
            "study deleted",
            extra={
                "action": "study_deleted",
                "study": deletion.study_instance_uid,
                "rule": deletion.rule,
                "who": deletion.who,
                "why": deletion.why,
                "files": deletion.files,
                "bytes": deletion.bytes,
                "safe": dict(deletion.safe),
            },
        )
        try:
            self.finish(deletion)
        except NodeError as exc:
            log.error(
                "the deletion of a study could not be ended; that is tried again",
                extra={"action": "deletion_unfinished", "study": deletion.study_instance_uid, "error": str(exc)},
            )
        return deletion

    def refuse(self, order: DeletionOrder, held: Sequence[Held]) -> NoReturn:
        """Tell that it was asked for and is not done. Raises StudyHeld, NotFound."""
        patients, instances, _ = self._book.study_contents(order.study_instance_uid)
        refusal = StudyHeld(held)
        self._tell(order, patients, instances, AuditOutcome.MINOR_FAILURE, f"not done: {refusal}")
        raise refusal

    def finish(self, deletion: Deletion) -> None:
        """Remove its files, make that durable, tell it, and end it. Idempotent. Raises StorageError."""
        self._remove(deletion)
        self._end([deletion])

    def finish_all(self) -> int:
        """Go on with what a crash or a failing disk left; how many were ended. Raises StorageError."""
        left = self._book.unfinished_deletions()
        for deletion in left:
            self._remove(deletion)
        self._end(left)
        return len(left)

    def _remove(self, deletion: Deletion) -> None:
        locations = self._book.doomed(deletion)
        for start in range(0, len(locations), FILES_AT_ONCE):
            self._book.remove_doomed(locations[start : start + FILES_AT_ONCE], self._archive.remove)
        self._archive.sync_names(sorted({location[:2] for location in locations}))

    def _end(self, deletions: Sequence[Deletion]) -> None:
        """Once the trail has them: told twice, after a crash, rather than never."""
        for deletion in deletions:
            if deletion.id not in self._told:
                self._told.add(deletion.id)
                self._tell(deletion, deletion.patient_ids, deletion.instances, AuditOutcome.SUCCESS, "done")
        if deletions and not self._audit.settled():
            raise StorageError("the audit trail does not take that studies were deleted")
        for deletion in deletions:
            if self._book.end_deletion(deletion):
                self._on_deleted(deletion)
            self._told.discard(deletion.id)

    def _tell(
        self,
        what: DeletionOrder | Deletion,
        patient_ids: Sequence[str],
        instances: Mapping[str, int],
        outcome: AuditOutcome,
        how: str,
    ) -> None:
        is_person = what.rule == PERSON
        person = (Participant(user=what.who, is_requestor=True),) if is_person else ()
        by = "by a person" if what.rule == PERSON else f"by retention rule {what.rule}"
        self._audit.record(
            AuditEvent(
                kind=AuditKind.STUDY_DELETED,
                outcome=outcome,
                participants=(*person, replace(self._node, is_requestor=not is_person)),
                study_instance_uids=(what.study_instance_uid,),
                patient_ids=tuple(patient_ids),
                instances=dict(instances),
                detail=f"deletion {by}, {how}",
            )
        )
