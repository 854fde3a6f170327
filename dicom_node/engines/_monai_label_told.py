"""What the MONAI Label adapter is told: its options, GET /info/, the id of a session."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from dicom_node.engines._http import HttpSettings
from dicom_node.engines.labels import LabelTable
from dicom_node.engines.secrets import Secret
from dicom_node.errors import EngineError

__all__ = ["Info", "Model", "Session", "Settings", "plain_text"]


_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it becomes part of a path


class Settings(HttpSettings):
    """What `engines.NAME.options` may hold beside the settings of HTTP."""

    read_timeout_s: float = Field(default=600.0, gt=0)
    """Longer than of other engines: it answers when it is done, and is silent until then."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    """Most series at a time. A server answers nobody while it works on one; more only where it runs several workers."""
    token: Secret | None = None
    """Sent as bearer token where the server asks for one."""
    send_identifiable: bool = False
    """Send also images that may name the patient in their pixels."""
    session: bool = False
    """Put the volume as a session first: a retry, also after a crash, needs not send it again."""
    session_expiry_s: int | None = Field(default=None, ge=1, le=86400)
    """null: what the server thinks right."""
    values: Literal["auto", "hu", "any"] = "auto"
    """What voxels are: Hounsfield units, or rescaled values of any unit. auto: HU of CT, any of the rest."""
    params: dict[str, JsonValue] = Field(default_factory=dict)
    """Parameters of the model, sent with each inference."""
    labels: LabelTable = LabelTable()
    """What its labels are, by number or name, before what the server says."""
    manufacturer: str = Field(default="Project MONAI", min_length=1, max_length=64)
    """Of the model, as results tell it."""
    notice: str = Field(default="", max_length=1024)
    """What every result says of its use."""

    @field_validator("params")
    @classmethod
    def _finite(cls, params: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(params, allow_nan=False)
        return params


class Model(BaseModel):
    """A model as GET /info/ tells it; what else it tells is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = ""
    labels: Any = None
    dimension: int | None = None
    version: str | int | float | None = None


class Info(BaseModel):
    """GET /info/."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = ""
    version: str | int | float | None = None
    labels: Any = None
    models: dict[str, Model] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A volume that lies at the server."""

    id: str
    sha256: str  # of the volume: another one needs another session

    @property
    def note(self) -> str:
        """For `EngineTask.remember`; people see the first line."""
        return f"session\n{json.dumps({'session': self.id, 'sha256': self.sha256})}"

    @classmethod
    def of(cls, note: str) -> Session | None:
        """The one in a note, None when there is none."""
        try:
            told = json.loads(note.partition("\n")[2])
            return cls.told({"session_id": told["session"]}, str(told["sha256"]))
        except (ValueError, TypeError, KeyError, EngineError):
            return None

    @classmethod
    def told(cls, answer: Any, sha256: str) -> Session:
        """The one that PUT /session/ told. Raises EngineError."""
        found = answer.get("session_id") if isinstance(answer, dict) else None
        if not isinstance(found, str) or not _SESSION_ID.fullmatch(found):
            raise EngineError("the server made a session without an id that can be used")
        return cls(id=found, sha256=sha256)


def plain_text(version: str | int | float | None) -> str:
    """A version as one line of text, '' for none."""
    return "" if version is None else " ".join(str(version).split())[:64]
