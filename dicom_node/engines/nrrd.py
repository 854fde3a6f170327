"""Volumes from NRRD files (.nrrd, .seg.nrrd), as MONAI Label and 3D Slicer answer: http://teem.sourceforge.net/nrrd.

Attached headers only, encodings raw and gzip. Written here because a reader of files that others send must not do what
the public one does: follow a file name in the header out of the folder, and unpack a stream to whatever size it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.engines._voxel_stream import MAX_VOXEL_BYTES, ReturnedVolume, UnusableVolume, VoxelStream, opened

__all__ = ["read_nrrd"]

_MAX_HEADER = 1024**2  # 255 segments of 3D Slicer, each with its terminology, take a quarter of it
_MAX_NAMES = 255
_TYPES = {
    **{"signed char": "i1", "int8": "i1", "int8_t": "i1"},
    **{"uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1"},
    **{"short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2"},
    **{"int16_t": "i2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2"},
    **{"uint16_t": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4"},
    **{"unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "longlong": "i8", "long long": "i8"},
    **{"long long int": "i8", "signed long long": "i8", "signed long long int": "i8", "int64": "i8", "int64_t": "i8"},
    **{"ulonglong": "u8", "unsigned long long": "u8", "unsigned long long int": "u8", "uint64": "u8"},
    **{"uint64_t": "u8", "float": "f4", "double": "f8"},
}
# From each space to LPS
_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1.0, -1.0, 1.0)),
}
_MILLIMETRES = {"", "mm", "millimeter", "millimeters", "millimetre", "millimetres"}
_VECTOR = re.compile(r"none|\([^()]*\)")
_SEGMENT = re.compile(r"Segment(\d{1,4})_(Name|LabelValue|Layer)")

Fields = Mapping[str, str]


def read_nrrd(
    path: Path, *, max_bytes: int = MAX_VOXEL_BYTES, heartbeat: Callable[[], None] | None = None
) -> ReturnedVolume:
    """The one volume of a NRRD file of anybody, with its place in LPS and the names 3D Slicer gives its labels.

    No memory is taken before the header's sizes have been found sane, at most `max_bytes` of voxels. Raises
    UnusableVolume with the reason: no NRRD file, voxels in another file, another encoding than raw or gzip, several
    volumes or layers, no anatomical space, a place that is not finite, too large, cut short, damaged, or more behind
    the voxels than the header announces.
    """
    with opened(path, heartbeat) as stream:
        fields, pairs = _read_header(stream)
        if "data file" in fields or "datafile" in fields:
            raise UnusableVolume("the voxels of this NRRD file are in another file")
        dtype = _voxel_type(fields)
        shape, spatial = _shape(fields)
        affine = _affine(fields, spatial)
        array = _voxel_stream(stream, fields).voxels(shape, dtype, max_bytes)
    return ReturnedVolume(array=array, affine_lps=affine, names=_names(pairs))


def _read_header(stream: VoxelStream) -> tuple[Fields, Mapping[str, str]]:
    """Fields by their names in small letters, and key/value pairs."""
    left = _MAX_HEADER
    if not re.fullmatch(rb"NRRD000[1-5]", stream.line(64)):
        raise UnusableVolume("this is no NRRD file")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    while line := stream.line(left):
        left -= len(line) + 1
        text = line.decode("utf-8", "replace")
        pair, field = text.find(":="), text.find(": ")
        if text.startswith("#"):
            continue
        if pair >= 0 and (field < 0 or pair < field):
            pairs[text[:pair]] = text[pair + 2 :]
        elif field >= 0:
            name = text[:field].strip().lower()
            if name in fields:
                raise UnusableVolume(f"the NRRD header has {name[:32]!r} twice")
            fields[name] = text[field + 2 :].strip()
        else:
            raise UnusableVolume("a line of the NRRD header is neither a field nor a comment")
    return fields, pairs


def _required(fields: Fields, name: str) -> str:
    if name not in fields:
        raise UnusableVolume(f"the NRRD header has no {name!r}")
    return fields[name]


def _voxel_type(fields: Fields) -> np.dtype[Any]:
    name = _required(fields, "type").lower()
    if name not in _TYPES:
        raise UnusableVolume(f"NRRD type {name[:32]!r}: real numbers are read")
    dtype = np.dtype(_TYPES[name])
    if dtype.itemsize == 1:
        return dtype
    order = {"little": "<", "big": ">"}.get(_required(fields, "endian").lower())
    if order is None:
        raise UnusableVolume("the NRRD header's endian is neither little nor big")
    return dtype.newbyteorder(order)  # type: ignore[arg-type]


def _shape(fields: Fields) -> tuple[tuple[int, int, int], list[str]]:
    """The three sides of the volume, and the space direction of each as text."""
    try:
        sizes = [int(side) for side in _required(fields, "sizes").split()]
        dimension = int(_required(fields, "dimension"))
    except ValueError as exc:
        raise UnusableVolume("the NRRD header's dimension or sizes are no whole numbers") from exc
    directions = _VECTOR.findall(_required(fields, "space directions"))
    if not len(sizes) == len(directions) == dimension <= 16:
        raise UnusableVolume("the NRRD header's dimension, sizes and space directions do not fit each other")
    axes = [n for n, direction in enumerate(directions) if direction != "none"]
    others = [size for n, size in enumerate(sizes) if n not in axes]
    if any(size != 1 for size in others):
        raise UnusableVolume(f"a NRRD file of {' x '.join(map(str, others))} volumes or layers: one was expected")
    if len(axes) != 3:
        raise UnusableVolume(f"a NRRD file with {len(axes)} axes in space is no volume")
    return (sizes[axes[0]], sizes[axes[1]], sizes[axes[2]]), [directions[n] for n in axes]


def _affine(fields: Fields, directions: list[str]) -> npt.NDArray[np.float64]:
    space = _required(fields, "space").lower()
    if space not in _SPACES:
        raise UnusableVolume(f"NRRD space {space[:32]!r} does not say where the patient is")
    units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', fields.get("space units", ""))}
    if units - _MILLIMETRES:
        raise UnusableVolume("the NRRD header's space units are not millimetres")
    affine = np.eye(4)
    for axis, text in enumerate((*directions, _required(fields, "space origin"))):
        affine[:3, axis] = np.asarray(_SPACES[space]) * _vector(text)
    return affine


def _vector(text: str) -> npt.NDArray[np.float64]:
    try:
        vector = np.array([float(number) for number in text.strip().strip("()").split(",")])
    except ValueError as exc:
        raise UnusableVolume("a vector of the NRRD header is no vector") from exc
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise UnusableVolume("the place of the file is not a finite one in three dimensions")
    return vector


def _voxel_stream(stream: VoxelStream, fields: Fields) -> VoxelStream:
    if fields.get("line skip", "0") != "0" or fields.get("byte skip", "0") != "0":
        raise UnusableVolume("a NRRD file that skips bytes is not read")
    encoding = _required(fields, "encoding").lower()
    if encoding in ("gzip", "gz"):
        return stream.unpacked()
    if encoding != "raw":
        raise UnusableVolume(f"NRRD encoding {encoding[:32]!r}: raw and gzip are read")
    return stream


def _names(pairs: Mapping[str, str]) -> Mapping[int, str]:
    """Label to name, as 3D Slicer's segmentations tell them (SegmentN_LabelValue, SegmentN_Name)."""
    told: dict[str, dict[str, str]] = {}
    for key, value in pairs.items():
        if match := _SEGMENT.fullmatch(key):
            told.setdefault(match[1], {})[match[2]] = value
    names: dict[int, str] = {}
    for segment in told.values():
        number = segment.get("LabelValue", "")
        if number.isascii() and number.isdigit() and segment.get("Name") and len(names) < _MAX_NAMES:
            names[int(number[:9])] = segment["Name"]
    return names
