"""What engines say about a whole slide, in files: shapes (GeoJSON), a map of classes (TIFF), a table of numbers (CSV).

Coordinates are pixels of the base level's total pixel matrix, x to the right and y down, 0, 0 the upper left corner of
its first pixel (PS3.3 C.37.1.2). What cannot be said in DICOM (holes, shapes outside the slide, tables of single cells)
is counted and said in the notes, or the whole file is refused: nothing is moved or guessed.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.anatomy_codes import private_code
from dicom_node.engines._class_map import Colour, read_class_map
from dicom_node.engines._geojson import features
from dicom_node.engines.labels import Label, LabelTable, cleaned, plain, segments_of
from dicom_node.errors import EngineError
from dicom_node.values import AnnotationGroup, Annotations, Code, GraphicType, Quantities, Quantity, SlideLabels

__all__ = ["Matrix", "annotations_of", "quantities_of", "slide_labels_of"]

MAX_SHAPES = 2_000_000
MAX_POINTS = 20_000_000
MAX_GROUPS = 255
MAX_TABLE_BYTES = 4 * 1024**2
MAX_TABLE_ROWS = 64
MAX_QUANTITIES = 1000
EDGE = 1.0  # pixels a shape may reach beyond the slide: rounding, which is taken back
_BEAT = 4096  # shapes
_UNIT = Code(value="1", scheme="UCUM", meaning="no units")
_NOTHING = frozenset({"na", "n/a", "nan", "null", "-"})  # as tables write that there is no number
_COMMA = re.compile(r"[+-]?[\d.' ]*,\d[\d.,]*([eE][+-]?\d+)?\s*%?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")  # where a comma is decimal, and columns are parted by ;
# as tables write them, to UCUM (PS3.16 chapter 7.2.2)
_UNITS: Mapping[str, tuple[str, str]] = {
    "%": ("%", "percent"),
    **dict.fromkeys(("µm", "μm", "um"), ("um", "micrometer")),
    **dict.fromkeys(("µm²", "μm²", "µm^2", "μm^2", "um2", "um^2", "µm2", "μm2"), ("um2", "square micrometer")),
    "mm": ("mm", "millimeter"),
    **dict.fromkeys(("mm²", "mm2", "mm^2"), ("mm2", "square millimeter")),
    **dict.fromkeys(("1/mm²", "1/mm2", "1/mm^2", "cells/mm²", "cells/mm2", "cells/mm^2"), ("/mm2", "/mm2")),
}

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """The total pixel matrix answers are about: columns, rows, and the instance that has it."""

    sop_instance_uid: str
    columns: int
    rows: int


# --- shapes ----------------------------------------------------------------------------------------------------------


def annotations_of(
    path: Path, matrix: Matrix, *, labels: LabelTable, heartbeat: Callable[[], None] = lambda: None
) -> Annotations:
    """The shapes of a GeoJSON file, grouped by class and kind. `labels` says what a class is, or to ignore it.

    Holes are left out, and so is a shape that reaches more than a pixel beyond the slide, or encloses nothing; all are
    counted in the notes. Raises EngineError when the file is no GeoJSON, has no shape that can be told although it has
    features, or is too large.
    """
    gathered = _Gathered(matrix=matrix, labels=labels)
    for number, feature in enumerate(features(path)):
        gathered.add(feature)
        if number % _BEAT == 0:
            heartbeat()
    counts = gathered.counts
    if not gathered.groups and counts["beyond"]:
        raise EngineError(
            "no shape of the GeoJSON file lies on the slide: it is of another slide, or not in its pixels"
        )
    if not gathered.groups and (counts["unknown"] or counts["flat"]):
        raise EngineError("no feature of the GeoJSON file is a point, a line or a polygon")
    return Annotations(sop_instance_uid=matrix.sop_instance_uid, groups=_groups(gathered), notes=tuple(_said(counts)))


@dataclass(slots=True)
class _Group:
    shapes: list[Points] = field(default_factory=list)
    confidences: list[float | None] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Gathered:
    """What was read so far."""

    matrix: Matrix
    labels: LabelTable
    groups: dict[tuple[str, GraphicType], _Group] = field(default_factory=dict)
    taken: dict[str, bool] = field(default_factory=dict)  # classes that were seen, false for those to ignore
    counts: Counter[str] = field(default_factory=Counter)
    points: int = 0

    def add(self, feature: Mapping[str, Any]) -> None:
        """Raises EngineError."""
        properties = feature.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        name = _class_of(properties)
        if name not in self.taken:
            self.taken[name] = self.labels.row(None, name) is not None
            if len(self.taken) > MAX_GROUPS:
                raise EngineError(f"the GeoJSON file has more than {MAX_GROUPS} classes")
        if not self.taken[name]:
            self.counts["ignored"] += 1
            return
        confidence = _confidence_of(properties)
        self.counts["unsure"] += confidence is None and not _CONFIDENCE.isdisjoint(properties)
        for kind, points in self._shapes(feature.get("geometry")):
            fitted = self._on_the_slide(points)
            if fitted is not None and kind is GraphicType.POLYGON and _is_flat(fitted):
                self.counts["flat"] += 1  # segmentation by thresholds leaves such; the others must not be lost with it
            elif fitted is not None:
                self._keep(name, kind, fitted, confidence)

    def _keep(self, name: str, kind: GraphicType, points: Points, confidence: float | None) -> None:
        group = self.groups.setdefault((name, kind), _Group())
        group.shapes.append(points)
        group.confidences.append(confidence)
        self.counts["kept"] += 1
        self.points += len(points)
        if self.counts["kept"] > MAX_SHAPES or self.points > MAX_POINTS or len(self.groups) > MAX_GROUPS:
            raise EngineError(
                f"the GeoJSON file has more than {MAX_SHAPES} shapes, {MAX_POINTS} points or {MAX_GROUPS} classes"
            )

    def _shapes(self, geometry: Any) -> Iterator[tuple[GraphicType, Points]]:
        kind = geometry.get("type") if isinstance(geometry, Mapping) else None
        told = geometry.get("coordinates") if isinstance(geometry, Mapping) else None
        parts = told if isinstance(told, list) else []
        if kind in ("Point", "LineString", "Polygon"):
            parts = [parts]
        if kind in ("Point", "MultiPoint"):
            for part in parts:
                yield GraphicType.POINT, _points([part], least=1)
        elif kind in ("LineString", "MultiLineString"):
            for part in parts:
                yield GraphicType.POLYLINE, _points(part, least=2)
        elif kind in ("Polygon", "MultiPolygon"):
            for rings in parts:
                if not isinstance(rings, list) or not rings:
                    raise EngineError("a polygon of the GeoJSON file has no outline")
                self.counts["holes"] += len(rings) - 1
                self.counts["holed"] += len(rings) > 1
                yield GraphicType.POLYGON, _outline(rings[0])
        else:
            self.counts["unknown"] += 1

    def _on_the_slide(self, points: Points) -> Points | None:
        (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        columns, rows = self.matrix.columns, self.matrix.rows
        if left >= 0 and top >= 0 and right <= columns and bottom <= rows:
            return points
        if left < -EDGE or top < -EDGE or right > columns + EDGE or bottom > rows + EDGE:
            self.counts["beyond"] += 1
            return None
        self.counts["clipped"] += 1
        clipped: Points = np.clip(points, 0.0, (columns, rows))
        return clipped


def _points(told: Any, *, least: int) -> Points:
    """Raises EngineError."""
    try:
        points = np.array(told, dtype=np.float64)
        points = points if points.shape[1] == 2 else np.ascontiguousarray(points[:, :2])  # a height says nothing here
    except (TypeError, ValueError, IndexError, OverflowError):
        raise EngineError("coordinates of the GeoJSON file are no pairs of numbers") from None
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < least or not np.isfinite(points).all():
        raise EngineError(f"a shape of the GeoJSON file has not the {least} points it needs")
    return points


def _outline(ring: Any) -> Points:
    points = _points(ring, least=3)
    closed = len(points) > 3 and bool((points[0] == points[-1]).all())
    return points[:-1] if closed else points


def _is_flat(points: Points) -> bool:
    """Whether an outline has fewer than three different corners."""
    return len(set(map(tuple, points[:3].tolist()))) < 3 and len(set(map(tuple, points.tolist()))) < 3


def _class_of(properties: Mapping[str, Any]) -> str:
    """As QuPath and its like write it."""
    told = properties.get("classification", properties.get("class", properties.get("name")))
    if isinstance(told, Mapping):
        told = told.get("name")
    return (_cleaned(told[:256]) if isinstance(told, str) else "") or "annotation"


_cleaned = lru_cache(maxsize=1024)(cleaned)


_CONFIDENCE = frozenset({"confidence", "probability", "score"})


def _confidence_of(properties: Mapping[str, Any]) -> float | None:
    for key in sorted(_CONFIDENCE):
        value = properties.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0:
            return float(value)
    return None


def _groups(gathered: _Gathered) -> tuple[AnnotationGroup, ...]:
    names = list(dict.fromkeys(name for name, _ in gathered.groups))
    rows = {name: gathered.labels.row(None, name) for name in names}
    labels = [Label(number=number, name=name, row=row) for number, (name, row) in enumerate(rows.items(), 1) if row]
    segments = dict(zip(names, segments_of(labels), strict=True))
    made = []
    for (name, kind), group in gathered.groups.items():
        known = [one for one in group.confidences if one is not None]
        gathered.counts["unsure"] += len(known) if len(known) < len(group.shapes) else 0
        made.append(
            AnnotationGroup(
                label=segments[name].label,
                category=segments[name].category,
                type=segments[name].type,
                graphic_type=kind,
                shapes=tuple(group.shapes),
                confidences=tuple(known) if len(known) == len(group.shapes) else (),
            )
        )
    return tuple(made)


def _said(counts: Counter[str]) -> Iterator[str]:
    told = {
        "holes": f"{counts['holes']} hole(s) in {counts['holed']} polygon(s) left out: annotations have none",
        "beyond": f"{counts['beyond']} shape(s) left out that reach beyond the slide",
        "clipped": f"{counts['clipped']} shape(s) ended less than a pixel beyond the slide and were clipped to it",
        "flat": f"{counts['flat']} polygon(s) of fewer than three different corners left out",
        "unknown": f"{counts['unknown']} feature(s) left out that are no points, lines or polygons",
        "unsure": f"{counts['unsure']} confidence(s) left out: none from 0 to 1, or not of every shape of a class",
        "ignored": f"{counts['ignored']} feature(s) left out as configured",
    }
    return (text for key, text in told.items() if counts[key])


# --- classes ---------------------------------------------------------------------------------------------------------


def slide_labels_of(
    path: Path,
    matrix: Matrix,
    *,
    colours: Mapping[str, Colour],
    labels: LabelTable,
    heartbeat: Callable[[], None] = lambda: None,
) -> SlideLabels:
    """The class map in a TIFF file. `colours` by class name as the engine told them; none for a map of numbers.

    `labels` says what a class is, by name (or by number where there are no colours), or to ignore it. Raises
    EngineError as `read_class_map`.
    """
    read = read_class_map(path, columns=matrix.columns, rows=matrix.rows, colours=colours, heartbeat=heartbeat)
    numbers = sorted(read.names) if read.names else sorted({*map(int, np.unique(read.labels)), *labels.values()} - {0})
    numbers = [number for number in numbers if number <= MAX_GROUPS]
    rows = {number: labels.row(number, read.names.get(number, "")) for number in numbers}
    dropped = [number for number, row in rows.items() if row is None]
    painted = np.where(np.isin(read.labels, dropped), np.uint8(0), read.labels) if dropped else read.labels
    kept = [Label(number=n, name=read.names.get(n, ""), row=row) for n, row in rows.items() if row is not None]
    segments = tuple(
        replace(segment, color_rgb=segment.color_rgb or read.colours.get(segment.number))
        for segment in segments_of(kept)
    )
    notes = list(read.notes)
    if not read.names:
        notes.append("the engine did not say what the numbers of its class map mean")
    if dropped:
        notes.append(f"{len(dropped)} class(es) left out as configured")
    return SlideLabels(labels=painted, sop_instance_uid=matrix.sop_instance_uid, segments=segments, notes=tuple(notes))


# --- numbers ---------------------------------------------------------------------------------------------------------


def quantities_of(path: Path, sop_instance_uids: Sequence[str]) -> Quantities:
    """The numbers of a CSV table about the slide: one row of named columns, or a few rows named by their text cells.

    A unit is read from brackets at the end of a column's name, or from a column `unit`. Raises EngineError when the
    file is no such table (one of single cells has far more rows and belongs into no report), and when its numbers have
    commas, or points that may be those between thousands.
    """
    header, rows = _table(path)
    units = next((at for at, name in enumerate(header) if plain(name) in ("unit", "units")), None)
    others = [at for at in range(len(header)) if at != units and (header[at] or any(row[at] for row in rows))]
    # a number that is missing here and there makes no text of its column
    numeric = [at for at in others if all(not row[at] or _number(row[at]) is not None for row in rows)]
    named = [at for at in others if at not in numeric]
    if not numeric or (len(rows) > 1 and not named):
        raise EngineError("the table has no rows that are named and no single row: nobody can say what it tells")
    items, missing = [], 0
    for row in rows:
        title = " ".join(row[at] for at in named if row[at]) if len(rows) > 1 else ""
        unit = row[units] if units is not None else ""
        for at in numeric:
            value = _number(row[at])
            missing += value is None
            if value is not None:
                name = ": ".join(filter(None, (title, header[at] if not title or len(numeric) > 1 else "")))
                items.append(_quantity(name, value, unit))
    if not items or len(items) > MAX_QUANTITIES:
        raise EngineError(f"the table has {len(items)} numbers, 1 to {MAX_QUANTITIES} are taken")
    notes = (f"{missing} cell(s) of the table without a number left out",) if missing else ()
    return Quantities(sop_instance_uids=tuple(sop_instance_uids), items=tuple(items), notes=notes)


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of equal length. Lines before the header that are comments or titles are passed over."""
    with path.open("rb") as file:
        content = file.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        raise EngineError(f"the table has more than {MAX_TABLE_BYTES} bytes: it is one of single cells")
    try:
        lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip() and line[0] != "#"]
    except UnicodeDecodeError:
        raise EngineError("the table is no UTF-8 text") from None
    if len(lines) > MAX_TABLE_ROWS + 3:
        raise EngineError(f"the table has {len(lines)} lines, at most {MAX_TABLE_ROWS} are taken")
    delimiter = max(";\t,", key=lambda mark: _likeness(mark, lines))
    try:
        cells = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, strict=True)]
    except csv.Error:
        raise EngineError("the table is no CSV") from None
    width = max(map(len, cells), default=0)
    while cells and len(cells[0]) < width:
        cells.pop(0)  # a title
    if len(cells) < 2 or any(len(row) != width for row in cells) or len(cells) > MAX_TABLE_ROWS + 1:
        raise EngineError("the table has no rows, or rows of different lengths")
    rows = [["" if cell.lower() in _NOTHING else cell for cell in row] for row in cells[1:]]
    _require_plain_numbers([cell for row in rows for cell in row], delimiter)
    return cells[0], rows


def _likeness(mark: str, lines: Sequence[str]) -> tuple[int, int]:
    """In how many lines a mark is equally often, and how often: a decimal comma is not in every number."""
    counts = Counter(line.count(mark) for line in lines)
    del counts[0]
    return max(((many, often) for often, many in counts.items()), default=(0, 0))


def _require_plain_numbers(cells: Sequence[str], delimiter: str) -> None:
    """Raises EngineError for a number that other people read as another."""
    if any(_COMMA.fullmatch(cell) for cell in cells):
        raise EngineError("the table has numbers with a comma: nobody can say whether it is a decimal one")
    pointed = [cell for cell in cells if "." in cell and _number(cell) is not None]
    if delimiter == ";" and pointed and all(_THOUSANDS.fullmatch(cell) for cell in pointed):
        raise EngineError("the table has numbers with a point: nobody can say whether it is a decimal one")


def _number(cell: str) -> float | None:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", cell) or not cell.isascii():
        return None
    value = float(cell)
    return value if math.isfinite(value) else None


def _quantity(name: str, value: float, unit: str) -> Quantity:
    found = re.fullmatch(r"(.*\S)\s*[\[(]([^\[\]()]{1,16})[\])]", name)
    told = (unit or (found.group(2) if found else "")).replace(" ", "")
    known = _UNITS.get(told)
    if known is None:
        shown = name if not unit else f"{name} ({unit})"
        coded = _UNIT
    else:
        shown = found.group(1) if found and not unit else name
        coded = Code(value=known[0], scheme="UCUM", meaning=known[1])
    return Quantity(
        code=private_code(" ".join(name.lower().split()), cleaned(shown) or "value"), value=value, unit=coded
    )
