"""What engines call their labels, as segments: configured, verified, or under their own name; never guessed."""

from typing import Any

import pytest
from pydantic import ValidationError

from dicom_node.engines.labels import Label, LabelRow, LabelTable, names_by_value, segments_of
from dicom_node.values import Code, Segment

ORGAN = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")


def _segment(name: str, row: dict[str, Any] | None = None, number: int = 1) -> Segment:
    (segment,) = segments_of([Label(number=number, name=name, row=LabelRow.model_validate(row or {}))])
    return segment


def test_a_known_name_has_its_verified_code_however_spelled() -> None:
    for name in ("spleen", "Spleen", "SPLEEN"):
        segment = _segment(name)
        assert (segment.label, segment.category) == ("Spleen", ORGAN)
        assert segment.type == Code(value="78961009", scheme="SCT", meaning="Spleen")
    left = _segment("kidney_left")
    assert left.type == Code(value="64033007", scheme="SCT", meaning="Kidney")
    assert left.modifier == Code(value="7771000", scheme="SCT", meaning="Left")


def test_an_unknown_name_keeps_itself_in_the_private_scheme() -> None:
    one, same, other = _segment("Wobble_Bone"), _segment("wobble bone"), _segment("wobble bone 2")
    assert (one.label, one.type.meaning, one.type.scheme) == ("Wobble Bone", "Wobble Bone", "99DICOMNODE")
    assert one.type.value == same.type.value != other.type.value
    assert len(one.type.value) <= 16


def test_the_table_comes_first() -> None:
    row = {
        "name": "Liver lesion",
        "category": ["SCT", "49755003", "Morphologically Abnormal Structure"],
        "type": ["SCT", "52988006", "Lesion"],
        "modifier": ["SCT", "24028007", "Right"],
        "color": [10, 20, 30],
    }
    segment = _segment("spleen", row)
    assert (segment.label, segment.color_rgb) == ("Liver lesion", (10, 20, 30))
    assert segment.type == Code(value="52988006", scheme="SCT", meaning="Lesion")
    assert segment.category.value == "49755003"
    assert segment.modifier == Code(value="24028007", scheme="SCT", meaning="Right")


def test_a_configured_name_is_looked_up_and_shown() -> None:
    assert _segment("class_3", {"name": "spleen"}).type.value == "78961009"
    translated = _segment("spleen", {"name": "Milz"})
    assert (translated.label, translated.type.value) == ("Milz", "78961009")


@pytest.mark.parametrize("value", [1, None])
def test_rows_are_found_by_number_or_by_name_in_any_spelling(value: int | None) -> None:
    table = LabelTable.model_validate({1: {"name": "One"}, "Left-Kidney": {"name": "Two"}, "back_ground": "ignore"})
    named = table.row(value, "left kidney")
    assert named is not None and named.name == ("One" if value else "Two")
    assert table.row(9, "background") == LabelRow()
    assert table.row(9, "Back ground") is None
    assert table.row(9, "") == LabelRow()


@pytest.mark.parametrize(
    "row",
    [
        {"type": ["SCT", "1"]},
        {"type": ["SCT", "x" * 17, "too long"]},
        {"type": ["SCT", "1", "a\\b"]},
        {"type": ["SCT", "1", "line\nbreak"]},
        {"type": ["", "1", "m"]},
        {"color": [0, 0, 256]},
        {"name": "x" * 65},
        {"unknown": 1},
        "drop",
    ],
)
def test_a_wrong_row_is_refused(row: Any) -> None:
    with pytest.raises(ValidationError):
        LabelTable.model_validate({"spleen": row})


def test_long_meanings_are_taken_as_they_are() -> None:
    meaning = "Structure_with a name of many words that is sixty-four letters."
    assert _segment("x", {"type": ["99LOCAL", "ABC", meaning]}).type.meaning == meaning


def test_keys_outlast_the_table_and_are_unique() -> None:
    assert _segment("Left Kidney").key == _segment("left_kidney", {"name": "Niere"}, number=9).key == "left-kidney"
    twins = [Label(number=number, name="kidney", row=LabelRow()) for number in (3, 4)]
    assert [segment.key for segment in segments_of(twins)] == ["kidney-3", "kidney-4"]
    assert _segment("腎臓").key == "label"
    tricky = [Label(number=n, name=name, row=LabelRow()) for n, name in enumerate(("x", "x", "x 2"), start=1)]
    assert len({segment.key for segment in segments_of(tricky)}) == 3


def test_names_of_strangers_are_made_fit_for_an_attribute() -> None:
    segment = _segment("a\\b\n\x00c" + "d" * 200)
    assert "\\" not in segment.label and "\n" not in segment.label
    assert len(segment.label) <= 64 and len(segment.type.meaning) <= 64


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (["spleen", "liver"], {1: "spleen", 2: "liver"}),
        (["background", "spleen"], {1: "spleen"}),
        ({"spleen": 1, "background": 0, "liver": 6}, {1: "spleen", 6: "liver"}),
        ({"1": "spleen", 6: "liver"}, {1: "spleen", 6: "liver"}),
        ({"3": "L3"}, {3: "L3"}),
        ({"spleen": "2"}, {2: "spleen"}),
        ({"spleen": True, "liver": -1, "x": 1.5, "": 3}, {}),
        ({"task": {"spleen": 1}}, {}),
        ([None, 7, {"name": "x"}], {}),
        ("spleen", {}),
        (None, {}),
        (5, {}),
        ([], {}),
    ],
)
def test_every_way_engines_tell_their_labels_is_understood(told: Any, names: dict[int, str]) -> None:
    assert names_by_value(told) == names
