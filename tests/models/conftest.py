"""Shared by the model tests: stored instances from files, packages with random weights, engine tasks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import yaml
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.sequence import Sequence
from pydicom.valuerep import format_number_as_ds

from dicom_node.demo.packages import ct_package, cxr_package
from dicom_node.demo.phantom_cxr import FINDING_NAMES
from dicom_node.geometry import GEOMETRY_KEYWORDS
from dicom_node.model import (
    EngineTask,
    Origin,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.models import registry
from dicom_node.models.package import ModelPackage

SMALL_UNET = {
    "name": "UNet",
    "args": {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 1,
        "norm": "BATCH",
    },
}
SMALL_RESNET = {
    "name": "ResNet",
    "args": {
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [4, 4, 8, 8],
        "spatial_dims": 2,
        "n_input_channels": 1,
        "conv1_t_stride": 2,
        "num_classes": len(FINDING_NAMES),
    },
}


def _stored(path: Path) -> StoredInstance:
    meta = read_file_meta_info(path)
    ds = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID"], stop_before_pixels=True)
    offset = 132 + 12 + meta.FileMetaInformationGroupLength
    data = path.read_bytes()[offset:]
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        origin=Origin.RECEIVED,
    )


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], StoredInstance]:
    """A Part-10 file as the archive would hand it out."""
    return _stored


_SERIES_KEYWORDS = (
    *("Modality", "SOPClassUID", "BodyPartExamined", "SeriesDescription", "ViewPosition", "PresentationIntentType"),
)


def _task(paths: Iterable[Path], *, timeout_s: float = 60.0) -> EngineTask:
    files = sorted(paths)
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    values: dict[str, tuple[Any, ...]] = {}
    for keyword in _SERIES_KEYWORDS:
        found = tuple(dict.fromkeys(str(ds[keyword].value) for ds in headers if keyword in ds))
        if found:
            values[keyword] = found
    geometry = tuple({k: ds[k].value for k in GEOMETRY_KEYWORDS if k in ds} for ds in headers)
    return EngineTask(
        job_id=1,
        study_instance_uid=str(headers[0].StudyInstanceUID),
        series_instance_uid=str(headers[0].SeriesInstanceUID),
        instances=tuple(_stored(path) for path in files),
        header=SeriesHeader(
            series_instance_uid=str(headers[0].SeriesInstanceUID),
            instance_count=len(files),
            values=values,
            geometry=geometry,
        ),
        timeout_s=timeout_s,
    )


@pytest.fixture(scope="session")
def task_for() -> Callable[..., EngineTask]:
    """The task that routing would make of these files of one series."""
    return _task


def _write_package(folder: Path, manifest: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def write_package() -> Callable[[Path, dict[str, Any]], Path]:
    """Write a manifest as `folder`/model.yaml."""
    return _write_package


def _random_weights(folder: Path, network: Mapping[str, Any], *, change: Callable[[Any], None] | None = None) -> str:
    import torch
    from monai.networks import nets
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    module = getattr(nets, network["name"])(**network["args"])
    if change is not None:
        with torch.no_grad():
            change(module)
    path = folder / "weights.safetensors"
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., str]:
    """Write fp16 weights of a network with fixed random values; their sha256."""
    return _random_weights


@pytest.fixture(scope="session")
def ct_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT package with a small random network."""
    folder = tmp_path_factory.mktemp("packages") / "ct"
    manifest = ct_package(_random_weights(folder, SMALL_UNET))
    manifest["source"]["network"] = SMALL_UNET
    manifest["infer"]["window"] = [32, 32, 32]
    return _write_package(folder, manifest)


@pytest.fixture(scope="session")
def in_fp32() -> Callable[[ModelPackage], ModelPackage]:
    """`in_fp32(package)`: the same, to be compared exactly also where a processor is faster in bf16."""

    def exactly(package: ModelPackage) -> ModelPackage:
        infer = package.manifest.infer.model_copy(update={"precision": "fp32"})
        return replace(package, manifest=package.manifest.model_copy(update={"infer": infer}))

    return exactly


@pytest.fixture
def models_in_fp32(monkeypatch: pytest.MonkeyPatch, in_fp32: Callable[[ModelPackage], ModelPackage]) -> None:
    """The engines that a test makes find each model with fp32 in its manifest."""
    found = registry.find_package
    monkeypatch.setattr(registry, "find_package", lambda *where: in_fp32(found(*where)))


@pytest.fixture(scope="session")
def cxr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A radiograph package with a small random network."""
    folder = tmp_path_factory.mktemp("packages") / "cxr"
    manifest = cxr_package(_random_weights(folder, SMALL_RESNET), dict.fromkeys(FINDING_NAMES, 0.5))
    manifest["source"]["network"] = SMALL_RESNET
    manifest["input"]["size"] = 64
    return _write_package(folder, manifest)


# --- series that know where they are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A CT series in which every pixel says where it lies: its value is `weights` . (x, y, z), in mm of the patient.

    `slices` has SOP Instance UID and frame (0: single-frame) of each slice, ascending along the normal, and
    `positions[k]` the Image Position (Patient) that is written for it; `frame` has row direction, column direction and
    normal as columns. Linear interpolation keeps a linear function: it must be found again on any grid.
    """

    paths: list[Path]
    slices: tuple[tuple[str, int], ...]
    positions: npt.NDArray[np.float64]
    frame: npt.NDArray[np.float64]
    pixel_mm: tuple[float, float]
    weights: npt.NDArray[np.float64]

    def place(self, k: int, row: Any, column: Any) -> npt.NDArray[np.float64]:
        """Where pixels of slice `k` lie (PS3.3 equation C.7.6.2.1-1): (..., 3) mm."""
        row, column = np.asarray(row, np.float64), np.asarray(column, np.float64)
        down = self.frame[:, 1] * self.pixel_mm[0] * row[..., None]
        across = self.frame[:, 0] * self.pixel_mm[1] * column[..., None]
        return np.asarray(self.positions[k] + down + across)

    def value(self, places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What stands at `places` (..., 3) mm."""
        return np.asarray(places @ self.weights)


def _world_series(
    folder: Path,
    *,
    orientation: npt.NDArray[np.float64] | None = None,
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.7),
    shape: tuple[int, int, int] = (12, 20, 16),
    order: str = "shuffled",
    tilt: float = 0.0,
    jitter: float = 0.0,
    gap: Iterable[int] = (),
    multiframe: bool = False,
    weights: tuple[float, float, float] = (0.7, 0.5, 0.3),
    origin: tuple[float, float, float] = (-20.0, 15.0, -300.0),
    syntax: str = uids.ExplicitVRLittleEndian,
    seed: int = 0,
) -> World:
    rng = np.random.default_rng(seed)
    frame = np.eye(3) if orientation is None else np.asarray(orientation, np.float64)
    kept = [k for k in range(shape[0]) if k not in set(gap)]
    along = np.arange(shape[0]) * spacing[0] + rng.uniform(-jitter, jitter, shape[0])
    sideways = along * math.tan(math.radians(tilt))
    positions = np.asarray(origin) + np.outer(along, frame[:, 2]) + np.outer(sideways, frame[:, 1])
    positions = np.array([[float(_ds(value)) for value in positions[k]] for k in kept])
    world = World([], (), positions, frame, (spacing[1], spacing[2]), np.asarray(weights))
    rows, columns = np.indices(shape[1:])
    planes = []
    for k in range(len(kept)):
        values = world.value(world.place(k, rows, columns))
        slope, intercept = (0.002, 0.003)[k % 2], math.floor(values.min())
        planes.append((slope, intercept, np.rint((values - intercept) / slope).astype(np.uint16)))
    places = {"shuffled": rng.permutation(len(kept)), "ascending": np.arange(len(kept))}
    written = places.get(order, np.arange(len(kept))[::-1])
    folder.mkdir(parents=True, exist_ok=True)
    write = _write_world_frames if multiframe else _write_world_images
    paths, slices = write(folder, world, planes, [int(k) for k in written], syntax)
    return replace(world, paths=paths, slices=slices)


def _ds(value: float) -> str:
    return str(format_number_as_ds(float(value)))


_Planes = list[tuple[float, int, npt.NDArray[np.uint16]]]


def _world_header(cells: npt.NDArray[np.uint16], sop_class: str) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, uids.generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.9"
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
        setattr(ds, keyword, "")
    ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ds.PositionReferenceIndicator = ""
    ds.Modality, ds.BodyPartExamined = "CT", "ABDOMEN"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.Rows, ds.Columns = cells.shape[-2:]
    ds.PixelData = cells.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    return ds


def _save_world(ds: Dataset, path: Path, syntax: str) -> Path:
    if syntax != uids.ExplicitVRLittleEndian:
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def _item(**attributes: Any) -> Sequence:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return Sequence([item])


def _write_world_images(
    folder: Path, world: World, planes: _Planes, order: list[int], syntax: str
) -> tuple[list[Path], tuple[tuple[str, int], ...]]:
    paths, slices = [], {}
    for number, k in enumerate(order, start=1):
        slope, intercept, cells = planes[k]
        ds = _world_header(cells, uids.CTImageStorage)
        ds.InstanceNumber = number
        ds.ImagePositionPatient = [_ds(value) for value in world.positions[k]]
        ds.ImageOrientationPatient = [_ds(value) for value in (*world.frame[:, 0], *world.frame[:, 1])]
        ds.PixelSpacing = [_ds(value) for value in world.pixel_mm]
        ds.SliceThickness = "1"
        ds.RescaleSlope, ds.RescaleIntercept = _ds(slope), _ds(intercept)
        paths.append(_save_world(ds, folder / f"{number:04}.dcm", syntax))
        slices[k] = (str(ds.SOPInstanceUID), 0)
    return paths, tuple(slices[k] for k in sorted(slices))


def _write_world_frames(
    folder: Path, world: World, planes: _Planes, order: list[int], syntax: str
) -> tuple[list[Path], tuple[tuple[str, int], ...]]:
    """One Enhanced CT image; what all frames share in the shared functional groups (PS3.3 A.38, C.7.6.16)."""
    ds = _world_header(np.stack([planes[k][2] for k in order]), uids.EnhancedCTImageStorage)
    ds.InstanceNumber, ds.NumberOfFrames = 1, len(order)
    directions = [_ds(value) for value in (*world.frame[:, 0], *world.frame[:, 1])]
    shared = _item(
        PixelMeasuresSequence=_item(PixelSpacing=[_ds(value) for value in world.pixel_mm], SliceThickness="1"),
        PlaneOrientationSequence=_item(ImageOrientationPatient=directions),
        CTImageFrameTypeSequence=_item(FrameType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"]),
    )
    ds.SharedFunctionalGroupsSequence = shared
    frames = []
    for number, k in enumerate(order, start=1):
        slope, intercept, _ = planes[k]
        frames += _item(
            FrameContentSequence=_item(
                FrameAcquisitionNumber=1, StackID="1", InStackPositionNumber=number, DimensionIndexValues=[1, number]
            ),
            PlanePositionSequence=_item(ImagePositionPatient=[_ds(value) for value in world.positions[k]]),
            PixelValueTransformationSequence=_item(
                RescaleSlope=_ds(slope), RescaleIntercept=_ds(intercept), RescaleType="HU"
            ),
        )
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.DimensionOrganizationSequence = _item(DimensionOrganizationUID="1.2.3.10")
    ds.DimensionIndexSequence = Sequence(
        [
            item
            for pointer in (0x00209056, 0x00209057)
            for item in _item(
                DimensionOrganizationUID="1.2.3.10", DimensionIndexPointer=pointer, FunctionalGroupPointer=0x00209111
            )
        ]
    )
    path = _save_world(ds, folder / "enhanced.dcm", syntax)
    uid = str(ds.SOPInstanceUID)
    return [path], tuple((uid, order.index(k) + 1) for k in sorted(order))


@pytest.fixture(scope="session")
def world_series() -> Callable[..., World]:
    """Write a series whose pixel values are places: `world_series(folder, orientation=, spacing=, shape=, ...)`.

    `orientation`: columns are row direction, column direction, normal. `spacing` (slice, row, column) mm. `order` of
    Instance Numbers or frames: shuffled, ascending, descending. `tilt` in degrees shears along the columns. `jitter`
    in mm, up to, along the normal. `gap`: indices of slices that are not written. `multiframe`: one Enhanced CT.
    """
    return _world_series
