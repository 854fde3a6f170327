"""`dicom-node models`: what is said, and that nothing is left after a refusal."""

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicom_node import cli
from dicom_node.demo.packages import WEIGHTS_FILE, ct_package

Write = Callable[[Path, dict[str, Any]], Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_package: Write) -> Path:
    """A current folder with two versions of a package (`one`, `two`), whose weights nobody runs, and `one.zip`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    for name in ("one", "two"):
        content = f"weights of {name}".encode()
        manifest = ct_package(hashlib.sha256(content).hexdigest()) | {"id": "spleen", "version": f"{name}.0"}
        manifest.pop("metrics", None)
        write_package(tmp_path / name, manifest)
        (tmp_path / name / WEIGHTS_FILE).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for file in (tmp_path / "one").iterdir():
            archive.write(file, f"top/{file.name}")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["models", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def columns(out: str, first: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.startswith(first)]


def test_from_import_to_removal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "import", "one.zip", "--no-self-test")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "spleen@one.0: installed",
        "it is enabled: an engine with 'model: spleen' runs it",
    ]
    assert said(capsys, "import", "one", "--no-self-test")[1].startswith("spleen@one.0: was installed already")
    assert "enable spleen@two.0' makes the switch" in said(capsys, "import", "two", "--no-self-test")[1]

    (here / "config").mkdir()
    (here / "config" / "node.yaml").write_text("engines:\n  organs: {model: spleen}\n")
    out = said(capsys, "list")[1]
    (one, two) = columns(out, "spleen")
    assert one[:8] == ["spleen", "one.0", "state_dict", "data", "segmentation", "yes", "demonstration", one[7]]
    assert (two[5], one[8], two[8]) == ("no", "organs", "-")
    assert one[9] == os.path.join("data", "models", "spleen", "one.0")

    assert said(capsys, "check", "organs")[1] == "organs: can run\n"
    assert said(capsys, "remove", "spleen@one.0", "--force")[2].startswith(
        "dicom-node: spleen@one.0 is what engines.organs.model ('spleen') means"
    )
    out = said(capsys, "enable", "spleen@two.0")[1]
    assert out.startswith("spleen@two.0: enabled, from the next job on\nits network was not run at its import")
    assert said(capsys, "remove", "spleen@one.0")[1] == "spleen@one.0: removed\n"
    assert said(capsys, "disable", "spleen")[1] == "spleen: disabled, from the next job on\n"
    assert columns(said(capsys, "list")[1], "spleen")[0][5] == "disabled"
    status, _, err = said(capsys, "check", "organs")
    assert status == 2 and "'spleen' is disabled" in err
    assert said(capsys, "enable", "spleen")[0] == 0
    (here / "config" / "node.yaml").unlink()
    assert said(capsys, "remove", "spleen", "--force")[1] == "spleen@two.0: removed\n"
    assert columns(said(capsys, "list")[1], "spleen") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["import", "nowhere"], "no such folder or file"),
        (["import", "empty"], "no model package is recognised"),
        (["import", "one/weights.safetensors"], "one/weights.safetensors: no model package is recognised"),
        (["check", "nowhere"], "nor the folder of a package"),
        (["remove", "spleen"], "no model was installed there; name the node's folder with --data-dir"),
        (["enable", "spleen"], "no model 'spleen' is installed"),
        (["disable", "spleen"], "no model 'spleen' is installed"),
        (["enable", "a/b"], "expected ID or ID@VERSION"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    (here / "empty").mkdir()
    status, out, err = said(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("dicom-node: ") and err.count("\n") == 1
    assert expected in err
    left = here / "data" / "models"
    assert not left.exists() or [path.name for path in left.iterdir()] == [".lock"]


def test_a_file_must_have_the_digest_that_was_promised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256((here / "one.zip").read_bytes()).hexdigest()
    status, _, err = said(capsys, "import", "one.zip", "--no-self-test", "--sha256", "0" * 64)
    assert status == 2 and f"sha256 is {digest}, expected 0000" in err
    assert "a folder has no sha256" in said(capsys, "import", "one", "--sha256", digest)[2]
    assert said(capsys, "import", "one.zip", "--no-self-test", "--sha256", digest.upper())[0] == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"input.intensity": [{"clip": [-958, 327]}, {"normalize": {"mean": 82.9, "std": 136.9}}]},
            "held within -958..327, then normalized by the model's mean and deviation",
        ),
        (
            {"input.intensity": [{"normalize": {"nonzero": True}}, {"minmax": {}}], "input.values": "any"},
            "the modality's own values; normalized by the volume's own mean and deviation, zeros aside, "
            "then lowest to highest mapped to 0..1",
        ),
        (
            {"input.intensity": [{"range": {"from": [-57, 164], "to": [0, 1], "clip": True}}]},
            "-57..164 mapped to 0..1, held at the ends",
        ),
        ({"input.intensity": []}, "as they are"),
        ({"infer.window": None}, "the whole volume"),
        (
            {"select.geometry": {"max_spacing_mm": 5, "orientation": "axial"}},
            "at least 3 slices, axial slices, at most",
        ),
    ],
)
def test_check_without_a_run_tells_what_the_package_needs(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    manifest = yaml.safe_load((here / "one" / "model.yaml").read_text())
    for key, value in changes.items():
        block, name = key.split(".")
        manifest[block][name] = value
    (here / "one" / "model.yaml").write_text(yaml.safe_dump(manifest))
    status, out, err = said(capsys, "check", "one", "--no-self-test")
    assert (status, err) == (0, "")
    assert told in " ".join(out.split())
    assert "self-test: not run" in " ".join(out.split())


def test_a_failed_self_test_is_told_and_nothing_is_installed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "import", "one")
    assert (status, out) == (2, "")
    assert "weights.safetensors" in err
    assert [path.name for path in (here / "data" / "models").iterdir()] == [".lock"]


def test_check_of_a_zip_says_what_the_network_needs_and_tells(
    here: Path, capsys: pytest.CaptureFixture[str], ct_folder: Path, write_package: Write
) -> None:
    manifest = yaml.safe_load((ct_folder / "model.yaml").read_text())
    manifest["select"]["geometry"]["regular"] = "repair"
    manifest["input"]["crop"] = {"above": 0.1, "margin": 4}
    manifest["infer"]["mirror"] = [0, 1]
    folder = write_package(here / "ct", manifest)
    (folder / WEIGHTS_FILE).write_bytes((ct_folder / WEIGHTS_FILE).read_bytes())
    with zipfile.ZipFile(here / "ct.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    status, out, _ = said(capsys, "check", "ct.zip")
    assert status == 0
    told = " ".join(out.split())
    for part in (
        "model: demo-ct-abdomen",
        "trust: data: nothing in the package is executed",
        "windows of 32x32x32",
        "mirrored along 2 axes (4 passes)",
        "an irregular stack is repaired, and the result says how",
        "Hounsfield units only; -160..240 mapped to -1..1",
        "cut to what is above 0.1, 4 voxels around",
        "1: Liver",
        "self-test: passed: 4 outputs, all finite (cpu",
        "MiB in the runtime process",
        "windows, about",
    ):
        assert part in told, part
    assert sorted(path.name for path in here.iterdir()) == ["ct", "ct.zip", "one", "one.zip", "two"]
