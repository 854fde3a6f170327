"""YAML and JSON of packages as plain values, no larger in memory than on paper. Must not import torch."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["check_plain", "read_yaml"]

_MAX_ALIASES = 32  # aliases of aliases grow exponentially
_MAX_DEPTH = 32
_MAX_VALUES = 200_000
_MAX_BITS = 64
_MAX_TEXT = 4 * 1024**2


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises ValueError or yaml.YAMLError for what is not plain or would grow when unpacked."""
    aliases = depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily: stops before a bomb is unpacked
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > _MAX_ALIASES or depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_ALIASES} YAML aliases or {_MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.style is None:
            raise ValueError("merge keys (<<) are not read; write the keys out")
    content = yaml.safe_load(text)
    check_plain(content)
    return content


def check_plain(content: Any) -> None:
    """Raise ValueError for too many values or too much text, counted wherever it stands, for depth, giant integers."""
    left, text, waiting = _MAX_VALUES, _MAX_TEXT, [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        left -= 1
        if left < len(waiting) or depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_VALUES} values or {_MAX_DEPTH} levels")
        if isinstance(node, dict):
            waiting += [(inner, depth + 1) for pair in node.items() for inner in pair]
        elif isinstance(node, list | tuple):
            waiting += [(inner, depth + 1) for inner in node]
        elif isinstance(node, str | bytes):
            text -= len(node)
            if text < 0:
                raise ValueError(f"more than {_MAX_TEXT >> 20} MiB of text")
        elif isinstance(node, int) and node.bit_length() > _MAX_BITS:
            raise ValueError(f"an integer of more than {_MAX_BITS} bits")
