"""Work outside the node, seen from the pipeline: calls counted, sendings recorded, what nobody waits for stopped."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from dicom_node.apart import Apart
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, AuditTrail, NoAuditTrail, Participant, Role
from dicom_node.errors import (
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
    NodeError,
    NotFound,
)
from dicom_node.interfaces import Clock, Engine, EngineLedger
from dicom_node.model import (
    NOTE_MAX,
    Cancellation,
    Job,
    Sending,
    SendingState,
    Tell,
)
from dicom_node.pipeline.observe import Observer
from dicom_node.values import EngineResult, Pending

__all__ = ["STOP_DELAYS_S", "Keep", "Stops", "checked_answer", "counted_call", "quarantined", "recorder"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# how long until an engine is told once more to stop; after the last of these nobody tells it again (half a day)
STOP_DELAYS_S = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 14400.0)

STOP_S = 60.0  # how long an engine may take to hear it


class Keep(Protocol):
    """`store.quarantine.Quarantine.keep`."""

    def __call__(
        self, path: Path, reason: str, *, engine: str, job_id: int, study_instance_uid: str, series_instance_uid: str
    ) -> str:
        """The file's name in the quarantine, '' when it was not kept."""
        ...


def counted_call(observer: Observer, clock: Clock, engine: str, call: Callable[[], T]) -> T:
    """What `call` returns, or raises: counted with its outcome and its time."""
    began_s, outcome = clock.boot().seconds, "error"
    try:
        answer = call()
        outcome = "pending" if isinstance(answer, Pending) else "ok"
        return answer
    except NodeError as exc:
        outcome = _outcome(exc)
        raise
    finally:
        observer.engine_called(engine, outcome, clock.boot().seconds - began_s)


def checked_answer(engine: str, answer: object) -> EngineResult | Pending:
    """What an engine answered, its outside checked: encoders check the values. Raises EngineError for nonsense."""
    if isinstance(answer, EngineResult):
        stages = answer.stage_seconds
        if isinstance(stages, Mapping) and all(_seconds(one) for one in stages.values()):
            return answer
        log.warning("the times of an answer make no sense and are left out", extra={"engine": engine})
        return replace(answer, stage_seconds={})
    if not isinstance(answer, Pending):
        raise EngineError(f"engine {engine!r} answered with a {type(answer).__name__}, which is no result")
    if not isinstance(answer.handle, str) or not 0 < len(answer.handle) <= NOTE_MAX:
        raise EngineError(f"engine {engine!r} works on under a handle that is no text of 1 to {NOTE_MAX} characters")
    if not _seconds(answer.poll_after_s):
        raise EngineError(f"engine {engine!r} does not say in how many seconds it wants to be asked again")
    return answer


def _seconds(value: object) -> bool:
    """Whether it is a length of time: no NaN, no infinity, nothing that is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _outcome(exc: NodeError) -> str:
    outcomes: Mapping[type[NodeError], str] = {
        EngineUnavailable: "unavailable",
        EngineTimeout: "timeout",
        EngineRejected: "rejected",
        LeaseLost: "dropped",
    }
    return next((outcome for kind, outcome in outcomes.items() if isinstance(exc, kind)), "error")


def recorder(
    ledger: EngineLedger,
    *,
    engine: str,
    study_instance_uid: str,
    series_instance_uid: str,
    job: Job | None,
    audit: AuditTrail | None = None,
) -> Callable[[Sending], AbstractContextManager[Tell]]:
    """`EngineTask.record` for one job, or (None) for a run by hand."""

    @contextmanager
    def record(sending: Sending) -> Iterator[Tell]:
        latest = sending
        number = ledger.begin_sending(
            sending,
            engine=engine,
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            job=job,
        )

        def tell(completed: Sending) -> None:
            nonlocal latest
            latest = completed

        def audited(outcome: AuditOutcome) -> None:
            (audit or NoAuditTrail()).record(_export(engine, study_instance_uid, latest, outcome))

        try:
            yield tell
        except BaseException as exc:
            audited(AuditOutcome.MINOR_FAILURE)
            why = str(exc) if isinstance(exc, NodeError) else type(exc).__name__  # foreign texts may hold anything
            try:
                ledger.end_sending(number, latest, SendingState.FAILED, why)
            except NodeError as missed:  # it stays "about to send", which says as much
                log.warning("the end of a sending could not be recorded", extra={"sending": number}, exc_info=missed)
            raise
        audited(AuditOutcome.SUCCESS)
        ledger.end_sending(number, latest, SendingState.SENT)

    return record


def _export(engine: str, study_instance_uid: str, sending: Sending, outcome: AuditOutcome) -> AuditEvent:
    """PS3.15 A.5.3.4: what left the node for an engine; of one that failed, what may have left."""
    identity = "identifiable" if sending.identifiable else "without identity"
    return AuditEvent(
        kind=AuditKind.EXPORTED,
        outcome=outcome,
        participants=(
            Participant(is_this_node=True, is_requestor=True, role=Role.SOURCE),
            Participant(user=engine, host=sending.host.rpartition(":")[0] or sending.host, role=Role.DESTINATION_MEDIA),
        ),
        study_instance_uids=(study_instance_uid,),
        detail=f"{sending.objects} objects as {sending.what} to engine {engine}, {identity}",
    )


def quarantined(
    keep: Keep | None, *, engine: str, job_id: int, study_instance_uid: str, series_instance_uid: str
) -> Callable[[Path, str], str]:
    """`EngineTask.quarantine` for one task; without `keep` nothing is kept."""

    def kept(path: Path, reason: str) -> str:
        if keep is None:
            return ""
        return keep(
            path,
            reason,
            engine=engine,
            job_id=job_id,
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
        )

    return kept


class Stops:
    """Tells engines to stop what nobody waits for any more, one at a time."""

    def __init__(self, ledger: EngineLedger, engines: Mapping[str, Engine], clock: Clock, observer: Observer) -> None:
        self._ledger = ledger
        self._engines = engines
        self._clock = clock
        self._observer = observer
        self._guard = threading.Lock()
        self._lanes: dict[str, Apart] = {}

    def tell_one(self) -> bool:
        """Tell the first that is due; False when there is none. What fails is tried again after STOP_DELAYS_S.

        Whatever the engine does, this returns within STOP_S: a call that takes longer goes on apart, and while it does
        the engine is told nothing else. Raises StorageError when the catalog cannot be had.
        """
        cancellation = self._ledger.next_cancellation(STOP_DELAYS_S)
        if cancellation is None:
            return False
        fields = {"engine": cancellation.engine, "job": cancellation.job_id, "attempt": cancellation.attempts}
        try:
            tell = self._call(cancellation)
            if tell is not None:
                counted_call(self._observer, self._clock, cancellation.engine, self._apart(cancellation.engine, tell))
        except Exception as exc:  # edge: a plug-in's code; what it raises is one try come to nothing
            last = cancellation.attempts >= len(STOP_DELAYS_S)
            why = str(exc) if isinstance(exc, NodeError) else f"unforeseen: {type(exc).__name__}"
            self._ledger.end_cancellation(cancellation, why, final=last)
            log.warning("an engine could not be told to stop", extra=fields, exc_info=exc)
            return True
        self._ledger.end_cancellation(cancellation, "" if tell else "this engine cannot be told to stop")
        log.info("an engine was told to stop" if tell else "an engine cannot be told to stop", extra=fields)
        return True

    def _apart(self, engine: str, tell: Callable[[], None]) -> Callable[[], None]:
        with self._guard:
            apart = self._lanes.setdefault(engine, Apart(f"engine {engine}: to be told to stop"))
        return lambda: apart.call(tell, STOP_S)

    def _call(self, cancellation: Cancellation) -> Callable[[], None] | None:
        """What tells the engine, None when it has no ear for it. Raises NotFound: it may be configured again."""
        engine = self._engines.get(cancellation.engine)
        if engine is None:
            raise NotFound(f"engine {cancellation.engine!r} is not configured")
        method, told = ("cancel", cancellation.handle) if cancellation.handle else ("cancel_noted", cancellation.note)
        stop: Callable[[str], None] | None = getattr(engine, method, None)
        return None if stop is None else lambda: stop(told)
