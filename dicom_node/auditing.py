"""What the audit trail is told (PS3.15 A.5.3, IHE ATNA), and by whom: values and one call, no wire and no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol

__all__ = ["AlertType", "AuditEvent", "AuditKind", "AuditOutcome", "AuditTrail", "NoAuditTrail", "Participant", "Role"]


class AuditKind(StrEnum):
    """What happened: the messages of PS3.15 A.5.3."""

    APPLICATION_STARTED = "application-started"  # A.5.3.1 Application Activity
    APPLICATION_STOPPED = "application-stopped"
    AUDIT_LOG_USED = "audit-log-used"  # A.5.3.2
    TRANSFER_BEGUN = "transfer-begun"  # A.5.3.3 Begin Transferring DICOM Instances
    TRANSFERRED = "transferred"  # A.5.3.7 DICOM Instances Transferred
    ACCESSED = "accessed"  # A.5.3.6 DICOM Instances Accessed: by an engine, a person, a change of place
    STUDY_DELETED = "study-deleted"  # A.5.3.8 DICOM Study Deleted
    EXPORTED = "exported"  # A.5.3.4 Data Export: files of a person, an HTTP engine
    IMPORTED = "imported"  # A.5.3.5 Data Import
    QUERY = "query"  # A.5.3.10
    SECURITY_ALERT = "security-alert"  # A.5.3.11: a peer refused, a certificate or configuration that changed
    CONFIGURATION_CHANGED = "configuration-changed"  # A.5.3.11, Software Configuration or Security Configuration
    USER_AUTHENTICATED = "user-authenticated"  # A.5.3.12


class AuditOutcome(IntEnum):
    """Event Outcome Indicator (PS3.15 A.5.2)."""

    SUCCESS = 0
    MINOR_FAILURE = 4
    SERIOUS_FAILURE = 8
    MAJOR_FAILURE = 12


class AlertType(StrEnum):
    """What a security alert is about (PS3.16 CID 403): codes of the DICOM Controlled Terminology."""

    NODE_AUTHENTICATION = "110126"
    NETWORK_CONFIGURATION = "110128"
    SECURITY_CONFIGURATION = "110129"
    SOFTWARE_CONFIGURATION = "110131"
    USE_OF_RESTRICTED_FUNCTION = "110132"


class Role(StrEnum):
    """What a participant did (PS3.16 CID 402)."""

    APPLICATION = "110150"
    APPLICATION_LAUNCHER = "110151"
    DESTINATION = "110152"
    SOURCE = "110153"
    DESTINATION_MEDIA = "110154"


@dataclass(frozen=True, slots=True)
class Participant:
    """One who took part. `host` is an address or a name, never "host:port"; `user` an authenticated name.

    Without a `role`, whoever asked for a transfer or a query is its source and the other its destination.
    """

    ae_title: str = ""
    host: str = ""
    user: str = ""
    is_requestor: bool = False
    is_this_node: bool = False
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One thing that happened, told when it is known how it ended. The trail sets date, time and this node's identity.

    `patient_ids` may be told here and nowhere else: an audit trail is protected as the archive is.
    """

    kind: AuditKind
    outcome: AuditOutcome = AuditOutcome.SUCCESS
    participants: tuple[Participant, ...] = ()
    study_instance_uids: tuple[str, ...] = ()
    patient_ids: tuple[str, ...] = ()
    instances: Mapping[str, int] = field(default_factory=dict)
    """SOP Class UID to how many objects."""
    detail: str = ""
    """Why, or what exactly, in a few words: a rule, a refusal. No patient data."""
    query: bytes = b""
    """The identifier of a query as it came (A.5.3.10: base64 in the message)."""
    sop_class_uid: str = ""
    """Of the query."""
    transfer_syntax_uid: str = ""
    """Of the query."""
    action: str = ""
    """C, R, U, D or E (A.5.2) where the kind leaves a choice; '' = what it usually is."""
    alert_type: AlertType | None = None
    """Of a security alert or a changed configuration; None = what it usually is."""


class AuditTrail(Protocol):
    """Takes events from any thread. Never raises and never waits for another machine."""

    def record(self, event: AuditEvent) -> None:
        """Keep it. Where it cannot be kept, that is counted and logged, and the node goes on."""
        ...

    def settled(self, timeout_s: float = 5.0) -> bool:
        """Wait until what this process recorded is durable; False: not in that time, or something of it was lost.

        For what must not be done, or forgotten, before it is told.
        """
        ...


class NoAuditTrail:
    """Nobody asked for one (`AuditTrail`)."""

    def record(self, event: AuditEvent) -> None:
        """Nothing is kept."""

    def settled(self, timeout_s: float = 5.0) -> bool:
        """There is nothing to wait for."""
        return True
