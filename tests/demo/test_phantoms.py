"""The synthetic patients: the same from the same seed, anatomically placed, and valid DICOM on disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from dicom_node.demo.phantom_ct import KIDNEY, LIVER, SPLEEN, CtPhantom, ct_phantom
from dicom_node.demo.phantom_cxr import FINDING_NAMES, cxr_phantom
from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr
from dicom_node.radiograph import prepare_radiograph

NONE = dict.fromkeys(FINDING_NAMES, False)


def centroid_mm(phantom: CtPhantom, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean LPS position of a mask (slice, row, column)."""
    index = np.argwhere(mask)[:, ::-1].mean(0)
    return np.asarray((phantom.affine @ np.append(index, 1.0))[:3])


def validate(path: Path) -> None:
    """Fail on any error dciodvfy reports; without the program, on an unreadable file only."""
    program = shutil.which("dciodvfy")
    if program is not None:
        run = subprocess.run([program, "-new", str(path)], capture_output=True, text=True, check=False)
        report = run.stdout + run.stderr
        assert run.returncode == 0, report
        assert "Error" not in report
    assert pydicom.dcmread(path).pixel_array.size > 0


# --- CT ------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_ct_twice_and_another_seed_another() -> None:
    first, again, other = (ct_phantom(s, (8, 48, 48), (24.0, 8.0, 8.0)) for s in (4, 4, 5))
    assert np.array_equal(first.hu, again.hu)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.affine, again.affine)
    assert not np.array_equal(first.hu, other.hu)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_organs_lie_where_a_patient_has_them_in_lps(seed: int) -> None:
    phantom = ct_phantom(seed, (60, 72, 72), (5.0, 6.0, 6.0), spleen=True)
    body = centroid_mm(phantom, (phantom.hu > -300) & (phantom.hu < 1000))
    liver, spleen, kidneys = (centroid_mm(phantom, phantom.labels == label) for label in (LIVER, SPLEEN, KIDNEY))
    assert liver[0] < body[0] - 20  # the patient's right is -x
    assert spleen[0] > body[0] + 50
    assert abs(kidneys[0] - body[0]) < 25  # one on each side
    assert kidneys[1] > liver[1] + 20  # posterior is +y
    assert kidneys[2] < liver[2]  # inferior is -z
    right = (phantom.labels == KIDNEY) & (np.arange(72) < 36)
    left = (phantom.labels == KIDNEY) & (np.arange(72) >= 36)
    assert right.sum() > 100
    assert left.sum() > 100


def test_organ_volumes_and_densities_are_plausible() -> None:
    phantom = ct_phantom(21, (75, 100, 100), (4.0, 4.0, 4.0), spleen=True, contrast=0.5)
    millilitres = {label: (phantom.labels == label).sum() * 0.064 for label in (LIVER, SPLEEN, KIDNEY)}
    assert 700 < millilitres[LIVER] < 3200
    assert 60 < millilitres[SPLEEN] < 500
    assert 100 < millilitres[KIDNEY] < 700
    for label in millilitres:
        assert 40 < np.median(phantom.hu[phantom.labels == label]) < 160
    assert phantom.hu.min() >= -1024


def test_the_same_patient_is_seen_on_every_grid() -> None:
    fine = ct_phantom(31, (60, 120, 120), (5.0, 3.0, 3.0), centre_mm=(0, 0, 0))
    coarse = ct_phantom(31, (60, 60, 60), (5.0, 6.0, 6.0), centre_mm=(0, 0, 0))
    s = 0.08
    turned = np.array([[np.cos(s), -np.sin(s), 0], [np.sin(s), np.cos(s), 0], [0, 0, 1]])
    oblique = ct_phantom(31, (60, 120, 120), (5.0, 3.0, 3.0), centre_mm=(0, 0, 0), direction=turned)
    for label in (LIVER, SPLEEN, KIDNEY):
        at = centroid_mm(fine, fine.labels == label)
        assert np.allclose(at, centroid_mm(coarse, coarse.labels == label), atol=2.0)
        assert np.allclose(at, centroid_mm(oblique, oblique.labels == label), atol=2.0)


def test_a_partial_field_of_view_misses_organs() -> None:
    pelvis = ct_phantom(41, (20, 48, 48), (5.0, 8.0, 8.0), centre_mm=(0, 0, -200))
    assert pelvis.organs == frozenset()
    assert pelvis.labels.max() == 0


def test_a_spleen_can_be_absent() -> None:
    assert "spleen" not in ct_phantom(42, (40, 48, 48), (8.0, 8.0, 8.0), spleen=False).organs
    absent = sum("spleen" not in ct_phantom(s, (4, 12, 12), (30.0, 30.0, 30.0)).organs for s in range(60))
    assert 0 < absent < 12


# --- CT as DICOM ---------------------------------------------------------------------------------------


def test_a_written_series_reads_back_with_its_own_geometry(tmp_path: Path) -> None:
    series = write_ct_series(tmp_path, 51, shape=(6, 64, 48), spacing_mm=(20.0, 6.0, 7.0))
    assert sorted(p.name for p in series.paths) == sorted(p.name for p in tmp_path.iterdir())
    assert [p.name for p in series.paths] != sorted(p.name for p in series.paths)
    for k, path in enumerate(series.paths):
        ds = pydicom.dcmread(path)
        assert ds.SOPInstanceUID == series.sop_instance_uids[k]
        assert ds.SeriesInstanceUID == series.series_instance_uid
        assert (ds.Rows, ds.Columns, list(ds.PixelSpacing)) == (64, 48, [6, 7])
        hu = ds.pixel_array.astype(int) * int(ds.RescaleSlope) + int(ds.RescaleIntercept)
        assert np.array_equal(hu, series.phantom.hu[k])
        assert np.allclose(ds.ImagePositionPatient, (series.phantom.affine @ [0, 0, k, 1])[:3], atol=1e-5)
        assert "SYNTHETIC" in ds.SeriesDescription
        assert str(ds.PatientName).startswith("PHANTOM^CT")
    validate(series.paths[0])


def test_files_and_identifiers_follow_from_the_seed(tmp_path: Path) -> None:
    one = write_ct_series(tmp_path / "a", 52, shape=(3, 32, 32), spacing_mm=(40.0, 12.0, 12.0))
    two = write_ct_series(tmp_path / "b", 52, shape=(3, 32, 32), spacing_mm=(40.0, 12.0, 12.0))
    for a, b in zip(one.paths, two.paths, strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()
    second = write_ct_series(tmp_path / "c", 52, shape=(3, 32, 32), spacing_mm=(40.0, 12.0, 12.0), series=2)
    assert second.study_instance_uid == one.study_instance_uid
    assert second.series_instance_uid != one.series_instance_uid
    other = write_ct_series(tmp_path / "d", 53, shape=(3, 32, 32), spacing_mm=(40.0, 12.0, 12.0))
    assert other.study_instance_uid != one.study_instance_uid
    assert pydicom.dcmread(other.paths[0]).PatientID != pydicom.dcmread(one.paths[0]).PatientID


def test_a_hostile_series_is_hostile_and_still_valid_dicom(tmp_path: Path) -> None:
    series = write_ct_series(
        tmp_path,
        54,
        shape=(7, 32, 32),
        spacing_mm=(30.0, 12.0, 12.0),
        gantry_tilt_deg=15.0,
        missing_slices=[3],
        duplicate_slices=[1],
        mixed_orientation=2,
        instance_numbers="descending",
        character_set="ISO_IR 192",
        patient_name="Ünal^Ping=王^小明",
    )
    assert len(series.paths) == 6
    assert len(series.extra_paths) == 3
    assert len(series.labels) == 6
    read = [pydicom.dcmread(p) for p in series.paths]
    z = [float(ds.ImagePositionPatient[2]) for ds in read]
    assert np.allclose(np.diff(z), [30, 30, 60, 30, 30])
    assert [ds.InstanceNumber for ds in read] == [6, 5, 4, 3, 2, 1]
    row, column = np.split(np.array(read[0].ImageOrientationPatient, float), 2)
    normal = np.cross(row, column)
    assert np.isclose(normal[2], np.cos(np.radians(15)))
    twin, *coronal = (pydicom.dcmread(p) for p in series.extra_paths)
    assert twin.ImagePositionPatient == read[1].ImagePositionPatient
    assert twin.PixelData == read[1].PixelData
    assert twin.SOPInstanceUID != read[1].SOPInstanceUID
    assert all(list(ds.ImageOrientationPatient) == [1, 0, 0, 0, 0, -1] for ds in coronal)
    assert read[0].PatientName.components[1] == "王^小明"
    for path in (*series.paths, *series.extra_paths):
        validate(path)


def test_attributes_can_be_left_out_or_odd(tmp_path: Path) -> None:
    series = write_ct_series(
        tmp_path,
        55,
        shape=(2, 16, 16),
        spacing_mm=(50.0, 24.0, 24.0),
        omit=["AccessionNumber", "ReferringPhysicianName", "StudyID"],
        patient_sex="U",
    )
    ds = pydicom.dcmread(series.paths[0])
    assert "AccessionNumber" not in ds
    assert "StudyID" not in ds
    assert ds.PatientSex == "U"


# --- radiographs ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_radiograph_at_every_size() -> None:
    small, again, large = (cxr_phantom(61, n, n) for n in (160, 160, 400))
    assert np.array_equal(small.image, again.image)
    assert small.findings == large.findings
    a, b = (prepare_radiograph(p.image, 96).ravel() for p in (small, large))
    assert np.corrcoef(a, b)[0, 1] > 0.98
    assert small.image.min() >= 0
    assert small.image.max() <= 1


def test_a_finding_changes_the_picture_and_nothing_else_of_the_patient() -> None:
    plain = cxr_phantom(62, 160, 160, findings=NONE)
    assert not any(plain.findings.values())
    for key in FINDING_NAMES:
        planted = cxr_phantom(62, 160, 160, findings={**NONE, key: True})
        assert planted.findings == {**NONE, key: True}
        difference = np.abs(planted.image - plain.image)
        assert difference.max() > 0.03, key
        assert (difference < 0.03).mean() > 0.5, key


def test_the_heart_points_to_the_patients_left_and_the_right_is_shown_left() -> None:
    images = [cxr_phantom(s, 160, 160, findings=NONE, marker=False).image for s in range(70, 78)]
    heart = np.mean(images, axis=0)[105:118]
    assert heart[:, 80:110].mean() > heart[:, 50:80].mean() + 0.02
    sided = cxr_phantom(79, 160, 160, findings={**NONE, "pleural_effusion": True}, marker=False)
    plain = cxr_phantom(79, 160, 160, findings=NONE, marker=False)
    columns = np.abs(sided.image - plain.image).sum(0)
    assert (columns[:80].sum() > columns[80:].sum()) == (sided.sides["pleural_effusion"] == "right")


def test_unknown_findings_are_refused() -> None:
    with pytest.raises(ValueError, match="fracture"):
        cxr_phantom(1, 64, 64, findings={"fracture": True})


@pytest.mark.parametrize("sop_class", ["DX", "CR"])
@pytest.mark.parametrize("view", ["PA", "AP"])
def test_written_radiographs_are_valid_and_display_alike(tmp_path: Path, sop_class: str, view: str) -> None:
    shown = []
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        image = write_cxr(
            tmp_path / f"{photometric}.dcm",
            81,
            rows=200,
            columns=180,
            photometric=photometric,
            view=view,
            sop_class=sop_class,
        )
        ds = pydicom.dcmread(image.path)
        assert ds.SOPInstanceUID == image.sop_instance_uid
        assert (ds.Modality, ds.ViewPosition, ds.BitsStored) == (sop_class, view, 12)
        low = float(ds.WindowCenter) - float(ds.WindowWidth) / 2
        display = (ds.pixel_array - low) / float(ds.WindowWidth)
        shown.append(1 - display if photometric == "MONOCHROME1" else display)
        assert np.allclose(shown[-1], image.phantom.image, atol=0.002)
        validate(image.path)
    assert np.allclose(shown[0], shown[1], atol=0.002)


# --- network input -------------------------------------------------------------------------------------


def test_preparation_ignores_unit_offset_and_storage_type() -> None:
    image = cxr_phantom(91, 300, 260).image
    reference = prepare_radiograph(image, 128)
    assert reference.shape == (128, 128)
    assert reference.dtype == np.float32
    stored = (image * 3400 + 300).astype(np.uint16)
    assert np.allclose(prepare_radiograph(stored, 128), reference, atol=0.02)
    assert np.allclose(prepare_radiograph(image.astype(np.float64) * 7 - 3, 128), reference, atol=1e-3)


def test_black_borders_are_trimmed_and_the_rest_keeps_its_shape() -> None:
    rng = np.random.default_rng(0)
    picture = rng.uniform(0.2, 0.9, (200, 100))
    framed = np.zeros((300, 160))
    framed[50:250, 30:130] = picture
    square = prepare_radiograph(framed, 100)
    used = np.argwhere(square != 0)
    (top, left), (bottom, right) = used.min(0), used.max(0)
    assert bottom - top + 1 == pytest.approx(100, abs=2)
    assert right - left + 1 == pytest.approx(50, abs=3)
    assert left == pytest.approx(25, abs=2)


@pytest.mark.parametrize("shape", [(17, 9), (40, 300), (128, 128), (700, 650)])
def test_any_shape_becomes_a_standardised_square(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 4096, shape).astype(np.uint16)
    square = prepare_radiograph(image, 64)
    inside = square[square != 0]
    assert square.shape == (64, 64)
    assert abs(float(inside.mean())) < 1e-3
    assert float(inside.std()) == pytest.approx(1, abs=0.01)


def test_a_blank_plate_gives_zeros_and_nonsense_is_refused() -> None:
    assert not prepare_radiograph(np.full((50, 60), 7, np.int16), 32).any()
    for bad in (np.zeros((3, 4, 5)), np.zeros((0, 4)), np.zeros((4, 4), complex)):
        with pytest.raises(ValueError, match="radiograph"):
            prepare_radiograph(bad, 32)
    broken = np.random.default_rng(2).uniform(0, 1, (64, 64))
    broken[10, 10] = np.nan
    with pytest.raises(ValueError, match="finite"):
        prepare_radiograph(broken, 32)
