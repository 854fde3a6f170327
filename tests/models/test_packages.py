"""Model packages: what is read, what is refused and how it is said."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.demo.packages import ct_package, cxr_package
from dicom_node.demo.phantom_cxr import FINDING_NAMES
from dicom_node.errors import PackageError
from dicom_node.models.package import ModelPackage, load_package
from dicom_node.models.registry import find_package

Write = Callable[[Path, dict[str, Any]], Path]
DIGEST = "ab" * 32


@pytest.fixture
def manifest() -> dict[str, Any]:
    return copy.deepcopy(ct_package(DIGEST))


def _set(manifest: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    inner: Any = manifest
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    if isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value


def test_both_demonstration_manifests_fit_the_schema(tmp_path: Path, write_package: Write) -> None:
    ct = load_package(write_package(tmp_path / "ct", ct_package(DIGEST)))
    cxr = load_package(write_package(tmp_path / "cxr", cxr_package(DIGEST, dict.fromkeys(FINDING_NAMES, 0.5))))
    assert ct.manifest.task == "segmentation"
    assert [label.key for label in ct.manifest.output.labels] == ["liver", "spleen", "kidney"]
    assert ct.manifest.output.labels[1].segment.type.value == "78961009"
    assert cxr.manifest.task == "classification"
    assert [finding.key for finding in cxr.manifest.output.findings] == list(FINDING_NAMES)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("surprise", 1, "surprise: unknown key"),
        ("select.modalities", ["CT"], "select.modalities: unknown key"),
        ("select.geometry.regular", "guess", "select.geometry.regular"),
        ("select.sop_class", ["CTImage"], "SOP Class UID"),
        ("trust", "graph", "format 'state_dict' needs 'data'"),
        ("trust", "code", "format 'state_dict' needs 'data'"),
        ("task", "detection", "segmentation"),
        ("source.format", "pickle", "source: "),
        ("source.format", "torchscript", "source.network: unknown key"),
        ("source.sha256", "xyz", "source.sha256"),
        ("source.path", "../weights.safetensors", "inside the package folder"),
        ("source.path", "/etc/weights.safetensors", "inside the package folder"),
        ("source.path", "a\0b.safetensors", "inside the package folder"),
        ("intended_use.text", "fine\x1b[2K", "control characters"),
        ("manufacturer", "A\\B", "backslashes"),
        ("output.labels.0.name", "Spl\\een", "backslashes"),
        ("output.decide", 0.5, "needs sigmoid"),
        ("metrics.file", "a\0b", "metrics.file"),
        ("source.path", "model.pickle", ".safetensors"),
        ("source.network.name", "os.system", "not on the list of networks"),
        ("source.network.name", "EfficientNetBN", "not on the list of networks"),
        ("source.network.args", {"pretrained": True}, "no argument a package may set"),
        ("source.network.args", {"out_channels": 10**9}, "65536"),
        ("input.spacing_mm", [4, 4, 0], "input.spacing_mm.2"),
        ("input.orientation", "RAR", "one letter of each pair"),
        ("input.intensity.clip", [240, -160], "lower, higher"),
        ("infer.window", [64, 64], "three sizes"),
        ("infer.overlap", 1.0, "infer.overlap"),
        ("output.labels.1.index", 1, "used twice"),
        ("output.labels.0.index", 0, "output.labels.0.index"),
        ("output.labels.0.expected", [{"near": "pancreas"}], "no other label"),
        ("output.labels.0.segment.type", "Liver", "output.labels.0.segment.type"),
        ("output.labels.0.segment.type", ["SCT", "", "Liver"], "scheme, value, meaning"),
        ("id", "../../etc", "letters, digits"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_expected(
    key: str, value: Any, says: str, manifest: dict[str, Any], tmp_path: Path, write_package: Write
) -> None:
    _set(manifest, key, value)
    with pytest.raises(PackageError) as raised:
        load_package(write_package(tmp_path / "package", manifest))
    assert says in str(raised.value)
    assert "model.yaml" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: !!python/object/apply:os.system ['true']\n", "plain YAML"),
        ("a: &a [1]\nb: [" + "*a, " * 40 + "]\n", "aliases"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "merge keys"),
        (
            "".join(f"a{n}: &a{n} [" + f"*a{n - 1}, " * 2 * bool(n) + "1]\n" for n in range(16)),
            "more than 200000 values",
        ),
        ("t: &t " + "x" * 200_000 + "\na: [" + "*t, " * 30 + "]\n", "MiB of text"),
        ("a: 0x" + "f" * 5000 + "\n", "64 bits"),
        ("- 1\n", "keys and values"),
        ("a: [\n", "plain YAML"),
        ("[" * 5000, "levels"),
        ("a: 1\n" * 200_000, "larger than"),
    ],
)
def test_yaml_that_is_more_or_less_than_data_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(PackageError, match=says):
        load_package(tmp_path)


def test_weights_that_were_exchanged_are_noticed(ct_folder: Path, tmp_path: Path) -> None:
    package = load_package(ct_folder)
    package.check_weights()
    copied = ModelPackage(folder=tmp_path, manifest=package.manifest, config_sha256=package.config_sha256)
    with pytest.raises(PackageError, match="no readable weights"):
        copied.check_weights()
    (tmp_path / "weights.safetensors").write_bytes(package.weights_path.read_bytes() + b"\0")
    with pytest.raises(PackageError, match="sha256"):
        copied.check_weights()


def test_weights_may_not_be_a_link_out_of_the_folder(ct_folder: Path, tmp_path: Path) -> None:
    package = load_package(ct_folder)
    (tmp_path / "weights.safetensors").symlink_to(package.weights_path)
    copied = ModelPackage(folder=tmp_path, manifest=package.manifest, config_sha256=package.config_sha256)
    with pytest.raises(PackageError, match="out of the package folder"):
        copied.check_weights()


def test_the_device_uid_changes_with_the_meaning_and_not_with_the_spelling(
    manifest: dict[str, Any], tmp_path: Path, write_package: Write
) -> None:
    first = load_package(write_package(tmp_path / "a", manifest))
    reordered = dict(reversed(manifest.items()))
    again = load_package(write_package(tmp_path / "b", reordered))
    assert first.device_uid == again.device_uid
    assert first.device_uid.startswith("2.25.") and len(first.device_uid) <= 64
    seen = {first.device_uid}
    for key, value in (("version", "1.0.1"), ("infer.overlap", 0.5), ("source.sha256", "cd" * 32)):
        changed = copy.deepcopy(manifest)
        _set(changed, key, value)
        seen.add(load_package(write_package(tmp_path / key, changed)).device_uid)
    assert len(seen) == 4


def test_provenance_says_demonstration_and_its_notice(
    manifest: dict[str, Any], tmp_path: Path, write_package: Write
) -> None:
    provenance = load_package(write_package(tmp_path / "a", manifest)).provenance(("device=cpu",))
    assert provenance.demonstration
    assert "not for clinical use" in provenance.notice
    assert provenance.weights_sha256 == DIGEST
    assert provenance.parameters == ("device=cpu",)


def test_an_unknown_model_lists_what_there_is() -> None:
    with pytest.raises(PackageError, match="neither an embedded package"):
        find_package("no-such-model")


def test_a_package_folder_is_found_by_its_path(ct_folder: Path) -> None:
    assert find_package(str(ct_folder)).manifest.id == "demo-ct-abdomen"


def test_the_work_side_of_the_models_never_loads_torch() -> None:
    code = (
        "import sys, dicom_node.models.engine, dicom_node.plugins, dicom_node.model_commands;"
        "import dicom_node.models.importing, dicom_node.models.enabling, dicom_node.models.report;"
        "sys.exit(1 if 'torch' in sys.modules or 'monai' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
