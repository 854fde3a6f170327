"""The bearer token: asked for, compared, taken in again; and what the audit trail hears of wrong ones."""

import os
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError
from dicom_node.http import token as module
from dicom_node.http.health import Check, HealthServer
from dicom_node.http.token import BearerToken, Doorman, read_token

TOKEN = "0123456789abcdef" * 4


class Trail:
    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)

    def settled(self, timeout_s: float = 5.0) -> bool:
        return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _write(tmp_path / "http.token", TOKEN + "\n")


def _write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def guarded(file: Path) -> Iterator[Callable[..., HealthServer]]:
    servers: list[HealthServer] = []

    def start(doorman: Doorman, refused: Callable[[str], None] = lambda reason: None) -> HealthServer:
        listener = socket.create_server(("127.0.0.1", 0))
        checks = (lambda: Check(name="a", ok=True),)
        server = HealthServer(
            listener, checks=checks, metrics=lambda: ("text/plain", b"a 1\n"), doorman=doorman, refused=refused
        )
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def _ask(server: HealthServer, path: str, authorization: str = "", method: str = "GET") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers={"Authorization": authorization} if authorization else {})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("WWW-Authenticate", "")
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/metrics", "/ready"])
def test_who_has_no_token_or_a_wrong_one_is_told_to_bring_one(
    guarded: Callable[..., HealthServer], file: Path, path: str
) -> None:
    refused: list[str] = []
    server = guarded(Doorman(BearerToken("", file)), refused.append)
    assert _ask(server, path) == (401, 'Bearer realm="dicom-node"')
    assert _ask(server, path, method="POST")[0] == 401
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer", TOKEN, "Bearer \xff"):
        assert _ask(server, path, wrong) == (401, 'Bearer realm="dicom-node", error="invalid_token"')
    assert refused == ["no_token"] * 2 + ["token"] * 6
    assert _ask(server, path, f"Bearer {TOKEN}")[0] == 200
    assert _ask(server, path, f"bearer {TOKEN}")[0] == 200  # RFC 9110 11.1: in any case


def test_ping_never_asks_and_what_is_not_there_tells_nothing(guarded: Callable[..., HealthServer], file: Path) -> None:
    server = guarded(Doorman(BearerToken("", file)))
    assert _ask(server, "/ping") == (200, "") and _ask(server, "/metrics/x") == (404, "")


def test_a_changed_file_is_taken_in_and_a_bad_one_leaves_the_old_in_force(file: Path) -> None:
    token = BearerToken("", file)
    new = "f" * 40
    os.replace(_write(file.with_name("new"), new), file)
    assert token.fits(f"Bearer {new}") and not token.fits(f"Bearer {TOKEN}")
    _write(file, "too short")
    assert token.fits(f"Bearer {new}")
    file.unlink()
    assert token.fits(f"Bearer {new}")
    _write(file, TOKEN)
    assert token.fits(f"Bearer {TOKEN}") and not token.fits(f"Bearer {new}")


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("short", 0o600, "holds 5 characters, expected at least 32"),
        ("", 0o600, "holds 0 characters"),
        (TOKEN, 0o644, "has mode 0644, expected 0600 or 0640"),
        (TOKEN + "\n" + TOKEN, 0o600, "is no token"),
        (TOKEN + " ", 0o600, "is no token"),
        ("x" * 2000, 0o600, "is longer than 1024 bytes"),
    ],
)
def test_a_file_that_holds_no_good_token_is_refused_without_its_content(
    tmp_path: Path, text: str, mode: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_token("", _write(tmp_path / "t", text, mode))
    assert TOKEN not in str(caught.value)


def test_a_missing_variable_or_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTP_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HTTP_TOKEN is not set"):
        read_token("HTTP_TOKEN", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token("", tmp_path / "none")
    monkeypatch.setenv("HTTP_TOKEN", TOKEN)
    assert BearerToken("HTTP_TOKEN", None).fits(f"Bearer {TOKEN}")


def test_wrong_tokens_are_told_to_the_audit_trail_once_a_minute_for_each_address(file: Path) -> None:
    trail, now = Trail(), [0.0]
    doorman = Doorman(BearerToken("", file), trail, lambda: now[0])
    for _ in range(50):
        assert not doorman.lets_in("Bearer guess", "192.0.2.7")
    assert not doorman.lets_in(None, "192.0.2.7")  # a browser that knows of no token
    assert not doorman.lets_in("Bearer guess", "192.0.2.8")
    first, other = trail.events
    assert (first.kind, first.outcome) == (AuditKind.SECURITY_ALERT, AuditOutcome.SERIOUS_FAILURE)
    assert first.participants[0].host == "192.0.2.7" and other.participants[0].host == "192.0.2.8"
    now[0] = module.ALERT_S + 1
    assert not doorman.lets_in("Bearer guess", "192.0.2.7")
    assert "49 times" in trail.events[-1].detail and "guess" not in str(trail.events)


def test_many_addresses_do_not_flood_the_audit_trail(file: Path) -> None:
    trail = Trail()
    doorman = Doorman(BearerToken("", file), trail, lambda: 0.0)
    for number in range(2000):
        assert not doorman.lets_in("Bearer guess", f"2001:db8:0:{number:x}::1")
    assert len(trail.events) == module.ALERTS_MAX


@pytest.mark.parametrize(
    "settings",
    [
        {"http_host": "0.0.0.0", "http_token_file": "/etc/dicom-node/http.token"},
        {"http_host": "0.0.0.0", "http_token_env": "HTTP_TOKEN"},
        {"http_host": "0.0.0.0", "http_without_token": True},
        {"http_host": "0.0.0.0", "metrics_host": "127.0.0.1", "metrics_port": 9100},
        {"metrics_port": 9100},
    ],
)
def test_http_may_be_reached_from_elsewhere_with_a_token_or_without_what_needs_one(settings: dict[str, object]) -> None:
    assert NodeConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"http_host": "0.0.0.0"}, "http_host: /ready and /metrics would be open .*set http_token_file"),
        ({"http_host": "10.0.0.7", "metrics_port": 9100}, "http_host: .*http_without_token: true"),
        ({"metrics_host": "::", "metrics_port": 9100}, "metrics_host: /ready and /metrics would be open"),
        ({"metrics_host": "10.0.0.7"}, "set metrics_port too"),
        ({"http_token_env": "A", "http_token_file": "b"}, "keep one"),
        ({"http_token_env": "DICOM_NODE_TOKEN"}, "use another name"),
        ({"http_token_env": "A", "http_without_token": True}, "remove one of the two"),
    ],
)
def test_http_that_would_be_open_to_others_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NodeConfig.model_validate(settings)
