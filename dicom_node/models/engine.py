"""A model package as an engine: the `local` kind of `interfaces.Engine`. Must not import torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dicom_node.breaker import Breaker, BreakerState
from dicom_node.budget import VolumeMemory, volume_bytes
from dicom_node.config import EngineSettings, JobSettings
from dicom_node.errors import ConfigError, EngineCrashed, EngineTimeout, EngineUnavailable, PackageError
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask
from dicom_node.models import classify, segment
from dicom_node.models.manifest import ClassificationManifest, SegmentationManifest
from dicom_node.models.package import ModelPackage
from dicom_node.models.registry import ModelReference
from dicom_node.models.runtime import Answer, DeviceFault, Limits
from dicom_node.models.runtime_pool import RuntimePool, lend_runtimes, return_runtimes
from dicom_node.models.trust import require_trusted
from dicom_node.models.wire import Array
from dicom_node.values import EngineResult

__all__ = ["LocalModelEngine"]

_BEAT_S = 0.5
_FAILURES, _REST_S = 4, 300.0  # two series that kill it twice each, without one that it could do between
_START_S = 120.0  # a runtime process loads torch first


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0, le=256)


class LocalModelEngine:
    """Runs a model package on this machine.

    `settings.model` is an embedded or installed id, with or without @VERSION, or a package folder; `models_dir` is
    where models are installed. When another version is enabled, jobs under way finish on theirs and the next job takes
    the new one. `settings.options.threads` bounds torch's CPU threads (0 = its default). `devices` as in
    `config.JobSettings`: one runtime process for each, shared by every local engine of this process that is given the
    same ones; `jobs` bounds their memory and how long they may be silent; `memory` is what the volumes of all engines
    share, without it the engine has its own. Construction reads nothing; the package is
    read on `check` or the first `run`, torch starts with the first `run`. Raises ConfigError for wrong options.

    Several series may be run at a time, from threads: one is read while another is on the device.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        devices: tuple[str, ...] = ("auto",),
        models_dir: Path | None = None,
        jobs: JobSettings | None = None,
        memory: VolumeMemory | None = None,
    ) -> None:
        self.name = name
        if not settings.model:
            raise ConfigError(f"engines.{name}.model: missing; name an embedded package or a package folder")
        try:
            self._options = _Options.model_validate(dict(settings.options))
        except ValidationError as exc:
            error = exc.errors()[0]
            key = ".".join(str(part) for part in error["loc"])
            raise ConfigError(f"engines.{name}.options.{key}: {error['msg']}; known: threads") from exc
        if not devices:
            raise ConfigError("jobs.devices: empty; name at least one device, e.g. [auto]")
        self._settings = settings
        self._devices = devices
        jobs = jobs or JobSettings()
        self._limits = _limits(jobs, models_dir)
        self._memory = memory or VolumeMemory(jobs.prepared_mb << 20)
        self._coming = 0  # radiographs that are read and will soon be asked about
        self._guard = Lock()
        self._model = ModelReference(settings.model, models_dir)
        self._pool: RuntimePool | None = None
        self._closed = False
        self._trouble = ""
        self._breaker = Breaker(failures=_FAILURES, rest_s=_REST_S)

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment, as far as is known; "" when it can."""
        if self._breaker.state is BreakerState.OPEN:
            return f"its network died or hung {_FAILURES} times in a row; it is tried again within {_REST_S:g} s"
        return self._trouble

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`, as in `BreakerState`."""
        return {"breaker_state": float(self._breaker.state.value)}

    def check(self) -> None:
        """Read the package anew, check its files' digests and its trust. Raises PackageError."""
        package = self._model.anew()
        require_trusted(package, self._limits.trusted_code)
        package.check_weights()

    def warm_up(self, heartbeat: Heartbeat) -> None:
        """Start the runtimes and load the network in each, so that the first series need not wait for it.

        Optional. Raises as `run` does.
        """
        watch = _Watch(self._unless_closed(heartbeat), self._settings.timeout_s)
        with self._package() as package:
            self._runtimes().load(package, timeout_s=watch.work_s, heartbeat=watch.beat)

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """Labels and measurements (CT), or findings (radiographs).

        Raises EngineRejected or SeriesRejected with the reasons when the package does not take the series,
        EngineTimeout, EngineUnavailable (also while it rests after too many deaths), EngineCrashed (the runtime died
        or hung on this series), EngineError,
        PackageError, and whatever `heartbeat` raises.
        """
        timeout_s = min(task.timeout_s, self._settings.timeout_s)
        watch = _Watch(self._unless_closed(heartbeat), timeout_s)
        with self._package() as package, self._rested():  # what is enabled meanwhile is for the next job
            manifest = package.manifest
            if isinstance(manifest, SegmentationManifest):
                watch.waiting = True
                with self._memory.taken(volume_bytes(task), task.priority, watch):
                    watch.waiting = False
                    return self._segment(package, manifest, task, watch)
            return self._classify(package, manifest, task, watch)

    @contextmanager
    def _rested(self) -> Iterator[None]:
        """A network that dies or hangs on everything must not cost the device its time: it rests."""
        if not self._breaker.admits():
            raise EngineUnavailable(f"the engine {self.name} rests: {self.trouble or 'it is being tried'}")
        try:
            yield
        except EngineCrashed:
            self._breaker.failed()
            raise
        except BaseException:
            self._breaker.dropped()
            raise
        self._breaker.succeeded()

    def _unless_closed(self, heartbeat: Heartbeat) -> Callable[[], None]:
        def beat() -> None:
            if self._closed:
                raise EngineUnavailable(f"the engine {self.name} is closed")
            heartbeat()

        return beat

    @contextmanager
    def _package(self) -> Iterator[ModelPackage]:
        trouble = ""
        try:
            with self._model.held() as package:
                yield package
        except (PackageError, DeviceFault) as exc:
            trouble = str(exc)
            raise
        finally:
            self._trouble = trouble

    def _segment(
        self, package: ModelPackage, manifest: SegmentationManifest, task: EngineTask, watch: _Watch
    ) -> EngineResult:
        started = time.perf_counter()
        prepared = segment.prepare(manifest, task, watch)
        ready = time.perf_counter()
        answer = self._infer(package, prepared.volume_hu, task, watch, segment.volume_job(manifest, prepared.grid))
        answered = time.perf_counter()
        labels, measurements = segment.finish(manifest, prepared, answer.output.astype(np.uint8, copy=False), watch)
        stages = _stages(answer, prepare=ready - started, finish=time.perf_counter() - answered)
        provenance = package.provenance(_parameters(answer, manifest))
        return EngineResult(values=(labels, measurements), provenance=provenance, stage_seconds=stages)

    def _classify(
        self, package: ModelPackage, manifest: ClassificationManifest, task: EngineTask, watch: _Watch
    ) -> EngineResult:
        started = time.perf_counter()
        with self._announced():
            prepared = classify.prepare(manifest, task, watch)
        ready = time.perf_counter()
        job = {"activation": manifest.output.activation}
        answer = self._infer(package, prepared.network_input, task, watch, job)
        answered = time.perf_counter()
        findings = classify.finish(manifest, prepared, answer.output.astype(np.float32, copy=False))
        stages = _stages(answer, prepare=ready - started, finish=time.perf_counter() - answered)
        provenance = package.provenance(_parameters(answer, manifest))
        return EngineResult(values=findings, provenance=provenance, stage_seconds=stages)

    @contextmanager
    def _announced(self) -> Iterator[None]:
        with self._guard:
            self._coming += 1
        try:
            yield
        finally:
            with self._guard:
                self._coming -= 1

    def _infer(
        self, package: ModelPackage, array: Array, task: EngineTask, watch: _Watch, job: Mapping[str, Any]
    ) -> Answer:
        answer = self._runtimes().infer(
            package,
            array,
            job=job,
            timeout_s=min(watch.work_s, package.manifest.runtime.timeout_s),
            wait_s=watch.wait_s,
            heartbeat=watch.beat,  # the runtime tells its time apart
            threads=self._options.threads,
            priority=task.priority,
            expect=self._coming,
            alone=task.strikes > 0,
        )
        watch.spent(sum(seconds for stage, seconds in answer.seconds.items() if stage != "wait"))
        return answer

    def facts(self) -> Sequence[Mapping[str, Any]]:
        """How the devices stand that this engine uses, see `RuntimePool.facts`; none before the first run."""
        with self._guard:
            return self._pool.facts() if self._pool is not None else ()

    def _runtimes(self) -> RuntimePool:
        with self._guard:
            if self._closed:
                raise EngineUnavailable(f"the engine {self.name} is closed")
            if self._pool is None:
                self._pool = lend_runtimes(self._devices, self._limits)
            return self._pool

    def close(self) -> None:
        """Give the runtimes back; the last engine's return stops them. What waits ends. Idempotent."""
        with self._guard:
            self._closed = True
            lent, self._pool = self._pool, None
        if lent is not None:
            return_runtimes(self._devices, self._limits)


class _Watch:
    """A heartbeat that long loops may call at every step: passed on twice a second, and the end of the time given.

    `work_s` and `wait_s` are what is left for work on the series and, as much again, for waiting while `waiting`.
    """

    def __init__(self, heartbeat: Callable[[], None], timeout_s: float) -> None:
        self._heartbeat = heartbeat
        self._timeout_s = self.work_s = self.wait_s = timeout_s
        self._last = time.monotonic()
        self._beaten = -math.inf
        self.waiting = False

    def __call__(self) -> None:
        step, self._last = time.monotonic() - self._last, time.monotonic()
        if self.waiting:
            self.wait_s -= step
        else:
            self.work_s -= step
        self._pass_on()
        self._check()

    def beat(self) -> None:
        """Somebody else takes the time."""
        self._last = time.monotonic()
        self._pass_on()

    def spent(self, seconds: float) -> None:
        """So long somebody else worked."""
        self._last = time.monotonic()
        self.work_s -= seconds
        self._check()

    def _pass_on(self) -> None:
        if self._last - self._beaten >= _BEAT_S:
            self._beaten = self._last
            self._heartbeat()

    def _check(self) -> None:
        if self.work_s <= 0:
            raise EngineTimeout(f"the analysis took longer than {self._timeout_s:g} s")
        if self.wait_s <= 0:
            raise EngineUnavailable(f"others' work took longer than {self._timeout_s:g} s: this series waits its turn")


def _limits(jobs: JobSettings, models_dir: Path | None) -> Limits:
    return Limits(
        memory_bytes=jobs.memory_mb << 20,
        hang_s=jobs.hang_s,
        start_s=max(jobs.hang_s, _START_S),
        models_dir=str(models_dir.absolute()) if models_dir is not None else "",
        trusted_code=frozenset(jobs.trusted_code),
    )


def _stages(answer: Answer, *, prepare: float, finish: float) -> dict[str, float]:
    return {
        "wait": answer.seconds.get("wait", 0.0),
        "load": answer.seconds.get("load", 0.0),
        "prepare": prepare + answer.seconds.get("prepare", 0.0),
        "forward": answer.seconds.get("forward", 0.0),
        "finish": finish + answer.seconds.get("finish", 0.0),
    }


def _parameters(answer: Answer, manifest: SegmentationManifest | ClassificationManifest) -> tuple[str, ...]:
    """What else decides the result, for (0066,0033) Algorithm Parameters."""
    parameters = [f"device={answer.device}", f"precision={answer.precision}"]
    if isinstance(manifest, SegmentationManifest):
        parameters.append("spacing_mm=" + "x".join(f"{mm:g}" for mm in manifest.input.spacing_mm))
        parameters.append("window=" + "x".join(str(n) for n in manifest.infer.window or ()))
        parameters.append(f"overlap={manifest.infer.overlap:g}")
    return tuple(parameters)
