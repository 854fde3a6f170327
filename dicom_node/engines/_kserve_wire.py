"""Tensors of the Open Inference Protocol (KServe v2) as bytes: JSON, and JSON followed by binary tensors.

The binary extension puts `Inference-Header-Content-Length` bytes of JSON first, then each tensor that names its
`binary_data_size`, little-endian, in the order of the JSON. FP16, BF16 and BYTES have no other form. What a server
answers is not believed: sizes are compared before memory is taken, and whatever does not fit is said in a sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError

__all__ = [
    "BINARY_ONLY",
    "FLOATS",
    "HEADER",
    "WHOLE",
    "Message",
    "Reply",
    "Tensor",
    "UnusableAnswer",
    "Wanted",
    "answered",
    "laid_out",
    "request",
    "taken_out",
]

HEADER = "Inference-Header-Content-Length"
BINARY_ONLY = frozenset({"FP16", "BF16"})
MAX_JSON_DEPTH = 8  # of nested tensor data: more axes than anything here has
MAX_RANK = 8

Array = npt.NDArray[Any]
# BF16 has no numpy type: the upper half of a float32, as uint16
_TYPES: Mapping[str, np.dtype[Any]] = {
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype("<u2"),
}
FLOATS = frozenset({"FP64", "FP32", "FP16", "BF16"})
WHOLE = frozenset(_TYPES) - FLOATS


class UnusableAnswer(EngineError):
    """What a server answered is no answer to what was asked; the message says why. `body`: all of it, where known."""

    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor as it travels: `values` are real numbers of any type, in the shape they have on the wire."""

    name: str
    datatype: str
    values: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A request's body, in pieces that can be sent again, and its headers."""

    pieces: tuple[bytes, ...]
    headers: Mapping[str, str]

    @property
    def length(self) -> int:
        """Of all pieces, in bytes."""
        return sum(len(piece) for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an output must be: one of these datatypes, of this shape; None is any length, and any shape."""

    datatypes: frozenset[str]
    shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer: who gave it, the tensors that were asked for, as float32 or as whole numbers, and all of its bytes."""

    model_version: str
    tensors: Mapping[str, Array]
    body: bytes = field(repr=False)


# --- layouts ---------------------------------------------------------------------------------------------------------


def laid_out(values: Array, layout: str) -> Array:
    """`values`, whose axes are N, C and the spatial ones in the order of the alphabet, with the axes of `layout`.

    An axis that `layout` does not have has one index.
    """
    letters = _all_letters(layout)
    missing = tuple(letters.index(letter) for letter in letters if letter not in layout)
    kept = [letter for letter in letters if letter in layout]
    return values.squeeze(missing).transpose([kept.index(letter) for letter in layout])


def taken_out(values: Array, layout: str) -> Array:
    """The inverse of `laid_out`."""
    letters = _all_letters(layout)
    kept = [letter for letter in letters if letter in layout]
    ordered = values.transpose([layout.index(letter) for letter in kept])
    return np.expand_dims(ordered, tuple(n for n, letter in enumerate(letters) if letter not in layout))


def _all_letters(layout: str) -> str:
    return "NC" + "".join(sorted(set(layout) - {"N", "C"}))


# --- out -------------------------------------------------------------------------------------------------------------


def wired(values: Array, datatype: str) -> Array:
    """`values` as they lie on the wire. Raises ValueError for what the type cannot hold."""
    if datatype == "BF16":
        return _bf16(values)
    kind = _TYPES[datatype]
    if kind.kind in "iu":
        values = np.rint(values)
        limits = np.iinfo(kind)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise ValueError(f"values of {values.min():g} to {values.max():g} do not fit {datatype}")
    elif kind.itemsize < 4 and values.size and np.abs(values).max() > np.finfo(kind).max:
        raise ValueError(f"values of {values.min():g} to {values.max():g} do not fit {datatype}")
    return np.ascontiguousarray(values, kind)


def _bf16(values: Array) -> Array:
    """Rounded to nearest, halves to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.asarray((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16), "<u2")


def request(tensor: Tensor, outputs: Sequence[str], *, binary: bool) -> Message:
    """The body of POST .../infer for one input tensor and the outputs of these names. Raises ValueError as `wired`."""
    data = wired(tensor.values, tensor.datatype)
    told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(data.shape)}
    wanted: list[dict[str, Any]] = [{"name": name} for name in outputs]
    if not binary:
        told["data"] = data.reshape(-1).tolist()
        text = json.dumps({"inputs": [told], "outputs": wanted}, allow_nan=False).encode()
        return Message(pieces=(text,), headers={"content-type": "application/json"})
    told["parameters"] = {"binary_data_size": data.nbytes}
    wanted = [{**one, "parameters": {"binary_data": True}} for one in wanted]
    text = json.dumps({"inputs": [told], "outputs": wanted}).encode()
    headers = {"content-type": "application/octet-stream", HEADER: str(len(text))}
    return Message(pieces=(text, data.tobytes()), headers=headers)


# --- back ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One output as the JSON of an answer tells it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int | None  # of its binary data
    data: Any


def answered(body: bytes, header: str, wanted: Mapping[str, Wanted]) -> Reply:
    """The tensors of an answer. `header`: its Inference-Header-Content-Length, '' for none.

    Raises UnusableAnswer: no JSON of that protocol, a tensor missing, of another type, shape or size,
    values that are not finite, bytes that belong to no tensor.
    """
    text, rest = _split(body, header)
    told, version = _outputs(text)
    found: dict[str, Array] = {}
    at = 0
    for one in told:
        piece = memoryview(b"")
        if one.size is not None:
            if one.size > len(rest) - at:
                raise UnusableAnswer(f"output {one.name!r} announces {one.size} bytes, {len(rest) - at} are there")
            piece, at = rest[at : at + one.size], at + one.size
        if one.name in wanted:
            found[one.name] = _values(one, piece, wanted[one.name])
    if at != len(rest):
        raise UnusableAnswer(f"{len(rest) - at} bytes of the answer belong to no output")
    if missing := [name for name in wanted if name not in found]:
        raise UnusableAnswer(f"output {missing[0]!r} is not in the answer")
    return Reply(model_version=version, tensors=found, body=body)


def _split(body: bytes, header: str) -> tuple[bytes, memoryview]:
    if not header:
        return body, memoryview(b"")
    if not (header.isascii() and header.isdigit() and len(header) < 12 and int(header) <= len(body)):
        raise UnusableAnswer(f"the {HEADER} of the answer is no length within it")
    return body[: int(header)], memoryview(body)[int(header) :]


def _outputs(text: bytes) -> tuple[list[_Told], str]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableAnswer(f"the first {len(text)} bytes of the answer are no JSON") from None
    outputs = message.get("outputs") if isinstance(message, dict) else None
    if not isinstance(outputs, list) or len(outputs) > 1024 or not all(isinstance(one, dict) for one in outputs):
        raise UnusableAnswer("the answer has no list of outputs")
    version = message.get("model_version")
    return [_told(one) for one in outputs], version if isinstance(version, str) else ""


def _told(one: Mapping[str, Any]) -> _Told:
    name, datatype, shape = one.get("name"), one.get("datatype"), one.get("shape")
    parameters = one.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    sides = isinstance(shape, list) and len(shape) <= MAX_RANK and all(_is_size(side) for side in shape)
    if not isinstance(name, str) or not isinstance(datatype, str) or not sides or not (size is None or _is_size(size)):
        raise UnusableAnswer("an output of the answer has no usable name, datatype, shape or size")
    assert isinstance(shape, list)
    return _Told(name=name, datatype=datatype, shape=tuple(shape), size=size, data=one.get("data"))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _values(told: _Told, piece: memoryview, wanted: Wanted) -> Array:
    datatype = told.datatype
    if datatype not in wanted.datatypes:
        expected = " or ".join(sorted(wanted.datatypes))
        raise UnusableAnswer(f"output {told.name!r} is {datatype[:16]}, {expected} was expected")
    shape = told.shape if wanted.shape is None else wanted.shape
    if len(told.shape) != len(shape) or any(
        length not in (None, side) for side, length in zip(told.shape, shape, strict=True)
    ):
        expected = " x ".join("any" if side is None else str(side) for side in shape)
        raise UnusableAnswer(f"output {told.name!r} is {_shown(told.shape)}, {expected} was expected")
    kind = _TYPES[datatype]
    count = math.prod(told.shape)
    if told.size is not None:
        if told.size != count * kind.itemsize:
            raise UnusableAnswer(f"output {told.name!r} has {told.size} bytes for {_shown(told.shape)} {datatype}")
        values = np.frombuffer(piece, kind)
    else:
        values = _from_json(told, count, kind)
    if datatype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif kind.kind == "f":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    if kind.kind == "f" or datatype == "BF16":
        _require_finite(told.name, values)
    return values.reshape(told.shape)


def _from_json(told: _Told, count: int, kind: np.dtype[Any]) -> Array:
    """Flat or nested, as the protocol allows."""
    if told.datatype in BINARY_ONLY or not isinstance(told.data, list):
        raise UnusableAnswer(f"output {told.name!r} has no data")
    numbers = list(_flat(told.data, MAX_JSON_DEPTH))
    if len(numbers) != count:
        raise UnusableAnswer(f"output {told.name!r} has {len(numbers)} values for {_shown(told.shape)}")
    allowed = (int,) if kind.kind in "iu" else (int, float)
    try:
        if any(type(number) not in allowed for number in numbers):
            raise ValueError
        with np.errstate(over="ignore"):
            return np.array(numbers, kind)
    except (ValueError, OverflowError):
        raise UnusableAnswer(f"output {told.name!r} has values that are no {told.datatype}") from None


def _flat(data: Any, depth: int) -> Iterator[Any]:
    if not isinstance(data, list):
        yield data
    elif depth:
        for one in data:
            yield from _flat(one, depth - 1)
    else:
        raise UnusableAnswer("the data of an output is nested too deep")


def _require_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise UnusableAnswer(f"output {name!r} is not finite (NaN or infinity)")


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single value"
