"""What a foreign package calls an organ, with codes: verified ones where known, else its own name, privately."""

from __future__ import annotations

import hashlib
from typing import Any

__all__ = ["label_output"]

_CATEGORY = ["SCT", "91723000", "Anatomical Structure"]
_PRIVATE = "99DICOMNODE"
# each code stands in pydicom's tables under this meaning (tests/models/test_bundle.py looks them up)
_ORGANS = {
    "spleen": ("78961009", "Spleen"),
    "liver": ("10200004", "Liver"),
    "kidney": ("64033007", "Kidney"),
    "aorta": ("15825003", "Aorta"),
    "pancreas": ("15776009", "Pancreas"),
    "stomach": ("69695003", "Stomach"),
    "gallbladder": ("28231008", "Gallbladder"),
    "esophagus": ("32849002", "Esophagus"),
}


def label_output(index: int, name: str) -> tuple[dict[str, Any], bool]:
    """The `output.labels` entry of class `index`, and whether its code is a private one.

    An unknown name is never given a guessed code: it keeps its own text under a private scheme.
    """
    plain = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    code, meaning = _ORGANS.get(plain, ("", ""))
    if code:
        kind = ["SCT", code, meaning]
    else:
        digest = hashlib.sha256(plain.encode()).hexdigest()[:12].upper()
        kind = [_PRIVATE, f"L{digest}", name.strip()[:64] or f"class {index}"]
    key = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in plain).strip("-")[:48]
    return {
        "index": index,
        "key": f"{key or 'class'}-{index}",
        "segment": {"category": _CATEGORY, "type": kind},
    }, not code
