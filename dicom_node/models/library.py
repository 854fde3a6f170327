"""Installed model packages on disk: `<data_dir>/models/<id>/<version>/`, and which version of each is enabled.

A version folder appears whole by one rename and is never edited again; `package.json` in it pins what was imported.
`.state.json` says which version an id without one means, and whether the model is switched off; it is replaced by one
rename too, so readers need no lock. Whoever changes anything holds `.lock` (flock), bounded in time. A hidden folder is
work under way or its remains: whoever works in it holds a flock on it, so the next command that gets one deletes it.
Must not import torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dicom_node.errors import PackageError
from dicom_node.models.package import ModelPackage, load_package
from dicom_node.models.schema import Slug

__all__ = ["PIN", "Library", "ModelState", "Pin", "Stamp", "State", "fsync_folder", "is_name", "unwritable"]

PIN = "package.json"
_STATE, _LOCK = ".state.json", ".lock"
_IMPORT, _REMOVED, _STATE_DRAFT = ".import-", ".removed-", ".state-"
_LOCK_S = 10.0
_JOB_S = 5.0
_POLL_S = 0.05
_MAX_JSON_BYTES = 1024 * 1024

Stamp = tuple[int, int, int]
"""What changes whenever the state does: inode, time and size of its file; zeros without one."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pin(_Record):
    """What was imported: the digest of every file of the package by its relative path, and of its configuration."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    format: str
    config_sha256: str
    files: Mapping[str, str]
    self_test: Literal["passed", "not run"]
    notes: tuple[str, ...] = ()


class ModelState(_Record):
    """One id: which version it means (None: none was enabled), and whether it may run at all."""

    enabled: Slug | None = None
    disabled: bool = False


class State(_Record):
    """Every id about which something was decided."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    models: Mapping[Slug, ModelState] = {}

    def of(self, model_id: str) -> ModelState:
        """What was decided on an id; of one never heard of, nothing."""
        return self.models.get(model_id, ModelState())


_SLUG: TypeAdapter[str] = TypeAdapter(Slug)
_AnyRecord = TypeVar("_AnyRecord", bound=_Record)


def is_name(text: str) -> bool:
    """Whether a text can be the id or the version of an installed package, and so the name of a folder."""
    try:
        return not _SLUG.validate_python(text).startswith(".")
    except ValidationError:
        return False


@dataclass(frozen=True, slots=True)
class Library:
    """The installed packages under `root`, which need not exist yet. Safe to use from any number of processes.

    What cannot be read or written raises PackageError naming the path and the system's reason.
    """

    root: Path

    # --- reading

    def stamp(self) -> Stamp:
        """One stat: as long as it stays the same, every id means the version it meant."""
        try:
            found = (self.root / _STATE).stat()
        except OSError:
            return 0, 0, 0
        return found.st_ino, found.st_mtime_ns, found.st_size

    def state(self) -> State:
        """What is enabled and disabled. Raises PackageError when the file is damaged."""
        return _read(State, self.root / _STATE) or State()

    def ids(self) -> tuple[str, ...]:
        """Ids of which a version is installed."""
        return tuple(name for name in _names(self.root) if self.versions(name))

    def versions(self, model_id: str) -> tuple[str, ...]:
        """Installed versions of an id."""
        if not is_name(model_id):
            return ()
        folder = self.root / model_id
        return tuple(name for name in _names(folder) if (folder / name / PIN).is_file())

    def folder(self, model_id: str, version: str) -> Path:
        """Where a version lies, or would."""
        return self.root / model_id / version

    def pin(self, model_id: str, version: str) -> Pin:
        """What was imported as this version. Raises PackageError with what is installed when it is not."""
        pin = None
        if is_name(model_id) and is_name(version):
            pin = _read(Pin, self.folder(model_id, version) / PIN)
        if pin is None:
            known = ", ".join(self.versions(model_id)) or "none"
            raise PackageError(f"{model_id}@{version} is not installed (installed versions of {model_id}: {known})")
        return pin

    def load(self, model_id: str, version: str) -> ModelPackage:
        """An installed version. Raises PackageError when it is not there, or not what was imported.

        The weights' digest is checked by `ModelPackage.check_weights`, and by each loading.
        """
        pin, folder = self.pin(model_id, version), self.folder(model_id, version)
        package = load_package(folder)
        same = (package.manifest.id, package.manifest.version, package.config_sha256) == (
            *(model_id, version),
            pin.config_sha256,
        )
        if not same or any(pin.files.get(file.path) != file.sha256 for file in package.files):
            raise PackageError(
                f"{folder}: model.yaml is not the imported one (sha256 of its content {package.config_sha256[:16]}..., "
                f"imported {pin.config_sha256[:16]}...); installed packages are not edited: import the change "
                f"under another version, or remove {model_id}@{version} and import it again"
            )
        return package

    def enabled(self, model_id: str) -> str:
        """The version that an id without one means. Raises PackageError when none is enabled."""
        version = self.state().of(model_id).enabled
        if version is None:
            known = ", ".join(self.versions(model_id)) or "none"
            raise PackageError(
                f"no version of model {model_id!r} is enabled (installed: {known}); "
                f"'dicom-node models enable {model_id}@VERSION' does it"
            )
        return version

    def require_not_disabled(self, model_id: str) -> None:
        """Raise PackageError when the model was switched off."""
        if self.state().of(model_id).disabled:
            raise PackageError(f"model {model_id!r} is disabled; 'dicom-node models enable {model_id}' lets it run")

    # --- changing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who changes anything. What commands that were cut off left behind is deleted first.

        Raises PackageError when another command does not finish within 10 s.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise unwritable(self.root, exc) from exc
        try:
            if not _lock(fd, _LOCK_S):
                raise PackageError(f"{self.root}: another 'dicom-node models' command is at work; try again later")
            self._sweep()
            yield
        finally:
            os.close(fd)

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A new hidden folder beside the packages; it is gone at the end, or after the next command if this is killed.

        Raises PackageError.
        """
        with self.locked():  # nobody sweeps between its birth and its lock
            try:
                folder = Path(tempfile.mkdtemp(prefix=_IMPORT, dir=self.root))
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as exc:
                raise unwritable(self.root, exc) from exc
            _lock(fd, 0.0)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(fd)

    def install(self, staged: Path, model_id: str, version: str) -> None:
        """Rename `staged`, every file of which is durable, into its place. The caller holds the lock.

        Raises PackageError when the place is taken or cannot be written; then nothing was installed.
        """
        target = self.folder(model_id, version)
        try:
            target.parent.mkdir(exist_ok=True)
            fsync_folder(self.root)
            staged.rename(target)
            fsync_folder(target.parent)
        except OSError as exc:
            with suppress(OSError):  # as long as it is empty
                target.parent.rmdir()
            raise unwritable(target, exc) from exc

    def decide(self, model_id: str, now: ModelState) -> None:
        """Replace what was decided on one id; durable on return. The caller holds the lock. Raises PackageError."""
        models = {**self.state().models, model_id: now}
        if now == ModelState():
            del models[model_id]
        path = self.root / _STATE
        draft = self.root / f"{_STATE_DRAFT}{os.getpid()}"
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(State(models=models).model_dump_json(indent=2, by_alias=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            fsync_folder(self.root)
        except OSError as exc:
            draft.unlink(missing_ok=True)
            raise unwritable(path, exc) from exc

    @contextmanager
    def reserved(self, model_id: str, version: str) -> Iterator[None]:
        """Keep jobs from starting on a version. Raises PackageError when one runs on it and does not end soon."""
        folder = self.folder(model_id, version)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise unwritable(folder, exc) from exc
        try:
            if not _lock(fd, _JOB_S):
                raise PackageError(f"{model_id}@{version} is at work in a job; remove it when the job is done")
            yield
        finally:
            os.close(fd)

    def remove(self, model_id: str, version: str) -> None:
        """Take a version away: renamed, then deleted. The caller holds the lock and has it reserved.

        Raises PackageError when it cannot be renamed.
        """
        folder, away = self.folder(model_id, version), self.root / f"{_REMOVED}{os.getpid()}"
        try:
            folder.rename(away)
            fsync_folder(folder.parent)
            shutil.rmtree(away, ignore_errors=True)
            with suppress(OSError):  # other versions are left
                folder.parent.rmdir()
            fsync_folder(self.root)
        except OSError as exc:
            raise unwritable(folder, exc) from exc

    @contextmanager
    def held(self, folder: Path) -> Iterator[bool]:
        """Keep a version's folder from being removed. False: it is no longer there."""
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield False
            return
        try:
            # whoever has it exclusively is about to remove it
            got = _lock(fd, 0.0, fcntl.LOCK_SH)
            yield got and _is_at(folder, fd)
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        for path in self.root.glob(".*"):
            if path.name.startswith(_STATE_DRAFT):
                path.unlink(missing_ok=True)
            if not path.name.startswith((_IMPORT, _REMOVED)):
                continue
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    if _lock(fd, 0.0):  # else somebody works in it
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unwritable(path: Path, exc: OSError) -> PackageError:
    """What to say when the disk does not take something."""
    return PackageError(
        f"{path}: {exc.strerror or type(exc).__name__}; nothing was changed: make room or grant access there, then try "
        "again"
    )


def _is_at(folder: Path, fd: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(fd))
    except OSError:
        return False


def _lock(fd: int, wait_s: float, kind: int = fcntl.LOCK_EX) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if is_name(path.name) and path.is_dir())
    except OSError:
        return []


def _read(kind: type[_AnyRecord], path: Path) -> _AnyRecord | None:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise PackageError(f"{path}: larger than {_MAX_JSON_BYTES >> 10} KiB; it is damaged")
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
    except ValidationError as exc:
        error = exc.errors(include_input=False)[0]
        where = ".".join(str(part) for part in error["loc"])
        raise PackageError(
            f"{path}: damaged ({where + ': ' if where else ''}{error['msg']}); move it away and enable anew"
        ) from exc
