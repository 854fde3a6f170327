"""Procedural abdominal CT: Hounsfield units and organ labels on any grid, from a seed.

This module knows geometry and tissue, not DICOM files and not networks. One patient is a list of implicit
shapes (ellipsoids with a wavy surface and carved hollows) in patient coordinates, DICOM LPS millimetres:
+x is the patient's left, +y posterior, +z superior. A grid is laid over that patient afterwards, so the
same seed sampled at two resolutions, with a partial field of view, with an oblique or a tilted stack, shows
the same anatomy.

Rendering goes slice by slice, and inside a slice shape by shape within the shape's own bounding box: the
surface function of a shape is a sum of products of one function of the row and one of the column, so it
is a single thin matrix product and never touches a full volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["KIDNEY", "LABEL_KEYS", "LIVER", "SPLEEN", "CtPhantom", "ct_phantom"]

LIVER, SPLEEN, KIDNEY = 1, 2, 3
LABEL_KEYS = {LIVER: "liver", SPLEEN: "spleen", KIDNEY: "kidney"}

AIR_HU = -1000.0
# Body outline in template millimetres: half width and half depth of the skin.
_HALF_WIDTH, _HALF_DEPTH = 168.0, 118.0
# Levels of the outline function (a fourth power) where skin fat, muscle wall and cavity begin.
_WALL_LEVEL, _CAVITY_LEVEL = 0.62, 0.42
# The outline u^4 + v^4 + k u^2 v^2 is an ellipse at k = 2 and squarer below.
_SQUARENESS = 1.1
_FOREVER_MM = 3000.0  # half length of a vessel or the spine: longer than any scan

Vector = NDArray[np.float64]
Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class CtPhantom:
    """One synthetic scan. Arrays are (slice, row, column); slice 0 is the most inferior by default.

    `affine` maps homogeneous voxel indices (column, row, slice, 1) to LPS millimetres and is not
    necessarily orthogonal (gantry tilt). `spacing_mm` is (slice, row, column).
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    affine: Vector
    organs: frozenset[str]
    contrast: float


@dataclass(slots=True)
class _Shape:
    """{p : |M (p - centre)|^2 < 1 + waves(p)}, minus hollows; painted with one HU and one label."""

    centre: Vector
    matrix: Vector
    hu: float
    label: int = 0
    in_cavity: bool = False
    hollows: list[_Shape] = field(default_factory=list)
    gas_above_y: float | None = None
    wave_vectors: Vector = field(default_factory=lambda: np.zeros((0, 3)))
    wave_phases: Vector = field(default_factory=lambda: np.zeros(0))
    wave_heights: Vector = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class _Placed:
    """A shape seen from a grid: `surface` is negative inside. Index vectors are (column, row, slice)."""

    shape: _Shape
    linear: Vector  # (3, 3): index -> the shape's unit-sphere space
    offset: Vector  # (3,)
    waves: Vector  # (n, 3): radians per index step
    phases: Vector
    low: Vector  # bounding box, inclusive, in index units
    high: Vector
    hollows: tuple[_Placed, ...]

    def surface(self, slice_index: float, rows: Plane, columns: Plane) -> Plane:
        """|M q|^2 - 1 - waves over rows x columns, as a product of two thin matrices."""
        g = self.linear
        at_slice = g[:, 2] * slice_index + self.offset
        r, c = rows.astype(np.float64), columns.astype(np.float64)
        row_part = g[:, 1:2] * r + at_slice[:, None]
        column_part = g[:, 0:1] * c
        left = [(row_part**2).sum(0) - 1.0, np.ones_like(r)]
        right = [np.ones_like(c), (column_part**2).sum(0)]
        left.extend(2.0 * row_part)
        right.extend(column_part)
        heights = self.shape.wave_heights
        for wave, phase, height in zip(self.waves, self.phases, heights, strict=True):
            angle_r = wave[1] * r + wave[2] * slice_index + phase
            angle_c = wave[0] * c
            left.extend((-height * np.sin(angle_r), -height * np.cos(angle_r)))
            right.extend((np.cos(angle_c), np.sin(angle_c)))
        product: Plane = np.asarray(left, np.float32).T @ np.asarray(right, np.float32)
        return product


def ct_phantom(
    seed: int,
    shape: tuple[int, int, int] = (64, 96, 96),
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    *,
    direction: NDArray[np.floating] | None = None,
    centre_mm: tuple[float, float, float] | None = None,
    slice_indices: Sequence[float] | None = None,
    contrast: float | None = None,
    noise_hu: float | None = None,
    spleen: bool | None = None,
    circular_fov: bool = False,
) -> CtPhantom:
    """Sample patient `seed` on a grid of `shape` (slice, row, column) and `spacing_mm` in the same order.

    `direction` holds the unit LPS directions of a step in column, row and slice index as its *columns*
    (identity: axial, upward; not orthogonal: gantry tilt). `centre_mm` moves the middle of the grid away
    from the middle of the upper abdomen, LPS; by default a few random centimetres. `slice_indices` places
    each slice at a fractional index instead of 0, 1, 2 ... and wins over `shape[0]`; gaps and jitter are
    made with it. `contrast` 0..1 is the enhancement, `noise_hu` the standard deviation of the noise.
    """
    rng = np.random.default_rng([0xC7, seed])
    draw_contrast, draw_noise = float(rng.random()), float(rng.uniform(6.0, 20.0))
    to_patient, origin = _patient_frame(rng)
    draw_centre = rng.uniform(-1, 1, 3) * np.array([15.0, 15.0, 20.0])
    enhancement = draw_contrast if contrast is None else contrast
    has_spleen = bool(rng.random() >= 0.05) if spleen is None else spleen
    shapes = _anatomy(rng, enhancement, has_spleen)
    for one in shapes:
        _move(one, to_patient, origin)

    middle = origin + (draw_centre if centre_mm is None else np.asarray(centre_mm, np.float64))
    positions = np.asarray(range(shape[0]) if slice_indices is None else slice_indices, np.float64)
    affine = _grid_affine(shape, spacing_mm, direction, middle)
    placed = [_place(one, affine) for one in shapes]
    body = _Body(to_patient, origin, affine, float(rng.uniform(0, 2 * math.pi)))
    hu, labels = _render(placed, body, positions, shape[1:], min(spacing_mm[1:]))
    _add_noise(hu, rng, draw_noise if noise_hu is None else noise_hu)
    if circular_fov:
        _cut_circle(hu, labels)
    found = frozenset(key for value, key in LABEL_KEYS.items() if np.any(labels == value))
    return CtPhantom(
        hu=hu,
        labels=labels,
        spacing_mm=spacing_mm,
        affine=affine,
        organs=found,
        contrast=enhancement,
    )


def _patient_frame(rng: np.random.Generator) -> tuple[Vector, Vector]:
    """Template -> patient: an overall size, slight differences between axes, a turn on the table."""
    size = rng.uniform(0.86, 1.18) * rng.uniform(0.95, 1.05, 3)
    turn = _rotation(2, rng.uniform(-0.13, 0.13)) @ _rotation(0, rng.uniform(-0.05, 0.05))
    origin = np.array([rng.uniform(-10, 10), rng.uniform(-180, -120), rng.uniform(-400, 400)])
    return turn * size, origin


def _rotation(axis: int, angle: float) -> Vector:
    c, s = math.cos(angle), math.sin(angle)
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _ellipsoid(
    centre: tuple[float, float, float] | Vector,
    radii: tuple[float, float, float] | Vector,
    hu: float,
    *,
    label: int = 0,
    turn: Vector | None = None,
    in_cavity: bool = False,
) -> _Shape:
    rotation = np.eye(3) if turn is None else turn
    matrix = rotation.T / np.asarray(radii, np.float64)[:, None]
    return _Shape(np.asarray(centre, np.float64), matrix, hu, label, in_cavity)


def _wavy(rng: np.random.Generator, one: _Shape, height: float, count: int = 5) -> _Shape:
    """Give the surface `count` waves of 45 to 140 mm in random directions."""
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    one.wave_vectors = directions * (2 * math.pi / rng.uniform(45.0, 140.0, (count, 1)))
    one.wave_phases = rng.uniform(0, 2 * math.pi, count)
    one.wave_heights = height * rng.uniform(0.5, 1.0, count)
    return one


def _anatomy(rng: np.random.Generator, contrast: float, has_spleen: bool) -> list[_Shape]:
    """All shapes in template millimetres, in painting order: a later shape covers an earlier one."""
    return [
        *_chest(rng, contrast),
        *_bowel(rng, contrast),
        *_vessels_and_muscle(rng, contrast),
        *_liver(rng, contrast),
        *_kidneys(rng, contrast),
        *(_spleen(rng, contrast) if has_spleen else []),
        *_spine(rng),
    ]


def _chest(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    lift = rng.uniform(-12, 12)
    air = rng.uniform(-880, -800)
    lungs = [
        _ellipsoid((-82, 5, 158 + lift), (68, 88, 112), air, in_cavity=True),
        _ellipsoid((84, 8, 150 + lift), (62, 86, 108), air, in_cavity=True),
    ]
    for lung in lungs:
        _wavy(rng, lung, 0.03)
    heart = _ellipsoid((22, -32, 135 + lift), (58, 50, 62), 42 + 150 * contrast, in_cavity=True)
    return [*lungs, heart]


def _bowel(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    """Stomach, pancreas and loops of bowel: what a network must not take for an organ."""
    content = float(rng.choice([5.0, 15.0, 25.0, 40.0]))
    stomach = _ellipsoid(
        np.array([58.0, -42.0, 38.0]) + rng.uniform(-10, 10, 3),
        np.array([46.0, 36.0, 42.0]) * rng.uniform(0.75, 1.2, 3),
        content,
        in_cavity=True,
    )
    stomach.gas_above_y = float(rng.uniform(-75, -30))
    pancreas = _ellipsoid(
        np.array([18.0, 4.0, -4.0]) + rng.uniform(-6, 6, 3),
        np.array([62.0, 12.0, 13.0]) * rng.uniform(0.85, 1.15, 3),
        38 + 60 * contrast,
        turn=_rotation(1, rng.uniform(0.1, 0.45)),
        in_cavity=True,
    )
    shapes = [_wavy(rng, stomach, 0.06), _wavy(rng, pancreas, 0.08)]
    for _ in range(int(rng.integers(14, 26))):
        loop = _ellipsoid(
            (rng.uniform(-120, 120), rng.uniform(-75, 25), rng.uniform(-210, 5)),
            rng.uniform(11, 27, 3) * np.array([1.2, 1.0, 1.3]),
            float(rng.choice([10.0, 25.0, 40.0, 60.0, 250.0], p=[0.25, 0.25, 0.25, 0.15, 0.1])),
            in_cavity=True,
        )
        if rng.random() < 0.45:
            loop.gas_above_y = float(loop.centre[1] + rng.uniform(-8, 6))
        shapes.append(_wavy(rng, loop, 0.06, 3))
    return shapes


def _vessels_and_muscle(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    shapes = [_ellipsoid((side * 42, 62, -110), (24, 23, 120), rng.uniform(48, 62), in_cavity=True) for side in (-1, 1)]
    shapes += [
        _ellipsoid((side * 92, 52, -215), (44, 56, 62), rng.uniform(180, 260)) for side in (-1, 1)
    ]  # iliac wings, for scans that reach the pelvis
    portal = _ellipsoid((-20, 5, 12), (26, 8, 9), 40 + 120 * contrast, in_cavity=True)
    cava = _ellipsoid((-20, 34, 0), (13, 10, _FOREVER_MM), 40 + 95 * contrast, in_cavity=True)
    aorta = _ellipsoid((12, 38, 0), (11, 11, _FOREVER_MM), 40 + 260 * contrast, in_cavity=True)
    return [*shapes, portal, cava, aorta]


def _liver(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    hu = rng.uniform(46, 64) + 55 * contrast
    shift = rng.uniform(-7, 7, 3)
    grow = rng.uniform(0.9, 1.1, 3)
    right = _ellipsoid(
        np.array([-74.0, -4.0, 22.0]) + shift,
        np.array([76.0, 84.0, 76.0]) * grow,
        hu,
        label=LIVER,
        in_cavity=True,
    )
    left = _ellipsoid(
        np.array([-8.0, -42.0, 44.0]) + shift,
        np.array([72.0, 34.0, 34.0]) * grow,
        hu,
        label=LIVER,
        turn=_rotation(1, rng.uniform(-0.25, 0.1)),
        in_cavity=True,
    )
    fossa = _ellipsoid(np.array([-42.0, 6.0, -52.0]) + shift, (46.0, 52.0, 48.0), 0.0)
    porta = _ellipsoid(np.array([-12.0, 24.0, 10.0]) + shift, (30.0, 40.0, 52.0), 0.0)
    shapes = [_wavy(rng, right, 0.05), _wavy(rng, left, 0.05)]
    for lobe in shapes:
        lobe.hollows = [fossa, porta]
    gallbladder = _ellipsoid(
        np.array([-48.0, -38.0, -26.0]) + shift, rng.uniform(10, 18, 3), rng.uniform(2, 16), in_cavity=True
    )
    vessels = [
        _ellipsoid(
            np.array([-80.0, -5.0, 35.0]) + shift + rng.uniform(-32, 32, 3),
            (4.5, 4.5, 22.0),
            hu + 25 * contrast,
            label=LIVER,
            turn=_rotation(0, rng.uniform(-1, 1)) @ _rotation(1, rng.uniform(-1, 1)),
        )
        for _ in range(6)
    ]
    cysts = [
        _ellipsoid(
            np.array([-80.0, -10.0, 35.0]) + shift + rng.uniform(-35, 35, 3),
            (rng.uniform(4, 13),) * 3,
            rng.uniform(0, 25),
            label=LIVER,
        )
        for _ in range(int(rng.integers(0, 3)))
    ]
    return [*shapes, *vessels, *cysts, gallbladder]


def _spleen(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    """An ellipsoid leaning back and outwards, hollowed at the hilum so that it is concave medially."""
    centre = np.array([104.0, 42.0, 42.0]) + rng.uniform(-8, 8, 3)
    radii = np.array([27.0, 45.0, 52.0]) * rng.uniform(0.85, 1.2, 3)
    turn = _rotation(2, rng.uniform(0.15, 0.5)) @ _rotation(0, rng.uniform(-0.45, -0.1))
    spleen = _ellipsoid(centre, radii, rng.uniform(44, 60) + 65 * contrast, label=SPLEEN, turn=turn, in_cavity=True)
    hilum = _ellipsoid(
        centre + turn @ (radii * np.array([-1.15, -0.15, rng.uniform(-0.2, 0.2)])),
        radii * np.array([0.85, 0.6, 0.62]),
        0.0,
        turn=turn,
    )
    spleen.hollows = [hilum]
    return [_wavy(rng, spleen, 0.05)]


def _kidneys(rng: np.random.Generator, contrast: float) -> list[_Shape]:
    shapes = []
    hu = rng.uniform(28, 40) + 120 * contrast
    for side in (-1, 1):
        # the right kidney lies lower, under the liver
        centre = np.array([side * 66.0, 50.0, -42.0 + 8.0 * side]) + rng.uniform(-6, 6, 3)
        radii = np.array([26.0, 26.0, 53.0]) * rng.uniform(0.88, 1.14, 3)
        turn = _rotation(1, side * rng.uniform(0.1, 0.3)) @ _rotation(0, rng.uniform(-0.25, 0.0))
        # perirenal fat keeps an unenhanced kidney apart from muscle of the same density
        fat = _ellipsoid(centre, radii + rng.uniform(4, 9), -95.0, turn=turn, in_cavity=True)
        kidney = _ellipsoid(centre, radii, hu, label=KIDNEY, turn=turn, in_cavity=True)
        inward = turn @ (radii * np.array([-side * 1.0, -0.25, 0.0]))
        kidney.hollows = [_ellipsoid(centre + inward, radii * np.array([0.8, 0.55, 0.36]), 0.0, turn=turn)]
        shapes += [fat, _wavy(rng, kidney, 0.04)]
        if rng.random() < 0.2:  # a simple cyst counts as kidney
            at = centre + turn @ (radii * np.array([side * 0.75, 0.1, rng.uniform(-0.6, 0.6)]))
            shapes.append(_ellipsoid(at, (rng.uniform(6, 14),) * 3, rng.uniform(0, 15), label=KIDNEY))
    return shapes


def _spine(rng: np.random.Generator) -> list[_Shape]:
    bone = rng.uniform(150, 240)
    column = _ellipsoid((0, 64, 0), (22, 18, _FOREVER_MM), bone)
    canal = _ellipsoid((0, 92, 0), (11, 9, _FOREVER_MM), 20.0)
    arch = _ellipsoid((0, 94, 0), (17, 15, _FOREVER_MM), bone + 120)
    process = _ellipsoid((0, 112, 0), (5, 16, _FOREVER_MM), bone + 60)
    first = rng.uniform(-18, 18)
    discs = [_ellipsoid((0, 63, first + 36 * k), (22, 18, 4.5), 85.0) for k in range(-8, 9)]
    back = [_ellipsoid((s * 38, 92, 0), (30, 19, _FOREVER_MM), rng.uniform(45, 60)) for s in (-1, 1)]
    return [*back, column, *discs, process, arch, canal]


def _move(one: _Shape, to_patient: Vector, origin: Vector) -> None:
    """Carry a template shape into patient coordinates, in place, hollows included."""
    back = np.linalg.inv(to_patient)
    one.centre = to_patient @ one.centre + origin
    one.matrix = one.matrix @ back
    one.wave_vectors = one.wave_vectors @ back
    if one.gas_above_y is not None:
        one.gas_above_y = float(to_patient[1, 1] * one.gas_above_y + origin[1])
    # fossa and porta are shared by two lobes: move a private copy, never the same object twice
    one.hollows = [_Shape(h.centre.copy(), h.matrix.copy(), h.hu) for h in one.hollows]
    for hollow in one.hollows:
        _move(hollow, to_patient, origin)


def _grid_affine(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    direction: NDArray[np.floating] | None,
    middle: Vector,
) -> Vector:
    """Index (column, row, slice, 1) -> LPS with the middle of the grid at `middle`."""
    axes = np.eye(3) if direction is None else np.asarray(direction, np.float64)
    if axes.shape != (3, 3):
        raise ValueError(f"direction must be 3x3, columns = unit LPS directions; got shape {axes.shape}")
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm[::-1])
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.asarray(shape[::-1]) - 1) / 2)
    return affine


def _place(one: _Shape, affine: Vector) -> _Placed:
    linear = one.matrix @ affine[:3, :3]
    offset = one.matrix @ (affine[:3, 3] - one.centre)
    # |q| can reach sqrt(1 + sum of wave heights) before the surface turns positive
    reach = math.sqrt(1.0 + float(np.abs(one.wave_heights).sum()))
    inverse = np.linalg.inv(linear)
    half = reach * np.linalg.norm(inverse, axis=1)
    middle = -inverse @ offset
    return _Placed(
        shape=one,
        linear=linear,
        offset=offset,
        waves=one.wave_vectors @ affine[:3, :3],
        phases=one.wave_phases + one.wave_vectors @ affine[:3, 3],
        low=middle - half,
        high=middle + half,
        hollows=tuple(_place(h, affine) for h in one.hollows),
    )


class _Body:
    """Skin, muscle wall, ribs, cavity and the table, one slice at a time."""

    def __init__(self, to_patient: Vector, origin: Vector, affine: Vector, phase: float) -> None:
        back = np.linalg.inv(to_patient)
        self._linear = back @ affine[:3, :3]
        self._offset = back @ (affine[:3, 3] - origin)
        self._phase = phase
        self._hu = np.array([AIR_HU, -100.0, 52.0, -85.0], np.float32)

    def slice(self, index: float, rows: Plane, columns: Plane) -> tuple[Plane, Mask]:
        """HU (rows, columns) of everything but the organs, and where organs may be."""
        u, v, w = (
            (g[1] * rows + (g[2] * index + o)).astype(np.float32)[:, None]
            + (g[0] * columns).astype(np.float32)[None, :]
            for g, o in zip(self._linear, self._offset, strict=True)
        )
        waist = 1.0 + 0.05 * np.sin(w * np.float32(0.012) + np.float32(self._phase))
        a = np.square(u * np.float32(1 / _HALF_WIDTH)) * waist
        b = np.square(v * np.float32(1 / _HALF_DEPTH)) * waist
        outline = a * a + b * b + np.float32(_SQUARENESS) * a * b
        cavity = outline < _CAVITY_LEVEL
        layer = (outline < 1.0).view(np.uint8) + (outline < _WALL_LEVEL) + cavity
        hu = self._hu[layer]
        wall = (outline > _CAVITY_LEVEL * 1.02) & (outline < _CAVITY_LEVEL * 1.32)
        self._ribs(hu, wall, v, w)
        table = np.abs(v - np.float32(_HALF_DEPTH + 9) + np.square(u) * np.float32(1 / 2200)) < 3.0
        np.copyto(hu, np.float32(-450.0), where=table & (outline > 1.0) & (np.abs(u) < 190))
        return hu, cavity

    @staticmethod
    def _ribs(hu: Plane, wall: Mask, v: Plane, w: Plane) -> None:
        """Every 27 mm an arc that falls forwards; none below the costal margin."""
        if float(w.max()) < -45:
            return
        along = (w + np.float32(0.45) * v) * np.float32(1 / 27)
        rib = (along - np.floor(along)) < 0.33
        np.copyto(hu, np.float32(330.0), where=rib & wall & (along > -1.5))


def _render(
    placed: list[_Placed],
    body: _Body,
    positions: Vector,
    size: tuple[int, int],
    pixel_mm: float,
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    rows, columns = np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32)
    hu = np.empty((len(positions), *size), np.int16)
    labels = np.zeros((len(positions), *size), np.uint8)
    for k, index in enumerate(positions):
        plane, cavity = body.slice(float(index), rows, columns)
        for one in placed:
            if one.low[2] <= index <= one.high[2]:
                _paint(one, float(index), rows, columns, plane, labels[k], cavity)
        hu[k] = _soften(plane) if pixel_mm < 2.0 else plane
    return hu, labels


def _paint(
    one: _Placed,
    index: float,
    rows: Plane,
    columns: Plane,
    plane: Plane,
    labels: NDArray[np.uint8],
    cavity: Mask,
) -> None:
    (c0, r0), (c1, r1) = np.ceil(one.low[:2]).clip(0), np.floor(one.high[:2]) + 1
    box = (slice(int(r0), max(int(r1), 0)), slice(int(c0), max(int(c1), 0)))
    r, c = rows[box[0]], columns[box[1]]
    if r.size == 0 or c.size == 0:
        return
    inside = one.surface(index, r, c) < 0
    for hollow in one.hollows:
        if hollow.low[2] <= index <= hollow.high[2]:
            inside &= hollow.surface(index, r, c) > 0
    if one.shape.in_cavity:
        inside &= cavity[box]
    np.copyto(plane[box], np.float32(one.shape.hu), where=inside)
    np.copyto(labels[box], np.uint8(one.shape.label), where=inside)
    if one.shape.gas_above_y is not None:
        np.copyto(plane[box], np.float32(-850.0), where=inside & _above(one, index, r, c))


def _above(one: _Placed, index: float, r: Plane, c: Plane) -> Mask:
    """Where patient y is anterior of the fluid level; gas rises to the front of a supine patient."""
    level = one.shape.gas_above_y
    assert level is not None
    # the shape's own map inverted gives LPS back without carrying the grid along
    to_lps = np.linalg.inv(one.shape.matrix)
    g, o = (to_lps @ one.linear)[1], float((to_lps @ one.offset)[1] + one.shape.centre[1])
    y = (g[1] * r + (g[2] * index + o))[:, None] + (g[0] * c)[None, :]
    front: Mask = y < level
    return front


def _soften(plane: Plane) -> Plane:
    """A three-tap binomial in both directions: the edge response of a scanner at fine pixels."""
    out = plane.copy()
    out[1:-1] = (plane[:-2] + plane[2:]) * np.float32(0.25) + plane[1:-1] * np.float32(0.5)
    across = out.copy()
    across[:, 1:-1] = (out[:, :-2] + out[:, 2:]) * np.float32(0.25) + out[:, 1:-1] * np.float32(0.5)
    return across


def _add_noise(hu: NDArray[np.int16], rng: np.random.Generator, sd: float) -> None:
    """Add half white, half 2-pixel-correlated noise from a few fields, shifted anew for each slice.

    Fresh normals for 79 million voxels would cost as much as the anatomy; no two slices share a shift.
    """
    if sd <= 0:
        return
    rows, columns = hu.shape[1:]
    margin = 64
    white = rng.standard_normal((5, rows + margin + 1, columns + margin + 1), np.float32)
    smooth = (white[:, 1:, 1:] + white[:, :-1, 1:] + white[:, 1:, :-1] + white[:, :-1, :-1]) * 0.5
    fields = ((white[:, 1:, 1:] + smooth) * np.float32(sd / 1.7)).astype(np.int16)
    which = rng.integers(0, len(fields), len(hu))
    shifts = rng.integers(0, margin, (len(hu), 2))
    for plane, f, (dr, dc) in zip(hu, which, shifts, strict=True):
        plane += fields[f, dr : dr + rows, dc : dc + columns]
    np.clip(hu, -1024, 3071, out=hu)


def _cut_circle(hu: NDArray[np.int16], labels: NDArray[np.uint8]) -> None:
    """Set everything outside the largest inscribed circle to air: a round reconstruction field."""
    rows, columns = hu.shape[1:]
    r, c = np.ogrid[:rows, :columns]
    radius = min(rows, columns) / 2
    outside = (r - (rows - 1) / 2) ** 2 + (c - (columns - 1) / 2) ** 2 > radius**2
    hu[:, outside] = -1024
    labels[:, outside] = 0
