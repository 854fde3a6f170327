"""The U-Nets of nnU-Net v2, built from the plain arguments of plans.json, with the key names of its checkpoints.

PlainConvUNet (Isensee et al., 2021) and ResidualEncoderUNet (Isensee et al., 2024), three-dimensional, for inference:
no dropout, and of the heads for deep supervision only the full-size one. A package names operations by their class
names out of short lists; nothing is imported by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicom_node.errors import PackageError

__all__ = ["NnunetNetwork", "build_network", "used_weights"]

_NORMS: Mapping[str, Callable[..., nn.Module]] = {
    "InstanceNorm3d": nn.InstanceNorm3d,
    "BatchNorm3d": nn.BatchNorm3d,
}
_NONLINEAR: Mapping[str, Callable[..., nn.Module]] = {
    "LeakyReLU": nn.LeakyReLU,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "ELU": nn.ELU,
}
_MAX_STAGES = 12

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """How every block of one network is made."""

    bias: bool
    norm: Callable[[int], nn.Module] | None
    nonlinear: Callable[[], nn.Module] | None
    nonlinear_first: bool


def build_network(name: str, arguments: Mapping[str, Any]) -> NnunetNetwork:
    """The network with random weights. Raises PackageError for arguments it cannot be built from."""
    try:
        return NnunetNetwork(name, arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise PackageError(f"source.network.args: {name} refuses them: {type(exc).__name__} {str(exc)[:300]}") from exc


def used_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What inference needs of a checkpoint: without the second names of the same tensors and the lesser heads."""
    kept: dict[str, Tensor] = {}
    heads = [int(name.split(".")[2]) for name in tensors if name.startswith("decoder.seg_layers.")]
    head = f"decoder.seg_layers.{max(heads, default=0)}."
    for name, tensor in tensors.items():
        lesser = name.startswith("decoder.seg_layers.") and not name.startswith(head)
        if not (lesser or name.startswith("decoder.encoder.") or ".all_modules." in name):
            kept[name] = tensor
    return kept


class NnunetNetwork(nn.Module):
    """(batch, channel, *volume) to logits (batch, class, *volume); sizes must be multiples of all strides."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        features = [int(n) for n in _listed(arguments["features_per_stage"], None)]
        if not 2 <= len(features) <= _MAX_STAGES:
            raise ValueError(f"expected 2 to {_MAX_STAGES} stages")
        kernels = [_triple(kernel) for kernel in _listed(arguments["kernel_sizes"], len(features))]
        strides = [_triple(stride) for stride in _listed(arguments["strides"], len(features))]
        layers = _layers(arguments)
        channels = int(arguments["input_channels"])
        if name == "PlainConvUNet":
            counts = _listed(arguments["n_conv_per_stage"], len(features))
            self.encoder: nn.Module = _PlainEncoder(channels, features, kernels, strides, counts, layers)
        elif name == "ResidualEncoderUNet":
            counts = _listed(arguments["n_blocks_per_stage"], len(features))
            stem = int(arguments.get("stem_channels") or features[0])
            narrow = _bottlenecks(arguments, len(features))
            self.encoder = _ResidualEncoder(channels, stem, features, kernels, strides, counts, narrow, layers)
        else:
            raise ValueError("is no network of nnU-Net that is built here")
        counts = _listed(arguments["n_conv_per_stage_decoder"], len(features) - 1)
        self.decoder = _Decoder(features, kernels, strides, counts, int(arguments["num_classes"]), layers)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits at full size."""
        logits: Tensor = self.decoder(self.encoder(volume))
        return logits


def _listed(value: Any, count: int | None) -> list[Any]:
    """`value` for each stage; one that stands for all is repeated."""
    values = list(value) if isinstance(value, list | tuple) else [value] * (count or 0)
    if count is not None and len(values) != count:
        raise ValueError(f"expected one value or {count}, got {len(values)}")
    return values


def _triple(value: Any) -> Triple:
    sizes = tuple(int(n) for n in (value if isinstance(value, list | tuple) else [value] * 3))
    if len(sizes) != 3 or not all(1 <= n <= 16 for n in sizes):
        raise ValueError("expected three sizes from 1 to 16; two-dimensional networks are not run")
    return sizes[0], sizes[1], sizes[2]


def _bottlenecks(arguments: Mapping[str, Any], stages: int) -> list[int | None]:
    block = str(arguments.get("block") or "BasicBlockD")
    if block == "BasicBlockD":
        return [None] * stages
    if block != "BottleneckD":
        raise ValueError(f"block {block[:40]!r} is not one of BasicBlockD, BottleneckD")
    return [int(n) for n in _listed(arguments["bottleneck_channels"], stages)]


def _layers(arguments: Mapping[str, Any]) -> _Layers:
    norm = _chosen(arguments, "norm_op", _NORMS, {"eps", "affine", "momentum", "track_running_stats"})
    nonlinear = _chosen(arguments, "nonlin", _NONLINEAR, {"inplace", "negative_slope", "approximate", "alpha"})
    return _Layers(
        bias=bool(arguments.get("conv_bias", False)),
        norm=norm,
        nonlinear=nonlinear,
        nonlinear_first=bool(arguments.get("nonlin_first", False)),
    )


def _chosen(
    arguments: Mapping[str, Any], key: str, known: Mapping[str, Callable[..., nn.Module]], allowed: set[str]
) -> Callable[..., nn.Module] | None:
    name = arguments.get(key)
    if name is None:
        return None
    given = dict(arguments.get(f"{key}_kwargs") or {})
    if name not in known or not given.keys() <= allowed:
        raise ValueError(f"{key}: {str(name)[:40]!r} with these arguments is not one of {', '.join(sorted(known))}")
    maker = known[name]
    return lambda *sizes: maker(*sizes, **given)


class _ConvBlock(nn.Module):
    """Convolution, norm, activation; the last two where they are wanted."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: Triple,
        stride: Triple,
        layers: _Layers,
        *,
        bias: bool,
        active: bool = True,
    ) -> None:
        super().__init__()
        padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        self.conv = nn.Conv3d(inner, outer, kernel, stride, padding, bias=bias)
        self.norm = layers.norm(outer) if layers.norm is not None else nn.Identity()
        self.nonlin = layers.nonlinear() if layers.nonlinear is not None and active else nn.Identity()
        self.nonlinear_first = layers.nonlinear_first

    def forward(self, features: Tensor) -> Tensor:
        found = self.conv(features)
        first, second = (self.nonlin, self.norm) if self.nonlinear_first else (self.norm, self.nonlin)
        result: Tensor = second(first(found))
        return result


class _Convs(nn.Module):
    """Several blocks, the first of which changes channels and resolution."""

    def __init__(self, count: Any, inner: int, outer: int, kernel: Triple, stride: Triple, layers: _Layers) -> None:
        super().__init__()
        blocks = [_ConvBlock(inner, outer, kernel, stride, layers, bias=layers.bias)]
        for _ in range(1, int(count)):
            blocks.append(_ConvBlock(outer, outer, kernel, (1, 1, 1), layers, bias=layers.bias))
        self.convs = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.convs(features)
        return found


class _Residual(nn.Module):
    """Two blocks, or three with fewer channels in the middle, beside a shortcut (ResNet-D)."""

    def __init__(
        self, inner: int, outer: int, narrow: int | None, kernel: Triple, stride: Triple, layers: _Layers
    ) -> None:
        super().__init__()
        one, same = (1, 1, 1), dict[str, Any](bias=layers.bias)
        if narrow is None:
            self.conv1 = _ConvBlock(inner, outer, kernel, stride, layers, **same)
            self.conv2 = _ConvBlock(outer, outer, kernel, one, layers, active=False, **same)
        else:
            self.conv1 = _ConvBlock(inner, narrow, one, one, layers, **same)
            self.conv2 = _ConvBlock(narrow, narrow, kernel, stride, layers, **same)
            self.conv3 = _ConvBlock(narrow, outer, one, one, layers, active=False, **same)
        shortcut: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride != one else []
        if inner != outer:
            shortcut.append(_ConvBlock(inner, outer, one, one, layers, bias=False, active=False))
        self.skip = nn.Sequential(*shortcut)
        self.last = layers.nonlinear() if layers.nonlinear is not None else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        found = self.conv2(self.conv1(features))
        if hasattr(self, "conv3"):
            found = self.conv3(found)
        result: Tensor = self.last(found + self.skip(features))
        return result


class _Residuals(nn.Module):
    def __init__(
        self, count: Any, inner: int, outer: int, narrow: int | None, kernel: Triple, stride: Triple, layers: _Layers
    ) -> None:
        super().__init__()
        blocks = [_Residual(inner, outer, narrow, kernel, stride, layers)]
        for _ in range(1, int(count)):
            blocks.append(_Residual(outer, outer, narrow, kernel, (1, 1, 1), layers))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.blocks(features)
        return found


class _PlainEncoder(nn.Module):
    def __init__(
        self,
        channels: int,
        features: Sequence[int],
        kernels: Sequence[Triple],
        strides: Sequence[Triple],
        counts: Sequence[Any],
        layers: _Layers,
    ) -> None:
        super().__init__()
        inner = [channels, *features]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Convs(counts[s], inner[s], features[s], kernels[s], strides[s], layers))
                for s in range(len(features))
            )
        )

    def forward(self, volume: Tensor) -> list[Tensor]:
        return _each(self.stages, volume)


class _ResidualEncoder(nn.Module):
    def __init__(
        self,
        channels: int,
        stem: int,
        features: Sequence[int],
        kernels: Sequence[Triple],
        strides: Sequence[Triple],
        counts: Sequence[Any],
        narrow: Sequence[int | None],
        layers: _Layers,
    ) -> None:
        super().__init__()
        self.stem = _Convs(1, channels, stem, kernels[0], (1, 1, 1), layers)
        inner = [stem, *features]
        self.stages = nn.Sequential(
            *(
                _Residuals(counts[s], inner[s], features[s], narrow[s], kernels[s], strides[s], layers)
                for s in range(len(features))
            )
        )

    def forward(self, volume: Tensor) -> list[Tensor]:
        return _each(self.stages, self.stem(volume))


def _each(stages: nn.Sequential, features: Tensor) -> list[Tensor]:
    """What comes out of every stage, the finest first."""
    found = []
    for stage in stages:
        features = stage(features)
        found.append(features)
    return found


class _Decoder(nn.Module):
    """From the coarsest stage up, each joined with what the encoder had at that size."""

    def __init__(
        self,
        features: Sequence[int],
        kernels: Sequence[Triple],
        strides: Sequence[Triple],
        counts: Sequence[Any],
        classes: int,
        layers: _Layers,
    ) -> None:
        super().__init__()
        transposed, stages = [], []
        for s in range(len(features) - 1, 0, -1):
            below, skip = features[s], features[s - 1]
            transposed.append(nn.ConvTranspose3d(below, skip, strides[s], strides[s], bias=layers.bias))
            count = counts[len(features) - 1 - s]
            stages.append(_Convs(count, 2 * skip, skip, kernels[s - 1], (1, 1, 1), layers))
        self.transpconvs = nn.ModuleList(transposed)
        self.stages = nn.ModuleList(stages)
        # the last of a list whose others served training only
        self.seg_layers = nn.ModuleDict({str(len(stages) - 1): nn.Conv3d(features[0], classes, 1)})

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        features = skips[-1]
        for upward, stage, skip in zip(self.transpconvs, self.stages, reversed(skips[:-1]), strict=True):
            features = stage(torch.cat((upward(features), skip), dim=1))
        (head,) = self.seg_layers.values()
        logits: Tensor = head(features)
        return logits
