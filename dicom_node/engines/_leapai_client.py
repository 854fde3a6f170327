"""LeapAI CXR over HTTP: its token, its requests, and how it stands."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dicom_node.breaker import BreakerState
from dicom_node.engines import _leapai_answers as answers
from dicom_node.engines._http import Answer, HttpClient, Observer
from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.errors import ConfigError, EngineCrashed, EngineError, EngineRejected, EngineUnavailable
from dicom_node.interfaces import Clock, Heartbeat

__all__ = ["LeapAiClient"]

log = logging.getLogger(__name__)

WARN_EVERY_S = 24 * 3600.0
_REPORT_S = 30.0

Value = TypeVar("Value")


def _still() -> None:
    """No heartbeat."""


class LeapAiClient:
    """Requests with the token, observed as what they came to. Thread-safe; construction does nothing."""

    def __init__(self, name: str, options: LeapAiOptions, clock: Clock) -> None:
        self._name = name
        self._options = options
        self._clock = clock
        self.host = urlsplit(options.base_url).hostname or ""
        self.observer: Observer | None = None
        self._guard = threading.Lock()
        self._client: HttpClient | None = None
        self._closed = False
        self._heard = threading.local()
        self._trouble = ""
        self._warned_s = float("-inf")

    # --- how it is

    @property
    def trouble(self) -> str:
        """See `interfaces.Engine`."""
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
        """`breaker_state`, and `token_expires_seconds` when the token says; warns of its end once a day."""
        client = self._client
        told = {"breaker_state": float((client.state if client else BreakerState.CLOSED).value)}
        with suppress(ConfigError):
            left_s = self._token_left_s()
            if left_s is not None:
                told["token_expires_seconds"] = left_s
                self._warn(left_s)
        return told

    def check(self) -> None:
        """Raises ConfigError when there is no token or the authorities cannot be read."""
        self._authorization()
        self._open()

    def ping(self) -> None:
        """Without the token: /ping needs none. A client of its own asks even while the engine rests."""
        client = HttpClient(self._name, self._options.model_copy(update={"retries": 0}), clock=self._clock)
        try:
            status = client.call("GET", "/ping", idempotent=True, timeout_s=_REPORT_S).json()
        finally:
            client.close()
        if not isinstance(status, Mapping) or status.get("status") != "ok":
            raise EngineError(f"engine {self._name}: its answer to /ping is not that of LeapAI CXR")

    def probe(self) -> None:
        """Try the token, with a request that has no image, which the engine must refuse for that."""

        def read(answer: Answer) -> None:
            answers.token_accepted(self._name, answer.status, answer.body)

        with self.remembering():
            self.ask("/single_inference", {}, read, timeout_s=_REPORT_S)

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

    def token_told(self) -> str:
        """When the token ends, for people. Raises ConfigError."""
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
        log.warning("an engine's token expires soon", extra={"engine": self._name, "days": round(left_s / 86400, 1)})

    # --- asking

    def ask(
        self,
        path: str,
        request: Mapping[str, Any],
        read: Callable[[Answer], Value],
        *,
        timeout_s: float,
        heartbeat: Heartbeat = _still,
        idempotent: bool = True,
    ) -> Value:
        """POST `request`, and what `read` makes of the answer. Raises as `HttpClient.call` and `read` do."""
        client = self._open()
        try:
            headers = {"Authorization": self._authorization()}  # with the call, because /ping goes without
        except ConfigError as exc:  # a file being exchanged must not cost a job
            raise EngineUnavailable(f"engine {self._name}: {exc}") from exc
        self._heard.outcome, self._heard.seconds = "dropped", 0.0
        try:
            answer = client.call(
                "POST",
                path,
                idempotent=idempotent,
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
            if self.observer is not None:
                self.observer(self._name, self._heard.outcome, self._heard.seconds)

    def _hear(self, engine: str, outcome: str, seconds: float) -> None:
        self._heard.outcome, self._heard.seconds = outcome, seconds

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """What makes it unavailable is its trouble until it answers well again, see `ask`."""
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
                raise EngineUnavailable(f"engine {self._name}: it is closed")
            if self._client is None:
                self._client = HttpClient(self._name, self._options, observer=self._hear, clock=self._clock)
            return self._client

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._guard:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _outcome(exc: EngineError) -> str:
    """One of `metrics.REQUEST_OUTCOMES`, as `HttpClient` tells them."""
    if isinstance(exc, EngineUnavailable):
        return "unavailable"
    return "rejected" if isinstance(exc, EngineRejected) else "error"
