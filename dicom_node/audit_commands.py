# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node audit verify`: is the audit trail what was written?"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dicom_node.audit.chain import Head
from dicom_node.audit.verify import read_anchor, verify
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome
from dicom_node.commands import FAILED, OK, offline
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError, NotFound
from dicom_node.trails import anchor_path, command_trail, person, trail_folder

__all__ = ["audit_verify"]


def audit_verify(arguments: argparse.Namespace) -> int:
    """Every line of every file, against each other and the head that is kept apart. Exit status 2: it was changed.

    That somebody looked is itself told to the trail (PS3.15 A.5.3.2), unless a copy was looked at.
    """
    config = offline(arguments)
    folder = Path(arguments.folder) if arguments.folder else trail_folder(config)
    is_own = folder == trail_folder(config) and config.audit is not None
    anchors = [_anchor(text) for text in arguments.anchor]
    if is_own and (kept := read_anchor(anchor_path(config))) is not None:
        anchors.append(kept)
    if not folder.is_dir() and not anchors:
        raise NotFound(f"{folder}: there is no audit trail; set `audit:` in the configuration, or name its folder")
    report = verify(folder, anchors)
    if is_own:
        _told(config, folder.resolve().as_uri(), is_whole=not report.faults)
    for fault in report.faults:
        print(f"dicom-node: {folder}: {fault}", file=sys.stderr)
    if report.unfinished_bytes:
        print(
            f"a last line of {report.unfinished_bytes} bytes has no end: being written, or left by a crash; no change"
        )
    if report.first > 1:
        print(f"it begins with line {report.first}: older files are elsewhere, verify them with these")
    if report.faults:
        print(f"{report.lines} lines in {report.files} files: NOT what was written")
        return FAILED
    head = report.end.head if report.end is not None else Head()
    print(f"{report.lines} lines in {report.files} files, none changed; head {head.sequence}:{head.hash}")
    return OK


def _told(config: NodeConfig, uri: str, *, is_whole: bool) -> None:
    outcome = AuditOutcome.SUCCESS if is_whole else AuditOutcome.SERIOUS_FAILURE
    event = AuditEvent(kind=AuditKind.AUDIT_LOG_USED, outcome=outcome, participants=(person(),), detail=uri)
    with command_trail(config) as trail:
        trail.record(event)


def _anchor(text: str) -> Head:
    """What the log and an earlier verification call the head. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})", text)
    if found is None:
        raise ConfigError(f"--anchor: {text!r} is no head; write SEQUENCE:HASH as `audit verify` and the log print it")
    return Head(int(found[1]), found[2])
