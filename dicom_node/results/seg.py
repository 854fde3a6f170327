"""Labels as Segmentation objects (PS3.3 A.51 and C.8.20, Explicit VR Little Endian); those of slides: `_slides`.

One object per label volume: BINARY, a frame of bits for each segment on each plane, which every viewer with SEG
support reads; or LABELMAP, one frame of segment numbers for each plane, a third of the size and faster with many
organs, which older archives refuse. Planes are tied to their images by SOP Instance UID (and frame number); a segment
without a voxel is not described and a plane without a label has no frame; a volume without any label makes no object,
its report says so. highdicom writes the header, on one plane; `_frames` writes the frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom.seg import SegmentationTypeValues
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicom_node import __version__
from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results._frames import Frame, PlaneReference, functional_groups, label_pixels, mask_pixels
from dicom_node.results._planes import Grid, Plane, grid_of
from dicom_node.results._segments import check_values, content_description, description, values_of
from dicom_node.results._slides import slide_segmentation
from dicom_node.results._sources import by_uid, decoded, reference, skeleton
from dicom_node.values import (
    LabelVolume,
    ResultContext,
    ResultValue,
    Segment,
    SlideLabels,
)

__all__ = ["LabelmapEncoder", "SegEncoder"]


class SegEncoder:
    """Kind `seg`: every LabelVolume that holds a label becomes one BINARY segmentation on its source grid, and so do
    SlideLabels on the extent of their slide.

    `encode` returns data sets in Explicit VR Little Endian, not decoded yet, with `file_meta`. Segment numbers are 1
    to n over the segments that have voxels, in the order of their labels: what names a segment over objects and runs
    is its Tracking UID.
    """

    kind = "seg"
    _type = SegmentationTypeValues.BINARY

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError when labels and sources do not fit each other."""
        volumes = [value for value in values if isinstance(value, LabelVolume)]
        slides = [value for value in values if isinstance(value, SlideLabels)]
        made = []
        with common.quiet():
            found = by_uid(sources) if volumes or slides else {}
            for number, volume in enumerate(volumes, start=1):
                present = _labels_present(volume)
                segments = [segment for segment in volume.segments if present[:, segment.number].any()]
                if segments:
                    segments.sort(key=lambda segment: segment.number)
                    grid = grid_of(volume, found)
                    header = _header(self.kind, self._type, volume, segments, grid, context, number)
                    made.append(self._object(header, volume, segments, present, grid))
            for number, labels in enumerate(slides, start=len(volumes) + 1):
                if (one := slide_segmentation(self.kind, labels, found, context, number)) is not None:
                    made.append(one)
        return made

    def _object(
        self,
        header: Dataset,
        volume: LabelVolume,
        segments: Sequence[Segment],
        present: npt.NDArray[np.bool_],
        grid: Grid,
    ) -> Dataset:
        """By segment, then along the normal."""
        frames = [
            Frame(segment_number=number, label=segment.number, plane=plane, position_index=place)
            for number, segment in enumerate(segments, start=1)
            for place, plane in _places(present, grid)
            if present[plane, segment.number]
        ]
        return _completed(header, frames, grid, mask_pixels(volume.labels, frames))


class LabelmapEncoder(SegEncoder):
    """Kind `labelmap`: the same as one LABELMAP segmentation (Label Map Segmentation Storage), 8 bits a pixel.

    Its segments have the numbers, the Tracking UIDs and the descriptions they have in the BINARY one; number 0 is the
    background. It is another instance, in another series.
    """

    kind = "labelmap"
    _type = SegmentationTypeValues.LABELMAP

    def _object(
        self,
        header: Dataset,
        volume: LabelVolume,
        segments: Sequence[Segment],
        present: npt.NDArray[np.bool_],
        grid: Grid,
    ) -> Dataset:
        """Along the normal."""
        numbers = bytearray(256)
        for number, segment in enumerate(segments, start=1):
            numbers[segment.number] = number
        frames = [Frame(plane=plane, position_index=place) for place, plane in _places(present, grid)]
        return _completed(header, frames, grid, label_pixels(volume.labels, frames, bytes(numbers)))


def _places(present: npt.NDArray[np.bool_], grid: Grid) -> list[tuple[int, int]]:
    """Place along the normal, from 1, and plane; a plane without any label is not counted (PS3.3 C.7.6.17)."""
    kept = [int(plane) for plane in grid.order if present[plane].any()]
    return list(enumerate(kept, start=1))


def _completed(header: Dataset, frames: Sequence[Frame], grid: Grid, pixels: bytes) -> Dataset:
    header.NumberOfFrames = len(frames)
    del header.PerFrameFunctionalGroupsSequence, header.PixelData
    return common.encoded(header, functional_groups(frames, [_plane_reference(plane) for plane in grid.planes]), pixels)


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels_present(volume: LabelVolume) -> npt.NDArray[np.bool_]:
    """(planes, 256): which label is on which plane. Raises EncodingError for an array that is no label volume."""
    labels, uids = volume.labels, volume.sop_instance_uids
    if labels.dtype != np.uint8 or labels.ndim != 3 or len(labels) != len(uids):
        raise EncodingError(
            f"labels: {labels.dtype} {labels.shape}, expected uint8 with one plane for each of {len(uids)} images"
        )
    if volume.frame_numbers and len(volume.frame_numbers) != len(uids):
        raise EncodingError(f"frame_numbers: {len(volume.frame_numbers)} for {len(uids)} planes")
    if len(set(zip(uids, volume.frame_numbers or (1,) * len(uids), strict=True))) != len(uids):
        raise EncodingError("sop_instance_uids: an image has two planes")
    present = np.array([values_of(plane) for plane in labels])
    present[:, 0] = False
    anywhere: npt.NDArray[np.bool_] = np.any(present, axis=0)
    check_values(anywhere, volume.segments)
    return present


# --- header ----------------------------------------------------------------------------------------------------------


def _header(
    kind: str,
    type_: SegmentationTypeValues,
    volume: LabelVolume,
    segments: Sequence[Segment],
    grid: Grid,
    context: ResultContext,
    number: int,
) -> Dataset:
    algorithm = common.Algorithm.of(context.provenance)
    first = grid.first.image
    series = str(first.SeriesInstanceUID)
    dummy = np.zeros((1, *volume.labels.shape[1:]), dtype=np.uint8)
    dummy.reshape(-1)[: len(segments)] = np.arange(1, len(segments) + 1)  # one voxel each, so none is left out
    made = hd.seg.Segmentation(
        source_images=[_plane_skeleton(grid.first)],
        pixel_array=dummy,
        segmentation_type=type_,
        segment_descriptions=[
            description(segment, number, context, algorithm) for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=common.result_uid("series", context.run_key, kind, series),
        series_number=common.series_number(context, kind),
        sop_instance_uid=common.result_uid("instance", context.run_key, kind, series, str(number)),
        instance_number=number,
        manufacturer=common.MAKER,
        manufacturer_model_name=common.MAKER,
        software_versions=__version__,
        device_serial_number=common.clean(context.node_name, "LO") or common.MAKER,
        series_description=common.series_description(context, algorithm, "Segmentation"),
        content_label="AI_SEGMENTATION",
        content_description=content_description(volume.notes, segments),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    header = common.finish(made, first, context, algorithm)
    header.SegmentsOverlap = "NO"  # one label per voxel
    shared = header.SharedFunctionalGroupsSequence[0]
    if "SegmentIdentificationSequence" in shared:
        del shared.SegmentIdentificationSequence
    _measure(shared.PixelMeasuresSequence[0], grid)
    if "DimensionOrganizationType" in header:
        del header.DimensionOrganizationType
    _name_dimensions(header)
    _refer(header, grid)
    if text := common.remarks(context, volume.notes):
        header.ImageComments = text
    if part := str(decoded(first, "BodyPartExamined") or ""):
        header.BodyPartExamined = common.clean(part.upper(), "CS")
    return header


def _plane_skeleton(plane: Plane) -> Dataset:
    image = plane.image
    item = skeleton(image)
    item.FrameOfReferenceUID = str(image.FrameOfReferenceUID)
    item.PositionReferenceIndicator = common.clean(str(decoded(image, "PositionReferenceIndicator") or ""), "LO")
    item.Rows, item.Columns = int(image.Rows), int(image.Columns)
    item.ImageOrientationPatient = list(plane.orientation)
    item.ImagePositionPatient = list(plane.position)
    item.PixelSpacing = list(plane.pixel_spacing)
    item.SliceThickness = 1  # highdicom must find one; see `_measure`
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if value := decoded(image, keyword):  # once lossy, always lossy (PS3.3 C.7.6.1.1.5)
            setattr(item, keyword, value)
    return item


def _plane_reference(plane: Plane) -> PlaneReference:
    x, y, z = plane.position
    return PlaneReference(
        sop_class_uid=str(plane.image.SOPClassUID),
        sop_instance_uid=str(plane.image.SOPInstanceUID),
        position=(x, y, z),
        frame_number=plane.number,
    )


def _measure(measures: Dataset, grid: Grid) -> None:
    """Pixel Measures (PS3.3 C.7.6.16.2.1): a thickness the source does not tell is the distance of the nearest slices;
    a distance is told only where there is one. Raises EncodingError when nothing tells the thickness.
    """
    thickness = grid.first.thickness_mm or grid.nearest_mm
    if thickness is None:
        raise EncodingError("a label volume of one plane, and its image has no slice thickness")
    measures.SliceThickness = format_number_as_ds(thickness)
    if grid.spacing_mm is not None:
        measures.SpacingBetweenSlices = format_number_as_ds(grid.spacing_mm)
    elif "SpacingBetweenSlices" in measures:
        del measures.SpacingBetweenSlices  # highdicom's guess from one plane


def _name_dimensions(header: Dataset) -> None:
    """The dimension organization's UID is highdicom's random one; the object's own, derived, takes its place."""
    uid = common.result_uid("dimensions", str(header.SOPInstanceUID))
    for item in (*header.DimensionOrganizationSequence, *header.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _refer(header: Dataset, grid: Grid) -> None:
    """Common Instance Reference (PS3.3 C.12.2): every image of the volume, with or without a label on it."""
    if "SourceImageSequence" in header:
        del header.SourceImageSequence  # each frame names its own image
    series = Dataset()
    series.SeriesInstanceUID = str(grid.first.image.SeriesInstanceUID)
    series.ReferencedInstanceSequence = [reference(image) for image in grid.images]
    header.ReferencedSeriesSequence = [series]
