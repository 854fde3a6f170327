"""Keeping a lease alive while long work runs, without letting hung work keep it for ever; and when to try again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from dicom_node.errors import LeaseLost, NodeError
from dicom_node.interfaces import Clock, seconds_since

__all__ = ["LeaseKeeper", "backoff_s"]

log = logging.getLogger(__name__)


def backoff_s(attempts: int, first_s: float, most_s: float, jitter: float) -> float:
    """Delay after the `attempts`-th failure: doubling from `first_s`, at most `most_s`, spread by a quarter.

    `jitter` 0..1 moves it from three quarters to five quarters, so that what failed together is not tried together.
    """
    doubled = first_s * 2.0 ** min(max(attempts - 1, 0), 30)
    return min(doubled, most_s) * (0.75 + 0.5 * jitter)


class LeaseKeeper:
    """Extends a lease from a thread of its own, every third of `lease_s`, between `with` and its end.

    Calling it is the work's `Heartbeat`: raises LeaseLost as soon as the lease is known to be gone. After `bound_s` the
    thread stops: work that hangs longer loses its lease, and another worker takes over.
    """

    def __init__(self, extend: Callable[[], None], *, lease_s: float, bound_s: float, clock: Clock) -> None:
        self._extend = extend
        self._every_s = lease_s / 3.0
        self._bound_s = bound_s
        self._clock = clock
        self._started = self._extended = clock.boot()
        self._lost: LeaseLost | None = None
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease-keeper", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=60.0)

    def __call__(self) -> None:
        """Extend if it is time. Raises LeaseLost."""
        with self._guard:
            if self._lost is None and seconds_since(self._extended, self._clock.boot()) >= self._every_s:
                self._try_extend()
            if self._lost is not None:
                raise LeaseLost(str(self._lost))

    def _keep(self) -> None:
        while not self._stop.wait(self._every_s):
            if seconds_since(self._started, self._clock.boot()) > self._bound_s:
                log.warning("work exceeds its time; its lease is not extended any more")
                return
            with self._guard:
                if self._lost is not None:
                    return
                self._try_extend()

    def _try_extend(self) -> None:
        try:
            self._extend()
            self._extended = self._clock.boot()
        except LeaseLost as exc:
            self._lost = exc
        except NodeError as exc:  # a busy catalog: the lease has two more thirds to go
            log.warning("a lease could not be extended", extra={"error": str(exc)})
