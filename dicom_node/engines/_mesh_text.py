"""Surfaces written as text: ASCII STL and Wavefront OBJ, line by line, every count and length bounded."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError, StorageError

__all__ = [
    "MAX_MESH_BYTES",
    "MAX_TRIANGLES",
    "Soup",
    "UnusableMesh",
    "fan",
    "lines_of",
    "read_ascii_stl",
    "read_obj",
]

MAX_MESH_BYTES = 1024**3
MAX_TRIANGLES = 5_000_000
MAX_VERTICES = 3 * MAX_TRIANGLES
MAX_CORNERS = 255  # of one polygon
_MAX_LINE = 4096
_BEAT = 65_536  # lines

Beat = Callable[[], None]


class UnusableMesh(EngineError):
    """A surface cannot be read or used; the message says why."""


class Soup(NamedTuple):
    """Vertices and triangles as a file has them, checked for nothing but their number."""

    vertices: npt.NDArray[np.float32]
    triangles: npt.NDArray[np.int64]


def lines_of(path: Path, beat: Beat) -> Iterator[list[bytes]]:
    """The words of each line that has any. Raises UnusableMesh, StorageError."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE):
                if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                    raise UnusableMesh("a line of the surface is longer than 4096 bytes")
                number += 1
                if number % _BEAT == 0:
                    beat()
                if words := line.split():
                    yield words
    except OSError as exc:
        raise StorageError(f"a surface an engine returned cannot be read ({exc.strerror})") from exc


def fan(corners: list[int], out: array[int]) -> None:
    """A convex polygon as triangles. Raises UnusableMesh."""
    if not 3 <= len(corners) <= MAX_CORNERS:
        raise UnusableMesh(f"a face of {len(corners)} corners")
    if len(out) + 3 * (len(corners) - 2) > 3 * MAX_TRIANGLES:
        raise UnusableMesh(f"more than {MAX_TRIANGLES} triangles")
    for second, third in pairwise(corners[1:]):
        out.extend((corners[0], second, third))


def soup_of(places: array[float], corners: array[int]) -> Soup:
    """What was gathered, as arrays."""
    vertices = np.frombuffer(places, np.float64).reshape(-1, 3) if places else np.empty((0, 3))
    triangles = np.frombuffer(corners, np.int64).reshape(-1, 3) if corners else np.empty((0, 3), np.int64)
    with np.errstate(over="ignore"):  # what is too large for a single becomes infinite, and is refused for it
        return Soup(vertices.astype(np.float32), triangles)


def read_ascii_stl(path: Path, beat: Beat) -> Soup:
    """`vertex x y z` three times between `outer loop` and `endloop`; several solids are one surface."""
    places: array[float] = array("d")
    ended = False
    in_loop = 0
    for words in lines_of(path, beat):
        word = words[0].lower()
        if word == b"vertex":
            _place(words, places)
            in_loop += 1
        elif word == b"endloop":
            if in_loop != 3:
                raise UnusableMesh(f"a facet of {in_loop} corners: STL has triangles only")
            in_loop = 0
        ended = word == b"endsolid"
    if not ended or in_loop:
        raise UnusableMesh("the STL text has no end: it is cut short")
    return soup_of(places, array("q", range(len(places) // 3)))


def read_obj(path: Path, beat: Beat) -> Soup:
    """`v x y z` and `f`, its indices from 1, or counted back from the newest when negative; the rest is passed over."""
    places: array[float] = array("d")
    corners: array[int] = array("q")
    for words in lines_of(path, beat):
        if words[0] == b"v":
            _place(words, places)
        elif words[0] == b"f":
            fan([_index(word, len(places) // 3) for word in words[1:]], corners)
    return soup_of(places, corners)


def _place(words: list[bytes], places: array[float]) -> None:
    try:
        places.extend([float(words[1]), float(words[2]), float(words[3])])
    except (ValueError, IndexError):
        raise UnusableMesh("a vertex of the surface is not three numbers") from None
    if len(places) > 3 * MAX_VERTICES:
        raise UnusableMesh(f"more than {MAX_VERTICES} vertices")


def _index(word: bytes, count: int) -> int:
    text = word.split(b"/", 1)[0]
    try:
        number = int(text[:12])
    except ValueError:
        raise UnusableMesh("a corner of a face is no number") from None
    index = number - 1 if number > 0 else count + number
    if number == 0 or not 0 <= index < MAX_VERTICES:
        raise UnusableMesh("a face names a vertex that is not there")
    return index
