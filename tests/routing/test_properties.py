"""Never a silent non-match: whatever a series holds and whatever a condition says, the verdict gives its reason."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.errors import RuleError
from dicom_node.model import (
    Condition,
    Origin,
    SeriesHeader,
    SeriesView,
    Source,
)
from dicom_node.routing.conditions import evaluate_condition
from dicom_node.routing.expressions import Expression, parse_expression
from dicom_node.routing.load import check_rules, load_rules
from dicom_node.routing.rules import Rule, RuleSet
from dicom_node.routing.variables import Variables

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
KEYWORDS = (
    *("Modality", "Rows", "SliceThickness", "ImageType", "ViewPosition", "BodyPartExamined", "PixelSpacing"),
    *("ViewCodeSequence", "AnatomicRegionSequence", "SeriesDescription", "InstanceNumber", "Laterality"),
)

codes = st.fixed_dictionaries(
    {},
    optional={
        "CodeValue": st.sampled_from(["272479007", "816094009", "x", ""]),
        "CodingSchemeDesignator": st.sampled_from(["SCT", "99X"]),
        "CodeMeaning": st.text(max_size=5),
    },
)
plain: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["CT", "DX", "PA", "CHEST", "ORIGINAL", ""]),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.none(),
    st.booleans(),
)
values: st.SearchStrategy[Any] = st.one_of(plain, st.lists(plain, max_size=4), st.lists(codes, max_size=3), codes)


@st.composite
def views(draw: st.DrawFn) -> SeriesView:
    """Series headers of every shape a reader could hand over, and some it never would."""
    present = draw(
        st.dictionaries(st.sampled_from(KEYWORDS), st.lists(values, min_size=1, max_size=3).map(tuple), max_size=8)
    )
    numbers = st.one_of(st.none(), st.text(max_size=3), st.lists(plain, max_size=7))
    geometry = draw(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "ImagePositionPatient": st.one_of(numbers, st.just([0.0, 0.0, 1.0])),
                    "ImageOrientationPatient": st.one_of(numbers, st.just([1, 0, 0, 0, 1, 0])),
                    "NumberOfFrames": plain,
                },
            ),
            max_size=3,
        )
    )
    return SeriesView(
        study_instance_uid="1.2.3",
        revision=1,
        header=SeriesHeader(
            series_instance_uid="1.2.3.4",
            instance_count=draw(st.integers(min_value=1, max_value=5)),
            values=present,
            missing_in=draw(st.dictionaries(st.sampled_from(KEYWORDS), st.integers(1, 4), max_size=3)),
            geometry=tuple(geometry),
            distinct_counts=draw(st.dictionaries(st.sampled_from(KEYWORDS), st.just(99), max_size=1)),
        ),
        source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="10.0.0.1"),
        origins=draw(st.frozensets(st.sampled_from(Origin), min_size=1)),
        study_series_count=1,
        study_instance_count=1,
        study_modalities=("CT",),
        received_at=NOON,
    )


atoms = st.sampled_from(
    [
        *KEYWORDS,
        *(f"values.{keyword}" for keyword in KEYWORDS),
        *("view", "body_part", "laterality", "values.view", "now"),
        *("series.frame_count", "series.slice_spacing_mm", "study.modalities", "source.calling_ae_title"),
        *("ImageType[2]", "ViewCodeSequence[0].CodeValue", "PixelSpacing[1]"),
    ]
)
literals = st.sampled_from(['"CT"', '"PA"', "5", "0.5", '["CT", "PA"]', "[1, 2.5]", "null", "true"])
comparisons = st.builds(
    "{} {} {}".format, atoms, st.sampled_from(["==", "!=", "<", ">=", "in", "+"]), st.one_of(literals, atoms)
)
calls = st.one_of(
    st.builds('{}.contains("C")'.format, atoms),
    st.builds('{}.matches("^C.*$")'.format, atoms),
    st.builds("{}.size() > 0".format, atoms),
    st.builds("{}.exists(v, v == {})".format, atoms, literals),
    st.builds("{}.all(v, v[0] == {})".format, atoms, literals),
    st.builds("has(values.{})".format, st.sampled_from(KEYWORDS)),
)
conditions = st.recursive(
    st.one_of(comparisons, calls, literals, atoms),
    lambda inner: st.one_of(
        st.builds("({}) && ({})".format, inner, inner),
        st.builds("{} || {}".format, inner, inner),
        st.builds("!({})".format, inner),
        st.builds("({}) ? ({}) : ({})".format, inner, inner, inner),
    ),
    max_leaves=3,
)


@settings(max_examples=80)
@given(text=conditions, view=views(), allowed=st.frozensets(st.sampled_from(KEYWORDS)))
def test_every_condition_ends_in_one_of_five_ways_and_says_why(
    text: str, view: SeriesView, allowed: frozenset[str]
) -> None:
    parsed = parse_expression(text)
    if isinstance(parsed, list):
        assert all(fault.message and fault.remedy and 0 <= fault.offset <= len(text) for fault in parsed)
        return
    outcome = evaluate_condition(parsed, Variables(view, NOON), allowed)
    result = outcome.result
    assert result.outcome in Condition
    assert len(result.explanation) > 5
    assert outcome.held == (result.outcome is Condition.TRUE) or result.outcome is Condition.MISSING
    assert set(result.values) == {reference.name for reference in parsed.references}
    json.dumps(dict(result.values))  # a verdict is kept as JSON


@settings(max_examples=40)
@given(texts=st.lists(conditions, min_size=1, max_size=4), view=views(), stop=st.booleans(), any_origin=st.booleans())
def test_every_rule_leaves_a_verdict_with_a_reason_on_every_series(
    texts: list[str], view: SeriesView, stop: bool, any_origin: bool
) -> None:
    compiled = [parsed for text in texts if isinstance(parsed := parse_expression(text), Expression)]
    rules = tuple(
        Rule(name=f"r{n}", conditions=(c,), engine="e", results=("sr",), stop=stop, any_origin=any_origin)
        for n, c in enumerate(compiled)
    )
    fallback = Rule(name="rest", fallback=True, destinations=("PACS",))
    evaluation = RuleSet(rules=(*rules, fallback), digest="").evaluate(
        view, now=NOON, destination_of=lambda title: None
    )
    assert [verdict.rule for verdict in evaluation.verdicts] == [*(rule.name for rule in rules), "rest"]
    assert [job.rule for job in evaluation.jobs] == [v.rule for v in evaluation.verdicts if v.matched]
    for verdict in evaluation.verdicts:
        assert len(verdict.reason) > 5
        if verdict.matched:
            held = (Condition.TRUE, Condition.MISSING)
            assert all(condition.outcome in held for condition in verdict.conditions)
    if Origin.RECEIVED not in view.origins and not any_origin:
        assert evaluation.jobs == ()
    assert bool(evaluation.reason) != bool(evaluation.jobs)


texts = st.sampled_from(["Modality", "BodyPartExamined", "SeriesDescription"])
words = st.sampled_from(["CT", "PA", "CHEST", ""])
simple = st.one_of(
    st.builds('{} {} "{}"'.format, texts, st.sampled_from(["==", "!=", "<"]), words),
    st.builds('{}.contains("{}")'.format, texts, words),
)
joined = st.builds("{}({}) {} {}".format, st.sampled_from(["", "!"]), simple, st.sampled_from(["&&", "||"]), simple)


@settings(max_examples=200)
@given(text=joined, here=st.dictionaries(texts, words.filter(bool), max_size=2), absent=texts, value=words)
def test_what_a_condition_decides_without_an_attribute_it_decides_with_it(
    text: str, here: dict[str, str], absent: str, value: str
) -> None:
    """TRUE or FALSE in spite of an absent name means that the name does not matter, whatever it were."""
    expression = parse_expression(text)
    assert isinstance(expression, Expression)

    def ask(present: dict[str, str]) -> Condition:
        header = SeriesHeader(
            series_instance_uid="1.2", instance_count=1, values={key: (word,) for key, word in present.items()}
        )
        view = SeriesView(
            study_instance_uid="1.2.3",
            revision=1,
            header=header,
            source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="10.0.0.1"),
            origins=frozenset({Origin.RECEIVED}),
            study_series_count=1,
            study_instance_count=1,
            study_modalities=("CT",),
            received_at=NOON,
        )
        return evaluate_condition(expression, Variables(view, NOON), frozenset()).result.outcome

    here.pop(absent, None)
    without = ask(here)
    assert without in (Condition.TRUE, Condition.FALSE, Condition.MISSING)
    if without is not Condition.MISSING and value:
        assert ask({**here, absent: value}) is without


@settings(max_examples=80)
@given(data=st.one_of(st.binary(max_size=200), st.text(alphabet="rule: when[]{}-&*!'\"\n\t|>#a1", max_size=200)))
def test_any_file_is_a_rule_or_a_problem_with_a_line(data: bytes | str, tmp_path: Path) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    (tmp_path / "10.yaml").write_bytes(raw)
    problems = check_rules(tmp_path, engines=(), destinations=())
    for problem in problems:
        assert 1 <= problem.line <= raw.count(b"\n") + raw.count(b"\r") + 1
        assert problem.remedy
    try:
        loaded = load_rules(tmp_path, engines=(), destinations=())
    except RuleError as exc:
        assert str(exc) == str(problems[0])
    else:
        assert problems == []
        assert len(loaded.rules) <= 1


@settings(max_examples=150)
@given(text=st.text(alphabet="aMR.()[]{}'\"\\|&!=<> 19e+-?:,\n/", max_size=60))
def test_any_text_is_a_condition_or_a_fault_inside_it(text: str) -> None:
    parsed = parse_expression(text)
    if isinstance(parsed, list):
        assert parsed
        assert all(0 <= fault.offset <= len(text) for fault in parsed)


@settings(max_examples=20)
@given(texts=st.lists(conditions, min_size=2, max_size=4, unique=True), view=views(), data=st.data())
def test_the_order_of_rules_changes_no_verdict_of_any(texts: list[str], view: SeriesView, data: st.DataObject) -> None:
    """Without `stop` and fallbacks each rule is asked for itself; and asked again it says the same."""
    compiled = [parsed for text in texts if isinstance(parsed := parse_expression(text), Expression)]
    rules = [Rule(name=f"r{n}", conditions=(c,), engine="e", results=("sr",)) for n, c in enumerate(compiled)]

    def verdicts(asked: list[Rule]) -> dict[str, str]:
        found = RuleSet(rules=tuple(asked), digest="").evaluate(view, now=NOON, destination_of=lambda title: None)
        return {verdict.rule: repr(verdict) for verdict in found.verdicts}

    first = verdicts(rules)
    assert first == verdicts(rules) == verdicts(data.draw(st.permutations(rules)))
