"""The command line: what it says when something is wrong, and its offline commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dicom_node import cli
from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import ConfigError
from dicom_node.store.catalog import open_catalog
from dicom_node.transfers import peer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with an empty catalog in `data` and no rules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    monkeypatch.setattr("dicom_node.transfers.setup_logging", lambda *_: None)
    (tmp_path / "routing_rules").mkdir()
    catalog = open_catalog(tmp_path / "data", SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    catalog.close()
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version_is_quick_and_says_the_version() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", "version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.startswith("dicom-node ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["config", "check", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["config", "check", "--dicom-port", "70000"], "dicom_port"),
        (["config", "check", "--host", "0.0.0.0"], "no peers are configured"),
        (["config", "check", "--rules", "nowhere"], "nowhere does not exist"),
        (["status", "--data-dir", "nowhere"], "no node has been here"),
        (["fsck", "--data-dir", "nowhere"], "there is no such folder"),
        (["backup", "saved.db", "--data-dir", "nowhere"], "no node has been here"),
        (["restore", "saved.db", "--data-dir", "nowhere"], "there is no such folder"),
        (["restore", "saved.db"], "would be overwritten"),
        (["route", "1.2.3"], "study"),
        (["release", "1.2.3"], "study"),
        (["rules", "explain", "1.2.3"], "study"),
        (["jobs", "retry", "7"], "7"),
        (["deliveries", "cancel", "7"], "7"),
        (["rules", "reload"], "no node runs here"),
        (["rules", "replay", "--since", "soon"], "--since"),
        (["models", "check", "nothing"], "nothing"),
        (["send", "nowhere", "--to", "127.0.0.1:11112/X"], "nowhere"),
        (["send", ".", "--to", "somewhere"], "HOST:PORT/AET"),
        (["fetch", "not a uid", "--from", "127.0.0.1:11112/X"], "UID"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    status, out, err = said(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("dicom-node: ") and err.count("\n") == 1
    assert expected in err
    assert not (here / "nowhere").exists()


def test_a_catalog_is_saved_and_brought_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "backup", "saved.db")
    assert status == 0 and out.startswith("saved.db: 0 studies, 0 files, all in the archive")
    for path in (here / "data").glob("catalog.db*"):
        path.rename(here / path.name)
    status, out, _ = said(capsys, "restore", "saved.db")
    assert status == 0 and out.startswith("0 studies, 0 files are back")
    assert said(capsys, "status")[0] == 0
    assert said(capsys, "backup", "saved.db")[0] == 2


def test_one_wrong_id_does_not_keep_the_others_from_being_tried(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "jobs", "retry", "7", "8", "--data-dir", "data")
    assert (status, out) == (2, "")
    assert "no job 7" in err and "no job 8" in err


def test_an_unforeseen_error_shows_its_place_and_not_its_text(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: object) -> int:
        raise ValueError("CANARY^NAME")

    monkeypatch.setattr("dicom_node.commands.status", broken)
    status, _, err = said(capsys, "status")
    assert status == 2
    assert "internal error: ValueError at" in err and "test_cli.py" in err
    assert "CANARY" not in err


def test_status_of_an_empty_node_fits_a_screen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "status")
    assert status == 0
    assert "not running" in out and "nothing waits, nothing is stuck" in out
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 120


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives a file to another user")
@pytest.mark.parametrize("words", [["status"], ["delete", "1.2.3", "--yes"], ["doctor"], ["serve"], ["fsck"]])
def test_root_does_not_work_in_the_folder_of_a_node_that_runs_as_another_user(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    os.chown(here / "data" / "catalog.db", 54321, 54321)
    status, _, err = said(capsys, *words)
    assert status == 2 and "runs as #54321" in err and "sudo -u '#54321' dicom-node" in err


def test_commands_find_the_settings_of_the_installed_node(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = here / "etc.yaml"
    installed.write_text("ae_titles: [AINODE]\nengines: {}\n")
    monkeypatch.setattr("dicom_node.commands.INSTALLED", installed)
    assert said(capsys, "status")[1].startswith("AINODE: ")
    assert f"ok    settings: {installed}" in " ".join(said(capsys, "doctor")[1].split("\n        "))
    (here / "config").mkdir()
    (here / "config" / "node.yaml").write_text("ae_titles: [HERE]\n")
    assert said(capsys, "status")[1].startswith("HERE: ")
    assert said(capsys, "status", "--config", str(installed))[1].startswith("AINODE: ")


def test_status_for_programs_is_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "status", "--json")
    assert json.loads(out)["ledger_studies"]["imbalance"] == 0


@pytest.mark.parametrize(
    "words", [["jobs"], ["jobs", "list"], ["jobs", "--limit", "3"], ["deliveries", "--data-dir", "data"]]
)
def test_lists_are_the_default_action(here: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, out, _ = said(capsys, *words)
    assert status == 0
    assert out.strip() in ("no jobs", "no deliveries")


def test_rules_check_says_every_problem_with_file_and_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "routing_rules" / "a.yaml").write_text("rule: a\nwhen: [Modaliti == 'CT']\nrun: {engine: nothing}\n")
    status, _, err = said(capsys, "rules", "check")
    assert status == 2
    assert "a.yaml:2" in err and "a.yaml:3" in err


def test_rules_check_of_an_empty_folder_is_a_plain_archive(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a plain archive" in said(capsys, "rules", "check")[1]


def test_rules_check_warns_of_a_sender_that_can_be_nobody(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "rule: back\nwhen: [Modality == 'CT']\nrun: {engine: ct-abdomen, results: [sr]}\nsend: {to: [sender]}\n"
    (here / "routing_rules" / "a.yaml").write_text(rule)
    status, out, err = said(capsys, "rules", "check")
    assert status == 0 and "1 rules are right" in out
    assert "warning" in err and "a.yaml:1: rule back" in err and len(err.splitlines()) == 1
    (here / "config").mkdir()
    (here / "config" / "node.yaml").write_text("destinations: {PACS: {ae_title: PACS, host: h, port: 104}}\n")
    assert said(capsys, "rules", "check")[2] == ""


def test_config_check_prints_what_holds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config").mkdir()
    (here / "config" / "node.yaml").write_text("ae_titles: [MINE]\n")  # read because it exists
    status, out, _ = said(capsys, "config", "check", "--dicom-port", "104")
    assert status == 0
    assert (json.loads(out)["ae_titles"], json.loads(out)["dicom_port"]) == (["MINE"], 104)


def test_models_list_names_the_engines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "models", "list")
    assert "ct-abdomen" in out and "cxr-findings" in out


def test_fsck_of_an_empty_node_is_clean(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "fsck")
    assert (status, out) == (0, "0 rows, 0 files\narchive and index agree\n")


def test_a_peer_is_host_port_and_ae_title() -> None:
    found = peer("pacs.example:104/MY PACS")
    assert (found.host, found.port, found.ae_title) == ("pacs.example", 104, "MY PACS")
    assert peer("[::1]:11112/NODE").host == "::1"


@pytest.mark.parametrize("text", ["", "host/AET", "host:0/AET", "host:99999/AET", "host:104/", "host:104/" + "A" * 17])
def test_what_is_no_peer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        peer(text)
