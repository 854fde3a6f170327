"""What one more instance costs a node that has many: from a thousand to a million.

    python benchmarks/growth.py [--steps 1000,10000,100000,1000000] [--count 1000] [--rounds 3] [--plot FILE.svg]

A real node takes small images (11 KB) over one association; between the steps its catalog is filled with synthetic
rows, without files. The node runs on; each measurement stores studies nobody has seen, and is what it took until the
last was acknowledged: seconds on the wall and of CPU in all processes of the node, for one instance. The least of the
rounds is shown beside the median: on a busy machine it is the better one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path

from _bench_node import BenchNode
from _bench_objects import EXPLICIT_LE, SMALL, Batch
from _bench_systems import Usage
from _raw_client import RawAssociation
from _synthetic_rows import grow, instance_rows, wait_routed

WARM_UP = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What was found at so many rows, in milliseconds for each instance."""

    rows: int
    wall_ms: Sequence[float]
    cpu_ms: Sequence[float]


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="1000,10000,100000,1000000")
    parser.add_argument("--count", type=int, default=1000, help="instances in one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="where an SVG is written")
    options = parser.parse_args()
    steps = [int(step) for step in options.steps.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        found = _measure(Path(temporary) / "node", steps, options.count, options.rounds)
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(_picture(found), encoding="utf-8")
        print(f"plot: {options.plot}")


def _measure(folder: Path, steps: Sequence[int], count: int, rounds: int) -> list[Step]:
    found = []
    print(f"{'rows':>10} {'wall ms each':>22} {'CPU ms each':>22}")
    with BenchNode(folder, completion={"quiet_s": 0.1}) as node:
        template = node.store_study()
        wait_routed(node.data_dir, template)
        _store(node, WARM_UP)
        for rows in steps:
            grow(node.data_dir, template, rows)
            wall, cpu = [], []
            for _ in range(rounds):
                with Usage(node.pid) as usage:
                    began = time.monotonic()
                    _store(node, count)
                    wall.append((time.monotonic() - began) / count * 1000)
                    time.sleep(1.5)  # closing the studies belongs to it
                cpu.append(usage.cpu_s / count * 1000)
            step = Step(rows=instance_rows(node.data_dir), wall_ms=wall, cpu_ms=cpu)
            print(f"{step.rows:>10} {_spread(step.wall_ms):>22} {_spread(step.cpu_ms):>22}", flush=True)
            found.append(step)
    last, first = found[-1], found[0]
    print(
        f"from {first.rows} to {last.rows} rows: wall {min(last.wall_ms) / min(first.wall_ms):.2f}x, "
        f"CPU {min(last.cpu_ms) / min(first.cpu_ms):.2f}x (of the least)"
    )
    return found


def _store(node: BenchNode, count: int) -> None:
    batch = Batch(SMALL, count)
    association = RawAssociation(node.port, node.ae_title, {SMALL.sop_class_uid: EXPLICIT_LE})
    for image in map(batch.image, range(count)):
        association.store(image.sop_class_uid, image.sop_instance_uid, [image.head, image.pixels])
    association.release()


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


# --- the picture -----------------------------------------------------------------------------------------------------

_LEFT, _TOP, _WIDTH, _HEIGHT = 60, 50, 560, 260
_CURVES = (("wall", "#1f4e9c"), ("CPU of the node", "#3a8f5c"))


def _picture(found: Sequence[Step]) -> str:
    highest = max(max(step.wall_ms) for step in found) * 1.15
    low, high = log10(found[0].rows), max(log10(found[-1].rows), log10(found[0].rows) + 0.1)

    def place(rows: int, milliseconds: float) -> tuple[float, float]:
        x = _LEFT + _WIDTH * (log10(rows) - low) / (high - low)
        return x, _TOP + _HEIGHT * (1 - milliseconds / highest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 60}" height="{_TOP + _HEIGHT + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        '<text x="12" y="22" font-size="15">One more instance (11 KB, durable), by how many there are</text>',
    ]
    for part in range(5):
        value = highest * part / 4
        _, y = place(found[0].rows, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.1f} ms</text>')
    for step in found:
        x, _ = place(step.rows, 0)
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 20}" text-anchor="middle">{step.rows:,}</text>')
    for (name, colour), each in zip(_CURVES, ([s.wall_ms for s in found], [s.cpu_ms for s in found]), strict=True):
        points = [place(step.rows, statistics.median(values)) for step, values in zip(found, each, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for step, values in zip(found, each, strict=True):
            (x, top), (_, bottom) = place(step.rows, max(values)), place(step.rows, min(values))
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        x, y = points[-1]
        parts.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="end" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
