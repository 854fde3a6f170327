"""From complete studies to verdicts and jobs: the only place where completion, headers, rules and ledger meet."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from dicom_node.errors import NodeError, NotFound
from dicom_node.interfaces import Clock, RoutedSeries, StudyLedger, seconds_since
from dicom_node.model import (
    AssociationEnd,
    CloseTrigger,
    Condition,
    SeriesHeader,
    StoredInstance,
    StudyActivity,
    Verdict,
)
from dicom_node.pipeline.observe import Observer
from dicom_node.routing.completion import Due
from dicom_node.routing.rules import RuleSet

__all__ = ["Routed", "Router"]

log = logging.getLogger(__name__)

TRIES = 3  # at reading or evaluating a series, before it is closed as failed
RETRY_S = 5.0  # doubled after each
LOOK_AGAIN_S = 10.0  # at the latest, at a study that is not due, whatever is known of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What `Router.route_now` did: what was decided on each series, and the ids of the new jobs."""

    series: tuple[RoutedSeries, ...]
    job_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Trouble:
    tries: int
    not_before_s: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A study that was looked at and is due at `at_s`, unless its mark changes or one of the associations ends that
    were open: then it may be sooner. Times are seconds of the boot clock.
    """

    mark: Hashable
    associations: frozenset[str]
    at_s: float
    look_at_s: float

    def holds(self, mark: Hashable, associations: frozenset[str], now_s: float) -> bool:
        """Whether nothing has happened since that another look would see."""
        return self.mark == mark and self.associations <= associations and now_s < self.look_at_s


class Router:
    """Closes studies that are due. One `sweep` at a time; a bad series never holds up another."""

    def __init__(
        self,
        ledger: StudyLedger,
        *,
        read_header: Callable[[Sequence[StoredInstance]], SeriesHeader],
        due: Callable[[StudyActivity], Due],
        rules: Callable[[], RuleSet],
        destination_of: Callable[[str], str | None],
        clock: Clock,
        observer: Observer,
    ) -> None:
        """`rules` gives the set in force; it is asked once per study, so that one closing sees one set.
        `destination_of` gives the configured destination of a calling AE title, for rules that send to the sender.
        """
        self._ledger = ledger
        self._read_header = read_header
        self._due = due
        self._rules = rules
        self._destination_of = destination_of
        self._clock = clock
        self._observer = observer
        self._trouble: dict[tuple[str, str, int], _Trouble] = {}
        self._waiting: dict[str, _Waiting] = {}
        self.next_due_s: float | None = None
        """When, on the boot clock, the first study will be due that was not at the last sweep; None: nobody knows."""

    def sweep(self) -> int:
        """One pass: route every study that is due, radiographs that need not wait first. Returns how many were.

        Nothing that goes wrong with one study reaches another: a series that cannot be read or evaluated is tried
        again later, TRIES times, then closed as failed with the reason. Raises StorageError when the catalog cannot be
        read at all.
        """
        due = self._look()
        due.sort(key=lambda item: item[1].trigger is not CloseTrigger.IMMEDIATE)
        routed = 0
        for activity, verdict in due:
            try:
                routed += self._route(activity, verdict)
            except Exception as exc:  # edge: the timer's tick; the next one tries again
                log.error(
                    "a study could not be routed; it will be tried again",
                    extra={"study": activity.study_instance_uid},
                    exc_info=exc,
                )
        return routed

    def _look(self) -> list[tuple[StudyActivity, Due]]:
        """The studies that are due. One that is not is looked at again only when that may have changed: a sender of a
        whole archive keeps thousands of them open.
        """
        # The marks first: of what comes between the two reads, the next sweep sees another one.
        glance, now_s = self._ledger.open_at_a_glance(), self._clock.boot().seconds
        self._waiting = {
            uid: waiting
            for uid, waiting in self._waiting.items()
            if uid in glance.marks and waiting.holds(glance.marks[uid], glance.associations, now_s)
        }
        activities = self._ledger.open_studies([uid for uid in glance.marks if uid not in self._waiting])
        due = []
        for activity in activities:
            uid, verdict = activity.study_instance_uid, self._due(activity)
            if verdict.trigger is not None:
                due.append((activity, verdict))
            elif verdict.at_s is not None:
                open_ones = (one.association_id for one in activity.associations if one.end is AssociationEnd.OPEN)
                look_at_s = min(verdict.at_s, now_s + _look_again_s(uid))
                self._waiting[uid] = _Waiting(glance.marks[uid], frozenset(open_ones), verdict.at_s, look_at_s)
        self._forget_trouble(activities)
        self.next_due_s = min((waiting.at_s for waiting in self._waiting.values()), default=None)
        return due

    def route_now(self, study_instance_uid: str, *, again: bool = False, rule: str | None = None) -> Routed:
        """For `dicom-node route`: close and route the whole study now, whatever it waits for.

        With `rule`, series that were routed before get a job of this rule only; series that are still open are closed
        for every rule, so that none is skipped. `again` makes a new run of what already ran. A series that cannot be
        read is closed as failed. Raises NotFound (study, rule), StorageError.
        """
        activity = self._ledger.reopen_study(study_instance_uid, again=again)
        rules = self._rules()
        series = [self._decided(activity, uid, rules) for uid in activity.pending_series]
        if rule is not None:
            known = {verdict.rule for routed in series for verdict in routed.verdicts}
            if rule not in known:
                raise NotFound(f"there is no rule {rule!r} (known: {', '.join(sorted(known)) or 'none'})")
            still_open = self._still_open(study_instance_uid)
            series = [
                routed
                if routed.series_instance_uid in still_open
                else replace(routed, jobs=tuple(job for job in routed.jobs if job.rule == rule))
                for routed in series
            ]
        return Routed(series=tuple(series), job_ids=self._close(activity, series, CloseTrigger.OPERATOR, rules))

    def explain(self, study_instance_uid: str) -> Sequence[RoutedSeries]:
        """For `rules explain`: what the rules in force say of each series now. Nothing is written. Raises NotFound."""
        activity = self._ledger.reopen_study(study_instance_uid, again=False)
        rules = self._rules()
        return [self._decided(activity, uid, rules) for uid in activity.pending_series]

    # --- one study

    def _route(self, activity: StudyActivity, due: Due) -> bool:
        assert due.trigger is not None
        rules = self._rules()
        series = [routed for uid in due.series if (routed := self._decided_or_later(activity, uid, rules))]
        if series:
            self._close(activity, series, due.trigger, rules)
        return bool(series)

    def _close(
        self, activity: StudyActivity, series: Sequence[RoutedSeries], trigger: CloseTrigger, rules: RuleSet
    ) -> tuple[int, ...]:
        job_ids = tuple(self._ledger.route_series(activity, series, trigger, rules.digest))
        matched = any(verdict.matched for routed in series for verdict in routed.verdicts)
        waited_s = seconds_since(activity.first_received, self._clock.boot())
        self._observer.study_closed(
            trigger.value, activity.revision, waited_s if waited_s != float("inf") else 0.0, matched=matched
        )
        for routed in series:
            for verdict in routed.verdicts:
                self._observer.rule_evaluated(verdict.rule, verdict_word(verdict))
        log.info(
            "study routed",
            extra={
                "study": activity.study_instance_uid,
                "revision": activity.revision,
                "trigger": trigger.value,
                "series": len(series),
                "jobs": list(job_ids),
                "matched": matched,
            },
        )
        return job_ids

    def _still_open(self, study_instance_uid: str) -> frozenset[str]:
        return frozenset(
            uid for activity in self._ledger.open_studies([study_instance_uid]) for uid in activity.pending_series
        )

    # --- one series

    def _decide(self, activity: StudyActivity, uid: str, rules: RuleSet) -> RoutedSeries:
        study = activity.study_instance_uid
        header = self._read_header(self._ledger.series_instances(study, uid))
        view = self._ledger.series_view(study, uid, header)
        evaluated = rules.evaluate(view, now=self._clock.wall(), destination_of=self._destination_of)
        return RoutedSeries(series_instance_uid=uid, header=header, verdicts=evaluated.verdicts, jobs=evaluated.jobs)

    def _decided(self, activity: StudyActivity, uid: str, rules: RuleSet) -> RoutedSeries:
        """The decision, or the failure as one."""
        try:
            return self._decide(activity, uid, rules)
        except Exception as exc:  # edge: one series must not hold up the others of its study
            log.error("a series could not be decided", extra={"series": uid}, exc_info=exc)
            return _failure(uid, exc)

    def _decided_or_later(self, activity: StudyActivity, uid: str, rules: RuleSet) -> RoutedSeries | None:
        """The decision, None while a failed try is to be repeated later, or after the last one the failure."""
        key = (activity.study_instance_uid, uid, activity.received_seq[uid])
        trouble = self._trouble.get(key, _Trouble(0, 0.0))
        if self._clock.boot().seconds < trouble.not_before_s:
            return None
        routed = self._decided(activity, uid, rules)
        if routed.failure and trouble.tries + 1 < TRIES:
            wait_s = RETRY_S * 2**trouble.tries
            self._trouble[key] = _Trouble(trouble.tries + 1, self._clock.boot().seconds + wait_s)
            return None
        return routed

    def _forget_trouble(self, activities: Sequence[StudyActivity]) -> None:
        if self._trouble:
            alive = {
                (activity.study_instance_uid, uid, sequence)
                for activity in activities
                for uid, sequence in activity.received_seq.items()
            }
            self._trouble = {
                key: trouble for key, trouble in self._trouble.items() if key in alive or key[0] in self._waiting
            }


def _look_again_s(study_instance_uid: str) -> float:
    """Half of LOOK_AGAIN_S to all of it: studies that were looked at together are not again."""
    return LOOK_AGAIN_S * (0.5 + zlib.crc32(study_instance_uid.encode()) / 2**33)


def _failure(uid: str, exc: Exception) -> RoutedSeries:
    reason = str(exc) if isinstance(exc, NodeError) else f"unforeseen: {type(exc).__name__}"
    header = SeriesHeader(series_instance_uid=uid, instance_count=0, values={})
    return RoutedSeries(series_instance_uid=uid, header=header, verdicts=(), jobs=(), failure=reason)


def verdict_word(verdict: Verdict) -> str:
    """The verdict as one word for metrics; a plain false outweighs what could not be told."""
    if verdict.matched:
        return "match"
    outcomes = {condition.outcome for condition in verdict.conditions}
    if Condition.FALSE not in outcomes:
        for outcome, word in (
            (Condition.ERROR, "error"),
            (Condition.MISSING, "missing_tag"),
            (Condition.MIXED, "mixed"),
        ):
            if outcome in outcomes:
                return word
    return "nomatch"
