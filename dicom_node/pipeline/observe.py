"""What the pipeline tells about itself: the few calls of `metrics.Metrics` it makes, and one that is not heard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["Observer", "Unobserved"]


class Observer(Protocol):
    """Counters. No argument is ever a UID, a name of a person or free text."""

    def study_closed(self, trigger: str, revision: int, seconds: float, *, matched: bool) -> None:
        """A study revision was routed, `seconds` after its first image."""
        ...

    def rule_evaluated(self, rule: str, verdict: str) -> None:
        """`verdict`: match, nomatch, missing_tag, mixed or error."""
        ...

    def job_attempted(self, engine: str, outcome: str) -> None:
        """`outcome`: done, rejected, retry, parked, failed or lost."""
        ...

    def dead_letter(self, kind: str, reason: str) -> None:
        """`kind`: job or delivery; `reason`: attempts, deadline or error."""
        ...

    def engine_called(self, engine: str, outcome: str, seconds: float) -> None:
        """One call of an engine; `outcome`: ok, pending, rejected, unavailable, timeout, error or dropped."""
        ...

    def inference(self, engine: str, stage_seconds: Mapping[str, float]) -> None:
        """The stages of one analysis: queue, wait, load, prepare, forward, finish, encode."""
        ...

    def turnaround(self, engine: str, priority: str, seconds: float) -> None:
        """A job is done, `seconds` after it was made."""
        ...

    def object_delivered(self, destination: str, modality: str, outcome: str) -> None:
        """One object, one try; `outcome`: sent, refused, retry or failed."""
        ...

    def delivery_finished(self, destination: str, seconds: float) -> None:
        """A whole delivery was acknowledged, `seconds` after it was queued."""
        ...


class Unobserved:
    """For commands that count nothing."""

    def study_closed(self, trigger: str, revision: int, seconds: float, *, matched: bool) -> None:
        """Nothing."""

    def rule_evaluated(self, rule: str, verdict: str) -> None:
        """Nothing."""

    def job_attempted(self, engine: str, outcome: str) -> None:
        """Nothing."""

    def dead_letter(self, kind: str, reason: str) -> None:
        """Nothing."""

    def engine_called(self, engine: str, outcome: str, seconds: float) -> None:
        """Nothing."""

    def inference(self, engine: str, stage_seconds: Mapping[str, float]) -> None:
        """Nothing."""

    def turnaround(self, engine: str, priority: str, seconds: float) -> None:
        """Nothing."""

    def object_delivered(self, destination: str, modality: str, outcome: str) -> None:
        """Nothing."""

    def delivery_finished(self, destination: str, seconds: float) -> None:
        """Nothing."""
