"""nnU-Net v2 result folders as our manifest: plans.json, dataset.json and the checkpoints of the trained folds.

3d_fullres and 3d_lowres with one channel are run; cascades, 2d, several channels and region-based training are
refused with the reason. The configuration and the mirroring axes are those the first checkpoint names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.formats.labels import label_output, shown
from dicom_node.models.package import read_regular
from dicom_node.models.source import NNUNET_NETWORKS
from dicom_node.models.torch_files import read_pickled

__all__ = ["describe", "detect"]

_PLANS, _DATASET, _CHECKPOINT = "plans.json", "dataset.json", "checkpoint_final.pth"
_MAX_JSON_BYTES = 16 * 1024**2
_MAX_FOLDS = 16

# What the array axes (z, y, x) of the reader run along; SimpleITK and nibabel keep the axes of the file.
_READERS = {"SimpleITKIO": "SPL", "NibabelIO": "SPL", "SimpleITKIOWithReorient": "SAR", "NibabelIOWithReorient": "SAR"}
_MR_CHANNELS = frozenset({"mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "pd"})
# arguments of the networks that are handed on as they are, and those that only concern training
_HANDED_ON = (
    *("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"),
    *("n_conv_per_stage_decoder", "conv_bias", "norm_op_kwargs", "nonlin_kwargs", "nonlin_first"),
    *("bottleneck_channels", "stem_channels"),
)
_NAMED = ("norm_op", "nonlin", "block")
_TRAINING = ("n_stages", "conv_op", "dropout_op", "dropout_op_kwargs", "deep_supervision")


def detect(folder: Path) -> bool:
    """Whether `folder` is laid out as nnU-Net v2 leaves a trained configuration."""
    return (folder / _PLANS).is_file() and (folder / _DATASET).is_file()


def describe(folder: Path) -> Described:
    """The trained configuration as our manifest. Raises PackageError that names what cannot be run, and why."""
    plans, dataset = _mapping(folder / _PLANS), _mapping(folder / _DATASET)
    folds = _folds(folder)
    checkpoint = _checkpoint(folder / folds[0])
    where = f"{folder / _PLANS}: configurations.{checkpoint['configuration']}"
    configuration = _configuration(plans, checkpoint["configuration"], where)
    window = configuration.get("patch_size")
    if not _is_sizes(window, int):
        raise PackageError(f"{where}: patch_size: expected three sizes; two-dimensional networks are not run")
    notes: list[str] = []
    modality, values = _modality(dataset)
    labels, classes = _labels(dataset, notes)
    mirror = checkpoint["mirror"]
    source: dict[str, Any] = {
        "format": "nnunet",
        "path": folds[0],
        "sha256": file_digest(folder / folds[0]),
        "network": _network(configuration, classes, where),
        "folds": [{"path": fold, "sha256": file_digest(folder / fold)} for fold in folds[1:]],
    }
    name = str(plans.get("dataset_name") or dataset.get("name") or folder.name)
    sop_class = [f"{modality}ImageStorage", f"Enhanced{modality}ImageStorage"]
    manifest = {
        "schema": 1,
        "id": _slug(f"{name}-{checkpoint['configuration']}"),
        "version": _version(source),
        "manufacturer": "nnU-Net",
        "task": "segmentation",
        "trust": "data",
        "source": source,
        "intended_use": {"status": "research", "text": _text(dataset)},
        "select": {"modality": [modality], "sop_class": sop_class},
        "input": {
            **_grid(plans, configuration, where, _axes(folder, plans, dataset, mirror, where, notes)),
            "values": values,
            "first": "crop",
            "crop": {"nonzero": True},
            "intensity": _intensity(plans, configuration, where, notes),
        },
        "infer": {
            "window": window,
            "overlap": 0.5,
            "blend": "nnunet",
            "edge": "constant",
            "pad_value": 0.0,
            "mirror": mirror,
        },
        # as nnU-Net does: logits are interpolated back to the images' grid, then the largest counts
        "output": {"activation": "none", "inverse": "probability", "labels": labels},
    }
    notes.append(f"{len(folds)} fold(s) of {checkpoint['trainer']}; mirrored along axes {mirror or 'none'}")
    notes.append(
        "images are cut to what is not 0, normalised, then resampled, as nnU-Net does; it resamples with third-order "
        "splines, here it is linear: borders of organs may differ by a voxel"
    )
    return Described(format="nnunet", manifest=manifest, files=(_PLANS, _DATASET, *folds), notes=tuple(notes))


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _MAX_JSON_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise PackageError(f"{path}: is no JSON: {type(exc).__name__}") from exc
    if not isinstance(content, dict):
        raise PackageError(f"{path}: expected keys and values at the top")
    return content


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
    return kept.strip("-.")[:64] or "nnunet"


def _version(source: Mapping[str, Any]) -> str:
    """Of these very folds: trained again under the same name they are another version."""
    digests = (source["sha256"], *(fold["sha256"] for fold in source["folds"]))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def _text(dataset: Mapping[str, Any]) -> str:
    described = shown(str(dataset.get("description") or ""))
    return f"Research use only. {described}"[:200].strip()


def _is_sizes(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else (int,)
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(n, kinds) and not isinstance(n, bool) and n > 0 for n in value)
    )


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _folds(folder: Path) -> list[str]:
    """The trained folds, relative; all data in one (fold_all) only where there are no others, as nnU-Net does."""
    found = sorted(path.parent.name for path in folder.glob(f"fold_*/{_CHECKPOINT}"))
    numbered = [name for name in found if name.removeprefix("fold_").isdigit()]
    names = numbered or [name for name in found if name == "fold_all"]
    if not names or len(names) > _MAX_FOLDS:
        raise PackageError(f"{folder}: expected 1 to {_MAX_FOLDS} trained folds, fold_0/{_CHECKPOINT} and so on")
    return [f"{name}/{_CHECKPOINT}" for name in names]


def _checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its training: configuration, trainer, mirroring axes."""
    content = read_pickled(read_regular(path), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), dict):
        raise PackageError(f"{path}: is no checkpoint of nnU-Net v2: it has no network_weights")
    arguments = content.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    if not isinstance(name, str):
        raise PackageError(f"{path}: is no checkpoint of nnU-Net v2: it names no configuration")
    axes = content.get("inference_allowed_mirroring_axes")
    mirror = list(axes) if isinstance(axes, list | tuple) else []
    if not all(type(axis) is int and 0 <= axis <= 2 for axis in mirror):
        raise PackageError(f"{path}: inference_allowed_mirroring_axes: expected axes from 0 to 2")
    return {
        "configuration": name,
        "trainer": str(content.get("trainer_name") or "an unnamed trainer"),
        "mirror": mirror,
    }


# --- plans -----------------------------------------------------------------------------------------------------------


def _configuration(plans: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The configuration `name` with what it inherits. Raises PackageError for one that needs another's result."""
    configurations = plans.get("configurations")
    merged: dict[str, Any] = {}
    wanted: Any = name
    for _ in range(8):
        found = configurations.get(wanted) if isinstance(configurations, dict) else None
        if not isinstance(found, dict):
            raise PackageError(f"{where}: {str(wanted)[:60]!r} is not in the plans")
        merged = {**found, **merged}
        wanted = found.get("inherits_from")
        if wanted is None:
            break
    if wanted is not None:
        raise PackageError(f"{where}: inherits_from goes round in circles or too deep")
    if merged.get("previous_stage"):
        raise PackageError(
            f"{where}: is the second stage of a cascade, which needs the result of another network; train or export "
            "3d_fullres or 3d_lowres"
        )
    return merged


def _network(configuration: Mapping[str, Any], classes: int, where: str) -> dict[str, Any]:
    """The network's class and plain arguments, from today's plans or those before nnU-Net 2.4."""
    if "architecture" in configuration:
        described = configuration["architecture"]
        given = described.get("arch_kwargs") if isinstance(described, dict) else None
        if not isinstance(given, dict):
            raise PackageError(f"{where}: architecture: expected network_class_name and arch_kwargs")
        name = str(described.get("network_class_name")).rsplit(".", 1)[-1]
    else:
        name, given = str(configuration.get("UNet_class_name")), _older_arguments(configuration, where)
    if name not in NNUNET_NETWORKS:
        known = ", ".join(sorted(NNUNET_NETWORKS))
        raise PackageError(f"{where}: network {name[:80]!r} is not built here; known: {known}")
    if unknown := given.keys() - {*_HANDED_ON, *_NAMED, *_TRAINING}:
        raise PackageError(f"{where}: architecture: argument {min(unknown)[:60]!r} is not known")
    if not str(given.get("conv_op", "")).endswith("Conv3d"):
        raise PackageError(f"{where}: architecture: conv_op: only three-dimensional networks are run")
    arguments = {"input_channels": 1, "num_classes": classes}
    arguments |= {key: given[key] for key in _HANDED_ON if given.get(key) is not None}
    return {
        "name": name,
        "args": arguments | {key: str(given[key]).rsplit(".", 1)[-1] for key in _NAMED if given.get(key)},
    }


def _older_arguments(configuration: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        encoder = configuration["n_conv_per_stage_encoder"]
        base, most = int(configuration["UNet_base_num_features"]), int(configuration["unet_max_num_features"])
        plain = configuration["UNet_class_name"] == "PlainConvUNet"
        return {
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
            "conv_op": f"Conv{len(configuration['patch_size'])}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            "n_conv_per_stage" if plain else "n_blocks_per_stage": encoder,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": "InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
    except (KeyError, TypeError, ValueError) as exc:
        raise PackageError(f"{where}: has no architecture that is understood ({type(exc).__name__}: {exc})") from exc


def _axes(
    folder: Path,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    mirror: Sequence[int],
    where: str,
    notes: list[str],
) -> str:
    """Which way the axes (z, y, x) of the arrays ran that the reader gave to the training.

    nnU-Net does not record it. A reader that reorients settles it; else `orientation` of dataset.json, a key of ours
    with the directions of the files' axes (x, y, z), such as RAS. Without, it is taken to be DICOM's own where the
    network was trained on slices mirrored both ways and so cannot tell; else it is refused: sides might be swapped.
    """
    reader = str(plans.get("image_reader_writer"))
    if reader not in _READERS:
        raise PackageError(f"{where}: image_reader_writer {reader[:60]!r} reads no volumes of CT or MR")
    told = dataset.get("orientation")
    if reader.endswith("WithReorient"):
        return _READERS[reader]
    if told is None:
        # the network's axes that run within the slices, y and x of the reader's
        if not {axis for axis, array in enumerate(_order(plans, where)) if array} <= set(mirror):
            raise PackageError(
                f"{folder / _DATASET}: nnU-Net does not record which way the axes of the training files ran, and this "
                "network, not mirrored along both axes of the slices, may tell left from right: the wrong guess would "
                'swap sides; put the directions of the files\' axes (x, y, z) there, such as "orientation": "RAS"'
            )
        notes.append(
            "nnU-Net does not record which way the axes of the training files ran: taken as DICOM's own (LPS); for "
            'files in RAS put "orientation": "RAS" into dataset.json'
        )
        return _READERS[reader]
    pairs = {letter: pair for pair in ("RL", "AP", "SI") for letter in pair}
    if not isinstance(told, str) or len(told) != 3 or len({pairs.get(letter) for letter in told} - {None}) != 3:
        raise PackageError(f"{folder / _DATASET}: orientation: expected the directions of the files' axes, such as RAS")
    return told[::-1]


def _order(plans: Mapping[str, Any], where: str) -> list[int]:
    """Which axis (z, y, x) of the reader's arrays each axis of the network is."""
    order = plans.get("transpose_forward")
    if not isinstance(order, list) or sorted(order, key=str) != [0, 1, 2]:
        raise PackageError(f"{where}: transpose_forward: expected an order of three axes")
    return order


def _grid(plans: Mapping[str, Any], configuration: Mapping[str, Any], where: str, axes: str) -> dict[str, Any]:
    """Orientation and spacing in the network's axis order, which is the reader's after `transpose_forward`."""
    order = _order(plans, where)
    spacing = configuration.get("spacing")
    if not _is_sizes(spacing, float):
        raise PackageError(f"{where}: spacing: expected three positive sizes in mm")
    assert isinstance(spacing, list)
    return {"orientation": "".join(axes[axis] for axis in order), "spacing_mm": [float(mm) for mm in spacing]}


def _intensity(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], where: str, notes: list[str]
) -> list[dict[str, Any]]:
    schemes = configuration.get("normalization_schemes")
    if not isinstance(schemes, list) or len(schemes) != 1:
        raise PackageError(f"{where}: normalization_schemes: expected one; several channels are not run")
    scheme = schemes[0]
    if scheme == "CTNormalization":
        figures = (plans.get("foreground_intensity_properties_per_channel") or {}).get("0") or {}
        try:
            mean, std, low, high = (
                float(figures[key]) for key in ("mean", "std", "percentile_00_5", "percentile_99_5")
            )
        except (KeyError, TypeError, ValueError):
            raise PackageError(f"{where}: foreground_intensity_properties_per_channel: has no figures") from None
        return [{"clip": [low, high]}, {"normalize": {"mean": mean, "std": max(std, 1e-8)}}]
    if scheme == "ZScoreNormalization":
        masked = configuration.get("use_mask_for_norm")
        own = isinstance(masked, list) and masked[:1] == [True]
        around = ", the zeros around them aside" if own else ""
        notes.append(f"intensities are scaled by the figures of each series' own values{around}")
        return [{"normalize": {"nonzero": own}}]
    if scheme == "RescaleTo01Normalization":
        return [{"minmax": {"to": [0.0, 1.0]}}]
    if scheme == "NoNormalization":
        return []
    raise PackageError(f"{where}: normalization_schemes: {str(scheme)[:60]!r} is not run")


# --- dataset ---------------------------------------------------------------------------------------------------------


def _modality(dataset: Mapping[str, Any]) -> tuple[str, str]:
    """The DICOM modality of the only channel, and whether its values are in Hounsfield units."""
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(channels, dict) or len(channels) != 1:
        raise PackageError("dataset.json: channel_names: expected one channel; several series at once are not run")
    name = str(next(iter(channels.values()))).casefold()
    if name == "ct":
        return "CT", "hu"
    if name in _MR_CHANNELS:
        return "MR", "any"
    raise PackageError(f"dataset.json: channel_names: {name[:40]!r} series are not analysed, CT and MR are")


def _labels(dataset: Mapping[str, Any], notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The output's labels and how many classes the network has, background included."""
    named = dataset.get("labels")
    if not isinstance(named, dict):
        raise PackageError("dataset.json: labels: expected names and numbers")
    numbers: dict[int, str] = {}
    for name, value in named.items():
        if isinstance(value, list):
            if len(value) != 1:
                raise PackageError(
                    f"dataset.json: labels: {str(name)[:40]!r} is a region of several labels; networks trained on "
                    "regions overlap and are not run"
                )
            value = value[0]
        if name == "ignore":
            continue
        if type(value) is not int or value in numbers:
            raise PackageError(f"dataset.json: labels: {str(name)[:40]!r} must have a number of its own")
        numbers[value] = str(name)
    if sorted(numbers) != list(range(len(numbers))) or not 2 <= len(numbers) <= 256:
        raise PackageError("dataset.json: labels: expected background 0, then 1, 2 and so on, at most 255")
    labels, private = [], []
    for number in range(1, len(numbers)):
        label, own = label_output(number, numbers[number])
        labels.append(label)
        if own:
            private.append(numbers[number][:64])
    if private:
        notes.append(f"labels without a verified code keep their names in a private scheme: {', '.join(private)}")
    return labels, len(numbers)
