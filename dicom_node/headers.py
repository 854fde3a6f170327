"""What the index needs of a data set, and whether the data set is one at all, without decoding it.

`scan` reads the attributes the index keeps and walks the structure to the last byte (PS3.5 chapter 7): every length
must end inside what encloses it, every sequence and encapsulated value at its delimiter. The walk is iterative, never
recursive, and holds nothing but positions. Text comes out decoded (PS3.5 6.1, Specific Character Set).

Tolerated, because real systems send it: odd lengths, elements out of order, unknown VRs, VR UN for anything, implicit
elements inside the sequences of an explicit data set, delimiters after a defined length, padded UIDs and UIDs with
leading zeros. Refused: anything cut short, another transfer syntax than the one promised, groups that belong to
commands and file headers.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from pydicom._dicom_dict import DicomDictionary
from pydicom.charset import CODES_TO_ENCODINGS, handled_encodings, python_encoding
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

from dicom_node.errors import InvalidInstance
from dicom_node.model import InstanceHeader, Level
from dicom_node.shapes import Shapes, shape_of

__all__ = ["DEFLATED_SYNTAXES", "INDEXED", "is_image", "multi_valued", "normalise_uid", "scan", "value_representation"]

# The attributes the index keeps beside the four identifying UIDs, each at one level. From PS3.4 tables C.6-1 to C.6-4
# what is neither a sequence nor computed, and from PS3.3 what workstations and rules ask for.
INDEXED: Mapping[Level, tuple[str, ...]] = {
    Level.PATIENT: (
        *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientBirthTime", "PatientSex"),
        *("TypeOfPatientID", "OtherPatientIDs", "OtherPatientNames", "EthnicGroup", "PatientComments"),
        *("QualityControlSubject", "PatientSpeciesDescription", "PatientBreedDescription", "ResponsiblePerson"),
        *("ResponsibleOrganization", "PatientIdentityRemoved", "PatientMotherBirthName"),
        *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialSubjectID", "ClinicalTrialSiteID"),
    ),
    Level.STUDY: (
        *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName"),
        *("PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "ConsultingPhysicianName", "RequestingPhysician"),
        *("RequestingService", "AdmissionID", "AdmittingDiagnosesDescription", "ReasonForStudy", "PatientAge"),
        *("PatientSize", "PatientWeight", "Occupation", "AdditionalPatientHistory", "MedicalAlerts", "Allergies"),
        *("PregnancyStatus", "PatientState", "ServiceEpisodeID", "ServiceEpisodeDescription", "OtherStudyNumbers"),
        *("ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription"),
    ),
    Level.SERIES: (
        *("Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "SeriesDescription", "BodyPartExamined"),
        *("Laterality", "ProtocolName", "PatientPosition", "PresentationIntentType", "TimezoneOffsetFromUTC"),
        *("PerformingPhysicianName", "OperatorsName", "Manufacturer", "ManufacturerModelName", "StationName"),
        *("DeviceSerialNumber", "SoftwareVersions", "InstitutionName", "InstitutionAddress", "DeviceUID"),
        *("InstitutionalDepartmentName", "PerformedProcedureStepID", "PerformedProcedureStepStartDate"),
        *("PerformedProcedureStepStartTime", "PerformedProcedureStepEndDate", "PerformedProcedureStepEndTime"),
        *("PerformedProcedureStepDescription", "FrameOfReferenceUID", "SynchronizationFrameOfReferenceUID"),
        *("PositionReferenceIndicator", "ContrastBolusAgent", "ScanningSequence", "SequenceVariant"),
        *("SliceThickness", "SpacingBetweenSlices", "KVP", "MagneticFieldStrength", "ConvolutionKernel"),
        *("SmallestPixelValueInSeries", "LargestPixelValueInSeries", "ClinicalTrialSeriesID"),
    ),
    Level.IMAGE: (
        *("InstanceNumber", "AcquisitionNumber", "ContentDate", "ContentTime", "AcquisitionDate", "AcquisitionTime"),
        *("AcquisitionDateTime", "InstanceCreationDate", "InstanceCreationTime", "ImageType", "ImageComments"),
        *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation"),
        *("PhotometricInterpretation", "LossyImageCompression", "LossyImageCompressionRatio", "BurnedInAnnotation"),
        *("ViewPosition", "ImageLaterality", "PatientOrientation", "SliceLocation", "TemporalPositionIdentifier"),
        *("EchoTime", "RepetitionTime", "SegmentationType", "CompletionFlag", "VerificationFlag", "PreliminaryFlag"),
        *("ContentLabel", "ContentDescription", "ContentCreatorName", "PresentationCreationDate"),
        *("PresentationCreationTime", "DocumentTitle", "MIMETypeOfEncapsulatedDocument", "QualityControlImage"),
        *("RTPlanLabel", "RTPlanName", "RTPlanDate", "RTPlanTime", "StructureSetLabel", "StructureSetName"),
        *("StructureSetDate", "StructureSetTime", "DoseSummationType", "ApprovalStatus", "SOPInstanceStatus"),
    ),
}

MAX_DEPTH = 64  # sequences inside sequences
MAX_ELEMENTS = 10_000_000  # bounds the time one object may take; a 100 000-frame slide has three million
MAX_VALUE_BYTES = 32 * 1024  # a longer value is left to the file
HEAD_BYTES = 8 * 1024  # most headers are shorter
SHORT_VALUE = 64  # bytes of a value whose text is remembered: most are the same in every slice of a series
MAX_INFLATED_BYTES = 4 * 1024**3  # a deflated data set that unpacks to more is a bomb

_UNDEFINED = 0xFFFFFFFF
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_IDENTITY = {
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
}
_CHARACTER_SET = 0x00080005
# PS3.5 tables 7.1-1 and 7.1-2: which VRs have a 32-bit length
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)
_ENCAPSULATED_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW"})
_NUMBERS = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}
# PS3.5 6.1.2.2: what (0008,0005) applies to
_LOCAL_TEXT_VRS = frozenset({b"SH", b"LO", b"ST", b"LT", b"UC", b"UT", b"PN"})
_ONE_VALUE_VRS = frozenset({b"ST", b"LT", b"UT", b"UR"})

IMPLICIT_SYNTAXES = frozenset({"1.2.840.10008.1.2", "1.2.840.113619.5.2"})  # the second: GE, big endian pixels only
BIG_ENDIAN_SYNTAX = "1.2.840.10008.1.2.2"
# PS3.5 A.5, A.7, A.11: the whole data set is deflated
DEFLATED_SYNTAXES = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

# Objects with pixels that are no images: what someone or something said about images
_DERIVED_WITH_PIXELS = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})


def scan(view: memoryview, transfer_syntax_uid: str, *, max_inflated_header_bytes: int) -> InstanceHeader:
    """Read the header of the data set in `view` and check the data set's structure to its end.

    `attributes` holds the non-empty ones of `INDEXED` from the top level. Of a deflated data set at most
    `max_inflated_header_bytes` are held in memory; beyond them the structure is not looked at, only that the stream is
    whole, and `pixel_data_offset` counts in the inflated bytes. Raises InvalidInstance; its text holds no value.
    """
    implicit = transfer_syntax_uid in IMPLICIT_SYNTAXES
    little = transfer_syntax_uid != BIG_ENDIAN_SYNTAX
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        walk = _walk_deflated(view, max_inflated_header_bytes)
    else:
        walk = _Walk(view, implicit=implicit, little=little)
        walk.run()
    return _header(walk, transfer_syntax_uid)


def is_image(header: InstanceHeader) -> bool:
    """Whether this is an image that completion waits for: pixel data, and not a segmentation of some image.

    Structured reports, key object selections, presentation states and documents have no pixel data (DESIGN section 5).
    """
    return header.pixel_data_offset is not None and header.sop_class_uid not in _DERIVED_WITH_PIXELS


@lru_cache(maxsize=1024)
def value_representation(keyword: str) -> str:
    """The VR of a standard attribute; of two, the first (`US or SS`)."""
    return dictionary_VR(keyword)[:2]


@lru_cache(maxsize=1024)
def multi_valued(keyword: str) -> bool:
    """Whether the attribute may have several values, joined by a backslash."""
    return dictionary_VM(keyword) != "1" and value_representation(keyword).encode() not in _ONE_VALUE_VRS


# --- UIDs ----------------------------------------------------------------------------------------------------------

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_LEADING_ZERO = re.compile(r"(?:^|\.)0[0-9]")


def normalise_uid(text: str) -> tuple[str, bool]:
    """A UID without its padding, and whether it was irregular (spaces, more than one NUL, leading zeros).

    PS3.5 9.1: 1-64 digits and dots, no empty component. Leading zeros stay: two UIDs are equal when their characters
    are. Raises InvalidInstance for anything else.
    """
    return _normalised(text) if len(text) <= SHORT_VALUE + 2 else _normalised.__wrapped__(text)


@lru_cache(maxsize=1024)
def _normalised(text: str) -> tuple[str, bool]:
    uid = text.strip("\0 ")
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise InvalidInstance("a UID is not 1-64 digits and dots without an empty component")
    return uid, (text not in (uid, uid + "\0")) or _LEADING_ZERO.search(uid) is not None


# --- structure -----------------------------------------------------------------------------------------------------


class _BeyondPrefix(Exception):
    """Not an error: the walk goes on at `position`, past the inflated prefix."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass(slots=True)
class _Frame:
    """Something that encloses: a data set (top level or item) or the items of a sequence."""

    of_items: bool
    end: int  # nothing inside may reach past this
    undefined: bool  # ends at a delimiter, not at `end`
    implicit: bool
    lenient: bool  # VRs may be missing


@dataclass(slots=True)
class _Walk:
    """One pass over a data set; `found` has VR and bytes of wanted top-level values."""

    data: memoryview
    implicit: bool
    little: bool
    partial: bool = False  # `data` is a prefix; the end is not known
    found: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    pixel_data_offset: int | None = None
    head: bytes = b""  # a copy of the beginning
    _top: list[int] | None = None  # where elements begin, while their shape is learned
    _nested: list[int] = field(default_factory=list)
    _count: int = 0  # of elements and items

    def run(self) -> None:
        """Walk to the end. Raises InvalidInstance, and _BeyondPrefix when `partial`."""
        self.head = bytes(self.data[:HEAD_BYTES])
        position = 0 if self.implicit or self.partial else self._known_beginning()
        end = 2**62 if self.partial else len(self.data)
        stack = [_Frame(of_items=False, end=end, undefined=False, implicit=self.implicit, lenient=False)]
        while stack:
            frame = stack[-1]
            if position == frame.end and not frame.undefined:
                stack.pop()
                continue
            if position > len(self.data):  # lengths were checked: this is a prefix
                raise _BeyondPrefix(position)
            if frame.of_items:
                position = self._item(stack, position)
            else:
                if not frame.implicit:
                    position = self._plain_elements(frame, position, top=len(stack) == 1)
                    if position == frame.end and not frame.undefined:
                        continue
                position = self._element(stack, position)
            self._count += 1
            if self._count > MAX_ELEMENTS:
                raise InvalidInstance(f"the data set has more than {MAX_ELEMENTS} elements")
            if len(stack) > 2 * MAX_DEPTH:
                raise InvalidInstance(f"sequences are nested deeper than {MAX_DEPTH}")
        if self._top is not None:
            self._learn(position)

    def _known_beginning(self) -> int:
        """Step over a beginning that was walked before in another data set; where that ends."""
        shape, learn = _shapes.find(len(self.data), self.little, self.head)
        if shape is None:
            self._top = [] if learn else None
            return 0
        values = zip(shape.vrs, shape.values(self.head), strict=True)
        self.found = dict(zip(shape.tags, values, strict=True))
        self._count = shape.count
        return shape.end

    def _learn(self, end: int) -> None:
        """Remember how what was walked lies. All that a walk depends on must have been noted; else nothing is."""
        top, self._top = self._top, None
        if top is None:
            return
        if not top or top[-1] != end:
            top.append(end)
        shape = shape_of(self.head, top, self._nested, little=self.little, kept=_interesting(), short=_SHORT_VRS)
        _shapes.keep(len(self.data), self.little, shape)

    def _plain_elements(self, frame: _Frame, position: int, *, top: bool) -> int:
        """Step over explicit elements with a short VR, which nearly all are; `_element` takes what this stops at."""
        data, end, count = self.data, frame.end, 0
        last = min(end, len(data)) - 8
        unpack = (_LE_EXPLICIT if self.little else _BE_EXPLICIT).unpack_from
        short, found, interesting = _SHORT_VRS, self.found, _interesting() if top else frozenset()
        head = self.head  # slices of bytes cost a third of those of a view
        learned = (self._top if top else self._nested) if self._top is not None else None
        while position <= last and count <= MAX_ELEMENTS:
            group, element, vr, length = unpack(data, position)
            start = position + 8
            stop = start + length
            if vr not in short or stop > end or group == 0xFFFE:
                break
            if top and group < 8 and group in (0x0000, 0x0002):
                break
            if learned is not None and position < HEAD_BYTES:
                learned.append(position)
            tag = group << 16 | element
            if tag in interesting:
                if length <= SHORT_VALUE and stop <= len(head) and tag not in found:
                    found[tag] = vr, head[start:stop]
                else:
                    self._keep(tag, vr, start, length)
            position = stop
            count += 1
        self._count += count
        return position

    def _need(self, position: int, end: int) -> None:
        if position > end:
            raise InvalidInstance("the data set is cut short or a length reaches past its end")
        if position > len(self.data):
            raise _BeyondPrefix(position)

    def _item(self, stack: list[_Frame], position: int) -> int:
        frame = stack[-1]
        start = position + 8
        self._need(start, frame.end)
        if self._top is not None and position < HEAD_BYTES:
            self._nested.append(position)
        group, element, length = (_LE_TAG if self.little else _BE_TAG).unpack_from(self.data, position)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            if frame.undefined:
                stack.pop()
            return start
        if tag != _ITEM:
            raise InvalidInstance("a sequence holds something that is no item")
        if length == _UNDEFINED:
            stack.append(_Frame(False, frame.end, True, frame.implicit, True))
        else:
            if start + length > frame.end:
                raise InvalidInstance("an item reaches past its sequence")
            stack.append(_Frame(False, start + length, False, frame.implicit, True))
        return start

    def _element(self, stack: list[_Frame], position: int) -> int:
        frame = stack[-1]
        self._need(position + 8, frame.end)
        data = self.data
        group: int
        element: int
        vr: bytes
        length: int
        if frame.implicit:
            vr = b""
            group, element, length = (_LE_TAG if self.little else _BE_TAG).unpack_from(data, position)
            start = position + 8
        else:
            group, element, vr, length = (_LE_EXPLICIT if self.little else _BE_EXPLICIT).unpack_from(data, position)
            start = position + 8
            if vr in _SHORT_VRS:
                pass
            elif vr in _LONG_VRS:
                start += 4
                self._need(start, frame.end)
                (length,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(data, position + 8)
            else:
                vr, length, start = self._odd_vr(frame, position, group, vr, length)
        tag = group << 16 | element
        if self._top is not None and position < HEAD_BYTES:
            (self._top if len(stack) == 1 else self._nested).append(position)
        if group == 0xFFFE:
            return self._delimiter(stack, tag, start)
        if len(stack) == 1:
            if group in (0x0000, 0x0002):  # group 0004 of a directory is seen in real images
                raise InvalidInstance("the data set holds an element of a command or of a file header")
            if tag in _interesting():
                self._keep(tag, vr, start, length)
            elif tag in _PIXEL_TAGS and self.pixel_data_offset is None:
                self.pixel_data_offset = position
                self._learn(position)
        if length == _UNDEFINED:
            if vr in _ENCAPSULATED_VRS or tag in _PIXEL_TAGS:
                self._top = None  # what is within is not noted
                return self._fragments(start, frame.end)
            # PS3.5 6.2.2 note 2: UN of undefined length holds an implicit little endian sequence (and not all obey)
            stack.append(_Frame(True, frame.end, True, frame.implicit, True))
            return start
        end = start + length
        if end > frame.end:
            raise InvalidInstance("the data set is cut short or a length reaches past its end")
        if length and (vr == b"SQ" or (not vr and tag in _sequence_tags())):
            stack.append(_Frame(True, end, False, frame.implicit, True))
            return start
        return end

    def _odd_vr(self, frame: _Frame, position: int, group: int, vr: bytes, length: int) -> tuple[bytes, int, int]:
        """An element whose VR is none we know, in an explicit data set."""
        (implicit_length,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(self.data, position + 4)
        if group == 0xFFFE:  # delimiters never have a VR
            return b"", implicit_length, position + 8
        self._top = None  # a guess is made anew for each data set
        if vr.isalpha() and vr.isupper():
            # PS3.5 7.1.2: VRs to come have reserved bytes and a 32-bit length; what was never in the Standard may not
            if length == 0 and position + 12 <= min(frame.end, len(self.data)):
                (long,) = (_LE_LONG if self.little else _BE_LONG).unpack_from(self.data, position + 8)
                if long == _UNDEFINED or position + 12 + long <= frame.end:
                    return b"UN", long, position + 12
            return b"UN", length, position + 8
        if frame.lenient:
            return b"", implicit_length, position + 8
        raise InvalidInstance("an element has no value representation: this is another transfer syntax")

    def _delimiter(self, stack: list[_Frame], tag: int, start: int) -> int:
        if tag != _ITEM_END or len(stack) == 1:
            raise InvalidInstance("a delimiter stands where an element should")
        if stack[-1].undefined:
            stack.pop()
        return start

    def _keep(self, tag: int, vr: bytes, start: int, length: int) -> None:
        if tag in _IDENTITY and tag in self.found:
            raise InvalidInstance(f"{_IDENTITY[tag]} appears twice")
        if length <= MAX_VALUE_BYTES and start + length <= len(self.data):
            self.found[tag] = vr, bytes(self.data[start : start + length])

    def _fragments(self, position: int, end: int) -> int:
        """Skip an encapsulated value (PS3.5 A.4): items of defined length up to the sequence delimiter."""
        unpack = (_LE_TAG if self.little else _BE_TAG).unpack_from
        for _ in range(MAX_ELEMENTS):
            self._need(position + 8, end)
            group, element, length = unpack(self.data, position)
            position += 8
            tag = group << 16 | element
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM or length == _UNDEFINED:
                raise InvalidInstance("encapsulated pixel data is cut short or holds something that is no fragment")
            position += length
        raise InvalidInstance(f"encapsulated pixel data has more than {MAX_ELEMENTS} fragments")


_LE_TAG, _BE_TAG = struct.Struct("<HHI"), struct.Struct(">HHI")
_LE_EXPLICIT, _BE_EXPLICIT = struct.Struct("<HH2sH"), struct.Struct(">HH2sH")
_LE_LONG, _BE_LONG = struct.Struct("<I"), struct.Struct(">I")


_shapes = Shapes()


@lru_cache(maxsize=1)
def _wanted() -> Mapping[int, str]:
    wanted: dict[int, str] = {}
    for keywords in INDEXED.values():
        for keyword in keywords:
            tag = tag_for_keyword(keyword)
            assert tag is not None, keyword
            wanted[tag] = keyword
    return wanted


@lru_cache(maxsize=1)
def _interesting() -> frozenset[int]:
    return frozenset({*_wanted(), *_IDENTITY, _CHARACTER_SET})


@lru_cache(maxsize=1)
def _sequence_tags() -> frozenset[int]:
    return frozenset(tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ")


# --- deflated ------------------------------------------------------------------------------------------------------

_INFLATE_PIECE = 256 * 1024


def _walk_deflated(view: memoryview, max_held: int) -> _Walk:
    """Inflate (PS3.5 A.5: a bare RFC 1951 stream), holding `max_held` bytes, and walk what is held."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    held = bytearray()
    total = 0
    fed: bytes | memoryview = b""
    position = 0
    try:
        while not inflater.eof:
            if not fed and position < len(view):
                fed = view[position : position + _INFLATE_PIECE]
                position += len(fed)
            piece = inflater.decompress(fed, _INFLATE_PIECE)
            fed = inflater.unconsumed_tail
            if not piece and not fed and position >= len(view) and not inflater.eof:
                raise InvalidInstance("the deflated data set is cut short")
            held += piece[: max_held - len(held)]
            total += len(piece)
            if total > MAX_INFLATED_BYTES:
                raise InvalidInstance(f"the deflated data set unpacks to more than {MAX_INFLATED_BYTES} bytes")
    except zlib.error:
        raise InvalidInstance("the deflated data set is no deflate stream") from None
    if len(inflater.unused_data) + len(view) - position > 8:  # a pad byte, or the trailer of a zlib stream
        raise InvalidInstance("something follows the deflated data set")
    walk = _Walk(memoryview(bytes(held)), implicit=False, little=True, partial=total > len(held))
    try:
        walk.run()
    except _BeyondPrefix as beyond:
        if beyond.position > total:
            raise InvalidInstance("the data set is cut short or a length reaches past its end") from None
    return walk


# --- values --------------------------------------------------------------------------------------------------------


def _header(walk: _Walk, transfer_syntax_uid: str) -> InstanceHeader:
    uids: dict[str, str] = {}
    irregular = False
    for tag, keyword in _IDENTITY.items():
        _, raw = walk.found.pop(tag, _ABSENT)
        if not raw:
            raise InvalidInstance(f"{keyword} is missing or empty")
        uids[keyword], odd = normalise_uid(raw.decode("latin-1"))
        irregular |= odd
    _, raw = walk.found.pop(_CHARACTER_SET, _ABSENT)
    character_set = raw.decode("latin-1").strip("\0 ")
    codecs, little = _codecs(character_set), walk.little
    attributes: dict[str, str] = {}
    wanted = _wanted()
    for tag, (vr, raw) in walk.found.items():
        keyword = wanted[tag]
        # an implicit element, or one said to be UN, has the VR of the dictionary
        known = value_representation(keyword).encode() if vr in _UNSAID else vr
        text = (_short_text if len(raw) <= SHORT_VALUE else _text)(raw, known, codecs, little)
        if text:
            attributes[keyword] = text
    return InstanceHeader(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        transfer_syntax_uid=transfer_syntax_uid,
        attributes=attributes,
        specific_character_set=character_set,
        pixel_data_offset=walk.pixel_data_offset,
        irregular_uids=irregular,
    )


_ABSENT = b"", b""
_UNSAID = frozenset({b"", b"UN", b"OB"})


def _text(raw: bytes, vr: bytes, codecs: tuple[str, ...], little: bool) -> str:
    if (code := _NUMBERS.get(vr)) is not None:
        size = struct.calcsize(code)
        count = len(raw) // size
        values = struct.unpack_from(f"{'<' if little else '>'}{count}{code}", raw)
        return "\\".join(str(value) for value in values)
    if vr in _LOCAL_TEXT_VRS and (not raw.isascii() or b"\x1b" in raw):
        text = _decode(raw, vr, codecs)
    else:
        text = raw.decode("latin-1")
    if vr in _ONE_VALUE_VRS:
        return text.strip("\0 ")
    return "\\".join(value.strip("\0 ") for value in text.split("\\")) if "\\" in text else text.strip("\0 ")


_short_text = lru_cache(maxsize=4096)(_text)


def _decode(raw: bytes, vr: bytes, codecs: tuple[str, ...]) -> str:
    """Decode before splitting at backslashes: in GB18030, GBK and Shift JIS they occur as second bytes."""
    if b"\x1b" not in raw:
        return raw.decode(codecs[0], "replace")
    delimiters = _NAME_DELIMITERS if vr == b"PN" else _DELIMITERS
    return "".join(_decode_fragment(part, codecs, delimiters) for part in _FRAGMENTS.findall(raw))


# PS3.5 6.1.2.5.3: after these the first character set is in force again
_DELIMITERS = re.compile(rb"[\t\n\f\r\\]")
_NAME_DELIMITERS = re.compile(rb"[\t\n\f\r\\^=]")
_FRAGMENTS = re.compile(rb"[^\x1b]+|\x1b[^\x1b]*")


def _decode_fragment(part: bytes, codecs: tuple[str, ...], delimiters: re.Pattern[bytes]) -> str:
    """Text up to the next escape sequence, which the part may begin with (PS3.3 tables C.12-3, C.12-4).

    As `pydicom.charset` does it, without its warnings: a peer's bytes must not write our log.
    """
    length = 4 if part.startswith((b"\x1b$(", b"\x1b$)")) else 3
    codec = CODES_TO_ENCODINGS.get(part[:length], "")
    if codec not in codecs and codec != _DEFAULT_CODEC:  # none, or one the object does not announce
        return part.decode(codecs[0], "replace")
    if codec in handled_encodings:  # these codecs read their escape sequence themselves
        return part.decode(codec, "replace")
    rest = part[length:]
    found = delimiters.search(rest)
    end = found.start() if found else len(rest)
    return rest[:end].decode(codec, "replace") + rest[end:].decode(codecs[0], "replace")


_DEFAULT_CODEC = python_encoding[""]
_ALMOST_ISO_IR = re.compile(r"ISO[-_ ]?(?:IR[-_ ]?)?(\d+)")
_ALMOST_ISO_2022 = re.compile(r"ISO[-_ ]?2022[-_ ]?(?:IR[-_ ]?)?(\d+|GBK)")


@lru_cache(maxsize=256)
def _codecs(character_set: str) -> tuple[str, ...]:
    """Python's codecs for a Specific Character Set value (PS3.3 C.12.1.1.2), as `pydicom.charset` names them.

    Terms that are almost right are read as meant; one that is unknown counts as the default repertoire.
    """
    return tuple(_codec(term.strip("\0 ")) for term in character_set.split("\\"))


def _codec(term: str) -> str:
    if term in python_encoding:
        return python_encoding[term]
    upper = term.upper()
    candidates: tuple[str, ...]
    if found := _ALMOST_ISO_2022.fullmatch(upper):
        candidates = (f"ISO 2022 IR {found[1]}", f"ISO 2022 {found[1]}")
    elif found := _ALMOST_ISO_IR.fullmatch(upper):
        candidates = (f"ISO_IR {found[1]}",)
    else:
        candidates = (upper,)
    for candidate in candidates:
        if candidate in python_encoding:
            return python_encoding[candidate]
    return "UTF8" if upper.replace("-", "") == "UTF8" else _DEFAULT_CODEC
