"""A runtime process seen from its parent: who is blamed when it falls silent, and how long it may be."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from dicom_node.errors import EngineCrashed, EngineUnavailable
from dicom_node.models.runtime_link import Child, Limits
from dicom_node.models.wire import receive, send


@pytest.fixture
def silent() -> Iterator[tuple[Child, socket.socket, list[str]]]:
    """A child that says only what the test says for it; half a second of silence is too much."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as process, theirs:
        child = Child(process, ours, "cpu", Limits(hang_s=0.5, start_s=0.5), ends.append)
        yield child, theirs, ends
        child.end("closed")


ONE = np.zeros(1, np.float32)


def drop(sock: socket.socket) -> None:
    received = receive(sock)
    assert received is not None
    for fd in received[1]:
        os.close(fd)


def test_silence_is_blamed_on_the_work_it_was_at_and_only_when_there_is_work(
    silent: tuple[Child, socket.socket, list[str]],
) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    assert not ends
    at_work, waiting = child.ask({"id": 1}, ONE), child.ask({"id": 2}, ONE)
    drop(theirs)
    drop(theirs)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 0.0})
    assert at_work.done.wait(10) and waiting.done.wait(10)
    assert isinstance(at_work.failure, EngineCrashed) and "no sign of life" in str(at_work.failure)
    assert isinstance(waiting.failure, EngineUnavailable) and not isinstance(waiting.failure, EngineCrashed)
    assert ends == ["hung"] and child.pid is None
    with pytest.raises(EngineUnavailable):
        child.ask({"id": 3}, ONE)


def test_one_that_nobody_asks_anything_may_be_silent(silent: tuple[Child, socket.socket, list[str]]) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    call = child.ask({"id": 1}, ONE)
    drop(theirs)
    send(theirs, {"id": 1, "kind": "engine", "error": "no"})
    assert call.done.wait(5)
    child._reader.join(1.2)  # more than twice what it may be silent at work
    assert child.alive and not ends


def test_one_whose_batches_are_slow_is_given_more_time(silent: tuple[Child, socket.socket, list[str]]) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    call = child.ask({"id": 1}, ONE)
    drop(theirs)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 30.0})
    assert not call.done.wait(1.2)
    assert child.pid is not None and psutil.pid_exists(child.pid)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 0.0})
    assert call.done.wait(10) and ends == ["hung"]
