"""Storage commitment that peers ask for: each reference is checked, and its peer told, until it took the report.

What is committed to is in the index under that SOP class, and its bytes are read back whole: an object that a C-STORE
acknowledged is durable by the archive or its intake journal, so what can be wrong is only what a disk does to it later.
One lane for each peer, as for deliveries: a peer that cannot be reached holds up nobody else. A crash at any moment
only repeats a check or a report, which a peer recognises by its Transaction UID.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from dicom_node.config import DeliverySettings
from dicom_node.errors import NodeError
from dicom_node.interfaces import CheckedArchive, Clock, CommitmentBook, CommitmentReporter, InstanceIndex
from dicom_node.model import CommitmentRequest, Destination, FailureReason, ObjectReference
from dicom_node.pipeline.lease import backoff_s

__all__ = ["Committer", "check"]

log = logging.getLogger(__name__)

IDLE_S = 0.2  # how often a lane looks: a peer may be waiting with its association open
KEPT_S = 30 * 24 * 3600.0  # requests that ended are kept so long, for people
FORGET_EVERY_S = 3600.0


def check(index: InstanceIndex, archive: CheckedArchive, reference: ObjectReference) -> FailureReason:
    """Whether the node can commit to it. Raises StorageError when the index cannot be read."""
    instance = index.instance(reference.sop_instance_uid)
    if instance is None:
        return FailureReason.NO_SUCH_OBJECT_INSTANCE
    if instance.sop_class_uid != reference.sop_class_uid:
        return FailureReason.CLASS_INSTANCE_CONFLICT
    if not archive.is_whole(instance):
        log.error("an archived object cannot be committed to", extra={"instance": instance.sop_instance_uid})
        return FailureReason.PROCESSING_FAILURE
    return FailureReason.COMMITTED


class _Stopped(Exception):
    """The node is stopping: the check is made again after the next start."""


class Committer:
    """Checks and reports. `start` and `stop` run one thread per peer; `run_once` is one step of one lane."""

    def __init__(
        self,
        book: CommitmentBook,
        index: InstanceIndex,
        archive: CheckedArchive,
        reporter: CommitmentReporter,
        peers: Mapping[str, Destination],
        own_titles: Collection[str],
        *,
        settings: DeliverySettings,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`peers`: where reports go, by the AE title that asked. They are tried as often as deliveries, and as long."""
        self._book, self._reporter = book, reporter
        self._index, self._archive = index, archive
        self._peers, self._own_titles = peers, own_titles
        self._settings, self._clock, self._jitter = settings, clock, jitter
        self._stopping = threading.Event()
        self._lanes: list[threading.Thread] = []
        self._forgot_s = float("-inf")

    def start(self) -> None:
        """Begin."""
        for peer in self._peers:
            lane = threading.Thread(target=self._run, args=(peer,), name="commitment-lane", daemon=True)
            self._lanes.append(lane)
            lane.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop; what is being checked or reported is done again after the next start. Idempotent."""
        self._stopping.set()
        for lane in self._lanes:
            lane.join(timeout=timeout_s)
        self._lanes.clear()

    def _run(self, peer: str) -> None:
        while not self._stopping.is_set():
            try:
                busy = self.run_once(peer)
            except Exception as exc:  # edge: the lane's loop; the catalog may be back next time
                log.error("a lane of storage commitment stumbled", extra={"peer": peer}, exc_info=exc)
                busy = False
            if not busy:
                self._stopping.wait(IDLE_S)

    def run_once(self, peer: str) -> bool:
        """Check the peer's first unchecked request, else send the first report that is due; False when there is none.

        Raises StorageError when catalog or index cannot be had: nothing was decided.
        """
        self._forget()
        request = self._book.next_commitment(peer)
        if request is None:
            return False
        if request.reasons is None:
            try:
                self._book.judge_commitment(request, [self._checked(reference) for reference in request.references])
            except _Stopped:
                return False
        elif self._book.claim_commitment(request, self._settings.response_timeout_s * 3, here=False):
            self._report(request, self._peers[peer])
        return True

    def _checked(self, reference: ObjectReference) -> FailureReason:
        if self._stopping.is_set():
            raise _Stopped
        return check(self._index, self._archive, reference)

    def _report(self, request: CommitmentRequest, peer: Destination) -> None:
        called = request.called_ae_title
        where = replace(peer, calling_ae_title=called if called in self._own_titles else "")
        fields = {"peer": peer.name, "transaction": request.transaction_uid, "attempt": request.attempts + 1}
        try:
            self._reporter.report(where, request)
        except NodeError as exc:
            self._failed(request, str(exc), fields)
            return
        self._book.end_commitment(request)
        log.info("storage commitment reported", extra={**fields, "failed": len(request.report().failed)})

    def _failed(self, request: CommitmentRequest, error: str, fields: Mapping[str, object]) -> None:
        settings = self._settings
        if request.age_s > settings.give_up_after_s:
            self._book.end_commitment(request, error)
            log.error("storage commitment could not be reported", extra={**fields, "error": error})
            return
        delay_s = backoff_s(request.attempts + 1, settings.backoff_s, settings.backoff_max_s, self._jitter())
        self._book.retry_commitment_later(request, error, delay_s)
        log.warning("storage commitment will be reported later", extra={**fields, "delay_s": round(delay_s, 1)})

    def _forget(self) -> None:
        now_s = self._clock.boot().seconds
        if now_s - self._forgot_s >= FORGET_EVERY_S and not self._book.forget_commitments(KEPT_S):
            self._forgot_s = now_s
