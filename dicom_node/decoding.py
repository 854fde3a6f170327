"""Pixel data that is not native is decoded by a few processes of their own (`decoder`), by all cores at a time.

A JPEG 2000 slice takes 40 ms with the GIL held: in the work process one core would do all slices, and every other
thread would wait. And what crashes, hangs or exhausts memory is a decoder process, not the node. The processes start
when they are first needed and end with the process that asks.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dicom_node.decoder_link import Cells, Decoder, DecoderGone, DecoderLimits, Frames, readable
from dicom_node.errors import EngineUnavailable, SeriesRejected

__all__ = ["DecoderPool", "close_decoders", "decoders", "use_decoders"]

log = logging.getLogger(__name__)

_MOST = 4  # processes, where their number is left to the machine
_POLL_S = 0.25  # how often those who wait beat
_TRIES = 2  # somebody else may have killed the process: only what it dies of twice is at fault
_MAX_FLIGHT_BYTES = 512 * 1024**2  # of one asker's requests under way, if there are several


@dataclass(slots=True, eq=False)
class _Asker:
    """What one caller of `decode` has not had yet."""

    works: Sequence[Frames]
    pending: deque[int]
    busy: dict[Decoder, int] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)

    def has_room(self) -> bool:
        """Whether the next request may be under way beside those that are."""
        flight = sum(self.works[k].nbytes for k in (*self.busy.values(), self.pending[0]))
        return not self.busy or flight <= _MAX_FLIGHT_BYTES


class DecoderPool:
    """At most `size` decoder processes, started as they are needed. Thread-safe: askers take turns."""

    def __init__(self, size: int, limits: DecoderLimits | None = None) -> None:
        self._size, self._limits = size, limits or DecoderLimits()
        self._freed = threading.Condition()
        self._all: set[Decoder] = set()
        self._free: list[Decoder] = []
        self._line: deque[_Asker] = deque()  # those who have no process, in the order they came
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Ids of the processes there are now."""
        with self._freed:
            return [decoder.process.pid for decoder in self._all]

    def decode(
        self, works: Sequence[Frames], heartbeat: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Cells]]:
        """The cells of each request with its index, in the order they are done. `heartbeat` is called while waiting.

        Raises SeriesRejected for pixel data that cannot be decoded, kill the decoder or take it beyond its limits,
        EngineUnavailable when processes cannot be started or the pool is closed, and what `heartbeat` raises.
        """
        asker = _Asker(works, deque(range(len(works))))
        try:
            while asker.pending or asker.busy:
                self._hand_out(asker)
                done = self._taken_in(asker)
                self._hand_out(asker)  # they go on while the asker uses what is done
                yield from done
                if heartbeat is not None and not done:
                    heartbeat()
        finally:
            self._leave(asker)

    def close(self) -> None:
        """End every process; who waits for one is told. Idempotent."""
        with self._freed:
            self._closed = True
            free, lent = self._free, self._all.difference(self._free)
            self._free, self._all = [], set()
            self._freed.notify_all()
        for decoder in lent:  # their askers bury them
            decoder.process.kill()
            decoder.process.wait(timeout=30.0)
        for decoder in free:
            decoder.bury()

    # --- one asker

    def _hand_out(self, asker: _Asker) -> None:
        """Requests for every process to be had; waits a moment for one when the asker has none."""
        while asker.pending and asker.has_room() and (decoder := self._borrowed(asker)) is not None:
            k = asker.pending.popleft()
            asker.busy[decoder] = k
            try:
                decoder.ask(asker.works[k])
            except DecoderGone as gone:
                self._died(asker, decoder, gone)

    def _taken_in(self, asker: _Asker) -> list[tuple[int, Cells]]:
        if not asker.busy:
            return []
        readable([decoder.link for decoder in asker.busy], _POLL_S)
        done = []
        for decoder, k in list(asker.busy.items()):
            try:
                cells = decoder.answer()
            except DecoderGone as gone:
                self._died(asker, decoder, gone)
                continue
            if cells is not None:
                del asker.busy[decoder]
                self._give_back(decoder)
                done.append((k, cells))
        return done

    def _died(self, asker: _Asker, decoder: Decoder, gone: DecoderGone) -> None:
        """Try again in another process what may not be at fault; raise for what is."""
        k = asker.busy.pop(decoder)
        self._lose(decoder)
        if self._closed:
            raise EngineUnavailable("the decoders are closed")
        log.warning("a decoder process is gone", extra={"decoder_pid": decoder.process.pid, "how": str(gone)})
        if not gone.ready:
            raise EngineUnavailable(f"a decoder process does not start: it {gone}")
        asker.deaths[k] += 1
        if gone.blame or (gone.crashed and asker.deaths[k] >= _TRIES):
            raise SeriesRejected(f"pixel data ({asker.works[k].name}) cannot be decoded: the decoder {gone}")
        if asker.deaths[k] >= _TRIES:  # somebody ends them, such as a system out of memory: not the image's fault
            raise EngineUnavailable(f"decoder processes do not live: one {gone}")
        asker.pending.appendleft(k)

    def _leave(self, asker: _Asker) -> None:
        with self._freed:
            if asker in self._line:
                self._line.remove(asker)
            self._freed.notify_all()
        for decoder in asker.busy:
            if decoder.quiet():
                self._give_back(decoder)
            else:
                decoder.bury()
                self._lose(decoder)

    # --- processes

    def _borrowed(self, asker: _Asker) -> Decoder | None:
        """A process that is free, or one more. None, at once for who has one already: there is none, or others wait."""
        with self._freed:
            if self._closed:
                raise EngineUnavailable("the decoders are closed")
            if not asker.busy and asker not in self._line:
                self._line.append(asker)
            decoder = None if self._line and self._line[0] is not asker else self._free_or_new()
            if decoder is None:
                if not asker.busy:
                    self._freed.wait(_POLL_S)
                return None
            if self._line:
                self._line.popleft()
                self._freed.notify_all()  # the next in line may find another one
            return decoder

    def _free_or_new(self) -> Decoder | None:
        while self._free:
            decoder = self._free.pop()
            if decoder.process.poll() is None:
                return decoder
            decoder.bury()
            self._all.discard(decoder)
        if len(self._all) >= self._size:
            return None
        decoder = Decoder(self._limits)
        self._all.add(decoder)
        log.info("decoder process started", extra={"decoder_pid": decoder.process.pid})
        return decoder

    def _give_back(self, decoder: Decoder) -> None:
        with self._freed:
            if not self._closed:
                self._free.append(decoder)
                self._freed.notify_all()
                return
        decoder.bury()

    def _lose(self, decoder: Decoder) -> None:
        with self._freed:
            self._all.discard(decoder)
            self._freed.notify_all()


# --- the pool of this process

_guard = threading.Lock()
_pool: DecoderPool | None = None
_count = 0


def use_decoders(count: int) -> None:
    """How many processes this process has at most, 0: one for each core, at most 4. To be called before the first."""
    global _count
    with _guard:
        _count = count


def decoders() -> DecoderPool:
    """The pool of this process, made when first asked for; closed at its exit at the latest."""
    global _pool
    with _guard:
        if _pool is None:
            _pool = DecoderPool(_count or min(len(os.sched_getaffinity(0)), _MOST))
            atexit.register(close_decoders)
        return _pool


def close_decoders() -> None:
    """End the processes; the next use starts anew. Idempotent."""
    global _pool
    with _guard:
        pool, _pool = _pool, None
    atexit.unregister(close_decoders)
    if pool is not None:
        pool.close()
