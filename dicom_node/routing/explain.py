"""Verdicts and replays as text, for a person at a terminal: `dicom-node rules explain` and `rules replay`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from dicom_node.model import Condition, ConditionResult, Verdict
from dicom_node.routing.replay import ReplayReport

__all__ = ["render_replay", "render_verdicts"]

_LABELS = {
    Condition.TRUE: "true",
    Condition.FALSE: "FALSE",
    Condition.MISSING: "MISSING",
    Condition.MIXED: "MIXED",
    Condition.ERROR: "ERROR",
}
_LABEL_WIDTH = 9


def render_verdicts(verdicts: Sequence[Verdict], *, width: int = 100) -> str:
    """Every rule and condition of every series, the values seen and what would change it; lines of at most `width`
    columns where words allow (a UID is never broken). Series in the order of their first verdict.
    """
    if not verdicts:
        return "No verdicts: nothing of this study was routed yet, or there were no rules when it was.\n"
    series = dict.fromkeys(verdict.series_instance_uid for verdict in verdicts)
    return "\n".join(
        "\n".join(_series(uid, [v for v in verdicts if v.series_instance_uid == uid], width)) + "\n" for uid in series
    )


def _series(uid: str, verdicts: Sequence[Verdict], width: int) -> Iterator[str]:
    yield f"Series {uid}"
    matched = [verdict.rule for verdict in verdicts if verdict.matched]
    yield from _wrapped(f"matched: {', '.join(matched)}" if matched else "no rule matched", "  ", "    ", width)
    for verdict in verdicts:
        yield ""
        yield f"  {'+' if verdict.matched else '-'} {verdict.rule}: {'MATCHED' if verdict.matched else 'did not match'}"
        yield from _wrapped(verdict.reason, "      ", "      ", width)
        for result in verdict.conditions:
            yield from _condition(result, width)


def _condition(result: ConditionResult, width: int) -> Iterator[str]:
    label = f"      {_LABELS[result.outcome]:<{_LABEL_WIDTH}}"
    under = " " * len(label)
    yield from _wrapped(" ".join(result.expression.split()), label, under, width)
    yield from _wrapped(result.explanation, f"{under}-> ", f"{under}   ", width)


def render_replay(report: ReplayReport, *, width: int = 100) -> str:
    """What a changed rule set would have done: totals, each rule that gains or loses, then every series."""
    lines = [f"{report.series} series replayed: {report.differing} would be routed differently"]
    rules = sorted({*report.gained, *report.lost, *report.changed})
    longest = max(map(len, rules), default=0)
    for rule in rules:
        counts = f"+{report.gained.get(rule, 0)} -{report.lost.get(rule, 0)} ~{report.changed.get(rule, 0)}"
        lines.append(f"  {rule:<{longest}}  {counts}   (gained, lost, run otherwise)")
    for difference in report.differences:
        lines += ["", f"Study {difference.study_instance_uid}", f"  series {difference.series_instance_uid}"]
        for sign, entries in (("+", difference.gained), ("-", difference.lost), ("~", difference.changed)):
            for rule, reason in entries.items():
                lines += _wrapped(f"{rule}: {reason}", f"    {sign} ", "      ", width)
    if report.differing > len(report.differences):
        lines += ["", f"... and {report.differing - len(report.differences)} more series"]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, first: str, then: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]
