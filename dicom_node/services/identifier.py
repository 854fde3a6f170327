"""Reading the identifier of a query or retrieve request (PS3.4 C.2.2.1, C.4): its level, its keys, its text.

Shared by `find` and `retrieve`; knows no wire and no index. A query is read to plain values, an `Identifier`: from a
data set of pydicom's by `identifier_of`, and mostly, much quicker, by `scanner.scan_identifier`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.tag import BaseTag, Tag

from dicom_node.errors import InvalidIdentifier
from dicom_node.model import Level

__all__ = [
    "UNIQUE_KEYS",
    "UNREADABLE",
    "BadIdentifier",
    "Element",
    "Identifier",
    "InformationModel",
    "identifier_of",
    "level_named",
    "read_element",
    "read_level",
    "text_of",
    "uids_of",
]

# what pydicom raises for values that are none of their VR, and sequences that are none
UNREADABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, ArithmeticError, NotImplementedError),
    *(OSError, EOFError, RecursionError, struct.error, BytesLengthException),
)


# One element of a query's identifier: its tag, its keyword ('' for what is not the Standard's), the Standard's VR, and
# its value as `text_of` gives it ('' for a sequence). A plain tuple: there are a dozen in every query.
Element = tuple[int, str, str, str]


class InformationModel(Enum):
    """Query/Retrieve Information Models of PS3.4 C.6."""

    PATIENT_ROOT = "PATIENT_ROOT"
    STUDY_ROOT = "STUDY_ROOT"

    @property
    def levels(self) -> tuple[Level, ...]:
        """Its levels, from the top (PS3.4 C.6.1.1, C.6.2.1)."""
        below = (Level.STUDY, Level.SERIES, Level.IMAGE)
        return (Level.PATIENT, *below) if self is InformationModel.PATIENT_ROOT else below


UNIQUE_KEYS: Mapping[Level, str] = {
    Level.PATIENT: "PatientID",
    Level.STUDY: "StudyInstanceUID",
    Level.SERIES: "SeriesInstanceUID",
    Level.IMAGE: "SOPInstanceUID",
}


@dataclass
class BadIdentifier(InvalidIdentifier):
    """The identifier does not fit its SOP class; `tag` is the offending element, `comment` fits Error Comment (LO)."""

    comment: str
    tag: int

    def __str__(self) -> str:
        return self.comment


def read_element(identifier: Dataset, keyword: str) -> DataElement | None:
    """The element with its value decoded, or None. Raises BadIdentifier for a value that is none of its VR."""
    tag = Tag(keyword)
    if tag not in identifier:
        return None
    try:
        return identifier[tag]
    except UNREADABLE as exc:
        raise BadIdentifier(f"{keyword} cannot be understood", int(tag)) from exc


def text_of(element: DataElement) -> str:
    """The element's value as decoded text; several values are joined by backslashes, padding is gone."""
    value = element.value
    if value is None or isinstance(value, bytes) or element.VR == "SQ":
        return ""
    values = value if element.VM > 1 else [value]
    return "\\".join(str(item).strip(" \0") for item in values)


def uids_of(identifier: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of a unique key; () when it is absent or empty."""
    element = read_element(identifier, keyword)
    if element is None:
        return ()
    return tuple(value for value in text_of(element).split("\\") if value)


def read_level(identifier: Dataset, model: InformationModel) -> Level:
    """Query/Retrieve Level (0008,0052). Raises BadIdentifier when it is missing or not one of the model's."""
    element = read_element(identifier, "QueryRetrieveLevel")
    return level_named(text_of(element) if element is not None else "", model)


def level_named(text: str, model: InformationModel) -> Level:
    """The model's level of that name. Raises BadIdentifier when it has none."""
    for level in model.levels:
        if level.value == text:
            return level
    known = ", ".join(level.value for level in model.levels)
    raise BadIdentifier(f"Query/Retrieve Level is none of {known}", 0x00080052)


class Identifier(NamedTuple):
    """A query's identifier: its level and its character set as they were named, '' for none, and all its elements.

    Group lengths and private creators are left out: they only accompany keys.
    """

    level: str
    character_set: str
    elements: Sequence[Element]


def identifier_of(data_set: Dataset) -> Identifier:
    """What the data set asks for. Raises BadIdentifier for a value that is none of its VR."""
    level, elements = "", []
    found = read_element(data_set, "QueryRetrieveLevel")
    if found is not None:
        level = text_of(found)
    for tag in data_set.keys():  # noqa: SIM118 - a Dataset iterates over elements, decoding each
        if tag.element != 0 and not tag.is_private_creator:
            elements.append(_element(data_set, tag))
    character_set = read_element(data_set, "SpecificCharacterSet")
    return Identifier(level, text_of(character_set) if character_set is not None else "", elements)


def _element(data_set: Dataset, tag: BaseTag) -> Element:
    try:
        element = data_set[tag]
    except UNREADABLE as exc:
        raise BadIdentifier("a key has a value that is none of its VR", int(tag)) from exc
    keyword = element.keyword  # looked up by pydicom each time
    # the VR the Standard gives the attribute: an Explicit VR sender may say UN
    vr = dictionary_VR(tag)[:2] if keyword else str(element.VR)[:2]
    return int(tag), keyword, vr, "" if element.VR == "SQ" else text_of(element)
