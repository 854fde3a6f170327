"""A process of the node dies by SIGKILL at each point at which something becomes durable, before it and after it.

The points are not listed here: the seam finds every one that a study passes on its way, and each has its turn.
"""

import contextlib
import json
import logging
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pydicom
import pytest

log = logging.getLogger(__name__)

RULE = """
rule: quick
when: ['Modality == "CT"']
run: {engine: quick, results: [sr]}
send: {to: [PACS], what: both}
"""
RULE_ONWARD = "rule: onward\nwhen: ['Modality == \"CT\"']\nsend: {to: [PACS], what: source}\n"
JOURNAL_IDLE_S = 11.0  # then what is in the journal is brought to disk
FIRED_S = 13.0
BUDGET_S = float(
    os.environ.get("TEST_CRASH_BUDGET_S", "1500")
)  # a slow machine comes to fewer points, each time others
FEWEST = 8
TRIES = 3  # studies until a point that depends on the moment must have been passed
QUICK = {"lease_s": 2.0, "backoff_s": 0.2, "backoff_max_s": 0.5, "breaker_probe_s": 0.5, "response_timeout_s": 5.0}
JOBS = {"lease_s": 2.0, "backoff_s": 0.2, "backoff_max_s": 0.5, "max_attempts": 100, "workers": 1}
# what a study must pass, whatever else it passes: where the list of points itself must not shrink unseen
MUST_PASS = (
    "node:receiver:{} fdatasync Journal.append",
    "node:receiver:{} syncfs FolderArchive.sync",
    "pacs:receiver:{} fsync FolderSpool.commit",
    "pacs:receiver:{} link FolderSpool._place",
    "pacs:receiver:{} fsync_dir FolderSpool._name",
    "node:receiver:{} link_path FolderSpool._name_for_now",
    "node:receiver:{} commit SqliteIndex.add_instance",
    "node:service:{} commit Ledger.route_series",
    "node:work:{} commit Jobs.lease_job",
    "node:work:{} fsync FolderSpool.commit",
    "node:work:{} link FolderSpool._place",
    "node:work:{} commit Jobs.finish_job",
    "node:service:{} commit Deliveries.lease_delivery",
    "node:service:{} commit Deliveries._item",
    "node:service:{} commit Committed.begin_commitment",
    "node:service:{} commit Committed.settle_delivery",
    "pacs:receiver:{} commit CommitmentRequests.ask_commitment",
    "pacs:service:{} commit CommitmentRequests.judge_commitment",
)
RECOVERY_PASSES = ("node:recovery:after commit SqliteIndex.close_dead_epochs",)


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


@dataclass
class Line:
    """A PACS that commits to what it gets, and a node that analyses CT series and sends all there."""

    running_node: Callable[..., Any]
    settings: dict[str, dict[str, Any]]
    nodes: dict[str, Any] = field(default_factory=dict)

    def start(self, *names: str, wait: bool = True) -> None:
        for name in names or self.settings:
            first = f"import os; os.environ['TEST_KILL_NODE'] = {name!r}"
            self.nodes[name] = self.running_node(name, wait=wait, first=first, **self.settings[name])

    @property
    def port(self) -> int:
        return int(self.settings["node"]["dicom_port"])

    def kill_all(self, name: str) -> None:
        """Every process of the node at once, as when the machine stops."""
        node = self.nodes[name]
        family = node.members() if node.process.poll() is None else []
        node.process.kill()
        node.process.wait(timeout=10)
        assert not psutil.wait_procs(family, timeout=20)[1], "a child outlived the supervisor"

    def tails(self) -> str:
        return "\n".join(f"{name}:\n{node.tail()}" for name, node in self.nodes.items())


@pytest.fixture
def line(running_node: Callable[..., Any], free_port: Callable[[], int], tmp_path: Path, seam: Any) -> Line:
    ours, theirs = free_port(), free_port()
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "quick.yaml").write_text(RULE)
    pacs = {
        "ae_titles": ["PACS"],
        "dicom_port": theirs,
        "peers": {"node": _peer("DICOM_NODE", ours)},
        "engines": {},
        "jobs": {"workers": 0},
        "delivery": QUICK,
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0, "journal_bytes": 0},  # the other way of making durable
    }
    asked = {"storage_commitment": {"timeout_s": 2.0, "wait_s": 0.5}}
    node = {
        "dicom_port": ours,
        "rules_dir": str(rules),
        "engines": {"quick": {"kind": "quick"}},
        "peers": {"scanner": {"ae_title": "CT1"}, "PACS": {"ae_title": "PACS"}},
        "destinations": {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": theirs, **asked}},
        "jobs": JOBS,
        "completion": {"quiet_s": 0.2, "quiet_after_fault_s": 0.5, "idle_association_s": 0.5, "tick_s": 0.2},
        "delivery": QUICK,
    }
    return Line(running_node, {"pacs": pacs, "node": node})


def _peer(ae_title: str, port: int) -> dict[str, Any]:
    return {"ae_title": ae_title, "storage_commitment": True, "report_host": "127.0.0.1", "report_port": port}


def _points(line: Line, seam: Any, study_of: Callable[[], Any], wait: Callable[[Any], None]) -> list[str]:
    """Every point that a study passes, from its association to the report of storage commitment."""
    points: list[str] = []
    for _ in range(2):
        before = seam.size
        wait(study_of())
        time.sleep(JOURNAL_IDLE_S)
        points += [point for point in seam.passed(before) if point not in points]
    return points


def _in_time(points: list[str], done: list[str]) -> Iterator[str]:
    """The points, in another order each time, for as long as there is time; those that had their turn are `done`."""
    until = time.monotonic() + BUDGET_S
    for point in random.SystemRandom().sample(points, len(points)):
        if time.monotonic() > until:
            break
        done.append(point)
        yield point
    assert len(done) >= min(FEWEST, len(points)), f"only {len(done)} points in {BUDGET_S:g} s: the machine is too slow"


def _check(eyes: dict[str, Any], studies: list[Any], told: str) -> None:
    """Every promise, of every study, at the node and at the PACS."""
    for study in studies:
        eyes["node"].has_all(study)
        eyes["node"].one_result(study)
        eyes["node"].all_delivered(study)
        eyes["pacs"].has_all(study)
        here = {uid: one.sha256 for uid, one in eyes["node"].instances(study.uid).items()}
        there = {uid: one.sha256 for uid, one in eyes["pacs"].instances(study.uid).items()}
        assert here == there, f"{study.uid}: {told}"
    assert eyes["node"].catalog.queue.snapshot()["ledger"]["imbalance"] == 0, told


def _check_folders(line: Line, leftovers: Callable[[Path], list[str]], told: str) -> None:
    """With the nodes stopped: no file that fsck neither adopts nor knows as of a run that came to nothing."""
    for node in line.nodes.values():
        assert node.stop() == 0, told
    line.start()  # a start sweeps what dead processes left
    for node in line.nodes.values():
        assert node.stop() == 0, told
        assert leftovers(node.data_dir) == [], told
        found = node.command("fsck", check=False).stdout.splitlines()[1:-1]
        assert [one for one in found if not one.startswith(("unindexed: ", "unfinished: "))] == [], told
        node.command("fsck", "--repair")
        assert node.command("fsck").returncode == 0, told


@pytest.mark.crash
@pytest.mark.timeout(900 + BUDGET_S)
def test_a_death_at_any_commit_point_loses_nothing_and_repeats_nothing(
    line: Line,
    seam: Any,
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    leftovers: Callable[[Path], list[str]],
    wait_for: Callable[..., None],
) -> None:
    line.start()
    eyes = {name: look(node) for name, node in line.nodes.items()}
    studies: list[Any] = []

    def another() -> Any:
        studies.append(ct_study(len(studies)))
        send(studies[-1], line.port)
        return studies[-1]

    def rest(study: Any) -> None:
        wait_for(lambda: eyes["node"].at_rest(study.uid), 120, f"{study.uid} to be done; {line.tails()}")

    rest(another())
    points = _points(line, seam, another, rest)
    for wanted in MUST_PASS:
        for when in ("before", "after"):
            assert wanted.format(when) in points, f"no study passed {wanted.format(when)}"
    missed, done = [], list[str]()
    for point in _in_time(points, done):
        seam.arm(point)
        for _ in range(TRIES):
            another()
            try:
                wait_until(lambda: seam.fired, FIRED_S)
                break
            except TimeoutError:
                continue
        else:
            seam.disarm()
            missed.append(point)
    for study in studies:
        rest(study)
    told = f"{len(done)} of {len(points)} points, {len(studies)} studies, not reached again: {missed}"
    log.warning(told)
    _check(eyes, studies, told)
    assert len(missed) <= len(done) // 10, told
    _check_folders(line, leftovers, told)


@pytest.mark.crash
@pytest.mark.timeout(900 + BUDGET_S)
def test_a_death_at_any_point_of_the_recovery_itself_loses_nothing(
    line: Line,
    seam: Any,
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    leftovers: Callable[[Path], list[str]],
    wait_for: Callable[..., None],
) -> None:
    """The machine stops in the middle of everything; the next start dies at point k; the one after that goes on."""
    line.start()
    eyes = {name: look(node) for name, node in line.nodes.items()}
    studies: list[Any] = []

    def stop_in_the_middle() -> None:
        studies.append(ct_study(len(studies)))
        send(studies[-1], line.port)
        line.kill_all("node")

    stop_in_the_middle()
    before = seam.size
    line.start("node")
    points = [point for point in seam.passed(before) if point.startswith("node:")]
    for wanted in RECOVERY_PASSES:
        assert wanted in points, f"no start passed {wanted}"
    missed, done = [], list[str]()
    for point in _in_time(points, done):
        stop_in_the_middle()
        seam.arm(point)
        line.start("node", wait=False)
        node = line.nodes["node"]
        try:
            wait_until(lambda node=node: seam.fired or _is_over(node), 120)  # type: ignore[misc]
            wait_until(lambda: seam.fired, 5)  # what a part does just after its start
        except TimeoutError:
            missed.append(point)
        seam.disarm()
        line.kill_all("node")
        line.start("node")
    for study in studies:
        wait_for(lambda study=study: eyes["node"].at_rest(study.uid), 120, f"{study.uid}; {line.tails()}")
    told = f"{len(done)} of {len(points)} points, not reached again: {missed}"
    log.warning(told)
    _check(eyes, studies, told)
    assert len(missed) <= len(done) // 5, told
    _check_folders(line, leftovers, told)


def _is_over(node: Any) -> bool:
    """Whether the start has ended, one way or the other."""
    if node.process.poll() is not None:
        return True
    try:
        pulse = json.loads((node.data_dir / "run" / "supervisor.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(pulse["pid"] == node.process.pid and pulse["ok"])


CHEAP = (
    "node:receiver:after fdatasync Journal.append",
    "node:receiver:before commit SqliteIndex.add_instance",
    "node:service:after commit Ledger.route_series",
    "node:service:before commit Deliveries._item",  # the peer has it, and nobody here knows
)


def test_a_few_commit_points_where_every_run_looks(
    line: Line,
    seam: Any,
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    tool: Callable[[str], str],
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    """As above, without the PACS, the engine and most of the points: dcmtk takes what is sent."""
    kept = tmp_path / "kept"
    kept.mkdir()
    settings = line.settings["node"]
    settings["destinations"]["PACS"].pop("storage_commitment")
    settings |= {"engines": {}, "jobs": {"workers": 0}}
    Path(settings["rules_dir"], "quick.yaml").write_text(RULE_ONWARD)
    port = str(settings["destinations"]["PACS"]["port"])
    with contextlib.ExitStack() as stack:
        scp = subprocess.Popen([tool("storescp"), "-aet", "PACS", "-od", str(kept), port])
        stack.callback(scp.wait, 10)
        stack.callback(scp.terminate)
        line.start("node")
        eyes, studies = look(line.nodes["node"]), []
        for number, point in enumerate(CHEAP):
            seam.arm(point)
            studies.append(ct_study(number))
            send(studies[-1], line.port)
            wait_for(lambda: seam.fired, 60, f"{point}; {line.tails()}")
        for study in studies:
            wait_for(lambda study=study: eyes.at_rest(study.uid), 60, line.tails())
            eyes.has_all(study)
            eyes.all_delivered(study)
        there = {pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in kept.iterdir()}
        assert there == {uid for study in studies for uid in study.acknowledged}
