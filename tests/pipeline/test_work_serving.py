"""Work beside work: what goes first, what overlaps, what is not tried a third time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from dicom_node.errors import EngineCrashed, EngineUnavailable
from dicom_node.model import JobState, Priority


@pytest.fixture
def with_job(bench: Any) -> Any:
    """A bench with one job to do."""
    bench.receive(bench.dataset("1.2.3.1.1"))
    (bench.job_id,) = bench.route()
    return bench


def second_job(bench: Any, kit: ModuleType, **plan: Any) -> int:
    """Another study with a job of its own."""
    bench.receive(bench.dataset("1.2.4.1.1", study="1.2.4", series="1.2.4.1"))
    (job,) = bench.route(bench.plan(series_instance_uid="1.2.4.1", **plan), study="1.2.4", series="1.2.4.1")
    return int(job)


def test_a_series_that_breaks_the_runtime_twice_is_left_to_a_person_and_others_go_on(
    with_job: Any, kit: ModuleType
) -> None:
    with_job.engine.answers += [EngineCrashed("the runtime process died (signal SIGSEGV)")] * 2
    recorder = kit.Recorder()
    worker = with_job.worker(observer=recorder)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.strikes) == (JobState.PENDING, 1)
    with_job.clock.sleep(60)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert job.state is JobState.FAILED
    assert "died or hung 2 times on this series; not tried again" in job.error and "SIGSEGV" in job.error
    assert recorder.named("dead_letter") == [("job", "poison")]
    assert [task.strikes for task in with_job.engine.tasks] == [0, 1]
    other = second_job(with_job, kit)
    worker.run_once("w")
    assert with_job.queue.job(other).state is JobState.DONE
    with_job.queue.retry_job(with_job.job_id)  # a person may
    assert with_job.queue.job(with_job.job_id).strikes == 0
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


def test_work_that_only_waited_when_the_runtime_broke_is_not_blamed(with_job: Any) -> None:
    with_job.engine.answers += [EngineUnavailable("the runtime process died")] * 4
    worker = with_job.worker()
    for _ in range(5):
        worker.run_once("w")
        with_job.clock.sleep(700)
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.strikes) == (JobState.DONE, 0)


def test_a_worker_for_urgent_jobs_takes_no_others(with_job: Any, kit: ModuleType) -> None:
    worker = with_job.worker()
    assert worker.run_once("urgent", at_least=Priority.URGENT) is False
    urgent = second_job(with_job, kit, priority=Priority.URGENT)
    assert worker.run_once("urgent", at_least=Priority.URGENT) is True
    assert with_job.queue.job(urgent).state is JobState.DONE
    assert with_job.queue.job(with_job.job_id).state is JobState.PENDING
    assert [task.priority for task in with_job.engine.tasks] == [Priority.URGENT]


def test_one_study_is_analysed_while_the_one_before_is_encoded(
    with_job: Any, kit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither could end if they took turns: each waits for the other to be under way."""
    second = second_job(with_job, kit)
    encoding, analysing = threading.Event(), threading.Event()
    encode = with_job.encoders[0].encode

    def slow_encode(*arguments: Any) -> Any:
        if not encoding.is_set():
            encoding.set()
            assert analysing.wait(30), "no other study was analysed meanwhile"
        return encode(*arguments)

    def during() -> None:
        if len(with_job.engine.tasks) > 1:
            analysing.set()

    monkeypatch.setattr(with_job.encoders[0], "encode", slow_encode)
    with_job.engine.during = during
    worker = with_job.worker()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(worker.run_once, "a")
        assert encoding.wait(30)
        other = threads.submit(worker.run_once, "b")
        assert first.result(60) and other.result(60)
    assert {with_job.queue.job(job).state for job in (with_job.job_id, second)} == {JobState.DONE}
