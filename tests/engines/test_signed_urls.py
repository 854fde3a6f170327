"""Signed URLs: what opens them, what does not, and the answer over real HTTP."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import BinaryIO

import pytest

from dicom_node.engines import handed_out
from dicom_node.engines.handed_out import Links, Shelf, shelf_and_signer
from dicom_node.engines.keys import URL_KEYS
from dicom_node.engines.signed_urls import MAX_LIFETIME_S, PREFIX, KeyRing, LinkRefused, Signer
from dicom_node.errors import ConfigError, EngineUnavailable, StorageError
from dicom_node.http.health import HealthServer
from dicom_node.model import BootTime

HOUR = 3600.0
DAY = 24 * HOUR
CONTENT = bytes(range(256)) * 4


@dataclass
class MovedClock:
    """Both clocks, moved by hand."""

    at: datetime = field(default_factory=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC))
    seconds: float = 1000.0
    boot_id: str = "boot-1"

    def boot(self) -> BootTime:
        return BootTime(boot_id=self.boot_id, seconds=self.seconds)

    def wall(self) -> datetime:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.pass_(seconds)

    def pass_(self, seconds: float) -> None:
        """Time goes by."""
        self.seconds += seconds
        self.step(seconds)

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.at += timedelta(seconds=seconds)

    def restart(self) -> None:
        """The machine was restarted."""
        self.seconds, self.boot_id = 5.0, self.boot_id + "+"


@dataclass
class Node:
    """What the parts share: the clock and the data folder. `signer()` is one of a process that just started."""

    folder: Path
    clock: MovedClock

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.folder / "handed_out")

    @property
    def keys(self) -> KeyRing:
        return KeyRing(self.folder / URL_KEYS, self.clock)

    def signer(self, base_url: str = "") -> Signer:
        return Signer(self.keys, self.shelf, self.clock, base_url=base_url)

    def put(self, job: str = "job-1", content: bytes = CONTENT, suffix: str = ".dcm") -> str:
        return self.shelf.put(job, suffix, lambda file: file.write(content))[0]

    def opens(self, path: str, method: str = "GET") -> bool:
        try:
            self.signer().check(path, method=method)
        except LinkRefused:
            return False
        return True


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, MovedClock())


# --- what a URL opens ------------------------------------------------------------------------------------------------


def test_a_url_opens_its_object_for_its_job_until_it_expires(node: Node) -> None:
    name = node.put()
    url = node.signer("https://pacs.example:8443/").url("job-1", name, lifetime_s=600)
    assert url.startswith("https://pacs.example:8443/handed-out/") and url.endswith(f"/{name}")
    path = url.removeprefix("https://pacs.example:8443")
    grant = node.signer().check(path)
    assert (grant.job, grant.object_id, grant.method) == ("job-1", name, "GET")
    assert grant.expires == node.clock.at + timedelta(seconds=600)
    node.clock.pass_(599)
    assert node.opens(path)
    node.clock.pass_(2)
    with pytest.raises(LinkRefused, match="expired") as caught:
        node.signer().check(path)
    assert caught.value.status == 410


def test_a_get_url_opens_head_and_no_other_method(node: Node) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=600)
    assert node.opens(path, "HEAD")
    assert not node.opens(path, "PUT") and not node.opens(path, "DELETE")
    upload = node.signer().url("job-1", node.put(), lifetime_s=600, method="PUT")
    assert node.opens(upload, "PUT")
    assert not node.opens(upload, "GET") and not node.opens(upload, "HEAD")


def test_changing_any_character_of_a_url_closes_it(node: Node) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=600)
    for position in range(len(PREFIX), len(path)):
        for other in {"0", "1", "a", "_", "/", "%"} - {path[position]}:
            assert not node.opens(path[:position] + other + path[position + 1 :]), (position, other)
    assert node.opens(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path + "?x=1",
        lambda path: path + "/",
        lambda path: path + "\n",
        lambda path: path.replace("/handed-out/", "/handed-out//"),
        lambda path: path.replace("handed-out", "handed-out/../handed-out"),
        lambda path: path.rsplit("/", 1)[0] + "/../../../../etc/passwd",
        lambda path: path.rsplit("/", 1)[0] + "/%2e%2e%2fnonce",
        lambda path: path.rsplit("/", 1)[0] + "/nonce",
        lambda path: path.replace("job-1", ".."),
        lambda path: path.replace("job-1", "job-1\0"),
        lambda path: path.replace("job-1", "١ob-1"),
        lambda path: PREFIX,
        lambda path: "/",
        lambda path: PREFIX + "a/" * 400,
    ],
)
def test_a_path_of_another_form_opens_nothing(node: Node, change: Callable[[str], str]) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=600)
    with pytest.raises(LinkRefused) as caught:
        node.signer().check(change(path))
    assert caught.value.status == 404


def test_parts_of_two_good_urls_do_not_make_a_third(node: Node) -> None:
    one = node.signer().url("job-1", node.put("job-1"), lifetime_s=600).split("/")
    other = node.signer().url("job-2", node.put("job-2"), lifetime_s=700).split("/")
    for position in range(2, len(one)):
        mixed = [*one[:position], other[position], *one[position + 1 :]]
        if mixed != one:
            assert not node.opens("/".join(mixed)), position


def test_a_url_says_nothing_but_names_of_the_node_and_fits_the_engines(node: Node) -> None:
    signer = node.signer("https://pacs.example" + "/proxy" * 20)
    url = signer.url("j" * 64, node.put("j" * 64, suffix=".nii.gz"), lifetime_s=MAX_LIFETIME_S)
    assert url.endswith(".nii.gz") and len(url) < 2083
    with pytest.raises(ValueError, match="characters"):
        node.signer("https://" + "x" * 2000).url("j" * 64, node.put("j" * 64), lifetime_s=60)


@pytest.mark.parametrize("lifetime_s", [0, -5, MAX_LIFETIME_S + 1])
def test_a_lifetime_is_bounded(node: Node, lifetime_s: float) -> None:
    with pytest.raises(ValueError, match="lifetime_s"):
        node.signer().url("job-1", node.put(), lifetime_s=lifetime_s)


@pytest.mark.parametrize(
    ("job", "name"), [("../x", "0" * 32), ("job-1", "../../etc/passwd"), ("job-1", "nonce"), ("", "")]
)
def test_names_that_are_not_the_nodes_are_never_signed(node: Node, job: str, name: str) -> None:
    node.put()
    with pytest.raises(ValueError, match="cannot stand in a URL"):
        node.signer().url(job, name, lifetime_s=60)
    assert node.shelf.open(job, name) is None


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_setting_the_wall_clock_changes_nothing_while_the_machine_runs(node: Node, step: float) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=600)
    node.clock.step(step)
    assert node.opens(path)
    node.clock.pass_(590)
    assert node.opens(path)
    node.clock.pass_(20)
    assert not node.opens(path)


def test_after_a_restart_of_the_machine_the_wall_clock_decides(node: Node) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=2 * HOUR)
    node.clock.restart()
    node.clock.step(300)
    assert node.opens(path)
    node.clock.step(2 * HOUR)
    assert not node.opens(path)


@pytest.mark.parametrize(("step", "opens"), [(-HOUR, True), (HOUR, True), (3 * HOUR, False), (-10 * DAY, False)])
def test_a_clock_that_was_set_during_the_restart_shifts_the_end_by_that_much(
    node: Node, step: float, opens: bool
) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=2 * HOUR)
    node.clock.restart()
    node.clock.step(step)
    assert node.opens(path) is opens


def test_a_long_url_outlives_an_hour_lost_but_not_a_clock_without_its_date(node: Node) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=MAX_LIFETIME_S)
    node.clock.restart()
    node.clock.step(-HOUR)
    assert node.opens(path)
    node.clock.at = datetime(1970, 1, 1, tzinfo=UTC)
    assert not node.opens(path)


# --- revocation ------------------------------------------------------------------------------------------------------


def test_a_revoked_job_opens_nothing_even_after_a_restart_and_others_do(node: Node) -> None:
    path = node.signer().url("job-1", node.put("job-1"), lifetime_s=DAY)
    other = node.signer().url("job-2", node.put("job-2"), lifetime_s=DAY)
    node.shelf.revoke("job-1")
    assert not node.opens(path) and node.opens(other)
    node.clock.restart()
    assert not node.opens(path) and node.opens(other)
    assert node.shelf.jobs() == ["job-2"]
    assert os.listdir(node.folder / "handed_out") == ["job-2"]
    node.shelf.revoke("job-1")  # again: nothing to do
    with pytest.raises(LinkRefused, match="no objects"):
        node.signer().url("job-1", "0" * 32, lifetime_s=60)


def test_a_job_that_is_run_again_gets_new_urls_and_the_old_ones_stay_dead(node: Node) -> None:
    name = node.put()
    path = node.signer().url("job-1", name, lifetime_s=DAY)
    node.shelf.revoke("job-1")
    again = node.put()
    (node.folder / "handed_out" / "job-1" / name).write_bytes(CONTENT)  # even if the same object were there
    assert not node.opens(path)
    assert node.opens(node.signer().url("job-1", again, lifetime_s=DAY))


def test_what_jobs_left_behind_is_cleared_and_the_shelf_is_bounded(node: Node) -> None:
    for job in ("1", "2", "3"):
        node.put(job)
    gone = node.folder / "handed_out" / ".gone-0123"
    gone.mkdir()
    (gone / "x").write_bytes(b"x")
    assert node.shelf.keep_only({"2"}) == 2
    assert os.listdir(node.folder / "handed_out") == ["2"]
    small = Shelf(node.folder / "handed_out", max_jobs=2)
    small.put("4", "", lambda file: file.write(b"x"))
    with pytest.raises(EngineUnavailable, match="2 jobs"):
        small.put("5", "", lambda file: file.write(b"x"))
    small.put("4", "", lambda file: file.write(b"y"))  # a job that is there may add


def test_nothing_of_an_object_stays_when_its_writing_fails(node: Node) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise StorageError("no space")

    node.put()
    with pytest.raises(StorageError):
        node.shelf.put("job-1", ".dcm", fail)
    assert len(os.listdir(node.folder / "handed_out" / "job-1")) == 2  # the nonce and the first object


def test_objects_and_keys_are_private(node: Node) -> None:
    node.signer().url("job-1", node.put(), lifetime_s=60)
    for path in [*node.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


# --- keys ------------------------------------------------------------------------------------------------------------


def test_after_a_rotation_old_urls_live_on_and_new_ones_have_the_new_key(node: Node) -> None:
    signer = node.signer()
    old = signer.url("job-1", node.put(), lifetime_s=DAY)
    key = node.keys.rotate()
    new = signer.url("job-1", node.put(), lifetime_s=DAY)  # the running signer sees it
    assert new.split("/")[2] == key.id != old.split("/")[2]
    assert node.opens(old) and node.opens(new)


def test_dropping_the_old_keys_closes_every_url_at_once(node: Node) -> None:
    checker = node.signer()
    old = node.signer().url("job-1", node.put(), lifetime_s=DAY)
    checker.check(old)
    node.keys.rotate(drop_others=True)
    with pytest.raises(LinkRefused):
        checker.check(old)


def test_a_key_is_renewed_by_age_and_forgotten_when_nothing_it_signed_can_live(node: Node) -> None:
    first = node.keys.current()
    node.clock.pass_(29 * DAY)
    assert node.keys.current() == first
    node.clock.pass_(2 * DAY)
    second = node.keys.current()
    assert second != first and node.keys.key(first.id) == first
    node.clock.pass_(31 * DAY)
    third = node.keys.current()
    assert node.keys.key(first.id) is None
    assert node.keys.key(second.id) == second != third
    assert node.keys.key(second.id) is not None


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_key_survives_a_clock_step_of_an_hour(node: Node, step: float) -> None:
    path = node.signer().url("job-1", node.put(), lifetime_s=MAX_LIFETIME_S)
    node.keys.rotate()
    node.clock.step(step)
    node.keys.rotate()
    assert node.opens(path)


def test_a_key_file_that_others_may_read_or_nobody_can_is_refused(node: Node) -> None:
    node.keys.current()
    path = node.folder / URL_KEYS
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        node.keys.current()
    path.chmod(0o600)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no keys"):
        node.keys.current()


def test_a_key_shows_itself_nowhere(node: Node) -> None:
    key = node.keys.current()
    assert key.secret.hex() not in repr(key) + repr(node.keys) + str(key)
    assert repr(key.secret) not in repr(key)


def _first_key(path: Path, out: multiprocessing.SimpleQueue[str]) -> None:
    out.put(KeyRing(path, MovedClock()).current().id)


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    out: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    started = [context.Process(target=_first_key, args=(tmp_path / URL_KEYS, out)) for _ in range(4)]
    for process in started:
        process.start()
    ids = {out.get() for _ in started}
    for process in started:
        process.join(timeout=20)
    assert len(ids) == 1
    assert len(json.loads((tmp_path / URL_KEYS).read_text())["keys"]) == 1


# --- over HTTP -------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A node whose HTTP server hands objects out."""

    node: Node
    server: HealthServer

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    node = Node(tmp_path_factory.mktemp("served"), MovedClock())
    shelf, signer = shelf_and_signer(node.folder, node.clock)
    links = Links(signer, shelf, max_downloads=2)
    server = HealthServer(
        socket.create_server(("127.0.0.1", 0)), checks=(), metrics=lambda: ("text/plain", b""), mounts={PREFIX: links}
    )
    server.start()
    yield Served(node, server)
    server.stop()


def test_an_object_is_handed_out_whole(served: Served) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    response, body = served.ask(path)
    assert (response.status, body) == (200, CONTENT)
    assert response.getheader("Content-Length") == str(len(CONTENT))
    assert response.getheader("Content-Type") == "application/dicom"
    assert response.getheader("Accept-Ranges") == "bytes"
    assert response.getheader("Cache-Control") == "no-store"


def test_head_tells_the_same_without_the_bytes(served: Served) -> None:
    path = served.node.signer().url("job-1", served.node.put(suffix=".nii.gz"), lifetime_s=600)
    response, body = served.ask(path, "HEAD", Range="bytes=0-3")
    assert (response.status, body) == (200, b"")
    assert response.getheader("Content-Length") == str(len(CONTENT))
    assert response.getheader("Content-Type") == "application/gzip"


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=1000-", 1000, 1023),
        ("bytes=1000-99999999", 1000, 1023),
        ("bytes=-24", 1000, 1023),
        ("bytes=-5000", 0, 1023),
        ("bytes=0-", 0, 1023),
        ("BYTES=5-6", 5, 6),
    ],
)
def test_a_single_range_is_answered_with_its_part(served: Served, wanted: str, first: int, last: int) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    response, body = served.ask(path, Range=wanted)
    assert (response.status, body) == (206, CONTENT[first : last + 1])
    assert response.getheader("Content-Range") == f"bytes {first}-{last}/1024"
    assert response.getheader("Content-Length") == str(last - first + 1)


@pytest.mark.parametrize("wanted", ["bytes=1024-", "bytes=1024-2000", "bytes=-0", "bytes=99999-100000"])
def test_a_range_beyond_the_object_cannot_be_satisfied(served: Served, wanted: str) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    response, body = served.ask(path, Range=wanted)
    assert (response.status, body) == (416, b"")
    assert response.getheader("Content-Range") == "bytes */1024"


@pytest.mark.parametrize("wanted", ["bytes=9-3", "bytes=0-1,5-6", "items=0-1", "bytes=a-b", "bytes=", "bytes=--1", "x"])
def test_a_range_of_another_kind_is_ignored(served: Served, wanted: str) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    response, body = served.ask(path, Range=wanted)
    assert (response.status, body) == (200, CONTENT)


def test_a_part_is_only_continued_of_the_same_object(served: Served) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    tag = served.ask(path, "HEAD")[0].getheader("ETag")
    assert tag is not None
    assert served.ask(path, Range="bytes=5-9", If_Range=tag)[1] == CONTENT[5:10]
    assert served.ask(path, Range="bytes=5-9", If_Range='"another"')[1] == CONTENT


def test_an_empty_object_is_handed_out_too(served: Served) -> None:
    path = served.node.signer().url("job-1", served.node.put(content=b""), lifetime_s=600)
    assert served.ask(path)[0].status == 200
    assert served.ask(path, Range="bytes=0-")[0].status == 416


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nothing_can_be_put_or_deleted(served: Served, method: str) -> None:
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    assert served.ask(path, method)[0].status == 405
    assert served.ask(path)[1] == CONTENT


def test_what_is_not_signed_expired_or_revoked_is_not_handed_out(served: Served) -> None:
    node = served.node
    path = node.signer().url("job-1", node.put(), lifetime_s=600)
    tampered = path[:-40] + ("A" if path[-40] != "A" else "B") + path[-39:]
    for wrong in (tampered, PREFIX, PREFIX + "../ping", path + "?a=b", PREFIX + "%2e%2e/%2e%2e/secrets/urls.keys"):
        response, body = served.ask(wrong)
        assert response.status == 404 and CONTENT not in body
    assert served.ask(path)[0].status == 200
    node.clock.pass_(601)
    assert served.ask(path)[0].status == 410
    again = node.signer().url("job-1", node.put(), lifetime_s=600)
    node.shelf.revoke("job-1")
    assert served.ask(again)[0].status == 404


def test_a_download_under_way_ends_when_its_job_is_revoked(served: Served) -> None:
    size = 64 * 1024**2
    path = served.node.signer().url("job-1", served.node.put(content=bytes(size)), lifetime_s=600)
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = len(connection.recv(1024))
        served.node.shelf.revoke("job-1")
        while fragment := connection.recv(1024**2):
            received += len(fragment)
    assert received < size


def test_downloads_at_once_are_bounded_and_the_place_is_given_back(served: Served) -> None:
    path = served.node.signer().url("job-1", served.node.put(content=bytes(32 * 1024**2)), lifetime_s=600)
    held = []
    for _ in range(2):
        connection = socket.create_connection(("127.0.0.1", served.server.port), timeout=20)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        held.append(connection)  # and does not read on
    response, _ = served.ask(path)
    assert (response.status, response.getheader("Retry-After")) == (503, "5")
    assert served.ask("/ping")[0].status == 200  # health is not held up
    for connection in held:
        connection.close()
    deadline = threading.Event()
    for _ in range(100):
        if served.ask(path)[0].status == 200:
            break
        deadline.wait(0.05)
    else:
        pytest.fail("the places of closed downloads were not given back")


def test_signatures_and_nonces_reach_no_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = served.node.signer().url("job-1", served.node.put(), lifetime_s=600)
    signature = path.split("/")[5]
    served.ask(path)
    served.ask(path.replace(".dcm", ".png"))
    served.ask(path, Range="bytes=2-3")
    served.node.clock.pass_(700)
    served.ask(path)
    nonce = served.node.shelf.nonce("job-1")
    assert nonce is not None
    told = "".join(str(record.__dict__) for record in caplog.records)
    assert "an object was handed out" in told and "a link was refused" in told and "job-1" in told
    assert signature not in told and nonce.hex() not in told and PREFIX not in told


def test_a_media_type_goes_with_every_suffix_the_node_uses() -> None:
    assert set(handed_out._MEDIA_TYPES) >= {".dcm", ".zip", ".nii.gz"}
