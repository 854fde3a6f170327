"""Objects an engine sent back: what one refers to, and one made the study's own again.

References are read from the whole object but its pixel data, wherever they stand (PS3.3 10.8, C.12.4, C.17.3); those to
patient, study, visit and procedure step say nothing about images and are left out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_node.engines.outgoing import opened_data_set
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import EngineError, EngineRejected
from dicom_node.interfaces import ReturnedObject
from dicom_node.quiet import quiet

__all__ = ["Described", "described", "restored_copy"]

MAX_HEADER_BYTES = 256 * 1024**2
_FIRST_PIXEL_TAG = 0x7FE00001
_MAX_DEPTH = 64
_FRAMES = frozenset({"FrameOfReferenceUID", "ReferencedFrameOfReferenceUID", "RelatedFrameOfReferenceUID"})
_IN_ITEMS = frozenset({"SeriesInstanceUID", "SOPInstanceUID"})
_NO_IMAGES = frozenset(
    {
        *("ReferencedStudySequence", "ReferencedPatientSequence", "ReferencedVisitSequence"),
        *("ReferencedPerformedProcedureStepSequence", "ReferencedRequestSequence"),
    }
)
_UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, NotImplementedError, EOFError, OverflowError, OSError),
    *(struct.error, RecursionError),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A returned object and what it says: the SOP and Series Instance UIDs it refers to, its frames of reference."""

    returned: ReturnedObject
    refers_to: frozenset[str]
    frames: frozenset[str]
    patient_id: str

    @property
    def uid(self) -> str:
        """Its SOP Instance UID."""
        return self.returned.instance.sop_instance_uid

    @property
    def series(self) -> str:
        """Its Series Instance UID."""
        return self.returned.instance.series_instance_uid


def described(returned: ReturnedObject) -> Described:
    """Read it. What cannot be read, or was not kept, refers to nothing and names nobody."""
    refers_to: set[str] = set()
    frames: set[str] = set()
    patient_id = ""
    if returned.instance.path:
        try:
            with quiet():
                ds = _read(returned, pixels=False)
                patient_id = str(ds.get("PatientID") or "").strip()
                _collect(ds, 0, refers_to, frames)
        except (*_UNREADABLE, EngineRejected):
            refers_to, frames, patient_id = set(), set(), ""
    return Described(returned=returned, refers_to=frozenset(refers_to), frames=frozenset(frames), patient_id=patient_id)


def _collect(ds: Dataset, depth: int, refers_to: set[str], frames: set[str]) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    for element in ds:
        if element.VR == "SQ":
            if element.keyword not in _NO_IMAGES:
                for item in element.value:
                    _collect(item, depth + 1, refers_to, frames)
        elif element.VR == "UI":
            if element.keyword == "ReferencedSOPInstanceUID" or (depth and element.keyword in _IN_ITEMS):
                refers_to.update(_uids(element))
            elif element.keyword in _FRAMES:
                frames.update(_uids(element))


def _uids(element: DataElement) -> list[str]:
    value = element.value
    return [str(uid) for uid in ([value] if isinstance(value, str) else value or []) if uid]


def restored_copy(one: Described, pseudonyms: Pseudonyms, source: Dataset, siblings: frozenset[str]) -> Dataset:
    """The object with the study's own UIDs and patient, pixel data as it is; see `Pseudonyms.restored`.

    Native pixel data is written with explicit VR, little endian, whatever it came in. Raises EngineError (its
    ForeignReference for what was never handed out), EngineRejected for one in big endian.
    """
    syntax = one.returned.instance.transfer_syntax_uid
    if syntax == ExplicitVRBigEndian:
        raise EngineRejected("a returned object is in big endian, which the node does not rewrite")
    try:
        with quiet():
            returned = _read(one.returned, pixels=True)
    except _UNREADABLE as exc:
        raise EngineError(f"a returned object cannot be read ({type(exc).__name__})") from None
    copy = pseudonyms.restored(returned, source, siblings=siblings)
    if syntax in (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        syntax = str(ExplicitVRLittleEndian)
    copy.file_meta = FileMetaDataset()
    copy.file_meta.TransferSyntaxUID = UID(syntax)
    return copy


class _Bounded:
    """A file of which no more than so many bytes are read."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._left = file, most
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As a file does. Raises ValueError beyond the bound."""
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("more than may be read")
        return data


def _read(returned: ReturnedObject, *, pixels: bool) -> Dataset:
    opened, implicit, little = opened_data_set(returned.instance)

    def stop(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        return not pixels and int.__ge__(tag, _FIRST_PIXEL_TAG)

    with opened as file:
        most = MAX_HEADER_BYTES + (returned.instance.data_set_length if pixels else 0)
        return read_dataset(_Bounded(file, most), implicit, little, stop_when=stop)  # type: ignore[arg-type]
