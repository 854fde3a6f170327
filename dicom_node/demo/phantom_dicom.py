"""Write phantoms as the DICOM files a scanner would send, and on request as ones a bad day would send.

This module knows the CT (PS3.3 A.3), CR (A.2) and DX (A.26) information objects and the two phantom
generators; it sends nothing. All identifiers and dates follow from the seed, so a series can be written
twice and compared byte for byte. Every object says SYNTHETIC in its descriptions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

from dicom_node.demo.phantom_ct import CtPhantom, ct_phantom
from dicom_node.demo.phantom_cxr import CxrPhantom, cxr_phantom

__all__ = ["WrittenImage", "WrittenSeries", "write_ct_series", "write_cxr"]

_INTERCEPT = -1024
_VIEW_CODES = {"PA": ("272479007", "postero-anterior"), "AP": ("399348003", "antero-posterior")}
_CXR_LOW, _CXR_SPAN = 300, 3400  # stored values of display 0 and 1; the window shows exactly these


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSeries:
    """A CT series on disk. `paths`, `sop_instance_uids` and `labels` run from the first slice upwards.

    `labels` is uint8 (slice, row, column) of the slices that were written, on the stored pixel grid.
    `extra_paths` are the duplicates and the differently oriented slices. `phantom` is the whole volume,
    missing slices included, and its `affine` gives the patient position of every voxel.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...]
    paths: tuple[Path, ...]
    extra_paths: tuple[Path, ...]
    labels: NDArray[np.uint8]
    phantom: CtPhantom


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenImage:
    """A radiograph on disk and what is planted in it."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    path: Path
    phantom: CxrPhantom


def write_ct_series(
    folder: Path,
    seed: int,
    *,
    shape: tuple[int, int, int] = (60, 192, 192),
    spacing_mm: tuple[float, float, float] = (5.0, 2.0, 2.0),
    series: int = 1,
    centre_mm: tuple[float, float, float] | None = None,
    direction: NDArray[np.floating] | None = None,
    gantry_tilt_deg: float = 0.0,
    missing_slices: Sequence[int] = (),
    duplicate_slices: Sequence[int] = (),
    mixed_orientation: int = 0,
    slice_jitter_mm: float = 0.0,
    instance_numbers: str = "ascending",
    shuffle_files: bool = True,
    contrast: float | None = None,
    spleen: bool | None = None,
    circular_fov: bool = False,
    character_set: str = "ISO_IR 100",
    patient_name: str | None = None,
    patient_id: str | None = None,
    patient_sex: str | None = None,
    body_part: str = "ABDOMEN",
    description: str = "SYNTHETIC abdomen",
    omit: Sequence[str] = (),
) -> WrittenSeries:
    """Write CT phantom `seed` into `folder`, one file per slice, and return what was written.

    `shape` and `spacing_mm` are (slice, row, column). The seed fixes patient and study; `series` and the
    options fix series and instances, so two series of one study differ only in `series`.

    Hostile options: `missing_slices` and `duplicate_slices` are indices; `gantry_tilt_deg` shears the stack
    as a tilted gantry does; `mixed_orientation` appends that many coronal slices to the series;
    `slice_jitter_mm` is the deviation of slice positions; `instance_numbers` is "ascending", "descending"
    or "shuffled"; `omit` lists keywords to leave out; an odd `patient_sex` is written as given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([0xC9, seed, series])
    if gantry_tilt_deg:
        direction = _tilted(gantry_tilt_deg)
    positions = np.arange(shape[0]) + rng.normal(0, 1, shape[0]) * slice_jitter_mm / spacing_mm[0]
    phantom = ct_phantom(
        seed,
        shape,
        spacing_mm,
        direction=direction,
        centre_mm=centre_mm,
        slice_indices=[float(p) for p in positions],
        contrast=contrast,
        spleen=spleen,
        circular_fov=circular_fov,
    )
    axes = None if direction is None else direction.tolist()
    options = (shape, spacing_mm, centre_mm, axes, slice_jitter_mm, contrast, spleen, circular_fov)
    study_uid, series_uid = _uid("ct study", seed), _uid("ct series", seed, series, options)
    ds = _common(seed, "CT", study_uid, series_uid, character_set, description)
    ds.PatientName = f"PHANTOM^CT {seed:04d}" if patient_name is None else patient_name
    ds.PatientID = f"PHANTOM-CT-{seed:06d}" if patient_id is None else patient_id
    ds.PatientSex = ("M", "F", "O")[seed % 3] if patient_sex is None else patient_sex
    ds.SeriesNumber = series
    ds.BodyPartExamined = body_part
    _fill_ct(ds, seed, spacing_mm, gantry_tilt_deg)
    for keyword in omit:
        if keyword in ds:
            del ds[keyword]

    kept = [k for k in range(shape[0]) if k not in set(missing_slices)]
    numbers = _instance_numbers(instance_numbers, len(kept), rng)
    total = len(kept) + len(duplicate_slices) + mixed_orientation
    names = rng.permutation(total) if shuffle_files else np.arange(total)
    files = [folder / f"IM{int(n):05d}.dcm" for n in names]
    uids = [_uid("ct image", series_uid, k) for k in kept]
    for k, uid, number, path in zip(kept, uids, numbers, files, strict=False):
        _write_slice(ds, phantom, k, float(positions[k]), uid, number, path)
    extra = files[len(kept) :]
    for i, k in enumerate(duplicate_slices):
        uid, number = _uid("ct duplicate", series_uid, k, i), len(kept) + 1 + i
        _write_slice(ds, phantom, k, float(positions[k]), uid, number, extra[i])
    _write_coronal(ds, seed, phantom, series_uid, total - mixed_orientation, extra[len(duplicate_slices) :])
    return WrittenSeries(
        study_instance_uid=study_uid,
        series_instance_uid=series_uid,
        sop_instance_uids=tuple(uids),
        paths=tuple(files[: len(kept)]),
        extra_paths=tuple(extra),
        labels=phantom.labels[kept],
        phantom=phantom,
    )


def write_cxr(
    path: Path,
    seed: int,
    *,
    rows: int = 1024,
    columns: int = 1024,
    photometric: str = "MONOCHROME2",
    view: str | None = None,
    sop_class: str = "DX",
    findings: dict[str, bool] | None = None,
    marker: bool = True,
    character_set: str = "ISO_IR 100",
    patient_name: str | None = None,
    patient_id: str | None = None,
    omit: Sequence[str] = (),
) -> WrittenImage:
    """Write CXR phantom `seed` to `path` as DX For Presentation, or as CR with `sop_class="CR"`.

    Twelve bits stored; the VOI window shows the phantom's own grey scale. MONOCHROME1 stores the values
    inverted, so both photometric interpretations display the same picture.
    """
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"photometric must be MONOCHROME1 or MONOCHROME2, got {photometric!r}")
    if sop_class not in ("DX", "CR"):
        raise ValueError(f"sop_class must be DX or CR, got {sop_class!r}")
    phantom = cxr_phantom(seed, rows, columns, findings=findings, view=view, marker=marker)
    study_uid, series_uid = _uid("cxr study", seed), _uid("cxr series", seed, sop_class)
    ds = _common(seed, sop_class, study_uid, series_uid, character_set, "SYNTHETIC chest")
    ds.PatientName = f"PHANTOM^CXR {seed:04d}" if patient_name is None else patient_name
    ds.PatientID = f"PHANTOM-CXR-{seed:06d}" if patient_id is None else patient_id
    ds.PatientSex = ("M", "F", "O")[seed % 3]
    ds.SeriesNumber = 1
    ds.InstanceNumber = 1
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = phantom.view
    ds.PatientOrientation = ["L", "F"]
    _fill_radiograph(ds, phantom, photometric)
    if sop_class == "DX":
        _fill_dx(ds, photometric, phantom.view, columns)
    else:
        _fill_cr(ds, columns)
    for keyword in omit:
        if keyword in ds:
            del ds[keyword]
    key = (rows, columns, photometric, view, marker, sorted((findings or {}).items()))
    uid = _uid("cxr image", seed, sop_class, *key)
    classes = {"DX": DigitalXRayImageStorageForPresentation, "CR": ComputedRadiographyImageStorage}
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(ds, classes[sop_class], uid, path)
    return WrittenImage(
        study_instance_uid=study_uid,
        series_instance_uid=series_uid,
        sop_instance_uid=uid,
        path=path,
        phantom=phantom,
    )


# --- shared by all objects -----------------------------------------------------------------------------


def _uid(*parts: object) -> str:
    """A UUID-derived UID (PS3.5 B.2) that is a function of `parts`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()[:16]
    return f"2.25.{int.from_bytes(digest, 'big')}"


def _common(seed: int, modality: str, study_uid: str, series_uid: str, character_set: str, description: str) -> Dataset:
    """Patient, study, series and equipment modules, type 2 attributes included."""
    ds = Dataset()
    ds.SpecificCharacterSet = character_set
    ds.PatientBirthDate = f"{1940 + seed % 60}{1 + seed % 12:02d}{1 + seed % 28:02d}"
    ds.StudyInstanceUID = study_uid
    ds.StudyID = f"{seed % 10**8}"
    ds.AccessionNumber = f"SYN{modality}{seed % 10**8:08d}"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = f"SYNTHETIC {modality} phantom"
    ds.SeriesInstanceUID = series_uid
    ds.SeriesDescription = description
    ds.Modality = modality
    ds.Manufacturer = "dicom-node phantom"
    ds.ManufacturerModelName = "SYNTHETIC"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "1"
    day = f"202601{1 + seed % 28:02d}"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day
    ds.StudyTime = f"{8 + seed % 9:02d}{seed % 60:02d}00"
    ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = ds.StudyTime
    return ds


def _fill_pixels(ds: Dataset, size: tuple[int, ...], photometric: str) -> None:
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = size
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0


def _save(ds: Dataset, sop_class: str, uid: str, path: Path) -> None:
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class), UID(uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta = meta
    ds.save_as(path, enforce_file_format=True)


def _decimal(value: float) -> str:
    """A DS value: at most 16 characters (PS3.5 6.2), no negative zero."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


# --- CT ------------------------------------------------------------------------------------------------


def _tilted(angle_deg: float) -> NDArray[np.float64]:
    """Image planes turned about the left-right axis while the table still moves along z."""
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return np.array([[1, 0, 0], [0, c, 0], [0, -s, 1]], np.float64)


def _instance_numbers(order: str, count: int, rng: np.random.Generator) -> list[int]:
    numbers = list(range(1, count + 1))
    if order == "ascending":
        return numbers
    if order == "descending":
        return numbers[::-1]
    if order == "shuffled":
        return [int(n) for n in rng.permutation(numbers)]
    raise ValueError(f"instance_numbers must be ascending, descending or shuffled, got {order!r}")


def _fill_ct(ds: Dataset, seed: int, spacing_mm: tuple[float, float, float], tilt_deg: float) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientPosition = "HFS"
    ds.FrameOfReferenceUID = _uid("ct frame of reference", seed)
    ds.PositionReferenceIndicator = ""
    ds.AcquisitionNumber = 1
    ds.KVP = "120"
    ds.GantryDetectorTilt = _decimal(tilt_deg)
    ds.SliceThickness = _decimal(spacing_mm[0])
    ds.PixelSpacing = [_decimal(spacing_mm[1]), _decimal(spacing_mm[2])]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(_INTERCEPT), "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "40", "400"


def _write_slice(ds: Dataset, phantom: CtPhantom, k: int, position: float, uid: str, number: int, path: Path) -> None:
    """Write slice `k`, which lies at the fractional slice index `position`. `ds` is reused, not copied."""
    axes = phantom.affine[:3, :3] / np.linalg.norm(phantom.affine[:3, :3], axis=0)
    ds.ImageOrientationPatient = [_decimal(v) for v in (*axes[:, 0], *axes[:, 1])]
    where = phantom.affine @ np.array([0, 0, position, 1.0])
    ds.ImagePositionPatient = [_decimal(v) for v in where[:3]]
    ds.InstanceNumber = number
    _fill_pixels(ds, phantom.hu.shape[1:], "MONOCHROME2")
    stored = (phantom.hu[k].astype(np.int32) - _INTERCEPT).clip(0, 4095).astype("<u2")
    ds.PixelData = stored.tobytes()
    _save(ds, CTImageStorage, uid, path)


def _write_coronal(
    ds: Dataset, seed: int, phantom: CtPhantom, series_uid: str, first: int, paths: Sequence[Path]
) -> None:
    """Append slices of another orientation to the series, as some consoles do with reformats."""
    if not paths:
        return
    coronal = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float64)  # columns left, rows down, inwards
    shape = (len(paths), *phantom.hu.shape[1:])
    other = ct_phantom(seed, shape, phantom.spacing_mm, direction=coronal, contrast=phantom.contrast)
    for k, path in enumerate(paths):
        uid = _uid("ct coronal", series_uid, k)
        _write_slice(ds, other, k, float(k), uid, first + 1 + k, path)


# --- radiographs ---------------------------------------------------------------------------------------


def _fill_radiograph(ds: Dataset, phantom: CxrPhantom, photometric: str) -> None:
    stored = np.rint(_CXR_LOW + phantom.image * np.float32(_CXR_SPAN))
    if photometric == "MONOCHROME1":
        stored = 4095 - stored
    _fill_pixels(ds, phantom.image.shape, photometric)
    ds.PixelData = stored.astype("<u2").tobytes()
    middle = _CXR_LOW + _CXR_SPAN / 2
    ds.WindowCenter = _decimal(4095 - middle if photometric == "MONOCHROME1" else middle)
    ds.WindowWidth = _decimal(_CXR_SPAN)
    ds.BurnedInAnnotation = "NO"  # the side marker identifies nobody


def _fill_dx(ds: Dataset, photometric: str, view: str, columns: int) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.AcquisitionNumber = 1
    ds.ImageLaterality = "U"
    region = _code("816094009", "SCT", "Chest")
    ds.AnatomicRegionSequence = DicomSequence([region])
    code = _code(_VIEW_CODES[view][0], "SCT", _VIEW_CODES[view][1])
    code.ViewModifierCodeSequence = DicomSequence([])
    ds.ViewCodeSequence = DicomSequence([code])
    ds.PatientOrientation = ["L", "F"]
    ds.PixelIntensityRelationship = "LOG"
    # +1: larger stored value, more X-ray; display values here grow with attenuation
    ds.PixelIntensityRelationshipSign = 1 if photometric == "MONOCHROME1" else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    ds.LossyImageCompression = "00"
    ds.DetectorType = "SCINTILLATOR"
    ds.PositionerType = ""
    ds.KVP = "120"
    # a 350 mm wide chest fills the picture
    spacing = _decimal(350 / columns)
    ds.ImagerPixelSpacing = [spacing, spacing]
    ds.AcquisitionContextSequence = DicomSequence([])


def _fill_cr(ds: Dataset, columns: int) -> None:
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.AcquisitionNumber = 1
    ds.KVP = "120"
    ds.PlateID = ""
    ds.CassetteOrientation = ""
    ds.CassetteSize = ""
    ds.ExposuresOnPlate = 1
    spacing = _decimal(350 / columns)
    ds.ImagerPixelSpacing = [spacing, spacing]
