# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node send` and `fetch`: the node's DICOM client for a person's files. No catalog, no rules."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, Participant, Role
from dicom_node.commands import FAILED, OK, settings
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError
from dicom_node.logs import setup_logging
from dicom_node.model import Destination, UserCredentials
from dicom_node.trails import command_trail, person

__all__ = ["fetch", "peer", "send"]


def peer(text: str) -> Destination:
    """`HOST:PORT/AET` as a destination. Raises ConfigError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[^:/\[\]]+):(\d{1,5})/([\x20-\x5b\x5d-\x7e]{1,16})", text)
    if match is None or not 0 < int(match[2]) < 65536 or not match[3].strip():
        raise ConfigError(f"{text!r} names no peer; write HOST:PORT/AET such as 127.0.0.1:11112/DICOM_NODE")
    return Destination(name=text, ae_title=match[3].strip(), host=match[1].strip("[]"), port=int(match[2]))


def _asked(config: NodeConfig, text: str, arguments: argparse.Namespace) -> Destination:
    """`peer(text)`, called as a destination with `tls: true` is, and as the user that is named. Raises ConfigError."""
    user = None
    if arguments.user or arguments.jwt_file:
        if bool(arguments.user) == bool(arguments.jwt_file):
            raise ConfigError("--user and --jwt-file both say who the user is; give one of them")
        if arguments.passcode_env and not arguments.user:
            raise ConfigError("--passcode-env goes with --user; a token needs no passcode")
        user = UserCredentials(
            name=arguments.user or "",
            passcode_env=arguments.passcode_env or "",
            jwt_file=arguments.jwt_file or "",
            allow_plain=arguments.allow_plain,
        )
    elif arguments.passcode_env:
        raise ConfigError("--passcode-env goes with --user NAME; say who the user is")
    return replace(peer(text), tls=config.client_tls(arguments.tls), user=user)


def send(arguments: argparse.Namespace) -> int:
    """C-STORE files; a refused one is named with its status, and the others go on."""
    from dicom_node.dimse.files import send_files
    from dicom_node.dimse.session import is_stored

    config = settings(arguments)
    destination = _asked(config, arguments.to, arguments)
    setup_logging("ERROR", "command")
    sent, refused = 0, 0

    def on_result(path: Path, status: int | None, error: str) -> None:
        nonlocal sent, refused
        if status is not None and is_stored(status):
            sent += 1
            return
        refused += 1
        said = f"status {status:04X}H {error}".strip() if status is not None else error
        print(f"dicom-node: {path}: not stored: {said}", file=sys.stderr)

    paths = list(_files(arguments.paths))
    send_files(paths, destination, on_result, settings=config.delivery, calling_ae_title=config.ae_titles[0])
    _told(config, AuditKind.EXPORTED, destination, f"{sent} of {len(paths)} files sent", ok=not refused)
    print(f"{sent} of {len(paths)} files stored by {destination.ae_title}")
    return FAILED if refused or not paths else OK


def _told(config: NodeConfig, kind: AuditKind, there: Destination, what: str, *, ok: bool, study: str = "") -> None:
    """Tell the audit trail of a transfer of a person's files."""
    is_source = kind is AuditKind.IMPORTED
    me = replace(person(), role=Role.DESTINATION if is_source else Role.SOURCE)
    other = Participant(ae_title=there.ae_title, host=there.host, role=Role.SOURCE if is_source else Role.DESTINATION)
    event = AuditEvent(
        kind=kind,
        outcome=AuditOutcome.SUCCESS if ok else AuditOutcome.MINOR_FAILURE,
        participants=(me, other),
        study_instance_uids=(study,) if study else (),
        detail=what,
    )
    with command_trail(config) as trail:
        trail.record(event)


def _files(named: Sequence[str]) -> Iterator[Path]:
    for name in named:
        path = Path(name)
        if path.is_dir():
            yield from (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "DICOMDIR")
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"{name}: there is no such file or folder")


def fetch(arguments: argparse.Namespace) -> int:
    """C-GET a study into a folder."""
    from dicom_node.dimse.files import get_study

    config = settings(arguments)
    remote = _asked(config, arguments.origin, arguments)
    setup_logging("ERROR", "command")
    if re.fullmatch(r"[0-9.]{1,64}", arguments.study) is None:
        raise ConfigError(f"{arguments.study!r} is no UID: 1-64 digits and dots")
    folder = Path(arguments.into or arguments.study)
    fetched = get_study(remote, arguments.study, folder, settings=config.delivery, calling_ae_title=config.ae_titles[0])
    is_whole = fetched.status == 0x0000 and bool(fetched.files)
    what = f"{len(fetched.files)} files fetched"
    _told(config, AuditKind.IMPORTED, remote, what, ok=is_whole, study=arguments.study)
    print(f"{len(fetched.files)} files in {folder}")
    if fetched.status == 0x0000 and fetched.files:
        return OK
    reason = fetched.comment or ("the study is not there" if not fetched.files else f"{fetched.failed} failed")
    print(f"dicom-node: status {fetched.status:04X}H: {reason}", file=sys.stderr)
    return FAILED
