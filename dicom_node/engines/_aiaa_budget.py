"""The time of one series at an engine that answers while it is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

from dicom_node.errors import EngineTimeout, EngineUnavailable
from dicom_node.interfaces import Heartbeat

__all__ = ["Budget"]


class Budget:
    """`beat` is for long loops: it ends them when the time is over or the engine was closed."""

    def __init__(self, engine: str, heartbeat: Heartbeat, timeout_s: float, closed: Callable[[], bool]) -> None:
        self._engine, self._heartbeat, self._closed = engine, heartbeat, closed
        self._timeout_s, self._end = timeout_s, time.monotonic() + timeout_s

    def left_s(self) -> float:
        """What is left. Raises EngineTimeout when nothing is."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise EngineTimeout(f"engine {self._engine}: no answer within {self._timeout_s:g} s")
        return left

    def beat(self) -> None:
        """Raises EngineTimeout, EngineUnavailable, and what the heartbeat raises."""
        if self._closed():
            raise EngineUnavailable(f"the engine {self._engine} is closed")
        self._heartbeat()
        self.left_s()
