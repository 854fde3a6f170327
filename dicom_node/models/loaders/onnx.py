"""An ONNX graph, run by onnxruntime (extra `onnx`): no operations of others, no file but the one that was checked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.loaders.batches import FixedBatch
from dicom_node.models.loaders.content import checked_content

__all__ = ["load"]

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_MAX_BATCH = 256
_MAX_DEPTH = 32
_FATAL_ONLY = 4  # errors come back as exceptions
_MISSING = "ONNX networks need onnx and onnxruntime: pip install dicom-node[onnx]"


class _OnnxNetwork(torch.nn.Module):
    """A session of onnxruntime as a module; it takes as many threads as torch does at that moment."""

    def __init__(self, content: bytes, device: torch.device) -> None:
        super().__init__()
        self._content = content
        self._device = device
        self._threads = 0
        self._session: Any = None

    def session(self) -> Any:
        """The session, made anew when torch's number of threads has changed."""
        if self._session is None or self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            self._session = _session(self._content, self._device, self._threads)
        return self._session

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) to the first output, float32, on the batch's device."""
        session = self.session()
        given = session.get_inputs()[0]
        array = batch.detach().cpu().contiguous().numpy().astype(_TYPES[given.type], copy=False)
        try:
            output = session.run([session.get_outputs()[0].name], {given.name: array})[0]
        except _failures() as exc:
            if "allocate memory" in str(exc):
                raise torch.OutOfMemoryError(f"onnxruntime: {str(exc)[-200:]}") from exc
            raise EngineError(f"onnxruntime: {type(exc).__name__}: {str(exc)[:300]}") from exc
        return torch.from_numpy(np.ascontiguousarray(output, dtype=np.float32)).to(batch.device)


def load(path: Path, source: Mapping[str, Any], device: torch.device) -> torch.nn.Module:
    """The network in `path`; one of a fixed batch size is given just that.

    Raises PackageError for data outside the file, operations that are not ONNX's own, or without the extra `onnx`.
    """
    try:
        onnx, message = import_module("onnx"), import_module("google.protobuf.message")
    except ImportError as exc:
        raise PackageError(f"{path}: {_MISSING}") from exc
    content = checked_content(path, source)
    try:
        model = onnx.load_model_from_string(content)
    except (message.DecodeError, ValueError) as exc:
        raise PackageError(f"{path}: is no ONNX file ({type(exc).__name__})") from exc
    _check(model, path)
    del model
    network = _OnnxNetwork(content, device)
    try:
        session = network.session()
    except ImportError as exc:
        raise PackageError(f"{path}: {_MISSING}") from exc
    except _failures() as exc:
        raise PackageError(f"{path}: onnxruntime does not take it: {str(exc)[:300]}") from exc
    return _of_its_batch(network, session, path)


def _of_its_batch(network: _OnnxNetwork, session: Any, path: Path) -> torch.nn.Module:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or not outputs:
        raise PackageError(f"{path}: takes {len(inputs)} inputs; expected one, the images")
    if inputs[0].type not in _TYPES or not inputs[0].shape:
        raise PackageError(f"{path}: its input is {inputs[0].type}; expected floating-point images")
    batch = inputs[0].shape[0]
    if not isinstance(batch, int):
        return network
    if not 1 <= batch <= _MAX_BATCH:
        raise PackageError(f"{path}: takes batches of {batch}")
    return FixedBatch(network, batch)


def _session(content: bytes, device: torch.device, threads: int) -> Any:
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not burn a core
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    return onnxruntime.InferenceSession(content, options, providers=providers)


def _onnxruntime() -> Any:
    """The module, told to report nothing to its makers before it is loaded; the confined process could not anyway."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    onnxruntime = import_module("onnxruntime")
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _failures() -> tuple[type[Exception], ...]:
    """Everything onnxruntime raises: its own errors have no common parent."""
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)


def _check(model: Any, path: Path) -> None:
    """Refuse operations that need a library of the package, and tensors elsewhere or larger than their data."""
    foreign = {entry.domain for entry in model.opset_import} - _DOMAINS - {f.domain for f in model.functions}
    if foreign:
        raise PackageError(f"{path}: needs operations of {sorted(foreign)[0][:80]!r}, which are not ONNX's own")
    for tensor in _tensors(model, path):
        if tensor.external_data or tensor.data_location != 0:
            raise PackageError(
                f"{path}: keeps weights in another file; save it with all of them inside (external_data=False)"
            )
        if tensor.raw_data and math.prod(tensor.dims) > 2 * len(tensor.raw_data):  # two 4-bit values to a byte
            raise PackageError(f"{path}: {tensor.name[:80]!r} says it is larger than the file's data for it")


def _tensors(model: Any, path: Path) -> Iterator[Any]:
    """Every tensor in the file, in the graphs inside graphs and in functions too."""
    pending = [(model.graph, 0), *((function, 0) for function in model.functions)]
    while pending:
        graph, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise PackageError(f"{path}: graphs are nested too deeply")
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                pending.extend((inner, depth + 1) for inner in attribute.graphs)
                if attribute.HasField("g"):
                    pending.append((attribute.g, depth + 1))
        for attribute in getattr(graph, "attribute_proto", ()):
            yield from (attribute.t, *attribute.tensors)
