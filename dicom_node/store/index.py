"""`interfaces.InstanceIndex` and `interfaces.AssociationLog` on SQLite.

Reads fetch a page and are done: no read transaction outlives a call, so a slow peer never keeps the WAL from being
written back. Writes return when they would survive a power cut (`store.database`).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from dicom_node.digests import digest_of_file, is_old
from dicom_node.errors import InvalidIdentifier, StorageError
from dicom_node.interfaces import Clock, KnownFile
from dicom_node.model import (
    JOB_ENDED,
    ArchivedFile,
    AssociationEnd,
    ConflictPolicy,
    InstanceRecord,
    Level,
    Match,
    Origin,
    Query,
    Source,
    StoredInstance,
    StoreOutcome,
    marked_job,
)
from dicom_node.store.database import Database
from dicom_node.store.holds import SETTLED_S
from dicom_node.store.instances import FirstMustBeRead, insert_instance, mark_instance, renew_digest, restore_instance
from dicom_node.store.plain import PlainInstances
from dicom_node.store.query import Plan, plan, supported
from dicom_node.store.rows import source_of, stored_instance, utc, utc_text

__all__ = ["SqliteIndex", "Variant"]

PAGE = 512  # rows a read holds at once
_PRUNE_EVERY = 500  # associations opened between two looks for old ones
_PRUNE_AGE_S = 24 * 3600.0

# what a `StoredInstance` is made of: not `attributes`, the longest column by far
_STORED = ", ".join(
    f"i.{column}"
    for column in (
        *("sop_class_uid", "sop_instance_uid", "study_instance_uid", "series_instance_uid", "transfer_syntax_uid"),
        *("location", "data_set_offset", "data_set_length", "sha256", "origin", "modality"),
    )
)
_UNIQUE_KEYS = {
    "PatientID": "s.patient_id",
    "StudyInstanceUID": "i.study_instance_uid",
    "SeriesInstanceUID": "i.series_instance_uid",
    "SOPInstanceUID": "i.sop_instance_uid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Other content or another transfer syntax under a known SOP Instance UID, kept beside the one that is served."""

    kind: StoreOutcome
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: str
    data_set_offset: int
    data_set_length: int
    sha256: str
    source: Source
    received_at: datetime


class SqliteIndex:
    """Instances and associations in the catalog. `epoch` names this process's life; it marks its associations."""

    def __init__(self, database: Database, archive_path: Callable[[str], str], clock: Clock, epoch: str) -> None:
        self._database = database
        self._archive_path = archive_path
        self._clock = clock
        self._epoch = epoch
        self._opened = 0
        self._plain = PlainInstances()

    def _fetch(self, sql: str, parameters: Sequence[object] | Mapping[str, object] = ()) -> list[sqlite3.Row]:
        with self._database.read() as connection:
            return connection.execute(sql, parameters).fetchall()

    # --- instances: writing

    def add_instance(
        self,
        record: InstanceRecord,
        policy: ConflictPolicy,
        same_pixels: Callable[[StoredInstance], bool],
    ) -> StoreOutcome:
        """See `interfaces.InstanceIndex.add_instance`. Raises StorageError when the archived file is gone."""
        quick = partial(self._add_plain, record) if record.origin is Origin.RECEIVED else None

        def write(same: bool | None) -> StoreOutcome:
            return self._database.write(
                lambda connection: self._add(connection, record, policy, same),
                durable=record.file.journal is None,
                quick=quick,
            )

        try:
            return write(None)
        except FirstMustBeRead:
            first = self.instance(record.header.sop_instance_uid)
        renewed = first is not None and self._renew_digest(first)
        if first is not None and renewed:
            try:
                outcome = write(None)
            except FirstMustBeRead:
                return write(same_pixels(first))
            # the same bytes lie under their new name too, unless the old one is still spoken of
            self.if_unreferenced("/".join(first.path.split("/")[-2:]), lambda: os.unlink(first.path))
            return outcome
        return write(first is not None and same_pixels(first))

    def _renew_digest(self, first: StoredInstance) -> bool:
        """Give an instance of before BLAKE3 its new digest, if its file is as it was. Whether it was given one."""
        if not is_old(first.sha256):
            return False
        try:
            with open(first.path, "rb") as file:
                if digest_of_file(file.fileno(), first.data_set_offset, old=True) != first.sha256:
                    return False
                new = digest_of_file(file.fileno(), first.data_set_offset)
        except OSError:
            return False
        self._database.write(lambda connection: renew_digest(connection, first.sop_instance_uid, first.sha256, new))
        return True

    def _add_plain(self, record: InstanceRecord, connection: sqlite3.Connection) -> StoreOutcome | None:
        self._check_file(record)
        return StoreOutcome.NEW if self._plain.insert(connection, record) else None

    def _check_file(self, record: InstanceRecord) -> None:
        # Equal bytes sent twice at once share one file; the one whose write failed may just have removed it
        # (`if_unreferenced`, under the same lock), and a row must never point at nothing.
        if not os.path.exists(self._archive_path(record.file.location)):
            raise StorageError("the archived file is gone before it was indexed")

    def _add(
        self, connection: sqlite3.Connection, record: InstanceRecord, policy: ConflictPolicy, same: bool | None
    ) -> StoreOutcome:
        self._check_file(record)
        if (place := record.file.journal) is not None:
            connection.execute("INSERT OR IGNORE INTO journaled VALUES (?, ?)", (place.segment, place.offset))
        return insert_instance(connection, record, policy, same)

    def if_unreferenced(self, location: str, action: Callable[[], None]) -> bool:
        """See `interfaces.InstanceIndex.if_unreferenced`."""

        def look(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "SELECT 1 FROM instance WHERE location = :at UNION ALL "
                "SELECT 1 FROM variant WHERE location = :at LIMIT 1",
                {"at": location},
            ).fetchone()
            if found is None:
                action()
            return found is None

        return self._database.write(look)

    # --- the intake journal

    def journaled(self, segment: bytes) -> frozenset[int]:
        """Offsets of the records of this life of a segment that were indexed, or refused."""
        return frozenset(row[0] for row in self._fetch("SELECT place FROM journaled WHERE segment = ?", (segment,)))

    def data_set_offset(self, location: str) -> int | None:
        """Where its row says that the data set of this file begins, None when no row refers to it."""
        rows = self._fetch(
            "SELECT data_set_offset FROM instance WHERE location = :at UNION ALL "
            "SELECT data_set_offset FROM variant WHERE location = :at LIMIT 1",
            {"at": location},
        )
        return rows[0][0] if rows else None

    def moved(self, file: ArchivedFile) -> None:
        """The file was written anew and its data set begins elsewhere now."""

        def write(connection: sqlite3.Connection) -> None:
            for table in ("instance", "variant"):
                connection.execute(
                    f"UPDATE {table} SET data_set_offset = ? WHERE location = ?", (file.data_set_offset, file.location)
                )

        self._database.write(write)

    def received_at(self, sop_instance_uid: str) -> datetime | None:
        """When the instance came that is kept under this UID, None for none."""
        rows = self._fetch("SELECT received_at FROM instance WHERE sop_instance_uid = ?", (sop_instance_uid,))
        return utc(rows[0]["received_at"]) if rows else None

    def forget_journaled(self, segment: bytes | None = None) -> None:
        """That life of a segment is over; None: no journal holds anything any more."""
        where, parameters = ("", ()) if segment is None else (" WHERE segment = ?", (segment,))
        self._database.write(
            lambda connection: connection.execute(f"DELETE FROM journaled{where}", parameters), durable=False
        )

    # --- instances: reading

    def instance(self, sop_instance_uid: str) -> StoredInstance | None:
        """See `interfaces.InstanceIndex.instance`."""
        rows = self._fetch(
            "SELECT * FROM instance WHERE sop_instance_uid = ? AND state = 'present'", (sop_instance_uid,)
        )
        return stored_instance(rows[0], self._archive_path) if rows else None

    def variants(self, sop_instance_uid: str) -> tuple[Variant, ...]:
        """What else was kept under this UID, oldest first."""
        rows = self._fetch("SELECT * FROM variant WHERE sop_instance_uid = ? ORDER BY id", (sop_instance_uid,))
        return tuple(
            Variant(
                kind=StoreOutcome(row["kind"]),
                sop_instance_uid=row["sop_instance_uid"],
                transfer_syntax_uid=row["transfer_syntax_uid"],
                path=self._archive_path(row["location"]),
                data_set_offset=row["data_set_offset"],
                data_set_length=row["data_set_length"],
                sha256=row["sha256"],
                source=source_of(row["source"]),
                received_at=utc(row["received_at"]),
            )
            for row in rows
        )

    def instances(self, level: Level, uids: Mapping[str, Sequence[str]]) -> Iterator[StoredInstance]:
        """See `interfaces.InstanceIndex.instances`. Raises InvalidIdentifier for other keys, or none."""
        conditions, parameters = ["i.state = 'present'"], []
        for keyword, values in uids.items():
            if keyword not in _UNIQUE_KEYS or not any(values):
                raise InvalidIdentifier(f"{keyword} is no unique key with a value")
            conditions.append(f"{_UNIQUE_KEYS[keyword]} IN (SELECT value FROM json_each(?))")
            parameters.append(json.dumps(list(values)))
        if not uids:
            raise InvalidIdentifier(f"no unique key for a retrieve at the {level.value} level")
        joined = " JOIN study AS s ON s.study_instance_uid = i.study_instance_uid" if "PatientID" in uids else ""
        # the order is found once, of nothing but UIDs: pages that each sort all rows would cost the square of them
        found = self._fetch(
            f"SELECT i.sop_instance_uid FROM instance AS i{joined} WHERE {' AND '.join(conditions)} "
            "ORDER BY +i.series_instance_uid, +i.instance_order, +i.sop_instance_uid",
            parameters,
        )
        return self._stored([row[0] for row in found])

    def patient_ids(self, study_instance_uids: Sequence[str]) -> tuple[str, ...]:
        """The Patient IDs of these studies, as far as they are known, each once."""
        rows = self._fetch(
            "SELECT DISTINCT patient_id FROM study WHERE study_instance_uid IN (SELECT value FROM json_each(?))",
            [json.dumps(list(study_instance_uids))],
        )
        return tuple(row[0] for row in rows)

    def _stored(self, sop_instance_uids: Sequence[str]) -> Iterator[StoredInstance]:
        """These instances in this order, but those that are gone meanwhile."""
        for start in range(0, len(sop_instance_uids), PAGE):
            for row in self._fetch(
                f"SELECT {_STORED} FROM json_each(?) AS asked "
                "CROSS JOIN instance AS i ON i.sop_instance_uid = asked.value "
                "WHERE i.state = 'present' ORDER BY asked.key",
                (json.dumps(sop_instance_uids[start : start + PAGE]),),
            ):
                yield stored_instance(row, self._archive_path)

    def find(self, query: Query) -> Iterator[Match]:
        """See `interfaces.InstanceIndex.find`. Raises InvalidIdentifier for an attribute that is not `supported`."""
        pages = self.find_pages(query)
        return (Match(attributes=dict(zip(query.returns, row, strict=True))) for page in pages for row in page)

    def find_pages(self, query: Query) -> Iterator[Sequence[tuple[str, ...]]]:
        """See `interfaces.InstanceIndex.find_pages`. Raises InvalidIdentifier as `find` does."""
        return self._texts(plan(query), len(query.returns))

    def _texts(self, pages: Plan, width: int) -> Iterator[Sequence[tuple[str, ...]]]:
        after: tuple[object, ...] | None = None
        while True:
            rows = self._database.rows(*pages.page(after, PAGE))
            if rows:
                yield rows if len(rows[0]) == width else [row[:width] for row in rows]
            if len(rows) < PAGE:
                return
            after = tuple(rows[-1][column] for column in pages.at)

    def supported(self, level: Level) -> frozenset[str]:
        """See `interfaces.InstanceIndex.supported`."""
        return supported(level)

    # --- fsck

    def files(self) -> Iterator[KnownFile]:
        """See `interfaces.CheckedIndex.files`."""
        columns = "sop_instance_uid, location, data_set_offset, data_set_length, sha256"
        after: object = ""
        while rows := self._fetch(
            f"SELECT {columns}, state = 'present' AS present, sop_instance_uid AS k FROM instance "
            f"WHERE sop_instance_uid > ? ORDER BY sop_instance_uid LIMIT {PAGE}",
            (after,),
        ):
            yield from (_known(row, is_variant=False) for row in rows)
            after = rows[-1]["k"]
        after = 0
        while rows := self._fetch(
            f"SELECT {columns}, 1 AS present, id AS k FROM variant WHERE id > ? ORDER BY id LIMIT {PAGE}", (after,)
        ):
            yield from (_known(row, is_variant=True) for row in rows)
            after = rows[-1]["k"]

    def is_deleted(self, study_instance_uid: str, written_at: datetime, *, is_result: bool = False) -> bool:
        """See `interfaces.CheckedIndex.is_deleted`."""
        # one on its way while the study was deleted is a new arrival, and nothing else of it was so young
        young = timedelta(seconds=0.0 if is_result else SETTLED_S)
        return bool(
            self._fetch(
                "SELECT 1 FROM deletion WHERE study_instance_uid = ? AND at > ? LIMIT 1",
                (study_instance_uid, utc_text(written_at + young)),
            )
        )

    def is_unfinished(self, made_for: str, sop_instance_uid: str, written_at: datetime) -> bool:
        """See `interfaces.CheckedIndex.is_unfinished`."""
        number, created_at = marked_job(made_for)
        return bool(
            self._fetch(
                "SELECT 1 FROM job JOIN history ON history.study_instance_uid = job.study_instance_uid "
                "AND kind = 'job' AND ref = job.id AND history.state = job.state AND at >= :written_at "
                "WHERE job.id = :job AND created_at = :created_at "
                "AND job.state IN (SELECT value FROM json_each(:ended)) "
                "AND NOT EXISTS (SELECT 1 FROM job_result WHERE job = job.id AND sop_instance_uid = :uid) LIMIT 1",
                {
                    "job": number,
                    "created_at": created_at,
                    "uid": sop_instance_uid,
                    "written_at": utc_text(written_at),
                    "ended": json.dumps([state.value for state in JOB_ENDED]),
                },
            )
        )

    def unknown_locations(self, locations: Sequence[str]) -> list[str]:
        """See `interfaces.CheckedIndex.unknown_locations`."""
        rows = self._fetch(
            "WITH asked AS (SELECT value AS at, key FROM json_each(?)) SELECT at FROM asked "
            "WHERE NOT EXISTS (SELECT 1 FROM instance WHERE location = at) "
            "AND NOT EXISTS (SELECT 1 FROM variant WHERE location = at) "
            "AND NOT EXISTS (SELECT 1 FROM doomed WHERE location = at) ORDER BY key",
            (json.dumps(list(locations)),),
        )
        return [row["at"] for row in rows]

    def mark_file(self, known: KnownFile, *, present: bool) -> None:
        """See `interfaces.CheckedIndex.mark_file`."""
        if not known.is_variant:
            state = "present" if present else "missing"
            self._database.write(lambda connection: mark_instance(connection, known.sop_instance_uid, state))

    def restore(self, record: InstanceRecord) -> StoreOutcome:
        """See `interfaces.CheckedIndex.restore`."""
        return self._database.write(lambda connection: restore_instance(connection, record))

    # --- associations. None of it need survive a power cut, for no association does: the next start finds them dead

    def open_association(self, association_id: str, source: Source) -> None:
        """See `interfaces.AssociationLog.open_association`."""
        self._opened += 1
        prune = self._opened % _PRUNE_EVERY == 0
        boot, wall = self._clock.boot(), utc_text(self._clock.wall())
        row = (
            *(association_id, self._epoch, source.calling_ae_title, source.called_ae_title, source.address),
            *(boot.seconds, boot.boot_id, wall),
        )

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR IGNORE INTO association (association_id, epoch, calling_ae_title, called_ae_title, address, "
                "last_boot_s, last_boot_id, opened_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            if prune:
                self._prune(connection)

        self._database.write(write, durable=False)

    def touch_associations(self, association_ids: Iterable[str]) -> None:
        """See `interfaces.AssociationLog.touch_associations`."""
        boot = self._clock.boot()
        rows = [(boot.seconds, boot.boot_id, association_id) for association_id in association_ids]
        if rows:
            self._database.write(
                lambda connection: connection.executemany(
                    "UPDATE association SET last_boot_s = ?, last_boot_id = ? "
                    "WHERE association_id = ? AND ended = 'open'",
                    rows,
                ),
                durable=False,
            )

    def end_association(self, association_id: str, end: AssociationEnd) -> None:
        """See `interfaces.AssociationLog.end_association`."""
        boot = self._clock.boot()
        self._database.write(
            lambda connection: connection.execute(
                "UPDATE association SET ended = ?, last_boot_s = ?, last_boot_id = ? "
                "WHERE association_id = ? AND ended = 'open'",
                (end.value, boot.seconds, boot.boot_id, association_id),
            ),
            durable=False,
        )

    def mark_store_failed(self, association_id: str) -> None:
        """See `interfaces.AssociationLog.mark_store_failed`."""
        self._database.write(
            lambda connection: connection.execute(
                "UPDATE association SET store_failed = 1 WHERE association_id = ?", (association_id,)
            ),
            durable=False,
        )

    def close_dead_epochs(self, live: Iterable[str]) -> int:
        """End as DEAD every open association of a process that is not among `live`; returns how many."""
        listed = json.dumps(sorted(live))

        def write(connection: sqlite3.Connection) -> int:
            closed = connection.execute(
                "UPDATE association SET ended = 'dead' WHERE ended = 'open' "
                "AND epoch NOT IN (SELECT value FROM json_each(?))",
                (listed,),
            ).rowcount
            self._prune(connection)
            return closed

        return self._database.write(write)

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Forget associations that ended a day ago and feed no open revision: echoes come every few seconds."""
        boot = self._clock.boot()
        connection.execute(
            "DELETE FROM association WHERE ended <> 'open' AND (last_boot_id <> ? OR last_boot_s < ?) "
            "AND association_id NOT IN (SELECT association_id FROM study_association)",
            (boot.boot_id, boot.seconds - _PRUNE_AGE_S),
        )


def _known(row: sqlite3.Row, *, is_variant: bool) -> KnownFile:
    return KnownFile(
        sop_instance_uid=row["sop_instance_uid"],
        file=ArchivedFile(
            location=row["location"],
            data_set_offset=row["data_set_offset"],
            data_set_length=row["data_set_length"],
            sha256=row["sha256"],
        ),
        present=bool(row["present"]),
        is_variant=is_variant,
    )
