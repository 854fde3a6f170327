"""Identifiers of responses as bytes: what pydicom makes of them, and what it would have written."""

import io

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicom_node.services.answer import Answer

TEXTS = {
    "PatientName": "Doe^Jane",
    "PatientID": "odd",
    "StudyInstanceUID": "1.2.3",
    "ModalitiesInStudy": "CT\\SEG",
    "NumberOfStudyRelatedInstances": "12",
    "StudyDate": "20260102",
    "StudyDescription": "",
}


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_the_bytes_are_those_pydicom_writes(implicit: bool, little: bool) -> None:
    answer, theirs = Answer(), Dataset()
    for keyword, text in reversed(TEXTS.items()):
        answer.put(keyword, text)
        setattr(theirs, keyword, text)
    answer.put("Rows", "512")
    theirs.Rows = 512
    answer.put_empty(0x00081110, "SQ")
    theirs.ReferencedStudySequence = []
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit, little
    write_dataset(out, theirs)
    assert answer.encoded(implicit_vr=implicit, little_endian=little) == out.getvalue()


@pytest.mark.parametrize(
    ("keyword", "text"), [("Rows", "many"), ("Rows", "70000"), ("PixelData", "x"), ("Rows", "1.5")]
)
def test_what_cannot_be_said_in_its_vr_goes_out_empty(keyword: str, text: str) -> None:
    answer = Answer()
    answer.put(keyword, text)
    read = read_dataset(io.BytesIO(answer.encoded(implicit_vr=True, little_endian=True)), True, True)
    assert read[keyword].is_empty


def test_a_text_too_long_for_its_field_is_cut_and_the_rest_can_be_read() -> None:
    answer = Answer("ISO_IR 192")
    answer.put("StudyDescription", "ü" * 40_000)
    answer.put("StudyID", "7")
    read = read_dataset(io.BytesIO(answer.encoded(implicit_vr=False, little_endian=True)), False, True)
    assert read.StudyID == "7" and read.StudyDescription.startswith("üü")


def test_there_is_no_attribute_of_another_name() -> None:
    with pytest.raises(KeyError):
        Answer().put("NoSuchKeyword", "x")
