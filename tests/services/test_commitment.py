"""What messages of storage commitment say, against pydicom."""

import time
import warnings
from io import BytesIO
from random import Random

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicom_node.model import CommitmentReport, ObjectReference
from dicom_node.services.commitment import (
    MAX_REFERENCES,
    BadInformation,
    encode_information,
    event_of,
    information_of,
    read_action,
    read_event,
)
from dicom_node.services.commitment_scanner import Information, scan_information

CT = "1.2.840.10008.5.1.4.1.1.2"
ONE, TWO, THREE = ObjectReference(CT, "1.2.3"), ObjectReference(CT, "1.2.34"), ObjectReference("1.2.5", "1.2.345")


@pytest.mark.parametrize(("implicit_vr", "little_endian"), [(True, True), (False, True), (False, False)])
def test_reports_and_requests_are_written_as_pydicom_reads_them(implicit_vr: bool, little_endian: bool) -> None:
    report = CommitmentReport(transaction_uid="1.9", committed=(ONE, TWO), failed=((THREE, 0x0112),))
    encoded = encode_information(report, implicit_vr=implicit_vr, little_endian=little_endian)
    read = read_dataset(BytesIO(encoded), implicit_vr, little_endian)
    assert [element.tag for element in read] == sorted(element.tag for element in read) and len(read) == 3
    assert read.FailedSOPSequence[0].FailureReason == 0x0112
    assert read_event(information_of(read)) == report and event_of(report) == 2
    assert read_action(information_of(read)) == ("1.9", (ONE, TWO))


def test_a_sequence_without_items_is_left_out() -> None:
    all_kept = CommitmentReport(transaction_uid="1.9", committed=(ONE,))
    none_kept = CommitmentReport(transaction_uid="1.9", committed=(), failed=((ONE, 0x0110),))
    for report, event in ((all_kept, 1), (none_kept, 2)):
        encoded = encode_information(report, implicit_vr=True, little_endian=True)
        assert len(read_dataset(BytesIO(encoded), True, True)) == 2 and event_of(report) == event


def test_a_reference_that_is_there_twice_counts_once() -> None:
    twice = CommitmentReport(transaction_uid="1.9", committed=(ONE, TWO, ONE))
    encoded = encode_information(twice, implicit_vr=True, little_endian=True)
    assert read_action(information_of(read_dataset(BytesIO(encoded), True, True))) == ("1.9", (ONE, TWO))


@pytest.mark.parametrize(
    "change", ["no items", "no transaction", "bad transaction", "no class", "bad instance", "text"]
)
def test_what_is_missing_or_no_uid_is_refused_without_its_value(change: str) -> None:
    item, information = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, "1.2.3"
    information.TransactionUID, information.ReferencedSOPSequence = "1.9", [item]
    assert read_action(information_of(information))[0] == "1.9"
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
        read_action(information_of(information))
    assert caught.value.dimse_status == 0x0115 and "secret" not in str(caught.value)


def test_a_sequence_that_cannot_be_read_is_an_invalid_argument() -> None:
    # TransactionUID, then a ReferencedSOPSequence whose item is cut short
    encoded = b"\x08\0\x95\x11\x04\0\0\x001.2\0" + b"\x08\0\x99\x11\x04\0\0\0\xfe\xff\0\xe0"
    for read in (read_action, read_event):
        with pytest.raises(BadInformation) as refused:
            read(information_of(read_dataset(BytesIO(encoded), True, True)))
        assert refused.value.dimse_status == 0x0115


# --- read in one pass ------------------------------------------------------------------------------------------------


def _encoded(data_set: Dataset, implicit_vr: bool, little_endian: bool) -> bytes:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit_vr, little_endian
    write_dataset(out, data_set)
    return out.getvalue()


def _message(*, undefined: bool) -> Dataset:
    def item(instance: str, reason: int | None = None) -> Dataset:
        made = Dataset()
        made.ReferencedSOPClassUID, made.ReferencedSOPInstanceUID = CT, instance
        if reason is not None:
            made.FailureReason = reason
        else:
            made.PurposeOfReferenceCodeSequence = []  # of no interest, and no reason to refuse
        made.is_undefined_length_sequence_item = undefined
        return made

    message = Dataset()
    message.RetrieveAETitle, message.TransactionUID = "PACS", "1.9.1"
    message.ReferencedSOPSequence = [item("1.2.3"), item("1.2.34")]
    message.FailedSOPSequence = [item("1.2.5", 0x0112)]
    for keyword in ("ReferencedSOPSequence", "FailedSOPSequence"):
        message[keyword].is_undefined_length = undefined
    return message


SYNTAXES = [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize(("implicit_vr", "little_endian"), SYNTAXES)
@pytest.mark.parametrize("undefined", [False, True])
def test_one_pass_reads_what_pydicom_reads(undefined: bool, implicit_vr: bool, little_endian: bool) -> None:
    message = _message(undefined=undefined)
    encoded = _encoded(message, implicit_vr, little_endian)
    found = scan_information(encoded, implicit_vr=implicit_vr, little_endian=little_endian, most=MAX_REFERENCES)
    assert found is not None and found == information_of(message)
    assert read_event(found).failed == ((ObjectReference(CT, "1.2.5"), 0x0112),)


@pytest.mark.parametrize(("implicit_vr", "little_endian"), SYNTAXES)
def test_of_damaged_messages_it_reads_what_pydicom_reads_or_leaves_them_to_it(
    implicit_vr: bool, little_endian: bool
) -> None:
    chance = Random(7)
    agreed = 0
    for undefined in (False, True):
        whole = _encoded(_message(undefined=undefined), implicit_vr, little_endian)
        for _ in range(400):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 2)):
                damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 2, 8, 0x31, 0x5C, 0xFE, 0xFF))
            del damaged[chance.choice((len(damaged), chance.randrange(len(damaged)))) :]
            told = {"implicit_vr": implicit_vr, "little_endian": little_endian}
            found = scan_information(bytes(damaged), **told, most=MAX_REFERENCES)
            if found is None:
                continue
            agreed += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert _judged(found) == _judged(_by_pydicom(bytes(damaged), **told))
    assert agreed > 100


def _by_pydicom(encoded: bytes, *, implicit_vr: bool, little_endian: bool) -> Information:
    return information_of(read_dataset(BytesIO(encoded), implicit_vr, little_endian))


def _judged(information: Information) -> object:
    try:
        return read_event(information)
    except BadInformation as exc:
        return exc.dimse_status


def test_more_references_than_may_be_are_counted_no_further() -> None:
    many = CommitmentReport(transaction_uid="1.9", committed=tuple(ObjectReference(CT, f"1.2.{n}") for n in range(50)))
    encoded = encode_information(many, implicit_vr=True, little_endian=True)
    found = scan_information(encoded, implicit_vr=True, little_endian=True, most=20)
    assert found is not None and len(found.committed) == 21


def test_ten_thousand_references_take_little_time() -> None:
    references = tuple(ObjectReference(CT, f"1.2.840.113619.2.55.3.{n}") for n in range(MAX_REFERENCES))
    report = CommitmentReport(transaction_uid="1.9", committed=references)
    encoded = encode_information(report, implicit_vr=True, little_endian=True)
    took = []
    for _ in range(3):
        began = time.process_time()
        found = scan_information(encoded, implicit_vr=True, little_endian=True, most=MAX_REFERENCES)
        assert found is not None and read_action(found) == ("1.9", references)
        took.append(time.process_time() - began)
    assert min(took) < 0.4  # some 0.06 s of CPU; pydicom takes more than a second
