"""Finds model packages: those that ship with the node by their id, others by their folder. Must not import torch."""

from __future__ import annotations

from pathlib import Path

from dicom_node.config import packaged
from dicom_node.errors import PackageError
from dicom_node.models.formats import describe_folder
from dicom_node.models.package import MANIFEST, ModelPackage, load_package, package_of

__all__ = ["embedded_ids", "find_package"]


def embedded_ids() -> tuple[str, ...]:
    """Ids of the packages that ship with the node."""
    root = packaged("demo", "weights")
    return tuple(sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}")))


def find_package(model: str) -> ModelPackage:
    """The package that `model` names: an embedded id, else a folder. Raises PackageError listing what there is."""
    if model in embedded_ids():
        package = load_package(packaged("demo", "weights", model))
        if package.manifest.id != model:
            raise PackageError(f"the embedded package {model!r} calls itself {package.manifest.id!r}")
        return package
    folder = Path(model)
    if model and folder.is_dir():
        return load_package(folder) if (folder / MANIFEST).exists() else _foreign(folder)
    known = ", ".join(embedded_ids()) or "none"
    raise PackageError(f"model {model!r} is neither an embedded package ({known}) nor a folder with a {MANIFEST}")


def _foreign(folder: Path) -> ModelPackage:
    """A package in a format of others, as it lies there."""
    return package_of(folder, folder, describe_folder(folder).manifest)
