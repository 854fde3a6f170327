"""What is mounted on the health server: passed on with its headers, piece by piece, and always closed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection

import pytest

from dicom_node.errors import StorageError
from dicom_node.http import health
from dicom_node.http.health import HealthServer, Mount


@dataclass
class Answer:
    """A mounted answer that knows whether it was closed."""

    pieces: tuple[bytes, ...] = (b"one", b"two")
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Length": "6", "X-Mine": "yes"})
    closed: threading.Event = field(default_factory=threading.Event)

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def mounted() -> Iterator[Callable[[Mount], HealthServer]]:
    servers: list[HealthServer] = []

    def start(mount: Mount) -> HealthServer:
        listener = socket.create_server(("127.0.0.1", 0))
        server = HealthServer(listener, checks=(), metrics=lambda: ("text/plain", b"m\n"), mounts={"/here/": mount})
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def _ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_a_mount_gets_method_target_and_headers_and_its_answer_is_passed_on(
    mounted: Callable[[Mount], HealthServer],
) -> None:
    seen: list[tuple[str, str, Mapping[str, str]]] = []
    answer = Answer()

    def mount(method: str, target: str, headers: Mapping[str, str]) -> Answer:
        seen.append((method, target, headers))
        return answer

    server = mounted(mount)
    status, headers, body = _ask(server, "/here/x?y=1", Range="bytes=0-1")
    assert (status, body, headers["x-mine"]) == (200, b"onetwo", "yes")
    assert headers["connection"] == "close" and headers["x-content-type-options"] == "nosniff"
    ((method, target, told),) = seen
    assert (method, target, told["range"]) == ("GET", "/here/x?y=1", "bytes=0-1")
    assert answer.closed.wait(5)


def test_head_has_no_body_and_closes_the_answer(mounted: Callable[[Mount], HealthServer]) -> None:
    answer = Answer()
    status, headers, body = _ask(mounted(lambda *_: answer), "/here/x", "HEAD")
    assert (status, headers["content-length"], body) == (200, "6", b"")
    assert answer.closed.wait(5)


def test_other_paths_are_answered_as_before(mounted: Callable[[Mount], HealthServer]) -> None:
    def never(*_: object) -> Answer:
        raise AssertionError("asked")

    server = mounted(never)
    assert _ask(server, "/ping")[2] == b'{"status": "ok"}\n'
    assert _ask(server, "/here")[0] == 404
    assert _ask(server, "/ping", "POST")[0] == 405 and _ask(server, "/here", "POST")[0] == 404


def test_engines_that_fetch_much_leave_room_for_whoever_looks_how_the_node_is(
    mounted: Callable[[Mount], HealthServer],
) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    class Held(Answer):
        def __iter__(self) -> Iterator[bytes]:
            begun.release()
            go_on.wait(20)
            yield from self.pieces

    server = mounted(lambda *_: Held())
    fetching = [threading.Thread(target=_ask, args=(server, "/here/x")) for _ in range(health.MOUNTED_MAX)]
    for thread in fetching:
        thread.start()
    try:
        assert all(begun.acquire(timeout=10) for _ in fetching)
        status, headers, _ = _ask(server, "/here/x")
        assert (status, headers["retry-after"]) == (503, "2")
        assert _ask(server, "/ready")[0] == _ask(server, "/metrics")[0] == 200
    finally:
        go_on.set()
        for thread in fetching:
            thread.join(10)
    assert _ask(server, "/here/x")[0] == 200


def test_what_is_posted_to_a_mount_reaches_it_without_its_body(mounted: Callable[[Mount], HealthServer]) -> None:
    seen: list[str] = []

    def mount(method: str, *_: object) -> Answer:
        seen.append(method)
        return Answer()

    server = mounted(mount)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /here/x HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n" + b"x" * 40_000)
        answered = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answered.startswith(b"HTTP/1.1 200 ") and answered.endswith(b"onetwo") and seen == ["POST"]


def test_a_mount_that_fails_is_told_without_its_reason(mounted: Callable[[Mount], HealthServer]) -> None:
    def broken(*_: object) -> Answer:
        raise StorageError("the secret place cannot be read")

    status, _, body = _ask(mounted(broken), "/here/x")
    assert status == 503 and b"secret" not in body


def test_a_client_that_goes_away_or_dawdles_ends_the_answer(
    mounted: Callable[[Mount], HealthServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SEND_S", 0.3)
    answer = Answer(pieces=(bytes(1024**2),) * 64, headers={"Content-Length": str(64 * 1024**2)})
    server = mounted(lambda *_: answer)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /here/x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(16).startswith(b"HTTP/1.1 200")
        assert answer.closed.wait(10)  # the client reads nothing more


def test_a_client_that_takes_a_byte_now_and_then_is_left(
    mounted: Callable[[Mount], HealthServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SEND_S", 0.2)
    monkeypatch.setattr(health, "SLOWEST_BYTES_S", 10_000_000)
    taken = 0
    held = threading.Event()

    class Slow(Answer):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal taken
            for _ in range(1000):
                held.wait(0.02)
                taken += 1
                yield b"x"

    answer = Slow()
    server = mounted(lambda *_: answer)
    assert _raw(server).startswith(b"HTTP/1.1 200")
    assert answer.closed.wait(10)
    assert taken < 500


def _raw(server: HealthServer) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /here/x HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while fragment := connection.recv(4096):
            answer += fragment
        return answer
