"""What a version of an application wants to know of a slide, out of its own JSON Schema: no name of a key is known here
for sure, versions use different ones.

A key's value comes from the configuration (what only people know) or from the slide (what a file says); the schema is
then held against it, as far as it says types, constants, choices and bounds. What is missing or does not fit is told
before anything leaves the node: by the key and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicom_node.engines._aignostics_options import Fact, PlatformOptions
from dicom_node.engines.slides import DICOM, ZIP
from dicom_node.errors import ConfigError, EngineError, SeriesRejected

__all__ = ["Facts", "media_types", "metadata_of", "wanted_keys"]

MAX_DEPTH = 8
MAX_KEYS = 200
_NAMES: Mapping[str, Fact] = {
    **dict.fromkeys(("width", "width_px", "px_width"), "width"),
    **dict.fromkeys(("height", "height_px", "px_height"), "height"),
    **dict.fromkeys(("mpp", "base_mpp", "resolution_mpp", "mpp_x", "mpp_y"), "mpp"),
    **dict.fromkeys(("media_type", "mime_type"), "media_type"),
    **dict.fromkeys(("stain", "staining", "stain_type", "staining_method"), "stain"),
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    **{"string": (str,), "integer": (int,), "number": (int, float), "object": (dict,), "array": (list,)},
    **{"boolean": (bool,), "null": (type(None),)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the file says of the slide. `checksum` is as the platform wants it written."""

    width: int
    height: int
    mpp: float
    media_type: str
    checksum: str
    stain: str


def media_types(schema: Any, options: PlatformOptions) -> tuple[str, ...]:
    """Which of the two the version takes, as far as it says; both when it says nothing."""
    for key, told in _properties(schema, schema).items():
        if _fact(key, options) == "media_type":
            choices = told.get("enum", [told["const"]] if "const" in told else [])
            if isinstance(choices, list) and choices:
                return tuple(kind for kind in (DICOM, ZIP) if kind in choices)
    return (DICOM, ZIP)


def wanted_keys(schema: Any) -> list[tuple[str, bool]]:
    """Names of the first level, and whether each is required."""
    required = _required(schema, schema)
    return [(key, key in required) for key in _properties(schema, schema)]


def metadata_of(schema: Any, facts: Facts, options: PlatformOptions, engine: str) -> dict[str, Any]:
    """The metadata of the slide for a version with that `metadata_schema`.

    Raises ConfigError naming `engines.<engine>.options.metadata.<key>` for what a person must say or said wrong,
    SeriesRejected for what of this slide does not fit.
    """
    filler = _Filler(schema, facts, options, f"engines.{engine}.options.metadata")
    return filler.filled(schema, options.metadata, "", 0)


class _Filler:
    def __init__(self, root: Any, facts: Facts, options: PlatformOptions, place: str) -> None:
        self._root, self._facts, self._options, self._place = root, facts, options, place

    def filled(self, schema: Any, told: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        """An object of that schema out of what is configured and what the slide says."""
        if depth > MAX_DEPTH:
            raise EngineError("the version's metadata schema is nested too deeply")
        properties, required = _properties(schema, self._root), _required(schema, self._root)
        made: dict[str, Any] = {}
        for key, about in properties.items():
            value = self._value(key, about, told, path, depth, required=key in required)
            if value is not None:
                made[key] = value
        for key in told.keys() - properties.keys():
            if properties and _resolved(schema, self._root).get("additionalProperties") is False:
                known = ", ".join(sorted(properties))
                raise ConfigError(f"{self._place}.{path}{key}: this version does not take it; it takes {known}")
            made[key] = told[key]
        for key in self._options.keys if depth == 0 else ():
            made.setdefault(key, getattr(self._facts, self._options.keys[key]))
        if missing := sorted(required - made.keys()):
            raise ConfigError(
                f"{self._place}.{path}{missing[0]}: this version of the application requires it and the slide does "
                f"not say it; write it there{_choices(properties.get(missing[0], {}))}"
            )
        return made

    def _value(
        self, key: str, about: Mapping[str, Any], told: Mapping[str, Any], path: str, depth: int, *, required: bool
    ) -> Any:
        fact = _fact(key, self._options) if depth == 0 else None
        if fact is not None:
            return self._fact_value(fact, key, about, told.get(key), path)
        if key in told:
            value = told[key]
            if isinstance(value, dict) and _properties(about, self._root):
                return self.filled(about, value, f"{path}{key}.", depth + 1)
            if problem := _unfit(value, about, self._root):
                raise ConfigError(f"{self._place}.{path}{key}: {problem}")
            return value
        if not required:
            return None
        if "const" in about:
            return about["const"]
        return self.filled(about, {}, f"{path}{key}.", depth + 1) if _properties(about, self._root) else None

    def _fact_value(self, fact: Fact, key: str, about: Mapping[str, Any], told: Any, path: str) -> Any:
        value = getattr(self._facts, fact)
        if fact == "stain":
            if told is not None and value not in ("", told):
                raise SeriesRejected(f"the preparation steps of the slide say another stain than {told}")
            value = told if told is not None else ("H&E" if value == "H&E" else None)
            if told is None and self._facts.stain == "other":
                raise SeriesRejected("the slide is stained, and not with hematoxylin and eosin alone")
        elif told is not None:
            raise ConfigError(f"{self._place}.{path}{key}: the slide says it, remove it there")
        if value is not None and (problem := _unfit(value, about, self._root)):
            raise SeriesRejected(f"the slide's {key} does not suit the application: {problem}")
        return value


# --- the schema ------------------------------------------------------------------------------------------------------


def _fact(key: str, options: PlatformOptions) -> Fact | None:
    plain = key.lower().replace("-", "_")
    return options.keys.get(key) or ("checksum" if "crc32c" in plain else _NAMES.get(plain))


def _resolved(schema: Any, root: Any) -> Mapping[str, Any]:
    """The schema a local reference leads to; what cannot be followed says nothing."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root
        for part in reference.removeprefix("#/").split("/"):
            schema = schema.get(part) if isinstance(schema, Mapping) else None
    return {}


def _properties(schema: Any, root: Any) -> dict[str, Mapping[str, Any]]:
    properties = _resolved(schema, root).get("properties")
    if not isinstance(properties, Mapping):
        return {}
    if len(properties) > MAX_KEYS:
        raise EngineError(f"the version's metadata schema has more than {MAX_KEYS} keys")
    return {str(key): _resolved(about, root) for key, about in properties.items()}


def _required(schema: Any, root: Any) -> set[str]:
    told = _resolved(schema, root).get("required")
    return {str(key) for key in told} if isinstance(told, list) else set()


def _unfit(value: Any, about: Mapping[str, Any], root: Any, depth: int = 0) -> str:
    """What the schema has against the value, '' when nothing it understands."""
    kinds = about.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"expected {' or '.join(map(str, kinds))}"
    if "const" in about and value != about["const"]:
        return f"expected {_shown([about['const']])}"
    if isinstance(about.get("enum"), list) and value not in about["enum"]:
        return f"expected one of {_shown(about['enum'])}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = about.get("minimum"), about.get("maximum")
        if isinstance(least, int | float) and value < least:
            return f"{value:g} is less than {least:g}"
        if isinstance(most, int | float) and value > most:
            return f"{value:g} is more than {most:g}"
    for word in ("anyOf", "oneOf"):
        told = about.get(word)
        options = [_resolved(one, root) for one in told if isinstance(one, Mapping)] if isinstance(told, list) else []
        problems = [_unfit(value, one, root, depth + 1) for one in options] if depth < MAX_DEPTH else []
        if problems and all(problems):
            return problems[0]
    return ""


def _is(value: Any, kind: Any) -> bool:
    known = _TYPES.get(kind) if isinstance(kind, str) else None
    return known is None or (isinstance(value, known) and (kind == "boolean" or not isinstance(value, bool)))


def _choices(about: Mapping[str, Any]) -> str:
    choices = about.get("enum")
    return f" ({_shown(choices)})" if isinstance(choices, list) and choices else ""


def _shown(values: Sequence[Any]) -> str:
    words = ["".join(letter for letter in str(value)[:64] if letter.isprintable()) for value in values[:20]]
    return ", ".join(words) + (", ..." if len(values) > len(words) else "")
