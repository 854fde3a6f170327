"""From stored bytes to numbers that mean something: Hounsfield units of a stack, display values of a radiograph.

One pass per file: the header is read with the few attributes that matter, native pixel values go from the file
straight into their slice of the volume, everything else goes through pydicom's decoders. HU never see a VOI or
presentation LUT; radiographs do (PS3.3 C.11.1, C.11.2, C.11.6). Knows no model and no wire.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import dcmread, read_dataset
from pydicom.pixels.utils import pixel_array
from pydicom.tag import BaseTag

from dicom_node.errors import SeriesRejected
from dicom_node.geometry import GEOMETRY_KEYWORDS
from dicom_node.model import StoredInstance

__all__ = ["AIR_HU", "ImageFile", "displayed_radiograph", "read_hounsfield", "read_image"]

AIR_HU = -1000
MAX_IMAGE_BYTES = 512 * 1024**2
MAX_VOLUME_BYTES = 6 * 1024**3

Stored = npt.NDArray[Any]
Plane = npt.NDArray[np.float32]
Volume = npt.NDArray[np.int16] | npt.NDArray[np.float32]

_FIRST_PIXEL_TAG = 0x7FE00001
_KEYWORDS = (
    *GEOMETRY_KEYWORDS,
    *("Modality", "BodyPartExamined", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("PresentationIntentType", "ViewPosition", "ViewCodeSequence", "BurnedInAnnotation"),
    "AnatomicRegionSequence",
)
_KEYWORD_OF = {tag: keyword for keyword in _KEYWORDS if (tag := tag_for_keyword(keyword)) is not None}
_TAGS: list[BaseTag | int] = list(_KEYWORD_OF)
# US, or US / SS for padding values, whose sign `_padding` settles
_SHORTS = frozenset(
    {"Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"}
    | {"PixelPaddingValue", "PixelPaddingRangeLimit"}
)
# What pydicom and its decoder plug-ins raise on bytes that are not what the header says.
_UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, InvalidDicomError, LookupError, MemoryError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError, struct.error, zlib.error),
)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One stored image: the attributes that matter and where its native pixel values lie.

    `header` maps keywords to text (values joined by a backslash, padding stripped), integers (US, SS) or, for
    sequences, pydicom items; empty attributes are not in it. `pixel_offset` counts from the start of the file; None
    when the values are not little-endian native (compressed, deflated, big-endian) and must be decoded.
    """

    instance: StoredInstance
    header: Mapping[str, Any]
    pixel_offset: int | None
    pixel_length: int


def read_image(instance: StoredInstance) -> ImageFile:
    """Read one image's header, not its pixels. Raises SeriesRejected when there is no readable image."""
    try:
        with open(instance.path, "rb") as file:
            return _scan(instance, file)
    except _UNREADABLE as exc:
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
    ds = read_dataset(stream, implicit, little, stop_when=_is_pixel_data, specific_tags=_TAGS)
    element = stream.read(12)
    length = int.from_bytes(element[4:8] if implicit else element[8:12], "little")
    native = syntax in (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian)
    if native and (len(element) < 12 or struct.unpack("<HH", element[:4]) != (0x7FE0, 0x0010)):
        raise SeriesRejected("an image has no Pixel Data")
    # a data set in the other VR encoding than its file meta says would put every pixel off by four bytes
    if native and (length % 2 or (not implicit and element[4:6] not in (b"OW", b"OB"))):
        raise SeriesRejected("an image's Pixel Data is not encoded as its transfer syntax says")
    offset = stream.tell() - (4 if implicit else 0) if native else None
    header = _plain(ds, little=little)
    if header.get("SOPInstanceUID") != instance.sop_instance_uid:
        raise SeriesRejected("an image's file holds another image than it should")
    return ImageFile(instance, header, offset, length if native else 0)


def _is_pixel_data(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return int.__ge__(tag, _FIRST_PIXEL_TAG)  # a BaseTag compares slowly


def _plain(ds: Dataset, *, little: bool) -> dict[str, Any]:
    """Keyword to plain value. pydicom's own conversion of the decimal strings of 300 headers costs 0.3 s."""
    header: dict[str, Any] = {}
    for element in ds.values():
        keyword = _KEYWORD_OF.get(element.tag)
        if keyword is None:
            continue
        value: Any = element.value
        if keyword.endswith("Sequence"):
            value = list(ds[element.tag].value)
        elif isinstance(value, bytes):
            if keyword in _SHORTS:
                value = int.from_bytes(value[:2], "little" if little else "big") if len(value) >= 2 else None
            else:
                value = value.decode("ascii", "replace").strip(" \0")
        if value not in (None, "", []):
            header[keyword] = value
    return header


@dataclass(frozen=True, slots=True)
class _Layout:
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


def _layout(header: Mapping[str, Any]) -> _Layout:
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
        raise SeriesRejected("multi-frame images are not read; single-frame images are")
    return _Layout((rows, columns), allocated, stored, high, signed)


def _raw_values(image: ImageFile, layout: _Layout, out: Stored | None = None) -> Stored:
    """The pixel cells as stored, unused bits included: (rows, columns) of `layout.dtype`, in `out` where given."""
    if image.pixel_offset is None:
        return _decode(image, layout)
    plane = np.empty(layout.shape, layout.dtype) if out is None else out.view(layout.dtype)
    if image.pixel_length < plane.nbytes:
        raise SeriesRejected(f"an image has {image.pixel_length} bytes of pixel data where {plane.nbytes} are needed")
    try:
        with open(image.instance.path, "rb", buffering=0) as file:
            file.seek(image.pixel_offset)
            view = memoryview(plane.reshape(-1).view(np.uint8).data)
            while len(view) and (count := file.readinto(view)):
                view = view[count:]
    except OSError as exc:
        raise SeriesRejected(f"an image cannot be read ({exc.strerror})") from exc
    if len(view):
        raise SeriesRejected("an image's file ends inside its pixel data")
    return plane


def _decode(image: ImageFile, layout: _Layout) -> Stored:
    syntax = uids.UID(image.instance.transfer_syntax_uid)
    try:
        # pydicom reads a deflated data set only as a whole; `_scan` has bounded what it inflates to
        deflated = syntax == uids.DeflatedExplicitVRLittleEndian
        plane = pixel_array(dcmread(image.instance.path) if deflated else image.instance.path, raw=True)
    except _UNREADABLE as exc:
        hint = "; a decoder for it is not installed" if "missing dependencies" in str(exc) else ""
        raise SeriesRejected(f"pixel data ({syntax.name}) cannot be decoded ({type(exc).__name__}){hint}") from exc
    if plane.shape != layout.shape or plane.dtype.kind not in "iu":
        raise SeriesRejected(f"decoded pixel data has shape {plane.shape}, the header says {layout.shape}")
    return np.asarray(plane).astype(layout.dtype, copy=False)


def _clean(plane: Stored, layout: _Layout, *, native: bool) -> None:
    """Keep Bits Stored bits below High Bit, in place: old overlays live in the others; extend the sign."""
    if layout.stored == layout.allocated:
        return
    above = layout.allocated - 1 - layout.high if native else layout.allocated - layout.stored
    # signed cells shift right arithmetically, unsigned ones logically: one expression does both
    np.left_shift(plane, above, out=plane)
    np.right_shift(plane, layout.allocated - layout.stored, out=plane)


def _padding(header: Mapping[str, Any], layout: _Layout) -> tuple[int, int, int] | None:
    """(cell pattern, lowest, highest) of values that are no image (PS3.3 C.7.5.1.1.2), or None."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = header.get("PixelPaddingRangeLimit")
    ends = [value, limit if isinstance(limit, int) else value]
    cell = 1 << layout.allocated
    # written as US or SS as it came: both spellings mean the same bits
    ends = [(end % cell) - (cell if layout.signed and end % cell >= cell // 2 else 0) for end in ends]
    return ends[0], min(ends), max(ends)


def _padded(plane: Stored, raw_match: Stored | None, padding: tuple[int, int, int]) -> Stored:
    low, high = padding[1:]
    match: Stored = (plane == low) if low == high else (plane >= low) & (plane <= high)
    return match if raw_match is None else match | raw_match


def _stored_values(
    image: ImageFile, layout: _Layout, out: Stored | None = None
) -> tuple[Stored, npt.NDArray[np.bool_] | None]:
    """Stored values (rows, columns) and where they are padding (None: nowhere declared)."""
    plane = _raw_values(image, layout, out)
    padding = _padding(image.header, layout)
    if padding is None:
        _clean(plane, layout, native=image.pixel_offset is not None)
        return plane, None
    # some scanners declare a padding value outside Bits Stored: it can only be seen before masking
    raw_match = plane == padding[0] if layout.stored < layout.allocated else None
    _clean(plane, layout, native=image.pixel_offset is not None)
    return plane, _padded(plane, raw_match, padding)


# --- Hounsfield units ------------------------------------------------------------------------------------------------


def read_hounsfield(images: Sequence[ImageFile], heartbeat: Callable[[], None] | None = None) -> Volume:
    """Stack `images` in the given order: (slices, rows, columns) in HU, C-contiguous.

    int16 when every slice has slope 1 and an integral intercept (values beyond +-32767 saturate), else float32.
    Padding becomes `AIR_HU`. `heartbeat` is called after each slice. Raises SeriesRejected: no rescale (the values
    have no unit), unreadable or contradictory pixel data, sizes that differ, more than `MAX_VOLUME_BYTES`.
    """
    layouts = [_layout(image.header) for image in images]
    if len({layout.shape for layout in layouts}) != 1:
        raise SeriesRejected("the images have different Rows x Columns")
    rescales = [_rescale(image.header) for image in images]
    integral = all(_fits_int16(layout, rescale) for layout, rescale in zip(layouts, rescales, strict=True))
    shape = (len(images), *layouts[0].shape)
    if int(np.prod(shape, dtype=np.int64)) * (2 if integral else 4) > MAX_VOLUME_BYTES:
        raise SeriesRejected(f"a volume of {shape[0]} x {shape[1]} x {shape[2]} voxels is too large")
    volume: Volume = np.empty(shape, np.int16) if integral else np.empty(shape, np.float32)
    for target, image, layout, rescale in zip(volume, images, layouts, rescales, strict=True):
        if integral:
            _int16_slice(target, image, layout, rescale)
        else:
            _float_slice(target, image, layout, rescale)
        if heartbeat is not None:
            heartbeat()
    return volume


_Rescale = tuple[float, float] | Dataset


def _rescale(header: Mapping[str, Any]) -> _Rescale:
    if header.get("ModalityLUTSequence"):
        item: Dataset = header["ModalityLUTSequence"][0]
        return item
    kind = str(header.get("RescaleType") or "HU").strip().upper()
    if kind not in ("HU", "HU_MOD"):
        raise SeriesRejected(f"Rescale Type is {kind[:16]}, not HU: the values are no Hounsfield units")
    try:
        slope, intercept = float(header["RescaleSlope"]), float(header["RescaleIntercept"])
    except (KeyError, TypeError, ValueError):
        raise SeriesRejected(
            "an image has no Rescale Slope and Intercept: its values are no Hounsfield units"
        ) from None
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise SeriesRejected("Rescale Slope or Intercept is zero or not finite")
    return slope, intercept


def _fits_int16(layout: _Layout, rescale: _Rescale) -> bool:
    return (
        isinstance(rescale, tuple)
        and layout.allocated <= 16
        and rescale[0] == 1
        and rescale[1].is_integer()
        and abs(rescale[1]) < 32768
    )


def _int16_slice(target: npt.NDArray[np.int16], image: ImageFile, layout: _Layout, rescale: _Rescale) -> None:
    assert isinstance(rescale, tuple)
    intercept = int(rescale[1])
    in_place = layout.allocated == 16 and image.pixel_offset is not None
    plane, padded = _stored_values(image, layout, target if in_place else None)
    low, high = layout.limits
    below, above = -32768 - intercept, 32767 - intercept
    if low < below or high > above:  # can only be: 16 bits stored
        np.clip(plane, max(low, below), min(high, above), out=plane)
    if not in_place:
        target[...] = plane.astype(np.int32) if layout.allocated == 8 else plane.view(np.int16)
    # modulo 2^16 the sum is the same for signed and unsigned cells, and it fits
    target += np.int16(intercept)
    if padded is not None:
        target[padded] = AIR_HU


def _float_slice(target: Plane, image: ImageFile, layout: _Layout, rescale: _Rescale) -> None:
    plane, padded = _stored_values(image, layout)
    if isinstance(rescale, tuple):
        np.multiply(plane, np.float32(rescale[0]), out=target, casting="unsafe")
        target += np.float32(rescale[1])
    else:
        target[...] = _through_lut(plane, rescale, signed=layout.signed)
    if padded is not None:
        target[padded] = AIR_HU


def _through_lut(values: Stored, item: Dataset, *, signed: bool) -> Stored:
    """A lookup table of PS3.3 C.11.1.1 / C.11.2.1.1; values beyond its ends get the end entries."""
    try:
        count, first = int(item.LUTDescriptor[0]) % 65536 or 65536, int(item.LUTDescriptor[1])
        if signed and first >= 32768:  # US where SS is meant
            first -= 65536
        data = item.LUTData
        if isinstance(data, bytes):
            table = np.frombuffer(data, np.uint8 if len(data) < 2 * count else "<u2")
        else:
            table = np.asarray(data).reshape(-1)
        table = table[:count].astype(np.float32)
    except _UNREADABLE as exc:
        raise SeriesRejected("a lookup table of an image is not readable") from exc
    if table.size == 0:
        raise SeriesRejected("a lookup table of an image is empty")
    index = np.clip(np.asarray(values, np.int64) - first, 0, table.size - 1)
    found: Stored = table[index]
    return found


# --- radiographs -----------------------------------------------------------------------------------------------------


def displayed_radiograph(image: ImageFile) -> Plane:
    """What a viewer would show, (rows, columns) float32, bright = dense, in arbitrary linear units.

    Modality LUT or rescale, then VOI LUT (its sequence first, else the first window as LINEAR, LINEAR_EXACT or
    SIGMOID, else none), then MONOCHROME1 or Presentation LUT Shape INVERSE turned round. Padding is black. Raises
    SeriesRejected for colour, more than 16 bits, and what `read_image` accepts but cannot be decoded.
    """
    layout = _layout(image.header)
    if layout.stored > 16:
        raise SeriesRejected(f"a radiograph of {layout.stored} bits is not read")
    stored, padded = _stored_values(image, layout)
    low, high = layout.limits
    # at most 65536 different values: everything is worked out once for each, then looked up
    table = _display_table(np.arange(low, high + 1), image.header, signed=layout.signed)
    shown: Plane = table.take(stored if low == 0 else stored.astype(np.int32) - low)
    if padded is not None:
        shown[padded] = table.min()
    return shown


def _display_table(values: npt.NDArray[np.int64], header: Mapping[str, Any], *, signed: bool) -> Plane:
    shown = _modality(values, header, signed=signed)
    shown = _voi(shown, header)
    if header.get("PhotometricInterpretation") == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        shown = shown.max() + shown.min() - shown
    if not np.isfinite(shown).all():
        raise SeriesRejected("the display values of a radiograph are not finite")
    return shown.astype(np.float32)


def _modality(values: Stored, header: Mapping[str, Any], *, signed: bool) -> Stored:
    if header.get("ModalityLUTSequence"):
        return _through_lut(values, header["ModalityLUTSequence"][0], signed=signed)
    slope, intercept = _first(header.get("RescaleSlope")), _first(header.get("RescaleIntercept"))
    scaled: Stored = values * (1.0 if slope is None else slope) + (intercept or 0.0)
    return scaled


def _voi(values: Stored, header: Mapping[str, Any]) -> Stored:
    if header.get("VOILUTSequence"):
        return _through_lut(np.rint(values), header["VOILUTSequence"][0], signed=bool(values.min() < 0))
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return values
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - centre) / width, -80, 80)
        sigmoid: Stored = 1 / (1 + np.exp(exponent))
        return sigmoid
    if function == "LINEAR":  # PS3.3 C.11.2.1.2.1: the half pixel and the width less one are in the definition
        centre, width = centre - 0.5, max(width - 1, 1e-9)
    linear: Stored = np.clip((values - centre) / width + 0.5, 0, 1)
    return linear


def _first(text: str | None) -> float | None:
    """The first of one or several decimal strings, None when absent or no number."""
    try:
        number = float((text or "").split("\\")[0])
    except ValueError:
        return None
    return number if np.isfinite(number) else None
