"""Looks after the trail while the node runs: verifies what was added, keeps the head elsewhere, logs it hourly."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from dicom_node.audit.chain import Head, file_names, parse_line
from dicom_node.audit.verify import Position, read_anchor, verify, write_anchor

__all__ = ["TrailWatch"]

log = logging.getLogger(__name__)

LOOK_S = 5.0
LOGGED_S = 3600.0
UNREADABLE = 3  # looks in a row that failed; then it counts as not whole, until one succeeds


class TrailWatch:
    """One thread. It begins with the newest file; `dicom-node audit verify` reads all of them."""

    def __init__(self, folder: Path, anchor: Path, *, look_s: float = LOOK_S) -> None:
        self._folder, self._anchor, self._look_s = folder, anchor, look_s
        self._position: Position | None = None
        self._logged_s = -LOGGED_S
        self._was_changed = False
        self._unreadable = 0
        self.sequence = 0
        """The last line there is."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-watch", daemon=True)

    @property
    def is_whole(self) -> bool:
        """Whether all that was looked at is what was written, and it can be looked at."""
        return not self._was_changed and self._unreadable < UNREADABLE

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """One last look. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._look_s):
            self.tick()
        self.tick(is_last=True)

    def tick(self, *, is_last: bool = False) -> None:
        """`look`, and note where it cannot. Raises nothing that a disk does."""
        try:
            self.look(is_last=is_last)
            self._unreadable = 0
        except OSError as exc:
            self._unreadable += 1
            if self._unreadable in (1, UNREADABLE):
                log.error("the audit trail cannot be read", extra={"error": exc.strerror or type(exc).__name__})

    def look(self, *, is_last: bool = False) -> None:
        """Verify what came since the last look, and keep its head. Raises OSError."""
        if self._was_changed:
            return  # it was told; a person must look, and a new head would hide it
        if self._position is None and not self._begin():
            return
        anchor = read_anchor(self._anchor)
        report = verify(self._folder, [anchor] if anchor else [], start=self._position)
        if report.faults:
            self._was_changed = True
            for fault in report.faults:
                log.critical("the audit trail was changed", extra={"fault": str(fault)})
            return
        if report.end is None:
            return
        moved = report.end != self._position
        self._position, self.sequence = report.end, report.end.head.sequence
        if moved:
            self._sync(report.end.file)  # or after a power cut lines would seem to be gone
            write_anchor(self._anchor, report.end.head)
        if is_last or time.monotonic() - self._logged_s >= LOGGED_S:
            self._logged_s = time.monotonic()
            log.info("audit trail", extra={"head": f"{self.sequence}:{report.end.head.hash}"})

    def _sync(self, name: str) -> None:
        fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _begin(self) -> bool:
        """Start where the newest file but two ends, whose last line is taken as it is. False while there is nothing."""
        names = file_names(self._folder) if self._folder.is_dir() else []
        if len(names) > 2:
            self._position = _end_of(self._folder, names[-3])
        return bool(names) or read_anchor(self._anchor) is not None


def _end_of(folder: Path, name: str) -> Position | None:
    """The last line of a file; None where it has none."""
    offset, number, head = 0, 0, None
    with open(folder / name, "rb") as file:
        for line in file:
            offset, number = offset + len(line), number + 1
            if (found := parse_line(line)) is not None:
                head = Head(found[0], found[2])
    return Position(name, number, offset, head) if head is not None else None
