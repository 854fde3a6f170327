"""Four receiver processes at one port: one may die or be stuck, and nothing acknowledged is lost or doubled."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, StudyRootQueryRetrieveInformationModelFind

Tool = Callable[[str], str]
Start = Callable[..., Any]
WaitFor = Callable[[Callable[[], object], float, str], None]

ROLES = ("receiver", "receiver-2", "receiver-3", "receiver-4")
HASTY = "from dicom_node import supervisor; supervisor.UNWELL_S = 4.0"
SENDERS, EACH = 6, 40
SETTINGS: dict[str, Any] = {
    "receivers": 4,
    "max_associations": 9,
    "jobs": {"workers": 0},
    "engines": {},
    "completion": {"quiet_s": 0.5, "quiet_after_fault_s": 1.0},
}


def instance(study: str, number: int) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{study}.1.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = study, f"{study}.1", number
    ds.PatientID, ds.PatientName, ds.Modality = f"ID{study}", "Doe^Jane", "CT"
    ds.Rows = ds.Columns = 32
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 16, 15, 0, 1
    ds.PhotometricInterpretation, ds.PixelData = "MONOCHROME2", os.urandom(2048)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def write_studies(folder: Path) -> None:
    for study in range(1, SENDERS + 1):
        (folder / f"1.2.{study}").mkdir(parents=True)
        for number in range(1, EACH + 1):
            ds = instance(f"1.2.{study}", number)
            ds.save_as(folder / f"1.2.{study}" / f"{ds.SOPInstanceUID}.dcm", enforce_file_format=True)


def storescu(tool: Tool, node: Any, folder: Path) -> subprocess.Popen[str]:
    words = [tool("storescu"), "-v", "+sd", "-R", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port), str(folder)]
    nodelay = {**os.environ, "TCP_NODELAY": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=nodelay)


def acknowledged(output: str) -> list[str]:
    """The SOP Instance UIDs whose C-STORE was answered with Success."""
    answers = re.findall(r"Sending file: \S*?([\d.]+)\.dcm(?:(?!Sending file).)*?Response \(Success\)", output, re.S)
    return list(answers)


def found(node: Any, study: str) -> list[str]:
    """C-FIND at the IMAGE level."""
    asked = Dataset()
    asked.QueryRetrieveLevel, asked.StudyInstanceUID, asked.SeriesInstanceUID = "IMAGE", study, f"{study}.1"
    asked.SOPInstanceUID = ""
    entity = AE()
    entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    association = entity.associate("127.0.0.1", node.dicom_port, ae_title="DICOM_NODE")
    assert association.is_established
    answers = list(association.send_c_find(asked, StudyRootQueryRetrieveInformationModelFind))
    association.release()
    assert answers[-1][0].Status == 0
    return [answer.SOPInstanceUID for _, answer in answers[:-1]]


def select(node: Any, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{node.data_dir / 'catalog.db'}?mode=ro", uri=True, timeout=10)) as catalog:
        return catalog.execute(sql).fetchall()


def metric(node: Any, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(node.get("/metrics")[1]):
        for sample in family.samples:
            if sample.name == f"dicom_node_{name}" and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"{name}{labels} is not in /metrics")


def role_of(node: Any, connection: socket.socket) -> str:
    """Which receiver serves this connection."""
    for role in ROLES:
        for one in psutil.Process(node.pid(role)).net_connections("tcp"):
            if one.raddr and one.raddr.port == connection.getsockname()[1]:
                return role
    raise AssertionError("no receiver has this connection")


def fed(node: Any, study: str) -> Any:
    """An association that has stored one instance and stays."""
    entity = AE(ae_title="HOLDING")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", node.dicom_port, ae_title="DICOM_NODE")
    assert association.is_established
    assert association.send_c_store(instance(study, 1)).Status == 0
    return association


def kill_one_while_many_send(node: Any, tool: Tool, wait_for: WaitFor, files: Path) -> None:
    """What the dead one acknowledged is there once, the others go on, and so does everything after it."""
    holding = [fed(node, "1.3.1"), fed(node, "1.3.2")]
    victim = role_of(node, holding[0].dul.socket.socket)
    pids = {role: node.pid(role) for role in ROLES}
    senders = [storescu(tool, node, files / f"1.2.{study}") for study in range(1, SENDERS + 1)]
    try:
        wait_for(lambda: select(node, "SELECT count(*) FROM instance")[0][0] > 2 * SENDERS, 30, "some to be stored")
        os.kill(pids[victim], signal.SIGKILL)
        acks = [uid for sender in senders for uid in acknowledged(sender.communicate(timeout=60)[0])]
    finally:
        for sender in senders:
            sender.kill()
    wait_for(lambda: node.pid(victim) != pids[victim], 30, "the receiver to be started again")
    assert all(node.pid(role) == pids[role] for role in ROLES if role != victim), "the others were left alone"
    assert len(acks) == len(set(acks)) >= 2 * SENDERS
    kept = [uid for study in range(1, SENDERS + 1) for uid in found(node, f"1.2.{study}")]
    assert len(kept) == len(set(kept)) and set(acks) <= set(kept)

    # the other association lives on unless it had the same receiver; of the dead one's each is closed as such
    ends = dict(select(node, "SELECT ended, count(*) FROM association WHERE calling_ae_title = 'HOLDING' GROUP BY 1"))
    assert ends.get("dead", 0) >= 1 and sum(ends.values()) == 2
    for association in holding:
        association.abort()

    # its senders try again, as they do; then everything is there once, and every study is accounted for
    for study in range(1, SENDERS + 1):
        with storescu(tool, node, files / f"1.2.{study}") as again:
            assert len(acknowledged(again.communicate(timeout=60)[0])) == EACH
        assert sorted(found(node, f"1.2.{study}")) == sorted(f"1.2.{study}.1.{n}" for n in range(1, EACH + 1))
    assert select(node, "SELECT count(*) FROM variant") == [(0,)]
    wait_for(lambda: metric(node, "ledger_studies", state="filtered") == SENDERS + 2, 30, "every study to be closed")
    assert metric(node, "ledger_imbalance_studies") == 0
    counted = sum(
        metric(node, "instances_received_total", calling_ae="other", modality="CT", outcome=outcome)
        for outcome in ("new", "duplicate")
    )
    assert counted >= len(acks) + SENDERS * EACH  # added up over the receivers, the killed one's life before included


def stop_one(node: Any, tool: Tool, wait_for: WaitFor) -> None:
    """It keeps nothing from the others but what it had accepted, and is replaced."""
    restarts = {role: metric(node, "process_restarts", process=role) for role in ROLES}
    studies = metric(node, "studies")
    dead = select(node, "SELECT count(*) FROM association WHERE ended = 'dead'")[0][0]
    holding = fed(node, "1.4.1")
    victim = role_of(node, holding.dul.socket.socket)
    pid = node.pid(victim)
    os.kill(pid, signal.SIGSTOP)
    try:
        echo = [tool("echoscu"), "-to", "10", "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
        began = time.monotonic()
        clients = [subprocess.Popen(echo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(8)]
        assert [client.wait(timeout=20) for client in clients] == [0] * 8
        assert time.monotonic() - began < 4.0, "none waited for the stopped one"
        assert fed(node, "1.4.2").release() is None
        wait_for(lambda: node.pid(victim) != pid, 30, "the stopped one to be killed and replaced")
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    assert sum(metric(node, "process_restarts", process=role) for role in ROLES) == sum(restarts.values()) + 1
    wait_for(lambda: metric(node, "ledger_studies", state="filtered") == studies + 2, 20, "both studies to be closed")
    assert select(node, "SELECT count(*) FROM association WHERE ended = 'dead'") == [(dead + 1,)]
    status, body = node.get("/ready")
    assert status == 200 and {one["name"]: one["detail"] for one in json.loads(body)["checks"]}["scp"] == ""
    screen = node.command("status").stdout
    assert "receiver ok" in screen and "receivers   4, " in screen and f"{victim} ok (" in screen


def test_receivers_are_killed_and_stopped_and_the_node_goes_on(
    running_node: Start, tool: Tool, wait_for: WaitFor, tmp_path: Path
) -> None:
    write_studies(tmp_path / "in")
    node = running_node(first=HASTY, **SETTINGS)
    kill_one_while_many_send(node, tool, wait_for, tmp_path / "in")
    stop_one(node, tool, wait_for)
