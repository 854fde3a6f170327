"""How a process of the node is begun, and that it ends with its parent, however that ends."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["deaf_to_interrupts", "role_environment", "tied_to"]

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def role_environment(**more: str) -> dict[str, str]:
    """For a process with a role in the node, or the recovery: that of this one, and `more`."""
    # pydantic would look through all packages that are installed for plugins of its own
    return {"PYDANTIC_DISABLE_PLUGINS": "__all__", **os.environ, **more}


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Whatever is begun here never hears SIGINT; this thread hears then what came meanwhile.

    Ctrl-C reaches every process of a terminal's group, also one that has not come to its first line yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tied_to(parent_pid: int) -> bool:
    """Let the kernel kill this process when the thread that started it ends; False: the parent has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log.warning("PR_SET_PDEATHSIG is not available; orphans are possible")
    return os.getppid() == parent_pid  # it may have ended before the call
