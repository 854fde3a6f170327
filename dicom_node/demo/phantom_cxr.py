"""Procedural frontal chest radiograph with eleven planted findings, at any matrix size, from a seed.

The picture is a sum of densities along the beam (soft tissue, lungs, heart, ribs, vessels, findings), put
through a tone curve: bright is dense, as MONOCHROME2 shows it. The patient faces the viewer, so the
patient's right is on the left of the image. Coordinates are relative (`u` -1..1 across, `v` about -1.1..1.1
downwards), hence one seed gives the same patient at 256 and at 3000 columns.

Findings are drawn with a random severity whose lower end is hard to see on purpose: a classifier measured
on them should be good and not perfect, or a regression would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FINDING_NAMES", "CxrPhantom", "cxr_phantom"]

# Keys in the order of the network's outputs, with the names shown to people.
FINDING_NAMES: dict[str, str] = {
    "tuberculosis": "Tuberculosis",
    "cardiomegaly": "Cardiomegaly",
    "pleural_thickening": "Pleural Thickening",
    "pleural_effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "consolidation": "Consolidation",
    "atelectasis": "Atelectasis",
    "nodule_mass": "Nodule/Mass",
    "fibrosis": "Fibrosis",
    "infiltration": "Infiltration",
    "calcification": "Calcification",
}
_PREVALENCE, _NORMAL_SHARE = 0.22, 0.20
_GLYPHS = {
    "R": ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),
    "L": ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
}

Plane = NDArray[np.floating]  # float32 throughout; numpy's stubs lose the width in mixed expressions


@dataclass(frozen=True, slots=True, kw_only=True)
class CxrPhantom:
    """One synthetic radiograph: `image` float32 (rows, columns) in 0..1 and what was planted in it.

    `findings` has every key of FINDING_NAMES. `sides` names "right" or "left" (the patient's) for the
    findings that were put on one side.
    """

    image: NDArray[np.float32]
    findings: dict[str, bool]
    sides: dict[str, str]
    view: str
    marker: str


@dataclass(slots=True)
class _Scene:
    """The picture while it is being built. All planes are float32 (rows, columns)."""

    rng: np.random.Generator
    u: Plane
    v: Plane
    grid: tuple[NDArray[np.float64], NDArray[np.float64]]  # row and column positions in u, v units
    density: Plane
    side_u: dict[str, Plane]  # distance from the midline, positive on that side
    lungs: dict[str, Plane]  # aerated lung, 0..1
    rims: dict[str, Plane]  # ellipse function of the lung, 1 on its border
    vessels: dict[str, Plane]
    domes: dict[str, Plane]


def cxr_phantom(
    seed: int,
    rows: int = 1024,
    columns: int = 1024,
    *,
    findings: Mapping[str, bool] | None = None,
    view: str | None = None,
    marker: bool = True,
) -> CxrPhantom:
    """Draw radiograph `seed`. `findings` overrides single draws: {"pneumothorax": True} plants one.

    `view` is "PA" or "AP" (the heart is magnified in AP); by default four in five are PA.
    """
    unknown = set(findings or {}) - set(FINDING_NAMES)
    if unknown:
        raise ValueError(f"unknown findings {sorted(unknown)}; known: {list(FINDING_NAMES)}")
    rng = np.random.default_rng([0xC8, seed])
    normal = rng.random() < _NORMAL_SHARE
    draws = rng.random(len(FINDING_NAMES)) < _PREVALENCE
    planted = {key: bool(d) and not normal for key, d in zip(FINDING_NAMES, draws, strict=True)}
    planted.update({key: bool(value) for key, value in (findings or {}).items()})
    drawn_view = "PA" if rng.random() < 0.8 else "AP"
    shown_view = drawn_view if view is None else view
    # One stream per part: adding or removing a finding must not change the rest of the patient.
    streams = rng.spawn(3 + len(FINDING_NAMES))
    sides = {key: "right" if streams[3 + i].random() < 0.5 else "left" for i, key in enumerate(FINDING_NAMES)}
    collapse = sides["atelectasis"] if planted["atelectasis"] else None
    scene = _thorax(streams[0], rows, columns, shown_view, planted["cardiomegaly"], collapse)
    for i, (key, plant) in enumerate(_PLANTERS.items()):
        if planted[key]:
            scene.rng = streams[3 + i]
            plant(scene, sides[key])
    image = _expose(scene.density, streams[1])
    letter = str(streams[2].choice(["R", "L"]))
    if marker:
        _burn_marker(image, letter, streams[2])
    one_sided = {k: s for k, s in sides.items() if planted[k] and k not in _MIDLINE}
    return CxrPhantom(image=image, findings=planted, sides=one_sided, view=shown_view, marker=letter)


# --- building blocks -----------------------------------------------------------------------------------


def _ramp(distance: Plane, width: float) -> Plane:
    """1 where `distance` < 0, 0 where > 0, a smooth step of `width` between."""
    t = distance * np.float32(-1 / width)
    t += 0.5
    return _smooth(t)


def _bump(distance: Plane, half_width: float) -> Plane:
    """A smooth ridge of height 1 along distance == 0."""
    t = np.abs(distance)
    t *= np.float32(-1 / half_width)
    t += 1
    return _smooth(t)


def _smooth(t: Plane) -> Plane:
    """3 t^2 - 2 t^3 with t held in 0..1. In place where it can be: fresh pages cost more than sums here."""
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    square = np.square(t)
    t *= -2
    t += 3
    square *= t
    return square


def _noise(scene: _Scene, cell: float) -> Plane:
    """Smooth random field of unit variance whose features are about `cell` wide (u units).

    A random lattice times two thin cubic B-spline matrices: the lattice, not the pixel grid, is random,
    so the field does not depend on the matrix size.
    """
    along_rows, along_columns = (_spline_basis(p, e, cell) for p, e in zip(scene.grid, (1.6, 1.4), strict=True))
    lattice = scene.rng.standard_normal((along_rows.shape[1], along_columns.shape[1]), np.float32)
    # 2.2 restores the variance that spline smoothing takes away
    plane: Plane = (np.float32(2.2) * along_rows @ lattice) @ along_columns.T
    return plane


def _spline_basis(positions: NDArray[np.float64], extent: float, cell: float) -> Plane:
    """(positions, lattice) weights of cubic B-splines one `cell` apart; four per row are not zero."""
    x = (positions + extent) / cell
    first = np.floor(x).astype(np.int64)
    t = x - first
    quarter = (1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3
    basis = np.zeros((len(x), int(2 * extent / cell) + 4), np.float32)
    for offset, weight in enumerate(quarter):
        basis[np.arange(len(x)), first + offset] = weight / 6
    return basis


def _spot(scene: _Scene, side: str, across: float, down: float) -> tuple[float, float]:
    """The (u, v) of a place in a lung; across 0 medial..1 lateral, down 0 apex..1 base."""
    sign = -1.0 if side == "right" else 1.0
    return sign * (0.2 + 0.42 * across), -0.62 + 1.05 * down


def _radius(scene: _Scene, u: float, v: float, stretch: float = 1.0) -> Plane:
    distance: Plane = np.sqrt(np.square(scene.u - np.float32(u)) + np.square((scene.v - v) / stretch))
    return distance


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


# --- the normal chest ----------------------------------------------------------------------------------


def _thorax(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    view: str,
    cardiomegaly: bool,
    collapsed_side: str | None,
) -> _Scene:
    scene = _frame(rng, rows, columns)
    u, v = scene.u, scene.v
    scene.density = _soft_tissue(scene)
    for side in ("right", "left"):
        raised = _between(rng, 0.07, 0.18)  # always drawn, or the finding would change the whole patient
        _lung(scene, side, raised if side == collapsed_side else 0.0)
    ratio = _between(rng, 0.50, 0.625) if cardiomegaly else _between(rng, 0.39, 0.51)
    _heart(scene, ratio * (1.03 if view == "AP" else 1.0))
    _bones(scene)
    if rng.random() < 0.3:  # a lead or a line: bright, thin, nothing to do with any finding
        path = u - _between(rng, -0.5, 0.5) - _between(rng, -0.4, 0.4) * v - 0.1 * np.sin(v * 3)
        scene.density += np.float32(0.12) * _bump(path, 0.014) * _ramp(v - _between(rng, -0.4, 0.5), 0.1)
    return scene


def _frame(rng: np.random.Generator, rows: int, columns: int) -> _Scene:
    """Pixel coordinates under a small turn, shift and zoom of the patient."""
    aspect = rows / columns
    size, angle = _between(rng, 0.90, 1.06), _between(rng, -0.06, 0.06)
    du, dv = _between(rng, -0.05, 0.05), _between(rng, -0.06, 0.06)
    across = (np.arange(columns) + 0.5) * (2 / columns) - 1
    down = ((np.arange(rows) + 0.5) * (2 / rows) - 1) * aspect
    # the standing frame fits the shorter side: landscape images show more air, not a wider chest
    zoom = size * (1.0 if aspect >= 1 else 1 / aspect)
    x, y = (across * zoom)[None, :], (down * zoom)[:, None]
    u = (x * np.cos(angle) - y * np.sin(angle) + du).astype(np.float32)
    v = (x * np.sin(angle) + y * np.cos(angle) + dv).astype(np.float32)
    sides = {"right": -u, "left": u}
    grid = (np.clip(down * zoom, -1.5, 1.5), np.clip(across * zoom, -1.3, 1.3))
    return _Scene(rng, u, v, grid, np.zeros_like(u), sides, {}, {}, {}, {})


def _soft_tissue(scene: _Scene) -> Plane:
    """Trunk, shoulders and neck over air; the abdomen below is denser."""
    rng, u, v = scene.rng, scene.u, scene.v
    girth = _between(rng, 0.86, 1.02)
    width = np.clip((v + 1.02) * 1.9 + 0.26, 0.26, girth)
    trunk = _ramp(np.abs(u) - width, 0.10)
    # arms leave the trunk beside the thorax, so the flank is darker than the wall
    density = trunk * (np.float32(0.62) - np.float32(0.12) * _ramp(girth - 0.08 - np.abs(u), 0.2))
    density += np.float32(0.05) * _noise(scene, 0.5) * trunk
    if rng.random() < 0.4:  # breast shadows
        for sign in (-1, 1):
            lower = _radius(scene, sign * 0.42, _between(rng, 0.2, 0.36))
            density += np.float32(_between(rng, 0.03, 0.10)) * _ramp(lower - _between(rng, 0.24, 0.34), 0.08)
    return density


def _lung(scene: _Scene, side: str, raised: float) -> None:
    rng, v = scene.rng, scene.v
    distance = scene.side_u[side]
    centre, half = _between(rng, 0.40, 0.43), _between(rng, 0.31, 0.34)
    rim = np.square((distance - centre) / half) + np.square((v + 0.02) / _between(rng, 0.72, 0.80)) ** 2
    top = 0.44 if side == "right" else 0.50  # the liver pushes the right dome up
    dome = np.float32(top + _between(rng, -0.06, 0.06) - raised) + np.float32(_between(rng, 0.65, 1.0)) * np.square(
        distance - 0.33
    )
    lung = _ramp(rim - 1, 0.22) * _ramp(v - dome, 0.05)
    scene.density -= np.float32(_between(rng, 0.40, 0.46)) * lung
    scene.lungs[side], scene.rims[side], scene.domes[side] = lung, rim, dome
    sign = -1.0 if side == "right" else 1.0
    hilum = _radius(scene, sign * 0.17, 0.02, 1.5)
    fade = np.clip(1 - hilum * np.float32(1.55), 0, 1)
    coarse = np.clip(1 - np.abs(_noise(scene, 0.11)) * 2.6, 0, 1)
    fine = np.clip(1 - np.abs(_noise(scene, 0.055)) * 2.2, 0, 1)
    strength = np.float32(_between(rng, 0.09, 0.15))
    vessels = strength * fade * (coarse + np.float32(0.5) * fine) * lung
    scene.vessels[side] = vessels
    scene.density += vessels + np.float32(_between(rng, 0.10, 0.18)) * _ramp(hilum - 0.07, 0.11) * lung


def _heart(scene: _Scene, ratio: float) -> None:
    """Heart, great vessels and mediastinum; `ratio` is heart width over inner chest width."""
    rng, u, v = scene.rng, scene.u, scene.v
    half = ratio * 0.75
    shift = half * _between(rng, 0.24, 0.36)
    outline = np.square((u - shift) / half) + np.square(
        (v - 0.36 + np.float32(0.25) * (shift - u)) / _between(rng, 0.29, 0.35)
    )
    column = _ramp(np.abs(u - 0.01) - np.clip(0.09 + 0.09 * (v + 0.5), 0.08, 0.17), 0.06)
    knob = _ramp(_radius(scene, 0.12, -0.30) - _between(rng, 0.06, 0.09), 0.06)
    solid = _ramp(outline - 1, 0.22)
    np.maximum(solid, np.float32(0.9) * column, out=solid)
    np.maximum(solid, np.float32(0.7) * knob, out=solid)
    # fills what the lung took away, and a little more; below the domes it hardly shows
    lung = np.maximum(scene.lungs["right"], scene.lungs["left"])
    scene.density += solid * (np.float32(0.31) * lung + np.float32(0.10))
    for side, vessels in scene.vessels.items():
        scene.density -= np.float32(0.8) * vessels * solid
        scene.vessels[side] = vessels * (1 - np.float32(0.8) * solid)


def _bones(scene: _Scene) -> None:
    rng, u, v = scene.rng, scene.u, scene.v
    beside = np.abs(u)
    thorax = np.maximum(
        _ramp(np.minimum(scene.rims["right"], scene.rims["left"]) - 1.25, 0.2),
        _ramp(beside - 0.35, 0.3),
    ) * _ramp(v - 0.75, 0.3)
    pitch = _between(rng, 0.150, 0.175)
    back = (v - np.float32(_between(rng, 0.22, 0.34)) * beside) / pitch + _between(rng, 0, 1)
    front = (v + np.float32(_between(rng, 0.40, 0.60)) * beside) / (pitch * 1.25) + _between(rng, 0, 1)
    for phase, strength in ((back, _between(rng, 0.05, 0.085)), (front, _between(rng, 0.02, 0.045))):
        within = phase - np.floor(phase) - np.float32(0.5)
        scene.density += np.float32(strength) * _ramp(np.abs(within) - 0.22, 0.12) * thorax
    spine = _ramp(beside - _between(rng, 0.065, 0.085), 0.03)
    level = (v + _between(rng, 0, 0.1)) / 0.125
    disc = _bump(level - np.round(level), 0.12)
    scene.density += (np.float32(0.10) - np.float32(0.04) * disc) * spine
    tilt, height = _between(rng, 0.05, 0.22), _between(rng, -0.70, -0.60)
    clavicle = _ramp(np.abs(v - height + np.float32(tilt) * (beside - 0.1)) - 0.026, 0.022)
    scene.density += np.float32(0.10) * clavicle * _ramp(0.07 - beside, 0.05) * _ramp(beside - 0.70, 0.1)


# --- findings ------------------------------------------------------------------------------------------


def _tuberculosis(scene: _Scene, side: str) -> None:
    """Cloudy opacity in an upper zone, mostly with a thick-walled cavity."""
    rng = scene.rng
    u, v = _spot(scene, side, _between(rng, 0.2, 0.8), _between(rng, 0.05, 0.24))
    cloud = _ramp(_radius(scene, u, v) - _between(rng, 0.10, 0.20), 0.16)
    texture = np.clip(0.55 + 0.45 * _noise(scene, 0.06), 0, 1.6)
    strength = np.float32(_between(rng, 0.07, 0.20))
    scene.density += strength * cloud * texture * scene.lungs[side]
    if rng.random() < 0.75:
        size = _between(rng, 0.045, 0.085)
        radius = _radius(scene, u + _between(rng, -0.05, 0.05), v + _between(rng, -0.05, 0.05))
        ring = _bump(radius - size, 0.028) - np.float32(0.8) * _ramp(radius - size + 0.02, 0.02)
        scene.density += np.float32(1.1) * strength * ring * scene.lungs[side]


def _pleural_thickening(scene: _Scene, side: str) -> None:
    """An uneven dense band along the lateral chest wall."""
    rng = scene.rng
    middle, length = _between(rng, -0.25, 0.2), _between(rng, 0.18, 0.42)
    depth = np.float32(_between(rng, 0.20, 0.44)) * (1 + np.float32(0.35) * _noise(scene, 0.14))
    lateral = _ramp(0.46 - scene.side_u[side], 0.1)
    band = _ramp(1 - depth - scene.rims[side], 0.09) * lateral * _ramp(np.abs(scene.v - middle) - length, 0.14)
    scene.density += np.float32(_between(rng, 0.12, 0.25)) * band * _ramp(scene.rims[side] - 1.1, 0.2)


def _pleural_effusion(scene: _Scene, side: str) -> None:
    """Fluid from the base up, rising towards the wall: a meniscus."""
    rng = scene.rng
    height = _between(rng, -0.03, 0.28)
    rise = np.float32(_between(rng, 1.0, 2.0)) * np.square(np.clip(scene.side_u[side] - 0.35, 0, None))
    level = scene.domes[side] - np.float32(height) - rise
    inside = _ramp(scene.rims[side] - 1.02, 0.1)
    fluid = _ramp(level - scene.v, 0.06) * inside
    # the blunted angle stays even when there is next to nothing above the dome
    angle = _ramp(_radius(scene, 0.66 if side == "left" else -0.66, 0.52) - _between(rng, 0.09, 0.14), 0.08)
    strength = np.float32(_between(rng, 0.07, 0.28))
    scene.density += strength * np.maximum(fluid, 0.8 * angle * inside) * scene.lungs[side]


def _pneumothorax(scene: _Scene, side: str) -> None:
    """A rim without vessels outside a thin pleural line, widest at the apex."""
    rng = scene.rng
    width = np.float32(_between(rng, 0.24, 0.70))
    edge = scene.rims[side] - (1 - width) - np.float32(0.35) * (scene.v + 0.2)
    lateral = _ramp(0.30 - scene.side_u[side], 0.12)
    free = _ramp(-edge, 0.05) * lateral * scene.lungs[side]
    scene.density -= free * (scene.vessels[side] + np.float32(_between(rng, 0.03, 0.09)))
    line = _bump(edge, 0.10) * lateral * scene.lungs[side]
    scene.density += np.float32(_between(rng, 0.05, 0.12)) * line


def _consolidation(scene: _Scene, side: str) -> None:
    """One dense, ill-defined area with air bronchograms."""
    rng = scene.rng
    u, v = _spot(scene, side, _between(rng, 0.15, 0.75), _between(rng, 0.35, 0.88))
    size = _between(rng, 0.12, 0.24)
    edge = _radius(scene, u, v, _between(rng, 0.8, 1.3)) + np.float32(0.035) * _noise(scene, 0.13)
    area = _ramp(edge - size, 0.10)
    bronchi = np.float32(0.55) * np.clip(1 - np.abs(_noise(scene, 0.08)) * 3.2, 0, 1)
    scene.density += np.float32(_between(rng, 0.14, 0.28)) * area * (1 - bronchi) * scene.lungs[side]


def _atelectasis(scene: _Scene, side: str) -> None:
    """Plate-like bands above a raised dome; the dome itself is drawn with the lung."""
    rng = scene.rng
    for _ in range(int(rng.integers(2, 5))):
        u, v = _spot(scene, side, _between(rng, 0.15, 0.75), _between(rng, 0.62, 0.92))
        slope, length = _between(rng, -0.35, 0.35), _between(rng, 0.07, 0.18)
        across = scene.v - v - np.float32(slope) * (scene.u - u)
        plate = _bump(across, _between(rng, 0.020, 0.038)) * _ramp(np.abs(scene.u - u) - length, 0.06)
        scene.density += np.float32(_between(rng, 0.11, 0.22)) * plate * scene.lungs[side]


def _nodule_mass(scene: _Scene, side: str) -> None:
    """One to three round opacities with a fairly sharp border."""
    rng = scene.rng
    for _ in range(int(rng.integers(1, 4))):
        u, v = _spot(scene, side, _between(rng, 0.15, 0.85), _between(rng, 0.15, 0.85))
        size = _between(rng, 0.055, 0.12)
        disc = _ramp(_radius(scene, u, v, _between(rng, 0.9, 1.1)) - size, 0.032)
        scene.density += np.float32(_between(rng, 0.15, 0.27)) * disc * (0.35 + 0.65 * scene.lungs[side])
        side = side if rng.random() < 0.6 else ("left" if side == "right" else "right")


def _fibrosis(scene: _Scene, side: str) -> None:
    """A fine net in the lower and outer parts of both lungs."""
    rng = scene.rng
    net = np.clip(1 - np.abs(_noise(scene, 0.046)) * 2.2, 0, 1)
    strength = np.float32(_between(rng, 0.07, 0.18))
    for lung_side, lung in scene.lungs.items():
        low = _ramp(_between(rng, -0.05, 0.15) - scene.v, 0.35)
        outer = np.float32(0.5) + np.float32(0.5) * _ramp(0.35 - scene.side_u[lung_side], 0.25)
        scene.density += strength * net * low * outer * lung


def _infiltration(scene: _Scene, side: str) -> None:
    """Patchy, medium-sized haze over a large part of one lung, sometimes both."""
    rng = scene.rng
    patches = np.clip(_noise(scene, 0.095) - 0.1, 0, 1.4)
    strength = np.float32(_between(rng, 0.09, 0.18))
    other = "left" if side == "right" else "right"
    for lung_side in (side, other) if rng.random() < 0.4 else (side,):
        v = _between(rng, -0.25, 0.3)
        zone = _ramp(_radius(scene, -0.4 if lung_side == "right" else 0.4, v) - 0.36, 0.3)
        scene.density += strength * patches * zone * scene.lungs[lung_side]


def _calcification(scene: _Scene, side: str) -> None:
    """A cluster of small, very dense, sharp dots."""
    rng = scene.rng
    u, v = _spot(scene, side, _between(rng, 0.1, 0.8), _between(rng, 0.1, 0.8))
    for _ in range(int(rng.integers(3, 8))):
        at = (u + _between(rng, -0.1, 0.1), v + _between(rng, -0.1, 0.1))
        dot = _ramp(_radius(scene, *at) - _between(rng, 0.013, 0.027), 0.014)
        scene.density += np.float32(_between(rng, 0.12, 0.32)) * dot


def _drawn_with_the_thorax(scene: _Scene, side: str) -> None:
    """Cardiomegaly is the heart's own size: nothing to add afterwards."""


_MIDLINE = {"cardiomegaly", "fibrosis"}
_PLANTERS: dict[str, Callable[[_Scene, str], None]] = {
    "tuberculosis": _tuberculosis,
    "cardiomegaly": _drawn_with_the_thorax,
    "pleural_thickening": _pleural_thickening,
    "pleural_effusion": _pleural_effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "atelectasis": _atelectasis,
    "nodule_mass": _nodule_mass,
    "fibrosis": _fibrosis,
    "infiltration": _infiltration,
    "calcification": _calcification,
}


# --- the detector --------------------------------------------------------------------------------------


def _expose(density: Plane, rng: np.random.Generator) -> NDArray[np.float32]:
    """Tone curve, quantum noise and collimator blades; 0..1."""
    low, high = _between(rng, -0.06, 0.06), _between(rng, 0.95, 1.12)
    # its own stream: how much noise is drawn depends on the matrix, the blades must not
    noise = rng.spawn(1)[0].standard_normal(density.shape, np.float32)
    linear = (density + noise * np.float32(_between(rng, 0.002, 0.012)) - low) / (high - low)
    image = np.asarray(np.clip(linear, 0, 1) ** np.float32(_between(rng, 0.8, 1.2)), np.float32)
    if rng.random() < 0.3:
        blade = np.float32(1.0 if rng.random() < 0.15 else 0.0)
        rows, columns = image.shape
        top, bottom, left, right = (_between(rng, 0, 0.06) for _ in range(4))
        image[: int(top * rows)] = blade
        image[rows - int(bottom * rows) :] = blade
        image[:, : int(left * columns)] = blade
        image[:, columns - int(right * columns) :] = blade
    return image


def _burn_marker(image: Plane, letter: str, rng: np.random.Generator) -> None:
    """Write R or L beside the matching shoulder, outside the lungs. The patient's right is image left."""
    rows, columns = image.shape
    dot = max(1, round(columns * 0.007))
    glyph = np.kron(np.array([[int(c) for c in line] for line in _GLYPHS[letter]]), np.ones((dot, dot)))
    top = int(rows * _between(rng, 0.08, 0.14))
    from_edge = int(columns * _between(rng, 0.07, 0.10))
    left = from_edge if letter == "R" else columns - from_edge - glyph.shape[1]
    box = image[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    visible = glyph[: box.shape[0], : box.shape[1]] > 0
    box[visible] = 1.0
