"""Inside the runtime process: load a network, run it over windows or images. Imports torch; knows no DICOM.

Weights are safetensors only, their digest checked on the very bytes that are loaded; networks come by exact name
from monai.networks.nets. A NaN or infinity in the output is an error, never an empty mask.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.manifest import NETWORKS

__all__ = ["Network", "classify", "load_network", "segment"]

_SIGMA_SHARE = 0.125  # of the window, as in MONAI's sliding_window_inference
_FASTER = 1.3  # bf16 must beat fp32 by this much: a close race would flip from start to start


@dataclass(slots=True)
class Network:
    """A network ready to run on its device; `precision` is decided at the first batch when it was left open."""

    module: torch.nn.Module
    device: torch.device
    memory_format: torch.memory_format
    precision: str = ""

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits, float32, on the device."""
        placed = batch.to(self.device).contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.module(placed)
        if isinstance(output, list | tuple):  # deep supervision: the first is the full-size one
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise EngineError(f"the network returned {type(output).__name__}, not a tensor")
        return output.float()


def load_network(weights: str, source: Mapping[str, Any], infer: Mapping[str, Any], device: torch.device) -> Network:
    """Build and fill the network. Raises PackageError: digest, name, arguments or weights that do not fit."""
    tensors = _tensors(Path(weights), source["sha256"])
    module = _build(source["network"]["name"], source["network"]["args"])
    expected = module.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.is_floating_point():
            tensors[name] = tensor.to(expected[name].dtype)  # fp16 on disk
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as exc:
        raise PackageError(f"{weights}: the weights do not fit the network: {str(exc)[:500]}") from exc
    module.eval().requires_grad_(False)
    _fold_batch_norms(module)
    volumes = "window" in infer
    layout = torch.channels_last_3d if volumes else torch.channels_last
    module.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    network = Network(module, device, layout)
    network.precision = infer["precision"] if infer["precision"] != "auto" else ""
    return network


def _tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PackageError(f"{path}: the weights are not those the package was made with (sha256 differs)")
    if path.suffix != ".safetensors":
        return _checkpoint(path, content)
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as exc:
        raise PackageError(f"{path}: is no safetensors file: {str(exc)[:200]}") from exc


def _checkpoint(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    """A state dict saved by torch, plain or under one of the usual keys; nothing but tensors and plain values is read.

    torch's own restricted unpickler decides: what names any other class or function is refused, not executed.
    """
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise PackageError(
            f"{path}: is no plain state dict ({type(exc).__name__}); save it with torch.save(network.state_dict(), ...)"
        ) from exc
    for key in ("model", "state_dict", "network_weights"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise PackageError(f"{path}: holds no state dict (names and tensors)")
    return {str(name): tensor for name, tensor in found.items()}


def _build(name: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    if name not in NETWORKS:
        raise PackageError(f"source.network.name: {name!r} is not on the list of networks")
    from monai.networks import nets

    try:
        module = getattr(nets, name)(**arguments)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise PackageError(f"source.network.args: {name} refuses them: {str(exc)[:300]}") from exc
    assert isinstance(module, torch.nn.Module)
    return module


def _fold_batch_norms(module: torch.nn.Module) -> None:
    """Fold each batch norm that directly follows its convolution in MONAI's `Convolution` block into it."""
    norms = (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    convolutions = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    for block in list(module.modules()):
        conv, after = getattr(block, "conv", None), getattr(block, "adn", None)
        first = next(iter(after.named_children()), None) if isinstance(after, torch.nn.Module) else None
        if isinstance(conv, convolutions) and first is not None and isinstance(first[1], norms):
            transposed = isinstance(conv, torch.nn.ConvTranspose2d | torch.nn.ConvTranspose3d)
            block.conv = fuse_conv_bn_eval(conv, first[1], transpose=transposed)
            setattr(after, first[0], torch.nn.Identity())


def _batch_size(infer: Mapping[str, Any], device: torch.device, count: int) -> int:
    if infer["batch"] != "auto":
        return int(infer["batch"])
    # with one image and one thread, torch's CPU convolutions take a path that is five times slower
    return min(8, max(count, 1)) if device.type == "cuda" else 2


def _settle_precision(network: Network, batch: torch.Tensor) -> None:
    """Take bf16 only where it is measured to be clearly faster on this machine and stays finite."""
    if network.precision:
        return
    if network.device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        network.precision = "fp32"  # bf16 is emulated there, three times slower
        return
    seconds: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        network.precision = precision
        usable = bool(torch.isfinite(network(batch)).all())  # also the warm-up
        seconds[precision] = min(_timed(network, batch) for _ in range(2)) if usable else float("inf")
    network.precision = "bf16" if seconds["bf16"] * _FASTER < seconds["fp32"] else "fp32"


def _timed(network: Network, batch: torch.Tensor) -> float:
    _synchronise(network.device)
    started = time.perf_counter()
    network(batch)
    _synchronise(network.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def segment(
    network: Network, volume: torch.Tensor, infer: Mapping[str, Any], padding: float
) -> tuple[torch.Tensor, int]:
    """Probabilities (class, X, Y, Z) of `volume` (X, Y, Z), and the number of windows.

    As MONAI's sliding_window_inference: windows on a regular lattice with `overlap`, the last of each axis flush with
    the end, logits blended; a volume smaller than the window is padded evenly with `padding`.
    """
    window = infer["window"]
    before = [max(0, (w - n) // 2) for w, n in zip(window, volume.shape, strict=True)]
    after = [max(0, w - n - b) for w, n, b in zip(window, volume.shape, before, strict=True)]
    pads = [amount for b, a in zip(reversed(before), reversed(after), strict=True) for amount in (b, a)]
    padded = functional.pad(volume, pads, value=padding).to(network.device)
    corners = list(
        itertools.product(*(_starts(n, w, infer["overlap"]) for n, w in zip(padded.shape, window, strict=True)))
    )
    places = [tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True)) for corner in corners]
    logits = _blended(network, padded, places, infer)
    logits = logits[(slice(None), *(slice(b, b + n) for b, n in zip(before, volume.shape, strict=True)))]
    if not torch.isfinite(logits.sum()):  # NaN and infinities survive a sum, which costs a tenth of asking each voxel
        raise EngineError("the network's output is not finite (NaN or infinity)")
    return torch.softmax(logits, dim=0).cpu().contiguous(), len(places)


def _blended(
    network: Network, volume: torch.Tensor, places: Sequence[tuple[slice, ...]], infer: Mapping[str, Any]
) -> torch.Tensor:
    """The weighted mean of all windows' logits, (class, *volume.shape)."""
    gaussian = infer["blend"] == "gaussian"
    weight = _weight(infer["window"], infer["blend"]).to(network.device)
    weights = torch.zeros(volume.shape, device=network.device)
    total: torch.Tensor | None = None
    size = _batch_size(infer, network.device, len(places))
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        batch = torch.stack([volume[place] for place in chosen])[:, None]
        if len(chosen) < size:  # full batches only: shapes, and with them the kernels, stay the same
            batch = torch.cat([batch, batch[-1:].expand(size - len(chosen), *batch.shape[1:])])
        _settle_precision(network, batch)
        logits = network(batch)
        if logits.shape[2:] != batch.shape[2:]:
            raise EngineError(f"the network maps windows {tuple(batch.shape[2:])} to {tuple(logits.shape[2:])}")
        if total is None:
            total = torch.zeros((logits.shape[1], *volume.shape), device=network.device)
        for place, one in zip(chosen, logits, strict=False):
            total[(slice(None), *place)] += one * weight if gaussian else one
            weights[place] += weight
    assert total is not None
    return total.div_(weights)


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis (as MONAI's dense_patch_slices)."""
    step = max(1, int(window * (1 - overlap)))
    count = 1 + max(0, -(-(length - window) // step))
    return [min(k * step, length - window) for k in range(count)]


def _weight(window: Sequence[int], blend: str) -> torch.Tensor:
    """Of each voxel of a window: 1, or a Gaussian that is never less than a thousandth."""
    weight = torch.ones(())
    for size in window:
        at = torch.arange(size) - (size - 1) / 2
        factor = torch.exp(-(at**2) / (2 * (_SIGMA_SHARE * size) ** 2)) if blend == "gaussian" else torch.ones(size)
        weight = weight[..., None] * factor
    return weight.clamp(min=max(float(weight.min()), 1e-3))


@torch.inference_mode()
def classify(network: Network, images: torch.Tensor, infer: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Probabilities (image, output) of `images` (image, size, size), and the number of batches."""
    size = _batch_size(infer, network.device, len(images))
    found, batches = [], 0
    for start in range(0, len(images), size):
        batch = images[start : start + size, None]
        count = len(batch)
        if count < size:
            batch = torch.cat([batch, batch[-1:].expand(size - count, *batch.shape[1:])])
        _settle_precision(network, batch)
        logits = network(batch)[:count]
        if logits.ndim != 2:
            raise EngineError(f"a classification network must return (image, output), not {tuple(logits.shape)}")
        found.append(logits)
        batches += 1
    logits = torch.cat(found)
    if not torch.isfinite(logits).all():
        raise EngineError("the network's output is not finite (NaN or infinity)")
    return torch.sigmoid(logits).cpu().contiguous(), batches
