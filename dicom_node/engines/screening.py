"""Which images may leave the node at all: the last gate before an engine, whatever else is configured.

What it cannot do is look at the picture: text and faces in the pixels are not found, see `privacy`.
"""

from __future__ import annotations

import re

from pydicom.dataset import Dataset

from dicom_node.engines.allow_list import IMAGE_CLASSES, PRONE_TO_TEXT, SLIDE_CLASS
from dicom_node.engines.raw_values import frame_types, integers, numbers_of, only_text, texts_of

__all__ = ["OVERLAY_TAGS", "SCREENED", "why_not"]

_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_PIXELS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel")
_JUDGED = ("BurnedInAnnotation", "RecognizableVisualFeatures", "ConversionType", "SpecimenLabelInImage", "ImageType")
SCREENED = (*_REQUIRED, *_PIXELS, *_JUDGED, "Modality", "PhotometricInterpretation")
# Overlay Bits Allocated and Overlay Bit Position (60xx,0100), (60xx,0102): graphics inside the pixel cells, retired
OVERLAY_TAGS: tuple[int, ...] = tuple(
    group << 16 | element for group in range(0x6000, 0x6020, 2) for element in (0x0100, 0x0102)
)
_SLIDE_KINDS = frozenset({"LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER"})  # the last: an overview in older objects
_CAPTURED = re.compile(r"SCREEN|CAPTURE|SNAPSHOT|DOSE|REPORT|PROTOCOL|\bPROT\b|PASTE")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR_IS_NORMAL = frozenset({SLIDE_CLASS, "1.2.840.10008.5.1.4.1.1.4.3", *PRONE_TO_TEXT})


def why_not(header: Dataset, *, hide: bool) -> str:
    """Why this image may not leave the node, for people and without patient data; '' when it may.

    Never, whatever is configured: labels, overviews and thumbnails of whole slides, and slides whose image shows the
    label. With `hide` moreover: what is no image of a class `allow_list` knows, what says or usually has burned-in
    text or a recognisable face, overlays inside the pixel cells, and a header that does not describe its pixels.
    """
    return _never(header) or (_not_hidden(header) if hide else "")


def _never(header: Dataset) -> str:
    slide = only_text(header, "SOPClassUID") == SLIDE_CLASS or only_text(header, "Modality").upper() == "SM"
    if not slide:
        return ""
    kinds = {word.upper() for word in frame_types(header)}
    if found := sorted(kinds & _SLIDE_KINDS):
        return f"a whole slide {found[0]} image never leaves the node: it may show the label"
    if "VOLUME" not in kinds:
        return "a whole slide image that does not say it is a VOLUME never leaves the node: it may show the label"
    if any(word.upper() != "NO" for word in texts_of(header, "SpecimenLabelInImage") if word):
        return "a whole slide image that shows its label never leaves the node"
    return ""


def _not_hidden(header: Dataset) -> str:
    sop_class = only_text(header, "SOPClassUID")
    if sop_class not in IMAGE_CLASSES:
        return "only images of known classes may leave the node without identification, and this is none"
    if missing := [keyword for keyword in _REQUIRED if not only_text(header, keyword)]:
        return f"the image has no {missing[0]}"
    if missing := [keyword for keyword in _PIXELS if not numbers_of(header, keyword)]:
        return f"the image does not describe its pixels: no {missing[0]}"
    if _has_overlay_in_pixels(header):
        return "an overlay lies inside the pixel data, and nobody can say what it shows"
    if any(word.upper() == "YES" for word in texts_of(header, "RecognizableVisualFeatures")):
        return "Recognizable Visual Features is YES: the patient could be recognised"
    burned = [word.upper() for word in texts_of(header, "BurnedInAnnotation") if word]
    if burned and burned != ["NO"]:
        return "Burned In Annotation is not NO: the picture may name the patient"
    return "" if burned else _usually_has_text(header, sop_class)


def _usually_has_text(header: Dataset, sop_class: str) -> str:
    """Why a picture that says nothing about burned-in text must be taken to have some."""
    tail = "without Burned In Annotation NO may name the patient in the picture"
    if sop_class in PRONE_TO_TEXT or only_text(header, "Modality").upper() in ("US", "IVUS"):
        return f"{PRONE_TO_TEXT.get(sop_class, 'ultrasound')} {tail}"
    if only_text(header, "ConversionType"):
        return f"a converted image (Conversion Type) {tail}"
    if any(_CAPTURED.search(word.upper().replace("_", " ")) for word in texts_of(header, "ImageType")):
        return f"a screen shot {tail}"
    photometric = only_text(header, "PhotometricInterpretation").upper()
    if photometric not in _GREY and sop_class not in _COLOUR_IS_NORMAL:
        return f"a colour image of a grey-scale modality {tail}"
    return ""


def _has_overlay_in_pixels(header: Dataset) -> bool:
    for tag in OVERLAY_TAGS:
        numbers = integers(header.get_item(tag), "US", signed=False) if tag in header else None
        if numbers is None:
            if tag in header:
                return True
        elif any(number > (1 if tag & 0xFFFF == 0x0100 else 0) for number in numbers):
            return True
    return False
