"""NIfTI both ways: every voxel where its DICOM image says it is, and nothing believed that a file only claims."""

import gzip
import io
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid
from pydicom.valuerep import format_number_as_ds

from dicom_node.engines.masks import UnusableVolume
from dicom_node.engines.nifti import read_nifti, write_nifti
from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import Origin, StoredInstance
from dicom_node.pixels import read_image, read_volume, series_geometry

Floats = npt.NDArray[np.float64]
MIB = 1024**2


def _turned(seed: int) -> Floats:
    """A random right-handed frame: row direction, column direction and normal as columns."""
    frame, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
    return frame


def _frame(row: tuple[float, ...], column: tuple[float, ...]) -> Floats:
    return np.stack([row, column, np.cross(row, column)], axis=1)


FRAMES = {
    "axial": _frame((1, 0, 0), (0, 1, 0)),
    "axial, rows to the right": _frame((-1, 0, 0), (0, 1, 0)),
    "axial, upside down": _frame((1, 0, 0), (0, -1, 0)),
    "coronal": _frame((1, 0, 0), (0, 0, -1)),
    "sagittal": _frame((0, 1, 0), (0, 0, -1)),
    "gantry tilted": _frame((1, 0, 0), (0, math.cos(0.3), -math.sin(0.3))),
    **{f"oblique {seed}": _turned(seed) for seed in range(6)},
}
WEIGHTS = np.array([7.0, 5.0, 3.0])  # the value at (x, y, z) mm is their product: each pixel says where it lies


def _ds(values: Any) -> list[str]:
    return [str(format_number_as_ds(float(value))) for value in values]


def _image(frame: Floats, position: Floats, spacing: tuple[float, float, float], shape: tuple[int, int]) -> Dataset:
    row, column = np.indices(shape)
    places = position + row[..., None] * spacing[1] * frame[:, 1] + column[..., None] * spacing[2] * frame[:, 0]
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uids.CTImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.9"
    ds.PatientName = "Doe^Jane"
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient = _ds(position)
    ds.ImageOrientationPatient = _ds((*frame[:, 0], *frame[:, 1]))
    ds.PixelSpacing = _ds(spacing[1:])
    ds.RescaleSlope, ds.RescaleIntercept = "1", "0"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.Rows, ds.Columns = shape
    ds.PixelData = np.rint(places @ WEIGHTS).astype("<i2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return ds


def _stored(path: Path, ds: Dataset) -> StoredInstance:
    data = path.read_bytes()
    offset = 132 + 12 + struct.unpack("<I", data[140:144])[0]
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        transfer_syntax_uid=str(uids.ExplicitVRLittleEndian),
        path=str(path),
        data_set_offset=offset,
        data_set_length=len(data) - offset,
        sha256="",
        origin=Origin.RECEIVED,
    )


def _series(
    folder: Path, frame: Floats, spacing: tuple[float, float, float] = (2.5, 0.8, 0.7)
) -> tuple[npt.NDArray[np.int16], VolumeGeometry]:
    """A series, written and read again as the node does it, its files in no order."""
    positions = np.array([-60.0, 35.0, -120.0]) + np.outer(np.arange(7) * spacing[0], frame[:, 2])
    images = []
    for number in np.random.default_rng(1).permutation(7).tolist():
        ds = _image(frame, positions[number], spacing, (11, 9))
        path = folder / f"{number}.dcm"
        ds.save_as(path, enforce_file_format=True)
        images.append(read_image(_stored(path, ds)))
    geometry = series_geometry(images)
    volume = read_volume(images, geometry)
    assert volume.dtype == np.int16
    return volume.astype(np.int16), geometry


def _geometry(shape: tuple[int, int, int], **changes: Any) -> VolumeGeometry:
    affine = np.array([[0, 0, 0.7, -100], [0, 0.8, 0, -90], [2.5, 0, 0, 30], [0, 0, 0, 1]], np.float64)
    values: dict[str, Any] = {
        "sop_instance_uids": tuple(f"1.2.{k}" for k in range(shape[0])),
        "affine": affine,
        "spacing_mm": (2.5, 0.8, 0.7),
        "shape": shape,
        "sop_class_uid": uids.CTImageStorage,
        "frame_of_reference_uid": "1.2.3.9",
        "left_out": {},
    }
    return VolumeGeometry(**(values | changes))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_voxel_lies_where_its_image_says(tmp_path: Path, name: str, suffix: str) -> None:
    volume, geometry = _series(tmp_path, FRAMES[name])
    path = tmp_path / f"volume{suffix}"
    write_nifti(volume, geometry, path)
    image = nibabel.load(path)
    values = np.asanyarray(image.dataobj)
    assert values.dtype == np.int16
    assert sorted(values.shape) == sorted(volume.shape)
    index = np.moveaxis(np.indices(values.shape), 0, -1)
    for affine, tolerance in ((image.get_sform(), 0.001), (image.get_qform(), 0.02)):
        right, front, up = np.moveaxis(nibabel.affines.apply_affine(affine, index), -1, 0)
        expected = np.stack([-right, -front, up], axis=-1) @ WEIGHTS  # NIfTI counts to the right and to the front
        np.testing.assert_allclose(values, expected, atol=0.5 + tolerance * WEIGHTS.sum())
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), (0.7, 0.8, 2.5), rtol=1e-6)


def test_the_qform_of_what_is_written_is_as_good_as_a_quaternion_of_four_bytes_can_be(tmp_path: Path) -> None:
    worst = 0.0
    for seed in range(200):
        frame = _turned(seed) if seed % 2 else _turned(0) @ np.diag([-1.0, -1.0, 1.0])
        affine = np.eye(4)
        affine[:3, :3] = frame[:, ::-1] * (2.5, 0.8, 0.7)
        geometry = _geometry((3, 4, 5), affine=affine)
        write_nifti(np.zeros((3, 4, 5), np.int16), geometry, tmp_path / "v.nii")
        image = nibabel.load(tmp_path / "v.nii")
        apart = (image.get_qform() - image.get_sform())[:3, :3] / (0.7, 0.8, 2.5)
        worst = max(worst, float(np.abs(apart).max()))
    assert worst < 2e-3  # 0.0003 is usual; sqrt(2^-24) where the turn is by half a circle


def test_float_volumes_keep_their_values(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    write_nifti(volume, _geometry((3, 4, 5)), tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(nibabel.load(tmp_path / "v.nii.gz").dataobj).T, volume)


def test_the_same_volume_gives_the_same_bytes_and_nothing_but_geometry_and_voxels(tmp_path: Path) -> None:
    volume, geometry = _series(tmp_path, FRAMES["oblique 1"])
    for name in ("secret-name.nii.gz", "another.nii.gz"):
        write_nifti(volume, geometry, tmp_path / name)
    data = (tmp_path / "secret-name.nii.gz").read_bytes()
    assert data == (tmp_path / "another.nii.gz").read_bytes()
    assert data[3] == 0 and data[4:8] == bytes(4)  # no name, no time (RFC 1952)
    plain = gzip.decompress(data)
    assert len(plain) == 352 + volume.nbytes
    header = nibabel.nifti1.Nifti1Header(plain[:348])
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        assert not header[field].item()


def test_writing_needs_no_memory_beside_the_volume(tmp_path: Path) -> None:
    volume = np.zeros((300, 512, 512), np.int16)
    geometry = _geometry(volume.shape)
    beats: list[int] = []
    write_nifti(volume[:2], _geometry((2, 512, 512)), tmp_path / "warm.nii.gz")
    tracemalloc.start()
    try:
        write_nifti(volume, geometry, tmp_path / "v.nii.gz", heartbeat=lambda: beats.append(1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
    assert len(beats) == 300


def test_a_stack_that_is_no_regular_grid_is_not_written(tmp_path: Path) -> None:
    uneven = _geometry((3, 4, 5), regular=False, positions_mm=(0.0, 2.5, 7.5))
    with pytest.raises(SeriesRejected, match="regular grid"):
        write_nifti(np.zeros((3, 4, 5), np.int16), uneven, tmp_path / "v.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_could_not_be_finished_is_not_left(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_nifti(np.zeros((3, 4, 5), np.int16), _geometry((3, 4, 5)), tmp_path / "v.nii.gz", heartbeat=stop)
    assert list(tmp_path.iterdir()) == []


# --- reading ---------------------------------------------------------------------------------------------------------


def _saved(path: Path, array: npt.NDArray[Any], affine: Floats, kind: Any = nibabel.Nifti1Image, **header: Any) -> Path:
    image = kind(array, affine)
    image.header.set_xyzt_units("mm")
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)
    return path


AFFINE = np.array([[0.1, -0.8, 0.2, 40], [0.7, 0.1, 0.1, -30], [0.1, 0.1, 2.5, 12], [0, 0, 0, 1]], np.float64)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", FRAMES)
def test_what_was_written_is_read_at_the_same_place(tmp_path: Path, name: str) -> None:
    volume, geometry = _series(tmp_path, FRAMES[name])
    write_nifti(volume, geometry, tmp_path / "v.nii.gz")
    read = read_nifti(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(read.array.transpose(2, 1, 0), volume)
    index = np.array([[k, r, c, 1] for k in (0, 6) for r in (0, 10) for c in (0, 8)], np.float64)
    there = index[:, [2, 1, 0, 3]] @ read.affine_lps.T
    np.testing.assert_allclose(there, index @ geometry.affine.T, atol=1e-4)
    assert read.notes == ()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_files_of_others_are_read_as_nibabel_reads_them(tmp_path: Path, dtype: str, kind: Any, order: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    header.extensions.append(Nifti1Extension("comment", b"anything" * 40))
    path = tmp_path / "v.nii.gz"
    nibabel.save(kind(array, AFFINE, header=header), path)
    read = read_nifti(path)
    assert read.array.dtype == np.dtype(dtype)
    assert read.array.dtype.isnative
    np.testing.assert_array_equal(read.array, array)
    np.testing.assert_allclose(read.affine_lps, FLIP @ AFFINE, atol=1e-5)


def test_scaled_values_are_scaled(tmp_path: Path) -> None:
    path = _saved(tmp_path / "v.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    data = bytearray(path.read_bytes())
    data[112:120] = struct.pack("<ff", 0.5, -3.0)
    path.write_bytes(data)
    read = read_nifti(path)
    np.testing.assert_array_equal(read.array, np.arange(24).reshape(2, 3, 4) * 0.5 - 3)
    np.testing.assert_array_equal(read.array, nibabel.load(path).get_fdata())


def test_a_plane_and_a_volume_in_a_row_of_one_are_volumes(tmp_path: Path) -> None:
    assert read_nifti(_saved(tmp_path / "a.nii", np.ones((4, 5), np.uint8), AFFINE)).array.shape == (4, 5, 1)
    assert read_nifti(_saved(tmp_path / "b.nii", np.ones((4, 5, 6, 1), np.uint8), AFFINE)).array.shape == (4, 5, 6)


def _two_places(path: Path, sform: Floats, sform_code: int, qform: Floats, qform_code: int) -> Path:
    image = nibabel.Nifti1Image(np.zeros((6, 7, 8), np.uint8), None)
    image.header.set_sform(sform, sform_code)
    image.header.set_qform(qform, qform_code)
    image.to_filename(path)
    return path


RIGID = np.eye(4)
RIGID[:3, :3] = _turned(3) * (0.7, 0.8, 2.5)
RIGID[:3, 3] = (10, -20, 30)
MOVED = RIGID + np.array([[0, 0, 0, 5.0], [0] * 4, [0] * 4, [0] * 4])


@pytest.mark.parametrize(
    ("sform_code", "qform_code", "taken", "told"),
    [(1, 1, RIGID, True), (4, 1, RIGID, True), (1, 0, RIGID, False), (0, 1, MOVED, False), (0, 2, MOVED, False)],
)
def test_the_sform_comes_first_and_a_disagreement_is_told(
    tmp_path: Path, sform_code: int, qform_code: int, taken: Floats, told: bool
) -> None:
    read = read_nifti(_two_places(tmp_path / "v.nii", RIGID, sform_code, MOVED, qform_code))
    np.testing.assert_allclose(read.affine_lps, FLIP @ taken, atol=1e-3)
    assert bool(read.notes) is told


def test_agreeing_places_are_no_news(tmp_path: Path) -> None:
    assert read_nifti(_two_places(tmp_path / "v.nii", RIGID, 1, RIGID, 1)).notes == ()


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)])
def test_lengths_are_told_in_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), AFFINE)
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "v.nii")
    read = read_nifti(tmp_path / "v.nii")
    np.testing.assert_allclose(read.affine_lps[:3], (FLIP @ AFFINE)[:3] * factor, rtol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def _changed(path: Path, offset: int, layout: str, *values: Any) -> Path:
    """A good .nii with some bytes of its header changed."""
    data = bytearray(_saved(path, np.ones((4, 5, 6), np.uint8), AFFINE).read_bytes())
    struct.pack_into(layout, data, offset, *values)
    path.write_bytes(data)
    return path


NAN = float("nan")
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "two volumes": (lambda p: _saved(p, np.zeros((3, 4, 5, 2), np.uint8), AFFINE), "2 volumes"),
    "vectors": (lambda p: _saved(p, np.zeros((3, 4, 5, 1, 3), np.uint8), AFFINE), "3 volumes"),
    "complex": (lambda p: _saved(p, np.zeros((3, 4, 5), np.complex64), AFFINE), "complex"),
    "colour": (
        lambda p: _saved(p, np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE),
        "colour",
    ),
    "unknown datatype": (lambda p: _changed(p, 70, "<h", 999), "datatype 999"),
    "long double": (lambda p: _changed(p, 70, "<h", 1536), "datatype 1536"),
    "NaN in the sform": (lambda p: _changed(p, 280, "<f", NAN), "not a finite"),
    "infinity in the sform": (lambda p: _changed(p, 292, "<f", float("inf")), "not a finite"),
    "no place": (lambda p: _changed(p, 252, "<hh", 0, 0), "does not say where"),
    "impossible quaternion": (lambda p: _changed(p, 252, "<hhfff", 1, 0, 9.0, 9.0, 9.0), "not a finite"),
    "NaN in the quaternion": (lambda p: _changed(p, 252, "<hhfff", 1, 0, NAN, 0.0, 0.0), "not a finite"),
    "unknown unit": (lambda p: _changed(p, 123, "<B", 5), "unit of length"),
    "no dimensions": (lambda p: _changed(p, 40, "<h", 0), "."),
    "one dimension": (lambda p: _changed(p, 40, "<h", 1), "1 dimensions"),
    "a negative side": (lambda p: _changed(p, 42, "<h", -4), "a side of -4"),
    "an empty side": (lambda p: _changed(p, 44, "<h", 0), "a side of 0"),
    "larger than the file": (lambda p: _changed(p, 42, "<hhh", 40, 50, 60), "too short"),
    "absurdly large": (lambda p: _changed(p, 42, "<hhh", 32767, 32767, 32767), "more than"),
    "voxels inside the header": (lambda p: _changed(p, 108, "<f", 10.0), "begin at byte 10"),
    "voxels at half a byte": (lambda p: _changed(p, 108, "<f", 352.5), "begin at byte"),
    "voxels far away": (lambda p: _changed(p, 108, "<f", 3e9), "begin at byte"),
    "voxels nowhere": (lambda p: _changed(p, 108, "<f", NAN), "begin at byte"),
    "slope without offset": (lambda p: _changed(p, 112, "<ff", 2.0, NAN), "scl_slope"),
    "voxels in another file": (lambda p: _changed(p, 344, "<3s", b"ni1"), "elsewhere"),
    "something else": (lambda p: _written(p, b"<html>" * 100), "no NIfTI"),
    "nothing": (lambda p: _written(p, b""), "ends inside"),
    "half a header": (lambda p: _written(p, _good(p)[:200]), "ends inside"),
    "half its voxels": (lambda p: _written(p, _good(p)[:-60]), "ends after 60 of 120"),
    "more than it says": (lambda p: _written(p, _good(p) + bytes(5000)), "goes on"),
    "half a gzip stream": (lambda p: _written(p, _good(p, noise=True, packed=True)[:-5000]), "cut short"),
    "a gzip stream without its sums": (lambda p: _written(p, _good(p, packed=True)[:-8]), "cut short"),
    "a gzip stream with a wrong sum": (lambda p: _written(p, _good(p, packed=True)[:-8] + bytes(8)), "damaged"),
    "a damaged gzip stream": (lambda p: _written(p, _good(p, packed=True)[:60] + b"\xff" * 60), "damaged"),
    "gzip in gzip": (lambda p: _written(p, gzip.compress(_good(p, packed=True))), "no NIfTI"),
}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _good(path: Path, *, noise: bool = False, packed: bool = False) -> bytes:
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 40), np.uint8) if noise else np.ones((4, 5, 6), np.uint8)
    data = _saved(path, array, AFFINE).read_bytes()
    return gzip.compress(data) if packed else data


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_volume_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(UnusableVolume, match=reason):
        read_nifti(make(tmp_path / "v.nii"))


def _bomb(announced: tuple[int, int, int], megabytes: int) -> bytes:
    """A header of `announced` voxels and that much of nothing, a thousandth of it as gzip."""
    header = io.BytesIO()
    image = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.uint8), AFFINE)
    image.to_stream(header)
    data = bytearray(header.getvalue()[:352])
    struct.pack_into("<hhh", data, 42, *announced)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(data))]
    parts += [packer.compress(bytes(MIB)) for _ in range(megabytes)]
    return b"".join((*parts, packer.flush()))


@pytest.mark.parametrize(
    ("announced", "reason"),
    [((4, 5, 6), "goes on"), ((1000, 1000, 1000), "too short"), ((3000, 3000, 3000), "more than")],
)
def test_a_gzip_bomb_takes_no_memory(tmp_path: Path, announced: tuple[int, int, int], reason: str) -> None:
    path = _written(tmp_path / "v.nii.gz", _bomb(announced, 256))
    assert path.stat().st_size < MIB
    tracemalloc.start()
    try:
        with pytest.raises(UnusableVolume, match=reason):
            read_nifti(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_the_caller_may_set_a_lower_bound(tmp_path: Path) -> None:
    path = _saved(tmp_path / "v.nii", np.zeros((4, 5, 6), np.int16), AFFINE)
    assert read_nifti(path, max_bytes=240).array.size == 120
    with pytest.raises(UnusableVolume, match="more than the 239"):
        read_nifti(path, max_bytes=239)


def test_the_heartbeat_is_called_while_voxels_are_read(tmp_path: Path) -> None:
    beats: list[int] = []
    path = _saved(tmp_path / "v.nii.gz", np.zeros((300, 200, 100), np.int16), AFFINE)
    read_nifti(path, heartbeat=lambda: beats.append(1))
    assert len(beats) >= 3


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=12),
    cut=st.integers(0, 480),
)
def test_no_header_whatever_does_anything_but_be_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(_good(tmp_path / "good.nii"))
    for offset, value in changes:
        data[offset] = value
    path = _written(tmp_path / "v.nii", bytes(data[: len(data) - cut % 60]))
    try:
        read = read_nifti(path)
    except UnusableVolume:
        return
    assert read.array.ndim == 3
    assert np.isfinite(read.affine_lps).all()
