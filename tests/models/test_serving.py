"""Several requests on one device: who goes first, who goes together, who goes on when something breaks."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import yaml

from dicom_node.breaker import Breaker, BreakerState
from dicom_node.errors import (
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    LeaseLost,
    PackageError,
)
from dicom_node.model import Priority
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.package import ModelPackage, load_package
from dicom_node.models.runtime import Answer, Limits, OutOfMemory, Runtime
from dicom_node.models.runtime_pool import RuntimePool
from dicom_node.models.segment import volume_job
from dicom_node.models.wire import Array, receive, send

BROKEN = "cuda:99"  # no machine has it


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    one = Runtime("cpu")
    yield one
    one.close()


@pytest.fixture(scope="module")
def ct(ct_folder: Path) -> ModelPackage:
    return load_package(ct_folder)


@pytest.fixture(scope="module")
def cxr(cxr_folder: Path) -> ModelPackage:
    return load_package(cxr_folder)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield pool


def nothing() -> None:
    """A heartbeat nobody listens to."""


def ask(runtime: Runtime | RuntimePool, package: ModelPackage, array: Array, **options: Any) -> Answer:
    manifest = package.manifest
    if isinstance(manifest, SegmentationManifest):
        x, y, z = array.shape
        job = volume_job(manifest, ModelGrid.same((x, y, z), (3.0, 3.0, 3.0)))
        job["output"]["labels"] = [label | {"keep": "all", "min_ml": 0} for label in job["output"]["labels"]]
    else:
        job = {"activation": "sigmoid"}
    given = {"timeout_s": 100.0, "heartbeat": nothing, "threads": 1, "job": job} | options
    return runtime.infer(package, array, **given)


def volume(side: int) -> npt.NDArray[np.int16]:
    return np.random.default_rng(side).integers(-1000, 1000, (side,) * 3).astype(np.int16)


def images(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 64, 64)).astype(np.float32)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@contextmanager
def stopped(runtime: Runtime) -> Iterator[None]:
    """The child sees nothing of what is asked inside until the block ends."""
    pid = runtime.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> ModelPackage:
    manifest = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    change(manifest)
    target.mkdir()
    (target / "model.yaml").write_text(yaml.safe_dump(manifest), encoding="utf-8")
    (target / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    return load_package(target)


# --- who goes first --------------------------------------------------------------------------------------------------


def test_urgent_work_is_done_in_the_middle_of_other_work(
    runtime: Runtime, ct: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    expected = ask(runtime, ct, volume(128)).output
    small = ask(runtime, ct, volume(33)).output
    ended: list[str] = []

    def run(name: str, side: int, priority: Priority) -> Answer:
        answer = ask(runtime, ct, volume(side), priority=priority)
        ended.append(name)
        return answer

    background = threads.submit(run, "background", 128, Priority.BACKGROUND)
    until(lambda: runtime.working, "the background work begins")
    with stopped(runtime):
        routine = threads.submit(run, "routine", 64, Priority.ROUTINE)
        urgent = threads.submit(run, "urgent", 33, Priority.URGENT)
        until(lambda: runtime.calls == 3, "all are asked")
    np.testing.assert_array_equal(urgent.result(60).output, small)
    np.testing.assert_array_equal(background.result(60).output, expected)
    assert ended == ["urgent", "routine", "background"]
    assert background.result().seconds["wait"] > routine.result().seconds["forward"]


def test_what_waits_is_done_by_urgency_and_then_in_order(
    runtime: Runtime, ct: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    ask(runtime, ct, volume(32))
    ended: list[str] = []

    def run(name: str, priority: Priority) -> None:
        ask(runtime, ct, volume(32), priority=priority)
        ended.append(name)

    asked: list[Future[None]] = []
    with stopped(runtime):
        for name, priority in [
            ("b1", Priority.BACKGROUND),
            ("r1", Priority.ROUTINE),
            ("r2", Priority.ROUTINE),
            ("u1", Priority.URGENT),
        ]:
            asked.append(threads.submit(run, name, priority))
            until(lambda: runtime.calls == len(asked), name)
    for one in asked:
        one.result(60)
    assert ended == ["u1", "r1", "r2", "b1"]


def test_work_nobody_waits_for_any_more_stops_between_windows(
    runtime: Runtime, ct: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    whole_s = ask(runtime, ct, volume(150)).seconds["forward"]
    lost = threading.Event()

    def heartbeat() -> None:
        if lost.is_set():
            raise LeaseLost("another worker owns this job")

    left = threads.submit(ask, runtime, ct, volume(150), heartbeat=heartbeat)
    until(lambda: runtime.working, "the work begins")
    lost.set()
    with pytest.raises(LeaseLost):
        left.result(60)
    assert ask(runtime, ct, volume(32)).seconds["wait"] < whole_s / 2


# --- who goes together -----------------------------------------------------------------------------------------------


def test_radiographs_of_several_studies_go_through_the_network_together(
    runtime: Runtime, cxr: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    counts = (1, 2, 1, 3)
    expected = [ask(runtime, cxr, images(count, seed)).output for seed, count in enumerate(counts)]
    with stopped(runtime):
        asked = [threads.submit(ask, runtime, cxr, images(count, seed)) for seed, count in enumerate(counts)]
        until(lambda: runtime.calls == 4, "all are asked")
    answers = [one.result(60) for one in asked]
    assert [answer.together for answer in answers] == [4, 4, 4, 4]
    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.output, wanted, atol=1e-5)


def test_a_radiograph_waits_a_moment_for_one_that_was_announced(
    runtime: Runtime, cxr: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    ask(runtime, cxr, images(1))
    alone = ask(runtime, cxr, images(1), expect=1)  # nothing comes: it goes on after a few milliseconds
    assert alone.together == 1
    with stopped(runtime):
        first = threads.submit(ask, runtime, cxr, images(1), expect=1)
        until(lambda: runtime.calls == 1, "the first is asked")
        second = threads.submit(ask, runtime, cxr, images(1, 5))
        until(lambda: runtime.calls == 2, "the second is asked")
    assert {first.result(60).together, second.result(60).together} == {2}


def test_one_bad_radiograph_does_not_spoil_those_that_went_with_it(
    runtime: Runtime, cxr: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    good = ask(runtime, cxr, images(2)).output
    bad = images(1)
    bad[0, 5, 5] = np.nan
    with stopped(runtime):
        asked = [threads.submit(ask, runtime, cxr, array) for array in (images(2), bad, images(2))]
        until(lambda: runtime.calls == 3, "all are asked")
    np.testing.assert_allclose(asked[0].result(60).output, good, atol=1e-5)
    np.testing.assert_allclose(asked[2].result(60).output, good, atol=1e-5)
    with pytest.raises(EngineError, match="not finite"):
        asked[1].result(60)


def test_what_broke_the_runtime_before_goes_alone(
    runtime: Runtime, cxr: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    ask(runtime, cxr, images(1))
    with stopped(runtime):
        asked = [threads.submit(ask, runtime, cxr, images(1), alone=alone) for alone in (True, False, False)]
        until(lambda: runtime.calls == 3, "all are asked")
    assert [one.result(60).together for one in asked] == [1, 2, 2]


# --- what breaks -----------------------------------------------------------------------------------------------------


def test_a_dead_child_is_blamed_on_the_work_it_was_at_and_on_no_other(
    ct: ModelPackage, threads: ThreadPoolExecutor
) -> None:
    ends: list[str] = []
    runtime = Runtime("cpu", on_end=ends.append)
    try:
        ask(runtime, ct, volume(32))
        at_work = threads.submit(ask, runtime, ct, volume(128))
        until(lambda: runtime.working, "the first is begun")
        waiting = threads.submit(ask, runtime, ct, volume(32))
        until(lambda: runtime.calls == 2, "the second waits")
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashed, match="SIGKILL"):
            at_work.result(60)
        with pytest.raises(EngineUnavailable) as raised:
            waiting.result(60)
        assert not isinstance(raised.value, EngineCrashed)
        assert ends == ["died"]
        assert runtime.restarts == {"died": 1}
    finally:
        runtime.close()


def test_a_network_that_does_not_give_the_packages_classes_is_refused_when_it_is_loaded(
    runtime: Runtime, ct_folder: Path, tmp_path: Path
) -> None:
    def eleventh(manifest: dict[str, Any]) -> None:
        manifest["output"]["labels"][-1]["index"] = 11

    package = changed(ct_folder, tmp_path / "p", eleventh)
    with pytest.raises(PackageError, match="self-test: the network has 4 outputs, the package names 12"):
        runtime.load(package, timeout_s=60, heartbeat=nothing)
    assert ("demo-ct-abdomen", "11") not in runtime.models


def test_what_does_not_fit_into_memory_is_an_answer_and_not_the_end(ct: ModelPackage) -> None:
    runtime = Runtime("cpu")
    try:
        expected = ask(runtime, ct, volume(32)).output
        child = psutil.Process(runtime.pid)
        now = child.memory_info().vms
        child.rlimit(psutil.RLIMIT_AS, (now + (96 << 20), child.rlimit(psutil.RLIMIT_AS)[1]))
        with pytest.raises(OutOfMemory) as raised:
            ask(runtime, ct, volume(256))
        assert not raised.value.retryable
        np.testing.assert_array_equal(ask(runtime, ct, volume(32)).output, expected)
        assert runtime.pid == child.pid
    finally:
        runtime.close()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_networks_stay_loaded_within_the_memory_given_and_the_least_used_goes(
    ct: ModelPackage, cxr: ModelPackage, ct_folder: Path, tmp_path: Path
) -> None:
    other = changed(
        ct_folder, tmp_path / "other", lambda manifest: manifest.update(id="other", infer={"window": [40, 40, 40]})
    )
    names = {"ct": ct.manifest.id, "cxr": cxr.manifest.id, "other": "other"}
    runtime = Runtime("cpu")
    try:
        ask(runtime, ct, volume(40))
        ask(runtime, cxr, images(1))
        ask(runtime, other, volume(40))
        assert {model for model, _ in runtime.models} == set(names.values())
    finally:
        runtime.close()
    tight = Runtime("cpu", limits=Limits(memory_bytes=1))  # less than any of them needs: each alone
    try:
        for package, array in ((ct, volume(40)), (cxr, images(1)), (other, volume(40))):
            assert ask(tight, package, array).windows >= 1
            assert [model for model, _ in tight.models] == [package.manifest.id]
    finally:
        tight.close()


# --- devices that fail -----------------------------------------------------------------------------------------------


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_try_later() -> None:
    now = 0.0
    breaker = Breaker(failures=3, rest_s=60, now=lambda: now)
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):
        assert breaker.admits()
        breaker.failed()
    assert breaker.state is BreakerState.OPEN and not breaker.admits()
    now = 60.0
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.admits() and not breaker.admits()  # one at a time
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    now = 120.0
    assert breaker.admits()
    breaker.dropped()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED and breaker.admits() and breaker.admits()


def test_work_of_a_broken_device_is_done_on_the_cpu_and_says_so(cxr: ModelPackage) -> None:
    now = 0.0
    pool = RuntimePool((BROKEN,), Limits(), breaker=lambda: Breaker(failures=2, rest_s=60, now=lambda: now))
    try:
        for _ in range(4):
            assert ask(pool, cxr, images(1)).device == "cpu"
        broken, spare = pool.facts()
        assert (broken["device"], broken["breaker"], broken["restarts"]) == (BROKEN, 1, {"device": 2})
        assert spare["device"] == "cpu" and spare["models"] == [[cxr.manifest.id, cxr.manifest.version]]
        now = 60.0
        assert pool.facts()[0]["breaker"] == 2
        assert ask(pool, cxr, images(1)).device == "cpu"  # it was tried once more
        assert pool.facts()[0]["restarts"] == {"device": 3} and pool.facts()[0]["breaker"] == 1
    finally:
        pool.close()


def test_what_a_device_has_no_memory_for_is_done_on_the_cpu(cxr: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RuntimePool((BROKEN,), Limits(), breaker=lambda: Breaker(failures=2, rest_s=60))
    asked: list[str] = []

    def full(package: ModelPackage, array: Array, **how: Any) -> Answer:
        asked.append(BROKEN)
        raise OutOfMemory("out of memory on the device, even with one window at a time")

    monkeypatch.setattr(pool.runtimes[0], "infer", full)
    try:
        for _ in range(4):
            assert ask(pool, cxr, images(1)).device == "cpu"
        assert asked == [BROKEN] * 2 and pool.facts()[0]["breaker"] == 1
    finally:
        pool.close()


# --- the wire --------------------------------------------------------------------------------------------------------


def test_a_message_larger_than_a_packet_arrives_whole() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        message = {"id": 1, "positions": [k / 3 for k in range(30000)]}
        read, write = os.pipe()
        send(one, message, [write])
        os.close(write)
        found = receive(other)
        assert found is not None
        assert found[0] == message and len(found[1]) == 1
        os.close(found[1][0])
        os.close(read)
