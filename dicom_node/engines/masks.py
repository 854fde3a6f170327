"""From the files an engine painted to a `LabelVolume` on the images they were made from.

A mask is a file of whole numbers: one for all organs (a label map, each value a label) or one for each (anything but 0
is the organ). Files are read one at a time; `grids` puts them in place, `labels` says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.engines._voxel_stream import MAX_VOXEL_BYTES, ReturnedVolume, UnusableVolume, opened
from dicom_node.engines.grids import GeometryMismatch, labels_on_source
from dicom_node.engines.labels import Label, LabelRow, LabelTable, cleaned, plain, segments_of
from dicom_node.engines.nifti import read_nifti
from dicom_node.engines.nrrd import read_nrrd
from dicom_node.errors import EngineError
from dicom_node.geometry import VolumeGeometry
from dicom_node.values import LabelVolume

__all__ = [
    "GeometryMismatch",
    "ReturnedVolume",
    "UnusableLabels",
    "UnusableVolume",
    "from_label_map",
    "from_masks",
    "read_volume",
]

Labels = npt.NDArray[np.uint8]
Beat = Callable[[], None]

MAX_LABELS = 255  # what a label volume and a LABELMAP segmentation of 8 bits hold
_BLOCK = 65536  # voxels looked at at a time: what fits a cache
_FEW = 65536  # values below it are looked up in a table
_TOLD = 3  # pairs of overlapping organs that are named


class UnusableLabels(EngineError):
    """What an engine painted are no labels, or too many; the message says which and why."""


# --- files -----------------------------------------------------------------------------------------------------------


def read_volume(path: Path, *, max_bytes: int = MAX_VOXEL_BYTES, heartbeat: Beat | None = None) -> ReturnedVolume:
    """A NIfTI or NRRD file, told apart by how it begins, whatever its name. Raises UnusableVolume as their readers."""
    with opened(path) as stream:
        nrrd = stream.take(4) == b"NRRD"
    return (read_nrrd if nrrd else read_nifti)(path, max_bytes=max_bytes, heartbeat=heartbeat)


# --- values ----------------------------------------------------------------------------------------------------------


def _blocks(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The voxels as they lie in memory, some at a time."""
    flat = array.reshape(-1, order="F" if array.flags.f_contiguous else "C")
    return (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def _values(array: npt.NDArray[Any], beat: Beat) -> list[int]:
    """The distinct values above 0. Raises UnusableLabels for what is no label."""
    found: set[int] = set()
    for block in _blocks(array):
        found.update(_whole(block) if block.any() else (0,))
        if len(found - {0}) > MAX_LABELS:
            raise UnusableLabels(
                f"more than {MAX_LABELS} different labels: a segmentation of 8 bits holds no more "
                "(an image or a probability map instead of a mask?)"
            )
        beat()
    if found and min(found) < 0:
        raise UnusableLabels(f"label {min(found)}: labels are not negative")
    return sorted(found - {0})


def _whole(block: npt.NDArray[Any]) -> list[int]:
    """The distinct values of some voxels."""
    if block.dtype.kind == "f":
        odd = block[~(np.rint(block) == block) | (np.abs(block) > 2**31)]  # NaN is not equal to itself
        if odd.size:
            raise UnusableLabels(f"label {odd[0]:g}: labels are whole numbers (a probability map instead of a mask?)")
    if block.min() >= 0 and block.max() < _FEW:
        counted: list[int] = np.flatnonzero(np.bincount(block.astype(np.uint16, copy=False))).tolist()
        return counted
    return [int(value) for value in np.unique(block)]


def _renumbered(array: npt.NDArray[Any], found: Sequence[int], numbers: Mapping[int, int], beat: Beat) -> Labels:
    """`array`, which has 0 and the values `found`, as uint8: each by its number, 0 where it has none."""
    if array.dtype == np.uint8 and all(numbers.get(value) == value for value in found):
        return array
    values = np.array([0, *found])
    lookup = np.array([numbers.get(value, 0) for value in values.tolist()], np.uint8)
    if direct := max(values) < _FEW:
        table = np.zeros(_FEW, np.uint8)
        table[values] = lookup
    out = np.empty(array.size, np.uint8)
    done = 0
    for block in _blocks(array):
        part = out[done : done + block.size]
        if direct:
            np.take(table, block.astype(np.uint16, copy=False), out=part)
        else:
            np.take(lookup, np.searchsorted(values, block), out=part)
        done += block.size
        beat()
    return out.reshape(array.shape, order="F" if array.flags.f_contiguous else "C")


# --- answers ---------------------------------------------------------------------------------------------------------


def from_label_map(
    answer: ReturnedVolume,
    geometry: VolumeGeometry,
    *,
    names: Mapping[int, str] | None = None,
    table: LabelTable | None = None,
    heartbeat: Beat | None = None,
) -> LabelVolume:
    """The labels of one file on the images of `geometry`, as `results.seg` encodes them.

    `names`: what the engine calls its values, else what the file does, else "label N". Values up to 255 keep their
    number, others are numbered anew in their order. `segments` has every label that is named or configured, found or
    not, but those the table drops. `notes`: those of the images, of the file and of `grids.labels_on_source`, and
    labels that fall on no pixel.

    Raises UnusableLabels: values that are not whole or negative, more than 255 different ones; GeometryMismatch.
    """
    beat, table = heartbeat or _nothing, table or LabelTable()
    found = _values(answer.array, beat)
    told = {value: cleaned(name) for value, name in (names or answer.names).items() if value > 0}
    known = sorted({*found, *told, *table.values()})
    rows = {value: table.row(value, told.get(value, "")) for value in known}
    numbers = _numbers([value for value in known if rows[value] is not None], found)
    labels = [
        Label(number=number, name=told.get(value) or f"label {value}", row=rows[value] or LabelRow())
        for value, number in numbers.items()
    ]
    painted = _renumbered(answer.array, found, numbers, beat)
    placed, notes = labels_on_source(painted, answer.affine_lps, geometry, heartbeat=heartbeat)
    present = set(_values(placed, beat))
    lost = [label for label in labels if label.number not in present and _painted(label, numbers, found)]
    return _label_volume(placed, geometry, labels, (*answer.notes, *notes, *_nowhere(lost)))


def _painted(label: Label, numbers: Mapping[int, int], found: Sequence[int]) -> bool:
    return any(numbers.get(value) == label.number for value in found)


def _numbers(known: Sequence[int], found: Sequence[int]) -> Mapping[int, int]:
    """Value to number: itself where that fits, else counted; labels without a voxel give way first."""
    if not known or known[-1] <= MAX_LABELS:
        return {value: value for value in known}
    if len(known) > MAX_LABELS:
        known = [value for value in known if value in set(found)]
    return {value: number for number, value in enumerate(known, start=1)}


def from_masks(
    masks: Iterable[tuple[str, ReturnedVolume]],
    geometry: VolumeGeometry,
    *,
    table: LabelTable | None = None,
    heartbeat: Beat | None = None,
) -> LabelVolume:
    """One label for each mask, by its name, in their order: 1, 2, ...; each is asked for when the one before is done.

    Where masks overlap the earlier one keeps the pixel, and a note says how much of which was lost. Otherwise as
    `from_label_map`. Raises UnusableLabels also for a mask of several values, two of one name, none, and more than 255.
    """
    beat, table = heartbeat or _nothing, table or LabelTable()
    merged = _Merged(np.zeros(geometry.shape, np.uint8))
    labels: list[Label] = []
    notes: list[str] = []
    seen: set[str] = set()
    for name, answer in masks:
        called = cleaned(name)
        if plain(called) in seen or not called:
            raise UnusableLabels(f"two masks are called {called!r}" if called else "a mask has no name")
        seen.add(plain(called))
        row = table.row(None, called)
        if row is None:
            continue
        if len(labels) == MAX_LABELS:
            raise UnusableLabels(f"more than {MAX_LABELS} masks: a segmentation of 8 bits holds no more labels")
        label = Label(number=len(labels) + 1, name=called, row=row)
        labels.append(label)
        found = _values(answer.array, beat)
        if len(found) > 1:
            raise UnusableLabels(f"the mask of {called} has {len(found)} different values above 0, one was expected")
        painted = _renumbered(answer.array, found, dict.fromkeys(found, 1), beat)
        placed, said = labels_on_source(painted, answer.affine_lps, geometry, heartbeat=heartbeat)
        notes += (*answer.notes, *said)
        if not merged.add(placed, label.number) and found:
            notes += _nowhere([label])
    if not seen:
        raise UnusableLabels("the engine returned no mask")
    overlaps = merged.told({label.number: label.shown for label in labels}, geometry)
    return _label_volume(merged.labels, geometry, labels, (*overlaps, *dict.fromkeys(notes)))


class _Merged:
    """Masks laid over each other, the first at the bottom and seen."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._shared: dict[tuple[int, int], int] = {}  # (who keeps them, who lost them): pixels

    def add(self, mask: Labels, number: int) -> bool:
        """Whether there is anything in `mask` (slice, row, column), 1 where it is."""
        found = False
        for below, plane in zip(self.labels, mask, strict=True):
            mine = plane.view(np.bool_)
            if not mine.any():
                continue
            found = True
            for other, count in enumerate(np.bincount(below[mine], minlength=1).tolist()):
                if other and count:
                    self._shared[other, number] = self._shared.get((other, number), 0) + count
            below[mine & (below == 0)] = number
        return found

    def told(self, names: Mapping[int, str], geometry: VolumeGeometry) -> list[str]:
        """What was lost to whom, the most first."""
        most = sorted(self._shared.items(), key=lambda item: (-item[1], item[0]))
        told = [
            f"{names[loser]} overlaps {names[keeper]} in {count} pixels ({count * geometry.voxel_cm3:.2f} ml), "
            f"shown as {names[keeper]}"
            for (keeper, loser), count in most[:_TOLD]
        ]
        if len(most) > _TOLD:
            rest = sum(count for _, count in most[_TOLD:])
            told.append(f"{len(most) - _TOLD} more pairs of labels overlap, in {rest} pixels")
        return told


def _nowhere(lost: Sequence[Label]) -> tuple[str, ...]:
    names = ", ".join(label.shown for label in lost[:_TOLD]) + (" ..." if len(lost) > _TOLD else "")
    return (f"nothing of {names} falls on a pixel of the images",) if lost else ()


def _label_volume(
    labels: Labels, geometry: VolumeGeometry, known: Sequence[Label], notes: tuple[str, ...]
) -> LabelVolume:
    return LabelVolume(
        labels=labels,
        sop_instance_uids=geometry.sop_instance_uids,
        frame_numbers=geometry.frame_numbers,
        segments=segments_of(known),
        notes=(*geometry.notes, *notes),
    )


def _nothing() -> None:
    pass
