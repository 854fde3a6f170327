"""Points for interactive models: out of a structured report of the study, as voxels of the volume that is sent.

A report says where in the patient (SCOORD3D, in its frame of reference) or where on an image (SCOORD, selected from an
image of the series). Column and row of a SCOORD are counted from the corner of the first pixel: its centre is 0.5, 0.5
(PS3.3 C.18.6.1.1). A key object selection has no coordinates of its own (PS3.3 A.35.4): it says which report counts.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dicom_node.engines._aiaa_options import MAX_POINTS, PointOptions, Voxel
from dicom_node.errors import EngineRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import Origin, StoredInstance

__all__ = ["Points", "points_for"]

MAX_DOCUMENTS = 500
MAX_BYTES = 32 * 1024**2
MAX_ITEMS = 200_000  # of the content of one document
MAX_DEPTH = 64
_SR = "1.2.840.10008.5.1.4.1.1.88."  # PS3.4 table B.5-1: every structured report
_KOS = "1.2.840.10008.5.1.4.1.1.88.59"
# Document titles of selections that reject what they refer to (PS3.16 CID 7010)
_REJECTIONS = frozenset(("DCM", code) for code in ("113001", "113010", "113037", "113038", "113039"))
_BESIDE = 0.5 + 1e-3  # of a voxel: a point on the outer face of the volume is in it
_GRAPHICS = ("POINT", "MULTIPOINT")
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, NotImplementedError, EOFError, OverflowError),
    *(struct.error, zlib.error, RecursionError, OSError),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Voxels (column, row, slice) of the volume, in the order they were written; `note` says where they come from."""

    foreground: tuple[Voxel, ...]
    background: tuple[Voxel, ...]
    note: str


def points_for(
    options: PointOptions,
    geometry: VolumeGeometry,
    documents: Callable[[], Iterable[StoredInstance]],
    beat: Callable[[], None],
) -> Points:
    """The points for the series of `geometry`; `documents` yields the instances of its study.

    Raises EngineRejected, saying what to do: there is no report with points on these images, or one of them lies beside
    the volume.
    """
    if options.source == "options":
        for voxel in (*options.points, *options.background):
            if any(at >= count for at, count in zip(voxel, reversed(geometry.shape), strict=True)):
                raise EngineRejected(
                    f"the configured point {list(voxel)} is none of the {_sides(geometry)} voxels of this series"
                )
        return Points(foreground=options.points, background=options.background, note="points of the configuration")
    beside = ""
    for report in _reports(options, documents, beat):
        try:
            found = _points_of(report, options, geometry, beat)
        except _Beside as exc:  # an older report may be about these very images
            beside = beside or str(exc)
            continue
        if found.foreground:
            return found
        beat()
    what = "structured report" if options.source == "sr" else "report that a key object selection refers to"
    why = beside or f"the study has no {what} with points on these images"
    raise EngineRejected(f"{why}; send one, then `dicom-node jobs retry`")


def _sides(geometry: VolumeGeometry) -> str:
    return " x ".join(str(count) for count in reversed(geometry.shape))


# --- which documents -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    instance: StoredInstance
    content: Dataset

    @property
    def age(self) -> tuple[str, str, str]:
        """To sort by: Content Date and Time, then UID, which decides between equals the same way each time."""
        when = (str(self.content.get("ContentDate") or ""), str(self.content.get("ContentTime") or ""))
        return (*when, self.instance.sop_instance_uid)


def _reports(
    options: PointOptions, documents: Callable[[], Iterable[StoredInstance]], beat: Callable[[], None]
) -> Sequence[Dataset]:
    """The reports to look at, the newest first."""
    reports: list[_Document] = []
    selections: list[_Document] = []
    for number, instance in enumerate(_candidates(documents)):
        if number == MAX_DOCUMENTS:
            raise EngineRejected(f"the study has more than {MAX_DOCUMENTS} structured reports")
        content = _read(instance)
        if content is not None:
            (selections if instance.sop_class_uid == _KOS else reports).append(
                _Document(instance=instance, content=content)
            )
        beat()
    reports.sort(key=lambda one: one.age, reverse=True)
    if options.source == "sr":
        return [report.content for report in reports]
    for selection in sorted(selections, key=lambda one: one.age, reverse=True):
        if set(_name(selection.content)) & _REJECTIONS:
            continue
        wanted = set(_referenced(selection.content))
        if chosen := [report.content for report in reports if report.instance.sop_instance_uid in wanted]:
            return chosen
    return []


def _candidates(documents: Callable[[], Iterable[StoredInstance]]) -> Iterator[StoredInstance]:
    """What people or their software sent: what this node concluded before must not guide it now."""
    for instance in documents():
        received = instance.origin is Origin.RECEIVED
        if received and instance.sop_class_uid.startswith(_SR) and instance.data_set_length <= MAX_BYTES:
            yield instance


def _read(instance: StoredInstance) -> Dataset | None:
    """Its data set, None when it cannot be read."""
    syntax = instance.transfer_syntax_uid
    try:
        with open(instance.path, "rb") as file:
            file.seek(instance.data_set_offset)
            raw = file.read(instance.data_set_length)
        if syntax == DeflatedExplicitVRLittleEndian:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            raw = inflater.decompress(raw, MAX_BYTES)
            if not inflater.eof:
                return None
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
            return read_dataset(io.BytesIO(raw), implicit, little)
    except _UNREADABLE:
        return None


# --- what they say ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One content item; `names` are its concept name and those of what contains it."""

    item: Dataset
    names: tuple[tuple[str, str], ...]


class _Beside(Exception):
    """A point on the images lies beside them."""


def _content(document: Dataset) -> Iterator[_Node]:
    """Every content item, in the order they are written (PS3.3 C.17.3), up to MAX_ITEMS."""
    left = MAX_ITEMS
    stack: list[tuple[_Node, int]] = [(_Node(item=document, names=_name(document)), 0)]
    while stack and left:
        node, depth = stack.pop()
        left -= 1
        yield node
        if depth < MAX_DEPTH:
            stack += [
                (_Node(item=item, names=(*node.names, *_name(item))), depth + 1)
                for item in reversed(_items(node.item, "ContentSequence"))
            ]


def _items(ds: Dataset, keyword: str) -> list[Dataset]:
    try:
        return list(ds.get(keyword) or ())
    except _UNREADABLE:
        return []


def _name(item: Dataset) -> tuple[tuple[str, str], ...]:
    names = _items(item, "ConceptNameCodeSequence")
    return ((_text(names[0], "CodingSchemeDesignator"), _text(names[0], "CodeValue")),) if names else ()


def _text(ds: Dataset, keyword: str) -> str:
    try:
        return str(ds.get(keyword) or "").strip(" \0")
    except _UNREADABLE:
        return ""


def _referenced(document: Dataset) -> Iterator[str]:
    for node in _content(document):
        for reference in _items(node.item, "ReferencedSOPSequence"):
            yield _text(reference, "ReferencedSOPInstanceUID")


def _points_of(report: Dataset, options: PointOptions, geometry: VolumeGeometry, beat: Callable[[], None]) -> Points:
    """Raises _Beside, EngineRejected."""
    foreground: list[Voxel] = []
    background: list[Voxel] = []
    for number, node in enumerate(_content(report)):
        if number % 1024 == 0:
            beat()
        if _text(node.item, "ValueType") not in ("SCOORD", "SCOORD3D"):
            continue
        if set(node.names) & set(options.background_concepts):
            target = background
        elif not options.concepts or set(node.names) & set(options.concepts):
            target = foreground
        else:
            continue
        target += _voxels(report, node.item, geometry)
        if len(foreground) + len(background) > MAX_POINTS:
            raise EngineRejected(f"a structured report has more than {MAX_POINTS} points on these images")
    note = f"{len(foreground) + len(background)} points out of the structured report {_text(report, 'SOPInstanceUID')}"
    return Points(foreground=tuple(foreground), background=tuple(background), note=note)


def _voxels(report: Dataset, item: Dataset, geometry: VolumeGeometry) -> list[Voxel]:
    """Those of one content item; none when it is no point or is on other images. Raises _Beside."""
    try:
        numbers = np.array(item.get("GraphicData"), np.float64).reshape(-1)
    except _UNREADABLE:
        return []
    if _text(item, "GraphicType") not in _GRAPHICS or not np.isfinite(numbers).all() or len(numbers) > 3 * MAX_POINTS:
        return []
    if _text(item, "ValueType") == "SCOORD3D":
        own = geometry.frame_of_reference_uid
        if not own or _text(item, "ReferencedFrameOfReferenceUID") != own or len(numbers) % 3:
            return []
        return [_in_patient(point, geometry) for point in numbers.reshape(-1, 3)]
    if len(numbers) % 2:
        return []
    return [
        _on_image(float(column), float(row), slice_, geometry)
        for slice_ in _slices(report, item, geometry)
        for column, row in numbers.reshape(-1, 2)
    ]


def _in_patient(point: Any, geometry: VolumeGeometry) -> Voxel:
    k, row, column = (np.linalg.inv(geometry.affine) @ (*point, 1.0))[:3]
    for at, count in zip((k, row, column), geometry.shape, strict=True):
        if not -_BESIDE <= at <= count - 1 + _BESIDE:
            raise _Beside("a point of the study's structured report lies beside these images")
    return _clipped((column, row, k), geometry)


def _on_image(column: float, row: float, slice_: int, geometry: VolumeGeometry) -> Voxel:
    if not (0 <= column <= geometry.shape[2] and 0 <= row <= geometry.shape[1]):
        raise _Beside("a point of the study's structured report lies beside its image")
    return _clipped((column - 0.5, row - 0.5, float(slice_)), geometry)


def _clipped(at: Sequence[float], geometry: VolumeGeometry) -> Voxel:
    """The nearest voxel; half way between two it is the higher one, as a pixel begins at its upper left corner."""
    column, row, slice_ = (
        int(min(max(np.floor(value + 0.5), 0), count - 1))
        for value, count in zip(at, reversed(geometry.shape), strict=True)
    )
    return column, row, slice_


def _slices(report: Dataset, item: Dataset, geometry: VolumeGeometry) -> list[int]:
    """The slice of the image the coordinates are selected from (PS3.3 C.18.6); none when it is not just one."""
    found = []
    for child in _items(item, "ContentSequence"):
        image = _meant(report, child)
        for reference in _items(image, "ReferencedSOPSequence"):
            uid, frames = _text(reference, "ReferencedSOPInstanceUID"), _frames(reference)
            found += [
                k
                for k, (own, frame) in enumerate(geometry.identities)
                if own == uid and (not frame or not frames or frame in frames)
            ]
    return found if len(found) == 1 else []


def _meant(report: Dataset, item: Dataset) -> Dataset:
    """The content item, or the one it refers to: 1, then places counted from 1 on the way down (PS3.3 C.17.3.2.5)."""
    try:
        path = item.get("ReferencedContentItemIdentifier")
        if path is None:
            return item
        found = report
        for place in list(path)[1:MAX_DEPTH]:
            found = _items(found, "ContentSequence")[int(place) - 1] if int(place) > 0 else Dataset()
        return found
    except (*_UNREADABLE, LookupError):
        return Dataset()


def _frames(reference: Dataset) -> set[int]:
    try:
        value = reference.get("ReferencedFrameNumber")
        return {int(frame) for frame in (value if isinstance(value, Iterable) else [value]) if frame is not None}
    except _UNREADABLE:
        return set()
