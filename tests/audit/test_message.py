"""Messages of PS3.15 A.5: their shape, their codes, and that nothing a peer says breaks them."""

from base64 import b64decode
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from xml.etree.ElementTree import Element, fromstring, tostring

import pytest

from dicom_node.audit.message import Identity, audit_message
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, Participant

AT = datetime(2026, 11, 21, 12, 30, 15, 250_000, tzinfo=UTC)
CODES = {
    AuditKind.APPLICATION_STARTED: ("110100", "E", "110120"),
    AuditKind.APPLICATION_STOPPED: ("110100", "E", "110121"),
    AuditKind.AUDIT_LOG_USED: ("110101", "R", None),
    AuditKind.TRANSFER_BEGUN: ("110102", "E", None),
    AuditKind.ACCESSED: ("110103", "R", None),
    AuditKind.TRANSFERRED: ("110104", "R", None),
    AuditKind.STUDY_DELETED: ("110105", "D", None),
    AuditKind.EXPORTED: ("110106", "R", None),
    AuditKind.IMPORTED: ("110107", "C", None),
    AuditKind.QUERY: ("110112", "E", None),
    AuditKind.SECURITY_ALERT: ("110113", "E", "110126"),
    AuditKind.CONFIGURATION_CHANGED: ("110113", "E", "110131"),
    AuditKind.USER_AUTHENTICATED: ("110114", "E", "110122"),
}
Parse = Callable[[bytes], Element]
Make = Callable[..., AuditEvent]


@pytest.mark.parametrize("kind", list(AuditKind), ids=str)
def test_each_kind_is_a_message_of_its_own_code(
    kind: AuditKind, parsed: Parse, event: Make, identity: Identity
) -> None:
    root = parsed(audit_message(event(kind=kind, detail="why"), AT, identity, max_bytes=32768))
    code, action, type_code = CODES[kind]
    told = root.find("EventIdentification")
    assert told is not None
    assert told.find("EventID").get("csd-code") == code  # type: ignore[union-attr]
    assert told.get("EventActionCode") == action
    assert told.get("EventDateTime") == "2026-11-21T12:30:15.250+00:00"
    assert told.get("EventOutcomeIndicator") == "0"
    found = told.find("EventTypeCode")
    assert (found.get("csd-code") if found is not None else None) == type_code


def test_a_transfer_says_who_sent_who_received_and_how_many_of_which_class(
    parsed: Parse, event: Make, identity: Identity
) -> None:
    root = parsed(audit_message(event(action="C"), AT, identity, max_bytes=32768))
    roles = {one.get("UserID"): one.find("RoleIDCode").get("csd-code") for one in root.iter("ActiveParticipant")}  # type: ignore[union-attr]
    assert roles == {"CT1": "110153", "DICOM_NODE": "110152"}
    sender = next(one for one in root.iter("ActiveParticipant") if one.get("UserID") == "CT1")
    assert sender.get("NetworkAccessPointID") == "192.0.2.10" and sender.get("NetworkAccessPointTypeCode") == "2"
    assert sender.get("AlternativeUserID") == "AETITLES=CT1" and sender.get("UserIsRequestor") == "true"
    objects = {one.get("ParticipantObjectID"): one for one in root.iter("ParticipantObjectIdentification")}
    assert objects.keys() == {"1.2.3", "P1"}
    (of_class,) = objects["1.2.3"].iter("SOPClass")
    assert of_class.attrib == {"UID": "1.2.840.10008.5.1.4.1.1.2", "NumberOfInstances": "300"}
    assert root.find("EventIdentification").get("EventActionCode") == "C"  # type: ignore[union-attr]


def test_a_query_carries_its_identifier_as_it_came(parsed: Parse, event: Make, identity: Identity) -> None:
    query = bytes(range(256))
    told = event(kind=AuditKind.QUERY, query=query, sop_class_uid="1.2.5", study_instance_uids=(), instances={})
    root = parsed(audit_message(told, AT, identity, max_bytes=32768))
    found = next(root.iter("ParticipantObjectQuery"))
    assert b64decode(found.text or "") == query


@pytest.mark.parametrize("hostile", ["<a>&]]>", "a\x00b\nc\x1b[2J\u2028\ud800\uffff", "x" * 100_000, "\"'", "患者"])
def test_what_a_peer_says_breaks_no_message(hostile: str, parsed: Parse, event: Make, identity: Identity) -> None:
    told = event(
        participants=(Participant(ae_title=hostile, host=hostile, user=hostile, is_requestor=True),),
        study_instance_uids=(hostile,),
        patient_ids=(hostile,),
        instances={hostile: 1},
        detail=hostile,
    )
    message = audit_message(told, AT, identity, max_bytes=32768)
    parsed(message)
    assert len(message) <= 32768
    assert not any(byte < 0x20 or byte == 0x7F for byte in message)


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ({"kind": AuditKind.QUERY, "query": bytes(50_000)}, "query of 50000 bytes left out, SHA-256 "),
        ({"study_instance_uids": tuple(f"1.2.{n}" for n in range(1000))}, "992 more studies left out"),
        ({"instances": {f"1.2.3.{n}": n for n in range(1, 2000)}}, "1999000 objects of 1999 SOP classes"),
    ],
)
def test_a_message_that_would_be_too_long_leaves_something_out_and_says_so(
    said: dict[str, Any], note: str, parsed: Parse, event: Make, identity: Identity
) -> None:
    message = audit_message(event(**said), AT, identity, max_bytes=8192)
    assert len(message) <= 8192
    assert note in (parsed(message).findtext("EventIdentification/EventOutcomeDescription") or "")


def test_the_tree_is_written_as_xml_etree_writes_it(event: Make, identity: Identity) -> None:
    told = event(detail="a < b & \"c\" > 'd'", participants=(Participant(ae_title='<"&>', is_requestor=True),))
    message = audit_message(told, AT, identity, max_bytes=32768)
    assert message == tostring(fromstring(message), encoding="utf-8", xml_declaration=False).replace(
        b'a &lt; b &amp; "c" &gt;', b"a &lt; b &amp; &quot;c&quot; &gt;"
    )


def test_a_failure_is_told_as_one(parsed: Parse, event: Make, identity: Identity) -> None:
    root = parsed(audit_message(event(outcome=AuditOutcome.SERIOUS_FAILURE), AT, identity, max_bytes=32768))
    assert root.find("EventIdentification").get("EventOutcomeIndicator") == "8"  # type: ignore[union-attr]


def asked_by(root: Element) -> list[str | None]:
    return [one.get("UserID") for one in root.iter("ActiveParticipant") if one.get("UserIsRequestor") == "true"]


@pytest.mark.parametrize("kind", list(AuditKind), ids=str)
@pytest.mark.parametrize("user", ["", "anna"])
def test_an_ae_and_the_person_it_came_for_are_two_and_one_of_them_asked(
    kind: AuditKind, user: str, parsed: Parse, event: Make, identity: Identity
) -> None:
    caller = Participant(ae_title="WS1", host="192.0.2.7", user=user, is_requestor=True)
    told = event(kind=kind, participants=(caller, Participant(ae_title="DICOM_NODE", is_this_node=True)))
    root = parsed(audit_message(told, AT, identity, max_bytes=32768))
    found = {one.get("UserID"): one for one in root.iter("ActiveParticipant")}
    assert found.keys() == {"WS1", "DICOM_NODE", *filter(None, [user])}
    assert found["WS1"].get("AlternativeUserID") == "AETITLES=WS1"
    is_alert = kind in (AuditKind.SECURITY_ALERT, AuditKind.CONFIGURATION_CHANGED)
    assert asked_by(root) == (["DICOM_NODE"] if is_alert else [user or "WS1"])  # A.5.3.11: who is told of has not
    if user:
        assert found[user].get("AlternativeUserID") is None and found[user].get("NetworkAccessPointID") == "192.0.2.7"
        roles = [[code.get("csd-code") for code in found[one].iter("RoleIDCode")] for one in ("WS1", user)]
        assert roles[0] == roles[1]
