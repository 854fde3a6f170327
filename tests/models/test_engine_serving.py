"""The local engine with several series at a time: one is read while another is on the device."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_node.config import EngineSettings, JobSettings
from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr
from dicom_node.errors import EngineCrashed, EngineUnavailable, PackageError
from dicom_node.model import EngineTask, Priority
from dicom_node.models import segment
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.runtime import Runtime
from dicom_node.models.runtime_pool import RuntimePool
from dicom_node.values import LabelVolume

Task = Callable[..., EngineTask]


def nothing() -> None:
    """A heartbeat nobody listens to."""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield pool


@pytest.fixture
def made() -> Iterator[Callable[..., LocalModelEngine]]:
    engines: list[LocalModelEngine] = []

    def make(folder: Path, **jobs: Any) -> LocalModelEngine:
        settings = EngineSettings(model=str(folder), options={"threads": 1})
        engines.append(LocalModelEngine("one", settings, devices=("cpu",), jobs=JobSettings(**jobs)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Two abdomens of three quarters of a MiB each."""
    folder = tmp_path_factory.mktemp("series")
    return [
        list(write_ct_series(folder / str(seed), seed, shape=(24, 128, 128), spacing_mm=(5, 3, 3)).paths)
        for seed in (1, 2)
    ]


@contextmanager
def stopped(runtime: Runtime) -> Iterator[None]:
    pid = runtime.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # its end came first
            os.kill(pid, signal.SIGCONT)


def warm(engine: LocalModelEngine) -> Runtime:
    engine.warm_up(nothing)
    return engine._runtimes().runtimes[0]


def labels(result: Any) -> Any:
    volume = result.values[0]
    assert isinstance(volume, LabelVolume)
    return volume.labels


def test_the_next_study_is_read_while_one_is_on_the_device(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    threads: ThreadPoolExecutor,
) -> None:
    engine = made(ct_folder)
    runtime = warm(engine)
    alone = [labels(engine.run(task_for(paths), nothing)) for paths in series]
    with stopped(runtime):  # whatever is on the device stays there
        first = threads.submit(engine.run, task_for(series[0]), nothing)
        until(lambda: runtime.calls == 1, "the first study is on the device")
        second = threads.submit(engine.run, task_for(series[1]), nothing)
        until(lambda: runtime.calls == 2, "the second study is read")
        assert not first.done() and not second.done()
    np.testing.assert_array_equal(labels(first.result(60)), alone[0])
    np.testing.assert_array_equal(labels(second.result(60)), alone[1])


def test_no_more_is_read_ahead_than_there_is_memory_for(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = made(ct_folder, prepared_mb=1)
    runtime, volumes = warm(engine), engine._memory
    read: list[str] = []
    prepare = segment.prepare

    def noted(manifest: Any, task: EngineTask, heartbeat: Any) -> Any:
        read.append(task.series_instance_uid)
        return prepare(manifest, task, heartbeat)

    monkeypatch.setattr(segment, "prepare", noted)
    with stopped(runtime):
        first = threads.submit(engine.run, task_for(series[0]), nothing)
        until(lambda: runtime.calls == 1, "the first study is on the device")
        second = threads.submit(engine.run, task_for(series[1]), nothing)
        until(lambda: volumes.waiting == 1, "the second waits for memory")
        assert len(read) == 1 and volumes.taken_bytes == 24 * 128 * 128 * 2
        with pytest.raises(EngineUnavailable, match="waits its turn"):  # and no longer than it may
            engine.run(task_for(series[1], timeout_s=0.3), nothing)
        urgent = threads.submit(engine.run, replace(task_for(series[1]), priority=Priority.URGENT), nothing)
        until(lambda: runtime.calls == 2, "the urgent one waits for nobody")
    assert urgent.result(60).values
    first.result(60)
    second.result(60)
    assert len(read) == 3 and volumes.taken_bytes == 0


def test_radiographs_of_studies_that_come_together_share_their_batches(
    made: Callable[..., LocalModelEngine],
    cxr_folder: Path,
    tmp_path: Path,
    task_for: Task,
    threads: ThreadPoolExecutor,
) -> None:
    engine = made(cxr_folder)
    runtime = warm(engine)
    tasks = [task_for([write_cxr(tmp_path / f"{k}.dcm", k, rows=200, columns=200, view="PA").path]) for k in range(3)]
    alone = [engine.run(task, nothing).values for task in tasks]
    with stopped(runtime):
        asked = [threads.submit(engine.run, task, nothing) for task in tasks]
        until(lambda: runtime.calls == 3, "all are asked")
    for one, expected in zip(asked, alone, strict=True):
        found = [item.confidence for item in one.result(60).values[0].items]
        assert found == pytest.approx([item.confidence for item in expected[0].items], abs=1e-5)
    assert len({one.result().stage_seconds["forward"] for one in asked}) == 1  # a third of the same batches each


def test_a_series_that_breaks_the_runtime_is_told_by_its_error(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    threads: ThreadPoolExecutor,
) -> None:
    engine = made(ct_folder)
    runtime = warm(engine)
    at_work = threads.submit(until, lambda: runtime.working, "the runtime is at work")

    def kill_when_at_work() -> None:
        at_work.result(60)
        assert runtime.pid is not None
        os.kill(runtime.pid, signal.SIGKILL)

    killer = threads.submit(kill_when_at_work)
    with pytest.raises(EngineCrashed, match="SIGKILL"):
        engine.run(replace(task_for(series[0]), strikes=1), nothing)
    killer.result(60)
    (device,) = engine.facts()
    assert device["device"] == "cpu" and device["restarts"] == {"died": 1} and device["breaker"] == 0
    engine.run(task_for(series[1]), nothing)
    assert engine.facts()[0]["models"] == [["demo-ct-abdomen", "1.0.0"]]


def test_an_engine_whose_network_dies_on_everything_rests_and_says_so(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = made(ct_folder)
    engine.run(task_for(series[0]), nothing)
    asked: list[int] = []

    def dies(*arguments: Any, **named: Any) -> None:
        asked.append(1)
        raise EngineCrashed("the runtime process died")

    infer = RuntimePool.infer
    monkeypatch.setattr(RuntimePool, "infer", dies)
    for _ in range(4):
        with pytest.raises(EngineCrashed):
            engine.run(task_for(series[0]), nothing)
    assert "died or hung 4 times in a row" in engine.trouble
    with pytest.raises(EngineUnavailable, match="rests") as raised:
        engine.run(task_for(series[0]), nothing)
    assert not isinstance(raised.value, EngineCrashed) and len(asked) == 4
    monkeypatch.setattr(RuntimePool, "infer", infer)
    engine._breaker._until = 0.0  # its rest is over
    engine.run(task_for(series[0]), nothing)
    assert engine.trouble == ""


def test_a_closed_engine_starts_nothing_any_more(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    threads: ThreadPoolExecutor,
) -> None:
    engine = made(ct_folder, prepared_mb=1)
    runtime, volumes = warm(engine), engine._memory
    with stopped(runtime):
        first = threads.submit(engine.run, task_for(series[0]), nothing)
        until(lambda: runtime.calls == 1, "the first study is on the device")
        second = threads.submit(engine.run, task_for(series[1]), nothing)
        until(lambda: volumes.waiting == 1, "the second waits for memory")
        engine.close()
    for waited in (first, second):
        with pytest.raises(EngineUnavailable):
            waited.result(30)
    assert runtime.pid is None and engine.facts() == ()


def test_time_that_others_take_is_not_the_series_own(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    threads: ThreadPoolExecutor,
) -> None:
    engine = made(ct_folder)
    runtime = warm(engine)
    child = runtime._child
    assert child is not None
    with stopped(runtime):  # it says nothing of serving this one: it is busy with others
        asked = threads.submit(engine.run, task_for(series[0], timeout_s=4.0), nothing)
        until(lambda: runtime.calls == 1, "it is asked")
        with pytest.raises(EngineUnavailable, match="busy with other work"):
            asked.result(30)
    assert engine.run(task_for(series[0]), nothing).values


def test_a_runtime_that_cannot_start_is_told_as_trouble(
    made: Callable[..., LocalModelEngine],
    ct_folder: Path,
    series: list[list[Path]],
    task_for: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = made(ct_folder)
    with monkeypatch.context() as broken:
        broken.setattr("dicom_node.models.runtime.sys.executable", "/bin/false")
        with pytest.raises(EngineUnavailable, match="before it was ready"):
            engine.run(task_for(series[0]), nothing)
        assert "before it was ready" in engine.trouble
    assert engine.run(task_for(series[0]), nothing).values and engine.trouble == ""


def test_a_package_nobody_may_read_costs_the_others_nothing(
    made: Callable[..., LocalModelEngine], ct_folder: Path, series: list[list[Path]], task_for: Task, tmp_path: Path
) -> None:
    hidden = tmp_path / "data" / "archive" / "package"  # where no package may read
    hidden.parent.mkdir(parents=True)
    (tmp_path / "data" / "models").mkdir()
    engines = [
        LocalModelEngine(
            name,
            EngineSettings(model=str(folder), options={"threads": 1}),
            devices=("cpu",),
            models_dir=tmp_path / "data" / "models",
        )
        for name, folder in (("sound", ct_folder), ("hidden", shutil.copytree(ct_folder, hidden)))
    ]
    try:
        engines[0].run(task_for(series[0]), nothing)
        pids = []
        for _ in range(3):
            with pytest.raises(PackageError, match=r"Permission denied|not permitted"):
                engines[1].run(task_for(series[0]), nothing)
            engines[0].run(task_for(series[0]), nothing)
            pids.append(warm(engines[0]).pid)
        assert len(set(pids)) == 1  # one new process was worth a try, the others were not
    finally:
        for engine in engines:
            engine.close()
