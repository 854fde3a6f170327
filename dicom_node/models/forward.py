"""Inside the runtime process: load a network, run it over windows or images. Imports torch; knows no DICOM.

`loaders` make the network, its digest checked on the very bytes that are loaded. A NaN or infinity in the output is an
error, never an empty mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dicom_node.errors import EngineError
from dicom_node.models.loaders import load_module
from dicom_node.models.source import TRUST
from dicom_node.models.volume import Done, segment_volume

__all__ = ["Done", "Network", "classify", "load_network", "run"]

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
        if not self.precision:
            _settle_precision(self, batch)
        placed = batch.to(self.device).contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.module(placed)
        if isinstance(output, list | tuple):  # deep supervision: the first is the full-size one
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise EngineError(f"the network returned {type(output).__name__}, not a tensor")
        return output.float()

    def batch_size(self, infer: Mapping[str, Any], count: int) -> int:
        """How many of `count` inputs go through at a time."""
        if infer["batch"] != "auto":
            return int(infer["batch"])
        # with one image and one thread, torch's CPU convolutions take a path that is five times slower
        return min(8, max(count, 1)) if self.device.type == "cuda" else 2


def run(
    network: Network,
    task: str,
    array: torch.Tensor,
    infer: Mapping[str, Any],
    job: Mapping[str, Any],
    *,
    pulse: Callable[[], None],
) -> Done:
    """Do one request of the work process: `task` segmentation, classification or load (nothing but loading).

    `pulse` is called between batches of windows and other pieces of work that take tenths of a second.
    """
    if task == "load":
        return Done(output=np.zeros(1, np.float32), windows=0, outputs=0, seconds={})
    if task == "segmentation":
        return segment_volume(network, array, infer, job, network.device, pulse)
    started = time.perf_counter()
    output, windows = classify(network, array, infer, job.get("activation", "sigmoid"))
    seconds = {"forward": time.perf_counter() - started}
    return Done(output=output.numpy(), windows=windows, outputs=output.shape[1], seconds=seconds)


def load_network(weights: str, source: Mapping[str, Any], infer: Mapping[str, Any], device: torch.device) -> Network:
    """The network of the package, on `device`. Raises PackageError: digest, format or weights that do not fit."""
    module = load_module(Path(weights), source, device)
    if TRUST[source["format"]] != "data":  # what the package brings stays as it is
        placed = module.to(device)
        layout = torch.contiguous_format
    else:
        _fold_batch_norms(module)
        layout = torch.channels_last_3d if "window" in infer else torch.channels_last
        placed = module.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    network = Network(placed, device, layout)
    network.precision = infer["precision"] if infer["precision"] != "auto" else ""
    if source["format"] == "onnx":  # its precision is that of the file
        network.precision = "fp32"
    return network


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


def _settle_precision(network: Network, batch: torch.Tensor) -> None:
    """Take bf16 only where it is measured to be clearly faster on this machine and stays finite."""
    if network.device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        network.precision = "fp32"  # bf16 is emulated there, three times slower
        return
    seconds: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        network.precision = precision
        try:
            usable = bool(torch.isfinite(network(batch)).all())  # also the warm-up
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a saved graph may fix the type of a step; in fp32 it must run
            if precision == "fp32":
                raise
            usable = False
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
def classify(
    network: Network, images: torch.Tensor, infer: Mapping[str, Any], activation: str = "sigmoid"
) -> tuple[torch.Tensor, int]:
    """Probabilities (image, output) of `images` (image, size, size), and the number of batches.

    `activation` none: the network gives probabilities itself. Raises EngineError when they are none.
    """
    size = network.batch_size(infer, len(images))
    found, batches = [], 0
    for start in range(0, len(images), size):
        batch = images[start : start + size, None]
        count = len(batch)
        if count < size:
            batch = torch.cat([batch, batch[-1:].expand(size - count, *batch.shape[1:])])
        logits = network(batch)[:count]
        if logits.ndim != 2:
            raise EngineError(f"a classification network must return (image, output), not {tuple(logits.shape)}")
        found.append(logits)
        batches += 1
    logits = torch.cat(found)
    if not torch.isfinite(logits).all():
        raise EngineError("the network's output is not finite (NaN or infinity)")
    if activation != "none":
        logits = torch.sigmoid(logits)
    elif logits.min() < 0 or logits.max() > 1:
        raise EngineError("the network's outputs are no probabilities: some are below 0 or above 1")
    return logits.cpu().contiguous(), batches
