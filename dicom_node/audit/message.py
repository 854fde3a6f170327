"""One audit message as XML (PS3.15 A.5.1 to A.5.3), on one line, well-formed whatever a peer put into it.

Every value is an attribute or a text of a tree and escaped when that is written, after characters that XML 1.0 cannot
hold, or that would break a line, were replaced. A message that would be longer than its bound is made anew with less in
it and says so: it is never cut.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from xml.etree.ElementTree import Element, SubElement

from dicom_node.auditing import AlertType, AuditEvent, AuditKind, Participant, Role

__all__ = ["Identity", "audit_message"]

MAX_TEXT = 1024  # characters of one value that a person or a peer chose

# A.5.3: EventID, its meaning, the usual EventActionCode, EventTypeCode
_KINDS: Mapping[AuditKind, tuple[str, str, str, str]] = {
    AuditKind.APPLICATION_STARTED: ("110100", "Application Activity", "E", "110120"),
    AuditKind.APPLICATION_STOPPED: ("110100", "Application Activity", "E", "110121"),
    AuditKind.AUDIT_LOG_USED: ("110101", "Audit Log Used", "R", ""),
    AuditKind.TRANSFER_BEGUN: ("110102", "Begin Transferring DICOM Instances", "E", ""),
    AuditKind.ACCESSED: ("110103", "DICOM Instances Accessed", "R", ""),
    AuditKind.TRANSFERRED: ("110104", "DICOM Instances Transferred", "R", ""),
    AuditKind.STUDY_DELETED: ("110105", "DICOM Study Deleted", "D", ""),
    AuditKind.EXPORTED: ("110106", "Export", "R", ""),
    AuditKind.IMPORTED: ("110107", "Import", "C", ""),
    AuditKind.QUERY: ("110112", "Query", "E", ""),
    AuditKind.SECURITY_ALERT: ("110113", "Security Alert", "E", AlertType.NODE_AUTHENTICATION.value),
    AuditKind.CONFIGURATION_CHANGED: ("110113", "Security Alert", "E", AlertType.SOFTWARE_CONFIGURATION.value),
    AuditKind.USER_AUTHENTICATED: ("110114", "User Authentication", "E", "110122"),
}
# PS3.16 CID 401 to 403
_MEANINGS: Mapping[str, str] = {
    "110120": "Application Start",
    "110121": "Application Stop",
    "110122": "Login",
    AlertType.NODE_AUTHENTICATION: "Node Authentication",
    AlertType.NETWORK_CONFIGURATION: "Network Configuration",
    AlertType.SECURITY_CONFIGURATION: "Security Configuration",
    AlertType.SOFTWARE_CONFIGURATION: "Software Configuration",
    AlertType.USE_OF_RESTRICTED_FUNCTION: "Use of Restricted Function",
    Role.APPLICATION: "Application",
    Role.APPLICATION_LAUNCHER: "Application Launcher",
    Role.DESTINATION: "Destination Role ID",
    Role.SOURCE: "Source Role ID",
    Role.DESTINATION_MEDIA: "Destination Media",
}
_MOVES = frozenset(
    {
        *(AuditKind.TRANSFER_BEGUN, AuditKind.TRANSFERRED, AuditKind.QUERY),
        *(AuditKind.EXPORTED, AuditKind.IMPORTED),
    }
)
_LIVES = frozenset({AuditKind.APPLICATION_STARTED, AuditKind.APPLICATION_STOPPED})
_ALERTS = frozenset({AuditKind.SECURITY_ALERT, AuditKind.CONFIGURATION_CHANGED})
# what XML 1.0 2.2 excludes, and what a terminal, a log or a line-based reader would act on
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_MARKUP = re.compile('[&<>"]')
_APPLICATION_SERVER = "4"  # AuditSourceTypeCode (A.5.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who tells: `source_id` and `site_id` of AuditSourceIdentification, the node's AE titles, its process."""

    source_id: str
    site_id: str = ""
    ae_titles: tuple[str, ...] = ()
    host: str = ""
    process: str = ""


def audit_message(event: AuditEvent, at: datetime, identity: Identity, *, max_bytes: int) -> bytes:
    """The message in UTF-8, without line ends, of at most `max_bytes`.

    What makes it too long is left out, in this order, and told in the EventOutcomeDescription: the query, all but the
    first eight studies, the counts by SOP class.
    """
    text = _encoded(event, at, identity)
    for less in (_without_query, _with_few_studies, _without_counts):
        if len(text) <= max_bytes:
            return text
        event = less(event)
        text = _encoded(event, at, identity)
    return text


def _noting(event: AuditEvent, note: str) -> str:
    return f"{event.detail}; {note}" if event.detail else note


def _without_query(event: AuditEvent) -> AuditEvent:
    if not event.query:
        return event
    note = f"query of {len(event.query)} bytes left out, SHA-256 {hashlib.sha256(event.query).hexdigest()}"
    return replace(event, query=b"", detail=_noting(event, note))


def _with_few_studies(event: AuditEvent) -> AuditEvent:
    more = len(event.study_instance_uids) - 8
    if more <= 0 and len(event.patient_ids) <= 8:
        return event
    note = f"{max(more, 0)} more studies left out"
    studies, patients = event.study_instance_uids[:8], event.patient_ids[:8]
    return replace(event, study_instance_uids=studies, patient_ids=patients, detail=_noting(event, note))


def _without_counts(event: AuditEvent) -> AuditEvent:
    note = f"{sum(event.instances.values())} objects of {len(event.instances)} SOP classes"
    return replace(event, instances={}, participants=event.participants[:4], detail=_noting(event, note))


def _encoded(event: AuditEvent, at: datetime, identity: Identity) -> bytes:
    root = Element("AuditMessage")
    _put_event(root, event, at)
    for participant in _everybody(event, identity):
        _put_participant(root, event.kind, participant, identity)
    source = SubElement(root, "AuditSourceIdentification", {"AuditSourceID": _fit(identity.source_id)})
    if identity.site_id:
        source.set("AuditEnterpriseSiteID", _fit(identity.site_id))
    SubElement(source, "AuditSourceTypeCode", {"csd-code": _APPLICATION_SERVER})
    _put_objects(root, event, identity)
    pieces: list[str] = []
    _serialise(root, pieces)
    return "".join(pieces).encode()


def _serialise(element: Element, pieces: list[str]) -> None:
    """As `xml.etree.ElementTree.tostring`, in a third of the time: there are no namespaces, comments or tails here."""
    pieces.append(f"<{element.tag}")
    pieces.extend([f' {name}="{_escaped(value)}"' for name, value in element.items()])
    if not element.text and not len(element):
        pieces.append(" />")
        return
    pieces.append(">")
    if element.text:
        pieces.append(_escaped(element.text))
    for child in element:
        _serialise(child, pieces)
    pieces.append(f"</{element.tag}>")


def _escaped(text: str) -> str:
    if _MARKUP.search(text) is None:
        return text
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _fit(text: str, most: int = MAX_TEXT) -> str:
    """As XML may hold it on one line: what cannot stand there is shown as its code point."""
    if len(text) <= most and _UNFIT.search(text) is None:
        return text
    return _UNFIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text[:most])


def _code(parent: Element, name: str, code: str, meaning: str, system: str = "DCM") -> None:
    SubElement(parent, name, {"csd-code": code, "codeSystemName": system, "originalText": meaning})


def _put_event(root: Element, event: AuditEvent, at: datetime) -> None:
    code, meaning, action, type_code = _KINDS[event.kind]
    made = SubElement(
        root,
        "EventIdentification",
        {
            "EventActionCode": event.action if event.action in ("C", "R", "U", "D", "E") else action,
            "EventDateTime": at.astimezone(UTC).isoformat(timespec="milliseconds"),
            "EventOutcomeIndicator": str(int(event.outcome)),
        },
    )
    _code(made, "EventID", code, meaning)
    if event.kind in _ALERTS and event.alert_type is not None:
        type_code = event.alert_type.value
    if type_code:
        _code(made, "EventTypeCode", type_code, _MEANINGS[type_code])
    if event.detail:
        SubElement(made, "EventOutcomeDescription").text = _fit(event.detail, 4 * MAX_TEXT)


# --- who took part


def _everybody(event: AuditEvent, identity: Identity) -> tuple[Participant, ...]:
    """Those who were told, and this node where nobody said that it took part."""
    if any(one.is_this_node for one in event.participants):
        return event.participants
    alone = not any(one.is_requestor for one in event.participants)
    role = Role.APPLICATION if event.kind in _LIVES else None
    title = identity.ae_titles[0] if identity.ae_titles else ""
    here = Participant(ae_title=title, host=identity.host, is_this_node=True, is_requestor=alone, role=role)
    return (*event.participants, here)


def _put_participant(root: Element, kind: AuditKind, one: Participant, identity: Identity) -> None:
    user_id = one.user or one.ae_title or one.host or ("" if not one.is_this_node else identity.source_id) or "unknown"
    made = SubElement(
        root,
        "ActiveParticipant",
        {"UserID": _fit(user_id), "UserIsRequestor": "true" if one.is_requestor else "false"},
    )
    titles = identity.ae_titles if one.is_this_node else tuple(filter(None, (one.ae_title,)))
    if titles:  # A.5.2.2: AE titles stand in the alternative identity
        made.set("AlternativeUserID", _fit(f"AETITLES={';'.join(titles)}"))
    if one.is_this_node and identity.process:
        made.set("UserName", _fit(identity.process))
    elif one.user:
        made.set("UserName", _fit(one.user))
    host = one.host or (identity.host if one.is_this_node else "")
    if host:
        made.set("NetworkAccessPointID", _fit(host))
        made.set("NetworkAccessPointTypeCode", "2" if _is_address(host) else "1")
    role = one.role
    if role is None and kind in _MOVES:
        role = Role.SOURCE if one.is_requestor else Role.DESTINATION
    if role is not None:
        _code(made, "RoleIDCode", role.value, _MEANINGS[role])


@lru_cache(maxsize=1024)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


# --- what it was about


def _put_objects(root: Element, event: AuditEvent, identity: Identity) -> None:
    if event.kind is AuditKind.QUERY:
        _put_query(root, event)
    for number, uid in enumerate(event.study_instance_uids):
        # the counts are of one study (A.5.3.7); where there are several, of all together
        _put_study(root, uid, event.instances if number == 0 else {})
    if event.instances and not event.study_instance_uids:
        _put_study(root, "unknown", event.instances)
    for patient_id in event.patient_ids:
        made = _object(root, patient_id or "unknown", "1", "1")
        _code(made, "ParticipantObjectIDTypeCode", "2", "Patient Number", "RFC-3881")
        SubElement(made, "ParticipantObjectName").text = "unknown"  # names of persons are not told
    if event.kind is AuditKind.AUDIT_LOG_USED:
        made = _object(root, event.detail or "audit trail", "2", "13")
        _code(made, "ParticipantObjectIDTypeCode", "12", "URI", "RFC-3881")
        SubElement(made, "ParticipantObjectName").text = "Security Audit Log"
    elif event.kind in _ALERTS:
        subject = next((one for one in event.participants if not one.is_this_node), None)
        about = (subject.host or subject.ae_title or subject.user) if subject is not None else ""
        made = _object(root, about or identity.source_id, "2", "13")
        _code(made, "ParticipantObjectIDTypeCode", "110182", "Node ID")
        SubElement(made, "ParticipantObjectName").text = _fit(about or identity.source_id)
        _detail(made, "Alert Description", _fit(event.detail).encode())


def _object(root: Element, identity: str, type_code: str, role: str) -> Element:
    return SubElement(
        root,
        "ParticipantObjectIdentification",
        {
            "ParticipantObjectID": _fit(identity),
            "ParticipantObjectTypeCode": type_code,
            "ParticipantObjectTypeCodeRole": role,
        },
    )


def _put_study(root: Element, uid: str, instances: Mapping[str, int]) -> None:
    made = _object(root, uid, "2", "3")
    _code(made, "ParticipantObjectIDTypeCode", "110180", "Study Instance UID")
    SubElement(made, "ParticipantObjectName").text = "Study"
    if instances:
        described = SubElement(made, "ParticipantObjectDescription")
        for sop_class, count in sorted(instances.items()):
            SubElement(described, "SOPClass", {"UID": _fit(sop_class), "NumberOfInstances": str(count)})


def _put_query(root: Element, event: AuditEvent) -> None:
    made = _object(root, event.sop_class_uid or "unknown", "2", "3")
    _code(made, "ParticipantObjectIDTypeCode", "110181", "SOP Class UID")
    SubElement(made, "ParticipantObjectQuery").text = b64encode(event.query).decode()
    if event.transfer_syntax_uid:
        _detail(made, "TransferSyntax", event.transfer_syntax_uid.encode())


def _detail(parent: Element, kind: str, value: bytes) -> None:
    SubElement(parent, "ParticipantObjectDetail", {"type": kind, "value": b64encode(value).decode()})
