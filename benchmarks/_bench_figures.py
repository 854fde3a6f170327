"""What `peers.py` measures of one running system, and the clients it does it with."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _bench_objects import CT, CXR, EXPLICIT_LE, INDEX, SMALL, Batch, Workload, day_of, family_of, patient_of
from _bench_report import Figure, Report
from _bench_systems import Sink, System, Usage
from _raw_client import IMPLICIT_LE, STUDY_FIND, STUDY_GET, VERIFICATION, RawAssociation

__all__ = [
    "FIND_MS",
    "FIND_TARGETS",
    "QUICK",
    "STARTS",
    "STUDY_BYTES",
    "Bench",
    "Size",
    "at_once",
    "question",
    "raw_sender",
]

FORK = get_context("fork")
CLIENT_S = 600.0
PAUSE_S = 0.005  # between two questions of one who asks beside others
VISIBLE_S = 20.0
STUDY_BYTES = 300 * 512 * 512 * 2
LEVEL, STUDY_UID, SERIES_UID, SOP_UID = 0x0008_0052, 0x0020_000D, 0x0020_000E, 0x0008_0018
DATE, NAME, PATIENT_ID = 0x0008_0020, 0x0010_0010, 0x0010_0020
RETURNED = (DATE, 0x0008_0030, 0x0008_0050, 0x0008_0061, 0x0008_1030, NAME, PATIENT_ID, STUDY_UID, 0x0020_0010)

Work = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is sent and how long is asked."""

    slices: int = 300
    films: int = 50
    small: int = 2000
    stock: int = 40
    studies: int = 1000
    seconds: float = 2.0


QUICK = Size(slices=40, films=6, small=150, stock=8, studies=200, seconds=0.5)


@dataclass
class Bench:
    """One system in one round, and where its figures go."""

    system: System
    size: Size
    report: Report
    work: Path  # in memory, where there is room: what clients read costs the disk nothing
    chosen: set[str]
    environment: dict[str, str] = field(default_factory=dict)

    def add(self, figure: Figure, value: float) -> None:
        """One sample of this system."""
        self.report.add(figure, self.system.name, value)

    def fault(self, text: str) -> None:
        """Something that makes a figure worthless."""
        self.report.faults.append(f"{self.system.name}: {text}")

    def associate(self, contexts: dict[str, str], as_scp: Iterable[str] = ()) -> RawAssociation:
        """A raw association with it."""
        return RawAssociation(self.system.port, self.system.ae_title, contexts, as_scp)

    def tool(self, *command: str) -> list[str]:
        """A dcmtk client's command line up to its options."""
        name, *options = command
        return [name, "-aet", "BENCH", "-aec", self.system.ae_title, *options, "127.0.0.1", str(self.system.port)]


# --- several clients at once -----------------------------------------------------------------------------------------


def at_once(jobs: list[Callable[[Callable[[], object]], Any]]) -> tuple[float, list[Any]]:
    """Run each in a process of its own; seconds from the moment all are ready to the last one's end, and their results.

    A job calls what it is given when it is ready, and works from there on. Raises SystemExit when one fails.
    """
    barrier = FORK.Barrier(len(jobs))
    pipes, processes = [], []
    for job in jobs:
        receiving, sending = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=_client, args=(job, barrier, sending), daemon=True))
        processes[-1].start()
        sending.close()
        pipes.append(receiving)
    answers = []
    try:
        for pipe in pipes:
            if not pipe.poll(CLIENT_S):
                raise SystemExit("a client took too long")
            answers.append(pipe.recv())
    except EOFError:
        raise SystemExit("a client failed; its traceback is above") from None
    finally:
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.terminate()
    begun, ended = min(answer[0] for answer in answers), max(answer[1] for answer in answers)
    return ended - begun, [answer[2] for answer in answers]


def _client(job: Callable[[Callable[[], object]], Any], barrier: Any, answer: Any) -> None:
    begun = 0.0

    def ready() -> None:
        nonlocal begun
        barrier.wait(CLIENT_S)
        begun = time.perf_counter()

    try:
        result = job(ready)
    except BaseException:
        barrier.abort()
        raise
    answer.send((begun, time.perf_counter(), result))


def tools_at_once(commands: list[list[str]], environment: dict[str, str]) -> float:
    """Seconds from the first one's start to the last one's end."""
    began = time.perf_counter()
    quiet = subprocess.DEVNULL
    processes = [subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment) for command in commands]
    overdue = threading.Timer(CLIENT_S, lambda: [process.kill() for process in processes])
    overdue.start()
    try:
        for process in processes:
            process.wait()  # with a timeout Python would look every 50 ms, a sixth of what getscu takes
    finally:
        overdue.cancel()
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return time.perf_counter() - began


# --- C-STORE ---------------------------------------------------------------------------------------------------------


def raw_sender(bench: Bench, batch: Batch, part: int, parts: int) -> Callable[[Callable[[], object]], None]:
    """Sends its share over one association; the association is counted."""

    def send(ready: Callable[[], object]) -> None:
        images = [batch.image(number) for number in batch.share(part, parts)]
        ready()
        association = bench.associate({batch.workload.sop_class_uid: EXPLICIT_LE})
        for image in images:
            association.store(image.sop_class_uid, image.sop_instance_uid, (image.head, image.pixels))
        association.release()

    return send


def store(bench: Bench, workload: Workload, count: int, client: str, associations: int) -> tuple[Batch, float]:
    """Send a fresh batch; it and the seconds it took. Whatever did not arrive is a fault."""
    batch = Batch(workload, count)
    os.sync()  # what was written before is not this figure's to pay
    if client == "raw":
        took, _ = at_once([raw_sender(bench, batch, part, associations) for part in range(associations)])
    else:
        folder = bench.work / "sent"
        paths = batch.write(folder)
        options = [] if bench.system.stock else ["-pdu", "131072", "--max-send-pdu", "131072"]
        commands = [
            bench.tool("storescu", *options) + [str(paths[number]) for number in batch.share(part, associations)]
            for part in range(associations)
        ]
        took = tools_at_once(commands, bench.environment)
        shutil.rmtree(folder)
    arrived = visible(bench, batch)
    if arrived != count:
        bench.fault(f"{arrived} of {count} {workload.name} can be found after {client} x {associations}")
    return batch, took


def visible(bench: Bench, batch: Batch) -> int:
    """How many of its images a C-FIND finds, as soon as it finds all, or after a while."""
    deadline = time.monotonic() + VISIBLE_S
    association = bench.associate({STUDY_FIND: IMPLICIT_LE})
    while True:
        found = 0
        for study in batch.studies:
            keys = {LEVEL: "IMAGE", STUDY_UID: batch.study_uid(study), SERIES_UID: batch.series_uid(study), SOP_UID: ""}
            found += association.find(keys)
        if found >= len(batch) or time.monotonic() > deadline:
            association.release()
            return found
        time.sleep(0.1)


def unchanged(bench: Bench, batch: Batch) -> None:
    """Whether C-GET gives back the bytes that were sent; anything else is a fault."""
    sent = {}
    for number in range(len(batch)):
        image = batch.image(number)
        digest = hashlib.sha256(image.head)
        digest.update(image.pixels)
        sent[image.sop_instance_uid] = digest.digest()
    other = []

    def compare(uid: str, pieces: Iterable[bytes]) -> None:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        if sent.pop(uid, None) != digest.digest():
            other.append(uid)

    sop_class = batch.workload.sop_class_uid
    association = bench.associate({STUDY_GET: IMPLICIT_LE, sop_class: EXPLICIT_LE}, [sop_class])
    for study in batch.studies:
        association.get(batch.study_uid(study), compare)
    association.release()
    if sent or other:
        bench.fault(f"{batch.workload.name}: {len(other)} came back changed, {len(sent)} did not come back")


CT_TARGETS = {("storescu", 1): 2.0, ("storescu", 4): 2.0, ("storescu", 8): 1.9, ("raw", 1): 3.0, ("raw", 8): 2.5}


def ct_figures(bench: Bench) -> None:
    """C-STORE of a CT series, then what can be done with it."""
    if "store-ct" in bench.chosen:
        for (client, associations), target in CT_TARGETS.items():
            with Usage(bench.system.pid) as usage:
                batch, took = store(bench, CT, bench.size.slices, client, associations)
                time.sleep(1.0)
            name = f"C-STORE CT 528 KB, {client} {associations}"
            bench.add(Figure(name=name, unit="MB/s", target=target), batch.size / took / 1e6)
            if (client, associations) == ("raw", 1):
                figure = Figure(name="processor time of a CT study", unit="s", target=0.25, less_is_better=True)
                bench.add(figure, usage.cpu_s * STUDY_BYTES / batch.size)
            if (client, associations) == ("raw", 8):
                figure = Figure(name="peak size, 8 associations", unit="MB", target=0.3, less_is_better=True)
                bench.add(figure, usage.peak_mb)
    else:
        batch, _ = store(bench, CT, bench.size.slices, "raw", 1)
    unchanged(bench, batch)
    if "get" in bench.chosen:
        get_figures(bench, batch)
    if "move" in bench.chosen:
        move_figure(bench, batch)


def cxr_figures(bench: Bench) -> None:
    """C-STORE of large single images."""
    for associations in (1, 8):
        batch, took = store(bench, CXR, bench.size.films, "storescu", associations)
        figure = Figure(name=f"C-STORE CXR 10 MB, storescu {associations}", unit="MB/s", target=2.5)
        bench.add(figure, batch.size / took / 1e6)
    unchanged(bench, batch)


def small_figures(bench: Bench) -> None:
    """C-STORE of small images, and C-GET of the last ones."""
    for associations, target in ((1, 2.0), (8, 4.0)):
        batch, took = store(bench, SMALL, bench.size.small, "raw", associations)
        figure = Figure(name=f"C-STORE small 11 KB, raw {associations}", unit="objects/s", target=target)
        bench.add(figure, len(batch) / took)
    unchanged(bench, batch)
    figure = Figure(name="C-GET small 11 KB, raw 1", unit="objects/s", target=3.0)
    bench.add(figure, len(batch) / get(bench, batch, 1))


def stock_figures(bench: Bench) -> None:
    """dcmtk and Orthanc as they are shipped."""
    batch, took = store(bench, CT, bench.size.stock, "storescu", 1)
    figure = Figure(name="as shipped: C-STORE CT, storescu 1", unit="MB/s", target=10)
    bench.add(figure, batch.size / took / 1e6)
    took = getscu(bench, batch)
    bench.add(Figure(name="as shipped: C-GET CT, getscu", unit="MB/s", target=10), batch.size / took / 1e6)


# --- C-GET, C-MOVE ---------------------------------------------------------------------------------------------------


def get_figures(bench: Bench, batch: Batch) -> None:
    """The study to 1 and to 4 raw clients, each getting all of it, and to getscu."""
    for associations, target in ((1, 1.5), (4, 2.0)):
        took = get(bench, batch, associations)
        figure = Figure(name=f"C-GET CT 528 KB, raw {associations}", unit="MB/s", target=target)
        bench.add(figure, associations * batch.size / took / 1e6)
    took = getscu(bench, batch)
    bench.add(Figure(name="C-GET CT 528 KB, getscu", unit="MB/s", target=1.4), batch.size / took / 1e6)


def get(bench: Bench, batch: Batch, associations: int) -> float:
    """Seconds that so many raw clients take, each getting all of a batch, study by study."""
    sop_class = batch.workload.sop_class_uid

    def fetch(ready: Callable[[], object]) -> int:
        association = bench.associate({STUDY_GET: IMPLICIT_LE, sop_class: EXPLICIT_LE}, [sop_class])
        ready()
        found = sum(association.get(batch.study_uid(study)) for study in batch.studies)
        association.release()
        return found

    took, found = at_once([fetch] * associations)
    if set(found) != {len(batch)}:
        bench.fault(f"C-GET brought {found} of {len(batch)}")
    return took


def getscu(bench: Bench, batch: Batch) -> float:
    """Seconds that dcmtk's getscu takes; it writes what comes as it comes."""
    folder = bench.work / "fetched"
    folder.mkdir()
    options = [] if bench.system.stock else ["-pdu", "131072"]
    command = bench.tool("getscu", "-S", *options, "+B", "-od", str(folder)) + _study_key(batch)
    took = tools_at_once([command], bench.environment)
    if (found := len(list(folder.iterdir()))) != len(batch):
        bench.fault(f"getscu wrote {found} of {len(batch)}")
    shutil.rmtree(folder)
    return took


def move_figure(bench: Bench, batch: Batch) -> None:
    """The study to dcmtk's storescp."""
    command = bench.tool("movescu", "-S", "-aem", "BENCHSINK", "--no-port") + _study_key(batch)
    with Sink(bench.work / "sink", bench.system.sink_port) as received:
        took = tools_at_once([command], bench.environment)
        deadline = time.monotonic() + VISIBLE_S
        while (found := len(list(received.iterdir()))) < len(batch) and time.monotonic() < deadline:
            time.sleep(0.05)
    if found != len(batch):
        bench.fault(f"C-MOVE brought {found} of {len(batch)}")
    bench.add(Figure(name="C-MOVE CT 528 KB to storescp", unit="MB/s", target=1.0), batch.size / took / 1e6)


def _study_key(batch: Batch) -> list[str]:
    return ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={batch.study_uid(0)}"]


# --- C-FIND, C-ECHO, associations ------------------------------------------------------------------------------------


# over an index of 5,000 studies, times Orthanc's
FIND_TARGETS = {"StudyInstanceUID": 30.0, "PatientID": 30.0, "PatientName*": 25.0, "StudyDate": 14.0}
FIND_MS = {"StudyInstanceUID": 0.3, "PatientName*": 5.0}  # and the most of a median answer over one of 100,000


def question_figures(bench: Bench) -> None:
    """What moves no images."""
    if "echo" in bench.chosen:
        echo_figures(bench)
    if "find" in bench.chosen:
        find_figures(bench)


def find_figures(bench: Bench) -> None:
    """One client's questions to an index of N studies of one image each, ten keys returned."""
    count = bench.size.studies
    batch = Batch(INDEX, count)
    at_once([raw_sender(bench, batch, part, 4) for part in range(4)])
    association = bench.associate({STUDY_FIND: IMPLICIT_LE})
    try:
        if (arrived := association.find({LEVEL: "STUDY", NAME: "Family*", STUDY_UID: ""})) != count:
            bench.fault(f"{arrived} of {count} studies can be found")
        for kind, target in FIND_TARGETS.items():
            chooser = random.Random(1)
            rows: list[int] = []

            def ask(kind: str = kind, chooser: random.Random = chooser, rows: list[int] = rows) -> None:
                rows.append(association.find(question(batch, kind, chooser.randrange(count))))

            took = timed(ask, bench.size.seconds)
            if 0 in rows:
                bench.fault(f"C-FIND by {kind} found nothing")
            name, few = f"C-FIND {count} studies, {kind}", f"at 5000 studies >= {target:g}x"
            figure = Figure(
                name=name, unit="/s", target=None if count < 5000 else target, note=few if count < 5000 else ""
            )
            bench.add(figure, len(took) / sum(took))
            at_most = f"at 100000 studies <= {FIND_MS[kind]:g} ms" if kind in FIND_MS else ""
            figure = Figure(name=f"  its median answer, {kind}", unit="ms", less_is_better=True, note=at_most)
            bench.add(figure, statistics.median(took) * 1e3)
    finally:
        association.release()


def question(batch: Batch, kind: str, study: int) -> dict[int, str]:
    """The identifier that finds study number `study` by this kind of key, ten keys returned."""
    keys = dict.fromkeys(RETURNED, "") | {LEVEL: "STUDY"}
    if kind == "StudyInstanceUID":
        keys[STUDY_UID] = batch.study_uid(study)
    elif kind == "PatientID":
        keys[PATIENT_ID] = patient_of(study)
    elif kind == "PatientName*":
        keys[NAME] = f"Family{family_of(study)}*"
    else:
        keys[DATE] = day_of(study)
    return keys


def echo_figures(bench: Bench) -> None:
    """One client that echoes, and one that associates, echoes and releases, again and again."""
    contexts = {VERIFICATION: IMPLICIT_LE}
    association = bench.associate(contexts)
    took = timed(association.echo, bench.size.seconds)
    association.release()
    bench.add(Figure(name="C-ECHO, 1 association", unit="/s", target=0.9), len(took) / sum(took))

    def associate() -> None:
        opened = bench.associate(contexts)
        opened.echo()
        opened.release()

    took = timed(associate, bench.size.seconds)
    bench.add(Figure(name="associations, 1 client", unit="/s", target=0.7), len(took) / sum(took))


def busy_figures(bench: Bench) -> None:
    """How soon others are answered while 8 associations store."""
    associations, over = 8, FORK.Value("i", 0)
    batch = Batch(CT, bench.size.slices)

    def send(part: int) -> Callable[[Callable[[], object]], None]:
        act = raw_sender(bench, batch, part, associations)

        def job(ready: Callable[[], object]) -> None:
            try:
                act(ready)
            finally:
                with over.get_lock():
                    over.value += 1

        return job

    def asked(act: Callable[[], object]) -> list[float]:
        took = []
        while over.value < associations:
            began = time.perf_counter()
            act()
            took.append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
        return took

    def echo(ready: Callable[[], object]) -> list[float]:
        association = bench.associate({VERIFICATION: IMPLICIT_LE})
        ready()
        took = asked(association.echo)
        association.release()
        return took

    def ping(ready: Callable[[], object]) -> list[float]:
        url = f"http://127.0.0.1:{bench.system.http_port}{bench.system.ping}"
        ready()
        return asked(lambda: urllib.request.urlopen(url, timeout=CLIENT_S).read())

    _, answers = at_once([echo, ping, *(send(part) for part in range(associations))])
    for name, took, most_ms in (("C-ECHO", answers[0], 50), ("/ping", answers[1], 100)):
        figure = Figure(
            name=f"{name} while 8 store, p99 answer", unit="ms", less_is_better=True, note=f"<= {most_ms} ms"
        )
        bench.add(figure, sorted(took)[int(len(took) * 0.99)] * 1e3)


def timed(act: Callable[[], object], seconds: float) -> list[float]:
    """How long each `act` took, for so long, after a few that do not count."""
    for _ in range(3):
        act()
    took, ends = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < ends:
        act()
        took.append(time.perf_counter() - begun)
    return took


# a system is started anew for each: the names of --figures, and what is measured
STARTS: tuple[tuple[frozenset[str], Callable[[Bench], None], bool], ...] = (
    (frozenset({"store-ct", "get", "move"}), ct_figures, False),
    (frozenset({"store-cxr"}), cxr_figures, False),
    (frozenset({"store-small"}), small_figures, False),
    (frozenset({"find", "echo"}), question_figures, False),
    (frozenset({"busy"}), busy_figures, False),
    (frozenset({"stock"}), stock_figures, True),
)
