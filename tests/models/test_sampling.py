"""Resampling: where each voxel comes from, equal to MONAI's Orientation + Spacing, and exactly back again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dicom_node.geometry import VolumeGeometry, volume_geometry
from dicom_node.models.grid import ModelGrid
from dicom_node.models.sampling import first_largest, labels_on_source, sample

Floats = npt.NDArray[np.float32]

AXIAL = ((1, 0, 0), (0, 1, 0))
FRAMES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "axial": AXIAL,
    "axial, feet first": ((-1, 0, 0), (0, 1, 0)),
    "axial, prone": ((-1, 0, 0), (0, -1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": ((0.96, 0.28, 0), (-0.2688, 0.9216, 0.28)),
}


def geometry_of(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    frame: tuple[tuple[float, ...], tuple[float, ...]] = AXIAL,
) -> VolumeGeometry:
    """A regular stack with the first voxel at an odd place."""
    row, column = np.array(frame[0], float), np.array(frame[1], float)
    normal = np.cross(row, column)
    return volume_geometry(
        [
            {
                "SOPClassUID": "1.2",
                "SOPInstanceUID": f"1.2.{k}",
                "FrameOfReferenceUID": "1.3",
                "ImagePositionPatient": list(np.array([-17.3, 41.1, 203.7]) + normal * spacing[0] * k),
                "ImageOrientationPatient": [*row, *column],
                "PixelSpacing": spacing[1:],
                "Rows": shape[1],
                "Columns": shape[2],
            }
            for k in range(shape[0])
        ]
    )


def world_values(geometry: VolumeGeometry, weights: tuple[float, float, float]) -> Floats:
    """A volume whose value is a linear function of the patient position: a wrong place shows as a wrong value."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij"), axis=-1)
    positions = index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
    return (positions @ np.array(weights)).astype(np.float32)


def sampled_for(volume: npt.NDArray[Any], grid: ModelGrid) -> Floats:
    sampled: Floats = sample(torch.from_numpy(volume), grid, torch.device("cpu"), -1000.0).numpy()
    return sampled


def random_case(seed: int) -> tuple[VolumeGeometry, tuple[float, float, float]]:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(9, 40, 3))
    spacing = tuple(float(v) for v in rng.uniform(0.6, 5, 3))
    frame = list(FRAMES.values())[seed % len(FRAMES)]
    target = tuple(float(v) for v in rng.uniform(0.8, 6, 3))
    return geometry_of((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), frame), (
        target[0],
        target[1],
        target[2],
    )


def turned(geometry: VolumeGeometry, orientation: str) -> tuple[list[int], list[int], npt.NDArray[np.float64]]:
    """MONAI's Orientation by hand (it needs nibabel): axes, those to flip, and the affine (RAS) that follows."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ geometry.affine
    cosines = ras[:3, :3] / np.linalg.norm(ras[:3, :3], axis=0)
    axes, flips = [], []
    for letter in orientation:
        wanted = "RAS".find(letter) if letter in "RAS" else "LPI".find(letter)
        axis = int(np.argmax(np.abs(cosines[wanted])))
        axes.append(axis)
        if (cosines[wanted, axis] < 0) == (letter in "RAS"):
            flips.append(len(axes) - 1)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for m, axis in enumerate(axes):
        change[axis, m] = -1 if m in flips else 1
        change[axis, 3] = geometry.shape[axis] - 1 if m in flips else 0
    return axes, flips, ras @ change


def monai_forward(
    volume: Floats, geometry: VolumeGeometry, orientation: str, spacing: tuple[float, ...]
) -> tuple[Any, Any]:
    """MONAI's Spacing on the turned volume: a MetaTensor (1, X, Y, Z), and the transform for its inverse."""
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    axes, flips, affine = turned(geometry, orientation)
    array = np.ascontiguousarray(np.flip(volume.transpose(axes), flips))
    transform = Spacing(pixdim=spacing)
    return transform(MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine))), transform


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
@pytest.mark.parametrize("seed", range(6))
def test_the_network_sees_what_monai_would_show_it(seed: int, orientation: str) -> None:
    geometry, target = random_case(seed)
    volume = np.random.default_rng(seed).uniform(-1000, 1000, geometry.shape).astype(np.float32)
    grid = ModelGrid.of(geometry, orientation, target)
    ours = sampled_for(volume, grid).transpose(grid.to_model_order())
    theirs, _ = monai_forward(volume, geometry, orientation, target)
    assert ours.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-3)


@pytest.mark.parametrize("name", FRAMES)
def test_every_sample_has_the_value_of_its_place_in_the_patient(name: str) -> None:
    geometry = geometry_of((20, 31, 27), (3.0, 1.1, 0.9), FRAMES[name])
    volume = world_values(geometry, (1.0, 10.0, 100.0))
    grid = ModelGrid.of(geometry, "RAS", (2.0, 2.5, 4.0))
    sampled = sampled_for(volume, grid).transpose(grid.to_model_order())
    # the first sample is the source voxel at the right, anterior, inferior end ... of the turned axes
    directions = np.empty((3, 3))
    start = np.zeros(3)
    for m, axis in enumerate(grid.axes):
        sign = -1.0 if grid.flipped[axis] else 1.0
        directions[:, m] = sign * geometry.affine[:3, axis] / geometry.spacing_mm[axis] * grid.spacing_mm[axis]
        start[axis] = geometry.shape[axis] - 1 if grid.flipped[axis] else 0
    origin = geometry.affine[:3, :3] @ start + geometry.affine[:3, 3]
    for index in np.ndindex(2, 2, 2):
        # a step inside from both ends, where nothing is held at the border
        at = [1 if low else n - 2 for low, n in zip(index, sampled.shape, strict=True)]
        place = origin + directions @ np.array(at)
        assert sampled[tuple(at)] == pytest.approx(place @ np.array([1.0, 10.0, 100.0]), abs=0.02)
    assert all(directions[m, m] * sign > 0 for m, sign in enumerate((-1, -1, 1))), (
        "x to the right, y to the front, z up"
    )


def test_int16_and_float32_volumes_give_the_same_samples() -> None:
    geometry, target = random_case(3)
    volume = np.random.default_rng(3).integers(-1024, 3071, geometry.shape).astype(np.int16)
    grid = ModelGrid.of(geometry, "RAS", target)
    np.testing.assert_array_equal(sampled_for(volume, grid), sampled_for(volume.astype(np.float32), grid))


def test_half_samples_round_to_even_as_monai_does() -> None:
    geometry = geometry_of((4, 8, 12), (2.0, 1.0, 0.75))
    grid = ModelGrid.of(geometry, "RAS", (1.5, 2.0, 2.0))
    assert grid.shape == (4, 4, 6)  # 7 * 1 / 2 + 1 = 4.5, 11 * .75 / 1.5 + 1 = 6.5


# --- back


def full_trilinear(probability: Floats, grid: ModelGrid) -> npt.NDArray[np.float64]:
    """Every class interpolated to every source voxel, float64, the slow and obvious way."""
    values = probability.astype(np.float64)
    for axis in range(3):
        at = grid.model_positions(axis)
        low = np.minimum(np.floor(at).astype(int), max(grid.shape[axis] - 2, 0))
        high = np.minimum(low + 1, grid.shape[axis] - 1)
        weight = (at - low).reshape([-1 if a == axis + 1 else 1 for a in range(4)])
        values = np.take(values, low, axis + 1) * (1 - weight) + np.take(values, high, axis + 1) * weight
    return values


def labels_of(probability: Floats, grid: ModelGrid) -> npt.NDArray[np.uint8]:
    return labels_on_source(lambda k: torch.from_numpy(probability[:, k]), grid, torch.device("cpu"))


def in_model_order(classes: Floats, grid: ModelGrid) -> Floats:
    return classes.transpose(0, *(axis + 1 for axis in grid.to_model_order()))


def smooth_probability(shape: tuple[int, ...], classes: int, seed: int, sharpness: float) -> Floats:
    """Blobs like organs (high sharpness) or a mush of everything (low)."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    logits = np.zeros((classes, *shape))
    for c in range(1, classes):
        centre = rng.uniform(-0.7, 0.7, 3)[:, None, None, None]
        logits[c] = sharpness * (rng.uniform(0.2, 0.6) - np.sqrt(((at - centre) ** 2).sum(0)))
    logits += rng.normal(0, 0.3, logits.shape)
    odds = np.exp(logits - logits.max(0))
    return (odds / odds.sum(0)).astype(np.float32)


@pytest.mark.parametrize("sharpness", [40.0, 6.0, 0.0], ids=["organs", "soft", "noise"])
@pytest.mark.parametrize("seed", range(6))
def test_the_way_back_equals_full_trilinear_interpolation_of_every_class(seed: int, sharpness: float) -> None:
    geometry, target = random_case(seed)
    grid = ModelGrid.of(geometry, "RAS", target)
    probability = smooth_probability(grid.shape, 4, seed, sharpness)
    values = full_trilinear(probability, grid)
    expected = values.argmax(axis=0)
    found = labels_of(probability, grid)
    different = found != expected
    # only where two classes are equal to the last bit of float32 may the order of additions decide
    ordered = np.sort(values, axis=0)
    assert (ordered[-1] - ordered[-2])[different].max(initial=0.0) < 1e-6
    assert different.mean() < 1e-4


def test_the_way_back_equals_monais_inverse() -> None:

    geometry = geometry_of((30, 64, 64), (2.0, 1.5, 1.5), FRAMES["axial"])
    grid = ModelGrid.of(geometry, "RAS", (4.0, 4.0, 4.0))
    pushed, transform = monai_forward(np.zeros(geometry.shape, np.float32), geometry, "RAS", (4.0, 4.0, 4.0))
    probability = smooth_probability(grid.shape, 4, 1, 40.0)
    pushed.data = torch.from_numpy(np.ascontiguousarray(in_model_order(probability, grid)))
    axes, flips, _ = turned(geometry, "RAS")
    theirs = transform.inverse(pushed).numpy().argmax(axis=0)
    theirs = np.flip(theirs, flips).transpose(np.argsort(axes))
    agreement = (labels_of(probability, grid) == theirs).mean()
    assert agreement >= 0.99999


def test_labels_come_back_to_the_side_they_are_on() -> None:
    geometry = geometry_of((10, 20, 20), (4.0, 4.0, 4.0))
    grid = ModelGrid.of(geometry, "RAS", (4.0, 4.0, 4.0))
    network = np.zeros((2, 20, 20, 10), np.float32)
    network[0] = 1.0
    network[:, 15, 4, 8] = (0.0, 1.0)  # X = 15: towards the patient's right is *low* index in RAS
    labels = labels_of(np.array(network.transpose(0, *(axis + 1 for axis in grid.to_source_order()))), grid)
    assert np.argwhere(labels).tolist() == [[8, 15, 4]]
    x, y, z = (geometry.affine @ np.array([8, 15, 4, 1.0]))[:3]
    assert (x, y) == pytest.approx((-17.3 + 4 * 4, 41.1 + 15 * 4)) and z == pytest.approx(203.7 + 8 * 4)


def test_model_order_and_source_order_are_inverse() -> None:
    for frame in FRAMES.values():
        grid = ModelGrid.of(geometry_of((5, 6, 7), (1.0, 1.0, 1.0), frame), "RAS", (1.0, 1.0, 1.0))
        array = np.arange(5 * 6 * 7).reshape(5, 6, 7)
        there = array.transpose(grid.to_model_order())
        np.testing.assert_array_equal(there.transpose(grid.to_source_order()), array)


def test_first_largest_is_argmax() -> None:
    values = np.random.default_rng(0).integers(0, 4, (5, 40, 40)).astype(np.float32)
    np.testing.assert_array_equal(first_largest(torch.from_numpy(values)).numpy(), values.argmax(axis=0))
