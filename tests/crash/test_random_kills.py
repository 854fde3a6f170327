"""`dicom_kill9.py`, a script of others: kill -9 and simulated power cuts at random moments while objects stream in.

It comes with the node's workplace and not with the node: TEST_KILL9 names it. TEST_KILL9_ROUNDS kills,
TEST_KILL9_POWERCUTS cuts; these need root, for they mount an image of a disk.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = os.environ.get("TEST_KILL9", "")
ROUNDS = int(os.environ.get("TEST_KILL9_ROUNDS", "20"))
POWERCUTS = int(os.environ.get("TEST_KILL9_POWERCUTS", "5"))
IMAGE_MB = 1500
UP_S = "120"

log = logging.getLogger(__name__)
pytestmark = [
    pytest.mark.crash,
    pytest.mark.skipif(not SCRIPT, reason="needs TEST_KILL9: the path of dicom_kill9.py"),
    pytest.mark.timeout(600 + 30 * ROUNDS + 60 * POWERCUTS),
]


@pytest.fixture
def attack(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., dict[str, Any]]:
    """`attack(data_dir, *options)`: run the script on a node that keeps its data there; its last line."""
    port = free_port()
    rules = tmp_path / "rules"
    rules.mkdir()

    def run(data_dir: str, *options: str) -> dict[str, Any]:
        settings = {"data_dir": data_dir, "rules_dir": str(rules), "dicom_port": port, "http_port": free_port()}
        settings |= {"engines": {}, "jobs": {"workers": 0}, "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0}}
        config = tmp_path / "node.yaml"
        config.write_text(json.dumps(settings))
        serve = f"{sys.executable} -m dicom_node.cli serve --config {config}"
        command = [sys.executable, SCRIPT, "--cmd", serve, "--port", str(port), "--aet", "DICOM_NODE", "--up", UP_S]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
        assert lines or "umount" in ran.stderr, ran.stdout + ran.stderr
        return dict(json.loads(lines[-1])) if lines else {}

    return run


def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(attack: Any, tmp_path: Path) -> None:
    told = attack(str(tmp_path / "data"), "--verify", "get", "--rounds", str(ROUNDS))
    log.warning("kill -9: %s", told)
    assert (told["verdict"], told["lost"], told["rounds"]) == ("PASS", 0, ROUNDS), told


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mount"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: power cuts mount an image of a disk")
def test_nothing_acknowledged_is_lost_by_power_cuts(attack: Any, mount: Path) -> None:
    acknowledged = lost = 0
    for number in range(POWERCUTS):
        told: dict[str, Any] = {}
        for seed in range(1000 * number, 1000 * number + 5):  # the script trips over a mount that is busy yet
            options = ("--powercut", str(IMAGE_MB), "--mount", str(mount), "--rounds", "1", "--seed", str(seed))
            told = attack(str(mount / "data"), "--verify", "find", *options)
            if told:
                break
        assert told.get("verdict") == "PASS", told
        acknowledged, lost = acknowledged + told["acked"], lost + told["lost"]
    log.warning("power cuts: %d, %d acknowledged, %d lost", POWERCUTS, acknowledged, lost)
    assert lost == 0 and acknowledged > 0
