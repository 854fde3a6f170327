"""The filter of system calls for `sandbox`, as a program of the kernel's packet filter language (BPF).

A list of what is refused, not of what is allowed: torch, CUDA and the C library use calls that differ between their
versions, while the calls by which a process reaches others are known. Refused calls fail and the process goes on: most
with EPERM, sockets with what a machine without a network says, which drivers that ask a daemon take better. Numbers
from the kernel's tables for x86_64 (arch/x86/entry/syscalls/syscall_64.tbl) and aarch64
(include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "filter_program"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """`audit`: how the kernel names it in a filter's data. `numbers`: its system calls by name."""

    audit: int
    numbers: Mapping[str, int]


# the same number on both since 2019
_COMMON = {
    **{"pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
    **{"pidfd_open": 434, "clone3": 435, "openat2": 437, "pidfd_getfd": 438, "process_madvise": 440},
    **{"mount_setattr": 442, "quotactl_fd": 443, "process_mrelease": 448, "fchmodat2": 452, "setxattrat": 463},
    **{"removexattrat": 466, "open_tree_attr": 467, "file_setattr": 469},
}
_X86_64 = {
    **{
        "open": 2,
        "ioctl": 16,
        "fcntl": 72,
        "shmget": 29,
        "shmat": 30,
        "socket": 41,
        "socketpair": 53,
        "connect": 42,
        "accept": 43,
        "bind": 49,
    },
    **{"listen": 50, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "semget": 64, "msgget": 68},
    **{"truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101},
    **{"syslog": 103, "setuid": 105, "setgid": 106, "setpgid": 109, "setsid": 112, "setreuid": 113, "setregid": 114},
    **{"setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capget": 125},
    **{"capset": 126, "rt_sigqueueinfo": 129, "utime": 132, "mknod": 133, "uselib": 134, "personality": 135},
    **{"setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "vhangup": 153, "modify_ldt": 154},
    **{"pivot_root": 155, "prctl": 157, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164},
    **{"mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170},
    **{"setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179},
    **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198},
    **{"fremovexattr": 199, "tkill": 200, "sched_setaffinity": 203, "lookup_dcookie": 212, "clock_settime": 227},
    **{"tgkill": 234, "utimes": 235, "mq_open": 240, "mq_unlink": 241, "kexec_load": 246, "add_key": 248},
    **{"request_key": 249, "keyctl": 250, "ioprio_set": 251, "migrate_pages": 256, "openat": 257, "mknodat": 259},
    **{"fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272, "move_pages": 279, "utimensat": 280},
    **{"accept4": 288, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302},
    **{"name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308},
    **{"process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314},
    **{"seccomp": 317, "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323},
}
_AARCH64 = {
    **{"setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16},
    **{"lookup_dcookie": 18, "fcntl": 25, "ioctl": 29, "ioprio_set": 30, "mknodat": 33, "umount2": 39, "mount": 40},
    **{"pivot_root": 41, "truncate": 45, "chroot": 51, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55},
    **{"openat": 56, "vhangup": 58, "quotactl": 60, "utimensat": 88, "acct": 89, "capget": 90, "capset": 91},
    **{"personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106},
    **{"clock_settime": 112, "syslog": 116, "ptrace": 117, "sched_setparam": 118, "sched_setscheduler": 119},
    **{"sched_setaffinity": 122, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138},
    **{"setpriority": 140, "reboot": 142, "setregid": 143, "setgid": 144, "setreuid": 145, "setuid": 146},
    **{"setresuid": 147, "setresgid": 149, "setfsuid": 151, "setfsgid": 152, "setpgid": 154, "setsid": 157},
    **{"setgroups": 159, "sethostname": 161, "setdomainname": 162, "prctl": 167, "settimeofday": 170},
    **{"adjtimex": 171, "mq_open": 180, "mq_unlink": 181, "msgget": 186, "semget": 190, "shmget": 194, "shmat": 196},
    **{
        "socket": 198,
        "socketpair": 199,
        "bind": 200,
        "listen": 201,
        "accept": 202,
        "connect": 203,
        "add_key": 217,
        "request_key": 218,
    },
    **{"keyctl": 219, "clone": 220, "execve": 221, "swapon": 224, "swapoff": 225, "migrate_pages": 238},
    **{"move_pages": 239, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "accept4": 242, "prlimit64": 261},
    **{"fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268},
    **{"process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "sched_setattr": 274},
    **{"seccomp": 277, "bpf": 280, "execveat": 281, "userfaultfd": 282, "kexec_file_load": 294},
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture(audit=0xC000003E, numbers={**_COMMON, **_X86_64}),
    "aarch64": Architecture(audit=0xC00000B7, numbers={**_COMMON, **_AARCH64}),
}

# read or judged one by one below, or needed: everything else in the tables is refused whatever its arguments
_JUDGED = frozenset(
    {
        "capget",
        "clone",
        "clone3",
        "connect",
        "fcntl",
        "ioctl",
        "kill",
        "open",
        "openat",
        "openat2",
        "prctl",
        "prlimit64",
    }
    | {"seccomp", "socket", "tgkill", "truncate"}
)
_ANSWERS = {
    **{"socket": errno.EAFNOSUPPORT, "connect": errno.ECONNREFUSED},
    # their arguments are out of sight: the C library falls back to the older call
    **{"clone3": errno.ENOSYS, "openat2": errno.ENOSYS},
}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # the same calls by other numbers
_CLONE_THREAD = 0x00010000
_O_TRUNC = 0o1000
_PR_SET_PDEATHSIG, _PR_SET_MM = 1, 35
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into the terminal the node was started from
# F_SETOWN, F_SETSIG, F_SETOWN_EX and their controls: a file that becomes ready would send any process a signal
_OWNER_COMMANDS, _OWNER_CONTROLS = (8, 10, 15), (0x8901, 0x8902, 0x5452)


def filter_program(architecture: Architecture, pid: int, *, truncation: bool) -> bytes:
    """The program for a process `pid`; `truncation`: opening a file to empty it is refused here too.

    Each entry is a struct sock_filter: code, jump if true, jump if false, operand. Jumps count entries from the next.
    """
    numbers = architecture.numbers
    program = [
        _entry(_LOAD, _ARCHITECTURE),
        _entry(_EQUAL, architecture.audit, 1, 0),
        _entry(_RETURN, _KILL),
        _entry(_LOAD, _NUMBER),
        _entry(_AT_LEAST, _X32, 0, 1),
        _refuse(),
    ]
    for name, number in sorted(numbers.items()):
        if name not in _JUDGED:
            program += [_entry(_EQUAL, number, 0, 1), _refuse()]
    for name, answer in _ANSWERS.items():
        program += [_entry(_EQUAL, numbers[name], 0, 1), _refuse(answer)]
    program += _unless_argument(numbers["clone"], 0, _ANY_BIT, [_CLONE_THREAD])
    for name in ("kill", "tgkill"):
        program += _unless_argument(numbers[name], 0, _EQUAL, [pid])
    program += _unless_argument(numbers["prlimit64"], 0, _EQUAL, [0, pid])
    program += _if_argument(numbers["prctl"], 0, _EQUAL, [_PR_SET_PDEATHSIG, _PR_SET_MM])
    program += _if_argument(numbers["ioctl"], 1, _EQUAL, [*_TERMINAL_INPUT, *_OWNER_CONTROLS])
    program += _if_argument(numbers["fcntl"], 1, _EQUAL, list(_OWNER_COMMANDS))
    if truncation:
        program += [_entry(_EQUAL, numbers["truncate"], 0, 1), _refuse()]
        program += _if_argument(numbers["openat"], 2, _ANY_BIT, [_O_TRUNC])
        if "open" in numbers:
            program += _if_argument(numbers["open"], 1, _ANY_BIT, [_O_TRUNC])
    program.append(_entry(_RETURN, _ALLOW))
    return b"".join(program)


def _entry(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _refuse(number: int = errno.EPERM) -> bytes:
    return _entry(_RETURN, _FAIL | number)


def _unless_argument(number: int, index: int, test: int, operands: list[int]) -> list[bytes]:
    """Refuse call `number` unless its argument (its lower 32 bits) passes `test` with one of `operands`."""
    tests = [_entry(test, operand, len(operands) - k, 0) for k, operand in enumerate(operands)]
    body = [_entry(_LOAD, _ARGUMENTS + 8 * index), *tests, _refuse(), _entry(_RETURN, _ALLOW)]
    return [_entry(_EQUAL, number, 0, len(body)), *body]


def _if_argument(number: int, index: int, test: int, operands: list[int]) -> list[bytes]:
    """Refuse call `number` if its argument (its lower 32 bits) passes `test` with one of `operands`."""
    tests = [_entry(test, operand, len(operands) - k, 0) for k, operand in enumerate(operands)]
    body = [_entry(_LOAD, _ARGUMENTS + 8 * index), *tests, _entry(_RETURN, _ALLOW), _refuse()]
    return [_entry(_EQUAL, number, 0, len(body)), *body]
