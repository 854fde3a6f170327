"""One decoder process (`decoder`), seen from the process that asks: one request at a time, bounded in every way.

Requests and answers are JSON on a socket pair, cells lie in a memory file that is lent with each request: no copy on
the way, no name that a crash could leave behind, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.decoder import KEPT_BYTES
from dicom_node.errors import EngineUnavailable, SeriesRejected
from dicom_node.memory_files import sealed_memory_file

__all__ = ["Cells", "Decoder", "DecoderGone", "DecoderLimits", "Frames", "readable"]

_START_S = 60.0
_LAST_WORD_S = 0.25
_MAX_PACKET = 64 * 1024
_MAX_REASON = 500

Cells = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """A request: `frames` (from 0, ascending) of the image at `path`, as (frames, rows, columns) of `dtype`."""

    path: str
    syntax: str
    name: str
    frames: tuple[int, ...]
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Of the cells."""
        return len(self.frames) * self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLimits:
    """What a request may take, far more than any sound stream does.

    Address space: `memory_bytes`, and eight times the cells it should give. Seconds of computing: `cpu_s`, and two for
    each MiB of cells. Until its answer `wall_factor` times as long: the machine may be busy.
    """

    memory_bytes: int = 2 << 30
    cpu_s: float = 30.0
    wall_factor: float = 10.0

    def memory_of(self, work: Frames) -> int:
        """Bytes of address space."""
        return self.memory_bytes + 8 * work.nbytes

    def cpu_of(self, work: Frames) -> float:
        """Seconds of computing."""
        return self.cpu_s + 2 * work.nbytes / (1 << 20)


_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class DecoderGone(Exception):
    """The process ended; the message says how. `blame`: certainly by what it decoded; `crashed`: probably so, not by
    somebody who killed it; `ready`: it had started.
    """

    def __init__(self, how: str, *, blame: bool = False, crashed: bool = False, ready: bool = True) -> None:
        super().__init__(how)
        self.blame, self.crashed, self.ready = blame, crashed or blame, ready


class Decoder:
    """One process. Used by one thread at a time."""

    def __init__(self, limits: DecoderLimits) -> None:
        self._limits = limits
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            raise EngineUnavailable(f"a decoder process cannot be started ({exc.strerror})") from exc
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "dicom_node.decoder"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # libraries write there what they think of a stream
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
            except OSError as exc:
                ours.close()
                raise EngineUnavailable(f"a decoder process cannot be started ({exc.strerror})") from exc
        self.link = ours
        self._ready, self._number = False, 0
        self._work: Frames | None = None
        self._deadline = 0.0
        self._slot: mmap.mmap | None = None

    # --- one request at a time

    def ask(self, work: Frames) -> None:
        """Hand it a request. Raises DecoderGone."""
        self._work, self._number = work, self._number + 1
        request = {
            "id": self._number,
            "path": work.path,
            "syntax": work.syntax,
            "frames": work.frames,
            "shape": work.shape,
            "dtype": work.dtype.str,
            "memory_bytes": self._limits.memory_of(work),
            "cpu_s": self._limits.cpu_of(work),
        }
        fds = self._room(work.nbytes)
        self._restart_clock()
        try:
            socket.send_fds(self.link, [json.dumps(request).encode()], fds)
        except OSError:
            raise self._gone() from None
        finally:
            for fd in fds:
                os.close(fd)

    def _restart_clock(self) -> None:
        assert self._work is not None
        allowed_s = self._limits.wall_factor * self._limits.cpu_of(self._work)
        self._deadline = time.monotonic() + allowed_s + (0.0 if self._ready else _START_S)

    def answer(self) -> Cells | None:
        """The cells, None when there is no answer yet. Raises DecoderGone, SeriesRejected: why there are none."""
        while True:
            try:
                data = self.link.recv(_MAX_PACKET, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() > self._deadline:
                    raise self._gone(f"gave no answer in {self._limits.wall_factor:g} times its time") from None
                return None
            except OSError:
                data = b""
            if not data:
                raise self._gone()
            if self._ready:
                return self._understood(data)
            self._ready = True
            self._restart_clock()

    def _understood(self, data: bytes) -> Cells:
        try:
            message = json.loads(data)
            sound = isinstance(message, Mapping) and message["id"] == self._number
        except (ValueError, KeyError, RecursionError):
            sound = False
        if not sound:
            raise self._gone("talked nonsense", blame=True)
        work, self._work = self._work, None
        slot = self._slot
        if slot is not None and len(slot) > KEPT_BYTES:  # as the process does, whatever it says
            self._slot = None
        if "why" in message:
            raise SeriesRejected(str(message["why"])[:_MAX_REASON])
        assert work is not None and slot is not None
        shape = (len(work.frames), *work.shape)
        cells = np.frombuffer(slot, work.dtype, work.nbytes // work.dtype.itemsize).reshape(shape).copy()
        return cells

    def quiet(self) -> bool:
        """Whether it has nothing to do, after a moment to finish what nobody waits for any more."""
        if self._work is None:
            return True
        try:
            readable([self.link], _LAST_WORD_S)
            return self.answer() is not None
        except SeriesRejected:
            return True
        except DecoderGone:
            return False

    # --- its memory file

    def _room(self, nbytes: int) -> list[int]:
        """Have a memory file of that size; its descriptor when it is another than before."""
        if self._slot is not None and len(self._slot) >= nbytes:
            return []
        self._slot = None  # unmapped with the last array on it
        fd = -1
        try:
            fd = sealed_memory_file("dicom-node-cells", nbytes)
            self._slot = mmap.mmap(fd, nbytes)
        except (OSError, MemoryError) as exc:
            if fd >= 0:
                os.close(fd)
            raise EngineUnavailable("there is no memory for decoded pixels") from exc
        return [fd]

    # --- its end

    def _gone(self, how: str = "", *, blame: bool = False) -> DecoderGone:
        status = self.bury(_LAST_WORD_S if not how else 0.0)
        if how:
            return DecoderGone(how, blame=blame, crashed=True, ready=self._ready)
        if status == -signal.SIGPROF:
            assert self._work is not None
            return DecoderGone(f"was not done after {self._limits.cpu_of(self._work):g} s", blame=True)
        died = f"died ({signal.strsignal(-status)})" if status < 0 else f"ended (exit status {status})"
        return DecoderGone(died, ready=self._ready, crashed=-status in _CRASHES)

    def bury(self, patience_s: float = 0.0) -> int:
        """End it for certain, after `patience_s` in which it may end by itself; its exit status. Idempotent."""
        try:
            status = self.process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(timeout=30.0)
        self.link.close()
        self._slot = None
        return status


def readable(links: Sequence[socket.socket], timeout_s: float) -> None:
    """Wait until one of them has something to say, or `timeout_s`."""
    poll = select.poll()
    for link in links:
        poll.register(link, select.POLLIN)
    poll.poll(timeout_s * 1000)
