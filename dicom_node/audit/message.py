"""One audit message as XML (PS3.15 A.5.1 to A.5.3), on one line, well-formed whatever a peer put into it.

Every value that somebody chose goes through `_fit`: markup is escaped, and characters that XML 1.0 cannot hold, or that
would break a line, are replaced. No tree is built: that takes four times as long. A message that would be longer than
its bound is made anew with less in it and says so: it is never cut.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache

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
    pieces = ["<AuditMessage>", _event(event, at)]
    pieces += [_participant(one, role, identity) for one, role in _everybody(event, identity)]
    pieces += [_source(identity), *_objects(event, identity), "</AuditMessage>"]
    return "".join(pieces).encode()


def _fit(text: str, most: int = MAX_TEXT) -> str:
    """As XML may hold it on one line: what cannot stand there is shown as its code point, and markup is escaped."""
    if len(text) > most or _UNFIT.search(text) is not None:
        text = _UNFIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text[:most])
    if _MARKUP.search(text) is None:
        return text
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _code(name: str, code: str, meaning: str, system: str = "DCM") -> str:
    return f'<{name} csd-code="{code}" codeSystemName="{system}" originalText="{meaning}" />'


def _event(event: AuditEvent, at: datetime) -> str:
    _, _, action, type_code = _KINDS[event.kind]
    if event.action in ("C", "R", "U", "D", "E"):
        action = event.action
    if event.kind in _ALERTS and event.alert_type is not None:
        type_code = event.alert_type.value
    time = at.astimezone(UTC).isoformat(timespec="milliseconds")
    why = (
        f"<EventOutcomeDescription>{_fit(event.detail, 4 * MAX_TEXT)}</EventOutcomeDescription>" if event.detail else ""
    )
    return (
        f'<EventIdentification EventActionCode="{action}" EventDateTime="{time}" '
        f'EventOutcomeIndicator="{int(event.outcome)}">{_event_codes(event.kind, type_code)}{why}</EventIdentification>'
    )


@lru_cache(maxsize=256)
def _event_codes(kind: AuditKind, type_code: str) -> str:
    code, meaning, _, _ = _KINDS[kind]
    return _code("EventID", code, meaning) + (
        _code("EventTypeCode", type_code, _MEANINGS[type_code]) if type_code else ""
    )


@lru_cache(maxsize=16)
def _source(identity: Identity) -> str:
    site = f' AuditEnterpriseSiteID="{_fit(identity.site_id)}"' if identity.site_id else ""
    return (
        f'<AuditSourceIdentification AuditSourceID="{_fit(identity.source_id)}"{site}>'
        f'<AuditSourceTypeCode csd-code="{_APPLICATION_SERVER}" /></AuditSourceIdentification>'
    )


# --- who took part


def _everybody(event: AuditEvent, identity: Identity) -> Iterator[tuple[Participant, Role | None]]:
    """Those who were told, and this node where nobody said that it took part; at most one has asked for it (A.5.2).

    An AE and the person it came for are two participants (A.5.2.2), and it is the person who asked. In an alert nobody
    has but the node, which reports it (A.5.3.11).
    """
    everybody = event.participants
    if not any(one.is_this_node for one in everybody):
        alone = not any(one.is_requestor for one in everybody)
        role = Role.APPLICATION if event.kind in _LIVES else None
        title = identity.ae_titles[0] if identity.ae_titles else ""
        here = Participant(ae_title=title, host=identity.host, is_this_node=True, is_requestor=alone, role=role)
        everybody = (*everybody, here)
    for one in everybody:
        role = one.role
        if role is None and event.kind in _MOVES:
            role = Role.SOURCE if one.is_requestor else Role.DESTINATION
        if event.kind in _ALERTS:
            one = replace(one, is_requestor=one.is_this_node)
        if one.user and one.ae_title and not one.is_this_node:
            yield replace(one, user="", is_requestor=False), role
            one = replace(one, ae_title="")
        yield one, role


@lru_cache(maxsize=1024)
def _participant(one: Participant, role: Role | None, identity: Identity) -> str:
    """The same few take part again and again."""
    user_id = one.user or one.ae_title or one.host or ("" if not one.is_this_node else identity.source_id) or "unknown"
    made = [f'<ActiveParticipant UserID="{_fit(user_id)}" UserIsRequestor="{"true" if one.is_requestor else "false"}"']
    titles = identity.ae_titles if one.is_this_node else tuple(filter(None, (one.ae_title,)))
    if titles:  # A.5.2.2: AE titles stand in the alternative identity
        made.append(f' AlternativeUserID="{_fit("AETITLES=" + ";".join(titles))}"')
    name = identity.process if one.is_this_node and identity.process else one.user
    if name:
        made.append(f' UserName="{_fit(name)}"')
    host = one.host or (identity.host if one.is_this_node else "")
    if host:
        kind = "2" if _is_address(host) else "1"
        made.append(f' NetworkAccessPointID="{_fit(host)}" NetworkAccessPointTypeCode="{kind}"')
    if role is None:
        return "".join((*made, " />"))
    return "".join((*made, ">", _code("RoleIDCode", role.value, _MEANINGS[role]), "</ActiveParticipant>"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


# --- what it was about


def _objects(event: AuditEvent, identity: Identity) -> Iterator[str]:
    if event.kind is AuditKind.QUERY:
        yield _query(event)
    for number, uid in enumerate(event.study_instance_uids):
        # the counts are of one study (A.5.3.7); where there are several, of all together
        yield _study(uid, event.instances if number == 0 else {})
    if event.instances and not event.study_instance_uids:
        yield _study("unknown", event.instances)
    for patient_id in event.patient_ids:  # names of persons are not told
        yield _object(patient_id or "unknown", "1", "1", _PATIENT)
    if event.kind is AuditKind.AUDIT_LOG_USED:
        yield _object(event.detail or "audit trail", "2", "13", _LOG)
    elif event.kind in _ALERTS:
        subject = next((one for one in event.participants if not one.is_this_node), None)
        about = (subject.host or subject.ae_title or subject.user) if subject is not None else ""
        about = about or identity.source_id
        told = _detail("Alert Description", _fit(event.detail).encode())
        yield _object(about, "2", "13", _NODE, f"<ParticipantObjectName>{_fit(about)}</ParticipantObjectName>{told}")


def _object(uid: str, type_code: str, role: str, *inner: str) -> str:
    return (
        f'<ParticipantObjectIdentification ParticipantObjectID="{_fit(uid)}" ParticipantObjectTypeCode="{type_code}" '
        f'ParticipantObjectTypeCodeRole="{role}">{"".join(inner)}</ParticipantObjectIdentification>'
    )


def _study(uid: str, instances: Mapping[str, int]) -> str:
    if not instances:
        return _object(uid, "2", "3", _STUDY)
    counts = "".join(
        f'<SOPClass UID="{_fit(sop_class)}" NumberOfInstances="{count}" />'
        for sop_class, count in sorted(instances.items())
    )
    described = f"<ParticipantObjectDescription>{counts}</ParticipantObjectDescription>"
    return _object(uid, "2", "3", _STUDY, described)


def _query(event: AuditEvent) -> str:
    code = _code("ParticipantObjectIDTypeCode", "110181", "SOP Class UID")
    query = b64encode(event.query).decode()
    asked = f"<ParticipantObjectQuery>{query}</ParticipantObjectQuery>" if query else "<ParticipantObjectQuery />"
    syntax = _detail("TransferSyntax", event.transfer_syntax_uid.encode()) if event.transfer_syntax_uid else ""
    return _object(event.sop_class_uid or "unknown", "2", "3", code, asked, syntax)


def _detail(kind: str, value: bytes) -> str:
    return f'<ParticipantObjectDetail type="{kind}" value="{b64encode(value).decode()}" />'


_STUDY = _code("ParticipantObjectIDTypeCode", "110180", "Study Instance UID") + (
    "<ParticipantObjectName>Study</ParticipantObjectName>"
)
_PATIENT = _code("ParticipantObjectIDTypeCode", "2", "Patient Number", "RFC-3881") + (
    "<ParticipantObjectName>unknown</ParticipantObjectName>"
)
_LOG = _code("ParticipantObjectIDTypeCode", "12", "URI", "RFC-3881") + (
    "<ParticipantObjectName>Security Audit Log</ParticipantObjectName>"
)
_NODE = _code("ParticipantObjectIDTypeCode", "110182", "Node ID")
