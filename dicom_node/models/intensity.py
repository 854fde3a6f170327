"""What a package asks to be done to the values of a volume, on any device. Imports torch.

Steps are given as in `model.yaml` (`manifest.IntensityStep`), as plain mappings. Semantics are those of MONAI's
ScaleIntensityRange, NormalizeIntensity and ScaleIntensity; done to the stored slices, those of nnU-Net's
CTNormalization, ZScoreNormalization and RescaleTo01Normalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicom_node.models.components import holes

__all__ = ["StoredSlices", "apply_intensity"]

_Intensity = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_SLICES = {"cpu": 1, "cuda": 64}  # at a time: what fits a cache, what fills a GPU


def apply_intensity(values: Tensor, intensity: _Intensity, beyond: float) -> float:
    """Do every step to `values`, in place, and to `beyond`, a value that lies outside of the volume; returns that."""
    edge = torch.tensor([beyond], dtype=torch.float32, device=values.device)
    for name, arguments in _steps(intensity):
        _STEPS[name](values, edge, arguments)
    return float(edge)


def _steps(intensity: _Intensity) -> list[tuple[str, Any]]:
    if isinstance(intensity, Mapping):
        (low, high), to = intensity["clip"], intensity["to"]
        intensity = [{"clip": [low, high]}, {"range": {"from": [low, high], "to": to, "clip": False}}]
    return [next((name, value) for name, value in step.items() if value is not None) for step in intensity]


class StoredSlices:
    """The slices of `volume` (slice, row, column; int16 or float32) with every step done to them as they are stored.

    Called with indices, it gives those slices as float32 on `device`. Figures of the volume's own are worked out at
    once, some slices at a time, so that there is never a second volume. `beyond`: what a value outside becomes.
    """

    def __init__(
        self,
        volume: Tensor,
        intensity: _Intensity,
        beyond: float,
        device: torch.device,
        pulse: Callable[[], None],
    ) -> None:
        self._volume, self._device, self._pulse = volume, device, pulse
        self._done: list[tuple[str, Any]] = []
        steps = _steps(intensity)
        masked = any(name == "normalize" and arguments["nonzero"] for name, arguments in steps)
        # flat indices of the zeros that other values enclose: few, where a mask would be half a volume
        self._enclosed = torch.from_numpy(_enclosed_zeros(volume, pulse)) if masked else None
        for name, arguments in steps:
            self._done.append(self._fixed(name, arguments))
        edge = torch.tensor([beyond], dtype=torch.float32)
        for name, arguments in self._done:
            _STEPS[name](torch.empty(0), edge, arguments)
        self.beyond = float(edge)

    def __call__(self, used: list[int]) -> Tensor:
        """Slices `used`, ascending."""
        return self._made(used)[0]

    def _made(self, used: list[int]) -> tuple[Tensor, Tensor | None]:
        """The slices after the steps so far, and where the images show something, if a step asks for that."""
        first, last = used[0], used[-1]
        block = self._volume[first : last + 1] if last - first == len(used) - 1 else self._volume[used]
        values = block.to(self._device, torch.float32, copy=True, memory_format=torch.contiguous_format)
        shown = None if self._enclosed is None else self._shown(values, used)
        for name, arguments in self._done:
            if name == "normalize" and arguments["nonzero"]:
                _normalize(values, values[:0, 0, 0], arguments, shown)
            else:
                _STEPS[name](values, values[:0, 0, 0], arguments)
        return values, shown

    def _shown(self, values: Tensor, used: list[int]) -> Tensor:
        shown = values != 0
        assert self._enclosed is not None
        size = values[0].numel()
        ends = torch.searchsorted(self._enclosed, torch.tensor([[k * size, (k + 1) * size] for k in used]))
        for plane, k, (start, stop) in zip(shown, used, ends.tolist(), strict=True):
            plane.view(-1)[(self._enclosed[start:stop] - k * size).to(values.device)] = True
        return shown

    def _fixed(self, name: str, arguments: Any) -> tuple[str, Any]:
        """The step with figures in place of those that are the volume's own, after the steps so far."""
        if name == "minmax":
            figures = self._figures(nonzero=False)
            if figures.low == figures.high:
                return "clip", [figures.low * arguments["to"][0]] * 2
            return "range", {"from": [figures.low, figures.high], "to": arguments["to"], "clip": False}
        if name == "normalize" and (arguments["mean"] is None or arguments["std"] is None):
            figures = self._figures(nonzero=arguments["nonzero"])
            mean = figures.mean if arguments["mean"] is None else arguments["mean"]
            std = (figures.std or 1.0) if arguments["std"] is None else arguments["std"]
            return name, {**arguments, "mean": mean, "std": std}
        return name, arguments

    def _figures(self, *, nonzero: bool) -> _Figures:
        figures = _Figures()
        step = _SLICES[self._device.type]
        for start in range(0, len(self._volume), step):
            values, shown = self._made(list(range(start, min(start + step, len(self._volume)))))
            figures.add(values[shown] if nonzero and shown is not None else values)
            self._pulse()
        return figures


class _Figures:
    """Mean, standard deviation and ends of values that come in parts; 0 where none came."""

    def __init__(self) -> None:
        self.count, self.mean, self.low, self.high = 0, 0.0, math.inf, -math.inf
        self._squares = 0.0  # the sum of the squared distances from the mean

    def add(self, values: Tensor) -> None:
        """Some more of them."""
        if values.numel() == 0:
            return
        variance, mean = (float(figure) for figure in torch.var_mean(values.double(), correction=0))
        low, high = (float(end) for end in torch.aminmax(values))
        count, apart = self.count + values.numel(), mean - self.mean
        self._squares += variance * values.numel() + apart**2 * self.count * values.numel() / count
        self.mean += apart * values.numel() / count
        self.count, self.low, self.high = count, min(self.low, low), max(self.high, high)

    @property
    def std(self) -> float:
        """The standard deviation of all values there are, not an estimate from a sample."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0


def _enclosed_zeros(volume: Tensor, pulse: Callable[[], None]) -> npt.NDArray[np.intp]:
    """Flat indices, ascending, of the zeros that no path along zeros leads to from the border."""

    def planes() -> Iterator[npt.NDArray[np.bool_]]:
        for plane in volume:
            pulse()
            yield plane.numpy() == 0

    depth, rows, columns = volume.shape
    return holes((depth, rows, columns), planes())


def _range(values: Tensor, edge: Tensor, arguments: Mapping[str, Any]) -> None:
    (low, high), (a, b) = arguments.get("from", arguments.get("source")), arguments["to"]
    for each in (values, edge):
        each.sub_(low).mul_((b - a) / (high - low)).add_(a)
        if arguments["clip"]:
            each.clamp_(min(a, b), max(a, b))


def _clip(values: Tensor, edge: Tensor, ends: Sequence[float]) -> None:
    for each in (values, edge):
        each.clamp_(ends[0], ends[1])


def _normalize(values: Tensor, edge: Tensor, arguments: Mapping[str, Any], shown: Tensor | None = None) -> None:
    """`shown`: what takes part where zeros do not; else what is not 0."""
    seen = (values != 0 if shown is None else shown) if arguments["nonzero"] else None
    mean, std = arguments["mean"], arguments["std"]
    if mean is None or std is None:
        own = values.double() if seen is None else values[seen].double()
        if own.numel() == 0:
            return
        mean = float(own.mean()) if mean is None else mean
        std = float(own.std(correction=0)) if std is None else std
    std = std or 1.0
    zero = None if seen is None else edge != 0
    for each, chosen in ((values, seen), (edge, zero)):
        changed = each.sub(mean).div_(std)
        each.copy_(changed if chosen is None else torch.where(chosen, changed, each))


def _minmax(values: Tensor, edge: Tensor, arguments: Mapping[str, Any]) -> None:
    a, b = arguments["to"]
    low, high = float(values.min()), float(values.max())
    for each in (values, edge):
        if low == high:
            each.mul_(a)
        else:
            each.sub_(low).mul_((b - a) / (high - low)).add_(a)


_STEPS: Mapping[str, Callable[[Tensor, Tensor, Any], None]] = {
    "range": _range,
    "clip": _clip,
    "normalize": _normalize,
    "minmax": _minmax,
}
