"""Threads that write a part of a large file while whoever receives it goes on.

Without them the disk waits for the peer and the peer for the disk. They are not a ThreadPoolExecutor's: Python waits
for those when it ends, and a disk that hangs would keep the process from ending.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["MOST_WRITERS", "Writers", "Writing"]

MOST_WRITERS = 2  # of an archive: many associations keep the disk busy by themselves


class Writing:
    """One act under way on another thread."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._over = threading.Lock()
        self._over.acquire()
        self._error: Exception | None = None

    def run(self) -> None:
        """By the thread that does it."""
        try:
            self._act()
        except Exception as exc:  # noqa: BLE001 - edge: a thread; it belongs to whoever waits
            self._error = exc
        finally:
            self._over.release()

    def over(self) -> None:
        """Wait for its end. Whoever is interrupted may wait again."""
        with self._over:
            pass

    def error(self) -> Exception | None:
        """Wait for its end; what it has raised, the first time it is asked for."""
        self.over()
        error, self._error = self._error, None  # not kept: its traceback leads back here
        return error


class Writers:
    """No more than `most` threads, each there from the first time it is needed; they end with the process."""

    def __init__(self, most: int = MOST_WRITERS) -> None:
        self._free = threading.Semaphore(most)
        self._asked: queue.SimpleQueue[Writing] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._threads = self._busy = 0

    def begin(self, act: Callable[[], None]) -> Writing | None:
        """Have it done; None when nobody is free: the caller does it then."""
        if not self._free.acquire(blocking=False):
            return None
        with self._guard:
            self._busy += 1
            if self._busy > self._threads:
                try:
                    threading.Thread(target=self._run, name="archive-writer", daemon=True).start()
                except (RuntimeError, MemoryError):  # the system has no more
                    self._busy -= 1
                    self._free.release()
                    return None
                self._threads += 1
        writing = Writing(act)
        self._asked.put(writing)
        return writing

    def _run(self) -> None:
        while True:
            writing = self._asked.get()
            writing.run()
            del writing  # and with it the buffer, while it waits for the next one
            with self._guard:
                self._busy -= 1
            self._free.release()
