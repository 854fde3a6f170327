"""The ledger: receipts on one side, what became of them on the other, and what is seen when they differ."""

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dicom_node import store
from dicom_node.cli import main
from dicom_node.interfaces import RoutedSeries
from dicom_node.model import CloseTrigger, ConflictPolicy, InstanceRecord, Origin, SeriesHeader, Verdict
from dicom_node.store import receipts, status
from dicom_node.store.catalog import Catalog
from dicom_node.store.migrations import migrate
from dicom_node.store.tally import audit_tallies, tallied

Record = Callable[..., InstanceRecord]
SR = "1.2.840.10008.5.1.4.1.1.88.34"


@pytest.fixture
def receive(catalog: Catalog, record: Record) -> Callable[..., str]:
    """`receive(number, **fields)`: one image of a study of its own is indexed; its Study Instance UID."""

    def one(number: int, policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST, **fields: Any) -> str:
        uids = {"StudyInstanceUID": f"1.9.{number}", "SeriesInstanceUID": f"1.9.{number}.1"}
        catalog.index.add_instance(record(**(uids | fields)), policy, lambda first: False)
        return f"1.9.{number}"

    return one


def route(catalog: Catalog, study: str, failure: str = "") -> None:
    activity = next(one for one in catalog.queue.open_studies() if one.study_instance_uid == study)
    (series,) = activity.pending_series
    verdict = Verdict(rule="r", series_instance_uid=series, matched=False, reason="no", conditions=())
    header = SeriesHeader(series_instance_uid=series, instance_count=1, values={})
    routed = RoutedSeries(
        series_instance_uid=series, header=header, verdicts=() if failure else (verdict,), jobs=(), failure=failure
    )
    catalog.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest")


def broken(catalog: Catalog, *statements: str) -> None:
    """Meddle with the catalog as no part of the node does."""
    with closing(sqlite3.connect(catalog.database.path)) as connection, connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        for statement in statements:
            connection.execute(statement)


def totals(catalog: Catalog) -> tuple[int, int, int]:
    """Received series, and the imbalance of series and of studies."""
    report = catalog.queue.ledger()
    return report.totals["received"], report.totals["imbalance"], report.studies["imbalance"]


def test_each_source_and_hour_adds_up(catalog: Catalog, clock: Any, receive: Callable[..., str]) -> None:
    route(catalog, receive(1, calling="CT1"))
    route(catalog, receive(2, calling="CT1"), failure="unreadable")
    receive(2, calling="CT1")  # another image of a series that is known: a late one
    clock.sleep(3600)
    receive(3, calling="CT1")
    receive(4, calling="MR1", Modality="SR", SOPClassUID=SR, PixelData=None)
    receive(5, origin=Origin.PRODUCED)
    report = catalog.queue.ledger()
    columns = ("hour", "calling_ae_title", "received", "routed", "filtered", "waiting", "failed", "imbalance")
    assert [tuple(getattr(line, name) for name in columns) for line in report.lines] == [
        ("2026-01-01T00", "CT1", 2, 0, 1, 1, 0, 0),
        ("2026-01-01T01", "CT1", 1, 0, 0, 1, 0, 0),
        ("2026-01-01T01", "MR1", 1, 0, 1, 0, 0, 0),
    ]
    assert totals(catalog) == (4, 0, 0)
    recent = catalog.queue.ledger(clock.wall() - timedelta(minutes=5)).lines
    assert [line.hour for line in recent] == ["2026-01-01T01"] * 2


def test_the_ledger_sees_what_was_lost_on_purpose(catalog: Catalog, receive: Callable[..., str]) -> None:
    first, second, third = receive(1), receive(2), receive(3)
    for study in (first, second):
        route(catalog, study)
    assert totals(catalog) == (3, 0, 0)
    # the rows of one study vanish; a closing loses its decision; one comes into the index past the receipts
    broken(catalog, *(f"DELETE FROM {table} WHERE study_instance_uid = '{third}'" for table in ("instance", "series")))
    assert totals(catalog) == (3, 1, 1)
    broken(catalog, f"DELETE FROM standing WHERE study_instance_uid = '{second}'")
    assert totals(catalog) == (3, 2, 2)
    report = catalog.queue.ledger()
    assert sum(line.imbalance for line in report.lines) == 2
    assert {(one.study_instance_uid, one.why) for one in report.unaccounted} == {
        (second, "received, and in no class"), (third, "received, and in no class"),
    }  # fmt: skip


def test_the_ledger_sees_what_came_past_the_receipts(catalog: Catalog, receive: Callable[..., str]) -> None:
    route(catalog, receive(1))
    broken(catalog, "DELETE FROM receipt")
    assert totals(catalog) == (0, 1, 1)
    (one,) = catalog.queue.ledger().unaccounted
    assert (one.series_instance_uid, one.why) == ("1.9.1.1", "in the index, and never received")


def test_images_gone_before_they_were_routed_are_failed(catalog: Catalog, receive: Callable[..., str]) -> None:
    receive(1), receive(2)
    (known,) = [one for one in catalog.index.files() if one.sop_instance_uid == _instance(catalog, "1.9.1")]
    catalog.index.mark_file(known, present=False)
    report = catalog.queue.ledger()
    assert (report.totals["failed"], report.totals["waiting"], totals(catalog)) == (1, 1, (2, 0, 0))
    assert (report.studies["failed"], report.studies["waiting"]) == (1, 1)
    assert sum(line.failed for line in report.lines) == 1


def _instance(catalog: Catalog, study: str) -> str:
    (row,) = catalog.database.rows("SELECT sop_instance_uid FROM instance WHERE study_instance_uid = ?", (study,))
    return str(row[0])


def test_an_object_replaced_by_one_in_another_series_is_accounted_for_there(
    catalog: Catalog, receive: Callable[..., str]
) -> None:
    receive(1, SOPInstanceUID="1.2.3.4")
    receive(2, ConflictPolicy.REPLACE, SOPInstanceUID="1.2.3.4")
    assert totals(catalog) == (1, 0, 0)
    assert catalog.database.rows("SELECT study_instance_uid FROM receipt") == [("1.9.2",)]


def test_a_document_in_a_series_the_node_made_is_received(catalog: Catalog, receive: Callable[..., str]) -> None:
    document: dict[str, Any] = {"Modality": "SR", "SOPClassUID": SR, "PixelData": None}
    receive(1, origin=Origin.PRODUCED, **document)
    assert totals(catalog) == (0, 0, 0)
    receive(1, **document)
    receive(1, **document)
    assert totals(catalog) == (1, 0, 0)


def test_receipts_of_an_older_catalog_are_told_from_its_rows(catalog: Catalog, receive: Callable[..., str]) -> None:
    receive(1, calling="CT1")
    receive(1, calling="CT2")
    before = catalog.database.rows("SELECT * FROM receipt")
    fill = next(part for part in _migration().split(";\n") if part.strip().startswith("INSERT"))
    broken(catalog, "DELETE FROM receipt", fill)
    assert catalog.database.rows("SELECT * FROM receipt") == before == [("1.9.1", "1.9.1.1", "2026-01-01T00", "CT1")]


def _migration() -> str:
    from dicom_node.store.queue_schema import _RECEIPT_TABLES

    return _RECEIPT_TABLES


def test_the_command_prints_the_ledger_and_fails_where_it_does_not_balance(
    catalog: Catalog,
    receive: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicom_node.commands.setup_logging", lambda *_: None)
    receive(1, calling="CT1")
    words = ["ledger", "--since", "ever", "--data-dir", str(catalog.data_dir)]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["HOUR", "FROM", "RECEIVED", "ROUTED", "FILTERED", "WAITING", "FAILED", "IMBALANCE"]
    assert out[1].split() == ["2026-01-01T00:00Z", "CT1", "1", "0", "0", "1", "0", "0"]
    assert main(["ledger", "--data-dir", str(catalog.data_dir)]) == 0  # nothing in the last day, which is no trouble
    assert "CT1" not in capsys.readouterr().out
    broken(catalog, "DELETE FROM instance", "DELETE FROM series")
    assert main(words) == 2
    said = capsys.readouterr()
    assert "received, and in no class: study 1.9.1 series 1.9.1.1" in said.out
    assert "does not balance" in said.err and said.err.count("\n") == 1
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["series"]["imbalance"] == 1
    assert main(["ledger", "--since", "tuesday", "--data-dir", str(catalog.data_dir)]) == 2


def test_no_question_of_the_ledger_walks_through_all_instances(
    catalog: Catalog, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a million images the tables of images may be looked into by key or by a small partial index only."""
    asked: list[str] = []
    with closing(sqlite3.connect(catalog.database.path)) as connection:
        connection.row_factory = sqlite3.Row
        connection.set_trace_callback(asked.append)
        status.ledger_totals(connection)
        receipts.by_source_and_hour(connection, clock.wall() - timedelta(hours=1))
        connection.set_trace_callback(None)
        plans = {
            sql: [row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
            for sql in asked
            if sql.lstrip().startswith("SELECT")
        }
    assert len(plans) >= 10
    steps = [step for plan in plans.values() for step in plan]
    few = ("series_open", "series_restored", "series_routed", "instance_document", "instance_missing")
    walks = [step for step in steps if re.match(r"SCAN (series|instance|job|delivery|routed_series)\b", step)]
    assert not [step for step in walks if not step.endswith(few)], walks
    since = next(plan for sql, plan in plans.items() if "hour >=" in sql)
    assert any("receipt_hour (hour>?" in step for step in since), since


def test_a_costly_ledger_is_not_computed_for_every_scrape(
    catalog: Catalog, receive: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[datetime] = []
    real = status.ledger_totals
    now = [0.0]

    def slow(connection: sqlite3.Connection) -> Any:
        now[0] += 2.0
        computed.append(datetime.min)
        return real(connection)

    monkeypatch.setattr(status, "ledger_totals", slow)
    monkeypatch.setattr("dicom_node.store.queue.time.monotonic", lambda: now[0])
    for _ in range(41):
        catalog.queue.snapshot()
        now[0] += 1.0
    assert len(computed) == 2


def test_counts_are_right_of_a_catalog_that_was_there_before_they_were_kept(
    catalog: Catalog, receive: Callable[..., str]
) -> None:
    for number in range(4):
        study = receive(number)
        if number != 3:
            route(catalog, study, failure="unreadable" if number == 1 else "")
    before = catalog.queue.snapshot()
    path = catalog.database.path
    catalog.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for table in ("tally", "study_rank", "unsettled"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX study_conflict")
        connection.execute("DELETE FROM _sqlite_migrations WHERE name = 'tallies'")
    migrate(path)
    with closing(sqlite3.connect(path)) as connection:
        assert audit_tallies(connection) == []
        assert tallied(connection, "standing") == {("filtered", "no rule matched"): 2, ("failed", "unreadable"): 1}
    assert (before["instances"], before["ledger_studies"]["failed"], before["ledger"]["imbalance"]) == (4, 1, 0)


def test_a_count_that_differs_from_its_rows_is_named(catalog: Catalog, receive: Callable[..., str]) -> None:
    route(catalog, receive(1))
    broken(catalog, "UPDATE tally SET n = 7 WHERE what = 'standing'", "DELETE FROM tally WHERE what = 'studies'")
    with catalog.database.read() as connection:
        assert audit_tallies(connection) == ["standing", "studies"]
    assert catalog.queue.audit_counts(repair=False) == ["standing", "studies"]


def test_nothing_takes_rows_away_past_the_triggers_that_count_them() -> None:
    """Triggers see neither REPLACE, unless they are made to, nor a table that is truncated by being made anew."""
    code = "\n".join(path.read_text() for path in Path(store.__file__).parent.glob("*.py"))
    assert not re.search(r"\bOR\s+REPLACE\b|\bREPLACE\s+INTO\b|on_conflict_replace|replace=True|\.upsert", code, re.I)
    assert "recursive_triggers" not in code and not re.search(r"DROP\s+TABLE", code, re.I)


def test_counts_follow_rows_that_are_ignored_updated_in_place_and_taken_away_in_bulk(
    catalog: Catalog, receive: Callable[..., str]
) -> None:
    for number in range(4):
        route(catalog, receive(number), failure="unreadable" if number == 1 else "")
    broken(
        catalog,
        "INSERT OR IGNORE INTO receipt SELECT * FROM receipt",
        "INSERT OR IGNORE INTO receipt VALUES ('1.5', '1.5.1', '2026-01-01T00', 'CT1')",
        "INSERT INTO standing SELECT * FROM standing WHERE true ON CONFLICT DO UPDATE SET class = 'filtered'",
        "DELETE FROM standing WHERE study_instance_uid IN (SELECT study_instance_uid FROM study LIMIT 2)",
        "DELETE FROM receipt",
        "INSERT OR IGNORE INTO receipt VALUES ('1.5', '1.5.1', '2026-01-01T00', 'CT1')",
        "UPDATE OR IGNORE study SET instance_count = instance_count + 2",
    )
    with catalog.database.read() as connection:
        assert audit_tallies(connection) == []
        assert tallied(connection, "received_studies") == {("", ""): 1} and tallied(connection, "instances")


def test_fsck_counts_anew_what_differs(catalog: Catalog, receive: Callable[..., str]) -> None:
    study = receive(1)
    route(catalog, study)
    route(catalog, receive(2), failure="unreadable")
    right = catalog.queue.snapshot()["ledger"], catalog.queue.snapshot()["ledger_studies"]
    broken(
        catalog,
        "UPDATE tally SET n = n + 3",
        f"UPDATE standing SET class = 'waiting' WHERE study_instance_uid = '{study}'",
        "DELETE FROM study_rank",
        "INSERT INTO unsettled VALUES ('1', '2')",
    )
    found = catalog.queue.audit_counts(repair=True)
    assert found[0].startswith("standing of series") and {"received_series", "study_rank"} <= set(found)
    assert catalog.queue.audit_counts(repair=True) == []
    assert (catalog.queue.snapshot()["ledger"], catalog.queue.snapshot()["ledger_studies"]) == right


def test_of_a_study_that_is_taken_away_nothing_is_counted(catalog: Catalog, receive: Callable[..., str]) -> None:
    study = receive(1)
    route(catalog, study)
    tables = ("standing", "receipt", "instance", "series", "study_association", "study")
    broken(catalog, *(f"DELETE FROM {table} WHERE study_instance_uid = '{study}'" for table in tables))
    with catalog.database.read() as connection:
        assert audit_tallies(connection) == [] and not tallied(connection, "received_studies")
        assert not tallied(connection, "study_standing") and not tallied(connection, "instances")
    assert totals(catalog) == (0, 0, 0)
