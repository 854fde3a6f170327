"""Malformed input against a running node: does it die, grow, or leave something behind?

    python benchmarks/fuzz_node.py --script dicom_faults.py [--minutes 30] [--paced 30]

As fast as it goes for `--minutes`, then for `--paced` minutes at the rate of a million inputs a day: the probe's `fuzz`
cases again and again, each time with another seed, on the node as `faults.py` starts it. Meanwhile memory, threads and
open files of every process are watched. Then the node is stopped, and `fsck` must find archive and index agreed, and no
temporary file. Exit status 1 when a case failed, a process died or grew without end, or something was left. Slopes are
told for the last half hour, of shorter runs for the time after the first third, since caches fill before it.
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
from dataclasses import dataclass, field
from pathlib import Path

from _bench_systems import without_nodelay
from _soak_watch import ROLES, Figures, Leaks, pid_of
from faults import ListedNode

INPUTS = 1500  # of each case before the next seed
FEW = 100  # of each case, at a pace
PACE = 1_000_000 / 86_400  # inputs a second
ROUND_S = 600


def pids(data: Path) -> dict[str, int]:
    """Of every process of the node."""
    return {role: pid_of(data, role) for role in ROLES}


def probe(node: ListedNode, script: Path, seed: int, each: int) -> tuple[int, Counter[str], list[str]]:
    """How many inputs (`each` of every case), the verdicts, and what was not PASS."""
    words = [sys.executable, str(script), "--port", str(node.port), "--aet", node.ae_title, *node.options()]
    words += ["--only", "fuzz", "--fuzz", str(each), "--seed", str(seed), "--budget", str(ROUND_S)]
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


@dataclass(slots=True)
class Probed:
    """What was sent so far, and what was wrong."""

    node: ListedNode
    script: Path
    inputs: int = 0
    seeds: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def send(self, minutes: float, each: int, pace: float | None = None) -> None:
        """Seed after seed for so long; with a `pace`, not more inputs a second than that."""
        began, before = time.monotonic(), self.inputs
        while time.monotonic() < began + minutes * 60 and not self.wrong:
            self.seeds += 1
            count, found, bad = probe(self.node, self.script, self.seeds, each)
            self.inputs += count
            self.verdicts += found
            self.wrong += bad or ([] if count else ["the probe sent nothing"])
            print(f"seed {self.seeds}: {self.inputs} inputs so far, {dict(self.verdicts)}", file=sys.stderr)
            if pace:
                time.sleep(max(0.0, began + (self.inputs - before) / pace - time.monotonic()))


def main() -> int:
    """Fuzz, watch, stop, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--paced", type=float, default=30.0)
    parser.add_argument("--scratch", help="folder for the node's data (default: TMPDIR)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-node-", dir=options.scratch) as scratch:
        node = ListedNode(Path(scratch, "node"), 1)
        probed = Probed(node, options.script.absolute())
        with node:
            data = node.folder / "data"
            before = pids(data)
            with Leaks(data) as leaks:
                probed.send(options.minutes, INPUTS)
                fast = probed.inputs
                probed.send(options.paced, FEW, PACE)
            if pids(data) != before:
                probed.wrong.append(f"a process is another one: {before} {pids(data)}")
            node.stop()
            probed.wrong += left_over(node)
    print(f"{fast} malformed inputs in {options.minutes:g} minutes, {probed.inputs - fast} in {options.paced:g}")
    print(f"{probed.seeds} seeds; {dict(probed.verdicts)}")
    return told(leaks.figures(), probed.wrong)


def told(figures: list[Figures], wrong: list[str]) -> int:
    """Print them; the exit status."""
    for role in figures:
        print(
            f"{role.role:<11}peak {role.peak_mib:6.1f} MiB  {role.mib_per_min * 60:+7.2f} MiB/h  "
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
