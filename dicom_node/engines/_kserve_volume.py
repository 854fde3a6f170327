"""A series of slices through a segmentation model on a server: windows out, scores in, labels on the source grid.

The volume on the model's grid is held, and of the scores as many planes as a window is deep; both are bounded before
anything is sent. Scores are interpolated back and decided there, as of our own models, unless the recipe says labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._kserve_check import wanted_of
from dicom_node.engines._kserve_grid import ModelGrid, labels_by_score, nearest_labels, sampled
from dicom_node.engines._kserve_recipe import MAX_CLASSES, VolumeOutput, VolumeRecipe
from dicom_node.engines._kserve_values import apply_steps, decider
from dicom_node.engines._kserve_windows import Lattice, blended, chosen
from dicom_node.engines.labels import Label, segments_of
from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.interfaces import Heartbeat
from dicom_node.pixels import AIR_HU
from dicom_node.values import LabelVolume, Segment

__all__ = ["Plan", "label_volume", "planned"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Infer = Callable[[wire.Message, Mapping[str, wire.Wanted]], wire.Reply]

_JSON_BYTES = 12  # that a number usually takes as text, with its comma


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a series goes through: windows of `lattice` on `grid`, `batch` at a time. `binary`: as tensors travel."""

    grid: ModelGrid
    lattice: Lattice
    batch: int
    full: bool  # batches must be: the model has a batch of one size
    binary: bool


def planned(
    recipe: VolumeRecipe, geometry: VolumeGeometry, *, full: bool, binary: bool, max_response_bytes: int
) -> Plan:
    """The plan for images of this geometry. Raises SeriesRejected when it needs more memory than the recipe allows
    or an answer would be longer than `max_response_bytes`."""
    grid = ModelGrid.of(geometry, recipe.input.orientation, recipe.input.spacing_mm)
    windows = recipe.windows
    if windows is None:
        lattice, batch = Lattice(shape=grid.shape, window=grid.shape), 1
    else:
        window = grid.in_source_order(windows.window)
        lattice = Lattice(shape=grid.shape, window=window, overlap=windows.overlap, blend=windows.blend)
        batch = windows.batch
    batch = batch if full else min(batch, lattice.count)
    plan = Plan(grid=grid, lattice=lattice, batch=batch, full=full, binary=binary)
    least = len(recipe.output.thresholds) or max(recipe.output.labels.values()) + 1
    classes = 1 if recipe.output.decide == "labels" else least
    _require_memory(recipe, plan, classes)
    answer = batch * classes * int(np.prod(lattice.window, dtype=np.int64)) * (4 if binary else _JSON_BYTES)
    if answer > max_response_bytes:
        raise SeriesRejected(
            f"{batch} windows of {classes} classes are about {answer} bytes, max_response_bytes allows "
            f"{max_response_bytes}: raise it, or make windows.batch or windows.window smaller"
        )
    return plan


def _require_memory(recipe: VolumeRecipe, plan: Plan, classes: int) -> None:
    """The volume on the model's grid, filled up, and a window's depth of scores with their weights."""
    padded, depth = plan.lattice.padded, plan.lattice.window[0]
    voxels = int(np.prod(padded, dtype=np.int64))
    window = int(np.prod(plan.lattice.window, dtype=np.int64))
    needed = 4 * (voxels + (classes + 1) * depth * padded[1] * padded[2] + plan.batch * (classes + 1) * window)
    if needed > recipe.max_memory_bytes:
        sides = " x ".join(map(str, padded))
        raise SeriesRejected(
            f"on the model's grid the series has {sides} voxels and needs {needed >> 20} MiB with {classes} classes; "
            f"max_memory_bytes allows {recipe.max_memory_bytes >> 20} MiB"
        )


# --- there and back --------------------------------------------------------------------------------------------------


def label_volume(
    recipe: VolumeRecipe,
    plan: Plan,
    voxels: npt.NDArray[np.generic],
    geometry: VolumeGeometry,
    infer: Infer,
    heartbeat: Heartbeat,
) -> LabelVolume:
    """The labels of the model on the images whose values `voxels` (slice, row, column) are.

    Raises SeriesRejected (memory; values the tensor's type cannot hold), `wire.UnusableAnswer`, and what `infer` and
    `heartbeat` raise.
    """
    padding = recipe.input.padding
    if padding is None:
        padding = float(AIR_HU) if recipe.input.values == "hu" else float(voxels.min())
    values = sampled(voxels, plan.grid, heartbeat)
    beyond = apply_steps(values, recipe.input.intensity, padding)
    ask = _Asker(recipe, plan, infer)
    output, notes = recipe.output, geometry.notes
    if output.decide == "labels":
        named = chosen(ask.labels, values, plan.lattice, batch=plan.batch, beyond=beyond)
        labels = nearest_labels(named, plan.grid, heartbeat)
    else:
        planes = blended(ask.scores, values, plan.lattice, batch=plan.batch, beyond=beyond)
        prepare, decide = decider(output)
        overlaps = _Overlaps(len(output.thresholds))
        prepared = (overlaps.counted(prepare(plane)) for plane in planes)
        if output.inverse == "labels":
            labels = nearest_labels((decide(plane) for plane in prepared), plan.grid, heartbeat)
        else:
            labels = labels_by_score(prepared, plan.grid, decide, heartbeat)
        notes = (*notes, *overlaps.notes)
    numbered, segments = _named(labels, output, ask.classes)
    return LabelVolume(
        labels=numbered,
        sop_instance_uids=geometry.sop_instance_uids,
        frame_numbers=geometry.frame_numbers,
        segments=segments,
        notes=notes,
    )


class _Overlaps:
    """Voxels of the model's grid that reach the thresholds of several labels: a label volume shows one of them."""

    def __init__(self, thresholds: int) -> None:
        self._several = thresholds > 1
        self._voxels = 0

    def counted(self, leads: Floats) -> Floats:
        if self._several:
            self._voxels += int(((leads >= 0).sum(axis=0) > 1).sum())
        return leads

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._voxels:
            return ()
        return (f"labels overlap in {self._voxels} voxels of the model: shown as the one furthest above its threshold",)


class _Asker:
    """Windows in the order of the source's axes to what the model says of them, in that order again."""

    def __init__(self, recipe: VolumeRecipe, plan: Plan, infer: Infer) -> None:
        self._recipe, self._plan, self._infer = recipe, plan, infer
        self._wanted = wanted_of(recipe)
        self.classes = 0

    def scores(self, windows: Floats) -> Floats:
        """(window, class, ...)."""
        said = self._asked(windows)
        self._require_classes(said.shape[1])
        return np.asarray(said, np.float32)

    def labels(self, windows: Floats) -> Labels:
        """(window, 1, ...)."""
        said = self._asked(windows)
        low, high = int(said.min()), int(said.max())
        if low < 0 or high >= MAX_CLASSES:
            raise wire.UnusableAnswer(f"labels of {low} to {high}, 0 to {MAX_CLASSES - 1} can be told apart")
        self.classes = max(self.classes, high + 1)
        return np.asarray(said, np.uint8)

    def _asked(self, windows: Floats) -> npt.NDArray[np.generic]:
        recipe, axes = self._recipe, self._plan.grid.axes
        count = len(windows)
        if self._plan.full and count < self._plan.batch:
            windows = np.concatenate([windows, np.zeros((self._plan.batch - count, *windows.shape[1:]), np.float32)])
        ordered = windows.transpose(0, *(axis + 1 for axis in axes))[:, None]
        tensor = wire.Tensor(
            name=recipe.input.name,
            datatype=recipe.input.datatype,
            values=wire.laid_out(ordered, recipe.input.layout),
        )
        try:
            message = wire.request(tensor, (recipe.output.name,), binary=self._plan.binary)
        except ValueError as exc:
            raise SeriesRejected(f"the images do not fit the model's input: {exc}") from exc
        sides = dict(zip("NCDHW", (len(windows), None, *ordered.shape[2:]), strict=True))
        wanted = self._wanted.shape or ()
        channels = dict(zip(recipe.output.layout, wanted, strict=True)).get("C") or self.classes or None
        sides["C"] = channels if recipe.output.decide != "labels" else 1
        shape = tuple(sides[letter] for letter in recipe.output.layout)
        reply = self._infer(message, {recipe.output.name: replace(self._wanted, shape=shape)})
        said = wire.taken_out(reply.tensors[recipe.output.name], recipe.output.layout)
        back = [axes.index(axis) + 2 for axis in range(3)]
        return said.transpose(0, 1, *back)[:count]

    def _require_classes(self, classes: int) -> None:
        if self.classes:
            return
        output = self._recipe.output
        most = max(output.labels.values())
        if classes > MAX_CLASSES or (output.decide == "argmax" and classes <= most):
            raise wire.UnusableAnswer(
                f"output {output.name!r} has {classes} classes, the recipe names class {most}; at most {MAX_CLASSES}"
            )
        _require_memory(self._recipe, self._plan, classes)
        self.classes = classes


# --- names -----------------------------------------------------------------------------------------------------------


def _named(labels: Labels, output: VolumeOutput, classes: int) -> tuple[Labels, tuple[Segment, ...]]:
    """Classes the recipe ignores become background, others it does not name keep their number for a name."""
    last = classes if output.thresholds else classes - 1
    numbers = sorted({*range(1, last + 1), *output.labels.values()})
    rows = {number: output.labels.row(number, "") for number in numbers}
    if ignored := [number for number, row in rows.items() if row is None]:
        table = np.arange(MAX_CLASSES, dtype=np.uint8)
        table[ignored] = 0
        labels = table[labels]
    known = [
        Label(number=number, name=row.name or f"label {number}", row=row)
        for number, row in rows.items()
        if row is not None
    ]
    return labels, segments_of(known)
