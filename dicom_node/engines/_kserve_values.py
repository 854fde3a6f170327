"""What a recipe asks to be done to the values of a volume, and what it makes of scores. Pure numbers.

The steps are those of `model.yaml`: MONAI's ScaleIntensityRange, NormalizeIntensity and ScaleIntensity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dicom_node.engines._kserve_recipe import NormalizeStep, Step, VolumeOutput

__all__ = ["activated", "apply_steps", "decider"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def apply_steps(values: Floats, steps: Sequence[Step], beyond: float) -> float:
    """Do every step to `values`, in place, and to `beyond`, a value that lies outside of the volume; returns that."""
    edge = np.array([beyond], np.float32)
    for step in steps:
        if step.clip is not None:
            for each in (values, edge):
                np.clip(each, *step.clip, out=each)
        elif step.range is not None:
            _mapped(values, edge, step.range.source, step.range.to, clip=step.range.clip)
        elif step.minmax is not None:
            low, high = float(values.min()), float(values.max())
            _mapped(values, edge, (low, high if high > low else low + 1), step.minmax, clip=False)
        elif step.normalize is not None:
            _normalized(values, edge, step.normalize)
    return float(edge[0])


def _mapped(values: Floats, edge: Floats, source: tuple[float, float], to: tuple[float, float], *, clip: bool) -> None:
    (low, high), (a, b) = source, to
    for each in (values, edge):
        each -= np.float32(low)
        each *= np.float32((b - a) / (high - low))
        each += np.float32(a)
        if clip:
            np.clip(each, min(a, b), max(a, b), out=each)


def _normalized(values: Floats, edge: Floats, step: NormalizeStep) -> None:
    mean, std = step.mean, step.std
    if mean is None or std is None:
        own = float(values.mean(dtype=np.float64))
        mean = own if mean is None else mean
        # of all the values there are, not an estimate from a sample; plane by plane, without a second volume
        squares = sum(float(((plane - own) ** 2).sum(dtype=np.float64)) for plane in values) if std is None else 0.0
        std = (squares / values.size) ** 0.5 or 1.0 if std is None else std
    for each in (values, edge):
        each -= np.float32(mean)
        each /= np.float32(std)


# --- scores ----------------------------------------------------------------------------------------------------------


def activated(scores: Floats, activation: str) -> Floats:
    """Scores (class, ...) as probabilities, where they are not yet."""
    if activation == "softmax":
        raised = np.exp(scores - scores.max(axis=0))
        return np.asarray(raised / raised.sum(axis=0), np.float32)
    if activation == "sigmoid":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-scores)), np.float32)
    return scores


def decider(output: VolumeOutput) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Labels]]:
    """What is interpolated of a plane of blended scores (class, row, column), and how labels come of that.

    Both are such that a pixel between corners that are all background is background.
    """
    thresholds = np.array(output.thresholds, np.float32)[:, None, None]
    if not thresholds.size:
        return lambda scores: activated(scores, output.activation), _first_largest
    return lambda scores: activated(scores, output.activation) - thresholds, _furthest_above


def _first_largest(scores: Floats) -> Labels:
    """argmax over the first axis, the lower class where two are equal; faster than numpy's along that axis."""
    best = scores[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for number in range(1, len(scores)):
        larger = scores[number] > best
        labels[larger] = number
        np.maximum(best, scores[number], out=best)
    return labels


def _furthest_above(leads: Floats) -> Labels:
    """Channel n + 1 where its lead over its threshold is the largest and no less than 0; else 0."""
    labels = _first_largest(leads)
    return np.where(leads.max(axis=0) >= 0, labels + np.uint8(1), np.uint8(0))
