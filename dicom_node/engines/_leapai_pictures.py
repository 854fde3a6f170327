"""What LeapAI draws and writes: heatmaps (PNG) and reports (PDF), checked before anything is made of them.

Nothing is decoded before its size is known from its own first bytes (PNG, ISO/IEC 15948 11.2.2).
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["MAX_PDF_BYTES", "MAX_PNG_BYTES", "Unfit", "pdf_of", "picture_of", "png_of", "same_shape"]

MAX_PNG_BYTES = 64 * 1024**2
MAX_PDF_BYTES = 32 * 1024**2
MAX_PIXELS = 32 * 1024**2  # a chest film has 8 to 16
_MAX_SIDE = 16_384
_SLACK = 0.02  # of a side: heatmaps are drawn on a smaller grid and rounded
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_URI = "data:image/png;base64,"
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error)


class Unfit(Exception):
    """What came is not what it should be; the text says why and names nobody."""


def png_of(text: object) -> bytes:
    """The PNG a JSON answer holds as base64. Raises Unfit."""
    if not isinstance(text, str) or len(text) > MAX_PNG_BYTES * 4 // 3 + 4:
        raise Unfit("the heatmap is no text in base64, or too long")
    try:
        return base64.b64decode(text.removeprefix(_URI), validate=True)
    except (ValueError, binascii.Error):
        raise Unfit("the heatmap is not in base64") from None


def picture_of(png: bytes) -> npt.NDArray[np.uint8]:
    """Its pixels: rows x columns (grey) or rows x columns x 3 (RGB); transparent ones lie on black. Raises Unfit."""
    if len(png) > MAX_PNG_BYTES or len(png) < 33 or not png.startswith(_SIGNATURE) or png[12:16] != b"IHDR":
        raise Unfit("the heatmap is no PNG")
    columns, rows = struct.unpack(">II", png[16:24])
    if not (0 < columns <= _MAX_SIDE and 0 < rows <= _MAX_SIDE and columns * rows <= MAX_PIXELS):
        raise Unfit(f"the heatmap has {columns} x {rows} pixels: at most {_MAX_SIDE} a side and {MAX_PIXELS} in all")
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if image.size != (columns, rows):
                raise Unfit("the heatmap contradicts itself about its size")
            return _pixels(image)
    except (*_UNREADABLE, Image.DecompressionBombError, zlib.error) as exc:
        raise Unfit(f"the heatmap cannot be read as PNG ({type(exc).__name__})") from None


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), dtype=np.uint8)
    if image.mode.startswith("I"):  # 16 bits of grey
        return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image, dtype=np.uint8)
    seen = image.convert("RGBA")
    black = Image.new("RGBA", seen.size, (0, 0, 0, 255))
    black.alpha_composite(seen)
    return np.asarray(black.convert("RGB"), dtype=np.uint8)


def same_shape(pixels: npt.NDArray[np.uint8], rows: int, columns: int) -> bool:
    """Whether the picture shows what the image shows, larger or smaller: its sides have the image's proportions."""
    ours, theirs = pixels.shape[0] * columns, pixels.shape[1] * rows
    return bool(abs(ours - theirs) <= _SLACK * max(ours, theirs))


def pdf_of(content: bytes) -> bytes:
    """The report. Raises Unfit when it is no PDF that ends as one (ISO 32000-1 7.5.2, 7.5.5)."""
    if not content.startswith(b"%PDF-") or b"%%EOF" not in content[-1024:]:
        raise Unfit("the report is no PDF, or not all of one")
    return content
