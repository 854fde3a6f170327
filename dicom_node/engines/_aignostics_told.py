"""What the platform says, as far as the adapter asks: versions, runs, items, artifacts; and the note of a job."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dicom_node.engines.slides import Slide
from dicom_node.errors import EngineError
from dicom_node.model import NOTE_MAX

__all__ = [
    "Application",
    "Artifact",
    "Item",
    "Note",
    "Run",
    "Version",
    "handle_parts",
    "read",
    "run_id_of",
    "shelf_job",
    "word",
]

_ID = r"^[0-9A-Za-z][0-9A-Za-z_-]{0,63}$"  # becomes part of a path
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,80}")
_HANDLE = re.compile(r"(-|[0-9A-Za-z][0-9A-Za-z_-]{0,63})/([0-9a-f]{32})/([0-9]{1,12})")
_SAID_MAX = 20

Told = TypeVar("Told", bound=BaseModel)
Text = Annotated[str, BeforeValidator(lambda told: "" if told is None else told)]


class _Told(BaseModel):
    """Whatever else it says is passed over: later versions say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Application(_Told):
    """An application offered to this account."""

    application_id: str
    name: Text = ""
    regulatory_classes: tuple[str, ...] = ()


class Input(_Told):
    """What a version takes, with the JSON Schema of its metadata."""

    name: str
    metadata_schema: Any = None


class Output(_Told):
    """What a version makes."""

    name: str


class Version(_Told):
    """One version of an application."""

    version_number: Text = ""
    input_artifacts: tuple[Input, ...] = ()
    output_artifacts: tuple[Output, ...] = ()


class Run(_Told):
    """A run; `state` and the rest are the platform's own words, new ones included."""

    run_id: str = Field(pattern=_ID)
    application_id: Text = ""
    version_number: Text = ""
    state: Text = ""
    termination_reason: str | None = None
    error_code: str | None = None
    custom_metadata: dict[str, Any] | None = None
    custom_metadata_checksum: str | None = None


class Artifact(_Told):
    """One output of an item. `output`: NONE, AVAILABLE, DELETED_BY_USER, DELETED_BY_SYSTEM."""

    output_artifact_id: str = Field(pattern=_ID)
    name: Text = ""
    metadata: dict[str, Any] | None = None
    output: Text = ""
    termination_reason: str | None = None
    error_code: str | None = None


class Item(_Told):
    """A slide of a run."""

    external_id: str
    state: Text = ""
    output: Text = ""
    termination_reason: str | None = None
    error_code: str | None = None
    output_artifacts: tuple[Artifact, ...] = Field(default=(), max_length=256)


def read(kind: type[Told], told: Any, what: str) -> Told:
    """`told` as that. Raises EngineError, which quotes nothing of it."""
    try:
        return kind.model_validate(told)
    except ValidationError:
        raise EngineError(f"the platform's answer is no {what} as its documentation has it") from None


def run_id_of(told: Any) -> str:
    """Of the answer to a submission. Raises EngineError."""
    return read(Run, told, "run").run_id


def word(text: str | None) -> str:
    """A word of the platform's vocabulary as a message may hold it; free text is not repeated."""
    return text if text and _WORD.fullmatch(text) else "no reason given" if not text else "a reason in free text"


# --- the note --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a job must not forget. `token` is ours and names the run before the platform has; times are wall clock.

    `object_id` '': the slide may not lie on the shelf, or in part. `asked_at` 0: nothing was submitted; from then on
    the run may exist, whether an answer came or not.
    """

    token: str
    object_id: str
    media_type: str
    crc32c: str
    length: int
    sha256: str
    objects: int
    identifiable: bool
    sop_instance_uid: str
    columns: int
    rows: int
    mpp: float
    stain: str
    said: tuple[str, ...] = ()
    asked_at: int = 0
    looked_up: int = 0
    run_id: str = ""

    @classmethod
    def about(cls, slide: Slide, **more: Any) -> Note:
        """Of a slide that is laid out; `more` are the fields the slide does not say."""
        base = slide.base
        return cls(
            sop_instance_uid=slide.sop_instance_uid,
            columns=base.columns,
            rows=base.rows,
            mpp=slide.mpp,
            stain=slide.stain,
            said=tuple(text[:300] for text in slide.notes[:_SAID_MAX]),
            **more,
        )

    @classmethod
    def of(cls, text: str) -> Note | None:
        """Read back, None when there is none. Raises EngineError: forgetting it could submit twice."""
        if not text:
            return None
        try:
            told = json.loads(text.partition("\n")[2])
            return cls(**{**told, "said": tuple(told["said"])})
        except (ValueError, TypeError, KeyError):
            raise EngineError("the note of an earlier try cannot be read; nothing is submitted again") from None

    @property
    def text(self) -> str:
        """To be remembered: the first line is for people."""
        if self.run_id:
            first = f"submitted as run {self.run_id}"
        elif self.asked_at:
            first = f"about to submit as {self.external_id}" + (
                f", {self.looked_up} look-ups" if self.looked_up else ""
            )
        else:
            first = f"{'laid out' if self.object_id else 'being laid out'} as {self.external_id}"
        text = f"{first}\n{json.dumps(asdict(self), separators=(',', ':'))}"
        assert len(text) <= NOTE_MAX
        return text

    @property
    def external_id(self) -> str:
        """The slide's name in the run: says nothing about the patient."""
        return f"slide-{self.token[:12]}"

    @property
    def shelf_job(self) -> str:
        """Under which the slide lies on the shelf (`handed_out.Shelf`)."""
        return shelf_job(self.token)

    @property
    def handle(self) -> str:
        """All that `cancel` needs."""
        return f"{self.run_id or '-'}/{self.token}/{self.asked_at}"


def shelf_job(token: str) -> str:
    """Under which a job's slide lies on the shelf (`handed_out.Shelf`)."""
    return f"aignostics-{token}"


def handle_parts(handle: str) -> tuple[str, str, int]:
    """Run ('' when it is not known), token, when it was submitted. Raises EngineError."""
    found = _HANDLE.fullmatch(handle)
    if found is None:
        raise EngineError("this is no handle of a run")
    return found.group(1).removeprefix("-"), found.group(2), int(found.group(3))
