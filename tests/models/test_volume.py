"""The volume path of the runtime process: against MONAI's own transforms, and on stacks those cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    CropForegroundd,
    Invertd,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityd,
    ScaleIntensityRanged,
    Spacingd,
)

from dicom_node.errors import EngineError
from dicom_node.models.forward import Network, run
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import VolumeInputBlock
from dicom_node.models.sampling import sample

Labels = npt.NDArray[np.uint8]
# no source voxel lies half way between two samples: which of them is nearest would be a matter of the last bit
SHAPE, SPACING, TARGET = (21, 44, 38), (3.0, 1.2, 1.4), (2.1, 2.2, 2.5)
# slices to the head, rows to the back, columns to the left: LPS order of an axial series
AFFINE = np.array([[0, 0, 1.4, -20.0], [0, 1.2, 0, 31.0], [3.0, 0, 0, 7.0], [0, 0, 0, 1]])
GRID = ModelGrid(
    SHAPE, ModelGrid.shape_of(SHAPE, SPACING, TARGET[::-1]), SPACING, TARGET[::-1], (2, 1, 0), (False,) * 3
)
ORIENTATION = "LPS"
INPUT: dict[str, Any] = {
    "intensity": {"clip": [-200.0, 300.0], "to": [0.0, 1.0]},
    "crop": None,
    "padding_hu": -200.0,
}
INFER: dict[str, Any] = {
    "window": [16, 16, 16],
    "overlap": 0.25,
    "blend": "gaussian",
    "batch": "auto",
    "precision": "fp32",
    "edge": "constant",
    "pad_value": None,
    "mirror": [],
}
OUTPUT: dict[str, Any] = {"activation": "softmax", "decide": "argmax", "inverse": "probability"}


def image() -> npt.NDArray[np.int16]:
    """Smooth blobs over noise, with an empty border, in whole HU."""
    rng = np.random.default_rng(4)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    values = np.full(SHAPE, -150.0)
    for _ in range(6):
        centre = rng.uniform(-0.5, 0.5, 3)[:, None, None, None]
        values += rng.uniform(100, 400) * (((at - centre) ** 2).sum(0) < rng.uniform(0.05, 0.3))
    values += rng.normal(0, 20, SHAPE)
    values[np.abs(at).max(0) > 0.8] = 0
    return values.round().astype(np.int16)


def network(outputs: int) -> Network:
    torch.manual_seed(outputs)
    net = UNet(3, 1, outputs, channels=(8, 16), strides=(2,), norm="instance")
    return Network(net.eval().requires_grad_(False), torch.device("cpu"), torch.contiguous_format, precision="fp32")


def ours(net: Network, wanted: dict[str, Any], infer: dict[str, Any], output: dict[str, Any]) -> Labels:
    labels = [{"index": index, "keep": "all", "min_ml": 0.0} for index in output.pop("named", [1, 2])]
    job = {"grid": GRID.to_message(), "input": wanted, "output": {**output, "labels": labels}}
    done = run(net, "segmentation", torch.from_numpy(image()), infer, job, pulse=lambda: None)
    assert done.output.dtype == np.uint8 and done.output.shape == SHAPE
    found: Labels = done.output
    return found


def theirs(net: Network, steps: list[Any], inferer: Any, post: list[Any], invert_at: int, nearest: bool) -> Labels:
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE
    pre = Compose(
        [
            Orientationd("image", axcodes=ORIENTATION, labels=None),
            Spacingd("image", pixdim=TARGET, mode="bilinear"),
            *steps,
        ]
    )
    seen = pre({"image": MetaTensor(torch.from_numpy(image()[None].astype(np.float32)), affine=torch.from_numpy(ras))})
    with torch.inference_mode():
        seen["pred"] = inferer(seen["image"][None], net.module)[0]
    invert = Invertd("pred", transform=pre, orig_keys="image", nearest_interp=nearest, to_tensor=True)
    done = Compose([*post[:invert_at], invert, *post[invert_at:]])(seen)
    found: Labels = done["pred"][0].numpy().astype(np.uint8)
    return found


SOFTMAX, ARGMAX = Activationsd("pred", softmax=True), AsDiscreted("pred", argmax=True)
SLIDING = SlidingWindowInferer((16, 16, 16), sw_batch_size=2, overlap=0.25, mode="gaussian")
SCALED = ScaleIntensityRanged("image", -200, 300, 0, 1, clip=True)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "probabilities come back": (3, INPUT, INFER, OUTPUT, ([SCALED], SLIDING, [SOFTMAX, ARGMAX], 1, False)),
    "two classes": (
        *(2, INPUT, INFER, {**OUTPUT, "named": [1]}),
        ([SCALED], SLIDING, [SOFTMAX, ARGMAX], 1, False),
    ),
    "labels come back": (
        *(3, INPUT, INFER, {**OUTPUT, "inverse": "labels"}),
        ([SCALED], SLIDING, [SOFTMAX, ARGMAX], 2, True),
    ),
    "a range that does not clip": (
        3,
        {**INPUT, "intensity": [{"range": {"from": [-100, 100], "to": [-1, 2], "clip": False}}]},
        *(INFER, OUTPUT),
        ([ScaleIntensityRanged("image", -100, 100, -1, 2)], SLIDING, [SOFTMAX, ARGMAX], 1, False),
    ),
    "as the whole body bundle": (
        3,
        {
            **INPUT,
            "intensity": [
                {"normalize": {"nonzero": True, "mean": None, "std": None}},
                {"minmax": {"to": [-1.0, 1.0]}},
            ],
        },
        {**INFER, "window": [32, 32, 32], "edge": "replicate"},
        {**OUTPUT, "inverse": "labels"},
        (
            [NormalizeIntensityd("image", nonzero=True), ScaleIntensityd("image", minv=-1.0, maxv=1.0)],
            SlidingWindowInferer((32, 32, 32), 2, 0.25, mode="gaussian", padding_mode="replicate"),
            *([SOFTMAX, ARGMAX], 2, True),
        ),
    ),
    "normalized by the values given": (
        3,
        {**INPUT, "intensity": [{"clip": [-50, 50]}, {"normalize": {"nonzero": False, "mean": 10, "std": 40}}]},
        *(INFER, OUTPUT),
        (
            [
                ScaleIntensityRanged("image", -50, 50, -50, 50, clip=True),
                NormalizeIntensityd("image", subtrahend=10, divisor=40),
            ],
            *(SLIDING, [SOFTMAX, ARGMAX], 1, False),
        ),
    ),
    "cropped to the foreground": (
        3,
        {**INPUT, "crop": {"above": 0.5, "margin": 2}},
        *({**INFER, "pad_value": 0.0}, OUTPUT),
        (
            [
                SCALED,
                CropForegroundd("image", source_key="image", select_fn=lambda x: x > 0.5, margin=2, allow_smaller=True),
            ],
            *(SLIDING, [SOFTMAX, ARGMAX], 1, False),
        ),
    ),
    "all at once": (
        3,
        {**INPUT, "crop": None},
        *({**INFER, "window": None}, OUTPUT),
        ([SCALED], SimpleInferer(), [SOFTMAX, ARGMAX], 1, False),
    ),
    "one output and a threshold": (
        1,
        *(INPUT, INFER, {**OUTPUT, "activation": "sigmoid", "decide": 0.5, "named": [1]}),
        (
            *([SCALED], SLIDING),
            *([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)], 1, False),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_labels_are_those_that_monais_transforms_give(name: str) -> None:
    outputs, wanted, infer, output, reference = CASES[name]
    net = network(outputs)
    if infer["window"] is None:  # a network without strides: any size goes through
        torch.manual_seed(0)
        net.module = torch.nn.Conv3d(1, outputs, 3, padding=1).eval().requires_grad_(False)
    found = ours(net, wanted, infer, dict(output))
    expected = theirs(net, *reference)
    assert np.unique(expected).size > 1, "a case that shows something"
    assert (found == expected).mean() >= 0.99999


def test_mirrored_passes_are_averaged() -> None:
    net = network(3)
    plain = net.module

    class Mirrored(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            axes = ([], [2], [4], [2, 4])
            return torch.stack([plain(batch.flip(a)).flip(a) for a in axes]).mean(0)

    found = ours(net, INPUT, {**INFER, "mirror": [0, 2]}, dict(OUTPUT))
    net.module = Mirrored()
    assert (found == ours(net, INPUT, INFER, dict(OUTPUT))).mean() > 0.9999
    net.module = plain
    assert (found != ours(net, INPUT, INFER, dict(OUTPUT))).any(), "a case that shows something"


def test_a_class_without_a_label_is_background() -> None:
    net = network(3)
    both = ours(net, INPUT, INFER, dict(OUTPUT))
    one = ours(net, INPUT, INFER, {**OUTPUT, "named": [2]})
    np.testing.assert_array_equal(one, np.where(both == 2, 2, 0))


@pytest.mark.parametrize(("outputs", "decide"), [(2, "argmax"), (3, 0.5)])
def test_a_network_with_other_outputs_than_the_package_says_is_an_error(outputs: int, decide: Any) -> None:
    with pytest.raises(EngineError, match=f"{outputs} outputs"):
        ours(network(outputs), INPUT, INFER, {**OUTPUT, "decide": decide})


def test_no_number_is_an_error_and_no_empty_mask() -> None:
    net = network(3)
    first = next(net.module.parameters())
    first.view(-1)[0] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        ours(net, INPUT, INFER, dict(OUTPUT))


def test_every_piece_of_work_asks_whether_there_is_something_more_urgent() -> None:
    asked = []
    job = {
        "grid": GRID.to_message(),
        "input": INPUT,
        "output": {**OUTPUT, "labels": [{"index": 1, "keep": "largest_component", "connectivity": 1, "min_ml": 0.1}]},
    }
    run(network(3), "segmentation", torch.from_numpy(image()), INFER, job, pulse=lambda: asked.append(1))
    windows = np.prod([-(-n // 12) for n in GRID.shape])
    assert len(asked) >= windows // 2 + SHAPE[0]


# --- stacks that are not regular


def test_uneven_slices_are_sampled_where_they_lie() -> None:
    positions = (0.0, 2.0, 4.1, 6.0, 12.0, 14.0)  # jitter and a gap
    grid = ModelGrid((6, 5, 5), (8, 5, 5), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0, 1, 2), (False,) * 3, positions)
    volume = torch.tensor(positions)[:, None, None].expand(6, 5, 5) * 100.0
    for turned in (False, True):
        sampled = sample(volume, replace(grid, flipped=(turned, False, False)), torch.device("cpu"), 0.0)[:, 2, 2]
        expected = np.arange(8) * 200.0
        np.testing.assert_allclose(sampled, expected[::-1] if turned else expected, atol=1e-2)


def test_shifted_slices_are_sampled_where_they_lie_and_their_labels_come_back_there() -> None:
    """A tilted gantry: each slice lies half a row further. The value tells the row of the upright frame."""
    shifts = tuple((0.5 * k, 0.0) for k in range(6))
    grid = ModelGrid((6, 12, 4), (6, 15, 4), (1.0,) * 3, (1.0,) * 3, (0, 1, 2), (False,) * 3, (), shifts)
    assert grid.frame == (6, 15, 4)
    rows = torch.arange(12.0)[None, :, None] + torch.tensor([r for r, _ in shifts])[:, None, None]
    sampled = sample(rows.expand(6, 12, 4).contiguous(), grid, torch.device("cpu"), -1000.0)
    for k, (shift, _) in enumerate(shifts):
        inside = [r for r in range(15) if shift <= r <= shift + 11]
        np.testing.assert_allclose(sampled[k, inside, 0], np.array(inside, float), atol=1e-4)
        beyond = [r for r in range(15) if r < shift - 0.5 or r > shift + 11.5]
        assert (sampled[k, beyond] == -1000.0).all()
    net = Network(_Above(7.0), torch.device("cpu"), torch.contiguous_format, "fp32")
    job = {
        "grid": grid.to_message(),
        "input": {"intensity": [], "crop": None, "padding_hu": -1000.0},
        "output": {**OUTPUT, "activation": "none", "labels": [{"index": 1, "keep": "all", "min_ml": 0.0}]},
    }
    volume = rows.expand(6, 12, 4).contiguous()
    for inverse in ("probability", "labels"):
        job["output"]["inverse"] = inverse
        done = run(net, "segmentation", volume, {**INFER, "window": None}, job, pulse=lambda: None)
        expected = (volume.numpy() > 7.0) if inverse == "probability" else None
        if expected is not None:
            clear = np.abs(volume.numpy() - 7.0) > 0.01
            np.testing.assert_array_equal(done.output[clear], expected[clear])
        else:
            far = np.abs(volume.numpy() - 7.0) > 0.6
            np.testing.assert_array_equal(done.output[far], (volume.numpy() > 7.0)[far])


TILTED = ModelGrid(
    *((7, 12, 10), (7, 16, 10), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0, 1, 2), (True, False, True)),
    positions_mm=(0.0, 2.0, 4.0, 8.0, 10.0, 12.0, 14.0),  # one is missing
    shifts=tuple((0.5 * k, 0.0) for k in (0, 1, 2, 4, 5, 6, 7)),
)


def input_of(**keys: Any) -> dict[str, Any]:
    block = VolumeInputBlock.model_validate({"spacing_mm": (1, 1, 1), "intensity": [], **keys})
    return block.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize("limit", [28.0, -5.0])
def test_images_are_cut_before_all_else_where_the_package_says_so(limit: float) -> None:
    """Uneven slices in a tilted frame: what is cut away is background, what is kept does not move."""
    grid = replace(TILTED, shape=(8, 16, 10))
    assert grid.frame == (7, 16, 10)
    cut = grid.cut((slice(2, 6), slice(3, 12), slice(1, 8)))
    assert (cut.source_shape, cut.frame, cut.shape) == ((4, 9, 7), (4, 11, 7), (5, 11, 7))
    assert cut.positions_mm == (0.0, 4.0, 6.0, 8.0) and [r for r, _ in cut.shifts] == [0.0, 1.0, 1.5, 2.0]
    rows = torch.arange(12.0)[None, :, None] + torch.tensor([r for r, _ in grid.shifts])[:, None, None]
    volume = (rows + 20).expand(7, 12, 10).contiguous()
    volume[:2], volume[6:], volume[:, :3], volume[:, :, :1], volume[:, :, 8:] = 0, 0, 0, 0, 0
    wanted = input_of(first="crop", crop={"nonzero": True}, values="any", padding_hu=0.0)
    net = Network(_Above(limit), torch.device("cpu"), torch.contiguous_format, "fp32")
    job = {
        "grid": grid.to_message(),
        "input": wanted,
        "output": {**OUTPUT, "activation": "none", "labels": [{"index": 1, "keep": "all", "min_ml": 0.0}]},
    }
    done = run(net, "segmentation", volume, {**INFER, "window": None}, job, pulse=lambda: None)
    expected = volume.numpy() > max(limit, 0)
    clear = np.abs(volume.numpy() - limit) > 0.01
    np.testing.assert_array_equal(done.output[clear], expected[clear])
    assert 0.1 < done.output.mean() < 0.4


@pytest.mark.parametrize("first", ["resample", "crop"])
@pytest.mark.parametrize(("padding", "low"), [({}, 0.0), ({"padding_hu": -200.0}, 0.5)])
def test_open_corners_of_a_tilted_stack_do_not_squeeze_the_tissue(
    padding: dict[str, float], low: float, first: str
) -> None:
    """Of an MR they are filled with its own lowest value, unless the package says with what."""
    seen: list[torch.Tensor] = []

    class Watched(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(batch)
            return torch.cat([batch, -batch], 1)

    grid = replace(TILTED, shape=(8, 16, 10))
    volume = torch.linspace(100, 400, 7 * 12 * 10).reshape(7, 12, 10).round().to(torch.int16)
    net = Network(Watched(), torch.device("cpu"), torch.contiguous_format, "fp32")
    for steps, values in (([{"minmax": {}}], "any"), ([], "hu")):
        job = {
            "grid": grid.to_message(),
            "input": input_of(first=first, values=values, intensity=steps, **padding),
            "output": {**OUTPUT, "activation": "none", "labels": [{"index": 1, "keep": "all", "min_ml": 0.0}]},
        }
        run(net, "segmentation", volume, {**INFER, "window": None}, job, pulse=lambda: None)
    image, hounsfield = seen
    corner = image[0, 0, 0, 0, 0]  # the last slice, where its frame begins
    tissue = image[hounsfield >= 100]
    fixed = "padding_hu" in padding
    if first == "resample":  # figures of all that the network sees
        assert (float(corner), float(tissue.min())) == pytest.approx((0.0, low), abs=0.01)
    else:  # of the images themselves
        assert (float(corner), float(tissue.min())) == pytest.approx((-1.0 if fixed else 0.0, 0.0), abs=0.01)
    assert float(tissue.max()) == pytest.approx(1.0, abs=0.01)
    assert float(hounsfield.min()) == (-200.0 if fixed else -1000.0)  # air, of a CT


def test_a_crop_is_told_in_one_way() -> None:
    with pytest.raises(ValueError, match="has no meaning where nonzero is true"):
        input_of(crop={"nonzero": True, "above": 1.0})
    with pytest.raises(ValueError, match="first"):
        input_of(first="normalise")


class _Above(torch.nn.Module):
    """Class 1 where the value is above a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(batch), (batch - self.limit).clamp(-3, 3)], dim=1)


def test_a_grid_is_the_same_after_the_journey_to_the_runtime() -> None:
    import json

    shifts = tuple((0.5 * k, 0.25 * k) for k in range(21))
    grid = replace(GRID, positions_mm=tuple(3.0 * k for k in range(21)), shifts=shifts)
    for one in (GRID, grid):
        assert ModelGrid.from_message(json.loads(json.dumps(one.to_message()))) == one
