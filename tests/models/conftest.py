"""Shared by the model tests: stored instances from files, packages with random weights, engine tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from pydicom.filereader import read_file_meta_info

from dicom_node.demo.packages import ct_package, cxr_package
from dicom_node.demo.phantom_cxr import FINDING_NAMES
from dicom_node.geometry import GEOMETRY_KEYWORDS
from dicom_node.model import EngineTask, Origin, SeriesHeader, StoredInstance

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
def cxr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A radiograph package with a small random network."""
    folder = tmp_path_factory.mktemp("packages") / "cxr"
    manifest = cxr_package(_random_weights(folder, SMALL_RESNET), dict.fromkeys(FINDING_NAMES, 0.5))
    manifest["source"]["network"] = SMALL_RESNET
    manifest["input"]["size"] = 64
    return _write_package(folder, manifest)
