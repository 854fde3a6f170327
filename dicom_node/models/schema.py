"""The value types of `model.yaml`: what a text, a number, a code in it may be. Pure data, nothing is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydicom import uid as uids
from pydicom.uid import UID

from dicom_node.values import Code

__all__ = [
    "Block",
    "CodedConcept",
    "Digest",
    "Finite",
    "PlainArgs",
    "Positive",
    "Slug",
    "StorageClass",
    "Text",
    "Upper",
    "is_plain",
]


def _slug(value: str) -> str:
    allowed = value.replace("-", "").replace("_", "").replace(".", "")
    if not (value and allowed.isascii() and allowed.isalnum() and len(value) <= 64):
        raise ValueError("expected 1 to 64 letters, digits, '-', '_' or '.'")
    return value


def _text(value: str) -> str:
    """One line that a terminal and a DICOM attribute take as it is: PS3.5 6.2 gives the backslash a meaning."""
    line = " ".join(value.split())
    if not all(is_plain(letter) for letter in line):
        raise ValueError("expected text without backslashes and control characters")
    return line


def is_plain(letter: str) -> bool:
    """Whether a letter may stand in a text that people and DICOM attributes are shown. Persian needs the joiners."""
    return (letter.isprintable() and letter != "\\") or letter in "\u200c\u200d"


def _plain(value: Any) -> Any:
    """Numbers, texts, booleans, null, and lists and mappings of them; nothing a constructor could be tricked with."""
    if isinstance(value, Mapping):
        return {_text_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 1024:
            raise ValueError("expected at most 1024 values in a list")
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | str | float) or (isinstance(value, int) and abs(value) <= 65536):
        return value
    raise ValueError(f"expected plain values, integers within +-65536; got {value!r}")


def _text_key(key: Any) -> str:
    if not isinstance(key, str) or key.startswith("_") or key in ("pretrained", "progress"):
        raise ValueError(f"{key!r} is no argument a package may set")
    return key


def _code(value: Any) -> Any:
    """[scheme, value, meaning] as people write it."""
    if isinstance(value, list | tuple):
        if len(value) != 3 or not all(isinstance(part, str) and 0 < len(part) <= 64 for part in value):
            raise ValueError("expected [scheme, value, meaning], three texts of at most 64 characters")
        scheme, code, meaning = (_text(part) for part in value)
        return Code(scheme=scheme, value=code, meaning=meaning)
    return value


def _storage_class(value: str) -> str:
    uid = UID(value) if value[:1].isdigit() else _uid_named(value)
    if not uid.is_valid:
        raise ValueError(f"{value!r} is no SOP Class UID or keyword such as CTImageStorage")
    return str(uid)


def _uid_named(keyword: str) -> UID:
    found = getattr(uids, keyword, None)
    return found if isinstance(found, UID) else UID("")


Text = Annotated[str, AfterValidator(_text)]
Slug = Annotated[str, AfterValidator(_slug)]
PlainArgs = Annotated[dict[str, Any], AfterValidator(_plain)]
CodedConcept = Annotated[Code, BeforeValidator(_code)]
StorageClass = Annotated[str, AfterValidator(_storage_class)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Upper = Annotated[str, AfterValidator(str.upper)]


class Block(BaseModel):
    """A mapping of model.yaml: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
