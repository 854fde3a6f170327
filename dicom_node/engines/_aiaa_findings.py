"""What a classifier of a Clara Train AIAA server says, as findings.

Its interface leaves open what the parameters of an answer hold, so every form that says names and numbers is read: a
mapping of names to probabilities (0 to 1) or to true and false, and a list of probabilities in the order of the model's
labels. Anything else is told, never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dicom_node.anatomy_codes import private_code
from dicom_node.engines._aiaa_options import FindingOptions
from dicom_node.engines.labels import LabelRow, LabelTable, cleaned, plain
from dicom_node.errors import EngineError
from dicom_node.values import Finding, Findings, Presence

__all__ = ["findings_of"]

MAX_FINDINGS = 256


def findings_of(
    params: Mapping[str, Any],
    options: FindingOptions,
    table: LabelTable,
    names: Sequence[str],
    *,
    sop_instance_uid: str,
    notes: Sequence[str] = (),
) -> Findings:
    """The findings in the parameters of an answer, in its order.

    `names`: what the model calls its outputs, for an answer that is a list. `table` renames, codes (`type`) and drops
    (`ignore`) them. Raises EngineError when the answer has no findings that could be understood.
    """
    told = _told(_at(params, options.at), names)
    if not told or len(told) > MAX_FINDINGS:
        raise EngineError(
            f"the answer's parameters have no findings at {options.at!r}: expected names with probabilities (0 to 1) "
            f"or true and false, at most {MAX_FINDINGS}; options.findings.at says where they are"
        )
    if len({plain(name) for name in told}) != len(told):
        raise EngineError("the answer names a finding twice")
    thresholds = {plain(name): value for name, value in options.thresholds.items()}
    items = []
    for number, (name, value) in enumerate(told.items(), start=1):
        row = table.row(number, name)
        if row is not None:
            items.append(_finding(name, value, row, thresholds.get(plain(name), options.threshold)))
    return Findings(sop_instance_uid=sop_instance_uid, items=tuple(items), notes=tuple(notes))


def _at(params: Mapping[str, Any], path: str) -> Any:
    """What lies under the keys; a bare list is what there is."""
    found: Any = params.get("", params) if set(params) == {""} else params
    for key in path.split(".") if path else ():
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _told(value: Any, names: Sequence[str]) -> Mapping[str, float | bool]:
    """Name to probability or presence; nothing when something in it is neither."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 and isinstance(value[0], list) else value
        if len(value) != len(names):
            return {}
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, Mapping):
        return {}
    told: dict[str, float | bool] = {}
    for name, said in value.items():
        one = said[0] if isinstance(said, list) and len(said) == 1 else said
        whole = isinstance(one, bool) or (isinstance(one, int | float) and 0 <= one <= 1)  # a NaN compares false
        if not isinstance(name, str) or not cleaned(name) or not whole:
            return {}
        told[cleaned(name)] = one if isinstance(one, bool) else float(one)
    return told


def _finding(name: str, value: float | bool, row: LabelRow, threshold: float) -> Finding:
    shown = row.name or name
    code = row.type or private_code(plain(shown), shown)
    key = "aiaa_" + (re.sub(r"[^a-z0-9]+", "_", plain(name)).strip("_")[:48] or private_code(plain(name), name).value)
    if isinstance(value, bool):
        presence = Presence.PRESENT if value else Presence.ABSENT
        return Finding(key=key, name=shown, code=code, presence=presence, confidence=None)
    presence = Presence.PRESENT if value >= threshold else Presence.ABSENT
    return Finding(key=key, name=shown, code=code, presence=presence, confidence=value, threshold=threshold)
