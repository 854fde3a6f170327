"""Is this picture a frontal chest radiograph? Asked of the pixels, whatever the header claims.

A classifier gives a hand or a page of text scores too; this gate keeps them from being reported. It correlates a
small plane with drawn thoraces (two dark lungs, a bright middle with a heart, bright abdomen and shoulders) of many
widths, heights and places, upright and turned, and then asks of the place that fits best whether both lungs are
darker than what lies between and below them. Nothing is trained: the drawing and the limits below are all there is.
Pure numpy, no DICOM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from dicom_node.radiograph import prepare_radiograph

__all__ = ["ChestFit", "chest_fit", "not_frontal_chest"]

Plane = NDArray[np.float32]

_SIZE = 32
# Set between what phantoms and real radiographs reach and what everything else does (tests/models/test_chest_gate.py).
_MIN_MATCH = 0.60
_MIN_LEAD = 0.05  # over the best match of the picture turned by 90, 180 or 270 degrees
_MIN_CONTRAST = 0.25  # of each lung against the middle and below, in deviations of the picture
_MIN_SMOOTH = 0.60  # share of the variation that neighbours have in common: noise and text have little

# Candidate thoraces: half width and half height of the lung pair, its centre, all as shares of the half picture.
_HALF_WIDTHS = (0.56, 0.68, 0.80, 0.92)
_HALF_HEIGHTS = (0.45, 0.56, 0.68, 0.80)
_CENTRES_U = (-0.16, -0.08, 0.0, 0.08, 0.16)
_CENTRES_V = (-0.36, -0.24, -0.12, 0.0, 0.12)


@dataclass(frozen=True, slots=True)
class ChestFit:
    """How well the best drawn thorax fits (`match`, -1..1), its lead over turned pictures, and what else is asked.

    `contrast` is the smallest of four differences, in deviations: middle and below, each over each lung.
    `smooth` is the correlation of neighbouring pixels at the gate's resolution.
    """

    match: float
    lead: float
    contrast: float
    smooth: float


def not_frontal_chest(image: NDArray[np.generic]) -> str:
    """Why `image` (rows, columns; display values, bright = dense) is no upright frontal chest film; "" if it is one.

    Raises ValueError for what `prepare_radiograph` refuses.
    """
    fit = chest_fit(image)
    if fit is None:
        return "the image has no contrast"
    if fit.smooth < _MIN_SMOOTH:
        return "the image has no large structures (noise, text or a pattern)"
    if fit.match < _MIN_MATCH or fit.contrast < _MIN_CONTRAST:
        return "two dark lungs beside a bright mediastinum are not seen"
    if fit.lead < _MIN_LEAD:
        return "the image seems to be turned"
    return ""


def chest_fit(image: NDArray[np.generic]) -> ChestFit | None:
    """The figures the gate decides by; None for a flat image."""
    plane = prepare_radiograph(image, _SIZE)
    if not plane.any():
        return None
    matches = [_matches(np.rot90(plane, turns)) for turns in range(4)]
    best = int(np.argmax(matches[0]))
    match = float(matches[0][best])
    left, right, middle, below = (float((plane * weights[best]).sum()) for weights in _regions())
    contrast = min(middle - left, middle - right, below - left, below - right)
    return ChestFit(match, match - max(float(m.max()) for m in matches[1:]), contrast, _smoothness(plane))


def _matches(plane: Plane) -> Plane:
    """Correlation with every candidate."""
    values = plane - plane.mean()
    values = values / max(float(np.linalg.norm(values)), 1e-6)
    return np.asarray(_bank() @ values.ravel(), np.float32)


def _smoothness(plane: Plane) -> float:
    values = plane - plane.mean()
    across = float((values[:, 1:] * values[:, :-1]).sum())
    down = float((values[1:] * values[:-1]).sum())
    return (across + down) / (2 * float((values * values).sum()))


def _candidates() -> list[tuple[float, float, float, float]]:
    return list(product(_HALF_WIDTHS, _HALF_HEIGHTS, _CENTRES_U, _CENTRES_V))


def _grid(candidate: tuple[float, float, float, float]) -> tuple[Plane, Plane]:
    """The candidate's own coordinates: the lungs lie within -1..1 both ways, v downwards."""
    half_width, half_height, centre_u, centre_v = candidate
    axis = ((np.arange(_SIZE, dtype=np.float32) + 0.5) * 2 / _SIZE) - 1
    u, v = np.meshgrid((axis - centre_u) / half_width, (axis - centre_v) / half_height)
    return np.asarray(u, np.float32), np.asarray(v, np.float32)


@cache
def _bank() -> Plane:
    """(candidate, pixel): every drawn thorax, mean 0 and norm 1."""
    drawn = np.stack([_draw(*_grid(candidate)).ravel() for candidate in _candidates()])
    drawn -= drawn.mean(1, keepdims=True)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


def _draw(u: Plane, v: Plane) -> Plane:
    """Densities in rough proportion: lung 0, soft wall 0.55, middle and abdomen 1, air beside the neck 0.1."""
    side = np.abs(u)
    lung = _lungs(u, v)
    body = np.where(v > 0.85, 0.85, 0.6)
    body = np.where((side < 0.2), 1.0, body)
    body = np.where((u > 0) & (((u - 0.2) / 0.42) ** 2 + ((v - 0.62) / 0.45) ** 2 < 1), 0.95, body)
    outside = np.clip((side - 1.25) * 4, 0, 1) + np.clip((-v - 0.9) * 2 + (side - 0.7) * 1.5, 0, 1) * (v < -0.9)
    drawn = np.where(lung, 0.15, body) * (1 - 0.8 * np.clip(outside, 0, 1))
    return np.asarray(drawn, np.float32)


def _lungs(u: Plane, v: Plane) -> NDArray[np.bool_]:
    """Two fields with narrow tops, the left one (right in the picture) cut by the heart."""
    side = np.abs(u)
    top = ((side - 0.58) / 0.42) ** 2 + (np.clip(-v - 0.1, 0, None) / 0.9) ** 2 < 1
    heart = (u > 0) & (((u - 0.2) / 0.42) ** 2 + ((v - 0.62) / 0.45) ** 2 < 1)
    return np.asarray(top & (v < 0.85) & (side > 0.2) & ~heart, np.bool_)


@cache
def _regions() -> tuple[Plane, Plane, Plane, Plane]:
    """Weights (candidate, row, column) summing to 1: image-left lung, image-right lung, middle, below."""
    planes: tuple[list[Plane], ...] = ([], [], [], [])
    for candidate in _candidates():
        u, v = _grid(candidate)
        lung = _lungs(u, v)
        masks = (lung & (u < 0), lung & (u > 0), (np.abs(u) < 0.16) & (np.abs(v) < 0.85))
        low = (v > 0.95) & (v < 1.4) & (np.abs(u) < 0.75)
        for found, mask in zip(planes, (*masks, low if low.any() else masks[2]), strict=True):
            found.append(np.asarray(mask / max(int(mask.sum()), 1), np.float32))
    left, right, middle, below = (np.stack(found) for found in planes)
    return left, right, middle, below
