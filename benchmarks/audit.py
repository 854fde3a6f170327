"""What the audit trail costs in processor time: `python benchmarks/audit.py`; with `--node`, of a whole receiver."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage

from dicom_node.audit.message import Identity
from dicom_node.audit.trail import FileTrail
from dicom_node.audited import ReceivedStudies
from dicom_node.auditing import AuditEvent, AuditKind, Participant
from dicom_node.clock import SystemClock
from dicom_node.model import Source, StoreOutcome

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
IDENTITY = Identity(source_id="NODE", ae_titles=("DICOM_NODE",), host="node", process="dicom-node receiver 1")


def source(number: int) -> Source:
    return Source(
        calling_ae_title="CT1", called_ae_title="N", address="192.0.2.1", association_id=f"association {number}"
    )


def pieces(count: int) -> None:
    """Of each thing that is told, with everything until it is in the file."""
    with tempfile.TemporaryDirectory() as folder:
        trail = FileTrail(Path(folder, "audit"), IDENTITY, SystemClock(), file_bytes=64 << 20, max_message_bytes=32768)
        received = ReceivedStudies(trail)
        began = time.process_time()
        for number in range(count):
            received.stored(source(number), f"1.2.{number}", CT, "P1", StoreOutcome.NEW)
            received.ended(source(number), over=True)
        trail.settled(60.0)
        took = time.process_time() - began
        size = sum(file.stat().st_size for file in Path(folder, "audit").glob("*.log"))
        print(f"an association with one study: {took / count * 1e6:.0f} us, {size / count:.0f} bytes")
        same = source(-1)
        began = time.process_time()
        for _ in range(100 * count):
            received.stored(same, "1.2.3", CT, "P1", StoreOutcome.NEW)
        print(f"one more object: {(time.process_time() - began) / count * 1e4:.1f} us")
        trail.close()
    with tempfile.TemporaryDirectory() as folder:
        trail = FileTrail(Path(folder, "audit"), IDENTITY, SystemClock(), file_bytes=64 << 20, max_message_bytes=32768)
        asked = AuditEvent(
            kind=AuditKind.QUERY,
            participants=(Participant(ae_title="WS", host="192.0.2.1", is_requestor=True),),
            query=bytes(200),
            sop_class_uid="1.2.840.10008.5.1.4.1.2.2.1",
        )
        began = time.process_time()
        for _ in range(count):
            trail.record(asked)
        trail.close()
        print(f"a query: {(time.process_time() - began) / count * 1e6:.0f} us")


def receiver(associations: int, *, audit: bool) -> float:
    """Processor seconds of a node's receiver for so many associations that store one small object each."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID = CTImageStorage, generate_uid(), generate_uid()
    ds.SeriesInstanceUID, ds.PatientID, ds.Modality = generate_uid(), "P1", "CT"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT_LE
    with tempfile.TemporaryDirectory() as folder:
        settings = {"data_dir": f"{folder}/data", "rules_dir": f"{folder}/rules", "dicom_port": 0, "http_port": 0}
        Path(folder, "rules").mkdir()
        more = {"engines": {}, "log_level": "ERROR", "audit": {} if audit else None}
        Path(folder, "node.yaml").write_text(json.dumps({**settings, **more}))
        words = [sys.executable, "-m", "dicom_node.cli", "serve", "--config", f"{folder}/node.yaml"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ) as node:
            assert node.stdout is not None
            node.stdout.readline()
            run = Path(folder, "data", "run")
            port = json.loads((run / "supervisor.json").read_text())["facts"]["dicom_port"]
            process = psutil.Process(json.loads((run / "receiver.json").read_text())["pid"])
            client = AE(ae_title="CT1")
            client.add_requested_context(CTImageStorage, EXPLICIT_LE)

            def used() -> float:
                times = process.cpu_times()
                return float(times.user + times.system)

            began = used()
            for number in range(associations):
                ds.SOPInstanceUID = f"1.2.{number + 1}"
                association = client.associate("127.0.0.1", port, ae_title="DICOM_NODE")
                association.send_c_store(ds)
                association.release()
            time.sleep(2.0)
            took = used() - began
            node.send_signal(signal.SIGTERM)
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--node", type=int, default=0, metavar="N", help="associations with a whole node")
    arguments = parser.parse_args()
    pieces(arguments.count)
    for audit in (False, True, False, True) if arguments.node else ():
        took = receiver(arguments.node, audit=audit)
        print(f"receiver, audit {'on' if audit else 'off'}: {took / arguments.node * 1e3:.2f} ms an association")


if __name__ == "__main__":
    main()
