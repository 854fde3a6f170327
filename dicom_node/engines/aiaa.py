"""NVIDIA Clara Train AIAA server, 3.x and 4.1, as an engine: a series goes as one volume, its mask comes back as SEG.

Segmentation, DExtr3D and DeepGrow with points that are configured or stand in a report of the study, and inference of
any model, whose parameters become findings. The server answers while it is waited for, and an inference changes nothing
there: repeating one after a crash does no harm. With `session` the volume is put once and named by an id that is kept
with the job. Its vendor deprecated the interface; MONAI Label (`monai_label`) is its successor.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dicom_node.breaker import BreakerState
from dicom_node.budget import VolumeMemory, volume_bytes
from dicom_node.config import EngineSettings
from dicom_node.engines._aiaa_findings import findings_of
from dicom_node.engines._aiaa_job import VolumeJob, kept_if_unfit
from dicom_node.engines._aiaa_options import INTERACTIVE, AiaaOptions, Api
from dicom_node.engines._aiaa_pictures import grey, write_png
from dicom_node.engines._aiaa_points import points_for
from dicom_node.engines._aiaa_server import MAX_CONFIG_BYTES, AiaaServer, Asked, Model, Session
from dicom_node.engines._http import parse_options
from dicom_node.engines._stacks import Budget, screened, stack_of
from dicom_node.engines.labels import names_by_value
from dicom_node.engines.privacy import must_hide
from dicom_node.errors import ConfigError, SeriesRejected
from dicom_node.identity import device_uid
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, Sending
from dicom_node.pixels import displayed_radiograph, read_image
from dicom_node.values import EngineResult, Findings, Provenance, ResultValue

__all__ = ["AiaaEngine"]

MAX_PICTURES = 64  # of one series; more is no radiography
_API_OF: Mapping[str, Api] = {"segmentation": "segmentation", "annotation": "dextr3d", "deepgrow": "deepgrow"}

Observer = Callable[[str, str, float], None]


class AiaaEngine:
    """A model of an AIAA server as an engine.

    `settings.model` is its name there; `settings.options` as in `AiaaOptions`. Construction validates them
    (ConfigError) and connects nowhere. `memory` is what the volumes of all engines share. Several series may be run at
    a time, from threads; `options.concurrency` bounds the calls.
    """

    def __init__(self, name: str, settings: EngineSettings, *, memory: VolumeMemory | None = None, **node: Any) -> None:
        self.name = name
        if not settings.model:
            raise ConfigError(f"engines.{name}.model: missing; name a model that GET /v1/models of the server lists")
        self._model = settings.model
        self._timeout_s = settings.timeout_s
        self._options = parse_options(AiaaOptions, name, settings.options)
        self._host = urlsplit(self._options.base_url).hostname or ""
        self._hide = must_hide(self._options, self._host)
        if self._options.session == "dicom" and self._hide:
            raise ConfigError(
                f"engines.{name}.options.session: with dicom the server is told the Patient ID and fetches the images "
                "as they are; allow it with send_identifiable: true, or use upload"
            )
        self._memory = memory or VolumeMemory(1 << 33)
        self._observer: Observer | None = None
        self._closed = False
        self._server = AiaaServer(name, self._options, self._tell)

    # --- what the node asks of it

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment; '' when it can."""
        if self._server.http.state is BreakerState.OPEN:
            return f"{self._host} did not answer several times in a row; it is tried again soon"
        return ""

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`."""
        return {"breaker_state": float(self._server.http.state.value)}

    def observe(self, observer: Observer) -> None:
        """Tell `observer(engine, outcome, seconds)` of every request."""
        self._observer = observer

    def _tell(self, engine: str, outcome: str, seconds: float) -> None:
        if self._observer is not None:
            self._observer(engine, outcome, seconds)

    def check(self) -> None:
        """Whether its token can be had. Asks nobody. Raises ConfigError."""
        if self._options.token is not None:
            self._options.token.reveal()

    def report(self) -> Sequence[tuple[str, str]]:
        """What the server offers, and what is asked of it. Raises as `run` does."""
        offered = self._server.models()
        model = self._server.model(self._model, lambda: None)
        api = self._api(model)
        names = names_by_value(model.labels)
        token = self._options.token
        leaves = "the series, fetched by C-GET with the patient's name and ID"
        if self._options.session != "dicom":
            leaves = "voxels and their place, no header" + (", by session" if self._options.session == "upload" else "")
        return (
            ("server", f"{self._host}: AIAA, taken for Clara Train {self._options.server}"),
            ("credentials", f"bearer token from {token}" if token is not None else "none"),
            ("models", ", ".join(f"{one.shown} ({one.type or '?'})" for one in offered) or "none"),
            ("asked", f"{api} of {model.name} {model.version_told or '(no version told)'}"),
            ("labels", ", ".join(f"{number} {label}" for number, label in sorted(names.items())) or "none told"),
            ("leaves the node", leaves),
        )

    def close(self) -> None:
        """Close the connections; what is under way ends. Idempotent."""
        self._closed = True
        self._server.http.close()

    # --- a series

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """The labels on the images and what is measured on them, or findings.

        Raises SeriesRejected (no regular stack of slices, unreadable pixel data), EngineRejected (the images may not
        leave, there are no points, the server refuses them), EngineUnavailable (cannot be reached, does not offer the
        model), EngineCrashed (status 500, which carries no cause), EngineTimeout, GeometryMismatch and other
        EngineErrors for an answer that does not fit, whose file is then in the quarantine; ConfigError; StorageError
        and LeaseLost of the task's own functions; and whatever `heartbeat` raises.
        """
        timeout_s = min(task.timeout_s, self._timeout_s)
        with (
            self._memory.taken(volume_bytes(task), task.priority, heartbeat, wait_s=timeout_s),
            tempfile.TemporaryDirectory(prefix="aiaa-") as folder,
        ):
            budget = Budget(self.name, heartbeat, timeout_s, lambda: self._closed)
            if self._options.findings is not None and self._options.findings.picture:
                return self._pictures(task, budget, Path(folder))
            return self._volume(task, budget, Path(folder))

    def cancel_noted(self, note: str) -> None:
        """End the session of a job that nobody waits for any more. Raises NodeError when it could not be told."""
        held = Session.of(note)
        if held is not None:
            self._server.end_session(held)

    def _volume(self, task: EngineTask, budget: Budget, folder: Path) -> EngineResult:
        began = time.perf_counter()
        stack = stack_of(task, budget, hide=self._hide)  # told whether the server is there or not
        points = None
        if self._options.points is not None:
            points = points_for(self._options.points, stack.geometry, task.study_instances, budget.beat)
        model = self._server.model(self._model, budget.beat, budget.left_s())
        job = VolumeJob(
            self._server,
            self._options,
            task,
            budget,
            stack=stack,
            model=model,
            api=self._api(model),
            points=points,
            folder=folder,
            host=self._host,
        )
        with job.ended():
            job.prepare()
            ready = time.perf_counter()
            reply = job.ask()
            answered = time.perf_counter()
            if self._options.findings is None:
                values = job.labels(reply)
            else:
                uids = stack.geometry.sop_instance_uids
                note = f"said of all {len(uids)} images of the series together; referred to the one in their middle"
                found = self._findings(task, folder, reply.params, model, uids[len(uids) // 2], (note,))
                values = (*(job.labels(reply) if reply.file is not None else ()), found)
        stages = {"prepare": ready - began, "forward": answered - ready, "finish": time.perf_counter() - answered}
        return EngineResult(values=values, provenance=self._provenance(model), stage_seconds=stages)

    def _api(self, model: Model) -> Api:
        """Which request it is. Raises ConfigError for a model that needs points when none are configured."""
        api = self._options.api or _API_OF.get(model.type, "inference")
        if api in INTERACTIVE and self._options.points is None:
            raise ConfigError(
                f"engines.{self.name}.options.points: missing; {model.name} is asked by {api}, which needs points"
            )
        if api not in INTERACTIVE and self._options.points is not None:
            raise ConfigError(f"engines.{self.name}.options.points: {model.name} is asked by {api}, which takes none")
        if self._options.findings is not None and api != "inference":
            raise ConfigError(f"engines.{self.name}.options.findings: {model.name} is asked by {api}, which tells none")
        return api

    def _findings(
        self, task: EngineTask, folder: Path, params: Mapping[str, Any], model: Model, uid: str, notes: Sequence[str]
    ) -> Findings:
        assert self._options.findings is not None
        told = folder / "params.json"
        told.write_text(json.dumps(params), encoding="utf-8")
        with kept_if_unfit(task, told):
            return findings_of(
                params,
                self._options.findings,
                self._options.labels,
                model.label_names,
                sop_instance_uid=uid,
                notes=notes,
            )

    # --- pictures

    def _pictures(self, task: EngineTask, budget: Budget, folder: Path) -> EngineResult:
        """Findings on each image of a series, each sent by itself. Raises as `run`."""
        if len(task.instances) > MAX_PICTURES:
            raise SeriesRejected(f"{len(task.instances)} images in one series, at most {MAX_PICTURES} go as pictures")
        began = time.perf_counter()
        instances = sorted(task.instances, key=lambda one: one.sop_instance_uid)
        identifiable = screened(instances, budget, hide=self._hide)
        model = self._server.model(self._model, budget.beat, budget.left_s())
        self._api(model)
        values: list[ResultValue] = []
        for instance in instances:
            picture = folder / "picture.png"
            write_png(grey(displayed_radiograph(read_image(instance), budget.beat)), picture)
            sending = Sending(
                what="picture",
                host=self._host,
                objects=1,
                identifiable=identifiable,
                bytes=picture.stat().st_size,
                sha256=hashlib.sha256(picture.read_bytes()).hexdigest(),
            )
            asked = Asked(
                api="inference",
                model=model.name,
                params=self._options.params,
                output=self._options.asked_output,
                file=picture,
                filename=picture.name,
                content_type="image/png",
            )
            with task.record(sending):
                reply = self._server.ask(asked, folder / "answer", budget.beat, budget.left_s())
            values.append(self._findings(task, folder, reply.params, model, instance.sop_instance_uid, ()))
        stages = {"forward": time.perf_counter() - began}
        return EngineResult(values=tuple(values), provenance=self._provenance(model), stage_seconds=stages)

    def _provenance(self, model: Model) -> Provenance:
        options = self._options
        told = options.model_dump(
            mode="json", include={"api", "params", "points", "polygons", "findings", "labels", "values", "server"}
        )
        config = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        version = model.version_told or "unknown"
        return Provenance(
            name=self._model,
            version=version,
            manufacturer=options.manufacturer,
            device_uid=device_uid("aiaa", options.base_url, self._model, version, config),
            weights_sha256="",
            config_sha256=config,
            parameters=(f"request={self._api(model)}", f"protocol=AIAA {options.server}"),
            notice=options.notice,
        )

    # --- administration, for `dicom-node engines aiaa-model`

    def model_config(self, model: str) -> Any:
        """The server's configuration of a model. Raises EngineRejected when there is none."""
        return self._server.config(model)

    def load_model(self, model: str, config: Path, data: Path | None) -> None:
        """Load or replace a model: its configuration, and the model itself unless the server has it."""
        self._json_file(config)
        self._server.load(model, config, data)

    def reload_model(self, model: str, config: Path) -> None:
        """Give a model another configuration; raises EngineRejected where the server has no such request (4.1)."""
        self._server.reload(model, self._json_file(config))

    def unload_model(self, model: str) -> None:
        """Take a model off the server."""
        self._server.unload(model)

    @staticmethod
    def _json_file(path: Path) -> Any:
        """Raises ConfigError: it must not reach the server to be found wrong there."""
        try:
            raw = path.read_bytes() if path.stat().st_size <= MAX_CONFIG_BYTES else b""
            return json.loads(raw)
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}: is no JSON of at most {MAX_CONFIG_BYTES >> 20} MiB") from None
