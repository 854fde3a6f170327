"""Real engines of others as child processes, each out of an environment of its own that `make peers` installs.

`make test-peers` runs this folder, `make test` does not. It tells by TEST_PEERS where the environments lie (no name of
the form DICOM_NODE_*: those are settings of the node, and `peers` is one).
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.model import DeliveryState, Job, JobState, Level, StoredInstance
from dicom_node.store.catalog import Catalog, open_catalog

HERE = Path(__file__).parent
READY_S, END_S = 180.0, 20.0
NO_RESERVE = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)
JOB_ENDS = {JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED}
DELIVERY_ENDS = {DeliveryState.DONE, DeliveryState.FAILED, DeliveryState.CANCELLED}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here has the marker that keeps it out of the normal run."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.engine_peers)


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """`tool(name)`: its path, of the system or of this environment. Here nothing may be missing."""

    def find(name: str) -> str:
        # the system's first: pynetdicom brings a storescu of its own
        found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        assert found is not None, f"{name} is missing; run `make tools`"
        return found

    return find


@pytest.fixture(scope="session")
def environment() -> Callable[[str], Path]:
    """`environment(name)`: the folder of an installed peer (`monai-label`, `triton`)."""

    def find(name: str) -> Path:
        folder = os.environ.get("TEST_PEERS")
        if not folder:
            pytest.skip("needs TEST_PEERS: the folder of the peers' environments; run `make test-peers`")
        found = Path(folder, name)
        assert (found / ".installed").exists(), f"TEST_PEERS={folder} has no environment {name}; run `make peers`"
        return found

    return find


@dataclass
class Peer:
    """A server of somebody else, as one child process with its children, on a port of 127.0.0.1."""

    command: Sequence[str]
    environ: Mapping[str, str]
    folder: Path
    port: int
    ready: str  # path that is answered with 200 once it serves
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Until it serves, or the test fails with the end of its log."""
        began = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.environ), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )
        while not self._serves():
            if self.process.poll() is not None or time.monotonic() - began > READY_S:
                self.end(signal.SIGKILL)
                pytest.fail(f"{self.command[0]} did not serve within {READY_S:g} s:\n{self.tail()}")
            time.sleep(0.1)

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.ready, timeout=5) as answer:
                return int(answer.status) == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """This process and the children it has now, and no others. Idempotent."""
        if self.process is None:
            return
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.process.kill()
        self.process.wait(END_S)
        for child in family:  # psutil knows a process from a later one with its id
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, END_S)
        self.process = None

    def tail(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environ(environment: Path, home: Path, **more: str) -> dict[str, str]:
    """Of a peer: its own programs first, no accelerator, a home of its own, nothing of this Python's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TEST_PEERS", "COVERAGE"))}
    path = os.pathsep.join((str(environment / "bin"), os.environ.get("PATH", os.defpath)))
    return {**kept, "PATH": path, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", **more}


@pytest.fixture(scope="session")
def monai_label(environment: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A MONAI Label server with the app of `monai_label_app`; one for all tests, which leave it running."""
    where, folder = environment("monai-label"), tmp_path_factory.mktemp("monai-label")
    shutil.copytree(HERE / "monai_label_app", folder / "app")  # it writes its logs beside the app
    (folder / "studies").mkdir()
    port = _free_port()
    words = f"start_server --app app --studies studies --host 127.0.0.1 --port {port} --access_log".split()
    peer = Peer(
        command=[str(where / "bin" / "python"), "-m", "monailabel.main", *words],  # bin/monailabel takes any Python
        environ=_environ(where, folder, MONAI_LABEL_TRACKING_ENABLED="False"),
        folder=folder,
        port=port,
        ready="/info/",
    )
    yield from _running(peer)


@pytest.fixture(scope="session")
def triton(
    environment: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], Peer]]:
    """`triton(models)`: a Triton server on a copy of that model repository; models may use the Python backend."""
    started: list[Peer] = []

    def start(models: Path) -> Peer:
        folder = tmp_path_factory.mktemp("triton")
        shutil.copytree(models, folder / "models")
        started.append(_triton(environment("triton"), folder))
        started[-1].start()
        return started[-1]

    yield start
    for peer in started:
        peer.end()


def _triton(where: Path, folder: Path) -> Peer:
    """The server out of the wheel; without the rest of pytriton, which would only serve functions of its own."""
    asked = "import sysconfig as s; print(s.get_python_version(), s.get_path('purelib'), s.get_config_var('LIBDIR'))"
    told = subprocess.run([where / "bin" / "python", "-c", asked], check=True, capture_output=True, text=True).stdout
    version, packages, libdir = told.split()
    server, port = Path(packages, "pytriton", "tritonserver"), _free_port()
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    # the stub is linked with libpython: it must find the one of the Python that made the environment
    libraries = f"{libdir}:{packages}/nvidia_pytriton.libs"
    options = {
        "model-repository": folder / "models",
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": 0,
        "allow-metrics": 0,
        "exit-on-error": 0,
    }
    return Peer(
        command=[str(server / "bin" / "tritonserver"), *(f"--{key}={value}" for key, value in options.items())],
        environ=_environ(where, folder, LD_LIBRARY_PATH=libraries, PYTHONPATH=packages),
        folder=folder,
        port=port,
        ready="/v2/health/ready",
    )


def _running(peer: Peer) -> Iterator[Peer]:
    try:
        peer.start()
        yield peer
    finally:
        peer.end()


@dataclass
class Line:
    """A node with engines and a rule, and the PACS (a second node) that its results go to."""

    node: Any
    pacs: Any
    ours: Catalog
    theirs: Catalog
    wait_for: Callable[[Callable[[], object], float, str], None]

    def jobs(self, study: str) -> list[Job]:
        """Of the study, newest first."""
        return list(self.ours.queue.jobs(study_instance_uid=study))

    def arrived(self, study: str) -> list[StoredInstance]:
        """What the PACS has of the study."""
        return list(self.theirs.index.instances(Level.STUDY, {"StudyInstanceUID": [study]}))

    def settle(self, study: str, timeout_s: float) -> None:
        """Until the study was routed and nothing of it is under way."""
        self.wait_for(lambda: self._at_rest(study), timeout_s, f"{study}; log:\n{self.node.tail()}")

    def _at_rest(self, study: str) -> bool:
        queue = self.ours.queue
        return (
            bool(queue.verdicts(study))
            and not any(activity.study_instance_uid == study for activity in queue.open_studies())
            and all(job.state in JOB_ENDS for job in queue.jobs(study_instance_uid=study))
            and all(sent.state in DELIVERY_ENDS for sent in queue.deliveries(study_instance_uid=study))
        )


@pytest.fixture
def line(
    running_node: Callable[..., Any], wait_for: Callable[..., None], tmp_path: Path
) -> Iterator[Callable[..., Line]]:
    """`line(rule, engines, **settings)`: a PACS, and a node with that rule file that knows it as the sender PACS."""
    opened: list[Catalog] = []

    def start(rule: Path, engines: Mapping[str, Any], **settings: Any) -> Line:
        rules = tmp_path / "rules"
        rules.mkdir()
        shutil.copy(rule, rules)
        pacs = running_node("pacs", ae_titles=["PACS"], engines={}, jobs={"workers": 0})
        node = running_node(
            "node",
            rules_dir=str(rules),
            engines=dict(engines),
            destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port}},
            **{"completion": {"quiet_s": 0.5}, **settings},
        )
        opened.extend(open_catalog(one.data_dir, SystemClock(), NO_RESERVE) for one in (node, pacs))
        return Line(node, pacs, opened[-2], opened[-1], wait_for)

    yield start
    for catalog in opened:
        catalog.close()


@pytest.fixture
def send(tool: Callable[[str], str]) -> Callable[[Line, Path], None]:
    """`send(line, folder)`: its files to the node as the PACS, with dcmtk."""

    def to(line: Line, folder: Path) -> None:
        words = ["-aet", "PACS", "-aec", "DICOM_NODE", "127.0.0.1", str(line.node.dicom_port), "+sd", "+r"]
        subprocess.run([tool("storescu"), *words, str(folder)], check=True, capture_output=True, timeout=120)

    return to
