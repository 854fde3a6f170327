"""Engines, encoders of their results, and what speaks to destinations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dicom_node.model import (
    CommitmentReport,
    CommitmentRequest,
    Destination,
    EngineTask,
    ObjectReference,
    StoredInstance,
)

if TYPE_CHECKING:  # pydicom and numpy are slow to load, and the first process needs neither
    from pydicom.dataset import Dataset

    from dicom_node.values import EngineResult, Pending, ResultContext, ResultValue

__all__ = ["CommitmentAsker", "CommitmentReporter", "Engine", "Heartbeat", "PollingEngine", "ResultEncoder", "Sender"]


class Heartbeat(Protocol):
    """Handed to long work: call it often. Raises LeaseLost when the work must be dropped."""

    def __call__(self) -> None: ...


class Engine(Protocol):
    """Something that turns a series into findings. A local model is just another engine.

    Construction is cheap and validates configuration (ConfigError); heavy things load on first `run`.

    An engine may also have any of these, all of them thread-safe and quick but for the first two:

    * `warm_up(heartbeat)`: load what can be loaded before the first study comes. Raises as `run` does.
    * `report() -> Sequence[tuple[str, str]]`: what `dicom-node engines check` prints as heading and text, having looked
      now: reachability, credentials, versions, models offered, expiry of tokens. No secret, no patient data. Raises
      NodeError for what keeps it from running.
    * `trouble -> str`: why it cannot be used at the moment, '' when it can.
    * `observe(observer)`: called once, before anything else; `observer(engine, outcome, seconds)` is then to be told of
      every request made on the wire, with one of `metrics.REQUEST_OUTCOMES`.
    * `gauges() -> Mapping[str, float]`: `breaker_state` (0 closed, 1 open, 2 half-open) and `token_expires_seconds`
      (from now, negative when over), as far as there are such; without asking anybody. Neither it nor `trouble` raises.

    One that breaks these promises is told in the log, in `engine_misbehaved_total` and in /ready; it neither ends nor
    holds up the process that asks (`watching`, `worker`).
    """

    name: str

    def check(self) -> None:
        """Raise ConfigError or PackageError if this engine could not run anything."""
        ...

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        """Do it. Raises EngineRejected (never for this input), EngineUnavailable, EngineTimeout, EngineError."""
        ...

    def close(self) -> None:
        """Stop what was started. Idempotent."""
        ...


class PollingEngine(Engine, Protocol):
    """An engine whose answers come later."""

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """Ask for the answer of an earlier `run`."""
        ...

    def cancel(self, handle: str) -> None:
        """Stop it there: nobody waits any more (a deadline, a person, other images). What is over or unknown there is
        no error. Raises NodeError when it could not be told; it is called again, with growing delays, also after a
        restart, a bounded number of times. An answer that comes all the same is dropped.

        An engine that remembers (`EngineTask.remember`) before it has a handle may also have `cancel_noted(note)`: the
        same for a job that ended before.
        """
        ...


class ResultEncoder(Protocol):
    """Turns an engine's values into DICOM data sets."""

    kind: str  # the word used in a rule's `results:`

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """Encode what of `values` is this encoder's; nothing to say gives an empty sequence.

        `sources` are headers (no pixel data) of the images the engine saw; `already` are the data sets encoded
        before for this job (an SR refers to the SEG in it). Encoders run in the order of `plugins.encoder_kinds`.
        Deterministic: equal arguments give equal bytes. Raises EncodingError.
        """
        ...


class CommitmentAsker(Protocol):
    """Asks destinations to commit to keeping objects (PS3.4 annex J, as SCU)."""

    def ask(
        self,
        destination: Destination,
        questions: Mapping[str, Sequence[ObjectReference]],
        on_report: Callable[[CommitmentReport], None],
        is_open: Callable[[], bool],
        heartbeat: Heartbeat,
    ) -> None:
        """Ask about the references of each Transaction UID; then wait, for the destination's `wait_s` at most and while
        `is_open`, for its reports. `on_report` must have kept one when it returns, and raises NotFound for one that
        was not asked for. Raises CommitmentNotTaken when it would not be asked, DeliveryUnavailable or DeliveryRefused
        when the association could not be had.
        """
        ...


class CommitmentReporter(Protocol):
    """Tells peers what the node committed to (PS3.4 annex J, as SCP)."""

    def report(self, peer: Destination, request: CommitmentRequest) -> None:
        """Over an association of the node's own; returns when the peer took it. Raises DeliveryUnavailable or
        DeliveryRefused.
        """
        ...


class Sender(Protocol):
    """Sends stored instances to one destination over one association."""

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        """C-STORE each instance in order; `on_result(instance, dimse_status, error)` after each. A status of None means
        that no context was accepted for it or it could not be re-encoded (`error` says which): only this object fails.

        Raises DeliveryUnavailable or DeliveryRefused when the association cannot be had or breaks.
        """
        ...
