"""Voxels of a file an engine returned, read without trusting it: sizes are decided before memory is taken.

What NIfTI and NRRD have in common: a header, then voxels with the first index fastest, raw or as gzip (RFC 1952). A
gzip stream is read only as far as its header says there are voxels, so that it cannot grow beyond them.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError

__all__ = ["MAX_VOXEL_BYTES", "ReturnedVolume", "UnusableVolume", "VoxelStream", "opened"]

MAX_VOXEL_BYTES = 2 * 1024**3
_MAX_SIDE = 32767  # what NIfTI-1 can say
_MAX_DEFLATE = 1040  # deflate makes no byte of more than 1032 (RFC 1951)
_BLOCK = 4 * 1024**2
_PADDING = 4096  # bytes after the voxels that are let pass

Voxels = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]


class UnusableVolume(EngineError):
    """A returned file is no volume that can be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnedVolume:
    """What an engine returned: `array` (i, j, k), real numbers, and where it says that voxel lies.

    `affine_lps` (4 x 4, float64) maps (i, j, k, 1) to patient coordinates in mm, x to the left, y to the back, z to
    the head. `names`: what the file itself calls its labels, if it does. `notes` are for people.
    """

    array: Voxels
    affine_lps: Affine
    notes: tuple[str, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)


class VoxelStream:
    """The bytes of a file, one after the other; `beat` is called while voxels are read."""

    def __init__(self, stream: BinaryIO, stored_bytes: int, beat: Callable[[], None] | None = None) -> None:
        self._stream = stream
        self._stored_bytes = stored_bytes
        self._beat = beat

    def take(self, count: int) -> bytes:
        """`count` bytes. Raises UnusableVolume when there are fewer."""
        with _reading():
            data = self._stream.read(count)
        if len(data) != count:
            raise UnusableVolume("the file ends inside its header")
        return data

    def line(self, limit: int) -> bytes:
        """The next line without its end. Raises UnusableVolume when it is longer than `limit` or has no end."""
        with _reading():
            data = self._stream.readline(limit + 1)
        if not data.endswith(b"\n"):
            raise UnusableVolume("a line of the header is too long, or the file ends inside it")
        return data.rstrip(b"\r\n")

    def unpacked(self) -> VoxelStream:
        """What follows, as a gzip stream."""
        return VoxelStream(gzip.GzipFile(fileobj=self._stream, mode="rb"), self._stored_bytes, self._beat)  # type: ignore[arg-type]

    @property
    def most(self) -> int:
        """How many bytes there can be at most."""
        packed = isinstance(self._stream, gzip.GzipFile)
        return self._stored_bytes * (_MAX_DEFLATE if packed else 1)

    def voxels(self, shape: tuple[int, int, int], dtype: np.dtype[Any], max_bytes: int) -> Voxels:
        """All voxels, (i, j, k) with i fastest, in this machine's byte order; then the file must end.

        Raises UnusableVolume: more than `max_bytes`, more than the file can hold, fewer than said, or damaged.
        """
        size = math.prod(shape) * dtype.itemsize
        text = " x ".join(str(side) for side in shape)
        if min(shape) < 1 or max(shape) > _MAX_SIDE:
            raise UnusableVolume(f"a volume of {text} voxels is none")
        if size > max_bytes:
            raise UnusableVolume(f"a volume of {text} voxels is {size} bytes, more than the {max_bytes} that are read")
        if size > self.most:
            raise UnusableVolume(f"the file is too short for the {text} voxels its header announces")
        flat: Voxels = np.empty(math.prod(shape), dtype)
        self._fill(flat.view(np.uint8).data, text)
        self._require_end(text)
        if not dtype.isnative:
            flat = flat.byteswap(inplace=True).view(dtype.newbyteorder())
        return flat.reshape(shape, order="F")

    def _fill(self, target: memoryview, text: str) -> None:
        done = 0
        while done < len(target):
            with _reading():
                count = self._stream.readinto(target[done : done + _BLOCK])  # type: ignore[attr-defined]
            if not count:
                raise UnusableVolume(f"the file ends after {done} of {len(target)} bytes of its {text} voxels")
            done += count
            if self._beat is not None:
                self._beat()

    def _require_end(self, text: str) -> None:
        """Reading on to the end also checks the sums of a gzip stream."""
        with _reading():
            rest = self._stream.read(_PADDING + 1)
        if len(rest) > _PADDING:
            raise UnusableVolume(f"the file goes on after the {text} voxels its header announces")


@contextmanager
def opened(path: Path, beat: Callable[[], None] | None = None) -> Iterator[VoxelStream]:
    """The file from its start, unpacked if it is gzip as a whole."""
    with path.open("rb") as file:
        stream = VoxelStream(file, os.fstat(file.fileno()).st_size, beat)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield stream.unpacked() if packed else stream


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise UnusableVolume("the file is cut short or damaged: its gzip stream cannot be read to the end") from exc
