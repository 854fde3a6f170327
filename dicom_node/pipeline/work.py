"""From a job to its results: lease, engine, encoders, archive, finish.

Everything up to `finish_job` may be repeated after a crash: the engine runs again, the encoders write the same bytes
under the same UIDs, the archive already has them. `finish_job` is one transaction and happens once.

An attempt that fails is made again while that may help. What may be the job's own fault (its worker or the runtime
died, no answer in time, an unforeseen error) is bounded by `max_attempts`; a job that killed or hung what runs its
engine twice is left to a person: a third time would only keep others waiting. An outage of the node (no space, a busy
catalog, a clean stop) counts for nothing. `deadline_s` bounds both, but no job is given up before it was tried.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node.config import JobSettings
from dicom_node.errors import (
    ConfigError,
    EncodingError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineUnavailable,
    LeaseLost,
    NodeError,
    PackageError,
    StorageError,
)
from dicom_node.interfaces import Clock, Engine, JobQueue, ResultEncoder
from dicom_node.model import (
    EngineResult,
    EngineTask,
    Findings,
    InstanceRecord,
    Job,
    JobState,
    LabelVolume,
    Pending,
    Priority,
    ResultContext,
    ResultValue,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.pipeline.headers_of import read_data_set
from dicom_node.pipeline.lease import LeaseKeeper, backoff_s
from dicom_node.pipeline.observe import Observer

__all__ = ["Stage", "Worker"]

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0  # of an engine whose configuration names none
MAX_STRIKES = 2
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
    ) -> InstanceRecord:
        """Raises StorageError, InvalidInstance."""
        ...


class Worker:
    """Does jobs one at a time; several may run beside each other, in threads or processes, on the same queue."""

    def __init__(
        self,
        queue: JobQueue,
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
    ) -> None:
        """`engines` and `timeouts_s` by the names rules use; `encoders` in the order their results are sent.

        `stopping`: whether the node is being stopped; what then fails is not the job's fault.
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
        self._jitter = jitter

    def run_once(self, worker: str, *, at_least: Priority = Priority.BACKGROUND) -> bool:
        """Do the first runnable job, `at_least` so urgent; False when there is none.

        However it ends (done, refused, later, never, taken over), it ends in the catalog. Raises StorageError only when
        the catalog itself cannot be had; the job's lease then runs out and it is done again.
        """
        job = self._queue.lease_job(worker, self._settings.lease_s, at_least=at_least)
        if job is None:
            return False
        try:
            outcome = self._attempt(job)
        except LeaseLost:
            log.warning("job dropped: its lease was lost", extra=_fields(job))
            outcome = "lost"
        self._observer.job_attempted(job.engine, outcome)
        return True

    # --- how an attempt ends

    def _attempt(self, job: Job) -> str:
        tried = job.handle is not None or _counted(job) > 1
        if tried and job.age_s > self._settings.deadline_s:
            self._cancel_parked(job)
            return self._give_up(job, "deadline", f"not done within {self._settings.deadline_s:g} s")
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
        except Exception as exc:  # noqa: BLE001 - edge: the worker's loop; an engine's bug is one job's failure
            return self._failed(job, f"unforeseen: {type(exc).__name__}", retryable=True, exc=exc)

    def _failed(self, job: Job, error: str, *, retryable: bool, exc: Exception) -> str:
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
            self._cancel_parked(job)
            return self._give_up(job, "deadline", error, exc)
        delay_s = backoff_s(job.attempts, self._settings.backoff_s, self._settings.backoff_max_s, self._jitter())
        self._queue.retry_job_later(job, error, delay_s, outage=outage, strike=strike)
        log.warning("job will be tried again", extra=_fields(job) | {"delay_s": round(delay_s, 1)}, exc_info=exc)
        return "retry"

    def _give_up(self, job: Job, reason: str, error: str, exc: Exception | None = None) -> str:
        self._queue.give_up_job(job, error)
        self._observer.dead_letter("job", reason)
        log.error("job given up", extra=_fields(job) | {"reason": reason}, exc_info=exc)
        return "failed"

    def _cancel_parked(self, job: Job) -> None:
        """Tell an external engine that nobody waits any more; best effort."""
        cancel = getattr(self._engines.get(job.engine), "cancel", None)
        if job.handle is None or cancel is None:
            return
        try:
            cancel(job.handle)
        except EngineError as exc:
            log.warning("a parked job could not be cancelled at its engine", extra=_fields(job), exc_info=exc)

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
                self._queue.park_job(job, answer)
                return "parked"
            self._finish(job, task, answer, keeper)
        self._observer.turnaround(job.engine, job.priority.value, job.age_s + self._clock.boot().seconds - leased_s)
        return "done"

    def _task(self, job: Job, timeout_s: float) -> EngineTask:
        instances, header = self._queue.job_input(job)
        described = {instance["SOPInstanceUID"] for instance in header.geometry}
        if described != {instance.sop_instance_uid for instance in instances}:  # late images were routed since
            header = self._read_header(instances)
        return EngineTask(
            job_id=job.id,
            study_instance_uid=job.study_instance_uid,
            series_instance_uid=job.series_instance_uid,
            instances=tuple(instances),
            header=header,
            timeout_s=timeout_s,
            priority=job.priority,
            strikes=job.strikes,
        )

    def _ask(self, engine: Engine, job: Job, task: EngineTask, keeper: LeaseKeeper) -> EngineResult | Pending:
        if job.handle is None:
            return engine.run(task, keeper)
        poll = getattr(engine, "poll", None)
        if poll is None:
            raise EngineError(f"engine {job.engine!r} cannot be asked for the answer of an earlier run")
        answer: EngineResult | Pending = poll(task, job.handle)
        return answer

    def _finish(self, job: Job, task: EngineTask, result: EngineResult, keeper: LeaseKeeper) -> None:
        began = self._clock.boot().seconds
        produced: list[InstanceRecord] = []
        for ds in self._encoded(job, task, result, keeper):
            produced.append(self._staged(ds))
            keeper()
        stages = {**result.stage_seconds, "encode": self._clock.boot().seconds - began}
        uids = [record.header.sop_instance_uid for record in produced]
        self._queue.finish_job(job, produced, uids, stages)
        self._observer.inference(job.engine, stages)
        log.info("job done", extra=_fields(job) | {"results": uids})

    def _encoded(self, job: Job, task: EngineTask, result: EngineResult, keeper: LeaseKeeper) -> Sequence[Dataset]:
        sources = [read_data_set(instance) for instance in _analysed(task, result.values)]
        context = self._context(job, result)
        encoded: list[Dataset] = []
        for encoder in self._encoders:
            if encoder.kind in job.results:
                encoded += encoder.encode(result.values, sources, context, tuple(encoded))
                keeper()
        return encoded

    def _context(self, job: Job, result: EngineResult) -> ResultContext:
        provenance = result.provenance
        identity = (
            provenance.name,
            provenance.version,
            provenance.device_uid,
            provenance.weights_sha256,
            provenance.config_sha256,
            job.series_instance_uid,
            job.input_digest,
            job.rule,
        )
        return ResultContext(
            run_key=_key(*identity, str(job.run_number)),
            # the same organ or finding of the same series stays itself when the model or the input is renewed
            tracking_key=_key(provenance.name, job.series_instance_uid),
            run_number=job.run_number,
            created_at=job.created_at,
            time_zone=self._time_zone,
            provenance=provenance,
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

    def _staged(self, ds: Dataset) -> InstanceRecord:
        meta = getattr(ds, "file_meta", None)
        syntax = UID(getattr(meta, "TransferSyntaxUID", ExplicitVRLittleEndian))
        return self._stage(
            sop_class_uid=str(ds.SOPClassUID),
            sop_instance_uid=str(ds.SOPInstanceUID),
            transfer_syntax_uid=str(syntax),
            fragments=(data_set_bytes(ds, syntax),),
        )


def _counted(job: Job) -> int:
    """Attempts that may have come to nothing by the job's own fault, this one included."""
    return job.attempts - job.outages


def data_set_bytes(ds: Dataset, syntax: UID) -> bytes:
    """The data set alone, as it stands in a file after the file meta information. Raises EncodingError."""
    if syntax.is_implicit_VR or not syntax.is_little_endian or syntax.is_deflated:
        raise EncodingError(f"results are written with explicit VR, little endian, not in {syntax}")
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = False
    buffer.is_little_endian = True
    try:
        write_dataset(buffer, ds)
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as exc:
        raise EncodingError(f"a result cannot be written: {type(exc).__name__}") from exc
    return buffer.getvalue()


def _analysed(task: EngineTask, values: Sequence[ResultValue]) -> Sequence[StoredInstance]:
    """The instances the values speak of, in the order of the task; all of them if none is named."""
    named: set[str] = set()
    for value in values:
        if isinstance(value, LabelVolume):
            named.update(value.sop_instance_uids)
        elif isinstance(value, Findings):
            named.add(value.sop_instance_uid)
    found = [instance for instance in task.instances if instance.sop_instance_uid in named]
    return found or task.instances


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
