"""Turn a displayed radiograph into network input: one place, shared by training and by the node.

The input is a plane of display values, bright = dense (MONOCHROME2), after modality and VOI LUT; only the
order of the values and their rough proportions matter, never their unit. Nothing here knows DICOM or torch.

Cost rules: a radiograph has some eight million pixels and this runs on one core, so no step sorts, copies
or converts the full plane more than once. Percentiles and borders are read from a strided sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["prepare_radiograph", "prepare_xrv"]

_SAMPLES_PER_SIDE = 256
# Grey levels below and above these shares of the sample are clipped: markers, blades, dead pixels.
_LOW_SHARE, _HIGH_SHARE = 0.01, 0.995
# A border line shows nothing but blade or air when its values differ by less than this share of the range
# and lie within as much of either end of it. (A line across the abdomen is flat too, but mid grey.)
_FLAT_SHARE = 0.05
_MAX_TRIM = 0.30  # of each side: never trim a picture away

Plane = NDArray[np.float32]


def prepare_radiograph(image: NDArray[np.generic], size: int) -> Plane:
    """Return `image` (rows, columns) as float32 (size, size), mean 0 and deviation 1 where there is picture.

    Flat borders are trimmed, the rest is area-averaged to fit and centred on a square of zeros. A plane
    without contrast gives zeros. Raises ValueError for anything but a real, finite, 2-D, non-empty array.
    """
    _check(image, size)
    sample = _sample(image)
    low, high = _display_range(sample)
    if not high > low:
        return np.zeros((size, size), np.float32)
    rows, columns = _content(sample, image.shape, low, high)
    content = image[rows, columns]
    scale = size / max(content.shape)
    height, width = (max(1, round(n * scale)) for n in content.shape)
    small = _area_resize(content, height, width)
    if not np.isfinite(small).all():
        raise ValueError("the radiograph has values that are not finite")
    small = np.clip((small - low) / (high - low), 0, 1)
    deviation = float(small.std())
    square = np.zeros((size, size), np.float32)
    if deviation > 1e-6:
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = (small - small.mean()) / deviation
    return square


def prepare_xrv(image: NDArray[np.generic], size: int) -> Plane:
    """Return `image` (rows, columns) as float32 (size, size) in [-1024, 1024], as torchxrayvision takes it.

    The centred square is area-averaged to `size`; the darkest value of the picture becomes -1024, the brightest
    1024 (torchxrayvision divides by the largest value its files can hold, which says nothing of a 12-bit picture in
    16 bits). A plane without contrast gives -1024. Raises ValueError as `prepare_radiograph` does.
    """
    _check(image, size)
    sample = _sample(image)
    if not np.isfinite(sample).all():
        raise ValueError("the radiograph has values that are not finite")
    low, high = float(sample.min()), float(sample.max())
    if not high > low:
        return np.full((size, size), -1024, np.float32)
    side = min(image.shape)
    top, left = ((n - side) // 2 for n in image.shape)
    small = _area_resize(image[top : top + side, left : left + side], size, size)
    if not np.isfinite(small).all():
        raise ValueError("the radiograph has values that are not finite")
    return np.asarray((2 * np.clip((small - low) / (high - low), 0, 1) - 1) * 1024, np.float32)


def _check(image: NDArray[np.generic], size: int) -> None:
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"a radiograph is a non-empty 2-D array, got shape {image.shape}")
    if not np.issubdtype(image.dtype, np.integer) and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"a radiograph holds integers or floats, got {image.dtype}")
    if size < 8:
        raise ValueError(f"size must be at least 8, got {size}")


def _sample(image: NDArray[np.generic]) -> Plane:
    """About 256 x 256 pixels on a regular lattice."""
    steps = [max(1, n // _SAMPLES_PER_SIDE) for n in image.shape]
    return np.asarray(image[:: steps[0], :: steps[1]], np.float32)


def _display_range(sample: Plane) -> tuple[float, float]:
    if not np.isfinite(sample).all():
        raise ValueError("the radiograph has values that are not finite")
    ordered = np.sort(sample, axis=None)
    last = ordered.size - 1
    return float(ordered[int(_LOW_SHARE * last)]), float(ordered[int(_HIGH_SHARE * last)])


def _content(sample: Plane, shape: tuple[int, ...], low: float, high: float) -> tuple[slice, slice]:
    """The rows and columns left when blank lines are taken off the four sides.

    Flatness ignores the outer tenths of a line, where a blade at right angles or a marker may sit.
    """
    slices = []
    margin = _FLAT_SHARE * (high - low)
    for axis in (0, 1):
        lines = sample if axis == 0 else sample.T
        inner = np.sort(lines, axis=1)
        n = inner.shape[1] - 1
        tenth, ninth = inner[:, int(0.1 * n)], inner[:, int(0.9 * n)]
        blank = (ninth - tenth < margin) & ((ninth < low + margin) | (tenth > high - margin))
        blank[int(_MAX_TRIM * n) : -int(_MAX_TRIM * n) or None] = False
        before, after = int(np.argmin(blank)), int(np.argmin(blank[::-1]))
        step = shape[axis] / len(blank)
        slices.append(slice(round(before * step), shape[axis] - round(after * step)))
    return slices[0], slices[1]


def _area_resize(image: NDArray[np.generic], height: int, width: int) -> Plane:
    """Average over the source area of each target pixel (linear where the target is larger).

    Large sources are first summed in whole blocks of pixels, which leaves the exact weights a
    plane small enough for two dense products.
    """
    block = min(image.shape[0] // (2 * height), image.shape[1] // (2 * width))
    if block >= 2:
        image = _block_mean(image, block)
    plane = np.ascontiguousarray(image, np.float32)
    return np.asarray(_weights(plane.shape[0], height) @ plane @ _weights(plane.shape[1], width).T, np.float32)


def _block_mean(image: NDArray[np.generic], block: int) -> Plane:
    """Mean of block x block squares; a remainder of less than one block is shared by both edges."""
    rows, columns = (n // block for n in image.shape)
    top, left = ((n % block) // 2 for n in image.shape)
    kept = image[top : top + rows * block, left : left + columns * block]
    stripes = np.zeros((rows, columns * block), np.float32)
    for k in range(block):
        stripes += kept[k::block]
    total = np.zeros((rows, columns), np.float32)
    for k in range(block):
        total += stripes[:, k::block]
    total /= np.float32(block * block)
    return total


def _weights(source: int, target: int) -> Plane:
    """(target, source) rows summing to 1: overlap of pixels when shrinking, linear when growing."""
    ratio = source / target
    if ratio < 1:
        centre = np.clip((np.arange(target) + 0.5) * ratio - 0.5, 0, source - 1)
        weights = np.clip(1 - np.abs(centre[:, None] - np.arange(source)[None, :]), 0, None)
    else:
        start = np.arange(target)[:, None] * ratio
        pixel = np.arange(source)[None, :]
        weights = np.clip(np.minimum(start + ratio, pixel + 1) - np.maximum(start, pixel), 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
