"""Packages made to hang, crash or deceive whoever looks at them: only the process that reads them suffers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from dicom_node.errors import PackageError
from dicom_node.models import pickles
from dicom_node.models.describing import describe_apart
from dicom_node.models.torch_files import read_pickled

XRV = "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"


def _checkpoint(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", b"\0" * 4)
    return path


def _doubled(times: int) -> bytes:
    """Put (x, x) of (x, x) of ... into the memo, `times` deep: to hash or spell it takes 2 ** times steps."""
    steps = [b"\x80\x02K\x01\x85q\x000"]
    steps += [b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0" for n in range(times)]
    return b"".join(steps)


def test_keys_that_take_years_to_compare_end_at_the_deadline(tmp_path: Path) -> None:
    _checkpoint(tmp_path / XRV, _doubled(60) + b"}h\x3cK\x01s.")
    started = time.monotonic()
    with pytest.raises(PackageError, match="reading it took longer than 3 s"):
        describe_apart(tmp_path, deadline_s=3)
    assert time.monotonic() - started < 30


def test_nesting_that_overflows_the_stack_ends_only_the_reader(tmp_path: Path) -> None:
    _checkpoint(tmp_path / XRV, b"\x80\x02}K\x01" + b"\x85" * 3_000_000 + b"K\x01s.")
    with pytest.raises(PackageError, match="ended the process that did so"):
        describe_apart(tmp_path)


def test_what_a_format_says_comes_back_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no model package is recognised here"):
        describe_apart(tmp_path)


def test_python_in_the_working_folder_is_never_imported(tmp_path: Path) -> None:
    for module in ("torch", "numpy", "yaml", "secrets", "dicom_node"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / module)!r} + '.ran', 'w')")
    (tmp_path / "node.yaml").write_text(f"data_dir: {tmp_path / 'data'}")
    words = ["models", "check", "demo-cxr-findings", "--config", str(tmp_path / "node.yaml")]
    command = [str(Path(sys.executable).parent / "dicom-node"), *words]  # as it is installed
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.glob("*.ran")) == []


def test_a_pickle_cannot_change_the_functions_that_read_it() -> None:
    state = b"N}X\x0c\x00\x00\x00__defaults__X\x06\x00\x00\x00latin1\x85s\x86b."
    read = pickles.load_pickle(b"\x80\x02c_codecs\nencode\n" + state, {})
    assert isinstance(read, pickles._Function)
    assert pickles._encode.__defaults__ == ("",)


def test_sizes_without_end_are_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    number = ((1 << 32_000) - 1).to_bytes(4001, "little")
    pickled = b"\x80\x02\x8b" + len(number).to_bytes(4, "little") + number + b"q\x000"
    pickled += b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    pickled += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(h\x00h\x00t(h\x00h\x00t\x89NtR."
    with pytest.raises(PackageError, match="impossible sizes"):
        read_pickled(_checkpoint(tmp_path / "a.pt", pickled).read_bytes(), "a.pt")
