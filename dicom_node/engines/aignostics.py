"""Aignostics Platform API v1 as an engine: a whole slide is fetched by the platform under a signed URL of ours, its
outputs come back as annotations, class maps and numbers.

Submitting is not idempotent there and costs money. So before POST /runs a note says "about to submit" with a token that
goes into the run's custom metadata; whoever finds that note without a run first searches the platform's runs for the
token, several times with pauses, and only then submits (again). A run has one item, the slide; its outputs are taken as
soon as the item has ended.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dicom_node.breaker import BreakerState
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings
from dicom_node.engines._aignostics_metadata import media_types, wanted_keys
from dicom_node.engines._aignostics_options import PlatformOptions
from dicom_node.engines._aignostics_outputs import Outputs
from dicom_node.engines._aignostics_platform import OUT_OF_QUOTA, Platform
from dicom_node.engines._aignostics_submission import Submission
from dicom_node.engines._aignostics_told import Item, Note, Run, handle_parts, shelf_job, word
from dicom_node.engines._http import HttpClient, parse_options
from dicom_node.engines.handed_out import Shelf, shelf_and_signer
from dicom_node.engines.keys import node_secret, private_folder, read_private, replace_private
from dicom_node.engines.oauth import Tokens
from dicom_node.engines.privacy import must_hide
from dicom_node.engines.secrets import Secret
from dicom_node.engines.signed_urls import Signer
from dicom_node.errors import (
    ConfigError,
    EngineCrashed,
    EngineError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    NodeError,
)
from dicom_node.identity import device_uid
from dicom_node.interfaces import Clock, Heartbeat
from dicom_node.model import EngineTask
from dicom_node.values import EngineResult, Pending, Provenance

__all__ = ["AignosticsEngine"]

log = logging.getLogger(__name__)

Observer = Callable[[str, str, float], None]

FETCHED = "engine_outputs"  # folder of outputs that are deleted on the platform, see `delete_after_fetch`
ITEM = "item.json"  # what the platform said of them
KEPT_S = 30 * 86400.0
SETTLED_S = 600.0  # a lost submission that shows up in no list by then was not taken
BY_HAND = 64
_OVER, _REFUSED = "TERMINATED", (401, 402, 403)


def _still() -> None:
    """No heartbeat."""


class AignosticsEngine:
    """An application of the Aignostics Platform on whole slides.

    `settings.model` is the application's id; `settings.options` as in `PlatformOptions`. Construction validates them
    (ConfigError) and connects nowhere. `links`: the node's shelf and signer (`handed_out.shelf_and_signer`), which
    knows how the platform reaches the node; without it, `data_dir` and `options.public_url` make them. Thread-safe.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        data_dir: Path | None = None,
        links: tuple[Shelf, Signer] | None = None,
        clock: Clock | None = None,
        **node: Any,
    ) -> None:
        self.name = name
        if not settings.model:
            raise ConfigError(f"engines.{name}.model: missing; name an application of the platform, such as he-tme")
        self._application = settings.model
        self._timeout_s = settings.timeout_s
        self._options = options = parse_options(PlatformOptions, name, settings.options)
        self._data_dir = data_dir
        self._clock: Clock = clock or SystemClock()
        self._links = None if options.public_url else links
        if self._links is None and data_dir is not None and options.public_url:
            self._links = shelf_and_signer(data_dir, self._clock, base_url=options.public_url)
        self._host = urlsplit(options.base_url).hostname or ""
        self._hide = must_hide(options, self._host)
        self._observer: Observer | None = None
        self._refused = ""
        self._guard = threading.Lock()
        self._by_hand: dict[str, Note] = {}
        self._secret = b""
        auth, token = options.auth, options.token
        self._tokens = None if auth is None else Tokens(name, auth, verify=options.verify, clock=clock)
        header = self._tokens.header if self._tokens else lambda: self._bearer(token)
        self._http = HttpClient(name, options, {"authorization": header}, self._tell, clock=clock)
        self._platform = Platform(name, self._http, self._tokens)
        self._submission = Submission(
            name=name,
            application=self._application,
            options=options,
            platform=self._platform,
            host=self._host,
            hide=self._hide,
            clock=self._clock,
            links=self._shelf,
            node_secret=self._node_secret,
            remember=self._remember,
            accepted=self._accepted,
        )

    # --- how it is

    @property
    def trouble(self) -> str:
        """Why it cannot be used at the moment; '' when it can."""
        if self._refused:
            return self._refused
        if self._http.state is BreakerState.OPEN:
            return f"{self._host} did not answer several times in a row; it is tried again soon"
        return ""

    def gauges(self) -> Mapping[str, float]:
        """`breaker_state`, and `token_expires_seconds` of a token at hand."""
        told = {"breaker_state": float(self._http.state.value)}
        left_s = self._tokens.left_s if self._tokens else None
        return told if left_s is None else {**told, "token_expires_seconds": left_s}

    def observe(self, observer: Observer) -> None:
        """Tell `observer(engine, outcome, seconds)` of every request."""
        self._observer = observer

    def _tell(self, engine: str, outcome: str, seconds: float) -> None:
        if self._observer is not None:
            self._observer(engine, outcome, seconds)

    def check(self) -> None:
        """Whether its credentials and its way back to the node are there. Asks nobody. Raises ConfigError."""
        self._shelf()
        if self._tokens is not None:
            self._tokens.check()
        elif self._options.token is not None:
            self._options.token.reveal()

    def report(self) -> Sequence[tuple[str, str]]:
        """What the platform offers this account and wants to know of a slide, see `interfaces.Engine`."""
        with self._alarm():
            offered = self._platform.applications()
            version = self._platform.version(self._application, self._options.version)
        taken = self._submission.input_of(version)
        keys = ", ".join(key + ("" if needed else " (if known)") for key, needed in wanted_keys(taken.metadata_schema))
        left_s = self._tokens.left_s if self._tokens else None
        _, signer = self._shelf()
        return (
            ("reached", f"{self._host}: takes the token" + (f", good for {left_s:.0f} s" if left_s else "")),
            ("applications", ", ".join(one.application_id for one in offered) or "none"),
            ("version", f"{self._application} {version.version_number or self._options.version}"),
            ("takes", f"{taken.name}: {', '.join(media_types(taken.metadata_schema, self._options)) or 'no DICOM'}"),
            ("wants to know", keys or "nothing"),
            ("makes", ", ".join(one.name for one in version.output_artifacts) or "not told"),
            ("what leaves", "pseudonymised slides" if self._hide else "slides as they are, with the patient's name"),
            ("fetched from", urlsplit(signer.base_url).hostname or "nowhere: this node's public address is not set"),
        )

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()
        if self._tokens is not None:
            self._tokens.close()

    # --- a slide

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        """Lay the slide out and submit it, or go on where an earlier try ended.

        Raises SeriesRejected (no slide that may leave, or not fit for the application), ConfigError for what the
        version wants to know and nobody says, EngineRejected (the platform does not accept it), EngineUnavailable (not
        reached, credentials refused, quota used up), EngineTimeout, EngineError; StorageError and LeaseLost of the
        task's own functions; and whatever `heartbeat` raises.
        """
        note = Note.of(task.note)
        if note is None:
            self._sweep()
            note = self._laid_out(task, secrets.token_hex(16), heartbeat)
        return self._go_on(task, note, heartbeat)

    def _laid_out(self, task: EngineTask, token: str, heartbeat: Heartbeat) -> Note:
        try:
            with self._alarm():
                return self._submission.laid_out(task, token, heartbeat)
        except EngineRejected:
            self._take_back(token)
            raise

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """Look how far it is; the outputs when it has ended. Raises as `run`."""
        note = Note.of(task.note) or self._by_hand.get(handle_parts(handle)[1])
        if note is None:
            raise EngineError(f"engine {self.name}: nothing is remembered of this job; nothing is submitted again")
        return self._go_on(task, note, _still)

    def cancel(self, handle: str) -> None:
        """Cancel the run and take the slide off the shelf. Raises NodeError when that could not be told."""
        run_id, token, asked_at = handle_parts(handle)
        self._shelf()[0].revoke(shelf_job(token))
        if asked_at and not run_id:
            run_id = self._platform.find(self._application, token)
            if not run_id and self._wall() - asked_at < SETTLED_S:
                raise EngineUnavailable(f"engine {self.name}: it is not known yet whether a run was made")
        if run_id:
            self._platform.cancel(run_id)

    def cancel_noted(self, note: str) -> None:
        """The same for a job that ended before it had a handle."""
        noted = Note.of(note)
        if noted is not None:
            self.cancel(noted.handle)

    def _go_on(self, task: EngineTask, note: Note, heartbeat: Heartbeat) -> EngineResult | Pending:
        with self._alarm():
            if note.run_id:
                return self._collected(task, note)
            try:
                if note.asked_at:
                    return self._submission.looked_up(task, note, heartbeat)
                return self._submission.submitted(task, note, heartbeat)
            except EngineRejected:
                self._take_back(note.token)
                raise

    def _remember(self, task: EngineTask, note: Note) -> Note:
        task.remember(note.text)
        if not task.job_id:  # by hand: nothing outlasts this process anyway
            with self._guard:
                self._by_hand[note.token] = note
                while len(self._by_hand) > BY_HAND:
                    del self._by_hand[next(iter(self._by_hand))]
        return note

    # --- out

    # --- back

    def _collected(self, task: EngineTask, note: Note) -> EngineResult | Pending:
        try:
            run = self._platform.run(note.run_id)
        except EngineError as exc:
            if exc.http_status != 404:
                raise
            self._give_up(note, f"run {note.run_id} is not there any more: it was deleted on the platform")
        if run.run_id != note.run_id or run.application_id not in ("", self._application):
            raise EngineError(f"engine {self.name}: the platform answered with another run")
        item = self._platform.item(note.run_id, note.external_id)
        if item is not None and item.external_id != note.external_id:
            raise EngineError(f"engine {self.name}: the platform answered with another slide")
        if item is None or item.state != _OVER:
            if run.state == _OVER:
                ending = f"{word(run.termination_reason)}, {word(run.error_code)}"
                self._give_up(note, f"run {note.run_id} ended without the slide ({ending})")
            return self._later(note)
        tidy = self._options.delete_after_fetch or self._options.tell_fetched
        if tidy and run.state != _OVER:
            return self._later(note)  # outputs of a run that has not ended cannot be deleted
        self._is_worth_fetching(note, item)
        return self._fetched(task, note, run, item)

    def _later(self, note: Note) -> Pending:
        """A tenth of its age, within bounds."""
        age_s = max(self._wall() - note.asked_at, 0.0)
        wait_s = min(max(age_s / 10, self._options.poll_s), max(self._options.poll_max_s, self._options.poll_s))
        return Pending(handle=note.handle, poll_after_s=wait_s)

    def _is_worth_fetching(self, note: Note, item: Item) -> None:
        """Raises EngineRejected or EngineError for a slide that ended without outputs."""
        if any(one.output not in ("", "NONE") for one in item.output_artifacts):
            return
        why = f"{word(item.termination_reason)}, {word(item.error_code)}"
        if item.termination_reason == "USER_ERROR":
            self._take_back(note.token)
            raise EngineRejected(f"the platform could not use the slide ({why}), run {note.run_id}")
        self._give_up(note, f"the slide was not processed ({why}), run {note.run_id}")

    def _fetched(self, task: EngineTask, note: Note, run: Run, item: Item) -> EngineResult:
        began_s, end_s = time.monotonic(), time.monotonic() + min(task.timeout_s, self._timeout_s)

        def left_s() -> float:
            if end_s <= time.monotonic():
                raise EngineTimeout(f"engine {self.name}: the outputs of run {note.run_id} took longer than they may")
            return end_s - time.monotonic()

        outputs = Outputs(
            name=self.name, platform=self._platform, options=self._options, task=task, note=note, left_s=left_s
        )
        with self._folder(note) as folder:
            kept = read_private(folder / ITEM)
            item = item if kept is None else Item.model_validate_json(kept)  # as it was before it was deleted there
            values = outputs.values(run, item, folder)
            replace_private(folder / ITEM, json.dumps(item.model_dump()))
        self._tidy(run)
        self._take_back(note.token)
        return EngineResult(
            values=values,
            provenance=self._provenance(run),
            stage_seconds={"finish": time.monotonic() - began_s},
        )

    @contextmanager
    def _folder(self, note: Note) -> Iterator[Path]:
        """Where outputs lie while they are read; if they are deleted on the platform, until long after the job."""
        if self._options.delete_after_fetch and self._data_dir is not None:
            folder = self._data_dir / FETCHED / note.token
            private_folder(folder.parent)
            private_folder(folder)
            yield folder
        else:
            with tempfile.TemporaryDirectory(prefix="aignostics-") as temporary:
                yield Path(temporary)

    def _tidy(self, run: Run) -> None:
        """What can be left undone: the platform deletes by itself, and what it is told is for people."""
        try:
            if self._options.tell_fetched:
                self._platform.tell(run, {"node_state": "fetched"})
            if self._options.delete_after_fetch and self._data_dir is not None:
                self._platform.delete_outputs(run.run_id)
        except EngineError as exc:
            log.warning("a run was not tidied up", extra={"engine": self.name, "run": run.run_id}, exc_info=exc)

    def _sweep(self) -> None:
        """Outputs that were kept for jobs long over."""
        if self._data_dir is None:
            return
        with suppress(OSError):
            for folder in (self._data_dir / FETCHED).iterdir():
                if self._wall() - folder.stat().st_mtime > KEPT_S:
                    shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, note: Note, why: str) -> NoReturn:
        self._take_back(note.token)
        raise EngineError(f"engine {self.name}: {why}")

    def _take_back(self, token: str) -> None:
        """The slide is needed no more. What cannot be taken back now expires."""
        try:
            self._shelf()[0].revoke(shelf_job(token))
        except NodeError as exc:
            log.warning("a slide could not be taken off the shelf", extra={"engine": self.name}, exc_info=exc)

    def _provenance(self, run: Run) -> Provenance:
        version = run.version_number or self._options.version
        told = {"metadata": self._options.metadata, "labels": self._options.labels.model_dump(mode="json")}
        config = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        return Provenance(
            name=self._application,
            version=version,
            manufacturer="Aignostics",
            device_uid=device_uid("aignostics", self._options.base_url, self._application, version, config),
            weights_sha256="",  # the platform's own business
            config_sha256=config,
            parameters=("interface=Aignostics Platform API v1", f"pseudonymised={'yes' if self._hide else 'no'}"),
            notice=self._options.notice,
        )

    # --- around

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """What people must mend is the engine's trouble until it works again."""
        try:
            yield
        except EngineCrashed as exc:  # no fault of this slide, and its run is paid for
            raise EngineUnavailable(str(exc)) from exc
        except EngineUnavailable as exc:
            if exc.http_status == OUT_OF_QUOTA:
                self._refused = "the platform's quota is used up (status 402): jobs wait; order more or raise the limit"
                raise EngineUnavailable(f"engine {self.name}: {self._refused}") from exc
            if exc.http_status in _REFUSED:
                self._refused = f"the platform refuses the credentials (status {exc.http_status})"
            raise
        else:
            if not self._refused.startswith("the platform's quota"):
                self._refused = ""

    def _accepted(self) -> None:
        self._refused = ""

    def _shelf(self) -> tuple[Shelf, Signer]:
        """Raises ConfigError."""
        if self._links is None or not self._links[1].base_url:
            raise ConfigError(
                f"engines.{self.name}.options.public_url: missing; the platform fetches slides from this node: write "
                "how it reaches the node's HTTP port, such as https://node.example.org"
            )
        return self._links

    def _node_secret(self) -> bytes:
        if self._data_dir is not None:
            return node_secret(self._data_dir)
        with self._guard:
            self._secret = self._secret or secrets.token_bytes(32)
            return self._secret

    def _bearer(self, token: Secret | None) -> str:
        try:
            return f"Bearer {token.reveal() if token else ''}"
        except ConfigError as exc:  # a file being exchanged must not cost a job
            raise EngineUnavailable(f"engine {self.name}: {exc}") from exc

    def _wall(self) -> float:
        return self._clock.wall().timestamp()
