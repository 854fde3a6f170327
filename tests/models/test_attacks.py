"""Packages made to do harm: nothing of them is executed, nothing hangs, and each is refused with a reason."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from dicom_node.demo.packages import ct_package
from dicom_node.errors import EngineError, EngineTimeout, EngineUnavailable, PackageError
from dicom_node.models.grid import ModelGrid
from dicom_node.models.loaders import load_module
from dicom_node.models.package import load_package
from dicom_node.models.runtime import Limits, Runtime
from dicom_node.models.segment import volume_job

SIDE = 16
NETWORK: dict[str, Any] = {
    "name": "UNet",
    "args": {"spatial_dims": 3, "in_channels": 1, "out_channels": 4, "channels": [4, 8], "strides": [2]},
}


class Payload:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that an attack which is executed would make; it is not there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@contextlib.contextmanager
def _quick_and_small(seconds: float = 10.0, mebibytes: int = 300) -> Iterator[None]:
    started, before = time.monotonic(), psutil.Process().memory_info().rss
    yield
    assert time.monotonic() - started < seconds
    assert psutil.Process().memory_info().rss - before < mebibytes << 20


def _refused(path: Path, format: str, match: str, **more: Any) -> None:
    source = {"format": format, "path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if format == "state_dict":
        source["network"] = NETWORK  # type: ignore[assignment]
    with _quick_and_small(), pytest.raises((PackageError, EngineError), match=match):
        load_module(path, {**source, **more})


# --- pickles


def _in_archive(pickled: bytes) -> bytes:
    """What torch.save writes, around another pickle."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_end_of_file()
    return buffer.getvalue()


def _legacy(pickled: bytes) -> bytes:
    """What torch.save wrote before it wrote archives."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(one, 2) for one in head) + pickled + pickle.dumps([], 2)


@pytest.mark.parametrize("wrap", [_in_archive, _legacy, bytes], ids=["archive", "legacy", "bare"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_calls_os_system(
    wrap: Callable[[bytes], bytes], nested: bool, canary: Path, tmp_path: Path
) -> None:
    payload: Any = Payload(f"touch {canary}")
    path = tmp_path / "weights.pt"
    path.write_bytes(wrap(pickle.dumps({"state_dict": {"a": payload}} if nested else payload, 2)))
    _refused(path, "state_dict", "nothing was executed|no checkpoint")


@pytest.mark.parametrize(
    "function",
    [b"builtins\neval", b"builtins\nexec", b"torch\nload", b"torch.hub\nload", b"torch.serialization\nos.system"],
)
def test_a_pickle_that_calls_another_function(function: bytes, canary: Path, tmp_path: Path) -> None:
    command = f"__import__('os').system('touch {canary}')".encode()
    path = tmp_path / "weights.pt"
    path.write_bytes(
        _in_archive(b"\x80\x02c" + function + b"\n(X" + struct.pack("<I", len(command)) + command + b"tR.")
    )
    _refused(path, "state_dict", "nothing was executed|holds no mapping")


class Evil(torch.nn.Module):
    """A module with a class of its own, which runs when it is unpickled."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 4, 3)
        self.payload = Payload(command)


def test_a_whole_module_with_a_call_inside(canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(Evil(f"touch {canary}"), path)
    _refused(path, "state_dict", "nothing was executed")


# --- headers and archives that claim more than they are


def _tensor(shape: tuple[int, ...], path: Path) -> None:
    """A checkpoint of four bytes that says it is larger."""
    torch.save({"a": torch.zeros(1).expand(shape)}, path)


def _safetensors(header: dict[str, Any] | bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ABSURD = {
    "length beyond the file": _safetensors(b"{}", 2**63 - 1),
    "negative length": _safetensors(b"{}", 2**64 - 1),
    "terabytes": _safetensors({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}}),
    "offsets beyond the file": _safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**60]}}),
    "offsets backwards": _safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
    "overflow": _safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]}}),
    "negative shape": _safetensors({"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}),
    "no object": _safetensors(b"[1, 2]"),
    "no shape": _safetensors({"a": {"dtype": "F32", "shape": "big", "data_offsets": [0, 64]}}),
    "deep": _safetensors(b"[" * 100_000 + b"]" * 100_000),
    "empty": b"",
    "short": b"\x01\x02",
}


@pytest.mark.parametrize("content", list(ABSURD.values()), ids=list(ABSURD))
def test_an_absurd_header_of_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    _refused(path, "state_dict", "weights.safetensors")


def test_a_tensor_that_says_it_is_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    _tensor((10**6, 10**6), path)
    _refused(path, "state_dict", "weights.pt")


def _zip(path: Path, entries: list[tuple[str, bytes]], *, comment: bytes = b"", deflated: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        archive.comment = comment


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as entry:
        for _ in range(300):
            entry.write(bytes(1 << 20))


def _overlapping(path: Path) -> None:
    """Many entries over the same megabyte."""
    _zip(path, [("archive/data.pkl", bytes(1 << 20))])
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entry = content[start:end]
    tail = bytearray(content[end:])
    struct.pack_into("<HHII", tail, 8, 3000, 3000, 3000 * len(entry), start)
    path.write_bytes(content[:start] + entry * 3000 + bytes(tail))


def _many(path: Path) -> None:
    _zip(path, [(f"archive/data/{k}", b"") for k in range(20_001)])


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "bomb": _bomb,
    "overlapping": _overlapping,
    "many entries": _many,
    "leads elsewhere": lambda path: _zip(path, [("archive/../../../tmp/data.pkl", b"x")]),
    "absolute": lambda path: _zip(path, [("/etc/data.pkl", b"x")]),
    "comment": lambda path: _zip(path, [("archive/data.pkl", b"x")], comment=b"PK\x05\x06" + bytes(18)),
    "data before": lambda path: (_zip(path, [("a/data.pkl", b"x")]), path.write_bytes(b"x" * 64 + path.read_bytes()))[
        0
    ],
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One of ARCHIVES as a file, made once."""
    folder = tmp_path_factory.mktemp("archives")

    def made(name: str) -> Path:
        path = folder / name.replace(" ", "_")
        if not path.exists():
            ARCHIVES[name](path)
        return path

    return made


@pytest.mark.parametrize("kind", list(ARCHIVES))
@pytest.mark.parametrize(("format", "name"), [("state_dict", "w.pt"), ("torchscript", "w.ts"), ("pt2", "w.pt2")])
def test_an_archive_that_is_none_of_torchs(
    kind: str, format: str, name: str, archives: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(archives(kind).read_bytes())
    _refused(path, format, name)


# --- exported graphs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small exported network with a free batch size."""
    path = tmp_path_factory.mktemp("exported") / "n.pt2"
    module = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1)).eval()
    program = torch.export.export(
        module, (torch.zeros(2, 1, 8, 8, 8),), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=8)},)
    )
    torch.export.save(program, path)
    return path.read_bytes()


def _changed(content: bytes, path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write an exported network's archive anew after a change of its entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    change(entries)
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, entry in entries.items():
        if name not in (".data/version", ".data/serialization_id"):
            writer.write_record(name, entry, len(entry))
    writer.write_end_of_file()
    path.write_bytes(buffer.getvalue())


MODEL = "models/model.json"
CONFIG = "data/weights/model_weights_config.json"


def _json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def changed(entries: dict[str, bytes]) -> None:
        content = json.loads(entries[name])
        change(content)
        entries[name] = json.dumps(content).encode()

    return changed


def _graph(content: Any) -> Any:
    return content["graph_module"]["graph"]


CODE = "__import__('os').system('touch CANARY')"


def _renamed_input(content: Any) -> None:
    text = json.dumps(content).replace('"input"', json.dumps(f"x={CODE}"))
    content.clear()
    content.update(json.loads(text))


def _pickled_weight(content: Any) -> None:
    next(iter(content["config"].values()))["use_pickle"] = True


def _giant(content: Any) -> None:
    next(iter(content["config"].values()))["tensor_meta"]["sizes"] = [{"as_int": 10**7}] * 2


def _elsewhere(content: Any) -> None:
    next(iter(content["config"].values()))["path_name"] = "../../models/model.json"


def _renamed_parameter(content: Any) -> None:
    spec = content["graph_module"]["signature"]["input_specs"][0]
    spec["parameter"]["parameter_name"] = f'0", {CODE}, "'


def _nested_in_a_class(content: Any) -> None:
    spec = [1, {"type": "os.system", "context": json.dumps("touch CANARY"), "children_spec": []}]
    content["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)


def _custom_object(entries: dict[str, bytes]) -> None:
    config = {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}
    entries["data/constants/model_constants_config.json"] = json.dumps(config).encode()
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Payload("touch CANARY"))


def _size(text: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        _graph(content)["tensor_values"]["input"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


Change = Callable[[dict[str, bytes]], None]
NO_OPERATION, STRANGE = "no operation on tensors", "strange (name|text)"
NO_ARITHMETIC, PLAIN = "no arithmetic", "no plain tensors"
GRAPHS: dict[str, tuple[str, Change]] = {
    "function": (
        NO_OPERATION,
        _json(MODEL, lambda c: _graph(c)["nodes"][0].update(target="torch.serialization.os.system")),
    ),
    "function of torch": (NO_OPERATION, _json(MODEL, lambda c: _graph(c)["nodes"][0].update(target="torch.load"))),
    "file": (
        NO_OPERATION,
        _json(MODEL, lambda c: _graph(c)["nodes"][0].update(target="torch.ops.aten.from_file.default")),
    ),
    "library": (
        NO_OPERATION,
        _json(MODEL, lambda c: _graph(c)["nodes"][0].update(target="torch.ops.evil.call.default")),
    ),
    "loader": (NO_OPERATION, _json(MODEL, lambda c: _graph(c)["nodes"][0].update(target="torch.ops.load_library"))),
    "size": (NO_ARITHMETIC, _json(MODEL, _size(CODE))),
    "size of attributes": (NO_ARITHMETIC, _json(MODEL, _size("Symbol.__class__.__mro__"))),
    "size in a call": (NO_ARITHMETIC, _json(MODEL, _size(f"Integer({CODE})"))),
    "size for ever": (NO_ARITHMETIC, _json(MODEL, _size("Pow(Integer(9), Integer(99999999999))"))),
    "size of powers": (NO_ARITHMETIC, _json(MODEL, _size("9**9**9**9"))),
    "names": (STRANGE, _json(MODEL, _renamed_input)),
    "node": (STRANGE, _json(MODEL, lambda c: _graph(c)["nodes"][0].update(name=f"x; {CODE}"))),
    "parameters": (STRANGE, _json(MODEL, _renamed_parameter)),
    "nesting": (PLAIN, _json(MODEL, _nested_in_a_class)),
    "named tuples": (
        "named tuples",
        _json(MODEL, lambda c: c["graph_module"].update(treespec_namedtuple_fields={"os.system": {}})),
    ),
    "no graph": ("no network", lambda entries: entries.update({MODEL: b"[]"})),
    "no json": ("no network", lambda entries: entries.update({MODEL: b"{" * 1000})),
    "deep json": ("no network", lambda entries: entries.update({MODEL: b"[" * 200_000})),
    "pickled weight": ("pickled tensor", _json(CONFIG, _pickled_weight)),
    "terabytes": ("larger than the file's data", _json(CONFIG, _giant)),
    "weight elsewhere": ("no tensor", _json(CONFIG, _elsewhere)),
    "compiled": (
        "no part of a graph",
        lambda entries: entries.update({"data/aotinductor/model/model.so": b"\x7fELF" + bytes(64)}),
    ),
    "custom object": ("no tensor", _custom_object),
    "old weights": ("no part of a graph", lambda entries: entries.update({"data/weights/model.pt": b"\x80\x02."})),
}


@pytest.mark.parametrize(("message", "change"), list(GRAPHS.values()), ids=list(GRAPHS))
def test_an_exported_graph_with_more_than_a_graph(
    message: str, change: Change, exported: bytes, canary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "n.pt2"

    def aimed(entries: dict[str, bytes]) -> None:
        change(entries)
        entries[MODEL] = entries[MODEL].replace(b"CANARY", str(canary).encode())

    _changed(exported, path, aimed)
    _refused(path, "pt2", message)


def test_pickled_sample_inputs_and_guards_are_left_unread(exported: bytes, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "n.pt2"

    def change(entries: dict[str, bytes]) -> None:  # which torch.export.load would run
        entries["data/sample_inputs/model.pt"] = _in_archive(pickle.dumps(Payload(f"touch {canary}"), 2))
        content = json.loads(entries[MODEL])
        content["guards_code"] = [CODE.replace("CANARY", str(canary))]
        entries[MODEL] = json.dumps(content).encode()

    _changed(exported, path, change)
    source = {"format": "pt2", "path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with torch.inference_mode():
        assert load_module(path, source)(torch.zeros(3, 1, 8, 8, 8)).shape == (3, 4, 8, 8, 8)


# --- ONNX


def _onnx(path: Path, *, location: str = "", domain: str = "", dims: tuple[int, ...] = (4,)) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, (4,), np.ones(4, np.float32).tobytes(), raw=True)
    if location:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    del weight.dims[:]
    weight.dims.extend(dims)
    node = helper.make_node("Add" if not domain else "Evil", ["x", "w"], ["y"], domain=domain)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets, ir_version=9)))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "beside.data"])
def test_onnx_weights_in_another_file(location: str, tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    (tmp_path / "beside.data").write_bytes(bytes(16))
    _onnx(path, location=location)
    _refused(path, "onnx", "another file")


def test_onnx_operations_of_others_and_giants(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    _onnx(path, domain="evil.domain")
    _refused(path, "onnx", "not ONNX's own")
    _onnx(path, dims=(10**6, 10**6))
    _refused(path, "onnx", "larger than the file's data")


# --- the folder


TAGS = ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system", "!evil"]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags(tag: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(f"schema: {tag} ['touch {canary}']\ntask: segmentation\n", encoding="utf-8")
    with pytest.raises(PackageError, match="plain YAML"):
        load_package(tmp_path)


@pytest.mark.parametrize("path", ["../w.safetensors", "/tmp/w.safetensors", "a/../../w.safetensors"])
def test_a_path_out_of_the_package(path: str, tmp_path: Path, write_package: Any) -> None:
    manifest = ct_package("0" * 64)
    manifest["source"]["path"] = path
    with pytest.raises(PackageError, match="inside the package folder"):
        load_package(write_package(tmp_path / "package", manifest))


def test_links_and_pipes_in_the_place_of_weights(tmp_path: Path) -> None:
    outside, package = tmp_path / "outside.safetensors", tmp_path / "package"
    package.mkdir()
    save_file({"a": torch.zeros(2)}, outside)
    link, pipe = package / "link.safetensors", package / "pipe.safetensors"
    link.symlink_to(outside)
    os.mkfifo(pipe)
    source = {"format": "state_dict", "network": NETWORK, "sha256": hashlib.sha256(outside.read_bytes()).hexdigest()}
    for path, message in ((link, "out of the package folder"), (pipe, "no plain file")):
        with _quick_and_small(), pytest.raises(PackageError, match=message):
            load_module(path, {**source, "path": path.name})


# --- scripted networks, which say what they like: in the confined process, as real packages


class Writes(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return torch.cat([x, x, x, x], 1)


class Maps(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mapped = torch.from_file(self.path, shared=True, size=4)
        mapped.fill_(7.0)
        return torch.cat([x, x, x, x], 1) + mapped.sum()


class Reads(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x, x, x], 1) + torch.from_file(self.path, shared=False, size=4).sum()


class Loops(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() < 1e30):
            x = x * 1.0
        return x


class Asserts(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] % 2 == 1, "only odd sizes"
        return x


class Warns(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warnings.warn('{"level": "ERROR", "message": "forged"}')  # noqa: B028
        return torch.cat([x, x, x, x], 1)


class Swallows(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x, x, x], 1) + torch.ones([10000000, 1000000]).sum()


class Honest(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x, x, x], 1)


def _scripted(module: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    one = Runtime("cpu", limits=Limits(hang_s=2.0))
    yield one
    one.close()


@pytest.fixture
def run(runtime: Runtime, tmp_path: Path, write_package: Any) -> Callable[..., Any]:
    """Run a saved graph as a segmentation package."""

    def asked(
        content: bytes,
        format: str = "torchscript",
        name: str = "n.ts",
        folder: str = "",
        by: Runtime = runtime,
        timeout_s: float = 40.0,
    ) -> Any:
        digest = hashlib.sha256(content).hexdigest()
        place = tmp_path / folder / digest[:8]
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        manifest = ct_package(digest)
        manifest.update(trust="graph", source={"format": format, "path": name, "sha256": digest})
        manifest["infer"].update(window=[SIDE] * 3, precision="fp32")
        package = load_package(write_package(place, manifest))
        job = volume_job(package.manifest, ModelGrid.same((SIDE, SIDE, SIDE), (3.0, 3.0, 3.0)))  # type: ignore[arg-type]
        array = np.zeros((SIDE, SIDE, SIDE), np.int16)
        return by.infer(package, array, job=job, timeout_s=timeout_s, heartbeat=lambda: None, threads=1)

    return asked


def test_a_network_that_writes_a_file(run: Callable[..., Any], canary: Path, tmp_path: Path) -> None:
    run(_scripted(Writes(str(canary))))  # its operation does not tell that it failed
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(16))
    with pytest.raises(EngineError):
        run(_scripted(Maps(str(precious))))
    assert precious.read_bytes() == bytes(16)


def test_a_network_that_reads_what_the_node_stores(run: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    stored, beside = data / "archive" / "object", tmp_path / "beside"
    stored.parent.mkdir(parents=True)
    for path in (stored, beside):
        path.write_bytes(bytes(16))
    (tmp_path / "packages").mkdir()
    bound = Runtime("cpu", limits=Limits(hang_s=20.0, models_dir=str(data / "models")))
    try:
        assert run(_scripted(Reads(str(beside))), folder="packages", by=bound).output.shape == (SIDE, SIDE, SIDE)
        with pytest.raises(EngineError, match=r"Permission denied|Operation not permitted|unable to open"):
            run(_scripted(Reads(str(stored))), folder="packages", by=bound)
    finally:
        bound.close()


def test_a_network_that_never_ends_is_killed_and_the_next_one_runs(run: Callable[..., Any]) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError):
        run(_scripted(Loops()))
    assert time.monotonic() - started < 35
    run(_scripted(Honest()))
    with pytest.raises(EngineTimeout, match=r"worked on it for 0\.5 s"):
        run(_scripted(Loops()), folder="again", timeout_s=0.5)
    with pytest.raises(EngineUnavailable, match="hung"):  # nobody waits for it any more, and it is in the way
        run(_scripted(Honest()), folder="innocent")
    assert run(_scripted(Honest())).output.shape == (SIDE, SIDE, SIDE)


def test_a_network_that_asserts_is_told_by_its_last_line_and_ends_nothing(
    run: Callable[..., Any], runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    run(_scripted(Honest()))
    before = runtime.pid
    with pytest.raises(EngineError, match="AssertionError: only odd sizes") as raised:
        run(_scripted(Asserts()))
    assert "\n" not in str(raised.value)
    run(_scripted(Warns()))
    assert runtime.pid == before
    assert "forged" not in capfd.readouterr().err


def test_a_network_that_wants_terabytes(run: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="memory"):
        run(_scripted(Swallows()))
    assert run(_scripted(Honest())).output.shape == (SIDE, SIDE, SIDE)


def test_a_network_whose_archive_holds_a_pickle(run: Callable[..., Any], canary: Path) -> None:
    content = _scripted(Honest())
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            short = name.split("/", 1)[1]
            entry = pickle.dumps(Payload(f"touch {canary}"), 2) if short == "data.pkl" else archive.read(name)
            if short not in ("version", ".data/version", ".data/serialization_id"):
                writer.write_record(short, entry, len(entry))
    writer.write_end_of_file()
    with pytest.raises(PackageError, match=r"n\.ts"):
        run(buffer.getvalue())


def _onnx_graph(nodes: list[Any], initializers: list[Any]) -> bytes:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1, SIDE, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))


def test_an_onnx_graph_that_wants_terabytes(run: Callable[..., Any]) -> None:
    helper = pytest.importorskip("onnx.helper")
    shape = helper.make_tensor("s", 7, [2], [10**7, 10**6])
    content = _onnx_graph(
        [
            helper.make_node("ConstantOfShape", ["s"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["r"]),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ],
        [shape],
    )
    with pytest.raises((EngineError, PackageError), match="memory"):
        run(content, "onnx", "n.onnx")
    assert run(_scripted(Honest())).output.shape == (SIDE, SIDE, SIDE)
