"""How much in how much time: token buckets, and what one peer has of them. Waits for nothing itself.

A bucket is one moment (monotonic, so the same for every process of a machine): until when everything that was taken is
paid for. Several processes share it where the moment lies in memory that they share. No lock is between them, for one
that is stopped must not hold up the others: of two that take in the very same instant one may count for nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from dicom_node.addresses import whose
from dicom_node.config import RateSettings

__all__ = ["KINDS", "LONG_AGO", "AddressBuckets", "Bucket", "Moment", "Rates", "moments"]

KINDS = 4  # of rates: objects, bytes, queries, associations
LONG_AGO = -math.inf
MAX_ADDRESSES = 4096


class Moment(Protocol):
    """One number at index 0: of a list, or of memory that processes share."""

    def __getitem__(self, index: int, /) -> float: ...

    def __setitem__(self, index: int, value: float, /) -> None: ...


def moments() -> Sequence[Moment]:
    """Those of the rates of one peer that nobody shares."""
    return [[LONG_AGO] for _ in range(KINDS)]


class Bucket:
    """`rate` in a second, `burst` of them at once after a pause. Thread-safe."""

    def __init__(
        self,
        rate: float,
        burst: float,
        clock: Callable[[], float] = time.monotonic,
        paid_until: Moment | None = None,
    ) -> None:
        self._each_s, self._burst_s, self._clock = 1.0 / rate, max(burst, 1.0) / rate, clock
        self._paid_until = [LONG_AGO] if paid_until is None else paid_until
        self._guard = threading.Lock()

    def take(self, amount: float = 1.0, *, most_s: float = math.inf) -> float:
        """Take it though it may not be there yet; in how many seconds it will be. More than `most_s` is remitted."""
        with self._guard:
            now = self._clock()
            paid_until = max(self._paid_until[0], now - self._burst_s) + amount * self._each_s
            self._paid_until[0] = paid_until = min(paid_until, now + most_s)
            return max(paid_until - now, 0.0)

    def takes(self, amount: float = 1.0) -> bool:
        """Take it if it is there."""
        with self._guard:
            now = self._clock()
            paid_until = max(self._paid_until[0], now - self._burst_s) + amount * self._each_s
            if paid_until > now + 1e-9:
                return False
            self._paid_until[0] = paid_until
            return True

    def give_back(self, amount: float = 1.0) -> None:
        """It was taken for nothing."""
        with self._guard:
            self._paid_until[0] -= amount * self._each_s

    @property
    def is_full(self) -> bool:
        """Whether nothing was taken lately."""
        return self._paid_until[0] <= self._clock() - self._burst_s


class Rates:
    """What one peer may ask, all its associations together, also those of the processes that share `paid`.

    None: as much as it likes.
    """

    def __init__(
        self,
        settings: RateSettings,
        clock: Callable[[], float] = time.monotonic,
        paid: Sequence[Moment] | None = None,
    ) -> None:
        objects, data, queries, associations = moments() if paid is None else paid

        def bucket(rate: float | None, per_s: float, paid_until: Moment) -> Bucket | None:
            return None if rate is None else Bucket(rate / per_s, rate, clock, paid_until)

        self.objects = bucket(settings.objects_per_s, 1.0, objects)
        self.data = bucket(settings.bytes_per_s, 1.0, data)
        self.queries = bucket(settings.queries_per_minute, 60.0, queries)
        self.associations = bucket(settings.associations_per_minute, 60.0, associations)


class AddressBuckets:
    """A bucket for each address (`whose`) that comes; of those that nothing was taken from lately none is kept."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._guard = threading.Lock()

    def of(self, address: str) -> Bucket:
        """That address's."""
        address = whose(address)
        with self._guard:
            found = self._buckets.get(address)
            if found is None:
                if len(self._buckets) >= MAX_ADDRESSES:
                    self._shrink()
                found = self._buckets[address] = Bucket(self._per_minute / 60.0, self._per_minute, self._clock)
            self._buckets.move_to_end(address)
            return found

    def _shrink(self) -> None:
        for address in [known for known, bucket in self._buckets.items() if bucket.is_full]:
            del self._buckets[address]
        while len(self._buckets) >= MAX_ADDRESSES:  # a flood from everywhere: who came long ago is forgotten
            self._buckets.popitem(last=False)
