"""One file per format of `source.format`: each makes a torch module of the package's network file.

Runs in the runtime process only; a module maps a float batch (batch, channel, ...) to logits. The digest is checked
on the very bytes that are loaded. What a loader of a `data` format returns was built here by name; what a loader of a
`graph` or `code` format returns runs operations the package chose, and is loaded only in a confined process
(`sandbox`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import PackageError
from dicom_node.models.source import TRUST

__all__ = ["load_module"]


def load_module(path: Path, source: Mapping[str, Any], device: torch.device | None = None) -> torch.nn.Module:
    """The network in `path` as `source` of the manifest describes it, in evaluation mode.

    A graph is loaded for `device` (its constants are bound to one); any other network is made on the CPU.
    Raises PackageError: digest, format, arguments or weights that do not fit, or a module that must be installed.
    """
    name = source["format"]
    if name not in TRUST:
        raise PackageError(f"source.format: {name!r} is not one of {', '.join(sorted(TRUST))}")
    loader = import_module(f"dicom_node.models.loaders.{name}")
    if TRUST[name] == "graph":
        module = loader.load(path, source, device or torch.device("cpu"))
    else:
        module = loader.load(path, source)
    assert isinstance(module, torch.nn.Module)
    return module
