"""The model zoo's spleen network, from DICOM files to labels on their grid: ours beside stock MONAI, in one run.

    python benchmarks/zoo_spleen.py [--folder DIR] [--build DIR] [--slices N] [--train-only]

Makes a bundle with the keys of the zoo's spleen_ct_segmentation (UNet 16 to 256, windows of 96^3 with overlap .5,
1.5 x 1.5 x 2 mm), its weights trained for a few minutes on phantoms and kept in DIR (build/zoo-spleen), and a CT
series from a phantom. One thread. `F` is the time inside the network; stages are CPU seconds. Ours runs
in the environment that the node gives its runtime process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from pydicom.filereader import dcmread, read_file_meta_info

from dicom_node.demo.phantom_ct import SPLEEN, ct_phantom
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.model import (
    EngineTask,
    Origin,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.models.runtime import child_environment

NETWORK = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [16, 32, 64, 128, 256],
    "strides": [2, 2, 2, 2],
    "num_res_units": 2,
    "norm": "batch",
}
PIXDIM, RANGE, WINDOW, OVERLAP = (1.5, 1.5, 2.0), (-57.0, 164.0), (96, 96, 96), 0.5
STEPS, SCANS, PATCH = 160, 8, 64


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--build", type=Path, default=Path("build/zoo-spleen"))
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--ours", nargs=2, metavar=("PRECISION", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ours:
        stages, labels = _ours(options.build, options.folder, options.ours[0])
        np.savez(options.ours[1], labels=labels, stages=json.dumps(stages))
        return
    make_bundle(options.build)
    if options.train_only:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not any(folder.glob("*.dcm")):
            write_ct_series(folder, 3, shape=(options.slices, 512, 512), spacing_mm=(1.25, 0.75, 0.75))
        compare(options.build, folder)


# --- the bundle ------------------------------------------------------------------------------------------------------


def make_bundle(folder: Path) -> None:
    """A bundle in the zoo's layout; trains its weights unless they are there."""
    weights = folder / "models" / "model.pt"
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train().state_dict(), weights)
    configs = folder / "configs"
    configs.mkdir(exist_ok=True)
    (configs / "metadata.json").write_text(json.dumps(METADATA, indent=2))
    (configs / "inference.json").write_text(json.dumps(INFERENCE, indent=2))


def train() -> torch.nn.Module:
    """The zoo's architecture, roughly trained on phantoms: enough for organ-like masks."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    network = UNet(**NETWORK).to(memory_format=torch.channels_last_3d).train()
    scans = [ct_phantom(seed, (130, 220, 260), (2.0, 1.5, 1.5), spleen=True) for seed in range(SCANS)]
    pool = [(turned(scan.hu), turned(scan.labels == SPLEEN)) for scan in scans]
    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        batch = [_patch(*pool[rng.integers(len(pool))], rng) for _ in range(2)]
        image, truth = (torch.from_numpy(np.stack(part))[:, None] for part in zip(*batch, strict=True))
        optimiser.zero_grad(set_to_none=True)
        value = loss(network(image.to(memory_format=torch.channels_last_3d)), truth)
        value.backward()
        optimiser.step()
        schedule.step()
        if step % 40 == 0:
            print(f"training: step {step}/{STEPS} loss {float(value.detach()):.3f}", flush=True)
    return network.eval()


def turned(volume: Any) -> Any:
    """(slice, row, column) in LPS to (x, y, z) in RAS."""
    return np.ascontiguousarray(volume.transpose(2, 1, 0)[::-1, ::-1])


def _patch(hu: Any, mask: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    if rng.random() < 0.7:
        inside = np.argwhere(mask)
        centre = inside[rng.integers(len(inside))] + rng.integers(-16, 17, 3)
    else:
        centre = np.array([rng.integers(n) for n in hu.shape])
    start = np.clip(centre - PATCH // 2, 0, np.array(hu.shape) - PATCH)
    place = tuple(slice(s, s + PATCH) for s in start)
    scaled = np.clip((hu[place].astype(np.float32) - RANGE[0]) / (RANGE[1] - RANGE[0]), 0, 1)
    return scaled, mask[place].astype(np.int64)


METADATA: dict[str, Any] = {
    "version": "0.0.1",
    "monai_version": "1.6.1",
    "pytorch_version": "2.13.0",
    "numpy_version": "2.0.0",
    "name": "zoo-like spleen",
    "task": "Decathlon-like spleen segmentation, trained on phantoms",
    "description": "demonstration, trained on synthetic phantoms, not for clinical use",
    "intended_use": "demonstration, trained on synthetic phantoms, not for clinical use",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "image",
                "format": "hounsfield",
                "modality": "CT",
                "num_channels": 1,
                "spatial_shape": list(WINDOW),
                "dtype": "float32",
                "value_range": [0, 1],
                "is_patch_data": True,
                "channel_def": {"0": "image"},
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "format": "segmentation",
                "num_channels": 2,
                "spatial_shape": list(WINDOW),
                "dtype": "float32",
                "value_range": [0, 1],
                "is_patch_data": True,
                "channel_def": {"0": "background", "1": "spleen"},
            }
        },
    },
}
INFERENCE: dict[str, Any] = {
    "imports": ["$import glob", "$import os"],
    "bundle_root": ".",
    "image_key": "image",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {"_target_": "UNet", **NETWORK},
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "@image_key"},
            {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
            {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "@image_key", "pixdim": list(PIXDIM), "mode": "bilinear"},
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "@image_key",
                "a_min": RANGE[0],
                "a_max": RANGE[1],
                "b_min": 0,
                "b_max": 1,
                "clip": True,
            },
            {"_target_": "EnsureTyped", "keys": "@image_key"},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": list(WINDOW), "sw_batch_size": 4, "overlap": OVERLAP},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "@image_key",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
        ],
    },
}


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(bundle: Path, folder: Path) -> None:
    """Both pipelines over the same files; prints stages, ratios and how far the labels agree."""
    stock_stages, stock = _stock(bundle, folder)
    our_stages, ours = _ours_apart(bundle, folder, "fp32")
    total = [sum(stages.values()) for stages in (stock_stages, our_stages)]
    forward = [stages["F"] for stages in (stock_stages, our_stages)]
    print(f"\n{'CPU seconds, one thread':<34}{'stock MONAI':>14}{'ours':>10}")
    for name in dict.fromkeys((*stock_stages, *our_stages)):
        cells = [f"{stages[name]:.2f}" if name in stages else "-" for stages in (stock_stages, our_stages)]
        ratio = f"{stock_stages[name] / our_stages[name]:8.1f} x" if name in stock_stages and name in our_stages else ""
        print(f"  {name:<32}{cells[0]:>14}{cells[1]:>10}{ratio}")
    rest = [whole - inside for whole, inside in zip(total, forward, strict=True)]
    for name, (a, b) in {"everything but F": rest, "F": forward, "all": total}.items():
        print(f"  {name:<32}{a:>14.2f}{b:>10.2f}{a / b:8.1f} x")
    print(f"stock MONAI and ours in fp32: {agreement(stock, ours)}")
    amx = torch.cpu._is_amx_tile_supported()
    half_stages, half = _ours_apart(bundle, folder, "bf16")
    print(
        f"ours in bf16 ({'AMX' if amx else 'emulated: no AMX here'}), F {half_stages['F']:.2f} s, "
        f"all {sum(half_stages.values()):.2f} s; fp32 and bf16: {agreement(ours, half)}"
    )


def agreement(one: Any, other: Any) -> str:
    """How far two label volumes agree."""
    differ = int((one != other).sum())
    a, b = one > 0, other > 0
    dice = 2 * int((a & b).sum()) / max(int(a.sum()) + int(b.sum()), 1)
    equal = 100 * (1 - differ / one.size)
    return f"{equal:.5f} % of voxels equal, {differ} differ; Dice {dice:.5f}; {int(a.sum())} labelled"


class _Inside:
    """CPU seconds spent inside a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.seconds, self._from = 0.0, 0.0
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._from = time.process_time()

    def _leave(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._from


def _timed(stages: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = work()
    stages[name] = time.process_time() - started
    return result


def _stock(bundle: Path, folder: Path) -> tuple[dict[str, float], Any]:
    """The bundle's own transforms and inferer, by MONAI. Returns stages and labels (slice, row, column)."""
    from monai.bundle import ConfigParser
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, LoadImaged

    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    network.eval()
    inside = _Inside(network)
    preparing = parser.get_parsed_content("preprocessing")
    load, rest = LoadImaged("image", reader="PydicomReader"), Compose(list(preparing.transforms[1:]))
    stages: dict[str, float] = {}
    with torch.no_grad():
        loaded = _timed(stages, "read, decode, HU", lambda: load({"image": str(folder)}))
        data = _timed(stages, "orientation, spacing, scale", lambda: rest(loaded))
        infer = SlidingWindowInferer(WINDOW, 4, OVERLAP)
        data["pred"] = _timed(stages, "windows, merge", lambda: infer(data["image"][None], network))[0]
        stages["windows, merge"] -= inside.seconds
        stages["F"] = inside.seconds
        after = Compose(
            [
                Activationsd("pred", softmax=True),
                Invertd("pred", rest, orig_keys="image", nearest_interp=False, to_tensor=True),
                AsDiscreted("pred", argmax=True),
            ]
        )
        done = _timed(stages, "back to the grid, argmax", lambda: after(data))
    labels = np.asarray(done["pred"][0]).astype(np.uint8)  # (column, row, slice) as the reader lays it
    affine = np.asarray(loaded["image"].affine)
    labels = labels.transpose(2, 1, 0)
    return stages, labels if affine[2, 2] > 0 else labels[::-1]


def _ours_apart(bundle: Path, folder: Path, precision: str) -> tuple[dict[str, float], Any]:
    """`_ours` in a process with the environment of the node's runtime; stock MONAI has that of its users."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "ours.npz")
        given = ["--build", str(bundle), "--folder", str(folder), "--ours", precision, str(out)]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *given], check=True, env=child_environment())
        with np.load(out) as found:
            return json.loads(str(found["stages"])), found["labels"]


def _ours(bundle: Path, folder: Path, precision: str) -> tuple[dict[str, float], Any]:
    """The node's own path over the same bundle, in this process so that F can be told apart."""
    from dicom_node.models import forward, segment
    from dicom_node.models.registry import find_package
    from dicom_node.models.volume import labels_of, network_rows, network_values

    package = find_package(str(bundle))
    manifest = package.manifest
    assert manifest.task == "segmentation"
    infer = manifest.infer.model_dump(mode="json") | {"precision": precision}
    source = manifest.source.model_dump(mode="json")
    network = forward.load_network(str(package.weights_path), source, infer, torch.device("cpu"))
    inside = _Inside(network.module)
    stages: dict[str, float] = {}
    task = task_of(folder)
    prepared = _timed(stages, "read, decode, HU", lambda: segment.prepare(manifest, task, _no_beat))
    job, grid, cpu = segment.volume_job(manifest, prepared.grid), prepared.grid, torch.device("cpu")
    volume = torch.from_numpy(prepared.volume_hu)
    with torch.inference_mode():
        values, beyond = _timed(
            stages,
            "orientation, spacing, scale",
            lambda: network_values(volume, grid, job["input"], cpu, _no_beat),
        )
        seen = values.permute(grid.to_model_order())
        answer = _timed(
            stages,
            "windows, merge",
            lambda: network_rows(network, seen, infer, job["output"], beyond, _no_beat),
        )
        stages["windows, merge"] -= inside.seconds
        stages["F"] = inside.seconds
        whole = (slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2]))
        labels = _timed(
            stages,
            "back to the grid, argmax",
            lambda: labels_of(answer[0], grid, job["output"], whole, _no_beat),
        )
    finished = _timed(stages, "measure", lambda: segment.finish(manifest, prepared, labels, _no_beat))
    return stages, finished[0].labels


def _no_beat() -> None:
    """Nobody waits for a heartbeat here."""


def task_of(folder: Path) -> EngineTask:
    """The series as the worker would hand it to an engine."""
    paths = sorted(folder.glob("*.dcm"))
    first = dcmread(paths[0], stop_before_pixels=True)
    words = ("Modality", "SOPClassUID", "BodyPartExamined")
    values = {word: (str(first[word].value),) for word in words if word in first}
    header = SeriesHeader(series_instance_uid=str(first.SeriesInstanceUID), instance_count=len(paths), values=values)
    return EngineTask(
        job_id=0,
        study_instance_uid=str(first.StudyInstanceUID),
        series_instance_uid=header.series_instance_uid,
        instances=tuple(_stored(path) for path in paths),
        header=header,
        timeout_s=600.0,
    )


def _stored(path: Path) -> StoredInstance:
    meta = read_file_meta_info(path)
    offset = 132 + 12 + meta.FileMetaInformationGroupLength
    return StoredInstance(
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        study_instance_uid="",
        series_instance_uid="",
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="",
        origin=Origin.RECEIVED,
    )


if __name__ == "__main__":
    main()
