"""Memory that several threads share by the byte: who would exceed it waits. Must not import torch."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dicom_node.errors import EngineUnavailable
from dicom_node.model import EngineTask, Priority

__all__ = ["ByteBudget", "VolumeMemory", "volume_bytes"]

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

    @property
    def waiting(self) -> int:
        """How many wait for some."""
        with self._free:
            return len(self._waiting)

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


class VolumeMemory:
    """What the volumes of all engines of a process share while they are read, sent and brought back.

    `size` bytes, and as much again for urgent jobs, which never wait for what others hold. The node gives every engine
    of its own kinds the same one (keyword `memory`), made from `jobs.prepared_mb`.
    """

    def __init__(self, size: int) -> None:
        self._volumes, self._urgent_volumes = ByteBudget(size), ByteBudget(size)

    @property
    def size(self) -> int:
        """Bytes there are, for urgent jobs and for the others each."""
        return self._volumes.size

    @property
    def taken_bytes(self) -> int:
        """Bytes handed out now."""
        return self._volumes.taken_bytes + self._urgent_volumes.taken_bytes

    @property
    def waiting(self) -> int:
        """How many wait for some."""
        return self._volumes.waiting + self._urgent_volumes.waiting

    @contextmanager
    def taken(
        self, size: int, priority: Priority, heartbeat: Callable[[], None], *, wait_s: float | None = None
    ) -> Iterator[None]:
        """Have `size` bytes inside the `with`; `size` may exceed all there is: it then goes alone.

        Raises what `heartbeat` raises (called a few times a second while waiting), and EngineUnavailable when others
        held the memory longer than `wait_s`; without it the heartbeat alone bounds the wait.
        """
        began_s = time.monotonic()

        def beat() -> None:
            if wait_s is not None and time.monotonic() - began_s > wait_s:
                raise EngineUnavailable(f"others' volumes filled jobs.prepared_mb for {wait_s:g} s: it waits its turn")
            heartbeat()

        budget = self._urgent_volumes if priority is Priority.URGENT else self._volumes
        with budget.taken(size, priority.rank, beat):
            yield


def volume_bytes(task: EngineTask) -> int:
    """What the series takes once it is read: two bytes a voxel."""
    known = [image for image in task.header.geometry if image.get("Rows") and image.get("Columns")]
    voxels = sum(int(image["Rows"]) * int(image["Columns"]) * int(image.get("NumberOfFrames") or 1) for image in known)
    return 2 * voxels if known else sum(instance.data_set_length for instance in task.instances)
