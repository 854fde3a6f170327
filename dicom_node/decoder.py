"""Pixel data that is not native through pydicom's decoders, and the process of its own in which that happens.

`python -m dicom_node.decoder`: answers the requests of `decoding` on the socket that is its standard input until the
other side is gone. Decoders are C, C++ and Rust fed with bytes from anywhere: here a stream that crashes one, asks for
absurd memory or never ends costs this process only. The kernel holds the bounds, since a decoder may keep the GIL.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.errors import InvalidDicomError
from pydicom.filereader import dcmread
from pydicom.pixels.utils import iter_pixels

from dicom_node.errors import SeriesRejected

__all__ = ["CELLS_KEPT", "KEPT_BYTES", "UNREADABLE", "decoded_planes"]

# not native for us, but their cells are kept bit for bit
CELLS_KEPT = (uids.RLELossless, uids.DeflatedExplicitVRLittleEndian, uids.ExplicitVRBigEndian)
# What pydicom and its decoder plug-ins raise on bytes that are not what the header says.
UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, InvalidDicomError, LookupError, MemoryError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError, struct.error, zlib.error),
)

KEPT_BYTES = 32 * 1024**2  # a larger memory file is not kept for the next request, on neither side
_FIRST_TO_GO = "800"
_MAX_PACKET = 64 * 1024
_MAX_MEMORY = 16 * 1024**3  # what a request may allow itself


def decoded_planes(
    path: str, transfer_syntax_uid: str, frames: Sequence[int], shape: tuple[int, int], dtype: np.dtype[Any]
) -> Iterator[npt.NDArray[Any]]:
    """The cells of these frames (from 0, ascending) of the image at `path`, one by one: `shape`, `dtype`.

    Raises SeriesRejected when they cannot be decoded or are not of that shape.
    """
    syntax = uids.UID(transfer_syntax_uid)
    try:
        # pydicom reads a deflated data set only as a whole; `stored_values` has bounded what it inflates to
        source = dcmread(path) if syntax == uids.DeflatedExplicitVRLittleEndian else path
        # pydicom would shift out the upper bits, where the value may lie: `stored_values` knows High Bit
        kept: dict[str, Any] = {"correct_unused_bits": False} if syntax in CELLS_KEPT else {}
        found = iter_pixels(source, indices=list(frames), raw=True, **kept)
        for _ in frames:
            plane = next(found, None)
            if plane is None:
                raise SeriesRejected(f"pixel data ({syntax.name}) has fewer frames than the image says")
            if plane.shape != shape or plane.dtype.kind not in "iu":
                raise SeriesRejected(f"decoded pixel data has shape {plane.shape}, the header says {shape}")
            yield plane.astype(dtype, copy=False)
    except BaseException as exc:  # a decoder written in Rust panics past Exception
        if not isinstance(exc, UNREADABLE) and type(exc).__name__ != "PanicException":
            raise
        hint = "; a decoder for it is not installed" if "missing dependencies" in str(exc) else ""
        raise SeriesRejected(f"pixel data ({syntax.name}) cannot be decoded ({type(exc).__name__}){hint}") from exc


# --- the process


def main() -> int:
    """Serve until the asking side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the asking side decides
    warnings.simplefilter("ignore")  # of oddities in headers, which were judged before
    with contextlib.suppress(OSError):  # where memory runs out, no process of the node that holds more shall go
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes to memory that was lent to it, and nowhere else
    with socket.socket(fileno=0) as link:
        link.send(b"{}")  # ready
        slot: mmap.mmap | None = None
        while True:
            data, fds, _, _ = socket.recv_fds(link, _MAX_PACKET, 1)
            if not data:
                return 0
            for fd in fds:  # another memory file from now on
                slot = mmap.mmap(fd, 0)
                os.close(fd)
            assert slot is not None
            answer = _answer(json.loads(data), slot)
            if len(slot) > KEPT_BYTES:
                slot = None
            link.send(json.dumps(answer).encode())


def _answer(request: Mapping[str, Any], slot: mmap.mmap) -> dict[str, Any]:
    try:
        _bound(int(request["memory_bytes"]), float(request["cpu_s"]))
        shape, dtype = tuple(request["shape"]), np.dtype(request["dtype"])
        count = len(request["frames"]) * shape[0] * shape[1]
        cells = np.frombuffer(slot, dtype, count).reshape(-1, *shape)
        planes = decoded_planes(request["path"], request["syntax"], request["frames"], shape, dtype)
        for k, plane in enumerate(planes):
            cells[k] = plane
        return {"id": request["id"]}
    except SeriesRejected as exc:
        return {"id": request["id"], "why": exc.reason}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _bound(memory_bytes: int, cpu_s: float) -> None:
    """No more memory, and an end by the kernel (SIGPROF) when so much computing was not enough."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _MAX_MEMORY if hard == resource.RLIM_INFINITY else min(_MAX_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(memory_bytes, most), most))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


if __name__ == "__main__":
    sys.exit(main())
