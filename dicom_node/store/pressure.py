"""How hard the disk presses: graded back-pressure from free space, failing steps and slow ones.

    open        everything goes on
    paused      what only makes the disk fuller waits: new routine and background jobs; urgent ones go on
    refusing    new C-STORE is answered 0xA700 too; the reserve below is for results of jobs in hand and urgent ones
    full        results wait as well: the last of the reserve is the catalog's and the journal's own

A grade is entered at its threshold and left only a tenth above it, so that it does not flap. Space is asked for at most
every MEASURE_S, whoever asks. Queries, retrievals, deliveries and storage commitment ask nobody.

Steps that fail (`failed`) or are slow pause background work for HOLD_S after the last of them; a step that has not come
back at all counts as slow while it lasts. Neither refuses an object by itself: each tries its own way to the disk, and
the first that gets there has shown that the disk is back.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from dicom_node.errors import StorageError
from dicom_node.settings import StorageSettings
from dicom_node.store.fs import FileSystem

__all__ = ["Grade", "Pressed", "Pressure", "StepObserver", "Volume", "WatchedFileSystem", "pressed_by", "volumes"]

MEASURE_S = 0.2
HOLD_S = 30.0
LATELY_S = 5.0
HYSTERESIS = 1.1
FAILURES = 3  # durable steps one after another: then nothing gets to the disk
# ENOSPC and SQLITE_FULL are not among them: free space tells that, and when it is over
_TROUBLE = frozenset({errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENXIO, errno.ENODEV, errno.ESTALE})
_SQLITE_TROUBLE = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})


class Grade(IntEnum):
    """What has to wait. `min(grade, 2)` is the gauge `intake_state`."""

    OPEN = 0
    PAUSED = 1
    REFUSING = 2
    FULL = 3


@dataclass(frozen=True, slots=True)
class Pressed:
    """How it stands: the grade and why, in constant words; '' where it is OPEN."""

    grade: Grade
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A file system and what of it is kept free, in bytes: below `reserve` no object is taken in (the larger of both
    reserves), below `pause_at` times that background work pauses, below `floor` no result is kept either.
    """

    path: Path
    reserve_bytes: int
    reserve_ratio: float = 0.0
    pause_at: float = 1.0
    floor_bytes: int = 0

    def reserve(self, total: int) -> int:
        """In bytes, of a file system of `total`."""
        return max(self.reserve_bytes, int(total * self.reserve_ratio))

    def grade(self, free: float, total: int) -> Grade:
        """What so much free space means, hysteresis apart."""
        reserve = self.reserve(total)
        if free <= min(self.floor_bytes, reserve // 2):
            return Grade.FULL
        if free <= reserve:
            return Grade.REFUSING
        return Grade.PAUSED if free <= reserve * self.pause_at else Grade.OPEN


def volumes(data_dir: Path, storage: StorageSettings) -> Sequence[Volume]:
    """The archive's volume and, where that is another, the catalog's and the journals'."""
    archive = data_dir / "archive"
    found = [
        Volume(
            path=archive if archive.exists() else data_dir,
            reserve_bytes=storage.reserve_bytes,
            reserve_ratio=storage.reserve_ratio,
            pause_at=storage.pause_at,
            floor_bytes=storage.catalog_reserve_bytes,
        )
    ]
    is_elsewhere = archive.exists() and archive.stat().st_dev != data_dir.stat().st_dev
    if is_elsewhere and (storage.reserve_bytes or storage.reserve_ratio):
        reserve = storage.catalog_reserve_bytes
        found.append(Volume(path=data_dir, reserve_bytes=reserve, pause_at=storage.pause_at))
    return found


def pressed_by(volume: Volume, space: os.statvfs_result, before: Grade = Grade.OPEN) -> Pressed:
    """How a volume stands that stood at `before` when it was looked at last."""
    if space.f_flag & os.ST_RDONLY:
        return Pressed(Grade.FULL, "the file system is read-only")
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    if space.f_files and not space.f_favail:
        free = 0  # no file more can be made, however much space there is
    now, after = volume.grade(free, total), volume.grade(free / HYSTERESIS, total)
    grade = now if now > before else min(after, before)
    reasons = ("", "free space comes near the reserve", "free space is below the reserve", "the reserve is used up")
    return Pressed(grade, reasons[grade])


class StepObserver(Protocol):
    """`metrics.Metrics`, as far as the disk goes."""

    def durable_step(self, step: str, outcome: str) -> None:
        """A step ended `slow` or `failed`; those that do neither are not told."""
        ...


class Pressure:
    """One process's view of its volumes. Safe for many threads; whoever asks measures, at most every MEASURE_S."""

    def __init__(
        self,
        fs: FileSystem,
        volumes: Sequence[Volume],
        *,
        slow_step_s: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slow_step_s` 0: no step is slow."""
        self._fs = fs
        self._volumes = tuple(volumes)
        self._slow_step_s = slow_step_s
        self._now = now
        self._guard = threading.Lock()
        self._space = [Pressed(Grade.OPEN)] * len(self._volumes)
        self._measured_at = float("-inf")
        self._told = Pressed(Grade.OPEN)
        self._failures = 0  # since the last step that did not fail
        self._failed_at = self._slow_at = float("-inf")
        self._under_way: dict[int, float] = {}  # thread to when its step began
        self.observer: StepObserver | None = None

    # --- what has to wait

    def look(self) -> Pressed:
        """How it stands here, whatever other processes told."""
        try:
            space = self._by_space()
        except StorageError as exc:
            space = (Pressed(Grade.REFUSING, str(exc)),)
        return max((*space, self._by_failures(), self._by_slowness()), key=lambda one: one.grade)

    def told(self, others: Pressed) -> None:
        """What other processes of the node found: their disk is this one's."""
        self._told = others

    def background(self) -> Grade:
        """What holds for work that may wait: what this process or any other found."""
        return max(self.look().grade, self._told.grade)

    def admit(self, *, results: bool = False) -> None:
        """Raises StorageError where an object may not be begun; `results` have the reserve."""
        for space in self._by_space():
            if space.grade >= (Grade.FULL if results else Grade.REFUSING):
                raise StorageError(space.reason)

    def space(self) -> Grade:
        """What free space alone makes wait."""
        try:
            return max(one.grade for one in self._by_space())
        except StorageError:
            return Grade.REFUSING

    def room(self) -> int:
        """Bytes above the reserve, of the volume that has least. Raises StorageError when one does not say."""
        spaces = zip(self._volumes, self._measured(), strict=True)
        return min(
            space.f_bavail * space.f_frsize - volume.reserve(space.f_blocks * space.f_frsize)
            for volume, space in spaces
        )

    def _measured(self) -> Sequence[os.statvfs_result]:
        try:
            return [self._fs.statvfs(volume.path) for volume in self._volumes]
        except OSError as exc:
            why = errno.errorcode.get(exc.errno or 0, "I/O error")
            raise StorageError(f"free space is unknown: {why}") from exc

    def _by_space(self) -> Sequence[Pressed]:
        now = self._now()
        if now < self._measured_at + MEASURE_S:
            return self._space
        with self._guard:
            pairs = zip(self._volumes, self._measured(), self._space, strict=True)
            self._space = [pressed_by(volume, space, before.grade) for volume, space, before in pairs]
            self._measured_at = now
            return self._space

    def _by_failures(self) -> Pressed:
        ago_s = self._now() - self._failed_at
        if ago_s >= HOLD_S:
            return Pressed(Grade.OPEN)
        if self._failures >= FAILURES and ago_s < LATELY_S:
            return Pressed(Grade.REFUSING, "nothing can be written")
        return Pressed(Grade.PAUSED, "writing has failed")

    def _by_slowness(self) -> Pressed:
        now = self._now()
        oldest = min(list(self._under_way.values()), default=now)
        is_slow = 0 < self._slow_step_s < now - oldest or now < self._slow_at + HOLD_S
        return Pressed(Grade.PAUSED, "the disk is slow") if is_slow else Pressed(Grade.OPEN)

    # --- what is found on the way

    def begin(self) -> float:
        """A step begins that somebody waits for; hand what is returned to `end` or `failed`, on the same thread."""
        began = self._under_way[threading.get_ident()] = self._now()
        return began

    def end(self, step: str, began: float) -> None:
        """It is durable."""
        self._under_way.pop(threading.get_ident(), None)
        self._failures = 0
        now = self._now()
        if 0 < self._slow_step_s < now - began:
            self._slow_at = now
            self._observed(step, "slow")

    def failed(self, step: str, exc: BaseException) -> None:
        """It is not, or cannot be begun. What is not the disk's fault counts for nothing."""
        self._under_way.pop(threading.get_ident(), None)
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if getattr(exc, "errno", None) == errno.ENOSPC or code == sqlite3.SQLITE_FULL:
            self._measured_at = float("-inf")
        elif getattr(exc, "errno", None) in _TROUBLE or code in _SQLITE_TROUBLE:
            self._failures += 1
            self._failed_at = self._now()
        else:
            return
        self._observed(step, "failed")

    def _observed(self, step: str, outcome: str) -> None:
        if self.observer is not None:
            self.observer.durable_step(step, outcome)


class WatchedFileSystem:
    """A `FileSystem` whose steps are told to a `Pressure`: failed writes and syncs, and how long syncs take.

    `syncfs` is not timed: nobody waits for it, and it brings a whole segment to disk.
    """

    def __init__(self, fs: FileSystem, pressure: Pressure) -> None:
        self._fs, self._pressure = fs, pressure

    def mkdir(self, path: Path) -> None:
        """See `FileSystem`."""
        self._fs.mkdir(path)

    def open_folder(self, path: Path) -> int:
        """See `FileSystem`."""
        return self._fs.open_folder(path)

    def open_tmpfile(self, folder: Path) -> int:
        """See `FileSystem`."""
        try:
            return self._fs.open_tmpfile(folder)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def open_direct_tmpfile(self, folder: Path) -> int:
        """See `FileSystem`."""
        try:
            return self._fs.open_direct_tmpfile(folder)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def create(self, path: Path) -> int:
        """See `FileSystem`."""
        try:
            return self._fs.create(path)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        """See `FileSystem`."""
        try:
            return self._fs.write(fd, data)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """See `FileSystem`."""
        try:
            return self._fs.pwrite(fd, data, offset)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def truncate(self, fd: int, length: int) -> None:
        """See `FileSystem`."""
        try:
            self._fs.truncate(fd, length)
        except OSError as exc:
            self._pressure.failed("write", exc)
            raise

    def fsync(self, fd: int) -> None:
        """See `FileSystem`."""
        began = self._pressure.begin()
        try:
            self._fs.fsync(fd)
        except OSError as exc:
            self._pressure.failed("sync", exc)
            raise
        self._pressure.end("sync", began)

    def fsync_dir(self, fd: int) -> None:
        """See `FileSystem`."""
        began = self._pressure.begin()
        try:
            self._fs.fsync_dir(fd)
        except OSError as exc:
            self._pressure.failed("sync", exc)
            raise
        self._pressure.end("sync", began)

    def fdatasync(self, fd: int) -> None:
        """See `FileSystem`."""
        began = self._pressure.begin()
        try:
            self._fs.fdatasync(fd)
        except OSError as exc:
            self._pressure.failed("sync", exc)
            raise
        self._pressure.end("sync", began)

    def syncfs(self, fd: int) -> None:
        """See `FileSystem`."""
        try:
            self._fs.syncfs(fd)
        except OSError as exc:
            self._pressure.failed("sync", exc)
            raise

    def link(self, fd: int, name: str, folder_fd: int) -> None:
        """See `FileSystem`."""
        self._fs.link(fd, name, folder_fd)

    def link_path(self, fd: int, path: str) -> None:
        """See `FileSystem`."""
        self._fs.link_path(fd, path)

    def open_direct(self, path: Path, *, create: bool) -> int:
        """See `FileSystem`."""
        return self._fs.open_direct(path, create=create)

    def rename(self, source: Path, name: str, folder_fd: int) -> None:
        """See `FileSystem`."""
        self._fs.rename(source, name, folder_fd)

    def unlink(self, path: Path) -> None:
        """See `FileSystem`."""
        self._fs.unlink(path)

    def statvfs(self, path: Path) -> os.statvfs_result:
        """See `FileSystem`."""
        return self._fs.statvfs(path)

    def close(self, fd: int) -> None:
        """See `FileSystem`."""
        self._fs.close(fd)
