"""Storage Commitment Push Model: what its messages say (PS3.4 annex J). Knows no wire."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DataSets

from dicom_node.errors import NodeError
from dicom_node.model import CommitmentReport, ObjectReference
from dicom_node.services.commitment_scanner import Information, Item
from dicom_node.services.identifier import UNREADABLE

__all__ = [
    "ALL_COMMITTED",
    "MAX_REFERENCES",
    "REQUEST_COMMITMENT",
    "SOME_FAILED",
    "WELL_KNOWN_INSTANCE",
    "BadInformation",
    "encode_information",
    "event_of",
    "information_of",
    "read_action",
    "read_event",
]

WELL_KNOWN_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1  # Action Type ID
ALL_COMMITTED, SOME_FAILED = 1, 2  # Event Type ID

MAX_REFERENCES = 10_000  # of one request
_UID = re.compile(r"[0-9.]{1,64}")


class BadInformation(NodeError):
    """The information of an N-ACTION or N-EVENT-REPORT is wrong (PS3.7 10.1.1.1.8, 10.1.4.1.10); no value is told."""

    dimse_status = 0x0115  # invalid argument value

    def __init__(self, comment: str, dimse_status: int = 0x0115) -> None:
        super().__init__(comment)
        self.dimse_status = dimse_status


def read_action(information: Information) -> tuple[str, tuple[ObjectReference, ...]]:
    """Transaction UID and references of a request (PS3.4 table J.3-1), a repeated reference once.

    Raises BadInformation. More than `MAX_REFERENCES` are answered 0x0213, resource limitation.
    """
    _check_count(information)
    references = tuple(dict.fromkeys(map(_reference, information.committed)))
    if not references:
        raise BadInformation("no reference")
    return _transaction_uid(information), references


def read_event(information: Information) -> CommitmentReport:
    """What a report says, whatever its Event Type ID (PS3.4 tables J.3-2, J.3-3). Raises BadInformation."""
    _check_count(information)
    return CommitmentReport(
        transaction_uid=_transaction_uid(information),
        committed=tuple(map(_reference, information.committed)),
        failed=tuple((_reference(item), item[2] or 0x0110) for item in information.failed),
    )


def information_of(data_set: Dataset) -> Information:
    """The same from a data set of pydicom's, which reads what `scan_information` leaves to it."""
    return Information(
        _text(data_set, "TransactionUID"),
        [_item(item) for item in _items(data_set, "ReferencedSOPSequence")],
        [_item(item) for item in _items(data_set, "FailedSOPSequence")],
    )


def event_of(report: CommitmentReport) -> int:
    """The Event Type ID of a report."""
    return SOME_FAILED if report.failed else ALL_COMMITTED


def encode_information(report: CommitmentReport, *, implicit_vr: bool, little_endian: bool) -> bytes:
    """The information of a report; of a request too, which is one that all is committed to (PS3.4 tables J.3-1 to 3).

    A sequence without items is left out: of reports they are of type 1C. Written here, since a study has hundreds of
    references and pydicom takes twenty times as long.
    """
    writer = _Writer(implicit_vr=implicit_vr, order="<" if little_endian else ">")
    found = [writer.uid(0x00081195, report.transaction_uid)]
    failed = [writer.item(reference, reason) for reference, reason in report.failed]
    if failed:
        found.append(writer.element(0x00081198, b"SQ", b"".join(failed)))
    committed = [writer.item(reference) for reference in report.committed]
    if committed:
        found.append(writer.element(0x00081199, b"SQ", b"".join(committed)))
    return b"".join(found)


class _Writer:
    """Elements of a data set in a native transfer syntax (PS3.5 7.1, 7.5)."""

    def __init__(self, *, implicit_vr: bool, order: str) -> None:
        self._short = None if implicit_vr else struct.Struct(f"{order}HH2sH")
        self._long = struct.Struct(f"{order}HHI" if implicit_vr else f"{order}HH2sHI")
        self._item, self._us = struct.Struct(f"{order}HHI"), struct.Struct(f"{order}H")

    def element(self, tag: int, vr: bytes, value: bytes) -> bytes:
        group, number = tag >> 16, tag & 0xFFFF
        if self._short is None:
            return self._long.pack(group, number, len(value)) + value
        if vr == b"SQ":
            return self._long.pack(group, number, vr, 0, len(value)) + value
        return self._short.pack(group, number, vr, len(value)) + value

    def uid(self, tag: int, uid: str) -> bytes:
        value = uid.encode("ascii", "replace")
        return self.element(tag, b"UI", value + b"\0" if len(value) % 2 else value)

    def item(self, reference: ObjectReference, reason: int | None = None) -> bytes:
        value = self.uid(0x00081150, reference.sop_class_uid) + self.uid(0x00081155, reference.sop_instance_uid)
        if reason is not None:
            value += self.element(0x00081197, b"US", self._us.pack(reason))
        return self._item.pack(0xFFFE, 0xE000, len(value)) + value


def _items(data_set: Dataset, keyword: str) -> Sequence[Dataset]:
    found = _value(data_set, keyword)
    return found[: MAX_REFERENCES + 1] if isinstance(found, DataSets) else ()


def _item(item: Dataset) -> Item:
    reason = _value(item, "FailureReason")
    told = reason if isinstance(reason, int) else 0
    return _text(item, "ReferencedSOPClassUID"), _text(item, "ReferencedSOPInstanceUID"), told


def _text(data_set: Dataset, keyword: str) -> str:
    found = _value(data_set, keyword)
    return found.strip(" \0") if isinstance(found, str) else ""


def _value(data_set: Dataset, keyword: str) -> Any:
    try:
        return data_set.get(keyword)
    except UNREADABLE as exc:
        raise BadInformation(f"{keyword} cannot be understood") from exc


def _check_count(information: Information) -> None:
    if len(information.committed) + len(information.failed) > MAX_REFERENCES:
        raise BadInformation(f"more than {MAX_REFERENCES} references", 0x0213)


def _reference(item: Item) -> ObjectReference:
    sop_class_uid, sop_instance_uid, _ = item
    if not _UID.fullmatch(sop_class_uid):
        raise BadInformation("ReferencedSOPClassUID is missing or no UID")
    if not _UID.fullmatch(sop_instance_uid):
        raise BadInformation("ReferencedSOPInstanceUID is missing or no UID")
    return ObjectReference(sop_class_uid, sop_instance_uid)


def _transaction_uid(information: Information) -> str:
    if not _UID.fullmatch(information.transaction_uid):
        raise BadInformation("TransactionUID is missing or no UID")
    return information.transaction_uid
