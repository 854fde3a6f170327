"""What is sent: bodies of a length known before the first byte, read piece by piece, never chunked on the wire.

Servers that parse a request with `cgi` take chunk headers for content, so the length is always declared (RFC 9110
8.6). multipart/form-data (RFC 7578) is laid out here: part names exactly as given, text parts without a file name or
type, files with both. Knows nothing of the wire.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicom_node.errors import StorageError

__all__ = ["Body", "Content", "Part", "body_of"]

PIECE_BYTES = 256 * 1024

Content = bytes | Path | tuple[Iterable[bytes], int]
"""Bytes; a file; or pieces with their total length. Pieces that can be had only once are not sent twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of multipart/form-data. With `filename` it is a file, without a field, as parsers tell them apart.

    `filename` is what the engine sees: give it no path and nothing of a patient.
    """

    name: str
    content: Content | str
    filename: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """Bytes that can be opened, once or again and again."""

    length: int
    open: Callable[[], Iterator[bytes]]
    repeatable: bool


class Body:
    """A request's body: `length` bytes in order. None of it is held in memory that was not there before."""

    def __init__(self, sources: Sequence[_Source], content_type: str | None) -> None:
        self._sources = sources
        self.length = sum(source.length for source in sources)
        self.content_type = content_type
        self._opened = False

    @property
    def can_be_sent(self) -> bool:
        """Whether it can be read from its start; not when its pieces were had already and come but once."""
        return not self._opened or all(source.repeatable for source in self._sources)

    def pieces(self) -> Iterator[bytes]:
        """The bytes. Raises StorageError when a file cannot be read or is not as long as it was."""
        self._opened = True
        for source in self._sources:
            left = source.length
            for piece in source.open():
                left -= len(piece)
                if left < 0:
                    break
                yield piece
            if left:
                raise StorageError(f"what is sent to an engine is not the {source.length} bytes it was announced with")


def body_of(*, json_value: Any = None, parts: Sequence[Part] | None = None, content: Content | None = None) -> Body:
    """The body of whichever was given; empty for none. Raises ValueError for two, StorageError for a missing file."""
    if sum(given is not None for given in (json_value, parts, content)) > 1:
        raise ValueError("give one of json, files and content")
    if json_value is not None:
        return Body((_source(json.dumps(json_value, allow_nan=False).encode()),), "application/json")
    if parts is not None:
        return _multipart(parts)
    return Body(() if content is None else (_source(content),), None)


def _multipart(parts: Sequence[Part]) -> Body:
    boundary = uuid.uuid4().hex
    sources = []
    for part in parts:
        sources.append(_source(_part_header(part, boundary)))
        sources.append(_source(part.content.encode() if isinstance(part.content, str) else part.content))
        sources.append(_source(b"\r\n"))
    sources.append(_source(f"--{boundary}--\r\n".encode()))
    return Body(sources, f"multipart/form-data; boundary={boundary}")


def _part_header(part: Part, boundary: str) -> bytes:
    header = f'--{boundary}\r\nContent-Disposition: form-data; name="{_quoted(part.name)}"'
    content_type = part.content_type
    if part.filename is not None:
        header += f'; filename="{_quoted(part.filename)}"'
        content_type = content_type or "application/octet-stream"
    if content_type:
        if not content_type.isprintable():
            raise ValueError("a content type of a part is one line")
        header += f"\r\nContent-Type: {content_type}"
    return (header + "\r\n\r\n").encode()


def _quoted(name: str) -> str:
    # HTML 4.10.22.8, which RFC 7578 follows in practice: these three are escaped, nothing else is
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _source(content: Content) -> _Source:
    if isinstance(content, bytes):
        return _Source(len(content), lambda: _cut(content), True)
    if isinstance(content, Path):
        return _Source(_size(content), lambda: _read(content), True)
    pieces, length = content
    repeatable = iter(pieces) is not pieces
    return _Source(length, lambda: (cut for piece in pieces for cut in _cut(piece)), repeatable)


def _cut(piece: bytes) -> Iterator[bytes]:
    if len(piece) <= PIECE_BYTES:
        yield piece
        return
    view = memoryview(piece)
    for start in range(0, len(view), PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as exc:
        raise StorageError(f"a file for an engine cannot be read: {exc.strerror}") from exc


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
    except OSError as exc:
        raise StorageError(f"a file for an engine cannot be read: {exc.strerror}") from exc
