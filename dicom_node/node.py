"""Which part a process is, and the timers: the only importer of apscheduler. Part of the composition root.

Each role's module is imported only in its own process: a receiver loads no rules, a service no encoders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from dicom_node.interfaces import Clock
from dicom_node.process import Orders, Part

__all__ = ["Timers", "part_class"]

log = logging.getLogger(__name__)


def part_class(role: str) -> Callable[[Orders, Clock], Part]:
    """What makes and starts the collaborators of `role`; that raises NodeError when one of them cannot start.

    Loading its modules is most of the time that a process takes to start.
    """
    if role == "service":
        from dicom_node.service import Service

        return Service
    if role == "work":
        from dicom_node.worker import Work

        return Work
    from dicom_node.receiver import Receiver

    return Receiver


JUMP_S = 1.0  # of the wall clock against the boot clock; what time servers slew is far less in a second


class Timers:
    """Calls functions every so many seconds: never one beside itself, and once for all ticks missed meanwhile.

    The scheduler knows the wall clock only: set back by an hour it would be silent for an hour. See `follow_clock`.
    """

    def __init__(self, clock: Clock) -> None:
        from apscheduler.schedulers.background import BackgroundScheduler

        self._clock = clock
        self._wall_ahead_s = self._ahead_s()
        make: Any = BackgroundScheduler  # without types
        self._scheduler = make(timezone="UTC")
        self._scheduler.start()

    def every(self, seconds: float, tick: Callable[[], None]) -> None:
        """Call `tick` from now on; what it raises is logged by the scheduler and does not stop it."""
        self._scheduler.add_job(
            tick, "interval", seconds=seconds, max_instances=1, coalesce=True, misfire_grace_time=None
        )

    def once(self, seconds: float, tick: Callable[[], None]) -> None:
        """Call `tick` once, so many seconds from now; in place of one that was asked for before and is to come."""
        at = self._clock.wall() + timedelta(seconds=seconds)
        self._scheduler.add_job(tick, "date", run_date=at, id="once", replace_existing=True, misfire_grace_time=None)

    def follow_clock(self) -> None:
        """Call it every second or so: when the wall clock was set, every timer ticks now and goes on from there."""
        ahead_s = self._ahead_s()
        jump_s, self._wall_ahead_s = ahead_s - self._wall_ahead_s, ahead_s
        if abs(jump_s) < JUMP_S:
            return
        log.warning("the wall clock was set; timers go on from its new time", extra={"jump_s": round(jump_s)})
        for job in self._scheduler.get_jobs():
            with suppress(LookupError):  # one that was to tick once has just done so
                job.modify(next_run_time=self._clock.wall())

    def _ahead_s(self) -> float:
        return self._clock.wall().timestamp() - self._clock.boot().seconds

    @property
    def running(self) -> bool:
        """Whether ticks come."""
        return bool(self._scheduler.running)

    def stop(self) -> None:
        """Wait for the tick under way, then no more."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)
