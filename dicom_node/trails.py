"""The audit trail of a configuration: who records, who forwards, who looks after it. Part of the composition root."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dicom_node.auditing import AlertType, AuditEvent, AuditKind, AuditTrail, NoAuditTrail, Participant, Role
from dicom_node.clock import SystemClock
from dicom_node.config import AuditSettings, NodeConfig
from dicom_node.interfaces import Clock

if TYPE_CHECKING:
    from dicom_node.audit.forward import Forwarder
    from dicom_node.audit.syslog import Connection
    from dicom_node.audit.trail import TrailObserver
    from dicom_node.metrics import Reading

__all__ = [
    "ClosableTrail",
    "Forwarding",
    "acted",
    "anchor_path",
    "changed_settings",
    "close_trail",
    "collector",
    "command_trail",
    "configuration_event",
    "life_event",
    "node_trail",
    "person",
    "trail_folder",
]

log = logging.getLogger(__name__)

SETTINGS_SEEN = "audit_settings.json"
_NO_LOGIN = 2**32 - 1


class ClosableTrail(AuditTrail, Protocol):
    """What a process holds."""

    def close(self) -> bool:
        """Write what waits; False: something was lost. Idempotent."""
        ...


class _Nothing(NoAuditTrail):
    def close(self) -> bool:
        """Nothing is open."""
        return True


def trail_folder(config: NodeConfig) -> Path:
    """Where its files are."""
    folder = config.audit.folder if config.audit is not None else None
    return folder if folder is not None else config.data_dir / "audit"


def anchor_path(config: NodeConfig) -> Path:
    """Where its head is kept, apart from them."""
    return config.data_dir / "audit_head.json"


def node_trail(
    config: NodeConfig,
    process: str,
    clock: Clock,
    observe: TrailObserver | None = None,
    patient_ids: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> ClosableTrail:
    """The trail as this process writes it; one that keeps nothing where none is configured.

    `patient_ids` finds the patients of studies where whoever tells of these does not know them.
    """
    if config.audit is None:
        return _Nothing()
    from dicom_node.audit.message import Identity
    from dicom_node.audit.trail import FileTrail

    identity = Identity(
        source_id=config.audit.source_id or config.ae_titles[0],
        site_id=config.audit.site_id,
        ae_titles=config.ae_titles,
        host=socket.gethostname(),
        process=f"dicom-node {process} {os.getpid()}",
    )
    return FileTrail(
        trail_folder(config),
        identity,
        clock,
        file_bytes=config.audit.file_bytes,
        max_message_bytes=config.audit.max_message_bytes,
        observe=observe,
        patient_ids=patient_ids,
    )


@contextmanager
def command_trail(
    config: NodeConfig, patient_ids: Callable[[Sequence[str]], Sequence[str]] | None = None
) -> Iterator[AuditTrail]:
    """The trail for a command; what it recorded is written at the end. Only where a node has been."""
    if config.audit is None or not config.data_dir.is_dir():
        yield NoAuditTrail()
        return
    trail = node_trail(config, "command", SystemClock(), patient_ids=patient_ids)
    try:
        yield trail
    finally:
        close_trail(config, trail)


def close_trail(config: NodeConfig, trail: ClosableTrail) -> None:
    """Write what waits, and keep the head where nobody of the node may do it later. Raises nothing."""
    is_synced = trail.close()
    head = getattr(trail, "head", None)
    if head is None or not is_synced:  # after a power cut its lines would seem to have been taken away
        return
    from dicom_node.audit.verify import write_anchor

    try:
        write_anchor(anchor_path(config), head)
    except OSError as exc:
        log.warning("the head of the audit trail could not be kept", extra={"error": exc.strerror})


def person() -> Participant:
    """Whoever runs this command: who logged in, where the system keeps that over `sudo`, else the system's user.

    Never what the environment says, which anybody can set.
    """
    number = os.getuid()
    with suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
        number = number if login == _NO_LOGIN else login
    name = f"uid {number}"
    with suppress(KeyError):  # a user id without a name
        name = pwd.getpwuid(number).pw_name
    return Participant(user=name, host=socket.gethostname(), is_requestor=True)


def acted(study_instance_uid: str, what: str) -> AuditEvent:
    """A person changed what becomes of a study; `what` in constant words and numbers."""
    studies = (study_instance_uid,) if study_instance_uid else ()
    return AuditEvent(
        kind=AuditKind.ACCESSED, participants=(person(),), study_instance_uids=studies, action="U", detail=what
    )


# --- settings that changed


def changed_settings(config: NodeConfig) -> list[str]:
    """The keys of the configuration that differ from the last start; those of now are kept for the next.

    Only digests of values are kept. Raises nothing: what cannot be kept is told as changed the next time.
    """
    now = dict(_digests(config.model_dump(mode="json", exclude={"data_dir"}), ""))
    path = config.data_dir / SETTINGS_SEEN
    try:
        before = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        before = None
    if before == now:
        return []
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now), encoding="ascii")
        temporary.chmod(0o600)
        temporary.replace(path)
    except OSError as exc:
        log.warning("the settings of this start could not be kept", extra={"error": exc.strerror})
    if not isinstance(before, dict):
        return ["(first start with an audit trail)"]
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _digests(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _digests(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def configuration_event(what: str, *, alert_type: AlertType = AlertType.SOFTWARE_CONFIGURATION) -> AuditEvent:
    """The node works with other settings, rules or certificates than before; `what` in constant words and names."""
    return AuditEvent(kind=AuditKind.CONFIGURATION_CHANGED, detail=what, alert_type=alert_type)


def life_event(kind: AuditKind) -> AuditEvent:
    """The node has started or stopped."""
    launcher = Participant(user=person().user, is_requestor=True, role=Role.APPLICATION_LAUNCHER)
    return AuditEvent(kind=kind, participants=(launcher,))


# --- collectors


def collector(config: NodeConfig, settings: AuditSettings, name: str) -> Callable[[], Connection]:
    """What connects to the collector of that name; it may raise ConfigError, OSError."""
    from dicom_node.audit.syslog import TlsConnection, UdpConnection

    one = settings.collectors[name]
    if one.protocol == "udp":
        return lambda: UdpConnection(one.host, one.effective_port())
    from dicom_node.dimse.tls import client_context

    asked = config.client_tls(one.tls)
    assert asked is not None

    def connect() -> Connection:
        context = client_context(asked, f"audit.collectors.{name}.tls")
        return TlsConnection(one.host, one.effective_port(), context, asked.server_name or one.host)

    return connect


class Forwarding:
    """What the service process does for the trail: one thread for each collector, and one that verifies."""

    def __init__(self, config: NodeConfig, observe: TrailObserver) -> None:
        self._forwarders: dict[str, Forwarder] = {}
        self._watch = None
        if config.audit is None:
            return
        from dicom_node.audit.forward import Forwarder
        from dicom_node.audit.watch import TrailWatch

        folder = trail_folder(config)
        self._watch = TrailWatch(folder, anchor_path(config))
        self._forwarders = {
            name: Forwarder(name, folder, collector(config, config.audit, name), observe=observe)
            for name in config.audit.collectors
        }
        self._watch.start()
        for one in self._forwarders.values():
            one.start()

    def readings(self) -> Iterator[Reading]:
        """For `/metrics`."""
        if self._watch is None:
            return
        yield "audit_trail_whole", (), float(self._watch.is_whole)
        for name, one in self._forwarders.items():
            yield "audit_collector_up", (name,), float(one.is_up)
            yield "audit_backlog_messages", (name,), float(max(self._watch.sequence - one.sequence, 0))

    def stop(self) -> None:
        """What is not sent goes out after the next start. Idempotent."""
        for one in self._forwarders.values():
            one.stop()
        if self._watch is not None:
            self._watch.stop()
