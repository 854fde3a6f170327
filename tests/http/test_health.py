"""The health server on real sockets."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection

import pytest

from dicom_node.errors import StorageError
from dicom_node.http import connections, health
from dicom_node.http.health import Check, HealthServer, ReadyCheck

Start = Callable[..., HealthServer]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[HealthServer] = []

    def run(*checks: ReadyCheck, metrics: health.Page = lambda: ("text/plain", b"a 1\n")) -> HealthServer:
        server = HealthServer(socket.create_server(("127.0.0.1", 0)), checks=checks, metrics=metrics)
        server.start()
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.stop()


def _ask(server: HealthServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _raw(server: HealthServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while fragment := connection.recv(4096):
            answer += fragment
        return answer


def test_ping_asks_nobody(start: Start) -> None:
    def never() -> Check:
        raise AssertionError("asked")

    assert _ask(start(never), "/ping") == (200, b'{"status": "ok"}\n')


def test_ready_lists_every_check(start: Start) -> None:
    server = start(lambda: Check(name="scp", ok=True), lambda: Check(name="disk", ok=True, detail="7 GiB"))
    status, body = _ask(server, "/ready")
    assert status == 200
    assert json.loads(body) == {
        "status": "ready",
        "checks": [{"name": "scp", "ok": True, "detail": ""}, {"name": "disk", "ok": True, "detail": "7 GiB"}],
    }


def test_one_failing_check_makes_the_node_not_ready(start: Start) -> None:
    status, body = _ask(start(lambda: Check(name="a", ok=True), lambda: Check(name="b", ok=False)), "/ready")
    assert status == 503
    assert json.loads(body)["status"] == "not ready"


def test_a_check_that_raises_is_a_failed_check(start: Start) -> None:
    def catalog() -> Check:
        raise StorageError("the catalog cannot be written")

    status, body = _ask(start(catalog), "/ready")
    assert status == 503
    assert json.loads(body)["checks"] == [{"name": "catalog", "ok": False, "detail": "the catalog cannot be written"}]


def test_metrics_are_what_the_function_renders(start: Start) -> None:
    assert _ask(start(), "/metrics?x=1") == (200, b"a 1\n")


def test_metrics_that_cannot_be_rendered_are_503(start: Start) -> None:
    def broken() -> tuple[str, bytes]:
        raise StorageError("gone")

    assert _ask(start(metrics=broken), "/metrics")[0] == 503


def test_head_answers_without_a_body(start: Start) -> None:
    assert _ask(start(), "/ping", "HEAD") == (200, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE"])
def test_other_methods_are_refused(start: Start, method: str) -> None:
    assert _ask(start(), "/ping", method)[0] == 405


def test_an_unknown_path_is_not_found(start: Start) -> None:
    assert _ask(start(), "/pings")[0] == 404


def test_what_is_not_http_gets_400(start: Start) -> None:
    assert _raw(start(), b"\x01\x00\x00\x00 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_body_does_not_lose_the_answer(start: Start) -> None:
    request = b"POST /ping HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20000
    assert _raw(start(), request).startswith(b"HTTP/1.1 405 ")


def test_an_endless_head_is_cut_off(start: Start) -> None:
    server = start()
    address = ("127.0.0.1", server.port)
    with pytest.raises(OSError), socket.create_connection(address, timeout=10) as connection:
        for _ in range(20_000):  # reset or broken pipe, whichever comes first
            connection.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")
    assert _ask(server, "/ping")[0] == 200


def test_a_slow_head_is_cut_off_as_a_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    server = start()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.settimeout(0.05)
        for _ in range(100):
            try:
                connection.sendall(b"G")
                if connection.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < 3


def test_it_stops_and_leaves_the_port(start: Start) -> None:
    server = start()
    port = server.port
    server.stop()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_page_that_is_rendered_while_the_server_stops_leaves_no_connection_open(start: Start) -> None:
    rendering, go_on = threading.Event(), threading.Event()

    def slow() -> tuple[str, bytes]:
        rendering.set()
        go_on.wait(10)
        return "text/plain", b"a 1\n"

    server = start(metrics=slow)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert rendering.wait(10)
        server.stop()
        go_on.set()
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
        connection.sendall(b"more")  # what is closed resets; what is forgotten would take it
        with pytest.raises(OSError):
            for _ in range(500):
                connection.sendall(b"more")
                time.sleep(0.01)
    assert answer.endswith(b"a 1\n")
