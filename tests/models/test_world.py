"""Where every pixel lies, told by the pixels themselves: their value is their place in the patient.

A wrong order, spacing, affine, shift or rescale shows as a wrong value at once (0.01 is a hundredth of a millimetre).
highdicom's own geometry is asked too, where it takes the series.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.filebase import DicomBytesIO

from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import StoredInstance
from dicom_node.pixels import ImageFile, read_image, read_volume, series_geometry
from dicom_node.results.seg import SegEncoder
from dicom_node.values import (
    Code,
    LabelVolume,
    Provenance,
    ResultContext,
    Segment,
)

Stored = Callable[[Path], StoredInstance]
World = Any
MakeWorld = Callable[..., World]
Floats = npt.NDArray[np.float64]


def rotation(seed: int) -> Floats:
    """A random rotation matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q * np.array([-1, 1, 1])


def read(world: World, stored: Stored, regular: str = "require") -> tuple[VolumeGeometry, npt.NDArray[Any]]:
    images = [read_image(stored(path)) for path in world.paths]
    geometry = series_geometry(images, regular=regular)  # type: ignore[arg-type]
    return geometry, read_volume(images, geometry)


def grid_index(geometry: VolumeGeometry, k: int, row: Floats, column: Floats) -> Floats:
    """Where pixels of slice k lie on the regular grid, as `VolumeGeometry` says: (..., 3) slice, row, column."""
    down, across = geometry.shifts_px[k] if geometry.shifts_px else (0.0, 0.0)
    plane = geometry.positions_mm[k] / geometry.spacing_mm[0]
    return np.stack([np.full(row.shape, plane), row + down, column + across], axis=-1)


def lps(geometry: VolumeGeometry, index: Floats) -> Floats:
    return np.asarray(index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3])


def check(world: World, geometry: VolumeGeometry, volume: npt.NDArray[Any], *, within_mm: float = 2e-3) -> None:
    """Every pixel of every slice: identity, place by the headers, place by the geometry, value."""
    assert geometry.identities == world.slices
    assert volume.shape == geometry.shape
    rows, columns = (axis.astype(np.float64) for axis in np.indices(geometry.shape[1:]))
    for k in range(geometry.shape[0]):
        index = grid_index(geometry, k, rows, columns)
        places = world.place(k, rows, columns)
        np.testing.assert_allclose(lps(geometry, index), places, atol=within_mm)
        np.testing.assert_allclose(volume[k], world.value(places), atol=5e-3)
        assert index.min() >= -1e-6 and (index.max(axis=(0, 1)) <= np.array(geometry.grid_shape) - 1 + 1e-6).all()


def sampled(geometry: VolumeGeometry, volume: npt.NDArray[Any], index: Floats) -> Floats:
    """Values at grid indices (n, 3), nan outside the slices: neighbours at their true places, each in its own shift."""
    out = np.full(len(index), np.nan)
    at = index[:, 0] * geometry.spacing_mm[0]
    positions = np.asarray(geometry.positions_mm)
    lower = np.clip(np.searchsorted(positions, at, side="right") - 1, 0, len(positions) - 2)
    for n, k in enumerate(lower):
        weight = (at[n] - positions[k]) / (positions[k + 1] - positions[k])
        if not -1e-9 <= weight <= 1 + 1e-9:
            continue
        out[n] = (1 - weight) * _bilinear(geometry, volume, k, index[n]) + weight * _bilinear(
            geometry, volume, k + 1, index[n]
        )
    return out


def _bilinear(geometry: VolumeGeometry, volume: npt.NDArray[Any], k: int, index: Floats) -> float:
    down, across = geometry.shifts_px[k] if geometry.shifts_px else (0.0, 0.0)
    row, column = index[1] - down, index[2] - across
    r, c = math.floor(row), math.floor(column)
    if r < 0 or c < 0 or r + 1 >= geometry.shape[1] or c + 1 >= geometry.shape[2]:
        return math.nan
    square = volume[k, r : r + 2, c : c + 2].astype(np.float64)
    lines = square[0] * (1 - (row - r)) + square[1] * (row - r)
    return float(lines[0] * (1 - (column - c)) + lines[1] * (column - c))


def check_between(world: World, geometry: VolumeGeometry, volume: npt.NDArray[Any]) -> None:
    """A linear function survives linear interpolation: gaps, jitter and tilt included, values stay places."""
    index = np.random.default_rng(3).uniform(0, 1, (400, 3)) * (np.array(geometry.grid_shape) - 1)
    values = sampled(geometry, volume, index)
    inside = ~np.isnan(values)
    assert inside.sum() > 100
    np.testing.assert_allclose(values[inside], world.value(lps(geometry, index[inside])), atol=6e-3)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("multiframe", [False, True], ids=["single-frame", "multi-frame"])
def test_every_pixel_of_a_random_series_is_where_it_says(
    seed: int, multiframe: bool, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    rng = np.random.default_rng(seed)
    world = world_series(
        tmp_path,
        orientation=rotation(seed),
        spacing=tuple(rng.uniform(0.4, 3.0, 3)),
        shape=(int(rng.integers(3, 12)), 14, 11),
        order=("shuffled", "ascending", "descending")[seed % 3],
        multiframe=multiframe,
        seed=seed,
    )
    geometry, volume = read(world, stored)
    assert geometry.regular and not geometry.repairs and not geometry.shifts_px
    assert geometry.grid_shape == geometry.shape
    check(world, geometry, volume)
    check_between(world, geometry, volume)


REPAIRED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a slice missing": ({"gap": (4,)}, ("1 missing slice interpolated between -292.50 and -287.50 mm",)),
    "three missing in two places": ({"gap": (3, 7, 8)}, ("3 missing slices interpolated at 2 places",)),
    "jitter": ({"jitter": 0.4}, ("irregular spacing, each slice taken where it lies",)),
    "tilt": ({"tilt": 15.0}, ("gantry tilt of 15.0 degrees",)),
    "tilt the other way": ({"tilt": -22.0}, ("gantry tilt of 22.0 degrees",)),
    "all of it": (
        {"gap": (5,), "jitter": 0.4, "tilt": 10.0},
        ("1 missing slice interpolated", "irregular spacing", "gantry tilt of 10.0"),
    ),
}


@pytest.mark.parametrize("multiframe", [False, True], ids=["single-frame", "multi-frame"])
@pytest.mark.parametrize("turned", [False, True], ids=["axial", "oblique"])
@pytest.mark.parametrize("case", REPAIRED)
def test_what_is_repaired_is_still_where_it_says(
    case: str, turned: bool, multiframe: bool, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    how, says = REPAIRED[case]
    orientation = rotation(5) if turned else np.eye(3)
    world = world_series(tmp_path, orientation=orientation, multiframe=multiframe, **how)
    with pytest.raises(SeriesRejected):
        read(world, stored)
    geometry, volume = read(world, stored, "repair")
    assert not geometry.regular
    if not turned:
        assert len(geometry.repairs) == len(says)
        assert all(part in text for text, part in zip(geometry.repairs, says, strict=True))
    assert geometry.notes == geometry.repairs
    assert sum(geometry.widths_mm) == pytest.approx(geometry.coverage_mm, abs=0.1)
    check(world, geometry, volume)
    check_between(world, geometry, volume)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiframe", [False, True], ids=["single-frame", "multi-frame"])
def test_highdicom_reads_the_same_values_in_the_same_places(
    seed: int, multiframe: bool, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path, orientation=rotation(seed + 20), spacing=(2.0, 1.1, 0.9), multiframe=multiframe)
    geometry, volume = read(world, stored)
    datasets = [pydicom.dcmread(path) for path in world.paths]
    if multiframe:
        theirs = hd.Image.from_dataset(datasets[0]).get_volume(dtype=np.float64, apply_presentation_lut=False)
    else:
        theirs = hd.get_volume_from_series(datasets, dtype=np.float64, apply_presentation_lut=False)
    index = np.random.default_rng(seed).integers(0, geometry.shape, (200, 3))
    places = lps(geometry, index.astype(np.float64))
    back = np.linalg.inv(theirs.affine)
    at = places @ back[:3, :3].T + back[:3, 3]
    np.testing.assert_allclose(at, np.rint(at), atol=5e-3)
    k, row, column = np.rint(at).astype(int).T
    np.testing.assert_allclose(theirs.array[k, row, column], volume[tuple(index.T)], atol=2e-3)


@pytest.mark.parametrize(
    "syntax", [uids.RLELossless, uids.JPEG2000Lossless, uids.DeflatedExplicitVRLittleEndian], ids=["rle", "j2k", "zip"]
)
def test_compressed_frames_come_out_in_their_places(
    syntax: str, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    if syntax == uids.DeflatedExplicitVRLittleEndian:
        world = world_series(tmp_path, multiframe=True)
        ds = pydicom.dcmread(world.paths[0])
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(world.paths[0])
    else:
        world = world_series(tmp_path, shape=(4, 64, 40), multiframe=True, syntax=syntax)
    geometry, volume = read(world, stored)
    check(world, geometry, volume)


@pytest.mark.parametrize("syntax", [uids.ImplicitVRLittleEndian, uids.ExplicitVRBigEndian], ids=["implicit", "big"])
def test_functional_groups_are_read_in_every_encoding(
    syntax: str, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path, multiframe=True)
    ds = pydicom.dcmread(world.paths[0])
    for sequence in (ds["PerFrameFunctionalGroupsSequence"], ds["SharedFunctionalGroupsSequence"]):
        sequence.is_undefined_length = True
        for item in sequence.value:
            item.is_undefined_length_sequence_item = True
    cells = ds.pixel_array
    big = syntax == uids.ExplicitVRBigEndian
    for _ in ds.iterall():
        pass  # pydicom writes what it has not parsed in the byte order it was read in
    ds.PixelData = cells.astype(">u2" if big else "<u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(world.paths[0], ds, implicit_vr=not big, little_endian=not big, enforce_file_format=True)
    geometry, volume = read(world, stored)
    check(world, geometry, volume)
    assert read_image(stored(world.paths[0])).frames[3]["AcquisitionNumber"] == 1


def test_a_series_may_be_spread_over_several_multi_frame_images(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    """PS3.3 C.7.6.16.2.2.4: a concatenation, or two images that continue each other."""
    lower = world_series(tmp_path / "a", shape=(6, 12, 10), multiframe=True)
    upper = world_series(tmp_path / "b", shape=(6, 12, 10), multiframe=True, origin=(-20.0, 15.0, -285.0))
    images = [read_image(stored(path)) for path in (*upper.paths, *lower.paths)]
    geometry = series_geometry(images)
    assert geometry.identities == lower.slices + upper.slices
    np.testing.assert_array_equal(
        read_volume(images, geometry), np.concatenate([read(lower, stored)[1], read(upper, stored)[1]])
    )


# --- duplicates ------------------------------------------------------------------------------------------------------


def again(world: World, k: int, *, change: Callable[[pydicom.Dataset], None] = lambda ds: None) -> None:
    """Write slice k once more, as another instance."""
    uid = world.slices[k][0]
    path = next(path for path in world.paths if pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID == uid)
    ds = pydicom.dcmread(path)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{uid[:50]}.9"
    change(ds)
    ds.save_as(path.with_suffix(".again"))
    world.paths.append(path.with_suffix(".again"))


def _brighter(ds: pydicom.Dataset) -> None:
    values = ds.pixel_array.copy()
    values[3, 3] += 1
    ds.PixelData = values.tobytes()


def test_identical_duplicates_are_dropped_where_repair_is_allowed(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path)
    again(world, 4, change=lambda ds: setattr(ds, "WindowCenter", "40"))
    again(world, 7)
    with pytest.raises(SeriesRejected, match="duplicate position: 2 of 14 images"):
        read(world, stored)
    geometry, volume = read(world, stored, "repair")
    assert geometry.regular and geometry.shape[0] == 12
    assert geometry.notes == ("2 images left out, identical to another in the same place",)
    assert len(geometry.left_out) == 2
    kept = [uid for uid, _ in geometry.identities]
    assert [uid[:50] for uid in kept] == [uid[:50] for uid, _ in world.slices]
    check(_with_slices(world, geometry), geometry, volume)


def _with_slices(world: World, geometry: VolumeGeometry) -> World:
    from dataclasses import replace

    return replace(world, slices=geometry.identities)


@pytest.mark.parametrize(
    "change",
    [
        _brighter,
        lambda ds: setattr(ds, "RescaleIntercept", "-1"),
        lambda ds: ds.add_new("PixelPaddingValue", "US", int(ds.pixel_array[0, 0])),
    ],
    ids=["another pixel", "another rescale", "another padding"],
)
def test_duplicates_that_differ_are_refused_under_both_policies(
    change: Callable[[pydicom.Dataset], None], tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path)
    again(world, 4, change=change)
    for regular in ("require", "repair"):
        with pytest.raises(SeriesRejected, match="duplicate position"):
            read(world, stored, regular)


def test_the_attribute_that_tells_two_phases_apart_is_named(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path)
    for k in range(12):
        again(world, k, change=lambda ds: (_brighter(ds), setattr(ds, "AcquisitionNumber", "2"))[0])
    for regular in ("require", "repair"):
        with pytest.raises(SeriesRejected, match=r"duplicate position.*; Acquisition Number tells them apart"):
            read(world, stored, regular)


# --- multi-frame images that are no volume ---------------------------------------------------------------------------


def _enhanced(tmp_path: Path, world_series: MakeWorld, change: Callable[[pydicom.Dataset], None]) -> World:
    world = world_series(tmp_path, multiframe=True, order="ascending")
    ds = pydicom.dcmread(world.paths[0])
    change(ds)
    ds.save_as(world.paths[0])
    return world


def _frame(ds: pydicom.Dataset, number: int) -> pydicom.Dataset:
    return ds.PerFrameFunctionalGroupsSequence[number]  # type: ignore[no-any-return]


def _turn_one(ds: pydicom.Dataset) -> None:
    item = pydicom.Dataset()
    item.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    _frame(ds, 5).PlaneOrientationSequence = [item]


def _two_times(ds: pydicom.Dataset) -> None:
    for number in range(6):
        place = _frame(ds, number).PlanePositionSequence[0].ImagePositionPatient
        _frame(ds, number + 6).PlanePositionSequence[0].ImagePositionPatient = place
    for number in range(12):
        _frame(ds, number).FrameContentSequence[0].TemporalPositionIndex = 1 + number // 6


def _two_echoes(ds: pydicom.Dataset) -> None:
    _two_times(ds)
    for number in range(12):
        del _frame(ds, number).FrameContentSequence[0].TemporalPositionIndex
        item = pydicom.Dataset()
        item.EffectiveEchoTime = 2.5 * (1 + number // 6)
        _frame(ds, number).MREchoSequence = [item]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_two_echoes, "duplicate position.*; Echo Time tells them apart"),
        (lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"), r"12 frames\) does not say where each frame lies"),
        (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "does not say where each frame lies"),
        (lambda ds: setattr(ds, "NumberOfFrames", 100_000), "does not say where each frame lies"),
        (lambda ds: delattr(_frame(ds, 3), "PlanePositionSequence"), r"no Image Position \(Patient\)"),
        (lambda ds: delattr(ds, "SharedFunctionalGroupsSequence"), r"no Image Orientation \(Patient\)"),
        (_turn_one, "mixed orientation.*11 images have one value, 1 another"),
        (_two_times, "duplicate position.*; Temporal Position tells them apart"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-700]), "bytes of pixel data where"),
        (
            lambda ds: delattr(_frame(ds, 2), "PixelValueTransformationSequence"),
            "no Rescale Slope and Intercept",
        ),
    ],
)
def test_a_multi_frame_image_that_is_no_volume_is_refused(
    change: Callable[[pydicom.Dataset], None], says: str, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = _enhanced(tmp_path, world_series, change)
    for regular in ("require", "repair"):
        with pytest.raises(SeriesRejected, match=says):
            read(world, stored, regular)


def test_localizer_frames_are_left_out(tmp_path: Path, world_series: MakeWorld, stored: Stored) -> None:
    def scout(ds: pydicom.Dataset) -> None:
        item = pydicom.Dataset()
        item.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
        _frame(ds, 0).CTImageFrameTypeSequence = [item]
        _turn_one_to(ds, 0)

    def _turn_one_to(ds: pydicom.Dataset, number: int) -> None:
        item = pydicom.Dataset()
        item.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        _frame(ds, number).PlaneOrientationSequence = [item]

    world = _enhanced(tmp_path, world_series, scout)
    geometry, _ = read(world, stored)
    assert geometry.frame_numbers == tuple(range(2, 13))
    assert geometry.left_out == {f"{world.slices[0][0]} frame 1": "Image Type LOCALIZER"}
    assert geometry.notes == ("1 images not analysed: Image Type LOCALIZER",)


@pytest.mark.parametrize("kind", ["single-frame", "multi-frame", "rle"])
def test_rotten_files_are_refused_and_nothing_else_happens(
    kind: str, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    syntax = uids.RLELossless if kind == "rle" else uids.ExplicitVRLittleEndian
    world = world_series(tmp_path, shape=(4, 10, 9), multiframe=kind != "single-frame", syntax=syntax)
    instances = [stored(path) for path in world.paths]
    whole = world.paths[0].read_bytes()
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(80 if kind == "rle" else 250):
        rotten = bytearray(whole)
        at = int(rng.integers(instances[0].data_set_offset, len(rotten) - 8))
        rotten[at : at + int(rng.integers(1, 5))] = rng.bytes(int(rng.integers(0, 5)))
        world.paths[0].write_bytes(rotten)
        try:
            with warnings.catch_warnings(action="ignore"):
                images = [read_image(instance) for instance in instances]
                read_volume(images, series_geometry(images, regular="repair"))
        except SeriesRejected as exc:
            refused += bool(exc.reason)
    assert refused > 20


# --- values of any unit ----------------------------------------------------------------------------------------------


def _as_mr(path: Path, change: Callable[[pydicom.Dataset], None] = lambda ds: None) -> None:
    ds = pydicom.dcmread(path)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uids.MRImageStorage
    ds.Modality = "MR"
    change(ds)
    ds.save_as(path)


def _read_any(paths: list[Path], stored: Stored) -> tuple[list[ImageFile], npt.NDArray[Any]]:
    images = [read_image(stored(path)) for path in paths]
    geometry = series_geometry(images)
    by_uid = {image.instance.sop_instance_uid: image for image in images}
    return [by_uid[uid] for uid in geometry.sop_instance_uids], read_volume(images, geometry, values="any")


def test_mr_values_go_through_their_own_rescale_whatever_their_unit(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path)
    for path in world.paths:
        _as_mr(path, lambda ds: setattr(ds, "RescaleType", "US"))
    with pytest.raises(SeriesRejected, match="Rescale Type is US, not HU"):
        read(world, stored)
    _, volume = _read_any(world.paths, stored)
    rows, columns = np.indices(volume.shape[1:])
    for k, plane in enumerate(volume):
        np.testing.assert_allclose(plane, world.value(world.place(k, rows, columns)), atol=5e-3)


def test_an_enhanced_mr_is_read_frame_by_frame(tmp_path: Path, world_series: MakeWorld, stored: Stored) -> None:
    world = world_series(tmp_path, orientation=rotation(2), multiframe=True)

    def enhanced(ds: pydicom.Dataset) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uids.EnhancedMRImageStorage
        ds.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence = ds.SharedFunctionalGroupsSequence[
            0
        ].CTImageFrameTypeSequence
        del ds.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence
        for number in range(12):
            _frame(ds, number).PixelValueTransformationSequence[0].RescaleType = "US"

    _as_mr(world.paths[0], enhanced)
    image = read_image(stored(world.paths[0]))
    geometry = series_geometry([image])
    assert geometry.sop_class_uid == uids.EnhancedMRImageStorage
    assert image.frames[0]["ImageType"] == "ORIGINAL\\PRIMARY\\AXIAL\\NONE"
    check(world, geometry, read_volume([image], geometry, values="any"))
    with pytest.raises(SeriesRejected, match="Rescale Type is US, not HU"):
        read_volume([image], geometry)


def test_mr_without_rescale_keeps_its_stored_values(tmp_path: Path, world_series: MakeWorld, stored: Stored) -> None:
    world = world_series(tmp_path)

    def bare(ds: pydicom.Dataset) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept
        ds.PixelData = (ds.pixel_array & 0x7FFF).tobytes()

    for path in world.paths:
        _as_mr(path, bare)
    images, volume = _read_any(world.paths, stored)
    for image, plane in zip(images, volume, strict=True):
        np.testing.assert_array_equal(plane, pydicom.dcmread(image.instance.path).pixel_array)


def test_padding_of_values_without_air_is_the_lowest_of_the_slice(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path)

    def padded(ds: pydicom.Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "2", "0"
        values = np.clip(ds.pixel_array, 7, 9000).astype(np.uint16)
        values[0] = 65000
        values[5, 5] = 7
        ds.PixelData = values.tobytes()
        ds.add_new("PixelPaddingValue", "US", 65000)

    for path in world.paths:
        _as_mr(path, padded)
    _, volume = _read_any(world.paths, stored)
    assert (volume[:, 0] == 14).all()
    assert volume.max() <= 18000


# --- and back: labels on their slices ---------------------------------------------------------------------------------


def _segmentation(world: World, geometry: VolumeGeometry, labels: npt.NDArray[np.uint8]) -> hd.seg.Segmentation:
    organ = Code(value="10200004", scheme="SCT", meaning="Liver")
    category = Code(value="123037004", scheme="SCT", meaning="Anatomical Structure")
    volume = LabelVolume(
        labels=labels,
        sop_instance_uids=geometry.sop_instance_uids,
        frame_numbers=geometry.frame_numbers,
        segments=(Segment(number=1, key="liver", label="Liver", category=category, type=organ),),
        notes=geometry.notes,
    )
    context = ResultContext(
        run_key="run",
        tracking_key="model and series",
        run_number=1,
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        time_zone="+0000",
        provenance=Provenance(
            name="m", version="1", manufacturer="n", device_uid="1.2.9", weights_sha256="0" * 64, config_sha256="0" * 64
        ),
        node_name="node",
    )
    sources = [pydicom.dcmread(path, stop_before_pixels=True) for path in world.paths]
    (made,) = SegEncoder().encode([volume], sources, context, [])
    file = DicomBytesIO()
    pydicom.dcmwrite(file, made, enforce_file_format=True)
    file.seek(0)
    return hd.seg.segread(file)


@pytest.mark.parametrize("multiframe", [False, True], ids=["single-frame", "multi-frame"])
@pytest.mark.parametrize("how", [{}, {"gap": (4, 5)}, {"tilt": 12.0, "jitter": 0.4}], ids=["regular", "gap", "tilt"])
def test_labels_come_back_on_the_very_slices_they_were_made_on(
    how: dict[str, Any], multiframe: bool, tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path, orientation=rotation(8), multiframe=multiframe, **how)
    geometry, volume = read(world, stored, "repair")
    labels = (volume > np.median(volume)).astype(np.uint8)  # an oblique half space: every slice has its own edge
    labels[2] = 0
    made = _segmentation(world, geometry, labels)
    found: dict[tuple[str, int], int] = {}
    for number, item in enumerate(made.PerFrameFunctionalGroupsSequence):
        (source,) = item.DerivationImageSequence[0].SourceImageSequence
        identity = (source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber", 0)))
        k = geometry.identities.index(identity)
        found[identity] = k
        np.testing.assert_array_equal(made.pixel_array[number], labels[k])
        place = item.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose([float(v) for v in place], world.positions[k], atol=1e-6)
    # original slices get exactly their rows, what was interpolated between them gets none
    assert sorted(found.values()) == [k for k in range(len(labels)) if labels[k].any()]
    assert all(note in made.ImageComments for note in geometry.notes)


def test_highdicom_finds_the_labels_of_a_multi_frame_source_by_its_frames(
    tmp_path: Path, world_series: MakeWorld, stored: Stored
) -> None:
    world = world_series(tmp_path, multiframe=True)
    geometry, volume = read(world, stored)
    labels = (volume > np.median(volume)).astype(np.uint8)
    made = _segmentation(world, geometry, labels)
    theirs = made.get_pixels_by_source_frame(
        source_sop_instance_uid=geometry.sop_instance_uids[0],
        source_frame_numbers=list(geometry.frame_numbers),
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(theirs, labels)
    turned = made.get_volume(combine_segments=True)
    np.testing.assert_array_equal(turned.match_geometry(_volume_of(geometry)).array, labels)


def _volume_of(geometry: VolumeGeometry) -> hd.VolumeGeometry:
    return hd.VolumeGeometry(
        affine=geometry.affine, spatial_shape=geometry.shape, coordinate_system="PATIENT", frame_of_reference_uid=None
    )


# --- real multi-frame images -----------------------------------------------------------------------------------------

CORPUS = os.environ.get("DICOM_NODE_CORPUS")
with_corpus = pytest.mark.skipif(not CORPUS, reason="DICOM_NODE_CORPUS is not set: no real DICOM files")


@with_corpus
@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_a_real_enhanced_ct_lies_where_highdicom_says(name: str, stored: Stored) -> None:
    path = Path(str(CORPUS)) / "QIICR+dcmqi/data/segmentations" / name / "multiframe/mf.dcm"
    image = read_image(stored(path))
    geometry = series_geometry([image])
    assert geometry.frame_numbers == (1, 2, 3)
    theirs = hd.Image.from_dataset(pydicom.dcmread(path)).get_volume(apply_presentation_lut=False)
    turned = theirs.affine @ np.array([[-1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # theirs descends
    np.testing.assert_allclose(geometry.affine, turned, atol=1e-4)
    np.testing.assert_array_equal(read_volume([image], geometry, values="any"), theirs.array[::-1])
    with pytest.raises(SeriesRejected, match="Rescale Type is US, not HU"):
        read_volume([image], geometry)


@with_corpus
def test_a_real_time_series_is_one_volume_for_each_time_and_none_together_unless_all_are_the_same(
    stored: Stored,
) -> None:
    folder = Path(str(CORPUS)) / "DIAGNijmegen+rse-panimg/tests/resources/dicom_4d_enhanced"
    images = [read_image(stored(path)) for path in sorted(folder.iterdir())]
    assert len(images) > 10
    for image in images:
        geometry = series_geometry([image])
        assert geometry.shape == (4, 2, 3)
        assert geometry.spacing_mm == pytest.approx((0.5, 0.43, 0.43))
    with pytest.raises(SeriesRejected, match=r"duplicate position.*Acquisition Number tells them apart"):
        series_geometry(images)
    # these files lost their pixels with the patient: every time has the same ones
    geometry = series_geometry(images, regular="repair")
    assert geometry.notes == ("72 images left out, identical to another in the same place",)


@with_corpus
@pytest.mark.parametrize("kind", ["", "_RLE", "_big_endian", "_jpeg_2k_lossless", "_jpeg_ls_lossless"])
def test_a_real_enhanced_mr_that_lost_its_functional_groups_is_refused(kind: str, stored: Stored) -> None:
    path = Path(str(CORPUS)) / f"pydicom+pydicom-data/data_store/data/emri_small{kind}.dcm"
    with pytest.raises(SeriesRejected, match=r"10 frames\) does not say where each frame lies"):
        series_geometry([read_image(stored(path))], regular="repair")
