"""What messages of storage commitment say, against pydicom."""

from io import BytesIO

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from dicom_node.model import CommitmentReport, ObjectReference
from dicom_node.services.commitment import BadInformation, encode_information, event_of, read_action, read_event

CT = "1.2.840.10008.5.1.4.1.1.2"
ONE, TWO, THREE = ObjectReference(CT, "1.2.3"), ObjectReference(CT, "1.2.34"), ObjectReference("1.2.5", "1.2.345")


@pytest.mark.parametrize(("implicit_vr", "little_endian"), [(True, True), (False, True), (False, False)])
def test_reports_and_requests_are_written_as_pydicom_reads_them(implicit_vr: bool, little_endian: bool) -> None:
    report = CommitmentReport(transaction_uid="1.9", committed=(ONE, TWO), failed=((THREE, 0x0112),))
    encoded = encode_information(report, implicit_vr=implicit_vr, little_endian=little_endian)
    read = read_dataset(BytesIO(encoded), implicit_vr, little_endian)
    assert [element.tag for element in read] == sorted(element.tag for element in read) and len(read) == 3
    assert read.FailedSOPSequence[0].FailureReason == 0x0112
    assert read_event(read) == report and event_of(report) == 2
    assert read_action(read) == ("1.9", (ONE, TWO))


def test_a_sequence_without_items_is_left_out() -> None:
    all_kept = CommitmentReport(transaction_uid="1.9", committed=(ONE,))
    none_kept = CommitmentReport(transaction_uid="1.9", committed=(), failed=((ONE, 0x0110),))
    for report, event in ((all_kept, 1), (none_kept, 2)):
        encoded = encode_information(report, implicit_vr=True, little_endian=True)
        assert len(read_dataset(BytesIO(encoded), True, True)) == 2 and event_of(report) == event


def test_a_reference_that_is_there_twice_counts_once() -> None:
    twice = CommitmentReport(transaction_uid="1.9", committed=(ONE, TWO, ONE))
    encoded = encode_information(twice, implicit_vr=True, little_endian=True)
    assert read_action(read_dataset(BytesIO(encoded), True, True)) == ("1.9", (ONE, TWO))


@pytest.mark.parametrize(
    "change", ["no items", "no transaction", "bad transaction", "no class", "bad instance", "text"]
)
def test_what_is_missing_or_no_uid_is_refused_without_its_value(change: str) -> None:
    item, information = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, "1.2.3"
    information.TransactionUID, information.ReferencedSOPSequence = "1.9", [item]
    assert read_action(information)[0] == "1.9"
    if change == "no items":
        information.ReferencedSOPSequence = []
    elif change == "no transaction":
        del information.TransactionUID
    elif change == "bad transaction":
        information.TransactionUID = "secret"
    elif change == "no class":
        del item.ReferencedSOPClassUID
    elif change == "bad instance":
        item.ReferencedSOPInstanceUID = "1.2/secret"
    else:
        del information.ReferencedSOPSequence
    with pytest.raises(BadInformation) as caught:
        read_action(information)
    assert caught.value.dimse_status == 0x0115 and "secret" not in str(caught.value)


def test_a_sequence_that_cannot_be_read_is_an_invalid_argument() -> None:
    # TransactionUID, then a ReferencedSOPSequence whose item is cut short
    encoded = b"\x08\0\x95\x11\x04\0\0\x001.2\0" + b"\x08\0\x99\x11\x04\0\0\0\xfe\xff\0\xe0"
    for read in (read_action, read_event):
        with pytest.raises(BadInformation) as refused:
            read(read_dataset(BytesIO(encoded), True, True))
        assert refused.value.dimse_status == 0x0115
