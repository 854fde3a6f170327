"""Labels of slides, read back by highdicom and bit by bit: every label where it lies on the glass."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pytest
from highdicom.spatial import PixelToReferenceTransformer
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results.ann import AnnEncoder
from dicom_node.results.seg import LabelmapEncoder, SegEncoder
from dicom_node.values import (
    AnnotationGroup,
    Annotations,
    GraphicType,
    LabelVolume,
    ResultContext,
    ResultValue,
    Segment,
    SlideLabels,
)

Labels = npt.NDArray[np.uint8]
KINDS = {"seg": SegEncoder, "labelmap": LabelmapEncoder}
# of dciodvfy of 2022, which does not know label maps yet
ARTEFACTS = ("Error - Information Object Not found", "SegmentNumber of 0")


def _labels(rows: int, columns: int) -> Labels:
    """Tumour (3) and stroma (7), over the borders of tiles and into the last corner."""
    labels = np.zeros((rows, columns), np.uint8)
    labels[rows // 10 : rows // 2, columns // 8 : columns // 2] = 3
    labels[rows // 2 :, columns // 3 :: 3] = 7
    labels[-1, -1] = 3
    return labels


def _on(image: Dataset, labels: Any, segments: tuple[Segment, ...], notes: tuple[str, ...] = ()) -> SlideLabels:
    return SlideLabels(labels=labels, sop_instance_uid=str(image.SOPInstanceUID), segments=segments, notes=notes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(900, 1300), (450, 650), (90, 130), (57, 82), (1, 1)])
def test_highdicom_reads_the_same_labels(
    kind: str,
    shape: tuple[int, int],
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
    written: Callable[[Dataset], Path],
) -> None:
    image, labels = slide(), _labels(*shape)
    (made,) = KINDS[kind]().encode([_on(image, labels, tissues)], [image], context, [])
    read = hd.seg.segread(written(made))
    whole = np.asarray(read.get_total_pixel_matrix(combine_segments=True))
    kept = [segment.number for segment in tissues if (labels == segment.number).any()]
    expected = np.zeros_like(labels)
    for number, label in enumerate(kept, start=1):
        expected[labels == label] = number
    np.testing.assert_array_equal(whole, expected)
    described = [read.get_segment_description(number) for number in read.segment_numbers]
    assert [item.segment_label for item in described] == [
        segment.label for segment in tissues if segment.number in kept
    ]


@pytest.mark.parametrize("shape", [(900, 1300), (90, 130), (57, 82)])
def test_the_matrix_begins_lies_and_ends_as_the_slide_does(
    shape: tuple[int, int],
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image, labels = slide(), _labels(*shape)
    (made,) = SegEncoder().encode([_on(image, labels, tissues)], [image], context, [])
    made = reread(made)
    spacing = [float(value) for value in made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing]
    assert (made.TotalPixelMatrixRows, made.TotalPixelMatrixColumns) == shape
    assert spacing[0] * shape[0] == pytest.approx(900 * 0.0005, rel=1e-9)
    assert spacing[1] * shape[1] == pytest.approx(1300 * 0.0005, rel=1e-9)
    assert made.FrameOfReferenceUID == image.FrameOfReferenceUID
    assert made.ImageOrientationSlide == image.ImageOrientationSlide
    origin = made.TotalPixelMatrixOriginSequence[0]
    assert (origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem) == (20.5, 41.25)
    # each frame says where it lies, in pixels and in mm, and the two agree
    place = PixelToReferenceTransformer((20.5, 41.25, 0.0), image.ImageOrientationSlide, spacing)
    for frame in made.PerFrameFunctionalGroupsSequence:
        told = frame.PlanePositionSlideSequence[0]
        column, row = told.ColumnPositionInTotalImagePixelMatrix, told.RowPositionInTotalImagePixelMatrix
        ((x, y, _),) = place(np.array([[column - 1, row - 1]]))
        assert told.XOffsetInSlideCoordinateSystem == pytest.approx(x, abs=1e-6)
        assert told.YOffsetInSlideCoordinateSystem == pytest.approx(y, abs=1e-6)


def test_bits_are_where_the_frames_say_and_tiles_without_a_label_are_left_out(
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image, labels = slide(rows=1200, columns=1301), np.zeros((1200, 1301), np.uint8)
    labels[500:530, 1020:1301], labels[0, 0] = 3, 7
    (made,) = SegEncoder().encode([_on(image, labels, tissues)], [image], context, [])
    made = reread(made)
    assert (made.Rows, made.Columns, made.NumberOfFrames) == (512, 512, 5)  # 4 of tumour, 1 of stroma
    bits = np.unpackbits(np.frombuffer(made.PixelData, np.uint8), bitorder="little")[: 5 * 512 * 512]
    whole = np.zeros((1536, 1536), np.uint8)
    indices = set()
    for frame, mask in zip(made.PerFrameFunctionalGroupsSequence, bits.reshape(5, 512, 512), strict=True):
        told = frame.PlanePositionSlideSequence[0]
        row, column = told.RowPositionInTotalImagePixelMatrix - 1, told.ColumnPositionInTotalImagePixelMatrix - 1
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        whole[row : row + 512, column : column + 512][mask == 1] = tissues[number - 1].number
        indices.add(tuple(frame.FrameContentSequence[0].DimensionIndexValues))
    np.testing.assert_array_equal(whole[:1200, :1301], labels)
    assert not whole[1200:].any() and not whole[:, 1301:].any()
    assert indices == {(1, 1, 2), (1, 1, 3), (1, 2, 2), (1, 2, 3), (2, 1, 1)}


def test_the_object_refers_to_its_slide_and_keeps_what_must_be_kept(
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image = slide()
    told = _on(image, _labels(90, 130), tissues, ("read at 5 micrometres",))
    made = reread(SegEncoder().encode([told], [image], context, [])[0])
    assert made.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == (
        image.SOPInstanceUID
    )
    derivation = made.SharedFunctionalGroupsSequence[0].DerivationImageSequence[0]
    assert derivation.SourceImageSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert (made.LossyImageCompression, made.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    assert (made.PatientID, made.ContainerIdentifier) == ("P-0815", "S-24-7")
    assert made.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "1.2.0"
    assert "not for clinical use" in made.ImageComments and "5 micrometres" in made.ImageComments
    assert made.SeriesDescription.startswith("AI DEMONSTRATION: Segmentation")


def test_tracking_uids_are_those_of_the_segments_in_any_run_and_form(
    slide: Callable[..., Dataset], tissues: tuple[Segment, ...], context: ResultContext
) -> None:
    image = slide()
    told = _on(image, _labels(90, 130), tissues)
    (bits,) = SegEncoder().encode([told], [image], context, [])
    (numbers,) = LabelmapEncoder().encode([told], [image], replace(context, run_key="run 2"), [])
    tracked = [[item.TrackingUID for item in made.SegmentSequence if "TrackingUID" in item] for made in (bits, numbers)]
    assert tracked[0] == tracked[1] and len(set(tracked[0])) == 2
    assert bits.SOPInstanceUID != numbers.SOPInstanceUID and bits.SeriesInstanceUID != numbers.SeriesInstanceUID


def test_equal_arguments_give_equal_bytes_beside_a_volume_too(
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    written: Callable[[Dataset], Path],
) -> None:
    image, stack = slide(), ct_series()
    told: list[ResultValue] = [
        _on(image, _labels(90, 130), tissues),
        volume_of(stack, labels(stack)),
        _on(image, _labels(9, 13), tissues),
    ]
    first, again = (SegEncoder().encode(told, [image, *stack], context, []) for _ in range(2))
    assert [written(made).read_bytes() for made in first] == [written(made).read_bytes() for made in again]
    assert len({made.SOPInstanceUID for made in first}) == 3


def test_labels_that_cannot_lie_on_the_slide_are_an_error_and_none_make_no_object(
    slide: Callable[..., Dataset],
    radiograph: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
) -> None:
    image = slide()
    for labels, message in (
        (_labels(130, 90), "do not cover a slide of 900 x 1300"),  # rows and columns exchanged
        (_labels(1800, 2600), "do not cover"),
        (_labels(100, 130), "do not cover"),
        (_labels(90, 130).astype(np.uint16), "expected uint8"),
        (_labels(90, 130)[None], "expected uint8"),
        (_labels(90, 130) + 1, "has no segment"),
    ):
        with pytest.raises(EncodingError, match=message):
            SegEncoder().encode([_on(image, labels, tissues)], [image], context, [])
    for broken, message in (
        (slide(TotalPixelMatrixOriginSequence=None), "no pixel spacing, origin or orientation"),
        (slide(SharedFunctionalGroupsSequence=None), "no pixel spacing, origin or orientation"),
        (slide(FrameOfReferenceUID=None), "no Frame of Reference"),
        (radiograph(), "it is no slide"),
    ):
        with pytest.raises(EncodingError, match=message):
            SegEncoder().encode([_on(broken, _labels(90, 130), tissues)], [broken], context, [])
    with pytest.raises(EncodingError, match="no source for the image"):
        SegEncoder().encode([_on(slide(), _labels(90, 130), tissues)], [image], context, [])
    assert SegEncoder().encode([_on(image, np.zeros((90, 130), np.uint8), tissues)], [image], context, []) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(900, 1300), (57, 82)])
def test_foreign_validators_find_nothing_wrong(
    kind: str,
    shape: tuple[int, int],
    slide: Callable[..., Dataset],
    tissues: tuple[Segment, ...],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    image = slide()
    (made,) = KINDS[kind]().encode([_on(image, _labels(*shape), tissues)], [image], context, [])
    errors = no_errors(written(made))
    if kind == "labelmap":
        errors = [error for error in errors if not error.endswith(ARTEFACTS)]
    assert errors == []


# Of the corpus: a slide written by a scanner's converter, and one whose single tile is larger than its matrix
REAL = (
    "ImagingDataCommons+highdicom/data/test_files/sm_image.dcm",
    "DIAGNijmegen+rse-panimg/tests/resources/dicom_wsi/full_no_bot/full_no_bot.dcm",
)


@pytest.mark.parametrize("path", REAL)
def test_real_slides_give_objects_without_an_error(
    path: str,
    tissues: tuple[Segment, ...],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    corpus = os.environ.get("DICOM_NODE_CORPUS")
    if not corpus:
        pytest.skip("DICOM_NODE_CORPUS is not set")
    image = dcmread(Path(corpus) / path, stop_before_pixels=True)
    labels = _labels(int(image.TotalPixelMatrixRows), int(image.TotalPixelMatrixColumns))
    (made,) = SegEncoder().encode([_on(image, labels, tissues)], [image], context, [])
    assert no_errors(written(made)) == []
    whole = np.asarray(hd.seg.segread(written(made)).get_total_pixel_matrix(combine_segments=True))
    np.testing.assert_array_equal(whole > 0, labels > 0)
    nuclei = AnnotationGroup(
        label="Nuclei",
        category=tissues[0].category,
        type=tissues[0].type,
        graphic_type=GraphicType.POINT,
        shapes=(np.array([[3.5, 2.25]]),),
    )
    told = Annotations(sop_instance_uid=str(image.SOPInstanceUID), groups=(nuclei,))
    (made,) = AnnEncoder().encode([told], [image], context, [])
    assert [error for error in no_errors(written(made)) if "CommonZCoordinateValue" not in error] == []
