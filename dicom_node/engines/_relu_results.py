"""From the files of a finished job to values: surfaces in LPS, label volumes on the images, and what was not found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dicom_node.engines._relu_answers import FileState, ReturnedFile
from dicom_node.engines._relu_options import MeshOrder, ReluOptions, VolumeOrder
from dicom_node.engines._tally import measured
from dicom_node.engines.labels import Label, LabelRow, cleaned, plain, segments_of
from dicom_node.engines.masks import ReturnedVolume, from_label_map, from_masks, read_volume
from dicom_node.engines.meshes import (
    MisplacedMesh,
    Surface,
    as_lps,
    frame_of,
    read_mesh,
    source_box,
)
from dicom_node.errors import EngineError
from dicom_node.geometry import VolumeGeometry
from dicom_node.values import LabelVolume, Measurements, Mesh, Presence, ResultValue, Segment, SegmentMeasurement

__all__ = ["Delivered", "matched", "values_of"]

Beat = Callable[[], None]
Kept = Callable[[Path, str], str]

_ABSENT = "the engine says that this structure is missing in the images"
_FAILED = "the engine failed on this structure"
_NOT_TOLD = "the engine said nothing of this structure"
_IN_GROUP = "measured as part of one surface of several structures"


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of one order: `state` None when the answer does not speak of it, `path` where it was fetched."""

    order: MeshOrder | VolumeOrder
    state: FileState | None
    file: ReturnedFile | None = None
    path: Path | None = None


def matched(orders: Sequence[MeshOrder | VolumeOrder], files: Sequence[ReturnedFile]) -> list[Delivered]:
    """Each order with its file, found by its structures; by position where the answer names none and is complete."""
    if len(files) == len(orders) and not any(file.structures for file in files):
        return [Delivered(order, file.state, file) for order, file in zip(orders, files, strict=True)]
    by_name: dict[frozenset[str], ReturnedFile] = {}
    for file in files:
        names = frozenset(file.structures)
        if names in by_name:
            raise EngineError("the answer of a finished job has two files of the same structures")
        by_name[names] = file
    found = [by_name.get(frozenset(plain(one) for one in order.structures)) for order in orders]
    return [Delivered(order, file.state if file else None, file) for order, file in zip(orders, found, strict=True)]


def values_of(
    options: ReluOptions,
    meshes: Sequence[Delivered],
    volumes: Sequence[Delivered],
    geometry: VolumeGeometry,
    keep: Kept,
    heartbeat: Beat,
) -> tuple[ResultValue, ...]:
    """Surfaces, a label volume if one was ordered, and one report of all structures.

    A file that does not fit is kept by `keep(path, reason)`, and EngineError names it.
    """
    numbers = _numbered(options)
    surfaces = _surfaces(options, meshes, geometry, keep, heartbeat)
    notes = _told(meshes) + _told(volumes)
    values: list[ResultValue] = [
        Mesh(
            vertices=surface.vertices,
            triangles=surface.triangles,
            title=_title(one.order),
            segments=tuple(numbers[plain(name)] for name in one.order.structures),
            notes=(*surface.notes, *notes),
        )
        for one, surface in surfaces
    ]
    items = {
        segment.key: item
        for segment, item in _from_surfaces(meshes, {one.order: surface for one, surface in surfaces}, numbers)
    }
    said: list[str] = []
    labels = _labels(options, volumes, geometry, keep, heartbeat)
    if labels is not None:
        values.append(labels)
        found = measured(labels, labels.labels, geometry, hounsfield=False, heartbeat=heartbeat)
        items |= {item.segment.key: item for item in found.items}
        said += found.notes
    for one in volumes:
        if one.state is not FileState.AVAILABLE:
            for name in one.order.structures:
                segment = numbers[plain(name)]
                items.setdefault(segment.key, _without_voxels(segment, one.state))
    said += [*notes, *(note for _, surface in surfaces for note in surface.notes)]
    return (*values, Measurements(items=tuple(items.values()), notes=tuple(dict.fromkeys(said))))


def _numbered(options: ReluOptions) -> Mapping[str, Segment]:
    """A segment for each ordered structure, by its plain name."""
    orders: tuple[MeshOrder | VolumeOrder, ...] = (*options.meshes, *options.volumes)
    names = dict.fromkeys(name for order in orders for name in order.structures)
    distinct = {plain(name): name for name in reversed(names)}
    labels = [
        Label(number=number, name=cleaned(name), row=options.labels.row(None, name) or LabelRow())
        for number, name in enumerate(reversed(distinct.values()), start=1)
    ]
    return dict(zip(reversed(distinct), segments_of(labels), strict=True))


def _title(order: MeshOrder | VolumeOrder) -> str:
    title = order.title if isinstance(order, MeshOrder) else ""
    return cleaned(title or ", ".join(order.structures))


def _told(delivered: Sequence[Delivered]) -> tuple[str, ...]:
    """What is not there, for every result to say."""
    words = {FileState.MISSING: "not in the images", FileState.FAILED: "the engine failed on it", None: "not told of"}
    return tuple(f"{_title(one.order)}: {words[one.state]}" for one in delivered if one.state in words)


# --- surfaces --------------------------------------------------------------------------------------------------------


def _surfaces(
    options: ReluOptions, meshes: Sequence[Delivered], geometry: VolumeGeometry, keep: Kept, beat: Beat
) -> list[tuple[Delivered, Surface]]:
    read: list[tuple[Delivered, Surface]] = []
    for one in meshes:
        if one.path is not None:
            with _kept_if_unfit(one.path, keep):
                read.append((one, read_mesh(one.path, max_bytes=options.max_mesh_bytes, heartbeat=beat)))
    if not read:
        return []
    box = source_box(geometry)
    try:
        frame, note = frame_of([surface for _, surface in read], box, told=options.mesh_frame.upper())
    except MisplacedMesh as exc:
        names = [keep(one.path, str(exc)) for one, _ in read if one.path is not None]
        raise MisplacedMesh(_with_names(str(exc), names)) from exc
    placed = [(one, as_lps(surface, frame)) for one, surface in read]
    return [(one, replace(surface, notes=(*surface.notes, note) if note else surface.notes)) for one, surface in placed]


def _from_surfaces(
    meshes: Sequence[Delivered], surfaces: Mapping[MeshOrder | VolumeOrder, Surface], numbers: Mapping[str, Segment]
) -> Iterator[tuple[Segment, SegmentMeasurement]]:
    """A structure that has a surface of its own is told last, so that this is what stays."""
    for one in sorted(meshes, key=lambda one: -len(one.order.structures)):
        surface = surfaces.get(one.order)
        for name in one.order.structures:
            segment = numbers[plain(name)]
            if surface is None:
                yield segment, _without_voxels(segment, one.state)
            else:
                alone = len(one.order.structures) == 1
                yield (
                    segment,
                    SegmentMeasurement(
                        segment=segment,
                        presence=Presence.PRESENT if alone else Presence.UNDETERMINED,
                        volume_cm3=surface.volume_cm3 if alone and surface.closed else None,
                        mean_hu=None,
                        note="; ".join(surface.notes) if alone else _IN_GROUP,
                    ),
                )


def _without_voxels(segment: Segment, state: FileState | None) -> SegmentMeasurement:
    notes = {FileState.MISSING: _ABSENT, FileState.FAILED: _FAILED, None: _NOT_TOLD}
    return SegmentMeasurement(
        segment=segment,
        presence=Presence.ABSENT if state is FileState.MISSING else Presence.UNDETERMINED,
        volume_cm3=None,
        mean_hu=None,
        note=notes.get(state, ""),
    )


# --- label volumes ---------------------------------------------------------------------------------------------------


def _labels(
    options: ReluOptions, volumes: Sequence[Delivered], geometry: VolumeGeometry, keep: Kept, beat: Beat
) -> LabelVolume | None:
    there = [(one, one.path) for one in volumes if one.path is not None]
    if not there:
        return None
    one, path = there[0]
    if len(one.order.structures) > 1:
        names = dict(enumerate(one.order.structures, start=1))
        with _kept_if_unfit(path, keep):
            answer = read_volume(path, heartbeat=beat)
            return from_label_map(answer, geometry, names=names, table=options.labels, heartbeat=beat)
    last = [path]

    def masks() -> Iterator[tuple[str, ReturnedVolume]]:
        for each, where in there:
            last[0] = where
            yield each.order.structures[0], read_volume(where, heartbeat=beat)

    with _KeptIfUnfit(lambda: last[0], keep):
        return from_masks(masks(), geometry, table=options.labels, heartbeat=beat)


class _KeptIfUnfit:
    """A file that does not fit is kept for a person to look at, and the error names it."""

    def __init__(self, path: Callable[[], Path], keep: Kept) -> None:
        self._path, self._keep = path, keep

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, EngineError) and not exc.retryable:
            name = self._keep(self._path(), str(exc))
            raise type(exc)(_with_names(str(exc), [name])) from exc


def _kept_if_unfit(path: Path, keep: Kept) -> _KeptIfUnfit:
    return _KeptIfUnfit(lambda: path, keep)


def _with_names(message: str, names: Sequence[str]) -> str:
    kept = [name for name in names if name]
    return f"{message}; in the quarantine as {', '.join(kept)}" if kept else message
