"""From complete studies to verdicts and jobs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicom_node.config import CompletionSettings
from dicom_node.errors import NotFound, StorageError
from dicom_node.model import (
    AssociationEnd,
    Condition,
    ConditionResult,
    JobState,
    Source,
    Verdict,
)
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.route import TRIES, Router, verdict_word
from dicom_node.routing.completion import due
from dicom_node.routing.load import load_rules

RULES = """\
rule: organs
when:
  - Modality == "CT"
run: {engine: ct-abdomen, results: [seg, sr]}
send: {to: [sender, PACS]}
"""
CHEST = """\
rule: chest
when:
  - Modality == "DX"
run: {engine: ct-abdomen, results: [sr], priority: urgent}
send: {to: [PACS]}
"""
DX = "1.2.840.10008.5.1.4.1.1.1.1"


class Node:
    """A bench with a router on real rules and real completion."""

    def __init__(self, bench: Any, kit: ModuleType, rules_dir: Path) -> None:
        self.bench = bench
        self.recorder = kit.Recorder()
        self.rules_dir = rules_dir
        self.reading: Callable[[Any], None] = lambda instances: None
        self.load()
        self.router = Router(
            bench.queue,
            read_header=self.read_header,
            due=lambda activity: due(activity, CompletionSettings(), bench.clock.boot()),
            rules=lambda: self.rules,
            destination_of={"CT1": "SCANNER"}.get,
            clock=bench.clock,
            observer=self.recorder,
        )

    def load(self) -> None:
        self.rules = load_rules(self.rules_dir, engines=["ct-abdomen"], destinations=["PACS", "SCANNER"])

    def read_header(self, instances: Any) -> Any:
        self.reading(instances)
        return read_series_header(instances)

    def jobs(self) -> list[tuple[str, str]]:
        return [(job.series_instance_uid, job.rule) for job in reversed(self.bench.queue.jobs())]


@pytest.fixture
def node(bench: Any, kit: ModuleType, tmp_path: Path) -> Node:
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "organs.yaml").write_text(RULES)
    (folder / "chest.yaml").write_text(CHEST)
    return Node(bench, kit, folder)


def looks_of(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """From now on, which studies each sweep reads."""
    looks: list[list[str]] = []
    look = bench.queue.open_studies

    def asked(only: Any) -> Any:
        looks.append(sorted(only))
        return look(only)

    monkeypatch.setattr(bench.queue, "open_studies", asked)
    return looks


def test_a_study_is_routed_when_it_was_quiet_long_enough(node: Node, kit: ModuleType) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    due_s = node.bench.clock.boot().seconds + 10
    assert node.router.next_due_s is None
    assert node.router.sweep() == 0
    assert node.router.next_due_s == pytest.approx(due_s)
    node.bench.clock.sleep(9)
    assert node.router.sweep() == 0
    node.bench.clock.sleep(1)
    assert node.router.sweep() == 1
    assert node.router.sweep() == 0 and node.router.next_due_s is None
    (job,) = node.bench.queue.jobs()
    assert (job.rule, job.state, job.destinations) == ("organs", JobState.PENDING, ("SCANNER", "PACS"))
    verdicts = {verdict.rule: verdict for verdict in node.bench.queue.verdicts(kit.STUDY)}
    assert verdicts["organs"].matched and not verdicts["chest"].matched
    assert verdicts["chest"].conditions[0].values == {"Modality": "CT"}
    assert node.router.sweep() == 0
    assert node.recorder.named("study_closed") == [("idle", 1, 10.0, True)]
    assert sorted(node.recorder.named("rule_evaluated")) == [("chest", "nomatch"), ("organs", "match")]


def test_an_open_association_holds_the_study_and_an_abort_holds_it_longer(node: Node) -> None:
    log = node.bench.catalog.index
    log.open_association("a1", Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1"))
    node.bench.receive(node.bench.dataset("1.2.3.1.1"), association="a1")
    node.bench.clock.sleep(30)
    assert node.router.sweep() == 0
    log.end_association("a1", AssociationEnd.ABORTED)
    node.bench.clock.sleep(200)
    assert node.router.sweep() == 0
    node.bench.clock.sleep(100)
    assert node.router.sweep() == 1


def test_a_study_that_waits_is_looked_at_again_only_when_something_happened_to_it(
    node: Node, kit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender of a whole archive keeps thousands of studies open, and each tick would read them all."""
    bench, log = node.bench, node.bench.catalog.index
    looks = looks_of(bench, monkeypatch)
    log.open_association("a1", Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1"))
    bench.receive(bench.dataset("7.1", study="7", series="7.0"))
    bench.receive(bench.dataset("8.1", study="8", series="8.0"), association="a1")
    assert [node.router.sweep() for _ in range(3)] == [0, 0, 0]
    assert looks == [["7", "8"], [], []]
    bench.clock.sleep(1)
    bench.receive(bench.dataset("7.2", study="7", series="7.0"))
    assert [node.router.sweep() for _ in range(2)] == [0, 0]
    assert looks[3:] == [["7"], []]
    log.end_association("a1", AssociationEnd.RELEASED)  # sooner than it would have been idle
    assert [node.router.sweep() for _ in range(2)] == [0, 0]
    assert looks[5:] == [["8"], []]
    assert node.router.next_due_s == pytest.approx(bench.clock.boot().seconds + 9)
    bench.clock.sleep(9)
    assert node.router.sweep() == 1
    assert len(looks) == 8 and "8" in looks[7]
    bench.clock.sleep(1)
    assert node.router.sweep() == 1
    assert len(looks) == 9 and "7" in looks[8]
    assert node.router.sweep() == 0 and node.router.next_due_s is None


def test_what_comes_while_a_sweep_looks_is_seen_by_the_next_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, look = node.bench, node.bench.queue.open_studies
    bench.receive(bench.dataset("1.2.3.1.1"))

    def while_it_is_read(only: Any) -> Any:
        read = look(only)
        monkeypatch.setattr(bench.queue, "open_studies", look)
        bench.clock.sleep(0.001)
        bench.receive(bench.dataset("1.2.3.2.1", series="1.2.3.2", Modality="DX", SOPClassUID=DX))
        return read

    monkeypatch.setattr(bench.queue, "open_studies", while_it_is_read)
    assert node.router.sweep() == 0
    assert node.router.sweep() == 1
    assert node.jobs() == [("1.2.3.2", "chest")]


def test_a_series_that_is_opened_without_a_new_instance_is_seen_too(node: Node) -> None:
    """As `release` and `fsck` do."""
    bench = node.bench
    dx = bench.dataset("1.2.3.2.1", series="1.2.3.2", Modality="DX", SOPClassUID=DX)
    bench.receive(bench.dataset("1.2.3.1.1"), dx)
    assert node.router.sweep() == 1
    assert node.router.sweep() == 0
    reopen = "UPDATE series SET routing = 'open' WHERE series_instance_uid = '1.2.3.2'"
    bench.database.write(lambda connection: connection.execute(reopen))
    assert node.router.sweep() == 1


def test_a_series_that_cannot_be_read_has_its_tries_though_its_study_goes_on(node: Node, kit: ModuleType) -> None:
    bench, tried = node.bench, []
    bench.receive(bench.dataset("1.2.3.1.1"))
    bench.clock.sleep(10)

    def reading(instances: Any) -> None:
        if instances[0].series_instance_uid == kit.SERIES:
            tried.append(bench.clock.boot().seconds - began_s)
            raise StorageError("EIO")

    node.reading, began_s = reading, bench.clock.boot().seconds
    node.router.sweep()
    bench.receive(bench.dataset("1.2.3.2.1", series="1.2.3.2"))  # the study is quiet again in 10 s
    for _ in range(80):
        node.router.sweep()
        bench.clock.sleep(0.5)
    assert [round(at_s) for at_s in tried] == [0, 10, 20]
    assert len(tried) == TRIES and node.router._trouble == {}


def test_however_long_a_study_waits_it_is_looked_at_every_ten_seconds(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, looks = node.bench, looks_of(node.bench, monkeypatch)
    log = bench.catalog.index
    log.open_association("a1", Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1"))
    bench.receive(bench.dataset("7.1", study="7", series="7.0"), association="a1")
    log.end_association("a1", AssociationEnd.ABORTED)
    for _ in range(100):
        node.router.sweep()
        bench.clock.sleep(0.5)
    assert 5 <= looks.count(["7"]) <= 10 and looks.count([]) == 100 - looks.count(["7"])


def test_a_single_radiograph_goes_at_once_and_the_rest_of_its_study_waits(node: Node) -> None:
    dataset = node.bench.dataset
    node.bench.receive(dataset("1.2.3.1.1"), dataset("1.2.3.2.1", series="1.2.3.2", Modality="DX", SOPClassUID=DX))
    assert node.router.sweep() == 1
    assert node.jobs() == [("1.2.3.2", "chest")]
    node.bench.clock.sleep(10)
    assert node.router.sweep() == 1
    assert node.jobs() == [("1.2.3.2", "chest"), ("1.2.3.1", "organs")]
    assert [call[0] for call in node.recorder.named("study_closed")] == ["immediate", "idle"]


def test_a_late_image_opens_the_next_revision_and_runs_again(node: Node) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    node.bench.clock.sleep(10)
    node.router.sweep()
    node.bench.worker().run_once("w")
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))  # the same again
    node.bench.clock.sleep(10)
    assert node.router.sweep() == 0
    node.bench.receive(node.bench.dataset("1.2.3.1.2"))
    node.bench.clock.sleep(10)
    assert node.router.sweep() == 1
    latest = node.bench.queue.jobs()[0]
    assert (latest.run_number, latest.revision, latest.superseded_job) == (2, 2, 1)
    node.bench.worker().run_once("w")
    assert node.router.sweep() == 0  # our own results open nothing
    assert node.recorder.named("study_closed")[-1][:2] == ("idle", 2)


def test_an_image_that_comes_while_headers_are_read_is_not_missed(node: Node) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    node.bench.clock.sleep(10)

    def late(instances: Any) -> None:
        node.reading = lambda instances: None
        node.bench.receive(node.bench.dataset("1.2.3.1.2"))

    node.reading = late
    node.router.sweep()
    assert node.jobs() == []
    node.bench.clock.sleep(10)
    node.router.sweep()
    assert node.jobs() == [("1.2.3.1", "organs")]
    assert len(node.bench.queue.job_input(node.bench.queue.jobs()[0])[0]) == 2


def test_a_series_that_cannot_be_read_is_tried_again_then_failed_and_holds_up_nobody(node: Node) -> None:
    dataset = node.bench.dataset
    node.bench.receive(dataset("1.2.3.1.1"), dataset("1.2.3.2.1", series="1.2.3.2"))
    node.bench.receive(dataset("1.9.1.1", study="1.9", series="1.9.1"))
    node.bench.clock.sleep(10)
    Path(node.bench.catalog.index.instance("1.2.3.1.1").path).unlink()
    assert node.router.sweep() == 2
    assert sorted(node.jobs()) == [("1.2.3.2", "organs"), ("1.9.1", "organs")]
    tries = 1
    while node.bench.queue.open_studies():
        node.bench.clock.sleep(1)
        node.router.sweep()
        tries += 1
        assert tries < 100
    assert 5 + 10 < tries < 5 + 10 + 5  # TRIES with growing pauses, not every tick
    assert TRIES == 3
    snapshot = node.bench.queue.snapshot()
    assert (snapshot["ledger"]["failed"], snapshot["ledger"]["routed"], snapshot["ledger"]["imbalance"]) == (1, 2, 0)
    (item,) = [item for item in node.bench.queue.stuck() if item.kind == "series"]
    assert "1.2.3.1.1 cannot be read" in item.why


def test_a_series_that_can_be_read_again_in_time_is_routed(node: Node) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    node.bench.clock.sleep(10)
    path = Path(node.bench.catalog.index.instance("1.2.3.1.1").path)
    hidden = path.rename(path.with_suffix(".away"))
    assert node.router.sweep() == 0
    hidden.rename(path)
    node.bench.clock.sleep(5)
    assert node.router.sweep() == 1
    assert node.jobs() == [("1.2.3.1", "organs")]


def test_a_study_that_cannot_be_written_does_not_stop_the_sweep(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for study in ("1.8", "1.9"):
        node.bench.receive(node.bench.dataset(f"{study}.1.1", study=study, series=f"{study}.1"))
    node.bench.clock.sleep(10)
    route = node.bench.queue.route_series

    def failing(activity: Any, *rest: Any) -> Any:
        if activity.study_instance_uid == "1.8":
            raise StorageError("disk full")
        return route(activity, *rest)

    monkeypatch.setattr(node.bench.queue, "route_series", failing)
    assert node.router.sweep() == 1
    monkeypatch.undo()
    assert node.router.sweep() == 1
    assert sorted(node.jobs()) == [("1.8.1", "organs"), ("1.9.1", "organs")]


def test_route_now_waits_for_nothing(node: Node, kit: ModuleType) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    routed = node.router.route_now(kit.STUDY)
    assert len(routed.job_ids) == 1
    assert [verdict.matched for verdict in routed.series[0].verdicts].count(True) == 1
    assert node.router.route_now(kit.STUDY).job_ids == ()  # once-only
    node.bench.worker().run_once("w")
    again = node.router.route_now(kit.STUDY, again=True)
    assert node.bench.queue.job(again.job_ids[0]).run_number == 2
    with pytest.raises(NotFound):
        node.router.route_now("1.2.3.4")


def test_route_now_with_a_rule_runs_that_one_only_on_what_was_routed(node: Node, kit: ModuleType) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    assert len(node.router.route_now(kit.STUDY).job_ids) == 1
    for name in ("extra", "other"):
        (node.rules_dir / f"{name}.yaml").write_text(RULES.replace("organs", name))
    node.load()
    assert len(node.router.route_now(kit.STUDY, rule="extra").job_ids) == 1
    assert node.jobs() == [("1.2.3.1", "organs"), ("1.2.3.1", "extra")]
    with pytest.raises(NotFound, match="nonsense"):
        node.router.route_now(kit.STUDY, rule="nonsense")
    node.bench.receive(node.bench.dataset("1.2.3.2.1", series="1.2.3.2"))
    node.router.route_now(kit.STUDY, rule="extra")  # the open series is closed for every rule: none is skipped
    assert sorted(rule for series, rule in node.jobs() if series == "1.2.3.2") == ["extra", "organs", "other"]
    assert node.bench.queue.snapshot()["ledger"]["imbalance"] == 0


def test_explain_writes_nothing(node: Node, kit: ModuleType) -> None:
    node.bench.receive(node.bench.dataset("1.2.3.1.1"))
    (explained,) = node.router.explain(kit.STUDY)
    assert {verdict.rule: verdict.matched for verdict in explained.verdicts} == {"chest": False, "organs": True}
    assert [job.rule for job in explained.jobs] == ["organs"]
    assert node.jobs() == []
    assert len(node.bench.queue.open_studies()) == 1
    assert node.bench.queue.verdicts(kit.STUDY) == []


def test_the_whole_line_from_receipt_to_delivery(node: Node) -> None:
    node.bench.receive(*(node.bench.dataset(f"1.2.3.1.{number}") for number in (1, 2, 3)))
    node.bench.clock.sleep(10)
    node.router.sweep()
    node.bench.worker().run_once("w")
    courier = node.bench.courier("PACS", "SCANNER")
    for destination in ("PACS", "SCANNER"):
        assert courier.run_once(destination)
    produced = [instance.sop_instance_uid for instance in node.bench.produced()]
    assert node.bench.peer.kept == {"PACS": produced, "SCANNER": produced}
    ledger = node.bench.queue.snapshot()["ledger"]
    assert (ledger["received"], ledger["routed"], ledger["imbalance"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        (["true", "false", "error"], "nomatch"),
        (["true", "missing"], "missing_tag"),
        (["mixed"], "mixed"),
        (["error", "missing"], "error"),
        ([], "nomatch"),
    ],
)
def test_a_verdict_is_one_word_for_metrics(outcomes: list[str], word: str) -> None:
    conditions = tuple(
        ConditionResult(expression="", outcome=Condition(outcome), values={}, explanation="") for outcome in outcomes
    )
    verdict = Verdict(rule="r", series_instance_uid="1", matched=False, reason="", conditions=conditions)
    assert verdict_word(verdict) == word
