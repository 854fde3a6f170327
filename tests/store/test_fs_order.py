"""Durability, step by step: the order of syncs, and what is true after any one of them failed."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.errors import StorageError
from dicom_node.interfaces import JournaledObject
from dicom_node.model import ConflictPolicy, JournalPlace, Origin, Receipt, Source
from dicom_node.store.backup import back_up, bring_back
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.database import Database
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.part10 import build_file_meta

CALLS = (
    *("open_folder", "open_tmpfile", "create", "write", "fsync", "fsync_dir", "link", "link_path", "rename", "unlink"),
    *("open_direct_tmpfile", "truncate", "statvfs", "pwrite", "fdatasync", "syncfs"),
)


class WatchedFileSystem(RealFileSystem):
    """Records every call; fails the n-th one from now with an errno, once."""

    def __init__(self, *, tmpfile: bool = True) -> None:
        self.calls: list[str] = []
        self.fail_at = -1
        self.code = errno.EIO
        self._tmpfile = tmpfile

    def __getattribute__(self, name: str) -> Any:
        if name not in CALLS:
            return super().__getattribute__(name)
        real = super().__getattribute__(name)

        def call(*args: Any) -> Any:
            if name in ("open_tmpfile", "open_direct_tmpfile") and not self._tmpfile:
                raise OSError(errno.EOPNOTSUPP, "")
            self.calls.append(name)
            if len(self.calls) - 1 == self.fail_at:
                raise OSError(self.code, os.strerror(self.code), "/secret/path")
            return real(*args)

        return call


def receive(archive: FolderArchive, body: bytes) -> str:
    spool = archive.begin(
        sop_class_uid="1.2", sop_instance_uid="1.2.3", transfer_syntax_uid="1.2.840.10008.1.2.1", source_ae="A"
    )
    try:
        for start in range(0, len(body), 50_000):
            spool.write(body[start : start + 50_000])
        spool.view()
        return spool.commit().location
    finally:
        spool.discard()


@pytest.mark.parametrize(
    ("size", "written"),
    [
        (200_000, ["open_tmpfile", "write"]),
        (300_000, ["open_direct_tmpfile", "write", "truncate"]),  # past the cache whole blocks are written
        (2_500_000, ["open_direct_tmpfile", *["write"] * 3, "truncate"]),
    ],
)
def test_the_file_is_synced_then_named_then_its_folder_is_synced(size: int, written: list[str], tmp_path: Path) -> None:
    fs = WatchedFileSystem()
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    fs.calls.clear()
    body = os.urandom(size)
    path = Path(archive.path(receive(archive, body)))
    assert [call for call in fs.calls if call not in ("statvfs", "open_folder")] == [
        *written,
        *("fsync", "link", "fsync_dir"),
    ]
    assert path.read_bytes().endswith(body)


def test_where_nothing_goes_past_the_cache_large_files_go_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RealFileSystem, folder: Path) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(RealFileSystem, "open_direct_tmpfile", refuse)
    archive = FolderArchive(tmp_path / "archive", fs=RealFileSystem())
    body = os.urandom(2_500_001)
    assert Path(archive.path(receive(archive, body))).read_bytes().endswith(body)


def test_without_nameless_files_the_order_is_the_same(tmp_path: Path) -> None:
    fs = WatchedFileSystem(tmpfile=False)
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    fs.calls.clear()
    receive(archive, b"x")
    steps = [call for call in fs.calls if call in ("write", "fsync", "link", "rename", "fsync_dir")]
    assert steps == ["write", "fsync", "rename", "fsync_dir"]


def test_folders_are_made_and_synced_at_install(tmp_path: Path) -> None:
    fs = WatchedFileSystem()
    FolderArchive(tmp_path / "archive", fs=fs)
    assert fs.calls.count("fsync_dir") == 2
    assert len(list((tmp_path / "archive").glob("[0-9a-f][0-9a-f]"))) == 256


DURABLE = ("write", "pwrite", "fsync", "fdatasync", "syncfs", "link", "link_path", "rename", "unlink", "fsync_dir")


def order(fs: WatchedFileSystem) -> list[str]:
    """The steps that matter, each once where it comes several times in a row."""
    steps = [call for call in fs.calls if call in DURABLE]
    return [step for step, before in zip(steps, ["", *steps], strict=False) if step != before]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[Catalog, WatchedFileSystem]]]:
    """A catalog on a watched file system."""
    made: list[Catalog] = []

    def open_one(**storage: Any) -> tuple[Catalog, WatchedFileSystem]:
        fs = WatchedFileSystem()
        settings = StorageSettings(reserve_bytes=0, reserve_ratio=0, **storage)
        made.append(open_catalog(tmp_path / "data", SystemClock(), settings, fs=fs))
        fs.calls.clear()
        return made[-1], fs

    yield open_one
    for catalog in made:
        catalog.close()


def test_a_result_is_synced_by_itself_although_there_is_a_journal(
    opened: Callable[..., tuple[Catalog, WatchedFileSystem]],
) -> None:
    catalog, fs = opened()
    journal = catalog.open_journal(0)
    catalog.archive.journal = journal  # not in use: were it asked, it would say so
    fs.calls.clear()
    receive(catalog.archive, b"x" * 1000)  # without a receipt, as `Ingest.stage` commits
    assert order(fs) == ["write", "fsync", "link", "fsync_dir"]
    assert journal.refused == 0
    catalog.archive.journal = None
    journal.close()


def test_a_damaged_file_is_replaced_by_one_that_is_synced_before_and_a_good_one_is_synced_again(
    tmp_path: Path,
) -> None:
    fs = WatchedFileSystem()
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    body = b"y" * 1000
    path = Path(archive.path(receive(archive, body)))
    fs.calls.clear()
    receive(archive, body)
    assert order(fs) == ["write", "fsync", "link", "fsync", "fsync_dir"]  # its own, a name that is taken, the other's
    path.write_bytes(path.read_bytes()[:-1] + b"z")
    fs.calls.clear()
    receive(archive, body)
    assert order(fs) == ["write", "fsync", "link", "rename", "fsync_dir"]
    assert path.read_bytes().endswith(body)


def test_a_segment_is_whole_and_named_before_it_is_used(
    opened: Callable[..., tuple[Catalog, WatchedFileSystem]],
) -> None:
    catalog, fs = opened(journal_bytes=16 * 1024**2)
    journal = catalog.open_journal(0)
    fs.calls.clear()
    journal.begin()
    deadline = time.monotonic() + 20
    while not journal._segments:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert order(fs) == ["pwrite", "fdatasync", "fsync", "fsync_dir"]
    assert fs.calls.count("fsync_dir") == 3  # its folder, and the two above
    journal.close()


@pytest.mark.parametrize("durable", [False, True])
def test_what_a_journal_puts_back(durable: bool, opened: Callable[..., tuple[Catalog, WatchedFileSystem]]) -> None:
    catalog, fs = opened()
    meta, data_set = build_file_meta(
        sop_class_uid="1.2", sop_instance_uid="1.2.3", transfer_syntax_uid="1.2.840.10008.1.2.1", source_ae="A"
    ), b"data"  # fmt: skip
    record = JournaledObject(
        place=JournalPlace(segment=b"s", offset=4096),
        receipt=Receipt(
            source=Source(calling_ae_title="A", called_ae_title="B", address=""),
            origin=Origin.RECEIVED,
            conflict_policy=ConflictPolicy.KEEP_FIRST,
            received_at=SystemClock().wall(),
            received_boot=SystemClock().boot(),
        ),
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        length=len(meta + data_set),
        meta_length=len(meta),
        digest=blake3(data_set).digest(),
        doubtful=False,
        read=lambda at, count: (meta + data_set)[at : at + count],
    )
    file = catalog.archive.put_back(record, durable=durable)
    # at a start one sync of the whole file system follows for all of them, before the journal is cleared
    assert order(fs) == (["write", "fsync", "link", "fsync_dir"] if durable else ["write", "link_path"])
    assert file is not None and Path(catalog.archive.path(file.location)).read_bytes().endswith(data_set)


def test_a_journal_is_cleared_only_after_a_sync_of_all(
    opened: Callable[..., tuple[Catalog, WatchedFileSystem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, fs = opened(journal_bytes=16 * 1024**2)
    monkeypatch.setattr(Database, "sync", lambda self: fs.calls.append("fdatasync"))
    folder = catalog.data_dir / "journal" / "0"
    folder.mkdir(parents=True)
    (folder / "segment-0").write_bytes(bytes(8192))
    journal = catalog.open_journal(0)
    fs.calls.clear()
    journal.clear()
    assert order(fs) == ["syncfs", "fdatasync", "unlink", "fsync_dir"]
    journal.close()


def test_a_copy_of_the_catalog_is_synced_then_named_then_its_folder_is_synced(
    opened: Callable[..., tuple[Catalog, WatchedFileSystem]], tmp_path: Path
) -> None:
    catalog, fs = opened()
    back_up(catalog, tmp_path / "saved.db")
    assert order(fs) == ["syncfs", "fsync", "link", "fsync_dir"]  # first the files that it speaks of
    fresh, again = tmp_path / "fresh", WatchedFileSystem()
    fresh.mkdir()
    bring_back(fresh, tmp_path / "saved.db", again)
    assert order(again)[-3:] == ["fsync", "link", "fsync_dir"]


@pytest.mark.parametrize("tmpfile", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_after_any_failing_call_the_object_is_refused_or_fully_there(
    tmp_path: Path, tmpfile: bool, code: int, descriptors: Callable[[], int]
) -> None:
    body = os.urandom(200_000)
    fs = WatchedFileSystem(tmpfile=tmpfile)
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    before = descriptors()
    refused = 0
    for nth in range(100):
        fs.calls.clear()
        fs.fail_at, fs.code = nth, code
        try:
            location = receive(archive, body)
        except StorageError as exc:
            refused += 1
            assert exc.retryable and exc.dimse_status == 0xA700
            assert "secret" not in str(exc)
            assert list(archive.locations()) == [], f"visible after call {nth} ({fs.calls[-1]}) failed"
        else:
            if len(fs.calls) <= nth:
                break
            assert Path(archive.path(location)).read_bytes().endswith(body)
            fs.fail_at = -1
            archive.remove(location)
        fs.fail_at = -1
        archive.sweep()
    else:
        pytest.fail("the object was never received without a fault")
    assert refused >= 6
    assert descriptors() == before


def test_a_peer_that_sent_the_same_object_before_loses_nothing_by_a_failure(tmp_path: Path) -> None:
    body = os.urandom(1000)
    fs = WatchedFileSystem()
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    location = receive(archive, body)
    for nth in range(20):
        fs.calls.clear()
        fs.fail_at = nth
        with suppress(StorageError):
            receive(archive, body)
        assert list(archive.locations()) == [location]
        assert Path(archive.path(location)).read_bytes().endswith(body)


@pytest.fixture
def descriptors() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))
