"""Conditions as text: what is refused, at which character, with which remedy, and what they refer to."""

from collections.abc import Callable

import pytest

from dicom_node.routing.expressions import MAX_LENGTH, Expression, Fault, parse_expression
from dicom_node.routing.vocabulary import FUNCTIONS


def faults(text: str) -> list[Fault]:
    parsed = parse_expression(text)
    assert isinstance(parsed, list), f"{text} was accepted"
    return parsed


@pytest.mark.parametrize(
    ("text", "at", "message", "remedy"),
    [
        ("modality == 'CT'", "modality", "'modality' is no DICOM keyword", "Did you mean 'Modality'?"),
        ("Rows > 1 && Colums > 1", "Colums", "'Colums' is no DICOM keyword", "Did you mean 'Columns'?"),
        ("bodypart == 'CHEST'", "bodypart", "'bodypart' is no DICOM keyword", "Did you mean 'body_part'?"),
        ("xyzzyqqq == 1", "xyzzyqqq", "'xyzzyqqq' is no DICOM keyword", "Use a keyword of DICOM PS3.6"),
        ("values.ViewPositon.size() > 1", "ViewPositon", "'ViewPositon' is no DICOM", "Did you mean 'ViewPosition'?"),
        ("ViewCodeSequence[0].CodeValu == '1'", "CodeValu", "'CodeValu' is no DICOM", "Did you mean 'CodeValue'?"),
        (
            "ViewCodeSequence.exists(c, c.CodeVal == '1')",
            "CodeVal ",
            "'CodeVal' is no DICOM keyword",
            "Did you mean 'CodeValue'?",
        ),
        ("source.calling_ae == 'A'", "calling_ae ", "source has no 'calling_ae'", "Did you mean 'calling_ae_title'?"),
        ("series.frames > 4", "frames", "series has no 'frames'", "Did you mean 'frame_count'?"),
        ("study.zzz == 1", "zzz", "study has no 'zzz'", "Known are instance_count"),
        ("values == 1", "values", "'values' is a name space", "Name a member, such as values.ViewPosition"),
        ("source['calling_ae_title'] == 'A'", "source", "'source' is a name space", "such as source.calling_ae_title"),
        ("PixelData == 'x'", "PixelData", "PixelData is bulk data", "Use an attribute of the header"),
        ("PerFrameFunctionalGroupsSequence.size() > 1", "PerFrame", "is bulk data", "Use an attribute of the header"),
        ("Modality.startswith('C')", "startswith", "there is no function 'startswith'", "Did you mean 'startsWith'?"),
        ("__import__('os')", "__import__", "there is no function '__import__'", "Known are size"),
        ("SeriesDescription.matches('(')", "'('", "the pattern '(' is no regular expression: unclosed", "RE2"),
        (
            "SeriesDescription.matches('(a{1000}){1000}')",
            "'(a{",
            "Compiled regex exceeds size limit",
            "Use RE2 syntax",
        ),
        (
            "values.Rows.exists(Modality, Modality == 1)",
            "Modality, ",
            "the macro variable 'Modality' hides",
            "Name it by one small letter",
        ),
        (
            "values.Rows.all(a, values.Rows.all(b, values.Rows.all(c, a == b)))",
            "values",
            "3 list macros are nested",
            "Split the condition",
        ),
        ("Modality = 'CT'", "= ", "not a CEL expression: token recognition error", "Compare with ==, not ="),
        ("Modality == 'CT", "'CT", "not a CEL expression: token recognition error", "Close the text"),
        ("Modality in ['CT'", "", "mismatched input the end of the condition", "Correct the CEL expression"),
        ("has(Modality)", "Modality)", "invalid argument to has() macro", "write has(values.<Keyword>)"),
        ("", "", "the condition is empty", "Write a CEL expression"),
        ("(" * 200 + "true" + ")" * 200, "", "not a CEL expression", "Correct"),
        ("Rows == 1 ||" * 400 + "true", "", "characters, more than", "Split it into several conditions"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_a_remedy(text: str, at: str, message: str, remedy: str) -> None:
    first = faults(text)[0]
    assert message in first.message
    assert remedy in first.remedy
    if at:
        assert text[first.offset :].startswith(at)


def test_every_mistake_of_a_condition_is_named_in_order() -> None:
    text = "modality == 'CT' && Row > 1 && Rows.foo()"
    assert [text[fault.offset :].split()[0] for fault in faults(text)] == ["modality", "Row", "foo()"]


def test_a_name_inside_a_text_or_a_comment_is_no_variable(compiled: Callable[[str], Expression]) -> None:
    text = """SeriesDescription == "modality \\" x" // and colums
        && StudyDescription != r'\\' && SeriesDescription != '''a ' modality'''"""
    assert [r.name for r in compiled(text).references] == ["SeriesDescription", "StudyDescription", "SeriesDescription"]


@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("Modality in ['CT', 'MR']", ["Modality"]),
        ("ViewCodeSequence[0].CodeValue == '1'", ["ViewCodeSequence[0].CodeValue"]),
        ("values.ImageType.exists(t, 'X' in t)", ["values.ImageType"]),
        ("has(values.Rows) && series.frame_count > 2", ["values.Rows", "series.frame_count"]),
        ("now.getHours() > 7", ["now"]),
        ("true", []),
        ("!(view in ['PA']) ? Rows == 1 : Columns == 2", ["view", "Rows", "Columns"]),
        ("ImageType[2] == 'AXIAL'", ["ImageType[2]"]),
        ("source.calling_ae_title.startsWith('CT')", ["source.calling_ae_title"]),
    ],
)
def test_a_condition_knows_the_variables_it_uses(
    text: str, references: list[str], compiled: Callable[[str], Expression]
) -> None:
    expression = compiled(text)
    assert [reference.text for reference in expression.references] == references


def test_the_library_finds_the_same_variables(compiled: Callable[[str], Expression]) -> None:
    text = "Modality == 'CT' && values.Rows.all(r, r > 3) || ViewCodeSequence[0].CodeValue == '' || study.revision > 1"
    expression = compiled(text)
    mine = {reference.name.split(".")[0] for reference in expression.references}
    assert mine == set(expression.program.variables()) - {"r"}


@pytest.mark.parametrize(
    ("text", "joiner", "parts"),
    [
        ("Rows > 1", "", ["Rows > 1"]),
        ("Rows > 1 && (Rows < 9 || Columns > 1)", "&&", ["Rows > 1", "(Rows < 9 || Columns > 1)"]),
        ("Rows > 1 && Rows < 9 || Columns > 1", "||", ["Rows > 1 && Rows < 9", "Columns > 1"]),
        ("Rows > 1 ? true : Columns > 1 && true", "", ["Rows > 1 ? true : Columns > 1 && true"]),
    ],
)
def test_a_condition_falls_into_its_top_level_parts(
    text: str, joiner: str, parts: list[str], compiled: Callable[[str], Expression]
) -> None:
    expression = compiled(text)
    assert expression.joiner == joiner
    assert [part.text for part in expression.parts] == parts


ONE_EACH = {
    "size": "values.Rows.size() == 1",
    "contains": "Modality.contains('T')",
    "startsWith": "Modality.startsWith('C')",
    "endsWith": "Modality.endsWith('T')",
    "matches": "Modality.matches('^C.$')",
    "has": "has(values.Rows)",
    "all": "values.Rows.all(r, r > 1)",
    "exists": "values.Rows.exists(r, r > 1)",
    "exists_one": "values.Rows.exists_one(r, r > 1)",
    "map": "values.Rows.map(r, r + 1) == [513]",
    "filter": "values.Rows.filter(r, r > 1) == [512]",
    "int": "int('3') == 3",
    "uint": "uint(3) == 3u",
    "double": "double('3') == 3.0",
    "string": "string(Rows) == '512'",
    "timestamp": "timestamp('2020-01-01T00:00:00Z') < now",
    "duration": "now - duration('1h') < now",
    "getFullYear": "now.getFullYear() == 2026",
    "getMonth": "now.getMonth() == 2",  # CEL counts months from 0
    "getDayOfMonth": "now.getDayOfMonth() == 1",
    "getDate": "now.getDate() == 2",
    "getDayOfWeek": "now.getDayOfWeek() == 1",
    "getDayOfYear": "now.getDayOfYear() == 60",
    "getHours": "now.getHours() == 12",
    "getMinutes": "now.getMinutes() == 0",
    "getSeconds": "now.getSeconds() == 0",
    "getMilliseconds": "now.getMilliseconds() == 0",
}


def test_every_function_on_the_list_is_tried() -> None:
    assert set(ONE_EACH) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_on_the_list_exists(
    name: str, ask: Callable[..., object], series_view: Callable[..., object]
) -> None:
    result = ask(ONE_EACH[name], series_view(Modality="CT", Rows=512))
    assert getattr(result, "outcome").value == "true", result  # noqa: B009


def test_an_expression_is_as_long_as_it_may_be() -> None:
    text = "Modality == 'CT' // "
    assert isinstance(parse_expression(text + "x" * (MAX_LENGTH - len(text))), Expression)
