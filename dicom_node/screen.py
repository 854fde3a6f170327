"""`dicom-node status`: the node on one screen. Pure: facts in, text out; no patient data."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicom_node.pulse import Pulse
from dicom_node.store.pressure import Grade, Pressed
from dicom_node.store.queue import Stuck

__all__ = ["NodeFacts", "render_status"]

STUCK_SHOWN = 12
WIDTH = 120
WHY_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What the screen shows. `alive`: roles that gave a sign of life lately; `free_bytes`: above the reserve;
    `pressed`: what the disk makes wait.
    """

    name: str
    data_dir: str
    pulses: Mapping[str, Pulse]
    alive: frozenset[str]
    free_bytes: int
    pressed: Pressed
    snapshot: Mapping[str, Any]
    stuck: Sequence[Stuck]


def render_status(facts: NodeFacts) -> str:
    """The screen."""
    return "\n".join([*_node(facts), "", *_counts(facts.snapshot), "", *_stuck(facts.stuck)]) + "\n"


def _node(facts: NodeFacts) -> list[str]:
    supervisor = facts.pulses.get("supervisor")
    if supervisor is None or not facts.alive:
        lines = [f"{facts.name}: not running"]
    else:
        lines = [f"{facts.name}: running since {supervisor.started_at[:19]}Z, {_ports(supervisor.facts)}"]
        roles = supervisor.facts.get("restarts", ())
        receivers = [role for role in roles if role.startswith("receiver")] or ["receiver"]
        processes = ", ".join(_process(facts, role) for role in (*receivers, "service", "work"))
        lines += _wrapped(f"processes   {processes}", " " * 12)
        if len(receivers) > 1:
            had = sum(pulse.facts.get("associations", 0) for role in receivers if (pulse := facts.pulses.get(role)))
            lines.append(f"receivers   {len(receivers)}, {had} associations")
        service = facts.pulses.get("service")
        if service is not None and "rules" in service.facts:
            broken = " (the rules on disk are broken: rules check)" if service.facts.get("rules_error") else ""
            lines.append(f"rules       {service.facts['rules']} in force{broken}")
        work = facts.pulses.get("work")
        for engine, why in (work.facts.get("unusable", {}) if work else {}).items():
            lines += _wrapped(f"engine      {engine} CANNOT RUN, its jobs wait: {why}", " " * 12)
        for runtime in work.facts.get("runtimes", ()) if work else ():
            if runtime["breaker"]:
                lines.append(f"device      {runtime['device']} FAILED AGAIN AND AGAIN, the CPU does its work"[:WIDTH])
    lines.append(_disk(facts))
    return lines


def _ports(facts: Mapping[str, Any]) -> str:
    dicom, http = f"DICOM port {facts.get('dicom_port')}", f"HTTP port {facts.get('http_port')}"
    if facts.get("tls_port"):
        dicom += f", over TLS {facts['tls_port']}"
    if facts.get("metrics_port", facts.get("http_port")) != facts.get("http_port"):
        http += f", /ready and /metrics on {facts['metrics_port']}"
    return f"{dicom}, {http}"


def _disk(facts: NodeFacts) -> str:
    waits = {
        Grade.PAUSED: "routine and background jobs WAIT",
        Grade.REFUSING: "C-STORE IS REFUSED; urgent jobs and results go on",
        Grade.FULL: "C-STORE IS REFUSED, and no job is done",
    }.get(facts.pressed.grade)
    if waits:
        return f"disk        {waits}: {facts.pressed.reason}; data in {facts.data_dir}"
    return f"disk        {_bytes(facts.free_bytes)} above the reserve; data in {facts.data_dir}"


def _process(facts: NodeFacts, role: str) -> str:
    pulse, restarts = facts.pulses.get(role), 0
    if supervisor := facts.pulses.get("supervisor"):
        restarts = supervisor.facts.get("restarts", {}).get(role, 0)
    again = f" ({restarts} restart{'s' if restarts > 1 else ''})" if restarts else ""
    if pulse is None or role not in facts.alive:
        return f"{role} SILENT{again}"
    return f"{role} {'ok' if pulse.ok else pulse.detail or 'not ok'}{again}"


def _counts(snapshot: Mapping[str, Any]) -> list[str]:
    studies, ledger = snapshot["studies"], snapshot["ledger_studies"]
    lines = [
        f"studies     {studies['total']} kept, {studies['open']} open"
        + (f" (oldest for {_age(studies['oldest_open_age_s'])})" if studies["open"] else "")
        + f", {studies['identity_conflicts']} with an identity conflict; {snapshot['instances']} instances",
        f"ledger      {ledger['received']} received = {ledger['routed']} routed + {ledger['filtered']} filtered"
        f" + {ledger['waiting']} waiting + {ledger['failed']} failed"
        + (f"; UNACCOUNTED FOR: {ledger['imbalance']}" if ledger["imbalance"] else ""),
    ]
    if reasons := snapshot["ledger"]["reasons"]:
        lines.append("filtered    " + ", ".join(f"{count} series: {why}" for why, count in sorted(reasons.items())))
    if variants := snapshot["variants"]:
        lines.append("variants    " + ", ".join(f"{count} {kind}" for kind, count in sorted(variants.items())))
    if any((returned := snapshot["returned"]).values()):
        lines.append(f"returned    {returned['taken']} objects are results, {returned['untaken']} are of no job so far")
    lines.append("jobs        " + _states(snapshot["jobs"]))
    for destination, states in sorted(snapshot["deliveries"].items()):
        lines.append(f"to {destination:<9}" + _states(states))
    asked = ", ".join(f"{count} {state}" for state, count in snapshot["commitments"].items() if count)
    lines.append(
        f"associations open: {snapshot['associations']['open']}"
        + (f"; peers' requests for storage commitment: {asked}" if asked else "")
    )
    return [line[:WIDTH] for line in lines]


def _states(states: Mapping[str, Mapping[str, float]]) -> str:
    shown = [
        f"{counted['count']} {state}"
        + (f" (oldest {_age(counted['oldest_age_s'])})" if counted["oldest_age_s"] else "")
        for state, counted in states.items()
        if counted["count"]
    ]
    return ", ".join(shown) or "none"


def _stuck(found: Sequence[Stuck]) -> list[str]:
    if not found:
        return ["nothing waits, nothing is stuck"]
    # what needs a person first, then the oldest
    ordered = sorted(found, key=lambda one: (one.next_s is not None, -one.age_s))
    lines = [f"waiting or stuck: {len(found)}"]
    for one in ordered[:STUCK_SHOWN]:
        number = f" {one.id}" if one.id is not None else ""
        lines += _wrapped(f"  {one.kind}{number} {one.state} for {_age(one.age_s)}: {one.name}; {one.why}", " " * 4)
        lines += _wrapped(f"    study {one.study_instance_uid}; {_next(one)}", " " * 6)
    if len(ordered) > STUCK_SHOWN:
        lines.append(f"  ... and {len(ordered) - STUCK_SHOWN} more: --json, jobs list, deliveries list")
    return lines


def _wrapped(text: str, under: str) -> list[str]:
    """The text on few lines: what helps often stands at the end of a reason."""
    head = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(), WIDTH, initial_indent=head, subsequent_indent=under, max_lines=WHY_LINES, break_on_hyphens=False
    )


def _next(one: Stuck) -> str:
    if one.next_s is not None:
        return f"goes on by itself in {_age(one.next_s)}" if one.next_s >= 1 else "goes on by itself now"
    study = shlex.quote(one.study_instance_uid)
    remedy = {
        "job": f"dicom-node jobs retry {one.id}",
        "delivery": f"dicom-node deliveries retry {one.id}",
        "conflict": f"dicom-node release {study}",
        "series": f"dicom-node route {study}",
        "commitment": "let the peer ask again",
    }.get(one.kind)
    return f"needs a person: {remedy}" if remedy else "waits"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
