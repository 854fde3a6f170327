"""What leaves the node without identification: planted values, the whole corpus, and the way back."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import subprocess
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
import pytest
from pydicom import config
from pydicom._dicom_dict import DicomDictionary
from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filereader import _read_file_meta_info
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    VLWholeSlideMicroscopyImageStorage,
)

from dicom_node.engines import allow_list
from dicom_node.engines.keys import PSEUDONYM_KEY, node_secret
from dicom_node.engines.outgoing import Sent, read_header, write_outgoing
from dicom_node.engines.privacy import ForeignReference, Pseudonyms, must_hide, pseudonymised, why_not
from dicom_node.errors import ConfigError, EngineRejected, SeriesRejected
from dicom_node.model import Origin, StoredInstance
from dicom_node.pixels import read_image

SECRET = bytes(range(32))
ALLOWED = {
    *(*allow_list.JOB_UIDS, *allow_list.NUMBERS, *allow_list.ORDINALS, *allow_list.POINTERS, *allow_list.TABLES),
    *(*allow_list.SEQUENCES, *allow_list.CODES, *allow_list.TERMS, "SOPClassUID", "PixelData"),
}


@dataclass(frozen=True)
class Settings:
    send_identifiable: bool = False


def _job(key: str = "job-1", secret: bytes = SECRET) -> Pseudonyms:
    return Pseudonyms(key, secret)


def _stored(path: Path) -> StoredInstance:
    """A Part-10 file as the archive would hand it out. Raises what pydicom raises for other files."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise ValueError("no Part-10 file")
        meta = _read_file_meta_info(file)
        offset = file.tell()
    ds = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID"], stop_before_pixels=True)
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="",
        origin=Origin.RECEIVED,
    )


def _sent(instance: StoredInstance, pseudonyms: Pseudonyms | None) -> tuple[Sent, bytes]:
    target = io.BytesIO()
    sent = write_outgoing(instance, target, pseudonyms)
    content = target.getvalue()
    assert (sent.length, sent.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return sent, content


def _image(**changes: Any) -> Dataset:
    """A small CT image that may leave."""
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    for keyword, uid in {
        "SOPInstanceUID": "1.2.3.4.1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
    }.items():
        setattr(ds, keyword, uid)
    ds.FrameOfReferenceUID = "1.2.3.99"
    ds.Modality = "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient = ["-1.50", "2e1", "3"]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = ["0.7000000000000001", "0.7"]
    ds.Rows, ds.Columns, ds.SamplesPerPixel = 4, 4, 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PatientName, ds.PatientID = "Doe^Jane", "MRN-4711"
    ds.PixelData = bytes(range(32))
    with config.disable_value_validation():
        for keyword, value in changes.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
    return ds


def _write(path: Path, ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> StoredInstance:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax  # type: ignore[assignment]
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.SourceApplicationEntityTitle = meta.SendingApplicationEntityTitle = "ZQXAE"
    meta.ImplementationVersionName = "ZQXVERSION"
    ds.file_meta, ds.preamble = meta, b"ZQX" * 42 + b"\0\0"
    with config.disable_value_validation():
        dcmwrite(path, ds, enforce_file_format=True)
    return _stored(path)


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., StoredInstance]:
    """`stored(ds, syntax)`: the image as a stored instance."""

    def write(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> StoredInstance:
        return _write(tmp_path / "image.dcm", ds, syntax)

    return write


# --- who is hidden from whom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"]
)
def test_this_machine_may_see_the_patient(host: str) -> None:
    assert must_hide(Settings(), host) is False


@pytest.mark.parametrize(
    "host",
    [
        *(
            "10.0.0.7",
            "192.168.1.1",
            "engine.example",
            "127.evil.example",
            "localhost.evil.example",
            "0.0.0.0",
            "",
            "::",
        ),
        *("::ffff:10.0.0.7", "fe80::1", "127.0.0.1.evil.example", "2130706433"),
    ],
)
def test_nobody_else_may_unless_the_operator_says_so(host: str) -> None:
    assert must_hide(Settings(), host) is True
    assert must_hide(Settings(send_identifiable=True), host) is False


# --- the allow-list --------------------------------------------------------------------------------------------------


def test_the_allow_list_has_no_attribute_that_can_hold_free_text_or_a_time() -> None:
    kinds = {
        "numbers": (allow_list.NUMBERS, {"DS", "IS", "US", "SS", "US or SS", "UL", "SL", "FL", "FD"}),
        "terms": (allow_list.TERMS, {"CS", "LO"}),
        "uids": (allow_list.JOB_UIDS, {"UI"}),
        "sequences": (allow_list.SEQUENCES | allow_list.CODES, {"SQ"}),
        "tables": (allow_list.TABLES, {"OW", "US or OW"}),
        "pointers": (allow_list.POINTERS, {"AT"}),
        "ordinals": (allow_list.ORDINALS, {"SH"}),
    }
    for name, (keywords, allowed) in kinds.items():
        for keyword in keywords:
            tag = tag_for_keyword(keyword)
            assert tag is not None, f"{name}: {keyword} is no attribute"
            assert dictionary_VR(tag) in allowed, keyword
    # Of PS3.15 table E.1-1, what is neither text nor a date. The UIDs on the list are those it wants replaced.
    assert ALLOWED.isdisjoint(
        {
            *("PatientSex", "PatientSexNeutered", "PatientAge", "PatientSize", "PatientWeight", "PregnancyStatus"),
            *("SmokingStatus", "InstanceOriginStatus", "TimezoneOffsetFromUTC", "GPSLatitude", "GPSLongitude"),
            *("DeviceUID", "IrradiationEventUID", "TransactionUID", "ReferencedSOPInstanceUID", "SpecimenUID", "UID"),
            *("InstanceCreatorUID", "ManufacturerDeviceClassUID", "PaletteColorLookupTableUID", "TargetUID"),
            *("LargePaletteColorLookupTableUID", "TrackingUID", "FiducialUID", "StorageMediaFileSetUID"),
            *("AcquisitionContextSequence", "ReferencedImageSequence", "SourceImageSequence", "IconImageSequence"),
            *("RequestAttributesSequence", "ContentSequence", "GraphicAnnotationSequence", "UDISequence"),
            *("SpecimenPreparationSequence", "SpecimenDescriptionSequence", "TransducerIdentificationSequence"),
            *("OriginalAttributesSequence", "ReferencedStudySequence", "ReferencedPerformedProcedureStepSequence"),
            *("OperatorIdentificationSequence", "FlowIdentifierSequence", "OverlayData", "DigitalSignaturesSequence"),
        }
    )


def _planted(vr: str, number: int) -> Any:
    """A value of that VR that can be recognised wherever it turns up."""
    if vr == "UI":
        return f"1.2.3.999.777.{number}"
    if vr in ("DS", "IS"):
        return "31415.926" if vr == "DS" else "314159265"
    if vr == "AT":
        return 0x5A515A51
    if vr in ("UL", "SL"):
        return 0x5A515A51
    if vr in ("UV", "SV"):
        return 0x5A515A515A515A51
    if vr in ("FL", "FD"):
        return 31415.926
    if vr in ("US", "SS"):
        return 0x5A51
    if vr in ("OB", "OW", "OD", "OF", "OL", "OV", "UN"):
        return b"ZQXQZQXQ"
    return f"ZQX{number:05d}"


_MARKS = (b"ZQX", b"1.2.3.999.777", b"31415", b"QZQZ", b"\x51\x5a\x51\x5a", b"Doe", b"MRN-4711")


def _plant_everything(ds: Dataset, *, nested: bool) -> int:
    """Every attribute of the dictionary that may not leave, with a value that can be recognised."""
    count = 0
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        group = tag >> 16
        if group in (0x0000, 0x0002, 0x0004, 0x7FE0, 0xFFFE) or keyword in ALLOWED or keyword == "SpecificCharacterSet":
            continue
        if group >= 0x5400 and nested:
            continue
        vr = vr.split(" or ")[0]
        if keyword in ("BurnedInAnnotation", "RecognizableVisualFeatures", "ConversionType") or vr in ("", "NONE"):
            continue
        if vr == "SQ":
            item = Dataset()
            item.PatientName, item.PatientID = "ZQX^Nested", "ZQX-nested"
            ds.add(DataElement(tag, "SQ", [item]))
        else:
            ds.add(DataElement(tag, vr, _planted(vr, count)))
        count += 1
    block = ds.private_block(0x0029, "ZQX CREATOR", create=True)
    block.add_new(0x01, "LO", "ZQX private")
    block.add_new(0x02, "UI", "1.2.3.999.777.1")
    return count


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_nothing_planted_outside_the_allow_list_survives(stored: Callable[..., StoredInstance], syntax: str) -> None:
    with config.disable_value_validation():
        ds = _image(BurnedInAnnotation="NO")
        assert _plant_everything(ds, nested=False) > 4000
        for number, keyword in enumerate(sorted(allow_list.SEQUENCES | allow_list.CODES)):
            item = Dataset()
            _plant_everything(item, nested=True) if number % 9 == 0 else setattr(item, "PatientName", "ZQX^Nested")
            item.SliceThickness = "2.5"
            inner = Dataset()
            inner.PatientComments = "ZQX deep"
            item.PlanePositionSequence = [inner]
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "ZQX1", "SCT", "ZQX meaning"
            setattr(ds, keyword, [item])
        for group in (0x6000, 0x601E):
            ds.add_new(group << 16 | 0x0010, "US", 4)
            ds.add_new(group << 16 | 0x0100, "US", 1)
            ds.add_new(group << 16 | 0x0102, "US", 0)
            ds.add_new(group << 16 | 0x0022, "LO", "ZQX overlay")
            ds.add_new(group << 16 | 0x3000, "OW", b"ZQXQ")
        ds.add_new(0x50000010, "US", 1)
        ds.add_new(0x50003000, "OW", b"ZQXQ")
        ds.add_new(0xFFFCFFFC, "OB", b"ZQXZQX")
        content = _sent(stored(ds, syntax), _job())[1]
    assert [mark for mark in _MARKS if mark in content] == []
    back = pydicom.dcmread(io.BytesIO(content))
    assert back.PixelData == bytes(range(32))
    assert not any(tag.is_private for tag in back.keys())  # noqa: SIM118
    assert "SourceApplicationEntityTitle" not in back.file_meta
    assert back.SharedFunctionalGroupsSequence[0].SliceThickness == 2.5  # the list holds inside sequences too


@pytest.mark.parametrize("keyword", sorted(ALLOWED - {"SOPClassUID", "PixelData"}))
def test_an_allowed_attribute_is_no_way_out_for_text(keyword: str) -> None:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    secret = "ZQX SMITH"
    ds = _image()
    with config.disable_value_validation():
        vr = dictionary_VR(tag)
        if vr == "SQ":
            item = Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = secret, "SCT", secret
            item.LongCodeValue = secret
            ds.add(DataElement(tag, "SQ", [item]))
        elif vr in ("OW", "US or OW"):
            setattr(ds, allow_list.TABLES[keyword], [4, 0, 16])
            ds.add(DataElement(tag, "OW", secret.encode() + b" and what else was to be told"))
        else:
            element = DataElement(tag, "LO", secret)
            element.VR = vr.split(" or ")[0]
            ds._dict[element.tag] = element
    if why_not(ds, hide=True):
        return  # Rows, for instance: the image stays
    leaving = pseudonymised(ds, _job())
    assert secret not in str(leaving) and "SMITH" not in str(leaving) and "what else" not in str(leaving)


def test_codes_leave_with_the_standards_meaning_or_not_at_all() -> None:
    region, view = Dataset(), Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "T-D3000", "SRT", "Chest of Mrs Doe"
    side = Dataset()
    side.CodeValue, side.CodingSchemeDesignator, side.CodeMeaning = "7771000", "SCT", "left of Mr Doe"
    region.AnatomicRegionModifierSequence = [side]
    view.CodeValue, view.CodingSchemeDesignator, view.CodeMeaning = "4711", "SCT", "Doe"
    leaving = pseudonymised(_image(AnatomicRegionSequence=[region], ViewCodeSequence=[view]), _job())
    (kept,) = leaving.AnatomicRegionSequence
    assert (kept.CodeValue, kept.CodingSchemeDesignator) == ("T-D3000", "SRT")
    assert "Doe" not in str(leaving) and kept.CodeMeaning
    assert kept.AnatomicRegionModifierSequence[0].CodeMeaning == "Left"
    assert "ViewCodeSequence" not in leaving


def test_the_patient_is_a_pseudonym_of_the_job_and_the_object_stays_readable() -> None:
    job = _job()
    leaving = pseudonymised(_image(), job)
    assert leaving.PatientID == leaving.PatientName == job.patient_id
    assert re.fullmatch("JOB-[0-9A-F]{16}", job.patient_id)
    assert leaving.PatientIdentityRemoved == "YES"
    for keyword in ("StudyDate", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName", "PatientSex"):
        assert keyword in leaving and not leaving[keyword].value
    assert (
        leaving.ImagePositionPatient.original_string
        if hasattr(leaving.ImagePositionPatient, "original_string")
        else True
    )
    assert [str(value) for value in leaving.PixelSpacing] == ["0.7000000000000001", "0.7"]


def test_values_that_break_their_vr_reach_no_log(
    stored: Callable[..., StoredInstance], caplog: pytest.LogCaptureFixture
) -> None:
    with config.disable_value_validation():
        ds = _image(PatientBirthDate="Doe, born in May", StudyTime="DoeDoe", SliceThickness="1.5")
        for keyword, vr in {
            "AccessionNumber": "SH",
            "KVP": "DS",
            "Modality": "CS",
            "SynchronizationFrameOfReferenceUID": "UI",
        }.items():
            element = DataElement(keyword, "LO", "Doe was here, and very much so")
            element.VR = vr
            ds._dict[element.tag] = element
        instance = stored(ds)
    caplog.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        source, job = read_header(instance), _job()
        returned = _result(job, pseudonymised(source, job))
        job.restored(returned, source)
        _sent(instance, _job())
    assert "Doe" not in caplog.text and not [one for one in told if "Doe" in str(one.message)]


def test_vendors_words_in_image_type_lose_their_meaning_but_keep_their_place() -> None:
    leaving = pseudonymised(_image(ImageType=["DERIVED", "PRIMARY", "ZQXSMITH", "MIP"]), _job())
    assert list(leaving.ImageType) == ["DERIVED", "PRIMARY", "OTHER", "MIP"]


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "Burned In Annotation"),
        ({"BurnedInAnnotation": "MAYBE"}, "Burned In Annotation"),
        ({"RecognizableVisualFeatures": "YES"}, "recognised"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"SOPClassUID": UltrasoundImageStorage, "Modality": "US"}, "ultrasound"),
        ({"ConversionType": "WSD"}, "Conversion Type"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen shot"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, "screen shot"),
        ({"ImageType": ["DERIVED", "PRIMARY", "DOSE_INFO"]}, "screen shot"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "known classes"),
        ({"SOPClassUID": "1.2.3.4.5"}, "known classes"),
        ({"SOPInstanceUID": None}, "SOPInstanceUID"),
        ({"Rows": None}, "Rows"),
    ],
)
def test_images_that_may_name_the_patient_stay_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    ds = _image(**changes)
    assert reason in why_not(ds, hide=True)
    assert why_not(ds, hide=False) == ""
    with pytest.raises(EngineRejected, match=reason):
        pseudonymised(ds, _job())


@pytest.mark.parametrize(
    "changes",
    [
        {"SOPClassUID": SecondaryCaptureImageStorage},
        {"SOPClassUID": UltrasoundImageStorage, "Modality": "US"},
        {"ConversionType": "WSD"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
    ],
)
def test_they_may_leave_when_they_say_that_nothing_is_burned_in(changes: dict[str, Any]) -> None:
    assert why_not(_image(**changes, BurnedInAnnotation="NO"), hide=True) == ""


def test_an_overlay_inside_the_pixel_cells_stays(stored: Callable[..., StoredInstance]) -> None:
    ds = _image()
    ds.add_new(0x60040100, "US", 16)
    ds.add_new(0x60040102, "US", 12)
    instance = stored(ds)
    assert "overlay" in why_not(read_header(instance), hide=True)


@pytest.mark.parametrize("kind", ["LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER", "label"])
@pytest.mark.parametrize("hide", [True, False])
def test_labels_overviews_and_thumbnails_never_leave(
    stored: Callable[..., StoredInstance], kind: str, hide: bool
) -> None:
    ds = _image(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        Modality="SM",
        ImageType=["ORIGINAL", "PRIMARY", kind, "NONE"],
        BurnedInAnnotation="NO",
    )
    instance = stored(ds)
    assert "never leaves" in why_not(read_header(instance), hide=hide)
    target = io.BytesIO()
    with pytest.raises(EngineRejected, match="never leaves"):
        write_outgoing(instance, target, _job() if hide else None)
    assert ds.PixelData not in target.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY"]},
        {"ImageType": None},
        {"ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "SpecimenLabelInImage": "YES"},
        {"ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "LABEL"]},
    ],
)
def test_a_slide_that_does_not_say_what_it_shows_never_leaves(changes: dict[str, Any]) -> None:
    ds = _image(SOPClassUID=VLWholeSlideMicroscopyImageStorage, Modality="SM", **changes)
    assert "never leaves" in why_not(ds, hide=False)


def test_a_slide_volume_leaves_even_in_colour(stored: Callable[..., StoredInstance]) -> None:
    ds = _image(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        Modality="SM",
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        SpecimenLabelInImage="NO",
    )
    assert why_not(ds, hide=True) == ""
    assert _sent(stored(ds), None)[0].identifiable


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_may_see_the_patient_gets_the_data_set_byte_for_byte(
    stored: Callable[..., StoredInstance],
) -> None:
    instance = stored(_image())
    sent, content = _sent(instance, None)
    assert sent.identifiable and sent.sop_instance_uid == "1.2.3.4.1"
    assert content.endswith(Path(instance.path).read_bytes()[instance.data_set_offset :])
    assert b"ZQX" not in content  # the envelope is ours all the same


@pytest.mark.parametrize("frames", [1, 3])
def test_encapsulated_pixel_data_leaves_as_it_is(stored: Callable[..., StoredInstance], frames: int) -> None:
    ds = _image(NumberOfFrames=str(frames))
    ds.PixelData = encapsulate([bytes([number]) * 22 for number in range(frames)], has_bot=True)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    instance = stored(ds, JPEGBaseline8Bit)
    with open(instance.path, "ab") as file:
        file.write(b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0ZQXZ")  # after the pixel data
    back = pydicom.dcmread(io.BytesIO(_sent(instance, _job())[1]))
    assert back.PixelData == ds.PixelData
    assert (0xFFFC, 0xFFFC) not in back


def test_the_extended_offset_table_belongs_to_the_pixel_data(stored: Callable[..., StoredInstance]) -> None:
    ds = _image(ExtendedOffsetTable=b"\0" * 8, ExtendedOffsetTableLengths=b"\x16" + b"\0" * 7)
    ds.PixelData = encapsulate([b"\x01" * 22], has_bot=False)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    back = pydicom.dcmread(io.BytesIO(_sent(stored(ds, RLELossless), _job())[1]))
    assert (back.ExtendedOffsetTable, back.ExtendedOffsetTableLengths) == (b"\0" * 8, b"\x16" + b"\0" * 7)


def test_what_does_not_belong_to_the_frames_does_not_leave_as_pixel_data(
    stored: Callable[..., StoredInstance],
) -> None:
    with pytest.raises(EngineRejected, match="36 bytes of pixel data where 32"):
        _sent(stored(_image(PixelData=bytes(32) + b"ZQX!")), _job())


def test_a_deflated_image_leaves_inflated(tmp_path: Path) -> None:
    ds = _image()
    plain = _write(tmp_path / "plain.dcm", ds)
    data_set = Path(plain.path).read_bytes()[plain.data_set_offset :]
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    path = tmp_path / "deflated.dcm"
    path.write_bytes(deflater.compress(data_set) + deflater.flush())
    instance = StoredInstance(
        **{name: getattr(plain, name) for name in ("sop_class_uid", "sop_instance_uid", "sha256", "origin")},
        **{name: getattr(plain, name) for name in ("study_instance_uid", "series_instance_uid")},
        transfer_syntax_uid="1.2.840.10008.1.2.1.99",
        path=str(path),
        data_set_offset=0,
        data_set_length=path.stat().st_size,
    )
    sent, content = _sent(instance, _job())
    assert sent.transfer_syntax_uid == ExplicitVRLittleEndian
    assert pydicom.dcmread(io.BytesIO(content)).PixelData == ds.PixelData


class _Nowhere(io.RawIOBase):
    """Takes everything and keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGBaseline8Bit])
def test_a_large_image_leaves_through_little_memory(tmp_path: Path, syntax: str) -> None:
    size = 128 * 1024**2
    ds = _image(Rows=8192, Columns=8192)
    del ds.PixelData
    instance = _write(tmp_path / "large.dcm", ds, syntax)
    with open(instance.path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        if syntax == ExplicitVRLittleEndian:
            file.write(b"\xe0\x7f\x10\0OW\0\0" + size.to_bytes(4, "little"))
            file.truncate(file.tell() + size)  # a hole: the pixels are zeros
        else:
            file.write(b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\0\0\0\0")
            file.write(b"\xfe\xff\0\xe0" + size.to_bytes(4, "little"))
            file.truncate(file.tell() + size)
            file.seek(0, os.SEEK_END)
            file.write(b"\xfe\xff\xdd\xe0\0\0\0\0")
    beats: list[int] = []
    target: BinaryIO = _Nowhere()  # type: ignore[assignment]
    tracemalloc.start()
    try:
        sent = write_outgoing(_stored(Path(instance.path)), target, _job(), heartbeat=lambda: beats.append(1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent.length > size and len(beats) > 400
    assert peak < 8 * 1024**2


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_slide_of_many_frames_keeps_the_lease_alive_and_every_position(
    stored: Callable[..., StoredInstance], syntax: str
) -> None:
    ds = _image(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        Modality="SM",
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        NumberOfFrames="1100",
    )
    frames = []
    for number in range(1100):
        position, frame = Dataset(), Dataset()
        position.ColumnPositionInTotalImagePixelMatrix, position.RowPositionInTotalImagePixelMatrix = number, 2 * number
        position.CommentsOnRadiationDose = "ZQX"
        frame.PlanePositionSlideSequence = [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = bytes(32 * 1100)
    beats: list[int] = []
    target = io.BytesIO()
    write_outgoing(stored(ds, syntax), target, _job(), heartbeat=lambda: beats.append(target.tell()))
    assert 0 in beats  # before the first byte, while the header is made
    assert b"ZQX" not in target.getvalue()
    back = pydicom.dcmread(io.BytesIO(target.getvalue()))
    assert len(back.PerFrameFunctionalGroupsSequence) == 1100
    for number, frame in enumerate(back.PerFrameFunctionalGroupsSequence):
        (position,) = frame.PlanePositionSlideSequence
        assert position.ColumnPositionInTotalImagePixelMatrix == number
        assert position.RowPositionInTotalImagePixelMatrix == 2 * number
    assert back.PixelData == ds.PixelData


@pytest.mark.parametrize("group", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_a_label_among_the_frames_keeps_the_slide_here(group: str) -> None:
    kind, groups = Dataset(), Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
    groups.WholeSlideMicroscopyImageFrameTypeSequence = [kind]
    ds = _image(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        Modality="SM",
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
    )
    setattr(ds, group, [groups])
    assert "LABEL" in why_not(ds, hide=False)


def test_an_image_without_pixel_data_or_with_a_cut_file_stays(stored: Callable[..., StoredInstance]) -> None:
    instance = stored(_image())
    with open(instance.path, "r+b") as file:
        file.truncate(Path(instance.path).stat().st_size - 5)
    with pytest.raises(EngineRejected, match="ends inside"):
        _sent(instance, _job())
    with pytest.raises(EngineRejected):
        _sent(stored(_image(PixelData=None)), _job())


# --- the UIDs of a job -----------------------------------------------------------------------------------------------


def test_a_job_has_the_same_uids_after_a_restart_and_another_job_others(tmp_path: Path) -> None:
    first = Pseudonyms("job-7", node_secret(tmp_path)).uid("1.2.3.4")
    assert Pseudonyms("job-7", node_secret(tmp_path)).uid("1.2.3.4") == first
    assert Pseudonyms("job-8", node_secret(tmp_path)).uid("1.2.3.4") != first
    assert Pseudonyms("job-7", node_secret(tmp_path / "another node")).uid("1.2.3.4") != first
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{30,38}", first)


def test_uids_do_not_tell_where_they_came_from_and_registered_ones_stay() -> None:
    job = _job()
    assert job.uid("1.2.3") != job.uid("1.2.3.4")
    assert job.uid("1.2.3 \0") == job.uid("1.2.3")
    assert job.uid("1.2.840.10008.1.4.1.1") == "1.2.840.10008.1.4.1.1"  # the Talairach frame of reference
    assert job.uid("1.2.840.10008.1.4711").startswith("2.25.")  # under the root, but registered by nobody
    assert "1.2.3" not in repr(job)


def test_the_nodes_secret_is_private_and_refused_when_it_is_not(tmp_path: Path) -> None:
    node_secret(tmp_path)
    path = tmp_path / PSEUDONYM_KEY
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [name.name for name in path.parent.iterdir()] == [path.name]
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        node_secret(tmp_path)
    path.chmod(0o600)
    path.write_text("abc")
    with pytest.raises(ConfigError, match="hexadecimal"):
        node_secret(tmp_path)


# --- the whole corpus ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One corpus file that may leave."""

    instance: StoredInstance
    sent: Sent
    content: bytes
    source: Dataset
    back: Dataset
    job: Pseudonyms


@pytest.fixture(scope="session")
def cases(corpus: Path) -> list[Case]:
    """Every file of the corpus that may leave, as it leaves."""
    found = []
    with (corpus / "MANIFEST.csv").open() as manifest:
        paths = [corpus / row["path"] for row in csv.DictReader(manifest)]
    for path in paths:
        try:
            instance = _stored(path)
        except (ValueError, AttributeError, KeyError, TypeError, OSError, NotImplementedError, EOFError):
            continue  # no Part-10 file, or without the UIDs everything has in the archive
        job = Pseudonyms(path.name, SECRET)
        try:
            sent, content = _sent(instance, job)
            source = pydicom.dcmread(path)
        except (EngineRejected, OSError):
            continue  # the latter: what pydicom cannot read whole the node refuses to store
        found.append(Case(instance, sent, content, source, pydicom.dcmread(io.BytesIO(content)), job))
    return found


def test_most_images_of_the_corpus_may_leave_and_each_class_is_there(cases: list[Case]) -> None:
    assert len(cases) >= 270
    classes = {case.instance.sop_class_uid.rpartition("1.4.1.1.")[2] for case in cases}
    assert classes >= {"1", "1.1", "2", "2.2", "4", "4.1", "7.3", "77.1.6"}
    syntaxes = {case.instance.transfer_syntax_uid for case in cases}
    assert len(syntaxes) >= 8


def _all_elements(ds: Dataset) -> Iterator[tuple[Dataset, DataElement]]:
    for tag in list(ds.keys()):
        try:
            element = ds[tag]
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, EOFError, OSError, OverflowError):
            continue
        yield ds, element
        if element.VR == "SQ":
            for item in element.value:
                yield from _all_elements(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        return
    elif isinstance(value, (list, tuple)) or hasattr(value, "__iter__"):
        for part in value:
            yield from _texts(part)
    elif value is not None:
        yield str(value)


def _tokens(element: DataElement) -> Iterator[bytes]:
    """What would give a value away: its texts and their parts, the start of its bytes."""
    if isinstance(element.value, bytes):
        if len(element.value) >= 8 and len(set(element.value[:32])) >= 6:
            yield element.value[:32]
        return
    if element.VR == "PN":
        texts = [str(name) for name in (element.value if isinstance(element.value, list) else [element.value])]
    elif element.VR in ("US", "SS", "UL", "SL", "FL", "FD", "AT", "SQ", "US or SS"):
        return
    else:
        texts = list(_texts(element.value))
    for text in texts:
        for part in {text, *re.split(r"[\^=\s,;:/\\]+", text)}:
            if len(part) >= 4:
                yield part.encode("utf-8", "replace")
                yield part.encode("latin-1", "replace")


def test_no_value_outside_the_allow_list_survives_in_the_corpus(cases: list[Case]) -> None:
    leaks, looked_for = [], 0
    for case in cases:
        pixels = case.back.PixelData
        head = case.content.replace(pixels, b"", 1)
        assert len(head) <= len(case.content) - len(pixels)
        for made in (*case.job.handed_out, case.job.patient_id):  # a number may stand in them by chance
            head = head.replace(made.encode(), b"")
        for owner, element in [*_all_elements(case.source), *_all_elements(case.source.file_meta)]:
            if (element.keyword in ALLOWED and element.VR != "UI") or element.keyword in ("PixelData", "SOPClassUID"):
                continue
            if element.VR == "UI" and str(element.value) in UID_dictionary:
                continue
            for token in _tokens(element):
                looked_for += 1
                if token in head and not _is_allowed_value(case.back, token):
                    leaks.append((case.instance.path, element.tag, token, type(owner).__name__))
    assert leaks == []
    assert looked_for > 20_000


_OURS = b"Attribute allow-list, UIDs of one job REMOVED JOB- PYDICOM 3.0 1.2.826.0.1.3680043.8.498.1"


def _is_allowed_value(back: Dataset, token: bytes) -> bool:
    """Whether the token is a value, or part of a value, that every object may have: a term, a number, our own words."""
    if token in _OURS:
        return True
    text = token.decode("utf-8", "replace")
    for _, element in _all_elements(back):
        if element.VR == "UI" and not all(uid in UID_dictionary for uid in _texts(element.value)):
            continue  # a job's UID that holds the token by chance is looked at by a person
        if element.keyword in ALLOWED | {"CodeMeaning", "CodeValue"} and any(
            text in one for one in _texts(element.value)
        ):
            return True
    return False


def test_pixels_leave_as_they_are_stored(cases: list[Case]) -> None:
    for case in cases:
        stored = case.source.PixelData
        assert case.back.PixelData in (stored, stored + b"\0"), case.instance.path
        assert case.back.PixelData[: len(stored)] == stored
        assert case.sent.transfer_syntax_uid == case.back.file_meta.TransferSyntaxUID
        for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
            assert case.back.get(keyword) == case.source.get(keyword), (case.instance.path, keyword)


def test_every_uid_that_left_is_the_jobs_or_registered_and_comes_back(cases: list[Case]) -> None:
    seen: set[str] = set()
    for case in cases:
        originals = {
            str(uid).strip(" \0")
            for _, element in _all_elements(case.source)
            if element.VR == "UI" and element.value
            for uid in ([element.value] if isinstance(element.value, str) else element.value)
        }
        for _, element in _all_elements(case.back):
            if element.VR == "UI":
                for uid in [element.value] if isinstance(element.value, str) else element.value:
                    assert uid in UID_dictionary or uid in case.job.handed_out, (case.instance.path, element.tag)
                    if uid in case.job.handed_out:
                        assert case.job.handed_out[uid] in originals
        assert case.back.SOPInstanceUID == case.sent.sop_instance_uid == case.back.file_meta.MediaStorageSOPInstanceUID
        seen |= set(case.job.handed_out)
        again = Pseudonyms(Path(case.instance.path).name, SECRET)
        again.learn(read_header(case.instance))
        assert again.handed_out == case.job.handed_out
    assert len(seen) > 800


def test_the_geometry_is_the_same(cases: list[Case], tmp_path: Path) -> None:
    compared = 0
    for number, case in enumerate(cases):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(case.content)
        try:
            before = read_image(case.instance)
        except SeriesRejected:
            continue
        after = read_image(_stored(path))
        path.unlink()
        assert len(before.planes) == len(after.planes)
        for one, other in zip(before.planes, after.planes, strict=True):
            for keyword in (
                *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "EchoTime"),
                *("InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "RescaleSlope", "StackID"),
                *("RescaleIntercept", "WindowCenter", "WindowWidth", "PixelPaddingValue", "PhotometricInterpretation"),
            ):
                assert one.get(keyword) == other.get(keyword), (case.instance.path, keyword)
            compared += 1
    assert compared > 250


def test_dcmtk_reads_what_leaves(cases: list[Case], tool: Callable[[str], str], tmp_path: Path) -> None:
    for number, case in enumerate(cases):
        (tmp_path / f"{number:04d}.dcm").write_bytes(case.content)
    done = subprocess.run(
        [tool("dcmdump"), "-q", "-M", "+P", "0008,0018", "+P", "0010,0010", *sorted(tmp_path.glob("*.dcm"))],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
    )
    uids = re.findall(r"^\(0008,0018\) UI \[([0-9.]+)", done.stdout, re.MULTILINE)
    assert uids == [case.sent.sop_instance_uid for case in cases], done.stderr[:2000]
    assert set(re.findall(r"^\(0010,0010\) PN \[([^\]]*)", done.stdout, re.MULTILINE)) == {
        case.job.patient_id for case in cases
    }


def test_a_clean_image_stays_one_for_dciodvfy(cases: list[Case], tool: Callable[[str], str], tmp_path: Path) -> None:
    """No error that the source has not: what is mandatory is kept, emptied or replaced."""
    path, checked = tmp_path / "out.dcm", 0
    plain = [case for case in cases if case.instance.sop_class_uid.endswith((".1.1.2", ".1.1.4", ".1.1.1"))]
    for case in plain[::2]:
        path.write_bytes(case.content)
        if not _errors(tool("dciodvfy"), case.instance.path):
            assert _errors(tool("dciodvfy"), path) == set(), case.instance.path
            checked += 1
    assert checked >= 3


def _errors(dciodvfy: str, path: Path | str) -> set[str]:
    done = subprocess.run([dciodvfy, "-new", str(path)], capture_output=True, text=True, errors="replace", timeout=30)
    return {line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")}


# --- what comes back -------------------------------------------------------------------------------------------------


def _result(job: Pseudonyms, leaving: Dataset, **changes: Any) -> Dataset:
    """A segmentation as an engine would send it back."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    ds.SOPInstanceUID, ds.SeriesInstanceUID = "1.9.9.1", "1.9.9"
    ds.StudyInstanceUID = leaving.StudyInstanceUID
    ds.FrameOfReferenceUID = leaving.FrameOfReferenceUID
    ds.PatientName, ds.PatientID, ds.PatientIdentityRemoved = job.patient_id, job.patient_id, "YES"
    ds.StudyDescription = "made up by the engine"
    ds.SeriesDescription = "Gefäße"
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = leaving.SOPClassUID, leaving.SOPInstanceUID
    series = Dataset()
    series.SeriesInstanceUID = leaving.SeriesInstanceUID
    series.ReferencedInstanceSequence = [image]
    ds.ReferencedSeriesSequence = [series]
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


def _source(tmp_path: Path) -> Dataset:
    ds = _image(
        SpecificCharacterSet=["", "ISO 2022 IR 87"],
        PatientName="Yamada^Tarou=山田^太郎",
        PatientBirthDate="19700101",
        PatientSex="M",
        AccessionNumber="ACC-1",
        StudyDate="20260101",
        IssuerOfPatientID="Hospital",
    )
    return read_header(_write(tmp_path / "source.dcm", ds))


def test_a_returned_object_gets_its_uids_and_its_patient_back(tmp_path: Path) -> None:
    source = _source(tmp_path)
    job = _job()
    returned = _result(job, pseudonymised(source, job))
    path = tmp_path / "back.dcm"
    dcmwrite(path, job.restored(returned, source), implicit_vr=False, little_endian=True)
    back = pydicom.dcmread(path, force=True)
    assert (back.StudyInstanceUID, back.FrameOfReferenceUID) == ("1.2.3", "1.2.3.99")
    (series,) = back.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3.4"
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.1"
    assert series.ReferencedInstanceSequence[0].ReferencedSOPClassUID == CTImageStorage
    assert (back.SOPInstanceUID, back.SeriesInstanceUID) == ("1.9.9.1", "1.9.9")
    assert str(back.PatientName) == "Yamada^Tarou=山田^太郎"
    assert (back.PatientID, back.PatientBirthDate, back.PatientSex) == ("MRN-4711", "19700101", "M")
    assert (back.IssuerOfPatientID, back.AccessionNumber, back.StudyDate) == ("Hospital", "ACC-1", "20260101")
    assert back.SeriesDescription == "Gefäße"
    assert "StudyDescription" not in back and "PatientIdentityRemoved" not in back
    assert returned.PatientID == job.patient_id  # what came is not changed


def test_what_was_sent_before_a_restart_is_understood_after_it(tmp_path: Path) -> None:
    source = _source(tmp_path)
    before = _job()
    returned = _result(before, pseudonymised(source, before))
    after = _job()
    with pytest.raises(ForeignReference):
        after.restored(returned, source)
    after.learn(source)
    assert after.restored(returned, source).StudyInstanceUID == "1.2.3"


@pytest.mark.parametrize(
    ("keyword", "uid", "reason"),
    [
        ("StudyInstanceUID", "1.2.3", "no study of this job"),
        ("StudyInstanceUID", "2.25.1", "no study of this job"),
        ("FrameOfReferenceUID", "1.2.3.99", "FrameOfReferenceUID was never handed out"),
        ("SOPInstanceUID", "1.2.3.4.1", "claims to be"),
        ("SeriesInstanceUID", "1.2.3.4", "series of the node"),
        ("SOPInstanceUID", "", "no SOP or Series"),
    ],
)
def test_a_returned_object_that_is_not_of_this_job_is_refused(
    tmp_path: Path, keyword: str, uid: str, reason: str
) -> None:
    source, job = _source(tmp_path), _job()
    returned = _result(job, pseudonymised(source, job), **{keyword: uid})
    with pytest.raises(ForeignReference, match=reason):
        job.restored(returned, source)


@pytest.mark.parametrize("keyword", ["ReferencedSOPInstanceUID", "SeriesInstanceUID"])
def test_a_reference_to_a_uid_never_handed_out_is_refused_however_deep(tmp_path: Path, keyword: str) -> None:
    source, job = _source(tmp_path), _job()
    returned = _result(job, pseudonymised(source, job))
    deep = Dataset()
    setattr(deep, keyword, "1.2.3.4.5.6")
    returned.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].PurposeOfReferenceCodeSequence = [deep]
    with pytest.raises(ForeignReference, match=keyword):
        job.restored(returned, source)
    sibling = job.restored(returned, source, siblings={"1.2.3.4.5.6"})  # another object that came back with it
    assert sibling.SOPInstanceUID == "1.9.9.1"


def test_a_returned_source_is_refused(tmp_path: Path) -> None:
    source, job = _source(tmp_path), _job()
    with pytest.raises(ForeignReference, match="claims to be"):
        job.restored(pseudonymised(source, job), source)


def test_another_jobs_objects_are_refused(tmp_path: Path) -> None:
    source, one, other = _source(tmp_path), _job("job-1"), _job("job-2")
    pseudonymised(source, one)
    with pytest.raises(ForeignReference, match="no study of this job"):
        one.restored(_result(other, pseudonymised(source, other)), source)
