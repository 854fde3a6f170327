"""Which part a process is, and the timers: the only importer of apscheduler. Part of the composition root.

Each role's module is imported only in its own process: a receiver loads no rules, a service no encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from dicom_node.interfaces import Clock
from dicom_node.process import Orders, Part

__all__ = ["Timers", "part_class"]


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


class Timers:
    """Calls functions every so many seconds: never one beside itself, and once for all ticks missed meanwhile."""

    def __init__(self) -> None:
        from apscheduler.schedulers.background import BackgroundScheduler

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
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        self._scheduler.add_job(tick, "date", run_date=at, id="once", replace_existing=True, misfire_grace_time=None)

    @property
    def running(self) -> bool:
        """Whether ticks come."""
        return bool(self._scheduler.running)

    def stop(self) -> None:
        """Wait for the tick under way, then no more."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)
