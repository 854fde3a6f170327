# ruff: noqa: T201 - what commands say goes to standard output
"""Retention in the node and on the command line: `dicom-node retention`, `dicom-node delete`. Composition root."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from typing import Any

from dicom_node.auditing import AuditTrail
from dicom_node.clock import SystemClock
from dicom_node.commands import FAILED, OK, offline, open_here, table
from dicom_node.config import NodeConfig
from dicom_node.errors import NodeError, NotFound
from dicom_node.interfaces import Clock
from dicom_node.metrics import Reading
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.retain import Fate, Retainer, Run
from dicom_node.retention import PERSON, PERSON_IS_HELD_BY, Deletion, DeletionOrder, Hold, RetentionSettings, StudyHeld
from dicom_node.store.catalog import Catalog
from dicom_node.trails import command_trail, person

__all__ = ["Retention", "delete", "node_deleter", "node_retainer", "retention"]

log = logging.getLogger(__name__)

TICK_S = 30.0  # how often a deletion that was cut off is looked for


def node_deleter(
    catalog: Catalog,
    config: NodeConfig,
    audit: AuditTrail | None = None,
    on_deleted: Callable[[Deletion], None] = lambda deletion: None,
) -> Deleter:
    """What deletes studies of this node."""

    def quarantined() -> frozenset[str]:
        return frozenset(one.study_instance_uid for one in catalog.quarantine.listed())

    return Deleter(
        catalog.queue,
        catalog.archive,
        ae_title=config.ae_titles[0],
        audit=audit,
        quarantined=quarantined,
        on_deleted=on_deleted,
    )


def node_retainer(
    catalog: Catalog, config: NodeConfig, clock: Clock, deleter: Deleter, stopping: Callable[[], bool] = lambda: False
) -> Retainer:
    """The rules of this node's retention."""
    from dicom_node.dimse.finding import DimseFinder
    from dicom_node.dimse.wires import open_link
    from dicom_node.wiring import destinations

    return Retainer(
        catalog.queue,
        deleter,
        DimseFinder(config.delivery, config.ae_titles[0], open_link(config.wire)),
        destinations(config),
        settings=config.retention or RetentionSettings(),
        asked={name: one.before_deletion for name, one in config.destinations.items()},
        free_bytes=catalog.archive.free_bytes,
        clock=clock,
        stopping=stopping,
    )


class Retention:
    """Retention in the service process: a tick ends deletions that were cut off and runs the rules when it is time."""

    def __init__(
        self,
        catalog: Catalog,
        config: NodeConfig,
        clock: Clock,
        on_deleted: Callable[[str, int], None],
        audit: AuditTrail | None = None,
    ) -> None:
        """`on_deleted` is told the rule and the bytes."""
        self._queue, self._clock, self._settings = catalog.queue, clock, config.retention
        self._stopping = threading.Event()
        self._deleter = node_deleter(catalog, config, audit, lambda one: on_deleted(one.rule, one.bytes))
        self._retainer = node_retainer(catalog, config, clock, self._deleter, self._stopping.is_set)
        self._due_s = float("-inf")
        self._kept: Mapping[str, int] = {}
        self._over: Mapping[str, int] = {}
        self._error = ""
        self._day: date | None = None  # that is noted

    @property
    def tick_s(self) -> float:
        """How often `tick` is to be called."""
        return min(TICK_S, self._settings.every_s) if self._settings else TICK_S

    def tick(self) -> None:
        """Do what is due. Raises nothing."""
        try:
            self._deleter.finish_all()
            self._note_day()
            now = self._clock.boot().seconds
            if self._settings is not None and self._settings.rules and now >= self._due_s:
                self._due_s = now + self._settings.every_s
                self._run()
            self._error = ""
        except Exception as exc:  # edge: the timer's tick; the next one tries again
            self._error = str(exc) if isinstance(exc, NodeError) else type(exc).__name__
            log.error("retention failed", exc_info=exc)

    def _note_day(self) -> None:
        """Also while retention is off: it may be turned on, and then must know how old studies are for certain."""
        today = self._clock.wall().date()
        if today == self._day:
            return
        if missed := self._queue.note_day():
            log.warning(
                "the clock says that the node did not run for days; they make no study older",
                extra={"action": "days_missed", "days": missed},
            )
        self._day = today

    def _run(self) -> None:
        run = self._retainer.run()
        if run.whole:
            self._kept, self._over = dict(run.kept), run.over_bytes
        else:
            self._due_s = float("-inf")  # the rest at the next tick
        if run.deleted or any(run.over_bytes.values()):
            log.info(
                "retention ran",
                extra={"action": "retention", "studies": run.deleted, "bytes": run.bytes, "kept": dict(run.kept)},
            )

    def facts(self) -> Mapping[str, Any]:
        """For `doctor`."""
        return {"kept": dict(self._kept), "over": dict(self._over), "error": self._error}

    def readings(self) -> Iterable[Reading]:
        """Of the gauges."""
        for reason in Hold:
            yield "retention_kept_studies", (reason.value,), self._kept.get(reason.value, 0)
        for rule in self._settings.rules if self._settings else ():
            if rule.has_quota:
                yield "retention_over_quota_bytes", (rule.name,), self._over.get(rule.name, 0)
        yield "deletions_unfinished", (), len(self._queue.unfinished_deletions())

    def stop(self) -> None:
        """End a run that is under way soon."""
        self._stopping.set()


# --- commands --------------------------------------------------------------------------------------------------------


def retention(arguments: argparse.Namespace) -> int:
    """Run the rules now, or say what they would do. Exit status 2 when a quota is not met."""
    config, clock = offline(arguments), SystemClock()
    if config.retention is None or not config.retention.rules:
        print("retention is off: everything is kept until a person deletes it")
        return OK
    fates: list[Fate] = []
    with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
        deleter = node_deleter(catalog, config, trail)
        if not arguments.dry_run:
            deleter.finish_all()
        run = node_retainer(catalog, config, clock, deleter).run(dry=arguments.dry_run, tell=fates.append)
    if arguments.json:
        print(json.dumps({"studies": [_fate(one) for one in fates], **_told(run)}, indent=2))
    else:
        goes = "would go" if arguments.dry_run else "deleted"
        rows = [
            (
                *(one.study_instance_uid, one.rule, "stays" if one.held else goes, str(one.bytes), one.why),
                "; ".join(held.text for held in one.held) or _safe(one.safe),
            )
            for one in fates
        ]
        table(("STUDY", "RULE", "FATE", "BYTES", "DUE", "BECAUSE"), rows, "no study is due")
        print(f"{run.deleted} studies of {run.bytes} bytes {goes}, {run.kept.total()} are due and stay")
    for rule, over in run.over_bytes.items():
        if over:
            print(f"dicom-node: rule {rule}: its quota is not met, {over} bytes too much stay", file=sys.stderr)
    return FAILED if any(run.over_bytes.values()) else OK


def _safe(safe: Mapping[str, str]) -> str:
    return ", ".join(f"{how} at {name}" for name, how in safe.items()) or "nothing was to be delivered"


def _fate(fate: Fate) -> Mapping[str, Any]:
    held = [{"reason": one.reason.value, "text": one.text} for one in fate.held]
    return {
        **{"study": fate.study_instance_uid, "rule": fate.rule, "due": fate.why, "bytes": fate.bytes},
        **{"goes": not fate.held, "held": held, "safe": dict(fate.safe)},
    }


def _told(run: Run) -> Mapping[str, Any]:
    return {"deleted": run.deleted, "bytes": run.bytes, "kept": dict(run.kept), "over_quota_bytes": run.over_bytes}


def delete(arguments: argparse.Namespace) -> int:
    """Delete studies, each as a whole. Exit status 2 when one stays."""
    config = offline(arguments)
    holds = PERSON_IS_HELD_BY - ({Hold.COMMITTED_TO} if arguments.break_commitment else frozenset())
    stay = 0
    with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
        deleter = node_deleter(catalog, config, trail)
        for study in arguments.study:
            try:
                print(_delete(catalog, deleter, study, holds, arguments))
            except (NotFound, StudyHeld) as exc:  # the others are no worse for it
                stay += 1
                print(f"dicom-node: study {study} stays: {exc}", file=sys.stderr)
    return FAILED if stay else OK


def _delete(
    catalog: Catalog, deleter: Deleter, study: str, holds: frozenset[Hold], arguments: argparse.Namespace
) -> str:
    _, instances, length = catalog.queue.study_contents(study)
    what = f"study {study}: {sum(instances.values())} objects, {length} bytes"
    held = deleter.held(study, holds)
    if held and arguments.dry_run:
        raise StudyHeld(held)
    if arguments.dry_run:
        return f"{what} would be deleted"
    broken = ", although the node committed to it" if arguments.break_commitment else ""
    why = f"asked for on the command line{broken}"
    order = DeletionOrder(study_instance_uid=study, rule=PERSON, who=person().user, why=why, holds=holds)
    if held:
        deleter.refuse(order, held)
    if not (arguments.yes or _agreed(what)):
        return f"{what} stays"
    deleter.delete(order)
    left = catalog.queue.unfinished_deletions()
    if any(one.study_instance_uid == study for one in left):
        why = "some of its files could not be removed, or the audit trail not be told"
        return f"{what} is deleted, but {why}; the node tries again"
    return f"{what} is deleted"


def _agreed(what: str) -> bool:
    if not sys.stdin.isatty():
        print("dicom-node: nobody to ask; say --yes", file=sys.stderr)
        return False
    return input(f"{what}. Delete for good? [y/N] ").strip().lower() in ("y", "yes")
