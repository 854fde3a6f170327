"""What an engine's `model` means, and that the next job takes the version that was enabled meanwhile."""

import hashlib
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicom_node.config import EngineSettings
from dicom_node.demo.packages import WEIGHTS_FILE
from dicom_node.demo.phantom_dicom import write_cxr
from dicom_node.errors import NodeError, PackageError
from dicom_node.model import EngineTask
from dicom_node.models import library, registry
from dicom_node.models.enabling import disable_model, enable_model, remove_model
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.importing import import_package, write_manifest
from dicom_node.models.library import Library
from dicom_node.models.package import load_package
from dicom_node.models.registry import ModelReference, find_package
from dicom_node.models.report import listed_models, package_report, self_test
from dicom_node.values import EngineResult, Findings

Task = Callable[..., EngineTask]
Write = Callable[[Path, dict[str, Any]], Path]


def nothing() -> None:
    """A heartbeat nobody listens to."""


@pytest.fixture
def installed(tmp_path: Path) -> Library:
    """An empty library."""
    return Library(tmp_path / "data" / "models")


@pytest.fixture
def version(tmp_path: Path, cxr_folder: Path, write_package: Write) -> Callable[..., Path]:
    """A radiograph package whose outputs tell its version: `version(n)` has n.0.0 and another last layer."""
    from safetensors.torch import load_file, save_file

    def write(number: int) -> Path:
        folder = tmp_path / f"cxr-{number}"
        shutil.copytree(cxr_folder, folder)
        tensors = load_file(folder / WEIGHTS_FILE)
        tensors["fc.bias"] = tensors["fc.bias"] * 0 + number - 2  # scores about 0.27, 0.5, 0.73 for 1, 2, 3
        tensors["fc.weight"] = tensors["fc.weight"] * 0
        save_file(tensors, folder / WEIGHTS_FILE)
        manifest = yaml.safe_load((folder / "model.yaml").read_text())
        manifest |= {"id": "chest", "version": f"{number}.0.0"}
        manifest["source"]["sha256"] = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        manifest.pop("metrics", None)
        return write_package(folder, manifest)

    return write


def scores(result: EngineResult) -> float:
    (findings,) = result.values
    assert isinstance(findings, Findings)
    return float(findings.items[0].confidence or 0.0)


# --- with the real engine and its runtime process


@pytest.fixture
def engine(installed: Library) -> Iterator[LocalModelEngine]:
    made = LocalModelEngine(
        "chest", EngineSettings(model="chest", options={"threads": 1}), devices=("cpu",), models_dir=installed.root
    )
    yield made
    made.close()


@pytest.fixture
def film(tmp_path: Path, task_for: Task) -> EngineTask:
    return task_for([write_cxr(tmp_path / "a.dcm", 4, rows=300, columns=300, view="PA").path])


def test_the_next_job_takes_the_version_that_was_enabled_and_never_an_older_one(
    installed: Library, version: Callable[..., Path], engine: LocalModelEngine, film: EngineTask
) -> None:
    for number in (1, 2, 3):
        import_package(installed, version(number), self_test=None)
    first = engine.run(film, nothing)
    assert first.provenance.version == "1.0.0" and scores(first) == pytest.approx(0.27, abs=0.01)

    switched: list[str] = []

    def switch() -> None:
        """In the middle of a job: another version is enabled, and somebody wants to delete the one at work."""
        if not switched:
            switched.append(enable_model(installed, "chest@2.0.0"))
            with pytest.MonkeyPatch.context() as patched, pytest.raises(PackageError, match="at work in a job"):
                patched.setattr(library, "_JOB_S", 0.05)
                remove_model(installed, "chest@1.0.0", engines={"chest": "chest"})

    during = engine.run(film, switch)
    assert switched and (during.provenance.version, scores(during)) == ("1.0.0", scores(first))
    remove_model(installed, "chest@1.0.0", engines={"chest": "chest"})

    after = engine.run(film, nothing)
    assert after.provenance.version == "2.0.0" and scores(after) == pytest.approx(0.5, abs=0.01)
    assert after.provenance.device_uid != first.provenance.device_uid

    enable_model(installed, "chest@3.0.0")
    (installed.folder("chest", "3.0.0") / WEIGHTS_FILE).write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(PackageError, match="sha256"):
            engine.run(film, nothing)
    disable_model(installed, "chest")
    with pytest.raises(PackageError, match="'chest' is disabled"):
        engine.run(film, nothing)
    enable_model(installed, "chest@2.0.0")
    assert engine.run(film, nothing).provenance.version == "2.0.0"


def test_no_job_is_lost_and_none_is_mixed_while_versions_come_and_go(
    installed: Library, version: Callable[..., Path], engine: LocalModelEngine, film: EngineTask
) -> None:
    folders = {number: version(number) for number in (1, 3)}
    for folder in folders.values():
        import_package(installed, folder, self_test=None)
    enough, seen, failed = threading.Event(), list[tuple[str, float]](), list[NodeError]()
    engine.warm_up(nothing)

    def work() -> None:
        while not enough.is_set():
            try:
                result = engine.run(film, nothing)
                seen.append((result.provenance.version, round(scores(result), 2)))
            except NodeError as exc:
                failed.append(exc)
                return

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for turn in range(4):
            new, old = ((3, 1), (1, 3))[turn % 2]
            enable_model(installed, f"chest@{new}.0.0")
            remove_model(installed, f"chest@{old}.0.0", engines={"chest": "chest"})
            before = len(seen)
            while len(seen) < before + 4 and any(worker.is_alive() for worker in workers):
                time.sleep(0.01)
            import_package(installed, folders[old], self_test=None)
    finally:
        enough.set()
        for worker in workers:
            worker.join(timeout=60)
    assert failed == [] and not any(worker.is_alive() for worker in workers)
    assert set(seen) == {("1.0.0", 0.27), ("3.0.0", 0.73)}


def test_an_import_runs_the_network_and_the_report_tells_what_was_found(
    installed: Library, version: Callable[..., Path]
) -> None:
    folder = version(2)
    import_package(installed, folder, self_test=lambda package: self_test(package, "cpu") and None)
    told = dict(package_report("chest", "cpu", installed.root))
    assert told["model"] == "chest 2.0.0, classification"
    assert told["trust"] == "data: nothing in the package is executed"
    assert told["installed"].endswith("self-test at import passed")
    assert told["self-test"].startswith("passed: 11 outputs")
    assert told["takes"].startswith("DX or CR") and "images fitted to 64 x 64" in told["takes"]


def test_a_scripted_network_with_its_configuration_inside_is_installed_as_a_graph(
    tmp_path: Path, installed: Library
) -> None:
    import torch

    names = {"0": "background", "1": "spleen", "2": "liver"}
    metadata = {
        "version": "0.1.0",
        "name": "one-file",
        "network_data_format": {
            "inputs": {"image": {"modality": "CT", "num_channels": 1}},
            "outputs": {"pred": {"num_channels": 3, "channel_def": names}},
        },
    }
    image, scale = {"keys": "image"}, {"a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1, "clip": True}
    before = [
        {"_target_": "LoadImaged", **image},
        {"_target_": "EnsureChannelFirstd", **image},
        {"_target_": "Orientationd", **image, "axcodes": "RAS"},
        {"_target_": "Spacingd", **image, "pixdim": [3.0, 3.0, 3.0], "mode": "bilinear"},
        {"_target_": "ScaleIntensityRanged", **image, **scale},
    ]
    after = [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
        | {"nearest_interp": False, "to_tensor": True},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]
    config = {
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "overlap": 0.5},
        "postprocessing": {"_target_": "Compose", "transforms": after},
    }
    extra = {"metadata.json": json.dumps(metadata), "inference.json": json.dumps(config)}
    path = tmp_path / "organs.ts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what people have
        torch.jit.save(torch.jit.script(torch.nn.Conv3d(1, 3, 1).eval()), str(path), _extra_files=extra)

    imported = import_package(installed, path, self_test=None)
    assert (imported.pin.format, imported.package.manifest.trust) == ("monai_bundle", "graph")
    assert not import_package(installed, path, self_test=None).new
    told = dict(package_report("one-file", "cpu", installed.root))
    assert told["format"] == "monai_bundle, its configuration read as data" and told["network"] == "kept as torchscript"
    assert told["trust"] == "graph: a graph of operations, run only in the contained runtime process"
    assert told["self-test"].startswith("passed: 3 outputs")
    lone = tmp_path / "lone"
    lone.mkdir()
    path.rename(lone / path.name)
    assert find_package(str(lone)).device_uid == imported.package.device_uid  # the same model, wherever it lies
    assert write_manifest(lone) == lone / "model.yaml"
    assert find_package(str(lone)).device_uid == imported.package.device_uid
    with pytest.raises(PackageError, match="is there already"):
        write_manifest(lone)


# --- without


def test_an_engine_asks_the_state_once_per_job_and_reads_files_only_when_it_changed(
    installed: Library, version: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        import_package(installed, version(number), self_test=None)
    looked: list[str] = []
    find = registry.find_package

    def counted(model: str, models_dir: Path | None) -> Any:
        looked.append(model)
        return find(model, models_dir)

    monkeypatch.setattr(registry, "find_package", counted)
    follows, stays = ModelReference("chest", installed.root), ModelReference("chest@1.0.0", installed.root)
    for _ in range(5):
        assert follows.current().manifest.version == "1.0.0"
    assert len(looked) == 1
    enable_model(installed, "chest@2.0.0")
    for _ in range(5):
        assert follows.current().manifest.version == "2.0.0"
        assert stays.current().manifest.version == "1.0.0"
    assert len(looked) == 3


def test_a_removed_model_is_told_to_the_next_job(installed: Library, version: Callable[..., Path]) -> None:
    import_package(installed, version(1), self_test=None)
    reference = ModelReference("chest", installed.root)
    with reference.held() as package:
        assert package.manifest.version == "1.0.0"
    remove_model(installed, "chest", engines={}, force=True)
    with pytest.raises(PackageError, match="nor an installed one"), reference.held():
        pass


def test_a_folder_that_vanishes_behind_the_back_of_an_engine_is_told(
    installed: Library, version: Callable[..., Path]
) -> None:
    import_package(installed, version(1), self_test=None)
    reference = ModelReference("chest", installed.root)
    folder = reference.current().folder
    shutil.rmtree(folder)
    with pytest.raises(PackageError, match="chest"), reference.held():
        pass


def test_a_package_in_its_own_folder_is_read_again_when_a_file_there_changes(
    installed: Library, version: Callable[..., Path]
) -> None:
    import_package(installed, version(1), self_test=None)
    folder = version(2)
    reference = ModelReference(str(folder), installed.root)
    assert reference.current().manifest.version == "2.0.0"
    manifest = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(manifest.replace("2.0.0", "2.0.1"))
    disable_model(installed, "chest")  # of the id, not of the folder
    assert reference.current().manifest.version == "2.0.1"
    assert reference.current() is reference.current()
    (folder / WEIGHTS_FILE).write_bytes(b"replaced")
    assert reference.current().manifest.version == "2.0.1"
    (folder / "model.yaml").unlink()
    with pytest.raises(PackageError, match="no model package is recognised"):
        reference.current()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(PackageError, match="no model package is recognised"):
        patched.setattr(registry, "find_package", None)  # a queue of jobs must not read it once each
        reference.current()
    (folder / "model.yaml").write_text(manifest)
    assert reference.current().manifest.version == "2.0.0"


def test_an_installed_id_comes_before_a_folder_of_that_name(
    tmp_path: Path, installed: Library, version: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(version(3), tmp_path / "chest")
    assert find_package("chest", installed.root).manifest.version == "3.0.0"
    import_package(installed, version(1), self_test=None)
    assert find_package("chest", installed.root).manifest.version == "1.0.0"
    assert find_package("./chest", installed.root).manifest.version == "3.0.0"


def test_a_file_as_a_model_points_to_import(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(PackageError, match=r"is a file; 'dicom-node models import"):
        find_package(str(tmp_path / "a.zip"))


def test_the_list_shows_versions_engines_and_damage(installed: Library, version: Callable[..., Path]) -> None:
    for number in (1, 2):
        import_package(installed, version(number), self_test=None)
    (installed.folder("chest", "2.0.0") / "model.yaml").write_text("id: chest\n")
    engines = {"a": "chest", "b": "chest@2.0.0", "c": str(version(3)), "d": "nowhere", "e": "demo-ct-abdomen"}
    rows = {row[:2]: row for row in listed_models(installed.root, engines)}
    assert rows["chest", "1.0.0"][2:7] == ("state_dict", "data", "classification", "yes", "demonstration")
    assert rows["chest", "1.0.0"][8] == "a"
    assert rows["chest", "2.0.0"][5:9] == ("no", "damaged", "-", "b")
    assert rows["chest", "3.0.0"][8:] == ("c", engines["c"])
    assert rows["-", "-"][6:] == ("not found", "-", "d", "nowhere")
    embedded = next(row for key, row in rows.items() if key[0] == "demo-ct-abdomen")
    assert embedded[5] == "yes" and embedded[8:] == ("e", "embedded")
    assert len(embedded[7]) == 12


def test_several_weights_files_count_together(tmp_path: Path, write_package: Write) -> None:
    contents = [b"fold 0", b"fold 1"]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    folder = tmp_path / "nnunet"
    manifest = yaml.safe_load((registry.packaged("demo", "weights", "demo-ct-abdomen") / "model.yaml").read_text())
    paths = [f"fold_{n}/checkpoint_final.pth" for n in range(2)]
    manifest["source"] = {
        "format": "nnunet",
        "path": paths[0],
        "sha256": digests[0],
        "network": {"name": "PlainConvUNet", "args": {}},
        "folds": [{"path": paths[1], "sha256": digests[1]}],
    }
    write_package(folder, manifest)
    for path, content in zip(paths, contents, strict=True):
        (folder / path).parent.mkdir()
        (folder / path).write_bytes(content)
    package = load_package(folder)
    package.check_weights()
    assert [file.path for file in package.weights_files] == paths
    assert package.weights_sha256 == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    before = package.device_uid
    (folder / paths[1]).write_bytes(b"another fold")
    with pytest.raises(PackageError, match=r"fold_1/checkpoint_final\.pth: sha256 is"):
        package.check_weights()
    manifest["source"]["folds"][0]["sha256"] = hashlib.sha256(b"another fold").hexdigest()
    write_package(folder, manifest)
    assert load_package(folder).device_uid != before
