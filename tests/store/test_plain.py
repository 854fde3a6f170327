"""The short way into the index writes what the long one writes, row for row."""

import json
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import pytest

from dicom_node.clock import SystemClock
from dicom_node.errors import StorageError
from dicom_node.model import (
    ArchivedFile,
    BootTime,
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    JournalPlace,
    Origin,
    Source,
    StoreOutcome,
)
from dicom_node.store import instances, plain
from dicom_node.store.database import Database
from dicom_node.store.index import SqliteIndex
from dicom_node.store.migrations import migrate
from dicom_node.store.tally import audit_tallies

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def record(number: int, chance: random.Random) -> InstanceRecord:
    """One of few studies and series, mostly as its neighbours are, sometimes odd."""
    study, series = f"1.2.{chance.randrange(2)}", f"1.2.3.{chance.randrange(2)}"
    attributes = {
        "PatientID": "P1" if chance.random() < 0.9 else chance.choice(["", "P2"]),
        "PatientName": "Doe^Jane",
        "StudyDate": "2026.01.02" if chance.random() < 0.5 else "20260102",
        "Modality": chance.choice(["CT", "CT", "CT", "SR"]),
        "SeriesNumber": "3",
        "InstanceNumber": str(number),
    }
    if chance.random() < 0.1:
        attributes["StudyDescription"] = chance.choice(["abdomen", "thorax"])
    has_pixels = attributes["Modality"] == "CT"
    header = InstanceHeader(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2" if has_pixels else "1.2.840.10008.5.1.4.1.1.88.11",
        sop_instance_uid=f"1.2.3.4.{number if chance.random() < 0.9 else max(number - 3, 0)}",
        study_instance_uid=study,
        series_instance_uid=series,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        attributes={keyword: text for keyword, text in attributes.items() if text},
        pixel_data_offset=200 if has_pixels else None,
    )
    digest = f"{number if chance.random() < 0.95 else 0:064x}"
    place = JournalPlace(segment=bytes(16), offset=number) if chance.random() < 0.8 else None
    return InstanceRecord(
        header=header,
        file=ArchivedFile(
            location=f"aa/{digest}.dcm",
            data_set_offset=300,
            data_set_length=10,
            sha256=f"blake3:{digest}",
            journal=place,
        ),
        source=Source(
            calling_ae_title="CT1",
            called_ae_title="NODE",
            address="127.0.0.1",
            association_id=f"a{number // 10}" if chance.random() < 0.9 else None,
        ),
        origin=Origin.RECEIVED if chance.random() < 0.95 else Origin.PRODUCED,
        received_at=BEGAN + timedelta(seconds=number),
        received_boot=BootTime(boot_id="b", seconds=float(number)),
    )


class Store:
    """An index on a catalog of its own; every location has a file. `plain`: which instances went the short way."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, short: bool) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / "catalog.db"
        migrate(path)
        self.folder, self.plain = folder, list[bool]()
        self.database = Database(path, prepare=plain.prepare)
        self.index = SqliteIndex(self.database, lambda location: str(folder), SystemClock(), "test")
        insert = self.index._plain.insert

        def counted(connection: sqlite3.Connection, one: InstanceRecord) -> bool:
            self.plain.append(short and insert(connection, one))
            return self.plain[-1]

        monkeypatch.setattr(self.index._plain, "insert", counted)

    def add(self, one: InstanceRecord, policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST) -> StoreOutcome:
        return self.index.add_instance(one, policy, lambda first: False)

    def change(self, sql: str) -> None:
        self.database.write(lambda connection: connection.execute(sql), durable=False)

    def rows(self) -> dict[str, list[str]]:
        """All there is, with its types."""
        tables = [str(name) for (name,) in self.database.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table: sorted(map(repr, self.database.rows(f"SELECT * FROM {table}")))
            for table in tables
            if table != "_sqlite_migrations"
        }

    def check(self) -> None:
        with self.database.read() as connection:
            assert audit_tallies(connection) == []
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        counted = "SELECT sum(instance_count), sum(image_count) FROM series"
        there = "SELECT count(*), sum(is_image AND origin = 'received') FROM instance"
        assert self.database.rows(counted) == self.database.rows(there)


Open = Callable[..., Store]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    opened: list[Store] = []

    def fresh(name: str = "one", *, short: bool = True) -> Store:
        opened.append(Store(tmp_path / name, monkeypatch, short=short))
        return opened[-1]

    yield fresh
    for one in opened:
        one.database.close()


@pytest.mark.parametrize("seed", range(6))
def test_the_short_way_leaves_the_rows_the_long_one_leaves(seed: int, store: Open) -> None:
    chance = random.Random(seed)
    short, long = store("short"), store("long", short=False)
    for number in range(120):
        one = record(number, chance)
        if number % 40 == 39:  # everything is routed: the next image opens a revision
            for side in (short, long):
                side.change("UPDATE series SET routing = 'routed' WHERE routing = 'open'")
        policy = chance.choice(list(ConflictPolicy))
        assert short.add(one, policy) is long.add(one, policy)
    assert sum(short.plain) > 30, "the short way was hardly ever taken"
    assert short.rows() == long.rows()
    short.check()


def image(number: int) -> InstanceRecord:
    """Slices of one series, journaled one after the other."""
    patient = {"PatientID": "P1", "IssuerOfPatientID": "H", "PatientSex": "F"}
    said = {**patient, "Modality": "CT", "InstanceNumber": str(number)}
    digest = f"blake3:{number:064x}"
    return InstanceRecord(
        header=InstanceHeader(
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            sop_instance_uid=f"1.2.3.4.{number}",
            study_instance_uid="1.2.3",
            series_instance_uid="1.2.3.1",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            attributes=said,
            pixel_data_offset=100,
        ),
        file=ArchivedFile(
            location=f"aa/{number}.dcm",
            data_set_offset=300,
            data_set_length=10,
            sha256=digest,
            journal=JournalPlace(segment=bytes(16), offset=number),
        ),
        source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1", association_id="a1"),
        origin=Origin.RECEIVED,
        received_at=BEGAN,
        received_boot=BootTime(boot_id="b", seconds=float(number)),
    )


def statements(one: Store, number: int) -> list[str]:
    """What SQLite is asked to do for a slice."""
    asked: list[str] = []
    connection = one.database._connection
    assert connection is not None
    connection.set_trace_callback(lambda sql: asked.append(sql.split("(")[0].split("study.")[0].strip()))
    assert one.add(image(number)) is StoreOutcome.NEW
    connection.set_trace_callback(None)
    return [statement for statement, _ in groupby(asked)]  # it is told again for each statement of its triggers


def test_a_slice_more_is_one_statement_which_is_a_transaction_of_its_own(store: Open) -> None:
    one = store()
    one.add(image(1))
    read, write = "SELECT", "INSERT INTO plain_instance"
    assert statements(one, 2) == [read, write]
    assert statements(one, 3) == [write]
    one.change("UPDATE study SET attributes = json_set(attributes, '$.StudyDescription', 'x')")
    assert statements(one, 4) == [write, read, write], "what was remembered is no longer so"
    assert statements(one, 5) == [write]
    one.check()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE series SET routing = 'routed'",
        "UPDATE study SET patient_id = 'P2'",
        "UPDATE study SET issuer = 'H2'",
        "UPDATE study SET modalities = 'CT\\SR'",
        "UPDATE study SET sop_classes = '1.2'",
        "UPDATE series SET attributes = '{}'",
        "UPDATE patient SET attributes = '{}'",
        "UPDATE study SET attributes = '{}'",
        "INSERT INTO instance SELECT '1.2.3.4.9', sop_class_uid, study_instance_uid, series_instance_uid, "
        "transfer_syntax_uid, instance_number, instance_order, location, data_set_offset, data_set_length, sha256, "
        "pixel_data_offset, origin, modality, is_image, attributes, source, state, received_at FROM instance LIMIT 1",
    ],
)
def test_rows_that_changed_since_they_were_read_are_seen(change: str, store: Open) -> None:
    short, long = store("short"), store("long", short=False)
    for side in (short, long):
        for number in (1, 2, 3):
            side.add(image(number))
        with closing(sqlite3.connect(side.folder / "catalog.db")) as another_process, another_process:
            another_process.execute(change)
    assert [short.add(image(number)) for number in (9, 10)] == [long.add(image(number)) for number in (9, 10)]
    assert short.rows() == long.rows()


def together(one: Store, numbers: range) -> tuple[set[int], dict[int, BaseException]]:
    """Slices added in one transaction; which were acknowledged, and how the others failed."""
    gate, inside = threading.Event(), threading.Event()
    done, failed = set[int](), dict[int, BaseException]()

    def hold(connection: sqlite3.Connection) -> None:
        inside.set()
        gate.wait(10)

    def add(number: int) -> None:
        try:
            one.add(image(number))
            done.add(number)
        except (StorageError, sqlite3.Error) as exc:
            failed[number] = exc

    threads = [threading.Thread(target=one.database.write, args=(hold,))]
    threads += [threading.Thread(target=add, args=(number,)) for number in numbers]
    threads[0].start()
    assert inside.wait(10)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 10
    while len(one.database._waiting) < len(numbers) and time.monotonic() < deadline:
        time.sleep(0.001)
    gate.set()
    for thread in threads:
        thread.join(20)
    return done, failed


def kept(one: Store) -> set[int]:
    """Slices that have a row, each with its place in the journal."""
    there = {int(uid.rsplit(".", 1)[1]) for (uid,) in one.database.rows("SELECT sop_instance_uid FROM instance")}
    assert there == {place for (place,) in one.database.rows("SELECT place FROM journaled")}
    return there


@pytest.mark.parametrize("table", ["journaled", "instance", "study_association"])
def test_a_slice_that_fails_among_others_takes_only_itself_back(table: str, store: Open) -> None:
    one = store()
    for number in (1, 2):
        one.add(image(number))
    which = {
        "journaled": "NEW.place = 5",
        "instance": "NEW.instance_number = '5'",
        "study_association": "EXISTS (SELECT 1 FROM instance WHERE instance_number = '5')",
    }
    one.change("DELETE FROM study_association")
    one.change(
        f"CREATE TRIGGER breaks BEFORE INSERT ON {table} WHEN {which[table]} BEGIN SELECT RAISE(ABORT, 'broken'); END"
    )
    done, failed = together(one, range(3, 9))
    assert set(failed) == {5} and "broken" in str(failed[5])
    assert kept(one) == {1, 2} | done
    one.change("DROP TRIGGER breaks")
    one.add(image(5))
    assert one.plain[-1]
    assert kept(one) == {1, 2, 5} | done
    one.check()


def test_where_sqlite_takes_all_back_nothing_is_acknowledged(store: Open) -> None:
    one = store()
    for number in (1, 2):
        one.add(image(number))
    one.change(
        "CREATE TRIGGER breaks BEFORE INSERT ON journaled WHEN NEW.place = 5 BEGIN SELECT RAISE(ROLLBACK, 'all'); END"
    )
    done, failed = together(one, range(3, 9))
    assert done == set() and set(failed) == set(range(3, 9))
    assert kept(one) == {1, 2}
    one.check()


def test_a_full_disk_among_others_loses_nothing_that_was_acknowledged(store: Open) -> None:
    one = store()
    one.add(image(0))
    one.add(image(1))
    connection = one.database._connection
    assert connection is not None
    ((pages,),) = one.database.rows("PRAGMA page_count")
    connection.execute(f"PRAGMA max_page_count={pages + 20}")
    acknowledged, refused = {0, 1}, dict[int, BaseException]()
    for start in range(2, 400, 40):
        done, failed = together(one, range(start, start + 40))
        acknowledged |= done
        refused |= failed
        assert kept(one) == acknowledged
    assert acknowledged and refused
    assert all(isinstance(exc, StorageError) and exc.dimse_status == 0xA700 for exc in refused.values())
    one.check()
    connection.execute("PRAGMA max_page_count=1000000")
    for number in refused:
        assert one.add(image(number)) is StoreOutcome.NEW
    assert kept(one) == set(range(402))
    one.check()


def test_a_file_that_is_gone_gets_no_row_by_the_short_way(store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store()
    for number in (1, 2):
        one.add(image(number))
    monkeypatch.setattr(one.index, "_archive_path", lambda location: "/nowhere/at/all")
    with pytest.raises(StorageError, match="gone before it was indexed"):
        one.add(image(3))
    assert kept(one) == {1, 2}


SENDER = """
import pickle, sys
from pathlib import Path
from dicom_node.clock import SystemClock
from dicom_node.model import ConflictPolicy
from dicom_node.store import plain
from dicom_node.store.database import Database
from dicom_node.store.index import SqliteIndex

folder = Path(sys.argv[1])
records = pickle.loads((folder / sys.argv[2]).read_bytes())
index = SqliteIndex(Database(folder / "catalog.db", prepare=plain.prepare), lambda _: sys.argv[1], SystemClock(), "x")
print("ready", flush=True)
sys.stdin.readline()
for one in records:
    index.add_instance(one, ConflictPolicy.KEEP_FIRST, lambda first: False)
"""


def test_two_processes_add_to_one_series(store: Open) -> None:
    one = store()
    one.add(image(0))
    children = []
    for name, numbers in (("odd", range(1, 300, 2)), ("even", range(2, 301, 2))):
        (one.folder / name).write_bytes(pickle.dumps([image(number) for number in numbers]))
        command = [sys.executable, "-c", SENDER, str(one.folder), name]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        child.communicate("go\n", timeout=60)
        assert child.returncode == 0
    assert kept(one) == set(range(301))
    assert one.database.rows("SELECT image_count, received_seq FROM series") == [(301, 301)]
    one.check()


def test_a_record_that_differs_from_the_first_is_not_judged_unseen(store: Open) -> None:
    other = replace(image(1), file=replace(image(1).file, sha256="blake3:" + "f" * 64))
    one = store()
    one.add(image(1))
    with pytest.raises(instances.FirstMustBeRead):
        one.database.write(
            lambda connection: instances.insert_instance(connection, other, ConflictPolicy.KEEP_FIRST), durable=False
        )


def test_what_is_compared_once_is_not_kept_where_it_is_long() -> None:
    """A sender may fill every attribute of a header with as many bytes as the index keeps, each time others."""
    keywords = plain._SHARED_KEYWORDS
    row, remembered = json.dumps(dict.fromkeys(keywords, "x")), plain.PlainInstances()
    plain._compared.cache_clear()
    tracemalloc.start()
    try:
        for number in range(100):
            said = tuple(f"{number}{'y' * 4096}" if index < 40 else None for index in range(len(keywords)))
            plain._adds_nothing(row, row, row, said)
            assert plain._with("CT", "Z" * 40_000 + str(number)).startswith("CT\\")
            remembered._remember(("1.2", str(number)), plain._Rows(*["z" * 10_000 + str(number)] * 7))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20, f"{held >> 10} KiB"
