"""One more instance of a series that is being received: what nearly every transaction of the index is about.

`insert_plain` does in one read and four or five writes exactly what `store.instances` does step by step, and does
nothing at all where anything is out of the ordinary.
"""

from __future__ import annotations

import json
import re
import sqlite3
from functools import lru_cache

from dicom_node.headers import INDEXED, is_image
from dicom_node.model import InstanceRecord, Level, Origin
from dicom_node.store.kept import another_patient, filled, joined, kept_attributes
from dicom_node.store.receipts import note_receipt
from dicom_node.store.rows import source_text, texts_json, utc_text

__all__ = ["LAST", "insert_plain", "write_instance"]

_NUMBER = re.compile(r"[+-]?[0-9]{1,12}")
LAST = 2**62  # instance_order of an instance whose number is none
REMEMBERED_CHARS = 16 * 1024  # of texts whose comparison is: a peer may send values a hundred times as long
_STUDY_KEYWORDS = (*INDEXED[Level.PATIENT], *INDEXED[Level.STUDY])
_SHARED_KEYWORDS = (*_STUDY_KEYWORDS, *INDEXED[Level.SERIES])

_KNOWN = (
    "SELECT study.patient_id, study.issuer, study.attributes AS of_study, study.modalities, study.sop_classes, "
    "patient.attributes AS of_patient, series.attributes AS of_series, series.routing, series.instance_count, "
    "EXISTS (SELECT 1 FROM study_association WHERE study_instance_uid = study.study_instance_uid "
    "AND association_id = :association) AS is_fed "
    "FROM series JOIN study ON study.study_instance_uid = series.study_instance_uid "
    "JOIN patient ON patient.id = study.patient "
    "WHERE series.study_instance_uid = :study AND series.series_instance_uid = :series"
)
_WHERE = "WHERE study_instance_uid = ? AND series_instance_uid = ?"
_COUNT_OTHER = f"UPDATE series SET instance_count = instance_count + 1 {_WHERE}"
_COUNT_IMAGE = (
    "UPDATE series SET instance_count = instance_count + 1, image_count = image_count + 1, "
    f"received_seq = received_seq + 1, source = ? {_WHERE}"
)
_COUNT_IN_STUDY = (
    "UPDATE study SET instance_count = instance_count + 1, series_count = series_count + ?, modalities = ?, "
    "sop_classes = ?, last_boot_s = ?, last_boot_id = ?, last_received_at = ? WHERE study_instance_uid = ?"
)
_INSERT = (
    "INSERT INTO instance (sop_instance_uid, sop_class_uid, study_instance_uid, series_instance_uid, "
    "transfer_syntax_uid, instance_number, instance_order, location, data_set_offset, data_set_length, sha256, "
    "pixel_data_offset, origin, modality, is_image, attributes, source, received_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_OR_IGNORE = f"{_INSERT} ON CONFLICT (sop_instance_uid) DO NOTHING"


def insert_plain(connection: sqlite3.Connection, record: InstanceRecord) -> bool:
    """Index a received instance whose series waits to be routed and has all that its header says. False: not done.

    Study, series and patient are known, the instance is not, nothing is filled in, nothing opened.
    """
    header = record.header
    study, series = header.study_instance_uid, header.series_instance_uid
    association = record.source.association_id
    wanted = {"study": study, "series": series, "association": association}
    known = connection.execute(_KNOWN, wanted).fetchone()
    image = is_image(header)
    if known is None or (image and known["routing"] != "open") or another_patient(known, header):
        return False
    said = tuple(map(header.attributes.get, _SHARED_KEYWORDS))
    if not _adds_nothing(known["of_study"], known["of_patient"], known["of_series"], said):
        return False
    if not write_instance(connection, record, Origin.RECEIVED, or_ignore=True):
        return False
    if image:
        connection.execute(_COUNT_IMAGE, (source_text(record.source), study, series))
    else:
        connection.execute(_COUNT_OTHER, (study, series))
        note_receipt(connection, record)  # a document may be the first received in a series of the node's own
    connection.execute(
        _COUNT_IN_STUDY,
        (
            int(known["instance_count"] == 0),
            _with(known["modalities"], header.attributes.get("Modality", "")),
            _with(known["sop_classes"], header.sop_class_uid),
            *(record.received_boot.seconds, record.received_boot.boot_id, utc_text(record.received_at), study),
        ),
    )
    if association is not None and not known["is_fed"]:
        connection.execute(
            "INSERT OR IGNORE INTO study_association (study_instance_uid, association_id) VALUES (?, ?)",
            (study, association),
        )
    return True


def _with(several: str, one: str) -> str:
    return (_joined if len(several) + len(one) <= REMEMBERED_CHARS else _joined.__wrapped__)(several, one)


@lru_cache(maxsize=256)
def _joined(several: str, one: str) -> str:
    return joined([*several.split("\\"), one])


def _adds_nothing(of_study: str, of_patient: str, of_series: str, said: tuple[str | None, ...]) -> bool:
    """Whether the rows have all that a header says; asked again for every slice of a series, and answered once."""
    size = len(of_study) + len(of_patient) + len(of_series) + sum(map(len, filter(None, said)))
    compare = _compared if size <= REMEMBERED_CHARS else _compared.__wrapped__
    return compare(of_study, of_patient, of_series, said)


@lru_cache(maxsize=256)
def _compared(of_study: str, of_patient: str, of_series: str, said: tuple[str | None, ...]) -> bool:
    attributes = {keyword: text for keyword, text in zip(_SHARED_KEYWORDS, said, strict=True) if text}
    rows = ((of_study, _STUDY_KEYWORDS), (of_patient, INDEXED[Level.PATIENT]), (of_series, INDEXED[Level.SERIES]))
    return all(
        filled(json.loads(row), kept_attributes(attributes, keywords), overwrite=False) is None
        for row, keywords in rows
    )


def write_instance(
    connection: sqlite3.Connection, record: InstanceRecord, origin: Origin, *, or_ignore: bool = False
) -> bool:
    """Write the row; `or_ignore`: unless its UID has one. Returns whether it was written."""
    header, file = record.header, record.file
    number = header.attributes.get("InstanceNumber", "")
    cursor = connection.execute(
        _INSERT_OR_IGNORE if or_ignore else _INSERT,
        (
            *(header.sop_instance_uid, header.sop_class_uid, header.study_instance_uid, header.series_instance_uid),
            *(header.transfer_syntax_uid, number, _order(number)),
            *(file.location, file.data_set_offset, file.data_set_length, file.sha256, header.pixel_data_offset),
            *(origin.value, header.attributes.get("Modality", ""), int(is_image(header))),
            texts_json(kept_attributes(header.attributes, INDEXED[Level.IMAGE])),
            *(source_text(record.source), utc_text(record.received_at)),
        ),
    )
    return cursor.rowcount == 1


def _order(number: str) -> int:
    return int(number) if _NUMBER.fullmatch(number) else LAST
