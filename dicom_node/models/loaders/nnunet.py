"""Trained folds of nnU-Net v2: one network for each checkpoint, their logits averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dicom_node.models.loaders.checkpoint import read_checkpoint, state_dict_of
from dicom_node.models.loaders.content import checked_content
from dicom_node.models.loaders.state_dict import filled
from dicom_node.models.nnunet_nets import build_network, used_weights

__all__ = ["load"]

_KEY = "network_weights"


def load(path: Path, source: Mapping[str, Any]) -> nn.Module:
    """The mean of all folds in evaluation mode on the CPU; `path` is the first, the others lie in the same package.

    Raises PackageError: digests, arguments or weights that do not fit.
    """
    folder = path.parents[len(Path(source["path"]).parts) - 1]
    folds = [(path, source), *((folder / fold["path"], fold) for fold in source.get("folds") or ())]
    networks = [_fold(file, described, source["network"]) for file, described in folds]
    return networks[0] if len(networks) == 1 else _Mean(networks).eval().requires_grad_(False)


def _fold(path: Path, described: Mapping[str, Any], network: Mapping[str, Any]) -> nn.Module:
    found = read_checkpoint(checked_content(path, described), str(path))
    tensors = used_weights(state_dict_of(found, str(path), _KEY if _KEY in found else None))
    return filled(lambda: build_network(network["name"], network["args"]), tensors, path)


class _Mean(nn.Module):
    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, volume: Tensor) -> Tensor:
        total: Tensor = torch.stack([network(volume).float() for network in self.networks]).mean(dim=0)
        return total
