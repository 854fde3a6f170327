"""Work outside the node, seen from the pipeline: calls counted, sendings recorded, what nobody waits for stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from dicom_node.errors import EngineRejected, EngineTimeout, EngineUnavailable, LeaseLost, NodeError, NotFound
from dicom_node.interfaces import Clock, Engine, EngineLedger
from dicom_node.model import (
    Cancellation,
    Job,
    Sending,
    SendingState,
    Tell,
)
from dicom_node.pipeline.observe import Observer
from dicom_node.values import Pending

__all__ = ["STOP_DELAYS_S", "Keep", "Stops", "counted_call", "quarantined", "recorder"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# how long until an engine is told once more to stop; after the last of these nobody tells it again (half a day)
STOP_DELAYS_S = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 14400.0)


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


def _outcome(exc: NodeError) -> str:
    outcomes: Mapping[type[NodeError], str] = {
        EngineUnavailable: "unavailable",
        EngineTimeout: "timeout",
        EngineRejected: "rejected",
        LeaseLost: "dropped",
    }
    return next((outcome for kind, outcome in outcomes.items() if isinstance(exc, kind)), "error")


def recorder(
    ledger: EngineLedger, *, engine: str, study_instance_uid: str, series_instance_uid: str, job: Job | None
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

        try:
            yield tell
        except BaseException as exc:
            why = str(exc) if isinstance(exc, NodeError) else type(exc).__name__  # foreign texts may hold anything
            try:
                ledger.end_sending(number, latest, SendingState.FAILED, why)
            except NodeError as missed:  # it stays "about to send", which says as much
                log.warning("the end of a sending could not be recorded", extra={"sending": number}, exc_info=missed)
            raise
        ledger.end_sending(number, latest, SendingState.SENT)

    return record


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

    def tell_one(self) -> bool:
        """Tell the first that is due; False when there is none. What fails is tried again after STOP_DELAYS_S.

        Raises StorageError when the catalog cannot be had, and what an engine must not raise; that try is used then.
        """
        cancellation = self._ledger.next_cancellation(STOP_DELAYS_S)
        if cancellation is None:
            return False
        fields = {"engine": cancellation.engine, "job": cancellation.job_id, "attempt": cancellation.attempts}
        try:
            tell = self._call(cancellation)
            if tell is not None:
                counted_call(self._observer, self._clock, cancellation.engine, tell)
        except NodeError as exc:
            last = cancellation.attempts >= len(STOP_DELAYS_S)
            self._ledger.end_cancellation(cancellation, str(exc), final=last)
            log.warning("an engine could not be told to stop", extra=fields, exc_info=exc)
            return True
        self._ledger.end_cancellation(cancellation, "" if tell else "this engine cannot be told to stop")
        log.info("an engine was told to stop" if tell else "an engine cannot be told to stop", extra=fields)
        return True

    def _call(self, cancellation: Cancellation) -> Callable[[], None] | None:
        """What tells the engine, None when it has no ear for it. Raises NotFound: it may be configured again."""
        engine = self._engines.get(cancellation.engine)
        if engine is None:
            raise NotFound(f"engine {cancellation.engine!r} is not configured")
        method, told = ("cancel", cancellation.handle) if cancellation.handle else ("cancel_noted", cancellation.note)
        stop: Callable[[str], None] | None = getattr(engine, method, None)
        return None if stop is None else lambda: stop(told)
