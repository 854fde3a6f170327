"""Geometry: right on every regular stack, refused with a reason on every other. The table of hostile series is here."""

from __future__ import annotations

import math
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


HOSTILE: list[tuple[str, Callable[[list[Image]], None], str]] = [
    ("one slice missing", _drop(8), r"missing slice: 1 position without an image.*between -285\.00 and -280\.00 mm"),
    ("three slices missing in two places", _drop(5, 6, 12), "missing slice: 3 positions"),
    ("a slice twice", _duplicate, "duplicate position: 1 of 21 images"),
    ("two phases in one series", _two_phases, "duplicate position: 20 of 40 images"),
    ("spacing changes half way", _move(lambda k: (0, 0, max(0, k - 10) * 2.5)), "missing slice|irregular spacing"),
    ("spacing changes by half", _move(lambda k: (0, 0, max(0, k - 10) * 1.2)), "irregular spacing: slices are 2.50 to"),
    ("positions jitter by 0.2 mm", _jitter(0.2), "irregular spacing"),
    (
        "gantry tilt of 15 degrees",
        _move(lambda k: (0, 2.5 * k * math.tan(math.radians(15)), 0)),
        "gantry tilt.*15.0 deg",
    ),
    ("gantry tilt of one degree", _move(lambda k: (0, 2.5 * k * math.tan(math.radians(1)), 0)), "gantry tilt.*1.0 deg"),
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
    ("directions that are no unit vectors", _with("ImageOrientationPatient", [2, 0, 0, 0, 2, 0]), "unit vectors"),
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
    ("a multi-frame image", _with("NumberOfFrames", 40), "multi-frame"),
    ("two slices", _drop(*range(3, 21)), "too few slices: 2, at least 3"),
]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_series_is_refused_with_a_reason(change: Callable[[list[Image]], None], says: str) -> None:
    images = series()
    volume_geometry(images)
    change(images)
    with pytest.raises(SeriesRejected, match=says) as raised:
        volume_geometry(images)
    assert raised.value.reason == str(raised.value)


def test_an_empty_series_is_refused() -> None:
    with pytest.raises(SeriesRejected, match="too few slices: 0"):
        volume_geometry([])
