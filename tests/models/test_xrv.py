"""torchxrayvision's checkpoints give its own numbers, and never a score for what they were not trained for."""

import hashlib
import io
import json
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from monai.networks.nets import DenseNet121 as MonaiDenseNet121
from pydantic import ValidationError
from torch import nn

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_cxr import FINDING_NAMES
from dicom_node.demo.phantom_dicom import write_cxr
from dicom_node.errors import EngineError, PackageError
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.formats import describe_folder
from dicom_node.models.forward import Network, classify
from dicom_node.models.loaders import load_module
from dicom_node.models.loaders.xrv import DenseNet121, operating_point_norm
from dicom_node.models.manifest import FindingsBlock
from dicom_node.models.registry import find_package
from dicom_node.pixels import displayed_radiograph, read_image
from dicom_node.radiograph import prepare_xrv
from dicom_node.results.codes import FINDINGS
from dicom_node.values import Findings, Presence

PUBLISHED = "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
CHEXPERT = "chex-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Random weights with logits spread over the range that the operating points cut."""
    torch.manual_seed(11)
    made = DenseNet121(18).eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        made.features.norm5.weight.fill_(4.0)  # type: ignore[union-attr]
        made.classifier.bias.uniform_(-4, -1)
    return made


@pytest.fixture
def whole_module(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> Callable[..., bytes]:
    """The bytes of a module pickled whole as the class torchxrayvision has, zip or legacy."""

    def made(*, zipped: bool = False, **attributes: Any) -> bytes:
        packages = {name: types.ModuleType(name) for name in ("torchxrayvision", "torchxrayvision.models")}
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)
        kind = type("DenseNet", (nn.Module,), {"__module__": "torchxrayvision.models"})
        packages["torchxrayvision.models"].DenseNet = kind  # type: ignore[attr-defined]
        whole = kind()
        whole.features, whole.classifier = network.features, network.classifier
        points = attributes.pop("op_threshs", None)
        if points is not None:
            whole.register_buffer("op_threshs", torch.tensor(points))
        for name, value in attributes.items():
            setattr(whole, name, value)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the class has no source code to put beside it
            torch.save(whole, file, _use_new_zipfile_serialization=zipped)
        for name in packages:
            monkeypatch.delitem(sys.modules, name)
        return file.getvalue()

    return made


def reference(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits by MONAI's DenseNet121 with the same weights under its names."""
    other = MonaiDenseNet121(spatial_dims=2, in_channels=1, out_channels=18).eval()
    renamed = {}
    for name, tensor in network.state_dict().items():
        parts = name.replace("classifier", "class_layers.out").split(".")
        if "denselayer" in name:
            parts.insert(3, "layers")
        renamed[".".join(parts)] = tensor
    other.load_state_dict(renamed)
    with torch.inference_mode():
        return other(images)


def normed(probability: float, point: float | None) -> float:
    """The library's rule for one number."""
    if point is None:
        return 0.5
    return probability / (2 * point) if probability < point else 1 - (1 - probability) / (2 * (1 - point))


@pytest.mark.parametrize("zipped", [True, False])
def test_the_published_whole_module_gives_the_librarys_numbers(
    zipped: bool, network: nn.Module, whole_module: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / PUBLISHED).write_bytes(whole_module(zipped=zipped))
    package = find_package(str(tmp_path))
    source = package.manifest.source.model_dump()
    assert source["thresholds"][2] == 0.09814756 and package.manifest.trust == "data"
    assert package.manifest.id == "xrv-densenet121-res224-all"
    images = torch.rand(2, 1, 224, 224) * 2048 - 1024
    with torch.inference_mode():
        found = load_module(package.weights_path, source)(images)
    logits = reference(network, images)
    expected = [
        [normed(1 / (1 + math.exp(-value)), point) for value, point in zip(row, source["thresholds"], strict=True)]
        for row in logits.double().tolist()
    ]
    assert np.abs(found.numpy() - np.array(expected)).max() < 1e-4
    assert float(found.min()) < 0.4 and float(found.max()) > 0.6  # both branches were asked


def test_an_operating_point_becomes_a_half_and_an_untrained_output_stays_there() -> None:
    points = torch.tensor([0.1, 0.02, float("nan")])
    found = operating_point_norm(torch.tensor([[0.1, 0.0, 0.9], [0.55, 1.0, 0.1], [0.05, 0.01, 0.0]]), points)
    expected = [[0.5, 0.0, 0.5], [0.75, 1.0, 0.5], [0.25, 0.25, 0.5]]
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_nine_of_the_eleven_findings_are_assessed(whole_module: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / PUBLISHED).write_bytes(whole_module())
    described = describe_folder(tmp_path)
    findings = {finding["key"]: finding for finding in described.manifest["output"]["findings"]}
    assert list(findings) == list(FINDING_NAMES)
    assert {key for key, finding in findings.items() if finding.get("assessed") is False} == {
        "tuberculosis",
        "calcification",
    }
    assert findings["nodule_mass"]["index"] == [11, 12]
    assert findings["cardiomegaly"]["index"] == 10
    assert any("never assessed: Tuberculosis, Calcification" in note for note in described.notes)
    coded = {key: tuple(finding["code"]) for key, finding in findings.items()}
    ours = {key: (c.code.scheme, c.code.value, c.code.meaning) for key, c in FINDINGS.items()}
    assert coded == {key: ours[key] for key in coded}


def test_what_a_data_set_had_no_labels_for_is_not_assessed(whole_module: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / CHEXPERT).write_bytes(whole_module())
    findings = describe_folder(tmp_path).manifest["output"]["findings"]
    assessed = [finding["key"] for finding in findings if finding.get("assessed", True)]
    assert assessed == ["cardiomegaly", "pleural_effusion", "pneumothorax", "consolidation", "atelectasis"]


def test_a_module_that_tells_its_own_outputs_needs_no_name(whole_module: Callable[..., bytes], tmp_path: Path) -> None:
    labels = ["Fibrosis", "Mass", *[""] * 16]
    points = [0.25, 0.5, *[math.nan] * 16]
    (tmp_path / "mine.pth").write_bytes(whole_module(zipped=True, targets=labels, op_threshs=points))
    manifest = find_package(str(tmp_path)).manifest
    assert manifest.source.model_dump()["thresholds"] == (0.25, 0.5, *[None] * 16)
    assessed = {finding.key: finding.index for finding in manifest.output.findings if finding.assessed}  # type: ignore[union-attr]
    assert assessed == {"fibrosis": (0,), "nodule_mass": (1,)}
    network = load_module(tmp_path / "mine.pth", manifest.source.model_dump())
    with torch.inference_mode():
        found = network(torch.zeros(1, 1, 224, 224))
    assert found[0, 2:].tolist() == [0.5] * 16


def test_a_state_dict_needs_a_file_that_says_what_its_outputs_are(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    with pytest.raises(PackageError, match="no model package is recognised"):
        describe_folder(tmp_path)
    names = tmp_path / "xrv.json"
    for text, says in (
        ("[]", "expected"),
        ("{", "is no JSON"),
        ('{"labels": ["Mass"], "op_threshs": [1.5]}', "between 0 and 1"),
        ('{"labels": ["Mass"], "op_threshs": [0.5, 0.5]}', "one for each of the 1 labels"),
        ('{"labels": ["Mass", "Mass"]}', "there twice"),
        ('{"labels": ["Hernia"]}', "is a finding"),
    ):
        names.write_text(text, encoding="utf-8")
        with pytest.raises(PackageError, match=says):
            describe_folder(tmp_path)
    names.write_text(json.dumps({"labels": ["Mass", *[""] * 17]}), encoding="utf-8")
    package = find_package(str(tmp_path))
    assert package.manifest.output.activation == "sigmoid"
    images = torch.rand(1, 1, 224, 224)
    with torch.inference_mode():
        found = load_module(package.weights_path, package.manifest.source.model_dump())(images)
    assert torch.allclose(found, reference(network, images), atol=1e-4)
    names.write_text(json.dumps({"labels": ["Mass"], "op_threshs": [0.5]}), encoding="utf-8")
    package = find_package(str(tmp_path))
    with pytest.raises(PackageError, match="1 values for the 18 outputs"):
        load_module(package.weights_path, package.manifest.source.model_dump())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / PUBLISHED
    torch.save({"classifier.weight": torch.zeros(18, 1024)}, path)
    source = {"format": "xrv", "path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with pytest.raises(PackageError, match="do not fit the network"):
        load_module(path, source)
    torch.save({"weight": torch.zeros(18, 1024)}, path)
    source["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(PackageError, match="no DenseNet of torchxrayvision"):
        load_module(path, source)


def test_a_film_gets_nine_scores_and_two_not_assessed(
    network: nn.Module, whole_module: Callable[..., bytes], tmp_path: Path, task_for: Callable[..., Any]
) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / PUBLISHED).write_bytes(whole_module())
    film = write_cxr(tmp_path / "film.dcm", 8, rows=512, columns=512, photometric="MONOCHROME2", view="PA")
    task = task_for([film.path])
    engine = LocalModelEngine("xrv", EngineSettings(model=str(folder), options={"threads": 1}))
    try:
        (findings,) = engine.run(task, lambda: None).values
    finally:
        engine.close()
    assert isinstance(findings, Findings)
    plane = prepare_xrv(displayed_radiograph(read_image(task.instances[0])), 224)
    logits = reference(network, torch.from_numpy(plane)[None, None])[0].double().tolist()
    points = find_package(str(folder)).manifest.source.model_dump()["thresholds"]
    scores = [normed(1 / (1 + math.exp(-value)), point) for value, point in zip(logits, points, strict=True)]
    found = {item.key: item for item in findings.items}
    for key in ("tuberculosis", "calcification"):
        assert (found[key].presence, found[key].confidence) == (Presence.UNDETERMINED, None)
    expected = {"cardiomegaly": scores[10], "nodule_mass": max(scores[11:13]), "infiltration": scores[2]}
    for key, score in expected.items():
        assert found[key].confidence == pytest.approx(score, abs=1e-3)
        assert found[key].presence is (Presence.PRESENT if score >= 0.5 else Presence.ABSENT)
    assert pydicom.dcmread(film.path).SOPInstanceUID == findings.sop_instance_uid


class _Answer(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor([values])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.values.expand(len(images), -1)


def test_probabilities_are_taken_as_they_are_and_nothing_else_passes_for_one() -> None:
    def ask(*values: float, activation: str) -> list[float]:
        network = Network(_Answer(*values), torch.device("cpu"), torch.contiguous_format, "fp32")
        found, _ = classify(network, torch.zeros(1, 8, 8), {"batch": "auto"}, activation)
        return found[0].tolist()

    assert ask(0.0, 0.25, 1.0, activation="none") == [0.0, 0.25, 1.0]
    assert ask(0.0, activation="sigmoid") == [0.5]
    for wrong in (-0.01, 1.01):
        with pytest.raises(EngineError, match="no probabilities"):
            ask(0.5, wrong, activation="none")


def test_a_finding_says_which_outputs_score_it() -> None:
    def outputs(**changed: Any) -> tuple[int, ...]:
        finding = {"key": "a", "name": "A", "code": ["99X", "A", "A"], "threshold": 0.5, **changed}
        return FindingsBlock.model_validate({"findings": [finding]}).findings[0].index

    assert (outputs(index=3), outputs(index=[3, 5]), outputs(assessed=False)) == ((3,), (3, 5), ())
    for changed, says in (
        ({}, "is required"),
        ({"index": []}, "is required"),
        ({"index": [3, 3]}, "index 3 is used twice"),
        ({"index": -1}, "greater than or equal to 0"),
    ):
        with pytest.raises(ValidationError, match=says):
            outputs(**changed)
