"""Memory that several threads share by the byte: who would exceed it waits. Must not import torch."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ByteBudget"]

_POLL_S = 0.25  # heartbeats come at least this often while waiting


class ByteBudget:
    """`size` bytes. Who asks first gets first, more urgent ones before; small ones do not overtake a large one.

    Who needs more than there is gets it when nobody else has any: it must be possible to run what is large.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = threading.Condition()
        self._taken = 0
        self._waiting: list[tuple[int, int]] = []
        self._tickets = itertools.count()

    @property
    def taken_bytes(self) -> int:
        """Bytes handed out now."""
        with self._free:
            return self._taken

    @contextmanager
    def taken(self, size: int, rank: int, heartbeat: Callable[[], None]) -> Iterator[None]:
        """Have `size` bytes inside the `with`. `rank` as `model.Priority.rank`. Raises what `heartbeat` raises."""
        self._take(size, rank, heartbeat)
        try:
            yield
        finally:
            with self._free:
                self._taken -= size
                self._free.notify_all()

    def _take(self, size: int, rank: int, heartbeat: Callable[[], None]) -> None:
        with self._free:
            ticket = (rank, next(self._tickets))
            heapq.heappush(self._waiting, ticket)
            try:
                while self._waiting[0] != ticket or (self._taken and self._taken + size > self.size):
                    self._free.wait(_POLL_S)
                    self._free.release()  # a heartbeat may write to the catalog
                    try:
                        heartbeat()
                    finally:
                        self._free.acquire()
                self._taken += size
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._free.notify_all()
