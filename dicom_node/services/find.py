"""C-FIND: from an identifier to the responses it gets (PS3.4 C.2.2, C.4.1). Knows no wire and no table.

What is answered beyond or beside the letter of the Standard:

* A relational query, or a list of values, that was not negotiated is answered; `FindSettings.strict` refuses it
  (0xA900).
* An optional key the index does not keep is left out of the responses, which then are 0xFF01 (C.2.2.1.3, C.4.1.1.4);
  with `unsupported_optional_keys: empty` it comes back empty under 0xFF00, as old clients expect.
* Text outside ASCII goes out in the requester's own Specific Character Set when that is a single one without code
  extensions that holds it, else in ISO_IR 192; pure ASCII goes out without (0008,0005).
* Timezone Offset From UTC (0008,0201) in a request is no key: adjustment is never negotiated (C.5.1.1.1.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from pydicom.charset import python_encoding
from pydicom.dataelem import DataElement

from dicom_node.config import FindSettings
from dicom_node.errors import InvalidIdentifier, NodeError
from dicom_node.interfaces import InstanceIndex
from dicom_node.model import (
    Key,
    Level,
    MatchKind,
    Query,
)
from dicom_node.services.answer import AnswerForm
from dicom_node.services.identifier import (
    UNIQUE_KEYS,
    BadIdentifier,
    Identifier,
    InformationModel,
    level_named,
)

__all__ = ["SOME", "Answers", "FindOptions", "FindResponse", "FindService", "key_of"]

SOME = 64  # answers that go out together, and between two looks for a cancel
MANY = 256  # empty elements of one answer

PENDING = 0xFF00
PENDING_UNSUPPORTED_KEYS = 0xFF01
CANCELLED = 0xFE00

# Elements of an identifier that are no keys (PS3.4 C.4.1.1.3.1), and what every response carries by itself
_NO_KEYS = frozenset(
    {
        "SpecificCharacterSet",
        "QueryRetrieveLevel",
        "QueryRetrieveView",
        "TimezoneOffsetFromUTC",
        "RetrieveAETitle",
        "InstanceAvailability",
    }
)
# PS3.4 C.2.2.2.4: the VRs in which "*" and "?" are wildcards (PN has its own matching)
_WILDCARD_VRS = frozenset({"AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"})
_ONE_VALUE_VRS = frozenset({"LT", "ST", "UR", "UT"})  # a backslash in them is text
_DT = r"\d{4,14}(?:\.\d{1,6})?(?:[+-]\d{4})?"


@dataclass(frozen=True, slots=True, kw_only=True)
class FindOptions:
    """What extended negotiation agreed on for the query's SOP class (PS3.4 C.5.1.1)."""

    relational: bool = False
    datetime: bool = False


@dataclass(slots=True)
class Answers:
    """Some identifiers of one query's responses, one for each row of texts."""

    wanted: _Wanted
    rows: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, *, implicit_vr: bool, little_endian: bool) -> list[bytes]:
        """Their data sets, in order."""
        wanted = self.wanted
        plain = _form(wanted, "", implicit_vr, little_endian)
        found = []
        for row in self.rows:
            text = "".join(row)
            form = plain
            if not text.isascii():
                form = _form(wanted, _character_set(wanted.character_set, text), implicit_vr, little_endian)
            found.append(form.encoded(row))
        return found


class FindResponse(NamedTuple):
    """One C-FIND response, or with a pending status one for each of `answers`, which differ in nothing else.

    `offending` are tags for (0000,0901).
    """

    status: int
    answers: Answers | None = None
    comment: str = ""
    offending: tuple[int, ...] = ()


class _Wanted(NamedTuple):
    """What each answer to a query carries; `character_set` as the requester named its own."""

    returned: tuple[str, ...]
    empty: tuple[tuple[int, str], ...]
    fixed: tuple[tuple[str, str], ...]
    character_set: str


class _Plan(NamedTuple):
    query: Query
    status: int  # of a pending response
    wanted: _Wanted


class FindService:
    """Answers queries from the index. Keeps no state; may be used by several threads."""

    def __init__(self, index: InstanceIndex, ae_title: str, settings: FindSettings) -> None:
        self._index = index
        self._ae_title = ae_title
        self._settings = settings

    def find(
        self,
        model: InformationModel,
        identifier: Identifier,
        negotiated: FindOptions,
        cancelled: Callable[[], bool],
    ) -> Iterator[FindResponse]:
        """Yield the responses in order; the last one is final: 0x0000, 0xFE00 after a cancel, 0xA900, or 0xA700.

        `cancelled` is asked before every `SOME` answers at the least. Nothing is raised for what a peer sent.
        """
        try:
            plan = self._plan(model, identifier, negotiated)
        except BadIdentifier as exc:
            yield FindResponse(status=exc.dimse_status, comment=exc.comment, offending=(exc.tag,))
            return
        try:
            for page in self._index.find_pages(plan.query):
                for first in range(0, len(page), SOME):
                    if cancelled():
                        yield FindResponse(status=CANCELLED)
                        return
                    some = page if len(page) <= SOME else page[first : first + SOME]
                    yield FindResponse(status=plan.status, answers=Answers(plan.wanted, some))
        except NodeError as exc:
            # PS3.4 table C.4-1 knows no 0x0110: a search that failed is "out of resources", worth another try
            status = exc.dimse_status if isinstance(exc, InvalidIdentifier) else 0xA700
            yield FindResponse(status=status, comment=type(exc).__name__)
            return
        yield FindResponse(status=CANCELLED if cancelled() else 0x0000)

    # --- from the identifier to a query

    def _plan(self, model: InformationModel, identifier: Identifier, negotiated: FindOptions) -> _Plan:
        level = level_named(identifier.level, model)
        supported = self._index.supported(level)
        keys: dict[str, Key] = {}
        returns: list[str] = []
        unsupported: list[tuple[int, str]] = []
        for tag, keyword, vr, text in identifier.elements:
            if keyword in _NO_KEYS:
                continue
            if keyword not in supported:
                unsupported.append((tag, vr))
                continue
            returns.append(keyword)
            key = key_of(keyword, vr, text, lists=not self._settings.strict) if text else None
            if key is not None:
                keys[key.keyword] = key
        if self._settings.strict and not negotiated.relational:
            _require_hierarchy(model, level, keys)
        if negotiated.datetime:
            keys = _combine_date_times(keys)
        says_so = self._settings.unsupported_optional_keys == "FF01"
        wanted = _Wanted(
            returned=tuple(returns),
            empty=() if says_so else tuple(unsupported),
            fixed=(
                ("QueryRetrieveLevel", level.value),
                ("RetrieveAETitle", self._ae_title),
                ("InstanceAvailability", "ONLINE"),
            ),
            character_set=identifier.character_set if identifier.character_set in python_encoding else "",
        )
        return _Plan(
            Query(level=level, keys=tuple(keys.values()), returns=wanted.returned),
            PENDING_UNSUPPORTED_KEYS if unsupported and says_so else PENDING,
            wanted,
        )


def key_of(keyword: str, vr: str, text: str, *, lists: bool = True) -> Key | None:
    """How one key matches (PS3.4 C.2.2.2); None for universal matching.

    A list in a key that is no UID (Modality = CT\\MR) matches any of its values, or with `lists` false, and always for
    names, dates and numbers, raises BadIdentifier: multiple value matching (C.2.2.2.8) was not negotiated.
    """
    text = text.strip(" \0")
    if not text or vr == "SQ" or (vr != "UI" and not text.strip("*") and (vr in _WILDCARD_VRS or vr == "PN")):
        return None  # C.2.2.2.3, and note 2 of C.2.2.2.4: "*" alone is universal matching
    values = tuple(value.strip(" \0") for value in text.split("\\") if value.strip(" \0"))
    if keyword == "ModalitiesInStudy":
        return Key(keyword=keyword, kind=MatchKind.MODALITIES, values=values)
    if vr == "UI":
        return Key(keyword=keyword, kind=MatchKind.SINGLE if len(values) == 1 else MatchKind.UID_LIST, values=values)
    if vr in _ONE_VALUE_VRS:
        values = (text,)
    if len(values) > 1 and lists and vr in _WILDCARD_VRS:
        return Key(keyword=keyword, kind=MatchKind.WILDCARD, values=values)
    if len(values) != 1:
        raise BadIdentifier(f"{keyword} takes one value", int(DataElement(keyword, "SH", "").tag))
    value = values[0]
    if vr == "PN":
        return Key(keyword=keyword, kind=MatchKind.PERSON_NAME, values=(value,))
    if vr in ("DA", "TM", "DT"):
        return _moment_key(keyword, vr, value)
    if vr in _WILDCARD_VRS and ("*" in value or "?" in value):
        return Key(keyword=keyword, kind=MatchKind.WILDCARD, values=(value,))
    return Key(keyword=keyword, kind=MatchKind.SINGLE, values=(value,))


def _moment_key(keyword: str, vr: str, value: str) -> Key:
    # PS3.5 6.2: 1993.08.22 and 10:09:07 are the forms of ACR-NEMA, still sent by old clients
    if vr == "DT":
        found = re.fullmatch(rf"({_DT})?-({_DT})?", value) if not re.fullmatch(_DT, value) else None
        ends = (found[1] or "", found[2] or "") if found else None
    else:
        value = value.replace("." if vr == "DA" else ":", "")
        first, hyphen, last = value.partition("-")
        ends = (first.strip(), last.strip()) if hyphen else None
    if ends is None:
        return Key(keyword=keyword, kind=MatchKind.SINGLE, values=(value,))
    return Key(keyword=keyword, kind=MatchKind.RANGE, values=ends)


def _combine_date_times(keys: dict[str, Key]) -> dict[str, Key]:
    """Date and time ranges become one range over moments (PS3.4 C.2.2.2.5.2); only when negotiated."""
    combined = dict(keys)
    for keyword, date in keys.items():
        if not keyword.endswith("Date"):
            continue
        time = keys.get(f"{keyword.removesuffix('Date')}Time")
        if time is None or date.kind is not MatchKind.RANGE or time.kind is not MatchKind.RANGE:
            continue
        first = date.values[0] and date.values[0] + _filled(time.values[0], "000000.000000")
        last = date.values[1] and date.values[1] + _filled(time.values[1], "235959.999999")
        combined[keyword] = replace(date, kind=MatchKind.DATETIME_RANGE, values=(first, last))
        del combined[time.keyword]
    return combined


def _filled(time: str, rest: str) -> str:
    return (time + rest[len(time) :])[:13]


def _require_hierarchy(model: InformationModel, level: Level, keys: dict[str, Key]) -> None:
    """PS3.4 C.4.1.2.1: the unique keys of the levels above are there, with one value each."""
    for above in model.levels[: model.levels.index(level)]:
        key = keys.get(UNIQUE_KEYS[above])
        if key is None or key.kind is not MatchKind.SINGLE:
            tag = DataElement(UNIQUE_KEYS[above], "SH", "").tag
            raise BadIdentifier(f"{UNIQUE_KEYS[above]} with one value is required", int(tag))


# --- encoding of a response ----------------------------------------------------------------------------------------


def _form(wanted: _Wanted, character_set: str, implicit_vr: bool, little_endian: bool) -> AnswerForm:
    # a peer may name as many elements as an identifier holds: such a form is not kept
    build = _kept_form if len(wanted.empty) <= MANY else _kept_form.__wrapped__
    return build(wanted, character_set, implicit_vr, little_endian)


@lru_cache(maxsize=256)
def _kept_form(wanted: _Wanted, character_set: str, implicit_vr: bool, little_endian: bool) -> AnswerForm:
    return AnswerForm(
        wanted.returned,
        wanted.empty,
        wanted.fixed,
        implicit_vr=implicit_vr,
        little_endian=little_endian,
        character_set=character_set,
    )


def _character_set(requested: str, text: str) -> str:
    """The Specific Character Set the response needs; '' for the default repertoire."""
    if text.isascii():
        return ""
    codec = python_encoding.get(requested, "")
    if codec and requested not in ("", "ISO_IR 6") and not requested.startswith("ISO 2022"):
        try:
            text.encode(codec)
            return requested
        except UnicodeEncodeError:
            pass
    return "ISO_IR 192"
