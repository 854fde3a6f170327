"""The lobby where several things happen at once: each is brought about, not waited for."""

import math
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dicom_node.dimse.lobby import Lobby, Visit

WaitFor = Callable[[Callable[[], object], float, str], None]


class Watched:
    """An epoll; `meanwhile(number)` is called before a descriptor is armed in it."""

    def __init__(self, inner: select.epoll, meanwhile: Callable[[int], None]) -> None:
        self._inner, self._meanwhile = inner, meanwhile

    def register(self, number: int, events: int) -> None:
        self._meanwhile(number)
        self._inner.register(number, events)

    def modify(self, number: int, events: int) -> None:
        self._meanwhile(number)
        self._inner.modify(number, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Hall:
    """A lobby that keeps everyone `keep_s` and notes whom it was told of."""

    def __init__(self, listener: socket.socket) -> None:
        self.served: list[str] = []
        self.dropped: list[Visit] = []
        self.turned_away: list[Visit] = []
        self.keep_s = 60.0
        self.failure: Exception | None = None
        self.lobby = Lobby(
            serve=self._serve,
            turn_away=self.turned_away.append,
            drop=self._drop,
            is_busier=lambda connections: False,
            most=4,
        )
        self.listener = listener

    def _serve(self, visit: Visit) -> None:
        try:
            said = visit.sock.recv(100, socket.MSG_DONTWAIT).decode()
        except BlockingIOError:
            said = "nothing"
        self.served.append(said)
        if said and visit.deadline:
            self.lobby.keep(visit, visit.since + self.keep_s)
        else:
            visit.sock.close()

    def _drop(self, visit: Visit) -> None:
        self.dropped.append(visit)
        visit.sock.close()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def hall() -> Iterator[Hall]:
    """Open until the end of the test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        made = Hall(listener)
        made.lobby.open(listener)
        yield made
        made.lobby.stop()


@pytest.fixture
def come(hall: Hall) -> Iterator[Callable[[], socket.socket]]:
    """`come()`: one more peer."""
    peers: list[socket.socket] = []

    def connect() -> socket.socket:
        peers.append(socket.create_connection(hall.listener.getsockname(), timeout=5.0))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


def while_armed(hall: Hall, act: Callable[[int], None]) -> None:
    """Once, when the next descriptor is armed, let another thread do `act`, as far as it is let."""
    acting: list[threading.Thread] = []

    def meanwhile(number: int) -> None:
        if not acting and number != hall.listener.fileno():
            acting.append(threading.Thread(target=act, args=(number,)))
            acting[0].start()
            acting[0].join(0.2)

    hall.lobby._poll = Watched(hall.lobby._poll, meanwhile)  # type: ignore[assignment]


def test_a_word_about_a_closed_connection_takes_nothing_from_the_next_one_of_its_number(
    hall: Hall, come: Callable[[], socket.socket], wait_for: WaitFor, caplog: pytest.LogCaptureFixture
) -> None:
    """One thread heard of a descriptor, another closed it, and it is a new connection's before the first goes on."""
    while_armed(hall, hall.lobby._see_to)
    peer = come()
    wait_for(lambda: hall.served == ["nothing"], 5.0, "the word to be acted upon")
    for number in range(3):
        peer.sendall(b"%d" % number)
        wait_for(lambda: len(hall.served) == number + 2, 5.0, "it to be served")  # noqa: B023
    assert hall.served == ["nothing", "0", "1", "2"]
    assert not caplog.records


def test_one_that_is_late_as_it_comes_back_is_closed_once(
    hall: Hall, come: Callable[[], socket.socket], wait_for: WaitFor, caplog: pytest.LogCaptureFixture
) -> None:
    hall.keep_s = -1.0
    peer = come()
    wait_for(lambda: hall.lobby.silent == 1, 5.0, "it to be there")

    def be_late(number: int) -> None:
        hall.lobby._call(math.inf)
        wait_for(lambda: peer.recv(1) == b"", 5.0, "it to be closed")

    while_armed(hall, be_late)
    peer.sendall(b"0")
    wait_for(lambda: hall.served == ["0", "nothing"], 5.0, "it to be closed")
    wait_for(lambda: hall.lobby.connections == 0, 5.0, "whoever closed it to be through")
    assert not caplog.records


def test_whoever_comes_is_heard_though_the_one_who_has_to_go_for_it_makes_trouble(
    hall: Hall, come: Callable[[], socket.socket], wait_for: WaitFor
) -> None:
    hall.lobby._most_silent = 1
    hall.failure = OSError("the record cannot be written")
    come()
    wait_for(lambda: hall.lobby.silent == 1, 5.0, "the first")
    second = come()
    wait_for(lambda: len(hall.dropped) == 1, 5.0, "the first to be dropped")
    second.sendall(b"2")
    wait_for(lambda: hall.served == ["2"], 5.0, "the second to be served")


def test_whoever_has_most_connections_makes_room_and_not_whoever_waits_longest(
    hall: Hall, come: Callable[[], socket.socket], wait_for: WaitFor
) -> None:
    """Somebody who opens connections without end pushes out none but his own."""
    hall.lobby._most_silent = 4
    addresses = iter(["192.0.2.1", "2001:db8::1", "2001:db8::2", "192.0.2.2", "2001:db8::3", "192.0.2.3", "192.0.2.4"])
    real = hall.lobby._visit
    hall.lobby._visit = lambda client, address, over_tls: real(client, next(addresses), over_tls)  # type: ignore[method-assign]
    for number in range(7):
        come()
        wait_for(lambda: hall.lobby.silent + len(hall.dropped) == number + 1, 5.0, "it to be there")  # noqa: B023
    assert [visit.address for visit in hall.dropped[:2]] == ["2001:db8::1", "2001:db8::2"]
    assert hall.dropped[2].address == "192.0.2.1", "where all have as many, who waits longest"


def test_what_is_in_hand_is_counted_at_one_moment(hall: Hall) -> None:
    """A negative number has no place in the memory that receivers share."""
    lobby = hall.lobby

    class Growing(set[threading.Thread]):
        """One more thread waits as soon as they have been counted."""

        def __len__(self) -> int:
            found = super().__len__()
            if lobby._guard.acquire(blocking=False):
                lobby._waiting += 1
                lobby._guard.release()
            return found

    before, lobby._threads = lobby._threads, Growing(lobby._threads)
    try:
        assert lobby.connections == 0
    finally:
        lobby._threads = before


def test_no_thread_begins_when_the_lobby_has_ended(hall: Hall) -> None:
    """It would wait in what is closed already."""
    hall.lobby.stop()
    with hall.lobby._guard:
        assert not hall.lobby._start_one()


def test_who_is_left_when_the_lobby_ends_is_dropped_though_the_one_before_made_trouble(
    hall: Hall, come: Callable[[], socket.socket], wait_for: WaitFor
) -> None:
    hall.failure = OSError("the record cannot be written")
    peers = [come() for _ in range(3)]
    wait_for(lambda: hall.lobby.silent == 3, 5.0, "all to be there")
    hall.lobby.stop()
    assert [peer.recv(1) for peer in peers] == [b""] * 3
    assert len(hall.dropped) == 3


def test_who_speaks_as_the_last_thread_ends_was_not_one_too_many(
    hall: Hall, wait_for: WaitFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, taken = threading.Thread(target=hall.lobby.stop), hall.lobby._taken

    def taken_at_the_end(number: int) -> Visit | None:
        visit = taken(number)
        stopping.start()
        wait_for(lambda: hall.lobby.threads == 1, 10.0, "the other threads to end")
        return visit

    monkeypatch.setattr(hall.lobby, "_taken", taken_at_the_end)
    with socket.create_connection(hall.listener.getsockname(), timeout=10.0) as peer:
        peer.sendall(b"a")
        wait_for(lambda: hall.dropped or hall.turned_away or hall.served, 10.0, "it to be seen to")
    stopping.join(10.0)
    assert (len(hall.dropped), hall.turned_away, hall.served) == (1, [], [])
