"""One try of a call to an engine: where it may go, what it carries there, what its answer means.

Requests go to the transport directly: httpx2's own client would keep cookies, heed the environment and log URLs.
Messages of errors hold method, host and status and never a path, a query, a header or a body.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn, TypeVar

import httpx2

from dicom_node.breaker import Breaker
from dicom_node.engines._bodies import Body
from dicom_node.engines._wire import Fault, PinnedTransport, Watch, WireFault
from dicom_node.engines.secrets import Secret
from dicom_node.errors import EngineCrashed, EngineError, EngineRejected, EngineTimeout, EngineUnavailable

__all__ = ["Call", "Consume", "Exchange", "Failed", "Header", "Hop", "Resting", "Scope", "parsed"]

log = logging.getLogger(__name__)

MAX_REDIRECTS = 5
MAX_URL = 16 * 1024
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# RFC 9110 15.5, 15.6 and RFC 6585: what waiting, a valid credential or a paid quota may mend
LATER = frozenset({401, 402, 403, 407, 408, 421, 425, 429, 502, 503, 504, 507, 509, 529})
AGAIN = frozenset({429, 502, 503, 504})
UNFIT = frozenset({400, 406, 411, 413, 414, 415, 422})  # this very request will never do
SICK = frozenset({502, 503, 504})  # for the circuit breaker
ACROSS = frozenset({"accept", "range"})  # of the caller's headers, all that another host gets to see

Header = Secret | Callable[[], str]
Value = TypeVar("Value")


class Resting(EngineUnavailable):
    """The circuit breaker is open: nothing was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a caller wants. Header names are in lower case."""

    method: str
    url: httpx2.URL
    body: Body
    headers: Mapping[str, str]
    expect: Collection[int]
    idempotent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One request of a call. `own`: to the configured origin; `same`: no redirect has led to another origin yet."""

    url: httpx2.URL
    own: bool
    same: bool = True


Consume = Callable[[Call, Hop, httpx2.Response], Value]
"""Reads an expected answer, through `Exchange.pieces`."""


class Failed(Exception):
    """One try failed with `error`; `again` if that kind of failure may be tried again, `after_s` as the engine asks."""

    def __init__(self, error: EngineError, *, again: bool = False, after_s: float | None = None) -> None:
        super().__init__()
        self.error = error
        self.again = again
        self.after_s = after_s


class Scope:
    """Where calls may lead: the configured origin, the hosts that are allowed by name, any public https address."""

    def __init__(self, base_url: str, allow_hosts: Collection[str]) -> None:
        self._base = parsed(base_url)
        self._allowed = frozenset(allow_hosts)

    def owns(self, url: httpx2.URL) -> bool:
        """Whether it is at the configured origin (scheme, host and port)."""
        return _origin(url) == _origin(self._base)

    def trusts(self, host: str, port: int) -> bool:
        """Whether that place may be at any address, a private one too."""
        name = f"[{host.lower()}]" if ":" in host else host.lower()
        own = (host.lower(), port) == _origin(self._base)[1:]
        return own or name in self._allowed or f"{name}:{port}" in self._allowed

    def permits(self, url: httpx2.URL) -> bool:
        """Whether it may be asked at all; of what is not trusted, the address is checked when it is connected to."""
        scheme, host, port = _origin(url)
        if scheme not in ("http", "https") or not host or url.userinfo or len(str(url)) > MAX_URL:
            return False
        return self.owns(url) or scheme == "https" or self.trusts(host, port)


class Exchange:
    """Sends the requests of one engine's calls and judges the answers. Thread-safe."""

    def __init__(
        self,
        engine: str,
        scope: Scope,
        transport: PinnedTransport,
        breaker: Breaker,
        secrets: Mapping[str, Header],
        wall: Callable[[], datetime],
    ) -> None:
        self._engine = engine
        self._scope = scope
        self._transport = transport
        self._breaker = breaker
        self._secrets = dict(secrets)
        self._wall = wall

    def attempt(self, call: Call, watch: Watch, consume: Consume[Value]) -> Value:
        """Ask once, following redirects of a GET. Raises Failed, and whatever secrets, body or heartbeat raise."""
        hop = Hop(url=call.url, own=self._scope.owns(call.url))
        for _ in range(MAX_REDIRECTS + 1):
            value = self._hop(call, hop, watch, consume)
            if not isinstance(value, Hop):
                return value
            hop = value
        raise Failed(self.error(EngineError, call, hop, f"more than {MAX_REDIRECTS} redirects"))

    def _hop(self, call: Call, hop: Hop, watch: Watch, consume: Consume[Value]) -> Value | Hop:
        headers = self._headers(call, hop)
        if hop.own and not self._breaker.admits():
            raise Failed(self.error(Resting, call, hop, "is not asked for now: it rests after failures in a row"))
        judged = self._breaker.dropped
        began = watch.now()
        status = None
        try:
            with self._transport.watched(watch):
                request = httpx2.Request(call.method, hop.url, headers=headers, stream=_Outgoing(call.body))
                response = self._transport.handle_request(request)
                status = response.status_code
                judged = self._verdict(status)
                try:
                    value = self._judge(call, hop, response, consume)
                finally:
                    response.close()
        except WireFault as exc:
            judged = self._breaker.dropped if exc.fault is Fault.FORBIDDEN else self._breaker.failed
            raise self._wire_failure(call, hop, exc, status) from exc
        except EngineError as exc:  # the heartbeat's: nobody waits any more for the answer to what was sent
            exc.maybe_taken = exc.maybe_taken or watch.sent
            raise
        finally:
            if hop.own:
                judged()
        fields = {"engine": self._engine, "method": call.method, "host": hop.url.host, "status": status}
        log.debug("an engine answered", extra=fields | {"seconds": round(watch.now() - began, 3)})
        return value

    def _headers(self, call: Call, hop: Hop) -> list[tuple[str, str]]:
        headers = {"host": hop.url.netloc.decode("ascii"), "user-agent": "dicom-node", "accept": "*/*"}
        headers["accept-encoding"] = "identity"  # sizes and checksums are of what is on the wire
        headers |= {key: value for key, value in call.headers.items() if hop.same or key in ACROSS}
        if call.body.length or call.method in ("POST", "PUT", "PATCH"):
            headers["content-length"] = str(call.body.length)
        if call.body.content_type is not None:
            headers["content-type"] = call.body.content_type
        if hop.own and hop.same:
            for key, secret in self._secrets.items():
                headers[key.lower()] = secret.reveal() if isinstance(secret, Secret) else secret()
        return list(headers.items())

    # --- what is answered

    def pieces(self, call: Call, hop: Hop, response: httpx2.Response, most: int) -> Iterator[bytes]:
        """The body as it arrives, never more than `most` bytes. Raises Failed."""
        status = response.status_code
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise Failed(self.error(EngineError, call, hop, "answered in an encoding nobody asked for", status))
        declared = response.headers.get("content-length", "")
        too_long = declared.isdigit() and call.method != "HEAD" and int(declared[:20]) > most
        received = 0
        assert isinstance(response.stream, Iterable)
        for piece in () if too_long else response.stream:
            received += len(piece)
            too_long = received > most
            if too_long:
                break
            yield piece
        if too_long:
            raise Failed(self.error(EngineError, call, hop, f"answered with more than {most} bytes", status))

    def _judge(self, call: Call, hop: Hop, response: httpx2.Response, consume: Consume[Value]) -> Value | Hop:
        status = response.status_code
        if status in call.expect:
            return consume(call, hop, response)
        location = response.headers.get("location")
        if status in REDIRECTS and call.method == "GET" and location:
            return self._next(call, hop, location)
        kind: type[EngineError] = EngineError
        if status in LATER:
            kind = EngineUnavailable
        elif status in UNFIT:
            kind = EngineRejected
        elif status == 500:
            kind = EngineCrashed
        error = self.error(kind, call, hop, f"answered with status {status}", status)
        raise Failed(error, again=status in AGAIN, after_s=self._retry_after_s(response.headers.get("retry-after")))

    def _verdict(self, status: int) -> Callable[[], None]:
        """What an answer says of the engine: an overloaded one is not sick, any other answer is a sign of life."""
        if status in SICK:
            return self._breaker.failed
        return self._breaker.dropped if status == 429 else self._breaker.succeeded

    def _next(self, call: Call, hop: Hop, location: str) -> Hop:
        try:
            url = hop.url.join(location)
        except (httpx2.InvalidURL, ValueError):
            raise Failed(self.error(EngineError, call, hop, "redirects to no URL")) from None
        if not self._scope.permits(url):
            raise Failed(self.forbidden(call, url))
        return Hop(url=url, own=self._scope.owns(url), same=hop.same and _origin(url) == _origin(hop.url))

    def _retry_after_s(self, value: str | None) -> float | None:
        """RFC 9110 10.2.3: seconds or a date; None when absent or unreadable."""
        if value is None:
            return None
        value = value.strip()
        if value.isascii() and value.isdigit():
            return float(value[:12])
        try:
            then = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return max((then - self._wall()).total_seconds(), 0.0)

    # --- errors

    def _wire_failure(self, call: Call, hop: Hop, exc: WireFault, status: int | None) -> Failed:
        kind: type[EngineError] = EngineUnavailable
        if exc.fault in (Fault.SILENT, Fault.OUT_OF_TIME):
            kind = EngineTimeout
        elif exc.fault in (Fault.FORBIDDEN, Fault.PROTOCOL):
            kind = EngineError
        error = self.error(kind, call, hop, exc.fault.value, status)
        error.maybe_taken = exc.sent
        return Failed(error, again=exc.fault in (Fault.CONNECT, Fault.BROKEN))

    def forbidden(self, call: Call, url: httpx2.URL) -> EngineError:
        """The error for a URL that may not be asked."""
        where = f"{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"
        what = f"a URL that is neither https nor at a host of options.allow_hosts is not asked ({where})"
        return self.error(EngineError, call, Hop(url=url, own=False), what)

    def error(self, kind: type[EngineError], call: Call, hop: Hop, what: str, status: int | None = None) -> EngineError:
        """An error that names engine, method and host, and knows the status."""
        error = kind(f"engine {self._engine}: {call.method} {hop.url.host}: {what}")
        error.http_status = status
        error.maybe_taken = status is not None and (200 <= status < 300 or status == 408 or status >= 500)
        return error


class _Outgoing(httpx2.SyncByteStream):
    def __init__(self, body: Body) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return self._body.pieces()


def parsed(text: str) -> httpx2.URL:
    """An http or https URL with a host. Raises EngineError without repeating it."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, TypeError):
        _no_url()
    if url.scheme not in ("http", "https") or not url.host:
        _no_url()
    return url


def _no_url() -> NoReturn:
    raise EngineError("an engine handed out something that is no http or https URL")


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    # of an international name the ASCII form, which is what is looked up
    return url.scheme, url.raw_host.decode("ascii").lower(), url.port or (443 if url.scheme == "https" else 80)
