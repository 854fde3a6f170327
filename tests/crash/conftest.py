"""What the crash tests share: the killing seam, a sender that does not give up, the promises as one check."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings, StorageSettings
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.dimse.files import instance_of_file, send_files
from dicom_node.dimse.session import is_stored
from dicom_node.errors import NodeError
from dicom_node.model import DeliveryState, Destination, JobState, Level
from dicom_node.store.catalog import Catalog, open_catalog

SEAM = Path(__file__).with_name("seam")
SEND = DeliverySettings(connect_timeout_s=5.0, response_timeout_s=20.0)
GIVE_UP_S = 90.0
Acknowledged = dict[str, str]  # SOP Instance UID to the SHA-256 of its data set


@dataclass
class Seam:
    """The folder through which `seam/sitecustomize.py` is told where to kill."""

    folder: Path

    def arm(self, point: str) -> None:
        """Whoever passes that point next dies."""
        (self.folder / "fired").unlink(missing_ok=True)
        (self.folder / "new").write_text(point)
        (self.folder / "new").rename(self.folder / "armed")

    def disarm(self) -> None:
        """Nobody dies."""
        (self.folder / "armed").unlink(missing_ok=True)

    @property
    def fired(self) -> bool:
        """Whether somebody died at the armed point."""
        return (self.folder / "fired").exists()

    def passed(self, since: int = 0) -> list[str]:
        """The points that were passed, each once, in the order of their first time. `since`: bytes of `size`."""
        seen = self.folder / "seen"
        return list(dict.fromkeys(seen.read_bytes()[since:].decode().splitlines())) if seen.exists() else []

    @property
    def size(self) -> int:
        """How much was passed so far, for `passed`."""
        seen = self.folder / "seen"
        return seen.stat().st_size if seen.exists() else 0

    def move_wall(self, seconds: float) -> None:
        """What the nodes take for the wall clock is from now on so far from the real one."""
        (self.folder / "new-wall").write_text(str(seconds))
        (self.folder / "new-wall").rename(self.folder / "wall")


@pytest.fixture
def seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seam:
    """Nodes started from now on can be killed at named points."""
    folder = tmp_path / "seam"
    folder.mkdir()
    monkeypatch.setenv("TEST_KILL_FOLDER", str(folder))
    paths = [str(SEAM), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    return Seam(folder)


@dataclass
class Study:
    """A study as it was sent, with what of it was acknowledged."""

    uid: str
    paths: list[Path]
    acknowledged: Acknowledged = field(default_factory=dict)


@pytest.fixture
def ct_study(tmp_path: Path) -> Callable[..., Study]:
    """`ct_study(number, images=3)`: a small CT series in files."""

    def make(number: int, images: int = 3) -> Study:
        folder = tmp_path / "sent" / str(number)
        series = write_ct_series(folder, 870000 + number, shape=(images, 16, 16), spacing_mm=(4.0, 4.0, 4.0))
        return Study(str(series.study_instance_uid), sorted(folder.rglob("*.dcm")))

    return make


def _send(study: Study, port: int, calling: str = "CT1") -> None:
    to = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=port)
    left = {path: instance_of_file(path) for path in study.paths}

    def on_result(path: Path, status: int | None, error: str) -> None:
        if status is not None and is_stored(status):
            sent = left.pop(path)
            data_set = path.read_bytes()[sent.data_set_offset :]
            study.acknowledged[sent.sop_instance_uid] = hashlib.sha256(data_set).hexdigest()

    deadline = time.monotonic() + GIVE_UP_S
    while left:
        try:
            send_files(list(left), to, on_result, settings=SEND, calling_ae_title=calling)
        except NodeError as exc:
            assert time.monotonic() < deadline, f"{study.uid} could not be sent: {exc}"
            time.sleep(0.05)


@pytest.fixture
def send() -> Callable[..., None]:
    """`send(study, port)`: again and again, as any sender does, until every object is acknowledged."""
    return _send


@dataclass
class Look:
    """A look into a node's catalog from outside."""

    catalog: Catalog

    def instances(self, study: str) -> dict[str, Any]:
        """Every visible instance of the study, by its SOP Instance UID."""
        found = self.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [study]})
        return {one.sop_instance_uid: one for one in found}

    def at_rest(self, study: str) -> bool:
        """It was routed, and neither a job nor a delivery of it is under way."""
        queue = self.catalog.queue
        moving = {JobState.PENDING, JobState.LEASED, JobState.WAITING}
        sending = {DeliveryState.PENDING, DeliveryState.LEASED, DeliveryState.COMMITTING}
        return (
            bool(queue.verdicts(study))
            and not any(activity.study_instance_uid == study for activity in queue.open_studies())
            and not any(job.state in moving for job in queue.jobs(study_instance_uid=study))
            and not any(sent.state in sending for sent in queue.deliveries(study_instance_uid=study))
        )

    def has_all(self, study: Study) -> None:
        """Every acknowledged instance is there, indexed, byte for byte."""
        stored = self.instances(study.uid)
        assert not study.acknowledged.keys() - stored.keys(), f"acknowledged and lost, of {study.uid}"
        for uid, digest in study.acknowledged.items():
            one = stored[uid]
            data_set = Path(one.path).read_bytes()[one.data_set_offset :]
            assert hashlib.sha256(data_set).hexdigest() == digest, f"{uid} has other bytes"

    def one_result(self, study: Study) -> None:
        """One job and one report for each rule and revision.

        Where a death cut a study in two and its sender came back late, a job for the first part was begun: it ended
        before it had a result, or is a revision of its own.
        """
        jobs = self.catalog.queue.jobs(study_instance_uid=study.uid)
        made_of = Counter((job.rule, job.series_instance_uid, job.input_digest, job.engine) for job in jobs)
        assert set(made_of.values()) == {1}, made_of
        ended = [job for job in jobs if job.state is JobState.CANCELLED and "the images changed" in job.error]
        done = [job for job in jobs if job not in ended]
        assert {job.state for job in done} == {JobState.DONE}, [(job.state, job.error) for job in jobs]
        results = [one.sop_instance_uid for job in jobs for one in self.catalog.queue.job_results(job.id)]
        reports = [uid for uid, one in self.instances(study.uid).items() if one.modality == "SR"]
        assert sorted(results) == sorted(reports) and len(reports) == len(done)

    def all_delivered(self, study: Study) -> None:
        """No delivery is forgotten or given up."""
        deliveries = self.catalog.queue.deliveries(study_instance_uid=study.uid)
        assert deliveries and {one.state for one in deliveries} == {DeliveryState.DONE}, deliveries


@pytest.fixture
def look() -> Iterator[Callable[[Any], Look]]:
    """`look(node)`: into its catalog; closed at the end."""
    opened: list[Catalog] = []

    def open_it(node: Any) -> Look:
        storage = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)
        opened.append(open_catalog(node.data_dir, SystemClock(), storage))
        return Look(opened[-1])

    yield open_it
    for catalog in opened:
        catalog.close()


@pytest.fixture
def leftovers() -> Callable[[Path], list[str]]:
    """`leftovers(data_dir)`: files that are neither the node's own nor archived; the run folder is emptied at start."""
    known = {"catalog.db", "catalog.lock", "catalog.wanted", "node.lock", "children.lock", "rules_in_force.json"}

    def find(data_dir: Path) -> list[str]:
        files = [path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file()]
        strange = [path for path in files if path.parts[0] not in {"run", "journal", *known}]
        return [
            str(path)
            for path in strange
            if not path.name.startswith("catalog.db-")
            and not (path.parts[0] == "archive" and path.suffix == ".dcm" and path.parts[1] == path.name[:2])
        ]

    return find
