"""MONAI Label over REST: a series goes as one volume, the label map it paints comes back as SEG and measurements.

One call does it: POST /infer/{model}?output=image, multipart with `params` (JSON text) and `file` (NIfTI), answered by
the painted file. With `session` the volume is put once (PUT /session/) and named by its id, which outlasts a retry. An
inference changes nothing over there, so that repeating one does no harm; nothing is ever trained or stored.

The server runs an inference where it also takes requests: until it is done it answers nobody, not even GET /info/. So
series take turns here, and silence before a series was given to it is an outage, not that series' fault.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dicom_node.breaker import BreakerState
from dicom_node.budget import VolumeMemory, volume_bytes
from dicom_node.config import EngineSettings
from dicom_node.engines._http import HttpClient, Part, parse_options
from dicom_node.engines._limits import Slots
from dicom_node.engines._monai_label_told import Info, Model, Session, Settings, plain_text
from dicom_node.engines._stacks import Budget, Stack, stack_of
from dicom_node.engines._tally import measured
from dicom_node.engines.labels import names_by_value
from dicom_node.engines.masks import from_label_map, read_volume
from dicom_node.engines.nifti import write_nifti
from dicom_node.engines.privacy import must_hide
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    StorageError,
)
from dicom_node.geometry import VolumeGeometry
from dicom_node.identity import device_uid
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, Sending
from dicom_node.pixels import read_volume as read_pixels
from dicom_node.values import EngineResult, LabelVolume, Provenance

__all__ = ["MonaiLabelEngine"]

log = logging.getLogger(__name__)

_FILE = "volume.nii.gz"  # what the server sees: nothing of the patient
_INFO_S, _END_S = 30.0, 10.0
_LOST = (404, 440)  # of a session: the server knows it no more

Voxels = npt.NDArray[np.int16] | npt.NDArray[np.float32]
Observer = Callable[[str, str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A series as it is sent. `voxels` is (slice, row, column) on the images' own grid."""

    geometry: VolumeGeometry
    voxels: Voxels
    hounsfield: bool
    path: Path
    sending: Sending


class MonaiLabelEngine:
    """A model of a MONAI Label server as an engine.

    `settings.model` is its name there; `settings.options` as in `Settings`. Construction validates them (ConfigError)
    and connects nowhere. Several series may be run at a time, from threads; `options.concurrency` bounds the calls.
    """

    def __init__(self, name: str, settings: EngineSettings, *, memory: VolumeMemory | None = None, **node: Any) -> None:
        self.name = name
        self._memory = memory or VolumeMemory(1 << 33)
        if not settings.model:
            raise ConfigError(f"engines.{name}.model: missing; name a model that GET /info/ of the server lists")
        self._model = settings.model
        self._timeout_s = settings.timeout_s
        self._options = parse_options(Settings, name, settings.options)
        self._turns = Slots(self._options.concurrency)
        self._host = urlsplit(self._options.base_url).hostname or ""
        self._hide = must_hide(self._options, self._host)
        self._observer: Observer | None = None
        self._closed = False
        token = self._options.token
        secrets = {"authorization": lambda: f"Bearer {token.reveal()}"} if token is not None else {}
        self._http = HttpClient(name, self._options, secrets, self._tell)

    # --- what the node asks of it

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment; '' when it can."""
        if self._http.state is BreakerState.OPEN:
            return f"{self._host} did not answer several times in a row; it is tried again soon"
        return ""

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`."""
        return {"breaker_state": float(self._http.state.value)}

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
        """Who answers, in which version, what it offers, and the labels of the model. Raises as `run` does."""
        info = self._info(lambda: None, _INFO_S)
        model = self._of(info)
        names = names_by_value(model.labels or info.labels)
        token = self._options.token
        return (
            ("server", f"{self._host}: {info.name or 'MONAI Label'} {plain_text(info.version) or '(no version told)'}"),
            ("credentials", f"bearer token from {token}" if token is not None else "none"),
            ("models", ", ".join(f"{key} ({told.type or '?'})" for key, told in sorted(info.models.items()))),
            ("labels", ", ".join(f"{number} {label}" for number, label in sorted(names.items())) or "none told"),
            (
                "leaves the node",
                "voxels and their place, no header" + (", by session" if self._options.session else ""),
            ),
        )

    def close(self) -> None:
        """Close the connections; what is under way ends. Idempotent."""
        self._closed = True
        self._http.close()

    # --- a series

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """The labels on the images and what is measured on them.

        Raises SeriesRejected (no regular stack of slices, unreadable pixel data), EngineRejected (the images may not
        leave, or the server refuses them), EngineUnavailable (cannot be reached, refuses the token, does not offer the
        model), EngineCrashed (status 500, which carries no cause), EngineTimeout, GeometryMismatch and other
        EngineErrors for an answer that does not fit, whose file is then in the quarantine; ConfigError; StorageError
        and LeaseLost of the task's own functions; and whatever `heartbeat` raises.
        """
        timeout_s = min(task.timeout_s, self._timeout_s)
        patience = Budget(self.name, heartbeat, timeout_s, lambda: self._closed)
        stack = stack_of(task, patience, hide=self._hide)  # told whether the server is there or not
        with tempfile.TemporaryDirectory(prefix="monai-label-") as folder, ExitStack() as holding:
            answer = Path(folder) / "answer"
            with self._turn(patience):
                holding.enter_context(
                    self._memory.taken(volume_bytes(task), task.priority, patience.beat, wait_s=patience.left_s())
                )
                budget = Budget(self.name, heartbeat, timeout_s, lambda: self._closed)
                began = time.perf_counter()
                info = self._info(budget.beat, min(_INFO_S, budget.left_s()))
                model = self._of(info)
                prepared = self._prepare(task, stack, Path(folder) / _FILE, budget)
                ready = time.perf_counter()
                self._infer(task, prepared, answer, budget)
            answered = time.perf_counter()
            names = names_by_value(model.labels or info.labels)
            labels = self._labels(task, prepared, answer, names, budget)
            measurements = measured(
                labels, prepared.voxels, prepared.geometry, hounsfield=prepared.hounsfield, heartbeat=budget.beat
            )
        stages = {"prepare": ready - began, "forward": answered - ready, "finish": time.perf_counter() - answered}
        provenance = self._provenance(info, model)
        return EngineResult(values=(labels, measurements), provenance=provenance, stage_seconds=stages)

    @contextmanager
    def _turn(self, patience: Budget) -> Iterator[None]:
        """One of the places at the server. Raises EngineUnavailable when `patience` is over before there is one."""
        turn = ExitStack()
        try:
            turn.enter_context(self._turns.one(patience.beat))
        except EngineTimeout:
            raise EngineUnavailable(
                f"engine {self.name}: other series took all the time this one may wait for its turn"
            ) from None
        with turn:
            yield

    def cancel_noted(self, note: str) -> None:
        """End the session of a job that nobody waits for any more. Raises NodeError when it could not be told."""
        held = Session.of(note)
        if held is not None:
            self._http.call(
                "DELETE", f"/session/{held.id}", idempotent=True, expect=(200, 204, *_LOST), timeout_s=_END_S
            )

    # --- the server

    def _info(self, beat: Heartbeat, timeout_s: float) -> Info:
        try:
            answer = self._http.call("GET", "/info/", idempotent=True, heartbeat=beat, timeout_s=timeout_s)
        except EngineTimeout as exc:
            why = f"{exc}; a MONAI Label server answers nobody while it works on an image"
            raise EngineUnavailable(why) from exc
        try:
            return Info.model_validate(answer.json())
        except ValidationError:
            raise EngineError(f"engine {self.name}: GET /info/ is not that of a MONAI Label server") from None

    def _of(self, info: Info) -> Model:
        model = info.models.get(self._model)
        if model is None:
            offered = ", ".join(sorted(info.models)) or "none"
            raise EngineUnavailable(f"engine {self.name}: the server has no model {self._model!r} (offered: {offered})")
        if model.dimension not in (None, 3):
            raise ConfigError(f"engines.{self.name}.model: {self._model!r} takes pictures of 2 dimensions, no volumes")
        return model

    # --- out

    def _prepare(self, task: EngineTask, stack: Stack, path: Path, budget: Budget) -> _Prepared:
        """The stack as a file, and what is recorded of its sending. Raises SeriesRejected, StorageError."""
        is_ct = {"CT"} == set(task.header.values.get("Modality", ()))
        hounsfield = self._options.values == "hu" or (self._options.values == "auto" and is_ct)
        values: Literal["hu", "any"] = "hu" if hounsfield else "any"
        voxels = read_pixels(stack.images, stack.geometry, values=values, heartbeat=budget.beat)
        try:
            write_nifti(voxels, stack.geometry, path, heartbeat=budget.beat)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
        except OSError as exc:
            raise StorageError(f"a volume for engine {self.name} cannot be written: {exc.strerror}") from exc
        sending = Sending(
            what="volume",
            host=self._host,
            objects=1,
            identifiable=stack.identifiable,
            bytes=size,
            sha256=digest,
        )
        return _Prepared(geometry=stack.geometry, voxels=voxels, hounsfield=hounsfield, path=path, sending=sending)

    def _infer(self, task: EngineTask, prepared: _Prepared, answer: Path, budget: Budget) -> None:
        if not self._options.session:
            file = Part(name="file", content=prepared.path, filename=_FILE, content_type="application/octet-stream")
            with task.record(prepared.sending):
                self._ask({}, (file,), answer, budget)
            return
        held = Session.of(task.note)
        if held is None or held.sha256 != prepared.sending.sha256:
            held = self._put(task, prepared, budget)
        try:
            self._ask_session(task, held, answer, budget)
        except EngineRejected:  # the job ends with it: the images must not lie there until the session expires
            self._end(held, budget)
            raise
        except EngineError as exc:
            if not self._is_over(exc, held, budget):
                raise
            log.info("a session was over and is made anew", extra={"engine": self.name, "job": task.job_id})
            held = self._put(task, prepared, budget)
            self._ask_session(task, held, answer, budget)
        self._end(held, budget)

    def _ask(self, query: Mapping[str, str], files: Sequence[Part], answer: Path, budget: Budget) -> None:
        params = {"result_extension": ".nii.gz", **self._options.params}
        self._http.call_into(
            "POST",
            f"/infer/{quote(self._model, safe='')}",
            answer,
            idempotent=False,  # a failure carries no cause: whether it is worth another try is the job's to say
            params={"output": "image", **query},
            files=(Part(name="params", content=json.dumps(params)), *files),
            heartbeat=budget.beat,
            timeout_s=budget.left_s(),
        )

    # --- sessions

    def _put(self, task: EngineTask, prepared: _Prepared, budget: Budget) -> Session:
        """The volume as a session, remembered with the job: a retry needs not send it again."""
        expiry = self._options.session_expiry_s
        file = Part(name="files", content=prepared.path, filename=_FILE, content_type="application/octet-stream")
        with task.record(prepared.sending) as tell:
            told = self._http.call(
                "PUT",
                "/session/",
                idempotent=False,
                params={"uncompress": "false", **({"expiry": str(expiry)} if expiry else {})},
                files=(file,),
                heartbeat=budget.beat,
                timeout_s=budget.left_s(),
            ).json()
            held = Session.told(told, prepared.sending.sha256)
            tell(replace(prepared.sending, remote_id=held.id))
        task.remember(held.note)
        return held

    def _ask_session(self, task: EngineTask, held: Session, answer: Path, budget: Budget) -> None:
        asked = Sending(what="request", host=self._host, objects=0, identifiable=False, remote_id=held.id)
        with task.record(asked):
            self._ask({"session_id": held.id}, (), answer, budget)

    def _is_over(self, exc: EngineError, held: Session, budget: Budget) -> bool:
        """Whether `exc` is for a session the server knows no more: of one it says 500, as of anything else."""
        if exc.http_status in _LOST:
            return True
        if not isinstance(exc, EngineCrashed):
            return False
        try:
            self._http.call("GET", f"/session/{held.id}", idempotent=True, heartbeat=budget.beat, timeout_s=_END_S)
        except EngineError as asked:
            return asked.http_status in _LOST
        return False

    def _end(self, held: Session, budget: Budget) -> None:
        """The answer is there: a session that cannot be ended ends by itself."""
        try:
            self._http.call(
                "DELETE",
                f"/session/{held.id}",
                idempotent=True,
                expect=(200, 204, *_LOST),
                heartbeat=budget.beat,
                timeout_s=min(_END_S, budget.left_s()),
            )
        except EngineError:
            log.info("a session could not be ended", extra={"engine": self.name})

    # --- back

    def _labels(
        self, task: EngineTask, prepared: _Prepared, answer: Path, names: Mapping[int, str], budget: Budget
    ) -> LabelVolume:
        with _kept_if_unfit(task, answer):
            returned = read_volume(answer, heartbeat=budget.beat)
            # what the file says of itself comes before what the server says of its models
            return from_label_map(
                returned,
                prepared.geometry,
                names={**names, **returned.names},
                table=self._options.labels,
                heartbeat=budget.beat,
            )

    def _provenance(self, info: Info, model: Model) -> Provenance:
        version = plain_text(model.version) or plain_text(info.version) or "unknown"
        server = f"{info.name or 'MONAI Label'} {plain_text(info.version)}".strip()
        told = {"params": self._options.params, "labels": self._options.labels.model_dump(mode="json")}
        told |= {"values": self._options.values}
        config = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        return Provenance(
            name=self._model,
            version=version,
            manufacturer=self._options.manufacturer,
            device_uid=device_uid("monai_label", self._options.base_url, self._model, version, server, config),
            weights_sha256="",
            config_sha256=config,
            parameters=(f"server={server}", "protocol=MONAI Label REST"),
            notice=self._options.notice,
        )


@contextmanager
def _kept_if_unfit(task: EngineTask, answer: Path) -> Iterator[None]:
    """A file that does not fit is kept for a person to look at, and the error names it."""
    try:
        yield
    except (EngineTimeout, EngineUnavailable):
        raise
    except EngineError as exc:
        name = task.quarantine(answer, str(exc))
        raise type(exc)(f"{exc}; the file is in the quarantine as {name}" if name else str(exc)) from exc
