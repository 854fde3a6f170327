"""Names and hashed passcodes in a file: one user a line, `NAME:scrypt$N$R$P$SALT$HASH` (RFC 7914, base64).

The file is kept like a private key and taken in when it changes. What is checked costs the same whether the name is
known or not.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dicom_node.errors import ConfigError
from dicom_node.private_files import read_private, stamp

__all__ = ["HashedPasscode", "UsersFile", "hash_passcode", "user_line"]

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_NAME = 256
MAX_PASSCODE = 1024
_N, _R, _P = 2**15, 8, 3  # 32 MiB three times: as much as an attacker with the file has to spend on each guess
_MAX_MEMORY = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HashedPasscode:
    """What is kept of a passcode, and what it takes to compute it."""

    n: int
    r: int
    p: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    def is_of(self, passcode: bytes) -> bool:
        """Whether it is this passcode's; takes the same time for each."""
        return hmac.compare_digest(self.digest, _scrypt(passcode, self.salt, self.n, self.r, self.p))


def _scrypt(passcode: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(passcode, salt=salt, n=n, r=r, p=p, maxmem=2 * _MAX_MEMORY, dklen=32)


def hash_passcode(passcode: bytes) -> HashedPasscode:
    """With a salt of its own. Raises ConfigError for an empty one, and one that is too long."""
    if not 0 < len(passcode) <= MAX_PASSCODE:
        raise ConfigError(f"the passcode has {len(passcode)} bytes; give one of 1 to {MAX_PASSCODE}")
    salt = os.urandom(16)
    return HashedPasscode(_N, _R, _P, salt, _scrypt(passcode, salt, _N, _R, _P))


def user_line(name: str, hashed: HashedPasscode) -> str:
    """The user's line in the file. Raises ConfigError for a name that cannot be kept."""
    if not 0 < len(name) <= MAX_NAME or name != name.strip() or not name.isprintable() or name.startswith("#"):
        raise ConfigError(
            f"{name!r} is no user name: 1-{MAX_NAME} printable characters, no blank around them, no '#' before them"
        )
    salt, digest = (base64.b64encode(value).decode() for value in (hashed.salt, hashed.digest))
    return f"{name}:scrypt${hashed.n}${hashed.r}${hashed.p}${salt}${digest}"


_NOBODY = HashedPasscode(_N, _R, _P, bytes(16), bytes(32))


class UsersFile:
    """The users of one file, read again when it changed. Raises ConfigError when it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self.generation = 0  # counts the changes
        self._seen: tuple[int, ...] = ()
        self._users: Mapping[str, HashedPasscode] = {}
        self.look()

    def __len__(self) -> int:
        return len(self._users)

    def look(self) -> None:
        """Take it in if it changed. Raises ConfigError; those that were known go on to hold."""
        with self._guard:
            try:
                seen = stamp(self._path)
            except OSError as exc:
                raise ConfigError(
                    f"user_identity.users_file: {self._path} cannot be read: {exc.strerror}; "
                    "`dicom-node users hash NAME` prints a line for it"
                ) from None
            if seen != self._seen:
                self._seen = seen  # whatever comes of it: what is wrong is told once
                self._users = _read(self._path)
                self.generation += 1

    def knows(self, name: str) -> bool:
        """Whether there is such a user."""
        return name in self._users

    def check(self, name: str, passcode: bytes) -> bool:
        """Whether it is that user's passcode; as slow for a name that nobody has."""
        return self._users.get(name, _NOBODY).is_of(passcode[:MAX_PASSCODE]) and len(passcode) <= MAX_PASSCODE


def _read(path: Path) -> Mapping[str, HashedPasscode]:
    where = "user_identity.users_file"
    content = read_private(where, path, MAX_FILE_BYTES)
    users: dict[str, HashedPasscode] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, hashed = line.strip().rpartition(":")
        read = _hashed(hashed)
        if not name or read is None or name in users:
            raise ConfigError(
                f"{where}: {path}, line {number} is no NAME:scrypt$... of a user of its own; "
                "`dicom-node users hash NAME` prints one"
            )
        users[name] = read
    return users


def _hashed(text: str) -> HashedPasscode | None:
    """None for what is no such hash, or would cost too much or too little."""
    parts = text.split("$")
    if len(parts) != 6 or parts[0] != "scrypt":
        return None
    try:
        n, r, p = (int(part) for part in parts[1:4])
        salt, digest = (base64.b64decode(part, validate=True) for part in parts[4:])
    except (ValueError, binascii.Error):
        return None
    if n & (n - 1) or not 2**14 <= n <= 2**17 or r != 8 or not 1 <= p <= 8 or len(salt) < 16 or len(digest) != 32:
        return None
    return HashedPasscode(n, r, p, salt, digest)
