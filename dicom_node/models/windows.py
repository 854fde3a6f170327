"""Sliding windows over a volume, as MONAI's sliding_window_inference: where they lie, how their outputs are blended.

Runs inside the runtime process (imports torch); `forward` brings the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dicom_node.errors import EngineError

__all__ = ["even_starts", "through_windows", "window_starts"]

_TILE = 16  # voxels: a cache line of float32
_SIGMA_SHARE = 0.125  # of the window, as in MONAI's sliding_window_inference


def through_windows(
    network: Callable[[Tensor], Tensor],
    volume: Tensor,
    infer: Mapping[str, Any],
    *,
    beyond: float,
    batch: Callable[[int], int],
    pulse: Callable[[], None],
) -> tuple[Tensor, int]:
    """What `network` makes of `volume` (X, Y, Z): (class, X, Y, Z), and the number of windows.

    Windows lie on a regular lattice with `infer` overlap, the last of each axis flush with the end, outputs blended; a
    volume smaller than the window is filled up evenly. `batch` says how many windows of a given number go at a time;
    `pulse` is called before each batch.
    """
    window = infer["window"] or list(volume.shape)
    before = [max(0, (w - n) // 2) for w, n in zip(window, volume.shape, strict=True)]
    after = [max(0, w - n - b) for w, n, b in zip(window, volume.shape, before, strict=True)]
    pads = [amount for b, a in zip(reversed(before), reversed(after), strict=True) for amount in (b, a)]
    padded = _contiguous(_padded(volume, pads, infer["edge"], beyond))
    start = even_starts if infer["blend"] == "nnunet" else window_starts
    starts = (start(n, w, infer["overlap"]) for n, w in zip(padded.shape, window, strict=True))
    places = [
        tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True)) for corner in itertools.product(*starts)
    ]
    blended = _blended(network, padded, places, {**infer, "window": window}, batch(len(places)), pulse)
    inner = (slice(b, b + n) for b, n in zip(before, volume.shape, strict=True))
    return blended[(slice(None), *inner)], len(places)


def _padded(volume: Tensor, pads: Sequence[int], edge: str, beyond: float) -> Tensor:
    if not any(pads):
        return volume
    if edge == "replicate":
        return functional.pad(volume[None, None], pads, mode="replicate")[0, 0]
    return functional.pad(volume, pads, value=beyond)


def _contiguous(volume: Tensor) -> Tensor:
    """Windows overlap, so the axes are put in order once instead of in each of them."""
    if volume.is_contiguous() or volume.device.type != "cpu":
        return volume.contiguous()
    ordered = torch.empty(volume.shape, dtype=volume.dtype)
    for x in range(0, volume.shape[0], _TILE):
        for z in range(0, volume.shape[2], _TILE):
            tile = slice(x, x + _TILE), slice(None), slice(z, z + _TILE)
            ordered[tile] = volume[tile]
    return ordered


def _blended(
    network: Callable[[Tensor], Tensor],
    volume: Tensor,
    places: Sequence[tuple[slice, ...]],
    infer: Mapping[str, Any],
    size: int,
    pulse: Callable[[], None],
) -> Tensor:
    """The weighted mean of all windows' outputs, (class, *volume.shape)."""
    gaussian = infer["blend"] != "constant" and len(places) > 1
    make = _nnunet_weight if infer["blend"] == "nnunet" else _weight
    weight = make(infer["window"]).to(volume.device) if gaussian else None
    # without a Gaussian the weights are counts, and those of a lattice are a product of its axes
    weights = torch.zeros(volume.shape, device=volume.device) if gaussian else _counts(volume, places)
    total: Tensor | None = None
    batch = torch.empty((size, 1, *infer["window"]), dtype=volume.dtype, device=volume.device)  # one for all
    for start in range(0, len(places), size):
        pulse()
        chosen = places[start : start + size]
        for k in range(size):  # full batches only: shapes, and with them the kernels, stay the same
            batch[k, 0] = volume[chosen[min(k, len(chosen) - 1)]]
        outputs = _mirrored(network, batch, infer["mirror"])
        if outputs.shape[2:] != batch.shape[2:]:
            raise EngineError(f"the network maps windows {tuple(batch.shape[2:])} to {tuple(outputs.shape[2:])}")
        if total is None:
            total = torch.zeros((outputs.shape[1], *volume.shape), device=volume.device)
        if weight is not None:
            outputs = outputs.mul_(weight)
        for place, one in zip(chosen, outputs, strict=False):
            total[(slice(None), *place)].add_(one)
            if weight is not None:
                weights[place].add_(weight)
    assert total is not None
    return total.div_(weights)


def _counts(volume: Tensor, places: Sequence[tuple[slice, ...]]) -> Tensor:
    """How many windows see each voxel; broadcasts over `volume`."""
    counts = torch.ones((1, 1, 1), device=volume.device)
    for axis, length in enumerate(volume.shape):
        along = torch.zeros(length, device=volume.device)
        for start, stop in {(place[axis].start, place[axis].stop) for place in places}:
            along[start:stop] += 1
        shape = [1, 1, 1]
        shape[axis] = length
        counts = counts * along.view(shape)
    return counts


def _mirrored(network: Callable[[Tensor], Tensor], batch: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over the batch and its reversals along every combination of `axes` (of X, Y, Z)."""
    outputs = network(batch)
    if not axes:
        return outputs
    combinations = [c for n in range(1, len(axes) + 1) for c in itertools.combinations([a + 2 for a in axes], n)]
    for combination in combinations:
        outputs = outputs + network(batch.flip(combination)).flip(combination)
    return outputs / (len(combinations) + 1)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis (as MONAI's dense_patch_slices)."""
    step = max(1, int(window * (1 - overlap)))
    count = 1 + max(0, -(-(length - window) // step))
    return [min(k * step, length - window) for k in range(count)]


def even_starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis, spread evenly from end to end (as nnU-Net does)."""
    steps = math.ceil((length - window) / (window * (1 - overlap)))
    return [round(k * ((length - window) / steps)) for k in range(steps + 1)] if steps > 0 else [0]


def _nnunet_weight(window: Sequence[int]) -> Tensor:
    """Of each voxel of a window: nnU-Net's Gaussian around the voxel in the middle, without a floor."""
    weight = torch.ones(())
    for size in window:
        at = torch.arange(size) - size // 2
        weight = weight[..., None] * torch.exp(-(at**2) / (2 * (_SIGMA_SHARE * size) ** 2))
    return weight


def _weight(window: Sequence[int]) -> Tensor:
    """Of each voxel of a window: a Gaussian that is never less than a thousandth."""
    weight = torch.ones(())
    for size in window:
        at = torch.arange(size) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-(at**2) / (2 * (_SIGMA_SHARE * size) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))
