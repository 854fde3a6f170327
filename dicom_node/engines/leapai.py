"""LeapAI CXR v1 as an engine: chest radiographs given to it in a shared folder, findings told over HTTP.

The engine reads images by path on its own machine, so node and engine share a folder that each knows under its own
name. One image at a time is written there under a name of the job, asked about, and removed again whatever happens;
what a crash left is removed by the next try or by `cancel_noted`. Nothing is ever kept on the engine's disk
(`save_to_disk` false). An inference changes nothing there, so repeating it does no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dicom_node import anatomy
from dicom_node.breaker import BreakerState
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings
from dicom_node.engines import _leapai_answers as answers
from dicom_node.engines._http import Answer, HttpClient, Observer, parse_options
from dicom_node.engines._leapai_folder import SharedFolder
from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.engines.keys import node_secret
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import Pseudonyms, must_hide, why_not
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    SeriesRejected,
)
from dicom_node.interfaces import Clock, Heartbeat
from dicom_node.model import EngineTask, Sending, StoredInstance
from dicom_node.pixels import read_image
from dicom_node.values import EngineResult, Findings, Provenance

__all__ = ["LeapAiEngine", "LeapAiOptions"]

log = logging.getLogger(__name__)

MAX_IMAGES = 64  # of one series; more is no radiography
WARN_EVERY_S = 24 * 3600.0
# PS3.4 table B.5-1: Computed Radiography, and Digital X-Ray for presentation: what is meant to be looked at
_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"})
_VIEWED = ("ViewPosition", "ViewCodeSequence")
_INTERFACE = "LeapAI CXR v1"

Value = TypeVar("Value")


def _still() -> None:
    """No heartbeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What all images of one run share."""

    task: EngineTask
    pseudonyms: Pseudonyms
    heartbeat: Heartbeat
    deadline_s: float


class LeapAiEngine:
    """Findings on frontal chest radiographs, each image of the series on its own.

    Construction validates the options (ConfigError, naming engines.NAME.options.KEY) and does nothing else.
    `data_dir` is where the node's secret for pseudonyms lies; without it one is made for the life of the process,
    which changes nothing but the names of files after a restart. Other keyword arguments are ignored. Several series
    may be run at a time, from threads.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        data_dir: Path | None = None,
        clock: Clock | None = None,
        **node: Any,
    ) -> None:
        self.name = name
        self._options = parse_options(LeapAiOptions, name, settings.options)
        self._timeout_s = settings.timeout_s
        self._data_dir = data_dir
        self._clock: Clock = clock or SystemClock()
        self._host = urlsplit(self._options.base_url).hostname or ""
        self._hide = must_hide(self._options, self._host)
        self._folder = SharedFolder(name, self._options)
        self._guard = threading.Lock()
        self._client: HttpClient | None = None
        self._closed = False
        self._secret = b""
        self._observer: Observer | None = None
        self._heard = threading.local()
        self._trouble = ""
        self._warned_s = float("-inf")

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment, '' when it can, as far as is known without asking it."""
        try:
            left_s = self._token_left_s()
        except ConfigError as exc:
            return str(exc)
        if left_s is not None and left_s <= 0:
            return f"its token expired {-left_s / 86400:.1f} days ago: ask the vendor for a new one"
        client = self._client
        if client is not None and client.state is BreakerState.OPEN:
            return f"it rests after failures in a row; the last: {self._trouble}"
        return self._trouble

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`, and `token_expires_seconds` when the token says."""
        client = self._client
        told = {"breaker_state": float((client.state if client else BreakerState.CLOSED).value)}
        with suppress(ConfigError):
            left_s = self._token_left_s()
            if left_s is not None:
                told["token_expires_seconds"] = left_s
                self._warn(left_s)
        return told

    def observe(self, observer: Observer) -> None:
        """See `interfaces.Engine`."""
        self._observer = observer

    def check(self) -> None:
        """Raise ConfigError when the token is missing, the shared folder cannot be written or `verify` is unusable."""
        self._authorization()
        self._open()
        self._folder.check()

    def report(self) -> Sequence[tuple[str, str]]:
        """Ask it whether it is there and takes the token, see `interfaces.Engine`. Raises NodeError.

        The token is tried with a request that has no image, which the engine must refuse for that.
        """
        self._ping()
        self._probe()
        return (
            ("reached", f"{self._host}: answers /ping and takes the token"),
            ("token", self._token_told()),
            ("connection", "TLS" if self._options.base_url.startswith("https") else "plain http: nothing is encrypted"),
            ("shared folder", f"{self._options.node_folder} here, {self._options.engine_folder} there"),
            ("what leaves", "pseudonymised images" if self._hide else "images as they are, with the patient's name"),
            ("findings", ", ".join(name for name, _ in answers.CONDITIONS.values())),
        )

    def _ping(self) -> None:
        """Without the token: /ping needs none. A client of its own asks even while the engine rests."""
        client = HttpClient(self.name, self._options.model_copy(update={"retries": 0}), clock=self._clock)
        try:
            status = client.call("GET", "/ping", idempotent=True, timeout_s=30.0).json()
        finally:
            client.close()
        if not isinstance(status, Mapping) or status.get("status") != "ok":
            raise EngineError(f"engine {self.name}: its answer to /ping is not that of LeapAI CXR")

    def _probe(self) -> None:
        with self._told():
            self._asked(
                {}, lambda answer: answers.token_accepted(self.name, answer.status, answer.body), timeout_s=30.0
            )

    # --- the token

    def _authorization(self) -> str:
        """Raises ConfigError when there is no token."""
        token = self._token()
        return f"Bearer {token}" if self._options.bearer else token

    def _token(self) -> str:
        return re.sub(r"(?i)^bearer +", "", self._options.token.reveal().strip())

    def _token_left_s(self) -> float | None:
        expiry = answers.token_expiry(self._token())
        return None if expiry is None else (expiry - self._clock.wall()).total_seconds()

    def _token_told(self) -> str:
        left_s = self._token_left_s()
        if left_s is None:
            return "does not say when it expires"
        if left_s <= 0:
            return "has expired by this machine's clock"
        soon = "; soon: ask the vendor for a new one" if left_s < self._options.token_warning_days * 86400 else ""
        return f"expires in {left_s / 86400:.1f} days{soon}"

    def _warn(self, left_s: float) -> None:
        """Once a day, from `token_warning_days` before the end."""
        now = self._clock.boot().seconds
        with self._guard:
            if left_s >= self._options.token_warning_days * 86400 or now - self._warned_s < WARN_EVERY_S:
                return
            self._warned_s = now
        log.warning("an engine's token expires soon", extra={"engine": self.name, "days": round(left_s / 86400, 1)})

    # --- the work

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """One `Findings` for every fit image. What of the series was left out is said in each of them.

        Raises EngineRejected with every reason when no image is fit or the engine takes none, EngineUnavailable (also
        for a token or a shared folder that is not to be had), EngineTimeout, EngineCrashed, EngineError, StorageError,
        and whatever `heartbeat`, `task.remember` and `task.record` raise.
        """
        self._folder.remove(task.note)
        began_s = self._clock.boot().seconds
        fit, refusals = self._fit(task, heartbeat)
        job = _Job(
            task=task,
            pseudonyms=Pseudonyms(str(task.job_id) if task.job_id else f"by hand {uuid.uuid4()}", self._node_secret()),
            heartbeat=heartbeat,
            deadline_s=began_s + min(task.timeout_s, self._timeout_s),
        )
        if fit:
            names = (self._file_name(job, instance) for instance in fit)
            task.remember("\n".join(("images are handed over in the shared folder", *names)))
        told: dict[str, answers.Prediction] = {}
        with self._told():
            for instance in fit:
                try:
                    told[instance.sop_instance_uid] = self._predicted(job, instance)
                except EngineRejected as exc:
                    refusals.append(exc.reason)
        if not told:
            raise EngineRejected("; ".join(dict.fromkeys(refusals)) or "the series has no images")
        seconds = self._clock.boot().seconds - began_s
        return EngineResult(
            values=self._findings(told, refusals),
            provenance=self._provenance({prediction.model_version for prediction in told.values()}),
            stage_seconds={"forward": seconds},
        )

    def cancel_noted(self, note: str) -> None:
        """Remove what a crash left in the shared folder for a job that ended. Raises EngineUnavailable."""
        self._folder.remove(note, must=True)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._guard:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # --- which images

    def _fit(self, task: EngineTask, heartbeat: Heartbeat) -> tuple[list[StoredInstance], list[str]]:
        if len(task.instances) > MAX_IMAGES:
            raise SeriesRejected(f"{len(task.instances)} images in one series of radiographs, at most {MAX_IMAGES}")
        fit, refusals = [], []
        for instance in sorted(task.instances, key=lambda one: one.sop_instance_uid):
            try:
                reason = self._unfit(instance)
            except EngineRejected as exc:
                reason = exc.reason
            if reason:
                refusals.append(reason)
            else:
                fit.append(instance)
            heartbeat()
        return fit, refusals

    def _unfit(self, instance: StoredInstance) -> str:
        """Why the engine must not see this image, '' when it may. Raises EngineRejected when it cannot be read."""
        header = read_image(instance).header
        if instance.sop_class_uid not in _CLASSES:
            return "the image is no CR and no DX image for presentation"
        if header.get("PresentationIntentType") == "FOR PROCESSING":
            return "Presentation Intent Type is FOR PROCESSING: raw detector values"
        words = anatomy.views(lambda keyword: _value(header.get(keyword)) if keyword in _VIEWED else [])
        found = [word for word, where in words.items() if where == "ViewPosition"] or list(words)
        wanted = {view.upper() for view in self._options.views}
        if not found and self._options.view_missing == "refuse":
            return f"the view is not given, the engine takes {' or '.join(self._options.views)}"
        if not set(found) <= wanted:
            return f"the view is not {' or '.join(self._options.views)}"
        return why_not(read_header(instance), hide=self._hide)

    # --- one image

    def _predicted(self, job: _Job, instance: StoredInstance) -> answers.Prediction:
        name = self._file_name(job, instance)
        request = {
            "input_image_path": self._folder.path_there(name),
            "save_to_disk": False,
            "patient_id": job.pseudonyms.patient_id,
        }
        sending = Sending(what="DICOM instance", host=self._host, objects=1, identifiable=not self._hide)
        pseudonyms = job.pseudonyms if self._hide else None
        handed_over = self._folder.handed_over(instance, name, pseudonyms, job.heartbeat)
        with job.task.record(sending) as tell, handed_over as sent:
            tell(replace(sending, bytes=sent.length, sha256=sent.sha256, identifiable=sent.identifiable))
            left_s = job.deadline_s - self._clock.boot().seconds
            if left_s <= 0:
                raise EngineTimeout(f"engine {self.name}: the images of the series took longer than they may")
            return self._asked(
                request,
                lambda answer: answers.prediction_of(
                    self.name, answer.status, answer.body, sop_instance_uid=sent.sop_instance_uid
                ),
                timeout_s=left_s,
                heartbeat=job.heartbeat,
            )

    @staticmethod
    def _file_name(job: _Job, instance: StoredInstance) -> str:
        """Never the image's own UID, whoever may see the patient: names of files are seen by more."""
        return f"{job.pseudonyms.uid(instance.sop_instance_uid)}.dcm"

    # --- asking

    def _asked(
        self,
        request: Mapping[str, Any],
        read: Callable[[Answer], Value],
        *,
        timeout_s: float,
        heartbeat: Heartbeat = _still,
    ) -> Value:
        """POST /single_inference, and what `read` makes of the answer; observed as what it came to."""
        client = self._open()
        try:
            headers = {"Authorization": self._authorization()}  # with the call, because /ping goes without
        except ConfigError as exc:  # a file being exchanged must not cost a job
            raise EngineUnavailable(f"engine {self.name}: {exc}") from exc
        self._heard.outcome, self._heard.seconds = "dropped", 0.0
        try:
            answer = client.call(
                "POST",
                "/single_inference",
                idempotent=True,
                json=request,
                headers=headers,
                expect=answers.READ,
                heartbeat=heartbeat,
                timeout_s=timeout_s,
            )
            try:
                told = read(answer)
            except EngineError as exc:
                self._heard.outcome = _outcome(exc)
                raise
            self._trouble = ""
            return told
        finally:
            if self._observer is not None:
                self._observer(self.name, self._heard.outcome, self._heard.seconds)

    def _hear(self, engine: str, outcome: str, seconds: float) -> None:
        self._heard.outcome, self._heard.seconds = outcome, seconds

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What makes it unavailable is its trouble until it answers well again, see `_asked`."""
        try:
            yield
        except EngineCrashed:
            raise  # of this image, not of every one
        except EngineUnavailable as exc:
            self._trouble = str(exc)
            raise

    def _open(self) -> HttpClient:
        """Raises ConfigError for authorities that cannot be read, EngineUnavailable when closed."""
        with self._guard:
            if self._closed:
                raise EngineUnavailable(f"engine {self.name}: it is closed")
            if self._client is None:
                self._client = HttpClient(self.name, self._options, observer=self._hear, clock=self._clock)
            return self._client

    def _node_secret(self) -> bytes:
        with self._guard:
            if not self._secret:
                self._secret = secrets.token_bytes(32) if self._data_dir is None else node_secret(self._data_dir)
            return self._secret

    # --- what it said

    def _findings(self, told: Mapping[str, answers.Prediction], refusals: Sequence[str]) -> tuple[Findings, ...]:
        counts = {refusal: refusals.count(refusal) for refusal in dict.fromkeys(refusals)}
        notes = tuple(f"{count} other image(s) of the series not analysed: {why}" for why, count in counts.items())
        thresholds = self._options.thresholds
        return tuple(answers.findings_of(prediction, uid, thresholds, notes) for uid, prediction in told.items())

    def _provenance(self, versions: set[str]) -> Provenance:
        """Raises EngineUnavailable when the engine was exchanged while it worked: the series is asked again."""
        if len(versions) != 1:
            raise EngineUnavailable(f"engine {self.name}: its version changed between two images of one series")
        (version,) = versions
        settings = {"thresholds": dict(self._options.thresholds), "views": self._options.views}
        config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        device = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(["leapai-cxr", self._options.base_url, version, config]))
        return Provenance(
            name="leapai-cxr",
            version=version,
            manufacturer="LeapAI",
            device_uid=f"2.25.{device.int}",
            weights_sha256="",  # the engine's own business
            config_sha256=config,
            parameters=(f"interface={_INTERFACE}", f"pseudonymised={'yes' if self._hide else 'no'}"),
            notice=self._options.notice,
        )


def _value(value: Any) -> list[Any]:
    """As `anatomy` takes it: a single item stands for a sequence of one."""
    return [value if isinstance(value, str | list | tuple) else [value]] if value else []


def _outcome(exc: EngineError) -> str:
    """One of `metrics.REQUEST_OUTCOMES`, as `HttpClient` tells them."""
    if isinstance(exc, EngineUnavailable):
        return "unavailable"
    return "rejected" if isinstance(exc, EngineRejected) else "error"
