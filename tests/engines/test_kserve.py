"""Series through a KServe v2 server over real sockets, well or badly answered, to SEG, measurements and findings."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, StorageSettings
from dicom_node.engines.kserve import KServeEngine
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
    SeriesRejected,
)
from dicom_node.model import EngineTask, JobState, Level, Origin, Sending, SeriesView, Source, StoredInstance
from dicom_node.pipeline.encode import encoded, result_context
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.plugins import engine_class
from dicom_node.results.seg import SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.routing.load import load_rules
from dicom_node.store.catalog import open_catalog
from dicom_node.values import EngineResult, Findings, LabelVolume, Measurements, Presence

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
SHAPE = (9, 22, 26)
SPACING = (2.5, 0.8, 0.7)
Make = Callable[..., KServeEngine]


def _server_module() -> ModuleType:
    name = "contract_server_kserve"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "kserve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture
def peer() -> Iterator[Any]:
    with SERVERS.KServeServer() as server:
        yield server


# --- recipes ---------------------------------------------------------------------------------------------------------

LABELS = {1: {"name": "spleen"}, 2: {"name": "aorta"}}
Options = dict[str, Any]


def _volume(**changes: Any) -> Options:
    """A recipe; `changes` by block: `input`, `output`, `windows` and what stands beside them."""
    recipe: Options = {
        "input": {"name": "image", "spacing_mm": [0.7, 0.8, 2.5], **changes.pop("input", {})},
        "windows": {"window": [16, 16, 8], "overlap": 0.5, "batch": 2},
        "output": {"name": "scores", "labels": LABELS, **changes.pop("output", {})},
    }
    return recipe | changes


def _radiograph(**changes: Any) -> Options:
    recipe: Options = {
        "input": {"name": "picture", "size": 32, **changes.pop("input", {})},
        "output": "logits",
        "findings": {
            "bright": {"index": 1, "name": "Bright", "threshold": 0.5, "code": ["SCT", "36118008", "Pneumothorax"]},
            "dark": {"index": 2, "name": "Dark", "threshold": 0.5},
            "other": {"output": "other", "index": 0, "name": "Other", "threshold": 0.2},
        },
    }
    return recipe | changes


@pytest.fixture
def engine(peer: Any) -> Iterator[Make]:
    """`engine(model=..., timeout_s=..., volume=..., **options)`: one on the server."""
    made: list[KServeEngine] = []

    def make(*, model: str = "levels", timeout_s: float = 30.0, **options: Any) -> KServeEngine:
        if "radiograph" not in options:
            options.setdefault("volume", _volume())
        settings = EngineSettings(
            kind="kserve",
            model=model,
            timeout_s=timeout_s,
            options={"base_url": peer.url, "retries": 1, "backoff_s": 0.01, **options},
        )
        made.append(engine_class("kserve")("ks", settings, devices=("cpu",), later="ignored"))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- series ----------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """Images on disk, their values by UID, and what the node gives a task."""

    values: dict[str, Any]
    instances: list[StoredInstance]
    notes: list[str] = field(default_factory=list)
    sent: list[tuple[Sending, str]] = field(default_factory=list)
    kept: list[tuple[bytes, str]] = field(default_factory=list)

    def task(self, **changes: Any) -> EngineTask:
        """With the functions of the node, which here keep in lists."""

        @contextmanager
        def record(sending: Sending) -> Iterator[Callable[[Sending], None]]:
            latest = [sending]
            try:
                yield latest.append
            except BaseException as exc:
                self.sent.append((latest[-1], type(exc).__name__))
                raise
            self.sent.append((latest[-1], "sent"))

        def quarantine(path: Path, reason: str) -> str:
            self.kept.append((path.read_bytes(), reason))
            return "kept-1"

        task = EngineTask(
            job_id=7,
            study_instance_uid="1.2.3",
            series_instance_uid="1.2.3.4",
            instances=tuple(self.instances),
            header=read_series_header(self.instances),
            timeout_s=30.0,
            remember=self.notes.append,
            record=record,
            quarantine=quarantine,
        )
        return replace(task, **changes)

    def expected(self, uid: str) -> Any:
        """The labels of an image, by the levels of the server."""
        low, high = SERVERS.LEVELS
        return np.where(self.values[uid] > high, 2, np.where(self.values[uid] > low, 1, 0))


def _write(ds: Dataset, path: Path) -> StoredInstance:
    ds.save_as(path, enforce_file_format=True)
    with path.open("rb") as file:
        start = file.read(256)
    offset = 128 + 4 + 12 + int.from_bytes(start[140:144], "little")
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        transfer_syntax_uid=str(ExplicitVRLittleEndian),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="",
        origin=Origin.RECEIVED,
        modality=str(ds.Modality),
    )


def _image(sop_class: str, values: Any, modality: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    ds.Modality, ds.PatientID, ds.PatientName, ds.PositionReferenceIndicator = modality, "SECRET-7", "Doe^Jane", ""
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.PatientBirthDate = ds.PatientSex = ""
    (ds.Rows, ds.Columns), ds.SamplesPerPixel, ds.PhotometricInterpretation = values.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelData = values.astype("<i2").tobytes()
    return ds


def _turned(seed: int) -> Any:
    """Directions of rows, columns and slices (as columns), right-handed, oblique."""
    rng = np.random.default_rng(seed)
    frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
    return frame


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., Series]:
    """`make_series(shape, frame, **attributes)`: a CT series of which every value tells where it lies.

    Values are linear in slice, row and column, so that interpolating them is exact; never equal to a level.
    """

    def make(shape: tuple[int, int, int] = SHAPE, frame: Any = None, **attributes: Any) -> Series:
        frame = _turned(5) if frame is None else frame
        k, r, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
        volume = -300 + 30 * k + 9 * r + 6 * c
        made = Series({}, [])
        for slice_index in np.random.default_rng(1).permutation(shape[0]).tolist():
            ds = _image(CTImageStorage, volume[slice_index] + 1024, "CT")
            ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            ds.RescaleSlope, ds.RescaleIntercept, ds.InstanceNumber = "1", "-1024", str(slice_index + 1)
            ds.PixelSpacing, ds.SliceThickness = [str(mm) for mm in SPACING[1:]], "2.5"
            ds.ImageOrientationPatient = [format_number_as_ds(x) for x in (*frame[:, 0], *frame[:, 1])]
            position = np.array((-12.0, 31.0, 250.0)) + slice_index * SPACING[0] * frame[:, 2]
            ds.ImagePositionPatient = [format_number_as_ds(x) for x in position]
            for keyword, value in attributes.items():
                setattr(ds, keyword, value)
            made.instances.append(_write(ds, tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"))
            made.values[str(ds.SOPInstanceUID)] = volume[slice_index]
        return made

    return make


@pytest.fixture
def series(make_series: Callable[..., Series]) -> Series:
    return make_series()


@pytest.fixture
def make_film(tmp_path: Path) -> Callable[..., Series]:
    """`make_film(images, **attributes)`: DX images with a bright square on a ramp."""

    def make(images: int = 1, **attributes: Any) -> Series:
        made = Series({}, [])
        for number in range(images):
            values = np.tile(np.arange(80), (64, 1)) + number
            values[20:32, 28:44] = 400
            values[40:52, 28:44] = 0
            ds = _image(DigitalXRayImageStorageForPresentation, values, "DX")
            ds.ImageType, ds.ViewPosition, ds.InstanceNumber = ["DERIVED", "PRIMARY"], "PA", str(number + 1)
            ds.PresentationIntentType, ds.BodyPartExamined = "FOR PRESENTATION", "CHEST"
            for keyword, value in attributes.items():
                setattr(ds, keyword, value)
            made.instances.append(_write(ds, tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"))
            made.values[str(ds.SOPInstanceUID)] = values
        return made

    return make


def _run(engine: KServeEngine, task: EngineTask) -> EngineResult:
    return engine.run(task, lambda: None)


def _labels(result: EngineResult) -> LabelVolume:
    (found,) = [value for value in result.values if isinstance(value, LabelVolume)]
    return found


def _assert_right(result: EngineResult, series: Series, margin: tuple[int, int, int] = (0, 0, 0)) -> None:
    """Every pixel of every image has the label its value tells, but for `margin` at the ends of each axis."""
    volume = _labels(result)
    assert set(volume.sop_instance_uids) == set(series.values)
    expected = np.stack([series.expected(uid) for uid in volume.sop_instance_uids])
    inner = tuple(slice(m, n - m) for m, n in zip(margin, expected.shape, strict=True))
    assert set(np.unique(expected[inner])) == {0, 1, 2}
    np.testing.assert_array_equal(volume.labels[inner], expected[inner])


# --- labels on the source grid ---------------------------------------------------------------------------------------

AXIAL = np.eye(3)
SAGITTAL = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], float)
FLIPPED = np.array([[-1, 0, 0], [0, 1, 0], [0, 0, -1]], float)


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "ILA"])
@pytest.mark.parametrize("frame", [_turned(5), _turned(11), AXIAL, SAGITTAL, FLIPPED])
def test_each_pixel_has_the_label_of_its_own_place_on_any_series_and_for_any_orientation(
    engine: Make, make_series: Callable[..., Series], frame: Any, orientation: str
) -> None:
    series = make_series(frame=frame)
    recipe = _volume(input={"orientation": orientation, "spacing_mm": [1.1, 0.9, 1.4]})
    recipe["windows"] = {"window": [16, 12, 20], "overlap": 0.5, "batch": 3}
    result = _run(engine(volume=recipe), series.task())
    # the model's grid ends within a voxel of the images; the border value holds there
    _assert_right(result, series, margin=(1, 2, 2))


@pytest.mark.parametrize("divided", [1, 2])
def test_where_the_grids_coincide_not_a_single_pixel_is_off(engine: Make, series: Series, divided: int) -> None:
    # the spacing of the images along each axis, in the order the model wants them
    spacing = [SPACING[axis] / divided for axis in _order_of(_turned(5), "SPL")]
    recipe = _volume(input={"orientation": "SPL", "spacing_mm": spacing}, windows={"window": [16, 32, 32]})
    _assert_right(_run(engine(volume=recipe), series.task()), series)


def _order_of(frame: Any, orientation: str) -> list[int]:
    """For each letter the axis (slice, row index, column index) of the images that runs most along it."""
    towards = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    axes = np.stack([frame[:, 2], frame[:, 1], frame[:, 0]])
    order = [int(np.argmax(np.abs(axes @ np.array(towards[letter])))) for letter in orientation]
    assert sorted(order) == [0, 1, 2]
    return order


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("levels", {"windows": None}),
        ("levels", {"windows": {"window": [40, 40, 40], "overlap": 0.25}}),  # larger than the images
        ("levels", {"windows": {"window": [8, 9, 10], "overlap": 0.3, "blend": "constant", "batch": 5}}),
        ("levels", {"output": {"activation": "none", "inverse": "labels"}}),
        ("levels-fp16", {"input": {"datatype": "FP16"}}),
        ("levels-bf16", {"input": {"datatype": "BF16"}}),
        ("fixed", {"windows": {"window": [16, 16, 16], "overlap": 0.5, "batch": 2}}),
        ("zyx", {"windows": None, "input": {"datatype": "INT16", "layout": "DHW"}, "output": {"decide": "labels"}}),
        (
            "zyx",
            {
                "windows": {"window": [8, 16, 16], "overlap": 0.5},
                "input": {"datatype": "INT16", "layout": "DHW"},
                "output": {"decide": "labels"},
            },
        ),
        ("silent", {}),
    ],
)
def test_every_way_through_the_model_gives_the_same_labels(
    engine: Make, peer: Any, make_series: Callable[..., Series], model: str, changes: Options
) -> None:
    series = make_series(frame=AXIAL)
    changes = json.loads(json.dumps(changes))
    changes.setdefault("input", {}).update(orientation="LPS")
    if model == "zyx":
        changes["input"].update(orientation="SPL", spacing_mm=[2.5, 0.8, 0.7])
        changes["output"].update(name="labels", layout="DHW", labels=LABELS)
    changes.setdefault("output", {}).setdefault("labels", LABELS)
    result = _run(engine(model=model, volume=_volume(**changes)), series.task())
    if "16" in model and model != "zyx":  # a value of a few hundred has eight bits there: one beside a level may turn
        volume = _labels(result)
        expected = np.stack([series.expected(uid) for uid in volume.sop_instance_uids])
        assert np.mean(volume.labels == expected) > 0.97
        assert set(np.unique(volume.labels)) == {0, 1, 2}
    else:
        _assert_right(result, series)


def test_tensors_travel_as_json_where_the_server_knows_no_other_form(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    series = make_series(frame=AXIAL)
    peer.binary = False
    _assert_right(_run(engine(), series.task()), series)
    infer = [request for request in peer.requests if request.path.endswith("/infer")]
    assert infer[0].headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in infer[0].headers


def test_what_the_model_sees_is_turned_windowed_and_filled_up_as_the_recipe_says(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    series = make_series(frame=AXIAL, shape=(4, 10, 12))
    recipe = _volume(
        input={
            "orientation": "RAS",
            "spacing_mm": [0.7, 0.8, 2.5],
            "intensity": {"clip": [-200, 0], "to": [0, 1]},
            "padding": -200,
        },
        windows={"window": [16, 16, 8]},
    )
    _run(engine(volume=recipe), series.task())
    (arrays,) = peer.inputs
    seen = arrays["image"][0, 0]
    k, r, c = np.meshgrid(*(np.arange(n) for n in (4, 10, 12)), indexing="ij")
    values = np.clip((-300 + 30 * k + 9 * r + 6 * c + 200) / 200, 0, 1)
    expected = np.zeros((16, 16, 8))
    expected[2:14, 3:13, 2:6] = values.transpose(2, 1, 0)[::-1, ::-1]  # to the right, to the front, to the head
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_intensity_steps_take_the_volumes_own_figures(engine: Make, peer: Any, make_series: Any) -> None:
    series = make_series(frame=AXIAL)
    steps = [{"minmax": [0, 10]}, {"normalize": {}}, {"clip": [-1, 1]}]
    _run(engine(volume=_volume(input={"orientation": "LPS", "intensity": steps}, windows=None)), series.task())
    seen = peer.inputs[0]["image"][0, 0].transpose(2, 1, 0)
    values = np.stack(list(series.values.values())).astype(float)
    k, r, c = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    figures = (-300 + 30 * k + 9 * r + 6 * c - values.mean()) / values.std()
    np.testing.assert_allclose(seen, np.clip(figures, -1, 1), atol=1e-4)


def test_labels_that_overlap_are_shown_as_the_one_furthest_above_its_threshold_and_said(
    engine: Make, make_series: Callable[..., Series]
) -> None:
    series = make_series(frame=AXIAL)
    recipe = _volume(input={"orientation": "LPS"}, output={"decide": [0.5, 0.5], "inverse": "labels"})
    result = _run(engine(model="several", volume=recipe), series.task())
    _assert_right(result, series)
    assert any("overlap" in note for note in _labels(result).notes)


def test_ignored_classes_are_background_and_unnamed_ones_keep_their_number(engine: Make, series: Series) -> None:
    recipe = _volume(output={"labels": {2: {"name": "aorta"}}})
    assert [segment.label for segment in _labels(_run(engine(volume=recipe), series.task())).segments] == [
        "label 1",
        "aorta",
    ]
    recipe = _volume(output={"labels": {1: "ignore", 2: {"name": "aorta"}}})
    volume = _labels(_run(engine(volume=recipe), series.task()))
    assert [segment.number for segment in volume.segments] == [2]
    assert set(np.unique(volume.labels)) == {0, 2}


def _encoded(result: EngineResult, task: EngineTask) -> Sequence[Dataset]:
    context = result_context(
        result.provenance,
        series_instance_uid=task.series_instance_uid,
        input_digest="",
        rule="r",
        run="1",
        run_number=1,
        created_at=NOON,
        time_zone="+0000",
        node_name="NODE",
    )
    kinds = ("seg", "sr")
    return encoded(result, task, context, encoders=[SegEncoder(), SrEncoder()], kinds=kinds, heartbeat=lambda: None)


def test_it_becomes_a_segmentation_and_measurements_that_name_model_and_server(engine: Make, series: Series) -> None:
    task = series.task()
    result = _run(engine(manufacturer="Tests", notice="research"), task)
    made = _encoded(result, task)
    assert [ds.Modality for ds in made] == ["SEG", "SR"]
    assert {item.SegmentLabel for item in made[0].SegmentSequence} == {"spleen", "aorta"}
    provenance = result.provenance
    assert (provenance.name, provenance.version, provenance.manufacturer) == ("levels", "1", "Tests")
    assert "server=contract 2.0" in provenance.parameters
    (measurements,) = [value for value in result.values if isinstance(value, Measurements)]
    inside = np.concatenate([hu[series.expected(uid) == 1] for uid, hu in series.values.items()])
    assert measurements.items[0].volume_cm3 == pytest.approx(inside.size * np.prod(SPACING) / 1000, rel=0.05)
    assert measurements.items[0].mean_hu == pytest.approx(inside.mean(), abs=5)


# --- radiographs -----------------------------------------------------------------------------------------------------


def test_a_radiograph_becomes_findings_with_their_thresholds_and_codes(
    engine: Make, peer: Any, make_film: Callable[..., Series]
) -> None:
    film = make_film()
    task = film.task()
    result = _run(engine(model="chest", radiograph=_radiograph()), task)
    (findings,) = [value for value in result.values if isinstance(value, Findings)]
    bright, dark, other = findings.items
    assert (bright.presence, bright.confidence, bright.code.value) == (Presence.PRESENT, 1.0, "36118008")
    assert (dark.presence, dark.threshold, dark.code.scheme) == (Presence.ABSENT, 0.5, "99DICOMNODE")
    assert (other.presence, other.confidence) == (Presence.PRESENT, 0.25)
    seen = peer.inputs[0]["picture"]
    assert seen.shape == (1, 1, 32, 32) and (seen.min(), seen.max()) == (0, 1)
    assert [ds.Modality for ds in _encoded(result, task)] == ["SR"]


def test_ranges_channels_and_figures_are_those_of_the_recipe(
    engine: Make, server: Any, make_film: Callable[..., Series]
) -> None:
    wanted = {"layout": "NHWC", "channels": 3, "range": [0, 255], "mean": [1, 2, 3], "std": [2, 2, 2], "size": 16}
    _script(server, _meta(inputs=[("picture", "FP32", [-1, 16, 16, 3])], outputs=[("logits", "FP32", [-1, 3])]))
    reply = {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 3], "data": [0.1, 0.2, 0.7]}]}
    server.on("POST", "/v2/models/chest/infer", server.answer(200, json.dumps(reply).encode()))
    recipe = _radiograph(input=wanted)
    del recipe["findings"]["other"]
    result = _run(engine(model="chest", radiograph=recipe, base_url=server.url), make_film().task())
    sent = json.loads(server.received[-1].body)["inputs"][0]
    seen = np.array(sent["data"]).reshape(sent["shape"])
    assert seen.shape == (1, 16, 16, 3)
    for channel, mean in enumerate((1, 2, 3)):
        assert seen[..., channel].min() == pytest.approx(-mean / 2)
        assert seen[..., channel].max() == pytest.approx((255 - mean) / 2)
    (findings,) = result.values
    assert isinstance(findings, Findings)
    assert [item.confidence for item in findings.items] == pytest.approx([0.2, 0.7])


def test_images_the_model_is_not_for_are_told_and_not_sent(
    engine: Make, peer: Any, make_film: Callable[..., Series]
) -> None:
    one = engine(model="chest", radiograph=_radiograph(views=["PA"], gate="frontal_chest"))
    both = make_film()
    lateral = make_film(ViewPosition="LL")
    flat = make_film()
    both.instances += lateral.instances
    result = _run(one, both.task())
    (findings,) = result.values
    assert isinstance(findings, Findings)
    assert any("view is not PA" in note for note in findings.notes)
    assert {item.presence for item in findings.items} == {Presence.UNDETERMINED}  # a square on a ramp is no chest
    assert any("no upright frontal chest" in note for note in findings.notes)
    assert peer.inferences == 0 and not both.sent
    with pytest.raises(EngineRejected, match="the view is not PA"):
        _run(one, lateral.task())
    with pytest.raises(EngineRejected, match="FOR PROCESSING"):
        _run(one, make_film(PresentationIntentType="FOR PROCESSING").task())
    assert flat.instances


def test_a_score_that_is_no_probability_is_kept_and_told(engine: Make, make_film: Callable[..., Series]) -> None:
    film = make_film()
    recipe = _radiograph(input={"range": [0, 9]})
    with pytest.raises(EngineError, match=r"no probability; does the recipe lack an activation.*kept-1"):
        _run(engine(model="chest", radiograph=recipe), film.task())
    assert film.kept
    recipe["activation"] = "sigmoid"
    (findings,) = _run(engine(model="chest", radiograph=recipe), film.task()).values
    assert isinstance(findings, Findings)
    assert findings.items[0].confidence == pytest.approx(1 / (1 + np.exp(-9)), abs=1e-4)


# --- what goes out ---------------------------------------------------------------------------------------------------


def test_readiness_and_metadata_are_asked_first_and_nothing_of_the_patient_leaves(
    engine: Make, peer: Any, series: Series
) -> None:
    _run(engine(volume=_volume(windows=None)), series.task())
    assert peer.paths() == [
        "GET /v2/health/ready",
        "GET /v2/models/levels/ready",
        "GET /v2",
        "GET /v2/models/levels",
        "POST /v2/models/levels/infer",
    ]
    everything = b"".join(one.body + repr((one.path, one.headers)).encode() for one in peer.requests)
    for secret in (b"Doe", b"SECRET-7", b"1.2.3.4", *(uid.encode() for uid in series.values)):
        assert secret not in everything
    infer = peer.requests[-1]
    length = int(infer.headers["inference-header-content-length"])
    told = json.loads(infer.body[:length])
    assert told["inputs"][0]["parameters"]["binary_data_size"] == len(infer.body) - length
    assert told["outputs"] == [{"name": "scores", "parameters": {"binary_data": True}}]


def test_the_sending_is_recorded_once_with_all_that_left(engine: Make, peer: Any, series: Series) -> None:
    _run(engine(), series.task())
    ((sending, state),) = series.sent
    assert peer.inferences > 1
    sent = sum(len(one.body) for one in peer.requests if one.path.endswith("/infer"))
    assert (state, sending.what, sending.host, sending.bytes) == ("sent", "volume", "127.0.0.1", sent)
    assert sending.identifiable is False and len(sending.sha256) == 64


def test_a_lost_lease_before_the_sending_sends_nothing(engine: Make, peer: Any, series: Series) -> None:
    def refuse(sending: Sending) -> Any:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        _run(engine(), series.task(record=refuse))
    assert peer.inferences == 0


def test_pictures_that_may_name_the_patient_stay_unless_they_are_on_this_machine(
    make_series: Callable[..., Series], make_film: Callable[..., Series], engine: Make, peer: Any
) -> None:
    for series, recipe in (
        (make_series(BurnedInAnnotation="YES"), {"volume": _volume()}),
        (make_film(BurnedInAnnotation="YES"), {"radiograph": _radiograph(), "model": "chest"}),
    ):
        _run(engine(**recipe), series.task())
        assert [sending.identifiable for sending, _ in series.sent] == [True]
        away = engine(base_url=f"http://engine.example:{peer.port}", **recipe)
        with pytest.raises(EngineRejected, match="Burned In Annotation"):
            _run(away, series.task())
        assert len(series.sent) == 1


@pytest.mark.parametrize(("option", "header"), [("token", "Bearer tok-1"), ("authorization", "tok-1")])
def test_credentials_are_sent_and_never_shown(
    engine: Make, peer: Any, series: Series, monkeypatch: pytest.MonkeyPatch, option: str, header: str
) -> None:
    monkeypatch.setenv("KS_TOKEN", "tok-1")
    peer.token = header
    one = engine(**{option: "env:KS_TOKEN"})
    one.check()
    _run(one, series.task())
    assert {request.headers["authorization"] for request in peer.requests} == {header}
    assert "tok-1" not in repr(one.report()) and "env:KS_TOKEN" in repr(one.report())
    with pytest.raises(EngineUnavailable, match="401"):
        _run(engine(), series.task())
    peer.misbehave("echo")  # a server that repeats what it was given
    with pytest.raises(EngineRejected, match="credentials") as caught:
        _run(one, series.task())
    assert "tok-1" not in str(caught.value)
    monkeypatch.delenv("KS_TOKEN")
    with pytest.raises(ConfigError, match="KS_TOKEN"):
        one.check()


# --- what does not fit -----------------------------------------------------------------------------------------------


def _meta(inputs: Sequence[tuple[str, str, list[int]]], outputs: Sequence[tuple[str, str, list[int]]]) -> Any:
    keys = ("name", "datatype", "shape")
    listed = [[dict(zip(keys, one, strict=True)) for one in side] for side in (inputs, outputs)]
    return {"name": "chest", "versions": ["3"], "platform": "", "inputs": listed[0], "outputs": listed[1]}


def _script(server: Any, model: Any) -> None:
    for path in ("/v2/health/ready", "/v2/models/chest/ready"):
        server.on("GET", path, server.answer(200))
    server.on("GET", "/v2", server.answer(200, b'{"name": "s", "version": "1"}'))
    server.on("GET", "/v2/models/chest", server.answer(200, json.dumps(model).encode()))


ONE = {"window": [16, 16, 8]}


@pytest.mark.parametrize(
    ("model", "changes", "why"),
    [
        ("levels", {"input": {"name": "volume"}}, r"input\.name: the model has no input 'volume'; it has 'image' FP32"),
        ("levels", {"input": {"datatype": "FP16"}}, r"input\.datatype: FP16, but the model takes FP32"),
        ("levels", {"input": {"layout": "NDHWC"}}, r"input\.layout: axis D"),
        ("levels", {"windows": ONE, "input": {"layout": "CDHW"}}, r"input\.layout: CDHW has 4 axes"),
        ("two-inputs", {}, r"also takes 'prompt' BYTES"),
        ("fixed", {}, r"axis W is 8, but the model has 'image' FP32 \[2, 1, 16, 16, 16\]"),
        ("fixed", {"windows": None}, r"one size"),
        ("levels", {"output": {"name": "mask"}}, r"output\.name: the model has no output 'mask'"),
        ("levels", {"output": {"labels": {3: {"name": "liver"}}}}, r"output\.labels: 3 is named"),
        ("levels", {"output": {"decide": "labels"}}, r"output\.decide: 'scores' FP32"),
        ("levels", {"output": {"decide": [0.5, 0.5]}}, r"2 thresholds, but the model has"),
        ("levels", {"windows": ONE, "output": {"layout": "CDHW"}}, r"output\.layout: CDHW has 4 axes"),
        (
            "zyx",
            {
                "windows": None,
                "input": {"datatype": "INT16", "layout": "DHW"},
                "output": {"name": "labels", "layout": "DHW", "decide": 0.5, "labels": {1: {}}},
            },
            r"scores are BF16 or FP16",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_told_before_anything_is_sent(
    engine: Make, peer: Any, series: Series, model: str, changes: Options, why: str
) -> None:
    one = engine(model=model, volume=_volume(**json.loads(json.dumps(changes))))
    for ask in (lambda: _run(one, series.task()), one.report):
        with pytest.raises(ConfigError, match=rf"engines\.ks\.options\.volume\..*({why})"):
            ask()
    assert peer.inferences == 0 and not series.sent


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"input": {"size": 64}}, "axis H is 64"),
        ({"input": {"channels": 3}}, "axis C is 3"),
        ({"output": "scores"}, "no output 'scores'"),
        ({"findings": {"x": {"index": 9, "name": "X", "threshold": 0.5}}}, "index 9 is named"),
    ],
)
def test_a_recipe_of_radiographs_that_does_not_fit_is_told_too(
    engine: Make, make_film: Callable[..., Series], changes: Options, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        _run(engine(model="chest", radiograph=_radiograph(**changes)), make_film().task())


def test_a_batch_larger_than_the_server_says_it_takes_is_told(engine: Make, peer: Any, series: Series) -> None:
    peer.most_batch = 1
    with pytest.raises(ConfigError, match=r"windows\.batch: 2, but the model takes at most 1"):
        _run(engine(), series.task())
    peer.most_batch = 2
    _run(engine(), series.task())


def test_what_travels_in_binary_only_is_not_sent_to_a_server_of_json(engine: Make, peer: Any, series: Series) -> None:
    peer.binary = False
    with pytest.raises(ConfigError, match=r"FP16 travels in binary only.*tensors: binary"):
        _run(engine(model="levels-fp16", volume=_volume(input={"datatype": "FP16"})), series.task())
    with pytest.raises(ConfigError, match="tensors: FP16"):
        engine(tensors="json", volume=_volume(input={"datatype": "FP16"}))


def test_values_the_tensor_cannot_hold_refuse_the_series(engine: Make, make_series: Callable[..., Series]) -> None:
    recipe = _volume(
        windows=None,
        input={"datatype": "INT16", "layout": "DHW", "intensity": [{"range": {"from": [0, 1], "to": [0, 1000]}}]},
        output={"name": "labels", "layout": "DHW", "decide": "labels"},
    )
    with pytest.raises(SeriesRejected, match="do not fit INT16"):
        _run(engine(model="zyx", volume=recipe), make_series(frame=AXIAL).task())


def test_a_series_beyond_the_memory_allowed_is_refused_before_it_is_sent(engine: Make, peer: Any, series: Any) -> None:
    with pytest.raises(SeriesRejected, match="max_memory_bytes allows 0 MiB"):
        _run(engine(volume=_volume(max_memory_bytes=1000)), series.task())
    with pytest.raises(SeriesRejected, match="max_response_bytes allows 1000"):
        _run(engine(max_response_bytes=1000), series.task())
    fine = _volume(input={"spacing_mm": [0.001, 0.001, 0.001]})
    with pytest.raises(SeriesRejected, match="max_memory_bytes"):
        _run(engine(volume=fine), series.task())
    assert peer.inferences == 0


def test_a_series_that_is_no_stack_or_no_ct_is_refused_before_the_server_is_asked(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    with pytest.raises(SeriesRejected, match="too few slices"):
        _run(engine(), make_series(shape=(2, 22, 26)).task())
    assert peer.paths() == []
    with pytest.raises(SeriesRejected, match="not HU"):
        _run(engine(), make_series(RescaleType="US").task())
    assert peer.inferences == 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "error", "why"),
    [
        ("error", EngineCrashed, "status 500: the model did not want to and says so"),
        ("refuse", EngineRejected, "status 400: the model did not want to and says so"),
        ("no-json", EngineError, "no JSON"),
        ("not-finite", EngineError, "not finite"),
        ("other-shape", EngineError, "was expected"),
        ("other-type", EngineError, "BOOL"),
        ("missing", EngineError, "'scores' is not in the answer"),
        ("short", EngineError, "announces"),
        ("long", EngineError, "belong to no output"),
        ("lying", EngineError, "bytes"),
        ("huge", EngineError, "was expected"),
    ],
)
def test_a_bad_answer_is_told_by_its_kind_and_kept_where_there_is_one(
    engine: Make, peer: Any, series: Series, word: str, error: type[EngineError], why: str
) -> None:
    peer.misbehave("", word)  # not the first one
    one = engine()
    with pytest.raises(error, match=why) as caught:
        _run(one, series.task())
    assert peer.inferences == 2
    assert [state for _, state in series.sent] == [error.__name__ if word in ("error", "refuse") else "EngineError"]
    if type(caught.value) is EngineError:
        assert "quarantine as kept-1" in str(caught.value) and len(series.kept) == 1 and not caught.value.retryable
    else:
        assert not series.kept
    _assert_right(_run(one, series.task()), series, margin=(1, 2, 2))


@pytest.mark.parametrize("word", ["drop", "unavailable", "overloaded", "partial"])
def test_an_answer_that_is_lost_is_asked_for_again_and_the_result_is_the_same(
    engine: Make, peer: Any, series: Series, word: str
) -> None:
    peer.misbehave("", word)
    whole = _labels(_run(engine(), series.task()))
    asked = peer.inferences
    again = _labels(_run(engine(), series.task()))
    assert peer.inferences == 2 * asked - 1
    np.testing.assert_array_equal(whole.labels, again.labels)
    peer.misbehave(word, word)
    with pytest.raises(EngineUnavailable):
        _run(engine(), series.task())
    assert [state for _, state in series.sent] == ["sent", "sent", "EngineUnavailable"]
    assert series.notes == []  # there is nothing to remember: asking again is all there is


def test_a_model_that_is_exchanged_meanwhile_makes_the_series_come_again(
    engine: Make, peer: Any, series: Series
) -> None:
    peer.misbehave("", "other-version")
    with pytest.raises(EngineUnavailable, match="version changed"):
        _run(engine(), series.task())


def test_a_server_or_model_that_is_not_ready_or_not_there_makes_the_job_wait(
    engine: Make, peer: Any, series: Series
) -> None:
    with pytest.raises(EngineUnavailable, match=r"model 'liver' is not ready, or the server has none.*unknown model"):
        _run(engine(model="liver"), series.task())
    with pytest.raises(EngineUnavailable, match="version '2'"):
        _run(engine(version="2"), series.task())
    peer.ready = False
    with pytest.raises(EngineUnavailable, match="the server is not ready"):
        _run(engine(), series.task())
    assert peer.inferences == 0 and not series.sent


def test_a_model_that_is_taken_away_meanwhile_makes_the_job_wait_and_does_not_reject_it(
    engine: Make, peer: Any, series: Series
) -> None:
    peer.misbehave("", "taken-away")
    with pytest.raises(EngineUnavailable, match="model 'levels' is not ready"):
        _run(engine(), series.task())


def test_a_version_is_named_in_every_path_and_in_the_result(engine: Make, peer: Any, series: Series) -> None:
    peer.version = "7"
    result = _run(engine(version="7"), series.task())
    assert result.provenance.version == "7"
    assert peer.paths()[-1] == "POST /v2/models/levels/versions/7/infer"


def test_a_slow_server_is_given_the_time_of_a_request_and_no_more(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("slow")
    with pytest.raises(EngineTimeout):
        _run(engine(request_timeout_s=0.4), series.task())
    peer.misbehave("slow")
    with pytest.raises(EngineTimeout):
        _run(engine(timeout_s=0.5), series.task())


def test_what_is_no_kserve_server_is_told(engine: Make, server: Any, series: Series) -> None:
    _script(server, [1])
    with pytest.raises(EngineError, match="not of KServe v2"):
        _run(engine(model="chest", base_url=server.url), series.task())


def test_an_answer_larger_than_allowed_is_not_taken_in(engine: Make, server: Any, make_film: Any) -> None:
    _script(server, _meta(inputs=[("picture", "FP32", [-1, 1, 32, 32])], outputs=[("logits", "FP32", [-1, 3])]))
    server.on("POST", "/v2/models/chest/infer", server.endless(b"x" * 65536, 64))
    recipe = _radiograph()
    del recipe["findings"]["other"]
    one = engine(model="chest", radiograph=recipe, base_url=server.url, max_response_bytes=100_000)
    with pytest.raises(EngineError, match="more than 100000 bytes"):
        _run(one, make_film().task())


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_report_tells_server_model_and_that_the_recipe_fits(engine: Make, peer: Any) -> None:
    told = dict(engine().report())
    assert told["server"] == "127.0.0.1: contract 2.0"
    assert told["model"] == "levels: versions 1; numbers"
    assert told["takes"] == "'image' FP32 [-1, 1, -1, -1, -1]"
    assert told["recipe"] == "volume: fits the model"
    assert "could not be compared" in dict(engine(model="silent").report())["takes"]


def test_nobody_there_is_unavailable_and_then_trouble(
    engine: Make, free_port: Callable[[], int], series: Series
) -> None:
    one = engine(base_url=f"http://127.0.0.1:{free_port()}", breaker_failures=2)
    assert (one.trouble, one.gauges()) == ("", {"breaker_state": 0.0})
    with pytest.raises(EngineUnavailable):
        one.report()
    assert one.trouble and one.gauges() == {"breaker_state": 1.0}


def test_every_request_is_told_to_the_observer_by_what_it_came_to(engine: Make, peer: Any, series: Series) -> None:
    seen: list[tuple[str, str]] = []
    one = engine(volume=_volume(windows=None))
    one.observe(lambda name, outcome, seconds: seen.append((name, outcome)))
    _run(one, series.task())
    peer.misbehave("refuse")
    with pytest.raises(EngineRejected):
        _run(one, series.task())
    assert seen == [("ks", "ok")] * 9 + [("ks", "rejected"), ("ks", "ok")]  # whether the model is still there


def test_a_closed_engine_does_nothing(engine: Make, series: Series) -> None:
    one = engine()
    one.close()
    one.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        _run(one, series.task())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"base_url": "ftp://x"}, "base_url"),
        ({"volum": {}}, "volum"),
        ({"token": "literally-the-token"}, "token"),
        ({"volume": _volume(), "radiograph": _radiograph()}, ""),
        ({"version": "../1"}, "version"),
        ({"volume": _volume(input={"orientation": "RLS"})}, r"volume\.input\.orientation"),
        ({"volume": _volume(input={"layout": "NCDH"})}, r"volume\.input\.layout"),
        ({"volume": _volume(input={"intensity": [{"clip": [0, 1], "minmax": [0, 1]}]})}, r"volume\.input\.intensity"),
        ({"volume": _volume(output={"labels": {"spleen": {}}})}, r"volume\.output"),
        ({"volume": _volume(output={"decide": 0.5, "activation": "softmax"})}, r"volume\.output"),
        ({"volume": _volume(output={"decide": 0.5})}, r"volume\.output: labels: .* 1 to 1"),
        ({"volume": _volume(output={"decide": [0.5, 0.5], "layout": "NDHW"})}, r"volume\.output: layout"),
        ({"volume": _volume(output={"decide": "labels", "inverse": "probability"})}, r"volume\.output"),
        ({"volume": _volume(input={"layout": "CDHW"})}, r"volume.*windows\.batch"),
        ({"radiograph": _radiograph(input={"mean": [1, 2]})}, r"radiograph\.input"),
        ({"radiograph": _radiograph(findings={})}, r"radiograph\.findings"),
    ],
)
def test_a_wrong_option_is_named_and_never_quoted(engine: Make, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"engines\.ks\.options\.?{key}") as caught:
        engine(**options)
    assert "literally" not in str(caught.value)


def test_a_model_must_be_named(engine: Make) -> None:
    with pytest.raises(ConfigError, match=r"engines\.ks\.model: missing"):
        engine(model="")


# --- the example rule, a whole node, the server by hand --------------------------------------------------------------


def test_the_example_rule_sends_ct_volumes_and_no_scout_to_it(
    tmp_path: Path, make_series: Callable[..., Series]
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "kserve.yaml", rules)
    loaded = load_rules(rules, engines=["triton-spleen"], destinations=["PACS"])

    def jobs(series: Series) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        view = SeriesView(
            study_instance_uid="1.2.3",
            revision=1,
            header=series.task().header,
            source=Source(calling_ae_title="CT1", called_ae_title="DICOM_NODE", address="127.0.0.1"),
            origins=frozenset({Origin.RECEIVED}),
            study_series_count=1,
            study_instance_count=10,
            study_modalities=("CT",),
            received_at=NOON,
        )
        planned = loaded.evaluate(view, now=NOON, destination_of={"CT1": "PACS"}.get).jobs
        return [(job.engine, job.results, job.destinations) for job in planned]

    small = (10, 4, 4)
    assert jobs(make_series(small, BodyPartExamined="ABDOMEN")) == [("triton-spleen", ("seg", "sr"), ("PACS",))]
    assert jobs(make_series(small, BodyPartExamined="HEAD")) == []
    assert jobs(make_series(small, BodyPartExamined="ABDOMEN", Modality="MR")) == []
    assert jobs(make_series((9, 4, 4), BodyPartExamined="ABDOMEN")) == []
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    assert jobs(make_series(small, BodyPartExamined="ABDOMEN", ImageType=scout)) == []


@pytest.mark.crash  # `make test` has the same with the other engines
def test_a_node_whose_work_process_is_killed_meanwhile_asks_again_and_keeps_one_result(
    *,
    peer: Any,
    make_series: Callable[..., Series],
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "kserve.yaml", rules)
    series = make_series((10, 22, 26), BodyPartExamined="ABDOMEN")
    options = {"base_url": peer.url, "volume": _volume()}
    node = running_node(
        rules_dir=str(rules),
        engines={"triton-spleen": {"kind": "kserve", "model": "levels", "options": options}},
        destinations={"CT1": {"ae_title": "CT1", "host": "127.0.0.1", "port": free_port()}},
        completion={"quiet_s": 0.5},
        jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
    )
    peer.slow_s = 60.0
    peer.misbehave("", "slow")
    images = [instance.path for instance in series.instances]
    storescu = [tool("storescu"), "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
    subprocess.run([*storescu, *images], check=True, capture_output=True, timeout=60)
    wait_for(lambda: peer.inferences == 2, 40, f"the second request; log:\n{node.tail()}")
    os.kill(node.pid("work"), signal.SIGKILL)

    with closing(open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0))) as ours:

        def state() -> list[JobState]:
            return [job.state for job in ours.queue.jobs(study_instance_uid="1.2.3")]

        wait_for(lambda: state() == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
        kept = ours.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.3"]})
        assert sorted(one.modality for one in kept) == [*["CT"] * 10, "SEG", "SR"]
        told = "\n".join(event.text for event in ours.queue.timeline("1.2.3"))
    assert "triton-spleen" in told and "127.0.0.1" in told


def test_the_server_runs_by_hand(engine: Make) -> None:
    command = [sys.executable, "-m", "tests.engines.servers.kserve", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rsplit(" ", 1)[1].strip()
        assert dict(engine(base_url=url).report())["server"].endswith("contract 2.0")
    finally:
        process.kill()
        process.communicate(timeout=10)
