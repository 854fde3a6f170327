"""Inside the runtime process: the networks that are loaded, least recently used first, within a budget of memory.

What they take is measured: their tensors, and on top the most that a run of one of them was seen to need. Imports
torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dicom_node.models.forward import Network

__all__ = ["Loaded", "MemoryFiles", "MemoryMeter", "Resident", "is_out_of_memory", "memory_files"]

_CUDA_SHARE = 0.8  # of the device, when no budget is given
_CPU_SHARE = 0.5  # of the machine
_MEMORY_WORDS = ("allocate memory", "out of memory", "alloc_failed")  # torch, CUDA, cuDNN and cuBLAS


@dataclass(slots=True)
class Loaded:
    """A network with what its answers say of it. Bytes and seconds are measured; `users`: runs it is in now."""

    network: Network
    model: str
    version: str
    tensor_bytes: int
    run_bytes: int = 0
    batch_s: float = 0.0
    users: int = 0


MemoryFiles = tuple[int, int]


def memory_files() -> MemoryFiles:
    """Descriptors of this process's status and of what sets its peak back (-1: none), before it may open none."""
    status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return status, os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return status, -1


class MemoryMeter:
    """How much memory a run takes at its peak, beyond what was there before.

    CUDA: torch's own allocator says. CPU: the peak of the resident set, set back where the kernel allows it.
    """

    def __init__(self, device: torch.device, files: MemoryFiles) -> None:
        self._device = device
        self._status, self._refs = files

    def start(self) -> int:
        """Begin: bytes in use now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        if self._refs >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._refs, b"5", 0)  # proc(5): sets the peak back to what is resident now
        return self._kib(b"VmRSS:") * 1024

    def peak(self, base: int) -> int:
        """Bytes at the peak since `start`, beyond its `base`."""
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - base)
        # not getrusage: its peak is inherited from the process that started this one
        return max(0, self._kib(b"VmHWM:") * 1024 - base)

    def _kib(self, name: bytes) -> int:
        lines = os.pread(self._status, 8192, 0).splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


class Resident:
    """Loaded networks by their key. `budget` in bytes, 0: a share of the device's memory.

    The budget holds the tensors of all networks and the largest run among them, since one runs at a time. A network
    that exceeds it alone is kept as long as it is the last one used.
    """

    def __init__(self, device: torch.device, budget: int = 0, files: MemoryFiles | None = None) -> None:
        self._device = device
        self._automatic = _automatic_budget(device)
        self.budget = budget
        self._networks: OrderedDict[str, Loaded] = OrderedDict()
        self.meter = MemoryMeter(device, files or memory_files())

    def __len__(self) -> int:
        return len(self._networks)

    def models(self) -> list[tuple[str, str]]:
        """(id, version) of what is loaded."""
        return sorted({(loaded.model, loaded.version) for loaded in self._networks.values()})

    def get(self, key: str, load: Callable[[], Loaded]) -> Loaded:
        """The network of that key, loaded if it is not there. Out of memory while loading: again, alone."""
        loaded = self._networks.pop(key, None)
        if loaded is None:
            try:
                loaded = load()
            except (RuntimeError, MemoryError) as exc:
                if not is_out_of_memory(exc) or not self._networks:
                    raise
            if loaded is None:  # outside the handler: its traceback holds what was loaded so far
                self.evict(keep="")
                loaded = load()
        self._networks[key] = loaded
        self.trim(key)
        return loaded

    @contextmanager
    def used(self, loaded: Loaded) -> Iterator[None]:
        """While a run is in it: not evicted, and measured."""
        base = self.meter.start()
        loaded.users += 1
        try:
            yield
        finally:
            loaded.users -= 1
            loaded.run_bytes = max(loaded.run_bytes, self.meter.peak(base))

    def used_bytes(self) -> int:
        """What counts against the budget."""
        networks = self._networks.values()
        largest = max((loaded.run_bytes for loaded in networks), default=0)
        return sum(loaded.tensor_bytes for loaded in networks) + largest

    def trim(self, keep: str) -> None:
        """Drop the least recently used until the rest is within the budget; `keep` and what runs now stay."""
        budget = self.budget or self._automatic
        while self.used_bytes() > budget:
            victim = next((key for key, one in self._networks.items() if key != keep and not one.users), None)
            if victim is None:
                return
            del self._networks[victim]
            self._release()

    def evict(self, keep: str) -> int:
        """Drop everything but `keep` and what runs now; how many that were."""
        victims = [key for key, one in self._networks.items() if key != keep and not one.users]
        for key in victims:
            del self._networks[key]
        self._release()
        return len(victims)

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether a device or the machine had no memory left: torch says it in several ways."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(exc).lower()
    return isinstance(exc, RuntimeError) and any(word in text for word in _MEMORY_WORDS)


def _automatic_budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1] * _CUDA_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE)
