"""Polygons to pixels, counted against polygons whose areas are known, and what is no polygon refused."""

import math
from typing import Any

import numpy as np
import pytest

from dicom_node.engines._aiaa_polygons import UnusablePolygons, area, painted, polygons_of, slices_of

SIZE = (60, 80)


def _polygon(*points: tuple[float, float]) -> Any:
    return np.array(points, np.float64)


def _boundary_points(polygon: Any) -> int:
    """Lattice points on the outline of a polygon of whole-numbered vertices."""
    steps = np.abs(np.roll(polygon, -1, axis=0) - polygon).astype(int)
    return sum(math.gcd(int(x), int(y)) for x, y in steps)


def _pick(polygon: Any) -> float:
    """Lattice points inside and on the outline, by Pick's theorem."""
    return area(polygon) + _boundary_points(polygon) / 2 + 1


def _star(seed: int) -> Any:
    """A simple polygon of whole-numbered vertices: around one point, by the angle."""
    rng = np.random.default_rng(seed)
    at = rng.integers((2, 2), (78, 58), size=(int(rng.integers(3, 14)), 2)).astype(float)
    at = np.unique(at, axis=0)
    middle = at.mean(axis=0) + np.array((0.0137, 0.0071))  # on no line through two of them
    angles = np.arctan2(*(at - middle).T[::-1])
    return at[np.argsort(angles)]


@pytest.mark.parametrize(
    ("polygon", "enclosed", "pixels"),
    [
        (_polygon((10, 10), (20, 10), (20, 20), (10, 20)), 100, 121),
        (_polygon((10, 10), (20, 10), (10, 20)), 50, 66),
        (_polygon((0, 0), (4, 0), (4, 2), (2, 2), (2, 4), (0, 4)), 12, 21),  # an L
        (_polygon((0, 3), (3, 0), (6, 3), (3, 6)), 18, 25),  # on a corner
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_polygon_between_centres_has_the_pixels_picks_theorem_counts(
    polygon: Any, enclosed: float, pixels: int, turned: bool
) -> None:
    polygon = polygon[::-1] if turned else polygon
    assert area(polygon) == enclosed
    assert _pick(polygon) == pixels
    assert painted([polygon], SIZE).sum() == pixels


@pytest.mark.parametrize("seed", range(60))
def test_any_simple_polygon_of_whole_numbers_does(seed: int) -> None:
    polygon = _star(seed)
    assert painted([polygon], SIZE).sum() == _pick(polygon)


@pytest.mark.parametrize(
    ("polygon", "enclosed"),
    [
        (_polygon((10, 10), (20, 10), (20, 20), (10, 20)), 100),
        (_polygon((0, 0), (4, 0), (4, 2), (2, 2), (2, 4), (0, 4)), 12),
        (_polygon((0, 0), (80, 0), (80, 60), (0, 60)), 4800),
    ],
)
def test_a_polygon_between_corners_has_as_many_pixels_as_its_area(polygon: Any, enclosed: int) -> None:
    assert painted([polygon], SIZE, "corners").sum() == area(polygon) == enclosed


def test_polygons_that_touch_at_corners_share_no_pixel_and_leave_none() -> None:
    one = _polygon((0, 0), (30.5, 0), (40, 60), (0, 60))
    other = _polygon((30.5, 0), (80, 0), (80, 60), (40, 60))
    masks = [painted([polygon], SIZE, "corners") for polygon in (one, other)]
    assert not (masks[0] & masks[1]).any() and (masks[0] | masks[1]).all()


@pytest.mark.parametrize("vertices", ["centres", "corners"])
def test_a_circle_has_its_area(vertices: Any) -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([40.2 + 25 * np.cos(angles), 30.3 + 25 * np.sin(angles)], axis=1)
    assert painted([circle], SIZE, vertices).sum() == pytest.approx(math.pi * 25**2, rel=0.005)


def test_columns_are_x_and_rows_are_y() -> None:
    mask = painted([_polygon((50, 3), (55, 3), (55, 4), (50, 4))], SIZE)
    assert mask[3:5, 50:56].all() and mask.sum() == 12


def test_one_vertex_is_a_pixel_and_two_are_a_line() -> None:
    assert np.argwhere(painted([_polygon((7, 5))], SIZE)).tolist() == [[5, 7]]
    assert np.argwhere(painted([_polygon((7, 5), (7, 8))], SIZE)).tolist() == [[5, 7], [6, 7], [7, 7], [8, 7]]
    assert np.argwhere(painted([_polygon((2, 2), (4, 4))], SIZE)).tolist() == [[2, 2], [3, 3], [4, 4]]


def test_a_polygon_inside_another_is_a_hole_whose_outline_is_painted() -> None:
    outer, hole = (_polygon((a, a), (b, a), (b, b), (a, b)) for a, b in ((10, 30), (15, 25)))
    mask = painted([outer, hole], SIZE)
    assert mask.sum() == 21 * 21 - 9 * 9
    assert mask[15, 15:26].all() and not mask[16:25, 16:25].any()


def test_polygons_beside_each_other_are_all_painted() -> None:
    one, other = _polygon((1, 1), (3, 1), (3, 3), (1, 3)), _polygon((10, 10), (12, 10), (12, 12), (10, 12))
    assert painted([one, other], SIZE).sum() == 18


def test_what_reaches_the_edge_of_the_image_is_cut_there() -> None:
    whole = _polygon((-1, -1), (80, -1), (80, 60), (-1, 60))
    assert painted([whole], SIZE).all()


# --- what is no polygon ----------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def test_slices_of_an_answer_are_read_in_order_and_empty_ones_stay_empty() -> None:
    told = [[], [[[1, 2], [3, 2], [3, 4]]], [[]]]
    slices = slices_of(told, (3, *SIZE), _nothing)
    assert [len(slice_) for slice_ in slices] == [0, 1, 0]
    assert slices[1][0].tolist() == [[1, 2], [3, 2], [3, 4]]


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"poly": []},
        [[]],
        [[], [], [], []],
        [[], 7, []],
        [[], [7], []],
        [[], [[7]], []],
        [[], [[[1]]], []],
        [[], [[[1, 2, 3]]], []],
        [[], [[[1, "2"]]], []],
        [[], [[[True, 1]]], []],
        [[], [[[float("nan"), 1]]], []],
        [[], [[[float("inf"), 1]]], []],
        [[], [[[10**400, 1]]], []],
        [[], [[[81, 1]]], []],
        [[], [[[1, -2]]], []],
    ],
)
def test_what_is_no_polygon_on_these_images_is_refused(told: Any) -> None:
    with pytest.raises(UnusablePolygons):
        slices_of(told, (3, *SIZE), _nothing)


def test_outlines_that_run_up_and_down_for_ever_are_refused_before_they_are_painted() -> None:
    rows, columns = SIZE
    comb = [[column, row] for column in range(columns) for row in ((0, rows) if column % 2 else (rows, 0))]
    assert len(polygons_of([comb], SIZE)) == 1  # as many as any mask may have
    with pytest.raises(UnusablePolygons, match="up and down"):
        polygons_of([comb] * 5, SIZE)


def test_too_many_polygons_are_refused() -> None:
    with pytest.raises(UnusablePolygons, match="at most"):
        polygons_of([[[1, 1]]] * 10_001, SIZE)
