"""Relu's Engine API as an engine: a CBCT goes as a job, surfaces and label volumes of what was ordered come back.

POST /job, the images to a presigned URL (or fetched by the engine from a signed URL of ours), the end of the upload
told, then the job is asked about until it is done; a webhook only makes that sooner. No thread waits meanwhile.

A job starts there when the end of its upload is told, so one whose answer was lost on the way never starts, and making
it anew runs nothing twice. Not so where the engine fetches the images itself: it starts at once; if that answer is lost
the job is left to a person, what was laid out for it withdrawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dicom_node.breaker import BreakerState
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings
from dicom_node.engines import _relu_answers as answers
from dicom_node.engines import _relu_results as results
from dicom_node.engines._http import Answer, Observer, parse_options
from dicom_node.engines._relu_answers import FileState
from dicom_node.engines._relu_api import INPUT, OVER, ReluApi, again_as
from dicom_node.engines._relu_input import Images, Packed, extension_of, pack
from dicom_node.engines._relu_notes import Handle, Note, Step
from dicom_node.engines._relu_options import MeshOrder, ReluOptions, VolumeOrder
from dicom_node.engines.handed_out import Shelf
from dicom_node.engines.privacy import must_hide
from dicom_node.engines.signed_urls import Signer
from dicom_node.engines.webhooks import Webhooks
from dicom_node.errors import (
    ConfigError,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    StorageError,
)
from dicom_node.identity import device_uid
from dicom_node.interfaces import Clock, Heartbeat
from dicom_node.model import EngineTask, Sending, StoredInstance
from dicom_node.values import EngineResult, Pending, Provenance

__all__ = ["ReluEngine", "ReluOptions"]

log = logging.getLogger(__name__)

_MAX_SPENT = 3
_SLOWER = 1.5
_LONGEST_WAIT_S = 600.0  # of a Retry-After
_MAX_POLLED = 4096  # jobs whose polls are counted
_UNKNOWN_JOB = "00000000-0000-4000-8000-000000000000"


class ReluEngine:
    """An Engine API of Relu as an engine.

    Construction validates the options (ConfigError, naming engines.NAME.options.KEY) and does nothing else. `data_dir`
    is where the node's secret for pseudonyms lies. `links`, the node's shelf and its signer with the public base URL
    (`handed_out.shelf_and_signer`), is needed for `handover: link`; `webhooks` for `webhook: true`. Other keyword
    arguments are ignored. Several series may be run and polled at a time, from threads.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        data_dir: Path | None = None,
        clock: Clock | None = None,
        links: tuple[Shelf, Signer] | None = None,
        webhooks: Webhooks | None = None,
        **node: Any,
    ) -> None:
        self.name = name
        self._options = parse_options(ReluOptions, name, settings.options)
        self._model = settings.model or "virtualpatientengine"
        self._timeout_s = settings.timeout_s
        self._clock: Clock = clock or SystemClock()
        self._links, self._webhooks = links, webhooks
        parts = urlsplit(self._options.base_url)
        self._host = parts.hostname or ""
        self._version = parts.path.rpartition("/")[2] or "unknown"
        self._hide = must_hide(self._options, self._host)
        self._images = Images(name, self._host, hide=self._hide, data_dir=data_dir)
        self._observer: Observer | None = None
        self._trouble = ""
        self._closed = False
        self._guard = threading.Lock()
        self._polled: dict[str, int] = {}
        self._api = ReluApi(name, self._options, self._clock, self._tell)

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment, '' when it can, as far as is known without asking it."""
        if self._api.state is BreakerState.OPEN:
            return f"it rests after failures in a row; the last: {self._trouble}"
        return self._trouble

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`, and `token_expires_seconds` once there is a token."""
        told = {"breaker_state": float(self._api.state.value)}
        left_s = self._api.tokens.left_s
        if left_s is not None:
            told["token_expires_seconds"] = left_s
        return told

    def observe(self, observer: Observer) -> None:
        """See `interfaces.Engine`."""
        self._observer = observer

    def _tell(self, engine: str, outcome: str, seconds: float) -> None:
        if self._observer is not None:
            self._observer(engine, outcome, seconds)

    def check(self) -> None:
        """Raise ConfigError when a credential is missing, or what `handover` and `webhook` need of the node."""
        self._api.tokens.check()
        prefix = f"engines.{self.name}.options"
        if self._options.handover == "link" and self._links is None:
            raise ConfigError(f"{prefix}.handover: link needs the public URL of the node's HTTP port, or write upload")
        if self._options.webhook and self._webhooks is None:
            raise ConfigError(f"{prefix}.webhook: needs the public URL of the node's HTTP port, or write false")

    def report(self) -> Sequence[tuple[str, str]]:
        """Get a token and ask about a job that cannot exist, see `interfaces.Engine`. Raises NodeError."""
        self.check()
        self._api.tokens.ready()
        left_s = self._api.tokens.left_s or 0.0
        known = (200, 202, 400, 404, 410, 422)
        status = self._api.status(_UNKNOWN_JOB, expect=known, left_s=30.0, beat=_still).status
        ordered = [f"{', '.join(order.structures)} ({order.extension})" for order in self._orders]
        return (
            ("reached", f"{self._host}: answers (status {status}, asked about an unknown job)"),
            ("version", self._version),
            ("token", f"from {self._api.tokens.host}, expires in {left_s / 3600:.1f} h"),
            ("ordered", "; ".join(ordered)),
            ("images", "uploaded" if self._options.handover == "upload" else "fetched by the engine from this node"),
            ("what leaves", "pseudonymised images" if self._hide else "images as they are, with the patient's name"),
        )

    @property
    def _orders(self) -> tuple[MeshOrder | VolumeOrder, ...]:
        return (*self._options.meshes, *self._options.volumes)

    def close(self) -> None:
        """Close the connections; what is under way ends. Idempotent."""
        self._closed = True
        self._api.close()

    # --- submit

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> Pending:
        """Make the job and give it the images, going on where an earlier try stopped.

        Raises SeriesRejected (no regular stack of slices), EngineRejected (the images may not leave), EngineUnavailable
        (not reached, refuses the credentials, no token), EngineTimeout, EngineError (an answer that is none, or a job
        that may or may not have been started: its message says what to do), StorageError, and what `heartbeat`,
        `task.remember` and `task.record` raise.
        """
        budget = _Budget(self, heartbeat, min(task.timeout_s, self._timeout_s))
        note = Note.of(task.note)
        with self._told():
            if note is not None and note.step is Step.SUBMITTING and note.shelf:
                self._lost(task, note)
            if note is None or note.step in (Step.SUBMITTING, Step.CREATED):
                note = self._handed_over(task, note, budget)
            if note.step is Step.UPLOADED:
                note = self._notified(task, note, budget, again=Note.of(task.note) == note)
        handle = Handle(note.job, note.shelf)
        return Pending(handle=str(handle), poll_after_s=self._options.first_poll_s)

    def _handed_over(self, task: EngineTask, note: Note | None, budget: _Budget) -> Note:
        instances = self._images.fit(task, budget.beat)
        if self._options.handover == "link":
            return self._linked(task, instances, budget)
        with tempfile.TemporaryDirectory(prefix="relu-") as folder:
            packed = self._images.packed(task, instances, Path(folder) / "images", budget.beat)
            if note is None or note.step is Step.SUBMITTING:
                note = self._submitted(task, packed, note.spent if note else 0, budget)
                return self._uploaded(task, note, packed, budget)
            try:
                return self._uploaded(task, note, packed, budget)
            except EngineError as exc:
                if exc.http_status not in OVER:
                    raise
            # the URLs of a job that was made long ago are over; that job never starts
            if note.spent >= _MAX_SPENT:
                raise EngineError(f"engine {self.name}: {note.spent + 1} jobs were made and none took the images")
            log.info("a presigned URL was over; a new job is made", extra={"engine": self.name, "job": task.job_id})
            note = self._submitted(task, packed, note.spent + 1, budget)
            return self._uploaded(task, note, packed, budget)

    def _order(self, task: EngineTask, source: Mapping[str, str]) -> dict[str, Any]:
        """The body of POST /job."""
        options = self._options
        meshes = [{"extension": order.extension, "structures": list(order.structures)} for order in options.meshes]
        volumes = [{"extension": order.extension, "structures": list(order.structures)} for order in options.volumes]
        wanted = {key: orders for key, orders in (("meshes", meshes), (options.volumes_key, volumes)) if orders}
        body: dict[str, Any] = {"inputFiles": {INPUT: dict(source)}, "outputFiles": wanted}
        if options.job_options:
            body["options"] = dict(options.job_options)
        if options.cloud_package:
            body["cloudPackage"] = options.cloud_package
        if options.webhook and self._webhooks is not None and task.job_id:
            body["finishWebhook"] = self._webhooks.url(task.job_id)
        return body

    def _submitted(self, task: EngineTask, packed: Packed, spent: int, budget: _Budget) -> Note:
        """A job that waits for its images: nothing is lost, and nothing runs twice, when the answer does not come."""
        task.remember(Note(step=Step.SUBMITTING, spent=spent).text)
        asked = Sending(what="request", host=self._host, objects=0, identifiable=False)
        with task.record(asked) as tell:
            body = self._order(task, {"extension": packed.extension})
            made = self._api.submit(body, left_s=budget.left_s(), beat=budget.beat)
            tell(replace(asked, remote_id=made.job_id))
        if not made.upload_url or not made.notify_url:
            raise EngineError(f"engine {self.name}: the answer to a new job lacks the URLs for its images")
        note = Note(step=Step.CREATED, job=made.job_id, upload=made.upload_url, notify=made.notify_url, spent=spent)
        task.remember(note.text)
        return note

    def _uploaded(self, task: EngineTask, note: Note, packed: Packed, budget: _Budget) -> Note:
        host = urlsplit(note.upload).hostname or ""
        if not self._hide and must_hide(self._options, host):
            raise EngineError(
                f"engine {self.name}: it is on this machine and wants the images at {host}, which is not; "
                "set send_identifiable if the patient may be seen there, else reach the engine by its own name"
            )
        sending = replace(packed.sending, host=host, remote_id=note.job)
        with task.record(sending):
            self._api.upload(note.upload, packed.path, left_s=budget.left_s(), beat=budget.beat)
        done = replace(note, step=Step.UPLOADED, upload="")
        task.remember(done.text)
        return done

    def _notified(self, task: EngineTask, note: Note, budget: _Budget, *, again: bool) -> Note:
        self._api.notify(note.notify, again=again, left_s=budget.left_s(), beat=budget.beat)
        done = replace(note, step=Step.STARTED, notify="")
        task.remember(done.text)
        return done

    # --- submit, the engine fetching the images

    def _linked(self, task: EngineTask, instances: Sequence[StoredInstance], budget: _Budget) -> Note:
        if self._links is None:
            raise ConfigError(
                f"engines.{self.name}.options.handover: link needs the node's public URL, or write upload"
            )
        shelf, signer = self._links
        name = f"relu-{task.job_id}" if task.job_id else f"relu-by-hand-{uuid.uuid4().hex[:16]}"
        shelf.revoke(name)  # of a try that ended before anything was asked
        extension = extension_of(instances)
        pseudonyms = self._images.pseudonyms(task)
        try:
            object_id, identifiable = shelf.put(
                name, extension, lambda file: pack(instances, file, pseudonyms, budget.beat)
            )
        except EngineRejected:
            shelf.revoke(name)
            raise
        laid_out = shelf.open(name, object_id)
        if laid_out is None:
            raise StorageError(f"images laid out for engine {self.name} are gone")
        with laid_out:
            digest = hashlib.sha256()
            for piece in iter(lambda: laid_out.read(1 << 20), b""):
                digest.update(piece)
            size = laid_out.tell()
        url = signer.url(name, object_id, lifetime_s=self._options.link_lifetime_s)
        sending = self._images.sending(instances, identifiable, size, digest.hexdigest())
        asking = Note(step=Step.SUBMITTING, shelf=name)
        task.remember(asking.text)
        try:
            with task.record(sending) as tell:
                body = self._order(task, {"extension": extension, "downloadUrl": url})
                made = self._api.submit(body, left_s=budget.left_s(), beat=budget.beat)
                tell(replace(sending, remote_id=made.job_id))
        except EngineError as exc:
            if _maybe_taken(exc):
                self._lost(task, asking, exc)
            shelf.revoke(name)
            task.remember(Note(step=Step.SUBMITTING).text)
            raise
        done = Note(step=Step.STARTED, job=made.job_id, shelf=name)
        task.remember(done.text)
        return done

    def _lost(self, task: EngineTask, note: Note, cause: Exception | None = None) -> NoReturn:
        self._withdraw(note.shelf)
        raise EngineError(
            f"engine {self.name}: a job was submitted and the answer was lost, so that it may be running there; it is "
            "not submitted again by itself. What it was to fetch is withdrawn. See the engine's own list of jobs, then "
            f"`dicom-node jobs retry {task.job_id}`"
        ) from cause

    def _withdraw(self, shelf: str) -> None:
        if shelf and self._links is not None:
            self._links[0].revoke(shelf)

    # --- ask

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """The values of a finished job, or Pending.

        Raises EngineUnavailable (not reached; a file cannot be fetched now), EngineTimeout, EngineError (the job failed
        there, is not known any more, or what came back is unusable: the file is then in the quarantine).
        """
        budget = _Budget(self, _still, min(task.timeout_s, self._timeout_s))
        known = Handle.of(handle)
        with self._told():
            try:
                answer = self._api.status(known.job, left_s=budget.left_s(), beat=budget.beat)
            except EngineError as exc:
                if exc.http_status in (404, 410):
                    why = f"; it does not know the job any more: `dicom-node jobs retry {task.job_id}` makes a new one"
                    self._withdraw(known.shelf)
                    raise again_as(EngineError, exc, why) from exc
                raise
            if answer.status == 202:
                return Pending(handle=handle, poll_after_s=self._pause_s(known.job, answer))
            result = self._result(task, answer, budget)
        self._polled.pop(known.job, None)
        self._withdraw(known.shelf)
        return result

    def _pause_s(self, job: str, answer: Answer) -> float:
        """Ten seconds, then half as long again each time up to a minute, spread; or as the engine asks."""
        with self._guard:
            if len(self._polled) >= _MAX_POLLED:
                self._polled.clear()
            times = self._polled[job] = self._polled.get(job, 0) + 1
        options = self._options
        asked = answer.headers.get("retry-after", "").strip()
        if asked.isascii() and asked.isdigit():
            return min(max(float(asked[:6]), 1.0), _LONGEST_WAIT_S)
        pause_s = min(options.first_poll_s * _SLOWER ** min(times, 40), options.longest_poll_s)
        return max(pause_s * (0.9 + 0.2 * random.random()), 1.0)

    def _result(self, task: EngineTask, answer: Answer, budget: _Budget) -> EngineResult:
        began = time.perf_counter()
        told = answers.results(answer.body)
        meshes = results.matched(self._options.meshes, told.files.get("meshes", ()))
        volumes = results.matched(self._options.volumes, told.files.get(self._options.volumes_key, ()))
        states = [one.state for one in (*meshes, *volumes)]
        if not told.success:
            raise EngineError(f"engine {self.name}: the job failed there ({_counted(states)}); ask the vendor about it")
        if not any(state in (FileState.AVAILABLE, FileState.MISSING) for state in states):
            raise EngineError(f"engine {self.name}: the job ended without a single file ({_counted(states)})")
        geometry = self._images.geometry(task, budget.beat)
        with tempfile.TemporaryDirectory(prefix="relu-") as folder:
            fetched = [self._fetched(task, one, Path(folder) / f"mesh-{n}", budget) for n, one in enumerate(meshes)]
            painted = [self._fetched(task, one, Path(folder) / f"volume-{n}", budget) for n, one in enumerate(volumes)]
            here = time.perf_counter()
            values = results.values_of(self._options, fetched, painted, geometry, task.quarantine, budget.beat)
        stages = {"forward": here - began, "finish": time.perf_counter() - here}
        return EngineResult(values=values, provenance=self._provenance(), stage_seconds=stages)

    def _fetched(self, task: EngineTask, one: results.Delivered, path: Path, budget: _Budget) -> results.Delivered:
        if one.file is None or one.state is not FileState.AVAILABLE:
            return one
        most = self._options.max_mesh_bytes if one.order in self._options.meshes else self._options.max_download_bytes
        saved = self._api.download(one.file.url, path, most=most, left_s=budget.left_s(), beat=budget.beat)
        if self._options.check_size and one.file.size not in (None, saved.length):
            why = f"a file has {saved.length} bytes, the engine announced {one.file.size}"
            name = task.quarantine(path, why)
            raise EngineError(f"engine {self.name}: {why}" + (f"; in the quarantine as {name}" if name else ""))
        return replace(one, path=path)

    # --- nobody waits any more

    def cancel(self, handle: str) -> None:
        """Withdraw what is laid out. The Engine API has no call to stop a job: what it answers is dropped."""
        self._withdraw(Handle.of(handle).shelf)

    def cancel_noted(self, note: str) -> None:
        """As `cancel`, for a job that ended before it had a handle."""
        noted = Note.of(note)
        if noted is not None:
            self._withdraw(noted.shelf)

    # --- together

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What makes it unavailable is its trouble until it answers well again."""
        try:
            yield
        except EngineUnavailable as exc:
            self._trouble = str(exc)
            raise
        self._trouble = ""

    def _provenance(self) -> Provenance:
        options = self._options
        orders = [order.model_dump(mode="json") for order in self._orders]
        told = {"orders": orders, "options": dict(options.job_options), "frame": options.mesh_frame}
        told |= {"labels": options.labels.model_dump(mode="json")}
        config = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        return Provenance(
            name=self._model,
            version=self._version,
            manufacturer=options.manufacturer,
            device_uid=device_uid("relu", options.base_url, self._model, self._version, config),
            weights_sha256="",  # the engine's own business
            config_sha256=config,
            parameters=("interface=Engine API", f"pseudonymised={'yes' if self._hide else 'no'}"),
            notice=options.notice,
        )


def _still() -> None:
    """No heartbeat."""


def _maybe_taken(exc: EngineError) -> bool:
    """Whether the job may have been made although no usable answer came; RFC 9110 15.6.4: with 503 it was not."""
    if exc.http_status is not None:
        return exc.maybe_taken and exc.http_status != 503
    return exc.maybe_taken or not isinstance(exc, EngineUnavailable | EngineTimeout)


def _counted(states: Sequence[FileState | None]) -> str:
    words = [state.value if state is not None else "not told of" for state in states]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "no file"


class _Budget:
    """The time of one call of the engine. `beat` is for long loops: it ends them when it is over or it is closed."""

    def __init__(self, engine: ReluEngine, heartbeat: Heartbeat, timeout_s: float) -> None:
        self._engine, self._heartbeat = engine, heartbeat
        self._timeout_s, self._end = timeout_s, time.monotonic() + timeout_s

    def left_s(self) -> float:
        """What is left. Raises EngineTimeout when nothing is."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise EngineTimeout(f"engine {self._engine.name}: not done within {self._timeout_s:g} s")
        return left

    def beat(self) -> None:
        """Raises EngineTimeout, EngineUnavailable, and what the heartbeat raises."""
        if self._engine._closed:
            raise EngineUnavailable(f"engine {self._engine.name}: it is closed")
        self._heartbeat()
        self.left_s()
