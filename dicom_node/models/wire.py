"""How the work process and the runtime process talk: JSON messages over a socket pair, arrays as memory files.

An array is an anonymous memory file (memfd) whose descriptor travels with the message: no copy, no name that a crash
could leave behind, no share of a small /dev/shm, and nothing is ever unpickled. Used by both sides; must not import
torch.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["receive", "received_array", "send", "shared_array"]

_MAX_MESSAGE = 64 * 1024
_MAX_ARRAYS = 2
_MAX_ARRAY_BYTES = 16 * 1024**3

Floats = npt.NDArray[np.float32]


def shared_array(array: Floats) -> int:
    """A descriptor of a memory file that holds `array` in C order. The caller closes it."""
    fd = os.memfd_create("dicom-node-array", os.MFD_CLOEXEC)
    os.ftruncate(fd, max(array.nbytes, 1))
    target = np.frombuffer(mmap.mmap(fd, max(array.nbytes, 1)), np.float32, array.size)
    target.reshape(array.shape)[...] = array
    return fd


def received_array(fd: int, shape: Sequence[Any]) -> Floats:
    """The array of `shape` behind a received descriptor, mapped without a copy; closes the descriptor.

    Raises ValueError when the shape is no shape or the memory file is smaller than it says.
    """
    try:
        if not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"{shape!r} is no shape")
        size = math.prod(shape)
        if size * 4 > min(os.fstat(fd).st_size, _MAX_ARRAY_BYTES):
            raise ValueError(f"the memory file is too small for shape {tuple(shape)}")
        return np.frombuffer(mmap.mmap(fd, size * 4), np.float32, size).reshape(tuple(shape))
    finally:
        os.close(fd)


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors. Raises OSError when the other side is gone."""
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors, None when the other side is gone.

    Raises TimeoutError after the socket's own time-out, ValueError for what is no message.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(sock, _MAX_MESSAGE, _MAX_ARRAYS)
    except TimeoutError:
        raise
    except OSError:
        return None
    if not data:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a message was cut short")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("a message is no object")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds
