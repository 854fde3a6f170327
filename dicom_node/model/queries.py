"""Queries and their answers (PS3.4 C.2.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Key", "Level", "Match", "MatchKind", "Query"]


class Level(Enum):
    """Query/Retrieve Level (0008,0052)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class MatchKind(Enum):
    """How one key matches (PS3.4 C.2.2.2)."""

    UNIVERSAL = "universal"
    SINGLE = "single"
    UID_LIST = "uid-list"
    WILDCARD = "wildcard"
    RANGE = "range"  # dates, times; `values` = (from, to), "" for an open end
    DATETIME_RANGE = "datetime-range"  # combined date-time matching on a DA key, values as YYYYMMDDHHMMSS.ffffff
    PERSON_NAME = "person-name"  # wildcards allowed, case- and accent-insensitive
    MODALITIES = "modalities"  # Modalities in Study: any of `values`, wildcards allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One matching key of a query: a DICOM keyword, how it matches and with what."""

    keyword: str
    kind: MatchKind
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query on the index: matches of `level` that satisfy every key, with the attributes in `returns`."""

    level: Level
    keys: tuple[Key, ...]
    returns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One answer: keyword to decoded text; an attribute the index keeps but this entity lacks is ''.

    `specific_character_sets` are those of the matched entity's instances as received (for information only; text is
    already decoded).
    """

    attributes: Mapping[str, str]
