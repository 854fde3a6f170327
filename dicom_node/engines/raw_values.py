"""Values of header elements as they lie in the file, judged before they are believed.

Not through pydicom's conversion: it warns with the very values that must reach no log. What does not fit its VR is no
value here. Works on elements as read (raw) and on ones already converted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from pydicom import config
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from dicom_node.engines.allow_list import SEQUENCES

__all__ = [
    "MAX_DEPTH",
    "element_of",
    "frame_types",
    "integers",
    "items_of",
    "number_element",
    "numbers_of",
    "only_text",
    "pointer_element",
    "table_element",
    "texts",
    "texts_of",
]

MAX_DEPTH = 16  # sequences inside sequences; the Standard's images need five

_GROUP_TAGS = (0x52009229, 0x52009230)  # Shared, Per-Frame Functional Groups Sequence
_FRAME_TYPE_TAGS = tuple(
    int(tag)
    for keyword in sorted(SEQUENCES)
    if keyword.endswith("FrameTypeSequence") and (tag := tag_for_keyword(keyword)) is not None
)
_DECIMAL = re.compile(r"[+-]?(\d{1,16}(\.\d{0,16})?|\.\d{1,16})([eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d{1,11}")
_FORMATS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


def element_of(ds: Dataset, keyword: str) -> RawDataElement | DataElement | None:
    """The element of that keyword as it was read, None when there is none."""
    tag = tag_for_keyword(keyword)
    return ds.get_item(tag) if tag is not None and tag in ds else None


def texts(element: RawDataElement | DataElement | None) -> list[str]:
    """The values of a text element, unpadded; none when it is no ASCII. Says nothing to any log, unlike pydicom."""
    if element is None or element.value is None:
        return []
    value = element.value
    if isinstance(value, bytes):
        text = value.decode("ascii", "replace")
        return [] if "\ufffd" in text else [part.strip(" \0") for part in text.split("\\")]
    values = list(value) if isinstance(value, list | tuple | MultiValue) else [value]
    words = [str(part).strip(" \0") for part in values]
    return words if all(word.isascii() for word in words) else []


def texts_of(ds: Dataset, keyword: str) -> list[str]:
    """`texts` of the element of that keyword."""
    return texts(element_of(ds, keyword))


def only_text(ds: Dataset, keyword: str) -> str:
    """The attribute's only value, '' when there is none or several."""
    words = texts_of(ds, keyword)
    return words[0] if len(words) == 1 else ""


def frame_types(ds: Dataset) -> Iterator[str]:
    """The words of Image Type and, in the functional groups, of Frame Type (PS3.3 C.7.6.16.2)."""
    yield from texts_of(ds, "ImageType")
    for groups in _GROUP_TAGS:
        for item in items_of(ds, groups) if groups in ds else ():
            for tag in _FRAME_TYPE_TAGS:
                for inner in items_of(item, tag) if tag in item else ():
                    yield from texts_of(inner, "FrameType")


def items_of(ds: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence, none when its bytes are no sequence."""
    try:
        value = ds[tag].value
    except (ValueError, TypeError, KeyError, EOFError, OSError, struct.error, NotImplementedError, AttributeError):
        return []  # bytes that are no sequence
    return list(value) if isinstance(value, Sequence) else []


def integers(element: RawDataElement | DataElement | None, vr: str, *, signed: bool) -> list[float] | None:
    """The numbers of a binary element, None when it holds something else."""
    if element is None:
        return None
    value = element.value
    if isinstance(element, RawDataElement):
        form = _FORMATS[_binary_vr(element.VR, vr, signed=signed)]
        raw = value or b""
        if not isinstance(raw, bytes) or len(raw) % struct.calcsize(form):
            return None
        order = "<" if element.is_little_endian else ">"
        unpacked: tuple[float, ...] = struct.unpack(f"{order}{len(raw) // struct.calcsize(form)}{form}", raw)
        return list(unpacked)
    values = list(value) if isinstance(value, list | tuple | MultiValue) else [value]
    numbers = [part for part in values if isinstance(part, int | float) and not isinstance(part, bool)]
    return numbers if len(numbers) == len(values) else None


def _binary_vr(stated: str | None, vr: str, *, signed: bool) -> str:
    options = vr.split(" or ")
    if stated in options and stated in _FORMATS:
        return stated
    return ("SS" if signed else "US") if len(options) > 1 else vr


def number_element(element: RawDataElement | DataElement, tag: int, *, signed: bool) -> DataElement | None:
    """The element with its numbers as they were written, None when they are no numbers of its VR."""
    vr = dictionary_VR(tag)
    if vr in ("DS", "IS"):
        words = texts(element)
        pattern = _DECIMAL if vr == "DS" else _INTEGER
        if not any(words) or not all(not word or pattern.fullmatch(word) for word in words):
            return None
        kept: list[str] | list[float] = words
    else:
        if isinstance(element, RawDataElement) and element.VR not in (None, "UN", *vr.split(" or ")):
            return None
        numbers = integers(element, vr, signed=signed)
        if not numbers:
            return None
        vr, kept = _binary_vr(element.VR, vr, signed=signed), numbers
    value = kept if len(kept) > 1 else kept[0]
    return DataElement(tag, vr, value, validation_mode=config.IGNORE)


def numbers_of(ds: Dataset, keyword: str) -> list[float]:
    """The numbers of that keyword, none when there are none or they are no numbers."""
    element = element_of(ds, keyword)
    if element is None:
        return []
    made = number_element(element, int(element.tag), signed=False)
    if made is None:
        return []
    return [float(part) for part in (made.value if isinstance(made.value, MultiValue | list) else [made.value])]


def table_element(
    element: RawDataElement | DataElement, tag: int, ds: Dataset, descriptor: str, *, signed: bool
) -> DataElement | None:
    """A lookup table, if it is as long as its descriptor says (PS3.3 C.7.6.3.1.5, C.11.1.1.1): nothing rides along."""
    described = integers(element_of(ds, descriptor), "US or SS", signed=False)
    if not described or len(described) != 3:
        return None
    value = element.value
    if isinstance(value, list | MultiValue | int):
        words = [int(part) & 0xFFFF for part in ([value] if isinstance(value, int) else value)]
        value = struct.pack(f"<{len(words)}H", *words)
    count = int(described[0]) & 0xFFFF or 0x10000
    if not isinstance(value, bytes) or len(value) not in (count, count + count % 2, 2 * count):
        return None
    return DataElement(tag, "OW", value)


def pointer_element(element: RawDataElement | DataElement, tag: int) -> DataElement | None:
    """Attribute tags, if every one is of the Standard."""
    value: Any = element.value
    if isinstance(element, RawDataElement):
        if not isinstance(value, bytes) or len(value) % 4:
            return None
        order = "<" if element.is_little_endian else ">"
        halves = struct.unpack(f"{order}{len(value) // 2}H", value)
        numbers = [group << 16 | number for group, number in zip(halves[::2], halves[1::2], strict=True)]
    else:
        parts = list(value) if isinstance(value, list | MultiValue) else [value]
        numbers = [int(part) if isinstance(part, int) else 0 for part in parts]
    if not numbers or not all(dictionary_has_tag(number) and keyword_for_tag(number) for number in numbers):
        return None
    kept = [BaseTag(number) for number in numbers]
    return DataElement(tag, "AT", kept if len(kept) > 1 else kept[0])
