"""From the outbox to the destinations: one lane each, so that a dead destination holds up nobody else.

What a peer's answer means (PS3.7 Annex C, PS3.4 table B.2-1): success and warnings are *sent*; out of resources and
processing failures are *later*; every other failure is *never* for this object, while the others go on. A duplicate is
*sent*: a crash between the peer's answer and our note of it makes an object go twice. An association that cannot be had
is *later*, be it refused for good: the peer's list of AE titles may be under maintenance. Age alone ends the trying.
"""

from __future__ import annotations

import logging
import random
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dicom_node.audited import SentStudies, to_destination
from dicom_node.auditing import AuditTrail, NoAuditTrail
from dicom_node.config import DeliverySettings
from dicom_node.errors import CommitmentNotTaken, DeliveryUnavailable, LeaseLost, NodeError
from dicom_node.interfaces import Clock, CommitmentAsker, Outbox, Sender
from dicom_node.model import (
    CommitmentReport,
    Delivery,
    DeliveryState,
    Destination,
    ObjectReference,
    StoredInstance,
)
from dicom_node.nudge import Nudge
from dicom_node.pipeline.lease import LeaseKeeper, backoff_s
from dicom_node.pipeline.observe import Observer

__all__ = ["Breaker", "Courier", "is_sent", "is_transient"]

log = logging.getLogger(__name__)

IDLE_S = 0.5  # how often an empty lane looks again
ASKED_AT_ONCE = 2000  # objects that one request for storage commitment names
SEND_BOUND_S = 4 * 3600.0  # one association, however large the study; then the lease is let go


def is_sent(dimse_status: int) -> bool:
    """Success, a warning or a duplicate (0111): the peer has the object."""
    return dimse_status in (0x0000, 0x0001, 0x0107, 0x0111, 0x0116) or dimse_status & 0xF000 == 0xB000


def is_transient(dimse_status: int) -> bool:
    """Out of resources (A7xx, 0213) or a processing failure (0110): the same object may be taken later."""
    return dimse_status & 0xFF00 == 0xA700 or dimse_status in (0x0110, 0x0213)


class _Stopped(Exception):
    """The node is stopping: what is left goes on after the next start."""


@dataclass(slots=True)
class Breaker:
    """Counts failed tries of one destination in a row; once open, only a probe now and then is let through."""

    failures_to_open: int
    probe_s: float
    failures: int = 0
    last_try_s: float = 0.0

    @property
    def open(self) -> bool:
        """Whether the destination counts as down."""
        return self.failures >= self.failures_to_open

    def lets_through(self, now_s: float) -> bool:
        """Whether a try may be made now."""
        return not self.open or now_s - self.last_try_s >= self.probe_s

    def tried(self, now_s: float, *, ok: bool) -> None:
        """A try was made, and got through or not."""
        self.last_try_s = now_s
        self.failures = 0 if ok else self.failures + 1


class Courier:
    """Empties the outbox. `start` and `stop` run one thread per destination; `run_once` is one step of one lane."""

    def __init__(
        self,
        outbox: Outbox,
        sender: Sender,
        destinations: Mapping[str, Destination],
        *,
        settings: DeliverySettings,
        clock: Clock,
        observer: Observer,
        asker: CommitmentAsker | None = None,
        name: str = "courier",
        jitter: Callable[[], float] = random.random,
        audit: AuditTrail | None = None,
    ) -> None:
        """Deliveries for a destination that is not in `destinations` stay where they are, reported by `status`.

        `asker` asks those that offer storage commitment; without it none is asked.
        """
        self._asker = asker
        self._audit = audit or NoAuditTrail()
        self._outbox = outbox
        self._sender = sender
        self._destinations = destinations
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self._name = name
        self._jitter = jitter
        self._breakers = {
            destination: Breaker(settings.breaker_failures, settings.breaker_probe_s) for destination in destinations
        }
        self._stopping = threading.Event()
        self._nudge = Nudge()
        self._lanes: list[threading.Thread] = []

    # --- lanes

    def start(self) -> None:
        """Begin to deliver."""
        for destination in self._destinations:
            lane = threading.Thread(target=self._run, args=(destination,), name=f"lane-{destination}", daemon=True)
            self._lanes.append(lane)
            lane.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop; what is being sent is dropped at its next object and goes on after the next start. Idempotent."""
        self._stopping.set()
        self._nudge.give()
        for lane in self._lanes:
            lane.join(timeout=timeout_s)
        self._lanes.clear()

    def wake(self) -> None:
        """Something was queued: idle lanes look now and not at their next look."""
        self._nudge.give()

    def up(self) -> Mapping[str, bool]:
        """Of each destination, whether its last try got through, or none was made."""
        return {destination: breaker.failures == 0 for destination, breaker in self._breakers.items()}

    def circuits(self) -> Mapping[str, bool]:
        """Of each destination, whether its breaker is open: it is only probed."""
        return {destination: breaker.open for destination, breaker in self._breakers.items()}

    def _run(self, destination: str) -> None:
        while not self._stopping.is_set():
            seen = self._nudge.count
            try:
                busy = self.run_once(destination)
            except Exception as exc:  # edge: the lane's loop; the catalog may be back next time
                log.error("a lane stumbled", extra={"destination": destination}, exc_info=exc)
                busy = False
            if not busy:
                self._nudge.wait(seen, IDLE_S)

    def run_once(self, destination: str) -> bool:
        """Deliver the destination's first runnable delivery; False when there is none or its breaker is open.

        However it ends, it ends in the catalog. Raises StorageError only when the catalog cannot be had.
        """
        breaker = self._breakers[destination]
        if not breaker.lets_through(self._clock.boot().seconds):
            return False
        delivery = self._outbox.lease_delivery(self._name, self._settings.lease_s, destination)
        if delivery is None:
            return False
        try:
            self._attempt(delivery, breaker)
        except LeaseLost:
            log.warning("delivery dropped: its lease was lost", extra=_fields(delivery))
        return True

    # --- one delivery

    def _attempt(self, delivery: Delivery, breaker: Breaker) -> None:
        is_committed_to = all(item.committed for item in delivery.items)  # however late its report came
        if delivery.attempts > 1 and self._too_old(delivery) and not is_committed_to:
            lacks = "committed to" if all(item.sent for item in delivery.items) else "delivered"
            self._give_up(delivery, "deadline", f"not {lacks} in {delivery.attempts - 1} tries; {delivery.error}")
            return
        began_s = self._clock.boot().seconds
        try:
            refused, has_sent = self._send(delivery)
            has_asked = self._ask_to_commit(delivery)
        except LeaseLost:
            raise
        except _Stopped:
            self._outbox.retry_delivery_later(delivery, "interrupted: the node was stopped", 0.0)
        except CommitmentNotTaken as exc:  # it takes objects: those of other deliveries need not wait
            breaker.tried(self._clock.boot().seconds, ok=True)
            self._failed(delivery, str(exc), exc)
        except NodeError as exc:
            breaker.tried(self._clock.boot().seconds, ok=False)
            self._failed(delivery, str(exc), exc)
        except Exception as exc:  # noqa: BLE001 - edge: the lane's loop; a sender's bug is one try's failure
            breaker.tried(self._clock.boot().seconds, ok=False)
            self._failed(delivery, f"unforeseen: {type(exc).__name__}", exc)
        else:
            now_s = self._clock.boot().seconds
            if has_sent or has_asked:  # one of which nothing was left tells nothing about the destination
                breaker.tried(now_s, ok=True)
            self._finish(delivery, refused, delivery.age_s + now_s - began_s)

    def _too_old(self, delivery: Delivery) -> bool:
        return delivery.age_s > self._settings.give_up_after_s

    def _send(self, delivery: Delivery) -> tuple[int, bool]:
        """Send what was neither sent nor refused before.

        Returns how many objects are refused by now, and whether any was to be sent.
        """
        # refused ones are not offered again before a person says so
        left = [item.instance for item in delivery.items if not item.sent and not item.error]
        refused = sum(1 for item in delivery.items if item.error)
        keeper, heartbeat = self._kept(delivery)
        told, why = self._told(delivery), "the sending broke off"

        def on_result(instance: StoredInstance, dimse_status: int | None, error: str) -> None:
            nonlocal refused
            told.sent(instance, ok=dimse_status is not None and is_sent(dimse_status))
            refused += self._noted(delivery, instance, dimse_status, error) == "refused"
            heartbeat()

        try:
            if left:
                with keeper:
                    self._sender.send(self._destinations[delivery.destination], left, on_result, heartbeat)
            why = ""
        finally:  # of an association that could not be had nothing is told: nothing was transferred
            told.ended(why)
        return refused, bool(left)

    def _told(self, delivery: Delivery) -> SentStudies:
        there = self._destinations[delivery.destination]
        return SentStudies(self._audit, to_destination(there.ae_title, there.host, there.calling_ae_title))

    def _kept(self, delivery: Delivery) -> tuple[LeaseKeeper, Callable[[], None]]:
        """What keeps its lease, and what long work is to call."""
        keeper = LeaseKeeper(
            lambda: self._outbox.extend_delivery(delivery, self._settings.lease_s),
            lease_s=self._settings.lease_s,
            bound_s=SEND_BOUND_S,
            clock=self._clock,
        )

        def heartbeat() -> None:
            if self._stopping.is_set():
                raise _Stopped
            keeper()

        return keeper, heartbeat

    def _asks(self, destination: Destination) -> bool:
        return self._asker is not None and destination.commitment is not None

    def _ask_to_commit(self, delivery: Delivery) -> bool:
        """Ask the destination to commit to what it has of the delivery and has not yet committed to (PS3.4 annex J).

        Each question has a Transaction UID of its own; reports on earlier ones are understood all the same. Returns
        whether there was anything to ask.
        """
        destination = self._destinations[delivery.destination]
        if self._asker is None or not self._asks(destination):
            return False
        objects = self._outbox.uncommitted(delivery)
        questions: dict[str, list[ObjectReference]] = {}
        for start in range(0, len(objects), ASKED_AT_ONCE):
            asked = [
                ObjectReference(item.sop_class_uid, item.sop_instance_uid)
                for item in objects[start : start + ASKED_AT_ONCE]
            ]
            questions[f"2.25.{uuid.uuid4().int}"] = asked
        if not questions:
            return False
        for transaction_uid, asked in questions.items():
            self._outbox.begin_commitment(delivery, transaction_uid, [uid for _, uid in asked])

        def on_report(report: CommitmentReport) -> None:
            self._outbox.note_report(report, {destination.name})

        keeper, heartbeat = self._kept(delivery)
        with keeper:
            self._asker.ask(
                destination, questions, on_report, lambda: self._outbox.commitment_is_open(delivery), heartbeat
            )
        return True

    def _noted(self, delivery: Delivery, instance: StoredInstance, dimse_status: int | None, error: str) -> str:
        """Keep what the peer said of one object; returns sent or refused.

        Raises DeliveryUnavailable for a transient no: it ends the try, since order matters (SEG before SR) and the
        next object would hardly fare better.
        """
        uid = instance.sop_instance_uid
        outcome = "refused"
        if dimse_status is not None and is_sent(dimse_status):
            self._outbox.item_sent(delivery, uid, dimse_status, instance.sha256)
            outcome = "sent"
        elif dimse_status is not None and is_transient(dimse_status):
            outcome = "retry"
        else:
            reason = error or "refused"
            if dimse_status is not None:
                reason = f"status {dimse_status:04X}H: {reason}"
            self._outbox.item_failed(delivery, uid, dimse_status, reason)
            log.error("object refused by destination", extra=_fields(delivery) | {"instance": uid, "reason": reason})
        self._observer.object_delivered(delivery.destination, instance.modality, outcome)
        if outcome == "retry":
            raise DeliveryUnavailable(f"the destination cannot take objects now: status {dimse_status:04X}H")
        return outcome

    def _finish(self, delivery: Delivery, refused: int, seconds: float) -> None:
        destination = self._destinations[delivery.destination]
        if self._asks(destination) and destination.commitment is not None:
            settings = self._settings
            resend_s = backoff_s(delivery.attempts, settings.backoff_s, settings.backoff_max_s, self._jitter())
            state = self._outbox.settle_delivery(delivery, await_s=destination.commitment.timeout_s, resend_s=resend_s)
            if state in (DeliveryState.COMMITTING, DeliveryState.PENDING):
                log.info("delivery waits for storage commitment", extra=_fields(delivery) | {"state": state.value})
                return
            refused = int(state is DeliveryState.FAILED)
        else:
            self._outbox.finish_delivery(delivery)
        if refused:
            self._observer.dead_letter("delivery", "error")
            log.error("delivery ended with refused objects", extra=_fields(delivery))
        else:
            self._observer.delivery_finished(delivery.destination, seconds)
            log.info("delivery done", extra=_fields(delivery))

    def _failed(self, delivery: Delivery, error: str, exc: Exception) -> None:
        settings = self._settings
        if self._too_old(delivery):
            self._give_up(delivery, "deadline", error, exc)
            return
        delay_s = backoff_s(delivery.attempts, settings.backoff_s, settings.backoff_max_s, self._jitter())
        self._outbox.retry_delivery_later(delivery, error, delay_s)
        why = {"delay_s": round(delay_s, 1), "error": error}
        log.warning("delivery will be tried again", extra=_fields(delivery) | why)

    def _give_up(self, delivery: Delivery, reason: str, error: str, exc: Exception | None = None) -> None:
        self._outbox.give_up_delivery(delivery, error)
        self._observer.dead_letter("delivery", reason)
        for item in delivery.items:
            if not item.sent:
                self._observer.object_delivered(delivery.destination, item.instance.modality, "failed")
        told = self._told(delivery)
        told.ended(f"delivery given up: {reason}", missing=[item.instance for item in delivery.items if not item.sent])
        log.error("delivery given up", extra=_fields(delivery) | {"reason": reason}, exc_info=exc)


def _fields(delivery: Delivery) -> dict[str, object]:
    return {
        "delivery": delivery.id,
        "destination": delivery.destination,
        "study": delivery.study_instance_uid,
        "attempt": delivery.attempts,
    }
