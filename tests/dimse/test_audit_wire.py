"""What both wires tell the audit trail: once for an association and a study, whatever becomes of it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom import dcmread

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
SYNTAX = "1.2.840.10008.1.2.1"
Dcmtk = Callable[..., Any]
Make = Callable[..., Path]


class Heard:
    """An audit trail that can be looked at."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self._changed = threading.Condition()

    def record(self, event: AuditEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def settled(self, timeout_s: float = 5.0) -> bool:
        return True

    def of(self, *kinds: AuditKind, count: int) -> list[AuditEvent]:
        def found() -> list[AuditEvent]:
            return [one for one in self.events if one.kind in kinds]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, 20), self.events
            assert len(found()) == count, found()
            return found()


TRANSFERS = (AuditKind.TRANSFER_BEGUN, AuditKind.TRANSFERRED)


def titles(event: AuditEvent) -> list[tuple[str, bool, str | None]]:
    return [(one.ae_title, one.is_requestor, one.role.name if one.role else None) for one in event.participants]


def test_a_study_that_is_received_is_told_once_with_counts(serve: Any, dcmtk: Dcmtk, make_file: Make) -> None:
    heard = Heard()
    node = serve(audit=heard)
    one = [make_file(StudyInstanceUID="1.2.1", PatientID="P1") for _ in range(5)]
    one.append(make_file(StudyInstanceUID="1.2.1", PatientID="P1", SOPClassUID=MR))
    two = [make_file(StudyInstanceUID="1.2.2", PatientID="P2") for _ in range(2)]
    words = ("storescu", "-R", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    dcmtk(*words, *one, *two)
    first, second, *ends = heard.of(*TRANSFERS, count=4)
    assert [first.study_instance_uids, second.study_instance_uids] == [("1.2.1",), ("1.2.2",)]
    assert first.patient_ids == ("P1",) and not first.instances
    assert [(one.study_instance_uids, dict(one.instances), one.action) for one in ends] == [
        (("1.2.1",), {CT: 5, MR: 1}, "C"),
        (("1.2.2",), {CT: 2}, "C"),
    ]
    assert titles(ends[0]) == [("CT1", True, None), ("DICOM_NODE", False, None)]
    assert ends[0].participants[0].host == "127.0.0.1"
    dcmtk(*words, *two)  # again
    again = heard.of(*TRANSFERS, count=6)[-1]
    assert again.action == "R" and dict(again.instances) == {CT: 2}


def test_what_was_refused_is_told_apart(serve: Any, dcmtk: Dcmtk, make_file: Make) -> None:
    heard = Heard()
    node = serve(audit=heard)
    files = [make_file(StudyInstanceUID="1.2.1"), make_file(StudyInstanceUID="")]
    dcmtk("storescu", "-nh", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *files, check=False)
    _, *ends = heard.of(*TRANSFERS, count=3)
    assert [(one.outcome, dict(one.instances)) for one in ends if one.outcome] == [(AuditOutcome.MINOR_FAILURE, {})]
    assert [dict(one.instances) for one in ends if not one.outcome] == [{CT: 1}]


def test_a_query_is_told_with_its_identifier(serve: Any, dcmtk: Dcmtk) -> None:
    heard = Heard()
    node = serve(audit=heard)
    keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID=P1", "-k", "StudyInstanceUID")
    dcmtk("findscu", "-S", "-aec", "DICOM_NODE", *keys, "127.0.0.1", node.port)
    (query,) = heard.of(AuditKind.QUERY, count=1)
    assert b"P1" in query.query and query.outcome is AuditOutcome.SUCCESS
    assert query.sop_class_uid == "1.2.840.10008.5.1.4.1.2.2.1" and query.transfer_syntax_uid.startswith(
        "1.2.840.10008.1.2"
    )
    dcmtk("findscu", "-S", "-aec", "DICOM_NODE", "-k", "QueryRetrieveLevel=X", "127.0.0.1", node.port, check=False)
    refused = heard.of(AuditKind.QUERY, count=2)[-1]
    assert refused.outcome is AuditOutcome.MINOR_FAILURE and refused.detail == "status A900H"


def test_what_is_fetched_is_told_with_who_got_it(
    serve: Any, dcmtk: Dcmtk, make_file: Make, free_port: Callable[[], int], tmp_path: Path
) -> None:
    heard, elsewhere = Heard(), free_port()
    there = {"ARCHIVE": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": elsewhere}}
    node = serve(audit=heard, destinations=there)
    files = [make_file(StudyInstanceUID="1.2.1") for _ in range(3)]
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *files)
    heard.of(*TRANSFERS, count=2)
    study = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={dcmread(files[0]).StudyInstanceUID}")
    (tmp_path / "got").mkdir()
    dcmtk("getscu", "-S", "-od", tmp_path / "got", "-aet", "WS1", "-aec", "DICOM_NODE", *study, "127.0.0.1", node.port)
    begun, ended = heard.of(*TRANSFERS, count=4)[-2:]
    assert titles(ended) == titles(begun) == [("DICOM_NODE", False, "SOURCE"), ("WS1", True, "DESTINATION")]
    assert ended.outcome is AuditOutcome.SUCCESS and dict(ended.instances) == {CT: 3}
    move = ("movescu", "-S", "-aem", "ARCHIVE", "-aet", "WS1", "-aec", "DICOM_NODE", *study, "127.0.0.1", node.port)
    dcmtk(*move, check=False)  # nobody listens there
    _, failed = heard.of(*TRANSFERS, count=6)[-2:]
    assert titles(failed) == [
        *(("DICOM_NODE", False, "SOURCE"), ("ARCHIVE", False, "DESTINATION"), ("WS1", True, "APPLICATION")),
    ]
    assert failed.outcome is AuditOutcome.SERIOUS_FAILURE and failed.detail == "status A702H"


def test_who_is_not_let_in_is_an_alert(serve: Any, dcmtk: Dcmtk) -> None:
    heard = Heard()
    node = serve(audit=heard, peers={"ct": {"ae_title": "CT1"}})
    dcmtk("echoscu", "-aet", "STRANGER", "-aec", "DICOM_NODE", "127.0.0.1", node.port, check=False)
    dcmtk("echoscu", "-aet", "CT1", "-aec", "ELSE", "127.0.0.1", node.port, check=False)
    dcmtk("echoscu", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    alerts = heard.of(AuditKind.SECURITY_ALERT, count=2)
    assert [(one.detail, one.participants[0].ae_title, one.participants[0].host) for one in alerts] == [
        ("association rejected: calling_ae", "STRANGER", "127.0.0.1"),
        ("association rejected: called_ae", "CT1", "127.0.0.1"),
    ]


def test_who_breaks_the_protocol_is_an_alert(serve: Any, raw_peer: Any) -> None:
    heard = Heard()
    node = serve(audit=heard)
    peer = raw_peer(node.port)
    peer.associate([(1, "1.2.840.10008.1.1", [SYNTAX])])
    peer.send_pdu(0x04, b"\x00\x00\x00\x06\x01\x03\xff\xff\xff\xff")  # a command that is none
    (alert,) = heard.of(AuditKind.SECURITY_ALERT, count=1)
    assert alert.detail == "association aborted: the peer sent what is no message"
    assert alert.participants[0].host == "127.0.0.1"


def test_every_object_that_is_answered_with_a_failure_is_told(
    serve: Any, raw_peer: Any, dcmtk: Dcmtk, make_file: Make
) -> None:
    heard = Heard()
    node = serve(audit=heard, bounds={"objects_per_association": 2})
    files = [make_file(StudyInstanceUID="1.2.1") for _ in range(4)]
    dcmtk("storescu", "-nh", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *files, check=False)
    *_, refused = heard.of(*TRANSFERS, count=3)
    assert refused.outcome is AuditOutcome.MINOR_FAILURE and refused.detail == "2 objects were refused"
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [SYNTAX])])
    peer.send_command(  # no data set comes with it, and no SOP Instance UID
        1, AffectedSOPClassUID=CT, CommandField=1, MessageID=1, Priority=0, CommandDataSetType=0x0101
    )
    assert peer.read_command().Status != 0
    peer.close()
    *_, refused = heard.of(*TRANSFERS, count=4)
    assert refused.outcome is AuditOutcome.MINOR_FAILURE and refused.detail == "1 objects were refused"


def test_a_user_is_told_in_every_message_of_an_association(
    serve: Any, dcmtk: Dcmtk, make_file: Make, tmp_path: Path
) -> None:
    from dicom_node.dimse.users import hash_passcode, user_line

    users = tmp_path / "users"
    users.write_text(user_line("anna", hash_passcode(b"a passcode")) + "\n")
    users.chmod(0o600)
    heard = Heard()
    node = serve(audit=heard, user_identity={"users_file": users, "mode": "required"})
    who = ("-usr", "anna", "-pwd", "a passcode", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    dcmtk("storescu", *who, make_file())
    events = heard.of(AuditKind.USER_AUTHENTICATED, *TRANSFERS, count=3)
    assert [(one.participants[0].user, one.participants[0].ae_title) for one in events] == [("anna", "CT1")] * 3
