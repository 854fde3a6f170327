"""Images as pictures for a Clara Train AIAA server: what a viewer would show, 8-bit grey, PNG (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import StorageError

__all__ = ["grey", "write_png"]


def grey(plane: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Its range on 0 to 255; a plane of one value is black."""
    low, high = float(plane.min()), float(plane.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.rint((plane.astype(np.float64) - low) * scale).astype(np.uint8)


def write_png(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """`pixels` (rows, columns) as `path`; the same pixels give the same bytes. Raises StorageError."""
    rows, columns = pixels.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = pixels
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 1)),
        (b"IEND", b""),
    )
    try:
        with path.open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            for kind, content in chunks:
                file.write(struct.pack(">I", len(content)) + kind + content)
                file.write(struct.pack(">I", zlib.crc32(kind + content)))
    except OSError as exc:
        raise StorageError(f"a picture for an engine cannot be written: {exc.strerror}") from exc
