"""How often and how many at a time an engine is called: one pace and one set of slots for each engine and process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Pace", "Slots"]

SLICE_S = 0.2


class Pace:
    """At most `calls_per_s` calls, evenly spaced; None = any number. Thread-safe."""

    def __init__(self, calls_per_s: float | None) -> None:
        self._every_s = 0.0 if calls_per_s is None else 1.0 / calls_per_s
        self._guard = threading.Lock()
        self._next = float("-inf")

    def turn_in_s(self, now: float, most_s: float) -> float | None:
        """Book the next turn and return how long to wait for it; None, with nothing booked, if beyond `most_s`."""
        with self._guard:
            wait_s = max(self._next - now, 0.0)
            if wait_s > most_s:
                return None
            self._next = now + wait_s + self._every_s
            return wait_s


class Slots:
    """At most `most` holders at a time. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._free = threading.Semaphore(most)
        self._guard = threading.Lock()
        self._held = self._waiting = 0

    @property
    def held(self) -> int:
        """How many are held now."""
        return self._held

    @property
    def waiting(self) -> int:
        """How many wait for one now."""
        return self._waiting

    @contextmanager
    def one(self, tick: Callable[[], None]) -> Iterator[None]:
        """Hold one for the block; while there is none, `tick` is called every 0.2 s and ends the wait by raising."""
        self._count(waiting=1)
        try:
            while not self._free.acquire(timeout=SLICE_S):
                tick()
        finally:
            self._count(waiting=-1)
        self._count(held=1)
        try:
            yield
        finally:
            self._count(held=-1)
            self._free.release()

    def _count(self, *, held: int = 0, waiting: int = 0) -> None:
        with self._guard:
            self._held += held
            self._waiting += waiting
