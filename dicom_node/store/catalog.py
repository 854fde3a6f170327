"""The data folder: everything the node keeps, opened as one thing.

    <data>/catalog.db       index, ledger, queues (SQLite, WAL)
    <data>/catalog.lock     writers of every process take turns on it
    <data>/catalog.wanted   held by those that wait for their turn
    <data>/archive/         the bytes
    <data>/journal/         received objects whose files are not yet on disk, see `store.journal`
    <data>/node.lock        held by the node that uses the folder
    <data>/quarantine/      files engines returned that do not fit, see `store.quarantine`
    <data>/rules_in_force.json   the last rules that were right, for a restart while the folder is broken

Copy it with the node stopped and the node has moved.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dicom_node.config import StorageSettings
from dicom_node.errors import ConfigError
from dicom_node.interfaces import Clock, JournaledObject
from dicom_node.store.damage import damaged, faults_of
from dicom_node.store.database import Database
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import FileSystem, RealFileSystem
from dicom_node.store.index import SqliteIndex
from dicom_node.store.journal import Journal
from dicom_node.store.lock import make_data_dir, sync_data_folder
from dicom_node.store.plain import prepare
from dicom_node.store.pressure import Grade, Pressure, WatchedFileSystem, volumes
from dicom_node.store.quarantine import Quarantine
from dicom_node.store.queue import QueueOptions, SqliteQueue

__all__ = ["Catalog", "catalog_is_current", "open_catalog"]

JOURNAL_SEGMENTS = 8
MIN_SEGMENT = 2 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What one process sees of the data folder. `epoch` names this process's life."""

    database: Database
    archive: FolderArchive
    index: SqliteIndex
    queue: SqliteQueue
    quarantine: Quarantine
    epoch: str
    data_dir: Path
    storage: StorageSettings
    files: FileSystem
    pressure: Pressure

    # --- the intake journals

    def journal_numbers(self) -> tuple[int, ...]:
        """Numbers of the journals in the data folder, of receivers that run or ran."""
        folders = (self.data_dir / "journal").glob("*")
        return tuple(sorted(int(folder.name) for folder in folders if folder.name.isdecimal()))

    def open_journal(self, number: int) -> Journal:
        """The journal of receiver `number`, locked and not yet in use. Raises StorageError, also when it is held."""
        self.archive.watch_writes()
        size = max(self.storage.journal_bytes // JOURNAL_SEGMENTS, MIN_SEGMENT)
        return Journal(
            self.data_dir / "journal" / str(number),
            self.files,
            self.archive.buffers,
            segment_bytes=size,
            max_segments=self.storage.journal_bytes // size,
            sync=self._sync,
            mend=self._mend,
            forget=self.index.forget_journaled,
            has_room=lambda wanted: self.pressure.room() > wanted,
        )

    def _sync(self) -> None:
        self.archive.sync()
        self.database.sync()

    def _mend(self, records: Iterable[JournaledObject]) -> None:
        for record in records:
            location = self.archive.location_of(record)
            known = self.index.data_set_offset(location)
            if known is None:
                continue  # refused, or deleted since
            file = self.archive.put_back(record, durable=True)
            if file is not None and file.data_set_offset != known:
                self.index.moved(file)
        self.database.checkpoint()

    def recover(self, live_epochs: Iterable[str] = ()) -> None:
        """At node start, under `lock.data_lock` and before anything is received: tidy up after processes that died.

        Associations of epochs not in `live_epochs` are ended DEAD; temporaries of what was half received are removed.
        """
        self.index.close_dead_epochs({self.epoch, *live_epochs})
        self.archive.sweep()
        self.quarantine.sweep()

    def check_sound(self, *, thoroughly: bool) -> None:
        """Look at every page of the catalog; `thoroughly`: and at each entry of its indexes. Raises StorageError."""
        with self.database.read() as connection:
            faults = faults_of(connection, thoroughly=thoroughly)
        if faults:
            raise damaged("; ".join(faults))

    def close(self) -> None:
        """Finish what is queued. Idempotent."""
        if self.archive.journal is None or self.archive.journal.close():
            self.archive.close()
        self.database.close()


def open_catalog(
    data_dir: Path,
    clock: Clock,
    storage: StorageSettings,
    *,
    fs: FileSystem | None = None,
    options: QueueOptions | None = None,
    epoch: str = "",
    migrated: bool = False,
) -> Catalog:
    """Open the data folder, creating what is missing (mode 0700) and bringing the schema up to date.

    Any number of processes may do so at a time. `epoch` names this process's life, where somebody else must know it; ''
    is a new name. `migrated`: another process of the node has just done that; the catalog is opened unlooked at. Raises
    ConfigError when the folder cannot be used, StorageError when its disk fails.
    """
    files: FileSystem = fs or RealFileSystem()
    make_data_dir(files, data_dir)
    if not os.access(data_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"data_dir: {data_dir} cannot be written by this user; name a folder that can")
    pressure = Pressure(files, volumes(data_dir, storage), slow_step_s=storage.slow_step_s)
    files = WatchedFileSystem(files, pressure)
    archive = FolderArchive(
        data_dir / "archive",
        fs=files,
        reserve_bytes=storage.reserve_bytes,
        reserve_ratio=storage.reserve_ratio,
        pressure=pressure,
    )
    path = data_dir / "catalog.db"
    if not migrated:
        from dicom_node.store.migrations import migrate  # slow to load

        _create_private(path)
        migrate(path)
    sync_data_folder(files, data_dir)
    database = Database(path, watch=pressure, prepare=prepare)
    epoch = epoch or f"{os.getpid()}-{uuid.uuid4().hex}"
    return Catalog(
        database=database,
        archive=archive,
        index=SqliteIndex(database, archive.path, clock, epoch),
        queue=SqliteQueue(database, archive.path, clock, options),
        quarantine=Quarantine(
            data_dir / "quarantine",
            clock,
            fs=files,
            free_bytes=lambda: pressure.room() if pressure.space() is Grade.OPEN else 0,
            max_bytes=storage.quarantine_bytes,
            max_files=storage.quarantine_files,
        ),
        epoch=epoch,
        data_dir=data_dir,
        storage=storage,
        files=files,
        pressure=pressure,
    )


def catalog_is_current(data_dir: Path) -> bool:
    """Whether opening the catalog that is there would leave its schema as it is. Raises ConfigError for a newer one."""
    from dicom_node.store.migrations import is_current  # slow to load

    return is_current(data_dir / "catalog.db")


def _create_private(path: Path) -> None:
    # SQLite gives its WAL and shared memory the mode of the database file
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
