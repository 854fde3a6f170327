"""The audit trail on disk: files of lines, each with the hash of the one before, appended to by every process.

    file    audit-SEQUENCE.log, named after its first line; a head, then lines
    head    "dicom-node-audit-1 SEQUENCE HASH\\n": the sequence number of its first line, the hash of the line before
    line    "SEQUENCE TIME HASH MESSAGE\\n"; HASH is SHA-256 of "HASH-BEFORE SEQUENCE TIME MESSAGE", hexadecimal

One chain, one order, one file at a time: whoever writes takes a lock (`flock`), looks whether the end is where it was
left, and reads the last line where it is not. The lock is held for one write and never over a sync, and a process that
is stopped holding it costs the others messages in memory, not their work (`trail`). A file for each process would need
no lock, but a verifier would have to know which processes there were: a file that is gone would not be missed.

What a crash leaves is a last line without its end. It was not yet told to anybody, is cut off before the next line is
written, and reported. Everything else that does not fit is left as it is, for `verify` to find.

Whoever moves files away moves them under the hands of writers: a file and the lock are known by what they are, not by
their name, and a chain whose end was taken away goes on after the last line this process knows of, so that what was
taken shows as a gap and fits again when it is brought back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ZERO", "Chain", "Head", "chained", "file_names", "parse_head", "parse_line"]

ZERO = "0" * 64
_HEAD = re.compile(rb"dicom-node-audit-1 ([1-9]\d{0,18}) ([0-9a-f]{64})\n")
_LINE = re.compile(rb"([1-9]\d{0,18}) (\S{1,40}) ([0-9a-f]{64}) (<[^\n]*>)\n")
_TAIL = 128 * 1024  # at first looked through for the last line
LOCK_S = 2.0
_PAUSE_S = 0.002


@dataclass(frozen=True, slots=True)
class Head:
    """How far a chain has come: its last line's number and hash; 0 and zeros before the first."""

    sequence: int = 0
    hash: str = ZERO


def chained(before: str, sequence: int, at: str, message: bytes) -> str:
    """The hash of a line."""
    return hashlib.sha256(b"%s %d %s " % (before.encode(), sequence, at.encode()) + message).hexdigest()


def parse_head(line: bytes) -> Head | None:
    """What a file's first line says of the line before it; None for what is no head."""
    found = _HEAD.fullmatch(line)
    return Head(int(found[1]) - 1, found[2].decode()) if found else None


def parse_line(line: bytes) -> tuple[int, str, str, bytes] | None:
    """Sequence number, time, hash and message; None for what is no line."""
    found = _LINE.fullmatch(line)
    return (int(found[1]), found[2].decode("latin-1"), found[3].decode(), found[4]) if found else None


def _is_same(fd: int, path: Path) -> bool:
    """Whether what is open is what has that name now."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (named.st_dev, named.st_ino)


def file_names(folder: Path) -> list[str]:
    """The files of the chain, oldest first."""
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"audit-\d{12}\.log", name))


class Chain:
    """Appends to the chain in `folder`. Of one process, used by one thread; others may append to the same folder.

    Raises OSError for everything that keeps lines from being written. TimeoutError: another process holds the lock.
    """

    def __init__(self, folder: Path, *, file_bytes: int, known: Head | None = None) -> None:
        """`known`: the last line that this process wrote there before."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._file_bytes = folder, file_bytes
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file, self._name, self._end = -1, "", -1
        self._head = known or Head()
        self.healed: list[str] = []
        """What was found and mended of a crash, or found and left, since this was last emptied; constant words."""

    @property
    def head(self) -> Head:
        """How far the chain had come when this process last wrote."""
        return self._head

    def append(self, messages: Sequence[tuple[str, bytes]], lock_s: float = LOCK_S) -> int:
        """Write lines of (time, message); how many were written: all, or those that the disk still took, at least one.

        A whole line is never taken back: whoever reads the file may have seen it.
        """
        with self._locked(lock_s):
            self._find_end()
            if self._end >= self._file_bytes:
                self._begin_file(self._head)
            head, heads, lines = self._head, [], []
            for at, message in messages:
                sequence = head.sequence + 1
                head = Head(sequence, chained(head.hash, sequence, at, message))
                heads.append(head)
                lines.append(b"%d %s %s %s\n" % (sequence, at.encode(), head.hash.encode(), message))
            count = self._write(b"".join(lines))
            self._head = heads[count - 1]
        return count

    def sync(self) -> bool:
        """Make what was written survive a power cut; False: no file is open."""
        if self._file < 0:
            return False
        os.fdatasync(self._file)
        return True

    def close(self) -> None:
        """Give back the descriptors. Idempotent."""
        for fd in (self._file, self._lock):
            if fd >= 0:
                os.close(fd)
        self._file = self._lock = -1

    @contextmanager
    def _locked(self, lock_s: float) -> Iterator[None]:
        deadline = time.monotonic() + lock_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError("another process holds the audit trail's lock") from None
                time.sleep(_PAUSE_S)
        try:
            if not _is_same(self._lock, self._folder / "lock"):
                raise OSError(errno.ESTALE, "the audit trail's folder is another one now")
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _write(self, data: bytes) -> int:
        """How many lines of it were written, at least one. Raises OSError."""
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, memoryview(data)[done:])
        except OSError:
            whole = data.rfind(b"\n", 0, done) + 1
            os.ftruncate(self._file, self._end + whole)  # half a line is nobody's
            if not whole:
                raise
            data = data[:whole]
        self._end += len(data)
        return data.count(b"\n")

    # --- where the chain ends

    def _find_end(self) -> None:
        """Open the last file, unless it is the one that is open and nobody has written to it since."""
        names = file_names(self._folder)
        if not names:
            if self._head.sequence:
                self.healed.append(f"every file is gone; it goes on after line {self._head.sequence} in a new one")
            self._begin_file(self._head)
            return
        is_open = names[-1] == self._name and _is_same(self._file, self._folder / self._name)
        if is_open and os.fstat(self._file).st_size == self._end:
            return
        known = self._head
        if not is_open:
            self._open(names[-1])
        self._read_end()
        if self._head.sequence < known.sequence:
            what = f"lines {self._head.sequence + 1} to {known.sequence} are gone; it goes on after them in a new file"
            self.healed.append(what)
            self._begin_file(known)

    def _open(self, name: str, flags: int = 0) -> None:
        fd = os.open(self._folder / name, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
        if self._file >= 0:
            os.fdatasync(self._file)
            os.close(self._file)
        self._file, self._name, self._end = fd, name, 0

    def _begin_file(self, head: Head) -> None:
        self._open(f"audit-{head.sequence + 1:012d}.log", os.O_CREAT | os.O_EXCL)
        try:
            self._write(b"dicom-node-audit-1 %d %s\n" % (head.sequence + 1, head.hash.encode()))
        except OSError:
            self._name = ""  # a file without its head: the next look begins it again
            raise
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(self._file)
            os.fsync(folder)
        finally:
            os.close(folder)
        self._head = head

    def _read_end(self) -> None:
        size = os.fstat(self._file).st_size
        span = _TAIL
        while True:
            start = max(size - span, 0)
            tail = os.pread(self._file, size - start, start)
            whole = tail.rfind(b"\n") + 1
            before = tail.rfind(b"\n", 0, max(whole - 1, 0)) + 1
            if start == 0 or (whole and before):
                break
            span *= 8
        if whole < len(tail):
            os.ftruncate(self._file, start + whole)
            self.healed.append(f"the last line had no end: {len(tail) - whole} bytes that a crash left were cut off")
        self._end = start + whole
        line = tail[before:whole]
        if (found := parse_line(line)) is not None:
            self._head = Head(found[0], found[2])
        elif start + before == 0 and (head := parse_head(line)) is not None:
            self._head = head
        elif self._end == 0:  # a crash between the file and its head
            self._begin_again()
        else:
            self._go_on_after_damage()

    def _begin_again(self) -> None:
        """The last file is empty: the one before says how the chain goes on."""
        os.unlink(self._folder / self._name)
        os.close(self._file)
        self._file, self._name, self._end = -1, "", -1
        self._find_end()

    def _go_on_after_damage(self) -> None:
        """The last line is none: what can be read last goes on in a new file. `verify` names the damage."""
        last = Head()
        with open(self._folder / self._name, "rb") as file:
            for line in file:
                if (found := parse_line(line)) is not None:
                    last = Head(found[0], found[2])
                elif (head := parse_head(line)) is not None:
                    last = head
        self.healed.append(f"{self._name} ends with what is no line of the audit trail; it goes on in a new file")
        if f"audit-{last.sequence + 1:012d}.log" == self._name:  # nothing of it can be read
            last = Head(last.sequence + 1, last.hash)
        self._begin_file(last)
