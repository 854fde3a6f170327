"""What engines say, as values: label volumes, findings, measurements, surfaces, pictures, annotations.

Frozen, in the Standard's words, in the patient's or the slide's coordinates; encoders (`interfaces.ResultEncoder`) turn
them into DICOM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from dicom_node.model import StoredInstance


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A coded concept (PS3.3 8.8): value, scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which algorithm spoke; goes into every result (IHE AIR 6.5.3.1 equalities).

    `device_uid` changes whenever model, version, weights or configuration do.
    """

    name: str
    version: str
    manufacturer: str
    device_uid: str
    weights_sha256: str
    config_sha256: str
    family: Code = Code(value="123110", scheme="DCM", meaning="Artificial Intelligence")
    parameters: tuple[str, ...] = ()
    demonstration: bool = False
    notice: str = ""  # e.g. "demonstration, trained on synthetic phantoms, not for clinical use"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One label of a label volume. `number` is its value in the array, >= 1."""

    number: int
    key: str
    label: str
    category: Code
    type: Code
    modifier: Code | None = None
    color_rgb: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelVolume:
    """Labels on the source grid: `labels[i]` belongs to the image `sop_instance_uids[i]` (rows x columns, uint8).

    Slice identity, not position, ties planes to sources; planes are sorted along the normal, ascending. `segments`
    lists what the model looks for, found or not; `notes` tell repairs ("interpolated slices") that results must carry.
    Of multi-frame images, `frame_numbers[i]` (from 1) is the frame `labels[i]` belongs to; else it is empty.
    """

    labels: npt.NDArray[np.uint8]
    sop_instance_uids: tuple[str, ...]
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    frame_numbers: tuple[int, ...] = ()


class Presence(Enum):
    """Whether a finding or organ is there; UNDETERMINED when the input does not let the model say."""

    PRESENT = "present"
    ABSENT = "absent"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding. `confidence` 0..1 is the model's certainty that it is *present*; None if not assessed."""

    key: str
    name: str
    code: Code
    presence: Presence
    confidence: float | None
    threshold: float | None = None
    site: Code | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Findings on one image, all of them, absent ones too."""

    sop_instance_uid: str
    items: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMeasurement:
    """Volume (cm3) and mean attenuation (HU) of one segment; both None when `presence` is not PRESENT."""

    segment: Segment
    presence: Presence
    volume_cm3: float | None
    mean_hu: float | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Measurements on the segments of the label volume in the same result."""

    items: tuple[SegmentMeasurement, ...]
    notes: tuple[str, ...] = ()


# --- what engines elsewhere bring beside label volumes and findings ------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A closed surface in the patient coordinate system (LPS, mm) of the series the engine saw.

    `vertices` n x 3 float32, `triangles` m x 3 (indices into `vertices`, counter-clockwise from outside). `segments`
    are the structures the surface encloses, at least one; `title` a word or two for people.
    """

    vertices: npt.NDArray[np.float32]
    triangles: npt.NDArray[np.uint32]
    title: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture about one image, for looking at only: rows x columns (grey) or rows x columns x 3 (RGB), uint8."""

    pixels: npt.NDArray[np.uint8]
    sop_instance_uid: str
    title: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A PDF about some images. It may name the patient: it goes nowhere but into the archive."""

    pdf: bytes = field(repr=False)
    sop_instance_uids: tuple[str, ...]
    title: str


class GraphicType(Enum):
    """How the coordinates of an annotation are meant (PS3.3 C.37.1.2)."""

    POINT = "POINT"
    POLYLINE = "POLYLINE"
    POLYGON = "POLYGON"  # closed: the first point is not said again


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationGroup:
    """Annotations of one kind: each shape is n x 2, column and row in pixels of the total pixel matrix, whose first
    pixel's upper left corner is 0, 0 (PS3.3 C.37.1.2). `confidences`, if any, are 0..1, one for each shape.
    """

    label: str
    category: Code
    type: Code
    graphic_type: GraphicType
    shapes: tuple[npt.NDArray[np.float64], ...]
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """Annotations on the slide image `sop_instance_uid` (the level of most pixels)."""

    sop_instance_uid: str
    groups: tuple[AnnotationGroup, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideLabels:
    """A label map over the whole of a slide image: rows x columns, uint8.

    It covers exactly the extent of the total pixel matrix of `sop_instance_uid`, in fewer, larger pixels or as many.
    `segments` lists what is looked for, found or not.
    """

    labels: npt.NDArray[np.uint8]
    sop_instance_uid: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number about some images: what it is, its value and its unit (UCUM)."""

    code: Code
    value: float
    unit: Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantities:
    """Numbers about the images `sop_instance_uids`, in the order the engine gave them."""

    sop_instance_uids: tuple[str, ...]
    items: tuple[Quantity, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnedInstances:
    """Objects the engine stored in the node itself, in sending order: in the archive already, they become the job's
    results as they are.

    `copies` stand for them, one each, when they came under UIDs of the job: the same objects with the study's own UIDs
    and patient, which are kept instead. Each has file meta information with its transfer syntax.
    """

    instances: tuple[StoredInstance, ...]
    copies: tuple[Dataset, ...] = field(default=(), repr=False, compare=False)


# Closed union: an engine answers with these and nothing else.
ResultValue = (
    LabelVolume
    | Findings
    | Measurements
    | Mesh
    | Picture
    | Document
    | Annotations
    | SlideLabels
    | Quantities
    | ReturnedInstances
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """What an engine says about one task."""

    values: tuple[ResultValue, ...]
    provenance: Provenance
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # load, prepare, infer, finish: for metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The engine works on; ask again with `handle` after `poll_after_s` seconds."""

    handle: str
    poll_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultContext:
    """What an encoder needs beside the values: everything that makes the object deterministic.

    `run_key` names the job: the same key gives the same UIDs and the same bytes. `tracking_key` names the model and the
    series only, so that tracking UIDs outlast a new run, a new version and late images. `predecessors` are the
    results of the run this one follows.
    """

    run_key: str
    tracking_key: str
    run_number: int
    created_at: datetime
    time_zone: str  # "+HHMM" used when the source has no (0008,0201)
    provenance: Provenance
    node_name: str
    predecessors: tuple[StoredInstance, ...] = ()
