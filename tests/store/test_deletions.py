"""A study is whole, or deleted and said to be: rows, files, ledger, journal, what comes again, what must not go."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from dicom_node import cli
from dicom_node.config import StorageSettings
from dicom_node.errors import NotFound, StorageError
from dicom_node.interfaces import RoutedSeries
from dicom_node.model import AssociationEnd, CloseTrigger, ConflictPolicy, InstanceRecord, Level, SeriesHeader, Verdict
from dicom_node.pipeline.delete import Deleter
from dicom_node.pipeline.fsck import fsck
from dicom_node.retention import DeletionOrder, Hold, StudyHeld
from dicom_node.store.backup import back_up, bring_back
from dicom_node.store.catalog import Catalog, open_catalog

STUDY, OTHER = "1.9.1", "1.9.2"
DAY = 24 * 3600.0
ALL = frozenset(Hold) - {Hold.QUARANTINE}
Record = Callable[..., InstanceRecord]


@pytest.fixture
def receive(catalog: Catalog, record: Record) -> Callable[..., InstanceRecord]:
    """`receive(number, study=...)`: one image is indexed."""

    def one(number: int, study: str = STUDY, **fields: Any) -> InstanceRecord:
        uids = {
            "StudyInstanceUID": study,
            "SeriesInstanceUID": f"{study}.1",
            "SOPInstanceUID": f"{study}.1.{number}",
            "InstanceNumber": number,
        }
        made = record(**(uids | fields))
        catalog.index.add_instance(made, ConflictPolicy.KEEP_FIRST, lambda first: False)
        return made

    return one


@pytest.fixture
def settled(catalog: Catalog, clock: Any, receive: Callable[..., InstanceRecord]) -> list[InstanceRecord]:
    """Two studies of three images, routed long ago and nothing to deliver; the records of the first."""
    catalog.index.open_association("assoc-1", receive(1, OTHER).source)
    records = [receive(number) for number in (1, 2, 3)]
    catalog.index.end_association("assoc-1", AssociationEnd.RELEASED)
    for study in (STUDY, OTHER):
        route(catalog, study)
    clock.sleep(3600)
    return records


def route(catalog: Catalog, study: str) -> None:
    activity = next(one for one in catalog.queue.open_studies() if one.study_instance_uid == study)
    (series,) = activity.pending_series
    verdict = Verdict(rule="r", series_instance_uid=series, matched=False, reason="no", conditions=())
    header = SeriesHeader(series_instance_uid=series, instance_count=1, values={})
    routed = RoutedSeries(series_instance_uid=series, header=header, verdicts=(verdict,), jobs=())
    catalog.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest")


def order(study: str = STUDY, **fields: Any) -> DeletionOrder:
    fields = {"rule": "old", "who": "retention", "why": "older than 1 h", "holds": ALL} | fields
    return DeletionOrder(study_instance_uid=study, **fields)


def deleter(catalog: Catalog) -> Deleter:
    return Deleter(catalog.queue, catalog.archive, ae_title="NODE")


def files(catalog: Catalog) -> set[str]:
    return set(catalog.archive.locations())


def found(catalog: Catalog, study: str) -> int:
    return len(list(catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [study]})))


def everywhere(catalog: Catalog, uid: str) -> set[str]:
    """The tables in which a UID, or one that begins like it, is spoken of."""
    with closing(sqlite3.connect(catalog.database.path)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table
            for table in tables
            for row in connection.execute(f"SELECT * FROM {table}")
            if any(isinstance(value, str) and (value == uid or value.startswith(f"{uid}.")) for value in row)
        }


def balanced(catalog: Catalog) -> tuple[int, int, int]:
    report = catalog.queue.ledger()
    return report.totals["received"], report.totals["imbalance"], report.studies["imbalance"]


def test_a_deleted_study_is_nowhere_but_in_the_note_of_it(catalog: Catalog, settled: list[InstanceRecord]) -> None:
    before = files(catalog)
    deletion = deleter(catalog).delete(order())
    assert found(catalog, STUDY) == 0 and found(catalog, OTHER) == 1
    assert files(catalog) == before - {one.file.location for one in settled}
    assert everywhere(catalog, STUDY) == {"deletion"}
    assert balanced(catalog) == (1, 0, 0)
    (noted,) = catalog.queue.deletions(STUDY)
    assert noted.ended_at is not None and noted.patient_ids == () and deletion.patient_ids == ("P1",)
    assert (noted.files, noted.series, sum(noted.instances.values())) == (3, 1, 3)
    assert noted.bytes == sum(one.file.data_set_offset + one.file.data_set_length for one in settled)
    (event,) = catalog.queue.timeline(STUDY)
    assert event.text.startswith("deleted by retention rule old: 3 objects in 1 series")
    report = fsck(catalog, rebuild=True, verify_hashes=True, clock=catalog.queue.clock)
    assert report.clean and report.rows == 1 and not report.indexed
    with pytest.raises(NotFound):
        deleter(catalog).delete(order())


def test_files_that_a_copy_brings_back_are_not_taken_in(
    catalog: Catalog,
    clock: Any,
    settled: list[InstanceRecord],
    receive: Callable[..., InstanceRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    for one in settled:
        path = catalog.archive.path(one.file.location)
        os.utime(path, (clock.wall().timestamp() - 3600,) * 2)
        shutil.copy2(path, tmp_path)
    deleter(catalog).delete(order())
    for one in settled:
        shutil.copy2(tmp_path / one.file.location[3:], catalog.archive.path(one.file.location))
    report = fsck(catalog, rebuild=True, verify_hashes=True, clock=clock)
    assert sorted(report.deleted) == sorted(one.file.location for one in settled)
    assert report.clean and not report.indexed and found(catalog, STUDY) == 0
    assert_told_of(settled, catalog, capsys)
    receive(1)  # sent again it is welcome
    assert found(catalog, STUDY) == 1


def assert_told_of(left: list[InstanceRecord], catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    """The command names each file, and says what there is to do."""
    data_dir = catalog.database.path.parent
    assert cli.main(["fsck", "--data-dir", str(data_dir)]) == 0
    told = capsys.readouterr()
    assert sorted(told.out.splitlines()[1:-1]) == sorted(f"deleted: {one.file.location}" for one in left)
    assert f"unfinished: 3. They belong to nothing: remove them below {data_dir / 'archive'} before" in told.err


def test_a_backup_made_meanwhile_knows_of_the_deletion(
    catalog: Catalog, settled: list[InstanceRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = catalog.archive.status

    def status(location: str) -> Any:
        if found(catalog, STUDY):  # the copy is made, its files are being looked for
            deleter(catalog).delete(order())
        return looked_at(location)

    monkeypatch.setattr(catalog.archive, "status", status)
    saved = back_up(catalog, tmp_path / "saved.db")
    assert (saved.files, saved.studies, saved.missing_count) == (1, 1, 0)
    with closing(sqlite3.connect(tmp_path / "saved.db")) as copy:
        assert copy.execute("SELECT study_instance_uid FROM deletion").fetchall() == [(STUDY,)]
        assert copy.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_backup_that_is_brought_back_removes_nothing_that_came_since(
    catalog: Catalog,
    clock: Any,
    settled: list[InstanceRecord],
    receive: Callable[..., InstanceRecord],
    tmp_path: Path,
) -> None:
    catalog.queue.begin_deletion(order())  # and its files stay so far
    back_up(catalog, tmp_path / "saved.db")
    again = receive(2)
    for one in settled:
        os.utime(catalog.archive.path(one.file.location), (clock.wall().timestamp() - 3600,) * 2)
    os.utime(catalog.archive.path(again.file.location), (clock.wall().timestamp() - 1,) * 2)  # on its way meanwhile
    shutil.copytree(catalog.data_dir / "archive", tmp_path / "restored" / "archive")
    bring_back(tmp_path / "restored", tmp_path / "saved.db")
    restored = open_catalog(tmp_path / "restored", clock, StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    assert deleter(restored).finish_all() == 1
    report = fsck(restored, rebuild=True, verify_hashes=True, clock=clock)
    assert report.indexed == [again.file.location] and len(report.deleted) == 2
    assert found(restored, STUDY) == 1
    restored.close()


class _Cut(Exception):
    """The process ended here."""


def cut_at(catalog: Catalog, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `step` steps of a deletion nothing more is done."""
    done = iter(range(1000))

    def limited(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(done) >= step:
                raise _Cut
            return inner(*arguments, **named)

        return call

    for owner, name in (
        (catalog.queue, "begin_deletion"),
        (catalog.archive, "remove"),
        (catalog.archive, "sync_names"),
        (catalog.queue, "end_deletion"),
    ):
        monkeypatch.setattr(type(owner), name, limited(getattr(type(owner), name)))


@pytest.mark.parametrize("step", range(7))
def test_cut_off_anywhere_it_is_whole_or_deleted_and_gone_on_with(
    catalog: Catalog, settled: list[InstanceRecord], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cut_at(catalog, step, patched)
        with suppress(_Cut):
            deleter(catalog).delete(order())
    assert balanced(catalog)[1:] == (0, 0)
    if step == 0:
        assert found(catalog, STUDY) == 3 and not catalog.queue.deletions(STUDY)
        return
    assert found(catalog, STUDY) == 0 and len(catalog.queue.deletions(STUDY)) == 1
    # what is left of its files is nobody's: neither fsck nor a second look brings it back
    report = fsck(catalog, rebuild=True, verify_hashes=True, clock=catalog.queue.clock)
    assert report.clean and not report.indexed
    assert deleter(catalog).finish_all() == (1 if step < 6 else 0)
    assert len(files(catalog)) == 1 and everywhere(catalog, STUDY) == {"deletion"}
    assert not catalog.queue.unfinished_deletions()


@pytest.mark.parametrize("step", (1, 3, 5))
def test_what_comes_again_while_files_go_is_kept(
    catalog: Catalog,
    settled: list[InstanceRecord],
    receive: Callable[..., InstanceRecord],
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        cut_at(catalog, step, patched)
        with pytest.raises(_Cut):
            deleter(catalog).delete(order())
    again = receive(2)
    assert deleter(catalog).finish_all() == 1
    assert files(catalog) >= {again.file.location} and len(files(catalog)) == 2
    assert found(catalog, STUDY) == 1 and balanced(catalog) == (2, 0, 0)
    (activity,) = catalog.queue.open_studies()  # a fresh acceptance: it waits to be routed
    assert activity.instance_count == 1 and activity.revision == 1
    assert fsck(catalog, rebuild=False, verify_hashes=True, clock=catalog.queue.clock).clean


def test_an_object_whose_file_went_before_it_was_indexed_is_not_acknowledged(
    catalog: Catalog, settled: list[InstanceRecord], record: Record
) -> None:
    again = record(
        StudyInstanceUID=STUDY, SeriesInstanceUID=f"{STUDY}.1", SOPInstanceUID=f"{STUDY}.1.2", InstanceNumber=2
    )
    assert again.file.location == settled[1].file.location
    deleter(catalog).delete(order())
    with pytest.raises(StorageError):
        catalog.index.add_instance(again, ConflictPolicy.KEEP_FIRST, lambda first: False)


def test_a_file_that_another_study_has_too_stays(catalog: Catalog, settled: list[InstanceRecord], clock: Any) -> None:
    shared = settled[0].file.location
    catalog.database.write(
        lambda connection: connection.execute(
            "UPDATE instance SET location = ? WHERE study_instance_uid = ?", (shared, OTHER)
        )
    )
    deleter(catalog).delete(order())
    assert shared in files(catalog)


def test_a_file_that_is_being_read_is_read_to_its_end(catalog: Catalog, settled: list[InstanceRecord]) -> None:
    (first, *_) = catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [STUDY]})
    with open(first.path, "rb") as file:
        head = file.read(10)
        deleter(catalog).delete(order())
        assert len(head + file.read()) == first.data_set_offset + first.data_set_length


def holds(catalog: Catalog, study: str = STUDY) -> set[Hold]:
    return {one.reason for one in catalog.queue.study_held(study, ALL)}


def sql(catalog: Catalog, statement: str, *values: object) -> None:
    catalog.database.write(lambda connection: connection.execute(statement, values))


def test_what_is_being_received_stays(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord], receive: Callable[..., InstanceRecord]
) -> None:
    assert holds(catalog) == set()
    receive(2)  # sent again: nothing changes, and yet somebody relies on it
    assert holds(catalog) == {Hold.RECEIVING}
    with pytest.raises(StudyHeld, match="came just now"):
        deleter(catalog).delete(order())
    clock.sleep(121)
    assert holds(catalog) == set()
    catalog.index.open_association("assoc-2", settled[0].source)
    receive(4, association_id="assoc-2")
    clock.sleep(121)
    assert holds(catalog) == {Hold.RECEIVING, Hold.OPEN}
    catalog.index.end_association("assoc-2", AssociationEnd.RELEASED)
    assert holds(catalog) == {Hold.OPEN}
    route(catalog, STUDY)
    assert holds(catalog) == set()


def test_a_study_that_changed_since_it_was_looked_at_stays(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord], receive: Callable[..., InstanceRecord]
) -> None:
    pages = catalog.queue.studies_to_keep(("", ""), 10)
    (looked_at,) = (one for one in pages if one.study_instance_uid == STUDY)
    receive(1)
    clock.sleep(121)
    with pytest.raises(StudyHeld, match="look again"):
        deleter(catalog).delete(order(mark=looked_at.mark))
    assert found(catalog, STUDY) == 3


def age_days(catalog: Catalog, study: str = STUDY) -> float:
    pages = catalog.queue.studies_to_keep(("", ""), 10)
    return next(one.age_s for one in pages if one.study_instance_uid == study) / DAY


def test_a_clock_that_is_years_ahead_after_a_restart_makes_nothing_old(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord]
) -> None:
    queue = catalog.queue
    assert queue.note_day() == 0
    clock.sleep(3 * DAY)
    assert age_days(catalog) == pytest.approx(3, abs=0.1)  # the boot clock tells
    reboot(clock, 10 * 365 * DAY)
    assert queue.note_day() > 3000
    assert age_days(catalog) == 0.0
    clock.sleep(3600)
    assert age_days(catalog) == pytest.approx(1 / 24)  # so long the machine runs
    for _ in range(5):
        clock.sleep(DAY)
        queue.note_day()
    reboot(clock, -10 * 365 * DAY)  # it is put right
    assert 0.0 <= age_days(catalog) <= 4.1


def test_days_on_which_the_node_ran_count_after_a_restart(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord]
) -> None:
    for day in range(10):
        clock.sleep(DAY)
        assert catalog.queue.note_day() == 0
        if day == 6:
            reboot(clock, 0.0)
    assert age_days(catalog) == 9.0 and age_days(catalog, OTHER) == 9.0  # whole days between
    clock.sleep(5 * DAY)
    reboot(clock, 0.0)
    assert catalog.queue.note_day() == 4 and age_days(catalog) == 10.0


def test_what_came_again_since_the_restart_is_no_older_than_that(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord], receive: Callable[..., InstanceRecord]
) -> None:
    reboot(clock, DAY)
    receive(1)
    clock.sleep(600)
    assert age_days(catalog) <= 600 / DAY


def reboot(clock: Any, wall_s: float) -> None:
    """The machine starts anew, and its wall clock is set forward by so much."""
    clock.boot_id += "+"
    clock.set_s = clock.set_s + clock.seconds + wall_s
    clock.seconds = 0.0


@pytest.mark.parametrize(
    ("reason", "statement"),
    [
        (Hold.NEVER_ROUTED, "UPDATE series SET routing = 'none' WHERE study_instance_uid = ?"),
        (Hold.FAILED_SERIES, "UPDATE standing SET class = 'failed' WHERE study_instance_uid = ?"),
        (Hold.FAILED_SERIES, "DELETE FROM standing WHERE study_instance_uid = ?"),
        (Hold.CONFLICT, "UPDATE study SET identity_conflict = 1 WHERE study_instance_uid = ?"),
        (Hold.MISSING, "UPDATE instance SET state = 'missing' WHERE study_instance_uid = ?"),
        (
            Hold.COMMITTED_TO,
            "INSERT INTO committed_to SELECT sop_instance_uid FROM instance WHERE study_instance_uid = ? LIMIT 1",
        ),
        (
            Hold.VARIANTS,
            "INSERT INTO variant (sop_instance_uid, kind, transfer_syntax_uid, location, data_set_offset, "
            "data_set_length, sha256, source, received_at) SELECT sop_instance_uid, 'variant', '1', 'x', 0, 0, 'x', "
            "'{}', received_at FROM instance WHERE study_instance_uid = ?",
        ),
    ],
)
def test_each_reason_holds(catalog: Catalog, settled: list[InstanceRecord], reason: Hold, statement: str) -> None:
    sql(catalog, statement, STUDY)
    assert holds(catalog) == {reason} and holds(catalog, OTHER) == set()
    with pytest.raises(StudyHeld):
        deleter(catalog).delete(order())
    assert found(catalog, STUDY) == (0 if reason is Hold.MISSING else 3)


def test_variants_go_with_their_study(
    catalog: Catalog, clock: Any, settled: list[InstanceRecord], receive: Callable[..., InstanceRecord]
) -> None:
    changed = receive(1, PatientComments="another header")
    clock.sleep(121)
    assert holds(catalog) == {Hold.VARIANTS} and changed.file.location in files(catalog)
    deleter(catalog).delete(order(holds=ALL - {Hold.VARIANTS}))
    assert len(files(catalog)) == 1


def test_tombstones_are_bounded(
    catalog: Catalog, settled: list[InstanceRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.store.deletions.REMEMBERED", 1)
    deleter(catalog).delete(order())
    deleter(catalog).delete(order(OTHER))
    assert [one.study_instance_uid for one in catalog.queue.deletions()] == [OTHER]
