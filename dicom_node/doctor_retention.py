"""What `dicom-node doctor` says of retention. Part of the composition root."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from dicom_node.config import NodeConfig
from dicom_node.doctor import Finding, State
from dicom_node.pulse import read_pulse
from dicom_node.store.pressure import volumes

__all__ = ["retention"]


def retention(config: NodeConfig) -> Iterator[Finding]:
    """What is due and stays, quotas that are not met, and rules that make room too late."""
    rules = config.retention.rules if config.retention else ()
    if not rules:
        yield _found(State.OK, "off: everything is kept until a person deletes it")
        return
    pulse = read_pulse(config.data_dir, "service")
    facts: Mapping[str, Any] = pulse.facts.get("retention", {}) if pulse is not None else {}
    kept = ", ".join(f"{count} {reason}" for reason, count in sorted(facts.get("kept", {}).items()))
    text = f"{len(rules)} rules" + (f"; due and kept: {kept}" if kept else "")
    over = [name for name, bytes_ in facts.get("over", {}).items() if bytes_]
    if facts.get("error"):
        yield _found(State.WRONG, f"it failed: {facts['error']}", "see the node's log")
    elif over:
        remedy = "dicom-node retention --dry-run says what stays and why"
        yield _found(State.WRONG, f"{text}; quota not met: {', '.join(over)}", remedy)
    else:
        yield _found(State.OK, text)
    yield from _too_late(config)


def _too_late(config: NodeConfig) -> Iterator[Finding]:
    """Jobs wait before these rules make room: and a study whose jobs wait is not deleted."""
    rules = config.retention.rules if config.retention else ()
    wanted = {rule.name: rule.free_bytes for rule in rules if rule.free_bytes is not None}
    if not wanted or not config.data_dir.is_dir():
        return
    volume = volumes(config.data_dir, config.storage)[0]
    space = os.statvfs(volume.path)
    pauses_at = int(volume.reserve(space.f_blocks * space.f_frsize) * (volume.pause_at - 1))
    for name, free in wanted.items():
        if free <= pauses_at:
            text = f"rule {name} makes room below {free} bytes above the reserve, where jobs wait below {pauses_at}"
            yield _found(State.WRONG, text, f"set its free_bytes well above {pauses_at}")


def _found(state: State, text: str, remedy: str = "") -> Finding:
    return Finding(what="retention", state=state, text=text, remedy=remedy)
