"""Files that engines returned and that do not fit, kept for a person to look at: `<data_dir>/quarantine`.

    <data_dir>/quarantine/job-12-3fa94c0d51b2.bin    a copy of what came back
    <data_dir>/quarantine/job-12-3fa94c0d51b2.json   why, when, from which engine, for which study and series

Such a file may name the patient, so folder and files are the node's own (0700, 0600); names and reasons do not. The
folder is bounded (`storage.quarantine_bytes`, `storage.quarantine_files`): the oldest give way to a new one, and one
that is larger than all of it is not kept. Nothing of the
node depends on what is in it; anything may be deleted by hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dicom_node.errors import NodeError
from dicom_node.interfaces import Clock
from dicom_node.store.fs import FileSystem, RealFileSystem
from dicom_node.store.rows import utc_text

__all__ = ["Quarantine", "Quarantined"]

log = logging.getLogger(__name__)

_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One kept file. `name` is its name in the folder; `kept_at` is ISO 8601 UTC."""

    name: str
    reason: str
    engine: str
    job_id: int
    study_instance_uid: str
    series_instance_uid: str
    bytes: int
    sha256: str
    kept_at: str


class Quarantine:
    """Any number of processes may use one folder: a file and its description come under their names in one step."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        fs: FileSystem | None = None,
        free_bytes: Callable[[], int],
        max_bytes: int,
        max_files: int,
    ) -> None:
        """`folder` is made with the first file. `free_bytes`: what may be used of the disk. 0 of either maximum: no
        file is kept, and those that are there stay.
        """
        self._folder = folder
        self._fs: FileSystem = fs or RealFileSystem()
        self._clock = clock
        self._free_bytes = free_bytes
        self._max_bytes = max_bytes
        self._max_files = max_files

    def keep(
        self, path: Path, reason: str, *, engine: str, job_id: int, study_instance_uid: str, series_instance_uid: str
    ) -> str:
        """Copy the file at `path`; its name here, or '' when there is no room for it or it cannot be copied.

        The same content of the same job is kept once, with the reason it came with first. `job_id` 0: by hand.
        """
        try:
            size = path.stat().st_size
            if self._max_files < 1 or size > self._max_bytes or size > self._free_bytes():
                log.warning("no room in the quarantine", extra={"engine": engine, "job": job_id, "bytes": size})
                return ""
            self._fs.mkdir(self._folder)
            temporary = self._folder / f".{os.getpid()}-{job_id}.tmp"
            try:
                digest = self._copied(path, temporary)
                name = f"job-{job_id}-{digest[:12]}.bin"
                described = Quarantined(
                    name=name,
                    reason=reason,
                    engine=engine,
                    job_id=job_id,
                    study_instance_uid=study_instance_uid,
                    series_instance_uid=series_instance_uid,
                    bytes=temporary.stat().st_size,
                    sha256=digest,
                    kept_at=utc_text(self._clock.wall()),
                )
                self._name(temporary, described)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, NodeError) as exc:
            log.warning(
                "a file could not be kept in the quarantine", extra={"engine": engine, "job": job_id}, exc_info=exc
            )
            return ""
        log.warning("kept in the quarantine", extra={"engine": engine, "job": job_id, "name_there": name})
        return name

    def _name(self, temporary: Path, described: Quarantined) -> None:
        target = self._folder / described.name
        if target.exists():
            return
        self._make_room(described.bytes)
        description = _description(target)
        folder_fd = self._fs.open_folder(self._folder)
        try:
            with suppress(FileNotFoundError):  # of a file that never came under its name
                self._fs.unlink(description)
            self._write(description, [json.dumps(asdict(described)).encode()])
            self._fs.rename(temporary, target.name, folder_fd)
        except OSError:
            with suppress(OSError):
                self._fs.unlink(description)
            raise
        finally:
            self._fs.close(folder_fd)

    def _copied(self, source: Path, target: Path) -> str:
        """Copy, for the owner only; the SHA-256."""
        digest = hashlib.sha256()
        with source.open("rb") as reading:

            def pieces() -> Iterator[bytes]:
                while piece := reading.read(_PIECE):
                    digest.update(piece)
                    yield piece

            self._write(target, pieces())
        return digest.hexdigest()

    def _write(self, target: Path, pieces: Iterable[bytes]) -> None:
        fd = self._fs.create(target)
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[self._fs.write(fd, view) :]
        finally:
            self._fs.close(fd)

    def _make_room(self, size: int) -> None:
        """Remove the oldest until one more of that size fits."""
        found = sorted(self._files(), key=lambda file: (file[1].st_mtime_ns, file[0].name))
        total = sum(info.st_size for _, info in found)
        while found and (total + size > self._max_bytes or len(found) >= self._max_files):
            file, info = found.pop(0)
            total -= info.st_size
            file.unlink(missing_ok=True)
            _description(file).unlink(missing_ok=True)

    def _files(self) -> Sequence[tuple[Path, os.stat_result]]:
        found = []
        for file in self._folder.glob("job-*.bin"):
            with suppress(FileNotFoundError):  # another process makes room
                found.append((file, file.stat()))
        return found

    def sweep(self) -> None:
        """Remove what a crash left half copied. Only while nothing is being kept."""
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def listed(self) -> Sequence[Quarantined]:
        """Oldest first. A file without a description that can be read is listed with no more than its name and size."""
        described = []
        for file, info in self._files():
            try:
                described.append(Quarantined(**json.loads(_description(file).read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                none = {"engine": "", "job_id": 0, "study_instance_uid": "", "series_instance_uid": "", "kept_at": ""}
                described.append(
                    Quarantined(name=file.name, reason="not known", bytes=info.st_size, sha256="", **none)  # type: ignore[arg-type]
                )
        return sorted(described, key=lambda one: (one.kept_at, one.name))


def _description(file: Path) -> Path:
    return file.with_suffix(".json")
