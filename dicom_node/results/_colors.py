"""A colour for each label whose package names none: as far from all before it as can be, the same on every machine."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["display_color"]

_LABELS = 255
_LEVELS = np.arange(0, 256, 15, dtype=np.uint8)  # of each primary
_LIGHTNESS = (35.0, 90.0)  # L*, seen on black and on white
_CHROMA = 25.0  # at least: greys are the image's
_FIRST = (225, 45, 45)

# sRGB to XYZ of D65 (IEC 61966-2-1), over the white point; and the constants of CIE 15
_TO_XYZ = np.array([[0.4339, 0.3763, 0.1898], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]])
_EPSILON, _KAPPA = 216 / 24389, 24389 / 27


def display_color(label: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of label 1 to 255."""
    red, green, blue = _palette()[label - 1]
    return int(red), int(green), int(blue)


@cache
def _palette() -> npt.NDArray[np.uint8]:
    """(255, 3): each the candidate with the greatest distance (CIE 1976) to the nearest colour before it."""
    grid = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > _LIGHTNESS[0]) & (lab[:, 0] < _LIGHTNESS[1]) & (chroma > _CHROMA)
    candidates, lab = grid[usable], lab[usable]
    chosen = [int(np.flatnonzero((candidates == _FIRST).all(axis=1))[0])]
    nearest = np.full(len(lab), np.inf)
    while len(chosen) < _LABELS:
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(np.round(nearest, 3))))  # rounded: the last bit differs between machines
    return candidates[chosen]


def _lab(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """CIE L*a*b* of sRGB."""
    value = rgb / 255.0
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = linear @ _TO_XYZ.T
    root = np.where(xyz > _EPSILON, np.cbrt(xyz), (_KAPPA * xyz + 16) / 116)
    x, y, z = root.T
    lab: npt.NDArray[np.float64] = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    return lab
