"""The intake journal after a crash: every acknowledged object is in its place and indexed, and nothing twice."""

import hashlib
import io
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, StorageSettings
from dicom_node.model import ArchivedFile, BootTime, ConflictPolicy, Origin, Receipt, Source, StoreOutcome
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.fsck import fsck
from dicom_node.pipeline.ingest import Ingest
from dicom_node.retention import DeletionOrder
from dicom_node.store.catalog import Catalog
from dicom_node.store.database import Database
from dicom_node.wiring import node_catalog, replay_journals, start_journal

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
SENDER = Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1", association_id="one")


class Ticking:
    """Each look is a moment later."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, tzinfo=UTC)

    def wall(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def boot(self) -> BootTime:
        return SystemClock().boot()

    def sleep(self, seconds: float) -> None:
        return None


@dataclass
class Node:
    """A receiver's catalog and door on one data folder."""

    folder: Path
    clock: Ticking
    policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST

    def __post_init__(self) -> None:
        storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, journal_bytes=16 * 1024**2)
        self.config = NodeConfig(data_dir=self.folder, storage=storage)
        self.catalog: Catalog = node_catalog(self.config, self.clock)

    def begin(self) -> "Node":
        """Replay, then receive with a journal."""
        replay_journals(self.catalog, self.config)
        return self.open_door(0)

    def open_door(self, number: int) -> "Node":
        """Receive with the journal of that number."""
        start_journal(self.catalog, self.config, number)
        journal = self.catalog.archive.journal
        assert journal is not None
        deadline = time.monotonic() + 10
        while not journal._segments:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.ingest = Ingest(
            self.catalog.archive,
            self.catalog.index,
            conflict_policy_for=lambda source: self.policy,
            origin_for=lambda source: Origin.RECEIVED,
            max_object_bytes=2**30,
            max_inflated_header_bytes=2**20,
            clock=self.clock,
        )
        return self

    def send(self, uid: str, body: bytes) -> StoreOutcome | None:
        pieces = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
        return self.ingest.accept(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, fragments=pieces, source=SENDER
        ).outcome

    def archived(self, uid: str, body: bytes, source_ae: str = "CT1") -> ArchivedFile:
        """Received as far as the archive goes; without a row."""
        spool = self.catalog.archive.begin(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, source_ae=source_ae
        )
        spool.write(body)
        return spool.commit(
            Receipt(
                source=SENDER,
                origin=Origin.RECEIVED,
                conflict_policy=self.policy,
                received_at=self.clock.wall(),
                received_boot=self.clock.boot(),
            )
        )

    def kept(self, uid: str) -> bytes:
        found = self.catalog.index.instance(uid)
        assert found is not None, f"{uid} is lost"
        return Path(found.path).read_bytes()[found.data_set_offset :]

    def check(self) -> None:
        """Archive and index agree, down to the bytes."""
        report = fsck(self.catalog, rebuild=False, verify_hashes=True, clock=self.clock)
        assert report.clean, report


def image(uid: str, size: int = 3000, **attributes: Any) -> bytes:
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CT, uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.1", "1.2.826.1.1"
    ds.PatientID, ds.Modality = "P1", "CT"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.add_new("PixelData", "OW", os.urandom(size // 2 * 2))
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=True)
    return out.getvalue()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Nodes on folders of those names, all with one clock."""
    clock, made = Ticking(), []

    def opened(name: str) -> Node:
        made.append(Node(tmp_path / name, clock))
        return made[-1]

    yield opened
    for one in made:
        one.catalog.close()


def test_what_was_deleted_does_not_come_back_from_the_journal(node: Callable[[str], Node], tmp_path: Path) -> None:
    running = node("one").begin()
    bodies = {f"1.2.3.{number}": image(f"1.2.3.{number}") for number in range(4)}
    for uid, body in bodies.items():
        assert running.send(uid, body) is StoreOutcome.NEW
    order = DeletionOrder(study_instance_uid="1.2.826.1", rule="old", who="r", why="old", holds=frozenset())
    queue, archive = running.catalog.queue, running.catalog.archive
    deletion = queue.begin_deletion(order)
    queue.remove_doomed(queue.doomed(deletion)[:2], archive.remove)  # and here the power goes
    assert running.send("1.2.3.1", bodies["1.2.3.1"]) in (StoreOutcome.NEW, None)  # one comes again, and is a new one
    again = running.send("1.2.3.1", bodies["1.2.3.1"])
    assert again in (StoreOutcome.NEW, StoreOutcome.DUPLICATE)
    shutil.copytree(running.folder, tmp_path / "after")

    after = node("after")
    replay_journals(after.catalog, after.config)
    assert after.catalog.queue.ledger().totals["imbalance"] == 0
    deleter = Deleter(after.catalog.queue, after.catalog.archive, ae_title="NODE")
    assert deleter.finish_all() == 1
    assert after.kept("1.2.3.1") == bodies["1.2.3.1"]
    assert [after.catalog.index.instance(uid) for uid in bodies if uid != "1.2.3.1"] == [None] * 3
    assert len(list(after.catalog.archive.locations())) == 1
    after.check()


def test_what_two_receivers_acknowledge_while_its_study_is_deleted_is_kept(
    node: Callable[[str], Node], tmp_path: Path
) -> None:
    doors, other = (node("one").begin(), node("one").open_door(1)), node("one").catalog
    deleter = Deleter(other.queue, other.archive, ae_title="NODE")
    order = DeletionOrder(study_instance_uid="1.2.826.1", rule="old", who="r", why="old", holds=frozenset())
    bodies = {f"1.2.3.{number}": image(f"1.2.3.{number}") for number in range(8)}
    acknowledged: list[tuple[float, str]] = []
    stop, sent_once = threading.Event(), threading.Semaphore(0)

    def send_on(door: Node) -> None:
        while not stop.is_set():
            for uid, body in bodies.items():
                began = time.monotonic()
                if door.send(uid, body) is not None:
                    acknowledged.append((began, uid))
            sent_once.release()

    senders = [threading.Thread(target=send_on, args=(door,)) for door in doors]
    for sender in senders:
        sender.start()
    for _ in range(6):
        assert sent_once.acquire(timeout=60) and sent_once.acquire(timeout=60)
        deletion = other.queue.begin_deletion(order)
        gone_at = time.monotonic()
        deleter.finish(deletion)
    while not any(began > gone_at for began, _ in list(acknowledged)):
        assert sent_once.acquire(timeout=60)
    stop.set()
    for sender in senders:
        sender.join(60)
    since = {uid for began, uid in acknowledged if began > gone_at}
    power_cut(doors[0], tmp_path / "after", wal_bytes=None, lost=lambda path: True)

    after = node("after")
    replay_journals(after.catalog, after.config)
    Deleter(after.catalog.queue, after.catalog.archive, ae_title="NODE").finish_all()
    for uid in since:
        assert doors[1].kept(uid) == after.kept(uid) == bodies[uid]
    for one in (doors[0], after):
        one.check()
        assert one.catalog.queue.audit_counts(repair=False) == [] and not one.catalog.queue.ledger().unaccounted


def power_cut(node: Node, to: Path, *, wal_bytes: int | None, lost: Callable[[Path], bool]) -> None:
    """What a power cut leaves of a node under way: its journal, a beginning of its WAL, and the files not `lost`.

    A lost file has no name, no bytes, or bytes that never reached the disk, in turns.
    """
    shutil.copytree(node.folder, to)
    wal = to / "catalog.db-wal"
    if wal_bytes is not None and wal.exists():
        os.truncate(wal, min(wal_bytes, wal.stat().st_size))
    (to / "catalog.db-shm").unlink(missing_ok=True)
    for number, path in enumerate(sorted(to.glob("archive/??/*.dcm"))):
        if not lost(path):
            continue
        if number % 3 == 0:
            path.unlink()
        elif number % 3 == 1:
            os.truncate(path, 0)
        else:
            path.write_bytes(bytes(path.stat().st_size))


def whole(path: Path) -> bool:
    return False


def test_after_a_kill_nothing_is_lost_and_nothing_is_indexed_twice(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    bodies = {f"1.2.3.{number}": image(f"1.2.3.{number}", 60_000 + number) for number in range(20)}
    assert {before.send(uid, body) for uid, body in bodies.items()} == {StoreOutcome.NEW}
    power_cut(before, before.folder.with_name("b"), wal_bytes=None, lost=whole)
    after = node("b").begin()
    assert {uid: after.kept(uid) for uid in bodies} == bodies
    assert all(not after.catalog.index.variants(uid) for uid in bodies)
    after.check()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_power_cut_leaves_of_files_and_rows_all_that_was_acknowledged_is_there(
    seed: int, node: Callable[[str], Node]
) -> None:
    chance = random.Random(seed)
    before = node("a").begin()
    bodies = {f"1.2.3.{number}": image(f"1.2.3.{number}", chance.choice([500, 9000, 130_000])) for number in range(25)}
    for uid, body in bodies.items():
        assert before.send(uid, body) is StoreOutcome.NEW
    wal = (before.folder / "catalog.db-wal").stat().st_size
    to = before.folder.with_name("b")
    power_cut(before, to, wal_bytes=chance.randrange(wal), lost=lambda path: chance.random() < 0.7)
    after = node("b").begin()
    assert {uid: after.kept(uid) for uid in bodies} == bodies
    after.check()
    study = next(one for one in after.catalog.queue.open_studies())
    assert study.study_instance_uid == "1.2.826.1"
    instances = after.catalog.queue.series_instances("1.2.826.1", "1.2.826.1.1")
    assert len(instances) == len(bodies), "completion counts each once"
    assert list((to / "journal/0").glob("segment-*")) != []


def test_conflicts_end_as_they_had_ended(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    before.policy = ConflictPolicy.REPLACE
    uid = "1.2.3.1"
    first, second = image(uid), image(uid, PatientComments="changed")
    outcomes = [before.send(uid, body) for body in (first, second, first)]
    assert outcomes == [StoreOutcome.NEW, StoreOutcome.REPLACED, StoreOutcome.REPLACED]
    before.policy = ConflictPolicy.REFUSE
    assert before.send(uid, second) is not StoreOutcome.REPLACED
    for name, wal_bytes in (("b", None), ("c", 0)):
        to = before.folder.with_name(name)
        power_cut(before, to, wal_bytes=wal_bytes, lost=lambda path: True)
        after = node(name).begin()
        assert after.kept(uid) == first, name
        after.check()


def test_a_record_without_a_row_does_not_replace_what_came_after_it(
    node: Callable[[str], Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = node("a").begin()
    before.policy = ConflictPolicy.REPLACE
    uid = "1.2.3.1"
    failed, later = image(uid), image(uid, PatientComments="later")
    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", _full)
        patched.setattr(type(before.catalog.archive), "settled", lambda *_, **__: None)  # no more than a crash allows
        assert before.send(uid, failed) is None, "its sender was told that it failed"
    assert before.send(uid, later) is StoreOutcome.NEW
    power_cut(before, before.folder.with_name("b"), wal_bytes=None, lost=whole)
    after = node("b").begin()
    assert after.kept(uid) == later
    after.check()


def _full(*_: object, **__: object) -> None:
    from dicom_node.errors import StorageError

    raise StorageError("the disk is full")


def test_what_was_refused_or_deleted_stays_away(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    before.policy = ConflictPolicy.REFUSE
    first, refused, deleted = image("1.2.3.1"), image("1.2.3.1"), image("1.2.3.2")
    assert before.send("1.2.3.1", first) is StoreOutcome.NEW
    assert before.send("1.2.3.1", refused) is StoreOutcome.REFUSED
    assert before.send("1.2.3.2", deleted) is StoreOutcome.NEW
    gone = before.catalog.index.instance("1.2.3.2")
    assert gone is not None
    before.catalog.database.write(
        lambda connection: connection.execute("DELETE FROM instance WHERE sop_instance_uid = '1.2.3.2'")
    )
    os.unlink(gone.path)
    power_cut(before, before.folder.with_name("b"), wal_bytes=None, lost=whole)
    after = node("b").begin()
    assert after.catalog.index.instance("1.2.3.2") is None
    assert after.catalog.index.variants("1.2.3.1") == ()
    assert len(list(after.catalog.archive.locations())) == 1
    after.check()


def test_replay_that_is_cut_short_is_begun_again(node: Callable[[str], Node], monkeypatch: pytest.MonkeyPatch) -> None:
    before = node("a").begin()
    bodies = {f"1.2.3.{number}": image(f"1.2.3.{number}") for number in range(6)}
    for uid, body in bodies.items():
        before.send(uid, body)
    power_cut(before, before.folder.with_name("b"), wal_bytes=0, lost=lambda path: True)
    after = node("b")
    put_back, calls = type(after.catalog.archive).put_back, []

    def third(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put_back(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(after.catalog.archive), "put_back", third)
        with pytest.raises(KeyboardInterrupt):
            replay_journals(after.catalog, after.config)
    after.begin()
    assert {uid: after.kept(uid) for uid in bodies} == bodies
    after.check()


def test_a_clean_end_leaves_nothing_to_replay(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    before.send("1.2.3.1", image("1.2.3.1"))
    before.catalog.close()
    after = node("a")
    journal = after.catalog.open_journal(0)
    assert list(journal.left_behind()) == []
    journal.close()
    with sqlite3.connect(before.folder / "catalog.db") as connection:
        assert connection.execute("SELECT count(*) FROM journaled").fetchone() == (0,)


def test_what_was_indexed_before_the_digests_changed_is_known_again(node: Callable[[str], Node]) -> None:
    one = node("a").begin()
    uid, other = "1.2.3.1", "1.2.3.2"
    body, damaged = image(uid), image(other)
    one.send(uid, body)
    one.send(other, damaged)
    for known, data in ((uid, body), (other, damaged)):  # as a catalog of before has them
        as_before(one, known, hashlib.sha256(data).hexdigest())
    one.check()
    assert one.send(uid, body) is StoreOutcome.DUPLICATE
    assert one.send(uid, body) is StoreOutcome.DUPLICATE
    assert one.catalog.index.variants(uid) == ()
    assert one.send(uid, image(uid)) is StoreOutcome.VARIANT
    one.check()
    found = one.catalog.index.instance(other)
    assert found is not None
    raw = bytearray(Path(found.path).read_bytes())
    raw[-1] ^= 1
    Path(found.path).write_bytes(raw)
    report = fsck(one.catalog, rebuild=False, verify_hashes=True, clock=one.clock)
    assert report.damaged == [other]


def as_before(one: Node, uid: str, digest: str) -> None:
    """Name and row of an instance as they were under SHA-256."""
    found = one.catalog.index.instance(uid)
    assert found is not None
    name = hashlib.sha256(f"{EXPLICIT} {digest}".encode()).hexdigest()
    location = f"{name[:2]}/{name}.dcm"
    os.rename(found.path, one.catalog.archive.path(location))
    one.catalog.database.write(
        lambda connection: connection.execute(
            "UPDATE instance SET sha256 = ?, location = ? WHERE sop_instance_uid = ?", (digest, location, uid)
        )
    )


def test_under_the_policy_to_refuse_the_one_that_was_acknowledged_is_there(
    node: Callable[[str], Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = node("a").begin()
    before.policy = ConflictPolicy.REFUSE
    uid = "1.2.3.1"
    failed, accepted, refused = image(uid), image(uid), image(uid)
    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", _full)
        assert before.send(uid, failed) is None, "its sender was told that it failed"
    assert before.send(uid, accepted) is StoreOutcome.NEW
    assert before.send(uid, refused) is StoreOutcome.REFUSED
    to = before.folder.with_name("b")
    power_cut(before, to, wal_bytes=0, lost=whole)
    for path in to.glob("archive/??/*.dcm"):
        path.unlink()
    after = node("b").begin()
    assert after.kept(uid) == accepted
    assert after.catalog.index.variants(uid) == ()
    after.check()


def test_a_record_replay_knows_nothing_of_is_never_dropped(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    uid = "1.2.3.1"
    first, second = image(uid), image(uid)
    assert before.send(uid, first) is StoreOutcome.NEW
    before.policy = ConflictPolicy.REFUSE
    place = before.archived(uid, second)  # the process ended before it was refused, or accepted: who knows
    assert place.journal is not None
    power_cut(before, before.folder.with_name("b"), wal_bytes=0, lost=lambda path: True)
    after = node("b").begin()
    assert after.kept(uid) == first
    assert [variant.sha256 for variant in after.catalog.index.variants(uid)] == [place.sha256]
    after.check()


def test_rows_that_survived_fit_the_files_that_were_written_anew(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    uid, body = "1.2.3.1", image("1.2.3.1")
    # two senders at once: the first in the journal is the last to name its file, and finds the other's there
    first = before.archived(uid, body, "ANOTHER_SENDER")
    os.unlink(before.catalog.archive.path(first.location))
    assert before.send(uid, body) is StoreOutcome.NEW
    place = first.journal
    assert place is not None
    before.catalog.database.write(
        lambda connection: connection.execute("INSERT INTO journaled VALUES (?, ?)", (place.segment, place.offset))
    )
    to = before.folder.with_name("b")
    power_cut(before, to, wal_bytes=None, lost=whole)
    for path in to.glob("archive/??/*.dcm"):
        path.unlink()
    after = node("b").begin()
    assert after.kept(uid) == body
    after.check()


def test_replay_does_not_believe_what_memory_shows_of_a_file(node: Callable[[str], Node]) -> None:
    before = node("a").begin()
    assert before.send("1.2.3.1", image("1.2.3.1")) is StoreOutcome.NEW
    to = before.folder.with_name("b")
    power_cut(before, to, wal_bytes=None, lost=whole)
    (path,) = to.glob("archive/??/*.dcm")
    looked_at = path.open("rb")  # it keeps the number of the old file from being used again
    (to / "journal/0/doubt").touch()
    node("b").begin()
    assert not (to / "journal/0/doubt").exists()
    assert path.stat().st_ino != os.fstat(looked_at.fileno()).st_ino, "a sync of it may have failed before the end"
    looked_at.close()


def test_journals_of_several_receivers_are_replayed_in_the_order_in_which_they_received(
    node: Callable[[str], Node],
) -> None:
    one, other = node("a").begin(), node("a")
    other.open_door(1)
    uid = "1.2.3.1"
    first, second = image(uid), image(uid)
    assert other.send(uid, first) is StoreOutcome.NEW
    assert one.send(uid, second) is StoreOutcome.VARIANT
    power_cut(one, one.folder.with_name("b"), wal_bytes=0, lost=lambda path: True)
    after = node("b").begin()
    assert after.kept(uid) == first
    after.check()
