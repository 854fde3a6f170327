"""A client for `peers.py` that costs the server's cores as little as Python can: blocking socket, objects in memory.

It speaks the node's own PDUs and command sets (`dicom_node.dimse`), but walks P-DATA-TF itself: every microsecond here
is a microsecond in both columns of the table. Associate, C-ECHO, C-STORE, C-FIND, C-GET, C-MOVE, release; linux only.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET, CommandField, CommandValue, encode_command
from dicom_node.dimse.link import cut
from dicom_node.dimse.messages import Command, read_command
from dicom_node.dimse.upper_layer.connection import data_header
from dicom_node.dimse.upper_layer.pdus import (
    AssociateAC,
    AssociateRQ,
    ProposedContext,
    ReleaseRQ,
    RoleSelection,
    UserInformation,
    decode_pdu,
    encode_pdu,
)

__all__ = ["IMPLICIT_LE", "STUDY_FIND", "STUDY_GET", "STUDY_MOVE", "VERIFICATION", "RawAssociation", "ServerFault"]

VERIFICATION = "1.2.840.10008.1.1"
STUDY_FIND, STUDY_GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
STUDY_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
IMPLICIT_LE = "1.2.840.10008.1.2"
MAX_PDU = 131_072
BUFFER = 1024 * 1024
PATIENCE_S = 120
BATCH = 400  # PDUs in one write: 800 pieces, below IOV_MAX
ASSOCIATE_AC, P_DATA, RELEASE_RP = 2, 4, 6

Keys = Mapping[int, str]
Sink = Callable[[str, Iterable[bytes]], None]


class ServerFault(Exception):
    """The server did what the benchmark cannot go on with."""


class RawAssociation:
    """One association. `contexts`: abstract syntax to its only transfer syntax; `as_scp`: those the server may use."""

    def __init__(self, port: int, called: str, contexts: Mapping[str, str], as_scp: Iterable[str] = ()) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._sock.settimeout(None)  # the kernel keeps the time: no poll() before each call
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", PATIENCE_S, 0))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0
        self._message_id = 0
        abstract = list(contexts)
        request = AssociateRQ(
            called_ae_title=called,
            calling_ae_title="BENCH",
            contexts=tuple(
                ProposedContext(context_id=2 * number + 1, abstract_syntax=uid, transfer_syntaxes=(contexts[uid],))
                for number, uid in enumerate(abstract)
            ),
            user=UserInformation(
                maximum_length=MAX_PDU,
                implementation_class_uid="1.2.826.0.1.3680043.10.999.1",
                roles=tuple(RoleSelection(sop_class_uid=uid, scu=False, scp=True) for uid in as_scp),
            ),
        )
        self._sock.sendall(encode_pdu(request))
        kind, content = self._pdu()
        answer = decode_pdu(kind, bytes(content)) if kind == ASSOCIATE_AC else None
        if not isinstance(answer, AssociateAC):
            raise ServerFault(f"no association: a PDU of type {kind}")
        accepted = {item.context_id for item in answer.contexts if item.result == 0}
        self._ids = {uid: 2 * number + 1 for number, uid in enumerate(abstract) if 2 * number + 1 in accepted}
        if len(self._ids) != len(abstract):
            raise ServerFault("a presentation context was not accepted")
        self._piece = min(answer.user.maximum_length or MAX_PDU, MAX_PDU) - 6

    def echo(self) -> None:
        """One C-ECHO."""
        self._ask(VERIFICATION, CommandField.C_ECHO)
        _expect_success(self._message()[1])

    def store(self, sop_class_uid: str, sop_instance_uid: str, data_set: Iterable[bytes | memoryview]) -> None:
        """One C-STORE; anything but Success is a fault."""
        self._ask(sop_class_uid, CommandField.C_STORE, data_set, Priority=0, AffectedSOPInstanceUID=sop_instance_uid)
        _expect_success(self._message()[1])

    def find(self, keys: Keys) -> int:
        """How many identifiers a C-FIND brings."""
        self._ask(STUDY_FIND, CommandField.C_FIND, [identifier(keys)], Priority=0)
        rows = 0
        while (command := self._message()[1]).status in (0xFF00, 0xFF01):
            rows += 1
        _expect_success(command)
        return rows

    def get(self, study_uid: str, sink: Sink | None = None) -> int:
        """C-GET of a study: how many objects came; `sink(SOP Instance UID, pieces)` is given each."""
        keys = {0x0008_0052: "STUDY", 0x0020_000D: study_uid}
        self._ask(STUDY_GET, CommandField.C_GET, [identifier(keys)], Priority=0)
        objects = 0
        while True:
            pieces: list[bytes] | None = None if sink is None else []
            context_id, command = self._message(pieces)
            if command.field != CommandField.C_STORE:
                if command.status in (0xFF00, 0xFF01):
                    continue
                _expect_success(command)
                return objects
            objects += 1
            uid = command.text(0x1000) or ""
            if sink is not None and pieces is not None:
                sink(uid, pieces)
            self._send(
                context_id,
                {
                    "AffectedSOPClassUID": command.text(0x0002) or "",
                    "CommandField": CommandField.C_STORE | CommandField.RESPONSE,
                    "MessageIDBeingRespondedTo": command.message_id or 0,
                    "CommandDataSetType": NO_DATA_SET,
                    "Status": 0,
                    "AffectedSOPInstanceUID": uid,
                },
            )

    def move(self, study_uid: str, destination: str) -> None:
        """C-MOVE of a study to another AE."""
        keys = {0x0008_0052: "STUDY", 0x0020_000D: study_uid}
        self._ask(STUDY_MOVE, CommandField.C_MOVE, [identifier(keys)], Priority=0, MoveDestination=destination)
        while (command := self._message()[1]).status in (0xFF00, 0xFF01):
            pass
        _expect_success(command)

    def release(self) -> None:
        """Release it and close."""
        with self._sock:
            self._sock.sendall(encode_pdu(ReleaseRQ()))
            with suppress(ServerFault, OSError):
                while self._pdu()[0] != RELEASE_RP:
                    pass

    # --- messages

    def _ask(
        self, abstract: str, field: int, data_set: Iterable[bytes | memoryview] | None = None, **values: CommandValue
    ) -> None:
        self._message_id = self._message_id % 65_535 + 1
        fields: dict[str, CommandValue] = {
            "AffectedSOPClassUID": abstract,
            "CommandField": field,
            "MessageID": self._message_id,
            "CommandDataSetType": NO_DATA_SET if data_set is None else WITH_DATA_SET,
            **values,
        }
        self._send(self._ids[abstract], fields, data_set)

    def _send(
        self, context_id: int, fields: Mapping[str, CommandValue], data_set: Iterable[bytes | memoryview] | None = None
    ) -> None:
        command = encode_command(fields)
        parts: list[bytes | memoryview] = [
            data_header(context_id, is_command=True, last=True, length=len(command)),
            command,
        ]
        for piece, last in cut(data_set, self._piece) if data_set is not None else ():
            parts += (data_header(context_id, is_command=False, last=last, length=len(piece)), piece)
            if len(parts) >= 2 * BATCH:
                self._write(parts)
                parts = []
        if parts:
            self._write(parts)

    def _write(self, parts: list[bytes | memoryview]) -> None:
        sent = self._sock.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._sock.sendall(memoryview(part)[sent:])
            sent = max(sent - len(part), 0)

    def _message(self, keep: list[bytes] | None = None) -> tuple[int, Command]:
        """The next message's context and command set; the pieces of its data set go to `keep`, or nowhere."""
        received = bytearray()
        command: Command | None = None
        while True:
            kind, content = self._pdu()
            if kind != P_DATA:
                raise ServerFault(f"a PDU of type {kind} where data was to come")
            position = 0
            while position < len(content):
                length, context_id, control = struct.unpack_from(">IBB", content, position)
                value = content[position + 6 : position + 4 + length]
                position += 4 + length
                if not control & 1:
                    if keep is not None:
                        keep.append(bytes(value))
                    if control & 2 and command is not None:
                        return context_id, command
                    continue
                received += value
                if control & 2:
                    command = read_command(bytes(received))
                    if not command.has_data_set:
                        return context_id, command

    # --- bytes

    def _pdu(self) -> tuple[int, memoryview]:
        """Type and content of the next PDU; the view is good until the next one is read."""
        kind, length = struct.unpack(">BxI", self._bytes(6))
        return kind, self._bytes(length)

    def _bytes(self, length: int) -> memoryview:
        if length > len(self._buffer):
            raise ServerFault(f"a PDU of {length} bytes")
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + length > len(self._buffer):
            left = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(left)] = left
            self._start, self._end = 0, len(left)
        while self._end - self._start < length:
            received = self._sock.recv_into(self._buffer[self._end :])
            if not received:
                raise ServerFault("the connection was closed")
            self._end += received
        found = self._buffer[self._start : self._start + length]
        self._start += length
        return found


def identifier(keys: Keys) -> bytes:
    """An identifier in Implicit VR Little Endian, blanks as padding (UIDs: NUL)."""
    encoded = bytearray()
    for tag in sorted(keys):
        value = keys[tag].encode("ascii")
        if len(value) % 2:
            value += b"\0" if tag in (0x0020_000D, 0x0020_000E, 0x0008_0018) else b" "
        encoded += struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value
    return bytes(encoded)


def _expect_success(command: Command) -> None:
    if command.status != 0:
        raise ServerFault(f"status {command.status if command.status is None else hex(command.status)}")
