"""The one place that decides grids: which images of a series form a volume, in which order, and where it lies.

Pure: takes the geometry attributes of images or of the frames of multi-frame ones, returns a `VolumeGeometry` or
raises SeriesRejected with a sentence a physicist understands. Order comes from the projection of Image Position
(Patient) on the slice normal (PS3.3 C.7.6.2.1.1), never from Instance Number or Slice Location. What is not a plain
regular stack is refused or, where that is asked for and safe, told slice by slice as it is; it is never bent into one:
a wrong affine moves every voxel of a result by millimetres without looking wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicom_node.errors import SeriesRejected
from dicom_node.planes import (
    DISCRIMINATORS,
    EXCLUDED_IMAGE_TYPES,
    GEOMETRY_KEYWORDS,
    ORIENTATION_TOLERANCE,
    Identity,
    Plane,
    Vector,
    excluded,
    identity_of,
    plane_of,
)

__all__ = ["EXCLUDED_IMAGE_TYPES", "GEOMETRY_KEYWORDS", "Identity", "VolumeGeometry", "volume_geometry"]

SameSlice = Callable[[Identity, Identity], bool]

_SPACING_TOLERANCE = 1e-3  # relative, of pixel spacing between images
_SAME_PLACE_MM = 0.01
# Scanners round positions to 0.1 mm: that is no irregularity. Otherwise 2 % of the slice spacing is.
_POSITION_TOLERANCE_MM, _POSITION_TOLERANCE = 0.06, 0.02
_SIDEWAYS_TOLERANCE_MM, _SIDEWAYS_TOLERANCE_PIXELS = 0.1, 0.25
# What a repair may bridge: two missing slices in a row, and the tilt of a gantry (30 degrees) with room to spare.
_MAX_MISSING_IN_A_ROW = 2
_MAX_TILT_DEG = 40.0
_OVERLAP = 0.1  # of the usual slice spacing: images nearer than this are of two stacks
_FEW_GAPS = 0.25  # of all steps: more than this and the spacing is called irregular
_CT = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1")  # CT, Enhanced CT Image Storage
_SAME_ECHO = 0.02  # relative
_DUPLICATE = "identical to another image"


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGeometry:
    """Parallel planes and where they lie: N slices, ascending along the normal (row direction x column direction).

    `affine` (4 x 4, float64) maps homogeneous indices (slice, row, column, 1) of a regular, upright grid to patient
    coordinates in mm (DICOM LPS: x to the left, y to the back, z to the head); `spacing_mm` is its (slice, row,
    column). `shape` counts the slices there are: (N, rows, columns).

    When `regular`, slice k is plane k of that grid. Otherwise (only where a repair was allowed) pixel (row, column) of
    slice k lies at grid index (positions_mm[k] / spacing_mm[0], row + shifts_px[k][0], column + shifts_px[k][1]), and
    `grid_shape` is the grid that holds them all. `positions_mm` counts along the normal from plane 0 of the grid;
    `shifts_px` is empty when no slice is shifted; `repairs` says for people what was repaired.

    `sop_instance_uids[k]` and, for frames of multi-frame images, `frame_numbers[k]` (from 1; empty when there are
    none) are the identity of slice k. `left_out` says why images of the series are not in it.
    """

    sop_instance_uids: tuple[str, ...]
    affine: Vector
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    sop_class_uid: str
    frame_of_reference_uid: str
    left_out: Mapping[str, str]
    frame_numbers: tuple[int, ...] = ()
    positions_mm: tuple[float, ...] = ()
    shifts_px: tuple[tuple[float, float], ...] = ()
    repairs: tuple[str, ...] = ()
    regular: bool = True

    @property
    def identities(self) -> tuple[Identity, ...]:
        """(SOP Instance UID, frame) of each slice; frame 0 for single-frame images."""
        return tuple(zip(self.sop_instance_uids, self.frame_numbers or (0,) * self.shape[0], strict=True))

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """The regular grid that holds every slice: `shape` when `regular`."""
        if self.regular:
            return self.shape
        beyond = np.ceil(np.max(self.shifts_px, axis=0) - 1e-6) if self.shifts_px else (0, 0)
        slices = round(self.positions_mm[-1] / self.spacing_mm[0]) + 1
        return slices, self.shape[1] + int(beyond[0]), self.shape[2] + int(beyond[1])

    @property
    def widths_mm(self) -> tuple[float, ...]:
        """What each slice stands for along the normal: half way to its neighbours, half a spacing at the ends."""
        if self.regular:
            return (self.spacing_mm[0],) * self.shape[0]
        middles = np.convolve(self.positions_mm, (0.5, 0.5), "valid")
        half = self.spacing_mm[0] / 2
        ends = np.concatenate(([self.positions_mm[0] - half], middles, [self.positions_mm[-1] + half]))
        return tuple(float(width) for width in np.diff(ends))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result must say about its input: repairs, and images that were not looked at."""
        reasons = [reason for reason in self.left_out.values() if reason != _DUPLICATE]
        counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        return (*(f"{count} images not analysed: {reason}" for reason, count in counts.items()), *self.repairs)

    @property
    def orientation(self) -> str:
        """`axial`, `coronal` or `sagittal`: the anatomical plane nearest to the images."""
        normal = np.abs(self.affine[:3, 0])
        return ("sagittal", "coronal", "axial")[int(np.argmax(normal))]

    @property
    def obliquity_deg(self) -> float:
        """Angle between the slice normal and the nearest patient axis."""
        return math.degrees(math.acos(min(1.0, float(np.max(np.abs(self.affine[:3, 0]))) / self.spacing_mm[0])))

    @property
    def coverage_mm(self) -> float:
        """Length of the stack, half a slice beyond the outer centres included."""
        return self.grid_shape[0] * self.spacing_mm[0]

    @property
    def voxel_cm3(self) -> float:
        """Volume of one voxel of the regular grid; `widths_mm` tells a slice's own share of an irregular one."""
        return math.prod(self.spacing_mm) / 1000.0


def volume_geometry(
    images: Sequence[Mapping[str, Any]],
    *,
    min_slices: int = 3,
    excluded_image_types: Iterable[str] = (),
    regular: Literal["require", "repair"] = "require",
    same_slice: SameSlice | None = None,
) -> VolumeGeometry:
    """The volume these images form.

    Each mapping has the keywords of `GEOMETRY_KEYWORDS` that the image carries (as in `SeriesHeader.geometry` or
    `pixels.ImageFile.planes`); a frame of a multi-frame image also has `FrameNumber`. Localizers, projections and what
    `excluded_image_types` names besides are left out.

    Raises SeriesRejected for: too few slices, missing or impossible geometry attributes, multi-frame images of which
    the frames are not given, images of several orientations, matrices, pixel spacings, frames of reference or SOP
    classes; and with `regular` require for duplicate positions, missing slices, irregular spacing, a sheared stack
    (gantry tilt). With repair these are told in `repairs` instead, unless they go too far: a position taken twice by
    images that `same_slice` does not find identical, more than two slices missing in a row, two stacks that overlap,
    slices shifted sideways otherwise than by a constant tilt, or by one beyond what a gantry does.
    """
    kinds = EXCLUDED_IMAGE_TYPES.union(excluded_image_types)
    left_out: dict[str, str] = {}
    planes: list[Plane] = []
    for image in images:
        reason = excluded(image, kinds)
        if reason:
            left_out[_name(identity_of(image))] = reason
        else:
            planes.append(plane_of(image))
    if len(planes) < min_slices:
        extra = f" ({len(left_out)} localizer or projection images left out)" if left_out else ""
        raise SeriesRejected(f"too few slices: {len(planes)}, at least {min_slices} are needed{extra}")
    _require_one_kind(planes)
    repair = regular == "repair"
    stack = _ordered(planes)
    kept = _without_duplicates(stack, same_slice if repair else None)
    if len(kept.planes) < min_slices:
        raise SeriesRejected(f"too few slices: {len(kept.planes)} different ones, at least {min_slices} are needed")
    identities = {plane.identity for plane in kept.planes}
    left_out |= {_name(plane.identity): _DUPLICATE for plane in stack.planes if plane.identity not in identities}
    geometry = _laid(kept, left_out, repair=repair)
    if dropped := len(stack.planes) - len(kept.planes):
        text = f"{dropped} image{'s' if dropped > 1 else ''} left out, identical to another in the same place"
        geometry = replace(geometry, repairs=(text, *geometry.repairs))
    return geometry


def _name(identity: Identity) -> str:
    uid, frame = identity
    return f"{uid} frame {frame}" if frame else uid


def _require_one_kind(planes: Sequence[Plane]) -> None:
    """Every image must be like the first but for its position; the first difference found is named with counts."""
    first = planes[0]
    orientations = np.array([plane.orientation for plane in planes])
    spacings = np.array([plane.spacing for plane in planes])
    differing = {
        "mixed orientation: Image Orientation (Patient)": np.abs(orientations - first.orientation).max(axis=1)
        > ORIENTATION_TOLERANCE,
        "Rows x Columns": np.array([plane.size != first.size for plane in planes]),
        "Pixel Spacing": (np.abs(spacings - first.spacing) > _SPACING_TOLERANCE * first.spacing).any(axis=1),
        "Frame of Reference UID": np.array([p.frame_of_reference_uid != first.frame_of_reference_uid for p in planes]),
        "SOP Class UID": np.array([plane.sop_class_uid != first.sop_class_uid for plane in planes]),
    }
    for name, differs in differing.items():
        if count := int(differs.sum()):
            raise SeriesRejected(
                f"{name} differs inside the series: {len(planes) - count} images have one value, {count} another; "
                "they do not form one volume"
            )


# --- from planes to a stack ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """Planes ascending along the normal. `along` (N,) is the projection of `positions` (N, 3) on it, in mm."""

    planes: tuple[Plane, ...]
    positions: Vector
    along: Vector
    row: Vector
    column: Vector
    normal: Vector

    def only(self, kept: Sequence[int]) -> _Stack:
        return replace(
            self,
            planes=tuple(self.planes[k] for k in kept),
            positions=self.positions[kept],
            along=self.along[kept],
        )


def _ordered(planes: Sequence[Plane]) -> _Stack:
    orientation = np.mean([plane.orientation for plane in planes], axis=0)
    row = orientation[:3] / np.linalg.norm(orientation[:3])
    normal = np.cross(row, orientation[3:])
    normal /= np.linalg.norm(normal)
    column = np.cross(normal, row)  # exactly perpendicular, whatever the header's rounding
    positions = np.array([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    return _Stack(
        planes=tuple(planes[k] for k in order),
        positions=positions[order],
        along=along[order],
        row=row,
        column=column,
        normal=normal,
    )


def _without_duplicates(stack: _Stack, same_slice: SameSlice | None) -> _Stack:
    """One image for each place. Raises SeriesRejected unless `same_slice` finds the images of a place identical."""
    steps = np.diff(stack.along)
    doubled = int((steps < _SAME_PLACE_MM).sum())
    if not doubled:
        return stack
    if same_slice is None:
        raise SeriesRejected(
            f"duplicate position: {doubled} of {len(stack.along)} images lie where another one does "
            f"(several phases or reconstructions in one series, or repeated slices){_told_apart(stack)}"
        )
    kept: list[int] = []
    for place in np.split(np.arange(len(stack.along)), np.flatnonzero(steps >= _SAME_PLACE_MM) + 1):
        first, *others = sorted(place, key=lambda k: stack.planes[k].identity)
        for other in others:
            shifted = np.linalg.norm(stack.positions[other] - stack.positions[first]) >= 2 * _SAME_PLACE_MM
            if shifted or not same_slice(stack.planes[first].identity, stack.planes[other].identity):
                raise SeriesRejected(
                    f"duplicate position: different images lie in the same place, {stack.along[first]:.2f} mm along "
                    f"the normal: which of them is meant cannot be told{_told_apart(stack)}"
                )
        kept.append(int(first))
    return stack.only(kept)


def _told_apart(stack: _Stack) -> str:
    """Which attribute differs between the images of every place that is taken twice."""
    pairs = [(k, k + 1) for k in np.flatnonzero(np.diff(stack.along) < _SAME_PLACE_MM)]
    for index, name in enumerate(DISCRIMINATORS.values()):
        if all(stack.planes[a].told[index] != stack.planes[b].told[index] for a, b in pairs):
            return f"; {name} tells them apart"
    return ""


def _alternating(stack: _Stack, *, even: bool) -> str:
    """Which attribute says that two stacks are shuffled into one; a stack that ends where the next begins is none.

    Even stacks are asked for less: MR takes every other slice in a second acquisition, and where two acquisitions of
    a CT meet a slice may lie beyond the join.
    """
    ct = stack.planes[0].sop_class_uid in _CT
    for index, (keyword, name) in enumerate(DISCRIMINATORS.items()):
        if even and (keyword == "ImageType" or (keyword == "AcquisitionNumber" and not ct)):
            continue
        told = [plane.told[index] for plane in stack.planes]
        if keyword == "EchoTime":
            told = _grouped(told)
        runs = 1 + sum(1 for one, other in pairwise(told) if one != other)
        if runs > len(set(told)) * (3 if even else 1):
            return name
    return ""


def _grouped(times: Sequence[str]) -> list[str]:
    """Echo times that differ in their last digits are the same one."""
    try:
        values = [float(time) for time in times]
    except ValueError:
        return list(times)
    groups: dict[float, str] = {}
    number, last = 0, -math.inf
    for value in sorted(set(values)):
        number += value > last + _SAME_ECHO * abs(value)
        groups[value], last = str(number), value
    return [groups[value] for value in values]


def _laid(stack: _Stack, left_out: Mapping[str, str], *, repair: bool) -> VolumeGeometry:
    """The grid through the planes of a stack without duplicates."""
    spacing, even, repairs = _spaced(stack.along, repair=repair)
    if name := _alternating(stack, even=even):
        raise SeriesRejected(f"two stacks overlap: {name} goes back and forth from slice to slice")
    pixel = stack.planes[0].spacing
    sideways = _sideways(stack)
    tilt = _tilt(stack.along, sideways, float(pixel.max()), repair=repair)
    count = len(stack.planes)
    affine = np.eye(4)
    affine[:3, 0] = stack.normal * spacing
    affine[:3, 1] = stack.column * pixel[0]
    affine[:3, 2] = stack.row * pixel[1]
    # the regular grid through all positions, so that the rounding of one of them does not shift the volume
    affine[:3, 3] = stack.positions.mean(axis=0) - stack.normal * spacing * (count - 1) / 2
    along = np.arange(count) * spacing
    if not even:
        along = stack.along - stack.along[0]
        affine[:3, 3] = stack.positions.mean(axis=0) - stack.normal * along.mean()
    shifts: tuple[tuple[float, float], ...] = ()
    if tilt:
        in_pixels = np.stack([sideways @ stack.column / pixel[0], sideways @ stack.row / pixel[1]], axis=1)
        corner = in_pixels.min(axis=0)
        shifts = tuple((float(r), float(c)) for r, c in in_pixels - corner)
        affine[:3, 3] -= affine[:3, 1:3] @ (in_pixels.mean(axis=0) - corner)
        repairs = (*repairs, f"slices shifted in their plane for a gantry tilt of {tilt:.1f} degrees")
    frames = tuple(plane.identity[1] for plane in stack.planes)
    return VolumeGeometry(
        sop_instance_uids=tuple(plane.identity[0] for plane in stack.planes),
        frame_numbers=frames if any(frames) else (),
        affine=affine,
        spacing_mm=(spacing, float(pixel[0]), float(pixel[1])),
        shape=(count, *stack.planes[0].size),
        sop_class_uid=stack.planes[0].sop_class_uid,
        frame_of_reference_uid=stack.planes[0].frame_of_reference_uid,
        left_out=dict(left_out),
        positions_mm=tuple(float(mm) for mm in along),
        shifts_px=shifts,
        repairs=repairs,
        regular=even and not tilt,
    )


def _spaced(along: Vector, *, repair: bool) -> tuple[float, bool, tuple[str, ...]]:
    """(spacing of the grid in mm, whether the slices lie on it, what is repaired) of ascending positions."""
    if len(along) < 2:
        raise SeriesRejected("too few slices: the slice spacing of one image is unknown")
    index = np.arange(len(along)) - (len(along) - 1) / 2
    spacing = float(index @ along / (index @ index))  # least squares
    off = np.abs(along - along.mean() - spacing * index)
    if off.max() <= max(_POSITION_TOLERANCE_MM, _POSITION_TOLERANCE * spacing):
        return spacing, True, ()
    steps = np.diff(along)
    usual = float(np.median(steps))
    multiples = np.round(steps / usual)
    whole = bool((np.abs(steps / usual - multiples) * usual <= max(2 * _POSITION_TOLERANCE_MM, 0.05 * usual)).all())
    gaps = np.flatnonzero(multiples >= 2)
    uneven = f"slices are {steps.min():.2f} to {steps.max():.2f} mm apart (median {usual:.2f} mm)"
    if not repair:
        if whole and gaps.size:
            raise SeriesRejected(f"missing slice: {_missing(along, gaps, multiples, usual)}")
        raise SeriesRejected(f"irregular spacing: {uneven}")
    _require_bridgeable(along, steps, usual)
    extent = float(along[-1] - along[0])
    few = bool(gaps.size) and gaps.size <= _FEW_GAPS * len(steps)
    repairs = []
    if few:
        repairs.append(_interpolated(along, gaps, multiples))
    if not whole or not few:
        repairs.append(f"irregular spacing, each slice taken where it lies: {uneven}")
    return extent / round(extent / usual), False, tuple(repairs)


def _missing(along: Vector, gaps: npt.NDArray[np.intp], multiples: Vector, usual: float) -> str:
    count, k = int((multiples[gaps] - 1).sum()), gaps[0]
    return (
        f"{count} position{'s' if count > 1 else ''} without an image, the first between "
        f"{along[k]:.2f} and {along[k + 1]:.2f} mm along the normal, where slices are {usual:.2f} mm apart"
    )


def _interpolated(along: Vector, gaps: npt.NDArray[np.intp], multiples: Vector) -> str:
    count, k = int((multiples[gaps] - 1).sum()), gaps[0]
    where = f"between {along[k]:.2f} and {along[k + 1]:.2f} mm along the normal"
    if gaps.size > 1:
        where = f"at {gaps.size} places, the first {where}"
    return f"{count} missing slice{'s' if count > 1 else ''} interpolated {where}"


def _require_bridgeable(along: Vector, steps: Vector, usual: float) -> None:
    """No step so long that interpolation would invent anatomy, none so short that there must be two stacks."""
    often = float(np.quantile(steps, 0.75))
    if (shortest := float(steps.min())) < _OVERLAP * often:
        raise SeriesRejected(
            f"two images lie {shortest:.2f} mm apart where slices are {often:.2f} mm apart: two stacks overlap"
        )
    k = int(np.argmax(steps))
    if (missing := round(steps[k] / usual) - 1) > _MAX_MISSING_IN_A_ROW:
        raise SeriesRejected(
            f"missing slice: {missing} positions in a row without an image, between {along[k]:.2f} and "
            f"{along[k + 1]:.2f} mm along the normal, where slices are {usual:.2f} mm apart; at most "
            f"{_MAX_MISSING_IN_A_ROW} in a row are interpolated"
        )


def _sideways(stack: _Stack) -> Vector:
    """(N, 3) mm: how far each slice is off the line along the normal through the first one."""
    off: Vector = stack.positions - stack.positions[0] - np.outer(stack.along - stack.along[0], stack.normal)
    return off


def _tilt(along: Vector, sideways: Vector, pixel_mm: float, *, repair: bool) -> float:
    """The angle in degrees by which a stack is sheared, 0 when it runs along its normal."""
    distance = np.linalg.norm(sideways, axis=1)
    limit = max(_SIDEWAYS_TOLERANCE_MM, _SIDEWAYS_TOLERANCE_PIXELS * pixel_mm)
    if distance.max() <= limit:
        return 0.0
    share = (along - along[0]) / (along[-1] - along[0])
    if np.linalg.norm(sideways - np.outer(share, sideways[-1]), axis=1).max() > limit:
        raise SeriesRejected(f"slices are shifted sideways against each other, by up to {distance.max():.1f} mm")
    angle = math.degrees(math.atan2(float(distance[-1]), float(along[-1] - along[0])))
    if not repair:
        raise SeriesRejected(
            f"gantry tilt: the stack is sheared by {angle:.1f} degrees (each slice is shifted in its own plane)"
        )
    if angle > _MAX_TILT_DEG:
        raise SeriesRejected(
            f"the stack is sheared by {angle:.1f} degrees, more than a gantry tilts ({_MAX_TILT_DEG:g} at most)"
        )
    return angle
