"""The images a result was made from: their headers as they are, made fit for an object that must be right.

Sources arrive in any order and are told apart by SOP Instance UID, never by position. Received headers lack type 2
attributes, hold values that break their VR, and speak ISO 2022: demographics are read decoded, repaired where there
is one way to (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2) and left empty otherwise; identifiers are never altered. The headers
passed in are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage
from pydicom.valuerep import PersonName

from dicom_node.errors import EncodingError

__all__ = ["by_uid", "decoded", "identity", "numbers", "reference", "skeleton"]

_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Type 2 in every IOD: present even when nothing is known
_REQUIRED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"),
)
# Type 3 and 1C: only with a value. Comments, history, allergies stay with the images: a result needs none of them.
_OPTIONAL = (
    *("IssuerOfPatientID", "TypeOfPatientID", "PatientBirthTime", "PatientAge", "PatientSize", "PatientWeight"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "PatientSpeciesDescription", "ResponsiblePersonRole"),
    *("AdmissionID", "StudyDescription", "ClinicalTrialSponsorName", "ClinicalTrialProtocolID"),
    *("ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointDescription"),
    *("IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "PatientSpeciesCodeSequence"),
    *("DeidentificationMethodCodeSequence", "IssuerOfAccessionNumberSequence", "IssuerOfAdmissionIDSequence"),
)
# Type 2 and 2C of modules that are there only if the source has them: animals and clinical trials
_IF_PRESENT = (
    *("PatientBreedDescription", "PatientBreedCodeSequence", "BreedRegistrationSequence", "PatientSexNeutered"),
    *("ResponsiblePerson", "ResponsibleOrganization", "ClinicalTrialProtocolName", "ClinicalTrialSiteID"),
    *("ClinicalTrialSiteName", "ClinicalTrialTimePointID"),
)


def by_uid(sources: Sequence[Dataset]) -> Mapping[str, Dataset]:
    """The sources by SOP Instance UID. Raises EncodingError when there is none or one has no identity."""
    found: dict[str, Dataset] = {}
    for source in sources:
        for keyword in _IDENTITY:
            if not decoded(source, keyword):
                raise EncodingError(f"a source has no {keyword}")
        found.setdefault(str(source.SOPInstanceUID), source)
    if not found:
        raise EncodingError("no source images: a result needs the images it was made from")
    return found


def decoded(source: Dataset, keyword: str) -> Any:
    """The decoded value, or None when it is missing or cannot be decoded."""
    try:
        element = source[keyword]
    except (KeyError, ValueError, TypeError, OverflowError, NotImplementedError):
        return None
    return None if isinstance(element.value, bytes) else element.value


def numbers(source: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers, or None."""
    value = decoded(source, keyword)
    listed = [value] if isinstance(value, int | float) else value
    if not isinstance(listed, Sequence | MultiValue) or isinstance(listed, str) or len(listed) != count:
        return None
    try:
        found = tuple(float(number) for number in listed)
    except (TypeError, ValueError):
        return None
    return found if all(abs(number) < float("inf") for number in found) else None


def reference(source: Dataset) -> Dataset:
    """Referenced SOP Class and Instance UID of a source."""
    item = Dataset()
    item.add(DataElement("ReferencedSOPClassUID", "UI", str(source.SOPClassUID)))
    item.add(DataElement("ReferencedSOPInstanceUID", "UI", str(source.SOPInstanceUID)))
    return item


def skeleton(source: Dataset) -> Dataset:
    """What highdicom must find in a source: identity, and a patient nobody is. It never sees, so cannot log, a name.

    Its class is always CT: highdicom knows nothing to do with a retired, private or multi-frame one, and what it writes
    about the class is replaced.
    """
    item = Dataset()
    for keyword in _IDENTITY:
        setattr(item, keyword, str(source[keyword].value))
    item.SOPClassUID = CTImageStorage
    for keyword in _REQUIRED:
        setattr(item, keyword, "")
    item.Modality = str(decoded(source, "Modality") or "OT")
    item.SpecificCharacterSet = "ISO_IR 192"
    return item


# --- demographics ----------------------------------------------------------------------------------------------------


def identity(source: Dataset) -> Dataset:
    """Patient, study and trial of the source, as text (write it in a character set that holds all, ISO_IR 192)."""
    found = Dataset()
    found.StudyInstanceUID = str(source.StudyInstanceUID)
    for keyword in (*_REQUIRED, *_OPTIONAL, *_IF_PRESENT):
        value = _copied(decoded(source, keyword))
        value = _REPAIRS.get(keyword, lambda text: text)(value)
        if value or keyword in _REQUIRED or (keyword in _IF_PRESENT and keyword in source):
            found.add(DataElement(keyword, dictionary_VR(keyword), value or ("" if _is_text(keyword) else [])))
    if found.get("PatientIdentityRemoved") == "YES" and not _says_how(found):
        found.DeidentificationMethod = "not stated in the source"  # type 1C (PS3.3 C.7.1.1), and this is what we know
    if "ClinicalTrialTimePointDescription" in found and "ClinicalTrialTimePointID" not in found:
        found.ClinicalTrialTimePointID = ""
    return found


def _says_how(found: Dataset) -> bool:
    return "DeidentificationMethod" in found or "DeidentificationMethodCodeSequence" in found


def _is_text(keyword: str) -> bool:
    return dictionary_VR(keyword) != "SQ"


def _copied(value: Any) -> Any:
    """A copy in which names are text again: a PersonName keeps the bytes and character set it was read with."""
    if isinstance(value, str | PersonName):
        value = str(value)
        return re.sub(r"[\x00-\x1f\x7f]", "", value).strip()
    if isinstance(value, Sequence | MultiValue):
        return [_item(one) if isinstance(one, Dataset) else _copied(one) for one in value]
    return value


def _item(item: Dataset) -> Dataset:
    copy = Dataset()
    for element in item:
        if not element.tag.is_private and element.keyword and not isinstance(element.value, bytes):
            copy.add(DataElement(element.tag, element.VR, _copied(element.value)))
    return copy


def _date(value: Any) -> str:
    """DA; the dotted form of ACR-NEMA is read, anything else that is no date is dropped."""
    digits = re.sub(r"^(\d{4})[.-](\d\d)[.-](\d\d)$", r"\1\2\3", str(value or ""))
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return ""
    return digits if re.fullmatch(r"\d{8}", digits) else ""


def _time(value: Any) -> str:
    """TM; colons of ACR-NEMA are read."""
    digits = str(value or "").replace(":", "")
    valid = re.fullmatch(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?", digits)
    return digits if valid else ""


def _sex(value: Any) -> str:
    """M, F, O, or empty: PS3.3 C.7.1.1 has no value for unknown."""
    words = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F", "O": "O", "OTHER": "O"}
    return words.get(str(value or "").upper(), "")


def _age(value: Any) -> str:
    match = re.fullmatch(r"(\d{1,3})([DWMYdwmy])", str(value or ""))
    return f"{int(match[1]):03d}{match[2].upper()}" if match else ""


def _amount(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    text = str(value)
    return text if 0 < number < float("inf") and len(text) <= 16 else ""


def _word(*allowed: str) -> Any:
    return lambda value: value if value in allowed else ""


_REPAIRS: Mapping[str, Any] = {
    "PatientBirthDate": _date,
    "StudyDate": _date,
    "PatientBirthTime": _time,
    "StudyTime": _time,
    "PatientSex": _sex,
    "PatientAge": _age,
    "PatientSize": _amount,
    "PatientWeight": _amount,
    "PatientIdentityRemoved": _word("YES", "NO"),
    "TypeOfPatientID": _word("TEXT", "RFID", "BARCODE"),
    "PatientSexNeutered": _word("ALTERED", "UNALTERED"),
}
