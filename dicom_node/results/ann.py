"""Annotations on slides as Microscopy Bulk Simple Annotations (PS3.3 A.87.1 and C.37.1).

2D: column and row in the total pixel matrix of the one image they are on. A million nuclei are a few arrays, so they
are written here as arrays; single precision where that holds every coordinate exactly, else double.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from highdicom.color import CIELabColor
from pydicom.dataset import Dataset
from pydicom.uid import MicroscopyBulkSimpleAnnotationsStorage

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell, codes
from dicom_node.results._colors import display_color
from dicom_node.results._slides import matrix_of, specimen
from dicom_node.results._sources import by_uid
from dicom_node.values import AnnotationGroup, Annotations, GraphicType, ResultContext, ResultValue

__all__ = ["AnnEncoder"]

_FEWEST = {GraphicType.POINT: 1, GraphicType.POLYLINE: 2, GraphicType.POLYGON: 3}
_LARGEST = 0xFFFFFFFE


class AnnEncoder:
    """Kind `ann`: every Annotations with a shape in it becomes one object, a group of it for each group with a shape.

    Confidences become measurements of each shape (Certainty of Finding, percent), as findings have them in reports.
    """

    kind = "ann"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError for shapes and confidences that are none, for a shape
        that does not touch the slide, and for an image that is no slide among the sources.
        """
        told = [value for value in values if isinstance(value, Annotations)]
        told = [value for value in told if any(group.shapes for group in value.groups)]
        if not told:
            return []
        with common.quiet():
            found = by_uid(sources)
            algorithm = common.Algorithm.of(context.provenance)
            return [_object(value, found, number, context, algorithm) for number, value in enumerate(told, start=1)]


def _object(
    annotations: Annotations,
    sources: Mapping[str, Dataset],
    number: int,
    context: ResultContext,
    algorithm: common.Algorithm,
) -> Dataset:
    image = _shell.image_of(annotations.sop_instance_uid, sources, "annotations")
    matrix = matrix_of(image)
    made = _shell.shell(
        kind="ann",
        sop_class_uid=MicroscopyBulkSimpleAnnotationsStorage,
        modality="ANN",
        what="Annotations",
        source=image,
        number=number,
        context=context,
        algorithm=algorithm,
    )
    remarks = common.remarks(context, annotations.notes)
    made.ContentLabel = "AI_ANNOTATIONS"
    made.ContentDescription = _content_description(annotations)
    made.ContentCreatorName = ""
    made.AnnotationCoordinateType = "2D"
    made.PixelOriginInterpretation = "VOLUME"
    made.ReferencedImageSequence = _shell.referred([image])[0].ReferencedInstanceSequence
    made.ReferencedSeriesSequence = _shell.referred([image])
    made.update(specimen(image))
    groups = [group for group in annotations.groups if group.shapes]
    made.AnnotationGroupSequence = [
        _group(group, place, matrix, f"{made.SOPInstanceUID}", remarks, context, algorithm)
        for place, group in enumerate(groups, start=1)
    ]
    return common.encoded(common.finish(made, image, context, algorithm))


def _content_description(annotations: Annotations) -> str:
    """LO: what is there and how often, what was looked for in vain too."""
    counts = ", ".join(f"{len(group.shapes)} {common.clean(group.label, 'LO')}" for group in annotations.groups)
    return common.clean("; ".join((*annotations.notes, counts)), "LO")


def _group(
    group: AnnotationGroup,
    number: int,
    matrix: tuple[int, int],
    uid: str,
    remarks: str,
    context: ResultContext,
    algorithm: common.Algorithm,
) -> Dataset:
    label = common.clean(group.label, "LO") or "Annotations"
    points, starts = _points(group, label, matrix)
    made = Dataset()
    made.AnnotationGroupNumber = number
    made.AnnotationGroupUID = common.result_uid("annotation group", uid, str(number))
    made.AnnotationGroupLabel = label
    if remarks:
        made.AnnotationGroupDescription = remarks
    made.AnnotationGroupGenerationType = "AUTOMATIC"
    made.AnnotationGroupAlgorithmIdentificationSequence = [_shell.algorithm_identification(context, algorithm)]
    made.AnnotationPropertyCategoryCodeSequence = [codes.concept(group.category)]
    made.AnnotationPropertyTypeCodeSequence = [codes.concept(group.type)]
    made.NumberOfAnnotations = len(group.shapes)
    made.AnnotationAppliesToAllOpticalPaths = "YES"
    made.RecommendedDisplayCIELabValue = list(CIELabColor.from_rgb(*display_color(min(number, 255))).value)
    made.GraphicType = group.graphic_type.value
    single = points.astype("<f4")
    if np.array_equal(single, points):
        made.PointCoordinatesData = single.tobytes()
    else:
        made.DoublePointCoordinatesData = points.astype("<f8").tobytes()
    if group.graphic_type is not GraphicType.POINT:
        made.LongPrimitivePointIndexList = (2 * starts + 1).astype("<u4").tobytes()  # counts numbers, from 1
    if group.confidences:
        made.MeasurementsSequence = [_certainty(group, label)]
    return made


def _points(
    group: AnnotationGroup, label: str, matrix: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Every point (column, row), and which is each shape's first. Raises EncodingError, see `AnnEncoder.encode`."""
    fewest = _FEWEST[group.graphic_type]
    for shape in group.shapes:
        if shape.ndim != 2 or shape.shape[1] != 2 or len(shape) < fewest:
            raise EncodingError(f"{label}: a {group.graphic_type.value} of {shape.shape} coordinates")
    lengths = np.array([len(shape) for shape in group.shapes], np.int64)
    if group.graphic_type is GraphicType.POINT and (lengths != 1).any():
        raise EncodingError(f"{label}: a POINT of several points")
    points = np.concatenate(group.shapes).astype(np.float64)
    if points.nbytes > _LARGEST:
        raise EncodingError(f"{label}: {len(points)} points are more than an element can hold")
    if not np.isfinite(points).all():
        raise EncodingError(f"{label}: a coordinate is not finite")
    if group.graphic_type is GraphicType.POLYGON:
        points, lengths = _opened(points, lengths, label)
    starts = _starts(lengths)
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    rows, columns = matrix
    if ((high < 0) | (low > (columns, rows))).any():
        raise EncodingError(f"{label}: a shape lies outside the {columns} x {rows} pixels of its slide")
    return points, starts


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    starts: npt.NDArray[np.int64] = np.cumsum(lengths) - lengths
    return starts


def _opened(
    points: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], label: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Without a last point that is the first one again: PS3.3 C.37.1.2 closes polygons itself."""
    starts = _starts(lengths)
    ends = starts + lengths - 1
    again = (points[starts] == points[ends]).all(axis=1)
    lengths = lengths - again
    if (lengths < _FEWEST[GraphicType.POLYGON]).any():
        raise EncodingError(f"{label}: a POLYGON of fewer than three points")
    kept = np.ones(len(points), np.bool_)
    kept[ends[again]] = False
    return points[kept], lengths


def _certainty(group: AnnotationGroup, label: str) -> Dataset:
    """One value for each shape (PS3.3 C.37.1.2): percent, as in TID 4006."""
    told = np.array(group.confidences, np.float64)
    if len(told) != len(group.shapes) or not ((told >= 0) & (told <= 1)).all():
        raise EncodingError(f"{label}: {len(told)} confidences of {len(group.shapes)} shapes are not all within 0 to 1")
    measurements, values = Dataset(), Dataset()
    measurements.ConceptNameCodeSequence = [codes.concept(codes.CERTAINTY)]
    measurements.MeasurementUnitsCodeSequence = [codes.concept(codes.PERCENT)]
    values.FloatingPointValues = (100 * told).astype("<f4").tobytes()
    measurements.MeasurementValuesSequence = [values]
    return measurements
