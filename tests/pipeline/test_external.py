"""Engines outside the node: what they remember, what is recorded of what leaves, how they are told to stop."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicom_node.errors import EngineError, EngineRejected, EngineUnavailable, LeaseLost, StorageError
from dicom_node.model import JobState, Sending, SendingState
from dicom_node.pipeline.external import STOP_DELAYS_S
from dicom_node.values import EngineResult, Pending

VOLUME = Sending(what="volume", host="ai.example", objects=2, identifiable=False)


@pytest.fixture
def with_job(bench: Any) -> Any:
    """A bench with one job to do."""
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (bench.job_id,) = bench.route()
    return bench


@pytest.fixture
def doing(with_job: Any) -> Callable[[Callable[[Any], Any]], None]:
    """`doing(step)`: the engine's next run is `step(task)`; what it returns, None for a result, is its answer."""

    def do(step: Callable[[Any], Any]) -> None:
        def run(task: Any, heartbeat: Any) -> EngineResult | Pending:
            with_job.engine.tasks.append(task)
            answer = step(task)
            return answer if answer is not None else with_job.engine._answer(task)

        with_job.engine.run = run

    return do


def texts(bench: Any, study: str = "1.2.3") -> list[str]:
    return [event.text for event in bench.queue.timeline(study)]


# --- notes


def test_a_note_is_given_again_until_the_job_ends(with_job: Any, doing: Any) -> None:
    worker = with_job.worker(backoff_s=10)

    def first(task: Any) -> None:
        assert task.note == ""
        task.remember("about to submit key-1")
        task.remember("run 7\nhttps://upload.example/?token=secret")
        raise EngineUnavailable("the answer was lost")

    doing(first)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.note.splitlines()[0]) == (JobState.PENDING, "run 7")
    with_job.clock.sleep(20)
    doing(lambda task: Pending(handle="7", poll_after_s=5))
    worker.run_once("w")
    assert with_job.engine.tasks[-1].note.startswith("run 7\n")
    assert with_job.queue.job(with_job.job_id).note != ""  # parked, too
    with_job.clock.sleep(5)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.note) == (JobState.DONE, "")
    said = texts(with_job)
    assert [text for text in said if "notes" in text] == [
        f"job {job.id} (ct-abdomen) notes: about to submit key-1",
        f"job {job.id} (ct-abdomen) notes: run 7",
    ]
    assert not any("secret" in text for text in said)


def test_no_repr_shows_what_only_the_engine_is_to_know(with_job: Any, doing: Any) -> None:
    def step(task: Any) -> None:
        task.remember("run 7\nhttps://upload.example/?token=secret")
        raise EngineUnavailable("away")

    doing(step)
    worker = with_job.worker()
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    (open_job,) = with_job.queue.open_jobs(job.study_instance_uid, [job.engine])
    with_job.clock.sleep(3600)
    worker.run_once("w")
    task = with_job.engine.tasks[-1]
    with_job.queue.cancel_job(job.id)
    cancellation = with_job.queue.next_cancellation(STOP_DELAYS_S)
    for one in (job, open_job, task, cancellation):
        assert "secret" in one.note and "secret" not in repr(one)


@pytest.mark.parametrize("error", [EngineRejected("not a head"), EngineError("broken")])
def test_a_note_ends_with_its_job_and_a_person_begins_anew(with_job: Any, doing: Any, error: Exception) -> None:
    def fails(task: Any) -> None:
        task.remember("about to submit")
        raise error

    doing(fails)
    with_job.worker().run_once("w")
    assert with_job.queue.job(with_job.job_id).note == ""
    with_job.queue.retry_job(with_job.job_id)
    doing(lambda task: None)
    with_job.worker().run_once("w")
    assert with_job.engine.tasks[-1].note == ""


@pytest.mark.parametrize("how", ["taken over", "cancelled"])
def test_who_lost_the_job_can_neither_note_nor_send(with_job: Any, doing: Any, how: str) -> None:
    refused = []

    def late(task: Any) -> None:
        if how == "cancelled":
            with_job.queue.cancel_job(with_job.job_id)
        else:
            with_job.clock.sleep(31)
            assert with_job.queue.lease_job("other", 30) is not None
        for attempt in (lambda: task.remember("mine"), lambda: task.record(VOLUME).__enter__()):
            with pytest.raises(LeaseLost):
                attempt()
            refused.append(1)
        raise LeaseLost("dropped")

    doing(late)
    with_job.worker().run_once("w")
    assert len(refused) == 2
    assert with_job.queue.job(with_job.job_id).note == ""
    assert with_job.queue.sendings() == []


def test_a_note_without_end_is_refused(with_job: Any, doing: Any) -> None:
    doing(lambda task: task.remember("x" * 100_000))
    with_job.worker().run_once("w")
    assert "too long" in with_job.queue.job(with_job.job_id).error


@pytest.mark.parametrize(
    ("point", "state"),
    [
        ("noted", None),
        ("recorded", SendingState.ABOUT_TO_SEND),
        ("submitted", SendingState.ABOUT_TO_SEND),
        ("known", SendingState.SENT),
    ],
)
def test_after_kill_9_around_a_submission_there_is_one_and_one_result(
    kit: ModuleType,
    tmp_path: Path,
    killed_at: Callable[[Path, str, str], int],
    point: str,
    state: SendingState | None,
) -> None:
    clock = kit.LaterClock()
    bench = kit.Bench(tmp_path, clock)
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    (job,) = bench.route()
    assert killed_at(tmp_path, "submit", point) == -9
    assert [record.state for record in bench.queue.sendings()] == ([state] if state else [])
    clock.ahead_s = 31.0  # the dead worker's lease has run out
    bench.engine = kit.RemoteEngine(tmp_path)
    worker = bench.worker()
    assert worker.run_once("w")
    assert not worker.run_once("w")
    assert bench.engine.tasks[0].note.splitlines()[0] == (
        "submitted as run-1" if point == "known" else f"about to submit key-{job}"
    )
    assert bench.engine.submitted() == [f"key-{job}"]
    assert bench.queue.job(job).state is JobState.DONE
    assert [instance.modality for instance in bench.produced()] == ["SEG", "SR"]
    states = [record.state for record in bench.queue.sendings()]  # newest first
    again = [SendingState.SENT] if point in ("noted", "recorded") else []
    assert states == again + ([state] if state else [])
    bench.close()


# --- sendings


def test_a_sending_is_recorded_before_it_leaves_and_when_it_has_left(with_job: Any, doing: Any) -> None:
    def sends(task: Any) -> None:
        with task.record(VOLUME) as tell:
            (record,) = with_job.queue.sendings()
            assert (record.state, record.ended_at) == (SendingState.ABOUT_TO_SEND, None)
            with_job.clock.sleep(3)
            tell(Sending(what="volume", host="ai.example", objects=2, identifiable=False, bytes=9, remote_id="r1"))

    doing(sends)
    with_job.worker().run_once("w")
    (record,) = with_job.queue.sendings(study_instance_uid="1.2.3")
    assert (record.state, record.job_id, record.engine) == (SendingState.SENT, with_job.job_id, "ct-abdomen")
    assert (record.sending.bytes, record.sending.remote_id, record.sending.identifiable) == (9, "r1", False)
    assert record.ended_at is not None and (record.ended_at - record.begun_at).total_seconds() == 3
    said = " / ".join(texts(with_job))
    assert "about to send 2 objects (volume, not identifiable) to ct-abdomen at ai.example" in said
    assert "9 bytes, there r1" in said
    assert with_job.queue.sendings(study_instance_uid="1.2.4") == []


def test_a_sending_that_broke_says_so_without_foreign_words(with_job: Any, doing: Any) -> None:
    def breaks(task: Any) -> None:
        with task.record(VOLUME):
            raise ConnectionResetError("Canary^Jane")

    doing(breaks)
    with_job.worker().run_once("w")
    (record,) = with_job.queue.sendings()
    assert (record.state, record.error) == (SendingState.FAILED, "ConnectionResetError")


def test_how_a_sending_ended_is_said_once(with_job: Any) -> None:
    queue = with_job.queue
    names = {"engine": "ai", "study_instance_uid": "1.2.3", "series_instance_uid": "1.2.3.1"}
    number = queue.begin_sending(VOLUME, job=None, **names)
    queue.end_sending(number, VOLUME, SendingState.SENT)
    queue.end_sending(number, VOLUME, SendingState.FAILED, "late")
    queue.end_sending(number + 1, VOLUME, SendingState.SENT)
    (record,) = queue.sendings()
    assert (record.state, record.error, record.job_id) == (SendingState.SENT, "", None)


def test_what_left_is_recorded_although_the_job_was_cancelled_meanwhile(with_job: Any, doing: Any) -> None:
    def sends(task: Any) -> None:
        with task.record(VOLUME):
            with_job.queue.cancel_job(with_job.job_id)

    doing(sends)
    with_job.worker().run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.CANCELLED
    assert [record.state for record in with_job.queue.sendings()] == [SendingState.SENT]


def test_nothing_leaves_that_cannot_be_recorded(with_job: Any, doing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []

    def sends(task: Any) -> None:
        with task.record(VOLUME):
            left.append(1)

    def full(*args: Any, **kwargs: Any) -> int:
        raise StorageError("no space")

    monkeypatch.setattr(with_job.queue, "begin_sending", full)
    doing(sends)
    with_job.worker().run_once("w")
    assert left == []
    assert with_job.queue.job(with_job.job_id).state is JobState.PENDING


# --- what nobody waits for any more


def parked(bench: Any, **settings: Any) -> Any:
    bench.engine.answers.append(Pending(handle="ext-1", poll_after_s=5))
    worker = bench.worker(**settings)
    worker.run_once("w")
    assert bench.queue.job(bench.job_id).state is JobState.WAITING
    return worker


def test_past_its_deadline_a_parked_job_is_looked_at_once_more(with_job: Any) -> None:
    worker = parked(with_job, deadline_s=3600)
    with_job.clock.sleep(3 * 24 * 3600)  # the node was off over a weekend; the engine was not
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE
    assert with_job.engine.cancelled == []


def test_an_expired_job_says_so_and_its_engine_is_told_once(with_job: Any, kit: ModuleType) -> None:
    worker = parked(with_job, deadline_s=3600)
    with_job.engine.answers.append(Pending(handle="ext-2", poll_after_s=5))  # a handle may change
    with_job.clock.sleep(3601)
    worker.run_once("w")
    job = with_job.queue.job(with_job.job_id)
    assert (job.state, job.error) == (JobState.FAILED, "EXPIRED: not done within 3600 s")
    assert with_job.engine.cancelled == ["ext-2"]
    with_job.clock.sleep(24 * 3600)
    assert not worker.stop_once()
    assert f"engine ct-abdomen is to stop job {job.id} (ext-2): told" in texts(with_job)


def test_a_poll_is_never_later_than_the_deadline(with_job: Any) -> None:
    with_job.engine.answers += [Pending(handle="ext-1", poll_after_s=1e6)] * 2
    worker = with_job.worker(deadline_s=3600)
    worker.run_once("w")
    with_job.clock.sleep(3599)
    assert not worker.run_once("w")
    with_job.clock.sleep(2)
    assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.FAILED


def test_what_the_engine_got_late_has_all_its_time(with_job: Any) -> None:
    with_job.clock.sleep(3 * 24 * 3600)
    worker = parked(with_job, deadline_s=3600)
    with_job.engine.answers.append(Pending(handle="ext-1", poll_after_s=5))
    with_job.clock.sleep(1800)
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.WAITING
    with_job.engine.answers.append(Pending(handle="ext-1", poll_after_s=5))
    with_job.clock.sleep(1801)
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).error.startswith("EXPIRED")


@pytest.mark.parametrize("how", ["by a person", "superseded"])
def test_a_job_that_is_cancelled_has_its_engine_told(with_job: Any, kit: ModuleType, how: str) -> None:
    worker = parked(with_job)
    if how == "superseded":
        with_job.receive(with_job.dataset("1.2.3.1.3"))
        with_job.route()
    else:
        with_job.queue.cancel_job(with_job.job_id)
    assert worker.stop_once()
    assert with_job.engine.cancelled == ["ext-1"]


def test_a_handle_that_comes_after_the_cancellation_is_stopped_too(with_job: Any, doing: Any) -> None:
    def slow(task: Any) -> Pending:
        with_job.queue.cancel_job(with_job.job_id)
        return Pending(handle="ext-9", poll_after_s=5)

    doing(slow)
    worker = with_job.worker()
    worker.run_once("w")
    assert worker.stop_once()
    assert with_job.engine.cancelled == ["ext-9"]
    assert not worker.stop_once()


def test_what_another_worker_took_over_is_not_stopped(with_job: Any, doing: Any) -> None:
    def slow(task: Any) -> Pending:
        with_job.clock.sleep(31)
        assert with_job.queue.lease_job("other", 30) is not None
        return Pending(handle="ext-9", poll_after_s=5)

    doing(slow)
    worker = with_job.worker()
    worker.run_once("w")
    assert not worker.stop_once()
    assert with_job.engine.cancelled == []


def test_a_job_that_ends_with_a_note_only_is_stopped_by_its_note(with_job: Any, doing: Any) -> None:
    def fails(task: Any) -> None:
        task.remember("about to submit key-1\nhttps://private.example")
        raise EngineError("nonsense")

    told: list[str] = []
    with_job.engine.cancel_noted = told.append
    doing(fails)
    with_job.worker().run_once("w")
    assert told == ["about to submit key-1\nhttps://private.example"]
    with with_job.database.read() as connection:
        assert [row["note"] for row in connection.execute("SELECT note FROM cancellation")] == [""]


def test_an_engine_that_cannot_be_told_is_told_again_across_a_restart_within_bounds(
    bench: Any, kit: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    (bench.job_id,) = bench.route()
    parked(bench)
    bench.queue.cancel_job(bench.job_id)
    restarted = kit.Bench(tmp_path, bench.clock)
    tries: list[str] = []

    def away(handle: str) -> None:
        tries.append(handle)
        raise EngineUnavailable("connection refused")

    restarted.engine.cancel = away
    worker = restarted.worker()
    with caplog.at_level(logging.CRITICAL):
        for delay_s in STOP_DELAYS_S:
            assert worker.stop_once()
            assert not worker.stop_once()
            restarted.clock.sleep(delay_s + 1)
        for _ in range(5):
            assert not worker.stop_once()
            restarted.clock.sleep(24 * 3600)
    assert tries == ["ext-1"] * len(STOP_DELAYS_S)
    assert any("given up after 10 tries: connection refused" in text for text in texts(restarted))
    assert restarted.queue.snapshot()["cancellations"] == {"ct-abdomen": {"pending": 0, "failed": 1}}
    restarted.close()


def test_a_process_that_dies_over_a_cancellation_uses_one_try(with_job: Any) -> None:
    worker = parked(with_job)
    with_job.queue.cancel_job(with_job.job_id)
    for delay_s in STOP_DELAYS_S:
        assert with_job.queue.next_cancellation(STOP_DELAYS_S) is not None  # and then it died
        with_job.clock.sleep(delay_s)
    assert not worker.stop_once()
    assert with_job.engine.cancelled == []
    assert any("no try came to an end" in text for text in texts(with_job))


def test_a_job_a_person_retries_is_not_stopped_any_more(with_job: Any) -> None:
    worker = parked(with_job)
    with_job.queue.cancel_job(with_job.job_id)
    with_job.queue.retry_job(with_job.job_id)
    assert not worker.stop_once()
    assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE
    assert with_job.engine.cancelled == []


def test_a_job_a_person_retries_before_its_engine_was_told_goes_on_where_it_was(with_job: Any, doing: Any) -> None:
    runs: list[str] = []

    def step(task: Any) -> Pending:
        runs.append(task.note)
        task.remember("run 7\nnobody else knows this")
        return Pending(handle="7", poll_after_s=5)

    doing(step)
    worker = with_job.worker()
    worker.run_once("w")
    with_job.queue.cancel_job(with_job.job_id)
    assert with_job.queue.job(with_job.job_id).note == ""
    with_job.queue.retry_job(with_job.job_id)
    job = with_job.queue.job(with_job.job_id)
    assert (job.handle, job.note) == ("7", "run 7\nnobody else knows this")
    assert worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE
    assert runs == [""]  # submitted once
    assert with_job.engine.cancelled == [] and not worker.stop_once()


def test_a_handle_that_comes_after_another_worker_gave_the_job_up_is_stopped_too(with_job: Any, doing: Any) -> None:
    def stalls(task: Any) -> Pending:
        with_job.clock.sleep(3600)
        taken_over = with_job.queue.lease_job("other", 30)
        with_job.queue.give_up_job(taken_over, "EXPIRED")
        return Pending(handle="late", poll_after_s=5)

    doing(stalls)
    worker = with_job.worker()
    worker.run_once("w")
    assert with_job.queue.job(with_job.job_id).state is JobState.FAILED
    assert worker.stop_once()
    assert with_job.engine.cancelled == ["late"]


def test_a_job_that_was_cancelled_before_its_handle_came_is_retried_with_its_note(with_job: Any, doing: Any) -> None:
    def cancelled(task: Any) -> None:
        task.remember("about to submit key-1")
        with_job.queue.cancel_job(with_job.job_id)
        task.remember("run 7")  # submitted meanwhile

    doing(cancelled)
    worker = with_job.worker()
    worker.run_once("w")
    with_job.queue.retry_job(with_job.job_id)
    doing(lambda task: None)
    worker.run_once("w")
    assert with_job.engine.tasks[-1].note == "about to submit key-1"
    assert with_job.queue.job(with_job.job_id).state is JobState.DONE


def test_a_job_whose_engine_was_told_to_stop_begins_anew(with_job: Any) -> None:
    worker = parked(with_job)
    with_job.queue.cancel_job(with_job.job_id)
    assert worker.stop_once()
    with_job.queue.retry_job(with_job.job_id)
    job = with_job.queue.job(with_job.job_id)
    assert (job.handle, job.note) == (None, "")


def test_two_workers_tell_an_engine_once(with_job: Any) -> None:
    worker = parked(with_job)
    with_job.queue.cancel_job(with_job.job_id)
    threads = [threading.Thread(target=worker.stop_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert with_job.engine.cancelled == ["ext-1"]


def test_an_engine_without_ears_ends_the_matter(with_job: Any) -> None:
    worker = parked(with_job)
    with_job.engine.cancel = None
    with_job.queue.cancel_job(with_job.job_id)
    assert worker.stop_once()
    assert not worker.stop_once()
    assert any("cannot be told to stop" in text for text in texts(with_job))


# --- calls and files


def test_every_call_is_counted_with_its_outcome(with_job: Any, kit: ModuleType) -> None:
    recorder = kit.Recorder()
    with_job.engine.answers += [EngineUnavailable("away"), Pending(handle="e", poll_after_s=5), EngineError("no")]
    with_job.engine.during = lambda: with_job.clock.sleep(2)
    worker = with_job.worker(observer=recorder, backoff_s=5)
    for _ in range(3):
        worker.run_once("w")
        with_job.clock.sleep(60)
    assert recorder.named("engine_called") == [
        ("ct-abdomen", "unavailable", 2.0),
        ("ct-abdomen", "pending", 2.0),
        ("ct-abdomen", "error", 0.0),
        ("ct-abdomen", "ok", 0.0),  # told to stop
    ]


def test_a_file_that_does_not_fit_is_kept_with_its_reason(with_job: Any, doing: Any, tmp_path: Path) -> None:
    returned = tmp_path / "mask.nii.gz"
    returned.write_bytes(b"nonsense")

    def fails(task: Any) -> None:
        raise EngineError(f"another grid; kept as {task.quarantine(returned, 'another grid')}")

    doing(fails)
    with_job.worker().run_once("w")
    (kept,) = with_job.catalog.quarantine.listed()
    assert (kept.reason, kept.engine, kept.job_id) == ("another grid", "ct-abdomen", with_job.job_id)
    assert kept.name in with_job.queue.job(with_job.job_id).error


def test_what_engines_hold_for_jobs_is_wanted_until_they_have_ended_and_were_told(with_job: Any) -> None:
    worker = parked(with_job)
    assert with_job.queue.still_wanted() == (frozenset({with_job.job_id}), "ext-1")
    with_job.queue.cancel_job(with_job.job_id)
    assert with_job.queue.still_wanted() == (frozenset({with_job.job_id}), "ext-1")  # it is still to be told
    assert worker.stop_once()
    assert with_job.queue.still_wanted() == (frozenset(), "")
