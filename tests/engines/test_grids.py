"""Answers of engines back on their images: the same pixels of the same instances, from whatever grid they come.

The judge is the Standard's own equation (PS3.3 C.7.6.2.1-1) on the written headers, and a search of all distances;
nibabel turns the answers, ITK (dcmqi) writes some. Nothing of `grids` or `geometry` is used to say what is right.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from nibabel import orientations
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from dicom_node.engines.grids import GeometryMismatch, labels_on_source
from dicom_node.engines.masks import from_label_map, from_masks, read_volume
from dicom_node.engines.nifti import write_nifti
from dicom_node.geometry import GEOMETRY_KEYWORDS, VolumeGeometry, volume_geometry
from dicom_node.results.seg import SegEncoder
from dicom_node.values import LabelVolume, Provenance, ResultContext

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
NAMES = {1: "spleen", 2: "left kidney"}


# --- a series, and what is painted on it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """A series of `images`, in no order, and two balls in the patient: centre (mm, LPS) and radius of labels 1, 2."""

    images: list[Dataset]
    balls: tuple[tuple[Floats, float], ...]

    @property
    def geometry(self) -> VolumeGeometry:
        found = [{k: ds[k].value for k in GEOMETRY_KEYWORDS if k in ds} for ds in self.images]
        return volume_geometry(found)

    def at(self, places: Floats) -> Labels:
        """What is at places (..., 3) mm, LPS."""
        painted = np.zeros(places.shape[:-1], np.uint8)
        for label, (centre, radius) in enumerate(self.balls, start=1):
            painted[np.linalg.norm(places - centre, axis=-1) < radius] = label
        return painted

    def expected(self) -> dict[str, Labels]:
        """What each image must show, by its SOP Instance UID."""
        return {str(ds.SOPInstanceUID): self.at(_places(ds)) for ds in self.images}


def _places(ds: Dataset) -> Floats:
    """PS3.3 equation C.7.6.2.1-1: where each pixel (row, column) lies, from the header alone."""
    row, column = np.indices((ds.Rows, ds.Columns))
    directions = np.array(ds.ImageOrientationPatient, np.float64)
    down, across = (float(mm) for mm in ds.PixelSpacing)
    start = np.array(ds.ImagePositionPatient, np.float64)
    return np.asarray(start + column[..., None] * across * directions[:3] + row[..., None] * down * directions[3:])


def _rotation(rng: np.random.Generator) -> Floats:
    frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
    return frame


def _ds(values: Any) -> list[str]:
    return [str(format_number_as_ds(float(value))) for value in values]


def _patient(seed: int, *, uneven: bool = False, tilt: float = 0.0) -> Patient:
    """Any orientation, spacing, size and place; files in any order."""
    rng = np.random.default_rng(seed)
    frame = np.eye(3)[:, rng.permutation(3)] if seed % 3 == 0 else _rotation(rng)
    frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
    spacing = np.array([rng.uniform(1.0, 4.0), rng.uniform(0.5, 1.2), rng.uniform(0.5, 1.2)])
    shape = rng.integers((8, 12, 11), (12, 18, 17))
    start = rng.uniform(-200, 200, 3)
    along = np.arange(shape[0]) * spacing[0]
    if uneven:
        along[5:] += spacing[0]  # one slice is missing
    study, series, reference = generate_uid(), generate_uid(), generate_uid()
    images = []
    for k in rng.permutation(shape[0]).tolist():
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, reference
        ds.Modality, ds.PatientID, ds.PatientName, ds.PositionReferenceIndicator = "CT", "P", "Doe^Jane", ""
        ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.PatientBirthDate = ds.PatientSex = ""
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Rows, ds.Columns = int(shape[1]), int(shape[2])
        ds.PixelSpacing, ds.SliceThickness = _ds(spacing[1:]), "1"
        ds.ImageOrientationPatient = _ds((*frame[:, 0], *frame[:, 1]))
        ds.ImagePositionPatient = _ds(start + along[k] * (frame[:, 2] + tilt * frame[:, 1]))
        images.append(ds)
    extent = np.array([along[-1], *((shape - 1) * spacing)[1:]])
    axes = np.stack([frame[:, 2] + tilt * frame[:, 1], frame[:, 1], frame[:, 0]], axis=1)  # of slice, row, column
    balls = []
    for share in ((0.3, 0.35, 0.3), (0.75, 0.7, 0.7)):
        balls.append(
            (start + axes @ (extent * share), max(float(extent.min() * 0.28), float(np.linalg.norm(spacing)) * 0.8))
        )
    return Patient(images, tuple(balls))


def _sent(patient: Patient, folder: Path) -> Any:
    """What an engine gets, as nibabel reads it."""
    path = folder / "sent.nii.gz"
    write_nifti(np.zeros(patient.geometry.shape, np.int16), patient.geometry, path)
    return nibabel.load(path)


def _painted(patient: Patient, shape: tuple[int, ...], affine_ras: Floats) -> Any:
    """An answer on that grid: a voxel has the label of the place of its centre."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    ras = nibabel.affines.apply_affine(affine_ras, index)
    return nibabel.Nifti1Image(patient.at(ras * (-1.0, -1.0, 1.0)), affine_ras)


def _returned(image: Any, folder: Path, patient: Patient) -> LabelVolume:
    path = folder / "answer.nii.gz"
    nibabel.save(image, path)
    return from_label_map(read_volume(path), patient.geometry, names=NAMES)


# --- the judge -------------------------------------------------------------------------------------------------------


CONTEXT = ResultContext(
    run_key="run-1",
    tracking_key="track-1",
    run_number=1,
    created_at=datetime(2026, 1, 2, tzinfo=UTC),
    time_zone="+0000",
    provenance=Provenance(
        name="engine",
        version="1",
        manufacturer="maker",
        device_uid="2.25.7",
        weights_sha256="",
        config_sha256="",
    ),
    node_name="node",
)


def _encoded(volume: LabelVolume, patient: Patient, path: Path) -> Dataset:
    (seg,) = SegEncoder().encode([volume], patient.images, CONTEXT, [])
    dcmwrite(path, seg, enforce_file_format=True)
    return dcmread(path)


def _shown(seg: Dataset, patient: Patient) -> dict[str, Labels]:
    """The labels a reader of the segmentation sees on each image, by the images it refers to."""
    numbers = {"Spleen": 1, "Left kidney": 2}
    labels = {int(item.SegmentNumber): numbers[item.SegmentLabel] for item in seg.SegmentSequence}
    shown = {str(ds.SOPInstanceUID): np.zeros((ds.Rows, ds.Columns), np.uint8) for ds in patient.images}
    positions = {str(ds.SOPInstanceUID): list(ds.ImagePositionPatient) for ds in patient.images}
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        uid = str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        assert list(group.PlanePositionSequence[0].ImagePositionPatient) == positions[uid]
        shown[uid][frame > 0] = labels[int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
    return shown


def _assert_shows(volume: LabelVolume, patient: Patient, expected: dict[str, Labels], folder: Path) -> None:
    assert {1, 2} <= {int(value) for plane in expected.values() for value in np.unique(plane)}
    shown = _shown(_encoded(volume, patient, folder / "seg.dcm"), patient)
    assert shown.keys() == expected.keys()
    for uid, plane in expected.items():
        np.testing.assert_array_equal(shown[uid], plane)


# --- (a) the same grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_an_answer_on_the_grid_that_was_sent_lands_on_its_instances_and_pixels(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    volume = _returned(_painted(patient, sent.shape, sent.affine), tmp_path, patient)
    assert volume.notes == ()
    _assert_shows(volume, patient, patient.expected(), tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_one_pixel_at_a_known_place_is_the_only_one(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    rng = np.random.default_rng(seed)
    target = patient.images[int(rng.integers(len(patient.images)))]
    row, column = int(rng.integers(target.Rows)), int(rng.integers(target.Columns))
    place = _places(target)[row, column]  # of the patient, mm
    sent = _sent(patient, tmp_path)
    voxel = np.rint(np.linalg.inv(sent.affine) @ FLIP @ [*place, 1])[:3].astype(int)
    array = np.zeros(sent.shape, np.uint8)
    array[tuple(voxel)] = 1
    volume = _returned(nibabel.Nifti1Image(array, sent.affine), tmp_path, patient)
    assert [tuple(found) for found in np.argwhere(volume.labels)] == [
        (volume.sop_instance_uids.index(str(target.SOPInstanceUID)), row, column)
    ]


# --- (b) turned ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_axes_renamed_and_turned_change_nothing(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    rng = np.random.default_rng(seed)
    turn = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)
    answer = _painted(patient, sent.shape, sent.affine).as_reoriented(turn)
    volume = _returned(answer, tmp_path, patient)
    assert volume.notes == ()
    _assert_shows(volume, patient, patient.expected(), tmp_path)


@pytest.mark.parametrize("letters", ["RAS", "LPS", "LAS", "PIR", "SRP"])
def test_any_orientation_an_engine_likes_comes_back(tmp_path: Path, letters: str) -> None:
    patient = _patient(7)
    sent = _sent(patient, tmp_path)
    answer = _painted(patient, sent.shape, sent.affine)
    wanted = orientations.axcodes2ornt(tuple(letters))
    answer = answer.as_reoriented(orientations.ornt_transform(orientations.io_orientation(sent.affine), wanted))
    assert "".join(nibabel.aff2axcodes(answer.affine)) == letters
    _assert_shows(_returned(answer, tmp_path, patient), patient, patient.expected(), tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_a_part_of_the_grid_is_put_in_its_place_and_told(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    answer = _painted(patient, sent.shape, sent.affine)
    found = np.argwhere(np.asanyarray(answer.dataobj))
    box = tuple(slice(low, high + 1) for low, high in zip(found.min(axis=0), found.max(axis=0), strict=True))
    cut = answer.slicer[box].as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    volume = _returned(cut, tmp_path, patient)
    _assert_shows(volume, patient, patient.expected(), tmp_path)
    assert any("the answer covers" in note for note in volume.notes)


def test_more_than_the_grid_is_cut_and_what_is_beside_is_told(tmp_path: Path) -> None:
    patient = _patient(2)
    sent = _sent(patient, tmp_path)
    affine = sent.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ (2, 3, 1)
    shape = tuple(side + more for side, more in zip(sent.shape, (5, 6, 3), strict=True))
    answer = _painted(patient, shape, affine)
    volume = _returned(answer, tmp_path, patient)
    _assert_shows(volume, patient, patient.expected(), tmp_path)
    assert volume.notes == ()
    array = np.asanyarray(answer.dataobj).copy()
    array[0, 0, 0] = 1
    volume = _returned(nibabel.Nifti1Image(array, affine), tmp_path, patient)
    assert volume.notes == ("1 labelled voxels of the answer lie beside the images and are lost",)


@pytest.mark.parametrize(("off_mm", "told"), [(0.0005, False), (0.05, True)])
def test_a_grid_that_is_nearly_the_same_is_taken_as_the_same(tmp_path: Path, off_mm: float, told: bool) -> None:
    patient = _patient(4)
    sent = _sent(patient, tmp_path)
    answer = _painted(patient, sent.shape, sent.affine)
    moved = sent.affine.copy()
    moved[0, 3] += off_mm
    volume = _returned(nibabel.Nifti1Image(np.asanyarray(answer.dataobj), moved), tmp_path, patient)
    _assert_shows(volume, patient, patient.expected(), tmp_path)
    assert any("is off by up to 0.050 mm" in note for note in volume.notes) is told


def test_the_qform_alone_is_enough(tmp_path: Path) -> None:
    patient = _patient(5)
    sent = _sent(patient, tmp_path)
    answer = _painted(patient, sent.shape, sent.affine)
    header = answer.header.copy()
    header.set_qform(sent.affine, 1)
    header.set_sform(None, 0)
    image = nibabel.Nifti1Image(np.asanyarray(answer.dataobj), None, header)
    _assert_shows(_returned(image, tmp_path, patient), patient, patient.expected(), tmp_path)


# --- (c) another grid ------------------------------------------------------------------------------------------------


def _around(patient: Patient, rng: np.random.Generator, *, aligned: bool) -> tuple[tuple[int, ...], Floats]:
    """Shape and affine (LPS) of a grid of other voxels that holds all of the images."""
    places = np.concatenate([_places(ds).reshape(-1, 3) for ds in patient.images])
    first = np.array(patient.images[0].ImageOrientationPatient, np.float64)
    own = np.stack([first[:3], first[3:], np.cross(first[:3], first[3:])], axis=1)
    frame = own[:, rng.permutation(3)] * rng.choice([-1, 1], 3) if aligned else _rotation(rng)
    spacing = rng.uniform(1.0, 2.2, 3)
    along = places @ frame
    low, high = along.min(axis=0) - rng.uniform(0.5, 1.0, 3) * spacing, along.max(axis=0) + spacing
    shape = tuple(int(n) for n in np.ceil((high - low) / spacing) + 1)
    affine = np.eye(4)
    affine[:3, :3] = frame * spacing
    affine[:3, 3] = frame @ low
    return shape, affine


def _nearest_by_distance(patient: Patient, answer: Any) -> dict[str, Labels]:
    """For each pixel the label of the voxel whose centre is nearest in mm, of all voxels there are."""
    array = np.asanyarray(answer.dataobj)
    index = np.argwhere(np.ones(array.shape, np.bool_))
    centres = nibabel.affines.apply_affine(FLIP @ answer.affine, index)
    values = array.reshape(-1)
    shown = {}
    for ds in patient.images:
        places = _places(ds).reshape(-1, 3)
        square = (centres**2).sum(axis=1) - 2 * places @ centres.T  # the distance but for what is the same for all
        shown[str(ds.SOPInstanceUID)] = values[square.argmin(axis=1)].reshape(ds.Rows, ds.Columns)
    return shown


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_another_grid_gives_each_pixel_its_nearest_voxel_and_says_so(tmp_path: Path, seed: int, aligned: bool) -> None:
    patient = _patient(seed)
    shape, affine = _around(patient, np.random.default_rng(100 + seed), aligned=aligned)
    answer = _painted(patient, shape, FLIP @ affine)
    volume = _returned(answer, tmp_path, patient)
    note, *others = volume.notes
    assert "another grid" in note and "nearest voxel" in note
    assert all("lie beside the images" in other for other in others)  # the grid is larger than the images
    _assert_shows(volume, patient, _nearest_by_distance(patient, answer), tmp_path)


@pytest.mark.parametrize("irregular", [{"uneven": True}, {"tilt": 0.35}, {"uneven": True, "tilt": -0.2}])
@pytest.mark.parametrize("seed", range(3))
def test_images_that_lie_unevenly_or_sheared_get_the_nearest_voxel_where_they_are(
    tmp_path: Path, seed: int, irregular: dict[str, Any]
) -> None:
    patient = _patient(seed, **irregular)
    geometry = volume_geometry(
        [{k: ds[k].value for k in GEOMETRY_KEYWORDS if k in ds} for ds in patient.images], regular="repair"
    )
    assert not geometry.regular
    shape, affine = _around(patient, np.random.default_rng(seed), aligned=False)
    answer = _painted(patient, shape, FLIP @ affine)
    nibabel.save(answer, tmp_path / "answer.nii")
    volume = from_label_map(read_volume(tmp_path / "answer.nii"), geometry, names=NAMES)
    _assert_shows(volume, patient, _nearest_by_distance(patient, answer), tmp_path)
    assert volume.notes[: len(geometry.notes)] == geometry.notes


def _geometry(shape: tuple[int, int, int] = (4, 6, 8)) -> VolumeGeometry:
    affine = np.array([[0, 0, 1, 10], [0, 1, 0, 20], [2, 0, 0, 30], [0, 0, 0, 1]], np.float64)
    return VolumeGeometry(
        sop_instance_uids=tuple(f"1.2.{k}" for k in range(shape[0])),
        affine=affine,
        spacing_mm=(2.0, 1.0, 1.0),
        shape=shape,
        sop_class_uid=CTImageStorage,
        frame_of_reference_uid="1.2.3.9",
        left_out={},
    )


def _grid(spacing: tuple[float, float, float], start: tuple[float, float, float]) -> Floats:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = start
    return affine


def test_half_way_between_two_voxels_the_lower_one_is_taken_whatever_the_last_digits() -> None:
    labels = np.array([1, 2, 3, 4], np.uint8).reshape(4, 1, 1).repeat(6, axis=1).repeat(8, axis=2)
    for last in (-1e-9, 0.0, 1e-9):
        placed, _ = labels_on_source(labels, _grid((2, 1, 1), (10 + 1 + last, 20, 30)), _geometry((8, 6, 8)))
        np.testing.assert_array_equal(placed[0, 0], [0, 1, 1, 2, 2, 3, 3, 4])


def test_a_grid_that_ends_inside_the_images_leaves_the_rest_empty_and_says_so() -> None:
    labels = np.ones((3, 3, 2), np.uint8)
    placed, notes = labels_on_source(labels, _grid((2, 2, 1.5), (10.4, 20.4, 32)), _geometry())
    expected = np.zeros((4, 6, 8), np.uint8)
    expected[1, :, :6] = 1  # from 9.4 to 15.4 mm across, 19.4 to 25.4 down, 31.25 to 34.25 along: at 32 and 34
    expected[2, :, :6] = 1
    np.testing.assert_array_equal(placed, expected)
    assert notes[1:] == ("the answer covers 2 of 4 slices",)


def test_labels_beside_the_images_are_counted_on_another_grid_too() -> None:
    labels = np.zeros((40, 20, 20), np.uint8, order="F")
    labels[2, 2, 3] = labels[30, 2, 2] = labels[39, 19, 19] = 5
    placed, notes = labels_on_source(labels, _grid((0.5, 0.5, 0.7), (10, 20, 30)), _geometry())
    assert set(np.unique(placed)) == {0, 5}
    assert notes[-1] == "2 labelled voxels of the answer lie beside the images and are lost"


def test_the_heartbeat_is_called_for_each_slice_of_another_grid() -> None:
    beats: list[int] = []
    labels_on_source(
        np.ones((9, 9, 9), np.uint8), _grid((1.1, 1, 1), (10, 20, 30)), _geometry(), heartbeat=lambda: beats.append(1)
    )
    assert len(beats) == 4


# --- (d) impossible --------------------------------------------------------------------------------------------------

NAN = float("nan")
IMPOSSIBLE: dict[str, tuple[Floats, str]] = {
    "beside": (_grid((1, 1, 2), (500, 20, 30)), "nothing in common"),
    "beside, on another grid": (_grid((1.3, 1, 2), (500, 20, 30)), "nothing in common"),
    "flat": (_grid((1, 1, 0), (10, 20, 30)), "voxels of"),
    "in one plane": (np.array([[1, 1, 0, 10], [0, 0.01, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]]), "one plane"),
    "of metres": (_grid((1000, 1000, 2000), (10, 20, 30)), "voxels of"),
    "of micrometres": (_grid((0.001, 0.001, 0.002), (10, 20, 30)), "voxels of"),
    "not a number": (_grid((1, 1, 2), (NAN, 20, 30)), "finite"),
    "infinite": (_grid((1, 1, 2), (float("inf"), 20, 30)), "finite"),
    "of a projection": (np.vstack([_grid((1, 1, 2), (10, 20, 30))[:3], [0, 0, 0.1, 1]]), "no affine"),
    "the identity": (np.eye(4), "identity"),
    "the identity of NIfTI": (FLIP, "identity"),
    "with the wrong signs": (FLIP @ _grid((1, 1, 2), (10, 20, 30)), "wrong sign"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_place_that_cannot_be_is_refused_with_the_reason(case: str) -> None:
    affine, reason = IMPOSSIBLE[case]
    with pytest.raises(GeometryMismatch, match=reason):
        labels_on_source(np.ones((8, 6, 4), np.uint8), affine, _geometry())


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_in_the_other_convention_is_refused_on_another_grid_too(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    finer = sent.affine @ np.diag([0.5, 0.5, 0.5, 1.0])
    finer[:3, 3] -= 0.25 * sent.affine[:3, :3].sum(axis=1)  # the same box
    answer = _painted(patient, tuple(2 * side for side in sent.shape), finer)
    assert "another grid" in _returned(answer, tmp_path, patient).notes[0]
    wrong = nibabel.Nifti1Image(np.asanyarray(answer.dataobj), FLIP @ finer)
    with pytest.raises(GeometryMismatch, match="wrong sign"):
        _returned(wrong, tmp_path, patient)


@pytest.mark.parametrize("finer", [1, 2])
def test_where_wrong_signs_cannot_be_told_from_turned_axes_it_is_said(finer: int) -> None:
    """Images evenly around x = 0, y = 0, as of a scanner whose field of view is centred."""
    geometry = _geometry()
    middle = geometry.affine @ (0, *((count - 1) / 2 for count in geometry.shape[1:]), 1)
    geometry = replace(geometry, affine=geometry.affine - np.outer((*middle[:2], 0, 0), (0, 0, 0, 1)))
    sent = geometry.affine[:, [2, 1, 0, 3]]
    grid = sent @ np.diag([1 / finer] * 3 + [1])
    grid[:3, 3] -= (finer - 1) / (2 * finer) * sent[:3, :3].sum(axis=1)
    labels = np.zeros(tuple(finer * side for side in (8, 6, 4)), np.uint8)
    labels[: 2 * finer, : 2 * finer] = 1
    placed, notes = labels_on_source(labels, grid, geometry)
    assert placed[0, 0, 0] == 1 and not any("left and right" in note for note in notes)
    placed, notes = labels_on_source(labels, FLIP @ grid, geometry)
    assert placed[0, -1, -1] == 1 and "left and right are as its file says, and cannot be confirmed" in notes[-1]
    # one that turned its axes on other images is sure of its place
    away = replace(geometry, affine=geometry.affine + np.outer((50, 0, 0, 0), (0, 0, 0, 1)))
    turned = (FLIP @ grid) + np.outer((50, 0, 0, 0), (0, 0, 0, 1))
    placed, notes = labels_on_source(labels, turned, away)
    assert placed[0, -1, -1] == 1 and not any("left and right" in note for note in notes)


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_in_the_other_convention_is_refused_whatever_the_series(tmp_path: Path, seed: int) -> None:
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    answer = _painted(patient, sent.shape, sent.affine)
    wrong = nibabel.Nifti1Image(np.asanyarray(answer.dataobj), FLIP @ sent.affine)
    with pytest.raises(GeometryMismatch, match="wrong sign"):
        _returned(wrong, tmp_path, patient)


@pytest.mark.parametrize("spacing", [(1, 1, 2), (0.9, 0.9, 1.7)])
def test_an_answer_whose_labels_all_lie_beside_the_images_is_refused(spacing: tuple[float, float, float]) -> None:
    labels = np.zeros((30, 6, 4), np.uint8)
    labels[20:] = 1
    with pytest.raises(GeometryMismatch, match=r"all of the answer's \d+ labelled voxels lie beside"):
        labels_on_source(labels, _grid(spacing, (10, 20, 30)), _geometry())


def test_an_answer_without_a_label_is_no_mismatch() -> None:
    for spacing in ((1, 1, 2), (0.9, 0.9, 1.7)):
        placed, _ = labels_on_source(np.zeros((8, 6, 4), np.uint8), _grid(spacing, (10, 20, 30)), _geometry())
        assert not placed.any()


def test_a_single_slice_of_labels_has_its_place() -> None:
    labels = np.ones((8, 6, 1), np.uint8)
    placed, notes = labels_on_source(labels, _grid((1, 1, 2), (10, 20, 34)), _geometry())
    assert [k for k in range(4) if placed[k].any()] == [2]
    assert notes == ("the answer covers 1 of 4 slices",)


# --- as somebody else writes it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nii", "nrrd"])
@pytest.mark.parametrize("seed", [0, 1, 4, 5])
def test_what_itk_makes_of_our_segmentation_comes_back_as_it_was(tmp_path: Path, kind: str, seed: int) -> None:
    tool = shutil.which("segimage2itkimage") or shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs segimage2itkimage (Python package dcmqi)")
    patient = _patient(seed)
    sent = _sent(patient, tmp_path)
    volume = _returned(_painted(patient, sent.shape, sent.affine), tmp_path, patient)
    _encoded(volume, patient, tmp_path / "seg.dcm")
    words = [tool, "--inputDICOM", "seg.dcm", "--outputDirectory", ".", "-t", kind]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    files = sorted(
        path for path in tmp_path.iterdir() if path.name in {f"{n}.{kind}{z}" for n in (1, 2) for z in ("", ".gz")}
    )
    assert len(files) == 2
    masks = [(name, read_volume(path)) for name, path in zip(NAMES.values(), files, strict=True)]
    back = from_masks(masks, patient.geometry)
    np.testing.assert_array_equal(back.labels, volume.labels)
    assert [segment.type for segment in back.segments] == [segment.type for segment in volume.segments]
    _assert_shows(replace(back, notes=()), patient, patient.expected(), tmp_path)
