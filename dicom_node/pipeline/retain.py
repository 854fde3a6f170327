"""Retention: which studies go by rule and quota, after their objects are known to be safe where they were sent.

One run looks at the studies from the oldest on, a page at a time, and deletes at most so many. A study that is held is
not looked at again for a while. Nothing goes unless every delivery of it is done and each object is committed to by its
destination, or found there, or, where a destination offers neither, was accepted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from itertools import takewhile
from typing import Literal, Protocol

from dicom_node.errors import DeliveryError, NodeError, NotFound
from dicom_node.interfaces import Clock
from dicom_node.model import Destination
from dicom_node.pipeline.delete import Deleter, DeletionBook
from dicom_node.retention import (
    DeletionOrder,
    Held,
    Hold,
    RetentionRule,
    RetentionSettings,
    Sent,
    StudyHeld,
    StudyToKeep,
)

__all__ = ["Asked", "Fate", "Finder", "Retainer", "RetentionBook", "Run"]

log = logging.getLogger(__name__)

PAGE = 200
LOOK_AGAIN_S = 3600.0  # at a study that was held
RUN_S = 120.0  # then the next run goes on
MOST_HELD = 100_000  # studies remembered as held
MOST_AGE_S = 100 * 365 * 24 * 3600.0
MOST_SIZES = 1_000_000  # studies of which the bytes are remembered
_ALL_HOLDS = frozenset(Hold)

Asked = Literal["auto", "find", "accepted"]


class RetentionBook(DeletionBook, Protocol):
    """The catalog as retention needs it."""

    def studies_to_keep(self, after: tuple[str, str], limit: int) -> Sequence[StudyToKeep]:
        """A page of studies, in the order in which they first came."""
        ...

    def study_bytes(self, study_instance_uid: str) -> int:
        """Of the files of all its objects."""
        ...

    def study_sent(self, study_instance_uid: str) -> Sequence[Sent]:
        """Every object its deliveries are about, as each destination has it."""
        ...


class Finder(Protocol):
    """Asks destinations what they have (`dimse.finding.DimseFinder`)."""

    def find_instances(
        self,
        destination: Destination,
        study_instance_uid: str,
        series_instance_uids: Collection[str],
        heartbeat: Callable[[], None],
    ) -> frozenset[str] | None:
        """SOP Instance UIDs it has of them; None when it takes no queries. Raises DeliveryError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of a study that was due, or would. `held` empty: it goes, or went."""

    study_instance_uid: str
    rule: str
    why: str
    bytes: int
    held: tuple[Held, ...] = ()
    safe: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """What one run did. `kept`: studies that are due and stay, by the first reason. `over_bytes`: by rule, what goes
    beyond its quota and could not be deleted. `whole`: every study was looked at.
    """

    deleted: int = 0
    bytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    over_bytes: dict[str, int] = field(default_factory=dict)
    whole: bool = False


class _Stopped(NodeError):
    """The process ends."""


class Retainer:
    """Runs the rules; for one thread. `tell` is told of each study that is due, with what became of it."""

    def __init__(
        self,
        book: RetentionBook,
        deleter: Deleter,
        finder: Finder,
        destinations: Mapping[str, Destination],
        *,
        settings: RetentionSettings,
        asked: Mapping[str, Asked],
        free_bytes: Callable[[], int],
        clock: Clock,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`asked`: what each destination is asked before a deletion (`before_deletion`). `free_bytes`: above the
        reserve.
        """
        self._book, self._deleter, self._finder = book, deleter, finder
        self._destinations, self._asked = destinations, asked
        self._settings, self._free_bytes, self._clock, self._stopping = settings, free_bytes, clock, stopping
        self._held_until: dict[str, tuple[float, str, Hold]] = {}
        self._after = ("", "")
        self._kept: Counter[str] = Counter()
        self._sizes: dict[str, tuple[str, int]] = {}  # of studies under a quota: as they were, and their bytes
        self._silent: dict[str, Held] = {}  # destinations that did not answer in this run

    def run(self, *, dry: bool = False, tell: Callable[[Fate], None] = lambda fate: None) -> Run:
        """Look at the studies, from where the last run ended; `dry`: change nothing, look at all of them.

        Raises StorageError.
        """
        quotas = self._quotas()
        run = Run()
        self._silent.clear()
        began = self._clock.boot().seconds
        kept, after = (Counter[str](), ("", "")) if dry else (self._kept, self._after)
        for study in self._studies(after, self._young_since(quotas)):
            late = self._clock.boot().seconds - began > RUN_S
            if not dry and (run.deleted >= self._settings.studies_per_run or late):
                break
            after = (study.first_received_at, study.study_instance_uid)
            fate = self._fate(study, quotas, dry)
            if fate is None:
                continue
            if fate.held:
                kept[fate.held[0].reason.value] += 1
            else:
                run.deleted += 1
                run.bytes += fate.bytes
            tell(fate)
            if self._files_stay(fate, dry):
                break
        else:
            run.whole, after = not self._stopping(), ("", "")
        run.kept = Counter(kept)
        if not dry:
            self._after, self._kept = after, Counter() if run.whole else kept
        run.over_bytes = quotas.over() if run.whole else {}
        return run

    def _quotas(self) -> _Quotas:
        quotas = _Quotas(self._settings.rules, self._free_bytes, self._bytes_of)
        if any(rule.keep_bytes is not None for rule in self._settings.rules):
            there = set()
            for study in self._studies(("", "")):
                rule = self._rule_for(study)
                if rule is not None and rule.keep_bytes is not None:
                    quotas.count(rule, study)
                    there.add(study.study_instance_uid)
            if not self._stopping():
                self._sizes = {uid: known for uid, known in self._sizes.items() if uid in there}
        return quotas

    def _bytes_of(self, study: StudyToKeep) -> int:
        """Of its files; summed up again only when something of it came since."""
        known = self._sizes.get(study.study_instance_uid)
        if known is None or known[0] != study.contents:
            if len(self._sizes) >= MOST_SIZES:
                self._sizes.clear()
            known = (study.contents, self._book.study_bytes(study.study_instance_uid))
            self._sizes[study.study_instance_uid] = known
        return known[1]

    def _files_stay(self, fate: Fate, dry: bool) -> bool:
        """Whether the files of a study that was just deleted are still there: to go on would make no room."""
        if dry or fate.held:
            return False
        return any(one.study_instance_uid == fate.study_instance_uid for one in self._book.unfinished_deletions())

    def _young_since(self, quotas: _Quotas) -> str:
        """What first came later than this is not old enough for any rule, and need not be looked at."""
        ages = [rule.older_than for rule in self._settings.rules if rule.older_than is not None]
        ages += [rule.quota_spares for rule in self._settings.rules if quotas.is_over(rule)]
        age = timedelta(seconds=min(*ages, MOST_AGE_S, MOST_AGE_S))
        return (self._clock.wall() - age).astimezone(UTC).isoformat(timespec="microseconds")

    def _studies(self, after: tuple[str, str], until: str = "~") -> Iterator[StudyToKeep]:
        while not self._stopping():
            page = self._book.studies_to_keep(after, PAGE)
            old = list(takewhile(lambda study: study.first_received_at <= until, page))
            yield from old
            if not page or len(old) < len(page):
                return
            after = (page[-1].first_received_at, page[-1].study_instance_uid)

    def _rule_for(self, study: StudyToKeep) -> RetentionRule | None:
        return next((rule for rule in self._settings.rules if rule.covers(study)), None)

    def _fate(self, study: StudyToKeep, quotas: _Quotas, dry: bool) -> Fate | None:
        """What becomes of one study; None when it is not due."""
        rule = self._rule_for(study)
        why = "" if rule is None else quotas.due(rule, study)
        if rule is None or not why:
            return None
        held = [] if dry else self._still_held(study)
        safe: Mapping[str, str] = {}
        if not held:
            held, safe = self._held(study, rule)
        length = 0
        if not held and not dry:
            length, held = self._delete(study, rule, why, safe)
        if held and not dry:
            self._remember(study, held[0].reason)
        length = length or self._bytes_of(study)
        if not held:
            quotas.gone(rule, length)
        return Fate(
            study_instance_uid=study.study_instance_uid,
            rule=rule.name,
            why=why,
            bytes=length,
            held=tuple(held),
            safe=safe,
        )

    def _still_held(self, study: StudyToKeep) -> list[Held]:
        """The reason of an earlier look, if that was not long ago and nothing has changed."""
        until, mark, reason = self._held_until.get(study.study_instance_uid, (0.0, "", Hold.CHANGED))
        if mark == study.mark and self._clock.boot().seconds < until:
            return [Held(reason, "as it was a while ago")]
        return []

    def _remember(self, study: StudyToKeep, reason: Hold) -> None:
        if study.study_instance_uid not in self._held_until and len(self._held_until) >= MOST_HELD:
            self._held_until.clear()
        known = self._held_until.get(study.study_instance_uid)
        now = self._clock.boot().seconds
        if known is None or known[0] <= now or known[1] != study.mark:
            self._held_until[study.study_instance_uid] = (now + LOOK_AGAIN_S, study.mark, reason)

    def _delete(
        self, study: StudyToKeep, rule: RetentionRule, why: str, safe: Mapping[str, str]
    ) -> tuple[int, list[Held]]:
        order = DeletionOrder(
            study_instance_uid=study.study_instance_uid,
            rule=rule.name,
            who="retention",
            why=why,
            holds=_holds(rule),
            mark=study.mark,
            safe=safe,
        )
        try:
            deletion = self._deleter.delete(order)
        except StudyHeld as exc:
            return 0, list(exc.held)
        except NotFound:  # a person was faster
            return 0, [Held(Hold.CHANGED, "it is not there any more")]
        self._held_until.pop(study.study_instance_uid, None)
        self._sizes.pop(study.study_instance_uid, None)
        return deletion.bytes, []

    # --- whether it may go

    def _held(self, study: StudyToKeep, rule: RetentionRule) -> tuple[list[Held], dict[str, str]]:
        try:
            held = list(self._deleter.held(study.study_instance_uid, _holds(rule)))
        except NotFound:
            return [Held(Hold.CHANGED, "it is not there any more")], {}
        if held:
            return held, {}
        by_destination: dict[str, list[Sent]] = {}
        for sent in self._book.study_sent(study.study_instance_uid):
            by_destination.setdefault(sent.destination, []).append(sent)
        safe: dict[str, str] = {}
        for name, objects in sorted(by_destination.items()):
            answer = self._safe_at(name, study.study_instance_uid, objects)
            if isinstance(answer, Held):
                return [answer], {}
            safe[name] = answer
        return [], safe

    def _safe_at(self, name: str, study_instance_uid: str, objects: Sequence[Sent]) -> str | Held:
        """How these objects are safe at a destination: committed, found or accepted; or why they are not."""
        open_ = [one for one in objects if not one.committed]
        if not open_:
            return "committed"
        destination = self._destinations.get(name)
        if destination is None:
            text = f"destination {name} is not configured any more, and cannot be asked; dicom-node delete"
            return Held(Hold.NOT_ASKED, text)
        if destination.commitment is not None:
            text = f"{name} has not committed to {len(open_)} of {len(objects)} objects; dicom-node route --again"
            return Held(Hold.UNCOMMITTED, text)
        asked = self._asked.get(name, "auto")
        if asked == "accepted":
            return "accepted"
        if name in self._silent:
            return self._silent[name]
        series = sorted({one.series_instance_uid for one in open_})
        try:
            there = self._finder.find_instances(destination, study_instance_uid, series, self._go_on)
        except (DeliveryError, _Stopped) as exc:
            self._silent[name] = Held(Hold.NOT_ASKED, str(exc))
            return self._silent[name]
        if there is None:
            if asked == "auto":
                return "accepted"
            return Held(Hold.NOT_ASKED, f"{name} takes no queries; set its before_deletion")
        missing = sum(one.sop_instance_uid not in there for one in open_)
        if missing:
            text = f"C-FIND does not find {missing} of {len(objects)} objects at {name}; dicom-node route --again"
            return Held(Hold.NOT_FOUND, text)
        return "found"

    def _go_on(self) -> None:
        if self._stopping():
            raise _Stopped("the node is stopped")


def _holds(rule: RetentionRule) -> frozenset[Hold]:
    return _ALL_HOLDS - {Hold.VARIANTS} if rule.variants == "delete" else _ALL_HOLDS


class _Quotas:
    """How much each rule's studies have, and when that or their age is too much."""

    def __init__(
        self, rules: Sequence[RetentionRule], free_bytes: Callable[[], int], bytes_of: Callable[[StudyToKeep], int]
    ) -> None:
        self._rules = {rule.name: rule for rule in rules}
        self._total = dict.fromkeys(self._rules, 0)
        self._free_bytes, self._bytes_of, self._freed = free_bytes, bytes_of, 0
        self._free_before: int | None = None

    def count(self, rule: RetentionRule, study: StudyToKeep) -> None:
        """The study is one of that rule's."""
        self._total[rule.name] += self._bytes_of(study)

    def is_over(self, rule: RetentionRule) -> bool:
        """Whether more than age decides by that rule now."""
        over = rule.keep_bytes is not None and self._total[rule.name] > rule.keep_bytes
        return over or (rule.free_bytes is not None and self._lacking(rule.free_bytes) > 0)

    def gone(self, rule: RetentionRule, length: int) -> None:
        """A study of that rule was deleted, or would be."""
        self._total[rule.name] -= length
        self._freed += length

    def due(self, rule: RetentionRule, study: StudyToKeep) -> str:
        """Why the study goes by that rule, '' when it does not."""
        if rule.older_than is not None and study.age_s >= rule.older_than:
            return f"older than {rule.older_than / 3600:g} h"
        if not rule.has_quota or study.age_s < rule.quota_spares:
            return ""
        if rule.keep_bytes is not None and self._total[rule.name] > rule.keep_bytes:
            return f"its rule keeps {rule.keep_bytes} bytes, and has {self._total[rule.name]}"
        if rule.free_bytes is not None and self._lacking(rule.free_bytes) > 0:
            return f"{rule.free_bytes} bytes are to be free, {self._lacking(rule.free_bytes)} are lacking"
        return ""

    def _lacking(self, wanted: int) -> int:
        """What was deleted counts as free at once: where the file system is slow to give it back, or a snapshot keeps
        it, deleting more would not help.
        """
        free = self._free_bytes()
        if self._free_before is None:
            self._free_before = free
        return max(wanted - max(free, self._free_before + self._freed), 0)

    def over(self) -> dict[str, int]:
        """By rule with a quota: what is still too much, 0 when it is met."""
        found: dict[str, int] = {}
        for name, rule in self._rules.items():
            if rule.has_quota:
                over = max(self._total[name] - rule.keep_bytes, 0) if rule.keep_bytes is not None else 0
                lacking = max(rule.free_bytes - self._free_bytes(), 0) if rule.free_bytes is not None else 0
                found[name] = max(over, lacking)
        return found
