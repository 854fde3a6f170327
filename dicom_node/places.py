"""What several receiver processes know of each other: numbers in memory they share, one row for each.

With it one `max_associations` holds for all of them, and connections go to whoever has fewest. A row is written by its
receiver only, and by the supervisor when that receiver is dead. There is no lock: a receiver that is stopped in the
middle of anything must not hold up the others. Part of the composition root.
"""

from __future__ import annotations

import mmap
import os

__all__ = ["Places", "new_places"]

_COLUMNS = 2  # associations, connections in hand
_NOBODY = 0xFFFFFFFF  # connections of a receiver that does not run: none is left to it
_BYTES = 4


def new_places(receivers: int) -> int:
    """A descriptor of such memory for so many receivers, none of which runs yet; to be inherited."""
    fd = os.memfd_create("dicom-node-places", os.MFD_CLOEXEC)
    os.ftruncate(fd, receivers * _COLUMNS * _BYTES)
    for number in range(receivers):
        Places(fd, number).leave()
    return fd


class Places:
    """The row of receiver `number` (from 0) and a look at the others' (`dimse.serving.Neighbours`)."""

    def __init__(self, fd: int, number: int) -> None:
        memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self._cells = memoryview(memory).cast("I")  # written as whole words, unlike `struct.pack_into`
        self._row = number * _COLUMNS

    def established(self, mine: int) -> int:
        """See `dimse.serving.Neighbours.established`."""
        self._cells[self._row] = mine
        return sum(self._cells[::_COLUMNS].tolist()) - mine

    def is_busier(self, connections: int) -> bool:
        """See `dimse.serving.Neighbours.is_busier`."""
        self._cells[self._row + 1] = connections
        return min(self._cells[1::_COLUMNS].tolist()) < connections

    def leave(self) -> None:
        """This receiver does not run: what it had is free for the others."""
        self._cells[self._row], self._cells[self._row + 1] = 0, _NOBODY
