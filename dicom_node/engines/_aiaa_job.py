"""One series at a Clara Train AIAA server: what is sent of it, in which session, and what its answer is worth."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicom_node.engines._aiaa_crop import boxed
from dicom_node.engines._aiaa_options import INTERACTIVE, AiaaOptions, Api
from dicom_node.engines._aiaa_outlines import Outlines
from dicom_node.engines._aiaa_parts import Reply
from dicom_node.engines._aiaa_points import Points
from dicom_node.engines._aiaa_server import LOST, AiaaServer, Asked, Model, Session
from dicom_node.engines._stacks import Budget, Stack
from dicom_node.engines._tally import measured
from dicom_node.engines.grids import GeometryMismatch
from dicom_node.engines.labels import names_by_value
from dicom_node.engines.masks import from_label_map, read_volume
from dicom_node.engines.nifti import write_nifti
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.raw_values import only_text
from dicom_node.errors import (
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    LeaseLost,
    NodeError,
    StorageError,
)
from dicom_node.model import EngineTask, Sending
from dicom_node.pixels import read_volume as read_pixels
from dicom_node.values import LabelVolume, ResultValue

__all__ = ["VolumeJob", "kept_if_unfit"]

log = logging.getLogger(__name__)

FILE = "volume.nii.gz"  # what the server sees: nothing of the patient
MIN_EXTREME_POINTS = 6


@contextmanager
def kept_if_unfit(task: EngineTask, answer: Path) -> Iterator[None]:
    """A file that does not fit is kept for a person to look at, and the error names it."""
    try:
        yield
    except (EngineTimeout, EngineUnavailable):
        raise
    except EngineError as exc:
        name = task.quarantine(answer, str(exc)) if answer.is_file() else ""
        raise type(exc)(f"{exc}; the file is in the quarantine as {name}" if name else str(exc)) from exc


class VolumeJob:
    """The work on one series; `folder` is its own and goes when it is done."""

    def __init__(
        self,
        server: AiaaServer,
        options: AiaaOptions,
        task: EngineTask,
        budget: Budget,
        *,
        stack: Stack,
        model: Model,
        api: Api,
        points: Points | None,
        folder: Path,
        host: str,
    ) -> None:
        self._server, self._options, self._task, self._budget = server, options, task, budget
        self._stack, self._model, self._api, self._points = stack, model, api, points
        self._folder = folder
        self._file = folder / FILE
        self._sending = Sending(what="volume", host=host, objects=1, identifiable=stack.identifiable)
        self._session: Session | None = None
        is_ct = {"CT"} == set(task.header.values.get("Modality", ()))
        self._hounsfield = options.values == "hu" or (options.values == "auto" and is_ct)
        self._voxels: npt.NDArray[Any] = np.empty(0)
        self._sent_shape = stack.geometry.shape

    # --- out

    def prepare(self) -> None:
        """Read the voxels and write them as a file. Raises SeriesRejected, StorageError."""
        values: Literal["hu", "any"] = "hu" if self._hounsfield else "any"
        beat, geometry = self._budget.beat, self._stack.geometry
        voxels = read_pixels(self._stack.images, geometry, values=values, heartbeat=beat)
        self._voxels = voxels
        if self._options.session == "dicom":
            return
        if self._api == "dextr3d" and self._options.crop and self._options.session == "none" and self._points:
            self._enough(self._points)
            box = boxed(
                voxels,
                geometry,
                self._points.foreground,
                margin_mm=self._model.margin_mm,
                sides=self._model.sides,
                beat=beat,
            )
            voxels, geometry = box.voxels, box.geometry
            self._points, self._sent_shape = replace(self._points, foreground=box.points), geometry.shape
        try:
            write_nifti(voxels, geometry, self._file, heartbeat=beat)
            with self._file.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._sending = replace(self._sending, bytes=self._file.stat().st_size, sha256=digest)
        except OSError as exc:
            raise StorageError(f"a volume for an AIAA server cannot be written: {exc.strerror}") from exc

    def params(self) -> Mapping[str, Any]:
        """Those of the inference. Raises EngineRejected for too few points."""
        params: dict[str, Any] = dict(self._options.params)
        if self._points is None:
            return params
        foreground = [list(voxel) for voxel in self._points.foreground]
        if self._api == "dextr3d":
            self._enough(self._points)
            return {**params, "points": self._spelled(foreground)}
        background = [list(voxel) for voxel in self._points.background]
        params |= {"foreground": self._spelled(foreground), "background": self._spelled(background)}
        if self._options.current_point:
            params["current_point"] = self._spelled(foreground[-1])
        return params

    @staticmethod
    def _enough(points: Points) -> None:
        count = len(points.foreground)
        if count < MIN_EXTREME_POINTS:
            raise EngineRejected(
                f"{count} extreme points, dextr3d needs at least {MIN_EXTREME_POINTS}: two for each axis"
            )

    def _spelled(self, points: Sequence[Any]) -> Any:
        return json.dumps(points) if self._options.points_are_text else points

    def ask(self) -> Reply:
        """The answer to the inference, by a session if one is to be used.

        Raises as `AiaaServer.ask`, and what the functions of the task raise.
        """
        answer = self._folder / "answer"
        asked = Asked(api=self._api, model=self._model.name, params=self.params(), output=self._options.asked_output)
        if self._options.session == "none":
            sent = replace(asked, file=self._file, filename=FILE, content_type="application/x-gzip")
            with self._task.record(self._sending):
                return self._server.ask(sent, answer, self._budget.beat, self._budget.left_s())
        return self._ask_session(asked, answer)

    # --- sessions

    def _ask_session(self, asked: Asked, answer: Path) -> Reply:
        held = Session.of(self._task.note)
        if held is None or held.digest != self._digest():
            held = self._put()
        self._session = held
        try:
            return self._ask_in(held, asked, answer)
        except EngineError as exc:
            if not self._is_over(exc, held):
                raise
            log.info("a session was over and is made anew", extra={"job": self._task.job_id})
        held = self._session = self._put()
        try:
            return self._ask_in(held, asked, answer)
        except EngineError as exc:
            if exc.http_status != 440:
                raise
            raise EngineError(
                "the server forgot a new session at once: it ends them before an inference is done; give them longer "
                "with options.session_expiry_s"
            ) from exc

    def _ask_in(self, held: Session, asked: Asked, answer: Path) -> Reply:
        sending = replace(
            self._sending, what="request", objects=0, bytes=None, sha256="", identifiable=False, remote_id=held.id
        )
        with self._task.record(sending):
            return self._server.ask(replace(asked, session=held.id), answer, self._budget.beat, self._budget.left_s())

    def _is_over(self, exc: EngineError, held: Session) -> bool:
        """Whether `exc` is for a session the server knows no more; what it says of an unknown one is not certain."""
        if exc.http_status == 440:
            return True
        if exc.http_status in LOST or isinstance(exc, EngineCrashed):
            return not self._server.knows(held, self._budget.beat)
        return False

    def _digest(self) -> str:
        if self._options.session == "dicom":
            uids = sorted(instance.sop_instance_uid for instance in self._task.instances)
            return hashlib.sha256("\n".join(uids).encode()).hexdigest()
        return self._sending.sha256

    def _put(self) -> Session:
        """The volume as a session, remembered with the job: a retry needs not send it again.

        A crash in between leaves one behind that nobody knows; it ends by itself and computes nothing.
        """
        if self._options.session == "dicom":
            count = len(self._task.instances)
            sending = replace(self._sending, what="series by C-GET", objects=count, identifiable=True)
        else:
            sending = self._sending
        with self._task.record(sending) as tell:
            left_s = self._budget.left_s()
            if self._options.session == "dicom":
                held = self._server.fetch_session(self._where(), self._digest(), self._budget.beat, left_s)
            else:
                held = self._server.put_session(self._file, FILE, self._digest(), self._budget.beat, left_s)
            tell(replace(sending, remote_id=held.id))
        self._task.remember(held.note)
        return held

    def _where(self) -> Mapping[str, Any]:
        """Where the server finds the series: this node, and whose it is. Raises EngineRejected."""
        assert self._options.dicom is not None
        patient_id = only_text(read_header(self._task.instances[0]), "PatientID")
        if not patient_id:
            raise EngineRejected("the images have no Patient ID the server could ask for: it is empty or not ASCII")
        return {
            **self._options.dicom.model_dump(),
            "patient_id": patient_id,
            "study_uid": self._task.study_instance_uid,
            "series_uid": self._task.series_instance_uid,
        }

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Ends the session with the job, unless the job is to be tried again or belongs to another worker."""
        try:
            yield
        except NodeError as exc:
            if not exc.retryable and not isinstance(exc, LeaseLost):
                self._end()
            raise
        self._end()

    def _end(self) -> None:
        """What cannot be ended ends by itself."""
        held = self._session or Session.of(self._task.note)
        if held is None:
            return
        try:
            self._server.end_session(held)
        except NodeError:
            log.info("a session could not be ended", extra={"job": self._task.job_id})

    # --- back

    def labels(self, reply: Reply) -> tuple[ResultValue, ...]:
        """The mask of an answer on the images, and what is measured on it.

        Raises GeometryMismatch and other EngineErrors for one that does not fit; the file is then in the quarantine.
        """
        if reply.file is None:
            raise EngineError(
                "the server answered with parameters and no mask; options.findings says what of them are findings"
            )
        with kept_if_unfit(self._task, reply.file):
            volume = self._painted(reply.file, reply.params)
            if self._options.polygons is not None:
                outlines = Outlines(
                    self._server,
                    self._options.polygons,
                    self._task,
                    self._budget,
                    folder=self._folder,
                    geometry=self._stack.geometry,
                    voxels=self._voxels,
                    sending=self._sending,
                )
                volume = outlines.painted(volume)
        if self._points is not None:
            volume = replace(volume, notes=(*volume.notes, self._points.note))
        measurements = measured(
            volume, self._voxels, self._stack.geometry, hounsfield=self._hounsfield, heartbeat=self._budget.beat
        )
        return volume, measurements

    def _painted(self, file: Path, params: Mapping[str, Any]) -> LabelVolume:
        returned = read_volume(file, heartbeat=self._budget.beat)
        cropped = params.get("crop") is not None and sorted(returned.array.shape) != sorted(self._sent_shape)
        if cropped and self._api in INTERACTIVE:
            raise GeometryMismatch("the answer is of a part of the images (crop) and its place cannot be trusted")
        # what the file says of itself comes before what the server says of its models
        return from_label_map(
            returned,
            self._stack.geometry,
            names={**names_by_value(self._model.labels), **returned.names},
            table=self._options.labels,
            heartbeat=self._budget.beat,
        )
