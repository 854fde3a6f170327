"""Graded back-pressure: what waits when, and that it does not flap."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import StorageError
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.database import Database
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.pressure import (
    HOLD_S,
    LATELY_S,
    MEASURE_S,
    Grade,
    Pressed,
    Pressure,
    Volume,
    WatchedFileSystem,
    volumes,
)

TOTAL = 10_000


@dataclass
class Disk(RealFileSystem):
    """Says how full it is; its clock is moved by hand."""

    free: dict[str, int] = field(default_factory=lambda: {"/a": TOTAL, "/b": TOTAL})
    files: int = 100
    flag: int = 0
    looks: int = 0
    now: float = 1000.0
    sync_s: float = 0.0
    fails: int = 0

    def statvfs(self, path: Path) -> os.statvfs_result:
        self.looks += 1
        if self.fails:
            raise OSError(self.fails, "")
        free = self.free[str(path)]
        return os.statvfs_result((1, 1, TOTAL, free, free, 1000, self.files, self.files, self.flag, 255))

    def fsync(self, fd: int) -> None:
        self.now += self.sync_s
        if self.fails:
            raise OSError(self.fails, "")

    def pass_s(self, seconds: float = MEASURE_S) -> None:
        self.now += seconds


class Told:
    """What the metrics are told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def durable_step(self, step: str, outcome: str) -> None:
        self.steps.append((step, outcome))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def pressure(disk: Disk) -> Pressure:
    volume = Volume(path=Path("/a"), reserve_bytes=1000, reserve_ratio=0.05, pause_at=2.0, floor_bytes=300)
    made = Pressure(disk, (volume,), slow_step_s=2.0, now=lambda: disk.now)
    made.observer = Told()
    return made


@pytest.fixture
def grade(disk: Disk, pressure: Pressure) -> Callable[[int], Grade]:
    def at(free: int) -> Grade:
        disk.free["/a"] = free
        disk.pass_s()
        return pressure.look().grade

    return at


def test_the_grades_in_their_order(grade: Callable[[int], Grade], pressure: Pressure) -> None:
    for free, expected in ((2001, 0), (2000, 1), (1001, 1), (1000, 2), (301, 2), (300, 3), (0, 3)):
        assert grade(free) == expected, free
        for results, refused_from in ((False, Grade.REFUSING), (True, Grade.FULL)):
            if expected >= refused_from:
                with pytest.raises(StorageError, match="reserve") as refused:
                    pressure.admit(results=results)
                assert refused.value.dimse_status == 0xA700
            else:
                pressure.admit(results=results)


def test_a_grade_is_left_a_tenth_above_where_it_was_entered(grade: Callable[[int], Grade]) -> None:
    steps = (
        (1000, 2),
        (1050, 2),
        (999, 2),
        (1100, 2),
        (1101, 1),
        (1000, 2),
        (2100, 1),
        (2300, 0),
        (2100, 0),
        (2000, 1),
    )
    assert [(free, grade(free)) for free, _ in steps] == list(steps)
    assert grade(0) is Grade.FULL
    assert grade(TOTAL) is Grade.OPEN


def test_space_is_asked_for_seldom_however_many_objects_come(disk: Disk, pressure: Pressure) -> None:
    for _ in range(1000):
        pressure.admit()
    assert disk.looks == 1
    disk.pass_s()
    pressure.admit()
    assert disk.looks == 2


def test_the_worse_of_two_volumes_counts(disk: Disk) -> None:
    both = [Volume(path=Path(path), reserve_bytes=1000) for path in ("/a", "/b")]
    pressure = Pressure(disk, both, now=lambda: disk.now)
    assert pressure.look() == Pressed(Grade.OPEN)
    disk.free["/b"] = 900
    disk.pass_s()
    assert pressure.look() == Pressed(Grade.REFUSING, "free space is below the reserve")


def test_there_is_as_much_room_as_the_fuller_volume_has(disk: Disk) -> None:
    """The intake journal and the quarantine are beside the catalog, received files may be elsewhere."""
    both = [Volume(path=Path("/a"), reserve_bytes=1000), Volume(path=Path("/b"), reserve_bytes=3000)]
    pressure = Pressure(disk, both, now=lambda: disk.now)
    assert pressure.room() == TOTAL - 3000
    disk.free |= {"/a": 900, "/b": 9000}
    assert pressure.room() == -100
    disk.fails = errno.EIO
    with pytest.raises(StorageError, match="EIO"):
        pressure.room()


def test_without_a_reserve_only_a_disk_that_is_full_refuses(disk: Disk) -> None:
    none = StorageSettings(reserve_bytes=0, reserve_ratio=0)
    pressure = Pressure(disk, volumes(Path("/a"), none), now=lambda: disk.now)
    disk.free["/a"] = 1
    assert pressure.look().grade is Grade.OPEN
    disk.free["/a"] = 0
    disk.pass_s()
    assert pressure.look().grade is Grade.FULL


def test_a_read_only_file_system_and_one_without_inodes_refuse_until_they_are_well(
    disk: Disk, pressure: Pressure
) -> None:
    for sick, well in ((("flag", os.ST_RDONLY), ("flag", 0)), (("files", 0), ("files", 100))):
        setattr(disk, *sick)
        disk.pass_s()
        with pytest.raises(StorageError):
            pressure.admit()
        setattr(disk, *well)
        disk.pass_s()
        pressure.admit()


def test_a_disk_that_does_not_tell_its_space_refuses(disk: Disk, pressure: Pressure) -> None:
    disk.fails = errno.EIO
    with pytest.raises(StorageError, match="EIO"):
        pressure.admit()
    assert pressure.look().grade is Grade.REFUSING
    disk.fails = 0
    pressure.admit()


def test_a_slow_sync_pauses_background_work_for_a_while(disk: Disk, pressure: Pressure) -> None:
    fs, told = WatchedFileSystem(disk, pressure), pressure.observer
    disk.sync_s = 1.9
    fs.fsync(0)
    assert pressure.look().grade is Grade.OPEN
    disk.sync_s = 2.1
    fs.fsync(0)
    assert pressure.look() == Pressed(Grade.PAUSED, "the disk is slow")
    assert isinstance(told, Told) and told.steps == [("sync", "slow")]
    pressure.admit()
    disk.pass_s(HOLD_S)
    assert pressure.look().grade is Grade.OPEN


def test_a_sync_that_does_not_come_back_is_slow_while_it_lasts(disk: Disk, pressure: Pressure) -> None:
    began = pressure.begin()
    disk.pass_s(2.1)
    assert pressure.look() == Pressed(Grade.PAUSED, "the disk is slow")
    pressure.end("sync", began)
    disk.pass_s(HOLD_S)
    assert pressure.look().grade is Grade.OPEN


def test_steps_that_fail_pause_and_then_show_as_refusing_until_one_gets_through(disk: Disk, pressure: Pressure) -> None:
    fs = WatchedFileSystem(disk, pressure)

    def fails(code: int) -> None:
        disk.fails = code
        with pytest.raises(OSError):
            fs.fsync(0)
        disk.fails = 0

    fails(errno.EMFILE)  # not the disk's fault
    fails(errno.ENOSPC)  # free space tells
    assert pressure.look().grade is Grade.OPEN
    for expected in (Grade.PAUSED, Grade.PAUSED, Grade.REFUSING):
        fails(errno.EIO)
        assert pressure.look().grade is expected
    pressure.admit()  # it is the next object that shows whether the disk is back
    fs.fsync(0)
    assert pressure.look() == Pressed(Grade.PAUSED, "writing has failed")
    for _ in range(3):
        fails(errno.EROFS)
    disk.pass_s(LATELY_S)  # nobody tried since
    assert pressure.look().grade is Grade.PAUSED
    disk.pass_s(HOLD_S)
    assert pressure.look().grade is Grade.OPEN


def test_what_another_process_found_holds_for_background_work_here(pressure: Pressure) -> None:
    pressure.told(Pressed(Grade.PAUSED, "the disk is slow"))
    assert pressure.background() is Grade.PAUSED
    assert pressure.look().grade is Grade.OPEN, "it is not told on"
    pressure.told(Pressed(Grade.OPEN))
    assert pressure.background() is Grade.OPEN


# --- the catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, slow_step_s=0.5)
    opened = open_catalog(tmp_path / "data", SystemClock(), storage)
    yield opened
    opened.close()


def test_a_catalog_that_may_not_grow_answers_a700_and_goes_on_when_it_may(tmp_path: Path) -> None:
    database = Database(tmp_path / "catalog.db")
    database.write(lambda connection: connection.execute("CREATE TABLE t (x BLOB)"))
    assert database._connection is not None
    pages = database._connection.execute("PRAGMA page_count").fetchone()[0]
    database._connection.execute(f"PRAGMA max_page_count={pages + 2}")

    def add(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (randomblob(100000))")

    for _ in range(3):
        with pytest.raises(StorageError, match="full") as refused:
            database.write(add)
        assert refused.value.dimse_status == 0xA700 and refused.value.retryable
        assert database.rows("SELECT count(*) FROM t") == [(0,)]
    database._connection.execute("PRAGMA max_page_count=100000")
    database.write(add)
    assert database.rows("SELECT count(*) FROM t") == [(1,)]
    database.close()


def test_the_journal_takes_no_room_that_the_volume_of_the_catalog_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(free={str(tmp_path / "data" / "archive"): TOTAL, str(tmp_path / "data"): 10})
    apart = (
        Volume(path=tmp_path / "data" / "archive", reserve_bytes=0),
        Volume(path=tmp_path / "data", reserve_bytes=20),
    )
    monkeypatch.setattr("dicom_node.store.catalog.volumes", lambda *_: apart)
    with closing(open_catalog(tmp_path / "data", SystemClock(), StorageSettings(), fs=disk)) as opened:
        assert not opened.open_journal(0)._has_room(1)
        disk.free[str(tmp_path / "data")] = TOTAL
        assert opened.open_journal(1)._has_room(1)


def test_a_failing_catalog_counts_as_a_failing_disk(catalog: Catalog) -> None:
    def broken(connection: sqlite3.Connection) -> None:
        exc = sqlite3.OperationalError("disk I/O error")
        exc.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise exc

    with pytest.raises(StorageError):
        catalog.database.write(broken)
    assert catalog.pressure.look() == Pressed(Grade.PAUSED, "writing has failed")


def test_a_catalog_that_cannot_be_synced_counts_too(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.database.write(lambda connection: connection.execute("CREATE TABLE t (x)"))

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)  # of the WAL, as the intake journal asks for it
    with pytest.raises(OSError):
        catalog.database.sync()
    assert catalog.pressure.look() == Pressed(Grade.PAUSED, "writing has failed")


def test_a_transaction_that_cannot_be_rolled_back_does_not_stay_in_the_way(tmp_path: Path) -> None:
    database = Database(tmp_path / "catalog.db")
    database.write(lambda connection: connection.execute("CREATE TABLE t (x)"))

    def deny_rollback(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1)")
        denied = (sqlite3.SQLITE_TRANSACTION, "ROLLBACK")
        connection.set_authorizer(
            lambda action, first, *_: sqlite3.SQLITE_DENY if (action, first) == denied else sqlite3.SQLITE_OK
        )
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        database.write(deny_rollback)
    database.write(lambda connection: connection.execute("INSERT INTO t VALUES (2)"))
    assert database.rows("SELECT x FROM t") == [(2,)]
    database.close()
