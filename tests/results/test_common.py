"""What every result shares: demographics made fit, UIDs, times, equipment, the AIR equalities, the same bytes twice."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results._sources import identity
from dicom_node.results.seg import SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.values import (
    Findings,
    LabelVolume,
    Measurements,
    ResultContext,
    ResultValue,
)

Case = Callable[..., list[Dataset]]


@pytest.fixture
def results_of(
    labels: Callable[..., Any], volume_of: Callable[..., LabelVolume], measurements_of: Callable[..., Measurements]
) -> Callable[..., list[Dataset]]:
    """SEG and SR of a CT series."""

    def make(images: list[Dataset], context: ResultContext) -> list[Dataset]:
        values: list[ResultValue] = [volume_of(images, labels(images)), measurements_of()]
        seg = list(SegEncoder().encode(values, images, context, []))
        return [*seg, *SrEncoder().encode(values, images, context, seg)]

    return make


def _bytes(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _received(dataset: Dataset) -> Dataset:
    """The header as the node reads it from a file: raw, in its own character set."""
    return dcmread(BytesIO(_bytes(dataset)))


# --- demographics ----------------------------------------------------------------------------------------------------


def test_demographics_are_those_of_the_source(ct_series: Case, results_of: Case, context: ResultContext) -> None:
    images = ct_series()
    for result in results_of(images, context):
        for keyword in (
            *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge"),
            *("StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription"),
            "ReferringPhysicianName",
        ):
            assert result[keyword].value == images[0][keyword].value


TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"),
    *("AccessionNumber", "StudyID", "ReferringPhysicianName", "PositionReferenceIndicator"),
)


def test_sources_without_type_2_attributes_give_objects_that_have_them_empty(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    images = ct_series()
    for image in images:
        for keyword in (*TYPE_2, "StudyDescription", "PatientAge", "IssuerOfPatientID", "Manufacturer"):
            del image[keyword]
    seg, report = results_of(images, context)
    for keyword in TYPE_2:
        assert seg[keyword].is_empty
        assert keyword == "PositionReferenceIndicator" or report[keyword].is_empty
    assert "PatientAge" not in report and "StudyDescription" not in seg


@pytest.mark.parametrize(
    ("keyword", "received", "written"),
    [
        ("PatientSex", "U", ""),
        ("PatientSex", "Male", "M"),
        ("PatientSex", "f", "F"),
        ("PatientSex", "OTHER", "O"),
        ("PatientSex", "M ", "M"),
        ("PatientAge", "45Y", "045Y"),
        ("PatientAge", "9m", "009M"),
        ("PatientAge", "old", None),
        ("PatientBirthDate", "1979.04.01", "19790401"),
        ("PatientBirthDate", "19790000", ""),
        ("PatientBirthDate", "unknown", ""),
        ("StudyDate", "2024-05-01", "20240501"),
        ("StudyTime", "10:15:00", "101500"),
        ("StudyTime", "25", ""),
        ("PatientWeight", "0", None),
        ("PatientIdentityRemoved", "TRUE", None),
        ("PatientID", "  A\\B ", ["A", "B"]),
        ("AccessionNumber", "0123456789ABCDEFGHIJ", "0123456789ABCDEFGHIJ"),
    ],
)
def test_odd_values_are_repaired_or_left_out_and_identifiers_never_altered(
    radiograph: Callable[..., Dataset], keyword: str, received: str, written: Any
) -> None:
    image = radiograph()
    with common.quiet():
        setattr(image, keyword, received)
        value = identity(_received(image)).get(keyword)
    assert (list(value) if isinstance(written, list) else value) == written


@pytest.mark.parametrize(
    ("character_set", "name", "description"),
    [
        pytest.param("ISO_IR 192", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Bauch – Übersicht", id="UTF-8"),
        pytest.param(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "腹部", id="Japanese"),
        pytest.param(["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", "腹部", id="katakana"),
        pytest.param(["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", "복부", id="Korean"),
        pytest.param("ISO_IR 100", "Äneas^Rüdiger", "Größe", id="Latin-1"),
        pytest.param("ISO_IR 144", "Люкceмбypг", "Живот", id="Cyrillic"),
        pytest.param("GB18030", "Wang^XiaoDong=王^小东", "腹部", id="Chinese"),
    ],
)
def test_names_of_every_character_set_arrive_in_utf_8(
    ct_series: Case, results_of: Case, context: ResultContext, character_set: Any, name: str, description: str
) -> None:
    images = ct_series()
    for image in images:
        image.SpecificCharacterSet = character_set
        image.PatientName = name
        image.StudyDescription = description
        other = Dataset()
        other.PatientID, other.TypeOfPatientID, other.IssuerOfPatientID = "X1", "TEXT", description
        image.OtherPatientIDsSequence = [other]
    with common.quiet():  # pydicom warns of encoding half-width katakana beside JIS X 0208
        received = [_received(image) for image in images]
    for result in results_of(received, context):
        encoded = _bytes(result)
        read = dcmread(BytesIO(encoded))
        assert read.SpecificCharacterSet == "ISO_IR 192"
        assert str(read.PatientName) == str(received[0].PatientName) == name
        assert read.StudyDescription == description
        assert read.OtherPatientIDsSequence[0].IssuerOfPatientID == description
        assert name.encode("utf-8") in encoded and description.encode("utf-8") in encoded
        assert b"\x1b" not in encoded[: encoded.index(b"\xe0\x7f\x10\x00") if b"\xe0\x7f\x10\x00" in encoded else None]


def test_an_identity_said_to_be_removed_without_saying_how_stays_valid(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    images = ct_series()
    for image in images:
        image.PatientIdentityRemoved = "YES"
    for result in results_of(images, context):
        assert (result.PatientIdentityRemoved, result.DeidentificationMethod) == ("YES", "not stated in the source")


def test_values_of_the_source_reach_neither_warnings_nor_logs(
    ct_series: Case, results_of: Case, context: ResultContext, caplog: pytest.LogCaptureFixture
) -> None:
    with common.quiet():
        images = ct_series()
        for image in images:
            image.PatientName = "Secretname"  # highdicom warns of names without ^
            image.PatientAge = "Secretage"
            image.StudyDate = "Secretday"
        images = [_received(image) for image in images]
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results_of(images, context)
    assert "Secret" not in caplog.text
    assert not [str(warning.message) for warning in caught if "Secret" in str(warning.message)]


# --- equipment, time, series -----------------------------------------------------------------------------------------


def test_the_algorithm_is_the_same_wherever_an_object_tells_it(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    """IHE AIR TI 1.3 table 6.5.3.1-1."""
    seg, report = results_of(ct_series(), context)
    provenance = context.provenance
    for result in (seg, report):
        (item,) = [
            item
            for item in result.ContributingEquipmentSequence
            if item.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        ]
        assert item.Manufacturer == provenance.manufacturer
        assert item.ManufacturerModelName == provenance.name
        assert item.SoftwareVersions == provenance.version
        assert item.DeviceUID == provenance.device_uid
        assert result.Manufacturer == result.ManufacturerModelName == "dicom-node"  # the object's own maker
        assert result.DeviceSerialNumber == "NODE_A" and result.SoftwareVersions
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (provenance.name, provenance.version)
    assert algorithm.AlgorithmSource == provenance.manufacturer
    observer = {item.ConceptNameCodeSequence[0].CodeValue: item for item in report.ContentSequence}
    assert provenance.device_uid == observer["121012"].UID
    assert observer["121014"].TextValue == provenance.manufacturer
    assert observer["121015"].TextValue == provenance.name
    assert observer["121005"].ConceptCodeSequence[0].CodeValue == "121007"  # a device, no person, is the observer
    group = observer["126010"].ContentSequence[0].ContentSequence
    texts = {item.ConceptNameCodeSequence[0].CodeValue: item.TextValue for item in group if item.ValueType == "TEXT"}
    assert (texts["111001"], texts["111003"]) == (provenance.name, provenance.version)


def test_a_long_name_is_cut_alike_everywhere(ct_series: Case, results_of: Case, context: ResultContext) -> None:
    provenance = replace(context.provenance, name="n" * 80, version="v" * 70, manufacturer="two\nlines\\of maker")
    seg, report = results_of(ct_series(), replace(context, provenance=provenance))
    for result in (seg, report):
        item = result.ContributingEquipmentSequence[0]
        assert (item.ManufacturerModelName, item.SoftwareVersions) == ("n" * 64, "v" * 64)
        assert item.Manufacturer == "two lines/of maker"
        assert len(result.SeriesDescription) <= 64 and result.SeriesDescription.startswith("AI DEMONSTRATION")
    assert seg.SegmentSequence[0].SegmentAlgorithmName == "n" * 64


@pytest.mark.parametrize(
    "provenance",
    [{"name": ""}, {"version": " "}, {"manufacturer": ""}, {"device_uid": "1.02"}, {"device_uid": ""}],
    ids=str,
)
def test_a_result_that_cannot_say_which_algorithm_made_it_is_not_made(
    context: ResultContext, provenance: dict[str, Any]
) -> None:
    with pytest.raises(EncodingError, match="provenance"):
        common.Algorithm.of(replace(context.provenance, **provenance))


def test_the_scanner_is_told_as_contributing_equipment(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    for result in results_of(ct_series(), context):
        scanner = result.ContributingEquipmentSequence[1]
        assert (scanner.Manufacturer, scanner.ManufacturerModelName) == ("ACME", "Scanner 3")
        assert scanner.PurposeOfReferenceCodeSequence[0].CodeValue == "109101"


@pytest.mark.parametrize(
    ("source_offset", "expected"),
    [
        (None, ("20240502", "003000.250000", "+0200")),  # 22:30 UTC in context.time_zone
        ("-0330", ("20240501", "190000.250000", "-0330")),
        ("+1400", ("20240502", "123000.250000", "+1400")),
        ("+1500", ("20240502", "003000.250000", "+0200")),
        ("-0000", ("20240502", "003000.250000", "+0200")),
        ("nonsense", ("20240502", "003000.250000", "+0200")),
    ],
)
def test_times_are_in_the_offset_of_the_source(
    context: ResultContext, source_offset: str | None, expected: tuple[str, str, str]
) -> None:
    source = Dataset()
    if source_offset is not None:
        source.TimezoneOffsetFromUTC = source_offset
    when = common.moment(context, source)
    assert (when.date, when.time, when.offset) == expected


def test_every_date_and_time_of_a_result_is_the_jobs_and_the_offset_is_written(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    for result in results_of(ct_series(), context):
        assert result.TimezoneOffsetFromUTC == "+0200"
        for part in ("InstanceCreation", "Content", "Series"):
            assert (result[f"{part}Date"].value, result[f"{part}Time"].value) == ("20240502", "003000.250000")
        assert result.ContributingEquipmentSequence[0].ContributionDateTime == "20240502003000.250000+0200"


def test_a_time_without_a_zone_is_an_error(context: ResultContext) -> None:
    with pytest.raises(EncodingError, match="created_at"):
        common.moment(replace(context, created_at=datetime(2024, 5, 1)), Dataset())
    with pytest.raises(EncodingError, match="time_zone"):
        common.moment(replace(context, time_zone="CET"), Dataset())


# --- determinism -----------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_bytes_in_whatever_order_the_sources_come(
    ct_series: Case, results_of: Case, volume_of: Any, labels: Any, measurements_of: Any, context: ResultContext
) -> None:
    images = ct_series()
    once = [_bytes(result) for result in results_of(images, context)]
    assert [_bytes(result) for result in results_of(images, context)] == once
    values = [volume_of(images, labels(images)), measurements_of()]
    backwards = list(reversed(images))
    seg = SegEncoder().encode(values, backwards, context, [])
    again = [*seg, *SrEncoder().encode(values, backwards, context, seg)]
    assert [_bytes(result) for result in again] == once


def test_a_forced_rerun_makes_other_objects_of_the_same_organs(
    ct_series: Case, results_of: Case, context: ResultContext
) -> None:
    images = ct_series()
    first = results_of(images, context)
    second = results_of(images, replace(context, run_key="run 2", run_number=2))
    for one, other in zip(first, second, strict=True):
        assert one.SOPInstanceUID != other.SOPInstanceUID and one.SeriesInstanceUID != other.SeriesInstanceUID
        assert one.StudyInstanceUID == other.StudyInstanceUID
    tracked = [[str(item.TrackingUID) for item in run[0].SegmentSequence] for run in (first, second)]
    assert tracked[0] == tracked[1]
    third = results_of(images, replace(context, tracking_key="another model"))
    assert not set(tracked[0]) & {str(item.TrackingUID) for item in third[0].SegmentSequence}


def test_result_uids_are_valid_and_depend_on_every_part_alone() -> None:
    uids = {common.result_uid(*parts) for parts in [("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("a",)]}
    assert len(uids) == 5
    for uid in uids:
        assert uid.startswith("2.25.") and len(uid) <= 64
        number = int(uid.removeprefix("2.25."))
        assert number < 2**128 and number >> 76 & 0xF == 8 and number >> 62 & 3 == 2
    assert common.result_uid("a") == "2.25.171562367425104489605882691620505718213"


def test_findings_on_two_images_are_two_objects_of_one_series(
    radiograph: Callable[..., Dataset], findings_on: Callable[..., Findings], context: ResultContext
) -> None:
    first, second = radiograph(), radiograph()
    second.SeriesInstanceUID, second.StudyInstanceUID = first.SeriesInstanceUID, first.StudyInstanceUID
    made = SrEncoder().encode([findings_on(first), findings_on(second)], [second, first], context, [])
    assert len({str(report.SOPInstanceUID) for report in made}) == 2
    assert len({str(report.SeriesInstanceUID) for report in made}) == 1
    assert [int(report.InstanceNumber) for report in made] == [1, 2]
    assert not np.array_equal(_bytes(made[0]), _bytes(made[1]))
