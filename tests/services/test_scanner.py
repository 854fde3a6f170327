"""The quick reading of identifiers: whatever it says, pydicom says too; and of what clients send it says something."""

import io
import random
import struct
import warnings
from collections.abc import Iterator

import pytest
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filereader import read_dataset

from dicom_node.services.identifier import Identifier, identifier_of
from dicom_node.services.scanner import scan_identifier

SYNTAXES = [(True, True), (False, True), (False, False)]
LONG = {"OB", "OW", "OF", "OD", "OL", "OV", "UN", "SQ", "UC", "UR", "UT", "SV", "UV"}
KEYWORDS = (
    *("SpecificCharacterSet", "StudyDate", "StudyTime", "AccessionNumber", "QueryRetrieveLevel", "RetrieveAETitle"),
    *("ModalitiesInStudy", "InstitutionAddress", "StudyDescription", "ReferencedStudySequence", "PatientName"),
    *("PatientID", "PatientBirthDate", "PatientAge", "PatientComments", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SeriesNumber", "NumberOfStudyRelatedInstances", "SmallestPixelValueInSeries", "Rows", "SliceThickness"),
    *("AcquisitionDateTime", "RetrieveURL", "LongCodeValue", "FrameIncrementPointer", "PixelData"),
)
VALUES = (
    *(b"", b" ", b"  ", b"\0", b"*", b"?", b"1.2.840.10008", b"1.2.3\0", b"1.2.3\\1.2.4\0", b"1.2.3 ", b" 1.2.3\\"),
    *(b"STUDY ", b"IMAGE", b"20240101", b"20240101-20241231 ", b"-20241231 ", b"2024.01.01", b"1000-1200 ", b"10:00"),
    *(b"Doe^Jane", b"Doe^J* ", b"DOE^^^^ ", b"Doe^Jane=Doe^J", b"=x", b"a=", b" a ^ b ", b"^^", b"M\xfcller^J\xf6rg"),
    *(b"\xce\x94^A", b"Yamada\x1b$B;3ED\x1b(B", b"A\\B", b"A\\ B \\", b"\\", b"\\\\", b"\\A", b"a\tb "),
    *(b"a\r\nb", b"a\0b", b"x" * 70, b"\1\2\3\4"),
    *(b"\t", b"  lead", b"12", b"-5", b"+7", b"007 ", b"1.50", b"1e3 ", b"abc ", b"5\\6 ", b"\1\2"),
    *(b"ISO_IR 100", b"ISO_IR 192", b"ISO_IR 6", b"\\ISO 2022 IR 87 ", b"ISO_IR 13 ", b"GB18030 ", b"LATIN1"),
    *(b"ISO IR 100", b"ISO_IR 100\\ISO_IR 101"),
    *(b"http://x/?a=b\\c ", b"060Y", b"x~y ", b"\x7f\x7f", b"FF\xc3\xbc", b"A\xa0"),
)


def element(tag: int, vr: str, value: bytes, implicit: bool, little: bool) -> bytes:
    order = "<" if little else ">"
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack(order + "I", len(value)) + value
    if vr in LONG:
        return head + vr.encode() + struct.pack(order + "xxI", len(value)) + value
    return head + vr.encode() + struct.pack(order + "H", len(value)) + value


def compared(encoded: bytes, implicit: bool, little: bool) -> bool:
    """Whether it was scanned; what came out is then what pydicom makes of it."""
    scanned = scan_identifier(encoded, implicit_vr=implicit, little_endian=little)
    if scanned is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = identifier_of(read_dataset(io.BytesIO(encoded), implicit, little))
    assert scanned == read, encoded
    return True


def odd_identifiers(seed: int, count: int) -> Iterator[tuple[bytes, bool, bool]]:
    """Elements of any kind with values that seldom fit them; one in four cut, swapped or changed."""
    chance = random.Random(seed)
    for _ in range(count):
        implicit, little = chance.choice(SYNTAXES)
        tags = {int(tag_for_keyword(keyword) or 0) for keyword in chance.sample(KEYWORDS, chance.randint(1, 6))}
        if chance.random() < 0.2:
            tags.add(chance.choice((0x00080000, 0x00090010, 0x00091001, 0x00200000, 0x60003000, 0x7FE10010)))
        parts = []
        for tag in sorted(tags):
            try:
                vr = dictionary_VR(tag)[:2]
            except KeyError:
                vr = "UN"
            if chance.random() < 0.1:
                vr = chance.choice(("UN", "LO", "SQ", "CS", "zz"))
            value = chance.choice(VALUES) if chance.random() < 0.7 else b""
            parts.append(element(tag, vr, value, implicit, little))
        if chance.random() < 0.1:
            chance.shuffle(parts)
        encoded = b"".join(parts)
        if chance.random() < 0.25 and encoded:
            at = chance.randrange(len(encoded))
            changed = encoded[:at] + bytes([chance.randrange(256)]) + encoded[at + 1 :]
            encoded = chance.choice((encoded[:at], changed, encoded + encoded[:at]))
        yield encoded, implicit, little


def test_what_it_reads_is_what_pydicom_reads() -> None:
    scanned = 0
    for encoded, implicit, little in odd_identifiers(1, 4000):
        scanned += compared(encoded, implicit, little)
    assert scanned > 400


@pytest.mark.parametrize(("implicit", "little"), SYNTAXES)
def test_every_value_alone_under_every_attribute_is_read_as_pydicom_does(implicit: bool, little: bool) -> None:
    for keyword in KEYWORDS:
        tag = int(tag_for_keyword(keyword) or 0)
        for value in VALUES:
            compared(element(tag, dictionary_VR(tag)[:2], value, implicit, little), implicit, little)


@pytest.mark.parametrize("character_set", sorted(python_encoding))
def test_ascii_is_read_as_pydicom_does_in_every_character_set(character_set: str) -> None:
    printable = bytes(range(0x20, 0x7F))
    for keyword in ("StudyDescription", "PatientName", "PatientID"):
        tag = int(tag_for_keyword(keyword) or 0)
        named = element(0x00080005, "CS", character_set.encode(), True, True)
        compared(named + element(tag, "LO", printable, True, True), True, True)


@pytest.mark.parametrize(("implicit", "little"), SYNTAXES)
def test_what_clients_ask_is_scanned(implicit: bool, little: bool) -> None:
    asked = {
        "SpecificCharacterSet": b"ISO_IR 100",
        "StudyDate": b"20240101-20240131 ",
        "StudyTime": b"",
        "AccessionNumber": b"",
        "QueryRetrieveLevel": b"STUDY ",
        "ModalitiesInStudy": b"CT\\MR ",
        "ReferencedStudySequence": b"",
        "PatientName": b"Doe^J* ",
        "PatientID": b"4711",
        "StudyInstanceUID": b"1.2.3\\1.2.4\0",
        "NumberOfStudyRelatedInstances": b"",
    }
    parts = []
    for keyword, value in asked.items():
        tag = int(tag_for_keyword(keyword) or 0)
        parts.append(element(tag, dictionary_VR(tag), value, implicit, little))
    encoded = b"".join(parts)
    assert compared(encoded, implicit, little)
    found = scan_identifier(encoded, implicit_vr=implicit, little_endian=little)
    assert isinstance(found, Identifier)
    assert (found.level, found.character_set) == ("STUDY", "ISO_IR 100")
    texts = {keyword: text for _, keyword, _, text in found.elements}
    assert texts["StudyInstanceUID"] == "1.2.3\\1.2.4"
    assert texts["PatientName"] == "Doe^J*"


def test_bytes_that_are_no_identifier_are_left_to_pydicom_whatever_they_are() -> None:
    chance = random.Random(2)
    for _ in range(500):
        noise = chance.randbytes(chance.randrange(200))
        for implicit, little in SYNTAXES:
            found = scan_identifier(noise, implicit_vr=implicit, little_endian=little)
            assert found is None or not noise
