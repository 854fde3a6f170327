"""Findings and measurements as structured reports: Comprehensive 3D SR, TID 1500.

Radiograph findings: one TID 1501 group each, absent and undetermined ones too, for absent is not the same as not
looked for. Organ measurements: a TID 1411 group tied to its segment by reference and Tracking UID; an organ without
voxels, or without a segmentation to point at, gets a TID 1501 group that says Absent, Undetermined or Present. The
two kinds of group go into two documents of one series: PixelMed's validator, which decides for others whether a report
is fit, applies one of the two templates to every group of a document and finds errors where they are mixed. Numbers
that an engine elsewhere gives as they are (Quantities): one TID 1501 group with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _report as report
from dicom_node.results import codes
from dicom_node.results._shell import images_of
from dicom_node.results._sources import by_uid
from dicom_node.values import (
    Code,
    Finding,
    Findings,
    LabelVolume,
    Measurements,
    Presence,
    Quantities,
    ResultContext,
    ResultValue,
    Segment,
    SegmentMeasurement,
)

__all__ = ["SrEncoder"]

_LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"  # pydicom does not name it yet
_CERTAINTY_REMARK = "Certainty of Finding is the algorithm's confidence, in percent, that the finding is present"


class SrEncoder:
    """Kind `sr`: every Findings, every Measurements and every Quantities with something in it becomes one report, or
    two of Measurements, see above.

    `encode` returns data sets in Explicit VR Little Endian, not decoded yet, with `file_meta`. A report succeeds
    (Predecessor Documents) the reports among `context.predecessors`.
    """

    kind = "sr"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError for a confidence or measurement that is no number in
        its range, and for an image the findings are on that is not among the sources.
        """
        told = [value for value in values if isinstance(value, Findings | Measurements | Quantities) and value.items]
        if not told:
            return []
        with common.quiet():
            found = by_uid(sources)
            algorithm = common.Algorithm.of(context.provenance)
            volumes = [value for value in values if isinstance(value, LabelVolume)]
            reports: list[report.Report] = []
            for number, value in enumerate(told, start=1):
                if isinstance(value, Findings):
                    reports.append(_findings_report(value, found, context, algorithm))
                elif isinstance(value, Quantities):
                    reports.append(_quantities_report(value, number, found, context, algorithm))
                else:
                    reports += _measurement_reports(value, _images(volumes, found), already, context, algorithm)
            return [report.document(made, number, context, algorithm) for number, made in enumerate(reports, start=1)]


# --- findings on a radiograph ----------------------------------------------------------------------------------------


def _findings_report(
    findings: Findings,
    sources: Mapping[str, Dataset],
    context: ResultContext,
    algorithm: common.Algorithm,
) -> report.Report:
    image = sources.get(findings.sop_instance_uid)
    if image is None:
        raise EncodingError(f"no source for the image {findings.sop_instance_uid} the findings are on")
    comments = [text for text in (common.remarks(context, findings.notes), _CERTAINTY_REMARK) if text]
    return report.Report(
        key=f"findings {findings.sop_instance_uid}",
        what="Findings",
        source=image,
        groups=[_finding_group(finding, image, context, algorithm) for finding in findings.items],
        images=[image],
        library=[image],
        comments=comments,
    )


def _finding_group(
    finding: Finding, image: Dataset, context: ResultContext, algorithm: common.Algorithm
) -> sr.MeasurementsAndQualitativeEvaluations:
    threshold = [] if finding.threshold is None else [f"threshold={finding.threshold:g}"]
    site = finding.site or codes.finding_site(finding.code)
    uid = common.tracking_uid(context, str(image.SOPInstanceUID), finding.key)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=uid, identifier=common.tracking_identifier(algorithm, finding.name)
        ),
        finding_type=codes.concept(finding.code),
        finding_sites=[sr.FindingSite(anatomic_location=codes.concept(site))] if site else None,
        algorithm_id=report.algorithm_identification(algorithm, *threshold),
        measurements=_certainty(finding),
        qualitative_evaluations=[report.evaluation(finding.code, finding.presence)],
        source_images=[
            sr.SourceImageForMeasurementGroup(
                referenced_sop_class_uid=str(image.SOPClassUID), referenced_sop_instance_uid=str(image.SOPInstanceUID)
            )
        ],
    )


def _certainty(finding: Finding) -> list[sr.Measurement] | None:
    """Percent, 0 to 100 (TID 4006); none where the input did not let the algorithm say."""
    if finding.confidence is None or finding.presence is Presence.UNDETERMINED:
        return None
    if not 0.0 <= finding.confidence <= 1.0:
        raise EncodingError(f"{finding.key}: confidence {finding.confidence} is not within 0 to 1")
    return [report.measured(codes.CERTAINTY, 100.0 * finding.confidence, codes.PERCENT, 2)]


# --- numbers about images ---------------------------------------------------------------------------------------------


def _quantities_report(
    quantities: Quantities,
    number: int,
    sources: Mapping[str, Dataset],
    context: ResultContext,
    algorithm: common.Algorithm,
) -> report.Report:
    images = images_of(quantities.sop_instance_uids, sources, "a measurement")
    series, first = str(images[0].SeriesInstanceUID), images[0]
    single = [first] if len(images) == 1 else []  # of a volume the evidence lists every slice, and that is enough
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=common.tracking_uid(context, "quantities", series),
            identifier=common.tracking_identifier(algorithm, "Measurements"),
        ),
        algorithm_id=report.algorithm_identification(algorithm),
        measurements=[report.measured(item.code, item.value, item.unit, None) for item in quantities.items],
        source_images=[
            sr.SourceImageForMeasurementGroup(
                referenced_sop_class_uid=str(image.SOPClassUID), referenced_sop_instance_uid=str(image.SOPInstanceUID)
            )
            for image in single
        ]
        or None,
    )
    remarks = common.remarks(context, quantities.notes)
    return report.Report(
        key=f"quantities {number} {series}",
        what="Measurements",
        source=first,
        groups=[group],
        images=images,
        library=single,
        comments=[remarks] if remarks else [],
    )


# --- measurements on segments ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _SegmentReference:
    """A segment of a segmentation encoded before, found by its Tracking UID."""

    segmentation: Dataset
    number: int
    source_series_uid: str


def _images(volumes: Sequence[LabelVolume], sources: Mapping[str, Dataset]) -> list[Dataset]:
    """The images measured on, in an order that does not depend on the order they came in."""
    uids = [uid for volume in volumes for uid in volume.sop_instance_uids] or sorted(sources)
    return [sources[uid] for uid in dict.fromkeys(uids) if uid in sources] or [sources[min(sources)]]


def _measurement_reports(
    measurements: Measurements,
    images: Sequence[Dataset],
    already: Sequence[Dataset],
    context: ResultContext,
    algorithm: common.Algorithm,
) -> list[report.Report]:
    """One report of the organs that have a segment, one of the others; either only with something in it."""
    found = _segments_by_tracking_uid(already)
    references = {
        item.segment.key: found.get(common.tracking_uid(context, item.segment.key)) for item in measurements.items
    }
    tied = [item for item in measurements.items if item.presence is Presence.PRESENT and references[item.segment.key]]
    others = [item for item in measurements.items if item not in tied]
    reports = []
    for name, items in (("segments", tied), ("organs", others)):
        if items:
            remarks = [common.remarks(context, measurements.notes)]
            if tied and items is tied:
                remarks.append(_elsewhere(others))
            reports.append(
                report.Report(
                    key=f"{name} {images[0].SeriesInstanceUID}",
                    what="Measurements",
                    source=images[0],
                    groups=[_organ_group(item, references[item.segment.key], context, algorithm) for item in items],
                    images=images,
                    objects=[item for item in already if _is_segmentation(item)],
                    comments=[remark for remark in remarks if remark],
                )
            )
    return reports


def _elsewhere(others: Sequence[SegmentMeasurement]) -> str:
    """So that who reads only the measurements knows what they leave out."""
    told = ", ".join(f"{common.clean(item.segment.label, 'LO')} ({item.presence.value})" for item in others)
    return f"Not measured, see the other report of this series: {told}" if told else ""


def _is_segmentation(dataset: Dataset) -> bool:
    return dataset.SOPClassUID in (SegmentationStorage, _LABEL_MAP_STORAGE)


def _segments_by_tracking_uid(already: Sequence[Dataset]) -> Mapping[str, _SegmentReference]:
    """The first object that has a segment, where it is told as bits and as a label map; a background has no UID."""
    found: dict[str, _SegmentReference] = {}
    for segmentation in already:
        if not _is_segmentation(segmentation):
            continue
        series = str(segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID)
        for segment in segmentation.SegmentSequence:
            if uid := str(segment.get("TrackingUID", "")):
                number = int(segment.SegmentNumber)
                reference = _SegmentReference(segmentation=segmentation, number=number, source_series_uid=series)
                found.setdefault(uid, reference)
    return found


def _organ_group(
    item: SegmentMeasurement, found: _SegmentReference | None, context: ResultContext, algorithm: common.Algorithm
) -> report.Group:
    segment = item.segment
    uid = common.tracking_uid(context, segment.key)
    label = common.clean(segment.label, "LO") or segment.key
    tracking = sr.TrackingIdentifier(uid=uid, identifier=common.tracking_identifier(algorithm, label))
    identification = report.algorithm_identification(algorithm)
    group: report.Group
    if item.presence is Presence.PRESENT and found is not None:
        group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking,
            referenced_segment=_referenced(found),
            finding_type=codes.concept(segment.type),
            finding_category=codes.concept(segment.category),
            finding_sites=_sites(segment),
            algorithm_id=identification,
            measurements=_organ_measurements(item),
        )
    else:
        group = sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking,
            finding_type=codes.concept(segment.type),
            finding_category=codes.concept(segment.category),
            finding_sites=_sites(segment),
            algorithm_id=identification,
            measurements=_organ_measurements(item) if item.presence is Presence.PRESENT else None,
            qualitative_evaluations=[report.evaluation(segment.type, item.presence)],
        )
    if note := common.clean(item.note, "LT"):
        report.group_container(group).ContentSequence.append(report.comment(note))
    return group


def _referenced(found: _SegmentReference) -> sr.ReferencedSegment:
    # the series, not each of its images: highdicom's from_segmentation would list an image item per slice and segment
    return sr.ReferencedSegment(
        sop_class_uid=str(found.segmentation.SOPClassUID),
        sop_instance_uid=str(found.segmentation.SOPInstanceUID),
        segment_number=found.number,
        source_series=sr.SourceSeriesForSegmentation(referenced_series_instance_uid=found.source_series_uid),
    )


def _sites(segment: Segment) -> list[sr.FindingSite] | None:
    """An organ lies where it is; left or right is told as laterality (CID 244), anything else as a modifier."""
    if not codes.same_code(codes.ANATOMICAL_STRUCTURE, segment.category):
        return None
    modifier = segment.modifier
    sided = any(codes.same_code(side, modifier) for side in (codes.LEFT, codes.RIGHT))
    return [
        sr.FindingSite(
            anatomic_location=codes.concept(segment.type),
            laterality=_concept(modifier) if sided else None,
            topographical_modifier=None if sided else _concept(modifier),
        )
    ]


def _concept(code: Code | None) -> sr.CodedConcept | None:
    return None if code is None else codes.concept(code)


def _organ_measurements(item: SegmentMeasurement) -> list[sr.Measurement]:
    """Volume, and the mean attenuation where the images are in Hounsfield units."""
    if item.volume_cm3 is None or item.volume_cm3 < 0:
        raise EncodingError(f"{item.segment.key}: present, but its volume is {item.volume_cm3}")
    found = [report.measured(codes.VOLUME, item.volume_cm3, codes.CUBIC_CENTIMETRE, 3)]
    if item.mean_hu is not None:
        found.append(report.measured(codes.ATTENUATION, item.mean_hu, codes.HOUNSFIELD_UNIT, 2, codes.MEAN))
    return found
