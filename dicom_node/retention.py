"""What of the archive may go, when and why: the settings of retention, and the values a deletion is told in.

Pure. `pipeline.retain` decides with it, `pipeline.delete` does it, `store.deletions` keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dicom_node.errors import NodeError
from dicom_node.settings import AeTitle, Name, Seconds, Settings

__all__ = [
    "PERSON",
    "Deletion",
    "DeletionOrder",
    "Held",
    "Hold",
    "RetentionRule",
    "RetentionSettings",
    "Sent",
    "StudyHeld",
    "StudyToKeep",
]

PERSON = "person"
"""Stands where a rule's name would, for what a person deleted."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def _age(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no age: write e.g. 12h, 30d or 4w")
    return float(match[1]) * _UNITS[match[2]]


Age = Annotated[Seconds, BeforeValidator(_age)]
Bytes = Annotated[int, Field(ge=0)]


class RetentionRule(Settings):
    """Which studies it is about, and how long they stay. Without an age or a quota they stay for ever."""

    name: Name
    modalities: tuple[str, ...] = ()
    """Every modality in the study must be one of these; empty = any."""
    calling_ae_titles: tuple[AeTitle, ...] = ()
    """Every AE that sent of it must be one of these; empty = any."""
    routing_rules: tuple[Name, ...] = ()
    """One of these rules must have asked for a job or a sending; empty = any or none."""
    origin: Literal["any", "received", "produced"] = "any"
    """produced: nothing of it was received."""
    deliveries: Literal["done", "none"] = "done"
    """done: studies of which something was to be delivered, once all of it is safe there; none: nothing ever was."""
    older_than: Age | None = None
    """Since the last object of it came. Like 12h, 30d, 4w, or seconds."""
    keep_bytes: Bytes | None = None
    """All its studies together may have so much; beyond that the oldest go."""
    free_bytes: Bytes | None = None
    """So much must be free on the volume, above `storage.reserve_bytes`; below that its oldest go."""
    quota_spares: Age = 3600.0
    """What is younger goes for no quota."""
    variants: Literal["keep", "delete"] = "keep"
    """Whether a study goes of which other content came under known UIDs: that was kept and never sent on."""

    def covers(self, study: StudyToKeep) -> bool:
        """Whether the rule is about this study."""
        return (
            study.delivers is (self.deliveries == "done")
            and (self.origin == "any" or study.received is (self.origin == "received"))
            and (not self.modalities or study.modalities <= set(self.modalities))
            and (not self.calling_ae_titles or study.calling_ae_titles <= set(self.calling_ae_titles))
            and (not self.routing_rules or bool(study.routing_rules & set(self.routing_rules)))
        )

    @property
    def has_quota(self) -> bool:
        """Whether more than age decides."""
        return self.keep_bytes is not None or self.free_bytes is not None


class RetentionSettings(Settings):
    """Deletion of whole studies, by rules in order: the first that is about a study decides, one of no rule stays."""

    every_s: Seconds = 600.0
    studies_per_run: Annotated[int, Field(ge=1)] = 200
    """At most so many are deleted at a time; the rest waits for the next run."""
    rules: tuple[RetentionRule, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> RetentionSettings:
        names = [rule.name for rule in self.rules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rules: two are named {twice[0]!r}; give each a name of its own")
        if PERSON in names:
            raise ValueError(f"rules: {PERSON!r} stands for what people delete; give the rule another name")
        return self


class Hold(StrEnum):
    """Why a study stays."""

    RECEIVING = "receiving"
    OPEN = "open"
    NEVER_ROUTED = "never-routed"
    JOBS = "jobs"
    FAILED_JOBS = "failed-jobs"
    FAILED_SERIES = "failed-series"
    DELIVERIES = "deliveries"
    FAILED_DELIVERIES = "failed-deliveries"
    UNSENT = "unsent"
    CONFLICT = "identity-conflict"
    QUARANTINE = "quarantine"
    VARIANTS = "variants"
    MISSING = "missing-files"
    PEER_WAITS = "peer-waits"
    COMMITTED_TO = "committed-to"
    UNCOMMITTED = "uncommitted"
    NOT_FOUND = "not-found"
    NOT_ASKED = "not-asked"
    CHANGED = "changed"


PERSON_IS_HELD_BY = frozenset(
    {
        *(Hold.RECEIVING, Hold.OPEN, Hold.JOBS, Hold.DELIVERIES, Hold.FAILED_DELIVERIES, Hold.PEER_WAITS),
        *(Hold.COMMITTED_TO, Hold.QUARANTINE, Hold.CHANGED),
    }
)
"""A person may delete what is missing, in conflict, set aside or failed: that is what people delete studies for."""


@dataclass(frozen=True, slots=True)
class Held:
    """One reason why a study stays, with what to know or do. No patient data."""

    reason: Hold
    text: str


class StudyHeld(NodeError):
    """The study stays."""

    def __init__(self, held: Sequence[Held]) -> None:
        super().__init__("; ".join(one.text for one in held))
        self.held = tuple(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyToKeep:
    """What rules look at. `mark` differs once anything came, was decided or was queued since; `contents` once anything
    came, new or again.
    """

    study_instance_uid: str
    first_received_at: str
    age_s: float
    modalities: frozenset[str]
    calling_ae_titles: frozenset[str]
    routing_rules: frozenset[str]
    received: bool
    delivers: bool
    mark: str
    contents: str


@dataclass(frozen=True, slots=True)
class Sent:
    """An object that a destination has accepted. `committed`: it committed to exactly what was sent."""

    destination: str
    series_instance_uid: str
    sop_instance_uid: str
    committed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionOrder:
    """What is to go and why. `holds`: what must not hold it; `mark`: as it was looked at, '' = however it is now."""

    study_instance_uid: str
    rule: str
    who: str
    why: str
    holds: frozenset[Hold]
    mark: str = ""
    safe: Mapping[str, str] = field(default_factory=dict)
    """How it is safe: destination to committed, found or accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """A study that was deleted; `ended_at` None while its files still go. `patient_ids` only until then."""

    id: int
    study_instance_uid: str
    rule: str
    who: str
    why: str
    safe: Mapping[str, str]
    series: int
    instances: Mapping[str, int]
    files: int
    bytes: int
    at: datetime
    ended_at: datetime | None
    patient_ids: tuple[str, ...] = ()
