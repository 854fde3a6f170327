"""Where calls of engines may lead: certificates, redirects, URLs handed out, names that change their mind."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dicom_node.engines._http import HttpClient, HttpSettings
from dicom_node.engines._wire import is_public
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable

TOKEN = "tok-1"


@pytest.fixture
def client(server: Any) -> Iterator[Callable[..., HttpClient]]:
    """`client(resolve=..., route=..., **settings)`: a client of `server` that carries a secret, closed at the end."""
    with ExitStack() as stack:

        def make(*, resolve: Any = None, route: Any = None, **settings: Any) -> HttpClient:
            merged = {"base_url": server.url, "backoff_s": 0.01, "connect_timeout_s": 2, **settings}
            injected = {"resolve": resolve} if resolve else {}
            injected |= {"route": route} if route else {}
            made = HttpClient("probe", HttpSettings(**merged), {"Authorization": lambda: TOKEN}, **injected)
            stack.callback(made.close)
            return made

        yield make


def _get(client: HttpClient, path_or_url: str, **options: Any) -> bytes:
    return client.call("GET", path_or_url, idempotent=True, **options).body


# --- certificates


def test_a_certificate_of_no_known_authority_is_refused_and_not_tried_again(tls_server: Any, client: Any) -> None:
    tls_server.on("GET", "/", tls_server.answer(200))
    with pytest.raises(EngineUnavailable, match="certificate") as refused:
        _get(client(base_url=tls_server.url), "/")
    assert refused.value.maybe_taken is False
    assert tls_server.received == []


def test_an_authority_of_the_site_is_taken_from_its_file_and_names_are_checked(
    tls_server: Any, client: Any, certificate: tuple[Path, Path]
) -> None:
    tls_server.on("GET", "/", tls_server.answer(200, b"sealed"))
    assert _get(client(base_url=tls_server.url, verify=certificate[0]), "/") == b"sealed"
    other = f"https://other.example:{tls_server.port}"
    with pytest.raises(EngineUnavailable, match="certificate"):
        _get(client(base_url=other, verify=certificate[0], resolve=lambda *_: ["127.0.0.1"]), "/")
    assert len(tls_server.received) == 1


def test_a_missing_authority_file_is_told_at_once(client: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verify: .*none\.pem"):
        client(verify=tmp_path / "none.pem")


def test_large_bodies_pass_tls_both_ways(tls_server: Any, client: Any, certificate: tuple[Path, Path]) -> None:
    body = bytes(range(256)) * 8192
    tls_server.on("PUT", "/", tls_server.answer(200, body))
    answer = client(base_url=tls_server.url, verify=certificate[0]).call("PUT", "/", idempotent=True, content=body)
    assert answer.body == body and tls_server.received[0].body == body


def test_the_heart_beats_over_tls_too(tls_server: Any, client: Any, certificate: tuple[Path, Path]) -> None:
    tls_server.on("GET", "/", tls_server.drip(b"x", 3, 0.4))
    beats = [time.monotonic()]
    one = client(base_url=tls_server.url, verify=certificate[0])
    assert _get(one, "/", heartbeat=lambda: beats.append(time.monotonic())) == b"xxx"
    assert max(after - before for before, after in pairwise([*beats, time.monotonic()])) < 0.5


def test_a_peer_that_does_not_shake_hands_times_out(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = client(base_url=f"https://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=0.4, retries=0)
        began = time.monotonic()
        with pytest.raises(EngineUnavailable, match="cannot be reached") as failed:
            _get(one, "/")
    assert 0.4 <= time.monotonic() - began < 2
    assert failed.value.maybe_taken is False


def test_proxies_of_the_environment_are_not_used(
    server: Any, start_server: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start_server()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.on("GET", "/", server.answer(200, b"direct"))
    assert _get(client(), "/") == b"direct"
    assert proxy.received == []


# --- redirects


def test_a_get_follows_within_its_origin_with_its_secret(server: Any, client: Any) -> None:
    server.on("GET", "/a", server.answer(307, b"", {"Location": "b?x=1"}))
    server.on("GET", "/b", server.answer(200, b"there"))
    assert _get(client(), "/a", headers={"X-Mine": "1"}) == b"there"
    assert [request.target for request in server.received] == ["/a", "/b?x=1"]
    assert all(request.headers["authorization"] == TOKEN for request in server.received)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_only_a_get_follows(server: Any, client: Any, method: str) -> None:
    server.on(method, "/a", server.answer(307, b"", {"Location": "/b"}))
    with pytest.raises(EngineError, match="status 307"):
        client().call(method, "/a", idempotent=True)
    assert len(server.received) == 1


def test_a_redirect_the_caller_expects_is_handed_over(server: Any, client: Any) -> None:
    server.on("GET", "/a", server.answer(307, b"", {"Location": "https://cdn.example/x?sig=1"}))
    answer = client().call("GET", "/a", idempotent=True, expect=(200, 307))
    assert answer.headers["location"] == "https://cdn.example/x?sig=1"


def test_another_host_gets_no_secret_and_no_header_of_the_caller(server: Any, start_server: Any, client: Any) -> None:
    other = start_server()
    server.on("GET", "/a", server.answer(302, b"", {"Location": f"{other.url}/b"}))
    other.on("GET", "/b", other.answer(302, b"", {"Location": f"{server.url}/c"}))
    server.on("GET", "/c", server.answer(302, b"", {"Location": "/d"}))
    server.on("GET", "/d", server.answer(200, b"back"))
    headers = {"X-Api-Key": "k", "Cookie": "c", "Accept": "application/json"}
    assert _get(client(allow_hosts=[f"127.0.0.1:{other.port}"]), "/a", headers=headers) == b"back"
    first, *back = server.received
    assert first.headers["authorization"] == TOKEN and first.headers["x-api-key"] == "k"
    for request in (*other.received, *back):  # nor does a way back through another host carry the secret again
        assert not {"authorization", "x-api-key", "cookie"} & request.headers.keys()
        assert request.headers["accept"] == "application/json"


def test_a_redirect_to_another_port_of_this_machine_is_not_followed(
    server: Any, start_server: Any, client: Any
) -> None:
    other = start_server()
    server.on("GET", "/a", server.answer(302, b"", {"Location": f"{other.url}/b"}))
    with pytest.raises(EngineError, match="allow_hosts") as refused:
        _get(client(), "/a")
    assert "/b" not in str(refused.value)
    assert other.received == []


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "http://[", "//", "ftp://x/", "http://u:p@127.0.0.1/", "\x01"]
)
def test_a_redirect_to_something_else_is_an_engine_error(server: Any, client: Any, location: str) -> None:
    server.on("GET", "/a", server.answer(302, b"", {"Location": location}), server.answer(404))
    with pytest.raises(EngineError):
        _get(client(), "/a")
    assert len(server.received) <= 2  # "//" may be read as the root of the same host


def test_redirects_have_an_end(server: Any, client: Any) -> None:
    server.on("GET", "/a", server.answer(302, b"", {"Location": "/a"}))
    with pytest.raises(EngineError, match="more than 5 redirects"):
        _get(client(), "/a")
    assert len(server.received) == 6


# --- URLs that are handed out


def test_a_signed_url_is_asked_byte_for_byte_and_without_a_secret(server: Any, start_server: Any, client: Any) -> None:
    store = start_server()
    target = "/b/a%2Fb%20c+d?X-Amz-Credential=AK%2F2026%2Fs3&X-Amz-Signature=ab%2Bc%3D&e=%7E~&empty"
    store.on("PUT", "/b/a%2Fb%20c+d", store.answer(200))
    client(allow_hosts=["127.0.0.1"]).call("PUT", store.url + target, idempotent=True, content=b"x")
    assert store.received[0].target == target
    assert "authorization" not in store.received[0].headers


def test_plain_http_to_a_host_nobody_allowed_is_refused(start_server: Any, client: Any) -> None:
    other = start_server()
    with pytest.raises(EngineError, match="allow_hosts"):
        _get(client(), f"{other.url}/latest/meta-data?token=1")
    assert other.received == []


@pytest.mark.parametrize("way", ["handed out", "redirect"])
def test_plain_http_is_refused_to_a_public_host_too_unless_it_is_allowed(server: Any, client: Any, way: str) -> None:
    url = "http://files.example/x"
    server.on("GET", "/a", server.answer(302, b"", {"Location": url}))
    server.on("GET", "/x", server.answer(200, b"open"))
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if host == "127.0.0.1" else ["93.184.215.14"]

    def one(**settings: Any) -> HttpClient:
        made: HttpClient = client(resolve=resolve, route=lambda *_: ("127.0.0.1", server.port), **settings)
        return made

    start = url if way == "handed out" else "/a"
    with pytest.raises(EngineError, match="neither https nor"):
        _get(one(), start)
    assert "files.example" not in asked
    assert _get(one(allow_hosts=["files.example"]), start) == b"open"


def test_a_url_with_a_password_is_refused(client: Any) -> None:
    with pytest.raises(EngineError, match=r"GET files\.example") as refused:
        _get(client(), "https://user:hunter2@files.example/x")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_https_to_this_machine_under_any_spelling_is_refused(tls_server: Any, client: Any, host: str) -> None:
    with pytest.raises(EngineError, match=r"not public|cannot be reached") as refused:
        _get(client(retries=0), f"https://{host}:{tls_server.port}/")
    assert tls_server.received == []
    assert not str(refused.value).endswith("/")


def test_a_name_that_leads_into_the_hospital_is_refused(tls_server: Any, client: Any) -> None:
    tried: list[str] = []

    def route(address: str, port: int) -> tuple[str, int]:
        tried.append(address)
        return "127.0.0.1", tls_server.port

    one = client(resolve=lambda *_: ["10.1.2.3", "fd00::1", "169.254.169.254"], route=route)
    with pytest.raises(EngineError, match=r"not public; .* allow_hosts"):
        _get(one, "https://files.example/x")
    assert tried == []


def test_what_is_connected_to_is_the_address_that_was_checked(
    tls_server: Any, client: Any, certificate: tuple[Path, Path]
) -> None:
    """A name that is public when it is checked and private when it is used (DNS rebinding) is looked up once."""
    answers: list[Sequence[str]] = [["10.0.0.1", "93.184.215.14"], ["127.0.0.1"]]
    tried: list[tuple[str, int]] = []

    def route(address: str, port: int) -> tuple[str, int]:
        tried.append((address, port))
        return "127.0.0.1", tls_server.port

    tls_server.on("GET", "/x", tls_server.answer(200, b"public", {"Connection": "close"}))
    one = client(verify=certificate[0], resolve=lambda *_: answers.pop(0), route=route)
    assert _get(one, "https://files.example/x") == b"public"
    assert tried == [("93.184.215.14", 443)] and len(answers) == 1
    assert tls_server.received[0].headers["host"] == "files.example"
    with pytest.raises(EngineError, match="not public"):
        _get(one, "https://files.example/x")
    assert len(tried) == 1


def test_the_configured_host_may_be_private_and_its_addresses_are_tried_in_turn(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"ok"))
    one = client(base_url=f"http://engine.local:{server.port}", resolve=lambda *_: ["::1", "127.0.0.1"])
    assert _get(one, "/") == b"ok"
    assert server.received[0].headers["host"] == f"engine.local:{server.port}"


def test_a_sick_store_of_files_does_not_open_the_breaker_of_the_engine(start_server: Any, client: Any) -> None:
    store = start_server()
    store.on("GET", "/", store.answer(503))
    one = client(allow_hosts=["127.0.0.1"], breaker_failures=1, retries=0)
    with pytest.raises(EngineUnavailable):
        _get(one, store.url + "/")
    assert one.state.name == "CLOSED"


@pytest.mark.parametrize("url", ["", "x", "http:/x", "https://", "file:///x", "https://a\x00b/", "http://[::1"])
def test_what_is_no_url_is_an_engine_error(client: Any, url: str) -> None:
    with pytest.raises(EngineError):
        _get(client(), url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *((address, False) for address in ("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255")),
        *(
            (address, False)
            for address in ("192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1")
        ),
        *((address, False) for address in ("::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1")),
        *((address, False) for address in ("2001:0:a00:1::1", "2001:db8::1", "fec0::1", "::ffff:127.0.0.1")),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public
