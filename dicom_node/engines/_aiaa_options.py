"""What `engines.NAME.options` may hold for a Clara Train AIAA server, and what the server's generations differ in."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, StringConstraints, field_validator, model_validator

from dicom_node.engines._http import HttpSettings, Options
from dicom_node.engines.labels import LabelTable
from dicom_node.engines.secrets import Secret

__all__ = ["AiaaOptions", "Api", "Concept", "DicomSource", "FindingOptions", "PointOptions", "PolygonOptions", "Voxel"]

MAX_POINTS = 1000

Api = Literal["segmentation", "inference", "dextr3d", "deepgrow"]
INTERACTIVE = ("dextr3d", "deepgrow")
_Index = Annotated[int, Field(ge=0, le=32767, strict=True)]
Voxel = tuple[_Index, _Index, _Index]
"""Column, row and slice of a voxel of the volume that is sent; slices ascend along the normal of the images."""
Voxels = Annotated[tuple[Voxel, ...], Field(max_length=MAX_POINTS)]


def _concept(value: Any) -> Any:
    """[scheme, code], as text or as YAML reads a number."""
    if isinstance(value, list | tuple) and len(value) in (2, 3):
        return tuple(str(part) for part in value[:2])
    raise ValueError("expected [scheme, value], or with a meaning after them")


Concept = Annotated[tuple[str, str], BeforeValidator(_concept)]
Concepts = Annotated[tuple[Concept, ...], Field(max_length=64)]
Ae = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=16, pattern=r"^[!-\[\]-~ ]+$")]


class PointOptions(Options):
    """Where points come from: written here, or out of a structured report of the study.

    With `source` sr it is the newest report that has points on these images; with kos, of those that the newest key
    object selection refers to. A point of a report is of the background when its concept name, or that of something it
    is contained in, is one of `background_concepts`; with `concepts` only points so named count for the foreground.
    """

    source: Literal["options", "sr", "kos"] = "options"
    points: Voxels = ()
    """Extreme points for dextr3d, at least six; foreground points for deepgrow."""
    background: Voxels = ()
    concepts: Concepts = ()
    background_concepts: Concepts = ()

    @model_validator(mode="after")
    def _one_source(self) -> PointOptions:
        if self.source == "options" and not self.points:
            raise ValueError("points: name at least one, or take them out of a report with source: sr or kos")
        if self.source != "options" and (self.points or self.background):
            raise ValueError("points and background are for source: options")
        return self


class DicomSource(Options):
    """How the server reaches this node to fetch a series by C-GET; the node must know its AE under `peers`."""

    server_address: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=253)]
    server_port: Annotated[int, Field(ge=1, le=65535)]
    ae_title: Ae
    query_level: Literal["SERIES", "STUDY", "PATIENT"] = "SERIES"
    """What the server asks for: with STUDY and PATIENT it is given more than the series."""


class PolygonOptions(Options):
    """The mask by way of polygons: mask2polygon, perhaps fixpolygon, and painted again on the images."""

    more_points: Annotated[int, Field(ge=0, le=1000)] = 10
    vertices: Literal["centres", "corners"] = "centres"
    """Where a vertex of whole numbers lies: on the centre of a pixel, whose outline is then in the mask; or on the
    corner, a pixel covering 0 to 1."""
    fix: Literal["off", "2d", "3d"] = "off"
    """Let fixpolygon fit them better: 2d, slice by slice on the picture; 3d, from the largest slice on the mask."""
    propagate_neighbor: Annotated[int, Field(ge=0, le=1000)] = 1
    propagate_neighbor_3d: Annotated[int, Field(ge=0, le=1000)] = 1
    min_overlap: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Dice coefficient with the mask the server painted first; less, and the answer is refused."""


class FindingOptions(Options):
    """What of the parameters of an answer are findings."""

    at: Annotated[str, StringConstraints(max_length=128)] = ""
    """The key, or keys joined by dots, under which they are; '': the parameters themselves."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    picture: bool = False
    """Send each image as an 8-bit PNG picture, for classifiers of radiographs, instead of the series as a volume."""


class AiaaOptions(HttpSettings):
    """What `engines.NAME.options` may hold beside the settings of HTTP."""

    read_timeout_s: float = Field(default=600.0, gt=0)
    """Longer than of other engines: it answers when it is done, and is silent until then."""
    server: Literal["3.x", "4.1"] = "4.1"
    """Generation of Clara Train: 3.x takes points as text, 4.1 as arrays."""
    api: Api | None = None
    """null: by the type of the model."""
    part: Literal["image", "datapoint"] = "image"
    """Name of the part the volume is sent in: `image` in the vendor's pages, `datapoint` in the vendor's Python client.
    Sessions always take `image`."""
    points_as: Literal["array", "string"] | None = None
    """null: by `server`."""
    output: Literal["image", "both"] | None = None
    """image: the mask alone is asked for; both: parameters and mask, as two parts. null: both where `findings` are to
    be read, else image."""
    crop: bool = True
    """For dextr3d send the box around the points, on the grid the model tells, as the vendor's clients do; false, and
    with a session: the whole volume."""
    current_point: bool = False
    """Send the last foreground point as `current_point` too, as the vendor's viewers do with deepgrow."""
    points: PointOptions | None = None
    polygons: PolygonOptions | None = None
    findings: FindingOptions | None = None
    session: Literal["none", "upload", "dicom"] = "none"
    """upload: put the volume as a session first, which outlasts a retry; dicom: the server fetches the series from this
    node, see `dicom`."""
    session_expiry_s: int | None = Field(default=None, ge=1, le=86400)
    """null: what the server thinks right."""
    dicom: DicomSource | None = None
    send_identifiable: bool = False
    """Send also images that may name the patient in their pixels, and let the server fetch the series by C-GET."""
    token: Secret | None = None
    """Sent as bearer token where a proxy before the server asks for one; the server itself knows none."""
    values: Literal["auto", "hu", "any"] = "auto"
    """What voxels are: Hounsfield units, or rescaled values of any unit. auto: HU of CT, any of the rest."""
    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Parameters of the model, sent with each inference."""
    labels: LabelTable = LabelTable()
    """What its labels are, by number or name, before what the server says."""
    manufacturer: str = Field(default="NVIDIA", min_length=1, max_length=64)
    """Of the model, as results tell it."""
    notice: str = Field(default="", max_length=1024)
    """What every result says of its use."""

    @field_validator("params")
    @classmethod
    def _finite(cls, params: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(params, allow_nan=False)
        return params

    @model_validator(mode="after")
    def _fit_together(self) -> AiaaOptions:
        if (self.session == "dicom") != (self.dicom is not None):
            raise ValueError("dicom: says how the server reaches this node, and goes with session: dicom")
        if self.session == "dicom" and (self.points is not None or self.polygons is not None):
            raise ValueError(
                "session: dicom goes with neither points nor polygons: the server makes the volume itself, and where "
                "its voxels lie is not known here; use session: upload"
            )
        if self.api in INTERACTIVE and self.points is None:
            raise ValueError(f"points: {self.api} needs them; say where they come from")
        if self.findings is not None and (self.polygons is not None or self.points is not None):
            raise ValueError("findings go with neither points nor polygons: those are of masks")
        if self.findings is not None and self.output == "image":
            raise ValueError("output: with image alone the server tells no findings; leave it out")
        if self.findings is not None and self.findings.picture and self.session != "none":
            raise ValueError("findings.picture goes with session: none; each picture is sent by itself")
        if self.points is not None and self.api == "dextr3d" and 0 < len(self.points.points) < 6:
            raise ValueError("points: dextr3d needs at least six extreme points, two for each axis")
        return self

    @property
    def asked_output(self) -> str:
        """The `output` of inferences in their URL, '' for none."""
        return "" if self.output == "both" or self.findings is not None else "image"

    @property
    def points_are_text(self) -> bool:
        """Whether points are sent as a text that holds the array."""
        return self.points_as == "string" or (self.points_as is None and self.server == "3.x")
