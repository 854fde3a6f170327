"""A node that runs, beside Orthanc: the same clients and objects on both, in turns within one run.

    python benchmarks/peers.py [--quick] [--rounds N] [--figures a,b] [--json FILE] [--plot FILE.svg]

Both are plain archives with their default settings, started anew on an empty folder for each group of figures in each
round; every send has UIDs nobody has seen. What was sent is counted by C-FIND, and the last batch is fetched back and
compared byte for byte. Orthanc and dcmtk's tools run with TCP_NODELAY=1, without which each of their messages waits
40 ms for an acknowledgement (dcmtk leaves Nagle's algorithm on): only the figures called "as shipped" show them
without. `raw` is `_raw_client.py`, objects in memory; storescu, getscu, movescu and storescp are dcmtk's and take
their share of the same processors.

MB are 10^6 bytes of data sets. The processor time of a CT study (300 slices) is that of the server and its children,
from the first byte to one second after the last object was found. Sizes are summed over the processes: what they share
is counted again in each.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from _bench_figures import QUICK, STARTS, STUDY_BYTES, Bench, Size
from _bench_objects import CXR
from _bench_report import Report
from _bench_systems import SYSTEMS, Node, free_port, without_nodelay

ROOM = 20 * 1024**3  # bytes that are free when a system starts
NAMES = [name for names, _, _ in STARTS for name in sorted(names)]


def measure(options: argparse.Namespace, size: Size, report: Report) -> None:
    """Every chosen figure of every round, the systems in turns; stops where the time is up, at the end of a start."""
    chosen, ends = set(options.figures), time.monotonic() + options.minutes * 60
    with folders(options.scratch, size) as (stores, work):
        for number in range(options.rounds):
            for names, figures, stock in STARTS:
                for name in options.systems if names & chosen else ():
                    if time.monotonic() > ends:
                        report.faults.append(f"the {options.minutes:g} minutes were up in round {number + 1}")
                        return
                    print(f"round {number + 1}: {name}, {', '.join(sorted(names & chosen))}", file=sys.stderr)
                    make_room(stores)
                    folder = stores / f"{time.monotonic_ns():020}-{name}"
                    with SYSTEMS[name](folder, free_port(), stock=stock, keep=True) as system:
                        environment = without_nodelay() | ({} if stock else {"TCP_NODELAY": "1"})
                        figures(Bench(system, size, report, work, chosen, environment))


def make_room(stores: Path) -> None:
    """Remove the oldest stores where the disk fills up, and no others before the end.

    Where many files were just removed ext4 looks at each of their inodes whenever it makes a file, for minutes: a third
    of the processor time of a small object, whichever system happens to come next.
    """
    while shutil.disk_usage(stores).free < ROOM and (oldest := min(stores.iterdir(), default=None)) is not None:
        shutil.rmtree(oldest)


@contextmanager
def folders(scratch: str | None, size: Size) -> Iterator[tuple[Path, Path]]:
    """Where the systems keep theirs, on a disk; and where the clients do, in memory if it has room."""
    need = 3 * max(size.slices * STUDY_BYTES // 300, size.films * CXR.rows * CXR.columns * 2)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > need
    with (
        tempfile.TemporaryDirectory(prefix="bench-peers-", dir=scratch) as stores,
        tempfile.TemporaryDirectory(prefix="bench-peers-", dir=memory if roomy else scratch) as work,
    ):
        yield Path(stores), Path(work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small sizes, less than two minutes")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--figures", type=_words(NAMES), default=NAMES, help=f"of {','.join(NAMES)} (default: all)")
    parser.add_argument("--systems", type=_words(list(SYSTEMS)), default=list(SYSTEMS), help="ours,orthanc")
    parser.add_argument("--receivers", type=int, default=1, help="of this node (default: 1, as it is shipped)")
    parser.add_argument("--studies", type=int, help="index size for C-FIND (default: 1000; 5000, 100000)")
    parser.add_argument("--slices", type=int, help="images of the CT series (default: 300; 8000 are 4 GB)")
    parser.add_argument("--seconds", type=float, help="how long questions, echoes and associations are counted")
    parser.add_argument("--minutes", type=float, default=90.0, help="no new start after so long (default: 90)")
    parser.add_argument("--scratch", help="folder for the systems' data, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the ratios as a picture")
    return parser.parse_args()


def _words(known: list[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return words

    return read


def _facts(options: argparse.Namespace, size: Size) -> dict[str, object]:
    version = ""
    if shutil.which("Orthanc"):
        said = subprocess.run(["Orthanc", "--version"], capture_output=True, text=True, check=False).stdout
        version = said.splitlines()[0] if said else ""
    return {
        "rounds": options.rounds,
        "processors": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "receivers": options.receivers,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "orthanc": version,
        "size": {name: getattr(size, name) for name in Size.__slots__},
    }


def main() -> None:
    """Command line entry."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or what was started would stay
    tools = ("Orthanc", "storescu", "getscu", "movescu", "storescp")
    needed = tools if "orthanc" in options.systems else tools[1:]
    if missing := [tool for tool in needed if shutil.which(tool) is None]:
        raise SystemExit(f"not installed: {', '.join(missing)} (Debian packages orthanc, dcmtk; `make tools`)")
    Node.receivers = options.receivers
    size = QUICK if options.quick else Size()
    given = {name: getattr(options, name) for name in ("studies", "slices", "seconds")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    options.rounds = options.rounds or (1 if options.quick else 5)
    report, began = Report(), time.monotonic()
    facts = _facts(options, size)
    try:
        measure(options, size, report)
    finally:
        caption = f"{options.rounds} round(s), {facts['processors']} processors, load at start {facts['load']}"
        caption += f", {facts['orthanc']}, {(time.monotonic() - began) / 60:.1f} minutes"
        if report.samples:
            print(f"medians [lowest-highest] of {caption}\n{report.table()}")
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                report.write_json(options.json, facts)
            if options.plot:
                options.plot.parent.mkdir(parents=True, exist_ok=True)
                report.write_plot(options.plot, caption)
    if options.quick:
        print("Small sizes, one round: only a look. All of it: python benchmarks/peers.py --rounds 5 --plot peers.svg")
    if report.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
