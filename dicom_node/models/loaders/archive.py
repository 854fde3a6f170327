"""What torch saves is a zip archive: look at it before torch's own reader unpacks it.

Both readers must see the same archive: a comment, data before or after it, or an entry that is there twice are signs
of one made to be read in two ways, and torch writes none of them.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from dicom_node.errors import PackageError

__all__ = ["is_archive", "opened_archive"]

_MAX_ENTRIES = 20_000
_MAX_INFLATED = 256 * 1024**2  # torch compresses only text, such as the code of a scripted network
_END = b"PK\x05\x06"
_END_LENGTH = 22


def is_archive(content: bytes) -> bool:
    """Whether the content begins as a zip archive does."""
    return content[:4] == b"PK\x03\x04"


def opened_archive(content: bytes, origin: Path | str) -> zipfile.ZipFile:
    """The archive in `content`, found sound: nothing in it was unpacked yet.

    Raises PackageError when it is no archive as torch writes them, has too many entries, entries that lie over each
    other or lead elsewhere, or would unpack to much more than it is.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as exc:
        raise PackageError(f"{origin}: is no archive as torch saves them ({exc})") from exc
    entries = archive.infolist()
    if content[-_END_LENGTH:][:4] != _END or archive.comment:
        raise PackageError(f"{origin}: has data behind the archive")
    if not entries or entries[0].header_offset != 0 or content[:4] != b"PK\x03\x04":
        raise PackageError(f"{origin}: has data before the archive")
    if len(entries) > _MAX_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise PackageError(f"{origin}: has entries twice, or more than {_MAX_ENTRIES}")
    inflated = 0
    end = 0
    for entry in entries:
        parts = entry.filename.split("/")
        if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename or "\0" in entry.orig_filename:
            raise PackageError(f"{origin}: an entry's name leads elsewhere: {entry.filename[:80]!r}")
        if entry.header_offset < end or entry.flag_bits & 1:
            raise PackageError(f"{origin}: entries lie over each other or are encrypted")
        end = entry.header_offset + entry.compress_size
        if entry.compress_type == zipfile.ZIP_STORED:
            if entry.file_size != entry.compress_size:
                raise PackageError(f"{origin}: an entry is not as long as it says")
        else:
            inflated += entry.file_size
    if inflated > _MAX_INFLATED:
        raise PackageError(f"{origin}: would unpack to {inflated} bytes")
    if end > archive.start_dir:
        raise PackageError(f"{origin}: entries lie beyond the archive")
    return archive
