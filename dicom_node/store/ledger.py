"""The study ledger: from open series to verdicts and jobs, with nothing unaccounted for.

A series is *open* from its first received image until `route_series` closes it, and again when a late image comes.
Closing writes everything that follows from it (header, verdicts, jobs, deliveries of the source) in one transaction,
and only if no image came since the activity was read.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime

from dicom_node.errors import NotFound
from dicom_node.interfaces import OpenStudies, RoutedSeries
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    CloseTrigger,
    Condition,
    ConditionResult,
    FeedingAssociation,
    Origin,
    SeriesHeader,
    SeriesView,
    StoredInstance,
    StudyActivity,
    Verdict,
)
from dicom_node.store.closing import Closing, close, close_study, received, unchanged
from dicom_node.store.rows import CatalogPart, source_of, unpacked_header, utc, utc_text

__all__ = ["Ledger"]

_HISTORY_PAGE = 100
_OPEN = "(SELECT DISTINCT study_instance_uid FROM series WHERE routing = 'open')"
_OPEN_OF_THESE = (
    "(SELECT DISTINCT study_instance_uid FROM series WHERE routing = 'open' "
    "AND study_instance_uid IN (SELECT value FROM json_each(?)))"
)


class Ledger(CatalogPart):
    """`interfaces.StudyLedger` on SQLite."""

    # --- activity

    def open_at_a_glance(self) -> OpenStudies:
        """See `interfaces.StudyLedger.open_at_a_glance`: the partial indexes, and one look at each study's row."""
        studies = self.database.rows(
            "SELECT study_instance_uid, series, last_boot_id, last_boot_s "
            "FROM (SELECT study_instance_uid, count(*) AS series FROM series WHERE routing = 'open' "
            "GROUP BY study_instance_uid) CROSS JOIN study USING (study_instance_uid)"
        )
        associations = self.database.rows("SELECT association_id FROM association WHERE ended = 'open'")
        return OpenStudies(
            marks={study[0]: study[1:] for study in studies},
            associations=frozenset(association for (association,) in associations),
        )

    def open_studies(self, only: Collection[str] | None = None) -> Sequence[StudyActivity]:
        """See `interfaces.StudyLedger.open_studies`."""
        if only is not None and not only:
            return []
        asked, these = (_OPEN, ()) if only is None else (_OPEN_OF_THESE, (json.dumps(list(only)),))
        with self.database.read() as connection:
            # The series first: an image that comes in between makes its `received_seq` stale, and closing skips it.
            # CROSS JOIN fixes the order of the join: the partial index of open series leads.
            series = connection.execute(
                f"SELECT series.* FROM {asked} CROSS JOIN series USING (study_instance_uid) WHERE image_count > 0",
                these,
            ).fetchall()
            studies = connection.execute(
                f"SELECT study.* FROM {asked} CROSS JOIN study USING (study_instance_uid) "
                "ORDER BY study.last_received_at",
                these,
            ).fetchall()
            associations = connection.execute(
                f"SELECT study_instance_uid, association.* FROM {asked} "
                "CROSS JOIN study_association USING (study_instance_uid) JOIN association USING (association_id)",
                these,
            ).fetchall()
        by_study, feeding = defaultdict(list), defaultdict(list)
        for row in series:
            by_study[row["study_instance_uid"]].append(row)
        for row in associations:
            feeding[row["study_instance_uid"]].append(row)
        return [
            self._activity(study, by_study[uid], feeding[uid], lambda row: row["routing"] == "open")
            for study in studies
            if (uid := study["study_instance_uid"]) in by_study
        ]

    def reopen_study(self, study_instance_uid: str, *, again: bool) -> StudyActivity:
        """For `dicom-node route`: the study with all its series of images pending. Nothing is written: closing it with
        this activity closes routed series anew. `again` lets jobs be made whose input did not change, under a new run
        number. Raises NotFound.
        """
        with self.database.read() as connection:
            series = connection.execute(
                "SELECT * FROM series WHERE study_instance_uid = ? AND image_count > 0", (study_instance_uid,)
            ).fetchall()
            study = _study(connection, study_instance_uid)
            feeding = connection.execute(
                "SELECT association.* FROM study_association JOIN association USING (association_id) "
                "WHERE study_instance_uid = ?",
                (study_instance_uid,),
            ).fetchall()
        return self._activity(study, series, feeding, lambda row: True, again=again)

    def _activity(
        self,
        study: sqlite3.Row,
        series: Sequence[sqlite3.Row],
        associations: Sequence[sqlite3.Row],
        is_pending: Callable[[sqlite3.Row], bool],
        *,
        again: bool = False,
    ) -> StudyActivity:
        pending = [row for row in series if is_pending(row)]
        last = BootTime(boot_id=study["last_boot_id"] or "", seconds=study["last_boot_s"] or 0.0)
        first = last
        if study["opened_boot_id"]:
            first = BootTime(boot_id=study["opened_boot_id"], seconds=study["opened_boot_s"])
        return StudyActivity(
            study_instance_uid=study["study_instance_uid"],
            revision=max(study["revision"], 1),
            first_received=first,
            last_received=last,
            associations=tuple(_feeding(row) for row in associations),
            modalities=frozenset(row["modality"] for row in series if row["modality"]),
            pending_series=tuple(row["series_instance_uid"] for row in pending),
            instance_count=sum(row["image_count"] for row in series),
            immediate_series=tuple(
                row["series_instance_uid"]
                for row in pending
                if row["image_count"] == 1 and row["modality"] in self.options.immediate_modalities
            ),
            received_seq={row["series_instance_uid"]: row["received_seq"] for row in pending},
            again=again,
        )

    # --- what rules see

    def series_instances(self, study_instance_uid: str, series_instance_uid: str) -> Sequence[StoredInstance]:
        """The visible RECEIVED instances of one series, by instance number."""
        with self.database.read() as connection:
            rows = received(connection, study_instance_uid, series_instance_uid)
        return [self.stored(row) for row in rows]

    def series_view(self, study_instance_uid: str, series_instance_uid: str, header: SeriesHeader) -> SeriesView:
        """The study-side facts of a series, joined with its header. Counts leave out what the node made itself.
        Raises NotFound.
        """
        key = (study_instance_uid, series_instance_uid)
        with self.database.read() as connection:
            study = _study(connection, study_instance_uid)
            series = connection.execute(
                "SELECT * FROM series WHERE study_instance_uid = ? AND series_instance_uid = ?", key
            ).fetchone()
            if series is None:
                raise NotFound("there is no such series")
            origins = connection.execute(
                "SELECT origin, max(received_at) AS last_at FROM instance "
                "WHERE study_instance_uid = ? AND series_instance_uid = ? AND state = 'present' GROUP BY origin",
                key,
            ).fetchall()
            counts = connection.execute(
                "SELECT modality, count(DISTINCT series_instance_uid) AS series, count(*) AS instances FROM instance "
                "WHERE study_instance_uid = ? AND origin = 'received' AND state = 'present' GROUP BY modality",
                (study_instance_uid,),
            ).fetchall()
        last_at = max((row["last_at"] for row in origins), default=study["last_received_at"])
        return SeriesView(
            study_instance_uid=study_instance_uid,
            revision=max(study["revision"], 1),
            header=header,
            source=source_of(series["source"]),
            origins=frozenset(Origin(row["origin"]) for row in origins),
            study_series_count=sum(row["series"] for row in counts),
            study_instance_count=sum(row["instances"] for row in counts),
            study_modalities=tuple(sorted(row["modality"] for row in counts if row["modality"])),
            received_at=utc(last_at),
            identity_conflict=_conflict(study),
        )

    # --- closing

    def route_series(
        self,
        activity: StudyActivity,
        routed: Sequence[RoutedSeries],
        trigger: CloseTrigger,
        rule_set_digest: str,
    ) -> Sequence[int]:
        """Close these series of this revision: headers, verdicts and jobs in one transaction; returns new job ids.

        A series that got an image since `activity` was read, or that another process closed, is skipped.
        A job whose (rule, series, input digest) was already run or is under way is not created again (once-only);
        with LatePolicy.IGNORE no second job for (rule, series) is created at all; otherwise the new job's run_number
        follows the last one's, `superseded_job` names it, and an earlier run still under way is cancelled: its input
        is out of date. `activity.again` makes a new run of what is not under way. A job for a rule with engine ''
        creates deliveries of the source instead. Studies with an unreleased identity conflict get verdicts but no jobs.
        """

        def write(connection: sqlite3.Connection) -> list[int]:
            study = _study(connection, activity.study_instance_uid)
            now = self._now_columns()
            closing = Closing(
                activity=activity,
                revision=max(study["revision"], 1),
                trigger=trigger,
                rule_set_digest=rule_set_digest,
                held=_conflict(study) and not self.options.analyse_conflicts,
                times={"created_at": now["since_at"], **now},
            )
            made: list[int] = []
            for series in routed:
                if unchanged(connection, closing, series.series_instance_uid):
                    made += close(connection, closing, series)
            close_study(connection, activity.study_instance_uid)
            return made

        return self.database.write(write)

    def release_study(self, study_instance_uid: str) -> None:
        """Let a study with an identity conflict be analysed: series that were held are open again. Raises NotFound."""

        def write(connection: sqlite3.Connection) -> None:
            _study(connection, study_instance_uid)
            connection.execute("UPDATE study SET released = 1 WHERE study_instance_uid = ?", (study_instance_uid,))
            connection.execute(
                "UPDATE series SET routing = 'open' WHERE study_instance_uid = ? AND routing = 'routed' AND 'held' = "
                "(SELECT outcome FROM routed_series AS closed "
                " WHERE closed.study_instance_uid = series.study_instance_uid "
                " AND closed.series_instance_uid = series.series_instance_uid ORDER BY id DESC LIMIT 1)",
                (study_instance_uid,),
            )

        self.database.write(write)

    # --- what was decided

    def verdicts(self, study_instance_uid: str) -> Sequence[Verdict]:
        """The latest verdicts on every series of the study."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT verdict.*, series_instance_uid FROM standing JOIN verdict USING (routed) "
                "WHERE study_instance_uid = ? ORDER BY series_instance_uid, position",
                (study_instance_uid,),
            ).fetchall()
        return [_verdict(row) for row in rows]

    def series_history(self, since: datetime) -> Iterator[SeriesView]:
        """Series closed since then with their kept headers, for `rules replay`; each once, as it is now."""
        after = 0
        while True:
            with self.database.read() as connection:
                rows = connection.execute(
                    "SELECT series_header.*, closed.id FROM routed_series AS closed "
                    "JOIN standing ON standing.routed = closed.id "
                    "JOIN series_header ON series_header.study_instance_uid = closed.study_instance_uid "
                    "AND series_header.series_instance_uid = closed.series_instance_uid "
                    "WHERE closed.routed_at >= ? AND closed.id > ? ORDER BY closed.id LIMIT ?",
                    (utc_text(since), after, _HISTORY_PAGE),
                ).fetchall()
            if not rows:
                return
            for row in rows:
                after = row["id"]
                uid = row["series_instance_uid"]
                yield self.series_view(row["study_instance_uid"], uid, unpacked_header(uid, row["header"]))


# --- inside a transaction --------------------------------------------------------------------------------------------


def _study(connection: sqlite3.Connection, study_instance_uid: str) -> sqlite3.Row:
    row = connection.execute("SELECT * FROM study WHERE study_instance_uid = ?", (study_instance_uid,)).fetchone()
    if row is None:
        raise NotFound("there is no such study")
    found: sqlite3.Row = row
    return found


def _conflict(study: sqlite3.Row) -> bool:
    return bool(study["identity_conflict"] and not study["released"])


# --- rows to values --------------------------------------------------------------------------------------------------


def _feeding(row: sqlite3.Row) -> FeedingAssociation:
    return FeedingAssociation(
        association_id=row["association_id"],
        calling_ae_title=row["calling_ae_title"],
        end=AssociationEnd(row["ended"]),
        last_activity=BootTime(boot_id=row["last_boot_id"], seconds=row["last_boot_s"]),
        store_failed=bool(row["store_failed"]),
    )


def _verdict(row: sqlite3.Row) -> Verdict:
    return Verdict(
        rule=row["rule"],
        series_instance_uid=row["series_instance_uid"],
        matched=bool(row["matched"]),
        reason=row["reason"],
        conditions=tuple(
            ConditionResult(
                expression=condition["expression"],
                outcome=Condition(condition["outcome"]),
                values=condition["values"],
                explanation=condition["explanation"],
            )
            for condition in json.loads(row["conditions"])
        ),
    )
