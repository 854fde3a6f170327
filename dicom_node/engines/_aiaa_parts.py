"""An answer of a Clara Train AIAA server, taken apart: a file, parameters, or both as multipart/form-data.

Answers lie in a file and are read in pieces, for a mask may be large. What a part calls itself is believed, where it
would like to be written is not: names of files are looked at for nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

from dicom_node.errors import EngineError, StorageError

__all__ = ["Reply", "reply_of"]

PIECE = 256 * 1024
MAX_PARAMS_BYTES = 16 * 1024**2
MAX_PARTS = 64
_MAX_HEADERS = 16 * 1024
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=?$ -]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """`file`: what is a file in the answer, None when there is none. `params`: its parameters, empty when none."""

    file: Path | None
    params: Mapping[str, Any]


def reply_of(answer: Path, content_type: str, beat: Callable[[], None]) -> Reply:
    """What lies in the file `answer`. Raises EngineError for what cannot be understood, StorageError."""
    kind, boundary = _kind(content_type)
    try:
        with answer.open("rb") as stream:
            first = stream.read(1)
            stream.seek(0)
            if not first:
                raise EngineError("the answer is empty")
            if kind.startswith("multipart/"):
                return _taken_apart(answer, stream, boundary, beat)
            # a bare object is parameters, whatever it is called; no file of voxels begins like it
            if kind.endswith("json") or first in b"{[":
                return Reply(file=None, params=_params(stream.read(MAX_PARAMS_BYTES + 1)))
    except OSError as exc:
        raise StorageError(f"an answer of an engine cannot be read: {exc.strerror}") from exc
    return Reply(file=answer, params={})


def _kind(content_type: str) -> tuple[str, bytes]:
    message = Message()
    message["content-type"] = content_type[:1024].replace("\r", " ").replace("\n", " ")
    boundary = message.get_boundary("")
    kind = message.get_content_type()
    if kind.startswith("multipart/") and not _BOUNDARY.fullmatch(boundary):
        raise EngineError("the answer is said to be of several parts, and not how they are told apart")
    return kind, boundary.encode("ascii", "replace")


def _params(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > MAX_PARAMS_BYTES:
        raise EngineError(f"the answer's parameters are more than {MAX_PARAMS_BYTES} bytes")
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        raise EngineError("the answer's parameters are no JSON") from None
    if isinstance(told, dict) and (told.get("success") is False or set(told) == {"error"}):
        raise EngineError("the server answered that it failed, with a status that says otherwise; see its own log")
    return told if isinstance(told, dict) else {"": told}


# --- several parts ---------------------------------------------------------------------------------------------------


def _taken_apart(answer: Path, stream: BinaryIO, boundary: bytes, beat: Callable[[], None]) -> Reply:
    """The first part with a file name is the file, `params` (older servers: `points`) the parameters."""
    file: Path | None = None
    params: Mapping[str, Any] = {}
    for number, (names, content) in enumerate(_parts(stream, boundary)):
        if number == MAX_PARTS:
            raise EngineError(f"the answer has more than {MAX_PARTS} parts")
        if "filename" in names and file is None:
            file = answer.with_name(f"{answer.name}.file")
            _save(content, file, beat)
        elif names.get("name") == "params" or (names.get("name") == "points" and not params):
            told = _params(_short(content))
            params = told if names["name"] == "params" else {"points": told.get("", told)}
        else:
            for _ in content:
                beat()
    return Reply(file=file, params=params)


def _save(content: Iterator[bytes], target: Path, beat: Callable[[], None]) -> None:
    with target.open("wb") as out:
        for piece in content:
            out.write(piece)
            beat()


def _short(content: Iterator[bytes]) -> bytes:
    raw = bytearray()
    for piece in content:
        raw += piece
        if len(raw) > MAX_PARAMS_BYTES:
            raise EngineError(f"the answer's parameters are more than {MAX_PARAMS_BYTES} bytes")
    return bytes(raw)


def _parts(stream: BinaryIO, boundary: bytes) -> Iterator[tuple[Mapping[str, str], Iterator[bytes]]]:
    """The parts in order: what Content-Disposition says, and the content, to be read before the next (RFC 2046 5.1)."""
    reader = _Reader(stream, b"\r\n--" + boundary)
    for _ in reader.until_boundary():  # a preamble
        pass
    while not reader.at_end():
        yield _names(reader.headers()), reader.until_boundary()


class _Reader:
    """Reads on to the next boundary; bytes are looked at once."""

    def __init__(self, stream: BinaryIO, mark: bytes) -> None:
        self._stream, self._mark = stream, mark
        self._held = b"\r\n"  # the first boundary may stand at the very beginning
        self._ended = False

    def _more(self) -> bool:
        piece = self._stream.read(PIECE)
        self._held += piece
        return bool(piece)

    def until_boundary(self) -> Iterator[bytes]:
        """What comes before it. Raises EngineError when there is none."""
        while (at := self._held.find(self._mark)) < 0:
            safe = len(self._held) - len(self._mark) + 1
            if safe > 0:
                piece, self._held = self._held[:safe], self._held[safe:]
                yield piece
            if not self._more():
                raise EngineError("the answer ends inside one of its parts")
        if at:
            yield self._held[:at]
        self._held = self._held[at + len(self._mark) :]

    def at_end(self) -> bool:
        """Whether the boundary just passed was the last."""
        while len(self._held) < 2 and self._more():
            pass
        return self._held.startswith(b"--") or len(self._held) < 2

    def headers(self) -> bytes:
        """Those of a part. Raises EngineError."""
        while (at := self._held.find(b"\r\n\r\n")) < 0:
            if len(self._held) > _MAX_HEADERS or not self._more():
                raise EngineError("a part of the answer has no headers that end")
        raw, self._held = self._held[:at], self._held[at + 2 :]  # an empty content may begin with the boundary's CRLF
        if len(raw) > _MAX_HEADERS:
            raise EngineError("a part of the answer has no headers that end")
        self._drop_line_end()
        return raw

    def _drop_line_end(self) -> None:
        """The CRLF before the content, unless it is the boundary's own."""
        while len(self._held) < len(self._mark) + 2 and self._more():
            pass
        if not self._held.startswith(self._mark):
            self._held = self._held[2:]


def _names(raw: bytes) -> Mapping[str, str]:
    """`name` and, of a file, `filename`."""
    message = Message()
    for line in raw.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().casefold() == "content-disposition":
            message["content-disposition"] = value.strip()
    found = message.get_params([], header="content-disposition")
    return {key.casefold(): value if isinstance(value, str) else "" for key, value in found}
