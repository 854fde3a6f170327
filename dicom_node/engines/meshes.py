"""Surfaces an engine returned: STL, PLY and OBJ files to vertices and triangles, and the check where they lie.

The files carry neither frame of reference nor unit. Millimetres are taken for granted; the frame is LPS where the
surface lies in the box of the images it was made from, RAS where it does so only with x and y negated, and otherwise
nothing is believed. Every count of a file is checked before memory is taken for it. Draco (.drc) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicom_node.engines._mesh_ply import read_ply
from dicom_node.engines._mesh_text import MAX_MESH_BYTES, MAX_TRIANGLES, Soup, UnusableMesh, read_ascii_stl, read_obj
from dicom_node.errors import StorageError
from dicom_node.geometry import VolumeGeometry

__all__ = [
    "MAX_MESH_BYTES",
    "MAX_TRIANGLES",
    "Box",
    "MisplacedMesh",
    "Surface",
    "UnusableMesh",
    "as_lps",
    "frame_of",
    "read_mesh",
    "source_box",
]

SLACK_MM = 5.0
_SMALLEST_MM = 1.0  # longest side of a structure: less was written in metres
_MAX_PAIRS = 100_000_000  # of parts, one that faces inwards and one it may lie in
_STL_HEAD, _STL_FACET = 84, 50
_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])

Beat = Callable[[], None]


class MisplacedMesh(UnusableMesh):
    """A surface lies beside the images it was made from; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """`vertices` n x 3 float32 in mm, each once; `triangles` m x 3 uint32, counter-clockwise seen from outside.

    `closed`: every edge has its two triangles. `volume_cm3` is what a closed one encloses, 0 of an open one.
    """

    vertices: npt.NDArray[np.float32]
    triangles: npt.NDArray[np.uint32]
    closed: bool
    volume_cm3: float
    notes: tuple[str, ...] = ()

    @property
    def low(self) -> npt.NDArray[np.float64]:
        """The lower corner of the box around it."""
        return np.asarray(self.vertices.min(axis=0), np.float64)

    @property
    def high(self) -> npt.NDArray[np.float64]:
        """The upper corner."""
        return np.asarray(self.vertices.max(axis=0), np.float64)


def read_mesh(path: Path, *, max_bytes: int = MAX_MESH_BYTES, heartbeat: Beat = lambda: None) -> Surface:
    """An STL (ASCII or binary), PLY (ASCII or binary) or OBJ file, told apart by its content.

    Equal corners become one vertex, triangles without an area are dropped, polygons are cut into triangles. Raises
    UnusableMesh with the reason, StorageError when the file cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as exc:
        raise StorageError(f"a surface an engine returned cannot be read ({exc.strerror})") from exc
    if size > max_bytes:
        raise UnusableMesh(f"a surface of {size} bytes is too large, at most {max_bytes} are read")
    return _surface(_soup(path, size, head, heartbeat), heartbeat)


def _soup(path: Path, size: int, head: bytes, beat: Beat) -> Soup:
    if head.startswith(b"DRACO"):
        raise UnusableMesh("the surface is compressed with Draco, which is not read: order .stl, .ply or .obj instead")
    if head.startswith((b"ply\n", b"ply\r")):
        return read_ply(path, beat)
    if len(head) >= _STL_HEAD and size == _STL_HEAD + _STL_FACET * int.from_bytes(head[80:84], "little"):
        return _binary_stl(path, size)  # before the word: some writers begin the binary kind with "solid" too
    if head.lstrip()[:5].lower() == b"solid":
        return read_ascii_stl(path, beat)
    if b"\0" not in head and any(line.split(b" ")[0].strip() in _OBJ_WORDS for line in head.splitlines()):
        return read_obj(path, beat)
    raise UnusableMesh("the file is no STL, PLY or OBJ surface, or is cut short")


_OBJ_WORDS = frozenset({b"v", b"vn", b"vt", b"f", b"o", b"g", b"mtllib", b"usemtl"})


def _binary_stl(path: Path, size: int) -> Soup:
    count = (size - _STL_HEAD) // _STL_FACET
    if count > MAX_TRIANGLES:
        raise UnusableMesh(f"{count} triangles are too many, at most {MAX_TRIANGLES} are read")
    with path.open("rb") as file:
        file.seek(_STL_HEAD)
        facets = np.fromfile(file, _FACET, count)
    if len(facets) != count:
        raise UnusableMesh("the surface is cut short")
    corners = facets["corners"].reshape(-1, 3).astype(np.float32)
    return Soup(corners, np.arange(3 * count, dtype=np.int64).reshape(-1, 3))


# --- one surface -----------------------------------------------------------------------------------------------------


def _surface(soup: Soup, beat: Beat) -> Surface:
    if not len(soup.triangles):
        raise UnusableMesh("the surface has no triangle")
    if soup.triangles.min() < 0 or soup.triangles.max() >= len(soup.vertices):
        raise UnusableMesh("a triangle of the surface names a vertex that is not there")
    if not np.isfinite(soup.vertices).all():
        raise UnusableMesh("a vertex of the surface is no finite number")
    if np.abs(soup.vertices).max() > 1e5:
        raise UnusableMesh("a vertex of the surface lies more than 100 m away")
    vertices, triangles = _welded(soup.vertices, soup.triangles)
    beat()
    if np.ptp(vertices, axis=0).max() < _SMALLEST_MM:
        raise UnusableMesh("the surface is smaller than 1 mm: written in metres? Millimetres are expected")
    closed = _is_closed(triangles, len(vertices))
    beat()
    notes: tuple[str, ...] = ()
    cones_mm3 = _cones_mm3(vertices, triangles)
    if cones_mm3.sum() < 0:
        triangles, cones_mm3 = np.ascontiguousarray(triangles[:, ::-1]), -cones_mm3
        notes = ("the triangles faced inwards and were turned",)
    if not closed:
        notes = (*notes, "the surface is not closed")
    elif (inwards := _inwards(vertices, triangles, cones_mm3)).any():
        triangles[inwards], cones_mm3[inwards] = triangles[inwards][:, ::-1], -cones_mm3[inwards]
        notes = (*notes, "separate parts whose triangles faced inwards were turned")
    volume_cm3 = float(cones_mm3.sum()) / 1000.0 if closed else 0.0
    return Surface(vertices=vertices, triangles=triangles, closed=closed, volume_cm3=volume_cm3, notes=notes)


def _welded(
    vertices: npt.NDArray[np.float32], triangles: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint32]]:
    """Each used position once, in the order of first use; no triangle without an area."""
    used = np.ascontiguousarray(vertices[triangles.reshape(-1)] + np.float32(0))  # -0.0 is 0.0
    keys = used.view([("x", "<u4"), ("y", "<u4"), ("z", "<u4")]).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    corners = place[inverse.reshape(-1)].reshape(-1, 3)
    a, b, c = corners.T
    kept = corners[(a != b) & (b != c) & (c != a)]
    if not len(kept):
        raise UnusableMesh("the surface has no triangle with an area")
    positions = used[first[order]]
    alive, renumbered = np.unique(kept, return_inverse=True)
    if len(alive) != len(positions):
        positions, kept = positions[alive], renumbered.reshape(-1, 3).astype(np.uint32)
    return np.ascontiguousarray(positions), np.ascontiguousarray(kept)


def _is_closed(triangles: npt.NDArray[np.uint32], count: int) -> bool:
    """Whether every edge is run through once in each direction."""
    wide = triangles.astype(np.int64)
    starts = wide.reshape(-1)
    ends = wide[:, (1, 2, 0)].reshape(-1)
    there, back = np.sort(starts * count + ends), np.sort(ends * count + starts)
    return bool(np.array_equal(there, back) and (np.diff(there) > 0).all())


def _cones_mm3(vertices: npt.NDArray[np.float32], triangles: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """The signed tetrahedra over the triangles: their sum is positive when they are counter-clockwise from outside."""
    centred = vertices.astype(np.float64) - vertices.mean(axis=0, dtype=np.float64)
    a, b, c = (centred[triangles[:, corner]] for corner in range(3))
    return np.asarray(np.einsum("ij,ij->i", a, np.cross(b, c)) / 6.0, np.float64)


def _inwards(
    vertices: npt.NDArray[np.float32], triangles: npt.NDArray[np.uint32], cones_mm3: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Which triangles of a closed surface are of a part that faces inwards although it lies in no other: no cavity."""
    part_of = _parts(triangles, len(vertices))
    facing = np.bincount(part_of[triangles[:, 0]], weights=cones_mm3)
    wrong = np.zeros(len(facing), np.bool_)
    if (facing < 0).any():
        order = np.argsort(part_of, kind="stable")
        starts = np.searchsorted(part_of[order], np.arange(len(facing)))
        low, high = (each.reduceat(vertices[order], starts) for each in (np.minimum, np.maximum))
        outer = facing > 0
        if int(outer.sum()) * int((facing < 0).sum()) > _MAX_PAIRS:
            raise UnusableMesh(f"the surface is in {len(facing)} separate parts: nobody can say what is inside of it")
        for part in np.flatnonzero(facing < 0):
            around = (low[outer] <= low[part]).all(axis=1) & (high[outer] >= high[part]).all(axis=1)
            wrong[part] = not around.any()
    return np.asarray(wrong[part_of[triangles[:, 0]]])


def _parts(triangles: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.int64]:
    """Of each vertex the part of the surface it belongs to, counted from 0: what triangles join is one part."""
    lowest = np.arange(count)
    while True:
        joined = lowest[triangles]
        first = joined.min(axis=1)
        if (joined == first[:, None]).all():
            return np.asarray(np.unique(lowest, return_inverse=True)[1], np.int64).reshape(-1)
        np.minimum.at(lowest, joined.reshape(-1), np.repeat(first, 3))
        while (lowest[lowest] != lowest).any():
            lowest = lowest[lowest]


# --- where it lies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Box:
    """The corners of a box along the patient's axes, LPS, in mm."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def holds(self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> bool:
        """Whether a box lies in it, or up to 5 mm outside."""
        return bool((low >= np.array(self.low) - SLACK_MM).all() and (high <= np.array(self.high) + SLACK_MM).all())


def source_box(geometry: VolumeGeometry) -> Box:
    """The box around all voxels of the images, their outer halves included."""
    ends = [(-0.5, count - 0.5) for count in geometry.grid_shape]
    corners = np.array([(k, r, c, 1.0) for k in ends[0] for r in ends[1] for c in ends[2]])
    places = (geometry.affine @ corners.T).T[:, :3]
    low, high = places.min(axis=0), places.max(axis=0)
    return Box((float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2])))


def frame_of(surfaces: Sequence[Surface], box: Box, *, told: str = "AUTO") -> tuple[str, str]:
    """ "LPS" or "RAS", the frame that all surfaces of one answer are in, and a note for people, '' when it is plain.

    Surfaces of one answer share their frame, so that one which tells decides for those that would fit both ways. Where
    all fit both ways LPS is taken, and the note says that the files do not tell. `told` is the frame the operator knows
    it to be, "LPS" or "RAS": they must fit so. Raises MisplacedMesh when one fits neither way, or one only this way
    and another only that.
    """
    lps = [box.holds(surface.low, surface.high) for surface in surfaces]
    ras = [box.holds(*_negated(surface)) for surface in surfaces]
    if told != "AUTO":
        if not all(lps if told == "LPS" else ras):
            raise MisplacedMesh(f"a surface does not lie in the images as {told}, which it is configured to be in")
        return told, "converted from RAS: x and y were negated" if told == "RAS" else ""
    if all(lps):
        return "LPS", "the frame of the surface is not told: it would fit the images as RAS too" if all(ras) else ""
    if all(ras):
        return "RAS", "converted from RAS: x and y were negated, as the surface fits the images only so"
    if all(one or other for one, other in zip(lps, ras, strict=True)):
        raise MisplacedMesh("some surfaces fit the images only as LPS, others only as RAS")
    lost = next(surface for surface, one, other in zip(surfaces, lps, ras, strict=True) if not one and not other)
    raise MisplacedMesh(
        f"the surface ({_told(lost.low, lost.high)} mm) does not lie in the images "
        f"({_told(np.array(box.low), np.array(box.high))} mm), neither as LPS nor as RAS"
    )


def as_lps(surface: Surface, frame: str) -> Surface:
    """The surface in LPS. Negating two axes is a turn, so that inside stays inside."""
    if frame == "LPS":
        return surface
    return replace(surface, vertices=surface.vertices * np.array([-1, -1, 1], np.float32) + np.float32(0))


def _negated(surface: Surface) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    low, high = surface.low, surface.high
    return np.array([-high[0], -high[1], low[2]]), np.array([-low[0], -low[1], high[2]])


def _told(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{one:.0f}..{other:.0f}" for one, other in zip(low, high, strict=True))
