"""A CT series through a segmentation package: prepare, (runtime process), finish. Everything around the network.

`prepare` decides the geometry, reads HU and resamples; `finish` brings the network's probabilities back to the source
grid, slice by slice, and measures on the way. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError, EngineRejected
from dicom_node.geometry import VolumeGeometry, volume_geometry
from dicom_node.model import EngineTask, LabelVolume, Measurements, Presence, Segment, SegmentMeasurement
from dicom_node.models.components import pieces
from dicom_node.models.manifest import ExpectedBlock, LabelOutput, SegmentationManifest
from dicom_node.models.resample import LabelPlane, ModelGrid, first_largest, label_planes, resample
from dicom_node.models.selection import select_geometry, select_series
from dicom_node.pixels import read_hounsfield, read_image

__all__ = ["Prepared", "finish", "prepare"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A series ready for the network. `network_input` is (X, Y, Z) in the network's axis order and value range."""

    geometry: VolumeGeometry
    grid: ModelGrid
    volume_hu: npt.NDArray[np.int16] | Floats
    network_input: Floats


def prepare(manifest: SegmentationManifest, task: EngineTask, heartbeat: Callable[[], None]) -> Prepared:
    """Read the series and bring it to the network's grid.

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
    geometry = volume_geometry(
        [image.header for image in images.values()],
        min_slices=3,
        excluded_image_types=manifest.select.exclude.image_type,
    )
    selection = select_geometry(manifest.select, geometry)
    if not selection.ok:
        raise EngineRejected("; ".join(selection.reasons))
    volume = read_hounsfield([images[uid] for uid in geometry.sop_instance_uids], heartbeat)
    grid = ModelGrid.of(geometry, manifest.input.orientation, manifest.input.spacing_mm)
    sampled = resample(volume, grid, heartbeat)
    _scale(sampled, manifest)
    return Prepared(
        geometry=geometry,
        grid=grid,
        volume_hu=volume,
        network_input=np.ascontiguousarray(grid.to_model_order(sampled)),
    )


def _scale(values: Floats, manifest: SegmentationManifest) -> None:
    (low, high), (a, b) = manifest.input.intensity.clip, manifest.input.intensity.to
    np.clip(values, low, high, out=values)
    values -= np.float32(low)
    values *= np.float32((b - a) / (high - low))
    values += np.float32(a)


# --- back to the source grid -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """What is counted of one label while its planes go by. Indices are (slice, row, column) of the source grid."""

    voxels: int = 0
    hu_sum: float = 0.0
    low: list[int] = field(default_factory=lambda: [2**31] * 3)
    high: list[int] = field(default_factory=lambda: [-1] * 3)

    def add(self, corner: tuple[int, int, int], mask: npt.NDArray[np.bool_], hu: npt.NDArray[np.generic]) -> None:
        """Count the voxels of `mask` (rows, columns), whose first voxel is `corner`, with their `hu`."""
        values = hu[mask]
        if values.size == 0:
            return
        self.voxels += values.size
        self.hu_sum += float(values.sum(dtype=np.float64))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        ends = ((0, 0), (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1])))
        for axis, (low, high) in enumerate(ends):
            self.low[axis] = min(self.low[axis], corner[axis] + low)
            self.high[axis] = max(self.high[axis], corner[axis] + high)


def finish(
    manifest: SegmentationManifest, prepared: Prepared, probability: Floats, heartbeat: Callable[[], None]
) -> tuple[LabelVolume, Measurements]:
    """Labels on the source grid and what is measured on them, from `probability` (class, X, Y, Z).

    Raises EngineError when the network's output does not have the package's classes or the grid's shape.
    """
    grid, geometry = prepared.grid, prepared.geometry
    outputs = manifest.output.labels
    expected = tuple(prepared.network_input.shape)
    if probability.shape[1:] != expected or len(probability) <= max(label.index for label in outputs):
        raise EngineError(f"the network answered {probability.shape} for a volume of {expected}")
    ordered = np.array(grid.to_source_order(probability))
    _clean_up(ordered, outputs, float(np.prod(grid.spacing_mm)) / 1000.0)
    labels = np.zeros(geometry.shape, np.uint8)
    tallies = {label.index: _Tally() for label in outputs}
    for plane in label_planes(ordered, grid):
        if plane is not None:
            _write(plane, labels, prepared.volume_hu, tallies)
        heartbeat()
    for label in outputs:
        _drop_if_tiny(label, tallies, labels, geometry.voxel_cm3)
    segments = {label.index: _segment(label) for label in outputs}
    notes = _notes(geometry.left_out)
    volume = LabelVolume(
        labels=labels,
        sop_instance_uids=geometry.sop_instance_uids,
        segments=tuple(segments.values()),
        notes=notes,
    )
    items = tuple(_measurement(label, segments[label.index], manifest, prepared, tallies) for label in outputs)
    return volume, Measurements(items=items, notes=notes)


def _clean_up(probability: Floats, outputs: tuple[LabelOutput, ...], voxel_ml: float) -> None:
    """Turn unwanted pieces of each label into background, in place, on the network's grid."""
    if all(label.keep == "all" and label.min_ml == 0 for label in outputs):
        return
    coarse = first_largest(probability)
    flat = probability.reshape(len(probability), -1)
    for label in outputs:
        if label.keep == "all" and label.min_ml == 0:
            continue
        voxels, piece = pieces(coarse == label.index)
        if voxels.size == 0:
            continue
        unwanted = np.bincount(piece) * voxel_ml < label.min_ml
        if label.keep == "largest_component":
            unwanted[1:] = True
        dropped = voxels[unwanted[piece]]
        flat[:, dropped] = 0.0
        flat[0, dropped] = 1.0


def _write(
    plane: LabelPlane, labels: Labels, volume_hu: npt.NDArray[np.int16] | Floats, tallies: Mapping[int, _Tally]
) -> None:
    """Put the package's labels of one slice in their place and count them; other classes are background."""
    place = (plane.slice_index, plane.rows, plane.columns)
    target, hu = labels[place], volume_hu[place]
    for number, tally in tallies.items():
        mask = plane.labels == number
        if mask.any():
            target[mask] = number
            tally.add((plane.slice_index, plane.rows.start, plane.columns.start), mask, hu)


def _drop_if_tiny(label: LabelOutput, tallies: dict[int, _Tally], labels: Labels, voxel_cm3: float) -> None:
    """Remnants between the network's voxels of pieces that were dropped there are no organ either."""
    tally = tallies[label.index]
    if tally.voxels and tally.voxels * voxel_cm3 < label.min_ml:
        box = labels[tuple(slice(low, high + 1) for low, high in zip(tally.low, tally.high, strict=True))]
        box[box == label.index] = 0
        tallies[label.index] = _Tally()


def _segment(label: LabelOutput) -> Segment:
    return Segment(
        number=label.index,
        key=label.key,
        label=label.segment.type.meaning,
        category=label.segment.category,
        type=label.segment.type,
        modifier=label.segment.modifier,
        color_rgb=label.color,
    )


def _notes(left_out: Mapping[str, str]) -> tuple[str, ...]:
    reasons = sorted(set(left_out.values()))
    counts = {reason: sum(1 for other in left_out.values() if other == reason) for reason in reasons}
    return tuple(f"{count} images not analysed: {reason}" for reason, count in counts.items())


# --- measurements ----------------------------------------------------------------------------------------------------


def _measurement(
    label: LabelOutput,
    segment: Segment,
    manifest: SegmentationManifest,
    prepared: Prepared,
    tallies: Mapping[int, _Tally],
) -> SegmentMeasurement:
    tally = tallies[label.index]
    if tally.voxels:
        cut = _cut_axes(tally, prepared.geometry.shape)
        return SegmentMeasurement(
            segment=segment,
            presence=Presence.PRESENT,
            volume_cm3=tally.voxels * prepared.geometry.voxel_cm3,
            mean_hu=tally.hu_sum / tally.voxels,
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
    spacing = prepared.geometry.spacing_mm[axis]
    before = near.low[axis] * spacing
    after = (prepared.geometry.shape[axis] - 1 - near.high[axis]) * spacing
    below, above = (before, after) if directions[axis] > 0 else (after, before)
    return below >= expected.below_mm and above >= expected.above_mm
