"""Whether the audit trail is whole: every line in its place, none changed, none gone.

The hash of each line covers the line before, so a line that was changed, taken out, put in or moved does not fit. Lines
that are gone from the end leave a chain that fits; so the head is kept elsewhere too (an anchor), and a chain that is
shorter than its anchor, or goes another way there, was changed. Whoever can write the files *and* the anchors can make
a trail that fits: heads are also logged and every message goes to the collectors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dicom_node.audit.chain import Head, chained, file_names, parse_head, parse_line

__all__ = ["Fault", "Position", "Report", "read_anchor", "verify", "write_anchor"]

MAX_FAULTS = 20  # then it is known
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and where; `line` 1 is the head of the file."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}" if self.file else self.what


@dataclass(frozen=True, slots=True)
class Position:
    """The end of a line that is verified."""

    file: str
    line: int
    offset: int
    head: Head


@dataclass(slots=True)
class Report:
    """What a verification found."""

    lines: int = 0
    files: int = 0
    first: int = 0
    end: Position | None = None
    faults: list[Fault] = field(default_factory=list)
    unfinished_bytes: int = 0
    """Of a last line without its end: a crash left them, or it is being written."""


def verify(folder: Path, anchors: Sequence[Head] = (), *, start: Position | None = None) -> Report:
    """Read the chain from `start` (None: from its first file) and compare it with the anchors. Raises OSError.

    Older files may be moved away before and meanwhile; from `start` on, no line may be missing.
    """
    for _ in range(_LOOKS):
        with suppress(FileNotFoundError):  # one was moved away meanwhile: look anew
            return _verified(folder, anchors, start)
    return _verified(folder, anchors, start)


def _verified(folder: Path, anchors: Sequence[Head], start: Position | None) -> Report:
    report = Report(end=start)
    names = file_names(folder) if folder.is_dir() else []
    if start is not None:
        names = [name for name in names if name >= start.file]
        if not names:  # else the next file says whether it follows
            report.faults.append(Fault(start.file, start.line, "the file is gone, and none follows it"))
    hashes: dict[int, str] = {start.head.sequence: start.head.hash} if start is not None else {}
    wanted = {anchor.sequence for anchor in anchors}
    for name in names:
        report.files += 1
        for head in _read(folder, name, report, start, is_last=name == names[-1]):
            if head.sequence in wanted:
                hashes[head.sequence] = head.hash
        if len(report.faults) >= MAX_FAULTS:
            break
    if not report.faults:
        _compare(report, anchors, hashes)
    return report


def _compare(report: Report, anchors: Sequence[Head], hashes: dict[int, str]) -> None:
    end = report.end or Position("", 0, 0, Head())
    for anchor in anchors:
        if anchor.sequence > end.head.sequence:
            gone = anchor.sequence - end.head.sequence
            what = f"lines {end.head.sequence + 1} to {anchor.sequence} are gone: {gone} at the end of the trail"
            report.faults.append(Fault(end.file, end.line, what))
        elif hashes.get(anchor.sequence, anchor.hash) != anchor.hash:
            what = f"line {anchor.sequence} is not the one that was there: the trail was written anew"
            report.faults.append(Fault(end.file, end.line, what))


def _read(folder: Path, name: str, report: Report, start: Position | None, *, is_last: bool) -> Iterator[Head]:
    """Every line of one file that fits; what does not is a fault, and the chain goes on from what the line says."""
    resumed = start if start is not None and start.file == name else None
    with open(folder / name, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # what is written meanwhile is another time's
        number, offset = (resumed.line, resumed.offset) if resumed is not None else (0, 0)
        before = report.end.head if report.end is not None else None
        file.seek(offset)
        if offset > size:
            report.faults.append(Fault(name, number, "the file is shorter than it was: lines are gone from its end"))
            return
        while offset < size and len(report.faults) < MAX_FAULTS:
            line = file.readline()
            number += 1
            if not line.endswith(b"\n"):
                if is_last:
                    report.unfinished_bytes = len(line)
                else:
                    report.faults.append(Fault(name, number, "the line has no end, and files come after it"))
                return
            offset += len(line)
            head = _head_of(name, line, before, report) if number == 1 else _line_of(name, number, line, before, report)
            if head is None:
                continue
            before = head
            report.end = Position(name, number, offset, head)
            if number > 1:
                report.lines += 1
                report.first = report.first or head.sequence
                yield head


def _head_of(name: str, line: bytes, before: Head | None, report: Report) -> Head | None:
    head = parse_head(line)
    if head is None:
        report.faults.append(Fault(name, 1, "the file does not begin as a file of the audit trail does"))
        return None
    if name != f"audit-{head.sequence + 1:012d}.log":
        report.faults.append(Fault(name, 1, f"the file begins with line {head.sequence + 1} and has another name"))
    if before is None:
        if head.sequence == 0 and head != Head():
            report.faults.append(Fault(name, 1, "the first file must follow nothing"))
    elif head.sequence != before.sequence:
        gap = f"line {before.sequence + 1} must follow and {head.sequence + 1} does"
        report.faults.append(Fault(name, 1, f"{gap}: lines or a file are missing, or one is there twice"))
    elif head.hash != before.hash:
        report.faults.append(Fault(name, 1, "the file does not follow the one before it: their hashes differ"))
    return head


def _line_of(name: str, number: int, line: bytes, before: Head | None, report: Report) -> Head | None:
    found = parse_line(line)
    if found is None:
        report.faults.append(Fault(name, number, "this is no line of the audit trail"))
        return None
    sequence, at, own_hash, message = found
    if before is not None and sequence != before.sequence + 1:
        what = f"line {before.sequence + 1} must stand here and {sequence} does: one was taken out, put in or moved"
        report.faults.append(Fault(name, number, what))
    elif before is not None and chained(before.hash, sequence, at, message) != own_hash:
        what = f"line {sequence} is not what was written: its hash does not fit"
        report.faults.append(Fault(name, number, what))
    return Head(sequence, own_hash)


# --- the anchor


def read_anchor(path: Path) -> Head | None:
    """The head that was kept last; None when none was, or it cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
        return Head(int(kept["sequence"]), str(kept["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_anchor(path: Path, head: Head) -> None:
    """Keep `head`, replaced whole, unless a later one is kept. Raises OSError."""
    known = read_anchor(path)
    if known is not None and known.sequence >= head.sequence:
        return
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump({"sequence": head.sequence, "hash": head.hash}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
