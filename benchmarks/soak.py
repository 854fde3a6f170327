"""Everything at once for some time: is anything lost, made twice, forgotten, leaked or slow?

    python benchmarks/soak.py [--minutes 30] [--load 0.8] [--fault-every 60] [--json FILE]

A node with peers, rules, the demonstration models, an audit trail and retention, and a second node as its destination,
which is asked for storage commitment, both on this machine. A
calibration finds how many rounds (two CT studies, a radiograph that is analysed, C-ECHO, C-FIND, C-GET, now and then a
C-MOVE) they get done in a second, to the last delivery. Then rounds begin at `--load` of that. The first quarter is
left in peace; after it one fault is injected every so many seconds: each process of the node is killed in turn, the
destination is down or hangs, the whole node is killed.

At the end nothing may be under way any more, the ledger balances, every acknowledged object comes back by C-GET byte
for byte and is at the destination, and every radiograph has one report. Exit status 1 when one of these promises broke
or a process grows without end. Latencies are told for the quiet part, the time between faults and the faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _bench_node import BenchNode
from _bench_systems import free_port
from _soak_load import Load, Sample, StoredStudy, films
from _soak_watch import Faults, Figures, Leaks

from dicom_node.audit.verify import read_anchor, verify
from dicom_node.audit.watch import LOOK_S
from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings
from dicom_node.model import DeliveryState, JobState, Level
from dicom_node.store.catalog import Catalog, open_catalog

CALIBRATE_S = 15.0
DRAIN_S = 600.0
THREADS = 8
RULES = """
rule: findings
when: ['Modality == "DX"']
run: {engine: cxr-findings, priority: urgent, results: [sr]}
send: {to: [PACS], what: both}
---
rule: onward
when: ['Modality == "CT"']
send: {to: [PACS], what: source}
"""
PLENTY = {"objects_per_s": 100_000, "bytes_per_s": 10_000_000_000, "queries_per_minute": 1_000_000}
COMMIT = {"timeout_s": 20.0, "wait_s": 0.5}
QUICK = {"lease_s": 10.0, "backoff_s": 1.0, "backoff_max_s": 10.0, "breaker_probe_s": 3.0, "response_timeout_s": 15.0}


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.8, help="share of the capacity that was found")
    parser.add_argument("--fault-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        broken = _run(Path(temporary), options)
    for promise in broken:
        print(f"BROKEN: {promise}")
    print("soak: FAIL" if broken else "soak: every promise was kept")
    return 1 if broken else 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _nodes(work: Path) -> tuple[BenchNode, BenchNode]:
    port = free_port()
    asks = {"ae_title": "DICOM_NODE", "storage_commitment": True, "report_host": "127.0.0.1", "report_port": port}
    pacs = BenchNode(work / "pacs", ae_titles=["PACS"], peers={"node": asks, "bench": {"ae_title": "BENCH"}})
    rules = work / "rules"
    rules.mkdir()
    for text in RULES.split("---\n"):
        (rules / f"{text.split()[1]}.yaml").write_text(text)
    node = BenchNode(
        work / "node",
        rules_dir=str(rules),
        dicom_port=port,
        peers={"bench": {"ae_title": "BENCH", "max_associations": 100, "rate": PLENTY}, "pacs": {"ae_title": "PACS"}},
        audit={"site_id": "SOAK"},
        retention={"every_s": 10.0, "rules": [{"name": "old", "older_than": "1d", "free_bytes": 1}]},
        engines={"cxr-findings": {"model": "demo-cxr-findings"}},
        jobs={"lease_s": 10.0, "backoff_s": 1.0, "backoff_max_s": 10.0, "max_attempts": 50},
        delivery=QUICK,
        destinations={
            "PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port, "storage_commitment": COMMIT}
        },
        completion={"quiet_s": 1.0, "quiet_after_fault_s": 3.0},
    )
    node.port = port
    return node, pacs


def _run(work: Path, options: argparse.Namespace) -> list[str]:
    node, pacs = _nodes(work)
    with pacs, node:
        load = Load(node.port, node.ae_title, "PACS", films(work))
        catalog = _open(node)
        try:
            rate = options.load * _capacity(load, catalog)
            quiet_from_s = time.monotonic()
            faults = Faults(node, pacs, _say)
            with Leaks(node.data_dir) as leaks, load.at(rate, THREADS):
                _disturb(faults, quiet_from_s, options.minutes * 60, options.fault_every)
            _say(f"the load is over; {load.skipped} rounds found {THREADS} clients busy; waiting for rest")
            broken = [*faults.broken, *_rest(catalog)]
            figures = _latencies(load.samples, faults, quiet_from_s)
            _print(figures, leaks.figures(), load, rate)
            broken += _leaking(leaks.figures())
            broken += [f"study {uid} could not be stored" for uid in load.given_up]
            broken += _ledger(catalog)
            broken += _audited(node)
            broken += _fetched(load)
            broken += _accounted(load.studies, catalog, pacs)
        finally:
            catalog.close()
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            grown = [asdict(one) for one in leaks.figures()]
            told = {"rounds_per_s": rate, "latencies": figures, "processes": grown, "broken": broken}
            options.json.write_text(json.dumps(told, indent=1))
    return broken


def _open(node: BenchNode) -> Catalog:
    return open_catalog(node.data_dir, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))


def _capacity(load: Load, catalog: Catalog) -> float:
    """Rounds per second, from the first store to the last delivery."""
    load.as_fast_as_possible(5.0, 1)  # the model is loaded
    _rest(catalog)
    began_s = time.monotonic()
    rounds = load.as_fast_as_possible(CALIBRATE_S, THREADS // 2)
    _rest(catalog)
    capacity = rounds / (time.monotonic() - began_s)
    _say(f"capacity: {capacity:.2f} rounds/s with everything delivered")
    load.samples.clear()
    load.troubles.clear()
    return capacity


def _disturb(faults: Faults, quiet_from_s: float, seconds: float, every_s: float) -> None:
    ends_s = quiet_from_s + seconds
    next_s = quiet_from_s + seconds / 4
    while (now := time.monotonic()) < ends_s:
        if now >= next_s and ends_s - now > every_s / 2:
            faults.inject()
            next_s = max(next_s + every_s, time.monotonic() + every_s / 4)
        time.sleep(min(1.0, max(ends_s - now, 0.0)))


# --- the promises


def _rest(catalog: Catalog) -> list[str]:
    """Until nothing is under way; what still is after DRAIN_S."""
    deadline = time.monotonic() + DRAIN_S
    moving_jobs = (JobState.PENDING, JobState.LEASED, JobState.WAITING)
    moving = (DeliveryState.PENDING, DeliveryState.LEASED, DeliveryState.COMMITTING)
    while True:
        found = catalog.queue.snapshot()
        left = {
            "studies": found["studies"]["open"],
            "jobs": sum(found["jobs"][state.value]["count"] for state in moving_jobs),
            "deliveries": sum(of[state.value]["count"] for of in found["deliveries"].values() for state in moving),
        }
        if not any(left.values()):
            return []
        if time.monotonic() > deadline:
            return [f"not at rest {DRAIN_S:g} s after the load: {left}"]
        time.sleep(0.25)


def _ledger(catalog: Catalog) -> list[str]:
    found = catalog.queue.snapshot()
    ledger, letters = found["ledger"], found["dead_letters"]
    print("ledger (series): " + ", ".join(f"{key} {ledger[key]}" for key in ("received", "routed", "filtered")), end="")
    print(f", waiting {ledger['waiting']}, failed {ledger['failed']}, imbalance {ledger['imbalance']}")
    broken = [f"the ledger does not balance: {ledger}"] if ledger["imbalance"] else []
    return broken + ([f"dead letters: {letters}"] if any(letters.values()) else [])


def _audited(node: BenchNode) -> list[str]:
    """Whoever was killed whenever: the chain holds."""
    time.sleep(LOOK_S + 1.0)  # the head of the last messages is kept
    anchor = read_anchor(node.data_dir / "audit_head.json")
    report = verify(node.data_dir / "audit", [anchor] if anchor is not None else [])
    print(f"audit trail: {report.lines} messages, faults: {len(report.faults)}")
    return [f"the audit trail is not what was written: {report.faults[0]}"] if report.faults else []


def _fetched(load: Load) -> list[str]:
    """Every acknowledged object by C-GET."""
    lost: list[str] = []
    objects = 0
    for study in load.studies:
        found: dict[str, str] = {}

        def keep(uid: str, pieces: Iterable[bytes], found: dict[str, str] = found) -> None:
            found[uid] = hashlib.sha256(b"".join(pieces)).hexdigest()

        load.fetch(study, keep)
        objects += len(study.digests)
        lost += [uid for uid, digest in study.digests.items() if found.get(uid) != digest]
    print(
        f"acknowledged: {objects} objects of {len(load.studies)} studies; not there, or with other bytes: {len(lost)}"
    )
    return [f"{len(lost)} acknowledged objects are lost or differ, e.g. {lost[:3]}"] if lost else []


def _accounted(studies: Sequence[StoredStudy], catalog: Catalog, pacs: BenchNode) -> list[str]:
    """Everything is at the destination, once; every radiograph has one report."""
    there = _open(pacs)
    undelivered, reports = 0, 0
    wrong: list[str] = []
    try:
        for study in studies:
            keys = {"StudyInstanceUID": [study.uid]}
            here = {one.sop_instance_uid: one.sha256 for one in catalog.index.instances(Level.STUDY, keys)}
            far = {one.sop_instance_uid: one.sha256 for one in there.index.instances(Level.STUDY, keys)}
            undelivered += sum(far.get(uid) != digest for uid, digest in here.items())
            results = len(here) - len(study.digests)
            reports += results
            if results != (study.modality == "DX"):
                wrong.append(f"{study.uid}: {results} results")
    finally:
        there.close()
    print(f"reports: {reports}; studies with none or more than one: {len(wrong)}; undelivered objects: {undelivered}")
    broken = [f"{undelivered} objects are not at the destination"] if undelivered else []
    return broken + ([f"{len(wrong)} studies without exactly one result, e.g. {wrong[:3]}"] if wrong else [])


# --- figures


def _latencies(samples: Sequence[Sample], faults: Faults, quiet_from_s: float) -> dict[str, dict[str, Any]]:
    first_s = faults.windows[0][1] if faults.windows else float("inf")
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({sample.kind for sample in samples}):
        parts: dict[str, list[Sample]] = {"quiet": [], "between": [], "faults": []}
        for sample in samples:
            if sample.kind == kind:
                part = "quiet" if sample.at_s < first_s else "faults" if faults.disturbed(sample.at_s) else "between"
                parts[part].append(sample)
        found[kind] = {part: _percentiles(those) for part, those in parts.items() if those}
    return found


def _percentiles(samples: Sequence[Sample]) -> dict[str, float]:
    good = sorted(1000 * sample.seconds for sample in samples if sample.ok)
    told: dict[str, float] = {"count": len(samples), "failed": len(samples) - len(good)}
    if len(good) > 1:
        cuts = statistics.quantiles(good, n=100, method="inclusive")
        told |= {"p50_ms": round(cuts[49], 1), "p95_ms": round(cuts[94], 1), "p99_ms": round(cuts[98], 1)}
        told["max_ms"] = round(good[-1], 1)
    return told


def _print(figures: dict[str, dict[str, Any]], grown: Sequence[Figures], load: Load, rate: float) -> None:
    print(f"rounds: {rate:.2f}/s")
    print(f"{'request':<16}{'part':<9}{'count':>7}{'failed':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max ms':>10}")
    for kind, parts in figures.items():
        for part, of in parts.items():
            told = "".join(f"{of.get(key, 0):>9.1f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
            print(f"{kind:<16}{part:<9}{of['count']:>7}{of['failed']:>7}{told}{of.get('max_ms', 0):>10.1f}")
    for kind, parts in figures.items():
        if kind.startswith("C-STORE") and {"quiet", "between"} <= parts.keys() and "p99_ms" in parts["between"]:
            ratio = parts["between"]["p99_ms"] / parts["quiet"]["p99_ms"]
            print(f"{kind}: p99 between the faults is {ratio:.2f} times that of the quiet part")
    print("per minute, in the longest life of each process, after its first third, at most its last half hour:")
    for one in grown:
        print(
            f"  {one.role:<11} {one.life_s:5.0f} s  memory {one.mib_per_min:+.2f} MiB (peak {one.peak_mib:.0f})  "
            f"threads {one.threads_per_min:+.2f} ({one.threads})  files {one.files_per_min:+.2f} ({one.files})"
        )
    for trouble, count in load.troubles.most_common(8):
        print(f"  {count:5} x {trouble}")


def _leaking(grown: Sequence[Figures]) -> list[str]:
    return [
        f"the {one.role} process grows: {one.more_mib:+.0f} MiB, {one.more_threads:+.0f} threads, "
        f"{one.more_files:+.0f} files from the second to the last third of its life"
        for one in grown
        if one.grows
    ]


if __name__ == "__main__":
    sys.exit(main())
