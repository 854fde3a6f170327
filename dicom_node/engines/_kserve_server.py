"""A server of the Open Inference Protocol (KServe v2): is it ready, what does it have, what does it say of a tensor.

GET /v2, /v2/health/ready, /v2/models/M[/versions/V][/ready], POST .../infer. An inference changes nothing over there,
so that repeating one does no harm. What the server says of a failure, {"error": "..."}, is passed on as one short line
of its own words.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dicom_node.breaker import BreakerState
from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._http import Answer, HttpClient
from dicom_node.engines._kserve_recipe import KServeOptions
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
)
from dicom_node.interfaces import Heartbeat

__all__ = ["Described", "Server", "TensorInfo", "one_line"]

BINARY, CONFIGURATION = "binary_tensor_data", "model_configuration"  # extensions of Triton's
PROBE_S = 30.0
_READ = (200, 400, 404, 422, 500, 501)  # whose bodies say why
_SAID = 240  # characters of a server's own words that are passed on

Observer = Callable[[str, str, float], None]
Value = TypeVar("Value")


class TensorInfo(BaseModel):
    """An input or output as the server tells it; -1 in `shape` is any length."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = Field(max_length=256)
    datatype: str = Field(max_length=16)
    shape: tuple[int, ...] = Field(max_length=wire.MAX_RANK)

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.name!r} {self.datatype} [{', '.join(map(str, self.shape))}]"


class _ServerInfo(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = ""
    version: str = ""
    extensions: tuple[str, ...] = ()


class _Configuration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    max_batch_size: int = 0


class _ModelInfo(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorInfo, ...] = Field(default=(), max_length=1024)
    outputs: tuple[TensorInfo, ...] = Field(default=(), max_length=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A server and one model of it, as they tell it themselves. No `inputs` or `outputs`: it does not tell.

    `most_batch`: the largest batch it takes, 0 where it does not tell.
    """

    server: str
    binary: bool
    platform: str
    versions: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    most_batch: int = 0


class Server:
    """One model of one server. Thread-safe; construction connects nowhere."""

    def __init__(self, name: str, model: str, options: KServeOptions) -> None:
        self.name = name
        self.host = urlsplit(options.base_url).hostname or ""
        self._model = model
        self._options = options
        secrets = {"authorization": self._authorization} if options.token or options.authorization else {}
        self._http = HttpClient(name, options, secrets, self._hear)
        self._path = f"/v2/models/{quote(model, safe='')}"
        if options.version:
            self._path += f"/versions/{quote(options.version, safe='')}"
        self._observer: Observer | None = None
        self._heard = threading.local()

    # --- how it is

    @property
    def state(self) -> BreakerState:
        """Of the circuit breaker."""
        return self._http.state

    def observe(self, observer: Observer) -> None:
        """Tell `observer(engine, outcome, seconds)` of every request, by what it came to."""
        self._observer = observer

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def check(self) -> None:
        """Whether its credentials can be had. Asks nobody. Raises ConfigError."""
        self._authorization()

    @property
    def credentials(self) -> str:
        """What it is asked with, for people."""
        options = self._options
        if options.token is not None:
            return f"bearer token from {options.token}"
        return "none" if options.authorization is None else f"Authorization from {options.authorization}"

    def _authorization(self) -> str:
        options = self._options
        if options.token is not None:
            return f"Bearer {options.token.reveal()}"
        return "" if options.authorization is None else options.authorization.reveal()

    # --- what it has

    def described(self, beat: Heartbeat, timeout_s: float) -> Described:
        """The server and the model, both being ready. Raises EngineUnavailable when they are not, and as `infer`."""
        self._require_ready("/v2/health/ready", "the server is not ready", beat, timeout_s)
        self._require_ready(
            f"{self._path}/ready", f"{self._called} is not ready, or the server has none", beat, timeout_s
        )
        server = self._told("/v2", _ServerInfo, beat, timeout_s)
        model = self._told(self._path, _ModelInfo, beat, timeout_s)
        config = _Configuration()
        if CONFIGURATION in server.extensions:
            config = self._told(f"{self._path}/config", _Configuration, beat, timeout_s)
        how = self._options.tensors
        return Described(
            server=one_line(f"{server.name} {server.version}") or "unnamed server",
            binary=BINARY in server.extensions if how == "auto" else how == "binary",
            platform=one_line(model.platform),
            versions=tuple(one_line(version) for version in model.versions[:16]),
            inputs=model.inputs,
            outputs=model.outputs,
            most_batch=config.max_batch_size,
        )

    @property
    def _called(self) -> str:
        version = f" version {self._options.version!r}" if self._options.version else ""
        return f"model {self._model!r}{version}"

    def _require_model(self, beat: Heartbeat, timeout_s: float) -> None:
        unready = f"{self._called} is not ready, or the server has none"
        self._require_ready(f"{self._path}/ready", unready, beat, timeout_s)

    def _require_ready(self, path: str, otherwise: str, beat: Heartbeat, timeout_s: float) -> None:
        def ready(answer: Answer) -> None:
            if answer.status == 200 and not _says_no(answer.body):
                return
            said = self._said(answer)
            text = f"engine {self.name}: {otherwise}" + (f" ({said})" if said else "")
            raise EngineUnavailable(text)

        self._asked("GET", path, ready, beat=beat, timeout_s=min(PROBE_S, timeout_s))

    def _told(self, path: str, kind: type[BaseModel], beat: Heartbeat, timeout_s: float) -> Any:
        def read(answer: Answer) -> Any:
            self._require_answer(answer)
            try:
                return kind.model_validate(answer.json())
            except ValidationError:
                raise EngineError(f"engine {self.name}: what it tells of itself is not of KServe v2") from None

        return self._asked("GET", path, read, beat=beat, timeout_s=min(PROBE_S, timeout_s))

    # --- what it says

    def infer(
        self, message: wire.Message, wanted: Mapping[str, wire.Wanted], beat: Heartbeat, timeout_s: float
    ) -> wire.Reply:
        """What the model makes of a message of `wire.request`.

        Raises EngineRejected (400, 422: the server refuses this very tensor), EngineCrashed (500), EngineUnavailable,
        EngineTimeout, `UnusableAnswer` with the answer as its `body`, and what `beat` raises.
        """

        def read(answer: Answer) -> wire.Reply:
            self._require_answer(answer)
            header = {key.lower(): value for key, value in answer.headers.items()}.get(wire.HEADER.lower(), "")
            try:
                return wire.answered(answer.body, header, wanted)
            except wire.UnusableAnswer as exc:
                exc.body = answer.body
                raise

        try:
            return self._asked(
                "POST",
                f"{self._path}/infer",
                read,
                beat=beat,
                timeout_s=min(self._options.request_timeout_s, timeout_s),
                content=(message.pieces, message.length),
                headers=message.headers,
            )
        except EngineRejected:  # some say so of a model that was taken away meanwhile
            self._require_model(beat, timeout_s)
            raise

    # --- asking

    def _asked(self, method: str, path: str, read: Callable[[Answer], Value], *, beat: Heartbeat, **how: Any) -> Value:
        self._heard.outcome, self._heard.seconds = "dropped", 0.0
        try:
            answer = self._http.call(method, path, idempotent=True, expect=_READ, heartbeat=beat, **how)
            try:
                return read(answer)
            except EngineError as exc:
                self._heard.outcome = _outcome(exc)
                raise
        except ConfigError as exc:  # a secret being exchanged must not cost a job
            raise EngineUnavailable(f"engine {self.name}: {exc}") from exc
        finally:
            if self._observer is not None:
                self._observer(self.name, self._heard.outcome, self._heard.seconds)

    def _hear(self, engine: str, outcome: str, seconds: float) -> None:
        self._heard.outcome, self._heard.seconds = outcome, seconds

    def _require_answer(self, answer: Answer) -> None:
        if answer.status == 200:
            return
        said = self._said(answer)
        text = f"engine {self.name}: {self.host} answered with status {answer.status}" + (f": {said}" if said else "")
        kinds = {400: EngineRejected, 422: EngineRejected, 404: EngineUnavailable, 500: EngineCrashed}
        error = kinds.get(answer.status, EngineError)(text)
        error.http_status = answer.status
        raise error

    def _said(self, answer: Answer) -> str:
        """The server's own words, without the credentials should it repeat them."""
        try:
            told = json.loads(answer.body[: 64 * 1024])
        except (ValueError, RecursionError):
            return ""
        text = told.get("error") if isinstance(told, Mapping) else None
        if not isinstance(text, str):
            return ""
        secret = self._authorization().removeprefix("Bearer ").strip()
        return one_line(text.replace(secret, "(credentials)") if secret else text)


def _says_no(body: bytes) -> bool:
    """Some servers answer 200 with {"ready": false} or {"live": false}."""
    try:
        told = json.loads(body[:4096] or b"{}")
    except (ValueError, RecursionError):
        return False
    return isinstance(told, Mapping) and told.get("ready") is False


def one_line(text: str) -> str:
    """A server's text as people and DICOM attributes take it: short, printable, without a backslash (PS3.5 6.2)."""
    letters = (letter if letter.isprintable() and letter != "\\" else " " for letter in text[: 4 * _SAID])
    return " ".join("".join(letters).split())[:_SAID]


def _outcome(exc: EngineError) -> str:
    """One of `metrics.REQUEST_OUTCOMES`, as `HttpClient` tells them."""
    table = ((EngineUnavailable, "unavailable"), (EngineTimeout, "timeout"), (EngineRejected, "rejected"))
    return next((word for kind, word in table if isinstance(exc, kind)), "error")
