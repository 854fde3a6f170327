"""Storage commitment: deliveries that are done when their destination committed, and requests of peers."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicom_node.errors import CommitmentNotTaken, DeliveryUnavailable, NotFound, TooManyCommitments, TransactionUidTaken
from dicom_node.model import CommitmentReport, DeliveryState, ObjectReference

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture
def queued(bench: Any) -> Any:
    """The bench, with the two results of a study queued for PACS."""
    return _with_delivery(bench)


def _with_delivery(bench: Any) -> Any:
    bench.receive(bench.dataset("1.1.1.1", study="1.1", series="1.1.1"))
    bench.route(bench.plan(series_instance_uid="1.1.1"), study="1.1", series="1.1.1")
    assert bench.worker().run_once("w")
    return bench


def _delivery(bench: Any) -> Any:
    (delivery,) = bench.queue.deliveries()
    return delivery


def _uids(bench: Any) -> list[str]:
    return [item.instance.sop_instance_uid for item in _delivery(bench).items]


# --- toward destinations


def test_a_delivery_is_done_only_when_the_destination_committed(queued: Any, kit: ModuleType) -> None:
    recorder, asker = kit.Recorder(), kit.Asker()
    courier = queued.courier(asker=asker, observer=recorder)
    assert courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.COMMITTING
    assert not courier.run_once("PACS") and not recorder.named("delivery_finished")
    ((transaction, asked),) = asker.asked
    assert asked == _uids(queued)
    assert [one.why for one in queued.queue.stuck() if one.kind == "delivery"] == [
        "sent; the destination has not yet committed to keeping it"
    ]
    item = _delivery(queued).items[0].instance
    assert queued.queue.committed_by(item.sop_instance_uid, item.sha256) == []

    report = kit.report_on(transaction, [ObjectReference("1.2", uid) for uid in asked])
    queued.queue.note_report(report, {"PACS"})
    assert courier.run_once("PACS") and not courier.run_once("PACS")
    delivery = _delivery(queued)
    assert delivery.state is DeliveryState.DONE and all(item.committed for item in delivery.items)
    assert len(asker.asked) == 1 and len(queued.peer.kept["PACS"]) == 2
    assert len(recorder.named("delivery_finished")) == 1
    assert queued.queue.committed_by(item.sop_instance_uid, item.sha256) == ["PACS"]
    assert queued.queue.committed_by(item.sop_instance_uid, "other content") == []
    queued.queue.note_report(report, {"PACS"})  # once more
    assert _delivery(queued).state is DeliveryState.DONE
    told = [event.text for event in queued.queue.timeline("1.1")]
    assert "sent to PACS, asked to commit to keeping it" in told
    assert "delivered to PACS: 2 objects, it committed to 2" in told


def test_a_report_on_the_association_of_the_question_ends_it_at_once(queued: Any, kit: ModuleType) -> None:
    courier = queued.courier(asker=kit.Asker(kit.report_on))
    assert courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.DONE


def test_a_lost_report_is_asked_for_again_and_a_late_one_counts(queued: Any, kit: ModuleType) -> None:
    asker = kit.Asker()
    courier = queued.courier(asker=asker)
    courier.run_once("PACS")
    queued.clock.sleep(59.0)
    assert not courier.run_once("PACS")
    queued.clock.sleep(2.0)
    assert courier.run_once("PACS")
    (first, uids), (second, again) = asker.asked
    assert first != second and uids == again and len(queued.peer.kept["PACS"]) == 2
    queued.clock.sleep(61.0)
    assert not courier.run_once("PACS")  # it is given twice as long now
    queued.queue.note_report(kit.report_on(first, [ObjectReference("1.2", uid) for uid in uids]), {"PACS"})
    assert courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.DONE and len(asker.asked) == 2


@pytest.mark.parametrize("reports", [True, False])
def test_a_destination_that_reports_only_at_the_very_end_is_still_believed(
    queued: Any, kit: ModuleType, reports: bool
) -> None:
    asker = kit.Asker()
    courier = queued.courier(asker=asker, give_up_after_s=50.0)
    courier.run_once("PACS")
    queued.clock.sleep(100.0)
    ((transaction, uids),) = asker.asked
    if reports:
        queued.queue.note_report(kit.report_on(transaction, [ObjectReference("1.2", uid) for uid in uids]), {"PACS"})
    assert courier.run_once("PACS")
    delivery = _delivery(queued)
    assert delivery.state is (DeliveryState.DONE if reports else DeliveryState.FAILED)
    assert reports or delivery.error.startswith("not committed to in 1 tries")


def test_what_it_did_not_commit_to_is_sent_again_a_few_times_and_then_needs_a_person(
    queued: Any, kit: ModuleType
) -> None:
    first, second = _uids(queued)

    def lost(transaction: str, references: Any) -> CommitmentReport:
        kept = tuple(one for one in references if one.sop_instance_uid != first)
        failed = tuple((one, 0x0112) for one in references if one.sop_instance_uid == first)
        return CommitmentReport(transaction_uid=transaction, committed=kept, failed=failed)

    recorder, asker = kit.Recorder(), kit.Asker(lost)
    courier = queued.courier(asker=asker, observer=recorder)
    for _ in range(5):
        while courier.run_once("PACS"):
            pass
        queued.clock.sleep(100.0)
    assert queued.peer.kept["PACS"] == [first, second, first, first]
    assert [uids for _, uids in asker.asked] == [[first, second], [first], [first]]
    delivery = _delivery(queued)
    assert delivery.state is DeliveryState.FAILED
    assert delivery.items[0].error == "storage commitment: no such object instance (0112H)"
    assert delivery.items[1].committed and recorder.named("dead_letter") == [("delivery", "error")]

    asker.answer = kit.report_on
    queued.queue.retry_delivery(delivery.id)
    assert courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.DONE
    assert queued.peer.kept["PACS"][4:] == [first] and asker.asked[-1][1] == [first]


def test_what_sending_again_cannot_change_needs_a_person_at_once(queued: Any, kit: ModuleType) -> None:
    def conflict(transaction: str, references: Any) -> CommitmentReport:
        return CommitmentReport(
            transaction_uid=transaction, committed=(), failed=tuple((one, 0x0119) for one in references)
        )

    queued.courier(asker=kit.Asker(conflict)).run_once("PACS")
    assert _delivery(queued).state is DeliveryState.FAILED and len(queued.peer.kept["PACS"]) == 2


def test_a_failure_told_late_takes_nothing_back(queued: Any, kit: ModuleType) -> None:
    asker = kit.Asker()
    courier = queued.courier(asker=asker)
    courier.run_once("PACS")
    queued.clock.sleep(61.0)
    courier.run_once("PACS")
    (first, uids), (second, _) = asker.asked
    references = tuple(ObjectReference("1.2", uid) for uid in uids)
    refused = CommitmentReport(transaction_uid=first, committed=(), failed=tuple((one, 0x0110) for one in references))
    queued.queue.note_report(refused, {"PACS"})
    assert not courier.run_once("PACS")  # the answer to the second question is waited for
    queued.queue.note_report(kit.report_on(second, references), {"PACS"})
    queued.queue.note_report(refused, {"PACS"})
    assert courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.DONE and len(queued.peer.kept["PACS"]) == 2


def test_only_the_destination_that_was_asked_is_believed(queued: Any, kit: ModuleType) -> None:
    asker = kit.Asker()
    queued.courier(asker=asker).run_once("PACS")
    ((transaction, uids),) = asker.asked
    report = kit.report_on(transaction, [ObjectReference("1.2", uid) for uid in uids])
    with pytest.raises(NotFound):
        queued.queue.note_report(report, {"OTHER"})
    with pytest.raises(NotFound):
        queued.queue.note_report(kit.report_on("1.2.3", report.committed), {"PACS"})
    assert _delivery(queued).state is DeliveryState.COMMITTING
    assert not any(item.committed for item in _delivery(queued).items)


def test_a_destination_that_will_not_be_asked_is_tried_until_the_delivery_is_too_old(
    queued: Any, kit: ModuleType
) -> None:
    asker = kit.Asker(failure=CommitmentNotTaken("it answered 0110H"))
    courier = queued.courier(asker=asker, give_up_after_s=100.0, backoff_s=10.0, breaker_failures=1)
    courier.run_once("PACS")
    assert courier.circuits() == {"PACS": False}  # it takes objects
    assert _delivery(queued).state is DeliveryState.PENDING and "0110H" in _delivery(queued).error
    queued.clock.sleep(101.0)
    courier.run_once("PACS")
    assert _delivery(queued).state is DeliveryState.FAILED and len(queued.peer.kept["PACS"]) == 2


def test_a_delivery_that_waits_for_commitment_holds_up_no_other_and_can_be_cancelled(
    queued: Any, kit: ModuleType
) -> None:
    courier = queued.courier(asker=kit.Asker())
    courier.run_once("PACS")
    queued.receive(queued.dataset("1.2.1.1", study="1.2", series="1.2.1"))
    queued.route(queued.plan(series_instance_uid="1.2.1"), study="1.2", series="1.2.1")
    assert queued.worker().run_once("w") and courier.run_once("PACS")
    newer, older = queued.queue.deliveries()
    assert newer.state is older.state is DeliveryState.COMMITTING
    queued.queue.cancel_delivery(older.id)
    assert queued.queue.deliveries()[1].state is DeliveryState.CANCELLED
    snapshot = queued.queue.snapshot()
    assert snapshot["deliveries"]["PACS"]["committing"]["count"] == 1 and snapshot["ledger"]["imbalance"] == 0


@pytest.mark.parametrize("point", ["sent", "begun", "asked", "reported", "settled"])
def test_after_kill_9_at_each_point_the_delivery_is_committed_to(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int], point: str
) -> None:
    clock = kit.LaterClock()
    bench = _with_delivery(kit.Bench(tmp_path, clock))
    assert killed_at(tmp_path, "commit", point) == -9
    clock.ahead_s = 61.0
    asker = kit.Asker(kit.report_on)
    courier = bench.courier(sender=kit.FolderPeer(tmp_path / "peer", lambda here: None), asker=asker)
    assert courier.run_once("PACS") is (point != "settled")
    assert _delivery(bench).state is DeliveryState.DONE
    assert all(item.committed for item in _delivery(bench).items)
    assert (tmp_path / "peer" / "log").read_text().split() == _uids(bench)  # each was sent once
    assert len(asker.asked) == (0 if point in ("reported", "settled") else 1)
    bench.close()


# --- for peers


def _ask(bench: Any, *uids: str, transaction: str = "1.9", hold_s: float = 0.0, peer: str = "CT1") -> Any:
    references = [ObjectReference(CT, uid) for uid in uids]
    return bench.queue.ask_commitment(peer, "NODE", transaction, references, hold_s)


class _Reporter:
    """Keeps what is reported. `failures`: how often it cannot be."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.told: list[tuple[str, CommitmentReport]] = []

    def report(self, peer: Any, request: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise DeliveryUnavailable("nobody there")
        self.told.append((peer.calling_ae_title, request.report()))


def test_a_request_is_checked_reported_and_forgotten_in_the_end(bench: Any) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    reporter = _Reporter()
    committer = bench.committer(reporter)
    _ask(bench, "1.2.3.1.1", "1.2.3.1.2", hold_s=5.0)
    assert committer.run_once("CT1") and not committer.run_once("CT1")  # held for the peer's own association
    bench.clock.sleep(5.0)
    assert committer.run_once("CT1") and not committer.run_once("CT1")
    kept, lost = ObjectReference(CT, "1.2.3.1.1"), ObjectReference(CT, "1.2.3.1.2")
    report = CommitmentReport(transaction_uid="1.9", committed=(kept,), failed=((lost, 0x0112),))
    assert reporter.told == [("NODE", report)]
    assert bench.queue.snapshot()["commitments"] == {"asked": 0, "judged": 0, "reported": 1, "failed": 0}
    assert "CT1 was told: committed to 1" in [event.text for event in bench.queue.timeline("1.2.3")]
    bench.clock.sleep(31 * 24 * 3600.0)
    assert not committer.run_once("CT1")
    assert bench.database.rows("SELECT count(*) FROM commitment_reference") == [(0,)]


def test_a_report_is_tried_with_growing_pauses_and_only_for_so_long(bench: Any) -> None:
    reporter = _Reporter(failures=100)
    committer = bench.committer(reporter, backoff_s=10.0, backoff_max_s=40.0, give_up_after_s=100.0)
    _ask(bench, "1.2")
    assert committer.run_once("CT1") and committer.run_once("CT1") and not committer.run_once("CT1")
    (stuck,) = [one for one in bench.queue.stuck() if one.kind == "commitment"]
    assert (stuck.name, stuck.why) == ("report to CT1", "nobody there") and stuck.next_s == pytest.approx(10.0)
    tries = 1
    for _ in range(200):
        bench.clock.sleep(1.0)
        tries += committer.run_once("CT1")
    assert tries == 5 and bench.queue.snapshot()["commitments"]["failed"] == 1
    reporter.failures = 0
    _ask(bench, "1.2")  # the peer asks again
    assert committer.run_once("CT1") and committer.run_once("CT1")
    assert len(reporter.told) == 1


def test_of_many_objects_exactly_those_that_changed_on_disk_are_not_committed_to(bench: Any) -> None:
    uids = [f"1.2.3.1.{number}" for number in range(1, 101)]
    bench.receive(*(bench.dataset(uid) for uid in uids))
    for uid in uids[::10]:
        path = Path(bench.catalog.index.instance(uid).path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()
        path.write_bytes(content)
    reporter = _Reporter(failures=20)
    committer = bench.committer(reporter)
    _ask(bench, *uids)
    for _ in range(3600):  # the peer is down for an hour
        while committer.run_once("CT1"):
            pass
        if reporter.told:
            break
        bench.clock.sleep(60.0)
    ((_, report),) = reporter.told
    assert len(report.committed) == 90
    assert [(one.sop_instance_uid, reason) for one, reason in report.failed] == [(uid, 0x0110) for uid in uids[::10]]


def test_an_object_of_a_catalog_of_old_is_checked_by_its_sha_256(bench: Any) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"), bench.dataset("1.2.3.1.2"))
    for uid, end in (("1.2.3.1.1", b""), ("1.2.3.1.2", b"other bytes")):
        kept = bench.catalog.index.instance(uid)
        digest = hashlib.sha256(Path(kept.path).read_bytes()[kept.data_set_offset :] + end).hexdigest()
        bench.database.write(
            lambda connection, row=(digest, uid): connection.execute(
                "UPDATE instance SET sha256 = ? WHERE sop_instance_uid = ?", row
            )
        )
    reporter = _Reporter()
    committer = bench.committer(reporter)
    _ask(bench, "1.2.3.1.1", "1.2.3.1.2")
    assert committer.run_once("CT1") and committer.run_once("CT1")
    assert [reason for _, reason in reporter.told[0][1].failed] == [0x0110]


def test_a_peer_that_is_down_holds_up_no_other(bench: Any) -> None:
    reporter = _Reporter()
    committer = bench.committer(reporter, "CT1", "CT2")
    _ask(bench, "1.2", peer="CT1")
    _ask(bench, "1.2", peer="CT2")  # the same Transaction UID of another peer is another request
    assert committer.run_once("CT2") and committer.run_once("CT2") and not committer.run_once("CT2")
    assert len(reporter.told) == 1


def test_what_belongs_to_an_earlier_round_changes_nothing(bench: Any) -> None:
    reporter = _Reporter()
    committer = bench.committer(reporter)
    earlier = _ask(bench, "1.2")
    assert committer.run_once("CT1") and committer.run_once("CT1")
    assert _ask(bench, "1.2").round == earlier.round + 1
    bench.queue.judge_commitment(earlier, [0])
    bench.queue.end_commitment(earlier)
    assert not bench.queue.claim_commitment(earlier, 1.0, here=True)
    assert bench.queue.snapshot()["commitments"]["asked"] == 1


def test_only_one_of_receiver_and_service_reports(bench: Any) -> None:
    committer = bench.committer(_Reporter())
    asked = _ask(bench, "1.2", hold_s=5.0)
    assert bench.queue.judged_commitment(asked) is None
    committer.run_once("CT1")
    judged = bench.queue.judged_commitment(asked)
    assert judged is not None and judged.reasons == (0x0112,)
    assert bench.queue.claim_commitment(judged, 30.0, here=True)
    assert not bench.queue.claim_commitment(judged, 30.0, here=True)
    bench.queue.let_go_of_commitment(judged)  # too late: it is being reported
    bench.clock.sleep(10.0)
    assert not committer.run_once("CT1")
    bench.clock.sleep(21.0)
    assert committer.run_once("CT1")


def test_other_references_under_a_transaction_uid_and_too_many_requests_are_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask(bench, "1.2", "1.3")
    assert _ask(bench, "1.3", "1.2").round == 1
    with pytest.raises(TransactionUidTaken):
        _ask(bench, "1.2")
    monkeypatch.setattr("dicom_node.store.commitments.MAX_OPEN", 1)
    with pytest.raises(TooManyCommitments):
        _ask(bench, "1.2", transaction="1.10")
    assert _ask(bench, "1.2", transaction="1.10", peer="CT2")


@pytest.mark.parametrize("point", ["checked", "judged", "claimed", "told", "ended"])
def test_after_kill_9_at_each_point_the_peer_is_told(
    kit: ModuleType, tmp_path: Path, killed_at: Callable[[Path, str, str], int], point: str
) -> None:
    clock = kit.LaterClock()
    bench = kit.Bench(tmp_path, clock)
    bench.receive(bench.dataset("1.2.3.1.1"))
    _ask(bench, "1.2.3.1.1", "1.2.3.1.2")
    assert killed_at(tmp_path, "report", point) == -9
    clock.ahead_s = 181.0
    committer = bench.committer(kit.FolderReporter(tmp_path / "peer", lambda here: None))
    while committer.run_once("CT1"):
        pass
    told = (tmp_path / "peer" / "told").read_text().splitlines()
    # only between the peer's yes and our note of it may it be told twice; it knows the Transaction UID
    assert told == ["1.9 1 1"] * (2 if point == "told" else 1)
    assert bench.queue.snapshot()["commitments"]["reported"] == 1
    bench.close()
