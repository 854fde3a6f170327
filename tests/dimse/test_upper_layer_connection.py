"""The upper layer without I/O: whole lives of associations, every PDU in every state, bytes in any pieces."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node.dimse.upper_layer.connection import (
    Aborted,
    Associated,
    AssociationRefused,
    AssociationRequested,
    Connection,
    ConnectionLost,
    Data,
    Limits,
    ProtocolError,
    ReleaseAsked,
    Released,
    Side,
    UpperEvent,
    UpperLayerMisuse,
    data_header,
)
from dicom_node.dimse.upper_layer.pdus import (
    Abort,
    AnsweredContext,
    AssociateAC,
    AssociateRJ,
    AssociateRQ,
    Pdu,
    ProposedContext,
    ReleaseRP,
    ReleaseRQ,
    UserInformation,
    encode_pdu,
)
from dicom_node.dimse.upper_layer.states import TRANSITIONS, Action, Event, State

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
USER = UserInformation(maximum_length=16384, implementation_class_uid="1.2.3")
RQ = AssociateRQ(
    called_ae_title="NODE",
    calling_ae_title="CT1",
    contexts=(ProposedContext(context_id=1, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,)),),
    user=USER,
)
AC = AssociateAC(
    called_ae_title="NODE",
    calling_ae_title="CT1",
    contexts=(AnsweredContext(context_id=1, result=0, transfer_syntax=EXPLICIT),),
    user=USER,
)
RJ = AssociateRJ(result=1, source=1, reason=7)
ABORT = Abort(source=0)


def value(content: bytes, *, last: bool = True, is_command: bool = False, context_id: int = 1) -> bytes:
    return data_header(context_id, is_command=is_command, last=last, length=len(content)) + content


def events(connection: Connection, received: bytes) -> list[UpperEvent]:
    return list(connection.receive(memoryview(received)))


def got(connection: Connection, pdu: Pdu) -> list[UpperEvent]:
    return events(connection, encode_pdu(pdu))


def in_state(state: State) -> Connection:
    """A connection that was brought there by what can happen."""
    side = Side.REQUESTOR if state in (State.STA5, State.STA9, State.STA11) else Side.ACCEPTOR
    connection = Connection(side)
    if side is Side.REQUESTOR:
        connection.request(RQ)
        if state is not State.STA5:
            got(connection, AC)
    elif state is not State.STA2:
        got(connection, RQ)
        if state is not State.STA3:
            connection.accept(AC)
    steps: dict[State, list[Callable[[], object]]] = {
        State.STA7: [connection.release],
        State.STA8: [lambda: got(connection, ReleaseRQ())],
        State.STA9: [connection.release, lambda: got(connection, ReleaseRQ())],
        State.STA10: [connection.release, lambda: got(connection, ReleaseRQ())],
        State.STA11: [connection.release, lambda: got(connection, ReleaseRQ()), connection.answer_release],
        State.STA12: [connection.release, lambda: got(connection, ReleaseRQ()), lambda: got(connection, ReleaseRP())],
        State.STA13: [connection.abort],
    }
    for step in steps.get(state, []):
        step()
    connection.to_send()
    assert connection.state is state
    return connection


REACHED = [state for state in State if state not in (State.STA1, State.STA4)]
NEXT_OF_COLLISION = {Side.REQUESTOR: State.STA9, Side.ACCEPTOR: State.STA10}


@pytest.mark.parametrize("state", REACHED)
@pytest.mark.parametrize(
    ("event", "received"),
    [
        (Event.ASSOCIATE_RQ, encode_pdu(RQ)),
        (Event.ASSOCIATE_AC, encode_pdu(AC)),
        (Event.ASSOCIATE_RJ, encode_pdu(RJ)),
        (Event.P_DATA_TF, value(b"x")),
        (Event.RELEASE_RQ, encode_pdu(ReleaseRQ())),
        (Event.RELEASE_RP, encode_pdu(ReleaseRP())),
        (Event.ABORT, encode_pdu(ABORT)),
        (Event.INVALID_PDU, b"\x99\0\0\0\0\x04abcd"),
    ],
)
def test_each_pdu_in_each_state_does_what_the_table_says(state: State, event: Event, received: bytes) -> None:
    connection = in_state(state)
    found = events(connection, received)
    sent = connection.to_send()
    action = TRANSITIONS[event, state]
    expected: dict[Action, tuple[State, list[type], bytes]] = {
        Action.AE_3: (State.STA6, [Associated], b""),
        Action.AE_4: (State.STA1, [AssociationRefused], b""),
        Action.AE_6: (State.STA3, [AssociationRequested], b""),
        Action.DT_2: (State.STA6, [Data], b""),
        Action.AR_2: (State.STA8, [ReleaseAsked], b""),
        Action.AR_3: (State.STA1, [Released], b""),
        Action.AR_6: (State.STA7, [Data], b""),
        Action.AR_8: (State.STA10, [ReleaseAsked], b""),
        Action.AR_10: (State.STA12, [Released], b""),
        Action.AA_1: (State.STA13, [ProtocolError], encode_pdu(Abort(source=0))),
        Action.AA_2: (State.STA1, [], b""),
        Action.AA_3: (State.STA1, [Aborted], b""),
        Action.AA_6: (State.STA13, [], b""),
    }
    if action in expected:
        assert (connection.state, [type(item) for item in found], sent) == expected[action]
    else:
        assert action in (Action.AA_7, Action.AA_8) and connection.state is State.STA13
        assert sent[0] == 7 and sent[8] == 2  # an A-ABORT of the upper layer
        assert [type(item) for item in found] == ([ProtocolError] if action is Action.AA_8 else [])
    assert connection.closing == (connection.state is State.STA1)


@pytest.mark.parametrize("state", REACHED)
def test_a_transport_that_closes_is_told_where_something_was_under_way(state: State) -> None:
    connection = in_state(state)
    found = list(connection.receive_end())
    assert connection.state is State.STA1 and connection.closing and not connection.artim_running
    assert found == ([] if state in (State.STA2, State.STA13) else [ConnectionLost()])
    assert list(connection.receive_end()) == []


@pytest.mark.parametrize("state", REACHED)
def test_an_abort_of_ours_goes_out_once_and_the_peer_is_to_close(state: State) -> None:
    connection = in_state(state)
    connection.abort()
    connection.abort()
    sent = connection.to_send()
    if state in (State.STA2, State.STA13):  # nothing to abort
        assert sent == b"" and connection.state is state
        return
    assert sent == encode_pdu(ABORT) and connection.artim_running
    connection.artim_expired()
    assert connection.closing and connection.state is State.STA1


def test_a_life_from_request_to_release() -> None:
    ours, theirs = Connection(Side.REQUESTOR), Connection(Side.ACCEPTOR)
    assert theirs.artim_running  # the first PDU must come
    ours.request(RQ)
    assert events(theirs, ours.to_send()) == [AssociationRequested(RQ)]
    assert not theirs.artim_running and not theirs.established
    theirs.accept(AC)
    assert events(ours, theirs.to_send()) == [Associated(AC)] and ours.established
    ours.sends_data()
    (data,) = events(theirs, value(b"command", is_command=True))
    assert isinstance(data, Data) and data.is_command and data.last and bytes(data.content) == b"command"
    ours.release()
    assert events(theirs, ours.to_send()) == [ReleaseAsked()]
    theirs.sends_data()  # what it was at may still be answered
    theirs.answer_release()
    assert events(ours, theirs.to_send()) == [Released()]
    assert ours.closing and theirs.artim_running and not theirs.closing
    assert list(theirs.receive_end()) == [] and theirs.closing


def test_two_that_release_at_once_both_end_released() -> None:
    ours, theirs = Connection(Side.REQUESTOR), Connection(Side.ACCEPTOR)
    ours.request(RQ)
    events(theirs, ours.to_send())
    theirs.accept(AC)
    events(ours, theirs.to_send())
    ours.release()
    theirs.release()
    to_them, to_us = ours.to_send(), theirs.to_send()
    assert events(ours, to_us) == [ReleaseAsked()] and events(theirs, to_them) == [ReleaseAsked()]
    theirs.answer_release()  # too early: it goes out when the requestor's answer is there
    assert theirs.to_send() == b""
    ours.answer_release()
    assert events(theirs, ours.to_send()) == [Released()]
    assert events(ours, theirs.to_send()) == [Released()] and ours.closing


def test_a_rejection_ends_it_on_both_sides() -> None:
    ours, theirs = Connection(Side.REQUESTOR), Connection(Side.ACCEPTOR)
    ours.request(RQ)
    events(theirs, ours.to_send())
    theirs.reject(RJ)
    assert events(ours, theirs.to_send()) == [AssociationRefused(RJ)] and ours.closing
    assert theirs.artim_running


def test_a_protocol_of_another_version_is_rejected() -> None:
    theirs = Connection(Side.ACCEPTOR)
    wire = bytearray(encode_pdu(RQ))
    wire[6:8] = b"\x00\x02"
    (found,) = events(theirs, bytes(wire))
    assert isinstance(found, ProtocolError)
    assert theirs.to_send() == encode_pdu(AssociateRJ(result=1, source=2, reason=2))


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        (b"\x04\x00\x7f\xff\xff\xff", 6),  # longer than was agreed
        (b"\x04\x00\x00\x00\x00\x05hello", 6),
        (b"\x04\x00\x00\x00\x00\x07\x00\x00\x00\x09\x01\x02x", 6),  # the value is longer than its PDU
        (b"\x04\x00\x00\x00\x00\x07\x00\x00\x00\x01\x01\x02x", 6),
        (b"\x04\x00\x00\x00\x00\x09\x00\x00\x00\x03\x01\x02xyz", 6),  # two bytes are left over
        (value(b"x", context_id=3), 6),  # nobody accepted that
        (b"\x08\x00\x00\x00\x00\x04abcd", 1),
        (b"\x01\x00\xff\xff\xff\xff", 6),
    ],
)
def test_what_breaks_the_protocol_is_aborted_and_nothing_is_heard_after_it(received: bytes, reason: int) -> None:
    connection = in_state(State.STA6)
    found = events(connection, received + value(b"more"))
    assert [type(item) for item in found] == [ProtocolError]
    assert connection.to_send() == encode_pdu(Abort(source=2, reason=reason))
    assert events(connection, value(b"more") + encode_pdu(RQ)) == [] and connection.to_send() == b""
    assert connection.state is State.STA13 and connection.artim_running


def test_what_the_driver_may_not_do_is_said() -> None:
    connection = in_state(State.STA7)
    with pytest.raises(UpperLayerMisuse):
        connection.sends_data()
    with pytest.raises(UpperLayerMisuse):
        connection.release()
    with pytest.raises(UpperLayerMisuse):
        in_state(State.STA2).accept(AC)
    with pytest.raises(UpperLayerMisuse):
        Connection(Side.ACCEPTOR).request(RQ)


def _pieces(stream: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, end in pairwise(edges):
        yield stream[start:end]


STREAM = (
    value(b"c" * 30, is_command=True)
    + value(b"d" * 100, last=False)
    # two values in one PDU, an empty one, and one that ends
    + b"\x04\x00\x00\x00\x00\x1b\x00\x00\x00\x05\x01\x00abc\x00\x00\x00\x02\x01\x00\x00\x00\x00\x08\x01\x02defghi"
    + encode_pdu(ReleaseRQ())
)


@settings(max_examples=150)
@given(st.lists(st.integers(0, 400), max_size=30))
def test_however_the_bytes_are_cut_the_same_is_heard(cuts: list[int]) -> None:
    connection = in_state(State.STA6)
    heard: list[object] = []
    for piece in _pieces(STREAM, cuts):
        for event in connection.receive(memoryview(piece)):
            if isinstance(event, Data):
                heard += [(event.is_command, byte) for byte in bytes(event.content)]
                heard += ["last"] if event.last else []
            else:
                heard.append(event)
    expected: list[object] = [(True, ord("c"))] * 30 + ["last"] + [(False, ord("d"))] * 100
    expected += [(False, byte) for byte in b"abcdefghi"] + ["last", ReleaseAsked()]
    assert heard == expected


@settings(max_examples=400)
@given(
    st.sampled_from(REACHED),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([encode_pdu(p) for p in (RQ, AC, RJ, ReleaseRQ(), ReleaseRP(), ABORT)]),
            st.binary(max_size=20).map(value),
        ),
        max_size=6,
    ),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_no_bytes_in_any_state_raise_or_say_more_than_an_abort(
    state: State, parts: list[bytes], cuts: list[int]
) -> None:
    connection = in_state(state)
    ends = 0
    for piece in _pieces(b"".join(parts), cuts):
        for event in connection.receive(memoryview(piece)):
            ends += isinstance(event, Aborted | ProtocolError)
            if isinstance(event, AssociationRequested):
                connection.accept(AC)
            elif isinstance(event, ReleaseAsked):
                connection.answer_release()
    list(connection.receive_end())
    assert ends <= 1 and connection.state is State.STA1


def test_a_large_pdu_is_passed_on_without_being_kept() -> None:
    connection = Connection(Side.ACCEPTOR, Limits(pdu_bytes=2**31))
    got(connection, RQ)
    connection.accept(AC)
    events(connection, data_header(1, is_command=False, last=True, length=2**31 - 100))
    block = memoryview(bytes(65536))
    (piece,) = connection.receive(block)
    assert isinstance(piece, Data) and piece.content.obj is block.obj and not piece.last
