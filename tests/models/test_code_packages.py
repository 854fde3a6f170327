"""Trust `code`: Python of a package runs only when the node's settings name its digest, and then confined."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dicom_node.config import EngineSettings, JobSettings
from dicom_node.demo.packages import ct_package
from dicom_node.errors import EngineError, PackageError
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.grid import ModelGrid
from dicom_node.models.importing import import_package
from dicom_node.models.library import Library
from dicom_node.models.package import ModelPackage, load_package
from dicom_node.models.report import package_report, self_test
from dicom_node.models.runtime import Runtime
from dicom_node.models.runtime_link import Limits
from dicom_node.models.segment import volume_job

CODE = """
from dataclasses import dataclass
import torch

@dataclass
class Options:
    outputs: int

class Thresholds(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.options = Options(outputs)
        self.levels = torch.nn.Parameter(torch.zeros(outputs))
    def forward(self, batch):
        BODY
        return -(batch - self.levels.view(1, -1, 1, 1, 1)).abs()
"""
LEVELS = (-1.0, -0.4, 0.2, 0.8)

Make = Callable[..., ModelPackage]


# what a network may not do, or does wrong
FAULTS = {
    "open('/tmp/dicom-node-code-was-here', 'w')": "PermissionError",
    "import socket; socket.socket()": "Address family not supported",
    "import os; os.fork()": "PermissionError",
    "assert False, 'the reason'": "AssertionError: the reason",
    "return None": "tensor",
}
NO_PYTHON, NO_MODULE = "this is no Python", "import nothing_of_this_name"


@pytest.fixture
def make(tmp_path: Path, write_package: Any) -> Make:
    """A package whose network is its own Python: each voxel takes the label of the nearest level."""

    def written(body: str = "pass", python: str = CODE, **changed: Any) -> ModelPackage:
        folder = tmp_path / "package"
        folder.mkdir()
        (folder / "network.py").write_text(python.replace("BODY", body))
        save_file({"levels": torch.tensor(LEVELS)}, folder / "weights.safetensors")
        manifest = ct_package(_digest(folder / "weights.safetensors"))
        del manifest["metrics"]
        manifest |= {"id": "own-python", "trust": "code"}
        manifest["source"] = {
            "format": "python",
            "path": "weights.safetensors",
            "sha256": _digest(folder / "weights.safetensors"),
            "code": {"path": "network.py", "sha256": _digest(folder / "network.py")},
            "network": {"name": "Thresholds", "args": {"outputs": 4}},
            **changed,
        }
        manifest["infer"].update(window=[16] * 3, precision="fp32")
        return load_package(write_package(folder, manifest))

    return written


@pytest.fixture
def runtime() -> Iterator[Callable[[ModelPackage], Runtime]]:
    """A runtime that trusts the code of that package."""
    started: list[Runtime] = []

    def start(package: ModelPackage) -> Runtime:
        started.append(Runtime("cpu", limits=Limits(trusted_code=frozenset({_code(package)}))))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Runtime]:
    """One for every package here whose fault ends no process; no variable keeps it to one thread before its sandbox."""
    trusted = [*(CODE.replace("BODY", body) for body in (*FAULTS, "pass")), NO_PYTHON, NO_MODULE]
    digests = frozenset(hashlib.sha256(python.encode()).hexdigest() for python in trusted)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        one = Runtime("cpu", limits=Limits(trusted_code=digests))
        yield one
        one.close()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _code(package: ModelPackage) -> str:
    return package.manifest.source.code.sha256  # type: ignore[union-attr]


def _tested(trusted: tuple[str, ...]) -> Callable[[ModelPackage], None]:
    def run(package: ModelPackage) -> None:
        self_test(package, "cpu", trusted)

    return run


def _labels(runtime: Runtime, package: ModelPackage) -> Any:
    array = np.random.default_rng(1).integers(-150, 240, (20, 24, 18), dtype=np.int16)
    job = volume_job(package.manifest, ModelGrid.same(array.shape, (3.0, 3.0, 3.0)))  # type: ignore[arg-type]
    job["output"]["labels"] = [label | {"keep": "all", "min_ml": 0} for label in job["output"]["labels"]]
    return runtime.infer(package, array, job=job, timeout_s=90, heartbeat=lambda: None, threads=1).output


def test_pinned_code_runs_and_gives_its_labels(make: Make, runtime: Callable[[ModelPackage], Runtime]) -> None:
    found = _labels(runtime(package := make()), package)
    assert set(np.unique(found)) == {0, 1, 2, 3}


def test_code_that_is_not_pinned_never_runs_and_the_reason_names_the_digest(make: Make, tmp_path: Path) -> None:
    package = make()
    settings = EngineSettings(model=str(package.folder))
    for trusted in ((), ("0" * 64,)):
        engine = LocalModelEngine("own", settings, devices=("cpu",), jobs=JobSettings(trusted_code=trusted))
        with pytest.raises(PackageError, match=f"jobs.trusted_code; read that file, then add {_code(package)}"):
            engine.check()
        engine.close()
    one = Runtime("cpu")
    with pytest.raises(PackageError, match="trusted_code"):
        _labels(one, package)
    with pytest.raises(PackageError, match="trusted_code"):
        one.load(package, timeout_s=9, heartbeat=lambda: None)
    assert one.pid is None  # not even a process
    one.close()


def test_check_and_import_run_it_only_when_it_is_pinned(make: Make, tmp_path: Path) -> None:
    package = make()
    library, trusted = Library(tmp_path / "data" / "models"), (_code(package),)
    with pytest.raises(PackageError, match="trusted_code"):
        package_report(str(package.folder), "cpu")
    told = dict(package_report(str(package.folder), "cpu", trusted_code=trusted))
    assert told["trust"].startswith("code:") and _code(package) in told["code"]
    assert told["self-test"].startswith("passed")
    with pytest.raises(PackageError, match="trusted_code"):
        import_package(library, package.folder, self_test=_tested(()))
    assert library.ids() == ()
    import_package(library, package.folder, self_test=_tested(trusted))
    installed = library.folder(package.manifest.id, package.manifest.version)
    assert (installed / "network.py").read_bytes() == (package.folder / "network.py").read_bytes()
    (installed / "network.py").write_text("raise SystemExit")
    with pytest.raises(PackageError, match=r"network.py: sha256 is"):
        library.load(package.manifest.id, package.manifest.version).check_weights()


def test_code_that_was_changed_after_it_was_read_is_refused(
    make: Make, runtime: Callable[[ModelPackage], Runtime]
) -> None:
    package = make()
    with (package.folder / "network.py").open("a") as file:
        file.write("\n# harmless?\n")
    with pytest.raises(PackageError, match="sha256 differs"):
        _labels(runtime(package), package)


@pytest.mark.parametrize(("body", "says"), FAULTS.items())
def test_pinned_code_is_confined_and_what_it_raises_is_told(body: str, says: str, make: Make, shared: Runtime) -> None:
    with pytest.raises(EngineError, match=says):
        _labels(shared, make(body))
    assert not Path("/tmp/dicom-node-code-was-here").exists()


@pytest.mark.parametrize(
    ("code", "changed", "says"),
    [
        (NO_PYTHON, {}, "SyntaxError"),
        (NO_MODULE, {}, "nothing_of_this_name"),
        (CODE, {"network": {"name": "Options", "args": {}}}, "has no torch.nn.Module called 'Options'"),
        (CODE, {"network": {"name": "Thresholds", "args": {"inputs": 1}}}, "TypeError"),
        (CODE, {"network": {"name": "Thresholds", "args": {"outputs": 5}}}, "do not fit the network"),
    ],
)
def test_code_that_does_not_make_the_network_is_a_reason_and_no_crash(
    code: str, changed: dict[str, Any], says: str, make: Make, shared: Runtime
) -> None:
    with pytest.raises(PackageError, match=says):
        _labels(shared, make(python=code, **changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"code": {"path": "../network.py", "sha256": "0" * 64}}, "inside the package folder"),
        ({"code": {"path": "network.pyc", "sha256": "0" * 64}}, r"\.py"),
        ({"network": {"name": "__import__", "args": {}}}, "name"),
    ],
)
def test_a_manifest_names_a_python_file_of_its_folder_and_a_class(
    changed: dict[str, Any], says: str, make: Make
) -> None:
    with pytest.raises(PackageError, match=says):
        make(**changed)
