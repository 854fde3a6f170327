"""The frames of a binary segmentation as bytes: one bit per pixel, and one functional group item each.

A segmentation of an abdomen has hundreds of frames, and nested data sets cost a millisecond each to build and write:
more than the whole network takes. Both parts are the last of the data set (PS3.3 C.8.20, tags (5200,9230) and
(7FE0,0010)), so they are encoded here, in Explicit VR Little Endian, and appended to the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.results import codes

__all__ = ["Frame", "PlaneReference", "frame_elements", "pack"]

_FRAMES_PER_CHUNK = 8  # so that every chunk but the last is whole bytes, whatever the matrix
_LONG_VRS = frozenset({"SQ", "OB", "OW"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneReference:
    """The image a frame lies on: its UIDs and its Image Position (Patient) as DS text."""

    sop_class_uid: str
    sop_instance_uid: str
    position: tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One segment on one plane. `plane` indexes the label array; `position_index` counts from 1 along the normal."""

    segment_number: int
    label: int
    plane: int
    position_index: int


def frame_elements(
    labels: npt.NDArray[np.uint8], frames: Sequence[Frame], references: Sequence[PlaneReference]
) -> bytes:
    """Per-Frame Functional Groups Sequence and Pixel Data of `frames`, in their order, as encoded elements."""
    derivation = _encoded_item_of(DerivationCodeSequence=[codes.concept(codes.SEGMENTATION)])
    purpose = _encoded_item_of(PurposeOfReferenceCodeSequence=[codes.concept(codes.SOURCE_IMAGE)])
    planes = {frame.plane for frame in frames}
    derived = {plane: _derivation(references[plane], derivation, purpose) for plane in planes}
    placed = {plane: _position(references[plane]) for plane in planes}
    items = [_item(derived[frame.plane] + _content(frame) + placed[frame.plane] + _segment(frame)) for frame in frames]
    pixels = b"".join(pack(labels, frames))
    return _element(0x5200, 0x9230, "SQ", b"".join(items)) + _element(0x7FE0, 0x0010, "OB", pixels)


def pack(labels: npt.NDArray[np.uint8], frames: Sequence[Frame]) -> Iterator[bytes]:
    """The frames' pixels as bits, first pixel lowest, without a gap between frames (PS3.5 8.2 and annex D)."""
    start = 0
    while start < len(frames):
        chunk = frames[start : start + _FRAMES_PER_CHUNK]
        masks = np.stack([labels[frame.plane] == frame.label for frame in chunk])
        yield np.packbits(masks, bitorder="little").tobytes()
        start += len(chunk)


# --- functional groups, in tag order ---------------------------------------------------------------------------------


def _derivation(image: PlaneReference, derivation: bytes, purpose: bytes) -> bytes:
    # C.7.6.16.2.6: which image this frame was made from; pixel for pixel, so locations are preserved
    source = (
        _element(0x0008, 0x1150, "UI", image.sop_class_uid.encode())
        + _element(0x0008, 0x1155, "UI", image.sop_instance_uid.encode())
        + _element(0x0028, 0x135A, "CS", b"YES")
        + purpose
    )
    return _sequence(0x0008, 0x9124, _sequence(0x0008, 0x2112, source) + derivation)


def _content(frame: Frame) -> bytes:
    # C.7.6.16.2.2: segment, then place along the normal, as Dimension Index Sequence says
    values = struct.pack("<2L", frame.segment_number, frame.position_index)
    return _sequence(0x0020, 0x9111, _element(0x0020, 0x9157, "UL", values))


def _position(image: PlaneReference) -> bytes:
    return _sequence(0x0020, 0x9113, _element(0x0020, 0x0032, "DS", "\\".join(image.position).encode()))


def _segment(frame: Frame) -> bytes:
    # C.8.20.3.1, per frame even when there is one segment: not every reader looks into the shared groups
    return _sequence(0x0062, 0x000A, _element(0x0062, 0x000B, "US", struct.pack("<H", frame.segment_number)))


# --- elements --------------------------------------------------------------------------------------------------------


def _element(group: int, number: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr in ("CS", "DS") else b"\0"
    if vr in _LONG_VRS:
        return struct.pack("<HH2s2xL", group, number, vr.encode(), len(value)) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value


def _item(content: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content


def _sequence(group: int, number: int, content: bytes) -> bytes:
    return _element(group, number, "SQ", _item(content))


def _encoded_item_of(**elements: Sequence[Dataset]) -> bytes:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, item)
    return buffer.getvalue()
