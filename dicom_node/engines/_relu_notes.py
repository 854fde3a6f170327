"""What is remembered of a job with the Engine API, so that a crash between any two steps leads to no second job.

The first line is for people, the second holds what the next step needs, presigned URLs included: shown nowhere, and
gone when the job ends (`model.EngineTask.remember`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Handle", "Note", "Step"]


class Step(Enum):
    """How far it got. Each is written before the next thing is done."""

    SUBMITTING = "a job is about to be submitted"
    CREATED = "the job {job} was made; the images are uploaded next"
    UPLOADED = "the images of job {job} were uploaded; the engine is told next"
    STARTED = "the job {job} runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """`shelf` names what is laid out for the engine to fetch ('' for an upload), `spent` counts jobs that never started
    because their URLs were over before the images were there.
    """

    step: Step
    job: str = ""
    upload: str = field(default="", repr=False)
    notify: str = field(default="", repr=False)
    shelf: str = ""
    spent: int = 0

    @property
    def text(self) -> str:
        """As it is remembered."""
        held = asdict(self) | {"step": self.step.name}
        return f"{self.step.value.format(job=self.job)}\n{json.dumps({key: v for key, v in held.items() if v})}"

    @classmethod
    def of(cls, text: str) -> Note | None:
        """What was remembered; None for nothing, or for a note that is not ours."""
        try:
            held: Any = json.loads(text.partition("\n")[2])
            if not isinstance(held, Mapping):
                return None
            return cls(**{**held, "step": Step[held["step"]]})
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Handle:
    """The engine's id of a job, and what is laid out for it."""

    job: str
    shelf: str = ""

    def __str__(self) -> str:
        return f"{self.job}@{self.shelf}" if self.shelf else self.job

    @classmethod
    def of(cls, text: str) -> Handle:
        """Out of its text."""
        job, _, shelf = text.partition("@")
        return cls(job, shelf)
