"""Organ names to codes: each stands in the standard's tables, common spellings find their own, none is guessed."""

from typing import Any

import pytest
from pydicom.sr._concepts_dict import concepts

from dicom_node.anatomy_codes import _ROWS, _VERTEBRAE, label_codes
from dicom_node.models.formats.labels import label_output
from dicom_node.values import Code

MEANINGS: dict[str, set[str]] = {}
for _entries in concepts["SCT"].values():
    for _value, (_meaning, _) in _entries.items():
        MEANINGS.setdefault(_value, set()).add(_meaning)

SIDED = (
    *("kidney", "adrenal_gland", "lung_upper_lobe", "lung_lower_lobe", "subclavian_artery", "common_carotid_artery"),
    *("brachiocephalic_vein", "iliac_artery", "iliac_vena", "humerus", "scapula", "clavicula", "femur", "kidney_cyst"),
)
SINGLE = (
    *("spleen", "gallbladder", "liver", "stomach", "pancreas", "lung_middle_lobe_right", "esophagus", "trachea"),
    *("thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "sacrum", "heart", "aorta"),
    *("pulmonary_vein", "pulmonary_artery", "brachiocephalic_trunk", "atrial_appendage_left", "superior_vena_cava"),
    *("inferior_vena_cava", "spinal_cord", "brain", "skull", "sternum", "costal_cartilages", "heart_myocardium"),
    *("heart_atrium_left", "heart_atrium_right", "heart_ventricle_left", "heart_ventricle_right", "face"),
)
NUMBERED = (
    *(
        f"vertebrae_{letter}{number}"
        for letter, last in (("C", 7), ("T", 12), ("L", 5))
        for number in range(1, last + 1)
    ),
    "vertebrae_S1",
    *(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)),
)
# no code of the dictionary says exactly this, and a wider one would say nothing
UNCODED = (
    *(
        f"{name}_{side}"
        for name in ("gluteus_maximus", "gluteus_medius", "gluteus_minimus")
        for side in ("left", "right")
    ),
    *(f"{name}_{side}" for name in ("autochthon", "iliopsoas", "hip") for side in ("left", "right")),
    "portal_vein_and_splenic_vein",
)
TOTALSEGMENTATOR = (*(f"{name}_{side}" for name in SIDED for side in ("left", "right")), *SINGLE, *NUMBERED, *UNCODED)


def _meaning(code: Code | None) -> str:
    return code.meaning if code else ""


@pytest.mark.parametrize("row", _ROWS.values(), ids=_ROWS.keys())
def test_every_code_stands_in_the_dictionary_with_its_meaning(row: Any) -> None:
    assert row.meaning in MEANINGS[row.value]


def test_every_vertebra_is_itself() -> None:
    for letter, values in _VERTEBRAE.items():
        for number, value in enumerate(values, start=1):
            assert f"{letter.upper()}{number} vertebra" in MEANINGS[value]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SIDED)
def test_a_paired_organ_has_its_side_as_a_modifier(name: str, side: str) -> None:
    found = label_codes(f"{name}_{side}")
    assert found is not None and _meaning(found.modifier) == side.capitalize()
    assert found.name.startswith(side.capitalize()) and found.type == label_codes(name).type  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*SINGLE, *NUMBERED])
def test_every_other_organ_of_the_whole_body_has_a_code(name: str) -> None:
    found = label_codes(name)
    assert found is not None
    assert _meaning(found.modifier) == ("" if "rib_" not in name else name.split("_")[1].capitalize())
    assert found.type.meaning in MEANINGS[found.type.value]


def test_names_of_a_package_of_104_or_117_organs_stay_apart() -> None:
    assert len(set(TOTALSEGMENTATOR)) == 117 + 7  # the second generation, and what only the first has
    shown = [label_output(index, name)[0]["name"] for index, name in enumerate(TOTALSEGMENTATOR, start=1)]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("name", UNCODED)
def test_what_no_code_says_has_none(name: str) -> None:
    assert label_codes(name) is None


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        ("Right Kidney", "Kidney", "Right"),
        ("rt kidney", "Kidney", "Right"),
        ("LeftKidney", "Kidney", "Left"),
        ("kidney-L", "Kidney", "Left"),
        ("kidneys", "Kidney", ""),
        ("IVC", "Inferior vena cava", ""),
        ("postcava", "Inferior vena cava", ""),
        ("Inferior Vena Cava", "Inferior vena cava", ""),
        ("left adrenal", "Adrenal gland", "Left"),
        ("upper lobe of the left lung", "Upper lobe of lung", "Left"),
        ("left upper lobe", "Upper lobe of lung", "Left"),
        ("left ventricle", "Left ventricle", ""),
        ("Left-Lateral-Ventricle", "Lateral Ventricle", "Left"),
        ("Right-Accumbens-Area", "Nucleus Accumbens", "Right"),
        ("Brain-Stem", "Brain Stem", ""),
        ("oesophagus", "Esophagus", ""),
        ("Gall bladder", "Gallbladder", ""),
        ("vertebra L3", "L3 vertebra", ""),
        ("left rib 7", "Rib", "Left"),
        ("liver tumour", "Tumor", ""),
        ("left lung nodule", "Nodule", "Left"),
    ],
)
def test_spelling_is_free(name: str, meaning: str, side: str) -> None:
    found = label_codes(name)
    assert found is not None and (found.type.meaning, _meaning(found.modifier)) == (meaning, side)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "  ",
            "class 7",
            "c1",
            "L3",
            "left",
            "left liver",
            "left right kidney",
            "left and right lung",
            "prostate_uterus",
        ),
        *(
            "rib 13",
            "rib 0",
            "vertebrae T13",
            "hepatic vessel",
            "not a kidney",
            "left middle lobe of lung",
            "liver spleen",
        ),
    ],
)
def test_no_code_is_guessed(name: str) -> None:
    assert label_codes(name) is None


def test_something_abnormal_is_no_anatomical_structure() -> None:
    cyst, kidney = label_codes("kidney_cyst_left"), label_codes("kidney_left")
    assert cyst is not None and kidney is not None
    assert (
        cyst.category.meaning == "Morphologically Abnormal Structure" and cyst.category.meaning in MEANINGS["49755003"]
    )
    assert kidney.category.meaning == "Anatomical Structure" and cyst.name == "Left kidney cyst"


def test_a_class_of_a_foreign_package_gets_code_side_and_name() -> None:
    label, private = label_output(2, "Right_Kidney")
    assert not private and label["name"] == "Right kidney" and label["key"] == "right-kidney-2"
    assert label["segment"]["type"] == ["SCT", "64033007", "Kidney"]
    assert label["segment"]["modifier"] == ["SCT", "24028007", "Right"]


def test_a_class_without_a_code_keeps_its_name_in_a_private_scheme() -> None:
    label, private = label_output(7, "gluteus_maximus_left")
    assert private and label["name"] == "gluteus maximus left" and "modifier" not in label["segment"]
    assert label["segment"]["type"][0] == "99DICOMNODE" and len(label["segment"]["type"][1]) <= 16
    assert label["segment"]["type"] != label_output(8, "gluteus_maximus_right")[0]["segment"]["type"]
