"""Many organs, as bits and as one label map; and sources whose frames lie in one instance."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dictionary
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dicom_node.errors import EncodingError
from dicom_node.plugins import encoder_class, encoder_kinds
from dicom_node.results import _colors as colors
from dicom_node.results import codes
from dicom_node.results.seg import LabelmapEncoder, SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.routing.load import load_rules
from dicom_node.values import (
    LabelVolume,
    Measurements,
    ResultContext,
    Segment,
)

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
KINDS = {"seg": SegEncoder, "labelmap": LabelmapEncoder}
Labels = npt.NDArray[np.uint8]


def _organs(numbers: Sequence[int]) -> tuple[Segment, ...]:
    return tuple(
        Segment(
            number=number,
            key=f"organ-{number}",
            label=f"Organ {number}",
            category=codes.ANATOMICAL_STRUCTURE,
            type=codes.ORGANS["rib"].code,
            modifier=codes.LEFT if number % 2 else codes.RIGHT,
        )
        for number in numbers
    )


def _many(count: int, shape: tuple[int, int, int] = (40, 64, 64), planes: int = 4) -> Labels:
    """Blocks side by side, each `planes` high, the outer planes empty."""
    labels = np.zeros(shape, np.uint8)
    across = int(np.ceil(np.sqrt(count)))
    height, width = shape[1] // across, shape[2] // across
    for number in range(1, count + 1):
        row, column = divmod(number - 1, across)
        low = 1 + number % (shape[0] // 2)
        place = np.s_[low : low + planes, row * height : (row + 1) * height, column * width : (column + 1) * width]
        labels[place] = number
    labels[shape[0] // 2, ::3, ::2] = 1  # and one that is everywhere
    return labels


@pytest.fixture(scope="session")
def hundred(ct_series: Callable[..., list[Dataset]]) -> tuple[list[Dataset], LabelVolume]:
    """A hundred organs and the images they are on."""
    images = ct_series(slices=40, rows=64, columns=64)
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    return images, LabelVolume(labels=_many(100), sop_instance_uids=uids, segments=_organs(range(1, 101)))


def _read(seg: Dataset, uids: Sequence[str]) -> Labels:
    """The label array as highdicom reads it."""
    read = hd.seg.Segmentation.from_dataset(seg)
    numbers = [int(item.SegmentNumber) for item in read.SegmentSequence if int(item.SegmentNumber)]
    found: Labels = read.get_pixels_by_source_instance(
        list(uids), segment_numbers=numbers, combine_segments=True, assert_missing_frames_are_empty=True
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_organs_are_read_back_by_highdicom(
    hundred: tuple[list[Dataset], LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    kind: str,
) -> None:
    images, volume = hundred
    seg = reread(KINDS[kind]().encode([volume], images[::-1], context, [])[0])
    np.testing.assert_array_equal(_read(seg, volume.sop_instance_uids), volume.labels)
    assert kind == KINDS[kind].kind and encoder_class(kind) is KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_organs_are_read_back_by_dcmqi(
    hundred: tuple[list[Dataset], LabelVolume],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    tmp_path: Path,
    kind: str,
) -> None:
    images, volume = hundred
    file = written(KINDS[kind]().encode([volume], images, context, [])[0])
    out = tmp_path / "read"
    out.mkdir()
    words = ("--inputDICOM", file, "--outputDirectory", out, "--prefix", "s", "-t", "nrrd", "--mergeSegments")
    check = run(tool("segimage2itkimage"), *words)
    assert check.returncode == 0, check.stderr
    kept = np.flatnonzero(volume.labels.any(axis=(1, 2)))
    read = np.zeros_like(volume.labels)
    for path in out.glob("*.nrrd"):
        header, data = path.read_bytes().split(b"\n\n", 1)
        fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
        pixel = {"short": "<i2", "unsigned char": "u1"}[fields["type"]]
        voxels = np.frombuffer(gzip.decompress(data), pixel).reshape([int(n) for n in fields["sizes"].split()][::-1])
        read[kept[0] : kept[-1] + 1] += voxels.astype(np.uint8)
    np.testing.assert_array_equal(read, volume.labels)
    names = json.loads((out / "s-meta.json").read_text())["segmentAttributes"]
    told = {item["labelID"]: item["SegmentLabel"] for group in names for item in group if item["labelID"]}
    assert told == {segment.number: segment.label for segment in volume.segments}


# dciodvfy of 2022 predates Label Map Segmentation Storage (Supplement 243, 2024)
OLD_VALIDATOR = ("Information Object Not found", "SegmentNumber not monotonically increasing")


@pytest.mark.parametrize("kind", KINDS)
def test_dciodvfy_finds_no_error_in_a_hundred_organs(
    hundred: tuple[list[Dataset], LabelVolume],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    kind: str,
) -> None:
    images, volume = hundred
    check = run(tool("dciodvfy"), "-new", written(KINDS[kind]().encode([volume], images, context, [])[0]))
    errors = [line for line in (check.stderr + check.stdout).splitlines() if line.startswith("Error")]
    allowed = OLD_VALIDATOR if kind == "labelmap" else ()
    assert [line for line in errors if not any(text in line for text in allowed)] == []
    assert check.returncode == 0 or kind == "labelmap"


@pytest.mark.parametrize("size", [(24, 32), (23, 31)], ids=["even", "odd number of bytes"])
def test_a_label_map_is_what_highdicom_itself_would_write(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    size: tuple[int, int],
) -> None:
    images = ct_series(slices=11, rows=size[0], columns=size[1])
    volume = volume_of(images, labels(images))
    ours = reread(LabelmapEncoder().encode([volume], images, context, [])[0])
    algorithm = hd.AlgorithmIdentificationSequence("a", dictionary.DCM.ArtificialIntelligence, "1")
    kind = (dictionary.SCT.AnatomicalStructure, dictionary.SCT.Liver, "AUTOMATIC", algorithm)
    theirs = hd.seg.Segmentation(
        source_images=images,
        pixel_array=volume.labels,
        segmentation_type="LABELMAP",
        segment_descriptions=[hd.seg.SegmentDescription(n, "x", *kind) for n in (1, 2, 3, 4)],
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
    # highdicom lists every source once more, and says 3D of a regular stack
    told = {element.keyword for element in theirs} - {"SourceImageSequence", "DimensionOrganizationType"}
    assert told - {element.keyword for element in ours} == set()
    for keyword in ("SOPClassUID", "SegmentationType", "BitsAllocated", "BitsStored", "HighBit", "PixelPaddingValue"):
        assert ours[keyword].value == theirs[keyword].value
    for keyword in ("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "SegmentsOverlap", "ImageType"):
        assert ours[keyword].value == theirs[keyword].value
    assert ours.SOPClassUID == ours.file_meta.MediaStorageSOPClassUID == LABEL_MAP_STORAGE
    assert len(ours.PixelData) % 2 == 0
    count = int(ours.NumberOfFrames)
    # highdicom counts planes against the normal, row x column, we along it
    groups = list(ours.PerFrameFunctionalGroupsSequence)
    for group, their_group in zip(groups, reversed(theirs.PerFrameFunctionalGroupsSequence), strict=True):
        content = group.FrameContentSequence[0]
        content.DimensionIndexValues = count + 1 - content.DimensionIndexValues
        assert group.to_json_dict() == their_group.to_json_dict()
    np.testing.assert_array_equal(ours.pixel_array, theirs.pixel_array[::-1])
    shared, their_shared = ours.SharedFunctionalGroupsSequence[0], theirs.SharedFunctionalGroupsSequence[0]
    assert shared.to_json_dict() == their_shared.to_json_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_segment_numbers_have_no_gaps_whatever_the_labels_are(
    ct_series: Callable[..., list[Dataset]], context: ResultContext, reread: Callable[[Dataset], Dataset], kind: str
) -> None:
    images = ct_series()
    labels = np.zeros((len(images), 24, 32), np.uint8)
    labels[2:5, 3:9, 4:9], labels[4:7, 10:14, 4:9], labels[5, 20, 31] = 7, 200, 255
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    volume = LabelVolume(labels=labels, sop_instance_uids=uids, segments=_organs((255, 3, 200, 7)))
    seg = reread(KINDS[kind]().encode([volume], images, context, [])[0])
    described = {int(item.SegmentNumber): item.SegmentLabel for item in seg.SegmentSequence if item.SegmentNumber}
    assert described == {1: "Organ 7", 2: "Organ 200", 3: "Organ 255"}
    expected = np.select([labels == 7, labels == 200, labels == 255], [1, 2, 3], 0)
    np.testing.assert_array_equal(_read(seg, uids), expected)


def test_both_kinds_tell_the_same_segments_in_objects_and_series_of_their_own(
    hundred: tuple[list[Dataset], LabelVolume], context: ResultContext
) -> None:
    images, volume = hundred
    bits = SegEncoder().encode([volume], images, context, [])[0]
    bytes_ = LabelmapEncoder().encode([volume], images, context, [])[0]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SOPClassUID"):
        assert bits[keyword].value != bytes_[keyword].value
    background, *segments = bytes_.SegmentSequence
    assert background.SegmentNumber == 0 and "TrackingUID" not in background
    assert list(bits.SegmentSequence) == segments


def test_an_earlier_result_is_written_again_byte_for_byte(
    hundred: tuple[list[Dataset], LabelVolume], context: ResultContext, written: Callable[[Dataset], Path]
) -> None:
    images, volume = hundred
    files = [written(LabelmapEncoder().encode([volume], images, context, [])[0]).read_bytes() for _ in range(2)]
    assert files[0] == files[1]


@pytest.mark.parametrize("asked", [("labelmap",), ("seg", "labelmap")])
def test_measurements_point_at_the_segmentation_there_is(
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Labels],
    volume_of: Callable[..., LabelVolume],
    measurements_of: Callable[..., Measurements],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    asked: tuple[str, ...],
) -> None:
    images = ct_series()
    values = [volume_of(images, labels(images)), measurements_of()]
    segs = [made for kind in asked for made in KINDS[kind]().encode(values, images, context, [])]
    (report,) = SrEncoder().encode(values, images, context, segs)
    groups = [item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"]
    pointed = [
        item.ReferencedSOPSequence[0]
        for group in groups[0].ContentSequence
        for item in group.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeValue == "121191"
    ]
    assert [int(item.ReferencedSegmentNumber) for item in pointed] == [1, 2, 3, 4]
    assert {str(item.ReferencedSOPInstanceUID) for item in pointed} == {str(segs[0].SOPInstanceUID)}
    evidence = {
        str(item.ReferencedSOPInstanceUID)
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert {str(seg.SOPInstanceUID) for seg in segs} <= evidence
    check = run(tool("dciodvfy"), "-new", written(report))
    errors = [line for line in (check.stderr + check.stdout).splitlines() if line.startswith("Error")]
    unknown = "Shall not be present for Referenced SOP Class that is not segmentation"
    assert [line for line in errors if asked[0] == "seg" or unknown not in line] == []


def test_organs_without_a_colour_of_their_own_get_different_ones(
    hundred: tuple[list[Dataset], LabelVolume], context: ResultContext
) -> None:
    images, volume = hundred
    (seg,) = SegEncoder().encode([volume], images, context, [])
    told = [tuple(item.RecommendedDisplayCIELabValue) for item in seg.SegmentSequence]
    assert len(set(told)) == 100
    lab = colors._lab(np.array([colors.display_color(label) for label in range(1, 118)], np.uint8))
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(len(lab))
    assert apart.min() > 15  # a difference of 2.3 is just noticeable
    assert colors.display_color(1) == (225, 45, 45)
    assert len({colors.display_color(label) for label in range(1, 256)}) == 255


def test_what_was_repaired_stands_before_what_was_found(
    hundred: tuple[list[Dataset], LabelVolume], context: ResultContext
) -> None:
    images, volume = hundred
    noted = replace(volume, notes=("slices 4 and 5 interpolated", "gantry tilt of 12 degrees removed"))
    for encoder in (SegEncoder(), LabelmapEncoder()):
        (seg,) = encoder.encode([noted], images, context, [])
        assert (
            seg.ContentDescription.startswith("slices 4 and 5 interpolated; gantry tilt")
            and len(seg.ContentDescription) <= 64
        )
        assert all(note in seg.ImageComments for note in noted.notes)


def test_memory_holds_the_frames_once_and_no_mask_of_each_organ(
    ct_series: Callable[..., list[Dataset]], context: ResultContext
) -> None:
    images = ct_series(slices=32, rows=256, columns=256)
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    volume = LabelVolume(
        labels=_many(100, (32, 256, 256), planes=8), sop_instance_uids=uids, segments=_organs(range(1, 101))
    )
    SegEncoder().encode([volume], images, context, [])  # what is loaded once
    tracemalloc.start()
    try:
        (seg,) = SegEncoder().encode([volume], images, context, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    frames, packed = int(seg.NumberOfFrames), len(seg.PixelData)
    assert frames > 800 and frames * 256 * 256 > 50e6  # as masks
    assert peak < 2 * packed + 16e6


# --- multi-frame sources ---------------------------------------------------------------------------------------------


@pytest.fixture
def enhanced(ct_series: Callable[..., list[Dataset]]) -> Callable[..., Dataset]:
    """The stack of `ct_series` as one Enhanced CT header, frame i + 1 in the place of slice i."""

    def build(**how: Any) -> Dataset:
        images = ct_series(**how)
        made = images[0]
        made.SOPClassUID, made.NumberOfFrames = ENHANCED_CT, len(images)
        shared, measures, orientation = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = made.PixelSpacing, made.SliceThickness
        orientation.ImageOrientationPatient = made.ImageOrientationPatient
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
        made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = [shared], []
        for image in images:
            group, position = Dataset(), Dataset()
            position.ImagePositionPatient = image.ImagePositionPatient
            group.PlanePositionSequence = [position]
            made.PerFrameFunctionalGroupsSequence.append(group)
        for keyword in ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient"):
            del made[keyword]
        return made

    return build


def _on_frames(source: Dataset, labels: Labels, numbers: Sequence[int], segments: Sequence[Segment]) -> LabelVolume:
    return LabelVolume(
        labels=labels,
        sop_instance_uids=(str(source.SOPInstanceUID),) * len(labels),
        segments=tuple(segments),
        frame_numbers=tuple(numbers),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_on_frames_of_one_image_name_their_frame(
    enhanced: Callable[..., Dataset],
    organs: tuple[Segment, ...],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    written: Callable[[Dataset], Path],
    kind: str,
) -> None:
    source = enhanced(slices=9)
    labels = np.zeros((6, 24, 32), np.uint8)
    for plane in range(1, 6):
        labels[plane, plane : plane + 4, 3:9], labels[plane, 15, plane:20] = 1, 1 + plane % 4
    numbers = (2, 3, 4, 6, 7, 9)  # the others were left out
    made = KINDS[kind]().encode([_on_frames(source, labels, numbers, organs)], [source], context, [])[0]
    seg = reread(made)
    places = {
        number: group.PlanePositionSequence[0].ImagePositionPatient
        for number, group in enumerate(source.PerFrameFunctionalGroupsSequence, start=1)
    }
    for group in seg.PerFrameFunctionalGroupsSequence:
        item = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert item.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert group.PlanePositionSequence[0].ImagePositionPatient == places[int(item.ReferencedFrameNumber)]
    (referred,) = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert (referred.ReferencedSOPClassUID, referred.ReferencedSOPInstanceUID) == (ENHANCED_CT, source.SOPInstanceUID)
    read = hd.seg.Segmentation.from_dataset(seg)
    found = read.get_pixels_by_source_frame(
        source.SOPInstanceUID,
        list(numbers),
        combine_segments=True,
        assert_missing_frames_are_empty=True,
        segment_numbers=[1, 2, 3, 4],
    )
    np.testing.assert_array_equal(found, labels)
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert list(measures.PixelSpacing) == [0.8, 0.75] and measures.SliceThickness == 2.5
    if kind == "seg":
        check = run(tool("dciodvfy"), "-new", written(made))
        assert not [line for line in (check.stderr + check.stdout).splitlines() if line.startswith("Error")]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((1, 2, 10), "has no frame 10"),
        ((0, 1, 2), "has no frame 0"),
        ((1, 2, 2), "two planes"),
        ((1, 2), "2 for 3 planes"),
        ((), "two planes"),
    ],
)
def test_frames_that_are_not_there_are_an_error_that_says_so(
    enhanced: Callable[..., Dataset],
    organs: tuple[Segment, ...],
    context: ResultContext,
    numbers: tuple[int, ...],
    reason: str,
) -> None:
    source = enhanced(slices=9)
    volume = _on_frames(source, np.ones((3, 24, 32), np.uint8), numbers, organs)
    with pytest.raises(EncodingError, match=reason):
        SegEncoder().encode([volume], [source], context, [])


def test_frames_keep_their_order_along_the_normal(
    enhanced: Callable[..., Dataset], organs: tuple[Segment, ...], context: ResultContext
) -> None:
    source = enhanced(slices=5)
    labels = np.ones((5, 24, 32), np.uint8)
    volume = _on_frames(source, labels, (4, 2, 5, 1, 3), organs)
    (seg,) = LabelmapEncoder().encode([volume], [source], context, [])
    groups = seg.PerFrameFunctionalGroupsSequence
    heights = [float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups]
    assert all(lower < upper for lower, upper in pairwise(heights))
    assert [int(g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber) for g in groups] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_rule_may_ask_for_a_label_map(tmp_path: Path) -> None:
    rule = "rule: organs\nwhen: ['Modality == \"CT\"']\nrun: {engine: organs, results: [labelmap, sr]}\n"
    (tmp_path / "organs.yaml").write_text(rule)
    (loaded,) = load_rules(tmp_path, engines=["organs"], destinations=[], results=encoder_kinds()).rules
    assert loaded.results == ("labelmap", "sr")
    assert [kind for kind in encoder_kinds() if kind in loaded.results] == ["labelmap", "sr"]  # encoded in this order


@pytest.mark.parametrize("size", ["24x38x3", "23x38x3"])
def test_a_real_multi_frame_image_is_a_source(
    size: str,
    organs: tuple[Segment, ...],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
) -> None:
    corpus = os.environ.get("DICOM_NODE_CORPUS")
    if not corpus:
        pytest.skip("DICOM_NODE_CORPUS is not set")
    path = Path(corpus) / "QIICR+dcmqi/data/segmentations" / size / "multiframe/mf.dcm"
    source = dcmread(path, stop_before_pixels=True)
    labels = np.zeros((3, source.Rows, source.Columns), np.uint8)
    for plane in range(3):
        labels[plane, plane : plane + 9, 4:11] = 1 + plane
    volume = _on_frames(source, labels, (3, 2, 1), organs)
    file = written(SegEncoder().encode([volume], [source], context, [])[0])
    read = hd.seg.segread(file).get_pixels_by_source_frame(
        source.SOPInstanceUID, [3, 2, 1], combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(read, labels)
    check = run(tool("dciodvfy"), "-new", file)
    assert not [line for line in (check.stderr + check.stdout).splitlines() if line.startswith("Error")]
