"""The runtime process: `python -m dicom_node.models.runtime_child FD PARENT_PID DEVICE`, started by `runtime`.

The only process with torch in it. Answers one request after the other on its socket until the parent hangs up; dies
with its parent. Keeps networks loaded (the last few), so that only the first request pays for them. Whatever goes
wrong in a request is an answer, not an end: only the parent decides that this process is finished.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from dicom_node.errors import EngineError, PackageError
from dicom_node.models.forward import Network, classify, load_network, segment
from dicom_node.models.wire import receive, received_array, send, shared_array

_PR_SET_PDEATHSIG = 1
_RESIDENT = 4


def main(arguments: list[str]) -> int:
    """Serve until the parent hangs up. Returns the exit status."""
    fd, parent, device = int(arguments[0]), int(arguments[1]), arguments[2]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    sock = socket.socket(fileno=fd)
    server = _Server(_device(device))
    while (received := receive(sock)) is not None:
        message, fds = received
        answer, output = server.answer(message, fds)
        try:
            send(sock, answer, output)
        except OSError:
            return 0
        finally:
            for descriptor in output:
                os.close(descriptor)
    return 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


class _Server:
    """Loaded networks, most recently used last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._networks: OrderedDict[str, Network] = OrderedDict()

    def answer(self, message: Mapping[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The answer to one request and the descriptor of its output."""
        identity = message.get("id")
        try:
            array = torch.from_numpy(received_array(fds[0], message["shape"]).copy())
            answer, output = self._run(message, array)
            return {"id": identity, **answer}, [output]
        except PackageError as exc:
            return {"id": identity, "kind": "package", "error": str(exc)}, []
        except EngineError as exc:
            return {"id": identity, "kind": "engine", "error": str(exc)}, []
        except (torch.OutOfMemoryError, MemoryError):
            return {"id": identity, "kind": "engine", "error": "out of memory on the device"}, []
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as exc:
            # torch and the network speak through these; their text is about shapes and names, not patients
            return {"id": identity, "kind": "engine", "error": f"{type(exc).__name__}: {str(exc)[:500]}"}, []

    def _run(self, message: Mapping[str, Any], array: torch.Tensor) -> tuple[dict[str, Any], int]:
        if message["threads"] > 0:
            torch.set_num_threads(message["threads"])
        started = time.perf_counter()
        network = self._network(message)
        loaded = time.perf_counter()
        if message["task"] == "load":
            output, windows = array, 0
        elif message["task"] == "segmentation":
            output, windows = segment(network, array, message["infer"], message["padding"])
        else:
            output, windows = classify(network, array, message["infer"])
        fd = shared_array(output.numpy())
        answer = {
            "shape": list(output.shape),
            "device": str(self._device),
            "precision": network.precision,
            "windows": windows,
            "seconds": {"load": loaded - started, "forward": time.perf_counter() - loaded},
        }
        return answer, fd

    def _network(self, message: Mapping[str, Any]) -> Network:
        key = repr((message["weights"], message["source"], message["infer"]))
        network = self._networks.pop(key, None)
        if network is None:
            network = load_network(message["weights"], message["source"], message["infer"], self._device)
        self._networks[key] = network
        while len(self._networks) > _RESIDENT:
            self._networks.popitem(last=False)
        return network


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
