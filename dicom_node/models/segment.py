"""A CT series through a segmentation package: prepare, (runtime process), finish. Everything around the network.

`prepare` decides the geometry and reads HU, `volume_job` says what the runtime process is to do with them, `finish`
measures on the labels that come back. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError, EngineRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import EngineTask
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import ExpectedBlock, LabelOutput, SegmentationManifest
from dicom_node.models.selection import select_geometry, select_series
from dicom_node.pixels import read_image, read_volume, series_geometry
from dicom_node.values import (
    LabelVolume,
    Measurements,
    Presence,
    Segment,
    SegmentMeasurement,
)

__all__ = ["Prepared", "finish", "prepare"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

_INPUT = {"intensity", "crop", "first", "padding_hu"}  # what the runtime process needs to know of it
_CLEANED = {"index", "keep", "connectivity", "min_ml"}  # and of each label


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A series ready for the runtime process. `volume_hu` is (slice, row, column) on the images' own grid."""

    geometry: VolumeGeometry
    grid: ModelGrid
    volume_hu: npt.NDArray[np.int16] | Floats


def prepare(manifest: SegmentationManifest, task: EngineTask, heartbeat: Callable[[], None]) -> Prepared:
    """Read the series and decide how the network's grid lies on it.

    Raises EngineRejected with every reason why the package does not take the series, SeriesRejected when its geometry
    or pixel data are unfit.
    """
    selection = select_series(manifest.select, task.header)
    if not selection.ok:
        raise EngineRejected("; ".join(selection.reasons))
    images = {}
    for instance in task.instances:
        image = read_image(instance)
        images[instance.sop_instance_uid] = image
        heartbeat()
    geometry = series_geometry(
        list(images.values()),
        min_slices=3,
        excluded_image_types=manifest.select.exclude.image_type,
        regular=manifest.select.geometry.regular,
    )
    selection = select_geometry(manifest.select, geometry)
    if not selection.ok:
        raise EngineRejected("; ".join(selection.reasons))
    volume = read_volume(images.values(), geometry, values=manifest.input.values, heartbeat=heartbeat)
    grid = ModelGrid.of(geometry, manifest.input.orientation, manifest.input.spacing_mm)
    return Prepared(geometry=geometry, grid=grid, volume_hu=volume)


def volume_job(manifest: SegmentationManifest, grid: ModelGrid) -> dict[str, Any]:
    """What the runtime process is to do with the volume of `grid`; see `volume.segment_volume`."""
    output = manifest.output
    return {
        "grid": grid.to_message(),
        "input": manifest.input.model_dump(mode="json", by_alias=True, include=_INPUT),
        "output": {
            "activation": output.activation,
            "decide": output.decide,
            "inverse": output.inverse,
            "labels": [label.model_dump(include=_CLEANED) for label in output.labels],
        },
    }


# --- back to the source grid -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """What is counted of one label while its planes go by. Indices are (slice, row, column) of the source grid."""

    slices: dict[int, int] = field(default_factory=dict)  # voxels by slice
    hu_sum: float = 0.0
    low: list[int] = field(default_factory=lambda: [2**31] * 3)
    high: list[int] = field(default_factory=lambda: [-1] * 3)

    @property
    def voxels(self) -> int:
        """How many voxels there are in all."""
        return sum(self.slices.values())

    def cm3(self, slice_cm3: Sequence[float]) -> float:
        """Their volume, given that of one voxel of each slice."""
        return math.fsum(count * slice_cm3[k] for k, count in self.slices.items())

    def add(self, corner: tuple[int, int, int], mask: npt.NDArray[np.bool_], hu: npt.NDArray[np.generic]) -> None:
        """Count the voxels of `mask` (rows, columns), whose first voxel is `corner`, with their `hu`."""
        values = hu[mask]
        self.slices[corner[0]] = values.size
        self.hu_sum += float(values.sum(dtype=np.float64))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        ends = ((0, 0), (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1])))
        for axis, (low, high) in enumerate(ends):
            self.low[axis] = min(self.low[axis], corner[axis] + low)
            self.high[axis] = max(self.high[axis], corner[axis] + high)


def finish(
    manifest: SegmentationManifest, prepared: Prepared, labels: Labels, heartbeat: Callable[[], None]
) -> tuple[LabelVolume, Measurements]:
    """What is measured on `labels` (slice, row, column), with the codes of the package.

    Raises EngineError when they are not on the grid of the images.
    """
    geometry, outputs = prepared.geometry, manifest.output.labels
    if labels.shape != geometry.shape or labels.dtype != np.uint8:
        raise EngineError(f"the runtime answered {labels.dtype} {labels.shape} for images of {geometry.shape}")
    tallies = {label.index: _Tally() for label in outputs}
    for k, plane in enumerate(labels):
        _count(k, plane, prepared.volume_hu[k], tallies)
        heartbeat()
    voxel_cm3 = _voxel_cm3(geometry)
    for label in outputs:
        _drop_if_tiny(label, tallies, labels, voxel_cm3)
    segments = {label.index: _segment(label) for label in outputs}
    notes = geometry.notes
    volume = LabelVolume(
        labels=labels,
        sop_instance_uids=geometry.sop_instance_uids,
        frame_numbers=geometry.frame_numbers,
        segments=tuple(segments.values()),
        notes=notes,
    )
    items = tuple(
        _measurement(label, segments[label.index], manifest, prepared, tallies, voxel_cm3) for label in outputs
    )
    return volume, Measurements(items=items, notes=notes)


def _voxel_cm3(geometry: VolumeGeometry) -> list[float]:
    """The volume of a voxel of each slice."""
    return [mm * geometry.spacing_mm[1] * geometry.spacing_mm[2] / 1000.0 for mm in geometry.widths_mm]


def _count(k: int, plane: Labels, hu: npt.NDArray[np.generic], tallies: Mapping[int, _Tally]) -> None:
    """Count the labels of slice `k`, looking only where there are any."""
    rows = np.flatnonzero(plane.any(axis=1))
    if rows.size == 0:
        return
    band = slice(int(rows[0]), int(rows[-1]) + 1)
    columns = np.flatnonzero(plane[band].any(axis=0))
    box = (band, slice(int(columns[0]), int(columns[-1]) + 1))
    inside, values = plane[box], hu[box]
    for number in np.flatnonzero(np.bincount(inside.reshape(-1), minlength=256)).tolist():
        if number:
            tallies[number].add((k, box[0].start, box[1].start), inside == number, values)


def _drop_if_tiny(label: LabelOutput, tallies: dict[int, _Tally], labels: Labels, voxel_cm3: Sequence[float]) -> None:
    """Remnants between the network's voxels of pieces that were dropped there are no organ either."""
    tally = tallies[label.index]
    if tally.voxels and tally.cm3(voxel_cm3) < label.min_ml:
        box = labels[tuple(slice(low, high + 1) for low, high in zip(tally.low, tally.high, strict=True))]
        box[box == label.index] = 0
        tallies[label.index] = _Tally()


def _segment(label: LabelOutput) -> Segment:
    return Segment(
        number=label.index,
        key=label.key,
        label=label.name or label.segment.type.meaning,
        category=label.segment.category,
        type=label.segment.type,
        modifier=label.segment.modifier,
        color_rgb=label.color,
    )


# --- measurements ----------------------------------------------------------------------------------------------------


def _measurement(
    label: LabelOutput,
    segment: Segment,
    manifest: SegmentationManifest,
    prepared: Prepared,
    tallies: Mapping[int, _Tally],
    voxel_cm3: Sequence[float],
) -> SegmentMeasurement:
    tally = tallies[label.index]
    if tally.voxels:
        cut = _cut_axes(tally, prepared.geometry.shape)
        return SegmentMeasurement(
            segment=segment,
            presence=Presence.PRESENT,
            volume_cm3=tally.cm3(voxel_cm3),
            mean_hu=tally.hu_sum / tally.voxels if manifest.input.values == "hu" else None,
            note="reaches the edge of the images: measured on the visible part only" if cut else "",
        )
    doubt = _why_undetermined(label, manifest, prepared, tallies)
    return SegmentMeasurement(
        segment=segment,
        presence=Presence.UNDETERMINED if doubt else Presence.ABSENT,
        volume_cm3=None,
        mean_hu=None,
        note=doubt or "not found although its expected range was covered",
    )


def _cut_axes(tally: _Tally, shape: tuple[int, int, int]) -> list[int]:
    """Axes along which the label touches the end of the images."""
    return [axis for axis in range(3) if tally.low[axis] == 0 or tally.high[axis] == shape[axis] - 1]


def _why_undetermined(
    label: LabelOutput, manifest: SegmentationManifest, prepared: Prepared, tallies: Mapping[int, _Tally]
) -> str:
    """Why an organ without voxels cannot be called absent; '' when its expected range was covered."""
    if not label.expected:
        return "not found; this model cannot tell whether it should be visible"
    by_key = {other.key: other for other in manifest.output.labels}
    for expected in label.expected:
        tally = tallies[by_key[expected.near].index]
        if not tally.voxels:
            return f"not found, and neither was the {expected.near} that tells where to look"
        if _cut_axes(tally, prepared.geometry.shape) or not _covers(prepared, tally, expected):
            return f"not found; the images may not cover it (judged by the {expected.near})"
    return ""


def _covers(prepared: Prepared, near: _Tally, expected: ExpectedBlock) -> bool:
    """Whether the images reach far enough below and above `near` along the patient's long axis."""
    directions = prepared.geometry.affine[2, :3] / np.asarray(prepared.geometry.spacing_mm)
    axis = int(np.argmax(np.abs(directions)))
    spacing, count = prepared.geometry.spacing_mm[axis], prepared.geometry.shape[axis]
    at = (prepared.geometry.positions_mm if axis == 0 else ()) or [k * spacing for k in range(count)]
    before, after = at[near.low[axis]] - at[0], at[-1] - at[near.high[axis]]
    below, above = (before, after) if directions[axis] > 0 else (after, before)
    return below >= expected.below_mm and above >= expected.above_mm
