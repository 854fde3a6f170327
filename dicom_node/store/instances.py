"""What one more instance does to the index, inside the caller's transaction.

Patients, studies and series follow from instances: the first value of an attribute wins, later ones fill gaps. Only a
new image of origin RECEIVED moves completion: it opens its series, and the study's next revision when none is open. So
does one sent again to a series that was never routed (`_waited_for`). What an engine returns is noted each time, see
`store.returned`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping

from dicom_node.digests import is_old
from dicom_node.headers import INDEXED, is_image
from dicom_node.model import (
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    Level,
    Origin,
    StoreOutcome,
)
from dicom_node.store.kept import (
    another_patient,
    filled,
    identity,
    joined,
    kept_attributes,
    patient_columns,
    study_columns,
)
from dicom_node.store.plain import write_instance
from dicom_node.store.receipts import note_receipt
from dicom_node.store.returned import about_study, note_return
from dicom_node.store.rows import json_text, source_text, utc_text

__all__ = ["FirstMustBeRead", "insert_instance", "mark_instance", "renew_digest", "restore_instance"]


class FirstMustBeRead(Exception):
    """What this is depends on the bytes of the instance known first: read them, and come again.

    Either its digest is of an older kind (`renew_digest`), or what kind of variant it is depends on its pixels.
    """


def renew_digest(connection: sqlite3.Connection, sop_instance_uid: str, old: str, new: str) -> None:
    """The same bytes have another kind of digest now, wherever they are spoken of."""
    for table in ("instance", "variant", "returned", "job_input", "delivery_item"):
        connection.execute(
            f"UPDATE {table} SET sha256 = ? WHERE sop_instance_uid = ? AND sha256 = ?", (new, sop_instance_uid, old)
        )


def insert_instance(
    connection: sqlite3.Connection,
    record: InstanceRecord,
    policy: ConflictPolicy,
    same_pixels: bool | None = None,
) -> StoreOutcome:
    """Index one archived instance; the semantics are `interfaces.InstanceIndex.add_instance`'s.

    `same_pixels`: whether its pixel data is that of the instance already known under this UID; None when nobody looked,
    which raises FirstMustBeRead where it matters.
    A PRODUCED instance whose UID is known is DUPLICATE whatever its content: the existing one is adopted and kept.
    """
    if record.origin is not Origin.RETURNED:
        return _insert(connection, record, policy, same_pixels, moves_completion=True)
    about = about_study(connection, record)
    if about is None:
        outcome = _insert(connection, record, policy, same_pixels, moves_completion=True)
    else:
        outcome = _set_aside(connection, record)
    note_return(connection, record, outcome, about or record.header.study_instance_uid)
    return outcome


def _set_aside(connection: sqlite3.Connection, record: InstanceRecord) -> StoreOutcome:
    """Keep what came under UIDs of one job beside the index: its patient and study are nobody's, and no user's."""
    same = (record.header.sop_instance_uid, record.file.sha256, record.header.transfer_syntax_uid)
    if connection.execute(
        "SELECT 1 FROM variant WHERE sop_instance_uid = ? AND sha256 = ? AND transfer_syntax_uid = ?", same
    ).fetchone():
        _write_place(connection, "variant", record)
        return StoreOutcome.DUPLICATE
    return _keep_variant(connection, record, StoreOutcome.SET_ASIDE)


def restore_instance(connection: sqlite3.Connection, record: InstanceRecord) -> StoreOutcome:
    """Index an instance found in the archive (fsck): as `insert_instance` keeping the first, but nothing is run for it.

    Its series stays at routing 'none', so nothing that was analysed once is analysed again; an image that is sent, new
    or again, opens it. What came back under UIDs of one job is set aside again.
    """
    if record.origin is not Origin.PRODUCED and about_study(connection, record):
        return _set_aside(connection, record)
    return _insert(connection, record, ConflictPolicy.KEEP_FIRST, False, moves_completion=False)


def _insert(
    connection: sqlite3.Connection,
    record: InstanceRecord,
    policy: ConflictPolicy,
    same_pixels: bool | None,
    *,
    moves_completion: bool,
) -> StoreOutcome:
    uid = record.header.sop_instance_uid
    known = connection.execute("SELECT * FROM instance WHERE sop_instance_uid = ?", (uid,)).fetchone()
    if known is not None:
        if moves_completion and record.origin is Origin.RECEIVED:
            _note_again(connection, record, known["study_instance_uid"])
        waited_for = moves_completion and _waited_for(connection, record, known)
        outcome = _insert_known(connection, record, known, policy, same_pixels, moves_completion)
        if waited_for and outcome not in (StoreOutcome.REPLACED, StoreOutcome.REFUSED):  # REPLACED has opened it
            _note_received(connection, record, opens=True)
        return outcome
    _upsert_study(connection, record, overwrite=False)
    _upsert_series(connection, record, overwrite=False)
    write_instance(connection, record, record.origin)
    _count_one(connection, record)
    if record.origin is Origin.RECEIVED:
        note_receipt(connection, record)
    if moves_completion and record.origin is Origin.RECEIVED:
        _note_received(connection, record, opens=is_image(record.header))
    return StoreOutcome.NEW


# --- a SOP Instance UID that is known ------------------------------------------------------------------------------


def _note_again(connection: sqlite3.Connection, record: InstanceRecord, study_instance_uid: str) -> None:
    """Something of the study is sent once more: who sends it relies on it, so it must not be deleted now."""
    boot = record.received_boot
    connection.execute(
        "UPDATE study SET again_s = :now, again_boot_id = :boot, again_at = :at WHERE study_instance_uid = :study "
        "AND (again_boot_id IS NOT :boot OR again_s < :now - :every)",
        {
            **{"now": boot.seconds, "boot": boot.boot_id, "at": utc_text(record.received_at)},
            **{"study": study_instance_uid, "every": _NOTED_AGAIN_S},
        },
    )


_NOTED_AGAIN_S = 10.0  # a thousand images sent again need not be a thousand changes


def _waited_for(connection: sqlite3.Connection, record: InstanceRecord, known: sqlite3.Row) -> bool:
    """Whether this image, sent again, is the first its series is run for.

    fsck indexes what a crash left without a row and runs nothing for it. Its sender had no answer and sends it again:
    without this the series would never be routed.
    """
    header = record.header
    received = record.origin is Origin.RECEIVED and known["origin"] == Origin.RECEIVED.value
    places = (known["study_instance_uid"], known["series_instance_uid"])
    if not (received and is_image(header) and places == (header.study_instance_uid, header.series_instance_uid)):
        return False
    return (
        connection.execute(
            f"SELECT 1 FROM series WHERE study_instance_uid = ? AND series_instance_uid = ? AND {_NEVER_ROUTED}", places
        ).fetchone()
        is not None
    )


_NEVER_ROUTED = (
    "routing = 'none' AND NOT EXISTS (SELECT 1 FROM routed_series AS closed "
    "WHERE closed.study_instance_uid = series.study_instance_uid "
    "AND closed.series_instance_uid = series.series_instance_uid)"
)


def _insert_known(
    connection: sqlite3.Connection,
    record: InstanceRecord,
    known: sqlite3.Row,
    policy: ConflictPolicy,
    same_pixels: bool | None,
    moves_completion: bool,
) -> StoreOutcome:
    header, file = record.header, record.file
    same_syntax = known["transfer_syntax_uid"] == header.transfer_syntax_uid
    if same_syntax and same_pixels is None and is_old(known["sha256"]) and not is_old(file.sha256):
        raise FirstMustBeRead
    if same_syntax and known["sha256"] == file.sha256:
        _write_place(connection, "instance", record)
        if known["state"] != "present":  # it was gone or damaged; here it is again
            _mark(connection, header.sop_instance_uid, "present")
        return StoreOutcome.DUPLICATE
    if record.origin is Origin.PRODUCED:
        return StoreOutcome.DUPLICATE
    # what an engine makes of an image is never that image, not even when its own file is gone
    altered = record.origin is Origin.RETURNED and known["origin"] == Origin.RECEIVED.value
    if altered and policy is ConflictPolicy.REPLACE:
        policy = ConflictPolicy.KEEP_FIRST
    if record.origin is Origin.RECEIVED:
        study = connection.execute(
            "SELECT patient_id, issuer FROM study WHERE study_instance_uid = ?", (header.study_instance_uid,)
        ).fetchone()
        if study is not None and another_patient(study["patient_id"], study["issuer"], header):
            _flag_identity(connection, header)
    variant = connection.execute(
        "SELECT id, kind FROM variant WHERE sop_instance_uid = ? AND sha256 = ? AND transfer_syntax_uid = ?",
        (header.sop_instance_uid, file.sha256, header.transfer_syntax_uid),
    ).fetchone()
    taken_back = variant is not None and variant["kind"] == StoreOutcome.REPLACED.value
    if variant is not None and not (taken_back and policy is ConflictPolicy.REPLACE):
        _write_place(connection, "variant", record)
        return StoreOutcome.DUPLICATE
    if known["state"] == "present" or altered:
        if not same_syntax:
            return _keep_variant(connection, record, StoreOutcome.OTHER_SYNTAX)
        if policy is ConflictPolicy.REFUSE:
            return StoreOutcome.REFUSED
        if policy is ConflictPolicy.KEEP_FIRST:
            if same_pixels is None:
                raise FirstMustBeRead
            return _keep_variant(
                connection, record, StoreOutcome.HEADER_CHANGED if same_pixels else StoreOutcome.VARIANT
            )
    elif policy is ConflictPolicy.REFUSE:
        return StoreOutcome.REFUSED
    # REPLACE, or the first one is gone and any readable object is better than none
    _replace(connection, record, known, moves_completion)
    return StoreOutcome.REPLACED


def _write_place(connection: sqlite3.Connection, table: str, record: InstanceRecord) -> None:
    """The archive writes a damaged file anew when its content comes again, and the new envelope may be longer."""
    file = record.file
    connection.execute(
        f"UPDATE {table} SET location = ?, data_set_offset = ? WHERE sop_instance_uid = ? AND sha256 = ? "
        "AND transfer_syntax_uid = ? AND (location <> ? OR data_set_offset <> ?)",
        (
            *(file.location, file.data_set_offset, record.header.sop_instance_uid, file.sha256),
            *(record.header.transfer_syntax_uid, file.location, file.data_set_offset),
        ),
    )


def _keep_variant(connection: sqlite3.Connection, record: InstanceRecord, kind: StoreOutcome) -> StoreOutcome:
    header, file = record.header, record.file
    connection.execute(
        "INSERT INTO variant (sop_instance_uid, kind, transfer_syntax_uid, location, data_set_offset, data_set_length, "
        "sha256, source, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(header.sop_instance_uid, kind.value, header.transfer_syntax_uid),
            *(file.location, file.data_set_offset, file.data_set_length, file.sha256),
            *(source_text(record.source), utc_text(record.received_at)),
        ),
    )
    return kind


def _replace(
    connection: sqlite3.Connection, record: InstanceRecord, known: sqlite3.Row, moves_completion: bool
) -> None:
    uid = record.header.sop_instance_uid
    connection.execute(
        "DELETE FROM variant WHERE sop_instance_uid = ? AND sha256 = ? AND transfer_syntax_uid = ?",
        (uid, record.file.sha256, record.header.transfer_syntax_uid),
    )
    if known["state"] == "present":  # the replaced object stays, listed
        connection.execute(
            "INSERT INTO variant (sop_instance_uid, kind, transfer_syntax_uid, location, data_set_offset, "
            "data_set_length, sha256, source, received_at) SELECT sop_instance_uid, ?, transfer_syntax_uid, location, "
            "data_set_offset, data_set_length, sha256, source, received_at FROM instance WHERE sop_instance_uid = ?",
            (StoreOutcome.REPLACED.value, uid),
        )
    # our own result is known by its UID, even if altered on the way
    ours = known["origin"] != Origin.RECEIVED.value
    origin = Origin.RETURNED if ours and record.origin is Origin.RECEIVED else record.origin
    connection.execute("DELETE FROM instance WHERE sop_instance_uid = ?", (uid,))
    _upsert_study(connection, record, overwrite=True)
    _upsert_series(connection, record, overwrite=True)
    write_instance(connection, record, origin)
    places = {
        (known["study_instance_uid"], known["series_instance_uid"]),
        (record.header.study_instance_uid, record.header.series_instance_uid),
    }
    for study_uid, series_uid in sorted(places):
        _recount(connection, study_uid, series_uid)
    if origin is Origin.RECEIVED:
        note_receipt(connection, record)
    _forget_receipt(connection, known)
    if moves_completion and origin is Origin.RECEIVED:
        _note_received(connection, record, opens=is_image(record.header))


def _forget_receipt(connection: sqlite3.Connection, known: sqlite3.Row) -> None:
    """A series whose only instance was replaced by one in another series has nothing left to account for."""
    key = {"study": known["study_instance_uid"], "series": known["series_instance_uid"]}
    connection.execute(
        "DELETE FROM receipt WHERE study_instance_uid = :study AND series_instance_uid = :series "
        "AND NOT EXISTS (SELECT 1 FROM instance WHERE study_instance_uid = :study AND series_instance_uid = :series "
        "AND origin = 'received') "
        "AND NOT EXISTS (SELECT 1 FROM standing WHERE study_instance_uid = :study AND series_instance_uid = :series)",
        key,
    )


def mark_instance(connection: sqlite3.Connection, sop_instance_uid: str, state: str) -> None:
    """Set an instance 'present' or 'missing'; what is missing is counted and found nowhere.

    A series that was sent, lost every image before it was routed, and has one back waits for its routing again.
    """
    place = _mark(connection, sop_instance_uid, state)
    if place is not None and state == "present":
        connection.execute(
            "UPDATE series SET routing = 'open' WHERE study_instance_uid = ? AND series_instance_uid = ? "
            f"AND image_count > 0 AND received_seq > 0 AND {_NEVER_ROUTED}",  # 0: only fsck ever indexed for it
            place,
        )


def _mark(connection: sqlite3.Connection, sop_instance_uid: str, state: str) -> tuple[str, str] | None:
    row = connection.execute(
        "UPDATE instance SET state = ? WHERE sop_instance_uid = ? RETURNING study_instance_uid, series_instance_uid",
        (state, sop_instance_uid),
    ).fetchone()
    if row is None:
        return None
    _recount(connection, row[0], row[1])
    return row[0], row[1]


# --- rows ----------------------------------------------------------------------------------------------------------


def _upsert_study(connection: sqlite3.Connection, record: InstanceRecord, *, overwrite: bool) -> None:
    header = record.header
    known = connection.execute(
        "SELECT patient, patient_id, issuer, attributes FROM study WHERE study_instance_uid = ?",
        (header.study_instance_uid,),
    ).fetchone()
    kept = kept_attributes(header.attributes, (*INDEXED[Level.PATIENT], *INDEXED[Level.STUDY]))
    if known is None:
        patient = _patient(connection, record)
        now = utc_text(record.received_at)
        connection.execute(
            "INSERT INTO study (study_instance_uid, patient, patient_id, issuer, name_key, birth_date, study_date, "
            "study_time, accession_number, study_id, modalities, sop_classes, series_count, instance_count, "
            "attributes, first_received_at, last_received_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', '', 0, 0, ?, ?, ?)",
            (header.study_instance_uid, patient, *study_columns(kept), json_text(kept), now, now),
        )
        return
    if another_patient(known["patient_id"], known["issuer"], header):
        if record.origin is Origin.RECEIVED:
            _flag_identity(connection, header)
        # the second identity's demographics say nothing about the first's
        kept = kept_attributes(header.attributes, INDEXED[Level.STUDY])
    else:
        _fill_patient(
            connection, known["patient"], kept_attributes(header.attributes, INDEXED[Level.PATIENT]), overwrite
        )
    merged = filled(json.loads(known["attributes"]), kept, overwrite)
    if merged is not None:
        connection.execute(
            "UPDATE study SET patient_id = ?, issuer = ?, name_key = ?, birth_date = ?, study_date = ?, "
            "study_time = ?, accession_number = ?, study_id = ?, attributes = ? WHERE study_instance_uid = ?",
            (*study_columns(merged), json_text(merged), header.study_instance_uid),
        )


def _flag_identity(connection: sqlite3.Connection, header: InstanceHeader) -> None:
    """The study is in conflict; a release holds for the identities it had then, not for one that comes later."""
    study, (patient_id, issuer) = header.study_instance_uid, identity(header.attributes)
    seen = connection.execute(
        "SELECT 1 FROM other_identity WHERE study_instance_uid = ? AND patient_id = ? "
        "AND (issuer = ? OR issuer = '' OR ? = '')",
        (study, patient_id, issuer, issuer),
    ).fetchone()
    if seen is None:
        connection.execute("INSERT INTO other_identity VALUES (?, ?, ?)", (study, patient_id, issuer))
        connection.execute(
            "UPDATE study SET identity_conflict = 1, released = 0 WHERE study_instance_uid = ?", (study,)
        )


def _patient(connection: sqlite3.Connection, record: InstanceRecord) -> int:
    patient_id, issuer = identity(record.header.attributes)
    # an empty ID says nothing about who it is: such a patient has this one study
    only_study = record.header.study_instance_uid if not patient_id else ""
    kept = kept_attributes(record.header.attributes, INDEXED[Level.PATIENT])
    known = connection.execute(
        "SELECT id FROM patient WHERE patient_id = ? AND issuer = ? AND only_study = ?",
        (patient_id, issuer, only_study),
    ).fetchone()
    if known is not None:
        _fill_patient(connection, known["id"], kept, overwrite=False)
        return int(known["id"])
    row = connection.execute(
        "INSERT INTO patient (patient_id, issuer, only_study, patient_name, name_key, birth_date, attributes) "
        "VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (patient_id, issuer, only_study, *patient_columns(kept), json_text(kept)),
    ).fetchone()
    return int(row["id"])


def _fill_patient(connection: sqlite3.Connection, patient: int, kept: Mapping[str, str], overwrite: bool) -> None:
    row = connection.execute("SELECT attributes FROM patient WHERE id = ?", (patient,)).fetchone()
    merged = filled(json.loads(row["attributes"]), kept, overwrite)
    if merged is not None:
        connection.execute(
            "UPDATE patient SET patient_name = ?, name_key = ?, birth_date = ?, attributes = ? WHERE id = ?",
            (*patient_columns(merged), json_text(merged), patient),
        )


def _upsert_series(connection: sqlite3.Connection, record: InstanceRecord, *, overwrite: bool) -> None:
    header = record.header
    key = (header.study_instance_uid, header.series_instance_uid)
    known = connection.execute(
        "SELECT attributes FROM series WHERE study_instance_uid = ? AND series_instance_uid = ?", key
    ).fetchone()
    kept = kept_attributes(header.attributes, INDEXED[Level.SERIES])
    if known is None:
        connection.execute(
            "INSERT INTO series (study_instance_uid, series_instance_uid, modality, series_number, instance_count, "
            "attributes) VALUES (?, ?, ?, ?, 0, ?)",
            (*key, kept.get("Modality", ""), kept.get("SeriesNumber", ""), json_text(kept)),
        )
    elif (merged := filled(json.loads(known["attributes"]), kept, overwrite)) is not None:
        connection.execute(
            "UPDATE series SET modality = ?, series_number = ?, attributes = ? "
            "WHERE study_instance_uid = ? AND series_instance_uid = ?",
            (merged.get("Modality", ""), merged.get("SeriesNumber", ""), json_text(merged), *key),
        )


# --- counts --------------------------------------------------------------------------------------------------------


def _count_one(connection: sqlite3.Connection, record: InstanceRecord) -> None:
    """What `_recount` would find after one new instance, without reading the series."""
    header = record.header
    study, series = header.study_instance_uid, header.series_instance_uid
    image = int(record.origin is Origin.RECEIVED and is_image(header))
    (count,) = connection.execute(
        "UPDATE series SET instance_count = instance_count + 1, image_count = image_count + ? "
        "WHERE study_instance_uid = ? AND series_instance_uid = ? RETURNING instance_count",
        (image, study, series),
    ).fetchone()
    row = connection.execute(
        "SELECT modalities, sop_classes FROM study WHERE study_instance_uid = ?", (study,)
    ).fetchone()
    connection.execute(
        "UPDATE study SET instance_count = instance_count + 1, series_count = series_count + ?, modalities = ?, "
        "sop_classes = ? WHERE study_instance_uid = ?",
        (
            int(count == 1),
            joined([*row["modalities"].split("\\"), header.attributes.get("Modality", "")]),
            joined([*row["sop_classes"].split("\\"), header.sop_class_uid]),
            study,
        ),
    )


def _recount(connection: sqlite3.Connection, study: str, series: str) -> None:
    present = "FROM instance WHERE state = 'present' AND study_instance_uid = :study"
    names = {"study": study, "series": series}
    connection.execute(
        f"UPDATE series SET instance_count = (SELECT count(*) {present} AND series_instance_uid = :series), "
        f"image_count = (SELECT count(*) {present} AND series_instance_uid = :series "
        "AND origin = 'received' AND is_image) WHERE study_instance_uid = :study AND series_instance_uid = :series",
        names,
    )
    # without images there is nothing left to wait for or to route
    connection.execute(
        "UPDATE series SET routing = 'none' WHERE study_instance_uid = :study AND series_instance_uid = :series "
        "AND image_count = 0",
        names,
    )
    rows = connection.execute(f"SELECT DISTINCT modality, sop_class_uid {present}", names).fetchall()
    connection.execute(
        f"UPDATE study SET instance_count = (SELECT count(*) {present}), "
        "series_count = (SELECT count(*) FROM series WHERE study_instance_uid = :study AND instance_count > 0), "
        "modalities = :modalities, sop_classes = :classes WHERE study_instance_uid = :study",
        {
            **names,
            "modalities": joined(row["modality"] for row in rows),
            "classes": joined(row["sop_class_uid"] for row in rows),
        },
    )


# --- completion ----------------------------------------------------------------------------------------------------


def _note_received(connection: sqlite3.Connection, record: InstanceRecord, *, opens: bool) -> None:
    """Activity of the study, and of the series when this is an image (DESIGN section 5)."""
    study, boot = record.header.study_instance_uid, record.received_boot
    if opens:
        _open_series(connection, record)
    connection.execute(
        "UPDATE study SET last_boot_s = ?, last_boot_id = ?, last_received_at = ? WHERE study_instance_uid = ?",
        (boot.seconds, boot.boot_id, utc_text(record.received_at), study),
    )
    if record.source.association_id is not None:
        connection.execute(
            "INSERT OR IGNORE INTO study_association (study_instance_uid, association_id) VALUES (?, ?)",
            (study, record.source.association_id),
        )


def _open_series(connection: sqlite3.Connection, record: InstanceRecord) -> None:
    study, boot = record.header.study_instance_uid, record.received_boot
    open_series = connection.execute(
        "SELECT 1 FROM series WHERE study_instance_uid = ? AND routing = 'open' LIMIT 1", (study,)
    ).fetchone()
    if open_series is None:  # the first image ever, or one after everything was routed
        connection.execute(
            "UPDATE study SET revision = revision + 1, opened_boot_s = ?, opened_boot_id = ? "
            "WHERE study_instance_uid = ?",
            (boot.seconds, boot.boot_id, study),
        )
        connection.execute("DELETE FROM study_association WHERE study_instance_uid = ?", (study,))
    connection.execute(
        "UPDATE series SET routing = 'open', received_seq = received_seq + 1, source = ? "
        "WHERE study_instance_uid = ? AND series_instance_uid = ?",
        (source_text(record.source), study, record.header.series_instance_uid),
    )
