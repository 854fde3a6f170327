"""What an engine calls a label, as a segment: by its configured table, else by verified codes, else by its own name.

The table says what a number or a name of this engine is; what it does not have is looked up by name among the codes
that were verified (`anatomy_codes`); an unknown label keeps its own name in the node's private scheme. No code is ever
guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel

from dicom_node.anatomy_codes import LabelCodes, label_codes, private_code
from dicom_node.values import Code, Segment

__all__ = ["Coded", "Label", "LabelRow", "LabelTable", "cleaned", "names_by_value", "plain", "segments_of"]

_STRUCTURE = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")
_BACKGROUND = {"background", "unlabeled", "unlabelled"}

# --- the configured table --------------------------------------------------------------------------------------------


def _code(value: Any) -> Any:
    """[scheme, value, meaning] as people write it (SH, SH and LO of PS3.5 6.2)."""
    if isinstance(value, list | tuple):
        if len(value) != 3 or not all(isinstance(part, str) and part.strip() for part in value):
            raise ValueError("expected [scheme, value, meaning], three texts")
        scheme, code, meaning = value
        odd = not "".join(value).isprintable() or "\\" in "".join(value)
        if odd or len(scheme) > 16 or len(code) > 16 or len(meaning) > 64:
            raise ValueError("expected at most 16, 16 and 64 printable characters without a backslash")
        return Code(scheme=scheme, value=code, meaning=meaning)
    return value


Coded = Annotated[Code, BeforeValidator(_code)]
_Shade = Annotated[int, Field(ge=0, le=255)]


class LabelRow(BaseModel):
    """What one label of an engine is. Without `type` its code is looked up by `name`, or by what the engine calls it.

    `category`, `type` and `modifier` are [scheme, value, meaning]; `color` is red, green, blue, 0 to 255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(default="", max_length=64)
    category: Coded = _STRUCTURE
    type: Coded | None = None
    modifier: Coded | None = None
    color: tuple[_Shade, _Shade, _Shade] | None = None


def _text_keys(value: Any) -> Any:
    """YAML reads the key 1 as a number."""
    return {str(key): row for key, row in value.items()} if isinstance(value, Mapping) else value


class LabelTable(RootModel[dict[str, LabelRow | Literal["ignore"]]]):
    """Configured labels by the engine's number or by its name, however spelled; `ignore` drops one."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    root: Annotated[dict[str, LabelRow | Literal["ignore"]], BeforeValidator(_text_keys)] = Field(default_factory=dict)

    def values(self) -> list[int]:
        """Numbers of labels the table has a row for."""
        numbered = (int(key) for key, row in self.root.items() if _is_number(key) and row != "ignore")
        return [value for value in numbered if value > 0]

    def row(self, value: int | None, name: str) -> LabelRow | None:
        """What is configured for it, its number first; an empty row when nothing is, None when it is to be dropped."""
        rows = {plain(key): row for key, row in self.root.items()}
        row = rows.get("" if value is None else str(value)) or (rows.get(plain(name)) if name else None)
        if row is None:
            return LabelRow()
        return None if row == "ignore" else row


def names_by_value(told: Any) -> Mapping[int, str]:
    """Value to name, out of what engines tell: a list in the order of 1, 2, ... (0 first if that is a background), or a
    mapping of names to values or of values to names. Whatever else it is tells nothing.
    """
    if isinstance(told, str) or not isinstance(told, Mapping | Sequence):
        return {}
    if not isinstance(told, Mapping):
        first = 0 if told and plain(str(told[0])) in _BACKGROUND else 1
        pairs: Iterable[tuple[Any, Any]] = enumerate(told, start=first)
    else:
        pairs = told.items()
    names: dict[int, str] = {}
    for one, other in pairs:
        value, name = (one, other) if isinstance(other, str) and not _is_number(other) else (other, one)
        if _is_number(value) and isinstance(name, str) and int(value) > 0 and cleaned(name):
            names.setdefault(int(value), cleaned(name))
    return names


def _is_number(value: Any) -> bool:
    text = str(value)
    return not isinstance(value, bool) and text.isascii() and text.isdigit() and len(text) < 10


# --- segments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A label of the answer: its number in the label volume, what the engine calls it, what is configured for it."""

    number: int
    name: str
    row: LabelRow

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", cleaned(self.name) or f"label {self.number}")

    @property
    def codes(self) -> LabelCodes | None:
        """The verified codes of its configured name, else of the engine's."""
        return label_codes(self.row.name or self.name) or label_codes(self.name)

    @property
    def shown(self) -> str:
        """What people read."""
        if self.row.name or self.row.type is not None or self.codes is None:
            return self.row.name or self.name
        return self.codes.name


def segments_of(labels: Sequence[Label]) -> tuple[Segment, ...]:
    """A segment for each. Its key is the engine's own name, which outlasts a new table and a new order of labels."""
    keys = [_slug(label.name) for label in labels]
    unique = [key if keys.count(key) == 1 else f"{key}-{label.number}" for key, label in zip(keys, labels, strict=True)]
    if len(set(unique)) < len(unique):  # one name is another with its number behind
        unique = [f"{key}-label-{label.number}" for key, label in zip(keys, labels, strict=True)]
    return tuple(replace(_segment(label), key=key) for key, label in zip(unique, labels, strict=True))


def _segment(label: Label) -> Segment:
    row, known, shown, modifier = label.row, label.codes, label.shown, label.row.modifier
    if row.type is not None:
        category, kind = row.category, row.type
    elif known is not None:
        category, kind, modifier = known.category, known.type, modifier or known.modifier
    else:
        category, kind = row.category, private_code(plain(shown), shown)
    return Segment(
        number=label.number,
        key="",
        label=shown,
        category=category,
        type=kind,
        modifier=modifier,
        color_rgb=row.color,
    )


def cleaned(name: str) -> str:
    """A name as a value of VR LO: printable, one line, no backslash, at most 64 characters."""
    letters = (letter if letter.isprintable() and letter != "\\" else " " for letter in name[:256])
    return " ".join("".join(letters).replace("_", " ").split())[:64].rstrip()


def plain(name: str) -> str:
    """One spelling."""
    return " ".join(cleaned(name).lower().replace("-", " ").split())


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in plain(name)).strip("-")[:48] or "label"
