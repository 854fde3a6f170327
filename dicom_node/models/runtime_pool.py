"""The runtimes of a process, shared by its local engines: which device takes a request, and what when it is broken.

Must not import torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dicom_node.breaker import Breaker
from dicom_node.errors import NodeError
from dicom_node.models.package import ModelPackage
from dicom_node.models.runtime import Answer, DeviceFault, Limits, OutOfMemory, Runtime
from dicom_node.models.wire import Array

__all__ = ["RuntimePool", "lend_runtimes", "return_runtimes"]

_LEAST_S = 1.0
_FAILURES, _REST_S = 3, 120.0  # of a device

log = logging.getLogger(__name__)


class RuntimePool:
    """The runtimes of some devices. A device that fails again and again rests: the CPU does its work meanwhile."""

    def __init__(
        self, devices: tuple[str, ...], limits: Limits, *, breaker: Callable[[], Breaker] | None = None
    ) -> None:
        self._limits = limits
        made = breaker or (lambda: Breaker(failures=_FAILURES, rest_s=_REST_S))
        self._breakers = {device: made() for device in devices}
        self.runtimes = tuple(Runtime(device, limits=limits, on_end=self._counted(device)) for device in devices)
        self._guard = threading.Lock()
        self._spare: Runtime | None = None
        self._closed = False
        self.users = 0

    def _counted(self, device: str) -> Callable[[str], None]:
        return lambda reason: self._failed(device)

    def infer(self, package: ModelPackage, array: Array, **how: Any) -> Answer:
        """`Runtime.infer` on the device that has least to do, on the CPU where the devices are resting.

        What a device cannot take for lack of memory, and what a broken one refuses, is done on the CPU at once.
        """
        runtime = self._chosen()
        if runtime is None:
            return self._on_cpu(package, array, how)
        breaker, began = self._breakers[runtime.device], time.monotonic()
        try:
            answer = runtime.infer(package, array, **how)
        except (OutOfMemory, DeviceFault) as exc:
            if isinstance(exc, OutOfMemory):  # of a faulty device its process's end tells
                self._failed(runtime.device)
            if runtime.kind == "cpu":
                raise
            log.warning("work goes to the CPU", extra={"device": runtime.device, "error": str(exc)})
            spent_s = time.monotonic() - began
            return self._on_cpu(package, array, {**how, "timeout_s": max(how["timeout_s"] - spent_s, _LEAST_S)})
        except NodeError as exc:
            if not exc.retryable:  # the package or the input is at fault: the device did answer
                breaker.succeeded()
            else:  # where the device is at fault, its process's end has told
                breaker.dropped()
            raise
        except BaseException:
            breaker.dropped()
            raise
        breaker.succeeded()
        return answer

    def load(self, package: ModelPackage, *, timeout_s: float, heartbeat: Callable[[], None]) -> None:
        """Load the package on every device that is not resting, or on the CPU when all are. Raises as `infer`."""
        for runtime in self.runtimes:
            if self._breakers[runtime.device].state.value == 0:
                try:
                    runtime.load(package, timeout_s=timeout_s, heartbeat=heartbeat)
                except DeviceFault:
                    self._cpu().load(package, timeout_s=timeout_s, heartbeat=heartbeat)

    def _chosen(self) -> Runtime | None:
        ready = sorted(self.runtimes, key=lambda runtime: runtime.calls)
        return next((runtime for runtime in ready if self._breakers[runtime.device].admits()), None)

    def _on_cpu(self, package: ModelPackage, array: Array, how: Mapping[str, Any]) -> Answer:
        return self._cpu().infer(package, array, **how)

    def _cpu(self) -> Runtime:
        for runtime in self.runtimes:
            if runtime.kind == "cpu":
                return runtime
        with self._guard:
            if self._spare is None:
                self._spare = Runtime("cpu", limits=self._limits)
                if self._closed:
                    self._spare.close()
            return self._spare

    def _failed(self, device: str) -> None:
        runtime = next((one for one in self.runtimes if one.device == device), None)
        if runtime is None or runtime.kind == "cpu":  # there is nothing else to turn to
            return
        self._breakers[device].failed()

    def facts(self) -> list[dict[str, Any]]:
        """How each device stands, for metrics: plain values."""
        with self._guard:
            spare = () if self._spare is None else (self._spare,)
        return [
            {
                "device": runtime.device,
                "restarts": dict(runtime.restarts),
                "breaker": self._breakers[runtime.device].state.value if runtime in self.runtimes else 0,
                "models": [list(model) for model in runtime.models],
                "calls": runtime.calls,
            }
            for runtime in (*self.runtimes, *spare)
        ]

    def close(self) -> None:
        """Stop every child. Idempotent."""
        with self._guard:
            self._closed = True
            spare = () if self._spare is None else (self._spare,)
        for runtime in (*self.runtimes, *spare):
            runtime.close()


# --- sharing: every local engine of a process uses the same children

_pools: dict[tuple[tuple[str, ...], Limits], RuntimePool] = {}
_pools_guard = threading.Lock()


def lend_runtimes(devices: tuple[str, ...], limits: Limits | None = None) -> RuntimePool:
    """The pool of these devices; give it back with `return_runtimes`. Starts no process yet."""
    limits = limits or Limits()
    with _pools_guard:
        pool = _pools.get((devices, limits))
        if pool is None:
            pool = _pools[devices, limits] = RuntimePool(devices, limits)
        pool.users += 1
        return pool


def return_runtimes(devices: tuple[str, ...], limits: Limits | None = None) -> None:
    """The last user's return stops the children."""
    key = devices, limits or Limits()
    with _pools_guard:
        pool = _pools.get(key)
        if pool is None:
            return
        pool.users -= 1
        if pool.users > 0:
            return
        del _pools[key]
    pool.close()
