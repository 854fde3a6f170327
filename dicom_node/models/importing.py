"""Installs model packages: checked, copied under their digests, made durable, then given their name. No torch here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dicom_node.errors import PackageError
from dicom_node.models.describing import describe_apart
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.library import PIN, Library, ModelState, Pin, fsync_folder, is_name, unwritable
from dicom_node.models.package import MANIFEST, MAX_WEIGHTS_BYTES, ModelPackage, load_package, open_regular
from dicom_node.models.registry import Opened, embedded_ids, opened

__all__ = ["Imported", "import_package", "write_manifest"]

_CHUNK = 1024 * 1024
_MAX_FILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An installed package. `new` false: it was there before, with this very content."""

    package: ModelPackage
    pin: Pin
    new: bool
    enabled: bool


def import_package(
    library: Library,
    origin: Path,
    *,
    self_test: Callable[[ModelPackage], None] | None,
    enable: bool = False,
    sha256: str = "",
) -> Imported:
    """Install the package that `origin` (a folder, a zip or a file) is; the first version of an id is enabled.

    `self_test` is given the package as it would be installed and raises NodeError unless its network does what it
    promises; None skips it. `enable` makes this version the enabled one also when there are others.
    `sha256` is what the zip or file must have. Raises PackageError; then nothing was installed, and nothing is left
    behind.
    """
    if sha256:
        _require_digest(origin, sha256)
    with library.workshop() as workshop:
        staged = workshop / "staged"
        with opened(origin, workshop) as found:
            pin = _stage(found, staged, tested=self_test is not None)
        package = load_package(staged)
        model_id, version = package.manifest.id, package.manifest.version
        _require_free_name(model_id, version)
        if _condition(library, model_id, version, pin) != "sound":
            package.check_weights()
            if self_test is not None:
                self_test(package)
        with library.locked():
            condition = _condition(library, model_id, version, pin)
            if condition == "damaged":  # what is imported is what it was, by its digests
                with library.reserved(model_id, version):
                    library.remove(model_id, version)
            new = condition != "sound"
            if new:
                library.install(staged, model_id, version)
            known = library.state().of(model_id)
            if enable or (known.enabled is None and library.versions(model_id) == (version,)):
                known = ModelState(enabled=version, disabled=False if enable else known.disabled)
                try:
                    library.decide(model_id, known)
                except PackageError as exc:
                    raise PackageError(
                        f"{model_id}@{version} is installed, but could not be enabled ({exc}); then "
                        f"'dicom-node models enable {model_id}@{version}'"
                    ) from exc
    return Imported(
        package=library.load(model_id, version),
        pin=library.pin(model_id, version),
        new=new,
        enabled=known.enabled == version,
    )


def write_manifest(folder: Path) -> Path:
    """Write what is read out of a foreign package into its folder as model.yaml, which is then read instead.

    For people who must correct what could only be assumed. Raises PackageError, never replacing one.
    """
    path = folder / MANIFEST
    foreign = describe_apart(folder) if folder.is_dir() and not path.exists() else None
    if foreign is None:
        raise PackageError(f"{path}: is there already, or no folder; expected the folder of a package without one")
    try:
        _write(path, _manifest_text(foreign).encode())
    except OSError as exc:
        raise unwritable(path, exc) from exc
    return path


def _manifest_text(foreign: Described) -> str:
    return yaml.safe_dump(_plain(foreign.manifest), sort_keys=False, allow_unicode=True)


def _require_digest(origin: Path, wanted: str) -> None:
    if origin.is_dir():
        raise PackageError(f"{origin}: a folder has no sha256; expected a zip or another file")
    if (found := file_digest(origin)) != wanted.lower():
        raise PackageError(f"{origin}: sha256 is {found}, expected {wanted.lower()}; fetch it again")


def _require_free_name(model_id: str, version: str) -> None:
    if model_id in embedded_ids():
        raise PackageError(f"id: {model_id!r} is a model that ships with the node; give the package another id")
    for key, name in (("id", model_id), ("version", version)):
        if not is_name(name):
            raise PackageError(f"{key}: {name!r} begins with a dot; begin with a letter or digit")


def _condition(library: Library, model_id: str, version: str, pin: Pin) -> Literal["sound", "damaged", "missing"]:
    """How this very package is installed. Raises PackageError when another one has its name."""
    folder = library.folder(model_id, version)
    if version not in library.versions(model_id):
        if folder.exists():
            raise PackageError(f"{folder}: is in the way and was not installed by this node; move it away")
        return "missing"
    # the weights' digests are part of the configuration
    if library.pin(model_id, version).config_sha256 != pin.config_sha256:
        raise PackageError(
            f"{model_id}@{version} is installed with other content; bump the version of the package, "
            f"or 'dicom-node models remove {model_id}@{version}' first"
        )
    try:
        library.load(model_id, version).check_weights()
    except PackageError:
        return "damaged"
    return "sound"


def _stage(found: Opened, staged: Path, *, tested: bool) -> Pin:
    """Write everything the package needs into `staged`, durable when this returns. Raises PackageError."""
    package, foreign = found.package, found.foreign
    wanted = {file.path: file.sha256 for file in package.files}
    names = [*wanted, *((package.manifest.metrics.file,) if package.manifest.metrics else ())]
    names += foreign.files if foreign else ()
    files: dict[str, str] = {}
    try:
        staged.mkdir()
        if foreign is None:
            files[MANIFEST] = _copy(package.folder, MANIFEST, staged)
        else:
            files[MANIFEST] = _write(staged / MANIFEST, _manifest_text(foreign).encode())
        for name in dict.fromkeys(names):
            if name in files or name == PIN:
                continue
            if len(files) >= _MAX_FILES:
                raise PackageError(f"{package.folder}: has more than {_MAX_FILES} files")
            files[name] = _copy(package.folder, name, staged)
            if files[name] != wanted.get(name, files[name]):
                raise PackageError(
                    f"{package.folder / name}: sha256 is {files[name][:16]}..., "
                    f"{MANIFEST} says {wanted[name][:16]}...; correct the package or fetch the file again"
                )
        pin = Pin(
            schema=1,
            format=foreign.format if foreign else package.manifest.source.format,
            config_sha256=load_package(staged).config_sha256,
            files=files,
            self_test="passed" if tested else "not run",
            notes=tuple(foreign.notes) if foreign else (),
        )
        _write(staged / PIN, pin.model_dump_json(indent=2, by_alias=True).encode())
        for folder, _, _ in os.walk(staged, topdown=False):
            fsync_folder(Path(folder))
    except OSError as exc:
        raise unwritable(staged.parent.parent, exc) from exc
    return pin


def _plain(value: object) -> object:
    """Mappings, lists and plain values, as YAML can write them."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _copy(folder: Path, name: str, staged: Path) -> str:
    """Copy one regular file that lies inside `folder`; its digest. Raises PackageError, OSError of the target."""
    origin, target = folder / name, staged / name
    try:
        if not origin.resolve().is_relative_to(folder.resolve()) or not target.resolve().is_relative_to(
            staged.resolve()
        ):
            raise PackageError(f"{origin}: leads out of the package folder")
        source = open_regular(origin, MAX_WEIGHTS_BYTES)
    except OSError as exc:
        raise PackageError(f"{origin}: {exc.strerror}; the package needs this file") from exc
    with source:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("xb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> str:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()
