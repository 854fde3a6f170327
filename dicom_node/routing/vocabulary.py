"""The names a condition may use, and how values of a DICOM attribute look inside one.

A condition sees DICOM keywords (PS3.6) as variables, a few derived ones, and the name spaces `series`, `study`,
`source` and `values`. Everything else is a mistake that is found when the rules are read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_dict, tag_for_keyword

__all__ = [
    "DERIVED",
    "FUNCTIONS",
    "MACROS",
    "NAMESPACES",
    "all_keywords",
    "always_there",
    "is_bulk",
    "is_keyword",
    "is_list",
    "kind",
    "nearest",
    "normalised",
    "suggestion",
]

DERIVED = ("view", "body_part", "laterality")
"""Variables computed from the plain and the coded attributes (`anatomy`)."""

NAMESPACES: dict[str, tuple[str, ...]] = {
    "series": ("instance_count", "frame_count", "slice_spacing_mm", "extent_mm"),
    "study": ("instance_count", "series_count", "modalities", "revision", "identity_conflict"),
    "source": ("calling_ae_title", "called_ae_title", "address"),
}
"""Name spaces with fixed members; `values.<Keyword>` is the list of distinct values of any keyword."""

MACROS = frozenset({"all", "exists", "exists_one", "map", "filter"})
FUNCTIONS = (
    *("size", "contains", "startsWith", "endsWith", "matches", "has", *sorted(MACROS)),
    *("int", "uint", "double", "string", "timestamp", "duration"),
    *("getFullYear", "getMonth", "getDayOfMonth", "getDate", "getDayOfWeek", "getDayOfYear"),
    *("getHours", "getMinutes", "getSeconds", "getMilliseconds"),
)
"""What the evaluator has. All are linear in their input: `matches` is a finite automaton, like RE2."""

_BULK = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_WHOLE = frozenset({"IS", "SL", "SS", "SV", "UL", "US", "UV"})
_REAL = frozenset({"DS", "FD", "FL"})
_MAX_INT = 2**63  # CEL's int is 64 bits wide


def always_there(atom: str) -> bool:
    """Whether the variable has a value for every series, so that `missing:` cannot be about it."""
    return atom == "now" or (atom.startswith(("series.", "study.", "source.")) and not atom.endswith("_mm"))


def is_keyword(name: str) -> bool:
    """Whether `name` is a keyword of PS3.6."""
    return name in keyword_dict


@lru_cache(maxsize=4096)
def _vrs(keyword: str) -> frozenset[str]:
    tag = tag_for_keyword(keyword)
    return frozenset() if tag is None else frozenset(dictionary_VR(tag).split(" or "))


def is_bulk(keyword: str) -> bool:
    """Whether the attribute holds bulk data or one item per frame, which series headers do not carry."""
    return bool(_vrs(keyword) & _BULK) or keyword == "PerFrameFunctionalGroupsSequence"


@lru_cache(maxsize=4096)
def is_list(keyword: str) -> bool:
    """Whether a condition sees a list: the attribute may have several values by PS3.6, or it is a sequence.

    Decided by the keyword, never by how many values happen to be there, so that a condition means one thing.
    """
    tag = tag_for_keyword(keyword)
    return tag is not None and (dictionary_VM(tag) != "1" or "SQ" in _vrs(keyword))


def kind(keyword: str) -> str:
    """What a condition sees, in words: for messages."""
    vrs = _vrs(keyword)
    if "SQ" in vrs:
        return "a list of items"
    if vrs & (_WHOLE | _REAL):
        return "a list of numbers" if is_list(keyword) else "a number"
    return "a list of texts" if is_list(keyword) else "text"


def normalised(keyword: str, value: Any) -> Any:
    """`value` of a header as a condition sees it, None when there is nothing in it.

    Numbers for IS, DS, US ..., lists where `is_list`, dictionaries by keyword for sequence items, text for all else
    (dates too). A number that cannot be read stays the text it is: comparing it is then an explained error.
    """
    if "SQ" in _vrs(keyword):
        items = [value] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
        return [_item(item) for item in items if isinstance(item, dict)] or None
    if isinstance(value, list | tuple):
        parts = [_single(keyword, part) for part in value]
        if all(part is None for part in parts):
            return None
        parts = ["" if part is None else part for part in parts]
        return parts if is_list(keyword) or len(parts) != 1 else parts[0]
    single = _single(keyword, value)
    return [single] if single is not None and is_list(keyword) else single


def _item(item: dict[str, Any]) -> dict[str, Any]:
    known = {key: normalised(key, value) for key, value in item.items()}
    return {key: value for key, value in known.items() if value is not None}


def _single(keyword: str, value: Any) -> Any:
    if value is None:
        return None
    vrs = _vrs(keyword)
    if vrs & _WHOLE and vrs.isdisjoint(_REAL):
        return _number(value, int)
    if vrs & _REAL:
        return _number(value, float)
    text = str(value).strip(" \0")
    return text or None


def _number(value: Any, of: type[int] | type[float]) -> Any:
    text = value.strip(" \0") if isinstance(value, str) else value
    if text == "":
        return None
    try:
        number = of(text)
    except (TypeError, ValueError, OverflowError):
        return str(value)
    if not math.isfinite(number) or abs(number) >= _MAX_INT:
        return str(value)
    return number


def suggestion(name: str, among: Iterable[str]) -> str:
    """A question with the nearest of `among`, or ''."""
    near = nearest(name, among)
    return f"did you mean {near!r}?" if near else ""


def nearest(name: str, among: Iterable[str]) -> str:
    """The nearest of `among` to a misspelt name, or ''."""
    by_fold = {candidate.casefold().replace("_", ""): candidate for candidate in among}
    close = difflib.get_close_matches(name.casefold().replace("_", ""), by_fold, n=1, cutoff=0.6)
    return by_fold[close[0]] if close else ""


def all_keywords() -> Iterable[str]:
    """Every keyword of PS3.6."""
    return keyword_dict.keys()
