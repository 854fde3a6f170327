"""How the grid of the network lies on the grid of the images. Pure numbers; must not import torch.

The network's grid has the source's own axes (permuted and turned to the orientation the network wants) at another
spacing: MONAI's Orientation + Spacing semantics. Orientation comes first, so the sampling starts at the first voxel
*of the turned axis*; n = round(length / spacing + 1) samples, half to even; beyond the ends the border value holds.
That is separable, for oblique stacks too, and flips are index maps, never copies.

Slices that do not lie evenly are sampled at their true positions; slices that are shifted within their plane (gantry
tilt) lie on an upright frame that holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.geometry import VolumeGeometry

__all__ = ["ModelGrid"]

Vector = npt.NDArray[np.float64]

# unit vectors in LPS
_DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@dataclass(frozen=True, slots=True)
class ModelGrid:
    """How the network's grid lies on the source grid. Per source axis (slice, row, column) unless said otherwise.

    `axes[m]` is the source axis that is the network's axis m; `flipped` says that the network runs against it.
    `positions_mm`: where each slice lies along the normal, from the first; empty when they are evenly spaced.
    `shifts`: by how many rows and columns, >= 0, each slice lies further in its plane than the frame; empty: none.
    """

    source_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    source_spacing_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    positions_mm: tuple[float, ...] = ()
    shifts: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, geometry: VolumeGeometry, orientation: str, spacing_mm: tuple[float, float, float]) -> ModelGrid:
        """The grid for a network that wants `orientation` (e.g. RAS) and `spacing_mm`, both in its own axis order."""
        columns = geometry.affine[:3, :3] / np.asarray(geometry.spacing_mm)
        scores = np.array([_DIRECTIONS[letter] for letter in orientation], np.float64) @ columns
        axes, flipped, target = [0, 0, 0], [False] * 3, [0.0] * 3
        free = np.abs(scores)
        for _ in range(3):  # the strongest correspondence first
            m, s = np.unravel_index(int(np.argmax(free)), free.shape)
            axes[m], flipped[s], target[s] = int(s), bool(scores[m, s] < 0), spacing_mm[m]
            free[m, :] = free[:, s] = -1
        positions, shifts = _uneven(geometry)
        frame = _frame(geometry.shape, shifts)
        lengths = [(n - 1) * mm for n, mm in zip(frame, geometry.spacing_mm, strict=True)]
        if positions:
            lengths[0] = positions[-1]
        return cls(
            source_shape=geometry.shape,
            shape=_samples((lengths[0], lengths[1], lengths[2]), (target[0], target[1], target[2])),
            source_spacing_mm=geometry.spacing_mm,
            spacing_mm=(target[0], target[1], target[2]),
            axes=(axes[0], axes[1], axes[2]),
            flipped=(flipped[0], flipped[1], flipped[2]),
            positions_mm=positions,
            shifts=shifts,
        )

    @staticmethod
    def shape_of(
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        wanted_mm: tuple[float, float, float],
    ) -> tuple[int, int, int]:
        """How many samples `wanted_mm` apart lie on a grid of `shape`, per axis."""
        x, y, z = ((n - 1) * a for n, a in zip(shape, spacing_mm, strict=True))
        return _samples((x, y, z), wanted_mm)

    @classmethod
    def same(cls, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> ModelGrid:
        """A grid of `shape` that is its own source."""
        return cls(shape, shape, spacing_mm, spacing_mm, (0, 1, 2), (False, False, False))

    def cut(self, box: tuple[slice, slice, slice]) -> ModelGrid:
        """The grid over the source voxels of `box` alone, from the first of them on, as the network turns them.

        `self` where the box holds all. Shifted slices are cut each in its own plane.
        """
        shape = tuple(part.stop - part.start for part in box)
        if shape == self.source_shape:
            return self
        positions = self.positions_mm[box[0]]
        shifts = self.shifts[box[0]]
        least = tuple(min(along) for along in zip(*shifts, strict=True))
        cut = replace(
            self,
            source_shape=(shape[0], shape[1], shape[2]),
            positions_mm=tuple(round(mm - positions[0], 5) for mm in positions),
            shifts=tuple((round(r - least[0], 4), round(c - least[1], 4)) for r, c in shifts),
        )
        x, y, z = ((n - 1) * mm for n, mm in zip(cut.frame, self.source_spacing_mm, strict=True))
        return replace(cut, shape=_samples((cut.positions_mm[-1] if positions else x, y, z), self.spacing_mm))

    def to_message(self) -> dict[str, Any]:
        """As plain values; `from_message` makes the same grid of them."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> ModelGrid:
        """The inverse of `to_message`, after it has been JSON too."""
        plain = {key: tuple(value) for key, value in message.items()}
        return cls(**{**plain, "shifts": tuple((float(r), float(c)) for r, c in plain["shifts"])})

    @property
    def frame(self) -> tuple[int, int, int]:
        """The shape of the upright stack that holds every slice; `source_shape` where none is shifted."""
        return _frame(self.source_shape, self.shifts)

    def source_positions(self, axis: int) -> Vector:
        """For each sample of the network's grid along source axis `axis`: its index in the frame, fractional."""
        if axis == 0 and self.positions_mm:
            length = self.positions_mm[-1]
            mm = np.minimum(np.arange(self.shape[0]) * self.spacing_mm[0], length)
            mm = length - mm if self.flipped[0] else mm
            uneven: Vector = np.interp(mm, self.positions_mm, np.arange(len(self.positions_mm)))
            return uneven
        last = self.frame[axis] - 1
        along = np.minimum(np.arange(self.shape[axis]) * (self.spacing_mm[axis] / self.source_spacing_mm[axis]), last)
        positions: Vector = last - along if self.flipped[axis] else along
        return positions

    def model_positions(self, axis: int, shift: float = 0.0) -> Vector:
        """For each source index along `axis`: its index on the network's grid, fractional, within the grid.

        `shift` is that of the slice along this axis.
        """
        last = self.frame[axis] - 1
        if axis == 0 and self.positions_mm:
            along, ratio, end = np.asarray(self.positions_mm), 1 / self.spacing_mm[0], self.positions_mm[-1]
        else:
            along = np.arange(self.source_shape[axis]) + shift
            ratio, end = self.source_spacing_mm[axis] / self.spacing_mm[axis], last
        along = end - along if self.flipped[axis] else along
        positions: Vector = np.clip(along * ratio, 0, self.shape[axis] - 1)
        return positions

    def to_model_order(self, axes: tuple[int, int, int] = (0, 1, 2)) -> tuple[int, int, int]:
        """`axes` of an array in source axis order, put in the network's order: what `transpose` takes."""
        return axes[self.axes[0]], axes[self.axes[1]], axes[self.axes[2]]

    def to_source_order(self) -> tuple[int, int, int]:
        """The inverse of `to_model_order`."""
        first, second, third = (int(axis) for axis in np.argsort(self.axes))
        return first, second, third


def _samples(lengths_mm: tuple[float, float, float], spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    x, y, z = (max(1, round(length / mm + 1)) for length, mm in zip(lengths_mm, spacing_mm, strict=True))
    return x, y, z


def _uneven(geometry: VolumeGeometry) -> tuple[tuple[float, ...], tuple[tuple[float, float], ...]]:
    """Positions from the first slice and shifts from the least shifted one; both empty for a regular stack."""
    if geometry.regular:
        return (), ()
    positions = tuple(round(mm - geometry.positions_mm[0], 5) for mm in geometry.positions_mm)
    if not geometry.shifts_px:
        return positions, ()
    least = np.min(geometry.shifts_px, axis=0)
    return positions, tuple((round(r - least[0], 4), round(c - least[1], 4)) for r, c in geometry.shifts_px)


def _frame(shape: tuple[int, int, int], shifts: tuple[tuple[float, float], ...]) -> tuple[int, int, int]:
    if not shifts:
        return shape
    rows, columns = np.max(shifts, axis=0)
    return shape[0], shape[1] + math.ceil(rows), shape[2] + math.ceil(columns)
