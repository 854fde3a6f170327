"""Fixtures of the pipeline's tests."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KIT = Path(__file__).with_name("kit.py")


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """`kit.py`: the bench and its fakes; test files do not import each other, so it comes as a fixture."""
    spec = importlib.util.spec_from_file_location("pipeline_kit", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(kit: ModuleType, tmp_path: Path) -> Iterator[Any]:
    """A node's data folder with a catalog, an archive, a queue and fakes for the rest."""
    made = kit.Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def killed_at() -> Iterator[Callable[[Path, str, str], int]]:
    """`killed_at(folder, role, point)`: a process works on that data folder and kills itself there; its exit code."""
    command = [sys.executable, str(KIT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(folder: Path, role: str, point: str) -> int:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(f"{folder}\t{role}\t{point}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()
        server.wait(timeout=30)
