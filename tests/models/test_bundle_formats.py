"""What a bundle's configuration says, told as our manifest; what we cannot do exactly is refused by its key."""

import copy
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dicom_node.errors import PackageError
from dicom_node.models.archive import open_archive
from dicom_node.models.formats import Described, describe_folder
from dicom_node.models.grid import ModelGrid
from dicom_node.models.package import ModelPackage, package_of
from dicom_node.models.segment import volume_job

LOADED = {"_target_": "LoadImaged", "keys": "@image_key"}
ORIENTED = {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"}
SPACED = {"_target_": "Spacingd", "keys": "@image_key", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"}
RANGED = {
    "_target_": "ScaleIntensityRanged",
    **{"keys": "@image_key", "a_min": -100, "a_max": 300, "b_min": 0.0, "b_max": 1.0, "clip": True},
}
SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
HALF = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
INVERTED = {
    "_target_": "Invertd",
    **{"keys": "pred", "transform": "@preprocessing", "orig_keys": "@image_key", "nearest_interp": False},
}
NEAREST = INVERTED | {"nearest_interp": True, "to_tensor": True, "meta_key_postfix": "meta_dict"}
SAVED = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$os.path.join(@bundle_root, 'eval')"}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1]}


def bundle(before: list[Any] | None = None, after: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A configuration with the given transforms and top-level keys."""
    return {
        "imports": ["$import os"],
        "bundle_root": "$os.getcwd()",
        "image_key": "image",
        "network_def": {"_target_": "BasicUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": before or [LOADED, ORIENTED, SPACED, RANGED]},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32]},
        "postprocessing": {"_target_": "Compose", "transforms": after or [SOFTMAX, INVERTED, ARGMAX, SAVED]},
        **changes,
    }


def metadata(names: tuple[str, ...] = ("background", "spleen", "liver"), **changes: Any) -> dict[str, Any]:
    """The keys of metadata.json that matter."""
    return {
        "version": "1.0.0",
        "name": "A bundle",
        "monai_version": "1.3.0",
        "intended_use": "An example",
        "network_data_format": {
            "inputs": {"image": {"modality": "CT", "num_channels": 1}},
            "outputs": {"pred": {"channel_def": {str(n): name for n, name in enumerate(names)}}},
        },
        **changes,
    }


def magnetic(modality: str) -> dict[str, Any]:
    """Metadata of a bundle for another modality."""
    return metadata(
        network_data_format=metadata()["network_data_format"] | {"inputs": {"image": {"modality": modality}}}
    )


def put(folder: Path, config: Any = None, data: Any = None, *weights: str) -> Path:
    """Write a bundle whose weights are some bytes: what is told of it does not depend on them."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps(data or metadata()))
    (folder / "configs" / "inference.json").write_text(json.dumps(config or bundle()))
    for name in weights or ("models/model.pt",):
        (folder / name).write_bytes(name.encode())
    return folder


def described(folder: Path) -> tuple[Described, ModelPackage]:
    """What the folder holds; the manifest is one that the schema takes."""
    found = describe_folder(folder)
    return found, package_of(folder, folder, found.manifest)


def manifest_of(tmp_path: Path, config: Any = None, data: Any = None) -> dict[str, Any]:
    """The manifest of a bundle with this configuration."""
    found, _ = described(put(tmp_path / "bundle", config, data))
    return copy.deepcopy(dict(found.manifest))


# --- the zoo's whole body model --------------------------------------------------------------------------------------

SIDES = ("left", "right")
WHOLE_BODY = (
    *("background", "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta"),
    *("inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left"),
    *("lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right"),
    "lung_lower_lobe_right",
    *(f"vertebrae_L{n}" for n in range(5, 0, -1)),
    *(f"vertebrae_T{n}" for n in range(12, 0, -1)),
    *(f"vertebrae_C{n}" for n in range(7, 0, -1)),
    *("esophagus", "trachea", "heart_myocardium", "heart_atrium_left", "heart_ventricle_left", "heart_atrium_right"),
    *("heart_ventricle_right", "pulmonary_artery", "brain", "iliac_artery_left", "iliac_artery_right"),
    *("iliac_vena_left", "iliac_vena_right", "small_bowel", "duodenum", "colon"),
    *(f"rib_{side}_{n}" for side in SIDES for n in range(1, 13)),
    *(f"{bone}_{side}" for bone in ("humerus", "scapula", "clavicula", "femur", "hip") for side in SIDES),
    *("sacrum", "face"),
    *(f"gluteus_{size}_{side}" for size in ("maximus", "medius", "minimus") for side in SIDES),
    *(f"{muscle}_{side}" for muscle in ("autochthon", "iliopsoas") for side in SIDES),
    "urinary_bladder",
)


def whole_body(*, highres: bool = True) -> dict[str, Any]:
    """The keys of the zoo's wholeBody_ct_segmentation, with a smaller network."""
    device = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
    return bundle(
        [
            LOADED,
            {"_target_": "EnsureTyped", "keys": "@image_key"},
            {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
            ORIENTED,
            {"_target_": "Spacingd", "keys": "@image_key", "pixdim": "@pixdim", "mode": "bilinear"},
            {"_target_": "NormalizeIntensityd", "keys": "@image_key", "nonzero": True},
            {"_target_": "ScaleIntensityd", "keys": "@image_key", "minv": -1.0, "maxv": 1.0},
        ],
        [SOFTMAX, ARGMAX, NEAREST, SAVED | {"output_dtype": "@output_dtype"}],
        displayable_configs={"highres": highres, "sw_overlap": 0.25, "sw_batch_size": 1},
        output_dtype="$numpy.float32",
        device=device,
        pixdim="$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        modelname="$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
        network_def={
            "_target_": "SegResNet",
            **{"spatial_dims": 3, "in_channels": 1, "out_channels": 105, "init_filters": 8, "dropout_prob": 0.2},
            **{"blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]},
        },
        inferer={
            "_target_": "SlidingWindowInferer",
            "roi_size": [96, 96, 96],
            "sw_batch_size": "@displayable_configs#sw_batch_size",
            "overlap": "@displayable_configs#sw_overlap",
            **{"padding_mode": "replicate", "mode": "gaussian", "device": device},
        },
        checkpointloader={
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/' + @modelname",
            "load_dict": {"model": "@network"},
        },
        initialize=["$setattr(torch.backends.cudnn, 'benchmark', True)", "$@checkpointloader(@evaluator)"],
    )


def test_the_whole_body_configuration_of_the_zoo_is_read_unchanged(tmp_path: Path) -> None:
    folder = put(tmp_path / "b", whole_body(), metadata(WHOLE_BODY), "models/model.pt", "models/model_lowres.pt")
    found, package = described(folder)
    manifest = found.manifest
    assert manifest["source"]["path"] == "models/model.pt"
    assert manifest["source"]["network"]["args"]["blocks_down"] == [1, 2, 2, 4]
    assert manifest["input"] == {
        "orientation": "RAS",
        "spacing_mm": [1.5, 1.5, 1.5],
        "values": "hu",
        "intensity": [{"normalize": {"nonzero": True}}, {"minmax": {"to": [-1.0, 1.0]}}],
    }
    assert manifest["infer"] == {"window": [96] * 3, "overlap": 0.25, "blend": "gaussian", "edge": "replicate"}
    output = manifest["output"]
    assert (output["activation"], output["decide"], output["inverse"]) == ("softmax", "argmax", "labels")
    assert [label["index"] for label in output["labels"]] == list(range(1, 105))
    assert package.manifest.trust == "data"


def test_its_other_resolution_takes_the_other_weights(tmp_path: Path) -> None:
    names = ("models/model.pt", "models/model_lowres.pt")
    found, _ = described(put(tmp_path / "bundle", whole_body(highres=False), metadata(WHOLE_BODY), *names))
    assert found.manifest["source"]["path"] == "models/model_lowres.pt"
    assert found.manifest["input"]["spacing_mm"] == [3.0, 3.0, 3.0]
    with pytest.raises(PackageError, match=r"put them at models/model_lowres\.pt"):
        describe_folder(put(tmp_path / "other", whole_body(highres=False), metadata(WHOLE_BODY)))


# --- intensities, crop -----------------------------------------------------------------------------------------------


def intensity(*steps: dict[str, Any]) -> dict[str, Any]:
    """A configuration with these transforms after the resampling."""
    return bundle([LOADED, ORIENTED, SPACED, *({"keys": "@image_key", **step} for step in steps)])


NORMALIZED = {"_target_": "NormalizeIntensityd"}
INTENSITIES: dict[str, tuple[dict[str, Any], Any]] = {
    "a range that clips": (RANGED, {"clip": [-100.0, 300.0], "to": [0.0, 1.0]}),
    "a range that does not": (
        RANGED | {"clip": False},
        [{"range": {"from": [-100.0, 300.0], "to": [0.0, 1.0], "clip": False}}],
    ),
    "a range turned round": (
        RANGED | {"a_min": 300, "a_max": -100},
        [{"range": {"from": [300.0, -100.0], "to": [0.0, 1.0], "clip": True}}],
    ),
    "a range to nowhere in particular": (
        {"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 1000},
        [{"range": {"from": [0.0, 1000.0], "to": [0.0, 1.0], "clip": False}}],
    ),
    "its own mean": (NORMALIZED, [{"normalize": {"nonzero": False}}]),
    "given figures": (
        NORMALIZED | {"subtrahend": [12.5], "divisor": 80, "channel_wise": True, "dtype": "$np.float32"},
        [{"normalize": {"nonzero": False, "mean": 12.5, "std": 80.0}}],
    ),
    "yes as a text": (NORMALIZED | {"nonzero": "True", "channel_wise": "True"}, [{"normalize": {"nonzero": True}}]),
    "its own extremes": ({"_target_": "monai.transforms.ScaleIntensityD"}, [{"minmax": {"to": [0.0, 1.0]}}]),
    "a factor": (
        {"_target_": "ScaleIntensityd", "minv": None, "maxv": None, "factor": 0.5},
        [{"range": {"from": [0.0, 1.0], "to": [0.0, 1.5], "clip": False}}],
    ),
}


@pytest.mark.parametrize("case", INTENSITIES)
def test_an_intensity_transform_becomes_its_step(case: str, tmp_path: Path) -> None:
    step, expected = INTENSITIES[case]
    assert manifest_of(tmp_path, intensity(step))["input"]["intensity"] == expected


def test_a_network_without_intensity_transforms_sees_hounsfield_units(tmp_path: Path) -> None:
    assert manifest_of(tmp_path, intensity())["input"]["intensity"] == []


def test_steps_keep_their_order_and_those_of_other_keys_or_switched_off_are_none(tmp_path: Path) -> None:
    config = intensity(
        {"_target_": "ScaleIntensityd"},
        NORMALIZED | {"keys": "label"},
        NORMALIZED | {"_disabled_": True},
        NORMALIZED | {"_disabled_": "$not @normalized"},
        NORMALIZED | {"divisor": 2},
    ) | {"normalized": False}
    steps = manifest_of(tmp_path, config)["input"]["intensity"]
    assert steps == [{"minmax": {"to": [0.0, 1.0]}}, {"normalize": {"nonzero": False, "std": 2.0}}]


CROPPED = {"_target_": "CropForegroundd", "source_key": "@image_key"}


def test_a_crop_is_told_by_its_threshold_and_margin(tmp_path: Path) -> None:
    assert manifest_of(tmp_path, intensity(CROPPED))["input"]["crop"] == {"above": 0.0, "margin": 0}
    step = CROPPED | {"select_fn": "$lambda x: x > -@limit", "margin": [4, 4, 4], "allow_smaller": True}
    config = intensity(RANGED, step) | {"limit": 500}
    found, _ = described(put(tmp_path / "other", config))
    assert found.manifest["input"]["crop"] == {"above": -500.0, "margin": 4}


def test_a_crop_with_a_margin_needs_to_say_whether_it_leaves_the_image(tmp_path: Path) -> None:
    config = intensity(CROPPED | {"margin": 3})
    assert manifest_of(tmp_path, config)["input"]["crop"]["margin"] == 3  # MONAI 1.3: inside
    with pytest.raises(PackageError, match="no voxels are made up"):
        describe_folder(put(tmp_path / "newer", config, metadata(monai_version="1.5.0")))
    with pytest.raises(PackageError, match="no voxels are made up"):
        describe_folder(put(tmp_path / "odd", config, metadata(monai_version="rc")))


# --- windows, outputs ------------------------------------------------------------------------------------------------


def inferer(**arguments: Any) -> dict[str, Any]:
    """A configuration with another inferer."""
    return bundle(inferer={"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], **arguments})


def test_windows_are_told_with_what_fills_them_up(tmp_path: Path) -> None:
    plain = {"window": [32] * 3, "overlap": 0.25, "blend": "constant", "edge": "constant", "pad_value": 0.0}
    cases = {
        "plain": (inferer(), plain),
        "filled": (inferer(cval=-1, overlap=[0.5] * 3), plain | {"pad_value": -1.0, "overlap": 0.5}),
        "one size": (inferer(roi_size="$16 * 4", progress=True, sw_device="@device"), plain | {"window": [64] * 3}),
        "whole": (inferer(_target_="monai.inferers.SimpleInferer"), {"window": None}),
    }
    for name, (config, expected) in cases.items():
        found, _ = described(put(tmp_path / name, config))
        assert found.manifest["infer"] == expected


def test_one_output_is_decided_by_a_threshold(tmp_path: Path) -> None:
    cases = {
        "back, then decided": ([SIGMOID, INVERTED, HALF], "probability", ("odd spot",)),
        "decided, then back": ([SIGMOID, HALF, NEAREST], "labels", ("background", "odd spot")),
        "as it was spelled once": (
            [SIGMOID, INVERTED, HALF | {"threshold": None, "threshold_values": True}],
            "probability",
            ("background", "odd spot"),
        ),
    }
    for name, (after, inverse, names) in cases.items():
        output = described(put(tmp_path / name, bundle(after=after), metadata(names)))[0].manifest["output"]
        assert (output["activation"], output["decide"], output["inverse"]) == ("sigmoid", 0.5, inverse)
        assert [(label["index"], label["segment"]["type"][2]) for label in output["labels"]] == [(1, "odd spot")]


def test_logits_may_be_decided_without_softmax(tmp_path: Path) -> None:
    output = manifest_of(tmp_path, bundle(after=[INVERTED, ARGMAX]))["output"]
    assert (output["activation"], output["decide"], output["inverse"]) == ("none", "argmax", "probability")


@pytest.mark.parametrize("after", [[ARGMAX, LARGEST, NEAREST], [SOFTMAX, INVERTED, ARGMAX, LARGEST]])
def test_the_largest_piece_is_kept_of_the_labels_that_say_so(after: list[Any], tmp_path: Path) -> None:
    found, _ = described(put(tmp_path / "some", bundle(after=after)))
    assert [label.get("keep", "all") for label in found.manifest["output"]["labels"]] == ["largest_component", "all"]
    assert any("largest piece" in note for note in found.notes)
    every = [step | {"applied_labels": None} if step is LARGEST else step for step in after]
    labels = described(put(tmp_path / "every", bundle(after=every)))[0].manifest["output"]["labels"]
    assert [label["keep"] for label in labels] == ["largest_component"] * 2


@pytest.mark.parametrize(
    ("given", "connectivity", "shared"),
    [
        ({}, 3, "a face, an edge or a corner;"),
        ({"connectivity": None}, 3, "a face, an edge or a corner;"),
        ({"connectivity": 3}, 3, "a face, an edge or a corner;"),
        ({"connectivity": 2}, 2, "a face or an edge;"),
        ({"connectivity": 1}, 1, "a face;"),
    ],
)
def test_what_makes_a_piece_is_what_monai_takes_and_is_told(
    given: dict[str, Any], connectivity: int, shared: str, tmp_path: Path
) -> None:
    for name, after, late in (
        ("on the network's grid", [ARGMAX, LARGEST | given, NEAREST], False),
        ("after", [SOFTMAX, INVERTED, ARGMAX, LARGEST | given], True),
        ("at the end", [ARGMAX, NEAREST, LARGEST | given], True),
    ):
        found, package = described(put(tmp_path / name, bundle(after=after)))
        assert [label.connectivity for label in package.manifest.output.labels] == [connectivity, 1]
        (note,) = [note for note in found.notes if "largest piece" in note]
        assert shared in note and ("MONAI does that on the grid of the images" in note) is late
        job = volume_job(package.manifest, ModelGrid.same((4, 4, 4), (1.0,) * 3))
        assert [label["connectivity"] for label in job["output"]["labels"]] == [connectivity, 1]


def test_pieces_of_one_label_are_its_own_however_that_is_spelled(tmp_path: Path) -> None:
    as_one = {"independent": False}
    for n, more in enumerate([as_one, as_one | {"applied_labels": 1}, {"is_onehot": False}]):
        labels = manifest_of(tmp_path / str(n), largest(**more))["output"]["labels"]
        assert [label.get("keep") for label in labels] == ["largest_component", None]


def test_a_magnetic_resonance_bundle_takes_series_of_its_modality_and_their_own_values(tmp_path: Path) -> None:
    found, package = described(put(tmp_path / "mr", intensity({"_target_": "ScaleIntensityd"}), magnetic("MR")))
    assert found.manifest["select"]["modality"] == ["MR"]
    assert package.manifest.select.sop_class == ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")
    assert found.manifest["input"]["values"] == "any"
    with pytest.raises(PackageError, match="'US' series are not analysed"):
        describe_folder(put(tmp_path / "us", None, magnetic("US")))


def test_transforms_may_stand_under_their_other_names(tmp_path: Path) -> None:
    config = bundle(after=[SOFTMAX, INVERTED | {"transform": "@pre_transforms"}, ARGMAX])
    config |= {"pre_transforms": config.pop("preprocessing"), "post_transforms": config.pop("postprocessing")}
    assert manifest_of(tmp_path, config)["input"]["spacing_mm"] == [1.5, 1.5, 2.0]


# --- which file holds the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "path", "form", "trust"),
    [
        (("models/model.pt", "models/model.ts"), "models/model.pt", "state_dict", "data"),
        (("models/model.safetensors", "models/model.ts"), "models/model.safetensors", "state_dict", "data"),
        (("models/model.ts", "models/model.onnx"), "models/model.ts", "torchscript", "graph"),
        (("models/model.pt2",), "models/model.pt2", "pt2", "graph"),
        (("models/model.onnx",), "models/model.onnx", "onnx", "graph"),
    ],
)
def test_data_is_preferred_to_a_graph_and_a_graph_says_so(
    there: tuple[str, ...], path: str, form: str, trust: str, tmp_path: Path
) -> None:
    found, package = described(put(tmp_path / "bundle", None, None, *there))
    source = found.manifest["source"]
    assert (source["path"], source["format"], package.manifest.trust) == (path, form, trust)
    assert ("network" in source) is (form == "state_dict")
    assert any("exported" in note for note in found.notes) is (form != "state_dict")


def test_a_network_of_its_own_code_runs_as_what_was_exported_of_it(tmp_path: Path) -> None:
    config = bundle(network_def={"_target_": "scripts.networks.Mine", "device": "$torch.device('cpu')"})
    with pytest.raises(PackageError, match=r"scripts.*exported to models/model\.ts"):
        describe_folder(put(tmp_path / "code", config))
    found, _ = described(put(tmp_path / "graph", config, None, "models/model.ts"))
    assert found.manifest["source"]["format"] == "torchscript"


def script(path: Path, **extra: Any) -> Path:
    """A TorchScript file with `extra` json files inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.script(torch.nn.Conv3d(1, 3, 1).eval())
        files = {f"{name}.json": json.dumps(content).encode() for name, content in extra.items()}
        torch.jit.save(traced, str(path), _extra_files=files)
    return path


def test_a_torchscript_file_that_is_called_a_checkpoint_is_one_all_the_same(tmp_path: Path) -> None:
    folder = put(tmp_path / "bundle")
    script(folder / "models" / "model.pt")
    found, package = described(folder)
    assert found.manifest["source"]["format"] == "torchscript"
    assert package.manifest.trust == "graph"


def test_one_torchscript_file_with_its_configuration_inside_is_a_package(tmp_path: Path) -> None:
    path = script(tmp_path / "one" / "organs.ts", metadata=metadata(name=""), inference=bundle())
    found, package = described(path.parent)
    assert found.files == ("organs.ts",)
    assert package.weights_path == path
    assert (package.manifest.id, package.manifest.trust) == ("organs", "graph")
    assert found.manifest["input"]["spacing_mm"] == [1.5, 1.5, 2.0]
    package.check_weights()
    evil = script(tmp_path / "evil" / "a.ts", metadata=metadata(), inference=bundle(inferer="$os.system('true')"))
    with pytest.raises(PackageError, match=r"a\.ts/extra/inference\.json: inferer"):
        describe_folder(evil.parent)
    with pytest.raises(PackageError, match="no model package is recognised"):
        describe_folder(script(tmp_path / "half" / "a.ts", metadata=metadata()).parent)


def test_a_zipped_bundle_is_told_like_the_folder(tmp_path: Path) -> None:
    folder = put(tmp_path / "bundle")
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as file:
        for part in folder.rglob("*"):
            file.write(part, Path("bundle", part.relative_to(folder)))
    assert described(open_archive(path, tmp_path))[0] == described(folder)[0]


def loading(load_path: str, **changes: Any) -> dict[str, Any]:
    """A configuration that loads its weights from there."""
    return bundle(handlers=[{"_target_": "CheckpointLoader", "load_path": load_path}], **changes)


def test_the_weights_are_those_the_configuration_loads(tmp_path: Path) -> None:
    both = ("models/model.pt", "models/best.pt")
    cases = {
        "a sum of texts": loading("$@bundle_root + '/models/best.pt'"),
        "through a key": loading("@ckpt", ckpt="$@bundle_root + '/models/' + @name + '.pt'", name="best"),
        "on another machine": loading("/workspace/run7/models/best.pt"),
    }
    for name, config in cases.items():
        found, _ = described(put(tmp_path / name, config, None, *both))
        assert found.manifest["source"]["path"] == "models/best.pt"
    python = loading("$os.path.join(@bundle_root, 'models', 'best.pt')")
    with pytest.raises(PackageError, match=r"which of best\.pt, model\.pt is meant"):
        describe_folder(put(tmp_path / "python", python, None, *both))
    found, _ = described(put(tmp_path / "only", python))
    assert any("takes Python to work out" in note for note in found.notes)
    with pytest.raises(PackageError, match="must be a file inside the bundle"):
        describe_folder(put(tmp_path / "outside", loading("$@bundle_root + '/../../secret.pt'")))


def test_of_a_checkpoint_that_holds_several_networks_the_one_the_configuration_loads_is_taken(tmp_path: Path) -> None:
    config = loading("$@bundle_root + '/models/model.pt'")
    config["handlers"][0]["load_dict"] = {"averaged": "@network", "optimizer": "@optimizer"}
    weights = {"model": {"a": torch.zeros(2)}, "averaged": {"a": torch.ones(2)}}
    for name, content, key in (("several", weights, "averaged"), ("plain", weights["model"], None)):
        folder = put(tmp_path / name, config)
        torch.save(content, folder / "models" / "model.pt")
        assert described(folder)[0].manifest["source"].get("key") == key


# --- what is refused -------------------------------------------------------------------------------------------------


def first(*steps: Any) -> dict[str, Any]:
    """A configuration with exactly these transforms before."""
    return bundle(list(steps))


def last(*steps: Any) -> dict[str, Any]:
    """A configuration with exactly these transforms after."""
    return bundle(after=list(steps))


def largest(**arguments: Any) -> dict[str, Any]:
    """A configuration that keeps the largest pieces with these arguments."""
    return last(ARGMAX, LARGEST | arguments, NEAREST)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a scale before the spacing": (first(LOADED, ORIENTED, RANGED, SPACED), "ScaleIntensityRanged: .* order"),
    "a spacing before the orientation": (first(LOADED, SPACED, ORIENTED, RANGED), "Orientationd: .* order"),
    "a crop before the intensities": (intensity(CROPPED, RANGED), "ScaleIntensityRanged: .* order"),
    "no orientation": (first(LOADED, SPACED, RANGED), "no Orientationd"),
    "no spacing": (first(LOADED, ORIENTED), "no Spacingd"),
    "two images": (first(LOADED | {"keys": ["image", "pet"]}, ORIENTED, SPACED), "loads several images"),
    "other padding of the resampling": (
        first(LOADED, ORIENTED, SPACED | {"padding_mode": "zeros"}, RANGED),
        "padding_mode: only border",
    ),
    "aligned corners": (first(LOADED, ORIENTED, SPACED | {"align_corners": True}), "align_corners: Spacingd is not"),
    "an argument nobody knows": (intensity(NORMALIZED | {"power": 2}), "power: NormalizeIntensityd is not run"),
    "percentiles": (
        intensity({"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99}),
        "ScaleIntensityRangePercentilesd",
    ),
    "an image made of bytes": (
        intensity({"_target_": "CastToTyped", "dtype": "$np.uint8"}),
        "dtype: the image would be rounded",
    ),
    "a range of nothing": (intensity(RANGED | {"a_max": -100}), "must differ"),
    "a clip without bounds": (
        intensity({"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 1, "clip": True}),
        "b_min: expected a number",
    ),
    "no as a text, which MONAI takes for yes": (intensity(NORMALIZED | {"nonzero": "False"}), "expected true or false"),
    "a divisor of nothing": (intensity(NORMALIZED | {"divisor": 0}), "divisor must be positive"),
    "a crop by a call": (
        intensity(CROPPED | {"select_fn": "$lambda x: x > __import__('os').getpid()"}),
        "read as data",
    ),
    "a crop by more than a threshold": (intensity(CROPPED | {"select_fn": "$lambda x: x > 0 > -x"}), "x > number"),
    "a crop by another name": (intensity(CROPPED | {"select_fn": "$lambda x, y=1: x > 0"}), "x > number"),
    "a crop by a default that calls": (intensity(CROPPED | {"select_fn": "$lambda x=print(): x > 0"}), "x > number"),
    "a crop by something else": (intensity(CROPPED | {"select_fn": "scripts.foreground"}), "x > number"),
    "a crop by another image": (intensity(CROPPED | {"source_key": "label"}), "only the image itself"),
    "a crop to a multiple": (intensity(CROPPED | {"k_divisible": 8}), "k_divisible"),
    "windows as large as the volume": (inferer(roi_size=[96, 96, -1]), "expected three positive sizes"),
    "windows of two dimensions": (inferer(roi_size=[96, 96]), "expected three positive sizes"),
    "another edge": (inferer(padding_mode="reflect"), "only constant and replicate"),
    "windows that know where they are": (inferer(with_coord=True), "with_coord"),
    "an overlap that differs": (inferer(overlap=[0.5, 0.5, 0.25]), "the same for every axis"),
    "slices": (inferer(_target_="SliceInferer"), "'SliceInferer' is not run"),
    "labels interpolated": (last(ARGMAX, INVERTED), "as if they were amounts"),
    "probabilities by the nearest": (last(SOFTMAX, NEAREST, ARGMAX), "only false is run"),
    "nothing inverted": (last(SOFTMAX, ARGMAX), "expected an AsDiscreted and an Invertd, got activation, decide"),
    "nothing decided": (last(SOFTMAX, INVERTED), "got activation, invert"),
    "twice softmax": (last(SOFTMAX, SOFTMAX, INVERTED, ARGMAX), "cannot be run exactly"),
    "twice inverted": (last(SOFTMAX, INVERTED, INVERTED, ARGMAX), "is there twice"),
    "overlapping classes": (last(SIGMOID, INVERTED, ARGMAX), "argmax .after softmax"),
    "one hot": (last(SOFTMAX, INVERTED, ARGMAX | {"to_onehot": 3}), "to_onehot: AsDiscreted is not run"),
    "another transform inverted": (
        last(SOFTMAX, INVERTED | {"transform": "@inferer"}, ARGMAX),
        "only '@preprocessing'",
    ),
    "several pieces": (largest(num_components=2), "num_components: .*: is run with one piece of each"),
    "a channel for each label": (largest(is_onehot=True), "is_onehot: .*: is run on the numbers"),
    "labels as one": (largest(independent=False, applied_labels=[1, 2]), "independent: .*: is run for each label"),
    "all labels as one": (largest(independent=False, applied_labels=None), "independent: .*: is run for each label"),
    "a connectivity of nothing": (largest(connectivity=0), "connectivity: .*: expected 1, 2 or 3"),
    "a connectivity of four dimensions": (largest(connectivity=4), "connectivity: .*: expected 1, 2 or 3"),
    "a connectivity by yes": (largest(connectivity=True), "connectivity: .*: expected 1, 2 or 3"),
    "pieces of labels by name": (largest(applied_labels="1"), "applied_labels: .*: expected the numbers"),
    "another argument of pieces": (largest(min_size=3), "min_size: KeepLargestConnectedComponentd is not run"),
    "holes filled": (last(SOFTMAX, INVERTED, ARGMAX, {"_target_": "FillHolesd", "keys": "pred"}), "FillHolesd"),
    "the piece of a label nobody names": (last(ARGMAX, LARGEST | {"applied_labels": [9]}, NEAREST), "every label"),
    "a threshold for three classes": (last(SIGMOID, INVERTED, HALF), "does not go with how they are decided"),
    "two channels": (bundle(network_def={"_target_": "UNet", "in_channels": 2}), "one series is one channel"),
    "a network of slices": (bundle(network_def={"_target_": "UNet", "spatial_dims": 2}), "networks of volumes"),
    "a network not built": (bundle(network_def={"_target_": "UNet", "_mode_": "partial"}), "network itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_exactly_is_refused_by_its_key(case: str, tmp_path: Path) -> None:
    config, why = REFUSED[case]
    with pytest.raises(PackageError, match=why):
        describe_folder(put(tmp_path / "bundle", config))


def test_the_spellings_of_another_zoo_bundle_are_read(tmp_path: Path) -> None:
    before = [
        LOADED | {"reader": "ITKReader"},
        ORIENTED | {"keys": ["@image_key"]},
        SPACED | {"keys": ["@image_key"], "mode": ["bilinear"]},
        RANGED,
        CROPPED | {"keys": ["@image_key"], "mode": ["minimum"]},
        {"_target_": "CastToTyped", "keys": "@image_key", "dtype": "$torch.float32"},
    ]
    network = {"_target_": "monai.networks.nets.DynUNet", "spatial_dims": "$len(@spatial_size)", "in_channels": 1}
    config = bundle(before, network_def=network, spatial_size=[96, 96, 96])
    manifest = manifest_of(tmp_path, config)
    assert manifest["source"]["network"]["args"]["spatial_dims"] == 3
    assert manifest["input"]["crop"] == {"above": 0.0, "margin": 0}


@pytest.mark.parametrize("index", ["9" * 5000, "-1", "1.0", "256", "\u0661", "one"])
def test_a_class_that_is_no_number_of_a_label_is_refused(index: str, tmp_path: Path) -> None:
    data = metadata()
    data["network_data_format"]["outputs"]["pred"]["channel_def"][index] = "organ"
    with pytest.raises(PackageError, match="is no class from 0 to 255"):
        describe_folder(put(tmp_path / "bundle", None, data))
