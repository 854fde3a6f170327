"""Labels of an engine back onto the images they were made from.

Pure numbers. A grid is an affine and a shape; how one lies on another is the 4 x 4 that takes an index of the images
(slice, row, column) to an index of what was returned. Where that only renames, turns or shifts axes by whole voxels,
labels are put in place one by one; only another grid is looked up by the nearest voxel, and the result says so. What
cannot be right is refused: a mask in the wrong place looks as good as one in the right place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError
from dicom_node.geometry import VolumeGeometry

__all__ = ["GeometryMismatch", "labels_on_source"]

Labels = npt.NDArray[np.uint8]
Affine = npt.NDArray[np.float64]

_SAME_MM = 1e-3
# Positions that are written with few digits, or a quaternion of four bytes, miss by less than this; the nearest voxel
# is the right one as long as they miss by less than half of one.
_NEAR_VOXELS = 0.25
_VOXEL_MM = (0.005, 200.0)  # side of a voxel that anybody may mean
_MIN_SOLID = 0.1  # volume of a voxel over that of a box of its sides: less, and its axes nearly lie in one plane
_TIE = 1e-6  # of a voxel: half way between two, the lower one is taken, whatever the last digits say
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between LPS and RAS


class GeometryMismatch(EngineError):
    """What an engine returned cannot lie where it says, or not on the images it was sent; the message says why."""


def labels_on_source(
    labels: Labels,
    affine_lps: Affine,
    geometry: VolumeGeometry,
    *,
    heartbeat: Callable[[], None] | None = None,
) -> tuple[Labels, tuple[str, ...]]:
    """`labels` (i, j, k; uint8, 0 is nothing), which lie at `affine_lps`, for each pixel of the images of `geometry`.

    Returns (slice, row, column) uint8, C-contiguous, in the order of `geometry.sop_instance_uids`, and notes for
    people. The same grid within 0.001 mm at every corner of the images, however its axes are named and turned, or a
    part of it: voxel by voxel. So too one that is off by up to a quarter of a voxel; a note says by how much. Any other
    grid, and images that lie on none: each pixel takes the label of the voxel whose centre is nearest; a note says so.
    A note also says which images the answer does not reach, how much of it lies beside them, and where its axes run the
    other way than those of the images although these lie so that wrong signs of x and y would do just that.

    Raises GeometryMismatch: a place that is none (not finite, flat, voxels of no possible size, the identity that
    stands for "not known"), nothing in common with the images, every label beside them, or x and y with the wrong sign.
    """
    _require_possible(labels, affine_lps)
    onto = _inverse(affine_lps) @ geometry.affine
    turn = _turn_of(onto, affine_lps, geometry) if geometry.regular else None
    if turn is None or not turn.covers(labels.shape, geometry.shape):
        _require_own_place(labels, affine_lps, geometry)
    doubt = _doubt(labels, affine_lps, geometry)
    if turn is None:
        placed, notes = _nearest(labels, affine_lps, geometry, heartbeat or _nothing)
        return placed, (*notes, *doubt)
    placed, reached = _turned(labels, turn, geometry.shape)
    beside = int(np.count_nonzero(labels)) - int(np.count_nonzero(placed))
    notes = (*_distance(turn), *_reach(reached, geometry.shape), *_beside(beside, labels))
    return placed, (*notes, *doubt)


def _nothing() -> None:
    pass


def _inverse(affine: Affine) -> Affine:
    return np.asarray(np.linalg.inv(affine), np.float64)


# --- what is refused -------------------------------------------------------------------------------------------------


def _require_possible(labels: Labels, affine: Affine) -> None:
    if labels.ndim != 3 or 0 in labels.shape or labels.dtype != np.uint8:
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected uint8 in three dimensions")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise GeometryMismatch("the place of the answer is no affine of finite numbers")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.min() < _VOXEL_MM[0] or sides.max() > _VOXEL_MM[1]:
        raise GeometryMismatch(f"voxels of {_millimetres(sides)} mm are none: the place of the answer is not meant")
    if abs(np.linalg.det(affine[:3, :3] / sides)) < _MIN_SOLID:
        raise GeometryMismatch("the axes of the answer lie in one plane")


def _require_own_place(labels: Labels, affine: Affine, geometry: VolumeGeometry) -> None:
    """An answer that is not on all of the images must at least not look like one that lost its way."""
    if np.array_equal(affine, np.eye(4)) or np.array_equal(affine, _FLIP):
        raise GeometryMismatch("the answer does not say where it lies: its affine is the identity")
    fits = _same_box(labels, _FLIP @ affine, geometry) and not _same_box(labels, affine, geometry)
    if not fits and geometry.regular:
        mirrored = _turn_of(_inverse(_FLIP @ affine) @ geometry.affine, affine, geometry)
        fits = mirrored is not None and mirrored.covers(labels.shape, geometry.shape)
    if fits:
        raise GeometryMismatch("x and y of the answer have the wrong sign: left and right, front and back are swapped")


def _same_box(labels: Labels, affine: Affine, geometry: VolumeGeometry) -> bool:
    """Whether the box around all voxels is that of the images, to a voxel of either."""
    onto = _inverse(geometry.affine) @ affine
    faces = np.array([(*face, 1.0) for face in product(*((-0.5, n - 0.5) for n in labels.shape))])
    places = (faces @ onto.T)[:, :3]
    slack = np.maximum(np.abs(onto[:3, :3]).sum(axis=1), 1.0)
    low, high = places.min(axis=0) + 0.5, places.max(axis=0) + 0.5 - geometry.grid_shape
    return bool((np.abs(low) <= slack).all() and (np.abs(high) <= slack).all())


def _doubt(labels: Labels, affine: Affine, geometry: VolumeGeometry) -> tuple[str, ...]:
    """An engine that answers in the order it was sent, but with x and y in RAS, looks like one that turned its axes
    where the images lie evenly around x = 0, y = 0: nothing tells them apart, so people must."""
    if _runs_along(affine, geometry) or not _runs_along(_FLIP @ affine, geometry):
        return ()
    if not (_same_box(labels, affine, geometry) and _same_box(labels, _FLIP @ affine, geometry)):
        return ()
    return (
        "the answer would fit the images with x and y negated too, its axes then as sent: "
        "left and right are as its file says, and cannot be confirmed",
    )


def _runs_along(affine: Affine, geometry: VolumeGeometry) -> bool:
    """Whether each axis of the answer runs along one of the images, in its sense."""
    onto = (_inverse(geometry.affine) @ affine)[:3, :3] * np.array(geometry.spacing_mm)[:, None]
    return all(onto[:, axis].max() == np.abs(onto[:, axis]).max() for axis in range(3))


# --- the same grid, turned -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """Index `signs[a]` * n + `starts[a]` of the answer's axis `axes[a]` is index n of axis a of the images.

    `off_mm`, `off_voxels`: by how much that is wrong at most.
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    starts: tuple[int, int, int]
    off_mm: float
    off_voxels: float

    def common(self, axis: int, count: int, answered: int) -> range:
        """Which of `count` indices of an axis of the images are among the `answered` ones."""
        sign, start = self.signs[axis], self.starts[axis]
        first, last = (-start, answered - 1 - start) if sign > 0 else (start - answered + 1, start)
        return range(max(0, first), min(count - 1, last) + 1)

    def covers(self, answered: tuple[int, ...], shape: tuple[int, int, int]) -> bool:
        """Whether every voxel of the images is in the answer, and nothing else."""
        inside = (len(self.common(a, shape[a], answered[self.axes[a]])) == shape[a] for a in range(3))
        return all(inside) and sorted(answered) == sorted(shape)


def _turn_of(onto: Affine, affine: Affine, geometry: VolumeGeometry) -> _Turn | None:
    """The turn that `onto` is, None when it is none within a quarter of a voxel at every corner of the images."""
    whole = np.rint(onto)
    linear = np.abs(whole[:3, :3])
    if linear.max() != 1 or not (linear.sum(axis=0) == 1).all() or not (linear.sum(axis=1) == 1).all():
        return None
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in geometry.shape))], np.float64)
    off = (corners @ (onto - whole).T)[:, :3]
    if (off_voxels := float(np.abs(off).max())) > _NEAR_VOXELS:
        return None
    axes = [int(np.argmax(linear[:, a])) for a in range(3)]
    signs = [int(whole[m, a]) for a, m in enumerate(axes)]
    starts = [int(whole[m, 3]) for m in axes]
    return _Turn(
        axes=(axes[0], axes[1], axes[2]),
        signs=(signs[0], signs[1], signs[2]),
        starts=(starts[0], starts[1], starts[2]),
        off_mm=float(np.linalg.norm(off @ affine[:3, :3].T, axis=1).max()),
        off_voxels=off_voxels,
    )


def _turned(labels: Labels, turn: _Turn, shape: tuple[int, int, int]) -> tuple[Labels, tuple[range, ...]]:
    """The labels in the images' order, and which slices, rows and columns of them there is an answer for."""
    view = labels.transpose(turn.axes)
    common = tuple(turn.common(a, shape[a], view.shape[a]) for a in range(3))
    if not all(common):
        raise GeometryMismatch("the answer has nothing in common with the images: it lies beside them")
    taken = []
    for a, inside in enumerate(common):
        ends = sorted(turn.signs[a] * n + turn.starts[a] for n in (inside[0], inside[-1]))
        part = slice(ends[0], ends[1] + 1)
        taken.append(part)
    view = view[tuple(taken)][tuple(slice(None, None, sign) for sign in turn.signs)]
    if view.shape == shape:
        return np.ascontiguousarray(view), common
    placed = np.zeros(shape, np.uint8)
    placed[tuple(slice(inside.start, inside.stop) for inside in common)] = view
    return placed, common


# --- another grid ----------------------------------------------------------------------------------------------------


def _nearest(
    labels: Labels, affine: Affine, geometry: VolumeGeometry, heartbeat: Callable[[], None]
) -> tuple[Labels, tuple[str, ...]]:
    placed = np.zeros(geometry.shape, np.uint8)
    slices, pixels = 0, 0
    for k, (start, down, across) in enumerate(_lines(affine, geometry)):
        reached = _sampled(labels, start, down, across, placed[k])
        slices += bool(reached)
        pixels += reached
        heartbeat()
    if not pixels:
        raise GeometryMismatch("the answer has nothing in common with the images: it lies beside them")
    beside = _labelled_beside(labels, affine, geometry)
    sides = _millimetres(np.linalg.norm(affine[:3, :3], axis=0))
    notes = [f"answered on another grid ({sides} mm voxels): each pixel has the label of the nearest voxel"]
    if slices < geometry.shape[0]:
        notes.append(_too_short(slices, geometry.shape[0]))
    elif pixels < 0.99 * placed.size:
        notes.append(f"the answer covers {100 * pixels / placed.size:.0f} % of the images")
    return placed, (*notes, *_beside(beside, labels))


_Line = tuple[Affine, Affine, Affine]


def _lines(affine: Affine, geometry: VolumeGeometry) -> list[_Line]:
    """For each slice: the index in the answer of its first pixel, and the steps of it down a row, across a column."""
    onto = _inverse(affine) @ geometry.affine
    if geometry.regular:
        places = [(float(k), 0.0, 0.0) for k in range(geometry.shape[0])]
    else:
        shifts = geometry.shifts_px or ((0.0, 0.0),) * geometry.shape[0]
        places = [
            (mm / geometry.spacing_mm[0], *shift) for mm, shift in zip(geometry.positions_mm, shifts, strict=True)
        ]
    return [((onto @ (*place, 1.0))[:3], onto[:3, 1], onto[:3, 2]) for place in places]


def _sampled(labels: Labels, start: Affine, down: Affine, across: Affine, target: Labels) -> int:
    """Fill `target` (rows, columns) with the nearest labels; how many of its pixels the answer reaches."""
    rows, columns = (np.arange(n, dtype=np.float64) for n in target.shape)
    inside = np.ones(target.shape, np.bool_)
    nearest = []
    for axis, count in enumerate(labels.shape):
        index = np.add.outer(_steps(start[axis] + rows * down[axis]), _steps(columns * across[axis]))
        lowest, highest = index.min(), index.max()
        if highest < -0.5 or lowest > count - 0.5:
            return 0
        nearest.append(_rounded(index))
        if lowest < 0 or highest > count - 1:
            inside &= (nearest[axis] >= 0) & (nearest[axis] < count)
    if inside.all():
        target[...] = labels[nearest[0], nearest[1], nearest[2]]
        return target.size
    i, j, k = (np.broadcast_to(index, target.shape)[inside] for index in nearest)
    target[inside] = labels[i, j, k]
    return len(i)


def _steps(index: Affine) -> Affine:
    """Once where it does not change: what runs along rows or columns only is looked up once for each of them."""
    return index[:1] if abs(index[-1] - index[0]) < _TIE else index


def _rounded(index: Affine) -> npt.NDArray[np.int32]:
    return np.ceil(index - (0.5 + _TIE)).astype(np.int32)


def _labelled_beside(labels: Labels, affine: Affine, geometry: VolumeGeometry) -> int:
    """How many labelled voxels of the answer lie beside the images, the whole of them; slices stand for their width."""
    onto = _inverse(geometry.affine) @ affine
    margin = 0.5 + 0.5 * np.abs(onto[:3, :3]).sum(axis=1) + _TIE  # half a pixel, and what a voxel reaches each way
    last = np.array(geometry.grid_shape) - 1
    beside = 0
    for k in range(labels.shape[2]):
        i, j = np.nonzero(labels[:, :, k])
        at = np.stack([i, j, np.full_like(i, k), np.ones_like(i)], axis=1) @ onto[:3].T
        beside += int(((at < -margin) | (at > last + margin)).any(axis=1).sum())
    return beside


# --- what people are told --------------------------------------------------------------------------------------------


def _distance(turn: _Turn) -> tuple[str, ...]:
    if turn.off_mm <= _SAME_MM:
        return ()
    return (
        f"the answer's grid is off by up to {turn.off_mm:.3f} mm ({turn.off_voxels:.2f} voxels): taken as the same",
    )


def _reach(reached: tuple[range, ...], shape: tuple[int, int, int]) -> tuple[str, ...]:
    if len(reached[0]) < shape[0]:
        return (_too_short(len(reached[0]), shape[0]),)
    part = 100.0 * len(reached[1]) * len(reached[2]) / (shape[1] * shape[2])
    return (f"the answer covers {part:.0f} % of the images",) if part < 99 else ()


def _too_short(slices: int, count: int) -> str:
    return f"the answer covers {slices} of {count} slices"


def _beside(beside: int, labels: Labels) -> tuple[str, ...]:
    if not beside:
        return ()
    if beside == np.count_nonzero(labels):
        raise GeometryMismatch(f"all of the answer's {beside} labelled voxels lie beside the images")
    return (f"{beside} labelled voxels of the answer lie beside the images and are lost",)


def _millimetres(sides: Affine) -> str:
    return " x ".join(f"{mm:.3g}" for mm in sides)
