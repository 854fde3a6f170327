"""From the local trail to one collector: the files are the spool, with a position kept for each collector.

Syslog acknowledges nothing. A position moves on when its message has left this machine and the connection was still
there `SETTLE_S` later; when it breaks, everything after the position is sent again: at least once, in order, told apart
by the sequence number. What a collector's own machine loses after that, its gap in the numbers shows.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dicom_node.audit.chain import file_names, parse_head, parse_line
from dicom_node.audit.syslog import Connection, syslog_message
from dicom_node.audit.trail import SilentTrailObserver, TrailObserver
from dicom_node.errors import NodeError

__all__ = ["Forwarder", "Place", "read_place"]

log = logging.getLogger(__name__)

LOOK_S = 0.5
SETTLE_S = 2.0
BACKOFF_S = 1.0
BACKOFF_MAX_S = 60.0
BATCH_BYTES = 256 * 1024
MAX_UNSETTLED = 5000
_COMPLAIN_S = 300.0


@dataclass(frozen=True, slots=True)
class Place:
    """The end of a line in the trail: in which file, at which byte, and its sequence number."""

    file: str = ""
    offset: int = 0
    sequence: int = 0


def read_place(path: Path) -> Place:
    """The place that was kept; the beginning when none was, or it cannot be read: rather twice than never."""
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
        return Place(str(kept["file"]), int(kept["offset"]), int(kept["sequence"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Place()


class Forwarder:
    """Sends the trail in `folder` to one collector, on a thread of its own, from where it was when it last ran."""

    def __init__(
        self,
        name: str,
        folder: Path,
        connect: Callable[[], Connection],
        *,
        observe: TrailObserver | None = None,
        hostname: str = "",
        settle_s: float = SETTLE_S,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        self._name, self._folder, self._connect = name, folder, connect
        self._observe = observe or SilentTrailObserver()
        self._hostname = _hostname(hostname)
        self._settle_s, self._first_backoff_s = settle_s, backoff_s
        self._path = folder / f"position-{name}.json"
        self._kept = read_place(self._path)
        self._sent = self._kept
        self._unsettled: deque[tuple[float, Place]] = deque()
        self._connection: Connection | None = None
        self._complained_s = -_COMPLAIN_S
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"audit-{name}", daemon=True)
        self.is_up = True
        """Whether the last try got through, or none was made."""

    @property
    def sequence(self) -> int:
        """The last line that needs not be sent again."""
        return self._kept.sequence

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop; what is not settled is sent again after the next start. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff_s = self._first_backoff_s
        while not self._stopping.is_set():
            try:
                busy = self._step()
                self.is_up, backoff_s = True, self._first_backoff_s
                if not busy:
                    self._stopping.wait(LOOK_S)
            except (OSError, NodeError) as exc:
                self._broken(exc)
                self._stopping.wait(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
            except Exception as exc:  # edge: the thread's loop; the next try begins at the kept place
                log.error("sending the audit trail stumbled", extra={"collector": self._name}, exc_info=exc)
                self._broken(OSError("unforeseen"))
                self._stopping.wait(BACKOFF_MAX_S)
        if self._connection is not None:
            with suppress(OSError):
                self._settle()
            self._connection.close()

    def _broken(self, exc: Exception) -> None:
        self.is_up = False
        self._observe.audit_failed(self._name)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._sent = self._kept
        self._unsettled.clear()
        if time.monotonic() - self._complained_s >= _COMPLAIN_S:
            self._complained_s = time.monotonic()
            why = str(exc) if isinstance(exc, NodeError) else getattr(exc, "strerror", None) or type(exc).__name__
            log.error("an audit collector cannot be reached", extra={"collector": self._name, "error": why})

    def _step(self) -> bool:
        """Send what comes next; whether there was something. Raises OSError, NodeError."""
        if self._connection is None:
            # also when nothing waits: who asks whether the collector is there wants to know before something does
            self._connection = self._connect()
        self._settle()
        if len(self._unsettled) >= MAX_UNSETTLED:
            return False
        found, messages, size = self._sent, [], 0
        while size < BATCH_BYTES:
            lines, found = self._read(found, BATCH_BYTES - size)
            if not lines:
                break
            messages += lines
            size += sum(map(len, lines))
        if messages:
            self._connection.send(messages)
        if found != self._sent:
            self._sent = found
            self._unsettled.append((time.monotonic(), found))
        return bool(messages)

    def _settle(self) -> None:
        assert self._connection is not None
        if not self._connection.check():
            return
        settled, now_s = None, time.monotonic()
        while self._unsettled and now_s - self._unsettled[0][0] >= self._settle_s:
            settled = self._unsettled.popleft()[1]
        if settled is not None:
            self._keep(settled)

    def _keep(self, place: Place) -> None:
        self._kept = place
        temporary = self._path.with_suffix(".tmp")
        text = json.dumps({"file": place.file, "offset": place.offset, "sequence": place.sequence})
        temporary.write_text(text, encoding="ascii")  # not synced: an older place only sends some again
        temporary.replace(self._path)

    def _read(self, place: Place, most: int) -> tuple[list[bytes], Place]:
        """Messages of the lines after `place` that are whole, of one file, and where they end."""
        try:
            known = file_names(self._folder)
            names = [name for name in known if name >= place.file]
            if known and (not names or (names[0] == place.file and self._is_shorter(place))):
                # the trail was begun anew, or is an older copy: rather all of it twice than some of it never
                log.error("the audit trail is not the one that was sent", extra={"collector": self._name})
                names, place = known, Place()
            for name in names:
                offset = place.offset if name == place.file else 0
                lines, end, sequence = self._lines(name, offset, most)
                if end > offset:
                    self._miss(place, sequence - len(lines))
                    place = Place(name, end, sequence or place.sequence)
                if lines:
                    return lines, place
        except FileNotFoundError:  # nothing was recorded yet, or a file was moved away just now
            return [], place
        return [], place

    def _is_shorter(self, place: Place) -> bool:
        return (self._folder / place.file).stat().st_size < place.offset

    def _miss(self, place: Place, before: int) -> None:
        """Say which lines were moved away before they were sent; the collector sees the gap in their numbers."""
        if place.sequence and before > place.sequence:
            gone = {"collector": self._name, "first": place.sequence + 1, "last": before}
            log.error("lines of the audit trail were moved away before the collector had them", extra=gone)

    def _lines(self, name: str, offset: int, most: int) -> tuple[list[bytes], int, int]:
        messages, sequence, size = [], 0, 0
        with open(self._folder / name, "rb") as file:
            file.seek(offset)
            while size < most and (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                size += len(line)
                if (found := parse_line(line)) is not None:
                    sequence, at, _, message = found
                    messages.append(syslog_message(sequence, at, message, self._hostname))
                elif parse_head(line) is None:
                    log.error("a line of the audit trail cannot be sent: run `dicom-node audit verify`")
        return messages, offset, sequence


def _hostname(given: str) -> str:
    """As RFC 5424 6.2.4 has it: printable ASCII, at most 255; "-" where there is none."""
    name = given or socket.gethostname()
    return name if name and name.isascii() and name.isprintable() and " " not in name and len(name) <= 255 else "-"
