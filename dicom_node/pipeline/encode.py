"""From what an engine says to DICOM data sets: which encoders, on which images, under which keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node.errors import EncodingError
from dicom_node.interfaces import ResultEncoder
from dicom_node.model import EngineTask, StoredInstance
from dicom_node.pipeline.headers_of import read_data_set
from dicom_node.values import (
    Annotations,
    Document,
    EngineResult,
    Findings,
    LabelVolume,
    Mesh,
    Picture,
    Provenance,
    Quantities,
    ResultContext,
    ResultValue,
    ReturnedInstances,
    SlideLabels,
)

__all__ = ["data_set_bytes", "encoded", "result_context", "syntax_of"]


def encoded(
    result: EngineResult,
    task: EngineTask,
    context: ResultContext,
    *,
    encoders: Sequence[ResultEncoder],
    kinds: Collection[str],
    heartbeat: Callable[[], None],
) -> Sequence[Dataset]:
    """The data sets of the `kinds` asked for, in the order of `encoders`; then copies of what the engine stored here.

    Raises EncodingError, StorageError.
    """
    copies = [copy for value in result.values if isinstance(value, ReturnedInstances) for copy in value.copies]
    if result.values and all(isinstance(value, ReturnedInstances) for value in result.values):
        return copies  # DICOM already: nothing is said about images that were read
    sources = [read_data_set(instance) for instance in _analysed(task, result.values)]
    made: list[Dataset] = []
    for encoder in encoders:
        if encoder.kind in kinds:
            made += encoder.encode(result.values, sources, context, tuple(made))
            heartbeat()
    return made + copies


def result_context(
    provenance: Provenance,
    *,
    series_instance_uid: str,
    input_digest: str,
    rule: str,
    run: str,
    run_number: int,
    created_at: datetime,
    time_zone: str,
    node_name: str,
    predecessors: tuple[StoredInstance, ...] = (),
) -> ResultContext:
    """The context of one run of one rule on one input: whatever of these differs gives other UIDs. `run` tells runs
    apart.
    """
    identity = (
        provenance.name,
        provenance.version,
        provenance.device_uid,
        provenance.weights_sha256,
        provenance.config_sha256,
        series_instance_uid,
        input_digest,
        rule,
    )
    return ResultContext(
        run_key=_key(*identity, run),
        # the same organ or finding of the same series stays itself when the model or the input is renewed
        tracking_key=_key(provenance.name, series_instance_uid),
        run_number=run_number,
        created_at=created_at,
        time_zone=time_zone,
        provenance=provenance,
        node_name=node_name,
        predecessors=predecessors,
    )


def syntax_of(ds: Dataset) -> UID:
    """The transfer syntax an encoder wants its data set written in."""
    return UID(getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", ExplicitVRLittleEndian))


def data_set_bytes(ds: Dataset, syntax: UID) -> bytes:
    """The data set alone, as it stands in a file after the file meta information. Raises EncodingError."""
    if syntax.is_implicit_VR or not syntax.is_little_endian or syntax.is_deflated:
        raise EncodingError(f"results are written with explicit VR, little endian, not in {syntax}")
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = False
    buffer.is_little_endian = True
    try:
        write_dataset(buffer, ds)
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as exc:
        raise EncodingError(f"a result cannot be written: {type(exc).__name__}") from exc
    return buffer.getvalue()


def _analysed(task: EngineTask, values: Sequence[ResultValue]) -> Sequence[StoredInstance]:
    """The instances the values speak of, in the order of the task; all of them if none is named, or a surface is among
    the values, which lies in the space of the whole series.
    """
    named: set[str] = set()
    for value in values:
        if isinstance(value, LabelVolume | Document | Quantities):
            named.update(value.sop_instance_uids)
        elif isinstance(value, Findings | Picture | Annotations | SlideLabels):
            named.add(value.sop_instance_uid)
        elif isinstance(value, Mesh):
            return task.instances
    found = [instance for instance in task.instances if instance.sop_instance_uid in named]
    return found or task.instances


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
