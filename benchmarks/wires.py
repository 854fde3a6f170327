"""The node's own upper layer beside pynetdicom's, the same services on both, in turns within one run.

    python benchmarks/wires.py [--rounds N] [--seconds S]

One client in this process (the node's own requestor on both sides of the comparison), one server in a process of its
own. Echoes and associations a second; C-STORE of 528 KB and of 11 KB objects into a sink that keeps nothing (the wire
alone) and into the archive (every object durable before its Success); C-GET of what was stored.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from dicom_node.config import DeliverySettings
from dicom_node.dimse.contexts import EXPLICIT_LE, VERIFICATION, ProposedContext
from dicom_node.dimse.files import get_study, instance_of_file
from dicom_node.dimse.session import DimseSender, Session
from dicom_node.model import Destination, StoredInstance

CT = "1.2.840.10008.5.1.4.1.1.2"
WIRES = ("own", "pynetdicom")
SERVER = """
import sys, time
from pathlib import Path
from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.dimse.wires import server_class
from dicom_node.model import StoreOutcome, StoreResult
from dicom_node.wiring import node_catalog, node_ingest
wire, kept, folder = sys.argv[1:]
unlimited = {"reserve_bytes": 0, "reserve_ratio": 0}
config = NodeConfig.model_validate({"dicom_port": 0, "data_dir": folder, "storage": unlimited})
catalog = node_catalog(config, SystemClock())
class Nothing:
    def accept(self, *, fragments, **request):
        for _ in fragments: pass
        return StoreResult(status=0, outcome=StoreOutcome.NEW)
sink = node_ingest(catalog, config, SystemClock()) if kept == "kept" else Nothing()
server = server_class(wire)(config, sink=sink, index=catalog.index, associations=catalog.index)
print(server.start(), flush=True)
sys.stdin.read()
server.stop(1.0)
catalog.close()
"""


class Server:
    """One server in a process of its own; ends with its standard input."""

    def __init__(self, wire: str, kept: str, folder: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", SERVER, wire, kept, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self.destination = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=port)

    def __enter__(self) -> Destination:
        return self.destination

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


def objects(folder: Path, count: int, side: int) -> list[Path]:
    """New CT images of side x side pixels, of one study."""
    study, series, paths = generate_uid(), generate_uid(), []
    for number in range(count):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CT, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.PatientID, ds.PatientName, ds.Modality, ds.InstanceNumber = "P1", "Doe^Jane", "CT", number + 1
        ds.Rows = ds.Columns = side
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.PixelData = number.to_bytes(2, "little") * side * side
        ds["PixelData"].VR = "OW"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = EXPLICIT_LE
        paths.append(folder / f"{number}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def per_second(seconds: float, act: Callable[[], object]) -> float:
    """How often `act` can be done in a second."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        act()
        count += 1
    return count / (time.perf_counter() - began)


def stored(destination: Destination, paths: list[Path], settings: DeliverySettings) -> float:
    """Objects a second over one association."""
    instances = [instance_of_file(path) for path in paths]
    bad: list[Any] = []

    def told(instance: StoredInstance, status: int | None, error: str) -> None:
        if status != 0:
            bad.append((status, error))

    began = time.perf_counter()
    DimseSender(settings, "BENCH").send(destination, instances, told, lambda: None)
    took = time.perf_counter() - began
    assert not bad, bad[:3]
    return len(paths) / took


def one_round(wire: str, seconds: float, work: Path) -> dict[str, float]:
    """Every figure once."""
    settings = DeliverySettings()
    contexts = [ProposedContext(abstract_syntax=VERIFICATION, transfer_syntaxes=(EXPLICIT_LE,))]
    found: dict[str, float] = {}
    large, small = work / "large", work / "small"
    for folder in (large, small):
        folder.mkdir()
    slices, thumbnails = objects(large, 100, 512), objects(small, 300, 64)
    with Server(wire, "nothing", work / "none") as node:
        with Session(settings, node, contexts, calling_ae_title="BENCH") as session:
            found["C-ECHO, 1 association, /s"] = per_second(seconds, session.echo)
        found["associations, 1 client, /s"] = per_second(
            seconds, lambda: Session(settings, node, contexts, calling_ae_title="BENCH").close()
        )
        found["C-STORE 528 KB, the wire alone, MB/s"] = stored(node, slices, settings) * 0.528
        found["C-STORE 11 KB, the wire alone, objects/s"] = stored(node, thumbnails, settings)
    with Server(wire, "kept", work / "data") as node:
        found["C-STORE 528 KB, durable, MB/s"] = stored(node, slices, settings) * 0.528
        found["C-STORE 11 KB, durable, objects/s"] = stored(node, thumbnails, settings)
        uid = str(dcmread(slices[0], stop_before_pixels=True).StudyInstanceUID)
        began = time.perf_counter()
        fetched = get_study(node, uid, work / "back", settings=settings, calling_ae_title="BENCH")
        found["C-GET 528 KB, MB/s"] = fetched.completed * 0.528 / (time.perf_counter() - began)
        assert fetched.completed == len(slices)
    return found


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for wire in WIRES:
            with tempfile.TemporaryDirectory(prefix="wires-") as folder:
                for name, value in one_round(wire, options.seconds, Path(folder)).items():
                    figures.setdefault(name, {}).setdefault(wire, []).append(value)
    print(f"{'median of ' + str(options.rounds):44}{'own':>18}{'pynetdicom':>18}   ratio")
    for name, values in figures.items():
        medians = {wire: statistics.median(values[wire]) for wire in WIRES}
        spread = {wire: f"{medians[wire]:.0f} [{min(values[wire]):.0f}-{max(values[wire]):.0f}]" for wire in WIRES}
        ratio = medians["own"] / medians["pynetdicom"]
        print(f"{name:44}{spread['own']:>18}{spread['pynetdicom']:>18}   {ratio:.1f} x")


if __name__ == "__main__":
    main()
