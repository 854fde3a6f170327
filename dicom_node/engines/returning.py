"""A DICOM object an engine sent back, made one of the study again: its UIDs, its patient, and nothing it invented.

Knows no job and no file: takes the map of the UIDs that were handed out. What an object *is* (its own SOP Instance,
Series Instance and other new UIDs) is the engine's to say; what it *refers to* must have been handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from dicom_node.errors import EngineError
from dicom_node.quiet import quiet

__all__ = ["ForeignReference", "restored"]

_MAX_DEPTH = 64
# UI attributes that point at something, wherever they stand; the others point when they are in an item
_REFERENCES = frozenset(
    {
        *("StudyInstanceUID", "ReferencedSOPInstanceUID", "FrameOfReferenceUID", "ReferencedFrameOfReferenceUID"),
        *("VolumeFrameOfReferenceUID", "TableFrameOfReferenceUID", "SynchronizationFrameOfReferenceUID"),
        "RelatedFrameOfReferenceUID",
    }
)
_IN_ITEMS = frozenset({"SeriesInstanceUID", "SOPInstanceUID"})
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, LookupError, NotImplementedError, EOFError, OSError)


class ForeignReference(EngineError):
    """A returned object refers to a UID the job never handed out, or claims to be one of its sources."""


def restored(
    returned: Dataset, source: Dataset, originals: Mapping[str, str], siblings: frozenset[str], own: tuple[str, ...]
) -> Dataset:
    """See `privacy.Pseudonyms.restored`; `own` names the attributes taken from `source`."""
    try:
        with quiet():
            return _restored(returned, source, originals, siblings, own)
    except _UNREADABLE as exc:
        raise EngineError(f"a returned object cannot be read ({type(exc).__name__})") from None


def _restored(
    returned: Dataset, source: Dataset, originals: Mapping[str, str], siblings: frozenset[str], own: tuple[str, ...]
) -> Dataset:
    instance, series = str(returned.get("SOPInstanceUID", "")), str(returned.get("SeriesInstanceUID", ""))
    if not instance or not series:
        raise ForeignReference("a returned object has no SOP or Series Instance UID")
    if instance in originals or instance in originals.values():
        raise ForeignReference("a returned object claims to be one of the job's sources")
    if series in originals.values():
        raise ForeignReference("a returned object names a series of the node that was never handed out")
    if originals.get(str(returned.get("StudyInstanceUID", ""))) != str(source.StudyInstanceUID).strip(" \0"):
        raise ForeignReference("a returned object belongs to no study of this job")
    whole = _copied(returned)
    known = siblings | {instance, series}
    for element, depth in _uid_elements(whole, 0):
        points = element.keyword in _REFERENCES or (depth > 0 and element.keyword in _IN_ITEMS)
        if points and not all(uid in originals or uid in known or uid in UID_dictionary for uid in _uids(element)):
            raise ForeignReference(f"a returned object's {element.keyword} was never handed out")
        _map(element, originals)
    _take_over(whole, source, own)
    return whole


def _copied(returned: Dataset) -> Dataset:
    """All of it decoded, in UTF-8, free of the original; pixel data is shared, not copied."""
    returned.decode()
    whole = _copy_of(returned, 0)
    whole.SpecificCharacterSet = "ISO_IR 192"
    return whole


def _copy_of(ds: Dataset, depth: int) -> Dataset:
    if depth > _MAX_DEPTH:
        raise EngineError(f"a returned object has sequences nested deeper than {_MAX_DEPTH}")
    copy = Dataset()
    for element in ds:
        value = [_copy_of(item, depth + 1) for item in element.value] if element.VR == "SQ" else element.value
        copied = DataElement(element.tag, element.VR, value)
        copied.is_undefined_length = element.is_undefined_length
        copy.add(copied)
    if depth:
        copy.pop("SpecificCharacterSet", None)  # the text of items is decoded too
    return copy


def _uid_elements(ds: Dataset, depth: int) -> Iterator[tuple[DataElement, int]]:
    for element in ds:
        if element.VR == "UI":
            yield element, depth
        elif element.VR == "SQ":
            for item in element.value:
                yield from _uid_elements(item, depth + 1)


def _uids(element: DataElement) -> list[str]:
    value = element.value
    return [str(uid) for uid in ([value] if isinstance(value, str) else value or []) if uid]


def _map(element: DataElement, originals: Mapping[str, str]) -> None:
    uids = _uids(element)
    if uids:
        mapped = [originals.get(uid, uid) for uid in uids]
        element.value = mapped if len(mapped) > 1 else mapped[0]


def _take_over(whole: Dataset, source: Dataset, own: tuple[str, ...]) -> None:
    """Patient and study attributes of the source; those it lacks the result has not either."""
    for keyword in own:
        if keyword in whole:
            del whole[keyword]
        if keyword in source:
            whole.add(_decoded(source[keyword]))


def _decoded(element: DataElement) -> DataElement:
    """The element as plain text: names keep the character set they came in, which is not that of the result."""
    value = element.value
    if element.VR == "SQ":
        value = [_decoded_item(item) for item in value]
    elif element.VR == "PN":
        value = [str(name) for name in value] if isinstance(value, MultiValue | list) else str(value or "")
    return DataElement(element.tag, element.VR, value)


def _decoded_item(item: Dataset) -> Dataset:
    copy = Dataset()
    for element in item:
        if element.keyword != "SpecificCharacterSet":
            copy.add(_decoded(element))
    return copy
