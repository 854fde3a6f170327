"""A whole answer, looked at before it becomes results: the right patient, and the study's own UIDs again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydicom.dataset import Dataset

from dicom_node.engines._dicom_objects import Described, restored_copy
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import EngineError, EngineRejected
from dicom_node.model import EngineTask

__all__ = ["check_patient", "restored_copies"]

_ANOTHER = "a returned object names another patient than the images it refers to"


def check_patient(engine: str, task: EngineTask, answer: Sequence[Described]) -> None:
    """Raise EngineError, having quarantined it, for an object with another Patient ID than the images."""
    patient_id = str(read_header(task.instances[0]).get("PatientID") or "").strip()
    for one in answer:
        if one.patient_id and one.patient_id != patient_id:
            raise EngineError(f"engine {engine}: {_ANOTHER}{_quarantined(task, one, _ANOTHER)}")


def restored_copies(
    engine: str, task: EngineTask, answer: Sequence[Described], pseudonyms: Pseudonyms, *, max_bytes: int
) -> tuple[Dataset, ...]:
    """The answer under the study's own UIDs and patient, an object each; see `restored_copy`.

    Raises EngineRejected for more than `max_bytes`, EngineError for one that does not fit, which is quarantined.
    """
    size = sum(one.returned.instance.data_set_length for one in answer)
    if size > max_bytes:
        raise EngineRejected(
            f"the answer has {size} bytes, at most {max_bytes} are mapped back to the patient (max_copied_bytes)"
        )
    for instance in task.instances:
        with suppress(EngineRejected):  # it was left out, so nothing of it was handed out
            pseudonyms.learn(read_header(instance))
    source = read_header(task.instances[0])
    siblings = frozenset(uid for one in answer for uid in (one.uid, one.series))
    copies = []
    for one in answer:
        try:
            copies.append(restored_copy(one, pseudonyms, source, siblings))
        except EngineRejected:
            raise
        except EngineError as exc:
            raise EngineError(f"engine {engine}: {exc}{_quarantined(task, one, str(exc))}") from exc
    return tuple(copies)


def _quarantined(task: EngineTask, one: Described, reason: str) -> str:
    name = task.quarantine(Path(one.returned.instance.path), reason)
    return f"; the file is in the quarantine as {name}" if name else ""
