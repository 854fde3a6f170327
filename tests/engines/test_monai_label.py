"""A series through a MONAI Label server over real sockets, well or badly answered, to SEG and SR."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from dicom_node.engines.grids import GeometryMismatch
from dicom_node.engines.monai_label import MonaiLabelEngine
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
from dicom_node.model import (
    EngineTask,
    JobState,
    Level,
    Origin,
    Sending,
    SeriesView,
    Source,
    StoredInstance,
)
from dicom_node.pipeline.encode import encoded, result_context
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.plugins import engine_class
from dicom_node.results.seg import SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.routing.load import load_rules
from dicom_node.store.catalog import open_catalog
from dicom_node.values import (
    EngineResult,
    LabelVolume,
    Measurements,
    Presence,
)

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
SLICES, ROWS, COLUMNS = 6, 12, 16
SPACING = (2.5, 0.8, 0.7)
Make = Callable[..., MonaiLabelEngine]


def _server_module() -> ModuleType:
    name = "contract_server_monai_label"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "monai_label.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture
def peer() -> Iterator[Any]:
    with SERVERS.MonaiLabelServer() as server:
        yield server


@pytest.fixture
def engine(peer: Any) -> Iterator[Make]:
    """`engine(model=..., timeout_s=..., **options)`: one on the server."""
    made: list[MonaiLabelEngine] = []

    def make(*, model: str = "threshold", timeout_s: float = 20.0, **options: Any) -> MonaiLabelEngine:
        settings = EngineSettings(
            kind="monai_label",
            model=model,
            timeout_s=timeout_s,
            options={"base_url": peer.url, "retries": 1, "backoff_s": 0.01, **options},
        )
        made.append(engine_class("monai_label")("ml", settings, devices=("cpu",), later="ignored"))
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


def _run(engine: MonaiLabelEngine, task: EngineTask) -> EngineResult:
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


# --- what comes back -------------------------------------------------------------------------------------------------


def test_the_labels_lie_on_the_pixels_of_their_images(engine: Make, series: Series) -> None:
    result = _run(engine(), series.task())
    _assert_right(result, series)
    segments = {segment.number: segment for segment in _labels(result).segments}
    assert (segments[1].label, segments[1].type.scheme, segments[2].label) == ("Spleen", "SCT", "Aorta")
    assert (segments[3].label, segments[3].type.scheme) == ("lesion xy", "99DICOMNODE")


def test_volume_and_mean_hu_are_measured_on_the_images(engine: Make, series: Series) -> None:
    (measurements,) = [v for v in _run(engine(), series.task()).values if isinstance(v, Measurements)]
    spleen, aorta, lesion = measurements.items
    for item, number in ((spleen, 1), (aorta, 2)):
        inside = np.concatenate([hu[series.expected(uid) == number] for uid, hu in series.values.items()])
        assert item.presence is Presence.PRESENT
        assert item.volume_cm3 == pytest.approx(inside.size * 2.5 * 0.8 * 0.7 / 1000)
        assert item.mean_hu == pytest.approx(inside.mean())
        assert "edge of the images" in item.note
    assert (lesion.presence, lesion.volume_cm3, lesion.mean_hu) == (Presence.UNDETERMINED, None, None)


def test_of_another_modality_no_hounsfield_units_are_told(engine: Make, make_series: Callable[..., Series]) -> None:
    series = make_series(Modality="MR")
    result = _run(engine(), series.task())
    _assert_right(result, series)
    (measurements,) = [v for v in result.values if isinstance(v, Measurements)]
    assert [item.mean_hu for item in measurements.items] == [None, None, None]
    assert measurements.items[0].volume_cm3 is not None


def test_it_becomes_a_segmentation_and_a_report_that_name_model_and_server(engine: Make, series: Series) -> None:
    task = series.task()
    result = _run(engine(), task)
    assert (result.provenance.name, result.provenance.version) == ("threshold", "0.8.5")
    made = _encoded(result, task)
    assert [ds.Modality for ds in made] == ["SEG", "SR", "SR"]  # measured, and not found
    assert {item.SegmentLabel for item in made[0].SegmentSequence} == {"Spleen", "Aorta"}
    assert made[0].SegmentSequence[0].SegmentAlgorithmName == "threshold"
    assert "server=MONAILabel - Tests 0.8.5" in result.provenance.parameters


def test_an_answer_without_a_label_is_a_report_and_no_segmentation(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("nothing")
    task = series.task()
    made = _encoded(_run(engine(), task), task)
    assert [ds.Modality for ds in made] == ["SR"]


def test_the_configured_table_comes_before_the_names_of_the_server(engine: Make, series: Series) -> None:
    table = {"spleen": {"name": "liver"}, "lesion_xy": "ignore"}
    result = _run(engine(labels=table), series.task())
    assert [segment.label for segment in _labels(result).segments] == ["liver", "Aorta"]
    assert result.provenance.device_uid != _run(engine(), series.task()).provenance.device_uid


@pytest.mark.parametrize(("word", "note"), [("turned", ""), ("nrrd", ""), ("other-grid", "on another grid")])
def test_answers_on_any_grid_and_in_either_format_are_put_in_place(
    engine: Make, peer: Any, series: Series, word: str, note: str
) -> None:
    peer.misbehave(word)
    result = _run(engine(), series.task())
    if note:
        assert any(note in text for text in _labels(result).notes)
        assert np.count_nonzero(_labels(result).labels) > 0
    else:
        _assert_right(result, series)
        assert _labels(result).notes == ()


# --- what goes out ---------------------------------------------------------------------------------------------------


def test_one_multipart_request_goes_out_with_its_length_and_nothing_of_the_patient(
    engine: Make, peer: Any, series: Series
) -> None:
    _run(engine(params={"device": "cpu"}), series.task())
    assert peer.paths() == ["GET /info/", "POST /infer/threshold"]
    request = peer.requests[1]
    assert request.query == {"output": "image"}
    assert int(request.headers["content-length"]) == len(request.body)
    params, file = request.parts
    assert (params.name, json.loads(params.body)) == ("params", {"result_extension": ".nii.gz", "device": "cpu"})
    assert (file.name, file.filename) == ("file", "volume.nii.gz")
    everything = b"".join(one.body + repr((one.path, one.query, one.headers)).encode() for one in peer.requests)
    for secret in (b"Doe", b"SECRET-7", b"1.2.3.4", *(uid.encode() for uid in series.values)):
        assert secret not in everything


def test_the_sending_is_recorded_with_what_left(engine: Make, peer: Any, series: Series) -> None:
    _run(engine(), series.task())
    ((sending, state),) = series.sent
    file = peer.requests[1].parts[1].body
    assert (state, sending.what, sending.host, sending.objects) == ("sent", "volume", "127.0.0.1", 1)
    assert (sending.bytes, sending.identifiable) == (len(file), False)
    assert sending.sha256 == hashlib.sha256(file).hexdigest()


def test_a_lost_lease_before_the_sending_sends_nothing(engine: Make, peer: Any, series: Series) -> None:
    def refuse(sending: Sending) -> Any:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        _run(engine(), series.task(record=refuse))
    assert peer.paths() == ["GET /info/"]


def test_pictures_that_may_name_the_patient_stay_unless_they_are_on_this_machine(
    make_series: Callable[..., Series], engine: Make, peer: Any
) -> None:
    series = make_series(BurnedInAnnotation="YES")
    _run(engine(), series.task())
    assert [sending.identifiable for sending, _ in series.sent] == [True]
    away = engine(base_url=f"http://engine.example:{peer.port}")
    with pytest.raises(EngineRejected, match="Burned In Annotation"):
        _run(away, series.task())
    trusted = engine(base_url=f"http://engine.example:{peer.port}", send_identifiable=True)
    with pytest.raises(EngineUnavailable):  # nobody has that name: it would have been sent
        _run(trusted, series.task())
    assert len(series.sent) == 1


def test_the_token_is_sent_and_never_shown(
    engine: Make, peer: Any, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ML_TOKEN", "tok-1")
    peer.token = "tok-1"
    one = engine(token="env:ML_TOKEN")
    one.check()
    _run(one, series.task())
    assert {request.headers["authorization"] for request in peer.requests} == {"Bearer tok-1"}
    assert "tok-1" not in repr(one.report()) and "env:ML_TOKEN" in repr(one.report())
    with pytest.raises(EngineUnavailable, match="401"):
        _run(engine(), series.task())


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_is_put_used_and_ended(engine: Make, peer: Any, series: Series) -> None:
    _assert_right(_run(engine(session=True, session_expiry_s=600), series.task()), series)
    put, infer, end = peer.requests[1:]
    assert (put.method, put.path, put.query) == ("PUT", "/session/", {"uncompress": "false", "expiry": "600"})
    assert [(part.name, part.filename) for part in put.parts] == [("files", "volume.nii.gz")]
    session = infer.query["session_id"]
    assert infer.query == {"output": "image", "session_id": session}
    assert [part.name for part in infer.parts] == ["params"]
    assert (end.method, end.path) == ("DELETE", f"/session/{session}") and not peer.sessions
    assert [(sending.what, sending.remote_id) for sending, _ in series.sent] == [
        ("volume", session),
        ("request", session),
    ]


def test_a_session_that_expired_is_made_anew_once(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("expired")
    _assert_right(_run(engine(session=True), series.task()), series)
    assert [path.split("/")[0] + path.split("/")[1] for path in peer.paths()] == [
        *("GET info", "PUT session", "POST infer", "GET session", "PUT session", "POST infer", "DELETE session"),
    ]
    assert len(series.notes) == 2
    peer.misbehave("expired", "expired")
    with pytest.raises(EngineCrashed):
        _run(engine(session=True), series.task())


def test_a_retry_uses_the_session_of_the_try_before(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("unavailable")
    one = engine(session=True)
    with pytest.raises(EngineUnavailable):
        _run(one, series.task())
    assert series.notes[-1].splitlines()[0] == "session"
    _assert_right(_run(one, series.task(note=series.notes[-1])), series)
    assert peer.paths().count("PUT /session/") == 1


def test_a_server_that_fails_for_another_reason_keeps_the_session(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("error")
    with pytest.raises(EngineCrashed):
        _run(engine(session=True), series.task())
    assert peer.paths().count("PUT /session/") == 1 and len(peer.sessions) == 1


def test_the_session_of_a_series_the_server_refuses_is_ended(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("unfit")
    with pytest.raises(EngineRejected):
        _run(engine(session=True), series.task())
    assert peer.paths()[-1].startswith("DELETE /session/") and not peer.sessions


def test_the_session_of_a_cancelled_job_is_ended(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("unavailable")
    one = engine(session=True)
    with pytest.raises(EngineUnavailable):
        _run(one, series.task())
    one.cancel_noted(series.notes[-1])
    assert not peer.sessions
    one.cancel_noted(series.notes[-1])  # known no more: no error
    one.cancel_noted("something else")


@pytest.mark.parametrize("told", [{}, {"session_id": "../datastore"}, {"session_id": 7}, ["a"]])
def test_a_session_without_a_usable_id_is_an_engine_error(engine: Make, server: Any, series: Series, told: Any) -> None:
    server.on("GET", "/info/", server.answer(200, json.dumps(SERVERS.INFO).encode()))
    server.on("PUT", "/session/", server.answer(200, json.dumps(told).encode()))
    with pytest.raises(EngineError, match="session without an id"):
        _run(engine(base_url=server.url, session=True), series.task())
    assert len(server.received) == 2 and not series.notes


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "error"),
    [("drop", EngineUnavailable), ("unavailable", EngineUnavailable), ("error", EngineCrashed)],
)
def test_a_failed_inference_is_asked_once_and_told_by_its_kind(
    engine: Make, peer: Any, series: Series, word: str, error: type[EngineError]
) -> None:
    peer.misbehave(word)
    one = engine()
    with pytest.raises(error):
        _run(one, series.task())
    assert peer.paths().count("POST /infer/threshold") == 1
    assert [state for _, state in series.sent] == [error.__name__] and not series.kept
    _assert_right(_run(one, series.task()), series)


def test_half_an_answer_is_no_answer(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("partial")
    with pytest.raises(EngineUnavailable):
        _run(engine(), series.task())


def test_a_slow_server_is_given_the_time_of_the_job_and_no_more(engine: Make, peer: Any, series: Series) -> None:
    peer.misbehave("slow")
    with pytest.raises(EngineTimeout):
        _run(engine(timeout_s=0.5), series.task())


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nowhere", "identity"),
        ("mirrored", "wrong sign"),
        ("probabilities", "whole numbers"),
    ],
)
def test_an_answer_that_does_not_fit_is_kept_and_the_job_fails(
    engine: Make, peer: Any, series: Series, word: str, reason: str
) -> None:
    peer.misbehave(word)
    with pytest.raises(EngineError, match=f"{reason}.*quarantine as kept-1") as caught:
        _run(engine(), series.task())
    assert isinstance(caught.value, GeometryMismatch) == (word != "probabilities")
    assert not caught.value.retryable
    ((content, why),) = series.kept
    assert content[:2] == b"\x1f\x8b" and reason in why


def test_a_series_that_is_no_stack_is_refused_before_anything_is_sent(
    engine: Make, peer: Any, make_series: Callable[..., Series]
) -> None:
    with pytest.raises(SeriesRejected, match="too few slices"):
        _run(engine(), make_series(slices=2).task())
    assert peer.paths() == []


def test_a_model_the_server_does_not_have_waits_and_one_for_pictures_is_a_mistake(engine: Make, series: Series) -> None:
    with pytest.raises(EngineUnavailable, match="offered: deepgrow_2d, threshold"):
        _run(engine(model="liver"), series.task())
    with pytest.raises(ConfigError, match=r"engines\.ml\.model"):
        _run(engine(model="deepgrow_2d"), series.task())
    assert not series.sent


def test_what_is_no_monai_label_server_is_told(engine: Make, server: Any, series: Series) -> None:
    server.on("GET", "/info/", server.answer(200, b"[1]"))
    with pytest.raises(EngineError, match="not that of a MONAI Label server"):
        _run(engine(base_url=server.url), series.task())


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_report_tells_server_version_models_and_labels(engine: Make, peer: Any) -> None:
    told = dict(engine().report())
    assert told["server"] == "127.0.0.1: MONAILabel - Tests 0.8.5"
    assert told["models"] == "deepgrow_2d (deepgrow), threshold (segmentation)"
    assert told["labels"] == "1 spleen, 2 aorta, 3 lesion xy"
    assert told["credentials"] == "none"


def test_nobody_there_is_unavailable_and_then_trouble(
    engine: Make, free_port: Callable[[], int], series: Series
) -> None:
    one = engine(base_url=f"http://127.0.0.1:{free_port()}", breaker_failures=2)
    assert (one.trouble, one.gauges()) == ("", {"breaker_state": 0.0})
    with pytest.raises(EngineUnavailable):
        one.report()
    assert one.trouble and one.gauges() == {"breaker_state": 1.0}


def test_every_request_is_told_to_the_observer(engine: Make, peer: Any, series: Series) -> None:
    seen: list[tuple[str, str]] = []
    one = engine()
    one.observe(lambda name, outcome, seconds: seen.append((name, outcome)))
    _run(one, series.task())
    assert seen == [("ml", "ok"), ("ml", "ok")]


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
        ({"sesion": True}, "sesion"),
        ({"token": "literally-the-token"}, "token"),
        ({"params": {"x": float("nan")}}, "params"),
        ({"labels": {"1": {"type": ["SCT"]}}}, "labels"),
    ],
)
def test_a_wrong_option_is_named_and_never_quoted(engine: Make, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"engines\.ml\.options\.{key}") as caught:
        engine(**options)
    assert "literally" not in str(caught.value)


def test_a_model_must_be_named(engine: Make) -> None:
    with pytest.raises(ConfigError, match=r"engines\.ml\.model: missing"):
        engine(model="")


# --- a server that answers nobody while it works ---------------------------------------------------------------------


def test_series_take_turns_and_none_fails_because_the_server_works_on_another(
    engine: Make, peer: Any, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines.monai_label._INFO_S", 0.4)
    one = engine()
    peer.slow_s = 1.0
    peer.misbehave("slow", "slow")
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(_run, one, series.task()) for _ in range(2)]
    for done in running:
        _assert_right(done.result(), series)
    assert peer.paths() == ["GET /info/", "POST /infer/threshold"] * 2


def test_a_series_whose_turn_does_not_come_in_time_is_put_off_and_not_blamed(
    engine: Make, peer: Any, series: Series
) -> None:
    one = engine()
    peer.slow_s = 1.5
    peer.misbehave("slow")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_run, one, series.task())
        while len(peer.paths()) < 2:
            time.sleep(0.01)
        with pytest.raises(EngineUnavailable, match="its turn"):
            _run(one, series.task(timeout_s=0.5))
        _assert_right(first.result(), series)
    assert peer.paths().count("POST /infer/threshold") == 1


def test_a_server_that_works_for_somebody_else_is_an_outage_and_no_fault_of_the_series(
    engine: Make, peer: Any, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines.monai_label._INFO_S", 0.4)
    with peer.working, pytest.raises(EngineUnavailable, match="answers nobody while it works"):
        _run(engine(), series.task())
    assert series.sent == []


# --- the example rule and the server by hand -------------------------------------------------------------------------


def test_the_example_rule_sends_ct_volumes_and_no_scout_to_it(
    tmp_path: Path, make_series: Callable[..., Series]
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "monai_label.yaml", rules)
    loaded = load_rules(rules, engines=["monai-label"], destinations=["PACS"])

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

    assert jobs(make_series(slices=10)) == [("monai-label", ("seg", "sr"), ("PACS",))]
    assert jobs(make_series(slices=10, Modality="MR")) == []
    assert jobs(make_series(slices=9)) == []
    assert jobs(make_series(slices=10, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])) == []


def test_a_node_whose_work_process_is_killed_meanwhile_sends_once_and_keeps_one_result(
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
    shutil.copy(ROOT / "routing_rules" / "examples" / "monai_label.yaml", rules)
    series = make_series(slices=10)
    options = {"base_url": peer.url, "session": True}
    node = running_node(
        rules_dir=str(rules),
        engines={"monai-label": {"kind": "monai_label", "model": "threshold", "options": options}},
        destinations={"CT1": {"ae_title": "CT1", "host": "127.0.0.1", "port": free_port()}},
        completion={"quiet_s": 0.5},
        jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
    )
    peer.slow_s = 8.0
    peer.misbehave("slow")
    images = [instance.path for instance in series.instances]
    storescu = [tool("storescu"), "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
    subprocess.run([*storescu, *images], check=True, capture_output=True, timeout=60)
    wait_for(lambda: "POST /infer/threshold" in peer.paths(), 40, f"the request; log:\n{node.tail()}")
    os.kill(node.pid("work"), signal.SIGKILL)

    with closing(open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0))) as ours:

        def state() -> list[JobState]:
            return [job.state for job in ours.queue.jobs(study_instance_uid="1.2.3")]

        wait_for(lambda: state() == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
        kept = ours.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.3"]})
        assert sorted(one.modality for one in kept) == [*["CT"] * 10, "SEG", "SR", "SR"]
        told = "\n".join(event.text for event in ours.queue.timeline("1.2.3"))
    assert peer.paths().count("PUT /session/") == 1  # what was put before the crash was used after it
    assert peer.paths().count("POST /infer/threshold") == 2
    assert "monai-label" in told and "127.0.0.1" in told
    assert 'engine_requests_total{engine="monai-label",outcome="ok"}' in node.get("/metrics")[1]


def test_the_server_runs_by_hand(engine: Make) -> None:
    command = [sys.executable, "-m", "tests.engines.servers.monai_label", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rsplit(" ", 1)[1].strip()
        assert dict(engine(base_url=url).report())["server"].endswith("0.8.5")
    finally:
        process.kill()
        process.communicate(timeout=10)
