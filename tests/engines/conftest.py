"""Fixtures for the engines: a server that answers as told, well or badly, over TCP and TLS; a clock that is moved."""

import hashlib
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dicom_node.model import BootTime

KEPT_BYTES = 4 * 1024**2
LONGEST_S = 30.0


@pytest.fixture(autouse=True)
def files_for_their_owner_only() -> Iterator[None]:
    """As the node's processes make them: a secret in a file that others can read is refused."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@dataclass(frozen=True, kw_only=True)
class Received:
    """One request as it arrived; `body` is kept up to 4 MiB, `length` and `sha256` are of all of it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    length: int
    sha256: str
    connection: tuple[str, int]


Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    owner: "MisbehavingServer"

    def handle_one_request(self) -> None:
        """Read a request, record it, do what is scripted for its method and path."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        owner = self.owner
        with owner.busy():
            owner.received.append(self._received())
            owner.next_reply(self.command, self.path.partition("?")[0])(self)
            with suppress(OSError):
                self.wfile.flush()

    def _received(self) -> Received:
        sha256, kept, left = hashlib.sha256(), bytearray(), int(self.headers.get("content-length", "0"))
        length = 0
        while left and (piece := self.rfile.read(min(left, 1 << 18))):
            sha256.update(piece)
            left, length = left - len(piece), length + len(piece)
            if len(kept) < KEPT_BYTES:
                kept += piece
        return Received(
            method=self.command,
            target=self.path,
            headers={key.lower(): value for key, value in self.headers.items()},
            body=bytes(kept),
            length=length,
            sha256=sha256.hexdigest(),
            connection=self.client_address,
        )

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


@dataclass
class MisbehavingServer:
    """Answers on a free port of 127.0.0.1 as `on` scripted it; what is not scripted is answered 404.

    `received` has every request in order; `most_at_once` is how many were being answered at the same time.
    """

    tls: ssl.SSLContext | None = None
    received: list[Received] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        """Listen; `__enter__` starts to answer."""
        self._scripts: dict[tuple[str, str], list[Reply]] = {}
        self._guard = threading.Lock()
        self._now = 0
        self.stopping = threading.Event()
        handler = type("BoundHandler", (Handler,), {"owner": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "MisbehavingServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def on(self, method: str, path: str, *replies: Reply) -> None:
        """Requests for that path (without query) get these replies in turn, the last one for ever."""
        self._scripts[(method, path)] = list(replies)

    def next_reply(self, method: str, path: str) -> Reply:
        """What comes next for that method and path."""
        with self._guard:
            script = self._scripts.get((method, path))
            if not script:
                return self.answer(404)
            return script.pop(0) if len(script) > 1 else script[0]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts a request while it is answered."""
        with self._guard:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._guard:
                self._now -= 1

    # --- replies

    @staticmethod
    def answer(
        status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None, *, after_s: float = 0.0
    ) -> Reply:
        """A whole answer with its length, after a while."""

        def reply(handler: Handler) -> None:
            time.sleep(after_s)
            handler.send_response(status)
            for key, value in (headers or {}).items():
                handler.send_header(key, value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(body)

        return reply

    @staticmethod
    def drop() -> Reply:
        """The request is read and the connection closed: the answer is lost."""

        def reply(handler: Handler) -> None:
            handler.close_connection = True

        return reply

    def silent(self) -> Reply:
        """No answer, the connection stays open until the test is over."""

        def reply(handler: Handler) -> None:
            self.stopping.wait(LONGEST_S)
            handler.close_connection = True

        return reply

    @staticmethod
    def partial(body: bytes, announced: int) -> Reply:
        """Less than was announced, then the end."""

        def reply(handler: Handler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(announced))
            handler.end_headers()
            handler.wfile.write(body)
            handler.close_connection = True

        return reply

    def drip(self, piece: bytes, times: int, pause_s: float) -> Reply:
        """A body that comes in pieces with pauses, its length announced."""

        def reply(handler: Handler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(piece) * times))
            handler.end_headers()
            for _ in range(times):
                if self.stopping.wait(pause_s):
                    break
                handler.wfile.write(piece)
                handler.wfile.flush()

        return reply

    @staticmethod
    def endless(piece: bytes, times: int) -> Reply:
        """A body without an announced length that ends with the connection."""

        def reply(handler: Handler) -> None:
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            for _ in range(times):
                handler.wfile.write(piece)
            handler.close_connection = True

        return reply

    @staticmethod
    def raw(data: bytes) -> Reply:
        """These bytes, then the end."""

        def reply(handler: Handler) -> None:
            handler.wfile.write(data)
            handler.close_connection = True

        return reply


@pytest.fixture
def start_server() -> Iterator[Callable[..., MisbehavingServer]]:
    """`start_server(tls=None)`: one more misbehaving server, stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda tls=None: stack.enter_context(MisbehavingServer(tls=tls))


@pytest.fixture
def server(start_server: Callable[..., MisbehavingServer]) -> MisbehavingServer:
    """A misbehaving server over plain TCP."""
    return start_server()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> tuple[Path, Path]:
    """A certificate that is its own authority, for 127.0.0.1 and files.example, and its key (PEM)."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=IP:127.0.0.1,DNS:files.example,DNS:engine.example"
    subprocess.run(
        [
            *(tool("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-addext", names),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls_server(start_server: Callable[..., MisbehavingServer], certificate: tuple[Path, Path]) -> MisbehavingServer:
    """A misbehaving server over TLS, with `certificate`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return start_server(context)


@dataclass
class MovedClock:
    """A clock that moves when it is told to or when somebody sleeps on it; `slept` has each sleep."""

    seconds: float = 1000.0
    at: datetime = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    slept: list[float] = field(default_factory=list)

    def boot(self) -> BootTime:
        """Now."""
        return BootTime(boot_id="test", seconds=self.seconds)

    def wall(self) -> datetime:
        """Now, UTC."""
        return self.at

    def sleep(self, seconds: float) -> None:
        """Move."""
        self.slept.append(seconds)
        self.move(seconds)

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds
        self.at += timedelta(seconds=seconds)


@pytest.fixture
def moved_clock() -> MovedClock:
    """A clock of the test's own."""
    return MovedClock()
