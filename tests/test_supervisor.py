"""Who is stuck is started again: the supervisor's look at its children, and the worker's look at itself."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dicom_node import supervisor
from dicom_node.clock import SystemClock
from dicom_node.config import JobSettings, NodeConfig, load_config
from dicom_node.deciding import keep_rules, kept_rules, node_rules
from dicom_node.errors import ConfigError
from dicom_node.model import BootTime
from dicom_node.pipeline.work import TIMEOUT_S, Worker, job_bound_s
from dicom_node.process import Orders
from dicom_node.pulse import Pulse, beat, run_folder
from dicom_node.worker import Work

WaitFor = Callable[[Callable[[], object], float, str], None]


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "one.yaml").write_text("rule: one\nwhen: [Modality == 'CT']\nsend: {to: [sender], what: source}\n")
    settings = {
        "data_dir": str(tmp_path / "data"),
        "rules_dir": str(rules),
        "engines": {},
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
    }
    (tmp_path / "data").mkdir()
    return load_config(environ={}, overrides=settings)


class Watched:
    """A supervisor that looks after one real process, which says only what a test says for it."""

    def __init__(self, config: NodeConfig, stack: ExitStack) -> None:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        signals = stack.enter_context(supervisor._Signals())
        self.data_dir = config.data_dir
        self.node = supervisor._Supervisor(config, sockets[0], sockets[1], signals)
        self.child = supervisor._Child(role="work", listener=None)
        self.process = subprocess.Popen(["sleep", "100"])
        self.child.process = self.process
        self.child.started = 1.0
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.node._children = [self.child]
        run_folder(config.data_dir).mkdir()
        self._beats = 0

    def pulse(self, ok: bool = True) -> None:
        self._beats += 1
        at = {"boot_id": "boot", "boot_s": float(self._beats), "started_at": ""}
        beat(self.data_dir, "work", Pulse(pid=self.process.pid, ok=ok, **at))  # type: ignore[arg-type]

    def look(self, seconds: float) -> bool:
        """Look as if `seconds` had passed since the last look; whether the process was left alone."""
        self.node._feel_pulse(self.child, self.process, seconds)
        try:
            return self.process.wait(timeout=0.2) != -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return True


@pytest.fixture
def watched(config: NodeConfig) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(config, stack)


def test_a_process_that_was_ready_and_falls_silent_is_killed(watched: Watched) -> None:
    watched.pulse()
    assert watched.look(50.0)
    assert watched.look(50.0), "its last sign of life came between the looks"
    assert not watched.look(20.0)


def test_a_process_that_gives_signs_of_life_but_stays_unwell_is_killed(watched: Watched) -> None:
    for ok in (False, True, False):  # it became well again in time
        watched.pulse(ok)
        assert watched.look(40.0)
    watched.pulse(ok=False)
    assert not watched.look(40.0)


def test_only_processes_of_a_start_take_the_catalog_for_migrated(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Orders] = []
    monkeypatch.setattr(supervisor, "encode_orders", lambda orders: given.append(orders) or b"")
    monkeypatch.setattr(watched.node, "_launch", lambda child: setattr(child, "process", _Waiting()))
    watched.node._spawn(watched.child)
    watched.node._restart(watched.child)
    assert [orders.migrated for orders in given] == [True, False]


class _Waiting:
    """Launched, and waits for its orders."""

    def __init__(self) -> None:
        self.stdin = open(os.devnull, "wb")  # noqa: SIM115 - the supervisor closes it


def test_a_process_that_is_not_yet_ready_has_longer(watched: Watched) -> None:
    assert watched.look(100.0)
    assert not watched.look(30.0)


@pytest.mark.parametrize("full", [True, False])
def test_silence_counts_only_while_pulses_can_be_written(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor, full: bool
) -> None:
    monkeypatch.setattr(supervisor, "UNWELL_S", 0.2)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.05)
    watched.pulse()
    watched.look(0.0)
    if full:
        shutil.rmtree(run_folder(watched.data_dir))  # nobody can write a pulse, as on a full disk
    watched.node._spawn = lambda child: None  # type: ignore[method-assign]
    stop = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    watched.node.watch()
    stop.join()
    assert (watched.process.poll() is None) == full


def test_a_process_that_cannot_be_started_now_is_started_later(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have no memory or no process left just when one has died, often for the same reason."""
    watched.process.kill()
    watched.process.wait()
    node, child, tries = watched.node, watched.child, []

    def have_no_memory(*_: object, **__: object) -> None:
        tries.append(child.role)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", have_no_memory)
        for _ in range(2):  # the death is seen, then a new one is tried
            node._look_after(child, 0.0)
            before, child.start_at = child.start_at, 0.0
        assert tries == ["work"] and child.process is None
        assert before > time.monotonic(), "not at once again"
    monkeypatch.setattr(node, "_spawn", lambda child: tries.append("started"))
    node._look_after(child, 0.0)
    assert tries == ["work", "started"]


class MovedClock(SystemClock):
    """A clock that can be moved ahead."""

    ahead_s = 0.0

    def boot(self) -> BootTime:
        now = super().boot()
        return BootTime(boot_id=now.boot_id, seconds=now.seconds + self.ahead_s)


def test_a_worker_stuck_in_a_job_longer_than_any_lease_is_not_well(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    inside, release = threading.Semaphore(0), threading.Event()

    def stuck(self: Any, worker: str, **options: Any) -> bool:
        inside.release()
        return not release.wait(30.0)

    monkeypatch.setattr(Worker, "run_once", stuck)
    clock = MovedClock()
    config = config.model_copy(update={"jobs": JobSettings(workers=1)})
    work = Work(Orders(config=config, supervisor_pid=os.getpid()), clock)
    try:
        assert inside.acquire(timeout=10.0) and inside.acquire(timeout=10.0)  # and the one for urgent jobs
        clock.ahead_s = job_bound_s(TIMEOUT_S) - 30.0
        assert work.health()[0]
        clock.ahead_s = job_bound_s(TIMEOUT_S) + 1.0
        ok, detail, facts = work.health()
        assert (ok, detail) == (False, "2 of 2 stuck in a job")
        assert (facts["workers_alive"], facts["workers_stuck"]) == (2, 2)
        release.set()
        wait_for(lambda: work.health()[0], 10, "the worker to be well again")
    finally:
        release.set()
        work.stop()


def test_rules_are_kept_as_they_were_read_or_not_at_all(config: NodeConfig) -> None:
    with pytest.raises(ConfigError, match="no rules were kept"):
        kept_rules(config)
    rules = node_rules(config)
    keep_rules(config, rules)
    assert kept_rules(config) == rules
    file = config.resolved_rules_dir() / "one.yaml"
    file.write_text(file.read_text().replace("CT", "MR"))  # after `rules` were read
    with pytest.raises(ConfigError, match="changed while they were read"):
        keep_rules(config, rules)
    assert kept_rules(config) == rules
    kept = config.data_dir / "rules_in_force.json"
    kept.write_text(kept.read_text().replace("CT", "MR"))
    with pytest.raises(ConfigError, match="not what was kept"):
        kept_rules(config)


def test_a_port_that_the_last_process_of_a_killed_node_holds_is_waited_for(config: NodeConfig) -> None:
    run_folder(config.data_dir).mkdir(parents=True)
    assert not supervisor._was_killed(config)  # there was none before
    for detail, was_killed in (("ready", True), ("starting", True), ("stopped", False)):
        pulse = Pulse(pid=1, boot_id="b", boot_s=1.0, started_at="", ok=detail == "ready", detail=detail)
        assert beat(config.data_dir, "supervisor", pulse)
        assert supervisor._was_killed(config) is was_killed
    with ExitStack() as stack:
        holder = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = holder.getsockname()[1]
        made = stack.enter_context(supervisor._socket("127.0.0.1"))
        with pytest.raises(ConfigError, match="Address already in use"):
            supervisor._bind(made, "127.0.0.1", port, "dicom_port", 0.0)
        ending = threading.Timer(0.3, holder.close)
        stack.callback(ending.join)
        ending.start()
        supervisor._bind(made, "127.0.0.1", port, "dicom_port", time.monotonic() + 20.0)
        assert made.getsockname()[1] == port
