"""Studies that fill, series that are closed, and what rules say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from dicom_node.model.instances import BootTime, Origin, Source

__all__ = [
    "AssociationEnd",
    "CloseTrigger",
    "Condition",
    "ConditionResult",
    "FeedingAssociation",
    "LatePolicy",
    "PlannedJob",
    "Priority",
    "SendWhat",
    "SeriesHeader",
    "SeriesView",
    "StudyActivity",
    "Verdict",
]


class AssociationEnd(Enum):
    """How an association ended; only RELEASED lets a study become quiet quickly (DESIGN section 5)."""

    OPEN = "open"
    RELEASED = "released"  # or closed by the node when it was idle, which is no fault
    ABORTED = "aborted"  # A-ABORT, lost connection, time-out inside a message
    DEAD = "dead"  # its process died; closed at the next start


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedingAssociation:
    """An association that fed a study, as completion sees it."""

    association_id: str
    calling_ae_title: str
    end: AssociationEnd
    last_activity: BootTime
    store_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyActivity:
    """What completion needs of one open study revision."""

    study_instance_uid: str
    revision: int
    first_received: BootTime
    last_received: BootTime
    associations: tuple[FeedingAssociation, ...]
    modalities: frozenset[str]
    pending_series: tuple[str, ...]  # series with images not yet routed, of this revision
    instance_count: int
    immediate_series: tuple[str, ...] = ()  # single-image CR / DX / MG series among the pending ones
    received_seq: Mapping[str, int] = field(default_factory=dict)  # per pending series: tells a later image apart
    again: bool = False  # by a person: run again what was already run


class CloseTrigger(Enum):
    """Why a study revision was closed."""

    IDLE = "idle"
    FORCED = "forced"
    IMMEDIATE = "immediate"
    OPERATOR = "operator"  # `dicom-node route`


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesHeader:
    """The headers of one series, read from its files at completion and kept in the catalog.

    `values`: DICOM keyword to the distinct values seen in the series' instances, in order of first appearance; values
    are JSON-ready (text, numbers, lists for multi-valued elements, dictionaries by keyword for sequence items).
    `missing_in`: keyword to the number of instances lacking it (only for keywords some instance has).
    `geometry`: one dictionary per instance with SOPInstanceUID, SOPClassUID, InstanceNumber, ImagePositionPatient,
    ImageOrientationPatient, PixelSpacing, Rows, Columns, NumberOfFrames, ImageType, FrameOfReferenceUID where present.
    `distinct_counts`: only for keywords with more distinct values than `values` keeps, how many there are.
    """

    series_instance_uid: str
    instance_count: int
    values: Mapping[str, tuple[Any, ...]]
    missing_in: Mapping[str, int] = field(default_factory=dict)
    geometry: tuple[Mapping[str, Any], ...] = ()
    distinct_counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesView:
    """One series with its study at hand: what a rule is evaluated on."""

    study_instance_uid: str
    revision: int
    header: SeriesHeader
    source: Source
    origins: frozenset[Origin]
    study_series_count: int
    study_instance_count: int
    study_modalities: tuple[str, ...]
    received_at: datetime
    identity_conflict: bool = False


class Condition(Enum):
    """How one condition of a rule ended; there is no silent non-match."""

    TRUE = "true"
    FALSE = "false"
    MISSING = "missing"
    MIXED = "mixed"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionResult:
    """One condition, how it ended, the values it saw and what would change it."""

    expression: str
    outcome: Condition
    values: Mapping[str, Any]
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one rule said about one series. `matched` false always has a `reason`."""

    rule: str
    series_instance_uid: str
    matched: bool
    reason: str
    conditions: tuple[ConditionResult, ...]


class Priority(Enum):
    """Order of work; smaller rank first."""

    URGENT = "urgent"
    ROUTINE = "routine"
    BACKGROUND = "background"

    @property
    def rank(self) -> int:
        """0 is served first."""
        return {"urgent": 0, "routine": 1, "background": 2}[self.value]


class LatePolicy(Enum):
    """What a rule does when images arrive after it ran: IGNORE, or RERUN if the engine's input changed."""

    IGNORE = "ignore"
    RERUN = "rerun"


class SendWhat(Enum):
    """What is sent to a rule's destinations."""

    RESULTS = "results"
    SOURCE = "source"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job as routing plans it: one rule on one series. `engine` '' means: only send, run nothing."""

    rule: str
    series_instance_uid: str
    engine: str
    priority: Priority
    results: tuple[str, ...]
    destinations: tuple[str, ...]
    send_what: SendWhat
    late_instances: LatePolicy
