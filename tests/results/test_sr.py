"""Reports, read back item by item: every finding and organ is there, says what the engine said, and points right."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.model import Origin, StoredInstance
from dicom_node.results import codes
from dicom_node.results.seg import SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.values import (
    Finding,
    Findings,
    LabelVolume,
    Measurements,
    Presence,
    ResultContext,
    ResultValue,
    SegmentMeasurement,
)

PRESENCE = {code.value: presence for presence, code in codes.PRESENCE.items()}


def _name(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def _child(item: Dataset, value: str) -> Dataset:
    found: list[Dataset] = [child for child in item.ContentSequence if _name(child) == value]
    assert len(found) == 1
    return found[0]


def _groups(report: Dataset) -> list[Dataset]:
    return list(_child(report, "126010").ContentSequence)


def _template(group: Dataset) -> str:
    return str(group.ContentTemplateSequence[0].TemplateIdentifier)


def _presence(group: Dataset) -> Presence | None:
    """The qualitative evaluation of the very concept the group is about."""
    finding = _child(group, "121071").ConceptCodeSequence[0]
    evaluations = [
        item.ConceptCodeSequence[0]
        for item in group.ContentSequence
        if item.ValueType == "CODE" and _name(item) == finding.CodeValue
    ]
    return PRESENCE[str(evaluations[0].CodeValue)] if evaluations else None


def _numbers(group: Dataset) -> dict[str, tuple[float, str]]:
    return {
        _name(item): (
            float(item.MeasuredValueSequence[0].NumericValue),
            str(item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue),
        )
        for item in group.ContentSequence
        if item.ValueType == "NUM"
    }


def _texts(item: Dataset, value: str) -> list[str]:
    return [str(child.TextValue) for child in item.ContentSequence if _name(child) == value]


def _referenced(item: Dataset) -> Iterator[str]:
    for child in item.get("ContentSequence", []):
        if "ReferencedSOPSequence" in child:
            yield str(child.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        yield from _referenced(child)


def _evidence(report: Dataset) -> set[str]:
    return {
        str(instance.ReferencedSOPInstanceUID)
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }


# --- findings --------------------------------------------------------------------------------------------------------


def test_every_finding_is_a_group_that_says_what_the_engine_said(
    radiograph: Callable[..., Dataset],
    findings_on: Callable[..., Findings],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image = radiograph()
    findings = findings_on(image)
    report = reread(SrEncoder().encode([findings], [image], context, [])[0])
    groups = _groups(report)
    assert len(groups) == len(findings.items) == 11
    for group, finding in zip(groups, findings.items, strict=True):
        assert _template(group) == "1501"
        code = _child(group, "121071").ConceptCodeSequence[0]
        assert (code.CodeValue, code.CodingSchemeDesignator) == (finding.code.value, finding.code.scheme)
        assert _presence(group) is finding.presence
        assert _texts(group, "112039") == [f"demo-model: {finding.name}"]
        assert _texts(group, "111001") == ["demo-model"] and _texts(group, "111003") == ["1.2.0"]
        assert _texts(group, "111002") == ["threshold=0.41", "window=64"]
        if finding.confidence is None:
            assert _numbers(group) == {}
        else:
            value, unit = _numbers(group)["111012"]
            assert unit == "%" and value == pytest.approx(100 * finding.confidence, abs=0.005)
        assert list(_referenced(group)) == [str(image.SOPInstanceUID)]
    assert {_presence(group) for group in groups} == set(Presence)


def test_an_undetermined_finding_has_no_certainty_even_when_the_engine_has_one(
    radiograph: Callable[..., Dataset], context: ResultContext
) -> None:
    image = radiograph()
    finding = Finding(
        key="pneumothorax",
        name="Pneumothorax",
        code=codes.FINDINGS["pneumothorax"].code,
        presence=Presence.UNDETERMINED,
        confidence=0.7,
    )
    findings = Findings(sop_instance_uid=str(image.SOPInstanceUID), items=(finding,))
    (group,) = _groups(SrEncoder().encode([findings], [image], context, [])[0])
    assert _presence(group) is Presence.UNDETERMINED and _numbers(group) == {}
    assert _texts(group, "111002") == ["window=64"]


def test_the_site_is_the_engines_or_else_that_of_the_table(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    image = radiograph()
    findings = findings_on(image)
    elsewhere = replace(findings.items[0], site=codes.CHEST)
    findings = replace(findings, items=(elsewhere, *findings.items[1:]))
    groups = _groups(SrEncoder().encode([findings], [image], context, [])[0])
    sites = [str(_child(group, "363698007").ConceptCodeSequence[0].CodeValue) for group in groups]
    assert sites[:4] == [codes.CHEST.value, codes.HEART.value, codes.PLEURA.value, codes.PLEURA.value]


def test_the_report_tells_model_version_image_and_patient(
    radiograph: Callable[..., Dataset],
    findings_on: Callable[..., Findings],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image = radiograph()
    report = reread(SrEncoder().encode([findings_on(image)], [image], context, [])[0])
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34" and report.Modality == "SR"
    assert (report.PatientID, str(report.PatientName)) == ("P-0815", "Doe^Jane")
    assert (report.PatientAge, report.PatientSex) == ("045Y", "F")
    assert report.ContributingEquipmentSequence[0].SoftwareVersions == "1.2.0"
    entry = _child(_child(report, "111028"), "126200").ContentSequence[0]
    assert entry.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert _child(entry, "121139").ConceptCodeSequence[0].CodeValue == "CR"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert _child(report, "121058").ConceptCodeSequence[0].CodeValue == "363679005"
    flags = (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag)
    assert flags == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    assert _evidence(report) == {str(image.SOPInstanceUID)}


def test_a_radiograph_of_an_unknown_class_without_a_matrix_is_reported_on_too(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    image = radiograph(sop_class_uid="1.2.840.10008.5.1.4.1.1.6", modality="US")  # retired
    del image.Rows, image.Columns
    (report,) = SrEncoder().encode([findings_on(image)], [image], context, [])
    assert set(_referenced(report)) == {str(image.SOPInstanceUID)}
    assert "ContentSequence" not in _child(_child(report, "111028"), "126200").ContentSequence[0]


def test_a_demonstration_says_so_in_the_text_and_the_series(
    radiograph: Callable[..., Dataset],
    findings_on: Callable[..., Findings],
    context: ResultContext,
    product_context: ResultContext,
) -> None:
    image = radiograph()
    (report,) = SrEncoder().encode([findings_on(image, ("inverted grey scale repaired",))], [image], context, [])
    comments = " ".join(_texts(report, "121106"))
    assert "not for clinical use" in comments and "inverted grey scale repaired" in comments
    assert report.SeriesDescription == "AI DEMONSTRATION: Findings, demo-model 1.2.0"
    silent = replace(context, provenance=replace(context.provenance, notice=""))
    (report,) = SrEncoder().encode([findings_on(image)], [image], silent, [])
    assert "Demonstration, not for clinical use" in _texts(report, "121106")
    (report,) = SrEncoder().encode([findings_on(image)], [image], product_context, [])
    assert report.SeriesDescription == "AI: Findings, demo-model 1.2.0"
    assert "clinical use" not in " ".join(_texts(report, "121106"))


def test_the_private_scheme_is_identified_only_where_it_is_used(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    image = radiograph()
    findings = findings_on(image)
    (report,) = SrEncoder().encode([findings], [image], context, [])
    assert [item.CodingSchemeDesignator for item in report.CodingSchemeIdentificationSequence] == ["99DICOMNODE"]
    public = replace(findings, items=tuple(item for item in findings.items if item.code.scheme != "99DICOMNODE"))
    (report,) = SrEncoder().encode([public], [image], context, [])
    assert "CodingSchemeIdentificationSequence" not in report


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_confidence_that_is_none_is_an_error(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext, confidence: float
) -> None:
    image = radiograph()
    findings = findings_on(image)
    wrong = replace(findings, items=(replace(findings.items[0], confidence=confidence),))
    with pytest.raises(EncodingError, match="confidence"):
        SrEncoder().encode([wrong], [image], context, [])


def test_findings_on_an_image_that_is_no_source_are_an_error(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    with pytest.raises(EncodingError, match="no source for the image"):
        SrEncoder().encode([findings_on(radiograph())], [radiograph()], context, [])


def test_nothing_to_say_makes_no_report(radiograph: Callable[..., Dataset], context: ResultContext) -> None:
    image = radiograph()
    empty = Findings(sop_instance_uid=str(image.SOPInstanceUID), items=())
    assert list(SrEncoder().encode([empty, Measurements(items=())], [image], context, [])) == []
    assert list(SrEncoder().encode([], [], context, [])) == []


# --- measurements ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Any],
    volume_of: Callable[..., LabelVolume],
    measurements_of: Callable[..., Measurements],
    reread: Callable[[Dataset], Dataset],
) -> Callable[..., tuple[list[Dataset], list[Dataset], list[Dataset], Measurements]]:
    """Images, segmentations and reports of one run, and what was measured."""

    def make(
        context: ResultContext, numbers: tuple[int, ...] = (1, 2, 3, 4), with_seg: bool = True, **lacking: Presence
    ) -> tuple[list[Dataset], list[Dataset], list[Dataset], Measurements]:
        images = ct_series()
        array = labels(images, numbers) if numbers else np.zeros((len(images), 24, 32), dtype=np.uint8)
        measurements: Measurements = measurements_of(("slices interpolated",), **lacking)
        values: list[ResultValue] = [volume_of(images, array), measurements]
        segs = list(SegEncoder().encode(values, images, context, [])) if with_seg else []
        reports = [reread(report) for report in SrEncoder().encode(values, images, context, segs)]
        return images, segs, reports, measurements

    return make


def test_a_measured_organ_is_tied_to_its_segment_by_reference_and_tracking_uid(
    measured: Callable[..., Any], context: ResultContext
) -> None:
    images, (seg,), (report,), measurements = measured(context)
    described = {int(item.SegmentNumber): item for item in seg.SegmentSequence}
    groups = _groups(report)
    assert len(groups) == 4
    for group, item in zip(groups, measurements.items, strict=True):
        assert _template(group) == "1411"
        reference = _child(group, "121191").ReferencedSOPSequence[0]
        assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        segment = described[int(reference.ReferencedSegmentNumber)]
        assert segment.TrackingUID == _child(group, "112040").UID
        assert _texts(group, "112039") == [segment.TrackingID]
        assert segment.SegmentLabel == item.segment.label
        assert images[0].SeriesInstanceUID == _child(group, "121232").UID
        numbers = _numbers(group)
        assert [unit for _, unit in numbers.values()] == ["cm3", "[hnsf'U]"]
        assert numbers["118565006"][0] == pytest.approx(item.volume_cm3, abs=0.00051)
        assert numbers["112031"][0] == pytest.approx(item.mean_hu, abs=0.005)
        assert _child(_child(group, "112031"), "121401").ConceptCodeSequence[0].CodeValue == codes.MEAN.value
        site = _child(group, "363698007")
        assert site.ConceptCodeSequence[0].CodeValue == item.segment.type.value
        side = [str(child.ConceptCodeSequence[0].CodeValue) for child in site.get("ContentSequence", [])]
        assert side == ([item.segment.modifier.value] if item.segment.modifier else [])
    assert _evidence(report) == {str(image.SOPInstanceUID) for image in images} | {str(seg.SOPInstanceUID)}
    assert set(_referenced(report)) <= _evidence(report)
    assert "slices interpolated" in " ".join(_texts(report, "121106"))


def test_segment_numbers_follow_the_segmentation_when_an_organ_is_missing(
    measured: Callable[..., Any], context: ResultContext
) -> None:
    _, (seg,), reports, _ = measured(context, (2, 4), liver=Presence.ABSENT, kidney_right=Presence.UNDETERMINED)
    numbers = {str(item.TrackingUID): int(item.SegmentNumber) for item in seg.SegmentSequence}
    referenced = {
        str(_child(group, "112040").UID): int(_child(group, "121191").ReferencedSOPSequence[0].ReferencedSegmentNumber)
        for group in _groups(reports[0])
    }
    assert referenced == numbers and sorted(numbers.values()) == [1, 2]


def test_an_organ_without_voxels_gets_a_group_that_says_absent_or_undetermined(
    measured: Callable[..., Any], context: ResultContext
) -> None:
    _, segs, reports, _ = measured(context, (2, 4), liver=Presence.ABSENT, kidney_right=Presence.UNDETERMINED)
    assert len(segs) == 1 and len(reports) == 2
    assert [_template(group) for group in _groups(reports[0])] == ["1411", "1411"]
    assert "Liver (absent), Right kidney (undetermined)" in " ".join(_texts(reports[0], "121106"))
    liver, kidney = _groups(reports[1])
    assert (_template(liver), _template(kidney)) == ("1501", "1501")
    assert (_presence(liver), _presence(kidney)) == (Presence.ABSENT, Presence.UNDETERMINED)
    for group in (liver, kidney):
        assert _numbers(group) == {} and not list(_referenced(group))
        assert _texts(group, "121106") == ["why not"]
    side = _child(_child(kidney, "363698007"), "272741003").ConceptCodeSequence[0]
    assert side.CodeValue == codes.RIGHT.value
    assert len({str(report.SeriesInstanceUID) for report in reports}) == 1
    assert len({report.SeriesDescription for report in reports}) == 1
    assert [int(report.InstanceNumber) for report in reports] == [1, 2]


def test_without_any_voxel_there_is_no_segmentation_and_one_report_that_says_so(
    measured: Callable[..., Any], context: ResultContext
) -> None:
    nothing = dict.fromkeys(("liver", "spleen", "kidney_right", "kidney_left"), Presence.ABSENT)
    images, segs, (report,), _ = measured(context, (), **nothing)
    assert segs == []
    assert [_presence(group) for group in _groups(report)] == [Presence.ABSENT] * 4
    assert _evidence(report) == {str(image.SOPInstanceUID) for image in images}


def test_without_a_segmentation_to_point_at_the_measurements_are_still_told(
    measured: Callable[..., Any], context: ResultContext
) -> None:
    _, _, (report,), measurements = measured(context, with_seg=False)
    for group, item in zip(_groups(report), measurements.items, strict=True):
        assert _template(group) == "1501" and _presence(group) is Presence.PRESENT
        assert _numbers(group)["118565006"][0] == pytest.approx(item.volume_cm3, abs=0.00051)


@pytest.mark.parametrize(
    ("volume_cm3", "mean_hu"), [(None, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (5.0, float("inf"))]
)
def test_a_measurement_that_is_none_is_an_error(
    ct_series: Callable[..., list[Dataset]],
    organs: Any,
    context: ResultContext,
    volume_cm3: float | None,
    mean_hu: float,
) -> None:
    item = SegmentMeasurement(segment=organs[0], presence=Presence.PRESENT, volume_cm3=volume_cm3, mean_hu=mean_hu)
    with pytest.raises(EncodingError):
        SrEncoder().encode([Measurements(items=(item,))], ct_series(), context, [])


def test_an_organ_without_a_mean_attenuation_has_a_volume_alone(
    ct_series: Callable[..., list[Dataset]], organs: Any, context: ResultContext
) -> None:
    item = SegmentMeasurement(segment=organs[0], presence=Presence.PRESENT, volume_cm3=5.0, mean_hu=None)
    (report,) = SrEncoder().encode([Measurements(items=(item,))], ct_series(), context, [])
    assert _numbers(_groups(report)[0]) == {"118565006": (5.0, "cm3")}


# --- re-runs ---------------------------------------------------------------------------------------------------------


def test_a_report_names_the_reports_it_follows_and_nothing_else(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    image = radiograph()
    (first,) = SrEncoder().encode([findings_on(image)], [image], context, [])

    def stored(sop_class_uid: str, sop_instance_uid: str) -> StoredInstance:
        return StoredInstance(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            study_instance_uid=str(first.StudyInstanceUID),
            series_instance_uid=str(first.SeriesInstanceUID),
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path="",
            data_set_offset=0,
            data_set_length=0,
            sha256="",
            origin=Origin.PRODUCED,
        )

    again = replace(
        context,
        run_key="run 2",
        run_number=2,
        predecessors=(
            stored("1.2.840.10008.5.1.4.1.1.66.4", "1.2.3"),
            stored(str(first.SOPClassUID), str(first.SOPInstanceUID)),
        ),
    )
    (second,) = SrEncoder().encode([findings_on(image)], [image], again, [])
    (study,) = second.PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (instance,) = series.ReferencedSOPSequence
    assert study.StudyInstanceUID == first.StudyInstanceUID
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert instance.ReferencedSOPInstanceUID == first.SOPInstanceUID != second.SOPInstanceUID
    assert "PredecessorDocumentsSequence" not in first
    tracked = [[str(_child(group, "112040").UID) for group in _groups(report)] for report in (first, second)]
    assert tracked[0] == tracked[1] and len(set(tracked[0])) == 11
