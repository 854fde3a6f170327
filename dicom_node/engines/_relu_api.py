"""The calls of the Engine API, one method each, and what their failures mean. Knows nothing of DICOM or of jobs' order.

The token goes to the configured origin and nowhere else; what is presigned gets none, not even there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dicom_node.breaker import BreakerState
from dicom_node.engines import _relu_answers as answers
from dicom_node.engines._http import Answer, Downloaded, HttpClient, Observer
from dicom_node.engines._relu_options import ReluOptions
from dicom_node.engines.oauth import Tokens
from dicom_node.errors import EngineCrashed, EngineError, EngineRejected, EngineUnavailable
from dicom_node.interfaces import Clock, Heartbeat

__all__ = ["INPUT", "OVER", "ReluApi", "again_as"]

log = logging.getLogger(__name__)

INPUT = "cbct"  # the key of the images among a job's input files
OVER = (400, 401, 403, 404, 410)  # what a store says of a presigned URL whose time is over
_CALL_S = 60.0
_NOT_THIS_WAY = (404, 405)
_ALREADY_TOLD = (400, 404, 405, 410, 422)  # to a notification that was given before


class ReluApi:
    """One engine's API. Thread-safe; construction connects nowhere.

    All methods raise EngineUnavailable (not reached, no token, status 500: no image is at fault), EngineTimeout,
    EngineError, and what `beat` raises; `left_s` bounds each. None raises EngineRejected: these calls carry no image to
    be judged, so that a refusal is a wrong setting.
    """

    def __init__(self, name: str, options: ReluOptions, clock: Clock, observer: Observer) -> None:
        self._name = name
        self._options = options
        self.tokens = Tokens(name, options.auth, verify=options.verify, clock=clock, observer=observer)
        secret = {"authorization": self.tokens.header}
        self._api = HttpClient(name, options, secret, observer=observer, clock=clock)
        self._files = HttpClient(name, options, observer=observer, clock=clock)

    @property
    def state(self) -> BreakerState:
        """Of the circuit breaker."""
        return self._api.state

    @property
    def _fields(self) -> Mapping[str, Any]:
        return {"engine": self._name}

    def close(self) -> None:
        """Close the connections. Idempotent."""
        for client in (self._api, self._files, self.tokens):
            client.close()

    def submit(self, body: Mapping[str, Any], *, left_s: float, beat: Heartbeat) -> answers.Created:
        """Make a job. Asked once: doing it twice makes two."""
        try:
            answer = self._asked(
                "POST", self._options.job_path, idempotent=False, json=body, expect=(200, 201), left_s=left_s, beat=beat
            )
        except EngineError as exc:
            if exc.http_status not in _NOT_THIS_WAY:
                raise
            what = "; is the version in base_url right, and job_path (/generic-job up to version 2)?"
            raise again_as(EngineUnavailable, exc, what) from exc
        return answers.created(answer.body, INPUT)

    def upload(self, url: str, path: Path, *, left_s: float, beat: Heartbeat) -> None:
        """Put the file where a job wants it, its length declared; begun anew when it breaks off."""
        with self._no_fault_of_the_images():
            self._files.call(
                "PUT",
                url,
                idempotent=True,
                content=path,
                headers={"content-type": "application/octet-stream"},
                expect=(200, 201, 204),
                heartbeat=beat,
                timeout_s=left_s,
            )

    def notify(self, url: str, *, again: bool, left_s: float, beat: Heartbeat) -> None:
        """Tell that the upload is through. `again`: an earlier try may have told it, so that a refusal says so.

        409 always does.
        """
        if _origin(url) != _origin(self._options.base_url):
            raise EngineError(
                f"engine {self._name}: it wants the end of the upload told at another host than that of base_url; "
                "the token goes to no other host"
            )
        try:
            self._notify(url, left_s, beat, idempotent=again)
        except EngineError as exc:
            if not again and exc.maybe_taken and exc.http_status not in _ALREADY_TOLD:
                log.info("whether the end of an upload was heard is not known: it is told again", extra=self._fields)
                self.notify(url, again=True, left_s=left_s, beat=beat)
                return
            if exc.http_status != 409 and not (again and exc.http_status in _ALREADY_TOLD):
                raise
            log.info("the end of an upload was told before", extra=self._fields)

    def _notify(self, url: str, left_s: float, beat: Heartbeat, *, idempotent: bool) -> None:
        """Not repeated by the client unless `idempotent`: what a refusal means depends on whether it is the first."""
        methods = ("PUT", "POST") if self._options.notify == "put" else ("POST", "PUT")
        how: dict[str, Any] = {"idempotent": idempotent, "expect": (200, 201, 202, 204), "left_s": left_s, "beat": beat}
        try:
            self._asked(methods[0], url, **how)
        except EngineError as exc:
            if exc.http_status not in _NOT_THIS_WAY:
                raise
            self._asked(methods[1], url, **how)

    def status(self, job: str, *, expect: Collection[int] = (200, 202), left_s: float, beat: Heartbeat) -> Answer:
        """The answer to whether the job is done: 202 not yet, 200 with its results."""
        return self._asked(
            "GET", "/pollJobResults", idempotent=True, params={"jobId": job}, expect=expect, left_s=left_s, beat=beat
        )

    def download(self, url: str, path: Path, *, most: int, left_s: float, beat: Heartbeat) -> Downloaded:
        """Fetch a result of at most `most` bytes. EngineUnavailable also when the time of the URL is over."""
        with self._no_fault_of_the_images():
            try:
                return self._files.download(url, path, max_bytes=most, heartbeat=beat, timeout_s=left_s)
            except EngineError as exc:
                if exc.http_status not in OVER:
                    raise
                raise again_as(EngineUnavailable, exc, "; the job is asked again for another URL") from exc

    def _asked(self, method: str, where: str, *, left_s: float, beat: Heartbeat, **how: Any) -> Answer:
        def ask() -> Answer:
            return self._api.call(method, where, heartbeat=beat, timeout_s=min(_CALL_S, left_s), **how)

        with self._no_fault_of_the_images():
            return self.tokens.authorized(ask, heartbeat=beat)

    @contextmanager
    def _no_fault_of_the_images(self) -> Iterator[None]:
        try:
            yield
        except EngineCrashed as exc:
            raise again_as(EngineUnavailable, exc) from exc
        except EngineRejected as exc:
            what = "; it does not take the request: are the options right for this version of the engine?"
            raise again_as(EngineError, exc, what) from exc


def again_as(kind: type[EngineError], exc: EngineError, more: str = "") -> EngineError:
    """The same as another kind of error, with more to say."""
    error = kind(f"{exc}{more}")
    error.http_status, error.maybe_taken = exc.http_status, exc.maybe_taken
    return error


def _origin(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", "", 0
