"""DIMSE messages out of values: order, bounds, and what a command set may look like."""

from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.dsutils import decode

from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET, encode_command
from dicom_node.dimse.messages import (
    BadMessage,
    Command,
    CommandReceived,
    DataSetPiece,
    MessageReader,
    read_command,
)
from dicom_node.dimse.upper_layer.connection import Data

STORE = encode_command(
    {
        "AffectedSOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "CommandField": 1,
        "MessageID": 7,
        "Priority": 0,
        "CommandDataSetType": WITH_DATA_SET,
        "AffectedSOPInstanceUID": "1.2.3",
    }
)
ECHO = encode_command({"CommandField": 0x30, "MessageID": 8, "CommandDataSetType": NO_DATA_SET})


def piece(content: bytes, *, is_command: bool, last: bool = True, context_id: int = 1) -> Data:
    return Data(context_id, is_command, memoryview(content), last)


def test_a_command_is_read_as_the_other_library_reads_it() -> None:
    command, theirs = read_command(STORE), decode(BytesIO(STORE), True, True)
    assert command.field == theirs.CommandField == 1 and command.message_id == theirs.MessageID == 7
    assert command.text(0x1000) == theirs.AffectedSOPInstanceUID and command.has_data_set
    assert command.status is None and command.responded_to is None and command.text(0x0902) is None


def test_a_message_in_any_pieces_is_one_message() -> None:
    reader = MessageReader()
    assert list(reader.feed(piece(STORE[:10], is_command=True, last=False))) == [] and reader.under_way
    (command,) = reader.feed(piece(STORE[10:], is_command=True))
    assert isinstance(command, CommandReceived) and command.command == read_command(STORE)
    found = [
        *reader.feed(piece(b"ab", is_command=False, last=False)),
        *reader.feed(piece(b"", is_command=False, last=False)),
        *reader.feed(piece(b"", is_command=False)),
    ]
    assert [(bytes(item.content), item.last) for item in found if isinstance(item, DataSetPiece)] == [
        (b"ab", False),
        (b"", True),
    ]
    assert not reader.under_way
    (echo,) = reader.feed(piece(ECHO, is_command=True, context_id=3))
    assert isinstance(echo, CommandReceived) and echo.context_id == 3 and not reader.under_way


@pytest.mark.parametrize(
    "pieces",
    [
        [piece(b"x", is_command=False)],  # a data set of nothing
        [piece(ECHO, is_command=True), piece(b"x", is_command=False)],
        [piece(STORE, is_command=True), piece(ECHO, is_command=True)],
        [piece(STORE, is_command=True), piece(b"x", is_command=False, context_id=3)],
        [piece(STORE[:9], is_command=True, last=False), piece(ECHO, is_command=True, context_id=3)],
        [piece(b"x" * 65_000, is_command=True, last=False), piece(b"x" * 65_000, is_command=True)],
        [piece(b"", is_command=True, last=False)] * 100,
        [piece(STORE, is_command=True)] + [piece(b"", is_command=False, last=False)] * 100,
        [piece(ECHO + ECHO, is_command=True)],  # elements twice
        [piece(ECHO[:-1], is_command=True)],
        [piece(ECHO + b"\x08\x00\x05\x00\x00\x00\x00\x00", is_command=True)],
        [piece(b"\x00\x00\x00\x01\x02\x00\x00\x00\x30\x00", is_command=True)],  # no Command Data Set Type
    ],
)
def test_what_makes_no_message_is_said(pieces: list[Data]) -> None:
    reader = MessageReader()
    with pytest.raises(BadMessage):
        for item in pieces:
            for _ in reader.feed(item):
                pass


def test_a_number_of_a_wrong_length_is_said_when_it_is_asked_for() -> None:
    command = Command({0x0110: b"abc", 0x0120: b""})
    with pytest.raises(BadMessage, match=r"\(0000,0110\) has 3 bytes"):
        _ = command.message_id
    assert command.responded_to is None
    with pytest.raises(BadMessage, match="without Command Field"):
        _ = command.field


@settings(max_examples=300)
@given(st.lists(st.tuples(st.binary(max_size=60), st.booleans(), st.booleans(), st.sampled_from([1, 3])), max_size=8))
def test_no_values_raise_anything_else(values: list[tuple[bytes, bool, bool, int]]) -> None:
    reader = MessageReader()
    try:
        for content, is_command, last, context_id in values:
            for _ in reader.feed(piece(content, is_command=is_command, last=last, context_id=context_id)):
                pass
    except BadMessage:
        pass
