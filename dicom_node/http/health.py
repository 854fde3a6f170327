"""`GET /ping`, `/ready` and `/metrics` on a small HTTP/1.1 server that a stranger cannot exhaust.

* `/ping` answers `{"status":"ok"}` while the process lives; it asks nobody.
* `/ready` runs the given checks and answers 200, or 503 with the ones that fail.
* `/metrics` answers what the given function renders.
* Below a prefix of `mounts`, what is mounted there answers, of any length; by default there is nothing.

One request a connection, GET and HEAD only but for mounts; no body is read. The head of a request is bounded in bytes
and in time, the number of connections served at once too; one beyond it is closed unanswered. The server knows no part
of the node: it takes plain callables and a socket that is already bound.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from dicom_node.errors import NodeError

__all__ = ["Check", "HealthServer", "Mount", "MountedAnswer", "ReadyCheck"]

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 8192
HEAD_S = 5.0
SEND_S = 30.0
LINGER_S = 0.5
CONNECTIONS_MAX = 16
SLOWEST_BYTES_S = 16 * 1024  # a mounted answer that its client takes more slowly is ended


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Response:
    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str]


def _json(status: HTTPStatus, value: object, **headers: str) -> _Response:
    body = json.dumps(value).encode() + b"\n"
    return _Response(status=status, content_type="application/json", body=body, headers=headers)


class HealthServer:
    """Serves health and metrics on `listener` from `start` until `stop`."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        checks: Sequence[ReadyCheck],
        metrics: Page,
        mounts: Mapping[str, Mount] | None = None,
    ) -> None:
        self._mounts = dict(mounts or {})
        self._listener = listener
        self._checks = tuple(checks)
        self._metrics = metrics
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port really bound."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer."""
        self._listener.settimeout(0.5)
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting; requests under way end within their own bounds. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if not self._stopping.wait(0.1):  # out of descriptors: they come back
                    continue
                break
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="http-request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                head = _read_head(connection)
                if head is None:
                    return
                if (mount := self._mounted(head)) is not None:
                    _pass_on(connection, mount, head)
                else:
                    response, with_body = self._answer(head)
                    connection.settimeout(SEND_S)
                    connection.sendall(_encoded(response, with_body))
                _linger(connection)
        except OSError:
            pass  # the client went away; there is nobody to tell
        finally:
            self._free.release()

    def _mounted(self, head: bytes) -> Mount | None:
        target = _request(head)[1]
        return next((mount for prefix, mount in self._mounts.items() if target.startswith(prefix)), None)

    def _answer(self, head: bytes) -> tuple[_Response, bool]:
        method, target = _request(head)
        if not method:
            return _json(HTTPStatus.BAD_REQUEST, {"error": "not an HTTP/1 request"}), True
        if method not in ("GET", "HEAD"):
            return _json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "GET or HEAD"}, Allow="GET, HEAD"), True
        return self._page(target.split("?", 1)[0]), method == "GET"

    def _page(self, path: str) -> _Response:
        if path == "/ping":
            return _json(HTTPStatus.OK, {"status": "ok"})
        if path == "/ready":
            checks = [_ran(check) for check in self._checks]
            ok = all(check.ok for check in checks)
            listed = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
            status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
            return _json(status, {"status": "ready" if ok else "not ready", "checks": listed})
        if path == "/metrics":
            try:
                content_type, body = self._metrics()
            except NodeError as exc:
                log.warning("metrics could not be rendered", extra={"error": str(exc)})
                return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(exc)})
            return _Response(status=HTTPStatus.OK, content_type=content_type, body=body, headers={})
        return _json(HTTPStatus.NOT_FOUND, {"error": "/ping, /ready or /metrics"})


def _request(head: bytes) -> tuple[str, str]:
    """Method and target of the request line, two empty texts when it is none of HTTP/1."""
    parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        return "", ""
    return parts[0], parts[1]


def _headers(head: bytes) -> dict[str, str]:
    """Headers by lower-case name; of one that is repeated, all values (RFC 9110 5.3)."""
    found: dict[str, str] = {}
    for line in head.split(b"\r\n\r\n", 1)[0].split(b"\r\n")[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if colon and name and not name.startswith((" ", "\t")):
            key = name.lower()
            found[key] = f"{found[key]}, {value.strip()}" if key in found else value.strip()
    return found


def _pass_on(connection: socket.socket, mount: Mount, head: bytes) -> None:
    """Let the mount answer, piece by piece, as long as the client takes it at a bearable speed."""
    method, target = _request(head)
    connection.settimeout(SEND_S)
    try:
        answer = mount(method, target, _headers(head))
    except (NodeError, OSError) as exc:
        log.warning("a mounted answer failed", extra={"error": type(exc).__name__})
        connection.sendall(_encoded(_json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "try again"}), method != "HEAD"))
        return
    try:
        connection.sendall(_head_of(answer.status, answer.headers))
        started, sent = time.monotonic(), 0
        for piece in answer if method != "HEAD" else ():
            connection.sendall(piece)
            sent += len(piece)
            if time.monotonic() - started > SEND_S + sent / SLOWEST_BYTES_S:
                break
    finally:
        answer.close()


def _head_of(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    """Status line and headers of an answer that nobody may keep, on a connection that ends with it."""
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Connection: close",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(f"{key}: {value}" for key, value in headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _ran(check: ReadyCheck) -> Check:
    try:
        return check()
    except (NodeError, OSError) as exc:
        detail = str(exc) if isinstance(exc, NodeError) else exc.strerror or type(exc).__name__
        return Check(name=getattr(check, "__name__", "check").strip("_"), ok=False, detail=detail)


def _read_head(connection: socket.socket) -> bytes | None:
    """The request line and headers, or None when they did not come whole within their bounds.

    The deadline is for the head as a whole: a byte now and then does not extend it.
    """
    deadline = time.monotonic() + HEAD_S
    head = b""
    while b"\r\n\r\n" not in head:
        left = deadline - time.monotonic()
        if left <= 0 or len(head) > HEAD_BYTES_MAX:
            return None
        connection.settimeout(left)
        fragment = connection.recv(4096)
        if not fragment:
            return None
        head += fragment
    return head


def _linger(connection: socket.socket) -> None:
    """Let the answer arrive: closing with unread bytes (a body nobody asked for) would reset the connection."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(LINGER_S)
    for _ in range(16):
        if not connection.recv(4096):
            return


def _encoded(response: _Response, with_body: bool) -> bytes:
    headers = {
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        **response.headers,
    }
    return _head_of(response.status, headers) + (response.body if with_body else b"")
