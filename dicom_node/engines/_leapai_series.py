"""The images of one series at LeapAI: asked about together or one by one, every one of them accounted for.

In bulk the engine says nothing of images it failed on; it leaves them out. So what it wrote is looked for image by
image, and what is missing is asked about alone. An image that fails alone too is told as not analysed beside the
results of the others; only where none has a result does the job fail.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.engines import _leapai_answers as answers
from dicom_node.engines import _leapai_pictures as pictures
from dicom_node.engines._http import Answer
from dicom_node.engines._leapai_client import LeapAiClient
from dicom_node.engines._leapai_folder import SharedFolder
from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.engines.outgoing import Sent
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import EngineCrashed, EngineError, EngineRejected, EngineTimeout
from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask, Sending, StoredInstance

__all__ = ["Answered", "Asked", "Image", "LeapAiSeries"]

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 1 << 20
MAX_KEPT_BYTES = 512 * 1024**2  # of pictures and documents of one series, in memory until they are encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image the engine may see: its file's name, and, where the engine is to write about it alone, its folder."""

    instance: StoredInstance
    pseudonyms: Pseudonyms
    name: str
    folder: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the engine said of one image."""

    prediction: answers.Prediction
    heatmap: npt.NDArray[np.uint8] | None = None
    pdf: bytes = b""
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Asked:
    """What it said of each by its own SOP Instance UID, why some are missing, and what is to be said of all."""

    images: dict[str, Answered] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class LeapAiSeries:
    """One run. `left_s` says how much time it has left; `hide`: whether the engine must not see who the patient is."""

    def __init__(
        self,
        name: str,
        options: LeapAiOptions,
        *,
        client: LeapAiClient,
        folder: SharedFolder,
        hide: bool,
        task: EngineTask,
        heartbeat: Heartbeat,
        left_s: Callable[[], float],
    ) -> None:
        self._name, self._options = name, options
        self._client, self._folder = client, folder
        self._hide, self._task = hide, task
        self._heartbeat, self._left_s = heartbeat, left_s
        self._kept = 0

    def asked(self, images: Sequence[Image], together: str) -> Asked:
        """Ask about all of them, `together` in a job folder of that name when there is one.

        Raises as `leapai.LeapAiEngine.run`; an EngineCrashed only when it is the first try of an image alone, or no
        image has a result.
        """
        told = Asked()
        if together:
            self._bulk(images, together, told)
        crashed: list[EngineCrashed] = []
        for image in images:
            if image.instance.sop_instance_uid in told.images:
                continue
            try:
                told.images[image.instance.sop_instance_uid] = self._alone(image)
            except EngineRejected as exc:
                told.refusals.append(exc.reason)
            except EngineCrashed as exc:
                if not together and not self._task.strikes:
                    raise  # it may have been the engine's bad moment; the next try knows better
                crashed.append(exc)
        if crashed and not told.images:
            raise crashed[0]
        told.refusals += ["the engine failed on it, more than once"] * len(crashed)
        told.images = {uid: told.images[uid] for uid in sorted(told.images)}
        return told

    # --- together

    def _bulk(self, images: Sequence[Image], job: str, told: Asked) -> None:
        try:
            with ExitStack() as stack:
                stack.enter_context(self._folder.job_folder(job))
                sent = self._put(images, job, stack)
                remark = self._ask_bulk(job) if sent else ""
                for image in images:
                    if (about := sent.get(image.name)) is not None:
                        self._look(image, job, about, told)
        except EngineCrashed:
            told.notes.append("the engine failed on the images together; each was asked about alone")
            log.warning("a bulk inference failed", extra={"engine": self._name, "job": self._task.job_id})
            return
        if remark:
            told.notes.append(remark)
        if silent := sum(image.name in sent and image.instance.sop_instance_uid not in told.images for image in images):
            told.notes.append(f"of {len(sent)} images together the engine left {silent} out: asked about alone")
            fields = {"engine": self._name, "job": self._task.job_id, "left_out": silent, "images": len(sent)}
            log.warning("a bulk inference left images out", extra=fields)

    def _put(self, images: Sequence[Image], job: str, stack: ExitStack) -> Mapping[str, Sent]:
        """Write them to the job folder, each recorded until `stack` ends. One that cannot be is asked about alone."""
        sent: dict[str, Sent] = {}
        for image in images:
            try:
                with ExitStack() as one:
                    sending = self._sending(identifiable=False)
                    tell = one.enter_context(self._task.record(sending))
                    about = self._folder.put(job, image.instance, image.name, image.pseudonyms, self._heartbeat)
                    tell(replace(sending, bytes=about.length, sha256=about.sha256))
                    stack.push(one.pop_all())
                sent[image.name] = about
            except EngineRejected:  # it says why when it is asked about alone
                continue
        return sent

    def _ask_bulk(self, job: str) -> str:
        request = {
            "input_folder_path": self._folder.input_there(job),
            "output_folder_path": self._folder.output_there(job),
        }
        # never repeated by the client: two would write into one folder, and half of a file would be read
        return self._client.ask(
            "/bulk_inference",
            request,
            lambda answer: answers.bulk_taken(self._name, answer.status, answer.body),
            timeout_s=self._left(),
            heartbeat=self._heartbeat,
            idempotent=False,
        )

    def _look(self, image: Image, job: str, sent: Sent, told: Asked) -> None:
        """Take what it wrote about one image; nothing, and nothing that could be read, leaves it to be asked alone."""
        self._heartbeat()
        written = self._folder.written(job, image.pseudonyms.patient_id, "predictions.json", MAX_JSON_BYTES)
        if written is None:
            return
        try:
            uid = sent.sop_instance_uid
            prediction = answers.prediction_on_disk(self._name, written, sop_instance_uid=uid)
        except EngineError as exc:
            log.warning("a prediction on disk makes no sense", extra={"engine": self._name, "error": str(exc)})
            return
        told.images[image.instance.sop_instance_uid] = self._completed(image, prediction, job)

    # --- alone

    def _alone(self, image: Image) -> Answered:
        sending = self._sending(identifiable=not self._hide)
        pseudonyms = image.pseudonyms if self._hide else None
        request: dict[str, Any] = {
            "input_image_path": self._folder.path_there(image.name),
            "save_to_disk": bool(image.folder),
            "patient_id": image.pseudonyms.patient_id,
        }
        with ExitStack() as stack:
            tell = stack.enter_context(self._task.record(sending))
            if image.folder:
                stack.enter_context(self._folder.job_folder(image.folder))
                request["output_folder_path"] = self._folder.output_there(image.folder)
            handed_over = self._folder.handed_over(image.instance, image.name, pseudonyms, self._heartbeat)
            sent = stack.enter_context(handed_over)
            tell(replace(sending, bytes=sent.length, sha256=sent.sha256, identifiable=sent.identifiable))

            def read(answer: Answer) -> answers.Prediction:
                uid = sent.sop_instance_uid
                return answers.prediction_of(self._name, answer.status, answer.body, sop_instance_uid=uid)

            prediction = self._client.ask(
                "/single_inference", request, read, timeout_s=self._left(), heartbeat=self._heartbeat
            )
            return self._completed(image, prediction, image.folder)

    def _sending(self, *, identifiable: bool) -> Sending:
        return Sending(what="DICOM instance", host=self._client.host, objects=1, identifiable=identifiable)

    def _left(self) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise EngineTimeout(f"engine {self._name}: the images of the series took longer than they may")
        return left_s

    # --- pictures and documents

    def _completed(self, image: Image, prediction: answers.Prediction, job: str) -> Answered:
        """With what it drew and wrote: from the job folder where there is one, else from the answer. What is unfit is
        left out, said, and kept for a person; the findings stand without it.
        """
        notes: list[str] = []
        heatmap = pdf = None
        if self._options.heatmap != "none":
            heatmap = self._taken(lambda kept: self._heatmap(image, prediction, job, kept), "heatmap", notes)
        if self._options.report and job:
            pdf = self._taken(lambda kept: self._report(image, job, kept), "report", notes)
        bare = replace(prediction, heatmap=None)  # its base64 is not needed any more
        return Answered(prediction=bare, heatmap=heatmap, pdf=pdf or b"", notes=tuple(notes))

    def _taken(self, take: Callable[[list[bytes]], Any], what: str, notes: list[str]) -> Any:
        kept: list[bytes] = []
        try:
            return take(kept)
        except pictures.Unfit as exc:
            notes.append(f"the engine's {what} is left out: {exc}")
            name = self._quarantined(kept[0], str(exc)) if kept else ""
            fields = {"engine": self._name, "job": self._task.job_id, "what": what, "why": str(exc)}
            log.warning("what an engine drew is left out", extra=fields | {"quarantined": name})
            return None

    def _heatmap(
        self, image: Image, prediction: answers.Prediction, job: str, kept: list[bytes]
    ) -> npt.NDArray[np.uint8] | None:
        if job:
            png = self._folder.written(job, image.pseudonyms.patient_id, "heatmap.png", pictures.MAX_PNG_BYTES)
        else:
            png = pictures.png_of(prediction.heatmap) if prediction.heatmap else None
        if not png:
            return None
        kept.append(png)
        pixels = pictures.picture_of(png)
        if self._options.heatmap == "same-shape" and not pictures.same_shape(pixels, image.rows, image.columns):
            shown = f"{pixels.shape[1]} x {pixels.shape[0]}, the image {image.columns} x {image.rows}"
            raise pictures.Unfit(f"it has other proportions than the image ({shown})")
        self._count(pixels.nbytes)
        return pixels

    def _report(self, image: Image, job: str, kept: list[bytes]) -> bytes:
        pdf = self._folder.written(job, image.pseudonyms.patient_id, "report.pdf", pictures.MAX_PDF_BYTES)
        if pdf is None:
            raise pictures.Unfit("the engine wrote none, or one that is too long or may not be read")
        kept.append(pdf)
        self._count(len(pdf))
        return pictures.pdf_of(pdf)

    def _count(self, size: int) -> None:
        if self._kept + size > MAX_KEPT_BYTES:
            raise pictures.Unfit(f"the series has more than {MAX_KEPT_BYTES >> 20} MiB of pictures and reports")
        self._kept += size

    def _quarantined(self, content: bytes, reason: str) -> str:
        with tempfile.TemporaryDirectory(prefix="dicom-node-leapai-") as folder:
            path = Path(folder) / "returned"
            path.write_bytes(content)
            return self._task.quarantine(path, reason)
