"""Models of NVIDIA's AIAA server (Clara Train 4: config_aiaa.json and model.ts) as our manifest.

The configuration is read as data; its transforms are MONAI's, so each is taken exactly where one of a bundle would be,
and refused by name elsewhere. Interactive models (annotation, deepgrow), pipelines, the package's own code and the
TensorFlow models of Clara Train 3 are refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.archive import is_torchscript
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.formats.bundle_config import Config, read_mapping
from dicom_node.models.formats.bundle_steps import Decision, infer_block, input_block, output_decision
from dicom_node.models.formats.labels import label_output, shown
from dicom_node.models.source import NETWORKS, TRUST

__all__ = ["describe", "detect"]

_CONFIGS = ("config_aiaa.json", "config/config_aiaa.json")  # beside its model, or in a Medical Model Archive
_MODELS = ("model.ts", "models/model.ts", "model.pt", "models/model.pt")
_TENSORFLOW = (".pb", ".trt", ".plan", ".uff")
_OLD_KEYS = ("image_format", "node_mapping", "trtis", "tf")  # of Clara Train 3 and before

_REFUSED_TYPES: Mapping[str, str] = {
    "annotation": "asks a person for extreme points (DExtr3D); nobody is there to click when a study arrives",
    "deepgrow": "asks a person for clicks (DeepGrow); nobody is there to click when a study arrives",
    "classification": "prepares and names pictures in code of its own; write a model.yaml for the network",
    "pipeline": "chains other models in code of its own",
    "others": "says nothing of what its answer means",
}
# between arrays of one kind and another, or told to AIAA's clients only
_SHAPES = {"AddChanneld", "SqueezeDimd", "ToNumpyd", "CopyItemsd", "AsChannelFirstd", "EnsureChannelFirstd"}
_FOR_CLIENTS = {"ExtremePointsd", "BoundingBoxd"}
_ARGUMENTS = {
    *("scanning_window", "sw", "roi", "roi_size", "batch_size", "sw_batch_size", "overlap", "mode", "padding_mode"),
    *("device", "network", "is_batched_data"),
}


def detect(folder: Path) -> bool:
    """Whether `folder` holds a config_aiaa.json."""
    return any((folder / name).is_file() for name in _CONFIGS)


def describe(folder: Path) -> Described:
    """The model as our manifest. Raises PackageError that names the key that cannot be run, and why."""
    name = next(name for name in _CONFIGS if (folder / name).is_file())
    path = folder / name
    content = read_mapping(path)
    _check_kind(path, content)
    arguments = _inference_arguments(path, content)
    notes: list[str] = []
    config = _config(path, content, arguments, notes)
    source = _source(folder, path, arguments)
    decision = output_decision(config, notes)
    modality = _modality(content, notes)
    manifest = {
        "schema": 1,
        "id": _slug("-".join(["aiaa", *map(str, content.get("labels") or ())])),
        "version": _slug(str(content.get("version") or "0")),
        "manufacturer": "AIAA",
        "task": "segmentation",
        "trust": TRUST[source["format"]],
        "source": source,
        "intended_use": {"status": "research", "text": f"Research use only. {_line(content.get('description'))}"[:200]},
        "select": {"modality": [modality], "sop_class": [f"{modality}ImageStorage", f"Enhanced{modality}ImageStorage"]},
        "input": _input(config, modality, notes),
        "infer": infer_block(config),
        "output": {
            "activation": decision.activation,
            "decide": decision.decide,
            "inverse": decision.inverse,
            "labels": _labels(path, content, decision, notes),
        },
    }
    if content.get("writer"):
        notes.append("the writer is left out: results are DICOM objects")
    return Described(format="aiaa", manifest=manifest, files=(name, source["path"]), notes=tuple(notes))


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
    return kept.strip("-.")[:64] or "aiaa"


def _line(value: Any) -> str:
    return shown(str(value or ""))


def _check_kind(path: Path, content: Mapping[str, Any]) -> None:
    """Raise PackageError for what is no segmentation of Clara Train 4."""
    inference = content.get("inference")
    if not isinstance(inference, Mapping):
        raise PackageError(f"{path}: inference: is required")
    old = [key for key in _OLD_KEYS if key in inference]
    if old or "name" in inference:
        raise PackageError(
            f"{path}: inference.{(old or ['name'])[0]}: is a configuration of Clara Train 3 or before (TensorFlow); "
            "only PyTorch models of Clara Train 4 are run"
        )
    kind = str(content.get("type"))
    if kind != "segmentation":
        why = _REFUSED_TYPES.get(kind, "is not known")
        raise PackageError(f"{path}: type: {kind[:40]!r} {why}; segmentation is run")
    inputs = inference.get("input", "image")
    if isinstance(inputs, list) and len(inputs) != 1:
        raise PackageError(f"{path}: inference.input: one series is one input, not {len(inputs)}")


def _inference_arguments(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the built-in inference, of AIAA's own or Triton's."""
    inference = content["inference"]
    for backend, known in (("AIAA", "PyTorchInference"), ("TRITON", "TritonInference")):
        found = inference.get(backend)
        if isinstance(found, Mapping):
            name = str(found.get("name")).rsplit(".", 1)[-1]
            if name != known:
                raise PackageError(f"{path}: inference.{backend}.name: {name[:60]!r} is code of the package; not run")
            arguments = found.get("args") or {}
            if not isinstance(arguments, Mapping) or arguments.keys() - _ARGUMENTS:
                unknown = sorted(map(str, arguments.keys() - _ARGUMENTS))[:1] if isinstance(arguments, Mapping) else []
                raise PackageError(
                    f"{path}: inference.{backend}.args: {(unknown or ['expected keys'])[0]!r} is not run"
                )
            return arguments
    raise PackageError(f"{path}: inference: expected AIAA or TRITON")


# --- transforms, as a bundle would have them -------------------------------------------------------------------------


class _Renamed(Config):
    """A bundle's configuration made of AIAA's: errors name the keys that stand in the file."""

    shift = 0

    def refuse(self, key: str, why: str) -> PackageError:
        """The error for `key`."""
        place = re.sub(r"^preprocessing#transforms#(\d+)", lambda m: f"pre_transforms#{int(m[1]) - self.shift}", key)
        place = place.replace("preprocessing#transforms", "pre_transforms").replace("preprocessing", "pre_transforms")
        place = place.replace("postprocessing#transforms", "post_transforms")
        return super().refuse(place.replace("postprocessing", "post_transforms").replace("inferer", "inference"), why)


def _config(path: Path, content: Mapping[str, Any], arguments: Mapping[str, Any], notes: list[str]) -> Config:
    inference = content["inference"]
    image, answer = _only(inference.get("input", "image")), _only(inference.get("output", "model"))
    before = [_item(path, "pre_transforms", n, raw) for n, raw in enumerate(_listed(path, content, "pre_transforms"))]
    names = [_short(item) for item in before]
    shift = 0
    if "LoadImaged" not in names:
        before.append({"_target_": "LoadImaged", "keys": image})
    if "Orientationd" not in names:
        shift = 1
        before.insert(0, {"_target_": "Orientationd", "keys": image, "axcodes": "LPS"})
        notes.append("no Orientationd: the network sees the axes as they are, taken as DICOM's own (LPS)")
    after: list[dict[str, Any]] = []
    for n, raw in enumerate(_listed(path, content, "post_transforms")):
        after.append(_answer(path, n, _item(path, "post_transforms", n, raw), answer, after, notes))
    made = {
        "preprocessing": {"transforms": before},
        "postprocessing": {"transforms": after},
        "inferer": _inferer(path, arguments, notes),
    }
    config = _Renamed(path, made)
    config.shift = shift
    return config


def _only(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value)


def _listed(path: Path, content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key) or []
    if not isinstance(found, list):
        raise PackageError(f"{path}: {key}: expected a list of transforms")
    return found


def _item(path: Path, key: str, number: int, raw: Any) -> dict[str, Any]:
    """{name, args} as {_target_, ...}; a name that leads to other code than MONAI's is refused."""
    arguments = raw.get("args", {}) if isinstance(raw, Mapping) else None
    name = raw.get("name") if isinstance(raw, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, Mapping) or "_target_" in arguments:
        raise PackageError(f"{path}: {key}#{number}: expected a transform with name and args")
    short = name.rsplit(".", 1)[-1]
    if name not in (short, f"monai.transforms.{short}") and not (
        name.startswith("aiaa.") and short in {"Restored", *_FOR_CLIENTS}
    ):
        raise PackageError(f"{path}: {key}#{number}: {name[:80]!r} is other code than MONAI's transforms; not run")
    return {"_target_": short, **arguments}


def _short(item: Mapping[str, Any]) -> str:
    name = str(item["_target_"])
    return name.removesuffix("Dict").removesuffix("D") + "d" if name.endswith(("D", "Dict")) else name


def _answer(
    path: Path, number: int, item: dict[str, Any], answer: str, before: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    """A post transform as a bundle has it: on `pred`; what only changes shapes or informs clients does nothing."""
    name = _short(item)
    keys = item.get("keys", answer)
    keys = ["pred" if key == answer else str(key) for key in (keys if isinstance(keys, list) else [keys])]
    if name in _FOR_CLIENTS:
        notes.append(f"{name} is left out: it tells AIAA's clients where to click next")
        return {"_target_": "Identityd", "keys": keys}
    if name in _SHAPES:
        return {"_target_": "Identityd", "keys": keys}
    if name == "Restored":
        decided = any(_short(other) == "AsDiscreted" for other in before)
        if not decided or item.get("mode", "nearest") != "nearest":
            raise PackageError(
                f"{path}: post_transforms#{number}: Restored is run after AsDiscreted only, with mode nearest"
            )
        notes.append("Restored: labels return to the images' grid by the nearest voxel")
        return {"_target_": "Invertd", "keys": keys, "nearest_interp": True}
    return {key: value for key, value in item.items() if key not in ("n_classes", "num_classes")} | {"keys": keys}


def _input(config: Config, modality: str, notes: list[str]) -> dict[str, Any]:
    if modality == "CT":
        return input_block(config, "hu", True, notes)
    return {"padding_hu": 0.0, **input_block(config, "any", True, notes)}


def _inferer(path: Path, arguments: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    roi = arguments.get("roi_size", arguments.get("roi"))
    windows = arguments.get("scanning_window", arguments.get("sw", False))
    if windows is not True:
        if roi is not None:
            raise PackageError(f"{path}: inference.args: roi without scanning_window resizes the image; it is not run")
        return {"_target_": "SimpleInferer"}
    made = {"_target_": "SlidingWindowInferer", "roi_size": roi}
    made |= {key: arguments[key] for key in ("overlap", "mode", "padding_mode") if key in arguments}
    if "overlap" not in arguments:
        notes.append("no overlap of the windows is given: MONAI's 0.25 is taken")
    return made


# --- the network and what it finds -----------------------------------------------------------------------------------


def _source(folder: Path, path: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    name = next((name for name in _MODELS if (folder / name).is_file()), None)
    if name is None:
        old = sorted(file.name for file in folder.rglob("*") if file.suffix in _TENSORFLOW and file.is_file())
        if old:
            raise PackageError(
                f"{folder}: {old[0]} is a TensorFlow or TensorRT model; only PyTorch models (model.ts) are run"
            )
        raise PackageError(f"{folder}: no model; put {_MODELS[0]} beside {path.name}")
    source: dict[str, Any] = {"format": "torchscript", "path": name, "sha256": file_digest(folder / name)}
    if is_torchscript(folder / name):
        return source
    network = arguments.get("network")
    wanted = str(network.get("name", "")) if isinstance(network, Mapping) else ""
    built = wanted.rsplit(".", 1)[-1]
    if (
        not isinstance(network, Mapping)
        or built not in NETWORKS
        or wanted not in (built, f"monai.networks.nets.{built}")
    ):
        raise PackageError(
            f"{folder / name}: is no TorchScript, and inference.AIAA.args.network names no network of MONAI that is "
            "built here; export it with torch.jit.save"
        )
    return {**source, "format": "state_dict", "network": {"name": built, "args": network.get("args") or {}}}


def _modality(content: Mapping[str, Any], notes: list[str]) -> str:
    words = set(re.findall(r"[a-z]+", _line(content.get("description")).lower()))
    if words & {"mr", "mri"} and "ct" not in words:
        return "MR"
    if "ct" not in words or words & {"mr", "mri"}:
        notes.append("the description does not say which modality: CT is assumed")
    return "CT"


def _labels(path: Path, content: Mapping[str, Any], decision: Decision, notes: list[str]) -> list[dict[str, Any]]:
    named = content.get("labels")
    names = [str(name) for name in named] if isinstance(named, list) else []
    if names and names[0].lower() == "background":
        names = names[1:]
    if not 1 <= len(names) <= 255 or (decision.decide != "argmax" and len(names) != 1):
        raise PackageError(f"{path}: labels: expected the name of every class, in the order of the network's outputs")
    kept = set(range(1, len(names) + 1)) if decision.largest is None else set(decision.largest)
    labels, private = [], []
    for index, name in enumerate(names, start=1):
        label, own = label_output(index, name)
        labels.append(label | decision.piece() if index in kept else label)
        if own:
            private.append(name[:64])
    if private:
        notes.append(f"labels without a verified code keep their names in a private scheme: {', '.join(private)}")
    return labels
