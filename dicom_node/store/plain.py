"""One more instance of a series that is being received: what nearly every transaction of the index is about.

`PlainInstances.insert` does by one write exactly what `store.instances` does step by step, and nothing at all where
anything is out of the ordinary. Each statement costs four to nine turns of the interpreter's lock, so there is one: it
goes to a view, and a trigger of the connection's own does all that follows, if the rows of patient, study and series
are still what they were when they were last read. SQLite does a statement wholly or not at all, its triggers included:
no savepoint is needed around it.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from dicom_node.headers import INDEXED, is_image
from dicom_node.model import InstanceRecord, Level, Origin
from dicom_node.store.kept import another_patient, filled, joined, kept_attributes
from dicom_node.store.receipts import HOUR
from dicom_node.store.rows import source_text, texts_json, utc_text

__all__ = ["LAST", "PlainInstances", "prepare", "write_instance"]

_NUMBER = re.compile(r"[+-]?[0-9]{1,12}")
LAST = 2**62  # instance_order of an instance whose number is none
REMEMBERED_CHARS = 16 * 1024  # of texts, and of their comparison: a peer may send values a hundred times as long
REMEMBERED_SERIES = 256
_STUDY_KEYWORDS = (*INDEXED[Level.PATIENT], *INDEXED[Level.STUDY])
_SHARED_KEYWORDS = (*_STUDY_KEYWORDS, *INDEXED[Level.SERIES])

_READ = (
    "SELECT study.patient_id, study.issuer, study.attributes, patient.attributes, series.attributes, "
    "study.modalities, study.sop_classes "
    "FROM series JOIN study ON study.study_instance_uid = series.study_instance_uid "
    "JOIN patient ON patient.id = study.patient "
    "WHERE series.study_instance_uid = ? AND series.series_instance_uid = ?"
)
_COLUMNS = (
    *("sop_instance_uid", "sop_class_uid", "study_instance_uid", "series_instance_uid", "transfer_syntax_uid"),
    *("instance_number", "instance_order", "location", "data_set_offset", "data_set_length", "sha256"),
    *("pixel_data_offset", "origin", "modality", "is_image", "attributes", "source", "received_at"),
)
_BESIDE = (
    *("modalities", "sop_classes", "boot_s", "boot_id"),  # of the study, from now on
    *("calling_ae", "association_id", "segment", "place"),  # NULL: no association, the file is durable
    # what was read, and must be so still: `_Rows`
    *("is_patient_id", "is_issuer", "is_of_study", "is_of_patient", "is_of_series", "is_modalities", "is_sop_classes"),
)


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


_INSERT = _insert("instance", _COLUMNS)
_INSERT_PLAIN = _insert("plain_instance", (*_COLUMNS, *_BESIDE))
_SERIES = "study_instance_uid = NEW.study_instance_uid AND series_instance_uid = NEW.series_instance_uid"
_PREPARED = (
    f"CREATE TEMP VIEW plain_instance ({', '.join((*_COLUMNS, *_BESIDE))}) AS "
    f"SELECT {', '.join(['NULL'] * len((*_COLUMNS, *_BESIDE)))}",
    f"""CREATE TEMP TRIGGER plain_instance_comes INSTEAD OF INSERT ON plain_instance
WHEN EXISTS (
    SELECT 1 FROM series JOIN study ON study.study_instance_uid = series.study_instance_uid
    JOIN patient ON patient.id = study.patient
    WHERE series.study_instance_uid = NEW.study_instance_uid AND series.series_instance_uid = NEW.series_instance_uid
    AND (series.routing = 'open' OR NOT NEW.is_image)
    AND study.patient_id = NEW.is_patient_id AND study.issuer = NEW.is_issuer
    AND study.attributes = NEW.is_of_study AND patient.attributes = NEW.is_of_patient
    AND series.attributes = NEW.is_of_series
    AND study.modalities = NEW.is_modalities AND study.sop_classes = NEW.is_sop_classes
) AND NOT EXISTS (SELECT 1 FROM instance WHERE sop_instance_uid = NEW.sop_instance_uid)
BEGIN
    INSERT INTO instance ({", ".join(_COLUMNS)}) VALUES ({", ".join(f"NEW.{column}" for column in _COLUMNS)});
    UPDATE study SET instance_count = instance_count + 1,
        series_count = series_count + (SELECT instance_count = 0 FROM series WHERE {_SERIES}),
        modalities = NEW.modalities, sop_classes = NEW.sop_classes,
        last_boot_s = NEW.boot_s, last_boot_id = NEW.boot_id, last_received_at = NEW.received_at
        WHERE study_instance_uid = NEW.study_instance_uid;
    UPDATE series SET instance_count = instance_count + 1, image_count = image_count + NEW.is_image,
        received_seq = received_seq + NEW.is_image, source = CASE WHEN NEW.is_image THEN NEW.source ELSE source END
        WHERE {_SERIES};
    INSERT OR IGNORE INTO receipt (study_instance_uid, series_instance_uid, hour, calling_ae)
        SELECT NEW.study_instance_uid, NEW.series_instance_uid, substr(NEW.received_at, 1, {HOUR}), NEW.calling_ae
        WHERE NOT NEW.is_image;  -- a document may be the first received in a series of the node's own
    INSERT OR IGNORE INTO study_association (study_instance_uid, association_id)
        SELECT NEW.study_instance_uid, NEW.association_id WHERE NEW.association_id IS NOT NULL;
    INSERT OR IGNORE INTO journaled (segment, place) SELECT NEW.segment, NEW.place WHERE NEW.segment IS NOT NULL;
END""",
)


def prepare(connection: sqlite3.Connection) -> None:
    """What `PlainInstances` needs on its connection: nothing of it is in the file, or stays when it is closed."""
    for statement in _PREPARED:
        connection.execute(statement)


class _Rows(NamedTuple):
    """What the catalog says of a series, its study and its patient."""

    patient_id: str
    issuer: str
    of_study: str
    of_patient: str
    of_series: str
    modalities: str
    sop_classes: str


class PlainInstances:
    """Remembers what it read, of the series that came last. It is only ever taken for a guess: the write checks it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], _Rows] = {}

    def insert(self, connection: sqlite3.Connection, record: InstanceRecord) -> bool:
        """Index a received instance whose series waits to be routed and has all its header says. False: nothing done.

        Study, series and patient are known, the instance is not, nothing is filled in, nothing opened. The record's
        place in the intake journal is noted too. The connection is one that `prepare` was given; no other thread calls
        this meanwhile.
        """
        series = (record.header.study_instance_uid, record.header.series_instance_uid)
        guessed = self._rows.get(series)
        if guessed is not None and _inserted(connection, record, guessed):
            return True
        rows = _read(connection, series)
        if rows is None or rows == guessed:
            return False
        self._remember(series, rows)
        return _inserted(connection, record, rows)

    def _remember(self, series: tuple[str, str], rows: _Rows) -> None:
        self._rows.pop(series, None)
        if sum(map(len, rows)) > REMEMBERED_CHARS:
            return
        if len(self._rows) >= REMEMBERED_SERIES:
            del self._rows[next(iter(self._rows))]
        self._rows[series] = rows


def _read(connection: sqlite3.Connection, series: tuple[str, str]) -> _Rows | None:
    cursor = connection.cursor()
    cursor.row_factory = None
    found = cursor.execute(_READ, series).fetchone()
    return None if found is None else _Rows._make(found)


def _inserted(connection: sqlite3.Connection, record: InstanceRecord, rows: _Rows) -> bool:
    """Index it if these are still the rows, and it is all that they lack."""
    header, source, boot, place = record.header, record.source, record.received_boot, record.file.journal
    if another_patient(rows.patient_id, rows.issuer, header):
        return False
    said = tuple(map(header.attributes.get, _SHARED_KEYWORDS))
    if not _adds_nothing(rows.of_study, rows.of_patient, rows.of_series, said):
        return False
    values = (
        *_values(record, Origin.RECEIVED),
        _with(rows.modalities, header.attributes.get("Modality", "")),
        _with(rows.sop_classes, header.sop_class_uid),
        *(boot.seconds, boot.boot_id, source.calling_ae_title, source.association_id),
        *((None, None) if place is None else (place.segment, place.offset)),
        *rows,
    )
    before = connection.total_changes  # what triggers change counts; `rowcount` knows nothing of it
    connection.executemany(_INSERT_PLAIN, (values,))  # asks less often for the interpreter's lock than `execute`
    return connection.total_changes != before


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


def write_instance(connection: sqlite3.Connection, record: InstanceRecord, origin: Origin) -> None:
    """Write the row and nothing else."""
    connection.execute(_INSERT, _values(record, origin))


def _values(record: InstanceRecord, origin: Origin) -> tuple[object, ...]:
    """Of `_COLUMNS`."""
    header, file = record.header, record.file
    number = header.attributes.get("InstanceNumber", "")
    return (
        *(header.sop_instance_uid, header.sop_class_uid, header.study_instance_uid, header.series_instance_uid),
        *(header.transfer_syntax_uid, number, _order(number)),
        *(file.location, file.data_set_offset, file.data_set_length, file.sha256, header.pixel_data_offset),
        *(origin.value, header.attributes.get("Modality", ""), int(is_image(header))),
        texts_json(kept_attributes(header.attributes, INDEXED[Level.IMAGE])),
        *(source_text(record.source), utc_text(record.received_at)),
    )


def _order(number: str) -> int:
    return int(number) if _NUMBER.fullmatch(number) else LAST
