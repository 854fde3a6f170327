"""A changed rule set over the history: what would have matched, and would not any more. Runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, tzinfo

from dicom_node.model import PlannedJob, SeriesView
from dicom_node.routing.rules import Evaluation, RuleSet

__all__ = ["ReplayReport", "SeriesDifference", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesDifference:
    """One series on which the two rule sets differ; rule name to the reason of the new verdict."""

    study_instance_uid: str
    series_instance_uid: str
    gained: Mapping[str, str]
    lost: Mapping[str, str]
    changed: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """Counts of series by rule: `gained` match now, `lost` did before, `changed` match in both but run or send
    something else. `differences` lists at most the asked-for number of series, `differing` counts them all.
    """

    series: int
    matched_before: int
    matched_after: int
    gained: Mapping[str, int]
    lost: Mapping[str, int]
    changed: Mapping[str, int]
    differing: int
    differences: tuple[SeriesDifference, ...]


def replay(
    views: Iterable[SeriesView],
    old: RuleSet | None,
    new: RuleSet,
    *,
    destination_of: Callable[[str], str | None],
    zone: tzinfo = UTC,
    max_differences: int = 1000,
) -> ReplayReport:
    """Ask both rule sets about every series, as of the time it was received, and compare. `old` None: no rules before.

    `zone` is the time zone of `now` in the rules, the one they are evaluated with when they route.
    """
    before = old or RuleSet(rules=(), digest="")
    gained: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    differences: list[SeriesDifference] = []
    series = matched_before = matched_after = differing = 0
    for view in views:
        then = view.received_at.astimezone(zone)
        was = before.evaluate(view, now=then, destination_of=destination_of)
        would = new.evaluate(view, now=then, destination_of=destination_of)
        series += 1
        matched_before += bool(was.jobs)
        matched_after += bool(would.jobs)
        difference = _difference(view, was, would)
        if difference is not None:
            differing += 1
            gained.update(difference.gained.keys())
            lost.update(difference.lost.keys())
            changed.update(difference.changed.keys())
            if len(differences) < max_differences:
                differences.append(difference)
    return ReplayReport(
        series=series,
        matched_before=matched_before,
        matched_after=matched_after,
        gained=dict(gained),
        lost=dict(lost),
        changed=dict(changed),
        differing=differing,
        differences=tuple(differences),
    )


def _difference(view: SeriesView, was: Evaluation, would: Evaluation) -> SeriesDifference | None:
    old_jobs = {job.rule: job for job in was.jobs}
    new_jobs = {job.rule: job for job in would.jobs}
    reasons = {verdict.rule: verdict.reason for verdict in would.verdicts}
    difference = SeriesDifference(
        study_instance_uid=view.study_instance_uid,
        series_instance_uid=view.header.series_instance_uid,
        gained={rule: reasons[rule] for rule in new_jobs.keys() - old_jobs.keys()},
        lost={rule: reasons.get(rule, "there is no such rule any more") for rule in old_jobs.keys() - new_jobs.keys()},
        changed={
            rule: _changes(old_jobs[rule], job)
            for rule, job in new_jobs.items()
            if rule in old_jobs and old_jobs[rule] != job
        },
    )
    return difference if difference.gained or difference.lost or difference.changed else None


def _changes(old: PlannedJob, new: PlannedJob) -> str:
    """Which settings of the job differ, in words."""
    said = []
    for name in ("engine", "priority", "results", "destinations", "send_what", "late_instances"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            said.append(f"{name} {_word(before)} becomes {_word(after)}")
    return "; ".join(said)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(getattr(value, "value", value)) or "none"
