"""The shelf of objects engines may fetch, and the HTTP answer that gives them out.

    <folder>/<job>/nonce       what makes the job's URLs valid: gone with the folder, and then so are they
    <folder>/<job>/<object>    one file, named by 128 random bits and a suffix that tells its kind

Everything is durable before a URL for it exists, and private to the node's user. A job is revoked by taking its folder
away in one step; a download under way then ends short. Names come from the node and are checked by pattern before they
touch a path. Ranges are those of RFC 9110 section 14.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, TypeVar

from dicom_node.engines.keys import URL_KEYS, create_private, private_folder, read_private, sync_folder
from dicom_node.engines.signed_urls import JOB, OBJECT, PREFIX, Grant, KeyRing, LinkRefused, Signer
from dicom_node.errors import EngineUnavailable, StorageError
from dicom_node.interfaces import Clock

__all__ = ["HandedOut", "Links", "Shelf", "shelf_and_signer"]

log = logging.getLogger(__name__)

FOLDER = "handed_out"
MAX_JOBS = 1024
MAX_DOWNLOADS = 8
PIECE = 256 * 1024
_NONCE = "nonce"
_GONE = ".gone-"
_SUFFIX = re.compile(r"(?:\.[a-z0-9]{1,8}){0,2}")
_MEDIA_TYPES = {
    ".dcm": "application/dicom",
    ".zip": "application/zip",
    ".nii.gz": "application/gzip",
    ".json": "application/json",
    ".png": "image/png",
}

T = TypeVar("T")


class Shelf:
    """Objects of jobs under way, on disk. Every process of the node may have one over the same folder."""

    def __init__(self, folder: Path, *, max_jobs: int = MAX_JOBS) -> None:
        self._folder = folder
        self._max_jobs = max_jobs

    def put(self, job: str, suffix: str, write: Callable[[BinaryIO], T]) -> tuple[str, T]:
        """Write an object with `write(file)`; its name, and what `write` returned. Durable when it returns.

        Nothing of it stays when `write` raises. Raises StorageError when the disk does not take it,
        EngineUnavailable when `max_jobs` other jobs have objects on the shelf.
        """
        if not JOB.fullmatch(job) or not _SUFFIX.fullmatch(suffix):
            raise ValueError("a job or suffix that cannot stand in a file name")
        folder = self._job_folder(job)
        object_id = secrets.token_hex(16) + suffix
        temporary = folder / f".{object_id}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    result = write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, folder / object_id)
                sync_folder(folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        except OSError as exc:
            raise StorageError(f"an object could not be laid out for an engine ({exc.strerror})") from exc
        return object_id, result

    def nonce(self, job: str) -> bytes | None:
        """What the job's URLs are bound to; None when nothing is handed out for it (any more)."""
        text = read_private(self._folder / job / _NONCE) if JOB.fullmatch(job) else None
        return bytes.fromhex(text.strip()) if text and re.fullmatch("[0-9a-f]{64}\n", text) else None

    def open(self, job: str, object_id: str) -> BinaryIO | None:
        """The object, None when it is not (any more) on the shelf."""
        if not JOB.fullmatch(job) or not OBJECT.fullmatch(object_id):
            return None
        try:
            descriptor = os.open(self._folder / job / object_id, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        return os.fdopen(descriptor, "rb")

    def revoke(self, job: str) -> None:
        """From now on no URL of this job opens anything, across restarts too; its objects go. Idempotent.

        A later `put` for the same job starts anew: URLs from before stay dead. Raises StorageError.
        """
        if not JOB.fullmatch(job):
            return
        gone = self._folder / f"{_GONE}{secrets.token_hex(8)}"
        try:
            os.rename(self._folder / job, gone)
            sync_folder(self._folder)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StorageError(f"a job's objects could not be taken back ({exc.strerror})") from exc
        shutil.rmtree(gone, ignore_errors=True)  # what stays is found by `keep_only`, and has no name a URL can say

    def keep_only(self, jobs: Collection[str]) -> int:
        """Revoke every job but these (those still open), and clear what a crash left; returns how many went."""
        revoked = 0
        for name in self._names():
            if name.startswith(_GONE):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            elif name not in jobs and JOB.fullmatch(name):
                self.revoke(name)
                revoked += 1
        return revoked

    def jobs(self) -> list[str]:
        """Jobs with objects on the shelf."""
        return sorted(name for name in self._names() if JOB.fullmatch(name))

    def age_s(self, job: str) -> float:
        """How long ago something was last put there for this job, by the wall clock; 0 when that cannot be told."""
        try:
            return max(time.time() - os.stat(self._folder / job).st_mtime, 0.0) if JOB.fullmatch(job) else 0.0
        except OSError:
            return 0.0

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []

    def _job_folder(self, job: str) -> Path:
        folder = self._folder / job
        if self.nonce(job) is not None:
            return folder
        if len(self.jobs()) >= self._max_jobs:
            raise EngineUnavailable(f"{self._max_jobs} jobs have objects laid out for engines; one must end first")
        try:
            private_folder(self._folder)
            private_folder(folder)
        except OSError as exc:
            raise StorageError(f"an object could not be laid out for an engine ({exc.strerror})") from exc
        create_private(folder / _NONCE, lambda: secrets.token_hex(32) + "\n")
        return folder


def shelf_and_signer(data_dir: Path, clock: Clock, *, base_url: str = "") -> tuple[Shelf, Signer]:
    """The node's shelf and its signer, as every process of the node has them. `base_url` is how engines reach the node.

    An adapter puts objects on the shelf and signs URLs for them; the process with the HTTP server mounts `Links` over
    its own pair.
    """
    shelf = Shelf(data_dir / FOLDER)
    return shelf, Signer(KeyRing(data_dir / URL_KEYS, clock), shelf, clock, base_url=base_url)


# --- the answer over HTTP --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a file, `last` included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1


class HandedOut:
    """An HTTP answer: `status`, `headers` and, iterated once, the body. `close` it in any case."""

    def __init__(
        self,
        status: HTTPStatus,
        headers: Mapping[str, str],
        *,
        text: bytes = b"",
        file: BinaryIO | None = None,
        span: _Span | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.status = status
        self.headers = headers
        self._text, self._file, self._span, self._on_close = text, file, span, on_close
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        if self._file is None or self._span is None:
            if self._text:
                yield self._text
            return
        self._file.seek(self._span.first)
        left = self._span.length
        # a file that lost its name was taken back: what is left of it stays here
        while left and os.fstat(self._file.fileno()).st_nlink:
            piece = self._file.read(min(PIECE, left))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def close(self) -> None:
        """Give back the file and the place among the downloads. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._file is not None:
                self._file.close()
            self._on_close()


class Links:
    """Answers requests below `signed_urls.PREFIX`; mounted on the node's HTTP server when an engine needs it.

    At most `max_downloads` at once; one more is told to come again. Signatures reach no log.
    """

    prefix = PREFIX

    def __init__(self, signer: Signer, shelf: Shelf, *, max_downloads: int = MAX_DOWNLOADS) -> None:
        self._signer = signer
        self._shelf = shelf
        self._free = threading.BoundedSemaphore(max_downloads)

    def __call__(self, method: str, target: str, headers: Mapping[str, str]) -> HandedOut:
        """Answer GET or HEAD of `target`; `headers` by lower-case name."""
        if method not in ("GET", "HEAD"):
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD", Allow="GET, HEAD")
        try:
            grant = self._signer.check(target, method=method)
        except LinkRefused as exc:
            log.info("a link was refused", extra={"reason": exc.reason, "status": exc.status})
            return _refusal(HTTPStatus(exc.status), exc.reason)
        if not self._free.acquire(blocking=False):
            log.warning("a download was put off", extra={"job": grant.job, "object": grant.object_id})
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many downloads at once", **{"Retry-After": "5"})
        file = self._shelf.open(grant.job, grant.object_id)
        if file is None:
            self._free.release()
            return _refusal(HTTPStatus.NOT_FOUND, "nothing is handed out there")
        return self._file(method, grant, file, headers)

    def _file(self, method: str, grant: Grant, file: BinaryIO, headers: Mapping[str, str]) -> HandedOut:
        length = os.fstat(file.fileno()).st_size
        tag = f'"{grant.object_id[:32]}"'  # an object never changes under its name
        suffix = grant.object_id[32:]
        common = {
            "Content-Type": _MEDIA_TYPES.get(suffix, "application/octet-stream"),
            "Accept-Ranges": "bytes",
            "ETag": tag,
            "Referrer-Policy": "no-referrer",
        }
        # RFC 9110 14.2: Range is for GET; 13.1.5: If-Range lets a part go out only of the same object
        wanted = headers.get("range", "") if method == "GET" and headers.get("if-range", tag) == tag else ""
        status, sent = _ranged(wanted, length)
        common["Content-Length"] = str(sent.length)
        if status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            common["Content-Range"] = f"bytes */{length}"
        elif status is HTTPStatus.PARTIAL_CONTENT:
            common["Content-Range"] = f"bytes {sent.first}-{sent.last}/{length}"
        log.info(
            "an object was handed out",
            extra={
                **{"job": grant.job, "object": grant.object_id, "key": grant.key_id, "method": method},
                **{"status": status.value, "bytes": sent.length},
            },
        )
        return HandedOut(status, common, file=file, span=sent, on_close=self._free.release)


_SINGLE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))", re.IGNORECASE)


def _ranged(wanted: str, length: int) -> tuple[HTTPStatus, _Span]:
    """What a Range header asks of an object of `length` bytes (RFC 9110 14.1.1, 14.2, 15.5.17).

    Several ranges, another unit and what is malformed are ignored, as a server may: the whole object then.
    """
    whole, nothing = _Span(0, length - 1), _Span(0, -1)
    found = _SINGLE.fullmatch(wanted.strip())
    if found is None:
        return HTTPStatus.OK, whole
    first, last, tail = found.groups()
    if tail is None and last and int(last) < int(first):
        return HTTPStatus.OK, whole
    start = max(length - int(tail), 0) if tail is not None else int(first)
    if start >= length:
        return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, nothing
    return HTTPStatus.PARTIAL_CONTENT, _Span(start, min(int(last), length - 1) if last else length - 1)


def _refusal(status: HTTPStatus, reason: str, **headers: str) -> HandedOut:
    body = f"{reason}\n".encode("ascii", "replace")
    described = {"Content-Type": "text/plain; charset=us-ascii", "Content-Length": str(len(body)), **headers}
    return HandedOut(status, described, text=body)
