"""What the node's HTTP port answers to engines: images by signed URL, word that they are through, and for how long."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.handing_out import Shelving, for_engines, is_needed, mounts
from dicom_node.http.health import HealthServer

CLOCK = SystemClock()


def node(tmp_path: Path, url: str = "https://node.example", **engines: object) -> NodeConfig:
    return NodeConfig.model_validate({"data_dir": tmp_path, "http_public_url": url, "engines": engines})


@pytest.fixture
def woken() -> list[int]:
    return []


@pytest.fixture
def server(tmp_path: Path, woken: list[int]) -> Iterator[HealthServer]:
    config = node(tmp_path, relu={"kind": "relu"})
    listener = socket.create_server(("127.0.0.1", 0))
    running = HealthServer(
        listener, checks=(), metrics=lambda: ("text/plain", b""), mounts=mounts(config, CLOCK, woken.append)
    )
    running.start()
    yield running
    running.stop()


def ask(server: HealthServer, url: str, method: str = "GET") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, urlsplit(url).path, body=b"{}" if method == "POST" else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_nothing_is_answered_to_engines_where_none_comes(tmp_path: Path) -> None:
    assert not is_needed(node(tmp_path, one={"kind": "local", "model": "demo-ct-abdomen"}))
    assert not is_needed(node(tmp_path, "", one={"kind": "relu"}))
    assert mounts(node(tmp_path, "", one={"kind": "relu"}), CLOCK, lambda job: None) == {}
    assert for_engines(node(tmp_path, "", one={"kind": "relu"}), CLOCK) == {}
    assert is_needed(node(tmp_path, "", one={"kind": "aignostics", "options": {"public_url": "https://n.example"}}))


def test_what_an_engine_was_given_is_fetched_and_withdrawn(tmp_path: Path, server: HealthServer) -> None:
    shelf, signer = for_engines(node(tmp_path), CLOCK)["links"]
    name, _ = shelf.put("relu-7", ".zip", lambda file: file.write(b"images"))
    url = signer.url("relu-7", name, lifetime_s=600.0)
    assert url.startswith("https://node.example/handed-out/")
    assert ask(server, url) == (200, b"images")
    assert ask(server, url[:-1] + "q")[0] == 404
    shelf.revoke("relu-7")
    assert ask(server, url)[0] in (404, 410)


def test_word_of_a_job_wakes_it_and_nothing_else_does(tmp_path: Path, server: HealthServer, woken: list[int]) -> None:
    url = for_engines(node(tmp_path), CLOCK)["webhooks"].url(12)
    assert ask(server, url.replace("/12/", "/13/"), "POST")[0] == 404
    assert ask(server, url)[0] == 404 and woken == []
    assert ask(server, url, "POST") == (204, b"") and woken == [12]


def test_what_a_dead_engine_left_on_the_shelf_is_taken_back(tmp_path: Path) -> None:
    config = node(tmp_path)
    shelf, _ = for_engines(config, CLOCK)["links"]
    names = ("relu-7", "relu-8", "aignostics-abc", "aignostics-def", "relu-9")
    for name in names:
        shelf.put(name, ".zip", lambda file: file.write(b"x"))
    for name in names[:-1]:
        long_ago = time.time() - 7200
        os.utime(tmp_path / "handed_out" / name, (long_ago, long_ago))
    wanted = Shelving(config, CLOCK, lambda: (frozenset({7}), "step: submitted\ntoken: abc"))
    assert wanted.sweep() == 2
    assert shelf.jobs() == ["aignostics-abc", "relu-7", "relu-9"]  # 9 is new: its note may be on its way
    assert wanted.sweep() == 0
