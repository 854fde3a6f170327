"""The calls of a Clara Train AIAA server, 3.x and 4.1: what is asked, and what of the answer is believed.

Bodies always declare their length: the server's parser takes chunk headers for content. Nothing here is repeated by
itself but what asks only; an inference changes nothing over there, and a session that is made twice ends by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from dicom_node.engines._aiaa_options import AiaaOptions
from dicom_node.engines._aiaa_parts import Reply, reply_of
from dicom_node.engines._http import HttpClient, Part
from dicom_node.engines.labels import names_by_value
from dicom_node.errors import EngineCrashed, EngineError, EngineRejected, EngineUnavailable
from dicom_node.interfaces import Heartbeat

__all__ = ["LOST", "AiaaServer", "Asked", "Model", "Session"]

LOST = (404, 440)
"""Of a session: the server knows it no more. 440 is its own; a proxy or another generation may say 404."""

_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it becomes part of a path
_ASK_S, _END_S = 30.0, 10.0
_ADMIN_S = 900.0
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_NAMES = 20  # of models that an error tells


class Model(BaseModel):
    """A model as the server tells it; what else it tells is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    type: str = ""
    labels: Any = None
    version: str | int | float | None = None
    description: str | None = None
    padding: Any = None
    roi: Any = None

    @property
    def margin_mm(self) -> float:
        """Around extreme points; what older servers tell, else what the vendor's clients take."""
        told = self.padding
        whole = isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told <= 1000
        return float(told) if whole else 20.0

    @property
    def sides(self) -> tuple[int, int, int]:
        """Of the grid it works on, (column, row, slice), likewise."""
        told = self.roi if isinstance(self.roi, list) and len(self.roi) == 3 else [128, 128, 128]
        if not all(isinstance(side, int) and 4 <= side <= 512 for side in told):
            return 128, 128, 128
        return told[0], told[1], told[2]

    @property
    def label_names(self) -> list[str]:
        """Its labels in their order; of a classifier's the first may be called background."""
        if isinstance(self.labels, list):
            return [str(label) for label in self.labels]
        return [name for _, name in sorted(names_by_value(self.labels).items())]

    @property
    def shown(self) -> str:
        """Its name for people."""
        return "".join(letter for letter in self.name[:64] if letter.isprintable())

    @property
    def version_told(self) -> str:
        """One line, '' when it says none."""
        return "" if self.version is None else " ".join(str(self.version).split())[:64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A volume that lies at the server; `digest` is of what was put: another volume needs another session."""

    id: str
    digest: str

    @property
    def note(self) -> str:
        """For `EngineTask.remember`; people see the first line."""
        return f"session\n{json.dumps({'session': self.id, 'digest': self.digest})}"

    @classmethod
    def of(cls, note: str) -> Session | None:
        """The one in a note, None when there is none."""
        try:
            told = json.loads(note.partition("\n")[2])
            return cls.told({"session_id": told["session"]}, str(told["digest"]))
        except (ValueError, TypeError, KeyError, EngineError):
            return None

    @classmethod
    def told(cls, answer: Any, digest: str) -> Session:
        """The one PUT /session/ told. Raises EngineError."""
        found = answer.get("session_id") if isinstance(answer, dict) else None
        if not isinstance(found, str) or not _SESSION_ID.fullmatch(found):
            raise EngineError("the server made a session without an id that can be used")
        return cls(id=found, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of /v1/: `file` travels as `filename`, unless `session` stands for it."""

    api: str
    model: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""
    file: Path | None = None
    filename: str = ""
    content_type: str = "application/octet-stream"
    session: str = ""

    @property
    def query(self) -> Mapping[str, str]:
        """What is in the URL."""
        told = {"model": self.model, "output": self.output, "session_id": self.session}
        return {key: value for key, value in told.items() if value}


class AiaaServer:
    """One server. Methods raise what `HttpClient.call` does, and EngineError for what is not its interface."""

    def __init__(
        self,
        name: str,
        options: AiaaOptions,
        observer: Callable[[str, str, float], None] | None = None,
    ) -> None:
        self._name, self._options = name, options
        token = options.token
        secrets = {"authorization": lambda: f"Bearer {token.reveal()}"} if token is not None else {}
        self.http = HttpClient(name, options, secrets, observer)

    # --- models

    def models(self) -> Sequence[Model]:
        """GET /v1/models: those loaded. Raises EngineUnavailable when even that fails: it is no job's fault."""
        try:
            told = self._json("GET", "/v1/models", {})
        except EngineError as exc:
            if exc.http_status not in (404, 500):
                raise
            what = f"GET /v1/models answered with status {exc.http_status}: no AIAA server that works is there"
            raise EngineUnavailable(f"engine {self._name}: {what}") from exc
        if not isinstance(told, list):
            raise self._other("GET /v1/models")
        return [self._model(one) for one in told]

    def model(self, name: str, beat: Heartbeat, timeout_s: float = _ASK_S) -> Model:
        """GET /v1/models?model=: one object. Raises EngineUnavailable, with what is offered, when there is none."""
        try:
            told = self._json("GET", "/v1/models", {"model": name}, beat, min(timeout_s, _ASK_S))
        except EngineError as exc:
            if exc.http_status not in (400, 404, 500):
                raise
            told = None  # how it says that there is none is not written anywhere
        for one in told if isinstance(told, list) else [told]:
            if isinstance(one, dict) and one.get("name") == name:
                return self._model(one)
        names = sorted(model.shown for model in self.models())
        offered = ", ".join(names[:MAX_NAMES]) + (" ..." if len(names) > MAX_NAMES else "")
        raise EngineUnavailable(f"engine {self._name}: the server has no model {name!r} (offered: {offered or 'none'})")

    def _model(self, told: Any) -> Model:
        try:
            return Model.model_validate(told)
        except ValidationError:
            raise self._other("GET /v1/models") from None

    # --- inference

    def ask(self, asked: Asked, answer: Path, beat: Heartbeat, timeout_s: float) -> Reply:
        """POST /v1/{api}; the answer is in the file `answer`, or in one beside it."""
        files = [Part(name="params", content=json.dumps(asked.params, allow_nan=False))]
        if asked.file is not None:
            files.append(
                Part(
                    name=self._options.part,
                    content=asked.file,
                    filename=asked.filename,
                    content_type=asked.content_type,
                )
            )
        got = self.http.call_into(
            "POST",
            f"/v1/{asked.api}",
            answer,
            idempotent=False,  # a failure carries no cause: whether it is worth another try is the job's to say
            params=asked.query,
            files=files,
            headers={"accept": "multipart/form-data"} if asked.output != "results" else None,
            heartbeat=beat,
            timeout_s=timeout_s,
        )
        return reply_of(got.path, got.headers.get("content-type", ""), beat)

    def polygons(self, mask: Path, more_points: int, beat: Heartbeat, timeout_s: float) -> Any:
        """POST /v1/mask2polygon: what it answers, read as JSON."""
        files = (
            Part(name="params", content=json.dumps({"more_points": more_points})),
            Part(name=self._options.part, content=mask, filename="mask.nii.gz", content_type="application/gzip"),
        )
        answer = self.http.call(
            "POST",
            "/v1/mask2polygon",
            idempotent=True,
            files=files,
            headers={"accept": "application/json"},
            heartbeat=beat,
            timeout_s=timeout_s,
        )
        return answer.json()

    # --- sessions

    def put_session(self, file: Path, filename: str, digest: str, beat: Heartbeat, timeout_s: float) -> Session:
        """PUT /session/ with the volume. Its part is always `image`, whatever inferences call theirs."""
        part = Part(name="image", content=file, filename=filename, content_type="application/x-gzip")
        answer = self.http.call(
            "PUT",
            "/session/",
            idempotent=False,
            params=self._expiry(),
            files=(part,),
            expect=(200, 201),
            heartbeat=beat,
            timeout_s=timeout_s,
        )
        return Session.told(answer.json(), digest)

    def fetch_session(self, dicom: Mapping[str, Any], digest: str, beat: Heartbeat, timeout_s: float) -> Session:
        """PUT /session/ with where to fetch the series by C-GET. It answers when it has it."""
        answer = self.http.call(
            "PUT",
            "/session/",
            idempotent=False,
            params=self._expiry(),
            json={"dicom": dict(dicom)},
            expect=(200, 201),
            heartbeat=beat,
            timeout_s=timeout_s,
        )
        return Session.told(answer.json(), digest)

    def _expiry(self) -> Mapping[str, str]:
        return {"expiry": str(self._options.session_expiry_s)} if self._options.session_expiry_s else {}

    def knows(self, session: Session, beat: Heartbeat) -> bool:
        """GET /session/{id}: false only when it says that there is none."""
        try:
            self.http.call(
                "GET",
                f"/session/{session.id}",
                idempotent=True,
                params={"image": "false"},
                heartbeat=beat,
                timeout_s=_END_S,
            )
        except EngineError as exc:
            return exc.http_status not in LOST
        return True

    def end_session(self, session: Session, beat: Heartbeat = lambda: None, timeout_s: float = _END_S) -> None:
        """DELETE /session/{id}; one that is gone is as good."""
        self.http.call(
            "DELETE",
            f"/session/{session.id}",
            idempotent=True,
            expect=(200, 204, *LOST),
            heartbeat=beat,
            timeout_s=min(timeout_s, _END_S),
        )

    # --- administration

    def config(self, model: str) -> Any:
        """GET /admin/model/{name}. Raises EngineRejected when there is none."""
        return self._admin("GET", model).json()

    def load(self, model: str, config: Path, data: Path | None) -> None:
        """PUT /admin/model/{name}: a configuration and, usually, the model itself."""
        files = [Part(name="config", content=config, filename="config_aiaa.json", content_type="application/json")]
        if data is not None:  # the suffix tells the server what it is; the name is nobody's business
            suffix = "".join(data.suffixes[-2:]) if data.name.endswith(".gz") else data.suffix
            files.append(Part(name="data", content=data, filename=f"model{suffix}"))
        self._admin("PUT", model, files=files)

    def reload(self, model: str, config: Any) -> None:
        """PATCH /admin/model/{name}: another configuration for the model it has; Clara Train 3.x only.

        Raises EngineRejected that says so when the server knows the model and not the request.
        """
        try:
            self._admin("PATCH", model, json=config)
        except EngineError as exc:
            if exc.http_status not in (404, 405, 501):
                raise
            self.config(model)  # of a model it has not, this says so
            raise EngineRejected(
                f"engine {self._name}: the server has no PATCH of models (Clara Train 4 took it away): use put with "
                "the configuration and the model"
            ) from None

    def unload(self, model: str) -> None:
        """DELETE /admin/model/{name}."""
        self._admin("DELETE", model)

    def _admin(self, method: str, model: str, **body: Any) -> Any:
        try:
            return self.http.call(
                method,
                f"/admin/model/{quote(model, safe='')}",
                idempotent=method == "GET",
                expect=(200, 201, 204),
                timeout_s=_ADMIN_S,
                **body,
            )
        except EngineError as exc:
            raise self._admin_error(exc, method, model) from exc

    def _admin_error(self, exc: EngineError, method: str, model: str) -> EngineError:
        """What the server's way of saying no means to an administrator."""
        if exc.http_status == 403:
            what = "it takes admin calls from other machines only (the server's --admin_hosts)"
        elif exc.http_status == 404 and method != "PATCH":
            what = f"it has no model {model!r}, or no admin calls at all"
        elif isinstance(exc, EngineCrashed):
            why = "there is none, or the configuration does not fit; its log says"
            what = f"it failed at {method} of model {model!r}: {why}"
        else:
            return exc
        told = EngineRejected(f"engine {self._name}: {what}")
        told.http_status = exc.http_status
        return told

    # --- how

    def _json(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        beat: Heartbeat = lambda: None,
        timeout_s: float = _ASK_S,
    ) -> Any:
        return self.http.call(
            method,
            path,
            idempotent=True,
            params=params,
            headers={"accept": "application/json"},
            heartbeat=beat,
            timeout_s=timeout_s,
        ).json()

    def _other(self, what: str) -> EngineError:
        return EngineError(f"engine {self._name}: {what} is not that of an AIAA server")
