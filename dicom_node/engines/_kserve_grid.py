"""How the grid of a model elsewhere lies on the grid of the images, there and back. Pure numbers.

The rules are those of our own models (MONAI's Orientation + Spacing): the model's grid has the images' own axes,
permuted and turned to the orientation it wants, at its spacing, from the first voxel *of the turned axis* on; n =
round(length / spacing + 1) samples, half to even, and beyond the ends the border value holds. That is separable for
oblique stacks too, so nothing is ever rotated: an affine is looked at once, to see which axis is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dicom_node.geometry import VolumeGeometry

__all__ = ["ModelGrid", "labels_by_score", "nearest_labels", "sampled"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float64]
Shape = tuple[int, int, int]
Plane = TypeVar("Plane")

# unit vectors in LPS
_TOWARDS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGrid:
    """Everything per source axis (slice, row, column), but for `axes`: source axis `axes[m]` is the model's axis m.

    `flipped`: the model runs against that source axis. The arrays here keep the *order* of the source axes and run as
    the model runs; `axes` puts them in its order.
    """

    source_shape: Shape
    shape: Shape
    source_spacing_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    axes: Shape
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: VolumeGeometry, orientation: str, spacing_mm: tuple[float, float, float]) -> ModelGrid:
        """The grid of a model that wants `orientation` and `spacing_mm`, both in its own axis order, on a regular
        stack."""
        directions = geometry.affine[:3, :3] / np.asarray(geometry.spacing_mm)
        scores = np.array([_TOWARDS[letter] for letter in orientation], np.float64) @ directions
        axes, flipped, target = [0] * 3, [False] * 3, [0.0] * 3
        free = np.abs(scores)
        for _ in range(3):  # the strongest correspondence first
            m, s = np.unravel_index(int(np.argmax(free)), free.shape)
            axes[m], flipped[s], target[s] = int(s), bool(scores[m, s] < 0), spacing_mm[m]
            free[m, :] = free[:, s] = -1
        sizes = zip(geometry.shape, geometry.spacing_mm, target, strict=True)
        shape = [max(1, round((n - 1) * source / wanted + 1)) for n, source, wanted in sizes]
        return cls(
            source_shape=geometry.shape,
            shape=(shape[0], shape[1], shape[2]),
            source_spacing_mm=geometry.spacing_mm,
            spacing_mm=(target[0], target[1], target[2]),
            axes=(axes[0], axes[1], axes[2]),
            flipped=(flipped[0], flipped[1], flipped[2]),
        )

    def in_source_order(self, sizes: Shape) -> Shape:
        """Something per model axis, per source axis."""
        ordered = [0, 0, 0]
        for m, s in enumerate(self.axes):
            ordered[s] = sizes[m]
        return ordered[0], ordered[1], ordered[2]

    def source_positions(self, axis: int) -> Vector:
        """Of each sample of the model's grid along a source axis: its index among the source's, fractional."""
        last = self.source_shape[axis] - 1
        step = self.spacing_mm[axis] / self.source_spacing_mm[axis]
        along = np.minimum(np.arange(self.shape[axis]) * step, last)
        return np.asarray(last - along if self.flipped[axis] else along, np.float64)

    def model_positions(self, axis: int) -> Vector:
        """Of each index of the source along an axis: its index on the model's grid, fractional, within the grid."""
        along = np.arange(self.source_shape[axis], dtype=np.float64)
        along = self.source_shape[axis] - 1 - along if self.flipped[axis] else along
        step = self.source_spacing_mm[axis] / self.spacing_mm[axis]
        return np.asarray(np.clip(along * step, 0, self.shape[axis] - 1), np.float64)


@dataclass(frozen=True, slots=True)
class _Lines:
    """Linear interpolation along one axis: the two neighbours of each sample and the weight of the upper one."""

    lower: npt.NDArray[np.intp]
    upper: npt.NDArray[np.intp]
    weight: Floats

    @classmethod
    def at(cls, positions: Vector, count: int) -> _Lines:
        lower = np.clip(np.floor(positions).astype(np.intp), 0, max(count - 2, 0))
        upper = np.minimum(lower + 1, count - 1)
        return cls(lower, upper, np.clip(positions - lower, 0, 1).astype(np.float32))

    def cut(self, chosen: slice) -> _Lines:
        """Some of the samples, neighbours counted from the first of theirs."""
        start = int(self.lower[chosen].min())
        return _Lines(self.lower[chosen] - start, self.upper[chosen] - start, self.weight[chosen])

    def span(self, chosen: slice) -> slice:
        """All neighbours of some of the samples."""
        return slice(int(self.lower[chosen].min()), int(self.upper[chosen].max()) + 1)

    def touching(self, seen: npt.NDArray[np.bool_]) -> slice | None:
        """The samples between whose neighbours lies one that is `seen`."""
        inside = np.flatnonzero(seen)
        hit = np.flatnonzero((self.upper >= inside[0]) & (self.lower <= inside[-1])) if inside.size else inside
        return slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else None


def _lerp(below: Floats, above: Floats, weight: Floats | np.float32) -> Floats:
    return np.asarray(below + (above - below) * weight, np.float32)


def _in_plane(planes: Floats, rows: _Lines, columns: _Lines) -> Floats:
    """`planes` (..., row, column), interpolated at rows and columns."""
    lines = _lerp(planes.take(rows.lower, -2), planes.take(rows.upper, -2), rows.weight[:, None])
    return _lerp(lines.take(columns.lower, -1), lines.take(columns.upper, -1), columns.weight)


# --- to the model's grid ---------------------------------------------------------------------------------------------


def sampled(volume: npt.NDArray[np.generic], grid: ModelGrid, heartbeat: Callable[[], None]) -> Floats:
    """`volume` (slice, row, column) on the model's grid, linearly: float32 of `grid.shape`."""
    out = np.empty(grid.shape, np.float32)
    along = _Lines.at(grid.source_positions(0), len(volume))
    rows, columns = (_Lines.at(grid.source_positions(axis), grid.source_shape[axis]) for axis in (1, 2))
    kept: dict[int, Floats] = {}
    for k, (a, b) in enumerate(zip(along.lower.tolist(), along.upper.tolist(), strict=True)):
        kept = {n: kept[n] if n in kept else _in_plane(volume[n].astype(np.float32), rows, columns) for n in (a, b)}
        out[k] = _lerp(kept[a], kept[b], along.weight[k])
        heartbeat()
    return out


# --- back to the grid of the images ----------------------------------------------------------------------------------


def _pairs(planes: Iterator[Plane], along: _Lines, *, flipped: bool) -> Iterator[tuple[int, Plane, Plane]]:
    """Each source slice with the two planes of the model's grid it lies between. `planes` come once, in their order,
    and no more than two are held: where the model runs against the slices, these are taken from the last on."""
    order = range(len(along.lower))
    held: dict[int, Plane] = {}
    last = -1
    for k in reversed(order) if flipped else order:
        a, b = int(along.lower[k]), int(along.upper[k])
        while last < b:
            last += 1
            held[last] = next(planes)
            held.pop(last - 2, None)
        yield k, held[a], held[b]


def labels_by_score(
    planes: Iterator[Floats],
    grid: ModelGrid,
    decide: Callable[[Floats], Labels],
    heartbeat: Callable[[], None],
) -> Labels:
    """Labels (slice, row, column) of the images: the scores interpolated trilinearly, then decided, pixel by pixel.

    `planes`: of the model's grid along the slices, (class, row, column), each once, in order. `decide` takes (class,
    row, column) scores; it must give 0 wherever it gives 0 for every corner the scores were interpolated from.
    """
    labels = np.zeros(grid.source_shape, np.uint8)
    along = _Lines.at(grid.model_positions(0), grid.shape[0])
    rows, columns = (_Lines.at(grid.model_positions(axis), grid.shape[axis]) for axis in (1, 2))
    scored = ((scores, decide(scores).astype(np.bool_)) for scores in planes)
    for k, (below, here), (above, there) in _pairs(scored, along, flipped=grid.flipped[0]):
        seen = here | there
        # every pixel outside of the box lies between corners that are all background, and so is background
        r, c = (lines.touching(np.asarray(seen.any(axis=1 - n))) for n, lines in enumerate((rows, columns)))
        if r is not None and c is not None:
            box = (slice(None), rows.span(r), columns.span(c))
            values = _lerp(below[box], above[box], along.weight[k])
            labels[k, r, c] = decide(_in_plane(values, rows.cut(r), columns.cut(c)))
        heartbeat()
    return labels


def nearest_labels(planes: Iterator[Labels], grid: ModelGrid, heartbeat: Callable[[], None]) -> Labels:
    """The label of each pixel's nearest voxel, halves to the even one. `planes`: (row, column), each once, in order."""
    labels = np.empty(grid.source_shape, np.uint8)
    nearest = [np.rint(grid.model_positions(axis)).astype(np.intp) for axis in range(3)]
    order = range(len(labels))
    last, plane = -1, np.empty((0, 0), np.uint8)
    for k in reversed(order) if grid.flipped[0] else order:
        while last < nearest[0][k]:
            last, plane = last + 1, next(planes)
        labels[k] = plane[np.ix_(nearest[1], nearest[2])]
        heartbeat()
    return labels
