"""`dicom-node engines aiaa-model ...` against a contract server."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicom_node import cli

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., int]


def _server_module() -> ModuleType:
    name = "contract_server_aiaa_admin"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "engines" / "servers" / "aiaa.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture
def peer() -> Iterator[Any]:
    with SERVERS.AiaaServer() as server:
        yield server


@pytest.fixture
def run(peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("get", "clara")`: the command, its exit status; engine `clara` is on the server, `local` is another."""
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    engines = {
        "clara": {"kind": "aiaa", "model": "clara_spleen", "options": {"base_url": peer.url, "retries": 0}},
        "label": {"kind": "monai_label", "model": "x", "options": {"base_url": peer.url}},
    }
    settings = {"data_dir": str(tmp_path / "data"), "rules_dir": str(tmp_path), "engines": engines}
    config = tmp_path / "node.yaml"
    config.write_text(json.dumps(settings))

    def do(*words: str) -> int:
        return cli.main(["engines", "aiaa-model", *words, "--config", str(config)])

    return do


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A configuration and a model."""
    config, data = tmp_path / "config_aiaa.json", tmp_path / "patients secret name.ts"
    config.write_text(json.dumps({"version": "2", "type": "segmentation", "labels": ["liver"]}))
    data.write_bytes(b"model bytes")
    return str(config), str(data)


def test_the_configuration_of_a_model_is_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("get", "clara") == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["spleen", "aorta"]
    assert run("get", "clara", "nobody") == 2
    assert "no model 'nobody'" in capsys.readouterr().err


def test_a_model_is_put_with_its_configuration(
    run: Run, peer: Any, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = files
    assert run("put", "clara", "clara_liver", "--model-config", config, "--model-data", data) == 0
    assert "clara_liver is loaded" in capsys.readouterr().out
    request = peer.requests[-1]
    assert (request.method, request.path) == ("PUT", "/admin/model/clara_liver")
    assert [(part.name, part.filename) for part in request.parts] == [
        ("config", "config_aiaa.json"),
        ("data", "model.ts"),
    ]
    assert request.parts[1].body == b"model bytes" and peer.models["clara_liver"]["labels"] == ["liver"]
    assert run("put", "clara", "another", "--model-config", config) == 2  # a new model needs its data
    assert "configuration does not fit" in capsys.readouterr().err


def test_a_configuration_alone_is_patched_where_the_server_can(
    run: Run, peer: Any, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    peer.generation = "3.x"
    assert run("patch", "clara", "--model-config", files[0]) == 0
    assert peer.configs["clara_spleen"]["version"] == "2"
    assert run("patch", "clara", "nobody", "--model-config", files[0]) == 2
    assert "no model 'nobody'" in capsys.readouterr().err
    peer.generation = "4.1"
    assert run("patch", "clara", "--model-config", files[0]) == 2
    assert "has no PATCH of models (Clara Train 4 took it away): use put" in capsys.readouterr().err
    assert run("patch", "clara", "--model-config", files[0], "--model-data", files[1]) == 2
    assert run("patch", "clara") == 2
    assert "--model-config: missing" in capsys.readouterr().err


def test_a_configuration_that_is_no_json_is_not_sent(
    run: Run, peer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert run("put", "clara", "--model-config", str(bad)) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert run("patch", "clara", "--model-config", str(tmp_path / "gone.json")) == 2
    assert not peer.requests


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("\n", True), ("no\n", True), ("", True)])
def test_a_model_is_deleted_only_when_a_person_agrees(
    run: Run, peer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, stays: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    assert run("delete", "clara") == 0
    assert ("clara_spleen" in peer.models) == stays
    assert "Take model clara_spleen off the server of engine clara?" in capsys.readouterr().out


def test_without_anybody_to_ask_it_must_be_said(
    run: Run, peer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run("delete", "clara") == 2
    assert "--yes" in capsys.readouterr().err and not peer.requests
    assert run("delete", "clara", "clara_pipe", "--yes") == 0
    assert "clara_pipe" not in peer.models
    assert run("delete", "clara", "clara_pipe", "--yes") == 2


def test_a_server_that_takes_admin_calls_from_elsewhere_says_so(
    run: Run, peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.admin_closed = True
    assert run("get", "clara") == 2
    assert "--admin_hosts" in capsys.readouterr().err


def test_an_engine_of_another_kind_and_one_that_is_not_there_are_told(
    run: Run, peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("get", "label") == 2
    assert "is of kind monai_label, not aiaa" in capsys.readouterr().err
    assert run("get", "nobody") == 2
    assert "there is no 'nobody'" in capsys.readouterr().err
    assert not peer.requests
