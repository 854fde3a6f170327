"""Segmentations: right voxels on the right images whatever order they come in, and what a reader needs around them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dictionary
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dicom_node.errors import EncodingError
from dicom_node.results import codes
from dicom_node.results.seg import SegEncoder
from dicom_node.values import LabelVolume, ResultContext

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (0.9659258, 0.2588190, 0.0, -0.2241439, 0.8365163, 0.5)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
Labels = npt.NDArray[np.uint8]


def _frames_by_image(seg: Dataset) -> dict[tuple[int, str], Labels]:
    """(segment number, SOP Instance UID of the image) to the frame's pixels."""
    pixels = seg.pixel_array.reshape(int(seg.NumberOfFrames), seg.Rows, seg.Columns)
    found = {}
    for frame, group in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[number, str(source.ReferencedSOPInstanceUID)] = frame
    assert len(found) == len(pixels)
    return found


def _groups_by_image(seg: Dataset) -> dict[tuple[int, str], Dataset]:
    """(segment number, SOP Instance UID of the image) to the frame's functional groups."""
    return dict(zip(_frames_by_image(seg), seg.PerFrameFunctionalGroupsSequence, strict=True))


def _expected(volume: LabelVolume) -> dict[tuple[int, str], Labels]:
    present = [segment.number for segment in volume.segments if (volume.labels == segment.number).any()]
    return {
        (number, uid): (plane == label).astype(np.uint8)
        for number, label in enumerate(present, start=1)
        for plane, uid in zip(volume.labels, volume.sop_instance_uids, strict=True)
        if (plane == label).any()
    }


def _assert_same_frames(seg: Dataset, volume: LabelVolume) -> None:
    frames, expected = _frames_by_image(seg), _expected(volume)
    assert frames.keys() == expected.keys()
    for key, frame in frames.items():
        np.testing.assert_array_equal(frame, expected[key])


@pytest.mark.parametrize(
    ("orientation", "size", "missing"),
    [
        pytest.param(AXIAL, (24, 32), (), id="axial"),
        pytest.param(OBLIQUE, (24, 32), (), id="oblique"),
        pytest.param(CORONAL, (24, 32), (), id="coronal"),
        pytest.param(AXIAL, (23, 31), (), id="matrix that is no whole number of bytes"),
        pytest.param(AXIAL, (24, 32), (4, 5), id="missing slices"),
    ],
)
def test_the_fast_encoder_writes_what_highdicom_itself_would(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    orientation: Sequence[float],
    size: tuple[int, int],
    missing: Sequence[int],
) -> None:
    images = ct_series(orientation=orientation, rows=size[0], columns=size[1], missing=missing)
    array = labels(images)
    (made,) = SegEncoder().encode([volume_of(images, array)], images, context, [])
    ours = reread(made)
    algorithm = hd.AlgorithmIdentificationSequence("a", dictionary.DCM.ArtificialIntelligence, "1")
    theirs = hd.seg.Segmentation(
        source_images=images,
        pixel_array=array,
        segmentation_type="BINARY",
        segment_descriptions=[
            hd.seg.SegmentDescription(
                n, "x", dictionary.SCT.AnatomicalStructure, dictionary.SCT.Liver, "AUTOMATIC", algorithm
            )
            for n in (1, 2, 3, 4)
        ],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    assert ours.NumberOfFrames == theirs.NumberOfFrames
    frames, groups = _frames_by_image(ours), _groups_by_image(ours)
    planes = max(group.FrameContentSequence[0].DimensionIndexValues[1] for group in groups.values())
    their_frames, their_groups = _frames_by_image(theirs), _groups_by_image(theirs)
    assert frames.keys() == their_frames.keys()
    for key, frame in frames.items():
        np.testing.assert_array_equal(frame, their_frames[key])
        content = groups[key].FrameContentSequence[0]
        # highdicom counts planes against the normal, row x column, we along it
        content.DimensionIndexValues = [content.DimensionIndexValues[0], planes + 1 - content.DimensionIndexValues[1]]
        assert groups[key].to_json_dict() == their_groups[key].to_json_dict()
    expected = theirs.SharedFunctionalGroupsSequence[0]
    assert ours.SharedFunctionalGroupsSequence[0].to_json_dict() == expected.to_json_dict()
    for keyword in ("FrameOfReferenceUID", "Rows", "Columns", "SegmentsOverlap", "ImageType", "BitsAllocated"):
        assert ours[keyword].value == theirs[keyword].value
    pointers = [(item.DimensionIndexPointer, item.FunctionalGroupPointer) for item in theirs.DimensionIndexSequence]
    assert [(i.DimensionIndexPointer, i.FunctionalGroupPointer) for i in ours.DimensionIndexSequence] == pointers


@pytest.mark.parametrize("order", ["ascending", "reversed", "shuffled"])
def test_labels_lie_on_their_images_whatever_order_the_sources_come_in(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    order: str,
) -> None:
    images = ct_series()
    volume = volume_of(images, labels(images))
    straight = SegEncoder().encode([volume], images, context, [])[0]
    received = list(images)
    if order == "reversed":
        received.reverse()
    elif order == "shuffled":
        random.Random(7).shuffle(received)
    seg = reread(SegEncoder().encode([volume], received, context, [])[0])
    _assert_same_frames(seg, volume)
    assert seg.PixelData == straight.PixelData
    positions = {str(image.SOPInstanceUID): list(image.ImagePositionPatient) for image in images}
    for group in seg.PerFrameFunctionalGroupsSequence:
        uid = str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        assert list(group.PlanePositionSequence[0].ImagePositionPatient) == positions[uid]


def test_planes_given_in_any_order_make_the_same_frames(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
) -> None:
    images = ct_series()
    array = labels(images)
    order = random.Random(3).sample(range(len(images)), len(images))
    shuffled = volume_of([images[i] for i in order], array[order])
    (one,) = SegEncoder().encode([volume_of(images, array)], images, context, [])
    (other,) = SegEncoder().encode([shuffled], images, context, [])
    assert one.PixelData == other.PixelData
    assert one.PerFrameFunctionalGroupsSequence == other.PerFrameFunctionalGroupsSequence


def test_empty_planes_have_no_frame_but_every_image_is_referenced(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    images = ct_series()
    volume = volume_of(images, labels(images))
    seg = reread(SegEncoder().encode([volume], images, context, [])[0])
    with_frames = {uid for _, uid in _frames_by_image(seg)}
    assert str(images[0].SOPInstanceUID) not in with_frames
    assert {str(r.ReferencedSOPInstanceUID) for r in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == {
        str(image.SOPInstanceUID) for image in images
    }
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == images[0].SeriesInstanceUID


@pytest.mark.parametrize("numbers", [(2,), (1, 4), (3, 4)])
def test_a_segment_without_a_voxel_is_not_described_and_numbers_stay_without_gaps(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    numbers: tuple[int, ...],
) -> None:
    images = ct_series()
    volume = volume_of(images, labels(images, numbers))
    seg = reread(SegEncoder().encode([volume], images, context, [])[0])
    assert [int(item.SegmentNumber) for item in seg.SegmentSequence] == list(range(1, len(numbers) + 1))
    named = {segment.number: segment.label for segment in volume.segments}
    assert [item.SegmentLabel for item in seg.SegmentSequence] == [named[number] for number in numbers]
    _assert_same_frames(seg, volume)


def test_no_label_makes_no_segmentation(
    ct_series: Callable[..., list[Dataset]], volume_of: Callable[..., LabelVolume], context: ResultContext
) -> None:
    images = ct_series()
    empty = np.zeros((len(images), 24, 32), dtype=np.uint8)
    assert list(SegEncoder().encode([volume_of(images, empty)], images, context, [])) == []
    assert list(SegEncoder().encode([], [], context, [])) == []


def test_segments_tell_code_side_colour_algorithm_and_tracking(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    images = ct_series()
    seg = reread(SegEncoder().encode([volume_of(images, labels(images))], images, context, [])[0])
    assert seg.SegmentationType == "BINARY" and seg.Modality == "SEG" and seg.ContentLabel == "AI_SEGMENTATION"
    assert len({str(item.TrackingUID) for item in seg.SegmentSequence}) == 4
    right = seg.SegmentSequence[2]
    kind = right.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == codes.RIGHT.value
    assert right.SegmentedPropertyCategoryCodeSequence[0].CodeValue == codes.ANATOMICAL_STRUCTURE.value
    assert right.SegmentAlgorithmType == "AUTOMATIC" and right.SegmentAlgorithmName == "demo-model"
    assert right.TrackingID == "demo-model: Right kidney"
    algorithm = right.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
    assert algorithm.AlgorithmParameters == "window=64"
    lab = hd.color.CIELabColor.from_rgb(220, 60, 60)
    assert list(right.RecommendedDisplayCIELabValue) == list(lab.value)


def test_the_object_says_ai_demonstration_and_what_was_repaired(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    product_context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    images = ct_series()
    volume = volume_of(images, labels(images), ("slices 4 and 5 interpolated",))
    seg = reread(SegEncoder().encode([volume], images, context, [])[0])
    assert seg.SeriesDescription == "AI DEMONSTRATION: Segmentation, demo-model 1.2.0"
    assert "not for clinical use" in seg.ImageComments and "interpolated" in seg.ImageComments
    product = reread(SegEncoder().encode([volume], images, product_context, [])[0])
    assert product.SeriesDescription == "AI: Segmentation, demo-model 1.2.0"
    assert product.ImageComments == "slices 4 and 5 interpolated"
    assert 9000 <= seg.SeriesNumber < 10000 and seg.InstanceNumber == 1


def test_a_slice_thickness_nobody_tells_is_the_distance_of_the_slices(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
) -> None:
    images = ct_series()
    for image in images:
        del image.SliceThickness
    (seg,) = SegEncoder().encode([volume_of(images, labels(images))], images, context, [])
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (float(measures.SliceThickness), float(measures.SpacingBetweenSlices)) == (2.5, 2.5)


def test_writing_it_again_copies_the_bytes_and_leaves_the_arguments_alone(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
) -> None:
    images = ct_series()
    before = [image.to_json() for image in images]
    volume = volume_of(images, labels(images))
    (seg,) = SegEncoder().encode([volume], images, context, [])
    files = []
    for enforce in (True, True):
        buffer = BytesIO()
        dcmwrite(buffer, seg, enforce_file_format=enforce)
        files.append(buffer.getvalue())
        assert seg.SegmentSequence and seg.PerFrameFunctionalGroupsSequence  # decoding it must not change its bytes
    assert files[0] == files[1]
    assert [image.to_json() for image in images] == before


WRONG: dict[str, Callable[[LabelVolume, list[Dataset]], tuple[LabelVolume, list[Dataset]]]] = {
    "image not among the sources": lambda volume, images: (volume, images[1:]),
    "an image has two planes": lambda volume, images: (
        replace(volume, sop_instance_uids=(volume.sop_instance_uids[0], *volume.sop_instance_uids[:-1])),
        images,
    ),
    "one plane for each": lambda volume, images: (replace(volume, labels=volume.labels[1:]), images),
    "expected uint8": lambda volume, images: (replace(volume, labels=volume.labels.astype(np.int16)), images),
    "do not fit an image": lambda volume, images: (replace(volume, labels=volume.labels[:, :20]), images),
    "value 4 has no segment": lambda volume, images: (replace(volume, segments=volume.segments[:3]), images),
    "not distinct": lambda volume, images: (replace(volume, segments=volume.segments + volume.segments[:1]), images),
}


@pytest.mark.parametrize("reason", WRONG)
def test_labels_that_do_not_fit_their_sources_are_an_error_that_says_why(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reason: str,
) -> None:
    images = ct_series()
    volume, sources = WRONG[reason](volume_of(images, labels(images)), images)
    expected = "no source for the plane" if reason == "image not among the sources" else reason
    with pytest.raises(EncodingError, match=expected):
        SegEncoder().encode([volume], sources, context, [])


def _another_orientation(image: Dataset) -> None:
    image.ImageOrientationPatient = list(CORONAL)


def _another_series(image: Dataset) -> None:
    image.SeriesInstanceUID = generate_uid()


def _no_frame_of_reference(image: Dataset) -> None:
    del image.FrameOfReferenceUID


def _no_position(image: Dataset) -> None:
    del image.ImagePositionPatient


def _same_place(image: Dataset) -> None:
    image.ImagePositionPatient = ["-100.5", "-90.25", "17.125"]


def _many_frames(image: Dataset) -> None:
    image.NumberOfFrames = 4


@pytest.mark.parametrize(
    "defect",
    [_another_orientation, _another_series, _no_frame_of_reference, _no_position, _same_place, _many_frames],
)
def test_images_that_are_not_parallel_planes_of_one_series_are_refused(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    defect: Callable[[Dataset], None],
) -> None:
    images = ct_series()
    volume = volume_of(images, labels(images))
    defect(images[3])
    with pytest.raises(EncodingError):
        SegEncoder().encode([volume], images, context, [])
