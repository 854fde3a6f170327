"""Does this series fit this model? Every clause of a package's `select` block, with a reason for every refusal.

Headers first (`select_series`, `select_image`), geometry once it is decided (`select_geometry`). Pure. A reason names
the attribute and what the model takes, never the value that was found: reasons are logged, and anything may be typed
into a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.uid import UID

from dicom_node import anatomy
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import SeriesHeader
from dicom_node.models.manifest import OneOfBlock, SelectBlock

__all__ = ["Selection", "select_geometry", "select_image", "select_series"]

_ANATOMY_KEYWORDS = frozenset({"BodyPartExamined", "AnatomicRegionSequence", "ViewPosition", "ViewCodeSequence"})


@dataclass(frozen=True, slots=True)
class Selection:
    """Whether a model takes an input; `reasons` has one sentence for each clause that says no, and none when `ok`."""

    ok: bool
    reasons: tuple[str, ...]

    @staticmethod
    def of(reasons: Iterable[str]) -> Selection:
        """No reason against it means yes."""
        found = tuple(reason for reason in reasons if reason)
        return Selection(not found, found)


def select_series(select: SelectBlock, header: SeriesHeader) -> Selection:
    """The clauses on attributes of the whole series: modality, SOP class, body part, view, description.

    A clause on an attribute that differs inside the series holds when every value fits; for views, when one does,
    for then single images are chosen by `select_image`.
    """
    values = header.values
    classes = _texts(values, "SOPClassUID") or tuple(
        dict.fromkeys(str(image["SOPClassUID"]) for image in header.geometry if "SOPClassUID" in image)
    )
    reasons = [
        _modality(select, _texts(values, "Modality")),
        _sop_class(select, classes),
        _one_of("Body Part Examined", _defined_terms(select.body_part), _body_parts(_of_series(values))),
    ]
    views = _views(_of_series(values))
    if not (select.view and any(not _one_of("", select.view, [view]) for view in views)):
        reasons.append(_one_of("the view", select.view, views))
    for text in _texts(values, "SeriesDescription"):
        hits = [word for word in select.exclude.description_contains if word.lower() in text.lower()]
        reasons.append(f"Series Description contains {hits[0]!r}" if hits else "")
    return Selection.of(reasons)


def select_image(select: SelectBlock, header: Mapping[str, Any]) -> Selection:
    """The same clauses on one image (`header` as `pixels.ImageFile.header`), and that it is meant to be looked at."""
    text = {key: str(value).strip() for key, value in header.items() if isinstance(value, str)}
    intent = text.get("PresentationIntentType", "")
    excluded = set(text.get("ImageType", "").upper().split("\\")) & set(select.exclude.image_type)
    return Selection.of(
        [
            _modality(select, [text["Modality"]] if text.get("Modality") else []),
            _sop_class(select, [text["SOPClassUID"]] if text.get("SOPClassUID") else []),
            _one_of("Body Part Examined", _defined_terms(select.body_part), _body_parts(_of_image(header))),
            _one_of("the view", select.view, _views(_of_image(header))),
            "Presentation Intent Type is FOR PROCESSING: raw detector values" if intent == "FOR PROCESSING" else "",
            f"Image Type {sorted(excluded)[0]}" if excluded else "",
        ]
    )


def select_geometry(select: SelectBlock, geometry: VolumeGeometry) -> Selection:
    """The clauses on the volume: plane, obliquity, number and spacing of slices, coverage."""
    wanted = select.geometry
    # of an irregular stack three slices in four must be thin enough: single gaps are bridged, a coarse part is not
    largest = max(float(np.quantile(geometry.widths_mm, 0.75, method="higher")), *geometry.spacing_mm[1:])
    reasons = []
    if geometry.shape[0] < wanted.min_slices:
        reasons.append(f"{geometry.shape[0]} slices, the model needs at least {wanted.min_slices}")
    if wanted.max_spacing_mm is not None and largest > wanted.max_spacing_mm:
        reasons.append(f"voxels of {largest:.2f} mm, the model takes at most {wanted.max_spacing_mm:g} mm")
    if wanted.orientation is not None and geometry.orientation != wanted.orientation:
        reasons.append(f"{geometry.orientation} slices, the model takes {wanted.orientation} ones")
    if geometry.obliquity_deg > wanted.max_obliquity_deg:
        reasons.append(
            f"slices are {geometry.obliquity_deg:.0f} degrees oblique, the model takes at most "
            f"{wanted.max_obliquity_deg:g}"
        )
    if wanted.min_coverage_mm is not None and geometry.coverage_mm < wanted.min_coverage_mm:
        reasons.append(
            f"the stack is {geometry.coverage_mm:.0f} mm long, the model needs {wanted.min_coverage_mm:g} mm"
        )
    return Selection.of(reasons)


def _modality(select: SelectBlock, found: Sequence[str]) -> str:
    wanted = " or ".join(select.modality)
    if not found:
        return f"Modality is missing, the model takes {wanted}"
    return "" if set(found) <= set(select.modality) else f"Modality is not {wanted}"


def _sop_class(select: SelectBlock, found: Sequence[str]) -> str:
    if not select.sop_class:
        return ""
    wanted = " or ".join(UID(uid).name for uid in select.sop_class)
    if not found:
        return f"SOP class is missing, the model takes {wanted}"
    return "" if set(found) <= set(select.sop_class) else f"SOP class is not {wanted}"


def _one_of(name: str, wanted: OneOfBlock | None, found: Sequence[str]) -> str:
    if wanted is None:
        return ""
    options = " or ".join(wanted.any)
    if not found:
        return "" if wanted.missing == "allow" else f"{name} is not given, the model takes {options}"
    accepted = {_squeezed(value) for value in wanted.any}
    return "" if all(_squeezed(value) in accepted for value in found) else f"{name} is not {options}"


def _squeezed(text: str) -> str:
    """Case and punctuation differ between writers: "Chest/Abd" and "CHESTABD" are one word."""
    return "".join(letter for letter in text.upper() if letter.isalnum())


def _texts(values: Mapping[str, tuple[Any, ...]], keyword: str) -> tuple[str, ...]:
    return tuple(text for value in values.get(keyword, ()) if (text := str(value).strip()))


def _views(values: anatomy.Values) -> list[str]:
    """View Position where given, else the coded view (the only mandatory one in DX, PS3.3 C.8.11.5)."""
    return _plain_first(anatomy.views(values), "ViewPosition")


def _body_parts(values: anatomy.Values) -> list[str]:
    """Body Part Examined where given, else the coded region (the mandatory one in DX, PS3.3 C.8.11.1)."""
    return _plain_first(anatomy.body_parts(values), "BodyPartExamined")


def _plain_first(words: Mapping[str, str], keyword: str) -> list[str]:
    return [word for word, where in words.items() if where == keyword] or list(words)


def _defined_terms(wanted: OneOfBlock | None) -> OneOfBlock | None:
    """A package's body parts as the words `anatomy` has for them."""
    if wanted is None:
        return None
    options = anatomy.body_parts(lambda keyword: list(wanted.any) if keyword == "BodyPartExamined" else [])
    return OneOfBlock(any=tuple(options), missing=wanted.missing)


def _of_series(values: Mapping[str, tuple[Any, ...]]) -> anatomy.Values:
    """A sequence is a list of items; a single item stands for a list of one."""
    return lambda keyword: [
        value if isinstance(value, str | list | tuple) else [value]
        for value in values.get(keyword, ())
        if keyword in _ANATOMY_KEYWORDS
    ]


def _of_image(header: Mapping[str, Any]) -> anatomy.Values:
    return _of_series({keyword: (header[keyword],) for keyword in _ANATOMY_KEYWORDS if header.get(keyword)})
