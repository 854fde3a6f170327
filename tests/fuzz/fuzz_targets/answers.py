"""What engines elsewhere answer: volumes, surfaces, tensors, features. None is trusted."""

from __future__ import annotations

import gzip
import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from dicom_node.engines._geojson import features
from dicom_node.engines._kserve_wire import FLOATS, Wanted, answered
from dicom_node.engines.masks import read_volume
from dicom_node.engines.meshes import read_mesh
from dicom_node.errors import EngineError

from ._target import Input, Target

__all__ = ["TARGETS"]

MAX_VOXELS = 1 << 20


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-answer-")) / "answer"


def volumes(data: bytes) -> None:
    """NIfTI or NRRD: a volume of finite place and bounded size, or EngineError."""
    _file().write_bytes(data)
    try:
        found = read_volume(_file(), max_bytes=MAX_VOXELS)
    except EngineError:
        return
    assert found.array.ndim == 3 and found.array.nbytes <= MAX_VOXELS * 8
    assert found.affine_lps.shape == (4, 4) and np.isfinite(found.affine_lps).all()


def _volumes(_: Path | None) -> Iterator[bytes]:
    voxels = bytes(range(8))
    nrrd = (
        b"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 2 2\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: %s\n"
        b"Segment0_LabelValue:=1\nSegment0_Name:=liver\n\n"
    )
    yield nrrd % b"raw" + voxels
    yield nrrd % b"gzip" + gzip.compress(voxels, mtime=0)
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 2, 2, 2, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, 352)
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    header[344:348] = b"n+1\0"
    yield bytes(header) + voxels
    yield gzip.compress(bytes(header) + voxels, mtime=0)


def surfaces(data: bytes) -> None:
    """STL, PLY or OBJ: finite corners and triangles that name them, or EngineError."""
    _file().write_bytes(data)
    try:
        found = read_mesh(_file())
    except EngineError:
        return
    assert np.isfinite(found.vertices).all() and found.vertices.shape[1] == 3
    assert found.triangles.shape[1] == 3 and int(found.triangles.max()) < len(found.vertices)


def _surfaces(_: Path | None) -> Iterator[bytes]:
    corners = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    faces = ((0, 2, 1), (0, 1, 3), (1, 2, 3), (0, 3, 2))
    facets = [b"".join(struct.pack("<3f", *corners[at]) for at in face) for face in faces]
    yield bytes(80) + struct.pack("<I", 4) + b"".join(bytes(12) + facet + b"\0\0" for facet in facets)
    written = "".join(
        "facet normal 0 0 0\nouter loop\n" + "".join("vertex {} {} {}\n".format(*corners[at]) for at in face)
        + "endloop\nendfacet\n"
        for face in faces
    )  # fmt: skip
    yield f"solid a\n{written}endsolid a\n".encode()
    listed = "".join("v {} {} {}\n".format(*corner) for corner in corners)
    yield (listed + "".join("f {} {} {}\n".format(*(at + 1 for at in face)) for face in faces)).encode()
    head = "ply\nformat {} 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
    head += "element face 4\nproperty list uchar int vertex_indices\nend_header\n"
    text = "".join("{} {} {}\n".format(*corner) for corner in corners) + "".join(
        "3 {} {} {}\n".format(*f) for f in faces
    )
    yield (head.format("ascii") + text).encode()
    packed = b"".join(struct.pack("<3f", *corner) for corner in corners)
    yield head.format("binary_little_endian").encode() + packed + b"".join(struct.pack("<B3i", 3, *f) for f in faces)


def tensors(data: bytes) -> None:
    """An answer of the KServe protocol: finite tensors of the shape that was asked for, or EngineError."""
    source = Input(data)
    length = source.number(2)
    header, body = ("" if length == 0xFFFF else str(length)), source.rest()
    try:
        reply = answered(body, header, {"out": Wanted(datatypes=FLOATS | {"INT32", "UINT8"}, shape=(1, None))})
    except EngineError:
        return
    found = reply.tensors["out"]
    assert found.ndim == 2 and found.shape[0] == 1 and np.isfinite(found).all()
    assert found.nbytes <= 8 * len(body)


def _tensors(_: Path | None) -> Iterator[bytes]:
    told = {"name": "out", "datatype": "FP32", "shape": [1, 2]}
    plain = json.dumps({"model_version": "1", "outputs": [{**told, "data": [0.5, 1.0]}]}).encode()
    binary = json.dumps({"outputs": [{**told, "parameters": {"binary_data_size": 8}}]}).encode()
    yield b"\xff\xff" + plain
    yield struct.pack(">H", len(binary)) + binary + struct.pack("<2f", 0.5, 1.0)


def geojson(data: bytes) -> None:
    """Features, each a JSON object, or EngineError."""
    _file().write_bytes(data)
    with suppress(EngineError):
        assert all(isinstance(one, dict) for one in features(_file()))


def _features(_: Path | None) -> Iterator[bytes]:
    one = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2.5]}, "properties": {"a": None}}
    yield json.dumps({"type": "FeatureCollection", "features": [one, one]}).encode()
    yield json.dumps([one]).encode()
    yield json.dumps(one).encode()


TARGETS = (
    Target(name="volumes", run=volumes, seeds=_volumes),
    Target(name="surfaces", run=surfaces, seeds=_surfaces),
    Target(name="tensors", run=tensors, seeds=_tensors),
    Target(name="geojson", run=geojson, seeds=_features),
)
