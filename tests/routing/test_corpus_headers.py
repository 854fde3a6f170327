"""The shipped rules and a set of odd ones on the headers of real files: every series gets its reasons."""

import warnings
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue

from dicom_node.config import NodeConfig, packaged
from dicom_node.model import (
    Condition,
    Origin,
    SeriesHeader,
    SeriesView,
    Source,
)
from dicom_node.routing.load import load_rules
from dicom_node.routing.rules import RuleSet

BINARY = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN"})
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames")


def plain(ds: Dataset) -> dict[str, Any]:
    """The data set as JSON-ready values by keyword, as a header reader would hand it over."""
    values: dict[str, Any] = {}
    for element in ds:
        keyword = keyword_for_tag(element.tag)
        if not keyword or element.VR in BINARY:
            continue
        if element.VR == "SQ":
            values[keyword] = [plain(item) for item in element.value][:64]
        elif isinstance(element.value, MultiValue | list):
            values[keyword] = [one(part) for part in element.value]
        else:
            values[keyword] = one(element.value)
    return values


def one(value: Any) -> Any:
    return value if isinstance(value, int | float) and not hasattr(value, "original_string") else str(value)


@pytest.fixture(scope="module")
def real_series(corpus: Path) -> list[SeriesView]:
    """One view for each series of the corpus, from at most 30 files of a folder."""
    series: dict[str, list[dict[str, Any]]] = {}
    folders: Counter[Path] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(corpus.rglob("*")):
            if not path.is_file() or path.suffix in (".csv", ".txt", ".md") or folders[path.parent] >= 30:
                continue
            folders[path.parent] += 1
            try:
                ds = pydicom.dcmread(path, stop_before_pixels=True)
                values = plain(ds)
            except (InvalidDicomError, ValueError, KeyError, TypeError, NotImplementedError, AttributeError, EOFError):
                continue
            uid = str(values.get("SeriesInstanceUID", ""))
            if uid:
                series.setdefault(uid, []).append(values)
    return [view_of(uid, files) for uid, files in series.items()]


def view_of(uid: str, files: list[dict[str, Any]]) -> SeriesView:
    distinct: dict[str, list[Any]] = {}
    for values in files:
        for keyword, value in values.items():
            if value not in distinct.setdefault(keyword, []):
                distinct[keyword].append(value)
    header = SeriesHeader(
        series_instance_uid=uid,
        instance_count=len(files),
        values={keyword: tuple(found) for keyword, found in distinct.items()},
        missing_in={
            keyword: lacking for keyword in distinct if (lacking := sum(keyword not in values for values in files))
        },
        geometry=tuple({keyword: values[keyword] for keyword in GEOMETRY if keyword in values} for values in files),
    )
    return SeriesView(
        study_instance_uid=str(files[0].get("StudyInstanceUID", "")),
        revision=1,
        header=header,
        source=Source(calling_ae_title="CORPUS", called_ae_title="NODE", address="127.0.0.1"),
        origins=frozenset({Origin.RECEIVED}),
        study_series_count=1,
        study_instance_count=len(files),
        study_modalities=tuple(str(m) for m in distinct.get("Modality", [])),
        received_at=datetime.fromisoformat("2026-03-02T12:00:00+00:00"),
    )


def modality(view: SeriesView) -> str:
    return str(view.header.values.get("Modality", ("",))[0])


@pytest.fixture(scope="module")
def shipped() -> RuleSet:
    config = NodeConfig()
    return load_rules(packaged("default_rules"), engines=config.engines, destinations=config.destinations)


def test_the_shipped_rules_take_real_chest_radiographs_and_abdominal_volumes_only(
    real_series: list[SeriesView], shipped: RuleSet, noon: datetime
) -> None:
    assert len(real_series) > 60
    jobs: Counter[tuple[str, str]] = Counter()
    for view in real_series:
        evaluation = shipped.evaluate(view, now=noon, destination_of=lambda title: None)
        for job in evaluation.jobs:
            jobs[job.rule, modality(view)] += 1
            if job.rule == "chest-xray-findings":
                assert view.header.values["BodyPartExamined"] == ("CHEST",)
                assert view.header.values["ViewPosition"][0] in ("PA", "AP")
            else:
                assert view.header.values.get("BodyPartExamined", ("",))[0] in ("", "ABDOMEN")
    assert jobs["chest-xray-findings", "CR"] >= 1
    assert {sent for _, sent in jobs} <= {"CR", "DX", "CT"}


def test_every_real_series_gets_a_reason_for_every_rule(
    real_series: list[SeriesView], rules_of: Callable[..., RuleSet], noon: datetime
) -> None:
    odd = """
rule: odd
when:
  - SliceThickness < 5.0 && PixelSpacing[0] < 1.0 && KVP > 50.0
  - '!values.ImageType.exists(t, t.size() > 2 && t[2] == "LOCALIZER")'
  - body_part != "" && view != "" && laterality in ["L", "R", "B", "U"]
  - SeriesDescription.matches("(?i)abd|thorax") || has(values.ContrastBolusAgent)
  - AnatomicRegionSequence[0].CodeValue.startsWith("T-")
  - WindowCenter.exists(w, w > 30.0) && StudyDate > "20000101" && InstanceNumber >= 0
  - series.slice_spacing_mm < 10.0 && series.extent_mm > 1.0 && series.frame_count > 0
  - Manufacturer.contains("S") && SoftwareVersions.size() >= 1 && Rows * Columns > 0
run: {engine: ct-abdomen, results: [sr]}
"""
    rules = rules_of(odd)
    outcomes: Counter[Condition] = Counter()
    for view in real_series:
        (verdict,) = rules.evaluate(view, now=noon, destination_of=lambda title: None).verdicts
        assert verdict.reason
        for condition in verdict.conditions:
            assert condition.explanation
            outcomes[condition.outcome] += 1
    assert {Condition.TRUE, Condition.FALSE, Condition.MISSING, Condition.MIXED} <= outcomes.keys()
    assert outcomes[Condition.ERROR] < 0.02 * outcomes.total(), outcomes


def test_a_real_radiograph_without_a_view_is_refused_with_the_reason(
    real_series: list[SeriesView], shipped: RuleSet, noon: datetime
) -> None:
    thorax = next(view for view in real_series if view.header.values.get("BodyPartExamined") == ("THORAX",))
    verdict = shipped.evaluate(thorax, now=noon, destination_of=lambda title: None).verdicts[0]
    assert not verdict.matched
    outcomes = {condition.expression: condition.outcome for condition in verdict.conditions}
    assert outcomes['body_part == "CHEST"'] is Condition.TRUE  # THORAX is what table L-1 calls CHEST
    assert outcomes['values.view.exists(v, v in ["PA", "AP"])'] is Condition.MISSING
    assert "`missing: {view: allow}`" in verdict.reason
