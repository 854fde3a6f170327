"""The folder that node and LeapAI share: images lie in it for as long as the engine looks at them.

Both sides know it under their own name. A single image lies in the folder itself; where the engine is to write, or is
given several at once, there is a folder of the job's own:

    2.25.<n>.job/in/2.25.<n>.dcm                      what the engine may read
    2.25.<n>.job/out/<patient>/<patient>_<what>       what it wrote; every image is another patient to it

Names are UIDs of one job, and everything appears whole. What the engine wrote is read through no link and to a bound.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.engines.outgoing import Sent, write_outgoing
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import ConfigError, EngineUnavailable
from dicom_node.interfaces import Heartbeat
from dicom_node.model import StoredInstance

__all__ = ["SharedFolder", "new_job_folder"]

log = logging.getLogger(__name__)

MAX_LEFT_OVER = 16
MAX_AGAIN = 256
AGAIN_S = 3600.0
_FILE = re.compile(r"2\.25\.[0-9]{1,39}\.dcm")
_JOB = re.compile(r"2\.25\.[0-9]{1,39}\.job")
_IN, _OUT = "in", "out"
# of files, and of the folders the engine writes to: the same user, the same group, anybody
_MODES = {"0600": (0o600, 0o700), "0640": (0o640, 0o2770), "0644": (0o644, 0o777)}
_PIECE = 1 << 20
_REMOVALS = 2
_REFUSED = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)  # links, files that are not for us, pipes


def new_job_folder() -> str:
    """A name nobody used before: an engine may still write to the last one."""
    return f"2.25.{uuid.uuid4().int}.job"


class SharedFolder:
    """`node_folder` here, `engine_folder` there. Thread-safe for files and folders of different names."""

    def __init__(self, engine: str, options: LeapAiOptions) -> None:
        self._engine = engine
        self._here = options.node_folder
        self._there = options.engine_folder
        self._mode, self._folder_mode = _MODES[options.file_mode]
        self._guard = threading.Lock()
        self._again: dict[str, float] = {}  # what may still be there, and since when

    def check(self) -> None:
        """Raise ConfigError unless the node may write to it."""
        if not self._here.is_dir() or not os.access(self._here, os.W_OK | os.X_OK):
            key = f"engines.{self._engine}.options.node_folder"
            raise ConfigError(f"{key}: {self._here} is no folder the node may write to; make or mount it")

    def path_there(self, *names: str) -> str:
        """The absolute path on the engine's machine, which may be a Windows one."""
        separator = "\\" if "\\" in self._there else "/"
        return separator.join((self._there, *names))

    def input_there(self, job: str) -> str:
        """Where the engine finds the images of a job folder."""
        return self.path_there(job, _IN)

    def output_there(self, job: str) -> str:
        """Where the engine writes what it makes of them."""
        return self.path_there(job, _OUT)

    # --- what goes there

    @contextmanager
    def handed_over(
        self, instance: StoredInstance, name: str, pseudonyms: Pseudonyms | None, heartbeat: Heartbeat
    ) -> Iterator[Sent]:
        """The image lies there as `name` for as long as the block lasts; with `pseudonyms` without identification.

        Raises EngineUnavailable when the folder cannot be used, and as `outgoing.write_outgoing` does.
        """
        try:
            yield self._put(instance, self._here / name, pseudonyms, heartbeat)
        finally:
            self.remove(name)

    @contextmanager
    def job_folder(self, job: str) -> Iterator[None]:
        """It is there, with a place to read and one to write, for as long as the block lasts.

        Raises EngineUnavailable when the shared folder cannot be used.
        """
        try:
            try:
                for folder in (self._here / job, self._here / job / _IN, self._here / job / _OUT):
                    folder.mkdir(mode=self._folder_mode)
                    with suppress(OSError):  # network shares have modes of their own
                        folder.chmod(self._folder_mode)
            except OSError as exc:
                raise self._unusable(exc) from exc
            yield
        except BaseException:
            self._look_again(job)  # the engine may write on, whoever listens
            raise
        finally:
            self.remove(job)

    def put(self, job: str, instance: StoredInstance, name: str, pseudonyms: Pseudonyms, heartbeat: Heartbeat) -> Sent:
        """The image lies in the job folder from now on. Raises as `handed_over` does; then it does not."""
        return self._put(instance, self._here / job / _IN / name, pseudonyms, heartbeat)

    def _put(self, instance: StoredInstance, path: Path, pseudonyms: Pseudonyms | None, heartbeat: Heartbeat) -> Sent:
        part = path.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with os.fdopen(os.open(part, flags, self._mode), "wb") as target:
                    with suppress(OSError):
                        os.fchmod(target.fileno(), self._mode)
                    sent = write_outgoing(instance, target, pseudonyms, heartbeat=heartbeat)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as exc:
            raise self._unusable(exc) from exc
        return sent

    # --- what comes back

    def written(self, job: str, patient: str, what: str, most: int) -> bytes | None:
        """What the engine wrote for that patient: `<patient>_<what>`. None when it wrote none.

        A link, anything that is no plain file and more than `most` bytes count as none. Raises EngineUnavailable when
        the folder cannot be read.
        """
        try:
            with ExitStack() as stack:
                fd = os.open(self._here, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                for name in (job, _OUT, patient):
                    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                    stack.callback(os.close, fd)
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(f"{patient}_{what}", flags, dir_fd=fd)
                stack.callback(os.close, file)
                return _bounded(file, most)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            log.warning("a file in a shared folder cannot be read", extra={"engine": self._engine, "what": what})
            if exc.errno in _REFUSED:
                return None
            raise self._unusable(exc) from exc

    # --- what is removed

    def left_over(self, note: str) -> tuple[str, ...]:
        """The job folders of a note that are still there; an engine that was slow may write to one after its end."""
        found = [name for name in note.splitlines() if _JOB.fullmatch(name) and (self._here / name).exists()]
        return tuple(found[-MAX_LEFT_OVER:])

    def remove(self, names: str, *, must: bool = False) -> None:
        """Remove the files and job folders `names` has a line for; its other lines say other things, and what is gone
        already is fine.

        What cannot be removed is logged; with `must` EngineUnavailable is raised as well.
        """
        for name in names.splitlines():
            try:
                if _FILE.fullmatch(name):
                    (self._here / name).with_suffix(".part").unlink(missing_ok=True)
                    (self._here / name).unlink(missing_ok=True)
                elif _JOB.fullmatch(name):
                    _remove_folder(self._here / name)
            except OSError as exc:
                log.warning("a file stays in a shared folder", extra={"engine": self._engine, "file": name})
                self._look_again(name)
                if must:
                    raise self._unusable(exc) from exc

    def sweep(self) -> None:
        """Remove what could not be removed when its job was over, and what an engine wrote after that."""
        with self._guard:
            again = dict(self._again)
        self.remove("\n".join(again))
        with self._guard:
            for name, since_s in again.items():
                if time.monotonic() - since_s > AGAIN_S and not os.path.lexists(self._here / name):
                    self._again.pop(name, None)

    def _look_again(self, name: str) -> None:
        with self._guard:
            self._again.setdefault(name, time.monotonic())
            while len(self._again) > MAX_AGAIN:
                del self._again[next(iter(self._again))]

    def _unusable(self, exc: OSError) -> EngineUnavailable:
        return EngineUnavailable(
            f"engine {self._engine}: the shared folder {self._here} cannot be used ({exc.strerror})"
        )


def _bounded(fd: int, most: int) -> bytes | None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size > most:
        return None
    content = bytearray()
    while len(content) <= most and (piece := os.read(fd, _PIECE)):
        content += piece
    return bytes(content) if len(content) <= most else None


def _remove_folder(path: Path) -> None:
    """With everything in it, and no step through a link (`shutil.rmtree` takes care of that)."""
    for _ in range(_REMOVALS):
        if path.is_symlink():
            path.unlink()
        if not os.path.lexists(path):
            return
        with suppress(FileNotFoundError):  # the engine puts away what it no longer needs
            shutil.rmtree(path)
    if os.path.lexists(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
