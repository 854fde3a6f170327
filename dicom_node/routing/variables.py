"""What a condition sees of one series: every variable is known, absent, differing, or unusable, with the reason.

Nothing here is guessed: an attribute that some instances lack, or whose values differ between instances, is told
apart from one that all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from dicom_node import anatomy
from dicom_node.model import SeriesView
from dicom_node.routing import vocabulary

__all__ = ["Absent", "Differing", "Known", "Lookup", "Unusable", "Variables"]

MAX_ITEMS = 1024
"""Elements a list variable may have; `exists` and `all` over more would not be cheap any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One value. `absent_in` instances of the series lack the attribute."""

    value: Any
    absent_in: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """No instance has a value; `why` says which attributes were looked at."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """The values differ within the series."""

    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """There is a value, but a condition may not have it."""

    why: str


Lookup = Known | Absent | Differing | Unusable


class Variables:
    """The variables of one series at one moment. Lookups are kept: several rules ask for the same."""

    def __init__(self, view: SeriesView, now: datetime) -> None:
        self._view = view
        self._now = now
        self._kept: dict[str, Lookup] = {}

    def lookup(self, name: str) -> Lookup:
        """The variable of that name, as `expressions.Reference.name` writes it."""
        if name not in self._kept:
            self._kept[name] = self._find(name)
        return self._kept[name]

    def _find(self, name: str) -> Lookup:
        if name == "now":
            return Known(value=self._now)
        space, _, member = name.rpartition(".")
        if space == "values":
            return self._all_values(member)
        if space:
            return self._member(space, member)
        return self._derived(name) if name in vocabulary.DERIVED else self._attribute(name)

    # --- attributes

    def _attribute(self, keyword: str) -> Lookup:
        values, absent_in = self._distinct(keyword), self._absent_in(keyword)
        if not values:
            has = keyword in self._view.header.values
            return Absent(why=f"{keyword} is {'empty' if has else 'absent'} in {self._every_instance()}")
        if len(values) > 1:
            count = self._view.header.distinct_counts.get(keyword, len(values))
            return Differing(values=tuple(values), why=f"{keyword} has {count} different values in the series")
        return _bounded(keyword, values[0], absent_in)

    def _distinct(self, keyword: str) -> list[Any]:
        """Distinct values that are not empty, normalised, in order of first appearance."""
        found: list[Any] = []
        for raw in self._view.header.values.get(keyword, ()):
            value = vocabulary.normalised(keyword, raw)
            if value is not None and value not in found:
                found.append(value)
            if len(found) > MAX_ITEMS:
                break  # too many for any condition; `_bounded` and `Differing` say so
        return found

    def _absent_in(self, keyword: str) -> int:
        """Instances without a value; at least 1 when one of the distinct values is empty."""
        header = self._view.header
        empty = any(vocabulary.normalised(keyword, raw) is None for raw in header.values.get(keyword, ()))
        return max(header.missing_in.get(keyword, 0), int(empty))

    def _all_values(self, name: str) -> Lookup:
        if count := self._view.header.distinct_counts.get(name):
            return Unusable(why=f"{name} has {count} different values, of which only some are kept for rules")
        values = list(self._words(name)) if name in vocabulary.DERIVED else self._distinct(name)
        return _bounded(name, values, 0) if values else Absent(why=f"{name} is absent in {self._every_instance()}")

    def _every_instance(self) -> str:
        count = self._view.header.instance_count
        return "the only instance" if count == 1 else f"all {count} instances"

    # --- derived

    def _words(self, name: str) -> dict[str, str]:
        derive = {"view": anatomy.views, "body_part": anatomy.body_parts, "laterality": anatomy.lateralities}[name]
        return derive(self._distinct)

    def _derived(self, name: str) -> Lookup:
        words = self._words(name)
        if not words:
            looked = " and ".join(_SOURCES[name])
            return Absent(why=f"{name} is unknown: {looked} say nothing in {self._every_instance()}")
        if len(words) > 1:
            attributes = set(words.values())
            if len(attributes) == 1:
                why = f"{name} has {len(words)} different values in the series, by {attributes.pop()}"
            else:
                said = ", ".join(f"{where} says {word}" for word, where in words.items())
                why = f"{name} is contradictory: {said}"
            return Differing(values=tuple(words), why=why)
        lacking = [self._absent_in(keyword) for keyword in _SOURCES[name] if self._distinct(keyword)]
        return Known(value=next(iter(words)), absent_in=min(lacking, default=0))

    # --- series, study, source

    def _member(self, space: str, member: str) -> Lookup:
        view = self._view
        if space == "study":
            return Known(
                value={
                    "instance_count": view.study_instance_count,
                    "series_count": view.study_series_count,
                    "modalities": list(view.study_modalities),
                    "revision": view.revision,
                    "identity_conflict": view.identity_conflict,
                }[member]
            )
        if space == "source":
            return Known(value=getattr(view.source, member))
        if member == "instance_count":
            return Known(value=view.header.instance_count)
        if member == "frame_count":
            return Known(value=_frames(view))
        positions = slice_positions(view.header.geometry)
        if isinstance(positions, str):
            return Absent(why=f"series.{member} is unknown: {positions}")
        gaps = sorted(b - a for a, b in pairwise(positions))
        return Known(value=round(gaps[len(gaps) // 2] if member == "slice_spacing_mm" else sum(gaps), 4))


_SOURCES = {
    "view": ("ViewPosition", "ViewCodeSequence"),
    "body_part": ("BodyPartExamined", "AnatomicRegionSequence"),
    "laterality": ("ImageLaterality", "Laterality", "FrameLaterality", "AnatomicRegionSequence"),
}


def _bounded(name: str, value: Any, absent_in: int) -> Lookup:
    if _elements(value) > MAX_ITEMS:
        return Unusable(why=f"{name} has more than {MAX_ITEMS} elements, too many for a rule")
    return Known(value=value, absent_in=absent_in)


def _elements(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_elements, value.values()))
    return sum(map(_elements, value)) if isinstance(value, list) else 1


def _frames(view: SeriesView) -> int:
    """Frames in the series: an instance without Number of Frames (0028,0008) has one."""
    if not view.header.geometry:
        return view.header.instance_count
    return sum(_whole(instance.get("NumberOfFrames")) or 1 for instance in view.header.geometry)


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):  # of an infinite one
        return 0


def slice_positions(geometry: Iterable[Mapping[str, Any]]) -> list[float] | str:
    """Distinct positions in mm along the common normal, ascending, or why there are none.

    PS3.3 C.7.6.2.1.1: the normal is the cross product of the direction cosines of Image Orientation (Patient).
    """
    normal: Sequence[float] | None = None
    orientation: list[float] = []
    found: list[float] = []
    for instance in geometry:
        axes = _floats(instance.get("ImageOrientationPatient"), 6)
        position = _floats(instance.get("ImagePositionPatient"), 3)
        if axes is None or position is None:
            return "an instance has no position or orientation"
        if normal is None:
            orientation, normal = axes, _cross(axes[:3], axes[3:])
        elif max(abs(a - b) for a, b in zip(axes, orientation, strict=True)) > 1e-3:
            return "the orientation differs between instances"
        found.append(sum(a * b for a, b in zip(position, normal, strict=True)))
    found.sort()
    distinct = found[:1] + [b for a, b in pairwise(found) if b - a > 1e-3]
    return distinct if len(distinct) > 1 else "there are fewer than two slice positions"


def _cross(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _floats(value: Any, count: int) -> list[float] | None:
    parts = value.split("\\") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != count:
        return None
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
