"""Where the planes of a label volume lie: read from their images' headers, single-frame or multi-frame.

Each plane is tied to its image by SOP Instance UID, and to a frame of it by number (from 1) where the image has
several. Attributes are kept as the source wrote them: a frame of a result lies exactly where its image does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom.spatial import get_volume_positions
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from dicom_node.errors import EncodingError
from dicom_node.results._sources import decoded, numbers
from dicom_node.values import LabelVolume

__all__ = ["Grid", "Plane", "decimals", "grid_of"]

_SAME_DIRECTION = 1e-3  # of a direction cosine
_SAME_PLACE_MM = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One image, or frame `number` of it: Image Position and Orientation (Patient) and Pixel Spacing as DS text, and
    Slice Thickness (mm) if the source tells one.
    """

    image: Dataset
    number: int | None
    position: tuple[str, ...]
    orientation: tuple[str, ...]
    pixel_spacing: tuple[str, ...]
    thickness_mm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The planes of a volume, in the order of the label array, and where along the normal each lies."""

    planes: tuple[Plane, ...]
    spacing_mm: float | None  # between slices, None when they are not a regular stack
    nearest_mm: float | None  # distance of the two nearest slices
    order: npt.NDArray[np.intp]  # plane indices, ascending along the normal

    @property
    def first(self) -> Plane:
        """The lowest plane along the normal."""
        return self.planes[int(self.order[0])]

    @property
    def images(self) -> Sequence[Dataset]:
        """Every image once, ascending along the normal."""
        found = {str(plane.image.SOPInstanceUID): plane.image for plane in (self.planes[int(i)] for i in self.order)}
        return list(found.values())


def grid_of(volume: LabelVolume, sources: Mapping[str, Dataset]) -> Grid:
    """The grid of the volume's images. Raises EncodingError when they are not parallel planes of one series."""
    missing = [uid for uid in volume.sop_instance_uids if uid not in sources]
    if missing:
        raise EncodingError(f"no source for the plane of image {missing[0]}")
    images = {uid: sources[uid] for uid in dict.fromkeys(volume.sop_instance_uids)}
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "FrameOfReferenceUID"):
        told = {str(decoded(image, keyword) or "") for image in images.values()}
        if len(told) != 1 or "" in told:
            raise EncodingError(f"{keyword} is missing or differs between the images of a label volume")
    shape = tuple(float(size) for size in volume.labels.shape[1:])
    for image in images.values():
        size = (numbers(image, "Rows", 1) or ()) + (numbers(image, "Columns", 1) or ())
        if size != shape:
            raise EncodingError(f"labels: planes of {shape} pixels do not fit an image of {size}")
    return _stacked(tuple(_planes(volume, images)))


def _stacked(planes: tuple[Plane, ...]) -> Grid:
    orientations = np.array([plane.orientation for plane in planes], np.float64)
    spacings = np.array([plane.pixel_spacing for plane in planes], np.float64)
    positions = np.array([plane.position for plane in planes], np.float64)
    off = np.abs(orientations - orientations[0]).max()
    if off > _SAME_DIRECTION or not np.allclose(spacings, spacings[0], rtol=_SAME_DIRECTION):
        raise EncodingError("orientation or pixel spacing differs between the images of a label volume")
    along = positions @ np.cross(orientations[0, :3], orientations[0, 3:])
    order = np.argsort(along, kind="stable")
    nearest = float(np.diff(along[order]).min()) if len(along) > 1 else None
    if nearest is not None and nearest < _SAME_PLACE_MM:
        raise EncodingError("two images of a label volume lie in the same place")
    spacing = None
    if len(planes) > 1:
        spacing, _ = get_volume_positions(positions.tolist(), orientations[0].tolist())
    return Grid(
        planes=planes,
        spacing_mm=None if spacing is None else abs(float(spacing)),
        nearest_mm=nearest,
        order=order,
    )


# --- one plane -------------------------------------------------------------------------------------------------------


def _planes(volume: LabelVolume, images: Mapping[str, Dataset]) -> Iterator[Plane]:
    """In the order of the label array. Raises EncodingError for a plane without a place."""
    if not volume.frame_numbers:
        for uid in volume.sop_instance_uids:
            image = images[uid]
            if (numbers(image, "NumberOfFrames", 1) or (1.0,)) != (1.0,):
                raise EncodingError("an image has several frames, and nothing says which one a plane of labels is on")
            yield _plane(image, None, image, image, image)
        return
    groups = {uid: _functional_groups(image) for uid, image in images.items()}
    for uid, number in zip(volume.sop_instance_uids, volume.frame_numbers, strict=True):
        shared, per_frame = groups[uid]
        if not 1 <= number <= len(per_frame):
            raise EncodingError(f"an image of {len(per_frame)} frames has no frame {number}")
        frame = per_frame[number - 1]
        position, orientation, measures = (
            _macro(frame, name) or _macro(shared, name) or Dataset()
            for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        yield _plane(images[uid], number, position, orientation, measures)


def _functional_groups(image: Dataset) -> tuple[Dataset, Sequence[Dataset]]:
    """PS3.3 C.7.6.16: those of the image, and those of each frame."""
    shared = decoded(image, "SharedFunctionalGroupsSequence") or [Dataset()]
    return shared[0], decoded(image, "PerFrameFunctionalGroupsSequence") or []


def _macro(groups: Dataset, keyword: str) -> Dataset | None:
    items = decoded(groups, keyword)
    return items[0] if items else None


def _plane(image: Dataset, number: int | None, place: Dataset, direction: Dataset, measures: Dataset) -> Plane:
    position = decimals(place, "ImagePositionPatient", 3)
    orientation = decimals(direction, "ImageOrientationPatient", 6)
    spacing = decimals(measures, "PixelSpacing", 2)
    if position is None or orientation is None or spacing is None:
        raise EncodingError("an image of a label volume has no position, orientation or pixel spacing")
    thickness = numbers(measures, "SliceThickness", 1)
    return Plane(
        image=image,
        number=number,
        position=position,
        orientation=orientation,
        pixel_spacing=spacing,
        thickness_mm=thickness[0] if thickness and thickness[0] > 0 else None,
    )


def decimals(source: Dataset, keyword: str, count: int) -> tuple[str, ...] | None:
    """DS of each number as the source wrote it, when that fits the VR."""
    if numbers(source, keyword, count) is None:
        return None
    return tuple(_decimal(value) for value in decoded(source, keyword))


def _decimal(value: object) -> str:
    text = str(value).strip()
    return text if len(text) <= 16 else str(format_number_as_ds(float(text)))
