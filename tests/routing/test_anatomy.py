"""View, body part and laterality: the plain and the coded attributes, alone, together and against each other."""

from collections.abc import Callable
from typing import Any

import pytest
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from dicom_node import anatomy
from dicom_node.model import Condition, ConditionResult, SeriesView

Ask = Callable[..., ConditionResult]
View = Callable[..., SeriesView]


def item(value: str, scheme: str, meaning: str = "", **more: Any) -> dict[str, Any]:
    return {"CodeValue": value, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning, **more}


PA, AP, LATERAL = (
    item("272479007", "SCT", "postero-anterior"),
    item("R-10206", "SNM3", "antero-posterior"),
    item("399067008", "SCT", "lateral"),
)


@pytest.mark.parametrize(
    ("series", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": " ap "}, "AP"),
        ({"ViewCodeSequence": [PA]}, "PA"),
        ({"ViewCodeSequence": [AP]}, "AP"),
        ({"ViewPosition": "PA", "ViewCodeSequence": [PA]}, "PA"),
        ({"ViewPosition": "LL", "ViewCodeSequence": [LATERAL]}, "LL"),  # the code is only less exact
        ({"ViewCodeSequence": [LATERAL]}, "LATERAL"),
        ({"ViewCodeSequence": [item("X1", "99LOCAL", "Swimmer's")]}, "SWIMMER'S"),
        ({"ViewCodeSequence": [item("272479007", "99LOCAL")]}, "272479007"),  # not a SNOMED code
    ],
)
def test_the_view_is_one_word(series: dict[str, Any], view: str, ask: Ask, series_view: View) -> None:
    result = ask(f'view == "{view}"', series_view(**series))
    assert result.outcome is Condition.TRUE, result
    assert result.values == {"view": view}


@pytest.mark.parametrize(
    ("series", "part"),
    [
        ({"BodyPartExamined": "CHEST"}, "CHEST"),
        ({"BodyPartExamined": "Thorax"}, "CHEST"),
        ({"BodyPartExamined": "WHOLE BODY"}, "WHOLEBODY"),
        ({"BodyPartExamined": "ABDOMEN_PELVIS"}, "ABDOMENPELVIS"),
        ({"BodyPartExamined": "left knee"}, "LEFT KNEE"),
        ({"AnatomicRegionSequence": [item("816094009", "SCT", "Chest")]}, "CHEST"),
        ({"AnatomicRegionSequence": [item("51185008", "SCT", "Chest")]}, "CHEST"),
        ({"AnatomicRegionSequence": [item("T-D4000", "SRT", "Abdomen")]}, "ABDOMEN"),
        ({"BodyPartExamined": "BRAIN", "AnatomicRegionSequence": [item("T-A0100", "SRT", "Brain")]}, "BRAIN"),
        (
            {
                "SharedFunctionalGroupsSequence": [
                    {"FrameAnatomySequence": [{"AnatomicRegionSequence": [item("10200004", "SCT", "Liver")]}]}
                ]
            },
            "LIVER",
        ),
    ],
)
def test_the_body_part_is_a_defined_term(series: dict[str, Any], part: str, ask: Ask, series_view: View) -> None:
    result = ask(f'body_part == "{part}"', series_view(**series))
    assert result.outcome is Condition.TRUE, result


@pytest.mark.parametrize(
    ("series", "side"),
    [
        ({"ImageLaterality": "L"}, "L"),
        ({"Laterality": "R"}, "R"),
        ({"Laterality": "R", "ImageLaterality": "R"}, "R"),
        ({"AnatomicRegionSequence": [item("1", "SCT", AnatomicRegionModifierSequence=[item("7771000", "SCT")])]}, "L"),
        ({"SharedFunctionalGroupsSequence": [{"FrameAnatomySequence": [{"FrameLaterality": "B"}]}]}, "B"),
    ],
)
def test_the_laterality_is_one_letter(series: dict[str, Any], side: str, ask: Ask, series_view: View) -> None:
    assert ask(f'laterality == "{side}"', series_view(**series)).outcome is Condition.TRUE


def test_attributes_that_contradict_each_other_are_mixed_and_named(ask: Ask, series_view: View) -> None:
    result = ask('view == "PA"', series_view(ViewPosition="AP", ViewCodeSequence=[PA]))
    assert result.outcome is Condition.MIXED
    assert "view is contradictory: ViewPosition says AP, ViewCodeSequence says PA" in result.explanation
    part = ask(
        'body_part == "CHEST"',
        series_view(BodyPartExamined="CHEST", AnatomicRegionSequence=[item("10200004", "SCT", "Liver")]),
    )
    assert "BodyPartExamined says CHEST, AnatomicRegionSequence says LIVER" in part.explanation


def test_a_pa_and_a_lateral_image_in_one_series_are_mixed(ask: Ask, series_view: View) -> None:
    view = series_view(values={"ViewPosition": ("PA", "LL")}, count=2)
    assert ask('view == "PA"', view).outcome is Condition.MIXED
    coded = series_view(values={"ViewCodeSequence": ([PA], [LATERAL])}, count=2)
    assert ask('view == "PA"', coded).outcome is Condition.MIXED


def test_what_no_attribute_says_is_missing_and_names_the_attributes(ask: Ask, series_view: View) -> None:
    result = ask('view == "PA"', series_view(ViewPosition="", ViewCodeSequence=[]))
    assert result.outcome is Condition.MISSING
    assert "ViewPosition and ViewCodeSequence say nothing" in result.explanation
    assert "`missing: {view: allow}`" in result.explanation


def test_a_view_that_one_instance_lacks_is_missing(ask: Ask, series_view: View) -> None:
    lacking = series_view(ViewPosition="PA", count=2, missing_in={"ViewPosition": 1})
    assert ask('view == "PA"', lacking).outcome is Condition.MISSING
    coded_too = series_view(ViewPosition="PA", ViewCodeSequence=[PA], count=2, missing_in={"ViewPosition": 1})
    assert ask('view == "PA"', coded_too).outcome is Condition.TRUE


def test_every_body_part_code_is_one_of_the_standards() -> None:
    known = {code.value for group in (codes.cid4031, codes.cid4030) for code in group.concepts.values()}
    assert set(anatomy._BODY_PARTS) <= known


def test_older_codes_mean_what_their_present_ones_mean() -> None:
    """pydicom knows which SNOMED-RT identifier is which SNOMED CT one; concepts replaced since then it does not."""
    replaced = {"T-D3000": "51185008", "T-D4000": "113345001", "T-D6000": "12921003", "R-FAB57": "416949008"}
    for table, present in (
        (anatomy._BODY_PARTS_BEFORE, {**anatomy._BODY_PARTS, **anatomy._BODY_PARTS_BEFORE}),
        (anatomy._VIEWS, anatomy._VIEWS),
        (anatomy._LATERALITIES, anatomy._LATERALITIES),
    ):
        for old, word in table.items():
            if "-" in old:
                same = [new for new in present if new.isdigit() and Code(old, "SRT", "") == Code(new, "SCT", "")]
                assert [present[new] for new in same] == [word], old
                assert replaced.get(old, same[0]) == same[0]


def test_every_view_code_is_one_of_the_standards() -> None:
    known = {code.value for group in (codes.cid4010, codes.cid4014) for code in group.concepts.values()}
    assert {code for code in anatomy._VIEWS if code.isdigit()} <= known


# --- geometry ------------------------------------------------------------------------------------------------------


def slices(*positions: float, orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"ImagePositionPatient": [0.0, 0.0, z], "ImageOrientationPatient": list(orientation)} for z in positions
    )


def test_slice_spacing_and_extent_come_from_the_positions_in_any_order(ask: Ask, series_view: View) -> None:
    view = series_view(count=5, geometry=slices(10, 2.5, 0, 5, 7.5))
    text = "series.slice_spacing_mm == 2.5 && series.extent_mm == 10.0 && series.frame_count == 5"
    assert ask(text, view).outcome is Condition.TRUE


def test_the_spacing_is_measured_along_the_normal(ask: Ask, series_view: View) -> None:
    tilted = tuple(
        {"ImagePositionPatient": [0.0, 3.0 * i, 4.0 * i], "ImageOrientationPatient": [1, 0, 0, 0, 0.8, -0.6]}
        for i in range(4)
    )
    assert ask("series.slice_spacing_mm == 5.0", series_view(count=4, geometry=tilted)).outcome is Condition.TRUE


@pytest.mark.parametrize(
    ("geometry", "why"),
    [
        (slices(1.0), "fewer than two slice positions"),
        (slices(1.0, 1.0), "fewer than two slice positions"),
        ((*slices(1.0, 2.0), {"Rows": 3}), "an instance has no position"),
        ((*slices(1.0), *slices(2.0, orientation=(0, 1, 0, 0, 0, 1))), "the orientation differs"),
        (({"ImagePositionPatient": ["a", 1, 2], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},), "no position"),
        ((), "fewer than two slice positions"),
    ],
)
def test_a_series_without_slices_has_no_spacing(
    geometry: tuple[dict[str, Any], ...], why: str, ask: Ask, series_view: View
) -> None:
    result = ask("series.slice_spacing_mm < 5.0", series_view(count=2, geometry=geometry))
    assert result.outcome is Condition.MISSING
    assert why in result.explanation
    assert "`missing: {series.slice_spacing_mm: allow}`" in result.explanation


def test_frames_of_multi_frame_instances_are_counted(ask: Ask, series_view: View) -> None:
    geometry: tuple[dict[str, Any], ...] = ({"NumberOfFrames": 30}, {"NumberOfFrames": "12"}, {})
    assert ask("series.frame_count == 43", series_view(count=3, geometry=geometry)).outcome is Condition.TRUE
    nonsense = ({"NumberOfFrames": float("inf")}, {"NumberOfFrames": "many"}, {"NumberOfFrames": None})
    assert ask("series.frame_count == 3", series_view(count=3, geometry=nonsense)).outcome is Condition.TRUE
