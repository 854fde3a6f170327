"""Labels of a slide as a tiled segmentation over the extent of its total pixel matrix (PS3.3 C.8.12.14, C.7.6.17.3).

The matrix of the labels has pixels of its own: fewer and larger, or as many. It begins where the slide's begins, lies
as it lies and ends where it ends, as the levels of a slide's pyramid do. Tiles without a label have no frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import SegmentationStorage
from pydicom.valuerep import format_number_as_ds

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell, codes
from dicom_node.results._frames import element, item, sequence
from dicom_node.results._planes import decimals
from dicom_node.results._segments import check_values, content_description, description, values_of
from dicom_node.results._sources import decoded, numbers
from dicom_node.values import ResultContext, Segment, SlideLabels

__all__ = ["Slide", "matrix_of", "slide_segmentation", "specimen"]

Labels = npt.NDArray[np.uint8]

TILE = 512
_LARGEST = 0xFFFFFFFE  # bytes of an element
_LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
_ROW, _COLUMN, _SEGMENT = (0x0048, 0x021F), (0x0048, 0x021E), (0x0062, 0x000B)
_POSITION, _IDENTIFICATION = (0x0048, 0x021A), (0x0062, 0x000A)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """Where the total pixel matrix of a slide image lies: pixel spacing in mm (down, right), origin and orientation in
    the slide coordinate system.
    """

    image: Dataset
    rows: int
    columns: int
    spacing_mm: tuple[float, float]
    thickness_mm: float
    origin_mm: tuple[float, float, float]
    orientation: tuple[str, ...]

    @classmethod
    def of(cls, image: Dataset) -> Slide:
        """Raises EncodingError when the image does not say."""
        rows, columns = matrix_of(image)
        measures = _pixel_measures(image)
        spacing = numbers(measures, "PixelSpacing", 2)
        origin = (decoded(image, "TotalPixelMatrixOriginSequence") or [Dataset()])[0]
        place = [numbers(origin, f"{axis}OffsetInSlideCoordinateSystem", 1) for axis in "XYZ"]
        orientation = decimals(image, "ImageOrientationSlide", 6)
        if spacing is None or min(spacing) <= 0 or place[0] is None or place[1] is None or orientation is None:
            raise EncodingError("a slide image has no pixel spacing, origin or orientation")
        if not decoded(image, "FrameOfReferenceUID"):
            raise EncodingError("a slide image has no Frame of Reference UID")
        thickness = numbers(measures, "SliceThickness", 1) or (0.0,)
        depth = numbers(image, "ImagedVolumeDepth", 1) or (0.0,)  # micrometres
        return cls(
            image=image,
            rows=rows,
            columns=columns,
            spacing_mm=(spacing[0], spacing[1]),
            thickness_mm=thickness[0] if thickness[0] > 0 else (depth[0] / 1000 if depth[0] > 0 else 0.001),
            origin_mm=(place[0][0], place[1][0], (place[2] or (0.0,))[0]),
            orientation=orientation,
        )


def matrix_of(image: Dataset) -> tuple[int, int]:
    """Rows and columns of the total pixel matrix. Raises EncodingError for an image that is no slide."""
    rows = numbers(image, "TotalPixelMatrixRows", 1)
    columns = numbers(image, "TotalPixelMatrixColumns", 1)
    if rows is None or columns is None or min(rows[0], columns[0]) < 1:
        raise EncodingError("an image has no total pixel matrix: it is no slide")
    return int(rows[0]), int(columns[0])


def specimen(image: Dataset) -> Dataset:
    """Specimen Module (PS3.3 C.7.6.22): which slide and which specimens; how they were prepared stays with the images.

    Empty when the image does not identify them.
    """
    found = Dataset()
    container = common.clean(str(decoded(image, "ContainerIdentifier") or ""), "LO")
    items = []
    for source in decoded(image, "SpecimenDescriptionSequence") or []:
        one = Dataset()
        one.SpecimenIdentifier = common.clean(str(decoded(source, "SpecimenIdentifier") or ""), "LO")
        one.IssuerOfTheSpecimenIdentifierSequence = []
        one.SpecimenUID = str(decoded(source, "SpecimenUID") or "")
        one.SpecimenPreparationSequence = []
        if one.SpecimenIdentifier and one.SpecimenUID:
            items.append(one)
    if container and items:
        found.ContainerIdentifier = container
        found.IssuerOfTheContainerIdentifierSequence = []
        found.ContainerTypeCodeSequence = []
        found.SpecimenDescriptionSequence = items
    return found


def _pixel_measures(image: Dataset) -> Dataset:
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in (decoded(image, keyword) or [])[:1]:
            if measures := decoded(groups, "PixelMeasuresSequence"):
                found: Dataset = measures[0]
                return found
    return Dataset()


# --- the object ------------------------------------------------------------------------------------------------------


def slide_segmentation(
    kind: str, labels: SlideLabels, sources: Mapping[str, Dataset], context: ResultContext, number: int
) -> Dataset | None:
    """The object of kind `seg` (BINARY) or `labelmap`, in Explicit VR Little Endian; None when there is no label.

    Raises EncodingError when the labels do not cover the slide, pixel by pixel or in larger pixels.
    """
    array = labels.labels
    if array.dtype != np.uint8 or array.ndim != 2 or not array.size:
        raise EncodingError(f"labels of a slide: {array.dtype} {array.shape}, expected uint8, rows x columns")
    present = values_of(array)
    check_values(present, labels.segments)
    segments = sorted((one for one in labels.segments if present[one.number]), key=lambda one: one.number)
    if not segments:
        return None
    slide = Slide.of(_shell.image_of(labels.sop_instance_uid, sources, "the labels of a slide"))
    spacing = _spacing(array, slide)
    tiles = list(_tiles(array))
    binary = kind == "seg"
    header = _header(kind, labels, segments, slide, spacing, tiles[0].shape, context, number)
    frames = _frames(tiles, segments, binary=binary)
    header.NumberOfFrames = len(frames)
    groups = _functional_groups(frames, slide, spacing, binary=binary)
    return common.encoded(header, groups, _pixels(frames, segments, binary=binary))


def _spacing(labels: Labels, slide: Slide) -> tuple[float, float]:
    """Of the labels, in mm. Raises EncodingError when they are more than the slide's pixels, or of another shape."""
    rows, columns = labels.shape
    down, right = slide.rows / rows, slide.columns / columns
    rounding = 1.5 / rows + 1.5 / columns  # a row or column more or less, where the matrix was not divisible
    if rows > slide.rows or columns > slide.columns or abs(down / right - 1) > rounding:
        raise EncodingError(
            f"labels of {rows} x {columns} do not cover a slide of {slide.rows} x {slide.columns} pixels"
        )
    return slide.spacing_mm[0] * down, slide.spacing_mm[1] * right


def _header(
    kind: str,
    labels: SlideLabels,
    segments: Sequence[Segment],
    slide: Slide,
    spacing: tuple[float, float],
    tile: tuple[int, int],
    context: ResultContext,
    number: int,
) -> Dataset:
    algorithm = common.Algorithm.of(context.provenance)
    made = _shell.shell(
        kind=kind,
        sop_class_uid=SegmentationStorage if kind == "seg" else _LABEL_MAP_STORAGE,
        modality="SEG",
        what="Segmentation",
        source=slide.image,
        number=number,
        context=context,
        algorithm=algorithm,
    )
    made.ImageType = ["DERIVED", "PRIMARY"]
    made.PatientOrientation = ""  # a slide lies in no patient (type 2C, PS3.3 C.7.6.1)
    made.ContentLabel = "AI_SEGMENTATION"
    made.ContentDescription = content_description(labels.notes, segments)
    made.ContentCreatorName = ""
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = tile
    made.PixelRepresentation = 0
    bits = 1 if kind == "seg" else 8
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.update(_shell.lossy(slide.image))
    made.SegmentationType = "BINARY" if kind == "seg" else "LABELMAP"
    made.SegmentsOverlap = "NO"  # one label per pixel
    made.PresentationLUTShape = "IDENTITY"
    made.SegmentSequence = [
        description(segment, place, context, algorithm) for place, segment in enumerate(segments, start=1)
    ]
    if kind != "seg":
        made.SegmentSequence.insert(0, _background(algorithm))
        made.PixelPaddingValue = 0
    _place(made, labels.labels, slide)
    _name_dimensions(made, binary=kind == "seg")
    made.SharedFunctionalGroupsSequence = [_shared(slide, spacing)]
    made.ReferencedSeriesSequence = _shell.referred([slide.image])
    made.update(specimen(slide.image))
    if text := common.remarks(context, labels.notes):
        made.ImageComments = text
    return common.finish(made, slide.image, context, algorithm)


def _background(algorithm: common.Algorithm) -> Dataset:
    """Segment 0 of a label map."""
    background = Dataset()
    background.SegmentNumber = 0
    background.SegmentLabel = "Background"
    background.SegmentedPropertyCategoryCodeSequence = [codes.concept(codes.BACKGROUND)]
    background.SegmentedPropertyTypeCodeSequence = [codes.concept(codes.BACKGROUND)]
    background.SegmentAlgorithmType = "AUTOMATIC"
    background.SegmentAlgorithmName = algorithm.name
    return background


def _place(made: Dataset, labels: Labels, slide: Slide) -> None:
    """Frame of Reference and Microscope Slide Layer Tile Organization (PS3.3 C.7.4.1, C.8.12.14)."""
    made.FrameOfReferenceUID = str(slide.image.FrameOfReferenceUID)
    made.PositionReferenceIndicator = common.clean(str(decoded(slide.image, "PositionReferenceIndicator") or ""), "LO")
    made.TotalPixelMatrixRows, made.TotalPixelMatrixColumns = labels.shape
    made.TotalPixelMatrixFocalPlanes = 1
    made.ImageOrientationSlide = list(slide.orientation)
    origin = Dataset()
    for axis, value in zip("XYZ", slide.origin_mm, strict=True):
        setattr(origin, f"{axis}OffsetInSlideCoordinateSystem", format_number_as_ds(value))
    made.TotalPixelMatrixOriginSequence = [origin]


def _shared(slide: Slide, spacing: tuple[float, float]) -> Dataset:
    shared, measures, derivation = Dataset(), Dataset(), Dataset()
    measures.SliceThickness = format_number_as_ds(slide.thickness_mm)
    measures.PixelSpacing = [format_number_as_ds(value) for value in spacing]
    shared.PixelMeasuresSequence = [measures]
    source = _shell.purposed([slide.image], codes.SOURCE_IMAGE)[0]
    source.SpatialLocationsPreserved = "YES"
    derivation.SourceImageSequence = [source]
    derivation.DerivationCodeSequence = [codes.concept(codes.SEGMENTATION)]
    shared.DerivationImageSequence = [derivation]
    return shared


def _name_dimensions(made: Dataset, *, binary: bool) -> None:
    """Segment (of bits only), row and column, as Dimension Index Values in `_functional_groups`."""
    uid = common.result_uid("dimensions", str(made.SOPInstanceUID))
    organization = Dataset()
    organization.DimensionOrganizationUID = uid
    made.DimensionOrganizationSequence = [organization]
    made.DimensionOrganizationType = "TILED_SPARSE"
    indices = []
    for pointer, group, label in (
        *([(_SEGMENT, _IDENTIFICATION, "Segment")] if binary else []),
        (_ROW, _POSITION, "Row of the tile"),
        (_COLUMN, _POSITION, "Column of the tile"),
    ):
        index = Dataset()
        index.DimensionOrganizationUID = uid
        index.DimensionIndexPointer = Tag(*pointer)
        index.add(DataElement("FunctionalGroupPointer", "AT", Tag(*group)))
        index.DimensionDescriptionLabel = label
        indices.append(index)
    made.DimensionIndexSequence = indices


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tile:
    """A part of the labels, from 0-based `row` and `column` on; past the end of the matrix it is filled up."""

    row: int
    column: int
    shape: tuple[int, int]
    part: Labels
    present: npt.NDArray[np.bool_]

    def filled(self) -> Labels:
        """The whole tile."""
        if self.part.shape == self.shape:
            return self.part
        whole = np.zeros(self.shape, np.uint8)
        whole[: self.part.shape[0], : self.part.shape[1]] = self.part
        return whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Frame:
    """All of a tile, or segment `number` (label `label`) of it."""

    tile: _Tile
    number: int = 0
    label: int = 0


def _tiles(labels: Labels) -> Iterator[_Tile]:
    """Row by row. A tile is a whole number of bytes as bits: its width is a multiple of 8."""
    rows, columns = labels.shape
    shape = (min(TILE, rows), min(TILE, -(-columns // 8) * 8))
    for row in range(0, rows, shape[0]):
        for column in range(0, columns, shape[1]):
            part = labels[row : row + shape[0], column : column + shape[1]]
            yield _Tile(row=row, column=column, shape=shape, part=part, present=values_of(part))


def _frames(tiles: Sequence[_Tile], segments: Sequence[Segment], *, binary: bool) -> list[_Frame]:
    if not binary:
        return [_Frame(tile=tile) for tile in tiles if tile.present[1:].any()]
    return [
        _Frame(tile=tile, number=number, label=segment.number)
        for number, segment in enumerate(segments, start=1)
        for tile in tiles
        if tile.present[segment.number]
    ]


def _pixels(frames: Sequence[_Frame], segments: Sequence[Segment], *, binary: bool) -> bytes:
    """Bits, first pixel lowest, or a segment number a byte. Raises EncodingError for more than an element holds."""
    rows, columns = frames[0].tile.shape
    if (size := len(frames) * rows * columns // (8 if binary else 1)) > _LARGEST:
        raise EncodingError(f"a segmentation of {size} bytes is longer than an element can be")
    numbers_of = bytearray(256)
    for number, segment in enumerate(segments, start=1):
        numbers_of[segment.number] = number
    pixels = BytesIO()
    for frame in frames:
        tile = frame.tile.filled()
        if binary:
            pixels.write(np.packbits(tile == frame.label, bitorder="little").data)
        else:
            pixels.write(tile.tobytes().translate(bytes(numbers_of)))
    if pixels.tell() % 2:
        pixels.write(b"\0")
    return pixels.getvalue()


def _functional_groups(frames: Sequence[_Frame], slide: Slide, spacing: tuple[float, float], *, binary: bool) -> bytes:
    """Per-Frame Functional Groups Sequence, encoded: Frame Content, Plane Position (Slide), Segment Identification."""
    rows = {row: place for place, row in enumerate(sorted({frame.tile.row for frame in frames}), start=1)}
    columns = {column: place for place, column in enumerate(sorted({frame.tile.column for frame in frames}), start=1)}
    items = []
    for frame in frames:
        place = (rows[frame.tile.row], columns[frame.tile.column])
        indices = (frame.number, *place) if binary else place
        groups = sequence(0x0020, 0x9111, element(0x0020, 0x9157, "UL", struct.pack(f"<{len(indices)}L", *indices)))
        groups += sequence(*_POSITION, _position(frame.tile, slide, spacing))
        if binary:
            groups += sequence(*_IDENTIFICATION, element(*_SEGMENT, "US", struct.pack("<H", frame.number)))
        items.append(item(groups))
    return element(0x5200, 0x9230, "SQ", b"".join(items))


def _position(tile: _Tile, slide: Slide, spacing: tuple[float, float]) -> bytes:
    """Plane Position (Slide) Macro (PS3.3 C.8.12.6.1): the tile's first pixel, in mm, and counted from 1."""
    directions = np.array(slide.orientation, np.float64).reshape(2, 3)
    moved = directions[0] * spacing[1] * tile.column + directions[1] * spacing[0] * tile.row
    encoded = b"".join(
        element(0x0040, number, "DS", str(format_number_as_ds(float(value))).encode())
        for number, value in zip((0x072A, 0x073A, 0x074A), slide.origin_mm + moved, strict=True)
    )
    encoded += element(*_COLUMN, "SL", struct.pack("<l", tile.column + 1))
    return encoded + element(*_ROW, "SL", struct.pack("<l", tile.row + 1))
