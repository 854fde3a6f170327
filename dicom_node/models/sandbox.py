"""Confine the runtime process, before it loads any package: no network, no new process, no file written.

What a package of trust `graph` runs may be anything its format can say, and torch's formats can say much: save a file,
map one, loop without end. So the process gives up, for good, what no network needs:

- files (Landlock): everything is read-only; only devices that compute (/dev/nvidia*, /dev/kfd, /dev/dri) and /dev/null
  take writes and controls, and the process names its own threads. Arrays travel in memory files, so not even a scratch
  folder is needed. Of the node's own data it reads the installed models, no stored object and not the catalog.
- system calls (`seccomp_filter`): sockets, programs, processes, signals and traces to others, mounts, modules, clocks.
- privileges: no new ones, none of root's but reading; no core file; the first to go when memory runs out, and no more
  memory than the machine has, so that an absurd request fails at once.

All packages run confined; where the kernel can do only part of it, `data` packages run, `graph` packages are refused.
Linux, x86_64 and aarch64. Must not import torch: Landlock binds the threads that exist later, so it comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import logging
import os
import platform
import resource
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import PackageError
from dicom_node.models.seccomp_filter import ARCHITECTURES, filter_program
from dicom_node.models.source import TRUST

__all__ = ["UNCONFINED_VARIABLE", "Confinement", "confine", "require_confined"]

log = logging.getLogger(__name__)

# an operator who sets this to 1 takes the risk of running graphs on a kernel that cannot confine them
UNCONFINED_VARIABLE = "RUNTIME_UNCONFINED_GRAPHS"

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_QUESTION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1

# include/uapi/linux/landlock.h
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # how many bits; 16 from version 5
_NETWORK_RIGHTS = 0b11  # bind and connect TCP, from version 4
_SCOPES = 0b11  # abstract sockets and signals, from version 6

_COMPUTING = (
    *("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dxg", "/dev/kfd", "/dev/dri"),
    *("/dev/null", "/dev/zero"),
)
_KEPT_CAPABILITIES = 1 << 1 | 1 << 2  # DAC_OVERRIDE, DAC_READ_SEARCH: to read weights, which Landlock limits to reading
_CAPABILITY_VERSION = 0x20080522
_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")  # their drivers map more than there is
_FIRST_TO_GO = "600"
_ARCHIVE = "archive"  # of the stored objects, in the node's data folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What the kernel granted. `lacking`: what it did not, in words; empty when the process is fully confined."""

    files: bool
    calls: bool
    lacking: str

    @property
    def complete(self) -> bool:
        """Whether a graph may be run."""
        return self.files and self.calls


_state: Confinement | None = None
_kept: list[int] = []  # descriptors for the life of the process


def confine(device: str = "cpu", models_dir: Path | None = None) -> Confinement:
    """Confine this process for good; `device` as the runtime was given it (auto, cpu, cuda...). Idempotent.

    `models_dir`: where the node installs models, in the folder of its data; of that folder the process reads only the
    folders that are there now, and not `archive`. None: there is no such data to keep from it.

    To be called with no thread beside the caller, before the first package is touched. Raises nothing: what the
    kernel lacks is logged once and kept for `require_confined`.
    """
    global _state
    if _state is not None:
        return _state
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = "/tmp"  # parts of torch ask for its name and never use it; looking for one would fail
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")
    if device.startswith("cpu") or not any(os.path.exists(node) for node in _ACCELERATORS):
        _limit_memory()
    lacking = []
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("privileges", _drop_privileges),
        ("Landlock", lambda: _lock_files(models_dir)),
        ("seccomp", _lock_calls),
    )
    for name, step in steps:
        try:
            step()
        except OSError as exc:
            lacking.append(f"{name} ({exc.strerror or exc})")
    _state = Confinement(
        files=not any(one.startswith(("Landlock", "privileges")) for one in lacking),
        calls=not any(one.startswith(("seccomp", "privileges")) for one in lacking),
        lacking=", ".join(lacking),
    )
    if lacking:
        log.warning("the runtime process is not confined: graph packages are refused", extra={"lacking": lacking})
    return _state


def require_confined(format: str) -> None:
    """Raise PackageError when a package of this format runs what it brings and this process is not confined for it."""
    if TRUST[format] == "data" or (_state is not None and _state.complete):
        return
    if os.environ.get(UNCONFINED_VARIABLE) == "1":
        return
    lacking = _state.lacking if _state is not None else "it was not tried"
    raise PackageError(
        f"trust: {TRUST[format]} runs only in a confined process, and this kernel lacks {lacking}; run the node on "
        f"Linux 5.13 or later with Landlock and seccomp, package the weights as a state dict of a named network, or "
        f"set {UNCONFINED_VARIABLE}=1 where the package's origin is beyond doubt"
    )


# --- each step raises OSError when the kernel does not grant it

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _drop_privileges() -> None:
    """No privileges by a program's mode bits, and of root's own only those to read."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs is refused")
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise OSError(errno.ENOSYS, f"unknown on {platform.machine()}")
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    _call(architecture.numbers["capget"], ctypes.c_char_p(header), held)
    effective, permitted, _, _, _, _ = struct.unpack("=6I", held.raw)
    kept = struct.pack("=6I", effective & _KEPT_CAPABILITIES, permitted & _KEPT_CAPABILITIES, 0, 0, 0, 0)
    _call(architecture.numbers["capset"], ctypes.c_char_p(header), ctypes.c_char_p(kept))


def _lock_files(models_dir: Path | None) -> None:
    """Landlock: read what is not the node's data, write to the devices that compute, nothing else."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError(errno.EBUSY, "threads were started before it")
    version = _call(_CREATE_RULESET, None, 0, _VERSION_QUESTION)
    rights = (1 << _FILE_RIGHTS_BY_VERSION.get(version, 16)) - 1
    attributes = [rights]
    if version >= 4:
        attributes.append(_NETWORK_RIGHTS)
    if version >= 6:
        attributes.append(_SCOPES)
    ruleset = _call(
        _CREATE_RULESET, ctypes.c_char_p(struct.pack(f"={len(attributes)}Q", *attributes)), 8 * len(attributes), 0
    )
    try:
        _allow(ruleset, ["/"], _READ_DIR & rights)
        _allow(ruleset, ["/"] if models_dir is None else _beside_data(models_dir), _READ_FILE & rights)
        nodes = [node for pattern in _COMPUTING for node in glob.glob(pattern)]
        _allow(ruleset, nodes, (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & rights)
        # CUDA's start fails (304) where it cannot name its threads in /proc; the open descriptor keeps the rule's inode
        _kept.append(os.open("/proc/self/task", os.O_PATH | os.O_CLOEXEC))
        _add_rule(ruleset, _kept[-1], (_READ_FILE | _WRITE_FILE | _TRUNCATE) & rights)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _beside_data(models_dir: Path) -> list[str]:
    """Everything but the files and the archive in the folder around `models_dir`, as paths with what is beneath."""
    data = models_dir.resolve().parent
    if any(Path(place).resolve().is_relative_to(data) for place in (sys.prefix, sys.base_prefix, __file__)):
        log.warning("the node's data folder holds its own program: a graph could read it", extra={"folder": str(data)})
        return ["/"]
    with contextlib.suppress(OSError):
        models_dir.mkdir(exist_ok=True)  # what is not there cannot be shown
    found = [entry.path for entry in _entries(data) if entry.is_dir(follow_symlinks=False) and entry.name != _ARCHIVE]
    for place in (data, *data.parents[:-1]):
        found += [entry.path for entry in _entries(place.parent) if entry.path != str(place)]
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder; not links: they could lead back to what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.is_symlink()]
    except OSError:  # what cannot be listed is not shown
        return []


def _allow(ruleset: int, paths: Iterable[str], rights: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # it went away since it was listed
            continue
        try:
            _add_rule(ruleset, fd, rights)
        finally:
            os.close(fd)


def _add_rule(ruleset: int, fd: int, rights: int) -> None:
    beneath = struct.pack("=Qi", rights, fd)
    _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.c_char_p(beneath), 0)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _lock_calls() -> None:
    """seccomp, on every thread of the process."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise OSError(errno.ENOSYS, f"unknown on {platform.machine()}")
    instructions = filter_program(architecture, os.getpid(), truncation=_truncation_is_open())
    program = _Program(len(instructions) // 8, instructions)
    number = architecture.numbers["seccomp"]
    _call(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program))


def _truncation_is_open() -> bool:
    """Whether Landlock is too old (before version 3) to forbid emptying a file that may only be read."""
    try:
        return _call(_CREATE_RULESET, None, 0, _VERSION_QUESTION) < 3
    except OSError:
        return True


def _limit_memory() -> None:
    """No more private memory than the machine or the container has."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path(name).read_text(encoding="ascii")))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = min(limits) if hard == resource.RLIM_INFINITY else min(*limits, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
