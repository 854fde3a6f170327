"""What an engine of kind `dicom` remembers of a job: after which arrival its answer may come, and when it was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dicom_node.errors import EngineError
from dicom_node.interfaces import Clock, seconds_since
from dicom_node.model import BootTime

__all__ = ["Waiting"]

MAX_FRAMES = 32  # frames of reference of one series; more are not told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job at such an engine. `key` '' stands for the job's id; a run by hand has one of its own. `hidden`: what was
    sent has UIDs of the job.

    `sent_s`, `sent_boot` and `sent_at` (Unix time, for after a reboot) are empty until everything was sent.
    """

    after: int
    key: str = ""
    frames: tuple[str, ...] = ()
    hidden: bool = False
    sent_s: float = 0.0
    sent_boot: str = ""
    sent_at: float = 0.0

    @property
    def sent(self) -> bool:
        """Whether everything was sent."""
        return bool(self.sent_boot)

    @property
    def handle(self) -> str:
        """What is known under when no note is kept."""
        return f"{self.after}:{self.key}"

    @classmethod
    def of_handle(cls, handle: str) -> Waiting:
        """Raises EngineError for what is none."""
        after, _, key = handle.partition(":")
        if not after.isdecimal():
            raise EngineError("the handle of the job is none of this engine's; run the job again")
        return cls(after=int(after), key=key)

    def note(self, line: str) -> str:
        """For `EngineTask.remember`; `line` is for people."""
        return f"{line}\n{json.dumps(asdict(self))}"

    @classmethod
    def of_note(cls, note: str) -> Waiting | None:
        """What `note` said, None when it is no such note."""
        try:
            fields = json.loads(note.partition("\n")[2])
            return cls(**{**fields, "frames": tuple(fields["frames"])})
        except (ValueError, TypeError, KeyError):
            return None

    def since_sent_s(self, clock: Clock) -> float:
        """Seconds since everything was sent, 0 when that is not known."""
        if not self.sent:
            return 0.0
        passed = seconds_since(BootTime(boot_id=self.sent_boot, seconds=self.sent_s), clock.boot())
        if passed == float("inf"):
            passed = clock.wall().timestamp() - self.sent_at
        return max(passed, 0.0)

    @classmethod
    def begun(cls, after: int, key: str, frames: Sequence[str], *, hidden: bool) -> Waiting:
        """Before the first image is sent."""
        return cls(after=after, key=key, frames=tuple(frames)[:MAX_FRAMES], hidden=hidden)
