"""One request on an association: what it asks, in which context, and how its responses go out.

Identifiers are decoded here, within bounds; data sets never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicom_node.dimse.commands import (
    NO_DATA_SET,
    WITH_DATA_SET,
    CommandField,
    CommandValue,
    element,
    encode_command,
    error_comment,
)
from dicom_node.dimse.contexts import (
    EXPLICIT_BE,
    IMPLICIT_LE,
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
)
from dicom_node.dimse.link import Fragments, Link, Message, gathered
from dicom_node.dimse.policy import Policy
from dicom_node.model import CommitmentRequest, Source
from dicom_node.services.commitment import MAX_REFERENCES, BadInformation, information_of
from dicom_node.services.commitment_scanner import Information, scan_information
from dicom_node.services.find import Answers, FindOptions
from dicom_node.services.identifier import BadIdentifier, Identifier, InformationModel, identifier_of
from dicom_node.services.scanner import scan_identifier

__all__ = [
    "Peer",
    "Request",
    "encode_answers",
    "encode_identifier",
    "identifier_bytes",
    "read_encoded",
    "read_identifier",
    "read_information",
    "read_query",
    "respond_bad",
]

MAX_IDENTIFIER_BYTES = 1024 * 1024

_PATIENT_ROOT = frozenset({PATIENT_ROOT_FIND, PATIENT_ROOT_GET, PATIENT_ROOT_MOVE})


@dataclass(slots=True)
class Peer:
    """One association's other side, as the requests need it. `recorded`: it is in the association log.

    `asked`: storage commitment that was just asked for, and its context. `awaited`: what is to be done with the status
    of a request of ours that nobody waits for, by its Message ID. `policy`: what it may do, None where no request has
    to be looked at. `user`: whom it comes for, as far as that was proved; personal data. `objects`: its C-STOREs.
    """

    source: Source
    find_options: Mapping[str, FindOptions]
    recorded: bool = False
    asked: tuple[CommitmentRequest, int] | None = None
    awaited: dict[int, Callable[[int], None]] = field(default_factory=dict)
    last_message_id: int = 0
    policy: Policy | None = None
    user: str = field(default="", repr=False)
    objects: int = 0

    def next_message_id(self) -> int:
        """A Message ID for a request of ours."""
        self.last_message_id = self.last_message_id % 0xFFFF + 1
        return self.last_message_id


class Request(NamedTuple):
    """One request as it came, and the context it came in. `kind`: its Command Field (0000,0100)."""

    link: Link
    peer: Peer
    message: Message
    kind: int
    message_id: int
    sop_class_uid: str
    transfer_syntax: str

    def uid(self, keyword: str) -> str | None:
        """A UID of its command set, None when it is not there or longer than a UID can be (PS3.5 table 6.2-1)."""
        found = self.message.command.text(element(keyword))
        return found if found and len(found) <= 64 else None

    @property
    def model(self) -> InformationModel:
        """The information model of its context."""
        patient_root = self.sop_class_uid in _PATIENT_ROOT
        return InformationModel.PATIENT_ROOT if patient_root else InformationModel.STUDY_ROOT

    @property
    def options(self) -> FindOptions:
        """What was negotiated for its SOP class."""
        return self.peer.find_options.get(self.sop_class_uid, FindOptions())

    def cancelled(self) -> bool:
        """Whether the peer cancelled it. Raises AssociationLost."""
        return self.link.is_cancelled(self.message_id)

    def respond(self, fields: Mapping[str, CommandValue], data_set: bytes | None = None, *, more: bool = False) -> None:
        """Send one response of this request; `more`: the next follows at once. Raises AssociationLost."""
        parts = None if data_set is None else [data_set]
        command = self._response(fields, with_data_set=data_set is not None)
        self.link.send_message(self.message.context_id, command, parts, more=more)

    def respond_each(
        self, fields: Mapping[str, CommandValue], data_sets: Sequence[bytes], *, more: bool = False
    ) -> None:
        """Send a response for each data set, otherwise alike. Raises AssociationLost."""
        command = self._response(fields, with_data_set=True)
        self.link.send_messages(self.message.context_id, command, data_sets, more=more)

    def _response(self, fields: Mapping[str, CommandValue], *, with_data_set: bool) -> bytes:
        if len(fields) == 1 and isinstance(status := fields.get("Status"), int):  # as nearly all are
            affected = self.uid("AffectedSOPClassUID")
            before, after = _plain_response(self.kind, affected, status, with_data_set)
            return before + self.message_id.to_bytes(2, "little") + after
        command: dict[str, CommandValue] = {
            "CommandField": CommandField.RESPONSE | self.kind,
            "MessageIDBeingRespondedTo": self.message_id,
            "CommandDataSetType": WITH_DATA_SET if with_data_set else NO_DATA_SET,
            **fields,
        }
        if "AffectedSOPClassUID" not in fields and (affected := self.uid("AffectedSOPClassUID")):
            command["AffectedSOPClassUID"] = affected
        return encode_command(command)


@lru_cache(maxsize=256)
def _plain_response(field: int, affected: str | None, status: int, with_data_set: bool) -> tuple[bytes, bytes]:
    """The command set of a response that says no more than its status, before and after the id of its request."""
    encoded = encode_command(
        {
            "CommandField": CommandField.RESPONSE | field,
            "MessageIDBeingRespondedTo": 0,
            "CommandDataSetType": WITH_DATA_SET if with_data_set else NO_DATA_SET,
            "Status": status,
            **({"AffectedSOPClassUID": affected} if affected else {}),
        }
    )
    behind = 2 * (8 + 2)  # Command Data Set Type and Status
    return encoded[: -behind - 2], encoded[-behind:]


def read_query(encoded: bytes, syntax: str) -> Identifier:
    """An identifier as a query reads it. Raises BadIdentifier as `read_identifier` does."""
    found = scan_identifier(encoded, implicit_vr=syntax == IMPLICIT_LE, little_endian=syntax != EXPLICIT_BE)
    return found if found is not None else identifier_of(_read_data_set(encoded, syntax))


def read_identifier(request: Request) -> Dataset:
    """The request's identifier. Raises BadIdentifier when there is none, it is too long or cannot be read."""
    return _read_data_set(identifier_bytes(request), request.transfer_syntax)


def identifier_bytes(request: Request) -> bytes:
    """The request's identifier as it came. Raises BadIdentifier when there is none or it is too long."""
    try:
        encoded = gathered(request.message.data_set, MAX_IDENTIFIER_BYTES)
    except ValueError:
        raise BadIdentifier("the identifier is too long", 0x00000800) from None
    if encoded is None:
        raise BadIdentifier("the request has no identifier", 0x00000800)
    return encoded


def read_information(request: Request, most: int) -> Information:
    """What a commitment message of at most `most` bytes says. Raises BadIdentifier as `read_identifier` does."""
    return read_encoded(request.message.data_set, request.transfer_syntax, most)


def read_encoded(data_set: Fragments | None, syntax: str, most: int) -> Information:
    """What a commitment message says as it comes.

    Raises BadIdentifier when there is no data set, it is longer than `most`, or unreadable.
    """
    encoded = _gathered(data_set, most)
    found = scan_information(
        encoded, implicit_vr=syntax == IMPLICIT_LE, little_endian=syntax != EXPLICIT_BE, most=MAX_REFERENCES
    )
    return found if found is not None else _read_information(encoded, syntax)


def read_data_set(data_set: Fragments | None, syntax: str, most: int) -> Dataset:
    """A data set as it comes. Raises BadIdentifier as `read_encoded` does; its values are decoded when asked for."""
    return _read_data_set(_gathered(data_set, most), syntax)


def _gathered(data_set: Fragments | None, most: int) -> bytes:
    try:
        encoded = gathered(data_set, most)
    except ValueError:
        raise BadIdentifier("the data set is too long", 0x00000800) from None
    if encoded is None:
        raise BadIdentifier("there is no data set", 0x00000800)
    return encoded


def _read_information(encoded: bytes, syntax: str) -> Information:
    try:
        return information_of(_read_data_set(encoded, syntax))
    except (BadIdentifier, BadInformation):
        raise
    except Exception as exc:  # the SCP edge: pydicom decodes values, and raises many things for them, when asked
        raise BadIdentifier("the data set cannot be read", 0x00000800) from exc


def _read_data_set(encoded: bytes, syntax: str) -> Dataset:
    try:
        return read_dataset(BytesIO(encoded), syntax == IMPLICIT_LE, syntax != EXPLICIT_BE)
    except Exception as exc:  # the SCP edge: pydicom raises many things for bytes that are no data set
        raise BadIdentifier("the identifier cannot be read", 0x00000800) from exc


def respond_bad(request: Request, error: BadIdentifier) -> int:
    request.respond(
        {
            "Status": error.dimse_status,
            "ErrorComment": error_comment(error.comment),
            "OffendingElement": (error.tag,),
        }
    )
    return error.dimse_status


def encode_answers(answers: Answers, syntax: str) -> list[bytes]:
    """The identifiers of C-FIND responses in the transfer syntax of their context."""
    return answers.encoded(implicit_vr=syntax == IMPLICIT_LE, little_endian=syntax != EXPLICIT_BE)


def encode_identifier(data_set: Dataset, syntax: str) -> bytes:
    """The identifier of a response in the transfer syntax of its context."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = syntax == IMPLICIT_LE, syntax != EXPLICIT_BE
    write_dataset(out, data_set)
    return out.getvalue()
