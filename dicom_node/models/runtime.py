"""The work process's side of the runtime process: start it, ask it, watch it, start it again.

One `Runtime` per device, each with one child (`runtime_child`), the only process with torch in it: no catalog, no
archive, no network, only a socket to its parent. A child that hangs is killed, a child that dies is replaced on the
next request, and the child dies with this process (PR_SET_PDEATHSIG). Must not import torch.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicom_node.errors import EngineError, EngineTimeout, EngineUnavailable, PackageError
from dicom_node.model import Priority
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.package import ModelPackage
from dicom_node.models.runtime_link import POLL_S, Call, Child, DeviceFault, Limits
from dicom_node.models.trust import require_trusted
from dicom_node.models.wire import Array, received_array

__all__ = ["Answer", "DeviceFault", "Limits", "OutOfMemory", "Runtime", "child_environment"]

log = logging.getLogger(__name__)


_UNREADABLE_KEPT = 64


class OutOfMemory(EngineError):
    """The device has not enough memory for this input, even for one window at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the runtime answered and how it was made. `outputs`: classes of the network. `seconds` by stage.

    `together`: requests that went through the network in the same batches.
    """

    output: Array
    device: str
    precision: str
    windows: int
    outputs: int
    seconds: Mapping[str, float]
    together: int = 1


class Runtime:
    """One device's runtime process. Thread-safe: several requests at a time, the more urgent ones first.

    `on_end(reason)`: told each time a child ended that was not closed (`Child`).
    """

    def __init__(
        self, device: str, *, limits: Limits | None = None, on_end: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.device = device
        self.restarts: Counter[str] = Counter()
        self._limits = limits or Limits()
        self._on_end = on_end
        self._guard = threading.Lock()
        # PR_SET_PDEATHSIG fires when the *thread* that started the child ends, so one thread starts them all and stays
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="runtime-starter")
        self._child: Child | None = None
        self._kind = ""
        self._numbers = itertools.count(1)
        self._closed = False
        self._unreadable: set[str] = set()  # what a new child did not help with

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when there is none."""
        child = self._child
        return child.pid if child is not None else None

    @property
    def calls(self) -> int:
        """Requests under way."""
        child = self._child
        return child.calls if child is not None else 0

    @property
    def working(self) -> bool:
        """Whether the child said that it works on a request."""
        child = self._child
        return child is not None and bool(child.serving)

    @property
    def kind(self) -> str:
        """cpu or cuda; "" as long as no child said it."""
        child = self._child
        if child is not None and child.kind:
            self._kind = child.kind
        return "cpu" if self.device.startswith("cpu") else self._kind

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """(id, version) of the packages whose networks are loaded."""
        child = self._child
        return child.models if child is not None and child.alive else ()

    def infer(
        self,
        package: ModelPackage,
        array: Array,
        *,
        job: Mapping[str, Any],
        timeout_s: float,
        heartbeat: Callable[[], None],
        threads: int = 0,
        priority: Priority = Priority.ROUTINE,
        expect: int = 0,
        alone: bool = False,
        wait_s: float | None = None,
    ) -> Answer:
        """Run the package's network over `array` as `job` says and return its output.

        Segmentation: see `volume.segment_volume` for `array`, `job` and output. Classification: `array` (image, size,
        size); output (image, output). The package is loaded if it is not yet there, its weights' digest checked, its
        network tried once. `heartbeat` is called several times a second; when it raises, the child stops this work
        between two batches of windows. `threads` 0 leaves torch's default. `expect`: how many other requests for this
        network are about to come, which radiographs wait a few milliseconds for; `alone`: do not join it with any.

        Raises PackageError, EngineError (NaN: doing it again will not help), OutOfMemory, EngineTimeout (no answer
        after `timeout_s` of work on it), EngineCrashed (the child died or hung on this), EngineUnavailable (it died
        or hung on something else, or was busy with others' work for `wait_s`, which is `timeout_s` unless given),
        DeviceFault.
        """
        require_trusted(package, self._limits.trusted_code)
        message = self._message(package, array, package.manifest.task)
        message |= {"job": job, "threads": threads, "rank": priority.rank}
        return self._ask(message | {"expect": expect, "alone": alone}, array, timeout_s, heartbeat, wait_s)

    def load(self, package: ModelPackage, *, timeout_s: float, heartbeat: Callable[[], None]) -> None:
        """Start the child, load the package's network and try it, so that the first `infer` need not.

        Raises as `infer`.
        """
        require_trusted(package, self._limits.trusted_code)
        array = np.zeros(1, np.float32)
        self._ask(self._message(package, array, "load"), array, timeout_s, heartbeat)

    def _message(self, package: ModelPackage, array: Array, task: str) -> dict[str, Any]:
        manifest = package.manifest
        return {
            "task": task,
            "task_of_model": manifest.task,
            "model": manifest.id,
            "version": manifest.version,
            "weights": str(package.weights_path.absolute()),
            "source": manifest.source.model_dump(mode="json"),
            "infer": manifest.infer.model_dump(mode="json"),
            "expects": _expected(package),
            "job": {},
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "threads": 0,
            "rank": Priority.ROUTINE.rank,
            "memory": self._limits.memory_bytes,
        }

    def _ask(
        self,
        message: Mapping[str, Any],
        array: Array,
        timeout_s: float,
        heartbeat: Callable[[], None],
        wait_s: float | None = None,
    ) -> Answer:
        child = self._started()
        call = child.ask({**message, "id": next(self._numbers)}, array)
        try:
            self._wait(child, call, timeout_s, timeout_s if wait_s is None else wait_s, heartbeat)
        except BaseException:
            child.leave(call)
            raise
        if call.failure is not None:
            raise call.failure
        assert call.answer is not None
        return self._understood(child, *call.answer)

    def _wait(self, child: Child, call: Call, timeout_s: float, wait_s: float, heartbeat: Callable[[], None]) -> None:
        worked_s = waited_s = 0.0
        last = time.monotonic()
        while not call.done.is_set():
            heartbeat()
            step, last = time.monotonic() - last, time.monotonic()
            if call.identity in child.serving:
                worked_s += step
            else:
                waited_s += step
            if worked_s >= timeout_s:
                raise EngineTimeout(f"the runtime on {self.device!r} worked on it for {timeout_s:g} s without an end")
            if waited_s >= wait_s:
                raise EngineUnavailable(f"the runtime on {self.device!r} was busy with other work for {wait_s:g} s")
            call.done.wait(min(POLL_S, timeout_s - worked_s, wait_s - waited_s))

    def _understood(self, child: Child, message: Mapping[str, Any], fds: Sequence[int]) -> Answer:
        if "error" in message:
            kind, error = message.get("kind"), str(message["error"])
            if kind == "device":  # a context that failed once answers nothing any more
                child.end("device")
            if kind == "unreadable" and self._may_be_stale(error) and not child.calls:
                child.end("stale")
            kinds: Mapping[Any, Callable[[str], Exception]] = {
                "package": PackageError,
                "unreadable": PackageError,
                "memory": OutOfMemory,
                "device": DeviceFault,
                "cancelled": EngineUnavailable,
            }
            raise kinds.get(kind, EngineError)(error)
        try:
            output = received_array(fds[0], message["shape"], message["dtype"])
            return Answer(
                output=output,
                device=str(message["device"]),
                precision=str(message["precision"]),
                windows=int(message["windows"]),
                outputs=int(message["outputs"]),
                seconds={str(stage): float(seconds) for stage, seconds in message["seconds"].items()},
                together=int(message.get("together", 1)),
            )
        except (KeyError, IndexError, TypeError, ValueError, OSError) as exc:
            child.end("nonsense")
            raise EngineError("the runtime answered nonsense") from exc

    def _may_be_stale(self, error: str) -> bool:
        """What a child may read was decided when it started, so a newer folder is not seen: worth one new child."""
        new = error not in self._unreadable
        if len(self._unreadable) < _UNREADABLE_KEPT:
            self._unreadable.add(error)
            return new
        return False

    # --- the child

    def _started(self) -> Child:
        with self._guard:
            if self._closed:
                raise EngineUnavailable("the runtime is closed")
            if self._child is None or not self._child.alive:
                self._child = self._starter.submit(self._start).result(timeout=30.0)
            return self._child

    def _start(self) -> Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), str(os.getpid()), self.device, self._limits.models_dir]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dicom_node.models.runtime_child", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=child_environment(),
            )
        log.info("runtime process started", extra={"device": self.device, "child_pid": process.pid})
        return Child(process, ours, self.device, self._limits, self._ended)

    def _ended(self, reason: str) -> None:
        self.restarts[reason] += 1
        self._on_end(reason)

    def close(self) -> None:
        """Stop the child. Idempotent."""
        with self._guard:
            self._closed = True
            child = self._child
        if child is not None:
            child.end("closed")
        self._starter.shutdown(wait=True)


def child_environment() -> dict[str, str]:
    """What the child is started with: no thread before `sandbox`, and large pages for its large arrays.

    Without these the system hands out a network's activations 4 KiB at a time (measured: 12 % of a forward pass).
    """
    tunables = [one for one in (os.environ.get("GLIBC_TUNABLES", ""), "glibc.malloc.hugetlb=1") if one]
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "GLIBC_TUNABLES": ":".join(tunables)}


def _expected(package: ModelPackage) -> dict[str, int]:
    """What the network must be able to say, and on what: for its self-test."""
    manifest = package.manifest
    if isinstance(manifest, SegmentationManifest):
        number = manifest.output.decide != "argmax"  # one output, no class of its own for the background
        return {"outputs": 1 if number else max(label.index for label in manifest.output.labels) + 1}
    used = [index for finding in manifest.output.findings for index in finding.index]
    return {"outputs": max(used, default=0) + 1, "size": manifest.input.size}
