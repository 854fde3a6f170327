"""The bench of the pipeline's tests: a real catalog, archive and ingest, with a fake engine, peer and clock.

Run as a program it makes workers and couriers that kill themselves (SIGKILL) at a named point, see `serve`.
"""

import os
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings, JobSettings, StorageSettings
from dicom_node.interfaces import Heartbeat, RoutedSeries
from dicom_node.model import (
    BootTime,
    CloseTrigger,
    CommitmentReport,
    CommitmentRequest,
    CommitmentTimes,
    ConflictPolicy,
    Destination,
    EngineTask,
    LatePolicy,
    ObjectReference,
    Origin,
    PlannedJob,
    Priority,
    Sending,
    SendWhat,
    Source,
    StoredInstance,
    Verdict,
)
from dicom_node.pipeline.commit import Committer
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.deliver import Courier
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.ingest import Ingest
from dicom_node.pipeline.observe import Unobserved
from dicom_node.pipeline.work import Worker
from dicom_node.retention import DeletionOrder, Hold
from dicom_node.store.catalog import open_catalog
from dicom_node.values import (
    Code,
    EngineResult,
    Finding,
    Findings,
    Pending,
    Presence,
    Provenance,
    ResultContext,
    ResultValue,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
EXPLICIT = "1.2.840.10008.1.2.1"
STUDY = "1.2.3"
SERIES = "1.2.3.1"
MODALITIES = {SEG: "SEG", SR: "SR", CT: "CT"}


@dataclass
class MovedClock:
    """Stands still until it is moved."""

    seconds: float = 1000.0
    boot_id: str = "boot-1"

    def boot(self) -> BootTime:
        return BootTime(boot_id=self.boot_id, seconds=self.seconds)

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class LaterClock(SystemClock):
    """The system's clock, `ahead_s` later: what a restart sees after waiting."""

    ahead_s = 0.0

    def boot(self) -> BootTime:
        now = super().boot()
        return BootTime(boot_id=now.boot_id, seconds=now.seconds + self.ahead_s)


@dataclass
class CtEngine:
    """Says the same of every series; `answers` come first, exceptions are raised."""

    name: str = "ct-abdomen"
    answers: list[Any] = field(default_factory=list)
    tasks: list[EngineTask] = field(default_factory=list)
    polled: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    def check(self) -> None: ...

    def close(self) -> None: ...

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        self.tasks.append(task)
        heartbeat()
        self.during()
        heartbeat()
        return self._answer(task)

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        self.polled.append(handle)
        return self._answer(task)

    def cancel(self, handle: str) -> None:
        self.cancelled.append(handle)

    def _answer(self, task: EngineTask) -> EngineResult | Pending:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Pending):
            return answer
        code = Code(value="1", scheme="99TEST", meaning="Finding")
        finding = Finding(key="f", name="Finding", code=code, presence=Presence.PRESENT, confidence=0.9)
        image = min(instance.sop_instance_uid for instance in task.instances)
        provenance = Provenance(
            name="test model", version="1", manufacturer="nobody", device_uid="2.25.1", weights_sha256="w",
            config_sha256="c",
        )  # fmt: skip
        return EngineResult(
            values=(Findings(sop_instance_uid=image, items=(finding,)),),
            provenance=provenance,
            stage_seconds={"forward": 0.1},
        )


class RemoteEngine(CtEngine):
    """An engine outside the node, as an adapter should be: what it was submitted lies in a folder, a line each."""

    def __init__(self, folder: Path, die: Callable[[str], None] = lambda point: None) -> None:
        super().__init__()
        self._log, self._die = folder / "submitted", die

    def submitted(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        self.tasks.append(task)
        key = f"key-{task.job_id}"
        task.remember(f"about to submit {key}")
        self._die("noted")
        if not task.note or key not in self.submitted():
            sending = Sending(what="volume", host="ai.example", objects=len(task.instances), identifiable=False)
            with task.record(sending) as tell:
                self._die("recorded")
                with self._log.open("a") as log:
                    log.write(f"{key}\n")
                self._die("submitted")
                tell(replace(sending, bytes=3, sha256="ab", remote_id="run-1"))
        task.remember(f"submitted as run-1\nhttps://ai.example/?token=secret of {key}")
        self._die("known")
        return self._answer(task)


@dataclass
class PlainEncoder:
    """Writes a small object of one SOP class that repeats the context it was given."""

    kind: str
    sop_class_uid: str
    contexts: list[ResultContext] = field(default_factory=list)
    saw: list[tuple[int, int]] = field(default_factory=list)

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        self.contexts.append(context)
        self.saw.append((len(sources), len(already)))
        ds = Dataset()
        ds.SOPClassUID = self.sop_class_uid
        ds.SOPInstanceUID = f"2.25.{int(context.run_key[:24], 16)}.{len(already) + 1}"
        ds.StudyInstanceUID = sources[0].StudyInstanceUID
        ds.SeriesInstanceUID = f"2.25.{int(context.run_key[:24], 16)}.9{len(already) + 1}"
        ds.PatientID = sources[0].PatientID
        ds.Modality = MODALITIES[self.sop_class_uid]
        ds.InstanceCreationDate = context.created_at.strftime("%Y%m%d")
        return [ds]


@dataclass
class Peer:
    """A destination that keeps what it is sent. `statuses` by SOP Instance UID or modality, `failure` for all."""

    destinations: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    statuses: dict[str, int | None] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    after: Callable[[str], None] = lambda uid: None

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        self.destinations.append(destination.name)
        if destination.name in self.failures:
            raise self.failures[destination.name]
        for instance in instances:
            heartbeat()
            status = self.statuses.get(instance.sop_instance_uid, self.statuses.get(instance.modality, 0))
            if status is not None and (status == 0 or status & 0xF000 == 0xB000):
                self.kept.setdefault(destination.name, []).append(instance.sop_instance_uid)
            self.after(instance.sop_instance_uid)
            on_result(instance, status, "" if status == 0 else "said the peer")


class FolderPeer:
    """A destination in another process's eyes: what it accepted lies in a folder, each object once."""

    def __init__(self, folder: Path, die: Callable[[str], None]) -> None:
        self._folder = folder
        self._die = die
        folder.mkdir(exist_ok=True)

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        for instance in instances:
            with (self._folder / "log").open("a") as log:
                log.write(f"{instance.sop_instance_uid}\n")
            self._die("accepted")
            on_result(instance, 0, "")
            self._die("noted")


@dataclass
class Asker:
    """A destination that is asked for storage commitment. `answer` makes its report, None: it does not come here."""

    answer: Callable[[str, Sequence[ObjectReference]], CommitmentReport | None] = lambda uid, references: None
    failure: BaseException | None = None
    die: Callable[[str], None] = lambda point: None
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def ask(
        self,
        destination: Destination,
        questions: Any,
        on_report: Callable[[CommitmentReport], None],
        is_open: Callable[[], bool],
        heartbeat: Heartbeat,
    ) -> None:
        if self.failure is not None:
            raise self.failure
        for transaction_uid, references in questions.items():
            heartbeat()
            self.asked.append((transaction_uid, [uid for _, uid in references]))
            self.die("asked")
            report = self.answer(transaction_uid, references)
            if report is not None:
                on_report(report)
            self.die("reported")


def report_on(transaction_uid: str, references: Sequence[ObjectReference], **reasons: int) -> CommitmentReport:
    """A report that commits to all but those whose UID ends like `_N` in `reasons`."""
    failed = tuple(
        (one, reason)
        for one in references
        for end, reason in reasons.items()
        if one.sop_instance_uid.endswith(end.replace("_", "."))
    )
    lost = {one for one, _ in failed}
    return CommitmentReport(
        transaction_uid=transaction_uid, committed=tuple(one for one in references if one not in lost), failed=failed
    )


class FolderReporter:
    """A peer in another process's eyes: what it was told lies in a folder."""

    def __init__(self, folder: Path, die: Callable[[str], None]) -> None:
        self._folder, self._die = folder, die
        folder.mkdir(exist_ok=True)

    def report(self, peer: Destination, request: CommitmentRequest) -> None:
        report = request.report()
        with (self._folder / "told").open("a") as log:
            log.write(f"{report.transaction_uid} {len(report.committed)} {len(report.failed)}\n")
        self._die("told")


def _plan(**changes: Any) -> PlannedJob:
    fields: dict[str, Any] = {
        "rule": "organs",
        "series_instance_uid": SERIES,
        "engine": "ct-abdomen",
        "priority": Priority.ROUTINE,
        "results": ("seg", "sr"),
        "destinations": ("PACS",),
        "send_what": SendWhat.RESULTS,
        "late_instances": LatePolicy.RERUN,
    }
    return PlannedJob(**fields | changes)


class Bench:
    """One node's data folder with everything that works on it."""

    def __init__(self, folder: Path, clock: Any = None) -> None:
        self.folder = folder
        self.clock = clock or MovedClock()
        self.catalog = open_catalog(folder, self.clock, StorageSettings(reserve_bytes=0, reserve_ratio=0))
        self.database, self.archive, self.queue = self.catalog.database, self.catalog.archive, self.catalog.queue
        self.ingest = Ingest(
            self.archive,
            self.catalog.index,
            conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST,
            origin_for=lambda source: Origin.RECEIVED,
            max_object_bytes=2**30,
            max_inflated_header_bytes=2**20,
            clock=self.clock,
        )
        self.engine = CtEngine()
        self.encoders = [PlainEncoder("seg", SEG), PlainEncoder("sr", SR)]
        self.peer = Peer()

    def close(self) -> None:
        self.catalog.close()

    def lose_catalog(self) -> None:
        """Close it and take it away; the files stay."""
        self.close()
        for path in self.folder.glob("catalog.db*"):
            path.unlink()

    # --- instances

    def dataset(self, uid: str, *, series: str = SERIES, study: str = STUDY, **attributes: Any) -> Dataset:
        ds = Dataset()
        ds.SOPClassUID = CT
        ds.SOPInstanceUID = uid
        ds.StudyInstanceUID = study
        ds.SeriesInstanceUID = series
        ds.PatientID = "P1"
        ds.PatientName = "Canary^Jane"
        ds.Modality = "CT"
        ds.InstanceNumber = int(uid.rsplit(".", 1)[-1])
        ds.Rows = ds.Columns = 2
        ds.BitsAllocated = 16
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        ds.PixelData = b"\0" * 8
        ds["PixelData"].VR = "OW"
        return ds

    def receive(self, *datasets: Dataset, syntax: str = EXPLICIT, association: str | None = None) -> None:
        source = Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1", association_id=association)
        for ds in datasets:
            result = self.ingest.accept(
                sop_class_uid=str(ds.SOPClassUID),
                sop_instance_uid=str(ds.SOPInstanceUID),
                transfer_syntax_uid=syntax,
                fragments=[encoded(ds, syntax)],
                source=source,
            )
            assert result.status == 0, result

    # --- steps

    def plan(self, **changes: Any) -> PlannedJob:
        return _plan(**changes)

    def route(self, *plans: PlannedJob, study: str = STUDY, series: str = SERIES) -> list[int]:
        """Close one series as a router would."""
        activity = next(a for a in self.queue.open_studies() if a.study_instance_uid == study)
        plans = plans or (_plan(series_instance_uid=series),)
        verdicts = [
            Verdict(rule=plan.rule, series_instance_uid=series, matched=True, reason="", conditions=())
            for plan in plans
        ]
        header = read_series_header(self.queue.series_instances(study, series))
        routed = RoutedSeries(series_instance_uid=series, header=header, verdicts=tuple(verdicts), jobs=plans)
        return list(self.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest"))

    def worker(
        self,
        stage: Any = None,
        observer: Any = None,
        stopping: Callable[[], bool] = lambda: False,
        begin_at_least: Callable[[], Any] = lambda: Priority.BACKGROUND,
        **settings: Any,
    ) -> Worker:
        return Worker(
            self.queue,
            engines={"ct-abdomen": self.engine},
            timeouts_s={"ct-abdomen": 60.0},
            encoders=self.encoders,
            stage=stage or self.ingest.stage,
            read_header=read_series_header,
            settings=JobSettings(**settings),
            node_name="TEST",
            time_zone="+0000",
            clock=self.clock,
            observer=observer or Unobserved(),
            stopping=stopping,
            begin_at_least=begin_at_least,
            jitter=lambda: 0.5,
            keep=self.catalog.quarantine.keep,
        )

    def courier(
        self, *names: str, sender: Any = None, observer: Any = None, asker: Any = None, **settings: Any
    ) -> Courier:
        """With an `asker` every destination offers storage commitment."""
        times = CommitmentTimes(wait_s=1.0, timeout_s=60.0) if asker is not None else None
        destinations = {
            name: Destination(name=name, ae_title=name, host="127.0.0.1", port=104, commitment=times)
            for name in names or ("PACS",)
        }
        return Courier(
            self.queue,
            sender or self.peer,
            destinations,
            settings=DeliverySettings(**settings),
            clock=self.clock,
            observer=observer or Unobserved(),
            asker=asker,
            jitter=lambda: 0.5,
        )

    def committer(self, reporter: Any, *names: str, **settings: Any) -> Committer:
        """Reports for peers of these AE titles."""
        return Committer(
            self.queue,
            self.catalog.index,
            self.archive,
            reporter,
            {name: Destination(name=name, ae_title=name, host="127.0.0.1", port=104) for name in names or ("CT1",)},
            ("NODE",),
            settings=DeliverySettings(**settings),
            clock=self.clock,
            jitter=lambda: 0.5,
        )

    def produced(self) -> list[StoredInstance]:
        with self.database.read() as connection:
            rows = connection.execute("SELECT * FROM instance WHERE origin = 'produced' ORDER BY modality").fetchall()
        return [self.queue.stored(row) for row in rows]


class Recorder:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def encoded(ds: Dataset, syntax: str = EXPLICIT) -> bytes:
    """The data set's bytes in a transfer syntax."""
    uid = pydicom.uid.UID(syntax)
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = uid.is_implicit_VR
    buffer.is_little_endian = uid.is_little_endian
    write_dataset(buffer, ds)
    if uid.is_deflated:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return deflate.compress(buffer.getvalue()) + deflate.flush()
    return buffer.getvalue()


# --- dying at a point ------------------------------------------------------------------------------------------------


def _dying_at(point: str) -> Callable[[str], None]:
    def die(here: str) -> None:
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def _after(die: Callable[[str], None], point: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        value = fn(*args, **kwargs)
        die(point)
        return value

    return called


def _before(die: Callable[[str], None], point: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        die(point)
        return fn(*args, **kwargs)

    return called


def die_at(folder: str, role: str, point: str) -> None:
    """Work or deliver until there is nothing left, or until `point` is reached."""
    die = _dying_at(point)
    bench = Bench(Path(folder), SystemClock())
    queue: Any = bench.queue
    if role == "submit":
        bench.engine = RemoteEngine(Path(folder), die)
        worker = bench.worker()
        while worker.run_once("child"):
            pass
    elif role == "work":
        queue.lease_job = _after(die, "leased", queue.lease_job)
        bench.engine.during = lambda: die("running")
        queue.finish_job = _after(die, "finished", _before(die, "staged", queue.finish_job))
        worker = bench.worker(_after(die, "first staged", bench.ingest.stage))
        while worker.run_once("child"):
            pass
    elif role == "commit":
        queue.begin_commitment = _before(die, "sent", _after(die, "begun", queue.begin_commitment))
        queue.settle_delivery = _after(die, "settled", queue.settle_delivery)
        asker = Asker(report_on, die=die)
        courier = bench.courier(sender=FolderPeer(Path(folder) / "peer", lambda here: None), asker=asker)
        while courier.run_once("PACS"):
            pass
    elif role == "delete":
        archive: Any = bench.archive
        queue.begin_deletion = _before(die, "told", _after(die, "begun", queue.begin_deletion))
        archive.remove = _after(die, "first removed", archive.remove)
        archive.sync_names = _before(die, "removed", _after(die, "synced", archive.sync_names))
        queue.end_deletion = _after(die, "ended", queue.end_deletion)
        order = DeletionOrder(study_instance_uid=STUDY, rule="old", who="r", why="old", holds=frozenset(Hold))
        Deleter(queue, archive, ae_title="NODE").delete(order)
    elif role == "report":
        queue.judge_commitment = _before(die, "checked", _after(die, "judged", queue.judge_commitment))
        queue.claim_commitment = _after(die, "claimed", queue.claim_commitment)
        queue.end_commitment = _after(die, "ended", queue.end_commitment)
        committer = bench.committer(FolderReporter(Path(folder) / "peer", die))
        while committer.run_once("CT1"):
            pass
    else:
        queue.lease_delivery = _after(die, "leased", queue.lease_delivery)
        queue.finish_delivery = _after(die, "finished", _before(die, "all sent", queue.finish_delivery))
        courier = bench.courier(sender=FolderPeer(Path(folder) / "peer", die))
        while courier.run_once("PACS"):
            pass
    bench.close()


def serve() -> None:
    """One child for each line `folder<TAB>role<TAB>point`; answers with its exit code. Forking saves the imports."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            die_at(*line.rstrip("\n").split("\t"))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
