"""What is inside of messages and files: data sets, identifiers, pixel data (PS3.5, PS3.4)."""

from __future__ import annotations

import csv
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from dicom_node import structure
from dicom_node.dimse.contexts import EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom_node.dimse.request import read_data_set, read_encoded
from dicom_node.errors import InvalidIdentifier, InvalidInstance, TranscodeError
from dicom_node.headers import scan
from dicom_node.model import CommitmentReport, InstanceHeader, ObjectReference
from dicom_node.services.commitment import BadInformation, encode_information, read_action, read_event
from dicom_node.services.identifier import BadIdentifier, InformationModel, identifier_of, read_level, uids_of
from dicom_node.services.scanner import scan_identifier
from dicom_node.transcode.elements import DEFLATED_LE, Changes, rewrite
from dicom_node.transcode.frames import decode_frames

from ._target import Input, Target

__all__ = ["TARGETS"]

RLE = "1.2.840.10008.1.2.5"
SYNTAXES = (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE)
MAX_HELD = 64 * 1024
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
CT = "1.2.840.10008.5.1.4.1.1.2"
_MOST = 8 * 1024 * 1024  # that a lie about sizes may cost here: the real bounds take seconds to reach


def _deflated(raw: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflate.compress(raw) + deflate.flush()


def _element(tag: int, vr: str, value: bytes, syntax: str) -> bytes:
    order = ">" if syntax == EXPLICIT_BE else "<"
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if syntax == IMPLICIT_LE:
        return head + struct.pack(f"{order}I", len(value)) + value
    if vr in ("OB", "OW", "SQ", "UN", "UT"):
        return head + vr.encode() + struct.pack(f"{order}xxI", len(value)) + value
    return head + vr.encode() + struct.pack(f"{order}H", len(value)) + value


def _image(syntax: str, pixels: bytes = b"\1\2\3\4") -> bytes:
    order = ">" if syntax == EXPLICIT_BE else "<"
    item = _element(0x00080100, "SH", b"T-D1", syntax)
    listed = struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(item)) + item
    parts = [
        *((0x00080005, "CS", b"ISO_IR 192"), (0x00080016, "UI", CT.encode() + b"\0"), (0x00080018, "UI", b"1.2.3\0")),
        *((0x00080020, "DA", b"20260102"), (0x00080060, "CS", b"CT"), (0x00082218, "SQ", listed)),
        *((0x00100010, "PN", "Müller^J ".encode()), (0x00100020, "LO", b"P1"), (0x0020000D, "UI", b"1.2.4\0")),
        *((0x0020000E, "UI", b"1.2.5\0"), (0x00280002, "US", struct.pack(f"{order}H", 1))),
        *((0x00280004, "CS", b"MONOCHROME2 "), (0x00280010, "US", struct.pack(f"{order}H", 2))),
        *((0x00280011, "US", struct.pack(f"{order}H", 2)), (0x00280100, "US", struct.pack(f"{order}H", 8))),
        *((0x00280101, "US", struct.pack(f"{order}H", 8)), (0x00280102, "US", struct.pack(f"{order}H", 7))),
        *((0x00280103, "US", struct.pack(f"{order}H", 0)), (0x00091001, "UN", b"priv"), (0x7FE00010, "OW", pixels)),
    ]
    return b"".join(_element(tag, vr, value, syntax) for tag, vr, value in sorted(parts))


def _beginning(raw: bytes) -> int:
    """Where the data set begins: behind what looks like file meta information, whatever its group length says."""
    at = 132 if raw[128:132] == b"DICM" else 0
    while raw[at : at + 2] == b"\2\0" and at + 12 <= len(raw):
        long = raw[at + 4 : at + 6] in (b"OB", b"UN", b"SQ")
        field = raw[at + 8 : at + 12] if long else raw[at + 6 : at + 8]
        at += (12 if long else 8) + int.from_bytes(field, "little")
    return min(at, len(raw))


def _corpus_data_sets(corpus: Path | None) -> Iterator[tuple[str, bytes]]:
    """Transfer syntax and data set of the small files of the corpus, those made to be hostile among them."""
    if corpus is None:
        return
    with (corpus / "MANIFEST.csv").open(newline="", encoding="utf-8") as manifest:
        rows = [row for row in csv.DictReader(manifest) if 0 < int(row["bytes"] or 0) <= 12_000]
    for row in rows:
        raw = (corpus / row["path"]).read_bytes()
        at = raw.find(b"\x02\0\x10\0UI")
        if raw[128:132] != b"DICM" or at < 0:
            continue
        length = int.from_bytes(raw[at + 6 : at + 8], "little")
        yield raw[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace"), raw[_beginning(raw) :]


# --- the header scanner ----------------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """InvalidInstance, or a header: pydicom finds the same UIDs, and the data set stays one when it is rewritten."""
    source = Input(data)
    chosen = source.byte() % 5
    syntax, raw = SYNTAXES[min(chosen, 3)], source.rest()
    encoded = _deflated(raw) if chosen == 3 else raw
    try:
        found = scan(memoryview(encoded), syntax, max_inflated_header_bytes=MAX_HELD)
    except InvalidInstance:
        return
    for uid in (found.sop_class_uid, found.sop_instance_uid, found.study_instance_uid, found.series_instance_uid):
        assert 0 < len(uid) <= 64 and set(uid) <= set("0123456789."), "an identity that is no UID"
    assert all(len(text) <= structure.MAX_VALUE_BYTES * 8 for text in found.attributes.values())
    _compare_with_pydicom(found, raw if chosen == 3 else encoded, syntax if chosen < 4 else "")
    _rewrite(encoded, syntax, found)


def _compare_with_pydicom(found: InstanceHeader, raw: bytes, syntax: str) -> None:
    if syntax not in SYNTAXES:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = read_dataset(io.BytesIO(raw), syntax == IMPLICIT_LE, syntax != EXPLICIT_BE)
            theirs = [str(read[keyword].value).strip("\0 ") for keyword in UIDS]
    except Exception:  # noqa: BLE001 - what pydicom does not read it is no oracle for
        return
    ours = [found.sop_class_uid, found.sop_instance_uid, found.study_instance_uid, found.series_instance_uid]
    assert ours == theirs


def _rewrite(encoded: bytes, syntax: str, found: InstanceHeader) -> None:
    """What was taken in can go out in another syntax, or is refused; what goes out says who it is."""
    target = EXPLICIT_LE if syntax != EXPLICIT_LE else IMPLICIT_LE
    if target == IMPLICIT_LE and b"UN" in encoded:
        return  # what is in a value of VR UN nobody looks at before it has another
    try:
        with rewrite(io.BytesIO(encoded), syntax, target, Changes()) as out:
            written = out.read()
    except TranscodeError:
        return
    again = scan(memoryview(written), target, max_inflated_header_bytes=MAX_HELD)
    ours = (found.sop_class_uid, found.sop_instance_uid, found.study_instance_uid, found.series_instance_uid)
    assert ours == (again.sop_class_uid, again.sop_instance_uid, again.study_instance_uid, again.series_instance_uid)


def _headers(corpus: Path | None) -> Iterator[bytes]:
    for number, syntax in enumerate(SYNTAXES):
        yield bytes([number]) + _image(syntax)
    yield b"\4" + _deflated(_image(EXPLICIT_LE))
    empty = b"\xfe\xff\0\xe0\0\0\0\0"
    pixels = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + empty * 2 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    yield b"\1" + _image(EXPLICIT_LE)[:-16] + pixels
    for syntax, raw in _corpus_data_sets(corpus):
        yield bytes([SYNTAXES.index(syntax) if syntax in SYNTAXES else 1]) + raw


# --- identifiers and storage commitment ------------------------------------------------------------------------------


def identifier(data: bytes) -> None:
    """Where the scanner answers, it says what pydicom says; what is wrong is BadIdentifier, with a status."""
    source = Input(data)
    syntax, raw = SYNTAXES[source.byte() % 3], source.rest()
    if not raw:
        return  # that is no data set; nobody is asked
    scanned = scan_identifier(raw, implicit_vr=syntax == IMPLICIT_LE, little_endian=syntax != EXPLICIT_BE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data_set = read_data_set([raw], syntax, 1 << 20)
            read = identifier_of(data_set)
        except BadIdentifier:
            assert scanned is None, "the scanner reads what pydicom does not"
            return
        assert scanned in (None, read)
        for ask in (lambda: read_level(data_set, InformationModel.STUDY_ROOT), lambda: uids_of(data_set, UIDS[2])):
            try:
                ask()
            except InvalidIdentifier:
                continue


def _identifiers(_: Path | None) -> Iterator[bytes]:
    keys = [
        *((0x00080005, "CS", b"ISO_IR 100"), (0x00080020, "DA", b"20240101-"), (0x00080052, "CS", b"STUDY ")),
        *((0x00080061, "CS", b"CT\\MR "), (0x00100010, "PN", b"Doe^J*"), (0x0020000D, "UI", b"1.2\\1.3 ")),
        *((0x00100020, "LO", b""), (0x00201208, "IS", b"12")),
    ]
    for number, syntax in enumerate(SYNTAXES[:3]):
        yield bytes([number]) + b"".join(_element(tag, vr, value, syntax) for tag, vr, value in sorted(keys))


def commitment(data: bytes) -> None:
    """The information of an N-ACTION or N-EVENT-REPORT: what is asked, or a status; what we write we read back."""
    source = Input(data)
    syntax, raw = SYNTAXES[source.byte() % 3], source.rest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = read_event(read_encoded([raw], syntax, 1 << 20))
            written = encode_information(report, implicit_vr=False, little_endian=True)
            assert read_event(read_encoded([written], EXPLICIT_LE, 1 << 20)) == report
        except (BadIdentifier, BadInformation):
            pass
        try:
            transaction_uid, references = read_action(read_encoded([raw], syntax, 1 << 20))
        except (BadIdentifier, BadInformation) as exc:
            assert exc.dimse_status
        else:
            assert transaction_uid and references and len(set(references)) == len(references)


def _information(_: Path | None) -> Iterator[bytes]:
    one, two = ObjectReference(CT, "1.2.3"), ObjectReference(CT, "1.2.4")
    report = CommitmentReport(transaction_uid="1.9", committed=(one,), failed=((two, 0x0112),))
    for number, syntax in enumerate(SYNTAXES[:3]):
        implicit, little = syntax == IMPLICIT_LE, syntax != EXPLICIT_BE
        yield bytes([number]) + encode_information(report, implicit_vr=implicit, little_endian=little)


# --- rewriting and decoding ------------------------------------------------------------------------------------------


def transcoding(data: bytes) -> None:
    """Any bytes from any syntax to any other: a data set, or TranscodeError."""
    source = Input(data)
    chosen = source.byte()
    start, target, raw = SYNTAXES[chosen % 4], SYNTAXES[chosen // 4 % 4], source.rest()
    if start == DEFLATED_LE and chosen & 0x80:
        raw = _deflated(raw)
    try:
        with rewrite(io.BytesIO(raw), start, target, Changes()) as out:
            out.seek(0, io.SEEK_END)
            assert out.tell() <= 16 * len(raw) * 1032 + 64  # deflate makes at most 1032 of one
    except TranscodeError:
        pass


def _rewritten(corpus: Path | None) -> Iterator[bytes]:
    for number, syntax in enumerate(SYNTAXES):
        raw = _deflated(_image(syntax)) if syntax == DEFLATED_LE else _image(syntax)
        yield bytes([number + 4 * ((number + 1) % 4)]) + raw
    for syntax, raw in _corpus_data_sets(corpus):
        if syntax in SYNTAXES:
            yield bytes([SYNTAXES.index(syntax) + 4]) + raw


def rle(data: bytes) -> None:
    """Frames of RLE Lossless whose description lies: frames as described, or TranscodeError before memory is taken."""
    source = Input(data)
    rows, columns = source.number(2), source.number(2)
    samples, frames, bits = source.byte(), source.byte(), source.byte()
    if rows * columns * max(samples, 1) * max(frames, 1) * max(bits // 8, 1) > _MOST:
        return
    described = Dataset()
    described.Rows, described.Columns, described.SamplesPerPixel = rows, columns, samples
    described.NumberOfFrames, described.BitsAllocated, described.BitsStored = frames, bits, source.byte()
    described.HighBit, described.PixelRepresentation = source.byte(), source.byte()
    photometric = (b"MONOCHROME2 ", b"RGB ", b"YBR_FULL", b"YBR_FULL_422", b"PALETTE COLOR ")[source.byte() % 5]
    described.PhotometricInterpretation = photometric.decode().strip()
    described.PlanarConfiguration = source.byte() % 3
    out = io.BytesIO()
    for element in described:
        value = photometric if element.VR == "CS" else struct.pack("<H", element.value & 0xFFFF)
        value = f"{element.value} ".encode() if element.VR == "IS" else value
        out.write(_element(int(element.tag), element.VR, value, EXPLICIT_LE))
    fragment = source.rest()
    out.write(b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\0\0\0\0\xfe\xff\0\xe0")
    out.write(struct.pack("<I", len(fragment)) + fragment + b"\xfe\xff\xdd\xe0\0\0\0\0")
    out.seek(0)
    try:
        with decode_frames(out, RLE) as changes:
            assert changes.pixel_length <= _MOST * 4
    except TranscodeError:
        pass


def _runs(_: Path | None) -> Iterator[bytes]:
    segment = b"\x03\1\2\3\4"
    fragment = struct.pack("<16I", 1, 64, *[0] * 14) + segment + b"\0"
    yield struct.pack(">HHBBB", 2, 2, 1, 1, 8) + bytes([8, 7, 0, 0, 0]) + fragment
    colour = struct.pack("<16I", 3, 64, 69, 74, *[0] * 12) + segment * 3 + b"\0"
    yield struct.pack(">HHBBB", 2, 2, 3, 1, 8) + bytes([8, 7, 0, 2, 0]) + colour
    yield struct.pack(">HHBBB", 2, 2, 1, 1, 16) + bytes([12, 11, 1, 0, 0]) + colour


TARGETS = (
    Target(name="header", run=header, seeds=_headers, longest=12_000),
    Target(name="identifier", run=identifier, seeds=_identifiers),
    Target(name="commitment", run=commitment, seeds=_information),
    Target(name="transcoding", run=transcoding, seeds=_rewritten, longest=12_000),
    Target(name="rle", run=rle, seeds=_runs),
)
