"""A trail in a folder of its own, events, and what PS3.15 A.5.1 lets a message be."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from dicom_node.audit.message import Identity
from dicom_node.audit.trail import FileTrail
from dicom_node.auditing import AuditEvent, AuditKind, Participant
from dicom_node.clock import SystemClock

IDENTITY = Identity(source_id="NODE", site_id="Site", ae_titles=("DICOM_NODE",), host="node", process="dicom-node test")
CODED = ({"csd-code", "codeSystemName", "originalText"}, {"displayName"}, ())
# element: attributes it must have, may have, and its children in order with how often: 1, ? or *
SCHEMA: dict[str, tuple[set[str], set[str], tuple[str, ...]]] = {
    "AuditMessage": (
        set(),
        set(),
        ("EventIdentification", "ActiveParticipant*", "AuditSourceIdentification", "ParticipantObjectIdentification*"),
    ),
    "EventIdentification": (
        {"EventDateTime", "EventOutcomeIndicator"},
        {"EventActionCode"},
        ("EventID", "EventTypeCode*", "EventOutcomeDescription?"),
    ),
    "ActiveParticipant": (
        {"UserID", "UserIsRequestor"},
        {"AlternativeUserID", "UserName", "NetworkAccessPointID", "NetworkAccessPointTypeCode"},
        ("RoleIDCode*",),
    ),
    "AuditSourceIdentification": ({"AuditSourceID"}, {"AuditEnterpriseSiteID"}, ("AuditSourceTypeCode*",)),
    "AuditSourceTypeCode": ({"csd-code"}, set(), ()),
    "ParticipantObjectIdentification": (
        {"ParticipantObjectID"},
        {"ParticipantObjectTypeCode", "ParticipantObjectTypeCodeRole"},
        (
            "ParticipantObjectIDTypeCode",
            "ParticipantObjectName?",
            "ParticipantObjectQuery?",
            "ParticipantObjectDetail*",
            "ParticipantObjectDescription*",
        ),
    ),
    "ParticipantObjectDetail": ({"type", "value"}, set(), ()),
    "ParticipantObjectDescription": (set(), set(), ("SOPClass*",)),
    "SOPClass": ({"NumberOfInstances"}, {"UID"}, ()),
    "ParticipantObjectName": (set(), set(), ()),
    "ParticipantObjectQuery": (set(), set(), ()),
    "EventOutcomeDescription": (set(), set(), ()),
    **dict.fromkeys(("EventID", "EventTypeCode", "RoleIDCode", "ParticipantObjectIDTypeCode"), CODED),
}


def check(element: Element) -> None:
    must, may, children = SCHEMA[element.tag]
    assert must <= set(element.attrib) <= must | may, (element.tag, element.attrib)
    tags = [child.tag for child in element]
    for one in children:
        name, often = one.rstrip("?*"), one[len(one.rstrip("?*")) :]
        count = tags.count(name)
        assert count == 1 or often == "*" or (often == "?" and count == 0), (element.tag, name, count)
    assert tags == [name for one in children for name in tags if name == one.rstrip("?*")], (element.tag, tags)
    if element.tag == "ParticipantObjectIdentification":
        assert tags.count("ParticipantObjectName") + tags.count("ParticipantObjectQuery") == 1
    for child in element:
        check(child)


@pytest.fixture(scope="session")
def parsed() -> Callable[[bytes], Element]:
    """`parsed(message)`: the message, checked against what the schema of PS3.15 A.5.1 says of it."""

    def parse(message: bytes) -> Element:
        assert b"\n" not in message
        root = fromstring(message)
        check(root)
        assert any(one.tag == "ActiveParticipant" for one in root)
        return root

    return parse


@pytest.fixture
def identity() -> Identity:
    """Who tells."""
    return IDENTITY


@pytest.fixture
def event() -> Callable[..., AuditEvent]:
    """`event(...)`: a study that was received, or what is said."""

    def make(**said: Any) -> AuditEvent:
        plain: dict[str, Any] = {
            "kind": AuditKind.TRANSFERRED,
            "participants": (
                Participant(ae_title="CT1", host="192.0.2.10", is_requestor=True),
                Participant(ae_title="DICOM_NODE", is_this_node=True),
            ),
            "study_instance_uids": ("1.2.3",),
            "patient_ids": ("P1",),
            "instances": {"1.2.840.10008.5.1.4.1.1.2": 300},
        }
        return AuditEvent(**{**plain, **said})

    return make


@pytest.fixture
def open_trail(tmp_path: Path) -> Iterator[Callable[..., FileTrail]]:
    """`open_trail(...)`: a trail in `tmp_path/"audit"`; closed at the end."""
    with ExitStack() as stack:

        def start(**more: Any) -> FileTrail:
            options = {"file_bytes": 1 << 20, "max_message_bytes": 32768, **more}
            return stack.enter_context(FileTrail(tmp_path / "audit", IDENTITY, SystemClock(), **options))

        yield start
