"""Inside the runtime process: what interrupts what, and what is tried before memory is said to be out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dicom_node.models import runtime_serve
from dicom_node.models.forward import Done, Network
from dicom_node.models.resident import Loaded, Resident, is_out_of_memory
from dicom_node.models.runtime_intake import HungUp, Intake
from dicom_node.models.wire import receive, send, shared_array

Ask = Callable[..., Mapping[str, Any]]
SOURCE = {"format": "state_dict"}


class Device:
    """Stands in for `forward` on a device where only `fits` windows at a time have room."""

    def __init__(self) -> None:
        self.fits = 100
        self.crowded: Callable[[], bool] = lambda: False
        self.tried: list[int] = []
        self.at_pulse: Callable[[str], None] = lambda weights: None

    def load(self, weights: str, source: Any, infer: Any, device: torch.device) -> Network:
        network = Network(torch.nn.Linear(10, 10), device, torch.contiguous_format, "fp32")
        network.module.name = weights
        return network

    def run(self, network: Network, task: str, array: Any, infer: Any, job: Any, *, pulse: Callable[[], None]) -> Done:
        batch = 2 if infer["batch"] == "auto" else infer["batch"]
        self.tried.append(batch)
        self.at_pulse(str(network.module.name))
        pulse()
        if batch > self.fits or self.crowded():
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return Done(output=np.zeros(1, np.float32), windows=1, outputs=1, seconds={"forward": 0.0})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    one = Device()
    monkeypatch.setattr(runtime_serve, "run", one.run)
    monkeypatch.setattr(runtime_serve, "load_network", one.load)
    return one


class Parent:
    """The other end of a server's socket."""

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.intake = Intake(self.theirs)
        self.server = runtime_serve.Server(self.intake, torch.device("cpu"))

    def send(self, identity: int, model: str = "a", batch: int | str = "auto", rank: int = 1) -> None:
        array = np.zeros((4, 4, 4), np.float32)
        message = {"id": identity, "task": "segmentation", "model": model, "version": "1", "weights": model}
        message |= {"source": SOURCE, "infer": {"batch": batch}, "job": {}, "shape": [4, 4, 4], "dtype": "float32"}
        fd = shared_array(array)
        send(self.socket, message | {"threads": 1, "rank": rank}, [fd])
        os.close(fd)

    def answers(self, count: int) -> list[Mapping[str, Any]]:
        """The server does what lies in its socket; the first `count` answers in their order."""
        self.intake.drain()
        request = self.intake.pop()
        assert request is not None
        self.server._serve(request)
        found: list[Mapping[str, Any]] = []
        while len(found) < count:
            received = receive(self.socket)
            assert received is not None
            for fd in received[1]:
                os.close(fd)
            if "id" in received[0]:
                found.append(received[0])
        return found


@pytest.fixture
def parent(device: Device) -> Iterator[Parent]:
    one = Parent()
    with one.socket, one.theirs:
        yield one


@pytest.fixture
def ask(parent: Parent) -> tuple[Ask, runtime_serve.Server]:
    def asked(model: str = "a", batch: int | str = "auto") -> Mapping[str, Any]:
        parent.send(1, model, batch)
        return parent.answers(1)[0]

    return asked, parent.server


def test_urgent_work_interrupts_what_interrupted_background_work(parent: Parent, device: Device) -> None:
    begun: list[str] = []

    def at_pulse(model: str) -> None:
        begun.append(model)
        if model == "background":
            parent.send(2, "routine", rank=1)
            parent.send(4, "late background", rank=2)
        elif model == "routine":
            parent.send(3, "urgent", rank=0)

    device.at_pulse = at_pulse
    parent.send(1, "background", rank=2)
    assert [answer["id"] for answer in parent.answers(3)] == [3, 2, 1]
    assert begun == ["background", "routine", "urgent"]
    (late,) = parent.answers(1)  # of the same rank: not in between
    assert late["id"] == 4


def test_what_is_cancelled_stops_at_its_next_pulse_and_what_waits_is_never_begun(
    parent: Parent, device: Device
) -> None:
    def at_pulse(model: str) -> None:
        parent.send(2, "waiting")
        send(parent.socket, {"cancel": 2})
        send(parent.socket, {"cancel": 1})

    device.at_pulse = at_pulse
    parent.send(1, "running")
    assert [(answer["id"], answer["kind"]) for answer in parent.answers(2)] == [(2, "cancelled"), (1, "cancelled")]
    assert len(device.tried) == 1 and len(parent.intake) == 0


def test_a_batch_that_does_not_fit_is_halved_and_what_fitted_is_remembered(
    ask: tuple[Ask, runtime_serve.Server], device: Device
) -> None:
    asked, _ = ask
    device.fits = 2
    assert "error" not in asked(batch=8)
    assert device.tried == [8, 4, 2]
    assert "error" not in asked(batch=8)
    assert device.tried == [8, 4, 2, 2]


def test_other_networks_go_before_the_batch_is_made_smaller(
    ask: tuple[Ask, runtime_serve.Server], device: Device
) -> None:
    asked, server = ask
    assert "error" not in asked("b")
    assert server._resident.models() == [("b", "1")]
    device.crowded = lambda: len(server._resident) > 1
    assert "error" not in asked("a")
    assert device.tried == [2, 2, 2]
    assert server._resident.models() == [("a", "1")]


def test_when_nothing_helps_it_is_said(ask: tuple[Ask, runtime_serve.Server], device: Device) -> None:
    asked, _ = ask
    device.fits = 0
    assert asked(batch=4)["kind"] == "memory"
    assert device.tried == [4, 2, 1]
    device.fits = 8
    assert "error" not in asked(batch=4)


def test_the_parents_end_ends_the_work() -> None:
    other, mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.close()
    with mine, pytest.raises(HungUp):
        Intake(mine).drain(None)


def test_a_budget_counts_all_tensors_and_the_largest_run() -> None:
    resident = Resident(torch.device("cpu"), budget=100)
    network = Network(torch.nn.Identity(), torch.device("cpu"), torch.contiguous_format, "fp32")

    def loaded(name: str, size: int, run: int) -> Loaded:
        return resident.get(name, lambda: Loaded(network, name, "1", size, run))

    for name, size, run in (("a", 20, 40), ("b", 20, 10), ("c", 20, 30)):
        loaded(name, size, run)
    assert resident.used_bytes() == 100 and len(resident) == 3
    loaded("a", 0, 0)  # used again: it is there
    loaded("d", 10, 0)
    assert [model for model, _ in resident.models()] == ["a", "c", "d"]  # b was the least recently used
    with resident.used(resident.get("a", lambda: pytest.fail("it is loaded"))):
        loaded("e", 500, 0)
        assert [model for model, _ in resident.models()] == ["a", "e"]  # what runs stays
    resident.trim("e")
    assert [model for model, _ in resident.models()] == ["e"]


def test_every_way_of_saying_that_memory_is_out_is_known() -> None:
    said = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ]
    assert all(is_out_of_memory(exc) for exc in said)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_run_on_the_cpu_is_measured_by_what_it_makes_resident(tmp_path: Path) -> None:
    resident = Resident(torch.device("cpu"))
    network = Network(torch.nn.Identity(), torch.device("cpu"), torch.contiguous_format, "fp32")
    one = Loaded(network, "a", "1", 0)
    with resident.used(one):
        block = np.ones(64 << 20, np.uint8)
        del block
    assert one.run_bytes > 40 << 20
