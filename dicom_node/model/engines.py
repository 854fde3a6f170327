"""What engines are given, what leaves the node for them, and what is told them later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path

from dicom_node.model.instances import StoredInstance
from dicom_node.model.studies import Priority, SeriesHeader

__all__ = ["NOTE_MAX", "Cancellation", "EngineTask", "Sending", "SendingRecord", "SendingState", "Tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What leaves the node for an engine: enough to tell a patient, years later, what went where.

    `what` is a word of the adapter ("volume", "DICOM instances", "request"), `host` where it goes: no path, no query.
    `identifiable`: anything in it names the patient (PS3.15 E.1). `bytes`, `sha256` (of the bytes as sent) and
    `remote_id` (the engine's own) are often only known when it is through. No patient data in any of them.
    """

    what: str
    host: str
    objects: int
    identifiable: bool
    bytes: int | None = None
    sha256: str = ""
    remote_id: str = ""


class SendingState(Enum):
    """How far a sending got. One that a crash interrupted stays at ABOUT_TO_SEND: it may have left, or not."""

    ABOUT_TO_SEND = "about to send"
    SENT = "sent"
    FAILED = "failed"  # what had left by then has left


@dataclass(frozen=True, slots=True, kw_only=True)
class SendingRecord:
    """One sending as the catalog keeps it. `job_id` None: an engine that was run by hand."""

    id: int
    study_instance_uid: str
    series_instance_uid: str
    job_id: int | None
    engine: str
    sending: Sending
    state: SendingState
    error: str
    begun_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancellation:
    """Work at an engine that nobody waits for any more and that the engine is still to be told to stop.

    `handle` '': the job ended before the engine gave it one, and `note` is all that is known.
    """

    id: int
    job_id: int
    engine: str
    handle: str
    note: str = field(repr=False)
    attempts: int  # this one included


Tell = Callable[[Sending], None]
NOTE_MAX = 16_384


def _not_remembered(note: str) -> None:
    """Nothing is kept."""


def _not_recorded(sending: Sending) -> AbstractContextManager[Tell]:
    return nullcontext(lambda sent: None)


def _not_kept(path: Path, reason: str) -> str:
    return ""


def _nothing_else() -> Iterable[StoredInstance]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTask:
    """What an engine gets: the instances of one series (received ones, any order), and how long it may take.

    `strikes`: earlier tries that ended with what ran the engine dead or hung.

    What an engine outside this process needs so that no crash makes it submit twice or forget what it submitted:

    * `remember(text)` keeps a note with the job. It is durable when it returns, replaces the one before, and is given
      again as `note` to every later `run` and `poll` of this job, whatever happened in between, until the job has
      ended. Raises LeaseLost (another worker does the job, or nobody is to: submit nothing), StorageError (submit
      nothing). At most NOTE_MAX characters. People see the first line of each note in the study's timeline: ids and
      names of steps, no patient data and no secret. What only the adapter needs, such as a presigned URL, goes into the
      lines after it: they are shown nowhere and gone when the job ends.
    * `record(sending)` is a context that every transmission is made in: durable as "about to send" on entering (raises
      LeaseLost, StorageError: send nothing), as "sent" on leaving, as "failed" when it is left by an exception. It
      gives a function to call with the sending completed, when bytes, digest or remote id are known.
    * `quarantine(path, reason)` keeps a copy of a file that came back and does not fit, for a person to look at;
      returns its name there, '' when there was no room. `reason` carries no patient data. Never raises.

    `study_instances()` yields every visible instance of the study, of all series and origins, as they are now: for an
    engine that is guided by what people said of the images (a structured report with points). Raises StorageError.

    Their defaults keep nothing; the node always gives real ones.
    """

    job_id: int
    study_instance_uid: str
    series_instance_uid: str
    instances: tuple[StoredInstance, ...]
    header: SeriesHeader
    timeout_s: float
    priority: Priority = Priority.ROUTINE
    strikes: int = 0
    note: str = field(default="", repr=False)
    remember: Callable[[str], None] = field(default=_not_remembered, repr=False, compare=False)
    record: Callable[[Sending], AbstractContextManager[Tell]] = field(default=_not_recorded, repr=False, compare=False)
    quarantine: Callable[[Path, str], str] = field(default=_not_kept, repr=False, compare=False)
    study_instances: Callable[[], Iterable[StoredInstance]] = field(default=_nothing_else, repr=False, compare=False)
