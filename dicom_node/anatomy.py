"""View, body part and laterality of a series: one word each, from the plain and the coded attributes together.

In a DX image only the coded ones are mandatory (PS3.3 C.8.11.5), in CR and CT only the plain ones are usual; rules
should not have to know. Each function returns every distinct word it finds with the attribute that says it: none
means absent, several mean that the attributes or the instances disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Values", "body_parts", "lateralities", "views"]

Values = Callable[[str], list[Any]]
"""The distinct, normalised values of a keyword in the series."""

# PS3.16 CID 4010 and 4014 (SNOMED CT and, second, the SNOMED-RT identifiers older systems write), with the defined
# terms of View Position (0018,5101) of PS3.3 C.8.7.1, C.8.11.5 and C.8.11.7. What has no term there keeps a plain word.
_VIEWS: Mapping[str, str] = {
    **{"399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-40888": "PA"},
    **{"399033003": "FRONTAL", "R-10202": "FRONTAL", "399067008": "LATERAL", "R-102CD": "LATERAL"},
    **{"399173006": "LL", "R-10236": "LL", "399198007": "RL", "R-10232": "RL"},
    **{"399182000": "OBLIQUE", "R-102C1": "OBLIQUE"},
    **{"399135007": "LAO", "R-10220": "LAO", "399356000": "RAO", "R-40985": "RAO"},
    **{"399006002": "LPO", "R-10212": "LPO", "399038007": "RPO", "R-10210": "RPO"},
    **{"399162004": "CC", "R-10242": "CC", "399196006": "FB", "R-10244": "FB"},
    **{"399368009": "MLO", "R-10226": "MLO", "399260004": "ML", "R-10224": "ML"},
    **{"399352003": "LM", "R-10228": "LM", "399099002": "LMO", "R-10230": "LMO"},
    **{"399192008": "XCCL", "R-1024A": "XCCL", "399101009": "XCCM", "R-1024B": "XCCM"},
    **{"399188001": "SIO", "R-102D0": "SIO", "441555000": "ISO", "R-40AAA": "ISO"},
}
# A general word beside one of its special cases is no contradiction.
_GENERAL: Mapping[str, frozenset[str]] = {
    "FRONTAL": frozenset({"AP", "PA"}),
    "LATERAL": frozenset({"LL", "RL", "LLD", "RLD"}),
    "OBLIQUE": frozenset({"LAO", "RAO", "LPO", "RPO", "LLO", "RLO"}),
}

# PS3.16 table L-1: Body Part Examined (0018,0015) and the codes of CID 4031 and 4030, by SNOMED CT identifier.
_BODY_PARTS: Mapping[str, str] = {
    **{"818981001": "ABDOMEN", "818982008": "ABDOMENPELVIS", "85856004": "ACJOINT", "70258002": "ANKLE"},
    **{"40983000": "ARM", "28273000": "BILEDUCT", "89837001": "BLADDER", "12738006": "BRAIN", "76752008": "BREAST"},
    **{"955009": "BRONCHUS", "80144004": "CALCANEUS", "816094009": "CHEST", "416550000": "CHESTABDOMEN"},
    **{"416775004": "CHESTABDPELVIS", "51299004": "CLAVICLE", "64688005": "COCCYX", "71854001": "COLON"},
    **{"122494005": "CSPINE", "1217257000": "CTSPINE", "38848004": "DUODENUM", "16953009": "ELBOW"},
    **{"32849002": "ESOPHAGUS", "66019005": "EXTREMITY", "81745001": "EYE", "71341001": "FEMUR"},
    **{"87342007": "FIBULA", "7569003": "FINGER", "56459004": "FOOT", "14975008": "FOREARM"},
    **{"28231008": "GALLBLADDER", "85562004": "HAND", "69536005": "HEAD", "774007": "HEADNECK", "80891009": "HEART"},
    **{"24136001": "HIP", "85050009": "HUMERUS", "361078006": "IAC", "34516001": "ILEUM", "22356005": "ILIUM"},
    **{"661005": "JAW", "91609006": "JAW", "21306003": "JEJUNUM", "64033007": "KIDNEY", "72696002": "KNEE"},
    **{"14742008": "LARGEINTESTINE", "4596009": "LARYNX", "30021000": "LEG", "10200004": "LIVER"},
    **{"122496007": "LSPINE", "1217253001": "LSSPINE", "59066005": "MASTOID", "70925003": "MAXILLA"},
    **{"72410000": "MEDIASTINUM", "45048000": "NECK", "417437006": "NECKCHEST", "416152001": "NECKCHESTABDOMEN"},
    **{"416319003": "NECKCHESTABDPELV", "55024004": "OPTICCANAL", "363654007": "ORBIT", "15776009": "PANCREAS"},
    **{"45289007": "PAROTID", "64234005": "PATELLA", "816092008": "PELVIS", "41216001": "PROSTATE"},
    **{"34402009": "RECTUM", "113197003": "RIB", "79601000": "SCAPULA", "7844006": "SCJOINT", "42575006": "SELLA"},
    **{"58742003": "SESAMOID", "16982005": "SHOULDER", "39723000": "SIJOINT", "89546000": "SKULL"},
    **{"30315005": "SMALLINTESTINE", "421060004": "SPINE", "78961009": "SPLEEN", "54735007": "SSPINE"},
    **{"56873002": "STERNUM", "69695003": "STOMACH", "54019009": "SUBMANDIBULAR", "40689003": "TESTIS"},
    **{"68367000": "THIGH", "76505004": "THUMB", "9875009": "THYMUS", "69748006": "THYROID", "1217256009": "TLSPINE"},
    **{"53620006": "TMJ", "29707007": "TOE", "44567001": "TRACHEA", "122495006": "TSPINE"},
    **{"431491007": "UPRURINARYTRACT", "87953007": "URETER", "13648007": "URETHRA", "35039007": "UTERUS"},
    **{"38266002": "WHOLEBODY", "74670003": "WRIST", "13881006": "ZYGOMA"},
}
# ... and by the SNOMED-RT identifiers of the same concepts, and SNOMED CT ones of earlier editions.
_BODY_PARTS_BEFORE: Mapping[str, str] = {
    **{"113345001": "ABDOMEN", "T-D4000": "ABDOMEN", "416949008": "ABDOMENPELVIS", "R-FAB57": "ABDOMENPELVIS"},
    **{"T-15420": "ACJOINT", "T-15750": "ANKLE", "T-D8200": "ARM", "T-60610": "BILEDUCT", "T-74000": "BLADDER"},
    **{"T-A0100": "BRAIN", "T-04000": "BREAST", "T-26000": "BRONCHUS", "T-12770": "CALCANEUS", "51185008": "CHEST"},
    **{"T-D3000": "CHEST", "R-FAB55": "CHESTABDOMEN", "R-FAB56": "CHESTABDPELVIS", "T-12310": "CLAVICLE"},
    **{"T-11BF0": "COCCYX", "T-59300": "COLON", "T-11501": "CSPINE", "T-58200": "DUODENUM", "T-15430": "ELBOW"},
    **{"T-56000": "ESOPHAGUS", "T-D0300": "EXTREMITY", "T-AA000": "EYE", "T-12710": "FEMUR", "T-12750": "FIBULA"},
    **{"T-D8800": "FINGER", "T-D9700": "FOOT", "T-D8500": "FOREARM", "T-63000": "GALLBLADDER", "T-D8700": "HAND"},
    **{"T-D1100": "HEAD", "T-D1000": "HEADNECK", "T-32000": "HEART", "T-15710": "HIP", "T-12410": "HUMERUS"},
    **{"T-AB959": "IAC", "T-58600": "ILEUM", "T-12340": "ILIUM", "T-11180": "JAW", "T-D1213": "JAW"},
    **{"T-58400": "JEJUNUM", "T-71000": "KIDNEY", "T-D9200": "KNEE", "T-59000": "LARGEINTESTINE"},
    **{"T-24100": "LARYNX", "T-D9400": "LEG", "T-62000": "LIVER", "T-11503": "LSPINE", "T-11133": "MASTOID"},
    **{"T-11170": "MAXILLA", "T-D3300": "MEDIASTINUM", "T-D1600": "NECK", "R-FAB52": "NECKCHEST"},
    **{"R-FAB53": "NECKCHESTABDOMEN", "R-FAB54": "NECKCHESTABDPELV", "T-11102": "OPTICCANAL", "T-D14AE": "ORBIT"},
    **{"T-65000": "PANCREAS", "T-61100": "PAROTID", "T-12730": "PATELLA", "12921003": "PELVIS", "T-D6000": "PELVIS"},
    **{"T-92000": "PROSTATE", "T-59600": "RECTUM", "T-11300": "RIB", "T-12280": "SCAPULA", "T-15610": "SCJOINT"},
    **{"T-D1460": "SELLA", "T-12980": "SESAMOID", "T-D2220": "SHOULDER", "T-15680": "SIJOINT", "T-11100": "SKULL"},
    **{"T-58000": "SMALLINTESTINE", "T-D04FF": "SPINE", "T-C3000": "SPLEEN", "T-11AD0": "SSPINE"},
    **{"T-11210": "STERNUM", "T-57000": "STOMACH", "T-61300": "SUBMANDIBULAR", "T-94000": "TESTIS"},
    **{"T-D9100": "THIGH", "T-D8810": "THUMB", "T-C8000": "THYMUS", "T-B6000": "THYROID", "T-15290": "TMJ"},
    **{"T-D9800": "TOE", "T-25000": "TRACHEA", "T-11502": "TSPINE", "T-7000B": "UPRURINARYTRACT"},
    **{"T-73000": "URETER", "T-75000": "URETHRA", "T-83000": "UTERUS", "T-D0010": "WHOLEBODY", "T-15460": "WRIST"},
    **{"T-11166": "ZYGOMA"},
}
_TERMS = frozenset(_BODY_PARTS.values())
_BODY_WORDS: Mapping[str, str] = {"THORAX": "CHEST"}  # no defined term, but what scanners write

_LATERALITIES: Mapping[str, str] = {
    **{"7771000": "L", "G-A101": "L", "24028007": "R", "G-A100": "R"},  # PS3.16 CID 244
    **{"51440002": "B", "G-A102": "B", "66459002": "U", "G-A103": "U"},
}
_SNOMED = frozenset({"SCT", "SRT", "SNM3", "99SDM", "SNM"})  # PS3.16 table 8-1 and the names SNOMED-RT had


def views(values: Values) -> dict[str, str]:
    """View words ("PA", "AP", "LL", "LATERAL", "MLO" ...) to the attribute that says so."""
    found = _plain(values, "ViewPosition", str.upper)
    for item in _items(values, "ViewCodeSequence"):
        found.setdefault(_word(item, _VIEWS), "ViewCodeSequence")
    found.pop("", None)
    return {word: where for word, where in found.items() if found.keys().isdisjoint(_GENERAL.get(word, frozenset()))}


def body_parts(values: Values) -> dict[str, str]:
    """Body part words (the defined terms of Body Part Examined) to the attribute that says so."""
    found = _plain(values, "BodyPartExamined", _term)
    for item in _items(values, "AnatomicRegionSequence"):
        found.setdefault(_term(_word(item, _BODY_PARTS, _BODY_PARTS_BEFORE)), "AnatomicRegionSequence")
    found.pop("", None)
    return found


def lateralities(values: Values) -> dict[str, str]:
    """L, R, B (both) or U (unpaired) to the attribute that says so (PS3.3 C.7.3.1, C.8.11.3, 10.5)."""
    found: dict[str, str] = {}
    for keyword in ("ImageLaterality", "Laterality", "FrameLaterality"):
        for word, where in _plain(values, keyword, str.upper).items():
            found.setdefault(word, where)
    for region in _items(values, "AnatomicRegionSequence"):
        for modifier in region.get("AnatomicRegionModifierSequence", []):
            if word := _LATERALITIES.get(_code(modifier), ""):
                found.setdefault(word, "AnatomicRegionModifierSequence")
    return found


def _plain(values: Values, keyword: str, word: Callable[[str], str]) -> dict[str, str]:
    texts = [*values(keyword), *(item[keyword] for item in _frame_anatomy(values) if keyword in item)]
    return {word(text.strip()): keyword for text in texts if isinstance(text, str) and text.strip()}


def _items(values: Values, keyword: str) -> Iterator[dict[str, Any]]:
    for sequence in values(keyword):
        yield from sequence
    for anatomy in _frame_anatomy(values):
        yield from anatomy.get(keyword, [])


def _frame_anatomy(values: Values) -> Iterator[dict[str, Any]]:
    """Items of the Frame Anatomy functional group shared by all frames (PS3.3 C.7.6.16.2.8)."""
    for groups in values("SharedFunctionalGroupsSequence"):
        for group in groups:
            yield from group.get("FrameAnatomySequence", [])


def _code(item: Mapping[str, Any]) -> str:
    """The SNOMED identifier of a code sequence item, '' for other schemes."""
    scheme = item.get("CodingSchemeDesignator", "")
    return str(item.get("CodeValue", "")) if scheme in _SNOMED else ""


def _word(item: Mapping[str, Any], *tables: Mapping[str, str]) -> str:
    code = _code(item)
    for table in tables:
        if code in table:
            return table[code]
    return str(item.get("CodeMeaning") or item.get("CodeValue") or "").strip().upper()


def _term(text: str) -> str:
    """The defined term, if only case or punctuation differ from one; else the text in capitals."""
    upper = text.upper()
    squeezed = "".join(letter for letter in upper if letter.isalnum())
    return squeezed if squeezed in _TERMS else _BODY_WORDS.get(squeezed, upper)
