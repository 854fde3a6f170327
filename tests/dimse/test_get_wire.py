"""C-GET to a peer that looks at every PDU: limits, remainders, cancels, stored files that are not what they were."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.config import DeliverySettings
from dicom_node.dimse import outgoing, retrieval
from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET
from dicom_node.dimse.files import send_files
from dicom_node.dimse.messages import Command, read_command
from dicom_node.model import Destination, Level

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
CT, STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.2.2.3"
STUDY = "1.2.826.0.1.3680043.10.21"
P_DATA, ABORT = 4, 7


class Getter:
    """A peer that has asked for all of `STUDY`, and takes CT in Explicit VR Little Endian (context 3)."""

    def __init__(self, peer: Any, maximum_length: int) -> None:
        self.peer, self.maximum_length = peer, maximum_length
        role = struct.pack(">H", len(CT)) + CT.encode() + b"\0\1"
        contexts = [(1, STUDY_ROOT_GET, [IMPLICIT]), (3, CT, [EXPLICIT])]
        item = struct.pack(">BxH", 0x54, len(role)) + role
        kind, _ = peer.associate(contexts, user=item, maximum_length=maximum_length)
        assert kind == 2
        uid = STUDY.encode() + b"\0" * (len(STUDY) % 2)
        identifier = b"\x08\0\x52\0\x06\0\0\0STUDY \x20\0\x0d\0" + len(uid).to_bytes(4, "little") + uid
        request = {"CommandField": 0x10, "AffectedSOPClassUID": STUDY_ROOT_GET, "Priority": 0}
        peer.send_command(1, identifier, MessageID=1, CommandDataSetType=WITH_DATA_SET, **request)

    def message(self) -> tuple[int, Command, bytes] | None:
        """The next message: its context, command set and data set; None after an A-ABORT."""
        values: dict[int, bytes] = {0: b"", 1: b""}
        command: Command | None = None
        while True:
            kind, body = self.peer.read_pdu()
            if kind == ABORT:
                return None
            assert kind == P_DATA, kind
            assert not self.maximum_length or len(body) <= self.maximum_length
            length, context_id, control = struct.unpack_from(">IBB", body)
            assert length == len(body) - 4
            values[control & 1] += body[6:]
            if control == 3:
                command = read_command(values[1])
            if control & 2 and command is not None and (control == 2 or not command.has_data_set):
                return context_id, command, values[0]

    def answer(self, command: Command) -> None:
        """C-STORE-RSP, Success."""
        uid = {"AffectedSOPInstanceUID": command.text(0x1000) or "", "AffectedSOPClassUID": CT}
        response = {"CommandField": 0x8001, "MessageIDBeingRespondedTo": command.message_id, "Status": 0}
        self.peer.send_command(3, None, CommandDataSetType=NO_DATA_SET, **response, **uid)

    def cancel(self) -> None:
        """C-CANCEL."""
        cancel = {"CommandField": 0x0FFF, "MessageIDBeingRespondedTo": 1, "CommandDataSetType": NO_DATA_SET}
        self.peer.send_command(1, None, **cancel)

    def all(self) -> tuple[dict[str, bytes], Command, int]:
        """Take everything: data sets by SOP Instance UID, the final response, how many pending ones came."""
        found: dict[str, bytes] = {}
        pending = 0
        while (message := self.message()) is not None:
            context_id, command, data_set = message
            if command.field == 0x0001:
                assert context_id == 3
                found[command.text(0x1000) or ""] = data_set
                self.answer(command)
            elif command.status == 0xFF00:
                pending += 1
            else:
                return found, command, pending
        raise AssertionError("aborted")


@pytest.fixture
def stored(serve: Callable[..., Any], make_file: Callable[..., Path]) -> Callable[..., tuple[Any, list[Path]]]:
    """`stored(*pixels)`: a node that holds a study of images so many pixels wide; it and their files."""

    def start(*pixels: int) -> tuple[Any, list[Path]]:
        node = serve()
        paths = [
            make_file(pixels=size, StudyInstanceUID=STUDY, SeriesInstanceUID=STUDY + ".1", InstanceNumber=str(number))
            for number, size in enumerate(pixels)
        ]
        statuses: list[int | None] = []
        send_files(
            paths,
            Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=node.port),
            lambda path, status, error: statuses.append(status),
            settings=DeliverySettings(),
            calling_ae_title="TEST",
        )
        assert statuses == [0] * len(paths)
        return node, paths

    return start


def archived(node: Any, number: int) -> Path:
    """Where the archive keeps the image of that number."""
    return Path(list(node.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [STUDY]}))[number].path)


def test_every_pdu_length_a_peer_may_ask_for_brings_the_same_bytes(
    stored: Callable[..., Any], raw_peer: Any, data_set_bytes: Any
) -> None:
    node, paths = stored(3, 200, 4, 90)
    expected = {path.stem: data_set_bytes(path) for path in paths}
    for maximum_length in (128, 4099, 16384, 131072, 0):
        found, final, _ = Getter(raw_peer(node.port), maximum_length).all()
        assert found == expected, maximum_length
        assert (final.status, final.number(0x1021)) == (0, len(paths))


def test_an_object_of_many_writes_arrives_whole(
    stored: Callable[..., Any], raw_peer: Any, data_set_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "CHUNK", 50_000)
    node, paths = stored(300, 10, 300)
    found, _, _ = Getter(raw_peer(node.port), 16380).all()
    assert found == {path.stem: data_set_bytes(path) for path in paths}


def test_pending_responses_are_paced_and_can_be_had_for_each(
    stored: Callable[..., Any], raw_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, paths = stored(*[2] * 12)
    monkeypatch.setattr(retrieval, "PENDING_S", 3600.0)
    found, _, pending = Getter(raw_peer(node.port), 16384).all()
    assert (len(found), pending) == (len(paths), 1)
    monkeypatch.setattr(retrieval, "PENDING_S", 0.0)
    found, _, pending = Getter(raw_peer(node.port), 16384).all()
    assert (len(found), pending) == (len(paths), len(paths) - 1)


def test_a_cancel_in_the_middle_stops_before_the_next_object(stored: Callable[..., Any], raw_peer: Any) -> None:
    node, paths = stored(2, 2, 2, 2)
    getter = Getter(raw_peer(node.port), 16384)
    message = getter.message()
    assert message is not None
    getter.cancel()
    getter.answer(message[1])
    found, final, _ = getter.all()
    assert found == {}
    assert (final.status, final.number(0x1020), final.number(0x1021)) == (0xFE00, len(paths) - 1, 1)
    node.counted.wait_for(lambda c: ("get", 0xFE00) in c.answered)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("harm", ["gone", "short"])
def test_an_image_whose_file_is_gone_or_short_fails_alone(
    stored: Callable[..., Any], raw_peer: Any, harm: str, number: int
) -> None:
    node, paths = stored(8, 8, 8)
    path = archived(node, number)
    if harm == "gone":
        path.unlink()
    else:
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1])
    found, final, _ = Getter(raw_peer(node.port), 16384).all()
    assert set(found) == {item.stem for item in paths if item is not paths[number]}
    assert (final.status, final.number(0x1021), final.number(0x1022)) == (0xB000, 2, 1)


def test_a_file_that_cannot_be_read_to_its_end_ends_the_association_and_never_the_object(
    stored: Callable[..., Any], raw_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "CHUNK", 20_000)
    node, _ = stored(200)
    read, calls = outgoing.StoredDataSet.read_into, iter(range(100))

    def failing(self: Any, parts: Any, length: int) -> None:
        if next(calls) == 2:
            raise OSError("the disk is broken")
        read(self, parts, length)

    monkeypatch.setattr(outgoing.StoredDataSet, "read_into", failing)
    assert Getter(raw_peer(node.port), 16002).message() is None
