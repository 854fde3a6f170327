"""NRRD as MONAI Label and 3D Slicer write it: read where it lies, refused when it is more or less than one volume."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.engines.masks import UnusableVolume, read_volume
from dicom_node.engines.nrrd import read_nrrd

# As 3D Slicer writes a segmentation of two segments
HEADER = """NRRD0004
# Complete NRRD file format specification at:
# http://teem.sourceforge.net/nrrd/format.html
type: unsigned char
dimension: 3
space: left-posterior-superior
sizes: 4 3 2
space directions: (0.5,0,0) (0,0.6,0.1) (0,-0.2,3)
kinds: domain domain domain
encoding: raw
space origin: (-10,20.5,300)
Segment0_LabelValue:=1
Segment0_Name:=spleen
Segment0_TerminologyEntry:=Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure
Segment1_LabelValue:=7
Segment1_Name:=left kidney: upper
"""
ARRAY = np.arange(24, dtype=np.uint8).reshape(4, 3, 2, order="F")
# Index (column by column) to millimetres, by hand from the header above
AFFINE = np.array([[0.5, 0, 0, -10], [0, 0.6, -0.2, 20.5], [0, 0.1, 3, 300], [0, 0, 0, 1]])


def _file(path: Path, header: str = HEADER, data: bytes = ARRAY.tobytes(order="F"), end: str = "\n") -> Path:
    path.write_bytes((header + "\n").replace("\n", end).encode() + data)
    return path


def _with(field: str, value: str | None) -> str:
    """The header with another value of a field, or without it, or with one more."""
    lines = [line for line in HEADER.splitlines() if not line.startswith(field + ": ")]
    return "\n".join(lines if value is None else [*lines, f"{field}: {value}"]) + "\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_segmentation_of_slicer_is_read_with_its_place_and_names(tmp_path: Path, end: str) -> None:
    read = read_nrrd(_file(tmp_path / "v.seg.nrrd", end=end))
    np.testing.assert_array_equal(read.array, ARRAY)
    np.testing.assert_allclose(read.affine_lps, AFFINE, atol=1e-12)
    assert read.names == {1: "spleen", 7: "left kidney: upper"}


@pytest.mark.parametrize("name", ["gzip", "gz"])
def test_gzip_is_unpacked(tmp_path: Path, name: str) -> None:
    path = _file(tmp_path / "v.nrrd", _with("encoding", name), gzip.compress(ARRAY.tobytes(order="F")))
    np.testing.assert_array_equal(read_nrrd(path).array, ARRAY)


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("LPS", (1, 1, 1)),
        ("right-anterior-superior", (-1, -1, 1)),
        ("RAS", (-1, -1, 1)),
        ("left-anterior-superior", (1, -1, 1)),
    ],
)
def test_every_anatomical_space_is_told_in_lps(tmp_path: Path, space: str, signs: tuple[int, ...]) -> None:
    read = read_nrrd(_file(tmp_path / "v.nrrd", _with("space", space)))
    np.testing.assert_allclose(read.affine_lps, np.diag([*signs, 1]) @ AFFINE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[("int8", "i1"), ("uchar", "u1"), ("short", "<i2"), ("unsigned short", "<u2"), ("int", "<i4")],
        *[("uint32", "<u4"), ("int64", "<i8"), ("unsigned long long", "<u8"), ("float", "<f4"), ("double", "<f8")],
        *[("short", ">i2"), ("float", ">f4"), ("double", ">f8")],
    ],
)
def test_every_type_of_real_numbers_is_read(tmp_path: Path, name: str, dtype: str) -> None:
    header = _with("type", name) + f"endian: {'big' if dtype[0] == '>' else 'little'}\n"
    read = read_nrrd(_file(tmp_path / "v.nrrd", header, ARRAY.astype(dtype).tobytes(order="F")))
    assert read.array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read.array, ARRAY)


def test_a_list_of_one_layer_is_one_volume(tmp_path: Path) -> None:
    header = HEADER.replace("dimension: 3", "dimension: 4").replace("sizes: 4 3 2", "sizes: 1 4 3 2")
    header = header.replace("directions: (0.5", "directions: none (0.5").replace("kinds: ", "kinds: list ")
    read = read_nrrd(_file(tmp_path / "v.nrrd", header))
    np.testing.assert_array_equal(read.array, ARRAY)
    np.testing.assert_allclose(read.affine_lps, AFFINE)


def test_a_file_is_told_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_volume(_file(tmp_path / "answer.nii.gz")).array, ARRAY)


def _layers(count: int) -> str:
    header = HEADER.replace("dimension: 3", "dimension: 4").replace("sizes: 4 3 2", f"sizes: {count} 4 3 2")
    return header.replace("directions: (0.5", "directions: none (0.5")


GOOD = ARRAY.tobytes(order="F")
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "not NRRD": ("NRRX0004\n", GOOD, "no NRRD"),
    "a future version": (HEADER.replace("NRRD0004", "NRRD0009"), GOOD, "no NRRD"),
    "voxels elsewhere": (HEADER + "data file: ../../secret.raw\n", b"", "another file"),
    "voxels in a list of files": (HEADER + "datafile: LIST\n", b"", "another file"),
    "text": (_with("encoding", "ascii"), GOOD, "raw and gzip"),
    "bzip2": (_with("encoding", "bzip2"), GOOD, "raw and gzip"),
    "no encoding": (_with("encoding", None), GOOD, "no 'encoding'"),
    "blocks": (_with("type", "block"), GOOD, "real numbers"),
    "no byte order": (_with("type", "short"), GOOD * 2, "no 'endian'"),
    "another byte order": (_with("type", "short") + "endian: middle\n", GOOD * 2, "neither little nor big"),
    "two layers": (_layers(2), GOOD * 2, "2 volumes or layers"),
    "two dimensions": (
        HEADER.replace("dimension: 3", "dimension: 2").replace("sizes: 4 3 2", "sizes: 4 6").replace(" (0,-0.2,3)", ""),
        GOOD,
        "2 axes in space",
    ),
    "sizes that do not fit": (_with("sizes", "4 3"), GOOD, "do not fit"),
    "sizes that are none": (_with("sizes", "4 3 x"), GOOD, "whole numbers"),
    "a negative side": (_with("sizes", "4 3 -2"), GOOD, "is none"),
    "an empty side": (_with("sizes", "4 0 2"), GOOD, "is none"),
    "larger than the file": (_with("sizes", "40 30 20"), GOOD, "too short"),
    "absurdly large": (_with("sizes", "30000 30000 30000"), GOOD, "more than"),
    "beyond all": (_with("sizes", "99999999999 9 9"), GOOD, "is none"),
    "more than it says": (HEADER, GOOD + bytes(5000), "goes on"),
    "half a gzip stream": (_with("encoding", "gzip"), gzip.compress(GOOD)[:-9], "cut short"),
    "no gzip stream": (_with("encoding", "gzip"), GOOD, "damaged"),
    "no space": (_with("space", None), GOOD, "no 'space'"),
    "a scanner's space": (_with("space", "scanner-xyz"), GOOD, "where the patient is"),
    "no directions": (_with("space directions", None), GOOD, "no 'space directions'"),
    "directions that are none": (_with("space directions", "(1,0,0) (0,b,0) (0,0,1)"), GOOD, "no vector"),
    "infinite directions": (_with("space directions", "(1,0,0) (0,inf,0) (0,0,1)"), GOOD, "finite"),
    "NaN": (_with("space origin", "(nan,0,0)"), GOOD, "finite"),
    "two numbers of three": (_with("space origin", "(0,0)"), GOOD, "finite"),
    "no origin": (_with("space origin", None), GOOD, "no 'space origin'"),
    "inches": (HEADER + 'space units: "in" "in" "in"\n', GOOD, "millimetres"),
    "skipped bytes": (HEADER + "byte skip: -1\n", GOOD, "skips"),
    "twice": (HEADER + "sizes: 4 3 2\n", GOOD, "twice"),
    "nonsense": (HEADER + "what is this\n", GOOD, "neither a field"),
    "no end": (HEADER.rstrip("\n"), b"", "file ends inside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_volume_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    header, data, reason = REFUSED[case]
    with pytest.raises(UnusableVolume, match=reason):
        read_nrrd(_file(tmp_path / "v.nrrd", header, data))


def test_a_header_without_end_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "v.nrrd"
    for endless in (b"NRRD0004\n" + b"#" * 2**21, b"NRRD0004\n" + b"# comment\n" * 2**18):
        path.write_bytes(endless)
        with pytest.raises(UnusableVolume, match="too long"):
            read_nrrd(path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join((*(packer.compress(bytes(2**20)) for _ in range(64)), packer.flush()))
    with pytest.raises(UnusableVolume, match="goes on"):
        read_nrrd(_file(tmp_path / "v.nrrd", _with("encoding", "gzip"), bomb))


@settings(max_examples=300)
@given(changes=st.lists(st.tuples(st.integers(0, len(HEADER)), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_header_whatever_does_anything_but_be_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(HEADER.encode() + b"\n" + GOOD)
    for offset, value in changes:
        data[offset] = value
    path = tmp_path / "v.nrrd"
    path.write_bytes(data)
    try:
        read: Any = read_nrrd(path)
    except UnusableVolume:
        return
    array: npt.NDArray[Any] = read.array
    assert array.ndim == 3
    assert np.isfinite(read.affine_lps).all()
