"""The short way into the index writes what the long one writes, row for row."""

import json
import random
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_node.model import (
    ArchivedFile,
    BootTime,
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    Origin,
    Source,
)
from dicom_node.store import instances, plain
from dicom_node.store.migrations import migrate

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def record(number: int, chance: random.Random) -> InstanceRecord:
    """One of few studies and series, mostly as its neighbours are, sometimes odd."""
    study, series = f"1.2.{chance.randrange(2)}", f"1.2.3.{chance.randrange(2)}"
    attributes = {
        "PatientID": "P1" if chance.random() < 0.9 else chance.choice(["", "P2"]),
        "PatientName": "Doe^Jane",
        "StudyDate": "2026.01.02" if chance.random() < 0.5 else "20260102",
        "Modality": chance.choice(["CT", "CT", "CT", "SR"]),
        "SeriesNumber": "3",
        "InstanceNumber": str(number),
    }
    if chance.random() < 0.1:
        attributes["StudyDescription"] = chance.choice(["abdomen", "thorax"])
    image = attributes["Modality"] == "CT"
    header = InstanceHeader(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2" if image else "1.2.840.10008.5.1.4.1.1.88.11",
        sop_instance_uid=f"1.2.3.4.{number if chance.random() < 0.9 else max(number - 3, 0)}",
        study_instance_uid=study,
        series_instance_uid=series,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        attributes={keyword: text for keyword, text in attributes.items() if text},
    )
    digest = f"{number if chance.random() < 0.95 else 0:064x}"
    return InstanceRecord(
        header=header,
        file=ArchivedFile(location=f"aa/{digest}.dcm", data_set_offset=300, data_set_length=10, sha256=digest),
        source=Source(
            calling_ae_title="CT1",
            called_ae_title="NODE",
            address="127.0.0.1",
            association_id=f"a{number // 10}" if chance.random() < 0.9 else None,
        ),
        origin=Origin.RECEIVED if chance.random() < 0.95 else Origin.PRODUCED,
        received_at=BEGAN + timedelta(seconds=number),
        received_boot=BootTime(boot_id="b", seconds=float(number)),
    )


Open = Callable[[str], sqlite3.Connection]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Open]:
    opened = []

    def fresh(name: str) -> sqlite3.Connection:
        folder = tmp_path / name
        folder.mkdir()
        migrate(folder / "catalog.db")
        connection = sqlite3.connect(folder / "catalog.db", isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous=OFF")
        opened.append(connection)
        return connection

    yield fresh
    for connection in opened:
        connection.close()


def rows(connection: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    tables = ("patient", "study", "series", "instance", "variant", "study_association", "other_identity")
    return {table: sorted(map(tuple, connection.execute(f"SELECT * FROM {table}")), key=repr) for table in tables}


@pytest.mark.parametrize("seed", range(6))
def test_the_short_way_leaves_the_rows_the_long_one_leaves(
    seed: int, catalog: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    records = [record(number, chance) for number in range(120)]
    short, long = catalog("short"), catalog("long")
    taken = []

    def counted(connection: sqlite3.Connection, one: InstanceRecord) -> bool:
        taken.append(plain.insert_plain(connection, one))
        return taken[-1]

    for number, one in enumerate(records):
        if number % 40 == 39:  # everything is routed: the next image opens a revision
            for connection in (short, long):
                connection.execute("UPDATE series SET routing = 'routed'")
        policy = chance.choice(list(ConflictPolicy))
        monkeypatch.setattr(instances, "insert_plain", counted)
        outcome = instances.insert_instance(short, one, policy, False)
        monkeypatch.setattr(instances, "insert_plain", lambda connection, one: False)
        assert instances.insert_instance(long, one, policy, False) is outcome
    assert sum(taken) > 30, "the short way was hardly ever taken"
    assert rows(short) == rows(long)


def test_a_record_that_differs_from_the_first_is_not_judged_unseen(catalog: Open) -> None:
    connection, chance = catalog("one"), random.Random(1)
    first = replace(record(1, chance), origin=Origin.RECEIVED)
    other = replace(first, file=replace(first.file, sha256="f" * 64))
    instances.insert_instance(connection, first, ConflictPolicy.KEEP_FIRST)
    with pytest.raises(instances.FirstMustBeRead):
        instances.insert_instance(connection, other, ConflictPolicy.KEEP_FIRST)


def test_what_is_compared_once_is_not_kept_where_it_is_long() -> None:
    """A sender may fill every attribute of a header with as many bytes as the index keeps, each time others."""
    keywords = plain._SHARED_KEYWORDS
    row = json.dumps(dict.fromkeys(keywords, "x"))
    plain._compared.cache_clear()
    tracemalloc.start()
    try:
        for number in range(100):
            said = tuple(f"{number}{'y' * 4096}" if index < 40 else None for index in range(len(keywords)))
            plain._adds_nothing(row, row, row, said)
            assert plain._with("CT", "Z" * 40_000 + str(number)).startswith("CT\\")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20, f"{held >> 10} KiB"
