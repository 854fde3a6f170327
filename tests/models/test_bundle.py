"""A MONAI bundle is read as data and gives what MONAI itself gives; what would have to be executed is refused."""

import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR, UNet
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, LoadImaged

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.errors import EngineError, NodeError, PackageError
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.formats import describe_folder
from dicom_node.models.formats.labels import label_output
from dicom_node.models.loaders import load_module
from dicom_node.models.registry import find_package
from dicom_node.models.report import package_report
from dicom_node.values import LabelVolume

NETWORK = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 2,
    "norm": "batch",
}
CHANNELS = {"0": "background", "1": "spleen", "2": "left thingummy"}


def metadata(**image: Any) -> dict[str, Any]:
    """The keys of the zoo's metadata.json that matter."""
    return {
        "version": "0.5.9",
        "name": "Spleen CT segmentation",
        "intended_use": "This is an example, not to be used for diagnostic purposes",
        "network_data_format": {
            "inputs": {"image": {"modality": "CT", "num_channels": 1, **image}},
            "outputs": {"pred": {"num_channels": 3, "channel_def": CHANNELS}},
        },
    }


def inference() -> dict[str, Any]:
    """The keys of the zoo's inference.json, with its Python that must not be executed."""
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "spacing": 3.0,
        "network_def": {"_target_": "UNet", **NETWORK},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "@image_key"},
                {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
                {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS", "labels": None},
                {
                    "_target_": "Spacingd",
                    "keys": "@image_key",
                    "pixdim": ["@spacing", "$@spacing * 1.0", "$(@spacing + 1) / 1"],
                    "mode": "bilinear",
                },
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "@image_key",
                    "a_min": -57,
                    "a_max": 164,
                    "b_min": 0,
                    "b_max": 1,
                    "clip": True,
                },
                {"_target_": "EnsureTyped", "keys": "@image_key"},
            ],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [32, 32, 32],
            "sw_batch_size": 4,
            "overlap": 0.5,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "@image_key",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$os.path.join(@bundle_root, 'eval')"},
            ],
        },
        "evaluator": {"_target_": "SupervisedEvaluator"},
        "initialize": ["$os.system('true')"],
    }


def put(folder: Path, config: Any = None, data: Any = None, *, yaml_text: str = "") -> Path:
    """Write a bundle with random weights."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text(json.dumps(data or metadata()))
    if yaml_text:
        (folder / "configs" / "inference.yaml").write_text(yaml_text)
    else:
        (folder / "configs" / "inference.json").write_text(json.dumps(config or inference()))
    torch.manual_seed(3)
    network = UNet(**NETWORK)
    with torch.no_grad():
        network(torch.randn(2, 1, 32, 32, 32))  # running statistics that are not 0 and 1
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def by_monai(bundle: Path, series: Path) -> Any:
    """(slice, row, column) labels, slices ascending along the patient's long axis."""
    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    network.eval()
    prepare = Compose(list(parser.get_parsed_content("preprocessing").transforms[1:]))
    loaded = LoadImaged("image", reader="PydicomReader")({"image": str(series)})
    data = prepare(loaded)
    with torch.inference_mode():
        data["pred"] = SlidingWindowInferer((32, 32, 32), 4, 0.5)(data["image"][None], network)[0]
    after = [
        Activationsd("pred", softmax=True),
        Invertd("pred", prepare, orig_keys="image", nearest_interp=False, to_tensor=True),
        AsDiscreted("pred", argmax=True),
    ]
    labels = np.asarray(Compose(after)(data)["pred"][0]).astype(np.uint8).transpose(2, 1, 0)
    return labels if np.asarray(loaded["image"].affine)[2, 2] > 0 else labels[::-1]


@pytest.mark.filterwarnings("ignore")
def test_a_bundle_folder_runs_unchanged_and_gives_the_labels_monai_gives(
    tmp_path: Path, task_for: Callable[..., Any]
) -> None:
    bundle, series = put(tmp_path / "bundle"), tmp_path / "series"
    write_ct_series(series, 5, shape=(40, 96, 96), spacing_mm=(4.5, 3.7, 3.7))
    engine = LocalModelEngine("zoo", EngineSettings(model=str(bundle), options={"threads": 1}), devices=("cpu",))
    try:
        result = engine.run(task_for(series.glob("*.dcm")), lambda: None)
    finally:
        engine.close()
    ours = next(value for value in result.values if isinstance(value, LabelVolume))
    stock = by_monai(bundle, series)
    assert len(np.unique(stock)) == 3  # random weights, but every class is somewhere
    assert (ours.labels == stock).mean() >= 0.99999
    assert [segment.label for segment in ours.segments] == ["Spleen", "left thingummy"]


def test_the_description_says_what_the_configuration_says(tmp_path: Path) -> None:
    described = describe_folder(put(tmp_path / "bundle"))
    manifest = described.manifest
    assert described.format == "monai_bundle"
    assert manifest["input"]["spacing_mm"] == [3.0, 3.0, 4.0]
    assert manifest["input"]["padding_hu"] == pytest.approx(-57)
    assert manifest["infer"] == {
        **{"window": [32, 32, 32], "overlap": 0.5, "blend": "constant", "edge": "constant", "pad_value": 0.0}
    }
    assert manifest["id"] == "Spleen-CT-segmentation"
    assert manifest["intended_use"]["status"] == "research"
    assert any("left thingummy" in note for note in described.notes)
    assert find_package(str(tmp_path / "bundle")).manifest.version == "0.5.9"


def test_the_report_on_a_bundle_tells_what_it_takes_and_that_its_network_runs(tmp_path: Path) -> None:
    report = package_report(str(put(tmp_path / "bundle")), "cpu")
    told = dict(report)
    assert told["format"] == "monai_bundle, its configuration read as data"
    assert told["tells"] == "1: Spleen, 2: left thingummy"
    assert "resampled to 3x3x4 mm" in told["takes"]
    assert told["self-test"].startswith("passed: 3 outputs, all finite (cpu")
    # 0.75 -> 3 mm, 0.75 -> 3 mm, 1.25 -> 4 mm: 129 x 129 x 94 voxels, steps of 16
    assert f"{8 * 8 * 5} windows" in told["time"]


def test_a_network_with_fewer_outputs_than_the_package_names_fails_its_self_test(tmp_path: Path) -> None:
    data = metadata()
    data["network_data_format"]["outputs"]["pred"]["channel_def"] = {**CHANNELS, "3": "liver"}
    with pytest.raises(NodeError, match="has 3 outputs, the package names 4"):
        package_report(str(put(tmp_path / "bundle", data=data)), "cpu")


def test_a_swin_unetr_bundle_of_an_older_monai_runs_without_its_image_size(tmp_path: Path) -> None:
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "feature_size": 12, "use_checkpoint": False}
    config = inference() | {"network_def": {"_target_": "SwinUNETR", "img_size": 96, **arguments}}
    config["inferer"] = config["inferer"] | {"roi_size": [64, 64, 64]}  # five halvings must leave more than one voxel
    bundle = put(tmp_path / "bundle", config)
    torch.manual_seed(5)
    torch.save({"state_dict": SwinUNETR(**arguments).state_dict()}, bundle / "models" / "model.pt")
    described = describe_folder(bundle)
    assert any("img_size" in note for note in described.notes)
    source = find_package(str(bundle)).manifest.source
    network = load_module(bundle / source.path, source.model_dump(mode="json"))
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 64, 64, 64)).shape == (1, 3, 64, 64, 64)


def test_a_yaml_configuration_is_read_too(tmp_path: Path) -> None:
    import yaml

    bundle = put(tmp_path / "bundle", yaml_text=yaml.safe_dump(inference()))
    assert describe_folder(bundle).manifest["input"]["spacing_mm"] == [3.0, 3.0, 4.0]


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """The configuration with another value at `path`."""
    config = inference()
    inner: Any = config
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = to
    return config


SPACING = ("preprocessing", "transforms", 3)
ATTACKS = {
    "a target that is no network": (changed("network_def", "_target_", to="os.mkdir"), "network_def#_target_"),
    "a network of the package's own code": (changed("network_def", "_target_", to="scripts.net.Net"), "scripts"),
    "a transform that calls": (changed(*SPACING, to={"_target_": "os.system", "command": "true"}), "os.system"),
    "a lambda": (changed(*SPACING, to={"_target_": "Lambdad", "func": "$lambda x: x"}), "read as data"),
    "an import": (changed(*SPACING, "pixdim", to="$__import__('os').system('touch HERE')"), "read as data"),
    "an attribute": (changed(*SPACING, "pixdim", to="$@spacing.__class__"), "read as data"),
    "a comprehension": (changed(*SPACING, "pixdim", to="$[x for x in range(3)]"), "read as data"),
    "a power that eats memory": (changed(*SPACING, "pixdim", to="$9**9**9**9"), "read as data"),
    "a text that grows": (changed(*SPACING, "pixdim", to="$'a' * 999999999"), "read as data"),
    "a division by zero": (changed(*SPACING, "pixdim", to="$1 / 0"), "divides by zero"),
    "a reference to itself": (changed("spacing", to="@spacing"), "circles"),
    "an expression that refers to itself": (changed("spacing", to="$@spacing + 1"), "circles"),
    "a macro that leaves the folder": (changed("spacing", to="%../../../etc/passwd#x"), "macro"),
    "deep nesting": (changed("spacing", to="$" + "(" * 5000 + "1" + ")" * 5000), "not understood"),
    "a reference to nothing": (changed("spacing", to="@nowhere#at#all"), "is not in the configuration"),
    "cubic sampling": (changed(*SPACING, "mode", to=3), "only bilinear"),
    "a scale before the spacing": (
        changed("preprocessing", "transforms", 3, to=inference()["preprocessing"]["transforms"][4]),
        "cannot be run exactly",
    ),
    "labels sampled back": (changed("postprocessing", "transforms", 1, "nearest_interp", to=True), "only false is run"),
    "another inferer": (changed("inferer", "_target_", to="SliceInferer"), "SlidingWindowInferer and"),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_what_would_be_executed_or_guessed_is_refused_by_its_key(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, why = ATTACKS[case]
    with pytest.raises(PackageError, match=why):
        describe_folder(put(tmp_path / "bundle", config))
    assert os.listdir(tmp_path) == ["bundle"]  # nothing ran


def test_yaml_tags_are_refused(tmp_path: Path) -> None:
    text = "network_def: !!python/object/apply:os.system ['touch HERE']\n"
    with pytest.raises(PackageError, match="not readable as plain yaml"):
        describe_folder(put(tmp_path / "bundle", yaml_text=text))


def test_a_folder_that_is_no_package_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no model package is recognised"):
        find_package(str(tmp_path))


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def runtimes() -> Iterator[None]:
    """Those of the engines here, kept from one to the next: the last engine of a process stops them."""
    engine = LocalModelEngine("kept", EngineSettings(model="demo-ct-abdomen"), devices=("cpu",))
    engine._runtimes()
    yield
    engine.close()


@pytest.mark.usefixtures("runtimes")
@pytest.mark.parametrize("content", ["pickle", "legacy", "torch", "nonsense"])
def test_weights_that_would_execute_are_refused_and_do_not(
    content: str, tmp_path: Path, task_for: Callable[..., Any]
) -> None:
    bundle, marker = put(tmp_path / "bundle"), tmp_path / "marker"
    weights = bundle / "models" / "model.pt"
    match content:
        case "pickle":
            weights.write_bytes(pickle.dumps({"model": _Evil(marker)}))
        case "legacy":
            torch.save({"model": _Evil(marker)}, weights, _use_new_zipfile_serialization=False)
        case "torch":
            torch.save({"model": _Evil(marker)}, weights)
        case _:
            weights.write_bytes(b"\x80\x02" + random.Random(6).randbytes(4096))
    series = tmp_path / "series"
    write_ct_series(series, 5, shape=(12, 32, 32), spacing_mm=(5.0, 8.0, 8.0))
    engine = LocalModelEngine("zoo", EngineSettings(model=str(bundle), timeout_s=60.0), devices=("cpu",))
    try:
        with pytest.raises(NodeError, match=r"model\.pt: (names posix\.system|is no|holds operations)") as caught:
            engine.run(task_for(series.glob("*.dcm")), lambda: None)
    finally:
        engine.close()
    assert isinstance(caught.value, PackageError | EngineError)
    assert not marker.exists()


def test_an_unknown_organ_keeps_its_name_in_a_private_scheme() -> None:
    label, private = label_output(7, "Odd Organ")
    assert private
    assert label["segment"]["type"][0] == "99DICOMNODE"
    assert label["segment"]["type"][2] == "Odd Organ"
