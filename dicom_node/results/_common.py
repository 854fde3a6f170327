"""What every result object shares: identity, equipment, time, series, and the last hand before the bytes are fixed.

highdicom builds the objects from a skeleton without a patient; here they get everything that must be ours: the
demographics of the source, UIDs and times that depend only on the job, the algorithm as IHE AIR wants it told
(TI Rev 1.3 6.5.3.1), one character set. Nothing here reads a clock, a disk or a random source.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import BytesIO

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.errors import EncodingError
from dicom_node.identity import digest_uid
from dicom_node.quiet import quiet
from dicom_node.results import codes
from dicom_node.results._sources import decoded, identity
from dicom_node.values import Provenance, ResultContext

__all__ = [
    "MAKER",
    "Algorithm",
    "Moment",
    "clean",
    "encoded",
    "equipment",
    "finish",
    "moment",
    "quiet",
    "remarks",
    "result_uid",
    "series_description",
    "series_number",
    "tracking_identifier",
    "tracking_uid",
]

# Characters per value, PS3.5 table 6.2-1
_LIMITS = {"CS": 16, "SH": 16, "LO": 64, "ST": 1024, "LT": 10240}
_ONE_LINE = frozenset({"CS", "SH", "LO"})
_SERIES_BANDS = 90  # 9000, 9010 ... 9890: one band of ten series numbers for an algorithm
_KIND_OFFSETS = {"seg": 1, "sr": 2, "labelmap": 3, "stl": 4, "sc": 5, "pdf": 6, "ann": 7}
MAKER = "dicom-node"


def clean(text: str, vr: str) -> str:
    """`text` as a value of that VR: no control characters, no value delimiter, no longer than the VR allows.

    PS3.5 6.2: ST, LT and UT may hold line breaks and backslashes, the one-line VRs may not.
    """
    if vr in _ONE_LINE:
        text = " ".join(re.sub(r"[\x00-\x1f\x7f]+", " ", text).replace("\\", "/").split())
    else:
        text = re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]+", " ", text).strip()
    return text[: _LIMITS.get(vr)].rstrip()


# --- identity --------------------------------------------------------------------------------------------------------


def result_uid(*parts: str) -> str:
    """A UID that depends on `parts` alone: the same parts give the same UID anywhere, others another one.

    See `identity.digest_uid`, over a SHA-256.
    """
    return digest_uid(hashlib.sha256("\x1f".join(("dicom-node", *parts)).encode()).digest())


def tracking_uid(context: ResultContext, *parts: str) -> str:
    """Names an organ or finding over re-runs: without the run number."""
    return result_uid("tracking", context.tracking_key, *parts)


def tracking_identifier(algorithm: Algorithm, name: str) -> str:
    """The same for people (UT, no limit that matters)."""
    return clean(f"{algorithm.name}: {name}", "LO")


# --- algorithm -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The algorithm's identity, cut to LO once, so that every place of an object that tells it tells the same.

    IHE AIR table 6.5.3.1-1: Manufacturer = Device Observer Manufacturer = Algorithm Source; Model Name = Device
    Observer Model Name = Algorithm Name; Software Versions = Algorithm Version; Device UID = Device Observer UID.
    """

    name: str
    version: str
    manufacturer: str
    device_uid: str
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, provenance: Provenance) -> Algorithm:
        """Raises EncodingError when something that must be told is empty."""
        told = {key: clean(getattr(provenance, key), "LO") for key in ("name", "version", "manufacturer")}
        if empty := [key for key, value in told.items() if not value]:
            raise EncodingError(f"provenance.{empty[0]} is empty: a result must say which algorithm made it")
        if not re.fullmatch(r"(?=.{1,64}$)(0|[1-9]\d*)(\.(0|[1-9]\d*))*", provenance.device_uid):
            raise EncodingError(f"provenance.device_uid: {provenance.device_uid!r} is no UID")
        parameters = tuple(clean(text, "ST") for text in provenance.parameters)
        return cls(**told, device_uid=provenance.device_uid, parameters=tuple(text for text in parameters if text))


def equipment(algorithm: Algorithm, source: Dataset, when: Moment) -> list[Dataset]:
    """Items of Contributing Equipment Sequence: the algorithm, and the scanner if the source names it.

    PS3.3 C.12.1.1.5; AIR 6.5.3.1 wants Device UID there, which highdicom has no argument for.
    """
    processing = Dataset()
    processing.Manufacturer = algorithm.manufacturer
    processing.ManufacturerModelName = algorithm.name
    processing.SoftwareVersions = algorithm.version
    processing.DeviceUID = algorithm.device_uid
    processing.ContributionDateTime = when.date_time
    processing.PurposeOfReferenceCodeSequence = [codes.concept(codes.PROCESSING_EQUIPMENT)]
    items = [processing]
    if manufacturer := clean(str(decoded(source, "Manufacturer") or ""), "LO"):
        acquisition = Dataset()
        acquisition.Manufacturer = manufacturer
        for keyword, vr in (("ManufacturerModelName", "LO"), ("StationName", "SH"), ("DeviceSerialNumber", "LO")):
            if value := clean(str(decoded(source, keyword) or ""), vr):
                setattr(acquisition, keyword, value)
        acquisition.PurposeOfReferenceCodeSequence = [codes.concept(codes.ACQUISITION_EQUIPMENT)]
        items.append(acquisition)
    return items


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When the result was made, as DA, TM, DT and the UTC offset all times of the object are in."""

    date: str
    time: str
    offset: str

    @property
    def date_time(self) -> str:
        """DT with its offset."""
        return f"{self.date}{self.time}{self.offset}"


def _offset(text: str) -> timedelta | None:
    # PS3.3 C.12.1.1.8: &ZZXX from -1200 to +1400, and -0000 is not allowed
    match = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", text.strip())
    if match is None or text.strip() == "-0000":
        return None
    size = timedelta(hours=int(match[2]), minutes=int(match[3]))
    signed = -size if match[1] == "-" else size
    return signed if timedelta(hours=-12) <= signed <= timedelta(hours=14) else None


def moment(context: ResultContext, source: Dataset) -> Moment:
    """`created_at` in the source's (0008,0201), else in `context.time_zone`. Raises EncodingError for a naive time."""
    if context.created_at.tzinfo is None:
        raise EncodingError("created_at has no time zone")
    text = str(decoded(source, "TimezoneOffsetFromUTC") or "").strip()
    offset = _offset(text)
    if offset is None:
        text = context.time_zone
        offset = _offset(text)
    if offset is None:
        raise EncodingError(f"time_zone: {text!r} is no UTC offset like '+0100'")
    local: datetime = context.created_at.astimezone(timezone(offset))
    return Moment(date=local.strftime("%Y%m%d"), time=local.strftime("%H%M%S.%f"), offset=text)


# --- series ----------------------------------------------------------------------------------------------------------


def series_number(context: ResultContext, kind: str) -> int:
    """9000 and up, far from a scanner's: a band of ten per algorithm (by its name), a place in it per kind."""
    digest = hashlib.sha256(context.provenance.name.encode()).digest()
    return 9000 + 10 * (int.from_bytes(digest[:4], "big") % _SERIES_BANDS) + _KIND_OFFSETS[kind]


def series_description(context: ResultContext, algorithm: Algorithm, what: str) -> str:
    """Starts with AI, says demonstration where so, then the algorithm; LO, so what is too long goes at the end."""
    start = "AI DEMONSTRATION" if context.provenance.demonstration else "AI"
    return clean(f"{start}: {what}, {algorithm.name} {algorithm.version}", "LO")


def remarks(context: ResultContext, notes: Sequence[str]) -> str:
    """The notice of a demonstration model and what had to be repaired, as one text for people ('' when nothing)."""
    notice = context.provenance.notice
    if context.provenance.demonstration and not notice:
        notice = "Demonstration, not for clinical use"
    return clean(". ".join(text.rstrip(". ") for text in (notice, *notes) if text.strip()), "LT")


# --- the last hand ---------------------------------------------------------------------------------------------------


def finish(dataset: Dataset, source: Dataset, context: ResultContext, algorithm: Algorithm) -> Dataset:
    """A plain data set with what highdicom cannot know, or fills from a clock, replaced by ours."""
    when = moment(context, source)
    plain = Dataset()
    plain.update(dataset)
    plain.update(identity(source))
    plain.SpecificCharacterSet = "ISO_IR 192"
    plain.TimezoneOffsetFromUTC = when.offset
    for keyword in ("InstanceCreation", "Series", "Content"):
        setattr(plain, f"{keyword}Date", when.date)
        setattr(plain, f"{keyword}Time", when.time)
    plain.ContributingEquipmentSequence = equipment(algorithm, source, when)
    if schemes := codes.coding_schemes(plain):
        plain.CodingSchemeIdentificationSequence = schemes
    return plain


def encoded(dataset: Dataset, tail: bytes = b"", pixels: bytes | None = None) -> Dataset:
    """The data set as it reads from its own Explicit VR Little Endian bytes, `tail` (later elements, encoded) appended,
    and `pixels` (bytes, an even number) as its Pixel Data.

    What is returned has not been decoded yet, so writing it again copies the bytes: fast, and the same every time.
    """
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, dataset)
    result = read_dataset(BytesIO(buffer.getvalue() + tail), is_implicit_VR=False, is_little_endian=True)
    if pixels is not None:  # added, not read: they may be hundreds of megabytes
        result.add(DataElement("PixelData", "OB", pixels))
    result.file_meta = FileMetaDataset()
    result.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    result.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return result
