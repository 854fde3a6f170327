"""Access tokens for engines behind OAuth 2.0 (RFC 6749 4.4, 6): asked for once, used until they end.

A token server counts what it hands out, so a token is shared by all threads, used until shortly before its end, and
asked for anew at most once a minute when the engine refuses one before. Tokens are held in memory only. How to use it:

    tokens = Tokens(name, options.auth, verify=options.verify)
    http = HttpClient(name, options, {"authorization": tokens.header})
    answer = tokens.authorized(lambda: http.call("GET", "/jobs", idempotent=True), heartbeat=heartbeat)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlencode, urlsplit

from pydantic import AfterValidator, Field, model_validator

from dicom_node.clock import SystemClock
from dicom_node.engines._http import HttpClient, HttpSettings, Observer, Options
from dicom_node.engines.secrets import Secret
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable
from dicom_node.interfaces import Clock, Heartbeat

__all__ = ["OAuthSettings", "Tokens"]

CALL_S = 30.0
UNTOLD_LIFE_S = 3600.0  # of a token whose answer does not say how long it lives
LONGEST_LIFE_S = 30 * 86400.0
SPARE_S, SPARE = 120.0, 0.1  # a token is not used for its last two minutes, or its last tenth if that is less
NOT_SOONER_S = 60.0  # between a new token and the next, when the engine refuses the first
REST_S = 10.0  # after a token could not be had
MAX_TOKEN = 16_384
MAX_ANSWER_BYTES = 256 * 1024
_SLICE_S = 0.25

Value = TypeVar("Value")


def _token_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError("expected https://host/path") from None
    if not host or "@" in parts.netloc or parts.query or parts.fragment or not port_ok or not value.isascii():
        raise ValueError("expected https://host/path, without user, password, query or fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in ("localhost", "127.0.0.1", "::1")):
        raise ValueError("expected https: the client secret goes there (http on this machine only)")
    return value


class OAuthSettings(Options):
    """Where tokens are to be had and for whom; with `refresh_token` that is traded, else the client's own secret."""

    token_url: Annotated[str, AfterValidator(_token_url)]
    client_id: Annotated[str, Field(min_length=1, max_length=512)]
    client_secret: Secret | None = None
    refresh_token: Secret | None = None
    """One that the token server does not exchange for another with each use."""
    audience: Annotated[str, Field(max_length=512)] = ""
    scope: Annotated[str, Field(max_length=1024)] = ""
    body: Literal["json", "form"] = "json"
    """How the request is written; RFC 6749 has forms, Auth0 documents JSON and takes both."""

    @model_validator(mode="after")
    def _some_credential(self) -> OAuthSettings:
        if self.client_secret is None and self.refresh_token is None:
            raise ValueError("client_secret (or refresh_token) is missing; write env:NAME or file:/absolute/path")
        return self


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    got_s: float  # on the boot clock, as `ends_s`
    ends_s: float

    def good(self, now_s: float) -> bool:
        return now_s < self.ends_s - min(SPARE_S, SPARE * (self.ends_s - self.got_s))


class Tokens:
    """The tokens of one engine. Thread-safe; construction asks nobody.

    Every failure to get one is EngineUnavailable, wrong credentials too: they are mended by a person, and no job is at
    fault. `observer` as in `HttpClient`.
    """

    def __init__(
        self,
        engine: str,
        settings: OAuthSettings,
        *,
        verify: Literal[True] | Path = True,
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock or SystemClock()
        parts = urlsplit(settings.token_url)
        self.host = parts.hostname or ""
        self._path = parts.path or "/"
        reach = HttpSettings(
            base_url=f"{parts.scheme}://{parts.netloc}",
            verify=verify,
            retries=2,
            total_timeout_s=CALL_S,
            read_timeout_s=CALL_S,
            max_response_bytes=MAX_ANSWER_BYTES,
            concurrency=1,
        )
        self._http = HttpClient(engine, reach, observer=observer, clock=clock)
        self._asking = threading.Lock()
        self._token: _Token | None = None
        self._refused = ""
        self._failure: tuple[float, str] | None = None

    def __repr__(self) -> str:
        return f"Tokens({self._engine}, {self.host})"

    @property
    def left_s(self) -> float | None:
        """How long the token at hand is good for, negative when that is over; None when there is none."""
        token = self._token
        return None if token is None else token.ends_s - self._now()

    def check(self) -> None:
        """Whether the credentials are there. Asks nobody. Raises ConfigError."""
        for secret in (self._settings.client_secret, self._settings.refresh_token):
            if secret is not None:
                secret.reveal()

    def header(self) -> str:
        """The value of Authorization for now. Raises EngineUnavailable."""
        return f"Bearer {self._current(lambda: None).value}"

    def ready(self, heartbeat: Heartbeat = lambda: None) -> None:
        """Have a good token. Raises as `header`, and what `heartbeat` raises."""
        self._current(heartbeat)

    def authorized(self, ask: Callable[[], Value], *, heartbeat: Heartbeat = lambda: None) -> Value:
        """What `ask` returns; asked once more, with a new token, when it was refused with status 401.

        `ask` makes one call with `header`. Raises what it raises, and as `ready`.
        """
        used = self._current(heartbeat).value
        try:
            return ask()
        except EngineError as exc:
            if exc.http_status != 401:
                raise
        self._forget(used)
        self._current(heartbeat)
        return ask()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._http.close()

    # --- one for all

    def _now(self) -> float:
        return self._clock.boot().seconds

    def _forget(self, used: str) -> None:
        """Do not use it again: the engine refused it. One that another thread got since is not touched."""
        with self._asking:
            if self._token is not None and self._token.value == used:
                self._refused = used

    def _current(self, heartbeat: Heartbeat) -> _Token:
        token = self._usable()
        if token is not None:
            return token
        while not self._asking.acquire(timeout=_SLICE_S):
            heartbeat()
        try:
            return self._usable() or self._new(heartbeat)
        finally:
            self._asking.release()

    def _usable(self) -> _Token | None:
        token = self._token
        return token if token is not None and token.good(self._now()) and token.value != self._refused else None

    def _new(self, heartbeat: Heartbeat) -> _Token:
        now_s = self._now()
        if self._failure is not None and now_s < self._failure[0]:
            raise EngineUnavailable(self._failure[1])
        token = self._token
        if token is not None and token.value == self._refused and now_s - token.got_s < NOT_SOONER_S:
            raise EngineUnavailable(
                f"engine {self._engine}: it refuses a token that {self.host} has just given: "
                "is `audience` right, and is the account allowed to use this engine?"
            )
        try:
            self._token = self._asked(heartbeat)
        except (EngineError, ConfigError) as exc:  # a secret that is just being exchanged must not cost a job
            why = _why(exc) if isinstance(exc, EngineError) else str(exc)
            message = f"engine {self._engine}: no access token from {self.host}: {why}"
            self._failure = (self._now() + REST_S, message)
            raise EngineUnavailable(message) from exc
        self._failure = None
        return self._token

    def _asked(self, heartbeat: Heartbeat) -> _Token:
        request = self._request()
        form = self._settings.body == "form"
        answer = self._http.call(
            "POST",
            self._path,
            idempotent=True,
            json=None if form else request,
            content=urlencode(request).encode() if form else None,
            headers={"content-type": "application/x-www-form-urlencoded"} if form else None,
            heartbeat=heartbeat,
            timeout_s=CALL_S,
        )
        return self._told(answer.body)

    def _request(self) -> dict[str, str]:
        wanted = self._settings
        request = {"client_id": wanted.client_id}
        if wanted.refresh_token is not None:
            request |= {"grant_type": "refresh_token", "refresh_token": wanted.refresh_token.reveal()}
        else:
            request |= {"grant_type": "client_credentials"}
        if wanted.client_secret is not None:
            request |= {"client_secret": wanted.client_secret.reveal()}
        request |= {key: value for key, value in (("audience", wanted.audience), ("scope", wanted.scope)) if value}
        return request

    def _told(self, body: bytes) -> _Token:
        """RFC 6749 5.1. Raises EngineError, which quotes nothing of it."""
        try:
            told: Any = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        told = told if isinstance(told, Mapping) else {}
        value, kind = told.get("access_token"), told.get("token_type", "Bearer")
        fit = isinstance(value, str) and 0 < len(value) <= MAX_TOKEN and value.isascii() and value.isprintable()
        if not fit or " " in value or not isinstance(kind, str) or kind.lower() != "bearer":
            raise EngineError("its answer holds no bearer token")
        life_s = told.get("expires_in", UNTOLD_LIFE_S)
        if isinstance(life_s, str) and life_s.isascii() and life_s.isdigit():  # as some servers write it
            life_s = int(life_s[:10])
        if isinstance(life_s, bool) or not isinstance(life_s, int | float) or not life_s > 0:
            raise EngineError("its answer holds a token without a usable time of life")
        now_s = self._now()
        return _Token(value, now_s, now_s + min(float(life_s), LONGEST_LIFE_S))


def _why(exc: EngineError) -> str:
    if exc.http_status in (400, 401, 403):
        return f"it refuses client_id and credentials (status {exc.http_status}); ask the vendor whether they are valid"
    return str(exc)
