"""Windows over a volume that is sent to a server piece by piece, and what it says of them put together again.

The lattice and the weights are MONAI's. Windows go slice group by slice group; a plane is given away as soon as no
window to come touches it, so that only as many planes of scores are held as a window is deep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Lattice", "blended", "chosen"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]

_SIGMA_SHARE = 0.125  # of the window, as in MONAI's sliding_window_inference
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Windows of `window` voxels over a volume of `shape`; all per axis of the volume.

    A volume smaller than the window lies in the middle of it: `padded` is what holds both, `before` where it starts.
    """

    shape: Shape
    window: Shape
    overlap: float = 0.0
    blend: Literal["gaussian", "constant"] = "constant"

    @property
    def before(self) -> Shape:
        """Voxels that are filled up before the volume's first."""
        d, h, w = (max(0, (w - n) // 2) for n, w in zip(self.shape, self.window, strict=True))
        return d, h, w

    @property
    def padded(self) -> Shape:
        """The volume and what it is filled up with."""
        d, h, w = (max(n, w) for n, w in zip(self.shape, self.window, strict=True))
        return d, h, w

    @property
    def starts(self) -> tuple[list[int], list[int], list[int]]:
        """First voxels of the windows along each axis, as MONAI's dense_patch_slices."""
        sizes = zip(self.padded, self.window, strict=True)
        d, h, w = (_starts(length, window, self.overlap) for length, window in sizes)
        return d, h, w

    @property
    def count(self) -> int:
        """How many windows there are."""
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    def weight(self) -> Floats:
        """Of each voxel of a window."""
        weight = np.ones((1, 1, 1), np.float32)
        if self.blend == "constant" or self.count == 1:
            return np.broadcast_to(weight, self.window)
        for axis, size in enumerate(self.window):
            at = np.arange(size, dtype=np.float32) - (size - 1) / 2
            shape = [1, 1, 1]
            shape[axis] = size
            weight = weight * np.exp(-(at**2) / (2 * (_SIGMA_SHARE * size) ** 2)).reshape(shape).astype(np.float32)
        return np.maximum(weight, max(float(weight.min()), _LEAST_WEIGHT))


def _starts(length: int, window: int, overlap: float) -> list[int]:
    step = max(1, int(window * (1 - overlap)))
    count = 1 + max(0, -(-(length - window) // step))
    return [min(k * step, length - window) for k in range(count)]


Ask = Callable[[Floats], npt.NDArray[Any]]
"""(window, *window voxels) to (window, class, *window voxels), all in the axis order of the volume."""


def blended(ask: Ask, volume: Floats, lattice: Lattice, *, batch: int, beyond: float) -> Iterator[Floats]:
    """The weighted mean of what all windows say, plane by plane along the first axis: (class, row, column).

    `batch` windows are asked about at a time; `beyond` fills up what the volume lacks. Raises what `ask` raises.
    """
    return _planes(ask, volume, lattice, batch, beyond, _Sums(lattice.padded[1:]))


def chosen(ask: Ask, volume: Floats, lattice: Lattice, *, batch: int, beyond: float) -> Iterator[Labels]:
    """As `blended`, of windows that say labels, (window, 1, ...): each voxel has that of the window in whose middle it
    lies most, as (row, column)."""
    return _planes(ask, volume, lattice, batch, beyond, _Nearest(lattice.padded[1:]))


class _Held(Protocol):
    """Planes that are being put together."""

    def add(self, z: int, place: tuple[slice, slice], said: npt.NDArray[Any], weight: Floats) -> None: ...

    def pop(self, z: int) -> npt.NDArray[Any]: ...


class _Sums:
    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._held: dict[int, tuple[Floats, Floats]] = {}

    def add(self, z: int, place: tuple[slice, slice], said: Floats, weight: Floats) -> None:
        if z not in self._held:
            self._held[z] = np.zeros((len(said), *self._size), np.float32), np.zeros(self._size, np.float32)
        sums, weights = self._held[z]
        sums[(slice(None), *place)] += said * weight
        weights[place] += weight

    def pop(self, z: int) -> Floats:
        sums, weights = self._held.pop(z)
        sums /= weights
        return sums


class _Nearest:
    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._held: dict[int, tuple[Labels, Floats]] = {}

    def add(self, z: int, place: tuple[slice, slice], said: Labels, weight: Floats) -> None:
        if z not in self._held:
            self._held[z] = np.zeros(self._size, np.uint8), np.zeros(self._size, np.float32)
        labels, weights = self._held[z]
        better = weight > weights[place]
        labels[place][better] = said[0][better]
        weights[place][better] = weight[better]

    def pop(self, z: int) -> Labels:
        return self._held.pop(z)[0]


def _planes(
    ask: Ask, volume: Floats, lattice: Lattice, batch: int, beyond: float, held: _Held
) -> Iterator[npt.NDArray[Any]]:
    padded = _padded(volume, lattice, beyond)
    depth, height, width = lattice.window
    starts, weight = lattice.starts, lattice.weight()
    places = [(slice(r, r + height), slice(c, c + width)) for r, c in itertools.product(*starts[1:])]
    front, top, left = lattice.before
    for start, following in itertools.zip_longest(starts[0], starts[0][1:], fillvalue=lattice.padded[0]):
        for first in range(0, len(places), batch):
            part = places[first : first + batch]
            answers = ask(np.stack([padded[(slice(start, start + depth), *place)] for place in part]))
            for place, said in zip(part, answers, strict=True):
                for z in range(depth):
                    held.add(start + z, place, said[:, z], weight[z])
        for z in range(start, following):  # no window to come touches these
            plane = held.pop(z)
            if front <= z < front + lattice.shape[0]:
                yield plane[..., top : top + lattice.shape[1], left : left + lattice.shape[2]]


def _padded(volume: Floats, lattice: Lattice, beyond: float) -> Floats:
    if lattice.padded == lattice.shape:
        return volume
    padded = np.full(lattice.padded, beyond, np.float32)
    padded[tuple(slice(b, b + n) for b, n in zip(lattice.before, lattice.shape, strict=True))] = volume
    return padded
