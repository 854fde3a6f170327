"""Which instances a retrieval names, and how its sub-operations are counted (PS3.4 C.4.2, C.4.3)."""

from collections.abc import Callable
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.model import Destination, StoredInstance
from dicom_node.services.identifier import InformationModel
from dicom_node.services.retrieve import Progress, RetrieveService, SubOperation, SubOperationResult
from dicom_node.store.catalog import Catalog

Keep = Callable[..., Dataset]
PATIENT_ROOT, STUDY_ROOT = InformationModel.PATIENT_ROOT, InformationModel.STUDY_ROOT


def identifier(level: str, **keys: Any) -> Dataset:
    """An identifier with these keys."""
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(ds, keyword, value)
    return ds


@pytest.fixture
def two_studies(keep: Keep) -> list[Dataset]:
    """Study one: two series of two and one instances; study two: one instance. One patient."""
    first = keep(PatientID="A")
    study = {"PatientID": "A", "StudyInstanceUID": first.StudyInstanceUID}
    second = keep(**study, SeriesInstanceUID=first.SeriesInstanceUID, InstanceNumber="2")
    return [first, second, keep(**study), keep(PatientID="A")]


@pytest.mark.parametrize(
    ("model", "level", "keys", "expected"),
    [
        (PATIENT_ROOT, "PATIENT", {"PatientID": "A"}, [0, 1, 2, 3]),
        (PATIENT_ROOT, "STUDY", {"PatientID": "A", "StudyInstanceUID": 0}, [0, 1, 2]),
        (PATIENT_ROOT, "STUDY", {"PatientID": "other", "StudyInstanceUID": 0}, []),
        (STUDY_ROOT, "STUDY", {"StudyInstanceUID": 0}, [0, 1, 2]),
        (STUDY_ROOT, "STUDY", {"StudyInstanceUID": 0, "PatientID": "ignored"}, [0, 1, 2]),
        (STUDY_ROOT, "SERIES", {"StudyInstanceUID": 0, "SeriesInstanceUID": 0}, [0, 1]),
        (STUDY_ROOT, "SERIES", {"SeriesInstanceUID": 0}, [0, 1]),
        (STUDY_ROOT, "IMAGE", {"StudyInstanceUID": 0, "SeriesInstanceUID": 0, "SOPInstanceUID": 1}, [1]),
    ],
)
def test_the_unique_keys_name_the_instances(
    catalog: Catalog,
    two_studies: list[Dataset],
    model: InformationModel,
    level: str,
    keys: dict[str, Any],
    expected: list[int],
) -> None:
    asked = {
        keyword: value if isinstance(value, str) else two_studies[value][keyword].value
        for keyword, value in keys.items()
    }
    plan = RetrieveService(catalog.index).plan(model, identifier(level, **asked))
    assert plan.status == 0
    found = {instance.sop_instance_uid for instance in plan.instances}
    assert found == {two_studies[number].SOPInstanceUID for number in expected}


def test_a_list_of_uids_is_taken_at_the_level_itself(catalog: Catalog, two_studies: list[Dataset]) -> None:
    studies = [two_studies[0].StudyInstanceUID, two_studies[3].StudyInstanceUID]
    plan = RetrieveService(catalog.index).plan(STUDY_ROOT, identifier("STUDY", StudyInstanceUID=studies))
    assert len(plan.instances) == 4


@pytest.mark.parametrize(
    ("model", "level", "keys", "tag"),
    [
        (STUDY_ROOT, "PATIENT", {"PatientID": "A"}, 0x00080052),
        (STUDY_ROOT, "STUDY", {}, 0x0020000D),
        (STUDY_ROOT, "STUDY", {"StudyInstanceUID": "1.2.*"}, 0x0020000D),
        (STUDY_ROOT, "SERIES", {"StudyInstanceUID": ["1.2", "1.3"], "SeriesInstanceUID": "1.4"}, 0x0020000D),
        (STUDY_ROOT, "IMAGE", {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}, 0x00080018),
        (PATIENT_ROOT, "PATIENT", {"PatientID": ""}, 0x00100020),
        (PATIENT_ROOT, "PATIENT", {"PatientID": ["A", "B"]}, 0x00100020),
    ],
)
def test_an_identifier_that_names_nothing_is_refused(
    catalog: Catalog, model: InformationModel, level: str, keys: dict[str, Any], tag: int
) -> None:
    plan = RetrieveService(catalog.index).plan(model, identifier(level, **keys))
    assert (plan.status, plan.offending) == (0xA900, (tag,))


def test_strict_wants_the_keys_above_unless_relational_was_negotiated(catalog: Catalog) -> None:
    service = RetrieveService(catalog.index, strict=True)
    asked = identifier("SERIES", SeriesInstanceUID="1.2")
    assert service.plan(STUDY_ROOT, asked).status == 0xA900
    assert service.plan(STUDY_ROOT, asked, relational=True).status == 0


def test_only_configured_destinations_are_known(catalog: Catalog) -> None:
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104)
    service = RetrieveService(catalog.index, {"PACS": pacs})
    assert service.destination("PACS ") is pacs
    assert service.destination("OTHER") is None


DONE = SubOperationResult(outcome=SubOperation.COMPLETED)
WARNED = SubOperationResult(outcome=SubOperation.WARNING)
LOST = SubOperationResult(outcome=SubOperation.FAILED, reason="refused")
GONE = SubOperationResult(outcome=SubOperation.FAILED, reason="unreachable", fatal=True)


def run(
    catalog: Catalog, keep: Keep, results: list[SubOperationResult], cancel_after: int | None = None
) -> tuple[list[Progress], list[StoredInstance]]:
    """The responses of a retrieval whose sub-operations end like this."""
    study = keep().StudyInstanceUID
    for _ in results[1:]:
        keep(StudyInstanceUID=study)
    service = RetrieveService(catalog.index)
    instances = service.plan(STUDY_ROOT, identifier("STUDY", StudyInstanceUID=study)).instances
    sent: list[StoredInstance] = []

    def send(instance: StoredInstance) -> SubOperationResult:
        sent.append(instance)
        return results[len(sent) - 1]

    def cancelled() -> bool:
        return cancel_after is not None and len(sent) >= cancel_after

    return list(service.retrieve(instances, send, cancelled)), sent


@pytest.mark.parametrize(
    ("results", "status", "counts"),
    [
        ([DONE, DONE, DONE], 0x0000, (3, 0, 0)),
        ([DONE, LOST, DONE], 0xB000, (2, 1, 0)),
        ([DONE, WARNED], 0xB000, (1, 0, 1)),
        ([WARNED, LOST], 0xB000, (0, 1, 1)),
        ([LOST, LOST], 0xA702, (0, 2, 0)),
        ([GONE, DONE, DONE], 0xA702, (0, 3, 0)),
        ([DONE, GONE, DONE], 0xB000, (1, 2, 0)),
    ],
)
def test_the_final_status_tells_what_became_of_the_sub_operations(
    catalog: Catalog,
    keep: Keep,
    results: list[SubOperationResult],
    status: int,
    counts: tuple[int, int, int],
) -> None:
    responses, sent = run(catalog, keep, results)
    last = responses[-1]
    assert (last.status, (last.completed, last.failed, last.warning), last.remaining) == (status, counts, 0)
    assert len(last.failed_uids) == counts[1]
    delivered = {
        instance.sop_instance_uid
        for instance, result in zip(sent, results, strict=False)
        if result.outcome is not SubOperation.FAILED
    }
    assert not delivered & set(last.failed_uids)
    assert all(response.status == 0xFF00 and not response.failed_uids for response in responses[:-1])


def test_pending_responses_count_down(catalog: Catalog, keep: Keep) -> None:
    responses, _ = run(catalog, keep, [DONE, LOST, DONE, DONE])
    assert [(p.remaining, p.completed, p.failed) for p in responses[:-1]] == [(3, 1, 0), (2, 1, 1), (1, 2, 1)]


def test_pending_responses_come_only_when_it_is_time(catalog: Catalog, keep: Keep) -> None:
    study = keep().StudyInstanceUID
    for _ in range(4):
        keep(StudyInstanceUID=study)
    service = RetrieveService(catalog.index)
    instances = service.plan(STUDY_ROOT, identifier("STUDY", StudyInstanceUID=study)).instances
    times = iter([False, True, False, True])
    responses = list(service.retrieve(instances, lambda instance: DONE, lambda: False, lambda: next(times)))
    assert [(p.status, p.completed) for p in responses] == [(0xFF00, 2), (0xFF00, 4), (0, 5)]


def test_a_cancel_stops_and_says_what_remains(catalog: Catalog, keep: Keep) -> None:
    responses, sent = run(catalog, keep, [DONE, LOST, DONE, DONE], cancel_after=2)
    last = responses[-1]
    assert (last.status, last.remaining, last.completed, last.failed) == (0xFE00, 2, 1, 1)
    assert len(sent) == 2
    assert last.failed_uids == (sent[1].sop_instance_uid,)


def test_nothing_to_send_is_success(catalog: Catalog) -> None:
    (last,) = RetrieveService(catalog.index).retrieve((), lambda instance: DONE, lambda: False)
    assert (last.status, last.completed, last.failed) == (0, 0, 0)
