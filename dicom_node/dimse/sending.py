"""Writing to a peer that may read slowly, or not at all.

Sockets here block with a short timeout of the kernel's (`SEND_TICK_S`), after which they say how much went; how long a
peer is waited for is decided here. Without that a partial write would be given its whole time again and again.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

from dicom_node.dimse.link import SEND_S

__all__ = ["send_all", "send_timeout"]

SEND_TICK_S = 2.0
LEAST_BYTES = 16 * 1024  # in `send_s`: a window probe, or a peer that reads a byte now and then, is no progress


def send_timeout(send_s: float = SEND_S) -> bytes:
    """The value of SO_SNDTIMEO for a socket that `send_all` writes to."""
    tick_s = min(SEND_TICK_S, send_s)
    return struct.pack("ll", int(tick_s), int(tick_s % 1 * 1e6))


def send_all(sock: socket.socket, parts: Sequence[bytes | memoryview], send_s: float = SEND_S) -> None:
    """All of `parts`, in as few writes as the system takes.

    Raises OSError; TimeoutError when the peer made room for less than `LEAST_BYTES` in `send_s`. The socket's own
    timeout, if it has one, comes before that.
    """
    sent = _sent(sock, parts)
    if sent == sum(map(len, parts)):
        return
    progress, since = 0, time.monotonic() - SEND_TICK_S  # the kernel came back: so long ago there was room
    views = [memoryview(part) for part in parts if len(part)]
    while True:
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if not views:
            return
        views[0] = views[0][sent:]
        sent = _sent(sock, views)
        progress += sent
        if progress >= LEAST_BYTES:
            progress, since = 0, time.monotonic()
        elif time.monotonic() - since >= send_s:
            raise TimeoutError("the peer reads nothing, or hardly anything")


def _sent(sock: socket.socket, parts: Sequence[bytes | memoryview]) -> int:
    try:
        return sock.sendmsg(parts)
    except BlockingIOError:  # a tick went by
        return 0
