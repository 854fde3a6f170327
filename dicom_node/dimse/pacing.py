"""A sender that is faster than it may be is read later: back-pressure on its socket, while no lock is held."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dicom_node.dimse.link import Fragments, Link
from dicom_node.dimse.rates import Bucket, Rates

__all__ = ["paced"]

SLICE_S = 0.25


def paced(link: Link, rates: Rates, data_set: Fragments | None) -> Fragments | None:
    """The data set of one C-STORE as it may come; its next request is not read before `Link.not_before`.

    Whoever reads waits inside the data set, as for a slow line; what is waited between two requests costs no thread.
    """
    if rates.objects is not None:
        wait_s = rates.objects.take()
        link.not_before = time.monotonic() + wait_s if wait_s else 0.0
    if rates.data is None or data_set is None:
        return data_set
    return _slowed(data_set, rates.data)


def _slowed(data_set: Fragments, bucket: Bucket) -> Iterator[bytes | memoryview]:
    for piece in data_set:
        yield piece
        left = bucket.take(len(piece))
        while left > 0.0:  # in slices: other associations of the peer take from the bucket too, and all of them wait
            time.sleep(min(left, SLICE_S))
            left -= SLICE_S
