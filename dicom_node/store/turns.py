"""Whose turn it is to write to the catalog: one lock for every process, had within a bound, and starving nobody.

`flock` may be waited for without a bound or not at all; the bound needs polling, and who polls loses against who comes
straight back. So those that wait say so (a shared lock on a second file), and who comes back lets them go first.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

from dicom_node.errors import CatalogBusy

__all__ = ["Turns"]

FIRST_PAUSE_S = 0.0002
LONGEST_PAUSE_S = 0.002
BACK_AGAIN_S = 0.01  # who wrote within this time lets others go first ...
GIVE_WAY_S = 0.02  # ... for so long


class Turns:
    """One waiter's view of the lock at `path`, for one thread at a time: flock belongs to the open file.

    Threads of one process that may want the lock at the same time need one each.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._wanted_fd = os.open(path.with_suffix(".wanted"), flags, 0o600)
        self._wait_s = wait_s
        self._had_at = float("-inf")

    def taken(self) -> AbstractContextManager[object]:
        """Hold the lock for the block. Raises CatalogBusy when it is not had in time."""
        return self

    def __enter__(self) -> None:
        if time.monotonic() - self._had_at < BACK_AGAIN_S:
            self._give_way()
        if not _try(self._fd, fcntl.LOCK_EX):
            self._wait()

    def __exit__(self, *failure: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._had_at = time.monotonic()

    def _give_way(self) -> None:
        """Wait a moment while somebody else waits for a turn."""
        until = time.monotonic() + GIVE_WAY_S
        while not _try(self._wanted_fd, fcntl.LOCK_EX):
            if time.monotonic() >= until:
                return
            time.sleep(FIRST_PAUSE_S)
        fcntl.flock(self._wanted_fd, fcntl.LOCK_UN)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._wait_s
        pause = FIRST_PAUSE_S
        _try(self._wanted_fd, fcntl.LOCK_SH)
        try:
            while not _try(self._fd, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise CatalogBusy(f"the catalog lock was not had in {self._wait_s:g} s; another process holds it")
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_PAUSE_S)
        finally:
            fcntl.flock(self._wanted_fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._fd)
        os.close(self._wanted_fd)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
