"""Objects stream in while processes are killed at random moments: whatever was acknowledged is there, byte for byte."""

import hashlib
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings, StorageSettings
from dicom_node.dimse.files import instance_of_file, send_files
from dicom_node.dimse.session import is_stored
from dicom_node.errors import NodeError
from dicom_node.model import Destination, Level
from dicom_node.store.catalog import open_catalog

ROUNDS = int(os.environ.get("TEST_CRASH_ROUNDS", "10"))
SEED = int(os.environ.get("TEST_CRASH_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
VICTIMS = ("receiver", "supervisor", "receiver", "service", "receiver", "work")  # the receiver is who acknowledges
SENDERS = 3
PER_ASSOCIATION = 20
CAPTURE, EXPLICIT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.2.1"
ROOT = "1.2.826.0.1.3680043.10.999"
QUICK = DeliverySettings(connect_timeout_s=5.0, response_timeout_s=20.0)

Start = Callable[..., Any]
WaitFor = Callable[[Callable[[], object], float, str], None]


class Sender(threading.Thread):
    """Sends new objects, again and again until they are acknowledged; `acknowledged`: UID to SHA-256 of its data set.

    Each association carries a study of its own. What was not acknowledged is sent again, as any sender does.
    """

    def __init__(self, number: int, folder: Path, to: Destination) -> None:
        super().__init__(name=f"sender-{number}", daemon=True)
        self._root, self._to, self._folder = f"{ROOT}.{number}", to, folder / str(number)
        self._folder.mkdir(parents=True)
        self._enough = threading.Event()
        self._random = random.Random(SEED + number)
        self.acknowledged: dict[str, str] = {}
        self.studies: set[str] = set()
        self.broken = 0
        self.fault: Exception | None = None

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                self._send_study(f"{self._root}.{len(self.studies) + 1}")
        except Exception as exc:  # noqa: BLE001 - told by the test
            self.fault = exc

    def stop(self) -> None:
        """Send what is left of the study under way, and no more."""
        self._enough.set()
        self.join(timeout=60.0)
        assert not self.is_alive() and self.fault is None, self.fault

    def _send_study(self, study: str) -> None:
        digests: dict[Path, str] = {}
        for number in range(PER_ASSOCIATION):
            path = self._write(study, f"{study}.1.{number + 1}")
            sent = instance_of_file(path)
            digests[path] = hashlib.sha256(path.read_bytes()[sent.data_set_offset :]).hexdigest()
        self.studies.add(study)

        def on_result(path: Path, status: int | None, error: str) -> None:
            if status is not None and is_stored(status):
                self.acknowledged[path.name] = digests.pop(path)

        while digests:
            try:
                send_files(list(digests), self._to, on_result, settings=QUICK, calling_ae_title=self.name.upper())
            except NodeError:
                self.broken += 1
                time.sleep(0.05)

    def _write(self, study: str, uid: str) -> Path:
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = CAPTURE, uid, study, f"{study}.1"
        ds.PatientID, ds.Modality = "CRASH", "OT"
        ds.Rows = ds.Columns = 32
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = self._random.randbytes(32 * 32)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = EXPLICIT
        path = self._folder / uid
        ds.save_as(path, enforce_file_format=True)
        return path


def _kill(node: Any, role: str, start: Start, wait_for: WaitFor) -> Any:
    """kill -9 of that process; the node that is ready afterwards."""
    if role == "supervisor":
        family = node.members()
        node.process.kill()
        node.process.wait(timeout=10)
        assert not psutil.wait_procs(family, timeout=20)[1], "a child outlived the supervisor"
        return start()
    old = node.pid(role)
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: node.pid(role) != old, 60, f"a new {role} process; log:\n{node.tail()}")
    node.wait_ready(60)
    return node


@pytest.mark.crash
@pytest.mark.timeout(180 + 60 * ROUNDS)
def test_nothing_acknowledged_is_lost_whoever_is_killed_whenever(
    running_node: Start, wait_for: WaitFor, free_port: Callable[[], int], tmp_path: Path, leftovers: Any
) -> None:
    port = free_port()

    def start() -> Any:
        return running_node(dicom_port=port, engines={}, completion={"quiet_s": 0.5, "quiet_after_fault_s": 1.0})

    node = start()
    to = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=port)
    senders = [Sender(number, tmp_path / "sent", to) for number in range(1, SENDERS + 1)]
    for sender in senders:
        sender.start()
    chance = random.Random(SEED)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(ROUNDS)]
    chance.shuffle(victims)
    told = f"seed {SEED}, victims {victims}"
    logging.getLogger(__name__).info(told)

    def acknowledged() -> int:
        return sum(len(sender.acknowledged) for sender in senders)

    for victim in victims:
        before = acknowledged()
        wait_for(lambda before=before: acknowledged() > before + SENDERS, 60, f"objects to be stored; {told}")  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 1.0))  # the moment is what varies
        node = _kill(node, victim, start, wait_for)
    for sender in senders:
        sender.stop()
    assert sum(sender.broken for sender in senders) > 0, "no kill met a sender"
    assert node.stop() == 0
    node = start()  # a start sweeps what dead receivers left half written
    assert node.stop() == 0

    catalog = open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    try:
        for sender in senders:
            stored = {
                found.sop_instance_uid: found
                for found in catalog.index.instances(Level.STUDY, {"StudyInstanceUID": sorted(sender.studies)})
            }
            assert not sender.acknowledged.keys() - stored.keys(), told
            for uid, digest in sender.acknowledged.items():
                data_set = Path(stored[uid].path).read_bytes()[stored[uid].data_set_offset :]
                assert hashlib.sha256(data_set).hexdigest() == digest, f"{uid}: {told}"
    finally:
        catalog.close()
    assert leftovers(node.data_dir) == [], told
    # a file that was named but never entered was never acknowledged either: the one thing fsck may find
    found = node.command("fsck", check=False).stdout.splitlines()[1:-1]
    assert [line for line in found if not line.startswith("unindexed: ")] == [], told


@pytest.mark.crash
@pytest.mark.timeout(240)
def test_a_process_that_lives_but_hangs_is_replaced(running_node: Start, wait_for: WaitFor) -> None:
    node = running_node(engines={}, jobs={"workers": 0})
    old = node.pid("receiver")
    os.kill(old, signal.SIGSTOP)
    wait_for(lambda: node.pid("receiver") != old, 120, f"a new receiver; log:\n{node.tail()}")
    node.wait_ready(30)
    assert not psutil.pid_exists(old)
