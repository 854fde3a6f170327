"""Several receivers at one listening socket: one cap for all of them, and a share for each."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dicom_node.dimse import lobby
from dicom_node.places import Places, new_places

VERIFICATION = (1, "1.2.840.10008.1.1", ["1.2.840.10008.1.2.1"])
TOO_MANY = (3, b"\0\x02\x03\x02")
WaitFor = Callable[[Callable[[], object], float, str], None]


@pytest.fixture
def places() -> Iterator[Callable[[int], list[Places]]]:
    """`places(receivers)`: what each of them sees."""
    with ExitStack() as stack:

        def make(receivers: int) -> list[Places]:
            fd = new_places(receivers)
            stack.callback(os.close, fd)
            return [Places(fd, number) for number in range(receivers)]

        yield make


@pytest.fixture
def beside(serve: Callable[..., Any], places: Any) -> Iterator[Callable[..., list[Any]]]:
    """`beside(receivers, **settings)`: so many servers at one socket; the last has only a row, and takes nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def start(receivers: int, **settings: Any) -> list[Any]:
            rows = places(receivers + 1)
            return [serve(sock=listener.dup(), neighbours=row, **settings) for row in rows[:-1]]

        yield start


def test_what_one_tells_the_others_see(places: Callable[[int], list[Places]]) -> None:
    first, second, third = places(3)
    assert (first.established(2), second.established(5), third.established(0)) == (0, 2, 7)
    assert not first.is_busier(3), "the others do not run yet"
    assert second.is_busier(4) and not first.is_busier(4)
    assert not third.is_busier(1) and first.is_busier(4)
    third.leave()
    assert not first.is_busier(4) and second.is_busier(5)
    second.leave()
    assert first.established(2) == 0


def test_one_limit_holds_for_all_receivers(beside: Callable[..., list[Any]], raw_peer: Any, wait_for: WaitFor) -> None:
    servers = beside(2, max_associations=3)
    peers = [raw_peer(servers[0].port) for _ in range(3)]
    assert [peer.associate([VERIFICATION])[0] for peer in peers] == [2, 2, 2]
    for _ in range(4):  # whichever takes it
        assert raw_peer(servers[0].port).associate([VERIFICATION]) == TOO_MANY
    assert sum(one.server.active_associations for one in servers) == 3
    peers.pop().close()
    wait_for(lambda: sum(one.server.active_associations for one in servers) == 2, 10, "the end of one")
    assert raw_peer(servers[0].port).associate([VERIFICATION])[0] == 2
    assert raw_peer(servers[0].port).associate([VERIFICATION]) == TOO_MANY
    assert [word for one in servers for word in one.counted.rejected] == ["limit"] * 5


@pytest.mark.parametrize("wire", ["own"])
def test_who_has_more_leaves_a_connection_to_the_others_for_a_moment(
    serve: Callable[..., Any],
    places: Callable[[int], list[Places]],
    raw_peer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A moment that is long enough for any machine: the test is the other receiver."""
    monkeypatch.setattr(lobby, "GIVE_WAY_S", 1.5)
    row, other = places(2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = serve(sock=listener.dup(), neighbours=row)
        assert raw_peer(server.port).associate([VERIFICATION])[0] == 2
        assert not other.is_busier(0)
        peer = raw_peer(server.port)
        peer.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.associate([VERIFICATION])
        taken, _ = listener.accept()
        with taken:
            assert taken.getpeername() == peer.socket.getsockname()


@pytest.mark.parametrize("wire", ["own"])
def test_one_that_is_stuck_and_has_fewest_keeps_nothing_from_the_others(
    serve: Callable[..., Any], places: Callable[[int], list[Places]], raw_peer: Any
) -> None:
    row, stuck = places(2)
    assert not stuck.is_busier(0)
    server = serve(neighbours=row)
    assert [raw_peer(server.port).associate([VERIFICATION])[0] for _ in range(12)] == [2] * 12
