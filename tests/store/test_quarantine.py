"""Files that do not fit are kept, within bounds, and told by fsck."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.quarantine import Quarantine

NAMES: dict[str, Any] = {"engine": "ai", "study_instance_uid": "1.2", "series_instance_uid": "1.2.1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "quarantine"


def made(folder: Path, free_bytes: int = 1 << 30, **bounds: int) -> Quarantine:
    limits = {"max_bytes": 1 << 30, "max_files": 200} | bounds
    return Quarantine(folder, SystemClock(), free_bytes=lambda: free_bytes, **limits)


def file(folder: Path, content: bytes, at_s: int = 0) -> Path:
    path = folder.parent / "Doe^Jane.nii"
    path.write_bytes(content)
    return path


def test_a_file_is_copied_under_a_name_that_says_nothing(folder: Path) -> None:
    quarantine = made(folder)
    source = file(folder, b"content")
    name = quarantine.keep(source, "another grid", job_id=3, **NAMES)
    assert name.startswith("job-3-") and "Doe" not in name
    assert (folder / name).read_bytes() == b"content"
    assert source.exists()
    (kept,) = quarantine.listed()
    assert (kept.name, kept.reason, kept.bytes, kept.series_instance_uid) == (name, "another grid", 7, "1.2.1")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o600} and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_same_file_is_kept_once(folder: Path) -> None:
    quarantine = made(folder)
    names = {quarantine.keep(file(folder, b"content"), f"try {n}", job_id=3, **NAMES) for n in range(3)}
    assert len(names) == 1
    assert [kept.reason for kept in quarantine.listed()] == ["try 0"]


@pytest.mark.parametrize("bounds", [{"quarantine_bytes": 0}, {"quarantine_files": 0}, {"quarantine_bytes": 6}])
def test_the_settings_bound_what_is_kept_and_nothing_may_be_kept_at_all(tmp_path: Path, bounds: dict[str, int]) -> None:
    storage = StorageSettings(reserve_bytes=0, reserve_ratio=0, **bounds)  # type: ignore[arg-type]
    catalog = open_catalog(tmp_path / "data", SystemClock(), storage)
    try:
        name = catalog.quarantine.keep(file(tmp_path / "data", b"content"), "r", job_id=1, **NAMES)
        assert name == "" and list(catalog.quarantine.listed()) == []
    finally:
        catalog.close()


@pytest.mark.parametrize("bounds", [{"max_files": 3}, {"max_bytes": 30}])
def test_the_oldest_give_way(folder: Path, bounds: dict[str, int]) -> None:
    quarantine = made(folder, **bounds)
    names = []
    for number in range(6):
        names.append(quarantine.keep(file(folder, b"%010d" % number), "r", job_id=number, **NAMES))
        os.utime(folder / names[-1], (number, number))
    assert [kept.name for kept in quarantine.listed()] == names[3:]
    assert len(list(folder.iterdir())) == 6  # each with its description


def test_what_is_too_large_is_not_kept(folder: Path) -> None:
    assert made(folder, max_bytes=3).keep(file(folder, b"large"), "r", job_id=1, **NAMES) == ""
    assert made(folder, free_bytes=3).keep(file(folder, b"large"), "r", job_id=1, **NAMES) == ""
    assert made(folder).listed() == []


def test_a_file_that_is_gone_is_no_failure_of_the_job(folder: Path) -> None:
    assert made(folder).keep(folder.parent / "gone", "r", job_id=1, **NAMES) == ""


def test_a_lost_description_hides_no_file_and_leftovers_are_swept(folder: Path) -> None:
    quarantine = made(folder)
    name = quarantine.keep(file(folder, b"content"), "r", job_id=1, **NAMES)
    (folder / name).with_suffix(".json").write_text("{}")
    (folder / ".77-1.tmp").write_bytes(b"half")
    assert [(kept.name, kept.reason, kept.bytes) for kept in quarantine.listed()] == [(name, "not known", 7)]
    quarantine.sweep()
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".json"]


def test_the_catalog_has_one(catalog: Catalog, tmp_path: Path) -> None:
    name = catalog.quarantine.keep(file(tmp_path / "x", b"1"), "r", job_id=1, **NAMES)
    assert (tmp_path / "data" / "quarantine" / name).is_file()
    catalog.recover()
    assert [kept.name for kept in catalog.quarantine.listed()] == [name]
