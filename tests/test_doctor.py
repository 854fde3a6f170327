"""`dicom-node doctor`: each thing looked at says ok or the remedy, in bounded time, and nothing about patients."""

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dicom_node import doctor_checks
from dicom_node.cli import main
from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, StorageSettings, load_config
from dicom_node.doctor import Check, Finding, State, examine, lines
from dicom_node.doctor_http import ready
from dicom_node.errors import ConfigError
from dicom_node.http.health import Check as HealthCheck
from dicom_node.http.health import HealthServer
from dicom_node.http.token import BearerToken, Doorman
from dicom_node.store.catalog import open_catalog

Start = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., NodeConfig]:
    """`config(**settings)`: a node in an empty folder, with free ports and no engines."""
    (tmp_path / "rules").mkdir()

    def make(**settings: Any) -> NodeConfig:
        (tmp_path / "data").mkdir(mode=0o700, exist_ok=True)
        base = {"data_dir": tmp_path / "data", "rules_dir": tmp_path / "rules", "engines": {},
                "dicom_port": 0, "http_port": 0, "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0}}  # fmt: skip
        return load_config(environ={}, overrides=base | settings)

    return make


def found(config: NodeConfig, what: str) -> list[Finding]:
    """What the checks whose name begins so say."""
    alone, together = doctor_checks.checks(config)
    return list(examine([check for check in (*alone, *together) if check.what.startswith(what)], ()))


def wrong(findings: list[Finding]) -> list[Finding]:
    bad = [finding for finding in findings if finding.state is State.WRONG]
    assert all(finding.remedy for finding in bad)
    return bad


def test_nothing_is_wrong_with_a_node_that_is_well(config: Callable[..., NodeConfig], running_node: Start) -> None:
    node = running_node(engines={}, jobs={"workers": 0})
    ran = node.command("doctor", check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = ran.stdout
    for what in ("configuration", "rules", "data folder", "disk space", "disk speed", "intake journal", "node",
                 "dicom_port", "ready: catalog", "catalog", "ledger"):  # fmt: skip
        assert re.search(rf"^(ok|note) +{what}: ", said, re.M), (what, said)
    assert said.endswith("nothing is wrong\n") and "WRONG" not in said
    assert not list(node.data_dir.glob(".doctor*"))
    place = {"host": "127.0.0.1", "port": node.dicom_port}
    made = config(destinations={"here": {"ae_title": "DICOM_NODE", **place}, "else": {"ae_title": "NOBODY", **place}})
    assert [one.state for one in found(made, "destination here")] == [State.OK]
    (refused,) = wrong(found(made, "destination else"))
    assert "lets DICOM_NODE in" in refused.remedy


def test_the_exit_status_tells_and_the_remedy_is_on_the_line(
    config: Callable[..., NodeConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    made = config(destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": free_port()}})
    (tmp_path / "node.yaml").write_text(json.dumps(made.model_dump(mode="json", exclude={"http_public_url"})))
    assert main(["doctor", "--config", str(tmp_path / "node.yaml")]) == 2
    out = capsys.readouterr().out
    (line,) = re.findall(r"^WRONG +destination PACS: .*(?:\n        .*)*", out, re.M)
    assert "lets" in line and "DICOM_NODE in" in " ".join(line.split())
    assert out.endswith("1 thing is wrong\n")
    assert max(map(len, out.splitlines())) <= 120
    (tmp_path / "node.yaml").write_text("dicom_prot: 104")
    assert main(["doctor", "--config", str(tmp_path / "node.yaml")]) == 2
    assert "dicom_prot: unknown key" in capsys.readouterr().err


def test_a_check_that_hangs_or_breaks_keeps_nobody_from_his_work() -> None:
    gate = threading.Event()

    def hangs() -> Iterator[Finding]:
        gate.wait(60)
        yield from ()

    def breaks() -> Iterator[Finding]:
        raise ValueError("CANARY^NAME")

    def says_why() -> Iterator[Finding]:
        raise ConfigError("no such thing")

    checks = [Check(what=look.__name__, look=look, remedy="mend it", limit_s=0.3) for look in (hangs, breaks, says_why)]
    began = time.monotonic()
    findings = list(examine(checks, checks))
    gate.set()
    assert time.monotonic() - began < 10
    assert [(one.what, one.state) for one in findings] == [(check.what, State.WRONG) for check in checks] * 2
    assert [one.text for one in findings[:3]] == [
        "no answer within 0.3 s", "the check itself failed, ValueError", "no such thing",
    ]  # fmt: skip
    assert not any("CANARY" in line for one in findings for line in lines(one))


def test_a_destination_that_says_nothing_takes_bounded_time(config: Callable[..., NodeConfig]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = config(
            destinations={"mute": {"ae_title": "X", "host": "127.0.0.1", "port": silent.getsockname()[1]}},
            delivery={"connect_timeout_s": 0.5, "response_timeout_s": 0.5},
        )
        began = time.monotonic()
        assert wrong(found(made, "destination"))
        assert time.monotonic() - began < 10


def test_a_taken_port_is_named(config: Callable[..., NodeConfig]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (finding,) = wrong(found(config(dicom_port=port), "ports"))
        files = {name: f"/nowhere/{name}" for name in ("certificate", "key", "ca")}
        (encrypted,) = wrong(found(config(tls={**files, "port": port}), "ports"))
    assert finding.what == "dicom_port" and str(port) in finding.text and "another dicom_port" in finding.remedy
    assert encrypted.what == "tls.port" and str(port) in encrypted.text


def test_a_disk_below_the_reserve_is_wrong(config: Callable[..., NodeConfig]) -> None:
    made = config(storage={"reserve_bytes": 1 << 60, "reserve_ratio": 0.0})
    (finding,) = wrong(found(made, "disk"))
    assert "C-STORE is refused" in finding.text
    space = os.statvfs(made.data_dir.parent)
    free = space.f_bavail * space.f_frsize
    near = config(storage={"reserve_bytes": free // 2, "reserve_ratio": 0.0, "pause_at": 4})
    (finding,) = wrong(found(near, "disk"))
    assert "routine and background jobs wait" in finding.text


def test_a_disk_that_syncs_slowly_is_wrong(config: Callable[..., NodeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(fd: int) -> None:
        time.sleep(0.11)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    (finding,) = wrong(found(config(), "disk"))
    assert finding.what == "disk speed" and "SSD" in finding.remedy


def test_without_direct_access_the_journal_is_told_as_slower_not_as_wrong(
    config: Callable[..., NodeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuses(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuses)
    (finding,) = [one for one in found(config(), "disk") if one.what == "intake journal"]
    assert finding.state is State.NOTE and "as safe and slower" in finding.text


@pytest.mark.parametrize(("kind", "state"), [("nfs4", State.WRONG), ("tmpfs", State.NOTE), ("ext4", State.OK)])
def test_the_file_system_matters(
    config: Callable[..., NodeConfig], monkeypatch: pytest.MonkeyPatch, kind: str, state: State
) -> None:
    monkeypatch.setattr(doctor_checks, "_kind_of", lambda folder: kind)
    (finding,) = [one for one in found(config(), "disk") if one.what == "file system"]
    assert finding.state is state


def test_retention_that_makes_room_only_after_jobs_wait_is_wrong(config: Callable[..., NodeConfig]) -> None:
    (off,) = found(config(), "retention")
    assert off.state is State.OK and "everything is kept" in off.text
    storage = {"reserve_bytes": 1000, "reserve_ratio": 0.0, "pause_at": 1.5}
    for free, is_wrong in ((500, True), (501, False)):
        rules = [{"name": "room", "free_bytes": free}]
        bad = wrong(found(config(storage=storage, retention={"rules": rules}), "retention"))
        assert [one.text for one in bad] == [
            f"rule room makes room below {free} bytes above the reserve, where jobs wait below 500"
        ] * is_wrong


def test_a_data_folder_open_to_others_is_wrong(config: Callable[..., NodeConfig]) -> None:
    made = config()
    made.data_dir.chmod(0o755)
    (finding,) = wrong(found(made, "data folder"))
    assert finding.remedy == f"chmod 700 {made.data_dir}"


def test_broken_rules_are_wrong(config: Callable[..., NodeConfig], tmp_path: Path) -> None:
    (tmp_path / "rules" / "a.yaml").write_text("rule: a\nwhen: [Modaliti == 'CT']\nrun: {engine: ct-abdomen}\n")
    (finding,) = wrong(found(config(), "rules"))
    assert "a.yaml:" in finding.text and finding.remedy == "dicom-node rules check"


def test_a_ledger_that_does_not_balance_and_dead_letters_are_wrong(config: Callable[..., NodeConfig]) -> None:
    made = config(peers={"ct": {"ae_title": "CT1"}})
    opened = open_catalog(made.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    try:
        assert not wrong(found(made, "catalog"))
        assert [one.state for one in found(made, "catalog") if one.what == "peer ct"] == [State.NOTE]
        later = (SystemClock().wall() + timedelta(hours=1)).isoformat()
        opened.database.write(
            lambda connection: (
                connection.execute("INSERT INTO receipt VALUES ('1.2', '1.2.3', '2026-01-01T00', 'CT1')"),
                connection.execute(
                    "INSERT INTO delivery (study_instance_uid, series_instance_uid, rule, destination, input_digest, "
                    "rank, state, created_at, since_s, since_boot_id, since_at) "
                    "VALUES ('1.2', '1.2.3', 'r', 'PACS', '', 1, 'failed', '', 0, '', ?)",
                    (later,),
                ),
            )
        )
        bad = wrong(found(made, "catalog"))
    finally:
        opened.close()
    assert [one.what for one in bad] == ["ledger", "dead letters"]
    assert "1 series" in bad[0].text and "deliveries retry" in bad[1].remedy


def test_objects_from_the_future_say_that_the_clock_is_wrong() -> None:
    later = (SystemClock().wall() + timedelta(hours=1)).isoformat()
    (finding,) = doctor_checks._times(later)
    assert finding.state is State.WRONG and finding.what == "clock"
    assert list(doctor_checks._times(SystemClock().wall().isoformat())) == []


def test_an_engine_that_cannot_run_is_named_with_its_reason(config: Callable[..., NodeConfig]) -> None:
    made = config(engines={"lungs": {"model": "there-is-none"}})
    (finding,) = wrong(found(made, "engine"))
    assert finding.what == "engine lungs" and "there-is-none" in finding.text


def test_the_sandbox_is_tried_in_a_process_of_its_own(config: Callable[..., NodeConfig]) -> None:
    findings = found(config(), "sandbox")
    assert [one.what for one in findings] == ["sandbox", "models"] and not wrong(findings)
    assert os.access("/proc/self/mem", os.W_OK)  # this process is not confined


def _certificate(folder: Path, days: int) -> Path:
    path = folder / f"{days}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         str(folder / "key.pem"), "-out", str(path), "-subj", "/CN=node", "-days", str(days)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return path


def test_certificates_in_the_settings_are_looked_at_wherever_they_stand(
    tmp_path: Path, tool: Callable[[str], str]
) -> None:
    tool("openssl")
    good, soon = _certificate(tmp_path, 400), _certificate(tmp_path, 5)
    (tmp_path / "text.pem").write_text("no certificate")
    settings = {"tls": {"certificate": good, "key": tmp_path / "key.pem", "ca": None},
                "destinations": {"PACS": {"tls": {"ca": soon}}}}  # fmt: skip
    named = dict(doctor_checks._certificates(settings))
    assert named == {"tls.certificate": good, "destinations.PACS.tls.ca": soon}
    states = {path: [one.state for one in doctor_checks._certificate("c", path)] for path in (good, soon)}
    assert states == {good: [State.OK], soon: [State.WRONG]}
    for bad in ("text.pem", "nowhere.pem"):
        check = Check(what="c", look=lambda bad=bad: doctor_checks._certificate("c", tmp_path / bad), remedy="renew")  # type: ignore[misc]
        (finding,) = examine([check], ())
        assert finding.state is State.WRONG and bad in finding.text


def test_what_answers_ready_with_no_checks_is_not_well(config: Callable[..., NodeConfig]) -> None:
    """Another program at that port, or a node whose /ready has gone elsewhere: silence would read as health."""
    server = HealthServer(socket.create_server(("127.0.0.1", 0)))
    server.start()
    try:
        (finding,) = ready(config(), {"http_port": server.port})
    finally:
        server.stop()
    assert finding.state is State.WRONG and "answers /ready with status 404 and no checks" in finding.text


def test_the_doctor_asks_with_the_token_and_tells_when_it_is_not_taken(
    config: Callable[..., NodeConfig], tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path, text in ((ours, "a" * 40), (theirs, "b" * 40)):
        path.write_text(text)
        path.chmod(0o600)
    checks = (lambda: HealthCheck(name="catalog", ok=True),)
    listener = socket.create_server(("127.0.0.1", 0))
    server = HealthServer(listener, checks=checks, doorman=Doorman(BearerToken("", theirs)))
    server.start()
    try:
        facts = {"http_port": server.port}
        (refused,) = ready(config(http_token_file=ours), facts)
        assert refused.state is State.WRONG and "does not take the token" in refused.text
        (taken,) = ready(config(http_token_file=theirs), facts)
        assert (taken.what, taken.state) == ("ready: catalog", State.OK)
    finally:
        server.stop()
    theirs.chmod(0o644)
    (finding,) = wrong(found(config(http_token_file=theirs), "configuration"))
    assert "mode 0644" in finding.text
