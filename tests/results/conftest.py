"""Sources and contexts for the encoder tests, built here, not by the node."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicom_node.results import codes
from dicom_node.values import (
    Code,
    Finding,
    Findings,
    LabelVolume,
    Measurements,
    Presence,
    Provenance,
    ResultContext,
    Segment,
    SegmentMeasurement,
)

PACKAGES = {
    "dciodvfy": "Debian package dicom3tools",
    "dcmdump": "Debian package dcmtk",
    "findscu": "Debian package dcmtk",
    "dcm2pnm": "Debian package dcmtk",
    "dcm2pdf": "Debian package dcmtk",
    "dsrdump": "Debian package dcmtk",
    "dsr2html": "Debian package dcmtk",
    "java": "Debian package default-jre-headless",
    "segimage2itkimage": "Python package dcmqi",
    "tid1500reader": "Python package dcmqi",
}


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a foreign program, or a skip that names what to install."""

    def find(name: str) -> str:
        found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        if found is None:
            pytest.skip(f"needs {name} ({PACKAGES[name]})")
        return found

    return find


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A foreign program's run: text, bounded."""

    def start(*words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout)

    return start


# --- sources ---------------------------------------------------------------------------------------------------------

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (0.9659258, 0.2588190, 0.0, -0.2241439, 0.8365163, 0.5)


def _patient(ds: Dataset) -> None:
    ds.PatientName = "Doe^Jane"
    ds.PatientID = "P-0815"
    ds.IssuerOfPatientID = "HOSPITAL"
    ds.PatientBirthDate = "19790401"
    ds.PatientSex = "F"
    ds.PatientAge = "045Y"
    ds.StudyDate = "20240501"
    ds.StudyTime = "101500"
    ds.AccessionNumber = "A1"
    ds.StudyID = "S1"
    ds.ReferringPhysicianName = "House^Gregory"
    ds.StudyDescription = "Abdomen"


def _image(sop_class_uid: str, modality: str, rows: int, columns: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = sop_class_uid
    ds.SOPInstanceUID = generate_uid()
    ds.Modality = modality
    ds.Manufacturer = "ACME"
    ds.ManufacturerModelName = "Scanner 3"
    ds.Rows, ds.Columns = rows, columns
    _patient(ds)
    return ds


@pytest.fixture(scope="session")
def ct_series() -> Callable[..., list[Dataset]]:
    """CT headers of a stack, ascending along its normal; `missing` leaves out slices by index."""

    def build(
        slices: int = 10,
        rows: int = 24,
        columns: int = 32,
        orientation: Sequence[float] = AXIAL,
        step_mm: float = 2.5,
        missing: Sequence[int] = (),
    ) -> list[Dataset]:
        study, series, frame_of_reference = generate_uid(), generate_uid(), generate_uid()
        normal = np.cross(orientation[:3], orientation[3:])
        images = []
        for number in range(slices):
            if number in missing:
                continue
            ds = _image(CTImageStorage, "CT", rows, columns)
            ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
            ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = frame_of_reference, ""
            ds.BodyPartExamined = "ABDOMEN"
            ds.PixelSpacing = [0.8, 0.75]
            ds.SliceThickness = 2.5
            ds.ImageOrientationPatient = [f"{value:.7f}" for value in orientation]
            position = np.array([-100.5, -90.25, 12.125]) + number * step_mm * normal
            ds.ImagePositionPatient = [f"{value:.6f}" for value in position]
            ds.InstanceNumber = 1000 - number  # of no use for ordering
            images.append(ds)
        return images

    return build


@pytest.fixture(scope="session")
def radiograph() -> Callable[..., Dataset]:
    """A chest image header, CR unless told otherwise."""

    def build(sop_class_uid: str = "1.2.840.10008.5.1.4.1.1.1", modality: str = "CR") -> Dataset:
        ds = _image(sop_class_uid, modality, 2000, 1800)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        ds.BodyPartExamined = "CHEST"
        ds.ViewPosition = "PA"
        return ds

    return build


# --- values ----------------------------------------------------------------------------------------------------------


def _organ(number: int, key: str, label: str, code: Code, modifier: Code | None = None) -> Segment:
    return Segment(
        number=number,
        key=key,
        label=label,
        category=codes.ANATOMICAL_STRUCTURE,
        type=code,
        modifier=modifier,
        color_rgb=(220, 20 * number, 60),
    )


@pytest.fixture(scope="session")
def organs() -> tuple[Segment, ...]:
    """Liver, spleen, both kidneys: labels 1 to 4."""
    kidney = codes.ORGANS["kidney"].code
    return (
        _organ(1, "liver", "Liver", codes.ORGANS["liver"].code),
        _organ(2, "spleen", "Spleen", codes.ORGANS["spleen"].code),
        _organ(3, "kidney_right", "Right kidney", kidney, codes.RIGHT),
        _organ(4, "kidney_left", "Left kidney", kidney, codes.LEFT),
    )


@pytest.fixture(scope="session")
def labels() -> Callable[..., npt.NDArray[np.uint8]]:
    """Blocks that differ on every slice, the listed labels only; the outer slices are empty."""

    def build(images: Sequence[Dataset], numbers: Sequence[int] = (1, 2, 3, 4)) -> npt.NDArray[np.uint8]:
        array = np.zeros((len(images), int(images[0].Rows), int(images[0].Columns)), dtype=np.uint8)
        for z in range(1, len(images) - 1):
            for place, number in enumerate(numbers):
                if len(numbers) == 1 or z % len(numbers) != place:  # each label misses some slices
                    array[z, 2 + place : 9 + z % 5, 6 * place + 1 : 6 * place + 4 + z % 3] = number
        return array

    return build


@pytest.fixture(scope="session")
def volume_of(organs: tuple[Segment, ...]) -> Callable[..., LabelVolume]:
    """A label volume on those images, plane i on image i."""

    def build(images: Sequence[Dataset], array: npt.NDArray[np.uint8], notes: tuple[str, ...] = ()) -> LabelVolume:
        uids = tuple(str(image.SOPInstanceUID) for image in images)
        return LabelVolume(labels=array, sop_instance_uids=uids, segments=organs, notes=notes)

    return build


@pytest.fixture(scope="session")
def measurements_of(organs: tuple[Segment, ...]) -> Callable[..., Measurements]:
    """Measurements in which the organs named in `lacking` have that presence and the others are measured."""

    def build(notes: tuple[str, ...] = (), **lacking: Presence) -> Measurements:
        items = [
            SegmentMeasurement(
                segment=organ, presence=lacking[organ.key], volume_cm3=None, mean_hu=None, note="why not"
            )
            if organ.key in lacking
            else SegmentMeasurement(
                segment=organ,
                presence=Presence.PRESENT,
                volume_cm3=100.0625 * organ.number,
                mean_hu=-12.5 + organ.number,
            )
            for organ in organs
        ]
        return Measurements(items=tuple(items), notes=notes)

    return build


NAMES = {
    "tuberculosis": "Tuberculosis",
    "cardiomegaly": "Cardiomegaly",
    "pleural_thickening": "Pleural Thickening",
    "pleural_effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "consolidation": "Consolidation",
    "atelectasis": "Atelectasis",
    "nodule_mass": "Nodule/Mass",
    "fibrosis": "Fibrosis",
    "infiltration": "Infiltration",
    "calcification": "Calcification",
}


@pytest.fixture(scope="session")
def findings_on() -> Callable[..., Findings]:
    """All eleven findings on one image, of all three presences."""

    def build(image: Dataset, notes: tuple[str, ...] = ()) -> Findings:
        presences = list(Presence)
        items = tuple(
            Finding(
                key=key,
                name=name,
                code=codes.FINDINGS[key].code,
                presence=presences[place % 3],
                confidence=None if presences[place % 3] is Presence.UNDETERMINED else 0.05 + place / 13,
                threshold=0.41,
            )
            for place, (key, name) in enumerate(NAMES.items())
        )
        return Findings(sop_instance_uid=str(image.SOPInstanceUID), items=items, notes=notes)

    return build


@pytest.fixture(scope="session")
def context() -> ResultContext:
    """The first run of a demonstration model."""
    return ResultContext(
        run_key="run 1",
        tracking_key="series and model",
        run_number=1,
        created_at=datetime(2024, 5, 1, 22, 30, 0, 250000, tzinfo=UTC),
        time_zone="+0200",
        provenance=Provenance(
            name="demo-model",
            version="1.2.0",
            manufacturer="Model Makers",
            device_uid="2.25.329800735698586629295641978511506172918",
            weights_sha256="a" * 64,
            config_sha256="b" * 64,
            parameters=("window=64",),
            demonstration=True,
            notice="Trained on synthetic phantoms, not for clinical use",
        ),
        node_name="NODE_A",
    )


@pytest.fixture(scope="session")
def product_context(context: ResultContext) -> ResultContext:
    """The same of a model that is no demonstration."""
    return replace(context, provenance=replace(context.provenance, demonstration=False, notice=""))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Dataset], Path]:
    """The file of a data set."""

    def write(dataset: Dataset) -> Path:
        path = tmp_path / f"{dataset.Modality}-{dataset.SOPInstanceUID[-12:]}-{len(list(tmp_path.iterdir()))}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def reread(written: Callable[[Dataset], Path]) -> Callable[[Dataset], Dataset]:
    """A data set as anyone reads it from its file."""
    return lambda dataset: dcmread(written(dataset))


# --- slides and what engines elsewhere bring -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slide() -> Callable[..., Dataset]:
    """The header of a slide image: 0.5 micrometre pixels, columns running along -y and rows along -x of the slide."""

    def build(rows: int = 900, columns: int = 1300, **changes: object) -> Dataset:
        ds = _image("1.2.840.10008.5.1.4.1.1.77.1.6", "SM", 256, 256)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = generate_uid(), "SLIDE_CORNER"
        ds.TotalPixelMatrixRows, ds.TotalPixelMatrixColumns = rows, columns
        ds.ImageOrientationSlide = [0.0, -1.0, 0.0, -1.0, 0.0, 0.0]
        ds.NumberOfFrames = -(-rows // 256) * -(-columns // 256)
        ds.ImagedVolumeDepth = 4.0
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = 12.5, "ISO_10918_1"
        origin, shared, measures, specimen = Dataset(), Dataset(), Dataset(), Dataset()
        origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = "20.5", "41.25"
        ds.TotalPixelMatrixOriginSequence = [origin]
        measures.PixelSpacing, measures.SliceThickness = [0.0005, 0.0005], 0.004
        shared.PixelMeasuresSequence = [measures]
        ds.SharedFunctionalGroupsSequence = [shared]
        specimen.SpecimenIdentifier, specimen.SpecimenUID = "S-24-7 A1", generate_uid()
        ds.ContainerIdentifier, ds.SpecimenDescriptionSequence = "S-24-7", [specimen]
        for keyword, value in changes.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        return ds

    return build


TISSUES = (("tumour", "Tumour", "108369006", "Neoplasm"), ("stroma", "Stroma", "85756007", "Tissue"))


@pytest.fixture(scope="session")
def tissues() -> tuple[Segment, ...]:
    """Tumour is label 3, stroma label 7."""
    return tuple(
        Segment(
            number=number,
            key=key,
            label=label,
            category=Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure"),
            type=Code(value=value, scheme="SCT", meaning=meaning),
        )
        for number, (key, label, value, meaning) in zip((3, 7), TISSUES, strict=True)
    )


@pytest.fixture(scope="session")
def no_errors(
    tool: Callable[[str], str], run: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[[Path], list[str]]:
    """What dciodvfy finds wrong, and dcmtk cannot dump, in a file: nothing, one hopes."""

    def check(path: Path) -> list[str]:
        told = run(tool("dciodvfy"), "-new", path)
        errors = [line for line in (told.stderr + told.stdout).splitlines() if line.startswith("Error")]
        if told.returncode and not errors:
            errors.append(f"dciodvfy: exit status {told.returncode}")
        dumped = run(tool("dcmdump"), "+L", path)
        errors += [line for line in dumped.stderr.splitlines() if line.startswith("E:")]
        if dumped.returncode:
            errors.append(f"dcmdump: exit status {dumped.returncode}")
        return errors

    return check
