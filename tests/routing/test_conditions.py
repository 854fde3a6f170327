"""How one condition ends: true, false, missing, mixed or error, and what its explanation says."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from dicom_node.model import Condition, ConditionResult, SeriesView

Ask = Callable[..., ConditionResult]
View = Callable[..., SeriesView]


@pytest.mark.parametrize(
    ("text", "series", "outcome"),
    [
        ('Modality in ["CR", "DX"]', {"Modality": "DX"}, Condition.TRUE),
        ('Modality in ["CR", "DX"]', {"Modality": "CT"}, Condition.FALSE),
        ("SliceThickness < 5.0", {"SliceThickness": 3}, Condition.TRUE),  # whole and broken numbers compare
        ("SliceThickness < 5", {"SliceThickness": 4.5}, Condition.TRUE),
        ("SliceThickness == 5", {"SliceThickness": "5.0"}, Condition.TRUE),  # DS is a number even when kept as text
        ("Rows == 512.0", {"Rows": 512}, Condition.TRUE),
        ("InstanceNumber > 3", {"InstanceNumber": " 4 "}, Condition.TRUE),
        ('StudyDate < "20260101"', {"StudyDate": "20251231"}, Condition.TRUE),  # DA stays text, and sorts
        ('PatientAge == "045Y"', {"PatientAge": "045Y"}, Condition.TRUE),
        ('"LOCALIZER" in ImageType', {"ImageType": ["ORIGINAL", "LOCALIZER"]}, Condition.TRUE),
        ('ImageType[0] == "DERIVED"', {"ImageType": "DERIVED"}, Condition.TRUE),  # always a list, by its VM
        ("PixelSpacing[0] < 1.0 && PixelSpacing[1] < 1.0", {"PixelSpacing": [0.5, 0.5]}, Condition.TRUE),
        ('SeriesDescription.matches("(?i)thin")', {"SeriesDescription": "Abd THIN 1mm"}, Condition.TRUE),
        ('ViewCodeSequence[0].CodeValue == "1"', {"ViewCodeSequence": [{"CodeValue": "1"}]}, Condition.TRUE),
        ('ViewCodeSequence.exists(c, c.CodeValue == "1")', {"ViewCodeSequence": [{"CodeValue": "1"}]}, Condition.TRUE),
        ("series.instance_count == 1 && series.frame_count == 1", {}, Condition.TRUE),
        ("study.instance_count == 40 && study.series_count == 2 && study.revision == 1", {}, Condition.TRUE),
        ('study.modalities.exists(m, m == "SR") && !study.identity_conflict', {}, Condition.TRUE),
        ('source.calling_ae_title == "CT1" && source.called_ae_title == "DICOM_NODE"', {}, Condition.TRUE),
        ('source.address.startsWith("10.")', {}, Condition.TRUE),
    ],
)
def test_conditions_see_the_series_its_study_and_its_source(
    text: str, series: dict[str, Any], outcome: Condition, ask: Ask, series_view: View
) -> None:
    assert ask(text, series_view(**series)).outcome is outcome


def test_the_hours_of_now_are_those_of_its_own_time_zone(ask: Ask, series_view: View) -> None:
    late = datetime(2026, 3, 2, 23, 30, tzinfo=timezone(timedelta(hours=2)))
    result = ask("now.getHours() >= 22 && now < timestamp('2026-03-02T22:00:00Z')", series_view(), now=late)
    assert result.outcome is Condition.TRUE
    assert result.values == {"now": "2026-03-02T23:30:00+02:00"}


# --- false ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "series", "explanation"),
    [
        ('Modality == "CT"', {"Modality": "MR"}, "Modality is 'MR'; it would have to be \"CT\""),
        ('Modality != "CT"', {"Modality": "CT"}, "Modality is 'CT'; any other value would do"),
        (
            'Modality in ["CR", "DX"]',
            {"Modality": "CT"},
            'Modality is \'CT\'; it would have to be one of "CR", "DX"',
        ),
        ("Rows < 10", {"Rows": 512}, "Rows is 512; it would have to be below 10"),
        ("Rows <= 10", {"Rows": 512}, "Rows is 512; it would have to be at most 10"),
        ("Rows > 1000", {"Rows": 512}, "Rows is 512; it would have to be above 1000"),
        ("Rows >= 1000", {"Rows": 512}, "Rows is 512; it would have to be at least 1000"),
        (
            "Rows > 100 && Columns > 1000 && BitsStored == 12",
            {"Rows": 512, "Columns": 512, "BitsStored": 16},
            "Columns is 512; it would have to be above 1000; BitsStored is 16; it would have to be 12",
        ),
        (
            "Rows < 100 || Columns < 100",
            {"Rows": 512, "Columns": 256},
            "Rows is 512; it would have to be below 100; or Columns is 256; it would have to be below 100",
        ),
        (
            'ImageType[2] == "AXIAL"',
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
            "ImageType[2] is 'LOCALIZER'; it would have to be \"AXIAL\"",
        ),
        (
            '!("LOCALIZER" in ImageType)',
            {"ImageType": ["ORIGINAL", "LOCALIZER"]},
            "it is false with ImageType = ['ORIGINAL', 'LOCALIZER']",
        ),
        ("has(values.Rows)", {}, "it is false with values.Rows absent"),
        ("false", {}, "it is always false"),
        (
            "series.frame_count >= 10",
            {},
            "series.frame_count is 1; it would have to be at least 10",
        ),
    ],
)
def test_a_false_condition_says_what_would_have_to_be(
    text: str, series: dict[str, Any], explanation: str, ask: Ask, series_view: View
) -> None:
    result = ask(text, series_view(**series))
    assert (result.outcome, result.explanation) == (Condition.FALSE, explanation)


def test_a_verdict_keeps_the_values_used_in_a_small_form(ask: Ask, series_view: View) -> None:
    view = series_view(
        SeriesDescription="x" * 1000, values={"InstanceNumber": tuple(range(1, 31))}, Modality="CT", Rows=512
    )
    result = ask('SeriesDescription != "" || Rows == 1 || values.InstanceNumber.size() > 1 || Columns == 1', view)
    assert result.outcome is Condition.TRUE
    assert result.values == {
        "SeriesDescription": "x" * 160 + "...",
        "Rows": 512,
        "values.InstanceNumber": [1, 2, 3, 4, 5, 6, 7, 8, "... 22 more"],
        "Columns": None,
    }


# --- missing -------------------------------------------------------------------------------------------------------


def test_an_absent_attribute_ends_as_missing(ask: Ask, series_view: View) -> None:
    result = ask('BodyPartExamined == "CHEST"', series_view(count=3))
    assert result.outcome is Condition.MISSING
    assert result.values == {"BodyPartExamined": None}
    assert result.explanation == (
        "BodyPartExamined is absent in all 3 instances; it would have to be there, "
        "or the rule to say `missing: {BodyPartExamined: allow}`"
    )


@pytest.mark.parametrize("empty", ["", "  ", None, [], ["", ""]])
def test_an_empty_attribute_is_an_absent_one(empty: Any, ask: Ask, series_view: View) -> None:
    result = ask('BodyPartExamined != "CHEST"', series_view(BodyPartExamined=empty))
    assert result.outcome is Condition.MISSING
    assert "BodyPartExamined is empty in the only instance" in result.explanation


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('Modality == "CT" || Rows > 1', Condition.TRUE),  # the rest decides: absence does not matter
        ('Rows > 1 || Modality == "CT"', Condition.TRUE),
        ('Rows > 1 && Modality == "MR"', Condition.FALSE),
        ('Modality == "MR" && Rows > 1', Condition.FALSE),
        ('Modality == "CT" ? true : Rows > 1', Condition.TRUE),
        ('Modality == "MR" || Rows > 1', Condition.MISSING),
        ('Modality == "CT" && Rows > 1', Condition.MISSING),
        ('Modality == "MR" ? true : Rows > 1', Condition.MISSING),
        ("!(Rows > 1)", Condition.MISSING),
        ("has(values.Rows)", Condition.FALSE),
        ("has(values.Rows) && values.Rows.all(r, r > 1)", Condition.FALSE),
        ("values.Rows.all(r, r > 1)", Condition.MISSING),
        ("values.Rows.size() == 0", Condition.MISSING),
    ],
)
def test_absence_matters_only_where_the_result_depends_on_it(
    text: str, outcome: Condition, ask: Ask, series_view: View
) -> None:
    assert ask(text, series_view(Modality="CT")).outcome is outcome


def test_an_attribute_that_some_instances_lack_is_missing_unless_that_is_allowed(ask: Ask, series_view: View) -> None:
    view = series_view(SliceThickness=3.0, count=30, missing_in={"SliceThickness": 2})
    refused = ask("SliceThickness < 5.0", view)
    assert refused.outcome is Condition.MISSING
    assert "SliceThickness is absent in 2 of the instances" in refused.explanation
    allowed = ask("SliceThickness < 5.0", view, allow=("SliceThickness",))
    assert allowed.outcome is Condition.TRUE
    assert allowed.explanation == "SliceThickness = 3.0; SliceThickness is absent in 2 of the instances, allowed"
    assert ask("SliceThickness > 5.0", view, allow=("SliceThickness",)).outcome is Condition.FALSE
    assert ask("values.SliceThickness.all(t, t < 5.0)", view).outcome is Condition.TRUE


def test_a_value_that_is_empty_in_some_instances_is_missing_there(ask: Ask, series_view: View) -> None:
    view = series_view(values={"BodyPartExamined": ("CHEST", "")}, count=2)
    assert ask('BodyPartExamined == "CHEST"', view).outcome is Condition.MISSING


@pytest.mark.parametrize(
    ("text", "series", "why"),
    [
        (
            'ImageType[2] == "AXIAL"',
            {"ImageType": ["ORIGINAL", "PRIMARY"]},
            "ImageType[2] is absent: ImageType has 2 value(s)",
        ),
        (
            'ViewCodeSequence[0].CodeMeaning == "x"',
            {"ViewCodeSequence": [{"CodeValue": "1"}]},
            "ViewCodeSequence[0].CodeMeaning is absent: the item has no CodeMeaning",
        ),
    ],
)
def test_a_path_that_leads_nowhere_is_missing(
    text: str, series: dict[str, Any], why: str, ask: Ask, series_view: View
) -> None:
    result = ask(text, series_view(**series))
    assert result.outcome is Condition.MISSING
    assert why in result.explanation


def test_an_item_of_a_list_without_the_attribute_is_missing(ask: Ask, series_view: View) -> None:
    view = series_view(ViewCodeSequence=[{"CodeValue": "1"}])
    result = ask('ViewCodeSequence.all(c, c.CodeMeaning == "x")', view, allow=("ViewCodeSequence",))
    assert result.outcome is Condition.MISSING
    assert "an item has no CodeMeaning" in result.explanation


# --- mixed ---------------------------------------------------------------------------------------------------------


def test_values_that_differ_within_the_series_end_as_mixed(ask: Ask, series_view: View) -> None:
    view = series_view(values={"ViewPosition": ("PA", "LL")}, count=2)
    result = ask('ViewPosition == "PA"', view)
    assert result.outcome is Condition.MIXED
    assert result.values == {"ViewPosition": ["PA", "LL"]}
    assert result.explanation == (
        "ViewPosition has 2 different values in the series: 'PA', 'LL'; all would have to agree, "
        "or the condition to ask for the list: values.ViewPosition.exists(v, ...)"
    )


def test_a_condition_that_asks_for_the_list_is_not_mixed(ask: Ask, series_view: View) -> None:
    view = series_view(values={"ViewPosition": ("PA", "LL")}, count=2)
    assert ask('values.ViewPosition.exists(v, v == "PA")', view).outcome is Condition.TRUE
    assert ask('values.ViewPosition.all(v, v == "PA")', view).outcome is Condition.FALSE
    assert ask('values.view.exists(v, v == "LL")', view).outcome is Condition.TRUE


def test_mixed_values_do_not_matter_where_the_rest_decides(ask: Ask, series_view: View) -> None:
    view = series_view(Modality="CT", values={"ViewPosition": ("PA", "LL")}, count=2)
    assert ask('Modality == "CT" || ViewPosition == "PA"', view).outcome is Condition.TRUE
    assert ask('Modality == "MR" && ViewPosition == "PA"', view).outcome is Condition.FALSE


def test_mixed_values_are_never_let_pass(ask: Ask, series_view: View) -> None:
    view = series_view(values={"ViewPosition": ("PA", "LL")}, count=2, missing_in={"ViewPosition": 1})
    assert ask('ViewPosition == "PA"', view, allow=("ViewPosition",)).outcome is Condition.MIXED
    assert ask('ViewPosition == "PA" && Rows > 1', view, allow=("ViewPosition", "Rows")).outcome is Condition.MIXED


def test_numbers_written_differently_are_one_value(ask: Ask, series_view: View) -> None:
    view = series_view(values={"SliceThickness": ("5", "5.0", 5)}, count=3)
    assert ask("SliceThickness == 5.0", view).outcome is Condition.TRUE


def test_a_header_that_kept_only_some_values_says_so(ask: Ask, series_view: View) -> None:
    view = series_view(values={"InstanceNumber": tuple(range(64))}, count=300, distinct_counts={"InstanceNumber": 300})
    assert "InstanceNumber has 300 different values" in ask("InstanceNumber == 1", view).explanation
    listed = ask("values.InstanceNumber.exists(n, n == 250)", view)
    assert listed.outcome is Condition.ERROR
    assert "of which only some are kept" in listed.explanation


# --- error ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "series", "part"),
    [
        ("Modality < 5", {"Modality": "CT"}, "(it saw Modality = 'CT'); Modality is text"),
        ("SliceThickness < 5.0", {"SliceThickness": "thin"}, "SliceThickness = 'thin'); SliceThickness is a number"),
        ("Modality", {"Modality": "CT"}, "a condition must be true or false, this one gives 'CT'"),
        ("WindowCenter > 40.0", {"WindowCenter": 40.0}, "WindowCenter is a list of numbers"),
        ("Modality[0] == 'C'", {"Modality": "CT"}, "not of the kinds"),
        ("Modality.exists(m, m == 'C')", {"Modality": "CT"}, "not of the kinds"),
        ("Rows / 0 == 1", {"Rows": 3}, "division by zero"),
        ("Rows + 9223372036854775807 > 1", {"Rows": 3}, "overflow"),
        ("int(SeriesDescription) > 1", {"SeriesDescription": "x"}, "Function 'int' error"),
        ("SeriesDescription.matches(StudyDescription)", {"SeriesDescription": "x", "StudyDescription": "("}, "regex"),
        (
            "ViewCodeSequence == 'x' || ViewCodeSequence < 1",
            {"ViewCodeSequence": [{"CodeValue": "1"}]},
            "list of items",
        ),
        ("BodyPartExamined < 1 && Columns > 3", {"BodyPartExamined": "CHEST"}, "Columns is absent"),
        ("Columns > 3 && BodyPartExamined < 1", {"BodyPartExamined": "CHEST"}, "Columns is absent"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_with_its_reason(
    text: str, series: dict[str, Any], part: str, ask: Ask, series_view: View
) -> None:
    result = ask(text, series_view(**series), allow=("Columns",))
    assert result.outcome is Condition.ERROR
    assert part in result.explanation
    assert result.explanation.endswith("the condition or the value has to be corrected")


# --- bounds --------------------------------------------------------------------------------------------------------


def test_a_pattern_that_ruins_other_matchers_takes_no_time(ask: Ask, series_view: View) -> None:
    view = series_view(SeriesDescription="a" * 4000 + "b")
    began = time.perf_counter()
    result = ask('SeriesDescription.matches("^(a|a)*(a+)+$")', view)
    assert result.outcome is Condition.FALSE
    assert time.perf_counter() - began < 1.0


def test_lists_beyond_their_bound_are_an_error_not_a_wait(ask: Ask, series_view: View) -> None:
    many = series_view(values={"InstanceNumber": tuple(range(5000))}, count=5000)
    began = time.perf_counter()
    assert ask("values.InstanceNumber.all(n, n >= 0)", many).outcome is Condition.ERROR
    some = series_view(values={"InstanceNumber": tuple(range(500))}, count=500)
    assert ask("values.InstanceNumber.all(n, n >= 0)", some).outcome is Condition.TRUE
    nested = "values.InstanceNumber.all(a, values.InstanceNumber.all(b, a + b >= 0))"
    assert "too many for nested macros" in ask(nested, some).explanation
    few = series_view(values={"InstanceNumber": tuple(range(128))}, count=128)
    assert ask(nested, few).outcome is Condition.TRUE
    assert time.perf_counter() - began < 2.0


def test_now_must_carry_its_time_zone_to_compare_with_timestamps(ask: Ask, series_view: View) -> None:
    text = "now > timestamp('2026-03-02T11:59:00Z')"
    assert ask(text, series_view(), now=datetime(2026, 3, 2, 12, 0, tzinfo=UTC)).outcome is Condition.TRUE
