"""Many writers on one SQLite file: fair, isolated from each other's failures, durable settings."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_node.errors import CatalogBusy, StorageError
from dicom_node.store.database import Database

WRITER = """
import json, sys, time
from pathlib import Path
from dicom_node.store.database import Database

database = Database(Path(sys.argv[1]))
mine = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
waits, deadline = [], time.monotonic() + 3.0
while time.monotonic() < deadline:
    start = time.monotonic()
    database.write(lambda c: c.execute("INSERT INTO t (writer) VALUES (?)", (mine,)))
    waits.append(time.monotonic() - start)
database.close()
print(json.dumps(sorted(waits)), flush=True)
"""


def make(folder: Path, **options: float) -> Database:
    database = Database(folder / "catalog.db", **options)
    database.write(lambda connection: connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, writer TEXT UNIQUE)"))
    return database


def test_four_processes_writing_at_once_all_get_their_turn(tmp_path: Path) -> None:
    database = Database(tmp_path / "catalog.db")
    database.write(lambda connection: connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, writer TEXT)"))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(database.path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    waits = [json.loads(child.communicate(timeout=60)[0]) for child in children]
    counts = [len(one) for one in waits]
    together = sorted(wait for one in waits for wait in one)
    p99 = together[int(len(together) * 0.99)]
    told = f"commits per writer {counts}, p50 {together[len(together) // 2] * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"
    logging.getLogger(__name__).info(told)
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == sum(counts)
    database.close()
    assert min(counts) * 3 > max(counts), told
    assert p99 < 1.0, told


def test_a_failing_write_takes_only_itself_back(tmp_path: Path) -> None:
    database = make(tmp_path)
    gate, outcomes = threading.Event(), []
    held = threading.Thread(target=lambda: database.write(lambda connection: gate.wait(10)))
    held.start()

    def insert(value: str) -> None:
        try:
            database.write(lambda connection: connection.execute("INSERT INTO t (writer) VALUES (?)", (value,)))
            outcomes.append("written")
        except sqlite3.IntegrityError:
            outcomes.append("refused")

    threads = [threading.Thread(target=insert, args=(value,)) for value in ("a", "a", "b")]
    for thread in threads:  # queued behind the first: they share one transaction
        thread.start()
    gate.set()
    for thread in (held, *threads):
        thread.join(timeout=20)
    assert sorted(outcomes) == ["refused", "written", "written"]
    with database.read() as connection:
        assert {row["writer"] for row in connection.execute("SELECT writer FROM t")} == {"a", "b"}
    database.close()


def test_a_lock_held_too_long_is_told_as_busy(tmp_path: Path) -> None:
    holder, database = make(tmp_path), Database(tmp_path / "catalog.db", lock_wait_s=0.2)
    gate, inside = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        inside.set()
        gate.wait(10)

    thread = threading.Thread(target=lambda: holder.write(hold))
    thread.start()
    inside.wait(10)
    with pytest.raises(CatalogBusy) as busy:
        database.write(lambda connection: None)
    assert busy.value.dimse_status == 0xA700
    gate.set()
    thread.join(timeout=20)
    database.write(lambda connection: None)
    database.close()
    holder.close()


def test_commits_survive_a_power_cut_and_readers_do_not_write(tmp_path: Path) -> None:
    database = make(tmp_path)
    pragmas = database.write(
        lambda connection: [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    )
    assert pragmas == ["wal", 2, 1]  # 2 = FULL
    with pytest.raises(StorageError), database.read() as connection:
        connection.execute("INSERT INTO t (writer) VALUES ('x')")
    database.close()


def test_readers_of_threads_that_ended_are_used_again(tmp_path: Path) -> None:
    database = Database(tmp_path / "catalog.db")
    database.write(lambda connection: connection.execute("CREATE TABLE thing (n INTEGER)"))

    def look() -> None:
        with database.read() as connection:
            connection.execute("SELECT count(*) FROM thing").fetchone()

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    look()
    before = open_files()
    for _ in range(40):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(timeout=10)
    assert open_files() <= before + 2
    database.close()


def held(database: Database) -> tuple[threading.Event, threading.Thread]:
    """A thread that writes until the event is set."""
    gate, inside = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        inside.set()
        gate.wait(10)

    thread = threading.Thread(target=lambda: database.write(hold))
    thread.start()
    assert inside.wait(10)
    return gate, thread


def test_a_change_that_was_given_up_while_it_waited_never_happens_and_others_do(tmp_path: Path) -> None:
    database = make(tmp_path)
    gate, thread = held(database)
    with pytest.raises(CatalogBusy, match=r"within 0\.05 s"):
        database.write(lambda c: c.execute("INSERT INTO t (writer) VALUES ('late')"), timeout_s=0.05)
    gate.set()
    thread.join(10)
    database.write(lambda c: c.execute("INSERT INTO t (writer) VALUES ('next')"))
    with database.read() as connection:
        assert [row["writer"] for row in connection.execute("SELECT writer FROM t")] == ["next"]
    database.close()


def test_threads_that_wait_write_one_after_the_other_and_none_is_left(tmp_path: Path) -> None:
    database = make(tmp_path)
    gate, thread = held(database)

    def many(name: int) -> None:
        for number in range(50):
            database.write(lambda c, text=f"{name}-{number}": c.execute("INSERT INTO t (writer) VALUES (?)", (text,)))

    threads = [threading.Thread(target=many, args=(name,)) for name in range(100)]
    for one in threads:  # more than one transaction takes
        one.start()
    gate.set()
    for one in (thread, *threads):
        one.join(60)
        assert not one.is_alive()
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == 5000
    database.close()


def test_a_thread_that_is_ended_while_it_writes_holds_nobody_up(tmp_path: Path) -> None:
    database = make(tmp_path)

    def interrupted(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t (writer) VALUES ('half')")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        database.write(interrupted)
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == 0
    database.write(lambda c: c.execute("INSERT INTO t (writer) VALUES ('whole')"), timeout_s=5.0)
    database.close()


def test_a_change_within_a_change_is_refused_and_a_closed_catalog_takes_none(tmp_path: Path) -> None:
    database = make(tmp_path)
    with pytest.raises(StorageError, match="within another one"):
        database.write(lambda connection: database.write(lambda other: None))
    assert database.write(lambda connection: 1) == 1
    gate, thread = held(database)
    closing = threading.Thread(target=database.close)
    closing.start()
    gate.set()
    closing.join(10)
    thread.join(10)
    with pytest.raises(StorageError, match="closed"):
        database.write(lambda connection: None)


def test_readers_that_were_warmed_up_open_no_file_later(tmp_path: Path) -> None:
    database = make(tmp_path)
    database.warm_up()
    before = len(os.listdir("/proc/self/fd"))
    with database.read() as one, database.read() as two, database.read() as three:
        for connection in (one, two, three):
            assert connection.execute("SELECT count(*) FROM t").fetchone()[0] == 0
        assert len(os.listdir("/proc/self/fd")) == before
    database.close()


def test_a_wal_is_written_back_beside_writers_and_never_under_their_lock(tmp_path: Path) -> None:
    database = make(tmp_path)
    wal = tmp_path / "catalog.db-wal"
    database.write(lambda connection: connection.execute("INSERT INTO t (writer) VALUES (?)", ("x" * 40_000_000,)))
    assert wal.stat().st_size > 32 * 1024**2
    inside, leave = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t (writer) VALUES ('slow')")
        inside.set()
        leave.wait(10)

    writer = threading.Thread(target=lambda: database.write(slow))
    writer.start()
    assert inside.wait(5)
    tidied = threading.Thread(target=database.tidy)
    tidied.start()
    tidied.join(0.3)
    assert tidied.is_alive(), "it took a lock that a thread of its own process holds"
    leave.set()
    tidied.join(10)
    writer.join(10)
    database.tidy()
    assert wal.stat().st_size < 1024**2
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM t WHERE writer = 'slow'").fetchone() is not None
    database.close()


def test_a_later_durable_write_needs_no_sync_of_its_own_from_the_caller(tmp_path: Path) -> None:
    database = make(tmp_path)
    modes = []
    for durable in (True, False, True, False, False):
        database.write(
            lambda connection: modes.append(connection.execute("PRAGMA synchronous").fetchone()[0]), durable=durable
        )
    assert modes == [2, 1, 2, 1, 1]
    database.sync()
    database.checkpoint()
    database.close()
    database.sync()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were synced by other than SQLite."""
    names: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    return names


def test_a_durable_write_that_finds_nothing_to_change_makes_durable_what_it_found(
    tmp_path: Path, synced: list[str]
) -> None:
    database = make(tmp_path)
    database.write(lambda connection: connection.execute("INSERT INTO t (writer) VALUES ('a')"), durable=False)
    found = database.write(lambda connection: connection.execute("SELECT count(*) FROM t").fetchone()[0])
    assert found == 1
    assert synced == ["catalog.db-wal"], "its caller may answer that the row is safe"
    database.write(lambda connection: connection.execute("SELECT 1"))
    database.write(lambda connection: connection.execute("INSERT INTO t (writer) VALUES ('b')"))
    database.write(lambda connection: connection.execute("SELECT 1"))
    assert synced == ["catalog.db-wal"], "once is enough"
    database.close()


def test_the_log_of_a_catalog_behind_a_link_is_synced(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/catalog.db").symlink_to(tmp_path / "fast/catalog.db")
    database = make(tmp_path / "data")
    database.write(lambda connection: connection.execute("INSERT INTO t (writer) VALUES ('a')"), durable=False)
    database.sync()
    assert synced == ["catalog.db-wal"]
    database.close()


# --- changes of one statement


def insert(connection: sqlite3.Connection, value: str) -> str:
    connection.execute("INSERT INTO t (writer) VALUES (?)", (value,))
    return value


def never(connection: sqlite3.Connection) -> str:
    raise AssertionError("it was done already")


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_done_quickly_is_not_done_again_and_what_is_not_is_done(durable: bool, tmp_path: Path) -> None:
    database = make(tmp_path)
    assert database.write(never, durable=durable, quick=lambda connection: insert(connection, "a")) == "a"
    assert database.write(lambda connection: insert(connection, "b"), durable=durable, quick=lambda _: None) == "b"
    another = Database(tmp_path / "catalog.db")
    assert another.rows("SELECT writer FROM t") == [("a",), ("b",)]
    with pytest.raises(sqlite3.IntegrityError):
        database.write(never, durable=durable, quick=lambda connection: insert(connection, "a"))
    assert database.write(lambda connection: insert(connection, "c"), durable=durable) == "c"
    another.close()
    database.close()


def test_a_quick_change_that_fails_takes_only_itself_back(tmp_path: Path) -> None:
    database = make(tmp_path)
    gate, thread = held(database)
    outcomes: dict[str, str] = {}

    def change(name: str, quick: Callable[[sqlite3.Connection], str | None], fn: Callable[..., str]) -> None:
        try:
            outcomes[name] = database.write(fn, quick=quick)
        except (sqlite3.Error, StorageError) as exc:
            outcomes[name] = type(exc).__name__

    changes = {
        "one": (lambda connection: insert(connection, "one"), never),
        "again": (lambda connection: insert(connection, "one"), never),
        "refused": (refused, never),
        "slow": (lambda _: None, lambda connection: insert(connection, "slow")),
        "slow and again": (lambda _: None, lambda connection: (insert(connection, "x"), insert(connection, "slow"))[1]),
        "last": (lambda connection: insert(connection, "last"), never),
    }
    threads = []
    for name, change_of in changes.items():
        threads.append(threading.Thread(target=change, args=(name, *change_of)))
        threads[-1].start()
        while len(database._waiting) < len(threads):  # in this order, in one transaction
            time.sleep(0.001)
    gate.set()
    for one in (thread, *threads):
        one.join(10)
    assert outcomes == {
        **{"one": "one", "again": "IntegrityError", "refused": "StorageError"},
        **{"slow": "slow", "slow and again": "IntegrityError", "last": "last"},
    }
    assert database.rows("SELECT writer FROM t ORDER BY id") == [("one",), ("slow",), ("last",)]
    database.close()


def refused(connection: sqlite3.Connection) -> str:
    raise StorageError("the file is gone")


def test_a_durable_write_makes_durable_what_was_done_quickly_before(tmp_path: Path, synced: list[str]) -> None:
    database = make(tmp_path)
    database.write(never, durable=False, quick=lambda connection: insert(connection, "a"))
    assert database.write(lambda connection: connection.execute("SELECT count(*) FROM t").fetchone()[0]) == 1
    assert synced == ["catalog.db-wal"]
    database.close()


def test_each_connection_that_writes_is_prepared_and_one_that_cannot_be_is_told_of(tmp_path: Path) -> None:
    make(tmp_path).close()
    prepared: list[sqlite3.Connection] = []
    database = Database(tmp_path / "catalog.db", prepare=prepared.append)
    for value in ("a", "b"):
        database.write(lambda connection, value=value: insert(connection, value))
    assert prepared == [database._connection]
    database.close()
    broken = Database(tmp_path / "catalog.db", prepare=lambda connection: connection.execute("no SQL"))
    with pytest.raises(StorageError, match="syntax error"):
        broken.write(never)
    broken.close()
