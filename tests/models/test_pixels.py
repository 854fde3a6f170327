"""Hounsfield units and display values: the same numbers as pydicom's, for every way of storing them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from dicom_node.errors import SeriesRejected
from dicom_node.model import StoredInstance
from dicom_node.pixels import (
    AIR_HU,
    ImageFile,
    displayed_radiograph,
    read_hounsfield,
    read_image,
    read_volume,
    series_geometry,
)

Stored = Callable[[Path], StoredInstance]


def write_image(
    path: Path,
    cells: npt.NDArray[Any],
    *,
    bits_stored: int | None = None,
    high_bit: int | None = None,
    signed: bool | None = None,
    syntax: str = uids.ExplicitVRLittleEndian,
    **attributes: Any,
) -> Path:
    """A CT image whose pixel cells are exactly `cells` (their dtype gives Bits Allocated)."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uids.CTImageStorage, uids.generate_uid()
    ds.Modality = "CT"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = cells.shape
    ds.BitsAllocated = cells.dtype.itemsize * 8
    ds.BitsStored = bits_stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1 if high_bit is None else high_bit
    ds.PixelRepresentation = int(cells.dtype.kind == "i" if signed is None else signed)
    ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
    for keyword, value in attributes.items():
        if value is None:
            if keyword in ds:
                del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    native = syntax in (uids.ExplicitVRLittleEndian, uids.ImplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian)
    ds.file_meta.TransferSyntaxUID = (
        syntax if native or syntax == uids.ExplicitVRBigEndian else uids.ExplicitVRLittleEndian
    )
    order = ">" if syntax == uids.ExplicitVRBigEndian else "<"
    ds.PixelData = cells.astype(cells.dtype.newbyteorder(order)).tobytes()
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    if not native and syntax != uids.ExplicitVRBigEndian:
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def cells_of(dtype: str, low: int, high: int, shape: tuple[int, int] = (33, 47)) -> npt.NDArray[Any]:
    """Random cells in [low, high], both ends included somewhere."""
    cells = np.random.default_rng(5).integers(low, high + 1, shape).astype(dtype)
    cells[0, 0], cells[0, 1] = low, high
    return cells


def hounsfield(path: Path, stored: Stored) -> npt.NDArray[Any]:
    return read_hounsfield([read_image(stored(path))])[0]


def reference(path: Path) -> npt.NDArray[Any]:
    """pydicom's own way, float64."""
    ds = pydicom.dcmread(path)
    return np.asarray(apply_modality_lut(ds.pixel_array, ds), np.float64)


SYNTAXES = {
    "explicit": uids.ExplicitVRLittleEndian,
    "implicit": uids.ImplicitVRLittleEndian,
    "big endian": uids.ExplicitVRBigEndian,
    "deflated": uids.DeflatedExplicitVRLittleEndian,
    "rle": uids.RLELossless,
    "jpeg 2000": uids.JPEG2000Lossless,
    "jpeg-ls": uids.JPEGLSLossless,
}


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize(
    ("dtype", "bits", "low", "high"),
    [("uint16", 12, 0, 4095), ("int16", 12, -2048, 2047), ("uint16", 16, 0, 33000), ("int16", 16, -31000, 32767)],
)
def test_every_syntax_gives_the_hu_that_pydicom_gives(
    syntax: str, dtype: str, bits: int, low: int, high: int, tmp_path: Path, stored: Stored
) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of(dtype, low, high), bits_stored=bits, syntax=syntax)
    found = hounsfield(path, stored)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, reference(path))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "attributes", "kind"),
    [
        ("uint8", 0, 255, {}, np.int16),
        ("int8", -128, 127, {}, np.int16),
        ("uint16", 0, 4095, {"RescaleSlope": "2.5", "RescaleIntercept": "-1000.5"}, np.float32),
        ("uint16", 0, 4095, {"RescaleIntercept": "-1000.5"}, np.float32),
        ("int16", -2000, 3000, {"RescaleSlope": "-1", "RescaleIntercept": "0"}, np.float32),
        ("uint32", 0, 70000, {}, np.float32),
        ("uint16", 0, 4095, {"RescaleIntercept": "0"}, np.int16),
        ("uint16", 0, 4095, {"RescaleIntercept": "-1024.000"}, np.int16),
    ],
)
def test_depths_and_rescales_give_the_hu_that_pydicom_gives(
    dtype: str, low: int, high: int, attributes: dict[str, str], kind: type, tmp_path: Path, stored: Stored
) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of(dtype, low, high), **attributes)
    found = hounsfield(path, stored)
    assert found.dtype == kind
    np.testing.assert_allclose(found, reference(path), atol=5e-3)


def test_each_slice_has_its_own_rescale(tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("uint16", 0, 4095)
    slopes = ("1", "2", "0.5")
    paths = [write_image(tmp_path / f"{slope}.dcm", cells, RescaleSlope=slope) for slope in slopes]
    volume = read_hounsfield([read_image(stored(path)) for path in paths])
    for plane, path in zip(volume, paths, strict=True):
        np.testing.assert_allclose(plane, reference(path), atol=1e-3)


def test_old_overlays_in_the_unused_bits_are_masked(tmp_path: Path, stored: Stored) -> None:
    values = cells_of("uint16", 0, 4095)
    dirty = values | (np.random.default_rng(1).integers(0, 16, values.shape).astype(np.uint16) << 12)
    path = write_image(tmp_path / "a.dcm", dirty, bits_stored=12)
    np.testing.assert_array_equal(hounsfield(path, stored), values.astype(np.int32) - 1024)


def test_signed_values_of_twelve_bits_are_sign_extended(tmp_path: Path, stored: Stored) -> None:
    values = cells_of("int16", -2048, 2047)
    unextended = (values & 0x0FFF).astype(np.uint16)
    path = write_image(tmp_path / "a.dcm", unextended, bits_stored=12, signed=True)
    np.testing.assert_array_equal(hounsfield(path, stored), values.astype(np.int32) - 1024)


@pytest.mark.parametrize("name", ["explicit", "big endian", "deflated", "rle"])
def test_values_in_the_upper_bits_are_shifted_down(name: str, tmp_path: Path, stored: Stored) -> None:
    values = cells_of("uint16", 0, 4095)
    path = write_image(tmp_path / "a.dcm", values << 4, bits_stored=12, high_bit=15, syntax=SYNTAXES[name])
    np.testing.assert_array_equal(hounsfield(path, stored), values.astype(np.int32) - 1024)


def test_what_does_not_fit_sixteen_bits_saturates_and_never_wraps(tmp_path: Path, stored: Stored) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 65535), RescaleIntercept="-1024")
    np.testing.assert_array_equal(hounsfield(path, stored), np.minimum(reference(path), 32767))
    path = write_image(tmp_path / "b.dcm", cells_of("int16", -32768, 32767), RescaleIntercept="-1024")
    np.testing.assert_array_equal(hounsfield(path, stored), np.maximum(reference(path), -32768))


def test_values_that_are_no_hounsfield_units_never_saturate(tmp_path: Path, stored: Stored) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    paths = [
        write_image(
            tmp_path / f"{k}.dcm",
            ramp,
            RescaleSlope=None,
            RescaleIntercept=None,
            ImagePositionPatient=[0, 0, k],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[1, 1],
            FrameOfReferenceUID="1.2.3",
        )
        for k in range(3)
    ]
    images = [read_image(stored(path)) for path in paths]
    volume = read_volume(images, series_geometry(images), values="any")
    np.testing.assert_array_equal(volume, np.stack([ramp] * 3))


@pytest.mark.parametrize(
    ("dtype", "bits", "padding", "limit", "padded"),
    [
        ("int16", 16, -2000, None, [-2000]),
        ("uint16", 16, 63536, None, [63536]),
        ("uint16", 12, 0xF830, None, [0xF830]),  # outside Bits Stored, as some scanners write it
        ("int16", 16, -2000, -1900, [-2000, -1950, -1900]),
    ],
)
def test_padding_is_air(
    dtype: str, bits: int, padding: int, limit: int | None, padded: list[int], tmp_path: Path, stored: Stored
) -> None:
    cells = np.full((16, 16), 1064, dtype)
    cells[0, : len(padded)] = padded
    attributes = {"PixelPaddingValue": padding, **({"PixelPaddingRangeLimit": limit} if limit is not None else {})}
    path = write_image(tmp_path / "a.dcm", cells, bits_stored=bits, **attributes)
    found = hounsfield(path, stored)
    assert (found[0, : len(padded)] == AIR_HU).all()
    assert (found[1:] == 40).all()


def test_monochrome1_and_windows_do_not_touch_hu(tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("uint16", 0, 4095)
    plain = hounsfield(write_image(tmp_path / "a.dcm", cells), stored)
    odd = write_image(
        tmp_path / "b.dcm",
        cells,
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",
        WindowCenter="40",
        WindowWidth="400",
    )
    np.testing.assert_array_equal(hounsfield(odd, stored), plain)


def _lut(first: int, table: npt.NDArray[np.uint16], bits: int = 16) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(table), first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return Sequence([item])


def test_a_modality_lut_is_looked_up(tmp_path: Path, stored: Stored) -> None:
    table = (np.arange(3000) * 7 % 4096).astype(np.uint16)
    path = write_image(
        tmp_path / "a.dcm",
        cells_of("uint16", 0, 4095),
        RescaleSlope=None,
        RescaleIntercept=None,
        ModalityLUTSequence=_lut(100, table),
    )
    np.testing.assert_array_equal(hounsfield(path, stored), reference(path))


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"RescaleSlope": None}, "no Rescale Slope and Intercept"),
        ({"RescaleSlope": "0"}, "zero or not finite"),
        ({"RescaleType": "OD"}, "not HU"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "in colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not a grey scale"),
        ({"Rows": 400}, "bytes of pixel data"),
        ({"Rows": 65535, "Columns": 65535}, "too large"),
        ({"Rows": 0}, "empty or too large"),
        ({"BitsStored": 17}, "not understood"),
        ({"PixelRepresentation": None}, "lacks an attribute"),
        ({"NumberOfFrames": "2"}, "multi-frame"),
        ({"PixelData": None}, "no Pixel Data"),
    ],
)
def test_images_that_are_no_hu_are_refused(
    attributes: dict[str, Any], says: str, tmp_path: Path, stored: Stored
) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 4095))
    ds = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.save_as(path)
    with pytest.raises(SeriesRejected, match=says):
        hounsfield(path, stored)


def test_cut_and_rotten_files_are_refused(tmp_path: Path, stored: Stored) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 4095))
    instance = stored(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 1, instance.data_set_offset, -97):
        path.write_bytes(whole[:length])
        with pytest.raises(SeriesRejected):
            read_hounsfield([read_image(instance)])
    compressed = write_image(tmp_path / "b.dcm", cells_of("uint16", 0, 4095), syntax=uids.RLELossless)
    instance = stored(compressed)
    rotten = bytearray(compressed.read_bytes())
    rotten[-800:] = bytes(800)
    compressed.write_bytes(rotten)
    with pytest.raises(SeriesRejected, match=r"RLE Lossless.*cannot be decoded"):
        read_hounsfield([read_image(instance)])


def test_a_data_set_in_another_encoding_than_promised_is_refused(tmp_path: Path, stored: Stored) -> None:
    import dataclasses

    for written, promised in (
        (uids.ExplicitVRLittleEndian, uids.ImplicitVRLittleEndian),
        (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian),
    ):
        path = write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 4095, (200, 200)), syntax=written)
        instance = dataclasses.replace(stored(path), transfer_syntax_uid=str(promised))
        with pytest.raises(SeriesRejected):
            read_hounsfield([read_image(instance)])


def test_a_file_that_holds_another_image_is_refused(tmp_path: Path, stored: Stored) -> None:
    import dataclasses

    instance = stored(write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 4095)))
    with pytest.raises(SeriesRejected, match="another image"):
        read_image(dataclasses.replace(instance, sop_instance_uid="1.2.3"))


def test_a_missing_file_is_refused(tmp_path: Path, stored: Stored) -> None:
    path = write_image(tmp_path / "a.dcm", cells_of("uint16", 0, 4095))
    instance = stored(path)
    path.unlink()
    with pytest.raises(SeriesRejected, match="FileNotFoundError"):
        read_image(instance)


# --- radiographs


def displayed(path: Path, stored: Stored) -> npt.NDArray[np.float32]:
    return displayed_radiograph(read_image(stored(path)))


def rescaled(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """To 0..1, so that pictures in different units compare."""
    values = np.asarray(values, np.float64)
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("dtype", "low", "high"), [("uint16", 0, 4095), ("int16", -2048, 2047), ("uint8", 0, 255)])
def test_a_window_shows_what_pydicom_shows(
    function: str | None, dtype: str, low: int, high: int, tmp_path: Path, stored: Stored
) -> None:
    width = (high - low) / 2
    path = write_image(
        tmp_path / "a.dcm",
        cells_of(dtype, low, high),
        bits_stored=8 if dtype == "uint8" else 12,
        RescaleIntercept="0",
        WindowCenter=[f"{(low + high) / 2 + 10:g}", "1"],
        WindowWidth=[f"{width:g}", "2"],
        VOILUTFunction=function,
    )
    ds = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    np.testing.assert_allclose(rescaled(displayed(path, stored)), rescaled(expected), atol=2e-3)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize("bits", range(8, 17))
def test_a_radiograph_of_every_depth_and_syntax_is_shown(
    bits: int, syntax: str, tmp_path: Path, stored: Stored
) -> None:
    cells = cells_of("uint8" if bits == 8 else "uint16", 0, (1 << bits) - 1)
    path = write_image(
        tmp_path / "a.dcm", cells, bits_stored=bits, syntax=syntax, RescaleSlope=None, RescaleIntercept=None
    )
    np.testing.assert_array_equal(displayed(path, stored), pydicom.dcmread(path).pixel_array)


def _smooth(bits: int) -> npt.NDArray[Any]:
    """What lossy compression is made for."""
    rows, columns = np.indices((64, 96))
    wave = 0.5 + 0.25 * np.sin(rows / 9) + 0.2 * np.cos(columns / 13)
    return np.rint(wave * ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)


@pytest.mark.skipif(not shutil.which("dcmcjpeg"), reason="dcmcjpeg is not installed: no JPEG files can be made")
@pytest.mark.parametrize(
    ("option", "bits", "within"),
    [("+el", 8, 0), ("+el", 12, 0), ("+e1", 12, 0), ("+e1", 16, 0), ("+eb", 8, 3), ("+ee", 8, 3), ("+ee", 12, 40)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_radiograph_compressed_as_jpeg_is_shown(
    photometric: str, option: str, bits: int, within: int, tmp_path: Path, stored: Stored
) -> None:
    cells = _smooth(bits)
    path = write_image(
        tmp_path / "a.dcm",
        cells,
        bits_stored=bits,
        RescaleSlope=None,
        RescaleIntercept=None,
        PhotometricInterpretation=photometric,
    )
    made = tmp_path / "b.dcm"
    command = ["dcmcjpeg", option, "--uid-never", *(["+q", "95"] if within else []), str(path), str(made)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    found, expected = displayed(made, stored), displayed(path, stored)
    # dcmcjpeg moves the values to begin at zero: display values have no absolute zero
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=within + 0.01)


def test_a_signed_radiograph_is_shown(tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("int16", -2048, 2047)
    path = write_image(tmp_path / "a.dcm", cells, bits_stored=12, RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(displayed(path, stored), cells)


def test_a_modality_lut_goes_before_a_window(tmp_path: Path, stored: Stored) -> None:
    table = (4095 * (np.arange(4096) / 4095) ** 2).astype(np.uint16)
    path = write_image(
        tmp_path / "a.dcm",
        cells_of("uint16", 0, 4095),
        bits_stored=12,
        RescaleSlope=None,
        RescaleIntercept=None,
        ModalityLUTSequence=_lut(0, table),
        WindowCenter="2000",
        WindowWidth="3000",
    )
    ds = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    np.testing.assert_allclose(rescaled(displayed(path, stored)), rescaled(expected), atol=2e-3)


@pytest.mark.parametrize(
    ("photometric", "syntax"),
    [("RGB", "native"), ("YBR_FULL", "native"), ("RGB", "rle"), ("PALETTE COLOR", "native")],
)
def test_a_colour_photograph_is_refused_whatever_its_header_claims(
    photometric: str, syntax: str, tmp_path: Path, stored: Stored
) -> None:
    palette = photometric == "PALETTE COLOR"
    picture = cells_of("uint8", 0, 255, (40, 60))
    ds = pydicom.dcmread(write_image(tmp_path / "a.dcm", picture))
    ds.SOPClassUID, ds.Modality = uids.DigitalXRayImageStorageForPresentation, "DX"
    ds.BodyPartExamined, ds.ViewPosition = "CHEST", "PA"
    ds.PhotometricInterpretation = photometric
    if not palette:
        ds.SamplesPerPixel, ds.PlanarConfiguration = 3, 0
        ds.PixelData = np.repeat(picture[..., None], 3, axis=2).tobytes()
    if syntax == "rle":
        ds.compress(uids.RLELossless, generate_instance_uid=False)
    ds.save_as(tmp_path / "a.dcm")
    says = "is not a grey scale" if palette else "in colour, not in grey values"
    with pytest.raises(SeriesRejected, match=says):
        displayed(tmp_path / "a.dcm", stored)


@pytest.mark.parametrize("syntax", [uids.ExplicitVRLittleEndian, uids.ImplicitVRLittleEndian])
def test_pixels_without_the_padding_byte_are_read(syntax: str, tmp_path: Path, stored: Stored) -> None:
    """PS3.5 8.2 wants an even length; films of an odd number of 8-bit pixels come without it."""
    cells = cells_of("uint8", 0, 255, (33, 47))
    path = write_image(
        tmp_path / "a.dcm", cells, syntax=syntax, RescaleSlope=None, RescaleIntercept=None, WindowCenter=None
    )
    whole = path.read_bytes()
    padded, odd = (33 * 47 + 1).to_bytes(4, "little"), (33 * 47).to_bytes(4, "little")
    assert whole.count(padded) == 1 and whole.endswith(b"\0")
    path.write_bytes(whole.replace(padded, odd)[:-1])
    np.testing.assert_array_equal(displayed(path, stored), cells)


def test_a_voi_lut_goes_before_a_window(tmp_path: Path, stored: Stored) -> None:
    table = np.sqrt(np.arange(4096) / 4095) * 65535
    path = write_image(
        tmp_path / "a.dcm",
        cells_of("uint16", 0, 4095),
        bits_stored=12,
        RescaleSlope=None,
        RescaleIntercept=None,
        VOILUTSequence=_lut(0, table.astype(np.uint16)),
        WindowCenter="10",
        WindowWidth="20",
    )
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(displayed(path, stored), apply_voi_lut(ds.pixel_array, ds))


@pytest.mark.parametrize(
    ("photometric", "shape", "turned"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),  # both say the same: turned once, not twice
        ("MONOCHROME2", "INVERSE", True),
    ],
)
def test_inversion_is_done_once(
    photometric: str, shape: str | None, turned: bool, tmp_path: Path, stored: Stored
) -> None:
    cells = cells_of("uint16", 0, 4095)
    path = write_image(
        tmp_path / "a.dcm", cells, bits_stored=12, PhotometricInterpretation=photometric, PresentationLUTShape=shape
    )
    expected = rescaled(cells)
    np.testing.assert_allclose(rescaled(displayed(path, stored)), 1 - expected if turned else expected, atol=1e-6)


@pytest.mark.parametrize("width", ["0", "-5", "0.5"])
def test_an_impossible_window_is_ignored(width: str, tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("uint16", 0, 4095)
    path = write_image(tmp_path / "a.dcm", cells, WindowCenter="100", WindowWidth=width)
    np.testing.assert_allclose(rescaled(displayed(path, stored)), rescaled(cells), atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_of_a_radiograph_is_black(photometric: str, tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("uint16", 100, 4000)
    cells[:4] = 0
    path = write_image(
        tmp_path / "a.dcm", cells, bits_stored=12, PhotometricInterpretation=photometric, PixelPaddingValue=0
    )
    shown = displayed(path, stored)
    assert shown[:4].max() == shown.min()
    assert shown[4:].max() > shown.min()


def test_a_radiograph_without_rescale_is_read(tmp_path: Path, stored: Stored) -> None:
    cells = cells_of("uint16", 0, 16383)
    path = write_image(tmp_path / "a.dcm", cells, bits_stored=14, RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(displayed(path, stored), cells)


# --- real files

CORPUS = os.environ.get("DICOM_NODE_CORPUS")


@pytest.mark.skipif(not CORPUS, reason="DICOM_NODE_CORPUS is not set: no real DICOM files")
def test_real_images_give_what_pydicom_gives_or_a_reason(stored: Stored) -> None:
    assert CORPUS is not None
    compared = refused = 0
    for path in sorted(Path(CORPUS).rglob("*")):
        image = _readable(path, stored)
        if image is None:
            continue
        try:
            found = read_hounsfield([image])[0]
        except SeriesRejected as exc:
            assert exc.reason
            refused += 1
            continue
        seen = found != AIR_HU  # padding is air here and a number there
        np.testing.assert_allclose(found[seen], reference(path)[seen], atol=1e-2, err_msg=path.name)
        compared += 1
    assert compared > 50 and refused > 100


@pytest.mark.skipif(not CORPUS, reason="DICOM_NODE_CORPUS is not set: no real DICOM files")
def test_every_real_film_is_shown_as_pydicom_shows_it(stored: Stored) -> None:
    shown = 0
    for path in sorted(Path(str(CORPUS)).rglob("*")):
        ds = _header_of(path)
        if ds is None or ds.get("Modality") not in ("CR", "DX", "MG") or "Rows" not in ds:
            continue
        if "fuzz" in str(path) or not _has_pixels(path):
            continue
        found = rescaled(displayed(path, stored))
        whole = pydicom.dcmread(path)
        expected = rescaled(apply_voi_lut(apply_modality_lut(whole.pixel_array, whole), whole))
        if whole.PhotometricInterpretation == "MONOCHROME1":
            expected = 1 - expected
        np.testing.assert_allclose(found, expected, atol=2e-3, err_msg=path.name)
        shown += 1
    assert shown >= 7


def _header_of(path: Path) -> Dataset | None:
    if not path.is_file() or path.stat().st_size < 140:
        return None
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except (pydicom.errors.InvalidDicomError, AttributeError, OSError, ValueError, EOFError):
        return None


def _has_pixels(path: Path) -> bool:
    return "PixelData" in pydicom.dcmread(path, specific_tags=["PixelData"])


def _readable(path: Path, stored: Stored) -> ImageFile | None:
    """A corpus file as an image, None where it is no Part-10 file or no readable one."""
    if not path.is_file() or path.stat().st_size < 140:
        return None
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
    try:
        return read_image(stored(path))
    except (SeriesRejected, pydicom.errors.InvalidDicomError, AttributeError, OSError, ValueError):
        return None
