"""Calls of engines over HTTP: what is raised, what is tried again, what is held back, what is told."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import pytest

from dicom_node.engines._http import HttpClient, HttpSettings, Part, parse_options
from dicom_node.engines.secrets import Secret
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
)

Outcomes = list[tuple[str, str, float]]


@pytest.fixture
def outcomes() -> Outcomes:
    """What the observer of `client` heard."""
    return []


@pytest.fixture
def client(server: Any, outcomes: Outcomes) -> Iterator[Callable[..., HttpClient]]:
    """`client(clock=..., secrets=..., **settings)`: a client of `server`, quick to try again, closed at the end."""
    with ExitStack() as stack:

        def make(*, clock: Any = None, secrets: Any = None, jitter: float = 0.5, **settings: Any) -> HttpClient:
            merged = {"base_url": server.url, "backoff_s": 0.01, **settings}
            made = HttpClient(
                "probe",
                HttpSettings(**merged),
                secrets,
                lambda *heard: outcomes.append(heard),
                clock=clock,
                jitter=lambda: jitter,
            )
            stack.callback(made.close)
            return made

        yield make


# --- what is asked and answered


def test_a_path_is_appended_to_the_base_url_and_the_answer_read_as_json(server: Any, client: Any) -> None:
    server.on("GET", "/prefix/v1/models", server.answer(200, b'{"name": "spleen"}', {"X-Kind": "a"}))
    answer = client(base_url=server.url + "/prefix/").call(
        "get", "/v1/models", idempotent=True, params={"sort": "+name", "label": ["a b", "c&d"]}
    )
    assert (answer.status, answer.json(), answer.headers["x-kind"]) == (200, {"name": "spleen"}, "a")
    assert server.received[0].target == "/prefix/v1/models?sort=%2Bname&label=a+b&label=c%26d"


def test_json_is_sent_with_its_length_and_nothing_is_negotiated(server: Any, client: Any) -> None:
    server.on("POST", "/job", server.answer(201))
    assert client().call("POST", "/job", idempotent=False, json={"a": [1, None]}, expect=(200, 201)).status == 201
    sent = server.received[0]
    assert sent.body == b'{"a": [1, null]}'
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["accept-encoding"] == "identity"
    assert "cookie" not in sent.headers and "transfer-encoding" not in sent.headers


def test_a_body_less_put_says_so_and_a_get_says_nothing_of_a_length(server: Any, client: Any) -> None:
    server.on("PUT", "/notify", server.answer(200))
    server.on("GET", "/ping", server.answer(200))
    one = client()
    one.call("PUT", "/notify", idempotent=True)
    one.call("GET", "/ping", idempotent=True)
    assert server.received[0].headers["content-length"] == "0"
    assert "content-length" not in server.received[1].headers


def test_cookies_of_an_engine_are_not_kept(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"", {"Set-Cookie": "session=1; Path=/"}))
    one = client()
    one.call("GET", "/", idempotent=True)
    one.call("GET", "/", idempotent=True)
    assert all("cookie" not in request.headers for request in server.received)


def test_a_connection_is_used_again(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"x"))
    one = client()
    for _ in range(3):
        one.call("GET", "/", idempotent=True)
    assert len({request.connection for request in server.received}) == 1


def test_an_answer_that_is_no_json_is_an_engine_error_that_does_not_quote_it(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"Doe^John is not JSON"))
    with pytest.raises(EngineError, match="20 bytes with status 200 is no JSON") as refused:
        client().call("GET", "/", idempotent=True).json()
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("header", [{"X": "a\r\nY: b"}, {"Content-Length": "1"}, {"host": "x"}, {"X": "ä"}])
def test_headers_cannot_break_the_framing(client: Any, header: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        client().call("GET", "/", idempotent=True, headers=header)


# --- what is raised


@pytest.mark.parametrize(
    ("status", "kind", "maybe_taken"),
    [
        *((status, EngineRejected, False) for status in (400, 413, 415, 422)),
        *((status, EngineUnavailable, False) for status in (401, 402, 403, 429)),
        *((status, EngineUnavailable, True) for status in (408, 502, 503, 504, 507)),
        (500, EngineCrashed, True),
        *((status, EngineError, False) for status in (404, 409, 410, 440, 307)),
        *((status, EngineError, True) for status in (201, 202, 501)),
    ],
)
def test_a_status_says_whether_to_come_back(
    server: Any, client: Any, status: int, kind: type[EngineError], maybe_taken: bool
) -> None:
    server.on("POST", "/secret-path", server.answer(status, b"Doe^John", {"X-Patient": "Doe^John"}))
    with pytest.raises(EngineError) as failed:
        client().call("POST", "/secret-path", idempotent=False, params={"key": "hidden"})
    assert type(failed.value) is kind
    assert str(failed.value) == f"engine probe: POST 127.0.0.1: answered with status {status}"
    assert (failed.value.http_status, failed.value.maybe_taken) == (status, maybe_taken)
    assert len(server.received) == 1


def test_nobody_there_is_unavailable_and_nothing_was_taken(client: Any, free_port: Callable[[], int]) -> None:
    one = client(base_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineUnavailable, match="cannot be reached") as failed:
        one.call("POST", "/", idempotent=False, json={})
    assert failed.value.maybe_taken is False


def test_a_lost_answer_to_a_call_that_must_not_be_repeated_may_have_been_taken(server: Any, client: Any) -> None:
    server.on("POST", "/runs", server.drop())
    with pytest.raises(EngineUnavailable, match="broke the connection") as failed:
        client().call("POST", "/runs", idempotent=False, json={})
    assert failed.value.maybe_taken is True
    assert len(server.received) == 1


def test_what_is_no_http_is_an_engine_error_that_does_not_quote_it(server: Any, client: Any) -> None:
    server.on("GET", "/", server.raw(b"220 mail.example Doe^John\r\n\r\n"))
    with pytest.raises(EngineError, match="does not speak HTTP") as failed:
        client().call("GET", "/", idempotent=True)
    assert "Doe" not in str(failed.value) and not isinstance(failed.value, EngineUnavailable)


def test_a_missing_secret_is_told_before_anything_is_sent(
    server: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENGINE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="env:ENGINE_TOKEN"):
        client(secrets={"Authorization": Secret("env:ENGINE_TOKEN")}).call("GET", "/", idempotent=True)
    assert server.received == []


# --- time


def test_a_silent_engine_times_out_and_is_not_asked_again(server: Any, client: Any) -> None:
    server.on("GET", "/", server.silent())
    began = time.monotonic()
    with pytest.raises(EngineTimeout, match="silent"):
        client(read_timeout_s=0.3).call("GET", "/", idempotent=True)
    assert 0.3 <= time.monotonic() - began < 2
    assert len(server.received) == 1


def test_an_engine_that_drips_is_cut_at_the_time_of_the_whole_call(server: Any, client: Any) -> None:
    server.on("GET", "/", server.drip(b"x", 100, 0.1))
    began = time.monotonic()
    with pytest.raises(EngineTimeout, match="time of the call"):
        client(read_timeout_s=5).call("GET", "/", idempotent=True, timeout_s=0.5)
    assert time.monotonic() - began < 1.5


def test_an_engine_that_reads_nothing_times_out(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", write_timeout_s=0.3)
        with pytest.raises(EngineTimeout, match="silent"):
            one.call("PUT", "/", idempotent=True, content=bytes(32 * 1024**2))


def test_a_connection_that_is_not_accepted_times_out(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        for _ in range(8):  # the queue of connections is full after some: the kernel then drops what asks to connect
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        began = time.monotonic()
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            client(base_url=f"http://127.0.0.1:{port}", connect_timeout_s=0.3, retries=0).call(
                "GET", "/", idempotent=True
            )
        assert 0.3 <= time.monotonic() - began < 2


def test_a_name_that_is_not_looked_up_in_time_is_given_up_with_beats_meanwhile(outcomes: Outcomes) -> None:
    done, beats = threading.Event(), []

    def resolve(host: str, port: int) -> list[str]:
        done.wait(10)
        return ["127.0.0.1"]

    one = HttpClient("probe", HttpSettings(base_url="http://slow.example", connect_timeout_s=0.5), resolve=resolve)
    try:
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            one.call("GET", "/", idempotent=False, heartbeat=lambda: beats.append(time.monotonic()))
    finally:
        done.set()
        one.close()
    assert len(beats) >= 2


@pytest.mark.parametrize("slow", ["silence", "drip", "upload"])
def test_the_heart_beats_at_least_twice_a_second(server: Any, client: Any, slow: str) -> None:
    server.on("GET", "/silence", server.answer(200, b"x", after_s=1.3))
    server.on("GET", "/drip", server.drip(b"x", 4, 0.33))
    server.on("PUT", "/upload", server.answer(200))
    beats = [time.monotonic()]

    def slowly() -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(0.33)
            yield b"x"

    client().call(
        "PUT" if slow == "upload" else "GET",
        f"/{slow}",
        idempotent=True,
        content=(slowly(), 4) if slow == "upload" else None,
        heartbeat=lambda: beats.append(time.monotonic()),
    )
    beats.append(time.monotonic())
    assert beats[-1] - beats[0] > 1.2
    assert max(after - before for before, after in pairwise(beats)) < 0.5


def test_a_lost_lease_ends_the_call_at_once(server: Any, client: Any, outcomes: Outcomes) -> None:
    server.on("GET", "/", server.silent())
    beats = []

    def heartbeat() -> None:
        beats.append(1)
        if len(beats) == 3:
            raise LeaseLost("taken over")

    one = client()
    began = time.monotonic()
    with pytest.raises(LeaseLost):
        one.call("GET", "/", idempotent=True, heartbeat=heartbeat)
    assert time.monotonic() - began < 2
    assert [outcome for _, outcome, _ in outcomes] == ["dropped"]
    assert one.held == 0 and one.state.name == "CLOSED"


# --- trying again


def test_an_overloaded_engine_is_asked_again_with_doubled_and_spread_pauses(
    server: Any, client: Any, moved_clock: Any
) -> None:
    replies = [server.answer(status) for status in (503, 429, 502, 504)]
    server.on("GET", "/", *replies, server.answer(200, b"ok"))
    one = client(clock=moved_clock, backoff_s=0.1, backoff_max_s=0.4, jitter=1.0)
    assert one.call("GET", "/", idempotent=True).body == b"ok"
    assert sum(moved_clock.slept) == pytest.approx(1.25 * (0.1 + 0.2 + 0.4 + 0.4))


def test_a_call_that_must_not_be_repeated_is_not(server: Any, client: Any) -> None:
    server.on("POST", "/", server.answer(503), server.answer(200))
    with pytest.raises(EngineUnavailable):
        client().call("POST", "/", idempotent=False)
    assert len(server.received) == 1


def test_trying_again_has_an_end(server: Any, client: Any, outcomes: Outcomes) -> None:
    server.on("GET", "/", server.answer(503))
    with pytest.raises(EngineUnavailable, match="status 503"):
        client(retries=2, breaker_failures=9).call("GET", "/", idempotent=True)
    assert len(server.received) == 3
    assert [outcome for _, outcome, _ in outcomes] == ["unavailable"]


def test_a_lost_answer_is_asked_for_again(server: Any, client: Any) -> None:
    server.on("GET", "/", server.drop(), server.partial(b"hal", 8), server.answer(200, b"half"))
    assert client().call("GET", "/", idempotent=True).body == b"half"
    assert len(server.received) == 3


def test_an_engine_that_starts_late_is_reached(
    client: Any, start_server: Any, free_port: Callable[[], int], moved_clock: Any
) -> None:
    port = free_port()
    one = client(base_url=f"http://127.0.0.1:{port}", retries=2, clock=moved_clock)
    with pytest.raises(EngineUnavailable):
        one.call("GET", "/", idempotent=True)
    assert len(moved_clock.slept) == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server: Any, client: Any, moved_clock: Any, form: str) -> None:
    then = moved_clock.wall() + timedelta(seconds=7)
    value = "7" if form == "seconds" else format_datetime(then, usegmt=True)
    server.on("GET", "/", server.answer(429, b"", {"Retry-After": value}), server.answer(200))
    beats: list[float] = []
    client(clock=moved_clock).call("GET", "/", idempotent=True, heartbeat=lambda: beats.append(moved_clock.seconds))
    assert sum(moved_clock.slept) == pytest.approx(7)
    assert max(after - before for before, after in pairwise(beats)) < 0.5


@pytest.mark.parametrize("value", ["61", "99999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_retry_after_beyond_the_bound_ends_the_call(server: Any, client: Any, moved_clock: Any, value: str) -> None:
    server.on("GET", "/", server.answer(503, b"", {"Retry-After": value}))
    with pytest.raises(EngineUnavailable):
        client(clock=moved_clock, total_timeout_s=1e9).call("GET", "/", idempotent=True)
    assert moved_clock.slept == [] and len(server.received) == 1


@pytest.mark.parametrize("value", ["soon", "-5", "", "Mon, 99 Foo 2026 99:99:99 GMT", "1e9"])
def test_an_unreadable_retry_after_is_no_hindrance(server: Any, client: Any, moved_clock: Any, value: str) -> None:
    server.on("GET", "/", server.answer(503, b"", {"Retry-After": value}), server.answer(200))
    assert client(clock=moved_clock).call("GET", "/", idempotent=True).status == 200


def test_it_is_not_tried_again_beyond_the_time_of_the_call(server: Any, client: Any, moved_clock: Any) -> None:
    server.on("GET", "/", server.answer(503, b"", {"Retry-After": "5"}))
    with pytest.raises(EngineUnavailable):
        client(clock=moved_clock).call("GET", "/", idempotent=True, timeout_s=4)
    assert moved_clock.slept == []


# --- holding back


def test_calls_are_paced(server: Any, client: Any, moved_clock: Any) -> None:
    server.on("GET", "/", server.answer(200))
    one = client(clock=moved_clock, calls_per_s=4)
    for _ in range(3):
        one.call("GET", "/", idempotent=True)
    assert sum(moved_clock.slept) == pytest.approx(0.5)


def test_a_call_whose_turn_is_too_late_fails_at_once_and_books_nothing(
    server: Any, client: Any, moved_clock: Any
) -> None:
    server.on("GET", "/", server.answer(200))
    one = client(clock=moved_clock, calls_per_s=0.1)
    one.call("GET", "/", idempotent=True)
    with pytest.raises(EngineUnavailable, match="no turn"):
        one.call("GET", "/", idempotent=True, timeout_s=5)
    one.call("GET", "/", idempotent=True, timeout_s=11)
    assert sum(moved_clock.slept) == pytest.approx(10)
    assert len(server.received) == 2


def test_no_more_calls_at_a_time_than_allowed(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"x", after_s=0.05))
    one = client(concurrency=2)
    threads = [threading.Thread(target=one.call, args=("GET", "/"), kwargs={"idempotent": True}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(server.received) == 8
    assert server.most_at_once == 2
    assert (one.held, one.waiting) == (0, 0)


def test_a_call_that_gets_no_place_in_time_is_unavailable_and_beats_meanwhile(
    server: Any, client: Any, wait_for: Callable[..., None]
) -> None:
    server.on("GET", "/", server.answer(200, b"x", after_s=1.5))
    one = client(concurrency=1)
    holder = threading.Thread(target=one.call, args=("GET", "/"), kwargs={"idempotent": True})
    holder.start()
    wait_for(lambda: one.held == 1, 5, "the first call to be under way")
    beats: list[int] = []
    with pytest.raises(EngineUnavailable, match="no turn"):
        one.call("GET", "/", idempotent=True, timeout_s=0.5, heartbeat=lambda: beats.append(one.waiting))
    holder.join(10)
    assert 1 in beats and one.state.name == "CLOSED"


def test_a_sick_engine_is_left_in_peace_then_tried_by_one_call(
    server: Any, client: Any, moved_clock: Any, outcomes: Outcomes
) -> None:
    server.on("GET", "/", *[server.answer(503)] * 4, server.answer(404))
    one = client(clock=moved_clock, retries=0, breaker_failures=3, breaker_rest_s=30)
    for _ in range(3):
        with pytest.raises(EngineUnavailable, match="503"):
            one.call("GET", "/", idempotent=True)
    assert one.state.name == "OPEN"
    with pytest.raises(EngineUnavailable, match="rests") as resting:
        one.call("POST", "/", idempotent=False)
    assert len(server.received) == 3 and resting.value.maybe_taken is False

    moved_clock.move(31)
    assert one.state.name == "HALF_OPEN"
    with pytest.raises(EngineUnavailable, match="503"):
        one.call("GET", "/", idempotent=True)
    assert one.state.name == "OPEN"

    moved_clock.move(31)
    with pytest.raises(EngineError, match="404"):  # an answer, if not a good one: it lives
        one.call("GET", "/", idempotent=True)
    assert one.state.name == "CLOSED"
    assert [outcome for _, outcome, _ in outcomes] == [*["unavailable"] * 3, "resting", "unavailable", "error"]


def test_only_one_call_tries_an_engine_that_was_sick(
    server: Any, client: Any, moved_clock: Any, wait_for: Callable[..., None]
) -> None:
    server.on("GET", "/", server.answer(503), server.answer(200, b"well", after_s=0.5))
    one = client(clock=moved_clock, retries=0, breaker_failures=1)
    with pytest.raises(EngineUnavailable, match="503"):
        one.call("GET", "/", idempotent=True)
    moved_clock.move(31)
    probe = threading.Thread(target=one.call, args=("GET", "/"), kwargs={"idempotent": True})
    probe.start()
    wait_for(lambda: len(server.received) == 2, 5, "the probe to arrive")
    with pytest.raises(EngineUnavailable, match="rests"):
        one.call("GET", "/", idempotent=True)
    probe.join(10)
    assert one.call("GET", "/", idempotent=True).body == b"well"


def test_a_breaker_that_opens_ends_the_retries(server: Any, client: Any) -> None:
    server.on("GET", "/", server.drop())
    with pytest.raises(EngineUnavailable, match="rests"):
        client(retries=9, breaker_failures=3).call("GET", "/", idempotent=True)
    assert len(server.received) == 3


def test_an_overloaded_engine_or_a_refusal_does_not_open_the_breaker(server: Any, client: Any) -> None:
    server.on("GET", "/busy", server.answer(429))
    server.on("GET", "/unfit", server.answer(422))
    one = client(retries=0, breaker_failures=1)
    for path in ("/busy", "/unfit"):
        with pytest.raises(EngineError):
            one.call("GET", path, idempotent=True)
    assert one.state.name == "CLOSED"


# --- what is told


def test_the_observer_hears_of_each_call_once(server: Any, client: Any, outcomes: Outcomes) -> None:
    server.on("GET", "/ok", server.answer(503), server.answer(200))
    server.on("GET", "/unfit", server.answer(400))
    server.on("GET", "/gone", server.answer(410))
    server.on("GET", "/slow", server.silent())
    one = client(read_timeout_s=0.2)
    one.call("GET", "/ok", idempotent=True)
    for path in ("/unfit", "/gone", "/slow"):
        with pytest.raises(EngineError):
            one.call("GET", path, idempotent=True)
    assert [heard[:2] for heard in outcomes] == [
        ("probe", outcome) for outcome in ("ok", "rejected", "error", "timeout")
    ]
    assert all(seconds >= 0 for *_, seconds in outcomes) and outcomes[-1][2] >= 0.2


def test_no_secret_query_path_or_body_is_logged_or_raised(
    server: Any, client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_TOKEN", "tok-SECRET")
    caplog.set_level(logging.DEBUG)
    for name in ("httpx2", "httpcore2", "httpcore2.http11", "httpcore2.connection"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    server.on(
        "POST", "/p-SECRET", server.answer(503, b"b-SECRET", {"X-A": "h-SECRET"}), server.answer(200, b"b-SECRET")
    )
    server.on("POST", "/unfit-SECRET", server.answer(400, b"b-SECRET"))
    one = client(secrets={"Authorization": Secret("env:ENGINE_TOKEN")})
    ask = {"params": {"q": "q-SECRET"}, "files": [Part(name="image", content=b"b-SECRET", filename="n-SECRET")]}
    answer = one.call("POST", "/p-SECRET", idempotent=True, **ask)
    with pytest.raises(EngineRejected) as refused:
        one.call("POST", "/unfit-SECRET", idempotent=True, **ask)
    assert server.received[0].headers["authorization"] == "tok-SECRET"
    records = [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert any("an engine is called again" in record for record in records)
    shown = [*records, caplog.text, str(refused.value), repr(refused.value), repr(answer)]
    assert [text for text in shown if "SECRET" in text] == []


# --- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "ftp://engine"},
        {"base_url": "http://user:pw@engine"},
        {"base_url": "http://engine/?key=1"},
        {"base_url": "http://engine:99999"},
        {"base_url": "engine:80"},
        {"verify": False},
        {"verify": ""},
        {"connect_timeout_s": 0},
        {"concurrency": 0},
        {"allow_hosts": ["https://cdn.example"]},
        {"allow_hosts": ["*"]},
        {"proxy": "http://proxy"},
    ],
)
def test_wrong_settings_are_refused_by_key_and_not_quoted(wrong: dict[str, Any]) -> None:
    options = {"base_url": "https://engine.example/v1"} | wrong
    with pytest.raises(ConfigError, match=rf"engines\.probe\.options\.{next(iter(wrong))}") as refused:
        parse_options(HttpSettings, "probe", options)
    assert "user:pw" not in str(refused.value)


def test_two_bodies_are_a_mistake(client: Any) -> None:
    with pytest.raises(ValueError, match="one of"):
        client().call("POST", "/", idempotent=False, json={}, content=b"")
