"""Series headers, read from the files when a series is complete: what rules and geometry need, off the intake path.

Everything is bounded: pixel data and binary values are left out, so are texts and numbers of more than VALUE_BYTES_MAX
bytes, sequences deeper than DEPTH_MAX; of a sequence the first ITEMS_MAX items are kept, of a keyword the first
DISTINCT_MAX different values (with their number). Slices of one series mostly repeat each other: an element with bytes
seen before is not decoded again.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from dicom_node.errors import InvalidInstance, StorageError
from dicom_node.model import SeriesHeader, StoredInstance

__all__ = ["read_data_set", "read_series_header"]

VALUE_BYTES_MAX = 4096
ELEMENT_BYTES_MAX = 64 * 1024  # a longer element, sequence or not, is not even read
INFLATED_BYTES_MAX = 16 * 1024**2
DISTINCT_MAX = 64
ITEMS_MAX = 64
DEPTH_MAX = 6

GEOMETRY = (
    "SOPInstanceUID",
    "SOPClassUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImageType",
    "FrameOfReferenceUID",
)
# one item per frame: thousands, and of no use to a rule
_LEFT_OUT = frozenset({"PerFrameFunctionalGroupsSequence", "DataSetTrailingPadding"})
_BINARY = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN", "OB or OW"})
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_CHARACTER_SET = BaseTag(0x00080005)
# what pydicom raises for bytes it cannot make sense of
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
_NOTHING = object()


def read_series_header(instances: Sequence[StoredInstance]) -> SeriesHeader:
    """The header of the series these instances make up.

    An empty value counts as missing. Raises StorageError when a file cannot be read, InvalidInstance when its data set
    cannot be understood or there is no instance at all.
    """
    if not instances:
        raise InvalidInstance("the series has no readable instance")
    collected = _Collected()
    for instance in instances:
        collected.add(instance, read_data_set(instance, element_bytes_max=ELEMENT_BYTES_MAX))
    return collected.header(instances[0].series_instance_uid)


def read_data_set(instance: StoredInstance, *, element_bytes_max: int | None = None) -> Dataset:
    """The data set of a stored instance up to its pixel data; elements are decoded when they are asked for.

    An element longer than `element_bytes_max` has no value. Raises StorageError, InvalidInstance.
    """
    syntax = UID(instance.transfer_syntax_uid)
    implicit = syntax.is_implicit_VR if syntax.is_transfer_syntax else False
    little = syntax.is_little_endian if syntax.is_transfer_syntax else True
    try:
        with open(instance.path, "rb") as file:
            file.seek(instance.data_set_offset)
            opened: BinaryIO = file
            if syntax == DeflatedExplicitVRLittleEndian:
                opened = _inflated(file.read(instance.data_set_length))
            return read_dataset(opened, implicit, little, stop_when=_at_pixels, defer_size=element_bytes_max)
    except OSError as exc:
        raise StorageError(f"instance {instance.sop_instance_uid} cannot be read from the archive") from exc
    except _UNREADABLE as exc:
        raise InvalidInstance(f"instance {instance.sop_instance_uid} cannot be understood") from exc


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in _PIXEL_TAGS


def _inflated(deflated: bytes) -> BinaryIO:
    """The first INFLATED_BYTES_MAX bytes: the header is there, and a bomb stays small."""
    return io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, INFLATED_BYTES_MAX))


class _Collected:
    """Distinct values per keyword, growing by one instance at a time."""

    def __init__(self) -> None:
        self._count = 0
        self._present: dict[str, int] = {}
        self._values: dict[str, dict[Any, Any]] = {}
        self._more: dict[str, set[Any]] = {}
        self._geometry: list[dict[str, Any]] = []
        self._decoded: dict[tuple[Any, ...], Any] = {}

    def add(self, instance: StoredInstance, ds: Dataset) -> None:
        """Take in one instance. Raises InvalidInstance when the data set is not the one that was stored."""
        plain = dict(self._elements(ds))
        if str(plain.get("SOPInstanceUID", "")).strip(" \0") != instance.sop_instance_uid:
            raise InvalidInstance(f"instance {instance.sop_instance_uid} is not what its file holds")
        self._count += 1
        for keyword, value in plain.items():
            self._present[keyword] = self._present.get(keyword, 0) + 1
            kept = self._values.setdefault(keyword, {})
            key = value if isinstance(value, str | int | float) else _text(value)
            if key not in kept:
                if len(kept) < DISTINCT_MAX:
                    kept[key] = value
                else:
                    self._more.setdefault(keyword, set()).add(key)
        identity = {"SOPInstanceUID": instance.sop_instance_uid, "SOPClassUID": instance.sop_class_uid}
        self._geometry.append({**{keyword: plain[keyword] for keyword in GEOMETRY if keyword in plain}, **identity})

    def header(self, series_instance_uid: str) -> SeriesHeader:
        """What was collected."""
        return SeriesHeader(
            series_instance_uid=series_instance_uid,
            instance_count=self._count,
            values={keyword: tuple(kept.values()) for keyword, kept in self._values.items()},
            missing_in={
                keyword: self._count - present for keyword, present in self._present.items() if present < self._count
            },
            geometry=tuple(self._geometry),
            distinct_counts={keyword: DISTINCT_MAX + len(more) for keyword, more in self._more.items()},
        )

    def _elements(self, ds: Dataset) -> Iterator[tuple[str, Any]]:
        # `items` gives elements as they were read; every other way decodes them, or reads what was left in the file
        elements = dict(ds.items())
        charset = getattr(elements.get(_CHARACTER_SET), "value", None)
        charset_key = charset if isinstance(charset, bytes) else str(charset)
        for tag, raw in elements.items():
            if tag.is_private or not (keyword := keyword_for_tag(tag)) or keyword in _LEFT_OUT:
                continue
            if isinstance(raw, RawDataElement):
                key = (tag, raw.VR, raw.value, charset_key)
                value = self._decoded.get(key, self)
                if value is self:
                    value = self._decoded[key] = _raw_value(ds, raw)
            else:
                value = _plain(raw, 0)
            if value is not _NOTHING:
                yield keyword, value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _raw_value(ds: Dataset, raw: RawDataElement) -> Any:
    # No value: empty, or longer than is read. UN of a standard attribute is decoded by its known VR (PS3.5 6.2.2).
    if not raw.value or (raw.VR in _BINARY and raw.VR != "UN"):
        return _NOTHING
    try:
        return _plain(ds[raw.tag], 0)
    except _UNREADABLE:
        if len(raw.value) > VALUE_BYTES_MAX or raw.VR == "SQ":
            return _NOTHING
        return raw.value.decode("latin-1").strip(" \0")  # a wrong number is still what a rule may ask for


def _plain(element: DataElement | RawDataElement | None, depth: int) -> Any:
    """JSON-ready value of a decoded element, or _NOTHING."""
    if not isinstance(element, DataElement) or element.VR in _BINARY:
        return _NOTHING
    if element.VR == "SQ":
        return _items(element.value, depth)
    if element.is_empty:
        return _NOTHING
    convert = _CONVERT.get(element.VR, str)
    values = element.value
    if not isinstance(values, str) and isinstance(values, Sequence):
        plain: Any = [convert(value) for value in values]
        size = sum(len(item) if isinstance(item, str) else 8 for item in plain)
    else:
        plain = convert(values)
        size = len(plain) if isinstance(plain, str) else 8
    return plain if size <= VALUE_BYTES_MAX else _NOTHING


def _items(sequence: Sequence[Dataset] | None, depth: int) -> Any:
    if not sequence or depth >= DEPTH_MAX:
        return _NOTHING
    return [_item(item, depth + 1) for item in list(sequence)[:ITEMS_MAX]]


def _item(item: Dataset, depth: int) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for tag in item.keys():  # noqa: SIM118 - as above
        keyword = "" if tag.is_private else keyword_for_tag(tag)
        if not keyword or keyword in _LEFT_OUT:
            continue
        try:
            value = _plain(item[tag], depth)
        except _UNREADABLE:
            continue
        if value is not _NOTHING:
            plain[keyword] = value
    return plain


def _number(value: Any) -> float | int | str:
    number = float(value)
    if not math.isfinite(number):
        return str(value)
    return number


def _tag(value: Any) -> str:
    return f"{int(value):08X}"


_CONVERT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("DS", "FL", "FD"), _number),
    **dict.fromkeys(("IS", "US", "SS", "UL", "SL", "UV", "SV", "US or SS"), int),
    "AT": _tag,
}
