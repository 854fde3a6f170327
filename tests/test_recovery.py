"""The process that opens the catalog for the supervisor: what it tells, and that it ends."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, UserIdentitySettings, load_config
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


def ignored(pid: int) -> set[int]:
    """The signals that a process ignores."""
    (mask,) = re.findall(r"^SigIgn:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
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
    with Recovery(config) as recovery:
        recovery.recover()
    assert (config.data_dir / "catalog.db").exists()
    assert pids() == before


def test_users_that_are_wrong_keep_the_catalog_shut(config: NodeConfig, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("anna:secret\n")
    users.chmod(0o600)
    wrong = config.model_copy(update={"user_identity": UserIdentitySettings(users_file=users)})
    with Recovery(wrong) as recovery, pytest.raises(ConfigError, match="is no NAME:scrypt"):
        recovery.recover()
    assert not (config.data_dir / "catalog.db").exists()


def test_only_associations_of_those_that_died_are_ended(config: NodeConfig) -> None:
    for epoch in ("dead", "alive"):
        begin(config, epoch)
    with Recovery(config) as recovery:
        recovery.end_associations({"alive"}, 60.0)
    assert ends(config) == {"dead": AssociationEnd.DEAD.value, "alive": "open"}
    with Recovery(config) as recovery:
        recovery.recover()
    assert ends(config) == {"dead": AssociationEnd.DEAD.value, "alive": AssociationEnd.DEAD.value}


def test_what_it_raised_is_raised_here_with_its_message(config: NodeConfig, tmp_path: Path) -> None:
    (tmp_path / "data" / "catalog.db").write_text("this is no database " * 1000)
    with (
        Recovery(config) as recovery,
        pytest.raises(
            StorageError, match=r"damaged: file is not a database; .* move catalog.db,.* restore.* fsck --repair"
        ),
    ):
        recovery.recover()
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "one.yaml").write_text("rule: one\nwhen: ['Modality == ']\nsend: {to: [PACS]}\n")
    with Recovery(config.model_copy(update={"rules_dir": rules})) as recovery:
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
    with Recovery(config) as recovery, pytest.raises(NodeError, match=says):
        (pid,) = pids() - before
        os.kill(pid, number)
        recovery.end_associations((), 0.5 if number == signal.SIGSTOP else 60.0)
    assert pids() == before


def test_one_that_gets_no_orders_touches_nothing(config: NodeConfig) -> None:
    before = pids()
    with Recovery(config):
        assert pids() != before
    assert pids() == before
    assert not list(config.data_dir.iterdir())


def test_a_stop_that_is_asked_for_waits_for_it(config: NodeConfig, wait_for: Callable[..., None]) -> None:
    """As the whole group of processes gets it: from a terminal, or from systemd."""
    before = pids()
    with Recovery(config) as recovery:
        (pid,) = pids() - before
        wait_for(lambda: signal.SIGTERM in ignored(pid), 60, "it to begin")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        recovery.recover()
    assert (config.data_dir / "catalog.db").exists()
