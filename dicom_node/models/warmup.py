"""A network's first run, right after it was loaded: does it do at all what its package promises? Imports torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.forward import Network

__all__ = ["self_test"]

_SIDE = 64  # of a network that takes a volume whole: legal for six halvings


@torch.inference_mode()
def self_test(network: Network, task: str, infer: Mapping[str, Any], expects: Mapping[str, Any]) -> float:
    """Run the network over one small batch of the shape it will see, and return how many seconds that took.

    `expects`: `outputs`, the least number of outputs the package names; `size`, the side of a classification network's
    images. It is the warm-up too: kernels are chosen and memory is taken here, not in the first study.

    Raises PackageError when the outputs are of another shape or too few, EngineError when they are not finite.
    """
    size = network.batch_size(infer, 1)
    volumes = task == "segmentation"
    shape = tuple(infer["window"] or (_SIDE,) * 3) if volumes else (int(expects["size"]),) * 2
    ramp = torch.linspace(-1.0, 1.0, shape[-1]).expand(size, 1, *shape)  # a constant would hide a division by zero
    started = time.perf_counter()
    output = network(ramp)
    expected = (size, *shape) if volumes else (size,)
    found = (len(output), *output.shape[2:]) if output.ndim >= 2 else ()
    if found != expected:
        raise PackageError(f"self-test: the network maps {(size, 1, *shape)} to {tuple(output.shape)}")
    if output.shape[1] < expects["outputs"]:
        raise PackageError(
            f"self-test: the network has {output.shape[1]} outputs, the package names {expects['outputs']}"
        )
    if not torch.isfinite(output.sum()):
        raise EngineError("self-test: the network's output is not finite (NaN or infinity)")
    return time.perf_counter() - started  # asking for the sum waited for the device
