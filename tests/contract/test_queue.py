"""The contract of StudyLedger, JobQueue, Outbox and Status, on real SQLite. Time is moved, not waited for."""

import hashlib
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_node.errors import IllegalTransition, LeaseLost, NotFound, StorageError
from dicom_node.interfaces import RoutedSeries
from dicom_node.model import (
    ArchivedFile,
    BootTime,
    CloseTrigger,
    Condition,
    ConditionResult,
    ConflictPolicy,
    DeliveryState,
    InstanceHeader,
    InstanceRecord,
    Job,
    JobState,
    LatePolicy,
    Origin,
    PlannedJob,
    Priority,
    SendWhat,
    SeriesHeader,
    Source,
    Verdict,
)
from dicom_node.store.database import Database
from dicom_node.store.instances import insert_instance
from dicom_node.store.migrations import migrate
from dicom_node.store.queue import QueueOptions, SqliteQueue
from dicom_node.store.standing import audit, stand
from dicom_node.store.tally import audit_tallies
from dicom_node.values import Pending

CT = "1.2.840.10008.5.1.4.1.1.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
EXPLICIT = "1.2.840.10008.1.2.1"
STUDY = "1.2.3"
SERIES = "1.2.3.1"


@dataclass
class MovedClock:
    """A clock that stands still until it is moved."""

    seconds: float = 1000.0
    boot_id: str = "boot-1"
    start: datetime = field(default_factory=lambda: datetime(2026, 1, 1, tzinfo=UTC))

    def boot(self) -> BootTime:
        return BootTime(boot_id=self.boot_id, seconds=self.seconds)

    def wall(self) -> datetime:
        return self.start + timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Bench:
    """A queue on its own catalog, fed as the index would."""

    def __init__(self, folder: Path, options: QueueOptions) -> None:
        self.clock = MovedClock()
        self.path = folder / "catalog.db"
        migrate(self.path)
        self.database = Database(self.path)
        self.queue = SqliteQueue(self.database, lambda location: f"/archive/{location}", self.clock, options)

    def record(
        self, uid: str, *, study: str = STUDY, series: str = SERIES, modality: str = "CT", content: str = "",
        origin: Origin = Origin.RECEIVED, patient: str = "P1", sop_class: str = CT,
    ) -> InstanceRecord:  # fmt: skip
        sha256 = hashlib.sha256(f"{uid} {content}".encode()).hexdigest()
        header = InstanceHeader(
            sop_class_uid=sop_class,
            sop_instance_uid=uid,
            study_instance_uid=study,
            series_instance_uid=series,
            transfer_syntax_uid=EXPLICIT,
            attributes={"PatientID": patient, "Modality": modality, "InstanceNumber": uid.rsplit(".", 1)[-1]},
            pixel_data_offset=100 if modality not in ("SR", "SEG", "KO") else None,
        )
        return InstanceRecord(
            header=header,
            file=ArchivedFile(location=sha256, data_set_offset=400, data_set_length=1000, sha256=sha256),
            source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1"),
            origin=origin,
            received_at=self.clock.wall(),
            received_boot=self.clock.boot(),
        )

    def receive(self, *uids: str, policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST, **fields: str) -> None:
        """Index instances as received."""
        for uid in uids:
            record = self.record(uid, **fields)  # type: ignore[arg-type]
            self.database.write(lambda connection, record=record: insert_instance(connection, record, policy, False))

    def plan(self, rule: str = "organs", series: str = SERIES, **changes: object) -> PlannedJob:
        plan = PlannedJob(
            rule=rule,
            series_instance_uid=series,
            engine="ct-abdomen",
            priority=Priority.ROUTINE,
            results=("seg", "sr"),
            destinations=("PACS",),
            send_what=SendWhat.RESULTS,
            late_instances=LatePolicy.RERUN,
        )
        return replace(plan, **changes)  # type: ignore[arg-type]

    def routed(self, *plans: PlannedJob, series: str = SERIES, failure: str = "", count: int = 1) -> RoutedSeries:
        condition = ConditionResult(
            expression='Modality == "CT"', outcome=Condition.TRUE, values={"Modality": "CT"}, explanation="it is"
        )
        verdicts = tuple(
            Verdict(
                rule=plan.rule, series_instance_uid=series, matched=True, reason="all hold", conditions=(condition,)
            )
            for plan in plans
        ) or (Verdict(rule="organs", series_instance_uid=series, matched=False, reason="not", conditions=()),)
        header = SeriesHeader(series_instance_uid=series, instance_count=count, values={"Modality": ("CT",)})
        return RoutedSeries(
            series_instance_uid=series, header=header, verdicts=() if failure else verdicts, jobs=plans, failure=failure
        )

    def route(self, *plans: PlannedJob, study: str = STUDY, series: str = SERIES) -> list[int]:
        """Close one series of a study that is open."""
        activity = next(a for a in self.queue.open_studies() if a.study_instance_uid == study)
        routed = self.routed(*plans, series=series)
        return list(self.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest"))

    def leased(self, worker: str = "w1", lease_s: float = 30.0) -> Job:
        job = self.queue.lease_job(worker, lease_s)
        assert job is not None
        return job

    def results(self, job: Job) -> list[InstanceRecord]:
        """What a job produces: SEG and SR, the same for the same run."""
        base = f"2.25.{job.id}{job.run_number}"
        return [
            self.record(f"{base}.1", series=f"{base}.8", modality="SEG", origin=Origin.PRODUCED, sop_class=SEG),
            self.record(f"{base}.2", series=f"{base}.9", modality="SR", origin=Origin.PRODUCED, sop_class=SR),
        ]

    def finish(self, job: Job) -> list[str]:
        produced = self.results(job)
        uids = [record.header.sop_instance_uid for record in produced]
        self.queue.finish_job(job, produced, uids)
        return uids

    def dump(self) -> list[str]:
        """Every row of the work tables: to see that nothing was written."""
        tables = ("job", "job_result", "delivery", "delivery_item", "instance", "verdict", "routed_series", "series")
        with self.database.read() as connection:
            return [repr(tuple(row)) for table in tables for row in connection.execute(f"SELECT * FROM {table}")]

    def balanced(self) -> dict[str, int]:
        snapshot = self.queue.snapshot()
        for ledger in (snapshot["ledger"], snapshot["ledger_studies"]):
            assert ledger["imbalance"] == 0, ledger
            assert ledger["received"] == sum(ledger[key] for key in ("routed", "filtered", "waiting", "failed"))
        with self.database.read() as connection:
            assert audit(connection) == [] and audit_tallies(connection) == []
            self._agrees_with_a_slow_count(connection, ledger)
        ledger: dict[str, int] = snapshot["ledger"]
        assert sum(ledger["reasons"].values()) == ledger["filtered"]  # type: ignore[attr-defined]
        return ledger

    def _agrees_with_a_slow_count(self, connection: sqlite3.Connection, studies: dict[str, int]) -> None:
        """Count again without any shortcut."""
        received = connection.execute(
            "SELECT count(DISTINCT study_instance_uid || ' ' || series_instance_uid), "
            "count(DISTINCT study_instance_uid) FROM instance WHERE origin = 'received'"
        ).fetchone()
        assert tuple(received) == (self.queue.snapshot()["ledger"]["received"], studies["received"])
        worst: dict[str, str] = {}
        order = ["failed", "waiting", "routed", "filtered"]
        for study, routing, kept in connection.execute(
            "SELECT study_instance_uid, routing, class FROM series "
            "LEFT JOIN standing USING (study_instance_uid, series_instance_uid) WHERE EXISTS (SELECT 1 FROM instance "
            "WHERE origin = 'received' AND instance.study_instance_uid = series.study_instance_uid "
            "AND instance.series_instance_uid = series.series_instance_uid)"
        ):
            name = "waiting" if routing == "open" else kept or "filtered"
            worst[study] = min(worst.get(study, name), name, key=order.index)
        assert {name: studies[name] for name in order} == {name: list(worst.values()).count(name) for name in order}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("dicom_node.store.queue.PACE", 0.0)  # on a held machine the ledger is one of some steps ago
    made = Bench(
        tmp_path, QueueOptions(takes=lambda destination, modality: destination != "SR_ONLY" or modality == "SR")
    )
    yield made
    made.database.close()


def _with_job(bench: Bench, **changes: object) -> Job:
    bench.receive("1.2.3.1.1")
    bench.route(bench.plan(**changes))  # type: ignore[arg-type]
    return bench.leased()


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_jobs_are_leased_by_priority_then_age(bench: Bench) -> None:
    for number, priority in enumerate((Priority.BACKGROUND, Priority.ROUTINE, Priority.URGENT, Priority.ROUTINE)):
        bench.receive(f"1.{number}.1", study=f"1.{number}", series=f"1.{number}.0")
        plan = bench.plan(series=f"1.{number}.0", priority=priority)
        bench.route(plan, study=f"1.{number}", series=f"1.{number}.0")
    order = [job.study_instance_uid for _ in range(4) if (job := bench.queue.lease_job("w", 30))]
    assert order == ["1.2", "1.1", "1.3", "1.0"]
    assert bench.queue.lease_job("w", 30) is None


def test_a_job_carries_what_was_planned(bench: Bench) -> None:
    job = _with_job(bench, destinations=("PACS", "ARCHIVE"), send_what=SendWhat.RESULTS, priority=Priority.URGENT)
    assert (job.rule, job.engine, job.results, job.destinations) == (
        "organs",
        "ct-abdomen",
        ("seg", "sr"),
        ("PACS", "ARCHIVE"),
    )
    assert (job.state, job.attempts, job.run_number, job.token) == (JobState.LEASED, 1, 1, 1)
    assert job.created_at == bench.clock.wall()
    assert replace(bench.queue.job(job.id), age_s=job.age_s) == job


def test_a_lease_that_is_extended_is_not_given_away(bench: Bench) -> None:
    job = _with_job(bench)
    for _ in range(5):
        bench.clock.sleep(25)
        bench.queue.extend_job(job, 30)
        assert bench.queue.lease_job("w2", 30) is None


@pytest.mark.parametrize("how", ["expired", "another boot"])
def test_an_expired_lease_is_taken_over_and_the_old_worker_writes_nothing(bench: Bench, how: str) -> None:
    old = _with_job(bench)
    if how == "expired":
        bench.clock.sleep(30)
    else:
        bench.clock.boot_id = "boot-2"
        bench.clock.seconds = 5.0
    new = bench.leased("w2")
    assert (new.id, new.attempts, new.token) == (old.id, 2, old.token + 1)
    before = bench.dump()
    stale: list[Callable[[], object]] = [
        lambda: bench.queue.extend_job(old, 30),
        lambda: bench.finish(old),
        lambda: bench.queue.reject_job(old, "no"),
        lambda: bench.queue.retry_job_later(old, "later", 5),
        lambda: bench.queue.park_job(old, Pending(handle="h", poll_after_s=5)),
        lambda: bench.queue.give_up_job(old, "never"),
    ]
    for write in stale:
        with pytest.raises(LeaseLost):
            write()
    assert bench.dump() == before
    bench.finish(new)
    assert bench.queue.job(old.id).state is JobState.DONE


def test_a_job_whose_worker_dies_each_time_counts_its_attempts(bench: Bench) -> None:
    _with_job(bench)
    for attempt in range(2, 7):
        bench.clock.sleep(31)
        assert bench.leased().attempts == attempt


def test_a_retry_waits_for_its_delay(bench: Bench) -> None:
    job = _with_job(bench)
    bench.queue.retry_job_later(job, "engine busy", 60)
    assert bench.queue.lease_job("w", 30) is None
    bench.clock.sleep(59)
    assert bench.queue.lease_job("w", 30) is None
    bench.clock.sleep(1)
    again = bench.leased()
    assert (again.attempts, again.error) == (2, "engine busy")


def test_a_delay_of_another_boot_is_over(bench: Bench) -> None:
    job = _with_job(bench)
    bench.queue.retry_job_later(job, "engine busy", 3600)
    bench.clock.boot_id = "boot-2"
    assert bench.leased().id == job.id


def test_polling_a_parked_job_is_no_attempt(bench: Bench) -> None:
    job = _with_job(bench)
    for _ in range(4):
        bench.queue.park_job(job, Pending(handle="ext-7", poll_after_s=10))
        assert bench.queue.lease_job("w", 30) is None
        bench.clock.sleep(10)
        job = bench.leased()
        assert (job.handle, job.attempts) == ("ext-7", 1)
    bench.queue.retry_job_later(job, "not reachable", 0)
    job = bench.leased()
    assert (job.handle, job.attempts) == ("ext-7", 2)  # the engine still works on it


def test_jobs_are_leased_of_one_engine_or_without_some(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    plans = [bench.plan(rule=name, engine=name) for name in ("slow", "slow-2", "quick")]
    slow, slow_2, quick = bench.route(*plans)
    assert bench.queue.lease_job("w", 30, engine="nobody") is None
    assert bench.queue.lease_job("w", 30, without=("slow", "slow-2", "quick")) is None
    taken = bench.queue.lease_job("w", 30, without=("slow", "slow-2"))
    assert taken is not None and taken.id == quick
    taken = bench.queue.lease_job("w", 30, engine="slow-2")
    assert taken is not None and taken.id == slow_2
    assert bench.leased().id == slow


def test_only_urgent_jobs_are_begun_where_asked_and_what_an_engine_works_on_is_gone_on_with(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    priorities = (Priority.ROUTINE, Priority.BACKGROUND, Priority.URGENT)
    routine, background, urgent = bench.route(*(bench.plan(rule=one.value, priority=one) for one in priorities))

    def begun() -> int | None:
        job = bench.queue.lease_job("w", 30, begin_at_least=Priority.URGENT)
        return None if job is None else job.id

    assert (begun(), begun()) == (urgent, None)
    job = bench.leased()
    assert job.id == routine
    bench.queue.park_job(job, Pending(handle="ext-7", poll_after_s=10))
    bench.clock.sleep(10)
    assert (begun(), begun()) == (routine, None)
    assert bench.leased().id == background


def test_the_timeline_tells_of_looks_at_a_working_engine_once(bench: Bench) -> None:
    job = _with_job(bench)
    for _ in range(6):
        bench.queue.park_job(job, Pending(handle="ext-7", poll_after_s=10))
        bench.clock.sleep(10)
        job = bench.leased()
    told = [event.text for event in bench.queue.timeline(STUDY) if event.text.startswith(f"job {job.id} ")]
    assert [text.split(") ")[1] for text in told] == [
        "pending",
        "begun",
        "waiting",
        "asked 5 times: not done yet",
        "begun",
    ]
    bench.queue.retry_job_later(job, "not reachable", 0)
    bench.queue.give_up_job(bench.leased(), "broken")
    told = [event.text for event in bench.queue.timeline(STUDY) if event.text.startswith(f"job {job.id} ")]
    assert [text.split(") ")[1].partition(":")[0] for text in told[3:]] == [
        *("asked 5 times", "begun", "pending", "begun", "failed"),
    ]


def test_a_parked_job_that_is_woken_is_due_now_and_no_other_job_is_touched(bench: Bench) -> None:
    job = _with_job(bench)
    assert not bench.queue.wake_job(job.id)  # somebody works on it
    bench.queue.park_job(job, Pending(handle="ext-7", poll_after_s=3600))
    assert bench.queue.lease_job("w", 30) is None
    before = bench.dump()
    assert not bench.queue.wake_job(job.id + 1)
    assert bench.dump() == before
    assert bench.queue.wake_job(job.id)
    assert not bench.queue.wake_job(job.id)  # it is due already
    woken = bench.leased()
    assert (woken.id, woken.handle, woken.attempts) == (job.id, "ext-7", 1)
    bench.queue.retry_job_later(woken, "not reachable", 3600)
    assert not bench.queue.wake_job(job.id)  # it waits for the engine to be back, which a stranger's word does not mend
    assert bench.queue.lease_job("w", 30) is None


def test_a_person_retries_and_cancels(bench: Bench) -> None:
    job = _with_job(bench)
    bench.queue.give_up_job(job, "broken")
    assert bench.queue.job(job.id).state is JobState.FAILED
    bench.clock.sleep(1e6)
    bench.queue.retry_job(job.id)
    again = bench.leased()
    assert (again.attempts, again.error, again.run_number) == (1, "", 1)
    assert again.age_s == 0.0  # the deadline starts anew
    bench.queue.cancel_job(job.id)
    with pytest.raises(LeaseLost):
        bench.queue.extend_job(again, 30)


def test_illegal_moves_change_nothing(bench: Bench) -> None:
    job = _with_job(bench)
    bench.finish(job)
    before = bench.dump()
    with pytest.raises(IllegalTransition):
        bench.queue.retry_job(job.id)
    with pytest.raises(IllegalTransition):
        bench.queue.cancel_job(job.id)
    with pytest.raises(NotFound):
        bench.queue.retry_job(4711)
    with pytest.raises(LeaseLost):
        bench.finish(job)
    assert bench.dump() == before


def test_age_after_a_reboot_is_by_the_wall_clock(bench: Bench) -> None:
    job = _with_job(bench)
    bench.clock.boot_id = "boot-2"
    bench.clock.start += timedelta(seconds=bench.clock.seconds + 600)
    bench.clock.seconds = 0.0
    assert bench.queue.job(job.id).age_s == pytest.approx(600)


def test_workers_in_threads_with_their_own_connections_never_share_a_job(bench: Bench) -> None:
    count = 40
    for number in range(count):
        bench.receive(f"9.{number}.1", study=f"9.{number}", series=f"9.{number}.0")
        bench.route(bench.plan(series=f"9.{number}.0"), study=f"9.{number}", series=f"9.{number}.0")
    taken: list[int] = []

    def work(name: str) -> None:
        database = Database(bench.path)
        queue = SqliteQueue(database, str, bench.clock)
        while job := queue.lease_job(name, 300):
            taken.append(job.id)
        database.close()

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(taken) == len(set(taken)) == count


# --- once-only -------------------------------------------------------------------------------------------------------


def test_the_same_input_never_runs_twice(bench: Bench) -> None:
    job = _with_job(bench)
    bench.receive("1.2.3.1.1")  # sent again: identical, nothing opens
    assert bench.queue.open_studies() == []
    for state in ("under way", "done"):
        activity = bench.queue.reopen_study(STUDY, again=False)
        assert bench.queue.route_series(activity, [bench.routed(bench.plan())], CloseTrigger.OPERATOR, "d") == []
        if state == "under way":
            bench.finish(job)
    assert len(bench.queue.jobs()) == 1


def test_a_late_image_makes_a_linked_run_that_supersedes(bench: Bench) -> None:
    first = _with_job(bench)
    bench.finish(first)
    bench.receive("1.2.3.1.2")
    (activity,) = bench.queue.open_studies()
    assert activity.revision == 2
    (made,) = bench.route(bench.plan())
    second = bench.queue.job(made)
    assert (second.run_number, second.superseded_job, second.revision) == (2, first.id, 2)
    assert second.input_digest != first.input_digest


@pytest.mark.parametrize("leased", [False, True])
def test_a_run_that_is_out_of_date_is_cancelled(bench: Bench, leased: bool) -> None:
    bench.receive("1.2.3.1.1")
    (first,) = bench.route(bench.plan())
    job = bench.leased() if leased else None
    bench.receive("1.2.3.1.2")
    (second,) = bench.route(bench.plan())
    assert bench.queue.job(first).state is JobState.CANCELLED
    assert str(second) in bench.queue.job(first).error
    if job is not None:
        with pytest.raises(LeaseLost):
            bench.finish(job)
        assert bench.queue.job_results(first) == []


def test_a_rule_that_ignores_late_images_runs_once(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    plan = bench.plan(late_instances=LatePolicy.IGNORE)
    (job,) = bench.route(plan)
    bench.receive("1.2.3.1.2")
    assert bench.route(plan) == []
    assert bench.queue.job(job).state is JobState.PENDING
    bench.balanced()


def test_again_makes_a_new_run_but_not_beside_one_under_way(bench: Bench) -> None:
    first = _with_job(bench)
    activity = bench.queue.reopen_study(STUDY, again=True)
    assert bench.queue.route_series(activity, [bench.routed(bench.plan())], CloseTrigger.OPERATOR, "d") == []
    bench.finish(first)
    (made,) = bench.queue.route_series(activity, [bench.routed(bench.plan())], CloseTrigger.OPERATOR, "d")
    again = bench.queue.job(made)
    assert (again.run_number, again.superseded_job) == (2, first.id)
    assert again.input_digest == first.input_digest


def test_the_input_of_a_job_is_what_it_was_made_for(bench: Bench) -> None:
    bench.receive("1.2.3.1.1", "1.2.3.1.2")
    bench.route(bench.plan())
    bench.clock.sleep(1)
    bench.receive("1.2.3.1.3")
    job = bench.leased()
    instances, header = bench.queue.job_input(job)
    assert [instance.sop_instance_uid for instance in instances] == ["1.2.3.1.1", "1.2.3.1.2"]
    assert header.values["Modality"] == ("CT",)
    bench.receive("1.2.3.1.1", content="other", policy=ConflictPolicy.REPLACE)
    with pytest.raises(NotFound, match="were replaced"):
        bench.queue.job_input(job)


def test_no_clock_decides_what_the_input_of_a_job_is(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    bench.clock.start += timedelta(hours=1)
    bench.receive("1.2.3.1.2")
    bench.clock.start -= timedelta(hours=2)  # set back by NTP: both images are of the future now
    bench.route(bench.plan(late_instances=LatePolicy.IGNORE))
    bench.receive("1.2.3.1.3")  # and this one, committed after the closing, is older than the job or not
    job = bench.leased()
    assert [instance.sop_instance_uid for instance in bench.queue.job_input(job)[0]] == ["1.2.3.1.1", "1.2.3.1.2"]


def test_an_input_that_is_missing_may_come_back(bench: Bench) -> None:
    bench.receive("1.2.3.1.1", "1.2.3.1.2")
    bench.route(bench.plan())
    job = bench.leased()

    def mark(state: str) -> None:
        bench.database.write(
            lambda connection: connection.execute(
                "UPDATE instance SET state = ? WHERE sop_instance_uid = '1.2.3.1.2'", (state,)
            )
        )

    mark("missing")
    with pytest.raises(StorageError):
        bench.queue.job_input(job)
    mark("present")
    assert len(bench.queue.job_input(job)[0]) == 2


def test_what_was_the_nodes_fault_is_counted_apart_until_a_person_retries(bench: Bench) -> None:
    job = _with_job(bench)
    bench.queue.retry_job_later(job, "no space", 0, outage=True)
    job = bench.leased()
    assert (job.attempts, job.outages) == (2, 1)
    bench.queue.retry_job_later(job, "late", 0)
    job = bench.leased()
    assert (job.attempts, job.outages) == (3, 1)
    bench.queue.give_up_job(job, "no")
    bench.queue.retry_job(job.id)
    assert (bench.queue.job(job.id).attempts, bench.queue.job(job.id).outages) == (0, 0)


# --- closing ---------------------------------------------------------------------------------------------------------


def test_a_glance_sees_what_is_open_and_that_more_of_it_came(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    first = bench.queue.open_at_a_glance()
    assert (set(first.marks), first.associations) == ({STUDY}, frozenset())
    assert bench.queue.open_at_a_glance() == first
    assert list(bench.queue.open_studies([])) == list(bench.queue.open_studies(["9.9"])) == []
    assert bench.queue.open_studies([STUDY, "9.9"]) == bench.queue.open_studies()
    bench.clock.sleep(0.001)
    bench.receive("1.2.3.1.2")
    assert bench.queue.open_at_a_glance().marks != first.marks
    bench.route(bench.plan())
    assert bench.queue.open_at_a_glance().marks == {}
    assert bench.queue.open_studies([STUDY]) == []


def test_an_image_that_comes_while_routing_leaves_its_series_open(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    bench.receive("1.2.3.2.1", series="1.2.3.2")
    (activity,) = bench.queue.open_studies()
    bench.receive("1.2.3.1.2")
    routed = [bench.routed(bench.plan()), bench.routed(bench.plan(series="1.2.3.2"), series="1.2.3.2")]
    (job,) = bench.queue.route_series(activity, routed, CloseTrigger.IDLE, "d")
    assert bench.queue.job(job).series_instance_uid == "1.2.3.2"
    (activity,) = bench.queue.open_studies()
    assert activity.pending_series == (SERIES,)
    assert bench.queue.verdicts(STUDY)[0].series_instance_uid == "1.2.3.2"
    bench.balanced()


def test_two_routers_close_a_series_once(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    (activity,) = bench.queue.open_studies()
    routed = [bench.routed(bench.plan())]
    assert len(bench.queue.route_series(activity, routed, CloseTrigger.IDLE, "d")) == 1
    before = bench.dump()
    assert bench.queue.route_series(activity, routed, CloseTrigger.IDLE, "d") == []
    assert bench.dump() == before


def test_activity_tells_what_completion_needs(bench: Bench) -> None:
    bench.receive("1.2.3.1.1", modality="DX")
    first = bench.clock.boot()
    bench.clock.sleep(5)
    bench.receive("1.2.3.2.1", "1.2.3.2.2", series="1.2.3.2")
    bench.receive("1.2.3.3.1", series="1.2.3.3", modality="SR", sop_class=SR)
    (activity,) = bench.queue.open_studies()
    assert (activity.first_received, activity.last_received) == (first, bench.clock.boot())
    assert activity.modalities == {"CT", "DX"}
    assert sorted(activity.pending_series) == [SERIES, "1.2.3.2"]
    assert activity.immediate_series == (SERIES,)
    assert activity.instance_count == 3


def test_documents_and_results_that_come_back_open_nothing(bench: Bench) -> None:
    job = _with_job(bench)
    seg, _ = bench.finish(job)
    bench.receive("1.2.3.9.1", series="1.2.3.9", modality="KO", sop_class=SR)
    bench.receive(seg, series="2.25.8", modality="SEG", sop_class=SEG, content="altered")
    assert bench.queue.open_studies() == []
    assert bench.queue.snapshot()["ledger"]["reasons"] == {"no images": 1}


def test_one_series_uid_in_two_studies_is_two_series(bench: Bench) -> None:
    bench.receive("5.1", study="1.5")
    bench.receive("6.1", study="1.6")
    (first,) = bench.route(bench.plan(), study="1.5")
    assert [activity.study_instance_uid for activity in bench.queue.open_studies()] == ["1.6"]
    (second,) = bench.route(bench.plan(), study="1.6")
    assert [bench.queue.job(job).run_number for job in (first, second)] == [1, 1]
    assert [instance.sop_instance_uid for instance in bench.queue.job_input(bench.leased())[0]] == ["5.1"]
    assert bench.balanced()["routed"] == 2


def test_verdicts_and_history_are_kept_with_the_values_seen(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    start = bench.clock.wall()
    bench.route(bench.plan())
    (verdict,) = bench.queue.verdicts(STUDY)
    assert verdict == bench.routed(bench.plan()).verdicts[0]
    (view,) = bench.queue.series_history(start)
    assert (view.study_instance_uid, view.header.values["Modality"]) == (STUDY, ("CT",))
    assert view.source.calling_ae_title == "CT1"
    assert (view.study_series_count, view.study_instance_count, view.study_modalities) == (1, 1, ("CT",))
    assert view.origins == {Origin.RECEIVED}
    assert list(bench.queue.series_history(start + timedelta(seconds=1))) == []


def test_a_study_under_two_identities_is_judged_but_not_analysed_until_released(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    bench.receive("1.2.3.1.2", patient="P2")
    assert bench.route(bench.plan()) == []
    assert bench.queue.verdicts(STUDY)[0].matched
    assert bench.balanced()["waiting"] == 1
    assert [item.kind for item in bench.queue.stuck()] == ["conflict"]
    bench.queue.release_study(STUDY)
    assert len(bench.route(bench.plan())) == 1
    assert bench.leased().study_instance_uid == STUDY
    with pytest.raises(NotFound):
        bench.queue.release_study("1.9.9")


def test_a_job_made_before_the_second_identity_came_is_held_back(bench: Bench) -> None:
    bench.receive("1.2.3.1.1")
    bench.route(bench.plan(late_instances=LatePolicy.IGNORE))
    bench.receive("1.2.3.2.1", series="1.2.3.2", patient="P2")
    assert bench.queue.lease_job("w", 30) is None
    assert any(item.kind == "job" and "identity" in item.why for item in bench.queue.stuck())
    careless = SqliteQueue(bench.database, str, bench.clock, QueueOptions(analyse_conflicts=True))
    assert careless.lease_job("w", 30) is not None


# --- results and deliveries ------------------------------------------------------------------------------------------


def test_finishing_makes_results_visible_and_queues_them_in_order(bench: Bench) -> None:
    job = _with_job(bench, destinations=("PACS", "SR_ONLY"))
    seg, sr = bench.finish(job)
    assert [instance.sop_instance_uid for instance in bench.queue.job_results(job.id)] == [seg, sr]
    pacs = bench.queue.lease_delivery("c", 30, "PACS")
    only = bench.queue.lease_delivery("c", 30, "SR_ONLY")
    assert pacs is not None and only is not None
    assert [item.instance.sop_instance_uid for item in pacs.items] == [seg, sr]
    assert [item.instance.sop_instance_uid for item in only.items] == [sr]
    assert (pacs.job_id, pacs.study_instance_uid) == (job.id, STUDY)


def test_a_result_that_is_there_already_is_adopted(bench: Bench) -> None:
    job = _with_job(bench)
    first = bench.results(job)[0]
    stored = replace(first, file=replace(first.file, sha256="0" * 64))
    bench.database.write(lambda connection: insert_instance(connection, stored, ConflictPolicy.KEEP_FIRST))
    bench.finish(job)
    assert bench.queue.job_results(job.id)[0].sha256 == "0" * 64
    assert bench.queue.snapshot()["variants"] == {}


@pytest.mark.parametrize(("what", "kinds"), [(SendWhat.SOURCE, ["CT"]), (SendWhat.BOTH, ["CT", "SEG", "SR"])])
def test_the_source_goes_at_once_and_results_when_there(bench: Bench, what: SendWhat, kinds: list[str]) -> None:
    job = _with_job(bench, send_what=what)
    sent = []
    for _ in range(2):
        while delivery := bench.queue.lease_delivery("c", 30, "PACS"):
            sent += [item.instance.modality for item in delivery.items]
            for item in delivery.items:
                bench.queue.item_sent(delivery, item.instance.sop_instance_uid, 0)
            bench.queue.finish_delivery(delivery)
        if bench.queue.job(job.id).state is JobState.LEASED:
            assert sent == ["CT"]
            bench.finish(job)
    assert sent == kinds


def test_a_rule_without_engine_sends_each_image_once(bench: Bench) -> None:
    plan = bench.plan(engine="", results=(), send_what=SendWhat.SOURCE)
    bench.receive("1.2.3.1.1")
    assert bench.route(plan) == []
    assert bench.balanced()["routed"] == 1
    bench.receive("1.2.3.1.2")
    bench.route(plan)
    activity = bench.queue.reopen_study(STUDY, again=False)
    bench.queue.route_series(activity, [bench.routed(plan)], CloseTrigger.OPERATOR, "d")  # nothing new: nothing queued
    sent = [[item.instance.sop_instance_uid for item in d.items] for d in reversed(bench.queue.deliveries())]
    assert sent == [["1.2.3.1.1"], ["1.2.3.1.2"]]
    activity = bench.queue.reopen_study(STUDY, again=True)
    bench.queue.route_series(activity, [bench.routed(plan)], CloseTrigger.OPERATOR, "d")
    assert len(bench.queue.deliveries()[0].items) == 2


def _with_delivery(bench: Bench) -> None:
    bench.finish(_with_job(bench, destinations=("PACS", "ARCHIVE")))


def test_one_delivery_per_destination_is_leased_at_a_time(bench: Bench) -> None:
    _with_delivery(bench)
    bench.receive("8.1", study="1.8", series="1.8.1")
    bench.route(bench.plan(series="1.8.1"), study="1.8", series="1.8.1")
    bench.finish(bench.leased())
    first = bench.queue.lease_delivery("c", 30, "PACS")
    assert first is not None
    assert bench.queue.lease_delivery("c2", 30, "PACS") is None
    assert bench.queue.lease_delivery("c2", 30, "ARCHIVE") is not None
    bench.queue.retry_delivery_later(first, "down", 60)
    second = bench.queue.lease_delivery("c", 30, "PACS")
    assert second is not None and second.id != first.id  # the next one need not wait for the delay of the first


def test_what_was_sent_is_not_sent_again_after_a_crash(bench: Bench) -> None:
    _with_delivery(bench)
    delivery = bench.queue.lease_delivery("c", 30, "PACS")
    assert delivery is not None
    bench.queue.item_sent(delivery, delivery.items[0].instance.sop_instance_uid, 0xB000)
    bench.clock.sleep(31)
    again = bench.queue.lease_delivery("c2", 30, "PACS")
    assert again is not None
    assert [(item.sent, item.dimse_status) for item in again.items] == [(True, 0xB000), (False, None)]
    assert (again.attempts, again.token) == (2, 2)
    before = bench.dump()
    stale: list[Callable[[], object]] = [
        lambda: bench.queue.extend_delivery(delivery, 30),
        lambda: bench.queue.item_sent(delivery, delivery.items[1].instance.sop_instance_uid, 0),
        lambda: bench.queue.item_failed(delivery, delivery.items[1].instance.sop_instance_uid, 0xC000, "no"),
        lambda: bench.queue.finish_delivery(delivery),
        lambda: bench.queue.retry_delivery_later(delivery, "later", 5),
        lambda: bench.queue.give_up_delivery(delivery, "never"),
    ]
    for write in stale:
        with pytest.raises(LeaseLost):
            write()
    assert bench.dump() == before


def test_a_refused_object_makes_a_dead_letter_that_a_person_can_retry(bench: Bench) -> None:
    _with_delivery(bench)
    delivery = bench.queue.lease_delivery("c", 30, "PACS")
    assert delivery is not None
    seg, sr = (item.instance.sop_instance_uid for item in delivery.items)
    bench.queue.item_failed(delivery, seg, 0x0122, "SOP class not supported")
    bench.queue.item_sent(delivery, sr, 0)
    bench.queue.finish_delivery(delivery)
    failed = next(d for d in bench.queue.deliveries() if d.id == delivery.id)
    assert failed.state is DeliveryState.FAILED
    assert bench.queue.snapshot()["dead_letters"] == {"jobs": 0, "deliveries": 1}
    (stuck,) = [item for item in bench.queue.stuck() if item.id == delivery.id and item.kind == "delivery"]
    assert "1 of 2" in stuck.why and "not supported" in stuck.why and stuck.next_s is None
    bench.queue.retry_delivery(delivery.id)
    again = bench.queue.lease_delivery("c", 30, "PACS")
    assert again is not None
    assert [(item.sent, item.error) for item in again.items] == [(False, ""), (True, "")]
    bench.queue.cancel_delivery(again.id)
    with pytest.raises(LeaseLost):
        bench.queue.finish_delivery(again)
    with pytest.raises(IllegalTransition):
        bench.queue.cancel_delivery(again.id)


def test_a_destination_that_left_the_configuration_is_reported(bench: Bench) -> None:
    _with_delivery(bench)
    why = {item.name: item.why for item in bench.queue.stuck(destinations={"PACS"}) if item.kind == "delivery"}
    assert why == {"PACS": "in the queue", "ARCHIVE": "the destination is not in the configuration any more"}


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_tells_where_each_series_stands(bench: Bench) -> None:
    for number in range(7):
        bench.receive(f"7.{number}.1", study=f"7.{number}", series=f"7.{number}.0")

    def route(number: int, *plans: PlannedJob, failure: str = "") -> None:
        activity = next(a for a in bench.queue.open_studies() if a.study_instance_uid == f"7.{number}")
        routed = bench.routed(*plans, series=f"7.{number}.0", failure=failure)
        bench.queue.route_series(activity, [routed], CloseTrigger.IDLE, "d")

    for number in (1, 2, 3, 4):
        route(number, bench.plan(series=f"7.{number}.0"))
    route(5)
    route(6, failure="the files cannot be read")
    bench.finish(bench.leased())
    bench.queue.reject_job(bench.leased(), "not an abdomen")
    bench.queue.give_up_job(bench.leased(), "broken")
    ledger = bench.balanced()
    assert ledger | {"reasons": None} == {
        "received": 7, "routed": 2, "filtered": 2, "waiting": 1, "failed": 2, "imbalance": 0, "reasons": None,
    }  # fmt: skip
    assert ledger["reasons"] == {"no rule matched": 1, "rejected by the engine": 1}  # type: ignore[comparison-overlap]
    stuck = {item.kind: item for item in bench.queue.stuck(waits_for=lambda activity: ("5 s of quiet", 5.0))}
    assert stuck["study"].why.endswith("5 s of quiet") and stuck["study"].next_s == 5.0
    assert stuck["series"].why == "the files cannot be read"
    assert {item.why for item in bench.queue.stuck() if item.kind == "job"} == {"broken", "in the queue"}


def test_what_is_lost_unbalances_the_ledger(bench: Bench) -> None:
    """The check can fail: a closing without its job, one without a trace."""
    bench.receive("1.2.3.1.1")
    bench.receive("1.4.1.1", study="1.4", series="1.4.1")
    bench.route(bench.plan())
    bench.balanced()

    def lose(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM job_input")
        connection.execute("DELETE FROM job")
        stand(connection, STUDY, SERIES)
        connection.execute("UPDATE series SET routing = 'routed'")

    bench.database.write(lose)
    snapshot = bench.queue.snapshot()
    assert snapshot["ledger"]["imbalance"] == snapshot["ledger_studies"]["imbalance"] == 2


def test_an_audit_sees_a_standing_that_is_not_what_the_rows_say(bench: Bench) -> None:
    job = _with_job(bench)
    bench.balanced()
    bench.database.write(lambda connection: connection.execute("UPDATE job SET state = 'failed'").close())
    with bench.database.read() as connection:
        assert audit(connection) == [(STUDY, SERIES)]
    assert job.state is JobState.LEASED


def test_snapshot_counts_states_and_ages(bench: Bench) -> None:
    _with_delivery(bench)
    bench.receive("8.1", study="1.8", series="1.8.1")
    bench.clock.sleep(42)
    snapshot = bench.queue.snapshot()
    assert snapshot["studies"] == {"total": 2, "open": 1, "oldest_open_age_s": 42.0, "identity_conflicts": 0}
    assert snapshot["jobs"]["done"] == {"count": 1, "oldest_age_s": 0.0}
    assert snapshot["jobs"]["pending"] == {"count": 0, "oldest_age_s": 0.0}
    assert snapshot["deliveries"]["PACS"]["pending"] == {"count": 1, "oldest_age_s": 42.0}
    assert snapshot["instances"] == 4
    assert set(snapshot["jobs"]) == {state.value for state in JobState}


@pytest.mark.parametrize("seed", range(4))
def test_the_ledger_balances_after_every_step_of_a_random_walk(bench: Bench, seed: int) -> None:
    """Studies, late images, conflicts, closings, leases that end in every way, retries: nothing goes missing."""
    chance = random.Random(seed)
    sent: set[tuple[str, str]] = set()
    serial = 0

    def receive() -> None:
        nonlocal serial
        serial += 1
        study, series = f"1.{chance.randrange(4)}", f"2.{chance.randrange(3)}"
        modality = chance.choice(["CT", "CT", "CT", "SR"])
        patient = "P2" if chance.random() < 0.05 else "P1"
        bench.receive(
            f"3.{serial}", study=study, series=series, modality=modality, patient=patient,
            sop_class=SR if modality == "SR" else CT,
        )  # fmt: skip
        sent.add((study, series))

    def close() -> None:
        activities = bench.queue.open_studies()
        if not activities:
            return
        activity = chance.choice(activities)
        if chance.random() < 0.2:
            receive()  # a late one, maybe into this study
        routed = []
        for series in activity.pending_series:
            plans = [
                bench.plan(
                    rule=rule,
                    series=series,
                    engine=chance.choice(["ct-abdomen", "ct-abdomen", ""]),
                    late_instances=chance.choice(list(LatePolicy)),
                    send_what=chance.choice(list(SendWhat)),
                )
                for rule in chance.sample(["a", "b"], chance.randrange(3))
            ]
            failure = "unreadable" if chance.random() < 0.1 else ""
            routed.append(bench.routed(*([] if failure else plans), series=series, failure=failure))
        bench.queue.route_series(activity, routed, CloseTrigger.IDLE, "d")

    def work() -> None:
        job = bench.queue.lease_job("w", 30)
        if job is None:
            return
        end = chance.choice(["finish", "reject", "later", "park", "give_up", "die"])
        if end == "finish":
            bench.finish(job)
        elif end == "reject":
            bench.queue.reject_job(job, "no")
        elif end == "later":
            bench.queue.retry_job_later(job, "busy", 5)
        elif end == "park":
            bench.queue.park_job(job, Pending(handle="h", poll_after_s=5))
        elif end == "give_up":
            bench.queue.give_up_job(job, "broken")

    def meddle() -> None:
        for job in bench.queue.jobs():
            if chance.random() < 0.2:
                move = chance.choice([bench.queue.retry_job, bench.queue.cancel_job])
                try:
                    move(job.id)
                except IllegalTransition:
                    continue
        if chance.random() < 0.3:
            bench.queue.release_study(chance.choice(sorted(sent))[0])
        if chance.random() < 0.3:
            study = chance.choice(sorted(sent))[0]
            activity = bench.queue.reopen_study(study, again=chance.random() < 0.5)
            routed = [bench.routed(bench.plan("a", uid), series=uid) for uid in activity.pending_series]
            bench.queue.route_series(activity, routed, CloseTrigger.OPERATOR, "d")

    receive()
    for _ in range(120):
        chance.choices([receive, close, work, meddle], weights=[4, 3, 4, 1])[0]()
        bench.clock.sleep(chance.choice([0.0, 3.0, 40.0]))
        assert bench.balanced()["received"] == len(sent)
    runs = [(job.study_instance_uid, job.series_instance_uid, job.rule, job.run_number) for job in bench.queue.jobs()]
    assert len(runs) == len(set(runs)) > 0
