"""A model package on disk: a folder with `model.yaml` over weights, read as data and nothing else.

No path leaves the folder, nothing of it is imported or evaluated. `manifest` has the schema, `registry` finds
packages, the runtime process loads their weights. Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dicom_node.errors import PackageError
from dicom_node.model import Provenance
from dicom_node.models.manifest import Manifest

__all__ = ["MANIFEST", "ModelPackage", "load_package", "package_of"]

MANIFEST = "model.yaml"
_MAX_MANIFEST_BYTES = 256 * 1024
_MAX_ALIASES = 32  # aliases of aliases grow exponentially
_MAX_DEPTH = 16
_MAX_WEIGHTS_BYTES = 4 * 1024**3

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
    def device_uid(self) -> str:
        """(0018,1002) of this exact model: derived from id, version, weights and configuration (2.25, PS3.5 B.2)."""
        manifest = self.manifest
        identity = "\n".join((manifest.id, manifest.version, manifest.source.sha256, self.config_sha256))
        return f"2.25.{int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], 'big')}"

    def provenance(self, parameters: tuple[str, ...] = ()) -> Provenance:
        """What every result says of this model."""
        manifest = self.manifest
        return Provenance(
            name=manifest.id,
            version=manifest.version,
            manufacturer=manifest.manufacturer,
            device_uid=self.device_uid,
            weights_sha256=manifest.source.sha256,
            config_sha256=self.config_sha256,
            parameters=parameters,
            demonstration=manifest.intended_use.status == "demonstration",
            notice=manifest.intended_use.text,
        )

    def check_weights(self) -> None:
        """Raise PackageError unless the weights file is there, of sane size, and has the manifest's digest."""
        path = self.weights_path
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise PackageError(f"{path}: leads out of the package folder")
            if path.stat().st_size > _MAX_WEIGHTS_BYTES:
                raise PackageError(f"{path}: larger than {_MAX_WEIGHTS_BYTES >> 30} GiB")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise PackageError(f"{path}: {exc.strerror}; the package has no readable weights") from exc
        if digest != self.manifest.source.sha256:
            raise PackageError(
                f"{path}: sha256 is {digest[:16]}..., {MANIFEST} says {self.manifest.source.sha256[:16]}..."
            )


def load_package(folder: Path) -> ModelPackage:
    """Read and check `folder`/model.yaml. Raises PackageError that names the key and what is expected there."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise PackageError(f"{path}: larger than {_MAX_MANIFEST_BYTES >> 10} KiB")
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}; a model package is a folder with a {MANIFEST}") from exc
    except UnicodeDecodeError as exc:
        raise PackageError(f"{path}: is not UTF-8 text") from exc
    return package_of(folder, path, _parse(path, text))


def package_of(folder: Path, path: Path, content: Any) -> ModelPackage:
    """The package whose model.yaml would hold `content`; `path` is what errors name. Raises PackageError."""
    try:
        manifest = _MANIFEST.validate_python(content)
    except ValidationError as exc:
        raise PackageError(_explain(path, exc)) from exc
    # of the meaning, not of the spelling: comments and order of keys do not make another model
    canonical = json.dumps(content, sort_keys=True, default=str)
    return ModelPackage(folder=folder, manifest=manifest, config_sha256=hashlib.sha256(canonical.encode()).hexdigest())


def _parse(path: Path, text: str) -> Any:
    try:
        aliases = depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily: stops before a bomb is unpacked
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if aliases > _MAX_ALIASES or depth > _MAX_DEPTH:
                raise PackageError(f"{path}: more than {_MAX_ALIASES} YAML aliases or {_MAX_DEPTH} levels")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as exc:
        raise PackageError(f"{path}: not readable as plain YAML: {exc}") from exc
    if not isinstance(content, dict):
        raise PackageError(f"{path}: expected keys and values at the top")
    return content


def _explain(path: Path, exc: ValidationError) -> str:
    lines = []
    for error in exc.errors():
        keys = [str(part) for part in error["loc"] if part not in ("segmentation", "classification")]
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown key; remove it"
        elif error["type"] == "missing":
            message = "is required"
        plain = isinstance(error["input"], str | int | float | bool)
        shown = f" (got {error['input']!r})" if plain else ""
        lines.append(f"{'.'.join(keys) or 'task'}: {message}{shown}")
    return f"{path}: " + "; ".join(lines)
