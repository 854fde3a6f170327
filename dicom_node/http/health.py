"""`GET /ping`, `/ready` and `/metrics` on a small HTTP/1.1 server that a stranger cannot exhaust.

* `/ping` answers `{"status":"ok"}` while the process lives; it asks nobody, and needs no token.
* `/ready` runs the given checks and answers 200, or 503 with the ones that fail.
* `/metrics` answers what the given function renders.
* Below a prefix of `mounts`, what is mounted there answers, of any length, by its own rule of who may ask; by default
  there is nothing.

One request a connection, GET and HEAD only but for mounts; no body is read. `requests` bounds what a request may be,
`connections` who may keep the server waiting, `token` says who may ask. The server knows no part of the node: it takes
plain callables and a socket that is already bound.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol
from urllib.parse import urlsplit

from dicom_node.config import is_loopback
from dicom_node.errors import NodeError
from dicom_node.http.connections import THREADS_MAX, Connections, Slow
from dicom_node.http.requests import Request
from dicom_node.http.responses import Response, encoded, head_of, json_response, refusal
from dicom_node.http.token import Doorman

__all__ = ["Check", "HealthServer", "Mount", "MountedAnswer", "Page", "ReadyCheck"]

log = logging.getLogger(__name__)

SEND_S = 30.0
SLOWEST_BYTES_S = 16 * 1024  # a mounted answer that its client takes more slowly is ended
PAGES_MAX = 4  # of /ready and /metrics at once: each reads the catalog
MOUNTED_MAX = THREADS_MAX - PAGES_MAX  # engines that fetch much keep nobody from seeing how the node is


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How one readiness check ended; `detail` says what is wrong and never carries patient data."""

    name: str
    ok: bool
    detail: str = ""


ReadyCheck = Callable[[], Check]
Page = Callable[[], tuple[str, bytes]]  # content type, body


class MountedAnswer(Protocol):
    """What a mount answers; `headers` tell the Content-Length. Iterated at most once, closed in any case."""

    status: HTTPStatus
    headers: Mapping[str, str]

    def __iter__(self) -> Iterator[bytes]:
        """The body, in pieces."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


Mount = Callable[[str, str, Mapping[str, str]], MountedAnswer]
"""Any method, target as it came, headers by lower-case name. Raises nothing but NodeError and OSError.

It is not given the body of a request: what comes is thrown away, as a hint that says nothing the path does not say.
"""


class HealthServer:
    """Serves `/ping`, and what else it is given, on `listener` from `start` until `stop`.

    `checks` and `metrics`: None where another server answers them. `doorman`: who may ask for these two. Without a
    token, `any_host` False: a Host header must name this machine, so that no page of a browser here gets at them by a
    name that resolves to it. `refused` is told why a request was not served, one of
    `metrics.HTTP_REFUSALS`.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        checks: Sequence[ReadyCheck] | None = None,
        metrics: Page | None = None,
        mounts: Mapping[str, Mount] | None = None,
        doorman: Doorman | None = None,
        any_host: bool = False,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._listener = listener
        self._mounts = dict(mounts or {})
        self._doorman = doorman or Doorman(None)
        self._any_host = any_host
        self._refused = refused
        self._pages: dict[str, Callable[[], Response]] = {}
        if checks is not None:
            ready = tuple(checks)
            self._pages["/ready"] = lambda: _ready(ready)
        if metrics is not None:
            page = metrics
            self._pages["/metrics"] = lambda: _metrics(page)
        self._rendering = threading.BoundedSemaphore(PAGES_MAX)
        self._passing_on = threading.BoundedSemaphore(MOUNTED_MAX)
        self._connections = Connections(listener, self._answer, refused)

    @property
    def port(self) -> int:
        """The port really bound."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer."""
        self._connections.start()

    def stop(self) -> None:
        """Stop accepting; requests under way end within their own bounds. Idempotent."""
        self._connections.stop()

    def _answer(self, request: Request, address: str) -> Response | Slow:
        for prefix, mount in self._mounts.items():
            if request.target.startswith(prefix):
                return lambda connection: self._pass_on(connection, mount, request)
        page = self._pages.get(request.path)
        if page is None and request.path != "/ping":
            return refusal(HTTPStatus.NOT_FOUND, "/ping" if not self._pages else "/ping, /ready or /metrics")
        if page is not None and (refused := self._refusal(request, address)) is not None:
            return refused
        if request.method not in ("GET", "HEAD"):
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD", Allow="GET, HEAD")
        if page is None:
            return json_response(HTTPStatus.OK, {"status": "ok"})
        shown = page
        return lambda connection: self._render(connection, shown, request.method != "HEAD")

    def _refusal(self, request: Request, address: str) -> Response | None:
        """Why this request does not get at /ready and /metrics, None when it does."""
        told = request.headers.get("authorization")
        if not self._doorman.lets_in(told, address):
            self._refused("no_token" if told is None else "token")
            challenge = 'Bearer realm="dicom-node"' + ("" if told is None else ', error="invalid_token"')
            return refusal(HTTPStatus.UNAUTHORIZED, "a bearer token is needed", WWW_Authenticate=challenge)
        if not (self._doorman.asks or self._any_host or _names_this_machine(request.headers.get("host", ""))):
            self._refused("host")
            return refusal(HTTPStatus.MISDIRECTED_REQUEST, "ask 127.0.0.1 or localhost, or set a token")
        return None

    def _render(self, connection: socket.socket, page: Callable[[], Response], with_body: bool) -> None:
        connection.settimeout(SEND_S)
        if not self._rendering.acquire(blocking=False):
            self._refused("busy")
            busy = refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once", Retry_After="2")
            connection.sendall(encoded(busy, with_body=with_body))
            return
        try:
            response = page()
        finally:
            self._rendering.release()
        connection.sendall(encoded(response, with_body=with_body))

    def _pass_on(self, connection: socket.socket, mount: Mount, request: Request) -> None:
        if not self._passing_on.acquire(blocking=False):
            self._refused("busy")
            connection.settimeout(SEND_S)
            busy = refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once", Retry_After="2")
            connection.sendall(encoded(busy, with_body=request.method != "HEAD"))
            return
        try:
            _pass_on(connection, mount, request)
        finally:
            self._passing_on.release()


def _names_this_machine(host: str) -> bool:
    """Whether a Host header says localhost or an address: names of others may lead here too (DNS rebinding)."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if not name or is_loopback(name):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# --- pages -----------------------------------------------------------------------------------------------------------


def _ready(ready: Sequence[ReadyCheck]) -> Response:
    checks = [_ran(check) for check in ready]
    ok = all(check.ok for check in checks)
    listed = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
    status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
    return json_response(status, {"status": "ready" if ok else "not ready", "checks": listed})


def _ran(check: ReadyCheck) -> Check:
    try:
        return check()
    except (NodeError, OSError) as exc:
        detail = str(exc) if isinstance(exc, NodeError) else exc.strerror or type(exc).__name__
        return Check(name=getattr(check, "__name__", "check").strip("_"), ok=False, detail=detail)


def _metrics(page: Page) -> Response:
    try:
        content_type, body = page()
    except NodeError as exc:
        log.warning("metrics could not be rendered", extra={"error": str(exc)})
        return refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(exc))
    return Response(status=HTTPStatus.OK, content_type=content_type, body=body)


# --- mounts ----------------------------------------------------------------------------------------------------------


def _pass_on(connection: socket.socket, mount: Mount, request: Request) -> None:
    """Let the mount answer, piece by piece, as long as the client takes it at a bearable speed."""
    connection.settimeout(SEND_S)
    try:
        answer = mount(request.method, request.target, request.headers)
    except (NodeError, OSError) as exc:
        log.warning("a mounted answer failed", extra={"error": type(exc).__name__})
        failed = refusal(HTTPStatus.SERVICE_UNAVAILABLE, "try again")
        connection.sendall(encoded(failed, with_body=request.method != "HEAD"))
        return
    try:
        connection.sendall(head_of(answer.status, answer.headers))
        started, sent = time.monotonic(), 0
        for piece in answer if request.method != "HEAD" else ():
            connection.sendall(piece)
            sent += len(piece)
            if time.monotonic() - started > SEND_S + sent / SLOWEST_BYTES_S:
                break
    finally:
        answer.close()
