"""Fixtures for every folder: the corpus, foreign tools, free ports, a real node as a process."""

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# Tests run side by side, one to a core, and so do the processes they start: threads of one computation only wait for
# each other there (with two each, torch takes three times the processor time). Before numpy or torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine stops now and then for a second, in the middle of an example: time is no property of the code here.
# Fixtures of a function are made once for all its examples; the tests that use them know.
settings.register_profile(
    "shared-machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("shared-machine")

# tool: the Debian package it comes with
PACKAGES = {
    **dict.fromkeys(("echoscu", "storescu", "findscu", "getscu", "movescu", "storescp"), "dcmtk"),
    **dict.fromkeys(("dcmdump", "dsrdump", "dsr2html", "dcmconv", "dcmodify", "dump2dcm"), "dcmtk"),
    **dict.fromkeys(("dciodvfy", "dcentvfy"), "dicom3tools"),
    "Orthanc": "orthanc",
    "java": "default-jre-headless",
    "promtool": "prometheus",
    "systemd-analyze": "systemd",
    "rsyslogd": "rsyslog, rsyslog-gnutls",
}
READY_S = 130.0
COMMAND_LINE = "import sys; from dicom_node.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that was run inside a test logs errors only, and its level would hide warnings from the next tests."""
    known = [logging.getLogger(name) for name in ("", "dicom_node")]
    levels = [logger.level for logger in known]
    yield
    for logger, level in zip(known, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real DICOM files with its MANIFEST.csv."""
    folder = os.environ.get("DICOM_NODE_CORPUS")
    if not folder:
        pytest.skip("needs DICOM_NODE_CORPUS: the folder of the test corpus")
    assert Path(folder, "MANIFEST.csv").is_file(), f"DICOM_NODE_CORPUS={folder} has no MANIFEST.csv"
    return Path(folder)


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """`tool(name)`: its path, or the test is skipped with a line that names it and its Debian package."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"needs {name} (Debian package {PACKAGES.get(name, name)})")
        return path

    return find


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`free_port()`: a TCP port of 127.0.0.1 nobody listens on now."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@dataclass
class RunningNode:
    """A node started as a user would start it."""

    process: subprocess.Popen[str]
    data_dir: Path
    rules_dir: Path
    config: Path
    log: Path
    dicom_port: int = 0
    http_port: int = 0
    ready_line: str = ""
    children: dict[str, int] = field(default_factory=dict)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an HTTP GET."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    def pid(self, role: str) -> int:
        """The process id of that role now."""
        return int(json.loads((self.data_dir / "run" / f"{role}.json").read_text())["pid"])

    def members(self) -> list[psutil.Process]:
        """Every process of the node; short-lived ones (a check in a process of its own) may be gone when you look."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `dicom-node WORDS` on this node's settings."""
        options = ["--config", str(self.config)]
        return subprocess.run(
            [sys.executable, "-m", "dicom_node.cli", *words, *options],
            check=check,
            text=True,
            capture_output=True,
            timeout=60,
        )

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Until `/ready` says 200."""
        wait_for(lambda: self._is_ready(), timeout_s, f"the node to be ready; its log:\n{self.tail()}")

    def _is_ready(self) -> bool:
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def tail(self) -> str:
        """The end of the node's log."""
        return self.log.read_text()[-4000:]

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until `condition()` is true; fails naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"gave up after {timeout_s:g} s waiting for {what}")
        time.sleep(0.05)


@pytest.fixture(name="wait_for", scope="session")
def wait_for_fixture() -> Callable[[Callable[[], object], float, str], None]:
    """`wait_for(condition, timeout_s, what)`."""
    return wait_for


@pytest.fixture
def begun_threads() -> Callable[[], list[str]]:
    """`begun_threads()`: the names of the threads there are now and were not before the test.

    Those of tests before, which may be ending still, do not count. A pool may have more for a moment than it keeps:
    wait for the number, do not look once.
    """
    before = set(threading.enumerate())
    return lambda: sorted(thread.name for thread in threading.enumerate() if thread not in before)


@pytest.fixture
def running_node(tmp_path: Path) -> Iterator[Callable[..., RunningNode]]:
    """`running_node(name="node", **settings)`: start a node on free ports of 127.0.0.1 and wait until it is ready.

    Settings are those of `config/node.yaml`; by default there are no rules and no disk reserve. Starting the same name
    again uses the same data folder. `first`: Python that is run before the command line is. Whatever still runs at the
    end of the test is stopped.
    """
    started: list[RunningNode] = []

    def start(name: str = "node", *, wait: bool = True, first: str = "", **settings: Any) -> RunningNode:
        node = _launch(tmp_path / name, settings, first)
        started.append(node)
        if wait:
            _read_ready_line(node)
        return node

    yield start
    for node in started:
        _put_down(node)


def _launch(folder: Path, settings: Mapping[str, Any], first: str) -> RunningNode:
    folder.mkdir(parents=True, exist_ok=True)
    rules = Path(settings.get("rules_dir", folder / "rules"))
    rules.mkdir(parents=True, exist_ok=True)
    merged: dict[str, Any] = {
        "data_dir": str(folder / "data"),
        "rules_dir": str(rules),
        "dicom_port": 0,
        "http_port": 0,
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
        **settings,
    }
    config = folder / "node.yaml"
    config.write_text(json.dumps(merged))  # JSON is YAML
    log = folder / "node.log"
    with log.open("a") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{first}\n{COMMAND_LINE}", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=folder,
        )
    return RunningNode(process, Path(merged["data_dir"]), rules, config, log)


def _read_ready_line(node: RunningNode) -> None:
    assert node.process.stdout is not None
    readable, _, _ = select.select([node.process.stdout], [], [], READY_S)
    node.ready_line = node.process.stdout.readline() if readable else ""
    if not node.ready_line.startswith("dicom-node ready:"):
        pytest.fail(f"the node did not start: {node.ready_line!r}; its log:\n{node.tail()}")
    facts = json.loads((node.data_dir / "run" / "supervisor.json").read_text())["facts"]
    node.dicom_port, node.http_port = facts["dicom_port"], facts["http_port"]


def _put_down(node: RunningNode) -> None:
    try:
        members = node.members() if node.process.poll() is None else []
    except psutil.NoSuchProcess:
        members = []
    try:
        node.stop()
    except subprocess.TimeoutExpired:
        node.process.kill()
        node.process.wait(timeout=10)
    for member in members:
        if member.is_running() and member.pid != node.process.pid:
            member.kill()
    if node.process.stdout is not None:
        node.process.stdout.close()


@dataclass
class Orthanc:
    """An Orthanc that runs."""

    http: int
    dicom: int

    def call(self, path: str, body: Any = None) -> Any:
        """GET, or POST with a body; the JSON answered."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", data, timeout=30) as answer:
            return json.loads(answer.read())

    def file(self, instance: str) -> bytes:
        """The Part-10 file of one instance."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/instances/{instance}/file", timeout=30) as answer:
            return bytes(answer.read())


@pytest.fixture
def orthanc(tool: Callable[[str], str], tmp_path: Path) -> Iterator[Callable[[int, int, int], Orthanc]]:
    """`orthanc(http, dicom, node_port)`: an Orthanc that knows the node as modality `node`."""
    with ExitStack() as stack:

        def start(http: int, dicom: int, node_port: int) -> Orthanc:
            folder = tmp_path / "orthanc"
            folder.mkdir(exist_ok=True)
            (folder / "orthanc.json").write_text(
                json.dumps(
                    {
                        **{"StorageDirectory": str(folder), "IndexDirectory": str(folder), "DicomAet": "ORTHANC"},
                        **{"DicomPort": dicom, "HttpPort": http, "RemoteAccessAllowed": False, "Plugins": []},
                        **{"AuthenticationEnabled": False, "DicomServerEnabled": True, "DicomAlwaysAllowMove": True},
                        "DicomModalities": {"node": ["DICOM_NODE", "127.0.0.1", node_port]},
                    }
                )
            )
            log = stack.enter_context((folder / "log").open("wb"))
            process = subprocess.Popen(
                [tool("Orthanc"), str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            running = Orthanc(http, dicom)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with suppress(OSError):
                    running.call("/system")
                    with socket.create_connection(("127.0.0.1", dicom), timeout=1):
                        return running
                time.sleep(0.05)
            raise AssertionError((folder / "log").read_text())

        yield start
