"""Where secrets may stand: every setting that takes one is listed here; and mistakes a node does not start with."""

import importlib
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import dicom_node.engines
from dicom_node import commands, supervisor
from dicom_node import config as config_module
from dicom_node import settings as settings_module
from dicom_node.cli import main
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError
from dicom_node.private_files import check_private, read_private
from dicom_node.starting import check_access

TELLING = re.compile(r"(token|secret|pass(word|phrase|code|wd)|credential|auth|api_?key|(^|_)key)", re.IGNORECASE)
# Of a type that takes env:NAME or file:/path and nothing else, or blocks of such
SECRET = re.compile(r"\b(Secret|OAuthSettings)\b")
# Names that tell of a secret and are none, or say where one lies
NO_SECRETS = {
    ("LeapAiOptions", "token_warning_days"): "days",
    ("OAuthSettings", "token_url"): "an address, without user and password",
    ("PlatformOptions", "keys"): "names of metadata",
    ("ReluOptions", "volumes_key"): "a word of JSON",
    ("TlsSettings", "client_auth"): "whether a certificate is asked for",
    **{
        (block, name): "where it lies"
        for block in ("TlsSettings", "TlsClientSettings", "_KeySettings")
        for name in ("key", "key_passphrase_env", "key_passphrase_file")
    },
    ("FindSettings", "unsupported_optional_keys"): "keys of a query",
    ("JwtSettings", "key"): "where a public key lies",
    ("NodeConfig", "http_token_env"): "where it lies",
    ("NodeConfig", "http_token_file"): "where it lies",
    ("NodeConfig", "http_without_token"): "whether",
}
TOKEN = "6a" * 32


def _blocks() -> Iterator[type[BaseModel]]:
    names = [f"dicom_node.engines.{module.name}" for module in pkgutil.iter_modules(dicom_node.engines.__path__)]
    seen: set[type[BaseModel]] = set()
    for module in (config_module, settings_module, *map(importlib.import_module, names)):
        for found in vars(module).values():  # also what a module has from another
            if isinstance(found, type) and issubclass(found, BaseModel) and found not in seen:
                seen.add(found)
                yield found


def test_every_setting_that_takes_a_secret_takes_only_where_it_lies() -> None:
    in_clear, secrets = [], 0
    for block in _blocks():
        for name, field in block.model_fields.items():
            if not TELLING.search(name) or (block.__name__, name) in NO_SECRETS:
                continue
            if SECRET.search(repr(field.annotation)) or name.endswith(("_env", "_file")):
                secrets += 1
            else:
                in_clear.append((block.__name__, name))
    assert in_clear == [] and secrets >= 8


@pytest.mark.parametrize(
    "options",
    [
        {"token": "eyJ-secret"},
        {"auth": {"client_secret": "eyJ-secret"}},
        {"params": {"API_KEY": "eyJ-secret"}},
        {"servers": [{"password": "eyJ-secret"}]},
        {"x-api-key": "eyJ-secret"},
        {"apiKey": "eyJ-secret"},
        {"clientSecret": "eyJ-secret"},
        {"private_key": "eyJ-secret"},
        {"user": {"name": "anna", "passcode": "eyJ-secret"}},
        {"base_url": "https://anna:eyJ-secret@engine.example/v1"},
    ],
)
@pytest.mark.parametrize("kind", ["monai_label", "somebody-elses"])
def test_an_engine_is_given_no_secret_in_clear_whoever_made_it(options: dict[str, Any], kind: str) -> None:
    with pytest.raises(ValueError, match="write env:NAME or file:/absolute/path"):
        NodeConfig.model_validate({"engines": {"e": {"kind": kind, "options": options}}})


def test_where_a_secret_lies_and_what_is_none_is_taken() -> None:
    options = {"token": "env:TOKEN", "auth": {"client_secret": "file:/run/s", "token_url": "https://a/"}, "keys": {}}
    options |= {"token_warning_days": 3, "password": "", "token_url": "https://a:8443/x@y", "pad_tokens": "a"}
    options |= {"user": {"name": "anna", "passcode_env": "ANNA"}}
    assert NodeConfig.model_validate({"engines": {"e": {"kind": "x", "options": options}}}).engines["e"].options


@pytest.mark.parametrize(
    ("mode", "taken"), [(0o600, True), (0o640, True), (0o400, True), (0o644, False), (0o660, False)]
)
def test_a_file_with_a_secret_is_for_its_owner_and_group_only(tmp_path: Path, mode: int, taken: bool) -> None:
    path = tmp_path / "secret"
    path.write_text("value")
    path.chmod(mode)
    if taken:
        assert read_private("key", path, 10) == b"value"
    else:
        with pytest.raises(ConfigError, match=f"mode {mode:04o}, expected 0600 or 0640: run `chmod 600 ") as caught:
            read_private("key", path, 10)
        assert "value" not in str(caught.value)


def test_a_pipe_is_no_secret_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="no regular file"):
        read_private("key", tmp_path / "pipe", 10)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")
def test_a_secret_that_root_made_says_how_the_node_gets_to_read_it(free_folder: Path) -> None:
    path = free_folder / "secret"
    path.write_text("value")
    path.chmod(0o600)
    os.setegid(54321)
    os.seteuid(54321)
    try:
        with pytest.raises(ConfigError, match=r"run `chown root:54321 .*secret` and `chmod 640 .*secret` as root"):
            read_private("key", path, 10)
        with pytest.raises(ConfigError, match="chown root:54321"):
            check_private("key", path)
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def free_folder() -> Iterator[Path]:
    """A folder that every user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_neither_a_folder_nor_what_is_too_long_is_read_as_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no regular file|Is a directory"):
        read_private("key", tmp_path, 10)
    (tmp_path / "long").write_text("x" * 11)
    (tmp_path / "long").chmod(0o600)
    with pytest.raises(ConfigError, match="longer than 10 bytes"):
        read_private("key", tmp_path / "long", 10)


PEER = {"ct": {"ae_title": "CT1"}}
PLACE = {"ae_title": "P", "host": "::1", "port": 1}
TLS = {"certificate": "{open}", "key": "{open}", "ca": "{open}"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "DICOM open to all": ({"host": "0.0.0.0"}, "no peers are configured; list who may connect"),
    "peers and anybody": ({"host": "0.0.0.0", "peers": PEER, "allow_any_peer": True}, "remove one of the two"),
    "a key others can read": ({"tls": TLS}, "tls.key: .* has mode 0644, expected 0600 or 0640: run `chmod 600"),
    "no authority for clients": ({"tls": {"certificate": "a", "key": "b"}}, "set ca to the PEM file of yours"),
    "a peer's certificate, and TLS off": ({"peers": {"ct": {"ae_title": "CT1", "certificates": ["ab" * 32]}}},
                                          "set `tls:` with client_auth: required"),
    "HTTP open to all": ({"http_host": "0.0.0.0"}, "set http_token_file"),
    "metrics open to all": ({"metrics_host": "0.0.0.0", "metrics_port": 0}, "set http_token_file"),
    "a token others can read": ({"http_token_file": "{open}"}, "http_token_file: .* has mode 0644"),
    "a token to guess": ({"http_token_file": "{short}"}, "expected at least 32; make one with `openssl rand"),
    "a token that is not there": ({"http_token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
    "a secret in clear": ({"engines": {"e": {"kind": "kserve", "options": {"token": TOKEN}}}}, "write env:NAME"),
    "a password in a URL": ({"http_public_url": f"https://me:{TOKEN}@node/"}, "http_public_url: "),
    "a key that is none": ({"toekn": TOKEN}, "toekn: unknown key"),
    "a token where its variable's name belongs": ({"http_token_env": TOKEN}, r"http_token_env: .*pattern"),
    "a passcode where its variable's name belongs": (
        {"destinations": {"P": {**PLACE, "user": {"name": "a", "passcode_env": TOKEN}}}},
        r"passcode_env: .*pattern"),
    "passcodes in clear": ({"host": "0.0.0.0", "peers": PEER, "user_identity": {"users_file": "{short}"}},
                           "passcodes and tokens cross the network in clear"),
    "passcodes others can read": ({"user_identity": {"users_file": "{open}"}}, "users_file: .* has mode 0644"),
    "a passcode that is not hashed": ({"user_identity": {"users_file": "{short}"}}, "is no NAME:scrypt"),
    "a user nobody can be": ({"peers": {"ct": {"ae_title": "CT1", "users": ["anna"]}}}, "set `user_identity:`"),
    "no rules": ({"rules_dir": "/nonexistent/rules"}, "/nonexistent/rules does not exist; create it"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_node_does_not_start_with_a_mistake_that_would_open_it(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(config: NodeConfig, _: object) -> int:
        check_access(config)  # the first step of a start, see `test_recovery`
        raise AssertionError("it started")

    monkeypatch.setattr(supervisor, "serve", started)
    monkeypatch.setattr(commands, "setup_logging", lambda *_: None)
    for name, text, mode in (("open", TOKEN, 0o644), ("short", "short", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    wrong, message = MISTAKES[mistake]
    (tmp_path / "rules").mkdir()
    text = yaml.safe_dump({"data_dir": str(tmp_path / "data"), "rules_dir": str(tmp_path / "rules"), **wrong})
    for name in ("open", "short"):
        text = text.replace(f"'{{{name}}}'", str(tmp_path / name))
    (tmp_path / "node.yaml").write_text(text)
    assert main(["serve", "--config", str(tmp_path / "node.yaml")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert TOKEN not in said
