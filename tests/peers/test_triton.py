"""A CT series and a radiograph through a node and a real Triton server: right to the pixel, and told when they are not.

`triton_models` is the model repository: models of the Python backend that do with numbers what can be worked out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import WrittenSeries, write_ct_series, write_cxr
from dicom_node.engines.kserve import KServeEngine
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable
from dicom_node.model import EngineTask, JobState, Origin, StoredInstance
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.values import EngineResult, Findings, LabelVolume, Presence

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parent / "triton_models"
RULE = ROOT / "routing_rules" / "examples" / "kserve.yaml"
SHAPE, SPACING = (14, 64, 80), (4.0, 3.1, 3.3)
WINDOW = (-200.5, 299.5)  # so that the levels of the model are HU 0 and 100, and no whole HU is one
LABELS = {1: {"name": "soft"}, 2: {"name": "dense"}}


def _volume(**changes: Any) -> dict[str, Any]:
    return {
        "input": {
            "name": "image",
            "datatype": "FP16",
            "orientation": "SPL",  # slices, rows, columns of axial images, which are turned by less than 45 degrees
            "spacing_mm": list(SPACING),
            "intensity": {"clip": list(WINDOW), "to": [0, 1]},
        },
        "windows": {"window": [8, 32, 48], "overlap": 0.25, "batch": 3},
        "output": {"name": "scores", "labels": LABELS},
    } | changes


def _options(peer: Any, **changes: Any) -> dict[str, Any]:
    return {"base_url": peer.url, "retries": 1, "backoff_s": 0.1, **changes}


@pytest.fixture
def engine() -> Any:
    """`engine(peer, model=..., **options)`."""
    made: list[KServeEngine] = []

    def make(peer: Any, *, model: str = "levels", **options: Any) -> KServeEngine:
        settings = EngineSettings(kind="kserve", model=model, options=_options(peer, **options))
        made.append(KServeEngine("triton", settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def server(triton: Callable[[Path], Any]) -> Any:
    """A Triton with the models of this folder."""
    return triton(MODELS)


@pytest.fixture
def oblique(tmp_path: Path) -> WrittenSeries:
    """A CT phantom whose planes are turned about all three axes."""
    frame = np.eye(3)
    for axis, degrees in enumerate((20.0, -15.0, 25.0)):
        one, other = (k for k in range(3) if k != axis)
        turn, angle = np.eye(3), np.radians(degrees)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        frame = turn @ frame
    return write_ct_series(tmp_path / "ct", 840012, shape=SHAPE, spacing_mm=SPACING, direction=frame)


def _task(*paths: Path) -> EngineTask:
    instances = []
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        with path.open("rb") as file:
            start = file.read(256)
        offset = 128 + 4 + 12 + int.from_bytes(start[140:144], "little")
        instances.append(
            StoredInstance(
                sop_class_uid=str(ds.SOPClassUID),
                sop_instance_uid=str(ds.SOPInstanceUID),
                study_instance_uid=str(ds.StudyInstanceUID),
                series_instance_uid=str(ds.SeriesInstanceUID),
                transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
                path=str(path),
                data_set_offset=offset,
                data_set_length=path.stat().st_size - offset,
                sha256="",
                origin=Origin.RECEIVED,
                modality=str(ds.Modality),
            )
        )
    return EngineTask(
        job_id=1,
        study_instance_uid=instances[0].study_instance_uid,
        series_instance_uid=instances[0].series_instance_uid,
        instances=tuple(instances),
        header=read_series_header(instances),
        timeout_s=120.0,
    )


def _truth(paths: Any) -> dict[str, Any]:
    """By image: 0, 1 and 2 below, between and above the levels."""
    found = {}
    for path in paths:
        ds = pydicom.dcmread(path)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        found[str(ds.SOPInstanceUID)] = (hu >= 0).astype(int) + (hu >= 100)
    return found


def _labels(result: EngineResult) -> LabelVolume:
    (found,) = [value for value in result.values if isinstance(value, LabelVolume)]
    return found


def test_labels_of_an_oblique_series_are_right_to_the_pixel_in_half_precision(
    server: Any, engine: Callable[..., KServeEngine], oblique: WrittenSeries
) -> None:
    result = engine(server, volume=_volume()).run(_task(*oblique.paths), lambda: None)
    volume, truth = _labels(result), _truth(oblique.paths)
    expected = np.stack([truth[uid] for uid in volume.sop_instance_uids])
    assert {0, 1, 2} == set(np.unique(expected))
    np.testing.assert_array_equal(volume.labels, expected)
    assert result.provenance.version == "1"
    assert any("triton" in text for text in result.provenance.parameters)


def test_a_radiograph_comes_back_as_findings(server: Any, engine: Callable[..., KServeEngine], tmp_path: Path) -> None:
    film = write_cxr(tmp_path / "film.dcm", 840013, rows=256, columns=256)
    findings = {name: {"index": k, "name": name, "threshold": 0.5} for k, name in enumerate(("Bright", "Dark"))}
    recipe = {"input": {"name": "picture", "size": 64}, "output": "probability", "findings": findings}
    result = engine(server, model="chest", radiograph=recipe).run(_task(film.path), lambda: None)
    (found,) = result.values
    assert isinstance(found, Findings) and found.sop_instance_uid == film.sop_instance_uid
    bright, dark = found.items
    assert bright.confidence is not None and dark.confidence is not None
    assert bright.confidence + dark.confidence == pytest.approx(1, abs=1e-5)
    assert {bright.presence, dark.presence} == {Presence.PRESENT, Presence.ABSENT}


def test_what_the_server_tells_is_in_the_report_and_a_recipe_that_does_not_fit_in_the_error(
    server: Any, engine: Callable[..., KServeEngine]
) -> None:
    told = dict(engine(server, volume=_volume()).report())
    assert told["server"] == "127.0.0.1: triton 2.51.0"
    assert told["takes"] == "'image' FP16 [-1, 1, -1, -1, -1]"
    assert told["connection"].endswith("tensors travel as binary")
    wrong = _volume(output={"name": "mask", "labels": LABELS})
    with pytest.raises(ConfigError, match=r"volume\.output\.name: the model has no output 'mask'; it has 'scores'"):
        engine(server, volume=wrong).report()
    with pytest.raises(EngineUnavailable, match="model 'liver' is not ready, or the server has none"):
        engine(server, model="liver", volume=_volume()).report()
    with pytest.raises(EngineUnavailable, match="version '9' is not ready"):
        engine(server, version="9", volume=_volume()).report()


def test_a_batch_beyond_the_models_own_is_told_before_anything_is_sent(
    server: Any, engine: Callable[..., KServeEngine]
) -> None:
    many = _volume(windows={"window": [8, 16, 16], "overlap": 0.5, "batch": 8})
    with pytest.raises(ConfigError, match=r"windows\.batch: 8, but the model takes at most 4"):
        engine(server, volume=many).report()


def test_what_the_model_says_of_a_tensor_it_cannot_take_is_passed_on(
    server: Any, engine: Callable[..., KServeEngine], oblique: WrittenSeries
) -> None:
    recipe = _volume()
    recipe["input"] = {**recipe["input"], "intensity": [{"range": {"from": [0, 1], "to": [0, 20]}}]}
    with pytest.raises(EngineError, match=r"status [45]00: .*this model takes no such value"):
        engine(server, volume=recipe).run(_task(*oblique.paths), lambda: None)


def test_a_series_through_a_node_arrives_as_seg_and_sr_in_the_pacs(
    server: Any, oblique: WrittenSeries, line: Callable[..., Any], send: Callable[[Any, Path], None]
) -> None:
    options = _options(server, volume=_volume(), manufacturer="Tests")
    ours = line(RULE, {"triton-spleen": {"kind": "kserve", "model": "levels", "options": options}})
    send(ours, oblique.paths[0].parent)
    ours.settle(oblique.study_instance_uid, 120)
    (job,) = ours.jobs(oblique.study_instance_uid)
    assert job.state is JobState.DONE, job.error
    arrived = {one.modality: pydicom.dcmread(one.path) for one in ours.arrived(oblique.study_instance_uid)}
    assert set(arrived) == {"SEG", "SR"}
    seg, truth = arrived["SEG"], np.stack(list(_truth(oblique.paths).values()))
    groups = [item.SegmentIdentificationSequence[0] for item in seg.PerFrameFunctionalGroupsSequence]
    frames = seg.pixel_array.reshape(-1, *SHAPE[1:])
    labels = {int(item.SegmentNumber): item.SegmentLabel for item in seg.SegmentSequence}
    painted = dict.fromkeys(labels.values(), 0)
    for group, frame in zip(groups, frames, strict=True):
        painted[labels[int(group.ReferencedSegmentNumber)]] += int(frame.sum())
    assert painted == {"soft": int((truth == 1).sum()), "dense": int((truth == 2).sum())}
