"""LeapAI CXR v1 as an engine: chest radiographs given to it in a shared folder, findings told over HTTP.

The engine reads images by path on its own machine, so node and engine share a folder that each knows under its own
name. Images are written there under names of the job, asked about, one by one or all at once, and removed again
whatever happens; what a crash left is removed by the next try or by `cancel_noted`. The engine writes to disk only
where its answer has no other way (bulk, report), and then into a folder of the job's own in the same place, which goes
too. An inference changes nothing there, so repeating it does no harm.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicom_node import anatomy
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings
from dicom_node.engines import _leapai_answers as answers
from dicom_node.engines._http import Observer, parse_options
from dicom_node.engines._leapai_client import LeapAiClient
from dicom_node.engines._leapai_folder import SharedFolder, new_job_folder
from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.engines._leapai_series import Asked, Image, LeapAiSeries
from dicom_node.engines.keys import node_secret
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import Pseudonyms, must_hide, why_not
from dicom_node.errors import EngineRejected, EngineUnavailable, SeriesRejected
from dicom_node.interfaces import Clock, Heartbeat
from dicom_node.model import EngineTask, StoredInstance
from dicom_node.pixels import read_image
from dicom_node.values import Document, EngineResult, Picture, Provenance, ResultValue

__all__ = ["LeapAiEngine", "LeapAiOptions"]

MAX_IMAGES = 64  # of one series; more is no radiography
# PS3.4 table B.5-1: Computed Radiography, and Digital X-Ray for presentation: what is meant to be looked at
_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"})
_VIEWED = ("ViewPosition", "ViewCodeSequence")
_INTERFACE = "LeapAI CXR v1"


class LeapAiEngine:
    """Findings on frontal chest radiographs, each image of the series on its own, with the engine's heatmap of each.

    Construction validates the options (ConfigError, naming engines.NAME.options.KEY) and does nothing else.
    `data_dir` is where the node's secret for pseudonyms lies; without it one is made for the life of the process,
    which changes nothing but the names of files after a restart. Other keyword arguments are ignored. Several series
    may be run at a time, from threads.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        data_dir: Path | None = None,
        clock: Clock | None = None,
        **node: Any,
    ) -> None:
        self.name = name
        self._options = parse_options(LeapAiOptions, name, settings.options)
        self._timeout_s = settings.timeout_s
        self._data_dir = data_dir
        self._clock: Clock = clock or SystemClock()
        self._client = LeapAiClient(name, self._options, self._clock)
        self._hide = must_hide(self._options, self._client.host)
        self._folder = SharedFolder(name, self._options)
        self._guard = threading.Lock()
        self._secret = b""

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment, '' when it can, as far as is known without asking it."""
        return self._client.trouble

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`, and `token_expires_seconds` when the token says."""
        return self._client.gauges()

    def observe(self, observer: Observer) -> None:
        """See `interfaces.Engine`."""
        self._client.observer = observer

    def check(self) -> None:
        """Raise ConfigError when the token is missing, the shared folder cannot be written or `verify` is unusable."""
        self._client.check()
        self._folder.check()

    def report(self) -> Sequence[tuple[str, str]]:
        """Ask it whether it is there and takes the token, see `interfaces.Engine`. Raises NodeError.

        The token is tried with a request that has no image, which the engine must refuse for that.
        """
        self._client.ping()
        self._client.probe()
        options = self._options
        at_once = "all images of a series at once" if options.bulk else "image by image"
        heatmaps = {"none": "no heatmap", "same-shape": "heatmaps of the image's proportions", "any-shape": "heatmaps"}
        return (
            ("reached", f"{self._client.host}: answers /ping and takes the token"),
            ("token", self._client.token_told()),
            ("connection", "TLS" if options.base_url.startswith("https") else "plain http: nothing is encrypted"),
            ("shared folder", f"{options.node_folder} here, {options.engine_folder} there"),
            ("what leaves", self._leaving()),
            ("asked", at_once),
            ("what comes back", f"findings, {heatmaps[options.heatmap]}{', PDF reports' if options.report else ''}"),
            ("findings", ", ".join(name for name, _ in answers.CONDITIONS.values())),
        )

    def _leaving(self) -> str:
        if self._hide or self._options.bulk:
            alone = "" if self._hide else "; what bulk leaves out, alone and with the patient's name"
            return f"pseudonymised images{alone}"
        return "images as they are, with the patient's name"

    # --- the work

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        """One `Findings` for every fit image, then pictures and documents. What of the series was left out, and why,
        is said in each of the findings.

        Raises EngineRejected with every reason when no image is fit or the engine takes none, EngineUnavailable (also
        for a token or a shared folder that is not to be had), EngineTimeout, EngineCrashed, EngineError, StorageError,
        and whatever `heartbeat`, `task.remember` and `task.record` raise.
        """
        began_s = self._clock.boot().seconds
        self._folder.remove(task.note)
        self._folder.sweep()
        fit, refusals = self._fit(task, heartbeat)
        series = LeapAiSeries(
            self.name,
            self._options,
            client=self._client,
            folder=self._folder,
            hide=self._hide,
            task=task,
            heartbeat=heartbeat,
            left_s=self._left(began_s + min(task.timeout_s, self._timeout_s)),
        )
        if fit:
            together = new_job_folder() if self._options.bulk else ""
            names = [name for image in fit for name in (image.name, image.folder) if name]
            noted = (*self._folder.left_over(task.note), *names, *([together] if together else ()))
            task.remember("\n".join(("images are handed over in the shared folder", *noted)))
            with self._client.remembering():
                told = series.asked(fit, together)
        else:
            told = Asked()
        refusals += told.refusals
        if not told.images:
            raise EngineRejected("; ".join(dict.fromkeys(refusals)) or "the series has no images")
        return EngineResult(
            values=self._values(told, refusals),
            provenance=self._provenance({one.prediction.model_version for one in told.images.values()}),
            stage_seconds={"forward": self._clock.boot().seconds - began_s},
        )

    def _left(self, deadline_s: float) -> Callable[[], float]:
        return lambda: deadline_s - self._clock.boot().seconds

    def cancel_noted(self, note: str) -> None:
        """Remove what a crash left in the shared folder for a job that ended. Raises EngineUnavailable."""
        self._folder.remove(note, must=True)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._client.close()

    # --- which images

    def _fit(self, task: EngineTask, heartbeat: Heartbeat) -> tuple[list[Image], list[str]]:
        if len(task.instances) > MAX_IMAGES:
            raise SeriesRejected(f"{len(task.instances)} images in one series of radiographs, at most {MAX_IMAGES}")
        key = str(task.job_id) if task.job_id else f"by hand {uuid.uuid4()}"
        fit, refusals = [], []
        for instance in sorted(task.instances, key=lambda one: one.sop_instance_uid):
            try:
                header = read_image(instance).header
                reason = self._unfit(instance, header)
            except EngineRejected as exc:
                reason = exc.reason
            if reason:
                refusals.append(reason)
            else:
                fit.append(self._image(key, instance, header))
            heartbeat()
        return fit, refusals

    def _image(self, key: str, instance: StoredInstance, header: Mapping[str, Any]) -> Image:
        """Each is another patient to the engine, which files what it writes by Patient ID."""
        pseudonyms = Pseudonyms(f"{key} {instance.sop_instance_uid}", self._node_secret())
        return Image(
            instance=instance,
            pseudonyms=pseudonyms,
            # never the image's own UID, whoever may see the patient: names of files are seen by more
            name=f"{pseudonyms.uid(instance.sop_instance_uid)}.dcm",
            folder=new_job_folder() if self._options.report else "",
            rows=int(header.get("Rows") or 0),
            columns=int(header.get("Columns") or 0),
        )

    def _unfit(self, instance: StoredInstance, header: Mapping[str, Any]) -> str:
        """Why the engine must not see this image, '' when it may. Raises EngineRejected when it cannot be read."""
        if instance.sop_class_uid not in _CLASSES:
            return "the image is no CR and no DX image for presentation"
        if header.get("PresentationIntentType") == "FOR PROCESSING":
            return "Presentation Intent Type is FOR PROCESSING: raw detector values"
        words = anatomy.views(lambda keyword: _value(header.get(keyword)) if keyword in _VIEWED else [])
        found = [word for word, where in words.items() if where == "ViewPosition"] or list(words)
        wanted = {view.upper() for view in self._options.views}
        if not found and self._options.view_missing == "refuse":
            return f"the view is not given, the engine takes {' or '.join(self._options.views)}"
        if not set(found) <= wanted:
            return f"the view is not {' or '.join(self._options.views)}"
        return why_not(read_header(instance), hide=self._hide)

    def _node_secret(self) -> bytes:
        with self._guard:
            if not self._secret:
                self._secret = secrets.token_bytes(32) if self._data_dir is None else node_secret(self._data_dir)
            return self._secret

    # --- what it said

    def _values(self, told: Asked, refusals: Sequence[str]) -> tuple[ResultValue, ...]:
        counts = {refusal: refusals.count(refusal) for refusal in dict.fromkeys(refusals)}
        others = [f"{count} other image(s) of the series not analysed: {why}" for why, count in counts.items()]
        findings: list[ResultValue] = []
        more: list[ResultValue] = []
        for uid, one in told.images.items():
            notes = (*others, *told.notes, *one.notes)
            findings.append(answers.findings_of(one.prediction, uid, self._options.thresholds, notes))
            if one.heatmap is not None:
                more.append(Picture(pixels=one.heatmap, sop_instance_uid=uid, title="LeapAI CXR heatmap"))
            if one.pdf:
                more.append(Document(pdf=one.pdf, sop_instance_uids=(uid,), title="LeapAI CXR report"))
        return (*findings, *more)

    def _provenance(self, versions: set[str]) -> Provenance:
        """Raises EngineUnavailable when the engine was exchanged while it worked: the series is asked again."""
        if len(versions) != 1:
            raise EngineUnavailable(f"engine {self.name}: its version changed between two images of one series")
        (version,) = versions
        settings = {"thresholds": dict(self._options.thresholds), "views": self._options.views}
        config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        device = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(["leapai-cxr", self._options.base_url, version, config]))
        hidden = "yes" if self._hide else "no"
        return Provenance(
            name="leapai-cxr",
            version=version,
            manufacturer="LeapAI",
            device_uid=f"2.25.{device.int}",
            weights_sha256="",  # the engine's own business
            config_sha256=config,
            parameters=(f"interface={_INTERFACE}", f"pseudonymised={hidden}"),
            notice=self._options.notice,
        )


def _value(value: Any) -> list[Any]:
    """As `anatomy` takes it: a single item stands for a sequence of one."""
    return [value if isinstance(value, str | list | tuple) else [value]] if value else []
