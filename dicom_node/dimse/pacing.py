"""A sender that is faster than it may be is read later: back-pressure on its socket, while no lock is held.

Many senders give up when they hear nothing for a minute (dcmtk's do, after their last byte left for the system's
buffers). So what is slowed down is read in small pieces from a small buffer (`transport.read_little`), and beyond the
bounds below the rate gives way: that takes more associations at a time than it has place for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from dicom_node.dimse.link import Fragments, Link
from dicom_node.dimse.rates import Bucket, Rates

__all__ = ["paced"]

OBJECT_S = 20.0  # the longest wait for an object ...
PIECE_S = 2.0  # ... and for a piece of one
PIECE = 16 * 1024


def paced(link: Link, rates: Rates, data_set: Fragments | None) -> Fragments | None:
    """The data set of one C-STORE as it may come; its next request is not read before `Link.not_before`.

    Whoever reads waits inside the data set, as for a slow line; what is waited between two requests costs no thread.
    """
    if rates.objects is not None:
        wait_s = rates.objects.take(most_s=OBJECT_S)
        link.not_before = time.monotonic() + wait_s if wait_s else 0.0
    if rates.data is None or data_set is None:
        return data_set
    return _slowed(data_set, rates.data)


def _slowed(data_set: Fragments, bucket: Bucket) -> Iterator[bytes | memoryview]:
    for fragment in data_set:
        for begin in range(0, len(fragment), PIECE):
            piece = fragment[begin : begin + PIECE]
            yield piece
            if wait_s := bucket.take(len(piece), most_s=PIECE_S):
                time.sleep(wait_s)
