"""Sendings and exports as they are told: by study, success and failure apart, and only what was transferred."""

from typing import Any

import pytest

from dicom_node.audited import MAX_STUDIES, ReceivedStudies, SentStudies, to_destination
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome
from dicom_node.model import Origin, Sending, Source, StoredInstance, StoreOutcome
from dicom_node.pipeline.external import recorder

CT = "1.2.840.10008.5.1.4.1.1.2"


class Heard:
    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)

    def settled(self, timeout_s: float = 5.0) -> bool:
        return True

    def told(self) -> list[tuple[str, tuple[str, ...], int, dict[str, int]]]:
        return [(one.kind.value, one.study_instance_uids, int(one.outcome), dict(one.instances)) for one in self.events]


def instance(number: int, study: str = "1.2.1") -> StoredInstance:
    return StoredInstance(
        sop_class_uid=CT,
        sop_instance_uid=f"1.2.9.{number}",
        study_instance_uid=study,
        series_instance_uid=f"{study}.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path="/nowhere",
        data_set_offset=0,
        data_set_length=0,
        sha256="",
        origin=Origin.RECEIVED,
    )


def test_a_sending_is_told_by_study_with_what_was_refused_apart() -> None:
    heard = Heard()
    told = SentStudies(heard, to_destination("PACS", "192.0.2.20", "NODE"))
    for number in range(4):
        told.sent(instance(number), ok=number != 2)
    told.ended()
    told.ended("again")  # there is nothing left to tell
    assert heard.told() == [
        ("transfer-begun", ("1.2.1",), 0, {}),
        ("transferred", ("1.2.1",), 0, {CT: 3}),
        ("transferred", ("1.2.1",), 4, {CT: 1}),
    ]
    assert [(one.ae_title, one.is_requestor) for one in heard.events[0].participants] == [
        ("NODE", True),
        ("PACS", False),
    ]


def test_of_a_place_that_could_not_be_reached_nothing_is_told_until_it_is_given_up() -> None:
    heard = Heard()
    SentStudies(heard, ()).ended("the sending broke off")
    assert heard.told() == []
    SentStudies(heard, ()).ended("delivery given up: deadline", missing=[instance(1), instance(2)])
    assert heard.told()[1:] == [("transferred", ("1.2.1",), int(AuditOutcome.SERIOUS_FAILURE), {CT: 2})]


def test_an_association_that_never_ends_is_told_before_it_fills_the_memory() -> None:
    heard = Heard()
    received = ReceivedStudies(heard)
    source = Source(calling_ae_title="CT1", called_ae_title="N", address="192.0.2.1", association_id="a")
    for number in range(MAX_STUDIES + 1):
        received.stored(source, f"1.2.{number}", CT, "P1", StoreOutcome.NEW)
    assert sum(one.kind is AuditKind.TRANSFERRED for one in heard.events) == MAX_STUDIES
    received.ended(source, over=False)
    assert heard.events[-1].detail == "the association did not end by a release"
    received.ended(source, over=True)
    assert sum(one.kind is AuditKind.TRANSFERRED for one in heard.events) == MAX_STUDIES + 1


class Ledger:
    def begin_sending(self, *_: Any, **__: Any) -> int:
        return 1

    def end_sending(self, *_: Any, **__: Any) -> None:
        """Kept."""


@pytest.mark.parametrize("breaks", [False, True])
def test_what_leaves_for_an_engine_is_an_export_to_its_host(breaks: bool) -> None:
    heard = Heard()
    record = recorder(
        Ledger(),  # type: ignore[arg-type]
        engine="leap",
        study_instance_uid="1.2.1",
        series_instance_uid="1.2.1.1",
        job=None,
        audit=heard,
    )
    sending = Sending(what="DICOM instances", host="leap.example:8500", objects=3, identifiable=False)
    try:
        with record(sending):
            if breaks:
                raise TimeoutError
    except TimeoutError:
        assert breaks
    (told,) = heard.events
    assert told.kind is AuditKind.EXPORTED and told.outcome == (4 if breaks else 0)
    assert told.participants[1].host == "leap.example" and told.study_instance_uids == ("1.2.1",)
    assert told.detail == "3 objects as DICOM instances to engine leap, without identity"


def test_who_was_identified_is_told_from_the_first_message_on_and_each_patient_in_one_of_its_own() -> None:
    heard = Heard()
    received = ReceivedStudies(heard)
    source = Source(calling_ae_title="CT1", called_ae_title="N", address="192.0.2.1", association_id="a")
    received.identified(source, "anna")
    for patient in ("P1", "P2", "P1"):
        received.stored(source, "1.2.1", CT, patient, StoreOutcome.NEW)
    received.refused(source)
    received.ended(source, over=True)
    assert {one.participants[0].user for one in heard.events} == {"anna"}
    assert [(one.kind.value, one.patient_ids, dict(one.instances)) for one in heard.events] == [
        ("transfer-begun", ("P1",), {}),
        ("transfer-begun", ("P2",), {}),
        ("transferred", ("P1",), {CT: 2}),
        ("transferred", ("P2",), {CT: 1}),
        ("transferred", (), {}),  # of whom the refused one was nobody knows
    ]
