"""Between the grid of the images and the grid of the network, both ways, one axis at a time.

The network's grid has the source's own axes (permuted and turned to the orientation the network wants) at another
spacing: MONAI's Orientation + Spacing semantics. Orientation comes first, so the sampling starts at the first voxel
*of the turned axis*; n = round((s - 1) * a / b + 1) samples, half to even; beyond the ends the border value holds.
That is separable, for oblique stacks too, and flips are index maps, never copies.

The way back interpolates class probabilities trilinearly and takes the largest: streamed slice by slice, evaluated
only where it can matter (a cell whose corners agree cannot change by interpolation), so memory stays at one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicom_node.geometry import VolumeGeometry

__all__ = ["LabelPlane", "ModelGrid", "first_largest", "label_planes", "resample"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float64]
_Lines = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]  # lower neighbour, upper neighbour, its weight

# unit vectors in LPS
_DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
# From here on two dense products over the whole slice are cheaper than gathering single pixels.
_DENSE_SHARE = 0.25
_DENSE_VALUES = 4 * 1024**2  # at a time


@dataclass(frozen=True, slots=True)
class ModelGrid:
    """How the network's grid lies on the source grid. Per source axis (slice, row, column) unless said otherwise.

    `axes[m]` is the source axis that is the network's axis m; `flipped` says that the network runs against it.
    """

    source_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    source_spacing_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]
    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

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
        return cls(
            source_shape=geometry.shape,
            shape=cls.shape_of(geometry.shape, geometry.spacing_mm, (target[0], target[1], target[2])),
            source_spacing_mm=geometry.spacing_mm,
            spacing_mm=(target[0], target[1], target[2]),
            axes=(axes[0], axes[1], axes[2]),
            flipped=(flipped[0], flipped[1], flipped[2]),
        )

    @staticmethod
    def shape_of(
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        wanted_mm: tuple[float, float, float],
    ) -> tuple[int, int, int]:
        """How many samples `wanted_mm` apart lie on a grid of `shape`, per axis."""
        x, y, z = (max(1, round((n - 1) * a / b + 1)) for n, a, b in zip(shape, spacing_mm, wanted_mm, strict=True))
        return x, y, z

    def source_positions(self, axis: int) -> Vector:
        """For each sample of the network's grid along source axis `axis`: its source index, fractional."""
        last = self.source_shape[axis] - 1
        along = np.minimum(np.arange(self.shape[axis]) * (self.spacing_mm[axis] / self.source_spacing_mm[axis]), last)
        positions: Vector = last - along if self.flipped[axis] else along
        return positions

    def model_positions(self, axis: int) -> Vector:
        """For each source index along `axis`: its index on the network's grid, fractional, within the grid."""
        count = self.source_shape[axis]
        along = np.arange(count)[::-1] if self.flipped[axis] else np.arange(count)
        ratio = self.source_spacing_mm[axis] / self.spacing_mm[axis]
        positions: Vector = np.minimum(along * ratio, self.shape[axis] - 1)
        return positions

    def to_model_order(self, volume: Floats) -> Floats:
        """A view of an array in source axis order (last three axes) in the network's axis order."""
        lead = volume.ndim - 3
        return volume.transpose(*range(lead), *(lead + axis for axis in self.axes))

    def to_source_order(self, volume: Floats) -> Floats:
        """The inverse of `to_model_order`."""
        lead = volume.ndim - 3
        return volume.transpose(*range(lead), *(lead + int(axis) for axis in np.argsort(self.axes)))


def _neighbours(positions: Vector, count: int) -> _Lines:
    """For linear interpolation at `positions` among `count` samples."""
    lower = np.clip(np.floor(positions).astype(np.intp), 0, max(count - 2, 0))
    return lower, np.minimum(lower + 1, count - 1), (positions - lower).astype(np.float32)


def resample(
    volume: npt.NDArray[np.int16] | Floats, grid: ModelGrid, heartbeat: Callable[[], None] | None = None
) -> Floats:
    """`volume` (slice, row, column) linearly sampled on the network's grid: float32, source axis *order*,
    each axis running as the network wants it. `ModelGrid.to_model_order` gives the network's view of it.
    """
    out = np.empty(grid.shape, np.float32)
    lower, upper, weight = _neighbours(grid.source_positions(0), grid.source_shape[0])
    rows = _neighbours(grid.source_positions(1), grid.source_shape[1])
    columns = _neighbours(grid.source_positions(2), grid.source_shape[2])
    kept: dict[int, Floats] = {}

    def plane(k: int) -> Floats:
        if k not in kept:
            kept[k] = _in_plane(volume[k], rows, columns)
        return kept[k]

    for target, a, b, w in zip(out, lower, upper, weight, strict=True):
        for k in [k for k in kept if k not in (a, b)]:
            del kept[k]
        first, second = plane(int(a)), plane(int(b))
        np.subtract(second, first, out=target)
        target *= w
        target += first
        if heartbeat is not None:
            heartbeat()
    return out


def _in_plane(image: npt.NDArray[np.int16] | Floats, rows: _Lines, columns: _Lines) -> Floats:
    low, high, weight = rows
    upper = image[high].astype(np.float32)
    lower = image[low].astype(np.float32)
    lines = lower + (upper - lower) * weight[:, None]
    low, high, weight = columns
    left = lines[:, low]
    result: Floats = left + (lines[:, high] - left) * weight
    return result


@dataclass(frozen=True, slots=True)
class LabelPlane:
    """The labels of one source slice inside a box; outside of it there is only class 0."""

    slice_index: int
    rows: slice
    columns: slice
    labels: Labels


def label_planes(probability: Floats, grid: ModelGrid) -> Iterator[LabelPlane | None]:
    """For every source slice in turn its labels, None where all of it is class 0.

    `probability` is (class, *grid.shape) in source axis order, on the network's grid as `resample` lays it. A label
    is the class whose trilinearly interpolated probability is largest, the lower class where two are equal.
    """
    if len(probability) == 2:  # the difference of two interpolations is the interpolation of the difference
        probability = np.subtract(probability[1], probability[0], order="C")[None]
    coarse = first_largest(probability)
    lower, upper, weight = _neighbours(grid.model_positions(0), grid.shape[0])
    rows = _neighbours(grid.model_positions(1), grid.shape[1])
    columns = _neighbours(grid.model_positions(2), grid.shape[2])
    for k, (a, b, w) in enumerate(zip(lower, upper, weight, strict=True)):
        seen = (coarse[a] != 0) | (coarse[b] != 0)
        if not seen.any():
            yield None
            continue
        # every voxel outside the box lies between corners that are all class 0, and so is class 0
        r, c = _touching(rows, seen.any(axis=1)), _touching(columns, seen.any(axis=0))
        here, there = _cut(rows, r), _cut(columns, c)
        box = (slice(None), _span(here), _span(there))
        first = probability[:, a][box]
        values = first + (probability[:, b][box] - first) * w
        yield LabelPlane(k, r, c, _plane_labels(values, _from_zero(here), _from_zero(there)))


def first_largest(values: Floats) -> Labels:
    """argmax over the first axis (numpy's own is several times slower for few classes)."""
    if len(values) == 1:  # the lead of class 1 over class 0
        return np.asarray(values[0] > 0).view(np.uint8)
    if len(values) == 2:
        return np.asarray(values[1] > values[0]).view(np.uint8)
    best = values[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for number in range(1, len(values)):
        np.copyto(labels, number, where=values[number] > best)
        np.maximum(best, values[number], out=best)
    return labels


def _touching(lines: _Lines, seen: npt.NDArray[np.bool_]) -> slice:
    """The source indices between whose neighbours lies one that is `seen`."""
    inside = np.flatnonzero(seen)
    touching = np.flatnonzero((lines[1] >= inside[0]) & (lines[0] <= inside[-1]))
    return slice(int(touching[0]), int(touching[-1]) + 1)


def _cut(lines: _Lines, chosen: slice) -> _Lines:
    return lines[0][chosen], lines[1][chosen], lines[2][chosen]


def _span(lines: _Lines) -> slice:
    return slice(int(lines[0].min()), int(lines[1].max()) + 1)


def _from_zero(lines: _Lines) -> _Lines:
    start = lines[0].min()
    return lines[0] - start, lines[1] - start, lines[2]


def _plane_labels(values: Floats, rows: _Lines, columns: _Lines) -> Labels:
    """(rows, columns) labels of `values` (class, grid rows, grid columns), bilinearly."""
    coarse = first_largest(values)
    padded = np.pad(coarse, ((0, 1), (0, 1)), mode="edge")
    corner = padded[:-1, :-1]
    mixed = (padded[1:, :-1] != corner) | (padded[:-1, 1:] != corner) | (padded[1:, 1:] != corner)
    where = np.flatnonzero(mixed.take(rows[0], axis=0).take(columns[0], axis=1))
    if where.size > _DENSE_SHARE * len(rows[0]) * len(columns[0]):
        return _labels_everywhere(values, rows, columns)
    # take, not indexing: its result is contiguous, so that `reshape` below is a view
    labels: Labels = coarse.take(rows[0], axis=0).take(columns[0], axis=1)
    if where.size:
        labels.reshape(-1)[where] = _labels_at(values, rows, columns, where)
    return labels


def _labels_everywhere(values: Floats, rows: _Lines, columns: _Lines) -> Labels:
    """Labels of all pixels by dense products, some rows at a time."""
    left, right = _matrix(rows, values.shape[1]), _matrix(columns, values.shape[2]).T
    step = max(1, _DENSE_VALUES // (len(values) * len(columns[0])))
    parts = []
    for start in range(0, len(left), step):
        product = left[start : start + step] @ values @ right
        parts.append(first_largest(product.astype(np.float32, copy=False)))
    return np.concatenate(parts)


def _labels_at(values: Floats, rows: _Lines, columns: _Lines, where: npt.NDArray[np.intp]) -> Labels:
    """Labels of single pixels, given by their flat index."""
    row, column = np.divmod(where, len(columns[0]))
    flat = values.reshape(len(values), -1)
    top, bottom = rows[0][row] * values.shape[2], rows[1][row] * values.shape[2]
    left, right = columns[0][column], columns[1][column]
    across, down = columns[2][column], rows[2][row]
    upper = flat.take(top + left, axis=1)
    upper += (flat.take(top + right, axis=1) - upper) * across
    lower = flat.take(bottom + left, axis=1)
    lower += (flat.take(bottom + right, axis=1) - lower) * across
    upper += (lower - upper) * down
    return first_largest(upper)


def _matrix(lines: _Lines, count: int) -> Floats:
    """The interpolation as a matrix, (source, grid)."""
    low, high, weight = lines
    matrix = np.zeros((len(low), count), np.float32)
    index = np.arange(len(low))
    np.add.at(matrix, (index, low), 1 - weight)
    np.add.at(matrix, (index, high), weight)
    return matrix
