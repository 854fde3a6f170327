"""A model package as an engine: the `local` kind of `interfaces.Engine`. Must not import torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dicom_node.config import EngineSettings
from dicom_node.errors import ConfigError, EngineTimeout
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineResult, EngineTask
from dicom_node.models import classify, segment
from dicom_node.models.manifest import ClassificationManifest, SegmentationManifest
from dicom_node.models.package import ModelPackage
from dicom_node.models.registry import find_package
from dicom_node.models.runtime import Answer, RuntimePool, lend_runtimes, return_runtimes

__all__ = ["LocalModelEngine"]

_BEAT_S = 0.5


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=0, ge=0, le=256)


class LocalModelEngine:
    """Runs a model package on this machine.

    `settings.model` is an embedded id or a package folder; `settings.options.threads` bounds torch's CPU threads (0 =
    its default). `devices` as in `config.JobSettings`: one runtime process for each, shared by every local engine of
    this process that is given the same ones. Construction reads nothing; the package is read on `check` or the first
    `run`, torch starts with the first `run`. Raises ConfigError for wrong options.
    """

    def __init__(self, name: str, settings: EngineSettings, *, devices: tuple[str, ...] = ("auto",)) -> None:
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
        self._guard = Lock()
        self._package: ModelPackage | None = None
        self._pool: RuntimePool | None = None

    def check(self) -> None:
        """Read the package anew and check its weights' digest. Raises PackageError."""
        package = find_package(self._settings.model)
        package.check_weights()
        with self._guard:
            self._package = package

    def warm_up(self, heartbeat: Heartbeat) -> None:
        """Start the runtimes and load the network in each, so that the first series need not wait for it.

        Optional. Raises as `run` does.
        """
        package = self._loaded()
        watch = _Watch(heartbeat, self._settings.timeout_s)
        for runtime in self._runtimes().runtimes:
            runtime.load(package, timeout_s=watch.remaining(), heartbeat=watch)

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """Labels and measurements (CT), or findings (radiographs).

        Raises EngineRejected or SeriesRejected with the reasons when the package does not take the series,
        EngineTimeout, EngineUnavailable, EngineError, PackageError, and whatever `heartbeat` raises.
        """
        timeout_s = min(task.timeout_s, self._settings.timeout_s)
        watch = _Watch(heartbeat, timeout_s)
        package = self._loaded()
        manifest = package.manifest
        if isinstance(manifest, SegmentationManifest):
            return self._segment(package, manifest, task, watch)
        return self._classify(package, manifest, task, watch)

    def _segment(
        self, package: ModelPackage, manifest: SegmentationManifest, task: EngineTask, watch: _Watch
    ) -> EngineResult:
        started = time.perf_counter()
        prepared = segment.prepare(manifest, task, watch)
        ready = time.perf_counter()
        answer = self._infer(package, prepared.network_input, watch)
        answered = time.perf_counter()
        labels, measurements = segment.finish(manifest, prepared, answer.output, watch)
        stages = _stages(answer, prepare=ready - started, finish=time.perf_counter() - answered)
        provenance = package.provenance(_parameters(answer, manifest))
        return EngineResult(values=(labels, measurements), provenance=provenance, stage_seconds=stages)

    def _classify(
        self, package: ModelPackage, manifest: ClassificationManifest, task: EngineTask, watch: _Watch
    ) -> EngineResult:
        started = time.perf_counter()
        prepared = classify.prepare(manifest, task, watch)
        ready = time.perf_counter()
        answer = self._infer(package, prepared.network_input, watch)
        answered = time.perf_counter()
        findings = classify.finish(manifest, prepared, answer.output)
        stages = _stages(answer, prepare=ready - started, finish=time.perf_counter() - answered)
        provenance = package.provenance(_parameters(answer, manifest))
        return EngineResult(values=findings, provenance=provenance, stage_seconds=stages)

    def _infer(self, package: ModelPackage, array: segment.Floats, watch: _Watch) -> Answer:
        limit = min(watch.remaining(), package.manifest.runtime.timeout_s)
        return (
            self._runtimes()
            .idle()
            .infer(package, array, timeout_s=limit, heartbeat=watch, threads=self._options.threads)
        )

    def _runtimes(self) -> RuntimePool:
        with self._guard:
            if self._pool is None:
                self._pool = lend_runtimes(self._devices)
            return self._pool

    def _loaded(self) -> ModelPackage:
        with self._guard:
            if self._package is None:
                self._package = find_package(self._settings.model)
            return self._package

    def close(self) -> None:
        """Give the runtimes back; the last engine's return stops them. Idempotent."""
        with self._guard:
            lent, self._pool = self._pool, None
        if lent is not None:
            return_runtimes(self._devices)


class _Watch:
    """A heartbeat that long loops may call at every step: passed on twice a second, and the end of the time given."""

    def __init__(self, heartbeat: Callable[[], None], timeout_s: float) -> None:
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._next = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _BEAT_S
            self._heartbeat()
        if now >= self._end:
            raise EngineTimeout(f"the analysis took longer than {self._timeout_s:g} s")

    def remaining(self) -> float:
        """Seconds left, at least a moment."""
        return max(self._end - time.monotonic(), 0.001)


def _stages(answer: Answer, *, prepare: float, finish: float) -> dict[str, float]:
    return {
        "load": answer.seconds.get("load", 0.0),
        "prepare": prepare,
        "infer": answer.seconds.get("forward", 0.0),
        "finish": finish,
    }


def _parameters(answer: Answer, manifest: SegmentationManifest | ClassificationManifest) -> tuple[str, ...]:
    """What else decides the result, for (0066,0033) Algorithm Parameters."""
    parameters = [f"device={answer.device}", f"precision={answer.precision}"]
    if isinstance(manifest, SegmentationManifest):
        parameters.append("spacing_mm=" + "x".join(f"{mm:g}" for mm in manifest.input.spacing_mm))
        parameters.append("window=" + "x".join(str(n) for n in manifest.infer.window))
        parameters.append(f"overlap={manifest.infer.overlap:g}")
    return tuple(parameters)
