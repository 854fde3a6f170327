"""Label volumes as Segmentation objects (PS3.3 A.51, BINARY, Explicit VR Little Endian).

One object per label volume. Planes are tied to their images by SOP Instance UID; a segment without a voxel is not
described and a plane without a label has no frame; a volume without any label makes no object, its report says so.
highdicom writes the header, on one plane; `_frames` writes the frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom.color import CIELabColor
from highdicom.spatial import get_volume_positions
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicom_node import __version__
from dicom_node.errors import EncodingError
from dicom_node.model import LabelVolume, ResultContext, ResultValue, Segment
from dicom_node.results import _common as common
from dicom_node.results import codes
from dicom_node.results._frames import Frame, PlaneReference, frame_elements
from dicom_node.results._sources import by_uid, decoded, numbers, reference, skeleton

__all__ = ["SegEncoder"]

_SAME_DIRECTION = 1e-3  # of a direction cosine
_SAME_PLACE_MM = 1e-3


class SegEncoder:
    """Kind `seg`: every LabelVolume that holds a label becomes one BINARY segmentation on its source grid.

    `encode` returns data sets in Explicit VR Little Endian, not decoded yet, with `file_meta`. Segment numbers are 1
    to n over the segments that have voxels, in the order of their labels: what names a segment over objects and runs
    is its Tracking UID.
    """

    kind = "seg"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError when labels and sources do not fit each other."""
        volumes = [value for value in values if isinstance(value, LabelVolume)]
        with common.quiet():
            found = by_uid(sources) if volumes else {}
            objects = [_segmentation(volume, found, context, number) for number, volume in enumerate(volumes, start=1)]
        return [made for made in objects if made is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """The planes of a volume: their images, in the order of the label array, and where along the normal each lies."""

    images: tuple[Dataset, ...]
    references: tuple[PlaneReference, ...]
    spacing_mm: float | None  # between slices, None when they are not a regular stack
    nearest_mm: float | None  # distance of the two nearest slices
    order: npt.NDArray[np.intp]  # plane indices, ascending along the normal


def _segmentation(
    volume: LabelVolume, sources: Mapping[str, Dataset], context: ResultContext, number: int
) -> Dataset | None:
    present = _labels_present(volume)
    segments = [segment for segment in volume.segments if present[:, segment.number].any()]
    if not segments:
        return None
    segments.sort(key=lambda segment: segment.number)
    grid = _grid(volume, sources)
    algorithm = common.Algorithm.of(context.provenance)
    header = _header(volume, segments, grid, context, algorithm, number)
    frames = _frames(segments, present, grid)
    header.NumberOfFrames = len(frames)
    del header.PerFrameFunctionalGroupsSequence, header.PixelData
    return common.encoded(header, frame_elements(volume.labels, frames, grid.references))


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels_present(volume: LabelVolume) -> npt.NDArray[np.bool_]:
    """(planes, 256): which label is on which plane. Raises EncodingError for an array that is no label volume."""
    labels = volume.labels
    if labels.dtype != np.uint8 or labels.ndim != 3 or len(labels) != len(volume.sop_instance_uids):
        raise EncodingError(
            f"labels: {labels.dtype} {labels.shape}, expected uint8 with one plane for each of "
            f"{len(volume.sop_instance_uids)} images"
        )
    if len(set(volume.sop_instance_uids)) != len(volume.sop_instance_uids):
        raise EncodingError("sop_instance_uids: an image has two planes")
    known = [segment.number for segment in volume.segments]
    if len(set(known)) != len(known) or not all(1 <= number <= 255 for number in known):
        raise EncodingError(f"segments: numbers {known} are not distinct and within 1 to 255")
    present = np.zeros((len(labels), 256), dtype=np.bool_)
    for plane, row in zip(labels, present, strict=True):
        if plane.any():
            row[plane] = True
    present[:, 0] = False
    stray = np.setdiff1d(np.flatnonzero(present.any(axis=0)), known)
    if stray.size:
        raise EncodingError(f"labels: value {stray[0]} has no segment")
    return present


def _frames(segments: Sequence[Segment], present: npt.NDArray[np.bool_], grid: _Grid) -> list[Frame]:
    """By segment, then along the normal; a plane without any label is not counted (PS3.3 C.7.6.17)."""
    kept = [int(plane) for plane in grid.order if present[plane].any()]
    places = {plane: index for index, plane in enumerate(kept, start=1)}
    return [
        Frame(segment_number=number, label=segment.number, plane=plane, position_index=places[plane])
        for number, segment in enumerate(segments, start=1)
        for plane in kept
        if present[plane, segment.number]
    ]


# --- grid ------------------------------------------------------------------------------------------------------------


def _grid(volume: LabelVolume, sources: Mapping[str, Dataset]) -> _Grid:
    """The grid of the volume's images. Raises EncodingError when they are not parallel planes of one series."""
    missing = [uid for uid in volume.sop_instance_uids if uid not in sources]
    if missing:
        raise EncodingError(f"no source for the plane of image {missing[0]}")
    images = tuple(sources[uid] for uid in volume.sop_instance_uids)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "FrameOfReferenceUID"):
        told = {str(decoded(image, keyword) or "") for image in images}
        if len(told) != 1 or "" in told:
            raise EncodingError(f"{keyword} is missing or differs between the images of a label volume")
    shape = tuple(float(size) for size in volume.labels.shape[1:])
    first = _plane_attributes(images[0], shape)
    positions = []
    for image in images:
        position, orientation, spacing = _plane_attributes(image, shape)
        off = np.abs(np.subtract(orientation, first[1])).max()
        if off > _SAME_DIRECTION or not np.allclose(spacing, first[2], rtol=_SAME_DIRECTION):
            raise EncodingError("orientation or pixel spacing differs between the images of a label volume")
        positions.append(position)
    along = np.array(positions) @ np.cross(first[1][:3], first[1][3:])
    order = np.argsort(along, kind="stable")
    nearest = float(np.diff(along[order]).min()) if len(along) > 1 else None
    if nearest is not None and nearest < _SAME_PLACE_MM:
        raise EncodingError("two images of a label volume lie in the same place")
    return _Grid(
        images=images,
        references=tuple(_plane_reference(image) for image in images),
        spacing_mm=_slice_spacing(positions, first[1]),
        nearest_mm=nearest,
        order=order,
    )


def _plane_attributes(
    image: Dataset, shape: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Position, orientation and pixel spacing of an image whose matrix must be `shape`."""
    if (numbers(image, "NumberOfFrames", 1) or (1.0,)) != (1.0,):
        raise EncodingError("a plane of a label volume belongs to a single-frame image, not to a multi-frame one")
    size = (numbers(image, "Rows", 1) or ()) + (numbers(image, "Columns", 1) or ())
    if size != shape:
        raise EncodingError(f"labels: planes of {shape} pixels do not fit an image of {size}")
    position = numbers(image, "ImagePositionPatient", 3)
    orientation = numbers(image, "ImageOrientationPatient", 6)
    spacing = numbers(image, "PixelSpacing", 2)
    if position is None or orientation is None or spacing is None:
        raise EncodingError("an image of a label volume has no position, orientation or pixel spacing")
    return position, orientation, spacing


def _slice_spacing(positions: Sequence[tuple[float, ...]], orientation: tuple[float, ...]) -> float | None:
    if len(positions) < 2:
        return None
    spacing, _ = get_volume_positions(positions, orientation)
    return None if spacing is None else abs(float(spacing))


def _plane_reference(image: Dataset) -> PlaneReference:
    x, y, z = (_decimal(value) for value in image.ImagePositionPatient)
    return PlaneReference(
        sop_class_uid=str(image.SOPClassUID), sop_instance_uid=str(image.SOPInstanceUID), position=(x, y, z)
    )


def _decimal(value: object) -> str:
    """DS of a number as the source wrote it, when that fits the VR: a frame lies exactly where its image does."""
    text = str(value).strip()
    return text if len(text) <= 16 else str(format_number_as_ds(float(text)))


# --- header ----------------------------------------------------------------------------------------------------------


def _header(
    volume: LabelVolume,
    segments: Sequence[Segment],
    grid: _Grid,
    context: ResultContext,
    algorithm: common.Algorithm,
    number: int,
) -> Dataset:
    first = grid.images[int(grid.order[0])]
    series = str(first.SeriesInstanceUID)
    names = ", ".join(common.clean(segment.label, "LO") for segment in segments)
    dummy = np.zeros((1, *volume.labels.shape[1:]), dtype=np.uint8)
    dummy.reshape(-1)[: len(segments)] = np.arange(1, len(segments) + 1)  # one voxel each, so none is left out
    made = hd.seg.Segmentation(
        source_images=[_plane_skeleton(first)],
        pixel_array=dummy,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(segment, number, context, algorithm) for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=common.result_uid("series", context.run_key, "seg", series),
        series_number=common.series_number(context, "seg"),
        sop_instance_uid=common.result_uid("instance", context.run_key, "seg", series, str(number)),
        instance_number=number,
        manufacturer=common.MAKER,
        manufacturer_model_name=common.MAKER,
        software_versions=__version__,
        device_serial_number=common.clean(context.node_name, "LO") or common.MAKER,
        series_description=common.series_description(context, algorithm, "Segmentation"),
        content_label="AI_SEGMENTATION",
        content_description=common.clean(names, "LO"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    header = common.finish(made, first, context, algorithm)
    header.SegmentsOverlap = "NO"  # one label per voxel
    shared = header.SharedFunctionalGroupsSequence[0]
    if "SegmentIdentificationSequence" in shared:
        del shared.SegmentIdentificationSequence
    _measure(shared.PixelMeasuresSequence[0], first, grid)
    if "DimensionOrganizationType" in header:
        del header.DimensionOrganizationType
    _name_dimensions(header)
    _refer(header, grid)
    if text := common.remarks(context, volume.notes):
        header.ImageComments = text
    if part := str(decoded(first, "BodyPartExamined") or ""):
        header.BodyPartExamined = common.clean(part.upper(), "CS")
    return header


def _plane_skeleton(image: Dataset) -> Dataset:
    item = skeleton(image)
    item.FrameOfReferenceUID = str(image.FrameOfReferenceUID)
    item.PositionReferenceIndicator = common.clean(str(decoded(image, "PositionReferenceIndicator") or ""), "LO")
    item.Rows, item.Columns = int(image.Rows), int(image.Columns)
    item.ImageOrientationPatient = [_decimal(value) for value in image.ImageOrientationPatient]
    item.ImagePositionPatient = list(_plane_reference(image).position)
    item.PixelSpacing = [_decimal(value) for value in image.PixelSpacing]
    item.SliceThickness = 1  # highdicom must find one; see `_measure`
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if value := decoded(image, keyword):  # once lossy, always lossy (PS3.3 C.7.6.1.1.5)
            setattr(item, keyword, value)
    return item


def _measure(measures: Dataset, image: Dataset, grid: _Grid) -> None:
    """Pixel Measures (PS3.3 C.7.6.16.2.1): a thickness the source does not tell is the distance of the nearest slices;
    a distance is told only where there is one. Raises EncodingError when nothing tells the thickness.
    """
    told = numbers(image, "SliceThickness", 1)
    thickness = told[0] if told and told[0] > 0 else grid.nearest_mm
    if thickness is None:
        raise EncodingError("a label volume of one plane, and its image has no slice thickness")
    measures.SliceThickness = format_number_as_ds(thickness)
    if grid.spacing_mm is not None:
        measures.SpacingBetweenSlices = format_number_as_ds(grid.spacing_mm)
    elif "SpacingBetweenSlices" in measures:
        del measures.SpacingBetweenSlices  # highdicom's guess from one plane


def _description(
    segment: Segment, number: int, context: ResultContext, algorithm: common.Algorithm
) -> hd.seg.SegmentDescription:
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
        display_color=CIELabColor.from_rgb(*segment.color_rgb) if segment.color_rgb else None,
    )
    if algorithm.parameters:
        # highdicom wants a mapping; ours are sentences already (LT)
        text = common.clean("; ".join(algorithm.parameters), "LT")
        described.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters = text
    if segment.modifier is not None:
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [codes.concept(segment.modifier)]
    return described


def _name_dimensions(header: Dataset) -> None:
    """The dimension organization's UID is highdicom's random one; the object's own, derived, takes its place."""
    uid = common.result_uid("dimensions", str(header.SOPInstanceUID))
    for item in (*header.DimensionOrganizationSequence, *header.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _refer(header: Dataset, grid: _Grid) -> None:
    """Common Instance Reference (PS3.3 C.12.2): every image of the volume, with or without a label on it."""
    if "SourceImageSequence" in header:
        del header.SourceImageSequence  # each frame names its own image
    series = Dataset()
    series.SeriesInstanceUID = str(grid.images[0].SeriesInstanceUID)
    series.ReferencedInstanceSequence = [reference(grid.images[int(plane)]) for plane in grid.order]
    header.ReferencedSeriesSequence = [series]
