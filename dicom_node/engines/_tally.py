"""What is measured on the labels an engine painted: volume, mean Hounsfield units, whether the images cut them off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dicom_node.geometry import VolumeGeometry
from dicom_node.values import (
    LabelVolume,
    Measurements,
    Presence,
    Segment,
    SegmentMeasurement,
)

__all__ = ["measured"]

_UNKNOWN = "not found; this engine does not tell whether it should be visible"
_CUT = "reaches the edge of the images: measured on the visible part only"


@dataclass(slots=True)
class _Tally:
    """What is counted of one label. `low` and `high` are (slice, row, column) of the box around it."""

    voxels: int = 0
    cm3: list[float] = field(default_factory=list)
    value_sum: float = 0.0
    low: list[int] = field(default_factory=lambda: [2**31] * 3)
    high: list[int] = field(default_factory=lambda: [-1] * 3)

    def add(self, k: int, mask: npt.NDArray[np.bool_], values: npt.NDArray[np.generic], voxel_cm3: float) -> None:
        inside = values[mask]
        self.voxels += inside.size
        self.cm3.append(inside.size * voxel_cm3)
        self.value_sum += float(inside.sum(dtype=np.float64))
        for axis, at in enumerate((np.array([k]), *(np.flatnonzero(mask.any(axis=1 - a)) for a in range(2)))):
            self.low[axis] = min(self.low[axis], int(at[0]))
            self.high[axis] = max(self.high[axis], int(at[-1]))


def measured(
    volume: LabelVolume,
    values: npt.NDArray[np.generic],
    geometry: VolumeGeometry,
    *,
    hounsfield: bool,
    heartbeat: Callable[[], None],
) -> Measurements:
    """The segments of `volume` measured on `values`, both (slice, row, column) on the grid of `geometry`.

    Volume in cm3, each slice standing for its own width; the mean of `values` where they are in HU (`hounsfield`), else
    none. A label without a voxel is UNDETERMINED: an engine that only paints does not say that something is absent.
    """
    tallies = {segment.number: _Tally() for segment in volume.segments}
    for k, plane in enumerate(volume.labels):
        voxel_cm3 = geometry.widths_mm[k] * geometry.spacing_mm[1] * geometry.spacing_mm[2] / 1000.0
        for number in np.flatnonzero(np.bincount(plane.reshape(-1), minlength=256)).tolist():
            if number in tallies:
                tallies[number].add(k, plane == number, values[k], voxel_cm3)
        heartbeat()
    items = tuple(_item(segment, tallies[segment.number], geometry, hounsfield) for segment in volume.segments)
    return Measurements(items=items, notes=volume.notes)


def _item(segment: Segment, tally: _Tally, geometry: VolumeGeometry, hounsfield: bool) -> SegmentMeasurement:
    if not tally.voxels:
        return SegmentMeasurement(
            segment=segment, presence=Presence.UNDETERMINED, volume_cm3=None, mean_hu=None, note=_UNKNOWN
        )
    cut = any(tally.low[a] == 0 or tally.high[a] == geometry.shape[a] - 1 for a in range(3))
    return SegmentMeasurement(
        segment=segment,
        presence=Presence.PRESENT,
        volume_cm3=math.fsum(tally.cm3),
        mean_hu=tally.value_sum / tally.voxels if hounsfield else None,
        note=_CUT if cut else "",
    )
