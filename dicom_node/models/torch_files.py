"""Files of torch.save, zip and legacy, as plain values: state dicts and whole modules, read and never executed.

Sizes are held against the bytes that are there before anything is made of them. Must not import torch.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.pickles import ITEM_BYTES, Array, Inert, Storage, TensorData, load_pickle, pickle_length

__all__ = ["read_pickled"]

_MAX_NODES = 1_000_000  # of the tree it amounts to: references to references grow exponentially
_MAX_DEPTH = 100
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_pickled(content: bytes, origin: str) -> Any:
    """What `content`, a checkpoint of torch (zip or legacy), says: plain values, arrays and `TensorData`.

    A whole module becomes {"class", "state_dict", "attributes"}; other objects are left out. Raises PackageError, with
    `origin` in front, when it is no such file, claims more than it holds, or names what no weights need.
    """
    try:
        storages: dict[str, Storage] = {}
        tree = (_from_zip if content[:4] == b"PK\x03\x04" else _from_legacy)(content, storages)
        budget = [_MAX_NODES]
        return _plain(tree, budget, 0)
    except PackageError as exc:
        raise PackageError(f"{origin}: {exc}") from None
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, MemoryError),
        *(TypeError, ValueError, AttributeError, NotImplementedError, OverflowError, RecursionError),
    ) as exc:
        why = str(exc)[:200] if isinstance(exc, ValueError) else type(exc).__name__
        raise PackageError(f"{origin}: is no checkpoint that can be read: {why}") from exc


def _from_zip(content: bytes, storages: dict[str, Storage]) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    main = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(main) != 1:
        raise PackageError("is a zip file without a data.pkl of torch.save")
    root = main[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise PackageError("is a TorchScript archive, not weights: say format torchscript (trust graph)")
    view = memoryview(content)
    if f"{root}byteorder" in entries and bytes(_stored(view, entries[f"{root}byteorder"])) != b"little":
        raise PackageError("was written on a big-endian machine")
    pickled = bytes(_stored(view, entries[main[0]]))
    if pickle_length(pickled) != len(pickled):
        raise PackageError("has bytes after its pickle")
    tree = load_pickle(pickled, storages)
    for key, storage in storages.items():
        storage.data = _stored(view, entries[f"{root}data/{key}"])
        _check_length(storage)
    return tree


def _stored(view: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry where they lie. Raises PackageError for a compressed one: torch compresses nothing."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise PackageError("is a compressed zip file, which torch.save does not write")
    header = view[entry.header_offset : entry.header_offset + 30]
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + 30 + name_length + extra_length
    data = view[start : start + entry.file_size]
    if len(data) != entry.file_size:
        raise PackageError("is cut off")
    return data


def _from_legacy(content: bytes, storages: dict[str, Storage]) -> Any:
    """Magic number, version, system, the object; then the keys of its storages and each one's length and bytes."""
    at, parts = 0, []
    for _ in range(5):
        end = at + pickle_length(content, at)
        parts.append(load_pickle(content[at:end], storages))
        at = end
        if parts[0] != _LEGACY_MAGIC:
            raise PackageError("is no file of torch.save")
    _magic, _version, system, tree, keys = parts
    if not system.get("little_endian", True):
        raise PackageError("was written on a big-endian machine")
    view = memoryview(content)
    for key in keys:
        storage = storages[str(key)]
        (items,) = struct.unpack("<q", view[at : at + 8])
        at += 8
        length = items * ITEM_BYTES[storage.dtype]
        if items != storage.items or not 0 <= length <= len(content) - at:
            raise PackageError(f"claims {items} values where {len(content) - at} bytes are left")
        storage.data = view[at : at + length]
        at += length
    for storage in storages.values():
        _check_length(storage)
    return tree


def _check_length(storage: Storage) -> None:
    claimed = storage.items * ITEM_BYTES[storage.dtype]
    if claimed != len(storage.data):
        raise PackageError(f"claims {claimed} bytes of values and holds {len(storage.data)}")


# --- what it amounts to ----------------------------------------------------------------------------------------------


def _plain(node: Any, budget: list[int], depth: int) -> Any:
    """`node` without stand-ins; they are None in lists and left out of mappings."""
    budget[0] -= 1
    if budget[0] < 0 or depth > _MAX_DEPTH:
        raise PackageError(f"is nested deeper than {_MAX_DEPTH} or holds more than {_MAX_NODES} values")
    if isinstance(node, TensorData):
        node.check()
        return node
    if isinstance(node, Array):
        return node.values
    if isinstance(node, dict):
        converted = ((key, _plain(value, budget, depth + 1), value) for key, value in node.items() if _is_key(key))
        return {key: plain for key, plain, value in converted if plain is not None or value is None}
    if isinstance(node, list | tuple):
        return type(node)(_plain(value, budget, depth + 1) for value in node)
    if isinstance(node, Inert):
        return _module(node, budget, depth) if isinstance(node.state.get("_modules"), dict) else None
    return node if node is None or isinstance(node, str | bytes | int | float | bool | complex) else None


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int | float | bool)


def _module(module: Inert, budget: list[int], depth: int) -> dict[str, Any]:
    """A whole module: its weights by their dotted names, and the plain attributes of the module itself."""
    weights: dict[str, TensorData] = {}
    _collect(module, "", weights, budget, depth)
    attributes = {key: value for key, value in module.state.items() if isinstance(key, str) and key[:1] != "_"}
    return {"class": module.path, "state_dict": weights, "attributes": _plain(attributes, budget, depth + 1)}


def _collect(module: Any, prefix: str, weights: dict[str, TensorData], budget: list[int], depth: int) -> None:
    budget[0] -= 1
    if budget[0] < 0 or depth > _MAX_DEPTH:
        raise PackageError(f"is nested deeper than {_MAX_DEPTH} or holds more than {_MAX_NODES} values")
    state = module.state if isinstance(module, Inert) else {}
    passing = state.get("_non_persistent_buffers_set")
    skipped = set(passing) if isinstance(passing, list) else set()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _items(state.get(kind)):
            if isinstance(tensor, TensorData) and name not in skipped:
                tensor.check()
                weights[f"{prefix}{name}"] = tensor
    for name, child in _items(state.get("_modules")):
        _collect(child, f"{prefix}{name}.", weights, budget, depth + 1)


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in mapping.items() if isinstance(name, str)] if mapping else []
