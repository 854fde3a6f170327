"""Memory that received objects are gathered in: aligned for O_DIRECT and used again."""

from __future__ import annotations

import mmap
from collections import deque

__all__ = ["BLOCK", "BUFFER", "RecordBuffer", "RecordBuffers", "blocks"]

BLOCK = 4096  # what O_DIRECT asks of addresses, lengths and offsets
BUFFER = 1024 * 1024  # bytes of a file; of a longer one the buffer holds a part
_KEPT = 16


class RecordBuffer:
    """Room for the head of a journal record, for a file or a part of one, and for filling it up to a whole block."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BLOCK + BUFFER))
        self.file = self.memory[BLOCK:]


class RecordBuffers:
    """Buffers that are used again. Whatever was in one is in it still."""

    def __init__(self) -> None:
        self._free: deque[RecordBuffer] = deque(maxlen=_KEPT)  # one too many pushes another out

    def take(self) -> RecordBuffer:
        """One that nobody else uses."""
        try:
            return self._free.pop()
        except IndexError:
            return RecordBuffer()

    def give_back(self, buffer: RecordBuffer) -> None:
        """It may be used again; no view of it may be used any more."""
        self._free.append(buffer)


def blocks(length: int) -> int:
    """`length` filled up to whole blocks."""
    return -(-length // BLOCK) * BLOCK
