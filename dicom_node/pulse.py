"""Signs of life of the processes: small files in `<data>/run/`, read by `/ready`, the supervisor and the commands.

A pulse says who (process id), when (boot clock) and how (ok, detail, facts). It is replaced whole, never half-written,
and is not synced: after a power cut it is meaningless anyway, which its boot id shows. No patient data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dicom_node.interfaces import Clock, seconds_since
from dicom_node.model import BootTime

__all__ = ["FRESH_S", "Pulse", "beat", "fresh", "lives", "read_pulse", "receiver_role", "receiver_roles", "run_folder"]

FRESH_S = 6.0  # processes beat every second; one that is silent this long is stuck or dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """One sign of life. `started_at` is ISO 8601 UTC."""

    pid: int
    boot_id: str
    boot_s: float
    started_at: str
    ok: bool
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def at(self) -> BootTime:
        """When it was given."""
        return BootTime(boot_id=self.boot_id, seconds=self.boot_s)


def receiver_role(number: int) -> str:
    """The name of a receiver process by its number from 0: receiver, receiver-2, ..."""
    return f"receiver-{number + 1}" if number else "receiver"


def receiver_roles(count: int) -> tuple[str, ...]:
    """The names of so many receiver processes."""
    return tuple(receiver_role(number) for number in range(count))


def run_folder(data_dir: Path) -> Path:
    """Where pulses and metrics files are."""
    return data_dir / "run"


@lru_cache(maxsize=64)
def _files(data_dir: Path, role: str, pid: int = 0) -> tuple[Path, Path]:
    """Of the pulse, and of one that is being written."""
    # Kept: Python notes each part of each new path in a table (`sys.intern`), which doubled after an hour of looking at
    # pulses ten times a second, 2 MB in every process.
    path = run_folder(data_dir) / f"{role}.json"
    return path, path.with_suffix(f".{pid}.tmp")


def beat(data_dir: Path, role: str, pulse: Pulse) -> bool:
    """Give a sign of life; False when it could not be written, which is no error here: silence says enough.

    On a full disk it is written over the last one, whose blocks are there; who reads at that very moment finds none.
    """
    path, temporary = _files(data_dir, role, os.getpid())
    text = json.dumps(asdict(pulse)).encode()
    try:
        temporary.write_bytes(text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # not even that on a read-only file system
            temporary.unlink()
        return _overwrite(path, text)
    return True


def _overwrite(path: Path, text: bytes) -> bool:
    try:
        with path.open("r+b", buffering=0) as file:
            missing = os.fstat(file.fileno()).st_size - len(text)
            file.write(text + b" " * missing)  # JSON may end in blanks
    except OSError:
        return False
    return True


def read_pulse(data_dir: Path, role: str) -> Pulse | None:
    """The last sign of life of that process, or None."""
    try:
        return Pulse(**json.loads(_files(data_dir, role)[0].read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def lives(pulse: Pulse | None, clock: Clock) -> bool:
    """As `fresh`, and it has not ended since: for whoever is on the node's machine and wants to know it now."""
    if pulse is None or not fresh(pulse, clock) or pulse.detail == "stopped":
        return False
    try:
        os.kill(pulse.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def fresh(pulse: Pulse | None, clock: Clock) -> bool:
    """Whether its process lives and moves."""
    return pulse is not None and seconds_since(pulse.at, clock.boot()) < FRESH_S
