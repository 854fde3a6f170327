"""Identifiers of responses as bytes: what pydicom makes of them, and what it would have written."""

import io

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicom_node.services.answer import AnswerForm

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
    theirs = Dataset()
    for keyword, text in TEXTS.items():
        setattr(theirs, keyword, text)
    theirs.Rows = 512
    theirs.ReferencedStudySequence = []
    theirs.QueryRetrieveLevel, theirs.InstanceAvailability = "STUDY", "ONLINE"
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit, little
    write_dataset(out, theirs)
    texts = {"Rows": "512", **dict(reversed(TEXTS.items()))}
    form = AnswerForm(
        tuple(texts),
        ((0x00081110, "SQ"),),
        (("QueryRetrieveLevel", "STUDY"), ("InstanceAvailability", "ONLINE")),
        implicit_vr=implicit,
        little_endian=little,
    )
    assert form.encoded(tuple(texts.values())) == out.getvalue()


def test_what_is_named_twice_is_what_was_said_last() -> None:
    form = AnswerForm(
        ("StudyID", "RetrieveAETitle"),
        ((0x00200010, "SH"),),
        (("RetrieveAETitle", "NODE"),),
        implicit_vr=True,
        little_endian=True,
    )
    read = read_dataset(io.BytesIO(form.encoded(("7", "OTHER"))), True, True)
    assert read["StudyID"].is_empty
    assert read.RetrieveAETitle == "NODE"


@pytest.mark.parametrize(
    ("keyword", "text"), [("Rows", "many"), ("Rows", "70000"), ("PixelData", "x"), ("Rows", "1.5")]
)
def test_what_cannot_be_said_in_its_vr_goes_out_empty(keyword: str, text: str) -> None:
    form = AnswerForm((keyword,), implicit_vr=True, little_endian=True)
    read = read_dataset(io.BytesIO(form.encoded((text,))), True, True)
    assert read[keyword].is_empty


def test_a_text_too_long_for_its_field_is_cut_and_the_rest_can_be_read() -> None:
    form = AnswerForm(
        ("StudyDescription", "StudyID"), implicit_vr=False, little_endian=True, character_set="ISO_IR 192"
    )
    read = read_dataset(io.BytesIO(form.encoded(("ü" * 40_000, "7"))), False, True)
    assert read.StudyID == "7" and read.StudyDescription.startswith("üü")


def test_there_is_no_attribute_of_another_name() -> None:
    with pytest.raises(KeyError):
        AnswerForm(("NoSuchKeyword",), implicit_vr=True, little_endian=True)


def test_a_form_of_very_many_elements_is_made_in_no_time() -> None:
    tags = tuple((0x00091001 + 2 * number, "LO") for number in range(50_000))
    form = AnswerForm((), tags, implicit_vr=True, little_endian=True)
    assert len(form.encoded(())) == 8 * len(tags)
