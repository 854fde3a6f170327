"""What a query is answered: kinds of matching, levels, character sets, statuses (PS3.4 C.2.2, C.4.1)."""

import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence

from dicom_node.config import FindSettings
from dicom_node.services.find import FindOptions, FindResponse
from dicom_node.services.identifier import BadIdentifier, InformationModel, identifier_of
from dicom_node.store.catalog import Catalog

Find = Callable[..., list[FindResponse]]
Keep = Callable[..., Dataset]
PATIENT_ROOT = InformationModel.PATIENT_ROOT


def matches(responses: list[FindResponse], keyword: str) -> set[str]:
    """The values of one attribute in the pending responses; the last response must be Success."""
    assert responses[-1].status == 0x0000
    return {str(response.identifier.get(keyword, "")) for response in responses[:-1] if response.identifier}


@pytest.fixture
def studies(keep: Keep) -> dict[str, Dataset]:
    """Four studies of three patients."""
    common: dict[str, dict[str, Any]] = {
        "a": {"PatientID": "A", "PatientName": "Müller^Jörg", "StudyDate": "20240101", "StudyTime": "080000"},
        "b": {"PatientID": "B", "PatientName": "MEIER^ANNA", "StudyDate": "20240215", "StudyTime": "120000"},
        "c": {"PatientID": "B", "PatientName": "MEIER^ANNA", "StudyDate": "20240301", "StudyTime": "235959"},
        "d": {"PatientID": "D%_", "PatientName": "Doe^J*hn", "StudyDate": "", "Modality": "MR"},
    }
    return {
        name: keep(AccessionNumber=f"ACC-{name}", StudyID=name, StudyDescription="Thorax", **values)
        for name, values in common.items()
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"a", "b", "c", "d"}),
        ({"PatientID": "B"}, {"b", "c"}),
        ({"PatientID": "b"}, set()),
        ({"PatientID": " B "}, {"b", "c"}),
        ({"PatientID": "*"}, {"a", "b", "c", "d"}),
        ({"PatientID": "D%_"}, {"d"}),
        ({"PatientID": "%"}, set()),
        ({"AccessionNumber": "ACC-?"}, {"a", "b", "c", "d"}),
        ({"AccessionNumber": "ACC-[ab]"}, set()),
        ({"AccessionNumber": "*c"}, {"c"}),
        ({"PatientName": "MULLER*"}, {"a"}),
        ({"PatientName": "müller^jörg"}, {"a"}),
        ({"PatientName": "*^an*"}, {"b", "c"}),
        ({"PatientName": "meier^anna"}, {"b", "c"}),
        ({"PatientName": "meier"}, set()),
        ({"StudyDate": "20240215"}, {"b"}),
        ({"StudyDate": "2024.02.15"}, {"b"}),
        ({"StudyDate": "20240101-20240215"}, {"a", "b"}),
        ({"StudyDate": "20240216-"}, {"c"}),
        ({"StudyDate": "-20240214"}, {"a"}),
        ({"StudyTime": "0800-1200"}, {"a", "b"}),
        ({"StudyTime": "12:00:00-"}, {"b", "c"}),
        ({"StudyTime": "1200"}, {"b"}),
        ({"StudyDate": "20240101-20240301", "StudyTime": "1000-1300"}, {"b"}),
        ({"ModalitiesInStudy": "MR"}, {"d"}),
        ({"ModalitiesInStudy": ["MR", "US"]}, {"d"}),
        ({"ModalitiesInStudy": "C*"}, {"a", "b", "c"}),
        ({"StudyID": ["a", "d"]}, {"a", "d"}),
    ],
)
def test_a_key_matches_as_the_standard_says(
    studies: dict[str, Dataset], find: Find, keys: dict[str, Any], expected: set[str]
) -> None:
    found = matches(find("STUDY", SpecificCharacterSet="ISO_IR 192", **{"StudyID": "", **keys}), "StudyID")
    assert found == expected


def test_a_list_of_uids_matches_each(studies: dict[str, Dataset], find: Find) -> None:
    wanted = [studies["a"].StudyInstanceUID, studies["c"].StudyInstanceUID, "1.2.3"]
    assert matches(find("STUDY", StudyInstanceUID=wanted), "StudyInstanceUID") == set(wanted[:2])


def test_date_and_time_are_one_moment_only_when_that_was_negotiated(studies: dict[str, Dataset], find: Find) -> None:
    keys = {"StudyID": "", "StudyDate": "20240101-20240301", "StudyTime": "1000-1300"}
    apart = matches(find("STUDY", **keys), "StudyID")
    combined = matches(find("STUDY", options=FindOptions(datetime=True), **keys), "StudyID")
    assert apart == {"b"}
    assert combined == {"b"}
    keys["StudyDate"] = "20240101-20240302"
    assert matches(find("STUDY", options=FindOptions(datetime=True), **keys), "StudyID") == {"b", "c"}


@pytest.mark.parametrize(
    ("model", "level", "expected"),
    [
        (PATIENT_ROOT, "PATIENT", 2),
        (PATIENT_ROOT, "STUDY", 3),
        (PATIENT_ROOT, "SERIES", 4),
        (PATIENT_ROOT, "IMAGE", 5),
        (InformationModel.STUDY_ROOT, "STUDY", 3),
        (InformationModel.STUDY_ROOT, "SERIES", 4),
        (InformationModel.STUDY_ROOT, "IMAGE", 5),
    ],
)
def test_every_level_answers_with_one_response_per_entity(
    keep: Keep, find: Find, model: InformationModel, level: str, expected: int
) -> None:
    first = keep(PatientID="A")
    keep(PatientID="A")
    keep(PatientID="B")
    keep(PatientID="A", StudyInstanceUID=first.StudyInstanceUID)
    keep(PatientID="A", StudyInstanceUID=first.StudyInstanceUID, SeriesInstanceUID=first.SeriesInstanceUID)
    responses = find(level, model=model, PatientID="")
    assert len(responses) == expected + 1
    for response in responses[:-1]:
        assert response.status == 0xFF00
        assert response.identifier is not None
        assert response.identifier.QueryRetrieveLevel == level
        assert response.identifier.RetrieveAETitle == "DICOM_NODE"
        assert response.identifier.InstanceAvailability == "ONLINE"


def test_counts_and_modalities_are_computed(keep: Keep, find: Find) -> None:
    first = keep()
    keep(StudyInstanceUID=first.StudyInstanceUID, Modality="SEG")
    (response, _) = find(
        "STUDY",
        StudyInstanceUID=first.StudyInstanceUID,
        ModalitiesInStudy="",
        NumberOfStudyRelatedSeries="",
        NumberOfStudyRelatedInstances="",
        SOPClassesInStudy="",
    )
    assert response.identifier is not None
    assert list(response.identifier.ModalitiesInStudy) == ["CT", "SEG"]
    assert response.identifier.NumberOfStudyRelatedSeries == "2"
    assert response.identifier.NumberOfStudyRelatedInstances == "2"


@pytest.mark.parametrize(
    ("model", "level"),
    [(InformationModel.STUDY_ROOT, "PATIENT"), (PATIENT_ROOT, "FRAME"), (PATIENT_ROOT, ""), (PATIENT_ROOT, None)],
)
def test_a_level_the_model_lacks_is_refused(find: Find, model: InformationModel, level: str | None) -> None:
    (response,) = find(level, model=model, PatientID="")
    assert (response.status, response.offending) == (0xA900, (0x00080052,))


def test_a_relational_query_is_answered_unless_strict(keep: Keep, find: Find) -> None:
    kept = keep()
    keys = {"SeriesInstanceUID": kept.SeriesInstanceUID, "StudyInstanceUID": ""}
    assert matches(find("SERIES", **keys), "StudyInstanceUID") == {kept.StudyInstanceUID}
    strict = FindSettings(strict=True)
    (response,) = find("SERIES", settings=strict, **keys)
    assert (response.status, response.offending) == (0xA900, (0x0020000D,))
    negotiated = find("SERIES", settings=strict, options=FindOptions(relational=True), **keys)
    assert matches(negotiated, "StudyInstanceUID") == {kept.StudyInstanceUID}
    keys["StudyInstanceUID"] = kept.StudyInstanceUID
    assert matches(find("SERIES", settings=strict, **keys), "SeriesInstanceUID") == {kept.SeriesInstanceUID}


def test_patient_root_wants_the_patient_id_when_strict(keep: Keep, find: Find) -> None:
    keep(PatientID="A")
    strict = FindSettings(strict=True)
    (response,) = find("STUDY", model=PATIENT_ROOT, settings=strict, StudyInstanceUID="")
    assert (response.status, response.offending) == (0xA900, (0x00100020,))
    assert len(find("STUDY", model=PATIENT_ROOT, settings=strict, PatientID="A", StudyInstanceUID="")) == 2


def test_keys_that_are_not_kept_are_left_out_and_the_responses_say_so(keep: Keep, find: Find) -> None:
    keep()
    (response, _) = find("STUDY", PatientID="P1", StudyStatusID="X", ReferencedStudySequence=[Dataset()])
    assert response.status == 0xFF01
    assert response.identifier is not None
    assert "StudyStatusID" not in response.identifier
    assert "ReferencedStudySequence" not in response.identifier


def test_keys_that_are_not_kept_come_back_empty_for_old_clients(keep: Keep, find: Find) -> None:
    keep()
    private = Dataset()
    private.add(DataElement(0x00091001, "LO", "x"))
    (response, _) = find(
        "STUDY",
        settings=FindSettings(unsupported_optional_keys="empty"),
        extra=private,
        PatientID="P1",
        StudyStatusID="X",
        ReferencedStudySequence=Sequence([Dataset()]),
    )
    assert response.status == 0xFF00
    assert response.identifier is not None
    assert response.identifier["StudyStatusID"].is_empty
    assert len(response.identifier.ReferencedStudySequence) == 0
    assert response.identifier[0x00091001].is_empty


def test_what_only_accompanies_keys_costs_no_warning(keep: Keep, find: Find) -> None:
    keep()
    (response, _) = find(
        "STUDY",
        PatientID="P1",
        TimezoneOffsetFromUTC="+0100",
        RetrieveAETitle="OTHER",
        InstanceAvailability="",
        SpecificCharacterSet="ISO_IR 100",
    )
    assert response.status == 0xFF00
    assert response.identifier is not None
    assert response.identifier.RetrieveAETitle == "DICOM_NODE"
    assert "TimezoneOffsetFromUTC" not in response.identifier


@pytest.mark.parametrize(
    ("asked_in", "name", "answered_in"),
    [
        (None, "Doe^Jane", None),
        ("ISO_IR 100", "Doe^Jane", None),
        (None, "Müller^Jörg", "ISO_IR 192"),
        ("ISO_IR 6", "Müller^Jörg", "ISO_IR 192"),
        ("ISO_IR 100", "Müller^Jörg", "ISO_IR 100"),
        ("ISO_IR 192", "Müller^Jörg", "ISO_IR 192"),
        ("ISO_IR 100", "Łukasz^Ż", "ISO_IR 192"),
        ("ISO_IR 101", "Łukasz^Ż", "ISO_IR 101"),
        ("ISO_IR 144", "Люкceмбypг", "ISO_IR 144"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "ISO_IR 192"),
    ],
)
def test_text_goes_out_in_a_character_set_that_holds_it(
    keep: Keep,
    find: Find,
    recoded: Callable[[Dataset], Dataset],
    asked_in: str | list[str] | None,
    name: str,
    answered_in: str | None,
) -> None:
    keep(PatientName=name)
    asked = {} if asked_in is None else {"SpecificCharacterSet": asked_in}
    (response, _) = find("STUDY", PatientName="", **asked)
    assert response.identifier is not None
    assert response.identifier.get("SpecificCharacterSet") == answered_in
    assert str(recoded(response.identifier).PatientName) == name


@pytest.mark.parametrize(
    ("asked_in", "key"),
    [("ISO_IR 100", "MÜLLER*"), (["", "ISO 2022 IR 87"], "*=山田*"), ("ISO_IR 192", "*=山田^太郎*")],
)
def test_a_key_is_read_in_the_character_set_of_the_request(
    keep: Keep, find: Find, asked_in: str | list[str], key: str
) -> None:
    keep(PatientID="1", PatientName="Müller^Jörg")
    keep(PatientID="2", PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう")
    found = matches(find("STUDY", SpecificCharacterSet=asked_in, PatientName=key, PatientID=""), "PatientID")
    assert found == ({"1"} if asked_in == "ISO_IR 100" else {"2"})


def test_values_of_every_kind_go_out_as_they_were_kept(
    keep: Keep, find: Find, recoded: Callable[[Dataset], Dataset]
) -> None:
    kept = keep(Rows=512, ImageType=["ORIGINAL", "PRIMARY"], NumberOfFrames="3", SliceLocation="-12.50")
    (response, _) = find("IMAGE", Rows=None, ImageType="", NumberOfFrames="", SliceLocation="", SOPInstanceUID="")
    assert response.identifier is not None
    answer = recoded(response.identifier)
    assert answer.Rows == 512
    assert list(answer.ImageType) == ["ORIGINAL", "PRIMARY"]
    assert answer.NumberOfFrames == 3
    assert str(answer.SliceLocation) == "-12.50"
    assert answer.SOPInstanceUID == kept.SOPInstanceUID


def test_a_cancel_ends_the_answers(keep: Keep, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.services.find.SOME", 2)
    for _ in range(3):
        keep()
    counter = itertools.count()
    responses = find("STUDY", StudyInstanceUID="", cancelled=lambda: next(counter) >= 1)
    assert [response.status for response in responses] == [0xFF00, 0xFF00, 0xFE00]
    assert responses[-1].identifier is None


@pytest.mark.parametrize(
    ("keys", "tag"), [({"StudyDate": ["20240101", "20240102"]}, 0x00080020), ({"PatientName": "A\\B"}, 0x00100010)]
)
def test_a_key_that_takes_one_value_refuses_several(find: Find, keys: dict[str, Any], tag: int) -> None:
    (response,) = find("STUDY", **keys)
    assert (response.status, response.offending) == (0xA900, (tag,))


def test_a_value_that_is_none_of_its_vr_is_refused(find: Find) -> None:
    broken = Dataset()
    broken.add(DataElement(0x00280010, "LO", "many"))  # US: Rows
    (response,) = find("IMAGE", extra=broken)
    assert (response.status, response.offending) == (0xA900, (0x00280010,))


@pytest.mark.parametrize(
    ("encoded", "tag"),
    [
        (b"\x28\0\x10\0\x03\0\0\0\1\2\3", 0x00280010),  # Rows: half a number
        (b"\x08\0\x99\x11\x04\0\0\0\xfe\xff\0\xe0", 0x00081199),  # a sequence whose item is cut short
    ],
)
def test_what_pydicom_cannot_read_is_the_requesters_fault(encoded: bytes, tag: int) -> None:
    with pytest.raises(BadIdentifier) as refused:
        identifier_of(read_dataset(io.BytesIO(encoded), True, True))
    assert (refused.value.dimse_status, refused.value.tag) == (0xA900, tag)


def test_a_level_that_is_a_sequence_is_none() -> None:
    encoded = b"\x08\0\x52\0SQ\0\0\x10\0\0\0\xfe\xff\0\xe0\x08\0\0\0\x08\0\x16\0XY\0\0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert identifier_of(read_dataset(io.BytesIO(encoded), False, True)).level == ""


def test_an_index_that_fails_is_out_of_resources(catalog: Catalog, keep: Keep, find: Find) -> None:
    keep()
    with catalog.database.read() as connection:
        connection.execute("PRAGMA query_only=OFF")
        connection.execute("ALTER TABLE study RENAME TO gone")
    (response,) = find("STUDY", StudyInstanceUID="")
    assert response.status == 0xA700


@pytest.mark.parametrize("keys", [{}, {"PatientName": "Doe*"}, {"PatientID": "P1"}])
@pytest.mark.parametrize("returned", [(), ("StudyDate", "StudyTime", "StudyInstanceUID")])
def test_answers_in_pages_are_those_of_one_page(
    keep: Keep, find: Find, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], returned: tuple[str, ...]
) -> None:
    for number in range(5):  # moments that are equal, and some that are not known
        keep(StudyID=str(number), StudyDate="20240101" if number % 2 else "", StudyTime="10" if number > 2 else "")
    asked = {"StudyID": "", **dict.fromkeys(returned, ""), **keys}
    whole = [response.identifier.StudyID for response in find("STUDY", **asked) if response.identifier]
    monkeypatch.setattr("dicom_node.store.index.PAGE", 2)
    paged = [response.identifier.StudyID for response in find("STUDY", **asked) if response.identifier]
    assert paged == whole
    assert sorted(whole) == ([str(number) for number in range(5)])
