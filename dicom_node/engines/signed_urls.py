"""URLs under which an engine may fetch one object of one job for a while, and the keys that sign them.

    <base>/handed-out/<key id>/<job>/<expiry>/<signature>/<object>

The signature is an HMAC-SHA256 over method, object, job, expiry, key id and the job's nonce (`handed_out.Shelf`): it
fits nothing else, cannot be guessed (256 bits, and an object's name has 128 more), and ends for good when the job is
revoked, because its nonce is then gone. The path says nothing about a patient: job and object are names of the node's.

Time: an expiry is written twice, on the boot clock and on the wall clock. While the machine has not been restarted the
boot clock alone decides, so setting the wall clock an hour forward kills no URL and an hour back prolongs none. After
a restart only the wall clock is left: a clock that is then an hour behind lets a URL live that hour longer, one that is
ahead ends it that much earlier, and a URL with more than its longest life left (a clock that lost its date) is refused.
Whoever ends a job revokes it; expiry is the second lock, not the first.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from dicom_node.engines.keys import private_folder, read_private, replace_private
from dicom_node.errors import ConfigError, NodeError, StorageError
from dicom_node.interfaces import Clock

__all__ = ["MAX_LIFETIME_S", "PREFIX", "Grant", "KeyRing", "LinkRefused", "Nonces", "Signer", "SigningKey"]

PREFIX = "/handed-out/"
MAX_LIFETIME_S = 8 * 24 * 3600  # a pathology platform asks for six days at least
ROTATE_AFTER_S = 30 * 24 * 3600
MAX_KEYS = 16
MAX_URL_CHARACTERS = 2083
_KEPT_AFTER_S = MAX_LIFETIME_S + 24 * 3600  # a day of slack for clocks that are set
_CLOCK_STEP_S = 2 * 3600
_LOCK_TRIES, _LOCK_PAUSE_S = 200, 0.05

JOB = re.compile(r"[A-Za-z0-9_-]{1,64}")
OBJECT = re.compile(r"[0-9a-f]{32}(?:\.[a-z0-9]{1,8}){0,2}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")
_EXPIRY = re.compile(r"([1-9][0-9]{0,11})-([1-9][0-9]{0,11})-([0-9a-f]{8})")
_SIGNATURE = re.compile(r"[A-Za-z0-9_-]{43}")


class LinkRefused(NodeError):
    """The URL opens nothing. `status` is the HTTP status to answer: 404 says nothing, 410 that it was good once."""

    def __init__(self, reason: str, status: int = 404) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class Nonces(Protocol):
    """Per job a secret that exists until the job is revoked (`handed_out.Shelf`)."""

    def nonce(self, job: str) -> bytes | None:
        """The job's nonce, None when it has none or was revoked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a URL opens: one object of one job, with GET also HEAD. `expires` is for people."""

    method: str
    job: str
    object_id: str
    key_id: str
    expires: datetime


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One key; its repr does not show it."""

    id: str
    secret: bytes
    made: float  # wall clock, seconds since 1970

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"


class KeyRing:
    """The keys URLs are signed with, in one private file that every process of the node reads.

    The newest key signs; older ones are accepted for as long as URLs signed with them may live. Threads may share it.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[SigningKey, ...] = ()

    def current(self) -> SigningKey:
        """The key to sign with; a new one is made when there is none, or it is 30 days old. Raises StorageError."""
        with self._lock:
            self._load()
            if not self._keys or self._now() - self._keys[-1].made > ROTATE_AFTER_S:
                self._rotate(drop_others=False, unless_newer_than=self._keys[-1].id if self._keys else "")
            return self._keys[-1]

    def key(self, key_id: str) -> SigningKey | None:
        """An accepted key, None for any other id. Another process may just have made it."""
        with self._lock:
            self._load()
            return next((key for key in self._keys if key.id == key_id), None)

    def rotate(self, *, drop_others: bool = False) -> SigningKey:
        """Sign with a new key from now on. `drop_others`: at once no URL of an older key opens anything any more."""
        with self._lock:
            self._load()
            self._rotate(drop_others=drop_others, unless_newer_than=None)
            return self._keys[-1]

    def _now(self) -> float:
        return self._clock.wall().timestamp()

    def _rotate(self, *, drop_others: bool, unless_newer_than: str | None) -> None:
        with self._file_lock():
            self._load()
            if unless_newer_than is not None and self._keys and self._keys[-1].id != unless_newer_than:
                return  # another process was faster
            now = self._now()
            made = SigningKey(secrets.token_hex(4), secrets.token_bytes(32), now)
            ends = [*(key.made for key in self._keys[1:]), now]  # when each stops signing
            kept = [key for key, end in zip(self._keys, ends, strict=False) if now - end < _KEPT_AFTER_S]
            keys = [*([] if drop_others else kept[1 - MAX_KEYS :]), made]
            listed = [{"id": key.id, "secret": key.secret.hex(), "made": key.made} for key in keys]
            replace_private(self._path, json.dumps({"keys": listed}) + "\n")
            self._load()

    def _load(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, ()
            return
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._stamp:
            return
        text = read_private(self._path) or ""
        try:
            self._keys = tuple(
                SigningKey(str(entry["id"]), bytes.fromhex(entry["secret"]), float(entry["made"]))
                for entry in json.loads(text)["keys"]
            )
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{self._path}: these are no keys; remove the file, a new one is made") from None
        self._stamp = stamp

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        private_folder(self._path.parent)
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_PAUSE_S)  # another process, not the clock: a real pause even under a test's clock
            else:
                raise StorageError(f"{self._path}: another process holds the keys")
            yield
        finally:
            os.close(descriptor)


class Signer:
    """Makes URLs and judges them. Threads and processes may each have one over the same files."""

    def __init__(self, keys: KeyRing, nonces: Nonces, clock: Clock, *, base_url: str = "") -> None:
        self._keys = keys
        self._nonces = nonces
        self._clock = clock
        self._base_url = base_url.rstrip("/")

    @property
    def base_url(self) -> str:
        """What URLs begin with, '' when nobody said how engines reach the node."""
        return self._base_url

    def url(self, job: str, object_id: str, *, lifetime_s: float, method: str = "GET") -> str:
        """A URL that opens the object with `method` for `lifetime_s` seconds, at most 8 days, or until revoked.

        Raises ValueError for names that are none of the node's, LinkRefused when the job has nothing on the shelf.
        """
        if not JOB.fullmatch(job) or not OBJECT.fullmatch(object_id) or not re.fullmatch("[A-Z]{1,16}", method):
            raise ValueError("a job, object or method that cannot stand in a URL")
        if not 1 <= lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"lifetime_s: {lifetime_s:g} is not 1 to {MAX_LIFETIME_S}")
        nonce = self._nonces.nonce(job)
        if nonce is None:
            raise LinkRefused("the job has no objects to hand out")
        key = self._keys.current()
        boot = self._clock.boot()
        wall_end = int(self._clock.wall().timestamp() + lifetime_s)
        expiry = f"{wall_end}-{int(boot.seconds + lifetime_s) + 1}-{_boot_tag(boot.boot_id)}"
        signature = _signature(key, nonce, method, object_id, job, expiry)
        url = f"{self._base_url}{PREFIX}{key.id}/{job}/{expiry}/{signature}/{object_id}"
        if len(url) > MAX_URL_CHARACTERS:
            raise ValueError(f"the base URL makes a URL of more than {MAX_URL_CHARACTERS} characters")
        return url

    def check(self, path: str, *, method: str = "GET") -> Grant:
        """What the path of a request opens for `method`; a URL for GET opens HEAD too.

        Raises LinkRefused: 404 for anything not signed, revoked, or signed for another method; 410 once expired.
        """
        key_id, job, expiry, signature, object_id = _parts(path)
        signed_method = "GET" if method == "HEAD" else method
        key, nonce = self._keys.key(key_id), self._nonces.nonce(job)
        # Compared in any case, and in constant time: the answer and its time say nothing about what was wrong
        expected = _signature(
            key or SigningKey(key_id, b"\0" * 32, 0.0), nonce or b"", signed_method, object_id, job, expiry
        )
        if not hmac.compare_digest(expected, signature) or key is None or nonce is None:
            raise LinkRefused("nothing is handed out there")
        wall_end, boot_end, boot_tag = _EXPIRY.fullmatch(expiry).groups()  # type: ignore[union-attr]
        self._not_expired(int(wall_end), int(boot_end), boot_tag)
        expires = datetime.fromtimestamp(int(wall_end), UTC)
        return Grant(method=signed_method, job=job, object_id=object_id, key_id=key_id, expires=expires)

    def _not_expired(self, wall_end: int, boot_end: int, boot_tag: str) -> None:
        boot = self._clock.boot()
        if boot_tag == _boot_tag(boot.boot_id):
            left: float = boot_end - boot.seconds
        else:
            left = wall_end - self._clock.wall().timestamp()
            if left > MAX_LIFETIME_S + _CLOCK_STEP_S:
                raise LinkRefused("the clock is far behind the one this URL was made by", 410)
        if left <= 0:
            raise LinkRefused("the URL has expired", 410)


def _parts(path: str) -> tuple[str, str, str, str, str]:
    """Key id, job, expiry, signature, object of a path that is exactly of the form; no decoding, no query, no dots."""
    parts = path.removeprefix(PREFIX).split("/") if path.startswith(PREFIX) and len(path) < 512 else []
    forms = (_KEY_ID, JOB, _EXPIRY, _SIGNATURE, OBJECT)
    if len(parts) != len(forms) or not all(form.fullmatch(part) for form, part in zip(forms, parts, strict=True)):
        raise LinkRefused("nothing is handed out there")
    key_id, job, expiry, signature, object_id = parts
    return key_id, job, expiry, signature, object_id


def _signature(key: SigningKey, nonce: bytes, method: str, object_id: str, job: str, expiry: str) -> str:
    # No part can contain a line break: the message can be read in one way only
    message = "\n".join(("dicom-node url 1", method, object_id, job, expiry, key.id, nonce.hex()))
    digest = hmac.new(key.secret, message.encode("ascii"), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")


def _boot_tag(boot_id: str) -> str:
    return hashlib.sha256(boot_id.encode()).hexdigest()[:8]
