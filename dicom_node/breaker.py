"""A circuit breaker: after several failures in a row what it guards rests, then one request tries it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum

__all__ = ["Breaker", "BreakerState"]


class BreakerState(Enum):
    """States of a breaker; the value is the gauge's."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Breaker:
    """Closed: everything may. After `failures` in a row open for `rest_s`: nothing may. Then half-open: one may.

    Thread-safe. `now` in seconds, any monotonic clock.
    """

    def __init__(self, *, failures: int, rest_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rest_s, self._now = failures, rest_s, now
        self._guard = threading.Lock()
        self._failed = 0
        self._until: float | None = None
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """Where it stands now."""
        with self._guard:
            return self._state()

    def _state(self) -> BreakerState:
        if self._until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._now() < self._until else BreakerState.HALF_OPEN

    def admits(self) -> bool:
        """Whether a request may go there; half-open says yes to one, until `succeeded`, `failed` or `dropped`."""
        with self._guard:
            state = self._state()
            if state is BreakerState.HALF_OPEN and not self._probing:
                self._probing = True
                return True
            return state is BreakerState.CLOSED

    def succeeded(self) -> None:
        """What is guarded answered."""
        with self._guard:
            self._failed, self._until, self._probing = 0, None, False

    def failed(self) -> None:
        """What is guarded did not do its work."""
        with self._guard:
            self._failed += 1
            if self._until is not None or self._failed >= self._most:
                self._until = self._now() + self._rest_s
            self._probing = False

    def dropped(self) -> None:
        """A request that was admitted came to no end that says anything of what is guarded."""
        with self._guard:
            self._probing = False
