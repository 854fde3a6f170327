"""Foreign packages are read in a process of their own: what is made to hang or kill its reader ends only that.

`formats` never executes what it reads, but a file can cost more than it holds (keys that take years to compare, nesting
that overflows the stack). So the reader is confined as the runtime is, and bounded in time. Must not import torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dicom_node.errors import PackageError
from dicom_node.lifeline import tied_to
from dicom_node.models.formats import Described, describe_folder
from dicom_node.models.sandbox import confine

__all__ = ["describe_apart"]

_DEADLINE_S = 300  # gigabytes of weights are hashed in a few seconds
_MEMORY = 12 * 1024**3  # the largest file that is taken, three times
_CPU_S, _CPU_S_PER_GIB, _MOST_FILES = 60, 20, 10_000


def describe_apart(folder: Path, deadline_s: float = _DEADLINE_S) -> Described:
    """`formats.describe_folder` in a process of its own. Raises PackageError, also when that process does not live."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "dicom_node.models.describing", str(os.getpid()), str(folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads would start before `confine`
        )
    except subprocess.TimeoutExpired:
        raise PackageError(
            f"{folder}: reading it took longer than {deadline_s:g} s and was stopped; it is no package to trust"
        ) from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise PackageError(f"{folder}: reading it took too long and was stopped; it is no package to trust")
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise PackageError(
            f"{folder}: reading it ended the process that did so (status {done.returncode}); "
            "its files are damaged, or made to do harm"
        ) from None
    if "error" in told:
        raise PackageError(told["error"])
    return Described(
        format=told["format"], manifest=told["manifest"], files=tuple(told["files"]), notes=tuple(told["notes"])
    )


def _size(folder: Path) -> int:
    total = 0
    for count, path in enumerate(folder.rglob("*")):
        if count >= _MOST_FILES:
            break
        with suppress(OSError):
            total += path.stat().st_size
    return min(total, _MEMORY)


def main(arguments: list[str]) -> int:
    """`PARENT_PID FOLDER`: write what the folder holds, or why not, as JSON. Returns the exit status."""
    parent, folder = int(arguments[0]), Path(arguments[1])
    if not tied_to(parent):
        return 1
    confine()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    seconds = _CPU_S + _CPU_S_PER_GIB * (_size(folder) >> 30)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    bound = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    try:
        answer = asdict(describe_folder(folder))
    except PackageError as exc:
        answer = {"error": str(exc)}
    except (MemoryError, RecursionError) as exc:
        answer = {"error": f"{folder}: reading it takes more than it holds ({type(exc).__name__})"}
    except Exception as exc:  # noqa: BLE001 - edge: a package is anything; what no format foresaw is its fault
        answer = {"error": f"{folder}: is not understood ({type(exc).__name__}: {str(exc)[:200]})"}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
