"""The systems that `peers.py` compares, each a process of its own on an empty folder, and what they use.

Whatever is started here is ended here, by its own process group; ports are those the system gave.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["SINK", "SYSTEMS", "Sink", "System", "Usage", "free_port", "without_nodelay"]

SINK = "BENCHSINK"
START_S, END_S = 130.0, 30.0
PLUGINS = "/usr/share/orthanc/plugins/"  # where Debian's default configuration finds them


def free_port() -> int:
    """A port of 127.0.0.1 nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_nodelay() -> dict[str, str]:
    """This process's environment as dcmtk is shipped, and without settings of a node."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "TCP_NODELAY" and not name.startswith("DICOM_NODE_")
    }


class _Started:
    """A process with a session, so a group, of its own."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = command[0], folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=dict(environment), start_new_session=True
            )

    def wait_ready(self, port: int, line: bytes = b"") -> None:
        """Until that port is open and its log has that line, and a second more; ended where that does not come."""
        deadline = time.monotonic() + START_S
        try:
            while not (_is_open(port) and line in self.log.read_bytes()):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    end = self.log.read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{self.name} did not start; its log ends:\n{end}")
                time.sleep(0.05)
            time.sleep(1.0)  # what a start leaves to do is not counted
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """SIGTERM, patience, SIGKILL: to the group that was started here and nothing else."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                if number is signal.SIGTERM:
                    self.process.terminate()
                else:
                    os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
                break
        with suppress(ProcessLookupError):  # children that outlived their parent
            os.killpg(self.process.pid, signal.SIGKILL)


def _is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class System:
    """One server under test, as a plain archive: default settings, no analysis, nothing but an address for the sink.

    `stock`: dcmtk's Nagle as shipped, which makes each message of Orthanc wait for a delayed acknowledgement. `keep`:
    its folder stays when it has ended.
    """

    name = ""
    ae_title = ""
    ready_line = b""
    ping = "/ping"  # what says over HTTP that it lives

    def __init__(self, folder: Path, sink_port: int, *, stock: bool = False, keep: bool = False) -> None:
        self.folder, self.sink_port, self.stock, self.keep = folder, sink_port, stock, keep
        self.port, self.http_port = free_port(), free_port()
        self._started: _Started | None = None

    def command(self) -> list[str]:
        """What starts it; its configuration is written."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        assert self._started is not None
        return self._started.process.pid

    def __enter__(self) -> System:
        self.folder.mkdir(parents=True)
        environment = without_nodelay() | ({} if self.stock else {"TCP_NODELAY": "1"})
        self._started = _Started(self.command(), self.folder, environment)
        self._started.wait_ready(self.port, self.ready_line)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End it; its folder stays for the block."""
        if self._started is not None:
            self._started.end()


class Node(System):
    """dicom-node."""

    name, ae_title, ready_line = "ours", "DICOM_NODE", b"dicom-node ready:"
    receivers = 1

    def command(self) -> list[str]:
        rules = self.folder / "rules"
        rules.mkdir()
        settings = {
            "data_dir": str(self.folder / "data"),
            "rules_dir": str(rules),
            "dicom_port": self.port,
            "http_port": self.http_port,
            "engines": {},
            "jobs": {"workers": 0},
            "receivers": self.receivers,
            "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
            "destinations": {"sink": {"ae_title": SINK, "host": "127.0.0.1", "port": self.sink_port}},
        }
        config = self.folder / "node.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")
        return [sys.executable, "-m", "dicom_node.cli", "serve", "--config", str(config)]


class Orthanc(System):
    """Orthanc with its defaults: each file is synced, HTTP is on, the packaged plugins are loaded."""

    name, ae_title, ping = "Orthanc", "ORTHANC", "/system"

    def command(self) -> list[str]:
        settings = {
            "StorageDirectory": str(self.folder),
            "IndexDirectory": str(self.folder),
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "HttpPort": self.http_port,
            "Plugins": [PLUGINS] if Path(PLUGINS).is_dir() else [],
            "DicomModalities": {"sink": [SINK, "127.0.0.1", self.sink_port], "bench": ["BENCH", "127.0.0.1", 1]},
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
        }
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps(settings), encoding="utf-8")
        return ["Orthanc", str(config)]


SYSTEMS: Mapping[str, type[System]] = {"ours": Node, "orthanc": Orthanc}


class Sink:
    """dcmtk's storescp, writing what C-MOVE brings as it comes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._port = port

    def __enter__(self) -> Path:
        received = self.folder / "received"
        received.mkdir(parents=True)
        command = ["storescp", "--fork", "+B", "-pdu", "131072", "-aet", SINK, "-od", str(received), str(self._port)]
        self._started = _Started(command, self.folder, without_nodelay() | {"TCP_NODELAY": "1"})
        self._started.wait_ready(self._port)
        return received

    def __exit__(self, *_: object) -> None:
        self._started.end()
        shutil.rmtree(self.folder, ignore_errors=True)


class Usage:
    """CPU seconds and peak resident size of a process tree while a block runs; sizes are summed over its processes."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        self.cpu_s = self.peak_mb = 0.0

    def __enter__(self) -> Usage:
        self._before = self._cpu()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.cpu_s = self._cpu() - self._before

    def _tree(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def _cpu(self) -> float:
        total = 0.0
        for process in self._tree():
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])  # of its own and of children it has waited for
        return total

    def _watch(self) -> None:
        while True:
            size = 0
            for process in self._tree():
                with suppress(psutil.Error):
                    size += process.memory_info().rss
            self.peak_mb = max(self.peak_mb, size / 1e6)
            if self._over.wait(0.2):
                return
