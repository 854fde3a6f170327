"""The work process's side of the runtime process: start it, ask it, watch it, kill it, start it again.

One `Runtime` per device, each with one child (`runtime_child`), the only process with torch in it: no catalog, no
archive, no network, only a socket to its parent. A child that hangs is killed, a child that dies is replaced on the
next request, and the child dies with this process (PR_SET_PDEATHSIG). Must not import torch.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import EngineError, EngineTimeout, EngineUnavailable, PackageError
from dicom_node.models.package import ModelPackage
from dicom_node.models.wire import receive, received_array, send, shared_array

__all__ = ["Answer", "Runtime", "RuntimePool", "lend_runtimes", "padding_value", "return_runtimes"]

log = logging.getLogger(__name__)

_POLL_S = 0.25  # heartbeats come at least this often while waiting
_STOP_S = 2.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the network said: probabilities, and how they were made. `seconds` has `load` and `forward`."""

    output: Floats
    device: str
    precision: str
    windows: int
    seconds: Mapping[str, float]


class Runtime:
    """One device's runtime process. Thread-safe: one request at a time, others wait their turn."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._turn = threading.Lock()
        # PR_SET_PDEATHSIG fires when the *thread* that started the child ends, so one thread starts them all and stays
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="runtime-starter")
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._request = 0
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._turn.locked()

    def infer(
        self,
        package: ModelPackage,
        array: Floats,
        *,
        timeout_s: float,
        heartbeat: Callable[[], None],
        threads: int = 0,
    ) -> Answer:
        """Run the package's network over `array` and return its probabilities.

        Segmentation: `array` (X, Y, Z) on the network's grid and in its value range; output (class, X, Y, Z).
        Classification: `array` (image, size, size); output (image, output). The package is loaded if it is not yet
        there, its weights' digest checked. `heartbeat` is called several times a second; what it raises ends the
        wait, not the child's work. `threads` 0 leaves torch's default.

        Raises PackageError, EngineError (NaN, out of memory: doing it again will not help), EngineTimeout (the child
        did not answer in `timeout_s`, waiting for a turn included, and was killed if it was this request it hung on),
        EngineUnavailable (it died).
        """
        deadline = time.monotonic() + timeout_s
        with self._my_turn(deadline, heartbeat):
            return self._ask(package, array, threads, deadline, heartbeat)

    def load(self, package: ModelPackage, *, timeout_s: float, heartbeat: Callable[[], None]) -> None:
        """Start the child and load the package's network, so that the first `infer` need not. Raises as `infer`."""
        deadline = time.monotonic() + timeout_s
        with self._my_turn(deadline, heartbeat):
            self._ask(package, np.zeros(1, np.float32), 0, deadline, heartbeat, task="load")

    @contextmanager
    def _my_turn(self, deadline: float, heartbeat: Callable[[], None]) -> Iterator[None]:
        while not self._turn.acquire(timeout=_POLL_S):
            heartbeat()
            if time.monotonic() >= deadline:
                raise EngineTimeout(f"the runtime on {self.device!r} was busy with other work for too long")
        try:
            yield
        finally:
            self._turn.release()

    def _ask(
        self,
        package: ModelPackage,
        array: Floats,
        threads: int,
        deadline: float,
        heartbeat: Callable[[], None],
        task: str = "",
    ) -> Answer:
        sock = self._started()
        self._request += 1
        manifest = package.manifest
        message = {
            "id": self._request,
            "task": task or manifest.task,
            "weights": str(package.weights_path.absolute()),
            "source": manifest.source.model_dump(mode="json"),
            "infer": manifest.infer.model_dump(mode="json"),
            "padding": padding_value(package),
            "shape": list(array.shape),
            "threads": threads,
        }
        fd = shared_array(array)
        try:
            send(sock, message, [fd])
        except OSError as exc:
            self._kill()
            raise EngineUnavailable("the runtime process is gone") from exc
        finally:
            os.close(fd)
        return self._answer(sock, deadline, heartbeat)

    def _answer(self, sock: socket.socket, deadline: float, heartbeat: Callable[[], None]) -> Answer:
        while True:
            heartbeat()
            if time.monotonic() >= deadline:
                self._kill()
                raise EngineTimeout(f"the runtime on {self.device!r} did not answer in time and was killed")
            try:
                received = receive(sock)
            except TimeoutError:
                continue
            except ValueError as exc:
                self._kill()
                raise EngineError(f"the runtime answered nonsense: {exc}") from exc
            if received is None:
                status = self._kill()
                log.warning("runtime process died", extra={"device": self.device, "status": status})
                raise EngineUnavailable(f"the runtime process died ({_ended(status)})")
            message, fds = received
            if message.get("id") == self._request:
                return self._understood(message, fds)
            for stale in fds:  # the answer to a request whose asker went away
                os.close(stale)

    def _understood(self, message: Mapping[str, Any], fds: Sequence[int]) -> Answer:
        if "error" in message:
            kinds: Mapping[str, type[PackageError] | type[EngineError]] = {"package": PackageError}
            raise kinds.get(str(message.get("kind")), EngineError)(str(message["error"]))
        try:
            output = received_array(fds[0], message["shape"])
            return Answer(
                output=output,
                device=str(message["device"]),
                precision=str(message["precision"]),
                windows=int(message["windows"]),
                seconds={str(stage): float(seconds) for stage, seconds in message["seconds"].items()},
            )
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            self._kill()
            raise EngineError("the runtime answered nonsense") from exc

    # --- the child

    def _started(self) -> socket.socket:
        if self._closed:
            raise EngineUnavailable("the runtime is closed")
        if self._process is not None and self._socket is not None and self._process.poll() is None:
            return self._socket
        self._kill()
        self._process, self._socket = self._starter.submit(self._start).result(timeout=30.0)
        return self._socket

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), str(os.getpid()), self.device]
            process = subprocess.Popen(
                [sys.executable, "-m", "dicom_node.models.runtime_child", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        ours.settimeout(_POLL_S)
        log.info("runtime process started", extra={"device": self.device, "child_pid": process.pid})
        return process, ours

    def _kill(self) -> int | None:
        """End the child for certain; its exit status, None when there was none."""
        process, self._process = self._process, None
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        if process is None:
            return None
        try:
            return process.wait(timeout=0.05)  # it may have ended by itself: keep its own status
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(timeout=30.0)

    def close(self) -> None:
        """Stop the child. Idempotent."""
        self._closed = True
        process, sock = self._process, self._socket
        if sock is not None:
            sock.close()  # it ends when its parent hangs up
        if process is not None:
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=30.0)
        self._process = self._socket = None
        self._starter.shutdown(wait=True)


def padding_value(package: ModelPackage) -> float:
    """What the network sees beyond the volume: `padding_hu` through the intensity mapping."""
    manifest = package.manifest
    if manifest.task == "classification":
        return 0.0
    (low, high), (a, b) = manifest.input.intensity.clip, manifest.input.intensity.to
    return a + (min(max(manifest.input.padding_hu, low), high) - low) / (high - low) * (b - a)


def _ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


# --- sharing: every local engine of a process uses the same children


@dataclass(slots=True)
class RuntimePool:
    """The runtimes of some devices, shared by the engines of one process."""

    runtimes: tuple[Runtime, ...]
    _users: int = field(default=0)

    def idle(self) -> Runtime:
        """One that is not busy, else the first: its queue is a lock."""
        return next((runtime for runtime in self.runtimes if not runtime.busy), self.runtimes[0])


_pools: dict[tuple[str, ...], RuntimePool] = {}
_pools_guard = threading.Lock()


def lend_runtimes(devices: tuple[str, ...]) -> RuntimePool:
    """The pool of these devices; give it back with `return_runtimes`. Starts no process yet."""
    with _pools_guard:
        pool = _pools.setdefault(devices, RuntimePool(tuple(Runtime(device) for device in devices)))
        pool._users += 1
        return pool


def return_runtimes(devices: tuple[str, ...]) -> None:
    """The last user's return stops the children."""
    with _pools_guard:
        pool = _pools.get(devices)
        if pool is None:
            return
        pool._users -= 1
        if pool._users > 0:
            return
        del _pools[devices]
    for runtime in pool.runtimes:
        runtime.close()
