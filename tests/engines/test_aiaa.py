"""A series through a Clara Train AIAA server over real sockets, well or badly answered, to SEG and SR."""

import gzip
import hashlib
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
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, StorageSettings
from dicom_node.engines._aiaa_crop import boxed
from dicom_node.engines._aiaa_polygons import UnusablePolygons
from dicom_node.engines.aiaa import AiaaEngine
from dicom_node.engines.grids import GeometryMismatch
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
from dicom_node.geometry import VolumeGeometry
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
SLICES, ROWS, COLUMNS = 6, 12, 16
SPACING = (2.5, 0.8, 0.7)
SR_3D = "1.2.840.10008.5.1.4.1.1.88.34"
EXTREMES = [[3, 4, 2], [10, 4, 2], [5, 2, 2], [5, 8, 2], [5, 5, 1], [5, 5, 4]]
Make = Callable[..., AiaaEngine]


def _server_module() -> ModuleType:
    name = "contract_server_aiaa"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "aiaa.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture
def peer() -> Iterator[Any]:
    with SERVERS.AiaaServer() as server:
        yield server


@pytest.fixture
def engine(peer: Any) -> Iterator[Make]:
    """`engine(model=..., timeout_s=..., **options)`: one on the server."""
    made: list[AiaaEngine] = []

    def make(*, model: str = "clara_spleen", timeout_s: float = 20.0, **options: Any) -> AiaaEngine:
        settings = EngineSettings(
            kind="aiaa",
            model=model,
            timeout_s=timeout_s,
            options={"base_url": peer.url, "retries": 1, "backoff_s": 0.01, **options},
        )
        made.append(engine_class("aiaa")("aiaa", settings, devices=("cpu",), later="ignored"))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- a series --------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """An oblique CT series on disk (air, a soft box, a bright one in it), and what the node gives a task."""

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
        """The labels of an image, by the thresholds of the server."""
        hu = self.values[uid]
        return np.where(hu >= SERVERS.BRIGHT, 2, np.where(hu >= SERVERS.SOFT, 1, 0))


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


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., Series]:
    """`make_series(slices=6, **attributes)`: a new series whose images have these attributes too."""

    def make(slices: int = SLICES, **attributes: Any) -> Series:
        rng = np.random.default_rng(5)
        frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
        start = np.array((-12.0, 31.0, 250.0))
        made = Series({}, [])
        for k in rng.permutation(slices).tolist():
            hu = np.full((ROWS, COLUMNS), -1000, np.int16)
            hu[2:9, 3:11] = 60 + k
            hu[4:6, 5 : 7 + k] = 300
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
            ds.Modality, ds.PatientID, ds.PatientName, ds.PositionReferenceIndicator = "CT", "SECRET-7", "Doe^Jane", ""
            ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ds.PatientBirthDate = ds.PatientSex = ""
            ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
            ds.RescaleSlope, ds.RescaleIntercept, ds.InstanceNumber = "1", "-1024", str(k + 1)
            ds.PixelSpacing, ds.SliceThickness = [str(mm) for mm in SPACING[1:]], "2.5"
            ds.ImageOrientationPatient = [format_number_as_ds(x) for x in (*frame[:, 0], *frame[:, 1])]
            ds.ImagePositionPatient = [format_number_as_ds(x) for x in start + k * SPACING[0] * frame[:, 2]]
            ds.PixelData = (hu + np.int16(1024)).astype("<i2").tobytes()
            for keyword, value in attributes.items():
                setattr(ds, keyword, value)
            made.instances.append(_write(ds, tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"))
            made.values[str(ds.SOPInstanceUID)] = hu
        return made

    return make


@pytest.fixture
def series(make_series: Callable[..., Series]) -> Series:
    return make_series()


def _run(engine: AiaaEngine, task: EngineTask) -> EngineResult:
    return engine.run(task, lambda: None)


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


def _labels(result: EngineResult) -> LabelVolume:
    (found,) = [value for value in result.values if isinstance(value, LabelVolume)]
    return found


def _assert_right(result: EngineResult, series: Series) -> None:
    volume = _labels(result)
    assert set(volume.sop_instance_uids) == set(series.values)
    for plane, uid in zip(volume.labels, volume.sop_instance_uids, strict=True):
        np.testing.assert_array_equal(plane, series.expected(uid))


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [None, "both"])
@pytest.mark.parametrize("api", [None, "inference"])
def test_the_labels_lie_on_the_pixels_of_their_images(
    engine: Make, peer: Any, series: Series, output: str | None, api: str | None
) -> None:
    result = _run(engine(output=output, api=api), series.task())
    _assert_right(result, series)
    assert [segment.label for segment in _labels(result).segments] == ["Spleen", "Aorta"]
    assert peer.paths() == ["GET /v1/models", f"POST /v1/{api or 'segmentation'}"]
    assert peer.requests[1].query == {"model": "clara_spleen"} | ({} if output else {"output": "image"})


def test_volume_and_mean_hu_are_measured_on_the_images(engine: Make, series: Series) -> None:
    (measurements,) = [v for v in _run(engine(), series.task()).values if isinstance(v, Measurements)]
    for item, number in zip(measurements.items, (1, 2), strict=True):
        inside = np.concatenate([hu[series.expected(uid) == number] for uid, hu in series.values.items()])
        assert item.volume_cm3 == pytest.approx(inside.size * 2.5 * 0.8 * 0.7 / 1000)
        assert item.mean_hu == pytest.approx(inside.mean())


def test_it_becomes_a_segmentation_and_a_report_that_name_model_and_protocol(engine: Make, series: Series) -> None:
    task = series.task()
    result = _run(engine(), task)
    assert (result.provenance.name, result.provenance.version) == ("clara_spleen", "1")
    made = _encoded(result, task)
    assert [ds.Modality for ds in made] == ["SEG", "SR"]
    assert {item.SegmentLabel for item in made[0].SegmentSequence} == {"Spleen", "Aorta"}
    assert "protocol=AIAA 4.1" in result.provenance.parameters


def test_an_empty_mask_is_a_report_and_no_segmentation(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("nothing")
    task = series.task()
    assert [ds.Modality for ds in _encoded(_run(engine(), task), task)] == ["SR"]


def test_the_configured_table_comes_before_the_names_of_the_server(engine: Make, series: Series) -> None:
    result = _run(engine(labels={"spleen": {"name": "liver"}, "aorta": "ignore"}), series.task())
    assert [segment.label for segment in _labels(result).segments] == ["liver"]
    assert result.provenance.device_uid != _run(engine(), series.task()).provenance.device_uid


@pytest.mark.parametrize(("word", "note"), [("turned", ""), ("other-grid", "on another grid")])
def test_answers_on_any_grid_are_put_in_place(engine: Make, peer: Any, series: Series, word: str, note: str) -> None:
    peer.misbehave(word)
    result = _run(engine(), series.task())
    if note:
        assert any(note in text for text in _labels(result).notes)
    else:
        _assert_right(result, series)


# --- what goes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["image", "datapoint"])
def test_one_multipart_request_goes_out_with_its_length_and_nothing_of_the_patient(
    engine: Make, peer: Any, series: Series, part: str
) -> None:
    _assert_right(_run(engine(params={"roi": [1, 2]}, part=part), series.task()), series)
    request = peer.requests[1]
    assert int(request.headers["content-length"]) == len(request.body)
    assert "transfer-encoding" not in request.headers
    params, file = request.parts
    assert (params.name, json.loads(params.body)) == ("params", {"roi": [1, 2]})
    assert (file.name, file.filename) == (part, "volume.nii.gz")
    everything = b"".join(one.body + repr((one.path, one.query, one.headers)).encode() for one in peer.requests)
    everything += gzip.decompress(file.body)
    for secret in (b"Doe", b"SECRET-7", b"1.2.3.4", *(uid.encode() for uid in series.values)):
        assert secret not in everything


def test_the_sending_is_recorded_with_what_left(engine: Make, peer: Any, series: Series) -> None:
    _run(engine(), series.task())
    ((sending, state),) = series.sent
    file = peer.requests[1].parts[1].body
    assert (state, sending.what, sending.host, sending.objects) == ("sent", "volume", "127.0.0.1", 1)
    assert (sending.bytes, sending.sha256) == (len(file), hashlib.sha256(file).hexdigest())


def test_a_lost_lease_before_the_sending_sends_nothing(engine: Make, peer: Any, series: Series) -> None:
    def refuse(sending: Sending) -> Any:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        _run(engine(), series.task(record=refuse))
    assert peer.paths() == ["GET /v1/models"]


def test_pictures_that_may_name_the_patient_stay_unless_they_are_on_this_machine(
    make_series: Callable[..., Series], engine: Make, peer: Any
) -> None:
    series = make_series(BurnedInAnnotation="YES")
    _run(engine(), series.task())
    assert [sending.identifiable for sending, _ in series.sent] == [True]
    away = engine(base_url=f"http://engine.example:{peer.port}")
    with pytest.raises(EngineRejected, match="Burned In Annotation"):
        _run(away, series.task())
    assert len(series.sent) == 1


def test_the_token_is_sent_and_never_shown(
    engine: Make, peer: Any, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIAA_TOKEN", "tok-1")
    one = engine(token="env:AIAA_TOKEN")
    one.check()
    _run(one, series.task())
    assert {request.headers["authorization"] for request in peer.requests} == {"Bearer tok-1"}
    assert "tok-1" not in repr(one.report())


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["3.x", "4.1"])
def test_extreme_points_go_as_each_generation_spells_them(
    engine: Make, peer: Any, series: Series, generation: str
) -> None:
    peer.generation = generation
    one = engine(model="clara_annotation", server=generation, points={"points": EXTREMES}, crop=False)
    result = _run(one, series.task())
    (params,) = [request.part("params").body for request in peer.requests if request.method == "POST"]
    assert isinstance(json.loads(params)["points"], str) == (generation == "3.x")
    assert peer.seen_points == [(EXTREMES, [])]
    painted = np.argwhere(_labels(result).labels)
    assert painted.min(axis=0).tolist() == [1, 2, 3] and painted.max(axis=0).tolist() == [4, 8, 10]


def test_extreme_points_go_with_the_box_around_them_and_the_answer_is_put_back(
    engine: Make, peer: Any, series: Series
) -> None:
    result = _run(engine(model="clara_annotation", points={"points": EXTREMES}), series.task())
    # 20 mm reach beyond these images, so the box is all of them, and each voxel two of the model's grid
    assert peer.seen_points == [([[2 * part for part in point] for point in EXTREMES], [])]
    volume = _labels(result)
    assert any("on another grid" in note for note in volume.notes)
    painted = np.argwhere(volume.labels)
    assert painted.min(axis=0).tolist() == [1, 2, 3] and painted.max(axis=0).tolist() == [4, 8, 10]
    with pytest.raises(EngineRejected, match="at least 6"):
        _run(engine(model="clara_annotation", points={"points": EXTREMES[:5]}), series.task())


def test_the_box_lies_where_its_voxels_lay_and_its_points_on_the_same_places() -> None:
    rng = np.random.default_rng(3)
    shape, spacing = (20, 30, 40), (2.0, 1.0, 0.5)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * spacing
    affine[:3, 3] = (5, -7, 90)
    geometry = VolumeGeometry(
        sop_instance_uids=tuple(map(str, range(20))),
        affine=affine,
        spacing_mm=spacing,
        shape=shape,
        sop_class_uid="",
        frame_of_reference_uid="",
        left_out={},
    )
    k, row, column = np.indices(shape)
    voxels = (100 * k + 10 * row + column).astype(np.float32)  # linear: interpolation must give it back
    points = ((12, 9, 6), (28, 21, 13), (20, 15, 10))
    box = boxed(voxels, geometry, points, margin_mm=4.0, sides=(64, 16, 8), beat=lambda: None)
    assert box.voxels.shape == box.geometry.shape == (8, 16, 64)
    onto = np.linalg.inv(affine) @ box.geometry.affine
    assert onto[:3, 3].tolist() == pytest.approx([4, 5, 4])  # the points' own box, and 4 mm
    for index in ((0, 0, 0), (3, 7, 31), (6, 14, 60)):
        at = (onto @ (*index, 1.0))[:3]
        assert box.voxels[index] == pytest.approx(at @ (100, 10, 1), abs=0.05)
    for point, moved in zip(points, box.points, strict=True):
        there = (onto @ (*moved[::-1], 1.0))[:3]
        assert np.abs(there - point[::-1]).max() <= np.abs(onto[:3, :3]).max() / 2 + 1e-9


def test_the_spelling_can_be_told_apart_from_the_generation(engine: Make, peer: Any, series: Series) -> None:
    peer.generation = "3.x"
    _run(engine(model="clara_annotation", points_as="string", points={"points": EXTREMES}), series.task())
    with pytest.raises(EngineCrashed):
        _run(engine(model="clara_annotation", points_as="array", points={"points": EXTREMES}), series.task())


def _report(series: Series, tmp_path: Path, *voxels: tuple[float, float, float]) -> StoredInstance:
    """A report with points at the centres of these voxels (column, row, slice), by the headers of the images."""
    headers = [_read_back(instance) for instance in series.instances]
    headers.sort(key=lambda ds: int(ds.InstanceNumber))
    across, down = (np.array(headers[0].ImageOrientationPatient[n : n + 3], float) for n in (0, 3))
    item = Dataset()
    item.ValueType, item.GraphicType, item.ReferencedFrameOfReferenceUID = "SCOORD3D", "MULTIPOINT", "1.2.3.5"
    item.GraphicData = [
        float(mm)
        for column, row, k in voxels
        for mm in np.array(headers[int(k)].ImagePositionPatient, float)
        + column * SPACING[2] * across
        + row * SPACING[1] * down
    ]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = SR_3D, "1.2.7.1", "1.2.3", "1.2.7"
    ds.PatientID, ds.Modality, ds.ValueType, ds.ContentSequence = "SECRET-7", "SR", "CONTAINER", [item]
    ds.ContentDate, ds.ContentTime = "20260102", "120000"
    return _write(ds, tmp_path / "report.dcm")


def _read_back(instance: StoredInstance) -> Dataset:
    import pydicom

    return pydicom.dcmread(instance.path, stop_before_pixels=True)


def test_points_of_a_report_in_the_study_reach_the_server_as_voxels_of_the_volume_it_was_sent(
    engine: Make, peer: Any, series: Series, tmp_path: Path
) -> None:
    report = _report(series, tmp_path, (5, 5, 1), (5, 5, 3))
    one = engine(model="clara_deepgrow", points={"source": "sr"}, labels={"1": {"name": "spleen"}}, current_point=True)
    result = _run(one, series.task(study_instances=lambda: [*series.instances, report]))
    assert peer.seen_points == [([[5, 5, 1], [5, 5, 3]], [])]
    params = json.loads(peer.requests[-1].part("params").body)
    assert params["current_point"] == [5, 5, 3]
    volume = _labels(result)
    assert sorted(set(np.argwhere(volume.labels)[:, 0].tolist())) == [1, 3]
    soft = [np.asarray(series.expected(uid)) > 0 for uid in volume.sop_instance_uids]
    np.testing.assert_array_equal(volume.labels[1] > 0, soft[1])
    assert any("1.2.7.1" in note for note in volume.notes)


def test_without_a_report_nothing_is_sent_and_the_reason_says_what_to_do(
    engine: Make, peer: Any, series: Series
) -> None:
    with pytest.raises(EngineRejected, match="no structured report with points"):
        _run(engine(model="clara_deepgrow", points={"source": "sr"}), series.task())
    assert peer.paths() == [] and not series.sent


def test_a_model_that_needs_points_and_one_that_takes_none_are_mistakes(engine: Make, series: Series) -> None:
    with pytest.raises(ConfigError, match=r"engines\.aiaa\.options\.points: missing"):
        _run(engine(model="clara_annotation"), series.task())
    with pytest.raises(ConfigError, match="takes none"):
        _run(engine(points={"points": [[1, 1, 1]]}), series.task())
    few = {"points": [[5, 5, 1]]}
    with pytest.raises(EngineRejected, match="at least 6"):
        _run(engine(model="clara_annotation", points=few), series.task())
    assert not series.sent


def test_a_crop_box_whose_mask_has_another_shape_is_not_put_anywhere(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("cropped")
    with pytest.raises(GeometryMismatch, match=r"crop.*quarantine"):
        _run(engine(model="clara_deepgrow", points={"points": [[5, 5, 2]]}), series.task())
    assert len(series.kept) == 1


# --- findings --------------------------------------------------------------------------------------------------------


def test_a_classification_of_the_series_becomes_a_report(engine: Make, peer: Any, series: Series) -> None:
    task = series.task()
    result = _run(engine(model="clara_covid", findings={"thresholds": {"other": 0.2}}), task)
    (findings,) = result.values
    assert isinstance(findings, Findings)
    said = [(item.name, item.presence, item.confidence) for item in findings.items]
    assert said == [("covid", Presence.PRESENT, 0.9), ("other", Presence.PRESENT, 0.25)]
    assert "all 6 images" in findings.notes[0]
    (report,) = _encoded(result, task)
    assert report.Modality == "SR"
    assert peer.requests[1].query == {"model": "clara_covid"}


def test_radiographs_go_as_pictures_and_each_gets_its_findings(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    series = make_series(slices=2)
    result = _run(engine(model="clara_covid", findings={"picture": True}), series.task())
    assert {value.sop_instance_uid for value in result.values if isinstance(value, Findings)} == set(series.values)
    pictures = [request.parts[1] for request in peer.requests if request.method == "POST"]
    assert [part.filename for part in pictures] == ["picture.png"] * 2
    assert all(part.body.startswith(b"\x89PNG") for part in pictures)
    assert [sending.what for sending, _ in series.sent] == ["picture"] * 2


def test_parameters_without_findings_are_kept_and_the_job_fails(engine: Make, series: Series) -> None:
    with pytest.raises(EngineError, match=r"no findings at 'prob'.*quarantine") as caught:
        _run(engine(model="clara_covid", findings={"at": "prob"}), series.task())
    assert not caught.value.retryable and json.loads(series.kept[0][0]) == SERVERS.FINDINGS
    with pytest.raises(EngineError, match=r"options\.findings"):
        _run(engine(model="clara_covid"), series.task())


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_is_put_used_and_ended(engine: Make, peer: Any, series: Series) -> None:
    one = engine(session="upload", session_expiry_s=600, part="datapoint")
    _assert_right(_run(one, series.task()), series)
    put, infer, end = peer.requests[1:]
    assert (put.method, put.path, put.query) == ("PUT", "/session/", {"expiry": "600"})
    assert [(part.name, part.filename) for part in put.parts] == [("image", "volume.nii.gz")]
    assert [part.name for part in infer.parts] == ["params"]
    assert (end.method, end.path) == ("DELETE", f"/session/{infer.query['session_id']}") and not peer.sessions
    assert [sending.what for sending, _ in series.sent] == ["volume", "request"]


def test_a_session_that_expired_is_made_anew_once(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("expired")
    _assert_right(_run(engine(session="upload"), series.task()), series)
    assert [path.split(" ", 1)[0] for path in peer.paths()] == ["GET", "PUT", "POST", "PUT", "POST", "DELETE"]
    assert len(series.notes) == 2
    peer.misbehave("expired", "expired")
    with pytest.raises(EngineError, match="session_expiry_s"):
        _run(engine(session="upload"), series.task())


def test_a_retry_uses_the_session_of_the_try_before(engine: Make, peer: Any, series: Series) -> None:
    one = engine(session="upload")
    for word in ("unavailable", "drop", "error"):
        peer.misbehave(word)
        with pytest.raises(EngineUnavailable):
            _run(one, series.task(note=series.notes[-1] if series.notes else ""))
    assert series.notes[-1].splitlines()[0] == "session" and len(peer.sessions) == 1
    _assert_right(_run(one, series.task(note=series.notes[-1])), series)
    assert peer.paths().count("PUT /session/") == 1 and not peer.sessions


def test_a_crash_before_the_session_is_remembered_leaves_one_that_ends_by_itself_and_one_result(
    engine: Make, peer: Any, series: Series
) -> None:
    def crash(note: str) -> None:
        raise LeaseLost("killed")

    one = engine(session="upload")
    with pytest.raises(LeaseLost):
        _run(one, series.task(remember=crash))
    assert "POST /v1/segmentation" not in peer.paths() and len(peer.sessions) == 1
    _assert_right(_run(one, series.task()), series)
    assert peer.paths().count("POST /v1/segmentation") == 1 and len(peer.sessions) == 1


def test_a_session_of_another_volume_or_a_server_that_restarted_is_not_used(
    engine: Make, peer: Any, series: Series
) -> None:
    one = engine(session="upload")
    other = 'session\n{"session": "abc", "digest": "00"}'
    _assert_right(_run(one, series.task(note=other)), series)
    gone = series.notes[-1]  # ended with the job before
    _assert_right(_run(one, series.task(note=gone)), series)
    assert peer.paths().count("PUT /session/") == 2


def test_a_session_ends_with_a_job_that_is_over_for_good_and_stays_for_one_that_is_tried_again(
    engine: Make, peer: Any, series: Series
) -> None:
    peer.misbehave("nowhere")
    with pytest.raises(GeometryMismatch):
        _run(engine(session="upload"), series.task())
    assert not peer.sessions
    peer.misbehave("unavailable")
    one = engine(session="upload")
    with pytest.raises(EngineUnavailable):
        _run(one, series.task())
    assert len(peer.sessions) == 1
    one.cancel_noted(series.notes[-1])
    assert not peer.sessions
    one.cancel_noted(series.notes[-1])  # known no more: no error
    one.cancel_noted("something else")


@pytest.mark.parametrize("told", [{}, {"session_id": "../admin/model/x"}, {"session_id": 7}, ["a"]])
def test_a_session_without_a_usable_id_is_an_engine_error(engine: Make, server: Any, series: Series, told: Any) -> None:
    model = {"name": "clara_spleen", **SERVERS.MODELS["clara_spleen"]}
    server.on("GET", "/v1/models", server.answer(200, json.dumps(model).encode()))
    server.on("PUT", "/session/", server.answer(200, json.dumps(told).encode()))
    with pytest.raises(EngineError, match="session without an id"):
        _run(engine(base_url=server.url, session="upload"), series.task())
    assert len(server.received) == 2 and not series.notes


# --- the node as the source ------------------------------------------------------------------------------------------

WHERE = {"server_address": "127.0.0.1", "server_port": 104, "ae_title": "DICOM_NODE"}


def test_the_server_may_fetch_the_series_only_where_it_may_see_the_patient(engine: Make) -> None:
    with pytest.raises(ConfigError, match=r"engines\.aiaa\.options\.session.*send_identifiable"):
        engine(base_url="https://aiaa.hospital.example", session="dicom", dicom=WHERE)
    engine(base_url="https://aiaa.hospital.example", session="dicom", dicom=WHERE, send_identifiable=True)


def test_a_fetch_that_fails_is_told_and_recorded_as_identifiable(
    engine: Make, peer: Any, series: Series, free_port: Callable[[], int]
) -> None:
    where = {**WHERE, "server_port": free_port()}
    with pytest.raises(EngineCrashed):
        _run(engine(session="dicom", dicom=where), series.task())
    ((sending, state),) = series.sent
    assert (sending.what, sending.objects, sending.identifiable) == ("series by C-GET", SLICES, True)
    assert state == "EngineCrashed" and "SECRET-7" not in repr(series.notes)
    (put,) = [request for request in peer.requests if request.method == "PUT"]
    assert json.loads(put.body)["dicom"] == {
        **where,
        "query_level": "SERIES",
        "patient_id": "SECRET-7",
        "study_uid": "1.2.3",
        "series_uid": "1.2.3.4",
    }


# --- polygons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fix", ["off", "2d", "3d"])
def test_a_mask_comes_back_the_same_by_way_of_polygons(engine: Make, peer: Any, series: Series, fix: str) -> None:
    one = engine(model="clara_deepgrow", points={"points": [[5, 5, 1], [5, 5, 2]]}, polygons={"fix": fix})
    task = series.task()
    result = _run(one, task)
    volume = _labels(result)
    for k, uid in enumerate(volume.sop_instance_uids):
        expected = np.asarray(series.expected(uid)) > 0 if k in (1, 2) else np.zeros((ROWS, COLUMNS), bool)
        np.testing.assert_array_equal(volume.labels[k] > 0, expected)
    assert any("overlap with its mask 1.000" in note for note in volume.notes)
    assert peer.paths().count("POST /v1/fixpolygon") == {"off": 0, "2d": 2, "3d": 1}[fix]
    mask2polygon = next(request for request in peer.requests if request.path == "/v1/mask2polygon")
    assert json.loads(mask2polygon.part("params").body) == {"more_points": 10}
    assert [ds.Modality for ds in _encoded(result, task)] == ["SEG", "SR"]
    assert {sending.what for sending, _ in series.sent} == {"volume", "mask", *(["pictures"] if fix == "2d" else [])}


def test_labels_inside_each_other_keep_their_pixels_although_the_outlines_overlap(
    engine: Make, peer: Any, series: Series
) -> None:
    _assert_right(_run(engine(polygons={"min_overlap": 0.5}), series.task()), series)
    assert peer.paths().count("POST /v1/mask2polygon") == 2


def test_fixed_polygons_are_what_is_painted(engine: Make, peer: Any, series: Series) -> None:
    peer.more_shift = 1.0
    one = engine(model="clara_deepgrow", points={"points": [[5, 5, 1]]}, polygons={"fix": "2d"})
    volume = _labels(_run(one, series.task()))
    assert np.argwhere(volume.labels).min(axis=0).tolist() == [1, 2, 4]
    assert np.argwhere(volume.labels).max(axis=0).tolist() == [1, 8, 11]
    params = json.loads(peer.requests[-1].part("params").body)
    assert (params["dimension"], params["poly"]) == (2, [[[3, 2], [10, 2], [10, 8], [3, 8]]])


def test_polygons_that_are_not_the_mask_are_refused_and_the_file_kept(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("", "other-polygons")
    one = engine(model="clara_deepgrow", points={"points": [[5, 5, 1]]}, polygons={})
    with pytest.raises(UnusablePolygons, match=r"overlap \(Dice\) 0\.00.*quarantine"):
        _run(one, series.task())
    assert len(series.kept) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("drop", EngineUnavailable),
        ("unavailable", EngineUnavailable),
        ("error", EngineCrashed),
        ("partial", EngineUnavailable),
        ("huge", EngineError),
        ("said-no", EngineError),
    ],
)
def test_a_failed_inference_is_asked_once_and_told_by_its_kind(
    engine: Make, peer: Any, series: Series, word: str, error: type[EngineError]
) -> None:
    peer.misbehave(word)
    one = engine()
    with pytest.raises(error) as caught:
        _run(one, series.task())
    assert peer.paths().count("POST /v1/segmentation") == 1 and not series.kept
    assert "SECRET-7" not in str(caught.value)
    _assert_right(_run(one, series.task()), series)


@pytest.mark.parametrize(("word", "reason"), [("partial", "ends inside"), ("no-file", "no mask")])
def test_parts_that_are_missing_or_cut_are_told(
    engine: Make, peer: Any, series: Series, word: str, reason: str
) -> None:
    peer.misbehave(word)
    with pytest.raises(EngineError, match=reason):
        _run(engine(output="both"), series.task())


def test_a_part_that_is_called_a_path_is_written_nowhere_else(
    engine: Make, peer: Any, series: Series, tmp_path: Path
) -> None:
    peer.misbehave("traversal")
    _assert_right(_run(engine(output="both"), series.task()), series)
    assert not Path("/tmp/evil.nii.gz").exists()


def test_a_slow_server_is_given_the_time_of_the_job_and_no_more(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("slow")
    with pytest.raises(EngineTimeout):
        _run(engine(timeout_s=0.5), series.task())


@pytest.mark.parametrize(
    ("word", "reason"),
    [("nowhere", "identity"), ("mirrored", "wrong sign"), ("probabilities", "whole numbers"), ("garbage", "")],
)
def test_an_answer_that_does_not_fit_is_kept_and_the_job_fails(
    engine: Make, peer: Any, series: Series, word: str, reason: str
) -> None:
    peer.misbehave(word)
    with pytest.raises(EngineError, match=f"{reason}.*quarantine as kept-1") as caught:
        _run(engine(), series.task())
    assert not caught.value.retryable
    ((content, why),) = series.kept
    assert content[:2] == b"\x1f\x8b" and reason in why


def test_a_series_that_is_no_stack_is_refused_before_anything_is_asked(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    with pytest.raises(SeriesRejected, match="too few slices"):
        _run(engine(), make_series(slices=2).task())
    assert peer.paths() == []


def test_a_model_the_server_does_not_have_waits(engine: Make, series: Series) -> None:
    with pytest.raises(EngineUnavailable, match="offered: clara_annotation, clara_covid"):
        _run(engine(model="liver"), series.task())
    assert not series.sent


def test_a_server_that_cannot_even_list_its_models_is_no_fault_of_the_series(
    engine: Make, server: Any, series: Series
) -> None:
    for status in (404, 500):
        server.on("GET", "/v1/models", server.answer(status, b"<html>"))
        with pytest.raises(EngineUnavailable, match="no AIAA server that works") as caught:
            _run(engine(base_url=server.url), series.task())
        assert not isinstance(caught.value, EngineCrashed)


def test_what_is_no_aiaa_server_is_told(engine: Make, server: Any, series: Series) -> None:
    server.on("GET", "/v1/models", server.answer(200, b'"hello"'))
    with pytest.raises(EngineError, match="not that of an AIAA server"):
        _run(engine(base_url=server.url), series.task())


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_report_tells_models_and_what_is_asked(engine: Make) -> None:
    told = dict(engine().report())
    assert told["models"].startswith("clara_spleen (segmentation), clara_annotation (annotation)")
    assert (told["asked"], told["labels"]) == ("segmentation of clara_spleen 1", "1 spleen, 2 aorta")


def test_nobody_there_is_unavailable_and_then_trouble(engine: Make, free_port: Callable[[], int]) -> None:
    one = engine(base_url=f"http://127.0.0.1:{free_port()}", breaker_failures=2)
    assert (one.trouble, one.gauges()) == ("", {"breaker_state": 0.0})
    with pytest.raises(EngineUnavailable):
        one.report()
    assert one.trouble and one.gauges() == {"breaker_state": 1.0}


def test_every_request_is_told_to_the_observer_and_a_closed_engine_does_nothing(engine: Make, series: Series) -> None:
    seen: list[tuple[str, str]] = []
    one = engine()
    one.observe(lambda name, outcome, seconds: seen.append((name, outcome)))
    _run(one, series.task())
    assert seen == [("aiaa", "ok"), ("aiaa", "ok")]
    one.close()
    one.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        _run(one, series.task())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"base_url": "ftp://x"}, "base_url"),
        ({"sesion": True}, "sesion"),
        ({"token": "literally-the-token"}, "token"),
        ({"params": {"x": float("nan")}}, "params"),
        ({"api": "dextr3d"}, ""),
        ({"points": {"points": [[1, 2]]}}, r"points\.points"),
        ({"points": {"points": [[-1, 2, 3]]}}, r"points\.points"),
        ({"points": {"source": "sr", "points": [[1, 2, 3]]}}, "points"),
        ({"points": {"source": "sr", "background_concepts": [["DCM"]]}}, r"points\.background_concepts"),
        ({"session": "dicom"}, ""),
        ({"session": "dicom", "dicom": WHERE, "polygons": {}}, ""),
        ({"findings": {}, "output": "image"}, ""),
        ({"findings": {}, "polygons": {}}, ""),
    ],
)
def test_a_wrong_option_is_named_and_never_quoted(engine: Make, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"engines\.aiaa\.options\.?{key}") as caught:
        engine(**options)
    assert "literally" not in str(caught.value)


def test_a_model_must_be_named(engine: Make) -> None:
    with pytest.raises(ConfigError, match=r"engines\.aiaa\.model: missing"):
        engine(model="")


# --- the example rule, the node, and the server by hand --------------------------------------------------------------


def _rules(tmp_path: Path) -> Path:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "aiaa.yaml", rules)
    return rules


def test_the_example_rule_sends_ct_volumes_and_no_scout_to_it(
    tmp_path: Path, make_series: Callable[..., Series]
) -> None:
    loaded = load_rules(_rules(tmp_path), engines=["aiaa-spleen"], destinations=["PACS"])

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

    assert jobs(make_series(slices=10)) == [("aiaa-spleen", ("seg", "sr"), ("PACS",))]
    assert jobs(make_series(slices=10, Modality="MR")) == []
    assert jobs(make_series(slices=9)) == []


def _sent(tool: Callable[[str], str], node: Any, *paths: str) -> None:
    storescu = [tool("storescu"), "-R", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
    subprocess.run([*storescu, *paths], check=True, capture_output=True, timeout=60)


def _states(ours: Any) -> list[JobState]:
    return [job.state for job in ours.queue.jobs(study_instance_uid="1.2.3")]


def _catalog(node: Any) -> Any:
    return closing(open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0)))


@pytest.mark.crash  # `make test` has the same with the other engines
def test_a_node_whose_work_process_is_killed_meanwhile_puts_one_session_and_keeps_one_result(
    *,
    peer: Any,
    make_series: Callable[..., Series],
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    series = make_series(slices=10)
    report = _report(series, tmp_path, (5, 5, 4))
    options = {"base_url": peer.url, "session": "upload", "points": {"source": "sr"}}
    node = running_node(
        rules_dir=str(_rules(tmp_path)),
        engines={"aiaa-spleen": {"kind": "aiaa", "model": "clara_deepgrow", "options": options}},
        destinations={"CT1": {"ae_title": "CT1", "host": "127.0.0.1", "port": free_port()}},
        completion={"quiet_s": 0.5},
        jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
    )
    peer.slow_s = 60.0
    peer.misbehave("slow")
    _sent(tool, node, report.path, *(instance.path for instance in series.instances))
    wait_for(lambda: "POST /v1/deepgrow" in peer.paths(), 40, f"the request; log:\n{node.tail()}")
    os.kill(node.pid("work"), signal.SIGKILL)
    with _catalog(node) as ours:
        wait_for(lambda: _states(ours) == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
        kept = ours.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.3"]})
        assert sorted(one.modality for one in kept) == [*["CT"] * 10, "SEG", "SR", "SR"]  # one SR is what was sent
        told = "\n".join(event.text for event in ours.queue.timeline("1.2.3"))
    assert peer.paths().count("PUT /session/") == 1  # what was put before the crash was used after it
    assert peer.seen_points[-1] == ([[5, 5, 4]], [])
    assert not peer.sessions and "aiaa-spleen" in told


def test_the_node_is_the_source_a_server_fetches_the_series_from(
    *,
    peer: Any,
    make_series: Callable[..., Series],
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    series = make_series(slices=10)
    port = free_port()
    where = {"server_address": "127.0.0.1", "server_port": port, "ae_title": "DICOM_NODE"}
    node = running_node(
        rules_dir=str(_rules(tmp_path)),
        dicom_port=port,
        engines={
            "aiaa-spleen": {
                "kind": "aiaa",
                "model": "clara_spleen",
                "options": {"base_url": peer.url, "session": "dicom", "dicom": where},
            }
        },
        destinations={"CT1": {"ae_title": "CT1", "host": "127.0.0.1", "port": free_port()}},
        completion={"quiet_s": 0.5},
        jobs={"workers": 1, "backoff_s": 0.2},
    )
    _sent(tool, node, *(instance.path for instance in series.instances))
    with _catalog(node) as ours:
        wait_for(lambda: _states(ours) == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
        kept = list(ours.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.3"]}))
    (seg,) = [_read_whole(one) for one in kept if one.modality == "SEG"]
    painted = int(np.count_nonzero(seg.pixel_array))
    assert painted == sum(int(np.count_nonzero(series.expected(uid))) for uid in series.values)
    assert peer.paths()[-1] == "DELETE /session/ID" and not peer.sessions


def _read_whole(instance: StoredInstance) -> Dataset:
    import pydicom

    return pydicom.dcmread(instance.path)


def test_the_server_runs_by_hand(engine: Make) -> None:
    command = [sys.executable, "-m", "tests.engines.servers.aiaa", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rsplit(" ", 1)[1].strip()
        assert "clara_spleen" in dict(engine(base_url=url).report())["models"]
    finally:
        process.kill()
        process.communicate(timeout=10)
