"""One stored image on its way out: its header read, and a Part-10 file written with its pixel bytes as they are stored.

Values pass in pieces, so a file of any size goes through the same small memory. The new file has an empty preamble and
file meta information of its own, without AE titles. What follows the pixel data is never read. PS3.10 7.1, PS3.5 7, A.
"""

from __future__ import annotations

import hashlib
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from pydicom import config
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset, write_file_meta_info, write_sequence_item
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_node.engines.privacy import HEADER_KEYWORDS, Pseudonyms, pseudonymised, why_not
from dicom_node.engines.screening import OVERLAY_TAGS
from dicom_node.errors import EngineRejected, StorageError
from dicom_node.model import StoredInstance

__all__ = ["Sent", "opened_data_set", "read_header", "write_outgoing"]

PIECE = 256 * 1024
_BATCH = 512  # items
MAX_HEADER_VALUE_BYTES = 256 * 1024**2  # of the functional groups of a very large slide
MAX_INFLATED_BYTES = 8 * 1024**3
_MAX_FRAGMENTS = 10_000_000

_UNDEFINED = 0xFFFFFFFF
_FIRST_PIXEL_TAG = 0x7FE00001
_PIXEL_DATA = 0x7FE00010
_OFFSET_TABLES = (0x7FE00001, 0x7FE00002, 0x7FE00003)  # OV, OV, UV: of encapsulated pixel data (PS3.3 C.7.6.3.1.8)
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
# The node need not know it: the pixels are not decoded here. A private one could say who made it
_STANDARD_SYNTAX = re.compile(r"1\.2\.840\.10008\.1\.2(\.[0-9]{1,4}){0,4}")
_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_SUBSAMPLED = {"YBR_FULL_422": (2, 3), "YBR_PARTIAL_422": (2, 3), "YBR_PARTIAL_420": (1, 2)}
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, NotImplementedError, EOFError, OverflowError),
    *(struct.error, zlib.error, RecursionError),
)

_TAGS: list[BaseTag | int] = [
    *(tag for keyword in sorted(HEADER_KEYWORDS) if (tag := tag_for_keyword(keyword)) is not None),
    *OVERLAY_TAGS,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was written: bytes and SHA-256 of the whole file, its SOP Instance UID there, and whether it names the
    patient.
    """

    sop_instance_uid: str
    transfer_syntax_uid: str
    length: int
    sha256: str
    identifiable: bool


def read_header(instance: StoredInstance, *more: str) -> Dataset:
    """The attributes `privacy` works on and those of the keywords `more`, without pixel data.

    Raises EngineRejected when it cannot be read.
    """
    tags = [tag for keyword in more if (tag := tag_for_keyword(keyword)) is not None]
    with _opened(instance) as source:
        return _header(source, *_coding(instance.transfer_syntax_uid), more=tags)


def write_outgoing(
    instance: StoredInstance,
    target: BinaryIO,
    pseudonyms: Pseudonyms | None,
    *,
    heartbeat: Callable[[], None] | None = None,
) -> Sent:
    """Write the image to `target` as it may leave the node.

    With `pseudonyms` the header is theirs and the pixel bytes are the stored ones (a deflated data set leaves inflated,
    in Explicit VR Little Endian). None is for engines that may see the patient (`privacy.must_hide`): the data set
    leaves byte for byte. `heartbeat` is called after each piece. Raises EngineRejected with the reason when the image
    may not leave or cannot be read, StorageError when `target` cannot be written; what was written then is unfit.
    """
    if not _STANDARD_SYNTAX.fullmatch(instance.transfer_syntax_uid):
        raise EngineRejected("the image is in a transfer syntax the Standard does not have")
    out = _Counted(target, heartbeat)
    with _opened(instance) as source:
        coding = _coding(instance.transfer_syntax_uid)
        header = _header(source, *coding)
        if pseudonyms is None:
            return _identifiable(instance, header, out)
        leaving = pseudonymised(header, pseudonyms, heartbeat=heartbeat or (lambda: None))
        syntax = instance.transfer_syntax_uid
        if syntax == DeflatedExplicitVRLittleEndian:
            syntax = str(ExplicitVRLittleEndian)
        uid = str(leaving.SOPInstanceUID)
        _write_meta(out, str(leaving.SOPClassUID), uid, syntax)
        _write_header(out, leaving, *coding)
        _PixelCopy(source, out, *coding).run(leaving, encapsulated=syntax not in _NATIVE)
    return Sent(
        sop_instance_uid=uid, transfer_syntax_uid=syntax, length=out.length, sha256=out.sha256, identifiable=False
    )


def _identifiable(instance: StoredInstance, header: Dataset, out: _Counted) -> Sent:
    if reason := why_not(header, hide=False):
        raise EngineRejected(reason)
    _write_meta(out, instance.sop_class_uid, instance.sop_instance_uid, instance.transfer_syntax_uid)
    left = instance.data_set_length
    with _file(instance) as file:
        while left:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise EngineRejected("the image's file is shorter than it should be")
            out.write(piece)
            left -= len(piece)
    return Sent(
        sop_instance_uid=instance.sop_instance_uid,
        transfer_syntax_uid=instance.transfer_syntax_uid,
        length=out.length,
        sha256=out.sha256,
        identifiable=True,
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def _coding(transfer_syntax_uid: str) -> tuple[bool, bool]:
    """Implicit VR, little endian."""
    return transfer_syntax_uid == ImplicitVRLittleEndian, transfer_syntax_uid != ExplicitVRBigEndian


def opened_data_set(instance: StoredInstance) -> tuple[AbstractContextManager[BinaryIO], bool, bool]:
    """The data set at its start, inflated where it is deflated; implicit VR; little endian. Raises EngineRejected."""
    return _opened(instance), *_coding(instance.transfer_syntax_uid)


def _file(instance: StoredInstance) -> BinaryIO:
    try:
        file = open(instance.path, "rb")  # noqa: SIM115 - handed to the caller
        file.seek(instance.data_set_offset)
    except OSError as exc:
        raise EngineRejected(f"an image's file cannot be read ({exc.strerror})") from exc
    return file


def _opened(instance: StoredInstance) -> AbstractContextManager[BinaryIO]:
    """The data set at its start, inflated where it is deflated."""
    if instance.transfer_syntax_uid != DeflatedExplicitVRLittleEndian:
        return _file(instance)
    inflated = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller
    try:
        with _file(instance) as file:
            _inflate(file, inflated)
        inflated.seek(0)
    except zlib.error:
        inflated.close()
        raise EngineRejected("the image cannot be inflated") from None
    except BaseException:
        inflated.close()
        raise
    return inflated


def _inflate(source: BinaryIO, out: BinaryIO) -> None:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total = 0
    while not inflater.eof:
        raw = inflater.unconsumed_tail or source.read(PIECE)
        piece = inflater.decompress(raw, PIECE)
        if not raw and not piece:
            raise EngineRejected("the deflated image is cut short")
        total += len(piece)
        if total > MAX_INFLATED_BYTES:
            raise EngineRejected(f"the image inflates to more than {MAX_INFLATED_BYTES >> 30} GiB")
        out.write(piece)


def _header(source: BinaryIO, implicit: bool, little: bool, *, more: Sequence[int] = ()) -> Dataset:
    """Read up to the pixel data; `source` then stands at it."""
    tags: list[BaseTag | int] = [*_TAGS, *more]
    wanted = frozenset(tags)

    def stop(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if _UNDEFINED > length > MAX_HEADER_VALUE_BYTES and tag in wanted:
            raise ValueError("a value is too large")
        return int.__ge__(tag, _FIRST_PIXEL_TAG)

    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            return read_dataset(source, implicit, little, stop_when=stop, specific_tags=tags)
    except OSError as exc:
        raise EngineRejected(f"an image's file cannot be read ({exc.strerror})") from exc
    except _UNREADABLE as exc:
        raise EngineRejected(f"an image's header cannot be read ({type(exc).__name__})") from None


# --- writing ---------------------------------------------------------------------------------------------------------


class _Counted:
    """Where the file goes, counted and hashed on the way."""

    def __init__(self, target: BinaryIO, heartbeat: Callable[[], None] | None) -> None:
        self._target = target
        self._heartbeat = heartbeat
        self._digest = hashlib.sha256()
        self.length = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        try:
            self._target.write(data)
        except OSError as exc:
            raise StorageError(f"what leaves could not be written ({exc.strerror})") from exc
        self._digest.update(data)
        self.length += len(data)
        if self._heartbeat is not None:
            self._heartbeat()


def _write_meta(out: _Counted, sop_class_uid: str, sop_instance_uid: str, syntax: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = UID(syntax)
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta, enforce_standard=True)
    out.write(b"\0" * 128 + b"DICM" + buffer.getvalue())


def _write_header(out: _Counted, leaving: Dataset, implicit: bool, little: bool) -> None:
    """All of it in front of the pixel data; the items of long sequences pass in batches."""
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            for element in leaving:
                if element.VR == "SQ" and len(element.value) > _BATCH:
                    _write_long_sequence(out, element, implicit, little)
                else:
                    part = Dataset()
                    part.add(element)
                    buffer = _buffer(implicit, little)
                    write_dataset(buffer, part)
                    out.write(buffer.getvalue())
    except _UNREADABLE as exc:
        raise EngineRejected(f"an image's header cannot be written ({type(exc).__name__})") from None


def _write_long_sequence(out: _Counted, element: DataElement, implicit: bool, little: bool) -> None:
    """A sequence of undefined length (PS3.5 7.5.2)."""
    order = "<" if little else ">"
    tag = struct.pack(f"{order}HH", element.tag.group, element.tag.element)
    out.write(tag + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4)
    for start in range(0, len(element.value), _BATCH):
        buffer = _buffer(implicit, little)
        for item in element.value[start : start + _BATCH]:
            write_sequence_item(buffer, item, ["iso8859"])
        out.write(buffer.getvalue())
    out.write(struct.pack(f"{order}HHI", 0xFFFE, 0xE0DD, 0))


def _buffer(implicit: bool, little: bool) -> DicomBytesIO:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, little
    return buffer


class _PixelCopy:
    """Copies the pixel data element at which `source` stands, and what belongs to it, and nothing after it."""

    def __init__(self, source: BinaryIO, out: _Counted, implicit: bool, little: bool) -> None:
        self._source, self._out = source, out
        self._implicit = implicit
        self._order = "<" if little else ">"

    def run(self, leaving: Dataset, *, encapsulated: bool) -> None:
        """Raises EngineRejected when there is none, or it is not what `leaving` and the transfer syntax say."""
        for _ in range(len(_OFFSET_TABLES) + 1):
            tag, length, head = self._element()
            if tag == _PIXEL_DATA:
                break
            if tag not in _OFFSET_TABLES or not encapsulated or length > 8 * _MAX_FRAGMENTS:
                raise EngineRejected("the image has no Pixel Data that could be understood")
            self._out.write(head)
            self._bytes(length)
        else:
            raise EngineRejected("the image has no Pixel Data that could be understood")
        if (length == _UNDEFINED) != encapsulated:
            raise EngineRejected("the image's Pixel Data is not encoded as its transfer syntax says")
        if encapsulated:
            self._out.write(head)
            self._fragments()
            return
        expected = _native_length(leaving)
        if not expected <= length <= expected + expected % 2:
            raise EngineRejected(f"the image has {length} bytes of pixel data where {expected} belong to its frames")
        self._out.write(head[:-4] + struct.pack(f"{self._order}I", length + length % 2))
        self._bytes(length)
        self._out.write(b"\0" * (length % 2))  # PS3.5 8.1.1: padded to even length, which old software forgets

    def _element(self) -> tuple[int, int, bytes]:
        """Tag, length and the bytes of the element's head."""
        head = self._take(8)
        group, number = struct.unpack(f"{self._order}HH", head[:4])
        if self._implicit:
            (length,) = struct.unpack(f"{self._order}I", head[4:])
        elif head[4:6] in (b"OB", b"OW", b"OV", b"UV"):
            (length,) = struct.unpack(f"{self._order}I", self._take(4))
            head = head[:6] + struct.pack(f"{self._order}HI", 0, length)  # the reserved bytes are nobody's to fill
        else:
            raise EngineRejected("the image's Pixel Data is not encoded as its transfer syntax says")
        return group << 16 | number, length, head

    def _fragments(self) -> None:
        """Items of defined length up to the delimiter (PS3.5 A.4)."""
        for _ in range(_MAX_FRAGMENTS):
            head = self._take(8)
            group, number, length = struct.unpack("<HHI", head)
            tag = group << 16 | number
            if tag == _SEQUENCE_END:
                self._out.write(head[:4] + b"\0\0\0\0")
                return
            if tag != _ITEM or length == _UNDEFINED:
                break
            self._out.write(head)
            self._bytes(length)
        raise EngineRejected("the image's encapsulated pixel data is cut short or holds something that is no fragment")

    def _take(self, size: int) -> bytes:
        try:
            data = self._source.read(size)
        except OSError as exc:
            raise EngineRejected(f"an image's file cannot be read ({exc.strerror})") from exc
        if len(data) != size:
            raise EngineRejected("the image's file ends inside its pixel data, or it has none")
        return data

    def _bytes(self, length: int) -> None:
        while length:
            size = min(length, PIECE)
            self._out.write(self._take(size))
            length -= size


def _native_length(leaving: Dataset) -> int:
    """Bytes the frames take, without padding (PS3.5 8.1.1, PS3.3 C.7.6.3.1.2)."""
    frames = int(leaving.get("NumberOfFrames") or 1)
    cells = int(leaving.Rows) * int(leaving.Columns) * int(leaving.SamplesPerPixel) * frames
    bits = cells * int(leaving.BitsAllocated)
    part, whole = _SUBSAMPLED.get(str(leaving.get("PhotometricInterpretation", "")), (1, 1))
    return (bits * part // whole + 7) // 8
