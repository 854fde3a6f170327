"""Backups of a catalog that is written to, and bringing one back; what a schema change keeps, and what it refuses."""

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import ConfigError, StorageError
from dicom_node.model import ConflictPolicy, InstanceRecord
from dicom_node.store.backup import back_up, bring_back
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.index_schema import index_migrations
from dicom_node.store.migrations import migrate
from dicom_node.store.queue_schema import queue_migrations
from dicom_node.store.timeline_schema import timeline_migrations

Record = Callable[..., InstanceRecord]
HERE = version("dicom-node")


@pytest.fixture
def receive(catalog: Catalog, record: Record) -> Callable[..., None]:
    def one(**fields: Any) -> None:
        catalog.index.add_instance(record(**fields), ConflictPolicy.KEEP_FIRST, lambda first: False)

    return one


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def test_a_backup_is_of_one_moment_while_the_catalog_is_written_to(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path
) -> None:
    receive()
    ready, stop = threading.Event(), threading.Event()

    def go_on() -> None:
        for number in range(100_000):
            receive(StudyInstanceUID=f"1.5.{number}", SeriesInstanceUID=f"1.5.{number}.1")
            if number == 5:
                ready.set()
            if stop.is_set():
                return

    writer = threading.Thread(target=go_on)
    writer.start()
    ready.wait(30)
    (before,) = catalog.database.rows("SELECT count(*) FROM instance")
    try:
        for number in range(3):
            saved = back_up(catalog, tmp_path / f"backup-{number}.db")
            (counted,) = rows(tmp_path / f"backup-{number}.db", "SELECT count(*) FROM instance")
            whole = rows(tmp_path / f"backup-{number}.db", "SELECT sum(instance_count) FROM study")
            assert saved.files == counted[0] == whole[0][0] >= before[0]
            assert (saved.missing_count, saved.missing) == (0, ())
    finally:
        stop.set()
        writer.join(30)
    made = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert made == ["backup-0.db", "backup-1.db", "backup-2.db"]
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in made)


def test_files_are_synced_before_a_backup_knows_them_and_journals_are_no_part_of_it(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive()
    catalog.database.write(lambda connection: connection.execute("INSERT INTO journaled VALUES (x'00', 5)").close())
    synced: list[bool] = []
    real = type(catalog.archive).sync

    def sync(archive: Any) -> None:
        synced.append((tmp_path / "backup.db").exists())
        real(archive)

    monkeypatch.setattr(type(catalog.archive), "sync", sync)
    back_up(catalog, tmp_path / "backup.db")
    assert synced == [False]
    assert rows(tmp_path / "backup.db", "SELECT * FROM journaled") == []

    def fails(archive: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(catalog.archive), "sync", fails)
    with pytest.raises(StorageError, match="cannot be synced"):
        back_up(catalog, tmp_path / "other.db")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("length", [0, -1])
def test_a_backup_that_would_know_more_than_the_archive_is_refused(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path, length: int
) -> None:
    receive()
    (known,) = catalog.index.files()
    path = Path(catalog.archive.path(known.file.location))
    if length:
        os.truncate(path, path.stat().st_size + length)
    else:
        path.unlink()
    with pytest.raises(StorageError, match=r"1 files .* not in the archive.*fsck"):
        back_up(catalog, tmp_path / "backup.db")
    assert not list(tmp_path.glob("backup*"))
    catalog.index.mark_file(known, present=False)  # fsck knows: then the backup says the same
    assert back_up(catalog, tmp_path / "backup.db").files == 0


def test_nothing_is_overwritten(catalog: Catalog, tmp_path: Path) -> None:
    target = tmp_path / "backup.db"
    target.write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        back_up(catalog, target)
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there already"):
        back_up(catalog, tmp_path / "link.db")
    (tmp_path / "cut.db.partial").write_text("of another")
    with pytest.raises(ConfigError, match="another copy"):
        back_up(catalog, tmp_path / "cut.db")
    with pytest.raises(ConfigError, match="name a folder"):
        back_up(catalog, tmp_path / "nowhere" / "backup.db")
    assert target.read_text() == "mine" and (tmp_path / "cut.db.partial").read_text() == "of another"
    assert not (tmp_path / "elsewhere").exists()


def test_a_backup_brought_back_is_the_catalog_of_its_moment(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path
) -> None:
    receive(SOPInstanceUID="1.2.3.1")
    back_up(catalog, tmp_path / "backup.db")
    receive(SOPInstanceUID="1.2.3.2")  # later: in the copied archive, not in the backup
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copytree(catalog.data_dir / "archive", fresh / "archive")
    saved = bring_back(fresh, tmp_path / "backup.db")
    assert (saved.files, saved.studies, saved.missing_count) == (1, 1, 0)
    assert (fresh / "catalog.db").stat().st_mode & 0o777 == 0o600
    again = open_catalog(fresh, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    try:
        assert again.index.instance("1.2.3.1") is not None and again.index.instance("1.2.3.2") is None
        assert again.queue.ledger().totals["received"] == 1
        assert len(list(again.archive.locations())) == 2
    finally:
        again.close()
    for name in ("catalog.db", "catalog.db-wal"):  # a WAL of another catalog would be played into this one
        other = tmp_path / f"with-{name}"
        other.mkdir()
        (other / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=f"{name}.*move it away"):
            bring_back(other, tmp_path / "backup.db")


def test_missing_files_are_counted_when_a_backup_is_brought_back(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path
) -> None:
    receive()
    back_up(catalog, tmp_path / "backup.db")
    (tmp_path / "fresh").mkdir()
    assert bring_back(tmp_path / "fresh", tmp_path / "backup.db").missing_count == 1


def test_what_is_no_sound_backup_is_not_brought_back(
    catalog: Catalog, receive: Callable[..., None], tmp_path: Path
) -> None:
    for number in range(20):
        receive(SOPInstanceUID=f"1.2.3.{number}")
    good = tmp_path / "good.db"
    back_up(catalog, good)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 100)
    sqlite_utils.Database(tmp_path / "other.db")["t"].insert({"x": 1})
    newer = tmp_path / "newer.db"
    shutil.copy(good, newer)
    from_the_future(newer)
    damaged = tmp_path / "damaged.db"
    content = bytearray(good.read_bytes())
    page = 4096 * rows(good, "SELECT rootpage - 1 FROM sqlite_master WHERE name = 'instance_location'")[0][0]
    content[page + 100 : page + 4096] = bytes(3996)
    damaged.write_bytes(content)
    for name, expected in (
        ("nowhere.db", ConfigError), ("text", ConfigError), ("other.db", ConfigError), ("newer.db", ConfigError),
        ("damaged.db", (StorageError, ConfigError)),
    ):  # fmt: skip
        fresh = tmp_path / f"for-{name}"
        fresh.mkdir()
        with pytest.raises(expected):  # type: ignore[call-overload]
            bring_back(fresh, tmp_path / name)
        assert not list(fresh.glob("catalog*")), name


# --- schema changes --------------------------------------------------------------------------------------------------


def from_the_future(path: Path) -> None:
    """As if a newer version had brought it forward."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('index', 'of_tomorrow', '')"
        )
        connection.execute("UPDATE written_by SET version = '9.8.7'")


def test_a_catalog_of_a_newer_version_is_refused_and_both_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    migrate(path)
    from_the_future(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"dicom-node 9\.8\.7 .*index\.of_tomorrow.* this is {HERE}: install"):
        migrate(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("catalog.before*"))


def test_a_catalog_is_copied_before_it_is_brought_forward(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    database = sqlite_utils.Database(path)
    index_migrations.apply(database)
    queue_migrations.apply(database, stop_before="receipts")
    timeline_migrations.apply(database)
    database.execute(
        "INSERT INTO patient VALUES (1, 'P', '', '', 'A', 'a', '', '{}')",
    )
    database.conn.commit()
    database.close()
    migrate(path)
    kept = tmp_path / f"catalog.before-{HERE}.db"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert rows(kept, "SELECT patient_id FROM patient") == rows(path, "SELECT patient_id FROM patient") == [("P",)]
    tables = "SELECT name FROM sqlite_master WHERE name IN ('receipt', 'written_by') ORDER BY name"
    assert (rows(kept, tables), rows(path, tables)) == ([], [("receipt",), ("written_by",)])
    assert rows(path, "SELECT version FROM written_by") == [(HERE,)]
    migrate(path)
    assert [copy.name for copy in tmp_path.glob("catalog.before*")] == [kept.name]


def test_a_copy_that_a_power_cut_left_half_made_does_not_keep_the_node_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    database = sqlite_utils.Database(path)
    index_migrations.apply(database)
    database.close()
    kept = tmp_path / f"catalog.before-{HERE}.db"
    Path(f"{kept}.partial").write_text("half")
    migrate(path)
    assert kept.exists() and not list(tmp_path.glob("*.partial*"))


def test_a_new_catalog_leaves_no_copy(tmp_path: Path) -> None:
    migrate(tmp_path / "catalog.db")
    assert not list(tmp_path.glob("*before*"))


def test_a_catalog_that_cannot_be_copied_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "catalog.db"
    database = sqlite_utils.Database(path)
    index_migrations.apply(database)
    database.close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dicom_node.store.copying._name", full)
    with pytest.raises(StorageError, match="No space left"):
        migrate(path)
    assert rows(path, "SELECT DISTINCT migration_set FROM _sqlite_migrations") == [("index",)]
    assert not list(tmp_path.glob("*before*"))
