"""A network saved by torch.export: a graph of torch's operations, rebuilt from what was understood of its archive.

torch's own reader falls back to pickle, resolves operations by walking Python modules, and evaluates expressions and
names as Python. So nothing reaches it but an archive written here: every text of the graph is a plain name, operations
are of torch.ops.aten, expressions are arithmetic, tensors are raw bytes that fill their shapes.
"""

from __future__ import annotations

import io
import json
import logging
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.loaders.archive import opened_archive
from dicom_node.models.loaders.batches import FixedBatch, first_tensor
from dicom_node.models.loaders.content import checked_content
from dicom_node.models.loaders.graph_text import check_graph

__all__ = ["load"]

_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": (_WEIGHTS, "weight_"),
    "data/constants/model_constants_config.json": (_CONSTANTS, "tensor_"),
}
_PLAIN = ("archive_format", "version", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_MAX_JSON = 64 * 1024**2
# torch._export.serde.schema.ScalarType
_FLOATS = {6: torch.float16, 7: torch.float32, 13: torch.bfloat16}


class _Exported(torch.nn.Module):
    """An exported network, which names no shape of its own where it refuses one."""

    def __init__(self, inner: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self._dtype = dtype

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) to logits."""
        try:
            return first_tensor(self.inner(batch.to(self._dtype)))
        except AssertionError as exc:
            raise EngineError(f"the exported network does not take {tuple(batch.shape)}: {str(exc)[:200]}") from exc


def load(path: Path, source: Mapping[str, Any], device: torch.device) -> torch.nn.Module:
    """The exported network in `path`, bound to `device`; one of a fixed batch size is given just that.

    Raises PackageError for what it holds beside a graph and its tensors.
    """
    archive = opened_archive(checked_content(path, source), path)
    try:
        graph, entries = _understood(archive, path)
        batch, dtype = _input_of(graph, path)
        rebuilt = _written(archive, entries)
        del archive, entries
    except (zipfile.BadZipFile, EOFError, zlib.error) as exc:
        raise PackageError(f"{path}: is damaged: {exc}") from exc
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as exc:
        raise PackageError(f"{path}: is no network saved by torch.export.save ({type(exc).__name__})") from exc
    program = _exported(rebuilt, path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    try:
        module = _Exported(program.module(), dtype)
    except (RuntimeError, ValueError, AttributeError, LookupError, TypeError, AssertionError) as exc:
        raise PackageError(f"{path}: torch.export does not run it: {str(exc)[:300]}") from exc
    return module if batch is None else FixedBatch(module, batch)


def _exported(content: io.BytesIO, path: Path) -> Any:
    quiet = logging.getLogger("torch.export")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        return torch.export.load(content)
    except (RuntimeError, ValueError, AttributeError, LookupError, TypeError, AssertionError, SyntaxError) as exc:
        raise PackageError(f"{path}: torch.export does not read it: {type(exc).__name__}: {str(exc)[:300]}") from exc
    finally:
        quiet.setLevel(level)


def _understood(archive: zipfile.ZipFile, path: Path) -> tuple[dict[str, Any], dict[str, bytes | None]]:
    """The graph and the entries of the archive, each of a kind that is known here and checked; None: as it is."""
    roots = {name.split("/", 1)[0] for name in archive.namelist()}
    if len(roots) != 1:
        raise PackageError(f"{path}: expected one folder in the archive, as torch.export.save writes it")
    found = {name.split("/", 1)[1]: name for name in archive.namelist() if "/" in name}
    entries: dict[str, bytes | None] = {}
    for name, (folder, prefix) in _CONFIGS.items():
        config, payloads = _config(archive, found, name, path)
        for payload in payloads:
            record = folder + payload["path_name"]
            if not payload["path_name"].startswith(prefix) or not payload["path_name"][len(prefix) :].isdigit():
                raise PackageError(f"{path}: holds a constant that is no tensor")
            _check_payload(payload, archive.getinfo(found[record]).file_size, path)
            entries[record] = None
        entries[name] = config
    graph = json.loads(_text(archive, found, _MODEL, path))
    check_graph(graph, path)
    entries[_MODEL] = json.dumps(graph).encode()
    entries[_SAMPLES] = _samples()
    for name in _PLAIN:
        if name in found and archive.getinfo(found[name]).file_size <= 256:
            entries[name] = archive.read(found[name])
    if unknown := sorted(set(found) - set(entries)):
        raise PackageError(f"{path}: holds {unknown[0][:80]!r}, which is no part of a graph and its tensors")
    return graph, entries


def _text(archive: zipfile.ZipFile, found: Mapping[str, str], name: str, path: Path) -> bytes:
    if name not in found:
        raise PackageError(f"{path}: has no {name}; save the network with torch.export.save of torch 2.8 or later")
    if archive.getinfo(found[name]).file_size > _MAX_JSON:
        raise PackageError(f"{path}: {name} is larger than {_MAX_JSON >> 20} MiB")
    return archive.read(found[name])


def _config(
    archive: zipfile.ZipFile, found: Mapping[str, str], name: str, path: Path
) -> tuple[bytes, list[dict[str, Any]]]:
    content = _text(archive, found, name, path)
    return content, list(json.loads(content)["config"].values())


def _check_payload(payload: Mapping[str, Any], size: int, path: Path) -> None:
    """Refuse a pickled tensor, and one that claims more than its record holds."""
    if payload.get("use_pickle"):
        raise PackageError(f"{path}: holds a pickled tensor; save it with plain, dense tensors")
    meta = payload["tensor_meta"]
    sizes = [entry["as_int"] for entry in meta["sizes"]]
    if any(not isinstance(n, int) or n < 0 for n in sizes) or math.prod(sizes) > size:
        raise PackageError(f"{path}: a tensor says it is larger than the file's data for it")


def _input_of(graph: Mapping[str, Any], path: Path) -> tuple[int | None, torch.dtype]:
    """The only batch size the graph takes, None when it takes any, and the type of its one input."""
    module = graph["graph_module"]
    inputs = [spec["user_input"]["arg"] for spec in module["signature"]["input_specs"] if "user_input" in spec]
    if len(inputs) != 1 or "as_tensor" not in inputs[0]:
        raise PackageError(f"{path}: takes {len(inputs)} inputs; expected one, the images")
    meta = module["graph"]["tensor_values"][inputs[0]["as_tensor"]["name"]]
    if meta["dtype"] not in _FLOATS:
        raise PackageError(f"{path}: its input is no floating-point tensor")
    batch = meta["sizes"][0].get("as_int")
    if batch is not None and not 1 <= batch <= 256:
        raise PackageError(f"{path}: takes batches of {batch}")
    return batch, _FLOATS[meta["dtype"]]


def _samples() -> bytes:
    """In place of the sample inputs, which torch might unpickle: it needs to know that there is one."""
    buffer = io.BytesIO()
    torch.save(((torch.zeros(1),), {}), buffer)
    return buffer.getvalue()


def _written(archive: zipfile.ZipFile, entries: Mapping[str, bytes | None]) -> io.BytesIO:
    """The archive anew: torch sees what was checked and nothing else."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    root = archive.namelist()[0].split("/", 1)[0]
    for name, checked in entries.items():
        content = archive.read(f"{root}/{name}") if checked is None else checked
        if name not in ("version", ".data/version", ".data/serialization_id"):  # the writer writes its own
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    buffer.seek(0)
    return buffer
