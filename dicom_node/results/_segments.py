"""What a segment says of itself, on patients and on slides, as bits and as label maps; and which labels there are."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom.color import CIELabColor

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import codes
from dicom_node.results._colors import display_color
from dicom_node.values import ResultContext, Segment

__all__ = ["check_values", "content_description", "description", "values_of"]


def values_of(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """(256,): which values there are. Eight pixels are compared at a time: most are as the eight before them."""
    flat = np.ascontiguousarray(plane).reshape(-1)
    whole = flat.size // 8 * 8
    words = flat[:whole].view(np.uint64)
    begins = np.ones(words.size, np.bool_)
    np.not_equal(words[1:], words[:-1], out=begins[1:])
    values = np.zeros(256, np.bool_)
    values[words[begins].view(np.uint8)] = True
    values[flat[whole:]] = True
    return values


def check_values(present: npt.NDArray[np.bool_], segments: Sequence[Segment]) -> None:
    """`present` (256,): which values a label array has. Raises EncodingError for one without a segment."""
    known = [segment.number for segment in segments]
    if len(set(known)) != len(known) or not all(1 <= number <= 255 for number in known):
        raise EncodingError(f"segments: numbers {known} are not distinct and within 1 to 255")
    stray = np.setdiff1d(np.flatnonzero(present), [0, *known])
    if stray.size:
        raise EncodingError(f"labels: value {stray[0]} has no segment")


def content_description(notes: Sequence[str], segments: Sequence[Segment]) -> str:
    """LO, which viewers list the object by: what was repaired, then what is in it. Image Comments has all of it."""
    names = ", ".join(common.clean(segment.label, "LO") for segment in segments)
    return common.clean("; ".join((*notes, names)), "LO")


def description(
    segment: Segment, number: int, context: ResultContext, algorithm: common.Algorithm
) -> hd.seg.SegmentDescription:
    """An item of Segment Sequence (PS3.3 C.8.20.2) with its Tracking UID, which is the organ's in every result."""
    label = common.clean(segment.label, "LO") or segment.key
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.concept(segment.category),
        segmented_property_type=codes.concept(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=algorithm.name,
            family=codes.concept(context.provenance.family),
            version=algorithm.version,
            source=algorithm.manufacturer,
        ),
        tracking_uid=common.tracking_uid(context, segment.key),
        tracking_id=common.tracking_identifier(algorithm, label),
        display_color=CIELabColor.from_rgb(*(segment.color_rgb or display_color(segment.number))),
    )
    if algorithm.parameters:
        # highdicom wants a mapping; ours are sentences already (LT)
        text = common.clean("; ".join(algorithm.parameters), "LT")
        described.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters = text
    if segment.modifier is not None:
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [codes.concept(segment.modifier)]
    return described
