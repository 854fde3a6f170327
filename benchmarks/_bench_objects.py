"""Synthetic images for `peers.py`: noise, Explicit VR Little Endian, UIDs that nobody has seen before.

A header is encoded once for each workload; what differs from object to object (UIDs, names, dates) has a fixed length
and is put in its place, so a fresh set of any size costs no encoding. Pixels are windows on one block of noise.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

__all__ = ["CT", "CXR", "EXPLICIT_LE", "INDEX", "SMALL", "Batch", "Image", "Workload"]

EXPLICIT_LE = "1.2.840.10008.1.2.1"
ROOT = "1.2.826.0.1.3680043.10.999"
DAYS, FAMILIES = 400, 1000  # how many dates and family names the studies are spread over
# stand-ins of fixed length; split at, never searched for in what was put in
RUN, STUDY, NUMBER, FAMILY, DAY = "7700000077", "5500055", "330033", "440044", "18990401"
_STAND_INS = re.compile("|".join((RUN, STUDY, NUMBER, FAMILY, DAY)).encode())
_runs = count(1_000_000_000 + int(time.time() * 10) % 8_000_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A kind of image. `per_study` 0: all of a batch are one study."""

    name: str
    sop_class_uid: str
    modality: str
    rows: int
    columns: int
    per_study: int


CT = Workload(
    name="CT 528 KB", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", modality="CT", rows=512, columns=512, per_study=0
)
CXR = Workload(
    name="CXR 10 MB",
    sop_class_uid="1.2.840.10008.5.1.4.1.1.1.1",
    modality="DX",
    rows=2500,
    columns=2048,
    per_study=1,
)
SMALL = Workload(
    name="small 11 KB", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", modality="CT", rows=64, columns=64, per_study=50
)
INDEX = Workload(
    name="one-image studies", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", modality="CT", rows=8, columns=8, per_study=1
)


@dataclass(frozen=True, slots=True)
class Image:
    """One object, as it is sent: its data set is `head` and then `pixels`."""

    sop_class_uid: str
    sop_instance_uid: str
    head: bytes
    pixels: memoryview


@dataclass(frozen=True, slots=True)
class _Template:
    prefix: list[bytes]  # Part-10 preamble and File Meta Information
    head: list[bytes]
    noise: memoryview
    pixel_bytes: int


class Batch:
    """`count` images of one workload under a run number of their own."""

    def __init__(self, workload: Workload, count: int) -> None:
        self.workload, self.count, self.run = workload, count, next(_runs)
        self._template = _template(workload)

    def __len__(self) -> int:
        return self.count

    @property
    def studies(self) -> range:
        """The numbers of its studies."""
        per_study = self.workload.per_study or self.count
        return range((self.count + per_study - 1) // per_study)

    @property
    def size(self) -> int:
        """Bytes of all its data sets."""
        return self.count * (sum(map(len, self._fill(self._template.head, 0))) + self._template.pixel_bytes)

    def study_uid(self, study: int) -> str:
        """Study Instance UID."""
        return f"{ROOT}.{self.run}.{1_000_000 + study}"

    def series_uid(self, study: int) -> str:
        """Series Instance UID of its only series."""
        return f"{self.study_uid(study)}.1"

    def study_of(self, number: int) -> int:
        """The number of the study that image belongs to."""
        return number // self.workload.per_study if self.workload.per_study else 0

    def image(self, number: int) -> Image:
        """Image `number`, its pixels not copied."""
        template = self._template
        start = number * 2 % (len(template.noise) - template.pixel_bytes)
        uid = f"{self.series_uid(self.study_of(number))}.{100_000 + number}"
        head = b"".join(self._fill(template.head, number))
        return Image(self.workload.sop_class_uid, uid, head, template.noise[start : start + template.pixel_bytes])

    def share(self, part: int, parts: int) -> range:
        """The numbers of one sender's share."""
        return range(part, self.count, parts)

    def write(self, folder: Path) -> list[Path]:
        """All of them as Part-10 files."""
        folder.mkdir(parents=True)
        paths = []
        for number in range(self.count):
            image = self.image(number)
            paths.append(folder / f"{number:06}.dcm")
            with paths[-1].open("wb") as stream:
                stream.writelines((b"".join(self._fill(self._template.prefix, number)), image.head, image.pixels))
        return paths

    def _fill(self, parts: list[bytes], number: int) -> Iterator[bytes]:
        study = self.study_of(number)
        values = {
            RUN: str(self.run),
            STUDY: str(1_000_000 + study),
            NUMBER: str(100_000 + number),
            FAMILY: family_of(study),
            DAY: day_of(study),
        }
        for part in parts:
            put_in = values.get(part.decode("latin-1")) if len(part) <= len(RUN) else None
            yield part if put_in is None else put_in.encode()


def family_of(study: int) -> str:
    """The digits in the family name of study number `study`."""
    return f"{study % FAMILIES:06}"


def day_of(study: int) -> str:
    """Its Study Date."""
    return f"{date(2020, 1, 1) + timedelta(days=study % DAYS):%Y%m%d}"


def patient_of(study: int) -> str:
    """Its Patient ID."""
    return f"PID{1_000_000 + study}"


@cache
def _template(workload: Workload) -> _Template:
    ds = _header(workload)
    encoded = DicomBytesIO()
    encoded.is_little_endian, encoded.is_implicit_VR = True, False
    write_dataset(encoded, ds)
    pixel_bytes = workload.rows * workload.columns * 2
    head = encoded.getvalue() + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, pixel_bytes)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(EXPLICIT_LE)
    whole = BytesIO()
    ds.file_meta = meta
    ds.save_as(whole, enforce_file_format=True)
    prefix = whole.getvalue()[: -len(encoded.getvalue())]
    noise = np.random.default_rng(7).integers(0, 4096, size=pixel_bytes // 2 + 32_768, dtype=np.uint16).tobytes()
    return _Template(_pieces(prefix), _pieces(head), memoryview(noise), pixel_bytes)


def _pieces(encoded: bytes) -> list[bytes]:
    return re.split(b"(" + _STAND_INS.pattern + b")", encoded)


def _header(workload: Workload) -> Dataset:
    """About sixty elements with a sequence and a private block, as a scanner writes them."""
    ds = Dataset()
    ds.SpecificCharacterSet, ds.ImageType = "ISO_IR 100", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID, ds.Modality = UID(workload.sop_class_uid), workload.modality
    ds.StudyInstanceUID = UID(f"{ROOT}.{RUN}.{STUDY}")
    ds.SeriesInstanceUID = UID(f"{ROOT}.{RUN}.{STUDY}.1")
    ds.SOPInstanceUID = UID(f"{ROOT}.{RUN}.{STUDY}.1.{NUMBER}")
    ds.FrameOfReferenceUID = UID(f"{ROOT}.{RUN}.{STUDY}.9")
    ds.PatientName, ds.PatientID, ds.PatientSex = f"Family{FAMILY}^Bench", f"PID{STUDY}", "O"
    ds.PatientBirthDate, ds.PatientAge, ds.PatientWeight = "19600229", "060Y", "70.5"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = ds.InstanceCreationDate = DAY
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "101500.250000"
    ds.AccessionNumber, ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = f"AC{STUDY}", STUDY, 1, NUMBER
    ds.StudyDescription, ds.SeriesDescription, ds.ProtocolName = "Benchmark study", "Axial noise", "Noise"
    ds.Manufacturer, ds.ManufacturerModelName, ds.StationName = "Synthetic", "Noise 1", "BENCH1"
    ds.InstitutionName, ds.InstitutionalDepartmentName = "Benchmark Hospital", "Radiology"
    ds.ReferringPhysicianName, ds.DeviceSerialNumber, ds.SoftwareVersions = "Referrer^R", "4711", ["1.0", "2.0"]
    ds.BodyPartExamined, ds.PatientPosition, ds.PositionReferenceIndicator = "CHEST", "HFS", ""
    ds.KVP, ds.ExposureTime, ds.XRayTubeCurrent, ds.FilterType = "120", "500", "200", "NONE"
    ds.ConvolutionKernel, ds.SliceThickness, ds.SliceLocation, ds.GantryDetectorTilt = "B30f", "1.0", "12.5", "0"
    ds.ImagePositionPatient = ["-175.0", "-175.0", "12.5"]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.PixelSpacing, ds.WindowCenter, ds.WindowWidth = ["0.7", "0.7"], "40", "400"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "24627-2", "LN", "CT Chest"
    ds.ProcedureCodeSequence = [code]
    private = ds.private_block(0x0029, "BENCH PRIVATE", create=True)
    private.add_new(0x10, "OB", bytes(range(256)) * 4)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = workload.rows, workload.columns, 16, 12, 11
    return ds
