"""Documents, read back by pydicom and taken out again by dcmtk: every byte is the engine's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results.pdf import PdfEncoder
from dicom_node.values import Document, ResultContext

PDF = b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"


def _document(*images: Dataset, pdf: bytes = PDF, title: str = "Chest report") -> Document:
    return Document(pdf=pdf, sop_instance_uids=tuple(str(image.SOPInstanceUID) for image in images), title=title)


@pytest.mark.parametrize("pdf", [PDF, PDF + b"\n"])  # an odd number of bytes and an even one
def test_the_bytes_are_the_engines_for_pydicom_and_for_dcmtk(
    pdf: bytes,
    radiograph: Callable[..., Dataset],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    image = radiograph()
    (made,) = PdfEncoder().encode([_document(image, pdf=pdf)], [image], context, [])
    read = reread(made)
    assert read.EncapsulatedDocument[: read.EncapsulatedDocumentLength] == pdf
    check = run(tool("dcm2pdf"), written(made), tmp_path / "taken out.pdf")
    assert check.returncode == 0, check.stderr
    assert (tmp_path / "taken out.pdf").read_bytes().rstrip(b"\0") == pdf


def test_a_document_says_what_it_is_about_and_that_it_may_name_the_patient(
    ct_series: Callable[..., list[Dataset]], context: ResultContext, product_context: ResultContext
) -> None:
    images = ct_series()
    (made,) = PdfEncoder().encode([_document(*images[2:5])], images, context, [])
    assert (made.SOPClassUID, made.Modality) == ("1.2.840.10008.5.1.4.1.1.104.1", "DOC")
    assert (made.MIMETypeOfEncapsulatedDocument, made.BurnedInAnnotation) == ("application/pdf", "YES")
    assert made.VerificationFlag == "UNVERIFIED"
    told = [item.ReferencedSOPInstanceUID for item in made.SourceInstanceSequence]
    assert told == [image.SOPInstanceUID for image in images[2:5]]
    assert (made.PatientID, made.StudyInstanceUID) == ("P-0815", images[0].StudyInstanceUID)
    assert made.DocumentTitle == "AI DEMONSTRATION: Chest report"
    assert "not for clinical use" in made.ContentSequence[0].TextValue
    assert made.ContributingEquipmentSequence[0].SoftwareVersions == "1.2.0"
    (made,) = PdfEncoder().encode([_document(images[0], title="")], images, product_context, [])
    assert made.DocumentTitle == "AI" and "ContentSequence" not in made


def test_equal_arguments_give_equal_bytes_and_another_run_another_object(
    radiograph: Callable[..., Dataset], context: ResultContext, written: Callable[[Dataset], Path]
) -> None:
    image = radiograph()
    first, again = (PdfEncoder().encode([_document(image)], [image], context, [])[0] for _ in range(2))
    (other,) = PdfEncoder().encode([_document(image)], [image], replace(context, run_key="run 2"), [])
    assert written(first).read_bytes() == written(again).read_bytes()
    assert other.SOPInstanceUID != first.SOPInstanceUID and other.SeriesInstanceUID != first.SeriesInstanceUID


def test_what_is_no_pdf_about_a_source_is_an_error(radiograph: Callable[..., Dataset], context: ResultContext) -> None:
    image = radiograph()
    for document, message in (
        (_document(image, pdf=b""), "no PDF"),
        (_document(image, pdf=b"<html>Please log in</html>"), "no PDF"),
        (_document(radiograph()), "no source for the image"),
        (_document(), "of no study"),
    ):
        with pytest.raises(EncodingError, match=message):
            PdfEncoder().encode([document], [image], context, [])
    assert PdfEncoder().encode([], [image], context, []) == []


def test_foreign_validators_find_nothing_wrong(
    radiograph: Callable[..., Dataset],
    context: ResultContext,
    product_context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    image = radiograph()
    for told in (context, product_context):
        (made,) = PdfEncoder().encode([_document(image)], [image], told, [])
        assert no_errors(written(made)) == []
