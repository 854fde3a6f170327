"""Compressed pixel data to native frames, one at a time, with the attributes that then describe them.

pydicom's decoders do the work; what they make of YBR, planar configuration and bit depth is what is written
(PS3.5 8.2, PS3.3 C.7.6.3).
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.uid import UID

from dicom_node.errors import TranscodeError
from dicom_node.transcode.elements import UNDEFINED, Changes

__all__ = ["MAX_DECODED_BYTES", "decode_frames"]

MAX_DECODED_BYTES = 2 * 1024**3
_IN_MEMORY = 8 * 1024**2
_ALWAYS_LOSSY = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"})


@contextmanager
def decode_frames(source: BinaryIO, syntax: str) -> Iterator[Changes]:
    """What must be written instead of the compressed pixel data; nothing when the data set has none.

    The frames lie in a temporary file until the context ends. Raises TranscodeError: no decoder, too large, broken.
    """
    decoder = _decoder(syntax)
    data_set = _read(source, syntax)
    if data_set is None:
        yield Changes()
        return
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as pixels:
        described, frames, length = _decode(data_set, decoder, pixels)
        pixels.seek(0)
        yield Changes(
            pixel_data=pixels,
            pixel_length=length,
            pixel_vr=b"OB" if int(described["bits_allocated"]) <= 8 else b"OW",
            values=_description(data_set, described, frames, syntax),
        )


def _decoder(syntax: str) -> Decoder:
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        raise TranscodeError(f"transfer syntax {syntax} cannot be decoded here") from None
    if not decoder.is_available:
        raise TranscodeError(f"no decoder for transfer syntax {syntax} is installed")
    return decoder


def _read(source: BinaryIO, syntax: str) -> Dataset | None:
    try:
        data_set = read_dataset(source, False, True)
        if "PixelData" not in data_set:
            return None
        data_set.file_meta = FileMetaDataset()
        data_set.file_meta.TransferSyntaxUID = UID(syntax)
        # Python integers: 65535 x 65535 x frames overflows nothing here
        samples = int(data_set.Rows) * int(data_set.Columns) * int(data_set.get("SamplesPerPixel", 1) or 1)
        size = samples * int(data_set.get("NumberOfFrames", 1) or 1) * ((int(data_set.BitsAllocated) + 7) // 8)
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, NotImplementedError, struct.error) as exc:
        raise TranscodeError("the stored data set cannot be read") from exc
    if size > MAX_DECODED_BYTES:
        raise TranscodeError(f"decoded pixel data would take {size} bytes, more than {MAX_DECODED_BYTES}")
    return data_set


def _decode(data_set: Dataset, decoder: Decoder, pixels: Any) -> tuple[Mapping[str, Any], int, int]:
    described: Mapping[str, Any] = {}
    length = frames = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for frame, description in decoder.iter_array(data_set, raw=False):
                described = description
                pixels.write(np.ascontiguousarray(frame).tobytes())
                length += frame.nbytes
                frames += 1
    except Exception as exc:  # decoders of several libraries raise whatever they like; the stored file is untouched
        raise TranscodeError(f"the pixel data cannot be decoded ({type(exc).__name__})") from exc
    if not frames:
        raise TranscodeError("the pixel data has no frame")
    if length % 2:
        pixels.write(b"\0")
        length += 1
    if length >= UNDEFINED:
        raise TranscodeError("decoded pixel data does not fit a 32-bit length")
    return described, frames, length


def _description(
    data_set: Dataset, described: Mapping[str, Any], frames: int, syntax: str
) -> Mapping[int, tuple[bytes, bytes]]:
    """The elements that must say something else once the frames are native: tag to VR and little endian value."""
    values = {0x00280004: (b"CS", _even(str(described["photometric_interpretation"])))}
    if int(described["samples_per_pixel"]) > 1:
        values[0x00280006] = (b"US", struct.pack("<H", int(described["planar_configuration"])))
    if int(described["bits_allocated"]) != int(data_set.BitsAllocated):
        values[0x00280100] = (b"US", struct.pack("<H", int(described["bits_allocated"])))
    if "NumberOfFrames" in data_set and int(data_set.NumberOfFrames or 0) != frames:
        values[0x00280008] = (b"IS", _even(str(frames)))
    if syntax in _ALWAYS_LOSSY and data_set.get("LossyImageCompression") != "01":
        values[0x00282110] = (b"CS", b"01")  # PS3.3 C.7.6.1.1.5: once lossy, always lossy
    return values


def _even(text: str) -> bytes:
    return text.encode("ascii") + b" " * (len(text) % 2)
