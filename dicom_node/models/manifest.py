"""The schema of `model.yaml`: every key a model package may have, and what is expected there.

Pure data and pydantic: unknown keys are refused, nothing is imported or evaluated. `package` reads files with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydicom import uid as uids
from pydicom.uid import UID

from dicom_node.model import Code

__all__ = [
    "NETWORKS",
    "ClassificationManifest",
    "ExpectedBlock",
    "FindingOutput",
    "LabelOutput",
    "Manifest",
    "OneOfBlock",
    "SegmentationManifest",
    "SelectBlock",
]

# Exact names: networks whose constructors take plain values, run nothing of the package and fetch nothing.
NETWORKS = frozenset(
    {"AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DenseNet", "DynUNet", "ResNet", "SegResNet"}
    | {"SwinUNETR", "UNETR", "UNet", "VNet"}
)


def _slug(value: str) -> str:
    allowed = value.replace("-", "").replace("_", "").replace(".", "")
    if not (value and allowed.isascii() and allowed.isalnum() and len(value) <= 64):
        raise ValueError("expected 1 to 64 letters, digits, '-', '_' or '.'")
    return value


def _plain(value: Any) -> Any:
    """Numbers, texts, booleans, null, and lists and mappings of them; nothing a constructor could be tricked with."""
    if isinstance(value, Mapping):
        return {_text_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 1024:
            raise ValueError("expected at most 1024 values in a list")
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | str | float) or (isinstance(value, int) and abs(value) <= 65536):
        return value
    raise ValueError(f"expected plain values, integers within +-65536; got {value!r}")


def _text_key(key: Any) -> str:
    if not isinstance(key, str) or key.startswith("_") or key in ("pretrained", "progress"):
        raise ValueError(f"{key!r} is no argument a package may set")
    return key


def _code(value: Any) -> Any:
    """[scheme, value, meaning] as people write it."""
    if isinstance(value, list | tuple):
        if len(value) != 3 or not all(isinstance(part, str) and 0 < len(part) <= 64 for part in value):
            raise ValueError("expected [scheme, value, meaning], three texts of at most 64 characters")
        return Code(scheme=value[0], value=value[1], meaning=value[2])
    return value


def _storage_class(value: str) -> str:
    uid = UID(value) if value[:1].isdigit() else _uid_named(value)
    if not uid.is_valid:
        raise ValueError(f"{value!r} is no SOP Class UID or keyword such as CTImageStorage")
    return str(uid)


def _uid_named(keyword: str) -> UID:
    found = getattr(uids, keyword, None)
    return found if isinstance(found, UID) else UID("")


Slug = Annotated[str, AfterValidator(_slug)]
PlainArgs = Annotated[dict[str, Any], AfterValidator(_plain)]
CodedConcept = Annotated[Code, BeforeValidator(_code)]
StorageClass = Annotated[str, AfterValidator(_storage_class)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Upper = Annotated[str, AfterValidator(str.upper)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class NetworkBlock(_Block):
    """A network of monai.networks.nets by its exact name, with plain arguments."""

    name: str
    args: PlainArgs = {}

    @model_validator(mode="after")
    def _allowed(self) -> NetworkBlock:
        if self.name not in NETWORKS:
            raise ValueError(f"{self.name!r} is not on the list of networks: {', '.join(sorted(NETWORKS))}")
        return self


class SourceBlock(_Block):
    """Where the weights are and what they fit."""

    format: Literal["state_dict"]
    path: str
    sha256: Digest
    network: NetworkBlock

    @model_validator(mode="after")
    def _inside(self) -> SourceBlock:
        path = Path(self.path)
        if path.is_absolute() or ".." in path.parts or path.suffix not in (".safetensors", ".pt", ".pth"):
            raise ValueError("path: expected a .safetensors, .pt or .pth file inside the package folder")
        return self


class IntendedUseBlock(_Block):
    """What the model is for; goes into every result."""

    status: Literal["demonstration", "research", "clinical"]
    text: Annotated[str, Field(min_length=1, max_length=200)]
    regulatory: str = "none"
    limits: tuple[str, ...] = ()


class OneOfBlock(_Block):
    """An attribute must have one of `any`; `missing` says what its absence means."""

    any: Annotated[tuple[Upper, ...], Field(min_length=1)]
    missing: Literal["allow", "refuse"] = "refuse"


class GeometryBlock(_Block):
    """What the volume must be like."""

    min_slices: Annotated[int, Field(ge=3)] = 3
    max_spacing_mm: Positive | None = None
    orientation: Literal["axial", "coronal", "sagittal"] | None = None
    max_obliquity_deg: Positive = 30.0
    min_coverage_mm: Positive | None = None
    regular: Literal["require"] = "require"


class ExcludeBlock(_Block):
    """What the model must not see."""

    image_type: tuple[Upper, ...] = ()
    description_contains: tuple[str, ...] = ()


class SelectBlock(_Block):
    """Which series the model takes; each clause that fails gives a reason."""

    modality: Annotated[tuple[str, ...], Field(min_length=1)]
    sop_class: tuple[StorageClass, ...] = ()
    body_part: OneOfBlock | None = None
    view: OneOfBlock | None = None
    geometry: GeometryBlock = GeometryBlock()
    exclude: ExcludeBlock = ExcludeBlock()


class IntensityBlock(_Block):
    """Clip to `clip` (HU), then map that range linearly to `to`."""

    clip: tuple[Finite, Finite]
    to: tuple[Finite, Finite]

    @model_validator(mode="after")
    def _ascending(self) -> IntensityBlock:
        if not self.clip[0] < self.clip[1]:
            raise ValueError("clip: expected [lower, higher]")
        return self


_PATIENT_AXIS = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}


class VolumeInputBlock(_Block):
    """The grid and the values a segmentation network expects."""

    orientation: Annotated[str, Field(pattern=r"^[RLAPSI]{3}$")] = "RAS"
    spacing_mm: tuple[Positive, Positive, Positive]
    mode: Literal["linear"] = "linear"
    intensity: IntensityBlock
    padding_hu: Finite = -1000.0

    @model_validator(mode="after")
    def _three_axes(self) -> VolumeInputBlock:
        if len({_PATIENT_AXIS[letter] for letter in self.orientation}) != 3:
            raise ValueError("orientation: expected one letter of each pair R/L, A/P, S/I, e.g. RAS")
        return self


class RadiographInputBlock(_Block):
    """A classification network's square input, made by `dicom_node.radiograph`.

    `prepare`: trimmed, fitted and standardised (radiograph), or as torchxrayvision's networks take it (xrv).
    `gate` frontal_chest: what `dicom_node.chest_gate` does not take for one is reported as not assessed.
    """

    prepare: Literal["radiograph", "xrv"] = "radiograph"
    size: Annotated[int, Field(ge=8, le=2048)]
    gate: Literal["none", "frontal_chest"] = "none"


class WindowsBlock(_Block):
    """Sliding windows over the volume, in the network's voxels and axis order."""

    window: tuple[Annotated[int, Field(ge=8, le=512)], ...]
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    blend: Literal["gaussian", "constant"] = "gaussian"
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @model_validator(mode="after")
    def _three(self) -> WindowsBlock:
        if len(self.window) != 3:
            raise ValueError("window: expected three sizes")
        return self


class BatchBlock(_Block):
    """How images go through a classification network."""

    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class ExpectedBlock(_Block):
    """Where an organ lies when it is there, told by another label that was found.

    Along the patient's long axis: from `below_mm` under the lowest to `above_mm` over the highest voxel of `near`.
    """

    near: str
    above_mm: Annotated[float, Field(ge=0)] = 0.0
    below_mm: Annotated[float, Field(ge=0)] = 0.0


class SegmentBlock(_Block):
    """Codes of a segment (PS3.3 C.8.20.2)."""

    category: CodedConcept
    type: CodedConcept
    modifier: CodedConcept | None = None


class LabelOutput(_Block):
    """One class of a segmentation network.

    `keep` and `min_ml` clean up on the network's grid: pieces (6-connected) smaller than `min_ml` are dropped, and all
    but the largest where `keep` says so. `expected`: without voxels the organ is reported Absent only if every
    label named there was found, uncut, and the scan covers the whole expected range; else Undetermined.
    """

    index: Annotated[int, Field(ge=1, le=255)]
    key: Slug
    color: tuple[int, int, int] | None = None
    segment: SegmentBlock
    keep: Literal["all", "largest_component"] = "all"
    min_ml: Annotated[float, Field(ge=0)] = 0.0
    expected: tuple[ExpectedBlock, ...] = ()


class LabelsBlock(_Block):
    """What the classes of a segmentation network are; class 0 is background."""

    activation: Literal["softmax"] = "softmax"
    labels: Annotated[tuple[LabelOutput, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> LabelsBlock:
        _require_unique("index", [label.index for label in self.labels])
        keys = [label.key for label in self.labels]
        _require_unique("key", keys)
        for label in self.labels:
            for expected in label.expected:
                if expected.near not in keys or expected.near == label.key:
                    raise ValueError(f"expected.near: {expected.near!r} is no other label of this model")
        return self


class FindingOutput(_Block):
    """One output of a classification network. `assessed` false: always reported as not assessed."""

    index: Annotated[int, Field(ge=0, le=4095)]
    key: Slug
    name: Annotated[str, Field(min_length=1, max_length=64)]
    code: CodedConcept
    threshold: Annotated[float, Field(ge=0, le=1)]
    assessed: bool = True
    site: CodedConcept | None = None


class FindingsBlock(_Block):
    """What the outputs of a classification network are."""

    activation: Literal["sigmoid"] = "sigmoid"
    findings: Annotated[tuple[FindingOutput, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> FindingsBlock:
        _require_unique("index", [finding.index for finding in self.findings])
        _require_unique("key", [finding.key for finding in self.findings])
        return self


def _require_unique(name: str, values: list[Any]) -> None:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name} {twice[0]!r} is used twice")


class RuntimeBlock(_Block):
    """Limits of one run in the runtime process."""

    timeout_s: Positive = 300.0


class MetricsBlock(_Block):
    """Where the package keeps its measured figures."""

    file: str


def _only_data(value: Any) -> Any:
    if value in ("graph", "code"):
        raise ValueError(
            f"{value!r} packages are not run yet: they come with the TorchScript, ONNX and code formats; only 'data' is"
        )
    return value


class _Manifest(_Block):
    schema_version: Literal[1] = Field(alias="schema")
    id: Slug
    version: Slug
    manufacturer: Annotated[str, Field(min_length=1, max_length=64)] = "unknown"
    trust: Annotated[Literal["data"], BeforeValidator(_only_data)] = "data"
    source: SourceBlock
    intended_use: IntendedUseBlock
    select: SelectBlock
    runtime: RuntimeBlock = RuntimeBlock()
    metrics: MetricsBlock | None = None


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
