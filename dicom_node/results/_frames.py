"""The frames of a segmentation as bytes: their pixels, and one functional group item each.

A segmentation of a whole body has thousands of frames, and nested data sets cost a millisecond each to build and
write: more than the whole network takes. Both parts are the last of the data set (PS3.3 C.8.20, tags (5200,9230) and
(7FE0,0010)), so they are encoded here, in Explicit VR Little Endian, and appended to the header. No more than eight
masks exist at a time, however many segments there are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.results import codes

__all__ = [
    "Frame",
    "PlaneReference",
    "element",
    "encoded_item_of",
    "functional_groups",
    "item",
    "label_pixels",
    "mask_pixels",
    "sequence",
]

_FRAMES_PER_BYTE = 8  # so many frames are whole bytes, whatever the matrix
_LONG_VRS = frozenset({"SQ", "OB", "OW"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneReference:
    """The image a frame lies on: its UIDs, its Image Position (Patient) as DS text, and which frame of it, if any."""

    sop_class_uid: str
    sop_instance_uid: str
    position: tuple[str, str, str]
    frame_number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One segment on one plane, or every segment on it where `segment_number` is None (a frame of a label map).

    `label` is the segment's value in the label array, which `plane` indexes; `position_index` counts from 1 along the
    normal.
    """

    plane: int
    position_index: int
    segment_number: int | None = None
    label: int = 0


# --- pixels ----------------------------------------------------------------------------------------------------------


def mask_pixels(labels: npt.NDArray[np.uint8], frames: Sequence[Frame]) -> bytes:
    """The frames' masks as bits, first pixel lowest, without a gap between frames (PS3.5 8.2 and annex D)."""
    together = 1 if labels[0].size % 8 == 0 else _FRAMES_PER_BYTE
    masks = np.empty((together, *labels.shape[1:]), np.bool_)
    pixels = BytesIO()
    for start in range(0, len(frames), together):
        chunk = frames[start : start + together]
        for mask, frame in zip(masks[: len(chunk)], chunk, strict=True):
            np.equal(labels[frame.plane], frame.label, out=mask)
        pixels.write(np.packbits(masks[: len(chunk)], bitorder="little").data)
    return _even(pixels)


def label_pixels(labels: npt.NDArray[np.uint8], frames: Sequence[Frame], numbers: bytes) -> bytes:
    """The frames' segment numbers, a byte per pixel; `numbers` has the number of each of the 256 labels."""
    pixels = BytesIO()
    for frame in frames:
        pixels.write(labels[frame.plane].tobytes().translate(numbers))
    return _even(pixels)


def _even(pixels: BytesIO) -> bytes:
    if pixels.tell() % 2:
        pixels.write(b"\0")
    return pixels.getvalue()


# --- functional groups, in tag order ---------------------------------------------------------------------------------


def functional_groups(frames: Sequence[Frame], references: Sequence[PlaneReference]) -> bytes:
    """Per-Frame Functional Groups Sequence of `frames`, in their order, as an encoded element."""
    derivation = encoded_item_of(DerivationCodeSequence=[codes.concept(codes.SEGMENTATION)])
    purpose = encoded_item_of(PurposeOfReferenceCodeSequence=[codes.concept(codes.SOURCE_IMAGE)])
    planes = {frame.plane for frame in frames}
    derived = {plane: _derivation(references[plane], derivation, purpose) for plane in planes}
    placed = {plane: _position(references[plane]) for plane in planes}
    segments = {frame.segment_number: _segment(frame.segment_number) for frame in frames}
    items = [
        item(derived[frame.plane] + _content(frame) + placed[frame.plane] + segments[frame.segment_number])
        for frame in frames
    ]
    return element(0x5200, 0x9230, "SQ", b"".join(items))


def _derivation(image: PlaneReference, derivation: bytes, purpose: bytes) -> bytes:
    # C.7.6.16.2.6: which image this frame was made from; pixel for pixel, so locations are preserved
    number = image.frame_number
    source = (
        element(0x0008, 0x1150, "UI", image.sop_class_uid.encode())
        + element(0x0008, 0x1155, "UI", image.sop_instance_uid.encode())
        + (b"" if number is None else element(0x0008, 0x1160, "IS", str(number).encode()))
        + element(0x0028, 0x135A, "CS", b"YES")
        + purpose
    )
    return sequence(0x0008, 0x9124, sequence(0x0008, 0x2112, source) + derivation)


def _content(frame: Frame) -> bytes:
    # C.7.6.16.2.2: segment, if frames have one, then place along the normal, as Dimension Index Sequence says
    if frame.segment_number is None:
        values = struct.pack("<L", frame.position_index)
    else:
        values = struct.pack("<2L", frame.segment_number, frame.position_index)
    return sequence(0x0020, 0x9111, element(0x0020, 0x9157, "UL", values))


def _position(image: PlaneReference) -> bytes:
    return sequence(0x0020, 0x9113, element(0x0020, 0x0032, "DS", "\\".join(image.position).encode()))


def _segment(number: int | None) -> bytes:
    # C.8.20.3.1, per frame even when there is one segment: not every reader looks into the shared groups
    if number is None:
        return b""
    return sequence(0x0062, 0x000A, element(0x0062, 0x000B, "US", struct.pack("<H", number)))


# --- elements --------------------------------------------------------------------------------------------------------


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr in ("CS", "DS", "IS") else b"\0"
    if vr in _LONG_VRS:
        return struct.pack("<HH2s2xL", group, number, vr.encode(), len(value)) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value


def item(content: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content


def sequence(group: int, number: int, content: bytes) -> bytes:
    return element(group, number, "SQ", item(content))


def encoded_item_of(**elements: Sequence[Dataset]) -> bytes:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, item)
    return buffer.getvalue()
