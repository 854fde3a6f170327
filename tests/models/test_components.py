"""Pieces and holes of label maps: those of a flood fill, those MONAI keeps, at a cost that labels do not multiply."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.transforms import KeepLargestConnectedComponent
from monai.transforms import utils as monai_utils
from pydantic import ValidationError

from dicom_node.models.components import holes, pieces
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import LabelOutput
from dicom_node.models.volume import labels_of

Map = npt.NDArray[np.uint8]
# what a random map is made of: how often a voxel has a label, and how many labels there are
SHARES = [(0.05, 1), (0.2, 1), (0.45, 1), (0.6, 1), (0.6, 4), (1.0, 3)]


def flooded(image: npt.NDArray[Any], connectivity: int | None = None, return_num: bool = False) -> Any:
    """What skimage.measure.label answers for a mask, by a flood fill in the order of the voxels."""
    reach = connectivity or image.ndim
    around = [
        step for step in itertools.product((-1, 0, 1), repeat=image.ndim) if 0 < np.abs(step).sum() <= min(reach, 3)
    ]
    numbers = np.zeros(image.shape, np.int64)
    left = set(map(tuple, np.argwhere(image).tolist()))
    count = 0
    for start in sorted(left):
        if start not in left:
            continue
        count += 1
        left.discard(start)
        heap = [start]
        while heap:
            at = heap.pop()
            numbers[at] = count
            for step in around:
                near = tuple(a + b for a, b in zip(at, step, strict=True))
                if near in left:
                    left.discard(near)
                    heap.append(near)
    return (numbers, count) if return_num else numbers


def random_map(seed: int, share: float, labels: int) -> Map:
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 14, 3)
    return (rng.integers(1, labels + 1, shape) * (rng.random(shape) < share)).astype(np.uint8)


@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize(("share", "labels"), SHARES)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_those_that_a_flood_fill_finds(seed: int, share: float, labels: int, connectivity: int) -> None:
    values = random_map(seed, share, labels)
    found = pieces(values, range(1, labels + 1), connectivity)
    expected = {label: flooded(values == label, connectivity) for label in range(1, labels + 1)}
    sizes = {label: np.bincount(numbers[numbers > 0])[1:].tolist() for label, numbers in expected.items()}
    for label in sizes:
        assert found.sizes[found.labels == label].tolist() == sizes[label], "in the order of their first voxels"
    for number, label in enumerate(found.labels.tolist()):
        nth = np.count_nonzero(found.labels[:number] == label) + 1
        np.testing.assert_array_equal(found.mask(np.arange(found.sizes.size) == number), expected[label] == nth)
    largest = {int(label): int(size) for label, size in zip(found.labels, found.sizes * found.largest(), strict=True)}
    assert found.largest().sum() == len(largest)
    assert found.sizes[found.largest()].sum() == sum(max(of, default=0) for of in sizes.values())


@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_pieces_are_joined_across_what_is_looked_at_at_once(connectivity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_map(8, 0.5, 2)
    whole = pieces(values, [1, 2], connectivity)
    monkeypatch.setattr("dicom_node.models.components._SLAB", 1)
    monkeypatch.setattr("dicom_node.models.components._CHUNK", 3)
    parts = pieces(values, [1, 2], connectivity)
    assert whole.sizes.size > 3
    assert parts.sizes.tolist() == whole.sizes.tolist() and parts.labels.tolist() == whole.labels.tolist()
    chosen = np.arange(whole.sizes.size) % 2 == 1
    np.testing.assert_array_equal(parts.mask(chosen), whole.mask(chosen))


def test_labels_that_are_not_wanted_and_nothing_at_all_have_no_pieces() -> None:
    values = random_map(2, 0.6, 3)
    assert set(pieces(values, [2]).labels.tolist()) == {2}
    nothing = pieces(np.zeros((3, 4, 5), np.uint8), [1, 2])
    assert nothing.sizes.size == nothing.labels.size == nothing.largest().size == 0
    assert nothing.mask(nothing.largest()).shape == (3, 4, 5) and not nothing.mask(nothing.largest()).any()


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_holes_are_what_no_path_from_the_border_reaches(seed: int, share: float) -> None:
    empty = np.random.default_rng(seed).random((7, 9, 8)) < share
    numbers = flooded(empty, 1)
    outside = set(numbers[0].flat) | set(numbers[-1].flat) | set(numbers[:, 0].flat) | set(numbers[:, -1].flat)
    outside |= set(numbers[:, :, 0].flat) | set(numbers[:, :, -1].flat) | {0}
    expected = np.flatnonzero(~np.isin(numbers, sorted(outside)))
    assert expected.size
    np.testing.assert_array_equal(holes((7, 9, 8), iter(empty)), expected)


# --- as MONAI keeps them

SHAPE = (12, 11, 13)  # of the network's axes
SEGMENT = {"category": ["91723000", "SCT", "Anatomical structure"], "type": ["78961009", "SCT", "Spleen"]}


@pytest.fixture
def keep_largest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """MONAI's own transform. Where skimage is not installed, a flood fill numbers the pieces for it."""
    if not monai_utils.has_measure:
        monkeypatch.setattr(monai_utils, "has_measure", True)
        monkeypatch.setattr(monai_utils, "measure", SimpleNamespace(label=flooded))

    def kept(values: Map, **arguments: Any) -> Map:
        done = KeepLargestConnectedComponent(**arguments)(torch.from_numpy(values[None].copy()))
        found: Map = np.asarray(done)[0]
        return found

    return kept


def cleaned(values: Map, labels: list[dict[str, Any]], pulse: Any = lambda: None) -> Map:
    """`values` (network's axes) as a network's answer, cleaned up and brought back, turned as they were."""
    grid = ModelGrid(SHAPE[::-1], SHAPE[::-1], (1.0,) * 3, (1.0,) * 3, (2, 1, 0), (True, False, True))
    rows = torch.from_numpy(np.stack([(values == n) * 9.0 for n in range(4)]).astype(np.float32))
    output = {"activation": "softmax", "decide": "argmax", "inverse": "labels", "labels": labels}
    box = (slice(0, SHAPE[2]), slice(0, SHAPE[1]), slice(0, SHAPE[0]))
    found: Map = labels_of(rows, grid, output, box, pulse)[::-1, :, ::-1].transpose(2, 1, 0)
    return found


def label(index: int, **changes: Any) -> dict[str, Any]:
    return {"index": index, "keep": "all", "connectivity": 1, "min_ml": 0.0, **changes}


def vessels() -> Map:
    """Lines that go through faces, edges and corners, next to a block; of every label the longest go slantwise."""
    values = np.zeros(SHAPE, np.uint8)
    for k in range(9):
        values[k, k, k] = 1  # corners
        values[k, k, 12] = values[k, 9 - k, 11] = 2  # edges, and corners between the two
        values[11 - k, 10 - k, min(k, 3)] = 3
    values[10:, 0:3, 0] = 1
    values[10:, 0:2, 12] = 2
    values[0:4, 10, 0] = 3
    return values


def noise(seed: int, share: float) -> Map:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 4, SHAPE) * (rng.random(SHAPE) < share)).astype(np.uint8)


MAPS = {"vessels": vessels()} | {f"noise {share} {n}": noise(n, share) for share in (0.1, 0.3, 0.6) for n in range(3)}


@pytest.mark.parametrize("connectivity", [None, 1, 2, 3])
@pytest.mark.parametrize("name", MAPS)
def test_the_piece_that_is_kept_is_monais(name: str, connectivity: int | None, keep_largest: Any) -> None:
    values, applied = MAPS[name].copy(), [1, 3]
    for number in applied:  # which of several equally large ones MONAI keeps, its processor decides: see below
        numbers = flooded(values == number, connectivity)
        sizes = np.bincount(numbers[numbers > 0])
        for tied in np.flatnonzero(sizes == sizes.max())[1:]:
            values[numbers == tied] = 2
    theirs = keep_largest(values, applied_labels=applied, connectivity=connectivity)
    one = {"keep": "largest_component", "connectivity": connectivity or 3}
    ours = cleaned(values, [label(1, **one), label(2), label(3, **one)])
    assert (theirs != values).any(), "a case that shows something"
    np.testing.assert_array_equal(ours, theirs)


def test_connectivities_differ_and_each_label_has_its_own(keep_largest: Any) -> None:
    values = vessels()
    found = [keep_largest(values, applied_labels=[1, 2, 3], connectivity=n) for n in (1, 2, 3)]
    assert len({one.tobytes() for one in found}) == 3
    labels = [label(n, keep="largest_component", connectivity=4 - n) for n in (1, 2, 3)]
    expected = sum(np.where(one == 4 - n, 4 - n, 0) for n, one in enumerate(found, start=1))
    np.testing.assert_array_equal(cleaned(values, labels), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 3])
def test_of_equally_large_pieces_the_last_along_the_networks_axes_stays_as_in_monai(
    axis: int, count: int, keep_largest: Any
) -> None:
    values = np.zeros(SHAPE, np.uint8)
    for n in range(count):
        corner = [2, 2, 2]
        corner[axis] = 4 * n
        values[corner[0] : corner[0] + 2, corner[1] : corner[1] + 2, corner[2] : corner[2] + 2] = 1
    theirs = keep_largest(values, applied_labels=[1])
    assert int(np.argwhere(theirs)[:, axis].min()) == 4 * (count - 1)
    ours = cleaned(values, [label(1, keep="largest_component", connectivity=3)])
    np.testing.assert_array_equal(ours, theirs)


def test_small_pieces_are_counted_with_the_connectivity_of_their_label() -> None:
    values = np.zeros(SHAPE, np.uint8)
    values[range(6), range(6), range(6)] = 1
    values[10, 1:6, 0] = 1
    sizes = [np.count_nonzero(cleaned(values, [label(1, connectivity=n, min_ml=0.0055)])) for n in (1, 2, 3)]
    assert sizes == [0, 0, 6]


def test_every_plane_of_a_clean_up_asks_whether_there_is_something_more_urgent() -> None:
    asked: list[int] = []
    cleaned(vessels(), [label(1)], lambda: asked.append(1))
    plain = len(asked)
    cleaned(vessels(), [label(1, keep="largest_component")], lambda: asked.append(1))
    assert len(asked) - plain >= plain + SHAPE[2] + 2


@pytest.mark.parametrize("said", [None, 1, 2, 3])
def test_a_package_says_what_makes_a_piece_and_else_only_faces_do(said: int | None) -> None:
    block = {"index": 1, "key": "vessel", "segment": SEGMENT, "keep": "largest_component"}
    taken = LabelOutput.model_validate(block if said is None else {**block, "connectivity": said})
    assert taken.connectivity == (said or 1)


@pytest.mark.parametrize("said", [0, 4, 26, 1.5, "2", None])
def test_another_connectivity_is_refused(said: Any) -> None:
    with pytest.raises(ValidationError, match="connectivity"):
        LabelOutput.model_validate({"index": 1, "key": "vessel", "segment": SEGMENT, "connectivity": said})


# --- what it costs


def test_a_hundred_labels_cost_about_what_one_costs() -> None:
    """Before, each label went over the whole grid: 104 of them took a minute of 300 x 300 x 300 voxels."""
    rng = np.random.default_rng(0)
    values = np.zeros((160, 160, 160), np.uint8)
    ball = ((np.indices((31, 31, 31)) - 15) ** 2).sum(0) < 200
    for n in range(1, 105):
        z, y, x = rng.integers(0, 129, 3)
        values[z : z + 31, y : y + 31, x : x + 31][ball] = n
    asked: list[float] = []
    started = time.process_time()
    found = pieces(values, range(1, 105), 3, lambda: asked.append(time.process_time()))
    dropped = found.mask(~found.largest())
    seconds = time.process_time() - started
    assert np.unique(values[~dropped]).size == np.unique(values).size > 90
    assert seconds < 2.0, "a few hundredths of a second when nobody else computes"
    assert len(asked) >= 5 and max(np.diff([started, *asked])) < seconds / 2 + 0.1


def test_a_large_piece_takes_memory_for_its_runs_not_for_its_voxels() -> None:
    values = np.zeros((160, 160, 160), np.uint8)
    values[5:-5, 5:-5, 5:-5] = 1
    tracemalloc.start()
    try:
        found = pieces(values, [1])
        assert found.mask(found.largest()).sum() == 150**3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6, "of 4 million voxels; as many numbers of 8 bytes alone are 33 MB"
