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

from dicom_node.memory_files import is_sealed, sealed_memory_file

__all__ = ["receive", "received_array", "send", "shared_array"]

_MAX_PACKET = 64 * 1024
_MAX_MESSAGE = 16 * 1024**2  # what does not fit into a packet travels as a memory file, the first of the descriptors
_MAX_FDS = 3
_MAX_ARRAY_BYTES = 16 * 1024**3

Array = npt.NDArray[np.float32] | npt.NDArray[np.int16] | npt.NDArray[np.uint8]
_TYPES = ("float32", "int16", "uint8")


def shared_array(array: Array) -> int:
    """A descriptor of a memory file that holds `array` in C order. The caller closes it."""
    fd = sealed_memory_file("dicom-node-array", max(array.nbytes, 1))
    target = np.frombuffer(mmap.mmap(fd, max(array.nbytes, 1)), array.dtype, array.size)
    target.reshape(array.shape)[...] = array
    return fd


def received_array(fd: int, shape: Sequence[Any], dtype: Any = "float32") -> Array:
    """The array of `shape` and `dtype` (float32, int16, uint8) behind a received descriptor, which is closed.

    Mapped, not copied.

    Raises ValueError when shape or type are none or the memory file is smaller than it says, OSError when it is none.
    """
    try:
        if not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"{shape!r} is no shape")
        if dtype not in _TYPES:
            raise ValueError(f"{dtype!r} is no type of an array")
        if not is_sealed(fd):
            raise ValueError("the memory file could be cut while it is read")  # which would kill the reader
        size, each = math.prod(shape), np.dtype(dtype).itemsize
        if size * each > min(os.fstat(fd).st_size, _MAX_ARRAY_BYTES):
            raise ValueError(f"the memory file is too small for shape {tuple(shape)}")
        array: Array = np.frombuffer(mmap.mmap(fd, size * each), dtype, size).reshape(tuple(shape))
        return array
    finally:
        os.close(fd)


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors. Raises OSError when the other side is gone."""
    data = json.dumps(message).encode()
    if len(data) <= _MAX_PACKET:
        socket.send_fds(sock, [data], list(fds))
        return
    fd = shared_array(np.frombuffer(data, np.uint8))
    try:
        socket.send_fds(sock, [str(len(data)).encode()], [fd, *fds])
    finally:
        os.close(fd)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors, None when the other side is gone.

    Raises TimeoutError after the socket's own time-out, ValueError for what is no message.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(sock, _MAX_PACKET, _MAX_FDS)
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
        if isinstance(message, int) and 0 < message <= _MAX_MESSAGE and fds:
            message = json.loads(received_array(fds.pop(0), [message], "uint8").tobytes())
        if not isinstance(message, dict):
            raise ValueError("a message is no object")
    except (ValueError, RecursionError) as exc:
        for fd in fds:
            os.close(fd)
        raise ValueError(str(exc)) from exc
    return message, fds
