"""The deletion of whole studies: rows first, in one transaction that notes the files, then the files, then the note.

    begin_deletion     every row of the study goes, `deletion` and `doomed` are written          durable
    remove_doomed      files no row speaks of are removed, a few at a time, under the writers' lock
    end_deletion       after their folders were synced: nothing of it is left to do              durable

A study is thus whole, or deleted and said to be; what a crash leaves is gone on with, and fsck takes no doomed file for
one without a row. An object that comes again is a new one: its row keeps its file, or it finds its file gone before it
is indexed, and is not acknowledged.
"""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime

from dicom_node.errors import NotFound
from dicom_node.retention import Deletion, DeletionOrder, Held, Hold, Sent, StudyHeld, StudyToKeep
from dicom_node.store.holds import held, mark_of, quiet_s
from dicom_node.store.rows import CatalogPart, insert, json_text, utc, utc_text

__all__ = ["Deletions", "forget_study"]

REMEMBERED = 50_000  # deletions
_FORGOTTEN_AT_ONCE = 1000
_DAY = 10  # characters of an ISO 8601 time up to its day

_PAGE = """
SELECT study.*,
  EXISTS (SELECT 1 FROM receipt WHERE receipt.study_instance_uid = study.study_instance_uid) AS received,
  EXISTS (SELECT 1 FROM delivery WHERE delivery.study_instance_uid = study.study_instance_uid
    AND delivery.state <> 'cancelled') AS delivers,
  (SELECT json_group_array(DISTINCT calling_ae) FROM receipt
    WHERE receipt.study_instance_uid = study.study_instance_uid) AS callers,
  (SELECT json_group_array(DISTINCT value) FROM routed_series, json_each(planned)
    WHERE routed_series.study_instance_uid = study.study_instance_uid) AS rules
FROM study WHERE (first_received_at, study_instance_uid) > (:after_at, :after_uid)
ORDER BY first_received_at, study_instance_uid LIMIT :limit
"""
_SENT = """
SELECT destination, instance.series_instance_uid, item.sop_instance_uid, commitment = 'committed'
  OR EXISTS (SELECT 1 FROM commitment_object AS theirs JOIN commitment_question AS asked ON asked.id = question
    WHERE theirs.sop_instance_uid = item.sop_instance_uid AND theirs.sha256 = item.sent_sha256
    AND theirs.reason = 0 AND asked.destination = delivery.destination) AS committed
FROM delivery JOIN delivery_item AS item ON item.delivery = delivery.id JOIN instance USING (sop_instance_uid)
WHERE delivery.study_instance_uid = ? AND delivery.state <> 'cancelled'
"""
# what else was kept under UIDs of the study, and what came back about it under UIDs of one job
_VARIANTS = """
SELECT id FROM variant WHERE sop_instance_uid IN (
    SELECT sop_instance_uid FROM instance WHERE study_instance_uid = :study)
  OR sop_instance_uid IN (SELECT sop_instance_uid FROM returned WHERE about_study = :study AND NOT EXISTS (
    SELECT 1 FROM instance WHERE instance.sop_instance_uid = returned.sop_instance_uid))
"""
_JOBS = "SELECT id FROM job WHERE study_instance_uid = :study"
_DELIVERIES = "SELECT id FROM delivery WHERE study_instance_uid = :study"
_QUESTIONS = f"SELECT id FROM commitment_question WHERE delivery IN ({_DELIVERIES})"
# in the order of their references. `sending` stays: it says what left the node
_ROWS = (
    f"UPDATE sending SET former_job = job, job = NULL WHERE job IN ({_JOBS})",
    f"UPDATE returned SET job = NULL WHERE job IN ({_JOBS})",
    f"DELETE FROM commitment_object WHERE question IN ({_QUESTIONS})",
    f"DELETE FROM commitment_question WHERE delivery IN ({_DELIVERIES})",
    f"DELETE FROM delivery_item WHERE delivery IN ({_DELIVERIES})",
    "DELETE FROM delivery WHERE study_instance_uid = :study",
    f"DELETE FROM cancellation WHERE job IN ({_JOBS})",
    f"DELETE FROM job_result WHERE job IN ({_JOBS})",
    f"DELETE FROM job_input WHERE job IN ({_JOBS})",
    f"UPDATE job SET superseded_job = NULL WHERE superseded_job IN ({_JOBS})",
    "DELETE FROM job WHERE study_instance_uid = :study",
    "DELETE FROM standing WHERE study_instance_uid = :study",
    "DELETE FROM verdict WHERE routed IN (SELECT id FROM routed_series WHERE study_instance_uid = :study)",
    "DELETE FROM routed_series WHERE study_instance_uid = :study",
    "DELETE FROM series_header WHERE study_instance_uid = :study",
    "DELETE FROM history WHERE study_instance_uid = :study",
    "DELETE FROM committed_to WHERE sop_instance_uid IN "
    "(SELECT sop_instance_uid FROM instance WHERE study_instance_uid = :study)",
    f"DELETE FROM variant WHERE id IN ({_VARIANTS})",
    "DELETE FROM returned WHERE about_study = :study OR study_instance_uid = :study",
    "DELETE FROM instance WHERE study_instance_uid = :study",
    "DELETE FROM series WHERE study_instance_uid = :study",
    "DELETE FROM receipt WHERE study_instance_uid = :study",
    "DELETE FROM other_identity WHERE study_instance_uid = :study",
    "DELETE FROM study_association WHERE study_instance_uid = :study",
)
_DOOMED = f"""
SELECT location, max(data_set_offset + data_set_length) AS bytes FROM (
  SELECT location, data_set_offset, data_set_length FROM instance WHERE study_instance_uid = :study
  UNION ALL SELECT location, data_set_offset, data_set_length FROM variant WHERE id IN ({_VARIANTS})
) GROUP BY location
"""


class Deletions(CatalogPart):
    """What `pipeline.delete` and `pipeline.retain` need of the catalog."""

    # --- looking

    def studies_to_keep(self, after: tuple[str, str], limit: int) -> Sequence[StudyToKeep]:
        """Studies in the order in which they first came, those after (first_received_at, Study Instance UID)."""
        names = {"after_at": after[0], "after_uid": after[1], "limit": limit}
        with self.database.read() as connection:
            rows = connection.execute(_PAGE, names).fetchall()
            days = [row[0] for row in connection.execute("SELECT day FROM day_seen ORDER BY day")]
            return [self._study(row, mark_of(connection, row["study_instance_uid"]), days) for row in rows]

    def _study(self, row: sqlite3.Row, mark: str, days: Sequence[str]) -> StudyToKeep:
        return StudyToKeep(
            study_instance_uid=row["study_instance_uid"],
            first_received_at=row["first_received_at"],
            age_s=min(quiet_s(self, row), self._lived_s(row, days)),
            modalities=frozenset(filter(None, row["modalities"].split("\\"))),
            calling_ae_titles=frozenset(json.loads(row["callers"])),
            routing_rules=frozenset(json.loads(row["rules"])),
            received=bool(row["received"]),
            delivers=bool(row["delivers"]),
            mark=mark,
            contents=f"{row['last_received_at']}|{row['again_at']}|{row['instance_count']}",
        )

    def _lived_s(self, study: sqlite3.Row, days: Sequence[str]) -> float:
        """So long has the study been here for certain, whatever the wall clock says; no bound while the boot clock
        tells: since this boot, or the whole days between on which the node ran.
        """
        now = self.clock.boot()
        latest = max(study["last_received_at"], study["again_at"] or "")
        if (study["last_boot_id"], study["again_boot_id"] or now.boot_id) == (now.boot_id, now.boot_id):
            return float("inf")
        between = bisect_left(days, utc_text(self.clock.wall())[:_DAY]) - bisect_right(days, latest[:_DAY])
        return max(now.seconds, between * 24 * 3600.0)

    def note_day(self) -> float:
        """The node runs today: note it; how many days ago it ran last, 0 for today, yesterday, or never before."""
        today = utc_text(self.clock.wall())[:_DAY]

        def write(connection: sqlite3.Connection) -> str | None:
            last: str | None
            (last,) = connection.execute("SELECT max(day) FROM day_seen WHERE day <= ?", (today,)).fetchone()
            if last != today:
                connection.execute("INSERT INTO day_seen VALUES (?)", (today,))
            return last

        last = self.database.write(write)
        return max((date.fromisoformat(today) - date.fromisoformat(last or today)).days - 1, 0)

    def study_bytes(self, study_instance_uid: str) -> int:
        """Of the files of all its objects."""
        sql = "SELECT coalesce(sum(data_set_offset + data_set_length), 0) FROM instance WHERE study_instance_uid = ?"
        return int(self.database.rows(sql, (study_instance_uid,))[0][0])

    def has_study(self, study_instance_uid: str) -> bool:
        """Whether anything of the study is here."""
        return bool(self.database.rows("SELECT 1 FROM study WHERE study_instance_uid = ?", (study_instance_uid,)))

    def study_held(self, study_instance_uid: str, holds: frozenset[Hold]) -> Sequence[Held]:
        """Which of `holds` keep the study; empty: none does. Raises NotFound."""
        with self.database.read() as connection:
            _known(connection, study_instance_uid)
            return held(self, connection, study_instance_uid, holds)

    def study_sent(self, study_instance_uid: str) -> Sequence[Sent]:
        """Every object of the study that its deliveries are about, as each destination has it."""
        rows = self.database.rows(_SENT, (study_instance_uid,))
        return [Sent(row[0], row[1], row[2], bool(row[3])) for row in rows]

    def study_contents(self, study_instance_uid: str) -> tuple[Sequence[str], Mapping[str, int], int]:
        """Patient IDs it came under, SOP class to number of objects, and bytes of its files. Raises NotFound."""
        with self.database.read() as connection:
            _known(connection, study_instance_uid)
            files = connection.execute(_DOOMED, {"study": study_instance_uid}).fetchall()
            patients, classes = _patients(connection, study_instance_uid), _classes(connection, study_instance_uid)
        return patients, classes, sum(row["bytes"] for row in files)

    # --- deleting

    def begin_deletion(self, order: DeletionOrder) -> Deletion:
        """Take every row of the study out of the catalog, if nothing holds it and it is as it was looked at.

        Durable when it returns: the study is deleted, whatever happens to its files. Raises NotFound, StudyHeld.
        """
        uid, names = order.study_instance_uid, {"study": order.study_instance_uid}
        at = utc_text(self.clock.wall())

        def write(connection: sqlite3.Connection) -> int:
            _known(connection, uid)
            if found := held(self, connection, uid, order.holds):
                raise StudyHeld(found)
            if order.mark and order.mark != mark_of(connection, uid):
                raise StudyHeld([Held(Hold.CHANGED, "something of it came or was queued meanwhile; look again")])
            files = connection.execute(_DOOMED, names).fetchall()
            columns = {
                **{"study_instance_uid": uid, "rule": order.rule, "who": order.who, "why": order.why, "at": at},
                "safe": json_text(order.safe),
                "series": connection.execute(
                    "SELECT count(*) FROM series WHERE study_instance_uid = :study", names
                ).fetchone()[0],
                "instances": json_text(_classes(connection, uid)),
                "files": len(files),
                "bytes": sum(row["bytes"] for row in files),
                "patient_ids": json_text(_patients(connection, uid)),
            }
            deletion = insert(connection, "deletion", columns)
            connection.executemany("INSERT INTO doomed VALUES (?, ?)", [(deletion, row["location"]) for row in files])
            forget_study(connection, uid)
            return deletion

        (deletion,) = self._deletions("id = ?", (self.database.write(write),))
        return deletion

    def doomed(self, deletion: Deletion) -> Sequence[str]:
        """Locations of its files that may still be there."""
        rows = self.database.rows("SELECT location FROM doomed WHERE deletion = ? ORDER BY location", (deletion.id,))
        return [row[0] for row in rows]

    def remove_doomed(self, locations: Sequence[str], remove: Callable[[str], None]) -> None:
        """`remove` each of these files that no row speaks of, while no row can be written. Raises what it raises."""

        def look(connection: sqlite3.Connection) -> None:
            for location in locations:
                if not connection.execute(
                    "SELECT 1 FROM instance WHERE location = :at UNION ALL "
                    "SELECT 1 FROM variant WHERE location = :at LIMIT 1",
                    {"at": location},
                ).fetchone():
                    remove(location)

        self.database.write(look, durable=False)

    def end_deletion(self, deletion: Deletion) -> bool:
        """Nothing is left to do for it; False: somebody else has ended it. Who it was about is forgotten."""
        at = utc_text(self.clock.wall())

        def write(connection: sqlite3.Connection) -> bool:
            connection.execute("DELETE FROM doomed WHERE deletion = ?", (deletion.id,))
            ended = connection.execute(
                "UPDATE deletion SET ended_at = ?, patient_ids = '[]' WHERE id = ? AND ended_at IS NULL",
                (at, deletion.id),
            ).rowcount
            connection.execute(
                "DELETE FROM deletion WHERE id IN (SELECT id FROM deletion WHERE ended_at IS NOT NULL AND id <= "
                "(SELECT id FROM deletion ORDER BY id DESC LIMIT 1 OFFSET ?) ORDER BY id LIMIT ?)",
                (REMEMBERED, _FORGOTTEN_AT_ONCE),
            )
            return bool(ended)

        return self.database.write(write)

    # --- what was deleted

    def unfinished_deletions(self) -> Sequence[Deletion]:
        """Studies whose files may not all be gone, oldest first."""
        return self._deletions("ended_at IS NULL", ())

    def deletions(self, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[Deletion]:
        """What was deleted, newest first; of one study or of all."""
        if study_instance_uid is None:
            return self._deletions("1", (), limit)
        return self._deletions("study_instance_uid = ?", (study_instance_uid,), limit)

    def deleted_by_rule(self, since: datetime | None) -> Mapping[str, tuple[int, int]]:
        """Rule (or 'person') to how many studies, and series in them, were deleted since then, None: ever."""
        rows = self.database.rows(
            "SELECT rule, count(*), sum(series) FROM deletion WHERE at >= ? GROUP BY rule ORDER BY rule",
            ("" if since is None else utc_text(since),),
        )
        return {row[0]: (row[1], row[2]) for row in rows}

    def _deletions(self, where: str, values: Sequence[object], limit: int = -1) -> Sequence[Deletion]:
        order = "DESC" if limit >= 0 else "ASC"
        with self.database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM deletion WHERE {where} ORDER BY id {order} LIMIT ?", (*values, limit)
            ).fetchall()
        return [_deletion(row) for row in rows]


def forget_study(connection: sqlite3.Connection, study_instance_uid: str) -> None:
    """Take every row of the study out, inside the caller's transaction; its files are the caller's matter."""
    names = {"study": study_instance_uid}
    for statement in _ROWS:
        connection.execute(statement, names)
    patient = connection.execute(
        "DELETE FROM study WHERE study_instance_uid = :study RETURNING patient", names
    ).fetchone()
    if patient is not None:
        connection.execute(
            "DELETE FROM patient WHERE id = :of AND NOT EXISTS (SELECT 1 FROM study WHERE patient = :of)",
            {"of": patient[0]},
        )


def _known(connection: sqlite3.Connection, study_instance_uid: str) -> sqlite3.Row:
    row = connection.execute("SELECT * FROM study WHERE study_instance_uid = ?", (study_instance_uid,)).fetchone()
    if row is None:
        raise NotFound(f"there is no study {study_instance_uid}")
    known: sqlite3.Row = row
    return known


def _patients(connection: sqlite3.Connection, study_instance_uid: str) -> list[str]:
    rows = connection.execute(
        "SELECT patient_id FROM study WHERE study_instance_uid = :study "
        "UNION SELECT patient_id FROM other_identity WHERE study_instance_uid = :study",
        {"study": study_instance_uid},
    )
    return [row[0] for row in rows if row[0]]


def _classes(connection: sqlite3.Connection, study_instance_uid: str) -> dict[str, int]:
    rows = connection.execute(
        "SELECT sop_class_uid, count(*) FROM instance WHERE study_instance_uid = ? GROUP BY sop_class_uid",
        (study_instance_uid,),
    )
    return {row[0]: row[1] for row in rows}


def _deletion(row: sqlite3.Row) -> Deletion:
    return Deletion(
        id=row["id"],
        study_instance_uid=row["study_instance_uid"],
        rule=row["rule"],
        who=row["who"],
        why=row["why"],
        safe=json.loads(row["safe"]),
        series=row["series"],
        instances=json.loads(row["instances"]),
        files=row["files"],
        bytes=row["bytes"],
        at=utc(row["at"]),
        ended_at=utc(row["ended_at"]) if row["ended_at"] else None,
        patient_ids=tuple(json.loads(row["patient_ids"])),
    )
