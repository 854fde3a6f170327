"""The runtime process: right answers, and what happens when it hangs, crashes, lies or loses its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import yaml

from dicom_node.errors import (
    EngineError,
    EngineUnavailable,
    LeaseLost,
    PackageError,
)
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.package import ModelPackage, load_package
from dicom_node.models.runtime import Answer, Limits, Runtime
from dicom_node.models.runtime_pool import lend_runtimes, return_runtimes
from dicom_node.models.segment import volume_job
from dicom_node.models.wire import Array

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    one = Runtime("cpu")
    yield one
    one.close()


@pytest.fixture(scope="module")
def package(ct_folder: Path, in_fp32: Callable[[ModelPackage], ModelPackage]) -> ModelPackage:
    return in_fp32(load_package(ct_folder))


def nothing() -> None:
    """A heartbeat nobody listens to."""


def ask(runtime: Runtime, package: ModelPackage, array: Array, timeout_s: float = 100.0, **options: Any) -> Answer:
    options.setdefault("heartbeat", nothing)
    manifest = package.manifest
    if isinstance(manifest, SegmentationManifest):
        x, y, z = array.shape
        job = volume_job(manifest, ModelGrid.same((x, y, z), (3.0, 3.0, 3.0)))
        job["output"]["labels"] = [label | {"keep": "all", "min_ml": 0} for label in job["output"]["labels"]]
    else:
        job = {"activation": "sigmoid"}
    return runtime.infer(package, array, job=job, timeout_s=timeout_s, threads=1, **options)


def volume(*shape: int) -> npt.NDArray[np.int16]:
    return np.random.default_rng(sum(shape)).integers(-1000, 1000, shape).astype(np.int16)


def images(count: int) -> Floats:
    return np.random.default_rng(count).uniform(-1, 1, (count, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 40, 33), (32, 32, 32), (20, 50, 31)], ids=["larger", "equal", "smaller"])
def test_labels_are_those_of_monais_sliding_window_inference(
    shape: tuple[int, int, int], runtime: Runtime, package: ModelPackage
) -> None:
    import torch
    from monai.inferers import sliding_window_inference
    from monai.networks import nets
    from safetensors.torch import load_file

    network = package.manifest.source.network
    module = getattr(nets, network.name)(**network.args)
    module.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(package.weights_path).items()}
    )
    module.eval()
    array = volume(*shape)
    manifest = package.manifest
    assert isinstance(manifest, SegmentationManifest) and not isinstance(manifest.input.intensity, tuple)
    (low, high), (a, b) = manifest.input.intensity.clip, manifest.input.intensity.to
    values = (torch.from_numpy(array).float().clamp(low, high) - low) / (high - low) * (b - a) + a
    with torch.inference_mode():
        logits = sliding_window_inference(
            values[None, None], (32, 32, 32), 2, module, overlap=0.25, mode="gaussian", cval=a
        )
        assert isinstance(logits, torch.Tensor)
        first, second = logits[0].topk(2, dim=0).values
        expected = logits[0].argmax(dim=0).numpy().astype(np.uint8)
    answer = ask(runtime, package, array)
    clear = (first - second).numpy() > 1e-2  # where two classes are as good as equal, rounding decides
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(answer.output[clear], expected[clear])
    assert answer.device == "cpu" and answer.precision == "fp32" and answer.outputs == 4
    assert answer.windows == int(np.prod([1 if n <= 32 else 2 for n in shape]))


def test_radiographs_give_what_the_network_gives(
    runtime: Runtime, cxr_folder: Path, in_fp32: Callable[[ModelPackage], ModelPackage]
) -> None:
    import torch
    from monai.networks import nets
    from safetensors.torch import load_file

    package = in_fp32(load_package(cxr_folder))
    network = package.manifest.source.network
    module = getattr(nets, network.name)(**network.args)
    module.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(package.weights_path).items()}
    )
    three = images(3)
    with torch.inference_mode():
        expected = torch.sigmoid(module.eval()(torch.from_numpy(three)[:, None])).numpy()
    np.testing.assert_allclose(ask(runtime, package, three).output, expected, atol=2e-4)


def test_the_process_and_its_network_stay(runtime: Runtime, package: ModelPackage) -> None:
    first = ask(runtime, package, volume(32, 32, 32))
    pid = runtime.pid
    second = ask(runtime, package, volume(32, 32, 32))
    assert runtime.pid == pid is not None
    assert second.seconds["load"] < 0.5
    np.testing.assert_array_equal(first.output, second.output)


def test_a_child_that_dies_is_reported_and_replaced(runtime: Runtime, package: ModelPackage) -> None:
    expected = ask(runtime, package, volume(32, 32, 32)).output
    victim = runtime.pid
    assert victim is not None

    def kill() -> None:
        if psutil.pid_exists(victim):
            os.kill(victim, signal.SIGKILL)

    with pytest.raises(EngineUnavailable, match="SIGKILL") as raised:
        ask(runtime, package, volume(64, 64, 64), heartbeat=kill)
    assert raised.value.retryable
    np.testing.assert_array_equal(ask(runtime, package, volume(32, 32, 32)).output, expected)
    assert runtime.pid not in (None, victim)


def test_a_child_that_hangs_is_killed_in_time_while_the_heart_beats(package: ModelPackage) -> None:
    runtime = Runtime("cpu", limits=Limits(hang_s=2.0))
    try:
        ask(runtime, package, volume(32, 32, 32))
        victim = runtime.pid
        assert victim is not None
        os.kill(victim, signal.SIGSTOP)  # alive, silent: the worst kind
        beats: list[float] = []
        started = time.monotonic()
        with pytest.raises(EngineUnavailable, match="no sign of life for 2 s"):
            ask(runtime, package, volume(32, 32, 32), heartbeat=lambda: beats.append(time.monotonic()))
        assert 2.0 <= time.monotonic() - started < 10.0
        assert max(np.diff(beats)) < 1.0
        assert not psutil.pid_exists(victim)
        assert runtime.restarts == {"hung": 1}
        assert ask(runtime, package, volume(32, 32, 32)).output.shape == (32, 32, 32)
    finally:
        runtime.close()


def test_an_answer_that_does_not_come_in_time_is_not_waited_for(runtime: Runtime, package: ModelPackage) -> None:
    ask(runtime, package, volume(32, 32, 32))
    child = runtime.pid
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(EngineUnavailable, match="busy with other work"):  # it never said that it began
        ask(runtime, package, volume(32, 32, 32), 0.5)
    os.kill(child, signal.SIGCONT)
    assert ask(runtime, package, volume(32, 32, 32)).output.shape == (32, 32, 32)
    assert runtime.pid == child  # it was only slow


def test_work_that_lost_its_lease_is_left_and_its_late_answer_is_nobodys(
    runtime: Runtime, package: ModelPackage
) -> None:
    expected = ask(runtime, package, volume(33, 32, 32)).output
    beats = 0

    def lost() -> None:
        nonlocal beats
        beats += 1
        if beats > 1:
            raise LeaseLost("another worker owns this job")

    with pytest.raises(LeaseLost):
        ask(runtime, package, volume(96, 96, 96), heartbeat=lost)
    np.testing.assert_array_equal(ask(runtime, package, volume(33, 32, 32)).output, expected)


def test_several_workers_share_one_process(runtime: Runtime, package: ModelPackage) -> None:
    arrays = [volume(32, 32, 30 + k) for k in range(4)]
    expected = [ask(runtime, package, array).output for array in arrays]
    found: list[Array | None] = [None] * 4

    def work(k: int) -> None:
        found[k] = ask(runtime, package, arrays[k]).output

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        np.testing.assert_array_equal(one, other)


def _changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> ModelPackage:
    manifest = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    change(manifest)
    target.mkdir(exist_ok=True)
    (target / "model.yaml").write_text(yaml.safe_dump(manifest), encoding="utf-8")
    if not (target / "weights.safetensors").exists():
        (target / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    return load_package(target)


def test_a_network_that_says_nan_is_an_error_and_never_an_empty_mask(
    runtime: Runtime, ct_folder: Path, tmp_path: Path, random_weights: Callable[..., str]
) -> None:
    network = load_package(ct_folder).manifest.source.network

    def spoil(module: Any) -> None:
        list(module.parameters())[-1].fill_(float("nan"))

    digest = random_weights(tmp_path, {"name": network.name, "args": network.args}, change=spoil)
    package = _changed(ct_folder, tmp_path, lambda manifest: manifest["source"].update(sha256=digest))
    with pytest.raises(EngineError, match="not finite") as raised:
        ask(runtime, package, volume(32, 32, 32))
    assert not raised.value.retryable


def test_weights_are_checked_when_they_are_loaded(runtime: Runtime, ct_folder: Path, tmp_path: Path) -> None:
    package = _changed(ct_folder, tmp_path, lambda manifest: None)
    package.weights_path.write_bytes(package.weights_path.read_bytes()[:-1] + b"\7")
    with pytest.raises(PackageError, match="sha256 differs"):
        ask(runtime, package, volume(32, 32, 32))


def _wider(manifest: dict[str, Any]) -> None:
    manifest["source"]["network"]["args"]["channels"] = [8, 16]


def _nonsense(manifest: dict[str, Any]) -> None:
    manifest["source"]["network"]["args"]["wheels"] = 4


@pytest.mark.parametrize(("change", "says"), [(_wider, "do not fit"), (_nonsense, "refuses them")])
def test_weights_and_arguments_must_fit_the_network(
    change: Callable[[dict[str, Any]], None], says: str, runtime: Runtime, ct_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PackageError, match=says):
        ask(runtime, _changed(ct_folder, tmp_path, change), volume(32, 32, 32))


def test_weights_that_are_no_safetensors_are_refused(runtime: Runtime, ct_folder: Path, tmp_path: Path) -> None:
    import hashlib

    rubbish = (2**60).to_bytes(8, "little") + b"{}" * 100  # a header of an exabyte
    (tmp_path / "weights.safetensors").write_bytes(rubbish)
    digest = hashlib.sha256(rubbish).hexdigest()
    package = _changed(ct_folder, tmp_path, lambda manifest: manifest["source"].update(sha256=digest))
    with pytest.raises(PackageError, match="no safetensors file"):
        ask(runtime, package, volume(32, 32, 32))


def test_loading_ahead_makes_the_first_answer_quick(runtime: Runtime, ct_folder: Path, tmp_path: Path) -> None:
    package = _changed(ct_folder, tmp_path, lambda manifest: manifest.update(version="9"))
    runtime.load(package, timeout_s=60, heartbeat=nothing)
    assert ask(runtime, package, volume(32, 32, 32)).seconds["load"] < 0.5


def test_the_child_dies_with_its_parent(ct_folder: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from dicom_node.models.package import load_package\n"
        "from dicom_node.models.runtime import Runtime\n"
        "runtime = Runtime('cpu')\n"
        "runtime.load(load_package(pathlib.Path(sys.argv[1])), timeout_s=100, heartbeat=lambda: None)\n"
        "print(runtime.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(ct_folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(child.pid, signal.SIGSTOP)  # even one that cannot run any more
        parent.kill()
        parent.wait(10)
    child.wait(10)


def test_engines_of_one_process_share_their_runtimes_until_the_last_gives_them_back() -> None:
    first, second = lend_runtimes(("cpu", "cpu:0")), lend_runtimes(("cpu", "cpu:0"))
    assert first is second
    return_runtimes(("cpu", "cpu:0"))
    assert lend_runtimes(("cpu", "cpu:0")) is first
    return_runtimes(("cpu", "cpu:0"))
    return_runtimes(("cpu", "cpu:0"))
    assert lend_runtimes(("cpu", "cpu:0")) is not first
    return_runtimes(("cpu", "cpu:0"))


def test_a_closed_runtime_leaves_no_process(package: ModelPackage) -> None:
    runtime = Runtime("cpu")
    runtime.load(package, timeout_s=100, heartbeat=nothing)
    pid = runtime.pid
    assert pid is not None
    runtime.close()
    runtime.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineUnavailable, match="closed"):
        ask(runtime, package, volume(32, 32, 32))
