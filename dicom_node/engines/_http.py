"""HTTP to external engines: every rule that all of them need, in one place.

A call is bounded in time and size, paced, counted and watched by a circuit breaker; it is repeated only when the caller
says that repeating is harmless; redirects and URLs handed out by an engine are followed only where they may lead. What
goes wrong is raised as one of the engine errors. Here is the client and when it tries again; `_exchange` makes one try,
`_wire` is the sockets, `_bodies` what is sent, `_downloads` what is received into files.
"""

from __future__ import annotations

import json as json_codec
import logging
import random
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from dicom_node.breaker import Breaker, BreakerState
from dicom_node.clock import SystemClock
from dicom_node.engines._bodies import Body, Content, Part, body_of
from dicom_node.engines._downloads import Checksum, Downloaded, WrongChecksum, crc32c_base64, save
from dicom_node.engines._exchange import Call, Consume, Exchange, Failed, Header, Hop, Resting, Scope, parsed
from dicom_node.engines._limits import Pace, Slots
from dicom_node.engines._settings import HttpSettings, Options, parse_options
from dicom_node.engines._wire import PinnedTransport, Resolve, Route, Watch, WireFault, look_up, straight
from dicom_node.errors import ConfigError, EngineError, EngineRejected, EngineTimeout, EngineUnavailable
from dicom_node.interfaces import Clock, Heartbeat

__all__ = [
    "Answer",
    "Checksum",
    "Content",
    "Downloaded",
    "HttpClient",
    "HttpSettings",
    "Options",
    "Part",
    "WrongChecksum",
    "crc32c_base64",
    "parse_options",
]

log = logging.getLogger(__name__)

FRAMING = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})
NO_TURN = "no turn within the time of the call"

Observer = Callable[[str, str, float], None]
Params = Mapping[str, str | Sequence[str]]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine answered, with a status the caller expected. `headers` are looked up in any case."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON, whatever its type says. Raises EngineError."""
        try:
            return json_codec.loads(self.body)
        except (ValueError, RecursionError):
            error = EngineError(f"an answer of {len(self.body)} bytes with status {self.status} is no JSON")
            error.http_status, error.maybe_taken = self.status, True
            raise error from None  # the cause quotes the body


def _still() -> None:
    """No heartbeat."""


class HttpClient:
    """Calls one engine. Thread-safe; construction connects nowhere.

    `secrets`: header name to a `Secret`, or to a function that yields the value of the moment (an OAuth token); they go
    to the configured origin and nowhere else. `observer(engine, outcome, seconds)` hears of every call once, outcome
    being ok, rejected, unavailable, timeout, error, resting (the circuit breaker let nothing through) or dropped (the
    heartbeat or the node itself ended it). `state`, `held` and `waiting` are for gauges. Limits are of this process.
    Raises ConfigError for authorities that cannot be read.
    """

    def __init__(
        self,
        name: str,
        settings: HttpSettings,
        secrets: Mapping[str, Header] | None = None,
        observer: Observer | None = None,
        *,
        clock: Clock | None = None,
        resolve: Resolve = look_up,
        route: Route = straight,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`resolve` looks names up and `route` may lead a checked address elsewhere: both for tests."""
        self.name = name
        self.settings = settings
        self._observer = observer
        self._clock = clock or SystemClock()
        self._jitter = jitter
        self._scope = Scope(settings.base_url, settings.allow_hosts)
        self._breaker = Breaker(
            failures=settings.breaker_failures, rest_s=settings.breaker_rest_s, now=lambda: self._clock.boot().seconds
        )
        self._pace = Pace(settings.calls_per_s)
        self._slots = Slots(settings.concurrency)
        self._transport = PinnedTransport(
            _tls(settings),
            trusts=self._scope.trusts,
            timeouts_s=(settings.connect_timeout_s, settings.read_timeout_s, settings.write_timeout_s),
            connections=settings.concurrency,
            resolve=resolve,
            route=route,
        )
        self._exchange = Exchange(
            name, self._scope, self._transport, self._breaker, secrets or {}, lambda: self._clock.wall()
        )

    @property
    def state(self) -> BreakerState:
        """Of the circuit breaker."""
        return self._breaker.state

    @property
    def held(self) -> int:
        """Calls under way."""
        return self._slots.held

    @property
    def waiting(self) -> int:
        """Calls that wait for one of the `concurrency` places."""
        return self._slots.waiting

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._transport.close()

    def call(
        self,
        method: str,
        path_or_url: str,
        *,
        idempotent: bool,
        params: Params | None = None,
        json: Any = None,
        files: Sequence[Part] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        expect: Collection[int] = (200,),
        heartbeat: Heartbeat = _still,
        timeout_s: float | None = None,
    ) -> Answer:
        """Ask and return the answer, held in memory.

        `path_or_url`: a path that starts with "/", appended to `base_url`; or a URL the engine handed out, which gets
        no secrets unless it is at the configured origin. At most one of `json`, `files` (multipart/form-data) and
        `content` is sent. `idempotent`: doing it twice does no harm, so that it may be tried again. `timeout_s` bounds
        all of it, instead of `total_timeout_s`. `heartbeat` is called at least twice a second, but for the time the
        system takes for one access to the disk.

        Raises EngineUnavailable (cannot be reached, refuses the credentials, is overloaded, rests), EngineTimeout,
        EngineCrashed (status 500), EngineRejected (400, 413, 415, 422 ...), EngineError (any other status that is not
        in `expect`, a forbidden URL, an answer beyond `max_response_bytes`), ConfigError (a secret is missing),
        StorageError (what is sent cannot be read) and whatever `heartbeat` raises.
        """
        body = body_of(json_value=json, parts=files, content=content)
        asked = self._asked(method, path_or_url, params, headers, body, expect, idempotent)
        return self._perform(asked, self._held_in_memory, heartbeat, timeout_s)

    def call_into(
        self,
        method: str,
        path_or_url: str,
        target: Path,
        *,
        idempotent: bool,
        params: Params | None = None,
        json: Any = None,
        files: Sequence[Part] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        expect: Collection[int] = (200,),
        heartbeat: Heartbeat = _still,
        timeout_s: float | None = None,
        max_bytes: int | None = None,
        checksum: Checksum | None = None,
    ) -> Downloaded:
        """As `call`, the answer written to `target`: durable when this returns, else not there.

        `max_bytes` instead of `max_download_bytes`. Raises as `call` does, WrongChecksum (an EngineError, after retries
        if `idempotent`), and StorageError when `target` cannot be written.
        """
        body = body_of(json_value=json, parts=files, content=content)
        asked = self._asked(method, path_or_url, params, headers, body, expect, idempotent)
        most = self.settings.max_download_bytes if max_bytes is None else max_bytes

        def write(call: Call, hop: Hop, response: httpx2.Response) -> Downloaded:
            pieces = self._exchange.pieces(call, hop, response, most)
            try:
                saved = save(pieces, target, checksum=checksum)
            except WrongChecksum as exc:
                error = self._exchange.error(WrongChecksum, call, hop, str(exc), response.status_code)
                raise Failed(error, again=True) from exc
            return replace(saved, status=response.status_code, headers=response.headers)

        return self._perform(asked, write, heartbeat, timeout_s)

    def download(
        self,
        path_or_url: str,
        target: Path,
        *,
        heartbeat: Heartbeat = _still,
        max_bytes: int | None = None,
        checksum: Checksum | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Downloaded:
        """GET it into `target`, as `call_into`; a download that broke off begins anew."""
        return self.call_into(
            "GET",
            path_or_url,
            target,
            idempotent=True,
            headers=headers,
            heartbeat=heartbeat,
            timeout_s=timeout_s,
            max_bytes=max_bytes,
            checksum=checksum,
        )

    # --- how

    def _asked(
        self,
        method: str,
        path_or_url: str,
        params: Params | None,
        headers: Mapping[str, str] | None,
        body: Body,
        expect: Collection[int],
        idempotent: bool,
    ) -> Call:
        url = parsed(self.settings.base_url + path_or_url if path_or_url.startswith("/") else path_or_url)
        if params:
            url = url.copy_merge_params(params)
        headers = {key.lower(): value for key, value in (headers or {}).items()}
        if FRAMING & headers.keys() or any(not (text.isascii() and text.isprintable()) for text in headers.values()):
            raise ValueError(f"a header's value is printable ASCII, and none of {', '.join(sorted(FRAMING))} is set")
        call = Call(method=method.upper(), url=url, body=body, headers=headers, expect=expect, idempotent=idempotent)
        if not self._scope.permits(url):
            raise self._exchange.forbidden(call, url)
        return call

    def _held_in_memory(self, call: Call, hop: Hop, response: httpx2.Response) -> Answer:
        body = b"".join(self._exchange.pieces(call, hop, response, self.settings.max_response_bytes))
        return Answer(status=response.status_code, headers=response.headers, body=body)

    def _perform(self, call: Call, consume: Consume[Value], heartbeat: Heartbeat, timeout_s: float | None) -> Value:
        watch = Watch(self._clock, self.settings.total_timeout_s if timeout_s is None else timeout_s, heartbeat)
        began = watch.now()
        outcome = "dropped"
        try:
            with self._in_time(call, watch), self._slots.one(watch.tick):
                value = self._tries(call, watch, consume)
            outcome = "ok"
            return value
        except EngineError as exc:
            outcome = _outcome(exc)
            raise
        finally:
            if self._observer is not None:
                self._observer(self.name, outcome, watch.now() - began)

    @contextmanager
    def _in_time(self, call: Call, watch: Watch) -> Iterator[None]:
        """The deadline passed while nothing was being sent: others were before this call, or it waited to retry."""
        try:
            with watch.faults():
                yield
        except WireFault as exc:
            raise self._exchange.error(EngineUnavailable, call, self._first(call), NO_TURN) from exc

    def _first(self, call: Call) -> Hop:
        return Hop(url=call.url, own=self._scope.owns(call.url))

    def _tries(self, call: Call, watch: Watch, consume: Consume[Value]) -> Value:
        for attempt in count(1):
            turn_s = self._pace.turn_in_s(watch.now(), watch.left_s())
            if turn_s is None:
                raise self._exchange.error(EngineUnavailable, call, self._first(call), NO_TURN)
            watch.wait(turn_s)
            try:
                return self._exchange.attempt(call, watch, consume)
            except Failed as failed:
                delay_s = self._delay_s(attempt, failed)
                if not self._may_try_again(call, attempt, failed, delay_s, watch):
                    raise failed.error from failed.__cause__
            watch.wait(delay_s)
        raise AssertionError("unreachable")

    def _may_try_again(self, call: Call, attempt: int, failed: Failed, delay_s: float, watch: Watch) -> bool:
        again = (
            call.idempotent
            and failed.again
            and attempt <= self.settings.retries
            and call.body.can_be_sent
            and delay_s < watch.left_s()
            and (failed.after_s is None or failed.after_s <= self.settings.retry_after_max_s)
        )
        fields = {"engine": self.name, "method": call.method, "host": call.url.host, "attempt": attempt}
        fields |= {"status": failed.error.http_status, "error": type(failed.error).__name__}
        if again:
            log.info("an engine is called again", extra=fields | {"delay_s": round(delay_s, 2)})
        else:
            log.warning("a call of an engine failed", extra=fields)
        return again

    def _delay_s(self, attempt: int, failed: Failed) -> float:
        doubled = self.settings.backoff_s * 2.0 ** min(attempt - 1, 30)
        spread = min(doubled, self.settings.backoff_max_s) * (0.75 + 0.5 * self._jitter())
        return max(spread, failed.after_s or 0.0)


def _outcome(exc: EngineError) -> str:
    table = ((Resting, "resting"), (EngineUnavailable, "unavailable"), (EngineTimeout, "timeout"))
    return next((word for kind, word in (*table, (EngineRejected, "rejected")) if isinstance(exc, kind)), "error")


def _tls(settings: HttpSettings) -> ssl.SSLContext:
    if settings.verify is True:
        return httpx2.create_ssl_context(trust_env=False)
    path = settings.verify
    try:
        folder = path.is_dir()
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"verify: {path} is no readable file or folder of certificates (PEM)") from exc
