"""A series on its way to an engine by C-STORE: as it is stored, or under the UIDs of one job.

What is pseudonymised passes through files without a name, a few at a time: a crash leaves none behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from dicom_node.engines.outgoing import write_outgoing
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import StorageError
from dicom_node.interfaces import Heartbeat, Sender
from dicom_node.model import Destination, StoredInstance

__all__ = ["Refusals", "send_all"]

BATCH = 64  # files open at a time
BATCH_BYTES = 256 * 1024**2
_META_END = 144  # of a Part-10 file: preamble, prefix and group length element; its value stands in the last 4 bytes

Refusals = list[tuple[int | None, str]]


def send_all(
    sender: Sender,
    destination: Destination,
    instances: Sequence[StoredInstance],
    pseudonyms: Pseudonyms | None,
    heartbeat: Heartbeat,
) -> tuple[int, Refusals]:
    """C-STORE all of them, in order. Bytes of the data sets that were sent; status and reason of what was refused.

    Raises DeliveryUnavailable, DeliveryRefused, EngineRejected (an image may not leave), StorageError, and what
    `heartbeat` raises.
    """
    sent_bytes, refusals = 0, Refusals()

    def on_result(instance: StoredInstance, status: int | None, error: str) -> None:
        nonlocal sent_bytes
        if error:
            refusals.append((status, error))
        else:
            sent_bytes += instance.data_set_length

    if pseudonyms is None:
        sender.send(destination, instances, on_result, heartbeat)
        return sent_bytes, refusals
    for batch in _batches(instances):
        with _leaving(batch, pseudonyms, heartbeat) as leaving:
            sender.send(destination, leaving, on_result, heartbeat)
    return sent_bytes, refusals


def _batches(instances: Sequence[StoredInstance]) -> Iterator[list[StoredInstance]]:
    batch: list[StoredInstance] = []
    size = 0
    for instance in instances:
        if batch and (len(batch) >= BATCH or size + instance.data_set_length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(instance)
        size += instance.data_set_length
    if batch:
        yield batch


@contextmanager
def _leaving(
    batch: Sequence[StoredInstance], pseudonyms: Pseudonyms, heartbeat: Callable[[], None]
) -> Iterator[list[StoredInstance]]:
    """The batch as it leaves, in nameless files that are there for as long as the block."""
    with ExitStack() as stack:
        leaving = []
        for instance in batch:
            try:
                file = stack.enter_context(tempfile.TemporaryFile())
                sent = write_outgoing(instance, file, pseudonyms, heartbeat=heartbeat)
                file.flush()
                head = os.pread(file.fileno(), _META_END, 0)
            except OSError as exc:
                raise StorageError(f"what leaves could not be written ({exc.strerror})") from exc
            offset = _META_END + int.from_bytes(head[-4:], "little")
            leaving.append(
                replace(
                    instance,
                    sop_instance_uid=sent.sop_instance_uid,
                    study_instance_uid=pseudonyms.uid(instance.study_instance_uid),
                    series_instance_uid=pseudonyms.uid(instance.series_instance_uid),
                    transfer_syntax_uid=sent.transfer_syntax_uid,
                    # a process that decodes for this one opens it by the same path
                    path=f"/proc/{os.getpid()}/fd/{file.fileno()}",
                    data_set_offset=offset,
                    data_set_length=sent.length - offset,
                    sha256="",
                )
            )
        yield leaving
