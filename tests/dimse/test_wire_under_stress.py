"""What a wire must stand: connections that come and go at the wrong moment, operations that are left unanswered."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.dimse import server as server_module
from dicom_node.dimse.association import Association, Buffers
from dicom_node.dimse.link import FIRST_PDU_S, AssociationLost
from dicom_node.dimse.server import KEPT_THREADS, _Lobby, _Pool
from dicom_node.dimse.upper_layer.connection import Connection, Side
from dicom_node.dimse.upper_layer.pdus import AssociateRQ, ProposedContext, UserInformation, encode_pdu
from dicom_node.model import StoreOutcome, StoreResult

EXPLICIT = "1.2.840.10008.1.2.1"
CT, STUDY_ROOT_FIND, STUDY_ROOT_GET = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.2.2.1",
    "1.2.840.10008.5.1.4.1.2.2.3",
)
VERIFICATION = "1.2.840.10008.1.1"
STORE_RQ = {"CommandField": 1, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": CT}


def test_one_that_speaks_just_as_it_makes_room_for_another_does_not_end_the_lobby(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "MAX_SILENT", 1)
    spoken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        lobby = _Lobby(listener, lambda client, since: spoken.append(client))
        with socket.create_connection(listener.getsockname()) as first:
            lobby.look(2.0)
            with socket.create_connection(listener.getsockname()) as second:
                first.sendall(b"\1")
                lobby.look(2.0)  # both at once: a connection to take, and the only one that waited speaks
                second.sendall(b"\1")
                while not spoken:
                    lobby.look(2.0)
        for client in spoken:
            client.close()
        lobby.close()


def test_a_thread_that_cannot_be_had_costs_one_connection_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Semaphore(0)

    def work(client: socket.socket, since: float) -> None:
        done.release()

    pool = _Pool(work, most=4)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with socket.socket() as item:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert not any(pool.give((item, 0.0)) for _ in range(8))
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(4):
            assert pool.give((item, 0.0))
        assert all(done.acquire(timeout=5.0) for _ in range(4))
    pool.stop()


def test_threads_end_when_they_are_not_needed(wait_for: Callable[..., None]) -> None:
    go_on = threading.Event()

    def work(client: socket.socket, since: float) -> None:
        go_on.wait(10.0)

    pool = _Pool(work, most=40)
    with socket.socket() as item:
        assert all(pool.give((item, 0.0)) for _ in range(40))
        assert not pool.give((item, 0.0))
        go_on.set()
        wait_for(lambda: len(pool._threads) == KEPT_THREADS == pool._idle, 5.0, "the others to end")
        assert all(pool.give((item, 0.0)) for _ in range(40))
    pool.stop()


@pytest.mark.parametrize("wire", ["own"])
def test_a_fault_in_negotiation_takes_no_association_from_the_others(
    serve: Callable[..., Any], raw_peer: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    node = serve(max_associations=1)
    with monkeypatch.context() as patched:
        patched.setattr(server_module, "answer_request", lambda *_, **__: 1 / 0)
        peer = raw_peer(node.port)
        assert peer.associate([(1, CT, [EXPLICIT])])[0] == 7
        peer.close()
    wait_for(lambda: not node.server.active_associations, 5.0, "its end")
    assert raw_peer(node.port).associate([(1, CT, [EXPLICIT])])[0] == 2


@pytest.mark.parametrize("wire", ["own"])
def test_a_connection_that_comes_up_while_the_server_stops_is_not_served(serve: Callable[..., Any]) -> None:
    node = serve()
    node.server.stop(1.0)
    ours, theirs = connected()
    with theirs:
        theirs.sendall(associate_request())
        theirs.shutdown(socket.SHUT_WR)
        node.server._converse(ours, time.monotonic())
        assert theirs.recv(64) == b""


def test_the_first_pdu_must_be_there_in_time_since_the_connection_was_made() -> None:
    ours, theirs = connected()
    began = time.monotonic()
    association = Association(
        ours,
        Connection(Side.ACCEPTOR),
        Buffers(),
        max_data_set_bytes=1,
        idle_timeout_s=60.0,
        opened_at=began - FIRST_PDU_S + 0.1,
    )
    with theirs:
        theirs.sendall(b"\1")
        with pytest.raises(AssociationLost):
            association.next_event(60.0)
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("wire", ["own"])
def test_a_peer_in_the_middle_of_an_object_is_told_when_the_node_ends_it(
    serve: Callable[..., Any], raw_peer: Any, wait_for: Callable[..., None]
) -> None:
    node = serve()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    ended = threading.Event()

    def stream() -> None:
        while not ended.is_set():
            peer.send_fragment(1, 0, bytes(16384))

    streaming = threading.Thread(target=stream)
    streaming.start()
    wait_for(lambda: node.server._living()[0].serving, 5.0, "the object to begin")
    node.server._living()[0].interrupt()
    ended.set()
    streaming.join()
    assert peer.read_pdu()[0] == 7
    node.counted.wait_for(lambda c: c.ended)
    assert node.association_ends() == [("aborted", 0)]


class Stalled:
    """A sink that stands still when it is told to, in the middle of an object."""

    def __init__(self) -> None:
        self.came, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def accept(self, *, fragments: Any, **_: Any) -> StoreResult:
        for _ in fragments:
            self.came.release()
            assert self.go_on.acquire(timeout=10.0)
        return StoreResult(status=0, outcome=StoreOutcome.NEW)


@pytest.mark.parametrize("wire", ["own"])
def test_a_pdu_is_not_late_because_the_disk_was(
    serve: Callable[..., Any], raw_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.dimse.association.PDU_S", 0.6)
    sink = Stalled()
    peer = raw_peer(serve(sink=sink).port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, **STORE_RQ, MessageID=1, AffectedSOPInstanceUID="1.2.3")
    peer.socket.sendall(struct.pack(">BBIIBB", 4, 0, 36, 32, 1, 2) + bytes(10))
    assert sink.came.acquire(timeout=5.0)
    sink.go_on.release()
    peer.socket.sendall(bytes(10))
    assert sink.came.acquire(timeout=5.0)
    time.sleep(0.8)
    sink.go_on.release()
    time.sleep(0.1)
    peer.socket.sendall(bytes(10))
    sink.go_on.release()
    assert peer.read_command().Status == 0


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=10.0)
        return listener.accept()[0], theirs


def associate_request() -> bytes:
    """An A-ASSOCIATE-RQ that the node would accept."""
    context = ProposedContext(context_id=1, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,))
    user = UserInformation(maximum_length=0, implementation_class_uid="1.2.3")
    return encode_pdu(
        AssociateRQ(called_ae_title="DICOM_NODE", calling_ae_title="TEST", contexts=(context,), user=user)
    )


# --- operations


def role_item(sop_class_uid: str) -> bytes:
    """A role selection item: this requestor is SCP too (PS3.7 D.3.3.4)."""
    uid = sop_class_uid.encode()
    body = len(uid).to_bytes(2, "big") + uid + bytes((1, 1))
    return bytes((0x54, 0)) + len(body).to_bytes(2, "big") + body


def study_keys(path: Path) -> bytes:
    """The identifier that names the file's study, Explicit VR Little Endian."""
    uid = str(dcmread(path, stop_before_pixels=True).StudyInstanceUID).encode()
    uid += b"\0" * (len(uid) % 2)
    return b"\x08\x00\x52\x00CS\x06\x00STUDY \x20\x00\x0d\x00UI" + len(uid).to_bytes(2, "little") + uid


@pytest.mark.parametrize("answer", ["late", "twice"])
def test_a_requester_that_leaves_a_sub_operation_unanswered_is_told_at_once_that_it_is_over(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], data_set_bytes: Any, answer: str
) -> None:
    node = serve(delivery={"response_timeout_s": 0.5})
    study = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.1"}
    paths = [make_file(**study), make_file(**study)]
    peer = raw_peer(node.port)
    contexts = [(1, CT, [EXPLICIT]), (3, STUDY_ROOT_GET, [EXPLICIT])]
    assert peer.associate(contexts, user=role_item(CT))[0] == 2
    for number, path in enumerate(paths, start=1):
        peer.send_command(1, data_set_bytes(path), **STORE_RQ, MessageID=number, AffectedSOPInstanceUID=path.stem)
        assert peer.read_command().Status == 0
    peer.send_command(
        *(3, study_keys(paths[0])),
        **{"CommandField": 0x10, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": STUDY_ROOT_GET},
        MessageID=9,
    )
    asked = peer.read_command()
    assert asked.CommandField == 0x0001
    for _ in range(2 if answer == "twice" else 0):
        peer.send_command(
            1, CommandField=0x8001, MessageIDBeingRespondedTo=asked.MessageID, CommandDataSetType=0x0101, Status=0
        )
    peer.socket.settimeout(8.0)
    kinds = []
    while (kind := peer.read_pdu()[0]) == 4:
        kinds.append(kind)
    assert kind in (0, 7)
    node.counted.wait_for(lambda c: c.ended)


def test_a_cancel_is_heard_after_any_number_of_others(
    serve: Callable[..., Any],
    raw_peer: Any,
    make_file: Callable[..., Path],
    data_set_bytes: Any,
    wait_for: Callable[..., None],
) -> None:
    node = serve()
    path = make_file()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT]), (3, STUDY_ROOT_FIND, [EXPLICIT])])
    peer.send_command(1, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
    assert peer.read_command().Status == 0
    find = {"CommandField": 0x20, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": STUDY_ROOT_FIND}
    for number in range(100, 200):  # each comes when its operation is over, or never was
        peer.send_command(3, CommandField=0x0FFF, MessageIDBeingRespondedTo=number, CommandDataSetType=0x0101)
    real = node.catalog.index.find_pages
    asked, sent = threading.Event(), threading.Event()

    def slow(query: Any) -> Any:
        asked.set()
        assert sent.wait(10.0)
        for page in real(query):
            wait_for(lambda: node.server._living()[-1].is_cancelled(300), 5.0, "the cancel to arrive")
            yield page

    node.catalog.index.find_pages = slow
    peer.send_command(3, study_keys(path), **find, MessageID=300)
    assert asked.wait(10.0)
    peer.send_command(3, CommandField=0x0FFF, MessageIDBeingRespondedTo=300, CommandDataSetType=0x0101)
    sent.set()
    assert peer.read_command().Status == 0xFE00


@pytest.mark.parametrize("wire", ["own"])
def test_a_request_that_crosses_the_abort_of_an_idle_association_leaves_its_sender_something_to_do(
    serve: Callable[..., Any], raw_peer: Any, make_file: Callable[..., Path], data_set_bytes: Any
) -> None:
    node = serve(association_idle_timeout_s=0.3)
    path = make_file()
    peer = raw_peer(node.port)
    peer.associate([(1, CT, [EXPLICIT])])
    peer.send_command(1, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
    assert peer.read_command().Status == 0
    assert peer.read_pdu()[0] == 7
    peer.send_command(1, **STORE_RQ, MessageID=2, AffectedSOPInstanceUID="1.2.3")
    node.counted.wait_for(lambda c: c.ended)
    assert node.association_ends() == [("aborted", 0)]
