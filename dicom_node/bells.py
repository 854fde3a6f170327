"""Bells: one process tells another that there is something to do, so that it need not wait for its next look.

A ring carries nothing and may be lost with the process that was to hear it; whoever waits looks now and then anyway.
Part of the composition root.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Bell", "new_bell"]

log = logging.getLogger(__name__)

LOOK_S = 1.0


def new_bell() -> int:
    """The descriptor of a bell, to be inherited."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Bell:
    """One end of a bell: rung by anybody, heard by one process. A descriptor of -1 is a bell nobody hears."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """Never waits, never raises."""
        if self._fd >= 0:
            with suppress(OSError):
                os.eventfd_write(self._fd, 1)

    def answer(self, wake: Callable[[], None]) -> None:
        """Call `wake`, which must be quick, after each ring, in a thread of its own until `stop`."""
        if self._fd >= 0:
            self._thread = threading.Thread(target=self._listen, args=(wake,), name="bell", daemon=True)
            self._thread.start()

    def _listen(self, wake: Callable[[], None]) -> None:
        waiting = select.poll()
        waiting.register(self._fd, select.POLLIN)
        while not self._over.is_set():
            if waiting.poll(LOOK_S * 1000):
                with suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
                wake()

    def stop(self) -> None:
        """No more `wake` after this."""
        self._over.set()
        if self._thread is not None:
            self.ring()
            self._thread.join(2 * LOOK_S)
