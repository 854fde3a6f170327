"""The node as processes, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

Tool = Callable[[str], str]
Start = Callable[..., Any]
WaitFor = Callable[[Callable[[], object], float, str], None]

RULE = """
rule: {name}
description: For the test.
when:
  - Modality in ["CT"]
send: {{to: [PACS], what: source}}
"""
PACS = {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": 9}}
BARE: dict[str, Any] = {"engines": {}, "jobs": {"workers": 0}}  # no network is loaded for a test of something else


def metric(node: Any, name: str, **labels: str) -> float:
    status, text = node.get("/metrics")
    assert status == 200
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"dicom_node_{name}" and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"{name}{labels} is not in /metrics")


def echo(tool: Tool, node: Any, called: str = "DICOM_NODE") -> int:
    command = [tool("echoscu"), "-to", "10", "-aec", called, "127.0.0.1", str(node.dicom_port)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


def test_a_node_starts_answers_counts_and_stops_cleanly(running_node: Start, tool: Tool) -> None:
    node = running_node()
    assert f"127.0.0.1:{node.dicom_port}" in node.ready_line
    assert f"127.0.0.1:{node.http_port}" in node.ready_line
    assert "only this machine can reach it" in node.ready_line
    assert node.get("/ping") == (200, '{"status": "ok"}\n')
    status, body = node.get("/ready")
    checks = {check["name"]: check["ok"] for check in json.loads(body)["checks"]}
    assert (status, checks) == (200, {"scp": True, "catalog": True, "disk": True, "workers": True, "engines": True})
    assert metric(node, "dimse_requests_total", service="echo", status_class="success") == 0
    assert echo(tool, node) == 0
    assert echo(tool, node, called="NOBODY") != 0
    assert metric(node, "dimse_requests_total", service="echo", status_class="success") == 1
    assert metric(node, "association_reject_total", reason="called_ae") == 1
    assert metric(node, "ledger_imbalance_studies") == metric(node, "ledger_imbalance_series") == 0
    assert metric(node, "workers_alive") == 4  # three, and one for urgent jobs
    members = node.members()
    assert node.stop() == 0
    assert not [member for member in members if member.is_running()]


def test_every_killed_process_is_started_again_and_counters_go_on(
    running_node: Start, tool: Tool, wait_for: WaitFor
) -> None:
    node = running_node()
    assert echo(tool, node) == 0
    for role in ("receiver", "service", "work"):
        old = node.pid(role)
        os.kill(old, signal.SIGKILL)
        wait_for(lambda role=role, old=old: node.pid(role) != old, 30, f"a new {role}")  # type: ignore[misc]
        node.wait_ready(30)
        assert echo(tool, node) == 0
    assert metric(node, "process_restarts", process="receiver") == 1
    # three of the four were counted by the second receiver, one by the killed one
    assert metric(node, "dimse_requests_total", service="echo", status_class="success") == 4


def test_the_process_that_lives_as_long_as_the_node_opens_no_catalog(running_node: Start, wait_for: WaitFor) -> None:
    """It stays small, and nothing that a peer has sent is read there."""
    node = running_node(**BARE)
    old = node.pid("receiver")
    os.kill(old, signal.SIGKILL)  # its associations are ended by somebody else, too
    wait_for(lambda: node.pid("receiver") != old, 30, "a new receiver")
    maps = Path(f"/proc/{node.pid('supervisor')}/maps").read_text()
    assert "libc" in maps
    assert not [name for name in ("sqlite", "numpy") if name in maps]
    receiver = Path(f"/proc/{node.pid('receiver')}/maps").read_text()
    assert "sqlite" in receiver and "numpy" in receiver  # else the names would tell nothing


def test_nothing_survives_kill_9_of_the_supervisor(running_node: Start, wait_for: WaitFor) -> None:
    node = running_node()
    members = node.members()
    assert len(members) >= 4
    node.process.kill()
    node.process.wait(timeout=10)
    wait_for(lambda: not any(member.is_running() for member in members), 10, "every process to be gone")
    again = running_node(**BARE)  # the ports and the locks are free again
    assert again.get("/ready")[0] == 200


def test_a_second_node_gets_neither_the_data_folder_nor_the_port(running_node: Start, tmp_path: Path) -> None:
    node = running_node(**BARE)
    serve = [sys.executable, "-m", "dicom_node.cli", "serve", "--config", str(node.config)]
    second = subprocess.run(serve, capture_output=True, text=True, timeout=60)
    assert (second.returncode, second.stdout) == (2, "")
    assert "another node is using" in second.stderr.splitlines()[-1]
    elsewhere = [*serve, "--data-dir", str(tmp_path / "other"), "--dicom-port", str(node.dicom_port)]
    other = subprocess.run(elsewhere, capture_output=True, text=True, timeout=60)
    assert (other.returncode, other.stdout) == (2, "")
    assert f"dicom_port: 127.0.0.1:{node.dicom_port} cannot be bound" in other.stderr
    assert node.get("/ready")[0] == 200  # and a node without workers is ready


def test_rules_are_reloaded_whole_or_not_at_all(running_node: Start, tmp_path: Path) -> None:
    node = running_node(destinations=PACS, **BARE)
    (node.rules_dir / "one.yaml").write_text(RULE.format(name="one"))
    assert node.command("rules", "reload").stdout.startswith("1 rules in force")
    assert metric(node, "ruleset_rules") == 1
    assert metric(node, "rule_evaluations_total", rule="one", verdict="match") == 0
    (node.rules_dir / "two.yaml").write_text(RULE.format(name="two").replace("PACS", "NOWHERE"))
    broken = node.command("rules", "reload", check=False)
    assert broken.returncode == 2
    assert "two.yaml" in broken.stderr
    assert metric(node, "ruleset_rules") == 1
    assert metric(node, "ruleset_load_failed") == 1
    (node.rules_dir / "two.yaml").write_text(RULE.format(name="two"))
    assert node.command("rules", "reload").stdout.startswith("2 rules in force")
    assert metric(node, "ruleset_load_failed") == 0


def test_a_broken_rule_and_a_restart_of_the_service_leave_the_rules_last_in_force(
    running_node: Start, wait_for: WaitFor
) -> None:
    node = running_node(destinations=PACS, **BARE)
    (node.rules_dir / "one.yaml").write_text(RULE.format(name="one"))
    node.command("rules", "reload")
    (node.rules_dir / "one.yaml").write_text(RULE.format(name="one").replace("PACS", "NOWHERE"))
    old = node.pid("service")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: node.pid("service") != old, 30, "a new service process")
    node.wait_ready(30)
    assert metric(node, "ruleset_rules") == 1
    assert metric(node, "ruleset_load_failed") == 1
    assert metric(node, "rule_evaluations_total", rule="one", verdict="match") == 0
    assert "one.yaml" in node.tail()
    (node.rules_dir / "one.yaml").write_text(RULE.format(name="uno"))
    assert node.command("rules", "reload").stdout.startswith("1 rules in force")
    assert metric(node, "ruleset_load_failed") == 0


def test_a_node_with_a_broken_rule_does_not_start(running_node: Start, tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "bad.yaml").write_text("rule: bad\nwhen: [Modaliti == 'CT']\nrun: {engine: ct-abdomen}\n")
    node = running_node(wait=False, rules_dir=str(tmp_path / "rules"))
    assert node.process.wait(timeout=60) == 2
    assert "bad.yaml:2" in node.tail()


def test_a_missing_rules_folder_is_named(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", "serve", "--data-dir", "data", "--rules", "nowhere"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert answer.returncode == 2
    assert "nowhere does not exist" in answer.stderr


def test_a_full_disk_makes_the_node_not_ready(running_node: Start) -> None:
    node = running_node(storage={"reserve_bytes": 2**60, "reserve_ratio": 0.0}, **BARE)
    status, body = node.get("/ready")
    assert status == 503
    assert [check["name"] for check in json.loads(body)["checks"] if not check["ok"]] == ["disk"]
    assert metric(node, "intake_state") == 2


def test_processes_of_many_threads_share_few_heaps_unless_told_otherwise(
    running_node: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heaps(node: Any, role: str) -> list[bytes]:
        found = Path(f"/proc/{node.pid(role)}/environ").read_bytes().split(b"\0")
        return [word for word in found if word.startswith(b"MALLOC_ARENA_MAX=")]

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    node = running_node(**BARE)
    assert heaps(node, "receiver") == heaps(node, "service") == [b"MALLOC_ARENA_MAX=2"] and heaps(node, "work") == []
    node.stop()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "5")
    assert heaps(running_node(**BARE), "receiver") == [b"MALLOC_ARENA_MAX=5"]


def test_a_stuck_receiver_makes_the_node_not_ready(running_node: Start, wait_for: WaitFor) -> None:
    node = running_node(**BARE)
    os.kill(node.pid("receiver"), signal.SIGSTOP)
    try:
        wait_for(lambda: node.get("/ready")[0] == 503, 20, "the silent receiver to be noticed")
        assert node.get("/ping")[0] == 200
    finally:
        os.kill(node.pid("receiver"), signal.SIGCONT)
    node.wait_ready(20)


def test_what_is_sent_is_kept_shown_and_fetched_back(
    running_node: Start, wait_for: WaitFor, tool: Tool, tmp_path: Path
) -> None:
    node = running_node(destinations=PACS, completion={"quiet_s": 0.2}, **BARE)
    source = tmp_path / "in.dcm"
    (tmp_path / "in.dump").write_text(
        "(0008,0016) UI =SecondaryCaptureImageStorage\n(0008,0018) UI [1.2.3.4.1]\n(0008,0060) CS [OT]\n"
        "(0010,0010) PN [CANARY^ZZ]\n(0010,0020) LO [CANARYID]\n(0020,000d) UI [1.2.3.4]\n(0020,000e) UI [1.2.3.4.5]\n"
        "(0028,0010) US 2\n(0028,0011) US 2\n(0028,0100) US 8\n(0028,0101) US 8\n(0028,0102) US 7\n(0028,0103) US 0\n"
        "(0028,0002) US 1\n(0028,0004) CS [MONOCHROME2]\n(7fe0,0010) OB 01\\02\\03\\04\n"
    )
    subprocess.run([tool("dump2dcm"), str(tmp_path / "in.dump"), str(source)], check=True, timeout=30)
    to = f"127.0.0.1:{node.dicom_port}/DICOM_NODE"
    assert "1 of 1 files stored" in node.command("send", str(source), "--to", to).stdout
    received = {"calling_ae": "other", "modality": "OT", "outcome": "new"}
    assert metric(node, "instances_received_total", **received) == 1
    assert sum(metric(node, "instances_durable_total", by=by) for by in ("journal", "file")) >= 1
    wait_for(lambda: metric(node, "ledger_studies", state="filtered") == 1, 20, "the study to be filtered")
    assert metric(node, "unrouted_studies_total") == 1
    screen = node.command("status").stdout
    assert "1 received = 0 routed + 1 filtered + 0 waiting + 0 failed" in screen
    assert "running since" in screen and "receiver ok" in screen
    assert json.loads(node.command("status", "--json").stdout)["studies"]["total"] == 1
    fetched = node.command("fetch", "1.2.3.4", "--from", to, "--into", str(tmp_path / "back"))
    assert fetched.stdout.startswith("1 files in")
    (back,) = (tmp_path / "back").iterdir()
    assert back.read_bytes()[-4:] == b"\x01\x02\x03\x04"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "ot.yaml").write_text(RULE.format(name="ot").replace("CT", "OT"))
    replayed = node.command("rules", "replay", "--since", "1d", "--rules", str(tmp_path / "new")).stdout
    assert "1 series replayed: 1 would be routed differently" in replayed
    assert "no rule matched" in node.command("route", "1.2.3.4", "--again").stdout
    refused = node.command("fsck", check=False)
    assert refused.returncode == 2 and "another node is using" in refused.stderr
    everything = screen + node.log.read_text() + node.get("/metrics")[1] + node.get("/ready")[1]
    assert "CANARY" not in everything
    node.stop()
    assert "archive and index agree" in node.command("fsck").stdout
    assert "not running" in node.command("status").stdout
    assert "no rule" in node.command("rules", "explain", "1.2.3.4").stdout.lower()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_it_is_ready_is_clean(running_node: Start, wait_for: WaitFor, number: signal.Signals) -> None:
    node = running_node(wait=False)
    wait_for(lambda: (node.data_dir / "run" / "supervisor.json").exists(), 60, "the supervisor to begin")
    node.process.send_signal(number)
    assert node.process.wait(timeout=30) == 0


def test_ctrl_c_while_its_processes_come_to_life_is_a_clean_stop(running_node: Start, wait_for: WaitFor) -> None:
    """A terminal sends SIGINT to each process of the group, here before a receiver has come to its first line."""
    node = running_node(wait=False)
    group = os.getpgid(node.process.pid)
    wait_for(lambda: len(node.members()) > 1, 60, "the first process")
    for process in node.members():
        if os.getpgid(process.pid) == group:
            process.send_signal(signal.SIGINT)
    assert node.process.wait(timeout=30) == 0
    said = node.log.read_text()
    assert "Traceback" not in said and "a process ended" not in said, said
