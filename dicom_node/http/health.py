"""`GET /ping`, `/ready` and `/metrics` on a small HTTP/1.1 server that a stranger cannot exhaust.

* `/ping` answers `{"status":"ok"}` while the process lives; it asks nobody.
* `/ready` runs the given checks and answers 200, or 503 with the ones that fail.
* `/metrics` answers what the given function renders.

One request a connection, GET and HEAD only, no body. The head of a request is bounded in bytes and in time, the number
of connections served at once too; one beyond it is closed unanswered. The server knows no part of the node: it takes
plain callables and a socket that is already bound.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from dicom_node.errors import NodeError

__all__ = ["Check", "HealthServer", "ReadyCheck"]

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 8192
HEAD_S = 5.0
SEND_S = 30.0
LINGER_S = 0.5
CONNECTIONS_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How one readiness check ended; `detail` says what is wrong and never carries patient data."""

    name: str
    ok: bool
    detail: str = ""


ReadyCheck = Callable[[], Check]
Page = Callable[[], tuple[str, bytes]]  # content type, body


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

    def __init__(self, listener: socket.socket, *, checks: Sequence[ReadyCheck], metrics: Page) -> None:
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
                response, with_body = self._answer(head)
                connection.settimeout(SEND_S)
                connection.sendall(_encoded(response, with_body))
                _linger(connection)
        except OSError:
            pass  # the client went away; there is nobody to tell
        finally:
            self._free.release()

    def _answer(self, head: bytes) -> tuple[_Response, bool]:
        parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            return _json(HTTPStatus.BAD_REQUEST, {"error": "not an HTTP/1 request"}), True
        method, target, _ = parts
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
    lines = [
        f"HTTP/1.1 {response.status.value} {response.status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Connection: close",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(f"{key}: {value}" for key, value in response.headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (response.body if with_body else b"")
