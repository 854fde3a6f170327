"""The runtime process: `python -m dicom_node.models.runtime_child FD PARENT_PID DEVICE`, started by `runtime`.

The only process with torch in it. Answers requests on its socket until the parent hangs up; dies with its parent.
Keeps networks loaded, so that only the first request pays for them. Whatever goes wrong in a request is an answer, not
an end: only the parent decides that this process is finished.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import torch

from dicom_node.lifeline import tied_to
from dicom_node.models.resident import memory_files
from dicom_node.models.runtime_intake import HungUp, Intake
from dicom_node.models.runtime_serve import Server
from dicom_node.models.sandbox import confine


def main(arguments: list[str]) -> int:
    """Serve until the parent hangs up. Returns the exit status."""
    fd, parent, name = int(arguments[0]), int(arguments[1]), arguments[2]
    if not tied_to(parent):
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    files, silence = memory_files(), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    models = arguments[3] if len(arguments) > 3 else ""
    confine(name, Path(models) if models else None)  # before anything starts a thread
    intake = Intake(socket.socket(fileno=fd))
    device = _device(name)
    fault = _fault(device)
    server = Server(intake, device, fault, files)
    try:
        intake.answer({"ready": device.type, "fault": fault})
        os.dup2(silence, 2)  # what a package makes torch say would stand in the node's log, unformed
        server.serve()
    except HungUp:
        pass
    return 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _fault(device: torch.device) -> str:
    """Why the device cannot be used, "" when it can."""
    try:
        torch.ones(1, device=device).add_(1).cpu()
    except (AssertionError, RuntimeError) as exc:  # a build of torch without CUDA asserts
        return f"the device {str(device)!r} cannot be used: {str(exc)[:200]}"
    return ""


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # nothing is left to be written, and to take torch apart costs who stops it a second
