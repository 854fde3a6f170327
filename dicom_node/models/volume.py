"""A volume through a segmentation network, on the device from end to end: int16 HU in, labels of its own grid out.

Runs inside the runtime process (imports torch): resampling, intensity, cropping, windows, cleaning up, the way back.
`segment.volume_job` writes what is to be done; here it is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dicom_node.errors import EngineError
from dicom_node.models.components import Pieces, pieces
from dicom_node.models.grid import ModelGrid
from dicom_node.models.intensity import StoredSlices, apply_intensity
from dicom_node.models.sampling import first_largest, labels_on_source, sample
from dicom_node.models.windows import through_windows

__all__ = ["Done", "labels_of", "network_rows", "network_values", "segment_volume"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one request came to. `outputs`: how many classes the network has. `seconds` by stage."""

    output: npt.NDArray[np.float32] | npt.NDArray[np.uint8]
    windows: int
    outputs: int
    seconds: Mapping[str, float]


_Box = tuple[slice, slice, slice]  # of the network's grid, in source axis order


class _Network(Protocol):
    def __call__(self, batch: Tensor) -> Tensor: ...

    def batch_size(self, infer: Mapping[str, Any], count: int) -> int: ...


@torch.inference_mode()
def segment_volume(
    network: _Network,
    volume: Tensor,
    infer: Mapping[str, Any],
    job: Mapping[str, Any],
    device: torch.device,
    pulse: Callable[[], None],
) -> Done:
    """Labels (slice, row, column; uint8) of `volume` (the same; int16 or float32).

    `job` has `grid` (ModelGrid.to_message), `input` and `output` (the blocks of the manifest, `labels` with their
    index, keep, connectivity and min_ml). Raises EngineError: output not finite, or fewer classes than the labels need.
    """
    clock = _Clock(device)
    whole, wanted, output = ModelGrid.from_message(job["grid"]), job["input"], job["output"]
    crop_first = wanted.get("first") == "crop"
    shown = _foreground(volume, wanted["crop"] if crop_first else None)
    grid = whole.cut(shown)
    values, beyond = network_values(volume[shown], grid, wanted, device, pulse)
    box = _foreground(values, None if crop_first else wanted["crop"])
    clock.lap("prepare")
    beyond = infer["pad_value"] if infer["pad_value"] is not None else beyond
    order = grid.to_model_order()
    rows, outputs, windows = network_rows(
        network, values.permute(order)[_ordered(box, order)], infer, output, beyond, pulse
    )
    del values
    _require_sound(rows, outputs, output)
    clock.lap("forward")
    labels = _around(labels_of(rows, grid, output, box, pulse), shown, whole.source_shape)
    clock.lap("finish")
    return Done(output=labels, windows=windows, outputs=max(outputs, 2), seconds=clock.seconds)


def network_rows(
    network: _Network,
    values: Tensor,
    infer: Mapping[str, Any],
    output: Mapping[str, Any],
    beyond: float,
    pulse: Callable[[], None],
) -> tuple[Tensor, int, int]:
    """What the network says of `values` (X, Y, Z): (row, X, Y, Z), how many classes it has, and the number of windows.

    A row is the logits of a class; of two classes there is one row, by how much class 1 leads, where that decides.
    """
    outputs = 0

    def narrowed(batch: Tensor) -> Tensor:
        nonlocal outputs
        logits = network(batch)
        outputs = logits.shape[1]
        return _lead(logits) if _by_lead(outputs, output) else logits

    rows, windows = through_windows(
        narrowed, values, infer, beyond=beyond, batch=lambda count: network.batch_size(infer, count), pulse=pulse
    )
    return rows, outputs, windows


def labels_of(
    rows: Tensor, grid: ModelGrid, output: Mapping[str, Any], box: _Box, pulse: Callable[[], None]
) -> npt.NDArray[np.uint8]:
    """Labels (slice, row, column) of the source grid from what the network said of `box`, `network_rows`."""
    order = grid.to_source_order()
    planes = _Planes(rows.permute(0, *(axis + 1 for axis in order)), box, grid.shape, output)
    planes.clean_up(output["labels"], grid, pulse)
    labels = labels_on_source(
        planes, grid, rows.device, inverse=output["inverse"], inclusive=planes.inclusive, pulse=pulse
    )
    _only_named(labels, output["labels"], len(rows))
    return labels


class _Clock:
    """Seconds between laps; waits for the device, so that each stage is charged with its own work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def network_values(
    volume: Tensor, grid: ModelGrid, wanted: Mapping[str, Any], device: torch.device, pulse: Callable[[], None]
) -> tuple[Tensor, float]:
    """What the network is to see, on its grid in source axis order, and the value that lies beyond it.

    Where `wanted` is to be cut first, `volume` and `grid` are those of the box already.
    """
    padding = wanted["padding_hu"] if wanted["padding_hu"] is not None else float(volume.min())
    if wanted.get("first") == "crop":
        slices = StoredSlices(volume, wanted["intensity"], padding, device, pulse)
        return sample(volume, grid, device, slices.beyond, pulse, slices), slices.beyond
    values = sample(volume, grid, device, padding, pulse)
    return values, apply_intensity(values, wanted["intensity"], padding)


def _foreground(values: Tensor, crop: Mapping[str, Any] | None) -> _Box:
    """The box around the values that count (all, where none do), with its margin."""
    box = [slice(0, n) for n in values.shape]
    if crop is not None:
        within = values
        for axis, length in enumerate(values.shape):
            # from either end, so that what is full costs its six faces
            planes = within.movedim(axis, 0)
            low = next((k for k in range(length) if _counts(planes[k], crop)), None)
            if low is None:
                break
            high = next(k for k in reversed(range(length)) if _counts(planes[k], crop))
            within = within.narrow(axis, low, high + 1 - low)
            box[axis] = slice(max(low - crop["margin"], 0), min(high + 1 + crop["margin"], length))
    return box[0], box[1], box[2]


def _counts(plane: Tensor, crop: Mapping[str, Any]) -> bool:
    return bool((plane != 0 if crop.get("nonzero") else plane > crop["above"]).any())


def _around(labels: npt.NDArray[np.uint8], box: _Box, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """`labels` of `box` in a volume of `shape`, background around them."""
    if labels.shape == shape:
        return labels
    whole = np.zeros(shape, np.uint8)
    whole[box] = labels
    return whole


def _ordered(box: _Box, axes: Sequence[int]) -> _Box:
    return box[axes[0]], box[axes[1]], box[axes[2]]


def _require_sound(rows: Tensor, outputs: int, output: Mapping[str, Any]) -> None:
    if not torch.isfinite(rows.sum()):  # NaN and infinities survive a sum, which costs a tenth of asking each voxel
        raise EngineError("the network's output is not finite (NaN or infinity)")
    needed = max(label["index"] for label in output["labels"])
    if output["decide"] == "argmax" and outputs <= needed:
        raise EngineError(f"the network has {outputs} outputs, the package names class {needed}")
    if output["decide"] != "argmax" and (outputs != 1 or needed != 1):
        raise EngineError(f"a threshold decides a single output for class 1; the network has {outputs} outputs")


def _by_lead(outputs: int, output: Mapping[str, Any]) -> bool:
    """Whether the difference of the two classes is all that decides: blending and interpolation keep differences."""
    return outputs == 2 and output["decide"] == "argmax" and output["activation"] != "sigmoid"


def _lead(logits: Tensor) -> Tensor:
    return logits[:, 1:] - logits[:, :1]


_BLOCK = 16  # planes: a cache line of float32


class _Planes:
    """What decides, plane by plane along the slices: (class, row, column), activated, on the whole grid.

    A single row is the lead of class 1: of two classes, or of a single output over its threshold. As in MONAI's
    inverse, what was cropped away has no score at all: where the largest decides, a voxel between the two follows its
    inner neighbours.
    """

    def __init__(self, rows: Tensor, box: _Box, shape: tuple[int, int, int], output: Mapping[str, Any]) -> None:
        if len(rows) == 2 and _by_lead(2, output):
            rows = _lead(rows[None])[0]
        self._rows, self._box, self._shape = rows, box, shape
        self._activation, self._decide = output["activation"], output["decide"]
        # on the network's own grid the largest stays the largest, activated or not
        self._raw = output["inverse"] == "labels" and self._decide == "argmax"
        self.inclusive = self._decide != "argmax"
        self._dropped: Tensor | None = None
        self._block, self._fetched = -1, rows[:, :0]
        pads = [(s.start, n - s.stop) for s, n in zip(box[:0:-1], shape[:0:-1], strict=True)]
        self._pads = [amount for pair in pads for amount in pair]

    def __call__(self, k: int) -> Tensor:
        """Plane `k` of the grid."""
        beyond = -float(self._decide) if self.inclusive else 0.0
        if not self._box[0].start <= k < self._box[0].stop:
            return self._rows.new_full((len(self._rows), *self._shape[1:]), beyond)
        plane = self._activated(self._plane(k - self._box[0].start))
        if any(self._pads):
            plane = functional.pad(plane, self._pads, value=beyond)
        if self._dropped is not None and self._dropped[k].any():
            for row, value in zip(plane, self._background(), strict=True):
                row.masked_fill_(self._dropped[k], value)
        return plane

    def _plane(self, k: int) -> Tensor:
        """Rows of one plane. The slices may be what lies innermost in memory: some are fetched at a time."""
        block, within = divmod(k, _BLOCK)
        if block != self._block:
            self._block = block
            self._fetched = self._rows[:, block * _BLOCK : (block + 1) * _BLOCK].contiguous()
        return self._fetched[:, within]

    def _activated(self, rows: Tensor) -> Tensor:
        """A copy: the probabilities of one plane, their difference where there is a lead, less the threshold."""
        if self._raw:
            return rows.clone(memory_format=torch.contiguous_format)
        if self.inclusive:
            return (rows.sigmoid() if self._activation == "sigmoid" else rows.clone()).sub_(self._decide)
        if self._activation == "softmax":
            return rows.div(2).tanh_() if len(rows) == 1 else rows.softmax(dim=0)
        return rows.sigmoid() if self._activation == "sigmoid" else rows.clone(memory_format=torch.contiguous_format)

    def _background(self) -> list[float]:
        if len(self._rows) == 1:
            return [-float(self._decide) if self.inclusive else -1.0]
        return [math.inf if self._raw else 1.0, *[0.0] * (len(self._rows) - 1)]

    def clean_up(self, labels: Sequence[Mapping[str, Any]], grid: ModelGrid, pulse: Callable[[], None]) -> None:
        """From now on unwanted pieces of each label, judged on the network's `grid`, are background.

        Of equally large pieces the last along the network's axes is the largest: MONAI turns a sorted list round.
        """
        cleaned = [label for label in labels if label["keep"] != "all" or label["min_ml"] > 0]
        if not cleaned:
            return
        coarse = np.empty(self._shape, np.uint8)
        for k in range(len(coarse)):
            pulse()
            coarse[k] = first_largest(self(k), self.inclusive).cpu().numpy()
        seen = coarse.transpose(grid.to_model_order())
        voxel_ml = float(np.prod(grid.spacing_mm)) / 1000.0
        dropped = np.zeros(seen.shape, np.bool_)
        for connectivity in sorted({label["connectivity"] for label in cleaned}):
            alike = [label for label in cleaned if label["connectivity"] == connectivity]
            found = pieces(seen, [label["index"] for label in alike], connectivity, pulse)
            dropped |= found.mask(_unwanted(found, alike, voxel_ml))
        turned = np.ascontiguousarray(dropped.transpose(grid.to_source_order()))
        self._dropped = torch.from_numpy(turned).to(self._rows.device)


def _unwanted(found: Pieces, labels: Sequence[Mapping[str, Any]], voxel_ml: float) -> npt.NDArray[np.bool_]:
    """For each piece whether its label does not keep it."""
    least, one = np.zeros(256), np.zeros(256, np.bool_)
    for label in labels:
        least[label["index"]], one[label["index"]] = label["min_ml"], label["keep"] == "largest_component"
    dropped: npt.NDArray[np.bool_] = found.sizes * voxel_ml < least[found.labels]
    return dropped | (one[found.labels] & ~found.largest())


def _only_named(labels: npt.NDArray[np.uint8], named: Sequence[Mapping[str, Any]], outputs: int) -> None:
    """Classes that the package has no label for are background."""
    unnamed = sorted(set(range(1, max(outputs, 2))) - {label["index"] for label in named})
    if unnamed:
        table = np.arange(256, dtype=np.uint8)
        table[unnamed] = 0
        np.take(table, labels, out=labels)
