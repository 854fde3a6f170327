"""MONAI bundles (model-zoo layout, or one TorchScript file with its configuration inside), told as our own manifest.

Read as data: only what says what the network is and what it sees (`network_def`, `preprocessing`, `inferer`,
`postprocessing`, where the weights are) and configs/metadata.json. Nothing is imported, called or evaluated, and
`imports`, handlers, scripts, logging.conf are not looked at. What our manifest cannot say exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.archive import extra_files, is_torchscript
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.formats.bundle_config import MAX_CONFIG_BYTES, Config, mapping_of, read_mapping
from dicom_node.models.formats.bundle_steps import Decision, infer_block, input_block, output_decision
from dicom_node.models.formats.labels import label_output, shown
from dicom_node.models.package import read_regular
from dicom_node.models.source import NETWORKS, TRUST
from dicom_node.models.torch_files import read_pickled

__all__ = ["describe", "detect"]

_CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
_INSIDE = ("metadata.json", "inference.json")
_ALIASES = {"preprocessing": "pre_transforms", "postprocessing": "post_transforms"}
_SCRIPTS = (".ts", ".pt", ".pth", ".jit")
_WEIGHTS = "models/model.pt"
# in the order of preference: data before graphs
_FORMATS: Mapping[str, str] = {
    ".pt": "state_dict",
    ".pth": "state_dict",
    ".safetensors": "state_dict",
    ".ts": "torchscript",
    ".pt2": "pt2",
    ".onnx": "onnx",
}


def detect(folder: Path) -> bool:
    """Whether `folder` is laid out as a bundle, or holds one TorchScript file that carries a bundle's configuration."""
    return _laid_out(folder) or _one_file(folder) is not None


def describe(folder: Path) -> Described:
    """The bundle as our manifest. Raises PackageError that names the key that cannot be run, and why."""
    notes: list[str] = []
    single = None if _laid_out(folder) else _one_file(folder)
    if single is not None:
        inside = extra_files(single, _INSIDE, MAX_CONFIG_BYTES)
        metadata, content = (mapping_of(single / "extra" / name, inside[name]) for name in _INSIDE)
        config = _config(single / "extra" / "inference.json", content)
        weights, form = single.name, "torchscript"
        files: tuple[str, ...] = (weights,)
    else:
        metadata = read_mapping(folder / "configs" / "metadata.json")
        path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
        if path is None:
            raise PackageError(f"{folder}: a bundle without {_CONFIGS[0]} cannot be run")
        config = _config(path, read_mapping(path))
        weights = _weights(folder, config, notes)
        files = (weights, path.relative_to(folder).as_posix(), "configs/metadata.json")
        form = _FORMATS[PurePosixPath(weights).suffix]
        if form == "state_dict" and is_torchscript(folder / weights):
            form = "torchscript"
    source: dict[str, Any] = {"format": form, "path": weights, "sha256": file_digest(folder / weights)}
    if form == "state_dict":
        source["network"] = _network(config, notes)
        if key := _checkpoint_key(config, folder / weights):
            source["key"] = key
    manifest = _manifest(metadata, config, source, folder.name if single is None else single.stem, notes)
    return Described(format="monai_bundle", manifest=manifest, files=files, notes=tuple(notes))


def _laid_out(folder: Path) -> bool:
    return (folder / "configs" / "metadata.json").is_file()


def _one_file(folder: Path) -> Path | None:
    """The only TorchScript file at the top of `folder` with metadata and configuration inside; None without."""
    try:
        scripts = [path for path in folder.iterdir() if path.suffix in _SCRIPTS and path.is_file()]
    except OSError as exc:
        raise PackageError(f"{folder}: {exc.strerror}") from exc
    if len(scripts) == 1 and extra_files(scripts[0], _INSIDE, MAX_CONFIG_BYTES).keys() == set(_INSIDE):
        return scripts[0]
    return None


def _config(path: Path, content: Mapping[str, Any]) -> Config:
    """The configuration, some keys of which have two names; the bundle is where it is, whatever it works out."""
    named = {ours: content[other] for ours, other in _ALIASES.items() if other in content}
    return Config(path, {**named, **content, "bundle_root": "."})


def _manifest(
    metadata: Mapping[str, Any], config: Config, source: Mapping[str, Any], name: str, notes: list[str]
) -> dict[str, Any]:
    select = _select(metadata, notes)
    values = "hu" if select["modality"] == ["CT"] else "any"
    decision = output_decision(config, notes)
    return {
        "schema": 1,
        "id": _slug(str(metadata.get("name") or name)),
        "version": _slug(str(metadata.get("version") or "0")),
        "manufacturer": "MONAI bundle",
        "task": "segmentation",
        "trust": TRUST[source["format"]],
        "source": source,
        "intended_use": _intended_use(metadata),
        "select": select,
        "input": input_block(config, values, _before_1_5(metadata), notes),
        "infer": infer_block(config),
        "output": {
            "activation": decision.activation,
            "decide": decision.decide,
            "inverse": decision.inverse,
            "labels": _labels(metadata, decision, notes),
        },
    }


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
    return kept.strip("-")[:64] or "bundle"


# --- the network and its weights -------------------------------------------------------------------------------------


def _weights(folder: Path, config: Config, notes: list[str]) -> str:
    """Which file of the folder the configuration loads, or the network exported beside it."""
    named = _named_weights(folder, config, notes)
    for suffix in (named.suffix, *_FORMATS):
        if suffix in _FORMATS and (folder / named.with_suffix(suffix)).is_file():
            found = named.with_suffix(suffix).as_posix()
            if _FORMATS[suffix] != "state_dict" and suffix != named.suffix:
                notes.append(f"{named} is not there: the network exported to {found} is run")
            return found
    raise PackageError(f"{folder}: no weights; put them at {named} (the zoo's large_files.yml says where from)")


def _named_weights(folder: Path, config: Config, notes: list[str]) -> PurePosixPath:
    """What the configuration's CheckpointLoader loads, relative to the folder."""
    loader = _checkpoint_loader(config)
    if loader is None:
        return PurePosixPath(_WEIGHTS)
    key, raw = f"{loader[0]}#load_path", loader[1].get("load_path")
    try:
        text = config.value(key, raw)
    except PackageError:
        beside = sorted(file.name for file in (folder / "models").glob("*") if file.suffix in (".pt", ".pth"))
        if len(beside) > 1:
            raise config.refuse(
                key, f"it takes Python to know which of {', '.join(beside)[:120]} is meant; name it"
            ) from None
        notes.append(f"{key} takes Python to work out: {_WEIGHTS} is taken")
        return PurePosixPath(_WEIGHTS)
    path = PurePosixPath(text if isinstance(text, str) else "")
    if path.is_absolute():
        notes.append(f"{key} is a place on another machine: models/{path.name} is taken")
        path = PurePosixPath("models", path.name)
    if ".." in path.parts or "\\" in str(path) or not path.name:
        raise config.refuse(key, "must be a file inside the bundle")
    return path


def _checkpoint_loader(config: Config) -> tuple[str, Mapping[str, Any]] | None:
    """(key, unresolved arguments) of the CheckpointLoader on its own, or of that among the handlers."""
    handlers = config.raw("handlers") if config.has("handlers") else None
    places = [(f"handlers#{n}", item) for n, item in enumerate(handlers)] if isinstance(handlers, list) else []
    if config.has("checkpointloader"):
        places.insert(0, ("checkpointloader", config.raw("checkpointloader")))
    for key, item in places:
        if isinstance(item, Mapping) and str(item.get("_target_", "")).split(".")[-1] == "CheckpointLoader":
            return key, item
    return None


def _checkpoint_key(config: Config, weights: Path) -> str | None:
    """What the network's weights stand under in a checkpoint that holds more; None where the usual places will do."""
    loader = _checkpoint_loader(config)
    named = loader[1].get("load_dict") if loader else None
    keys = [str(key) for key, value in named.items() if "network" in str(value)] if isinstance(named, Mapping) else []
    if len(keys) != 1 or keys[0] == "model" or weights.suffix == ".safetensors":
        return None
    found = read_pickled(read_regular(weights), str(weights))
    return keys[0] if isinstance(found, dict) and isinstance(found.get(keys[0]), dict) else None


def _network(config: Config, notes: list[str]) -> dict[str, Any]:
    key = "network_def" if config.has("network_def") else "network"
    raw = config.raw(key)
    if not isinstance(raw, Mapping):
        raise config.refuse(key, "expected a network with its arguments")
    target = str(raw.get("_target_", ""))
    name = target.removeprefix("monai.networks.nets.")
    if name not in NETWORKS:
        why = "its own code (scripts) would have to be executed" if target.startswith("scripts") else "not on the list"
        hint = "a network exported to models/model.ts, .pt2 or .onnx runs instead of model.pt"
        raise config.refuse(f"{key}#_target_", f"{target!r}: {why}; {hint}; known: {', '.join(sorted(NETWORKS))}")
    content = config.value(key, {name: value for name, value in raw.items() if name != "_target_"})
    if content.get("_mode_", "default") != "default":
        raise config.refuse(f"{key}#_mode_", "only the network itself is built")
    if content.get("spatial_dims", 3) != 3:
        raise config.refuse(f"{key}#spatial_dims", "only networks of volumes (3) are run")
    if content.get("in_channels", 1) != 1:
        raise config.refuse(f"{key}#in_channels", "one series is one channel")
    # older MONAI wanted it, today's refuses it, no weight depends on it
    dropped = {"img_size"} if name == "SwinUNETR" else set()
    if dropped & content.keys():
        notes.append(f"{key}#img_size is left out: the network takes windows of any size now")
    kept = {key: value for key, value in content.items() if not key.startswith("_") and key not in dropped}
    return {"name": name, "args": kept}


# --- metadata.json ---------------------------------------------------------------------------------------------------


def _intended_use(metadata: Mapping[str, Any]) -> dict[str, Any]:
    text = str(metadata.get("intended_use") or metadata.get("description") or "Research use only.")
    text = shown(text)
    status = "demonstration" if "demonstration" in text.lower() else "research"
    return {"status": status, "text": text[:200]}


def _before_1_5(metadata: Mapping[str, Any]) -> bool:
    """Whether the bundle was made with a MONAI before 1.5."""
    parts = str(metadata.get("monai_version") or "").split(".")
    return (
        len(parts) >= 2
        and all(part.isascii() and part.isdigit() for part in parts[:2])
        and ((int(parts[0]), int(parts[1])) < (1, 5))
    )


def _format(metadata: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    found: Any = metadata.get("network_data_format")
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _select(metadata: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    inputs = _format(metadata, "inputs")
    if len(inputs) > 1:
        raise PackageError("metadata.json: network_data_format.inputs: one series is one input")
    only = next(iter(inputs.values()), None)
    image: Mapping[str, Any] = only if isinstance(only, Mapping) else {}
    modality = str(image.get("modality") or "").upper()
    if image.get("num_channels", 1) != 1:
        raise PackageError("metadata.json: network_data_format.inputs.image.num_channels: one series is one channel")
    if modality in ("MR", "MRI"):
        return {"modality": ["MR"], "sop_class": ["MRImageStorage", "EnhancedMRImageStorage"]}
    if modality == "":
        notes.append("metadata.json names no modality: CT is assumed")
    elif modality != "CT":
        raise PackageError(
            f"metadata.json: network_data_format.inputs.image.modality: {modality[:16]!r} series are not analysed, "
            "CT and MR are"
        )
    return {"modality": ["CT"], "sop_class": ["CTImageStorage", "EnhancedCTImageStorage"]}


def _labels(metadata: Mapping[str, Any], decision: Decision, notes: list[str]) -> list[dict[str, Any]]:
    place = "metadata.json: network_data_format.outputs.pred.channel_def"
    names = _format(metadata, "outputs", "pred").get("channel_def")
    if not isinstance(names, Mapping) or not names:
        raise PackageError(f"{place}: must name every class")
    named: dict[int, str] = {}
    for index, name in names.items():
        if not (str(index).isascii() and str(index).isdigit()) or len(str(index)) > 3 or int(index) > 255:
            raise PackageError(f"{place}: {str(index)[:16]!r} is no class from 0 to 255")
        named[int(index)] = str(name)
    if decision.decide != "argmax" and len(named) == 1:
        named = {1: next(iter(named.values()))}  # the only output is the only organ
    named.pop(0, None)
    if not named or (decision.decide != "argmax" and named.keys() != {1}):
        raise PackageError(f"{place}: names {len(names)} classes, which does not go with how they are decided")
    keep = set(named if decision.largest is None else decision.largest)
    if keep - named.keys():
        raise PackageError(f"{place}: does not name every label of which one piece is kept")
    labels = []
    private = []
    for index, name in named.items():
        label, unknown = label_output(index, name)
        labels.append(label | decision.piece() if index in keep else label)
        if unknown:
            private.append(name)
    if private:
        listed = ", ".join(repr(name[:64]) for name in private[:8]) + (" ..." if len(private) > 8 else "")
        notes.append(f"{len(private)} labels have no verified code and keep their names in a private scheme: {listed}")
    return labels
