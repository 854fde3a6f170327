# ruff: noqa: T201 - what commands say goes to standard output
"""Commands of whoever runs the node day and night; `cli` says what can be said."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from dicom_node.clock import SystemClock
from dicom_node.commands import FAILED, OK, age, offline, open_here, table
from dicom_node.errors import NotFound
from dicom_node.retention import PERSON
from dicom_node.trails import command_trail, upkeep

__all__ = ["backup", "ledger", "restore"]

_COLUMNS = ("received", "routed", "filtered", "waiting", "failed", "imbalance")


def ledger(arguments: argparse.Namespace) -> int:
    """The ledger by source and hour. Exit status 2 when it does not balance; then it names the series."""
    since = None if arguments.since == "ever" else SystemClock().wall() - age(arguments.since)
    with open_here(offline(arguments)) as catalog:
        report = catalog.queue.ledger(since)
    broken = bool(report.totals["imbalance"] or report.studies["imbalance"])
    if arguments.json:
        lines = [{**asdict(line), "imbalance": line.imbalance} for line in report.lines]
        missing = [asdict(one) for one in report.unaccounted]
        deleted = {rule: {"studies": one[0], "series": one[1]} for rule, one in report.deleted.items()}
        totals = {"series": report.totals, "studies": report.studies}
        print(json.dumps({"lines": lines, **totals, "unaccounted": missing, "deleted": deleted}, indent=2))
        return FAILED if broken else OK
    rows = [
        (f"{line.hour}:00Z", line.calling_ae_title or "-", *(str(getattr(line, name)) for name in _COLUMNS))
        for line in report.lines
    ]
    rows += [
        (*name, *(str(counts[column]) for column in _COLUMNS))
        for name, counts in ((("all time", "all series"), report.totals), (("", "all studies"), report.studies))
    ]
    table(("HOUR", "FROM", *(name.upper() for name in _COLUMNS)), rows, "")
    for rule, (studies, series) in report.deleted.items():
        by = "by people" if rule == PERSON else f"by retention rule {rule}"
        print(f"deleted {by}, and counted no more: {studies} studies of {series} series")
    for one in report.unaccounted:
        print(f"{one.why}: study {one.study_instance_uid} series {one.series_instance_uid}")
    if broken:
        print("dicom-node: the ledger does not balance: run `dicom-node fsck`, keep the log, and tell", file=sys.stderr)
    return FAILED if broken else OK


def backup(arguments: argparse.Namespace) -> int:
    """Save the catalog. What is wrong with it is raised, and leaves nothing behind."""
    from dicom_node.store.backup import back_up

    config = offline(arguments)
    with open_here(config) as catalog, command_trail(config) as trail:
        saved = back_up(catalog, Path(arguments.path))
        trail.record(upkeep(f"the catalog was saved: {saved.studies} studies"))
    print(f"{arguments.path}: {saved.studies} studies, {saved.files} files, all in the archive; copy the archive now")
    return OK


def restore(arguments: argparse.Namespace) -> int:
    """Bring a saved catalog back, and what the intake journals still hold. Exit status 2 when files are missing."""
    from dicom_node.process import wait_for_children
    from dicom_node.store.backup import bring_back
    from dicom_node.store.lock import data_lock
    from dicom_node.wiring import replay_journals

    config = offline(arguments)
    if not config.data_dir.is_dir():
        raise NotFound(f"{config.data_dir}: there is no such folder; put the archive there, then restore")
    with data_lock(config.data_dir):
        wait_for_children(config.data_dir)
        saved = bring_back(config.data_dir, Path(arguments.path))
        with open_here(config) as catalog, command_trail(config) as trail:
            replay_journals(catalog, config)
            trail.record(upkeep(f"the catalog was brought back from a backup: {saved.studies} studies"))
    print(f"{saved.studies} studies, {saved.files} files are back; `dicom-node fsck --repair` indexes what came later")
    if saved.missing_count:
        print(f"dicom-node: {saved.missing_count} of its files are not in the archive: run fsck", file=sys.stderr)
        return FAILED
    return OK
