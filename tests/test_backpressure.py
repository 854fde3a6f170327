"""What processes tell each other of the disk, how a change is logged, and signs of life on a disk that is full."""

import errno
import logging
import os
from pathlib import Path

import pytest

from dicom_node.backpressure import DiskWatch, disk_facts, pressed_elsewhere
from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.metrics import FILE_BYTES, MULTIPROCESS_VARIABLE, Metrics
from dicom_node.pulse import Pulse, beat, read_pulse, run_folder
from dicom_node.store.fs import RealFileSystem
from dicom_node.store.pressure import Grade, Pressed, Pressure, Volume


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    run_folder(tmp_path).mkdir()
    return tmp_path


def pulse(**facts: object) -> Pulse:
    now = SystemClock().boot()
    return Pulse(pid=1, boot_id=now.boot_id, boot_s=now.seconds, started_at="", ok=True, facts=facts)


def pressure(folder: Path, reserve: int = 0) -> Pressure:
    return Pressure(RealFileSystem(), (Volume(path=folder, reserve_bytes=reserve),))


def test_the_worst_that_a_living_process_found_is_known_to_the_others(data_dir: Path) -> None:
    config, clock = NodeConfig(data_dir=data_dir, receivers=2), SystemClock()
    assert pressed_elsewhere(config, clock) == Pressed(Grade.OPEN)
    sick = pressure(data_dir)
    for _ in range(2):
        sick.failed("sync", OSError(errno.EIO, ""))
    beat(data_dir, "receiver-2", pulse(**disk_facts(sick)))
    beat(data_dir, "work", pulse(**disk_facts(pressure(data_dir))))
    assert pressed_elsewhere(config, clock) == Pressed(Grade.PAUSED, "writing has failed")
    dead = Pulse(pid=1, boot_id="another", boot_s=0.0, started_at="", ok=True, facts=disk_facts(sick))
    beat(data_dir, "receiver-2", dead)
    assert pressed_elsewhere(config, clock) == Pressed(Grade.OPEN)


def test_a_change_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = [Pressed(Grade.OPEN)]
    watch = DiskWatch(pressure(tmp_path), lambda: found[0])
    with caplog.at_level(logging.INFO):
        for now in (Grade.OPEN, Grade.PAUSED, Grade.PAUSED, Grade.REFUSING, Grade.REFUSING, Grade.OPEN, Grade.OPEN):
            found[0] = Pressed(now, "why" if now else "")
            watch.look()
    told = [record for record in caplog.records if record.name == "dicom_node.backpressure"]
    assert [record.intake_state for record in told] == [1, 2, 0]  # type: ignore[attr-defined]
    assert watch.pressed() == Pressed(Grade.OPEN)


def test_a_sign_of_life_is_given_on_a_full_disk_too(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert beat(data_dir, "work", pulse(first="a long fact, so that the next is shorter"))

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert beat(data_dir, "work", pulse(second=2))
    told = read_pulse(data_dir, "work")
    assert told is not None and told.facts == {"second": 2}
    assert beat(data_dir, "receiver", pulse()) is False, "there is none to write over"
    assert [path.name for path in run_folder(data_dir).iterdir()] == ["work.json"]


def test_a_sign_of_life_that_cannot_be_written_at_all_is_no_error(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("write_bytes", "unlink", "open"):
        monkeypatch.setattr(Path, call, refused)
    assert beat(data_dir, "work", pulse()) is False


def test_the_files_of_counters_have_their_blocks_before_they_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import values

    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv(MULTIPROCESS_VARIABLE, str(tmp_path))
    Metrics(NodeConfig(), process="work")
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["counter_work.db", "histogram_work.db"]
    for path in files:
        assert path.stat().st_blocks * 512 >= path.stat().st_size == FILE_BYTES, "touching a hole would be a SIGBUS"
