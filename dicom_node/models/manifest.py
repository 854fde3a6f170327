"""The schema of `model.yaml`: every key a model package may have, and what is expected there.

Pure data and pydantic: unknown keys are refused, nothing is imported or evaluated. `package` reads files with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from dicom_node.models.schema import Block, CodedConcept, Finite, Positive, Slug, StorageClass, Text, Upper
from dicom_node.models.source import TRUST, Source

__all__ = [
    "ClassificationManifest",
    "ExpectedBlock",
    "FindingOutput",
    "LabelOutput",
    "Manifest",
    "OneOfBlock",
    "SegmentationManifest",
    "SelectBlock",
]


class IntendedUseBlock(Block):
    """What the model is for; goes into every result."""

    status: Literal["demonstration", "research", "clinical"]
    text: Annotated[Text, Field(min_length=1, max_length=200)]
    regulatory: Text = "none"
    limits: tuple[Text, ...] = ()


class OneOfBlock(Block):
    """An attribute must have one of `any`; `missing` says what its absence means."""

    any: Annotated[tuple[Upper, ...], Field(min_length=1)]
    missing: Literal["allow", "refuse"] = "refuse"


class GeometryBlock(Block):
    """What the volume must be like."""

    min_slices: Annotated[int, Field(ge=3)] = 3
    max_spacing_mm: Positive | None = None
    orientation: Literal["axial", "coronal", "sagittal"] | None = None
    max_obliquity_deg: Positive = 30.0
    min_coverage_mm: Positive | None = None
    regular: Literal["require", "repair"] = "require"


class ExcludeBlock(Block):
    """What the model must not see."""

    image_type: tuple[Upper, ...] = ()
    description_contains: tuple[str, ...] = ()


class SelectBlock(Block):
    """Which series the model takes; each clause that fails gives a reason."""

    modality: Annotated[tuple[str, ...], Field(min_length=1)]
    sop_class: tuple[StorageClass, ...] = ()
    body_part: OneOfBlock | None = None
    view: OneOfBlock | None = None
    geometry: GeometryBlock = GeometryBlock()
    exclude: ExcludeBlock = ExcludeBlock()


class IntensityBlock(Block):
    """Clip to `clip` (HU), then map that range linearly to `to`."""

    clip: tuple[Finite, Finite]
    to: tuple[Finite, Finite]

    @model_validator(mode="after")
    def _ascending(self) -> IntensityBlock:
        if not self.clip[0] < self.clip[1]:
            raise ValueError("clip: expected [lower, higher]")
        return self


class RangeBlock(Block):
    """Map `from` linearly to `to`; values beyond are mapped likewise, or held at the ends where `clip` says so."""

    source: tuple[Finite, Finite] = Field(alias="from")
    to: tuple[Finite, Finite]
    clip: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> RangeBlock:
        if self.source[0] == self.source[1]:
            raise ValueError("from: expected two different values")
        return self


class NormalizeBlock(Block):
    """Subtract the mean and divide by the standard deviation: those given, else those of the volume's own values.

    `nonzero`: zeros take no part, neither in the figures nor in the result. Where `input.first` is crop, those zeros of
    the images that lie around what they show; zeros enclosed by other values do take part (nnU-Net's
    use_mask_for_norm).
    """

    nonzero: bool = False
    mean: Finite | None = None
    std: Positive | None = None


class MinmaxBlock(Block):
    """Map the volume's own lowest and highest value to `to`."""

    to: tuple[Finite, Finite] = (0.0, 1.0)


class IntensityStep(Block):
    """One step over all values of the volume: exactly one of the keys."""

    range: RangeBlock | None = None
    clip: tuple[Finite, Finite] | None = None
    normalize: NormalizeBlock | None = None
    minmax: MinmaxBlock | None = None

    @model_validator(mode="after")
    def _one(self) -> IntensityStep:
        if len(self.model_fields_set) != 1:
            raise ValueError("expected exactly one of range, clip, normalize, minmax")
        return self


Intensity = Annotated[
    Annotated[IntensityBlock, Tag("mapping")] | Annotated[tuple[IntensityStep, ...], Field(max_length=8), Tag("steps")],
    Discriminator(lambda value: "steps" if isinstance(value, list | tuple) else "mapping"),
]


class CropBlock(Block):
    """Cut to the box around the values above `above` (MONAI's CropForeground), or around all that are not 0 where
    `nonzero` says so (nnU-Net's crop_to_nonzero); `margin` in voxels is kept around. A volume without any stays whole.
    """

    above: Finite = 0.0
    nonzero: bool = False
    margin: Annotated[int, Field(ge=0, le=512)] = 0

    @model_validator(mode="after")
    def _one(self) -> CropBlock:
        if self.nonzero and "above" in self.model_fields_set:
            raise ValueError("above: has no meaning where nonzero is true")
        return self


_PATIENT_AXIS = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}


class VolumeInputBlock(Block):
    """The grid and the values a segmentation network expects.

    `values` hu: only images in Hounsfield units are taken; any: the modality's own values after its rescale.
    `intensity`: one mapping, or steps done in their order. `first` resample: the volume is resampled, goes through the
    steps, then is cut to `crop`, as in MONAI's bundles. crop: as in nnU-Net, the images are cut, their stored voxels in
    the box go through the steps, whose own figures are those of these voxels, then they are resampled, from the box's
    first voxel on. What is cut away is background. `padding_hu`: what lies beyond the images; null, and the default for
    any: the volume's own lowest value; the default for hu: -1000.
    """

    orientation: Annotated[str, Field(pattern=r"^[RLAPSI]{3}$")] = "RAS"
    spacing_mm: tuple[Positive, Positive, Positive]
    mode: Literal["linear"] = "linear"
    values: Literal["hu", "any"] = "hu"
    intensity: Intensity
    crop: CropBlock | None = None
    first: Literal["resample", "crop"] = "resample"
    padding_hu: Finite | None = Field(default_factory=lambda given: -1000.0 if given.get("values") == "hu" else None)

    @model_validator(mode="after")
    def _three_axes(self) -> VolumeInputBlock:
        if len({_PATIENT_AXIS[letter] for letter in self.orientation}) != 3:
            raise ValueError("orientation: expected one letter of each pair R/L, A/P, S/I, e.g. RAS")
        return self


class RadiographInputBlock(Block):
    """A classification network's square input, made by `dicom_node.radiograph`.

    `prepare`: trimmed, fitted and standardised (radiograph), or as torchxrayvision's networks take it (xrv).
    `gate` frontal_chest: what `dicom_node.chest_gate` does not take for one is reported as not assessed.
    """

    prepare: Literal["radiograph", "xrv"] = "radiograph"
    size: Annotated[int, Field(ge=8, le=2048)]
    gate: Literal["none", "frontal_chest"] = "none"


class WindowsBlock(Block):
    """Sliding windows over the volume, in the network's voxels and axis order; null: the whole volume at once.

    They lie on MONAI's lattice and weigh alike (`blend` constant) or by its Gaussian (gaussian); `blend` nnunet is
    nnU-Net's lattice with its Gaussian. A volume smaller than the window is filled up evenly: `edge` replicate with its
    border, constant with `pad_value` (null: `input.padding_hu` through the intensity). `mirror`: axes along which the
    network also sees the volume reversed, every combination of them, the outputs averaged.
    """

    window: tuple[Annotated[int, Field(ge=8, le=512)], ...] | None
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    blend: Literal["gaussian", "constant", "nnunet"] = "gaussian"
    edge: Literal["constant", "replicate"] = "constant"
    pad_value: Finite | None = None
    mirror: Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(max_length=3)] = ()
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @model_validator(mode="after")
    def _three(self) -> WindowsBlock:
        if self.window is not None and len(self.window) != 3:
            raise ValueError("window: expected three sizes")
        _require_unique("mirror", list(self.mirror))
        return self


class BatchBlock(Block):
    """How images go through a classification network."""

    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class ExpectedBlock(Block):
    """Where an organ lies when it is there, told by another label that was found.

    Along the patient's long axis: from `below_mm` under the lowest to `above_mm` over the highest voxel of `near`.
    """

    near: str
    above_mm: Annotated[float, Field(ge=0)] = 0.0
    below_mm: Annotated[float, Field(ge=0)] = 0.0


class SegmentBlock(Block):
    """Codes of a segment (PS3.3 C.8.20.2)."""

    category: CodedConcept
    type: CodedConcept
    modifier: CodedConcept | None = None


class LabelOutput(Block):
    """One class of a segmentation network.

    `keep` and `min_ml` clean up on the network's grid: pieces smaller than `min_ml` are dropped, and all but the
    largest where `keep` says so (of equally large ones the last, along the network's axes, stays). `connectivity`: two
    voxels are of one piece where they share a face (1: 6 neighbours), also where only an edge (2: 18) or only a corner
    (3: 26), as MONAI's KeepLargestConnectedComponent counts. `expected`: without voxels the organ is reported Absent
    only if every label named there was found, uncut, and the scan covers the whole expected range; else Undetermined.
    `name` is what people call it ("Left kidney"), where that is not the meaning of the type's code.
    """

    index: Annotated[int, Field(ge=1, le=255)]
    key: Slug
    name: Annotated[Text, Field(max_length=64)] = ""
    color: tuple[int, int, int] | None = None
    segment: SegmentBlock
    keep: Literal["all", "largest_component"] = "all"
    connectivity: Literal[1, 2, 3] = 1
    min_ml: Annotated[float, Field(ge=0)] = 0.0
    expected: tuple[ExpectedBlock, ...] = ()


class LabelsBlock(Block):
    """What the classes of a segmentation network are; class 0 is background.

    `decide` argmax: the largest class; a number: class 1 where the only output is above it, after `activation`.
    `inverse` probability: probabilities are interpolated back to the source grid, then decided; labels: decided on the
    network's grid, and each source voxel takes the label of the nearest.
    """

    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    decide: Literal["argmax"] | Annotated[float, Field(ge=0, le=1)] = "argmax"
    inverse: Literal["probability", "labels"] = "probability"
    labels: Annotated[tuple[LabelOutput, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> LabelsBlock:
        if self.decide != "argmax" and self.activation == "softmax":
            raise ValueError("activation: a number in decide needs sigmoid, or none where the network has its own")
        _require_unique("index", [label.index for label in self.labels])
        keys = [label.key for label in self.labels]
        _require_unique("key", keys)
        for label in self.labels:
            for expected in label.expected:
                if expected.near not in keys or expected.near == label.key:
                    raise ValueError(f"expected.near: {expected.near!r} is no other label of this model")
        return self


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class FindingOutput(Block):
    """A finding and the output of a classification network that scores it; of several outputs, the largest counts.

    `assessed` false: always reported as not assessed; it may have no output.
    """

    index: Annotated[
        tuple[Annotated[int, Field(ge=0, le=4095)], ...], BeforeValidator(_several), Field(max_length=16)
    ] = ()
    key: Slug
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    code: CodedConcept
    threshold: Annotated[float, Field(ge=0, le=1)]
    assessed: bool = True
    site: CodedConcept | None = None

    @model_validator(mode="after")
    def _scored(self) -> FindingOutput:
        if self.assessed and not self.index:
            raise ValueError("index: is required; which output of the network scores it?")
        return self


class FindingsBlock(Block):
    """What the outputs of a classification network are. `activation` none: they are probabilities already."""

    activation: Literal["sigmoid", "none"] = "sigmoid"
    findings: Annotated[tuple[FindingOutput, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> FindingsBlock:
        _require_unique("index", [index for finding in self.findings for index in finding.index])
        _require_unique("key", [finding.key for finding in self.findings])
        return self


def _require_unique(name: str, values: list[Any]) -> None:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name} {twice[0]!r} is used twice")


class RuntimeBlock(Block):
    """Limits of one run in the runtime process."""

    timeout_s: Positive = 300.0


class MetricsBlock(Block):
    """Where the package keeps its measured figures."""

    file: Annotated[str, Field(pattern=r"^[\w][\w./ -]{0,200}$")]


class _Manifest(Block):
    schema_version: Literal[1] = Field(alias="schema")
    id: Slug
    version: Slug
    manufacturer: Annotated[Text, Field(min_length=1, max_length=64)] = "unknown"
    trust: Literal["data", "graph", "code"] = "data"
    source: Source
    intended_use: IntendedUseBlock
    select: SelectBlock
    runtime: RuntimeBlock = RuntimeBlock()
    metrics: MetricsBlock | None = None

    @model_validator(mode="after")
    def _trusted(self) -> _Manifest:
        if (needed := TRUST[self.source.format]) != self.trust:
            raise ValueError(
                f"trust: {self.trust!r}, but format {self.source.format!r} needs {needed!r}; say 'trust: {needed}'"
            )
        return self


class SegmentationManifest(_Manifest):
    """model.yaml of a network that labels voxels."""

    task: Literal["segmentation"]
    input: VolumeInputBlock
    infer: WindowsBlock
    output: LabelsBlock


class ClassificationManifest(_Manifest):
    """model.yaml of a network that scores findings on an image."""

    task: Literal["classification"]
    input: RadiographInputBlock
    infer: BatchBlock = BatchBlock()
    output: FindingsBlock


Manifest = SegmentationManifest | ClassificationManifest
