"""From stored values to numbers that mean something: Hounsfield units of a stack, display values of a radiograph.

HU never see a VOI or presentation LUT; radiographs do (PS3.3 C.11.1, C.11.2, C.11.6). Knows no model and no wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry, volume_geometry
from dicom_node.planes import Identity, identity_of
from dicom_node.stored_values import UNREADABLE, ImageFile, Layout, Slice, Stored, decoded, read_image, stored_values

__all__ = [
    "AIR_HU",
    "ImageFile",
    "displayed_radiograph",
    "read_hounsfield",
    "read_image",
    "read_volume",
    "series_geometry",
]

AIR_HU = -1000
MAX_VOLUME_BYTES = 6 * 1024**3

Plane = npt.NDArray[np.float32]
Volume = npt.NDArray[np.int16] | npt.NDArray[np.float32]

# --- volumes ---------------------------------------------------------------------------------------------------------


def series_geometry(
    images: Sequence[ImageFile],
    *,
    min_slices: int = 3,
    excluded_image_types: Iterable[str] = (),
    regular: Literal["require", "repair"] = "require",
) -> VolumeGeometry:
    """`geometry.volume_geometry` of these images and their frames; images in one place are compared by their pixels."""
    slices = {identity_of(header): (image, header) for image in images for header in image.planes}

    def same(one: Identity, other: Identity) -> bool:
        return _same_values(Slice.of(*slices[one]), Slice.of(*slices[other]))

    return volume_geometry(
        [header for _, header in slices.values()],
        min_slices=min_slices,
        excluded_image_types=excluded_image_types,
        regular=regular,
        same_slice=same,
    )


def _same_values(one: Slice, other: Slice) -> bool:
    """Whether two slices have the same values, whatever else their headers say."""
    if _rescale(one.header, "any") != _rescale(other.header, "any"):
        return False
    (values, padded), (others, others_padded) = stored_values(one), stored_values(other)
    if (padded is None) != (others_padded is None):
        return False
    same_padding = padded is None or others_padded is None or np.array_equal(padded, others_padded)
    return same_padding and np.array_equal(values, others)


def read_volume(
    images: Iterable[ImageFile],
    geometry: VolumeGeometry,
    *,
    values: Literal["hu", "any"] = "hu",
    heartbeat: Callable[[], None] | None = None,
) -> Volume:
    """The slices of `geometry`, in its order, out of `images`: (slices, rows, columns), C-contiguous.

    `values` hu: as `read_hounsfield`. any: stored values through their rescale or modality LUT, whatever their unit,
    as they are where there is none; padding becomes the lowest other value of its slice. Raises as `read_hounsfield`.
    """
    slices = {identity_of(header): (image, header) for image in images for header in image.planes}
    return _volume([Slice.of(*slices[identity]) for identity in geometry.identities], values, heartbeat)


def read_hounsfield(images: Sequence[ImageFile], heartbeat: Callable[[], None] | None = None) -> Volume:
    """Stack single-frame `images` in the given order: (slices, rows, columns) in HU, C-contiguous.

    int16 when every slice has slope 1 and an integral intercept (values beyond +-32767 saturate), else float32.
    Padding becomes `AIR_HU`. `heartbeat` is called after each slice and while decoders work. Raises SeriesRejected:
    no rescale (the values have no unit), unreadable or contradictory pixel data, sizes that differ, more than
    `MAX_VOLUME_BYTES`; EngineUnavailable when there are no decoders to be had (`decoding`).
    """
    return _volume([Slice.of(image, image.header) for image in images], "hu", heartbeat)


def _volume(slices: Sequence[Slice], values: Literal["hu", "any"], heartbeat: Callable[[], None] | None) -> Volume:
    if len({slice_.layout.shape for slice_ in slices}) != 1:
        raise SeriesRejected("the images have different Rows x Columns")
    rescales = [_rescale(slice_.header, values) for slice_ in slices]
    read = zip(slices, rescales, strict=True)
    integral = all(_fits_int16(slice_.layout, rescale, values) for slice_, rescale in read)
    shape = (len(slices), *slices[0].layout.shape)
    if int(np.prod(shape, dtype=np.int64)) * (2 if integral else 4) > MAX_VOLUME_BYTES:
        raise SeriesRejected(f"a volume of {shape[0]} x {shape[1]} x {shape[2]} voxels is too large")
    volume: Volume = np.empty(shape, np.int16) if integral else np.empty(shape, np.float32)
    fill = _int16_slice if integral else _float_slice
    for k, cells in _in_reading_order(slices, heartbeat):
        padded = fill(volume[k], slices[k], rescales[k], cells)
        if padded is not None:
            _pad(volume[k], padded, values)
        if heartbeat is not None:
            heartbeat()
    return volume


def _in_reading_order(
    slices: Sequence[Slice], heartbeat: Callable[[], None] | None
) -> Iterator[tuple[int, Stored | None]]:
    """Each slice's index and, where they must be decoded, its cells: those come last, as they are done."""
    encoded = []
    for k, slice_ in enumerate(slices):
        if slice_.native:
            yield k, None
        else:
            encoded.append(k)
    if encoded:
        for number, cells in decoded([slices[k] for k in encoded], heartbeat):
            yield encoded[number], cells


def _pad(plane: npt.NDArray[Any], padded: npt.NDArray[np.bool_], values: Literal["hu", "any"]) -> None:
    image = plane[~padded] if values == "any" else plane[:0]
    plane[padded] = AIR_HU if values == "hu" else (image.min() if image.size else 0)


_Rescale = tuple[float, float] | Dataset


def _rescale(header: Mapping[str, Any], values: Literal["hu", "any"]) -> _Rescale:
    if header.get("ModalityLUTSequence"):
        item: Dataset = header["ModalityLUTSequence"][0]
        return item
    if values == "any" and not ("RescaleSlope" in header or "RescaleIntercept" in header):
        return 1.0, 0.0
    kind = str(header.get("RescaleType") or "HU").strip().upper()
    if values == "hu" and kind not in ("HU", "HU_MOD"):
        raise SeriesRejected(f"Rescale Type is {kind[:16]}, not HU: the values are no Hounsfield units")
    try:
        slope, intercept = float(header["RescaleSlope"]), float(header["RescaleIntercept"])
    except (KeyError, TypeError, ValueError):
        raise SeriesRejected(
            "an image has no Rescale Slope and Intercept: its values are no Hounsfield units"
            if values == "hu"
            else "an image has a Rescale Slope or Intercept that is no number"
        ) from None
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise SeriesRejected("Rescale Slope or Intercept is zero or not finite")
    return slope, intercept


def _fits_int16(layout: Layout, rescale: _Rescale, values: Literal["hu", "any"]) -> bool:
    whole = (
        isinstance(rescale, tuple)
        and layout.allocated <= 16
        and rescale[0] == 1
        and rescale[1].is_integer()
        and abs(rescale[1]) < 32768
    )
    if not whole or values == "hu":  # no tissue has more than 32767 HU: there they are held
        return whole
    assert isinstance(rescale, tuple)
    return layout.limits[0] + rescale[1] >= -32768 and layout.limits[1] + rescale[1] <= 32767


def _int16_slice(
    target: npt.NDArray[np.int16], slice_: Slice, rescale: _Rescale, cells: Stored | None
) -> npt.NDArray[np.bool_] | None:
    """Fill `target`; where the padding is."""
    assert isinstance(rescale, tuple)
    layout, intercept = slice_.layout, int(rescale[1])
    in_place = layout.allocated == 16 and slice_.native
    plane, padded = stored_values(slice_, target if in_place else None, cells)
    low, high = layout.limits
    below, above = -32768 - intercept, 32767 - intercept
    if low < below or high > above:  # can only be: 16 bits stored
        np.clip(plane, max(low, below), min(high, above), out=plane)
    if not in_place:
        target[...] = plane.astype(np.int32) if layout.allocated == 8 else plane.view(np.int16)
    # modulo 2^16 the sum is the same for signed and unsigned cells, and it fits
    target += np.int16(intercept)
    return padded


def _float_slice(target: Plane, slice_: Slice, rescale: _Rescale, cells: Stored | None) -> npt.NDArray[np.bool_] | None:
    """Fill `target`; where the padding is."""
    plane, padded = stored_values(slice_, cells=cells)
    if isinstance(rescale, tuple):
        np.multiply(plane, np.float32(rescale[0]), out=target, casting="unsafe")
        target += np.float32(rescale[1])
    else:
        target[...] = _through_lut(plane, rescale, signed=slice_.layout.signed)
    return padded


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
    except UNREADABLE as exc:
        raise SeriesRejected("a lookup table of an image is not readable") from exc
    if table.size == 0:
        raise SeriesRejected("a lookup table of an image is empty")
    index = np.clip(np.asarray(values, np.int64) - first, 0, table.size - 1)
    found: Stored = table[index]
    return found


# --- radiographs -----------------------------------------------------------------------------------------------------


def displayed_radiograph(image: ImageFile, heartbeat: Callable[[], None] | None = None) -> Plane:
    """What a viewer would show, (rows, columns) float32, bright = dense, in arbitrary linear units.

    Modality LUT or rescale, then VOI LUT (its sequence first, else the first window as LINEAR, LINEAR_EXACT or
    SIGMOID, else none), then MONOCHROME1 or Presentation LUT Shape INVERSE turned round. Padding is black.
    `heartbeat` is called while a decoder works on it. Raises SeriesRejected for colour, more than 16 bits, and what
    `read_image` accepts but cannot be decoded; EngineUnavailable as `read_hounsfield`.
    """
    slice_ = Slice.of(image, image.header)
    layout = slice_.layout
    if layout.stored > 16:
        raise SeriesRejected(f"a radiograph of {layout.stored} bits is not read")
    stored, padded = stored_values(slice_, heartbeat=heartbeat)
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
