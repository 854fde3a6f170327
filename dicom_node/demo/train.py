"""Train the two demonstration models on phantoms and write them as packages.

    python -m dicom_node.demo.train [ct|cxr|all] [--out DIR]

One command, fixed seeds, one core for torch (numpy's BLAS takes every core unless OPENBLAS_NUM_THREADS=1
says otherwise; on a shared machine say so). Each package is a folder with fp16 weights (safetensors), the figures
measured on held-out phantoms with exactly these rounded weights, and a model.yaml that describes the
network by name and arguments, so that loading it runs no code of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
import yaml
from monai.losses.dice import DiceCELoss
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dicom_node.demo.measure import (
    CALIBRATION,
    CT_PADDING_HU,
    CT_WINDOW,
    CXR_SIZE,
    HELD_OUT,
    TRAIN,
    best_f1_threshold,
    build_network,
    ct_sample,
    cxr_sample,
    measure_ct,
    measure_cxr,
    predict_cxr,
    scale_hu,
)
from dicom_node.demo.packages import CT_NETWORK, CXR_NETWORK, WEIGHTS_FILE, ct_package, cxr_package
from dicom_node.demo.phantom_ct import LABEL_KEYS
from dicom_node.demo.phantom_cxr import FINDING_NAMES

STATEMENT = "demonstration, trained on synthetic phantoms, not for clinical use"
CT_SCANS, CT_STEPS, CT_BATCH = 96, 1200, 2
CXR_IMAGES, CXR_STEPS, CXR_BATCH = 5000, 2400, 24
CT_TEST, CXR_TEST, CXR_CALIBRATION = 16, 600, 600
_SEED = 20260

Batch = tuple[torch.Tensor, torch.Tensor]


def main(argv: list[str] | None = None) -> int:
    """Command line entry; prints what was measured."""
    parser = argparse.ArgumentParser(prog="dicom_node.demo.train", description=__doc__)
    parser.add_argument("which", nargs="?", choices=("ct", "cxr", "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.which in ("ct", "all"):
        _show(train_ct(options.out))
    if options.which in ("cxr", "all"):
        _show(train_cxr(options.out))
    return 0


def _show(figures: dict[str, Any]) -> None:
    print(json.dumps(figures, indent=2), flush=True)


# --- CT ------------------------------------------------------------------------------------------------


def train_ct(out: Path) -> dict[str, Any]:
    """Train, round, measure and write demo-ct-abdomen; return what eval.json says."""
    started = time.monotonic(), time.process_time()
    pool = [ct_sample(TRAIN + i) for i in range(CT_SCANS)]
    rng = np.random.default_rng(_SEED)
    network = _new_network(CT_NETWORK)
    # Dice over the whole batch: a window without an organ has no Dice of its own to learn from
    loss = DiceCELoss(
        softmax=True, to_onehot_y=True, include_background=False, batch=True, smooth_nr=1.0, smooth_dr=1.0
    )
    _optimise(network, loss, lambda: _ct_batch(pool, rng), CT_STEPS, rate=4e-3)
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    folder = out / "demo-ct-abdomen"
    sha256, network = _write_weights(network, folder, CT_NETWORK)
    seeds = range(HELD_OUT, HELD_OUT + CT_TEST)
    figures = measure_ct(network, seeds)
    report = {
        "statement": STATEMENT,
        "mean_dice": round(figures.mean_dice, 4),
        **_rounded(asdict(figures)),
        "training": {"scans": CT_SCANS, "steps": CT_STEPS, "batch": CT_BATCH, "window": list(CT_WINDOW)},
        "seeds": {"train": [TRAIN, TRAIN + CT_SCANS - 1], "held_out": [seeds[0], seeds[-1]]},
        **_provenance(network, seconds, sha256),
    }
    _write_package(folder, ct_package(sha256), report)
    return report


def _ct_batch(pool: list[tuple[NDArray[np.int16], NDArray[np.uint8]]], rng: np.random.Generator) -> Batch:
    """Windows (batch, 1, 64, 64, 64) and labels of the same shape.

    Never mirrored: the side an organ is on is part of what it is.
    """
    images, truths = [], []
    for _ in range(CT_BATCH):
        hu, labels = pool[rng.integers(len(pool))]
        hu, labels = _cut_window(hu, labels, rng)
        changed = hu * rng.uniform(0.93, 1.07) + rng.uniform(-12, 12)
        if rng.random() < 0.5:
            changed = changed + rng.standard_normal(hu.shape, np.float32) * rng.uniform(0, 12)
        images.append(scale_hu(changed))
        truths.append(labels)
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(truths))[:, None].long()


def _cut_window(
    hu: NDArray[np.int16], labels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """One window, mostly around a random organ voxel; it may reach over the edge, as at inference."""
    if rng.random() < 0.75 and labels.any():
        wanted = rng.choice([k for k in LABEL_KEYS if (labels == k).any()])
        candidates = np.argwhere(labels == wanted)
        centre = candidates[rng.integers(len(candidates))] + rng.integers(-20, 21, 3)
    else:
        centre = np.array([rng.integers(0, n) for n in hu.shape])
    window = np.array(CT_WINDOW)
    size = np.array(hu.shape)
    # sliding windows never start outside; a scan smaller than the window is padded on both sides
    start = np.where(size > window, np.clip(centre - window // 2, 0, size - window), (size - window) // 2)
    low, high = np.maximum(start, 0), np.minimum(start + window, size)
    source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    cut_hu = np.full(CT_WINDOW, CT_PADDING_HU, np.int16)
    cut_labels = np.zeros(CT_WINDOW, np.uint8)
    cut_hu[target], cut_labels[target] = hu[source], labels[source]
    return cut_hu, cut_labels


# --- radiographs ---------------------------------------------------------------------------------------


def train_cxr(out: Path) -> dict[str, Any]:
    """Train, calibrate, round, measure and write demo-cxr-findings; return what eval.json says."""
    started = time.monotonic(), time.process_time()
    images = np.empty((CXR_IMAGES, CXR_SIZE, CXR_SIZE), np.float16)
    truths = np.empty((CXR_IMAGES, len(FINDING_NAMES)), np.float32)
    for i in range(CXR_IMAGES):
        images[i], truths[i] = cxr_sample(TRAIN + i)
    rng = np.random.default_rng(_SEED)
    network = _new_network(CXR_NETWORK)
    loss = torch.nn.BCEWithLogitsLoss()
    _optimise(network, loss, lambda: _cxr_batch(images, truths, rng), CXR_STEPS, rate=6e-3)
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    folder = out / "demo-cxr-findings"
    sha256, network = _write_weights(network, folder, CXR_NETWORK)
    probability, truth = predict_cxr(network, range(CALIBRATION, CALIBRATION + CXR_CALIBRATION))
    thresholds = {
        key: round(best_f1_threshold(probability[:, i], truth[:, i]), 4) for i, key in enumerate(FINDING_NAMES)
    }
    seeds = range(HELD_OUT, HELD_OUT + CXR_TEST)
    figures = measure_cxr(*predict_cxr(network, seeds), thresholds)
    report = {
        "statement": STATEMENT,
        "mean_auc": round(figures.mean_auc, 4),
        **_rounded(asdict(figures)),
        "thresholds": thresholds,
        "training": {"images": CXR_IMAGES, "steps": CXR_STEPS, "batch": CXR_BATCH, "size": CXR_SIZE},
        "seeds": {
            "train": [TRAIN, TRAIN + CXR_IMAGES - 1],
            "calibration": [CALIBRATION, CALIBRATION + CXR_CALIBRATION - 1],
            "held_out": [seeds[0], seeds[-1]],
        },
        **_provenance(network, seconds, sha256),
    }
    _write_package(folder, cxr_package(sha256, thresholds), report)
    return report


def _cxr_batch(images: NDArray[np.float16], truths: NDArray[np.float32], rng: np.random.Generator) -> Batch:
    """(batch, 1, size, size) and (batch, finding); shifted, mirrored, noisier, with another contrast.

    Mirroring is fine here: no finding says on which side it is.
    """
    chosen = rng.integers(len(images), size=CXR_BATCH)
    batch = np.zeros((CXR_BATCH, 1, CXR_SIZE, CXR_SIZE), np.float32)
    for k, i in enumerate(chosen):
        image = images[i].astype(np.float32)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        rows, columns = rng.integers(-10, 11, 2)
        image = np.roll(image, (rows, columns), (0, 1))
        batch[k, 0] = image * rng.uniform(0.85, 1.15) + rng.uniform(-0.15, 0.15)
    return torch.from_numpy(batch), torch.from_numpy(truths[chosen])


# --- both ----------------------------------------------------------------------------------------------


def _new_network(spec: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(_SEED)
    return build_network(spec)


def _optimise(
    network: torch.nn.Module,
    loss: torch.nn.Module,
    next_batch: Callable[[], Batch],
    steps: int,
    *,
    rate: float,
) -> None:
    """AdamW with one warm-up and a cosine to zero: no validation, no early stop, the end is the result."""
    # half the time of the default layout on one core, for planes and for volumes
    layout = torch.channels_last if next(network.parameters()).ndim == 4 else torch.channels_last_3d
    network.to(memory_format=layout).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    running, started = 0.0, time.monotonic()
    for step in range(1, steps + 1):
        image, truth = next_batch()
        optimiser.zero_grad(set_to_none=True)
        value = loss(network(image.to(memory_format=layout)), truth)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        running += float(value.detach())
        if step % 50 == 0:
            print(f"step {step}/{steps} loss {running / 50:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0


def _write_weights(network: torch.nn.Module, folder: Path, spec: dict[str, Any]) -> tuple[str, torch.nn.Module]:
    """Save as fp16; return the file's sha256 and the network as it reads back."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous(
            memory_format=torch.contiguous_format
        )
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"note": STATEMENT})
    path.chmod(0o644)  # safetensors writes for the owner only
    rounded = build_network(spec)
    rounded.load_state_dict(load_file(path), strict=True)
    return hashlib.sha256(path.read_bytes()).hexdigest(), rounded.eval()


def _rounded(figures: Any) -> Any:
    if isinstance(figures, float):
        return round(figures, 4)
    if isinstance(figures, dict):
        return {key: _rounded(value) for key, value in figures.items()}
    return figures


def _provenance(network: torch.nn.Module, seconds: tuple[float, float], sha256: str) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_seconds": round(seconds[0]),
        "training_cpu_seconds": round(seconds[1]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "weights_sha256": sha256,
    }


def _write_package(folder: Path, package: dict[str, Any], report: dict[str, Any]) -> None:
    text = yaml.safe_dump(package, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    (folder / "model.yaml").write_text(text, encoding="utf-8")
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
