"""kill -9 of each process at each stage of a study: nothing lost, nothing twice, and it goes on by itself."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dicom_node.demo.phantom_dicom import write_cxr

WORK_STATES = ("leased", "done")


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.crash  # `make test` kills at a few commit points: tests/crash
@pytest.mark.timeout(300)
def test_a_study_survives_the_death_of_every_process(
    pair: Callable[..., tuple[Any, Any]],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    wait_for: Callable[..., None],
    running_node: Callable[..., Any],
    tmp_path: Path,
) -> None:
    quick = {"lease_s": 3.0, "backoff_s": 0.5}
    pacs, node = pair(jobs=quick, delivery=quick)
    ours, theirs = eyes(node), eyes(pacs)
    films = [write_cxr(tmp_path / f"film-{number}.dcm", 820000 + number) for number in range(5)]

    def send(number: int) -> str:
        sent = storescu(node, tmp_path / f"film-{number}.dcm")
        assert sent.returncode == 0, sent.stderr
        return films[number].study_instance_uid

    # the receiver dies right after Success: what it acknowledged is there
    study = send(0)
    _kill(node.pid("receiver"))
    assert len(ours.of_modality(study, "DX")) == 1
    node.wait_ready()

    # the work process dies with the job in its hands
    study = send(1)
    wait_for(lambda: any(job.state.value in WORK_STATES for job in ours.jobs(study)), 60, "a lease")
    _kill(node.pid("work"))

    # the process with the network in it dies
    study = send(2)
    wait_for(lambda: any(job.state.value in WORK_STATES for job in ours.jobs(study)), 90, "a lease")
    # a new process may have leased the job before its first sign of life replaces that of the killed one
    wait_for(lambda: psutil.pid_exists(node.pid("work")), 20, "a sign of life of the work process")
    for child in psutil.Process(node.pid("work")).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()

    # the courier dies before or while it delivers
    study = send(3)
    wait_for(lambda: bool(ours.jobs(study)), 60, "a job")
    _kill(node.pid("service"))

    # everything dies at once; nothing of the node is left, and a new start goes on
    study = send(4)
    family = node.members()
    _kill(node.process.pid)
    node.process.wait(timeout=10)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "a child outlived the supervisor"
    again = running_node(
        "node",
        rules_dir=str(node.rules_dir),
        destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port}},
        jobs=quick,
        delivery=quick,
        completion={"quiet_s": 1.0},
    )

    for film in films:
        uid = film.study_instance_uid
        wait_for(lambda uid=uid: ours.at_rest(uid), 120, f"{uid}; log:\n{again.tail()}")
        assert [job.state.value for job in ours.jobs(uid)] == ["done"], [job.error for job in ours.jobs(uid)]
        reports = ours.of_modality(uid, "SR")
        assert len(reports) == 1 and len(ours.of_modality(uid, "DX")) == 1
        assert [one.sha256 for one in theirs.of_modality(uid, "SR")] == [reports[0].sha256]
    ledger = ours.catalog.queue.snapshot()["ledger"]
    assert ledger["imbalance"] == 0 and ledger["routed"] == len(films)
