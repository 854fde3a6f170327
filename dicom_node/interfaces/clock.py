"""What time it is, for whom."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from dicom_node.model import BootTime

__all__ = ["Clock", "seconds_since"]


class Clock(Protocol):
    """Time, injected. Leases, back-off and quiet time run on `boot`; `wall` is for people and results."""

    def boot(self) -> BootTime:
        """Now on the boot clock (counts through suspend, never jumps)."""
        ...

    def wall(self) -> datetime:
        """Now, aware, UTC."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; a test clock returns at once and moves time."""
        ...


def seconds_since(then: BootTime, now: BootTime) -> float:
    """Seconds from `then` to `now`; infinity when `then` belongs to another boot (it is long past)."""
    return now.seconds - then.seconds if then.boot_id == now.boot_id else float("inf")
