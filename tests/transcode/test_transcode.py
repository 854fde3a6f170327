"""Another transfer syntax on the way out: nothing lost, nothing altered, and a reason when it cannot be done."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from dicom_node import transcode as package
from dicom_node.errors import TranscodeError
from dicom_node.transcode import elements, frames, transcode

IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{suffix}" for suffix in ("", ".1", ".2", ".1.99"))
NATIVE = (IMPLICIT, EXPLICIT, BIG, DEFLATED)
MPEG4 = "1.2.840.10008.1.2.4.102"


@pytest.fixture
def rich() -> Dataset:
    """A data set with everything that is awkward."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4"
    ds.PatientName = "Müller^Jörg"
    ds.add(DataElement(0x00090010, "LO", "SIEMENS CT VA0  COAD"))
    ds.add(DataElement(0x00091010, "UN", b"\x01\x02\x03\x04"))
    ds.add(DataElement(0x00290010, "LO", "NOBODY KNOWS THIS"))
    ds.add(DataElement(0x00291001, "FD", 1.5))
    ds.FrameIncrementPointer = Tag(0x00181063)
    ds.PixelRepresentation = 1
    ds.SmallestImagePixelValue = -5
    ds["SmallestImagePixelValue"].VR = "SS"
    inner = Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "1", "99X", "deep"
    outer = Dataset()
    outer.ConceptNameCodeSequence = [inner]
    outer.RealWorldValueIntercept = -1024.0
    outer.add(DataElement(0x00191001, "UN", b"private in an item"))
    ds.ContentSequence = [outer, Dataset(), outer]
    ds.ReferencedStudySequence = Sequence([])
    ds["ContentSequence"].is_undefined_length = True
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.SamplesPerPixel = 2, 3, 16, 16, 15, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.add(DataElement(0x60003000, "OW", b"\x01\x02"))
    ds.VectorGridData = struct.pack("<2f", 1.0, 2.0)
    ds.PixelData = bytes(range(12))
    ds["PixelData"].VR = "OW"
    return ds


def encoded(ds: Dataset, syntax: str) -> bytes:
    """The data set in a native little endian or deflated syntax, as pydicom writes it."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = syntax == IMPLICIT, True
    write_dataset(out, ds)
    if syntax != DEFLATED:
        return out.getvalue()
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(out.getvalue()) + deflate.flush()


def decoded(content: bytes, syntax: str) -> Dataset:
    """A data set as pydicom reads it."""
    if syntax == DEFLATED:
        content = zlib.decompressobj(-15).decompress(content)
    return read_dataset(io.BytesIO(content), syntax == IMPLICIT, syntax != BIG)


def run(tmp_path: Path, content: bytes, from_syntax: str, *accepted: str) -> tuple[str, bytes]:
    """Transcode bytes that lie somewhere in a file."""
    path = tmp_path / "file"
    path.write_bytes(b"head" + content + b"tail")
    syntax, readable = transcode(path, 4, from_syntax, accepted, data_set_length=len(content))
    with readable:
        return syntax, readable.read()


def values(ds: Dataset) -> dict[Any, Any]:
    """Tag to value; group lengths left out, sequences as lists."""
    return {
        tag: [values(item) for item in ds[tag].value] if ds[tag].VR == "SQ" else ds[tag].value
        for tag in ds.keys()  # noqa: SIM118 - a Dataset iterates over elements
        if tag.element != 0
    }


@pytest.mark.parametrize("from_syntax", [IMPLICIT, EXPLICIT, DEFLATED])
@pytest.mark.parametrize("to_syntax", [IMPLICIT, EXPLICIT, DEFLATED])
def test_nothing_is_lost_between_little_endian_syntaxes(
    tmp_path: Path, rich: Dataset, from_syntax: str, to_syntax: str
) -> None:
    rich = decoded(encoded(rich, IMPLICIT), IMPLICIT)  # private elements are bytes then, in every syntax
    syntax, content = run(tmp_path, encoded(rich, from_syntax), from_syntax, to_syntax)
    assert syntax == to_syntax
    assert len(content) % 2 == 0
    assert values(decoded(content, to_syntax)) == values(rich)


@pytest.mark.parametrize("from_syntax", [IMPLICIT, EXPLICIT, DEFLATED])
def test_big_endian_means_the_same_numbers(tmp_path: Path, rich: Dataset, from_syntax: str) -> None:
    _, big = run(tmp_path, encoded(rich, from_syntax), from_syntax, BIG)
    ds = decoded(big, BIG)
    assert ds.Rows == 2
    assert ds.SmallestImagePixelValue == -5
    assert ds.FrameIncrementPointer == 0x00181063
    assert ds.ContentSequence[2].RealWorldValueIntercept == -1024.0
    assert np.frombuffer(ds.PixelData, ">u2").tolist() == np.frombuffer(rich.PixelData, "<u2").tolist()
    assert np.frombuffer(ds.VectorGridData, ">f4").tolist() == [1.0, 2.0]
    _, again = run(tmp_path, big, BIG, EXPLICIT)
    _, straight = run(tmp_path, encoded(rich, from_syntax), from_syntax, EXPLICIT)
    assert values(decoded(again, EXPLICIT)) == values(decoded(straight, EXPLICIT))


def test_an_accepted_syntax_goes_out_untouched(tmp_path: Path) -> None:
    content = b"\x08\x00 not even a data set"
    assert run(tmp_path, content, MPEG4, EXPLICIT, MPEG4) == (MPEG4, content)


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ((DEFLATED, BIG, EXPLICIT), EXPLICIT),
        ((DEFLATED, BIG), BIG),
        (("1.2.840.10008.1.2.4.50", DEFLATED), DEFLATED),
    ],
)
def test_the_plainest_accepted_syntax_is_used(
    tmp_path: Path, rich: Dataset, accepted: tuple[str, ...], chosen: str
) -> None:
    assert run(tmp_path, encoded(rich, IMPLICIT), IMPLICIT, *accepted)[0] == chosen


def test_known_attributes_get_their_vr_and_unknown_ones_un(tmp_path: Path, rich: Dataset) -> None:
    _, content = run(tmp_path, encoded(rich, IMPLICIT), IMPLICIT, EXPLICIT)
    ds = decoded(content, EXPLICIT)
    vrs = {
        "PatientName": "PN",
        "SmallestImagePixelValue": "SS",
        "PixelData": "OW",
        "ContentSequence": "SQ",
        "VectorGridData": "OF",
    }
    assert {keyword: ds[keyword].VR for keyword in vrs} == vrs
    assert (ds[0x00090010].VR, ds[0x60003000].VR) == ("LO", "OW")
    assert b"\x29\x00\x01\x10UN" in content


def test_a_value_too_long_for_its_vr_goes_out_as_un_and_comes_back(tmp_path: Path) -> None:
    ds = Dataset()
    ds.ImageComments = "x" * 70000
    _, explicit = run(tmp_path, encoded(ds, IMPLICIT), IMPLICIT, EXPLICIT)
    assert explicit[4:6] == b"UN"
    assert run(tmp_path, explicit, EXPLICIT, IMPLICIT)[1] == encoded(ds, IMPLICIT)


def test_a_sequence_of_unknown_vr_is_read_as_implicit(tmp_path: Path) -> None:
    # PS3.5 6.2.2: UN of undefined length holds items in Implicit VR Little Endian
    item = b"\x08\x00\x00\x01\x02\x00\x00\x00AB"
    content = (
        b"\x09\x00\x10\x00LO\x04\x00ACME\x09\x00\x01\x10UN\0\0\xff\xff\xff\xff"
        + b"\xfe\xff\x00\xe0"
        + struct.pack("<I", len(item))
        + item
        + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )
    for target in (IMPLICIT, BIG):
        ds = decoded(run(tmp_path, content, EXPLICIT, target)[1], target)
        if target == BIG:
            assert ds[0x00091001].value[0].CodeValue == "AB"


def compressed(name: str) -> Path:
    """A compressed file that comes with pydicom."""
    return Path(str(get_testdata_file(name, download=False)))


def native(path: Path, *accepted: str) -> tuple[Dataset, bytes]:
    """A compressed file in Explicit VR Little Endian."""
    original = dcmread(path)
    offset = data_set_offset(path)
    syntax, readable = transcode(path, offset, original.file_meta.TransferSyntaxUID, accepted or (EXPLICIT,))
    with readable:
        content = readable.read()
    ds = decoded(content, syntax)
    ds.ensure_file_meta()
    ds.file_meta.TransferSyntaxUID = syntax
    return ds, content


def data_set_offset(path: Path) -> int:
    """Where the data set of a Part-10 file begins."""
    with path.open("rb") as file:
        file.seek(132)
        read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        return file.tell()


@pytest.mark.parametrize(
    ("name", "interpretation"),
    [
        ("MR_small_RLE.dcm", "MONOCHROME2"),
        ("MR_small_jp2klossless.dcm", "MONOCHROME2"),
        ("MR_small_jpeg_ls_lossless.dcm", "MONOCHROME2"),
        ("SC_rgb_rle_16bit_2frame.dcm", "RGB"),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", "RGB"),
        ("SC_rgb_small_odd_jpeg.dcm", "RGB"),
        ("examples_ybr_color.dcm", "RGB"),
        ("examples_jpeg2k.dcm", "RGB"),
        ("JPEG2000.dcm", "MONOCHROME2"),
        ("JPGExtended.dcm", "MONOCHROME2"),
    ],
)
@pytest.mark.parametrize("target", [EXPLICIT, IMPLICIT])
def test_compressed_pixels_are_what_pydicom_makes_of_them(name: str, interpretation: str, target: str) -> None:
    path = compressed(name)
    try:
        expected = pixel_array(path)
    except RuntimeError:
        pytest.skip(f"needs a decoder for {name} (Python package pylibjpeg)")
    ds, _ = native(path, target)
    assert np.array_equal(pixel_array(ds, raw=True), expected)
    assert ds.PhotometricInterpretation == interpretation
    assert len(ds.PixelData) % 2 == 0
    original = dcmread(path)
    if original.SamplesPerPixel > 1:
        assert ds.PlanarConfiguration == 0
    if target == EXPLICIT:
        assert ("OB" if ds.BitsAllocated <= 8 else "OW") == ds["PixelData"].VR
    changed = {"PhotometricInterpretation", "PlanarConfiguration", "PixelData", "LossyImageCompression"}
    # private elements have a VR in an explicit data set only
    kept = {element.tag for element in original if not element.is_private and element.keyword not in changed}
    assert {tag: values(ds).get(tag) for tag in kept} == {tag: values(original)[tag] for tag in kept}


def test_what_was_lossy_stays_marked_as_lossy() -> None:
    path = compressed("SC_rgb_small_odd_jpeg.dcm")
    assert native(path)[0].LossyImageCompression == "01"


def test_a_table_of_compressed_offsets_is_dropped_and_the_stored_file_is_untouched(tmp_path: Path) -> None:
    ds = dcmread(compressed("MR_small_RLE.dcm"))
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = b"\0" * 8, struct.pack("<Q", len(frame))
    path = tmp_path / "table.dcm"
    ds.save_as(path)
    before = path.read_bytes()
    converted, _ = native(path)
    assert 0x7FE00001 not in converted
    assert 0x7FE00002 not in converted
    assert path.read_bytes() == before


def test_a_compressed_syntax_without_pixels_is_only_rewritten(tmp_path: Path, rich: Dataset) -> None:
    del rich.PixelData
    content = encoded(rich, EXPLICIT)
    _, out = run(tmp_path, content, "1.2.840.10008.1.2.4.50", EXPLICIT)
    assert values(decoded(out, EXPLICIT)) == values(decoded(content, EXPLICIT))


def test_what_cannot_be_done_has_a_reason(tmp_path: Path, rich: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(rich, EXPLICIT)
    with pytest.raises(TranscodeError, match="only compressed"):
        run(tmp_path, content, EXPLICIT, MPEG4)
    with pytest.raises(TranscodeError, match="cannot be decoded here"):
        run(tmp_path, content, MPEG4, EXPLICIT)
    with pytest.raises(TranscodeError, match="shorter than its index"):
        transcode(tmp_path / "file", 4, EXPLICIT, (IMPLICIT,), data_set_length=len(content) + 100)
    monkeypatch.setattr(frames, "MAX_DECODED_BYTES", 1000)
    with pytest.raises(TranscodeError, match="would take 8192 bytes"):
        native(compressed("MR_small_RLE.dcm"))
    assert package.MAX_DECODED_BYTES == 2 * 1024**3


@pytest.mark.parametrize(
    ("content", "from_syntax"),
    [
        (b"\x08\x00", EXPLICIT),
        (b"\x08\x00\x05\x00CS\x0a\x00ISO", EXPLICIT),
        (b"\x08\x00\x05\x00\x0a\x00\x00\x00", EXPLICIT),
        (b"\x08\x00\x05\x00\xff\xff\xff\x7f", IMPLICIT),
        (b"\x08\x00\x10\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff", EXPLICIT),
        (b"\x08\x00\x10\x11SQ\0\0\x08\0\0\0" + b"\xfe\xff\x00\xe0\x10\0\0\0", EXPLICIT),
        (b"\x08\x00\x10\x11SQ\0\0\x08\0\0\0" + b"\x10\x00\x10\x00\0\0\0\0", EXPLICIT),
        ((b"\x08\x00\x10\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 5000, EXPLICIT),
        (b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff", EXPLICIT),
        (b"\xff" * 64, DEFLATED),
        (os.urandom(4096), IMPLICIT),
    ],
)
def test_bytes_that_are_no_data_set_are_refused(tmp_path: Path, content: bytes, from_syntax: str) -> None:
    with pytest.raises(TranscodeError):
        run(tmp_path, content, from_syntax, BIG)


def test_a_value_where_the_standard_has_a_sequence_cannot_go_without_its_vr(tmp_path: Path) -> None:
    content = b"\x08\0\x40\x11US\x02\0\2\0"  # Referenced Image Sequence, said to be a number
    with pytest.raises(TranscodeError, match="has a sequence"):
        run(tmp_path, content, EXPLICIT, IMPLICIT)


def test_what_inflates_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "MAX_INFLATED_BYTES", 100_000)
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(b"\x20\x00\x00\x40LT\xfe\xff" + b" " * 65534)
    bomb += deflate.compress(b"\xe0\x7f\x10\x00OB\0\0" + struct.pack("<I", 1 << 24) + b"\0" * (1 << 24))
    with pytest.raises(TranscodeError, match="inflates to more"):
        run(tmp_path, bomb + deflate.flush(), DEFLATED, EXPLICIT)


def test_native_corpus_files_survive_the_way_there_and_back(corpus: Path, tmp_path: Path) -> None:
    done = 0
    for path in sorted(corpus.rglob("*.dcm"))[::4]:  # a quarter is enough, and quick
        try:
            meta = dcmread(path, specific_tags=["SOPClassUID"], stop_before_pixels=True).file_meta
            syntax, offset = str(meta.TransferSyntaxUID), data_set_offset(path)
        except Exception:  # noqa: BLE001 - the corpus has files that are broken on purpose
            continue
        if syntax not in NATIVE or "fuzz" in str(path) or "truncated" in path.name:
            continue
        plain = between(path, offset, syntax, EXPLICIT, tmp_path)
        for other in (BIG, DEFLATED):
            there = tmp_path / "there"
            there.write_bytes(plain)
            back = between(there, 0, EXPLICIT, other, tmp_path)
            there.write_bytes(back)
            assert between(there, 0, other, EXPLICIT, tmp_path) == normal(plain, tmp_path), (path, other)
        done += 1
    assert done > 40


def between(path: Path, offset: int, from_syntax: str, to_syntax: str, tmp_path: Path) -> bytes:
    """The data set of a file in another syntax."""
    syntax, readable = transcode(path, offset, from_syntax, (to_syntax,))
    assert syntax == to_syntax
    with readable:
        return readable.read()


def normal(content: bytes, tmp_path: Path) -> bytes:
    """Explicit VR Little Endian with every sequence of undefined length, as a rewrite makes it."""
    path = tmp_path / "normal"
    path.write_bytes(content)
    deflated = between(path, 0, EXPLICIT, DEFLATED, tmp_path)
    path.write_bytes(deflated)
    return between(path, 0, DEFLATED, EXPLICIT, tmp_path)
