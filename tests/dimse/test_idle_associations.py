"""Associations with nothing to say: they cost a connection and no thread, and nothing of what they were promised."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.dimse import lobby as lobby_module
from dicom_node.dimse import server as server_module
from dicom_node.dimse.commands import NO_DATA_SET
from dicom_node.dimse.lobby import KEPT_THREADS

EXPLICIT, VERIFICATION, CT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2"
STORE_RQ = {"CommandField": 1, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": CT}
CONTEXTS = [(1, VERIFICATION, [EXPLICIT]), (3, CT, [EXPLICIT])]
RELEASE_RQ, RELEASE_RP, ABORT = 5, 6, 7

pytestmark = pytest.mark.parametrize("wire", ["own"])


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads leave associations, and end, sooner than they do."""
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(lobby_module, "SPARE_S", 0.2)


@pytest.fixture
def parked(wait_for: Callable[..., None]) -> Callable[[Any, int], None]:
    """`parked(node, count)`: wait until so many associations are without a thread."""

    def wait(node: Any, count: int) -> None:
        wait_for(lambda: len(node.server._lobby._parked) == count, 10.0, f"{count} associations to be parked")

    return wait


@pytest.fixture
def in_lobby(wait_for: Callable[..., None]) -> Callable[[Any, int, int], None]:
    """`in_lobby(node, silent, parked)`: wait until so many connections are there, and no thread is with another."""

    def wait(node: Any, silent: int, parked: int) -> None:
        lobby, goal = node.server._lobby, (silent, silent + parked)
        wait_for(lambda: (lobby.silent, lobby.connections) == goal, 20.0, f"{silent} silent and {parked} parked")

    return wait


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """`descriptors()`: how many this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


def echo_works(peer: Any, message_id: int = 1) -> bool:
    """One C-ECHO."""
    peer.send_command(
        1, CommandField=0x30, MessageID=message_id, CommandDataSetType=NO_DATA_SET, AffectedSOPClassUID=VERIFICATION
    )
    answer = peer.read_command()
    return (answer.Status, answer.MessageIDBeingRespondedTo) == (0, message_id)


def test_five_hundred_idle_associations_hold_no_thread_and_delay_nobody(
    serve: Callable[..., Any],
    raw_peer: Any,
    parked: Any,
    wait_for: Callable[..., None],
    begun_threads: Callable[[], list[str]],
    descriptors: Callable[[], int],
) -> None:
    node = serve()
    threads, opened = len(begun_threads()), descriptors()
    peers, most = [], 0
    for _ in range(500):
        peers.append(raw_peer(node.port))
        assert peers[-1].associate(CONTEXTS)[0] == 2
        most = max(most, len(begun_threads()))
    parked(node, 500)
    wait_for(lambda: len(begun_threads()) <= threads, 20.0, "threads to end")
    assert most <= threads + 8 * KEPT_THREADS
    assert descriptors() <= opened + 2 * 500 + 8  # both ends are in this process
    assert node.server.active_associations == 500
    began = time.monotonic()
    fresh = raw_peer(node.port)
    assert fresh.associate(CONTEXTS)[0] == 2 and echo_works(fresh)
    assert time.monotonic() - began < 1.0
    assert all(echo_works(peer, 7) for peer in peers[::50])
    for peer in peers:
        peer.close()
    wait_for(lambda: node.server.active_associations == 1, 10.0, "the others to be gone")
    wait_for(lambda: descriptors() <= opened + 8, 10.0, "their descriptors to be closed")


def test_a_parked_association_goes_on_where_it_was(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], data_set_bytes: Any, parked: Any
) -> None:
    node = serve()
    path = make_file(pixels=300)
    peer = raw_peer(node.port)
    peer.associate(CONTEXTS)
    parked(node, 1)
    peer.send_command(3, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
    assert peer.read_command().Status == 0
    parked(node, 1)
    assert echo_works(peer, 2)
    parked(node, 1)
    peer.send_pdu(RELEASE_RQ, bytes(4))
    assert peer.read_pdu() == (RELEASE_RP, bytes(4))
    node.counted.wait_for(lambda c: c.ended == [("TEST", "released")])
    assert node.association_ends() == [("released", 0)]
    stored = node.catalog.index.instance(path.stem)
    assert Path(stored.path).read_bytes()[stored.data_set_offset :] == data_set_bytes(path)


def test_whoever_waits_for_quiet_is_told_of_the_traffic_of_one_that_is_parked(
    serve: Callable[..., Any],
    raw_peer: Any,
    parked: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., None],
) -> None:
    monkeypatch.setattr(server_module, "TOUCH_S", 0.3)
    node = serve()
    touched: list[str] = []
    monkeypatch.setattr(
        node.server._serving, "touched", lambda peers: touched.extend(peer.source.calling_ae_title for peer in peers)
    )
    raw_peer(node.port).associate(CONTEXTS)
    parked(node, 1)
    wait_for(lambda: touched == ["TEST"], 5.0, "the touch")


def test_the_idle_time_of_one_that_is_parked_comes_to_its_end(
    serve: Callable[..., Any], raw_peer: Any, parked: Any
) -> None:
    node = serve(association_idle_timeout_s=0.6)
    peer, began = raw_peer(node.port), time.monotonic()
    peer.associate(CONTEXTS)
    parked(node, 1)
    assert peer.read_pdu()[0] == ABORT
    assert 0.5 < time.monotonic() - began < 5.0
    peer.close()
    node.counted.wait_for(lambda c: c.ended == [("TEST", "released")])
    assert node.server.active_associations == 0


@pytest.mark.parametrize("how", ["aborts", "closes"])
def test_the_end_of_one_that_is_parked_is_noticed(
    serve: Callable[..., Any], raw_peer: Any, parked: Any, how: str
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate(CONTEXTS)
    parked(node, 1)
    if how == "aborts":
        peer.send_pdu(ABORT, bytes(4))
        assert peer.read_pdu() == (0, b"")
    else:
        peer.close()
    node.counted.wait_for(lambda c: c.ended == [("TEST", "aborted")])
    assert node.server.active_associations == 0


def test_one_that_is_parked_is_told_that_the_node_stops(serve: Callable[..., Any], raw_peer: Any, parked: Any) -> None:
    node = serve()
    peers = [raw_peer(node.port) for _ in range(20)]
    for peer in peers:
        peer.associate(CONTEXTS)
    parked(node, 20)
    began = time.monotonic()
    node.server.stop(5.0)
    assert time.monotonic() - began < 5.0
    assert [peer.read_pdu()[0] for peer in peers] == [ABORT] * 20
    assert node.counted.ended == [("TEST", "aborted")] * 20


def test_half_a_request_for_an_association_holds_no_thread(
    serve: Callable[..., Any],
    raw_peer: Any,
    in_lobby: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., None],
    begun_threads: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(server_module, "SPARE_THREADS", 80)  # all may speak at once, and nobody is turned away
    node = serve(max_associations=1, bounds={"first_pdu_s": 120.0})  # none is closed while this is looked at
    threads = len(begun_threads())
    halves = [raw_peer(node.port) for _ in range(60)]
    for peer in halves:
        peer.socket.sendall(b"\1\0\0\0\1\0\0\1")
    peer = raw_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2 and echo_works(peer)
    wait_for(lambda: len(node.server._links) == 61, 20.0, "each half to be heard")
    in_lobby(node, 60, 1)
    wait_for(lambda: len(begun_threads()) <= threads, 20.0, "threads begun for the moment to end")
    assert echo_works(peer, 2)


def test_one_that_was_released_and_is_not_closed_counts_no_more_and_is_closed_soon(
    serve: Callable[..., Any], raw_peer: Any
) -> None:
    node = serve(max_associations=1)
    released = [released_peer(node, raw_peer) for _ in range(20)]
    assert released[-1].read_pdu() == (0, b"")


def released_peer(node: Any, raw_peer: Any) -> Any:
    """One that had its association, was released from it and does not close."""
    peer = raw_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2
    peer.send_pdu(RELEASE_RQ, bytes(4))
    assert peer.read_pdu()[0] == RELEASE_RP
    return peer


def test_one_that_was_released_and_is_not_closed_holds_no_thread(
    serve: Callable[..., Any],
    raw_peer: Any,
    in_lobby: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., None],
    begun_threads: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(server_module, "LINGER_S", 120.0)
    node = serve(max_associations=1)
    threads = len(begun_threads())
    for _ in range(20):
        released_peer(node, raw_peer)
    in_lobby(node, 20, 0)
    wait_for(lambda: len(begun_threads()) <= threads, 20.0, "threads begun for the moment to end")
