"""A series to an AE and its answer back, over real sockets both ways: matched, looped, mapped, killed, tried again."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from dicom_node import wiring
from dicom_node.config import JobSettings, NodeConfig
from dicom_node.dimse.server import DicomServer
from dicom_node.engines._dicom_options import dicom_options
from dicom_node.engines.dicom_engine import DicomEngine
from dicom_node.errors import ConfigError, EngineRejected, EngineTimeout, EngineUnavailable
from dicom_node.interfaces import RoutedSeries
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    CloseTrigger,
    EngineTask,
    Job,
    JobState,
    Key,
    LatePolicy,
    Level,
    MatchKind,
    Origin,
    PlannedJob,
    Priority,
    Query,
    SendWhat,
    SeriesView,
    Source,
    StoredInstance,
    Verdict,
)
from dicom_node.pipeline.external import recorder
from dicom_node.pipeline.fsck import fsck
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.observe import Unobserved
from dicom_node.pipeline.work import Worker
from dicom_node.routing.load import load_rules
from dicom_node.values import Pending, ReturnedInstances

ROOT = Path(__file__).resolve().parents[2]
STUDY, SERIES, FRAME, PATIENT = "1.2.826.0.1.77", "1.2.826.0.1.77.1", "1.2.826.0.1.77.9", "SECRET-7"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def _server_module() -> ModuleType:
    name = "contract_server_dicom_engine"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "servers" / "dicom_engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SERVERS = _server_module()


@pytest.fixture(scope="module")
def listening() -> Iterator[Any]:
    with SERVERS.DicomEngineServer() as server:
        yield server


@pytest.fixture
def box(listening: Any) -> Any:
    """The AE, which has received nothing yet and behaves."""
    listening.forget()
    return listening


def _image(number: int, *, series: str = SERIES, **attributes: Any) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{series}.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, series, FRAME
    ds.Modality, ds.PatientID, ds.PatientName, ds.AccessionNumber = "CT", PATIENT, "Doe^Jane", "ACC-1"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.PatientBirthDate, ds.PatientSex = "20260102", "", "", "", "F"
    ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], number
    ds.Rows = ds.Columns = 4
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [1, 1]
    ds.PixelData = bytes([number]) * 32
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


@dataclass
class Line:
    """A node's receiving half on a port, its catalog, and one worker that does jobs when it is told to."""

    config: NodeConfig
    catalog: Any
    ingest: Any
    engines: dict[str, Any]
    worker: Worker
    clock: Any

    @property
    def queue(self) -> Any:
        return self.catalog.queue

    @property
    def engine(self) -> DicomEngine:
        found: DicomEngine = self.engines["ai-box"]
        return found

    def receive(self, images: Sequence[Dataset], calling: str = "CT1") -> None:
        for ds in images:
            path = self.config.data_dir / "incoming.dcm"
            ds.save_as(path, enforce_file_format=True)
            with path.open("rb") as file:
                file.seek(140)
                file.seek(144 + int.from_bytes(file.read(4), "little"))
                body = file.read()
            result = self.ingest.accept(
                sop_class_uid=str(ds.SOPClassUID),
                sop_instance_uid=str(ds.SOPInstanceUID),
                transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
                fragments=[body],
                source=Source(calling_ae_title=calling, called_ae_title="DICOM_NODE", address="127.0.0.1"),
            )
            assert result.status == 0, result

    def job(
        self, *, series: str = SERIES, engine: str = "ai-box", rule: str = "box", images: int = 3, **more: Any
    ) -> int:
        """Images come and a rule asks for a job on them."""
        self.receive([_image(number, series=series, **more) for number in range(1, images + 1)])
        return self.route(PlannedJob(
            rule=rule, series_instance_uid=series, engine=engine, priority=Priority.ROUTINE, results=("seg", "sr"),
            destinations=("PACS", "BOX"), send_what=SendWhat.RESULTS, late_instances=LatePolicy.RERUN,
        ))[0]  # fmt: skip

    def route(self, *plans: PlannedJob) -> list[int]:
        series = plans[0].series_instance_uid
        activity = next(one for one in self.queue.open_studies() if series in one.pending_series)
        header = read_series_header(self.queue.series_instances(STUDY, series))
        verdicts = tuple(
            Verdict(rule=plan.rule, series_instance_uid=series, matched=True, reason="", conditions=())
            for plan in plans
        )
        routed = RoutedSeries(series_instance_uid=series, header=header, verdicts=verdicts, jobs=plans)
        return list(self.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest"))

    def work(self, seconds: float = 0.0) -> None:
        """Let time pass, then do every job that is due once."""
        self.clock.move(seconds)
        for _ in range(8):
            if not self.worker.run_once("worker"):
                return

    def at(self, job: int) -> Job:
        found: Job = self.queue.job(job)
        return found

    def results(self, job: int) -> list[StoredInstance]:
        return list(self.queue.job_results(job))

    def told(self, study: str = STUDY) -> str:
        return "\n".join(event.text for event in self.queue.timeline(study))

    def task(self, job: int) -> EngineTask:
        """The task of a job, leased, for calling the engine by hand."""
        leased = self.queue.lease_job("by hand", 1e6)
        assert leased is not None and leased.id == job
        task: EngineTask = self.worker._task(leased, 60.0)
        return task


@pytest.fixture
def line(box: Any, moved_clock: Any, tmp_path: Path) -> Iterator[Callable[..., Line]]:
    """`line(host="127.0.0.1", peers=..., **options)`: a node with the engine `ai-box`, and what came back so far."""
    with ExitStack() as stack:

        def start(*, more_engines: Any = None, peers: Any = None, data: str = "data", **options: Any) -> Line:
            block = {"ae_title": box.title, "host": "127.0.0.1", "port": box.port, "quiet_s": 10.0, **options}
            config = NodeConfig.model_validate(
                {
                    "dicom_port": 0,
                    "data_dir": tmp_path / data,
                    "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
                    "engines": {"ai-box": {"kind": "dicom", "options": block}, **(more_engines or {})},
                    "destinations": {
                        "PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": 4},
                        "BOX": {"ae_title": box.title, "host": block["host"], "port": box.port},
                    },
                    "peers": peers or {},
                    "jobs": {"backoff_s": 1.0, "backoff_max_s": 1.0},
                }
            )
            catalog = wiring.node_catalog(config, moved_clock)
            stack.callback(catalog.close)
            ingest = wiring.node_ingest(catalog, config, moved_clock)
            server = DicomServer(config, sink=ingest, index=catalog.index, associations=catalog.index)
            port = server.start()
            stack.callback(server.stop, 2.0)
            box.node = ("127.0.0.1", port, "DICOM_NODE")
            engines = wiring.engines(config, returns=catalog.queue)
            for engine in engines.values():
                engine._clock = moved_clock
            worker = Worker(
                catalog.queue,
                engines=engines,
                timeouts_s=dict.fromkeys(engines, 60.0),
                encoders=wiring.encoders(),
                stage=ingest.stage,
                read_header=read_series_header,
                settings=JobSettings(backoff_s=1.0, backoff_max_s=1.0),
                node_name="DICOM_NODE",
                time_zone="+0000",
                clock=moved_clock,
                observer=Unobserved(),
                jitter=lambda: 0.5,
                keep=catalog.quarantine.keep,
            )
            return Line(config, catalog, ingest, engines, worker, moved_clock)

        yield start


# --- there and back --------------------------------------------------------------------------------------------------


def test_what_it_answers_with_becomes_the_results_and_is_delivered_as_it_came(
    line: Callable[..., Line], box: Any
) -> None:
    node = line()
    job = node.job()
    node.work()
    assert node.at(job).state is JobState.WAITING
    assert sorted(box.uids()) == sorted(f"{SERIES}.{number}" for number in (1, 2, 3))
    assert box.answer("sr", "seg") == [0, 0]
    node.work(6.0)
    assert node.at(job).state is JobState.WAITING, "its quiet time is not over"
    node.work(6.0)
    assert node.at(job).state is JobState.DONE, node.at(job).error
    results = node.results(job)
    assert [one.modality for one in results] == ["SEG", "SR"]  # an SR refers to what stands before it
    assert {one.origin for one in results} == {Origin.RETURNED}
    sha256 = {one.sop_instance_uid: one.sha256 for one in results}
    (delivery,) = node.queue.deliveries(study_instance_uid=STUDY)
    assert delivery.destination == "PACS", "no result goes back to the engine it is from"
    assert {item.instance.sop_instance_uid: item.instance.sha256 for item in delivery.items} == sha256
    assert "2 objects (SEG, SR) came back from AI_BOX: results of job 1" in node.told().replace("SR, SEG", "SEG, SR")
    assert "3 images sent; its answer is waited for" in node.told()
    assert node.queue.snapshot()["returned"] == {"taken": 2, "untaken": 0}


def test_nothing_that_came_back_opens_its_study_or_is_routed(line: Callable[..., Line], box: Any) -> None:
    node = line(unreferenced="take")
    node.job()
    node.work()
    box.answer("derived", "seg")
    assert not node.queue.open_studies()
    view = node.queue.series_view(
        STUDY,
        next(one.series_instance_uid for one in node.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [STUDY]})
             if one.origin is Origin.RETURNED),
        read_series_header(node.queue.series_instances(STUDY, SERIES)),
    )  # fmt: skip
    assert view.origins == frozenset({Origin.RETURNED})


def test_with_a_count_no_time_is_waited_after_the_last(line: Callable[..., Line], box: Any) -> None:
    node = line(count=2)
    job = node.job()
    node.work()
    box.answer("seg")
    node.work(60.0)
    assert node.at(job).state is JobState.WAITING
    box.answer("derived")
    node.work(60.0)
    assert node.at(job).state is JobState.DONE
    assert len(node.results(job)) == 4


def test_only_expected_objects_are_its_answer(line: Callable[..., Line], box: Any) -> None:
    node = line(modalities=["SEG"], sop_classes=[SERVERS.SEG])
    job = node.job()
    node.work()
    box.answer("seg", "sr")
    node.work(30.0)
    assert [one.modality for one in node.results(job)] == ["SEG"]
    assert "of no job so far; they are kept" in node.told()
    assert node.queue.snapshot()["returned"] == {"taken": 1, "untaken": 1}


def test_an_object_on_the_answer_belongs_to_it(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    node.work()
    box.answer("seg", "sr-on-seg")
    node.work(30.0)
    assert [one.modality for one in node.results(job)] == ["SEG", "SR"]


@pytest.mark.parametrize(
    ("word", "options", "taken"),
    [
        ("frame", {}, True),
        ("derived", {}, True),
        ("capture", {}, False),
        ("capture", {"unreferenced": "take"}, True),
        ("foreign", {"unreferenced": "take"}, False),
        ("stray", {"unreferenced": "take"}, False),
    ],
)
def test_an_answer_is_known_by_what_it_refers_to(
    line: Callable[..., Line], box: Any, word: str, options: dict[str, Any], taken: bool
) -> None:
    node = line(**options)
    job = node.job()
    node.work()
    box.answer(word)
    node.work(30.0)
    assert node.at(job).state is (JobState.DONE if taken else JobState.WAITING)


def test_what_came_before_the_sending_or_from_another_ae_is_no_answer(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    box.answer("seg", images=[_image(number) for number in (1, 2, 3)])
    node.work()
    node.work(30.0)
    assert node.at(job).state is JobState.WAITING
    box.title = "OTHER"
    box.answer("seg")
    node.work(30.0)
    assert node.at(job).state is JobState.WAITING


def test_the_first_whole_answer_is_taken_and_later_ones_are_listed(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    node.work()
    box.answer("seg")
    node.work(30.0)
    first = [one.sop_instance_uid for one in node.results(job)]
    box.answer("seg")
    node.work(30.0)
    assert [one.sop_instance_uid for one in node.results(job)] == first
    assert "1 objects (SEG) came back from AI_BOX: of no job so far" in node.told()
    assert len(node.queue.jobs(study_instance_uid=STUDY)) == 1


def test_the_same_answer_sent_twice_is_one_and_starts_the_quiet_time_anew(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    node.work()
    (seg,) = box._make("seg", box.received, [])
    box.send([seg])
    node.clock.move(9.0)
    box.send([seg])
    node.work(6.0)
    assert node.at(job).state is JobState.WAITING
    node.work(6.0)
    assert [one.sop_instance_uid for one in node.results(job)] == [str(seg.SOPInstanceUID)]


def test_an_answer_is_not_whole_while_more_is_on_its_way(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    node.work()
    box.answer("seg")
    source = Source(calling_ae_title="AI_BOX", called_ae_title="DICOM_NODE", address="127.0.0.1")
    node.catalog.index.open_association("large", source)
    for _ in range(3):
        node.clock.move(10.0)
        node.catalog.index.touch_associations(["large"])
        node.work(1.0)
        assert node.at(job).state is JobState.WAITING
    node.catalog.index.end_association("large", AssociationEnd.RELEASED)
    node.work(10.0)
    assert node.at(job).state is JobState.DONE


# --- whose answer it is ----------------------------------------------------------------------------------------------


def test_two_jobs_of_one_study_each_get_their_own(line: Callable[..., Line], box: Any) -> None:
    node = line()
    one = node.job()
    other = node.job(series=f"{STUDY}.2")
    node.work()
    by_series = {uid: [ds for ds in box.received if str(ds.SeriesInstanceUID) == uid] for uid in (SERIES, f"{STUDY}.2")}
    box.answer("seg", images=by_series[f"{STUDY}.2"])
    box.answer("seg", "sr", images=by_series[SERIES])
    node.work(30.0)
    assert [len(node.results(job)) for job in (one, other)] == [2, 1]


def test_what_fits_two_jobs_is_taken_by_neither_and_said(line: Callable[..., Line], box: Any) -> None:
    node = line(answer_within_s=100.0)
    one = node.job()
    other = node.job(series=f"{STUDY}.2")
    node.work()
    box.answer("frame")
    node.work(30.0)
    node.work(30.0)
    assert [node.at(job).state for job in (one, other)] == [JobState.WAITING] * 2
    line_of_it = f"1 objects came back that fit job {other} as well: taken by neither, kept"
    assert node.told().count(line_of_it) == 1
    node.work(60.0)
    assert node.at(one).state is JobState.FAILED
    assert "0 objects came back within 100 s of the sending; 1 more fit other jobs as well" in node.at(one).error


def test_two_engines_behind_one_ae_title_know_of_each_other(line: Callable[..., Line], box: Any) -> None:
    options = {"ae_title": box.title, "host": "127.0.0.1", "port": box.port}
    node = line(more_engines={"second": {"kind": "dicom", "options": options}})
    node.receive([_image(number) for number in (1, 2, 3)])
    plans = [
        PlannedJob(
            rule=engine, series_instance_uid=SERIES, engine=engine, priority=Priority.ROUTINE, results=("seg",),
            destinations=(), send_what=SendWhat.RESULTS, late_instances=LatePolicy.RERUN,
        )
        for engine in ("ai-box", "second")
    ]  # fmt: skip
    jobs = node.route(*plans)
    node.work()
    box.answer("seg")
    node.work(40.0)
    assert [node.at(job).state for job in jobs] == [JobState.WAITING] * 2
    node.queue.cancel_job(jobs[1])
    node.work(90.0)
    assert node.at(jobs[0]).state is JobState.DONE


def test_an_answer_about_another_patient_fails_the_job_and_is_kept(line: Callable[..., Line], box: Any) -> None:
    node = line()
    job = node.job()
    node.work()
    box.answer("other-patient")
    node.work(30.0)
    assert node.at(job).state is JobState.FAILED
    assert "names another patient" in node.at(job).error and "in the quarantine as job-" in node.at(job).error
    assert "SOMEBODY" not in node.at(job).error
    (kept,) = node.catalog.quarantine.listed()
    assert kept.engine == "ai-box"


# --- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["echo", "derived-in-series"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_engine_that_sends_the_images_back_is_rejected(
    line: Callable[..., Line], box: Any, word: str, host: str
) -> None:
    node = line(host=host)
    job = node.job()
    node.work()
    box.answer(word, "seg")
    node.work(30.0)
    assert node.at(job).state is JobState.REJECTED
    assert "sent 3 of the node's own images back" in node.at(job).error
    assert not node.queue.open_studies()
    if word == "echo" and host == "127.0.0.1":
        assert "they are images the node has, and no result" in node.told()


def test_an_altered_image_never_takes_the_place_of_the_original(line: Callable[..., Line], box: Any) -> None:
    node = line(peers={
        "ai": {"ae_title": "AI_BOX", "is_engine": True, "conflict_policy": "replace"},
        "ct": {"ae_title": "CT1"},
    })  # fmt: skip
    node.job()
    before = node.catalog.index.instance(f"{SERIES}.1")
    altered = _image(1, PixelData=b"\7" * 32)
    assert box.send([altered]) == [0]
    assert node.catalog.index.instance(f"{SERIES}.1") == before
    assert [variant.kind.value for variant in node.catalog.index.variants(f"{SERIES}.1")] == ["variant"]


def test_what_it_returns_is_never_taken_for_an_image_even_without_peers(line: Callable[..., Line], box: Any) -> None:
    node = line(returns_from=["GW1"])
    job = node.job()
    node.work()
    box.title = "GW1"
    box.answer("derived")
    assert not node.queue.open_studies()
    node.work(30.0)
    assert len(node.results(job)) == 3


def test_made_by_an_engine_is_never_sent(line: Callable[..., Line], box: Any) -> None:
    node = line()
    task = node.task(node.job())
    made = [replace(one, origin=Origin.RETURNED) for one in task.instances]
    with pytest.raises(EngineRejected, match="made by the node or by an engine"):
        node.engine.run(replace(task, instances=tuple(made)), lambda: None)
    node.engine.run(replace(task, instances=(*made[:2], task.instances[2])), lambda: None)
    assert len(box.received) == 1


# --- another machine: nothing that names the patient -----------------------------------------------------------------


def test_another_machine_sees_no_patient_and_its_answer_is_mapped_back(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")  # reaches this machine, and is none of the names of loopback
    job = node.job()
    node.work()
    seen = "\n".join(str(ds) for ds in box.received)
    for secret in ("Doe", PATIENT, "ACC-1", STUDY, "20260102"):
        assert secret not in seen
    assert sorted(ds.PixelData for ds in box.received) == [bytes([number]) * 32 for number in (1, 2, 3)]
    sent_study = str(box.received[0].StudyInstanceUID)
    assert box.answer("seg", "sr", "capture") == [0, 0, 0]
    _no_study(node, sent_study)
    node.work(30.0)
    assert node.at(job).state is JobState.DONE, node.at(job).error
    results = node.results(job)
    assert [one.modality for one in results] == ["SEG", "OT", "SR"]
    for one in results:
        ds = pydicom.dcmread(one.path)
        assert (ds.StudyInstanceUID, ds.PatientID, ds.PatientName, ds.AccessionNumber) == (
            *(STUDY, PATIENT, "Doe^Jane", "ACC-1"),
        )
    seg = pydicom.dcmread(results[0].path)
    assert (seg.FrameOfReferenceUID, seg.ReferencedSeriesSequence[0].SeriesInstanceUID) == (FRAME, SERIES)
    referred = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {f"{SERIES}.{number}" for number in (1, 2, 3)}
    assert seg.PixelData == b"\1\2\3\4"
    _no_study(node, sent_study)
    assert "3 objects" in node.told() and "results of job" in node.told()
    assert f"there {sent_study}" in node.told(), "what it was called there is on record"
    assert node.queue.snapshot()["returned"] == {"taken": 3, "untaken": 0}
    (delivery,) = node.queue.deliveries(study_instance_uid=STUDY)
    assert [item.instance.sha256 for item in delivery.items] == [one.sha256 for one in results]


def _no_study(node: Line, pseudonym: str) -> None:
    """No user finds a patient who does not exist, and nothing was lost."""
    found = node.catalog.index.find(Query(level=Level.STUDY, keys=(), returns=("StudyInstanceUID", "PatientID")))
    assert [match.attributes["StudyInstanceUID"] for match in found] == [STUDY]
    assert not list(node.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [pseudonym]}))
    patients = Query(
        level=Level.PATIENT, keys=(Key(keyword="PatientID", kind=MatchKind.WILDCARD, values=("JOB-*",)),), returns=()
    )
    assert not list(node.catalog.index.find(patients))
    assert node.queue.snapshot()["studies"]["total"] == 1
    assert node.queue.snapshot()["variants"]["set-aside"] == 3


def test_what_is_set_aside_is_in_order_for_fsck_and_survives_the_loss_of_the_catalog(
    line: Callable[..., Line], box: Any
) -> None:
    node = line(host="0.0.0.0")
    node.job()
    node.work()
    box.answer("seg", "sr", "capture")
    whole = {"rebuild": True, "verify_hashes": True, "clock": node.clock}
    report = fsck(node.catalog, **whole)
    assert report.clean and not report.indexed
    with node.catalog.database.read() as connection:
        (location,) = connection.execute("SELECT min(location) FROM variant").fetchone()
    node.catalog.database.write(lambda connection: connection.execute("DELETE FROM variant"))
    assert len(fsck(node.catalog, **whole).indexed) == 3
    assert fsck(node.catalog, **whole).clean
    _no_study(node, str(box.received[0].StudyInstanceUID))
    Path(node.catalog.archive.path(location)).unlink()
    assert len(fsck(node.catalog, **whole).missing_variants) == 1


def test_an_answer_in_implicit_vr_is_mapped_back_too(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    job = node.job()
    node.work()
    (image, *_) = box._make("derived", box.received[:1], [])
    image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    node.receive([image], calling="AI_BOX")
    node.work(30.0)
    assert node.at(job).state is JobState.DONE, node.at(job).error
    copy = pydicom.dcmread(node.results(job)[0].path)
    assert copy.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert (copy.PatientID, bytes(copy.PixelData)) == (PATIENT, box.received[0].PixelData)


def test_what_refers_to_images_that_were_never_sent_is_quarantined(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    job = node.job()
    node.work()
    (seg,) = box._make("seg", box.received, [])
    seg.FrameOfReferenceUID = generate_uid()
    box.send([seg])
    node.work(30.0)
    assert node.at(job).state is JobState.FAILED
    assert "FrameOfReferenceUID was never handed out" in node.at(job).error
    assert len(node.catalog.quarantine.listed()) == 1


def test_an_object_of_a_job_under_a_study_of_its_own_is_set_aside_as_well(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    job = node.job()
    node.work()
    box.answer("stray")
    assert node.queue.snapshot()["studies"]["total"] == 1
    node.work(30.0)
    assert node.at(job).state is JobState.WAITING


def test_answers_too_large_to_map_are_refused(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0", max_copied_bytes=100)
    job = node.job()
    node.work()
    box.answer("seg")
    node.work(30.0)
    assert node.at(job).state is JobState.REJECTED and "max_copied_bytes" in node.at(job).error


def test_an_answer_of_too_many_objects_is_refused(line: Callable[..., Line], box: Any) -> None:
    node = line(max_objects=2)
    job = node.job()
    node.work()
    box.answer("derived")
    node.work(30.0)
    assert node.at(job).state is JobState.REJECTED and "at most 2 are taken" in node.at(job).error


def test_an_image_that_may_not_leave_stays_and_that_is_said(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    job = node.job(BurnedInAnnotation="YES")
    node.work()
    assert node.at(job).state is JobState.REJECTED and "Burned In Annotation" in node.at(job).error
    assert not box.received


# --- what goes wrong on the way --------------------------------------------------------------------------------------


def test_nobody_there_is_an_outage_and_trouble(line: Callable[..., Line], free_port: Callable[[], int]) -> None:
    node = line(port=free_port())
    job = node.job()
    heard: list[tuple[str, str]] = []
    node.engine.observe(lambda name, outcome, seconds: heard.append((name, outcome)))
    node.work()
    assert (node.at(job).state, node.at(job).outages) == (JobState.PENDING, 1)
    assert node.engine.trouble and heard == [("ai-box", "unavailable")]
    with pytest.raises(EngineUnavailable):
        node.engine.report()


@pytest.mark.parametrize(
    ("word", "state"), [("refuse", JobState.REJECTED), ("busy", JobState.PENDING), ("drop", JobState.PENDING)]
)
def test_an_engine_that_does_not_take_the_images(
    line: Callable[..., Line], box: Any, word: str, state: JobState
) -> None:
    node = line()
    job = node.job()
    box.misbehave(word)
    node.work()
    assert node.at(job).state is state
    if state is JobState.REJECTED:
        assert "did not take 1 of 3 images; the first: the peer answered 0xA900" in node.at(job).error
        return
    node.work(5.0)
    assert node.at(job).state is JobState.WAITING
    assert set(box.uids()) == {f"{SERIES}.{number}" for number in (1, 2, 3)}


def test_without_its_whole_answer_in_time_the_job_fails_with_what_came(line: Callable[..., Line], box: Any) -> None:
    node = line(count=3, answer_within_s=100.0)
    job = node.job()
    node.work()
    box.answer("seg")
    node.work(60.0)
    assert node.at(job).state is JobState.WAITING
    node.work(60.0)
    assert node.at(job).state is JobState.FAILED
    assert "1 of 3 objects came back within 100 s" in node.at(job).error
    node.worker.stop_once()
    assert "this engine cannot be told to stop" in node.told()


def test_it_is_looked_for_the_answer_less_and_less_often(line: Callable[..., Line]) -> None:
    node = line(poll_s=5.0, poll_max_s=60.0)
    task = node.task(node.job())
    notes: list[str] = []
    first = node.engine.run(replace(task, remember=notes.append), lambda: None)
    waits = []
    for seconds in (0.0, 100.0, 3600.0):
        node.clock.move(seconds)
        pending = node.engine.poll(replace(task, note=notes[-1]), first.handle)
        assert isinstance(pending, Pending)
        waits.append(pending.poll_after_s)
    assert waits == [5.0, 10.0, 60.0]


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_killed_after_any_note_it_goes_on_from_there(line: Callable[..., Line], box: Any) -> None:
    node = line()
    task = node.task(node.job())
    notes: list[str] = []
    pending = node.engine.run(replace(task, remember=notes.append), lambda: None)
    begun, done = notes
    assert "SECRET" not in begun + done and len(box.received) == 3
    box.answer("seg")  # the answer came while nobody looked

    again = node.engine.run(replace(task, note=done, remember=notes.append), lambda: None)
    assert again == pending and len(box.received) == 3, "what was sent is not sent again"
    resent = node.engine.run(replace(task, note=begun, remember=notes.append), lambda: None)
    assert resent == pending and set(box.uids()) == {f"{SERIES}.{number}" for number in (1, 2, 3)}
    node.clock.move(30.0)
    found = []
    for note in (notes[-1], done):
        result = node.engine.poll(replace(task, note=note), pending.handle)
        assert not isinstance(result, Pending)
        (value,) = result.values
        assert isinstance(value, ReturnedInstances)
        found.append([one.sop_instance_uid for one in value.instances])
    assert found[0] == found[1] and len(found[0]) == 1


@pytest.mark.parametrize("step", ["before sending", "after sending"])
def test_a_worker_that_dies_around_the_sending_costs_no_second_result(
    line: Callable[..., Line], box: Any, step: str
) -> None:
    node = line()
    job = node.job()
    send = node.engine._sender
    assert send is not None

    class Dies:
        def send(self, *args: Any, **kwargs: Any) -> None:
            if step == "after sending":
                send.send(*args, **kwargs)
            raise KeyboardInterrupt

    node.engine._sender = Dies()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        node.work()
    assert node.at(job).note.startswith("about to send 3 images")
    if box.received:
        box.answer("seg")  # of the first sending, while nobody is there
    node.engine._sender = send
    node.work(60.0)
    assert node.at(job).state is JobState.WAITING
    if len(box.received) == 3:
        box.answer("seg")
    node.work(30.0)
    assert node.at(job).state is JobState.DONE and len(node.results(job)) == 1
    assert set(box.uids()) == {f"{SERIES}.{number}" for number in (1, 2, 3)}


def test_a_sending_has_its_time(line: Callable[..., Line], box: Any) -> None:
    node = line()
    task = node.task(node.job())
    heard: list[str] = []
    node.engine.observe(lambda name, outcome, seconds: heard.append(outcome))
    with pytest.raises(EngineTimeout, match="could not be sent within 60 s"):
        node.engine.run(task, lambda: node.clock.move(50.0))
    assert heard == ["timeout"] and len(box.received) < 3


def test_killed_between_taking_and_finishing_the_answer_is_taken_once(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    job = node.job()
    node.work()
    box.answer("seg")
    finish = node.queue.finish_job

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    node.queue.finish_job = dies
    with pytest.raises(KeyboardInterrupt):
        node.work(30.0)
    node.queue.finish_job = finish
    assert node.at(job).state is JobState.LEASED
    node.work(60.0)
    assert node.at(job).state is JobState.DONE
    assert len(node.results(job)) == 1 and len(node.queue.deliveries(study_instance_uid=STUDY)) == 1
    with node.catalog.database.read() as connection:
        (produced,) = connection.execute("SELECT count(*) FROM instance WHERE origin = 'produced'").fetchone()
    assert produced == 1


def test_a_restarted_machine_does_not_expire_what_waits(line: Callable[..., Line]) -> None:
    node = line(answer_within_s=100.0)
    task = node.task(node.job())
    notes: list[str] = []
    pending = node.engine.run(replace(task, remember=notes.append), lambda: None)
    node.clock.boot = lambda: BootTime(boot_id="after", seconds=5.0)  # type: ignore[method-assign]
    assert isinstance(node.engine.poll(replace(task, note=notes[-1]), pending.handle), Pending)


def test_a_run_by_hand_needs_no_note(line: Callable[..., Line], box: Any) -> None:
    node = line(host="0.0.0.0")
    names = {"engine": "ai-box", "study_instance_uid": STUDY, "series_instance_uid": SERIES}
    by_hand = recorder(node.queue, job=None, **names)
    task = replace(node.task(node.job()), job_id=0, note="", remember=lambda note: None, record=by_hand)
    pending = node.engine.run(task, lambda: None)
    box.answer("seg")
    node.clock.move(30.0)
    result = node.engine.poll(task, pending.handle)
    assert not isinstance(result, Pending)
    (value,) = result.values
    assert isinstance(value, ReturnedInstances) and value.copies[0].PatientID == PATIENT


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "peers", "message"),
    [
        ({"returns_from": ["DICOM_NODE"]}, {}, "is the node itself"),
        ({}, {"ct": {"ae_title": "CT1"}}, "none of the configured peers"),
        ({}, {"ai": {"ae_title": "AI_BOX"}}, "not marked as an engine"),
    ],
)
def test_settings_under_which_no_answer_could_come_are_named(
    line: Callable[..., Line], box: Any, options: dict[str, Any], peers: dict[str, Any], message: str
) -> None:
    node = line(peers=peers, **options)
    with pytest.raises(ConfigError, match=message) as caught:
        node.engine.check()
    assert str(caught.value).startswith("engines.ai-box.options.")
    job = node.job()
    node.work()
    assert node.at(job).state is JobState.PENDING and message in node.at(job).error, "its work waits for better ones"
    assert node.engine.trouble == str(caught.value) and not box.received


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"port": 0}, "port"),
        ({"ae_title": "a\\b"}, "ae_title"),
        ({"host": "a b"}, "host"),
        ({"sop_classes": ["1.02.3"]}, "sop_classes"),
        ({"modalities": ["seg"]}, "modalities"),
        ({"quite_s": 3}, "quite_s"),
        ({"count": 0}, "count"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], key: str) -> None:
    good = {"ae_title": "AI", "host": "h", "port": 104}
    settings = NodeConfig.model_validate({"engines": {"x": {"kind": "dicom", "options": {**good, **options}}}}).engines
    with pytest.raises(ConfigError, match=rf"engines\.x\.options\.{key}"):
        dicom_options("x", settings["x"])


def test_the_report_says_who_is_there_and_what_leaves(line: Callable[..., Line], box: Any) -> None:
    told = dict(line().engine.report())
    assert told["reached"] == f"AI_BOX at 127.0.0.1:{box.port}: answers C-ECHO with status 0x0000"
    assert told["what leaves"] == "images as they are, with the patient's name"
    assert told["an answer is whole"] == "10 s after its last object"
    assert dict(line(host="0.0.0.0", data="other").engine.report())["what leaves"] == "pseudonymised images"


def test_without_a_catalog_it_can_be_checked_and_not_run(line: Callable[..., Line]) -> None:
    node = line()
    alone = wiring.engines(node.config)["ai-box"]
    alone.check()
    with pytest.raises(ConfigError, match="inside a node only"):
        alone.run(node.task(node.job()), lambda: None)


# --- the example rule and the server by hand -------------------------------------------------------------------------


def test_the_example_rule_sends_ct_volumes_and_no_scout_to_it(tmp_path: Path, line: Callable[..., Line]) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    shutil.copy(ROOT / "routing_rules" / "examples" / "dicom_engine.yaml", rules)
    loaded = load_rules(rules, engines=["ai-box"], destinations=["PACS"])
    node = line()

    def jobs(series: str, *, origin: Origin = Origin.RECEIVED, **attributes: Any) -> list[tuple[str, tuple[str, ...]]]:
        images = attributes.pop("images", 10)
        node.receive([_image(number, series=series, **attributes) for number in range(1, images + 1)])
        view = SeriesView(
            study_instance_uid=STUDY,
            revision=1,
            header=read_series_header(node.queue.series_instances(STUDY, series)),
            source=Source(calling_ae_title="CT1", called_ae_title="DICOM_NODE", address="127.0.0.1"),
            origins=frozenset({origin}),
            study_series_count=1,
            study_instance_count=images,
            study_modalities=("CT",),
            received_at=NOON,
        )
        planned = loaded.evaluate(view, now=NOON, destination_of={"CT1": "PACS"}.get).jobs
        return [(job.engine, job.destinations) for job in planned]

    assert jobs(f"{STUDY}.1") == [("ai-box", ("PACS",))]
    assert jobs(f"{STUDY}.2", Modality="MR") == []
    assert jobs(f"{STUDY}.3", images=9) == []
    assert jobs(f"{STUDY}.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]) == []
    assert jobs(f"{STUDY}.5", origin=Origin.RETURNED) == []


def test_the_server_runs_by_hand() -> None:
    command = [sys.executable, "-m", "tests.engines.servers.dicom_engine", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("AI_BOX listens on 127.0.0.1")
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_the_note_holds_no_uid_of_the_patient_s_images(line: Callable[..., Line]) -> None:
    node = line()
    job = node.job()
    node.work()
    first, rest = node.at(job).note.split("\n", 1)
    assert first == "3 images sent; its answer is waited for"
    assert json.loads(rest)["frames"] == [FRAME]
