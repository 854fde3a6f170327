"""Stored data sets as PDUs that are ready: every byte, every boundary, and files that are not what they were."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_node.dimse import outgoing
from dicom_node.dimse.commands import (
    NO_DATA_SET,
    WITH_DATA_SET,
    CommandField,
    StoreRequests,
    encode_command,
    store_response,
)
from dicom_node.dimse.link import SMALLEST_PDU
from dicom_node.dimse.outgoing import ShortFile, StoredDataSet, Template, Templates

OFFSET = 7
CHUNK = 10_000


@pytest.fixture(autouse=True)
def _small_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "CHUNK", CHUNK)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Callable[[int], tuple[Path, bytes]]]:
    """`stored(length)`: a file with a data set of that length at `OFFSET`, and something behind it."""

    def make(length: int) -> tuple[Path, bytes]:
        content, path = os.urandom(length), tmp_path / "file"
        path.write_bytes(b"\0" * OFFSET + content + b"behind")
        return path, content

    yield make


def received(pdus: bytes, context_id: int, pdu_bytes: int) -> bytes:
    """The data set a peer finds in `pdus` (PS3.8 9.3.5, E.2); what breaks the rules fails."""
    content, position, last = b"", 0, False
    while position < len(pdus):
        assert not last, "something follows the last value"
        kind, length, value, context, control = struct.unpack_from(">BxIIBB", pdus, position)
        assert (kind, value, context) == (4, length - 4, context_id)
        assert length <= pdu_bytes
        assert control in (0, 2)
        last = control == 2
        content += pdus[position + 12 : position + 6 + length]
        position += 6 + length
    assert last
    assert position == len(pdus)
    return content


def sent(path: Path, length: int, template: Template, context_id: int = 3) -> bytes:
    """Everything that goes out."""
    with StoredDataSet(str(path), OFFSET, length) as data_set:
        data_set.read_ahead(template, context_id)
        return b"".join(bytes(pdus) for pdus in data_set.pdus(context_id))


@pytest.mark.parametrize("pdu_bytes", [SMALLEST_PDU, 1000, 16384])
def test_data_sets_of_every_length_around_a_boundary_arrive_as_they_are_stored(
    pdu_bytes: int, stored: Callable[[int], tuple[Path, bytes]]
) -> None:
    size, template = pdu_bytes - 6, Template(pdu_bytes)
    room = max(CHUNK // (pdu_bytes + 6), 1) * size  # of one write
    edges = {size, 2 * size, room, room + size, 2 * room, 3 * room}
    lengths = {0, 1, 2, *(edge + more for edge in edges for more in (-1, 0, 1))}
    for number, length in enumerate(sorted(lengths, key=lambda n: n % 97)):  # shorter ones after longer ones
        path, content = stored(length)
        context_id = 1 + 2 * (number % 3)
        assert received(sent(path, length, template, context_id), context_id, pdu_bytes) == content, length


def test_no_write_is_longer_than_a_chunk_and_no_read_has_too_many_parts(
    stored: Callable[[int], tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "CHUNK", 1024 * 1024)
    path, content = stored(300_000)
    with StoredDataSet(str(path), OFFSET, len(content)) as data_set:
        data_set.read_ahead(Template(SMALLEST_PDU), 1)
        writes = [bytes(pdus) for pdus in data_set.pdus(1)]
    assert [len(write) for write in writes[:-1]] == [outgoing.MOST_PDUS * (SMALLEST_PDU + 6)] * (len(writes) - 1)
    assert received(b"".join(writes), 1, SMALLEST_PDU) == content
    for pdu_bytes in (SMALLEST_PDU, 16384, 131072):
        assert len(Template(pdu_bytes)._bytes) <= 1024 * 1024


def test_a_read_that_ends_early_is_gone_on_with(
    stored: Callable[[int], tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = stored(25_000)
    read_some = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read_some(fd, [parts[0][:77]], at))
    assert received(sent(path, len(content), Template(1000)), 3, 1000) == content
    with StoredDataSet(str(path), OFFSET, len(content)) as data_set:
        assert b"".join(bytes(piece) for piece in data_set) == content


def test_a_file_shorter_than_its_entry_is_found_before_anything_is_sent(
    stored: Callable[[int], tuple[Path, bytes]],
) -> None:
    for length in (100, 3 * CHUNK):
        path, _ = stored(length)
        os.truncate(path, OFFSET + length - 1)
        with pytest.raises(ShortFile):
            StoredDataSet(str(path), OFFSET, length)


def test_a_file_that_becomes_shorter_under_way_is_an_error_and_never_a_shorter_object(
    stored: Callable[[int], tuple[Path, bytes]],
) -> None:
    path, content = stored(3 * CHUNK)
    with StoredDataSet(str(path), OFFSET, len(content)) as data_set:
        data_set.read_ahead(Template(1000), 1)
        pdus = data_set.pdus(1)
        first = bytes(next(pdus))
        os.truncate(path, OFFSET + CHUNK + 50)
        with pytest.raises(ShortFile):
            list(pdus)
    with pytest.raises(AssertionError):
        received(first, 1, 1000)


def test_a_file_that_is_replaced_under_way_is_sent_as_it_was(stored: Callable[[int], tuple[Path, bytes]]) -> None:
    path, content = stored(3 * CHUNK)
    with StoredDataSet(str(path), OFFSET, len(content)) as data_set:
        data_set.read_ahead(Template(1000), 1)
        pdus = data_set.pdus(1)
        out = bytes(next(pdus))
        other = path.with_name("other")
        other.write_bytes(b"another")
        other.replace(path)
        out += b"".join(bytes(item) for item in pdus)
    assert received(out, 1, 1000) == content


def test_templates_are_used_again_and_only_few_are_kept() -> None:
    templates = Templates()
    first = templates.take(1000)
    templates.give_back(first)
    assert templates.take(2000) is not first
    assert templates.take(1000) is first
    for pdu_bytes in range(1000, 1000 + 2 * outgoing.KEPT):
        templates.give_back(Template(pdu_bytes))
    assert len(templates._free) == outgoing.KEPT


@pytest.mark.parametrize("originator", [None, ("PACS", 77)])
@pytest.mark.parametrize("uid", ["1.2.3", "1.2.34"])
def test_a_prepared_request_is_the_one_that_is_encoded_as_a_whole(originator: tuple[str, int] | None, uid: str) -> None:
    fields = {"AffectedSOPClassUID": "1.2.840.1", "CommandField": CommandField.C_STORE, "MessageID": 65535}
    fields |= {"Priority": 0, "CommandDataSetType": WITH_DATA_SET, "AffectedSOPInstanceUID": uid}
    if originator is not None:
        fields |= {"MoveOriginatorApplicationEntityTitle": originator[0], "MoveOriginatorMessageID": originator[1]}
    assert StoreRequests("1.2.840.1", originator).encode(65535, uid) == encode_command(fields)


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.34"])
@pytest.mark.parametrize("status", [0, 0xB000, 0xA700])
def test_a_store_response_is_what_any_other_command_would_be(uid: str, status: int) -> None:
    fields = {
        "AffectedSOPClassUID": "1.2.840.1",
        "CommandField": CommandField.C_STORE | CommandField.RESPONSE,
        "MessageIDBeingRespondedTo": 513,
        "CommandDataSetType": NO_DATA_SET,
        "Status": status,
        "AffectedSOPInstanceUID": uid,
    }
    assert store_response("1.2.840.1", 513, status, uid) == encode_command(fields)
