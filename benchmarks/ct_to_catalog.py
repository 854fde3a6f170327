"""From a 300 x 512 x 512 CT series on disk to its SEG and SR in the catalog, on one core, in a real node.

    python benchmarks/ct_to_catalog.py [--core N] [--repeat N]

Starts a node bound to one processor, sends the series, then has it analysed again and again (`route --again`): the
first run includes loading torch and the network, the later ones are what a busy node takes. Prints each run's seconds
from taking up the job to results visible in the catalog, with the stages as the node's timeline tells them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings, packaged
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.model import JobState
from dicom_node.store.catalog import Catalog, open_catalog

PATIENCE_S = 240.0


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        _measure(Path(temporary), options.core, options.repeat)


def _measure(work: Path, core: int, repeat: int) -> None:
    series = write_ct_series(work / "ct", 900001, shape=(300, 512, 512), spacing_mm=(1.25, 0.75, 0.75))
    config = work / "node.yaml"
    settings = {
        "data_dir": str(work / "data"),
        "rules_dir": str(packaged("default_rules")),
        "dicom_port": 0,
        "http_port": 0,
        "completion": {"quiet_s": 1.0},
        "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    node = subprocess.Popen(
        [sys.executable, "-m", "dicom_node.cli", "serve", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        assert node.stdout is not None
        node.stdout.readline()
        facts = json.loads((work / "data" / "run" / "supervisor.json").read_text())["facts"]
        _command("send", str(work / "ct"), "--to", f"127.0.0.1:{facts['dicom_port']}/DICOM_NODE")
        catalog = open_catalog(work / "data", SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
        try:
            for run in range(1, repeat + 1):
                if run > 1:
                    _command("route", series.study_instance_uid, "--again", "--config", str(config))
                _wait(catalog, series.study_instance_uid, run)
            _tell(catalog, series.study_instance_uid)
        finally:
            catalog.close()
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(timeout=60)


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dicom_node.cli", *words], check=True, stdout=subprocess.DEVNULL)


def _wait(catalog: Catalog, study: str, runs: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        jobs = catalog.queue.jobs(study_instance_uid=study)
        if len(jobs) >= runs and all(job.state is JobState.DONE for job in jobs):
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"run {runs} is not done after {PATIENCE_S:g} s: {[job.error for job in jobs]}")
        time.sleep(0.1)


def _tell(catalog: Catalog, study: str) -> None:
    begun = None
    for event in catalog.queue.timeline(study):
        if event.text.endswith(" begun"):
            begun = event.at
        elif " done: " in event.text and begun is not None:
            print(f"{(event.at - begun).total_seconds():6.2f} s  {event.text}")


if __name__ == "__main__":
    main()
