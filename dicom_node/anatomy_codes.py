"""What model packages call organs, and the verified public code of each.

Only codes of the dictionary generated from PS3.16 are here (a test looks each up), and only where the code is true of
what the name says: it may be wider (each rib is a Rib, its number stays in the name), never narrower or a neighbour. A
name without such a code has none; whoever writes it keeps the name under a private scheme. Side is a modifier (PS3.16
CID 244) where the code has both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dicom_node.values import Code

__all__ = ["PRIVATE_SCHEME", "LabelCodes", "label_codes", "private_code"]

PRIVATE_SCHEME = "99DICOMNODE"

_STRUCTURE = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")
_ABNORMAL = Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure")
_SIDES = {
    "left": Code(value="7771000", scheme="SCT", meaning="Left"),
    "right": Code(value="24028007", scheme="SCT", meaning="Right"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCodes:
    """Category, type and side of a segment (PS3.3 C.8.20.2), and what to call it: 'Left kidney', 'Right rib 4'."""

    category: Code
    type: Code
    modifier: Code | None
    name: str


@dataclass(frozen=True, slots=True)
class _Row:
    """SNOMED CT identifier and its meaning in the dictionary; `sided`: there is one on each side of the body.

    `name` is what people call it, where that is not the meaning.
    """

    value: str
    meaning: str
    sided: bool = False
    category: Code = _STRUCTURE
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.meaning)


# Names in one spelling; `_WORDS` and `_NAMES` bring others to it.
_ROWS: Mapping[str, _Row] = {
    # abdomen and pelvis
    "spleen": _Row("78961009", "Spleen"),
    "liver": _Row("10200004", "Liver"),
    "gallbladder": _Row("28231008", "Gallbladder"),
    "pancreas": _Row("15776009", "Pancreas"),
    "stomach": _Row("69695003", "Stomach"),
    "duodenum": _Row("38848004", "Duodenum"),
    "small intestine": _Row("30315005", "Small intestine"),
    "large intestine": _Row("14742008", "Large intestine"),
    "colon": _Row("71854001", "Colon"),
    "sigmoid colon": _Row("60184004", "Sigmoid colon"),
    "rectum": _Row("34402009", "Rectum"),
    "kidney": _Row("64033007", "Kidney", sided=True),
    "adrenal gland": _Row("23451007", "Adrenal gland", sided=True),
    "bladder": _Row("89837001", "Bladder"),
    "prostate": _Row("41216001", "Prostate"),
    "seminal vesicle": _Row("64739004", "Seminal Vesicle", sided=True),
    "uterus": _Row("35039007", "Uterus"),
    "ureter": _Row("87953007", "Ureter", sided=True),
    # chest and neck
    "lung": _Row("39607008", "Lung", sided=True),
    "upper lobe lung": _Row("45653009", "Upper lobe of lung", sided=True),
    "lower lobe lung": _Row("90572001", "Lower lobe of lung", sided=True),
    "right middle lobe lung": _Row("72481006", "Middle lobe of right lung"),
    "trachea": _Row("44567001", "Trachea"),
    "airway": _Row("89187006", "Airway structure"),
    "bronchus": _Row("955009", "Bronchus", sided=True),
    "esophagus": _Row("32849002", "Esophagus"),
    "thyroid gland": _Row("69748006", "Thyroid"),
    "thymus": _Row("9875009", "Thymus"),
    "mediastinum": _Row("72410000", "Mediastinum"),
    "larynx": _Row("4596009", "Larynx"),
    "breast": _Row("76752008", "Breast", sided=True),
    "parotid gland": _Row("45289007", "Parotid gland", sided=True),
    "submandibular gland": _Row("54019009", "Submandibular gland", sided=True),
    # heart and vessels
    "heart": _Row("80891009", "Heart"),
    "myocardium": _Row("122448007", "Cardiac muscle"),
    "left atrium": _Row("82471001", "Left atrium"),
    "right atrium": _Row("73829009", "Right atrium"),
    "left heart ventricle": _Row("87878005", "Left ventricle"),
    "right heart ventricle": _Row("53085002", "Right ventricle"),
    "left atrial appendage": _Row("33626005", "Left auricular appendage"),
    "right atrial appendage": _Row("68300000", "Right auricular appendage"),
    "aorta": _Row("15825003", "Aorta"),
    "abdominal aorta": _Row("7832008", "Abdominal aorta"),
    "ascending aorta": _Row("54247002", "Ascending aorta"),
    "pulmonary artery": _Row("81040000", "Pulmonary artery", sided=True),
    "pulmonary vein": _Row("122972007", "Pulmonary vein", sided=True),
    "superior vena cava": _Row("48345005", "Superior vena cava"),
    "inferior vena cava": _Row("64131007", "Inferior vena cava"),
    "portal vein": _Row("32764006", "Portal vein"),
    "splenic vein": _Row("35819009", "Splenic vein"),
    "hepatic vein": _Row("8993003", "Hepatic vein"),
    "brachiocephalic trunk": _Row("12691009", "brachiocephalic trunk"),
    "brachiocephalic vein": _Row("8887007", "Brachiocephalic vein", sided=True),
    "subclavian artery": _Row("36765005", "Subclavian artery", sided=True),
    "common carotid artery": _Row("32062004", "Common carotid artery", sided=True),
    "carotid artery": _Row("69105007", "Carotid Artery", sided=True),
    "iliac artery": _Row("10293006", "Iliac artery", sided=True),
    "iliac vein": _Row("244411005", "Iliac vein", sided=True),
    "common iliac artery": _Row("73634005", "Common iliac artery", sided=True),
    "common iliac vein": _Row("46027005", "Common iliac vein", sided=True),
    # bones and muscles
    "vertebra": _Row("51282000", "Vertebra"),
    "sacrum": _Row("54735007", "Sacrum"),
    "rib": _Row("113197003", "Rib", sided=True),
    "costal cartilage": _Row("50016007", "Costal Cartilage"),
    "sternum": _Row("56873002", "Sternum"),
    "clavicle": _Row("51299004", "Clavicle", sided=True),
    "scapula": _Row("79601000", "Scapula", sided=True),
    "humerus": _Row("85050009", "Humerus", sided=True),
    "ulna": _Row("23416004", "Ulna", sided=True),
    "femur": _Row("71341001", "Femur", sided=True),
    "femoral head": _Row("2812003", "Femoral head", sided=True),
    "tibia": _Row("12611008", "Tibia", sided=True),
    "fibula": _Row("87342007", "Fibula", sided=True),
    "patella": _Row("64234005", "Patella", sided=True),
    "skull": _Row("89546000", "Skull"),
    "mandible": _Row("91609006", "Mandible"),
    "maxilla": _Row("70925003", "Maxilla"),
    "erector spinae muscle": _Row("44947003", "Erector spinae muscle", sided=True),
    "skeletal muscle": _Row("127954009", "Skeletal muscle"),
    # head
    "brain": _Row("12738006", "Brain"),
    "brain stem": _Row("119238007", "Brain Stem"),
    "cerebellum": _Row("113305005", "Cerebellum"),
    "cerebellar cortex": _Row("25991003", "Cerebellar Cortex", sided=True),
    "cerebellar white matter": _Row("33060004", "Cerebellar White Matter", sided=True),
    "cerebral cortex": _Row("40146001", "Cerebral cortex", sided=True),
    "cerebral white matter": _Row("68523003", "Cerebral White Matter", sided=True),
    "amygdala": _Row("4958002", "Amygdala", sided=True),
    "caudate nucleus": _Row("11000004", "Caudate Nucleus", sided=True),
    "pallidum": _Row("14738005", "Globus Pallidus", sided=True),
    "hippocampus": _Row("5366008", "Hippocampus", sided=True),
    "nucleus accumbens": _Row("427667007", "Nucleus Accumbens", sided=True),
    "putamen": _Row("89278009", "Putamen", sided=True),
    "thalamus": _Row("42695009", "Thalamus", sided=True),
    "lateral ventricle": _Row("66720007", "Lateral Ventricle", sided=True),
    "inferior horn lateral ventricle": _Row("53118009", "Inferior Horn of Lateral Ventricle", sided=True),
    "3rd ventricle": _Row("49841001", "Third ventricle"),
    "4th ventricle": _Row("35918002", "Fourth Ventricle"),
    "spinal cord": _Row("2748008", "Spinal cord"),
    "face": _Row("89545001", "Face"),
    "eye": _Row("81745001", "Eye", sided=True),
    "lens": _Row("78076003", "Lens", sided=True),
    "optic nerve": _Row("18234004", "optic nerve", sided=True),
    "optic chiasm": _Row("244453006", "Optic chiasm"),
    # what is no organ
    "tumor": _Row("108369006", "Tumor", category=_ABNORMAL),
    "lesion": _Row("52988006", "Lesion", category=_ABNORMAL),
    "nodule": _Row("27925004", "Nodule", category=_ABNORMAL),
    "cyst": _Row("367643001", "Cyst", category=_ABNORMAL),
    "edema": _Row("79654002", "Edema", category=_ABNORMAL),
    "necrosis": _Row("6574001", "Necrosis", category=_ABNORMAL),
}
# C1 to C7, T1 to T12, L1 to L5
_VERTEBRAE = {
    "c": ("14806007", "39976000", "113205007", "5329002", "36978003", "36054005", "87391001"),
    "t": (
        *("64864005", "53733008", "1626008", "73071006", "56401006", "45296009"),
        *("62487009", "11068009", "82687006", "7610001", "12989004", "23215003"),
    ),
    "l": ("66794005", "14293000", "36470004", "11994002", "49668003"),
}

_FILLING = frozenset({"of", "the"})
_WORDS = {
    **{"lt": "left", "l": "left", "rt": "right", "r": "right", "oesophagus": "esophagus", "vena": "vein"},
    **{"kidneys": "kidney", "lungs": "lung", "glands": "gland", "lobes": "lobe", "veins": "vein", "eyes": "eye"},
    **{"arteries": "artery", "vertebrae": "vertebra", "ribs": "rib", "cartilages": "cartilage", "bowel": "intestine"},
    **{"clavicula": "clavicle", "bronchi": "bronchus", "muscles": "muscle", "ureters": "ureter", "femora": "femur"},
    **{"ventricles": "ventricle", "third": "3rd", "fourth": "4th", "brainstem": "brain stem", "scapulae": "scapula"},
    **{"tumour": "tumor", "lesions": "lesion", "nodules": "nodule", "cysts": "cyst", "oedema": "edema"},
    **{"thyroid": "thyroid gland", "parotid": "parotid gland", "submandibular": "submandibular gland"},
    **{"adrenal": "adrenal gland", "adrenals": "adrenal gland", "suprarenal": "adrenal gland"},
    **{"ivc": "inferior vein cava", "svc": "superior vein cava", "postcava": "inferior vein cava"},
    **{"caudate": "caudate nucleus", "accumbens": "nucleus accumbens"},
}
# Whole names for other ones
_NAMES = {
    **{"gall bladder": "gallbladder", "urinary bladder": "bladder", "innominate artery": "brachiocephalic trunk"},
    **{"brachiocephalic artery": "brachiocephalic trunk", "innominate vein": "brachiocephalic vein"},
    **{"hepatic portal vein": "portal vein", "heart myocardium": "myocardium", "cranium": "skull"},
    **{"left heart atrium": "left atrium", "right heart atrium": "right atrium"},
    **{"left ventricle": "left heart ventricle", "right ventricle": "right heart ventricle"},
    **{"left upper lobe": "left upper lobe lung", "right upper lobe": "right upper lobe lung"},
    **{"left lower lobe": "left lower lobe lung", "right lower lobe": "right lower lobe lung"},
    **{"right middle lobe": "right middle lobe lung", "middle lobe lung": "right middle lobe lung"},
    **{"globus pallidus": "pallidum", "thalamus proper": "thalamus", "prostate gland": "prostate"},
    **{"left accumbens area": "left accumbens", "right accumbens area": "right accumbens"},
    **{"erector spinae": "erector spinae muscle", "thymus gland": "thymus"},
}
_ABNORMAL_WORDS = frozenset({"tumor", "lesion", "nodule", "cyst"})
_SEPARATORS = re.compile(r"[^a-z0-9]+")


def label_codes(name: str) -> LabelCodes | None:
    """The codes of what a package calls `name`; None when there is none that was verified.

    Spelling is free: case, underscores and hyphens, `LeftKidney`, the order of the words, lt / rt, plurals. Something
    abnormal in an organ has the code of what it is, and the organ in its name.
    """
    words = _words(name)
    row = _TABLE.get(words)
    if row is not None:
        return _coded(row, "")
    sides = words & _SIDES.keys()
    if len(sides) > 1:
        return None
    side, base = next(iter(sides), ""), words - sides
    number = next((word for word in base if word.isdigit()), "")
    if base == {"rib", number} and 1 <= int(number) <= 12:
        rib = _ROWS["rib"]
        return _coded(replace(rib, name=f"{rib.name} {int(number)}"), side)
    row = _TABLE.get(base) or _abnormal(base)
    return _coded(row, side) if row is not None and (row.sided or not side) else None


def _abnormal(words: frozenset[str]) -> _Row | None:
    """A tumor, lesion, nodule or cyst of an organ of the table."""
    found = words & _ABNORMAL_WORDS
    organ = _TABLE.get(words - found)
    if len(found) != 1 or organ is None:
        return None
    what = _ROWS[next(iter(found))]
    return replace(what, sided=organ.sided, name=f"{organ.name} {_small(what.name)}")


def _coded(row: _Row, side: str) -> LabelCodes:
    name = f"{side} {_small(row.name)}" if side else row.name
    return LabelCodes(
        category=row.category,
        type=Code(value=row.value, scheme="SCT", meaning=row.meaning),
        modifier=_SIDES[side] if side else None,
        name=name[0].upper() + name[1:],
    )


def _small(text: str) -> str:
    """Inside a name; T12 stays as it is."""
    return " ".join(word.lower() if word[1:].islower() else word for word in text.split())


def _canonical(name: str) -> frozenset[str]:
    """The words of a name, which come in any order, each in one spelling."""
    plain = [word for word in _SEPARATORS.split(name.lower()) if word not in _FILLING]
    return frozenset(" ".join(_WORDS.get(word, word) for word in plain).split())


def _words(name: str) -> frozenset[str]:
    words = _canonical(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return _RENAMED.get(words, words)


def _table() -> Mapping[frozenset[str], _Row]:
    found = {_canonical(name): row for name, row in _ROWS.items()}
    for letter, values in _VERTEBRAE.items():
        for number, value in enumerate(values, start=1):
            row = _Row(value, f"{letter.upper()}{number} vertebra")
            found[frozenset({"vertebra", f"{letter}{number}"})] = row  # a mere "c1" may be any class
    found[frozenset({"vertebra", "s1"})] = replace(_ROWS["vertebra"], name="S1 vertebra")
    return found


_TABLE = _table()
_RENAMED = {_canonical(name): _canonical(target) for name, target in _NAMES.items()}


def private_code(spelling: str, meaning: str) -> Code:
    """What has no verified code, by its own name: of one `spelling` it is the same wherever it comes from."""
    digest = hashlib.sha256(spelling.encode()).hexdigest()[:12].upper()
    return Code(value=f"L{digest}", scheme=PRIVATE_SCHEME, meaning=meaning)
