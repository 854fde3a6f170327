"""Weights files read without executing anything: safetensors, and what torch.save wrote, old and new."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from dicom_node.errors import PackageError
from dicom_node.models.pickles import TensorData
from dicom_node.models.torch_files import read_pickled

__all__ = ["read_checkpoint", "state_dict_of"]

_MAX_HEADER_BYTES = 64 * 1024**2
# where trainers keep the weights inside a checkpoint, outermost first
_NESTED = ("model", "state_dict", "network_weights", "model_state_dict", "network")


def read_checkpoint(content: bytes, origin: str) -> dict[str, Any]:
    """The tensors and plain values (numbers, texts, arrays, lists, mappings) of a checkpoint, on the CPU.

    safetensors, or torch.save's zip and legacy formats. A whole module becomes {"class": its name, "state_dict":
    tensors by dotted name, "attributes": its plain attributes}; optimisers and other objects are left out. Raises
    PackageError, `origin` in front, for anything else: nothing is imported or called that the file names, nothing is
    allocated that its bytes do not fill.
    """
    if _is_safetensors(content):
        try:
            return dict(load_safetensors(content))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as exc:
            raise PackageError(f"{origin}: is no safetensors file: {str(exc)[:200]}") from exc
    found = read_pickled(content, origin)
    if not isinstance(found, dict):
        raise PackageError(f"{origin}: holds no mapping and no network, but {type(found).__name__}")
    storages: dict[int, torch.Tensor] = {}
    # an optimiser's tensors are as large as the weights
    return {str(key): _tensors(value, storages) for key, value in found.items() if not str(key).startswith("optim")}


def state_dict_of(found: dict[str, Any], origin: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """The weights by name in a checkpoint: under `key` (which may be dotted), else where trainers usually keep them.

    Raises PackageError when there are none.
    """
    value: Any = found
    for part in key.split(".") if key else ():
        value = value.get(part) if isinstance(value, dict) else None
    for nested in () if key else _NESTED:
        if isinstance(value, dict) and isinstance(value.get(nested), dict):
            value = value[nested]
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)} if value else {}
    if not tensors or len(tensors) != len(value):
        where = f" under {key!r}" if key else ""
        raise PackageError(f"{origin}: holds no state dict{where} (names and tensors)")
    return tensors


def _is_safetensors(content: bytes) -> bool:
    """Eight bytes of length, then JSON: no pickle and no zip begins so."""
    length = int.from_bytes(content[:8], "little")
    return content[8:9] == b"{" and 2 <= length <= min(_MAX_HEADER_BYTES, len(content) - 8)


def _tensors(value: Any, storages: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, TensorData):
        return _tensor(value, storages)
    if isinstance(value, dict):
        return {key: _tensors(inner, storages) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_tensors(inner, storages) for inner in value)
    return value


def _tensor(described: TensorData, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """The tensor over its own copy of the storage, which tensors that share one share again."""
    dtype = getattr(torch, described.dtype)
    if not described.storage.data:
        return torch.zeros(described.shape, dtype=dtype)  # no values: some size is 0
    key = id(described.storage)
    if key not in storages:
        storages[key] = torch.frombuffer(bytearray(described.storage.data), dtype=torch.uint8)
    return storages[key].view(dtype).as_strided(described.shape, described.strides, described.offset)
