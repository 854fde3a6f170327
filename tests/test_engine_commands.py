"""`dicom-node engines ...`, and what the work process tells of its engines and tells them."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node import cli, engine_commands, plugins
from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings, load_config
from dicom_node.gauges import node_readings
from dicom_node.metrics import Gauges, render
from dicom_node.model import Origin, Source
from dicom_node.process import Orders
from dicom_node.pulse import Pulse, beat, run_folder
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.values import (
    AnnotationGroup,
    Annotations,
    Code,
    Document,
    GraphicType,
    Mesh,
    Picture,
    Quantities,
    Quantity,
    Segment,
    SlideLabels,
)
from dicom_node.wiring import node_ingest
from dicom_node.worker import Work

STUDY, TAKEN, OTHER = "1.2.826.9", "1.2.826.9.1", "1.2.826.9.2"
CR = "1.2.840.10008.5.1.4.1.1.1"

# An engine as another package would bring it: it answers at the second poll and tells of itself.
ENGINE = """
from pathlib import Path
from dicom_node.errors import ConfigError, EngineError, EngineRejected, EngineUnavailable
from dicom_node.model import Sending
from dicom_node.values import (
    Code,
    EngineResult,
    Finding,
    Findings,
    Pending,
    Presence,
    Provenance,
)

class Outside:
    def __init__(self, name, settings, *, devices=(), data_dir=None, **node):
        self.name, self._options, self._polls = name, settings.options, 0

    def check(self):
        if "broken" in self._options:
            raise ConfigError("engines.outside: no credentials")

    def report(self):
        if "away" in self._options:
            raise EngineUnavailable("outside: connection refused")
        return [("reachable", "yes, in 3 ms"), ("token", "expires in 12 h"), ("models", "nodules 2.1, " * 20)]

    def run(self, task, heartbeat):
        if task.header.values["Modality"] != ("CR",):
            raise EngineRejected("no radiograph")
        task.remember("by hand")
        with task.record(Sending(what="DICOM", host="ai.example", objects=len(task.instances), identifiable=True)):
            pass
        return Pending(handle="run-5", poll_after_s=0.0)

    def poll(self, task, handle):
        self._polls += 1
        if "shaky" in self._options and self._polls < 3:
            raise EngineUnavailable("outside: connection refused")
        if "fails" in self._options:
            raise EngineError("outside: the job failed there")
        if "slow" in self._options or self._polls < 2:
            return Pending(handle=handle, poll_after_s=0.0)
        if "odd" in self._options:
            returned = Path(self._options["odd"])
            task.quarantine(returned, "another grid")
        code = Code(value="1", scheme="99TEST", meaning="Nodule")
        finding = Finding(key="n", name="Nodule", code=code, presence=Presence.PRESENT, confidence=0.81)
        return EngineResult(
            values=(Findings(sop_instance_uid=task.instances[0].sop_instance_uid, items=(finding,), notes=("so so",)),),
            provenance=Provenance(name="Outside AI", version="2", manufacturer="m", device_uid="2.25.7",
                                  weights_sha256="", config_sha256=""),
        )

    def cancel(self, handle):
        Path("cancelled").write_text(handle)

    def close(self):
        pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a node's data, an engine `outside` of a kind of its own, and settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    monkeypatch.setattr("dicom_node.transfers.setup_logging", lambda *_: None)
    (tmp_path / "routing_rules").mkdir()
    (tmp_path / "outside_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugins._ENGINES, "outside", "outside_engine:Outside")  # type: ignore[index]
    configure(tmp_path)
    opened(tmp_path).close()
    return tmp_path


def configure(folder: Path, **options: str) -> None:
    (folder / "config").mkdir(exist_ok=True)
    settings = {
        "engines": {"outside": {"kind": "outside", "options": options}},
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
    }
    (folder / "config" / "node.yaml").write_text(json.dumps(settings))


def opened(folder: Path) -> Catalog:
    storage = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)
    return open_catalog(folder / "data", SystemClock(), storage)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def study(here: Path) -> Path:
    """One study with a radiograph and a CT image."""
    catalog = opened(here)
    ingest = node_ingest(catalog, load_config(None, environ={}), SystemClock())
    for modality, series in (("CR", TAKEN), ("CT", OTHER)):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CR, f"{series}.1"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, series
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "P1", "Canary^Jane", "19700101", "F"
        ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", ""
        ds.StudyDate, ds.StudyTime = "20260101", "101010"
        ds.Modality, ds.SeriesNumber, ds.InstanceNumber = modality, 1, 1
        ds.Rows = ds.Columns = 2
        ds.BitsAllocated = 16
        ds.PixelData = b"\0" * 8
        ds["PixelData"].VR = "OW"
        buffer = DicomBytesIO()
        buffer.is_implicit_VR, buffer.is_little_endian = False, True
        write_dataset(buffer, ds)
        result = ingest.accept(
            sop_class_uid=CR,
            sop_instance_uid=str(ds.SOPInstanceUID),
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            fragments=[buffer.getvalue()],
            source=Source(calling_ae_title="CR1", called_ae_title="NODE", address="127.0.0.1"),
        )
        assert result.status == 0
    catalog.close()
    return here


def instances(folder: Path) -> list[tuple[str, str]]:
    catalog = opened(folder)
    with catalog.database.read() as connection:
        rows = connection.execute("SELECT origin, modality FROM instance ORDER BY origin, modality").fetchall()
    catalog.close()
    return [(row["origin"], row["modality"]) for row in rows]


# --- list


def test_engines_are_listed_before_any_node_ran(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "engines", "list", "--data-dir", "elsewhere")
    assert status == 0
    assert "outside" in out and "the node is stopped" in out
    assert not (here / "elsewhere").exists()


def beaten(here: Path, **facts: Any) -> None:
    run_folder(here / "data").mkdir(exist_ok=True)
    now = SystemClock().boot()
    pulse = Pulse(
        pid=1, boot_id=now.boot_id, boot_s=now.seconds, started_at=datetime.now(UTC).isoformat(), ok=True, facts=facts
    )
    assert beat(here / "data", "work", pulse)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "ready"),
        ({"unusable": {"outside": "its licence is over"}}, "its licence is over"),
        ({"engines": {"outside": {"breaker_state": 1.0}}}, "resting after failures"),
        ({"engines": {"outside": {"token_expires_seconds": 7200.0}}}, "ready; its credentials expire in 2.0 h"),
        ({"engines": {"outside": {"token_expires_seconds": -1.0}}}, "ready; its credentials have expired"),
    ],
)
def test_the_list_says_how_an_engine_is_now(
    here: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], expected: str
) -> None:
    beaten(here, **facts)
    _, out, _ = said(capsys, "engines", "list")
    (line,) = [line for line in out.splitlines() if line.startswith("outside")]
    assert line.endswith(expected)


def add_job(catalog: Catalog, engine: str, state: str, number: int) -> None:
    columns = {
        **dict.fromkeys(("study_instance_uid", "series_instance_uid", "rule", "input_digest"), "1"),
        **{"engine": engine, "state": state, "run_number": number, "revision": 1, "priority": "routine", "rank": 1},
        **{"results": "[]", "destinations": "[]", "send_what": "results", "late_instances": "ignore"},
        **{"created_at": "2026-01-01T00:00:00+00:00", "since_s": 0, "since_boot_id": ""},
        "since_at": "2026-01-01T00:00:00+00:00",
    }
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    values = tuple(columns.values())
    catalog.database.write(
        lambda connection: connection.execute(f"INSERT INTO job ({names}) VALUES ({marks})", values) and None
    )


def test_the_list_counts_the_jobs_of_each_engine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = opened(here)
    states = ("pending", "leased", "waiting", "failed", "failed", "failed", "done")
    for number, state in enumerate(states):
        add_job(catalog, "outside", state, number)
    add_job(catalog, "gone", "failed", 90)
    catalog.close()
    _, out, _ = said(capsys, "engines", "list")
    rows = {line.split()[0]: line.split()[1:5] for line in out.splitlines()}
    assert rows["outside"] == ["outside", "2", "1", "3"]
    assert rows["gone"] == ["-", "0", "0", "1"]
    assert "not configured" in out


# --- check


def test_check_tells_what_an_engine_reports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "engines", "check", "outside")
    assert (status, err) == (0, "")
    assert "outside: can run" in out and "reachable: yes, in 3 ms" in out and "token: expires in 12 h" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(("option", "expected"), [("broken", "no credentials"), ("away", "connection refused")])
def test_check_says_why_an_engine_could_not_run(
    here: Path, capsys: pytest.CaptureFixture[str], option: str, expected: str
) -> None:
    configure(here, **{option: "1"})
    status, out, err = said(capsys, "engines", "check")
    assert status == 2 and "outside: can run" not in out and "outside: CANNOT RUN" in err
    assert err.startswith("dicom-node: outside: ") and expected in err


@pytest.mark.parametrize("words", [["check", "nobody"], ["run", "nobody", STUDY], ["run", "outside", "1.2.3"]])
def test_what_is_not_there_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, out, err = said(capsys, "engines", *words)
    assert (status, out) == (2, "")
    assert err.startswith("dicom-node: ") and err.count("\n") == 1


# --- run


def test_a_run_by_hand_prints_and_writes_and_leaves_the_catalog_alone(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = instances(study)
    status, out, err = said(capsys, "engines", "run", "outside", STUDY, "--out", "answers")
    assert (status, err) == (0, "")
    assert f"series {OTHER}: not taken: no radiograph" in out
    assert "Nodule: present (81%)" in out and "note: so so" in out
    assert "Canary" not in out
    (file,) = (study / "answers").iterdir()
    written = pydicom.dcmread(file)
    assert (written.Modality, written.StudyInstanceUID, written.PatientID) == ("SR", STUDY, "P1")
    assert instances(study) == before


def test_what_left_by_hand_is_recorded_with_the_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "engines", "run", "outside", STUDY)
    _, out, _ = said(capsys, "timeline", STUDY)
    assert "sent: 1 objects (DICOM, identifiable) to outside at ai.example, by hand" in out
    _, out, _ = said(capsys, "status", "--json")
    (record,) = json.loads(out)["sendings"]
    assert (record["engine"], record["job_id"], record["state"]) == ("outside", None, "sent")
    assert (record["what"], record["objects"], record["identifiable"]) == ("DICOM", 1, True)


def test_only_if_asked_for_the_results_are_kept_and_never_under_one_uid(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        status, out, err = said(capsys, "engines", "run", "outside", STUDY, "--series", TAKEN, "--store")
        assert (status, err) == (0, "")
        assert "stored SR" in out
    assert instances(study) == [(Origin.PRODUCED.value, "SR")] * 2 + [("received", "CR"), ("received", "CT")]


def test_a_series_it_does_not_take_is_status_2(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "engines", "run", "outside", STUDY, "--series", OTHER)
    assert status == 2
    assert "not taken" in out and "takes no series" in err


def test_an_answer_that_does_not_come_is_cancelled(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(study, slow="1")
    status, _, err = said(capsys, "engines", "run", "outside", STUDY, "--series", TAKEN, "--timeout", "0.2")
    assert status == 2
    assert "no answer within 0.2 s" in err
    assert (study / "cancelled").read_text() == "run-5"


def test_an_engine_that_cannot_be_asked_for_a_moment_is_asked_again(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(study, shaky="1")
    status, out, err = said(capsys, "engines", "run", "outside", STUDY, "--series", TAKEN)
    assert status == 0 and "Outside AI" in out
    assert err.count("it is asked again") == 2
    assert not (study / "cancelled").exists()


def test_work_that_came_to_nothing_is_stopped_there(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(study, fails="1")
    status, _, err = said(capsys, "engines", "run", "outside", STUDY, "--series", TAKEN)
    assert status == 2 and "the job failed there" in err
    assert (study / "cancelled").read_text() == "run-5"


def test_an_unknown_kind_of_result_is_named_before_anything_runs(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said(capsys, "engines", "run", "outside", STUDY, "--results", "film")
    assert (status, out) == (2, "")
    assert "film" in err


def test_a_quarantined_file_is_told_by_fsck_and_is_no_disagreement(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "mask.nii").write_bytes(b"nonsense")
    configure(study, odd=str(study / "mask.nii"))
    assert said(capsys, "engines", "run", "outside", STUDY)[0] == 0
    status, out, _ = said(capsys, "fsck")
    assert status == 0
    assert "quarantined: job-0-" in out and "another grid" in out and "agree" in out


def test_whatever_an_engine_answers_is_told_by_hand_in_a_line() -> None:
    code = Code(value="1", scheme="99TEST", meaning="Area")
    tooth = Segment(number=2, key="t", label="Tooth 11", category=code, type=code)
    point, square = np.zeros((1, 2)), np.zeros((2, 2), np.uint8)
    group = AnnotationGroup(
        label="Nuclei", category=code, type=code, graphic_type=GraphicType.POINT, shapes=(point, point)
    )
    triangles = np.zeros((4, 3), np.uint32)
    values = (
        Mesh(vertices=np.zeros((4, 3), np.float32), triangles=triangles, title="Upper jaw", segments=(tooth,)),
        Picture(pixels=square, sop_instance_uid="1", title="Heat map", notes=("faint",)),
        Document(pdf=b"%PDF-", sop_instance_uids=("1",), title="Canary^Jane"),
        Annotations(sop_instance_uid="1", groups=(group,)),
        SlideLabels(labels=square + 2, sop_instance_uid="1", segments=(tooth,)),
        Quantities(sop_instance_uids=("1",), items=(Quantity(code=code, value=1.5, unit=code),)),
    )
    assert list(engine_commands._said(values)) == [
        "surface Upper jaw: 4 triangles around Tooth 11",
        "picture Heat map: 2 x 2 pixels",
        "note: faint",
        "document: 5 bytes of PDF",
        "annotations Nuclei: 2 of type POINT",
        "segment 2 Tooth 11: 4 pixels",
        "Area: 1.5 1",
    ]


# --- gauges


def test_what_the_work_process_says_of_engines_becomes_gauges(here: Path) -> None:
    beaten(here, engines={"outside": {"breaker_state": 2.0, "token_expires_seconds": 60.5, "of_its_own": 1.0}})
    config = load_config(here / "config" / "node.yaml", environ={})
    readings = {(name, labels): value for name, labels, value in node_readings(config, 1)}
    assert readings[("engine_breaker_state", ("outside",))] == 2.0
    assert readings[("engine_token_expires_seconds", ("outside",))] == 60.5
    assert not any("of_its_own" in name for name, _ in readings)


# --- the work process


class Heard:
    """An engine that only listens."""

    def __init__(self) -> None:
        self.observer: Any = None
        self.told: list[str] = []
        self.stopped = threading.Event()

    def observe(self, observer: Any) -> None:
        self.observer = observer

    def gauges(self) -> dict[str, float]:
        return {"breaker_state": 1.0}

    def cancel(self, handle: str) -> None:
        self.told.append(handle)
        self.stopped.set()

    def close(self) -> None: ...


def test_the_work_process_reads_gauges_counts_requests_and_tells_what_is_to_be_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Heard()
    monkeypatch.setattr("dicom_node.worker.engines", lambda config, **how: {"outside": engine})
    catalog = opened(here)
    add_job(catalog, "outside", "waiting", 1)
    catalog.database.write(lambda connection: connection.execute("UPDATE job SET handle = 'run-5'") and None)
    catalog.queue.cancel_job(1)
    config = load_config(here / "config" / "node.yaml", environ={}, overrides={"data_dir": str(here / "data")})
    work = Work(Orders(config=config, supervisor_pid=1), SystemClock())
    try:
        assert engine.stopped.wait(20.0)
        assert work.health()[2]["engines"] == {"outside": {"breaker_state": 1.0}}
        engine.observer("outside", "timeout", 1.5)
        text = render(work._metrics, Gauges(lambda: ()))[1].decode()
        assert 'engine_requests_total{engine="outside",outcome="timeout"} 1.0' in text
    finally:
        work.stop()
    assert engine.told == ["run-5"]
    catalog.close()
