"""What a bundle's configuration says is what we do: the labels of MONAI's own transforms, inferer and network."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, Invertd, KeepLargestConnectedComponentd, LoadImaged
from pydicom.uid import MRImageStorage

from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.models.forward import load_network, run
from dicom_node.models.registry import find_package
from dicom_node.models.segment import prepare, volume_job

CPU = torch.device("cpu")
UNET = {"channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1, "norm": "batch"}
SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1], "dropout_prob": 0.2}
LOAD = [{"_target_": "LoadImaged", "keys": "image"}, {"_target_": "EnsureChannelFirstd", "keys": "image"}]
GRID = [
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    {"_target_": "Spacingd", "keys": "image", "pixdim": [7.0, 7.0, 8.0], "mode": "bilinear"},
]
SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
HALF = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
BACK, NEAREST = INVERT | {"nearest_interp": False}, INVERT | {"nearest_interp": True}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1, 2], "connectivity": 1}
NORMALIZE = {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True}
MINMAX = {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0}
RANGE = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -150, "a_max": 250, "b_min": 0.0, "b_max": 1.0}
CROP = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "sw_batch_size": 2, "overlap": 0.25}

# (network, classes, intensity and crop, inferer, postprocessing)
Case = tuple[dict[str, Any], int, list[Any], dict[str, Any], list[Any]]
CASES: dict[str, Case] = {
    "whole body": (
        {"_target_": "SegResNet", **SEGRESNET},
        5,
        [NORMALIZE, MINMAX],
        WINDOWS | {"padding_mode": "replicate", "mode": "gaussian"},
        [SOFTMAX, ARGMAX, NEAREST],
    ),
    "windows beyond the volume": (
        {"_target_": "UNet", **UNET},
        3,
        [RANGE | {"clip": False}],
        WINDOWS | {"roi_size": [64, 64, 32], "padding_mode": "constant", "cval": -2.0},
        [SOFTMAX, BACK, ARGMAX],
    ),
    "replicated beyond the volume": (
        {"_target_": "UNet", **UNET},
        3,
        [NORMALIZE | {"nonzero": False}],
        WINDOWS | {"roi_size": [64, 64, 32], "padding_mode": "replicate"},
        [BACK, ARGMAX],
    ),
    "one output": (
        {"_target_": "UNet", **UNET},
        1,
        [RANGE | {"clip": True}],
        WINDOWS,
        [SIGMOID, BACK, HALF],
    ),
    "one output decided on the network's grid": (
        {"_target_": "UNet", **UNET},
        1,
        [RANGE | {"clip": True}],
        WINDOWS,
        [SIGMOID, HALF, NEAREST],
    ),
    "cropped": (
        {"_target_": "UNet", **UNET},
        3,
        [RANGE | {"clip": True}, CROP | {"margin": 1, "allow_smaller": True}],
        WINDOWS | {"mode": "gaussian"},
        [SOFTMAX, BACK, ARGMAX],
    ),
    "cropped by a threshold, labels back": (
        {"_target_": "UNet", **UNET},
        3,
        [RANGE | {"clip": True}, CROP | {"select_fn": "$lambda x: x > 0.4"}],
        WINDOWS,
        [ARGMAX, NEAREST],
    ),
    "the largest pieces": (
        {"_target_": "UNet", **UNET},
        3,
        [RANGE | {"clip": True}],
        WINDOWS,
        [ARGMAX, LARGEST, NEAREST],
    ),
    "the largest pieces as MONAI takes them unasked": (
        {"_target_": "UNet", **UNET},
        3,
        [RANGE | {"clip": True}],
        WINDOWS,
        [ARGMAX, LARGEST | {"connectivity": None}, NEAREST],
    ),
    "the whole volume at once": (
        {"_target_": "BasicUNet", "features": [4, 4, 8, 8, 16, 4]},
        3,
        [RANGE | {"clip": True}],
        {"_target_": "SimpleInferer"},
        [SOFTMAX, BACK, ARGMAX],
    ),
}


def put(folder: Path, case: Case, series: Path, modality: str = "CT") -> Path:
    """The bundle, its network filled with random weights whose classes are about as frequent in `series`."""
    network, classes, middle, inferer, after = case
    network = {**network, "spatial_dims": 3, "in_channels": 1, "out_channels": classes}
    config = {
        "network_def": network,
        "preprocessing": {"_target_": "Compose", "transforms": [*LOAD, *GRID, *middle]},
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": after},
    }
    names = {str(n): f"organ {n}" if n else "background" for n in range(max(classes, 2))}
    data = {
        "version": "1.0.0",
        "name": "equal",
        "network_data_format": {
            "inputs": {"image": {"modality": modality, "num_channels": 1}},
            "outputs": {"pred": {"channel_def": names}},
        },
    }
    for name, content in (("metadata", data), ("inference", config)):
        path = folder / "configs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "models").mkdir()
    torch.manual_seed(11)
    module = ConfigParser(config).get_parsed_content("network_def")
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(2, 1, 32, 32, 32))  # running statistics that are not 0 and 1
    torch.save(module.state_dict(), folder / "models" / "model.pt")
    *_, last = (bias for name, bias in module.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        last -= stock_answer(folder, series)[1]["pred"].flatten(1).median(dim=1).values
    torch.save(module.state_dict(), folder / "models" / "model.pt")
    return folder


def stock_answer(bundle: Path, series: Path) -> tuple[ConfigParser, dict[str, Any], Compose]:
    """What MONAI's network answers in its windows, and the transforms before it."""
    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    network.eval()
    prepared = Compose(list(parser.get_parsed_content("preprocessing").transforms[1:]))
    data = prepared(LoadImaged("image", reader="PydicomReader")({"image": str(series)}))
    with torch.inference_mode():
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
    return parser, data, prepared


class Largest:
    """The largest piece of each label by a flood fill: skimage, which MONAI's takes, is not here."""

    def __init__(self, stock: KeepLargestConnectedComponentd) -> None:
        shared = stock.converter.connectivity or 3
        self._steps = [step for step in product((-1, 0, 1), repeat=3) if 0 < np.abs(step).sum() <= shared]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        labels = np.array(data["pred"][0])
        for label in (1, 2):
            left = set(map(tuple, np.argwhere(labels == label).tolist()))
            pieces = []
            while left:
                piece = [left.pop()]
                for voxel in piece:
                    for step in self._steps:
                        near = tuple(a + b for a, b in zip(voxel, step, strict=True))
                        if near in left:
                            left.remove(near)
                            piece.append(near)
                pieces.append(piece)
            for piece in sorted(pieces, key=len)[:-1]:
                labels[tuple(np.transpose(piece))] = 0
        data["pred"][0] = torch.from_numpy(labels)
        return data


def by_monai(bundle: Path, series: Path) -> Any:
    """(slice, row, column) labels, slices ascending along the patient's long axis."""
    parser, data, prepared = stock_answer(bundle, series)
    after: list[Any] = []
    for step in parser.get_parsed_content("postprocessing").transforms:
        if isinstance(step, Invertd):
            after.append(Invertd("pred", prepared, orig_keys="image", nearest_interp=step.nearest_interp[0]))
        else:
            after.append(Largest(step) if isinstance(step, KeepLargestConnectedComponentd) else step)
    labels = np.asarray(Compose(after)(data)["pred"][0]).round().astype(np.uint8).transpose(2, 1, 0)
    ascending = LoadImaged("image", reader="PydicomReader")({"image": str(series)})["image"].affine[2, 2] > 0
    return labels if ascending else labels[::-1]


def by_us(bundle: Path, task: Any) -> Any:
    """The same of our own path, as the runtime process does it."""
    manifest = find_package(str(bundle)).manifest
    prepared = prepare(manifest, task, lambda: None)
    source = manifest.source.model_dump(mode="json", by_alias=True)
    infer = manifest.infer.model_dump(mode="json", by_alias=True) | {"precision": "fp32"}
    network = load_network(str(bundle / manifest.source.path), source, infer, CPU)
    volume = torch.from_numpy(np.asarray(prepared.volume_hu))
    job = volume_job(manifest, prepared.grid)
    return run(network, "segmentation", volume, infer, job, pulse=lambda: None).output


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT of the demonstration phantom whose grid is not the network's, none of it halfway between two samples.

    Which of two equally near samples MONAI takes is decided by rounding errors of its coordinates.
    """
    folder = tmp_path_factory.mktemp("series")
    write_ct_series(folder, 5, shape=(24, 48, 48), spacing_mm=(7.61, 7.33, 7.33))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_configuration_gives_the_labels_it_gives_in_monai(
    name: str, tmp_path: Path, series: Path, task_for: Callable[..., Any]
) -> None:
    bundle = put(tmp_path / "bundle", CASES[name], series)
    stock = by_monai(bundle, series)
    ours = by_us(bundle, task_for(series.glob("*.dcm")))
    classes = max(CASES[name][1], 2)
    counts = np.bincount(stock.reshape(-1), minlength=classes) / stock.size
    assert np.count_nonzero(counts > 0.001) > 1, counts
    # of 55 296; random classes are next to each other everywhere, and somewhere two are as large to the last bit
    assert np.count_nonzero(ours != stock) <= 5, counts


def export(form: str, bundle: Path) -> Path:
    """The folder of the same bundle, its network as a graph instead of weights."""
    weights = bundle / "models" / "model.pt"
    configs = {path.name: path.read_bytes() for path in (bundle / "configs").iterdir()}
    module = ConfigParser(json.loads(configs["inference.json"])).get_parsed_content("network_def")
    module.load_state_dict(torch.load(weights, weights_only=True))
    module.eval()
    weights.unlink()
    example = torch.zeros(1, 1, 32, 32, 32)
    if form == "one file":
        folder = bundle / "one"
        folder.mkdir()
        torch.jit.save(torch.jit.trace(module, example), str(folder / "organs.ts"), _extra_files=configs)
        return folder
    path = weights.with_suffix(form)
    if form == ".ts":
        torch.jit.save(torch.jit.trace(module, example), str(path))
    elif form == ".pt2":
        torch.export.save(torch.export.export(module, (example,)), path)
    else:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        torch.onnx.export(module, (example,), path, dynamo=False, input_names=["x"], output_names=["y"])
    return bundle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [".ts", ".pt2", ".onnx", "one file"])
def test_the_network_exported_to_a_graph_gives_the_labels_of_its_weights(
    form: str, tmp_path: Path, series: Path, task_for: Callable[..., Any]
) -> None:
    bundle, task = put(tmp_path / "bundle", CASES["cropped"], series), task_for(series.glob("*.dcm"))
    weights = by_us(bundle, task)
    graph = by_us(export(form, bundle), task)
    assert len(np.unique(weights)) == 3
    assert np.count_nonzero(graph != weights) <= 5


@pytest.mark.filterwarnings("ignore")
def test_a_magnetic_resonance_series_goes_by_its_own_values(
    tmp_path: Path, series: Path, task_for: Callable[..., Any]
) -> None:
    folder = tmp_path / "mr"
    folder.mkdir()
    for path in series.glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = MRImageStorage
        image.Modality = "MR"
        for keyword in ("RescaleIntercept", "RescaleSlope", "RescaleType"):
            if keyword in image:
                del image[keyword]
        image.save_as(folder / path.name)
    case: Case = ({"_target_": "UNet", **UNET}, 3, [MINMAX, NORMALIZE], WINDOWS, [ARGMAX, NEAREST])
    bundle = put(tmp_path / "bundle", case, folder, "MR")
    stock, ours = by_monai(bundle, folder), by_us(bundle, task_for(folder.glob("*.dcm")))
    assert len(np.unique(stock)) > 1
    assert np.count_nonzero(ours != stock) <= 5
