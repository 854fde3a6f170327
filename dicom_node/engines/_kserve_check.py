"""Does the recipe fit the model on the server? Compared before anything is sent, in words an administrator can act on.

What a server does not tell cannot be compared; its answers are checked all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dicom_node.engines import _kserve_wire as wire
from dicom_node.engines._kserve_recipe import RadiographRecipe, VolumeRecipe
from dicom_node.engines._kserve_server import Described, TensorInfo

__all__ = ["misfits", "wanted_of"]

_ANY = -1
_FLOATS = " or ".join(sorted(wire.FLOATS))
_WHOLE = " or ".join(sorted(wire.WHOLE))


def misfits(recipe: VolumeRecipe | RadiographRecipe, told: Described) -> tuple[str, ...]:
    """Where recipe and model contradict each other, each as "KEY: sentence", KEY within the recipe; none: it fits."""
    found = [*_transport(recipe, told), *_batch(recipe, told)]
    if told.inputs:
        found += _input(recipe, told.inputs)
    if told.outputs:
        found += _volume_output(recipe, told) if isinstance(recipe, VolumeRecipe) else _findings(recipe, told)
    return tuple(found)


def wanted_of(recipe: VolumeRecipe) -> wire.Wanted:
    """What the output of a volume must be, of one window and of any number of classes."""
    labels = recipe.output.decide == "labels"
    channels = 1 if labels else (len(recipe.output.thresholds) or None)
    sides = {"N": None, "C": channels}
    if recipe.windows is not None:
        sides |= dict(zip("DHW", recipe.windows.window, strict=True))
    shape = tuple(sides.get(letter) for letter in recipe.output.layout)
    return wire.Wanted(datatypes=wire.WHOLE if labels else wire.FLOATS, shape=shape)


def _transport(recipe: VolumeRecipe | RadiographRecipe, told: Described) -> Iterator[str]:
    if not told.binary and recipe.input.datatype in wire.BINARY_ONLY:
        yield (
            f"input.datatype: {recipe.input.datatype} travels in binary only, and the server does not say that it "
            "knows the extension binary_tensor_data; where it does all the same, set tensors: binary"
        )


def _batch(recipe: VolumeRecipe | RadiographRecipe, told: Described) -> Iterator[str]:
    batch = recipe.windows.batch if isinstance(recipe, VolumeRecipe) and recipe.windows is not None else 1
    if 0 < told.most_batch < batch:
        yield f"windows.batch: {batch}, but the model takes at most {told.most_batch} at a time"


# --- the input -------------------------------------------------------------------------------------------------------


def _input(recipe: VolumeRecipe | RadiographRecipe, inputs: Sequence[TensorInfo]) -> Iterator[str]:
    wanted = recipe.input
    found = {one.name: one for one in inputs}
    if wanted.name not in found:
        yield f"input.name: the model has no input {wanted.name!r}; it has {_listed(inputs)}"
        return
    if others := [one for one in inputs if one.name != wanted.name]:
        yield f"input.name: the model also takes {_listed(others)}, which this node cannot give"
    one = found[wanted.name]
    if one.datatype != wanted.datatype:
        yield f"input.datatype: {wanted.datatype}, but the model takes {one.datatype}"
    yield from _shape("input", one, wanted.layout, _input_sides(recipe), _remedy(recipe))


def _input_sides(recipe: VolumeRecipe | RadiographRecipe) -> dict[str, int | None]:
    if isinstance(recipe, RadiographRecipe):
        return {"N": 1, "C": recipe.input.channels, "H": recipe.input.size, "W": recipe.input.size}
    if recipe.windows is None:
        return {"N": 1, "C": 1, "D": None, "H": None, "W": None}
    return {"N": recipe.windows.batch, "C": 1, **dict(zip("DHW", recipe.windows.window, strict=True))}


def _remedy(recipe: VolumeRecipe | RadiographRecipe) -> str:
    if isinstance(recipe, RadiographRecipe):
        return "size, channels"
    return "windows: the model takes windows of one size" if recipe.windows is None else "windows.window, windows.batch"


def _shape(key: str, one: TensorInfo, layout: str, sides: dict[str, int | None], remedy: str) -> Iterator[str]:
    if len(one.shape) != len(layout):
        yield f"{key}.layout: {layout} has {len(layout)} axes, but the model has {one.shown}"
        return
    for letter, told in zip(layout, one.shape, strict=True):
        wanted = sides.get(letter)
        if told not in (_ANY, wanted):
            given = "a length that depends on the images" if wanted is None else str(wanted)
            yield f"{key}.layout: axis {letter} is {given}, but the model has {one.shown} (see {remedy})"
            return


# --- the outputs -----------------------------------------------------------------------------------------------------


def _volume_output(recipe: VolumeRecipe, told: Described) -> Iterator[str]:
    output = recipe.output
    one = next((one for one in told.outputs if one.name == output.name), None)
    if one is None:
        yield f"output.name: the model has no output {output.name!r}; it has {_listed(told.outputs)}"
        return
    wanted = wanted_of(recipe)
    if one.datatype not in wanted.datatypes:
        why = f"labels are {_WHOLE}" if output.decide == "labels" else f"scores are {_FLOATS}; for labels say labels"
        yield f"output.decide: {one.shown} cannot be decided so: {why}"
    if not told.binary and one.datatype in wire.BINARY_ONLY:
        yield f"output.name: {one.shown} travels in binary only; see tensors"
    if len(one.shape) != len(output.layout):
        yield f"output.layout: {output.layout} has {len(output.layout)} axes, but the model has {one.shown}"
        return
    classes = one.shape[output.layout.index("C")] if "C" in output.layout else 1
    most = max(output.labels.values())
    if output.decide == "argmax" and classes != _ANY and classes <= most:
        yield f"output.labels: {most} is named, but the model has {one.shown}: classes 0 to {classes - 1}"
    if output.thresholds and classes not in (_ANY, len(output.thresholds)):
        yield f"output.decide: {len(output.thresholds)} thresholds, but the model has {one.shown}"
    for letter, side, length in zip(output.layout, one.shape, wanted.shape or (), strict=True):
        if letter in "DHW" and _ANY != side != length and length is not None:
            yield f"output.layout: windows of {length} along {letter}, but the model answers {one.shown}"
            return


def _findings(recipe: RadiographRecipe, told: Described) -> Iterator[str]:
    outputs = {one.name: one for one in told.outputs}
    for name in recipe.outputs:
        one = outputs.get(name)
        if one is None:
            yield f"output: the model has no output {name!r}; it has {_listed(told.outputs)}"
            continue
        if one.datatype not in wire.FLOATS:
            yield f"output: {one.shown} has no scores, which are {_FLOATS}"
        if not told.binary and one.datatype in wire.BINARY_ONLY:
            yield f"output: {one.shown} travels in binary only; see tensors"
        sides = one.shape[1:] if one.shape[:1] == (_ANY,) else one.shape  # the batch, of one image
        most = max(row.index for row in recipe.findings.values() if (row.output or recipe.output) == name)
        if _ANY not in sides and most >= math.prod(sides):
            yield f"findings: index {most} is named, but the model has {one.shown}"


def _listed(tensors: Sequence[TensorInfo]) -> str:
    return ", ".join(one.shown for one in tensors[:8]) + (" ..." if len(tensors) > 8 else "")
