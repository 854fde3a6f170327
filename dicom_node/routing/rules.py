"""Rules and rule sets: which of them match a series, why or why not, and the jobs that follow. Pure.

A rule's conditions must all hold. Several rules may match one series; a rule with `stop` ends the search, a rule with
`fallback` is asked only when no other matched. Every rule leaves a verdict on every series, with every condition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from dicom_node.model import (
    ConditionResult,
    LatePolicy,
    Origin,
    PlannedJob,
    Priority,
    SendWhat,
    SeriesView,
    Verdict,
)
from dicom_node.routing.conditions import Outcome, evaluate_condition
from dicom_node.routing.expressions import Expression
from dicom_node.routing.variables import Variables

__all__ = ["SENDER", "Evaluation", "Rule", "RuleSet", "unreachable_senders"]

SENDER = "sender"
"""The destination name that stands for the AE the images came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule as it stands in its file. `engine` '' runs nothing; `destinations` may hold `SENDER`."""

    name: str
    description: str = ""
    conditions: tuple[Expression, ...] = ()
    allowed_missing: frozenset[str] = frozenset()
    engine: str = ""
    priority: Priority = Priority.ROUTINE
    results: tuple[str, ...] = ()
    destinations: tuple[str, ...] = ()
    send_what: SendWhat = SendWhat.RESULTS
    late_instances: LatePolicy = LatePolicy.RERUN
    stop: bool = False
    fallback: bool = False
    any_origin: bool = False
    file: Path = field(default=Path(), compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a rule set says about one series: a verdict of every rule, and the jobs of those that matched."""

    verdicts: tuple[Verdict, ...]
    jobs: tuple[PlannedJob, ...]

    @property
    def reason(self) -> str:
        """Why nothing matched, '' if a rule did."""
        if any(verdict.matched for verdict in self.verdicts):
            return ""
        return "no rule matched" if self.verdicts else "there are no rules: the node is a plain archive"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """Rules in the order they are asked. `digest` changes when what they decide may change, not with comments."""

    rules: tuple[Rule, ...]
    digest: str

    def evaluate(self, view: SeriesView, *, now: datetime, destination_of: Callable[[str], str | None]) -> Evaluation:
        """Ask every rule about one series. Never raises for what the series holds.

        `now` is the variable of that name: its hours are those of its own time zone. `destination_of` maps the
        calling AE title to the name of a configured destination, for `send: {to: [sender]}`.
        """
        variables = Variables(view, now)
        asked = any(SENDER in rule.destinations for rule in self.rules)
        sender = destination_of(view.source.calling_ae_title) if asked else None
        verdicts: dict[str, Verdict] = {}
        jobs: list[PlannedJob] = []
        stopped_by = matched_before = ""
        for rule in sorted(self.rules, key=lambda rule: rule.fallback):
            outcomes = [evaluate_condition(c, variables, rule.allowed_missing) for c in rule.conditions]
            refusal = _refusal(rule, view, sender, outcomes, stopped_by, matched_before)
            if not refusal:
                jobs.append(_job(rule, view, sender))
                stopped_by = rule.name if rule.stop else stopped_by
                matched_before = matched_before if rule.fallback else matched_before or rule.name
            verdicts[rule.name] = Verdict(
                rule=rule.name,
                series_instance_uid=view.header.series_instance_uid,
                matched=not refusal,
                reason=refusal or _agreement(rule, view, sender),
                conditions=tuple(outcome.result for outcome in outcomes),
            )
        return Evaluation(verdicts=tuple(verdicts[rule.name] for rule in self.rules), jobs=tuple(jobs))


def unreachable_senders(
    rule_set: RuleSet, peer_titles: Collection[str], destination_titles: Collection[str]
) -> list[str]:
    """One sentence, with file, line and remedy, for each rule whose `sender` can be no configured destination.

    The titles are AE titles. Without peers every AE may send, so that any destination may be the sender's.
    """
    if (not peer_titles and destination_titles) or set(peer_titles) & set(destination_titles):
        return []
    why = "no destination has the AE title of a peer" if destination_titles else "there are no destinations"
    return [
        f"{rule.file}:{rule.line}: rule {rule.name} sends to `{SENDER}`, which can be nobody: {why}. "
        "Add the PACS under `destinations:` with the AE title it sends from, or name a destination in `to:`"
        for rule in rule_set.rules
        if SENDER in rule.destinations
    ]


def _refusal(
    rule: Rule, view: SeriesView, sender: str | None, outcomes: list[Outcome], stopped_by: str, matched_before: str
) -> str:
    """Why the rule does not match, '' if it does."""
    if Origin.RECEIVED not in view.origins and not rule.any_origin:
        return (
            "no instance of the series was received from outside: results of the node and of engines match no rule, "
            "unless it says `origin: any`"
        )
    failed = [outcome.result for outcome in outcomes if not outcome.held]
    if failed:
        return _failures(failed, len(outcomes))
    if stopped_by:
        return f"rule {stopped_by} matched before and says `stop: true`"
    if rule.fallback and matched_before:
        return f"it is a fallback, and rule {matched_before} matched"
    if not rule.engine and not _destinations(rule, sender):
        return f"it only sends, and {_no_destination(view)}"
    return ""


def _failures(failed: list[ConditionResult], count: int) -> str:
    first = failed[0]
    more = f" ({len(failed)} of {count} conditions do not hold)" if len(failed) > 1 else ""
    return f"{first.expression}: {first.explanation}{more}"


def _agreement(rule: Rule, view: SeriesView, sender: str | None) -> str:
    """Why the rule matched, and what the sender's absence among the destinations means."""
    reason = "all conditions hold" if rule.conditions else "it has no conditions"
    if rule.fallback:
        reason = f"{reason}, and no other rule matched"
    if SENDER in rule.destinations and sender is None:
        elsewhere = _destinations(rule, sender)
        stay = f"it sends to {', '.join(elsewhere)} only" if elsewhere else "results stay here"
        reason = f"{reason}; {stay}: {_no_destination(view)}"
    return reason


def _no_destination(view: SeriesView) -> str:
    title = view.source.calling_ae_title
    return f"the sender {title} is no configured destination (add one with `ae_title: {title}` under `destinations:`)"


def _destinations(rule: Rule, sender: str | None) -> tuple[str, ...]:
    """The rule's destinations with the sender's own in place of `sender`, each once."""
    names = [sender if name == SENDER else name for name in rule.destinations]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _job(rule: Rule, view: SeriesView, sender: str | None) -> PlannedJob:
    return PlannedJob(
        rule=rule.name,
        series_instance_uid=view.header.series_instance_uid,
        engine=rule.engine,
        priority=rule.priority,
        results=rule.results,
        destinations=_destinations(rule, sender),
        send_what=rule.send_what,
        late_instances=rule.late_instances,
    )
