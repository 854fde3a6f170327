"""Patterns as SQL: what they match is what the Standard says, whatever is used to find it quickly (PS3.4 C.2.2.2.4)."""

import re
import sqlite3
from itertools import pairwise, product

import pytest

from dicom_node.model import Key, Level, MatchKind, Query
from dicom_node.store.names import beyond
from dicom_node.store.query import _wildcard, plan

TEXTS = (
    *(
        "",
        "A",
        "AB",
        "ABC",
        "ABD",
        "AC",
        "a",
        "ab",
        "B",
        "A*",
        "A?",
        "A[B",
        "A[",
        "[",
        "]",
        "*",
        "?",
        "A B",
        "A%",
        "A_",
    ),
    *("A\ud7ff", "A\ue000", "A\uffff", "A\U00010000", "A\U0010ffff", "A\U0010ffffB", "\U0010ffff", "\U0010ffffA"),
    *("Ä", "ä", "山田", "山", "山本", "Az", "A\x7f", "A\x01"),
)
PATTERNS = (
    *("*", "?", "**", "A*", "A?", "A*?", "A?*", "*?", "?*", "A**", "AB*", "*B", "*B*", "A*B", "A*C", "??", "A[*", "[*"),
    *(
        "[?",
        "*]",
        "A",
        "AB",
        "A%*",
        "A_*",
        "a*",
        "山*",
        "?田",
        "A\ud7ff*",
        "A\U0010ffff*",
        "\U0010ffff*",
        "A*\U0010ffff",
    ),
)


def matches(text: str, pattern: str) -> bool:
    expression = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in pattern)
    return re.fullmatch(expression, text, re.DOTALL) is not None


@pytest.mark.parametrize("pattern", PATTERNS, ids=ascii)
def test_a_pattern_matches_as_the_standard_says(pattern: str) -> None:
    sql, parameters = _wildcard("t.text", pattern)
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (text TEXT NOT NULL)")
    connection.execute("CREATE INDEX by_text ON t (text)")
    connection.executemany("INSERT INTO t VALUES (?)", [(text,) for text in TEXTS])
    found = {row[0] for row in connection.execute(f"SELECT text FROM t WHERE {sql}", parameters)}
    connection.close()
    assert found == {text for text in TEXTS if matches(text, pattern)}


def test_what_is_beyond_a_prefix_comes_after_all_that_begin_with_it_and_before_all_else() -> None:
    others = sorted({first + second for first, second in product(TEXTS, TEXTS)}, key=lambda text: text.encode())
    for prefix in filter(None, TEXTS):
        inside = [text for text in others if prefix <= text < beyond(prefix)]
        assert inside == [text for text in others if text.startswith(prefix)]
    assert all(first <= second for first, second in pairwise(others))


@pytest.mark.parametrize("level", list(Level))
def test_the_order_is_in_every_row_once(level: Level) -> None:
    for returns in ((), ("PatientID",), ("StudyInstanceUID", "StudyDate", "StudyTime")):
        if level is Level.PATIENT:
            returns = returns[:1] if returns[:1] == ("PatientID",) else ()
        found = plan(Query(level=level, keys=(), returns=returns))
        columns = found.select.removeprefix("SELECT ").partition(" FROM ")[0].split(", ")
        assert [columns[at] for at in found.at] == list(found.order)
        assert len(columns) == len(set(columns))


def test_a_query_by_date_walks_the_index_and_sorts_nothing() -> None:
    keys = (Key(keyword="StudyDate", kind=MatchKind.RANGE, values=("20240101", "20240131")),)
    found = plan(Query(level=Level.STUDY, keys=keys, returns=("StudyInstanceUID",)))
    sql, parameters = found.page(("20240105", "", "1.2"), 10)
    connection = sqlite3.connect(":memory:")
    connection.execute(
        "CREATE TABLE study (study_instance_uid TEXT PRIMARY KEY, study_date TEXT NOT NULL, study_time TEXT NOT NULL, "
        "instance_count INTEGER NOT NULL)"
    )
    connection.execute("CREATE INDEX study_date ON study (study_date, study_time, study_instance_uid)")
    steps = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters))
    connection.close()
    assert "USING INDEX study_date" in steps
    assert "TEMP B-TREE" not in steps
