"""What the KServe adapter computes by itself is what our own models compute; and tensors on the wire, byte by byte."""

import json
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from dicom_node.engines import _kserve_grid, _kserve_values, _kserve_windows
from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._kserve_recipe import Step, VolumeOutput
from dicom_node.geometry import VolumeGeometry
from dicom_node.models import grid as own_grid
from dicom_node.models import intensity as own_intensity
from dicom_node.models import sampling as own_sampling
from dicom_node.models import windows as own_windows

CPU = torch.device("cpu")


def _still() -> None:
    pass


def _geometry(shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int) -> VolumeGeometry:
    """Somewhere in space, oblique."""
    frame, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = frame * spacing
    return VolumeGeometry(
        sop_instance_uids=tuple(f"1.{k + 1}" for k in range(shape[0])),
        affine=affine,
        spacing_mm=spacing,
        shape=shape,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        frame_of_reference_uid="1.2",
        left_out={},
    )


CASES = [
    ((7, 11, 13), (3.0, 0.8, 0.7), "RAS", (1.5, 1.2, 2.0), 1),
    ((9, 8, 10), (1.0, 2.0, 1.1), "SPL", (0.7, 1.9, 1.3), 2),
    ((4, 16, 9), (5.0, 0.5, 0.5), "AIL", (2.0, 2.0, 2.0), 3),
]


@pytest.mark.parametrize(("shape", "spacing", "orientation", "wanted", "seed"), CASES)
def test_volumes_go_to_the_models_grid_and_labels_come_back_as_with_our_own_models(
    shape: Any, spacing: Any, orientation: str, wanted: Any, seed: int
) -> None:
    geometry = _geometry(shape, spacing, seed)
    mine = _kserve_grid.ModelGrid.of(geometry, orientation, wanted)
    ours = own_grid.ModelGrid.of(geometry, orientation, wanted)
    assert (mine.shape, mine.axes, mine.flipped) == (ours.shape, ours.axes, ours.flipped)
    rng = np.random.default_rng(seed)
    volume = rng.integers(-1000, 1000, shape).astype(np.int16)
    np.testing.assert_allclose(
        _kserve_grid.sampled(volume, mine, _still),
        own_sampling.sample(torch.from_numpy(volume), ours, CPU, 0.0).numpy(),
        atol=2e-3,
    )
    # smooth scores with background around them, so that borders and boxes matter
    scores = rng.normal(size=(4, *mine.shape)).astype(np.float32)
    scores[1:, :, : mine.shape[1] // 3] = -9
    for inverse in ("probability", "labels"):
        expected = own_sampling.labels_on_source(
            lambda k: torch.from_numpy(np.ascontiguousarray(scores[:, k])), ours, CPU, inverse=inverse
        )
        output = VolumeOutput.model_validate({"name": "x", "labels": {1: {}, 2: {}, 3: {}}})
        _, decide = _kserve_values.decider(output)
        planes = (scores[:, k] for k in range(mine.shape[0]))
        if inverse == "labels":
            found = _kserve_grid.nearest_labels((decide(plane) for plane in planes), mine, _still)
        else:
            found = _kserve_grid.labels_by_score(planes, mine, decide, _still)
        assert np.mean(found != expected) < 1e-3  # ties within a rounding of float32
        assert len(np.unique(expected)) == 4


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("shape", "window", "overlap", "batch"),
    [((20, 17, 23), (8, 10, 12), 0.5, 3), ((5, 30, 9), (8, 16, 16), 0.25, 2), ((8, 8, 8), (8, 8, 8), 0.9, 1)],
)
def test_windows_lie_and_weigh_as_with_our_own_models(
    shape: Any, window: Any, overlap: float, batch: int, blend: Any
) -> None:
    volume = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    ramp = np.arange(np.prod(window), dtype=np.float32).reshape(window) / 1000  # answers that depend on the window

    def network(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch + torch.from_numpy(ramp), batch * 2], dim=1)

    infer = {"window": list(window), "overlap": overlap, "blend": blend, "edge": "constant", "mirror": ()}
    expected, count = own_windows.through_windows(
        network, torch.from_numpy(volume), infer, beyond=-3.0, batch=lambda count: 1, pulse=_still
    )
    lattice = _kserve_windows.Lattice(shape=shape, window=window, overlap=overlap, blend=blend)
    sizes: list[int] = []

    def ask(windows: Any) -> Any:
        sizes.append(len(windows))
        return np.stack([windows + ramp, windows * 2], axis=1)

    found = np.stack(list(_kserve_windows.blended(ask, volume, lattice, batch=batch, beyond=-3.0)), axis=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert sum(sizes) == lattice.count == count and max(sizes) <= batch


def test_no_more_planes_are_held_than_a_window_is_deep() -> None:
    lattice = _kserve_windows.Lattice(shape=(60, 8, 8), window=(8, 8, 8), overlap=0.5, blend="gaussian")
    asked: list[int] = []

    def ask(windows: Any) -> Any:
        asked.append(len(windows))
        return windows[:, None]

    planes = _kserve_windows.blended(ask, np.zeros(lattice.shape, np.float32), lattice, batch=1, beyond=0.0)
    for k, _ in enumerate(planes):
        assert len(asked) <= k // 4 + 2  # nothing is asked for before its planes are wanted


@pytest.mark.parametrize(
    "steps",
    [
        [{"range": {"from": [-100, 300], "to": [0, 1], "clip": True}}],
        [{"clip": [-50, 80]}, {"normalize": {"mean": 3.0, "std": 7.0}}],
        [{"normalize": {}}, {"minmax": [-1, 2]}],
        [{"normalize": {"mean": 5.0}}, {"range": {"from": [0, 2], "to": [5, -5]}}],
    ],
)
def test_intensity_steps_do_what_those_of_our_own_models_do(steps: Any) -> None:
    values = np.random.default_rng(2).normal(50, 90, (6, 7, 8)).astype(np.float32)
    named = [{"minmax": {"to": step["minmax"]}} if "minmax" in step else step for step in steps]
    named = [
        {"normalize": {"nonzero": False, "mean": None, "std": None, **step["normalize"]}}
        if "normalize" in step
        else {"range": {"clip": False, **step["range"]}}
        if "range" in step
        else step
        for step in named
    ]
    expected = torch.from_numpy(values.copy())
    beyond = own_intensity.apply_intensity(expected, named, -1000.0)
    mine = values.copy()
    assert _kserve_values.apply_steps(mine, [Step.model_validate(step) for step in steps], -1000.0) == pytest.approx(
        beyond, rel=1e-4
    )
    np.testing.assert_allclose(mine, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_activations_are_the_usual_ones_even_of_large_scores(activation: str) -> None:
    scores = np.array([[3.0, -200.0, 200.0], [1.0, 100.0, -100.0]], np.float32)
    expected = torch.from_numpy(scores).softmax(0) if activation == "softmax" else torch.from_numpy(scores).sigmoid()
    np.testing.assert_allclose(_kserve_values.activated(scores, activation), expected.numpy(), atol=1e-6)


# --- the wire --------------------------------------------------------------------------------------------------------


def _wanted(*shape: int | None, types: frozenset[str] = wire.FLOATS) -> Mapping[str, wire.Wanted]:
    return {"y": wire.Wanted(datatypes=types, shape=shape)}


def _answer(outputs: Any, binary: bytes = b"", **more: Any) -> tuple[bytes, str]:
    head = json.dumps({"model_version": "4", "outputs": outputs, **more}).encode()
    return head + binary, str(len(head)) if binary else ""


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("FP32", [1.5, -2.0, 1e30]),
        ("FP64", [1.5, -2.0, 1e30]),
        ("FP16", [1.5, -2.0, 65504.0]),
        ("BF16", [1.5, -2.0, 256.0]),
    ],
)
def test_a_tensor_that_comes_back_as_it_was_sent_is_the_same(datatype: str, values: list[float]) -> None:
    sent = np.array(values, np.float32).reshape(1, 3)
    message = wire.request(wire.Tensor(name="x", datatype=datatype, values=sent), ("y",), binary=True)
    assert message.length == sum(map(len, message.pieces)) and message.headers[wire.HEADER] == str(
        len(message.pieces[0])
    )
    told = json.loads(message.pieces[0])["inputs"][0]
    assert (
        told["parameters"]["binary_data_size"] == len(message.pieces[1]) == 3 * {"FP64": 8, "FP32": 4}.get(datatype, 2)
    )
    body, header = _answer([{**told, "name": "y"}], message.pieces[1])
    reply = wire.answered(body, header, _wanted(1, 3))
    np.testing.assert_array_equal(reply.tensors["y"], sent)
    assert reply.tensors["y"].dtype == np.float32 and reply.model_version == "4"


def test_bf16_is_rounded_to_nearest_halves_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 3.0e38, -1.7], np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    message = wire.request(wire.Tensor(name="x", datatype="BF16", values=values), ("y",), binary=True)
    np.testing.assert_array_equal(np.frombuffer(message.pieces[1], "<u2"), expected)


def test_json_data_may_be_flat_or_nested_and_other_outputs_are_passed_over() -> None:
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        outputs = [
            {"name": "z", "datatype": "BYTES", "shape": [1], "data": ["text"]},
            {"name": "y", "datatype": "INT64", "shape": [2, 2], "data": data},
        ]
        body, header = _answer(outputs)
        reply = wire.answered(body, header, _wanted(2, None, types=wire.WHOLE))
        np.testing.assert_array_equal(reply.tensors["y"], [[1, 2], [3, 4]])


def test_a_binary_output_that_was_not_asked_for_is_skipped_in_its_place() -> None:
    outputs = [
        {"name": "z", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}},
        {"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}},
    ]
    body, header = _answer(outputs, b"\1\0\0\0x" + np.float32(7).tobytes())
    assert wire.answered(body, header, _wanted(1)).tensors["y"][0] == 7


Y = {"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}


@pytest.mark.parametrize(
    ("body", "header", "why"),
    [
        (b"", "", "no JSON"),
        (b"[" * 100_000, "", "no JSON"),
        (b"{}", "", "no list of outputs"),
        (b'{"outputs": [1]}', "", "no list of outputs"),
        (b"{}", "-1", "no length within"),
        (b"{}", "99", "no length within"),
        (b"{}", "9" * 30, "no length within"),
        (*_answer([{**Y, "shape": [-2]}]), "no usable"),
        (*_answer([{**Y, "shape": [True, 2]}]), "no usable"),
        (*_answer([{**Y, "shape": [1] * 9}]), "no usable"),
        (*_answer([{**Y, "shape": [2**50]}]), "no usable"),
        (*_answer([{**Y, "name": 7}]), "no usable"),
        (*_answer([{**Y, "parameters": {"binary_data_size": -4}}]), "no usable"),
        (*_answer([{**Y, "datatype": "BYTES"}]), "BYTES"),
        (*_answer([{**Y, "datatype": "FP16"}]), "no data"),
        (*_answer([{**Y, "shape": [3]}]), "2 was expected"),
        (*_answer([{**Y, "data": [1]}]), "1 values"),
        (*_answer([{**Y, "data": ["1", "2"]}]), "no FP32"),
        (*_answer([{**Y, "data": [1, None]}]), "no FP32"),
        (*_answer([{**Y, "data": [[[[[[[[[[[1, 2]]]]]]]]]]]}]), "nested too deep"),
        (*_answer([{**Y, "data": [1, float("nan")]}]), "not finite"),
        (*_answer([{**Y, "data": [1, 1e300]}]), "not finite"),
        (*_answer([]), "not in the answer"),
    ],
)
def test_what_is_no_answer_is_told_in_a_sentence(body: bytes, header: str, why: str) -> None:
    with pytest.raises(wire.UnusableAnswer, match=why):
        wire.answered(body, header, _wanted(2))


def test_whole_numbers_in_json_are_whole() -> None:
    body, header = _answer([{"name": "y", "datatype": "INT32", "shape": [1], "data": [1.5]}])
    with pytest.raises(wire.UnusableAnswer, match="no INT32"):
        wire.answered(body, header, _wanted(1, types=wire.WHOLE))


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC", "CDHW", "NDHW", "DHW", "NCWHD", "NWHD"])
def test_a_layout_there_and_back_is_the_same(layout: str) -> None:
    values = np.arange(24).reshape(1, 1, 2, 3, 4)
    there = wire.laid_out(values, layout)
    assert there.ndim == len(layout) and there.shape[layout.index("H")] == 3 and there.shape[layout.index("W")] == 4
    np.testing.assert_array_equal(wire.taken_out(there, layout), values)


@pytest.mark.parametrize(
    ("datatype", "values"), [("UINT8", [300.0]), ("INT8", [-200.0]), ("FP16", [1e6]), ("UINT16", [-1.0])]
)
def test_values_that_a_type_cannot_hold_are_refused_and_never_wrapped(datatype: str, values: list[float]) -> None:
    tensor = wire.Tensor(name="x", datatype=datatype, values=np.array(values, np.float32))
    for binary in (True, False):
        with pytest.raises(ValueError, match=f"do not fit {datatype}"):
            wire.request(tensor, ("y",), binary=binary)


def test_a_volume_of_real_size_takes_little_more_memory_than_itself() -> None:
    shape = (120, 160, 160)
    volume = np.zeros(shape, np.int16)
    geometry = _geometry(shape, (1.0, 1.0, 1.0), 1)
    grid = _kserve_grid.ModelGrid.of(geometry, "RAS", (1.0, 1.0, 1.0))
    lattice = _kserve_windows.Lattice(
        shape=grid.shape, window=grid.in_source_order((64, 64, 64)), overlap=0.25, blend="gaussian"
    )
    output = VolumeOutput.model_validate({"name": "x", "labels": {1: {}}})
    prepare, decide = _kserve_values.decider(output)

    def work() -> None:
        values = _kserve_grid.sampled(volume, grid, _still)

        def ask(windows: Any) -> Any:
            return np.stack([windows, windows - 1, windows - 2], axis=1)

        planes = _kserve_windows.blended(ask, values, lattice, batch=1, beyond=0.0)
        _kserve_grid.labels_by_score((prepare(plane) for plane in planes), grid, decide, _still)

    voxels = int(np.prod(shape))
    depth = lattice.window[0] * shape[1] * shape[2]
    allowed = 4 * (voxels + 4 * depth + 8 * 64**3) + voxels
    tracemalloc.start()
    try:
        work()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < allowed * 1.1
