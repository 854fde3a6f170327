"""How the disk presses the node as a whole: what each process found, told by its pulse. Part of the composition root.

Free space every process sees for itself; that a step failed or was slow is known to the process that waited for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dicom_node.config import NodeConfig
from dicom_node.interfaces import Clock
from dicom_node.pulse import fresh, read_pulse, receiver_roles
from dicom_node.store.pressure import Grade, Pressed, Pressure

__all__ = ["PROBE_S", "DiskWatch", "disk_facts", "pressed_elsewhere"]

log = logging.getLogger(__name__)

_KEY = "disk"
PROBE_S = 1.5  # how often `DiskWatch.is_probe_due` is asked; of a disk that is well every SELDOM-th time means one
SELDOM = 7


def disk_facts(pressure: Pressure) -> Mapping[str, Any]:
    """For a pulse."""
    here = pressure.look()
    return {_KEY: [int(here.grade), here.reason]}


def pressed_elsewhere(config: NodeConfig, clock: Clock) -> Pressed:
    """The worst that living processes found themselves. What none of them found is not told on."""
    found = [Pressed(Grade.OPEN)]
    for role in (*receiver_roles(config.receivers), "work", "service"):
        pulse = read_pulse(config.data_dir, role)
        if pulse is not None and fresh(pulse, clock) and _KEY in pulse.facts:
            grade, reason = pulse.facts[_KEY]
            found.append(Pressed(Grade(grade), reason))
    return max(found, key=lambda one: one.grade)


class DiskWatch:
    """The node's view, for `/ready`, `/metrics` and the log: told there once for each change."""

    def __init__(self, pressure: Pressure, elsewhere: Callable[[], Pressed]) -> None:
        self._pressure, self._elsewhere = pressure, elsewhere
        self._logged = Pressed(Grade.OPEN)
        self._ticks = 0

    def pressed(self) -> Pressed:
        """How it stands now."""
        return max(self._pressure.look(), self._elsewhere(), key=lambda one: one.grade)

    def is_probe_due(self) -> bool:
        """Whether it is time to try the disk: often while it fails, seldom while all is well, not while it is full."""
        self._ticks += 1
        if self._pressure.space() >= Grade.REFUSING:
            return False
        return self.pressed().grade is not Grade.OPEN or self._ticks % SELDOM == 0

    def look(self) -> None:
        """Log a change since the last look; for one thread."""
        now = self.pressed()
        if now.grade is self._logged.grade:
            return
        self._logged = now
        extra = {"action": "disk_pressure", "intake_state": min(now.grade, Grade.REFUSING)}
        if now.grade is Grade.OPEN:
            log.warning("the disk is well again: all goes on", extra=extra)
            return
        waits = {
            Grade.PAUSED: "routine and background jobs wait",
            Grade.REFUSING: "C-STORE is refused, routine and background jobs wait",
            Grade.FULL: "C-STORE is refused, all jobs wait",
        }[now.grade]
        log.error("the disk is in trouble", extra=extra | {"reason": now.reason, "waits": waits})
