"""Engines that answer nonsense, leave, or hang when they are told to stop: one job's failure, and nothing else's."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from dicom_node.errors import EngineError
from dicom_node.model import JobState
from dicom_node.pipeline import external
from dicom_node.pipeline.external import checked_answer
from dicom_node.values import EngineResult, Pending, Provenance


@pytest.fixture
def with_job(bench: Any) -> Any:
    """A bench with one job to do."""
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (bench.job_id,) = bench.route()
    return bench


def answers(bench: Any, answer: Callable[[], Any]) -> Any:
    bench.engine.run = lambda task, heartbeat: answer()
    worker = bench.worker()
    worker.run_once("w")
    return worker


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "answered with a NoneType, which is no result"),
        ({"labels": 1}, "answered with a dict, which is no result"),
        (Pending(handle="", poll_after_s=5), "a handle that is no text of 1 to 16384 characters"),
        (Pending(handle=7, poll_after_s=5), "a handle that is no text of 1 to 16384 characters"),  # type: ignore[arg-type]
        (Pending(handle="x" * 16385, poll_after_s=5), "a handle that is no text of 1 to 16384 characters"),
        (Pending(handle="x", poll_after_s=float("nan")), "does not say in how many seconds"),
        (Pending(handle="x", poll_after_s=float("inf")), "does not say in how many seconds"),
        (Pending(handle="x", poll_after_s=-1.0), "does not say in how many seconds"),
        (Pending(handle="x", poll_after_s="5"), "does not say in how many seconds"),  # type: ignore[arg-type]
    ],
)
def test_an_answer_that_is_none_fails_its_job_with_a_reason(with_job: Any, answer: Any, says: str) -> None:
    answers(with_job, lambda: answer)
    job = with_job.queue.job(with_job.job_id)
    assert job.state is JobState.FAILED and says in job.error


@pytest.mark.parametrize("stages", [None, [1], {"forward": "long"}, {"forward": float("nan")}, {"forward": -1.0}])
def test_times_that_make_no_sense_cost_the_times_and_not_the_result(stages: Any) -> None:
    provenance = Provenance(
        name="n", version="1", manufacturer="m", device_uid="1.2", weights_sha256="", config_sha256=""
    )
    result = EngineResult(values=(), provenance=provenance, stage_seconds=stages)
    checked = checked_answer("bad", result)
    assert checked == replace(result, stage_seconds={})
    assert checked_answer("bad", replace(result, stage_seconds={"forward": 1})) is not None


@pytest.mark.parametrize("kind", [SystemExit, ValueError, RecursionError])
def test_an_engine_that_leaves_costs_its_job_an_attempt_and_the_worker_nothing(
    with_job: Any, kind: type[BaseException]
) -> None:
    def leave() -> None:
        raise kind("Canary^Jane")

    worker = answers(with_job, leave)
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.error) == (JobState.PENDING, f"unforeseen: {kind.__name__}")
    del with_job.engine.run
    with_job.clock.sleep(3600)
    assert worker.run_once("w") and with_job.queue.job(with_job.job_id).state is JobState.DONE


# --- told to stop


def cancelled(bench: Any) -> Any:
    bench.engine.answers.append(Pending(handle="ext-1", poll_after_s=5))
    worker = bench.worker()
    worker.run_once("w")
    bench.queue.cancel_job(bench.job_id)
    return worker


@pytest.mark.parametrize("kind", [ValueError, SystemExit, EngineError])
def test_an_engine_that_raises_when_told_to_stop_uses_one_try_and_is_named(
    with_job: Any, kit: ModuleType, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    worker = cancelled(with_job)

    def away(handle: str) -> None:
        raise kind("Canary^Jane")

    with_job.engine.cancel = away
    with caplog.at_level(logging.WARNING, "dicom_node.pipeline.external"):
        assert worker.stop_once() and not worker.stop_once()
    (told,) = caplog.records
    assert (told.message, told.engine) == ("an engine could not be told to stop", "ct-abdomen")  # type: ignore[attr-defined]
    del with_job.engine.cancel
    with_job.clock.sleep(11)
    assert worker.stop_once() and with_job.engine.cancelled == ["ext-1"]


def test_an_engine_that_hangs_when_told_to_stop_holds_up_nobody(with_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "STOP_S", 0.05)
    worker, go, calls = cancelled(with_job), threading.Event(), list[str]()

    def hang(handle: str) -> None:
        calls.append(handle)
        go.wait(30)

    with_job.engine.cancel = hang
    began = time.monotonic()
    assert worker.stop_once()
    with_job.clock.sleep(11)
    assert worker.stop_once(), "due again, and not told a second time beside the first"
    assert time.monotonic() - began < 10 and calls == ["ext-1"]
    go.set()
    with_job.clock.sleep(31)
    deadline = time.monotonic() + 10
    while with_job.queue.snapshot()["cancellations"].get("ct-abdomen", {}).get("pending"):
        assert time.monotonic() < deadline
        worker.stop_once()
        with_job.clock.sleep(3600)
    assert calls[0] == "ext-1" and len(calls) >= 2


def test_a_job_that_is_given_up_does_not_wait_for_an_engine_that_hangs(
    with_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "STOP_S", 0.05)
    go = threading.Event()
    with_job.engine.cancel = lambda handle: go.wait(30)
    with_job.engine.answers += [Pending(handle="ext-1", poll_after_s=5), EngineError("no")]
    worker = with_job.worker()
    worker.run_once("w")
    with_job.clock.sleep(6)
    began = time.monotonic()
    worker.run_once("w")
    go.set()
    assert time.monotonic() - began < 10
    assert with_job.queue.job(with_job.job_id).state is JobState.FAILED
