"""Digests of data sets: BLAKE3, told as `blake3:` and 64 hex digits. Bare hex digits are SHA-256, of old catalogs.

Both are kept under the name `sha256` in the catalog. What was indexed under SHA-256 is compared by its file with what
comes again, once, and has the new digest from then on.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from blake3 import blake3

__all__ = ["digest_of_file", "digest_text", "is_digest_of", "is_old", "new_digest", "old_digest_of"]

PREFIX = "blake3:"
_PIECE = 1024 * 1024


def new_digest() -> blake3:
    """A running digest; `digest()` gives 32 bytes."""
    return blake3()


def digest_text(digest: bytes) -> str:
    """As the catalog keeps it."""
    return PREFIX + digest.hex()


def digest_of_file(fd: int, offset: int, *, old: bool = False) -> str:
    """Of an open file's bytes from `offset` to its end; `old`: as it was made before. Raises OSError."""
    digest: Any = hashlib.sha256() if old else new_digest()
    while piece := os.pread(fd, _PIECE, offset):
        digest.update(piece)
        offset += len(piece)
    return str(digest.hexdigest()) if old else digest_text(digest.digest())


def is_old(text: str) -> bool:
    """Whether this is a digest of before BLAKE3."""
    return not text.startswith(PREFIX)


def is_digest_of(text: str, data: memoryview, digest: str) -> bool:
    """Whether `text`, of whatever kind, is the digest of `data`, whose own is `digest`."""
    return text == (old_digest_of(data) if is_old(text) else digest)


def old_digest_of(data: memoryview) -> str:
    """The same as it was made before."""
    return hashlib.sha256(data).hexdigest()
