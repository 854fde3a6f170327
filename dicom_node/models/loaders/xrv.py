"""DenseNet121 of torchxrayvision, built here: its key names, its sigmoid, its calibration at the operating points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dicom_node.errors import PackageError
from dicom_node.models.loaders.checkpoint import read_checkpoint, state_dict_of
from dicom_node.models.loaders.content import checked_content
from dicom_node.models.loaders.state_dict import filled

__all__ = ["DenseNet121", "load", "operating_point_norm"]

_BLOCKS, _FIRST, _GROWTH, _BOTTLENECK = (6, 12, 24, 16), 64, 32, 4


def load(path: Path, source: Mapping[str, Any]) -> nn.Module:
    """The network in evaluation mode on the CPU, giving probabilities if `source.thresholds` are given, else logits.

    Raises PackageError.
    """
    content = checked_content(path, source)
    tensors = state_dict_of(read_checkpoint(content, str(path)), str(path))
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    tensors.pop("op_threshs", None)  # the manifest has them
    weight = tensors.get("classifier.weight")
    if weight is None or weight.ndim != 2:
        raise PackageError(f"{path}: is no DenseNet of torchxrayvision: it has no classifier.weight")
    thresholds = source.get("thresholds") or ()
    if len(thresholds) not in (0, len(weight)):
        raise PackageError(f"source.thresholds: {len(thresholds)} values for the {len(weight)} outputs of {path.name}")
    network = filled(lambda: DenseNet121(len(weight)), tensors, path)
    if not thresholds:
        return network
    given = torch.tensor([float("nan") if value is None else float(value) for value in thresholds])
    return _Calibrated(network, given).eval().requires_grad_(False)


class DenseNet121(nn.Module):
    """Densely connected network with 121 layers (Huang et al., 2017) for one channel: (batch, 1, ...) to logits."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(1, _FIRST, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(_FIRST))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        channels = _FIRST
        for number, layers in enumerate(_BLOCKS, start=1):
            block = nn.Sequential()
            for layer in range(1, layers + 1):
                block.add_module(f"denselayer{layer}", _DenseLayer(channels))
                channels += _GROWTH
            self.features.add_module(f"denseblock{number}", block)
            if number < len(_BLOCKS):
                self.features.add_module(f"transition{number}", _transition(channels))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, output)."""
        features = functional.relu(self.features(images))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class _DenseLayer(nn.Module):
    """Adds `_GROWTH` channels to those it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, _BOTTLENECK * _GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK * _GROWTH)
        self.conv2 = nn.Conv2d(_BOTTLENECK * _GROWTH, _GROWTH, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        narrow = self.conv1(functional.relu(self.norm1(features)))
        return torch.cat([features, self.conv2(functional.relu(self.norm2(narrow)))], dim=1)


def _transition(channels: int) -> nn.Sequential:
    made = nn.Sequential()
    made.add_module("norm", nn.BatchNorm2d(channels))
    made.add_module("relu", nn.ReLU(inplace=True))
    made.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
    made.add_module("pool", nn.AvgPool2d(2, stride=2))
    return made


class _Calibrated(nn.Module):
    def __init__(self, network: nn.Module, thresholds: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("thresholds", thresholds)

    def forward(self, images: Tensor) -> Tensor:
        return operating_point_norm(torch.sigmoid(self.network(images).float()), self.get_buffer("thresholds"))


def operating_point_norm(probability: Tensor, thresholds: Tensor) -> Tensor:
    """`probability` (batch, output) bent in two straight lines so that each output's threshold becomes 0.5.

    An output whose threshold is NaN was not trained: it is 0.5.
    """
    below = probability / (2 * thresholds)
    above = 1 - (1 - probability) / (2 * (1 - thresholds))
    bent = torch.where(probability < thresholds, below, above)
    return torch.where(thresholds.isnan(), torch.full_like(bent, 0.5), bent)
