"""Surfaces: every kind of file, closed boxes to bytes and back, what is refused, and where they lie."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.engines import _mesh_text, meshes
from dicom_node.engines.meshes import (
    Box,
    MisplacedMesh,
    Surface,
    UnusableMesh,
    as_lps,
    frame_of,
    read_mesh,
    source_box,
)
from dicom_node.geometry import VolumeGeometry

CORNERS = np.array([(x, y, z) for z in (0, 30) for x, y in ((0, 0), (10, 0), (10, 20), (0, 20))], np.float32)
QUADS = [(0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)]
TRIANGLES = [triangle for a, b, c, d in QUADS for triangle in ((a, b, c), (a, c, d))]


def binary_stl(corners: Any = CORNERS, triangles: Any = TRIANGLES, head: bytes = b"") -> bytes:
    facets = b"".join(
        struct.pack("<12fH", 0, 0, 0, *np.asarray(corners)[list(face)].reshape(-1).tolist(), 0) for face in triangles
    )
    return head.ljust(80, b" ") + struct.pack("<I", len(triangles)) + facets


def ascii_stl(triangles: Any = TRIANGLES, end: str = "endsolid box\n") -> bytes:
    lines = ["solid box"]
    for face in triangles:
        lines += ["facet normal 0 0 0", " outer loop"]
        lines += [f"  vertex {x:.6e} {y:.6e} {z:.6e}" for x, y, z in CORNERS[list(face)].tolist()]
        lines += [" endloop", "endfacet"]
    return ("\n".join(lines) + "\n" + end).encode()


def ply(kind: str, faces: Any = TRIANGLES) -> bytes:
    head = f"ply\nformat {kind} 1.0\ncomment made by a test\nelement vertex 8\nproperty double x\nproperty float y\n"
    head += "property float z\nproperty uchar red\n" + f"element face {len(faces)}\nproperty uchar flags\n"
    data = (head + "property list uchar int vertex_indices\nend_header\n").encode()
    if kind == "ascii":
        lines = [f"{x!r} {y!r} {z!r} 7" for x, y, z in CORNERS.tolist()]
        lines += [" ".join(map(str, (1, len(face), *face))) for face in faces]
        return data + ("\n".join(lines) + "\n").encode()
    order = "<" if "little" in kind else ">"
    data += b"".join(struct.pack(f"{order}dffB", x, y, z, 7) for x, y, z in CORNERS.tolist())
    return data + b"".join(struct.pack(f"{order}BB{len(face)}i", 1, len(face), *face) for face in faces)


def obj(faces: Any = QUADS, *, back: bool = False) -> bytes:
    lines = ["# a box", "mtllib box.mtl", "o box"]
    lines += [f"v {x} {y} {z}" for x, y, z in CORNERS.tolist()]
    lines += ["vn 0 0 1", "g all"]
    index: Callable[[int], Any] = (lambda i: i - 8) if back else (lambda i: f"{i + 1}//1")
    return "\n".join([*lines, *("f " + " ".join(str(index(i)) for i in face) for face in faces), ""]).encode()


FILES = {
    "binary stl": binary_stl(),
    "binary stl that begins with solid": binary_stl(head=b"solid made by"),
    "ascii stl": ascii_stl(),
    "ascii ply": ply("ascii"),
    "ascii ply of quads": ply("ascii", QUADS),
    "little-endian ply": ply("binary_little_endian"),
    "big-endian ply": ply("binary_big_endian"),
    "big-endian ply of quads": ply("binary_big_endian", QUADS),
    "obj": obj(),
    "obj counted back": obj(TRIANGLES, back=True),
}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """`file(data)`: written."""

    def write(data: bytes) -> Path:
        path = tmp_path / "mesh"
        path.write_bytes(data)
        return path

    return write


def corners_of(surface: Surface) -> set[tuple[float, ...]]:
    return {tuple(corner) for corner in surface.vertices.tolist()}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_the_same_closed_box(name: str, file: Callable[[bytes], Path]) -> None:
    surface = read_mesh(file(FILES[name]))
    assert (len(surface.vertices), len(surface.triangles)) == (8, 12)
    assert (str(surface.vertices.dtype), str(surface.triangles.dtype)) == ("float32", "uint32")
    assert corners_of(surface) == {tuple(corner) for corner in CORNERS.tolist()}
    assert surface.closed and surface.notes == ()
    assert surface.volume_cm3 == pytest.approx(6.0)
    np.testing.assert_array_equal(surface.low, (0, 0, 0))
    np.testing.assert_array_equal(surface.high, (10, 20, 30))
    faces = surface.vertices[surface.triangles].astype(float)  # every normal points away from the middle
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    assert (np.einsum("ij,ij->i", normals, faces.mean(axis=1) - (5, 10, 15)) > 0).all()


def test_a_box_turned_inside_out_is_turned_back_and_says_so(file: Callable[[bytes], Path]) -> None:
    surface = read_mesh(file(binary_stl(triangles=[face[::-1] for face in TRIANGLES])))
    assert surface.closed and surface.volume_cm3 == pytest.approx(6.0)
    assert surface.notes == ("the triangles faced inwards and were turned",)


@pytest.mark.parametrize("inverted", ["small", "large"])
def test_a_separate_part_turned_inside_out_is_turned_back_and_a_cavity_is_not(
    file: Callable[[bytes], Path], inverted: str
) -> None:
    def both(second: Any, which: str) -> bytes:
        """A box of 6 ml, and one an eighth of it."""
        corners = np.concatenate([CORNERS, second])
        parts = [TRIANGLES, [tuple(index + 8 for index in face) for face in TRIANGLES]]
        turned = ("large", "small").index(which)
        parts[turned] = [face[::-1] for face in parts[turned]]
        return binary_stl(corners, parts[0] + parts[1])

    beside = read_mesh(file(both(CORNERS / 2 + np.float32(50), inverted)))
    assert beside.closed and beside.volume_cm3 == pytest.approx(6.75)
    assert beside.notes[-1] == "separate parts whose triangles faced inwards were turned"
    a, b, c = (beside.vertices[beside.triangles[:, corner]].astype(float) - 25 for corner in range(3))
    assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6000 == pytest.approx(6.75)  # and so it is written
    within = read_mesh(file(both(CORNERS / 2 + np.float32(2), inverted)))
    assert within.volume_cm3 == pytest.approx(5.25)


def test_a_surface_in_too_many_parts_is_refused(file: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meshes, "_MAX_PAIRS", 0)
    corners = np.concatenate([CORNERS, CORNERS / 2 + np.float32(50)])
    data = binary_stl(corners, TRIANGLES + [tuple(index + 8 for index in face[::-1]) for face in TRIANGLES])
    with pytest.raises(UnusableMesh, match="2 separate parts"):
        read_mesh(file(data))


@pytest.mark.parametrize(("length", "index"), [("float", "int"), ("uchar", "float"), ("double", "double")])
@pytest.mark.parametrize("corners", [3, 4])
def test_faces_of_fractions_are_refused(file: Callable[[bytes], Path], length: str, index: str, corners: int) -> None:
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 8\nproperty float x\nproperty float y\n"
    head += f"property float z\nelement face 1\nproperty list {length} {index} vertex_indices\nend_header\n"
    codes = {"float": "f", "double": "d", "int": "i", "uchar": "B"}
    data = head.encode() + np.asarray(CORNERS, "<f4").tobytes()
    nan = float("nan")
    data += struct.pack(f"<{codes[length]}", nan if length != "uchar" else corners)
    data += struct.pack(f"<{corners}{codes[index]}", 0, 1, *([nan] if index != "int" else [2]) * (corners - 2))
    with pytest.raises(UnusableMesh):
        read_mesh(file(data))


def test_a_surface_with_a_hole_says_so_and_has_no_volume(file: Callable[[bytes], Path]) -> None:
    surface = read_mesh(file(binary_stl(triangles=TRIANGLES[:-1])))
    assert not surface.closed and surface.volume_cm3 == 0
    assert "the surface is not closed" in surface.notes


def test_triangles_without_an_area_and_vertices_nobody_uses_are_dropped(file: Callable[[bytes], Path]) -> None:
    extra = obj([*QUADS, (1, 1, 2)]) + b"v 999 999 999\n"
    surface = read_mesh(file(extra))
    assert (len(surface.vertices), len(surface.triangles), surface.closed) == (8, 12, True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no STL, PLY or OBJ"),
        (b"PK\x03\x04" + bytes(200), "no STL, PLY or OBJ"),
        (b"DRACO\x02\x02" + bytes(40), r"Draco.*order \.stl"),
        (binary_stl()[:-1], "cut short"),
        (binary_stl() + b"x", "no STL|cut short"),
        (binary_stl(triangles=[]), "no triangle"),
        (bytes(80) + struct.pack("<I", 0xFFFFFFFF) + bytes(100), "no STL"),
        (binary_stl(CORNERS * np.float32(np.nan)), "finite"),
        (binary_stl(CORNERS + np.float32(1e7)), "100 m"),
        (binary_stl(CORNERS / np.float32(1000)), "metres"),
        (binary_stl(triangles=[(0, 0, 1), (2, 2, 2)]), "area"),
        (ascii_stl(end=""), "cut short"),
        (b"solid x\nfacet\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nendloop\nendfacet\nendsolid\n", "2 corners"),
        (b"solid x\nfacet\nouter loop\nvertex 0 zero 0\n", "three numbers"),
        (b"solid x " + b"y" * 5000, "longer than 4096"),
        (b"v 0 0 0\nv 1 0 0\nf 1 2 3\n", "not there"),
        (b"v 0 0 0\nf 0 1 2\n", "not there"),
        (b"v 0 0 0\nf 1 2\n", "2 corners"),
        (b"v 0 0 0\nf a b c\n", "no number"),
        (b"v 0 0\n", "three numbers"),
        (b"o nothing\nv 0 0 0\n", "no triangle"),
        (b"ply\nformat ascii 1.0\n", "no end"),
        (b"ply\nformat ascii 2.0 x\nelement vertex 1\nend_header\n", "format"),
        (b"ply\nformat ascii 1.0\nelement vertex -1\nend_header\n", "count"),
        (b"ply\nformat ascii 1.0\nelement vertex 999999999\nend_header\n", "too many"),
        (b"ply\nformat ascii 1.0\nrubbish\nend_header\n", "not understood"),
        (b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nend_header\n", "no faces"),
        (ply("ascii").replace(b"property float z\n", b""), "no x, y and z"),
        (ply("ascii").replace(b"vertex_indices", b"other_things"), "list of vertices"),
        (ply("ascii")[:-30], "cut short"),
        (ply("ascii").replace(b"1 3 0", b"1 3 x"), "no number"),
        (ply("ascii").replace(b"1 3 0", b"1 2 0"), "2 corners"),
        (ply("binary_little_endian")[:-3], "cut short"),
        (ply("binary_little_endian").replace(b"element vertex 8", b"element vertex 7999999"), "cut short"),
        (ply("binary_little_endian").replace(b"element face 12", b"element face 4999999"), "cut short|corners"),
        (ply("binary_little_endian", [(0, 1, 99)]), "not there"),
        (ply("binary_little_endian", [(0, 1, -1)]), "not there"),
    ],
)
def test_what_is_no_surface_is_refused_with_the_reason(data: bytes, said: str, file: Callable[[bytes], Path]) -> None:
    with pytest.raises(UnusableMesh, match=said):
        read_mesh(file(data))


def test_a_file_beyond_the_bound_is_not_read(file: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableMesh, match="too large"):
        read_mesh(file(binary_stl()), max_bytes=100)
    monkeypatch.setattr(meshes, "MAX_TRIANGLES", 11)
    with pytest.raises(UnusableMesh, match="12 triangles are too many"):
        read_mesh(file(binary_stl()))
    monkeypatch.setattr(_mesh_text, "MAX_TRIANGLES", 11)
    with pytest.raises(UnusableMesh, match="more than 11 triangles"):
        read_mesh(file(obj()))
    monkeypatch.setattr(_mesh_text, "MAX_VERTICES", 5)
    with pytest.raises(UnusableMesh, match="more than 5 vertices"):
        read_mesh(file(ascii_stl()))


def test_long_files_beat_and_end_when_the_heart_does(file: Callable[[bytes], Path]) -> None:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    with pytest.raises(Enough):
        read_mesh(file(b"v 0 0 0\n" * 70_000), heartbeat=stop)


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    name: str, data: st.DataObject, file: Callable[[bytes], Path]
) -> None:
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        surface = read_mesh(file(bytes(content)))
    except UnusableMesh:
        return
    assert np.isfinite(surface.vertices).all() and surface.triangles.max() < len(surface.vertices)


# --- where they lie --------------------------------------------------------------------------------------------------

BOX = Box((-50.0, -80.0, 0.0), (10.0, -20.0, 60.0))


@pytest.fixture
def box_at(file: Callable[[bytes], Path]) -> Callable[..., Surface]:
    """`box_at(x, y, z)`: the box with its first corner there."""
    return lambda *place: read_mesh(file(binary_stl(CORNERS + np.array(place, np.float32))))


def test_what_lies_in_the_images_is_lps_and_stays_as_it_is(box_at: Callable[..., Surface]) -> None:
    surface = box_at(-40, -70, 10)
    assert frame_of([surface], BOX) == ("LPS", "")
    assert as_lps(surface, "LPS") is surface
    assert frame_of([box_at(-54.9, -70, 10)], BOX)[0] == "LPS"  # 5 mm beside it is fine
    with pytest.raises(MisplacedMesh):
        frame_of([box_at(-55.1, -70, 35.2)], BOX)


def test_what_fits_only_with_x_and_y_negated_is_ras_and_is_converted(box_at: Callable[..., Surface]) -> None:
    surface = box_at(30, 50, 10)
    frame, note = frame_of([surface], BOX)
    assert (frame, "converted from RAS" in note) == ("RAS", True)
    turned = as_lps(surface, frame)
    assert (turned.low.tolist(), turned.high.tolist()) == ([-40, -70, 10], [-30, -50, 40])
    np.testing.assert_array_equal(turned.triangles, surface.triangles)
    assert meshes._cones_mm3(turned.vertices, turned.triangles).sum() == pytest.approx(6000.0)


def test_what_fits_neither_way_is_refused_and_says_where_it_lies(box_at: Callable[..., Surface]) -> None:
    with pytest.raises(MisplacedMesh, match=r"400\.\.410.*neither as LPS nor as RAS"):
        frame_of([box_at(400, 0, 0)], BOX)


def test_a_surface_that_fits_both_ways_follows_one_that_does_not(box_at: Callable[..., Surface]) -> None:
    centred = Box((-60.0, -60.0, 0.0), (60.0, 90.0, 60.0))
    both, only_ras, only_lps = box_at(0, 0, 0), box_at(0, -88, 0), box_at(0, 66, 0)
    frame, note = frame_of([both], centred)
    assert (frame, "would fit the images as RAS too" in note) == ("LPS", True)
    assert frame_of([both, only_lps], centred) == ("LPS", "")
    assert frame_of([both, only_ras], centred)[0] == "RAS"
    with pytest.raises(MisplacedMesh, match="some surfaces"):
        frame_of([only_lps, only_ras], centred)


def test_a_configured_frame_is_believed_and_must_fit(box_at: Callable[..., Surface]) -> None:
    centred = Box((-60.0, -60.0, 0.0), (60.0, 60.0, 60.0))
    assert frame_of([box_at(0, 0, 0)], centred, told="LPS") == ("LPS", "")
    assert frame_of([box_at(0, 0, 0)], centred, told="RAS")[0] == "RAS"
    with pytest.raises(MisplacedMesh, match="configured"):
        frame_of([box_at(-40, -70, 10)], BOX, told="RAS")


def test_the_box_of_the_images_holds_their_outer_halves() -> None:
    affine = np.array([(0, 0, 0.5, -10), (0, 0.5, 0, 20), (2, 0, 0, 100), (0, 0, 0, 1)], float)
    geometry = VolumeGeometry(
        sop_instance_uids=("1", "2", "3"),
        affine=affine,
        spacing_mm=(2.0, 0.5, 0.5),
        shape=(3, 20, 40),
        sop_class_uid="1.2",
        frame_of_reference_uid="1.3",
        left_out={},
    )
    assert source_box(geometry) == Box((-10.25, 19.75, 99.0), (9.75, 29.75, 105.0))
    turn = np.diag((-1.0, -1.0, 1.0, 1.0))
    assert source_box(replace(geometry, affine=turn @ affine)) == Box((-9.75, -29.75, 99.0), (10.25, -19.75, 105.0))
