"""The box around extreme points, on the grid of a DExtr3D model: what the vendor's clients send of a volume.

The box is the points' own with a margin, the grid mostly 128 x 128 x 128. The first voxel of the new grid is the first
of the box; voxel n of it lies n times the ratio of the sides further. The answer comes back on this grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.engines._aiaa_options import Voxel
from dicom_node.geometry import VolumeGeometry

__all__ = ["Box", "boxed"]

Voxels = npt.NDArray[np.int16] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """`voxels` (slice, row, column) lie where `geometry` says; it names no images. `points` are voxels of it."""

    voxels: Voxels
    geometry: VolumeGeometry
    points: tuple[Voxel, ...]


def boxed(
    voxels: Voxels,
    geometry: VolumeGeometry,
    points: Sequence[Voxel],
    *,
    margin_mm: float,
    sides: tuple[int, int, int],
    beat: Callable[[], None],
) -> Box:
    """The box around `points` with `margin_mm` on each side, as far as there are images, interpolated linearly.

    `sides`: of the new grid, (column, row, slice).
    """
    at = np.array(points)[:, ::-1]  # (slice, row, column)
    margin = np.floor(margin_mm / np.array(geometry.spacing_mm)).astype(int)
    low = np.maximum(at.min(axis=0) - margin, 0)
    high = np.minimum(at.max(axis=0) + margin, np.array(geometry.shape) - 1) + 1
    shape = (sides[2], sides[1], sides[0])
    part: npt.NDArray[Any] = voxels[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
    steps = np.array(part.shape) / np.array(shape)
    for axis in (0, 1, 2):
        part = _along(part, axis, shape[axis])
        beat()
    inside: Voxels = np.rint(part).astype(np.int16) if voxels.dtype == np.int16 else part.astype(np.float32)
    onto = np.diag((*steps, 1.0))
    onto[:3, 3] = low
    spacing = [float(mm) for mm in np.array(geometry.spacing_mm) * steps]
    moved = np.minimum(np.rint((at - low) / steps), np.array(shape) - 1).astype(int)
    return Box(
        voxels=inside,
        geometry=replace(
            geometry,
            sop_instance_uids=("",) * shape[0],
            frame_numbers=(),
            affine=geometry.affine @ onto,
            spacing_mm=(spacing[0], spacing[1], spacing[2]),
            shape=shape,
        ),
        points=tuple((int(x), int(y), int(z)) for z, y, x in moved),
    )


def _along(values: npt.NDArray[Any], axis: int, count: int) -> npt.NDArray[np.float32]:
    """`count` samples along one axis; beyond the last voxel it is repeated."""
    last = values.shape[axis] - 1
    at = np.minimum(np.arange(count) * (values.shape[axis] / count), last)
    below = np.floor(at).astype(int)
    weight = (at - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    lower = np.take(values, below, axis=axis).astype(np.float32)
    upper = np.take(values, np.minimum(below + 1, last), axis=axis).astype(np.float32)
    mixed: npt.NDArray[np.float32] = lower + weight * (upper - lower)
    return mixed
