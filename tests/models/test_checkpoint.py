"""Checkpoints are read as data: what torch wrote comes back, what a pickle wants done is not done."""

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from dicom_node.errors import PackageError
from dicom_node.models import torch_files
from dicom_node.models.loaders.checkpoint import read_checkpoint, state_dict_of


def network() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    made[1].running_mean += 0.5
    made.pathologies = ["a", "b"]
    made.register_buffer("passing", torch.ones(3), persistent=False)
    return made


def written(value: Any, *, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, lambda s: {"network_weights": s, "epoch": 3}])
def test_a_state_dict_comes_back_wherever_trainers_put_it(nest: Callable[[Any], Any], zipped: bool) -> None:
    expected = network().state_dict()
    found = read_checkpoint(written(nest(expected), zipped=zipped), "x")
    assert same(state_dict_of(found, "x"), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_becomes_its_weights_and_plain_attributes(zipped: bool) -> None:
    made = network()
    found = read_checkpoint(written(made, zipped=zipped), "x")
    assert same(state_dict_of(found, "x"), made.state_dict())  # without the buffer that is not persistent
    assert found["class"] == "torch.nn.modules.container.Sequential"
    assert found["attributes"]["pathologies"] == ["a", "b"]


@pytest.mark.parametrize("zipped", [True, False])
def test_values_beside_the_weights_come_back_plain(zipped: bool) -> None:
    shared = torch.arange(12.0)
    value = {
        "scalar": np.float64(2.5),
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "axes": (0, 1, 2),
        "names": {"a", "b"},
        "size": torch.Size([2, 3]),
        "table": collections.defaultdict(list, {"k": [1, None, True]}),
        "device": torch.device("cpu"),
        "path": Path("/etc/passwd"),
        "transposed": shared.reshape(3, 4).T,
        "part": shared[4:6],
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "optimizer_state": torch.optim.Adam(network().parameters()).state_dict(),
    }
    found = read_checkpoint(written(value, zipped=zipped), "x")
    assert found["scalar"] == 2.5 and isinstance(found["scalar"], float)
    assert found["array"].tolist() == [[0, 1, 2], [3, 4, 5]] == found["fortran"].tolist()
    assert (found["axes"], sorted(found["names"]), list(found["size"])) == ((0, 1, 2), ["a", "b"], [2, 3])
    assert found["table"] == {"k": [1, None, True]}
    assert "device" not in found and "path" not in found  # objects of other classes are left out
    for name in ("transposed", "part", "bf16", "parameter", "empty"):
        assert torch.equal(found[name], value[name]) and found[name].dtype == value[name].dtype
    assert "optimizer_state" not in found


def test_safetensors_come_back() -> None:
    expected = network().state_dict()
    assert same(dict(sorted(read_checkpoint(save(expected), "x").items())), dict(sorted(expected.items())))


class _Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["value", "key", "state"])
def test_nothing_a_pickle_names_is_called(tmp_path: Path, where: str, zipped: bool) -> None:
    trap = tmp_path / "trap"
    evil = _Evil(os.mkdir, str(trap))
    holder = network()
    value: Any = {"value": {"a": evil}, "key": {evil: 1}, "state": holder}[where]
    holder.hook = evil
    with pytest.raises(PackageError, match=r"x: names posix\.mkdir, which no weights need; nothing was executed"):
        read_checkpoint(written(value, zipped=zipped), "x")
    assert not trap.exists()


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, open])
def test_builtins_that_run_things_are_not_reached(function: Any) -> None:
    with pytest.raises(PackageError, match="nothing was executed"):
        read_checkpoint(written({"a": _Evil(function, "1")}, zipped=True), "x")


def test_a_function_nobody_warned_of_is_not_called_either() -> None:
    made = read_checkpoint(written({"a": _Evil(collections.Counter, "aab"), "b": 1}, zipped=True), "x")
    assert made == {"b": 1}


def repacked(content: bytes, name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip with one entry's content replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, data if entry.endswith(name) else old.read(entry))
    return file.getvalue()


def pickled_tensor(shape: tuple[int, ...], strides: tuple[int, ...], items: int) -> bytes:
    """A data.pkl that claims a tensor of any size over storage 0."""
    numbers = b"".join(
        b"(" + b"".join(b"L%dL\n" % n for n in sizes) + b"t" for sizes in (shape, strides)
    )  # marks and decimals: protocol 0
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuL%dL\ntQ" % items
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


@pytest.mark.parametrize(
    ("shape", "strides", "items", "why"),
    [
        ((2, 2), (2, 1), 4, None),
        ((10**12,), (0,), 4, "claims 1000000000000 values, the file has 4"),
        ((10**6, 10**6), (0, 0), 4, "claims"),
        ((4,), (2,), 4, "claims 4 values"),
        ((4,), (1,), 10**12, "claims 4000000000000 bytes of values and holds 16"),
        ((-1,), (1,), 4, "impossible sizes"),
        ((2, 2), (1,), 4, "impossible sizes"),
    ],
)
def test_sizes_that_the_bytes_do_not_fill_are_refused(
    shape: tuple[int, ...], strides: tuple[int, ...], items: int, why: str | None
) -> None:
    content = written({"w": torch.arange(4.0)}, zipped=True)
    forged = repacked(content, "data.pkl", pickled_tensor(shape, strides, items))
    if why is None:
        assert read_checkpoint(forged, "x")["w"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
        return
    with pytest.raises(PackageError, match=why):
        read_checkpoint(forged, "x")


def test_a_pickle_that_grows_when_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "_MAX_NODES", 20_000)  # the same, sooner
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    deep: list[Any] = []
    for _ in range(150):
        deep = [deep]
    for value, why in ((bomb, "holds more than"), (deep, "nested deeper")):
        with pytest.raises(PackageError, match=why):
            read_checkpoint(written({"a": value}, zipped=True), "x")
    content = written({"w": torch.arange(4.0)}, zipped=True)
    quoted = b"\x80\x02}S'\\h'\n0."
    with pytest.raises(PackageError, match="does not write"):
        read_checkpoint(repacked(content, "data.pkl", quoted), "x")
    huge_memo = b"\x80\x02}r\xff\xff\xff\x7f."
    with pytest.raises(PackageError, match="counts its values"):
        read_checkpoint(repacked(content, "data.pkl", huge_memo), "x")
    long_claim = b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x."
    with pytest.raises(PackageError, match="no checkpoint that can be read"):
        read_checkpoint(repacked(content, "data.pkl", long_claim), "x")


def test_files_that_are_no_checkpoint_are_refused_with_a_reason() -> None:
    content = written({"w": torch.zeros(1000)}, zipped=True)
    legacy = written({"w": torch.zeros(1000)}, zipped=False)
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    for data, why in (
        (b"", "no file of torch.save"),
        (b"hello world", "no file of torch.save"),
        (content[: len(content) // 2], "no checkpoint"),
        (legacy[:-100], "claims 1000 values"),
        (legacy[:50], "cut off"),
        (pickle.dumps({"w": 1}), "no file of torch.save"),
        (repacked(content, "data/0", b"\0" * 4000, zipfile.ZIP_DEFLATED), "compressed"),
        (repacked(content, "byteorder", b"big"), "big-endian"),
        (script.getvalue(), "TorchScript archive"),
        (written([1, 2], zipped=True), "holds no mapping"),
        (struct.pack("<Q", 4) + b"{}  x", "no safetensors"),
        (struct.pack("<Q", 2**40) + b"{}", "no file of torch.save"),
    ):
        with pytest.raises(PackageError, match=f"x: .*{why}"):
            read_checkpoint(data, "x")
    with pytest.raises(PackageError, match="holds no state dict under 'no'"):
        state_dict_of({"yes": {"w": torch.zeros(1)}}, "x", "no")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_read_or_refused_and_nothing_else(zipped: bool) -> None:
    content = written({"m": network(), "a": np.arange(5), "s": np.float64(2), "n": {1, 2}}, zipped=zipped)
    start = content.index(b"data.pkl") if zipped else 0
    rng = np.random.default_rng(4)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(start, start + 2000, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        try:
            read_checkpoint(bytes(damaged), "x")
        except PackageError:
            refused += 1
    assert 50 < refused < 300
