"""How long a node with many instances takes from its start to its first answers, and what it does while nothing comes.

    python benchmarks/restart.py [--rows 1000000] [--rounds 3] [--keep FOLDER]

Fills a catalog with synthetic rows (no files behind them), then starts the node on it again and again: killed (`kill
-9`) or stopped before, its catalog out of the page cache or in it. Prints the seconds from the start of the process to
the first C-ECHO and the first C-STORE that is answered, then, of the node at rest, the CPU it takes and how long
`/ready` and `/metrics` take. A folder that is kept is used again.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from _bench_node import BenchNode
from _bench_objects import EXPLICIT_LE, SMALL, Batch
from _bench_systems import Usage
from _raw_client import VERIFICATION, RawAssociation, ServerFault
from _synthetic_rows import grow, instance_rows, wait_routed

BOUND_S = 3.0
REST_S = 10.0
CONTEXTS = {VERIFICATION: "1.2.840.10008.1.2", SMALL.sop_class_uid: EXPLICIT_LE}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where the catalog is made, or is from an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary) / "node"
        _fill(folder, options.rows)
        _restarts(folder, options.rounds)


def _fill(folder: Path, rows: int) -> None:
    if not (folder / "data").exists():
        with BenchNode(folder, completion={"quiet_s": 0.1}) as node:
            study = node.store_study()
            wait_routed(node.data_dir, study)
        (folder / "study").write_text(study)
    began = time.monotonic()
    grow(folder / "data", (folder / "study").read_text(), rows)
    size = (folder / "data" / "catalog.db").stat().st_size / 1e6
    print(f"{instance_rows(folder / 'data')} instance rows, {size:.0f} MB, filled in {time.monotonic() - began:.0f} s")


def _restarts(folder: Path, rounds: int) -> None:
    for cached in (False, True):
        for end in (signal.SIGTERM, signal.SIGKILL):
            found = [_first_answers(folder, end, cached) for _ in range(rounds)]
            title = f"{'in' if cached else 'out of'} the page cache, after {end.name}"
            for what, column in zip(("C-ECHO", "C-STORE"), zip(*found, strict=True), strict=True):
                median = statistics.median(column)
                verdict = "" if median <= BOUND_S else f"   MORE THAN {BOUND_S:g} s"
                print(f"{title:40} {what:8} {median:5.2f} s [{min(column):.2f}-{max(column):.2f}]{verdict}")
    with BenchNode(folder) as node:
        with Usage(node.pid) as usage:
            time.sleep(REST_S)
        print(f"at rest: {usage.cpu_s / REST_S:.3f} of a core, {usage.peak_mb:.0f} MB in all processes together")
        for path in ("/ready", "/metrics"):
            times = []
            for _ in range(3):
                began = time.monotonic()
                with urllib.request.urlopen(f"http://127.0.0.1:{node.http_port}{path}", timeout=120) as answer:
                    answer.read()
                times.append(time.monotonic() - began)
            print(f"{path:9} first {times[0]:.3f} s, then {min(times[1:]):.3f} s")


def _first_answers(folder: Path, end: signal.Signals, cached: bool) -> tuple[float, float]:
    """A node runs and ends, then another starts: seconds to its first C-ECHO and its first C-STORE."""
    with BenchNode(folder) as node:
        node.store_study(1)
        node.end(end)
    if not cached:
        _forget(folder / "data")
    image = Batch(SMALL, 1).image(0)
    began = time.monotonic()
    with BenchNode(folder, wait=False) as node:
        association = _patiently(node)
        association.echo()
        echoed = time.monotonic() - began
        association.store(image.sop_class_uid, image.sop_instance_uid, [image.head, image.pixels])
        stored = time.monotonic() - began
        association.release()
        node.wait_ready()
    return echoed, stored


def _patiently(node: BenchNode) -> RawAssociation:
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        with suppress(OSError, ServerFault):
            return RawAssociation(node.port, node.ae_title, CONTEXTS)
        time.sleep(0.005)
    raise SystemExit("the node took no association within 120 s")


def _forget(data_dir: Path) -> None:
    """Have the catalog's pages dropped from the page cache."""
    for path in data_dir.glob("catalog.db*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


if __name__ == "__main__":
    main()
