"""The process that opens the catalog for the supervisor: what it tells, and that it ends."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, NodeConfig, PeerSettings, UserIdentitySettings, load_config
from dicom_node.errors import ConfigError, NodeError, StorageError
from dicom_node.model import AssociationEnd, Source
from dicom_node.recovery import Recovery
from dicom_node.store.catalog import open_catalog

SENDER = {"called_ae_title": "DICOM_NODE", "address": "127.0.0.1"}


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    storage = {"reserve_bytes": 0, "reserve_ratio": 0.0}
    (tmp_path / "data").mkdir()
    settings = {"data_dir": str(tmp_path / "data"), "destinations": {}, "engines": {}, "storage": storage}
    return load_config(environ={}, overrides=settings)


def pids() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def caught(pid: int) -> set[int]:
    """The signals that a process has handlers for."""
    (mask,) = re.findall(r"^SigCgt:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}


def begin(config: NodeConfig, epoch: str) -> None:
    """An association of that life of a receiver, which is not ended."""
    catalog = open_catalog(config.data_dir, SystemClock(), config.storage, epoch=epoch)
    catalog.index.open_association(epoch, Source(calling_ae_title="CT1", association_id=epoch, **SENDER))
    catalog.close()


def ends(config: NodeConfig) -> dict[str, str]:
    """How each association ended."""
    catalog = open_catalog(config.data_dir, SystemClock(), config.storage)
    try:
        with catalog.database.read() as db:
            return dict(db.execute("SELECT association_id, ended FROM association").fetchall())
    finally:
        catalog.close()


def test_it_makes_the_catalog_ready_and_is_gone(config: NodeConfig) -> None:
    before = pids()
    with closing(Recovery(config)) as recovery:
        recovery.recover()
    assert (config.data_dir / "catalog.db").exists()
    assert pids() == before


def test_users_that_are_wrong_keep_the_catalog_shut(config: NodeConfig, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("anna:secret\n")
    users.chmod(0o600)
    wrong = config.model_copy(update={"user_identity": UserIdentitySettings(users_file=users)})
    with closing(Recovery(wrong)) as recovery, pytest.raises(ConfigError, match="is no NAME:scrypt"):
        recovery.recover()
    assert not (config.data_dir / "catalog.db").exists()


def test_only_associations_of_those_that_died_are_ended(config: NodeConfig) -> None:
    for epoch in ("dead", "alive"):
        begin(config, epoch)
    with closing(Recovery(config)) as recovery:
        recovery.end_associations({"alive"}, 60.0)
    assert ends(config) == {"dead": AssociationEnd.DEAD.value, "alive": "open"}
    with closing(Recovery(config)) as recovery:
        recovery.recover()
    assert ends(config) == {"dead": AssociationEnd.DEAD.value, "alive": AssociationEnd.DEAD.value}


def test_what_it_raised_is_raised_here_with_its_message(config: NodeConfig, tmp_path: Path) -> None:
    (tmp_path / "data" / "catalog.db").write_text("this is no database " * 1000)
    with (
        closing(Recovery(config)) as recovery,
        pytest.raises(
            StorageError, match=r"damaged: file is not a database; .* move catalog.db,.* restore.* fsck --repair"
        ),
    ):
        recovery.recover()
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "one.yaml").write_text("rule: one\nwhen: ['Modality == ']\nsend: {to: [PACS]}\n")
    with closing(Recovery(config.model_copy(update={"rules_dir": rules}))) as recovery:
        with pytest.raises(NodeError, match=r"one.yaml"):
            recovery.check()
        (rules / "one.yaml").unlink()
        recovery.check()  # one error does not end it


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "ended with status -9"), (signal.SIGSTOP, "within 0.5 s; see whether the disk")],
)
def test_one_that_dies_or_hangs_is_told_and_leaves_nothing(config: NodeConfig, number: int, says: str) -> None:
    before = pids()
    with closing(Recovery(config)) as recovery, pytest.raises(NodeError, match=says):
        (pid,) = pids() - before
        os.kill(pid, number)
        recovery.end_associations((), 0.5 if number == signal.SIGSTOP else 60.0)
    assert pids() == before


def test_one_that_has_died_before_it_is_asked_is_told(config: NodeConfig) -> None:
    before = pids()
    with closing(Recovery(config)) as recovery:
        recovery.recover()
        (pid,) = pids() - before
        os.kill(pid, signal.SIGKILL)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(NodeError, match="ended with status -9"):
            recovery.check()
    assert pids() == before


def test_orders_that_nobody_reads_end_in_time(config: NodeConfig) -> None:
    """A configuration that does not fit into a pipe."""
    peers = {f"p{number}": PeerSettings(ae_title=f"AE{number}") for number in range(400)}
    before = pids()
    with closing(Recovery(config.model_copy(update={"peers": peers}))) as recovery:
        (pid,) = pids() - before
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(NodeError, match=r"within 0\.5 s"):
            recovery.end_associations((), 0.5)
    with closing(Recovery(config.model_copy(update={"peers": peers}))) as recovery:
        recovery.recover()


TALKS = """
import subprocess
class Engine:
    def __init__(self, name, settings, **more): pass
    def check(self):
        print('["ConfigError", "forged"]', flush=True)
        subprocess.run(["echo", "out"], check=True)
        assert subprocess.run(["cat"], stdout=subprocess.PIPE, timeout=20).stdout == b""
        left = subprocess.Popen(["sleep", "60"], start_new_session=True)
        with open(PID, "w") as file: file.write(str(left.pid))
        ended = subprocess.Popen(["sleep", "60"])
        ended.terminate()
        ended.wait(10)
    def close(self): pass
"""


def test_what_an_engine_prints_starts_and_leaves_is_no_answer(
    config: NodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pid_file = tmp_path / "left"
    (tmp_path / "talks.py").write_text(f"PID = {str(pid_file)!r}\n{TALKS}")
    info = tmp_path / "talks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: talks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dicom_node.engines]\ntalks = talks:Engine\n")
    rules = tmp_path / "rules"
    rules.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    talking = {"engines": {"talks": EngineSettings(kind="talks")}, "rules_dir": rules}
    before = pids()
    with closing(Recovery(config.model_copy(update=talking))) as recovery:
        (pid,) = pids() - before
        recovery.recover()
        recovery.check()
        left = int(pid_file.read_text())
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(NodeError, match="ended with status -9"):
            recovery.check()
        assert time.monotonic() - began < 10, "what it started held the answers open"
    os.kill(left, signal.SIGKILL)
    said = capfd.readouterr()
    assert "cannot run" not in said.err and "forged" in said.err and not said.out


def test_one_that_gets_no_orders_touches_nothing(config: NodeConfig) -> None:
    before = pids()
    with closing(Recovery(config)):
        assert pids() != before
    assert pids() == before
    assert not list(config.data_dir.iterdir())


def test_a_stop_that_is_asked_for_waits_for_it(config: NodeConfig, wait_for: Callable[..., None]) -> None:
    """Where every process gets it, as from a service manager that is set so; and Ctrl-C reaches the supervisor only."""
    before = pids()
    with closing(Recovery(config)) as recovery:
        (pid,) = pids() - before
        assert os.getpgid(pid) != os.getpgid(0)
        wait_for(lambda: signal.SIGTERM in caught(pid), 60, "it to begin")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        recovery.recover()
    assert (config.data_dir / "catalog.db").exists()
