"""To the network's grid and back on series whose pixels say where they lie: what the network sees at a place is that
place, and a label it gives there comes back to the pixels that lie there. Hostile series included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dicom_node.geometry import VolumeGeometry
from dicom_node.model import StoredInstance
from dicom_node.models.grid import ModelGrid
from dicom_node.models.sampling import labels_on_source, sample
from dicom_node.pixels import read_image, read_volume, series_geometry

Floats = npt.NDArray[np.float64]
CPU = torch.device("cpu")
OUTSIDE = -9999.0

SERIES: dict[str, dict[str, Any]] = {
    "regular": {},
    "slices missing": {"gap": (4, 7, 8)},
    "jitter": {"jitter": 0.4},
    "tilt": {"tilt": 15.0},
    "tilt the other way": {"tilt": -20.0},
    "all of it": {"gap": (5,), "jitter": 0.4, "tilt": 10.0},
}


def rotation(seed: int) -> Floats:
    """A random rotation matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q * np.array([-1, 1, 1])


def frame_points(geometry: VolumeGeometry, grid: ModelGrid) -> Floats:
    """Grid index (slice in spacings, row, column) of every sample of the network's grid, in source axis order."""
    mm = np.interp(grid.source_positions(0), np.arange(geometry.shape[0]), geometry.positions_mm)
    axes = (mm / geometry.spacing_mm[0], grid.source_positions(1), grid.source_positions(2))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def lps(geometry: VolumeGeometry, index: Floats) -> Floats:
    return np.asarray(index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3])


def within_slices(geometry: VolumeGeometry, grid: ModelGrid, points: Floats) -> npt.NDArray[np.bool_]:
    """Which samples lie inside both slices around them: elsewhere a tilted stack shows nothing."""
    lower = np.clip(np.floor(grid.source_positions(0)).astype(int), 0, geometry.shape[0] - 2)
    shifts = np.array(geometry.shifts_px or [(0.0, 0.0)] * geometry.shape[0])
    inside = np.ones(points.shape[:3], np.bool_)
    for k in (lower, lower + 1):
        for axis in (1, 2):
            at = points[..., axis] - shifts[k, axis - 1][:, None, None]
            inside &= (at >= -1e-4) & (at <= geometry.shape[axis] - 1 + 1e-4)
    return inside


@pytest.mark.parametrize("multiframe", [False, True], ids=["single-frame", "multi-frame"])
@pytest.mark.parametrize("turned", [None, 1, 2], ids=["axial", "oblique", "other oblique"])
@pytest.mark.parametrize("case", SERIES)
def test_the_network_sees_places_and_its_labels_come_back_to_them(
    case: str,
    turned: int | None,
    multiframe: bool,
    tmp_path: Path,
    world_series: Callable[..., Any],
    stored: Callable[[Path], StoredInstance],
) -> None:
    world = world_series(
        tmp_path,
        orientation=None if turned is None else rotation(turned),
        shape=(14, 24, 20),
        multiframe=multiframe,
        **SERIES[case],
    )
    images = [read_image(stored(path)) for path in world.paths]
    geometry = series_geometry(images, regular="repair")
    volume = read_volume(images, geometry)
    for letters in ("RAS", "LPS", "SAR"):
        grid = ModelGrid.of(geometry, letters, (1.5, 1.3, 1.7))
        points = frame_points(geometry, grid)
        true = world.value(lps(geometry, points))
        seen = sample(torch.from_numpy(volume), grid, CPU, OUTSIDE).numpy()
        inside = within_slices(geometry, grid, points)
        assert inside.mean() > 0.5
        np.testing.assert_allclose(seen[inside], true[inside], atol=4e-3)
        _check_labels(world, geometry, grid, true)


def _check_labels(world: Any, geometry: VolumeGeometry, grid: ModelGrid, true: Floats) -> None:
    """The network says 1 above an oblique plane; so must every pixel that lies above it and inside the samples."""
    edge = float(np.median(true))
    lead = torch.from_numpy((true - edge).astype(np.float32))
    labels = labels_on_source(lambda k: lead[k][None], grid, CPU)
    assert labels.shape == geometry.shape
    # the last sample may lie beyond the images, where the border value stands for it
    ends = [(at.min(), at.max()) for at in (grid.source_positions(axis)[:-1] for axis in range(3))]
    rows, columns = np.indices(geometry.shape[1:])
    checked = 0
    for k, plane in enumerate(labels):
        down, across = geometry.shifts_px[k] if geometry.shifts_px else (0.0, 0.0)
        at = (np.full(rows.shape, k), rows + down, columns + across)
        covered = np.all([(low - 1e-6 <= x) & (x <= high + 1e-6) for x, (low, high) in zip(at, ends, strict=True)], 0)
        value = world.value(world.place(k, rows, columns))
        sure = covered & (np.abs(value - edge) > 0.01)
        np.testing.assert_array_equal(plane[sure], (value > edge)[sure])
        checked += int(sure.sum())
    assert checked > 0.5 * labels.size
