"""From a pushed CT to its result at the destination: what each stage takes.

    python benchmarks/turnaround.py [--slices 300] [--repeat 3] [--quiet 2]

A node with the demonstration model as it ships; a phantom CT is pushed by dcmtk's storescu over one association, SEG
and SR are received by dcmtk's storescp. The stages are those of the node's own timeline; `SEG there` is when the file
lay in the destination's folder. "Not inference" is the time from the last image's Success to the results' delivery
without the quiet time that completion waits and without the engine's own stages, from reading the pixels to the labels
on the grid of the images (load to finish); "not forward" leaves out the network's pass only. `rest` is what a job took
beside its stages: its input from the catalog, memory shared with the runtime, the transaction that ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from _bench_node import BenchNode
from _bench_systems import SINK, Sink, free_port, without_nodelay
from pydicom.filereader import read_file_meta_info

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings, packaged
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.model import TimelineEvent
from dicom_node.store.catalog import Catalog, open_catalog

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
BOUND_S = 1.5
PATIENCE_S = 240.0
STAGES = ("load", "prepare", "wait", "forward", "finish", "encode")
ROWS = ("push", "quiet", "route", "queue", *STAGES, "rest", "deliver")
ENGINE = frozenset({"load", "prepare", "wait", "forward", "finish"})


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=2.0, help="completion.quiet_s; the node's default is 10")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        _run(Path(temporary), options.slices, options.repeat, options.quiet)


def _run(work: Path, slices: int, repeat: int, quiet_s: float) -> None:
    studies = [
        write_ct_series(
            work / f"ct-{number}", 910_000 + number, shape=(slices, 512, 512), spacing_mm=(1.25, 0.75, 0.75)
        )
        for number in range(repeat)
    ]
    port = free_port()
    settings: dict[str, Any] = {
        "rules_dir": str(packaged("default_rules")),
        "engines": {"ct-abdomen": {"model": "demo-ct-abdomen"}, "cxr-findings": {"model": "demo-cxr-findings"}},
        "jobs": {},
        "destinations": {"PACS": {"ae_title": SINK, "host": "127.0.0.1", "port": port}},
        "completion": {"quiet_s": quiet_s},
    }
    with Sink(work / "pacs", port) as received, BenchNode(work / "node", **settings) as node:
        catalog = open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
        try:
            _wait_warm(node.data_dir)
            found = [
                _one(node, catalog, received, work / f"ct-{number}", study.study_instance_uid, quiet_s)
                for number, study in enumerate(studies)
            ]
        finally:
            catalog.close()
    _tell(found, slices)


def _wait_warm(data_dir: Path) -> None:
    """Until the models are loaded: a node does that at its start, beside everything else."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        work = json.loads((data_dir / "run" / "work.json").read_text())
        if any(runtime["models"] for runtime in work["facts"].get("runtimes", ())):
            return
        time.sleep(0.2)
    raise SystemExit("no model was loaded")


def _one(
    node: BenchNode, catalog: Catalog, received: Path, folder: Path, study: str, quiet_s: float
) -> Mapping[str, float]:
    before = set(received.iterdir())
    began = time.monotonic()
    words = ["storescu", "-R", "+sd", "-aet", SINK, "-aec", node.ae_title, "127.0.0.1", str(node.port), str(folder)]
    subprocess.run(words, check=True, env=without_nodelay() | {"TCP_NODELAY": "1"}, stdout=subprocess.DEVNULL)
    pushed = time.monotonic() - began
    deadline = time.monotonic() + PATIENCE_S
    while not any(event.text.startswith("delivered to") for event in catalog.queue.timeline(study)):
        if time.monotonic() > deadline:
            lines = "\n".join(event.text for event in catalog.queue.timeline(study))
            raise SystemExit(f"not delivered after {PATIENCE_S:g} s:\n{lines}")
        time.sleep(0.05)
    arrived = [
        path for path in set(received.iterdir()) - before if read_file_meta_info(path).MediaStorageSOPClassUID == SEG
    ]
    return _stages(catalog.queue.timeline(study), pushed, quiet_s, [os.stat(path).st_mtime for path in arrived])


def _stages(
    events: Sequence[TimelineEvent], pushed: float, quiet_s: float, seg: Sequence[float]
) -> Mapping[str, float]:
    def at(pattern: str) -> tuple[datetime, str]:
        return next((event.at, event.text) for event in events if re.search(pattern, event.text))

    last, routed, begun = at("^last instance")[0], at("routed by")[0], at(" begun$")[0]
    done, text = at(" done: ")
    delivered = at("^delivered to")[0]
    stages = {stage: float(seconds) for stage, seconds in re.findall(r"(\w+) ([\d.]+) s", text.split(" done: ")[1])}
    found = {
        "push": pushed,
        "quiet": quiet_s,
        "route": (routed - last).total_seconds() - quiet_s,
        "queue": (begun - routed).total_seconds(),
        **{stage: stages.get(stage, 0.0) for stage in STAGES},
        "rest": (done - begun).total_seconds() - sum(stages.values()),
        "deliver": (delivered - done).total_seconds(),
    }
    after = {stage: seconds for stage, seconds in found.items() if stage not in ("push", "quiet")}
    found["not inference"] = sum(seconds for stage, seconds in after.items() if stage not in ENGINE)
    found["not forward"] = sum(after.values()) - after["forward"]
    found["last image to results"] = (delivered - last).total_seconds()
    found["last image to SEG there"] = min(seg, default=float("nan")) - last.timestamp()
    return found


def _tell(found: Sequence[Mapping[str, float]], slices: int) -> None:
    print(f"a CT of {slices} slices of 512 x 512, seconds: median, then each run")
    for row in (*ROWS, "not inference", "not forward", "last image to results", "last image to SEG there"):
        values = [one[row] for one in found]
        each = "  ".join(f"{value:7.2f}" for value in values)
        print(f"  {row:24} {statistics.median(values):7.2f}   {each}")
    median = statistics.median(one["not inference"] for one in found)
    print(f"not inference: {median:.2f} s, at most {BOUND_S:g} s wanted{'' if median <= BOUND_S else ': TOO MUCH'}")


if __name__ == "__main__":
    main()
