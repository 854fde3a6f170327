"""Pickles as data: what one says is read, nothing it names is imported, called or executed.

Every class or function a pickle names becomes an inert stand-in, but for the few that rebuild tensors, arrays and
numbers, which are our own. Must not import torch: tensors stay descriptions of bytes (`TensorData`) until
`loaders.checkpoint` makes them. `torch_files` reads the files that hold the pickles.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import PackageError

__all__ = ["ITEM_BYTES", "Array", "Inert", "Storage", "TensorData", "load_pickle", "pickle_length"]

_MAX_PICKLE_BYTES = 256 * 1024**2
_MAX_OPERATIONS = 4_000_000
_MAX_NAMES = 2000  # classes and functions a pickle may name
_MAX_NAME = 1024
_MAX_AXES, _MAX_SIZE = 64, 1 << 48  # numbers without end take for ever to multiply
_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
# texts with escapes, objects without constructors, registered extensions
_NEVER_WRITTEN = frozenset({"STRING", "UNICODE", "INST", "OBJ", "PERSID", "EXT1", "EXT2", "EXT4"})

ITEM_BYTES: Mapping[str, int] = {
    **{"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2},
    **{"int8": 1, "uint8": 1, "bool": 1},
}
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16"},
    **{"CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8"},
}
# Nothing here would be called either. But no checkpoint needs them: a file that names one was made to attack.
_ALARMING_MODULES = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "ctypes", "socket", "shutil", "pty", "marshal"}
    | {"pickle", "code", "types", "webbrowser", "multiprocessing", "asyncio", "io", "_io", "tempfile"}
)
_HARMLESS_BUILTINS = frozenset(
    {"set", "frozenset", "slice", "complex", "range", "object", "int", "float", "bool", "str", "list", "dict", "tuple"}
    | {"bytearray", "bytes", "type"}
)


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes that tensors share; a legacy file has them after its pickle, so `data` comes later."""

    dtype: str
    items: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))

    def __setstate__(self, state: Any) -> None:
        """A pickle may not change it."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorData:
    """A tensor as the file describes it: `shape`, `strides` and `offset` in items of `dtype` over `storage`."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage

    def __setstate__(self, state: Any) -> None:
        """A pickle may not change it."""

    def check(self) -> None:
        """Raise ValueError unless every value lies within the storage, each byte standing for one value."""
        items = len(self.storage.data) // ITEM_BYTES[self.dtype]
        sizes = (*self.shape, *self.strides, self.offset)
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
            raise ValueError("a tensor has impossible sizes")
        if not all(isinstance(n, int) and 0 <= n < _MAX_SIZE for n in sizes):
            raise ValueError("a tensor has impossible sizes")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if count > items or (count and last >= items):
            raise ValueError(f"a tensor claims {count} values, the file has {items} for it")

    def numbers(self) -> list[float]:
        """The values of a small float32 or float64 tensor in order of its storage. Raises ValueError for any other."""
        if self.dtype not in ("float32", "float64") or math.prod(self.shape) > 4096:
            raise ValueError("a tensor of other numbers than expected")
        flat = np.frombuffer(self.storage.data, np.dtype(self.dtype).newbyteorder("<"))
        found: list[float] = flat[self.offset : self.offset + math.prod(self.shape)].tolist()
        return found


class Inert:
    """Stands for an object of a class the pickle names: takes any state, does nothing."""

    path = ""
    state: Mapping[str, Any] = {}

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.state = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}

    def append(self, value: Any) -> None:
        """As a list would; nothing is kept."""

    def extend(self, values: Any) -> None:
        """As a list would; nothing is kept."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict and its kin; without attributes a pickle could set."""

    __slots__ = ()

    def __new__(cls, *arguments: Any) -> _Dict:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
            key, value = pair
            self[key] = value

    def __setstate__(self, state: Any) -> None:
        pass


class _DType:
    """numpy.dtype of plain numbers."""

    def __init__(self, code: Any, *arguments: Any) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def numpy(self) -> np.dtype[Any]:
        """The real one. Raises ValueError for anything but numbers and booleans."""
        if self.code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise ValueError("an array holds other than plain numbers")
        return np.dtype((">" if self.order == ">" else "<") + self.code)


class Array:
    """numpy.ndarray of plain numbers."""

    def __init__(self, *arguments: Any) -> None:
        self.values: npt.NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        # reshape refuses a shape that the bytes do not fill: nothing is allocated on a claim
        flat = np.frombuffer(_bytes(data), dtype.numpy())
        self.values = flat.reshape(tuple(int(n) for n in shape), order="F" if fortran else "C")


def _bytes(data: Any) -> bytes:
    if isinstance(data, str):  # as Python 2 wrote them
        return data.encode("latin1")
    if not isinstance(data, bytes):
        raise ValueError("an array without bytes")
    return data


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return np.frombuffer(_bytes(data), dtype.numpy(), count=1)[0].item() if isinstance(dtype, _DType) else None


def _encode(text: Any, encoding: Any = "") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorData:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without storage")
    return TensorData(storage.dtype, tuple(size), tuple(stride), offset, storage)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any) -> TensorData:
    tensor = _tensor(storage, offset, size, stride)
    if dtype not in ITEM_BYTES:
        raise ValueError("a tensor of an unknown type")
    return TensorData(dtype, tensor.shape, tensor.strides, tensor.offset, storage)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if not isinstance(function, _Function):
        raise ValueError("a tensor of an unknown kind")
    return function(*arguments)


def _values(values: Any = ()) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else []


_REBUILD = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_KNOWN: Mapping[tuple[str, str], Any] = {
    **_REBUILD,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _values,
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("builtins", "set"): _values,
    ("builtins", "frozenset"): _values,
    ("__builtin__", "set"): _values,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Array for core in ("core", "_core")},
}


class _Function:
    """One of ours as a pickle gets it: a plain function would let it set attributes, which outlast the file."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        """A pickle may not change it."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows our own functions and inert stand-ins, and no other."""

    def __init__(self, content: bytes, storages: dict[str, Storage]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._storages = storages
        self._stand_ins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Our own, a type of numbers by its name, or a stand-in. Never an import."""
        if (found := _KNOWN.get((module, name))) is not None:
            return found if isinstance(found, type) else _Function(found)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in ITEM_BYTES:
            return name
        root = module.split(".")[0]
        alarming = root in ("builtins", "__builtin__") and name not in _HARMLESS_BUILTINS
        if alarming or root in _ALARMING_MODULES:
            raise PackageError(f"names {module[:40]}.{name[:40]}, which no weights need; nothing was executed")
        key = (module, name)
        if key not in self._stand_ins:
            if len(self._stand_ins) >= _MAX_NAMES:
                raise PackageError(f"names more than {_MAX_NAMES} classes")
            self._stand_ins[key] = type("_StandIn", (Inert,), {"path": f"{module}.{name}"})
        return self._stand_ins[key]

    def persistent_load(self, pid: Any) -> Any:
        """A storage by its key; of a legacy whole module, the class that stands beside its source code."""
        kind, *details = pid
        if kind == "module":
            return details[0]
        dtype, key, _location, items = details[:4]
        view = details[4] if len(details) > 4 else None
        if kind != "storage" or dtype not in ITEM_BYTES or not isinstance(items, int) or view is not None:
            raise ValueError("a storage of an unknown kind")
        return self._storages.setdefault(str(key), Storage(dtype, items))


def load_pickle(content: bytes, storages: dict[str, Storage]) -> Any:
    """What the pickle `content` says, in stand-ins; `storages` are those its tensors name, by their key.

    Raises what unpickling raises, and PackageError when it names what no weights need.
    """
    return _Reader(content, storages).load()


def pickle_length(content: bytes, start: int = 0) -> int:
    """The length of the pickle at `start`. Raises PackageError when reading it would cost more than it holds.

    Lengths beyond the file's end are refused here by pickletools, memo places nobody counted up to by us: the
    unpickler would allocate for both.
    """
    if start == 0 and content[:1] not in (b"\x80", b"(", b"c", b"}"):
        raise PackageError("is no file of torch.save")
    stream = io.BytesIO(content)
    stream.seek(start)
    memo = 0
    for _ in range(_MAX_OPERATIONS):
        code = stream.read(1)
        operation = _OPERATIONS.get(code.decode("latin1"))
        if operation is None or operation.name in _NEVER_WRITTEN:
            raise PackageError("holds operations that torch.save does not write" if code else "is cut off")
        argument = _argument(operation, stream)
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > memo + 256:  # in steps, but for what was put there and is written again
                raise PackageError("counts its values beyond what it holds")
            memo = max(memo, argument)
        elif operation.name == "MEMOIZE":
            memo += 1
        if operation.name == "STOP":
            return stream.tell() - start
        if stream.tell() - start > _MAX_PICKLE_BYTES:
            break
    raise PackageError(f"holds more than {_MAX_OPERATIONS} values or {_MAX_PICKLE_BYTES >> 20} MiB of them")


def _argument(operation: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    """What follows the operation. Names are passed over: pickletools would decode escapes in them."""
    if operation.name == "GLOBAL":
        if not all(stream.readline(_MAX_NAME).endswith(b"\n") for _ in range(2)):
            raise PackageError("names a class without end")
        return None
    return operation.arg.reader(stream) if operation.arg is not None else None
