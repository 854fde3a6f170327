"""Connected pieces and holes of a mask, without scipy: by joining runs along the rows until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Pieces", "holes", "pieces"]

_SLAB = 1 << 20  # voxels looked at at once
_CHUNK = 1 << 14  # runs joined at once: what fits a cache


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Runs:
    """Voxels of one label side by side along the rows, as cells from `starts` to before `stops`, ascending.

    Cells are voxels with an empty column after the last and an empty row after the last of each plane, so that no run
    goes on in another row and what lies beyond an edge is empty.
    """

    shape: tuple[int, int, int]
    starts: npt.NDArray[Any]  # int32 where that counts all cells
    stops: npt.NDArray[Any]
    labels: npt.NDArray[np.uint8]

    @property
    def row(self) -> int:
        """How many cells one row further is."""
        return self.shape[2] + 1

    @property
    def plane(self) -> int:
        """How many cells one plane further is."""
        return (self.shape[1] + 1) * (self.shape[2] + 1)


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a label map, in the order of their first voxels: of each its label and how many voxels it has."""

    labels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    _runs: _Runs
    _piece: npt.NDArray[Any]  # of each run

    def largest(self) -> npt.NDArray[np.bool_]:
        """For each piece, whether it is the largest of its label; of equally large ones it is the last."""
        most = np.zeros(256, np.int64)
        np.maximum.at(most, self.labels, self.sizes)
        tied = np.flatnonzero(self.sizes == most[self.labels])
        last = np.full(256, -1, np.intp)
        np.maximum.at(last, self.labels[tied], tied)
        found: npt.NDArray[np.bool_] = np.arange(self.sizes.size) == last[self.labels]
        return found

    def mask(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Of the map's shape: where the pieces lie for which `chosen` is True."""
        runs = self._runs
        depth, rows, columns = runs.shape
        edges = np.zeros(depth * runs.plane, np.int8)
        taken = chosen[self._piece]
        edges[runs.starts[taken]] += 1  # one run may start where another stops, but no two start there
        edges[runs.stops[taken]] -= 1
        np.cumsum(edges, dtype=np.int8, out=edges)
        return edges.view(np.bool_).reshape(depth, rows + 1, columns + 1)[:, :rows, :columns]


def pieces(
    labels: npt.NDArray[np.uint8],
    wanted: Collection[int],
    connectivity: int = 1,
    pulse: Callable[[], None] = _nothing,
) -> Pieces:
    """The connected pieces of those labels (plane, row, column) that are `wanted`, none of which is 0.

    Voxels of one label are connected where they share a face (`connectivity` 1: 6 neighbours), also an edge (2: 18) or
    also a corner (3: 26). One pass for all labels; `pulse` is called at least for each million voxels or runs.
    """
    table = np.zeros(256, np.uint8)
    table[list(wanted)] = list(wanted)
    depth, rows, columns = labels.shape
    step = max(1, _SLAB // max(rows * columns, 1))

    def slabs() -> Iterator[npt.NDArray[np.uint8]]:
        for k in range(0, depth, step):
            pulse()
            yield table[labels[k : k + step]]

    runs = _found((depth, rows, columns), slabs())
    first, piece = _joined(runs, connectivity, pulse)
    sizes = np.bincount(piece, weights=runs.stops - runs.starts, minlength=first.size).astype(np.int64)
    return Pieces(runs.labels[first], sizes, runs, piece)


def holes(shape: tuple[int, int, int], planes: Iterable[npt.NDArray[np.bool_]]) -> npt.NDArray[np.intp]:
    """The flat indices, ascending, of what no path along empty voxels reaches from the border of a mask of `shape`.

    `planes`: its slices in turn, True where it is empty. A path goes through faces. Memory is a dozen bytes for each
    run along the rows.
    """
    depth, rows, columns = shape
    runs = _found(shape, (plane[None].view(np.uint8) for plane in planes))
    first, piece = _joined(runs, 1, _nothing)
    line, column = np.divmod(runs.starts, runs.row)
    place, row = np.divmod(line, rows + 1)
    outside = (place == 0) | (place == depth - 1) | (row == 0) | (row == rows - 1)
    outside |= (column == 0) | (runs.stops - runs.starts + column == columns)
    reached = np.zeros(first.size, np.bool_)
    reached[piece[outside]] = True
    chosen = ~reached[piece]
    lengths = (runs.stops - runs.starts)[chosen]
    starts = ((place.astype(np.intp) * rows + row) * columns + column)[chosen]
    found: npt.NDArray[np.intp] = np.repeat(starts, lengths) + _counted(lengths)
    return found


def _found(shape: tuple[int, int, int], slabs: Iterable[npt.NDArray[np.uint8]]) -> _Runs:
    """The runs of a map of `shape` that is given some planes at a time; 0 is empty."""
    depth, rows, columns = shape
    plane = (rows + 1) * (columns + 1)
    index = np.int32 if (depth + 2) * plane < 2**31 else np.int64
    starts, stops, labels = [np.zeros(0, index)], [np.zeros(0, index)], [np.zeros(0, np.uint8)]
    k, flat = 0, np.zeros(1, np.uint8)
    for slab in slabs:
        if flat.size != 1 + len(slab) * plane:
            flat = np.zeros(1 + len(slab) * plane, np.uint8)  # the first is before the first cell
        flat[1:].reshape(len(slab), rows + 1, columns + 1)[:, :rows, :columns] = slab
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        values = flat[1:][changes[:-1]]  # at the last change the last run ends
        full = values != 0
        starts.append((changes[:-1][full] + k * plane).astype(index))
        stops.append((changes[1:][full] + k * plane).astype(index))
        labels.append(values[full])
        k += len(slab)
    return _Runs(shape, np.concatenate(starts), np.concatenate(stops), np.concatenate(labels))


def _joined(
    runs: _Runs, connectivity: int, pulse: Callable[[], None]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The first run of each piece, ascending, and of each run the number of its piece."""
    count = runs.starts.size
    parent = np.arange(count, dtype=runs.starts.dtype)  # the smaller one is the parent: the smallest is the root
    for start in range(0, count, _CHUNK):
        pulse()
        for away, reach in _directions(runs, connectivity):
            _join(parent, *_touching(runs, start, min(start + _CHUNK, count), away, reach))
    while not np.array_equal(further := parent[parent], parent):
        parent = further
    root = parent == np.arange(count, dtype=parent.dtype)
    number = np.cumsum(root, dtype=parent.dtype) - 1
    return np.flatnonzero(root), number[parent]


def _directions(runs: _Runs, connectivity: int) -> list[tuple[int, int]]:
    """How many cells away the rows lie whose runs come after a run and touch it, and by how much it may miss them."""
    aside = 0 if connectivity == 1 else 1
    found = [(runs.row, aside), (runs.plane, aside)]
    if connectivity > 1:
        found += [(runs.plane - runs.row, connectivity - 2), (runs.plane + runs.row, connectivity - 2)]
    return found


def _touching(
    runs: _Runs, start: int, stop: int, away: int, reach: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Pairs of runs of one label: one from `start` to before `stop`, and those over it `away` cells further."""
    low, high = runs.starts[start:stop] + (away - reach), runs.stops[start:stop] + (away + reach)
    end = start + int(np.searchsorted(runs.starts[start:], high[-1], side="left"))
    first = np.searchsorted(runs.stops[start:end], low, side="right")
    count = np.maximum(np.searchsorted(runs.starts[start:end], high, side="left") - first, 0)
    one = np.repeat(np.arange(start, stop), count)
    other = np.repeat(first + start, count) + _counted(count)
    same = runs.labels[one] == runs.labels[other]
    return one[same], other[same]


def _counted(lengths: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """0, 1, 2 and so on for each of `lengths`, one after the other."""
    counted: npt.NDArray[np.intp] = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return counted


def _join(parent: npt.NDArray[Any], one: npt.NDArray[np.intp], other: npt.NDArray[np.intp]) -> None:
    """Make each pair one piece: hook the larger root under the smallest it touches, until no two roots touch."""
    a, b = _rooted(parent, one), _rooted(parent, other)
    while (apart := a != b).any():
        a, b = a[apart], b[apart]
        hooked = np.maximum(a, b)
        np.minimum.at(parent, hooked, np.minimum(a, b))
        # paths are halved again and again: what was hooked just now may make a chain as long as the pairs are many
        while not np.array_equal(further := parent[parent[hooked]], parent[hooked]):
            parent[hooked] = further
        a, b = parent[a], parent[b]


def _rooted(parent: npt.NDArray[Any], runs: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """The roots of `runs`, which hang right under them afterwards."""
    found = parent[runs]
    while not np.array_equal(further := parent[found], found):
        found = further
    parent[runs] = found
    return found
