"""From a job to its results: lease, engine, encoders, archive, finish.

Everything up to `finish_job` may be repeated after a crash: the engine runs again, the encoders write the same bytes
under the same UIDs, the archive already has them. `finish_job` is one transaction and happens once.

An attempt that fails is made again while that may help. What may be the job's own fault (its worker or the runtime
died, no answer in time, an unforeseen error) is bounded by `max_attempts`; a job that killed or hung what runs its
engine twice is left to a person: a third time would only keep others waiting. An outage of the node (no space, a busy
catalog, a clean stop) counts for nothing. `deadline_s` bounds both, but no job is given up before it was tried. What an
engine works on for a job that was given up is cancelled there, see `pipeline.external`.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pydicom.dataset import Dataset

from dicom_node.auditing import AuditEvent, AuditKind, AuditTrail, NoAuditTrail, Participant, Role
from dicom_node.config import JobSettings
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineUnavailable,
    LeaseLost,
    NodeError,
    PackageError,
    StorageError,
)
from dicom_node.interfaces import Clock, Engine, ResultEncoder, WorkQueue
from dicom_node.model import (
    EngineTask,
    InstanceRecord,
    Job,
    JobState,
    Priority,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.pipeline.encode import data_set_bytes, encoded, result_context, syntax_of
from dicom_node.pipeline.external import Keep, Stops, checked_answer, counted_call, quarantined, recorder
from dicom_node.pipeline.lease import LeaseKeeper, backoff_s
from dicom_node.pipeline.observe import Observer
from dicom_node.values import EngineResult, Pending, ResultContext, ReturnedInstances

__all__ = ["Stage", "Worker", "data_set_bytes"]

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0  # of an engine whose configuration names none
MAX_STRIKES = 2
Asked = Callable[[], EngineResult | Pending]
MIN_POLL_S = 1.0
ENCODE_S = 300.0  # on top of the engine's own time, for encoding and archiving


def job_bound_s(timeout_s: float) -> float:
    """How long one attempt may take: the engine's own time, as much again waiting for others' work, and the writing."""
    return 2 * timeout_s + ENCODE_S


class Stage(Protocol):
    """`Ingest.stage`: check and archive a produced object; it stays invisible until the job is finished."""

    def __call__(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Iterable[bytes | memoryview],
        made_for: str,
    ) -> InstanceRecord:
        """`made_for`: `Job.mark`. Raises StorageError, InvalidInstance."""
        ...


class Worker:
    """Does jobs one at a time; several may run beside each other, in threads or processes, on the same queue."""

    def __init__(
        self,
        queue: WorkQueue,
        *,
        engines: Mapping[str, Engine],
        timeouts_s: Mapping[str, float],
        encoders: Sequence[ResultEncoder],
        stage: Stage,
        read_header: Callable[[Sequence[StoredInstance]], SeriesHeader],
        settings: JobSettings,
        node_name: str,
        time_zone: str,
        clock: Clock,
        observer: Observer,
        stopping: Callable[[], bool] = lambda: False,
        jitter: Callable[[], float] = random.random,
        keep: Keep | None = None,
        study_instances: Callable[[str], Iterable[StoredInstance]] = lambda study: (),
        audit: AuditTrail | None = None,
        begin_at_least: Callable[[], Priority | None] = lambda: Priority.BACKGROUND,
    ) -> None:
        """`engines` and `timeouts_s` by the names rules use; `encoders` in the order their results are sent.

        `stopping`: whether the node is being stopped; what then fails is not the job's fault. `keep`: the quarantine's.
        `study_instances`: the visible instances of a study by its UID. `begin_at_least`: how urgent a job must be to be
        begun now; None: nothing is done at all, for no result could be kept.
        """
        self._queue = queue
        self._engines = engines
        self._timeouts_s = timeouts_s
        self._encoders = encoders
        self._stage = stage
        self._read_header = read_header
        self._settings = settings
        self._node_name = node_name
        self._time_zone = time_zone
        self._clock = clock
        self._observer = observer
        self._stopping = stopping
        self._begin_at_least = begin_at_least
        self._jitter = jitter
        self._keep = keep
        self._study_instances = study_instances
        self._audit = audit or NoAuditTrail()
        self._stops = Stops(queue, engines, clock, observer)

    def run_once(
        self,
        worker: str,
        *,
        at_least: Priority = Priority.BACKGROUND,
        engine: str | None = None,
        without: Collection[str] = (),
    ) -> bool:
        """Do the first runnable job, `at_least` so urgent, of `engine` only, of none of `without`; False without any.

        However it ends (done, refused, later, never, taken over), it ends in the catalog. Raises StorageError only when
        the catalog itself cannot be had; the job's lease then runs out and it is done again.
        """
        begin_at_least = self._begin_at_least()
        if begin_at_least is None:
            return False
        job = self._queue.lease_job(
            worker,
            self._settings.lease_s,
            at_least=at_least,
            engine=engine,
            without=without,
            begin_at_least=begin_at_least,
        )
        if job is None:
            return False
        try:
            outcome = self._attempt(job)
        except LeaseLost:
            log.warning("job dropped: its lease was lost", extra=_fields(job))
            outcome = "lost"
        self._observer.job_attempted(job.engine, outcome)
        return True

    def stop_once(self) -> bool:
        """Tell one engine to stop what nobody waits for any more; False when there is nothing to tell now."""
        return self._stops.tell_one()

    # --- how an attempt ends

    def _attempt(self, job: Job) -> str:
        tried = job.handle is None and _counted(job) > 1  # of what an engine works on, a last look may find it done
        if tried and job.age_s > self._settings.deadline_s:
            return self._expired(job, job.error)
        if _counted(job) > self._settings.max_attempts:
            return self._give_up(job, "attempts", f"no end after {self._settings.max_attempts} attempts; {job.error}")
        try:
            return self._do(job)
        except LeaseLost:
            raise
        except EngineRejected as exc:
            self._queue.reject_job(job, exc.reason)
            log.info("job rejected by its engine", extra=_fields(job) | {"reason": exc.reason})
            return "rejected"
        except NodeError as exc:
            return self._failed(job, str(exc), retryable=exc.retryable, exc=exc)
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - edge: the worker's loop; an engine's bug fails one job
            return self._failed(job, f"unforeseen: {type(exc).__name__}", retryable=True, exc=exc)

    def _failed(self, job: Job, error: str, *, retryable: bool, exc: BaseException) -> str:
        if self._stopping():  # its engine was closed under it
            self._queue.retry_job_later(job, "interrupted: the node was stopped", 0.0, outage=True)
            log.info("job interrupted", extra=_fields(job))
            return "retry"
        strike = isinstance(exc, EngineCrashed)
        # not the job's fault; and nobody should have to revive each job that came while a package was being mended
        outage = isinstance(exc, StorageError | PackageError | EngineUnavailable) and not strike
        if strike and job.strikes + 1 >= MAX_STRIKES:
            why = f"what runs the engine died or hung {MAX_STRIKES} times on this series; not tried again: {error}"
            return self._give_up(job, "poison", why, exc)
        if not retryable:
            return self._give_up(job, "error", error, exc)
        if not outage and _counted(job) >= self._settings.max_attempts:
            return self._give_up(job, "attempts", error, exc)
        if job.age_s > self._settings.deadline_s:
            return self._expired(job, error, exc)
        delay_s = backoff_s(job.attempts, self._settings.backoff_s, self._settings.backoff_max_s, self._jitter())
        self._queue.retry_job_later(job, error, delay_s, outage=outage, strike=strike)
        log.warning("job will be tried again", extra=_fields(job) | {"delay_s": round(delay_s, 1)}, exc_info=exc)
        return "retry"

    def _expired(self, job: Job, error: str, exc: BaseException | None = None) -> str:
        why = f"EXPIRED: not done within {self._settings.deadline_s:g} s" + (f"; last: {error}" if error else "")
        return self._give_up(job, "deadline", why, exc)

    def _give_up(self, job: Job, reason: str, error: str, exc: BaseException | None = None) -> str:
        self._queue.give_up_job(job, error)
        self._observer.dead_letter("job", reason)
        log.error("job given up", extra=_fields(job) | {"reason": reason}, exc_info=exc)
        self._stops.tell_one()
        return "failed"

    # --- the work

    def _do(self, job: Job) -> str:
        engine = self._engines.get(job.engine)
        if engine is None:
            raise ConfigError(f"engine {job.engine!r} is not configured")
        leased_s = self._clock.boot().seconds
        timeout_s = self._timeouts_s.get(job.engine, TIMEOUT_S)
        if job.attempts == 1 and job.handle is None:
            self._observer.inference(job.engine, {"queue": job.age_s})
        keeper = LeaseKeeper(
            lambda: self._queue.extend_job(job, self._settings.lease_s),
            lease_s=self._settings.lease_s,
            bound_s=job_bound_s(timeout_s),
            clock=self._clock,
        )
        with keeper:
            task = self._task(job, timeout_s)
            answer = self._ask(engine, job, task, keeper)
            if isinstance(answer, Pending):
                return self._park(job, answer, self._clock.boot().seconds - leased_s)
            self._finish(job, task, answer, keeper)
        self._observer.turnaround(job.engine, job.priority.value, job.age_s + self._clock.boot().seconds - leased_s)
        return "done"

    def _park(self, job: Job, answer: Pending, worked_s: float) -> str:
        left_s = self._settings.deadline_s - job.age_s - worked_s
        if left_s <= 0 and job.handle is not None:
            return self._expired(replace(job, handle=answer.handle), job.error)
        renew = left_s <= 0  # it was late when the engine got it, which is no fault of the engine
        longest_s = self._settings.deadline_s if renew else left_s
        answer = replace(answer, poll_after_s=min(answer.poll_after_s, max(longest_s, MIN_POLL_S)))
        try:
            self._queue.park_job(job, answer, renew=renew)
        except LeaseLost:
            self._queue.stop_engine(job, answer.handle)
            raise
        return "parked"

    def _task(self, job: Job, timeout_s: float) -> EngineTask:
        instances, header = self._queue.job_input(job)
        described = {instance["SOPInstanceUID"] for instance in header.geometry}
        if described != {instance.sop_instance_uid for instance in instances}:  # late images were routed since
            header = self._read_header(instances)
        names = {
            "engine": job.engine,
            "study_instance_uid": job.study_instance_uid,
            "series_instance_uid": job.series_instance_uid,
        }
        return EngineTask(
            job_id=job.id,
            study_instance_uid=job.study_instance_uid,
            series_instance_uid=job.series_instance_uid,
            instances=tuple(instances),
            header=header,
            timeout_s=timeout_s,
            priority=job.priority,
            strikes=job.strikes,
            note=job.note,
            remember=lambda note: self._queue.remember(job, note),
            record=recorder(self._queue, job=job, audit=self._audit, **names),
            quarantine=quarantined(self._keep, job_id=job.id, **names),
            study_instances=lambda: self._study_instances(job.study_instance_uid),
        )

    def _ask(self, engine: Engine, job: Job, task: EngineTask, keeper: LeaseKeeper) -> EngineResult | Pending:
        handle = job.handle
        if handle is None:
            self._tell_access(job, task)
            run: Asked = lambda: checked_answer(job.engine, engine.run(task, keeper))  # noqa: E731
            return counted_call(self._observer, self._clock, job.engine, run)
        poll = getattr(engine, "poll", None)
        if poll is None:
            raise EngineError(f"engine {job.engine!r} cannot be asked for the answer of an earlier run")
        asked: Asked = lambda: checked_answer(job.engine, poll(task, handle))  # noqa: E731
        return counted_call(self._observer, self._clock, job.engine, asked)

    def _tell_access(self, job: Job, task: EngineTask) -> None:
        """PS3.15 A.5.3.6: an engine is about to look at a series; what leaves the node for it is told by `recorder`."""
        self._audit.record(
            AuditEvent(
                kind=AuditKind.ACCESSED,
                participants=(
                    Participant(user=job.engine, is_requestor=True, role=Role.APPLICATION),
                    Participant(ae_title=self._node_name, is_this_node=True),
                ),
                study_instance_uids=(job.study_instance_uid,),
                instances=Counter(instance.sop_class_uid for instance in task.instances),
                detail=f"job {job.id}, rule {job.rule}, attempt {job.attempts}",
            )
        )

    def _finish(self, job: Job, task: EngineTask, result: EngineResult, keeper: LeaseKeeper) -> None:
        began = self._clock.boot().seconds
        produced: list[InstanceRecord] = []
        context = self._context(job, result)
        for ds in encoded(result, task, context, encoders=self._encoders, kinds=job.results, heartbeat=keeper):
            produced.append(self._staged(ds, job))
            keeper()
        stages = {**result.stage_seconds, "encode": self._clock.boot().seconds - began}
        taken = [
            instance.sop_instance_uid
            for value in result.values
            if isinstance(value, ReturnedInstances)
            for instance in value.instances
        ]
        uids = list(dict.fromkeys([*(record.header.sop_instance_uid for record in produced), *taken]))
        self._queue.finish_job(job, produced, uids, stages, taken=taken)
        self._observer.inference(job.engine, stages)
        log.info("job done", extra=_fields(job) | {"results": uids})

    def _context(self, job: Job, result: EngineResult) -> ResultContext:
        return result_context(
            result.provenance,
            series_instance_uid=job.series_instance_uid,
            input_digest=job.input_digest,
            rule=job.rule,
            run=str(job.run_number),
            run_number=job.run_number,
            created_at=job.created_at,
            time_zone=self._time_zone,
            node_name=self._node_name,
            predecessors=self._predecessors(job),
        )

    def _predecessors(self, job: Job) -> tuple[StoredInstance, ...]:
        """Results of the latest earlier run that had any; runs that were cancelled or failed are passed over."""
        earlier = job.superseded_job
        while earlier is not None:
            previous = self._queue.job(earlier)
            if previous.state is JobState.DONE:
                return tuple(self._queue.job_results(earlier))
            earlier = previous.superseded_job
        return ()

    def _staged(self, ds: Dataset, job: Job) -> InstanceRecord:
        syntax = syntax_of(ds)
        return self._stage(
            sop_class_uid=str(ds.SOPClassUID),
            sop_instance_uid=str(ds.SOPInstanceUID),
            transfer_syntax_uid=str(syntax),
            fragments=(data_set_bytes(ds, syntax),),
            made_for=job.mark,
        )


def _counted(job: Job) -> int:
    """Attempts that may have come to nothing by the job's own fault, this one included."""
    return job.attempts - job.outages


def _fields(job: Job) -> dict[str, object]:
    return {
        "job": job.id,
        "rule": job.rule,
        "engine": job.engine,
        "study": job.study_instance_uid,
        "series": job.series_instance_uid,
        "attempt": job.attempts,
        "run": job.run_number,
    }
