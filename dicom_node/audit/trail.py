"""Takes events from any thread and writes them behind their backs (`auditing.AuditTrail`).

`record` puts the event into a bounded queue and returns. One thread makes the messages and appends them to the chain, a
batch at a time, and syncs at most once a second: a power cut costs that second, a kill -9 what came in the last
`BATCH_S`. Whoever must not go on before an event is on the disk waits for it (`settled`), and it is synced at once.
Where the file cannot be written events wait in memory, are tried again every second, and what comes beyond the bound is
lost, counted, logged, and told in the trail itself as soon as it can be written.

Alerts of the same kind from the same place and user are told once and then counted: one message a minute says how many
more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from dicom_node.audit.chain import LOCK_S, Chain, Head
from dicom_node.audit.message import Identity, audit_message
from dicom_node.auditing import AlertType, AuditEvent, AuditKind, AuditOutcome
from dicom_node.errors import NodeError
from dicom_node.interfaces import Clock

__all__ = ["FileTrail", "Floods", "SilentTrailObserver", "TrailObserver"]

log = logging.getLogger(__name__)

BATCH_S = 0.05  # events gather for so long
BATCH = 500
SYNC_S = 1.0
RETRY_S = 1.0
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 32 << 20  # of queries in them
FLOOD_S = 60.0
MAX_FLOODS = 64  # told apart; all others are counted together
MAX_FLOODS_OF_HOST = 16  # so that one place cannot hide the others
SETTLE_S = 5.0
_COMPLAIN_S = 60.0


class TrailObserver(Protocol):
    """Counters; called from any thread."""

    def audit_recorded(self, kind: str, outcome: int) -> None:
        """One message was written."""
        ...

    def audit_failed(self, sink: str) -> None:
        """A try to write or to send failed; `sink`: file, or the name of a collector."""
        ...

    def audit_lost(self, messages: int) -> None:
        """So many events were given up: the file could not be written for too long."""
        ...


class SilentTrailObserver:
    """Counts nothing (`TrailObserver`)."""

    def audit_recorded(self, kind: str, outcome: int) -> None:
        """Nothing."""

    def audit_failed(self, sink: str) -> None:
        """Nothing."""

    def audit_lost(self, messages: int) -> None:
        """Nothing."""


@dataclass(slots=True)
class _Flood:
    event: AuditEvent
    until_s: float
    more: int = 0


class Floods:
    """Which of many equal alerts are told. Used by one thread at a time."""

    def __init__(self, window_s: float = FLOOD_S) -> None:
        self._window_s = window_s
        self._floods: dict[tuple[str, str, str, str], _Flood] = {}

    @staticmethod
    def concerns(event: AuditEvent) -> bool:
        """Whether it is of a kind that anybody who reaches a port can cause at will."""
        return event.kind is AuditKind.SECURITY_ALERT or (
            event.kind is AuditKind.USER_AUTHENTICATED and event.outcome > 0
        )

    def admit(self, event: AuditEvent, now_s: float) -> AuditEvent | None:
        """The event, or None where it is one more of the same."""
        kind = event.kind.value
        host, user = next(((one.host, one.user) for one in event.participants if not one.is_this_node), ("", ""))
        key = (kind, event.detail, host, user)
        flood = self._floods.get(key)
        if flood is None and sum(known[0] == kind and known[2] == host for known in self._floods) >= MAX_FLOODS_OF_HOST:
            key = (kind, "", host, "")
            flood = self._floods.get(key)
            if flood is None:
                place = tuple(replace(one, ae_title="", user="") for one in event.participants if not one.is_this_node)
                event = replace(event, detail="alerts of many kinds", participants=place)
        if flood is None and len(self._floods) >= MAX_FLOODS:
            key = (kind, "", "", "")
            flood = self._floods.get(key)
            if flood is None:
                event = replace(event, detail="alerts of many kinds or places", participants=())
        if flood is not None:
            flood.more += 1
            return None
        self._floods[key] = _Flood(event, now_s + self._window_s)
        return event

    def ended(self, now_s: float, *, all_of_them: bool = False) -> Iterator[AuditEvent]:
        """How many more there were, for each whose window is over."""
        for key, flood in list(self._floods.items()):
            if flood.until_s > now_s and not all_of_them:
                continue
            if not flood.more:
                del self._floods[key]
                continue
            text = f"{flood.event.detail}; and {flood.more:,} more of the same in {self._window_s:g} s"
            yield replace(flood.event, detail=text)
            flood.more, flood.until_s = 0, now_s + self._window_s


class FileTrail:
    """The trail of one process in the chain of `folder`. A context manager: closed at the end."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        clock: Clock,
        *,
        file_bytes: int,
        max_message_bytes: int,
        observe: TrailObserver | None = None,
        patient_ids: Callable[[Sequence[str]], Sequence[str]] | None = None,
        open_chain: Callable[[], Chain] | None = None,
    ) -> None:
        """`patient_ids` finds the patients of studies, where whoever told of these did not know them."""
        self._patient_ids = patient_ids
        self._identity, self._clock = identity, clock
        self._max_bytes = max_message_bytes
        self._observe = observe or SilentTrailObserver()
        self._open_chain = open_chain or (lambda: Chain(folder, file_bytes=file_bytes, known=self.head))
        self._chain: Chain | None = None
        self.head: Head | None = None
        """How far this process has written; None before it has."""
        self._guard = threading.Lock()
        self._events: deque[tuple[datetime, AuditEvent]] = deque()
        self._query_bytes = 0
        self._lost = self._lost_ever = 0
        self._taken = self._written = self._durable = 0  # events, since the start
        self._settled = threading.Condition(self._guard)  # `_durable` has grown, or never will
        self._hurried = self._is_over = False
        self._floods = Floods()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._waiting: list[tuple[str, bytes, AuditEvent]] = []  # made, not yet written
        self._synced_s = self._closed_by_s = 0.0
        self._complained_s = -_COMPLAIN_S
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def __enter__(self) -> FileTrail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, event: AuditEvent) -> None:
        """See `auditing.AuditTrail`."""
        with self._guard:
            if self._floods.concerns(event):
                admitted = self._floods.admit(event, time.monotonic())
                if admitted is None:
                    return
                event = admitted
            if len(self._events) >= MAX_WAITING or self._query_bytes > MAX_WAITING_BYTES or self._is_over:
                self._lost += 1
                self._lost_ever += 1
                if self._is_over:
                    self._observe.audit_lost(1)
                    log.error("an audit message came after the trail was closed", extra={"kind": event.kind.value})
                return
            self._put(event)
        if not self._wake.is_set():
            self._wake.set()

    def _put(self, event: AuditEvent) -> None:
        self._query_bytes += len(event.query)
        self._taken += 1
        self._events.append((self._clock.wall(), event))

    def settled(self, timeout_s: float = SETTLE_S) -> bool:
        """See `auditing.AuditTrail`."""
        deadline = time.monotonic() + timeout_s
        with self._guard:
            wanted, lost = self._taken, self._lost_ever
            if self._lost:
                return False
            if self._durable < wanted:
                self._hurried = True
                self._wake.set()
            while self._durable < wanted and not self._is_over and (left_s := deadline - time.monotonic()) > 0:
                self._settled.wait(left_s)
            return self._durable >= wanted and self._lost_ever == lost

    def close(self, timeout_s: float = 5.0) -> bool:
        """Write and sync what waits, within `timeout_s`; False: something was lost, which is logged. Idempotent."""
        if not self._stopping.is_set():
            self._closed_by_s = time.monotonic() + timeout_s
            self._stopping.set()
            self._wake.set()
        self._thread.join(timeout_s + LOCK_S)
        with self._guard:
            return self._is_over and self._durable >= self._taken and not self._lost

    # --- the thread

    def _run(self) -> None:
        pause_s = FLOOD_S / 4
        while True:
            self._wake.wait(pause_s)
            if not self._hurried:
                self._stopping.wait(BATCH_S)
            self._wake.clear()
            is_last = self._stopping.is_set()
            try:
                ok = self._write_all(is_last=is_last)
            except Exception as exc:  # edge: the thread's loop; what one event cannot be is not the others' loss
                log.error("the audit trail stumbled", exc_info=exc)
                ok = False
            if is_last and (ok or time.monotonic() >= self._closed_by_s):
                break
            pause_s = self._next_look_s() if ok else BATCH_S if is_last else RETRY_S
        self._end()
        if self._chain is not None:
            self._chain.close()

    def _next_look_s(self) -> float:
        return SYNC_S if self._durable < self._written else FLOOD_S / 4

    def _write_all(self, *, is_last: bool) -> bool:
        """Whether everything that waits was written."""
        self._gather(is_last=is_last)
        with self._guard:
            hurried, self._hurried = self._hurried, False
        while True:
            self._make()
            if not self._waiting:
                break
            if not self._write():
                return False
        return self._sync(now=is_last or hurried)

    def _gather(self, *, is_last: bool) -> None:
        with self._guard:
            for event in self._floods.ended(time.monotonic(), all_of_them=is_last):
                self._put(event)
            if self._lost and not self._waiting and len(self._events) < MAX_WAITING:
                self._observe.audit_lost(self._lost)
                log.error("audit messages were lost", extra={"messages": self._lost})
                self._put(_loss(self._lost))
                self._lost = 0

    def _make(self) -> None:
        """Messages of the next events, unless some wait already."""
        while len(self._waiting) < BATCH:
            with self._guard:
                if not self._events:
                    return
                at, event = self._events.popleft()
                self._query_bytes -= len(event.query)
            try:
                event = self._with_patients(event)
                message = audit_message(event, at, self._identity, max_bytes=self._max_bytes)
            except Exception as exc:  # edge: a value nobody thought of must not stop the trail
                log.error("an audit message could not be made", extra={"kind": event.kind.value}, exc_info=exc)
                self._observe.audit_lost(1)
                event = _loss(1)
                message = audit_message(event, at, self._identity, max_bytes=self._max_bytes)
            self._waiting.append((at.astimezone(UTC).isoformat(timespec="milliseconds"), message, event))

    def _with_patients(self, event: AuditEvent) -> AuditEvent:
        if self._patient_ids is None or event.patient_ids or not event.study_instance_uids:
            return event
        try:
            return replace(event, patient_ids=tuple(self._patient_ids(event.study_instance_uids)))
        except NodeError as exc:  # the study says which patient it was
            log.warning("the patients of an audit message could not be found", exc_info=exc)
            return event

    def _write(self) -> bool:
        batch = self._waiting[:BATCH]
        try:
            if self._chain is None:
                self._chain = self._open_chain()
            written = self._chain.append([(at, message) for at, message, _ in batch])
        except OSError as exc:
            self._failed("the audit trail cannot be written", exc)
            if self._chain is not None:  # a folder that was moved away is made anew
                with suppress(OSError):
                    self._synced(self._chain)
                self._chain.close()
                self._chain = None
            return False
        self.head = self._chain.head
        del self._waiting[:written]
        with self._guard:
            self._written += written
        for _, _, event in batch[:written]:
            self._observe.audit_recorded(event.kind.value, int(event.outcome))
        for healed in self._chain.healed:
            log.error("the audit trail was mended", extra={"what": healed})
            self.record(_mended(healed))
        self._chain.healed.clear()
        return True

    def _sync(self, *, now: bool) -> bool:
        if self._chain is None or self._durable >= self._written:
            return True
        if not now and time.monotonic() < self._synced_s + SYNC_S:
            return True
        try:
            self._synced(self._chain)
        except OSError as exc:
            self._failed("the audit trail cannot be synced", exc)
            return False
        return True

    def _synced(self, chain: Chain) -> None:
        if not chain.sync():
            return
        self._synced_s = time.monotonic()
        with self._guard:
            self._durable = self._written
            self._settled.notify_all()

    def _end(self) -> None:
        """What could not be written is lost, and that is said."""
        with self._guard:
            self._is_over = True
            lost = len(self._events) + len(self._waiting) + self._lost
            self._settled.notify_all()
        if lost:
            self._observe.audit_lost(lost)
            log.error("audit messages were lost: the trail could not be written", extra={"messages": lost})

    def _failed(self, message: str, exc: OSError) -> None:
        self._observe.audit_failed("file")
        if time.monotonic() - self._complained_s >= _COMPLAIN_S:
            self._complained_s = time.monotonic()
            log.error(message, extra={"error": exc.strerror or str(exc)})


def _loss(messages: int) -> AuditEvent:
    return AuditEvent(
        kind=AuditKind.SECURITY_ALERT,
        outcome=AuditOutcome.SERIOUS_FAILURE,
        detail=f"{messages} audit messages were lost: the trail could not be written for too long",
        alert_type=AlertType.SECURITY_CONFIGURATION,
    )


def _mended(what: str) -> AuditEvent:
    return AuditEvent(
        kind=AuditKind.SECURITY_ALERT,
        outcome=AuditOutcome.MINOR_FAILURE,
        detail=f"audit trail: {what}",
        alert_type=AlertType.SECURITY_CONFIGURATION,
    )
