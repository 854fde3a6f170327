"""A series for an engine that takes volumes and answers while it is waited for: its time, and what of it may leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import why_not
from dicom_node.errors import EngineRejected, EngineTimeout, EngineUnavailable
from dicom_node.geometry import VolumeGeometry
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, StoredInstance
from dicom_node.pixels import ImageFile, read_image, series_geometry

__all__ = ["Budget", "Stack", "screened", "stack_of"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A series that may be sent. `identifiable`: its pixels may name the patient."""

    images: tuple[ImageFile, ...]
    geometry: VolumeGeometry
    identifiable: bool


def stack_of(task: EngineTask, budget: Budget, *, hide: bool) -> Stack:
    """The volume of the series, if it may leave. Raises SeriesRejected, EngineRejected."""
    images = []
    for instance in task.instances:
        images.append(read_image(instance))
        budget.beat()
    geometry = series_geometry(images)
    used = set(geometry.sop_instance_uids)
    images = [image for image in images if image.instance.sop_instance_uid in used]
    identifiable = screened([image.instance for image in images], budget, hide=hide)
    return Stack(images=tuple(images), geometry=geometry, identifiable=identifiable)


def screened(instances: Sequence[StoredInstance], budget: Budget, *, hide: bool) -> bool:
    """Whether the pixels may name the patient. Raises EngineRejected for images that may not leave."""
    identifiable = False
    for instance in instances:
        header = read_header(instance)
        if reason := why_not(header, hide=hide):
            raise EngineRejected(reason)
        identifiable = identifiable or bool(why_not(header, hide=True))
        budget.beat()
    return identifiable
