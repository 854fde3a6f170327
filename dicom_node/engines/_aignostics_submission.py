"""A slide on its way to the Aignostics Platform: laid out, submitted once, looked for where an answer was lost.

Each step is noted before it is made and may be made again: see `aignostics`.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from dicom_node.engines._aignostics_metadata import Facts, media_types, metadata_of
from dicom_node.engines._aignostics_options import PlatformOptions
from dicom_node.engines._aignostics_platform import Platform
from dicom_node.engines._aignostics_told import Input, Note, Version
from dicom_node.engines._http import crc32c_base64
from dicom_node.engines.handed_out import PIECE, Shelf
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.engines.signed_urls import Signer
from dicom_node.engines.slides import DICOM, ZIP, Slide, read_slide, write_slide
from dicom_node.errors import ConfigError, EngineError, EngineRejected, EngineUnavailable, SeriesRejected
from dicom_node.interfaces import Clock, Heartbeat
from dicom_node.model import EngineTask, Sending
from dicom_node.values import Pending

__all__ = ["Submission"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """How one engine submits. `host` is the platform's; `links` the shelf and the signer, raises ConfigError;
    `remember` makes a note durable; `accepted` hears that one was taken.
    """

    name: str
    application: str
    options: PlatformOptions
    platform: Platform
    host: str
    hide: bool
    clock: Clock
    links: Callable[[], tuple[Shelf, Signer]]
    node_secret: Callable[[], bytes]
    remember: Callable[[EngineTask, Note], Note]
    accepted: Callable[[], None]

    def laid_out(self, task: EngineTask, token: str, heartbeat: Heartbeat) -> Note:
        """The slide on the shelf, and noted. What would keep it from being submitted is found before it is written."""
        slide = read_slide(task.instances, hide=self.hide, heartbeat=heartbeat)
        bytes_there = sum(instance.data_set_length for instance in slide.instances)
        if bytes_there > self.options.max_slide_bytes:
            raise SeriesRejected(f"the slide has {bytes_there} bytes, more than options.max_slide_bytes")
        version = self.platform.version(self.application, self.options.version, heartbeat)
        schema = self.input_of(version).metadata_schema
        kind = self._media_type(slide, media_types(schema, self.options))
        crc = crc32c_base64(())
        tried = Note.about(
            slide,
            token=token,
            object_id="",
            media_type=kind,
            crc32c=crc,
            length=0,
            sha256="",
            objects=0,
            identifiable=not self.hide,
        )
        metadata_of(schema, self._facts(tried), self.options, self.name)
        tried = self.remember(task, tried)  # first, so that what a crash leaves on the shelf is found again
        return self.remember(task, self._written(task, slide, tried, heartbeat))

    def _written(self, task: EngineTask, slide: Slide, note: Note, heartbeat: Heartbeat) -> Note:
        shelf, _ = self.links()
        shelf.revoke(note.shelf_job)
        key = str(task.job_id) if task.job_id else f"by hand {note.token}"
        pseudonyms = Pseudonyms(key, self.node_secret()) if self.hide else None
        object_id, objects = shelf.put(
            note.shelf_job,
            ".dcm" if note.media_type == DICOM else ".zip",
            lambda file: write_slide(slide, file, pseudonyms, media_type=note.media_type, heartbeat=heartbeat),
        )
        digest, length = hashlib.sha256(), 0

        def pieces() -> Iterator[bytes]:
            nonlocal length
            file = shelf.open(note.shelf_job, object_id)
            if file is None:
                raise EngineUnavailable(f"engine {self.name}: the slide was taken off the shelf meanwhile")
            with file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    length += len(piece)
                    heartbeat()
                    yield piece

        crc = crc32c_base64(pieces())
        return replace(note, object_id=object_id, objects=objects, crc32c=crc, length=length, sha256=digest.hexdigest())

    def submitted(self, task: EngineTask, note: Note, heartbeat: Heartbeat) -> Pending:
        """POST /runs, at most once without a look at the platform's runs."""
        shelf, _ = self.links()
        laid = shelf.open(note.shelf_job, note.object_id)
        if laid is None:  # the data folder was restored, or somebody cleared it: nothing was submitted, so anew
            note = self.laid_out(task, note.token, heartbeat)
        else:
            laid.close()
        version = self.platform.version(self.application, self.options.version, heartbeat)
        request = self._request(note, version)
        note = self.remember(task, replace(note, asked_at=int(self.clock.wall().timestamp()), looked_up=0))
        sending = Sending(
            what="slide, by URL",
            host=self.host,
            objects=note.objects,
            identifiable=note.identifiable,
            bytes=note.length,
            sha256=note.sha256,
        )
        try:
            with task.record(sending) as tell:
                run_id = self.platform.submit(request, heartbeat)
                tell(replace(sending, remote_id=run_id))
        except EngineError as exc:
            if exc.maybe_taken:
                log.warning(
                    "an answer was lost: the run is looked for", extra={"engine": self.name, "job": task.job_id}
                )
                return Pending(handle=note.handle, poll_after_s=self.options.look_up_s)
            if not isinstance(exc, EngineRejected):
                self.remember(task, replace(note, asked_at=0))  # not taken, for sure
            raise
        self.accepted()
        note = self.remember(task, replace(note, run_id=run_id))
        return Pending(handle=note.handle, poll_after_s=self.options.poll_s)

    def looked_up(self, task: EngineTask, note: Note, heartbeat: Heartbeat) -> Pending:
        """Something may have been submitted and no answer came."""
        wait_s = note.asked_at + self.options.look_up_s * (note.looked_up + 1) - self.clock.wall().timestamp()
        if wait_s > 0:
            return Pending(handle=note.handle, poll_after_s=min(wait_s, self.options.look_up_s))
        run_id = self.platform.find(self.application, note.token, heartbeat)
        if run_id:
            note = self.remember(task, replace(note, run_id=run_id))
            return Pending(handle=note.handle, poll_after_s=self.options.poll_s)
        note = replace(note, looked_up=note.looked_up + 1)
        if note.looked_up >= self.options.look_ups:
            return self.submitted(task, note, heartbeat)
        self.remember(task, note)
        return Pending(handle=note.handle, poll_after_s=self.options.look_up_s)

    def _request(self, note: Note, version: Version) -> dict[str, Any]:
        _, signer = self.links()
        taken = self.input_of(version)
        metadata = metadata_of(taken.metadata_schema, self._facts(note), self.options, self.name)
        url = signer.url(note.shelf_job, note.object_id, lifetime_s=self.options.link_days * 86400.0)
        item = {
            "external_id": note.external_id,
            "input_artifacts": [{"name": taken.name, "download_url": url, "metadata": metadata}],
        }
        request: dict[str, Any] = {
            "application_id": self.application,
            "version_number": self.options.version,
            "custom_metadata": {"node_job": note.token},
            "items": [item],
        }
        hours = {"due_date": self.options.due_hours, "deadline": self.options.deadline_hours}
        now = self.clock.wall().replace(microsecond=0)
        scheduling = {
            key: (now + timedelta(hours=told)).isoformat().replace("+00:00", "Z")
            for key, told in hours.items()
            if told is not None
        }
        return request | ({"scheduling": scheduling} if scheduling else {})

    def input_of(self, version: Version) -> Input:
        """Raises ConfigError."""
        names = [one.name for one in version.input_artifacts]
        wanted = self.options.input_artifact
        chosen = [one for one in version.input_artifacts if one.name == wanted or not wanted]
        if len(chosen) != 1:
            raise ConfigError(
                f"engines.{self.name}.options.input_artifact: expected which of {', '.join(names) or 'no inputs'} "
                "the slide is"
            )
        return chosen[0]

    def _media_type(self, slide: Slide, taken: Sequence[str]) -> str:
        single = len(slide.base.instances) == 1
        if self.options.send != "auto":
            kind = DICOM if self.options.send == "dicom" else ZIP
        else:
            whole = len(slide.levels) == 1 and single
            order = (DICOM, ZIP) if whole or (ZIP not in taken and single) else (ZIP,)
            kind = next((one for one in order if one in taken), order[0])
        if kind not in taken:
            raise SeriesRejected(f"this version of the application does not take slides as {kind}")
        return kind

    def _facts(self, note: Note) -> Facts:
        checksum = note.crc32c
        if self.options.checksum == "hex":
            checksum = base64.b64decode(checksum).hex()
        return Facts(
            width=note.columns,
            height=note.rows,
            mpp=note.mpp,
            media_type=note.media_type,
            checksum=checksum,
            stain=note.stain,
        )
