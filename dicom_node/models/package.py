"""A model package on disk: a folder with `model.yaml` over weights, read as data and nothing else.

No path leaves the folder, nothing of it is imported or evaluated. `manifest` has the schema, `registry` finds
packages, the runtime process loads their weights. Must not import torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dicom_node.errors import PackageError
from dicom_node.identity import device_uid
from dicom_node.models.manifest import Manifest
from dicom_node.models.plain import check_plain, read_yaml
from dicom_node.models.source import TRUST, FoldFile, NnunetSource, PythonSource
from dicom_node.values import Provenance

__all__ = [
    "MANIFEST",
    "MAX_WEIGHTS_BYTES",
    "ModelPackage",
    "load_package",
    "open_regular",
    "package_of",
    "read_regular",
]

MANIFEST = "model.yaml"
_MAX_MANIFEST_BYTES = 256 * 1024
_ERRORS_SHOWN = 10
MAX_WEIGHTS_BYTES = 4 * 1024**3

# what pydantic puts into the place of an error for the member of a union it tried
_TAGS = ("segmentation", "classification", "mapping", "steps", *TRUST)

_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="task")])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPackage:
    """A package on disk whose manifest was checked; the weights' digest is checked each time they are loaded."""

    folder: Path
    manifest: Manifest
    config_sha256: str

    @property
    def weights_path(self) -> Path:
        """The weights file."""
        return self.folder / self.manifest.source.path

    @property
    def weights_files(self) -> tuple[FoldFile, ...]:
        """Every file that holds weights, the first fold first, each with its digest."""
        source = self.manifest.source
        return (source, *source.folds) if isinstance(source, NnunetSource) else (source,)

    @property
    def files(self) -> tuple[FoldFile, ...]:
        """Every file that the network is made of, each with its digest: the weights, and code where it has any."""
        source = self.manifest.source
        return (*self.weights_files, source.code) if isinstance(source, PythonSource) else self.weights_files

    @property
    def weights_sha256(self) -> str:
        """The weights file's digest; of several, the digest of their digests in their order."""
        digests = [file.sha256 for file in self.weights_files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def device_uid(self) -> str:
        """(0018,1002) of this exact model: derived from id, version, weights and configuration (2.25, PS3.5 B.2)."""
        manifest = self.manifest
        return device_uid(manifest.id, manifest.version, self.weights_sha256, self.config_sha256)

    def provenance(self, parameters: tuple[str, ...] = ()) -> Provenance:
        """What every result says of this model."""
        manifest = self.manifest
        return Provenance(
            name=manifest.id,
            version=manifest.version,
            manufacturer=manifest.manufacturer,
            device_uid=self.device_uid,
            weights_sha256=self.weights_sha256,
            config_sha256=self.config_sha256,
            parameters=parameters,
            demonstration=manifest.intended_use.status == "demonstration",
            notice=manifest.intended_use.text,
        )

    def check_weights(self) -> None:
        """Raise PackageError unless every file of `files` is there, of sane size, and has the manifest's digest."""
        for file in self.files:
            self._check_file(file)

    def _check_file(self, file: FoldFile) -> None:
        path = self.folder / file.path
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise PackageError(f"{path}: leads out of the package folder")
            with open_regular(path, MAX_WEIGHTS_BYTES) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as exc:
            raise PackageError(f"{path}: {exc.strerror}; the package has no readable weights") from exc
        if digest != file.sha256:
            raise PackageError(f"{path}: sha256 is {digest[:16]}..., {MANIFEST} says {file.sha256[:16]}...")


def open_regular(path: Path, max_bytes: int) -> io.FileIO:
    """A file opened to be read. Raises PackageError when it is larger, or no regular file: a pipe would wait for ever.

    Raises OSError when there is none.
    """
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
        file.close()
        limit = f"{max_bytes >> 30} GiB" if max_bytes >> 30 else f"{max_bytes >> 10} KiB"
        raise PackageError(f"{path}: is no regular file or larger than {limit}")
    return file


def read_regular(path: Path, max_bytes: int = MAX_WEIGHTS_BYTES) -> bytes:
    """The content of a regular file. Raises PackageError, also when there is none."""
    try:
        with open_regular(path, max_bytes) as file:
            return file.readall()
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror or type(exc).__name__}") from exc


def load_package(folder: Path) -> ModelPackage:
    """Read and check `folder`/model.yaml. Raises PackageError that names the key and what is expected there."""
    path = folder / MANIFEST
    try:
        with open_regular(path, _MAX_MANIFEST_BYTES) as file:
            text = file.read().decode("utf-8")
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}; a model package is a folder with a {MANIFEST}") from exc
    except UnicodeDecodeError as exc:
        raise PackageError(f"{path}: is not UTF-8 text") from exc
    return package_of(folder, path, _parse(path, text))


def package_of(folder: Path, path: Path, content: Any) -> ModelPackage:
    """The package whose model.yaml would hold `content`; `path` is what errors name. Raises PackageError."""
    try:
        check_plain(content)
    except ValueError as exc:
        raise PackageError(f"{path}: {exc}") from exc
    try:
        manifest = _MANIFEST.validate_python(content)
    except ValidationError as exc:
        raise PackageError(_explain(path, exc)) from exc
    # of the meaning, not of the spelling: comments and order of keys do not make another model
    canonical = json.dumps(content, sort_keys=True, default=str)
    return ModelPackage(folder=folder, manifest=manifest, config_sha256=hashlib.sha256(canonical.encode()).hexdigest())


def _parse(path: Path, text: str) -> Any:
    try:
        content = read_yaml(text)
    except (yaml.YAMLError, ValueError) as exc:
        raise PackageError(f"{path}: not readable as plain YAML: {exc}") from exc
    if not isinstance(content, dict):
        raise PackageError(f"{path}: expected keys and values at the top")
    return content


def _explain(path: Path, exc: ValidationError) -> str:
    lines = []
    errors = exc.errors()
    for error in errors[:_ERRORS_SHOWN]:
        keys = [str(part) for part in error["loc"] if part not in _TAGS]
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown key; remove it"
        elif error["type"] == "missing":
            message = "is required"
        plain = isinstance(error["input"], str | int | float | bool)
        shown = f" (got {error['input']!r:.100})" if plain else ""
        lines.append(f"{'.'.join(keys) or 'task'}: {message}{shown}")
    if more := len(errors) - len(lines):
        lines.append(f"and {more} more")
    return f"{path}: " + "; ".join(lines)
