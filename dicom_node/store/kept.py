"""What the index keeps of a header: the attributes of each level, person names with their folded form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from dicom_node.headers import value_representation
from dicom_node.model import InstanceHeader
from dicom_node.store.names import name_key

__all__ = [
    "KEY_SUFFIX",
    "another_patient",
    "filled",
    "identity",
    "joined",
    "kept_attributes",
    "patient_columns",
    "study_columns",
]

KEY_SUFFIX = ".key"  # beside a PN attribute in JSON: its folded form, for matching


def kept_attributes(attributes: Mapping[str, str], keywords: tuple[str, ...]) -> dict[str, str]:
    """The attributes of one level as the index keeps them, person names with their folded form."""
    kept: dict[str, str] = {}
    for keyword, vr in _kinds(keywords):
        if text := attributes.get(keyword):
            if vr:
                # PS3.5 6.2: 1993.08.22 and 10:09:07 are the forms of ACR-NEMA; kept as today's, so that ranges work
                if vr == "DA":
                    text = _OLD_DATE.sub(r"\1\2\3", text) if "." in text else text
                elif vr == "TM":
                    text = text.replace(":", "")
                else:
                    kept[keyword] = text  # before its folded form
                    kept[keyword + KEY_SUFFIX] = name_key(text)
            kept[keyword] = text
    return kept


@lru_cache(maxsize=64)
def _kinds(keywords: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Each keyword with its VR where that makes a difference, else with ''."""
    with_vr = ((keyword, value_representation(keyword)) for keyword in keywords)
    return tuple((keyword, vr if vr in ("DA", "TM", "PN") else "") for keyword, vr in with_vr)


def filled(old: Mapping[str, str], new: Mapping[str, str], overwrite: bool) -> dict[str, str] | None:
    """`old` with its gaps filled from `new`, or None when that changes nothing; `overwrite` lets `new` win.

    Who the patient is, is never changed: the row's key says it.
    """
    changes = {
        key: text
        for key, text in new.items()
        if old.get(key) != text and key not in _PATIENT_IDENTITY and (overwrite or key not in old)
    }
    return {**old, **changes} if changes else None


_PATIENT_IDENTITY = frozenset({"PatientID", "IssuerOfPatientID"})
_OLD_DATE = re.compile(r"(\d{4})\.(\d\d)\.(\d\d)")


def identity(attributes: Mapping[str, str]) -> tuple[str, str]:
    """Patient ID and its issuer, empty where not given."""
    return attributes.get("PatientID", ""), attributes.get("IssuerOfPatientID", "")


def another_patient(patient_id: str, issuer: str, header: InstanceHeader) -> bool:
    """Whether `header` names another patient than a study has. An issuer left out is no other issuer."""
    its_id, its_issuer = identity(header.attributes)
    return bool(patient_id != its_id or (its_issuer and issuer and issuer != its_issuer))


def study_columns(kept: Mapping[str, str]) -> tuple[str, ...]:
    """Of `study`: who, when, which, in the order of its insert."""
    return (
        kept.get("PatientID", ""),
        kept.get("IssuerOfPatientID", ""),
        kept.get("PatientName" + KEY_SUFFIX, ""),
        *(kept.get(keyword, "") for keyword in ("PatientBirthDate", "StudyDate", "StudyTime")),
        *(kept.get(keyword, "") for keyword in ("AccessionNumber", "StudyID")),
    )


def patient_columns(kept: Mapping[str, str]) -> tuple[str, ...]:
    """Of `patient`: name, its folded form, birth date."""
    return tuple(kept.get(keyword, "") for keyword in ("PatientName", "PatientName" + KEY_SUFFIX, "PatientBirthDate"))


def joined(values: Iterable[str]) -> str:
    """As a multi-valued attribute keeps them: each once, in order."""
    return "\\".join(sorted({value for value in values if value}))
