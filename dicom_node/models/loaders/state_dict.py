"""Weights by name for a network of monai.networks.nets: safetensors, or what torch.save made of a state dict.

Data only. The size of what is built is bounded by the weights that were found before a single tensor of it exists.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from dicom_node.errors import PackageError
from dicom_node.models.loaders.content import checked_content
from dicom_node.models.source import NETWORKS

__all__ = ["filled", "load", "tensors_in"]

_MAX_HEADER = 16 * 1024**2
_SPARE = 64 * 1024**2  # elements a constructor may make beyond its weights, e.g. tables of positions


def load(path: Path, source: Mapping[str, Any]) -> torch.nn.Module:
    """The named network with its weights, in evaluation mode on the CPU. Raises PackageError."""
    found = tensors_in(checked_content(path, source), path, source.get("key"))
    network = source["network"]
    return filled(lambda: _named(network["name"], network["args"]), found, path)


def filled(build: Callable[[], torch.nn.Module], tensors: dict[str, torch.Tensor], path: Path) -> torch.nn.Module:
    """The network that `build` makes, with `tensors` as its weights, all of them and no others.

    Raises PackageError when they do not fit, or when the network's arguments ask for much more than they hold.
    """
    weights = sum(tensor.numel() for tensor in tensors.values())
    with _Bounded(2 * weights + _SPARE):
        module = build()
    expected = module.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.is_floating_point():
            tensors[name] = tensor.to(expected[name].dtype)  # fp16 on disk
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as exc:
        raise PackageError(f"{path}: the weights do not fit the network: {str(exc)[:500]}") from exc
    return module.eval().requires_grad_(False)


class _Bounded(TorchFunctionMode):
    """Refuses the tensor that would make more than `elements` in all, before it takes memory."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._left = elements

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _device_constructors() and given.get("out") is None:
            try:
                shape = func(*args, **{**given, "device": "meta"})
                self._left -= shape.numel() if isinstance(shape, torch.Tensor) else 0
            except (RuntimeError, TypeError, NotImplementedError):
                pass  # what has no size on `meta` takes none
            if self._left < 0:
                raise PackageError("source.network.args: they make a network much larger than its weights")
        return func(*args, **given)


def tensors_in(content: bytes, path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict in a weights file; `key` names the mapping that holds it, else the usual ones are tried.

    Raises PackageError for what is none; nothing in the file is executed.
    """
    if path.suffix == ".safetensors":
        if key is not None:
            raise PackageError(f"source.key: {path.name} has no keys above its tensors")
        return _safetensors(path, content)
    from dicom_node.models.loaders.checkpoint import read_checkpoint, state_dict_of

    found = state_dict_of(read_checkpoint(content, str(path)), str(path), key)
    for name, tensor in found.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise PackageError(f"{path}: {name[:80]!r} says it is larger than the file's data for it")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _safetensors(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    _check_header(path, content)
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as exc:
        raise PackageError(f"{path}: is no safetensors file: {str(exc)[:200]}") from exc


def _check_header(path: Path, content: bytes) -> None:
    """Refuse a header that claims more than the file holds, whatever the library would make of it."""
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    if not 2 <= length <= min(len(content) - 8, _MAX_HEADER):
        raise PackageError(f"{path}: is no safetensors file: its header would be {length} bytes long")
    try:
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(content) - 8 - length or math.prod(entry["shape"]) > 8 * (end - start):
                raise PackageError(f"{path}: {name[:80]!r} says it is larger than the file's data for it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise PackageError(f"{path}: is no safetensors file: its header is not readable") from exc


def _named(name: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    if name not in NETWORKS:
        raise PackageError(f"source.network.name: {name!r} is not on the list of networks")
    from monai.networks import nets

    try:
        module = getattr(nets, name)(**arguments)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise PackageError(f"source.network.args: {name} refuses them: {str(exc)[:300]}") from exc
    assert isinstance(module, torch.nn.Module)
    return module
