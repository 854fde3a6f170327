"""Geometry: right on every regular stack, refused with a reason on every other. The table of hostile series is here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry, volume_geometry

Image = dict[str, Any]


def rotation(seed: int) -> npt.NDArray[np.float64]:
    """A random rotation matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


def series(
    count: int = 20,
    *,
    step: float = 2.5,
    pixel: tuple[float, float] = (0.8, 0.7),
    axes: npt.NDArray[np.float64] | None = None,
    origin: tuple[float, float, float] = (-100.0, 50.0, -300.0),
    seed: int = 0,
) -> list[Image]:
    """Headers of a regular stack, shuffled; the columns of `axes` are row direction, column direction, normal."""
    frame = np.eye(3) if axes is None else axes
    images = []
    for k in range(count):
        position = np.asarray(origin) + frame[:, 2] * step * k
        images.append(
            {
                "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
                "SOPInstanceUID": f"1.2.{k + 1}",
                "InstanceNumber": str(count - k),
                "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
                "FrameOfReferenceUID": "1.2.3.9",
                "ImagePositionPatient": [float(v) for v in position],
                "ImageOrientationPatient": [float(v) for v in (*frame[:, 0], *frame[:, 1])],
                "PixelSpacing": list(pixel),
                "Rows": 64,
                "Columns": 48,
            }
        )
    np.random.default_rng(seed).shuffle(images)  # type: ignore[arg-type]
    return images


def lps(geometry: VolumeGeometry, index: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Patient coordinates of a voxel index (slice, row, column)."""
    return (geometry.affine @ np.array([*index, 1.0]))[:3]


@pytest.mark.parametrize("seed", range(12))
def test_every_voxel_of_a_random_stack_is_where_the_headers_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = rotation(seed)
    pixel = (float(rng.uniform(0.3, 3)), float(rng.uniform(0.3, 3)))
    images = series(int(rng.integers(3, 40)), step=float(rng.uniform(0.4, 8)), pixel=pixel, axes=axes, seed=seed)
    geometry = volume_geometry(images)
    by_uid = {image["SOPInstanceUID"]: image for image in images}
    for k, uid in enumerate(geometry.sop_instance_uids):
        for row, column in ((0, 0), (63, 0), (0, 47), (17, 31)):
            # PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1
            image = by_uid[uid]
            expected = (
                np.array(image["ImagePositionPatient"])
                + axes[:, 0] * pixel[1] * column  # Pixel Spacing: rows first, columns second
                + axes[:, 1] * pixel[0] * row
            )
            np.testing.assert_allclose(lps(geometry, (k, row, column)), expected, atol=1e-6)
    assert np.linalg.det(geometry.affine[:3, :3]) != 0
    assert geometry.shape == (len(images), 64, 48)


def test_slices_ascend_along_the_normal_whatever_their_instance_numbers_say() -> None:
    geometry = volume_geometry(series())
    assert geometry.sop_instance_uids == tuple(f"1.2.{k + 1}" for k in range(20))
    assert geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert geometry.coverage_mm == pytest.approx(50.0)


def test_a_stack_against_the_normal_comes_out_the_same_way_round() -> None:
    downwards = np.eye(3)
    downwards[:, 2] *= -1  # positions descend while the normal still points up
    geometry = volume_geometry(series(axes=downwards))
    assert geometry.sop_instance_uids[0] == "1.2.20"
    assert geometry.affine[2, 0] > 0


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        (((1, 0, 0), (0, 1, 0), (0, 0, 1)), "axial"),
        (((0, 1, 0), (0, 0, -1), (-1, 0, 0)), "sagittal"),
        (((1, 0, 0), (0, 0, -1), (0, 1, 0)), "coronal"),
    ],
)
def test_the_anatomical_plane_is_named(axes: tuple[tuple[int, ...], ...], name: str) -> None:
    geometry = volume_geometry(series(axes=np.array(axes, np.float64).T))
    assert geometry.orientation == name
    assert geometry.obliquity_deg == pytest.approx(0.0, abs=1e-5)


def test_obliquity_is_the_angle_to_the_nearest_axis() -> None:
    angle = math.radians(12)
    tilted = np.array([[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]]).T
    assert volume_geometry(series(axes=tilted)).obliquity_deg == pytest.approx(12.0)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_regular() -> None:
    images = series(60, step=1.25)
    for image in images:
        image["ImagePositionPatient"] = [round(v, 1) for v in image["ImagePositionPatient"]]
    geometry = volume_geometry(images)
    assert geometry.spacing_mm[0] == pytest.approx(1.25, abs=2e-3)
    by_uid = {image["SOPInstanceUID"]: image for image in images}
    for k, uid in enumerate(geometry.sop_instance_uids):
        assert lps(geometry, (k, 0, 0)) == pytest.approx(by_uid[uid]["ImagePositionPatient"], abs=0.07)


def test_text_values_as_in_the_catalog_are_understood() -> None:
    images = series(5)
    texts: list[dict[str, Any]] = [
        {k: "\\".join(str(x) for x in v) if isinstance(v, list) else str(v) for k, v in image.items()}
        for image in images
    ]
    np.testing.assert_allclose(volume_geometry(texts).affine, volume_geometry(images).affine)


def test_localizers_are_left_out_with_the_reason() -> None:
    images = series(10)
    scout = {**images[0], "SOPInstanceUID": "1.2.99", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    scout["ImageOrientationPatient"] = [1, 0, 0, 0, 0, -1]
    geometry = volume_geometry([*images, scout])
    assert geometry.left_out == {"1.2.99": "Image Type LOCALIZER"}
    assert "1.2.99" not in geometry.sop_instance_uids


def _without(keyword: str) -> Callable[[list[Image]], None]:
    def change(images: list[Image]) -> None:
        del images[3][keyword]

    return change


def _with(keyword: str, value: Any) -> Callable[[list[Image]], None]:
    def change(images: list[Image]) -> None:
        images[3][keyword] = value

    return change


def _drop(*numbers: int) -> Callable[[list[Image]], None]:
    def change(images: list[Image]) -> None:
        images[:] = [image for image in images if int(image["SOPInstanceUID"].rsplit(".")[-1]) not in numbers]

    return change


def _duplicate(images: list[Image]) -> None:
    images.append({**images[5], "SOPInstanceUID": "1.2.77"})


def _two_phases(images: list[Image]) -> None:
    images.extend({**image, "SOPInstanceUID": image["SOPInstanceUID"] + ".2"} for image in list(images))


def _move(by: Callable[[int], tuple[float, float, float]]) -> Callable[[list[Image]], None]:
    def change(images: list[Image]) -> None:
        for image in images:
            shift = by(int(image["SOPInstanceUID"].rsplit(".")[-1]))
            image["ImagePositionPatient"] = [p + s for p, s in zip(image["ImagePositionPatient"], shift, strict=True)]

    return change


def _jitter(sigma: float) -> Callable[[list[Image]], None]:
    draws = np.random.default_rng(3).normal(0, sigma, 100)
    return _move(lambda k: (0.0, 0.0, float(draws[k])))


def _second_stack(offset: float, **told: str) -> Callable[[list[Image]], None]:
    def change(images: list[Image]) -> None:
        for image in list(images):
            x, y, z = image["ImagePositionPatient"]
            place = {"SOPInstanceUID": image["SOPInstanceUID"] + ".2", "ImagePositionPatient": [x, y, z + offset]}
            images.append({**image, **place, **told})

    return change


def _two_acquisitions(images: list[Image]) -> None:
    """The lower and the upper half, the upper one with a wider spacing."""
    _move(lambda k: (0, 0, max(0, k - 10) * 1.2))(images)
    for image in images:
        image["AcquisitionNumber"] = str(1 + (int(image["SOPInstanceUID"].rsplit(".")[-1]) > 10))


def _tilt(degrees: float) -> Callable[[list[Image]], None]:
    return _move(lambda k: (0, 2.5 * k * math.tan(math.radians(degrees)), 0))


class Refused(str):
    """What the reason says."""


class Repaired(str):
    """What the result says."""


# name, what is done to 20 slices 2.5 mm apart, the answer with `regular: require`, the answer with `regular: repair`
HOSTILE: list[tuple[str, Callable[[list[Image]], None], str, Refused | Repaired]] = [
    (
        "one slice missing",
        _drop(8),
        r"missing slice: 1 position without an image.*between -285\.00 and -280\.00 mm",
        Repaired(r"^1 missing slice interpolated between -285\.00 and -280\.00 mm along the normal$"),
    ),
    (
        "two slices missing in a row",
        _drop(8, 9),
        "missing slice: 2 positions",
        Repaired(r"^2 missing slices interpolated between -285\.00 and -277\.50 mm along the normal$"),
    ),
    (
        "three slices missing in two places",
        _drop(5, 6, 12),
        "missing slice: 3 positions",
        Repaired(r"^3 missing slices interpolated at 2 places, the first between -292\.50 and -285\.00 mm"),
    ),
    (
        "three slices missing in a row",
        _drop(8, 9, 10),
        "missing slice: 3 positions",
        Refused(r"3 positions in a row without an image, between -285\.00 and -275\.00 mm.*at most 2 in a row"),
    ),
    ("a slice twice", _duplicate, "duplicate position: 1 of 21 images", Refused("duplicate position: 1 of 21 images")),
    (
        "two phases in one series",
        _two_phases,
        "duplicate position: 20 of 40 images",
        Refused("duplicate position: 20 of 40 images"),
    ),
    (
        "two stacks, one beside the other",
        _second_stack(0.2),
        "missing slice",
        Refused("0.20 mm apart where slices are 2.30 mm apart: two stacks overlap"),
    ),
    (
        "two acquisitions, a third of a slice beside each other",
        _second_stack(0.8, AcquisitionNumber="2"),
        "missing slice",
        Refused("two stacks overlap: Acquisition Number goes back and forth"),
    ),
    (
        "two acquisitions, half a slice beside each other",
        _second_stack(1.25, AcquisitionNumber="2"),
        "two stacks overlap: Acquisition Number goes back and forth",
        Refused("two stacks overlap: Acquisition Number goes back and forth"),
    ),
    (
        "two acquisitions, one above the other",
        _two_acquisitions,
        "irregular spacing",
        Repaired("^irregular spacing, each slice taken where it lies: slices are 2.50 to 3.70 mm apart"),
    ),
    (
        "spacing doubles half way",
        _move(lambda k: (0, 0, max(0, k - 10) * 2.5)),
        "missing slice|irregular spacing",
        Repaired(r"^irregular spacing, each slice taken where it lies: slices are 2\.50 to 5\.00 mm apart"),
    ),
    (
        "spacing grows fourfold half way",
        _move(lambda k: (0, 0, max(0, k - 12) * 7.5)),
        "missing slice|irregular spacing",
        Refused("missing slice: 3 positions in a row"),
    ),
    (
        "spacing changes by half",
        _move(lambda k: (0, 0, max(0, k - 10) * 1.2)),
        "irregular spacing: slices are 2.50 to",
        Repaired("^irregular spacing, each slice taken where it lies: slices are 2.50 to 3.70 mm apart"),
    ),
    ("positions jitter by 0.2 mm", _jitter(0.2), "irregular spacing", Repaired("^irregular spacing")),
    (
        "gantry tilt of 15 degrees",
        _tilt(15),
        "gantry tilt.*15.0 deg",
        Repaired(r"^slices shifted in their plane for a gantry tilt of 15\.0 degrees$"),
    ),
    ("gantry tilt of one degree", _tilt(1), "gantry tilt.*1.0 deg", Repaired("gantry tilt of 1.0 degrees")),
    ("a shear of 50 degrees", _tilt(50), "gantry tilt.*50.0 deg", Refused("50.0 degrees, more than a gantry tilts")),
    *(
        (name, change, says, Refused(says))
        for name, change, says in (
            ("the table moved sideways", _move(lambda k: (5.0 if k > 12 else 0.0, 0, 0)), "sideways"),
            (
                "one slice of another orientation",
                _with("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
                "mixed orientation.*19",
            ),
            (
                "one slice slightly turned",
                _with("ImageOrientationPatient", [0.9998, 0.02, 0, -0.02, 0.9998, 0]),
                "mixed orient",
            ),
            (
                "directions that are not perpendicular",
                _with("ImageOrientationPatient", [1, 0, 0, 0.5, 0.8, 0]),
                "perpendicular",
            ),
            (
                "directions that are no unit vectors",
                _with("ImageOrientationPatient", [2, 0, 0, 0, 2, 0]),
                "unit vectors",
            ),
            ("another matrix", _with("Rows", 128), "Rows x Columns differs"),
            ("another pixel spacing", _with("PixelSpacing", [0.8, 0.8]), "Pixel Spacing differs"),
            ("another frame of reference", _with("FrameOfReferenceUID", "1.2.3.10"), "Frame of Reference UID differs"),
            ("another SOP class", _with("SOPClassUID", "1.2.840.10008.5.1.4.1.1.4"), "SOP Class UID differs"),
            ("no position", _without("ImagePositionPatient"), r"no Image Position \(Patient\)"),
            ("no orientation", _without("ImageOrientationPatient"), r"no Image Orientation \(Patient\)"),
            ("no pixel spacing", _without("PixelSpacing"), "no Pixel Spacing"),
            ("no frame of reference", _without("FrameOfReferenceUID"), "no Frame of Reference"),
            ("a position that is no number", _with("ImagePositionPatient", ["a", "b", "c"]), "not numeric"),
            ("a position that is not finite", _with("ImagePositionPatient", [0, 0, float("nan")]), "finite"),
            ("a position of two numbers", _with("ImagePositionPatient", [0, 0]), "3 finite values"),
            ("pixels without size", _with("PixelSpacing", [0.8, 0]), "not positive"),
            ("a multi-frame image without its frames", _with("NumberOfFrames", 40), "multi-frame"),
            ("two slices", _drop(*range(3, 21)), "too few slices: 2, at least 3"),
        )
    ),
]
_NAMES = [row[0] for row in HOSTILE]


@pytest.mark.parametrize(("change", "says"), [row[1:3] for row in HOSTILE], ids=_NAMES)
def test_a_hostile_series_is_refused_with_a_reason(change: Callable[[list[Image]], None], says: str) -> None:
    images = series()
    volume_geometry(images)
    change(images)
    with pytest.raises(SeriesRejected, match=says) as raised:
        volume_geometry(images)
    assert raised.value.reason == str(raised.value)


@pytest.mark.parametrize(("change", "answer"), [(row[1], row[3]) for row in HOSTILE], ids=_NAMES)
def test_a_hostile_series_is_repaired_and_says_so_or_is_still_refused(
    change: Callable[[list[Image]], None], answer: Refused | Repaired
) -> None:
    images = series()
    change(images)
    if isinstance(answer, Refused):
        with pytest.raises(SeriesRejected, match=answer):
            volume_geometry(images, regular="repair")
        return
    geometry = volume_geometry(images, regular="repair")
    assert not geometry.regular
    assert len(geometry.repairs) == 1
    assert re.search(answer, geometry.repairs[0])
    assert geometry.notes == geometry.repairs
    assert geometry.shape[0] == len(geometry.positions_mm) == len(images)
    assert geometry.positions_mm[0] == pytest.approx(0, abs=1e-9)
    # the grid ends where the slices end
    assert (geometry.grid_shape[0] - 1) * geometry.spacing_mm[0] == pytest.approx(geometry.positions_mm[-1])
    by_uid = {image["SOPInstanceUID"]: image["ImagePositionPatient"] for image in images}
    for k, uid in enumerate(geometry.sop_instance_uids):
        shift = geometry.shifts_px[k] if geometry.shifts_px else (0.0, 0.0)
        index = (geometry.positions_mm[k] / geometry.spacing_mm[0], *shift)
        np.testing.assert_allclose(lps(geometry, index), by_uid[uid], atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_regular_series_is_the_same_under_both_policies_to_the_last_bit(seed: int) -> None:
    images = series(15, step=1.3 + seed / 7, axes=rotation(seed), seed=seed)
    for image in images:
        image["ImagePositionPatient"] = [round(v, 2) for v in image["ImagePositionPatient"]]
    required, repaired = volume_geometry(images), volume_geometry(images, regular="repair")
    assert required.affine.tobytes() == repaired.affine.tobytes()
    assert required.spacing_mm == repaired.spacing_mm
    assert repaired.regular and repaired.repairs == repaired.shifts_px == ()
    assert repaired.positions_mm == tuple(k * repaired.spacing_mm[0] for k in range(15))
    assert repaired.widths_mm == (repaired.spacing_mm[0],) * 15
    assert repaired.frame_numbers == () and repaired.identities[3] == (repaired.sop_instance_uids[3], 0)


def test_duplicates_are_dropped_only_where_they_are_found_identical() -> None:
    images = series()
    _duplicate(images)
    asked: list[tuple[Any, Any]] = []

    def same(one: Any, other: Any) -> bool:
        asked.append((one, other))
        return True

    geometry = volume_geometry(images, regular="repair", same_slice=same)
    assert asked == [(("1.2.6", 0), ("1.2.77", 0))] or asked == [(("1.2.77", 0), ("1.2.6", 0))] or len(asked) == 1
    assert geometry.regular and geometry.shape[0] == 20
    assert geometry.repairs == ("1 image left out, identical to another in the same place",)
    assert list(geometry.left_out.values()) == ["identical to another image"]
    assert geometry.notes == geometry.repairs
    with pytest.raises(SeriesRejected, match="different images lie in the same place"):
        volume_geometry(images, regular="repair", same_slice=lambda one, other: False)
    with pytest.raises(SeriesRejected, match="duplicate position: 1 of 21 images"):
        volume_geometry(images, same_slice=same)


def test_the_same_plane_elsewhere_is_no_duplicate() -> None:
    images = series()
    x, y, z = images[5]["ImagePositionPatient"]
    images.append({**images[5], "SOPInstanceUID": "1.2.77", "ImagePositionPatient": [x + 30, y, z]})
    with pytest.raises(SeriesRejected, match="different images lie in the same place"):
        volume_geometry(images, regular="repair", same_slice=lambda one, other: True)


def test_too_few_slices_are_left_when_all_are_the_same() -> None:
    images = series(3)
    for image in images:
        image["ImagePositionPatient"] = [0.0, 0.0, 0.0]
    with pytest.raises(SeriesRejected, match="too few slices: 1 different"):
        volume_geometry(images, regular="repair", same_slice=lambda one, other: True)


def test_a_slice_beside_a_gap_stands_for_half_of_it() -> None:
    images = series()
    _drop(8, 9)(images)
    geometry = volume_geometry(images, regular="repair")
    assert geometry.widths_mm == pytest.approx([2.5] * 6 + [5.0, 5.0] + [2.5] * 10)
    assert geometry.coverage_mm == pytest.approx(50.0)
    assert geometry.grid_shape == (20, 64, 48)


def test_a_tilted_stack_lies_on_a_larger_grid() -> None:
    images = series()
    _tilt(15)(images)
    geometry = volume_geometry(images, regular="repair")
    shear = 19 * 2.5 * math.tan(math.radians(15)) / 0.8
    assert geometry.grid_shape == (20, 64 + math.ceil(shear), 48)
    assert geometry.shape == (20, 64, 48)
    assert geometry.shifts_px[0] == pytest.approx((0, 0))
    assert geometry.shifts_px[-1] == pytest.approx((shear, 0))


def test_a_tilted_gantry_is_the_same_as_a_sheared_stack() -> None:
    """Scanners tilt the images and move the table along z: the slices are nearer than the table steps."""
    angle = math.radians(20)
    images = series()
    for image in images:
        image["ImageOrientationPatient"] = [1, 0, 0, 0, math.cos(angle), -math.sin(angle)]
    geometry = volume_geometry(images, regular="repair")
    assert geometry.spacing_mm[0] == pytest.approx(2.5 * math.cos(angle))
    assert geometry.obliquity_deg == pytest.approx(20)
    assert "20.0 degrees" in geometry.repairs[0]


@pytest.mark.parametrize(
    ("keyword", "values", "name"),
    [
        ("AcquisitionNumber", ("1", "2"), "Acquisition Number"),
        ("EchoTime", ("5", "10"), "Echo Time"),
        ("TemporalPositionIdentifier", ("1", "2"), "Temporal Position"),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]), "Image Type"),
    ],
)
def test_what_tells_two_stacks_of_a_series_apart_is_named_but_its_value_is_not(
    keyword: str, values: tuple[Any, Any], name: str
) -> None:
    images = series()
    _two_phases(images)
    for image in images:
        image[keyword] = values[image["SOPInstanceUID"].endswith(".2") and image["SOPInstanceUID"].count(".") == 3]
    with pytest.raises(SeriesRejected, match=f"; {name} tells them apart$"):
        volume_geometry(images)


@pytest.mark.parametrize(
    ("keyword", "values", "refused"),
    [
        ("EchoTime", ("2.449", "2.451"), False),  # the same echo, spelled twice
        ("EchoTime", ("99.4", "99.6"), False),
        ("EchoTime", ("10", "10.0"), False),
        ("EchoTime", ("98", "104"), True),
        ("TemporalPositionIdentifier", ("1", "2"), True),
        ("AcquisitionNumber", ("1", "2"), True),
    ],
)
def test_an_even_stack_of_two_that_alternate_is_refused(keyword: str, values: tuple[str, str], refused: bool) -> None:
    images = series()
    for image in images:
        image[keyword] = values[_place(image) % 2]
    if refused:
        with pytest.raises(SeriesRejected, match="two stacks overlap"):
            volume_geometry(images)
    else:
        assert volume_geometry(images).regular


def _place(image: Image) -> int:
    return int(str(image["SOPInstanceUID"]).rsplit(".", 1)[-1])


def test_a_slice_beyond_the_join_of_two_acquisitions_is_no_second_stack() -> None:
    images = series()
    for image in images:
        image["AcquisitionNumber"] = "1" if _place(image) < 9 or _place(image) == 10 else "2"
    assert volume_geometry(images).regular


def test_an_empty_series_is_refused() -> None:
    with pytest.raises(SeriesRejected, match="too few slices: 0"):
        volume_geometry([])
