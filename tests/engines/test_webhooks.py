"""Webhooks: an unguessable path for each job, a body that nobody reads, one answer."""

import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dicom_node.engines.webhooks import MAX_REMEMBERED, NOT_SOONER_S, PREFIX, Webhooks
from dicom_node.errors import CatalogBusy
from dicom_node.http.health import HealthServer

BASE = "https://node.example:8443"


@pytest.fixture
def woken() -> list[int]:
    return []


@pytest.fixture
def hooks(tmp_path: Path, moved_clock: Any, woken: list[int]) -> Webhooks:
    return Webhooks(tmp_path, moved_clock, base_url=BASE + "/", wake=woken.append)


@pytest.fixture
def port(hooks: Webhooks) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = HealthServer(listener, checks=(), metrics=lambda: ("text/plain", b""), mounts={Webhooks.prefix: hooks})
    server.start()
    yield server.port
    server.stop()


def asked(port: int, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, target, body=body, headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def path_of(url: str) -> str:
    return urlsplit(url).path


def test_an_engine_that_posts_to_the_url_of_a_job_wakes_that_job(hooks: Webhooks, port: int, woken: list[int]) -> None:
    url = hooks.url(17)
    assert re.fullmatch(re.escape(BASE + PREFIX) + r"17/[A-Za-z0-9_-]{43}", url)
    assert asked(port, "POST", path_of(url), b'{"success": false, "jobId": "other"}') == (204, b"")
    assert woken == [17]
    assert asked(port, "PUT", path_of(hooks.url(18))) == (204, b"")
    assert woken == [17, 18]


def test_a_large_body_is_not_read_and_does_no_harm(hooks: Webhooks, port: int, woken: list[int]) -> None:
    assert asked(port, "POST", path_of(hooks.url(17)), bytes(60_000))[0] == 204
    assert woken == [17]


def test_everything_else_is_404_and_wakes_nothing(hooks: Webhooks, port: int, woken: list[int]) -> None:
    good = path_of(hooks.url(17))
    token = good.rsplit("/", 1)[1]
    flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for target in (
        *(f"{PREFIX}18/{token}", f"{PREFIX}17/{flipped}", f"{PREFIX}17/", f"{PREFIX}17", PREFIX, f"{good}/"),
        *(f"{good}?x=1", f"{PREFIX}017/{token}", f"{PREFIX}-1/{token}", f"{PREFIX}17/../17/{token}"),
        *(f"{PREFIX}{'9' * 30}/{token}", f"{PREFIX}17/{'a' * 500}"),
    ):
        assert asked(port, "POST", target) == (404, b""), target
    for method in ("GET", "HEAD", "DELETE"):
        assert asked(port, method, good)[0] == 404
    assert woken == []


def test_the_url_is_the_same_after_a_restart_and_another_nodes_is_another(
    hooks: Webhooks, tmp_path: Path, moved_clock: Any
) -> None:
    again = Webhooks(tmp_path, moved_clock, base_url=BASE, wake=lambda job: None)
    assert again.url(17) == hooks.url(17)
    other = Webhooks(tmp_path / "other", moved_clock, base_url=BASE, wake=lambda job: None)
    assert other.url(17) != hooks.url(17)
    assert hooks.url(17).rsplit("/", 1)[1] != hooks.url(18).rsplit("/", 1)[1]


def test_a_flood_of_hints_wakes_a_job_once_in_a_while(hooks: Webhooks, moved_clock: Any, woken: list[int]) -> None:
    target = path_of(hooks.url(17))
    for _ in range(100):
        assert hooks("POST", target, {}).status == 204
    assert woken == [17]
    moved_clock.seconds += NOT_SOONER_S
    hooks("POST", target, {})
    assert woken == [17, 17]
    for job in range(1, MAX_REMEMBERED + 200):
        hooks("POST", path_of(hooks.url(job)), {})
    assert len(hooks._woken) == MAX_REMEMBERED


def test_a_catalog_that_cannot_be_had_is_told_as_come_again(tmp_path: Path, moved_clock: Any) -> None:
    def busy(job: int) -> None:
        raise CatalogBusy("the catalog is busy")

    hooks = Webhooks(tmp_path, moved_clock, base_url=BASE, wake=busy)
    listener = socket.create_server(("127.0.0.1", 0))
    server = HealthServer(listener, checks=(), metrics=lambda: ("text/plain", b""), mounts={PREFIX: hooks})
    server.start()
    try:
        assert asked(server.port, "POST", path_of(hooks.url(3)))[0] == 503
    finally:
        server.stop()


def test_no_url_without_a_base_and_none_for_a_run_by_hand(hooks: Webhooks, tmp_path: Path, moved_clock: Any) -> None:
    with pytest.raises(ValueError, match="base URL"):
        Webhooks(tmp_path, moved_clock, wake=lambda job: None).url(1)
    with pytest.raises(ValueError, match="job"):
        hooks.url(0)
