"""What one image, or one frame of a multi-frame one, says about where it lies: its attributes, checked one by one.

Pure. `geometry` makes volumes of planes; nothing here compares two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import SeriesRejected

__all__ = [
    "DISCRIMINATORS",
    "EXCLUDED_IMAGE_TYPES",
    "GEOMETRY_KEYWORDS",
    "ORIENTATION_TOLERANCE",
    "Identity",
    "Plane",
    "Vector",
    "excluded",
    "identity_of",
    "plane_of",
]

Vector = npt.NDArray[np.float64]
Identity = tuple[str, int]  # SOP Instance UID and frame, counted from 1; frame 0: a single-frame image

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
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "EchoTime",
)
EXCLUDED_IMAGE_TYPES = frozenset({"LOCALIZER", "MIP", "MINIP", "PROJECTION IMAGE"})
# What tells the stacks of one series apart, when it holds several.
DISCRIMINATORS = {
    "TemporalPositionIdentifier": "Temporal Position",
    "AcquisitionNumber": "Acquisition Number",
    "EchoTime": "Echo Time",
    "ImageType": "Image Type",
    "StackID": "Stack ID",
}
ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One image or frame in space."""

    identity: Identity
    sop_class_uid: str
    frame_of_reference_uid: str
    position: Vector  # (3,) mm
    orientation: Vector  # (6,) row then column direction
    spacing: Vector  # (2,) mm between rows, between columns
    size: tuple[int, int]
    told: tuple[str, ...]  # values of DISCRIMINATORS


def excluded(image: Mapping[str, Any], kinds: frozenset[str]) -> str:
    """Why an image is no slice by its Image Type, '' when it may be one."""
    found = {str(value).upper() for value in _listed(image.get("ImageType"))} & kinds
    return f"Image Type {sorted(found)[0]}" if found else ""


def identity_of(image: Mapping[str, Any]) -> Identity:
    """Which image or frame the mapping describes."""
    return str(image.get("SOPInstanceUID", "")), int(image.get("FrameNumber", 0))


def plane_of(image: Mapping[str, Any]) -> Plane:
    """Where this image or frame lies. Raises SeriesRejected when its attributes do not say so."""
    frames = int(_numbers(image, "NumberOfFrames", 1)[0]) if image.get("NumberOfFrames") else 1
    if frames != 1 or (image.get("NumberOfFrames") and not image.get("ImagePositionPatient")):
        raise SeriesRejected(
            f"a multi-frame image ({frames} frames) does not say where each frame lies (no functional groups)"
        )
    orientation = _numbers(image, "ImageOrientationPatient", 6)
    row, column = orientation[:3], orientation[3:]
    lengths = np.abs(np.array([row @ row, column @ column]) - 1)
    if max(lengths.max(), abs(row @ column)) > 2 * ORIENTATION_TOLERANCE:
        raise SeriesRejected("Image Orientation (Patient) is not two perpendicular unit vectors")
    spacing = _numbers(image, "PixelSpacing", 2)
    size = (int(_numbers(image, "Rows", 1)[0]), int(_numbers(image, "Columns", 1)[0]))
    if not image.get("FrameOfReferenceUID"):
        raise SeriesRejected("missing geometry: an image has no Frame of Reference UID")
    if spacing.min() <= 0 or min(size) <= 0:
        raise SeriesRejected("Pixel Spacing, Rows or Columns is not positive")
    return Plane(
        identity=identity_of(image),
        sop_class_uid=str(image.get("SOPClassUID", "")),
        frame_of_reference_uid=str(image.get("FrameOfReferenceUID", "")),
        position=_numbers(image, "ImagePositionPatient", 3),
        orientation=orientation,
        spacing=spacing,
        size=size,
        told=tuple("\\".join(str(value) for value in _listed(image.get(keyword))) for keyword in DISCRIMINATORS),
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
