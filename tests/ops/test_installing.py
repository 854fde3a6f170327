"""The service unit and the container file that ship."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_node.cli import _parser, main

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "config" / "systemd" / "dicom-node.service"
CONTAINER = ROOT / "Containerfile"
PROGRAM = "/opt/dicom-node/venv/bin/dicom-node"
Tool = Callable[[str], str]


def test_the_unit_is_right_and_hardened(tool: Tool, tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert PROGRAM in text
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(PROGRAM, "/bin/true"))  # which is there
    analyze = tool("systemd-analyze")
    ran = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
    # exposure in tenths, 0 to 100: without the hardening it is 96
    security = [analyze, "security", "--offline=true", "--threshold=25", str(unit)]
    ran = subprocess.run(security, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout[-300:] + ran.stderr


@pytest.mark.parametrize("file", [UNIT, CONTAINER])
def test_the_commands_that_are_started_are_the_programs_own(file: Path) -> None:
    lines = file.read_text()
    started = [line.split()[1:] for line in re.findall(rf"^ExecStart(?:Pre)?={PROGRAM}.*$", lines, re.M)]
    started += [[word.strip('" ') for word in words.split(",")] for words in re.findall(r"^CMD \[(.*)\]$", lines, re.M)]
    assert started
    for words in started:
        assert _parser().parse_args(words).config == "/etc/dicom-node/node.yaml"


def test_all_that_the_container_is_built_of_is_in_the_repository() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", CONTAINER.read_text(), re.M)
        for source in line.split()[:-1]
    ]
    assert copied and not [source for source in copied if not (ROOT / source).exists()]
    inside = [path for source in copied if (ROOT / source).is_dir() for path in (ROOT / source).rglob("*")]
    outside = [path for path in inside if path.is_symlink() and not path.resolve().is_relative_to(path.parent)]
    reached = [path for path in outside if not any(path.resolve().is_relative_to(ROOT / source) for source in copied)]
    assert not reached, "a link leads to what is not copied"


def test_the_example_of_a_hospital_is_right_and_its_rules_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "20-ct-abdomen.yaml", rules)  # as step 4 says
    words = ["--config", str(ROOT / "config" / "hospital.yaml"), "--rules", str(rules)]
    assert main(["config", "check", *words]) == main(["rules", "check", *words]) == 0


def test_every_command_the_readme_tells_a_hospital_can_be_said() -> None:
    text = (ROOT / "README.md").read_text()
    part = text[text.index("### Run it in a hospital") : text.index("## Decisions")]
    lines = [line.split("#")[0] for line in part.splitlines() if line.startswith("    ")]
    said = [
        shlex.split(line.replace("$(date +%F)", "today").split("dicom-node ", 1)[1])
        for line in lines
        if re.match(r"    (sudo -u dicom-node )?dicom-node ", line)
    ]
    said = [words[1:] if words[0] == "dicom-node" else words for words in said]
    assert len(said) >= 8
    for words in said:
        _parser().parse_args(words)
    files = re.findall(r"(?:config|routing_rules)/[\w./-]+\.(?:yaml|json|service)", part)
    assert len(set(files)) >= 5 and not [file for file in files if not (ROOT / file).exists()]
