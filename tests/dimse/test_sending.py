"""A peer that reads nothing, or hardly anything, is not waited for longer than is said."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dicom_node.dimse import sending
from dicom_node.dimse.sending import send_all, send_timeout

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, which blocks with the kernel's timeout, and the peer's."""
    monkeypatch.setattr(sending, "SEND_TICK_S", 0.05)
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, send_timeout())
    with ours, theirs:
        yield ours, theirs


def test_all_parts_arrive_at_a_peer_that_pauses(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    read = bytearray()

    def reader() -> None:
        time.sleep(0.2)
        while piece := theirs.recv(65536):
            read.extend(piece)

    thread = threading.Thread(target=reader)
    thread.start()
    send_all(ours, [b"", b"head", CONTENT, memoryview(b"tail")], 0.5)
    ours.shutdown(socket.SHUT_WR)
    thread.join(10)
    assert read == b"head" + CONTENT + b"tail"


def test_a_peer_that_reads_nothing_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="reads nothing"):
        send_all(ends[0], [CONTENT], 0.5)
    assert 0.3 < time.monotonic() - started < 5.0


def test_a_peer_that_reads_a_byte_now_and_then_is_gone(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LEAST_BYTES", 1 << 30)
    ours, theirs = ends
    over = threading.Event()

    def reader() -> None:
        while not over.wait(0.2):  # a tick is shorter: the wait of a local socket begins anew with each piece
            theirs.recv(8192)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="hardly"):
            send_all(ours, [CONTENT], 0.5)
    finally:
        over.set()
        theirs.setblocking(False)
        thread.join(10)
