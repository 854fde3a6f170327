"""What leaves the node for an engine that is not on this machine, and how what comes back finds its patient again.

* `must_hide` decides whether identification may leave; `why_not` whether an image may leave at all.
* `pseudonymised` makes the header that leaves, out of `allow_list` and nothing else.
* `Pseudonyms` are the UIDs of one job: they mean nothing without the node's secret, and this object maps them back.

What this cannot do: **text and faces in the pixels are not found.** Classes and image types that usually have text in
the picture are refused unless they say Burned In Annotation NO; a plain CT or radiograph with a name drawn into it
that does not say so leaves as it is, and a head scan can be rendered to a face. Pixel bytes leave unchanged, with
whatever comments a codec left inside a compressed frame. Numbers leave as they are: the geometry and the physics of a
scan are those of one scanner, and whoever has the pictures from elsewhere can recognise them. PS3.15 E.1, E.3.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Protocol

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicom_node.config import is_loopback
from dicom_node.engines.allow_list import (
    CODES,
    EMPTIED,
    EMPTIED_IF_THERE,
    JOB_UIDS,
    NUMBERS,
    ORDINALS,
    POINTERS,
    SEQUENCES,
    TABLES,
    TERMS,
)
from dicom_node.engines.raw_values import (
    MAX_DEPTH,
    items_of,
    number_element,
    numbers_of,
    only_text,
    pointer_element,
    table_element,
    texts,
)
from dicom_node.engines.returning import ForeignReference, restored
from dicom_node.engines.screening import SCREENED, why_not
from dicom_node.errors import EngineRejected
from dicom_node.identity import digest_uid

__all__ = [
    "HEADER_KEYWORDS",
    "ForeignReference",
    "Identifying",
    "Pseudonyms",
    "must_hide",
    "pseudonymised",
    "why_not",
]

MIN_SECRET_BYTES = 32
_BEAT = 1024  # items between two heartbeats: about half a second

# Of the study's own patient and study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2): what a returned object gets
_OWN = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "TypeOfPatientID", "PatientBirthDate", "PatientBirthTime"),
    *("PatientSex", "OtherPatientIDs", "OtherPatientNames", "PatientAge", "PatientSize", "PatientWeight"),
    *("PatientComments", "PatientIdentityRemoved", "DeidentificationMethod", "StudyInstanceUID", "StudyDate"),
    *("StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName"),
    *("IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "IssuerOfAccessionNumberSequence"),
    *("DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified"),
)
# Everything that is read of a source: what may leave, what decides, what a returned object gets
HEADER_KEYWORDS: frozenset[str] = frozenset(
    {
        *(*JOB_UIDS, *NUMBERS, *ORDINALS, *POINTERS, *TABLES, *SEQUENCES, *CODES, *TERMS),
        *(*SCREENED, *_OWN, *EMPTIED_IF_THERE, "SpecificCharacterSet"),
    }
)


class Identifying(Protocol):
    """An engine's settings, as far as this file goes."""

    @property
    def send_identifiable(self) -> bool:
        """The operator's word that this engine may see who the patient is."""
        ...


def must_hide(settings: Identifying, host: str) -> bool:
    """Whether what goes to `host` must be pseudonymised: anything but this machine, unless the operator allowed it.

    `host` is a name or an address as the connection uses it, see `config.is_loopback`. A tunnel or proxy on loopback
    that leads elsewhere cannot be seen from here.
    """
    return settings.send_identifiable is not True and not is_loopback(host)


# --- the UIDs of one job ---------------------------------------------------------------------------------------------


class Pseudonyms:
    """The UIDs and the patient's name one job uses towards its engine, and the way back.

    The same job, secret and source give the same pseudonyms after a restart and in another process; other jobs give
    others. The way back is held in memory only: after a restart `learn` every header that was sent, and it is there
    again. Not for use by several threads at a time.
    """

    def __init__(self, job_key: str, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES or not job_key:
            raise ValueError(f"a job key and a secret of at least {MIN_SECRET_BYTES} bytes are needed")
        self._job_key = job_key
        self._secret = secret
        self._originals: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Pseudonyms(<{len(self._originals)} UIDs>)"

    @property
    def patient_id(self) -> str:
        """Stands for the patient in this job; it does not depend on who it is."""
        return f"JOB-{self._digest('patient')[:8].hex().upper()}"

    @property
    def handed_out(self) -> Mapping[str, str]:
        """Every UID handed out so far, to the one it stands for."""
        return dict(self._originals)

    def uid(self, original: str) -> str:
        """The job's UID for `original`. What the Standard itself registered stays what it is: it names nobody.

        See `identity.digest_uid`, over an HMAC-SHA256.
        """
        original = original.strip(" \0")
        if original in UID_dictionary:
            return original
        handed = digest_uid(self._digest("uid", original))
        self._originals[handed] = original
        return handed

    def learn(self, header: Dataset) -> None:
        """Hand out again what was handed out for this header, and know the way back."""
        pseudonymised(header, self)

    def restored(self, returned: Dataset, source: Dataset, *, siblings: Collection[str] = ()) -> Dataset:
        """`returned` with the study's UIDs, and patient and study attributes of `source` instead of its own.

        A new data set in UTF-8, without file meta; its own SOP Instance UID, and every UID that was not handed out and
        refers to nothing, stay the engine's. What the engine put into a source's series comes back in that series.
        `source` is any header (`outgoing.read_header`) of the study that was sent; `siblings` are the SOP and Series
        Instance UIDs of the other objects that came back with it, which it may refer to.

        Raises ForeignReference when it belongs to no study of this job, refers to an object, series, study or frame of
        reference never handed out, or has the SOP Instance UID of a source; EngineError when it cannot be read.
        """
        return restored(returned, source, self._originals, frozenset(siblings), _OWN)

    def _digest(self, *parts: str) -> bytes:
        message = "\x1f".join(("dicom-node", self._job_key, *parts)).encode()
        return hmac.new(self._secret, message, hashlib.sha256).digest()


# --- the header that leaves ------------------------------------------------------------------------------------------


def pseudonymised(header: Dataset, pseudonyms: Pseudonyms, *, heartbeat: Callable[[], None] = lambda: None) -> Dataset:
    """What of `header` may leave: a new data set without pixel data, private attributes, text, dates or original UIDs.

    `header` is not changed. Values that do not fit their attribute are left out. `heartbeat` is called while the frames
    of a long multi-frame image are gone through. Raises EngineRejected when the image
    may not leave (`why_not`).
    """
    if reason := why_not(header, hide=True):
        raise EngineRejected(reason)
    signed = numbers_of(header, "PixelRepresentation") == [1]
    leaving = _Filter(pseudonyms, signed=signed, heartbeat=heartbeat).data_set(header, 0)
    for keyword in (*EMPTIED, *(keyword for keyword in EMPTIED_IF_THERE if keyword in header)):
        setattr(leaving, keyword, None)
    leaving.SOPClassUID = only_text(header, "SOPClassUID")
    leaving.PatientID = pseudonyms.patient_id
    leaving.PatientName = pseudonyms.patient_id
    leaving.PatientIdentityRemoved = "YES"
    leaving.DeidentificationMethod = "Attribute allow-list, UIDs of one job"
    leaving.LongitudinalTemporalInformationModified = "REMOVED"  # PS3.15 E.3.6
    return leaving


class _Filter:
    """One pass through a header; `signed` is its Pixel Representation."""

    def __init__(self, pseudonyms: Pseudonyms, *, signed: bool, heartbeat: Callable[[], None]) -> None:
        self._pseudonyms = pseudonyms
        self._signed = signed
        self._heartbeat = heartbeat
        self._done = 0

    def data_set(self, source: Dataset, depth: int) -> Dataset:
        """The elements of a data set or item that may leave."""
        kept = Dataset()
        if depth > MAX_DEPTH:
            return kept
        self._done += 1
        if self._done % _BEAT == 0:
            self._heartbeat()
        for tag in source.keys():  # noqa: SIM118 - iterating a Dataset converts its values
            keyword = _KEYWORD_OF.get(int(tag))
            element = self._element(source, int(tag), keyword, depth) if keyword else None
            if element is not None:
                kept.add(element)
        return kept

    def _element(self, source: Dataset, tag: int, keyword: str, depth: int) -> DataElement | None:
        if keyword in SEQUENCES or keyword in CODES:
            keep = self._code if keyword in CODES else self.data_set
            kept = [keep(item, depth + 1) for item in items_of(source, tag)]
            # the frames of an image are counted by their items: empty ones stay
            return DataElement(tag, "SQ", Sequence(kept)) if kept and (keyword in SEQUENCES or all(kept)) else None
        element = source.get_item(tag)
        if element.value in (None, b"", ""):
            return DataElement(tag, dictionary_VR(tag).split(" or ")[0], None)  # type 2 says no more
        if keyword in TABLES:
            return table_element(element, tag, source, TABLES[keyword], signed=self._signed)
        if keyword in POINTERS:
            return pointer_element(element, tag)
        if keyword in NUMBERS:
            return number_element(element, tag, signed=self._signed)
        return self._words(element, tag, keyword)

    def _words(self, element: RawDataElement | DataElement, tag: int, keyword: str) -> DataElement | None:
        words = texts(element)
        if keyword in JOB_UIDS:
            words = [self._pseudonyms.uid(word) for word in words if word]
        elif keyword in ORDINALS:
            words = words if len(words) == 1 and re.fullmatch("[0-9]{1,4}", words[0]) else []
        else:
            words = _terms(keyword, words)
        if not any(words):
            return None
        return DataElement(tag, dictionary_VR(tag), words if len(words) > 1 else words[0])

    def _code(self, item: Dataset, depth: int) -> Dataset:
        """The item of a code sequence as the dictionary has it; empty when it has not."""
        kept = Dataset()
        scheme, value = only_text(item, "CodingSchemeDesignator"), only_text(item, "CodeValue")
        if not (meaning := _known_codes().get((_SCHEMES.get(scheme, scheme), value), "")):
            return kept
        kept.CodeValue, kept.CodingSchemeDesignator, kept.CodeMeaning = value, scheme, meaning
        for keyword in ("AnatomicRegionModifierSequence", "ViewModifierCodeSequence"):
            tag = tag_for_keyword(keyword)
            if tag is not None and tag in item and depth <= MAX_DEPTH:
                element = self._element(item, tag, keyword, depth)
                if element is not None:
                    kept.add(element)
        return kept


_KEYWORD_OF: Mapping[int, str] = {
    int(tag): keyword
    for keyword in (*JOB_UIDS, *NUMBERS, *ORDINALS, *POINTERS, *TABLES, *SEQUENCES, *CODES, *TERMS)
    if (tag := tag_for_keyword(keyword)) is not None
}
_SCHEMES = {"SNM3": "SRT", "99SDM": "SRT", "SNM": "SRT"}  # names SNOMED-RT had (PS3.16 table 8-1)


@lru_cache(maxsize=1)
def _known_codes() -> Mapping[tuple[str, str], str]:
    """(scheme, code) of SNOMED and DICOM to the meaning in the Standard's context groups. Loaded when first needed."""
    from pydicom.sr._concepts_dict import concepts
    from pydicom.sr._snomed_dict import mapping

    known = {
        (scheme, value): meaning
        for scheme in ("SCT", "DCM")
        for entry in concepts[scheme].values()
        for value, (meaning, _) in entry.items()  # type: ignore[attr-defined]
        if meaning.isascii() and len(meaning) <= 64
    }
    before = {("SRT", old): known["SCT", new] for old, new in mapping["SRT"].items() if ("SCT", new) in known}
    return known | before


def _terms(keyword: str, words: list[str]) -> list[str]:
    """The words of the attribute's vocabulary; in Image Type, where the place counts, OTHER stands for others."""
    pattern = TERMS[keyword]
    if keyword in ("ImageType", "FrameType"):
        return [word if pattern.fullmatch(word) else "OTHER" for word in words]
    return [word for word in words if pattern.fullmatch(word)]
