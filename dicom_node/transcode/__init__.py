"""Another transfer syntax for a stored data set, on the way out. What is stored never changes.

Between native and deflated syntaxes the data set is rewritten element by element without interpreting values
(`elements`): every element survives, private and unknown ones too. Compressed pixel data is decoded frame by frame
where pydicom has a decoder, and the attributes that describe it are kept true (`frames`).

Bounded memory: results beyond a few MiB lie in an unnamed temporary file, and what would decode to more than
`MAX_DECODED_BYTES` is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO, cast

from dicom_node.errors import TranscodeError
from dicom_node.transcode.elements import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    Changes,
    rewrite,
)
from dicom_node.transcode.frames import MAX_DECODED_BYTES, decode_frames

__all__ = ["MAX_DECODED_BYTES", "transcode"]

_PREFERENCE = (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE)


def transcode(
    path: str | os.PathLike[str],
    data_set_offset: int,
    from_syntax: str,
    accepted: Sequence[str],
    *,
    data_set_length: int | None = None,
) -> tuple[str, BinaryIO]:
    """The data set at `data_set_offset` of the file in one of the `accepted` transfer syntaxes: (syntax, readable).

    As stored, untouched, when `from_syntax` is accepted; else Explicit VR Little Endian, Implicit VR Little Endian,
    Explicit VR Big Endian or Deflated, whichever of these is accepted first. The caller closes the readable.
    `data_set_length` None: to the end of the file.

    Raises TranscodeError with the reason, OSError when the file cannot be read.
    """
    size = os.stat(path).st_size
    length = size - data_set_offset if data_set_length is None else data_set_length
    if length < 0 or data_set_offset + length > size:
        raise TranscodeError("the stored file is shorter than its index entry says")
    if from_syntax in accepted:
        return from_syntax, cast(BinaryIO, _Region(path, data_set_offset, length))
    target = next((uid for uid in _PREFERENCE if uid in accepted), None)
    if target is None:
        raise TranscodeError("the peer takes only compressed transfer syntaxes, and none is the stored one")
    with _Region(path, data_set_offset, length) as source:
        if from_syntax in _PREFERENCE:
            return target, rewrite(source, from_syntax, target, Changes())
        with decode_frames(cast(BinaryIO, source), from_syntax) as changes:
            source.seek(0)
            return target, rewrite(source, EXPLICIT_LE, target, changes)


class _Region:
    """A readable part of a file."""

    def __init__(self, path: str | os.PathLike[str], offset: int, length: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._start, self._length = offset, length
        self.seek(0)

    def read(self, size: int = -1, /) -> bytes:
        left = self._length - self.tell()
        return self._file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        self._file.seek(self._start + min(max(base + offset, 0), self._length))
        return self.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
