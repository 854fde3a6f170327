"""What a fuzz target is, and how it reads its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Input", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One door that strangers' bytes come through.

    `run` raises for an input that breaks a promise: AssertionError, or whatever the code under test let out. `seeds`
    are inputs to begin with, given the folder of the corpus where there is one.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[Path | None], Iterable[bytes]]
    longest: int = 4096  # bytes of an input
    cost: int = 1  # how many inputs of a quick target take as long as one of this


class Input:
    """An input taken apart from its beginning; at its end there are zeros, so that every input means something."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        """The next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def number(self, size: int) -> int:
        """The next `size` bytes."""
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "big")

    def rest(self) -> bytes:
        """All that is left."""
        found, self._at = self._data[self._at :], len(self._data)
        return found

    def taken(self, size: int) -> bytes:
        """At most so many bytes."""
        found = self._data[self._at : self._at + size]
        self._at += len(found)
        return found

    def __bool__(self) -> bool:
        return self._at < len(self._data)
