"""Which class answers to which word: engine kinds and result kinds, ours and those of installed packages.

Ours stand here as text and are imported when they are asked for, so that no command loads what it does not use.
Other packages add theirs by entry points in the groups `dicom_node.engines` and `dicom_node.results`
(`word = "module:Class"`); a word of ours cannot be taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from dicom_node.errors import ConfigError

__all__ = ["encoder_class", "encoder_kinds", "engine_class", "engine_kinds", "is_own_engine"]

_ENGINES: Mapping[str, str] = {
    "local": "dicom_node.models.engine:LocalModelEngine",
    "monai_label": "dicom_node.engines.monai_label:MonaiLabelEngine",
    "leapai": "dicom_node.engines.leapai:LeapAiEngine",
    "relu": "dicom_node.engines.relu:ReluEngine",
    "aignostics": "dicom_node.engines.aignostics:AignosticsEngine",
    "aiaa": "dicom_node.engines.aiaa:AiaaEngine",
    "kserve": "dicom_node.engines.kserve:KServeEngine",
    "dicom": "dicom_node.engines.dicom_engine:DicomEngine",
}
_ENCODERS: Mapping[str, str] = {
    "seg": "dicom_node.results.seg:SegEncoder",
    "labelmap": "dicom_node.results.seg:LabelmapEncoder",
    "sr": "dicom_node.results.sr:SrEncoder",
    "stl": "dicom_node.results.stl:StlEncoder",
    "sc": "dicom_node.results.sc:ScEncoder",
    "pdf": "dicom_node.results.pdf:PdfEncoder",
    "ann": "dicom_node.results.ann:AnnEncoder",
}


def engine_kinds() -> tuple[str, ...]:
    """Every word `engines.<name>.kind` may be."""
    return _words(_ENGINES, "dicom_node.engines")


def is_own_engine(kind: str) -> bool:
    """Whether the kind is one of ours, which are given more than plug-ins are promised."""
    return kind in _ENGINES


def encoder_kinds() -> tuple[str, ...]:
    """Every word a rule's `results:` may have, ours first and in encoding order."""
    return _words(_ENCODERS, "dicom_node.results")


def engine_class(kind: str) -> Any:
    """The class of engine kind `kind`, to be called with (name, settings, devices=...).

    Raises ConfigError, with the words there are, for an unknown one or a class that cannot be imported.
    """
    return _find(kind, _ENGINES, "dicom_node.engines", "engine kind")


def encoder_class(kind: str) -> Any:
    """The `interfaces.ResultEncoder` class for result kind `kind`. Raises ConfigError as `engine_class` does."""
    return _find(kind, _ENCODERS, "dicom_node.results", "result kind")


def _words(table: Mapping[str, str], group: str) -> tuple[str, ...]:
    return (*table, *sorted({entry.name for entry in entry_points(group=group)} - set(table)))


def _find(word: str, table: Mapping[str, str], group: str, what: str) -> Any:
    target = table.get(word)
    if target is None:
        found = [entry.value for entry in entry_points(group=group) if entry.name == word]
        if not found:
            raise ConfigError(f"{what} {word!r} is not known (known: {', '.join(_words(table, group))})")
        target = found[0]
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"{what} {word!r}: {target} cannot be imported: {exc}") from exc
