"""Numbers of engines elsewhere in a report: each to ten digits, on the images it was given for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results import codes
from dicom_node.results.sr import SrEncoder
from dicom_node.values import Code, Findings, Quantities, Quantity, ResultContext, ResultValue

AREA = Code(value="42798000", scheme="SCT", meaning="Area")
MM2 = Code(value="mm2", scheme="UCUM", meaning="square millimeter")
OWN = Code(value="TCR", scheme="99DICOMNODE", meaning="Tumour cell ratio")


def _quantities(*images: Dataset, items: tuple[Quantity, ...] | None = None) -> Quantities:
    told = items or (
        Quantity(code=AREA, value=1234567.891234567, unit=MM2),
        Quantity(code=OWN, value=-0.000123456789123, unit=codes.PERCENT),
        Quantity(code=AREA, value=0, unit=MM2),
    )
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    return Quantities(sop_instance_uids=uids, items=told, notes=("two tiles unread",))


def _items(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence", []):
        yield child
        yield from _items(child)


def test_every_number_is_in_the_report_in_its_order_with_its_code_and_unit(
    radiograph: Callable[..., Dataset], context: ResultContext, reread: Callable[[Dataset], Dataset]
) -> None:
    image = radiograph()
    report = reread(SrEncoder().encode([_quantities(image)], [image], context, [])[0])
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    numbers = [
        item
        for item in _items(report)
        if item.ValueType == "NUM" and item.ConceptNameCodeSequence[0].CodeValue not in ("110910", "110911")
    ]
    values = [item.MeasuredValueSequence[0] for item in numbers]
    assert [float(value.NumericValue) for value in values] == [1234567.891, -0.0001234567891, 0]  # ten digits
    assert all(len(str(value.NumericValue)) <= 16 for value in values)
    assert [item.ConceptNameCodeSequence[0].CodeValue for item in numbers] == ["42798000", "TCR", "42798000"]
    assert [value.MeasurementUnitsCodeSequence[0].CodeValue for value in values] == ["mm2", "%", "mm2"]
    texts = [item.TextValue for item in _items(report) if item.ValueType == "TEXT"]
    assert any("not for clinical use" in text and "two tiles unread" in text for text in texts)
    assert "demo-model" in texts and "1.2.0" in texts
    assert [item.CodingSchemeDesignator for item in report.CodingSchemeIdentificationSequence] == ["99DICOMNODE"]


def test_a_report_rests_on_every_image_and_points_at_the_only_one(
    radiograph: Callable[..., Dataset], ct_series: Callable[..., list[Dataset]], context: ResultContext
) -> None:
    image, stack = radiograph(), ct_series()
    (of_one,) = SrEncoder().encode([_quantities(image)], [image, *stack], context, [])
    (of_all,) = SrEncoder().encode([_quantities(*stack)], [image, *stack], context, [])
    for report, images in ((of_one, [image]), (of_all, stack)):
        (study,) = report.CurrentRequestedProcedureEvidenceSequence
        told = [
            instance.ReferencedSOPInstanceUID
            for series in study.ReferencedSeriesSequence
            for instance in series.ReferencedSOPSequence
        ]
        assert told == [one.SOPInstanceUID for one in images]
        assert report.StudyInstanceUID == images[0].StudyInstanceUID
    pointed = [
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in _items(of_one) if item.ValueType == "IMAGE"
    ]
    assert set(pointed) == {image.SOPInstanceUID}
    assert not [item for item in _items(of_all) if item.ValueType == "IMAGE"]


def test_equal_arguments_give_equal_bytes_and_reports_of_one_run_differ(
    radiograph: Callable[..., Dataset],
    findings_on: Callable[..., Findings],
    context: ResultContext,
    written: Callable[[Dataset], Path],
) -> None:
    image = radiograph()
    told: list[ResultValue] = [_quantities(image), findings_on(image), _quantities(image)]
    first, again = (SrEncoder().encode(told, [image], context, []) for _ in range(2))
    assert [written(made).read_bytes() for made in first] == [written(made).read_bytes() for made in again]
    assert len({made.SOPInstanceUID for made in first}) == 3 == len({made.InstanceNumber for made in first})
    (other, *_) = SrEncoder().encode(told, [image], replace(context, run_key="run 2"), [])
    assert other.SOPInstanceUID != first[0].SOPInstanceUID


def test_what_is_no_number_about_a_source_is_an_error(
    radiograph: Callable[..., Dataset], context: ResultContext
) -> None:
    image = radiograph()
    for value in (float("nan"), float("inf"), float("-inf")):
        wrong = _quantities(image, items=(Quantity(code=AREA, value=value, unit=MM2),))
        with pytest.raises(EncodingError, match="Area"):
            SrEncoder().encode([wrong], [image], context, [])
    with pytest.raises(EncodingError, match="no source for the image"):
        SrEncoder().encode([_quantities(radiograph())], [image], context, [])
    nothing = replace(_quantities(image), items=())
    assert SrEncoder().encode([nothing], [image], context, []) == []
