"""What studies that wait to be complete cost the node.

    python benchmarks/waiting.py [--studies 250,500,1000,2000] [--seconds 20]

Sends one-image studies over an association that stays open, so that none of them is complete, and takes the processor
time of all processes while nothing else is done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from _bench_node import BenchNode, store_all
from _bench_objects import EXPLICIT_LE, INDEX, Batch
from _bench_systems import Usage
from _raw_client import RawAssociation

FOREVER = {"quiet_s": 3600.0, "quiet_after_fault_s": 3600.0, "forced_after_s": 7200.0}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", default="250,500,1000,2000")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, BenchNode(Path(folder), completion=FOREVER) as node:
        association = RawAssociation(node.port, node.ae_title, {INDEX.sop_class_uid: EXPLICIT_LE})
        waiting = 0
        for wanted in [0, *map(int, options.studies.split(","))]:
            store_all(association, Batch(INDEX, wanted - waiting))
            waiting = wanted
            time.sleep(2.0)  # what was begun for the last ones
            with Usage(node.pid) as usage:
                time.sleep(options.seconds)
            print(f"{waiting:6} studies wait: {usage.cpu_s / options.seconds:.3f} of a core", flush=True)
        association.release()


if __name__ == "__main__":
    main()
