"""Where an engine may say that something happened to a job: a hint, believed in nothing.

    <base>/engine-events/<job>/<token>

The token is an HMAC of the job's number under the node's secret: nobody can guess it, nothing is stored for it, and
every process of the node makes the same one. What is sent there is not read: the job is looked at sooner, that is all.
Repeating it costs nothing: one wake in ten seconds is passed on for each job.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

from dicom_node.engines.keys import node_secret
from dicom_node.interfaces import Clock

__all__ = ["PREFIX", "Heard", "Webhooks"]

log = logging.getLogger(__name__)

PREFIX = "/engine-events/"
NOT_SOONER_S = 10.0
MAX_REMEMBERED = 1024  # jobs
_TARGET = re.compile(re.escape(PREFIX) + r"([1-9][0-9]{0,17})/([A-Za-z0-9_-]{43})")


class Heard:
    """The answer: a status, and nothing else. As `http.health.MountedAnswer`."""

    def __init__(self, status: HTTPStatus) -> None:
        self.status = status
        # RFC 9110 8.6: there is no Content-Length with 204
        self.headers: Mapping[str, str] = {} if status is HTTPStatus.NO_CONTENT else {"Content-Length": "0"}

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        """There is nothing to give back."""


class Webhooks:
    """Makes the URLs (`url`), and answers below `prefix` when it is mounted on the node's HTTP server.

    Thread-safe. `base_url` is how engines reach the node's HTTP port; `wake(job)` is `JobQueue.wake_job`, only needed
    where it is mounted: the process that makes URLs need not be the one that answers.
    """

    prefix = PREFIX

    def __init__(self, data_dir: Path, clock: Clock, *, base_url: str = "", wake: Callable[[int], object]) -> None:
        self._data_dir = data_dir
        self._clock = clock
        self._base_url = base_url.rstrip("/")
        self._wake = wake
        self._guard = threading.Lock()
        self._secret = b""
        self._woken: OrderedDict[int, float] = OrderedDict()

    def url(self, job: int) -> str:
        """Where the engine may tell of the job. Raises ValueError without a base URL or for a run by hand (job 0)."""
        if not self._base_url or job < 1:
            raise ValueError("a base URL and a job are needed")
        return f"{self._base_url}{PREFIX}{job}/{self._token(str(job))}"

    def __call__(self, method: str, target: str, headers: Mapping[str, str]) -> Heard:
        """204 for POST or PUT of a URL that `url` made, whatever became of the job; 404 for anything else.

        Raises StorageError when the catalog cannot be had, which the server tells as 503.
        """
        found = _TARGET.fullmatch(target) if len(target) < 256 else None
        job, token = found.groups() if found is not None else ("1", "")
        # compared in any case, and in constant time
        genuine = hmac.compare_digest(self._token(job), token)
        if found is None or not genuine or method not in ("POST", "PUT"):
            return Heard(HTTPStatus.NOT_FOUND)
        if self._is_due(int(job)):
            self._wake(int(job))
            log.info("an engine told of a job", extra={"job": int(job)})
        return Heard(HTTPStatus.NO_CONTENT)

    def _is_due(self, job: int) -> bool:
        now_s = self._clock.boot().seconds
        with self._guard:
            last_s = self._woken.get(job, float("-inf"))
            if now_s - last_s < NOT_SOONER_S:
                return False
            self._woken[job] = now_s
            self._woken.move_to_end(job)
            while len(self._woken) > MAX_REMEMBERED:
                self._woken.popitem(last=False)
            return True

    def _token(self, job: str) -> str:
        with self._guard:
            if not self._secret:
                self._secret = node_secret(self._data_dir)
            secret = self._secret
        digest = hmac.new(secret, f"dicom-node webhook 1\n{job}".encode("ascii"), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")
