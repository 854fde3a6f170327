"""The data folder: made private, used by one node, tidy after a crash."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import ConfigError, StorageError
from dicom_node.store.catalog import catalog_is_current, open_catalog
from dicom_node.store.damage import is_damage
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.lock import data_lock

STORAGE = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)


def test_everything_in_the_data_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        catalog = open_catalog(tmp_path / "deep" / "data", SystemClock(), STORAGE)
        catalog.database.write(lambda connection: connection.execute("CREATE TABLE t (x)"))
        for path in (tmp_path / "deep" / "data").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert (tmp_path / "deep" / "data").stat().st_mode & 0o077 == 0
        catalog.close()
    finally:
        os.umask(before)


@pytest.mark.parametrize("by_lock", [True, False])
def test_a_new_data_folder_is_synced_into_its_parents(
    tmp_path: Path, by_lock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = RealFileSystem.fsync_dir

    def watched(fs: RealFileSystem, fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fs, fd)

    monkeypatch.setattr(RealFileSystem, "fsync_dir", watched)
    data = tmp_path / "deep" / "data"
    for parents in ({str(tmp_path), str(tmp_path / "deep")}, set()):  # made once, synced once
        if by_lock:
            with data_lock(data):
                pass
        else:
            open_catalog(data, SystemClock(), STORAGE).close()
        assert {str(tmp_path), str(tmp_path / "deep")} & set(synced) == parents
        synced.clear()


def test_opening_twice_shares_one_catalog_and_each_process_life_has_its_epoch(tmp_path: Path) -> None:
    first = open_catalog(tmp_path, SystemClock(), STORAGE)
    second = open_catalog(tmp_path, SystemClock(), STORAGE)
    assert first.epoch != second.epoch
    first.database.write(lambda connection: connection.execute("CREATE TABLE t AS SELECT 1 AS x"))
    with second.database.read() as connection:
        assert connection.execute("SELECT x FROM t").fetchone()["x"] == 1
    first.close()
    first.close()
    second.close()


def test_a_catalog_that_was_just_migrated_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_catalog(tmp_path, SystemClock(), STORAGE).close()

    def looked(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("dicom_node.store.migrations.migrate", looked)
    with closing(open_catalog(tmp_path, SystemClock(), STORAGE, migrated=True)) as catalog:
        assert catalog.index.instance("1.2.3") is None
    with pytest.raises(AssertionError):
        open_catalog(tmp_path, SystemClock(), STORAGE)


def test_a_second_node_is_kept_out_with_the_folder_named(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dicom_node.store.lock import data_lock\n"
        "from dicom_node.errors import ConfigError\n"
        "try:\n"
        "    with data_lock(Path(sys.argv[1])): print('in')\n"
        "except ConfigError as exc: print(exc)"
    )

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    with data_lock(tmp_path):
        said = other()
        assert str(tmp_path) in said and "another node" in said
    assert other() == "in\n"


def test_a_folder_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="data_dir"):
        open_catalog(tmp_path / "file", SystemClock(), STORAGE)
    with pytest.raises(ConfigError, match="data_dir"), data_lock(tmp_path / "file"):
        pass


def test_a_closed_catalog_refuses_to_write(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path, SystemClock(), STORAGE)
    catalog.close()
    with pytest.raises(StorageError):
        catalog.database.write(lambda connection: None)


def spoil(path: Path, table: str) -> None:
    """Overwrite the first page of a table."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\x55" * size)


DAMAGED = r"the catalog is damaged: .*move catalog.db,.* restore.* fsck --repair"


@pytest.mark.parametrize("thoroughly", [True, False])
def test_damage_anywhere_in_the_catalog_is_told_with_a_remedy(tmp_path: Path, thoroughly: bool) -> None:
    catalog = open_catalog(tmp_path, SystemClock(), STORAGE)
    catalog.check_sound(thoroughly=thoroughly)
    catalog.close()
    spoil(tmp_path / "catalog.db", "association")
    catalog = open_catalog(tmp_path, SystemClock(), STORAGE)
    try:
        with pytest.raises(StorageError, match=DAMAGED):
            catalog.check_sound(thoroughly=thoroughly)
        with pytest.raises(StorageError, match=DAMAGED):
            catalog.index.close_dead_epochs(())
        with pytest.raises(StorageError, match=DAMAGED), catalog.database.read() as connection:
            connection.execute("SELECT address FROM association").fetchone()
        with pytest.raises(StorageError, match=DAMAGED):
            catalog.database.rows("SELECT address FROM association")
    finally:
        catalog.close()


@pytest.mark.parametrize("content", [b"this is no database " * 1000, b"SQLite format 3\0" + bytes(8000)])
def test_what_is_no_catalog_is_told_when_it_is_opened(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "catalog.db").write_bytes(content)
    for look in (lambda: open_catalog(tmp_path, SystemClock(), STORAGE), lambda: catalog_is_current(tmp_path)):
        with pytest.raises(StorageError, match=DAMAGED):
            look()


def test_a_mistake_of_ours_is_not_taken_for_damage() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE one (id PRIMARY KEY)")
        for wrong in ("INSERT INTO one VALUES (1), (1)", "SELECT nothing FROM one"):
            with pytest.raises(sqlite3.DatabaseError) as caught:
                connection.execute(wrong)
            assert not is_damage(caught.value)
