"""A whole slide as one thing: which images of a series are its levels, what its matrix is, and how it leaves the node.

The base level is the VOLUME image of most pixels (PS3.3 C.8.12.4, C.8.12.9); what an engine says in pixels, it says in
those of its total pixel matrix. Labels, overviews and thumbnails never leave (`screening`). A pyramid leaves as one zip
whose entries are stored, not deflated, so that it goes through a small memory at the speed of the disk.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from dicom_node.engines.allow_list import SLIDE_CLASS
from dicom_node.engines.outgoing import read_header, write_outgoing
from dicom_node.engines.privacy import Pseudonyms, why_not
from dicom_node.engines.raw_values import items_of, numbers_of, only_text
from dicom_node.errors import SeriesRejected
from dicom_node.model import StoredInstance

__all__ = ["DICOM", "ZIP", "Level", "Slide", "read_slide", "write_slide"]

DICOM, ZIP = "application/dicom", "application/zip"
MAX_INSTANCES = 4096
MAX_ANISOTROPY = 0.01
_SPECIMENS = "SpecimenDescriptionSequence"
_STAINING = ("SCT", "127790008")  # a kind of processing step (PS3.16 CID 8113)
_SUBSTANCE = frozenset({("SCT", "424361007"), ("SRT", "G-C350")})  # Using substance (PS3.16 TID 8003)
_HEMATOXYLIN = frozenset({("SCT", "12710003")})
_EOSIN = frozenset({("SCT", "36879007")})
_FIXED = (1980, 1, 1, 0, 0, 0)  # the time of an entry: equal slides make equal files


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One resolution: its total pixel matrix, and the instance that holds it or the parts of its concatenation."""

    columns: int
    rows: int
    instances: tuple[StoredInstance, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """A slide that may leave the node. `levels` have most pixels first.

    `mpp`: micrometres from pixel to pixel of the base level. `stain` is "H&E" when the preparation steps say just that,
    "other" when they say something else, '' when they say nothing. `notes` tell what of the series stays here, and why.
    """

    levels: tuple[Level, ...]
    mpp: float
    stain: str
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> Level:
        """The level of most pixels."""
        return self.levels[0]

    @property
    def sop_instance_uid(self) -> str:
        """Of the base level; of a concatenation its first part."""
        return self.base.instances[0].sop_instance_uid

    @property
    def instances(self) -> tuple[StoredInstance, ...]:
        """All of it, most pixels first."""
        return tuple(instance for level in self.levels for instance in level.instances)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    instance: StoredInstance
    header: Dataset
    columns: int
    rows: int


def read_slide(
    instances: Sequence[StoredInstance], *, hide: bool, heartbeat: Callable[[], None] = lambda: None
) -> Slide:
    """The slide a series holds, as far as it may leave; `hide` as in `privacy.why_not`.

    Raises SeriesRejected with every reason when nothing is left, when it is not one slide, or when its pixels are not
    square to a hundredth; EngineRejected when an image cannot be read.
    """
    if len(instances) > MAX_INSTANCES:
        raise SeriesRejected(f"{len(instances)} images in one series of a slide, at most {MAX_INSTANCES} are taken")
    images, reasons = [], []
    for instance in instances:
        image, reason = _image(instance, hide)
        if image is None:
            reasons.append(reason)
        else:
            images.append(image)
        heartbeat()
    if not images:
        raise SeriesRejected("; ".join(dict.fromkeys(reasons)) or "the series has no images")
    _one_slide(images)
    levels = _levels(images)
    base = next(image for image in images if image.instance == levels[0].instances[0])
    notes = tuple(f"{count} image(s) of the series not sent: {why}" for why, count in Counter(reasons).items())
    return Slide(levels=levels, mpp=_mpp(base), stain=_stain(base.instance), notes=notes)


def write_slide(
    slide: Slide,
    target: BinaryIO,
    pseudonyms: Pseudonyms | None,
    *,
    media_type: str,
    heartbeat: Callable[[], None] = lambda: None,
) -> int:
    """Write the base level (`DICOM`) or every level in one archive (`ZIP`) to `target`; returns how many instances.

    Raises as `outgoing.write_outgoing`, and SeriesRejected for a base level in several parts as one file.
    """
    if media_type == DICOM:
        if len(slide.base.instances) > 1:
            raise SeriesRejected("the base level is a concatenation of several files, which only leaves as a zip")
        write_outgoing(slide.base.instances[0], target, pseudonyms, heartbeat=heartbeat)
        return 1
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for number, instance in enumerate(slide.instances, start=1):
            entry = zipfile.ZipInfo(f"{number:05}.dcm", _FIXED)
            with archive.open(entry, "w", force_zip64=True) as file:
                write_outgoing(instance, file, pseudonyms, heartbeat=heartbeat)  # type: ignore[arg-type]
    return len(slide.instances)


# --- which images ----------------------------------------------------------------------------------------------------


def _image(instance: StoredInstance, hide: bool) -> tuple[_Image | None, str]:
    header = read_header(instance)
    if instance.sop_class_uid != SLIDE_CLASS:
        return None, "only whole slide images are taken, and this is none"
    if reason := why_not(header, hide=hide):
        return None, reason
    columns, rows = numbers_of(header, "TotalPixelMatrixColumns"), numbers_of(header, "TotalPixelMatrixRows")
    if len(columns) != 1 or len(rows) != 1 or columns[0] < 1 or rows[0] < 1:
        return None, "the image does not say how large its total pixel matrix is"
    return _Image(instance=instance, header=header, columns=int(columns[0]), rows=int(rows[0])), ""


def _one_slide(images: Iterable[_Image]) -> None:
    for keyword, what in (("FrameOfReferenceUID", "frames of reference"), ("PyramidUID", "pyramids")):
        if len({only_text(image.header, keyword) for image in images}) > 1:
            raise SeriesRejected(f"the series holds images of several {what}: it is not one slide")


def _levels(images: Sequence[_Image]) -> tuple[Level, ...]:
    sizes: dict[tuple[int, int], list[_Image]] = {}
    for image in images:
        sizes.setdefault((image.columns, image.rows), []).append(image)
    made = []
    for (columns, rows), members in sorted(sizes.items(), key=lambda item: -item[0][0] * item[0][1]):
        parts = sorted(members, key=lambda image: (_number(image), image.instance.sop_instance_uid))
        if len(parts) > 1:
            _is_concatenation(parts)
        made.append(Level(columns=columns, rows=rows, instances=tuple(part.instance for part in parts)))
    return tuple(made)


def _number(image: _Image) -> float:
    return next(iter(numbers_of(image.header, "InConcatenationNumber")), 0.0)


def _is_concatenation(parts: Sequence[_Image]) -> None:
    """PS3.3 C.7.6.16.1.2.1. Raises SeriesRejected."""
    uids = {only_text(part.header, "ConcatenationUID") for part in parts}
    if len(uids) != 1 or "" in uids:
        size = f"{parts[0].columns} x {parts[0].rows}"
        raise SeriesRejected(f"the series has {len(parts)} images of {size} pixels: one slide has one of each size")
    if [_number(part) for part in parts] != [float(number) for number in range(1, len(parts) + 1)]:
        raise SeriesRejected("parts of a concatenation are missing or there twice")


# --- what it is ------------------------------------------------------------------------------------------------------


def _mpp(base: _Image) -> float:
    spacing = _spacing(base.header) or _from_extent(base)
    if spacing is None or not all(1e-6 < side < 1.0 for side in spacing):
        raise SeriesRejected("the slide does not say how large its pixels are")
    down, across = spacing
    if abs(down - across) / min(spacing) > MAX_ANISOTROPY:
        raise SeriesRejected("the pixels of the slide are not square")
    return (down + across) / 2 * 1000.0


def _spacing(header: Dataset) -> tuple[float, float] | None:
    """Pixel Spacing (mm) of the Pixel Measures Macro, between rows and between columns."""
    for shared in _items(header, "SharedFunctionalGroupsSequence"):
        for measures in _items(shared, "PixelMeasuresSequence"):
            values = numbers_of(measures, "PixelSpacing")
            if len(values) == 2:
                return values[0], values[1]
    return None


def _from_extent(base: _Image) -> tuple[float, float] | None:
    height, width = numbers_of(base.header, "ImagedVolumeHeight"), numbers_of(base.header, "ImagedVolumeWidth")
    return (height[0] / base.rows, width[0] / base.columns) if len(height) == len(width) == 1 else None


def _items(ds: Dataset, keyword: str) -> list[Dataset]:
    tag = tag_for_keyword(keyword)
    return items_of(ds, tag) if tag is not None and tag in ds else []


def _stain(instance: StoredInstance) -> str:
    """What the preparation steps of all its specimens say they used to stain (PS3.16 TID 8003)."""
    used: set[tuple[str, str]] = set()
    for specimen in _items(read_header(instance, _SPECIMENS), _SPECIMENS):
        for step in _items(specimen, "SpecimenPreparationSequence"):
            staining, substances = False, set[tuple[str, str]]()
            for item in _items(step, "SpecimenPreparationStepContentItemSequence"):
                named = {_code(name) for name in _items(item, "ConceptNameCodeSequence")}
                codes = {_code(code) for code in _items(item, "ConceptCodeSequence")}
                staining = staining or _STAINING in codes
                substances |= codes if named & _SUBSTANCE else set()
            used |= substances if staining else set()
    if not used:
        return ""
    is_he = used & _HEMATOXYLIN and used & _EOSIN and used <= _HEMATOXYLIN | _EOSIN
    return "H&E" if is_he else "other"


def _code(item: Dataset) -> tuple[str, str]:
    return only_text(item, "CodingSchemeDesignator"), only_text(item, "CodeValue")
