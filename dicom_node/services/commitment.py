"""Storage Commitment Push Model: what its messages say (PS3.4 annex J). Data sets in and out; knows no wire."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydicom.dataset import Dataset

from dicom_node.errors import NodeError
from dicom_node.model import CommitmentReport, ObjectReference

__all__ = [
    "ALL_COMMITTED",
    "MAX_REFERENCES",
    "REQUEST_COMMITMENT",
    "SOME_FAILED",
    "WELL_KNOWN_INSTANCE",
    "BadInformation",
    "action_information",
    "event_information",
    "event_of",
    "read_action",
    "read_event",
]

WELL_KNOWN_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1  # Action Type ID
ALL_COMMITTED, SOME_FAILED = 1, 2  # Event Type ID

MAX_REFERENCES = 20_000  # of one request
_UID = re.compile(r"[0-9.]{1,64}")


class BadInformation(NodeError):
    """The information of an N-ACTION or N-EVENT-REPORT is wrong (PS3.7 10.1.1.1.8, 10.1.4.1.10); no value is told."""

    dimse_status = 0x0115  # invalid argument value

    def __init__(self, comment: str, dimse_status: int = 0x0115) -> None:
        super().__init__(comment)
        self.dimse_status = dimse_status


def read_action(information: Dataset) -> tuple[str, tuple[ObjectReference, ...]]:
    """Transaction UID and references of a request (PS3.4 table J.3-1), a repeated reference once.

    Raises BadInformation. More than `MAX_REFERENCES` are answered 0x0213, resource limitation.
    """
    items = _items(information, "ReferencedSOPSequence")
    if len(items) > MAX_REFERENCES:
        raise BadInformation(f"more than {MAX_REFERENCES} references", 0x0213)
    references = tuple(dict.fromkeys(map(_reference, items)))
    if not references:
        raise BadInformation("no reference")
    return _transaction_uid(information), references


def action_information(transaction_uid: str, references: Iterable[ObjectReference]) -> Dataset:
    """The information of a request."""
    found = Dataset()
    found.TransactionUID = transaction_uid
    found.ReferencedSOPSequence = [_item(reference) for reference in references]
    return found


def read_event(information: Dataset) -> CommitmentReport:
    """What a report says, whatever its Event Type ID (PS3.4 tables J.3-2, J.3-3). Raises BadInformation."""
    committed = _items(information, "ReferencedSOPSequence")
    failed = _items(information, "FailedSOPSequence")
    if len(committed) + len(failed) > MAX_REFERENCES:
        raise BadInformation(f"more than {MAX_REFERENCES} references", 0x0213)
    return CommitmentReport(
        transaction_uid=_transaction_uid(information),
        committed=tuple(map(_reference, committed)),
        failed=tuple((_reference(item), _reason(item)) for item in failed),
    )


def event_of(report: CommitmentReport) -> int:
    """The Event Type ID of a report."""
    return SOME_FAILED if report.failed else ALL_COMMITTED


def event_information(report: CommitmentReport) -> Dataset:
    """The information of a report; a sequence without items is left out (both are of type 1C)."""
    found = Dataset()
    found.TransactionUID = report.transaction_uid
    if report.committed:
        found.ReferencedSOPSequence = [_item(reference) for reference in report.committed]
    if report.failed:
        found.FailedSOPSequence = [_item(reference, reason) for reference, reason in report.failed]
    return found


def _item(reference: ObjectReference, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = reference
    if reason is not None:
        item.FailureReason = int(reason)
    return item


def _items(information: Dataset, keyword: str) -> Sequence[Dataset]:
    found = information.get(keyword)
    return found if found is not None and not isinstance(found, str | bytes) else ()


def _reference(item: Dataset) -> ObjectReference:
    return ObjectReference(_uid(item, "ReferencedSOPClassUID"), _uid(item, "ReferencedSOPInstanceUID"))


def _reason(item: Dataset) -> int:
    reason = item.get("FailureReason")
    return reason if isinstance(reason, int) and reason else 0x0110


def _transaction_uid(information: Dataset) -> str:
    return _uid(information, "TransactionUID")


def _uid(data_set: Dataset, keyword: str) -> str:
    found = str(data_set.get(keyword) or "").strip(" \0")
    if not _UID.fullmatch(found):
        raise BadInformation(f"{keyword} is missing or no UID")
    return found
