"""The calls of the Aignostics Platform API v1, one method each: its answers as values, its refusals as errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from dicom_node.engines._aignostics_told import Application, Artifact, Item, Run, Version, read, run_id_of, word
from dicom_node.engines._http import Answer, Checksum, Downloaded, HttpClient, WrongChecksum
from dicom_node.engines.oauth import Tokens
from dicom_node.errors import ConfigError, EngineError, EngineRejected, EngineTimeout, EngineUnavailable
from dicom_node.interfaces import Heartbeat

__all__ = ["OUT_OF_QUOTA", "Platform"]

API = "/api/v1"
PAGE = 100
MAX_PAGES = 20
RESOLVED = 3  # times a URL that expired is asked for again
OUT_OF_QUOTA = 402
_CALL_S = 120.0
_EXPIRED = (400, 401, 403)  # what stores answer to a signed URL that is over
_PLACE = re.compile(r"[A-Za-z0-9_-]{1,64}")

Value = TypeVar("Value")


def _still() -> None:
    """No heartbeat."""


class Platform:
    """One account of the platform. Thread-safe. `tokens` None: the client's own header is used."""

    def __init__(self, name: str, http: HttpClient, tokens: Tokens | None) -> None:
        self._name = name
        self._http = http
        self._tokens = tokens

    # --- what is offered

    def applications(self) -> Sequence[Application]:
        """Those of this account, the first hundred."""
        told = self._json(self._get("/applications", {"page": "1", "page-size": str(PAGE)}))
        return [read(Application, one, "application") for one in told] if isinstance(told, list) else []

    def version(self, application: str, version: str, heartbeat: Heartbeat = _still) -> Version:
        """Raises ConfigError when this account has no such version."""
        path = f"/applications/{_part(application)}/versions/{_part(version)}"
        answer = self._get(path, expect=(200, 404), heartbeat=heartbeat)
        if answer.status == 404:
            raise ConfigError(
                f"engines.{self._name}: the platform offers this account no application {application!r} in version "
                f"{version!r}; `dicom-node engines check {self._name}` lists what there is"
            )
        return read(Version, self._json(answer), "version")

    # --- runs

    def submit(self, request: Mapping[str, Any], heartbeat: Heartbeat = _still) -> str:
        """POST /runs; the run's id. Never repeated: doing it twice makes two runs.

        Raises EngineRejected for what it does not accept, with the places of the request it names; EngineUnavailable
        with `http_status` 402 when the quota is used up; and whatever a call raises, `maybe_taken` where the run may
        exist all the same.
        """

        def ask() -> Answer:
            return self._http.call(
                "POST",
                f"{API}/runs",
                idempotent=False,
                json=request,
                expect=(200, 201, 400, 404, 422),
                heartbeat=heartbeat,
                timeout_s=_CALL_S,
            )

        answer = self._authorized(ask, heartbeat)
        if answer.status >= 400:
            raise EngineRejected(f"engine {self._name}: the platform does not accept the request ({_refusal(answer)})")
        try:
            return run_id_of(answer.json())
        except EngineError as exc:
            exc.maybe_taken = True
            raise

    def find(self, application: str, token: str, heartbeat: Heartbeat = _still) -> str:
        """The run whose custom metadata has our token, '' when there is none.

        Raises EngineError when the platform lists so many others that nobody can say.
        """
        query = {"application_id": application, "custom_metadata": f'$.node_job ? (@ == "{token}")'}
        for page in range(1, MAX_PAGES + 1):
            params = {**query, "page": str(page), "page_size": str(PAGE), "sort": "-submitted_at"}
            answer = self._get("/runs", params, expect=(200, 404), heartbeat=heartbeat)
            told = self._json(answer) if answer.status == 200 else []
            if not isinstance(told, list):
                raise EngineError(f"engine {self._name}: the platform's list of runs is none")
            runs = [read(Run, one, "run") for one in told]
            for run in runs:
                if (run.custom_metadata or {}).get("node_job") == token:
                    return run.run_id
            if len(runs) < PAGE:
                return ""
        raise EngineError(
            f"engine {self._name}: the platform does not search its runs as documented; whether a run was submitted "
            "cannot be told, and nothing is submitted again"
        )

    def run(self, run_id: str) -> Run:
        """Raises EngineError with `http_status` 404 when it was deleted."""
        return read(Run, self._json(self._get(f"/runs/{run_id}")), "run")

    def item(self, run_id: str, external_id: str) -> Item | None:
        """The slide's part of a run, None while it is not listed."""
        answer = self._get(f"/runs/{run_id}/items/{quote(external_id, safe='')}", expect=(200, 404))
        return read(Item, self._json(answer), "item") if answer.status == 200 else None

    def cancel(self, run_id: str) -> None:
        """A run that is over, cancelled already or unknown is fine."""
        self._changed("POST", f"/runs/{run_id}/cancel", (200, 202, 204, 404, 409))

    def delete_outputs(self, run_id: str) -> None:
        """Of a run that has ended. Deleted already is fine."""
        self._changed("DELETE", f"/runs/{run_id}/artifacts", (200, 202, 204, 404, 410))

    def tell(self, run: Run, more: Mapping[str, Any]) -> None:
        """Add `more` to the run's custom metadata. What others wrote meanwhile is read and kept, once."""
        for last in (False, True):
            request: dict[str, Any] = {"custom_metadata": {**(run.custom_metadata or {}), **more}}
            if run.custom_metadata_checksum is not None:
                request["custom_metadata_checksum"] = run.custom_metadata_checksum
            status = self._changed("PUT", f"/runs/{run.run_id}/custom-metadata", (200, 412), request)
            if status == 200:
                return
            if not last:
                run = self.run(run.run_id)
        raise EngineError(f"engine {self._name}: the custom metadata of a run changes faster than it can be written")

    # --- files

    def download(
        self, run_id: str, artifact: Artifact, target: Path, checksum: Checksum | None, timeout_s: float
    ) -> Downloaded:
        """An output into `target`. Where it lies is asked for just before, and again when that URL is over.

        Raises EngineError with `http_status` 404 or 410 when it was deleted there; WrongChecksum.
        """
        path = f"{API}/runs/{run_id}/artifacts/{artifact.output_artifact_id}/file"
        for last in (*[False] * (RESOLVED - 1), True):
            try:
                return self._authorized(
                    lambda: self._http.download(path, target, checksum=checksum, timeout_s=timeout_s)
                )
            except WrongChecksum:
                raise
            except EngineError as exc:
                if exc.http_status not in _EXPIRED:
                    raise
                if last:  # neither is it the job's fault nor final
                    message = f"engine {self._name}: the platform hands out no URL that can be fetched"
                    raise EngineUnavailable(f"{message} (status {exc.http_status})") from exc
        raise AssertionError("unreachable")

    # --- how

    def _get(
        self,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        expect: Sequence[int] = (200,),
        heartbeat: Heartbeat = _still,
    ) -> Answer:
        def ask() -> Answer:
            return self._http.call(
                "GET",
                f"{API}{path}",
                idempotent=True,
                params=params,
                expect=expect,
                heartbeat=heartbeat,
                timeout_s=_CALL_S,
            )

        try:
            return self._authorized(ask, heartbeat)
        except EngineTimeout as exc:  # nothing of a job was being worked on: it is an outage
            raise EngineUnavailable(str(exc)) from exc

    def _json(self, answer: Answer) -> Any:
        """What is no JSON comes from something between the platform and the node, and passes."""
        try:
            return answer.json()
        except EngineError as exc:
            raise EngineUnavailable(f"engine {self._name}: {exc}") from exc

    def _changed(self, method: str, path: str, expect: Sequence[int], request: Any = None) -> int:
        def ask() -> Answer:
            return self._http.call(
                method, f"{API}{path}", idempotent=True, json=request, expect=expect, timeout_s=_CALL_S
            )

        return self._authorized(ask).status

    def _authorized(self, ask: Callable[[], Value], heartbeat: Heartbeat = _still) -> Value:
        return ask() if self._tokens is None else self._tokens.authorized(ask, heartbeat=heartbeat)


def _part(text: str) -> str:
    return quote(text, safe="")


def _refusal(answer: Answer) -> str:
    """Status and the places a 422 names; its messages may quote what was sent."""
    places = []
    try:
        detail = answer.json().get("detail")
    except (EngineError, AttributeError):
        detail = None
    for one in detail[:5] if isinstance(detail, list) else []:
        where = one.get("loc") if isinstance(one, Mapping) else None
        parts = [str(part) for part in where] if isinstance(where, list) else []
        if parts and all(_PLACE.fullmatch(part) for part in parts):
            kind = one.get("type")
            places.append(f"{'.'.join(parts)}: {word(kind if isinstance(kind, str) else None)}")
    return "; ".join((f"status {answer.status}", *places))
