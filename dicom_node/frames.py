"""The attributes of an image, and of each frame of a multi-frame one, as plain values.

pydicom's own conversion of the decimal strings of 300 headers costs 0.3 s; nobody here needs it. Enhanced images keep
what differs between frames in functional groups (PS3.3 C.7.6.16): shared ones, overridden by the frame's own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from dicom_node.planes import GEOMETRY_KEYWORDS

__all__ = ["IMAGE_TAGS", "frame_headers", "plain_header"]

_MAX_FRAMES = 16384  # a longer one is a slide or a film, no volume

_KEYWORDS = (
    *GEOMETRY_KEYWORDS,
    *("Modality", "BodyPartExamined", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("PresentationIntentType", "ViewPosition", "ViewCodeSequence", "BurnedInAnnotation"),
    "AnatomicRegionSequence",
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# The functional groups that say where a frame lies and what its values are (PS3.3 C.7.6.16.2, C.8.13.5, C.8.15.3)
_MACROS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence"),
    *("PixelValueTransformationSequence", "CTImageFrameTypeSequence", "MRImageFrameTypeSequence"),
    *("PETFrameTypeSequence", "MREchoSequence"),
)
# What a functional group calls an attribute that single-frame images have under another name
_RENAMED = {
    "FrameType": "ImageType",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "EffectiveEchoTime": "EchoTime",
    "StackID": "StackID",
}
_KEYWORD_OF = {tag: word for word in (*_KEYWORDS, *_RENAMED) if (tag := tag_for_keyword(word)) is not None}
IMAGE_TAGS: list[BaseTag | int] = [
    *(tag for tag, word in _KEYWORD_OF.items() if word in _KEYWORDS),
    *(tag for word in _GROUPS if (tag := tag_for_keyword(word)) is not None),
]
# US, or US / SS for padding values, whose sign the reader of the pixels settles; UL; FD
_BINARY = {
    **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"), "H"),
    **dict.fromkeys(("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"), "H"),
    **{"FrameAcquisitionNumber": "H", "TemporalPositionIndex": "L", "EffectiveEchoTime": "d"},
}


def plain_header(ds: Dataset, *, little: bool) -> dict[str, Any]:
    """Keyword to text (values joined by a backslash, padding stripped), number, or items of a sequence.

    Only the attributes that matter to geometry and pixel values; empty ones are not in it. `little` is the byte order
    `ds` was read from.
    """
    header: dict[str, Any] = {}
    for element in ds.values():
        keyword = _KEYWORD_OF.get(element.tag)
        if keyword is None:
            continue
        value: Any = element.value
        if keyword.endswith("Sequence"):
            value = list(ds[element.tag].value)
        elif isinstance(value, bytes):
            code = _BINARY.get(keyword)
            value = _number(value, code, little=little) if code else value.decode("ascii", "replace").strip(" \0")
        if value not in (None, "", []):
            header[_RENAMED.get(keyword, keyword)] = value
    return header


def _number(value: bytes, code: str, *, little: bool) -> int | float | None:
    form = f"{'<' if little else '>'}{code}"
    if len(value) < struct.calcsize(form):
        return None
    number: int | float = struct.unpack_from(form, value)[0]
    return number


def frame_headers(ds: Dataset, header: Mapping[str, Any], *, little: bool) -> tuple[Mapping[str, Any], ...]:
    """`header` of the image as it holds for each of its frames, with `FrameNumber` (from 1) instead of the count.

    Empty for an image without functional groups, and for one whose groups do not fit its number of frames.
    """
    if _GROUPS[1] not in ds:
        return ()
    try:
        count = int(header.get("NumberOfFrames", "1"))
    except ValueError:
        return ()
    if not 1 <= count <= _MAX_FRAMES or len(ds[_GROUPS[1]].value) != count:
        return ()
    common = {key: value for key, value in header.items() if key != "NumberOfFrames"}
    if _GROUPS[0] in ds:
        for item in ds[_GROUPS[0]].value:
            common |= _macros(item, little=little)
    return tuple(
        {**common, **_macros(item, little=little), "FrameNumber": number}
        for number, item in enumerate(ds[_GROUPS[1]].value, start=1)
    )


def _macros(groups: Dataset, *, little: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keyword in _MACROS:
        if keyword in groups:
            for item in groups[keyword].value[:1]:
                found |= plain_header(item, little=little)
    return found
