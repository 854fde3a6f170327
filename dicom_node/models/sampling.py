"""Between the grid of the images and the grid of the network, both ways, one axis at a time. The same code for CPU
and GPU. Runs inside the runtime process (imports torch).

On the way in, slices are uploaded as they are stored (int16) and interpolated linearly, some at a time. The way back
interpolates class probabilities trilinearly and takes the largest: streamed slice by slice, evaluated only where it
can matter (a cell whose corners agree cannot change by interpolation), so memory stays at one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicom_node.models.grid import ModelGrid, Vector

__all__ = ["first_largest", "labels_on_source", "sample"]

# From here on two dense products over the whole slice are cheaper than gathering single pixels.
_DENSE_SHARE = 0.25
_DENSE_VALUES = 4 * 1024**2  # at a time
_SLICES = {"cpu": 1, "cuda": 64}  # of the network's grid at a time: what fits a cache, what fills a GPU


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Lines:
    """Linear interpolation along one axis: the two neighbours of each sample and the weight of the upper one."""

    lower: Tensor
    upper: Tensor
    weight: Tensor
    between: bool = True  # False: every sample is one of the neighbours, the lower one

    @classmethod
    def at(cls, positions: Vector, count: int, device: torch.device) -> _Lines:
        """At `positions` among `count` samples."""
        lower = np.clip(np.floor(positions).astype(np.int64), 0, max(count - 2, 0))
        upper = np.minimum(lower + 1, count - 1)
        weight = np.clip(positions - lower, 0, 1).astype(np.float32)
        below, above, share = (torch.from_numpy(values).to(device) for values in (lower, upper, weight))
        return cls(below, above, share, between=bool(weight.any()))

    def cut(self, chosen: slice) -> _Lines:
        """Some of the samples."""
        return _Lines(self.lower[chosen], self.upper[chosen], self.weight[chosen])

    def span(self) -> slice:
        """Everything between the first and the last neighbour."""
        return slice(int(self.lower.min()), int(self.upper.max()) + 1)

    def from_zero(self) -> _Lines:
        """Counted from the first neighbour."""
        start = self.lower.min()
        return _Lines(self.lower - start, self.upper - start, self.weight)

    def __len__(self) -> int:
        return len(self.lower)


# --- to the network's grid --------------------------------------------------------------------------------------------


_Slices = Callable[[list[int]], Tensor]


def sample(
    volume: Tensor,
    grid: ModelGrid,
    device: torch.device,
    outside: float,
    pulse: Callable[[], None] = _nothing,
    slices: _Slices | None = None,
) -> Tensor:
    """`volume` (slice, row, column; int16 or float32) on the network's grid: float32 on `device`, source axis *order*,
    each axis running as the network wants it. `outside` fills what shifted slices leave open in their frame.

    `slices`: what to take for the slices of these indices, in ascending order, on `device`; else they are uploaded as
    they are stored.
    """
    out = torch.empty(grid.shape, dtype=torch.float32, device=device)
    along = _Lines.at(grid.source_positions(0), len(volume), device)
    below, above = along.lower.tolist(), along.upper.tolist()
    step = _SLICES[device.type]
    slices = slices or _Stored(volume, device)
    planes = _Sheared(slices, grid, device, outside) if grid.shifts else _Upright(slices, grid, device)
    kept: dict[int, Tensor] = {}
    for start in range(0, len(out), step):
        chosen = slice(start, start + step)
        kept = _kept(kept, sorted({*below[chosen], *above[chosen]}), planes)
        lower, upper = (_stacked([kept[k] for k in neighbours[chosen]]) for neighbours in (below, above))
        torch.lerp(lower, upper, along.weight[chosen, None, None], out=out[chosen])
        pulse()
    return out


def _kept(kept: dict[int, Tensor], used: list[int], planes: Callable[[list[int]], Tensor]) -> dict[int, Tensor]:
    """The slices `used` within their planes on the network's grid; those of the last time need no work again."""
    new = [k for k in used if k not in kept]
    made = dict(zip(new, planes(new), strict=True)) if new else {}
    return {k: kept[k] if k in kept else made[k] for k in used}


def _stacked(planes: list[Tensor]) -> Tensor:
    return planes[0][None] if len(planes) == 1 else torch.stack(planes)


class _Stored:
    """Slices of the volume as they are stored, on the device."""

    def __init__(self, volume: Tensor, device: torch.device) -> None:
        self._volume, self._device = volume, device

    def __call__(self, used: list[int]) -> Tensor:
        first, last = used[0], used[-1]
        block = self._volume[first : last + 1] if last - first == len(used) - 1 else self._volume[used]
        return block.to(self._device)


class _Upright:
    """Slices of the volume, each on the network's grid within its plane; all lie alike."""

    def __init__(self, slices: _Slices, grid: ModelGrid, device: torch.device) -> None:
        self._slices = slices
        self._rows, self._columns = (
            _Lines.at(grid.source_positions(axis), grid.source_shape[axis], device) for axis in (1, 2)
        )

    def __call__(self, used: list[int]) -> Tensor:
        return _in_plane(self._slices(used), self._rows, self._columns)


class _Sheared:
    """The same where each slice is shifted in its own way."""

    def __init__(self, slices: _Slices, grid: ModelGrid, device: torch.device, outside: float) -> None:
        self._slices, self._grid, self._device, self._outside = slices, grid, device, outside

    def __call__(self, used: list[int]) -> Tensor:
        return torch.cat([self._one(k) for k in used])

    def _one(self, k: int) -> Tensor:
        grid, device = self._grid, self._device
        own = [grid.source_positions(axis) - grid.shifts[k][axis - 1] for axis in (1, 2)]
        sizes = grid.source_shape[1:]
        rows, columns = (_Lines.at(p, n, device) for p, n in zip(own, sizes, strict=True))
        plane = _in_plane(self._slices([k]), rows, columns)
        for axis, (p, n) in enumerate(zip(own, sizes, strict=True)):
            beyond = torch.from_numpy((p < -0.5) | (p > n - 0.5)).to(device)
            plane.index_fill_(axis + 1, beyond.nonzero()[:, 0], self._outside)
        return plane


def _in_plane(images: Tensor, rows: _Lines, columns: _Lines) -> Tensor:
    """`images` (slice, row, column), each interpolated at rows and columns."""
    lines = _taken(images, rows.lower, -2).float()
    if rows.between:
        lines.lerp_(_taken(images, rows.upper, -2).float(), rows.weight[:, None])
    found = _taken(lines, columns.lower)
    return found.lerp_(_taken(lines, columns.upper), columns.weight) if columns.between else found


def _taken(values: Tensor, index: Tensor, axis: int = -1) -> Tensor:
    """`values` at `index` of an axis."""
    if values.device.type == "cpu":  # torch's own is several times slower there; clip: numpy need not check each
        return torch.from_numpy(values.numpy().take(index.numpy(), axis=axis, mode="clip"))
    return values.index_select(axis, index)


# --- back to the source grid ------------------------------------------------------------------------------------------


def labels_on_source(
    scores: Callable[[int], Tensor],
    grid: ModelGrid,
    device: torch.device,
    *,
    inverse: str = "probability",
    inclusive: bool = False,
    pulse: Callable[[], None] = _nothing,
) -> npt.NDArray[np.uint8]:
    """Labels (slice, row, column) of the source from `scores`: plane k of the network's grid in source axis order, as
    (class, row, column), each asked for once.

    `inverse` probability: the class whose trilinearly interpolated score is largest, the lower class where two are
    equal. A single row of scores is the lead of class 1 over class 0: class 1 where it is above 0 (`inclusive`: or
    0). `inverse` labels: decided on the network's grid; each source voxel takes the label of its nearest sample.
    """
    if inverse == "labels":
        return _nearest(lambda k: first_largest(scores(k), inclusive).cpu().numpy(), grid)
    # numpy's zeros cost nothing until they are written to
    labels = torch.from_numpy(np.zeros(grid.source_shape, np.uint8)).to(device)
    for plane in _label_planes(scores, grid, device, inclusive):
        if plane is not None:
            labels[plane.slice_index, plane.rows, plane.columns] = plane.labels
        pulse()
    return labels.cpu().numpy()


@dataclass(frozen=True, slots=True)
class _LabelPlane:
    """The labels of one source slice inside a box; outside of it there is only class 0."""

    slice_index: int
    rows: slice
    columns: slice
    labels: Tensor


def _label_planes(
    scores: Callable[[int], Tensor], grid: ModelGrid, device: torch.device, inclusive: bool
) -> Iterator[_LabelPlane | None]:
    """For every source slice in turn its labels, None where all of it is class 0."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}  # scores and labels of the two planes around the slice
    along = grid.model_positions(0)
    at = np.clip(np.floor(along).astype(int), 0, max(grid.shape[0] - 2, 0))
    rows = _Lines.at(grid.model_positions(1), grid.shape[1], device)
    columns = _Lines.at(grid.model_positions(2), grid.shape[2], device)
    for k, a in enumerate(at.tolist()):
        b, w = min(a + 1, grid.shape[0] - 1), float(np.float32(along[k] - a))
        if grid.shifts:
            rows = _Lines.at(grid.model_positions(1, grid.shifts[k][0]), grid.shape[1], device)
            columns = _Lines.at(grid.model_positions(2, grid.shifts[k][1]), grid.shape[2], device)
        kept = {n: kept[n] if n in kept else _with_labels(scores(n), inclusive) for n in (a, b)}
        (here_scores, here_labels), (there_scores, there_labels) = kept[a], kept[b]
        seen = here_labels.logical_or(there_labels)
        seen_rows = seen.any(dim=1)
        if not seen_rows.any():
            yield None
            continue
        # every voxel outside the box lies between corners that are all class 0, and so is class 0
        r, c = _touching(rows, seen_rows), _touching(columns, seen.any(dim=0))
        if r is None or c is None:
            yield None
            continue
        here, there = rows.cut(r), columns.cut(c)
        box = (slice(None), here.span(), there.span())
        values = torch.lerp(here_scores[box], there_scores[box], w)
        yield _LabelPlane(k, r, c, _plane_labels(values, here.from_zero(), there.from_zero(), inclusive))


def _with_labels(scores: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    return scores, first_largest(scores, inclusive)


def first_largest(values: Tensor, inclusive: bool = False) -> Tensor:
    """argmax over the first axis as uint8; of a single row, whether it is above (`inclusive`: at least) 0."""
    if len(values) == 1:
        return (values[0] >= 0 if inclusive else values[0] > 0).view(torch.uint8)
    if values.device.type == "cpu":  # comparing and selecting are several times slower in torch there
        return torch.from_numpy(_first_largest(values.numpy()))
    best = values[0].clone()
    labels = torch.zeros(best.shape, dtype=torch.uint8, device=values.device)
    for number in range(1, len(values)):
        larger = (values[number] > best).view(torch.uint8)
        torch.maximum(labels, larger.mul_(number), out=labels)
        torch.maximum(best, values[number], out=best)
    return labels


def _first_largest(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    best = values[0].copy()
    labels, larger = np.zeros(best.shape, np.uint8), np.empty(best.shape, np.uint8)
    for number in range(1, len(values)):
        np.greater(values[number], best, out=larger.view(np.bool_))
        np.multiply(larger, np.uint8(number), out=larger)
        np.maximum(labels, larger, out=labels)
        np.maximum(best, values[number], out=best)
    return labels


def _touching(lines: _Lines, seen: Tensor) -> slice | None:
    """The source indices between whose neighbours lies one that is `seen`."""
    inside = seen.nonzero()[:, 0]
    touching = ((lines.upper >= inside[0]) & (lines.lower <= inside[-1])).nonzero()[:, 0]
    return slice(int(touching[0]), int(touching[-1]) + 1) if len(touching) else None


def _plane_labels(values: Tensor, rows: _Lines, columns: _Lines, inclusive: bool) -> Tensor:
    """(rows, columns) labels of `values` (class, grid rows, grid columns), bilinearly."""
    corner = first_largest(values, inclusive)
    below = torch.cat([corner[1:], corner[-1:]])
    mixed = below != corner
    for plane in (corner, below):
        mixed |= torch.cat([plane[:, 1:], plane[:, -1:]], dim=1) != corner
    spread = _taken(_taken(mixed, rows.lower, 0), columns.lower)
    where = spread.reshape(-1).nonzero()[:, 0]
    if len(where) > _DENSE_SHARE * spread.numel():
        return _labels_everywhere(values, rows, columns, inclusive)
    labels = _taken(_taken(corner, rows.lower, 0), columns.lower)
    if len(where):
        labels.view(-1)[where] = _labels_at(values, rows, columns, where, inclusive)
    return labels


def _labels_everywhere(values: Tensor, rows: _Lines, columns: _Lines, inclusive: bool) -> Tensor:
    """Labels of all pixels by dense products, some rows at a time."""
    left, right = _matrix(rows, values.shape[1]), _matrix(columns, values.shape[2]).T
    step = max(1, _DENSE_VALUES // (len(values) * len(columns)))
    parts = [
        first_largest(left[start : start + step] @ values @ right, inclusive) for start in range(0, len(left), step)
    ]
    return torch.cat(parts)


def _labels_at(values: Tensor, rows: _Lines, columns: _Lines, where: Tensor, inclusive: bool) -> Tensor:
    """Labels of single pixels, given by their flat index."""
    row = torch.div(where, len(columns), rounding_mode="floor")
    column = where - row * len(columns)
    flat = values.reshape(len(values), -1)
    top, bottom = rows.lower[row] * values.shape[2], rows.upper[row] * values.shape[2]
    left, right, across = columns.lower[column], columns.upper[column], columns.weight[column]
    upper = _taken(flat, top + left).lerp_(_taken(flat, top + right), across)
    lower = _taken(flat, bottom + left).lerp_(_taken(flat, bottom + right), across)
    return first_largest(upper.lerp_(lower, rows.weight[row]), inclusive)


def _matrix(lines: _Lines, count: int) -> Tensor:
    """The interpolation as a matrix, (source, grid)."""
    matrix = torch.zeros((len(lines), count), device=lines.lower.device)
    index = torch.arange(len(lines), device=lines.lower.device)
    matrix.index_put_((index, lines.lower), 1 - lines.weight, accumulate=True)
    matrix.index_put_((index, lines.upper), lines.weight, accumulate=True)
    return matrix


def _nearest(coarse: Callable[[int], npt.NDArray[np.uint8]], grid: ModelGrid) -> npt.NDArray[np.uint8]:
    """The labels `coarse` of each plane at each source voxel's nearest sample, halves to the even one."""
    first = np.rint(grid.model_positions(0)).astype(np.intp)
    rows, columns = (np.rint(grid.model_positions(axis)).astype(np.intp) for axis in (1, 2))
    labels = np.empty(grid.source_shape, np.uint8)
    last, here = -1, np.empty(0, np.uint8)
    for k, a in enumerate(first.tolist()):
        if a != last:
            last, here = a, coarse(a)
        if grid.shifts:
            rows, columns = (
                np.rint(grid.model_positions(axis, grid.shifts[k][axis - 1])).astype(np.intp) for axis in (1, 2)
            )
        labels[k] = here.take(rows, axis=0).take(columns, axis=1)
    return labels
