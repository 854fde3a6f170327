"""`dicom-node demo`: the whole line on this machine, with real nodes, real associations and a report to look at.

Two nodes are started as any user would start them: one without rules plays the PACS, one routes and analyses. Studies
(phantoms, or the user's own files) go by C-STORE from the PACS to the node; results come back by C-STORE; the studies
are fetched back with C-GET. Everything that was started is stopped, everything but the report is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings, load_config, packaged
from dicom_node.demo.report import StudyStory, write_report
from dicom_node.errors import ConfigError, NodeError
from dicom_node.model import DeliveryState, JobState
from dicom_node.store.catalog import Catalog, open_catalog

__all__ = ["main"]

READY_S = 90.0
STOP_S = 30.0
PATIENCE_S = 600.0  # phantoms take seconds; somebody's own folder may hold many studies
QUIET_S = 2.0  # instead of 10: nobody retries here
_JOB_ENDS = {JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED}
_DELIVERY_ENDS = {DeliveryState.DONE, DeliveryState.FAILED, DeliveryState.CANCELLED}


def main(words: Sequence[str] | None = None) -> int:
    """Run the tour; 0 when every study was accounted for and every result arrived."""
    parser = argparse.ArgumentParser(prog="dicom-node demo", description="Show the whole line on this machine.")
    parser.add_argument("--report", type=Path, default=Path("demo-report"), metavar="DIR", help="default: demo-report")
    parser.add_argument("--input", type=Path, metavar="DIR", help="your own DICOM files instead of phantoms")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="dicom-node-demo-") as folder:
        return _tour(Path(folder), options.report, options.input)


def _tour(work: Path, report: Path, own_files: Path | None) -> int:
    say = _Speaker()
    source = _input_folder(work, own_files, say)
    studies = _studies_in(source)
    if not studies:
        raise ConfigError(f"--input: no DICOM instance was found in {source}; name a folder with DICOM files")
    with (
        _running(work / "pacs", _pacs_settings(work), say) as pacs,
        _running(work / "node", _node_settings(work, pacs), say) as node,
    ):
        say(
            f"sending {sum(studies.values())} instances of {len(studies)} studies to the PACS, then from it to the node"
        )
        _dicom_node("send", str(source), "--to", f"{pacs}/PACS", "--ae-title", "MODALITY")
        _dicom_node("send", str(source), "--to", f"{node}/DICOM_NODE", "--ae-title", "PACS")
        catalog = _catalog(work / "node")
        try:
            finished = _wait(catalog, studies, say)
            stories = [_story(work, pacs, catalog, study) for study in studies]
        finally:
            catalog.close()
        page = write_report(report, stories)
    return _conclude(stories, page, finished, say)


class _Speaker:
    """Prints a line with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", flush=True)


# --- what is sent


def _input_folder(work: Path, own_files: Path | None, say: Callable[[str], None]) -> Path:
    if own_files is not None:
        if not own_files.is_dir():
            raise ConfigError(f"--input: {own_files} is no folder")
        return own_files
    from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr

    say("making phantoms: one abdominal CT, two chest radiographs")
    folder = work / "phantoms"
    folder.mkdir()
    write_ct_series(folder / "ct", 700001, shape=(96, 256, 256), spacing_mm=(3.0, 1.5, 1.5))
    write_cxr(folder / "chest-1.dcm", 700002)
    write_cxr(folder / "chest-2.dcm", 700003, photometric="MONOCHROME1", view="AP")
    return folder


def _studies_in(folder: Path) -> dict[str, int]:
    """Study Instance UIDs in `folder` with the number of their instances."""
    studies: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"])
        except (InvalidDicomError, OSError, ValueError, EOFError):
            continue
        if uid := str(ds.get("StudyInstanceUID", "")):
            studies[uid] = studies.get(uid, 0) + 1
    return studies


# --- the two nodes


def _pacs_settings(work: Path) -> dict[str, Any]:
    rules = work / "no-rules"
    rules.mkdir()
    return {"ae_titles": ["PACS"], "rules_dir": str(rules), "engines": {}, "jobs": {"workers": 0}}


def _node_settings(work: Path, pacs: str) -> dict[str, Any]:
    host, port = pacs.split(":")
    return {
        "rules_dir": str(packaged("default_rules")),
        "destinations": {"PACS": {"ae_title": "PACS", "host": host, "port": int(port)}},
        "completion": {"quiet_s": QUIET_S},
    }


@contextmanager
def _running(folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[str]:
    """Start `dicom-node serve` on free ports; yields its DICOM address; stops it at the end."""
    folder.mkdir()
    config = folder / "node.yaml"
    common = {
        "data_dir": str(folder / "data"),
        "dicom_port": 0,
        "http_port": 0,
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
    }
    config.write_text(json.dumps({**common, **settings}), encoding="utf-8")  # JSON is YAML
    load_config(config, environ={})
    with (folder / "node.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dicom_node.cli", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(),
        )
        try:
            say(f"{folder.name}: {_ready_line(process, folder / 'node.log')}")
            facts = json.loads((folder / "data" / "run" / "supervisor.json").read_text())["facts"]
            yield f"127.0.0.1:{facts['dicom_port']}"
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    """Without settings of the user's own node."""
    return {key: value for key, value in os.environ.items() if not key.startswith("DICOM_NODE_")}


def _ready_line(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], READY_S)
    line = process.stdout.readline().strip() if readable else ""
    if not line:
        raise NodeError(f"a demonstration node did not start; the end of its log:\n{log.read_text()[-1500:]}")
    return line


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=STOP_S)
    if process.stdout is not None:
        process.stdout.close()


def _dicom_node(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dicom_node.cli", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=_environment(),
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)  # some objects were refused: say which, go on with the others
    return done.stdout


# --- waiting and telling


def _catalog(folder: Path) -> Catalog:
    return open_catalog(folder / "data", SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))


def _wait(catalog: Catalog, studies: Mapping[str, int], say: Callable[[str], None]) -> bool:
    """Until nothing of these studies is under way, telling each event as it appears. False when patience ran out."""
    told: set[tuple[str, str, str]] = set()
    names = {uid: f"study {number}" for number, uid in enumerate(studies, 1)}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        for uid, name in names.items():
            for event in catalog.queue.timeline(uid):
                key = (uid, event.at.isoformat(), event.text)
                if key not in told:
                    told.add(key)
                    say(f"{name}: {event.text}")
        if not any(_under_way(catalog, uid) for uid in studies):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _under_way(catalog: Catalog, uid: str) -> bool:
    return (
        bool(catalog.queue.open_studies([uid]))
        or any(job.state not in _JOB_ENDS for job in catalog.queue.jobs(study_instance_uid=uid))
        or any(sent.state not in _DELIVERY_ENDS for sent in catalog.queue.deliveries(study_instance_uid=uid))
    )


def _story(work: Path, pacs: str, catalog: Catalog, study: str) -> StudyStory:
    """Fetch the study back from the PACS and put together what happened to it."""
    into = work / "fetched" / f"study-{len(list((work / 'fetched').glob('*'))) + 1}"
    into.mkdir(parents=True)
    _dicom_node("fetch", study, "--from", f"{pacs}/PACS", "--into", str(into), "--ae-title", "VIEWER")
    config = work / "node" / "node.yaml"
    return StudyStory(
        study_instance_uid=study,
        events=tuple(catalog.queue.timeline(study)),
        explanation=_dicom_node("rules", "explain", study, "--config", str(config)),
        files=tuple(sorted(path for path in into.rglob("*") if path.is_file())),
        jobs=tuple(catalog.queue.jobs(study_instance_uid=study)),
        deliveries=tuple(catalog.queue.deliveries(study_instance_uid=study)),
    )


def _conclude(stories: Sequence[StudyStory], page: Path, finished: bool, say: Callable[[str], None]) -> int:
    failed = not finished
    for number, story in enumerate(stories, 1):
        say(f"study {number}: fetched back with C-GET: {story.contents()}")
        if not story.jobs:
            say(f"study {number}: nothing ran, and this is why:\n{story.explanation}")
        for job in story.jobs:
            if job.state is JobState.REJECTED:
                say(f"study {number}: {job.engine} did not take it: {job.error}")
            failed = failed or job.state in (JobState.FAILED, JobState.CANCELLED)
        failed = failed or any(sent.state is not DeliveryState.DONE for sent in story.deliveries)
    say(f"report: {page}")
    if failed:
        say("something did not finish; the report says what")
    return 1 if failed else 0
