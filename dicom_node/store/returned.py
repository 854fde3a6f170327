"""What engines that answer by C-STORE sent back: noted with each arrival, looked up by the jobs that wait for it.

Every object of origin RETURNED gets a row in `returned`, in the transaction that indexes it, also when it changed
nothing: an engine that sends the node's own images back is only seen by that. The rows' order is the order of arrival,
whatever the clocks say.

A study that left the node under UIDs of one job (`engines.privacy.Pseudonyms`) comes back under them. Such objects are
kept, and kept out of the index: no user shall find a patient who does not exist. `sending.remote_id` tells which study
they are about.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Collection, Sequence

from dicom_node.interfaces import OpenJob, ReturnedObject
from dicom_node.model import InstanceRecord, Origin, StoredInstance, StoreOutcome
from dicom_node.store.rows import CatalogPart, insert, utc_text

__all__ = ["Returned", "about_study", "note_return", "take_returned"]

MOST = 5000  # rows one look gives
_PSEUDONYM = re.compile(r"JOB-[0-9A-F]{16}")  # the patient of `Pseudonyms`; a real one would have to be known here
_OPEN = "('pending', 'leased', 'waiting')"
_LOOK = f"""
SELECT returned.*, main.origin AS known_origin, main.state AS main_state,
  main.sha256 = returned.sha256 AND main.transfer_syntax_uid = returned.transfer_syntax_uid AS is_main,
  main.location AS main_location, main.data_set_offset AS main_offset, main.data_set_length AS main_length,
  other.location AS other_location, other.data_set_offset AS other_offset, other.data_set_length AS other_length
FROM returned
LEFT JOIN instance AS main USING (sop_instance_uid)
LEFT JOIN variant AS other ON other.sop_instance_uid = returned.sop_instance_uid
  AND other.sha256 = returned.sha256 AND other.transfer_syntax_uid = returned.transfer_syntax_uid
WHERE returned.id > :after AND returned.job IS NULL
  AND returned.study_instance_uid = :study
  AND returned.calling_ae_title IN (SELECT value FROM json_each(:titles))
ORDER BY returned.id LIMIT {MOST}
"""


class Returned(CatalogPart):
    """`interfaces.Returns` on SQLite."""

    def latest_return(self) -> int:
        """See `interfaces.Returns.latest_return`."""
        with self.database.read() as connection:
            row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'returned'").fetchone()
        return int(row["seq"]) if row else 0

    def returns(
        self, study_instance_uid: str, calling_ae_titles: Collection[str], after: int
    ) -> Sequence[ReturnedObject]:
        """See `interfaces.Returns.returns`."""
        titles = json.dumps(sorted(calling_ae_titles))
        with self.database.read() as connection:
            rows = connection.execute(_LOOK, {"after": after, "study": study_instance_uid, "titles": titles}).fetchall()
        return [self._returned(row) for row in rows]

    def _returned(self, row: sqlite3.Row) -> ReturnedObject:
        which = "main" if row["is_main"] else "other"
        location = row[f"{which}_location"]
        aside = row["about_study"] != row["study_instance_uid"] or row["outcome"] == StoreOutcome.SET_ASIDE.value
        instance = StoredInstance(
            sop_class_uid=row["sop_class_uid"],
            sop_instance_uid=row["sop_instance_uid"],
            study_instance_uid=row["study_instance_uid"],
            series_instance_uid=row["series_instance_uid"],
            transfer_syntax_uid=row["transfer_syntax_uid"],
            path=self.archive_path(location) if location else "",
            data_set_offset=row[f"{which}_offset"] or 0,
            data_set_length=row[f"{which}_length"] or 0,
            sha256=row["sha256"],
            origin=Origin.RETURNED,
            modality=row["modality"],
        )
        known = None if aside or row["known_origin"] is None else Origin(row["known_origin"])
        return ReturnedObject(
            position=row["id"],
            instance=instance,
            calling_ae_title=row["calling_ae_title"],
            age_s=self.age_s(row["at_s"], row["at_boot_id"], row["at"]),
            known_as=known,
        )

    def is_sending(self, calling_ae_titles: Collection[str], within_s: float) -> bool:
        """See `interfaces.Returns.is_sending`."""
        now = self.clock.boot()
        with self.database.read() as connection:
            found = connection.execute(
                "SELECT 1 FROM association WHERE ended = 'open' AND last_boot_id = :boot AND last_boot_s > :since "
                "AND calling_ae_title IN (SELECT value FROM json_each(:titles)) LIMIT 1",
                {
                    "boot": now.boot_id,
                    "since": now.seconds - within_s,
                    "titles": json.dumps(sorted(calling_ae_titles)),
                },
            ).fetchone()
        return found is not None

    def open_jobs(self, study_instance_uid: str, engines: Collection[str]) -> Sequence[OpenJob]:
        """See `interfaces.Returns.open_jobs`."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT id, engine, series_instance_uid, note, "
                "(SELECT json_group_array(sop_instance_uid) FROM job_input WHERE job = job.id) AS uids "
                f"FROM job WHERE study_instance_uid = :study AND state IN {_OPEN} AND note <> '' "
                "AND engine IN (SELECT value FROM json_each(:engines)) ORDER BY id",
                {"study": study_instance_uid, "engines": json.dumps(sorted(engines))},
            ).fetchall()
        return [
            OpenJob(
                job_id=row["id"],
                engine=row["engine"],
                series_instance_uid=row["series_instance_uid"],
                sop_instance_uids=frozenset(json.loads(row["uids"])),
                note=row["note"],
            )
            for row in rows
        ]


def about_study(connection: sqlite3.Connection, record: InstanceRecord) -> str | None:
    """The study here that a returned object is about, when it came under the UIDs of one job; None when under its own.

    '' when it names the patient of some job but a study that was never sent.
    """
    header = record.header
    row = connection.execute(
        "SELECT study_instance_uid FROM sending WHERE remote_id = ? LIMIT 1", (header.study_instance_uid,)
    ).fetchone()
    if row is not None and row["study_instance_uid"] != header.study_instance_uid:
        return str(row["study_instance_uid"])
    if not _PSEUDONYM.fullmatch(header.attributes.get("PatientID", "")):
        return None
    known = connection.execute("SELECT 1 FROM study WHERE study_instance_uid = ?", (header.study_instance_uid,))
    return None if known.fetchone() else ""


def note_return(connection: sqlite3.Connection, record: InstanceRecord, outcome: StoreOutcome, about: str) -> None:
    """Note that an engine sent this object, now."""
    header = record.header
    what = (header.sop_instance_uid, record.file.sha256, header.transfer_syntax_uid, record.source.calling_ae_title)
    connection.execute(  # sent again and again it is one row, the newest
        "DELETE FROM returned WHERE sop_instance_uid = ? AND sha256 = ? AND transfer_syntax_uid = ? "
        "AND calling_ae_title = ? AND job IS NULL",
        what,
    )
    columns = {
        "sop_instance_uid": header.sop_instance_uid,
        "sop_class_uid": header.sop_class_uid,
        "study_instance_uid": header.study_instance_uid,
        "series_instance_uid": header.series_instance_uid,
        "modality": header.attributes.get("Modality", ""),
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "sha256": record.file.sha256,
        "calling_ae_title": record.source.calling_ae_title,
        "outcome": outcome.value,
        "about_study": about,
        "at": utc_text(record.received_at),
        "at_s": record.received_boot.seconds,
        "at_boot_id": record.received_boot.boot_id,
    }
    insert(connection, "returned", columns)


def take_returned(connection: sqlite3.Connection, job_id: int, sop_instance_uids: Sequence[str]) -> None:
    """These came back for that job; what another job took stays its."""
    connection.execute(
        "UPDATE returned SET job = ? WHERE job IS NULL AND sop_instance_uid IN (SELECT value FROM json_each(?))",
        (job_id, json.dumps(list(sop_instance_uids))),
    )
