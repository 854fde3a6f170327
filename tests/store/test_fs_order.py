"""Durability, step by step: the order of syncs, and what is true after any one of them failed."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dicom_node.errors import StorageError
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import RealFileSystem

CALLS = ("open_folder", "open_tmpfile", "create", "write", "fsync", "fsync_dir", "link", "rename", "unlink", "statvfs")


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
            if name == "open_tmpfile" and not self._tmpfile:
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


def test_the_file_is_synced_then_named_then_its_folder_is_synced(tmp_path: Path) -> None:
    fs = WatchedFileSystem()
    archive = FolderArchive(tmp_path / "archive", fs=fs)
    fs.calls.clear()
    receive(archive, os.urandom(200_000))
    steps = [call for call in fs.calls if call in ("write", "fsync", "link", "rename", "fsync_dir")]
    assert steps == ["write"] * 4 + ["fsync", "link", "fsync_dir"]


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
    assert refused >= 7
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
