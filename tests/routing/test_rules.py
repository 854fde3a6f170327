"""Rule sets on series: matching, order, stop, fallback, the loop guard, the sender, and the jobs that follow."""

from collections.abc import Callable
from datetime import datetime

import pytest

from dicom_node.model import (
    Condition,
    LatePolicy,
    Origin,
    PlannedJob,
    Priority,
    SendWhat,
    SeriesView,
    Verdict,
)
from dicom_node.routing.rules import Evaluation, RuleSet, unreachable_senders

RulesOf = Callable[..., RuleSet]
View = Callable[..., SeriesView]

CHEST = """
rule: chest
when:
  - Modality in ["CR", "DX"]
  - PresentationIntentType != "FOR PROCESSING"
  - view in ["PA", "AP"]
missing: {PresentationIntentType: allow, view: refuse}
run: {engine: cxr-findings, priority: urgent, results: [sr]}
send: {to: [PACS], what: results}
late_instances: ignore
"""


def rule(name: str, *lines: str, when: str = '- Modality == "CT"') -> str:
    run = "run: {engine: ct-abdomen, results: [seg, sr]}"
    return "\n".join([f"rule: {name}", "when:", f"  {when}", run, *lines])


@pytest.fixture
def evaluate(noon: datetime) -> Callable[..., Evaluation]:
    def run(rules: RuleSet, view: SeriesView, destinations: dict[str, str] | None = None) -> Evaluation:
        return rules.evaluate(view, now=noon, destination_of=(destinations or {}).get)

    return run


def by_rule(evaluation: Evaluation) -> dict[str, Verdict]:
    return {verdict.rule: verdict for verdict in evaluation.verdicts}


def test_a_rule_whose_conditions_all_hold_plans_its_job(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    evaluation = evaluate(rules_of(CHEST), series_view(Modality="DX", ViewPosition="PA"))
    assert evaluation.jobs == (
        PlannedJob(
            rule="chest",
            series_instance_uid="1.2.3.4",
            engine="cxr-findings",
            priority=Priority.URGENT,
            results=("sr",),
            destinations=("PACS",),
            send_what=SendWhat.RESULTS,
            late_instances=LatePolicy.IGNORE,
        ),
    )
    (verdict,) = evaluation.verdicts
    assert (verdict.matched, verdict.reason) == (True, "all conditions hold")
    assert [c.outcome for c in verdict.conditions] == [Condition.TRUE, Condition.MISSING, Condition.TRUE]
    assert verdict.conditions[1].explanation.endswith("the rule allows that")
    assert evaluation.reason == ""


def test_a_missing_attribute_refuses_unless_it_is_allowed(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    evaluation = evaluate(rules_of(CHEST), series_view(Modality="DX"))
    assert evaluation.jobs == ()
    assert evaluation.reason == "no rule matched"
    assert "view is unknown" in evaluation.verdicts[0].reason
    default = CHEST.replace("missing: {PresentationIntentType: allow, view: refuse}\n", "")
    refused = evaluate(rules_of(default), series_view(Modality="DX", ViewPosition="PA"))
    assert "missing: {PresentationIntentType: allow}" in refused.verdicts[0].reason


def test_a_condition_with_two_missing_names_needs_both_allowed(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    text = rule("two", "missing: {Rows: allow}", when="- Rows > 1 && Columns > 1")
    evaluation = evaluate(rules_of(text), series_view(Modality="CT"))
    assert evaluation.jobs == ()
    assert "`missing: {Columns: allow}`" in evaluation.verdicts[0].reason
    both = text.replace("{Rows: allow}", "{Rows: allow, Columns: allow}")
    assert len(evaluate(rules_of(both), series_view(Modality="CT")).jobs) == 1


def test_a_refusal_names_the_first_condition_and_counts_the_others(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    (verdict,) = evaluate(rules_of(CHEST), series_view(Modality="CT")).verdicts
    assert verdict.reason == (
        'Modality in ["CR", "DX"]: Modality is \'CT\'; it would have to be one of "CR", "DX" '
        "(2 of 3 conditions do not hold)"
    )
    assert len(verdict.conditions) == 3


def test_several_rules_may_match_in_the_order_of_the_files(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    rules = rules_of(rule("b"), rule("a") + "\n---\n" + rule("c"))
    assert [job.rule for job in evaluate(rules, series_view(Modality="CT")).jobs] == ["b", "a", "c"]


def test_a_rule_that_stops_ends_the_search_and_the_others_say_so(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    rules = rules_of(rule("a"), rule("b", "stop: true"), rule("c"), rule("d", when='- Modality == "MR"'))
    evaluation = evaluate(rules, series_view(Modality="CT"))
    assert [job.rule for job in evaluation.jobs] == ["a", "b"]
    verdicts = by_rule(evaluation)
    assert verdicts["c"].reason == "rule b matched before and says `stop: true`"
    assert verdicts["c"].conditions[0].outcome is Condition.TRUE
    assert verdicts["d"].reason.startswith('Modality == "MR"')


def test_a_rule_that_stops_but_does_not_match_stops_nothing(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    rules = rules_of(rule("a", "stop: true", when='- Modality == "MR"'), rule("b"))
    assert [job.rule for job in evaluate(rules, series_view(Modality="CT")).jobs] == ["b"]


def test_a_fallback_is_asked_only_when_no_other_rule_matched(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    fallback = "rule: rest\nfallback: true\nsend: {to: [ARCHIVE]}"
    rules = rules_of(fallback, rule("ct"))
    matched = evaluate(rules, series_view(Modality="CT"))
    assert [job.rule for job in matched.jobs] == ["ct"]
    assert by_rule(matched)["rest"].reason == "it is a fallback, and rule ct matched"
    rest = evaluate(rules, series_view(Modality="MR"))
    assert [(job.rule, job.engine, job.destinations, job.send_what) for job in rest.jobs] == [
        ("rest", "", ("ARCHIVE",), SendWhat.SOURCE)
    ]
    assert by_rule(rest)["rest"].reason == "it has no conditions, and no other rule matched"


def test_several_fallbacks_may_match(rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]) -> None:
    one = "rule: one\nfallback: true\nsend: {to: [ARCHIVE]}"
    two = "rule: two\nfallback: true\nwhen: ['Modality == \"MR\"']\nsend: {to: [PACS]}"
    evaluation = evaluate(rules_of(one, two), series_view(Modality="MR"))
    assert [job.rule for job in evaluation.jobs] == ["one", "two"]


@pytest.mark.parametrize("origin", [Origin.PRODUCED, Origin.RETURNED])
def test_what_the_node_produced_or_an_engine_returned_matches_no_rule(
    origin: Origin, rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    fallback = "rule: rest\nfallback: true\nsend: {to: [ARCHIVE]}"
    rules = rules_of(rule("ct"), rule("all", "origin: any"), fallback)
    evaluation = evaluate(rules, series_view(Modality="CT", origins=frozenset({origin})))
    assert [job.rule for job in evaluation.jobs] == ["all"]
    for name in ("ct", "rest"):
        assert "unless it says `origin: any`" in by_rule(evaluation)[name].reason


def test_a_series_with_received_instances_is_evaluated_even_if_others_are_ours(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    both = series_view(Modality="CT", origins=frozenset({Origin.RECEIVED, Origin.PRODUCED}))
    assert len(evaluate(rules_of(rule("ct")), both).jobs) == 1


def test_the_sender_stands_for_the_destination_of_its_ae_title(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    rules = rules_of(rule("ct", "send: {to: [sender, PACS, ARCHIVE]}"))
    evaluation = evaluate(rules, series_view(Modality="CT", sender="PACS1"), {"PACS1": "PACS"})
    assert evaluation.jobs[0].destinations == ("PACS", "ARCHIVE")
    assert evaluation.verdicts[0].reason == "all conditions hold"


def test_a_sender_that_is_no_destination_still_matches_and_says_what_to_configure(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    evaluation = evaluate(rules_of(rule("ct", "send: {to: [sender]}")), series_view(Modality="CT", sender="CT9"))
    assert [job.destinations for job in evaluation.jobs] == [()]
    assert evaluation.verdicts[0].matched
    assert evaluation.verdicts[0].reason == (
        "all conditions hold; results stay here: the sender CT9 is no configured destination "
        "(add one with `ae_title: CT9` under `destinations:`)"
    )
    other = evaluate(rules_of(rule("ct", "send: {to: [sender, PACS]}")), series_view(Modality="CT", sender="CT9"))
    assert other.jobs[0].destinations == ("PACS",)
    assert "it sends to PACS only: the sender CT9" in other.verdicts[0].reason


def test_a_rule_that_could_only_send_to_an_unknown_sender_does_not_match(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    rules = rules_of("rule: back\nwhen: ['Modality == \"CT\"']\nsend: {to: [sender], what: source}")
    evaluation = evaluate(rules, series_view(Modality="CT", sender="CT9"))
    assert evaluation.jobs == ()
    assert evaluation.verdicts[0].reason.startswith("it only sends, and the sender CT9 is no configured destination")


def test_without_rules_nothing_matches_and_the_reason_is_plain(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    evaluation = evaluate(rules_of(), series_view(Modality="CT"))
    assert (evaluation.verdicts, evaluation.jobs) == ((), ())
    assert evaluation.reason == "there are no rules: the node is a plain archive"


def test_rules_may_ask_for_the_time_and_the_sender(
    rules_of: RulesOf, series_view: View, evaluate: Callable[..., Evaluation]
) -> None:
    text = rule("day", when='- now.getHours() >= 7 && now.getHours() < 19 && source.calling_ae_title != "RESEARCH"')
    assert len(evaluate(rules_of(text), series_view()).jobs) == 1
    assert evaluate(rules_of(text), series_view(sender="RESEARCH")).jobs == ()


def test_the_digest_changes_with_what_the_rules_say_and_not_with_comments(rules_of: RulesOf) -> None:
    digest = rules_of(CHEST).digest
    assert rules_of("# a comment\n" + CHEST + "description: other words\n").digest == digest
    for old, new in (
        ('"FOR PROCESSING"', '"OTHER"'),
        ("view: refuse", "view: allow"),
        ("urgent", "routine"),
        ("[PACS]", "[ARCHIVE]"),
        ("late_instances: ignore", "late_instances: rerun"),
        ("late_instances: ignore", "stop: true"),
        ("rule: chest", "rule: chest2"),
    ):
        assert rules_of(CHEST.replace(old, new)).digest != digest, new
    assert rules_of(rule("a"), rule("b")).digest != rules_of(rule("b"), rule("a")).digest


# --- a sender that can be nobody -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "destinations", "warned"),
    [
        ((), (), True),
        ((), ("PACS",), False),  # anybody may send
        (("CT1",), (), True),
        (("CT1",), ("PACS",), True),
        (("CT1", "PACS"), ("PACS",), False),
    ],
)
def test_a_sender_that_can_be_no_destination_is_told_with_file_and_remedy(
    peers: tuple[str, ...], destinations: tuple[str, ...], warned: bool, rules_of: Callable[..., RuleSet]
) -> None:
    rules = rules_of(
        "rule: back\nwhen: [Modality == 'CT']\nrun: {engine: ct-abdomen, results: [sr]}\nsend: {to: [sender]}\n",
        "rule: named\nwhen: [Modality == 'CT']\nrun: {engine: ct-abdomen, results: [sr]}\nsend: {to: [PACS]}\n",
    )
    told = unreachable_senders(rules, peers, destinations)
    assert len(told) == warned
    if warned:
        assert "10.yaml:1: rule back" in told[0] and "`destinations:`" in told[0]
