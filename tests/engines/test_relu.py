"""A CBCT through an Engine API over real sockets, well or badly answered, to surfaces, labels and a report."""

import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, StorageSettings
from dicom_node.engines import _relu_answers as answers
from dicom_node.engines._relu_notes import Note, Step
from dicom_node.engines.handed_out import Links, Shelf, shelf_and_signer
from dicom_node.engines.relu import ReluEngine
from dicom_node.engines.webhooks import Webhooks
from dicom_node.errors import (
    ConfigError,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
    SeriesRejected,
)
from dicom_node.http.health import HealthServer
from dicom_node.model import (
    NOTE_MAX,
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
from dicom_node.plugins import encoder_class, engine_class
from dicom_node.routing.load import load_rules
from dicom_node.store.catalog import open_catalog
from dicom_node.values import EngineResult, LabelVolume, Measurements, Mesh, Pending, Presence

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
NAME = "DOE^JOHN THE SECRET"
SLICES, ROWS, COLUMNS = 6, 24, 20
SPACING = (2.5, 0.8, 0.7)
Make = Callable[..., ReluEngine]


def _server_module() -> ModuleType:
    name = "contract_server_relu"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "relu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture
def peer() -> Iterator[Any]:
    with SERVERS.EngineApi() as server:
        yield server


@dataclass
class Node:
    """What a node gives its engines: a shelf, links and webhooks on an HTTP port."""

    data_dir: Path
    links: tuple[Shelf, Any]
    webhooks: Webhooks
    woken: list[int]
    listener: socket.socket


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Its HTTP port listens, and answers once `served` is asked for too."""
    listener = socket.create_server(("127.0.0.1", 0))
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    data_dir, clock, woken = tmp_path / "data", SystemClock(), []  # type: ignore[var-annotated]
    webhooks = Webhooks(data_dir, clock, base_url=base, wake=woken.append)
    yield Node(data_dir, shelf_and_signer(data_dir, clock, base_url=base), webhooks, woken, listener)
    listener.close()


@pytest.fixture
def served(node: Node) -> Iterator[Node]:
    """`node`, answering."""
    shelf, signer = node.links
    mounts: dict[str, Any] = {Links.prefix: Links(signer, shelf), Webhooks.prefix: node.webhooks}
    server = HealthServer(node.listener, checks=(), metrics=lambda: ("text/plain", b""), mounts=mounts)
    server.start()
    yield node
    server.stop()


@pytest.fixture
def options(peer: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`options(**more)`: those of an engine on the server."""
    secret = tmp_path / "client-secret"
    secret.write_text(SERVERS.SECRET + "\n")

    def make(**more: Any) -> dict[str, Any]:
        store = peer.store_url.removeprefix("http://")
        return {
            "base_url": peer.url,
            "auth": {
                "token_url": f"{peer.root}/oauth/token",
                "client_id": SERVERS.CLIENT,
                "client_secret": f"file:{secret}",
                "audience": SERVERS.AUDIENCE,
            },
            "meshes": [{"structures": ["mandible"]}],
            "allow_hosts": [store],
            "retries": 1,
            "backoff_s": 0.01,
            **more,
        }

    return make


@pytest.fixture
def engine(options: Callable[..., dict[str, Any]], node: Node) -> Iterator[Make]:
    """`engine(timeout_s=..., **options)`: one on the server."""
    made: list[ReluEngine] = []

    def make(*, timeout_s: float = 20.0, model: str = "", with_node: bool = True, **more: Any) -> ReluEngine:
        settings = EngineSettings(kind="relu", model=model, timeout_s=timeout_s, options=options(**more))
        given = {"links": node.links, "webhooks": node.webhooks} if with_node else {}
        made.append(engine_class("relu")("relu", settings, data_dir=node.data_dir, devices=("cpu",), later=1, **given))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- a series --------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """An oblique CBCT on disk with a bright box in it, and what the node gives a task."""

    values: dict[str, Any]
    instances: list[StoredInstance]
    notes: list[str] = field(default_factory=list)
    sent: list[tuple[Sending, str]] = field(default_factory=list)
    kept: list[tuple[bytes, str]] = field(default_factory=list)
    dies_at: int = 0  # this call of `remember` raises LeaseLost: the process is gone just before the note is kept

    def task(self, **changes: Any) -> EngineTask:
        """With the functions of the node, which here keep in lists; the note is the last one kept."""

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
            return f"kept-{len(self.kept)}"

        def remember(note: str) -> None:
            assert len(note) <= NOTE_MAX
            if self.dies_at:
                self.dies_at -= 1
                if not self.dies_at:
                    raise LeaseLost("killed")
            self.notes.append(note)

        task = EngineTask(
            job_id=7,
            study_instance_uid="1.2.3",
            series_instance_uid="1.2.3.4",
            instances=tuple(self.instances),
            header=read_series_header(self.instances),
            timeout_s=30.0,
            note=self.notes[-1] if self.notes else "",
            remember=remember,
            record=record,
            quarantine=quarantine,
        )
        return replace(task, **changes)


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
        frame, _ = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))
        frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
        start = np.array((-42.0, 61.0, 250.0))
        folder = tmp_path / f"series-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        made = Series({}, [])
        for k in rng.permutation(slices).tolist():
            hu = np.full((ROWS, COLUMNS), -1000, np.int16)
            hu[4:9, 5 : 7 + k] = 300
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
            ds.Modality, ds.PatientID, ds.PatientName, ds.PositionReferenceIndicator = "CT", "SECRET-7", NAME, ""
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
            made.instances.append(_write(ds, folder / f"{k}.dcm"))
            made.values[str(ds.SOPInstanceUID)] = hu
        return made

    return make


@pytest.fixture
def series(make_series: Callable[..., Series]) -> Series:
    return make_series()


def submitted(engine: ReluEngine, series: Series, **changes: Any) -> str:
    pending = engine.run(series.task(**changes), lambda: None)
    assert isinstance(pending, Pending)
    return pending.handle


def finished(engine: ReluEngine, series: Series, handle: str = "") -> EngineResult:
    """Run and poll to the end."""
    handle = handle or submitted(engine, series)
    for _ in range(10):
        answer = engine.poll(series.task(), handle)
        if isinstance(answer, EngineResult):
            return answer
    raise AssertionError("no end")


def mesh_of(result: EngineResult) -> Mesh:
    (mesh,) = [value for value in result.values if isinstance(value, Mesh)]
    return mesh


def report_of(result: EngineResult) -> dict[str, Any]:
    (measurements,) = [value for value in result.values if isinstance(value, Measurements)]
    return {item.segment.label: item for item in measurements.items}


def is_the_box(peer: Any, mesh: Mesh) -> None:
    (job,) = peer.started
    expected = SERVERS.Volume(job.data, job.extension).box()
    found = np.array(sorted(mesh.vertices.tolist()))
    np.testing.assert_allclose(found, sorted(expected.tolist()), atol=1e-3)


def asked(peer: Any, method: str, path: str) -> list[Any]:
    return [one for one in peer.asked if one.method == method and one.path.startswith(path)]


# --- a job -----------------------------------------------------------------------------------------------------------


def test_a_series_goes_up_and_comes_back_as_a_surface_in_its_place(peer: Any, engine: Make, series: Series) -> None:
    one = engine()
    assert submitted(one, series) in peer.jobs
    (job,) = peer.started
    assert job.body == {
        "inputFiles": {"cbct": {"extension": ".zip"}},
        "outputFiles": {"meshes": [{"extension": ".stl", "structures": ["mandible"]}]},
    }
    first = one.poll(series.task(), job.id)
    assert isinstance(first, Pending) and first.handle == job.id and 13 <= first.poll_after_s <= 17
    result = finished(one, series, job.id)
    mesh = mesh_of(result)
    is_the_box(peer, mesh)
    assert (mesh.title, [segment.label for segment in mesh.segments]) == ("mandible", ["Mandible"])
    assert mesh.segments[0].type.scheme == "SCT"
    told = report_of(result)["Mandible"]
    volume = (ROWS - 1) * SPACING[1] * (COLUMNS - 1) * SPACING[2] * (SLICES - 1) * SPACING[0] / 8000
    assert told.presence is Presence.PRESENT and told.volume_cm3 == pytest.approx(volume, rel=1e-3)
    assert (result.provenance.manufacturer, result.provenance.version) == ("Relu", "24.06")
    assert [Note.of(note).step for note in series.notes] == [  # type: ignore[union-attr]
        Step.SUBMITTING,
        Step.CREATED,
        Step.UPLOADED,
        Step.STARTED,
    ]


def test_the_upload_is_one_put_with_its_length_and_without_the_token(peer: Any, engine: Make, series: Series) -> None:
    submitted(engine(), series)
    (put,) = peer.stored
    (job,) = peer.started
    assert put.method == "PUT" and "authorization" not in put.headers
    assert int(put.headers["content-length"]) == len(job.data) and "transfer-encoding" not in put.headers
    with_token = [one for one in peer.asked if one.path != "/oauth/token"]
    assert all(one.headers["authorization"].startswith("Bearer ") for one in with_token)
    assert len(peer.token_requests) == 1


def test_a_token_is_used_by_all_jobs_and_told_in_the_gauges(
    peer: Any, engine: Make, make_series: Callable[..., Series]
) -> None:
    one = engine()
    assert "token_expires_seconds" not in one.gauges()
    for _ in range(3):
        finished(one, make_series())
    assert len(peer.token_requests) == 1
    assert 86_000 < one.gauges()["token_expires_seconds"] <= 86_400
    assert one.gauges()["breaker_state"] == 0 and one.trouble == ""


def test_the_sendings_are_recorded_with_what_left(peer: Any, engine: Make, series: Series) -> None:
    handle = submitted(engine(), series)
    (request, how), (images, through) = series.sent
    assert (how, through) == ("sent", "sent")
    assert (request.what, request.objects, request.remote_id) == ("request", 0, handle)
    (job,) = peer.started
    assert (images.objects, images.bytes, images.remote_id) == (SLICES, len(job.data), handle)
    assert images.identifiable  # on this machine nothing is hidden


@pytest.mark.parametrize("extension", [".stl", ".ply", ".obj"])
def test_every_kind_of_surface_is_read(peer: Any, engine: Make, series: Series, extension: str) -> None:
    result = finished(engine(meshes=[{"structures": ["mandible"], "extension": extension}]), series)
    is_the_box(peer, mesh_of(result))


def test_a_multi_frame_image_goes_as_it_is(peer: Any, engine: Make, series: Series, tmp_path: Path) -> None:
    from dicom_node.engines._relu_input import pack

    path = tmp_path / "one.dcm"
    with path.open("wb") as file:
        pack(series.instances[:1], file, None, lambda: None)
    assert pydicom.dcmread(path).SOPInstanceUID == series.instances[0].sop_instance_uid


def test_version_2_has_another_path(engine: Make, series: Series, options: Callable[..., dict[str, Any]]) -> None:
    with SERVERS.EngineApi(generic=True) as old:
        auth = {**options()["auth"], "token_url": f"{old.root}/oauth/token"}
        told = {"base_url": old.url, "auth": auth, "allow_hosts": [old.store_url.removeprefix("http://")]}
        finished(engine(**told, job_path="/generic-job"), series)
        assert len(old.started) == 1
        with pytest.raises(EngineUnavailable, match="job_path"):
            engine(**told).run(series.task(note=""), lambda: None)


# --- label volumes ---------------------------------------------------------------------------------------------------


def labels_of(result: EngineResult) -> LabelVolume:
    (volume,) = [value for value in result.values if isinstance(value, LabelVolume)]
    return volume


@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_a_volume_lies_on_the_pixels_of_the_images(engine: Make, series: Series, extension: str) -> None:
    orders = [{"structures": ["mandible"], "extension": extension}]
    result = finished(engine(meshes=[], volumes=orders), series)
    volume = labels_of(result)
    for plane, uid in zip(volume.labels, volume.sop_instance_uids, strict=True):
        np.testing.assert_array_equal(plane, series.values[uid] >= SERVERS.BRIGHT)
    voxels = sum(int((values >= SERVERS.BRIGHT).sum()) for values in series.values.values())
    told = report_of(result)["Mandible"]
    assert told.volume_cm3 == pytest.approx(voxels * np.prod(SPACING) / 1000)


def test_a_label_map_of_several_structures_has_a_segment_for_each(engine: Make, series: Series) -> None:
    result = finished(engine(meshes=[], volumes=[{"structures": ["mandible", "tooth11"]}]), series)
    segments = {segment.number: segment.label for segment in labels_of(result).segments}
    assert segments == {1: "Mandible", 2: "tooth11"}
    assert report_of(result)["tooth11"].presence is Presence.UNDETERMINED


def test_a_volume_on_another_grid_is_looked_up_and_says_so(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("other-grid")
    result = finished(engine(meshes=[], volumes=[{"structures": ["mandible"]}]), series)
    assert any("nearest" in note for note in labels_of(result).notes)


def test_a_volume_beside_the_images_is_refused_and_kept(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("nowhere-grid")
    with pytest.raises(EngineError, match=r"quarantine as kept-1"):
        finished(engine(meshes=[], volumes=[{"structures": ["mandible"]}]), series)
    assert len(series.kept) == 1


def test_a_surface_and_a_volume_of_one_structure_are_told_once(engine: Make, series: Series) -> None:
    result = finished(engine(volumes=[{"structures": ["mandible"]}]), series)
    assert list(report_of(result)) == ["Mandible"]
    voxels = sum(int((values >= SERVERS.BRIGHT).sum()) for values in series.values.values())
    assert report_of(result)["Mandible"].volume_cm3 == pytest.approx(voxels * np.prod(SPACING) / 1000)


# --- dialects --------------------------------------------------------------------------------------------------------


def test_both_spellings_of_the_pages_and_their_commas_are_understood(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("pages", 2)
    peer.misbehave("commas")
    peer.misbehave("notify-by-post")
    is_the_box(peer, mesh_of(finished(engine(), series)))
    assert [one.method for one in asked(peer, "PUT", "/24.06/finish") + asked(peer, "POST", "/24.06/finish")] == [
        "PUT",
        "POST",
    ]


def test_trailing_commas_are_forgiven_and_texts_are_left_alone() -> None:
    body = b'{"a": [1, 2, ], "b": {"c": ",}",\n }, "d": "x\\",]",}'
    assert answers.tolerant_json(body) == {"a": [1, 2], "b": {"c": ",}"}, "d": 'x",]'}
    for bad in (b"", b"{", b"<html>", b"\xff", b"[" * 100_000):
        with pytest.raises(EngineError, match="no JSON"):
            answers.tolerant_json(bad)


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        '{"jobId": 7}',
        '{"jobId": "../../etc"}',
        '{"jobId": "%s"}' % ("a" * 200),
        '{"jobId": "j", "presignedUploadUrl": ["x"]}',
        '{"jobId": "j", "presignedUploadUrl": {"cbct": {"presignedUploadUrl": 7}}}',
        '{"jobId": "j", "presignedUploadUrl": {"cbct": {"presignedUploadUrl": "https://x/%s"}}}' % ("a" * 5000),
    ],
)
def test_an_answer_to_a_job_that_is_none_is_refused(body: str) -> None:
    with pytest.raises(EngineError):
        answers.created(body.encode(), "cbct")


@pytest.mark.parametrize(
    "body",
    [
        '{"success": true, "outputFiles": {"meshes": [{"status": "Odd"}]}}',
        '{"success": true, "outputFiles": {"meshes": [{"status": "Available"}]}}',
        '{"success": true, "outputFiles": {"meshes": ["x"]}}',
        '{"success": "yes"}',
        '{"success": true, "outputFiles": [1]}',
    ],
)
def test_results_that_are_none_are_refused(body: str) -> None:
    with pytest.raises(EngineError):
        answers.results(body.encode())


# --- what is not there -----------------------------------------------------------------------------------------------

TWO = [{"structures": ["mandible"]}, {"structures": ["tooth11"], "extension": ".obj"}]


def test_a_missing_structure_is_absent_and_the_others_come(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("missing")
    result = finished(engine(meshes=TWO), series)
    told = report_of(result)
    assert told["Mandible"].presence is Presence.ABSENT and "missing" in told["Mandible"].note
    assert told["tooth11"].presence is Presence.PRESENT
    assert mesh_of(result).title == "tooth11" and "mandible: not in the images" in mesh_of(result).notes


def test_a_failed_file_is_undetermined_and_said_in_every_result(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("failed")
    result = finished(engine(meshes=TWO), series)
    assert report_of(result)["Mandible"].presence is Presence.UNDETERMINED
    assert "mandible: the engine failed on it" in mesh_of(result).notes


def test_a_file_the_answer_does_not_speak_of_is_said_to_be_that(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("silent")
    result = finished(engine(meshes=TWO), series)
    assert "said nothing" in report_of(result)["Mandible"].note
    assert mesh_of(result).title == "tooth11"


def test_nothing_found_is_a_report_and_no_failure(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("all-missing")
    result = finished(engine(meshes=TWO), series)
    assert not [value for value in result.values if isinstance(value, Mesh)]
    assert {item.presence for item in report_of(result).values()} == {Presence.ABSENT}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("unsuccessful", "the job failed there"),
        ("all-failed", "without a single file"),
        ("no-success", "whether it succeeded"),
        ("garbage-poll", "no JSON"),
        ("unknown-job", "jobs retry 7"),
        ("twice", "two files"),
    ],
)
def test_a_job_that_failed_there_fails_here_with_the_reason(
    peer: Any, engine: Make, series: Series, wrong: str, said: str
) -> None:
    one = engine(meshes=TWO)
    handle = submitted(one, series)
    peer.misbehave(wrong)
    with pytest.raises(EngineError, match=said) as caught:
        finished(one, series, handle)
    assert not caught.value.retryable and not isinstance(caught.value, EngineRejected)


# --- where surfaces lie ----------------------------------------------------------------------------------------------


def test_a_surface_in_ras_is_converted_and_says_so(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("ras")
    mesh = mesh_of(finished(engine(), series))
    is_the_box(peer, mesh)
    assert any("converted from RAS" in note for note in mesh.notes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("nowhere", "neither as LPS nor as RAS"),
        ("truncated", "cut short|no STL"),
        ("draco", "Draco"),
        ("wrong-size", "announced"),
    ],
)
def test_a_file_that_does_not_fit_is_kept_and_the_job_fails(
    peer: Any, engine: Make, series: Series, wrong: str, said: str
) -> None:
    peer.misbehave(wrong)
    with pytest.raises(EngineError, match=said) as caught:
        finished(engine(), series)
    assert "quarantine as kept-1" in str(caught.value) and not caught.value.retryable
    assert len(series.kept) == 1 and len(series.kept[0][0]) > 10


def test_a_file_beyond_its_bound_is_not_fetched(engine: Make, series: Series) -> None:
    with pytest.raises(EngineError, match="more than 100 bytes"):
        finished(engine(max_mesh_bytes=100), series)


# --- exactly once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_killed_before_any_note_one_job_starts_and_one_result_comes(
    peer: Any, engine: Make, series: Series, dies_at: int
) -> None:
    series.dies_at = dies_at
    with pytest.raises(LeaseLost):
        submitted(engine(), series)
    result = finished(engine(), series)
    assert len(peer.started) == 1
    is_the_box(peer, mesh_of(result))


@pytest.mark.parametrize("kept", [2, 3, 4])
def test_run_again_from_every_note_starts_one_job(peer: Any, engine: Make, series: Series, kept: int) -> None:
    submitted(engine(), series)
    note = series.notes[kept - 1]
    handle = submitted(engine(), series, note=note)
    assert handle in peer.jobs and (len(peer.jobs), len(peer.started)) == (1, 1)


@pytest.mark.parametrize("wrong", ["drop-submit", "garbage-submit", "no-urls"])
def test_a_lost_answer_to_the_job_leaves_one_that_never_starts(
    peer: Any, engine: Make, series: Series, wrong: str
) -> None:
    peer.misbehave(wrong)
    with pytest.raises(EngineError):
        submitted(engine(), series)
    assert peer.started == []
    finished(engine(), series)
    assert len(peer.jobs) == 2 and len(peer.started) == 1


def test_a_lost_answer_to_the_notification_starts_it_once(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("drop-notify")
    finished(engine(retries=0), series)
    (job,) = peer.started
    assert job.notified == 2 and len(peer.jobs) == 1


def test_a_lost_answer_to_the_notification_of_an_upload_that_is_then_unknown_starts_it_once(
    peer: Any, engine: Make, series: Series
) -> None:
    peer.forgets_uploads = True
    peer.misbehave("drop-notify")
    finished(engine(), series)
    (job,) = peer.started
    assert job.notified >= 2 and len(peer.jobs) == 1


def test_a_presigned_url_that_is_over_leads_to_a_new_job_and_not_to_many(
    peer: Any, engine: Make, series: Series
) -> None:
    series.dies_at = 3
    with pytest.raises(LeaseLost):
        submitted(engine(), series)
    peer.misbehave("expired-upload")
    finished(engine(), series)
    assert len(peer.jobs) == 2 and len(peer.started) == 1
    assert Note.of(series.notes[-1]).spent == 1  # type: ignore[union-attr]

    spent = Note(step=Step.CREATED, job="j", upload=f"{peer.store_url}/in/j", notify=peer.url, spent=3)
    with pytest.raises(EngineError, match="none took the images"):
        submitted(engine(), series, note=spent.text)


def test_a_fresh_url_that_is_refused_is_an_outage_and_no_new_job(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("expired-upload", 9)
    with pytest.raises(EngineUnavailable):
        submitted(engine(), series)
    assert len(peer.jobs) == 1


def test_notes_show_people_no_url_and_no_patient(engine: Make, series: Series) -> None:
    submitted(engine(), series)
    for note in series.notes:
        first = note.partition("\n")[0]
        assert "http" not in first and "signature" not in first
    assert NAME not in "".join(series.notes)
    assert Note.of("") is None and Note.of("hello\n{}") is None and Note.of("x\n[1]") is None


# --- outages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["crash-submit", "busy-submit", "crash-poll", "busy-poll", "busy-upload"])
def test_outages_are_outages_and_no_strike(peer: Any, engine: Make, series: Series, wrong: str) -> None:
    peer.misbehave(wrong, 3)
    with pytest.raises(EngineUnavailable) as caught:
        finished(engine(), series)
    assert type(caught.value).__name__ != "EngineCrashed"


def test_a_job_that_is_not_taken_is_a_wrong_setting_and_not_the_images_fault(
    peer: Any, engine: Make, series: Series
) -> None:
    peer.misbehave("refuse-submit")
    with pytest.raises(EngineError, match="options") as caught:
        submitted(engine(), series)
    assert not isinstance(caught.value, EngineRejected) and not caught.value.retryable


def test_a_refused_token_is_replaced_once(peer: Any, engine: Make, series: Series) -> None:
    one = engine()
    handle = submitted(one, series)
    one._api.tokens._token = replace(one._api.tokens._token, got_s=one._api.tokens._token.got_s - 100)  # type: ignore
    peer.misbehave("refuse-token")
    finished(one, series, handle)
    assert len(peer.token_requests) == 2


def test_wrong_credentials_are_trouble_and_cost_no_job(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("token-refused")
    one = engine()
    with pytest.raises(EngineUnavailable, match="refuses client_id"):
        submitted(one, series)
    assert "refuses client_id" in one.trouble
    assert peer.jobs == {} and SERVERS.SECRET not in one.trouble


def test_a_result_whose_url_is_over_is_asked_for_again(peer: Any, engine: Make, series: Series) -> None:
    one = engine()
    handle = submitted(one, series)
    peer.misbehave("expired-result")
    with pytest.raises(EngineUnavailable, match="asked again"):
        finished(one, series, handle)
    is_the_box(peer, mesh_of(finished(one, series, handle)))


def test_polls_slow_down_to_a_minute_and_heed_the_engine(peer: Any, engine: Make, series: Series) -> None:
    peer.polls = 99
    one = engine()
    handle = submitted(one, series)
    pauses = []
    for _ in range(8):
        answer = one.poll(series.task(), handle)
        assert isinstance(answer, Pending)
        pauses.append(answer.poll_after_s)
    for pause, meant in zip(pauses, (15, 22.5, 33.75, 50.6, 60, 60, 60, 60), strict=True):
        assert 0.9 * meant <= pause <= 1.1 * meant + 0.1
    headers = {"retry-after": "120"}
    assert one._pause_s(handle, answers_with(headers)) == 120
    assert one._pause_s(handle, answers_with({"retry-after": "99999999"})) == 600
    assert one._pause_s(handle, answers_with({"retry-after": "0"})) == 1


def answers_with(headers: dict[str, str]) -> Any:
    from dicom_node.engines._http import Answer

    return Answer(status=202, headers=headers, body=b"")


def test_the_time_of_a_series_is_bounded_and_a_closed_engine_ends(peer: Any, engine: Make, series: Series) -> None:
    with pytest.raises(EngineTimeout):
        submitted(engine(timeout_s=1e-6), series)
    one = engine()
    one.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        submitted(one, series)
    assert peer.jobs == {}


# --- privacy ---------------------------------------------------------------------------------------------------------


def test_outside_this_machine_nothing_names_the_patient(
    peer: Any, engine: Make, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines.relu.must_hide", lambda settings, host: True)
    result = finished(engine(), series)
    (job,) = peer.started
    assert NAME.encode() not in job.data and b"SECRET-7" not in job.data
    originals = {instance.sop_instance_uid for instance in series.instances}
    with zipfile.ZipFile(io.BytesIO(job.data)) as archive:
        assert archive.namelist() == [f"{n:05d}.dcm" for n in range(1, SLICES + 1)]
        heads = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert not originals & {str(head.SOPInstanceUID) for head in heads}
    assert {str(head.PatientIdentityRemoved) for head in heads} == {"YES"}
    places = [float(np.dot(head.ImagePositionPatient, (0, 0, 1))) for head in heads]
    assert places in (sorted(places), sorted(places, reverse=True))
    assert not series.sent[-1][0].identifiable
    is_the_box(peer, mesh_of(result))


def test_the_same_job_sends_the_same_bytes_again(
    peer: Any, engine: Make, series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines.relu.must_hide", lambda settings, host: True)
    series.dies_at = 3
    with pytest.raises(LeaseLost):
        submitted(engine(), series)
    submitted(engine(), series)
    images = [sending for sending, _ in series.sent if sending.objects]
    assert len(images) == 2 and images[0].sha256 == images[1].sha256


def test_an_engine_on_this_machine_that_stores_elsewhere_gets_no_names(engine: Make, series: Series, peer: Any) -> None:
    made = Note(step=Step.CREATED, job="j", upload="https://store.example/in/j?sig=1", notify=peer.url)
    with pytest.raises(EngineError, match="send_identifiable"):
        submitted(engine(), series, note=made.text)
    assert series.sent == []


def test_the_token_goes_to_no_other_host(peer: Any, engine: Make, series: Series) -> None:
    told = Note(step=Step.UPLOADED, job="j", notify=f"{peer.store_url}/finish")
    with pytest.raises(EngineError, match="the token goes to no other host"):
        submitted(engine(), series, note=told.text)
    assert peer.stored == []


def test_images_that_may_not_leave_are_refused_before_a_job_is_made(
    peer: Any, engine: Make, make_series: Callable[..., Series], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines.relu.must_hide", lambda settings, host: True)
    with pytest.raises(EngineRejected):
        submitted(engine(), make_series(BurnedInAnnotation="YES"))
    with pytest.raises(SeriesRejected):
        submitted(engine(), make_series(slices=2))
    assert peer.jobs == {}


def test_no_secret_url_or_name_reaches_a_log(
    peer: Any, engine: Make, series: Series, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    peer.misbehave("expired-result")
    peer.misbehave("busy-poll")
    one = engine()
    handle = submitted(one, series)
    with pytest.raises(EngineUnavailable):
        finished(one, series, handle)
    finished(one, series, handle)
    told = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    for secret in (SERVERS.SECRET, NAME, "SECRET-7", "signature", *peer.tokens):
        assert secret not in told
    shown = repr(one.__dict__) + repr([Note.of(note) for note in series.notes])
    for secret in (SERVERS.SECRET, "signature", *peer.tokens):
        assert secret not in shown


# --- the engine fetches, and tells -----------------------------------------------------------------------------------


def test_the_engine_fetches_the_images_from_a_signed_url(
    peer: Any, engine: Make, series: Series, served: Node, wait_for: Callable[..., None]
) -> None:
    one = engine(handover="link")
    handle = submitted(one, series)
    (job,) = peer.jobs.values()
    assert handle == f"{job.id}@relu-7"
    wait_for(lambda: bool(peer.started), 20, "the engine's fetching")
    assert peer.stored == [] and asked(peer, "PUT", "/") == []
    url = job.body["inputFiles"]["cbct"]["downloadUrl"]
    assert NAME not in url and url not in "".join(series.notes)
    ((sending, how),) = series.sent
    assert (how, sending.objects, sending.bytes, sending.remote_id) == ("sent", SLICES, len(job.data), job.id)
    is_the_box(peer, mesh_of(finished(one, series, handle)))
    assert served.links[0].jobs() == []  # nothing is left to fetch


def test_a_lost_answer_to_a_job_with_a_link_is_left_to_a_person(
    peer: Any, engine: Make, series: Series, served: Node
) -> None:
    peer.misbehave("drop-submit")
    with pytest.raises(EngineError, match="jobs retry 7") as caught:
        submitted(engine(handover="link"), series)
    assert not caught.value.retryable and served.links[0].jobs() == []
    assert len(peer.jobs) == 1


@pytest.mark.parametrize("how", ["out of time", "closed"])
def test_an_answer_that_is_not_waited_for_any_more_is_a_lost_one(
    peer: Any, engine: Make, series: Series, served: Node, how: str
) -> None:
    one = engine(handover="link", timeout_s=1.0 if how == "out of time" else 20.0)
    peer.answers_after_s = 3.0
    ending = threading.Timer(1.0, setattr, (one, "_closed", True))  # as `close`, whose sockets end a moment later
    ending.start()
    with pytest.raises(EngineError, match="the answer was lost"):
        submitted(one, series)
    ending.join()
    peer.answers_after_s = 0.0
    with pytest.raises(EngineError, match="the answer was lost"):
        submitted(engine(handover="link"), series)
    assert len(peer.jobs) == 1


@pytest.mark.parametrize("dies_at", [1, 2])
def test_killed_around_the_submission_of_a_link_it_is_submitted_at_most_once(
    peer: Any, engine: Make, series: Series, served: Node, dies_at: int
) -> None:
    one = engine(handover="link")
    series.dies_at = dies_at
    with pytest.raises(LeaseLost):
        submitted(one, series)
    if dies_at == 1:
        submitted(one, series)
    else:
        with pytest.raises(EngineError, match="the answer was lost"):
            submitted(one, series)
        assert served.links[0].jobs() == []
    assert len(peer.jobs) == 1


@pytest.mark.parametrize("wrong", ["busy-submit", "refuse-submit", "token-refused"])
def test_a_job_with_a_link_that_was_not_taken_is_made_later(
    peer: Any, engine: Make, series: Series, served: Node, wrong: str
) -> None:
    peer.misbehave(wrong)
    with pytest.raises(EngineError) as caught:
        submitted(engine(handover="link"), series)
    assert "lost" not in str(caught.value) and served.links[0].jobs() == []
    submitted(engine(handover="link"), series)
    assert len(peer.jobs) == 1


def test_images_that_may_not_leave_leave_nothing_to_fetch(
    peer: Any, engine: Make, make_series: Callable[..., Series], served: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.engines._relu_input.why_not", lambda header, hide: "")  # found while it is written
    monkeypatch.setattr("dicom_node.engines.relu.must_hide", lambda settings, host: True)
    with pytest.raises(EngineRejected):
        submitted(engine(handover="link"), make_series(BurnedInAnnotation="YES"))
    assert served.links[0].jobs() == [] and peer.jobs == {}


def test_who_waits_no_more_withdraws_the_link(engine: Make, series: Series, served: Node) -> None:
    one = engine(handover="link")
    handle = submitted(one, series)
    assert served.links[0].jobs() == ["relu-7"]
    one.cancel(handle)
    assert served.links[0].jobs() == []
    submitted(one, series, note="", job_id=8)
    one.cancel_noted(series.notes[-1])
    assert served.links[0].jobs() == []
    one.cancel("remote-only")
    one.cancel_noted("nothing of ours")


def test_the_webhook_wakes_the_job_and_its_body_is_not_believed(
    peer: Any, engine: Make, series: Series, served: Node
) -> None:
    one = engine(webhook=True)
    handle = submitted(one, series)
    assert (peer.webhooks, served.woken) == ([204], [7])
    assert isinstance(one.poll(series.task(), handle), Pending)  # the hook said success; the poll decides


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"meshes": []}, "nothing is ordered"),
        ({"meshes": [{"structures": ["a"], "extension": ".drc"}]}, "Draco"),
        ({"meshes": [{"structures": ["a"]}, {"structures": ["A"]}]}, "twice"),
        ({"meshes": [{"structures": []}]}, "structures"),
        ({"volumes": [{"structures": ["a", "b"]}, {"structures": ["c"]}]}, "one label map"),
        ({"auth": {"token_url": "https://x/t", "client_id": "a"}}, "client_secret"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"handover": "pigeon"}, "handover"),
        ({"odd": 1}, "unknown key"),
        ({"job_options": {"x": "y" * 20_000}}, "16384"),
    ],
)
def test_a_wrong_option_is_named(engine: Make, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"engines\.relu\.options.*{said}"):
        engine(**more)


def test_what_the_node_must_give_is_checked(engine: Make, tmp_path: Path) -> None:
    engine().check()
    for more in ({"handover": "link"}, {"webhook": True}):
        engine(**more).check()
        with pytest.raises(ConfigError, match="public URL"):
            engine(with_node=False, **more).check()
    (tmp_path / "client-secret").unlink()
    with pytest.raises(ConfigError, match="client-secret"):
        engine().check()


def test_the_report_tells_reach_version_token_and_orders(engine: Make, peer: Any) -> None:
    told = dict(engine().report())
    assert told["version"] == "24.06" and "expires in 24.0 h" in told["token"]
    assert told["ordered"] == "mandible (.stl)" and "127.0.0.1" in told["reached"]
    assert peer.jobs == {} and SERVERS.SECRET not in str(told)


def test_every_request_is_observed(engine: Make, series: Series) -> None:
    heard: list[tuple[str, str]] = []
    one = engine()
    one.observe(lambda name, outcome, seconds: heard.append((name, outcome)))
    finished(one, series)
    assert heard == [("relu", "ok")] * 7  # token, job, upload, notification, two polls, download


# --- to DICOM, by rule, by hand --------------------------------------------------------------------------------------


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
    kinds = ("seg", "stl", "sr")
    encoders = [encoder_class(kind)() for kind in kinds]
    return list(encoded(result, task, context, encoders=encoders, kinds=kinds, heartbeat=lambda: None))


def test_surface_and_report_become_dicom_objects_of_the_study(peer: Any, engine: Make, series: Series) -> None:
    peer.misbehave("missing")
    result = finished(engine(meshes=TWO), series)
    made = _encoded(result, series.task())
    kinds = [str(ds.SOPClassUID) for ds in made]
    assert "1.2.840.10008.5.1.4.1.1.104.3" in kinds and any(".88." in kind for kind in kinds)
    assert {str(ds.StudyInstanceUID) for ds in made} == {"1.2.3"}
    (stl,) = [ds for ds in made if str(ds.SOPClassUID).endswith(".104.3")]
    assert str(stl.FrameOfReferenceUID) == "1.2.3.5"


def test_the_example_rule_sends_jaws_and_no_other_ct(tmp_path: Path, make_series: Callable[..., Series]) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "relu.yaml", rules)
    loaded = load_rules(rules, engines=["relu"], destinations=["PACS"])

    def jobs(series: Series) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        view = SeriesView(
            study_instance_uid="1.2.3",
            revision=1,
            header=series.task().header,
            source=Source(calling_ae_title="CBCT", called_ae_title="DICOM_NODE", address="127.0.0.1"),
            origins=frozenset({Origin.RECEIVED}),
            study_series_count=1,
            study_instance_count=50,
            study_modalities=("CT",),
            received_at=NOON,
        )
        planned = loaded.evaluate(view, now=NOON, destination_of={"CBCT": "PACS"}.get).jobs
        return [(job.engine, job.results, job.destinations) for job in planned]

    assert jobs(make_series(slices=50, BodyPartExamined="JAW")) == [("relu", ("stl", "sr"), ("PACS",))]
    assert jobs(make_series(slices=50, BodyPartExamined="ABDOMEN")) == []
    assert jobs(make_series(slices=50)) == []
    assert jobs(make_series(slices=10, BodyPartExamined="JAW")) == []


def test_the_server_runs_by_hand(engine: Make, options: Callable[..., dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "tests.engines.servers.relu", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url, token_url, *_ = process.stdout.readline().split()
        auth = {**options()["auth"], "token_url": token_url}
        assert dict(engine(base_url=url, auth=auth).report())["version"] == "24.06"
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_a_job_body_is_what_the_pages_have(engine: Make, series: Series, peer: Any) -> None:
    more = {"job_options": {"quality": "high"}, "cloud_package": "pro", "volumes": [{"structures": ["all_nerves"]}]}
    submitted(engine(**more), series)
    (job,) = peer.jobs.values()
    assert json.loads(json.dumps(job.body)) == {
        "inputFiles": {"cbct": {"extension": ".zip"}},
        "outputFiles": {
            "meshes": [{"extension": ".stl", "structures": ["mandible"]}],
            "volumes": [{"extension": ".nii.gz", "structures": ["all_nerves"]}],
        },
        "options": {"quality": "high"},
        "cloudPackage": "pro",
    }


def test_a_node_whose_work_process_is_killed_meanwhile_starts_one_job_and_keeps_one_result(
    *,
    peer: Any,
    make_series: Callable[..., Series],
    options: Callable[..., dict[str, Any]],
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "relu.yaml", rules)
    series = make_series(slices=50, BodyPartExamined="JAW")
    peer.polls = 2
    node = running_node(
        rules_dir=str(rules),
        engines={"relu": {"kind": "relu", "options": options(first_poll_s=1, longest_poll_s=1)}},
        destinations={"CBCT": {"ae_title": "CBCT", "host": "127.0.0.1", "port": free_port()}},
        completion={"quiet_s": 0.5},
        jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
    )
    images = [instance.path for instance in series.instances]
    storescu = [tool("storescu"), "-aet", "CBCT", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
    subprocess.run([*storescu, *images], check=True, capture_output=True, timeout=60)
    wait_for(lambda: bool(asked(peer, "GET", "/24.06/pollJobResults")), 40, f"a poll; log:\n{node.tail()}")
    os.kill(node.pid("work"), signal.SIGKILL)

    with closing(open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0))) as ours:

        def state() -> list[JobState]:
            return [job.state for job in ours.queue.jobs(study_instance_uid="1.2.3")]

        wait_for(lambda: state() == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
        kept = ours.index.instances(Level.STUDY, {"StudyInstanceUID": ["1.2.3"]})
        assert sorted(one.modality for one in kept) == [*["CT"] * 50, "M3D", "SR"]
        told = "\n".join(event.text for event in ours.queue.timeline("1.2.3"))
    assert len(peer.jobs) == len(peer.started) == 1
    assert peer.started[0].id in told and "signature" not in told
    assert NAME not in node.tail() and SERVERS.SECRET not in node.tail()
