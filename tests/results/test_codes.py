"""The code table: what it claims to be verified is, and what is not says so."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dictionary

from dicom_node.config import packaged
from dicom_node.results import codes
from dicom_node.results.codes import CodeRow, Verification
from dicom_node.values import Code

ROWS = {**codes.FINDINGS, **codes.ORGANS}
OWN = [value for value in vars(codes).values() if isinstance(value, Code)]


@cache
def _dictionary(scheme: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for known in getattr(dictionary, scheme).concepts.values():
        found[known.value].add(known.meaning)
    return found


def _meanings(code: Code) -> set[str]:
    """Every meaning the dictionary of PS3.16 has for the code."""
    return _dictionary(code.scheme)[code.value]


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.verification is Verification.DICTIONARY])
def test_a_row_verified_in_the_dictionary_is_in_it_with_that_meaning(key: str) -> None:
    assert ROWS[key].code.meaning in _meanings(ROWS[key].code)


@pytest.mark.parametrize("code", [*OWN, *codes.PRESENCE.values()], ids=lambda code: code.meaning)
def test_what_the_encoders_say_themselves_is_in_the_dictionary(code: Code) -> None:
    assert code.meaning in _meanings(code)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_code_is_private_exactly_when_none_was_verified(row: CodeRow) -> None:
    assert (row.code.scheme == codes.PRIVATE_SCHEME) == (row.verification is Verification.PRIVATE)
    assert len(row.code.value) <= 16 and len(row.code.meaning) <= 64


def test_there_is_a_row_for_each_of_the_eleven_findings() -> None:
    assert len(codes.FINDINGS) == 11
    assert len({(row.code.scheme, row.code.value) for row in codes.FINDINGS.values()}) == 11


def test_private_schemes_are_identified_wherever_they_are_used() -> None:
    inner, outer = Dataset(), Dataset()
    inner.ConceptCodeSequence = [codes.concept(Code(value="X", scheme="99OTHER", meaning="x"))]
    outer.ContentSequence = [inner]
    outer.ConceptNameCodeSequence = [codes.concept(codes.FINDINGS["pleural_thickening"].code)]
    schemes = {item.CodingSchemeDesignator: item for item in codes.coding_schemes(outer)}
    assert set(schemes) == {"99OTHER", "99DICOMNODE"}
    assert schemes["99DICOMNODE"].CodingSchemeResponsibleOrganization == "dicom-node"
    assert codes.coding_schemes(Dataset()) == []


def _packages() -> list[Path]:
    return sorted(packaged("demo", "weights").glob("*/model.yaml"))


def _coded(value: Any) -> Iterator[Code]:
    """Every [scheme, value, meaning] under a key that holds codes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("code", "type") and isinstance(inner, list):
                yield Code(scheme=inner[0], value=inner[1], meaning=inner[2])
            else:
                yield from _coded(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _coded(inner)


@pytest.mark.parametrize("file", _packages(), ids=lambda file: file.parent.name)
def test_the_packages_that_ship_use_codes_of_the_table(file: Path) -> None:
    used = list(_coded(yaml.safe_load(file.read_text(encoding="utf-8"))))
    assert used and [code for code in used if code not in [row.code for row in ROWS.values()]] == []
