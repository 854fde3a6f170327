"""C-FIND of a node that runs, by kind of key, over an index of N studies; with --orthanc, Orthanc beside it in turns.

    python benchmarks/find.py [--studies N] [--orthanc] [--rounds N] [--seconds S] [--json FILE]

The node's catalog is filled by what indexes an instance, without files: nothing here reads one. Orthanc is sent the
same objects, so keep N small with it: its answers take the longer the more there are. One client on one association
asks each kind of key for some seconds, the systems in turns within every round; it is `_raw_client.py`, which takes
its share of the same processors. Ten keys come back with every row. `cpu` is the processor time of the system's
processes for one question.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from _bench_figures import FIND_MS, FIND_TARGETS, LEVEL, NAME, QUICK, STUDY_UID, Bench, at_once, question, raw_sender
from _bench_objects import EXPLICIT_LE, INDEX, Batch
from _bench_report import Report
from _bench_systems import Node, Orthanc, System, Usage, free_port
from _raw_client import IMPLICIT_LE, STUDY_FIND, RawAssociation

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.headers import scan
from dicom_node.model import ArchivedFile, BootTime, InstanceRecord, Origin, Source
from dicom_node.store.catalog import open_catalog
from dicom_node.store.instances import restore_instance

AT_ONCE = 500  # instances in one transaction

Samples = dict[tuple[str, str], list[float]]  # seconds, or CPU seconds for one question, by kind of key and system


class FilledNode(Node):
    """A node whose catalog knows a batch before it starts."""

    batch: Batch

    def command(self) -> list[str]:
        """As any node's."""
        fill(self.folder / "data", self.batch)
        return super().command()


def fill(data: Path, batch: Batch) -> None:
    """Index every image of the batch in that data folder, as `fsck` would find it there: nothing is routed for it."""
    catalog = open_catalog(data, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    try:
        for first in range(0, len(batch), AT_ONCE):
            some = [record(batch, number) for number in range(first, min(first + AT_ONCE, len(batch)))]
            catalog.database.write(partial(restore, some))
    finally:
        catalog.close()


def restore(records: list[InstanceRecord], connection: sqlite3.Connection) -> None:
    """Index them in one transaction."""
    for one in records:
        restore_instance(connection, one)


def record(batch: Batch, number: int) -> InstanceRecord:
    """Image `number` as the index is told of it."""
    image = batch.image(number)
    encoded = image.head + bytes(image.pixels)
    place = ArchivedFile(
        location=f"{number:08}", data_set_offset=0, data_set_length=len(encoded), sha256=f"{number:064x}"
    )
    return InstanceRecord(
        header=scan(memoryview(encoded), EXPLICIT_LE, max_inflated_header_bytes=1 << 20),
        file=place,
        source=Source(calling_ae_title="BENCH", called_ae_title="DICOM_NODE", address="127.0.0.1"),
        origin=Origin.RECEIVED,
        received_at=datetime.now(UTC),
        received_boot=BootTime(boot_id="", seconds=0.0),
    )


def send(system: System, batch: Batch, work: Path) -> None:
    """Store the batch there, over four associations."""
    bench = Bench(system, QUICK, Report(), work, set())
    at_once([raw_sender(bench, batch, part, 4) for part in range(4)])


def ask(
    association: RawAssociation, system: System, batch: Batch, kind: str, seconds: float, chooser: random.Random
) -> tuple[list[float], float, set[int]]:
    """Seconds each answer took, CPU seconds of a question, and how many rows there were."""
    took, rows = [], set()
    with Usage(system.pid) as usage:
        ends = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < ends:
            keys = question(batch, kind, chooser.randrange(len(batch)))
            begun = time.perf_counter()
            rows.add(association.find(keys))
            took.append(time.perf_counter() - begun)
    return took, usage.cpu_s / len(took), rows


def measure(systems: list[System], batch: Batch, options: argparse.Namespace) -> tuple[Samples, Samples]:
    """Latencies and CPU seconds of every kind and system."""
    took: Samples = defaultdict(list)
    cpu: Samples = defaultdict(list)
    contexts = {STUDY_FIND: IMPLICIT_LE}
    associations = {system.name: RawAssociation(system.port, system.ae_title, contexts) for system in systems}
    for name, association in associations.items():
        if (found := association.find({LEVEL: "STUDY", NAME: "Family*", STUDY_UID: ""})) != len(batch):
            raise SystemExit(f"{name}: {found} of {len(batch)} studies can be found")
    for number in range(options.rounds):
        for kind in FIND_TARGETS:
            answered = {}
            for system in systems:
                some, each, answered[system.name] = ask(
                    associations[system.name], system, batch, kind, options.seconds, random.Random(number)
                )
                took[kind, system.name] += some
                cpu[kind, system.name].append(each)
            if any(0 in rows for rows in answered.values()) or len(set(map(frozenset, answered.values()))) > 1:
                raise SystemExit(f"C-FIND by {kind} brought {answered} rows")
    for association in associations.values():
        association.release()
    return took, cpu


def lines(took: Samples, cpu: Samples, systems: list[System], count: int) -> list[str]:
    """The table."""
    found = [f"{'':20}{'':10}{'p50 ms':>9}{'p99 ms':>9}{'/s':>9}{'cpu ms':>9}"]
    for kind, target in FIND_TARGETS.items():
        for system in systems:
            some, each = sorted(took[kind, system.name]), statistics.median(cpu[kind, system.name])
            p50, p99 = statistics.median(some) * 1e3, some[int(len(some) * 0.99)] * 1e3
            found.append(f"{kind:20}{system.name:10}{p50:9.3f}{p99:9.3f}{_rate(some):9.0f}{each * 1e3:9.3f}")
        if len(systems) > 1:
            ratio = _rate(took[kind, systems[0].name]) / _rate(took[kind, systems[1].name])
            found[-1] += f"   {ratio:.1f}x" + (f", at least {target:g}x" if count == 5000 else "")
        elif count == 100_000 and kind in FIND_MS:
            found[-1] += f"   at most {FIND_MS[kind]:g} ms"
    return found


def _rate(some: list[float]) -> float:
    return len(some) / sum(some)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=5000, help="studies of one image each (default: 5000)")
    parser.add_argument("--orthanc", action="store_true", help="Orthanc beside, with TCP_NODELAY=1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kind of key, system and round")
    parser.add_argument("--scratch", help="folder for the systems' data (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write p50, p99 and rate of each kind")
    return parser.parse_args()


def main() -> None:
    """Command line entry."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or what was started would stay
    batch, load = Batch(INDEX, options.studies), os.getloadavg()[0]
    FilledNode.batch = batch
    kinds: list[type[System]] = [FilledNode, Orthanc] if options.orthanc else [FilledNode]
    with tempfile.TemporaryDirectory(prefix="bench-find-", dir=options.scratch) as folder, ExitStack() as running:
        systems = []
        for kind in kinds:
            began = time.monotonic()
            systems.append(running.enter_context(kind(Path(folder) / kind.name, free_port())))
            if kind is Orthanc:
                send(systems[-1], batch, Path(folder))
            print(f"{kind.name}: {options.studies} studies after {time.monotonic() - began:.0f} s", file=sys.stderr)
        took, cpu = measure(systems, batch, options)
    print(f"C-FIND, {options.studies} studies, {options.rounds} rounds, load at start {load:.1f}")
    print("\n".join(lines(took, cpu, systems, options.studies)))
    if options.json:
        found = [
            {"kind": kind, "system": name, "p50_s": statistics.median(some), "per_s": _rate(some)}
            for (kind, name), some in took.items()
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"studies": options.studies, "figures": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
