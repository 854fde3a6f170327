"""What the KServe adapter is told: how a server is reached, and the recipe of one model on it.

A server of the Open Inference Protocol takes tensors and knows nothing of images, so the configuration says what is to
be made of a series before, and of the tensors after. Words and rules are those of `model.yaml`. Pure data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dicom_node.engines._http import HttpSettings, Options
from dicom_node.engines._kserve_wire import BINARY_ONLY
from dicom_node.engines.labels import Coded, LabelTable
from dicom_node.engines.secrets import Secret

__all__ = [
    "FindingRow",
    "Intensity",
    "KServeOptions",
    "RadiographRecipe",
    "Step",
    "VolumeInput",
    "VolumeOutput",
    "VolumeRecipe",
    "Windows",
]

MAX_CLASSES = 256  # background and what a segmentation of 8 bits holds

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TensorName = Annotated[str, Field(min_length=1, max_length=256)]
Real = Literal["FP64", "FP32", "FP16", "BF16", "INT64", "INT32", "INT16", "INT8", "UINT32", "UINT16", "UINT8"]
Share = Annotated[float, Field(ge=0, le=1)]


def _layout(spatial: str) -> AfterValidator:
    """Letters of a tensor's axes: the spatial ones, in any order, and N (batch) and C (channel) or not."""

    def check(value: str) -> str:
        letters = sorted(value.replace("N", "").replace("C", ""))
        if letters != sorted(spatial) or len(set(value)) != len(value):
            raise ValueError(f"expected each of {', '.join(spatial)} once, with N and C where the tensor has them")
        if "N" in value and value[0] != "N":
            raise ValueError("N (the batch) comes first")
        return value

    return AfterValidator(check)


VolumeLayout = Annotated[str, _layout("DHW")]
ImageLayout = Annotated[str, _layout("HW")]

# --- values ----------------------------------------------------------------------------------------------------------


class RangeStep(Options):
    """Map `from` linearly to `to`; values beyond are mapped likewise, or held at the ends where `clip` says so."""

    source: tuple[Finite, Finite] = Field(alias="from")
    to: tuple[Finite, Finite]
    clip: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> RangeStep:
        if self.source[0] == self.source[1]:
            raise ValueError("from: expected two different values")
        return self


class NormalizeStep(Options):
    """Subtract the mean, divide by the standard deviation: those given, else those of the volume's own values."""

    mean: Finite | None = None
    std: Positive | None = None


class Step(Options):
    """One step over all values: exactly one of the keys. `minmax`: the volume's own lowest and highest value, to."""

    range: RangeStep | None = None
    clip: tuple[Finite, Finite] | None = None
    normalize: NormalizeStep | None = None
    minmax: tuple[Finite, Finite] | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1 or all(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("expected exactly one of range, clip, normalize, minmax")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError("clip: expected [lower, higher]")
        return self


def _steps(value: Any) -> Any:
    """{clip: [a, b], to: [c, d]}, a window, is short for one step."""
    if isinstance(value, Mapping) and set(value) == {"clip", "to"}:
        return ({"range": {"from": value["clip"], "to": value["to"], "clip": True}},)
    return value


Intensity = Annotated[tuple[Step, ...], BeforeValidator(_steps), Field(max_length=8)]

# --- volumes ---------------------------------------------------------------------------------------------------------

_PATIENT_AXIS = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}


def _orientation(value: str) -> str:
    if sorted(_PATIENT_AXIS.get(letter, "") for letter in value) != ["x", "y", "z"]:
        raise ValueError("expected one letter of each pair R/L, A/P, S/I, e.g. RAS")
    return value


class VolumeInput(Options):
    """The tensor a segmentation model takes.

    `layout`: its axes. `orientation`, `spacing_mm` and `windows.window` are in the order of D, H, W: `orientation`
    says towards where in the patient each of them runs. `values` hu: only images in Hounsfield units are taken; any:
    the modality's own after their rescale. `padding`: what lies beyond the images, before `intensity`; null: -1000 for
    hu, the volume's own lowest value for any.
    """

    name: TensorName
    datatype: Real = "FP32"
    layout: VolumeLayout = "NCDHW"
    orientation: Annotated[str, AfterValidator(_orientation)] = "RAS"
    spacing_mm: tuple[Positive, Positive, Positive]
    values: Literal["hu", "any"] = "hu"
    intensity: Intensity = ()
    padding: Finite | None = None


class Windows(Options):
    """Sliding windows over the volume, on MONAI's lattice, `batch` of them in a request.

    They weigh alike (`blend` constant) or by MONAI's Gaussian. A volume smaller than the window is filled up evenly.
    """

    window: tuple[
        Annotated[int, Field(ge=8, le=1024)], Annotated[int, Field(ge=8, le=1024)], Annotated[int, Field(ge=8, le=1024)]
    ]
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    blend: Literal["gaussian", "constant"] = "gaussian"
    batch: Annotated[int, Field(ge=1, le=64)] = 1


class VolumeOutput(Options):
    """The tensor a segmentation model answers with, and what its classes are; class 0 is background.

    `decide` argmax: the largest class, after `activation`. A number, or one for each channel: channel n is label n + 1,
    where it is at least that after `activation`; where several are, the one that is furthest above its own. labels: the
    tensor holds labels already, and has no channels or one.

    `inverse` probability: what decides is interpolated (trilinearly) back to the grid of the images, then decided
    there: borders keep the precision of the scores. labels: decided on the model's grid, and each pixel takes the label
    of the nearest voxel; labels in whole numbers cannot be interpolated, so `decide` labels needs it.
    """

    name: TensorName
    layout: VolumeLayout = "NCDHW"
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    decide: Literal["argmax", "labels"] | Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=255)] = (
        "argmax"
    )
    inverse: Literal["probability", "labels"] = "probability"
    labels: LabelTable
    """What the classes are, by number."""

    @model_validator(mode="before")
    @classmethod
    def _labels_are_nearest(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("decide") == "labels":
            return {"inverse": "labels", **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> VolumeOutput:
        most = len(self.thresholds) or MAX_CLASSES - 1
        if not self.labels.values() or not all(
            key.isascii() and key.isdigit() and 1 <= int(key[:6]) <= most for key in self.labels.root
        ):
            raise ValueError(f"labels: expected numbers of classes, 1 to {most}, each with its row")
        if len(self.thresholds) > 1 and "C" not in self.layout:
            raise ValueError("layout: several thresholds are for channels, and the layout has no C")
        if self.decide == "argmax" and "C" not in self.layout:
            raise ValueError("layout: argmax decides between classes, and the layout has no C")
        if self.decide == "labels" and (self.activation != "none" or self.inverse != "labels"):
            raise ValueError("decide: labels are taken as they are, with activation none and inverse labels")
        if self.decide not in ("argmax", "labels") and self.activation == "softmax":
            raise ValueError("activation: a number in decide needs sigmoid, or none where the model has its own")
        return self

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of the channels; empty where no threshold decides."""
        if isinstance(self.decide, str):
            return ()
        return self.decide if isinstance(self.decide, tuple) else (self.decide,)


class VolumeRecipe(Options):
    """A series of slices in, labels out. `windows` null: the whole volume in one request."""

    input: VolumeInput
    windows: Windows | None
    output: VolumeOutput
    max_memory_bytes: Annotated[int, Field(gt=0)] = 4 * 1024**3
    """Of the volume on the model's grid, and of the scores that are blended; a series that needs more is refused."""

    @model_validator(mode="after")
    def _consistent(self) -> VolumeRecipe:
        several = self.windows is not None and self.windows.batch > 1
        if several and not ("N" in self.input.layout and "N" in self.output.layout):
            raise ValueError("windows.batch: more than 1 needs a layout with N, of input and output")
        return self


# --- radiographs -----------------------------------------------------------------------------------------------------


class FindingRow(Options):
    """One finding: where its score stands, from where on it counts as present, what it is.

    `index`: of the output's values, counted as they lie in memory. `code` is [scheme, value, meaning]; without it the
    finding keeps its name in the node's private scheme.
    """

    output: TensorName | None = None
    index: Annotated[int, Field(ge=0, le=65535)]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    code: Coded | None = None
    threshold: Share


def _keys(value: Mapping[str, FindingRow]) -> Mapping[str, FindingRow]:
    for key in value:
        if not (key.isascii() and key.replace("_", "").replace("-", "").isalnum() and len(key) <= 48):
            raise ValueError("expected keys of at most 48 letters, digits, '-' or '_'")
    return value


class RadiographInput(Options):
    """The tensor a classification model takes: one image, or a batch of one.

    `prepare` fitted: borders trimmed, the rest averaged to fit a square, mean 0 and deviation 1 where there is picture.
    range: the middle square, averaged, its darkest value `range[0]` and its brightest `range[1]` (bright is dense).
    `size`: of the square. `channels`: how often the picture is repeated. `mean`, `std`: one for each channel, taken off
    and divided by at the end.
    """

    name: TensorName
    datatype: Real = "FP32"
    layout: ImageLayout = "NCHW"
    size: Annotated[int, Field(ge=8, le=2048)]
    prepare: Literal["fitted", "range"] = "range"
    range: tuple[Finite, Finite] = (0.0, 1.0)
    channels: Annotated[int, Field(ge=1, le=4)] = 1
    mean: tuple[Finite, ...] = ()
    std: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> RadiographInput:
        if self.range[0] == self.range[1]:
            raise ValueError("range: expected two different values")
        if "C" not in self.layout and self.channels != 1:
            raise ValueError("channels: the layout has no C")
        if any(len(given) not in (0, self.channels) for given in (self.mean, self.std)):
            raise ValueError("mean, std: expected one value for each channel")
        return self


class RadiographRecipe(Options):
    """Radiographs in, each on its own, findings out. `views`: those that are sent (View Position); empty: all.

    `gate` frontal_chest: of a picture that does not look like one nothing is sent, and nothing is reported as assessed.
    """

    input: RadiographInput
    output: TensorName
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    findings: Annotated[dict[str, FindingRow], AfterValidator(_keys), Field(min_length=1, max_length=256)]
    views: tuple[str, ...] = ()
    view_missing: Literal["refuse", "allow"] = "refuse"
    gate: Literal["none", "frontal_chest"] = "none"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output that is asked for, once."""
        return tuple(dict.fromkeys(row.output or self.output for row in self.findings.values()))


# --- the engine ------------------------------------------------------------------------------------------------------


class KServeOptions(HttpSettings):
    """What `engines.NAME.options` may hold beside the settings of HTTP: exactly one of `volume` and `radiograph`."""

    token: Secret | None = None
    """Sent as `Authorization: Bearer <token>`."""
    authorization: Secret | None = None
    """The whole value of the header `Authorization`, where it is no bearer token."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Of the model; '': the one the server thinks right. Name one where results have to stay the same."""
    request_timeout_s: Positive = 120.0
    """Of one request; `engines.NAME.timeout_s` is of the series."""
    tensors: Literal["auto", "binary", "json"] = "auto"
    """How they travel. auto: binary where the server says it knows the extension binary_tensor_data."""
    send_identifiable: bool = False
    """Send also images that may name the patient in their pixels."""
    manufacturer: Annotated[str, Field(min_length=1, max_length=64)] = "unknown"
    """Of the model, as results tell it."""
    notice: Annotated[str, Field(max_length=1024)] = ""
    """What every result says of its use."""
    volume: VolumeRecipe | None = None
    radiograph: RadiographRecipe | None = None

    @model_validator(mode="after")
    def _consistent(self) -> KServeOptions:
        if (self.volume is None) == (self.radiograph is None):
            raise ValueError("expected exactly one of volume and radiograph")
        if self.token is not None and self.authorization is not None:
            raise ValueError("give token or authorization, not both")
        if self.tensors == "json" and self.recipe.input.datatype in BINARY_ONLY:
            raise ValueError(f"tensors: {self.recipe.input.datatype} travels in binary only")
        return self

    @property
    def recipe(self) -> VolumeRecipe | RadiographRecipe:
        """The one there is."""
        found = self.volume or self.radiograph
        assert found is not None
        return found
