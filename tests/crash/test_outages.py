"""Destinations that fail or are down, a clock that is set, ten thousand that wait: recovered in order, in bounds."""

import contextlib
import logging
import os
import random
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pydicom
import pytest

from dicom_node.clock import SystemClock
from dicom_node.model import DeliveryState, JobState

log = logging.getLogger(__name__)

STUDIES = int(os.environ.get("TEST_CRASH_STUDIES", "30"))
OBJECTS = int(os.environ.get("TEST_CRASH_OBJECTS", "300"))
KILLS = int(os.environ.get("TEST_CRASH_KILLS", "10"))
QUICK = {"lease_s": 2.0, "backoff_s": 0.1, "backoff_max_s": 0.5, "breaker_probe_s": 0.3, "response_timeout_s": 5.0}
SOON = {"quiet_s": 0.2, "quiet_after_fault_s": 0.5, "idle_association_s": 0.5, "tick_s": 0.2}
BARE = {"engines": {}, "jobs": {"workers": 0}}
RULE = "rule: onward\nwhen: ['Modality == \"CT\"']\nsend: {{to: [{to}], what: source}}\n"
MIB = 1024 * 1024


def _rules(folder: Path, to: str) -> str:
    folder.mkdir()
    (folder / "onward.yaml").write_text(RULE.format(to=to))
    return str(folder)


@contextlib.contextmanager
def _storescp(tool: Callable[[str], str], folder: Path, port: int) -> Iterator[Path]:
    """dcmtk's, one file for each SOP Instance UID."""
    folder.mkdir(exist_ok=True)
    command = [tool("storescp"), "--fork", "-aet", "PACS", "-od", str(folder), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield folder
        finally:
            process.terminate()


def _uids(folder: Path) -> set[str]:
    return {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in folder.iterdir()}


class Unreliable(threading.Thread):
    """A wire to a port that is cut at some moment, of three connections in ten."""

    def __init__(self, to: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._to, self._chance = to, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = self.cuts = 0

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                cut_after = self._chance.randrange(1, 8000) if self._chance.random() < 0.3 else 1 << 40
                self.cuts += cut_after < 1 << 40
                threading.Thread(target=self._carry, args=(near, cut_after), daemon=True).start()

    def _carry(self, near: socket.socket, cut_after: int) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            back = threading.Thread(target=self._pump, args=(far, near, 1 << 40), daemon=True)
            back.start()
            self._pump(near, far, cut_after)
            for end in (near, far):
                end.shutdown(socket.SHUT_RDWR)
            back.join(10)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, bytes_left: int) -> None:
        with contextlib.suppress(OSError):
            while bytes_left > 0 and (data := source.recv(min(65536, bytes_left))):
                target.sendall(data)
                bytes_left -= len(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.crash
@pytest.mark.timeout(600 + 6 * STUDIES + 10 * KILLS)
def test_every_object_reaches_three_unreliable_destinations_once(
    running_node: Callable[..., Any],
    seam: Any,
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Connections break, and the process that sends is killed: all is delivered, and nothing is a dead letter."""
    names = ("A", "B", "C")
    with contextlib.ExitStack() as stack:
        ports = {name: free_port() for name in names}
        kept = {
            name: stack.enter_context(_storescp(tool, tmp_path / f"kept-{name}", port)) for name, port in ports.items()
        }
        wires = {name: Unreliable(port, seed) for seed, (name, port) in enumerate(ports.items())}
        for wire in wires.values():
            wire.start()
            stack.callback(wire.close)
        to = {name: {"ae_title": "PACS", "host": "127.0.0.1", "port": wire.port} for name, wire in wires.items()}
        rules = _rules(tmp_path / "rules", ", ".join(names))
        node = running_node("node", rules_dir=rules, destinations=to, completion=SOON, delivery=QUICK, **BARE)
        eyes, chance = look(node), random.Random(1)
        studies = []
        for number in range(STUDIES):
            studies.append(ct_study(number, 4))
            send(studies[-1], node.dicom_port)
            if number % max(STUDIES // KILLS, 1) == 0:
                time.sleep(chance.uniform(0.0, 0.5))  # the moment is what varies
                old = node.pid("service")
                os.kill(old, signal.SIGKILL)
                wait_for(lambda old=old: node.pid("service") != old, 60, node.tail())
        for study in studies:
            wait_for(lambda study=study: eyes.at_rest(study.uid), 300, f"{study.uid}; {node.tail()}")
            eyes.has_all(study)
            eyes.all_delivered(study)
        sent = {uid for study in studies for uid in study.acknowledged}
        assert {name: _uids(folder) for name, folder in kept.items()} == dict.fromkeys(names, sent)
        assert sum(wire.cuts for wire in wires.values()) > STUDIES // 2, "the wires were too good"
        assert eyes.catalog.queue.snapshot()["dead_letters"] == {"jobs": 0, "deliveries": 0}


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_what_is_damaged_is_not_committed_to_and_the_report_survives_kills_and_a_peer_that_is_down(
    running_node: Callable[..., Any],
    free_port: Callable[[], int],
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    ours, theirs, damaged = free_port(), free_port(), 10

    def peer(ae_title: str, port: int) -> dict[str, Any]:
        return {"ae_title": ae_title, "storage_commitment": True, "report_host": "127.0.0.1", "report_port": port}

    pacs = running_node(
        "pacs", ae_titles=["PACS"], dicom_port=theirs, peers={"node": peer("DICOM_NODE", ours)}, delivery=QUICK, **BARE
    )
    asked = {"storage_commitment": {"timeout_s": 600.0, "wait_s": 0.0}}
    to = {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": theirs, **asked}}
    peers = {"scanner": {"ae_title": "CT1"}, "PACS": {"ae_title": "PACS"}}
    settings = {"dicom_port": ours, "rules_dir": _rules(tmp_path / "rules", "PACS"), "destinations": to}
    whole = {"quiet_s": 5.0, "idle_association_s": 30.0}  # the study in one delivery, however slow the machine
    settings |= {"peers": peers, "completion": whole, "delivery": QUICK, **BARE}
    node = running_node("node", **settings)
    mine, yours = look(node), look(pacs)
    checking = pacs.pid("service")
    os.kill(checking, signal.SIGSTOP)  # it would check before anything is damaged
    study = ct_study(1, OBJECTS)
    send(study, ours)

    def state() -> list[DeliveryState]:
        return [one.state for one in mine.catalog.queue.deliveries(study_instance_uid=study.uid)]

    wait_for(lambda: state() == [DeliveryState.COMMITTING], 120, f"the question; {node.tail()}")
    family = node.members()
    node.process.kill()  # the one that is to be told is down
    node.process.wait(timeout=10)
    assert not psutil.wait_procs(family, timeout=20)[1]
    for one in list(yours.instances(study.uid).values())[:damaged]:
        with open(one.path, "r+b") as file:
            file.seek(one.data_set_offset + one.data_set_length - 1)
            last = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last[0] ^ 0xFF]))
    os.kill(checking, signal.SIGKILL)

    def judged() -> dict[int | None, int]:
        with yours.catalog.database.read() as connection:
            return dict(
                connection.execute("SELECT reason, count(*) FROM commitment_reference GROUP BY reason").fetchall()
            )

    expected = {0: OBJECTS - damaged, 0x0110: damaged}
    wait_for(lambda: judged() == expected, 120, f"the check, not {judged()}; {pacs.tail()}")
    wait_for(lambda: pacs.pid("service") != checking, 60, pacs.tail())
    os.kill(pacs.pid("service"), signal.SIGKILL)  # the report that could not be sent survives this
    running_node("node", **settings)

    def told() -> dict[int | None, int]:
        with mine.catalog.database.read() as connection:
            return dict(
                connection.execute(
                    "SELECT reason, count(*) FROM commitment_object "
                    "WHERE question = (SELECT min(id) FROM commitment_question) GROUP BY reason"
                ).fetchall()
            )

    wait_for(lambda: told() == expected, 120, f"the report, not {told()}; {pacs.tail()}")
    # what was refused is sent again, replaces what was damaged, and is committed to in the end
    wait_for(lambda: state() == [DeliveryState.DONE], 120, f"{state()}; {node.tail()}")
    yours.has_all(study)


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_studies_go_their_way_when_the_wall_clock_is_set_by_an_hour(
    running_node: Callable[..., Any],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    seam: Any,
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    port = free_port()
    with _storescp(tool, tmp_path / "kept", port) as kept:
        to = {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": port}}
        rules = _rules(tmp_path / "rules", "PACS")
        node = running_node("node", rules_dir=rules, destinations=to, completion=SOON, delivery=QUICK, **BARE)
        eyes, studies = look(node), []

        def noticed() -> int:
            return int(node.log.read_text().count("the wall clock was set"))

        for number, ahead_s in enumerate((0.0, -3600.0, 0.0, 3600.0)):
            seam.move_wall(ahead_s)
            wait_for(lambda number=number: noticed() == number, 30, f"{ahead_s:g} s to be noticed; {node.tail()}")
            studies.append(ct_study(number))
            send(studies[-1], node.dicom_port)
            wait_for(lambda: eyes.at_rest(studies[-1].uid), 30, f"{ahead_s:g} s ahead; {node.tail()}")
            eyes.all_delivered(studies[-1])
        assert _uids(kept) == {uid for study in studies for uid in study.acknowledged}
        assert eyes.catalog.queue.snapshot()["ledger"]["imbalance"] == 0
        assert node.get("/ready")[0] == 200


def _copies(data_dir: Path, table: str, count: int, **columns: object) -> None:
    """Copies of the first row of that table, each with its number; the node is stopped."""
    with contextlib.closing(sqlite3.connect(data_dir / "catalog.db")) as connection, connection:
        names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "id"]
        values = ", ".join(f":{name}" if name in columns or name == "run_number" else name for name in names)
        connection.executemany(
            f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} FROM {table} WHERE id = 1",
            ({"run_number": number, **columns} for number in range(2, count + 2)),
        )


def _items_of_copies(data_dir: Path) -> None:
    """What the first delivery has to bring, for each of its copies too: one without objects is done at once."""
    with contextlib.closing(sqlite3.connect(data_dir / "catalog.db")) as connection, connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(delivery_item)")]
        values = ", ".join("delivery.id" if name == "delivery" else f"item.{name}" for name in names)
        connection.execute(
            f"INSERT INTO delivery_item ({', '.join(names)}) SELECT {values} FROM delivery, delivery_item AS item "
            "WHERE item.delivery = 1 AND delivery.id > 1"
        )


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_ten_thousand_that_wait_hold_up_nobody_and_take_no_memory(
    running_node: Callable[..., Any],
    free_port: Callable[[], int],
    seam: Any,
    ct_study: Callable[..., Any],
    send: Callable[..., None],
    look: Callable[[Any], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    """An engine and a destination are down: what waits for them is only rows, and others pass it by."""
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "quick.yaml").write_text(
        "rule: quick\nwhen: ['Modality == \"CT\"']\nrun: {engine: quick, priority: urgent, results: [sr]}\n"
        "send: {to: [PACS], what: results}\n"
    )
    settings: dict[str, Any] = {
        "rules_dir": str(rules),
        "engines": {"quick": {"kind": "quick"}},
        "destinations": {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": free_port()}},  # nobody there
        "completion": SOON,
        "delivery": QUICK,
    }

    def figures(node: Any, first: int) -> tuple[float, float]:
        """Memory of all its processes in MiB after a study went through it, processor time of 10 s of rest."""
        study = ct_study(first)
        send(study, node.dicom_port)

        def is_done() -> bool:
            return [job.state for job in eyes.catalog.queue.jobs(study_instance_uid=study.uid)] == [JobState.DONE]

        wait_for(is_done, 60, f"the urgent study; {node.tail()}")
        before = _cpu_s(node)
        time.sleep(10.0)
        return sum(one.memory_info().rss for one in node.members()) / MIB, _cpu_s(node) - before

    def _cpu_s(node: Any) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in node.members())

    node = running_node("node", **settings)
    eyes = look(node)
    small_mib, idle_s = figures(node, 1)
    node.stop()
    boot = SystemClock().boot()
    later = {"not_before_s": boot.seconds + 1e6, "not_before_boot_id": boot.boot_id}
    _copies(node.data_dir, "job", 10_000, state="pending", rank=1, priority="routine", **later)
    _copies(node.data_dir, "delivery", 10_000, state="pending", job=None, rank=1, attempts=0)
    _items_of_copies(node.data_dir)
    began_s = time.monotonic()
    node = running_node("node", **settings)
    start_s = time.monotonic() - began_s
    large_mib, busy_s = figures(node, 2)
    told = (
        f"{small_mib:.0f} -> {large_mib:.0f} MiB, 10 s at rest: {idle_s:.2f} -> {busy_s:.2f} s, start {start_s:.1f} s"
    )
    log.warning(told)
    assert large_mib < small_mib + 64, told
    assert busy_s < idle_s + 2.0, told
    snapshot = eyes.catalog.queue.snapshot()
    assert snapshot["jobs"]["pending"]["count"] == 10_000, told
    waiting = snapshot["deliveries"]["PACS"]
    assert waiting["pending"]["count"] + waiting["leased"]["count"] > 10_000, told  # nobody took them for done
    assert snapshot["dead_letters"] == {"jobs": 0, "deliveries": 0}
