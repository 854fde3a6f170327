"""What comes over the wire: PDUs, messages, command sets, TLS records (PS3.8, PS3.7)."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

from dicom_node.dimse.commands import CommandField, encode_command
from dicom_node.dimse.messages import BadMessage, Command, CommandReceived, DataSetPiece, MessageReader, read_command
from dicom_node.dimse.tls_stream import TlsStream
from dicom_node.dimse.upper_layer.connection import (
    AssociationRequested,
    Connection,
    Data,
    Limits,
    ReleaseAsked,
    Side,
    data_header,
)
from dicom_node.dimse.upper_layer.pdus import (
    Abort,
    AnsweredContext,
    AssociateAC,
    AssociateRJ,
    AssociateRQ,
    AsynchronousWindow,
    CommonExtendedNegotiation,
    ExtendedNegotiation,
    ProposedContext,
    ReleaseRP,
    ReleaseRQ,
    RoleSelection,
    UserIdentity,
    UserInformation,
    decode_pdu,
    encode_pdu,
)
from dicom_node.dimse.upper_layer.states import TRANSITIONS, Event, State

from ._target import Input, Target

__all__ = ["TARGETS"]

VERIFICATION, IMPLICIT = "1.2.840.10008.1.1", "1.2.840.10008.1.2"
LIMITS = Limits(pdu_bytes=512, association_bytes=2048, slack_bytes=16)
MAX_COMMAND = 256


# --- the upper layer -------------------------------------------------------------------------------------------------

Told = list[tuple[object, ...]]


def _answer(request: AssociateRQ) -> AssociateAC:
    return AssociateAC(
        called_ae_title=request.called_ae_title.encode("ascii", "replace").decode(),
        calling_ae_title=request.calling_ae_title.encode("ascii", "replace").decode(),
        contexts=tuple(
            AnsweredContext(context_id=each.context_id, result=index % 2, transfer_syntax=IMPLICIT)
            for index, each in enumerate(request.contexts)
        ),
        user=UserInformation(maximum_length=LIMITS.pdu_bytes, implementation_class_uid="1.2.3"),
    )


def _request() -> AssociateRQ:
    context = ProposedContext(context_id=1, abstract_syntax=VERIFICATION, transfer_syntaxes=(IMPLICIT,))
    user = UserInformation(
        maximum_length=16384,
        implementation_class_uid="1.2.3",
        implementation_version_name="FUZZ",
        asynchronous_window=AsynchronousWindow(invoked=1, performed=1),
        roles=(RoleSelection(sop_class_uid=VERIFICATION, scu=True, scp=True),),
        extended=(ExtendedNegotiation(sop_class_uid=VERIFICATION, application_information=b"\1\1"),),
        common_extended=(
            CommonExtendedNegotiation(
                sop_class_uid=VERIFICATION,
                service_class_uid="1.2.840.10008.4.2",
                related_general_sop_class_uids=("1.2",),
            ),
        ),
        identity=UserIdentity(kind=2, primary=b"name", secondary=b"pass", response_requested=True),
    )
    return AssociateRQ(called_ae_title="NODE", calling_ae_title="FUZZ", contexts=(context,), user=user)


class _Driven:
    """A connection whose driver does at each event what the input's first bytes say; tells what was to be seen."""

    def __init__(self, policy: int) -> None:
        self._rejects, self._answers, self._leaves = policy & 2, not policy & 4, policy & 8
        self.connection = Connection(Side.REQUESTOR if policy & 1 else Side.ACCEPTOR, LIMITS)
        self.told: Told = []
        self.sent = b""
        self._values: dict[tuple[int, bool], bytes] = {}
        if policy & 1:
            self.connection.request(_request())
        self._check()

    def receive(self, received: bytes) -> None:
        for event in self.connection.receive(memoryview(received)):
            if isinstance(event, Data):
                assert len(event.content) <= len(received)
                self._value(event)
            else:
                self.told.append((type(event).__name__, event))
            if isinstance(event, AssociationRequested):
                self._decide(event.request)
            elif isinstance(event, ReleaseAsked) and self._answers:
                self.connection.answer_release()
            self._check()
        self._check()

    def _value(self, data: Data) -> None:
        """Pieces of one value are one: where they were cut depends on how the bytes came."""
        key = (data.context_id, data.is_command)
        self._values[key] = self._values.get(key, b"") + bytes(data.content)
        if data.last:
            self.told.append(("Data", key, self._values.pop(key)))
            if self._leaves and self.connection.state is State.STA6:
                self.connection.release()

    def _decide(self, request: AssociateRQ) -> None:
        if self._rejects:
            self.connection.reject(AssociateRJ(result=1, source=1, reason=1))
        elif all(len(each) <= 16 for each in (request.called_ae_title, request.calling_ae_title)):
            self.connection.accept(_answer(request))
        else:
            self.connection.abort()

    def _check(self) -> None:
        connection = self.connection
        assert connection.state in State
        assert len(connection._reader._body) <= LIMITS.association_bytes
        assert len(connection._reader._head) < 6
        if connection.state is State.STA13:
            assert connection.artim_running, "nothing would ever close this connection"
        assert connection.closing or connection.state is not State.STA1
        self.sent += connection.to_send()


def _check_sent(sent: bytes) -> None:
    """Whole PDUs of the types an upper layer sends, at most one of each but the A-ABORT."""
    kinds = []
    while sent:
        kind, length = struct.unpack_from(">BxI", sent)
        decoded = decode_pdu(kind, sent[6 : 6 + length])
        assert isinstance(decoded, AssociateRQ | AssociateAC | AssociateRJ | ReleaseRQ | ReleaseRP | Abort)
        assert len(sent) >= 6 + length
        kinds.append(kind)
        sent = sent[6 + length :]
    assert all(kinds.count(kind) <= 1 for kind in kinds if kind != 7), kinds
    assert 7 not in kinds or set(kinds[kinds.index(7) :]) == {7}, "something was sent after an A-ABORT"


def upper_layer(data: bytes) -> None:
    """Bytes in, events out: nothing is raised, nothing grows, every state is one of the table.

    What is seen does not depend on how the bytes were cut.
    """
    source = Input(data)
    policy, step, ending = source.byte(), source.byte() + 1, source.byte()
    stream = source.rest()
    whole, pieces = _Driven(policy), _Driven(policy)
    whole.receive(stream)
    for start in range(0, len(stream), step):
        pieces.receive(stream[start : start + step])
    assert whole.told == pieces.told
    assert whole.connection.state is pieces.connection.state
    assert whole.sent == pieces.sent
    _check_sent(whole.sent)
    _end(whole.connection, ending)


def _end(connection: Connection, ending: int) -> None:
    if ending & 1:
        connection.artim_expired()
    if ending & 2:
        connection.abort()
    if ending & 4 and (Event.ABORT_REQUEST, connection.state) in TRANSITIONS:
        connection.refuse()
    list(connection.receive_end())
    _check_sent(connection.to_send())
    assert connection.closing or connection.state is State.STA1


def _streams(_: Path | None) -> Iterator[bytes]:
    request = encode_pdu(_request())
    release, released, abort = encode_pdu(ReleaseRQ()), encode_pdu(ReleaseRP()), encode_pdu(Abort(source=0))
    echo = _value(_echo(), True)
    cut = _echo()
    pieces = data_header(1, is_command=True, last=False, length=10) + cut[:10]
    pieces += data_header(1, is_command=True, last=True, length=len(cut) - 10) + cut[10:]
    accepted = encode_pdu(_answer(_request()))
    yield bytes([0, 7, 0]) + request + echo + release
    yield bytes([0, 2, 0]) + request + pieces + release
    yield bytes([0, 30, 2]) + request + echo + abort
    yield bytes([2, 1, 1]) + request
    yield bytes([8, 40, 0]) + request + echo + released
    yield bytes([12, 40, 0]) + request + echo + release + released
    yield bytes([1, 50, 0]) + accepted + echo
    yield bytes([9, 5, 0]) + accepted + echo + release + released
    yield bytes([1, 50, 0]) + encode_pdu(AssociateRJ(result=2, source=3, reason=2))


def _value(content: bytes, is_command: bool) -> bytes:
    return data_header(1, is_command=is_command, last=True, length=len(content)) + content


def _echo() -> bytes:
    return encode_command(
        {"AffectedSOPClassUID": VERIFICATION, "CommandField": 0x30, "MessageID": 1, "CommandDataSetType": 0x0101}
    )


def _store() -> bytes:
    return encode_command(
        {
            **{"AffectedSOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "CommandField": CommandField.C_STORE},
            **{"MessageID": 7, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPInstanceUID": "1.2.3"},
        }
    )


# --- messages and command sets ---------------------------------------------------------------------------------------


def messages(data: bytes) -> None:
    """Values in, command sets and data sets out; a data set only after the command set that announced it."""
    source, reader = Input(data), MessageReader(max_command_bytes=MAX_COMMAND)
    in_data_set, last = False, False
    while source:
        context_id, control = source.byte() % 4, source.byte()
        content = memoryview(source.taken(source.number(2) % 512))
        value = Data(context_id, bool(control & 1), content, bool(control & 2))
        try:
            found = reader.feed(value)
        except BadMessage:
            return
        assert len(reader._command) <= MAX_COMMAND
        for each in found:
            if isinstance(each, CommandReceived):
                assert value.is_command and not in_data_set
                in_data_set, last = each.command.has_data_set, False
            else:
                assert isinstance(each, DataSetPiece) and in_data_set and not value.is_command
                last = each.last
                in_data_set = not last
        if found:
            assert reader.under_way == in_data_set


def _values(_: Path | None) -> Iterator[bytes]:
    for command, data_set in ((_echo(), b""), (_store(), b"\x08\0\x16\0\4\0\0\x001.2\0")):
        for at in (len(command), 10):
            parts = [
                (3 if at == len(command) else 1, command[:at]),
                (3, command[at:]),
                (0, data_set[:4]),
                (2, data_set[4:]),
            ]
            yield b"".join(bytes((1, control)) + struct.pack(">H", len(part)) + part for control, part in parts if part)


def command_sets(data: bytes) -> None:
    """A command set, or BadMessage: nothing is lost of it, and each value is one of its kind or BadMessage."""
    try:
        command = read_command(data)
    except BadMessage:
        return
    again = b"".join(struct.pack("<HHI", 0, number, len(raw)) + raw for number, raw in command.elements.items())
    assert again == data
    for read in _READS:
        try:
            value = read(command)
        except BadMessage:
            continue
        assert value is None or isinstance(value, str | bool) or (isinstance(value, int) and value <= 0xFFFF)


_READS: tuple[Callable[[Command], object], ...] = (
    *(lambda one: one.field, lambda one: one.message_id, lambda one: one.responded_to, lambda one: one.status),
    *(lambda one: one.has_data_set, lambda one: one.text(2), lambda one: one.text(0x0902), lambda one: one.number(8)),
)


# --- TLS -------------------------------------------------------------------------------------------------------------


@cache
def _server_context() -> ssl.SSLContext:
    """Of a server with a certificate of its own, and nobody else's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = os.path.join(folder, "c"), os.path.join(folder, "k")
        words = ["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=fuzz", "-newkey", "ec", "-pkeyopt"]
        words += ["ec_paramgen_curve:prime256v1", "-keyout", key, "-out", certificate]
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
        context.load_cert_chain(certificate, key)
    return context


def tls_front(data: bytes) -> None:
    """What a stranger says instead of a handshake: OSError or patience, never anything else, never a wait."""
    ours, theirs = socket.socketpair()
    with closing(theirs), closing(TlsStream(ours, _server_context())) as stream:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            while not stream.shake():
                pass
        except OSError:
            return
        raise AssertionError("hands were shaken with somebody who knows no key")


def _hellos(_: Path | None) -> Iterator[bytes]:
    context = ssl._create_unverified_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="node")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        hello = outgoing.read()
    yield hello
    yield hello[: len(hello) // 2]
    yield encode_pdu(_request())
    yield b"\x15\x03\x01\x00\x02\x02\x28"


TARGETS = (
    Target(name="upper-layer", run=upper_layer, seeds=_streams),
    Target(name="messages", run=messages, seeds=_values),
    Target(name="command-sets", run=command_sets, seeds=lambda _: (_echo(), _store())),
    Target(name="tls-front", run=tls_front, seeds=_hellos),
)
