"""Polygons of a Clara Train AIAA server, read and painted: [slice][polygon][vertex][x, y] to a mask.

x is the column, y the row, slices in the order of the volume. Of a vertex of whole numbers two meanings are known: the
centre of a pixel, as tracers of outlines have it (the outline is then part of the mask), or a corner of one. Polygons
inside others are holes (the even-odd rule), whose outline belongs to what is around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError

__all__ = ["Polygon", "Slices", "UnusablePolygons", "area", "painted", "polygons_of", "slices_of"]

Mask = npt.NDArray[np.bool_]
Polygon = npt.NDArray[np.float64]
"""n x 2: column, row."""
Slices = tuple[tuple[Polygon, ...], ...]

MAX_POLYGONS = 10_000  # of one slice
MAX_VERTICES = 5_000_000  # of one volume
_MAX_CROSSED = 4  # rows that the edges of a slice cross, for each of its pixels: no mask has more than 1
_ON = 1e-6  # of a pixel: nearer to an outline is on it


class UnusablePolygons(EngineError):
    """What came back are no polygons on these images; the message says why."""


def slices_of(told: Any, shape: tuple[int, int, int], beat: Callable[[], None]) -> Slices:
    """The polygons of an answer for a volume of `shape` (slice, row, column). Raises UnusablePolygons."""
    if not isinstance(told, list) or len(told) != shape[0]:
        raise UnusablePolygons(f"polygons of {_count(told)} slices for a volume of {shape[0]}")
    found: list[tuple[Polygon, ...]] = []
    vertices = 0
    for one in told:
        found.append(polygons_of(one, shape[1:]))
        vertices += sum(len(polygon) for polygon in found[-1])
        if vertices > MAX_VERTICES:
            raise UnusablePolygons(f"more than {MAX_VERTICES} vertices")
        beat()
    return tuple(found)


def polygons_of(told: Any, size: tuple[int, int]) -> tuple[Polygon, ...]:
    """Those of one slice of `size` (rows, columns); empty ones are passed over. Raises UnusablePolygons."""
    if not isinstance(told, list) or len(told) > MAX_POLYGONS:
        raise UnusablePolygons(f"a slice has no list of at most {MAX_POLYGONS} polygons")
    found = tuple(_polygon(one, size) for one in told if one != [])
    crossed = sum(float(np.abs(polygon[:, 1] - np.roll(polygon[:, 1], 1)).sum()) for polygon in found)
    if crossed > _MAX_CROSSED * size[0] * size[1]:
        raise UnusablePolygons("the outlines of a slice run up and down more often than there are pixels")
    return found


def _polygon(told: Any, size: tuple[int, int]) -> Polygon:
    if not isinstance(told, list) or len(told) > MAX_VERTICES:
        raise UnusablePolygons("a polygon is no list of vertices")
    for vertex in told:
        if not isinstance(vertex, list) or len(vertex) != 2 or not all(_is_number(part) for part in vertex):
            raise UnusablePolygons("a vertex is no pair of numbers")
    points = np.array(told, np.float64)
    rows, columns = size
    if not (np.isfinite(points).all() and (points >= -1).all() and (points <= (columns, rows)).all()):
        raise UnusablePolygons("a vertex lies beside the image")
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _count(told: Any) -> str:
    return str(len(told)) if isinstance(told, list) else "no list of"


def area(polygon: Polygon) -> float:
    """What it encloses, in pixels (the shoelace formula); the sense does not matter."""
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def painted(
    polygons: Sequence[Polygon], size: tuple[int, int], vertices: Literal["centres", "corners"] = "centres"
) -> Mask:
    """The pixels of one slice (rows, columns) that the polygons cover.

    With `centres` a pixel is covered when its centre is inside or on an outline: of whole-numbered vertices these are
    area + half the outline's lattice points + 1 pixels (Pick's theorem), and one or two vertices are a pixel or a line.
    With `corners` a pixel is covered when its centre is inside: of edges along rows and columns the area exactly.
    """
    inside = np.zeros(size, np.bool_)
    shift = 0.5 if vertices == "corners" else 0.0
    moved = [polygon - shift for polygon in polygons]
    for polygon in moved:
        _toggle(inside, polygon)
    if vertices == "centres":
        for polygon in moved:
            _outline(inside, polygon)
    return inside


def _edges(polygon: Polygon) -> Iterator[tuple[float, float, float, float]]:
    """x and y of the upper end, then of the lower; the last vertex is joined to the first."""
    points: list[tuple[float, float]] = [(float(x), float(y)) for x, y in polygon]
    for (x0, y0), (x1, y1) in pairwise([*points, points[0]]):
        yield (x0, y0, x1, y1) if y0 <= y1 else (x1, y1, x0, y0)


def _toggle(inside: Mask, polygon: Polygon) -> None:
    """Turn what lies inside: of each row, what is between its first and second crossing, third and fourth ..."""
    rows, columns = inside.shape
    crossings: dict[int, list[float]] = {}
    for x0, y0, x1, y1 in _edges(polygon):
        # the upper end counts and the lower does not, so that each row is crossed an even number of times
        for row in range(max(math.ceil(y0), 0), min(math.ceil(y1), rows)):
            crossings.setdefault(row, []).append(x0 + (row - y0) * (x1 - x0) / (y1 - y0))
    for row, at in crossings.items():
        at.sort()
        for left, right in zip(at[::2], at[1::2], strict=True):
            # likewise the left end counts and the right does not
            first, last = max(math.ceil(left), 0), min(math.ceil(right), columns)
            inside[row, first:last] ^= True


def _outline(inside: Mask, polygon: Polygon) -> None:
    """Set what lies on an outline."""
    rows, columns = inside.shape
    for x0, y0, x1, y1 in _edges(polygon):
        if y1 - y0 < _ON:
            row, ends = round(y0), sorted((x0, x1))
            if abs(y0 - row) < _ON and 0 <= row < rows:
                first, last = max(math.ceil(ends[0] - _ON), 0), min(math.floor(ends[1] + _ON), columns - 1)
                inside[row, first : last + 1] = True
            continue
        for row in range(max(math.ceil(y0 - _ON), 0), min(math.floor(y1 + _ON), rows - 1) + 1):
            x = x0 + (row - y0) * (x1 - x0) / (y1 - y0)
            column = round(x)
            if abs(x - column) < _ON and 0 <= column < columns:
                inside[row, column] = True
