"""What `soak.py` does to the node: rounds of stores, queries, gets and moves, timed; what was acknowledged is kept."""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from _bench_objects import CT, EXPLICIT_LE, SMALL, Batch, Image
from _raw_client import (
    IMPLICIT_LE,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    VERIFICATION,
    RawAssociation,
    ServerFault,
)
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.demo.phantom_dicom import write_cxr

__all__ = ["DX", "Load", "Sample", "StoredStudy", "films"]

DX = "1.2.840.10008.5.1.4.1.1.1.1"
STORE_PATIENCE_S = 120.0
PAUSE_S = 0.2
KEPT_FOR_GETS = 400
WAITING_ROUNDS = 50
SMALL_IMAGES, CT_IMAGES = 20, 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it began (monotonic), how long it took; `ok` is False where no good answer came."""

    at_s: float
    kind: str
    seconds: float
    ok: bool


@dataclass(slots=True)
class StoredStudy:
    """What was acknowledged of a study: SOP Instance UID to the SHA-256 of its data set."""

    uid: str
    modality: str
    digests: dict[str, str] = field(default_factory=dict)


def films(folder: Path, count: int = 4) -> list[pydicom.Dataset]:
    """Phantom radiographs that the demonstration model takes."""
    for number in range(count):
        write_cxr(folder / f"film-{number}.dcm", 930_000 + number)
    return [pydicom.dcmread(path) for path in sorted(folder.glob("film-*.dcm"))]


class Load:
    """Rounds of requests on one node. Thread-safe; `samples` and `studies` grow."""

    def __init__(self, port: int, called: str, pacs: str, radiographs: Sequence[pydicom.Dataset]) -> None:
        self._port, self._called, self._pacs, self._radiographs = port, called, pacs, radiographs
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._rounds: queue.Queue[int] = queue.Queue(maxsize=WAITING_ROUNDS)
        self._threads: list[threading.Thread] = []
        self._films = 0
        self.samples: list[Sample] = []
        self.studies: list[StoredStudy] = []
        self.troubles: Counter[str] = Counter()
        self.skipped = 0
        self.given_up: list[str] = []

    # --- pace

    def as_fast_as_possible(self, seconds: float, threads: int) -> int:
        """Rounds done in that time, one after the other on each thread."""
        until_s, done = time.monotonic() + seconds, Counter[str]()

        def work(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until_s:
                self._round(chance)
                done["rounds"] += 1

        workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return done["rounds"]

    @contextmanager
    def at(self, rounds_per_s: float, threads: int) -> Iterator[None]:
        """Rounds begin at this rate while the block runs, whether the node keeps up or not."""
        self._stopping.clear()
        self._threads = [
            threading.Thread(target=self._pace, args=(rounds_per_s,), daemon=True),
            *(threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(threads)),
        ]
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join(STORE_PATIENCE_S + 60)

    def _pace(self, rounds_per_s: float) -> None:
        next_s, number = time.monotonic(), 0
        while not self._stopping.wait(max(next_s - time.monotonic(), 0.0)):
            next_s, number = next_s + 1 / rounds_per_s, number + 1
            try:
                self._rounds.put_nowait(number)
            except queue.Full:
                self.skipped += 1

    def _work(self, number: int) -> None:
        chance = random.Random(number)
        while not self._stopping.is_set():
            try:
                self._rounds.get(timeout=0.2)
            except queue.Empty:
                continue
            self._round(chance)

    # --- one round

    def _round(self, chance: random.Random) -> None:
        steps: list[Callable[[], None]] = [
            lambda: self._store_batch(Batch(SMALL, SMALL_IMAGES), "SMALL"),
            lambda: self._store_batch(Batch(CT, CT_IMAGES), "CT"),
            self._store_film,
            *(lambda: self._echo(), lambda: self._find(chance), lambda: self._find(chance)),
            lambda: self._get(chance),
        ]
        if chance.random() < 0.3:
            steps.append(lambda: self._move(chance))
        chance.shuffle(steps)
        for step in steps:
            step()

    def _timed(self, kind: str, request: Callable[[], object]) -> bool:
        began_s = time.monotonic()
        try:
            request()
            ok = True
        except (OSError, ServerFault) as exc:
            ok = False
            self.troubles[f"{kind}: {exc if isinstance(exc, ServerFault) else type(exc).__name__}"] += 1
        self.samples.append(Sample(began_s, kind, time.monotonic() - began_s, ok))
        return ok

    def _associate(self, contexts: Mapping[str, str], as_scp: Iterable[str] = ()) -> RawAssociation | None:
        try:
            return RawAssociation(self._port, self._called, contexts, as_scp)
        except (OSError, ServerFault) as exc:
            self.troubles[f"association: {type(exc).__name__}"] += 1
            return None

    def _store_batch(self, batch: Batch, kind: str) -> None:
        study = StoredStudy(batch.study_uid(0), "CT")
        self._store(study, [batch.image(number) for number in range(len(batch))], f"C-STORE {kind}")

    def _store_film(self) -> None:
        with self._lock:
            self._films += 1
            ds = self._radiographs[self._films % len(self._radiographs)]
            uid = f"2.25.{random.SystemRandom().getrandbits(100)}"
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = uid, f"{uid}.1", f"{uid}.1.1"
            stream = DicomBytesIO()
            stream.is_little_endian, stream.is_implicit_VR = True, False
            write_dataset(stream, ds)
        body = stream.getvalue()
        image = Image(DX, f"{uid}.1.1", body, memoryview(b""))
        self._store(StoredStudy(uid, "DX"), [image], "C-STORE DX")

    def _store(self, study: StoredStudy, images: Sequence[Image], kind: str) -> None:
        """Every image until it is acknowledged, on as many associations as that takes."""
        left, until_s = list(images), time.monotonic() + STORE_PATIENCE_S
        with self._lock:
            self.studies.append(study)
        while left:
            association = self._associate({left[0].sop_class_uid: EXPLICIT_LE})
            while association is not None and left:
                image = left[0]
                parts = [part for part in (image.head, image.pixels) if len(part)]

                def ask(image: Image = image, to: RawAssociation = association, parts: list[object] = parts) -> None:  # type: ignore[assignment]
                    to.store(image.sop_class_uid, image.sop_instance_uid, parts)  # type: ignore[arg-type]

                if not self._timed(kind, ask):
                    break
                study.digests[image.sop_instance_uid] = _digest(parts)
                del left[0]
            if not left and association is not None:
                self._timed("release", association.release)
            elif time.monotonic() > until_s:
                self.given_up.append(study.uid)
                return
            else:
                time.sleep(PAUSE_S)

    def _some_study(self, chance: random.Random, modality: str = "CT") -> StoredStudy | None:
        with self._lock:
            recent = [one for one in self.studies[-KEPT_FOR_GETS:] if one.digests and one.modality == modality]
        return chance.choice(recent) if recent else None

    def _on_association(
        self,
        kind: str,
        contexts: Mapping[str, str],
        ask: Callable[[RawAssociation], object],
        as_scp: Iterable[str] = (),
    ) -> None:
        association = self._associate(contexts, as_scp)
        if association is not None and self._timed(kind, lambda: ask(association)):
            self._timed("release", association.release)

    def _echo(self) -> None:
        self._on_association("C-ECHO", {VERIFICATION: IMPLICIT_LE}, lambda association: association.echo())

    def _find(self, chance: random.Random) -> None:
        study = self._some_study(chance)
        if study is None:
            return
        keys = {0x0008_0052: "STUDY", 0x0020_000D: study.uid, 0x0010_0020: "", 0x0020_1208: ""}
        self._on_association("C-FIND", {STUDY_FIND: IMPLICIT_LE}, lambda association: association.find(keys))

    def _get(self, chance: random.Random) -> None:
        study = self._some_study(chance)
        if study is not None:
            self.fetch(study, lambda uid, pieces: None)

    def fetch(self, study: StoredStudy, sink: Callable[[str, Iterable[bytes]], None]) -> None:
        """C-GET all of it."""
        classes = (CT.sop_class_uid, DX)
        contexts = {STUDY_GET: IMPLICIT_LE, **dict.fromkeys(classes, EXPLICIT_LE)}
        if study.modality == "DX":
            contexts["1.2.840.10008.5.1.4.1.1.88.34"] = EXPLICIT_LE
        as_scp = [uid for uid in contexts if uid != STUDY_GET]
        self._on_association("C-GET", contexts, lambda association: association.get(study.uid, sink), as_scp)

    def _move(self, chance: random.Random) -> None:
        study = self._some_study(chance)
        if study is not None:
            contexts = {STUDY_MOVE: IMPLICIT_LE}
            self._on_association("C-MOVE", contexts, lambda association: association.move(study.uid, self._pacs))


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
