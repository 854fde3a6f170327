"""C-GET and C-MOVE: which instances a request names, and what the requester hears (PS3.4 C.4.2, C.4.3).

Knows no wire: sending one instance is the caller's `send_instance`. What is answered beyond the letter: unique keys of
the levels above may be missing (a relational retrieve that was not negotiated) unless `strict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from dicom_node.errors import NodeError
from dicom_node.interfaces import InstanceIndex
from dicom_node.model import Destination, Level, StoredInstance
from dicom_node.services.identifier import UNIQUE_KEYS, BadIdentifier, InformationModel, read_level, uids_of

__all__ = ["Progress", "RetrievePlan", "RetrieveService", "SubOperation", "SubOperationResult"]

PENDING = 0xFF00
CANCELLED = 0xFE00
SOME_FAILED = 0xB000
NOTHING_SENT = 0xA702
UNKNOWN_DESTINATION = 0xA801

_COUNTED = 0xFFFF  # numbers of sub-operations are US
# A UI value in an explicit VR has 16-bit length: 1000 UIDs of up to 64 characters and a backslash fit
_LISTED_FAILURES = 1000


class SubOperation(Enum):
    """How one C-STORE sub-operation ended (PS3.4 C.4.2.1.6)."""

    COMPLETED = "completed"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubOperationResult:
    """One sub-operation; `reason` says in a constant phrase why it failed. `fatal`: nothing more can be sent."""

    outcome: SubOperation
    reason: str = ""
    fatal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievePlan:
    """What is to be sent, or why nothing can be (`status` not 0)."""

    instances: tuple[StoredInstance, ...] = ()
    status: int = 0
    comment: str = ""
    offending: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One C-GET or C-MOVE response. `failed_uids` only in a final one: at most 1000, the counts are always whole."""

    status: int
    remaining: int
    completed: int
    failed: int
    warning: int
    failed_uids: tuple[str, ...] = ()
    comment: str = ""

    @property
    def final(self) -> bool:
        """Whether this is the last response."""
        return self.status != PENDING


class RetrieveService:
    """Plans and counts retrievals. Keeps no state; may be used by several threads.

    `destinations` are those C-MOVE may name, by AE title.
    """

    def __init__(
        self, index: InstanceIndex, destinations: Mapping[str, Destination] | None = None, *, strict: bool = False
    ) -> None:
        self._index = index
        self._destinations = dict(destinations or {})
        self._strict = strict

    def destination(self, ae_title: str) -> Destination | None:
        """The configured destination of that AE title; None answers 0xA801."""
        return self._destinations.get(ae_title.strip())

    def plan(self, model: InformationModel, identifier: Dataset, *, relational: bool = False) -> RetrievePlan:
        """The instances the identifier names. A wrong identifier gives status 0xA900, a failing index 0xA701."""
        try:
            level, uids = self._keys(model, identifier, relational=relational)
        except BadIdentifier as exc:
            return RetrievePlan(status=exc.dimse_status, comment=exc.comment, offending=(exc.tag,))
        try:
            return RetrievePlan(instances=tuple(self._index.instances(level, uids)))
        except NodeError as exc:
            # PS3.4 tables C.4-2, C.4-3: unable to calculate the number of matches
            return RetrievePlan(status=0xA701, comment=type(exc).__name__)

    def _keys(
        self, model: InformationModel, identifier: Dataset, *, relational: bool
    ) -> tuple[Level, Mapping[str, Sequence[str]]]:
        level = read_level(identifier, model)
        uids: dict[str, Sequence[str]] = {}
        for above in model.levels[: model.levels.index(level)]:
            values = uids_of(identifier, UNIQUE_KEYS[above])
            if len(values) > 1 or (not values and self._strict and not relational):
                raise _bad(above, "takes one value" if values else "is required")
            if values:
                uids[UNIQUE_KEYS[above]] = values
        own = uids_of(identifier, UNIQUE_KEYS[level])
        # PS3.4 C.4.2.1.4.1, C.4.3.1.3.1: a list only of UIDs; no wildcard, no range, no universal matching
        if not own:
            raise _bad(level, "is required")
        if level is Level.PATIENT and len(own) > 1:
            raise _bad(level, "takes one value")
        uids[UNIQUE_KEYS[level]] = own
        for keyword, wanted in uids.items():
            if keyword != "PatientID" and any("*" in value or "?" in value for value in wanted):
                raise BadIdentifier(f"{keyword} takes no wildcard", int(Tag(keyword)))
        return level, uids

    def retrieve(
        self,
        instances: Sequence[StoredInstance],
        send_instance: Callable[[StoredInstance], SubOperationResult],
        cancelled: Callable[[], bool],
        is_time: Callable[[], bool] = lambda: True,
    ) -> Iterator[Progress]:
        """Send one after the other; yield a pending response after each but the last if `is_time`, then the final one.

        Final: 0x0000; 0xFE00 after a cancel; 0xB000 when some failed or had warnings; 0xA702 when none was taken.
        After a `fatal` result the rest counts as failed.
        """
        count = dict.fromkeys(SubOperation, 0)
        failures: list[str] = []
        comment = ""
        for position, instance in enumerate(instances, start=1):
            if cancelled():
                yield _final(CANCELLED, len(instances) - position + 1, count, failures, "")
                return
            result = send_instance(instance)
            rest = instances[position:] if result.fatal else ()
            if result.outcome is SubOperation.FAILED:
                failures += [lost.sop_instance_uid for lost in (instance, *rest)]
            count[result.outcome] += 1
            comment = comment or result.reason
            if result.fatal:
                count[SubOperation.FAILED] += len(rest)
                break
            if position < len(instances) and is_time():
                yield _progress(PENDING, len(instances) - position, count)
        yield _final(_status(count), 0, count, failures, comment)


def _bad(level: Level, what: str) -> BadIdentifier:
    keyword = UNIQUE_KEYS[level]
    return BadIdentifier(f"{keyword} {what}", int(Tag(keyword)))


def _status(count: Mapping[SubOperation, int]) -> int:
    if not count[SubOperation.FAILED] and not count[SubOperation.WARNING]:
        return 0x0000
    if not count[SubOperation.COMPLETED] and not count[SubOperation.WARNING]:
        return NOTHING_SENT
    return SOME_FAILED


def _progress(status: int, remaining: int, count: Mapping[SubOperation, int]) -> Progress:
    return Progress(
        status=status,
        remaining=min(remaining, _COUNTED),
        completed=min(count[SubOperation.COMPLETED], _COUNTED),
        failed=min(count[SubOperation.FAILED], _COUNTED),
        warning=min(count[SubOperation.WARNING], _COUNTED),
    )


def _final(
    status: int, remaining: int, count: Mapping[SubOperation, int], failures: Iterable[str], comment: str
) -> Progress:
    progress = _progress(status, remaining, count)
    return Progress(
        status=status,
        remaining=progress.remaining,
        completed=progress.completed,
        failed=progress.failed,
        warning=progress.warning,
        failed_uids=tuple(failures)[:_LISTED_FAILURES],
        comment=comment,
    )
