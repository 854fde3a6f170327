"""What is received into a file: whole, checked and durable under its name, or not there at all."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import google_crc32c

from dicom_node.errors import EngineError, StorageError

__all__ = ["Checksum", "Downloaded", "WrongChecksum", "crc32c_base64", "save"]

FILE_MODE = 0o600


class WrongChecksum(EngineError):
    """What arrived is not what was announced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """What a file must sum up to: SHA-256, or CRC32C (RFC 3720 B.4) as four bytes, most significant first."""

    algorithm: Literal["sha256", "crc32c"]
    digest: bytes

    @classmethod
    def sha256(cls, text: str) -> Checksum:
        """From hexadecimal or Base64 text. Raises EngineError."""
        return cls(algorithm="sha256", digest=_digest(text, 32))

    @classmethod
    def crc32c(cls, text: str) -> Checksum:
        """From hexadecimal or Base64 text. Raises EngineError."""
        return cls(algorithm="crc32c", digest=_digest(text, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """A file that is durable at `path`; `sha256` (hexadecimal) is of its `length` bytes. With what came before them."""

    path: Path
    length: int
    sha256: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def crc32c_base64(pieces: Iterable[bytes]) -> str:
    """Base64 of the big-endian CRC32C of all pieces together, as object stores and their users write it."""
    crc = 0
    for piece in pieces:
        crc = google_crc32c.extend(crc, piece)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def save(pieces: Iterable[bytes], target: Path, *, checksum: Checksum | None) -> Downloaded:
    """Write `pieces` to `target`, replacing what is there, in one step once every byte is durable.

    They go to a temporary file beside it, which is removed when anything fails. Raises StorageError, WrongChecksum, and
    whatever `pieces` raises.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        length, sha256 = _write(pieces, temporary, checksum)
        _rename(temporary, target)
    except OSError as exc:
        raise StorageError(f"an engine's answer cannot be written: {exc.strerror}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return Downloaded(path=target, length=length, sha256=sha256)


class _Sum(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


def _write(pieces: Iterable[bytes], path: Path, checksum: Checksum | None) -> tuple[int, str]:
    sha256 = hashlib.sha256()
    crc32c = checksum is not None and checksum.algorithm == "crc32c"
    other: _Sum | None = google_crc32c.Checksum() if crc32c else None  # type: ignore[no-untyped-call]
    length = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with open(fd, "wb") as stream:
        for piece in pieces:
            stream.write(piece)
            sha256.update(piece)
            length += len(piece)
            if other is not None:
                other.update(piece)
        if checksum is not None and (other or sha256).digest() != checksum.digest:
            raise WrongChecksum(f"{length} bytes arrived whose {checksum.algorithm} is not the announced one")
        stream.flush()
        os.fsync(fd)
    return length, sha256.hexdigest()


def _rename(temporary: Path, target: Path) -> None:
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(text: str, length: int) -> bytes:
    try:
        # Base64 of 4 bytes has as many characters as their hexadecimal, but always ends with "=="
        digest = base64.b64decode(text, validate=True) if text.endswith("=") else bytes.fromhex(text)
    except (ValueError, binascii.Error):
        digest = b""
    if len(digest) != length:
        raise EngineError(f"a checksum is neither {length} bytes in hexadecimal nor in Base64")
    return digest
