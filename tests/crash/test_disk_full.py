"""A node on a small volume of its own that is filled to the last byte, and emptied: no restart, nothing lost."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset

from dicom_node.config import DeliverySettings
from dicom_node.dimse.committing import DimseCommitment
from dicom_node.model import CommitmentReport, CommitmentTimes, Destination, ObjectReference

CAPTURE, EXPLICIT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.2.1"
STUDY = "1.2.826.0.1.3680043.10.999.77"
MIB = 1 << 20
VOLUME, RESERVE, FLOOR = 96 * MIB, 16 * MIB, 4 * MIB
STORAGE = {"reserve_bytes": RESERVE, "reserve_ratio": 0.0, "pause_at": 2.0, "catalog_reserve_bytes": FLOOR}
RECOVERY_S = 5.0

Start = Callable[..., Any]
WaitFor = Callable[[Callable[[], object], float, str], None]
Tool = Callable[[str], str]


@pytest.fixture(params=["tmpfs", "ext4"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own. Only root may mount one."""
    if os.geteuid():
        pytest.skip("needs root, to mount a small volume")
    point = tmp_path / "volume"
    point.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME}", "dicom-node-test", str(point)]
    else:
        image = tmp_path / "volume.img"
        with image.open("wb") as file:
            file.truncate(VOLUME)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True, timeout=60)
        mount = ["mount", "-o", "loop", str(image), str(point)]
    if subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip(f"needs to mount {request.param}, which this machine does not let root do")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True, timeout=30)


class Ballast:
    """What fills the volume."""

    def __init__(self, volume: Path) -> None:
        self._volume, self._path = volume, volume / "ballast"

    def leave(self, free: int) -> None:
        """So that `free` bytes are left, or as few as the file system lets anyone come to."""
        self._path.touch()
        size = self._path.stat().st_size + shutil.disk_usage(self._volume).free - free
        with self._path.open("r+b") as file:
            if size < self._path.stat().st_size:
                file.truncate(size)
            else:
                while size > 0:
                    try:
                        os.posix_fallocate(file.fileno(), 0, size)
                        break
                    except OSError:  # the file system's own blocks need some
                        size -= 4096


class Peer:
    """DCMTK's SCUs on one node."""

    def __init__(self, node: Any, tool: Tool, folder: Path) -> None:
        self._node, self._tool, self._folder = node, tool, folder
        self.stored: dict[str, Path] = {}
        self._made = 0

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`name` with these words."""
        command = [self._tool(name), "-v", "-aet", "CT1", "-aec", "DICOM_NODE", "-to", "10", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    @property
    def where(self) -> tuple[str, str]:
        """Host and port."""
        return "127.0.0.1", str(self._node.dicom_port)

    def store(self, size: int = MIB) -> str:
        """Send one new object; the status answered, `0000` where it is Success."""
        self._made += 1
        uid = f"{STUDY}.1.{self._made}"
        path = self._folder / f"{uid}.dcm"
        _write(path, uid, size)
        answer = self.run("storescu", *self.where, str(path), "-d")
        statuses = re.findall(r"DIMSE Status\s+: 0x([0-9a-f]{4})", answer.stdout + answer.stderr)
        assert statuses, answer.stdout + answer.stderr
        if statuses[-1] == "0000":
            self.stored[uid] = path
        return str(statuses[-1])

    def others_go_on(self) -> None:
        """C-ECHO, C-FIND, C-GET and C-MOVE are answered as ever."""
        echo = self.run("echoscu", *self.where)
        assert echo.returncode == 0, echo.stderr
        keys = (
            "QueryRetrieveLevel=IMAGE",
            f"StudyInstanceUID={STUDY}",
            f"SeriesInstanceUID={STUDY}.1",
            "SOPInstanceUID=",
        )
        found = self.run("findscu", *self.where, "-S", *(word for key in keys for word in ("-k", key)))
        assert found.returncode == 0 and (found.stdout + found.stderr).count(f"{STUDY}.1.") >= len(self.stored)
        self._check(self._fetched("get"))
        self._check(self._fetched("move"))

    def _fetched(self, how: str) -> Path:
        into = self._folder / how
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        keys = ["-S", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY}"]
        if how == "get":
            answer = self.run("getscu", *self.where, "+xe", "-od", str(into), *keys)
        else:
            port = str(self._node.move_port)
            answer = self.run("movescu", *self.where, "+P", port, "+xe", "-aem", "MOVED", "-od", str(into), *keys)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return into

    def _check(self, folder: Path) -> None:
        kept = {str(ds.SOPInstanceUID): ds for path in folder.iterdir() for ds in [dcmread(path)]}
        assert kept.keys() == self.stored.keys()
        for uid, path in self.stored.items():
            assert kept[uid].PixelData == dcmread(path).PixelData


def _write(path: Path, uid: str, size: int) -> None:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = CAPTURE, uid, STUDY, f"{STUDY}.1"
    ds.PatientID, ds.Modality = "DISK", "OT"
    ds.Rows, ds.Columns = size // 1024, 1024
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = os.urandom(size)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    ds.save_as(path, enforce_file_format=True)


def _state(node: Any) -> float:
    (line,) = [line for line in node.get("/metrics")[1].splitlines() if line.startswith("dicom_node_intake_state ")]
    return float(line.split()[-1])


def _disk_check(node: Any) -> dict[str, Any]:
    (check,) = [one for one in json.loads(node.get("/ready")[1])["checks"] if one["name"] == "disk"]
    return dict(check)


def _committed(node: Any, peer: Peer) -> int:
    """How many of the stored objects the node commits to, asked now."""
    settings = DeliverySettings(connect_timeout_s=5.0, response_timeout_s=20.0)
    to = Destination(
        name="node",
        ae_title="DICOM_NODE",
        host="127.0.0.1",
        port=node.dicom_port,
        calling_ae_title="CT1",
        commitment=CommitmentTimes(wait_s=20.0, timeout_s=30.0),
    )
    references = [ObjectReference(sop_class_uid=CAPTURE, sop_instance_uid=uid) for uid in peer.stored]
    reports: list[CommitmentReport] = []
    question = {f"{STUDY}.9.{time.monotonic_ns()}": references}
    DimseCommitment(settings, "CT1").ask(to, question, reports.append, lambda: not reports, lambda: None)
    assert len(reports) == 1, "no report came on the association"
    return len(reports[0].committed)


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_a_full_disk_refuses_images_and_nothing_else_and_recovers_by_itself(
    volume: Path, running_node: Start, wait_for: WaitFor, tool: Tool, free_port: Callable[[], int], tmp_path: Path
) -> None:
    move_port, report = free_port(), {"report_host": "127.0.0.1", "report_port": free_port()}
    node = running_node(
        data_dir=str(volume / "data"),
        engines={},
        jobs={"workers": 0},
        completion={"quiet_s": 0.5},
        storage=STORAGE | {"journal_bytes": 16 * MIB},
        peers={"scanner": {"ae_title": "CT1", "storage_commitment": True, **report}},
        destinations={"MOVED": {"ae_title": "MOVED", "host": "127.0.0.1", "port": move_port}},
    )
    node.move_port = move_port
    folder = tmp_path / "sent"
    folder.mkdir()
    peer, ballast = Peer(node, tool, folder), Ballast(volume)
    pids = {member.pid for member in node.members()}

    assert [peer.store() for _ in range(3)] == ["0000"] * 3
    assert _state(node) == 0 and _disk_check(node) == {"name": "disk", "ok": True, "detail": ""}

    ballast.leave(RESERVE + 10 * MIB)  # comes near
    wait_for(lambda: _state(node) == 1, 10, "background work to be paused")
    assert _disk_check(node)["ok"] and "near the reserve" in _disk_check(node)["detail"]
    assert peer.store() == "0000"

    refused = 0
    for free in (RESERVE - 2 * MIB, FLOOR - MIB, 0):  # below the reserve; below the catalog's own; to the last byte
        ballast.leave(free)
        wait_for(lambda: _state(node) == 2, 10, "intake to be refused")
        assert {peer.store(), peer.store(100_000)} == {"a700"}
        refused += 2
        assert not _disk_check(node)["ok"] and node.get("/ready")[0] == 503
        peer.others_go_on()
        if free:  # a request is kept in the catalog, which must have some room
            assert _committed(node, peer) == len(peer.stored)
        assert "C-STORE IS REFUSED" in node.command("status").stdout
    for _ in range(20):  # as a scanner does that tries again and again
        refused += 1
        assert peer.store(100_000) == "a700"
    assert len(peer.stored) == 4

    ballast.leave(2 * RESERVE + 8 * MIB)
    began = time.monotonic()
    wait_for(lambda: peer.store() == "0000", RECOVERY_S + 5, "intake to be open again")
    took_s = time.monotonic() - began
    assert took_s < RECOVERY_S
    wait_for(lambda: _state(node) == 0 and node.get("/ready")[0] == 200, 15, "the node to be ready again")
    peer.others_go_on()
    assert {member.pid for member in node.members()} == pids, "a process was started anew"
    changes = [line for line in node.log.read_text().splitlines() if "disk_pressure" in line]
    assert len(changes) <= 5, "a change is logged once"
    told = {"refused": refused, "open_again_s": round(took_s, 2), "changes_logged": len(changes)}
    logging.getLogger(__name__).info("a full disk", extra=told)
    assert node.stop() == 0
    assert node.command("fsck").returncode == 0


@pytest.mark.crash
@pytest.mark.timeout(180)
def test_a_node_without_descriptors_crashes_nowhere_and_takes_connections_again_when_some_are_free(
    running_node: Start, wait_for: WaitFor, tool: Tool, tmp_path: Path
) -> None:
    limit = 96
    node = running_node(
        first=f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))",
        engines={},
        jobs={"workers": 0},
    )
    pids = {member.pid for member in node.members()}
    receiver = psutil.Process(node.pid("receiver"))
    peer = Peer(node, tool, tmp_path)
    assert peer.store(100_000) == "0000"
    with ExitStack() as held:
        for _ in range(2 * limit):
            held.enter_context(socket.create_connection(("127.0.0.1", node.dicom_port), timeout=5))
        wait_for(lambda: receiver.num_fds() >= limit - 1, 20, "the descriptors to be used up")
        time.sleep(1.0)  # it tries again and again
    wait_for(lambda: peer.run("echoscu", *peer.where).returncode == 0, 30, f"an echo to be answered; {node.tail()}")
    assert peer.store(100_000) == "0000"
    assert {member.pid for member in node.members()} == pids, "a process was started anew"
    wait_for(lambda: receiver.num_fds() < limit // 2, 30, "the descriptors to be given back")
    told = node.log.read_text().count("connection could not be accepted")
    assert 1 <= told <= 100, told


@pytest.mark.crash
@pytest.mark.timeout(180)
@pytest.mark.parametrize("volume", ["ext4"], indirect=True)
def test_a_file_system_that_turns_read_only_refuses_images_and_nothing_else(
    volume: Path, running_node: Start, wait_for: WaitFor, tool: Tool, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port = free_port()
    node = running_node(
        data_dir=str(volume / "data"),
        engines={},
        jobs={"workers": 0},
        storage=STORAGE | {"journal_bytes": 16 * MIB},
        destinations={"MOVED": {"ae_title": "MOVED", "host": "127.0.0.1", "port": port}},
    )
    node.move_port = port
    folder = tmp_path / "sent"
    folder.mkdir()
    peer, pids = Peer(node, tool, folder), {member.pid for member in node.members()}
    assert [peer.store(100_000) for _ in range(3)] == ["0000"] * 3
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    (device,) = [line.split()[0] for line in mounts if line.split()[1] == str(volume)]
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", str(volume)], check=True, timeout=30)
    trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
    try:
        trigger.write_text("1")  # as the kernel does when a disk fails; there is no way back but to mount it anew
    except OSError:
        pytest.skip("needs /sys/fs/ext4 to make a file system fail")
    wait_for(lambda: _state(node) == 2, 15, "intake to be refused")
    for _ in range(3):
        assert not _disk_check(node)["ok"]
        assert peer.store(100_000) == "a700"
        peer.others_go_on()
    time.sleep(8.0)  # longer than a sign of life may be silent; nobody tries to store
    assert _state(node) == 2
    peer.others_go_on()
    assert {member.pid for member in node.members()} == pids, "a process was started anew"
