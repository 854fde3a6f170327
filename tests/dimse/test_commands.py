"""Command sets as bytes, read back by pydicom."""

import io

from pydicom.filereader import read_dataset

from dicom_node.dimse.commands import encode_command, error_comment


def test_what_is_encoded_is_what_pydicom_reads() -> None:
    encoded = encode_command(
        {
            "Status": 0xA702,
            "CommandField": 0x8010,
            "AffectedSOPClassUID": "1.2.840.10008.5.1.4.1.2.2.3",
            "MessageIDBeingRespondedTo": 65535,
            "CommandDataSetType": 0x0101,
            "OffendingElement": (0x00080052, 0x0020000D),
            "ErrorComment": "odd",
            "NumberOfFailedSuboperations": 3,
            "MoveOriginatorApplicationEntityTitle": "STATION",
        }
    )
    ds = read_dataset(io.BytesIO(encoded), True, True)
    assert ds.CommandGroupLength == len(encoded) - 12
    assert list(ds.keys()) == sorted(ds.keys())
    assert (ds.Status, ds.CommandField, ds.MessageIDBeingRespondedTo) == (0xA702, 0x8010, 65535)
    assert ds.AffectedSOPClassUID == "1.2.840.10008.5.1.4.1.2.2.3"
    assert [int(tag) for tag in ds.OffendingElement] == [0x00080052, 0x0020000D]
    assert (ds.ErrorComment, ds.MoveOriginatorApplicationEntityTitle) == ("odd", "STATION")


def test_every_value_has_an_even_length() -> None:
    for uid in ("1.2", "1.22"):
        encoded = encode_command({"AffectedSOPInstanceUID": uid})
        assert len(encoded) % 2 == 0
        assert encoded.rstrip(b"\0").endswith(uid.encode())


def test_an_error_comment_is_short_ascii_without_separators() -> None:
    assert error_comment("a\\b\nç" + "x" * 100) == "a?b??" + "x" * 59
