"""Masks of engines as label volumes: values, numbers, names, overlaps, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest

from dicom_node.engines.labels import LabelTable
from dicom_node.engines.masks import (
    GeometryMismatch,
    ReturnedVolume,
    UnusableLabels,
    from_label_map,
    from_masks,
    read_volume,
)
from dicom_node.geometry import VolumeGeometry
from dicom_node.values import LabelVolume

SHAPE = (5, 6, 7)  # slice, row, column
AFFINE = np.array([[1, 0, 0, 10], [0, 1, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]], np.float64)  # of column, row, slice
GEOMETRY = VolumeGeometry(
    sop_instance_uids=tuple(f"1.2.{k}" for k in range(SHAPE[0])),
    affine=AFFINE[:, [2, 1, 0, 3]],
    spacing_mm=(2.0, 1.0, 1.0),
    shape=SHAPE,
    sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
    frame_of_reference_uid="1.2.3.9",
    left_out={"1.2.99": "Image Type LOCALIZER"},
)


def _answer(labels: npt.NDArray[Any], **changes: Any) -> ReturnedVolume:
    """An answer that has `labels` (slice, row, column) on the images' own grid."""
    return replace(ReturnedVolume(array=np.asfortranarray(labels.T), affine_lps=AFFINE), **changes)


def _array(*places: tuple[int, Any], dtype: Any = np.uint8) -> npt.NDArray[Any]:
    """Label in slice n, row n, everywhere across, for the nth of `places`' slices."""
    array = np.zeros(SHAPE, dtype)
    for k, label in places:
        array[k, k] = label
    return array


def _by_label(volume: LabelVolume) -> dict[str, int]:
    return {segment.label: int((volume.labels == segment.number).sum()) for segment in volume.segments}


# --- label maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", ["F", "C"])
def test_whole_numbers_of_any_type_are_labels(dtype: str, order: Any) -> None:
    array = _array((1, 1), (3, 120), dtype=dtype)
    answer = ReturnedVolume(array=np.array(array.T, order=order), affine_lps=AFFINE)
    volume = from_label_map(answer, GEOMETRY, names={1: "spleen", 120: "liver", 5: "pancreas"})
    np.testing.assert_array_equal(volume.labels, array.astype(np.uint8))
    assert volume.labels.dtype == np.uint8 and volume.labels.flags.c_contiguous
    assert [(s.number, s.label) for s in volume.segments] == [(1, "Spleen"), (5, "Pancreas"), (120, "Liver")]
    assert volume.sop_instance_uids == GEOMETRY.sop_instance_uids


def test_the_notes_of_the_images_the_file_and_the_grid_are_kept_in_this_order() -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.1
    volume = from_label_map(_answer(_array((1, 1)), affine_lps=shifted, notes=("of the file",)), GEOMETRY)
    images, file, grid = volume.notes
    assert images == "1 images not analysed: Image Type LOCALIZER"
    assert file == "of the file"
    assert grid.startswith("the answer's grid is off")


def test_frames_of_a_multi_frame_image_keep_their_numbers() -> None:
    geometry = replace(GEOMETRY, sop_instance_uids=("1.2.3",) * 5, frame_numbers=(5, 4, 3, 2, 1))
    volume = from_label_map(_answer(_array((1, 1))), geometry)
    assert (volume.sop_instance_uids, volume.frame_numbers) == (("1.2.3",) * 5, (5, 4, 3, 2, 1))


def test_large_values_are_numbered_anew_and_keep_their_names() -> None:
    array = _array((0, 1024), (1, 70000), (3, 4), dtype=np.int32)
    volume = from_label_map(_answer(array), GEOMETRY, names={1024: "spleen", 2035: "liver"})
    assert _by_label(volume) == {"Spleen": 7, "Liver": 0, "label 70000": 7, "label 4": 7}
    assert sorted(segment.number for segment in volume.segments) == [1, 2, 3, 4]


def test_names_without_a_voxel_give_way_when_numbers_run_out() -> None:
    names = {1000 + n: f"organ {n}" for n in range(300)}
    volume = from_label_map(_answer(_array((1, 1007), dtype=np.int16)), GEOMETRY, names=names)
    assert _by_label(volume) == {"organ 7": 7}


def test_the_file_s_own_names_are_used_when_the_engine_tells_none() -> None:
    answer = _answer(_array((1, 2)), names={2: "spleen"})
    assert _by_label(from_label_map(answer, GEOMETRY)) == {"Spleen": 7}
    assert _by_label(from_label_map(answer, GEOMETRY, names={2: "liver"})) == {"Liver": 7}


def test_an_ignored_label_is_gone_from_the_pixels_too() -> None:
    table = LabelTable.model_validate({"body": "ignore", 9: "ignore", 4: {"name": "Pancreas"}})
    array = _array((0, 1), (1, 2), (2, 9))
    volume = from_label_map(_answer(array), GEOMETRY, names={1: "body", 2: "spleen"}, table=table)
    assert _by_label(volume) == {"Spleen": 7, "Pancreas": 0}
    assert set(np.unique(volume.labels)) == {0, 2}


def test_an_answer_without_a_label_says_what_was_looked_for() -> None:
    volume = from_label_map(_answer(_array()), GEOMETRY, names={1: "spleen"})
    assert _by_label(volume) == {"Spleen": 0}


def test_a_label_that_falls_between_the_pixels_is_told() -> None:
    array = np.zeros((21, 24, 28), np.uint8)
    array[4:, :, :] = 1
    array[1, 1, 1] = 2  # a quarter of a millimetre wide, and no pixel has its centre nearest
    fine = AFFINE.copy()
    fine[:3, :3] /= 4
    volume = from_label_map(_answer(array, affine_lps=fine), GEOMETRY, names={1: "spleen", 2: "liver"})
    assert volume.notes[-1] == "nothing of Liver falls on a pixel of the images"


REFUSED = {
    "probabilities": (_array((1, 0.37), dtype=np.float32), "0.37: labels are whole numbers"),
    "NaN": (_array((1, np.nan), dtype=np.float64), "nan: labels are whole"),
    "infinity": (_array((1, np.inf), dtype=np.float64), "inf: labels are whole"),
    "beyond all": (_array((1, 1e12), dtype=np.float64), "1e.12: labels are whole"),
    "negative": (_array((1, -3), dtype=np.int16), "label -3"),
    "an image": (np.arange(210, dtype=np.int16).reshape(SHAPE) * 2 - 100, "label -100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_label_is_refused_with_the_reason(case: str) -> None:
    array, reason = REFUSED[case]
    with pytest.raises(UnusableLabels, match=reason):
        from_label_map(_answer(array), GEOMETRY)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_255_labels_are_refused_and_255_are_not(dtype: Any) -> None:
    geometry = replace(GEOMETRY, shape=(5, 6, 9), affine=GEOMETRY.affine)
    array = (np.arange(270).reshape(5, 6, 9) % 256 * 100).astype(dtype)
    volume = from_label_map(_answer(array), geometry)
    assert len(volume.segments) == 255
    assert len(np.unique(volume.labels)) == 256
    array[4, 5, 8] = 7
    with pytest.raises(UnusableLabels, match="more than 255 different labels"):
        from_label_map(_answer(array), geometry)
    array[array == 0] = 8  # none is background
    array[array == 7] = 8
    with pytest.raises(UnusableLabels, match="more than 255 different labels"):
        from_label_map(_answer(array), geometry)


def test_the_heartbeat_is_called() -> None:
    beats: list[int] = []
    from_label_map(_answer(_array((1, 1))), GEOMETRY, heartbeat=lambda: beats.append(1))
    assert beats


# --- a mask for each -------------------------------------------------------------------------------------------------


def test_masks_become_one_label_each_in_their_order() -> None:
    masks = [
        ("spleen", _answer(_array((0, 1)))),
        ("kidney_left", _answer(_array((1, 255)))),
        ("wobble", _answer(_array((2, 1.0), dtype=np.float64))),
        ("liver", _answer(_array())),
    ]
    volume = from_masks(masks, GEOMETRY)
    assert _by_label(volume) == {"Spleen": 7, "Left kidney": 7, "wobble": 7, "Liver": 0}
    assert [segment.number for segment in volume.segments] == [1, 2, 3, 4]
    assert volume.notes == GEOMETRY.notes


def test_where_masks_overlap_the_earlier_one_is_seen_and_it_is_told() -> None:
    spleen, liver = _array((0, 1), (1, 1)), _array((1, 1), (2, 1))
    pancreas = _array((1, 1), (3, 1))
    masks = [("spleen", _answer(spleen)), ("liver", _answer(liver)), ("pancreas", _answer(pancreas))]
    volume = from_masks(masks, GEOMETRY)
    assert _by_label(volume) == {"Spleen": 14, "Liver": 7, "Pancreas": 7}
    assert volume.notes[1:] == (
        "Liver overlaps Spleen in 7 pixels (0.01 ml), shown as Spleen",
        "Pancreas overlaps Spleen in 7 pixels (0.01 ml), shown as Spleen",
    )
    again = from_masks(masks[::-1], GEOMETRY)
    assert _by_label(again) == {"Pancreas": 14, "Liver": 7, "Spleen": 7}


def test_many_overlaps_are_summed_up() -> None:
    masks = [(f"organ {n}", _answer(_array((1, 1)))) for n in range(8)]
    volume = from_masks(masks, GEOMETRY)
    assert len(volume.notes) == 1 + 3 + 1
    assert volume.notes[-1] == "4 more pairs of labels overlap, in 28 pixels"


def test_masks_are_asked_for_one_at_a_time_and_grids_may_differ() -> None:
    asked: list[str] = []

    def masks() -> Iterator[tuple[str, ReturnedVolume]]:
        for name, array in (("spleen", _array((0, 1))), ("liver", _array((2, 1)))):
            asked.append(name)
            yield name, _answer(array)
        flipped = AFFINE @ np.array([[-1, 0, 0, 6], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        yield "pancreas", _answer(_array((3, 1))[:, :, ::-1], affine_lps=flipped)

    volume = from_masks(masks(), GEOMETRY)
    assert asked == ["spleen", "liver"]
    assert [int(volume.labels[k, k, 0]) for k in range(4)] == [1, 0, 2, 3]


def test_an_ignored_mask_is_left_out() -> None:
    table = LabelTable.model_validate({"body": "ignore"})
    volume = from_masks([("body", _answer(_array((0, 1)))), ("spleen", _answer(_array((0, 1))))], GEOMETRY, table=table)
    assert _by_label(volume) == {"Spleen": 7}


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ([], "no mask"),
        ([("spleen", _array((0, 1))), ("Spleen", _array((1, 1)))], "two masks are called 'Spleen'"),
        ([("", _array((0, 1)))], "no name"),
        ([("spleen", _array((0, 1), (1, 2)))], "2 different values"),
        ([("spleen", _array((0, 0.5), dtype=np.float32))], "whole numbers"),
        ([(f"organ {n}", _array()) for n in range(256)], "more than 255 masks"),
    ],
)
def test_masks_that_do_not_go_together_are_refused(masks: list[tuple[str, npt.NDArray[Any]]], reason: str) -> None:
    with pytest.raises(UnusableLabels, match=reason):
        from_masks([(name, _answer(array)) for name, array in masks], GEOMETRY)


def test_one_mask_in_the_wrong_place_fails_them_all() -> None:
    far = AFFINE.copy()
    far[0, 3] = 900
    with pytest.raises(GeometryMismatch):
        from_masks([("spleen", _answer(_array((0, 1)))), ("liver", _answer(_array(), affine_lps=far))], GEOMETRY)


def test_files_of_either_format_go_together(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE
    nibabel.save(nibabel.Nifti1Image(_array((0, 1)).T, affine), tmp_path / "a.nii.gz")
    header = (
        "NRRD0005\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 7 6 5\nencoding: raw\n"
        "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (10,20,30)\n\n"
    )
    (tmp_path / "b.nrrd").write_bytes(header.encode() + _array((2, 1)).tobytes())
    masks = [("spleen", read_volume(tmp_path / "a.nii.gz")), ("liver", read_volume(tmp_path / "b.nrrd"))]
    volume = from_masks(masks, GEOMETRY)
    np.testing.assert_array_equal(volume.labels, _array((0, 1), (2, 2)))
