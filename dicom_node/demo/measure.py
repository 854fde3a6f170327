"""What the demonstration networks see, and how well they do on it.

Training, the figures in eval.json and the tests all take their samples and their metrics from here, so
that a figure always means the same thing. Needs torch and monai; knows nothing of optimisers or files.

Seeds are split once and for all: TRAIN, CALIBRATION (thresholds), HELD_OUT (the figures in eval.json) and
REGRESSION (measured again by the tests) never overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.networks import nets
from numpy.typing import NDArray

from dicom_node.demo.phantom_ct import LABEL_KEYS, ct_phantom
from dicom_node.demo.phantom_cxr import FINDING_NAMES, cxr_phantom
from dicom_node.radiograph import prepare_radiograph

__all__ = [
    "CALIBRATION",
    "CT_SPACING_MM",
    "CT_WINDOW",
    "CXR_SIZE",
    "HELD_OUT",
    "REGRESSION",
    "TRAIN",
    "CtFigures",
    "CxrFigures",
    "auc",
    "best_f1_threshold",
    "build_network",
    "ct_sample",
    "cxr_sample",
    "measure_ct",
    "measure_cxr",
    "predict_cxr",
]

TRAIN, CALIBRATION, HELD_OUT, REGRESSION = 1_000_000, 2_000_000, 3_000_000, 4_000_000

CT_SPACING_MM = 4.0
CT_WINDOW = (64, 64, 64)
CT_CLIP_HU = (-160.0, 240.0)
CT_PADDING_HU = -1000.0
CXR_SIZE = 192
_MIN_ML = 5.0  # smaller pieces at the edge of a scan are not scored by Dice
_SLICE_STEPS_MM = (1.25, 2.5, 3.0, 4.0, 5.0, 6.0)


def build_network(spec: dict[str, Any]) -> torch.nn.Module:
    """Construct the MONAI network named in a model.yaml `network` block: {name, args}, plain values only."""
    network: torch.nn.Module = getattr(nets, spec["name"])(**spec["args"])
    return network


# --- CT ------------------------------------------------------------------------------------------------


def scale_hu(hu: NDArray[np.generic]) -> NDArray[np.float32]:
    """Clip HU and map them to -1..1, the network's input range."""
    low, high = CT_CLIP_HU
    clipped = np.clip(np.asarray(hu, np.float32), low, high)
    return np.asarray((clipped - low) * (2 / (high - low)) - 1, np.float32)


def ct_sample(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and labels of patient `seed` on the network's 4 mm grid, both (X, Y, Z) in RAS order.

    The HU come from slices of one of several thicknesses, interpolated linearly along z as a real series
    would be; the labels are sampled on the network's grid itself. Three in ten scans cover only a part.
    """
    rng = np.random.default_rng([0xCA, seed])
    width = int(rng.integers(80, 122))
    partial = rng.random() < 0.3
    depth_mm = rng.uniform(60, 200) if partial else rng.uniform(240, 340)
    reach = 110.0 if partial else 30.0
    centre = (rng.uniform(-25, 25), rng.uniform(-25, 25), rng.uniform(-reach, reach))
    noise = float(rng.uniform(3, 20))
    step = float(rng.choice(_SLICE_STEPS_MM))
    depth = int(depth_mm / CT_SPACING_MM)
    shape, spacing = (depth, width, width), (CT_SPACING_MM,) * 3
    truth = ct_phantom(seed, shape, spacing, centre_mm=centre, noise_hu=0)
    # slices at `step` over the same extent, as fractional indices of the 4 mm grid
    native = np.arange(rng.uniform(-0.5, 0), depth + step / CT_SPACING_MM, step / CT_SPACING_MM)
    scan = ct_phantom(seed, shape, spacing, centre_mm=centre, noise_hu=noise, slice_indices=[float(i) for i in native])
    at = np.clip((np.arange(depth) - native[0]) * (CT_SPACING_MM / step), 0, len(native) - 1)
    below = np.minimum(at.astype(int), len(native) - 2)
    part = (at - below).astype(np.float32)[:, None, None]
    hu = scan.hu[below] * (1 - part) + scan.hu[below + 1] * part
    return _lps_to_ras(np.rint(hu).astype(np.int16)), _lps_to_ras(truth.labels)


def _lps_to_ras(volume: NDArray[Any]) -> NDArray[Any]:
    """(slice, row, column) growing to S, P, L -> (X, Y, Z) growing to R, A, S."""
    return np.ascontiguousarray(volume.transpose(2, 1, 0)[::-1, ::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class CtFigures:
    """Dice per organ over the scans that show at least 5 ml of it; false volume where there is none."""

    scans: int
    dice: dict[str, float]
    worst_dice: dict[str, float]
    scored: dict[str, int]
    false_ml_when_absent: dict[str, float]

    @property
    def mean_dice(self) -> float:
        """Mean over the organs."""
        return float(np.mean(list(self.dice.values())))


def measure_ct(network: torch.nn.Module, seeds: Iterable[int]) -> CtFigures:
    """Segment fresh scans by sliding windows, without any clean-up, and compare with the truth."""
    network.eval()
    voxel_ml = CT_SPACING_MM**3 / 1000
    scores: dict[str, list[float]] = {key: [] for key in LABEL_KEYS.values()}
    false_ml: dict[str, list[float]] = {key: [] for key in LABEL_KEYS.values()}
    scans = 0
    for seed in seeds:
        hu, truth = ct_sample(seed)
        found = predict_ct(network, hu)
        scans += 1
        for label, key in LABEL_KEYS.items():
            a, b = found == label, truth == label
            if b.sum() * voxel_ml >= _MIN_ML:
                scores[key].append(float(2 * (a & b).sum() / (a.sum() + b.sum())))
            elif not b.any():
                false_ml[key].append(float(a.sum() * voxel_ml))
    return CtFigures(
        scans=scans,
        dice={k: float(np.mean(v)) if v else float("nan") for k, v in scores.items()},
        worst_dice={k: float(np.min(v)) if v else float("nan") for k, v in scores.items()},
        scored={k: len(v) for k, v in scores.items()},
        false_ml_when_absent={k: float(np.max(v)) if v else 0.0 for k, v in false_ml.items()},
    )


def predict_ct(network: torch.nn.Module, hu: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Labels (X, Y, Z) for HU (X, Y, Z) on the network's grid."""
    image = torch.from_numpy(scale_hu(hu))[None, None]
    padding = float(scale_hu(np.array([CT_PADDING_HU]))[0])
    with torch.inference_mode():
        logits = sliding_window_inference(image, CT_WINDOW, 2, network, overlap=0.25, mode="gaussian", cval=padding)
    assert isinstance(logits, torch.Tensor)
    labels: NDArray[np.uint8] = logits[0].argmax(0).numpy().astype(np.uint8)
    return labels


# --- radiographs ---------------------------------------------------------------------------------------


def cxr_sample(seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Network input (CXR_SIZE, CXR_SIZE) and truth (finding,) of radiograph `seed`, of a random format."""
    rng = np.random.default_rng([0xCB, seed])
    columns = int(rng.integers(208, 290))
    rows = round(columns * rng.uniform(0.9, 1.25))
    phantom = cxr_phantom(seed, rows, columns)
    truth = np.array([phantom.findings[key] for key in FINDING_NAMES])
    # twelve stored bits, as the image would come out of a file
    stored = np.rint(phantom.image * 3400).astype(np.uint16)
    return prepare_radiograph(stored, CXR_SIZE), truth


@dataclass(frozen=True, slots=True, kw_only=True)
class CxrFigures:
    """Ranking quality per finding, and counts at fixed thresholds."""

    images: int
    auc: dict[str, float]
    positives: dict[str, int]
    sensitivity: dict[str, float]
    specificity: dict[str, float]
    brier: float

    @property
    def mean_auc(self) -> float:
        """Mean over the findings."""
        return float(np.mean(list(self.auc.values())))


def predict_cxr(network: torch.nn.Module, seeds: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Probabilities and truth, both (image, finding)."""
    network.eval()
    probabilities: list[NDArray[np.float32]] = []
    truths: list[NDArray[np.bool_]] = []
    with torch.inference_mode():
        for start in range(0, len(seeds), 16):
            batch = [cxr_sample(seed) for seed in seeds[start : start + 16]]
            images = torch.from_numpy(np.stack([image for image, _ in batch]))[:, None]
            probabilities.append(torch.sigmoid(network(images)).numpy())
            truths.extend(truth for _, truth in batch)
    return np.concatenate(probabilities), np.stack(truths)


def measure_cxr(probability: NDArray[np.float32], truth: NDArray[np.bool_], thresholds: dict[str, float]) -> CxrFigures:
    """Score predictions (image, finding) against the truth."""
    areas, positives, sensitivity, specificity = {}, {}, {}, {}
    for i, key in enumerate(FINDING_NAMES):
        p, t = probability[:, i], truth[:, i]
        areas[key] = auc(p, t)
        positives[key] = int(t.sum())
        called = p >= thresholds[key]
        sensitivity[key] = float(called[t].mean())
        specificity[key] = float((~called[~t]).mean())
    return CxrFigures(
        images=len(truth),
        auc=areas,
        positives=positives,
        sensitivity=sensitivity,
        specificity=specificity,
        brier=float(np.mean((probability - truth) ** 2)),
    )


def auc(score: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks; ties count half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        raise ValueError("an AUC needs at least one positive and one negative case")
    return float((rank[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def best_f1_threshold(score: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """The threshold with the highest F1, half way to the next lower score so that ties do not matter."""
    order = np.argsort(-score)
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + truth.sum())
    best = int(np.argmax(f1))
    lower = score[order[min(best + 1, len(score) - 1)]]
    return float((score[order[best]] + lower) / 2)
