"""What is told to the audit trail of transfers: counted where objects pass, told once for an association and a study.

On the path of an object there is a look into a dictionary and an addition; the first object of a study on an
association begins its transfer, the end of the association ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, AuditTrail, Participant, Role
from dicom_node.model import Source, StoredInstance, StoreOutcome

__all__ = ["ReceivedStudies", "SentStudies", "peer_of", "to_destination"]

MAX_STUDIES = 256  # counted at a time on one association; more, and what was counted is told

_CHANGED = frozenset({StoreOutcome.REPLACED, StoreOutcome.VARIANT, StoreOutcome.HEADER_CHANGED})


def peer_of(source: Source, user: str = "") -> tuple[Participant, Participant]:
    """Whoever called, for the `user` it identified itself as, and this node as it was called."""
    caller = Participant(ae_title=source.calling_ae_title, host=source.address, user=user, is_requestor=True)
    return caller, Participant(ae_title=source.called_ae_title, is_this_node=True)


@dataclass(slots=True)
class _Study:
    instances: Counter[str] = field(default_factory=Counter)
    action: str = "R"  # PS3.15 A.5.3.7: all of it was here; C: some was not; U: what was here was altered


@dataclass(slots=True)
class _Received:
    participants: tuple[Participant, Participant]
    studies: dict[tuple[str, str], _Study] = field(default_factory=dict)  # by Study Instance UID and Patient ID
    refused: int = 0


class ReceivedStudies:
    """What came by C-STORE, by association. Of one process; each association is told of by one thread at a time."""

    def __init__(self, audit: AuditTrail) -> None:
        self._audit = audit
        self._open: dict[str, _Received] = {}

    def identified(self, source: Source, user: str) -> None:
        """The association is for this user, as was proved."""
        received = self._of(source)
        if received is not None:
            received.participants = peer_of(source, user)

    def stored(
        self, source: Source, study_instance_uid: str, sop_class_uid: str, patient_id: str, outcome: StoreOutcome
    ) -> None:
        """An object was kept."""
        received = self._of(source)
        if received is None:
            return
        study = received.studies.get((study_instance_uid, patient_id))
        if study is None:
            if len(received.studies) >= MAX_STUDIES:
                self._tell(received, AuditOutcome.SUCCESS, "")
                received.studies.clear()
            study = received.studies[study_instance_uid, patient_id] = _Study()  # a message is about one patient
            self._audit.record(
                AuditEvent(
                    kind=AuditKind.TRANSFER_BEGUN,
                    participants=received.participants,
                    study_instance_uids=(study_instance_uid,),
                    patient_ids=(patient_id,),
                )
            )
        study.instances[sop_class_uid] += 1
        if outcome is StoreOutcome.NEW:
            study.action = "C"
        elif outcome in _CHANGED and study.action == "R":
            study.action = "U"

    def refused(self, source: Source) -> None:
        """An object was answered with a failure."""
        received = self._of(source)
        if received is not None:
            received.refused += 1

    def ended(self, source: Source, *, over: bool) -> None:
        """The association ended; `over`: its sender was through."""
        received = self._open.pop(source.association_id or "", None)
        if received is None:
            return
        self._tell(received, AuditOutcome.SUCCESS, "" if over else "the association did not end by a release")
        if received.refused:
            patients = tuple({patient: None for _, patient in received.studies})
            of_one = len(patients) == 1  # else nobody knows of which
            self._audit.record(
                AuditEvent(
                    kind=AuditKind.TRANSFERRED,
                    outcome=AuditOutcome.MINOR_FAILURE,
                    participants=received.participants,
                    study_instance_uids=tuple(study for study, _ in received.studies) if of_one else (),
                    patient_ids=patients if of_one else (),
                    detail=f"{received.refused} objects were refused",
                )
            )

    def _of(self, source: Source) -> _Received | None:
        if not source.association_id:
            return None
        received = self._open.get(source.association_id)
        if received is None:
            received = self._open[source.association_id] = _Received(peer_of(source))
        return received

    def _tell(self, received: _Received, outcome: AuditOutcome, detail: str) -> None:
        for (uid, patient_id), study in received.studies.items():
            self._audit.record(
                AuditEvent(
                    kind=AuditKind.TRANSFERRED,
                    outcome=outcome,
                    participants=received.participants,
                    study_instance_uids=(uid,),
                    patient_ids=(patient_id,),
                    instances=study.instances,
                    action=study.action,
                    detail=detail,
                )
            )


class SentStudies:
    """One sending of stored objects to one place: begun with its first object, told by study when it has ended.

    `participants` say who sends, who receives and who asked.
    """

    def __init__(self, audit: AuditTrail, participants: Iterable[Participant]) -> None:
        self._audit, self._participants = audit, tuple(participants)
        self._sent: dict[str, Counter[str]] = {}
        self._failed: dict[str, Counter[str]] = {}

    def begun(self, study_instance_uids: Iterable[str]) -> None:
        """It is about to begin; studies that are known are passed over."""
        for uid in study_instance_uids:
            if uid not in self._sent:
                self._sent[uid], self._failed[uid] = Counter(), Counter()
                self._audit.record(self._event(AuditKind.TRANSFER_BEGUN, uid))

    def sent(self, instance: StoredInstance, *, ok: bool) -> None:
        """The receiver has an object, or does not take it."""
        counts = (self._sent if ok else self._failed).get(instance.study_instance_uid)
        if counts is None:
            self.begun((instance.study_instance_uid,))
            counts = (self._sent if ok else self._failed)[instance.study_instance_uid]
        counts[instance.sop_class_uid] += 1

    def ended(self, detail: str = "", *, missing: Sequence[StoredInstance] = ()) -> None:
        """Tell what was sent and what was not; success and failure are messages of their own (A.5.2)."""
        for instance in missing:
            self.sent(instance, ok=False)
        for uid, counts in self._sent.items():
            if counts:
                self._audit.record(self._event(AuditKind.TRANSFERRED, uid, counts, detail=detail))
            if self._failed[uid] or (detail and not counts):
                outcome = AuditOutcome.MINOR_FAILURE if counts else AuditOutcome.SERIOUS_FAILURE
                event = self._event(AuditKind.TRANSFERRED, uid, self._failed[uid], outcome=outcome, detail=detail)
                self._audit.record(event)
        self._sent.clear()

    def _event(
        self,
        kind: AuditKind,
        uid: str,
        instances: Mapping[str, int] | None = None,
        *,
        outcome: AuditOutcome = AuditOutcome.SUCCESS,
        detail: str = "",
    ) -> AuditEvent:
        return AuditEvent(
            kind=kind,
            outcome=outcome,
            participants=self._participants,
            study_instance_uids=(uid,),
            instances=dict(instances or {}),
            detail=detail,
        )


def to_destination(ae_title: str, host: str, calling_ae_title: str) -> tuple[Participant, Participant]:
    """This node, which sends, and the AE it sends to."""
    here = Participant(ae_title=calling_ae_title, is_this_node=True, is_requestor=True, role=Role.SOURCE)
    return here, Participant(ae_title=ae_title, host=host, role=Role.DESTINATION)
