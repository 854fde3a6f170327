"""Retention: what goes by which rule, what stays and why, what is told, and kill -9 at each step."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome
from dicom_node.errors import DeliveryError, DeliveryUnavailable, StorageError
from dicom_node.interfaces import RoutedSeries
from dicom_node.model import (
    CloseTrigger,
    CommitmentTimes,
    ConflictPolicy,
    Destination,
    LatePolicy,
    Level,
    Priority,
    SendWhat,
    SeriesHeader,
)
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.fsck import fsck
from dicom_node.pipeline.retain import Fate, Retainer, Run
from dicom_node.retention import PERSON, PERSON_IS_HELD_BY, DeletionOrder, RetentionSettings, StudyHeld

DAY = 24 * 3600.0
SETTINGS = RetentionSettings.model_validate
DONE: dict[str, Any] = {"name": "done", "older_than": "1d"}
NONE: dict[str, Any] = {"name": "none", "deliveries": "none", "older_than": "2d"}


@dataclass
class Trail:
    """Keeps what it is told."""

    events: list[AuditEvent] = field(default_factory=list)
    takes: bool = True

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)

    def settled(self, timeout_s: float = 5.0) -> bool:
        return self.takes


@dataclass
class There:
    """What a destination says that it has: everything, unless `lacks`; `answer` None: it takes no queries."""

    bench: Any
    lacks: set[str] = field(default_factory=set)
    takes_queries: bool = True
    failure: DeliveryError | None = None
    asked: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)

    def find_instances(
        self, destination: Destination, study: str, series: Collection[str], heartbeat: Callable[[], None]
    ) -> frozenset[str] | None:
        self.asked.append((destination.name, study, tuple(series)))
        if self.failure is not None:
            raise self.failure
        heartbeat()
        kept = set(self.bench.peer.kept.get(destination.name, ()))
        return frozenset(kept - self.lacks) if self.takes_queries else None


@dataclass
class World:
    """A bench with deletion on it."""

    bench: Any
    trail: Trail
    there: There
    fates: list[Fate] = field(default_factory=list)

    def retainer(
        self,
        *rules: Mapping[str, Any],
        commitment: bool = False,
        asked: str = "auto",
        free: Callable[[], int] = lambda: 2**40,
        **settings: Any,
    ) -> Retainer:
        times = CommitmentTimes(wait_s=1.0, timeout_s=60.0) if commitment else None
        pacs = Destination(name="PACS", ae_title="PACS", host="127.0.0.1", port=104, commitment=times)
        return Retainer(
            self.bench.queue,
            self.deleter(),
            self.there,
            {"PACS": pacs},
            settings=SETTINGS({"rules": rules or (DONE, NONE), **settings}),
            asked={"PACS": asked},  # type: ignore[dict-item]
            free_bytes=free,
            clock=self.bench.clock,
        )

    def deleter(self, **more: Any) -> Deleter:
        return Deleter(self.bench.queue, self.bench.archive, ae_title="NODE", audit=self.trail, **more)

    def run(self, retainer: Retainer, *, dry: bool = False) -> Run:
        self.fates.clear()
        return retainer.run(dry=dry, tell=self.fates.append)

    def receive(self, number: int, *, send: bool = True, images: int = 2) -> str:
        """A study of a day of its own: images, routed to PACS as they came, or nowhere."""
        study, series = f"1.{number}", f"1.{number}.1"
        self.bench.receive(
            *(self.bench.dataset(f"{series}.{image}", study=study, series=series) for image in range(images))
        )
        if send:
            plan = self.bench.plan(
                engine="", series_instance_uid=series, send_what=SendWhat.SOURCE, priority=Priority.ROUTINE
            )
            self.bench.route(plan, study=study, series=series)
        else:
            self.route_nowhere(study, series)
        self.bench.clock.sleep(DAY)
        return study

    def route_nowhere(self, study: str, series: str) -> None:
        activity = next(one for one in self.bench.queue.open_studies() if one.study_instance_uid == study)
        header = SeriesHeader(series_instance_uid=series, instance_count=1, values={})
        routed = RoutedSeries(series_instance_uid=series, header=header, verdicts=(), jobs=())
        self.bench.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest")

    def deliver(self, **more: Any) -> None:
        courier = self.bench.courier(**more)
        while courier.run_once("PACS"):
            pass

    def studies(self) -> set[str]:
        return {row[0] for row in self.bench.database.rows("SELECT study_instance_uid FROM study")}

    def told(self) -> list[str]:
        return [held.reason.value for fate in self.fates for held in fate.held]


@pytest.fixture
def world(bench: Any) -> World:
    return World(bench, Trail(), There(bench))


def test_delivered_studies_go_by_age_once_they_are_found_there(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = world.receive(1), world.receive(2), world.receive(3, send=False)
    retainer = world.retainer()
    assert world.run(retainer).deleted == 0 and world.told() == ["deliveries", "deliveries"]
    world.deliver()
    with caplog.at_level(logging.INFO):
        dry = world.run(retainer, dry=True)
        assert dry.deleted == 2 and world.studies() == {first, second, third} and not world.trail.events
        assert [fate.safe for fate in world.fates] == [{"PACS": "found"}] * 2
        run = world.run(retainer)
    assert run.deleted == 2 and run.whole and run.bytes == dry.bytes > 0
    assert world.studies() == {third} and world.there.asked[-1] == ("PACS", second, (f"{second}.1",))
    assert world.bench.queue.ledger().totals["imbalance"] == 0
    assert world.bench.queue.deletions(first)[0].safe == {"PACS": "found"}
    assert world.run(retainer).deleted == 0
    world.bench.clock.sleep(DAY)
    assert world.run(retainer).deleted == 1 and not world.studies()
    assert [event.outcome for event in world.trail.events] == [AuditOutcome.SUCCESS] * 6
    assert {event.patient_ids for event in world.trail.events} == {("P1",)}
    assert world.trail.events[0].kind is AuditKind.STUDY_DELETED
    assert world.trail.events[0].instances == {"1.2.840.10008.5.1.4.1.1.2": 2}
    assert world.trail.events[0].detail == "deletion by retention rule done, begins: older than 24 h"
    assert world.trail.events[1].detail == "deletion by retention rule done, done"
    lines = [record.__dict__ for record in caplog.records if record.__dict__.get("action") == "study_deleted"]
    assert [line["study"] for line in lines] == [first, second]
    assert "Canary" not in caplog.text and "P1" not in json.dumps([str(line) for line in lines])


def test_what_the_destination_does_not_have_stays(world: World) -> None:
    study = world.receive(1)
    world.deliver()
    world.there.lacks = {f"{study}.1.1"}
    retainer = world.retainer()
    run = world.run(retainer)
    assert run.kept == {"not-found": 1} and "does not find 1 of 2 objects at PACS" in world.fates[0].held[0].text
    world.there.lacks = set()
    asked = len(world.there.asked)
    assert world.run(retainer).kept == {"not-found": 1} and len(world.there.asked) == asked  # not asked again at once
    world.bench.clock.sleep(3601)
    assert world.run(retainer).deleted == 1


@pytest.mark.parametrize(
    ("asked", "takes_queries", "kept"),
    [("auto", False, []), ("find", False, ["not-asked"]), ("accepted", True, [])],
)
def test_a_destination_without_queries_is_believed_where_that_was_said(
    world: World, asked: str, takes_queries: bool, kept: list[str]
) -> None:
    world.receive(1)
    world.deliver()
    world.there.takes_queries = takes_queries
    world.run(world.retainer(asked=asked))
    assert world.told() == kept
    if not kept:
        assert world.bench.queue.deletions()[0].safe == {"PACS": "accepted"}


def test_a_destination_that_is_down_or_gone_from_the_settings_keeps_its_studies(world: World) -> None:
    world.receive(1)
    world.receive(2)
    world.deliver()
    world.there.failure = DeliveryUnavailable("destination PACS: no association (no connection)")
    world.run(world.retainer())
    assert world.told() == ["not-asked"] * 2 and len(world.there.asked) == 1  # once for all of the run
    retainer = world.retainer()
    retainer._destinations = {}  # as after a restart without it
    world.run(retainer)
    assert world.told() == ["not-asked"] * 2 and "not configured" in world.fates[0].held[0].text


def test_where_commitment_is_offered_nothing_less_will_do(world: World, kit: ModuleType) -> None:
    study = world.receive(1)
    world.deliver()
    world.run(world.retainer(commitment=True))
    assert world.told() == ["uncommitted"] and not world.there.asked
    other = world.receive(2)
    world.deliver(asker=kit.Asker(kit.report_on))
    assert world.run(world.retainer(commitment=True)).deleted == 1
    assert world.studies() == {study} and world.bench.queue.deletions(other)[0].safe == {"PACS": "committed"}


def test_what_the_node_committed_to_stays_until_a_destination_committed_to_it(world: World, kit: ModuleType) -> None:
    study = world.receive(1)
    world.deliver()
    queue = world.bench.queue
    reference = kit.ObjectReference(kit.CT, f"{study}.1.0")
    request = queue.ask_commitment("CT1", "NODE", "1.99", [reference], 0.0)
    world.run(world.retainer())
    assert world.told() == ["peer-waits"]
    queue.judge_commitment(request, [0])
    queue.end_commitment(request)
    world.bench.clock.sleep(400 * DAY)
    assert queue.forget_commitments(DAY) == 1  # the request is forgotten, the promise is not
    world.run(world.retainer())
    assert world.told() == ["committed-to"]
    with pytest.raises(StudyHeld, match="committed to keeping 1 objects"):
        world.deleter().delete(by_person(study))
    question = "INSERT INTO commitment_question VALUES (1, '1.5', (SELECT id FROM delivery), 'PACS', 'now', 'now')"
    answer = (
        "INSERT INTO commitment_object SELECT 1, sop_instance_uid, sha256, 0, 'now' FROM instance "
        "WHERE sop_instance_uid = ?"
    )
    world.bench.database.write(
        lambda connection: (connection.execute(question), connection.execute(answer, (f"{study}.1.0",)))
    )
    assert world.run(world.retainer()).deleted == 1


def by_person(study: str, **more: Any) -> DeletionOrder:
    fields = {"rule": PERSON, "who": "root", "why": "asked for", "holds": PERSON_IS_HELD_BY} | more
    return DeletionOrder(study_instance_uid=study, **fields)


def test_a_person_is_refused_while_deliveries_are_open_and_that_is_told(world: World) -> None:
    study = world.receive(1)
    world.bench.clock.sleep(DAY)
    with pytest.raises(StudyHeld, match="1 deliveries are open"):
        world.deleter().delete(by_person(study))
    assert [event.outcome for event in world.trail.events] == [AuditOutcome.SUCCESS, AuditOutcome.MINOR_FAILURE]
    assert "not done: 1 deliveries are open" in world.trail.events[1].detail
    world.bench.peer.statuses["CT"] = 0xA900
    world.deliver()
    with pytest.raises(StudyHeld, match="1 deliveries failed"):
        world.deleter().delete(by_person(study))
    (delivery,) = world.bench.queue.deliveries()
    world.bench.queue.cancel_delivery(delivery.id)  # a person's own decision, and noted as such
    deletion = world.deleter().delete(by_person(study))
    assert world.trail.events[-1].participants[0].user == "root" and world.trail.events[-1].participants[0].is_requestor
    assert deletion.rule == PERSON and not world.studies()


def test_what_was_cancelled_was_not_delivered(world: World) -> None:
    world.receive(1)
    (delivery,) = world.bench.queue.deliveries()
    world.bench.queue.cancel_delivery(delivery.id)
    assert world.run(world.retainer(DONE)).deleted == 0 and not world.fates
    world.bench.clock.sleep(DAY)
    assert world.run(world.retainer(DONE, NONE)).deleted == 1


def late(world: World, number: int, *images: int, rerun: bool, **attributes: Any) -> None:
    """More of a study that was sent came, and is routed."""
    study, series = f"1.{number}", f"1.{number}.1"
    bench = world.bench
    bench.receive(*(bench.dataset(f"{series}.{image}", study=study, series=series, **attributes) for image in images))
    policy = LatePolicy.RERUN if rerun else LatePolicy.IGNORE
    plan = bench.plan(
        engine="",
        series_instance_uid=series,
        send_what=SendWhat.SOURCE,
        priority=Priority.ROUTINE,
        late_instances=policy,
    )
    bench.route(plan, study=study, series=series)
    bench.clock.sleep(DAY)


@pytest.mark.parametrize("rerun", [False, True])
def test_a_late_image_that_was_not_sent_keeps_the_study(world: World, rerun: bool) -> None:
    world.receive(1)
    world.deliver()
    late(world, 1, 7, rerun=rerun)
    world.deliver()
    run = world.run(world.retainer())
    assert (run.deleted, world.told()) == ((1, []) if rerun else (0, ["unsent"]))


@pytest.mark.parametrize("rerun", [False, True])
def test_what_replaced_an_object_that_was_sent_keeps_the_study_until_it_is_sent(world: World, rerun: bool) -> None:
    world.receive(1)
    world.deliver()
    world.bench.ingest._conflict_policy_for = lambda source: ConflictPolicy.REPLACE
    late(world, 1, 0, rerun=rerun, StudyDescription="other")
    assert len(world.bench.catalog.index.variants("1.1.1.0")) == 1
    world.deliver()
    run = world.run(world.retainer())  # the destination has that UID, and other content under it
    assert (run.deleted, world.told()) == ((1, []) if rerun else (0, ["unsent"]))


def test_objects_that_another_study_is_still_sending_keep_their_own(world: World) -> None:
    study = world.receive(1, send=False)
    world.receive(2)
    add = (
        "INSERT INTO delivery_item (delivery, position, sop_instance_uid, sha256) "
        "SELECT (SELECT max(id) FROM delivery), 99, sop_instance_uid, sha256 FROM instance "
        "WHERE study_instance_uid = ? LIMIT 1"
    )
    world.bench.database.write(lambda connection: connection.execute(add, (study,)))
    world.bench.clock.sleep(5 * DAY)
    world.run(world.retainer(NONE))
    assert world.told() == ["deliveries"] and study in world.studies()


def test_a_quarantined_part_keeps_the_study(world: World) -> None:
    study = world.receive(1, send=False)
    with pytest.raises(StudyHeld, match="quarantine"):
        world.deleter(quarantined=lambda: frozenset({study})).delete(by_person(study))


def test_a_study_with_results_goes_as_a_whole_and_runs_anew_when_it_comes_again(world: World) -> None:
    bench, study, series = world.bench, "1.7", "1.7.1"
    bench.receive(bench.dataset("1.7.1.1", study=study, series=series))
    bench.route(bench.plan(series_instance_uid=series), study=study, series=series)
    assert bench.worker().run_once("w")
    world.deliver()
    results = [one.sop_instance_uid for one in bench.produced()]
    bench.clock.sleep(DAY)
    assert world.run(world.retainer()).deleted == 1
    assert not list(bench.archive.locations()) and not bench.queue.jobs() and not bench.queue.deliveries()
    bench.receive(bench.dataset("1.7.1.1", study=study, series=series))
    assert len(bench.route(bench.plan(series_instance_uid=series), study=study, series=series)) == 1
    assert bench.worker().run_once("w")
    assert [one.sop_instance_uid for one in bench.produced()] == results  # the same run of the same input: same UIDs


# --- rules and quotas ------------------------------------------------------------------------------------------------


def test_the_first_rule_that_is_about_a_study_decides(world: World) -> None:
    world.receive(1, send=False)
    keep = {"name": "keep", "calling_ae_titles": ["CT1"], "deliveries": "none"}
    assert world.run(world.retainer(keep, NONE)).whole and not world.fates
    world.bench.clock.sleep(5 * DAY)
    for other in (
        {"calling_ae_titles": ["MR1"]},
        {"modalities": ["MR"]},
        {"routing_rules": ["chest"]},
        {"origin": "produced"},
        {"deliveries": "done"},
    ):
        assert world.run(world.retainer({**keep, **other, "older_than": "1h"})).deleted == 0
        assert not world.fates
    fitting = {"modalities": ["CT", "SR"], "calling_ae_titles": ["CT1"], "origin": "received", "older_than": "1h"}
    assert world.run(world.retainer({**keep, **fitting})).deleted == 1


def test_a_quota_takes_the_oldest_and_tells_when_it_cannot_be_met(world: World) -> None:
    studies = [world.receive(number, send=False) for number in (1, 2, 3)]
    held = studies[0]
    in_conflict = "UPDATE study SET identity_conflict = 1 WHERE study_instance_uid = ?"
    world.bench.database.write(lambda connection: connection.execute(in_conflict, (held,)))
    each = world.bench.queue.study_contents(held)[2]
    rule = {"name": "small", "deliveries": "none", "keep_bytes": 2 * each}
    run = world.run(world.retainer(rule))
    assert (run.deleted, run.over_bytes, run.kept) == (1, {"small": 0}, {"identity-conflict": 1})
    assert world.studies() == {held, studies[2]}
    run = world.run(world.retainer({**rule, "keep_bytes": each // 2}))
    assert world.studies() == {held} and run.over_bytes == {"small": each - each // 2}
    assert "its rule keeps" in world.fates[0].why


def test_free_space_is_made_and_the_young_are_spared(world: World) -> None:
    old = world.receive(1, send=False)
    young = "1.2"
    world.bench.receive(world.bench.dataset("1.2.1.1", study=young, series="1.2.1"))
    world.route_nowhere(young, "1.2.1")
    world.bench.clock.sleep(600)
    rule = {"name": "room", "deliveries": "none", "free_bytes": 1000}
    assert world.run(world.retainer(rule, free=lambda: 1000)).deleted == 0
    run = world.run(world.retainer(rule, free=lambda: 100), dry=True)
    assert [fate.study_instance_uid for fate in world.fates] == [old]
    run = world.run(world.retainer(rule, free=lambda: 100))
    assert world.studies() == {young} and run.over_bytes == {"room": 900}


def test_no_more_goes_than_what_is_lacking_where_deleting_frees_nothing(world: World) -> None:
    studies = [world.receive(number, send=False) for number in range(3)]
    each = world.bench.queue.study_contents(studies[0])[2]
    rule = {"name": "room", "deliveries": "none", "free_bytes": each + 100}
    run = world.run(world.retainer(rule, free=lambda: 100))  # a snapshot keeps all that is deleted
    assert run.deleted == 1 and world.studies() == set(studies[1:]) and run.over_bytes == {"room": each}


def test_a_run_ends_where_files_cannot_be_removed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [world.receive(number, send=False) for number in range(3)]

    def fails(location: str) -> None:
        raise StorageError("a file cannot be removed: Read-only file system")

    world.bench.clock.sleep(5 * DAY)
    with monkeypatch.context() as patched:
        patched.setattr(world.bench.archive, "remove", fails)
        run = world.run(world.retainer())
        assert (run.deleted, run.whole) == (1, False)
        with pytest.raises(StorageError):  # what each tick of the node does before its next run
            world.deleter().finish_all()
    assert world.studies() == set(studies[1:])


def test_sizes_are_summed_up_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [world.receive(number, send=False) for number in range(3)]
    summed: list[str] = []
    queue = type(world.bench.queue)
    study_bytes = queue.study_bytes

    def counted(part: Any, study: str) -> int:
        summed.append(study)
        return study_bytes(part, study)

    monkeypatch.setattr(queue, "study_bytes", counted)
    retainer = world.retainer({"name": "small", "deliveries": "none", "keep_bytes": 2**30})
    for _ in range(3):
        world.run(retainer)
    assert summed == studies
    world.bench.receive(world.bench.dataset("1.1.1.9", study="1.1", series="1.1.1"))
    world.run(retainer)
    assert summed == [*studies, "1.1"]


def test_what_is_too_young_for_every_rule_is_not_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        world.receive(number, send=False)
    pages: list[int] = []
    monkeypatch.setattr("dicom_node.pipeline.retain.PAGE", 1)
    queue = type(world.bench.queue)
    page_of = queue.studies_to_keep

    def counted(part: Any, after: tuple[str, str], limit: int) -> Any:
        pages.append(limit)
        return page_of(part, after, limit)

    monkeypatch.setattr(queue, "studies_to_keep", counted)
    for age, looked_at in (("4w", 1), ("52000000w", 1), ("1h", 4)):
        pages.clear()
        run = world.run(world.retainer({**NONE, "older_than": age}), dry=True)
        assert (len(pages), run.whole, run.deleted) == (looked_at, True, 3 if age == "1h" else 0)
    pages.clear()
    assert world.run(world.retainer({"name": "room", "deliveries": "none", "free_bytes": 1})).whole
    assert len(pages) == 1  # there is room


def test_a_run_is_bounded_and_the_next_goes_on(world: World) -> None:
    for number in range(5):
        world.receive(number, send=False)
    world.bench.clock.sleep(5 * DAY)
    retainer = world.retainer(studies_per_run=2)
    runs = [world.run(retainer) for _ in range(3)]
    assert [(run.deleted, run.whole) for run in runs] == [(2, False), (2, False), (1, True)]


def test_rules_are_checked() -> None:
    for wrong in (
        {"rules": [DONE, DONE]},
        {"rules": [{"name": PERSON}]},
        {"rules": [{"name": "a", "older_than": "soon"}]},
        {"rules": [{"name": "a", "keep_bytes": -1}]},
    ):
        with pytest.raises(ValueError, match=r"person|no age|two are named|greater"):
            SETTINGS(wrong)
    assert SETTINGS({"rules": [{"name": "a", "older_than": "2w"}]}).rules[0].older_than == 14 * DAY


# --- dying, and a failing disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["told", "begun", "first removed", "synced"])
def test_killed_at_any_step_the_next_process_goes_on(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int], point: str
) -> None:
    bench = kit.Bench(tmp_path)
    world = World(bench, Trail(), There(bench))
    bench.receive(*(bench.dataset(f"1.2.3.1.{number}") for number in range(3)))
    world.route_nowhere(kit.STUDY, kit.SERIES)
    bench.close()
    assert killed_at(tmp_path, "delete", point) == -9

    bench = kit.Bench(tmp_path)
    world = World(bench, Trail(), There(bench))
    assert bench.queue.ledger().totals["imbalance"] == 0
    kept = len(list(bench.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [kit.STUDY]})))
    assert kept == (3 if point == "told" else 0)
    assert fsck(bench.catalog, rebuild=True, verify_hashes=True, clock=bench.clock).clean
    ended = world.deleter().finish_all()
    assert ended == (0 if point == "told" else 1)
    assert len(list(bench.archive.locations())) == kept
    assert [event.detail for event in world.trail.events] == ["deletion by retention rule old, done"] * ended
    assert all(event.patient_ids == ("P1",) for event in world.trail.events)
    bench.close()


def test_files_that_cannot_be_removed_are_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = world.receive(1, send=False)
    with monkeypatch.context() as patched:

        def fails(location: str) -> None:
            raise StorageError("a file cannot be removed: Read-only file system")

        patched.setattr(world.bench.archive, "remove", fails)
        world.deleter().delete(by_person(study))
    assert "deletion_unfinished" in str([record.__dict__ for record in caplog.records])
    assert not world.studies() and len(world.bench.queue.unfinished_deletions()) == 1
    assert world.deleter().finish_all() == 1 and not list(world.bench.archive.locations())


def test_a_deletion_is_not_forgotten_before_the_audit_trail_has_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    study = world.receive(1, send=False)
    world.trail.takes = False
    deleter = world.deleter()
    order = DeletionOrder(study_instance_uid=study, rule=PERSON, who="root", why="asked for", holds=PERSON_IS_HELD_BY)
    deleter.delete(order)
    assert not world.studies() and not list(world.bench.archive.locations())  # a full disk gets its room
    assert "before the audit trail has it on disk" in caplog.text and "could not be ended" in caplog.text
    with pytest.raises(StorageError, match="audit trail"):
        deleter.finish_all()
    assert [event.detail.rpartition(" ")[2] for event in world.trail.events] == ["for", "done"]  # not at each try
    (left,) = world.bench.queue.unfinished_deletions()
    assert left.patient_ids == ("P1",)
    world.trail.takes = True
    world.trail.events.clear()
    assert world.deleter().finish_all() == 1  # the next process, of which nobody knows whether the last was heard
    (done,) = world.trail.events
    assert done.detail.endswith("done") and done.patient_ids == ("P1",)
    assert not world.bench.queue.unfinished_deletions()


def test_a_deletion_that_a_person_asked_for_in_vain_is_told(world: World) -> None:
    study = world.receive(1)
    deleter = world.deleter()
    held = deleter.held(study, PERSON_IS_HELD_BY)
    order = DeletionOrder(study_instance_uid=study, rule=PERSON, who="root", why="asked for", holds=PERSON_IS_HELD_BY)
    with pytest.raises(StudyHeld):
        deleter.refuse(order, held)
    (told,) = world.trail.events
    assert told.outcome is AuditOutcome.MINOR_FAILURE and told.detail.startswith("deletion by a person, not done: ")
    assert told.patient_ids == ("P1",) and world.studies() == {study}
