"""What the Engine API says, in the two spellings its pages have, checked before anything is believed.

Knows the wire and nothing of DICOM. No text of an answer reaches a message or a log but names of structures that were
ordered and ids that look like ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dicom_node.engines.labels import plain
from dicom_node.errors import EngineError

__all__ = ["Created", "FileState", "Results", "ReturnedFile", "created", "results", "tolerant_json"]

MAX_URL = 4096
MAX_FILES = 512
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


class FileState(Enum):
    """How an ordered file came out."""

    AVAILABLE = "available"
    MISSING = "missing"  # the structure is not there in this patient: no fault
    FAILED = "failed"


_STATES = {
    "available": FileState.AVAILABLE,
    "success": FileState.AVAILABLE,  # one of its pages says so
    "missing": FileState.MISSING,
    "failed": FileState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Created:
    """A job that was made. The URLs are '' where the engine fetches the images itself."""

    job_id: str
    upload_url: str = field(repr=False)
    notify_url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReturnedFile:
    """One file of an answer; `structures` as `labels.plain` spells them, empty when the answer does not say."""

    state: FileState
    structures: tuple[str, ...]
    size: int | None
    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Results:
    """A finished job: files by the key of `outputFiles`, in the order of the answer."""

    success: bool
    files: Mapping[str, tuple[ReturnedFile, ...]]


def tolerant_json(body: bytes) -> Any:
    """JSON that may have commas before a closing bracket, as the engine's own pages do. Raises EngineError."""
    try:
        text = body.decode("utf-8-sig")
        try:
            return json.loads(text)
        except ValueError:
            return json.loads(_TRAILING_COMMA.sub(lambda found: found.group(1) or "", text))
    except (ValueError, RecursionError):
        raise EngineError(f"an answer of {len(body)} bytes is no JSON") from None


def created(body: bytes, key: str) -> Created:
    """The answer to a job with the input file `key`. Raises EngineError."""
    told = _mapping(tolerant_json(body))
    job_id = told.get("jobId")
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise EngineError("the answer to a new job has no usable jobId")
    names = ("presignedUploadUrl", "presignedUploadUrls", "uploadUrls", "inputFiles")
    given = next((_mapping(told[name]) for name in names if told.get(name)), {})
    urls = _mapping(given.get(key, {}))
    return Created(
        job_id,
        _url(urls, "presignedUploadUrl", "uploadUrl"),
        _url(urls, "notifyFinishUploadUrl", "notifyUrl"),
    )


def results(body: bytes) -> Results:
    """The answer of a finished job. Raises EngineError."""
    told = _mapping(tolerant_json(body))
    success = told.get("success")
    if not isinstance(success, bool):
        raise EngineError("the answer of a finished job does not say whether it succeeded")
    listed = _mapping(told.get("outputFiles") or {})
    files: dict[str, tuple[ReturnedFile, ...]] = {}
    for key, entries in listed.items():
        if not isinstance(entries, list) or len(entries) > MAX_FILES:
            continue
        files[str(key)] = tuple(_file(_mapping(entry)) for entry in entries)
    return Results(success, files)


def _file(entry: Mapping[Any, Any]) -> ReturnedFile:
    state = _STATES.get(str(entry.get("status", "")).strip().lower()[:32])
    if state is None:
        raise EngineError("a file of a finished job is in a state nobody documented")
    structures = entry.get("structures")
    listed = structures if isinstance(structures, list) and len(structures) <= 64 else []
    names = tuple(plain(name) for name in listed if isinstance(name, str))
    size = entry.get("size")
    known = isinstance(size, int) and not isinstance(size, bool) and size > 0
    url = _url(entry, "url", "downloadUrl")
    if state is FileState.AVAILABLE and not url:
        raise EngineError("a file of a finished job is said to be available and has no URL")
    return ReturnedFile(state, names, size if known else None, url)


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise EngineError("an answer is not laid out as that of an Engine API")
    return value


def _url(entry: Mapping[Any, Any], *names: str) -> str:
    value = next((entry[name] for name in names if entry.get(name)), "")
    if not isinstance(value, str) or len(value) > MAX_URL or not value.isascii() or not value.isprintable():
        raise EngineError("a URL of an answer is none, or too long")
    return value
