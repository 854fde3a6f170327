"""A map of classes over a slide, out of a TIFF: by colour where the engine told the colours, else by number.

Files of any layout Pillow reads: tiles or strips, BigTIFF, deflated, LZW. A map need not have the slide's own pixels,
but it must cover the slide: its sides are those of the total pixel matrix divided by one whole number, rounded as the
engine likes. Where that rounding leaves it a little wider than the slide, it is brought onto the slide's extent by
nearest neighbour, and this is said.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from dicom_node.errors import EngineError

__all__ = ["MAX_MAP_PIXELS", "ClassMap", "read_class_map"]

MAX_MAP_PIXELS = 128 * 1024**2
MAX_PAGES = 16
MAX_CLASSES = 255
_BAND = 4 << 20  # pixels looked at at a time
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, struct.error)
_BACKGROUND = frozenset({0x000000, 0xFFFFFF})
_UNSEEN = 0x1000000  # stands for every transparent pixel, whatever its colour

Colour = tuple[int, int, int]
Codes = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMap:
    """`labels` covers the slide's extent exactly; `names` are the classes of its values where colours told them."""

    labels: npt.NDArray[np.uint8]
    names: Mapping[int, str]
    colours: Mapping[int, Colour]
    notes: tuple[str, ...] = ()


def read_class_map(
    path: Path,
    *,
    columns: int,
    rows: int,
    colours: Mapping[str, Colour],
    heartbeat: Callable[[], None] = lambda: None,
) -> ClassMap:
    """The map in `path` over a slide of `columns` x `rows`; `colours` by class name, none for a map of numbers.

    Raises EngineError when it is no such map, does not cover the slide, has a colour nobody told, or is too large.
    """
    if len(colours) > MAX_CLASSES:
        raise EngineError(f"the class map has {len(colours)} classes, at most {MAX_CLASSES} are taken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which are bounded here, and of odd tags
        try:
            # not Image.open: it refuses a pyramid for its largest page, which is never decoded; `_page` bounds what is
            with TiffImageFile(path) as image:
                factor = _page(image, columns, rows)
                image.load()
                heartbeat()
                labels = _labels(image, colours, heartbeat)
        except (*_UNREADABLE, Image.DecompressionBombError) as exc:
            raise EngineError(f"the class map cannot be read as TIFF ({type(exc).__name__})") from None
    labels, notes = _fitted(labels, factor, columns, rows)
    names = dict(enumerate(colours, start=1))
    return ClassMap(labels=labels, names=names, colours=dict(enumerate(colours.values(), start=1)), notes=notes)


# --- which page ------------------------------------------------------------------------------------------------------


def _page(image: Image.Image, columns: int, rows: int) -> int:
    """Go to the first page that covers the slide and is small enough; how many of its pixels one page pixel spans."""
    covers = False
    for number in range(MAX_PAGES):
        try:
            image.seek(number)
        except EOFError:
            break
        factor = _factor(*image.size, columns, rows)
        if factor and image.size[0] * image.size[1] <= MAX_MAP_PIXELS:
            return factor
        covers = covers or bool(factor)
    if covers:
        raise EngineError(f"the class map has more than {MAX_MAP_PIXELS} pixels")
    width, height = image.size
    raise EngineError(f"a class map of {width} x {height} pixels does not cover a slide of {columns} x {rows}")


def _factor(width: int, height: int, columns: int, rows: int) -> int:
    """The whole number the slide's sides were divided by, 0 when there is none."""
    for factor in (max(columns // max(width, 1), 1), ceil(columns / max(width, 1))):
        sides = ((columns, width), (rows, height))
        if all(have in (whole // factor, ceil(whole / factor)) and have > 0 for whole, have in sides):
            return factor
    return 0


# --- which class -----------------------------------------------------------------------------------------------------


def _labels(image: Image.Image, colours: Mapping[str, Colour], heartbeat: Callable[[], None]) -> npt.NDArray[np.uint8]:
    if not colours:
        return _numbers(image)
    classes = np.array([red << 16 | green << 8 | blue for red, green, blue in colours.values()], np.uint32)
    if len(set(classes.tolist())) != len(classes):
        raise EngineError("two classes of the map have the same colour")
    order = np.argsort(classes)
    labels = np.zeros((image.size[1], image.size[0]), np.uint8)
    step = max(_BAND // max(image.size[0], 1), 1)
    for top in range(0, image.size[1], step):
        bottom = min(top + step, image.size[1])
        codes = _codes(image.crop((0, top, image.size[0], bottom)))
        labels[top:bottom] = _looked_up(codes, classes, order)
        heartbeat()
    return labels


def _codes(band: Image.Image) -> Codes:
    """Colours as numbers, 0xRRGGBB; `_UNSEEN` where nothing is to be seen."""
    values = np.asarray(band.convert("RGBA"), dtype=np.uint32)
    codes: Codes = (values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]).astype(np.uint32)
    codes[values[..., 3] == 0] = _UNSEEN
    return codes


def _looked_up(codes: Codes, classes: Codes, order: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    ranked = classes[order]
    at = np.minimum(np.searchsorted(ranked, codes), len(ranked) - 1)
    known = ranked[at] == codes
    others = codes[~known]
    allowed = np.isin(others, np.array(sorted({*_BACKGROUND, _UNSEEN}), np.uint32))
    if not allowed.all():
        odd = int(others[~allowed][0])
        raise EngineError(f"the class map has the colour #{odd:06x}, which is no class: nobody can say what it is")
    return np.where(known, order[at] + 1, 0).astype(np.uint8)


def _numbers(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
        raise EngineError(f"the class map is a picture ({image.mode}), and nobody told what its colours mean")
    values = np.asarray(image)
    if values.dtype != np.uint8 and values.dtype != np.bool_ and (values.min() < 0 or values.max() > MAX_CLASSES):
        raise EngineError(f"the class map has numbers beyond {MAX_CLASSES}")
    return np.ascontiguousarray(values, dtype=np.uint8)


# --- where it lies ---------------------------------------------------------------------------------------------------


def _fitted(
    labels: npt.NDArray[np.uint8], factor: int, columns: int, rows: int
) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    height, width = labels.shape
    if (width * factor, height * factor) == (columns, rows):
        return labels, ()
    # an output pixel takes the map's value at its centre, both in pixels of the slide
    across, down = _nearest(width, factor, columns), _nearest(height, factor, rows)
    notes = (
        f"the class map's pixels are {factor} x {factor} of the slide's, which is no whole number of them: "
        "brought onto the slide's extent by nearest neighbour",
    )
    return np.ascontiguousarray(labels[np.ix_(down, across)]), notes


def _nearest(count: int, factor: int, whole: int) -> Sequence[int]:
    centres = (np.arange(count) + 0.5) * (whole / count)
    found: list[int] = np.minimum(centres // factor, count - 1).astype(int).tolist()
    return found
