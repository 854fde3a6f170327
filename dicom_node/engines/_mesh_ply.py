"""Surfaces in the Polygon File Format (PLY 1.0): ASCII, and binary in either byte order.

A header lists elements and their properties; of `vertex` x, y and z are read, of `face` the list of indices, all else
is passed over. Nothing is taken from a count of the header that the file is not long enough for.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dicom_node.engines._mesh_text import (
    MAX_CORNERS,
    MAX_TRIANGLES,
    MAX_VERTICES,
    Soup,
    UnusableMesh,
    fan,
    lines_of,
    soup_of,
)
from dicom_node.errors import StorageError

__all__ = ["read_ply"]

_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_WHOLE = frozenset(name for name, kind in _TYPES.items() if kind[0] in "iu")
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_INDICES = ("vertex_indices", "vertex_index")
_MAX_HEADER = 64 * 1024
_MAX_PARTS = 64  # elements, and properties of one
_BEAT = 65_536  # faces

Beat = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Property:
    name: str
    type: str
    length_type: str = ""  # of a list


@dataclass(slots=True)
class _Element:
    name: str
    count: int
    properties: list[_Property] = field(default_factory=list)

    @property
    def has_lists(self) -> bool:
        return any(one.length_type for one in self.properties)

    def row(self, order: str) -> np.dtype[np.void]:
        """One item without lists, as bytes."""
        return np.dtype([(one.name, order + one.type) for one in self.properties])


def read_ply(path: Path, beat: Beat) -> Soup:
    """Raises UnusableMesh, StorageError."""
    try:
        with path.open("rb") as file:
            order, elements = _header(file)
            start = file.tell()
            if order:
                return _binary(file, order, elements, path.stat().st_size - start, beat)
    except OSError as exc:
        raise StorageError(f"a surface an engine returned cannot be read ({exc.strerror})") from exc
    return _text(path, elements, beat)


# --- header ----------------------------------------------------------------------------------------------------------


def _header(file: BinaryIO) -> tuple[str, list[_Element]]:
    """Byte order ('' for text) and elements; `file` then stands at the first item."""
    order: str | None = None
    elements: list[_Element] = []
    while True:
        line = file.readline(1024)
        if not line or file.tell() > _MAX_HEADER:
            raise UnusableMesh("the PLY header has no end")
        words = line.decode("latin-1").split()
        if words == ["end_header"]:
            break
        if words[:1] == ["format"]:
            order = _ORDERS.get(words[1]) if len(words) == 3 else None
        elif words[:1] == ["element"]:
            elements.append(_element(words))
        elif words[:1] == ["property"] and elements:
            elements[-1].properties.append(_property(words))
        elif words[:1] not in ([], ["ply"], ["comment"], ["obj_info"]):
            raise UnusableMesh("a line of the PLY header is not understood")
        if len(elements) > _MAX_PARTS or any(len(one.properties) > _MAX_PARTS for one in elements[-1:]):
            raise UnusableMesh(f"a PLY header with more than {_MAX_PARTS} elements or properties")
    if order is None:
        raise UnusableMesh("the PLY file is in a format nobody documented")
    _require_surface(elements)
    return order, elements


def _element(words: list[str]) -> _Element:
    if len(words) != 3 or not (words[2].isascii() and words[2].isdigit()) or len(words[2]) > 9:
        raise UnusableMesh("an element of the PLY header has no usable count")
    most = {"vertex": MAX_VERTICES, "face": MAX_TRIANGLES}.get(words[1], MAX_VERTICES)
    if int(words[2]) > most:
        raise UnusableMesh(f"{words[2]} items of one kind are too many, at most {most} are read")
    return _Element(words[1], int(words[2]))


def _property(words: list[str]) -> _Property:
    if len(words) == 5 and words[1] == "list" and words[2] in _WHOLE and words[3] in _TYPES:
        return _Property(words[4], _TYPES[words[3]], _TYPES[words[2]])
    if len(words) == 3 and words[1] in _TYPES:
        return _Property(words[2], _TYPES[words[1]])
    raise UnusableMesh("a property of the PLY header is not understood")


def _require_surface(elements: list[_Element]) -> None:
    kinds = [element.name for element in elements]
    if kinds.count("vertex") != 1 or kinds.count("face") != 1:
        raise UnusableMesh("the PLY file has no vertices or no faces")
    for element in elements:
        names = [one.name for one in element.properties]
        scalar = {one.name for one in element.properties if not one.length_type}
        if not names or len(set(names)) != len(names):
            raise UnusableMesh("an element of the PLY header has no properties, or two of one name")
        if element.name == "vertex" and (not {"x", "y", "z"} <= scalar or element.has_lists):
            raise UnusableMesh("vertices of the PLY file have no x, y and z")
        lists = [one for one in element.properties if one.name in _INDICES and one.length_type]
        if element.name == "face" and not any(one.type[0] in "iu" for one in lists):
            raise UnusableMesh("faces of the PLY file have no list of vertices")


# --- binary ----------------------------------------------------------------------------------------------------------


def _binary(file: BinaryIO, order: str, elements: list[_Element], left: int, beat: Beat) -> Soup:
    vertices = np.empty((0, 3), np.float32)
    triangles = np.empty((0, 3), np.int64)
    for element in elements:
        if element.name == "face":
            triangles = _faces(file, order, element, left, beat)
        elif element.has_lists:
            raise UnusableMesh("the PLY file has lists beside its faces, which are not read")
        else:
            row = element.row(order)
            if element.count * row.itemsize > left:
                raise UnusableMesh("the surface is cut short")
            items = np.fromfile(file, row, element.count)
            if element.name == "vertex":
                with np.errstate(over="ignore"):
                    vertices = np.stack([items[axis].astype(np.float32) for axis in ("x", "y", "z")], axis=-1)
        beat()
    return Soup(vertices, triangles)


def _faces(file: BinaryIO, order: str, element: _Element, left: int, beat: Beat) -> npt.NDArray[np.int64]:
    if sum(bool(one.length_type) for one in element.properties) != 1:
        raise UnusableMesh("faces of the PLY file have more than one list, which is not read")
    at = next(number for number, one in enumerate(element.properties) if one.length_type)
    indices = element.properties[at]
    three: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
    for one in element.properties:
        if one is indices:
            three += [("how many", order + one.length_type), ("corners", order + one.type, (3,))]
        else:
            three.append((f"other {one.name}", order + one.type))
    row = np.dtype(three)
    start = file.tell()
    if element.count * row.itemsize <= left:  # all triangles, as nearly every file
        items = np.fromfile(file, row, element.count)
        if len(items) == element.count and (items["how many"] == 3).all():
            return items["corners"].astype(np.int64)
    file.seek(start)
    return _polygons(file, order, element, indices, beat)


def _polygons(file: BinaryIO, order: str, element: _Element, indices: _Property, beat: Beat) -> npt.NDArray[np.int64]:
    """Face by face: their lengths differ."""
    reader = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
    corners: array[int] = array("q")
    for number in range(element.count):
        if number % _BEAT == 0:
            beat()
        for one in element.properties:
            if one is indices:
                length = int(_take(reader, np.dtype(order + one.length_type), 1)[0])
                if not 3 <= length <= MAX_CORNERS:
                    raise UnusableMesh(f"a face of {length} corners")
                fan([int(index) for index in _take(reader, np.dtype(order + one.type), length)], corners)
            else:
                _take(reader, np.dtype(order + one.type), 1)
    return soup_of(array("d"), corners).triangles


def _take(file: BinaryIO, kind: np.dtype[np.generic], count: int) -> npt.NDArray[np.generic]:
    data = file.read(kind.itemsize * count)
    if len(data) != kind.itemsize * count:
        raise UnusableMesh("the surface is cut short")
    return np.frombuffer(data, kind)


# --- text ------------------------------------------------------------------------------------------------------------


def _text(path: Path, elements: list[_Element], beat: Beat) -> Soup:
    lines = lines_of(path, beat)
    for words in lines:
        if words == [b"end_header"]:
            break
    places: array[float] = array("d")
    corners: array[int] = array("q")
    try:
        for element in elements:
            for _ in range(element.count):
                _item(element, iter(next(lines)), places, corners)
    except StopIteration:
        raise UnusableMesh("the surface is cut short") from None
    except ValueError:
        raise UnusableMesh("a value of the surface is no number") from None
    return soup_of(places, corners)


def _item(element: _Element, words: Iterator[bytes], places: array[float], corners: array[int]) -> None:
    seen: dict[str, float] = {}
    for one in element.properties:
        if not one.length_type:
            value = float(next(words))
            if element.name == "vertex":
                seen[one.name] = value
            continue
        length = int(next(words)[:12])
        if not 0 <= length <= 4 * MAX_CORNERS:
            raise UnusableMesh(f"a list of {length} values")
        values = [next(words) for _ in range(length)]
        if element.name == "face" and one.name in _INDICES:
            fan([int(value[:12]) for value in values], corners)
    if element.name == "vertex":
        places.extend((seen["x"], seen["y"], seen["z"]))
