"""Memory that processes share: anonymous files, without a name that a crash could leave behind."""

from __future__ import annotations

import fcntl
import os

__all__ = ["is_sealed", "sealed_memory_file"]


def sealed_memory_file(name: str, nbytes: int) -> int:
    """A descriptor of a new memory file of a size that nobody can change: cut while it is read, it kills the reader.

    The caller closes it. Raises OSError, and then there is none.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """Whether a received descriptor is of a file that cannot be cut. Raises OSError when it is of no memory file."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
