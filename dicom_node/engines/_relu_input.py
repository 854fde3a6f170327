"""A series as the Engine API takes it: one multi-frame DICOM file as it is, or a zip of one file for each slice.

The zip is made the same way each time, byte for byte: names count from 1, times are the epoch of the format, nothing
is compressed (CT pixels hardly are, and a slow node would rather send).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dicom_node.engines.keys import node_secret
from dicom_node.engines.outgoing import Sent, read_header, write_outgoing
from dicom_node.engines.privacy import Pseudonyms, why_not
from dicom_node.errors import EngineRejected, StorageError
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import EngineTask, Sending, StoredInstance
from dicom_node.pixels import read_image, series_geometry

__all__ = ["Images", "Packed", "extension_of", "pack"]

Beat = Callable[[], None]

_EPOCH = (1980, 1, 1, 0, 0, 0)
_NEAR_ZIP64 = (1 << 31) - (1 << 28)


def extension_of(instances: Sequence[StoredInstance]) -> str:
    """Of the file that `pack` writes."""
    return ".dcm" if len(instances) == 1 else ".zip"


def pack(
    instances: Sequence[StoredInstance],
    target: BinaryIO,
    pseudonyms: Pseudonyms | None,
    heartbeat: Beat,
) -> bool:
    """Write the images, in this order; whether any of them names the patient. Raises as `outgoing.write_outgoing`."""
    if len(instances) == 1:
        return write_outgoing(instances[0], target, pseudonyms, heartbeat=heartbeat).identifiable
    identifiable = False
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for number, instance in enumerate(instances, start=1):
            info = zipfile.ZipInfo(f"{number:05d}.dcm", _EPOCH)
            info.external_attr = 0o600 << 16
            large = instance.data_set_length > _NEAR_ZIP64
            with archive.open(info, "w", force_zip64=large) as member:
                sent: Sent = write_outgoing(instance, cast("BinaryIO", member), pseudonyms, heartbeat=heartbeat)
            identifiable = identifiable or sent.identifiable
    return identifiable


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A series as it leaves."""

    path: Path
    extension: str
    sending: Sending


class Images:
    """The images of tasks, as engine `name` at `host` gets them; `hide`: without identification. Thread-safe."""

    def __init__(self, name: str, host: str, *, hide: bool, data_dir: Path | None) -> None:
        self._name, self._host, self._hide = name, host, hide
        self._data_dir = data_dir
        self._guard = threading.Lock()
        self._secret = b""

    @staticmethod
    def geometry(task: EngineTask, beat: Beat) -> VolumeGeometry:
        """Where they lie. Raises SeriesRejected when they are no regular stack of slices."""
        images = []
        for instance in task.instances:
            images.append(read_image(instance))
            beat()
        return series_geometry(images)

    def fit(self, task: EngineTask, beat: Beat) -> list[StoredInstance]:
        """The images that make up the volume, in the order of its slices. Raises SeriesRejected, EngineRejected."""
        geometry = self.geometry(task, beat)
        by_uid = {instance.sop_instance_uid: instance for instance in task.instances}
        used = [by_uid[uid] for uid in dict.fromkeys(geometry.sop_instance_uids)]
        for instance in used:
            if reason := why_not(read_header(instance), hide=self._hide):
                raise EngineRejected(reason)
            beat()
        return used

    def packed(self, task: EngineTask, instances: Sequence[StoredInstance], path: Path, beat: Beat) -> Packed:
        """Written to `path`. Raises EngineRejected, StorageError."""
        pseudonyms = self.pseudonyms(task)
        try:
            with path.open("wb") as target:
                identifiable = pack(instances, target, pseudonyms, beat)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
        except OSError as exc:
            raise StorageError(f"images for engine {self._name} cannot be written: {exc.strerror}") from exc
        sending = self.sending(instances, identifiable, size, digest)
        return Packed(path=path, extension=extension_of(instances), sending=sending)

    def sending(self, instances: Sequence[StoredInstance], identifiable: bool, size: int, digest: str) -> Sending:
        """What is recorded of their leaving."""
        return Sending(
            what="DICOM instances",
            host=self._host,
            objects=len(instances),
            identifiable=identifiable,
            bytes=size,
            sha256=digest,
        )

    def pseudonyms(self, task: EngineTask) -> Pseudonyms | None:
        """None when they may leave as they are."""
        if not self._hide:
            return None
        with self._guard:
            if not self._secret:
                self._secret = secrets.token_bytes(32) if self._data_dir is None else node_secret(self._data_dir)
        return Pseudonyms(str(task.job_id) if task.job_id else f"by hand {uuid.uuid4()}", self._secret)
