"""What ships: the three rule files and the example configuration."""

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from dicom_node.config import NodeConfig, load_config, packaged
from dicom_node.model import Condition, Priority, SeriesView
from dicom_node.routing.load import check_rules, load_rules
from dicom_node.routing.rules import Evaluation, RuleSet

ROOT = Path(__file__).resolve().parents[2]
View = Callable[..., SeriesView]


@pytest.fixture(scope="module")
def shipped() -> RuleSet:
    config = NodeConfig()
    return load_rules(packaged("default_rules"), engines=config.engines, destinations=config.destinations)


@pytest.fixture(scope="module")
def evaluate(shipped: RuleSet, noon: datetime) -> Callable[[SeriesView], Evaluation]:
    return lambda view: shipped.evaluate(view, now=noon, destination_of={"CT1": "PACS"}.get)


def test_the_package_and_the_top_folder_hold_the_same_rules() -> None:
    assert packaged("default_rules").resolve() == ROOT / "routing_rules"
    assert len(list(packaged("default_rules").glob("*.yaml"))) == 3


def test_the_shipped_rules_load_with_the_default_configuration(shipped: RuleSet) -> None:
    assert [rule.name for rule in shipped.rules] == ["chest-xray-findings", "ct-abdomen"]
    chest, abdomen = shipped.rules
    assert (chest.engine, chest.results, chest.priority) == ("cxr-findings", ("sr",), Priority.URGENT)
    assert (abdomen.engine, abdomen.results) == ("ct-abdomen", ("seg", "sr"))
    assert chest.destinations == abdomen.destinations == ("sender",)


DX = {"Modality": "DX", "PresentationIntentType": "FOR PRESENTATION", "BodyPartExamined": "CHEST", "ViewPosition": "PA"}


def test_a_frontal_chest_radiograph_goes_to_the_findings_model(
    series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    (job,) = evaluate(series_view(**DX)).jobs
    assert (job.rule, job.destinations) == ("chest-xray-findings", ("PACS",))
    coded = {
        "Modality": "DX",
        "PresentationIntentType": "FOR PRESENTATION",
        "AnatomicRegionSequence": [{"CodeValue": "816094009", "CodingSchemeDesignator": "SCT"}],
        "ViewCodeSequence": [{"CodeValue": "399348003", "CodingSchemeDesignator": "SCT"}],
    }
    assert len(evaluate(series_view(**coded)).jobs) == 1
    cr = {key: value for key, value in DX.items() if key != "PresentationIntentType"} | {"Modality": "CR"}
    assert len(evaluate(series_view(**cr)).jobs) == 1


@pytest.mark.parametrize("views", [("PA", "LL"), ("LL", "PA"), ("LATERAL", "AP")])
def test_a_frontal_image_is_read_whichever_of_its_series_comes_first(
    views: tuple[str, str], series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    first = evaluate(series_view(**{**DX, "ViewPosition": views[0]}))  # a single image is judged at once
    assert len(first.jobs) == (views[0] == "PA")
    both = evaluate(series_view(**DX, values={"ViewPosition": views}, count=2))
    assert [job.rule for job in both.jobs] == ["chest-xray-findings"], both.verdicts[0].reason


@pytest.mark.parametrize("change", [{}, {"ViewPosition": ("PA", "LL")}])
def test_the_raw_image_of_a_pair_in_one_series_does_no_harm(
    change: dict[str, Any], series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    intents = {"PresentationIntentType": ("FOR PROCESSING", "FOR PRESENTATION")}
    assert len(evaluate(series_view(**DX, values=intents | change, count=2)).jobs) == 1


def test_the_rule_in_the_readme_is_the_one_that_ships(shipped: RuleSet, tmp_path: Path) -> None:
    block = (ROOT / "README.md").read_text().split("### Write a rule")[1].split("    rule: ", 1)[1].split("\n\n")[0]
    (tmp_path / "10.yaml").write_text("    rule: " + block)
    config = NodeConfig()
    (rule,) = load_rules(tmp_path, engines=config.engines, destinations=config.destinations).rules
    told, chest = (
        ([c.text for c in r.conditions], r.allowed_missing, r.engine, r.results, r.destinations)
        for r in (rule, shipped.rules[0])
    )
    assert told == chest


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"PresentationIntentType": "FOR PROCESSING"}, Condition.FALSE),
        ({"ViewPosition": "LL"}, Condition.FALSE),
        ({"ViewPosition": ""}, Condition.MISSING),
        ({"BodyPartExamined": ""}, Condition.MISSING),
        ({"BodyPartExamined": "HAND"}, Condition.FALSE),
        ({"values": {"ViewPosition": ("LL", "RL")}, "count": 2}, Condition.FALSE),
        ({"values": {"BodyPartExamined": ("CHEST", "HAND")}, "count": 2}, Condition.MIXED),
    ],
)
def test_other_radiographs_do_not_and_the_verdict_says_why(
    change: dict[str, Any], outcome: Condition, series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    evaluation = evaluate(series_view(**{**DX, **change}))
    assert evaluation.jobs == ()
    assert outcome in [c.outcome for c in evaluation.verdicts[0].conditions]
    assert evaluation.verdicts[0].reason


CT = {
    "Modality": "CT",
    "BodyPartExamined": "ABDOMEN",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SliceThickness": 5.0,
}


def volume(count: int = 40, gap: float = 5.0) -> dict[str, Any]:
    geometry = tuple(
        {"ImagePositionPatient": [0.0, 0.0, gap * i], "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
        for i in range(count)
    )
    return {"count": count, "geometry": geometry}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"BodyPartExamined": ""},
        {"BodyPartExamined": "", "AnatomicRegionSequence": [{"CodeValue": "T-D4000", "CodingSchemeDesignator": "SRT"}]},
        {"SliceThickness": None},
        {"ImageType": None},
        {"count": 1, "geometry": ({"NumberOfFrames": 60},), "SliceThickness": None},
    ],
)
def test_an_abdominal_ct_volume_goes_to_the_segmentation(
    change: dict[str, Any], series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    evaluation = evaluate(series_view(**{**CT, **volume(), **change}))
    assert [job.rule for job in evaluation.jobs] == ["ct-abdomen"], evaluation.verdicts[1].reason


@pytest.mark.parametrize(
    "change",
    [
        {"BodyPartExamined": "HEAD"},
        {"values": {"ImageType": (["ORIGINAL", "PRIMARY", "AXIAL"], ["ORIGINAL", "PRIMARY", "LOCALIZER"])}},
        {"SliceThickness": 10.0},
        {"SliceThickness": 0},
        volume(9),
        volume(40, gap=12.0),
        {"Modality": "MR"},
    ],
)
def test_other_ct_does_not(
    change: dict[str, Any], series_view: View, evaluate: Callable[[SeriesView], Evaluation]
) -> None:
    assert evaluate(series_view(**{**CT, **volume(), **change})).jobs == ()


def test_the_template_holds_no_rule_until_its_lines_are_uncommented(tmp_path: Path) -> None:
    text = (ROOT / "routing_rules" / "90-template.yaml").read_text()
    assert all(line.startswith("#") for line in text.splitlines())
    taken = text.replace("#~", "")
    (tmp_path / "90.yaml").write_text(taken)
    config = NodeConfig()
    assert check_rules(tmp_path, engines=config.engines, destinations=config.destinations) == []
    (rule,) = load_rules(tmp_path, engines=config.engines, destinations=config.destinations).rules
    assert len(rule.conditions) == 12
    for key in ("stop", "fallback", "origin", "late_instances", "missing", "description"):
        assert f"{key}:" in taken


# --- configuration -------------------------------------------------------------------------------------------------


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in inner_types(field.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from models(inner)


def inner_types(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        for inner in get_args(annotation):
            yield from inner_types(inner)


def test_the_example_configuration_is_the_defaults() -> None:
    assert load_config(ROOT / "config" / "node.yaml", environ={}) == NodeConfig()


def test_the_example_configuration_shows_every_key() -> None:
    text = (ROOT / "config" / "node.yaml").read_text()
    for model in set(models(NodeConfig)):
        for name in model.model_fields:
            assert re.search(rf"^(#~)?\s*(- )?{name}:", text, re.M), f"{model.__name__}.{name}"


def test_the_examples_in_the_configuration_are_right(tmp_path: Path) -> None:
    text = (ROOT / "config" / "node.yaml").read_text()
    for placeholder in ("peers: {}\n", "destinations: {}\n", "  overrides: []\n"):
        assert placeholder in text
        text = text.replace(placeholder, "")
    (tmp_path / "node.yaml").write_text(text.replace("#~", ""))
    config = load_config(tmp_path / "node.yaml", environ={})
    examples: list[BaseModel] = [
        *config.peers.values(),
        *config.destinations.values(),
        *config.completion.overrides,
    ]
    kinds = [type(example).__name__ for example in examples]
    assert kinds == ["PeerSettings", "DestinationSettings", "CompletionOverride"]
    for example in examples:
        assert example.model_fields_set == set(type(example).model_fields), type(example)
    assert yaml.safe_load(text.replace("#~", "")).keys() == NodeConfig.model_fields.keys()
