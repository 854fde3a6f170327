"""Radiographs through a classification model on a server: which images, what the model sees, what its scores mean.

Every image gets its own findings; why others were not analysed is said in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node import anatomy
from dicom_node.anatomy_codes import private_code
from dicom_node.chest_gate import not_frontal_chest
from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._kserve_recipe import FindingRow, RadiographInput, RadiographRecipe
from dicom_node.engines._kserve_values import activated
from dicom_node.engines.labels import cleaned, plain
from dicom_node.errors import EngineRejected, SeriesRejected
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, StoredInstance
from dicom_node.pixels import displayed_radiograph, read_image
from dicom_node.radiograph import prepare_radiograph, prepare_xrv
from dicom_node.values import Finding, Findings, Presence

__all__ = ["Picture", "fit_pictures", "found_in", "message_of", "wanted_of"]

Floats = npt.NDArray[np.float32]

MAX_IMAGES = 64  # of one series; more is no radiography
_VIEWED = ("ViewPosition", "ViewCodeSequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image in the size the model sees: (row, column). `refused`: why it must not be scored, '' when it may."""

    instance: StoredInstance
    plane: Floats
    refused: str


def fit_pictures(
    recipe: RadiographRecipe,
    task: EngineTask,
    why_not: Callable[[StoredInstance], str],
    heartbeat: Heartbeat,
) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The images of the series that the model is for, and notes on those it is not for.

    `why_not`: why an image may not leave the node. Raises EngineRejected with every reason when none is left.
    """
    if len(task.instances) > MAX_IMAGES:
        raise SeriesRejected(f"{len(task.instances)} images in one series of radiographs, at most {MAX_IMAGES}")
    pictures, refusals = [], []
    for instance in sorted(task.instances, key=lambda one: one.sop_instance_uid):
        heartbeat()
        try:
            reason = _unfit(recipe, instance) or why_not(instance)
            if not reason:
                pictures.append(_picture(recipe, instance, heartbeat))
        except EngineRejected as exc:
            reason = exc.reason
        if reason:
            refusals.append(reason)
    if not pictures:
        raise EngineRejected("; ".join(dict.fromkeys(refusals)) or "the series has no images")
    counts = {reason: refusals.count(reason) for reason in dict.fromkeys(refusals)}
    notes = (f"{count} other image(s) of the series not analysed: {why}" for why, count in counts.items())
    return tuple(pictures), tuple(notes)


def _unfit(recipe: RadiographRecipe, instance: StoredInstance) -> str:
    header = read_image(instance).header
    if header.get("PresentationIntentType") == "FOR PROCESSING":
        return "Presentation Intent Type is FOR PROCESSING: raw detector values"
    if not recipe.views:
        return ""
    words = anatomy.views(lambda keyword: _value(header.get(keyword)) if keyword in _VIEWED else [])
    found = [word for word, where in words.items() if where == "ViewPosition"] or list(words)
    wanted = {view.upper() for view in recipe.views}
    if not found and recipe.view_missing == "refuse":
        return f"the view is not given, the model takes {' or '.join(recipe.views)}"
    return "" if set(found) <= wanted else f"the view is not {' or '.join(recipe.views)}"


def _value(value: Any) -> list[Any]:
    """As `anatomy` takes it: a single item stands for a sequence of one."""
    return [value if isinstance(value, str | list | tuple) else [value]] if value else []


# --- what the model sees ---------------------------------------------------------------------------------------------


def _picture(recipe: RadiographRecipe, instance: StoredInstance, heartbeat: Heartbeat) -> Picture:
    wanted = recipe.input
    shown = displayed_radiograph(read_image(instance), heartbeat)
    try:
        make = prepare_radiograph if wanted.prepare == "fitted" else prepare_xrv
        plane = make(shown, wanted.size)
        refused = _refusal(recipe, shown, plane)
    except ValueError as exc:
        raise SeriesRejected(f"an image is no usable radiograph: {exc}") from exc
    return Picture(instance=instance, plane=plane, refused=refused)


def _refusal(recipe: RadiographRecipe, shown: Floats, plane: Floats) -> str:
    if plane.max() == plane.min():
        return "the image has no contrast: nothing was assessed"
    why = not_frontal_chest(shown) if recipe.gate == "frontal_chest" else ""
    return f"not assessed, the image is no upright frontal chest radiograph: {why}" if why else ""


def _channels(plane: Floats, wanted: RadiographInput) -> Floats:
    """(channel, row, column), in the range and with the figures of the recipe."""
    if wanted.prepare == "range":  # from the -1024 .. 1024 of prepare_xrv
        low, high = wanted.range
        plane = np.asarray((plane + 1024) / 2048 * (high - low) + low, np.float32)
    channels = np.repeat(plane[None], wanted.channels, axis=0)
    if wanted.mean:
        channels -= np.array(wanted.mean, np.float32)[:, None, None]
    if wanted.std:
        channels /= np.array(wanted.std, np.float32)[:, None, None]
    return np.asarray(channels, np.float32)


def message_of(recipe: RadiographRecipe, picture: Picture, *, binary: bool) -> wire.Message:
    """The request for one picture. Raises SeriesRejected for values the tensor's type cannot hold."""
    wanted = recipe.input
    values = _channels(picture.plane, wanted)[None]
    tensor = wire.Tensor(name=wanted.name, datatype=wanted.datatype, values=wire.laid_out(values, wanted.layout))
    try:
        return wire.request(tensor, recipe.outputs, binary=binary)
    except ValueError as exc:
        raise SeriesRejected(f"the image does not fit the model's input: {exc}") from exc


# --- what its scores mean --------------------------------------------------------------------------------------------


def wanted_of(recipe: RadiographRecipe) -> Mapping[str, wire.Wanted]:
    """What every output must be."""
    return {name: wire.Wanted(datatypes=wire.FLOATS) for name in recipe.outputs}


def found_in(recipe: RadiographRecipe, picture: Picture, reply: wire.Reply | None, notes: Sequence[str]) -> Findings:
    """All findings of the recipe on one picture; of None, which was not asked about, none is assessed.

    Raises `wire.UnusableAnswer`: an output shorter than the recipe's indices, a score that is no probability.
    """
    scores = {name: _scores(recipe, values) for name, values in reply.tensors.items()} if reply else {}
    items = tuple(_finding(key, row, scores.get(row.output or recipe.output)) for key, row in recipe.findings.items())
    refused = (picture.refused,) if picture.refused else ()
    return Findings(sop_instance_uid=picture.instance.sop_instance_uid, items=items, notes=(*notes, *refused))


def _scores(recipe: RadiographRecipe, values: npt.NDArray[Any]) -> Floats:
    return activated(np.asarray(values.reshape(-1), np.float32), recipe.activation)


def _finding(key: str, row: FindingRow, scores: Floats | None) -> Finding:
    name = cleaned(row.name)
    code = row.code or private_code(plain(name), name)
    if scores is None:
        presence, confidence = Presence.UNDETERMINED, None
    else:
        if row.index >= scores.size:
            raise wire.UnusableAnswer(f"finding {key}: index {row.index}, but the output has {scores.size} values")
        confidence = float(scores[row.index])
        if not 0 <= confidence <= 1:
            raise wire.UnusableAnswer(
                f"finding {key}: a score of {confidence:g} is no probability; does the recipe lack an activation?"
            )
        presence = Presence.PRESENT if confidence >= row.threshold else Presence.ABSENT
    return Finding(key=key, name=name, code=code, presence=presence, confidence=confidence, threshold=row.threshold)
