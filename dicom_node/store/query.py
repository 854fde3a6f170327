"""From a `Query` to SQL: which column an attribute is, and how each kind of matching reads (PS3.4 C.2.2.2).

Everything a peer said is a bound parameter; only our own column expressions are ever put into the text.

Aliases: p patient, s study, e series, i instance. From STUDY down, patient attributes are those the study came with, so
what is matched is what is returned. Orders are by unique keys, so that a page can begin where the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from dicom_node.errors import InvalidIdentifier
from dicom_node.headers import INDEXED, multi_valued, value_representation
from dicom_node.model import (
    Key,
    Level,
    MatchKind,
    Query,
)
from dicom_node.store.kept import KEY_SUFFIX
from dicom_node.store.names import beyond, glob_pattern, literal_prefix, name_group

__all__ = ["Plan", "plan", "supported"]

Sql = tuple[str, tuple[object, ...]]

_LEVELS = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)

_FROM = {
    Level.PATIENT: "patient AS p",
    Level.STUDY: "study AS s",
    Level.SERIES: "series AS e JOIN study AS s ON s.study_instance_uid = e.study_instance_uid",
    Level.IMAGE: "instance AS i JOIN series AS e ON e.study_instance_uid = i.study_instance_uid "
    "AND e.series_instance_uid = i.series_instance_uid JOIN study AS s ON s.study_instance_uid = i.study_instance_uid",
}
_VISIBLE = {
    Level.PATIENT: "EXISTS (SELECT 1 FROM study AS x WHERE x.patient = p.id AND x.instance_count > 0)",
    Level.STUDY: "s.instance_count > 0",
    Level.SERIES: "e.instance_count > 0",
    Level.IMAGE: "i.state = 'present'",
}
_ORDER = {
    Level.PATIENT: ("p.id",),
    Level.STUDY: ("s.study_date", "s.study_time", "s.study_instance_uid"),
    Level.SERIES: ("e.study_instance_uid", "e.series_instance_uid"),
    Level.IMAGE: ("i.series_instance_uid", "i.instance_order", "i.sop_instance_uid"),
}
# Keys with an index of their own that the order above is none of: with one of them SQLite must not walk in order.
_SELECTIVE = {
    Level.PATIENT: frozenset({"PatientID", "PatientName"}),
    Level.STUDY: frozenset({"PatientID", "PatientName", "AccessionNumber", "StudyInstanceUID"}),
    Level.SERIES: frozenset({"PatientID", "PatientName", "AccessionNumber", "SeriesInstanceUID", "StudyDate"}),
    Level.IMAGE: frozenset(
        {"PatientID", "PatientName", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID", "StudyDate"}
    ),
}

_COLUMNS = {
    Level.PATIENT: {
        "PatientID": "p.patient_id",
        "IssuerOfPatientID": "p.issuer",
        "PatientName": "p.patient_name",
        "PatientBirthDate": "p.birth_date",
    },
    Level.STUDY: {
        "PatientID": "s.patient_id",
        "IssuerOfPatientID": "s.issuer",
        "PatientBirthDate": "s.birth_date",
        "StudyDate": "s.study_date",
        "StudyTime": "s.study_time",
        "AccessionNumber": "s.accession_number",
        "StudyID": "s.study_id",
        "StudyInstanceUID": "s.study_instance_uid",
        "ModalitiesInStudy": "s.modalities",
        "SOPClassesInStudy": "s.sop_classes",
        "NumberOfStudyRelatedSeries": "CAST(s.series_count AS TEXT)",
        "NumberOfStudyRelatedInstances": "CAST(s.instance_count AS TEXT)",
    },
    Level.SERIES: {
        "Modality": "e.modality",
        "SeriesNumber": "e.series_number",
        "SeriesInstanceUID": "e.series_instance_uid",
        "StudyInstanceUID": "e.study_instance_uid",
        "NumberOfSeriesRelatedInstances": "CAST(e.instance_count AS TEXT)",
    },
    Level.IMAGE: {
        "InstanceNumber": "i.instance_number",
        "SOPInstanceUID": "i.sop_instance_uid",
        "SOPClassUID": "i.sop_class_uid",
        "SeriesInstanceUID": "i.series_instance_uid",
        "StudyInstanceUID": "i.study_instance_uid",
    },
}
_PATIENT_COUNTS = {
    "NumberOfPatientRelatedStudies": "count(*)",
    "NumberOfPatientRelatedSeries": "coalesce(sum(x.series_count), 0)",
    "NumberOfPatientRelatedInstances": "coalesce(sum(x.instance_count), 0)",
}
_JSON = {Level.PATIENT: "s.attributes", Level.STUDY: "s.attributes", Level.SERIES: "e.attributes"}
_JSON[Level.IMAGE] = "i.attributes"
_MAX_VALUE = 1024  # no VR that is matched allows more but LT, UC and UT, and none is asked for by a whole page of text


class Plan(NamedTuple):
    """A query ready to be run page by page."""

    select: str
    where: str
    parameters: tuple[object, ...]
    order: tuple[str, ...]
    walk: bool  # whether SQLite may walk the index that has this order
    at: tuple[int, ...]  # the columns of a row that have `order`

    def page(self, after: tuple[object, ...] | None, size: int) -> Sql:
        """SQL and parameters of the page behind the row whose order columns are `after`."""
        terms = self.order if self.walk else tuple(f"+{term}" for term in self.order)
        where, parameters = self.where, self.parameters
        if after is not None:
            where += f" AND ({', '.join(terms)}) > ({', '.join('?' * len(terms))})"
            parameters = (*parameters, *after)
        return f"{self.select} WHERE {where} ORDER BY {', '.join(terms)} LIMIT {size}", parameters


@lru_cache(maxsize=4)
def supported(level: Level) -> frozenset[str]:
    """Keywords that can be matched or returned at `level`."""
    keywords: set[str] = set(_PATIENT_COUNTS)
    for at in _LEVELS[: _LEVELS.index(level) + 1]:
        keywords |= {*INDEXED[at], *_COLUMNS[at]}
    return frozenset(keywords)


def plan(query: Query) -> Plan:
    """How to run `query`. Raises InvalidIdentifier for a keyword the index does not keep at this level."""
    level = query.level
    conditions = [_VISIBLE[level]]
    parameters: list[object] = []
    selective = False
    for key in query.keys:
        sql, bound = _condition(level, key)
        if sql:
            conditions.append(sql)
            parameters += bound
            selective = selective or key.keyword in _SELECTIVE[level]
    select, at = _select(level, query.returns)
    return Plan(
        select=select,
        where=" AND ".join(conditions),
        parameters=tuple(parameters),
        order=_ORDER[level],
        walk=not selective,
        at=at,
    )


@lru_cache(maxsize=256)
def _select(level: Level, returns: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """The query up to its conditions, and where in its rows the order stands; what is not returned comes last."""
    columns = [_expression(level, keyword) for keyword in returns]
    columns += [term for term in _ORDER[level] if term not in columns]
    at = tuple(columns.index(term) for term in _ORDER[level])
    return f"SELECT {', '.join(columns)} FROM {_FROM[level]}", at


# --- attributes to expressions -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _expression(level: Level, keyword: str) -> str:
    """The text of an attribute as SQL, '' where the entity lacks it."""
    if keyword not in supported(level):
        raise InvalidIdentifier(f"{keyword} is not kept at the {level.value} level")
    if keyword in _PATIENT_COUNTS:
        patient = "p.id" if level is Level.PATIENT else "s.patient"
        count = _PATIENT_COUNTS[keyword]
        return f"(SELECT CAST({count} AS TEXT) FROM study AS x WHERE x.patient = {patient} AND x.instance_count > 0)"
    for at in reversed(_LEVELS[: _LEVELS.index(level) + 1]):
        if keyword in _COLUMNS[at] and (at is not Level.PATIENT or level is Level.PATIENT):
            return _COLUMNS[at][keyword]
    return _json_text(level, keyword, keyword)


def _json_text(level: Level, keyword: str, name: str) -> str:
    at = next(at for at in _LEVELS if keyword in INDEXED[at])
    table = "p.attributes" if level is Level.PATIENT else _JSON[at]
    return f"""coalesce(json_extract({table}, '$."{name}"'), '')"""


def _name_key(level: Level, keyword: str) -> str:
    if keyword == "PatientName":
        return "p.name_key" if level is Level.PATIENT else "s.name_key"
    return _json_text(level, keyword, keyword + KEY_SUFFIX)


# --- keys to conditions --------------------------------------------------------------------------------------------


def _condition(level: Level, key: Key) -> Sql:
    """One key as a condition; '' for universal matching."""
    keyword = key.keyword
    text = _expression(level, keyword)
    if key.kind is MatchKind.UNIVERSAL or not any(key.values):
        return "", ()
    if any(len(value) > _MAX_VALUE for value in key.values):
        raise InvalidIdentifier(f"a value of {keyword} is longer than {_MAX_VALUE} characters")
    vr = value_representation(keyword)
    if vr == "PN":
        return _person_name(level, keyword, key.values[0])
    if key.kind is MatchKind.DATETIME_RANGE:
        return _date_time_range(level, keyword, key.values)
    if key.kind is MatchKind.RANGE:
        return _any_value(keyword, text, lambda value: _range(value, vr, key.values))
    if key.kind is MatchKind.UID_LIST:
        listed = json.dumps(key.values)
        return _any_value(keyword, text, lambda value: (f"{value} IN (SELECT value FROM json_each(?))", (listed,)))
    if key.kind is MatchKind.MODALITIES or (key.kind is MatchKind.WILDCARD and len(key.values) > 1):
        return _any_value(keyword, text, lambda value: _either(_wildcard(value, one) for one in key.values))
    if key.kind is MatchKind.WILDCARD:
        if not key.values[0].strip("*"):
            return "", ()
        return _any_value(keyword, text, lambda value: _wildcard(value, key.values[0]))
    return _any_value(keyword, text, lambda value: _single(value, vr, key.values[0]))


def _any_value(keyword: str, text: str, condition: Callable[[str], Sql]) -> Sql:
    """A multi-valued attribute matches when one of its values does (PS3.4 C.2.2.2)."""
    if keyword not in ("ModalitiesInStudy", "SOPClassesInStudy") and not multi_valued(keyword):
        return condition(text)
    sql, bound = condition("v.value")
    return f"EXISTS (SELECT 1 FROM {_split(text, chr(92))} AS v WHERE {sql})", bound


def _split(text: str, separator: str) -> str:
    # json_quote doubles each backslash; what stands between two separators becomes an element of a JSON array
    quoted = chr(92) * 2 if separator == chr(92) else separator
    return f"""json_each('[' || replace(json_quote({text}), '{quoted}', '","') || ']')"""


def _either(parts: Iterator[Sql]) -> Sql:
    found = list(parts)
    return "(" + " OR ".join(sql for sql, _ in found) + ")", tuple(bound for _, some in found for bound in some)


def _single(text: str, vr: str, value: str) -> Sql:
    if vr == "TM":
        return f"({text} <> '' AND {_full_time(text)} = ?)", (_filled_time(value),)
    if vr in ("IS", "DS"):
        try:
            number = float(value)
        except ValueError:
            return f"{text} = ?", (value,)
        return f"({text} <> '' AND CAST({text} AS REAL) = ?)", (number,)
    return f"{text} = ?", (value,)


def _wildcard(text: str, pattern: str) -> Sql:
    prefix = literal_prefix(pattern)
    if prefix == pattern:
        return f"{text} = ?", (pattern,)
    if not prefix:
        return f"{text} GLOB ?", (glob_pattern(pattern),)
    within = f"{text} >= ? AND {text} < ?"  # what an index can use
    bounds = (prefix, beyond(prefix))
    if pattern == prefix + "*":
        return f"({within})", bounds
    return f"({within} AND {text} GLOB ?)", (*bounds, glob_pattern(pattern))


def _range(text: str, vr: str, ends: Sequence[str]) -> Sql:
    first, last = ends
    parts, bound = [f"{text} <> ''"], []
    if vr == "TM":
        first, last = first and _filled_time(first), last and (last + "235959.999999"[len(last) :])
    stored = _full_time(text) if vr == "TM" else text
    if first:
        # "2024" is before "20240301" as text but holds it: a shorter value reaches as far as its precision
        parts.append(f"{stored} >= substr(?, 1, length({stored}))" if vr == "DT" else f"{stored} >= ?")
        bound.append(first)
    if last:
        parts.append(f"substr({stored}, 1, {len(last)}) <= ?" if vr == "DT" else f"{stored} <= ?")
        bound.append(last)
    return f"({' AND '.join(parts)})", tuple(bound)


def _date_time_range(level: Level, keyword: str, ends: Sequence[str]) -> Sql:
    """PS3.4 C.2.2.2.5.2: date and time together are one moment."""
    date = _expression(level, keyword)
    time = f"{keyword.removesuffix('Date')}Time"
    full = _full_time(_expression(level, time)) if time in supported(level) else "''"
    parts, bound = [f"{date} <> ''"], []
    for sign, end in zip((">=", "<="), ends, strict=True):
        if end:
            parts += [f"{date} {sign} ?", f"{date} || {full} {sign} ?"]  # the first is what an index can use
            bound += [end[:8], end]
    return f"({' AND '.join(parts)})", tuple(bound)


def _full_time(text: str) -> str:
    return f"({text} || substr('000000.000000', length({text}) + 1))"


def _filled_time(time: str) -> str:
    return time + "000000.000000"[len(time) :]


_NAMED = {
    Level.PATIENT: ("patient", "patient_name_groups", "p.rowid"),
    Level.STUDY: ("study", "study_name_groups", "s.rowid"),
}


def _names_beginning(level: Level, prefix: str) -> Sql:
    """What an index finds first: names that begin so, and all that have other groups, which may begin so."""
    table, groups, rowid = _NAMED[level]
    return (
        # left to itself SQLite reads every name for the second part
        f"{rowid} IN (SELECT rowid FROM {table} WHERE name_key >= ? AND name_key < ? "
        f"UNION ALL SELECT rowid FROM {table} INDEXED BY {groups} WHERE instr(name_key, '=') > 0)",
        (prefix, beyond(prefix)),
    )


def _person_name(level: Level, keyword: str, value: str) -> Sql:
    """Any value, any component group (alphabetic, ideographic, phonetic) may match; of several in the key, all must.

    PS3.4 C.2.2.2.1 and PS3.5 6.2.1.2; letters as `names.fold` says.
    """
    text = _name_key(level, keyword)
    parts = []
    for group in value.split("="):
        pattern = name_group(group)
        if pattern.strip("*"):
            inside = _split(text if not multi_valued(keyword) else f"replace({text}, '{chr(92)}', '=')", "=")
            sql, bound = _wildcard(text, pattern)
            each, again = _wildcard("v.value", pattern)
            # most names are one group of one value: the split is for the others
            several = f"(instr({text}, '=') OR instr({text}, '{chr(92)}'))"
            other = f"({several} AND EXISTS (SELECT 1 FROM {inside} AS v WHERE {each}))"
            parts.append((f"({sql} OR {other})", bound + again))
            if keyword == "PatientName" and level in _NAMED and literal_prefix(pattern):
                parts.append(_names_beginning(level, literal_prefix(pattern)))
    if not parts:
        return "", ()
    return " AND ".join(sql for sql, _ in parts), tuple(bound for _, some in parts for bound in some)
