"""A child process ends with its parent, however that ends."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

__all__ = ["tied_to"]

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def tied_to(parent_pid: int) -> bool:
    """Let the kernel kill this process when the thread that started it ends; False: the parent has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log.warning("PR_SET_PDEATHSIG is not available; orphans are possible")
    return os.getppid() == parent_pid  # it may have ended before the call
