"""The parts every measurement report shares: one TID 1500 tree, one Comprehensive 3D SR around it.

PS3.16 TID 1500 (Imaging Measurement Report) with the algorithm as the only, device, observer (TID 1002): a person
observer would assert a human author. Documents are complete, unverified and preliminary (PS3.3 C.17.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from highdicom import sr
from highdicom.sr import RelationshipTypeValues
from pydicom.dataset import Dataset

from dicom_node import __version__
from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import codes
from dicom_node.results._sources import decoded, numbers, reference, skeleton
from dicom_node.values import Code, Presence, ResultContext

__all__ = [
    "Group",
    "Report",
    "algorithm_identification",
    "comment",
    "document",
    "evaluation",
    "group_container",
    "measured",
]

Group = sr.MeasurementsAndQualitativeEvaluations | sr.VolumetricROIMeasurementsAndQualitativeEvaluations

_SR_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.88.{number}" for number in ("11", "22", "33", "34", "35", "67", "68", "71", "72")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What makes one report differ from another.

    `key` names it within its run. It rests on `images`, and on `objects` encoded before (segmentations); patient and
    study are those of `source`.
    """

    key: str
    what: str
    source: Dataset
    groups: Sequence[Group]
    images: Sequence[Dataset]
    objects: Sequence[Dataset] = ()
    library: Sequence[Dataset] = ()
    comments: Sequence[str] = ()


def document(report: Report, number: int, context: ResultContext, algorithm: common.Algorithm) -> Dataset:
    """The report as a Comprehensive 3D SR data set in Explicit VR Little Endian, not decoded yet."""
    root = _tree(report.groups, algorithm)
    before: list[Dataset] = [comment(text) for text in report.comments]
    if report.library:
        before.append(_library(report.library))
    _insert_before_measurements(root, before)
    made = sr.Comprehensive3DSR(
        evidence=[skeleton(item) for item in (report.source, *report.objects)],
        content=_tree(report.groups[:1], algorithm),  # copied and parsed again, at 30 ms a group; the rest follows
        series_instance_uid=common.result_uid(
            "series", context.run_key, "sr", report.what, str(report.source.SeriesInstanceUID)
        ),
        series_number=common.series_number(context, "sr"),
        sop_instance_uid=common.result_uid("instance", context.run_key, "sr", report.key),
        instance_number=number,
        manufacturer=common.MAKER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=_predecessors(context) or None,
        manufacturer_model_name=common.MAKER,
        software_versions=__version__,
        device_serial_number=common.clean(context.node_name, "LO") or common.MAKER,
        series_description=common.series_description(context, algorithm, report.what),
    )
    made.ContentSequence = root.ContentSequence
    finished = common.finish(made, report.source, context, algorithm)
    finished.CurrentRequestedProcedureEvidenceSequence = [_evidence(report)]
    return common.encoded(finished)


def _evidence(report: Report) -> Dataset:
    """Every instance the report rests on, referenced in its tree or not (PS3.3 C.17.2); all are of one study."""
    by_series: dict[str, dict[str, Dataset]] = {}
    for instance in (*report.images, *report.objects):
        by_series.setdefault(str(instance.SeriesInstanceUID), {})[str(instance.SOPInstanceUID)] = instance
    study = Dataset()
    study.ReferencedSeriesSequence = []
    for series_uid, instances in by_series.items():
        series = Dataset()
        series.ReferencedSOPSequence = [reference(instance) for instance in instances.values()]
        series.SeriesInstanceUID = series_uid
        study.ReferencedSeriesSequence.append(series)
    study.StudyInstanceUID = str(report.source.StudyInstanceUID)
    return study


def _tree(groups: Sequence[Group], algorithm: common.Algorithm) -> Dataset:
    """The root container of TID 1500."""
    report = sr.MeasurementReport(
        observation_context=_observed_by(algorithm),
        procedure_reported=codes.concept(codes.IMAGING_PROCEDURE),
        imaging_measurements=groups,
        title=codes.concept(codes.MEASUREMENT_REPORT),
    )
    root: Dataset = report[0]
    return root


def _observed_by(algorithm: common.Algorithm) -> sr.ObservationContext:
    # TID 1004; (121012), (121014) and (121015) are the AIR equalities
    identity = sr.DeviceObserverIdentifyingAttributes(
        uid=algorithm.device_uid,
        name=algorithm.name,
        manufacturer_name=algorithm.manufacturer,
        model_name=algorithm.name,
    )
    device = sr.ObserverContext(observer_type=codes.concept(codes.DEVICE), observer_identifying_attributes=identity)
    return sr.ObservationContext(observer_device_context=device)


def _predecessors(context: ResultContext) -> list[Dataset]:
    """Predecessor Documents (PS3.3 C.17.2): the reports among the results this run follows."""
    found = []
    for earlier in context.predecessors:
        if earlier.sop_class_uid in _SR_CLASSES:
            item = Dataset()
            item.SOPClassUID = earlier.sop_class_uid
            item.SOPInstanceUID = earlier.sop_instance_uid
            item.StudyInstanceUID = earlier.study_instance_uid
            item.SeriesInstanceUID = earlier.series_instance_uid
            found.append(item)
    return found


# --- pieces of groups ------------------------------------------------------------------------------------------------


def algorithm_identification(algorithm: common.Algorithm, *more: str) -> sr.AlgorithmIdentification:
    """TID 4019: name, version and every parameter, `more` for this group (a threshold)."""
    return sr.AlgorithmIdentification(
        name=algorithm.name, version=algorithm.version, parameters=[*more, *algorithm.parameters] or None
    )


def evaluation(of: Code, presence: Presence) -> sr.QualitativeEvaluation:
    """Present, Absent or Undetermined (CID 240) of the very concept the group is about."""
    return sr.QualitativeEvaluation(name=codes.concept(of), value=codes.concept(codes.PRESENCE[presence]))


def measured(
    name: Code, value: float, unit: Code, digits: int | None, derivation: Code | None = None
) -> sr.Measurement:
    """A number rounded by us, so that its text (DS, 16 characters) is the number: to `digits` after the point, or where
    that is None to ten significant ones. Raises EncodingError: not finite.
    """
    if not abs(value) < float("inf"):
        raise EncodingError(f"{name.meaning}: {value} is no measurement")
    return sr.Measurement(
        name=codes.concept(name),
        value=float(f"{value:.9e}") if digits is None else round(float(value), digits),
        unit=codes.concept(unit),
        derivation=codes.concept(derivation) if derivation else None,
    )


def comment(text: str) -> sr.TextContentItem:
    """A remark for people; TID 1500 and its groups are extensible."""
    return sr.TextContentItem(
        name=codes.concept(codes.COMMENT), value=text, relationship_type=RelationshipTypeValues.CONTAINS
    )


def group_container(group: Group) -> Dataset:
    """The container item of a group, to append to."""
    container: Dataset = group[0]
    return container


# --- image library ---------------------------------------------------------------------------------------------------


def _insert_before_measurements(root: Dataset, added: Sequence[Dataset]) -> None:
    """What a reader must know first stands first: remarks, then the images."""
    items = list(root.ContentSequence)
    place = next(i for i, item in enumerate(items) if item.ConceptNameCodeSequence[0].CodeValue == "126010")
    root.ContentSequence = [*items[:place], *added, *items[place:]]


def _library(images: Sequence[Dataset]) -> sr.ContainerContentItem:
    """TID 1600: what the images are, without inventing what their headers do not tell."""
    library = sr.ContainerContentItem(
        name=codes.concept(Code(value="111028", scheme="DCM", meaning="Image Library")),
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
    group = sr.ContainerContentItem(
        name=codes.concept(Code(value="126200", scheme="DCM", meaning="Image Library Group")),
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
    group.ContentSequence = sr.ContentSequence([_entry(image) for image in images])
    library.ContentSequence = sr.ContentSequence([group])
    return library


def _entry(image: Dataset) -> sr.ImageContentItem:
    entry = sr.ImageContentItem(
        name=codes.concept(Code(value="260753009", scheme="SCT", meaning="Source")),
        referenced_sop_class_uid=str(image.SOPClassUID),
        referenced_sop_instance_uid=str(image.SOPInstanceUID),
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
    described: list[sr.ContentItem] = []
    if modality := _MODALITIES.get(str(decoded(image, "Modality") or "")):
        described.append(
            sr.CodeContentItem(
                name=codes.concept(Code(value="121139", scheme="DCM", meaning="Modality")),
                value=codes.concept(modality),
                relationship_type=RelationshipTypeValues.HAS_ACQ_CONTEXT,
            )
        )
    for keyword, name in _MATRIX:
        if size := numbers(image, keyword, 1):
            described.append(
                sr.NumContentItem(
                    name=codes.concept(name),
                    value=int(size[0]),
                    unit=codes.concept(Code(value="{pixels}", scheme="UCUM", meaning="Pixels")),
                    relationship_type=RelationshipTypeValues.HAS_ACQ_CONTEXT,
                )
            )
    if described:
        entry.ContentSequence = sr.ContentSequence(described)
    return entry


# CID 29 of the modalities radiographs come in
_MODALITIES = {
    "CR": Code(value="CR", scheme="DCM", meaning="Computed Radiography"),
    "DX": Code(value="DX", scheme="DCM", meaning="Digital Radiography"),
    "CT": Code(value="CT", scheme="DCM", meaning="Computed Tomography"),
}
_MATRIX = (
    ("Rows", Code(value="110910", scheme="DCM", meaning="Pixel Data Rows")),
    ("Columns", Code(value="110911", scheme="DCM", meaning="Pixel Data Columns")),
)
