"""A bundle's transforms and inferer as our manifest's `input`, `infer` and `output` blocks.

Each transform is taken only where ours does exactly what MONAI's does, at its place in the order; an argument or an
order that would give another image or other labels is refused by its key, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicom_node.models.formats.bundle_config import Config

__all__ = ["Decision", "infer_block", "input_block", "output_decision"]

# of MONAI's own machinery: they change no value
_MACHINERY = {
    *("_target_", "_disabled_", "_desc_", "_requires_", "keys", "allow_missing_keys", "device", "lazy", "image_only"),
    *("meta_keys", "meta_key_postfix", "orig_meta_keys", "to_tensor", "transform", "orig_keys", "source_key"),
    *("start_coord_key", "end_coord_key", "ensure_same_shape", "select_fn"),
}
# what they do, our reader and writer do
_READING = {"LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd"}
_TYPES = {"EnsureTyped", "ToTensord", "CastToTyped", "ToDeviced", "ToNumpyd"}
_WRITING = {"SaveImaged", "DeleteItemsd", "Identityd", "SimulateDelayd"}
_AXES = [["L", "R"], ["P", "A"], ["I", "S"]]
_FLOATS = (None, "float", "float32", "float64", "torch.float32", "torch.float", "np.float32", "numpy.float32")


@dataclass(frozen=True, slots=True)
class _Step:
    """One transform: its place, MONAI's name of it in the dictionary form, and its worked-out arguments."""

    where: str
    name: str
    arguments: Mapping[str, Any]
    config: Config

    def only(self, *known: str) -> None:
        """Raise PackageError for an argument that is none of `known` and not plainly off."""
        for key, value in self.arguments.items():
            if key not in known and value not in (None, False, [False], [None]):
                raise self.config.refuse(f"{self.where}#{key}", f"{self.name} is not run with this argument")

    def one(self, key: str, default: Any = None) -> Any:
        """The argument, which may be given as a list of one."""
        value = self.arguments.get(key, default)
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def number(self, key: str, default: float | None = None) -> float:
        """The argument as a number. Raises PackageError."""
        value = self.one(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self.config.refuse(f"{self.where}#{key}", "expected a number")

    def flag(self, key: str, default: bool = False) -> bool:
        """The argument as yes or no. MONAI takes any text for yes, so only 'True' is taken. Raises PackageError."""
        value = self.one(key, default)
        if value in (None, False, 0):
            return False
        if value in (True, 1) or (isinstance(value, str) and value.lower() == "true"):
            return True
        raise self.config.refuse(f"{self.where}#{key}", "expected true or false")

    def refuse(self, why: str) -> Exception:
        """The error for this transform."""
        return self.config.refuse(self.where, f"{self.name}: {why}")


def _steps(config: Config, key: str) -> list[_Step]:
    """The transforms of the Compose at `key` that are not switched off, those of reading and writing left out."""
    raw = config.raw(key)
    listed = raw.get("transforms") if isinstance(raw, Mapping) else raw
    items = config.items(f"{key}#transforms" if isinstance(raw, Mapping) else key, listed)
    image = _image_key(config, items)
    steps: list[_Step] = []
    for where, item in items:
        name = _transform(config, where, item)
        if _disabled(config, where, item.get("_disabled_")):
            continue
        if name in _TYPES and key == "preprocessing" and not _is_float(item.get("dtype")):
            raise config.refuse(f"{where}#dtype", "the image would be rounded; only float32 is run")
        if name in _WRITING or name in _READING or name in _TYPES or image not in _keys(config, where, item):
            continue
        taken = {k: v for k, v in item.items() if k not in _MACHINERY and not (k == "dtype" and _is_float(v))}
        arguments = config.value(where, taken)
        if name == "CropForegroundd":
            if config.value(f"{where}#source_key", item.get("source_key", image)) != image:
                raise config.refuse(f"{where}#source_key", "only the image itself tells where the foreground is")
            if item.get("select_fn") is not None:
                arguments["above"] = config.threshold(f"{where}#select_fn", item["select_fn"])
        inverted = str(item.get("transform", "@preprocessing")).lstrip("$@ ")
        if name == "Invertd" and config.raw(inverted) is not config.raw("preprocessing"):
            raise config.refuse(f"{where}#transform", "only '@preprocessing' is inverted")
        steps.append(_Step(where, name, arguments, config))
    return steps


def _transform(config: Config, where: str, item: Any) -> str:
    """MONAI's name of the transform in its dictionary form, which may be spelled three ways."""
    target = item.get("_target_") if isinstance(item, Mapping) else None
    if not isinstance(target, str):
        raise config.refuse(where, "expected a transform with its arguments")
    name = target.removeprefix("monai.transforms.")
    if name.endswith("D") or name.endswith("Dict"):
        name = name.removesuffix("Dict").removesuffix("D") + "d"
    return name


def _image_key(config: Config, items: Sequence[tuple[str, Any]]) -> str:
    """The dictionary key of what is looked at: what LoadImaged loads, or the network's answer, `pred`."""
    for where, item in items:
        if _transform(config, where, item) == "LoadImaged":
            keys = _keys(config, where, item)
            if len(keys) > 1:
                raise config.refuse(where, "loads several images; a model here sees one series")
            return keys[0]
    return "pred"


def _disabled(config: Config, where: str, raw: Any) -> bool:
    if isinstance(raw, str) and not raw.startswith(("$", "@")):
        return raw.lower() == "true"
    return config.value(f"{where}#_disabled_", raw) is True


def _keys(config: Config, where: str, item: Mapping[str, Any]) -> list[str]:
    found = config.value(f"{where}#keys", item.get("keys", "image"))
    keys = found if isinstance(found, list) else [found]
    if not keys or not all(isinstance(key, str) for key in keys):
        raise config.refuse(f"{where}#keys", "expected the names of images")
    return keys


def _is_float(raw: Any) -> bool:
    return raw in _FLOATS or (isinstance(raw, str) and raw.removeprefix("$") in _FLOATS)


# --- what the network sees -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Input:
    """What the preprocessing came to so far, in the only order that is run: orientation, spacing, intensity, crop."""

    orientation: str = ""
    spacing: list[float] = field(default_factory=list)
    intensity: list[dict[str, Any]] = field(default_factory=list)
    crop: dict[str, Any] | None = None


def input_block(config: Config, values: str, old_crop: bool, notes: list[str]) -> dict[str, Any]:
    """The manifest's `input`. `values` hu or any; `old_crop`: made for a MONAI whose crop stays in the image."""
    found = _Input()
    for step in _steps(config, "preprocessing"):
        _take(step, found, old_crop)
    if not found.orientation or not found.spacing:
        missing = "no Orientationd" if not found.orientation else "no Spacingd"
        raise config.refuse("preprocessing", f"has {missing} transform")
    block: dict[str, Any] = {
        "orientation": found.orientation,
        "spacing_mm": found.spacing,
        "values": values,
        "intensity": found.intensity,
    }
    if found.crop is not None:
        block["crop"] = found.crop
    mapped = found.intensity[0].get("range") if len(found.intensity) == 1 else None
    if mapped and mapped["clip"] and mapped["from"][0] < mapped["from"][1]:
        (low, high), (a, b) = mapped["from"], mapped["to"]
        block["intensity"] = {"clip": [low, high], "to": [a, b]}
        if min(a, b) <= 0 <= max(a, b):
            block["padding_hu"] = low + (0 - a) / (b - a) * (high - low)
    if any("minmax" in step or "normalize" in step for step in found.intensity):
        notes.append("intensities are scaled by the figures of each series' own values, after resampling")
    return block


def _take(step: _Step, found: _Input, old_crop: bool) -> None:
    before = bool(found.intensity or found.crop)
    if step.name == "Orientationd" and not (found.orientation or found.spacing or before):
        step.only("axcodes", "labels")
        axes = step.one("axcodes")
        if not isinstance(axes, str):
            raise step.refuse("expected axcodes such as RAS")
        if step.arguments.get("labels") not in (None, _AXES):  # others give the letters of axcodes other meanings
            raise step.config.refuse(f"{step.where}#labels", "only L/R, P/A, I/S are run")
        found.orientation = axes
    elif step.name == "Spacingd" and not (found.spacing or before):
        found.spacing = _spacing(step)
    elif step.name in _INTENSITY and found.spacing and found.crop is None:
        found.intensity.append(_INTENSITY[step.name](step))
    elif step.name == "CropForegroundd" and found.spacing and found.crop is None:
        found.crop = _crop(step, old_crop)
    else:
        raise step.refuse("(here in the order of transforms) cannot be run exactly; it is not guessed")


def _spacing(step: _Step) -> list[float]:
    step.only("pixdim", "mode", "padding_mode", "dtype")
    if step.one("mode", "bilinear") != "bilinear":
        raise step.config.refuse(f"{step.where}#mode", "only bilinear is run")
    if step.one("padding_mode", "border") != "border":
        raise step.config.refuse(f"{step.where}#padding_mode", "only border is run")
    pixdim = step.one("pixdim")
    sizes = [pixdim] * 3 if isinstance(pixdim, int | float) else pixdim
    if (
        not isinstance(sizes, list)
        or len(sizes) != 3
        or not all(isinstance(mm, int | float) and mm > 0 for mm in sizes)
    ):
        raise step.config.refuse(f"{step.where}#pixdim", "expected three positive sizes in mm")
    return [float(mm) for mm in sizes]


def _scale_range(step: _Step) -> dict[str, Any]:
    step.only("a_min", "a_max", "b_min", "b_max", "clip")
    low, high = step.number("a_min"), step.number("a_max")
    clip = step.flag("clip")
    # without both MONAI leaves it at 0..1, and does not know where to clip
    plain = step.one("b_min") is None and step.one("b_max") is None and not clip
    a, b = (0.0, 1.0) if plain else (step.number("b_min"), step.number("b_max"))
    if low == high or a == b or (clip and a > b):
        raise step.refuse("a_min and a_max must differ, b_min must be below b_max")
    return {"range": {"from": [low, high], "to": [a, b], "clip": clip}}


def _scale(step: _Step) -> dict[str, Any]:
    step.only("minv", "maxv", "factor", "channel_wise")
    low, high = step.one("minv", 0.0), step.one("maxv", 1.0)
    if low is None and high is None:
        factor = step.number("factor")
        return {"range": {"from": [0.0, 1.0], "to": [0.0, 1.0 + factor], "clip": False}}
    if not all(isinstance(value, int | float) for value in (low, high)) or low == high:
        raise step.refuse("expected two different numbers minv and maxv")
    return {"minmax": {"to": [float(low), float(high)]}}


def _normalize(step: _Step) -> dict[str, Any]:
    step.only("subtrahend", "divisor", "nonzero", "channel_wise")
    block: dict[str, Any] = {"nonzero": step.flag("nonzero")}
    if step.one("subtrahend") is not None:
        block["mean"] = step.number("subtrahend")
    if step.one("divisor") is not None:
        block["std"] = step.number("divisor")
        if block["std"] <= 0:
            raise step.refuse("divisor must be positive")
    return {"normalize": block}


_INTENSITY = {"ScaleIntensityRanged": _scale_range, "ScaleIntensityd": _scale, "NormalizeIntensityd": _normalize}


def _crop(step: _Step, old_crop: bool) -> dict[str, Any]:
    step.only("margin", "allow_smaller", "k_divisible", "channel_indices", "mode", "above")
    if step.one("k_divisible", 1) != 1 or step.one("channel_indices", 0) not in (0, None):
        raise step.refuse("k_divisible and channel_indices are not run")
    margin = step.arguments.get("margin", 0)
    margins = set(margin) if isinstance(margin, list) else {margin}
    if len(margins) != 1 or not all(type(value) is int and value >= 0 for value in margins):
        raise step.config.refuse(f"{step.where}#margin", "expected one number of voxels")
    size = margins.pop()
    if size and not step.flag("allow_smaller", old_crop):
        raise step.config.refuse(f"{step.where}#allow_smaller", "with a margin only true is run: no voxels are made up")
    return {"above": float(step.arguments.get("above", 0.0)), "margin": size}


# --- how it sees it --------------------------------------------------------------------------------------------------

_WINDOW_MACHINERY = {
    *("_target_", "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh"),
    *("buffer_steps", "buffer_dim"),
}


def infer_block(config: Config) -> dict[str, Any]:
    """The manifest's `infer`."""
    raw = config.raw("inferer")
    target = str(raw.get("_target_", "")) if isinstance(raw, Mapping) else ""
    name = target.removeprefix("monai.inferers.").removeprefix("inferer.")
    if name == "SimpleInferer":
        return {"window": None}
    if name not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
        raise config.refuse("inferer", f"{target[:60]!r} is not run; SlidingWindowInferer and SimpleInferer are")
    taken = {key: value for key, value in raw.items() if key not in _WINDOW_MACHINERY}
    step = _Step("inferer", name, config.value("inferer", taken), config)
    step.only("roi_size", "overlap", "mode", "padding_mode", "cval", "sigma_scale")
    if step.number("sigma_scale", 0.125) != 0.125:
        raise config.refuse("inferer#sigma_scale", "only 0.125 is run")
    edge, blend = step.one("padding_mode", "constant"), step.one("mode", "constant")
    if edge not in ("constant", "replicate"):
        raise config.refuse("inferer#padding_mode", "only constant and replicate are run")
    if blend not in ("constant", "gaussian"):
        raise config.refuse("inferer#mode", "only constant and gaussian are run")
    roi = step.arguments.get("roi_size")
    sizes = [roi] * 3 if type(roi) is int else roi
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise config.refuse("inferer#roi_size", "expected three positive sizes")
    overlaps = step.arguments.get("overlap", 0.25)
    each = set(overlaps) if isinstance(overlaps, list) else {overlaps}
    if len(each) != 1:
        raise config.refuse("inferer#overlap", "expected the same for every axis")
    block = {"window": sizes, "overlap": each.pop(), "blend": blend, "edge": edge}
    return block if edge == "replicate" else block | {"pad_value": step.number("cval", 0.0)}


# --- what its answer means -------------------------------------------------------------------------------------------

# what voxels of one piece share, by the connectivity
_SHARED = {1: "a face", 2: "a face or an edge", 3: "a face, an edge or a corner"}


@dataclass(slots=True)
class Decision:
    """How voxels get their labels. `largest`: labels of which one piece is kept; None: of all, () of none.

    `connectivity`: of a piece's voxels, as in the manifest.
    """

    activation: str = "none"
    decide: str | float = ""
    inverse: str = ""
    largest: tuple[int, ...] | None = ()
    connectivity: int = 3

    def piece(self) -> dict[str, Any]:
        """What the manifest says of a label of which one piece is kept."""
        return {"keep": "largest_component", "connectivity": self.connectivity}


def output_decision(config: Config, notes: list[str]) -> Decision:
    """What the postprocessing comes to."""
    found = Decision()
    order: list[str] = []
    for step in _steps(config, "postprocessing"):
        kind = _post(step, found, order)
        if kind in order:
            raise step.refuse("is there twice")
        order.append(kind)
    if not found.decide or not found.inverse:
        raise config.refuse(
            "postprocessing", f"expected an AsDiscreted and an Invertd, got {', '.join(order) or 'nothing'}"
        )
    if "largest" in order:
        told = f"only the largest piece of a label is kept: voxels that share {_SHARED[found.connectivity]}"
        late = order.index("largest") > order.index("invert")
        elsewhere = ", though MONAI does that on the grid of the images" if late else ""
        notes.append(f"{told}; looked for on the network's grid{elsewhere}")
    return found


def _post(step: _Step, found: Decision, order: Sequence[str]) -> str:
    """Note what one transform adds to the decision, and name it."""
    if step.name == "Activationsd" and not order:
        step.only("softmax", "sigmoid")
        chosen = [name for name in ("softmax", "sigmoid") if step.flag(name)]
        if len(chosen) == 1:
            found.activation = chosen[0]
            return "activation"
    elif step.name == "Invertd":
        return _invert(step, found, order)
    elif step.name == "AsDiscreted":
        return _discrete(step, found)
    elif step.name == "KeepLargestConnectedComponentd" and "decide" in order:
        return _keep_largest(step, found)
    raise step.refuse("with these arguments, at this place, cannot be run exactly; it is not guessed")


def _invert(step: _Step, found: Decision, order: Sequence[str]) -> str:
    step.only("nearest_interp")
    nearest = step.flag("nearest_interp", True)
    if "decide" in order and not nearest:
        raise step.config.refuse(
            f"{step.where}#nearest_interp",
            "labels would be interpolated as if they were amounts (between 0 and 2 lies 1); set it to true",
        )
    if "decide" not in order and nearest:
        raise step.config.refuse(f"{step.where}#nearest_interp", "probabilities are interpolated: only false is run")
    found.inverse = "labels" if "decide" in order else "probability"
    return "invert"


def _discrete(step: _Step, found: Decision) -> str:
    step.only("argmax", "threshold", "threshold_values", "logit_thresh")
    argmax = step.flag("argmax")
    limit = step.one("threshold")
    if limit is True or step.flag("threshold_values"):  # as it was spelled before MONAI 0.7
        limit = step.one("logit_thresh", 0.5)
    if argmax and limit is None and found.activation != "sigmoid":
        found.decide = "argmax"
    elif not argmax and isinstance(limit, int | float) and found.activation == "sigmoid" and 0 < limit <= 1:
        found.decide = float(limit)
    else:
        raise step.refuse("is run with argmax (after softmax or nothing) or a threshold (after sigmoid)")
    return "decide"


def _keep_largest(step: _Step, found: Decision) -> str:
    """MONAI's own: see monai.transforms.KeepLargestConnectedComponent. One channel holds the numbers of labels here."""
    step.only("applied_labels", "is_onehot", "independent", "connectivity", "num_components")

    def refuse(key: str, why: str) -> Exception:
        return step.config.refuse(f"{step.where}#{key}", f"{step.name}: {why}")

    connectivity = step.arguments.get("connectivity")
    if connectivity is not None and (type(connectivity) is not int or connectivity not in _SHARED):
        raise refuse("connectivity", "expected 1, 2 or 3")
    found.connectivity = connectivity or 3
    pieces = step.arguments.get("num_components", 1)
    if type(pieces) is not int or pieces != 1:
        raise refuse("num_components", "is run with one piece of each label")
    if step.flag("is_onehot"):
        raise refuse("is_onehot", "is run on the numbers of labels, not on a channel for each")
    labels = step.arguments.get("applied_labels")
    found.largest = None
    if labels is not None:
        found.largest = tuple(labels) if isinstance(labels, list) else (labels,)
        if not found.largest or not all(type(label) is int for label in found.largest):
            raise refuse("applied_labels", "expected the numbers of labels")
    if not step.flag("independent", True) and (found.largest is None or len(set(found.largest)) > 1):
        raise refuse("independent", "is run for each label on its own, not on several as one")
    return "largest"
