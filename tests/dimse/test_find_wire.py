"""C-FIND over the wire with findscu: levels, character sets, extended negotiation, cancel."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.config import DeliverySettings
from dicom_node.dimse.files import send_files
from dicom_node.model import Destination

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"


@pytest.fixture
def node(serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path]) -> Any:
    """A server with three small studies."""
    running = serve()
    files = [
        make_file(PatientID="A", PatientName="Doe^Jane", StudyDate="20240105", StudyTime="0930", AccessionNumber="1"),
        make_file(
            PatientID="B",
            SpecificCharacterSet="ISO_IR 100",
            PatientName="Müller^Jörg",
            StudyDate="20240210",
            Modality="MR",
            AccessionNumber="2",
        ),
        make_file(PatientID="B", PatientName="Muller^Jorg", StudyDate="20240310", AccessionNumber="3"),
    ]
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", running.port, *files)
    return running


def found(output: str, tag: str) -> list[str]:
    """The values of one element in findscu's responses."""
    return [value.strip() for value in re.findall(rf"^I: \({tag}\) \w\w \[?([^\]#]*)\]? *#", output, re.MULTILINE)]


@pytest.mark.parametrize(
    ("model", "level", "keys", "tag", "expected"),
    [
        ("-P", "PATIENT", ["PatientID"], "0010,0020", ["A", "B"]),
        ("-P", "PATIENT", ["PatientID=B", "NumberOfPatientRelatedStudies"], "0020,1200", ["2"]),
        ("-P", "STUDY", ["PatientID=B", "AccessionNumber"], "0008,0050", ["2", "3"]),
        ("-S", "STUDY", ["AccessionNumber"], "0008,0050", ["1", "2", "3"]),
        ("-S", "STUDY", ["AccessionNumber", "StudyDate=20240201-20240331"], "0008,0050", ["2", "3"]),
        ("-S", "STUDY", ["AccessionNumber", "StudyDate=-20240131"], "0008,0050", ["1"]),
        ("-S", "STUDY", ["AccessionNumber", "PatientName=MULLER*"], "0008,0050", ["2", "3"]),
        ("-S", "STUDY", ["AccessionNumber", "ModalitiesInStudy=MR"], "0008,0050", ["2"]),
        ("-S", "STUDY", ["NumberOfStudyRelatedInstances", "AccessionNumber=1"], "0020,1208", ["1"]),
        ("-S", "SERIES", ["Modality", "AccessionNumber"], "0008,0060", ["CT", "CT", "MR"]),
        ("-S", "IMAGE", ["SOPClassUID", "PatientID=A"], "0008,0016", ["=CTImageStorage"]),
    ],
)
def test_findscu_gets_the_matches_of_each_level(
    node: Any, dcmtk: Callable[..., Any], model: str, level: str, keys: list[str], tag: str, expected: list[str]
) -> None:
    words = [word for key in [f"QueryRetrieveLevel={level}", *keys] for word in ("-k", key)]
    output = dcmtk("findscu", "-v", model, "-aec", "DICOM_NODE", *words, "127.0.0.1", node.port).stdout
    output = output[output.index("Find Response: 1") :]  # before it stands the request
    assert sorted(found(output, tag)) == expected
    pending = output.count("(Pending)")
    assert pending == len(expected)
    for always, value in (("0008,0052", level), ("0008,0054", "DICOM_NODE"), ("0008,0056", "ONLINE")):
        assert found(output, always) == [value] * pending


def test_a_name_outside_ascii_comes_back_in_the_character_set_it_was_asked_in(
    node: Any, dcmtk: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["-k", "SpecificCharacterSet=ISO_IR 100", "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName=M*"]
    dcmtk("findscu", "-S", "-X", "-od", tmp_path, "-aec", "DICOM_NODE", *words, "127.0.0.1", node.port)
    texts = [path.read_bytes() for path in sorted(tmp_path.glob("rsp*.dcm"))]
    assert len(texts) == 2
    assert sum("Müller^Jörg".encode("latin-1") in text for text in texts) == 1


def test_a_wrong_identifier_is_refused_with_the_offending_element(node: Any, dcmtk: Callable[..., Any]) -> None:
    output = dcmtk(
        "findscu", "-d", "-S", "-aec", "DICOM_NODE", "-k", "QueryRetrieveLevel=FRAME", "127.0.0.1", node.port
    ).stdout
    assert "0xa900" in output.lower()


@pytest.mark.parametrize(
    ("asked", "answered"),
    [(b"\1", b"\1"), (b"\1\1", b"\1\1"), (b"\1\1\1\1\1", b"\1\1\0\0\0"), (b"\0\1\1", b"\0\1\0"), (b"\0", b"\0")],
)
def test_extended_negotiation_grants_what_is_there_and_nothing_else(
    serve: Callable[..., Any], raw_peer: Any, asked: bytes, answered: bytes
) -> None:
    uid = STUDY_ROOT_FIND.encode()
    body = struct.pack(">H", len(uid)) + uid
    peer = raw_peer(serve().port)
    user = struct.pack(">BBH", 0x56, 0, len(body) + len(asked)) + body + asked
    kind, reply = peer.associate([(1, STUDY_ROOT_FIND, [EXPLICIT])], user=user)
    assert kind == 2
    assert struct.pack(">BBH", 0x56, 0, len(body) + len(answered)) + body + answered in reply


def test_combined_date_time_matching_counts_only_when_negotiated(node: Any, raw_peer: Any) -> None:
    uid = STUDY_ROOT_FIND.encode()
    item = struct.pack(">H", len(uid)) + uid + b"\0\1"
    keys = {"StudyDate": "20240105-20240106", "StudyTime": "1000-1100"}
    for user, expected in ((struct.pack(">BBH", 0x56, 0, len(item)) + item, 0), (b"", 0)):
        peer = raw_peer(node.port)
        peer.associate([(1, STUDY_ROOT_FIND, [IMPLICIT])], user=user)
        assert len(pending(peer, keys)) == expected
    keys["StudyTime"] = "0900-0800"  # from the first day at nine to the second at eight
    peer = raw_peer(node.port)
    peer.associate([(1, STUDY_ROOT_FIND, [IMPLICIT])], user=struct.pack(">BBH", 0x56, 0, len(item)) + item)
    assert len(pending(peer, keys)) == 1


def test_a_cancel_during_a_query_ends_it(
    serve: Callable[..., Any],
    raw_peer: Any,
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    wait_for: Callable[..., None],
) -> None:
    node = serve()
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, make_file())
    peer = raw_peer(node.port)
    real = node.catalog.index.find_pages

    def slow(query: Any) -> Any:
        for page in real(query):
            yield page
            peer.send_command(1, CommandField=0x0FFF, MessageIDBeingRespondedTo=5, CommandDataSetType=0x0101)
            wait_for(lambda: node.server._living()[-1].is_cancelled(5), 10.0, "the cancel to arrive")
            yield page

    node.catalog.index.find_pages = slow
    peer.associate([(1, STUDY_ROOT_FIND, [IMPLICIT])])
    statuses = responses(peer, {"StudyInstanceUID": ""}, message_id=5)
    assert statuses == [0xFF00, 0xFE00]
    node.catalog.index.find_pages = real
    assert responses(peer, {"StudyInstanceUID": ""}, message_id=5) == [0xFF00, 0x0000]


@pytest.mark.parametrize("identifier", [b"", b"\xff" * 40, b"\0" * (1024 * 1024 + 2)])
def test_an_identifier_that_cannot_be_read_is_refused(
    serve: Callable[..., Any], raw_peer: Any, identifier: bytes
) -> None:
    peer = raw_peer(serve().port)
    peer.associate([(1, STUDY_ROOT_FIND, [IMPLICIT])])
    peer.send_command(1, identifier, **find_request(1, with_identifier=True))
    assert peer.read_command().Status == 0xA900
    peer.send_command(1, **find_request(2, with_identifier=False))
    assert peer.read_command().Status == 0xA900


def find_request(message_id: int, *, with_identifier: bool) -> dict[str, Any]:
    """The command set of a C-FIND-RQ."""
    return {
        "CommandField": 0x20,
        "AffectedSOPClassUID": STUDY_ROOT_FIND,
        "MessageID": message_id,
        "Priority": 0,
        "CommandDataSetType": 0 if with_identifier else 0x0101,
    }


def responses(peer: Any, keys: dict[str, str], message_id: int = 1) -> list[int]:
    """The statuses of every response to a STUDY level query."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = True, True
    write_dataset(out, identifier)
    peer.send_command(1, out.getvalue(), **find_request(message_id, with_identifier=True))
    statuses: list[int] = []
    while True:
        response = peer.read_command()
        assert response.MessageIDBeingRespondedTo == message_id
        statuses.append(response.Status)
        if response.Status not in (0xFF00, 0xFF01):
            return statuses
        assert peer.read_pdu()[0] == 4


def pending(peer: Any, keys: dict[str, str]) -> list[int]:
    """The pending responses."""
    return responses(peer, keys)[:-1]


def test_answers_that_go_out_together_are_those_that_go_out_one_by_one(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = serve()
    destination = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=node.port)
    files = [make_file(PatientID=f"P{number}") for number in range(150)]
    send_files(files, destination, lambda *_: None, settings=DeliverySettings(), calling_ae_title="TEST")
    seen = []
    for cork_s in (0.02, 0.0):
        monkeypatch.setattr("dicom_node.dimse.association.CORK_S", cork_s)
        peer = raw_peer(node.port)
        peer.associate([(1, STUDY_ROOT_FIND, [IMPLICIT])])
        seen.append(responses(peer, {"StudyInstanceUID": "", "PatientID": ""}, message_id=7))
    assert seen[0] == seen[1] == [0xFF00] * 150 + [0x0000]
