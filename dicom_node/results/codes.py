"""The codes results are written with, each with how it was verified; and the node's private coding scheme.

A finding or organ without a code that somebody could verify is coded in the private scheme 99DICOMNODE, never guessed:
a wrong SNOMED number is worse than none, because machines believe it. Model packages carry codes of their own and may
replace any of these; this table is what the packages that ship with the node use, and where the encoders look up the
site of a finding whose engine names none. Qualifiers and measurement concepts are those of PS3.16 CID 240, TID 1500
and TID 1419.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from dicom_node.anatomy_codes import PRIVATE_SCHEME
from dicom_node.values import Code, Presence

__all__ = [
    "FINDINGS",
    "ORGANS",
    "PRESENCE",
    "PRIVATE_SCHEME",
    "CodeRow",
    "Verification",
    "coding_schemes",
    "concept",
    "finding_site",
    "same_code",
]


class Verification(Enum):
    """How a code was checked."""

    DICTIONARY = "in the code dictionary generated from PS3.16"
    BROWSER = "on a page of the coding scheme's own browser"
    USAGE = "independent public uses agree; not authoritative"
    PRIVATE = "no public code could be verified"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeRow:
    """A concept of the table; `site` is where a finding lies when the engine does not say."""

    code: Code
    verification: Verification
    site: Code | None = None


def _sct(value: str, meaning: str) -> Code:
    return Code(value=value, scheme="SCT", meaning=meaning)


def _dcm(value: str, meaning: str) -> Code:
    return Code(value=value, scheme="DCM", meaning=meaning)


LUNG = _sct("39607008", "Lung")
HEART = _sct("80891009", "Heart")
PLEURA = _sct("3120008", "Pleura")
CHEST = _sct("816094009", "Chest")

FINDINGS: Mapping[str, CodeRow] = {
    "tuberculosis": CodeRow(
        code=_sct("154283005", "Pulmonary tuberculosis"), verification=Verification.USAGE, site=LUNG
    ),
    "cardiomegaly": CodeRow(code=_sct("8186001", "Cardiomegaly"), verification=Verification.USAGE, site=HEART),
    "pleural_thickening": CodeRow(
        code=Code(value="PLTHICK", scheme=PRIVATE_SCHEME, meaning="Pleural thickening"),
        verification=Verification.PRIVATE,
        site=PLEURA,
    ),
    "pleural_effusion": CodeRow(
        code=_sct("60046008", "Pleural effusion"), verification=Verification.DICTIONARY, site=PLEURA
    ),
    "pneumothorax": CodeRow(code=_sct("36118008", "Pneumothorax"), verification=Verification.DICTIONARY, site=PLEURA),
    "consolidation": CodeRow(code=_sct("95436008", "Lung consolidation"), verification=Verification.USAGE, site=LUNG),
    "atelectasis": CodeRow(code=_sct("46621007", "Atelectasis"), verification=Verification.USAGE, site=LUNG),
    "nodule_mass": CodeRow(code=_sct("309529002", "Lung mass"), verification=Verification.BROWSER, site=LUNG),
    "fibrosis": CodeRow(code=_sct("51615001", "Fibrosis of lung"), verification=Verification.USAGE, site=LUNG),
    "infiltration": CodeRow(code=_dcm("112121", "Infiltrate"), verification=Verification.DICTIONARY, site=LUNG),
    "calcification": CodeRow(
        code=_dcm("112063", "Abnormal calcifications"), verification=Verification.DICTIONARY, site=CHEST
    ),
}

ORGANS: Mapping[str, CodeRow] = {
    key: CodeRow(code=_sct(value, meaning), verification=Verification.DICTIONARY)
    for key, value, meaning in (
        ("lung", "39607008", "Lung"),
        ("heart", "80891009", "Heart"),
        ("pleura", "3120008", "Pleura"),
        ("mediastinum", "72410000", "Mediastinum"),
        ("chest", "816094009", "Chest"),
        ("spleen", "78961009", "Spleen"),
        ("liver", "10200004", "Liver"),
        ("kidney", "64033007", "Kidney"),
        ("pancreas", "15776009", "Pancreas"),
        ("gallbladder", "28231008", "Gallbladder"),
        ("stomach", "69695003", "Stomach"),
        ("bladder", "89837001", "Bladder"),
        ("brain", "12738006", "Brain"),
        ("aorta", "15825003", "Aorta"),
        ("trachea", "44567001", "Trachea"),
        ("esophagus", "32849002", "Esophagus"),
        ("adrenal_gland", "23451007", "Adrenal gland"),
        ("colon", "71854001", "Colon"),
        ("small_intestine", "30315005", "Small intestine"),
        ("thyroid", "69748006", "Thyroid"),
        ("prostate", "41216001", "Prostate"),
        ("portal_vein", "32764006", "Portal vein"),
        ("vertebra", "51282000", "Vertebra"),
        ("rib", "113197003", "Rib"),
        ("femur", "71341001", "Femur"),
        ("mandible", "91609006", "Mandible"),
        ("maxilla", "70925003", "Maxilla"),
        ("maxillary_sinus", "15924003", "Maxillary sinus"),
        ("tooth", "38199008", "Tooth"),
    )
}

# --- what the encoders say themselves; every one is in the dictionary ------------------------------------------------

ANATOMICAL_STRUCTURE = _sct("91723000", "Anatomical Structure")
RIGHT = _sct("24028007", "Right")
LEFT = _sct("7771000", "Left")
PRESENCE: Mapping[Presence, Code] = {
    Presence.PRESENT: _sct("52101004", "Present"),
    Presence.ABSENT: _sct("272519000", "Absent"),
    Presence.UNDETERMINED: _sct("373068000", "Undetermined"),
}
CERTAINTY = _dcm("111012", "Certainty of Finding")
VOLUME = _sct("118565006", "Volume")
ATTENUATION = _dcm("112031", "Attenuation Coefficient")
MEAN = _sct("373098007", "Mean")
PERCENT = Code(value="%", scheme="UCUM", meaning="Percent")
CUBIC_CENTIMETRE = Code(value="cm3", scheme="UCUM", meaning="cubic centimeter")
HOUNSFIELD_UNIT = Code(value="[hnsf'U]", scheme="UCUM", meaning="Hounsfield unit")
# CID 100 holds modality-specific procedures too, but not one that validators of several editions all know
IMAGING_PROCEDURE = _sct("363679005", "Imaging procedure")
MEASUREMENT_REPORT = _dcm("126000", "Imaging Measurement Report")
PROCESSING_EQUIPMENT = _dcm("109102", "Processing Equipment")
ACQUISITION_EQUIPMENT = _dcm("109101", "Acquisition Equipment")
COMMENT = _dcm("121106", "Comment")
DEVICE = _dcm("121007", "Device")
SEGMENTATION = _dcm("113076", "Segmentation")
SOURCE_IMAGE = _dcm("121322", "Source image for image processing operation")
SOURCE_OF_DOCUMENT = _dcm("121324", "Source image")  # CID 7060
BACKGROUND = _dcm("125040", "Background")
FINDING = _dcm("121071", "Finding")
LATERALITY = _sct("272741003", "Laterality")
TOPOGRAPHICAL_MODIFIER = _sct("106233006", "Topographical modifier")
TRACKING_IDENTIFIER = _dcm("112039", "Tracking Identifier")
TRACKING_UID = _dcm("112040", "Tracking Unique Identifier")
MILLIMETRE = Code(value="mm", scheme="UCUM", meaning="mm")
# CID 7061
CT_MODEL = Code(value="85040-4", scheme="LN", meaning="CT 3D CAM model")
MR_MODEL = Code(value="85041-2", scheme="LN", meaning="MR 3D CAM model")
US_MODEL = _dcm("129018", "US 3D CAM model")

_SITES: Mapping[tuple[str, str], Code] = {
    (row.code.scheme, row.code.value): row.site for row in FINDINGS.values() if row.site is not None
}


def finding_site(code: Code) -> Code | None:
    """Where the table says a finding of this code lies, or None."""
    return _SITES.get((code.scheme, code.value))


def same_code(one: Code, other: Code | None) -> bool:
    """Whether both name the same concept; the meaning is only for people (PS3.3 8.3)."""
    return other is not None and (one.scheme, one.value) == (other.scheme, other.value)


def concept(code: Code) -> CodedConcept:
    """The code as highdicom wants it; a meaning longer than LO allows is cut (PS3.3 8.3: 64 characters)."""
    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning[:64])


def coding_schemes(dataset: Dataset) -> list[Dataset]:
    """Items of Coding Scheme Identification Sequence for the private schemes (99...) used anywhere in `dataset`.

    PS3.3 C.12.1.1.3: whoever reads a private code must be able to find out whose it is.
    """
    used = {designator for designator in _designators(dataset) if designator.startswith("99")}
    return [_scheme(designator) for designator in sorted(used)]


def _designators(dataset: Dataset) -> Iterator[str]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _designators(item)
        elif element.keyword == "CodingSchemeDesignator":
            yield str(element.value)


def _scheme(designator: str) -> Dataset:
    if designator != PRIVATE_SCHEME:
        item = Dataset()
        item.CodingSchemeDesignator = designator
        return item
    return CodingSchemeIdentificationItem(
        designator=designator,
        name="dicom-node codes for concepts without a verified public code",
        version="1",
        responsible_organization="dicom-node",
    )
