"""Every fuzz target on what it begins with and on what was once found; and a short look for more, always the same."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, Target

HERE = Path(__file__).parent
REGRESSIONS = sorted(path for path in (HERE / "regressions").glob("*/*"))
BY_NAME = {target.name: target for target in TARGETS}
CORPUS = os.environ.get("DICOM_NODE_CORPUS")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_target_keeps_its_promises_on_its_seeds_cut_anywhere(target: Target) -> None:
    seeds = list(target.seeds(Path(CORPUS) if CORPUS else None))
    assert seeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that are none
        for seed in seeds:
            target.run(seed)
        for seed in seeds[:3]:
            for length in range(0, len(seed), max(len(seed) // (40 // target.cost + 1), 1)):
                target.run(seed[:length])


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_once_found_is_mended(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BY_NAME[path.parent.name].run(path.read_bytes())


# runs the fuzzer with one target more, which breaks its promise
WITH_A_BROKEN_ONE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import atheris
with atheris.instrument_imports(include=["dicom_node"]):
    import fuzz_targets as known
def run(data):
    assert b"STUDY" not in data
known.TARGETS += (known.Target(name="broken", run=run, seeds=lambda _: [b"a STUDY"]),)
sys.argv = [sys.argv[1] + "/run.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.timeout(300)  # a loaded machine
def test_in_a_short_time_the_fuzzer_finds_what_is_broken_and_nothing_else(tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        pytest.skip("needs atheris (its wheels are for Linux and Python up to 3.13)")
    words = ["--runs", "100", "--seed", "1", "--findings", str(tmp_path / "findings")]
    ended = subprocess.run(
        [sys.executable, "-c", WITH_A_BROKEN_ONE, str(HERE), *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert ended.returncode == 1, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert f"{len(TARGETS) + 1} targets, 1 with a finding" in ended.stdout, ended.stdout[-8000:]
    (found,) = (tmp_path / "findings" / "broken").glob("crash-*")
    assert found.read_bytes() == b"a STUDY"
    for target in TARGETS:
        (told,) = (line for line in ended.stdout.splitlines() if line.startswith(f"{target.name} "))
        assert int(told.split()[3]) > 10, f"the fuzzer sees nothing of the code: {told}"
