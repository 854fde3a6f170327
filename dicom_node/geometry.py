"""The one place that decides grids: which images of a series form a volume, in which order, and where it lies.

Pure: takes the geometry attributes of single-frame images, returns a `VolumeGeometry` or raises SeriesRejected with
a sentence a physicist understands. Order comes from the projection of Image Position (Patient) on the slice normal
(PS3.3 C.7.6.2.1.1), never from Instance Number or Slice Location. What is not a plain regular stack is refused, never
bent into one: a wrong affine moves every voxel of a result by millimetres without looking wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import SeriesRejected

__all__ = ["EXCLUDED_IMAGE_TYPES", "GEOMETRY_KEYWORDS", "VolumeGeometry", "volume_geometry"]

Vector = npt.NDArray[np.float64]

GEOMETRY_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "InstanceNumber",
    "ImageType",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
)
EXCLUDED_IMAGE_TYPES = frozenset({"LOCALIZER", "MIP", "MINIP", "PROJECTION IMAGE"})

_ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine
_SPACING_TOLERANCE = 1e-3  # relative, of pixel spacing between images
_SAME_PLACE_MM = 0.01
# Scanners round positions to 0.1 mm: that is no irregularity. Otherwise 2 % of the slice spacing is.
_POSITION_TOLERANCE_MM, _POSITION_TOLERANCE = 0.06, 0.02
_SIDEWAYS_TOLERANCE_MM, _SIDEWAYS_TOLERANCE_PIXELS = 0.1, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGeometry:
    """A regular stack of parallel planes, perpendicular to the line they are stacked on.

    `affine` (4 x 4, float64) maps homogeneous voxel indices (slice, row, column, 1) to patient coordinates in mm
    (DICOM LPS: x to the left, y to the back, z to the head). `sop_instance_uids[k]` is the image of slice k; slices
    ascend along the normal, the cross product of row and column direction. `spacing_mm` is (slice, row, column).
    `left_out` says why images of the series are not in it.
    """

    sop_instance_uids: tuple[str, ...]
    affine: Vector
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    sop_class_uid: str
    frame_of_reference_uid: str
    left_out: Mapping[str, str]

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
        return self.shape[0] * self.spacing_mm[0]

    @property
    def voxel_cm3(self) -> float:
        """Volume of one voxel."""
        return math.prod(self.spacing_mm) / 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    uid: str
    sop_class_uid: str
    frame_of_reference_uid: str
    position: Vector  # (3,) mm
    orientation: Vector  # (6,) row then column direction
    spacing: Vector  # (2,) mm between rows, between columns
    size: tuple[int, int]


def volume_geometry(
    images: Sequence[Mapping[str, Any]], *, min_slices: int = 3, excluded_image_types: Iterable[str] = ()
) -> VolumeGeometry:
    """The volume these images form.

    Each mapping has the keywords of `GEOMETRY_KEYWORDS` that the image carries (as in `SeriesHeader.geometry` or
    `pixels.ImageFile.header`). Localizers, projections and what `excluded_image_types` names besides are left out.

    Raises SeriesRejected for: too few slices, missing or impossible geometry attributes, multi-frame images, images of
    several orientations, matrices, pixel spacings, frames of reference or SOP classes, duplicate positions, missing
    slices, irregular spacing, a sheared stack (gantry tilt).
    """
    excluded = EXCLUDED_IMAGE_TYPES.union(excluded_image_types)
    left_out: dict[str, str] = {}
    planes: list[_Plane] = []
    for image in images:
        reason = _excluded(image, excluded)
        if reason:
            left_out[str(image.get("SOPInstanceUID", ""))] = reason
        else:
            planes.append(_plane(image))
    if len(planes) < min_slices:
        extra = f" ({len(left_out)} localizer or projection images left out)" if left_out else ""
        raise SeriesRejected(f"too few slices: {len(planes)}, at least {min_slices} are needed{extra}")
    _require_one_kind(planes)
    return _stack(planes, left_out)


def _excluded(image: Mapping[str, Any], excluded: frozenset[str]) -> str:
    kinds = {str(value).upper() for value in _listed(image.get("ImageType"))} & excluded
    return f"Image Type {sorted(kinds)[0]}" if kinds else ""


def _plane(image: Mapping[str, Any]) -> _Plane:
    frames = int(_numbers(image, "NumberOfFrames", 1)[0]) if image.get("NumberOfFrames") else 1
    if frames != 1 or (image.get("NumberOfFrames") and not image.get("ImagePositionPatient")):
        raise SeriesRejected(f"multi-frame images ({frames} frames) are not read as a volume; single-frame images are")
    orientation = _numbers(image, "ImageOrientationPatient", 6)
    row, column = orientation[:3], orientation[3:]
    lengths = np.abs(np.array([row @ row, column @ column]) - 1)
    if max(lengths.max(), abs(row @ column)) > 2 * _ORIENTATION_TOLERANCE:
        raise SeriesRejected("Image Orientation (Patient) is not two perpendicular unit vectors")
    spacing = _numbers(image, "PixelSpacing", 2)
    size = (int(_numbers(image, "Rows", 1)[0]), int(_numbers(image, "Columns", 1)[0]))
    if not image.get("FrameOfReferenceUID"):
        raise SeriesRejected("missing geometry: an image has no Frame of Reference UID")
    if spacing.min() <= 0 or min(size) <= 0:
        raise SeriesRejected("Pixel Spacing, Rows or Columns is not positive")
    return _Plane(
        uid=str(image.get("SOPInstanceUID", "")),
        sop_class_uid=str(image.get("SOPClassUID", "")),
        frame_of_reference_uid=str(image.get("FrameOfReferenceUID", "")),
        position=_numbers(image, "ImagePositionPatient", 3),
        orientation=orientation,
        spacing=spacing,
        size=size,
    )


_NAMES = {
    "ImagePositionPatient": "Image Position (Patient)",
    "ImageOrientationPatient": "Image Orientation (Patient)",
    "PixelSpacing": "Pixel Spacing",
    "NumberOfFrames": "Number of Frames",
}


def _listed(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return value.split("\\")
    return tuple(value) if isinstance(value, Sequence) or hasattr(value, "__iter__") else (value,)


def _numbers(image: Mapping[str, Any], keyword: str, count: int) -> Vector:
    name = _NAMES.get(keyword, keyword)
    values = _listed(image.get(keyword))
    if not values:
        raise SeriesRejected(f"missing geometry: an image has no {name}")
    try:
        numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise SeriesRejected(f"{name} is not numeric") from None
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise SeriesRejected(f"{name} does not have {count} finite values")
    return numbers


def _require_one_kind(planes: Sequence[_Plane]) -> None:
    """Every image must be like the first but for its position; the first difference found is named with counts."""
    first = planes[0]
    orientations = np.array([plane.orientation for plane in planes])
    spacings = np.array([plane.spacing for plane in planes])
    differing = {
        "mixed orientation: Image Orientation (Patient)": np.abs(orientations - first.orientation).max(axis=1)
        > _ORIENTATION_TOLERANCE,
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


def _stack(planes: Sequence[_Plane], left_out: Mapping[str, str]) -> VolumeGeometry:
    orientation = np.mean([plane.orientation for plane in planes], axis=0)
    row = orientation[:3] / np.linalg.norm(orientation[:3])
    normal = np.cross(row, orientation[3:])
    normal /= np.linalg.norm(normal)
    column = np.cross(normal, row)  # exactly perpendicular, whatever the header's rounding
    positions = np.array([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    ordered = [planes[k] for k in order]
    step = _require_regular(along)
    pixel = ordered[0].spacing
    _require_upright(positions, along, normal, float(pixel.max()))
    affine = np.eye(4)
    affine[:3, 0] = normal * step
    affine[:3, 1] = column * pixel[0]
    affine[:3, 2] = row * pixel[1]
    # the regular grid through all positions, so that the rounding of one of them does not shift the volume
    centre = positions.mean(axis=0) - normal * step * (len(ordered) - 1) / 2
    affine[:3, 3] = centre
    return VolumeGeometry(
        sop_instance_uids=tuple(plane.uid for plane in ordered),
        affine=affine,
        spacing_mm=(step, float(pixel[0]), float(pixel[1])),
        shape=(len(ordered), *ordered[0].size),
        sop_class_uid=ordered[0].sop_class_uid,
        frame_of_reference_uid=ordered[0].frame_of_reference_uid,
        left_out=dict(left_out),
    )


def _require_regular(along: Vector) -> float:
    """The slice spacing in mm of ascending positions."""
    if len(along) < 2:
        raise SeriesRejected("too few slices: the slice spacing of one image is unknown")
    steps = np.diff(along)
    if doubled := int((steps < _SAME_PLACE_MM).sum()):
        raise SeriesRejected(
            f"duplicate position: {doubled} of {len(along)} images lie where another one does "
            "(several phases or reconstructions in one series, or repeated slices)"
        )
    index = np.arange(len(along)) - (len(along) - 1) / 2
    spacing = float(index @ along / (index @ index))  # least squares
    off = np.abs(along - along.mean() - spacing * index)
    if off.max() <= max(_POSITION_TOLERANCE_MM, _POSITION_TOLERANCE * spacing):
        return spacing
    usual = float(np.median(steps))
    multiples = steps / usual
    whole = np.abs(multiples - np.round(multiples)) * usual <= max(2 * _POSITION_TOLERANCE_MM, 0.05 * usual)
    gaps = np.round(multiples) >= 2
    if whole.all() and gaps.any():
        k = int(np.argmax(gaps))
        count = int((np.round(multiples[gaps]) - 1).sum())
        raise SeriesRejected(
            f"missing slice: {count} position{'s' if count > 1 else ''} without an image, the first between "
            f"{along[k]:.2f} and {along[k + 1]:.2f} mm along the normal, where slices are {usual:.2f} mm apart"
        )
    raise SeriesRejected(
        f"irregular spacing: slices are {steps.min():.2f} to {steps.max():.2f} mm apart (median {usual:.2f} mm)"
    )


def _require_upright(positions: Vector, along: Vector, normal: Vector, pixel_mm: float) -> None:
    """The stack must run along its normal: in a sheared one each slice is shifted sideways against the last."""
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    distance = np.linalg.norm(sideways, axis=1)
    limit = max(_SIDEWAYS_TOLERANCE_MM, _SIDEWAYS_TOLERANCE_PIXELS * pixel_mm)
    if distance.max() <= limit:
        return
    share = (along - along[0]) / (along[-1] - along[0])
    straight = np.linalg.norm(sideways - np.outer(share, sideways[-1]), axis=1).max() <= limit
    if straight:
        angle = math.degrees(math.atan2(float(distance[-1]), float(along[-1] - along[0])))
        raise SeriesRejected(
            f"gantry tilt: the stack is sheared by {angle:.1f} degrees (each slice is shifted in its own plane)"
        )
    raise SeriesRejected(f"slices are shifted sideways against each other, by up to {distance.max():.1f} mm")
