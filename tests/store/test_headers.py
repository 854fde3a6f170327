"""`headers.scan`: the attributes of the index, and whether a data set is one at all."""

import io
import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble

from dicom_node.errors import InvalidInstance
from dicom_node.headers import INDEXED, is_image, normalise_uid, scan, value_representation
from dicom_node.model import InstanceHeader

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED, JPEG_LS = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.80"
KEYWORDS = [keyword for keywords in INDEXED.values() for keyword in keywords]
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")

DataSet = Callable[..., bytes]


def look(body: bytes, syntax: str = EXPLICIT, *, held: int = 1 << 20) -> InstanceHeader:
    return scan(memoryview(body), syntax, max_inflated_header_bytes=held)


def explicit(tag: int, vr: bytes, value: bytes, *, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, size) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, size) + value


def item(body: bytes, *, undefined: bool = False) -> bytes:
    if undefined:
        return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + body + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body


SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
UNDEFINED = 0xFFFFFFFF


# --- the corpus, with pydicom as the oracle ------------------------------------------------------------------------


def files(corpus: Path) -> Iterator[tuple[Path, str, bytes, pydicom.Dataset]]:
    """Every file pydicom reads that names a transfer syntax: path, syntax, data set bytes, data set."""
    for path in sorted(corpus.rglob("*")):
        if not path.is_file() or path.suffix in (".csv", ".md", ".txt", ".py", ".raw", ".pcap"):
            continue
        try:
            ds = pydicom.dcmread(path)
            syntax = ds.file_meta.TransferSyntaxUID
        except (InvalidDicomError, AttributeError, OSError):
            continue  # no Part-10 file, or one without a transfer syntax
        with open(path, "rb") as file:
            read_preamble(file, False)
            _read_file_meta_info(file)
            yield path, str(syntax), file.read(), ds


def oracle(ds: pydicom.Dataset, keyword: str) -> str:
    """What pydicom makes of an attribute, in the index's form."""
    if keyword not in ds:
        return ""
    element = ds[keyword]
    if element.value is None or element.VR == "OB":
        return ""
    values = element.value if isinstance(element.value, list | pydicom.multival.MultiValue) else [element.value]
    texts = []
    for value in values:
        original = None if element.VR == "PN" else getattr(value, "original_string", None)
        texts.append(str(value if original is None else original).strip("\0 "))
    return "\\".join(texts)


# pydicom reads these; dcmtk does not, or the node must not (nesting, UIDs that are none)
REFUSED = {
    "TC0265_depth_100.dcm": "nested deeper",
    "TC0357_stray_item_tag.dcm": "delimiter",
    "TC0361_stray_seq_delim.dcm": "delimiter",
    "TC0405_latin1_utf8_payload.dcm": "no value representation",
    "TC0445_duplicate_tags.dcm": "cut short",
    "TC0457_uid_uid_65chars_over.dcm": "a UID is not",
    "TC0461_uid_uid_leading_dot.dcm": "a UID is not",
    "TC0465_uid_uid_all_dots.dcm": "a UID is not",
    "MR_truncated.dcm": "cut short",
    "rtplan_truncated.dcm": "cut short",
    "test_files/SC_rgb_jpeg.dcm": "another transfer syntax",  # implicit under an explicit syntax
}


def refusal(path: Path) -> str | None:
    return REFUSED.get(path.name) or REFUSED.get(f"{path.parent.name}/{path.name}")


@pytest.mark.filterwarnings("ignore")
def test_every_corpus_file_reads_as_pydicom_reads_it_or_is_refused_for_a_known_reason(corpus: Path) -> None:
    differences, seen = [], 0
    for path, syntax, body, ds in files(corpus):
        if any(not ds.get(keyword) for keyword in IDENTITY):
            with pytest.raises(InvalidInstance):
                look(body, syntax)
            continue
        if (reason := refusal(path)) is not None:
            with pytest.raises(InvalidInstance, match=reason):
                look(body, syntax)
            continue
        header = look(body, syntax)
        seen += 1
        assert (header.sop_class_uid, header.sop_instance_uid) == (ds.SOPClassUID, ds.SOPInstanceUID)
        assert (header.study_instance_uid, header.series_instance_uid) == (ds.StudyInstanceUID, ds.SeriesInstanceUID)
        for keyword in KEYWORDS:
            expected, got = oracle(ds, keyword), header.attributes.get(keyword, "")
            if path.name == "TC0241_patientname_PN_as_OB.dcm" and keyword == "PatientName":
                continue  # binary as a name: pydicom gives bytes
            if expected != (got.rstrip("=") if value_representation(keyword) == "PN" else got):
                differences.append((path.name, keyword))
        has_pixels = any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
        assert (header.pixel_data_offset is not None) == has_pixels, path.name
        if has_pixels and syntax not in (DEFLATED, BIG):
            assert body[header.pixel_data_offset :][:2] == b"\xe0\x7f"
    assert differences == []
    assert seen > 440


@pytest.mark.filterwarnings("ignore")
def test_a_corpus_file_cut_anywhere_is_refused_or_ends_at_an_element(corpus: Path) -> None:
    """Cut objects that are accepted are complete data sets: they end exactly where a top-level element does."""
    random.seed(20260101)
    accepted = 0
    chosen = [one for one in files(corpus) if len(one[2]) < 400_000 and all(one[3].get(key) for key in IDENTITY)]
    for path, syntax, body, _ in random.sample(chosen, 120):
        if refusal(path) or syntax == DEFLATED:
            continue
        ends = element_ends(body, syntax)
        for cut in random.sample(range(len(body)), min(12, len(body))):
            try:
                look(body[:cut], syntax)
            except InvalidInstance:
                continue
            accepted += 1
            assert cut in ends, f"{path.name} cut at {cut}"
    assert accepted < 60


def element_ends(body: bytes, syntax: str) -> set[int]:
    """Where the top-level elements end, by pydicom."""
    implicit, little = syntax == IMPLICIT, syntax != BIG
    file = io.BytesIO(body)
    ends = set()
    for _ in pydicom.filereader.data_element_generator(file, implicit, little):
        ends.add(file.tell())
    return ends


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("syntax", "form"),
    [(EXPLICIT, {}), (IMPLICIT, {"implicit": True}), (BIG, {"little": False}), (DEFLATED, {})],
)
def test_every_native_form_gives_the_same_header(data_set: DataSet, syntax: str, form: dict[str, Any]) -> None:
    body = data_set(SOPInstanceUID="1.2.3", PatientName="Doe^Jane", Rows=512, NumberOfFrames=3, **form)
    if syntax == DEFLATED:
        body = deflate(body)
    header = look(body, syntax)
    assert header.sop_instance_uid == "1.2.3"
    assert header.transfer_syntax_uid == syntax
    assert header.attributes["PatientName"] == "Doe^Jane"
    assert header.attributes["Rows"] == "512"
    assert header.attributes["NumberOfFrames"] == "3"
    assert "StudyDescription" not in header.attributes
    assert is_image(header)


def deflate(body: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize("wrong", [IMPLICIT, BIG, DEFLATED])
def test_bytes_of_another_transfer_syntax_are_refused(data_set: DataSet, wrong: str) -> None:
    with pytest.raises(InvalidInstance):
        look(data_set(), wrong)


@pytest.mark.parametrize("right", [EXPLICIT, JPEG_LS, BIG])
def test_implicit_bytes_under_another_transfer_syntax_are_refused(data_set: DataSet, right: str) -> None:
    with pytest.raises(InvalidInstance):
        look(data_set(implicit=True), right)


def test_a_part_10_file_is_no_data_set(data_set: DataSet) -> None:
    for syntax in (EXPLICIT, IMPLICIT):
        with pytest.raises(InvalidInstance):
            look(bytes(128) + b"DICM" + data_set(implicit=syntax == IMPLICIT), syntax)


@pytest.mark.parametrize("keyword", IDENTITY)
def test_a_missing_or_empty_uid_is_refused(data_set: DataSet, keyword: str) -> None:
    for value in (None, ""):
        with pytest.raises(InvalidInstance, match=keyword):
            look(data_set(**{keyword: value}))


def test_a_uid_that_appears_twice_is_refused(data_set: DataSet) -> None:
    with pytest.raises(InvalidInstance, match="twice"):
        look(data_set() + explicit(0x00080018, b"UI", b"9.9\0"))


def test_noise_is_refused() -> None:
    noise = random.Random(7)
    for size in (0, 1, 7, 8, 100, 5000):
        with pytest.raises(InvalidInstance):
            look(noise.randbytes(size))


@pytest.mark.parametrize("undefined", [False, True])
def test_nesting_has_a_bound_and_needs_no_stack(data_set: DataSet, undefined: bool) -> None:
    def nested(depth: int) -> bytes:
        body = b""
        for _ in range(depth):
            inside = item(body, undefined=undefined)
            body = (
                explicit(0x00081115, b"SQ", inside + SEQUENCE_END, length=UNDEFINED)
                if undefined
                else explicit(0x00081115, b"SQ", inside)
            )
        return body

    look(data_set(PixelData=None) + nested(60))
    for depth in (70, 5000):
        with pytest.raises(InvalidInstance, match="nested"):
            look(data_set(PixelData=None) + nested(depth))


@pytest.mark.parametrize(
    "tail",
    [
        explicit(0x7FE10010, b"OB", b"abcd", length=UNDEFINED - 15),
        explicit(0x00081115, b"SQ", item(b""), length=UNDEFINED),  # no delimiter
        explicit(0x00081115, b"SQ", b"\0" * 8),  # no item
        explicit(0x00081115, b"SQ", item(explicit(0x00100010, b"PN", b"ab", length=900))),  # past its item
        explicit(0x00081115, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, 900)),  # item past its sequence
        explicit(0x7FE00010, b"OB", item(b"frame"), length=UNDEFINED),  # encapsulated, no delimiter
        explicit(0x7FE00010, b"OB", item(b"", undefined=True) + SEQUENCE_END, length=UNDEFINED),
        b"\x10\x00\x10",  # a piece of a tag
        b"\0" * 16,
    ],
)
def test_a_broken_tail_is_refused(data_set: DataSet, tail: bytes) -> None:
    with pytest.raises(InvalidInstance):
        look(data_set(PixelData=None) + tail)


@pytest.mark.parametrize(
    "tail",
    [
        explicit(0x7FE10010, b"LO", b"odd"),
        explicit(0x00091001, b"ZZ", b"unknown", length=7),
        struct.pack("<HH2sHI", 9, 0x1001, b"ZZ", 0, 3) + b"abc",  # a VR to come: reserved bytes, 32-bit length
        explicit(0x00091002, b"UN", item(struct.pack("<HHI", 9, 1, 2) + b"ab") + SEQUENCE_END, length=UNDEFINED),
        explicit(0x00091002, b"UN", item(explicit(0x00090001, b"LO", b"ab")) + SEQUENCE_END, length=UNDEFINED),
        explicit(0x00081115, b"SQ", item(struct.pack("<HHI", 9, 1, 2) + b"ab")),  # implicit inside explicit
        explicit(0x00081115, b"SQ", item(b"", undefined=True) + SEQUENCE_END),  # delimiter within a defined length
        explicit(0x00081115, b"SQ", item(item(b"")[:0], undefined=True) + SEQUENCE_END, length=UNDEFINED),
        explicit(0x7FE00010, b"OB", item(b"") + item(b"odd") + SEQUENCE_END, length=UNDEFINED),
        explicit(0x00041500, b"CS", b"C "),  # left over from a directory
        explicit(0x00080000, b"UL", b"\0\0\0\0"),  # out of order, retired
    ],
)
def test_what_real_systems_send_is_tolerated(data_set: DataSet, tail: bytes) -> None:
    assert look(data_set(PixelData=None) + tail).attributes["PatientID"] == "P1"


def test_a_value_too_long_for_an_index_is_left_to_the_file(data_set: DataSet) -> None:
    header = look(data_set(PixelData=None) + explicit(0x00104000, b"UT", b"x" * 40_000))
    assert "PatientComments" not in header.attributes


def test_a_segmentation_is_no_image_and_a_report_neither(data_set: DataSet) -> None:
    assert is_image(look(data_set()))
    assert not is_image(look(data_set(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")))
    assert not is_image(look(data_set(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.7")))
    assert not is_image(look(data_set(PixelData=None)))


# --- deflated ------------------------------------------------------------------------------------------------------


def test_a_deflated_data_set_larger_than_what_is_held_is_still_checked_to_its_end(data_set: DataSet) -> None:
    body = data_set(PixelData=random.Random(1).randbytes(3_000_000))
    packed = deflate(body)
    assert look(packed, DEFLATED, held=4096).attributes["PatientID"] == "P1"
    assert look(packed + b"\0", DEFLATED, held=4096).pixel_data_offset is not None
    for cut in (len(packed) // 2, len(packed) - 1):
        with pytest.raises(InvalidInstance, match="cut short"):
            look(packed[:cut], DEFLATED, held=4096)
    with pytest.raises(InvalidInstance, match="past its end"):
        look(deflate(body[:-10]), DEFLATED, held=4096)
    with pytest.raises(InvalidInstance, match="follows"):
        look(packed + b"more than padding", DEFLATED)


def test_a_bomb_takes_no_memory(data_set: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.structure.MAX_INFLATED_BYTES", 64 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = data_set(PixelData=None) + explicit(0x7FE00010, b"OW", b"", length=128 << 20)
    bomb = packer.compress(head) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(128)) + packer.flush()
    assert len(bomb) < 200_000
    tracemalloc.start()
    with pytest.raises(InvalidInstance, match="unpacks to more"):
        look(bomb, DEFLATED, held=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("character_set", "raw", "text"),
    [
        ("ISO_IR 100", "Müller^Zoë".encode("latin-1"), "Müller^Zoë"),
        ("ISO_IR 192", "Ōsaka^名".encode(), "Ōsaka^名"),
        ("ISO_IR 144", "Люкceмбypг".encode("iso8859_5"), "Люкceмбypг"),
        ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis"), "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        ("GB18030", "王^小䶞".encode("gb18030"), "王^小䶞"),
        ("GBK", "丂乗^X".encode("gbk"), "丂乗^X"),  # second bytes are backslashes
        (
            "\\ISO 2022 IR 87",
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
            "Yamada^Tarou=山田^太郎=やまだ^たろう",
        ),
        (
            "\\ISO 2022 IR 149",
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
            "Hong^Gildong=洪^吉洞=홍^길동",
        ),
        ("ISO-IR 100", "Grün".encode("latin-1"), "Grün"),  # almost right
        ("utf-8", "Grün".encode(), "Grün"),
        ("NO SUCH SET", b"plain", "plain"),
    ],
)
def test_text_is_decoded_by_its_character_set(data_set: DataSet, character_set: str, raw: bytes, text: str) -> None:
    head = explicit(0x00080005, b"CS", character_set.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = look(head + data_set(PatientName=None, PixelData=None) + explicit(0x00100010, b"PN", raw))
    assert header.attributes["PatientName"] == text
    assert header.specific_character_set == character_set.strip()


def test_text_that_cannot_be_decoded_is_kept_with_replacements(data_set: DataSet) -> None:
    head = explicit(0x00080005, b"CS", b"ISO_IR 192")
    header = look(head + data_set(PatientName=None, PixelData=None) + explicit(0x00100010, b"PN", b"a\xff\xfeb"))
    assert header.attributes["PatientName"] == "a\ufffd\ufffdb"


# --- UIDs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "uid", "irregular"),
    [
        ("1.2.3", "1.2.3", False),
        ("1.2.3\0", "1.2.3", False),  # the padding of PS3.5 9.1
        ("1.2.3 ", "1.2.3", True),
        (" 1.2.3\0\0", "1.2.3", True),
        ("1.02.3", "1.02.3", True),
        ("1.0.3", "1.0.3", False),
        ("9" * 64, "9" * 64, False),
    ],
)
def test_a_uid_is_normalised_and_its_oddities_told(text: str, uid: str, irregular: bool) -> None:
    assert normalise_uid(text) == (uid, irregular)


@pytest.mark.parametrize(
    "text", ["", "\0", "1..2", ".1", "1.", "1.2.x", "../../etc", "1.2\n", "9" * 65, "1.2\\3.4", "1.2.3\u0663"]
)
def test_what_is_no_uid_is_refused(text: str) -> None:
    with pytest.raises(InvalidInstance):
        normalise_uid(text)


def test_irregular_uids_of_an_object_are_told_and_kept(data_set: DataSet) -> None:
    body = data_set(StudyInstanceUID=None, PixelData=None) + explicit(0x0020000D, b"UI", b"1.2.007 ")
    header = look(body)
    assert header.irregular_uids
    assert header.study_instance_uid == "1.2.007"


# --- noise in otherwise good data sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, DEFLATED, JPEG_LS])
def test_flipped_bytes_give_a_header_or_a_refusal_and_nothing_else(data_set: DataSet, syntax: str) -> None:
    noise = random.Random(20260102)
    body = data_set(implicit=syntax == IMPLICIT, little=syntax != BIG, PatientName="Dö^J", OperatorsName=["A^B", "C"])
    body += explicit(0x00081115, b"SQ", item(explicit(0x00081150, b"UI", b"1.2\0"), undefined=True) + SEQUENCE_END)
    if syntax in (EXPLICIT, JPEG_LS):
        body += explicit(0x7FE10010, b"UN", item(b"", undefined=True) + SEQUENCE_END, length=UNDEFINED)
        body += explicit(0x7FE20010, b"OB", item(b"") + item(b"frame") + SEQUENCE_END, length=UNDEFINED)
    if syntax == DEFLATED:
        body = deflate(body)
    refused = 0
    for _ in range(1500):
        broken = bytearray(body)
        for _ in range(noise.randint(1, 3)):
            broken[noise.randrange(len(broken))] = noise.randrange(256)
        try:
            look(bytes(broken), syntax)
        except InvalidInstance:
            refused += 1
    assert refused > 100
