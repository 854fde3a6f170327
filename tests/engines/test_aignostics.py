"""The Aignostics Platform over real sockets, against a server that was written from its published reference."""

import importlib.util
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import _read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, StorageSettings
from dicom_node.engines.aignostics import AignosticsEngine
from dicom_node.engines.handed_out import Links, shelf_and_signer
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineUnavailable,
    LeaseLost,
    SeriesRejected,
)
from dicom_node.model import EngineTask, JobState, Level, Origin, Sending, SeriesView, Source, StoredInstance, Tell
from dicom_node.pipeline.encode import encoded, result_context
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.plugins import encoder_class, engine_class
from dicom_node.routing.load import load_rules
from dicom_node.store.catalog import open_catalog
from dicom_node.values import Annotations, EngineResult, GraphicType, Pending, Quantities, SlideLabels

ROOT = Path(__file__).resolve().parents[2]
NAME = "DOE^JOHN THE SECRET"
SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
STUDY, SERIES = "1.2.826.0.1.1", "1.2.826.0.1.2"
SPECIMEN = {"disease": "LUNG_CANCER", "tissue": "LUNG"}


def _load() -> ModuleType:
    name = "aignostics_test_server"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "aignostics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


aig = _load()


# --- slides ----------------------------------------------------------------------------------------------------------


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def content(name: Dataset, value: Dataset) -> Dataset:
    item = Dataset()
    item.ValueType = "CODE"
    item.ConceptNameCodeSequence, item.ConceptCodeSequence = [name], [value]
    return item


def specimen(*substances: tuple[str, str]) -> Dataset:
    """Stained with these."""
    step, described = Dataset(), Dataset()
    step.SpecimenPreparationStepContentItemSequence = [
        content(coded("111701", "DCM", "Processing type"), coded("127790008", "SCT", "Staining")),
        *(content(coded("424361007", "SCT", "Using substance"), coded(v, "SCT", m)) for v, m in substances),
    ]
    described.SpecimenIdentifier, described.SpecimenUID = "S-4711 SECRET", generate_uid()
    described.SpecimenPreparationSequence = [step]
    return described


HE = (("12710003", "Hematoxylin stain"), ("36879007", "Water soluble eosin stain"))


def write_sm(path: Path, *, size: int = 64, kind: str = "VOLUME", mpp: float = 0.25, **more: Any) -> StoredInstance:
    """A tiled slide image of one level; attributes of `more` replace its own."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SLIDE_CLASS, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, SERIES, "1.2.826.0.1.3"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = NAME, "MRN-4711-SECRET", "19500102", "M"
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20260301", "120000", "A-SECRET", "1"
    ds.ReferringPhysicianName, ds.Manufacturer, ds.Modality, ds.SeriesNumber = "", "Scanner", "SM", 1
    ds.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    ds.InstanceNumber, ds.ContainerIdentifier = 1, "S-4711"
    ds.SpecimenDescriptionSequence = [specimen(*HE)]
    ds.BurnedInAnnotation, ds.SpecimenLabelInImage = "NO", "NO"
    ds.TotalPixelMatrixColumns = ds.TotalPixelMatrixRows = size
    ds.ImagedVolumeWidth = ds.ImagedVolumeHeight = size * mpp / 1000
    ds.ImagedVolumeDepth, ds.TotalPixelMatrixFocalPlanes = 0.001, 1
    ds.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20.0, 30.0
    ds.TotalPixelMatrixOriginSequence = [origin]
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.DimensionOrganizationType = "TILED_FULL"
    tile = min(size, 32)
    ds.Rows = ds.Columns = tile
    ds.NumberOfFrames = ((size + tile - 1) // tile) ** 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = np.full(ds.NumberOfFrames * tile * tile * 3, 200, np.uint8).tobytes()
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = SLIDE_CLASS, ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return stored(path)


def stored(path: Path) -> StoredInstance:
    """The file as the archive hands it out."""
    with path.open("rb") as file:
        file.seek(132)
        meta = _read_file_meta_info(file)
        offset = file.tell()
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="0" * 64,
        origin=Origin.RECEIVED,
        modality=str(ds.Modality),
    )


# --- the bench -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process was killed here."""


@dataclass
class Bench:
    """The platform, the node's HTTP port with its links, a job whose note lasts."""

    server: Any
    folder: Path
    links_url: str
    clock: Any
    note: str = ""
    notes: list[str] = field(default_factory=list)
    recorded: list[tuple[str, Sending]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    die_at: int = 0  # before this step is durable; counted from 1
    die_after: bool = False
    steps: int = 0
    engines: list[AignosticsEngine] = field(default_factory=list)
    images: tuple[StoredInstance, ...] = ()

    def options(self, **more: Any) -> dict[str, Any]:
        token = self.folder / "token"
        token.write_text(aig.TOKEN + "\n")
        options = {
            "base_url": self.server.url,
            "version": "1.0.0",
            "token": f"file:{token}",
            "public_url": self.links_url,
            "allow_hosts": [f"127.0.0.1:{self.server.store_port}"],
            "metadata": {"specimen": SPECIMEN},
            "backoff_s": 0.01,
            "retries": 1,
            **more,
        }
        return {key: value for key, value in options.items() if value is not None}

    def engine(self, *, model: str = "he-tme", clock: Any = None, **more: Any) -> AignosticsEngine:
        settings = EngineSettings(kind="aignostics", model=model, options=self.options(**more))
        made = engine_class("aignostics")(
            "aig", settings, devices=("cpu",), data_dir=self.folder / "data", clock=clock or self.clock
        )
        assert isinstance(made, AignosticsEngine)
        self.engines.append(made)
        return made

    def slide(self, *sizes: int, **more: Any) -> tuple[StoredInstance, ...]:
        """A pyramid of levels, base first."""
        sizes = sizes or (64,)
        made = [
            write_sm(self.folder / f"{size}-{len(self.notes)}.dcm", size=size, mpp=0.25 * sizes[0] / size, **more)
            for size in sizes
        ]
        self.images = tuple(made)
        return self.images

    def step(self) -> None:
        """Somebody pulls the plug at the step that is due."""
        self.steps += 1
        if self.steps == self.die_at:
            raise Killed

    def remember(self, text: str) -> None:
        if not self.die_after:
            self.step()
        self.note = text
        self.notes.append(text)
        if self.die_after:
            self.step()

    def task(self, *, job: int = 7) -> EngineTask:
        images = self.images or self.slide()

        @contextmanager
        def record(sending: Sending) -> Iterator[Tell]:
            latest = [sending]
            self.step()
            try:
                yield lambda sent: latest.__setitem__(0, sent)
            except BaseException:
                self.recorded.append(("failed", latest[0]))
                raise
            self.recorded.append(("sent", latest[0]))
            self.step()

        def quarantine(path: Path, reason: str) -> str:
            self.kept.append((path.read_bytes().decode("latin-1"), reason))
            return f"q{len(self.kept)}"

        return EngineTask(
            job_id=job,
            study_instance_uid=STUDY,
            series_instance_uid=SERIES,
            instances=images,
            header=read_series_header(images),
            timeout_s=60.0,
            note=self.note,
            remember=self.remember,
            record=record,
            quarantine=quarantine,
        )

    def run(self, engine: AignosticsEngine | None = None, **more: Any) -> EngineResult:
        """From the first try to the answer; the clock moves between polls."""
        engine = engine or self.engine(**more)
        answer = engine.run(self.task(), lambda: None)
        for _ in range(40):
            if isinstance(answer, EngineResult):
                return answer
            self.clock.move(answer.poll_after_s)
            answer = engine.poll(self.task(), answer.handle)
        raise AssertionError("it never ends")

    @property
    def submissions(self) -> int:
        """Runs the platform has."""
        return len(self.server.runs)

    @property
    def request(self) -> Any:
        """What the only run was asked for."""
        (run,) = self.server.runs.values()
        return run.request

    @property
    def metadata(self) -> Any:
        return self.request["items"][0]["input_artifacts"][0]["metadata"]

    def on_shelf(self) -> list[str]:
        return shelf_and_signer(self.folder / "data", self.clock)[0].jobs()


@contextmanager
def node_port(data_dir: Path, clock: Any) -> Iterator[str]:
    """The node's HTTP port as far as links go."""
    made: dict[str, Links] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            links = made["links"]
            answer = links("GET", self.path, {key.lower(): value for key, value in self.headers.items()})
            try:
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    self.send_header(key, value)
                self.end_headers()
                for piece in answer:
                    self.wfile.write(piece)
            finally:
                answer.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    shelf, signer = shelf_and_signer(data_dir, clock, base_url=url)
    made["links"] = Links(signer, shelf)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def bench(tmp_path: Path, moved_clock: Any) -> Iterator[Bench]:
    with aig.Aignostics() as server, node_port(tmp_path / "data", moved_clock) as url:
        made = Bench(server=server, folder=tmp_path, links_url=url, clock=moved_clock)
        yield made
        for engine in made.engines:
            engine.close()


def said(result: EngineResult) -> str:
    """All of it, but for the names of files in the quarantine."""
    return re.sub(r"as q\d+", "as q", repr(result.values))


def of(result: EngineResult, kind: type[Any]) -> Any:
    (value,) = [value for value in result.values if isinstance(value, kind)]
    return value


# --- a slide there and back ------------------------------------------------------------------------------------------


def test_a_slide_is_fetched_by_the_platform_and_comes_back_as_shapes_classes_and_numbers(bench: Bench) -> None:
    (image,) = bench.slide(64)
    result = bench.run()
    shapes = of(result, Annotations)
    assert shapes.sop_instance_uid == image.sop_instance_uid
    groups = [(group.label, group.graphic_type, len(group.shapes)) for group in shapes.groups]
    assert groups == [("Tumor", GraphicType.POLYGON, 1), ("Stroma", GraphicType.POLYGON, 1)]
    assert shapes.groups[0].shapes[0].tolist() == [[1, 1], [11, 1], [11, 11], [1, 11]]
    labels = of(result, SlideLabels)
    assert labels.labels.shape == (32, 32)
    assert [(s.number, s.label, s.color_rgb) for s in labels.segments] == [
        (1, "Tumor", (255, 0, 0)),
        (2, "Stroma", (0, 255, 0)),
        (3, "Necrosis", (0, 0, 255)),
    ]
    assert (labels.labels[0, 0], labels.labels[31, 0], labels.labels[0, 31]) == (1, 2, 0)
    numbers = of(result, Quantities)
    assert [(q.code.meaning, q.value, q.unit.value) for q in numbers.items] == [
        ("Absolute area TUMOR", 1.25, "mm2"),
        ("Relative area TUMOR", 40.5, "%"),
        ("Cells", 1234.0, "1"),
    ]
    assert (result.provenance.name, result.provenance.version) == ("he-tme", "1.0.0")
    assert bench.submissions == 1


def test_what_could_not_be_taken_is_kept_and_said_in_every_value(bench: Bench) -> None:
    result = bench.run()
    ((content, reason),) = bench.kept
    assert content == "PAR1....PAR1" and "cells:parquet" in reason
    for value in result.values:
        assert any("cells:parquet not taken" in note and "quarantine as q1" in note for note in value.notes)
    notes = of(result, Annotations).notes
    assert "1 hole(s) in 1 polygon(s) left out: annotations have none" in notes
    assert "1 shape(s) left out that reach beyond the slide" in notes


def test_the_request_is_the_documented_one_with_keys_out_of_the_versions_schema(bench: Bench) -> None:
    bench.slide(64)
    bench.run(due_hours=24, deadline_hours=48)
    (run,) = bench.server.runs.values()
    assert bench.metadata == {
        "specimen": SPECIMEN,
        "staining_method": "H&E",
        "width_px": 64,
        "height_px": 64,
        "resolution_mpp": 0.25,
        "media-type": "application/dicom",
        "checksum_base64_crc32c": aig.crc(run.slide),
    }
    assert (bench.request["application_id"], bench.request["version_number"]) == ("he-tme", "1.0.0")
    assert bench.request["scheduling"] == {"due_date": "2026-03-02T12:00:00Z", "deadline": "2026-03-03T12:00:00Z"}
    given = bench.request["items"][0]["input_artifacts"][0]
    assert given["name"] == "input_slide" and len(given["download_url"]) < 2083
    assert given["download_url"].startswith(f"{bench.links_url}/handed-out/")


def test_another_versions_names_are_followed_as_its_schema_has_them(bench: Bench) -> None:
    told = {"stain": {"const": "H&E"}, "width": {"type": "integer"}, "height": {"type": "integer"}}
    more = {"base_mpp": {"type": "number"}, "checksum_crc32c": {"type": "string"}, "cancer": {"anyOf": [False]}}
    bench.server.schema = {
        "required": ["checksum_crc32c", "base_mpp", "width", "height", "cancer"],
        "properties": {**told, **more, "mime_type": {"enum": ["application/dicom"], "default": "image/tiff"}},
        "additionalProperties": False,
    }
    bench.server.inputs = ("whole_slide_image",)
    bench.run(metadata={"cancer": {"type": "lung", "tissue": "lung"}})
    assert set(bench.metadata) == {*told, *more, "mime_type"}
    assert (bench.metadata["width"], bench.metadata["base_mpp"]) == (64, 0.25)


def test_a_pyramid_goes_as_one_stored_zip_without_label_and_overview(bench: Bench) -> None:
    levels = [write_sm(bench.folder / f"v{size}.dcm", size=size, mpp=16 / size) for size in (32, 64)]
    label = write_sm(bench.folder / "label.dcm", size=32, kind="LABEL", SpecimenLabelInImage="YES")
    overview = write_sm(bench.folder / "over.dcm", size=32, kind="OVERVIEW")
    thumbnail = write_sm(bench.folder / "thumb.dcm", size=16, kind="THUMBNAIL")
    bench.images = (label, levels[0], overview, levels[1], thumbnail)
    result = bench.run()
    (run,) = bench.server.runs.values()
    with zipfile.ZipFile(io.BytesIO(run.slide)) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        sent = [pydicom.dcmread(io.BytesIO(archive.read(entry))) for entry in archive.infolist()]
    assert [ds.TotalPixelMatrixColumns for ds in sent] == [64, 32]
    assert {ds.ImageType[2] for ds in sent} == {"VOLUME"}
    assert bench.metadata["media-type"] == "application/zip" and bench.metadata["width_px"] == 64
    assert of(result, Annotations).sop_instance_uid == levels[1].sop_instance_uid
    assert sum("1 image(s) of the series not sent" in note for note in result.values[0].notes) == 3
    ((state, sending),) = bench.recorded
    assert (state, sending.objects, sending.bytes, sending.remote_id) == ("sent", 2, len(run.slide), run.id)


def test_a_platform_elsewhere_sees_no_name_and_no_uid_of_the_patient(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr("dicom_node.engines.aignostics.must_hide", lambda settings, host: True)  # as of another host
    (image,) = bench.slide(64)
    result = bench.run()
    (run,) = bench.server.runs.values()
    told = run.slide + json.dumps(run.request).encode()
    for secret in (b"SECRET", b"4711", STUDY.encode(), SERIES.encode(), image.sop_instance_uid.encode(), b"19500102"):
        assert secret not in told
    assert of(result, Annotations).sop_instance_uid == image.sop_instance_uid
    ((_, sending),) = bench.recorded
    assert not sending.identifiable


def test_credentials_go_to_the_platform_and_never_to_its_store(bench: Bench) -> None:
    bench.run()
    assert {headers["authorization"] for _, _, headers, _ in bench.server.seen} == {f"Bearer {aig.TOKEN}"}
    assert len(bench.server.stored) == 4
    assert all("authorization" not in headers for _, headers in bench.server.stored)


def test_nothing_secret_is_logged_or_noted_for_people(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench.server.misbehave("expired")
    bench.run()
    told = caplog.text + repr([vars(record) for record in caplog.records])
    told += "".join(note.partition("\n")[0] for note in bench.notes) + repr(bench.engines)
    for secret in (aig.TOKEN, "SECRET", "X-Signature", "/handed-out/", "/bucket/"):
        assert secret not in told
    assert [note.partition("\n")[0].split()[0] for note in bench.notes] == ["being", "laid", "about", "submitted"]


def test_the_slide_leaves_the_shelf_when_the_outputs_are_here(bench: Bench) -> None:
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending) and len(bench.on_shelf()) == 1
    bench.run(engine)
    assert bench.on_shelf() == []


def test_a_run_is_asked_after_more_and_more_seldom(bench: Bench) -> None:
    bench.server.polls = 1000
    engine = bench.engine(poll_s=30, poll_max_s=300)
    answer = engine.run(bench.task(), lambda: None)
    waits = []
    for _ in range(60):
        assert isinstance(answer, Pending)
        waits.append(answer.poll_after_s)
        bench.clock.move(answer.poll_after_s)
        answer = engine.poll(bench.task(), answer.handle)
    assert waits[0] == 30 and waits[-1] == 300 and waits == sorted(waits)


# --- once only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("die_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("die_at", range(1, 7))
def test_a_process_killed_at_any_step_makes_one_run_and_one_result(bench: Bench, die_at: int, die_after: bool) -> None:
    bench.slide(64)
    bench.die_at, bench.die_after = die_at, die_after
    with suppress(Killed):
        bench.run()
    bench.engines[-1].close()
    bench.clock.move(5)
    result = bench.run(bench.engine())  # another process, the same note
    assert bench.submissions == 1
    assert {type(value) for value in result.values} == {Annotations, SlideLabels, Quantities}
    assert bench.on_shelf() == []


def test_every_note_there_ever_was_leads_to_the_same_run_and_result(bench: Bench) -> None:
    first = bench.run()
    for note in bench.notes[2:]:  # from "about to submit" on
        bench.note = note
        again = bench.run(bench.engine())
        assert said(again) == said(first) and again.provenance == first.provenance
    assert bench.submissions == 1


@pytest.mark.parametrize("what", ["drop", "crash"])
def test_a_lost_answer_is_looked_up_and_never_submitted_twice(bench: Bench, what: str) -> None:
    bench.server.misbehave(what)
    bench.run()
    assert (bench.submissions, bench.server.asked("POST", "/api/v1/runs")) == (1, 1)
    assert bench.server.asked("GET", "/api/v1/runs") == 1


@pytest.mark.parametrize("what", ["drop-before", "busy"])
def test_a_submission_that_never_arrived_is_made_again_after_several_looks(bench: Bench, what: str) -> None:
    bench.server.misbehave(what)
    bench.run(look_ups=3, look_up_s=60)
    assert (bench.submissions, bench.server.asked("POST", "/api/v1/runs")) == (1, 2)
    assert bench.server.asked("GET", "/api/v1/runs") == 3


def test_a_list_that_ignores_the_filter_is_searched_and_one_that_never_ends_stops_the_job(bench: Bench) -> None:
    for number in range(150):
        bench.server.create({"application_id": "he-tme", "custom_metadata": {"node_job": str(number)}})
    bench.server.misbehave("drop")
    bench.server.misbehave("unsearchable", 2)
    bench.run()
    assert bench.submissions == 151
    for number in range(2000):
        bench.server.create({"application_id": "he-tme", "custom_metadata": {"node_job": str(number)}})
    bench.note, before = "", bench.submissions
    bench.server.misbehave("drop-before")
    bench.server.misbehave("unsearchable", 50)
    with pytest.raises(EngineError, match="does not search its runs") as caught:
        bench.run()
    assert not caught.value.retryable and bench.submissions == before


def test_who_lost_the_job_submits_nothing(bench: Bench) -> None:
    def lost(text: str) -> None:
        raise LeaseLost("somebody else does it")

    with pytest.raises(LeaseLost):
        bench.engine().run(replace(bench.task(), remember=lost), lambda: None)
    assert bench.submissions == 0


def test_a_note_that_cannot_be_read_submits_nothing(bench: Bench) -> None:
    bench.note = "submitted as run x\n{not json"
    with pytest.raises(EngineError, match="nothing is submitted again"):
        bench.engine().run(bench.task(), lambda: None)
    assert bench.server.seen == []


def test_a_run_by_hand_finds_its_way_without_notes(bench: Bench) -> None:
    engine, task = bench.engine(), replace(bench.task(job=0), remember=lambda note: None)
    answer = engine.run(task, lambda: None)
    while isinstance(answer, Pending):
        answer = engine.poll(task, answer.handle)
    assert len(answer.values) == 3


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_cancels_its_run_and_takes_the_slide_back(bench: Bench) -> None:
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending)
    engine.cancel(answer.handle)
    (run,) = bench.server.runs.values()
    assert run.reason == "CANCELED_BY_USER" and bench.on_shelf() == []
    engine.cancel(answer.handle)  # 409
    engine.cancel_noted(bench.note)
    bench.server.runs.clear()
    engine.cancel(answer.handle)  # 404


def test_a_run_whose_answer_was_lost_is_found_to_be_cancelled(bench: Bench) -> None:
    bench.server.misbehave("drop")
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending) and answer.handle.startswith("-/")
    engine.cancel(answer.handle)
    (run,) = bench.server.runs.values()
    assert run.reason == "CANCELED_BY_USER"


def test_a_submission_nobody_knows_of_is_looked_for_again_before_it_is_forgotten(bench: Bench) -> None:
    bench.server.misbehave("drop-before")
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending)
    with pytest.raises(EngineUnavailable, match="not known yet"):
        engine.cancel(answer.handle)
    bench.clock.move(601)
    engine.cancel(answer.handle)


def test_a_slide_that_was_only_laid_out_is_taken_back_without_a_call(bench: Bench) -> None:
    bench.die_at, bench.die_after = 1, True
    engine = bench.engine()
    with pytest.raises(Killed):
        engine.run(bench.task(), lambda: None)
    before = len(bench.server.seen)
    engine.cancel_noted(bench.note)
    assert bench.on_shelf() == [] and len(bench.server.seen) == before


# --- how a run ends --------------------------------------------------------------------------------------------------


def test_a_slide_the_platform_cannot_use_is_rejected_with_its_reason(bench: Bench) -> None:
    bench.server.ending = "user-error"
    with pytest.raises(EngineRejected, match=r"USER_ERROR, INPUT\.BAD_SLIDE"):
        bench.run()
    assert bench.on_shelf() == []


@pytest.mark.parametrize("ending", ["system-error", "cancelled"])
def test_a_run_without_outputs_is_final_and_says_why(bench: Bench, ending: str) -> None:
    bench.server.ending = ending
    with pytest.raises(EngineError, match=r"SYSTEM_ERROR|SKIPPED") as caught:
        bench.run()
    assert not caught.value.retryable and not isinstance(caught.value, EngineRejected)


def test_partial_outputs_of_a_cancelled_run_are_taken_and_said(bench: Bench) -> None:
    bench.server.ending = "cancelled-partial"
    result = bench.run()
    assert len(result.values) == 3
    for value in result.values:
        assert any("outputs are partial" in note for note in value.notes)
        assert any("CANCELED_BY_SYSTEM" in note for note in value.notes)
        assert any("cells:parquet was not made" in note for note in value.notes)


def test_a_deleted_run_and_deleted_outputs_are_final(bench: Bench) -> None:
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending)
    bench.server.misbehave("deleted", 4)
    with pytest.raises(EngineError, match="status 410") as caught:
        bench.run(engine)
    assert not caught.value.retryable
    bench.server.runs.clear()
    with pytest.raises(EngineError, match="not there any more") as caught:
        engine.poll(bench.task(), answer.handle)
    assert not caught.value.retryable and bench.on_shelf() == []


def test_one_deleted_output_is_said_and_the_others_are_taken(bench: Bench) -> None:
    bench.server.misbehave("deleted")
    result = bench.run()
    assert {type(value) for value in result.values} == {SlideLabels, Quantities}
    assert any("geojson_polygons is deleted" in note for note in result.values[0].notes)


def test_another_run_in_the_answer_is_not_believed(bench: Bench) -> None:
    bench.server.misbehave("stranger")
    with pytest.raises(EngineError, match="another run"):
        bench.run()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["expired", "expired-400", "checksum", "partial"])
def test_a_url_that_is_over_or_a_broken_file_is_fetched_again(bench: Bench, what: str) -> None:
    bench.server.misbehave(what)
    assert len(bench.run().values) == 3
    assert bench.server.asked("GET", r".*/file") == 5


@pytest.mark.parametrize("what", ["expired", "expired-400", "checksum"])
def test_files_that_stay_broken_wait_and_cost_no_run(bench: Bench, what: str) -> None:
    bench.server.misbehave(what, 3)
    with pytest.raises(EngineUnavailable):
        bench.run()
    bench.server._wrong.clear()
    assert len(bench.run(bench.engine()).values) == 3
    assert bench.submissions == 1


@pytest.mark.parametrize(
    ("name", "kind", "data", "more", "reason"),
    [
        ("a:geojson", "application/geo+json", b'{"type": "FeatureCollection", "features": [{', {}, "cut short"),
        ("b:tiff", "image/tiff", b"II*\x00garbage", {"class_colors": {"x": [1, 2, 3]}}, "cannot be read"),
        ("c:tiff", "image/tiff", aig.tiff(40, 9), {"class_colors": aig.COLOURS}, "does not cover"),
        ("d:tiff", "image/tiff", aig.tiff(32, 32), {"class_colors": {"Tumor": [255, 0, 0]}}, "which is no class"),
        ("e:csv", "text/csv", b"cell,x\n" + b"a,1\n" * 5000, {}, "lines"),
    ],
)
def test_an_output_that_does_not_fit_is_kept_and_the_others_are_taken(
    bench: Bench, name: str, kind: str, data: bytes, more: dict[str, Any], reason: str
) -> None:
    bench.server.outputs = lambda server, run: [
        (name, kind, data, more),
        ("good:csv", "text/csv", b"area [mm2]\n3.5\n", {}),
    ]
    result = bench.run()
    (numbers,) = result.values
    assert isinstance(numbers, Quantities)
    ((kept, why),) = bench.kept
    assert kept.encode("latin-1") == data and reason in why
    assert any(f"output {name} not taken" in note and "quarantine as q1" in note for note in numbers.notes)


def test_a_run_of_which_nothing_can_be_taken_is_an_error_that_names_all(bench: Bench) -> None:
    bench.server.outputs = lambda server, run: [("x:parquet", "application/parquet", b"PAR1", {})]
    with pytest.raises(EngineError, match="x:parquet not taken"):
        bench.run()


def test_only_outputs_that_are_asked_for_are_fetched(bench: Bench) -> None:
    result = bench.run(outputs=["*csv*", "readout_*"])
    assert [type(value) for value in result.values] == [Quantities]
    assert len(bench.server.stored) == 1


def test_an_output_beyond_the_bound_is_not_taken(bench: Bench) -> None:
    bench.server.outputs = lambda server, run: [
        ("big:csv", "text/csv", b"x" * 5000, {}),
        ("good:csv", "text/csv", b"area [mm2]\n3.5\n", {}),
    ]
    result = bench.run(max_download_bytes=1000)
    assert any("big:csv could not be fetched" in note for note in result.values[0].notes)


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_outputs_are_deleted_there_once_they_lie_here_and_a_crash_then_loses_nothing(bench: Bench) -> None:
    first = bench.run(delete_after_fetch=True)
    assert bench.server.asked("DELETE", r".*/artifacts") == 1
    again = bench.run(bench.engine(delete_after_fetch=True))  # killed before the job was finished
    assert said(again) == said(first)
    assert len(bench.server.stored) == 4


def test_outputs_kept_for_jobs_long_over_are_swept(bench: Bench) -> None:
    bench.run(delete_after_fetch=True)
    outputs = bench.folder / "data" / "engine_outputs"
    (kept,) = outputs.iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    bench.clock.at = datetime.now(UTC)
    bench.clock.move(31 * 86400)
    bench.note = ""
    bench.run(bench.engine())
    assert list(outputs.iterdir()) == []


def test_custom_metadata_is_added_to_and_read_again_once_when_somebody_was_faster(bench: Bench) -> None:
    bench.server.misbehave("stale")
    bench.run(tell_fetched=True)
    (run,) = bench.server.runs.values()
    assert run.metadata["node_state"] == "fetched" and run.metadata["other"] == "somebody was faster"
    assert run.metadata["node_job"] and bench.server.asked("PUT", r".*/custom-metadata") == 2


def test_what_can_be_left_undone_costs_no_result(bench: Bench) -> None:
    bench.server.misbehave("stale", 2)
    assert len(bench.run(tell_fetched=True).values) == 3


# --- refusals before anything leaves ---------------------------------------------------------------------------------


def test_what_nobody_says_is_named_with_its_choices_before_anything_leaves(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"engines\.aig\.options\.metadata\.specimen\.disease.*LUNG_CANCER, BREAST"):
        bench.run(metadata={})
    with pytest.raises(ConfigError, match=r"options\.metadata\.specimen\.tissue: .*LUNG, BREAST, LIVER"):
        bench.run(metadata={"specimen": {"disease": "LUNG_CANCER", "tissue": "HEART"}})
    with pytest.raises(ConfigError, match=r"options\.metadata\.colour: this version does not take it"):
        bench.run(metadata={"specimen": SPECIMEN, "colour": "red"})
    with pytest.raises(ConfigError, match=r"options\.metadata\.width_px: the slide says it"):
        bench.run(metadata={"specimen": SPECIMEN, "width_px": 5})
    assert (bench.submissions, bench.on_shelf(), bench.notes) == (0, [], [])


def test_a_slide_that_does_not_suit_the_application_stays_here(bench: Bench) -> None:
    bench.images = (write_sm(bench.folder / "coarse.dcm", size=64, mpp=2.0),)
    with pytest.raises(SeriesRejected, match=r"resolution_mpp .* 2 is more than 0\.5"):
        bench.run()
    pas = specimen(("1", "Schiff"))
    bench.images = (write_sm(bench.folder / "pas.dcm", size=64, SpecimenDescriptionSequence=[pas]),)
    with pytest.raises(SeriesRejected, match="hematoxylin"):
        bench.run()
    with pytest.raises(SeriesRejected, match="another stain than H&E"):
        bench.run(metadata={"specimen": SPECIMEN, "staining_method": "H&E"})
    assert bench.submissions == 0


def test_a_stain_nobody_says_must_be_configured(bench: Bench) -> None:
    bench.images = (write_sm(bench.folder / "x.dcm", SpecimenDescriptionSequence=[]),)
    with pytest.raises(ConfigError, match=r"options\.metadata\.staining_method: .*\(H&E\)"):
        bench.run()
    bench.run(metadata={"specimen": SPECIMEN, "staining_method": "H&E"})
    assert bench.metadata["staining_method"] == "H&E"


def test_a_format_the_version_does_not_take_is_refused(bench: Bench) -> None:
    bench.server.schema["properties"]["media-type"]["enum"] = ["image/tiff"]
    with pytest.raises(SeriesRejected, match="does not take slides as application/dicom"):
        bench.run()


def test_a_version_or_application_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"no application 'he-tme' in version '9\.9\.9'"):
        bench.run(version="9.9.9")
    bench.server.inputs = ("slide", "mask")
    with pytest.raises(ConfigError, match=r"options\.input_artifact: expected which of slide, mask"):
        bench.run()
    bench.run(input_artifact="slide")
    assert bench.request["items"][0]["input_artifacts"][0]["name"] == "slide"


def test_a_slide_larger_than_allowed_is_refused(bench: Bench) -> None:
    with pytest.raises(SeriesRejected, match="max_slide_bytes"):
        bench.run(max_slide_bytes=1000)


def test_a_slide_that_cannot_be_written_leaves_nothing_on_the_shelf(bench: Bench) -> None:
    (image,) = bench.slide(64)
    bench.images = (replace(image, transfer_syntax_uid="1.2.3.4"),)
    with pytest.raises(EngineRejected, match="transfer syntax"):
        bench.run(send_identifiable=True)
    assert bench.on_shelf() == [] and bench.submissions == 0


def test_a_refused_request_names_the_place_and_quotes_nothing(bench: Bench) -> None:
    bench.server.misbehave("invalid")
    with pytest.raises(EngineRejected, match=r"status 422; body\.items\.0: value_error") as caught:
        bench.run()
    assert "Doe" not in str(caught.value)
    assert bench.on_shelf() == []


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_a_used_up_quota_is_an_outage_with_an_alarm_until_it_works_again(bench: Bench) -> None:
    bench.server.misbehave("quota")
    engine = bench.engine()
    with pytest.raises(EngineUnavailable, match="quota is used up"):
        bench.run(engine)
    assert "quota" in engine.trouble
    bench.run(engine)
    assert engine.trouble == ""
    assert bench.submissions == 1 and bench.server.asked("GET", "/api/v1/runs") == 0  # 402 is a clear answer


@pytest.mark.parametrize("what", ["sick", "garbage", "mute"])
def test_a_platform_that_cannot_tell_how_far_it_is_costs_no_run_and_no_attempt(bench: Bench, what: str) -> None:
    engine = bench.engine()
    answer = engine.run(bench.task(), lambda: None)
    assert isinstance(answer, Pending)
    bench.server.misbehave(what)
    hasty = bench.engine(retries=0, read_timeout_s=0.3, clock=SystemClock())
    with pytest.raises(EngineUnavailable) as caught:
        hasty.poll(bench.task(), answer.handle)
    assert not isinstance(caught.value, EngineCrashed)
    assert len(bench.run(engine).values) == 3 and bench.submissions == 1


def test_a_refused_token_is_an_outage_and_trouble(bench: Bench) -> None:
    bench.server.misbehave("unauthorized", 3)
    engine = bench.engine()
    with pytest.raises(EngineUnavailable):
        bench.run(engine)
    assert "refuses the credentials (status 401)" in engine.trouble


def test_a_token_file_being_exchanged_costs_no_job(bench: Bench) -> None:
    engine = bench.engine()
    (bench.folder / "token").unlink()
    with pytest.raises(ConfigError):
        engine.check()
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        engine.run(bench.task(), lambda: None)


def test_tokens_are_had_with_a_refresh_token(bench: Bench, server: Any) -> None:
    body = json.dumps({"access_token": aig.TOKEN, "token_type": "Bearer", "expires_in": 3600}).encode()
    server.on("POST", "/oauth/token", server.answer(200, body))
    refresh = bench.folder / "refresh"
    refresh.write_text("a-refresh-token")
    auth = {"token_url": f"{server.url}/oauth/token", "client_id": "node", "refresh_token": f"file:{refresh}"}
    engine = bench.engine(token=None, auth={**auth, "body": "form"})
    bench.run(engine)
    assert engine.gauges()["token_expires_seconds"] > 0
    assert len(server.received) == 1 and b"grant_type=refresh_token" in server.received[0].body


def test_the_report_says_what_is_offered_wanted_and_missing(bench: Bench) -> None:
    engine = bench.engine()
    engine.check()
    told = dict(engine.report())
    assert told["applications"] == "he-tme" and told["version"] == "he-tme 1.0.0"
    assert told["takes"] == "input_slide: application/dicom, application/zip"
    assert "specimen" in told["wants to know"] and told["fetched from"] == "127.0.0.1"
    assert not bench.server.asked("GET", "/api/v1/me")  # its answer holds live secrets of the organization
    assert aig.TOKEN not in json.dumps(told)


def test_options_are_checked_by_name(bench: Bench) -> None:
    for key, value, says in [
        ("token", "ey.secret", "never the value|must not be given"),
        ("version", None, "required|missing"),
        ("link_days", 5, "greater than or equal to 6"),
        ("public_url", "node:80", "expected https"),
        ("keys", {"a": "colour"}, "width"),
        ("applications", "x", "unknown key"),
    ]:
        with pytest.raises(ConfigError, match=rf"engines\.aig\.options\.{key}.*({says})".replace(" ", ".*")):
            bench.engine(**{key: value} if value is not None else {key: None})
    with pytest.raises(ConfigError, match=r"engines\.aig\.model"):
        bench.engine(model="")
    with pytest.raises(ConfigError, match="one of auth"):
        bench.engine(token=None)
    with pytest.raises(ConfigError, match=r"options\.public_url: missing"):
        bench.engine(public_url=None).check()


def test_the_nodes_own_links_are_used_where_it_gives_them(bench: Bench) -> None:
    settings = EngineSettings(kind="aignostics", model="he-tme", options=bench.options(public_url=None))
    links = shelf_and_signer(bench.folder / "data", bench.clock, base_url=bench.links_url)
    engine = AignosticsEngine("aig", settings, data_dir=bench.folder / "data", links=links, clock=bench.clock)
    bench.engines.append(engine)
    assert len(bench.run(engine).values) == 3


# --- from rule to results --------------------------------------------------------------------------------------------


def test_the_example_rule_sends_slides_and_their_results_can_be_written(bench: Bench, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "aignostics.yaml").write_bytes((ROOT / "routing_rules" / "examples" / "aignostics.yaml").read_bytes())
    loaded = load_rules(rules, engines={"aignostics"}, destinations={"PACS"})

    def jobs(*images: StoredInstance) -> list[Any]:
        view = SeriesView(
            study_instance_uid=STUDY,
            revision=1,
            header=read_series_header(images),
            source=Source(calling_ae_title="SCANNER", called_ae_title="DICOM_NODE", address="127.0.0.1"),
            origins=frozenset({Origin.RECEIVED}),
            study_series_count=1,
            study_instance_count=1,
            study_modalities=("SM",),
            received_at=datetime(2026, 3, 1, tzinfo=UTC),
        )
        return list(loaded.evaluate(view, now=view.received_at, destination_of={"SCANNER": "PACS"}.get).jobs)

    label = write_sm(tmp_path / "label.dcm", kind="LABEL")
    (job,) = jobs(label, *bench.slide(64))
    assert (job.engine, job.results, job.destinations) == ("aignostics", ("ann", "seg", "sr"), ("PACS",))
    assert jobs(label) == []
    result = bench.run()
    context = result_context(
        result.provenance,
        series_instance_uid=SERIES,
        input_digest="d",
        rule=job.rule,
        run="1",
        run_number=1,
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        time_zone="+0000",
        node_name="DICOM_NODE",
    )
    encoders = [encoder_class(kind)() for kind in ("seg", "ann", "sr")]
    written = encoded(result, bench.task(), context, encoders=encoders, kinds=job.results, heartbeat=lambda: None)
    assert sorted(str(ds.Modality) for ds in written) == ["ANN", "SEG", "SR"]
    assert {str(ds.PatientName) for ds in written} == {NAME}


def test_a_node_killed_while_it_submits_makes_one_run_and_keeps_one_set_of_results(
    *,
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    rules, images = tmp_path / "rules", tmp_path / "images"
    for folder in (rules, images):
        folder.mkdir()
    (rules / "aignostics.yaml").write_bytes((ROOT / "routing_rules" / "examples" / "aignostics.yaml").read_bytes())
    slide = [write_sm(images / f"{size}.dcm", size=size, mpp=16 / size) for size in (64, 32)]
    (tmp_path / "token").write_text(aig.TOKEN)
    data_dir = tmp_path / "node" / "data"
    with aig.Aignostics(polls=2) as server, node_port(data_dir, SystemClock()) as links_url:
        options = {
            "base_url": server.url,
            "version": "1.0.0",
            "token": f"file:{tmp_path / 'token'}",
            "public_url": links_url,
            "allow_hosts": [f"127.0.0.1:{server.store_port}"],
            "metadata": {"specimen": SPECIMEN},
            **{"poll_s": 0.2, "look_up_s": 1.0},
        }
        node = running_node(
            rules_dir=str(rules),
            engines={"aignostics": {"kind": "aignostics", "model": "he-tme", "options": options}},
            destinations={"SCANNER": {"ae_title": "SCANNER", "host": "127.0.0.1", "port": free_port()}},
            completion={"quiet_s": 0.5},
            jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
        )
        server.misbehave("slow")  # the run is made, the answer does not come
        storescu = [tool("storescu"), "-R", "-aet", "SCANNER", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
        subprocess.run([*storescu, *(image.path for image in slide)], check=True, capture_output=True, timeout=60)
        wait_for(lambda: server.runs, 40, f"the submission; log:\n{node.tail()}")
        os.kill(node.pid("work"), signal.SIGKILL)
        database = closing(open_catalog(data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0)))
        with database as ours:

            def state() -> list[JobState]:
                return [job.state for job in ours.queue.jobs(study_instance_uid=STUDY)]

            wait_for(lambda: state() == [JobState.DONE], 60, f"the job; log:\n{node.tail()}")
            kept = [one.modality for one in ours.index.instances(Level.STUDY, {"StudyInstanceUID": [STUDY]})]
            timeline = "\n".join(event.text for event in ours.queue.timeline(STUDY))
    assert server.asked("POST", "/api/v1/runs") == 1
    (run,) = server.runs.values()
    assert sorted(kept) == ["ANN", "SEG", "SM", "SM", "SR"]
    assert f"submitted as run {run.id}" in timeline
    assert "SECRET" not in timeline + node.log.read_text() and aig.TOKEN not in node.log.read_text()
    assert shelf_and_signer(data_dir, SystemClock())[0].jobs() == []


def test_the_server_runs_by_hand() -> None:
    command = [sys.executable, "-m", "tests.engines.servers.aignostics", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            process.stdout.readline()
            assert process.stdout.readline().strip() == aig.TOKEN
            import urllib.request

            asked = urllib.request.Request(
                f"{url}/api/v1/applications", headers={"Authorization": f"Bearer {aig.TOKEN}"}
            )
            with urllib.request.urlopen(asked, timeout=10) as answer:
                assert json.load(answer)[0]["application_id"] == "he-tme"
        finally:
            process.terminate()
            process.wait(10)
