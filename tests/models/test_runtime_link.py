"""A runtime process seen from its parent: who is blamed when it falls silent, and how long it may be."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from dicom_node.errors import EngineCrashed, EngineUnavailable
from dicom_node.models import runtime_link
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


def test_one_that_works_on_what_nobody_wants_any_more_gets_no_more_time_than_usual(
    silent: tuple[Child, socket.socket, list[str]],
) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    unwanted, waiting = child.ask({"id": 1}, ONE), child.ask({"id": 2}, ONE)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 1e300})
    assert not waiting.done.wait(1.2)
    child.leave(unwanted)
    assert waiting.done.wait(3) and ends == ["hung"]
    assert isinstance(waiting.failure, EngineUnavailable) and not isinstance(waiting.failure, EngineCrashed)


def test_no_child_gets_all_the_time_it_asks_for(silent: tuple[Child, socket.socket, list[str]]) -> None:
    child, theirs, _ = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    call = child.ask({"id": 1}, ONE)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 1e300})
    assert call.done.wait(10) and isinstance(call.failure, EngineCrashed)


def test_a_machine_that_stood_still_is_no_hang(
    silent: tuple[Child, socket.socket, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    call = child.ask({"id": 1}, ONE)
    send(theirs, {"serving": [1], "stage": "forward", "patience": 3.0})

    class Later:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def monotonic(self) -> float:
            return time.monotonic() + 1000

    monkeypatch.setattr(runtime_link, "time", Later())
    assert not call.done.wait(1.5) and not ends
    send(theirs, {"id": 1, "kind": "engine", "error": "no"})
    assert call.done.wait(5) and call.failure is None


@pytest.mark.parametrize(
    "message",
    [{}, {"id": "x"}, {"id": 1e999}, {"serving": [[1]], "stage": "load", "patience": 1}, {"serving": 3}, {"id": []}],
)
def test_nonsense_ends_the_child_and_tells_who_waits(
    silent: tuple[Child, socket.socket, list[str]], message: dict[str, Any]
) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    serving, waiting = child.ask({"id": 1}, ONE), child.ask({"id": 2}, ONE)
    send(theirs, {"serving": [1], "stage": "load", "patience": 1})
    send(theirs, message)
    assert serving.done.wait(5) and isinstance(serving.failure, EngineCrashed)  # its package may have made it
    assert waiting.done.wait(5) and not isinstance(waiting.failure, EngineCrashed)
    assert ends == ["nonsense"] and child.pid is None


def test_one_that_dies_before_it_is_ready_is_the_devices_fault(
    silent: tuple[Child, socket.socket, list[str]],
) -> None:
    child, theirs, ends = silent
    call = child.ask({"id": 1}, ONE)
    theirs.close()
    assert call.done.wait(5) and isinstance(call.failure, runtime_link.DeviceFault) and ends == ["died"]


def test_descriptors_nobody_asked_for_are_closed(silent: tuple[Child, socket.socket, list[str]]) -> None:
    child, theirs, _ = silent
    send(theirs, {"ready": "cpu", "fault": ""})
    call = child.ask({"id": 1}, ONE)
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as null:
        for _ in range(20):
            send(theirs, {"serving": [1], "stage": "forward", "patience": 1.0}, [null.fileno()])
        send(theirs, {"id": 1, "kind": "engine", "error": "no"})
        assert call.done.wait(5)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_input_that_cannot_be_handed_over_leaves_nothing_behind(
    silent: tuple[Child, socket.socket, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    child, theirs, ends = silent
    send(theirs, {"ready": "cpu", "fault": ""})

    def full(array: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(runtime_link, "shared_array", full)
    with pytest.raises(EngineUnavailable, match="Too many open files"):
        child.ask({"id": 1}, ONE)
    child._reader.join(1.2)
    assert child.alive and not ends and child.calls == 0


def test_one_found_dead_while_it_is_asked_is_told_like_one_that_is_read_as_dead(
    silent: tuple[Child, socket.socket, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    child, theirs, ends = silent

    def broken(*_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(runtime_link, "send", broken)
    with pytest.raises(runtime_link.DeviceFault, match="before it was ready"):
        child.ask({"id": 1}, ONE)
    assert not child.alive and child.calls == 0
    theirs.close()
    child._reader.join(10)
    assert ends == ["died"]
