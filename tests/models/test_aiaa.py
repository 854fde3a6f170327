"""A config_aiaa.json means what its transforms mean in MONAI; what is interactive, old or code is refused by name."""

import copy
import functools
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.errors import PackageError
from dicom_node.model import EngineTask
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.formats import describe_folder
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.registry import find_package
from dicom_node.values import LabelVolume

NETWORK = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "num_res_units": 1,
    "norm": "batch",
}


def config() -> dict[str, Any]:
    """What the published spleen model of Clara Train 4 has, on a coarser grid."""
    m = "monai.transforms."
    return {
        "version": "1.0",
        "type": "segmentation",
        "labels": ["spleen"],
        "description": "A pre-trained model for volumetric (3D) segmentation of the spleen from CT image",
        "pre_transforms": [
            {"name": m + "LoadImaged", "args": {"keys": "image"}},
            {"name": m + "AddChanneld", "args": {"keys": "image"}},
            {"name": m + "Spacingd", "args": {"keys": "image", "pixdim": [8.0, 9.0, 5.0]}},
            {
                "name": m + "ScaleIntensityRanged",
                "args": {"keys": "image", "a_min": -57, "a_max": 164, "b_min": 0.0, "b_max": 1.0, "clip": True},
            },
        ],
        "inference": {
            "input": "image",
            "output": "model",
            "AIAA": {
                "name": "aiaa.inference.PyTorchInference",
                "args": {"scanning_window": True, "roi": [32, 32, 16], "sw_batch_size": 4, "overlap": 0.5},
            },
            "TRITON": {
                "name": "aiaa.inference.TritonInference",
                "args": {},
                "triton_model_config": {"platform": "pytorch_libtorch"},
            },
            "meta_data": {"roi": [32, 32, 16]},
        },
        "post_transforms": [
            {"name": m + "AddChanneld", "args": {"keys": "model"}},
            {"name": m + "Activationsd", "args": {"keys": "model", "softmax": True}},
            {"name": m + "AsDiscreted", "args": {"keys": "model", "argmax": True, "n_classes": 2}},
            {"name": m + "SqueezeDimd", "args": {"keys": "model", "dim": 0}},
            {"name": m + "ToNumpyd", "args": {"keys": "model"}},
            {"name": "aiaa.transforms.Restored", "args": {"keys": "model", "ref_image": "image"}},
            {"name": "aiaa.transforms.ExtremePointsd", "args": {"keys": "model", "result": "result"}},
        ],
        "writer": {"name": "aiaa.writers.WriteNifti", "args": {}},
    }


def network() -> UNet:
    torch.manual_seed(5)
    made = UNet(**NETWORK).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_var.fill_(0.2)
    return made


@functools.cache
def script() -> bytes:
    """The network as torch.jit saves it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit ages
        torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 1, 32, 32, 16)), file)
    return file.getvalue()


def put(folder: Path, content: dict[str, Any], *, archive: bool = False, scripted: bool = True) -> Path:
    """Write the configuration and its model: side by side, or as in a Medical Model Archive."""
    place, name = (folder / "config", "models/model.ts") if archive else (folder, "model.ts")
    place.mkdir(parents=True, exist_ok=True)
    (place / "config_aiaa.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / name).parent.mkdir(exist_ok=True)
    if scripted:
        (folder / name).write_bytes(script())
    else:
        torch.save(network().state_dict(), folder / "model.pt")
    return folder


@pytest.mark.parametrize("archive", [False, True])
def test_the_configuration_becomes_a_manifest(archive: bool, tmp_path: Path) -> None:
    folder = put(tmp_path / "clara_pt_spleen", config(), archive=archive)
    described = describe_folder(folder)
    manifest = find_package(str(folder)).manifest
    assert isinstance(manifest, SegmentationManifest)
    assert (described.format, manifest.trust, manifest.source.format) == ("aiaa", "graph", "torchscript")
    assert (manifest.id, manifest.version) == ("aiaa-spleen", "1.0")
    assert manifest.input.orientation == "LPS" and manifest.input.spacing_mm == (8.0, 9.0, 5.0)
    assert (manifest.infer.window, manifest.infer.overlap, manifest.infer.blend) == ((32, 32, 16), 0.5, "constant")
    assert (manifest.output.activation, manifest.output.inverse) == ("softmax", "labels")
    assert [label.segment.type.value for label in manifest.output.labels] == ["78961009"]
    said = " ".join(described.notes)
    for word in ("axes as they are", "Restored", "ExtremePointsd is left out", "writer is left out"):
        assert word in said


@pytest.mark.usefixtures("models_in_fp32")
def test_a_series_gets_what_the_transforms_say(tmp_path: Path, task_for: Callable[..., EngineTask]) -> None:
    """On the network's own grid, so nothing is resampled; windows by MONAI itself."""
    folder = put(tmp_path / "model", config())
    written = write_ct_series(tmp_path / "ct", 5, shape=(20, 40, 44), spacing_mm=(5.0, 9.0, 8.0))
    engine = LocalModelEngine("aiaa", EngineSettings(model=str(folder), options={"threads": 1}))
    try:
        labels, _ = engine.run(task_for(written.paths), lambda: None).values
    finally:
        engine.close()
    assert isinstance(labels, LabelVolume)
    values = np.clip((written.phantom.hu.astype(np.float32) + 57) / 221, 0, 1).transpose(2, 1, 0)
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(values.copy())[None, None], (32, 32, 16), 1, network(), overlap=0.5
        )
    expected = logits[0].argmax(dim=0).numpy().transpose(2, 1, 0)
    assert 0.02 < (expected == 1).mean() < 0.98
    assert (labels.labels != expected).mean() < 1e-4


def test_weights_without_a_graph_fill_the_network_the_configuration_names(tmp_path: Path) -> None:
    content = config()
    content["inference"]["AIAA"]["args"]["network"] = {"name": "monai.networks.nets.UNet", "args": NETWORK}
    manifest = find_package(str(put(tmp_path / "model", content, scripted=False))).manifest
    assert (manifest.trust, manifest.source.format) == ("data", "state_dict")
    content["inference"]["AIAA"]["args"]["network"] = {"name": "lib.mine.UNet", "args": {}}
    put(tmp_path / "model", content, scripted=False)
    with pytest.raises(PackageError, match="names no network of MONAI"):
        describe_folder(tmp_path / "model")


def test_an_orientation_of_its_own_and_an_inverse_are_kept(tmp_path: Path) -> None:
    content = config()
    orientation = {"name": "monai.transforms.Orientationd", "args": {"keys": "image", "axcodes": "RAS"}}
    content["pre_transforms"].insert(2, orientation)
    content["post_transforms"] = [
        {"name": "Activationsd", "args": {"keys": "model", "softmax": True}},
        {"name": "Invertd", "args": {"keys": "model", "orig_keys": "image", "nearest_interp": False}},
        {"name": "AsDiscreted", "args": {"keys": "model", "argmax": True}},
    ]
    manifest = find_package(str(put(tmp_path, content))).manifest
    assert isinstance(manifest, SegmentationManifest)
    assert (manifest.input.orientation, manifest.output.inverse) == ("RAS", "probability")


def _named(content: dict[str, Any], list_name: str, number: int, name: str, **arguments: Any) -> None:
    content[list_name][number] = {"name": name, "args": {"keys": "image", **arguments}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(type="annotation"), "type: 'annotation' asks a person for extreme points"),
        (lambda c: c.update(type="deepgrow"), "asks a person for clicks"),
        (lambda c: c.update(type="pipeline"), "chains other models"),
        (lambda c: c.update(type="classification"), "write a model.yaml"),
        (lambda c: c.update(type=3), "is not known"),
        (lambda c: c["inference"].update(image_format="NCHWD"), "Clara Train 3 or before"),
        (lambda c: c["inference"].update(name="TRTISInference"), "Clara Train 3 or before"),
        (lambda c: c["inference"].update(input=["t2", "adc"]), "one series is one input, not 2"),
        (lambda c: c["inference"]["AIAA"].update(name="lib.mine.CustomInference"), "'CustomInference' is code"),
        (lambda c: c["inference"]["AIAA"]["args"].update(hook="x"), "'hook' is not run"),
        (lambda c: c["inference"]["AIAA"]["args"].pop("scanning_window"), "resizes the image"),
        (
            lambda c: _named(c, "pre_transforms", 2, "lib.mine.Spacingd"),
            "pre_transforms#2: 'lib.mine.Spacingd' is other",
        ),
        (lambda c: _named(c, "pre_transforms", 2, "os.system"), "'os.system' is other code"),
        (lambda c: _named(c, "pre_transforms", 1, "RandFlipd"), "pre_transforms#1: RandFlipd"),
        (lambda c: _named(c, "pre_transforms", 2, "Spacingd", pixdim=["$__import__('os')", 1, 1]), "pre_transforms#2"),
        (lambda c: c["pre_transforms"].__delitem__(slice(2, 4)), "pre_transforms: has no Spacingd"),
        (lambda c: c["post_transforms"].pop(5), "post_transforms: expected an AsDiscreted and an Invertd"),
        (lambda c: c["post_transforms"].insert(0, c["post_transforms"].pop(5)), "Restored is run after AsDiscreted"),
        (lambda c: c.update(labels=[]), "labels: expected the name of every class"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_key(
    change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    content = copy.deepcopy(config())
    change(content)
    with pytest.raises(PackageError, match=says):
        describe_folder(put(tmp_path, content))


@pytest.mark.parametrize("name", ["model.trt.pb", "model.fzn.pb", "model.trt"])
def test_tensorflow_models_are_refused_by_name(name: str, tmp_path: Path) -> None:
    put(tmp_path, config())
    (tmp_path / "model.ts").rename(tmp_path / name)
    with pytest.raises(PackageError, match=f"{name} is a TensorFlow or TensorRT model"):
        describe_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(PackageError, match=r"no model; put model\.ts beside config_aiaa\.json"):
        describe_folder(tmp_path)
