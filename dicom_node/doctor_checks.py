"""What `dicom-node doctor` looks at, thing by thing. Part of the composition root."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, is_loopback
from dicom_node.doctor import Check, Finding, State
from dicom_node.doctor_audit import audit_trail, collector_of
from dicom_node.doctor_http import http_settings, reachable, ready
from dicom_node.doctor_retention import retention
from dicom_node.errors import NodeError, NotFound
from dicom_node.interfaces import Engine
from dicom_node.pulse import lives, read_pulse
from dicom_node.store.pressure import Grade, Volume, pressed_by, volumes

__all__ = ["checks"]

SLOW_SYNC_S = 0.1
CERTIFICATE_DAYS = 14
CLOCK_SLACK = timedelta(minutes=5)
_PEER_S = 5.0  # to connect, and to answer
_BLOCK = 4096
_SYNCS = 5
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs", "ceph"})
_FORGETFUL = frozenset({"tmpfs", "ramfs"})
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def checks(config: NodeConfig) -> tuple[list[Check], list[Check]]:
    """Those that run one after the other, because they measure the machine, and those that run side by side."""
    see = "see the message"
    alone = [
        Check(what="configuration", look=partial(_configuration, config), remedy=see),
        Check(what="rules", look=partial(_rules, config), remedy="dicom-node rules check", limit_s=30),
        Check(what="data folder", look=partial(_data_folder, config), remedy="name one with data_dir"),
        Check(what="disk", look=partial(_disk, config), remedy="see the system's log of that disk", limit_s=30),
        Check(what="clock", look=_clock, remedy="set up chrony or systemd-timesyncd"),
        Check(what="ports", look=partial(_ports, config), remedy="see the node's log"),
        Check(what="catalog", look=partial(_catalog, config), remedy="dicom-node fsck", limit_s=60),
        Check(what="audit trail", look=partial(audit_trail, config), remedy="see the message", limit_s=60),
        Check(what="retention", look=partial(retention, config), remedy="dicom-node retention --dry-run"),
        Check(what="sandbox", look=partial(_sandbox, config), remedy="try it again: the machine is busy", limit_s=30),
    ]
    together = [
        *(
            Check(what=f"certificate {name}", look=partial(_certificate, name, path), remedy="renew it")
            for name, path in _certificates(config.model_dump())
        ),
        *(
            Check(
                what=f"destination {name}",
                look=partial(_destination, config, name),
                remedy=f"see that it listens there, and lets {config.destination(name).calling_ae_title} in from here",
                limit_s=4 * _PEER_S,
            )
            for name in config.destinations
        ),
        *(
            Check(
                what=f"audit collector {name}",
                look=partial(collector_of, config, name),
                remedy="see that it listens there, and that certificates and ca fit; the node keeps everything for it",
                limit_s=4 * _PEER_S,
            )
            for name in (config.audit.collectors if config.audit is not None else ())
        ),
        *(
            Check(
                what=f"engine {name}",
                look=partial(_engine, config, name),
                remedy=f"dicom-node engines check {name}; its jobs wait until it can run",
                limit_s=60,
            )
            for name in config.engines
        ),
    ]
    return alone, together


def _ok(what: str, text: str) -> Finding:
    return Finding(what=what, state=State.OK, text=text)


def _note(what: str, text: str, remedy: str = "") -> Finding:
    return Finding(what=what, state=State.NOTE, text=text, remedy=remedy)


def _wrong(what: str, text: str, remedy: str) -> Finding:
    return Finding(what=what, state=State.WRONG, text=text, remedy=remedy)


# --- settings --------------------------------------------------------------------------------------------------------


def _configuration(config: NodeConfig) -> Iterator[Finding]:
    reach = "this machine only" if is_loopback(config.host) else f"{len(config.peers) or 'any'} peers"
    names = f"{len(config.destinations)} destinations, {len(config.engines)} engines"
    yield _ok("configuration", f"AE {'/'.join(config.ae_titles)}, reachable by {reach}; {names}")
    yield from _access(config)
    yield from http_settings(config)


def _access(config: NodeConfig) -> Iterator[Finding]:
    """Whether peers, users and the issuer's keys can be used; those that cannot raise ConfigError."""
    from dicom_node.dimse.identification import check_users
    from dicom_node.dimse.policy import Policies

    Policies(config)
    users = check_users(config.user_identity)
    if config.user_identity is None:
        return
    kinds = ", ".join(config.user_identity.kinds)
    known = "" if users is None else f", {users} in {config.user_identity.users_file}"
    yield _ok("users", f"{config.user_identity.mode}, by {kinds}{known}")
    if config.user_identity.allow_plain and not is_loopback(config.host):
        remedy = "use TLS, then set user_identity.allow_plain: false"
        yield _note("users", "passcodes and tokens are taken without TLS, from other machines too", remedy)


def _rules(config: NodeConfig) -> Iterator[Finding]:
    from dicom_node.deciding import node_rules, sender_warnings

    rules = node_rules(config)
    yield _ok("rules", f"{len(rules.rules)} in {config.resolved_rules_dir()}")
    for warning in sender_warnings(config, rules):
        yield _note("rules", warning)


# --- the machine -----------------------------------------------------------------------------------------------------


def _data_folder(config: NodeConfig) -> Iterator[Finding]:
    folder = config.data_dir
    if not folder.is_dir():
        above = next(parent for parent in folder.absolute().parents if parent.is_dir())
        if os.access(above, os.W_OK | os.X_OK):
            yield _ok("data folder", f"{folder} is made at the first start")
        else:
            yield _wrong("data folder", f"{above} cannot be written", f"make {folder} and give it to this user")
        return
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield _wrong("data folder", f"{folder} cannot be used by this user", "run this as the node's user")
    elif folder.stat().st_mode & 0o077:
        yield _wrong("data folder", f"{folder} can be read by others", f"chmod 700 {folder}")
    else:
        yield _ok("data folder", f"{folder}, for its owner only")


def _disk(config: NodeConfig) -> Iterator[Finding]:
    if not config.data_dir.is_dir():
        return
    for volume in volumes(config.data_dir, config.storage):
        yield from _space(volume)
    yield from _file_system(config.data_dir)
    yield _sync_speed(config.data_dir)
    yield _direct(config)


def _space(volume: Volume) -> Iterator[Finding]:
    space = os.statvfs(volume.path)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    reserve, pressed = volume.reserve(total), pressed_by(volume, space)
    text = f"{volume.path}: {free >> 20} MiB free, {reserve >> 20} MiB of it kept in reserve"
    if space.f_flag & os.ST_RDONLY:
        remedy = "see the kernel's log for why, mend the disk, mount it for writing; the node goes on by itself"
        yield _wrong("disk space", f"{volume.path} is read-only: C-STORE is refused", remedy)
    elif pressed.grade >= Grade.REFUSING:
        yield _wrong("disk space", f"{text}: C-STORE is refused", "make room, or use a larger volume")
    elif pressed.grade is Grade.PAUSED:
        text += f", below {volume.pause_at:g} times that routine and background jobs wait"
        yield _wrong("disk space", text, "make room, or use a larger volume")
    elif free - reserve < 20 * reserve // 10:
        yield _note("disk space", text, "make room soon")
    else:
        yield _ok("disk space", text)
    if space.f_files and space.f_favail < space.f_files // 50:
        yield _wrong("disk space", f"{space.f_favail} inodes left", "make a file system with more of them")


def _file_system(folder: Path) -> Iterator[Finding]:
    kind = _kind_of(folder)
    if kind in _NETWORK:
        remedy = "use a local disk for data_dir: SQLite and its locks are not safe over a network"
        yield _wrong("file system", f"the data folder is on {kind}", remedy)
    elif kind in _FORGETFUL:
        yield _note("file system", f"the data folder is on {kind}: all of it is gone with the power", "use a disk")
    else:
        yield _ok("file system", kind or "unknown")


def _kind_of(folder: Path) -> str:
    """By the longest mount point above it; '' where the system does not say."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    here = f"{folder.resolve()}/"
    for mount in mounts:
        fields = mount.split(" ")
        point = fields[4].rstrip("/") + "/"
        if here.startswith(point) and len(point) >= len(best):
            best, kind = point, fields[fields.index("-") + 1]
    return kind


def _sync_speed(folder: Path) -> Finding:
    path = folder / f".doctor-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    took = []
    try:
        for _ in range(_SYNCS):
            os.write(fd, bytes(_BLOCK))
            began = time.perf_counter()
            os.fsync(fd)
            took.append(time.perf_counter() - began)
    finally:
        os.close(fd)
        path.unlink()
    median = statistics.median(took)
    text = f"one sync takes {median * 1000:.2g} ms"
    if median > SLOW_SYNC_S:
        remedy = "each acknowledgement waits for one: use an SSD, or a controller with a protected write cache"
        return _wrong("disk speed", text, remedy)
    return _ok("disk speed", text)


def _direct(config: NodeConfig) -> Finding:
    """Whether the intake journal can be used, as it uses the disk."""
    what = "intake journal"
    if not config.storage.journal_bytes:
        return _note(what, "switched off: each object is synced by itself", "set storage.journal_bytes")
    path = config.data_dir / f".doctor-direct-{os.getpid()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            with mmap.mmap(-1, _BLOCK) as block:  # page-aligned, as O_DIRECT wants it
                os.pwrite(fd, block, 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        text = f"cannot be used here ({exc.strerror}): each object is synced by itself, as safe and slower"
        return _note(what, text, "use ext4 or XFS for data_dir")
    finally:
        path.unlink(missing_ok=True)
    return _ok(what, f"{config.storage.journal_bytes >> 20} MiB for each receiver, past the system's cache")


def _clock() -> Iterator[Finding]:
    buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: only asks
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        answer = -1
    now = SystemClock().wall()
    if answer == _TIME_ERROR:
        remedy = "set up chrony or systemd-timesyncd: times in results and in the audit come from this clock"
        yield _note("clock", f"{now:%Y-%m-%d %H:%M:%S}Z, not synchronised as far as the kernel knows", remedy)
    else:
        said = "synchronised" if answer >= 0 else "the kernel does not say whether it is synchronised"
        yield _ok("clock", f"{now:%Y-%m-%d %H:%M:%S}Z, {said}")


# --- the running node ------------------------------------------------------------------------------------------------


def _ports(config: NodeConfig) -> Iterator[Finding]:
    clock = SystemClock()
    supervisor = read_pulse(config.data_dir, "supervisor")
    if supervisor is None or not lives(supervisor, clock):
        yield _note("node", "does not run", "dicom-node serve")
        wanted = [("dicom_port", config.host, config.dicom_port), ("http_port", config.http_host, config.http_port)]
        if config.tls is not None and config.tls.port is not None:
            wanted.append(("tls.port", config.host, config.tls.port))
        if config.metrics_port is not None:
            wanted.append(("metrics_port", config.monitoring_host(), config.metrics_port))
        for key, host, port in wanted:
            yield _free(key, host, port)
        return
    yield _ok("node", f"runs since {supervisor.started_at[:19]}Z, process {supervisor.pid}")
    facts: Mapping[str, Any] = supervisor.facts
    taking = {"dicom_port": facts.get("dicom_port", config.dicom_port), "tls.port": facts.get("tls_port")}
    for key, bound in taking.items():
        if bound:
            yield _taking(key, config.host, int(bound))
    yield from ready(config, facts)


def _taking(key: str, host: str, port: int) -> Finding:
    try:
        with socket.create_connection((reachable(host), port), timeout=_PEER_S):
            return _ok(key, f"{host}:{port} takes connections")
    except OSError as exc:
        return _wrong(
            key, f"{host}:{port} takes no connection: {exc.strerror or type(exc).__name__}", "see the node's log"
        )


def _free(key: str, host: str, port: int) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            remedy = f"give the node CAP_NET_BIND_SERVICE as the shipped systemd unit can, or set {key} above 1023"
            return _wrong(key, f"{host}:{port} is not for this user", remedy)
        except OSError as exc:
            return _wrong(key, f"{host}:{port}: {exc.strerror}", f"stop what uses it (ss -ltnp), or set another {key}")
    return _ok(key, f"{host}:{port} is free")


# --- the catalog -----------------------------------------------------------------------------------------------------


def _catalog(config: NodeConfig) -> Iterator[Finding]:
    from dicom_node.store.catalog import catalog_is_current
    from dicom_node.wiring import node_catalog

    if not (config.data_dir / "catalog.db").is_file():
        yield _ok("catalog", "there is none yet")
        return
    if not catalog_is_current(config.data_dir):
        text = "was written by an earlier version"
        yield _note("catalog", text, "the node brings it forward when it starts, and keeps a copy")
        return
    catalog = node_catalog(config, SystemClock())
    try:
        last = catalog.database.rows("SELECT received_at FROM instance ORDER BY rowid DESC LIMIT 1")
        yield from _times(last[0][0] if last else "")
        snapshot = catalog.queue.snapshot()
        yield from _ledger(snapshot)
        yield from _heard(config, catalog.database.rows(
            "SELECT calling_ae_title, max(opened_at) FROM association GROUP BY calling_ae_title"
        ))  # fmt: skip
    finally:
        catalog.close()


def _times(received_at: str) -> Iterator[Finding]:
    from dicom_node.store.rows import utc

    if received_at and utc(received_at) > SystemClock().wall() + CLOCK_SLACK:
        text = f"the last object came at {received_at[:19]}Z, which the clock says is yet to come"
        yield _wrong("clock", text, "set the clock right; then the order of things received is right again")


def _ledger(snapshot: Mapping[str, Any]) -> Iterator[Finding]:
    series, studies = snapshot["ledger"], snapshot["ledger_studies"]
    yield _ok("catalog", f"{snapshot['studies']['total']} studies, {snapshot['instances']} instances")
    if series["imbalance"] or studies["imbalance"]:
        text = f"{series['imbalance']} series and {studies['imbalance']} studies are not accounted for"
        yield _wrong("ledger", text, "dicom-node ledger names them; keep the log, run dicom-node fsck")
    else:
        yield _ok("ledger", f"{series['received']} series received, all accounted for")
    for kind, verb in (("jobs", "jobs retry"), ("deliveries", "deliveries retry")):
        if count := snapshot["dead_letters"][kind]:
            yield _wrong("dead letters", f"{count} {kind} were given up", f"dicom-node status, dicom-node {verb} ID")


def _heard(config: NodeConfig, heard: list[tuple[Any, ...]]) -> Iterator[Finding]:
    """Peers call the node, so all that can be said of one is when it last did."""
    at = {str(title): str(opened_at) for title, opened_at in heard}
    for name, peer in config.peers.items():
        if last := at.get(peer.ae_title):
            yield _ok(f"peer {name}", f"{peer.ae_title} was here at {last[:19]}Z")
        else:
            text = f"{peer.ae_title} was not here in the last day, as far as is known"
            yield _note(f"peer {name}", text, "have it send a C-ECHO")


# --- models ----------------------------------------------------------------------------------------------------------

_CONFINE = (
    "import sys; from pathlib import Path; from dicom_node.models.sandbox import confine; "
    "print(confine('cpu', Path(sys.argv[1])).lacking)"
)


def _sandbox(config: NodeConfig) -> Iterator[Finding]:
    from dicom_node.models.runtime import child_environment
    from dicom_node.wiring import models_dir

    command = [sys.executable, "-c", _CONFINE, str(models_dir(config).absolute())]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False, env=child_environment())
    lacking = ran.stdout.strip()
    if ran.returncode:
        yield _wrong("sandbox", "a confined process cannot be started", "see the system's log (seccomp, Landlock)")
    elif lacking:
        remedy = "run the node on Linux 5.13 or later with Landlock and seccomp"
        yield _note("sandbox", f"this kernel lacks {lacking}: model packages that are graphs are refused", remedy)
    else:
        yield _ok("sandbox", "models run without network, files and processes of their own")
    installed = [path for path in models_dir(config).glob("*/*") if path.is_dir()]
    yield _ok("models", f"{len(installed)} versions installed in {models_dir(config)}, beside the embedded ones")


def _engine(config: NodeConfig, name: str) -> Iterator[Finding]:
    from dicom_node.wiring import engines, kept_in, put_away

    engine: Engine = engines(config, name)[name]
    try:
        with kept_in(name, "check"):
            engine.check()
    finally:
        put_away(name, engine)
    yield _ok(f"engine {name}", f"{config.engines[name].kind}, can run")


# --- others ----------------------------------------------------------------------------------------------------------


def _destination(config: NodeConfig, name: str) -> Iterator[Finding]:
    from dicom_node.dimse.session import DimseSender
    from dicom_node.dimse.wires import open_link

    patience = {"connect_timeout_s": min(config.delivery.connect_timeout_s, _PEER_S),
                "response_timeout_s": min(config.delivery.response_timeout_s, 2 * _PEER_S)}  # fmt: skip
    sender = DimseSender(config.delivery.model_copy(update=patience), config.ae_titles[0], open_link(config.wire))
    destination = config.destination(name)
    where = f"{destination.ae_title} at {destination.host}:{destination.port}"
    began = time.perf_counter()
    status = sender.echo(destination)
    took = (time.perf_counter() - began) * 1000
    if status:
        yield _wrong(f"destination {name}", f"{where} answers C-ECHO with 0x{status:04X}", "see its log")
    else:
        yield _ok(f"destination {name}", f"{where} answers C-ECHO in {took:.0f} ms")


def _certificates(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Path]]:
    """Every certificate file in the settings, by its key, whatever it is for."""
    for key, value in settings.items():
        where = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _certificates(value, f"{where}.")
        elif key in ("certificate", "ca") and isinstance(value, Path | str) and str(value):
            yield where, Path(value)


def _certificate(name: str, path: Path) -> Iterator[Finding]:
    what = f"certificate {name}"
    if not path.is_file():
        raise NotFound(f"{path}: there is no such file")
    try:
        decoded: Mapping[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
        ends = ssl.cert_time_to_seconds(decoded["notAfter"])
    except (ssl.SSLError, KeyError, ValueError) as exc:
        raise NodeError(f"{path} is no certificate (PEM)") from exc
    days = (ends - time.time()) / 86400
    if days < 0:
        yield _wrong(what, f"{path} ended {-days:.0f} days ago", "renew it: nobody who checks it connects")
    elif days < CERTIFICATE_DAYS:
        yield _wrong(what, f"{path} ends in {days:.0f} days", "renew it; the node takes a new file in")
    else:
        yield _ok(what, f"{path} holds for {days:.0f} days")
