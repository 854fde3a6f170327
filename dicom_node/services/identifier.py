"""Reading the identifier of a query or retrieve request (PS3.4 C.2.2.1, C.4): its level, its keys, its text.

Shared by `find` and `retrieve`; knows no wire and no index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from dicom_node.errors import InvalidIdentifier
from dicom_node.model import Level

__all__ = ["UNIQUE_KEYS", "BadIdentifier", "InformationModel", "read_element", "read_level", "text_of", "uids_of"]


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
    except (ValueError, TypeError, KeyError, ArithmeticError, NotImplementedError) as exc:
        raise BadIdentifier(f"{keyword} cannot be understood", int(tag)) from exc


def text_of(element: DataElement) -> str:
    """The element's value as decoded text; several values are joined by backslashes, padding is gone."""
    value = element.value
    if value is None or isinstance(value, bytes):
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
    text = text_of(element) if element is not None else ""
    for level in model.levels:
        if level.value == text:
            return level
    known = ", ".join(level.value for level in model.levels)
    raise BadIdentifier(f"Query/Retrieve Level is none of {known}", 0x00080052)
