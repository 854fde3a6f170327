"""From a job to its results, once, whatever happens in between."""

import io
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom.filereader import read_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.config import JobSettings
from dicom_node.errors import (
    CatalogBusy,
    EncodingError,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
    PackageError,
    SeriesRejected,
    StorageError,
)
from dicom_node.model import JobState, Priority
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.fsck import fsck
from dicom_node.pipeline.lease import LeaseKeeper, backoff_s
from dicom_node.pipeline.work import data_set_bytes
from dicom_node.retention import DeletionOrder
from dicom_node.store.backup import back_up, bring_back
from dicom_node.store.pressure import Volume
from dicom_node.values import Pending


@pytest.fixture
def with_job(bench: Any) -> Any:
    """A bench with one job to do."""
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (bench.job_id,) = bench.route()
    return bench


def test_a_job_becomes_seg_and_sr_in_the_catalog_and_in_the_outbox(with_job: Any, kit: ModuleType) -> None:
    recorder = kit.Recorder()
    worker = with_job.worker(observer=recorder)
    assert worker.run_once("w") is True
    assert worker.run_once("w") is False
    job = with_job.queue.job(with_job.job_id)
    assert job.state is JobState.DONE
    assert [instance.modality for instance in with_job.queue.job_results(job.id)] == ["SEG", "SR"]
    (delivery,) = with_job.queue.deliveries()
    assert [item.instance.modality for item in delivery.items] == ["SEG", "SR"]
    (task,) = with_job.engine.tasks
    assert [instance.sop_instance_uid for instance in task.instances] == ["1.2.3.1.1", "1.2.3.1.2"]
    assert task.header.values["PatientID"] == ("P1",)
    assert with_job.encoders[0].saw == [(1, 0)]  # the one image the finding is on
    assert with_job.encoders[1].saw == [(1, 1)]  # the SR sees the SEG
    assert recorder.named("job_attempted") == [("ct-abdomen", "done")]
    assert {stage for _, stages in recorder.named("inference") for stage in stages} == {"queue", "forward", "encode"}


def test_only_the_kinds_the_rule_asks_for_are_encoded(bench: Any) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    bench.route(bench.plan(results=("sr",)))
    bench.worker().run_once("w")
    assert [instance.modality for instance in bench.produced()] == ["SR"]


def test_the_keys_name_the_run_and_the_tracking_key_does_not(with_job: Any, kit: ModuleType) -> None:
    with_job.worker().run_once("w")
    activity = with_job.queue.reopen_study(kit.STUDY, again=True)
    routed = [with_job_routed(with_job, kit)]
    with_job.queue.route_series(activity, routed, kit.CloseTrigger.OPERATOR, "d")
    with_job.worker().run_once("w")
    first, second = with_job.encoders[0].contexts
    assert first.run_key != second.run_key
    assert first.tracking_key == second.tracking_key
    assert (first.run_number, second.run_number) == (1, 2)
    assert first.predecessors == ()
    assert [instance.modality for instance in second.predecessors] == ["SEG", "SR"]
    assert first.created_at == with_job.queue.job(with_job.job_id).created_at


def with_job_routed(bench: Any, kit: ModuleType) -> Any:
    header = kit.read_series_header(bench.queue.series_instances(kit.STUDY, kit.SERIES))
    verdict = kit.Verdict(rule="organs", series_instance_uid=kit.SERIES, matched=True, reason="", conditions=())
    return kit.RoutedSeries(series_instance_uid=kit.SERIES, header=header, verdicts=(verdict,), jobs=(bench.plan(),))


def test_predecessors_are_those_of_the_latest_run_that_had_results(with_job: Any) -> None:
    with_job.worker().run_once("w")
    for number in (3, 4):
        with_job.clock.sleep(1)
        with_job.receive(with_job.dataset(f"1.2.3.1.{number}"))
        with_job.route()
        if number == 3:
            with_job.engine.answers.append(EngineError("broken"))
            with_job.worker().run_once("w")
    with_job.worker().run_once("w")
    assert [len(context.predecessors) for context in with_job.encoders[0].contexts] == [0, 2]


def test_late_images_are_no_part_of_a_job_made_before(bench: Any, kit: ModuleType) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    plan = bench.plan(late_instances=kit.LatePolicy.IGNORE)
    bench.route(plan)
    bench.clock.sleep(1)
    bench.receive(bench.dataset("1.2.3.1.2"))
    bench.route(plan)
    bench.worker().run_once("w")
    (task,) = bench.engine.tasks
    assert len(task.instances) == len(task.header.geometry) == 1


@pytest.mark.parametrize("error", [EngineRejected("not an abdomen"), SeriesRejected("gantry tilt")])
def test_a_refusal_is_filtered_with_its_reason_not_failed(with_job: Any, error: EngineRejected) -> None:
    with_job.engine.answers.append(error)
    with_job.worker().run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.error) == (JobState.REJECTED, error.reason)
    assert with_job.queue.snapshot()["ledger"]["reasons"] == {"rejected by the engine": 1}


@pytest.mark.parametrize("error", [EngineUnavailable("busy"), PackageError("chest is disabled"), StorageError("full")])
def test_what_is_not_the_jobs_fault_is_tried_until_the_deadline(
    with_job: Any, kit: ModuleType, error: Exception
) -> None:
    with_job.engine.answers += [error] * 8
    worker = with_job.worker(max_attempts=3, backoff_s=10, backoff_max_s=20)
    for _ in range(8):
        assert worker.run_once("w")
        job = with_job.queue.job(with_job.job_id)
        assert (job.state, job.error) == (JobState.PENDING, str(error))
        with_job.clock.sleep(20)
    assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


@pytest.mark.parametrize("error", [EngineTimeout("late"), RuntimeError("Canary^Jane")])
def test_what_may_pass_is_tried_again_with_growing_delays_then_given_up(
    with_job: Any, kit: ModuleType, error: Exception
) -> None:
    with_job.engine.answers += [error] * 3
    recorder = kit.Recorder()
    worker = with_job.worker(observer=recorder, max_attempts=3, backoff_s=10)
    for delay_s in (10, 20):
        assert worker.run_once("w")
        assert with_job.queue.job(with_job.job_id).state is JobState.PENDING
        with_job.clock.sleep(delay_s - 1)
        assert not worker.run_once("w")
        with_job.clock.sleep(1)
    assert worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.attempts) == (JobState.FAILED, 3)
    assert "Canary" not in job.error
    assert recorder.named("job_attempted") == [("ct-abdomen", word) for word in ("retry", "retry", "failed")]
    assert recorder.named("dead_letter") == [("job", "attempts")]


@pytest.mark.parametrize("error", [EngineError("no"), EncodingError("no"), KeyError("engine")])
def test_only_what_cannot_pass_is_given_up_at_once(with_job: Any, error: Exception) -> None:
    with_job.engine.answers.append(error)
    with_job.worker().run_once("w")
    expected = JobState.PENDING if isinstance(error, KeyError) else JobState.FAILED
    assert with_job.queue.job(with_job.job_id).state is expected


def test_an_engine_that_is_not_configured_is_a_dead_letter_that_says_so(bench: Any) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    (job,) = bench.route(bench.plan(engine="gone"))
    bench.worker().run_once("w")
    assert bench.queue.job(job).error == "engine 'gone' is not configured"


def test_a_job_past_its_deadline_is_given_up_and_its_engine_told(with_job: Any) -> None:
    with_job.engine.answers += [Pending(handle="ext-1", poll_after_s=5)] * 2
    worker = with_job.worker(deadline_s=3600)
    worker.run_once("w")
    with_job.clock.sleep(3601)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert job.state is JobState.FAILED
    assert job.error.startswith("EXPIRED")
    assert with_job.engine.cancelled == ["ext-1"]


def test_a_job_that_was_never_tried_is_tried_however_old_it_is(with_job: Any) -> None:
    with_job.clock.sleep(3 * 24 * 3600)  # a weekend off
    with_job.worker().run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


def test_a_job_only_the_node_held_up_is_tried_once_more_past_its_deadline(with_job: Any) -> None:
    with_job.engine.answers.append(StorageError("no space"))
    worker = with_job.worker()
    worker.run_once("w")
    with_job.clock.sleep(3 * 24 * 3600)
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


@pytest.mark.parametrize("error", [StorageError("no space"), CatalogBusy("busy")])
def test_an_outage_of_the_node_spends_no_attempts_and_ends_at_the_deadline(
    with_job: Any, kit: ModuleType, error: Exception
) -> None:
    recorder = kit.Recorder()
    worker = with_job.worker(observer=recorder, max_attempts=2, deadline_s=7200, backoff_max_s=600)
    with_job.engine.answers += [error] * 50
    began_s = with_job.clock.seconds
    while with_job.queue.job(with_job.job_id).state is JobState.PENDING:
        worker.run_once("w")
        with_job.clock.sleep(600)
    assert 7200 < with_job.clock.seconds - began_s < 7200 + 1300
    assert with_job.queue.job(with_job.job_id).state is JobState.FAILED
    assert recorder.named("dead_letter") == [("job", "deadline")]


def test_after_an_outage_the_jobs_own_attempts_are_all_left(with_job: Any) -> None:
    with_job.engine.answers += [StorageError("no space")] * 5 + [EngineTimeout("late")]
    worker = with_job.worker(max_attempts=2)
    for _ in range(7):
        assert worker.run_once("w")
        with_job.clock.sleep(600)
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.attempts, job.outages) == (JobState.DONE, 7, 5)


def test_an_engine_that_is_away_for_a_while_costs_no_job(with_job: Any) -> None:
    with_job.engine.during = lambda: with_job.engine.answers.append(
        EngineUnavailable("restarting") if with_job.clock.seconds < 1000 + 900 else None
    )
    worker = with_job.worker()
    while with_job.queue.job(with_job.job_id).state is JobState.PENDING:
        worker.run_once("w")
        with_job.clock.sleep(5)
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


def test_while_the_disk_presses_no_routine_job_is_begun_and_none_at_all_when_no_result_could_be_kept(
    with_job: Any,
) -> None:
    least: list[Any] = [None, Priority.URGENT, Priority.BACKGROUND]
    worker = with_job.worker(begin_at_least=lambda: least[0])
    assert [worker.run_once("w"), least.pop(0)] == [False, None]
    assert worker.run_once("w") is False
    least.pop(0)
    assert worker.run_once("w") is True
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


def test_below_the_reserve_images_are_refused_and_the_results_of_a_job_in_hand_are_kept(with_job: Any) -> None:
    space = os.statvfs(with_job.folder)
    free = space.f_bavail * space.f_frsize
    with_job.archive.pressure._volumes = (Volume(path=with_job.folder, reserve_bytes=free * 2, floor_bytes=free // 2),)
    with_job.archive.pressure._measured_at = float("-inf")
    with pytest.raises(AssertionError, match="42752"):
        with_job.receive(with_job.dataset("1.2.3.1.9"))
    assert with_job.worker().run_once("w") is True
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE
    assert [delivery.state.value for delivery in with_job.queue.deliveries()] == ["pending"]


def test_stopping_the_node_costs_a_job_nothing(with_job: Any) -> None:
    stopping = threading.Event()
    worker = with_job.worker(stopping=stopping.is_set, max_attempts=1)
    with_job.engine.during = stopping.set
    with_job.engine.answers.append(EngineUnavailable("the runtime is closed"))
    assert worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.attempts - job.outages) == (JobState.PENDING, 0)
    assert with_job.worker(max_attempts=1).run_once("w")  # at once after the start
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


@pytest.mark.parametrize("late", ["ignore", "rerun"])
def test_images_that_were_replaced_end_their_job_with_the_reason(bench: Any, kit: ModuleType, late: str) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    (job,) = bench.route(bench.plan(late_instances=kit.LatePolicy(late)))
    bench.database.write(lambda connection: connection.execute("UPDATE instance SET sha256 = 'other'"))
    bench.worker().run_once("w")
    ended = bench.queue.job(job)
    assert ended.state is JobState.FAILED
    assert "were replaced" in ended.error


def test_a_parked_job_is_polled_until_its_answer_comes(with_job: Any) -> None:
    with_job.engine.answers += [Pending(handle="ext-1", poll_after_s=5), Pending(handle="ext-1", poll_after_s=5)]
    worker = with_job.worker(max_attempts=1)
    assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.WAITING
    assert not worker.run_once("w")
    for _ in range(2):
        with_job.clock.sleep(5)
        assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE
    assert with_job.engine.polled == ["ext-1", "ext-1"]
    assert len(with_job.engine.tasks) == 1


def test_a_worker_whose_lease_was_lost_leaves_no_result(with_job: Any, caplog: pytest.LogCaptureFixture) -> None:
    def lose() -> None:
        with_job.clock.sleep(31)
        assert with_job.queue.lease_job("other", 30) is not None

    with_job.engine.during = lose
    with caplog.at_level(logging.WARNING):
        assert with_job.worker().run_once("w")
    assert with_job.produced() == []
    assert with_job.queue.job(with_job.job_id).state is JobState.LEASED
    assert "job dropped: its lease was lost" in caplog.messages


def test_a_cancelled_job_is_dropped_at_its_next_heartbeat(with_job: Any) -> None:
    def cancel() -> None:
        with_job.queue.cancel_job(with_job.job_id)
        with_job.clock.sleep(15)

    with_job.engine.during = cancel
    with_job.worker().run_once("w")
    assert with_job.encoders[0].contexts == []
    assert with_job.queue.job(with_job.job_id).state is JobState.CANCELLED


def test_a_job_that_kills_its_worker_each_time_ends_as_a_dead_letter(with_job: Any) -> None:
    for _ in range(3):
        assert with_job.queue.lease_job("dies", 30) is not None
        with_job.clock.sleep(31)
    with_job.worker(max_attempts=3).run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert job.state is JobState.FAILED
    assert with_job.engine.tasks == []


def test_nothing_of_a_patient_is_logged(with_job: Any, caplog: pytest.LogCaptureFixture) -> None:
    with_job.engine.answers += [EngineError("no"), ValueError("Canary^Jane")]
    with caplog.at_level(logging.DEBUG, logger="dicom_node"):
        with_job.worker().run_once("w")
    fields = [vars(record) for record in caplog.records]
    assert fields and all("Canary" not in repr({**entry, "exc_info": None, "exc_text": None}) for entry in fields)


def test_the_same_data_set_gives_the_same_bytes(bench: Any) -> None:
    ds = bench.dataset("1.2.3.1.1")
    first = data_set_bytes(ds, ExplicitVRLittleEndian)
    decoded = read_dataset(io.BytesIO(first), False, True)
    assert decoded == ds
    assert data_set_bytes(decoded, ExplicitVRLittleEndian) == first
    with pytest.raises(EncodingError):
        data_set_bytes(ds, ImplicitVRLittleEndian)


# --- leases and delays -----------------------------------------------------------------------------------------------


def test_back_off_doubles_up_to_its_most_and_is_spread() -> None:
    assert [backoff_s(n, 5, 60, 0.5) for n in (1, 2, 3, 4, 5, 99)] == [5, 10, 20, 40, 60, 60]
    assert (backoff_s(1, 8, 60, 0.0), backoff_s(1, 8, 60, 1.0)) == (6, 10)


def test_the_configured_attempts_last_half_an_hour() -> None:
    settings = JobSettings()
    waits = [backoff_s(n, settings.backoff_s, settings.backoff_max_s, 0.5) for n in range(1, settings.max_attempts)]
    assert 1800 <= sum(waits) < 2400


def test_the_keeper_extends_by_itself_until_work_exceeds_its_bound(kit: ModuleType) -> None:
    clock = kit.MovedClock()
    extended: list[float] = []
    twice = threading.Event()

    def extend() -> None:
        extended.append(clock.seconds)
        if len(extended) == 2:
            twice.set()

    with LeaseKeeper(extend, lease_s=0.03, bound_s=100, clock=clock) as keeper:
        assert twice.wait(5)
        clock.sleep(101)
        keeper._thread.join(5)
        assert not keeper._thread.is_alive()


def test_the_keeper_tells_the_work_that_its_lease_is_lost(kit: ModuleType) -> None:
    clock = kit.MovedClock()

    def extend() -> None:
        raise LeaseLost("gone")

    with LeaseKeeper(extend, lease_s=30, bound_s=100, clock=clock) as keeper:
        keeper()
        clock.sleep(11)
        with pytest.raises(LeaseLost):
            keeper()
        with pytest.raises(LeaseLost):
            keeper()


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["leased", "running", "first staged", "staged", "finished"])
def test_after_kill_9_at_each_point_there_is_exactly_one_result(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int], point: str
) -> None:
    clock = kit.LaterClock()
    bench = kit.Bench(tmp_path, clock)
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (job,) = bench.route()
    assert killed_at(tmp_path, "work", point) == -9
    clock.ahead_s = 31.0  # the dead worker's lease has run out
    worker = bench.worker()
    assert worker.run_once("w") is (point != "finished")
    assert not worker.run_once("w")
    assert bench.queue.job(job).state is JobState.DONE
    assert [instance.modality for instance in bench.produced()] == ["SEG", "SR"]
    assert len(list(bench.archive.locations())) == 4  # the same bytes under the same names, however often written
    assert len(bench.queue.deliveries()) == 1
    ledger = bench.queue.snapshot()["ledger"]
    assert (ledger["received"], ledger["routed"], ledger["imbalance"]) == (1, 1, 0)
    bench.close()


@pytest.mark.parametrize("point", ["first staged", "staged"])
def test_fsck_leaves_results_of_a_run_that_was_killed_and_then_cancelled(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int], point: str
) -> None:
    """An older revision's contour, which nobody ever saw, must not appear because somebody repaired the index."""
    clock = kit.LaterClock()
    bench = kit.Bench(tmp_path, clock)
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (job,), images = bench.route(), set(bench.archive.locations())
    assert killed_at(tmp_path, "work", point) == -9
    staged = sorted(set(bench.archive.locations()) - images)
    assert len(staged) == (1 if point == "first staged" else 2)
    bench.queue.cancel_job(job)
    report = fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=clock)
    assert (sorted(report.unfinished), report.indexed, report.clean) == (staged, [], True)
    assert bench.produced() == []
    bench.queue.retry_job(job)
    assert bench.worker().run_once("w")
    assert [instance.modality for instance in bench.produced()] == ["SEG", "SR"]
    report = fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=clock)
    assert (report.unfinished, report.superseded, report.clean) == ([], [], True)
    bench.close()


@pytest.mark.parametrize("state", [JobState.PENDING, JobState.CANCELLED])
def test_fsck_takes_in_results_that_a_catalog_put_back_from_a_copy_does_not_know_yet(
    kit: ModuleType, tmp_path: Path, state: JobState
) -> None:
    """The copy knows the job as it was before; what destinations have by now must not be made anew with other bytes."""
    bench = kit.Bench(tmp_path / "node", kit.LaterClock())
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (job,) = bench.route()
    if state is JobState.CANCELLED:
        bench.queue.cancel_job(job)
    back_up(bench.catalog, tmp_path / "copy.db")
    if state is JobState.CANCELLED:
        bench.queue.retry_job(job)
    assert bench.worker().run_once("w")
    had = [(instance.sop_instance_uid, instance.sha256) for instance in bench.produced()]
    bench.lose_catalog()
    bring_back(tmp_path / "node", tmp_path / "copy.db")
    bench = kit.Bench(tmp_path / "node", kit.LaterClock())
    assert bench.queue.job(job).state is state
    report = fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=bench.clock)
    assert (report.unfinished, len(report.indexed), report.clean) == ([], 2, True)
    bench.worker().run_once("w")
    assert [(instance.sop_instance_uid, instance.sha256) for instance in bench.produced()] == had
    bench.close()


def test_fsck_does_not_bring_back_what_a_killed_run_wrote_for_a_study_that_was_deleted(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int]
) -> None:
    bench = kit.Bench(tmp_path, kit.LaterClock())
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (job,) = bench.route()
    assert killed_at(tmp_path, "work", "staged") == -9
    bench.queue.cancel_job(job)
    order = DeletionOrder(study_instance_uid=kit.STUDY, rule="", who="r", why="", holds=frozenset())
    Deleter(bench.queue, bench.archive, ae_title="NODE").delete(order)
    report = fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=bench.clock)
    assert (len(report.deleted), report.indexed, bench.produced()) == (2, [], [])
    bench.close()


def test_fsck_takes_in_results_whose_job_went_with_the_index(kit: ModuleType, tmp_path: Path) -> None:
    clock = kit.LaterClock()
    bench = kit.Bench(tmp_path, clock)
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    bench.route()
    assert bench.worker().run_once("w")
    bench.lose_catalog()
    bench = kit.Bench(tmp_path, clock)
    assert bench.produced() == []
    report = fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=clock)
    assert (report.unfinished, len(report.indexed), report.clean) == ([], 4, True)
    assert [instance.modality for instance in bench.produced()] == ["SEG", "SR"]
    bench.close()
