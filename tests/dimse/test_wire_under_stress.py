"""What a wire must stand: connections that come and go at the wrong moment, operations that are left unanswered."""

import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.dimse import lobby as lobby_module
from dicom_node.dimse import server as server_module
from dicom_node.dimse.association import Association
from dicom_node.dimse.link import FIRST_PDU_S, AssociationLost
from dicom_node.dimse.lobby import KEPT_THREADS, Lobby, Visit
from dicom_node.dimse.transport import Buffers
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


@pytest.fixture
def lobby() -> Iterator[Callable[..., tuple[Lobby, tuple[str, int]]]]:
    """`lobby(serve, most)`: a lobby that is open, and its address; ended with the test."""
    with ExitStack() as stack:

        def make(serve: Callable[[Visit], None], most: int) -> tuple[Lobby, tuple[str, int]]:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.setblocking(False)

            made = Lobby(
                serve=serve, turn_away=read_and_close, drop=read_and_close, is_busier=lambda _: False, most=most
            )
            made.open(listener)
            stack.callback(made.stop)
            return made, listener.getsockname()

        yield make


def read_and_close(visit: Visit) -> None:
    """Closing over unread bytes would be a reset."""
    with visit.sock:
        visit.sock.setblocking(False)
        with suppress(BlockingIOError):
            visit.sock.recv(16)


def test_whoever_has_waited_longest_without_a_word_makes_room_for_another(
    lobby: Any,
) -> None:
    spoken: queue.SimpleQueue[Visit] = queue.SimpleQueue()
    made, address = lobby(spoken.put, 4)
    made._most_silent = 1
    with socket.create_connection(address, timeout=5.0) as first, socket.create_connection(address) as second:
        assert first.recv(1) == b""
        second.sendall(b"\1")
        visit = spoken.get(timeout=5.0)
        assert visit.sock.getpeername() == second.getsockname()
        visit.sock.close()


def test_a_thread_that_cannot_be_had_costs_one_connection_and_no_more(
    lobby: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, go_on = threading.Semaphore(0), threading.Event()

    def serve(visit: Visit) -> None:
        served.release()
        go_on.wait(10.0)
        visit.sock.close()

    made, address = lobby(serve, 9)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with ExitStack() as stack:

        def speak() -> socket.socket:
            peer = stack.enter_context(socket.create_connection(address, timeout=5.0))
            peer.sendall(b"\1")
            return peer

        for _ in range(KEPT_THREADS - 1):
            speak()
            assert served.acquire(timeout=5.0)
        assert speak().recv(1) == b""  # the last one sees who else comes
        monkeypatch.setattr(threading.Thread, "start", start)
        speak()
        assert served.acquire(timeout=5.0)
        assert made.threads == KEPT_THREADS + 1
        go_on.set()


def test_threads_end_when_they_are_not_needed_and_an_association_waits_for_one(
    lobby: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    monkeypatch.setattr(lobby_module, "SPARE_S", 0.1)
    served, go_on = threading.Semaphore(0), threading.Event()

    def serve(visit: Visit) -> None:
        served.release()
        go_on.wait(10.0)
        if visit.since:
            visit.since = 0.0
            made.keep(visit, time.monotonic() + 60.0)
        else:
            read_and_close(visit)

    made, address = lobby(serve, 20)
    with ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(address, timeout=5.0)) for _ in range(19)]
        for peer in peers:
            peer.sendall(b"\1")
        assert all(served.acquire(timeout=5.0) for _ in peers)
        assert made.threads == 20 and made.is_crowded
        go_on.set()
        assert all(peer.recv(1) == b"" for peer in peers)  # each was kept, and served again
        wait_for(lambda: made.threads == KEPT_THREADS, 5.0, "the others to end")
        assert not made.is_crowded


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
        node.server._serve(Visit(ours, "127.0.0.1", time.monotonic()))
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
        while not ended.wait(0.005):  # a peer that hears nothing for half a MiB more is not waited for
            peer.send_fragment(1, 0, bytes(1024))

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
def test_a_pdu_is_not_late_because_the_disk_was(serve: Callable[..., Any], raw_peer: Any) -> None:
    sink = Stalled()
    peer = raw_peer(serve(sink=sink, bounds={"pdu_s": 0.6}).port)
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


@pytest.mark.parametrize("wire", ["own"])
def test_whoever_sends_nonsense_is_named_by_his_address(
    serve: Callable[..., Any], raw_peer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    node = serve()
    raw_peer(node.port).socket.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
    deadline = time.monotonic() + 10
    while not (found := [one for one in caplog.records if "protocol" in one.message]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {vars(one).get("address") for one in found} == {"127.0.0.1"}
