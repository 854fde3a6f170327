"""nnU-Net v2 result folders give what their own arithmetic gives, fold by fold, on the images' own grid."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.errors import PackageError
from dicom_node.model import EngineTask
from dicom_node.models.components import holes
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.formats import describe_folder
from dicom_node.models.grid import ModelGrid
from dicom_node.models.loaders import load_module
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.nnunet_nets import build_network, used_weights
from dicom_node.models.registry import find_package
from dicom_node.models.report import package_report
from dicom_node.models.segment import volume_job
from dicom_node.models.volume import Done, segment_volume
from dicom_node.models.windows import through_windows
from dicom_node.values import LabelVolume

Array = npt.NDArray[Any]

FIGURES = {"mean": 20.0, "std": 150.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0, "median": 10.0}
SHARED = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [2, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
PLAIN = {**SHARED, "n_conv_per_stage": [2, 2, 1]}
RESIDUAL = {**SHARED, "n_blocks_per_stage": [1, 3, 2]}
CLASS = "dynamic_network_architectures.architectures.unet."


def plans(kind: str = "PlainConvUNet", arguments: dict[str, Any] = PLAIN, **changed: Any) -> dict[str, Any]:
    return {
        "dataset_name": "Dataset007_Abdomen",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": FIGURES},
        "configurations": {
            "3d_fullres": {
                "patch_size": [16, 32, 40],
                "spacing": [5.0, 9.0, 8.0],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "architecture": {
                    "network_class_name": CLASS + kind,
                    "arch_kwargs": arguments,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            },
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "2d": {"patch_size": [512, 512], "spacing": [1.0, 1.0]},
        },
        **changed,
    }


def dataset(**changed: Any) -> dict[str, Any]:
    labels = {"background": 0, "liver": 1, "odd thing": 2, "ignore": 3}
    return {
        **{"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"},
        **{"orientation": "LPS", **changed},
    }


def weights_of(seed: int, plan: dict[str, Any], classes: int = 3) -> dict[str, Tensor]:
    """Random weights under all the names that nnU-Net writes, those of the same tensors twice."""
    torch.manual_seed(seed)
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    given = {key: value for key, value in architecture["arch_kwargs"].items() if key not in ("n_stages", "conv_op")}
    named = {key: str(given[key]).rsplit(".", 1)[-1] for key in ("norm_op", "nonlin")}
    kind = architecture["network_class_name"].rsplit(".", 1)[-1]
    network = build_network(kind, {**given, **named, "input_channels": 1, "num_classes": classes})
    state = {name: torch.randn_like(tensor) * 0.3 for name, tensor in network.state_dict().items()}
    for name, tensor in list(state.items()):
        for own, place in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
            if own in name:
                state[name.replace(own, place)] = tensor
    state |= {f"decoder.{name}": tensor for name, tensor in state.items() if name.startswith("encoder.")}
    return {**state, "decoder.seg_layers.0.weight": torch.randn(classes, 8, 1, 1, 1)}


def put(
    folder: Path,
    plan: dict[str, Any],
    data: dict[str, Any],
    folds: tuple[str, ...] = ("0",),
    configuration: str = "3d_fullres",
    mirror: Any = (0, 2),
) -> list[dict[str, Tensor]]:
    """Write a result folder; the weights of its folds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    every = []
    for seed, fold in enumerate(folds):
        weights = weights_of(seed, plan)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": weights,
            "optimizer_state": torch.optim.SGD([weights["encoder.stages.0.0.convs.0.conv.weight"]], 0.01).state_dict()
            if "encoder.stages.0.0.convs.0.conv.weight" in weights
            else {},
            "grad_scaler_state": None,
            "logging": {"train_losses": [np.float32(0.5)], "mean_fg_dice": [np.float64(0.7)]},
            "_best_ema": np.float64(0.71),
            "current_epoch": 1000,
            "init_args": {"plans": plan, "configuration": configuration, "fold": seed, "device": torch.device("cpu")},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": mirror,
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        every.append(weights)
    return every


# --- nnU-Net's preprocessing, in its own order: cut, normalise, resample ----------------------------------------------


def shown_of(volume: Array) -> npt.NDArray[np.bool_]:
    """What is not 0, holes filled: all that zeros do not flood from the border, voxel after voxel."""
    empty = np.pad(volume == 0, 1, constant_values=True)
    flooded = np.zeros_like(empty)
    flooded[0, 0, 0] = True
    while True:
        grown = flooded.copy()
        for axis in range(3):
            for step in (1, -1):
                grown |= np.roll(flooded, step, axis)
        grown &= empty
        if np.array_equal(grown, flooded):
            return ~flooded[1:-1, 1:-1, 1:-1]
        flooded = grown


def prepared_by_hand(volume: Array, scheme: str, masked: bool) -> tuple[Array, tuple[slice, ...]]:
    """The normalised values in the box around what is not 0, and the box."""
    shown = shown_of(volume)
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(shown))
    values, shown = volume[box].astype(np.float32), shown[box]
    if scheme == "ZScoreNormalization":
        inside = values[shown] if masked else values
        changed = (values - inside.mean()) / inside.std()
        values = np.where(shown, changed, values) if masked else changed
    elif scheme == "RescaleTo01Normalization":
        values = (values - values.min()) / (values.max() - values.min())
    elif scheme == "CTNormalization":
        values = (np.clip(values, -200, 300) - 20) / 150
    return values.astype(np.float32), box


def mr_volume(kind: type[np.generic]) -> Array:
    """Tissue in margins of exact zeros, with a hole, a tunnel from the outside to the middle and zeros at an edge."""
    rng = np.random.default_rng(3)
    volume = np.zeros((20, 44, 40), np.float64)
    volume[3:16, 7:40, 5:36] = 300 + rng.normal(0, 60, (13, 33, 31)).round()
    volume[8:11, 20:25, 14:20] = 0  # enclosed
    volume[8:10, 30, 5:30] = 0  # open at one end
    volume[3:5, 7:12, 5:9] = 0  # a corner of the box
    volume[3, 20, 20], volume[15, 39, 30] = -40, 7  # the box's own ends
    return volume.astype(kind)


class Watched:
    """Class 1 wherever it is asked; keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.seen += [one.numpy().copy() for one in batch[:, 0]]
        return torch.cat([torch.zeros_like(batch), torch.ones_like(batch), -torch.ones_like(batch)], 1)

    def batch_size(self, infer: Any, count: int) -> int:
        return 1


SCHEMES = {
    "z-score": ("ZScoreNormalization", False),
    "z-score of what is shown": ("ZScoreNormalization", True),
    "lowest to highest": ("RescaleTo01Normalization", False),
    "figures of the training": ("CTNormalization", False),
    "as they are": ("NoNormalization", False),
}


def watched(
    folder: Path, scheme: str, masked: bool, volume: Array, grid: ModelGrid, window: list[int] | None
) -> tuple[Watched, Done]:
    """What a network of this normalisation sees of `volume`, and its answer."""
    plan = plans()
    plan["configurations"]["3d_fullres"] |= {"normalization_schemes": [scheme], "use_mask_for_norm": [masked]}
    put(folder, plan, dataset(channel_names={"0": "T1"}), mirror=None)
    manifest = find_package(str(folder)).manifest
    assert isinstance(manifest, SegmentationManifest)
    network, infer = Watched(), {**manifest.infer.model_dump(mode="json"), "window": window}
    given = torch.from_numpy(volume.copy())
    done = segment_volume(network, given, infer, volume_job(manifest, grid), torch.device("cpu"), lambda: None)
    np.testing.assert_array_equal(given.numpy(), volume)  # it is measured afterwards
    return network, done


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize("name", SCHEMES)
def test_windows_see_what_nnunet_makes_of_the_images_and_lie_where_it_lays_them(
    name: str, kind: type[np.generic], tmp_path: Path
) -> None:
    """On the images' own grid, columns turned round and rows before slices: only order, figures and places count."""
    scheme, masked = SCHEMES[name]
    volume, spacing, window = mr_volume(kind), (5.0, 9.0, 8.0), (16, 8, 16)
    grid = ModelGrid(volume.shape, volume.shape, spacing, spacing, (1, 0, 2), (False, False, True))  # type: ignore[arg-type]
    network, done = watched(tmp_path, scheme, masked, volume, grid, list(window))

    values, box = prepared_by_hand(volume, scheme, masked)
    assert [(part.start, part.stop) for part in box] == [(3, 16), (7, 40), (5, 36)]
    turned = values[:, :, ::-1].transpose(1, 0, 2)  # (33, 13, 31)
    places = itertools.product((0, 6, 11, 17), (0, 2, 5), (0, 8, 15))  # k * (n - w) / steps, rounded
    expected = [turned[x : x + 16, y : y + 8, z : z + 16] for x, y, z in places]
    assert len(network.seen) == done.windows == 36
    for seen, one in zip(network.seen, expected, strict=True):
        np.testing.assert_allclose(seen, one, atol=1e-5, rtol=1e-5)
    labels = np.zeros(volume.shape, np.uint8)
    labels[box] = 1  # the network says 1 wherever it looks: outside of the box it does not
    np.testing.assert_array_equal(done.output, labels)
    if scheme == "ZScoreNormalization" and not masked:
        assert abs(values.mean()) < 1e-4 and abs(values.std() - 1) < 1e-4


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_normalised_before_they_are_resampled(name: str, tmp_path: Path) -> None:
    """Linear interpolation of what nnU-Net resamples: from the box's first voxel on, along an axis turned round too."""
    scheme, masked = SCHEMES[name]
    volume, spacing, wanted = mr_volume(np.int16), (5.0, 9.0, 8.0), (4.0, 10.0, 9.0)
    shape = ModelGrid.shape_of(volume.shape, spacing, wanted)  # type: ignore[arg-type]
    grid = ModelGrid(volume.shape, shape, spacing, wanted, (0, 1, 2), (True, False, False))  # type: ignore[arg-type]
    network, done = watched(tmp_path, scheme, masked, volume, grid, None)
    values, box = prepared_by_hand(volume, scheme, masked)
    expected = values[::-1]
    for axis, (mm, other) in enumerate(zip(spacing, wanted, strict=True)):
        length = (values.shape[axis] - 1) * mm
        at = np.minimum(np.arange(round(length / other + 1)) * other, length) / mm
        expected = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, expected)
    (seen,) = network.seen
    assert seen.shape == expected.shape == (16, 30, 28)
    np.testing.assert_allclose(seen, expected, atol=2e-4 if scheme != "NoNormalization" else 1e-2)
    labels = np.zeros(volume.shape, np.uint8)
    labels[box] = 1
    np.testing.assert_array_equal(done.output, labels)


def test_a_lone_voxel_is_a_box_of_its_own_and_the_report_says_what_is_cut(tmp_path: Path) -> None:
    volume = np.zeros((8, 16, 16), np.int16)
    volume[5, 3, 15] = 70
    grid = ModelGrid(*((8, 16, 16), (15, 16, 16), (5.0, 9.0, 8.0), (2.5, 9.0, 8.0), (0, 1, 2), (False,) * 3))
    network, done = watched(tmp_path, "CTNormalization", False, volume, grid, [8, 8, 8])
    (seen,) = network.seen
    assert np.count_nonzero(seen) == 1 and seen[3, 3, 3] == pytest.approx(50 / 150)  # in the middle of its window
    assert done.output.sum() == done.output[5, 3, 15] == 1
    said = dict(package_report(str(tmp_path), run=False))["values"]
    assert said.endswith("cut to what is not 0, 0 voxels around, before all else; resampled last")


def test_images_without_margins_and_images_of_nothing_stay_whole(tmp_path: Path) -> None:
    grid = ModelGrid.same((8, 16, 16), (5.0, 9.0, 8.0))
    full = np.full((8, 16, 16), -1000, np.int16)
    full[2:6, 4:12, 4:12] = 40
    for number, (volume, seen) in enumerate(((full, (full.clip(-200) - 20) / 150), (full * 0, full * 0 - 20 / 150))):
        network, done = watched(tmp_path / str(number), "CTNormalization", False, volume, grid, [8, 16, 16])
        np.testing.assert_allclose(network.seen[0], seen, atol=1e-5)
        assert (done.output == 1).all()


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_holes_are_what_a_flood_from_the_border_does_not_reach(share: float) -> None:
    for seed, shape in enumerate(((1, 1, 1), (3, 4, 1), (5, 6, 7), (12, 9, 11))):
        mask = np.random.default_rng(seed).random(shape) < share
        flooded = ~shown_of(mask[...].astype(np.int16))
        expected = np.flatnonzero(~mask & ~flooded)
        np.testing.assert_array_equal(holes(shape, iter(~mask)), expected)
    assert expected.size or share < 0.5


# --- the networks, computed from the names of their weights -----------------------------------------------------------


def unit(w: dict[str, Tensor], at: str, x: Tensor, stride: Any = 1, *, active: bool = True) -> Tensor:
    kernel = w[f"{at}.conv.weight"]
    x = functional.conv3d(x, kernel, w.get(f"{at}.conv.bias"), stride, [(n - 1) // 2 for n in kernel.shape[2:]])
    x = functional.instance_norm(x, weight=w[f"{at}.norm.weight"], bias=w[f"{at}.norm.bias"], eps=1e-5)
    return functional.leaky_relu(x, 0.01) if active else x


def decoded(w: dict[str, Tensor], skips: list[Tensor]) -> Tensor:
    x = skips.pop()
    for s, count in enumerate(SHARED["n_conv_per_stage_decoder"]):  # type: ignore[call-overload]
        stride = SHARED["strides"][2 - s]  # type: ignore[index]
        x = functional.conv_transpose3d(
            x, w[f"decoder.transpconvs.{s}.weight"], w[f"decoder.transpconvs.{s}.bias"], stride
        )
        x = torch.cat([x, skips.pop()], dim=1)
        for i in range(count):
            x = unit(w, f"decoder.stages.{s}.convs.{i}", x)
    return functional.conv3d(x, w["decoder.seg_layers.1.weight"], w["decoder.seg_layers.1.bias"])


def plain(w: dict[str, Tensor], x: Tensor) -> Tensor:
    skips = []
    for s, (count, stride) in enumerate(zip(PLAIN["n_conv_per_stage"], SHARED["strides"], strict=True)):  # type: ignore[call-overload]
        for i in range(count):
            x = unit(w, f"encoder.stages.{s}.0.convs.{i}", x, stride if i == 0 else 1)
        skips.append(x)
    return decoded(w, skips)


def residual(w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = unit(w, "encoder.stem.convs.0", x)
    skips = []
    for s, (count, stride) in enumerate(zip(RESIDUAL["n_blocks_per_stage"], SHARED["strides"], strict=True)):  # type: ignore[call-overload]
        for i in range(count):
            at, step = f"encoder.stages.{s}.blocks.{i}", stride if i == 0 else [1, 1, 1]
            short = functional.avg_pool3d(x, step, step) if step != [1, 1, 1] else x
            place = 1 if step != [1, 1, 1] else 0
            if f"{at}.skip.{place}.conv.weight" in w:
                short = unit(w, f"{at}.skip.{place}", short, active=False)
            x = unit(w, f"{at}.conv2", unit(w, f"{at}.conv1", x, step), active=False)
            x = functional.leaky_relu(x + short, 0.01)
        skips.append(x)
    return decoded(w, skips)


@pytest.mark.parametrize(
    ("kind", "arguments", "reference"),
    [("PlainConvUNet", PLAIN, plain), ("ResidualEncoderUNet", RESIDUAL, residual)],
)
def test_a_loaded_fold_is_the_network_the_plans_describe(
    kind: str, arguments: dict[str, Any], reference: Callable[..., Tensor], tmp_path: Path
) -> None:
    folds = put(tmp_path, plans(kind, arguments), dataset(), folds=("0", "1"))
    package = find_package(str(tmp_path))
    network = load_module(package.weights_path, package.manifest.source.model_dump())
    volume = torch.randn(2, 1, 8, 16, 24)
    with torch.inference_mode():
        found = network(volume)
        expected = torch.stack([reference(weights, volume) for weights in folds]).mean(dim=0)
    assert found.shape == (2, 3, 8, 16, 24)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, reference(folds[0], volume), atol=1e-2)  # both folds count


def test_the_library_itself_gives_the_same(tmp_path: Path) -> None:
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    arguments = {key: value for key, value in PLAIN.items() if key not in ("dropout_op", "dropout_op_kwargs")}
    theirs = unets.PlainConvUNet(
        1,
        num_classes=3,
        **{**arguments, "conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU},
    ).eval()
    given = {**arguments, "norm_op": "InstanceNorm3d", "nonlin": "LeakyReLU", "input_channels": 1, "num_classes": 3}
    ours = build_network("PlainConvUNet", given).eval()
    ours.load_state_dict(used_weights(theirs.state_dict()))
    volume = torch.randn(1, 1, 8, 16, 16)
    with torch.inference_mode():
        assert torch.equal(ours(volume), theirs(volume))


@pytest.mark.usefixtures("models_in_fp32")
def test_a_series_gets_the_labels_that_the_folder_stands_for(
    tmp_path: Path, task_for: Callable[..., EngineTask]
) -> None:
    """Own grid, so nothing is resampled: transposed, clipped, normalised, padded with 0, mirrored, folds averaged."""
    plan = plans(transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])
    configuration = plan["configurations"]["3d_fullres"]
    configuration["spacing"] = [9.0, 5.0, 8.0]
    configuration["patch_size"] = [40, 16, 48]
    folds = put(tmp_path / "model", plan, dataset(), folds=("0", "1"))
    shape, spacing = (15, 39, 48), (5.0, 9.0, 8.0)
    written = write_ct_series(tmp_path / "ct", 5, shape=shape, spacing_mm=spacing)
    engine = LocalModelEngine("nnunet", EngineSettings(model=str(tmp_path / "model"), options={"threads": 1}))
    try:
        labels, _ = engine.run(task_for(written.paths), lambda: None).values
    finally:
        engine.close()
    assert isinstance(labels, LabelVolume)

    values = np.clip(written.phantom.hu.astype(np.float32), -200, 300)
    volume = torch.from_numpy(((values - 20) / 150).transpose(1, 0, 2).copy())
    padded = functional.pad(volume, (0, 0, 0, 1, 0, 1))[None, None]
    total = torch.zeros(1, 3, 40, 16, 48)
    with torch.inference_mode():
        for weights in folds:
            for axes in ((), (2,), (4,), (2, 4)):
                total += plain(weights, padded.flip(axes)).flip(axes)
    expected = total[0, :, :39, :15].argmax(dim=0).numpy().transpose(1, 0, 2)
    assert min((expected == 1).mean(), (expected == 2).mean()) > 0.02  # both are there to be mistaken
    assert (labels.labels != expected).mean() < 1e-4  # ties of rounding at most


def test_windows_lie_and_weigh_as_nnunets_do() -> None:
    """Two axes need several windows; a network that answers with its place in the window shows where each one lay."""
    volume, window = torch.randn(21, 16, 30), (8, 16, 12)
    ramp = torch.arange(8 * 16 * 12, dtype=torch.float32).reshape(1, 1, *window)
    infer = {"window": window, "overlap": 0.5, "blend": "nnunet", "edge": "constant", "mirror": ()}
    found, count = through_windows(
        lambda batch: torch.cat([batch, batch * ramp], 1), volume, infer, beyond=0.0, batch=lambda n: 3, pulse=bool
    )
    starts = ([0, 3, 6, 10, 13], [0], [0, 6, 12, 18])  # round(k * (n - w) / steps), half to even
    assert count == 20
    single = [np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 8)) ** 2) for n in window]
    weight = single[0][:, None, None] * single[1][:, None] * single[2]
    total, weights = np.zeros((2, 21, 16, 30)), np.zeros((21, 16, 30))
    for x in starts[0]:
        for z in starts[2]:
            place = np.s_[x : x + 8, 0:16, z : z + 12]
            part = volume.numpy()[place].astype(np.float64)
            total[(slice(None), *place)] += np.stack([part, part * ramp[0, 0].numpy()]) * weight
            weights[place] += weight
    assert np.allclose(found.numpy(), total / weights, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("reader", "order", "orientation"),
    [
        ("SimpleITKIO", [0, 1, 2], "SPL"),
        ("NibabelIO", [2, 0, 1], "LSP"),
        ("NibabelIOWithReorient", [0, 1, 2], "SAR"),
        ("SimpleITKIOWithReorient", [1, 0, 2], "ASR"),
    ],
)
def test_axes_follow_the_reader_and_the_transposition(
    reader: str, order: list[int], orientation: str, tmp_path: Path
) -> None:
    plan, data = plans(image_reader_writer=reader, transpose_forward=order), dataset(orientation=None)
    put(tmp_path, plan, data, mirror=(0, 1, 2))
    described = describe_folder(tmp_path)
    assert described.manifest["input"]["orientation"] == orientation
    assert described.manifest["input"]["spacing_mm"] == [5.0, 9.0, 8.0]  # in the network's order already
    assert any("does not record" in note for note in described.notes) is not reader.endswith("WithReorient")


@pytest.mark.parametrize(
    ("reader", "order", "mirror", "runs"),
    [
        ("SimpleITKIO", [0, 1, 2], (1, 2), True),
        ("SimpleITKIO", [0, 1, 2], (0, 2), False),
        ("NibabelIO", [0, 1, 2], (0, 1), False),
        ("NibabelIO", [0, 1, 2], None, False),
        ("SimpleITKIO", [1, 0, 2], (0, 2), True),  # the network's first axis is the reader's second
        ("SimpleITKIO", [1, 0, 2], (1, 2), False),
        ("SimpleITKIOWithReorient", [0, 1, 2], None, True),
        ("NibabelIOWithReorient", [0, 1, 2], (0,), True),
    ],
)
def test_sides_are_not_guessed_for_a_network_that_can_tell_them(
    reader: str, order: list[int], mirror: Any, runs: bool, tmp_path: Path
) -> None:
    """Trained on slices mirrored both ways it cannot tell; otherwise the files' axes must be known."""
    plan = plans(image_reader_writer=reader, transpose_forward=order)
    put(tmp_path, plan, dataset(orientation=None), mirror=mirror)
    if not runs:
        with pytest.raises(PackageError, match=r'would swap sides; put .* such as "orientation": "RAS"'):
            describe_folder(tmp_path)
        (tmp_path / "dataset.json").write_text(json.dumps(dataset(orientation="LPS")), encoding="utf-8")
    assert set(describe_folder(tmp_path).manifest["input"]["orientation"]) in ({*"SPL"}, {*"SAR"})


def test_the_person_who_trained_it_may_say_how_the_files_ran(tmp_path: Path) -> None:
    put(tmp_path, plans(transpose_forward=[1, 0, 2]), dataset(orientation="RAS"))
    described = describe_folder(tmp_path)
    assert described.manifest["input"]["orientation"] == "ASR"  # arrays are z, y, x: SAR, then transposed
    assert not any("does not record" in note for note in described.notes)
    for wrong in ("RAX", "RLS", "RA", 3):
        (tmp_path / "dataset.json").write_text(json.dumps(dataset(orientation=wrong)), encoding="utf-8")
        with pytest.raises(PackageError, match="orientation: expected the directions"):
            describe_folder(tmp_path)


def test_plans_and_checkpoint_become_the_manifest(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset(), folds=("3", "1", "all"), mirror=(0, 1, 2))
    manifest = find_package(str(tmp_path)).manifest
    assert isinstance(manifest, SegmentationManifest)
    assert manifest.id == "Dataset007_Abdomen-3d_fullres" and manifest.trust == "data"
    assert [manifest.source.path, *(fold.path for fold in manifest.source.folds)] == [  # type: ignore[union-attr]
        "fold_1/checkpoint_final.pth",
        "fold_3/checkpoint_final.pth",
    ]
    assert manifest.infer.window == (16, 32, 40) and manifest.infer.mirror == (0, 1, 2)
    assert (manifest.infer.overlap, manifest.infer.edge, manifest.infer.pad_value) == (0.5, "constant", 0.0)
    assert manifest.infer.blend == "nnunet"
    assert manifest.input.first == "crop" and manifest.input.crop is not None and manifest.input.crop.nonzero
    steps = [step.model_dump(exclude_unset=True) for step in manifest.input.intensity]  # type: ignore[union-attr]
    assert steps == [{"clip": (-200.0, 300.0)}, {"normalize": {"mean": 20.0, "std": 150.0}}]
    assert [(label.index, label.segment.type.meaning) for label in manifest.output.labels] == [
        (1, "Liver"),
        (2, "odd thing"),
    ]


def test_folds_trained_again_are_another_version(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset(), folds=("0",))
    first = describe_folder(tmp_path).manifest
    assert describe_folder(tmp_path).manifest["version"] == first["version"]
    torch.save(
        {**torch.load(tmp_path / first["source"]["path"], weights_only=False), "current_epoch": 1},
        tmp_path / first["source"]["path"],
    )
    again = describe_folder(tmp_path).manifest
    assert again["id"] == first["id"] and again["version"] != first["version"]


def test_a_folder_trained_on_all_cases_is_used_when_there_is_no_other(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset(), folds=("all",), mirror=None)
    manifest = describe_folder(tmp_path).manifest
    assert manifest["source"]["path"] == "fold_all/checkpoint_final.pth"
    assert manifest["source"]["folds"] == [] and manifest["infer"]["mirror"] == []


def test_plans_of_older_versions_describe_the_same_network(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset())
    today = describe_folder(tmp_path).manifest["source"]["network"]
    older = plans()
    configuration = older["configurations"]["3d_fullres"]
    del configuration["architecture"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2, 1],
        "n_conv_per_stage_decoder": [2, 1],
        "conv_kernel_sizes": SHARED["kernel_sizes"],
        "pool_op_kernel_sizes": SHARED["strides"],
        "num_pool_per_axis": [1, 2, 2],
    }
    (tmp_path / "plans.json").write_text(json.dumps(older), encoding="utf-8")
    assert describe_folder(tmp_path).manifest["source"]["network"] == today


def test_an_mr_dataset_is_normalised_by_its_own_values(tmp_path: Path) -> None:
    plan = plans()
    plan["configurations"]["3d_fullres"] |= {
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
    }
    put(tmp_path, plan, dataset(channel_names={"0": "T1"}))
    manifest = find_package(str(tmp_path)).manifest
    assert isinstance(manifest, SegmentationManifest)
    assert (manifest.select.modality, manifest.input.values) == (("MR",), "any")
    (step,) = manifest.input.intensity  # type: ignore[misc]
    assert step.normalize is not None and step.normalize.nonzero and step.normalize.mean is None


def _changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    plan, data = copy.deepcopy(plans()), copy.deepcopy(dataset())
    change(plan["configurations"]["3d_fullres"] | {"plans": plan}, data)
    return plan, data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, d: d["labels"].update(tumour=[1, 2]), "'tumour' is a region of several labels"),
        (lambda c, d: d["labels"].update(tumour=7), "expected background 0, then 1, 2"),
        (lambda c, d: d["labels"].update(tumour=2), "must have a number of its own"),
        (lambda c, d: d.update(channel_names={"0": "T1", "1": "T2"}), "expected one channel"),
        (lambda c, d: d.update(channel_names={"0": "PET"}), "'pet' series are not analysed"),
        (lambda c, d: c["patch_size"].pop(), "two-dimensional networks are not run"),
        (lambda c, d: c["spacing"].pop(), "spacing: expected three positive sizes"),
        (lambda c, d: c["normalization_schemes"].append("CTNormalization"), "several channels are not run"),
        (lambda c, d: c["normalization_schemes"].__setitem__(0, "RGBTo01Normalization"), "is not run"),
        (lambda c, d: c["architecture"].update(network_class_name="my.own.Mamba"), "network 'Mamba' is not built here"),
        (lambda c, d: c["architecture"]["arch_kwargs"].update(hack=1), "argument 'hack' is not known"),
        (lambda c, d: c["architecture"]["arch_kwargs"].update(conv_op="torch.nn.Conv2d"), "only three-dimensional"),
        (lambda c, d: c["plans"].update(image_reader_writer="NaturalImage2DIO"), "reads no volumes"),
        (lambda c, d: c["plans"].update(transpose_forward=[0, 0, 1]), "an order of three axes"),
        (lambda c, d: c["plans"].update(foreground_intensity_properties_per_channel={}), "has no figures"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    change: Callable[[dict[str, Any], dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    put(tmp_path, plans(), dataset())
    plan, data = _changed(change)
    (tmp_path / "plans.json").write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PackageError, match=says):
        describe_folder(tmp_path)


@pytest.mark.parametrize(
    ("configuration", "says"),
    [
        ("3d_cascade_fullres", "second stage of a cascade"),
        ("2d", "two-dimensional networks are not run"),
        ("4d", "'4d' is not in the plans"),
    ],
)
def test_the_configuration_is_the_one_the_checkpoint_names(configuration: str, says: str, tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset(), configuration=configuration)
    with pytest.raises(PackageError, match=says):
        describe_folder(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset())
    other = plans()
    other["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {**PLAIN, "n_conv_per_stage": [2, 2, 2]}
    (tmp_path / "plans.json").write_text(json.dumps(other), encoding="utf-8")
    package = find_package(str(tmp_path))
    with pytest.raises(PackageError, match="do not fit the network"):
        load_module(package.weights_path, package.manifest.source.model_dump())


def test_a_folder_without_trained_folds_or_with_other_files_is_refused(tmp_path: Path) -> None:
    put(tmp_path, plans(), dataset())
    path = tmp_path / "fold_0" / "checkpoint_final.pth"
    for content, says in (
        ({"network_weights": {"w": torch.zeros(1)}}, "it names no configuration"),
        ({"w": torch.zeros(1)}, "it has no network_weights"),
        (
            {"network_weights": {}, "init_args": {"configuration": "x"}, "inference_allowed_mirroring_axes": [5]},
            "0 to 2",
        ),
    ):
        torch.save(content, path)
        with pytest.raises(PackageError, match=says):
            describe_folder(tmp_path)
    path.unlink()
    with pytest.raises(PackageError, match="expected 1 to 16 trained folds"):
        describe_folder(tmp_path)
