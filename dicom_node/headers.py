"""What the index needs of a data set, and whether the data set is one at all, without decoding it.

`scan` reads the attributes the index keeps and walks the structure to the last byte (`structure`). Text comes out
decoded (`texts`). Padded UIDs and UIDs with leading zeros are tolerated, because real systems send them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword

from dicom_node.errors import InvalidInstance
from dicom_node.model import InstanceHeader, Level
from dicom_node.shapes import Shapes
from dicom_node.structure import Walk, Wanted, walk_deflated
from dicom_node.texts import ONE_VALUE_VRS, codecs_of, text_of

__all__ = ["DEFLATED_SYNTAXES", "INDEXED", "is_image", "multi_valued", "normalise_uid", "scan", "value_representation"]

# The attributes the index keeps beside the four identifying UIDs, each at one level. From PS3.4 tables C.6-1 to C.6-4
# what is neither a sequence nor computed, and from PS3.3 what workstations and rules ask for.
INDEXED: Mapping[Level, tuple[str, ...]] = {
    Level.PATIENT: (
        *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientBirthTime", "PatientSex"),
        *("TypeOfPatientID", "OtherPatientIDs", "OtherPatientNames", "EthnicGroup", "PatientComments"),
        *("QualityControlSubject", "PatientSpeciesDescription", "PatientBreedDescription", "ResponsiblePerson"),
        *("ResponsibleOrganization", "PatientIdentityRemoved", "PatientMotherBirthName"),
        *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialSubjectID", "ClinicalTrialSiteID"),
    ),
    Level.STUDY: (
        *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName"),
        *("PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "ConsultingPhysicianName", "RequestingPhysician"),
        *("RequestingService", "AdmissionID", "AdmittingDiagnosesDescription", "ReasonForStudy", "PatientAge"),
        *("PatientSize", "PatientWeight", "Occupation", "AdditionalPatientHistory", "MedicalAlerts", "Allergies"),
        *("PregnancyStatus", "PatientState", "ServiceEpisodeID", "ServiceEpisodeDescription", "OtherStudyNumbers"),
        *("ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription"),
    ),
    Level.SERIES: (
        *("Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "SeriesDescription", "BodyPartExamined"),
        *("Laterality", "ProtocolName", "PatientPosition", "PresentationIntentType", "TimezoneOffsetFromUTC"),
        *("PerformingPhysicianName", "OperatorsName", "Manufacturer", "ManufacturerModelName", "StationName"),
        *("DeviceSerialNumber", "SoftwareVersions", "InstitutionName", "InstitutionAddress", "DeviceUID"),
        *("InstitutionalDepartmentName", "PerformedProcedureStepID", "PerformedProcedureStepStartDate"),
        *("PerformedProcedureStepStartTime", "PerformedProcedureStepEndDate", "PerformedProcedureStepEndTime"),
        *("PerformedProcedureStepDescription", "FrameOfReferenceUID", "SynchronizationFrameOfReferenceUID"),
        *("PositionReferenceIndicator", "ContrastBolusAgent", "ScanningSequence", "SequenceVariant"),
        *("SliceThickness", "SpacingBetweenSlices", "KVP", "MagneticFieldStrength", "ConvolutionKernel"),
        *("SmallestPixelValueInSeries", "LargestPixelValueInSeries", "ClinicalTrialSeriesID"),
    ),
    Level.IMAGE: (
        *("InstanceNumber", "AcquisitionNumber", "ContentDate", "ContentTime", "AcquisitionDate", "AcquisitionTime"),
        *("AcquisitionDateTime", "InstanceCreationDate", "InstanceCreationTime", "ImageType", "ImageComments"),
        *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation"),
        *("PhotometricInterpretation", "LossyImageCompression", "LossyImageCompressionRatio", "BurnedInAnnotation"),
        *("ViewPosition", "ImageLaterality", "PatientOrientation", "SliceLocation", "TemporalPositionIdentifier"),
        *("EchoTime", "RepetitionTime", "SegmentationType", "CompletionFlag", "VerificationFlag", "PreliminaryFlag"),
        *("ContentLabel", "ContentDescription", "ContentCreatorName", "PresentationCreationDate"),
        *("PresentationCreationTime", "DocumentTitle", "MIMETypeOfEncapsulatedDocument", "QualityControlImage"),
        *("RTPlanLabel", "RTPlanName", "RTPlanDate", "RTPlanTime", "StructureSetLabel", "StructureSetName"),
        *("StructureSetDate", "StructureSetTime", "DoseSummationType", "ApprovalStatus", "SOPInstanceStatus"),
    ),
}

_IDENTITY = {
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
}
_CHARACTER_SET = 0x00080005
MAX_UID = 64  # characters: PS3.5 9.1

IMPLICIT_SYNTAXES = frozenset({"1.2.840.10008.1.2", "1.2.840.113619.5.2"})  # the second: GE, big endian pixels only
BIG_ENDIAN_SYNTAX = "1.2.840.10008.1.2.2"
# PS3.5 A.5, A.7, A.11: the whole data set is deflated
DEFLATED_SYNTAXES = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

# Objects with pixels that are no images: what someone or something said about images
_DERIVED_WITH_PIXELS = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})


def scan(view: memoryview, transfer_syntax_uid: str, *, max_inflated_header_bytes: int) -> InstanceHeader:
    """Read the header of the data set in `view` and check the data set's structure to its end.

    `attributes` holds the non-empty ones of `INDEXED` from the top level. Of a deflated data set at most
    `max_inflated_header_bytes` are held in memory; beyond them the structure is not looked at, only that the stream is
    whole, and `pixel_data_offset` counts in the inflated bytes. Raises InvalidInstance; its text holds no value.
    """
    implicit = transfer_syntax_uid in IMPLICIT_SYNTAXES
    little = transfer_syntax_uid != BIG_ENDIAN_SYNTAX
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        walk = walk_deflated(view, _asked(), max_inflated_header_bytes)
    else:
        walk = Walk(view, _asked(), implicit=implicit, little=little)
        walk.run()
    return _header(walk, transfer_syntax_uid)


def is_image(header: InstanceHeader) -> bool:
    """Whether this is an image that completion waits for: pixel data, and not a segmentation of some image.

    Structured reports, key object selections, presentation states and documents have no pixel data (DESIGN section 5).
    """
    return header.pixel_data_offset is not None and header.sop_class_uid not in _DERIVED_WITH_PIXELS


@lru_cache(maxsize=1024)
def value_representation(keyword: str) -> str:
    """The VR of a standard attribute; of two, the first (`US or SS`)."""
    return dictionary_VR(keyword)[:2]


@lru_cache(maxsize=1024)
def multi_valued(keyword: str) -> bool:
    """Whether the attribute may have several values, joined by a backslash."""
    return dictionary_VM(keyword) != "1" and value_representation(keyword).encode() not in ONE_VALUE_VRS


# --- UIDs ----------------------------------------------------------------------------------------------------------

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_LEADING_ZERO = re.compile(r"(?:^|\.)0[0-9]")


def normalise_uid(text: str) -> tuple[str, bool]:
    """A UID without its padding, and whether it was irregular (spaces, more than one NUL, leading zeros).

    PS3.5 9.1: 1-64 digits and dots, no empty component. Leading zeros stay: two UIDs are equal when their characters
    are. Raises InvalidInstance for anything else.
    """
    return _normalised(text) if len(text) <= MAX_UID + 2 else _normalised.__wrapped__(text)


@lru_cache(maxsize=1024)
def _normalised(text: str) -> tuple[str, bool]:
    uid = text.strip("\0 ")
    if len(uid) > MAX_UID or not _UID.fullmatch(uid):
        raise InvalidInstance("a UID is not 1-64 digits and dots without an empty component")
    return uid, (text not in (uid, uid + "\0")) or _LEADING_ZERO.search(uid) is not None


# --- values --------------------------------------------------------------------------------------------------------


def _header(walk: Walk, transfer_syntax_uid: str) -> InstanceHeader:
    uids: dict[str, str] = {}
    irregular = False
    for tag, keyword in _IDENTITY.items():
        _, raw = walk.found.pop(tag, _ABSENT)
        if not raw:
            raise InvalidInstance(f"{keyword} is missing or empty")
        uids[keyword], odd = normalise_uid(raw.decode("latin-1"))
        irregular |= odd
    _, raw = walk.found.pop(_CHARACTER_SET, _ABSENT)
    character_set = raw.decode("latin-1").strip("\0 ")
    codecs, little = codecs_of(character_set), walk.little
    attributes: dict[str, str] = {}
    wanted = _wanted()
    for tag, (vr, raw) in walk.found.items():
        keyword = wanted[tag]
        # an implicit element, or one said to be UN, has the VR of the dictionary
        known = value_representation(keyword).encode() if vr in _UNSAID else vr
        text = text_of(raw, known, codecs, little=little)
        if text:
            attributes[keyword] = text
    return InstanceHeader(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        transfer_syntax_uid=transfer_syntax_uid,
        attributes=attributes,
        specific_character_set=character_set,
        pixel_data_offset=walk.pixel_data_offset,
        irregular_uids=irregular,
    )


_ABSENT = b"", b""
_UNSAID = frozenset({b"", b"UN", b"OB"})


@lru_cache(maxsize=1)
def _wanted() -> Mapping[int, str]:
    wanted: dict[int, str] = {}
    for keywords in INDEXED.values():
        for keyword in keywords:
            tag = tag_for_keyword(keyword)
            assert tag is not None, keyword
            wanted[tag] = keyword
    return wanted


@lru_cache(maxsize=1)
def _asked() -> Wanted:
    return Wanted(kept=frozenset({*_wanted(), *_IDENTITY, _CHARACTER_SET}), once=_IDENTITY, shapes=Shapes())
