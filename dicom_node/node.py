"""Which part a process is, and the timers: the only importer of apscheduler. Part of the composition root.

Each role's module is imported only in its own process: a receiver loads no rules, a service no encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dicom_node.interfaces import Clock
from dicom_node.process import Orders, Part
from dicom_node.pulse import receiver_role

__all__ = ["Timers", "start_part"]


def start_part(role: str, orders: Orders, clock: Clock) -> Part:
    """Make and start the collaborators of `role`. Raises NodeError when one of them cannot start."""
    if role == receiver_role(orders.receiver_number):
        from dicom_node.receiver import Receiver

        return Receiver(orders, clock)
    if role == "service":
        from dicom_node.service import Service

        return Service(orders, clock)
    from dicom_node.worker import Work

    return Work(orders, clock)


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

    @property
    def running(self) -> bool:
        """Whether ticks come."""
        return bool(self._scheduler.running)

    def stop(self) -> None:
        """Wait for the tick under way, then no more."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)
