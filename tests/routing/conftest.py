"""Series views and rule folders for the routing tests."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dicom_node.model import (
    ConditionResult,
    Origin,
    SeriesHeader,
    SeriesView,
    Source,
)
from dicom_node.routing.conditions import evaluate_condition
from dicom_node.routing.expressions import Expression, parse_expression
from dicom_node.routing.load import load_rules
from dicom_node.routing.rules import RuleSet
from dicom_node.routing.variables import Variables

ENGINES = ("cxr-findings", "ct-abdomen")
DESTINATIONS = ("PACS", "ARCHIVE")
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="session")
def noon() -> datetime:
    """A Monday, 12:00 UTC."""
    return NOON


@pytest.fixture(scope="session")
def series_view() -> Callable[..., SeriesView]:
    """`series_view(Modality="CT", ...)`: a view of a series in which these keywords have one value each.

    `values=` gives distinct values by keyword instead, `missing_in=`, `geometry=`, `count=`, `origins=`, `sender=`,
    `distinct_counts=` and `study=` (fields of SeriesView) the rest.
    """

    def make(
        *,
        values: Mapping[str, tuple[Any, ...]] | None = None,
        missing_in: Mapping[str, int] | None = None,
        geometry: tuple[Mapping[str, Any], ...] = (),
        count: int = 1,
        origins: frozenset[Origin] = frozenset({Origin.RECEIVED}),
        sender: str = "CT1",
        distinct_counts: Mapping[str, int] | None = None,
        study: Mapping[str, Any] | None = None,
        **single: Any,
    ) -> SeriesView:
        header = SeriesHeader(
            series_instance_uid="1.2.3.4",
            instance_count=count,
            values={**{keyword: (value,) for keyword, value in single.items()}, **(values or {})},
            missing_in=missing_in or {},
            geometry=geometry,
            distinct_counts=distinct_counts or {},
        )
        facts = {"study_series_count": 2, "study_instance_count": 40, "study_modalities": ("CT", "SR"), **(study or {})}
        return SeriesView(
            study_instance_uid="1.2.3",
            revision=1,
            header=header,
            source=Source(calling_ae_title=sender, called_ae_title="DICOM_NODE", address="10.0.0.7"),
            origins=origins,
            received_at=NOON,
            **facts,
        )

    return make


@pytest.fixture(scope="session")
def compiled() -> Callable[[str], Expression]:
    """`compiled(text)`: the condition, which must be right."""

    def compile_it(text: str) -> Expression:
        parsed = parse_expression(text)
        assert isinstance(parsed, Expression), parsed
        return parsed

    return compile_it


@pytest.fixture(scope="session")
def ask(compiled: Callable[[str], Expression]) -> Callable[..., ConditionResult]:
    """`ask(text, view, allow=(), now=noon)`: how the condition ends for the series."""

    def evaluate(text: str, view: SeriesView, *, allow: tuple[str, ...] = (), now: datetime = NOON) -> ConditionResult:
        return evaluate_condition(compiled(text), Variables(view, now), frozenset(allow)).result

    return evaluate


@pytest.fixture
def rules_of(tmp_path: Path) -> Callable[..., RuleSet]:
    """`rules_of(text, ...)`: the rule set of a folder with one file for each text, named 10.yaml, 11.yaml ..."""

    def load(*texts: str) -> RuleSet:
        folder = tmp_path / f"rules{sum(1 for _ in tmp_path.iterdir())}"
        folder.mkdir()
        for number, text in enumerate(texts, start=10):
            (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
        return load_rules(folder, engines=ENGINES, destinations=DESTINATIONS)

    return load
