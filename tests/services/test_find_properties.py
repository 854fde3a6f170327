"""C-FIND against the words of PS3.4 C.2.2.2 taken literally: every row looked at by itself, whatever was asked."""

import itertools
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.services.find import FindResponse

Find = Callable[..., list[FindResponse]]
Keep = Callable[..., Dataset]

TEXTS = ("", "A", "a", "AB", "A*", "A?B", "A%", "A_B", "[AB]", "ÄB", "山田", "A B", "AAB", "A\u00e9")
DATES = ("", "20231231", "20240101", "20240229", "20240301")
ROWS = [
    {"PatientID": f"P{number}", "StudyID": text, "AccessionNumber": other, "StudyDate": date}
    for number, (text, other, date) in enumerate(
        zip(TEXTS, (*TEXTS[5:], *TEXTS[:5]), itertools.cycle(DATES), strict=False)
    )
]
UIDS = tuple(f"1.2.{number}" for number in range(len(ROWS)))


def like(text: str, pattern: str) -> bool:
    """PS3.4 C.2.2.2.4, a character at a time: `*` is any run, `?` any one, all else itself; case counts."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(like(text[at:], pattern[1:]) for at in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and like(text[1:], pattern[1:])


def matches(row: dict[str, str], keyword: str, key: str | list[str]) -> bool:
    """Whether that row is among what was asked for."""
    value = row[keyword]
    if isinstance(key, list):  # C.2.2.2.2
        return not key or value in key
    if not key or not key.strip("*"):  # C.2.2.2.3, and wild cards that match all, zero length too
        return True
    if keyword == "StudyDate":
        first, dash, last = key.partition("-")
        if not dash:
            return value == key
        return bool(value) and (not first or first <= value) and (not last or value <= last)  # C.2.2.2.5
    return like(value, key)


letters = st.sampled_from(["*", "?", "A", "a", "B", "%", "_", "[", "]", "山", "é", "Ä"])
patterns = st.lists(letters, max_size=5).map("".join) | st.sampled_from(TEXTS)
day = st.sampled_from(DATES[1:])
dates = st.one_of(
    *(st.just(""), day, day.map("{}-".format), day.map("-{}".format)), st.builds("{}-{}".format, day, day)
)
keys = st.fixed_dictionaries(
    {},
    optional={
        "StudyID": patterns,
        "AccessionNumber": patterns,
        "StudyDate": dates,
        "StudyInstanceUID": st.lists(st.sampled_from([*UIDS, "9.9"]), max_size=4, unique=True),
    },
)


@settings(max_examples=150, derandomize=True)
@given(asked=keys)
def test_what_is_found_is_what_the_standard_says(asked: dict[str, Any], keep: Keep, find: Find) -> None:
    rows = [{**row, "StudyInstanceUID": uid} for row, uid in zip(ROWS, UIDS, strict=True)]
    if len(find("STUDY")) == 1:  # the first example: nothing is kept yet
        for row in rows:
            keep(**row)
    expected = {row["StudyInstanceUID"] for row in rows if all(matches(row, *one) for one in asked.items())}
    *pending, last = find("STUDY", SpecificCharacterSet="ISO_IR 192", **{"StudyInstanceUID": "", **asked})
    assert last.status == 0x0000
    found = [str(response.identifier.StudyInstanceUID) for response in pending]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(expected), asked
