"""What a foreign package calls an organ, with codes: verified ones where known, else its own name, privately."""

from __future__ import annotations

from typing import Any

from dicom_node.anatomy_codes import label_codes, private_code
from dicom_node.models.schema import is_plain
from dicom_node.values import Code

__all__ = ["label_output", "shown"]

_CATEGORY = ["SCT", "91723000", "Anatomical Structure"]


def label_output(index: int, name: str) -> tuple[dict[str, Any], bool]:
    """The `output.labels` entry of class `index`, and whether its code is a private one.

    A name the table does not have is never given a guessed code: it keeps its own text under a private scheme.
    """
    name = shown(name)
    known = label_codes(name)
    plain = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    key = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in plain).strip("-")[:48]
    told = " ".join(name.replace("_", " ").split())[:64] or f"class {index}"
    if known is None:
        segment: dict[str, Any] = {"category": _CATEGORY, "type": _listed(private_code(plain, told))}
    else:
        segment = {"category": _listed(known.category), "type": _listed(known.type)}
        if known.modifier is not None:
            segment["modifier"] = _listed(known.modifier)
        told = known.name
    return {"index": index, "key": f"{key or 'class'}-{index}", "name": told, "segment": segment}, known is None


def shown(text: str) -> str:
    """A foreign text on one line as `schema.Text` takes it."""
    return " ".join("".join(letter if is_plain(letter) else " " for letter in text).split())


def _listed(code: Code) -> list[str]:
    return [code.scheme, code.value, code.meaning]
