"""Inside the runtime process: what was asked and not yet begun, most urgent first. Must not import torch."""

from __future__ import annotations

import heapq
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicom_node.models.wire import receive, send

__all__ = ["HungUp", "Intake", "Request"]


class HungUp(Exception):
    """The parent closed its end: nobody waits for anything any more."""


@dataclass(order=True, slots=True)
class Request:
    """One request: `rank` as `model.Priority.rank` (smaller first), then `serial`, the order of arrival."""

    rank: int
    serial: int
    message: Mapping[str, Any] = field(compare=False)
    fds: Sequence[int] = field(compare=False)
    arrived: float = field(compare=False, default_factory=time.monotonic)

    @property
    def identity(self) -> int:
        """The parent's number for it."""
        return int(self.message["id"])

    def drop(self) -> None:
        """Close the descriptor of an array nobody will read."""
        for fd in self.fds:
            os.close(fd)


class Intake:
    """The parent's socket and the requests that wait. The parent is trusted; what it says makes sense."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._heap: list[Request] = []
        self._arrivals = 0
        self._cancelled: set[int] = set()

    def __len__(self) -> int:
        return len(self._heap)

    def drain(self, wait_s: float | None = 0.0) -> None:
        """Take in everything that lies in the socket; wait for the first `wait_s`, None: as long as it takes.

        Raises HungUp.
        """
        while self._poll.poll(None if wait_s is None else wait_s * 1000):
            wait_s = 0.0
            received = receive(self._socket)
            if received is None:
                raise HungUp
            message, fds = received
            if "cancel" in message:
                self._cancel(int(message["cancel"]))
                continue
            self._arrivals += 1
            heapq.heappush(self._heap, Request(int(message.get("rank", 1)), self._arrivals, message, fds))

    def _cancel(self, identity: int) -> None:
        waiting = next((request for request in self._heap if request.identity == identity), None)
        if waiting is None:
            self._cancelled.add(identity)  # it is being worked on, or was answered
            return
        self._heap.remove(waiting)
        heapq.heapify(self._heap)
        waiting.drop()
        self.answer({"id": identity, "kind": "cancelled", "error": "cancelled"})

    def is_cancelled(self, identity: int) -> bool:
        """Whether nobody waits any more for a request that is being worked on."""
        return identity in self._cancelled

    def pop(self, *, before_rank: int | None = None) -> Request | None:
        """The first request, or None; with `before_rank` only one that is strictly more urgent."""
        if not self._heap or (before_rank is not None and self._heap[0].rank >= before_rank):
            return None
        return heapq.heappop(self._heap)

    def take(self, fits: Callable[[Request], bool], most: int) -> list[Request]:
        """At most `most` of the waiting requests that fit, in their order."""
        found = [request for request in sorted(self._heap) if fits(request)][: max(most, 0)]
        if found:
            chosen = {request.serial for request in found}
            self._heap = [request for request in self._heap if request.serial not in chosen]
            heapq.heapify(self._heap)
        return found

    def answer(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Tell the parent. Closes `fds`. Raises HungUp."""
        self._cancelled.discard(message.get("id", 0))
        try:
            send(self._socket, message, fds)
        except OSError as exc:
            raise HungUp from exc
        finally:
            for fd in fds:
                os.close(fd)
