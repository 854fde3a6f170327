"""What engines stored here, as the catalog keeps and gives it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dicom_node.config import StorageSettings
from dicom_node.model import (
    AssociationEnd,
    BootTime,
    ConflictPolicy,
    InstanceHeader,
    InstanceRecord,
    Origin,
    Sending,
    Source,
    StoreOutcome,
)
from dicom_node.store.catalog import Catalog, open_catalog

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
EXPLICIT = "1.2.840.10008.1.2.1"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """Moved by hand."""

    seconds = 100.0

    def boot(self) -> BootTime:
        return BootTime(boot_id="boot", seconds=self.seconds)

    def wall(self) -> datetime:
        return NOON + timedelta(seconds=self.seconds)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path, clock: Clock) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path / "data", clock, StorageSettings(reserve_bytes=0, reserve_ratio=0))
    yield opened
    opened.close()


@pytest.fixture
def store(catalog: Catalog, clock: Clock) -> Callable[..., StoreOutcome]:
    """`store(uid, body=..., study=..., title=..., origin=..., policy=...)`: archive it and index it."""

    def put(
        uid: str,
        *,
        body: bytes = b"x",
        study: str = "1.2",
        title: str = "AI",
        origin: Origin = Origin.RETURNED,
        policy: ConflictPolicy = ConflictPolicy.KEEP_FIRST,
        patient: str = "P1",
    ) -> StoreOutcome:
        spool = catalog.archive.begin(
            sop_class_uid=SEG, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, source_ae=title
        )
        spool.write(body)
        header = InstanceHeader(
            sop_class_uid=SEG,
            sop_instance_uid=uid,
            study_instance_uid=study,
            series_instance_uid=f"{study}.1",
            transfer_syntax_uid=EXPLICIT,
            attributes={"Modality": "SEG", "PatientID": patient},
        )
        record = InstanceRecord(
            header=header,
            file=spool.commit(),
            source=Source(calling_ae_title=title, called_ae_title="NODE", address="127.0.0.1"),
            origin=origin,
            received_at=clock.wall(),
            received_boot=clock.boot(),
        )
        return catalog.index.add_instance(record, policy, lambda first: False)

    return put


def _found(catalog: Catalog, after: int = 0, study: str = "1.2", title: str = "AI") -> list[Any]:
    return list(catalog.queue.returns(study, [title], after))


def test_arrivals_are_counted_up_and_listed_by_study_and_ae(
    catalog: Catalog, store: Callable[..., StoreOutcome], clock: Clock
) -> None:
    assert catalog.queue.latest_return() == 0
    store("1.2.1")
    clock.seconds += 5
    store("1.2.2")
    store("1.2.3", title="OTHER")
    store("1.3.1", study="1.3")
    store("1.2.4", origin=Origin.RECEIVED)
    assert catalog.queue.latest_return() == 4
    first, second = _found(catalog)
    assert [one.instance.sop_instance_uid for one in (first, second)] == ["1.2.1", "1.2.2"]
    assert (first.position, first.age_s, first.known_as) == (1, 5.0, Origin.RETURNED)
    assert Path(first.instance.path).read_bytes().endswith(b"x")
    assert [one.position for one in _found(catalog, after=1)] == [2]


def test_what_is_sent_again_is_listed_once_and_newer(catalog: Catalog, store: Callable[..., StoreOutcome]) -> None:
    store("1.2.1")
    mark = catalog.queue.latest_return()
    assert store("1.2.1") is StoreOutcome.DUPLICATE
    assert [one.position for one in _found(catalog)] == [mark + 1]
    assert store("1.2.1", body=b"y") is StoreOutcome.VARIANT
    old, new = _found(catalog, after=mark)
    assert Path(old.instance.path).read_bytes().endswith(b"x") and Path(new.instance.path).read_bytes().endswith(b"y")


@pytest.mark.parametrize(
    ("policy", "outcome", "path"),
    [
        (ConflictPolicy.KEEP_FIRST, StoreOutcome.VARIANT, True),
        (ConflictPolicy.REPLACE, StoreOutcome.VARIANT, True),
        (ConflictPolicy.REFUSE, StoreOutcome.REFUSED, False),
    ],
)
def test_an_image_the_node_has_is_seen_coming_back_and_stays_what_it_is(
    catalog: Catalog,
    store: Callable[..., StoreOutcome],
    policy: ConflictPolicy,
    outcome: StoreOutcome,
    path: bool,
) -> None:
    store("1.2.1", origin=Origin.RECEIVED)
    before = catalog.index.instance("1.2.1")
    assert store("1.2.1") is StoreOutcome.DUPLICATE
    assert store("1.2.1", body=b"y", policy=policy) is outcome
    assert catalog.index.instance("1.2.1") == before
    same, altered = _found(catalog)
    assert (same.known_as, altered.known_as) == (Origin.RECEIVED, Origin.RECEIVED)
    assert bool(altered.instance.path) is path


def test_a_missing_image_is_not_replaced_by_what_an_engine_made_of_it(
    catalog: Catalog, store: Callable[..., StoreOutcome]
) -> None:
    store("1.2.1", origin=Origin.RECEIVED)
    (known,) = catalog.index.files()
    catalog.index.mark_file(known, present=False)
    assert store("1.2.1", body=b"y", policy=ConflictPolicy.REPLACE) is StoreOutcome.VARIANT
    assert catalog.index.instance("1.2.1") is None


def test_what_comes_under_uids_of_a_job_is_kept_beside_the_index(
    catalog: Catalog, store: Callable[..., StoreOutcome]
) -> None:
    store("1.2.1", origin=Origin.RECEIVED)
    sending = Sending(what="DICOM instances", host="h", objects=1, identifiable=False, remote_id="2.25.7")
    catalog.queue.begin_sending(sending, engine="box", study_instance_uid="1.2", series_instance_uid="1.2.1", job=None)
    assert store("2.25.7.1", study="2.25.7", patient="JOB-0123456789ABCDEF") is StoreOutcome.SET_ASIDE
    assert store("2.25.7.1", study="2.25.7", patient="JOB-0123456789ABCDEF") is StoreOutcome.DUPLICATE
    assert store("2.25.8.1", study="2.25.8", patient="JOB-0123456789ABCDEF") is StoreOutcome.SET_ASIDE
    assert catalog.queue.snapshot()["studies"]["total"] == 1
    (one,) = _found(catalog, study="2.25.7")
    assert one.known_as is None and Path(one.instance.path).read_bytes().endswith(b"x")
    told = [event.text for event in catalog.queue.timeline("1.2")]
    assert "1 objects (SEG) came back from AI: of no job so far; they are kept" in told
    # the name of a study nobody sent, of a patient who is no job's: that study is the engine's own
    assert store("2.25.9.1", study="2.25.9") is StoreOutcome.NEW


def test_a_study_that_left_under_its_own_uid_comes_back_as_itself(
    catalog: Catalog, store: Callable[..., StoreOutcome]
) -> None:
    sending = Sending(what="x", host="h", objects=1, identifiable=True, remote_id="1.2")
    catalog.queue.begin_sending(sending, engine="box", study_instance_uid="1.2", series_instance_uid="1.2.1", job=None)
    assert store("1.2.5") is StoreOutcome.NEW


def test_an_ae_is_sending_while_its_association_has_traffic(catalog: Catalog, clock: Clock) -> None:
    source = Source(calling_ae_title="AI", called_ae_title="NODE", address="127.0.0.1")
    catalog.index.open_association("a", source)
    assert catalog.queue.is_sending(["AI", "B"], 5.0) and not catalog.queue.is_sending(["B"], 5.0)
    clock.seconds += 6
    assert not catalog.queue.is_sending(["AI"], 5.0)
    catalog.index.touch_associations(["a"])
    assert catalog.queue.is_sending(["AI"], 5.0)
    catalog.index.end_association("a", AssociationEnd.RELEASED)
    assert not catalog.queue.is_sending(["AI"], 5.0)


def test_an_instance_produced_here_is_no_return(catalog: Catalog, store: Callable[..., StoreOutcome]) -> None:
    store("1.2.1", origin=Origin.PRODUCED, title="")
    assert catalog.queue.latest_return() == 0
    store("1.2.1")
    assert [one.known_as for one in _found(catalog)] == [Origin.PRODUCED]
