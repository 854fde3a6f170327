"""MONAI bundles (model-zoo layout), read as data: what the configuration says, told as our own manifest.

Only the parts that say what the network is and what it sees are read: `network_def`, `preprocessing`, `inferer`,
`postprocessing` of configs/inference.json|yaml, and configs/metadata.json. References (`@id`, `@a#b`, `a::b`) and the
arithmetic in `$` expressions are worked out by a small walker; nothing is imported, called or evaluated, and
`imports`, handlers, scripts and the rest are not looked at. What our manifest cannot say exactly is refused by name.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dicom_node.errors import PackageError
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.formats.labels import label_output
from dicom_node.models.manifest import NETWORKS

__all__ = ["describe", "detect"]

_CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
_WEIGHTS = ("models/model.pt", "models/model.pth", "models/model.safetensors")
_MAX_CONFIG_BYTES = 1024**2
_MAX_DEPTH = 32
_MAX_ALIASES = 32


def detect(folder: Path) -> bool:
    """Whether `folder` is laid out as a bundle."""
    return (folder / "configs" / "metadata.json").is_file()


def describe(folder: Path) -> Described:
    """The bundle as our manifest. Raises PackageError that names the key that cannot be run, and why."""
    metadata = _mapping(folder / "configs" / "metadata.json")
    path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if path is None:
        raise PackageError(f"{folder}: a bundle without {_CONFIGS[0]} cannot be run")
    config = _Config(path, _mapping(path))
    weights = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise PackageError(
            f"{folder}: no weights; put them at {_WEIGHTS[0]} (the zoo's large_files.yml says where from)"
        )
    notes: list[str] = []
    name = str(metadata.get("name") or folder.name)
    manifest = {
        "schema": 1,
        "id": _slug(name),
        "version": _slug(str(metadata.get("version") or "0")),
        "manufacturer": "MONAI bundle",
        "task": "segmentation",
        "trust": "data",
        "source": {
            "format": "state_dict",
            "path": weights,
            "sha256": file_digest(folder / weights),
            "network": _network(config),
        },
        "intended_use": _intended_use(metadata),
        "select": _select(metadata),
        "input": _input(config, notes),
        "infer": _infer(config),
        "output": {"activation": "softmax", "labels": _labels(metadata, notes)},
    }
    _check_postprocessing(config)
    files = (weights, *(str(file.relative_to(folder)) for file in (path, folder / "configs" / "metadata.json")))
    return Described(format="monai_bundle", manifest=manifest, files=files, notes=tuple(notes))


# --- the configuration as data ---------------------------------------------------------------------------------------


def _mapping(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise PackageError(f"{path}: larger than {_MAX_CONFIG_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(path, text)
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise PackageError(f"{path}: not readable as plain {path.suffix[1:]}: {type(exc).__name__}") from exc
    if not isinstance(content, dict):
        raise PackageError(f"{path}: expected keys and values at the top")
    return content


def _yaml(path: Path, text: str) -> Any:
    aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    if aliases > _MAX_ALIASES:
        raise PackageError(f"{path}: more than {_MAX_ALIASES} YAML aliases")
    return yaml.safe_load(text)


_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class _Config:
    """A configuration whose references and expressions are resolved when asked for."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._content = content

    def refuse(self, key: str, why: str) -> PackageError:
        """The error for `key`."""
        return PackageError(f"{self.path}: {key}: {why}")

    def raw(self, key: str) -> Any:
        """What stands at `key` (`a#0#b`), unresolved. Raises PackageError when nothing does."""
        value: Any = self._content
        for part in key.replace("::", "#").split("#"):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (LookupError, TypeError, ValueError):
                raise self.refuse(key, "is not in the configuration") from None
        return value

    def has(self, key: str) -> bool:
        """Whether the top level has `key`."""
        return key in self._content

    def value(self, key: str, raw: Any, depth: int = 0) -> Any:
        """`raw`, which stands at `key`, with every reference and expression in it worked out."""
        if depth > _MAX_DEPTH:
            raise self.refuse(key, "references go round in circles or too deep")
        if isinstance(raw, Mapping):
            return {name: self.value(f"{key}#{name}", inner, depth + 1) for name, inner in raw.items()}
        if isinstance(raw, list):
            return [self.value(f"{key}#{n}", inner, depth + 1) for n, inner in enumerate(raw)]
        if isinstance(raw, str):
            if raw.startswith("@"):
                return self.value(raw[1:], self.raw(raw[1:]), depth + 1)
            if raw.startswith("%"):
                raise self.refuse(key, f"macro {raw[:60]!r} includes another file; put its content here")
            if raw.startswith("$"):
                return self._expression(key, raw[1:], depth)
        return raw

    def _expression(self, key: str, text: str, depth: int) -> Any:
        # references are no Python: "@a#b" becomes a name that is looked up again
        names: dict[str, str] = {}
        parts = []
        rest = text
        while (at := rest.find("@")) >= 0:
            end = at + 1
            while end < len(rest) and (rest[end].isalnum() or rest[end] in "_#:"):
                end += 1
            name = f"reference_{len(names)}"
            names[name] = rest[at + 1 : end]
            parts += [rest[:at], name]
            rest = rest[end:]
        try:
            tree = ast.parse("".join([*parts, rest]).strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise self.refuse(key, f"expression {text[:60]!r} is not understood") from None
        return self._walk(key, tree.body, names, depth + 1)

    def _walk(self, key: str, node: ast.expr, names: Mapping[str, str], depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self.refuse(key, "an expression is too deep")
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool | type(None)):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return self.value(names[node.id], self.raw(names[node.id]), depth + 1)
        if isinstance(node, ast.List | ast.Tuple):
            return [self._walk(key, item, names, depth + 1) for item in node.elts]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self._walk(key, node.operand, names, depth + 1)
            if isinstance(inner, int | float):
                return -inner
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = (self._walk(key, side, names, depth + 1) for side in (node.left, node.right))
            if isinstance(left, int | float) and isinstance(right, int | float):
                try:
                    return _ARITHMETIC[type(node.op)](left, right)
                except ArithmeticError:
                    raise self.refuse(key, "an expression divides by zero") from None
        raise self.refuse(key, "holds Python that would have to be executed; packages are read as data (trust: data)")


# --- what the network is and sees ------------------------------------------------------------------------------------


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
    return kept.strip("-")[:64] or "bundle"


def _network(config: _Config) -> dict[str, Any]:
    content = config.value("network_def", config.raw("network_def"))
    if not isinstance(content, dict):
        raise config.refuse("network_def", "expected a network with its arguments")
    target = str(content.pop("_target_", ""))
    name = target.removeprefix("monai.networks.nets.")
    if name not in NETWORKS:
        why = "its own code (scripts) would have to be executed" if target.startswith("scripts") else "not on the list"
        raise config.refuse("network_def#_target_", f"{target!r}: {why}; known: {', '.join(sorted(NETWORKS))}")
    return {"name": name, "args": {key: value for key, value in content.items() if not key.startswith("_")}}


def _intended_use(metadata: Mapping[str, Any]) -> dict[str, Any]:
    text = str(metadata.get("intended_use") or metadata.get("description") or "Research use only.")
    status = "demonstration" if "demonstration" in text.lower() else "research"
    return {"status": status, "text": text[:200]}


def _format(metadata: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    found: Any = metadata.get("network_data_format")
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _select(metadata: Mapping[str, Any]) -> dict[str, Any]:
    image = _format(metadata, "inputs", "image")
    modality = str(image.get("modality") or "").upper()
    if modality not in ("CT", ""):
        raise PackageError(
            f"metadata.json: network_data_format.inputs.image.modality: {modality[:16]!r} series are not analysed yet, "
            "CT is"
        )
    if int(image.get("num_channels") or 1) != 1:
        raise PackageError("metadata.json: network_data_format.inputs.image.num_channels: one series is one channel")
    return {"modality": ["CT"], "sop_class": ["CTImageStorage"]}


def _labels(metadata: Mapping[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    names = _format(metadata, "outputs", "pred").get("channel_def")
    if not isinstance(names, Mapping) or len(names) < 2:
        raise PackageError("metadata.json: network_data_format.outputs.pred.channel_def: must name every class")
    labels = []
    for index, name in names.items():
        if not str(index).isdigit() or int(index) > 255:
            raise PackageError(f"metadata.json: channel_def: {str(index)[:16]!r} is no class from 0 to 255")
        if int(index) > 0:
            label, private = label_output(int(index), str(name))
            labels.append(label)
            if private:
                notes.append(f"label {str(name)[:64]!r} has no verified code: it keeps its name in a private scheme")
    return labels


# --- transforms ------------------------------------------------------------------------------------------------------

_NOTHING = {  # what they do, our reader and writer do
    *("LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "ToTensord", "SaveImaged", "CastToTyped", "ToDeviced"),
    *("Identityd", "DeleteItemsd"),
}


def _steps(config: _Config, key: str) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """(key, transform, arguments) of the transforms in a Compose, without the dictionary keys they are for."""
    raw = config.raw(key)
    listed = raw.get("transforms") if isinstance(raw, Mapping) else raw
    if isinstance(listed, str):
        listed = config.value(f"{key}#transforms", listed)
    if not isinstance(listed, list):
        raise config.refuse(key, "expected a Compose of transforms")
    steps = []
    for number, item in enumerate(listed):
        where = f"{key}#transforms#{number}"
        target = item.get("_target_") if isinstance(item, Mapping) else None
        if not isinstance(target, str):
            raise config.refuse(where, "expected a transform with its arguments")
        if item.get("_disabled_") in (True, "$True", "true"):
            continue
        name = target.removeprefix("monai.transforms.")
        if name.endswith("D") or name.endswith("Dict"):
            name = name.removesuffix("Dict").removesuffix("D") + "d"
        # arguments that are for MONAI's own machinery are not worked out: they may refer to anything
        ignored = {"_target_", "_disabled_", "_desc_", "_requires_", "keys", "transform", "orig_keys", "device"}
        kept = {} if name in _NOTHING else {k: v for k, v in item.items() if k not in ignored}
        steps.append((where, name, config.value(where, kept)))
    return steps


def _input(config: _Config, notes: list[str]) -> dict[str, Any]:
    """Orientation, spacing and value range; in this order, or it would be another image."""
    found: dict[str, Any] = {}
    for where, name, arguments in _steps(config, "preprocessing"):
        if name in _NOTHING:
            continue
        if name == "Orientationd" and "scale" not in found and "spacing" not in found:
            found["orientation"] = str(arguments.get("axcodes") or "RAS")
        elif name == "Spacingd" and "scale" not in found:
            found["spacing"] = _spacing(config, where, arguments)
        elif name == "ScaleIntensityRanged" and "scale" not in found:
            found["scale"] = _scale(config, where, arguments)
        else:
            raise config.refuse(
                where, f"{name} (here in the order of transforms) cannot be run exactly; it is not guessed"
            )
    if missing := {"orientation", "spacing", "scale"} - found.keys():
        raise config.refuse("preprocessing", f"has no {' and no '.join(sorted(missing))} transform")
    (low, high), (a, b) = found["scale"]["clip"], found["scale"]["to"]
    if not min(a, b) <= 0 <= max(a, b):
        raise config.refuse("preprocessing", "windows are padded with 0, which is outside of the value range")
    notes.append("windows that reach over the edge are padded with 0 of the scaled range, as MONAI does")
    return {
        "orientation": found["orientation"],
        "spacing_mm": found["spacing"],
        "intensity": found["scale"],
        "padding_hu": low + (0 - a) / (b - a) * (high - low),
    }


def _spacing(config: _Config, where: str, arguments: Mapping[str, Any]) -> list[float]:
    mode = arguments.get("mode", "bilinear")
    if mode not in ("bilinear", ["bilinear"]):
        raise config.refuse(f"{where}#mode", f"{str(mode)[:40]!r}: only bilinear is run")
    for key in ("diagonal", "scale_extent", "recompute_affine", "align_corners"):
        if arguments.get(key) not in (None, False, [False]):
            raise config.refuse(f"{where}#{key}", "only false is run")
    pixdim = arguments.get("pixdim")
    if (
        not isinstance(pixdim, list)
        or len(pixdim) != 3
        or not all(isinstance(mm, int | float) and mm > 0 for mm in pixdim)
    ):
        raise config.refuse(f"{where}#pixdim", "expected three positive sizes in mm")
    return [float(mm) for mm in pixdim]


def _scale(config: _Config, where: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if arguments.get("clip") is not True:
        raise config.refuse(f"{where}#clip", "only a range that clips is run")
    try:
        low, high, a, b = (float(arguments[key]) for key in ("a_min", "a_max", "b_min", "b_max"))
    except (KeyError, TypeError, ValueError):
        raise config.refuse(where, "expected numbers a_min, a_max, b_min and b_max") from None
    if not low < high or a == b:
        raise config.refuse(where, "a_min must be below a_max, and b_min not b_max")
    return {"clip": [low, high], "to": [a, b]}


def _infer(config: _Config) -> dict[str, Any]:
    raw = config.raw("inferer")
    target = str(raw.get("_target_", "")) if isinstance(raw, Mapping) else ""
    if target.removeprefix("monai.inferers.") != "SlidingWindowInferer":
        raise config.refuse("inferer", f"{target[:60]!r} is not run; SlidingWindowInferer is")
    ignored = {"_target_", "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh"}
    arguments = config.value("inferer", {k: v for k, v in raw.items() if k not in ignored})
    unknown = set(arguments) - {"roi_size", "overlap", "mode", "padding_mode", "cval", "sigma_scale"}
    if unknown or arguments.get("padding_mode", "constant") != "constant" or arguments.get("cval", 0) != 0:
        raise config.refuse(
            "inferer", f"{', '.join(sorted(unknown)) or 'padding_mode, cval'}: only MONAI's defaults are run"
        )
    if arguments.get("sigma_scale", 0.125) != 0.125:
        raise config.refuse("inferer#sigma_scale", "only 0.125 is run")
    roi = arguments.get("roi_size")
    if not isinstance(roi, list) or len(roi) != 3:
        raise config.refuse("inferer#roi_size", "expected three sizes")
    return {"window": roi, "overlap": arguments.get("overlap", 0.25), "blend": arguments.get("mode", "constant")}


def _check_postprocessing(config: _Config) -> None:
    """Softmax, back to the source grid by interpolating probabilities, then the largest: what ours does."""
    seen = []
    for where, name, arguments in _steps(config, "postprocessing"):
        if name in _NOTHING:
            continue
        if name == "Activationsd" and arguments.get("softmax") is True and "argmax" not in seen:
            seen.append("softmax")
        elif name == "Invertd" and arguments.get("nearest_interp") is False and "argmax" not in seen:
            seen.append("invert")
        elif name == "AsDiscreted" and arguments.get("argmax") is True:
            seen.append("argmax")
        else:
            raise config.refuse(
                where, f"{name} with these arguments, at this place, cannot be run exactly; it is not guessed"
            )
    if seen != ["softmax", "invert", "argmax"]:
        raise config.refuse(
            "postprocessing", f"expected softmax, invert, argmax in this order, got {', '.join(seen) or 'none'}"
        )
