"""The same network in every format: the same logits, the same labels; and what a loader cannot take, said plainly."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks import nets
from safetensors.torch import save_file

from dicom_node.demo.packages import ct_package
from dicom_node.errors import PackageError
from dicom_node.models.forward import load_network
from dicom_node.models.grid import ModelGrid
from dicom_node.models.loaders import load_module
from dicom_node.models.loaders.batches import FixedBatch
from dicom_node.models.package import load_package
from dicom_node.models.runtime import Runtime
from dicom_node.models.segment import volume_job

SIDE = 16
UNET: dict[str, Any] = {
    "name": "UNet",
    "args": {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 1,
        "norm": "BATCH",
    },
}
INFER = {"window": [SIDE] * 3, "precision": "fp32"}
FORMATS = {
    "safetensors": "state_dict",
    "pt": "state_dict",
    "nested": "state_dict",
    "scripted": "torchscript",
    "traced": "torchscript",
    "exported": "pt2",
    "exported_any": "pt2",
    "onnx": "onnx",
    "onnx_any": "onnx",
}
SUFFIXES = {"state_dict": ".pt", "torchscript": ".ts", "pt2": ".pt2", "onnx": ".onnx"}


def _onnx(network: torch.nn.Module, path: Path, example: torch.Tensor, *, any_batch: bool) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    axes = {"dynamic_axes": {"images": {0: "batch"}, "logits": {0: "batch"}}} if any_batch else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, which is torch's
        torch.onnx.export(
            network, (example,), path, dynamo=False, input_names=["images"], output_names=["logits"], **axes
        )


def _save(kind: str, network: torch.nn.Module, path: Path) -> None:
    one, two = torch.zeros(1, 1, SIDE, SIDE, SIDE), torch.zeros(2, 1, SIDE, SIDE, SIDE)
    if kind == "safetensors":
        save_file(network.state_dict(), path)
    elif kind in ("pt", "nested"):
        state = network.state_dict()
        torch.save({"epoch": 3, "theirs": state} if kind == "nested" else state, path)
    elif kind in ("scripted", "traced"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are everywhere
            made = torch.jit.script(network) if kind == "scripted" else torch.jit.trace(network, one)
            made.save(str(path))
    elif kind.startswith("exported"):
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if kind == "exported_any" else None
        program = torch.export.export(network, (two if shapes else one,), dynamic_shapes=shapes)
        torch.export.save(program, path)
    else:
        _onnx(network, path, one, any_batch=kind == "onnx_any")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A small UNet with batch norms that do something."""
    torch.manual_seed(5)
    module = nets.UNet(**UNET["args"])
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2.0)
    module.eval()
    with torch.no_grad():  # so that no class wins everywhere
        logits = module(torch.rand(2, 1, SIDE, SIDE, SIDE) * 2 - 1)
        list(module.parameters())[-1].sub_(logits.mean(dim=(0, 2, 3, 4)))
    return module


@pytest.fixture(scope="module")
def saved(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The network in one of FORMATS, as a file."""
    folder = tmp_path_factory.mktemp("formats")

    def file(kind: str) -> Path:
        suffix = ".safetensors" if kind == "safetensors" else SUFFIXES[FORMATS[kind]]
        path = folder / f"{kind}{suffix}"
        if not path.exists():
            _save(kind, network, path)
        return path

    return file


def _source(kind: str, path: Path) -> dict[str, Any]:
    source: dict[str, Any] = {
        "format": FORMATS[kind],
        "path": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    if FORMATS[kind] == "state_dict":
        source["network"] = UNET
    if kind == "nested":
        source["key"] = "theirs"
    return source


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("count", [1, 3])
def test_the_logits_are_the_same_in_every_format(
    kind: str, count: int, network: torch.nn.Module, saved: Callable[[str], Path]
) -> None:
    batch = torch.rand(count, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(count)) * 2 - 1
    path = saved(kind)
    loaded = load_network(str(path), _source(kind, path), INFER, torch.device("cpu"))
    with torch.inference_mode():
        expected, found = network(batch), loaded(batch)
    assert found.dtype == torch.float32 and found.shape == (count, 4, SIDE, SIDE, SIDE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["safetensors", "scripted", "traced", "exported_any"])
def test_half_precision_is_close_where_the_format_allows_it(
    kind: str, network: torch.nn.Module, saved: Callable[[str], Path]
) -> None:
    path = saved(kind)
    loaded = load_network(str(path), _source(kind, path), {**INFER, "precision": "bf16"}, torch.device("cpu"))
    batch = torch.rand(2, 1, SIDE, SIDE, SIDE) * 2 - 1
    with torch.inference_mode():
        error = (network(batch) - loaded(batch)).abs().max()
    assert loaded.precision == "bf16" and 1e-5 < error < 0.1


def test_onnx_runs_in_its_own_precision_on_torchs_threads(saved: Callable[[str], Path]) -> None:
    path = saved("onnx_any")
    loaded = load_network(str(path), _source("onnx_any", path), {**INFER, "precision": "bf16"}, torch.device("cpu"))
    assert loaded.precision == "fp32"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            session = loaded.module.session()  # type: ignore[operator]
            assert session.get_session_options().intra_op_num_threads == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    one = Runtime("cpu")
    yield one
    one.close()


def _labels(runtime: Runtime, folder: Path) -> Any:
    package = load_package(folder)
    array = np.random.default_rng(1).integers(-200, 300, (20, 24, 18), dtype=np.int16)
    job = volume_job(package.manifest, ModelGrid.same(array.shape, (3.0, 3.0, 3.0)))  # type: ignore[arg-type]
    job["output"]["labels"] = [label | {"keep": "all", "min_ml": 0} for label in job["output"]["labels"]]
    return runtime.infer(package, array, job=job, timeout_s=90, heartbeat=lambda: None, threads=1).output


@pytest.fixture(scope="module")
def packaged(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, write_package: Any) -> Any:
    """A segmentation package of one of FORMATS."""

    def make(kind: str) -> Path:
        folder, file = tmp_path_factory.mktemp(kind), saved(kind)
        (folder / file.name).write_bytes(file.read_bytes())
        manifest = ct_package("0" * 64)
        manifest["source"] = _source(kind, file)
        manifest["trust"] = "data" if FORMATS[kind] == "state_dict" else "graph"
        manifest["infer"].update(window=[SIDE] * 3, precision="fp32")
        written: Path = write_package(folder, manifest)
        return written

    return make


@pytest.fixture(scope="module")
def expected_labels(runtime: Runtime, packaged: Any) -> Any:
    """What the safetensors package says."""
    labels = _labels(runtime, packaged("safetensors"))
    assert len(np.unique(labels)) > 2
    return labels


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "safetensors"])
def test_packages_of_every_format_give_the_same_labels_in_the_confined_process(
    kind: str, runtime: Runtime, packaged: Any, expected_labels: Any
) -> None:
    assert np.mean(_labels(runtime, packaged(kind)) == expected_labels) > 0.9999


# --- what does not fit


def test_onnx_without_onnxruntime_names_what_to_install(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("onnx")
    for missing in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(PackageError, match=r"pip install dicom-node\[onnx\]"):
                load_module(path, _source("onnx", path))


def test_a_damaged_archive_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    content = bytearray(saved("exported").read_bytes())
    content[200] ^= 0xFF  # in the first tensor
    path = tmp_path / "n.pt2"
    path.write_bytes(content)
    with pytest.raises(PackageError, match="damaged"):
        load_module(path, {"format": "pt2", "path": "n.pt2", "sha256": hashlib.sha256(content).hexdigest()})


def test_a_key_must_hold_the_weights(saved: Callable[[str], Path]) -> None:
    path = saved("nested")
    with pytest.raises(PackageError, match="ours"):
        load_module(path, {**_source("nested", path), "key": "ours"})
    path = saved("safetensors")
    with pytest.raises(PackageError, match="key"):
        load_module(path, {**_source("safetensors", path), "key": "theirs"})


@pytest.mark.parametrize("kind", ["pt", "scripted", "exported", "onnx"])
def test_a_file_of_another_digest_is_not_loaded(kind: str, saved: Callable[[str], Path]) -> None:
    path = saved(kind)
    with pytest.raises(PackageError, match="sha256 differs"):
        load_module(path, {**_source(kind, path), "sha256": "0" * 64})


@pytest.mark.parametrize("kind", list(SUFFIXES))
@pytest.mark.parametrize("other", ["pt", "scripted", "exported", "onnx", "text", "nothing"])
def test_a_file_of_another_format_is_refused(
    kind: str, other: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    formats = {"pt": "state_dict", "scripted": "torchscript", "exported": "pt2", "onnx": "onnx"}
    if formats.get(other) == kind:
        return
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    content = {"text": b"hello, this is no network\n" * 40, "nothing": b""}
    path = tmp_path / f"network{SUFFIXES[kind]}"
    path.write_bytes(content[other] if other in content else saved(other).read_bytes())
    source = {"format": kind, "path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with pytest.raises(PackageError, match=r"network\."):
        load_module(path, {**source, "network": UNET})


def test_a_network_for_another_shape_is_an_error_and_no_crash(saved: Callable[[str], Path]) -> None:
    from dicom_node.errors import EngineError

    for kind in ("exported", "onnx"):
        path = saved(kind)
        module = load_module(path, _source(kind, path))
        with pytest.raises(EngineError), torch.inference_mode():
            module(torch.zeros(1, 1, 8, 8, 8))


def test_a_fixed_batch_is_filled_up_and_cut_again() -> None:
    sizes = []

    class Inner(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            sizes.append(len(batch))
            return batch * 2

    batch = torch.arange(7.0)[:, None]
    torch.testing.assert_close(FixedBatch(Inner(), 3)(batch), batch * 2)
    assert sizes == [3, 3, 3]


def test_arguments_that_make_a_giant_are_refused_before_it_is_made(saved: Callable[[str], Path]) -> None:
    path = saved("pt")
    source = _source("pt", path)
    source["network"] = {**UNET, "args": {**UNET["args"], "channels": [4, 2_000_000]}}
    with pytest.raises(PackageError, match="much larger than its weights"):
        load_module(path, source)
