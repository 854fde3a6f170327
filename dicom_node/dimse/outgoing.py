"""Stored data sets on their way out: read from the file straight into PDUs whose heads are there already.

One read and one write carry an object of up to a MiB, whatever PDU length the peer asked for. Pure but for reading
files; a `StoredDataSet` is used from one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from dicom_node.dimse.upper_layer.connection import data_header

__all__ = ["TEMPLATES", "ShortFile", "StoredDataSet", "Template"]

CHUNK = 1024 * 1024  # of one read and one write
MOST_PDUS = 1000  # in one read: below IOV_MAX of every system
KEPT = 8
_HEAD = len(data_header(1, is_command=False, last=False, length=0))


class ShortFile(OSError):
    """A stored file ends before the data set does that the index says is in it."""


class StoredDataSet:
    """The `length` bytes at `offset` of a file, to be sent once: as `link.Fragments`, or as PDUs that are ready.

    The file is open from the beginning: one that takes its place under its name meanwhile changes nothing. Raises
    OSError when it cannot be opened or read, ShortFile when it is not as long as that.
    """

    def __init__(self, path: str, offset: int, length: int) -> None:
        self._ready: tuple[Template, memoryview] | None = None
        self._position, self.left = offset, length
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if length < 0 or os.fstat(self._fd).st_size < offset + length:
                raise ShortFile("the file is shorter than its index entry says")
            if length > CHUNK:
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __iter__(self) -> Iterator[memoryview]:
        """The bytes, for a wire that makes its own PDUs, and may keep a piece until it has the next."""
        while self.left:
            piece = memoryview(bytearray(min(CHUNK, self.left)))
            self.read_into([piece], len(piece))
            yield piece

    def read_ahead(self, template: Template, context_id: int) -> None:
        """Read what the first write carries; nothing else may fill `template` before it is sent. Raises OSError."""
        self._ready = template, template.fill(context_id, self)

    def pdus(self, context_id: int) -> Iterator[memoryview]:
        """After `read_ahead` for that context: P-DATA-TF PDUs that carry it, many at once, for one write each.

        The last of all says that it is. Each view is good until the next one. Raises OSError.
        """
        assert self._ready is not None
        template, first = self._ready
        yield first
        while self.left:
            yield template.fill(context_id, self)

    def read_into(self, parts: Sequence[memoryview], length: int) -> None:
        """Fill `parts`, which have room for `length` bytes together. Raises OSError, ShortFile."""
        read = os.preadv(self._fd, parts, self._position)
        if read != length:
            self._read_rest(parts, read)
        self._position += length
        self.left -= length

    def _read_rest(self, parts: Sequence[memoryview], done: int) -> None:
        """The rest of a read that ended early, part by part."""
        position = self._position
        for part in parts:
            skipped = min(done, len(part))
            done -= skipped
            while skipped < len(part):
                read = os.preadv(self._fd, [part[skipped:]], position + skipped)
                if not read:
                    raise ShortFile("the file became shorter while it was read")
                skipped += read
            position += len(part)


class Template:
    """Room for P-DATA-TF PDUs of one length, one value in each, whose heads are in place: only contents are missing."""

    def __init__(self, pdu_bytes: int) -> None:
        self.pdu_bytes = pdu_bytes
        self._size = pdu_bytes - (_HEAD - 6)  # of a value's content
        self._stride = _HEAD + self._size
        count = max(1, min(MOST_PDUS, CHUNK // self._stride))
        self._capacity = count * self._size
        self._bytes = memoryview(bytearray(count * self._stride))
        starts = range(0, count * self._stride, self._stride)
        self._contents = [self._bytes[start + _HEAD : start + self._stride] for start in starts]
        self._context_id = 0
        self._changed: int | None = None  # which PDU has the head of a last one

    def fill(self, context_id: int, data_set: StoredDataSet) -> memoryview:
        """The next PDUs of `data_set`, as many as fit. Raises OSError."""
        self._set_heads(context_id)
        length = min(data_set.left, self._capacity)
        whole, rest = divmod(length, self._size)
        contents = self._contents[:whole]
        if rest:
            contents.append(self._contents[whole][:rest])
        if length:
            data_set.read_into(contents, length)
        if data_set.left:
            return self._bytes
        self._changed = last = max(len(contents) - 1, 0)
        content = len(contents[-1]) if contents else 0
        start = last * self._stride
        self._put_head(last, context_id, last=True, length=content)
        return self._bytes[: start + _HEAD + content]

    def _set_heads(self, context_id: int) -> None:
        if context_id != self._context_id:
            for number in range(len(self._contents)):
                self._put_head(number, context_id, last=False, length=self._size)
            self._context_id = context_id
        elif self._changed is not None:
            self._put_head(self._changed, context_id, last=False, length=self._size)
        self._changed = None

    def _put_head(self, number: int, context_id: int, *, last: bool, length: int) -> None:
        start = number * self._stride
        self._bytes[start : start + _HEAD] = data_header(context_id, is_command=False, last=last, length=length)


class Templates:
    """Templates that are used again, whoever needed them last."""

    def __init__(self) -> None:
        self._free: list[Template] = []
        self._guard = threading.Lock()

    def take(self, pdu_bytes: int) -> Template:
        """One for P-DATA-TF PDUs of at most `pdu_bytes` (PS3.8 D.1)."""
        with self._guard:
            for number in range(len(self._free) - 1, -1, -1):
                if self._free[number].pdu_bytes == pdu_bytes:
                    return self._free.pop(number)
        return Template(pdu_bytes)

    def give_back(self, template: Template) -> None:
        """It may be used again; the one nobody wanted for longest makes room."""
        with self._guard:
            self._free.append(template)
            if len(self._free) > KEPT:
                del self._free[0]


TEMPLATES = Templates()
