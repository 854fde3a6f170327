"""Access tokens: one for all threads, used until they end, asked for anew once when the engine refuses one."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from dicom_node.engines._http import HttpClient, HttpSettings, Options, parse_options
from dicom_node.engines.oauth import NOT_SOONER_S, REST_S, OAuthSettings, Tokens
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable

SECRET = "very-s3cret"


class Holder(Options):
    """As adapters hold it."""

    auth: OAuthSettings


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture
def settings(server: Any, secret: Path) -> Callable[..., OAuthSettings]:
    """`settings(**more)`: of the misbehaving server."""

    def make(**more: Any) -> OAuthSettings:
        auth = {"token_url": f"{server.url}/oauth/token", "client_id": "me", "client_secret": f"file:{secret}", **more}
        return parse_options(Holder, "relu", {"auth": auth}).auth

    return make


@pytest.fixture
def tokens(settings: Callable[..., OAuthSettings], moved_clock: Any) -> Iterator[Callable[..., Tokens]]:
    """`tokens(**more)`: on the misbehaving server, by a clock that is moved."""
    made: list[Tokens] = []

    def make(**more: Any) -> Tokens:
        made.append(Tokens("relu", settings(**more), clock=moved_clock))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(server: Any, *values: str, life_s: Any = 86400) -> None:
    """These tokens in turn, the last one for ever."""
    replies = [
        server.answer(200, json.dumps({"access_token": value, "token_type": "Bearer", "expires_in": life_s}).encode())
        for value in values
    ]
    server.on("POST", "/oauth/token", *replies)


def test_a_token_is_asked_for_as_the_provider_documents_it_and_used_until_it_ends(
    server: Any, tokens: Callable[..., Tokens], moved_clock: Any
) -> None:
    answer(server, "one", "two")
    ours = tokens(audience="virtualpatientengine.com")
    assert ours.left_s is None
    assert {ours.header() for _ in range(5)} == {"Bearer one"}
    assert len(server.received) == 1
    assert json.loads(server.received[0].body) == {
        "grant_type": "client_credentials",
        "audience": "virtualpatientengine.com",
        "client_id": "me",
        "client_secret": SECRET,
    }
    assert ours.left_s == 86400
    moved_clock.seconds += 86400 - 121
    assert ours.header() == "Bearer one"
    moved_clock.seconds += 2
    assert ours.header() == "Bearer two"
    assert ours.left_s == 86400
    moved_clock.seconds += 90_000
    over_s = ours.left_s
    assert over_s is not None and over_s < -3000


def test_the_form_of_the_rfc_and_a_refresh_token_by_option(
    server: Any, tokens: Callable[..., Tokens], secret: Path
) -> None:
    answer(server, "one")
    tokens(body="form", client_secret=None, refresh_token=f"file:{secret}", scope="a b").header()
    asked = server.received[0]
    assert asked.headers["content-type"] == "application/x-www-form-urlencoded"
    form = {key: value[0] for key, value in parse_qs(asked.body.decode()).items()}
    assert form == {"grant_type": "refresh_token", "refresh_token": SECRET, "client_id": "me", "scope": "a b"}


def test_a_refused_token_is_replaced_once_and_the_call_made_again(
    server: Any, tokens: Callable[..., Tokens], moved_clock: Any
) -> None:
    answer(server, "old", "new", "newer")
    ours = tokens()
    ours.header()
    moved_clock.seconds += NOT_SOONER_S + 1
    server.on("GET", "/jobs", server.answer(401), server.answer(200, b"{}"))
    with_token = HttpClient("relu", HttpSettings(base_url=server.url), {"authorization": ours.header})
    got = ours.authorized(lambda: with_token.call("GET", "/jobs", idempotent=True))
    assert got.status == 200
    sent = [one.headers["authorization"] for one in server.received if one.target == "/jobs"]
    assert sent == ["Bearer old", "Bearer new"]
    server.on("GET", "/jobs", server.answer(401))
    with pytest.raises(EngineUnavailable, match="audience"):  # a new one was given just now: it is not the token
        ours.authorized(lambda: with_token.call("GET", "/jobs", idempotent=True))
    assert len([one for one in server.received if one.target == "/oauth/token"]) == 2
    with_token.close()


def test_other_failures_of_the_call_cost_no_token(server: Any, tokens: Callable[..., Tokens]) -> None:
    answer(server, "one", "two")
    ours = tokens()

    def fail() -> None:
        error = EngineError("no")
        error.http_status = 403
        raise error

    for _ in range(3):
        with pytest.raises(EngineError, match="no"):
            ours.authorized(fail)
    assert ours.header() == "Bearer one"


def test_many_threads_ask_for_one_token(server: Any, tokens: Callable[..., Tokens]) -> None:
    body = json.dumps({"access_token": "one", "expires_in": 100}).encode()
    server.on("POST", "/oauth/token", server.answer(200, body, after_s=0.3))
    ours = tokens()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(ours.header())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == ["Bearer one"] * 8
    assert len(server.received) == 1


def test_wrong_credentials_are_an_outage_that_is_not_asked_about_in_a_storm(
    server: Any, tokens: Callable[..., Tokens], moved_clock: Any
) -> None:
    server.on("POST", "/oauth/token", server.answer(401, b'{"error": "access_denied"}'))
    ours = tokens()
    for _ in range(4):
        with pytest.raises(EngineUnavailable, match=r"refuses client_id and credentials \(status 401\)"):
            ours.header()
    assert len(server.received) == 1
    moved_clock.seconds += REST_S
    answer(server, "one")
    assert ours.header() == "Bearer one"


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_no_status_of_a_token_server_is_a_jobs_fault(server: Any, tokens: Callable[..., Tokens], status: int) -> None:
    server.on("POST", "/oauth/token", server.answer(status))
    with pytest.raises(EngineUnavailable) as caught:
        tokens().header()
    assert type(caught.value) is EngineUnavailable


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"access_token": ""}',
        b'{"access_token": "a\\nb"}',
        b'{"access_token": "a b"}',
        b'{"access_token": 7}',
        b'{"access_token": "a", "token_type": "mac"}',
        b'{"access_token": "a", "expires_in": -1}',
        b'{"access_token": "a", "expires_in": true}',
        b'{"access_token": "a", "expires_in": NaN}',
        b'{"access_token": "' + b"a" * 20_000 + b'"}',
    ],
)
def test_an_answer_that_is_none_is_an_outage_and_is_not_quoted(
    server: Any, tokens: Callable[..., Tokens], body: bytes
) -> None:
    server.on("POST", "/oauth/token", server.answer(200, body))
    with pytest.raises(EngineUnavailable) as caught:
        tokens().header()
    assert "aaa" not in str(caught.value) and "html" not in str(caught.value)


def test_a_token_without_a_time_of_life_is_used_for_an_hour(
    server: Any, tokens: Callable[..., Tokens], moved_clock: Any
) -> None:
    body = json.dumps({"access_token": "one"}).encode()
    server.on("POST", "/oauth/token", server.answer(200, body))
    ours = tokens()
    ours.header()
    assert ours.left_s == 3600


def test_secrets_are_in_no_repr_and_no_message(server: Any, tokens: Callable[..., Tokens], secret: Path) -> None:
    answer(server, "the-token")
    ours = tokens()
    ours.header()
    shown = repr(ours) + repr(ours._token) + repr(ours._settings) + repr(ours.__dict__)
    assert SECRET not in shown and "the-token" not in shown
    secret.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        ours.check()


def test_a_secret_that_is_just_being_exchanged_costs_no_job(tokens: Callable[..., Tokens], secret: Path) -> None:
    secret.unlink()
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        tokens().header()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"token_url": "http://auth.example/token"}, "https"),
        ({"token_url": "https://me:pw@auth.example/token"}, "password"),
        ({"token_url": "https://auth.example/token?key=1"}, "query"),
        ({"token_url": "auth.example"}, "https"),
        ({"client_secret": SECRET}, "must not be given as a value"),
        ({"client_secret": None}, "client_secret"),
        ({"grant": "x"}, "unknown key"),
    ],
)
def test_a_wrong_setting_is_named_and_its_value_is_not(
    settings: Callable[..., OAuthSettings], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"engines\.relu\.options\.auth.*{said}") as caught:
        settings(**more)
    assert SECRET not in str(caught.value) and "pw" not in str(caught.value)
