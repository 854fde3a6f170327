"""GeoJSON of any length, one feature at a time (RFC 7946): a slide may have millions of cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dicom_node.errors import EngineError

__all__ = ["features"]

PIECE = 1 << 20  # characters
MAX_VALUE = 64 << 20  # characters of one feature, or of one value beside the features
_SPACE = " \t\r\n"


def features(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every feature of a FeatureCollection, of a list of features, or the only one.

    Raises EngineError when the file is none of these, no UTF-8, or a feature is longer than `MAX_VALUE`.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _features(_Reader(file))
    except UnicodeDecodeError:
        raise EngineError("the GeoJSON file is no UTF-8 text") from None
    except RecursionError:
        raise EngineError("the GeoJSON file is nested too deeply") from None


def _features(reader: _Reader) -> Iterator[Mapping[str, Any]]:
    if reader.peek() == "[":
        yield from _listed(reader)
        return
    reader.take("{")
    found = False
    other: dict[str, Any] = {}
    while reader.peek() != "}":
        key = reader.value()
        reader.take(":")
        if key == "features" and reader.peek() == "[":
            found = True
            yield from _listed(reader)
        else:
            value = reader.value()
            if key in ("type", "geometry", "properties"):
                other[str(key)] = value
        if reader.peek() != "}":
            reader.take(",")
    if found:
        return
    if other.get("type") != "Feature":
        raise EngineError("the file is JSON but no GeoJSON feature collection")
    yield other


def _listed(reader: _Reader) -> Iterator[Mapping[str, Any]]:
    reader.take("[")
    while reader.peek() != "]":
        feature = reader.value()
        if not isinstance(feature, Mapping):
            raise EngineError("what should be a GeoJSON feature is none")
        yield feature
        if reader.peek() != "]":
            reader.take(",")
    reader.take("]")


class _Reader:
    """JSON values out of a text that is read piece by piece."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def peek(self) -> str:
        """The next character that is no space, not taken. Raises EngineError at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                raise EngineError("the GeoJSON file is cut short")

    def take(self, character: str) -> None:
        """The next character. Raises EngineError when it is another."""
        if self.peek() != character:
            raise EngineError("the file is no JSON")
        self._at += 1

    def value(self) -> Any:
        """The next value. Raises EngineError."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                # what is wrong may only be that its end is not read yet
                if not self._more():
                    raise EngineError("the file is no JSON, or cut short") from None
                continue
            except ValueError:  # a whole number of thousands of digits, which Python will not convert
                raise EngineError("the GeoJSON file holds a number that is none") from None
            if end < len(self._text) or not self._more():  # a number may go on
                self._at = end
                return value

    def _more(self) -> bool:
        """Read on, as much again as is waiting; False at the end. Raises EngineError beyond `MAX_VALUE`."""
        waiting = self._text[self._at :]
        if len(waiting) > MAX_VALUE:
            raise EngineError(f"the file is no JSON, or has a value of more than {MAX_VALUE} characters")
        read = "" if self._ended else self._file.read(max(PIECE, len(waiting)))
        self._ended = not read
        self._text, self._at = waiting + read, 0
        return bool(read)


def _no_constant(word: str) -> Any:
    raise EngineError("the GeoJSON file holds a number that is none")
