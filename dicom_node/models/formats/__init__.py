"""Foreign model packages, each format one leaf file: what a folder holds, told as our own manifest.

A leaf has `detect(folder)` and `describe(folder)`; both read files as data, execute nothing, and must not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.package import MAX_WEIGHTS_BYTES, open_regular

__all__ = ["FORMATS", "Described", "describe_folder", "file_digest"]

# in the order they are asked; the first that recognises the folder reads it
FORMATS = ("monai_bundle", "nnunet", "aiaa", "xrv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A foreign package as ours: `manifest` is the content of the model.yaml it amounts to.

    `files` are the relative paths the package needs to run; `notes` tell a person what was assumed or left out.
    """

    format: str
    manifest: Mapping[str, Any]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def describe_folder(folder: Path) -> Described:
    """What `folder` holds. Raises PackageError when no format recognises it, or the one that does cannot run it."""
    for name in FORMATS:
        leaf = import_module(f"{__name__}.{name}")
        if leaf.detect(folder):
            described: Described = leaf.describe(folder)
            return described
    raise PackageError(
        f"{folder}: no model package is recognised here; known: a folder with model.yaml, a MONAI bundle "
        "(configs/metadata.json), a result folder of nnU-Net v2 (plans.json), a model of AIAA (config_aiaa.json), "
        "weights of torchxrayvision (with their published name, or with xrv.json)"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises PackageError when it cannot be read."""
    try:
        with open_regular(path, MAX_WEIGHTS_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
