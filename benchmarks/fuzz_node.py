"""Malformed input against a running node for half an hour: does it die, grow, or leave something behind?

    python benchmarks/fuzz_node.py --script dicom_faults.py [--minutes 30]

The probe's `fuzz` cases again and again, each time with another seed, on the node as `faults.py` starts it. Meanwhile
memory, threads and open files of every process are watched. Then the node is stopped, and `fsck` must find archive and
index agreed, and no temporary file. Exit status 1 when a case failed, a process died or grew without end, or something
was left. Slopes are told for the last half hour, of shorter runs for the time after the first third, since caches fill
before it, by the hour and by inputs: a node that grows by 1 MiB an hour under a million inputs a day grows by 24 MiB
per million.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _bench_systems import without_nodelay
from _soak_watch import ROLES, Leaks, pid_of
from faults import ListedNode

INPUTS = 1500  # of each case before the next seed
ROUND_S = 600


def pids(data: Path) -> dict[str, int]:
    """Of every process of the node."""
    return {role: pid_of(data, role) for role in ROLES}


def probe(node: ListedNode, script: Path, seed: int) -> tuple[int, Counter[str], list[str]]:
    """How many inputs, the verdicts, and what was not PASS."""
    words = [sys.executable, str(script), "--port", str(node.port), "--aet", node.ae_title, *node.options()]
    words += ["--only", "fuzz", "--fuzz", str(INPUTS), "--seed", str(seed), "--budget", str(ROUND_S)]
    ended = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, timeout=2 * ROUND_S, env=without_nodelay(), check=False
    )
    cases = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    judged = [case for case in cases if "verdict" in case and not case["case"].startswith("_")]
    inputs = sum(int(found[1]) for case in judged if (found := re.match(r"(\d+) inputs", case.get("outcome", ""))))
    bad = [f"{case['case']} (seed {seed}): {case.get('outcome')}" for case in judged if case["verdict"] != "PASS"]
    return inputs, Counter(case["verdict"] for case in judged), bad


def left_over(node: ListedNode) -> list[str]:
    """What a stopped node should not have."""
    config = node.folder / "node.yaml"
    checked = subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", "fsck", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = [] if checked.returncode == 0 else [f"fsck: {checked.stdout.strip()} {checked.stderr.strip()}"]
    temporary = list((node.folder / "data" / "archive" / "tmp").iterdir())
    return found + [f"{len(temporary)} temporary files"] * bool(temporary)


def main() -> int:
    """Fuzz, watch, stop, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--scratch", help="folder for the node's data (default: TMPDIR)")
    options = parser.parse_args()
    wrong: list[str] = []
    verdicts: Counter[str] = Counter()
    inputs = seed = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-node-", dir=options.scratch) as scratch:
        node = ListedNode(Path(scratch, "node"), 1)
        with node:
            data = node.folder / "data"
            before, ends = pids(data), time.monotonic() + options.minutes * 60
            with Leaks(data) as leaks:
                while time.monotonic() < ends and not wrong:
                    seed += 1
                    count, found, bad = probe(node, options.script.absolute(), seed)
                    inputs, verdicts, wrong = inputs + count, verdicts + found, wrong + bad
                    if not count:
                        wrong.append("the probe sent nothing")
                    print(f"seed {seed}: {inputs} inputs so far, {dict(verdicts)}", file=sys.stderr)
            if pids(data) != before:
                wrong.append(f"a process is another one: {before} {pids(data)}")
            node.stop()
            wrong += left_over(node)
    print(f"{inputs} malformed inputs in {options.minutes:g} minutes, {seed} seeds; {dict(verdicts)}")
    per_minute = max(inputs, 1) / options.minutes / 1e6  # millions
    for role in leaks.figures():
        print(
            f"{role.role:<11}peak {role.peak_mib:6.1f} MiB  {role.mib_per_min * 60:+7.2f} MiB/h  "
            f"{role.mib_per_min / per_minute:+7.2f} MiB per million inputs  "
            f"threads {role.threads} ({role.threads_per_min * 60:+.1f}/h)  "
            f"files {role.files} ({role.files_per_min * 60:+.1f}/h)"
        )
        if role.grows:
            wrong.append(f"{role.role} grew")
    for line in wrong:
        print(f"FAIL {line}")
    print("FAIL" if wrong else "PASS")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
