# ruff: noqa: T201 - what commands say goes to standard output
"""What each command does; `cli` says what can be said. Most open the catalog, with the node running or stopped."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, load_config
from dicom_node.errors import ConfigError, IllegalTransition, NodeError, NotFound
from dicom_node.logs import setup_logging
from dicom_node.model import (
    Delivery,
    Job,
    SendingRecord,
    StudyActivity,
)
from dicom_node.pulse import fresh, lives, read_pulse
from dicom_node.trails import acted, command_trail, upkeep

OK = 0
FAILED = 2
INSTALLED = Path("/etc/dicom-node/node.yaml")
RELOAD_S = 15.0
WHY_CHARS = 160

# --- settings


def settings(arguments: argparse.Namespace) -> NodeConfig:
    """The configuration: file, variables, flags."""
    path = settings_file(arguments)
    overrides: dict[str, Any] = {
        "data_dir": arguments.data_dir,
        "rules_dir": arguments.rules,
        "ae_titles": arguments.ae_title,
        "host": arguments.host,
        "dicom_port": arguments.dicom_port,
        "http_port": arguments.http_port,
        "wire": arguments.wire,
        "receivers": arguments.receivers,
    }
    return load_config(path, overrides=overrides)


def settings_file(arguments: argparse.Namespace) -> Path | None:
    """What --config names; else that of the current folder, else that of the installed node; None: there is none."""
    if arguments.config:
        return Path(arguments.config)
    return next((path for path in (Path("config/node.yaml"), INSTALLED) if path.is_file()), None)


@contextmanager
def open_here(config: NodeConfig) -> Iterator[Any]:
    """The catalog that is in the node's folder. Raises NotFound when none is."""
    from dicom_node.wiring import node_catalog

    if not ((config.data_dir / "catalog.db").is_file() or (config.data_dir / "archive").is_dir()):
        raise NotFound(f"{config.data_dir}: no node has been here; start one, or name its settings with --config")
    catalog = node_catalog(config, SystemClock())
    try:
        yield catalog
    finally:
        catalog.close()


def offline(arguments: argparse.Namespace) -> NodeConfig:
    """The configuration for a command that logs nothing below errors. Raises ConfigError."""
    config = settings(arguments)
    setup_logging("ERROR", "command")
    _not_root_for_another(config)
    return config


def _not_root_for_another(config: NodeConfig) -> None:
    """Raises ConfigError where root would leave files in the folder of a node that runs as somebody else."""
    try:
        owner = (config.data_dir / "catalog.db").stat().st_uid
    except OSError:
        return
    if os.geteuid() == 0 and owner != 0:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"#{owner}"
        raise ConfigError(
            f"data_dir: the node in {config.data_dir} runs as {name}, which could not use files that root makes there; "
            f"run this as that user: sudo -u {shlex.quote(name)} dicom-node ..."
        )


# --- the node


def serve(arguments: argparse.Namespace) -> int:
    """Run the node."""
    from dicom_node import supervisor

    config = settings(arguments)
    setup_logging(config.log_level, "supervisor")
    _not_root_for_another(config)
    config.resolved_rules_dir()
    _check_tls(config)
    _check_token(config)
    return supervisor.serve(config, lambda line: print(line, flush=True))


def _check_tls(config: NodeConfig) -> None:
    """Raises ConfigError for certificates and keys that cannot be used."""
    collectors = config.audit.collectors.values() if config.audit is not None else ()
    if (
        config.tls is not None
        or any(one.tls is not False for one in config.destinations.values())
        or any(one.protocol == "tls" for one in collectors)
    ):
        from dicom_node.dimse.tls import check_tls

        check_tls(config)


def _check_token(config: NodeConfig) -> None:
    """Raises ConfigError when the token of HTTP is missing, too short, or where others can read it."""
    if config.http_token_env or config.http_token_file:
        from dicom_node.http.token import read_token

        read_token(config.http_token_env, config.http_token_file)


def config_check(arguments: argparse.Namespace) -> int:
    """Read everything that is configured; print what holds."""
    from dicom_node.deciding import node_rules
    from dicom_node.starting import check_access
    from dicom_node.wiring import engines, put_away

    config = settings(arguments)
    _check_tls(config)
    check_access(config)
    _check_token(config)
    rules = node_rules(config)
    for name, engine in engines(config).items():
        put_away(name, engine)
    print(json.dumps(config.model_dump(mode="json"), indent=2))
    print(f"settings are right; {len(rules.rules)} rules in {config.resolved_rules_dir()}", file=sys.stderr)
    return OK


def fsck(arguments: argparse.Namespace) -> int:
    """Check or rebuild the index from the files."""
    from dicom_node.pipeline.fsck import fsck as check
    from dicom_node.process import wait_for_children
    from dicom_node.retaining import node_deleter
    from dicom_node.store.lock import data_lock
    from dicom_node.wiring import replay_journals

    config = offline(arguments)
    if not config.data_dir.is_dir():
        raise NotFound(f"{config.data_dir}: there is no such folder; name the node's with --data-dir")
    with data_lock(config.data_dir):  # an object between its name and its row would look like one without a row
        wait_for_children(config.data_dir)
        with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
            catalog.check_sound(thoroughly=not arguments.quick)
            replay_journals(catalog, config)
            node_deleter(catalog, config, trail).finish_all()
            report = check(
                catalog,
                rebuild=arguments.repair,
                verify_hashes=not arguments.quick,
                clock=SystemClock(),
                max_inflated_header_bytes=config.storage.max_inflated_header_bytes,
            )
            miscounted = catalog.queue.audit_counts(repair=arguments.repair)
            if arguments.repair:
                trail.record(upkeep(f"fsck --repair: {len(report.indexed)} files indexed"))
    print(f"{report.rows} rows, {report.files} files")
    kinds = ("missing", "damaged", "missing_variants", "found_again", "indexed", "unindexed", "deleted", "unfinished")
    for kind in (*kinds, "unusable", "quarantined"):
        for what in getattr(report, kind):
            print(f"{kind.replace('_', ' ')}: {what}")
    for what in miscounted:
        print(f"{'counted anew' if arguments.repair else 'miscounted'}: {what}")
    if left := len(report.deleted) + len(report.unfinished):
        where = config.data_dir / "archive"
        print(
            f"deleted or unfinished: {left}. They belong to nothing: remove them below {where} before the node starts, "
            "or leave them: what is sent again may use them",
            file=sys.stderr,
        )
    print("archive and index agree" if report.clean else "archive and index do not agree (--repair indexes files)")
    return OK if report.clean and (arguments.repair or not miscounted) else FAILED


# --- studies


def route(arguments: argparse.Namespace) -> int:
    """Close a study and route it now."""
    from dicom_node.deciding import node_router, node_rules
    from dicom_node.pipeline.observe import Unobserved

    config, clock = offline(arguments), SystemClock()
    rules = node_rules(config)
    with open_here(config) as catalog:
        router = node_router(catalog, config, lambda: rules, clock, Unobserved())
        routed = router.route_now(arguments.study, again=arguments.again, rule=arguments.rule)
        with command_trail(config, catalog.index.patient_ids) as trail:
            trail.record(acted(arguments.study, f"routed by hand: {len(routed.job_ids)} new jobs"))
    for series in routed.series:
        matched = [verdict.rule for verdict in series.verdicts if verdict.matched]
        outcome = series.failure or (f"matched {', '.join(matched)}" if matched else "no rule matched")
        print(f"series {series.series_instance_uid}: {outcome}")
    print(f"new jobs: {', '.join(map(str, routed.job_ids)) or 'none'}")
    return OK


def release(arguments: argparse.Namespace) -> int:
    """Let a study with an identity conflict be analysed."""
    config = offline(arguments)
    with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
        catalog.queue.release_study(arguments.study)
        trail.record(acted(arguments.study, "released from its identity conflict"))
    print(f"study {arguments.study} is released")
    return OK


def timeline(arguments: argparse.Namespace) -> int:
    """What happened to a study, and when. Raises NotFound."""
    with open_here(offline(arguments)) as catalog:
        events = catalog.queue.timeline(arguments.study)
    if not events:
        raise NotFound(f"there is no study {arguments.study}")
    for event in events:
        print(f"{event.at:%Y-%m-%d %H:%M:%S.%f}"[:-3], event.text)
    return OK


def status(arguments: argparse.Namespace) -> int:
    """The node on one screen."""
    from dicom_node.backpressure import DiskWatch, pressed_elsewhere
    from dicom_node.deciding import due_now
    from dicom_node.screen import NodeFacts, render_status

    config, clock = offline(arguments), SystemClock()

    def waits_for(activity: StudyActivity) -> tuple[str, float | None]:
        due = due_now(config, clock)(activity)
        return due.waiting_for, max((due.at_s or 0.0) - clock.boot().seconds, 0.0)

    with open_here(config) as catalog:
        snapshot = catalog.queue.snapshot()
        stuck = catalog.queue.stuck(destinations=config.destinations, waits_for=waits_for)
        sendings = catalog.queue.sendings() if arguments.json else ()
        free_bytes = catalog.archive.free_bytes()
        pressed = DiskWatch(catalog.pressure, lambda: pressed_elsewhere(config, clock)).pressed()
    # the node may have been started with other settings than these
    running = read_pulse(config.data_dir, "supervisor")
    roles = ("supervisor", *(running.facts.get("restarts", ()) if running else ()))
    pulses = {role: pulse for role in roles if (pulse := read_pulse(config.data_dir, role))}
    facts = NodeFacts(
        name="/".join(config.ae_titles),
        data_dir=str(config.data_dir),
        pulses=pulses,
        alive=frozenset(role for role, pulse in pulses.items() if lives(pulse, clock)),
        free_bytes=free_bytes,
        pressed=pressed,
        snapshot=snapshot,
        stuck=stuck,
    )
    if arguments.json:
        more = {"sendings": [_sending(one) for one in sendings], "stuck": [asdict(one) for one in stuck]}
        disk = {"intake_state": min(pressed.grade, 2), "reason": pressed.reason, "free_bytes": free_bytes}
        print(json.dumps({**snapshot, **more, "disk": disk, "alive": sorted(facts.alive)}, indent=2))
    else:
        print(render_status(facts), end="")
    return OK


def _sending(record: SendingRecord) -> dict[str, Any]:
    """What left the node for an engine, JSON-ready: of the newest, whatever study they are of."""
    fields = asdict(record)
    what = fields.pop("sending")
    ended_at = record.ended_at.isoformat() if record.ended_at else None
    times = {"begun_at": record.begun_at.isoformat(), "ended_at": ended_at}
    return {**fields, **what, "state": record.state.value, **times}


# --- jobs and deliveries


def jobs_list(arguments: argparse.Namespace) -> int:
    """Newest first."""
    with open_here(offline(arguments)) as catalog:
        jobs: Sequence[Job] = catalog.queue.jobs(study_instance_uid=arguments.study, limit=arguments.limit)
    rows = [
        (
            str(job.id),
            job.state.value,
            job.rule,
            job.engine,
            str(job.attempts),
            job.study_instance_uid,
            _line(job.error),
        )
        for job in jobs
    ]
    table(("ID", "STATE", "RULE", "ENGINE", "TRIES", "STUDY", "WHY"), rows, "no jobs")
    return OK


def jobs_retry(arguments: argparse.Namespace) -> int:
    """Try them again."""
    return _each(arguments, lambda catalog: catalog.queue.retry_job, "job {} waits again")


def jobs_cancel(arguments: argparse.Namespace) -> int:
    """Give them up."""
    return _each(arguments, lambda catalog: catalog.queue.cancel_job, "job {} is cancelled")


def deliveries_list(arguments: argparse.Namespace) -> int:
    """Newest first."""
    with open_here(offline(arguments)) as catalog:
        found: Sequence[Delivery] = catalog.queue.deliveries(study_instance_uid=arguments.study, limit=arguments.limit)
    rows = [
        (
            *(str(one.id), one.state.value, one.destination, str(one.attempts)),
            *(f"{sum(item.sent for item in one.items)}/{len(one.items)}", one.study_instance_uid, _line(one.error)),
        )
        for one in found
    ]
    table(("ID", "STATE", "DESTINATION", "TRIES", "SENT", "STUDY", "WHY"), rows, "no deliveries")
    return OK


def deliveries_retry(arguments: argparse.Namespace) -> int:
    """Try them again."""
    return _each(arguments, lambda catalog: catalog.queue.retry_delivery, "delivery {} waits again")


def deliveries_cancel(arguments: argparse.Namespace) -> int:
    """Give them up."""
    return _each(arguments, lambda catalog: catalog.queue.cancel_delivery, "delivery {} is cancelled")


def _each(arguments: argparse.Namespace, verb: Callable[[Any], Callable[[int], None]], done: str) -> int:
    wrong = 0
    config = offline(arguments)
    with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
        for number in arguments.id:
            try:
                verb(catalog)(number)
            except (NotFound, IllegalTransition) as exc:  # the others are no worse for it
                wrong += 1
                print(f"dicom-node: {exc}", file=sys.stderr)
            else:
                trail.record(acted("", f"by hand: {done.format(number)}"))
                print(done.format(number))
    return FAILED if wrong else OK


def table(head: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    """Print rows in aligned columns under their heads; `nothing` when there are none."""
    if not rows:
        print(nothing)
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _line(text: str) -> str:
    """A reason as one line of a table; all of it is in the log and in `status --json`."""
    return " ".join(text.split())[:WHY_CHARS]


# --- rules


def rules_check(arguments: argparse.Namespace) -> int:
    """Everything that is wrong, with file, line and remedy; and, as warnings, whose results would go nowhere."""
    from dicom_node.deciding import node_rules, sender_warnings
    from dicom_node.plugins import encoder_kinds
    from dicom_node.routing.load import check_rules

    config = settings(arguments)
    folder = config.resolved_rules_dir()
    problems = check_rules(folder, engines=config.engines, destinations=config.destinations, results=encoder_kinds())
    for problem in problems:
        print(f"dicom-node: {problem}", file=sys.stderr)
    if problems:
        return FAILED
    rules = node_rules(config)
    for warning in sender_warnings(config, rules):
        print(f"dicom-node: warning: {warning}", file=sys.stderr)
    names = [rule.name for rule in rules.rules]
    print(f"{folder}: {len(names)} rules are right: {', '.join(names) or 'a plain archive'}")
    return OK


def rules_explain(arguments: argparse.Namespace) -> int:
    """What was decided on a study, or would be if it was not decided yet."""
    from dicom_node.deciding import due_now, node_router, node_rules
    from dicom_node.pipeline.observe import Unobserved
    from dicom_node.routing.explain import render_verdicts

    config, clock = offline(arguments), SystemClock()
    with open_here(config) as catalog:
        if verdicts := catalog.queue.verdicts(arguments.study):
            print("As decided:")
            print(render_verdicts(verdicts))
        for gone in catalog.queue.deletions(arguments.study):
            by = f"by {gone.who}" if gone.rule == "person" else f"by retention rule {gone.rule}"
            print(f"Deleted on {gone.at:%Y-%m-%d %H:%M} {by}: {gone.why}")
        if catalog.queue.deletions(arguments.study) and not catalog.queue.has_study(arguments.study):
            return OK
        waiting = catalog.queue.open_studies([arguments.study])
        if waiting or not verdicts:
            rules = node_rules(config)
            router = node_router(catalog, config, lambda: rules, clock, Unobserved())
            series = router.explain(arguments.study)
            for activity in waiting:
                print(f"Not routed yet; waits for {due_now(config, clock)(activity).waiting_for}")
            print("The rules in force would say:")
            print(render_verdicts([verdict for routed in series for verdict in routed.verdicts]))
    return OK


def rules_replay(arguments: argparse.Namespace) -> int:
    """A changed rule set over the history, against the one that would be in force without --rules."""
    from dicom_node.deciding import destination_of, node_rules, zone
    from dicom_node.routing.explain import render_replay
    from dicom_node.routing.replay import replay

    config, clock = offline(arguments), SystemClock()
    new = node_rules(config)
    arguments.rules = None
    old = node_rules(settings(arguments))
    since = clock.wall() - age(arguments.since)
    with open_here(config) as catalog:
        report = replay(
            catalog.queue.series_history(since), old, new, destination_of=destination_of(config), zone=zone(config)
        )
    print(render_replay(report))
    return OK


def age(text: str) -> timedelta:
    """What `--since` says. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,5})([mhdw])", text)
    if match is None:
        raise ConfigError(f"--since: {text!r} is no age; write a number with m, h, d or w, such as 7d")
    unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[match[2]]
    return timedelta(**{unit: int(match[1])})


def rules_reload(arguments: argparse.Namespace) -> int:
    """Let the running node take its rules in, and say how that went."""
    config, clock = offline(arguments), SystemClock()
    supervisor, before = read_pulse(config.data_dir, "supervisor"), read_pulse(config.data_dir, "service")
    if supervisor is None or before is None or not fresh(before, clock):
        raise NotFound(f"{config.data_dir}: no node runs here; the rules are read when it starts")
    os.kill(supervisor.pid, signal.SIGHUP)
    deadline = time.monotonic() + RELOAD_S
    while time.monotonic() < deadline:
        now = read_pulse(config.data_dir, "service")
        if now is not None and now.facts.get("reloads") != before.facts.get("reloads"):
            if error := now.facts["rules_error"]:
                raise ConfigError(f"the node keeps its old rules: {error}")
            print(f"{now.facts['rules']} rules in force, digest {now.facts['rules_digest'][:12]}")
            return OK
        time.sleep(0.05)
    raise NodeError(f"the node did not answer within {RELOAD_S:g} s; see its log")
