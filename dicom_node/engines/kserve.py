"""Any model behind the Open Inference Protocol (KServe v2): Triton, MLServer, OpenVINO Model Server and others.

Such a server takes tensors and gives tensors; a recipe in the configuration says what is made of a series before and
of the tensors after (`_kserve_recipe`). Volumes become SEG and measurements on the source grid, radiographs findings.
An inference changes nothing over there and leaves nothing behind: after a crash the series is asked about again, and
there is nothing to remember or to cancel.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dicom_node.breaker import BreakerState
from dicom_node.budget import VolumeMemory, volume_bytes
from dicom_node.config import EngineSettings
from dicom_node.engines import _kserve_radiograph as radiograph
from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._http import parse_options
from dicom_node.engines._kserve_check import misfits
from dicom_node.engines._kserve_recipe import KServeOptions, VolumeRecipe
from dicom_node.engines._kserve_server import Described, Observer, Server, one_line
from dicom_node.engines._kserve_volume import Plan, label_volume, planned
from dicom_node.engines._stacks import Budget, stack_of
from dicom_node.engines._tally import measured
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import must_hide, why_not
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable
from dicom_node.identity import device_uid
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, Sending, StoredInstance
from dicom_node.pixels import read_volume
from dicom_node.values import EngineResult, Provenance

__all__ = ["KServeEngine", "KServeOptions"]

_REPORT_S = 30.0


@dataclass(slots=True, kw_only=True)
class _Traffic:
    """What was sent for one series so far, and which versions of the model answered."""

    sending: Sending
    sent_bytes: int = 0
    versions: set[str] = field(default_factory=set)
    answer: bytes = b""  # the last one
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, message: wire.Message) -> Sending:
        """One request more; what to record."""
        for piece in message.pieces:
            self.sent_bytes += len(piece)
            self.digest.update(piece)
        return replace(self.sending, bytes=self.sent_bytes, sha256=self.digest.hexdigest())


class KServeEngine:
    """One model of a KServe v2 server as an engine.

    `settings.model` is its name there; `settings.options` as in `KServeOptions`. Construction validates them
    (ConfigError) and connects nowhere; other keyword arguments are ignored. Several series may be run at a time, from
    threads; `options.concurrency` bounds the calls.
    """

    def __init__(self, name: str, settings: EngineSettings, *, memory: VolumeMemory | None = None, **node: Any) -> None:
        self.name = name
        self._memory = memory or VolumeMemory(1 << 33)
        if not settings.model:
            raise ConfigError(f"engines.{name}.model: missing; name a model of the server")
        self._model = settings.model
        self._timeout_s = settings.timeout_s
        self._options = parse_options(KServeOptions, name, settings.options)
        self._server = Server(name, settings.model, self._options)
        self._hide = must_hide(self._options, self._server.host)
        self._closed = False

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment; '' when it can."""
        if self._server.state is BreakerState.OPEN:
            return f"{self._server.host} did not answer several times in a row; it is tried again soon"
        return ""

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`."""
        return {"breaker_state": float(self._server.state.value)}

    def observe(self, observer: Observer) -> None:
        """Tell `observer(engine, outcome, seconds)` of every request."""
        self._server.observe(observer)

    def check(self) -> None:
        """Whether its credentials can be had. Asks nobody. Raises ConfigError."""
        self._server.check()

    def report(self) -> Sequence[tuple[str, str]]:
        """Who answers, in which version, and whether the recipe fits the model. Raises as `run` does."""
        self._server.check()
        told = self._described(lambda: None, _REPORT_S)
        options = self._options
        tls = "TLS" if options.base_url.startswith("https") else "plain http: nothing is encrypted"
        return (
            ("server", f"{self._server.host}: {told.server}"),
            ("connection", f"{tls}; tensors travel as {'binary' if told.binary else 'JSON'}"),
            ("credentials", self._server.credentials),
            ("model", f"{self._model}: versions {', '.join(told.versions) or 'not told'}; {told.platform or 'any'}"),
            ("takes", ", ".join(one.shown for one in told.inputs) or "not told: the recipe could not be compared"),
            ("answers", ", ".join(one.shown for one in told.outputs) or "not told: the recipe could not be compared"),
            ("recipe", f"{self._kind}: fits the model"),
            ("leaves the node", "tensors of pixels: no header, no name, no UID"),
        )

    def close(self) -> None:
        """Close the connections; what is under way ends. Idempotent."""
        self._closed = True
        self._server.close()

    # --- a series

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """The labels on the images and what is measured on them, or the findings on each radiograph.

        Raises SeriesRejected (no regular stack of slices, unreadable pixel data, more memory than allowed),
        EngineRejected (no image may leave or is fit, or the server refuses the tensor), ConfigError (the recipe does
        not fit the model), EngineUnavailable (cannot be reached, is not ready, refuses the credentials), EngineCrashed
        (status 500), EngineTimeout, and other EngineErrors for an answer that does not fit, which is then in the
        quarantine; StorageError and LeaseLost of the task's own functions; and whatever `heartbeat` raises.
        """
        budget = Budget(self.name, heartbeat, min(task.timeout_s, self._timeout_s), lambda: self._closed)
        recipe = self._options.recipe
        run = self._run_volume if isinstance(recipe, VolumeRecipe) else self._run_radiographs
        return run(task, budget)

    def _described(self, beat: Heartbeat, timeout_s: float) -> Described:
        """What the server tells of itself and the model. Raises ConfigError when the recipe does not fit."""
        told = self._server.described(beat, timeout_s)
        if found := misfits(self._options.recipe, told):
            key = f"engines.{self.name}.options"
            more = f" (and {len(found) - 1} more: dicom-node engines check {self.name})" if len(found) > 1 else ""
            raise ConfigError(f"{key}.{self._kind}.{found[0]}{more}")
        return told

    @property
    def _kind(self) -> str:
        return "volume" if self._options.volume is not None else "radiograph"

    # --- volumes

    def _run_volume(self, task: EngineTask, budget: Budget) -> EngineResult:
        recipe = self._options.volume
        assert recipe is not None
        began = time.perf_counter()
        stack = stack_of(task, budget, hide=self._hide)  # told whether the server is there or not
        geometry = stack.geometry
        told = self._described(budget.beat, budget.left_s())
        plan = planned(
            recipe,
            geometry,
            full=_has_one_batch(recipe, told),
            binary=told.binary,
            max_response_bytes=self._options.max_response_bytes,
        )
        hounsfield = recipe.input.values == "hu"
        with self._memory.taken(volume_bytes(task), task.priority, budget.beat, wait_s=budget.left_s()):
            voxels = read_volume(stack.images, geometry, values=recipe.input.values, heartbeat=budget.beat)
            ready = time.perf_counter()
            with self._sending(task, "volume", stack.identifiable, budget) as (traffic, infer):
                labels = label_volume(recipe, plan, voxels, geometry, infer, budget.beat)
            answered = time.perf_counter()
            measurements = measured(labels, voxels, geometry, hounsfield=hounsfield, heartbeat=budget.beat)
        stages = {"prepare": ready - began, "forward": answered - ready, "finish": time.perf_counter() - answered}
        provenance = self._provenance(told, traffic.versions, _told_of(recipe, plan))
        return EngineResult(values=(labels, measurements), provenance=provenance, stage_seconds=stages)

    # --- radiographs

    def _run_radiographs(self, task: EngineTask, budget: Budget) -> EngineResult:
        recipe = self._options.radiograph
        assert recipe is not None
        began = time.perf_counter()
        pictures, notes = radiograph.fit_pictures(recipe, task, self._why_not, budget.beat)
        sent = [picture for picture in pictures if not picture.refused]
        identifiable = any(self._is_identifiable(picture.instance) for picture in sent)
        told = self._described(budget.beat, budget.left_s())
        ready = time.perf_counter()
        wanted = radiograph.wanted_of(recipe)
        values = [radiograph.found_in(recipe, picture, None, notes) for picture in pictures if picture.refused]
        versions: set[str] = set()
        if sent:
            with self._sending(task, "images", identifiable, budget, objects=len(sent)) as (traffic, infer):
                for picture in sent:
                    reply = infer(radiograph.message_of(recipe, picture, binary=told.binary), wanted)
                    values.append(radiograph.found_in(recipe, picture, reply, notes))
            versions = traffic.versions
        stages = {"prepare": ready - began, "forward": time.perf_counter() - ready}
        provenance = self._provenance(told, versions, ())
        return EngineResult(values=tuple(values), provenance=provenance, stage_seconds=stages)

    # --- sending

    def _why_not(self, instance: StoredInstance) -> str:
        return why_not(read_header(instance), hide=self._hide)

    @staticmethod
    def _is_identifiable(instance: StoredInstance) -> bool:
        return bool(why_not(read_header(instance), hide=True))

    @contextmanager
    def _sending(
        self, task: EngineTask, what: str, identifiable: bool, budget: Budget, objects: int = 1
    ) -> Iterator[tuple[_Traffic, Callable[[wire.Message, Mapping[str, wire.Wanted]], wire.Reply]]]:
        """All requests of a series as one sending. An answer that does not fit is kept for a person to look at.

        Raises EngineUnavailable when the model was exchanged while it worked: the series is asked about again.
        """
        sending = Sending(what=what, host=self._server.host, objects=objects, identifiable=identifiable)
        traffic = _Traffic(sending=sending)
        with task.record(sending) as tell:

            def infer(message: wire.Message, wanted: Mapping[str, wire.Wanted]) -> wire.Reply:
                tell(traffic.add(message))
                reply = self._server.infer(message, wanted, budget.beat, budget.left_s())
                traffic.versions.add(reply.model_version)
                traffic.answer = reply.body
                if len(traffic.versions) > 1:
                    raise EngineUnavailable(f"engine {self.name}: the model's version changed within one series")
                return reply

            try:
                yield traffic, infer
            except wire.UnusableAnswer as exc:
                kept = _kept(task, exc.body or traffic.answer, str(exc))
                raise EngineError(f"engine {self.name}: {exc}{kept}") from exc

    # --- who spoke

    def _provenance(self, told: Described, versions: set[str], parameters: tuple[str, ...]) -> Provenance:
        options = self._options
        version = one_line(next(iter(versions), ""))[:64] or options.version or "unknown"
        recipe = options.recipe.model_dump(mode="json", by_alias=True)
        config = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        return Provenance(
            name=self._model,
            version=version,
            manufacturer=options.manufacturer,
            device_uid=device_uid("kserve", options.base_url, self._model, version, told.server, config),
            weights_sha256="",  # the server's own business
            config_sha256=config,
            parameters=(f"server={told.server}", "protocol=KServe v2", *parameters),
            notice=options.notice,
        )


def _has_one_batch(recipe: VolumeRecipe, told: Described) -> bool:
    """Whether the model takes batches of one size only."""
    info = next((one for one in told.inputs if one.name == recipe.input.name), None)
    return info is not None and "N" in recipe.input.layout and info.shape[0] != -1


def _told_of(recipe: VolumeRecipe, plan: Plan) -> tuple[str, ...]:
    spacing = " x ".join(f"{mm:g}" for mm in recipe.input.spacing_mm)
    back = "scores interpolated to the pixels" if recipe.output.inverse == "probability" else "nearest voxel's label"
    return (f"grid={recipe.input.orientation} {spacing} mm", f"windows={plan.lattice.count}", f"inverse={back}")


def _kept(task: EngineTask, body: bytes, reason: str) -> str:
    """The end of a sentence that names the file in the quarantine."""
    with tempfile.TemporaryDirectory(prefix="kserve-") as folder:
        answer = Path(folder) / "answer"
        try:
            answer.write_bytes(body)
        except OSError:
            return ""
        name = task.quarantine(answer, reason)
    return f"; the answer is in the quarantine as {name}" if name else ""
