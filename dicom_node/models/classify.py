"""Radiographs through a classification package: which images, what the network sees, what its scores mean.

Every eligible image of the series gets its own findings; why others were not analysed is said in each of them.
Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicom_node.chest_gate import not_frontal_chest
from dicom_node.errors import EngineError, EngineRejected, SeriesRejected
from dicom_node.model import EngineTask
from dicom_node.models.manifest import ClassificationManifest, FindingOutput
from dicom_node.models.selection import select_image, select_series
from dicom_node.pixels import ImageFile, displayed_radiograph, read_image
from dicom_node.radiograph import prepare_radiograph, prepare_xrv
from dicom_node.values import Finding, Findings, Presence

__all__ = ["PreparedImages", "finish", "prepare"]

Floats = npt.NDArray[np.float32]

MAX_IMAGES = 64  # of one series; more is no radiography


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImages:
    """Network input (image, size, size) and whose it is; `refused`: why an image must not be scored, "" when it may."""

    sop_instance_uids: tuple[str, ...]
    network_input: Floats
    refused: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(manifest: ClassificationManifest, task: EngineTask, heartbeat: Callable[[], None]) -> PreparedImages:
    """Read every image the package takes. Raises EngineRejected, with every reason, when it takes none."""
    selection = select_series(manifest.select, task.header)
    if not selection.ok:
        raise EngineRejected("; ".join(selection.reasons))
    if len(task.instances) > MAX_IMAGES:
        raise SeriesRejected(
            f"{len(task.instances)} images in one series of radiographs, at most {MAX_IMAGES} are read"
        )
    planes: dict[str, Floats] = {}
    refusals: list[str] = []
    for instance in sorted(task.instances, key=lambda instance: instance.sop_instance_uid):
        try:
            image = read_image(instance)
            refusal = "; ".join(select_image(manifest.select, image.header).reasons)
            if not refusal:
                planes[instance.sop_instance_uid] = _input(image, manifest, heartbeat)
        except SeriesRejected as exc:
            refusal = exc.reason
        if refusal:
            refusals.append(refusal)
        heartbeat()
    if not planes:
        raise EngineRejected("; ".join(dict.fromkeys(refusals)) or "the series has no images")
    counts = {refusal: refusals.count(refusal) for refusal in dict.fromkeys(refusals)}
    return PreparedImages(
        sop_instance_uids=tuple(planes),
        network_input=np.stack(list(planes.values())),
        refused=tuple(_refusal(plane, manifest) for plane in planes.values()),
        notes=tuple(f"{count} other image(s) of the series not analysed: {why}" for why, count in counts.items()),
    )


def _input(image: ImageFile, manifest: ClassificationManifest, heartbeat: Callable[[], None]) -> Floats:
    try:
        make = prepare_xrv if manifest.input.prepare == "xrv" else prepare_radiograph
        return make(displayed_radiograph(image, heartbeat), manifest.input.size)
    except ValueError as exc:
        raise SeriesRejected(f"an image is no usable radiograph: {exc}") from exc


def _refusal(plane: Floats, manifest: ClassificationManifest) -> str:
    """Why the picture must not be scored, whatever its header claims; "" when it may."""
    if plane.max() == plane.min():
        return "the image has no contrast: nothing was assessed"
    why = not_frontal_chest(plane) if manifest.input.gate == "frontal_chest" else ""
    return f"not assessed, the image is no upright frontal chest radiograph: {why}" if why else ""


def finish(manifest: ClassificationManifest, prepared: PreparedImages, probability: Floats) -> tuple[Findings, ...]:
    """One `Findings` per image, all findings of the package in its order, from `probability` (image, output).

    Raises EngineError when the network's output does not have the package's findings.
    """
    outputs = manifest.output.findings
    count = len(prepared.sop_instance_uids)
    needed = max((index for output in outputs for index in output.index), default=-1)
    if probability.ndim != 2 or len(probability) != count or probability.shape[1] <= needed:
        raise EngineError(f"the network answered {probability.shape} for {count} images")
    results = []
    for uid, scores, refused in zip(prepared.sop_instance_uids, probability, prepared.refused, strict=True):
        notes = (*prepared.notes, *((refused,) if refused else ()))
        items = tuple(_finding(output, None if refused else scores) for output in outputs)
        results.append(Findings(sop_instance_uid=uid, items=items, notes=notes))
    return tuple(results)


def _finding(output: FindingOutput, scores: Floats | None) -> Finding:
    confidence = None
    if output.assessed and scores is not None:
        confidence = float(max(scores[index] for index in output.index))
    if confidence is None:
        presence = Presence.UNDETERMINED
    else:
        presence = Presence.PRESENT if confidence >= output.threshold else Presence.ABSENT
    return Finding(
        key=output.key,
        name=output.name,
        code=output.code,
        presence=presence,
        confidence=confidence,
        threshold=output.threshold if output.assessed else None,
        site=output.site,
    )
