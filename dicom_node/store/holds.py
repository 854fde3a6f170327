"""Why a study may not be deleted, as the catalog knows it: one statement a reason, asked inside the deletion too."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from dicom_node.retention import Held, Hold
from dicom_node.store.rows import CatalogPart

__all__ = ["SETTLED_S", "held", "mark_of"]

SETTLED_S = 120.0  # after something of it came, new or again: whoever sent that may not have sent all

# Of the study, or of any of its objects: results may lie in another study than the images they are from.
_DELIVERIES = (
    "SELECT id, state FROM delivery WHERE study_instance_uid = :study UNION "
    "SELECT delivery.id, delivery.state FROM instance JOIN delivery_item USING (sop_instance_uid) "
    "JOIN delivery ON delivery.id = delivery WHERE instance.study_instance_uid = :study"
)
# Destinations that have the series of `it`, or other content of `it`, and not `it` as it is.
_SENT_WITHOUT_IT = """
SELECT destination FROM delivery WHERE study_instance_uid = it.study_instance_uid
  AND series_instance_uid = it.series_instance_uid AND job IS NULL AND state <> 'cancelled' AND it.origin = 'received'
UNION SELECT destination FROM delivery_item JOIN delivery ON delivery.id = delivery
  WHERE sop_instance_uid = it.sop_instance_uid AND delivery.state <> 'cancelled'
EXCEPT SELECT destination FROM delivery_item JOIN delivery ON delivery.id = delivery
  WHERE sop_instance_uid = it.sop_instance_uid AND sha256 = it.sha256 AND delivery.state <> 'cancelled'
"""

# Each counts what holds; study is `:study`.
_COUNTED: Mapping[Hold, tuple[str, str]] = {
    Hold.RECEIVING: (
        "study_association JOIN association USING (association_id) "
        "WHERE study_instance_uid = :study AND ended = 'open'",
        "{} associations that feed it are open; wait until they end",
    ),
    Hold.OPEN: (
        "series WHERE study_instance_uid = :study AND routing = 'open'",
        "{} series are not routed yet; wait, or dicom-node route",
    ),
    Hold.NEVER_ROUTED: (
        "series WHERE study_instance_uid = :study AND routing = 'none' AND image_count > 0",
        "{} series were restored by fsck and never routed; dicom-node route",
    ),
    Hold.JOBS: (
        "(SELECT id FROM job WHERE study_instance_uid = :study AND state IN ('pending', 'leased', 'waiting') "
        "UNION ALL SELECT id FROM cancellation WHERE study_instance_uid = :study AND state = 'pending')",
        "{} jobs are under way; wait, or dicom-node jobs cancel",
    ),
    Hold.FAILED_JOBS: (
        "job WHERE study_instance_uid = :study AND state = 'failed' AND run_number = (SELECT max(run_number) "
        "FROM job AS other WHERE other.study_instance_uid = job.study_instance_uid "
        "AND other.series_instance_uid = job.series_instance_uid AND other.rule = job.rule)",
        "{} jobs failed; dicom-node jobs retry, or dicom-node delete",
    ),
    Hold.FAILED_SERIES: (
        "series LEFT JOIN standing USING (study_instance_uid, series_instance_uid) "
        "WHERE series.study_instance_uid = :study AND (class IN ('failed', 'lost') "
        "OR class IS NULL AND routing = 'routed')",
        "{} series could not be routed or analysed; dicom-node status says why",
    ),
    Hold.DELIVERIES: (
        f"({_DELIVERIES}) WHERE state IN ('pending', 'leased', 'committing')",
        "{} deliveries are open; wait, or dicom-node deliveries cancel",
    ),
    Hold.FAILED_DELIVERIES: (
        f"({_DELIVERIES}) WHERE state = 'failed'",
        "{} deliveries failed; dicom-node deliveries retry or cancel",
    ),
    Hold.UNSENT: (
        f"instance AS it WHERE study_instance_uid = :study AND state = 'present' AND EXISTS ({_SENT_WITHOUT_IT})",
        "{} objects came, or changed, after what was sent and were not sent since; dicom-node route --again, or "
        "dicom-node delete",
    ),
    Hold.CONFLICT: (
        "study WHERE study_instance_uid = :study AND identity_conflict AND NOT released",
        "it came under two patient identities; dicom-node release, or dicom-node delete",
    ),
    Hold.VARIANTS: (
        "instance JOIN variant USING (sop_instance_uid) WHERE study_instance_uid = :study "
        "AND kind IN ('variant', 'header-changed')",
        "of {} objects other content was kept and never sent on; look at them, then dicom-node delete",
    ),
    Hold.MISSING: (
        "instance WHERE study_instance_uid = :study AND state = 'missing'",
        "{} files are missing or damaged; dicom-node fsck, and dicom-node delete once it is clear",
    ),
    Hold.PEER_WAITS: (
        "instance JOIN commitment_reference USING (sop_instance_uid) JOIN commitment_request ON id = request "
        "WHERE study_instance_uid = :study AND commitment_request.state IN ('asked', 'judged')",
        "a peer waits to hear of {} objects whether the node commits to keeping them",
    ),
    Hold.COMMITTED_TO: (
        "instance JOIN committed_to USING (sop_instance_uid) WHERE study_instance_uid = :study AND NOT EXISTS ("
        "SELECT 1 FROM commitment_object AS theirs WHERE theirs.sop_instance_uid = instance.sop_instance_uid "
        "AND theirs.sha256 = instance.sha256 AND theirs.reason = 0)",
        "the node committed to keeping {} objects, and no destination committed to them as they came",
    ),
}


def held(
    part: CatalogPart, connection: sqlite3.Connection, study_instance_uid: str, holds: frozenset[Hold]
) -> Sequence[Held]:
    """Which of `holds` keep the study; empty: none does."""
    found = []
    for reason, (counted, text) in _COUNTED.items():
        if reason not in holds:
            continue
        count = connection.execute(f"SELECT count(*) FROM {counted}", {"study": study_instance_uid}).fetchone()[0]
        if count:
            found.append(Held(reason, text.format(count)))
    if Hold.RECEIVING in holds and (left := _settles_in(part, connection, study_instance_uid)) > 0:
        found.append(Held(Hold.RECEIVING, f"something of it came just now; wait {left:.0f} s"))
    return found


def _settles_in(part: CatalogPart, connection: sqlite3.Connection, study_instance_uid: str) -> float:
    row = connection.execute("SELECT * FROM study WHERE study_instance_uid = ?", (study_instance_uid,)).fetchone()
    if row is None:
        return 0.0
    return SETTLED_S - quiet_s(part, row)


def quiet_s(part: CatalogPart, study: sqlite3.Row) -> float:
    """Seconds since anything of the study came, new or again."""
    age = part.age_s(study["last_boot_s"] or 0.0, study["last_boot_id"] or "", study["last_received_at"])
    if study["again_at"] is None:
        return age
    return min(age, part.age_s(study["again_s"], study["again_boot_id"], study["again_at"]))


def mark_of(connection: sqlite3.Connection, study_instance_uid: str) -> str:
    """A text that differs once anything of the study came, was decided, or was queued."""
    row = connection.execute(
        "SELECT revision, last_received_at, again_at, instance_count, "
        "(SELECT max(id) FROM delivery WHERE delivery.study_instance_uid = study.study_instance_uid) AS delivery, "
        "(SELECT group_concat(state) FROM (SELECT state FROM delivery "
        "  WHERE delivery.study_instance_uid = study.study_instance_uid ORDER BY id)) AS states, "
        "(SELECT max(id) FROM job WHERE job.study_instance_uid = study.study_instance_uid) AS job, "
        "(SELECT max(id) FROM routed_series AS one WHERE one.study_instance_uid = study.study_instance_uid) AS closed "
        "FROM study WHERE study_instance_uid = ?",
        (study_instance_uid,),
    ).fetchone()
    return "" if row is None else "|".join(str(value) for value in row)
