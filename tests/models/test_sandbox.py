"""The confined process: what it can no longer do, what it still can, and what happens where it cannot be confined."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dicom_node.errors import PackageError
from dicom_node.models import sandbox
from dicom_node.models.package import load_package
from dicom_node.models.runtime import Runtime
from dicom_node.models.seccomp_filter import ARCHITECTURES, filter_program

_ATTEMPTS = """
import ctypes, json, os, socket, subprocess, sys, threading
from dicom_node.models import sandbox

folder, parent = sys.argv[1], int(sys.argv[2])
state = sandbox.confine()
found = {"files": state.files, "calls": state.calls, "lacking": state.lacking}

def attempt(name, action):
    try:
        action()
        found[name] = "done"
    except (OSError, MemoryError) as exc:
        found[name] = type(exc).__name__

def called(name, *arguments):
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)

libc = ctypes.CDLL(None, use_errno=True)
target = os.path.join(folder, "precious")
attempt("create", lambda: open(os.path.join(folder, "canary"), "w"))
attempt("overwrite", lambda: open(target, "w"))
attempt("append", lambda: open(target, "a"))
attempt("truncate", lambda: os.truncate(target, 0))
attempt("unlink", lambda: os.unlink(target))
attempt("rename", lambda: os.rename(target, target + "2"))
attempt("link", lambda: os.link(target, target + "2"))
attempt("chmod", lambda: os.chmod(target, 0))
attempt("utime", lambda: os.utime(target))
attempt("mkdir", lambda: os.mkdir(os.path.join(folder, "made")))
attempt("fifo", lambda: os.mkfifo(os.path.join(folder, "fifo")))
attempt("xattr", lambda: os.setxattr(target, "user.x", b"y"))
attempt("inet", lambda: socket.socket())
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("socket pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("signal by a file", lambda: __import__("fcntl").fcntl(0, 8, parent))
attempt("fork", lambda: os.fork())
attempt("vfork", lambda: subprocess.run(["true"]))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("kill", lambda: os.kill(parent, 0))
attempt("kill all", lambda: os.kill(-1, 0))
attempt("environment", lambda: open(f"/proc/{parent}/environ").read())
attempt("memory of others", lambda: open(f"/proc/{parent}/mem", "rb"))
attempt("chroot", lambda: os.chroot("/"))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, parent, 19))
attempt("setuid", lambda: os.setuid(12345))
attempt("unshare", lambda: called("unshare", 0x10000000))
attempt("trace", lambda: called("ptrace", 16, parent, 0, 0))
attempt("terabytes", lambda: bytearray(10**13))

attempt("read", lambda: open(target).read())
attempt("null", lambda: open("/dev/null", "w").write("x"))
attempt("thread", lambda: [t.start() or t.join() for t in [threading.Thread(target=lambda: found.update(ran="done"))]])
attempt("thread writes", lambda: [t.start() or t.join() for t in [threading.Thread(
    target=lambda: attempt("create in a thread", lambda: open(os.path.join(folder, "canary2"), "w")))]])
attempt("memory file", lambda: os.ftruncate(os.memfd_create("array"), 4096))
def name_a_thread():
    stay, started = threading.Event(), threading.Event()
    def wait():
        started.set()
        stay.wait(10)
    thread = threading.Thread(target=wait)
    thread.start()
    started.wait(10)
    try:
        with open(f"/proc/{os.getpid()}/task/{thread.native_id}/comm", "w") as file:  # as CUDA does at its start
            file.write("named")
    finally:
        stay.set()
        thread.join()

attempt("name a thread", name_a_thread)
attempt("own signal", lambda: os.kill(os.getpid(), 0))
import torch
torch.set_num_threads(2)
attempt("torch", lambda: torch.randn(400, 400).mm(torch.randn(400, 400)))
found["privileges"] = open("/proc/self/status").read().split("CapEff:")[1].split()[0]
print(json.dumps(found))
"""


def _script(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        check=False,
    )


def _supported() -> bool:
    found = _script("from dicom_node.models import sandbox; print(sandbox.confine().complete)")
    return found.stdout.strip() == "True"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a confined process could do."""
    if not _supported():
        pytest.skip("needs a kernel with Landlock and seccomp")
    folder = tmp_path_factory.mktemp("attempts")
    (folder / "precious").write_text("of value", encoding="ascii")
    done = _script(_ATTEMPTS, str(folder), str(os.getpid()))
    assert done.returncode == 0, done.stderr
    assert (folder / "precious").read_text(encoding="ascii") == "of value"
    assert [path.name for path in folder.iterdir()] == ["precious"]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_confined_process_says_so(found: dict[str, Any]) -> None:
    assert found["files"] and found["calls"] and found["lacking"] == ""


@pytest.mark.parametrize(
    "attempt",
    [
        *("create", "overwrite", "append", "truncate", "unlink", "rename", "link", "chmod", "utime", "mkdir", "fifo"),
        *(
            "xattr",
            "inet",
            "udp",
            "unix",
            "netlink",
            "socket pair",
            "signal by a file",
            "fork",
            "vfork",
            "exec",
            "kill",
            "kill all",
            "environment",
        ),
        *("memory of others", "chroot", "priority", "setuid", "unshare", "trace", "terabytes", "create in a thread"),
    ],
)
def test_a_confined_process_cannot(found: dict[str, Any], attempt: str) -> None:
    assert found[attempt] in ("PermissionError", "OSError", "MemoryError")


@pytest.mark.parametrize(
    "need", ["read", "null", "thread", "ran", "memory file", "name a thread", "own signal", "torch"]
)
def test_a_confined_process_can_still(found: dict[str, Any], need: str) -> None:
    assert found[need] == "done"


def test_of_roots_privileges_only_reading_is_left(found: dict[str, Any]) -> None:
    assert int(found["privileges"], 16) & ~0b110 == 0


def test_of_the_nodes_data_only_installed_models_can_be_read(tmp_path: Path) -> None:
    if not _supported():
        pytest.skip("needs a kernel with Landlock and seccomp")
    data = tmp_path / "node" / "data"
    places = {
        "catalog": data / "catalog.db",
        "object": data / "archive" / "00" / "object.dcm",
        "model": data / "models" / "one" / "weights",
        "beside": tmp_path / "node" / "config.yaml",
        "package": tmp_path / "packages" / "two" / "weights",
    }
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content", encoding="ascii")
    (tmp_path / "link").symlink_to(data / "archive")
    places["object by a link"] = tmp_path / "link" / "00" / "object.dcm"
    done = _script(
        """
        import json, sys
        from pathlib import Path
        from dicom_node.models import sandbox
        state = sandbox.confine("cpu", Path(sys.argv[1]))
        found = {"complete": state.complete}
        import torch  # what was not yet imported can still be
        for name, path in json.loads(sys.argv[2]).items():
            try:
                found[name] = open(path).read()
            except OSError as exc:
                found[name] = type(exc).__name__
        print(json.dumps(found))
        """,
        str(data / "models"),
        json.dumps({name: str(path) for name, path in places.items()}),
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "complete": True,
        "catalog": "PermissionError",
        "object": "PermissionError",
        "object by a link": "PermissionError",
        "model": "content",
        "beside": "content",
        "package": "content",
    }


def test_the_runtime_process_is_confined_before_it_runs_a_package(ct_folder: Path) -> None:
    if not _supported():
        pytest.skip("needs a kernel with Landlock and seccomp")
    runtime = Runtime("cpu")
    try:
        runtime.load(load_package(ct_folder), timeout_s=60, heartbeat=lambda: None)
        process = Path(f"/proc/{runtime.pid}")
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) & ~0b110 == 0
        assert (process / "oom_score_adj").read_text().strip() == "600"
        limits = (process / "limits").read_text()
        assert re.search(r"Max core file size +0 +0", limits) and re.search(r"Max data size +\d+", limits)
    finally:
        runtime.close()


def test_threads_that_came_first_are_told_and_graphs_refused() -> None:
    done = _script(
        """
        import threading
        from dicom_node.errors import PackageError
        from dicom_node.models import sandbox
        stay = threading.Event()
        threading.Thread(target=stay.wait, daemon=True).start()
        print(sandbox.confine().complete)
        sandbox.require_confined("state_dict")
        try:
            sandbox.require_confined("torchscript")
        except PackageError as exc:
            print(exc)
        """
    )
    first, message = done.stdout.strip().splitlines()
    assert first == "False"
    assert "threads were started before it" in message and sandbox.UNCONFINED_VARIABLE in message
    assert "graph packages are refused" in done.stderr


def test_an_unconfined_process_runs_data_and_refuses_graphs_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_state", None)
    monkeypatch.delenv(sandbox.UNCONFINED_VARIABLE, raising=False)
    for format in ("state_dict", "xrv", "nnunet"):
        sandbox.require_confined(format)
    for format in ("torchscript", "pt2", "onnx"):
        with pytest.raises(PackageError, match="confined process"):
            sandbox.require_confined(format)
    monkeypatch.setenv(sandbox.UNCONFINED_VARIABLE, "1")
    sandbox.require_confined("torchscript")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("truncation", [False, True])
def test_the_filter_is_a_sound_program_of_the_kernels_language(machine: str, truncation: bool) -> None:
    program = filter_program(ARCHITECTURES[machine], 4242, truncation=truncation)
    entries = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    assert len(entries) < 4096  # BPF_MAXINSNS
    for place, (code, if_true, if_false, _) in enumerate(entries):
        if code & 7 == 5:
            assert place + 1 + max(if_true, if_false) < len(entries)
    assert entries[-1][0] == 6


def _answer(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """Run a filter as the kernel does, over one struct seccomp_data."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *(arguments + (0,) * 6)[:6])
    place = value = 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
        elif code == 0x06:
            return int(operand)
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            place += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_judges_calls_by_their_arguments(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = filter_program(architecture, 4242, truncation=True)
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    def answer(name: str, *arguments: int) -> int:
        return _answer(program, architecture.audit, architecture.numbers[name], *arguments)

    assert answer("clone", 0x3D0F00) == allow  # a thread, as the C library makes it
    assert answer("clone", 17) == refuse  # a process
    assert answer("clone3") == answer("openat2") == unknown
    assert answer("kill", 4242) == allow and answer("kill", 1) == answer("kill", 0) == refuse
    assert answer("prlimit64", 0) == answer("prlimit64", 4242) == allow and answer("prlimit64", 1) == refuse
    assert answer("prctl", 15) == allow and answer("prctl", 1) == refuse  # its name; not to outlive its parent
    assert answer("ioctl", 3, 0xC0104600) == allow and answer("ioctl", 0, 0x5412) == refuse
    assert answer("ioctl", 0, 0x8901) == answer("fcntl", 0, 8) == answer("fcntl", 0, 10) == refuse
    assert answer("fcntl", 0, 1033) == allow and answer("socketpair") == refuse  # seals of memory files
    assert answer("openat", 0, 0, 0) == allow and answer("openat", 0, 0, 0o1000) == refuse
    assert answer("socket") == 0x50061 and answer("connect") == 0x5006F  # no such family, nobody there
    for name in ("listen", "bind", "execve", "ptrace", "io_uring_setup", "bpf", "mount", "process_vm_writev"):
        assert answer(name) == refuse
    assert _answer(program, 0xDEAD, architecture.numbers["openat"]) == kill
    assert _answer(program, architecture.audit, 0x40000000 + 41) == refuse


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"needs {header}")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    told = {name: int(number) for name, number in pattern.findall(Path(header).read_text(encoding="ascii"))}
    ours = ARCHITECTURES[machine].numbers
    shared = set(ours) & set(told)
    assert len(shared) > 80
    assert {name: ours[name] for name in shared} == {name: told[name] for name in shared}
