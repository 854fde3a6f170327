"""C-ECHO and C-STORE on the wire: dcmtk as the client, and a peer that breaks the rules."""

import logging
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import StorageError
from dicom_node.model import StoreResult
from dicom_node.services.store import StoreRequest, StoreService

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
CT, VERIFICATION = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.1"
STORE_RQ = {"CommandField": 1, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": CT}


def test_echo_is_answered(serve: Callable[..., Any], dcmtk: Callable[..., Any]) -> None:
    node = serve()
    dcmtk("echoscu", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.answered == [("echo", 0)]
    assert node.counted.ended == [("ECHOSCU", "released")]
    assert node.association_ends() == []  # nothing was fed: completion need not know


@pytest.mark.parametrize(
    ("settings", "words", "reason", "word"),
    [
        ({}, ["-aec", "OTHER"], "Called AE Title Not Recognized", "called_ae"),
        ({"peers": {"a": {"ae_title": "A"}}}, ["-aet", "B"], "Calling AE Title Not Recognized", "calling_ae"),
        (
            {"peers": {"a": {"ae_title": "A", "hosts": ["10.0.0.0/8"]}}},
            ["-aet", "A"],
            "Calling AE Title Not Recognized",
            "address",
        ),
    ],
)
def test_strangers_are_rejected_with_the_reason(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    settings: dict[str, Any],
    words: list[str],
    reason: str,
    word: str,
) -> None:
    node = serve(**settings)
    called = [] if "-aec" in words else ["-aec", "DICOM_NODE"]
    done = dcmtk("echoscu", *words, *called, "127.0.0.1", node.port, check=False)
    assert done.returncode != 0
    assert reason in done.stdout
    assert node.counted.rejected == [word]


def test_one_port_answers_under_several_titles(serve: Callable[..., Any], dcmtk: Callable[..., Any]) -> None:
    node = serve(ae_titles=["ONE", "TWO"])
    dcmtk("echoscu", "-aec", "TWO", "127.0.0.1", node.port)
    dcmtk("echoscu", "-aec", "ONE", "127.0.0.1", node.port)


def test_a_socket_that_is_already_bound_is_used(serve: Callable[..., Any], dcmtk: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        node = serve(sock=socket.fromfd(bound.fileno(), bound.family, bound.type))
        assert node.port == bound.getsockname()[1]
        dcmtk("echoscu", "-aec", "DICOM_NODE", "127.0.0.1", node.port)


def test_stored_bytes_are_the_bytes_sent(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path], data_set_bytes: Any
) -> None:
    node = serve()
    files = [make_file(pixels=300), make_file(pixels=8, syntax=IMPLICIT)]
    dcmtk("storescu", "-xi", "-aec", "DICOM_NODE", "127.0.0.1", node.port, files[1])
    dcmtk("storescu", "-xe", "-aec", "DICOM_NODE", "127.0.0.1", node.port, files[0])
    for path in files:
        stored = node.catalog.index.instance(path.stem)
        with open(stored.path, "rb") as file:
            file.seek(stored.data_set_offset)
            assert file.read() == data_set_bytes(path)
    node.counted.wait_for(lambda c: len(c.ended) == 2)
    assert node.association_ends() == [("released", 0)] * 2


def test_explicit_is_chosen_though_implicit_was_proposed_first(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve()
    peer = raw_peer(node.port)
    kind, body = peer.associate(
        [(1, CT, ["1.2.840.10008.1.2.4.50", IMPLICIT, EXPLICIT]), (3, VERIFICATION, [IMPLICIT])]
    )
    assert kind == 2
    assert accepted_contexts(body) == {1: (0, EXPLICIT), 3: (0, IMPLICIT)}


def test_each_refused_context_is_logged_and_counted(
    serve: Callable[..., Any], raw_peer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    with caplog.at_level(logging.WARNING, logger="dicom_node"):
        _, body = peer.associate([(1, "1.2.3.4", [EXPLICIT]), (3, CT, ["1.2.840.113619.5.2"]), (5, CT, [EXPLICIT])])
    assert {number: result for number, (result, _) in accepted_contexts(body).items()} == {1: 3, 3: 4, 5: 0}
    assert node.counted.refused == ["abstract_syntax", "transfer_syntax"]
    records = [record for record in caplog.records if record.message == "presentation context refused"]
    assert [vars(record)["sop_class"] for record in records] == ["1.2.3.4", CT]
    assert vars(records[1])["transfer_syntaxes"] == ["1.2.840.113619.5.2"]
    assert vars(records[1])["calling_ae_title"] == "'TEST'"


def test_private_classes_are_stored_when_configured(serve: Callable[..., Any], raw_peer: Any) -> None:
    peer = raw_peer(serve(unknown_sop_classes=True).port)
    _, body = peer.associate([(1, "1.3.6.1.4.1.9999.7", [EXPLICIT])])
    assert accepted_contexts(body) == {1: (0, EXPLICIT)}


@pytest.mark.parametrize(
    ("fields", "data_set", "status"),
    [
        ({"AffectedSOPInstanceUID": "1.2.3"}, None, 0xC000),
        ({}, b"\x08\x00\x16\x00UI\x04\x001.2\x00", 0xC000),
        ({"AffectedSOPInstanceUID": "1.2.3", "AffectedSOPClassUID": "1.2.3"}, b"\0" * 8, 0xA900),
        ({"AffectedSOPInstanceUID": "1.2.3"}, b"garbage!", 0xC000),
        ({"AffectedSOPInstanceUID": "1." * 40 + "1"}, b"\0" * 8, 0xC000),
        ({"AffectedSOPInstanceUID": "../../etc/passwd"}, b"\0" * 8, 0xC000),
    ],
)
def test_a_malformed_store_gets_a_failure_and_the_association_goes_on(
    serve: Callable[..., Any], raw_peer: Any, fields: dict[str, Any], data_set: bytes | None, status: int
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT]), (3, VERIFICATION, [EXPLICIT])])
    with_data = {"CommandDataSetType": 0x0101} if data_set is None else {}
    peer.send_command(1, data_set, **{**STORE_RQ, "MessageID": 9, **with_data, **fields})
    response = peer.read_command()
    assert (response.Status, response.MessageIDBeingRespondedTo, response.CommandField) == (status, 9, 0x8001)
    assert response.get("ErrorComment")
    assert echo_works(peer)
    assert node.counted.answered[0] == ("store", status)


def test_a_failed_store_is_noted_for_completion_and_an_abort_ends_as_aborted(
    serve: Callable[..., Any], raw_peer: Any
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, b"garbage!", **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    assert peer.read_command().Status == 0xC000
    peer.send_pdu(7, b"\0\0\0\0")
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.ended == [("TEST", "aborted")]
    assert node.association_ends() == [("aborted", 1)]


def test_a_connection_cut_inside_an_object_leaves_nothing(
    serve: Callable[..., Any], raw_peer: Any, tmp_path: Path
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    peer.send_fragment(1, 0, b"\0" * 4096)
    peer.close()
    node.counted.wait_for(lambda c: c.ended)
    assert list(node.catalog.archive.locations()) == []


@pytest.mark.parametrize(
    ("context_id", "fields", "status"),
    [
        (3, {"CommandField": 0x0100, "EventTypeID": 1}, 0x0211),
        (3, {"CommandField": 0x0001, "CommandDataSetType": 0}, 0x0122),
        (1, {"CommandField": 0x0030}, 0x0122),
        (1, {"CommandField": 0x0021, "CommandDataSetType": 0}, 0x0122),
    ],
)
def test_operations_that_do_not_belong_to_the_context_are_refused(
    serve: Callable[..., Any], raw_peer: Any, context_id: int, fields: dict[str, Any], status: int
) -> None:
    peer = raw_peer(serve().port)
    peer.associate([(1, CT, [EXPLICIT]), (3, VERIFICATION, [EXPLICIT])])
    fields = {key: value for key, value in fields.items() if key != "EventTypeID"}
    command = {"CommandDataSetType": 0x0101, "AffectedSOPClassUID": CT, "MessageID": 4, **fields}
    peer.send_command(context_id, b"\0" * 8 if command["CommandDataSetType"] == 0 else None, **command)
    assert peer.read_command().Status == status
    assert echo_works(peer)


@pytest.mark.parametrize(
    "message",
    [
        {"context_id": 9, "CommandField": 0x0030, "MessageID": 1, "CommandDataSetType": 0x0101},
        {"context_id": 1, "CommandField": 0x0030, "CommandDataSetType": 0x0101},
        {"context_id": 1, "CommandField": 0x8001, "MessageIDBeingRespondedTo": 1, "CommandDataSetType": 0x0101},
        {"context_id": 1, "CommandField": 0x7777, "MessageID": 1, "CommandDataSetType": 0x0101},
        {"context_id": 1, "MessageID": 1},
    ],
)
def test_what_cannot_be_answered_is_aborted_not_ignored(
    serve: Callable[..., Any], raw_peer: Any, message: dict[str, Any], dcmtk: Callable[..., Any]
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    fields = dict(message)
    peer.send_command(fields.pop("context_id"), **fields)
    assert peer.read_pdu()[0] == 7
    dcmtk("echoscu", "-aec", "DICOM_NODE", "127.0.0.1", node.port)


@pytest.mark.parametrize(
    "attack",
    [
        lambda peer: peer.send_pdu(1, b"\0" * 80),
        lambda peer: peer.send_pdu(0x55, b"\0\0\0\0"),
        lambda peer: peer.send_pdu(4, b"\0\0\0\0"),
        lambda peer: peer.socket.sendall(struct.pack(">BBI", 1, 0, 0xFFFFFFFF) + b"x" * 4096),
        lambda peer: peer.send_pdu(
            1,
            struct.pack(">HH16s16s32x", 1, 0, b"DICOM_NODE".ljust(16), b"TEST".ljust(16))
            + struct.pack(">BBH", 0x20, 0, 4)
            + bytes([2, 0, 0, 0]),
        ),
    ],
    ids=["no-items", "unknown-type", "data-first", "huge-length", "even-context-id"],
)
def test_bytes_that_are_no_association_end_the_connection_soon(
    serve: Callable[..., Any], raw_peer: Any, dcmtk: Callable[..., Any], attack: Callable[[Any], None]
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.socket.settimeout(5.0)
    attack(peer)
    assert peer.read_pdu()[0] in (0, 3, 7)
    dcmtk("echoscu", "-aec", "DICOM_NODE", "127.0.0.1", node.port)


@pytest.mark.parametrize("kind", ["command", "empty"])
def test_messages_without_an_end_are_cut_off(serve: Callable[..., Any], raw_peer: Any, kind: str) -> None:
    peer = raw_peer(serve().port)
    peer.associate([(1, CT, [EXPLICIT])])
    try:
        for _ in range(100):
            peer.send_fragment(1, 1, b"\0" * 4096 if kind == "command" else b"")
    except OSError:
        pass
    kinds = {peer.read_pdu()[0]}
    assert kinds <= {0, 7}


def test_an_object_above_the_limit_is_refused_and_its_association_goes_on(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    node = serve(storage={"reserve_bytes": 0, "reserve_ratio": 0, "max_object_bytes": 30_000})
    paths = [make_file(pixels=pixels) for pixels in (64, 150, 64)]  # 8, 45 and 8 KB
    said = dcmtk("storescu", "-v", "-nh", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths, check=False).stdout
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.answered == [("store", 0), ("store", 0xA700), ("store", 0)], said
    assert node.counted.ended[0][1] == "released"
    kept = [path for path in paths if node.catalog.index.instance(path.stem) is not None]
    assert kept == [paths[0], paths[2]]


def test_an_object_that_goes_on_beyond_twice_the_limit_is_cut_off(serve: Callable[..., Any], raw_peer: Any) -> None:
    peer = raw_peer(serve(storage={"reserve_bytes": 0, "reserve_ratio": 0, "max_object_bytes": 10000}).port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    try:
        for _ in range(8):
            peer.send_fragment(1, 0, b"\0" * 4096)
    except OSError:
        pass
    assert peer.read_pdu()[0] in (0, 7)


def test_an_object_that_does_not_fit_memory_is_stored_whole(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    data_set_bytes: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("dicom_node.dimse.pynetdicom_link.IN_MEMORY", 100_000)
    node = serve(data_dir=tmp_path)
    path = make_file(pixels=700)
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, path)
    stored = node.catalog.index.instance(path.stem)
    assert Path(stored.path).read_bytes()[stored.data_set_offset :] == data_set_bytes(path)


@pytest.mark.parametrize("contexts", [[], [(1, CT, [EXPLICIT]), (1, VERIFICATION, [EXPLICIT])]], ids=["none", "twice"])
def test_ambiguous_proposals_are_aborted(serve: Callable[..., Any], raw_peer: Any, contexts: Any) -> None:
    node = serve()
    assert raw_peer(node.port).associate(contexts) == (7, b"\0\0\2\6")
    assert node.counted.rejected == ["protocol"]


def test_more_associations_than_allowed_are_rejected_for_now(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve(max_associations=1)
    assert raw_peer(node.port).associate([(1, CT, [EXPLICIT])])[0] == 2
    assert raw_peer(node.port).associate([(1, CT, [EXPLICIT])]) == (3, b"\0\x02\x03\x02")
    assert node.server.active_associations == 1
    assert node.counted.rejected == ["limit"]


def test_an_idle_association_is_closed_after_the_limit_of_its_peer(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve(
        association_idle_timeout_s=0.3,
        peers={"a": {"ae_title": "TEST", "idle_timeout_s": 60}, "b": {"ae_title": "HASTY"}},
    )
    patient, hasty = raw_peer(node.port), raw_peer(node.port)
    patient.associate([(1, VERIFICATION, [EXPLICIT])])
    hasty.associate([(1, VERIFICATION, [EXPLICIT])], calling="HASTY")
    assert hasty.read_pdu()[0] in (0, 7)
    assert echo_works(patient, 1)


def test_an_association_closed_for_idleness_counts_as_released_but_not_inside_an_object(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], data_set_bytes: Any
) -> None:
    node = serve(association_idle_timeout_s=0.5)
    forgetful, broken = make_file(), make_file()
    for path, calling in ((forgetful, "FORGETFUL"), (broken, "BROKEN")):
        peer = raw_peer(node.port)
        peer.associate([(1, CT, [EXPLICIT])], calling=calling)
        peer.send_command(1, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
        assert peer.read_command().Status == 0
        if path is broken:
            peer.send_command(1, **STORE_RQ, MessageID=2, AffectedSOPInstanceUID="1.2.3")
            peer.send_fragment(1, 0, b"\0" * 64)
        assert peer.read_pdu()[0] in (0, 7)
    node.counted.wait_for(lambda c: len(c.ended) == 2)
    assert sorted(node.counted.ended) == [("BROKEN", "aborted"), ("FORGETFUL", "released")]
    assert node.association_ends() == [("released", 0), ("aborted", 0)]


class Failing:
    """A part of the node that fails as `error` says."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def accept(self, **_: Any) -> StoreResult:
        raise self.error

    def open_association(self, association_id: str, source: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("part", "error", "status"),
    [
        ("sink", RuntimeError("a bug"), 0x0110),
        ("sink", StorageError("disk"), 0xA700),
        ("associations", StorageError("disk"), 0xA700),
    ],
)
def test_a_fault_of_the_node_is_answered_and_ends_nothing(
    serve: Callable[..., Any], raw_peer: Any, part: str, error: Exception, status: int
) -> None:
    node = serve(**{part: Failing(error)})
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT]), (3, VERIFICATION, [EXPLICIT])])
    peer.send_command(1, b"\0" * 8, **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    assert peer.read_command().Status == status
    assert echo_works(peer)


def test_traffic_inside_one_object_keeps_the_association_alive_for_completion(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], data_set_bytes: Any
) -> None:
    touched = threading.Event()
    node = serve()
    touch = node.catalog.index.touch_associations
    node.catalog.index.touch_associations = lambda ids: (touch(ids), touched.set())
    path = make_file()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
    assert peer.read_command().Status == 0
    assert touched.wait(10.0)
    touched.clear()
    peer.send_command(1, **STORE_RQ, MessageID=2, AffectedSOPInstanceUID="1.2.3")
    peer.send_fragment(1, 0, b"\0" * 64)
    assert touched.wait(10.0)


def test_stop_ends_idle_associations_at_once(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    node.server.stop(5.0)
    assert peer.read_pdu()[0] == 7
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", node.port), timeout=2)


def test_the_store_service_refuses_before_the_sink_is_asked() -> None:
    service = StoreService(Failing(AssertionError("asked")))
    request = StoreRequest(
        context_sop_class_uid=CT, transfer_syntax_uid=EXPLICIT, sop_class_uid="1.2", sop_instance_uid="1.3"
    )
    assert service.store(request, [b""], None).status == 0xA900  # type: ignore[arg-type]
    assert service.store(request, None, None).status == 0xC000  # type: ignore[arg-type]


def echo_works(peer: Any, context_id: int = 3) -> bool:
    """Whether the association still answers."""
    peer.send_command(
        context_id, CommandField=0x30, MessageID=77, CommandDataSetType=0x0101, AffectedSOPClassUID=VERIFICATION
    )
    response: Dataset = peer.read_command()
    return bool(response.Status == 0 and response.MessageIDBeingRespondedTo == 77)


def accepted_contexts(body: bytes) -> dict[int, tuple[int, str]]:
    """Context id to (result, transfer syntax) of an A-ASSOCIATE-AC (PS3.8 9.3.3)."""
    found, position = {}, 68
    while position < len(body):
        kind, length = struct.unpack(">BxH", body[position : position + 4])
        if kind == 0x21:
            syntax = body[position + 12 : position + 4 + length].decode()
            found[body[position + 4]] = (body[position + 6], syntax)
        position += 4 + length
    return found


@pytest.mark.parametrize(
    "first", [b"", b"\1", struct.pack(">BBI", 1, 0, 300), struct.pack(">BBI", 1, 0, 300) + b"x" * 9]
)
def test_a_peer_that_does_not_finish_its_request_is_closed(
    serve: Callable[..., Any], raw_peer: Any, first: bytes
) -> None:
    node = serve(bounds={"first_pdu_s": 0.3})
    peer = raw_peer(node.port)
    peer.socket.sendall(first)
    assert peer.read_pdu()[0] in (0, 7)
    assert node.server.active_associations == 0


def test_a_peer_that_stops_inside_a_pdu_is_closed(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve(bounds={"pdu_s": 0.3})
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.socket.sendall(struct.pack(">BBI", 4, 0, 5000) + b"x" * 100)
    assert peer.read_pdu()[0] in (0, 7)
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.ended == [("TEST", "aborted")]
