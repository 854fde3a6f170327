"""Finds what a setting calls a model: one that ships with the node, an installed one, or a package somewhere else.

Must not import torch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from dicom_node.config import packaged
from dicom_node.errors import PackageError
from dicom_node.models.archive import open_archive
from dicom_node.models.describing import describe_apart
from dicom_node.models.formats import Described
from dicom_node.models.library import Library, Stamp, is_name
from dicom_node.models.package import MANIFEST, ModelPackage, load_package, package_of

__all__ = [
    "ModelReference",
    "Opened",
    "embedded_ids",
    "embedded_package",
    "find_package",
    "open_folder",
    "opened",
    "split_name",
]

_TRIES, _RETRY_S = 10, 0.02
_REFUSED_S = 15.0
_STAMP_FILES, _STAMP_DEPTH = 256, 3


def embedded_ids() -> tuple[str, ...]:
    """Ids of the packages that ship with the node."""
    root = packaged("demo", "weights")
    return tuple(sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}")))


def embedded_package(model_id: str) -> ModelPackage:
    """A package that ships with the node. Raises PackageError."""
    package = load_package(packaged("demo", "weights", model_id))
    if package.manifest.id != model_id:
        raise PackageError(f"the embedded package {model_id!r} calls itself {package.manifest.id!r}")
    return package


def split_name(model: str) -> tuple[str, str]:
    """`ID` or `ID@VERSION` as (id, version or ""); ("", "") for anything that can be neither."""
    name, at, version = model.partition("@")
    return (name, version) if is_name(name) and (is_name(version) or not at) else ("", "")


def find_package(model: str, models_dir: Path | None = None) -> ModelPackage:
    """The package that `model` names: ID or ID@VERSION of an embedded, then of an installed one, else a folder.

    `models_dir` holds the installed ones (`library`); without it there are none. An installed ID alone is its enabled
    version. Raises PackageError, listing what there is, and for a disabled model.
    """
    library = Library(models_dir) if models_dir is not None else None
    name, version = split_name(model)
    package = _named(name, version, library) if name else None
    if package is not None:
        return package
    folder = Path(model)
    if model and folder.is_dir():
        return open_folder(folder).package
    if model and folder.is_file():
        raise PackageError(f"model {model!r} is a file; 'dicom-node models import {model}' installs it under its id")
    installed = ", ".join(library.ids() if library else ()) or "none"
    raise PackageError(
        f"model {model!r} is neither an embedded package ({', '.join(embedded_ids())}), nor an installed one "
        f"({installed}), nor the folder of a package"
    )


def _named(name: str, version: str, library: Library | None) -> ModelPackage | None:
    embedded = name in embedded_ids()
    if not embedded and (library is None or not library.versions(name)):
        return None
    if library is not None:
        library.require_not_disabled(name)
    if embedded:
        package = embedded_package(name)
        if version not in ("", package.manifest.version):
            raise PackageError(f"the embedded model {name!r} is version {package.manifest.version}, not {version!r}")
        return package
    assert library is not None
    return library.load(name, version or library.enabled(name))


# --- packages that lie somewhere else


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A package as it lies in a folder; `foreign` where its format is not ours."""

    package: ModelPackage
    foreign: Described | None


def open_folder(folder: Path) -> Opened:
    """The package in a folder, in our format or in one of others, as it lies there. Raises PackageError."""
    if (folder / MANIFEST).exists():
        return Opened(package=load_package(folder), foreign=None)
    if not folder.is_dir():
        raise PackageError(f"{folder}: there is no such folder")
    foreign = describe_apart(folder)
    return Opened(package=package_of(folder, folder, foreign.manifest), foreign=foreign)


@contextmanager
def opened(origin: Path, scratch: Path) -> Iterator[Opened]:
    """The package that a folder, a zip or a file is, its files under `scratch` where it is no folder.

    A zip is unpacked, another file laid alone in a folder; `model.yaml` itself means its folder. A PackageError, also
    one raised by the caller's block, names `origin` instead of the folder under `scratch`.
    """
    origin = origin.parent if origin.name == MANIFEST else origin
    if origin.is_dir():
        yield open_folder(origin if origin.name not in ("", "..") else origin.resolve())  # some are named as it is
        return
    if not origin.is_file():
        raise PackageError(f"{origin}: there is no such folder or file; expected a model package")
    folder = scratch
    try:
        folder = _unpacked(origin, scratch)
        yield open_folder(folder)
    except PackageError as exc:
        text = str(exc).replace(str(folder / origin.name), str(origin)).replace(str(folder), str(origin))
        raise PackageError(text) from exc


def _unpacked(origin: Path, scratch: Path) -> Path:
    named = scratch / "opened" / origin.stem  # formats that have no other name for a package take its folder's
    try:
        named.parent.mkdir()
        if origin.suffix.lower() == ".zip":
            folder = open_archive(origin, scratch)
            return folder.rename(named) if folder.parent == scratch else folder
        named.mkdir()
        try:
            os.link(origin.resolve(), named / origin.name)
        except OSError:  # on another disk
            shutil.copyfile(origin, named / origin.name)
    except OSError as exc:
        raise PackageError(f"{origin}: cannot be copied: {exc.strerror}; expected room in {scratch}") from exc
    return named


# --- what engines hold


FolderStamp = tuple[tuple[str, int, int], ...]
"""Names, times and sizes of a folder's files."""


def _folder_stamp(folder: Path) -> FolderStamp:
    found: list[tuple[str, int, int]] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [] if len(Path(place).relative_to(folder).parts) >= _STAMP_DEPTH else sorted(folders)
        for name in sorted(names):
            with suppress(OSError):
                status = os.stat(os.path.join(place, name))
                found.append((os.path.join(place, name), status.st_mtime_ns, status.st_size))
            if len(found) >= _STAMP_FILES:
                return tuple(found)
    return tuple(found)


class ModelReference:
    """What an engine's `model` means now: it follows the version that is enabled, without a restart. Thread-safe.

    An embedded or installed package is read again when `Library.stamp` changes, one in a folder of its own when a
    file there does.
    """

    def __init__(self, model: str, models_dir: Path | None = None) -> None:
        self._model = model
        self._models_dir = models_dir
        self._library = Library(models_dir) if models_dir is not None else None
        self._guard = Lock()
        self._known: tuple[tuple[Stamp, FolderStamp], ModelPackage] | None = None
        self._refused: tuple[tuple[Stamp, FolderStamp], PackageError, float] | None = None

    def current(self) -> ModelPackage:
        """The package; a few stats as long as nothing changed. Raises PackageError each time it cannot be used.

        Never an older version instead of one that cannot be used.
        """
        with self._guard:
            stamp = self._stamp()
            if self._known is not None and self._known[0] == stamp:
                return self._known[1]
            self._known = None
            refused, self._refused = self._refused, None
            if refused is not None and refused[0] == stamp and time.monotonic() < refused[2]:
                self._refused = refused
                raise PackageError(str(refused[1])) from refused[1]
            try:
                package = find_package(self._model, self._models_dir)
            except PackageError as exc:  # a queue of jobs must not read a broken package once each
                self._refused = stamp, exc, time.monotonic() + _REFUSED_S
                raise
            self._known = stamp, package  # the stamp from before: what changed meanwhile is seen the next time
            return package

    def anew(self) -> ModelPackage:
        """The package read again from its files. Raises PackageError."""
        with self._guard:
            self._known = self._refused = None
        return self.current()

    @contextmanager
    def held(self) -> Iterator[ModelPackage]:
        """The package for one run: until the end its folder is not removed, whatever is enabled meanwhile.

        Raises PackageError.
        """
        for _ in range(_TRIES):
            package = self.current()
            if self._library is None or not self._installed(package):
                yield package
                return
            with self._library.held(package.folder) as there:
                if there:
                    yield package
                    return
            time.sleep(_RETRY_S)
            self.anew()  # it is being removed
        raise PackageError(f"model {self._model!r}: its folder is being removed; enable another version")

    def _stamp(self) -> tuple[Stamp, FolderStamp]:
        folder = Path(self._model)
        installed = self._library.stamp() if self._library is not None else (0, 0, 0)
        return installed, _folder_stamp(folder) if self._model and folder.is_dir() else ()

    def _installed(self, package: ModelPackage) -> bool:
        return self._library is not None and package.folder.is_relative_to(self._library.root)
