"""Secrets the node makes for itself, kept in files of the data folder that only its owner can read.

They are part of the data folder: copied with it, jobs under way go on elsewhere; lost, what was handed out under them
can no longer be understood or fetched, and nothing else is harmed.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dicom_node.errors import ConfigError, StorageError

__all__ = [
    "PSEUDONYM_KEY",
    "URL_KEYS",
    "create_private",
    "node_secret",
    "private_folder",
    "read_private",
    "replace_private",
    "sync_folder",
]

PSEUDONYM_KEY = Path("secrets", "pseudonyms.key")
URL_KEYS = Path("secrets", "urls.keys")
SECRET_BYTES = 32
MAX_BYTES = 1024**2


def node_secret(data_dir: Path) -> bytes:
    """The node's secret for pseudonyms, 32 bytes, made and kept when it is first asked for.

    Every process of the node gets the same one. Raises StorageError when it cannot be kept, ConfigError when the file
    is no secret of the node or others than its owner may read it.
    """
    path = data_dir / PSEUDONYM_KEY
    text = read_private(path)
    if text is None:
        create_private(path, lambda: secrets.token_hex(SECRET_BYTES) + "\n")
        text = read_private(path)
    try:
        secret = bytes.fromhex((text or "").strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path}: expected {2 * SECRET_BYTES} hexadecimal digits; restore the file from a copy")
    return secret


def read_private(path: Path) -> str | None:
    """A private file's text, None when there is none. Raises ConfigError when others may read it, StorageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageError(f"{path} cannot be read ({exc.strerror})") from exc
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ConfigError(f"{path}: mode {mode:04o} lets others read a secret; expected 0600: chmod 600 {path}")
        return file.read(MAX_BYTES).decode("ascii", "replace")


def private_folder(path: Path) -> None:
    """Make a folder only its owner may enter, and make its name durable. One that exists is fine."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent)


def replace_private(path: Path, text: str) -> None:
    """Put `text` in the file's place, durably and in one step. Raises StorageError; the old text then stands."""
    try:
        os.replace(_written(path, text), path)
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"{path} cannot be written ({exc.strerror})") from exc


def sync_folder(path: Path) -> None:
    """Make a folder's names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_private(path: Path, text: Callable[[], str]) -> None:
    """Make the file unless there is one; it appears whole or not at all. Raises StorageError."""
    try:
        temporary = _written(path, text())
        try:
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
        sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(f"{path} cannot be written ({exc.strerror})") from exc


def _written(path: Path, text: str) -> Path:
    """A synced temporary file beside `path`."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    return temporary
