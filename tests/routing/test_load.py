"""Rule files: every mistake with file, line and remedy, and nothing half loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_node.errors import ConfigError, RuleError
from dicom_node.model import LatePolicy, Priority, SendWhat
from dicom_node.routing.load import MAX_FILE_BYTES, check_rules, load_rules
from dicom_node.routing.rules import RuleSet

ENGINES, DESTINATIONS = ("cxr-findings", "ct-abdomen"), ("PACS", "ARCHIVE")

GOOD = """\
rule: ct
description: CT for the model.
when:
  - Modality == "CT"
  - Rows > 100
missing:
  Rows: allow
run:
  engine: ct-abdomen
  priority: background
  results: [seg, sr]
send:
  to: [PACS, sender]
  what: both
late_instances: ignore
stop: true
origin: any
"""

Check = Callable[..., list[RuleError]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """`check(text)`: what is wrong with a folder that holds this one file, 10.yaml."""

    def run(text: str | bytes, name: str = "10.yaml") -> list[RuleError]:
        data = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(data)
        return check_rules(tmp_path, engines=ENGINES, destinations=DESTINATIONS)

    return run


def test_every_key_of_a_rule_is_read(rules_of: Callable[..., RuleSet]) -> None:
    (rule,) = rules_of(GOOD).rules
    assert rule.name == "ct"
    assert rule.description == "CT for the model."
    assert [condition.text for condition in rule.conditions] == ['Modality == "CT"', "Rows > 100"]
    assert rule.allowed_missing == frozenset({"Rows"})
    assert (rule.engine, rule.priority, rule.results) == ("ct-abdomen", Priority.BACKGROUND, ("seg", "sr"))
    assert (rule.destinations, rule.send_what) == (("PACS", "sender"), SendWhat.BOTH)
    assert (rule.late_instances, rule.stop, rule.fallback, rule.any_origin) == (LatePolicy.IGNORE, True, False, True)
    assert (rule.file.name, rule.line) == ("10.yaml", 1)


def test_what_is_left_out_has_its_default(rules_of: Callable[..., RuleSet]) -> None:
    (rule,) = rules_of("rule: a\nwhen: ['true']\nrun: {engine: ct-abdomen, results: [sr]}").rules
    assert (rule.priority, rule.destinations, rule.send_what) == (Priority.ROUTINE, (), SendWhat.RESULTS)
    assert (rule.late_instances, rule.stop, rule.fallback, rule.any_origin) == (LatePolicy.RERUN, False, False, False)
    assert rule.allowed_missing == frozenset()


def test_an_empty_folder_and_files_of_comments_hold_no_rule(rules_of: Callable[..., RuleSet]) -> None:
    assert rules_of().rules == ()
    assert rules_of("# nothing\n# here\n", "", "---\n# nor here\n").rules == ()
    assert rules_of().digest == rules_of("# nothing\n").digest


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist; create it"):
        load_rules(tmp_path / "nowhere", engines=ENGINES, destinations=DESTINATIONS)


def test_a_folder_that_cannot_be_looked_at_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rules(tmp_path / ("n" * 300), engines=ENGINES, destinations=DESTINATIONS)


def test_loading_raises_the_first_mistake_with_file_line_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "20.yaml").write_text(GOOD.replace("rule: ct\n", "rule: late\nwhat: 1\n"))
    (tmp_path / "10.yaml").write_text(GOOD.replace("Rows >", "Row >").replace("ct-abdomen", "ct-abdomne"))
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path, engines=ENGINES, destinations=DESTINATIONS)
    assert (caught.value.file, caught.value.line) == (tmp_path / "10.yaml", 5)
    assert str(caught.value) == f"{tmp_path}/10.yaml:5: 'Row' is no DICOM keyword. Did you mean 'Rows'?"


@pytest.mark.parametrize(
    ("old", "new", "line", "message", "remedy"),
    [
        ("stop: true", "stopp: true", 16, "a rule has no key 'stopp'", "Did you mean 'stop'?"),
        ("stop: true", "zzzzz: true", 16, "a rule has no key 'zzzzz'", "Known are description, fallback"),
        ("priority:", "priorty:", 10, "`run:` has no key 'priorty'", "Did you mean 'priority'?"),
        ("what: both", "wat: both", 14, "`send:` has no key 'wat'", "Did you mean 'what'?"),
        ("Modality ==", "modality ==", 4, "'modality' is no DICOM keyword", "Did you mean 'Modality'?"),
        ("Rows > 100", "Rows > ", 5, "not a CEL expression: mismatched input the end", "Correct"),
        ("Rows > 100", "Rows = 100", 5, "not a CEL expression", "Compare with ==, not ="),
        ("Rows > 100", "Rows > 1 ? Rows < 2 : false", 5, "YAML takes ': ' for a key", "Put the condition in quotes"),
        (
            "Rows > 100",
            "!values.Rows.exists(r, r > 1)",
            5,
            "YAML takes a leading '!' for a tag",
            "Put the condition in quotes",
        ),
        ("Rows > 100", "!(Rows > 100)", 5, "not readable as YAML", "begins with a quote or a '!'"),
        ("Rows > 100", "true", 5, "a condition must be text", "Put the condition in quotes"),
        ("Rows > 100", '"CT" == Modality', 5, "not readable as YAML", "begins with a quote"),
        ("Rows > 100", '"Lung #2" == StudyID', 5, "not readable as YAML", "quotes"),
        ("Rows > 100", 'StudyID == "Lung #2"', 5, "not a CEL expression", "quote the whole condition if it holds ' #'"),
        ("Rows: allow", "Columns: allow", 7, "no condition of the rule asks for 'Columns'", "that can be missing: Mod"),
        ("Rows: allow", "Row: allow", 7, "no condition of the rule asks for 'Row'", "Did you mean 'Rows'?"),
        ("Rows: allow", "Rows: perhaps", 7, "'perhaps' does not say what an absent Rows means", "Write allow or ref"),
        ("Rows: allow", "- Rows", 7, "`missing:` must be keys and values", "See the template"),
        ("ct-abdomen", "ct-abdomne", 9, "engine 'ct-abdomne' is not known", "Did you mean 'ct-abdomen'? (or add it"),
        ("ct-abdomen", "xyz", 9, "engine 'xyz' is not known", "Use one of ct-abdomen, cxr-findings (or add it under"),
        ("background", "soon", 10, "`priority: soon` is not known", "Use one of urgent, routine, background"),
        ("background", "urgnet", 10, "`priority: urgnet` is not known", "Did you mean 'urgent'?"),
        ("[seg, sr]", "[seg, mesh]", 11, "kind of result 'mesh' is not known", "one of ann, labelmap, pdf, sc, seg"),
        ("[seg, sr]", "[]", 11, "the rule runs an engine and asks for no result", "one or more of seg, labelmap, sr"),
        ("[seg, sr]", "sr", 11, "`results:` must be a list", "Write `results:` and then items"),
        (
            "[PACS, sender]",
            "[PACKS]",
            13,
            "destination 'PACKS' is not known",
            "Did you mean 'PACS'? (or add",
        ),
        ("[PACS, sender]", "[]", 13, "`send:` names no destination", "Add `to: [sender]`"),
        ("what: both", "what: all", 14, "`what: all` is not known", "Use one of results, source, both"),
        ("ignore", "never", 15, "`late_instances: never` is not known", "Use one of ignore, rerun"),
        ("stop: true", "stop: maybe", 16, "`stop:` is neither true nor false", "Write true or false"),
        ("origin: any", "origin: mars", 17, "'mars' is no origin", "Write received (the default) or any"),
        ("rule: ct", "rule: my rule", 1, "'my rule' is no rule name", "Use letters, digits"),
        ("rule: ct\n", "", 1, "the rule has no name", "Begin it with `rule: <name>`"),
        ("rule: ct", "rule: [a]", 1, "`rule:` must be text", "Write it on one line"),
        ("origin: any", "stop: false", 17, "the key 'stop' is there twice", "Remove one of them"),
        ("rule: ct", "rule: ct\n- a", 2, "not readable as YAML", ""),
        ("description", "\tdescription", 2, "not readable as YAML", "indent with blanks"),
    ],
)
def test_a_mistake_has_its_line_and_a_remedy(
    old: str, new: str, line: int, message: str, remedy: str, check: Check, tmp_path: Path
) -> None:
    assert old in GOOD
    problem = check(GOOD.replace(old, new, 1))[0]
    assert message in problem.message
    assert remedy in problem.remedy
    assert (problem.file, problem.line) == (tmp_path / "10.yaml", line)


@pytest.mark.parametrize(
    ("text", "line", "message", "remedy"),
    [
        ("- a\n- b\n", 1, "a rule must be keys and values", "See the template"),
        ("rule: a\nwhen: [Modality == 'CT']\n", 1, "the rule neither runs nor sends anything", "Add `run:` or `send:`"),
        ("rule: a\nrun: {engine: ct-abdomen, results: [sr]}", 1, "would match every series", '`- "true"` if every'),
        ("rule: a\nrun: {engine: ct-abdomen, results: [sr]}\nwhen: []", 3, "would match every series", "Add `when:`"),
        ("rule: a\nwhen: Modality == 'CT'\nsend: {to: [PACS]}", 2, "`when:` must be a list", "items with `- `"),
        ("rule: a\nwhen: ['true']\nrun: {results: [sr]}", 3, "`run:` names no engine", "one of ct-abdomen, cxr"),
        ("rule: a\nwhen: ['true']\nrun: ct-abdomen", 3, "`run:` must be keys and values", "See the template"),
        ("rule: a\nwhen: ['true']\nsend: PACS", 3, "`send:` must be keys and values", "See the template"),
        (
            "rule: a\nwhen: ['true']\nsend: {to: [PACS], what: results}",
            3,
            "there are no results to send",
            "what: source",
        ),
        ("rule: a\nwhen:\n" + "  - 'true'\n" * 65 + "send: {to: [PACS]}", 2, "more than 64 conditions", "Join some"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(text: str, line: int, message: str, remedy: str, check: Check) -> None:
    problem = next(p for p in check(text) if message in p.message)
    assert remedy in problem.remedy
    assert problem.line == line


def test_all_problems_are_listed_in_order_not_just_the_first(check: Check) -> None:
    text = (
        GOOD.replace("Modality", "modality").replace("Rows >", "Row >").replace("ct-abdomen", "x").replace("PACS", "y")
    )
    assert [problem.line for problem in check(text)] == [4, 5, 9, 13]


def test_a_rule_with_a_bad_condition_does_not_complain_about_missing_names_too(check: Check) -> None:
    assert len(check(GOOD.replace("Rows > 100", "Rows >"))) == 1


def test_the_line_is_right_inside_conditions_of_several_lines(check: Check) -> None:
    text = """\
rule: a
when:
  - Modality == "CT" &&
    Row > 100
  - |
    Modality == "CT" &&

    Rwos > 100
  - >
    Modality == "CT" &&
    Rsow > 100
  - "Modality == 'CT' &&
    Orws > 100"
send: {to: [PACS]}
"""
    found = {problem.message.split("'")[1]: problem.line for problem in check(text)}
    assert found == {"Row": 4, "Rwos": 8, "Rsow": 11, "Orws": 13}


def test_two_rules_of_one_name_are_refused_and_the_first_is_named(check: Check, tmp_path: Path) -> None:
    check(GOOD, "05.yaml")
    (problem,) = check(GOOD)
    assert problem.message == f"rule 'ct' is already defined at {tmp_path}/05.yaml:1"
    (again,) = check(GOOD.replace("rule: ct", "rule: b") + "---\n" + GOOD.replace("rule: ct", "rule: b"), "10.yaml")
    assert again.line == 19


def test_a_file_of_the_other_suffix_is_not_left_out_in_silence(check: Check) -> None:
    (problem,) = check(GOOD, "10.yml")
    assert problem.message == "rule files end in .yaml"


def test_hidden_files_folders_and_other_files_are_no_rules(tmp_path: Path, check: Check) -> None:
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "README.md").write_text("rule: [")
    (tmp_path / "10.yaml.example").write_text("rule: [")
    assert check("rule: [", ".10.yaml.swp") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"rule: a\nwhen: ['\xff']", "the file is not UTF-8"),
        (b"rule: a\x00", "not readable as YAML"),
        (b"#" * (MAX_FILE_BYTES + 1), "bytes"),
        (b"[" * 200_000, "more than 50 brackets are open"),
        (b"- " * 50_000, "not readable as YAML: maximum recursion"),
        (b"rule: &a [*a]", "`rule:` must be text"),
        (b"when: &a [*a]\nrule: a\nsend: {to: [PACS]}", "a condition must be text"),
        (b"rule: a\nwhen: ['true']\nsend: !!python/object:os.system {to: [PACS]}", ""),
    ],
)
def test_what_is_no_rule_file_at_all_is_a_problem_and_nothing_worse(data: bytes, message: str, check: Check) -> None:
    problems = check(data)
    if message:
        assert message in problems[0].message
        assert problems[0].line >= 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, check: Check) -> None:
    (tmp_path / "20.yaml").symlink_to("/proc/self/mem")  # readable by nobody, not even by root, at its beginning
    (problem,) = check(GOOD)
    assert "the file cannot be read" in problem.message
    assert problem.file.name == "20.yaml"
