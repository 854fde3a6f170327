"""What a package asks to be done to the values of a volume, in place, on any device. Imports torch.

Steps are given as in `model.yaml` (`manifest.IntensityStep`), as plain mappings. Semantics are those of MONAI's
ScaleIntensityRange, NormalizeIntensity and ScaleIntensity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_intensity"]


def apply_intensity(values: Tensor, intensity: Mapping[str, Any] | Sequence[Mapping[str, Any]], beyond: float) -> float:
    """Do every step to `values`, in place, and to `beyond`, a value that lies outside of the volume; returns that."""
    if isinstance(intensity, Mapping):
        (low, high), to = intensity["clip"], intensity["to"]
        intensity = [{"clip": [low, high]}, {"range": {"from": [low, high], "to": to, "clip": False}}]
    edge = torch.tensor([beyond], dtype=torch.float32, device=values.device)
    for step in intensity:
        name, arguments = next((name, value) for name, value in step.items() if value is not None)
        _STEPS[name](values, edge, arguments)
    return float(edge)


def _range(values: Tensor, edge: Tensor, arguments: Mapping[str, Any]) -> None:
    (low, high), (a, b) = arguments.get("from", arguments.get("source")), arguments["to"]
    for each in (values, edge):
        each.sub_(low).mul_((b - a) / (high - low)).add_(a)
        if arguments["clip"]:
            each.clamp_(min(a, b), max(a, b))


def _clip(values: Tensor, edge: Tensor, ends: Sequence[float]) -> None:
    for each in (values, edge):
        each.clamp_(ends[0], ends[1])


def _normalize(values: Tensor, edge: Tensor, arguments: Mapping[str, Any]) -> None:
    seen = values != 0 if arguments["nonzero"] else None
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
