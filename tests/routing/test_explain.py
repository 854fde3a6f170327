"""Verdicts and replays as text: complete, in 100 columns, and readable."""

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from dicom_node.model import (
    Condition,
    ConditionResult,
    SeriesView,
    Verdict,
)
from dicom_node.routing.explain import render_replay, render_verdicts
from dicom_node.routing.replay import replay
from dicom_node.routing.rules import RuleSet

RulesOf = Callable[..., RuleSet]
View = Callable[..., SeriesView]

CHEST = """
rule: chest
when:
  - Modality in ["CR", "DX"]
  - view in ["PA", "AP"]
  - SliceThickness < 5.0
run: {engine: cxr-findings, priority: urgent, results: [sr]}
"""
CT = "rule: ct\nwhen: ['Modality == \"CT\"']\nrun: {engine: ct-abdomen, results: [seg, sr]}\nsend: {to: [PACS]}"


def verdicts_of(rules: RuleSet, view: SeriesView, now: datetime) -> tuple[Verdict, ...]:
    return rules.evaluate(view, now=now, destination_of=lambda title: None).verdicts


def test_an_explanation_reads_like_this(rules_of: RulesOf, series_view: View, noon: datetime) -> None:
    view = series_view(Modality="CT", SliceThickness="thin", values={"ViewPosition": ("PA", "LL")}, count=2)
    assert render_verdicts(verdicts_of(rules_of(CHEST, CT), view, noon)) == (
        """\
Series 1.2.3.4
  matched: ct

  - chest: did not match
      Modality in ["CR", "DX"]: Modality is 'CT'; it would have to be one of "CR", "DX" (3 of 3
      conditions do not hold)
      FALSE    Modality in ["CR", "DX"]
               -> Modality is 'CT'; it would have to be one of "CR", "DX"
      MIXED    view in ["PA", "AP"]
               -> view has 2 different values in the series, by ViewPosition: 'PA', 'LL'; all would
                  have to agree, or the condition to ask for the list: values.view.exists(v, ...)
      ERROR    SliceThickness < 5.0
               -> the values are not of the kinds this operation compares (it saw SliceThickness =
                  'thin'); SliceThickness is a number; the condition or the value has to be
                  corrected

  + ct: MATCHED
      all conditions hold
      true     Modality == "CT"
               -> Modality = 'CT'
"""
    )


def test_a_study_without_verdicts_says_so() -> None:
    assert render_verdicts(()).startswith("No verdicts:")


def test_series_are_grouped_in_the_order_they_come() -> None:
    verdicts = [
        Verdict(rule=rule, series_instance_uid=uid, matched=False, reason="because", conditions=())
        for rule in ("a", "b")
        for uid in ("1.2.9", "1.2.1")
    ]
    text = render_verdicts(verdicts)
    assert [line for line in text.splitlines() if line.startswith("Series")] == ["Series 1.2.9", "Series 1.2.1"]
    assert text.count("no rule matched") == 2
    assert text.count("- a: did not match") == text.count("- b: did not match") == 2


@pytest.mark.parametrize("width", [60, 100])
def test_lines_stay_within_the_width(width: int) -> None:
    result = ConditionResult(
        expression="Modality == 'CT' &&\n   Rows > 100 || " + " || ".join(f"Rows == {n}" for n in range(60)),
        outcome=Condition.FALSE,
        values={},
        explanation="words " * 60,
    )
    verdict = Verdict(rule="a", series_instance_uid="1.2", matched=False, reason="reason " * 40, conditions=(result,))
    text = render_verdicts([verdict], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "Modality == 'CT' && Rows > 100" in text


# --- replay --------------------------------------------------------------------------------------------------------


def nobody(calling_ae_title: str) -> None:
    return None


def test_a_replay_counts_what_a_changed_set_gains_and_loses(rules_of: RulesOf, series_view: View) -> None:
    old = rules_of(CT)
    new = rules_of(
        CT.replace('"CT"', '"MR"').replace("rule: ct", "rule: mr"),
        CT.replace('== "CT"', 'in ["CT", "PT"]').replace("[seg, sr]", "[sr]"),
    )
    views = [series_view(Modality=modality) for modality in ("CT", "CT", "MR", "PT", "US")]
    report = replay(views, old, new, destination_of=nobody)
    assert (report.series, report.matched_before, report.matched_after, report.differing) == (5, 2, 4, 4)
    assert (report.gained, report.lost, report.changed) == ({"mr": 1, "ct": 1}, {}, {"ct": 2})
    assert dict(report.differences[0].changed) == {"ct": "results [seg, sr] becomes [sr]"}
    text = render_replay(report)
    assert text.startswith("5 series replayed: 4 would be routed differently\n")
    assert "ct  +1 -0 ~2" in text
    assert "    + mr: all conditions hold" in text


def test_a_replay_says_why_a_series_is_lost(rules_of: RulesOf, series_view: View) -> None:
    report = replay(
        [series_view(Modality="CT")], rules_of(CT), rules_of(CT.replace('"CT"', '"MR"')), destination_of=nobody
    )
    assert report.lost == {"ct": 1}
    assert "Modality is 'CT'" in report.differences[0].lost["ct"]
    gone = replay([series_view(Modality="CT")], rules_of(CT), rules_of(), destination_of=nobody)
    assert gone.differences[0].lost == {"ct": "there is no such rule any more"}


def test_a_replay_without_a_set_before_counts_everything_as_gained(rules_of: RulesOf, series_view: View) -> None:
    report = replay([series_view(Modality="CT")], None, rules_of(CT), destination_of=nobody)
    assert (report.gained, report.matched_before) == ({"ct": 1}, 0)


def test_a_replay_of_the_same_rules_differs_in_nothing(rules_of: RulesOf, series_view: View) -> None:
    report = replay([series_view(Modality="CT")] * 3, rules_of(CT), rules_of(CT), destination_of=nobody)
    assert (report.series, report.differing, report.differences) == (3, 0, ())
    assert render_replay(report) == "3 series replayed: 0 would be routed differently\n"


def test_a_replay_keeps_a_bounded_list_and_counts_the_rest(rules_of: RulesOf, series_view: View) -> None:
    views = (series_view(Modality="CT") for _ in range(20))
    report = replay(views, None, rules_of(CT), destination_of=nobody, max_differences=3)
    assert (report.differing, len(report.differences)) == (20, 3)
    assert render_replay(report).endswith("... and 17 more series\n")


def test_a_replay_happens_at_the_time_the_series_came(rules_of: RulesOf, series_view: View) -> None:
    at_noon = rules_of("rule: noon\nwhen: [now.getHours() == 12]\nrun: {engine: ct-abdomen, results: [sr]}")
    assert replay([series_view()], None, at_noon, destination_of=nobody).gained == {"noon": 1}
    east = timezone(timedelta(hours=3))
    assert replay([series_view()], None, at_noon, destination_of=nobody, zone=east).gained == {}
