"""What several receiver processes know of each other: numbers in memory they share, one row for each.

With it one `max_associations`, the node's and each peer's, and one rate of a peer hold for all of them, and connections
go to whoever has fewest. A row is written by its receiver only, and by the supervisor when that receiver is dead; what
a peer's rates are kept in is written by all. There is no lock: a receiver that is stopped in the middle of anything
must not hold up the others. Part of the composition root.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from dicom_node.dimse.rates import KINDS, LONG_AGO, Moment

__all__ = ["Places", "new_places"]

_COLUMNS = 2  # associations, connections in hand; then the associations of each peer
_NOBODY = 0xFFFFFFFF  # connections of a receiver that does not run: none is left to it
_BYTES = 4
_MOMENT_BYTES = 8


def new_places(receivers: int, peers: int = 0) -> int:
    """A descriptor of such memory for so many receivers, none of which runs yet; to be inherited."""
    fd = os.memfd_create("dicom-node-places", os.MFD_CLOEXEC)
    os.ftruncate(fd, peers * KINDS * _MOMENT_BYTES + receivers * (_COLUMNS + peers) * _BYTES)
    for number in range(receivers):
        Places(fd, number, peers).leave()
    for number in range(peers):
        for moment in Places(fd, 0, peers).paid(number):
            moment[0] = LONG_AGO
    return fd


class Places:
    """The row of receiver `number` (from 0) and a look at the others' (`dimse.serving.Neighbours`).

    `peers`: how many are configured, the same for all that share the memory.
    """

    def __init__(self, fd: int, number: int, peers: int = 0) -> None:
        memory = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
        begin = peers * KINDS * _MOMENT_BYTES
        self._moments = memory[:begin].cast("d")  # written as whole words, unlike `struct.pack_into`
        self._cells = memory[begin:].cast("I")
        self._columns, self._peers = _COLUMNS + peers, peers
        self._row = number * self._columns

    def established(self, mine: int) -> int:
        """See `dimse.serving.Neighbours.established`."""
        self._cells[self._row] = mine
        return sum(self._cells[:: self._columns].tolist()) - mine

    def of_peer(self, number: int, mine: int) -> int:
        """See `dimse.serving.Neighbours.of_peer`."""
        self._cells[self._row + _COLUMNS + number] = mine
        return sum(self._cells[_COLUMNS + number :: self._columns].tolist()) - mine

    def paid(self, number: int) -> Sequence[Moment]:
        """See `dimse.serving.Neighbours.paid`."""
        begin = number * KINDS
        return [self._moments[place : place + 1] for place in range(begin, begin + KINDS)]

    def is_busier(self, connections: int) -> bool:
        """See `dimse.serving.Neighbours.is_busier`."""
        self._cells[self._row + 1] = connections
        return min(self._cells[1 :: self._columns].tolist()) < connections

    def leave(self) -> None:
        """This receiver does not run: what it had is free for the others."""
        self._cells[self._row], self._cells[self._row + 1] = 0, _NOBODY
        for number in range(self._peers):
            self._cells[self._row + _COLUMNS + number] = 0
