"""Waiting that can be cut short: idle threads look for work when they are nudged, and now and then anyway."""

from __future__ import annotations

import threading

__all__ = ["Nudge"]


class Nudge:
    """For threads that look, find nothing and wait. A nudge between the look and the waiting is not lost."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    @property
    def count(self) -> int:
        """How often it was given; to be read before the look, for `wait`."""
        return self._count

    def give(self) -> None:
        """Everybody who waits looks again."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait(self, seen: int, seconds: float) -> None:
        """Until there is a nudge later than `seen`, `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._count != seen, seconds)
