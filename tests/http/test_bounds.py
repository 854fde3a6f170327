"""What a request may be, who may keep the server waiting, and what every answer carries."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPConnection

import pytest

from dicom_node.http import connections, health
from dicom_node.http.health import Check, HealthServer
from dicom_node.http.requests import HEAD_BYTES_MAX, HEADERS_MAX, LINE_BYTES_MAX, BadRequest, judge
from dicom_node.http.responses import Response, encoded

Start = Callable[..., HealthServer]
HOST = b"Host: localhost\r\n"


@pytest.fixture
def refused() -> list[str]:
    return []


@pytest.fixture
def start(refused: list[str]) -> Iterator[Start]:
    servers: list[HealthServer] = []

    def run(metrics: health.Page = lambda: ("text/plain", b"a 1\n")) -> HealthServer:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        checks = (lambda: Check(name="a", ok=True),)
        server = HealthServer(listener, checks=checks, metrics=metrics, refused=refused.append)
        server.start()
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.stop()


def _raw(server: HealthServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while fragment := connection.recv(4096):
            answer += fragment
        return answer


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET /ping HTTP/1.0\r\n\r\n", 200),
        (b"\r\nGET /ping HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET http://localhost:8080/ping HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET /ping HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /ping HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /ping HTTP/1.1\n" + HOST + b"\r\n", 400),  # half a line end
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X: a\rEvil: 1\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X: a\r\n folded\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n", 400),
        (b"GET  /ping HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET ping HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"G\xc3\x89T /ping HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /ping\x7f HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"POST /ping HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /ping HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST /ping HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /ping HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /ping HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n", 413),
        (b"GET /" + b"a" * LINE_BYTES_MAX + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X: a\r\n" * HEADERS_MAX + b"\r\n", 431),
        (b"GET /ping HTTP/1.1\r\n" + HOST + b"X: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n", 431),
        (b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"DELETE /metrics HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: rebound.example\r\n\r\n", 421),
        (b"GET /metrics HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", 200),
    ],
)
def test_each_request_gets_the_answer_it_deserves(start: Start, request_bytes: bytes, status: int) -> None:
    answer = _raw(start(), request_bytes)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_every_prefix_of_a_request_is_no_request_yet_and_raises_nothing() -> None:
    whole = b"GET /ping?a=1 HTTP/1.1\r\n" + HOST + b"Accept: */*\r\n\r\n"
    assert all(judge(whole[:length]) is None for length in range(len(whole)))
    request = judge(whole + b"body")
    assert request is not None and (request.path, request.headers["accept"]) == ("/ping", "*/*")


def test_a_refusal_repeats_nothing_that_was_sent() -> None:
    with pytest.raises(BadRequest) as caught:
        judge(b"GET /ping HTTP/1.1\r\nCanary\r\n\r\n")
    assert "Canary" not in caught.value.reason


def test_a_second_request_on_the_connection_is_not_answered(start: Start) -> None:
    one = b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n"
    answer = _raw(start(), one * 20)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("path", ["/ping", "/ready", "/metrics", "/nothing"])
def test_every_answer_is_not_kept_not_guessed_at_and_names_no_product(start: Start, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", start().port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    connection.close()
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Cache-Control") == "no-store"
    assert (answer.getheader("Content-Security-Policy") or "").startswith("default-src 'none'")
    assert answer.getheader("Server") is None and answer.getheader("Date")


def test_what_would_end_a_header_early_is_left_out_of_it() -> None:
    response = Response(
        status=HTTPStatus.OK, content_type="text/plain", body=b"", headers={"X-A": "1\r\nSet-Cookie: evil=1"}
    )
    head = encoded(response)
    assert b"\r\nSet-Cookie" not in head and b"X-A: 1Set-Cookie: evil=1\r\n" in head


def test_half_a_request_is_told_that_it_was_too_slow(
    start: Start, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    assert _raw(start(), b"GET /ping HTTP/1.1\r\nHost:").startswith(b"HTTP/1.1 408 ")
    assert refused == ["timeout"]


def test_a_connection_that_says_nothing_is_closed_without_a_word(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_BYTE_S", 0.2)
    assert _raw(start(), b"") == b""


@pytest.mark.parametrize("said", [b"", b"GET /ping HTTP/1.1\r\nX: "])
def test_with_500_connections_that_say_nothing_or_little_ping_answers_within_a_second(
    start: Start, begun_threads: Callable[[], list[str]], said: bytes
) -> None:
    server = start()
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(500)]
    try:
        for connection in idle:
            connection.settimeout(0.5)
            with contextlib.suppress(OSError):  # another of them took its place
                connection.sendall(said)
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert _raw(server, b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n").startswith(b"HTTP/1.1 200 ")
            took.append(time.monotonic() - began)
        assert min(took) < 1.0
        assert begun_threads() == ["http"]
    finally:
        for connection in idle:
            connection.close()


def test_one_address_cannot_hold_more_than_its_share(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WAITING_PER_ADDRESS_MAX", 4)
    server = start()
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(6)]
    try:
        for first in held[:2]:
            assert first.recv(1) == b""  # closed: the newer ones took their places
        held[-1].sendall(b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n")
        assert held[-1].recv(4096).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in held:
            connection.close()


def test_slow_pages_are_bounded_and_do_not_hold_up_ping(start: Start, refused: list[str]) -> None:
    go_on = threading.Event()

    def slow() -> tuple[str, bytes]:
        go_on.wait(20)
        return "text/plain", b"a 1\n"

    server = start(slow)
    asking = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(health.PAGES_MAX + 1)]
    try:
        for connection in held:
            connection.sendall(asking)
        first = _first_answered(held)
        assert first.recv(4096).startswith(b"HTTP/1.1 503 ") and refused == ["busy"]
        assert _raw(server, b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n").startswith(b"HTTP/1.1 200 ")
        go_on.set()
        others = [connection for connection in held if connection is not first]
        assert all(connection.recv(4096).startswith(b"HTTP/1.1 200 ") for connection in others)
    finally:
        go_on.set()
        for connection in held:
            connection.close()


def _first_answered(held: list[socket.socket]) -> socket.socket:
    import select

    (readable, *_), _, _ = select.select(held, [], [], 10)
    return readable
