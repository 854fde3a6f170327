"""An AE as an engine: it takes a series by C-STORE and answers by C-STORE, whenever it is done.

Nothing in DICOM ties such an answer to what was asked, so the node does: what came from the engine's AE after the
series was sent, in its study, referring to its images, is the job's answer (`_dicom_matching`). The objects are in the
archive by then; they become the job's results as they are. Sending the same instances again is no second question, so
a crash between any two steps costs nothing: the first whole answer is taken, what comes later is kept and listed.

Towards an engine that may not see the patient the job has UIDs of its own. Its answer comes back under them; such
objects are kept outside the index, so that nobody finds a patient who does not exist, and copies with the study's own
UIDs and patient become the results.

Loop guard: only what the node received is ever sent; what comes from the engine's AE titles is of origin `returned`,
which no rule takes by itself; an engine that sends the node's own images back is rejected; no result of an engine is
delivered to that engine (`wiring`).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, TlsClientSettings
from dicom_node.engines._dicom_answer import check_patient, restored_copies
from dicom_node.engines._dicom_matching import Fit, Matched, Sent, matched
from dicom_node.engines._dicom_note import Waiting
from dicom_node.engines._dicom_objects import Described, described
from dicom_node.engines._dicom_options import DicomEngineOptions, dicom_options
from dicom_node.engines._dicom_sending import send_all
from dicom_node.engines.keys import node_secret
from dicom_node.engines.outgoing import read_header
from dicom_node.engines.privacy import Pseudonyms, must_hide, why_not
from dicom_node.errors import (
    ConfigError,
    DeliveryError,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
)
from dicom_node.identity import device_uid
from dicom_node.interfaces import Clock, Heartbeat, ReturnedObject, Returns, Sender
from dicom_node.model import Destination, EngineTask, Origin, Sending, StoredInstance, TlsClient
from dicom_node.values import EngineResult, Pending, Provenance, ReturnedInstances

__all__ = ["DicomEngine"]

log = logging.getLogger(__name__)

Observer = Callable[[str, str, float], None]

_LAST = frozenset({"SR", "KO", "PR", "DOC"})  # they refer to the others and are delivered after them
_KEPT_DESCRIPTIONS = 2048
_TRAFFIC_S = 5.0  # traffic of associations is noted every two seconds
_SLOWER = 0.1  # of the time waited so far: how much later is looked again


class DicomEngine:
    """Objects another AE made of a series, as it made them.

    Construction validates the options (ConfigError, naming engines.NAME.options.KEY) and does nothing else. `sender`
    and `returns` are what it works with; without them it can be checked and not run. `own_titles` are the node's AE
    titles, `peers` those that may talk to it with whether each is an engine, `return_titles` the AE titles by engine
    of this kind, `client_tls` `NodeConfig.client_tls`. Other keyword arguments are ignored. Several series may be run
    at a time, from threads.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        data_dir: Path | None = None,
        sender: Sender | None = None,
        returns: Returns | None = None,
        own_titles: frozenset[str] = frozenset(),
        peers: Mapping[str, bool] | None = None,
        return_titles: Mapping[str, Sequence[str]] | None = None,
        client_tls: Callable[[bool | TlsClientSettings], TlsClient | None] | None = None,
        clock: Clock | None = None,
        **node: Any,
    ) -> None:
        self.name = name
        self._options: DicomEngineOptions = dicom_options(name, settings)
        self._timeout_s = settings.timeout_s
        self._data_dir = data_dir
        self._sender, self._returns = sender, returns
        self._tls = client_tls(self._options.tls) if client_tls is not None else None
        self._own_titles, self._peers = own_titles, peers or {}
        self._titles = frozenset(self._options.return_titles)
        sharing = {engine for engine, titles in (return_titles or {}).items() if self._titles & set(titles)}
        self._sharing = frozenset(sharing | {name})
        self._clock: Clock = clock or SystemClock()
        self._hide = must_hide(self._options, self._options.host)
        self._guard = threading.Lock()
        self._secret = b""
        self._observer: Observer | None = None
        self._trouble = ""
        self._read: OrderedDict[tuple[int, str], Described] = OrderedDict()

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment, as far as the settings and the last sending told; '' when it can."""
        return self._unanswerable() or self._trouble

    def observe(self, observer: Observer) -> None:
        """See `interfaces.Engine`."""
        self._observer = observer

    def check(self) -> None:
        """Raise ConfigError when answers could not come, or would be taken for images to analyse."""
        if why := self._unanswerable():
            raise ConfigError(why)

    def _unanswerable(self) -> str:
        key = f"engines.{self.name}.options.{'returns_from' if self._options.returns_from else 'ae_title'}"
        for title in sorted(self._titles):
            if title in self._own_titles:
                return f"{key}: {title!r} is the node itself; name the AE title the engine sends under"
            if self._peers and title not in self._peers:
                return (
                    f"{key}: {title!r} is none of the configured peers, so its answers would be turned away; "
                    "add it under peers: with is_engine: true"
                )
            if self._peers.get(title) is False:
                return f"{key}: the peer {title!r} is not marked as an engine; give it is_engine: true"
        return ""

    def report(self) -> Sequence[tuple[str, str]]:
        """C-ECHO it, see `interfaces.Engine`. Raises EngineUnavailable."""
        echo: Callable[[Destination], int] | None = getattr(self._sender, "echo", None)
        where = f"{self._options.ae_title} at {self._options.host}:{self._options.port}"
        if echo is None:
            reached = f"{where}: not asked"
        else:
            try:
                reached = f"{where}: answers C-ECHO with status 0x{echo(self._destination()):04X}"
            except DeliveryError as exc:
                raise EngineUnavailable(f"engine {self.name}: {exc}") from exc
        return (
            ("reached", reached),
            ("answers come from", ", ".join(sorted(self._titles))),
            ("what leaves", "pseudonymised images" if self._hide else "images as they are, with the patient's name"),
            ("an answer is whole", self._whole_told()),
        )

    def _whole_told(self) -> str:
        if self._options.count is not None:
            return f"with {self._options.count} objects"
        return f"{self._options.quiet_s:g} s after its last object"

    def _destination(self) -> Destination:
        options = self._options
        return Destination(
            name=self.name,
            ae_title=options.ae_title,
            host=options.host,
            port=options.port,
            calling_ae_title=options.calling_ae_title or "",
            tls=self._tls,
            user=options.user.credentials() if options.user is not None else None,
        )

    # --- asking

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> Pending:
        """Send the series; the answer comes later. What was sent before, by the note, is not sent again.

        Raises EngineRejected when nothing of the series may leave or the engine refuses images, EngineUnavailable when
        it cannot be reached or its answer could not come, EngineTimeout, StorageError, and what `heartbeat`,
        `task.remember` and `task.record` raise.
        """
        sender, returns = self._wired()
        if why := self._unanswerable():
            raise EngineUnavailable(why)
        waiting = Waiting.of_note(task.note)
        if waiting is not None and waiting.sent:
            return Pending(handle=waiting.handle, poll_after_s=self._options.poll_s)
        fit, left_out = self._fit(task, heartbeat)
        if waiting is None:
            key = "" if task.job_id else f"by hand {uuid.uuid4()}"
            waiting = Waiting.begun(returns.latest_return(), key, _frames(task), hidden=self._hide)
            task.remember(waiting.note(f"about to send {len(fit)} images by C-STORE"))
        self._send(sender, task, fit, waiting, heartbeat)
        now = self._clock.boot()
        waiting = replace(waiting, sent_s=now.seconds, sent_boot=now.boot_id, sent_at=self._clock.wall().timestamp())
        without = f", {len(task.instances) - len(fit)} left out ({'; '.join(left_out)})" if left_out else ""
        task.remember(waiting.note(f"{len(fit)} images sent{without}; its answer is waited for"))
        return Pending(handle=waiting.handle, poll_after_s=self._options.poll_s)

    def _wired(self) -> tuple[Sender, Returns]:
        if self._sender is None or self._returns is None:
            raise ConfigError(f"engine {self.name}: it works inside a node only, which sends and receives for it")
        return self._sender, self._returns

    def _fit(self, task: EngineTask, heartbeat: Heartbeat) -> tuple[list[StoredInstance], list[str]]:
        """The images that may leave, and why others may not. Raises EngineRejected when none may."""
        fit: list[StoredInstance] = []
        reasons: list[str] = []
        for instance in task.instances:
            try:
                reason = why_not(read_header(instance), hide=self._hide)
            except EngineRejected as exc:
                reason = exc.reason
            if instance.origin is not Origin.RECEIVED:
                reason = "it was made by the node or by an engine"
            if reason:
                reasons.append(reason)
            else:
                fit.append(instance)
            heartbeat()
        left_out = list(dict.fromkeys(reasons))
        if not fit:
            raise EngineRejected("; ".join(left_out) or "the series has no images")
        return fit, left_out

    def _send(
        self,
        sender: Sender,
        task: EngineTask,
        instances: Sequence[StoredInstance],
        waiting: Waiting,
        heartbeat: Heartbeat,
    ) -> None:
        pseudonyms = self._pseudonyms(task, waiting) if self._hide else None
        sending = Sending(
            what="DICOM instances",
            host=self._options.host,
            objects=len(instances),
            identifiable=not self._hide,
            # the study's name there: by it the answer is known when it comes
            remote_id=pseudonyms.uid(task.study_instance_uid) if pseudonyms else "",
        )
        began_s = self._clock.boot().seconds
        bound_s = min(task.timeout_s, self._timeout_s)

        def beat() -> None:
            if self._clock.boot().seconds - began_s > bound_s:
                raise EngineTimeout(f"engine {self.name}: the series could not be sent within {bound_s:g} s")
            heartbeat()

        outcome = "dropped"
        try:
            with task.record(sending) as tell:
                try:
                    sent_bytes, refusals = send_all(sender, self._destination(), instances, pseudonyms, beat)
                except DeliveryError as exc:
                    outcome, self._trouble = "unavailable", str(exc)
                    raise EngineUnavailable(f"engine {self.name}: {exc}") from exc
                except EngineTimeout:
                    outcome = "timeout"
                    raise
                self._trouble = ""
                if refusals:
                    outcome = "rejected"
                    raise EngineRejected(
                        f"the engine did not take {len(refusals)} of {len(instances)} images; the first: "
                        f"{refusals[0][1]}"
                    )
                outcome = "ok"
                tell(replace(sending, bytes=sent_bytes))
        finally:
            if self._observer is not None:
                self._observer(self.name, outcome, self._clock.boot().seconds - began_s)

    # --- the answer

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """Its answer, when it is whole.

        Raises EngineRejected when the engine sends the node's own images back or an answer beyond the bounds,
        EngineError when the whole answer did not come in time, is about another patient or refers to what was never
        sent; such files are quarantined as well.
        """
        _, returns = self._wired()
        waiting = Waiting.of_note(task.note) or Waiting.of_handle(handle)
        sent, study = self._sent(task, waiting)
        found = [self._described(one) for one in returns.returns(study, self._titles, waiting.after)]
        sorted_out = matched(
            found, sent, self._rivals(returns, task), least=Fit.STUDY if self._takes_unreferenced() else Fit.FRAME
        )
        if sorted_out.echoes:
            raise EngineRejected(
                f"the engine sent {len(sorted_out.echoes)} of the node's own images back (or images in their series), "
                "which is no result: let it send only what it makes, then retry the job"
            )
        self._tell_ambiguous(task, waiting, sorted_out)
        answer = [one for one in sorted_out.answer if self._expected(one)]
        if len(answer) > self._options.max_objects:
            raise EngineRejected(
                f"the engine sent {len(answer)} objects, at most {self._options.max_objects} are taken (max_objects)"
            )
        if self._whole(returns, answer, sorted_out):
            return self._result(task, waiting, answer)
        return self._later(waiting, len(answer), sorted_out)

    def _sent(self, task: EngineTask, waiting: Waiting) -> tuple[Sent, str]:
        """What was sent, as it left, and the study it comes back in."""
        uids = [instance.sop_instance_uid for instance in task.instances]
        series = {instance.series_instance_uid for instance in task.instances} | {task.series_instance_uid}
        frames, study = _frames(task), task.study_instance_uid
        if self._hide:
            known_as = self._pseudonyms(task, waiting).uid
            uids, frames, study = [known_as(uid) for uid in uids], [known_as(uid) for uid in frames], known_as(study)
            series = {known_as(uid) for uid in series}
        sent = Sent(instances=frozenset(uids), series=frozenset(series), frames=frozenset(frames), after=waiting.after)
        return sent, study

    def _rivals(self, returns: Returns, task: EngineTask) -> Mapping[int, Sent]:
        """Other jobs that an answer under the study's own UIDs could be meant for."""
        if self._hide:
            return {}
        rivals = {}
        for job in returns.open_jobs(task.study_instance_uid, self._sharing):
            theirs = Waiting.of_note(job.note)
            if job.job_id != task.job_id and theirs is not None and not theirs.hidden:
                rivals[job.job_id] = Sent(
                    instances=job.sop_instance_uids,
                    series=frozenset({job.series_instance_uid}),
                    frames=frozenset(theirs.frames),
                    after=theirs.after,
                )
        return rivals

    def _takes_unreferenced(self) -> bool:
        """A study under UIDs of the job is proof enough."""
        return self._hide or self._options.unreferenced == "take"

    def _expected(self, one: Described) -> bool:
        instance, options = one.returned.instance, self._options
        return (not options.modalities or instance.modality in options.modalities) and (
            not options.sop_classes or instance.sop_class_uid in options.sop_classes
        )

    def _described(self, one: ReturnedObject) -> Described:
        """Read once, not at every look."""
        key = (one.position, one.instance.path)
        with self._guard:
            known = self._read.get(key)
        if known is None:
            known = described(one)
            with self._guard:
                self._read[key] = known
                while len(self._read) > _KEPT_DESCRIPTIONS:
                    self._read.popitem(last=False)
        return replace(known, returned=one)

    def _tell_ambiguous(self, task: EngineTask, waiting: Waiting, sorted_out: Matched) -> None:
        """In the study's timeline, once."""
        if not sorted_out.ambiguous or not task.job_id:
            return
        jobs = ", ".join(str(job) for job in sorted_out.others)
        line = f"{len(sorted_out.ambiguous)} objects came back that fit job {jobs} as well: taken by neither, kept"
        if task.note.partition("\n")[0] != line:
            task.remember(waiting.note(line))
            log.warning(
                "returned objects fit several jobs", extra={"engine": self.name, "job": task.job_id, "others": jobs}
            )

    def _whole(self, returns: Returns, answer: Sequence[Described], sorted_out: Matched) -> bool:
        if self._options.count is not None:
            return len(answer) >= self._options.count
        quiet_s = self._options.quiet_s
        if not answer or min(one.returned.age_s for one in sorted_out.answer) < quiet_s:
            return False
        return not returns.is_sending(self._titles, max(quiet_s, _TRAFFIC_S))  # a large object may be on its way

    def _later(self, waiting: Waiting, came: int, sorted_out: Matched) -> Pending:
        """Raises EngineError when it should have been there by now."""
        passed_s = waiting.since_sent_s(self._clock)
        within_s = self._options.answer_within_s
        if within_s is not None and passed_s > within_s:
            wanted = f" of {self._options.count}" if self._options.count is not None else ""
            fits = f"; {len(sorted_out.ambiguous)} more fit other jobs as well" if sorted_out.ambiguous else ""
            raise EngineError(
                f"engine {self.name}: {came}{wanted} objects came back within {within_s:g} s of the sending{fits}"
            )
        most_s = max(self._options.poll_max_s, self._options.poll_s)
        after_s = min(max(self._options.poll_s, passed_s * _SLOWER), most_s)
        if came and self._options.count is None:
            newest_s = min(one.returned.age_s for one in sorted_out.answer)
            after_s = min(after_s, max(self._options.quiet_s - newest_s, 1.0))
        if within_s is not None:
            after_s = min(after_s, within_s - passed_s + 1.0)
        return Pending(handle=waiting.handle, poll_after_s=after_s)

    # --- the result

    def _result(self, task: EngineTask, waiting: Waiting, answer: Sequence[Described]) -> EngineResult:
        ordered = sorted(answer, key=lambda one: (one.returned.instance.modality in _LAST, one.returned.position))
        if self._hide:
            copies = restored_copies(
                self.name,
                task,
                ordered,
                self._pseudonyms(task, waiting),
                max_bytes=self._options.max_copied_bytes,
            )
        else:
            check_patient(self.name, task, ordered)
            copies = ()
        instances = tuple(one.returned.instance for one in ordered)
        return EngineResult(
            values=(ReturnedInstances(instances=instances, copies=copies),),
            provenance=self._provenance(),
            stage_seconds={"forward": waiting.since_sent_s(self._clock)},
        )

    def _pseudonyms(self, task: EngineTask, waiting: Waiting) -> Pseudonyms:
        with self._guard:
            if not self._secret:
                self._secret = secrets.token_bytes(32) if self._data_dir is None else node_secret(self._data_dir)
        return Pseudonyms(waiting.key or str(task.job_id), self._secret)

    def _provenance(self) -> Provenance:
        options = self._options
        address = (options.ae_title, options.host, str(options.port))
        return Provenance(
            name=self.name,
            version="unknown",
            manufacturer="unknown",
            device_uid=device_uid("dicom", *address),
            weights_sha256="",
            config_sha256=hashlib.sha256(options.model_dump_json().encode()).hexdigest(),
            parameters=(f"pseudonymised={'yes' if self._hide else 'no'}",),
        )

    def close(self) -> None:
        """Nothing is open between calls."""


def _frames(task: EngineTask) -> list[str]:
    """Frames of reference of the series."""
    return [str(uid) for uid in task.header.values.get("FrameOfReferenceUID", ()) if uid]
