"""The `cel` package without its command line, which it imports at once: 13 MB and a quarter of a second for nothing."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["cel"]

_COMMAND_LINE = "cel.cli"


def _without_command_line() -> ModuleType:
    if "cel" in sys.modules:
        return sys.modules["cel"]
    sys.modules[_COMMAND_LINE] = stand_in = ModuleType(_COMMAND_LINE)
    try:
        import cel as loaded
    finally:
        del sys.modules[_COMMAND_LINE]  # whoever asks for it by name gets the real one
    if vars(loaded).get("cli") is stand_in:
        del loaded.cli
    return loaded


if TYPE_CHECKING:
    import cel
else:
    cel = _without_command_line()
