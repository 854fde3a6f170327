"""Secrets: named, read when needed, never shown."""

import json
import logging
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicom_node.engines._settings import Options, parse_options
from dicom_node.engines.secrets import Secret
from dicom_node.errors import ConfigError

VALUE = "s3cr3t-Value/42=="


class _Block(Options):
    token: Secret


@pytest.mark.parametrize(
    "literal",
    [VALUE, "", "Bearer " + VALUE, "ENV:NAME", "env:", "env:DICOM_NODE_TOKEN", "env:1X", "env:A B", "file:key"],
)
def test_anything_but_a_place_is_refused_and_not_repeated(literal: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Secret(literal)
    assert "env:NAME or file:" in str(refused.value)
    assert VALUE not in str(refused.value)


def test_a_variable_is_read_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_TOKEN", VALUE)
    secret = Secret("env:ENGINE_TOKEN")
    assert secret.reveal() == VALUE
    monkeypatch.setenv("ENGINE_TOKEN", "renewed")
    assert secret.reveal() == "renewed"


def test_a_file_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(VALUE + "\r\n")
    assert Secret(f"file:{path}").reveal() == VALUE


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo", b"tab\there", "äöü".encode(), b"x" * 70_000])
def test_a_file_that_holds_no_header_value_is_refused_by_name_only(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)) as refused:
        Secret(f"file:{path}").reveal()
    assert "two" not in str(refused.value) and "xxx" not in str(refused.value)


def test_a_missing_secret_names_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="env:ENGINE_TOKEN is missing"):
        Secret("env:ENGINE_TOKEN").reveal()
    with pytest.raises(ConfigError, match="No such file"):
        Secret(f"file:{tmp_path}/none").reveal()


def test_it_is_masked_wherever_it_is_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ENGINE_TOKEN", VALUE)
    block = _Block(token=Secret("env:ENGINE_TOKEN"))
    block.token.reveal()
    caplog.set_level(logging.DEBUG)
    logging.getLogger("dicom_node.test").info("settings %s", block, extra={"token": block.token})
    shown = [repr(block.token), str(block.token), f"{block.token!s:>40}", repr(block), str(block.model_dump())]
    shown += [block.model_dump_json(), json.dumps(block.model_dump(mode="json")), caplog.text]
    assert all("ENGINE_TOKEN" in text and VALUE not in text for text in shown)
    assert VALUE.encode() not in pickle.dumps(block.token)
    assert pickle.loads(pickle.dumps(block.token)) == block.token


def test_options_with_a_literal_are_refused_without_quoting_it() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_options(_Block, "relu", {"token": VALUE})
    assert "engines.relu.options.token" in str(refused.value) and VALUE not in str(refused.value)
    assert refused.value.__cause__ is None
    with pytest.raises(ValidationError) as raw:
        _Block.model_validate({"token": VALUE})
    assert VALUE not in str(raw.value)


def test_options_name_an_unknown_key_and_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"engines\.relu\.options\.tokn: unknown key; known: token"):
        parse_options(_Block, "relu", {"token": "env:A", "tokn": VALUE})
