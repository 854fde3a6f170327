"""One stored image as it lies in its file: its header, and its pixel cells as the integers they stand for.

One pass per file: the header is read with the few attributes that matter, native pixel values go from the file
straight to where they are wanted, everything else goes through decoders in processes of their own (`decoding`). What
the values mean is for `pixels` to say.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag

from dicom_node.decoder import CELLS_KEPT, UNREADABLE
from dicom_node.decoder_link import Frames
from dicom_node.decoding import decoders
from dicom_node.errors import SeriesRejected
from dicom_node.frames import IMAGE_TAGS, frame_headers, plain_header
from dicom_node.model import StoredInstance

__all__ = ["UNREADABLE", "ImageFile", "Layout", "Slice", "Stored", "decoded", "read_image", "stored_values"]

MAX_IMAGE_BYTES = 512 * 1024**2
_MAX_REQUEST_BYTES, _MAX_REQUEST_FRAMES = 16 * 1024**2, 16  # of one image, decoded in one go

Stored = npt.NDArray[Any]

_FIRST_PIXEL_TAG = 0x7FE00001
_VR_IN_LENGTH = (b"OW\0\0", b"OB\0\0")  # what an explicit VR looks like where a length is expected: an odd length


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One stored image: the attributes that matter and where its native pixel values lie.

    `header` maps keywords to text (values joined by a backslash, padding stripped), integers (US, SS) or, for
    sequences, pydicom items; empty attributes are not in it. `pixel_offset` counts from the start of the file; None
    when the values are not little-endian native (compressed, deflated, big-endian) and must be decoded. `frames` has
    such a header for each frame of an image with functional groups, see `frames.frame_headers`.
    """

    instance: StoredInstance
    header: Mapping[str, Any]
    pixel_offset: int | None
    pixel_length: int
    frames: tuple[Mapping[str, Any], ...] = ()

    @property
    def planes(self) -> tuple[Mapping[str, Any], ...]:
        """What `geometry.volume_geometry` takes: a header for each frame, the only one of a single-frame image."""
        return self.frames or (self.header,)


def read_image(instance: StoredInstance) -> ImageFile:
    """Read one image's header, not its pixels. Raises SeriesRejected when there is no readable image."""
    try:
        with open(instance.path, "rb") as file:
            return _scan(instance, file)
    except UNREADABLE as exc:
        raise SeriesRejected(f"an image cannot be read ({type(exc).__name__})") from exc


def _scan(instance: StoredInstance, file: io.BufferedReader) -> ImageFile:
    syntax = uids.UID(instance.transfer_syntax_uid)
    file.seek(instance.data_set_offset)
    stream: io.BufferedReader | io.BytesIO = file
    if syntax == uids.DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(file.read(instance.data_set_length), MAX_IMAGE_BYTES)
        if inflater.unconsumed_tail:
            raise SeriesRejected(f"an image inflates to more than {MAX_IMAGE_BYTES >> 20} MiB")
        stream = io.BytesIO(data)
    implicit = syntax == uids.ImplicitVRLittleEndian
    little = syntax != uids.ExplicitVRBigEndian
    ds = read_dataset(stream, implicit, little, stop_when=_is_pixel_data, specific_tags=IMAGE_TAGS)
    element = stream.read(12)
    length = int.from_bytes(element[4:8] if implicit else element[8:12], "little")
    native = syntax in (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian)
    if native and (len(element) < 12 or struct.unpack("<HH", element[:4]) != (0x7FE0, 0x0010)):
        raise SeriesRejected("an image has no Pixel Data")
    # A data set in the other VR encoding than its file meta says would put every pixel off by four bytes. An odd
    # length says nothing: old software forgets the padding of 8-bit images.
    if native and (element[4:8] in _VR_IN_LENGTH if implicit else element[4:6] not in (b"OW", b"OB")):
        raise SeriesRejected("an image's Pixel Data is not encoded as its transfer syntax says")
    offset = stream.tell() - (4 if implicit else 0) if native else None
    header = plain_header(ds, little=little)
    if header.get("SOPInstanceUID") != instance.sop_instance_uid:
        raise SeriesRejected("an image's file holds another image than it should")
    return ImageFile(instance, header, offset, length if native else 0, frame_headers(ds, header, little=little))


def _is_pixel_data(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return int.__ge__(tag, _FIRST_PIXEL_TAG)  # a BaseTag compares slowly


@dataclass(frozen=True, slots=True)
class Layout:
    """How stored values lie in their cells (PS3.5 8.1.1)."""

    shape: tuple[int, int]
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest stored value."""
        return (-(1 << self.stored - 1), (1 << self.stored - 1) - 1) if self.signed else (0, (1 << self.stored) - 1)


def layout_of(header: Mapping[str, Any]) -> Layout:
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise SeriesRejected("an image is in colour, not in grey values")
    photometric = str(header.get("PhotometricInterpretation") or "")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise SeriesRejected(f"Photometric Interpretation {photometric[:16] or 'is missing'} is not a grey scale")
    try:
        rows, columns = int(header["Rows"]), int(header["Columns"])
        allocated, stored = int(header["BitsAllocated"]), int(header["BitsStored"])
        high = int(header.get("HighBit", stored - 1))
        signed = bool(header["PixelRepresentation"])
    except (KeyError, TypeError, ValueError):
        raise SeriesRejected("an image lacks an attribute that describes its pixel values") from None
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise SeriesRejected(f"pixel values of {stored} bits in cells of {allocated} are not understood")
    if rows <= 0 or columns <= 0 or rows * columns * allocated // 8 > MAX_IMAGE_BYTES:
        raise SeriesRejected(f"an image of {rows} x {columns} pixels is empty or too large")
    if header.get("NumberOfFrames", "1") != "1":
        raise SeriesRejected("a multi-frame image does not say what its frames are (no functional groups)")
    return Layout((rows, columns), allocated, stored, high, signed)


@dataclass(frozen=True, slots=True)
class Slice:
    """One image or frame of one; `header` holds for it, `frame` counts from 0."""

    image: ImageFile
    header: Mapping[str, Any]
    frame: int
    layout: Layout

    @classmethod
    def of(cls, image: ImageFile, header: Mapping[str, Any]) -> Slice:
        return cls(image, header, max(int(header.get("FrameNumber", 0)) - 1, 0), layout_of(header))

    @property
    def native(self) -> bool:
        return self.image.pixel_offset is not None

    @property
    def as_stored(self) -> bool:
        """Whether cells are as they lie in the file, the value below High Bit; codecs give the value alone."""
        return self.native or uids.UID(self.image.instance.transfer_syntax_uid) in CELLS_KEPT


def _raw_values(slice_: Slice, out: Stored | None, heartbeat: Callable[[], None] | None) -> Stored:
    """The pixel cells as stored, unused bits included: (rows, columns) of the layout's dtype, in `out` where given."""
    image, layout = slice_.image, slice_.layout
    if image.pixel_offset is None:
        ((_, decoded_plane),) = decoded([slice_], heartbeat)
        return decoded_plane
    plane = np.empty(layout.shape, layout.dtype) if out is None else out.view(layout.dtype)
    start = slice_.frame * plane.nbytes
    if image.pixel_length < start + plane.nbytes:
        raise SeriesRejected(
            f"an image has {image.pixel_length} bytes of pixel data where {start + plane.nbytes} are needed"
        )
    try:
        with open(image.instance.path, "rb", buffering=0) as file:
            file.seek(image.pixel_offset + start)
            view = memoryview(plane.reshape(-1).view(np.uint8).data)
            while len(view) and (count := file.readinto(view)):
                view = view[count:]
    except OSError as exc:
        raise SeriesRejected(f"an image cannot be read ({exc.strerror})") from exc
    if len(view):
        raise SeriesRejected("an image's file ends inside its pixel data")
    return plane


def decoded(slices: Sequence[Slice], heartbeat: Callable[[], None] | None = None) -> Iterator[tuple[int, Stored]]:
    """The cells of these slices, none of them native, each with its index, in the order they are done.

    Raises SeriesRejected, EngineUnavailable: `decoding.DecoderPool.decode`.
    """
    requests = list(_requests(slices))
    works = [_frames([slices[k] for k in indices]) for indices in requests]
    for number, planes in decoders().decode(works, heartbeat):
        yield from zip(requests[number], planes, strict=True)


def _requests(slices: Sequence[Slice]) -> Iterator[list[int]]:
    """Indices that are decoded together: one image, or a few frames of one, for each opening walks through it."""
    images: dict[str, list[int]] = {}
    for k, slice_ in enumerate(slices):
        images.setdefault(slice_.image.instance.sop_instance_uid, []).append(k)
    for indices in images.values():
        indices.sort(key=lambda k: slices[k].frame)
        (rows, columns), allocated = slices[indices[0]].layout.shape, slices[indices[0]].layout.allocated
        count = min(max(_MAX_REQUEST_BYTES * 8 // (rows * columns * allocated), 1), _MAX_REQUEST_FRAMES)
        yield from (indices[first : first + count] for first in range(0, len(indices), count))


def _frames(slices: Sequence[Slice]) -> Frames:
    instance, layout = slices[0].image.instance, slices[0].layout
    return Frames(
        path=instance.path,
        syntax=instance.transfer_syntax_uid,
        name=uids.UID(instance.transfer_syntax_uid).name,
        frames=tuple(slice_.frame for slice_ in slices),
        shape=layout.shape,
        dtype=layout.dtype,
    )


def _clean(plane: Stored, layout: Layout, *, as_stored: bool) -> None:
    """Keep Bits Stored bits below High Bit, in place: old overlays live in the others; extend the sign."""
    if layout.stored == layout.allocated:
        return
    above = layout.allocated - 1 - layout.high if as_stored else layout.allocated - layout.stored
    # signed cells shift right arithmetically, unsigned ones logically: one expression does both
    np.left_shift(plane, above, out=plane)
    np.right_shift(plane, layout.allocated - layout.stored, out=plane)


def _padding(header: Mapping[str, Any], layout: Layout) -> tuple[int, int, int] | None:
    """(cell pattern, lowest, highest) of values that are no image (PS3.3 C.7.5.1.1.2), or None."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = header.get("PixelPaddingRangeLimit")
    ends = [value, limit if isinstance(limit, int) else value]
    cell = 1 << layout.allocated
    if layout.signed and layout.allocated > 16:  # the value has 16 bits whatever the cells have
        ends = [end - 0x10000 if end >= 0x8000 else end for end in ends]
    # written as US or SS as it came: both spellings mean the same bits
    ends = [(end % cell) - (cell if layout.signed and end % cell >= cell // 2 else 0) for end in ends]
    return ends[0], min(ends), max(ends)


def _padded(plane: Stored, raw_match: Stored | None, padding: tuple[int, int, int]) -> Stored:
    low, high = padding[1:]
    match: Stored = (plane == low) if low == high else (plane >= low) & (plane <= high)
    return match if raw_match is None else match | raw_match


def stored_values(
    slice_: Slice,
    out: Stored | None = None,
    cells: Stored | None = None,
    heartbeat: Callable[[], None] | None = None,
) -> tuple[Stored, npt.NDArray[np.bool_] | None]:
    """Stored values (rows, columns) and where they are padding (None: nowhere declared), of `cells` where decoded."""
    layout = slice_.layout
    plane = _raw_values(slice_, out, heartbeat) if cells is None else cells
    padding = _padding(slice_.header, layout)
    if padding is None:
        _clean(plane, layout, as_stored=slice_.as_stored)
        return plane, None
    # some scanners declare a padding value outside Bits Stored: it can only be seen before masking
    raw_match = plane == padding[0] if layout.stored < layout.allocated else None
    _clean(plane, layout, as_stored=slice_.as_stored)
    return plane, _padded(plane, raw_match, padding)
