"""PDUs to bytes and back, with pynetdicom as the second opinion, and every way a PDU can be wrong."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ, A_RELEASE_RP, A_RELEASE_RQ

from dicom_node.dimse.upper_layer.pdus import (
    Abort,
    AnsweredContext,
    AssociateAC,
    AssociateRJ,
    AssociateRQ,
    AsynchronousWindow,
    CommonExtendedNegotiation,
    ExtendedNegotiation,
    InvalidPdu,
    Pdu,
    ProposedContext,
    ReleaseRP,
    ReleaseRQ,
    RoleSelection,
    UserIdentity,
    UserInformation,
    decode_pdu,
    encode_pdu,
)
from dicom_node.dimse.upper_layer.states import TRANSITIONS

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"

uids = st.lists(st.integers(0, 99999), min_size=2, max_size=8).map(lambda parts: ".".join(map(str, parts)))
titles = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"), min_size=1, max_size=16)
rqs = st.builds(
    AssociateRQ,
    called_ae_title=titles,
    calling_ae_title=titles,
    contexts=st.lists(
        st.builds(
            ProposedContext,
            context_id=st.integers(0, 127).map(lambda n: 2 * n + 1),
            abstract_syntax=uids,
            transfer_syntaxes=st.lists(uids, min_size=1, max_size=4).map(tuple),
        ),
        min_size=1,
        max_size=6,
    ).map(tuple),
    user=st.builds(
        UserInformation,
        maximum_length=st.integers(0, 2**32 - 1),
        implementation_class_uid=uids,
        implementation_version_name=titles,
        asynchronous_window=st.none()
        | st.builds(AsynchronousWindow, invoked=st.integers(0, 9), performed=st.integers(0, 9)),
        roles=st.lists(st.builds(RoleSelection, sop_class_uid=uids, scu=st.booleans(), scp=st.booleans())).map(tuple),
        extended=st.lists(
            st.builds(
                ExtendedNegotiation, sop_class_uid=uids, application_information=st.binary(min_size=1, max_size=9)
            ),
            max_size=3,
        ).map(tuple),
        common_extended=st.lists(
            st.builds(
                CommonExtendedNegotiation,
                sop_class_uid=uids,
                service_class_uid=uids,
                related_general_sop_class_uids=st.lists(uids, max_size=2).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
        identity=st.none()
        | st.builds(
            UserIdentity,
            kind=st.sampled_from([1, 2, 3, 4, 5]),
            primary=st.binary(min_size=1, max_size=20),
            secondary=st.just(b""),
            response_requested=st.booleans(),
        ),
    ),
)


def a_request(**changes: Any) -> AssociateRQ:
    given_ = {
        "called_ae_title": "NODE",
        "calling_ae_title": "CT1",
        "contexts": (ProposedContext(context_id=1, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,)),),
        "user": UserInformation(maximum_length=16384, implementation_class_uid="1.2.3"),
    }
    return AssociateRQ(**(given_ | changes))  # type: ignore[arg-type]


def body_of(pdu: Pdu) -> bytes:
    encoded = encode_pdu(pdu)
    assert int.from_bytes(encoded[2:6], "big") == len(encoded) - 6
    return encoded[6:]


@settings(max_examples=150)
@given(rqs)
def test_a_request_is_read_as_it_was_written(request: AssociateRQ) -> None:
    assert decode_pdu(1, body_of(request)) == request


@settings(max_examples=100)
@given(rqs)
def test_the_other_library_reads_and_writes_the_same_bytes(request: AssociateRQ) -> None:
    theirs = A_ASSOCIATE_RQ()
    theirs.decode(encode_pdu(request))
    assert (theirs.called_ae_title, theirs.calling_ae_title) == (request.called_ae_title, request.calling_ae_title)
    found = [
        (item.context_id, str(item.abstract_syntax), tuple(str(uid) for uid in item.transfer_syntax))
        for item in theirs.presentation_context
    ]
    assert found == [(c.context_id, c.abstract_syntax, c.transfer_syntaxes) for c in request.contexts]
    assert theirs.user_information.maximum_length == request.user.maximum_length
    roles = [(str(i.uid), bool(i.scu), bool(i.scp)) for i in theirs.user_information.role_selection.values()]
    assert dict((r[0], r[1:]) for r in roles) == {r.sop_class_uid: (r.scu, r.scp) for r in request.user.roles}
    assert decode_pdu(1, theirs.encode()[6:]) == request


def test_the_other_library_agrees_on_the_small_pdus() -> None:
    answer = AssociateAC(
        called_ae_title="NODE",
        calling_ae_title="CT1",
        contexts=(
            AnsweredContext(context_id=1, result=0, transfer_syntax=EXPLICIT),
            AnsweredContext(context_id=3, result=4, transfer_syntax=EXPLICIT),
        ),
        user=UserInformation(maximum_length=0, implementation_class_uid="1.2.3", identity_response=b"ok"),
    )
    for pdu, kind in (
        (answer, A_ASSOCIATE_AC),
        (AssociateRJ(result=2, source=3, reason=2), A_ASSOCIATE_RJ),
        (ReleaseRQ(), A_RELEASE_RQ),
        (ReleaseRP(), A_RELEASE_RP),
        (Abort(source=2, reason=6), A_ABORT_RQ),
    ):
        encoded = encode_pdu(pdu)
        theirs = kind()
        theirs.decode(encoded)
        assert theirs.encode() == encoded
        assert decode_pdu(encoded[0], encoded[6:]) == pdu


def test_the_table_of_transitions_is_the_one_everyone_has() -> None:
    ours = {(f"Evt{event.value}", state.name.title()): action for (event, state), action in TRANSITIONS.items()}
    assert {key: action.name.replace("_", "-") for key, action in ours.items()} == TRANSITION_TABLE


def test_padding_that_must_not_be_there_is_taken_off() -> None:
    body = body_of(a_request()).replace(b"\x00\x19" + CT.encode(), b"\x00\x1a" + CT.encode() + b"\0")
    grown = bytearray(body)
    start = grown.index(b"\x20\x00", 68)
    grown[start + 2 : start + 4] = (int.from_bytes(grown[start + 2 : start + 4], "big") + 1).to_bytes(2, "big")
    found = decode_pdu(1, bytes(grown))
    assert isinstance(found, AssociateRQ) and found.contexts[0].abstract_syntax == CT


def test_items_nobody_knows_are_passed_over() -> None:
    assert decode_pdu(1, body_of(a_request()) + b"\x99\x00\x00\x02xx") == a_request()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(67),
        bytes(68),  # nothing in it
        body_of(a_request())[:-1],
        body_of(a_request()) + b"\x10",
        body_of(a_request()) + b"\x10\x00\x00\x00",  # a second application context
        body_of(a_request()) + b"\x21\x00\x00\x04\x01\x00\x00\x00",  # an answer in a request
        body_of(a_request()) + b"\x20\x00\x00\x02\x01\x00",
        body_of(a_request(contexts=(ProposedContext(context_id=2, abstract_syntax=CT, transfer_syntaxes=("1",)),))),
        body_of(a_request(contexts=(ProposedContext(context_id=1, abstract_syntax=CT, transfer_syntaxes=()),))),
        body_of(a_request()) + b"\x99\x00\x00\x00" * 5000,
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidPdu):
        decode_pdu(1, body)


@pytest.mark.parametrize("item", [b"\x51\x00\x00\x03abc", b"\x54\x00\x00\x01a", b"\x54\x00\x00\x05\x00\x011\x01\x02"])
def test_user_information_of_wrong_lengths_is_refused(item: bytes) -> None:
    body = body_of(a_request())
    start = body.index(b"\x50\x00", 68)
    length = int.from_bytes(body[start + 2 : start + 4], "big") + len(item)
    with pytest.raises(InvalidPdu):
        decode_pdu(1, body[: start + 2] + length.to_bytes(2, "big") + body[start + 4 :] + item)


@settings(max_examples=400)
@given(st.integers(0, 255), st.binary(max_size=300), st.integers(0, 400), st.binary(max_size=4))
def test_no_bytes_raise_anything_else(kind: int, body: bytes, at: int, put: bytes) -> None:
    whole = bytearray(body_of(a_request()))
    whole[at : at + len(put)] = put
    for kind_, body_ in ((kind, body), (1, bytes(whole)), (2, bytes(whole)), (1, bytes(68) + body)):
        try:
            decode_pdu(kind_, body_)
        except InvalidPdu as exc:
            assert exc.abort_reason in (0, 1, 2, 4, 5, 6)


def test_what_cannot_be_written_is_said() -> None:
    with pytest.raises(ValueError, match="16 is the most"):
        encode_pdu(a_request(called_ae_title="A" * 17))


def test_who_the_user_is_is_never_shown() -> None:
    identity = UserIdentity(kind=2, primary=b"secret-name", secondary=b"secret-code")
    assert "secret" not in repr(
        a_request(
            user=UserInformation(
                maximum_length=0, implementation_class_uid="1", identity=identity, identity_response=b"secret"
            )
        )
    )
