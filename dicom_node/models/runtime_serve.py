"""Inside the runtime process: one request after the other, most urgent first, windows the unit of interruption.

`forward.run` calls `pulse` between batches of windows. There what came in meanwhile is looked at: a request that is
strictly more urgent is served at once, in the middle of the other, which then goes on; a cancelled one stops. The
same moments tell the parent that the process lives. Radiographs for the same network that wait together go through it
together. Imports torch.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.forward import Done, load_network, run
from dicom_node.models.resident import Loaded, MemoryFiles, Resident, is_out_of_memory
from dicom_node.models.runtime_intake import Intake, Request
from dicom_node.models.sandbox import require_confined
from dicom_node.models.warmup import self_test
from dicom_node.models.wire import Array, received_array, shared_array

__all__ = ["Server"]

_TELL_S = 0.5  # progress is told at most this often
_PATIENCE = (
    20  # how many times longer than its self-test a batch may take: other load, colder caches, a GPU's 8 windows
)
_JOIN_S = 0.008  # how long a radiograph waits for others that were announced
_JOIN_IMAGES = 64
_BATCHES_KEPT = 256

Answer = tuple[dict[str, Any], Array | None]


class _Cancelled(Exception):
    """Nobody waits any more for what is being worked on."""


class _Fault(Exception):
    """The device, not the request, is at fault."""


@dataclass(slots=True)
class _Turn:
    """What is being worked on: several requests only when they went together.

    `lost_s`: spent on more urgent ones. `patience_s`: a batch of its network may take so long.
    """

    ids: list[int]
    rank: int
    stage: str = "forward"
    lost_s: float = 0.0
    patience_s: float = 0.0


class Server:
    """Serves the requests of an `Intake` on one device."""

    def __init__(self, intake: Intake, device: torch.device, fault: str = "", files: MemoryFiles | None = None) -> None:
        """`fault`: why the device cannot be used at all; every request is then answered with it."""
        self._intake = intake
        self._device = device
        self._fault = fault
        self._resident = Resident(torch.device("cpu") if fault else device, files=files)
        self._batches: OrderedDict[str, int] = OrderedDict()  # what fitted, where the first choice did not
        self._turns: list[_Turn] = []
        self._told = 0.0
        self._threads = torch.get_num_threads()
        self._behind: torch.cuda.Event | None = None

    def serve(self) -> None:
        """Until the parent hangs up, which is raised as HungUp."""
        while True:
            self._intake.drain(0.0 if len(self._intake) else None)
            request = self._intake.pop()
            if request is not None:
                self._serve(request)

    def _serve(self, first: Request) -> None:
        requests = self._together(first)
        turn = _Turn([request.identity for request in requests], min(request.rank for request in requests))
        self._turns.append(turn)
        self._tell()
        try:
            answers = self._answers(requests)
        finally:
            self._turns.pop()
        for request, (answer, array) in zip(requests, answers, strict=True):
            try:
                fds = [] if array is None else [shared_array(array)]
            except OSError as exc:
                fds, answer = [], {"kind": "memory", "error": f"no memory for the answer: {exc.strerror}"}
            self._intake.answer({"id": request.identity, "loaded": self._resident.models(), **answer}, fds)
        if self._turns:  # the one that was interrupted goes on
            self._tell()

    # --- signs of life, interruption

    def _tell(self) -> None:
        self._told = time.monotonic()
        turn = self._turns[-1]
        self._intake.answer({"serving": turn.ids, "stage": turn.stage, "patience": turn.patience_s})

    def _enter(self, stage: str) -> None:
        self._turns[-1].stage = stage
        self._tell()

    def _pulse(self) -> None:
        """Between batches: let more urgent work go first, stop what nobody waits for, say that work goes on.

        Raises _Cancelled, HungUp.
        """
        self._keep_up()
        self._intake.drain()
        turn = self._turns[-1]
        if all(self._intake.is_cancelled(identity) for identity in turn.ids):
            raise _Cancelled
        while (urgent := self._intake.pop(before_rank=turn.rank)) is not None:
            began = time.perf_counter()
            with torch.inference_mode(False):  # what is loaded meanwhile is no tensor of this run
                self._serve(urgent)
            turn.lost_s += time.perf_counter() - began
        if time.monotonic() - self._told >= _TELL_S:
            self._tell()

    def _keep_up(self) -> None:
        """Wait for the batch before the last: a CUDA device is handed work long before it has done it."""
        if self._device.type != "cuda" or self._fault:
            return
        last, self._behind = self._behind, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._behind.record(torch.cuda.current_stream(self._device))
        if last is not None:
            last.synchronize()

    # --- radiographs of several studies in one batch

    def _together(self, first: Request) -> list[Request]:
        """`first` and what can go through the same network with it; waits for what the parent says is on its way."""
        key = _joint_key(first)
        if not key:
            return [first]
        found, images = [first], _images(first)
        expected = int(first.message.get("expect", 0))
        deadline = time.monotonic() + _JOIN_S
        while images < _JOIN_IMAGES:
            room = _JOIN_IMAGES - images
            more = self._intake.take(lambda other: _joint_key(other) == key and _images(other) <= room, 1)  # noqa: B023
            if more:
                found += more
                images += _images(more[0])
                continue
            left = deadline - time.monotonic()
            if len(found) > expected or left <= 0:
                break
            self._intake.drain(left)
        return found

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            arrays = [_array(request) for request in requests]
            joined = torch.cat(arrays) if len(arrays) > 1 else None
        except (MemoryError, OSError, RuntimeError) as exc:
            refusal = {"kind": "memory", "error": f"no memory for the input: {type(exc).__name__}"}
            return [(refusal, None)] * len(requests)
        if joined is not None:
            answer, output = self._answer(requests[0].message, joined, requests)
            if output is not None:
                ends = np.cumsum([len(array) for array in arrays])
                parts: list[Any] = np.split(output, ends[:-1])
                return [(_of_part(answer, part, len(requests)), part) for part in parts]
            if answer["kind"] == "cancelled":
                return [(answer, None)] * len(requests)
        # alone, or something is wrong with one of them: the others must not suffer for it
        return [
            self._answer(request.message, array, [request]) for request, array in zip(requests, arrays, strict=True)
        ]

    # --- one run

    def _answer(self, message: Mapping[str, Any], array: torch.Tensor, requests: Sequence[Request]) -> Answer:
        """What becomes of it, whatever goes wrong: an answer, not an end."""
        try:
            return self._run(message, array, min(request.arrived for request in requests))
        except _Cancelled:
            return {"kind": "cancelled", "error": "cancelled"}, None
        except _Fault as exc:
            return {"kind": "device", "error": str(exc)}, None
        except PackageError as exc:
            kind = "unreadable" if isinstance(exc.__cause__, PermissionError) else "package"
            return {"kind": kind, "error": str(exc)}, None
        except EngineError as exc:
            return {"kind": "engine", "error": str(exc)}, None
        except ImportError as exc:  # some networks of MONAI need more than MONAI itself installs
            return {"kind": "package", "error": f"the network needs a module: {exc.name or exc}"}, None
        except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as exc:
            # torch and the network speak through these; their text is about shapes and names, not patients
            kind = "memory" if is_out_of_memory(exc) else "device" if _is_device_fault(exc) else "engine"
            return {"kind": kind, "error": f"{type(exc).__name__}: {str(exc)[:500]}"}, None
        except Exception as exc:  # noqa: BLE001 - edge: the runtime's loop; a network that asserts must not end the others
            return {"kind": "engine", "error": f"{type(exc).__name__}: {_last_line(exc)}"}, None

    def _run(self, message: Mapping[str, Any], array: torch.Tensor, arrived: float) -> Answer:
        if self._fault:
            raise _Fault(self._fault)
        turn = self._turns[-1]
        self._resident.budget = int(message.get("memory", 0))
        before = torch.get_num_threads()
        torch.set_num_threads(message["threads"] or self._threads)
        try:
            waited, began = time.monotonic() - arrived, time.perf_counter()
            key = _network_key(message)
            loaded = self._resident.get(key, lambda: self._load(message))
            ready = time.perf_counter()
            turn.patience_s = _PATIENCE * loaded.batch_s * 2 ** len(message["infer"].get("mirror", ()))
            self._enter("forward")
            done = self._forward(key, loaded, message, array)
            self._resident.trim(key)
        finally:
            torch.set_num_threads(before)
        seconds = {"wait": waited + turn.lost_s, "load": ready - began, **done.seconds}
        if "forward" in seconds:
            seconds["forward"] = max(0.0, seconds["forward"] - turn.lost_s)
        answer = {
            "shape": list(done.output.shape),
            "dtype": str(done.output.dtype),
            "device": str(self._device),
            "precision": loaded.network.precision,
            "windows": done.windows,
            "outputs": done.outputs,
            "seconds": seconds,
        }
        return answer, done.output

    def _load(self, message: Mapping[str, Any]) -> Loaded:
        source, infer = message["source"], message["infer"]
        self._enter("load")
        require_confined(source["format"])
        network = load_network(message["weights"], source, infer, self._device)
        batch_s = 0.0
        if message.get("expects"):
            batch_s = self_test(network, message["task_of_model"], infer, message["expects"])
        module = network.module
        tensors = [*module.parameters(), *module.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        size = size or os.stat(message["weights"]).st_size  # an ONNX session shows no tensors: its file stands for them
        return Loaded(network, message["model"], message["version"], size, batch_s=batch_s)

    def _forward(self, key: str, loaded: Loaded, message: Mapping[str, Any], array: torch.Tensor) -> Done:
        """Run it; out of memory: without the other networks, then in ever smaller batches, then not at all."""
        place = f"{key} {tuple(array.shape)}"
        infer = dict(message["infer"])
        if place in self._batches:
            infer["batch"] = self._batches[place]
        first = infer["batch"]
        while True:
            try:
                with self._resident.used(loaded):
                    done = run(loaded.network, message["task"], array, infer, message["job"], pulse=self._pulse)
            except (RuntimeError, MemoryError) as exc:
                if not is_out_of_memory(exc):
                    raise
                smaller = _smaller(infer["batch"], self._device)
                if not smaller and len(self._resident) == 1:
                    raise
            else:
                if infer["batch"] != first:
                    self._batches[place] = infer["batch"]
                    while len(self._batches) > _BATCHES_KEPT:
                        self._batches.popitem(last=False)
                return done
            gc.collect()  # outside the handler: its traceback held the tensors of the run
            if self._resident.evict(keep=key):
                continue
            if not smaller:
                raise torch.OutOfMemoryError("out of memory on the device, even with one window at a time")
            infer["batch"] = smaller


def _last_line(exc: Exception) -> str:
    """What torch.jit says of an exception in a graph is pages of trace-back; the reason is the last line."""
    return (str(exc).strip().splitlines() or [""])[-1][:300]


def _smaller(batch: int | str, device: torch.device) -> int:
    """Half of it, 0 when it cannot be less; `auto` starts at what `forward` takes at most."""
    now = batch if isinstance(batch, int) else 8 if device.type == "cuda" else 2
    return now // 2


def _network_key(message: Mapping[str, Any]) -> str:
    return json.dumps([message["weights"], message["source"], message["infer"]], sort_keys=True)


def _joint_key(request: Request) -> str:
    """Equal for requests that may go through a network together; "" for those that go alone."""
    message = request.message
    if message["task"] != "classification" or message.get("alone"):
        return ""
    same = [message["shape"][1:], message["dtype"], message["job"], message["threads"]]
    return _network_key(message) + json.dumps(same, sort_keys=True)


def _images(request: Request) -> int:
    return int(request.message["shape"][0])


def _array(request: Request) -> torch.Tensor:
    return torch.from_numpy(received_array(request.fds[0], request.message["shape"], request.message["dtype"]))


def _of_part(answer: Mapping[str, Any], part: Array, together: int) -> dict[str, Any]:
    seconds = {**answer["seconds"], "forward": answer["seconds"].get("forward", 0.0) / together}
    return {**answer, "shape": list(part.shape), "seconds": seconds, "together": together}


def _is_device_fault(exc: BaseException) -> bool:
    """After these a CUDA context answers nothing any more."""
    accelerator = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(exc, accelerator)) or "CUDA error" in str(exc)
