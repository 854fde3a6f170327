"""What the node is made of: all of it pinned, and told as a bill of materials."""

import importlib.util
import re
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    """`.ci/sbom.py`."""
    spec = importlib.util.spec_from_file_location("sbom", ROOT / ".ci" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_of_a_dependency_is_pinned_to_one_version(sbom: ModuleType) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pinned = {_plain(name): version for name, version in pins.items()}
    exact = {  # torch for a GPU pins what it brings itself
        _plain(wanted.name)
        for wanted in map(Requirement, distribution("torch").requires or ())
        if str(wanted.specifier).startswith("==")
    }
    bill = sbom.bill(extras=("codecs", "onnx", "test"))
    loose = {str(one["name"]) for one in bill["components"]} - {"pip", "setuptools"}
    assert not {name for name in loose if _plain(name) not in pinned and _plain(name) not in exact}


def test_the_bill_of_materials_names_each_part_once_and_what_it_needs(sbom: ModuleType) -> None:
    bill = sbom.bill()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    names = [one["name"].lower() for one in bill["components"]]
    assert len(set(names)) == len(names) and {"torch", "pydicom", "highdicom", "blake3", "onnxruntime"} <= set(names)
    assert "pytest" not in names and bill["metadata"]["component"]["name"] == "dicom-node"
    references = {one["bom-ref"] for one in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert all(one["ref"] in references and set(one["dependsOn"]) <= references for one in bill["dependencies"])
    node = next(one for one in bill["dependencies"] if one["ref"].startswith("pkg:pypi/dicom-node@"))
    assert any(one.startswith("pkg:pypi/pydicom@") for one in node["dependsOn"])
